"""What a model was trained on, as its checkpoint carries it: so that it travels with copies and renames, where paths to data and runs would rot.

A record is two files. `trained_on.bin` holds hashes of every text with a question that trained the model or one that it begins from or learned from
(8 bytes each, sorted), such that a question is found whatever stands around it; `trained_on.json` says which data files they are of, from which models the record was gathered, and which of these
nobody recorded anything about: with one of those a question that is not found may have been trained on all the same.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
import unicodedata
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from files import write_json
from model.checkpoint import ADAPTER, base_of

RECORD, HASHES = "trained_on.json", "trained_on.bin"
FORM = 2  # of the two files
CHUNK = 20_000  # texts whose hashes are sorted together
SAMPLED, BLOCK = 64, 4096  # blocks of a weight file, and their bytes, by which it is known again

# Tokens that are hashed together, and neighbours of which one hash is kept. WINDOW is small beside
# NGRAM so that the hashes of a question cover all of its tokens, but for WINDOW - 1 at either end.
NGRAM, WINDOW = 12, 2
SPAN = NGRAM + WINDOW - 1  # tokens of a question that is found wherever it stands
BASE = np.uint64(0x9E3779B97F4A7C15)
# Words, numbers, letters of other scripts, signs of mathematics. What copies of a question differ in
# is left out: quotes, brackets, markup.
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
    the smallest of every WINDOW neighbours is kept. Every window of a question is a window of a text
    that holds the question, so that, whatever stands around it, its hashes are among the text's.
    A question of less than SPAN tokens has no window: for these every run of less than SPAN tokens
    from one BOUNDARY to another is hashed.
    """
    found, chunk = [], set()
    for text in texts:
        chunk |= {text, GLUED.sub(" ", text)}
        if len(chunk) >= CHUNK:
            found.append(_sorted([_hashes(chunk)[0]]))
            chunk = set()
    found.append(_sorted([_hashes(chunk)[0]]))
    return _sorted(found)


def _hashes(texts, only_whole=False):
    """(the hashes of all texts, the number of the text that each is of). only_whole: of the runs
    between boundaries only those that are a whole text."""
    tokens, text_of, at_boundary = _tokens(texts)
    count = len(tokens)
    tokens = np.pad(tokens, (0, SPAN))
    text_of = np.pad(text_of, (0, SPAN), constant_values=-1)
    at_boundary = np.pad(at_boundary, (0, SPAN), constant_values=True)
    if only_whole:
        at_boundary[1:] = text_of[1:] != text_of[:-1]

    ngrams = np.zeros(count + WINDOW, np.uint64)
    for i in range(NGRAM):
        ngrams = ngrams * BASE + tokens[i : i + count + WINDOW]
    ngrams = _mixed(ngrams)
    smallest = np.minimum.reduce([ngrams[i : i + count] for i in range(WINDOW)])
    places = np.flatnonzero(text_of[:count] == text_of[SPAN - 1 : SPAN - 1 + count])
    found, found_in = [smallest[places]], [text_of[places]]

    starts = np.flatnonzero(at_boundary[:count])
    runs = np.zeros(len(starts), np.uint64)
    for length in range(1, SPAN):
        last = starts + length - 1
        runs = runs * BASE + tokens[last]
        complete = at_boundary[last + 1] & (text_of[last] == text_of[starts])
        found.append(_mixed(runs[complete] + np.uint64(length)))
        found_in.append(text_of[starts[complete]])
    return np.concatenate(found), np.concatenate(found_in)


def _tokens(texts):
    """(all tokens of some texts as numbers, the text of each, whether a boundary stands before it)"""
    code_of, codes, ends = _Codes(), [], [0]
    for text in texts:
        codes.append(0)  # a text begins at a boundary
        pieces = PIECE.findall(unicodedata.normalize("NFKC", text).replace("\u2212", "-"))
        codes += [code_of[piece] for piece in pieces]
        ends.append(len(codes))
    codes = np.array(codes, np.uint64)
    text_of = np.repeat(np.arange(len(ends) - 1), np.diff(ends))
    is_token = codes != 0
    at_boundary = np.append(True, codes[:-1] == 0)[: len(codes)]
    return codes[is_token], text_of[is_token], at_boundary[is_token]


