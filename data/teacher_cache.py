"""A teacher's likeliest tokens for every trained position of a data set, kept on disk, so that the teacher need not run again.

A folder: `ids.bin` (int32), `logp.bin` (fp16) – k ids, and k log-probs with that of all others together behind them, per trained position –
read through a memory map, and `cache.json`, which says what they are of. That file is written last: without it nothing is kept yet.
6k + 2 bytes a position. Legend: R trained positions of all documents in their order, k listed.
"""

import hashlib
import json
import os
from pathlib import Path

import numpy as np

from errors import UserError

FORM = 1  # of the files below


class TeacherCache:
    """What was kept for exactly these documents, this teacher, k and temperature; or a place to keep it."""

    def __init__(self, folder, documents, teacher, k, temperature, vocab):
        self.folder, self.k = Path(folder), k
        self.ends = np.cumsum([0, *(np.count_nonzero(d.weights) for d in documents)])
        self.what = dict(
            form=FORM,
            k=k,
            temperature=temperature,
            vocab=vocab,
            positions=int(self.ends[-1]),
            documents=_digest(documents),
            teacher=teacher,
        )
        self.whole = self._agrees()
        if self.whole:
            self._open()

    def _agrees(self):
        """Whether all of it is there. Raises UserError if something else is."""
        path = self.folder / "cache.json"
        if not path.is_file():
            return False
        try:
            kept = json.loads(path.read_text())
            other = next(
                (name for name, value in self.what.items() if kept.get(name) != value), None
            )
        except (OSError, ValueError, AttributeError) as e:
            raise UserError(
                f"--kd_cache {self.folder}: cache.json cannot be read ({e}); delete the folder, and it is made again"
            ) from None
        if other:
            raise UserError(
                f"--kd_cache {self.folder} was made with other {_NAMES.get(other, other)}; name another folder, or delete it to make it again"
            )
        for name, size in (("ids.bin", 4 * self.k), ("logp.bin", 2 * self.k + 2)):
            file, wanted = self.folder / name, size * self.what["positions"]
            have = file.stat().st_size if file.is_file() else 0
            if have != wanted:
                raise UserError(
                    f"--kd_cache {self.folder}: {name} has {have:,} bytes of {wanted:,}; delete the folder, and it is made again"
                )
        return True

    def _open(self):
        rows = self.what["positions"]
        shaped = lambda name, dtype, width: (
            np.memmap(self.folder / name, dtype, "r", shape=(rows, width))
            if rows
            else np.zeros((0, width), dtype)
        )
        self.ids_Rk, self.logp_RB = (
            shaped("ids.bin", np.int32, self.k),
            shaped("logp.bin", np.float16, self.k + 1),
        )

    def __getitem__(self, index):
        """(ids, log-probs) of a document's trained positions."""
        rows = slice(self.ends[index], self.ends[index + 1])
        return self.ids_Rk[rows], self.logp_RB[rows]

    def fill(self, listed):
        """Write what `listed` yields, (ids_Rk, logp_RB) arrays of consecutive positions."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            drafts = {
                self.folder / name: self.folder / f"{name}.{os.getpid()}.draft"
                for name in ("ids.bin", "logp.bin", "cache.json")
            }  # others may fill it too
            with (
                open(drafts[self.folder / "ids.bin"], "wb") as ids,
                open(drafts[self.folder / "logp.bin"], "wb") as logp,
            ):
                for ids_Rk, logp_RB in listed:
                    ids.write(np.ascontiguousarray(ids_Rk, np.int32).tobytes())
                    logp.write(
                        np.ascontiguousarray(np.maximum(logp_RB, -65504), np.float16).tobytes()
                    )
            drafts[self.folder / "cache.json"].write_text(json.dumps(self.what, indent=1) + "\n")
            for path, draft in drafts.items():
                draft.rename(path)
        except OSError as e:
            raise UserError(
                f"--kd_cache {self.folder} cannot be written ({e.strerror or e})"
            ) from None
        self.whole = self._agrees()
        self._open()


_NAMES = {
    "documents": "data, template or tokenizer",
    "teacher": "weights of the teacher",
    "positions": "data",
    "form": "files than this version's",
}


def _digest(documents):
    """Of every token and of what is trained on."""
    digest = hashlib.sha256()
    for d in documents:
        digest.update(len(d).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(d.tokens, np.int64).tobytes())
        digest.update((d.weights != 0).tobytes())
    return digest.hexdigest()


def weights_digest(folder):
    """Of a checkpoint's weight files."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
