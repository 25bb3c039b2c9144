"""What a model was trained on, as its checkpoint carries it: so that it travels with copies and renames, where paths to data and runs would rot.

A record is two files. `trained_on.bin` holds the hashes of every question that trained the model or one that it begins from or learned from
(8 bytes each, sorted); `trained_on.json` says which data files they are of, from which models the record was gathered, and which of these
nobody recorded anything about: with one of those a question that is not found may have been trained on all the same.
"""

import dataclasses
import functools
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from files import write_json
from model.checkpoint import ADAPTER, base_of

RECORD, HASHES = "trained_on.json", "trained_on.bin"
FORM = 1  # of the two files
EDGE = 3  # lines or sentences that an instruction may put before a question, and behind it
CHUNK = 20_000  # texts whose hashes are sorted together
SAMPLED, BLOCK = 64, 4096  # blocks of a weight file, and their bytes, by which it is known again
SENTENCE_END = re.compile(r"(?<=[.?!:]) |(?<=[.?!:][\"')*]) ")
TAG = re.compile(r"<\|[^<>|\n]{1,40}\|>|</?\w{1,20}>")


# --- questions as hashes -------------------------------------------------------------------------------------------


def fingerprint(question: str) -> int:
    """A question's hash, whatever its case and spaces."""
    return int.from_bytes(_hash(_normalised(question)).digest(), "little")


def fingerprints(texts: Iterable[str]) -> np.ndarray:
    """The sorted hashes of all questions that these user turns may hold: each turn as a whole, and without the first and last lines or
    sentences, where instructions stand ("Question: ...", "... Put your answer in a box.")."""
    found, chunk = [], set()
    for text in texts:
        chunk.add(text)
        if len(chunk) == CHUNK:
            found.append(_hashes(chunk))
            chunk = set()
    found.append(_hashes(chunk))
    return _sorted(found)


def _hashes(texts):
    digests = set()
    for text in texts:
        whole = _normalised(text)
        digests.add(_hash(whole).digest())
        digests |= _spans(SENTENCE_END.split(whole))
        forms = [text, TAG.sub("\n", text)] if "<" in text else [text]  # a question may hold tags, and stand between tags
        for lines in (form.split("\n") for form in forms):
            if len(lines) > 1:
                digests |= _spans([line for line in map(_normalised, lines) if line])
    return _sorted([np.frombuffer(b"".join(digests), "<u8")])


def _spans(pieces):
    """The digests of what is left of a text without up to EDGE pieces at either end."""
    digests, last = set(), len(pieces)
    encoded = [_encoded(piece) for piece in pieces]
    for begin in range(min(EDGE + 1, last)):
        digest = hashlib.blake2b(encoded[begin], digest_size=8)
        if begin + 1 >= last - EDGE:
            digests.add(digest.digest())
        for i in range(begin + 1, last):
            digest.update(b" ")
            digest.update(encoded[i])
            if i + 1 >= last - EDGE:
                digests.add(digest.digest())
    return digests


def _normalised(text):
    return " ".join(text.split()).casefold()


def _encoded(text):
    return text.encode("utf-8", "replace")


def _hash(text):
    return hashlib.blake2b(_encoded(text), digest_size=8)


def _sorted(arrays):
    """The different numbers of some arrays, in order: by a sort that is fast where the arrays are in order already."""
    numbers = np.concatenate([np.zeros(0, np.uint64), *arrays])
    numbers.sort(kind="stable")
    return numbers[np.concatenate([np.ones(min(1, len(numbers)), bool), numbers[1:] != numbers[:-1]])]


# --- records -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Lineage:
    """What a model was trained on, all that it begins from or learned from included.

    hashes: of the questions, sorted uint64. data: a dict for every data file or task. ancestors: names of the models that this was
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
        """Whether each question was trained on, as booleans; False where something is `unknown` means: not that anybody knows."""
        wanted = np.array([fingerprint(question) for question in questions], np.uint64)
        if not len(self.hashes):
            return np.zeros(len(wanted), bool)
        place = np.searchsorted(self.hashes, wanted).clip(max=len(self.hashes) - 1)
        return self.hashes[place] == wanted

    def save(self, folder: Path) -> None:
        """Write the record into a checkpoint's folder, whose weights are there already, and into its `adapter/`. The hashes are a link to those
        of a checkpoint beside it, where it has the same ones. The caller moves the folder to its place: then the record appears as a whole."""
        beside = (f for f in sorted(folder.parent.glob(f"step-*/{HASHES}")) if _stated(f.parent).get("sha256") == self.digest)
        source = next(beside, None)
        for place in (folder, folder / "adapter"):
            if not place.is_dir():
                continue
            if source is None:
                self.hashes.astype("<u8", copy=False).tofile(place / HASHES)
            else:
                _link(source, place / HASHES)
            source = place / HASHES
            write_json(place / RECORD, {
                "form": FORM, "hashes": len(self.hashes), "sha256": self.digest, "weights": weights_mark(place), "data": self.data,
                "ancestors": self.ancestors, "unknown": self.unknown, "prompt": self.prompt,
            })  # fmt: skip

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
        problem = f" ({RECORD} is damaged)" if (folder / RECORD).exists() else f" ({RECORD} is missing)" if ours else ""
        return Lineage(ancestors=(name,), unknown=(name + problem,))
    try:
        hashes = np.fromfile(folder / HASHES, "<u8").astype(np.uint64, copy=False)
        lists = {key: tuple(stated[key]) for key in ("data", "ancestors", "unknown")}
        found = Lineage(hashes, prompt=dict(stated["prompt"]), **lists)
        whole = found.digest == stated["sha256"] and stated["form"] == FORM
    except (OSError, ValueError, KeyError, TypeError):
        whole = False
    if not whole:
        return Lineage(ancestors=(name,), unknown=(f"{name} ({HASHES} is damaged)",))
    others = () if stated.get("weights") in (None, weights_mark(folder)) else (f"{name} (its weights changed after {RECORD} was written)",)
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
