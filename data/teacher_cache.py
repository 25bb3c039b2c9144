"""A teacher's top-k, or draws from it, for every trained position of a data set, kept on disk.

The teacher then need not run again.

A folder with `ids.npy` (int32) and `logp.npy` (fp16), read through memory maps: k ids per trained
position, and k log-probs followed by that of all other ids together. `cache.json` says what they
were made from; it is written last, and without it the cache is not complete. A position takes 6k +
2 bytes. Of draws there are the ids alone, 4k bytes.

Legend: R trained positions of all documents in their order, k ids, B = k + 1.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from data.batch import Document
from errors import UserError

FORM = 2  # of the files
FP16_MIN = -65504
NAMES = {
    "documents": "data, template or tokenizer",
    "teacher": "weights of the teacher",
    "positions": "data",
    "k": "--kd_signal or --kd_topk",
    "draws": "--kd_draws",
    "form": "files than this version's",
}


class TeacherCache:
    """The top-k of exactly these documents, this teacher, k and temperature; or a place to keep it.

    Args:
        draws_seed: Of k draws in place of the top-k.

    Attributes:
        complete: whether everything is there.
        positions: how many trained positions the documents have.

    Raises:
        UserError: the folder holds something else, or cannot be read.
    """

    def __init__(
        self,
        folder: str | Path,
        documents: Sequence[Document],
        teacher: str,
        k: int,
        temperature: float,
        vocab: int,
        draws_seed: int | None = None,
    ) -> None:
        self.folder, self.k, self.draws_seed = Path(folder), k, draws_seed
        self.ends = np.cumsum([0] + [int(np.count_nonzero(d.weights)) for d in documents])
        self.positions = int(self.ends[-1])
        self.fingerprint = dict(
            form=FORM,
            k=k,
            temperature=temperature,
            vocab=vocab,
            positions=self.positions,
            documents=_digest(documents),
            teacher=teacher,
        )
        if draws_seed is not None:
            self.fingerprint |= dict(k=None, draws=k, seed=draws_seed)
        self.complete = (self.folder / "cache.json").is_file()
        if self.complete:
            self._open()
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise self._unwritable(e) from None

    def _open(self) -> None:
        """Map the files. Raises UserError if they are something else or damaged."""
        try:
            found = json.loads((self.folder / "cache.json").read_text())
            for name, value in self.fingerprint.items():
                if found.get(name) != value:
                    raise UserError(
                        f"--kd_cache {self.folder} was made with other {NAMES.get(name, name)}; "
                        "name another folder, or delete it to make it again"
                    )
            self.ids_Rk = np.load(self.folder / "ids.npy", mmap_mode="r")
            self.logp_RB = np.empty((self.positions, 0), np.float16)
            if self.draws_seed is None:
                self.logp_RB = np.load(self.folder / "logp.npy", mmap_mode="r")
        except (OSError, ValueError, AttributeError, EOFError) as e:
            raise UserError(
                f"--kd_cache {self.folder} cannot be read ({e}); "
                "delete the folder, and it is made again"
            ) from None

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, log-probs) of a document's trained positions."""
        rows = slice(self.ends[index], self.ends[index + 1])
        return self.ids_Rk[rows], self.logp_RB[rows]

    def fill(self, topk: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write (ids_Rk, logp_RB) arrays of consecutive positions, and complete the cache."""
        drafts = {}
        for name in ("ids.npy", "logp.npy", "cache.json"):  # others may fill it, too
            drafts[name] = self.folder / f"{name}.{os.getpid()}.draft"
        try:
            with open(drafts["ids.npy"], "wb") as ids, open(drafts["logp.npy"], "wb") as logp:
                self._write_header(ids, np.int32, self.k)
                self._write_header(logp, np.float16, self.k + 1 if self.draws_seed is None else 0)
                for ids_Rk, logp_RB in topk:
                    ids.write(ids_Rk.astype(np.int32).tobytes())
                    logp.write(np.maximum(logp_RB, FP16_MIN).astype(np.float16).tobytes())
            drafts["cache.json"].write_text(json.dumps(self.fingerprint, indent=1) + "\n")
            for name, draft in drafts.items():
                draft.rename(self.folder / name)
        except OSError as e:
            raise self._unwritable(e) from None
        self.complete = True
        self._open()

    def _unwritable(self, e: OSError) -> UserError:
        return UserError(f"--kd_cache {self.folder} cannot be written ({e.strerror or e})")

    def _write_header(self, file, dtype: type, width: int) -> None:
        """The head of a .npy file. Rows are appended: on a full disk a memory map would crash."""
        descr, shape = npy.dtype_to_descr(np.dtype(dtype)), (self.positions, width)
        npy.write_array_header_1_0(file, dict(descr=descr, fortran_order=False, shape=shape))


def _digest(documents: Sequence[Document]) -> str:
    """Of every token and of what is trained on."""
    digest = hashlib.sha256()
    for d in documents:
        digest.update(len(d).to_bytes(8, "little"))
        digest.update(np.ascontiguousarray(d.tokens, np.int64).tobytes())
        digest.update((d.weights != 0).tobytes())
        if d.teacher_tokens is not None:
            digest.update(b"teacher" + np.ascontiguousarray(d.teacher_tokens, np.int64).tobytes())
    return digest.hexdigest()


def weights_digest(folder: str | Path) -> str:
    """SHA-256 of a checkpoint's weight files."""
    digest = hashlib.sha256()
    for path in sorted(Path(folder).glob("*.safetensors")):
        with open(path, "rb") as file:
            while block := file.read(1 << 24):
                digest.update(block)
    return digest.hexdigest()