class _Codes(dict):
    """A number for every token, whatever its case, and 0 for every boundary."""

    def __missing__(self, piece):
        is_token = TOKEN.fullmatch(piece) is not None
        self[piece] = 1 + zlib.crc32(piece.casefold().encode("utf-8", "replace")) if is_token else 0
        return self[piece]


def _mixed(numbers):
    """Numbers of 64 bits such that the order of the results is as good as random (splitmix64)."""
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


def _sorted(arrays):
    """The different numbers of some arrays, in order: by a sort that is fast where the arrays are in order already."""
    numbers = np.concatenate([np.zeros(0, np.uint64), *arrays])
    numbers.sort(kind="stable")
    return numbers[
        np.concatenate([np.ones(min(1, len(numbers)), bool), numbers[1:] != numbers[:-1]])
    ]


# --- records -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What a model was trained on, all that it begins from or learned from included.

    hashes: of the texts that hold the questions, sorted uint64. data: a dict for every data file or task. ancestors: names of the models that this was
    gathered from. unknown: what of them nobody recorded; while it is empty, a question that is not found was not trained on.
    prompt: how the training prompts were made (template, system prompt, suffix), for an evaluation that asks likewise.
    """

    hashes: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0, np.uint64))
    data: tuple = ()
    ancestors: tuple = ()
    unknown: tuple = ()
    prompt: dict = dataclasses.field(default_factory=dict)

    def __add__(self, other: "Lineage") -> "Lineage":
        """Both together; prompts are asked as `self` says."""
        data = list(self.data)
        data += [entry for entry in other.data if entry not in data]
        ancestors = dict.fromkeys((*self.ancestors, *other.ancestors))
        unknown = dict.fromkeys((*self.unknown, *other.unknown))
        hashes = [h for h in (self.hashes, other.hashes) if len(h)]
        merged = hashes[0] if len(hashes) == 1 else _sorted(hashes)
        return Lineage(merged, tuple(data), tuple(ancestors), tuple(unknown), self.prompt)

    @functools.cached_property
    def digest(self) -> str:
        """Of the hashes."""
        return hashlib.sha256(self.hashes.tobytes()).hexdigest()

    def contains(self, questions: list[str]) -> np.ndarray:
        """Whether each question was trained on, as booleans; False where something is `unknown` means: not that anybody knows.

        A question of SPAN tokens or more was, if all its hashes are of the record, which they are if one of its texts holds it. Another question
        may be taken for it that differs only in its first or last WINDOW - 1 tokens. A shorter question was, if a text holds it between two
        places of BOUNDARY. What was trained on as an assistant's turn is not of the record."""
        if not len(self.hashes):
            return np.zeros(len(questions), bool)
        hashes, question_of = _hashes(questions, only_whole=True)
        places = np.searchsorted(self.hashes, hashes).clip(max=len(self.hashes) - 1)
        known = self.hashes[places] == hashes
        total = np.bincount(question_of, minlength=len(questions))
        return (total > 0) & (np.bincount(question_of[known], minlength=len(questions)) == total)

    def save(self, folder: Path) -> None:
        """Write the record into a checkpoint's folder, whose weights are there already, and into its `adapter/`. The hashes are a link to those
        of a checkpoint beside it, where it has the same ones. The caller moves the folder to its place: then the record appears as a whole."""
        beside = (
            f
            for f in sorted(folder.parent.glob(f"step-*/{HASHES}"))
            if _stated(f.parent).get("sha256") == self.digest
        )
        source = next(beside, None)
        for place in (folder, folder / "adapter"):
            if not place.is_dir():
                continue
            if source is None:
                self.hashes.astype("<u8", copy=False).tofile(place / HASHES)
            else:
                _link(source, place / HASHES)
            source = place / HASHES
            write_json(
                place / RECORD,
                {
                    "form": FORM,
                    "hashes": len(self.hashes),
                    "sha256": self.digest,
                    "weights": weights_mark(place),
                    "data": self.data,
                    "ancestors": self.ancestors,
                    "unknown": self.unknown,
                    "prompt": self.prompt,
                },
            )

    def save_beside(self, folder: Path) -> None:
        """Write the record into a folder that is in use: the JSON file last, and without the right hashes it is known to be damaged."""
        draft = folder / ".draft-lineage"
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
        self.save(draft)
        for name in (HASHES, RECORD):
            (draft / name).replace(folder / name)
        draft.rmdir()


