"""What a model was trained on, as its checkpoint carries it.

So it travels with copies and renames, where paths to data and runs would rot. A record is two
files:

- `trained_on.bin`: hashes of every text with a question that trained the model or one that it
  begins from or learned from (8 bytes each, sorted), such that a question is found whatever stands
  around it;
- `trained_on.json`: which data files they are of, from which models the record was gathered, and
  which of these nobody recorded anything about. With one of those, a question that is not found may
  have been trained on all the same.
"""

import dataclasses
import functools
import hashlib
import os
import re
import shutil
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from digests import sha256
from errors import UserError
from files import Fields, check_file, read_json, resolved, write_json
from model.checkpoint import ADAPTER, base_of

RECORD, HASHES = "trained_on.json", "trained_on.bin"
# The options that say how a question is asked: an evaluation of the checkpoint asks likewise.
PROMPT_OPTIONS = ("template", "system_prompt", "prompt_suffix", "chat_template_kwargs")
FORM = 2  # of the two files
CHUNK = 20_000  # texts whose hashes are sorted together
BLOCKS, BLOCK = 64, 4096  # blocks of a weight file, and their bytes, by which it is known again

# Tokens that are hashed together, and neighbours of which one hash is kept. WINDOW is small beside
# NGRAM so that the hashes of a question cover all of its tokens, but for WINDOW - 1 at either end.
NGRAM, WINDOW = 12, 2
SPAN = NGRAM + WINDOW - 1  # tokens of a question that is found wherever it stands
BASE = np.uint64(0x9E3779B97F4A7C15)
# Words, numbers, letters of other scripts, signs of mathematics. What copies of a question differ
# in is left out: quotes, brackets, markup.
TOKEN = re.compile(r"[A-Za-z]+|\d+|[^\W\d_]|[-+*/=^<>%\u00b1\u00d7\u00f7\u2200-\u22ff]")
# Where a short question may begin or end: at tags, lines, sentences, labels ("Answer:"), quotes,
# bold text and code, words that begin an instruction, and between a formula and a capital letter.
BOUNDARY = re.compile(
    r"<\|[^<>|\n]{1,40}\|>|</?\w{1,20}>|\[(?=/?[A-Za-z]+\])|(?<=[A-Za-z])\]"
    r"|\n|[.?!](?!\d)|[:`\"\u3002\u201c\u201d\u00ab\u00bb]|(?<!\w)['\u2018]|['\u2019](?!\w)|[*_]{2,}"
    r"|\b(?=[A-Za-z]+ ?:|[Pp]lease|Let|Think|Put|Answer|Remember|Solve)|(?<=[$)}\]])\s*(?=[A-Z])"
)
PIECE = re.compile(f"{BOUNDARY.pattern}|{TOKEN.pattern}")
# Between a question and an instruction behind it without a space.
GLUED = re.compile(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])")


# --- questions as hashes -------------------------------------------------------------------------


def fingerprints(texts: Iterable[str]) -> np.ndarray:
    """The sorted hashes by which `Lineage.contains` finds every question that these texts hold.

    Winnowing (Schleimer, Wilkerson and Aiken, SIGMOD 2003): of the hashes of NGRAM tokens in a row
    the smallest of every WINDOW neighbours is kept. Every window of a question is a window of a
    text that holds the question, so that, whatever stands around it, its hashes are among the
    text's.
    A question of less than SPAN tokens has no window: for these every run of less than SPAN tokens
    from one BOUNDARY to another is hashed.
    """
    found, chunk = [], set()
    for text in texts:
        chunk |= {text, GLUED.sub(" ", text)}
        if len(chunk) >= CHUNK:
            found.append(_union(_hashes(chunk)[0]))
            chunk = set()
    return _union(*found, _hashes(chunk)[0])


def _hashes(texts: Iterable[str], only_complete: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """The hashes of all texts, and the number of the text that each is of.

    only_complete: of the runs between boundaries only those that are a complete text.
    """
    tokens, text_of, at_boundary = _tokens(texts)
    count = len(tokens)
    tokens = np.pad(tokens, (0, SPAN))
    text_of = np.pad(text_of, (0, SPAN), constant_values=-1)
    at_boundary = np.pad(at_boundary, (0, SPAN), constant_values=True)
    if only_complete:
        at_boundary[1:] = text_of[1:] != text_of[:-1]

    ngrams = np.zeros(count + WINDOW, np.uint64)
    for i in range(NGRAM):
        ngrams = ngrams * BASE + tokens[i : i + count + WINDOW]
    ngrams = _mixed(ngrams)
    smallest = np.minimum.reduce([ngrams[i : i + count] for i in range(WINDOW)])
    inside = text_of[:count] == text_of[SPAN - 1 : SPAN - 1 + count]
    found, found_in = [smallest[inside]], [text_of[:count][inside]]

    starts = np.flatnonzero(at_boundary[:count])
    runs = np.zeros(len(starts), np.uint64)
    for length in range(1, SPAN):
        last = starts + length - 1
        runs = runs * BASE + tokens[last]
        complete = at_boundary[last + 1] & (text_of[last] == text_of[starts])
        found.append(_mixed(runs[complete] + np.uint64(length)))
        found_in.append(text_of[starts[complete]])
    return np.concatenate(found), np.concatenate(found_in)


def _tokens(texts: Iterable[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """All tokens of some texts as numbers, the text of each, whether a boundary is before it."""
    code_of, codes, lengths = _Codes(), [], []
    for text in texts:
        pieces = PIECE.findall(unicodedata.normalize("NFKC", text).replace("\u2212", "-"))
        codes.append(0)  # a text begins at a boundary
        codes += [code_of[piece] for piece in pieces]
        lengths.append(1 + len(pieces))
    codes = np.array(codes, np.uint64)
    text_of = np.repeat(np.arange(len(lengths)), lengths)
    is_token = codes != 0
    at_boundary = np.roll(~is_token, 1)
    return codes[is_token], text_of[is_token], at_boundary[is_token]


class _Codes(dict):
    """A number for every token, whatever its case, and 0 for every boundary."""

    def __missing__(self, piece: str) -> int:
        self[piece] = 0
        if TOKEN.fullmatch(piece):
            self[piece] = 1 + zlib.crc32(piece.casefold().encode("utf-8", "replace"))
        return self[piece]


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Numbers of 64 bits whose order is as good as random (splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _union(*arrays: np.ndarray) -> np.ndarray:
    """The different numbers of some arrays, in order."""
    numbers = np.concatenate(arrays)
    numbers.sort(kind="stable")  # fast where the arrays are in order already
    is_new = np.ones(len(numbers), bool)
    is_new[1:] = numbers[1:] != numbers[:-1]
    return numbers[is_new]


# --- records -------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What a model was trained on, all that it begins from or learned from included.

    hashes: of the texts that hold the questions, sorted uint64.
    data: a dict for every data file or task.
    ancestors: names of the models that this was gathered from.
    unknown: what of them nobody recorded; while it is empty, a question that is not found was not
        trained on.
    prompt: how the training prompts were made (template, system prompt, suffix), for an evaluation
        that asks likewise.
    """

    hashes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))
    data: tuple[dict, ...] = ()
    ancestors: tuple[str, ...] = ()
    unknown: tuple[str, ...] = ()
    prompt: dict = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Lineage") -> "Lineage":
        """Both together; prompts are asked as `self` says."""
        return Lineage(
            _union(self.hashes, other.hashes),
            self.data + tuple(entry for entry in other.data if entry not in self.data),
            tuple(dict.fromkeys(self.ancestors + other.ancestors)),
            tuple(dict.fromkeys(self.unknown + other.unknown)),
            self.prompt,
        )

    @functools.cached_property
    def digest(self) -> str:
        """sha256 of the hashes."""
        return sha256(self.hashes.tobytes())

    def contains(self, questions: list[str]) -> np.ndarray:
        """Whether each question was trained on, as booleans.

        False where something is `unknown` means: not that anybody knows. A question of SPAN tokens
        or more was, if all its hashes are of the record, which they are if one of its texts holds
        it. Another question may be taken for it that differs only in its first or last WINDOW - 1
        tokens. A shorter question was, if a text holds it between two places of BOUNDARY. What was
        trained on as an assistant's turn is not of the record.
        """
        if not len(self.hashes):
            return np.zeros(len(questions), bool)
        hashes, question_of = _hashes(questions, only_complete=True)
        places = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        known = self.hashes[places] == hashes
        total = np.bincount(question_of, minlength=len(questions))
        found = np.bincount(question_of[known], minlength=len(questions))
        return (total > 0) & (found == total)

    def save(self, folder: Path) -> None:
        """Write the record into a checkpoint's folder and into its `adapter/`.

        The weights are there already. The hashes are a link to those of a checkpoint beside it,
        where it has the same ones. The caller moves the folder to its place, so that the record
        appears complete or not at all.
        """
        source = None
        for path in sorted(folder.parent.glob(f"step-*/{HASHES}")):
            if _read_json(path.parent).get("sha256") == self.digest:
                source = path
                break
        for place in (folder, folder / "adapter"):
            if not place.is_dir():
                continue
            if source is None:
                self.hashes.astype("<u8", copy=False).tofile(place / HASHES)
            else:
                _link(source, place / HASHES)
            source = place / HASHES
            record = {
                "form": FORM,
                "hashes": len(self.hashes),
                "sha256": self.digest,
                "weights": weights_mark(place),
                "data": self.data,
                "ancestors": self.ancestors,
                "unknown": self.unknown,
                "prompt": self.prompt,
            }
            write_json(place / RECORD, record)

    def save_beside(self, folder: Path) -> None:
        """Write the record into a folder that is in use.

        The JSON file comes last, and without the right hashes it is known to be damaged.
        """
        draft = folder / ".draft-lineage"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        self.save(draft)
        for name in (HASHES, RECORD):
            (draft / name).replace(folder / name)
        draft.rmdir()


def read(folder: Path, name: str) -> Lineage:
    """Read the record in a folder.

    name: what it is a record of. It is `unknown` where the record is missing, damaged, or of other
    weights.
    """
    record, found, problem = _read_json(folder), Lineage(), ""
    if record:
        try:
            found, problem = _parse(record, folder)
        except (OSError, ValueError, UserError):
            problem = f"{HASHES} is damaged"
    elif (folder / RECORD).exists():
        problem = f"{RECORD} is damaged"
    elif (folder / "trainer").is_dir():  # saved by a run, which writes a record
        problem = f"{RECORD} is missing"
    label = f"{name} ({problem})" if problem else name
    is_known = record and not problem
    return found + Lineage(ancestors=(name,), unknown=() if is_known else (label,))


def _parse(record: dict, folder: Path) -> tuple[Lineage, str]:
    """What a record says, and what is wrong with it."""
    fields = Fields(record, folder / RECORD)
    if fields.get("form", int) != FORM:
        return Lineage(), f"{RECORD} is of another version"
    data, prompt = fields.get("data", list), fields.get("prompt", dict)
    ancestors, unknown = fields.get("ancestors", list), fields.get("unknown", list)
    if not all(isinstance(entry, dict) for entry in data):
        return Lineage(), f"{RECORD} is damaged"
    lineage = Lineage(
        np.fromfile(folder / HASHES, "<u8").astype(np.uint64, copy=False),
        tuple(data),
        tuple(map(str, ancestors)),
        tuple(map(str, unknown)),
        prompt,
    )
    if lineage.digest != record.get("sha256"):
        return Lineage(), f"{HASHES} is damaged"
    if record.get("weights") not in (None, weights_mark(folder)):
        return lineage, f"its weights changed after {RECORD} was written"
    return lineage, ""


def of_checkpoint(name: str, folder: Path | None) -> Lineage:
    """The record of what `name` stands for, an adapter's base included.

    folder: None for a preset, whose random weights have seen nothing.
    """
    if folder is None:
        return Lineage(ancestors=(name,))
    found = read(folder, short_name(name, folder))
    base = base_of(folder) if (folder / ADAPTER).is_file() else folder
    return found if base == folder else found + read(base, short_name(str(base), base))


def prompt_of(folder: Path) -> dict:
    """How the training prompts of a checkpoint were made, as its record says; {} if it has none."""
    prompt = _read_json(folder).get("prompt")
    return prompt if isinstance(prompt, dict) else {}


def short_name(name: str, folder: Path) -> str:
    """A checkpoint's name for people on other machines.

    A hub id as it is; of a run's checkpoint the run and the step; else the folder's name.
    """
    if not Path(name).is_dir():
        return name
    path = resolved(folder)
    if path.name == "adapter":
        return f"{short_name(str(path.parent), path.parent)}/adapter"
    if path.parent.name == "checkpoints":
        return f"{path.parents[1].name}/{path.name}"
    return path.name


def weights_mark(folder: Path) -> str | None:
    """A quick mark of a folder's weight files; None if there are none.

    That is a digest of each one's size and of BLOCKS blocks of BLOCK bytes, spread evenly over it.
    What lies between these blocks does not change it.
    """
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        check_file(path)
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            for i in range(BLOCKS):
                file.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest() if files else None


def _read_json(folder: Path) -> dict:
    """trained_on.json of a folder, {} if there is none or it is damaged."""
    try:
        return read_json(folder / RECORD)
    except UserError:
        return {}


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