def read(folder: Path, name: str) -> Lineage:
    """The record in a folder. A record that is not there, or not whole, or of other weights, leaves `name` among the unknown."""
    stated = _stated(folder)
    if not stated:
        ours = (folder / "trainer").is_dir()  # saved by a run, which writes a record
        problem = (
            f" ({RECORD} is damaged)"
            if (folder / RECORD).exists()
            else f" ({RECORD} is missing)"
            if ours
            else ""
        )
        return Lineage(ancestors=(name,), unknown=(name + problem,))
    try:
        hashes = np.fromfile(folder / HASHES, "<u8").astype(np.uint64, copy=False)
        lists = {key: tuple(stated[key]) for key in ("data", "ancestors", "unknown")}
        found = Lineage(hashes, prompt=dict(stated["prompt"]), **lists)
        problem = "" if found.digest == stated["sha256"] else f"{HASHES} is damaged"
        if stated["form"] != FORM:
            problem = f"{RECORD} is of another version"
    except (OSError, ValueError, KeyError, TypeError):
        problem = f"{HASHES} is damaged"
    if problem:
        return Lineage(ancestors=(name,), unknown=(f"{name} ({problem})",))
    others = (
        ()
        if stated.get("weights") in (None, weights_mark(folder))
        else (f"{name} (its weights changed after {RECORD} was written)",)
    )
    return found + Lineage(ancestors=(name,), unknown=others)


def of_checkpoint(name: str, folder: Path | None) -> Lineage:
    """The record of what `name` stands for, an adapter's base included. folder: None for a preset, whose random weights have seen nothing."""
    if folder is None:
        return Lineage(ancestors=(name,))
    found = read(folder, short_name(name, folder))
    if not (folder / ADAPTER).is_file():
        return found
    base = base_of(folder)
    return found if base == folder else found + read(base, short_name(str(base), base))


def prompt_of(folder: Path) -> dict:
    """How the training prompts of a checkpoint were made, as its record says; {} if it has none."""
    prompt = _stated(folder).get("prompt")
    return prompt if isinstance(prompt, dict) else {}


def short_name(name: str, folder: Path) -> str:
    """A checkpoint's name for people on other machines: a hub id as it is, of a run's checkpoint the run and the step, else the folder's name."""
    if not Path(name).is_dir():
        return name
    path = folder.resolve()
    if path.name == "adapter":
        return f"{short_name(str(path.parent), path.parent)}/adapter"
    return f"{path.parents[1].name}/{path.name}" if path.parent.name == "checkpoints" else path.name


def weights_mark(folder: Path) -> str | None:
    """A quick mark of a folder's weight files: a digest of each one's size and of SAMPLED blocks of BLOCK bytes, spread evenly over
    it. What lies between these blocks does not change it. None: no weights."""
    files = sorted(folder.glob("*.safetensors"))
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with open(path, "rb") as file:
            for i in range(SAMPLED):
                file.seek(max(0, size - BLOCK) * i // (SAMPLED - 1))
                digest.update(file.read(BLOCK))
    return digest.hexdigest() if files else None


def _stated(folder):
    """trained_on.json of a folder, {} if there is none or it is damaged."""
    try:
        stated = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return stated if isinstance(stated, dict) else {}


def _link(source, target):
    try:
        os.link(source, target)
    except OSError:  # a file system without hard links
        shutil.copyfile(source, target)
