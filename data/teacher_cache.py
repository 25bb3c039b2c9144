"""A teacher's top-k, or draws from it, for every trained position of a data set, kept on disk.

The teacher then need not run again.

A folder with `ids.npy` (int32) and `logp.npy` (fp16), read through memory maps: k ids per trained
position, and k log-probs followed by that of all other ids together. `cache.json` says what they
were made from, and their SHA-256; it is written last, and without it the cache is not complete. A
position takes 6k + 2 bytes. Of draws there are the different ids of each position, one position
after the other, and `counts.npy` (uint16), how often each was drawn: 6 bytes for a different id, of
which there are few however many draws (arXiv 2503.16870).

Legend: R trained positions of all documents in their order, k ids, B = k + 1, M different ids.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from data.batch import Document
from digests import all_sha256
from errors import RunFailed, UserError, system_error
from files import draft_of, flush, read_json
from locks import sweep, waiting_for
from model import parallel
from progress import Progress

FORM = 3  # of the files
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
        arrays = ("ids.npy", "logp.npy" if draws_seed is None else "counts.npy")
        self.arrays, self.files = arrays, (*arrays, "cache.json")
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
        is_there = (self.folder / "cache.json").is_file
        self.complete = parallel.on_rank_0(parallel.rank(), is_there)
        if self.complete:
            self._open()
        else:
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
            except OSError as e:
                raise self._unwritable(e) from None
            for name in self.files:
                draft_of(self.folder / name)  # removes what others left as they died

    def _check(self) -> None:
        """Raise UserError if the files are something else or damaged."""
        sweep(self.folder / ".lock")
        about = self.folder / "cache.json"
        found = read_json(about, f"--kd_cache {about}")
        for name, value in self.fingerprint.items():
            if found.get(name) != value:
                raise UserError(
                    f"--kd_cache {self.folder} was made with other {NAMES.get(name, name)}; "
                    "name another folder, or delete it to make it again"
                )
        try:
            # one that was filled before digests were kept has none
            if "sha256" in found and found["sha256"] != self._sha256():
                raise ValueError("its files are not what was written")
        except (OSError, ValueError) as e:
            raise self._unreadable(e) from None

    def _unreadable(self, e: Exception) -> UserError:
        again = "delete the folder, and it is made again"
        return UserError(f"--kd_cache {self.folder} cannot be read ({e}); {again}")

    def _open(self) -> None:
        """Map the files, which rank 0 has checked. Raises UserError."""
        parallel.on_rank_0(parallel.rank(), self._check)
        try:
            # of the top-k [R, k] and [R, B], of draws [M] and [M]
            self.ids, self.beside = [
                np.load(self.folder / name, mmap_mode="r") for name in self.arrays
            ]
            self.starts, rows = self.ends, len(self.beside)  # of the documents' rows in both
            if self.draws_seed is not None:
                drawn_M = np.cumsum(self.beside, dtype=np.int64)
                self.starts = np.searchsorted(drawn_M, self.ends * self.k, side="right")
                rows = int(self.beside.sum(dtype=np.int64)) // self.k
            if len(self.ids) != len(self.beside) or rows != self.positions:
                raise ValueError("it has another number of positions")
        except (OSError, ValueError, TypeError, SyntaxError, EOFError) as e:
            raise self._unreadable(e) from None

    def _sha256(self) -> dict[str, str]:
        """Of the two arrays, by the names of their files."""
        found = all_sha256([self.folder / name for name in self.arrays])
        return {path.name: digest for path, digest in found.items()}

    def __getitem__(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        """(ids, log-probs) of a document's trained positions."""
        rows = slice(self.starts[index], self.starts[index + 1])
        if self.draws_seed is None:
            return self.ids[rows], self.beside[rows]
        ids_Rk = np.repeat(self.ids[rows], self.beside[rows]).reshape(-1, self.k)
        return ids_Rk, np.empty((len(ids_Rk), 0), np.float16)

    def fill(self, topk: Iterable[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write (ids_Rk, logp_RB) arrays of consecutive positions, and complete the cache.

        Where another process fills it at the same time this one waits, and takes what is there.
        """
        with waiting_for(self.folder / ".lock", f"the cache {self.folder}"):
            if not (self.folder / "cache.json").is_file():
                self._fill(topk)
            self.complete = True
            self._open()

    def _fill(self, topk):
        drafts = {name: draft_of(self.folder / name) for name in self.files}
        try:
            with (
                open(drafts[self.arrays[0]], "wb") as ids,
                open(drafts[self.arrays[1]], "wb") as beside,
            ):
                self._write_heads(ids, beside, 0)
                rows = 0
                progress = Progress(f"the cache {self.folder}", self.positions, "positions")
                for ids_Rk, logp_RB in topk:
                    if self.draws_seed is None:
                        kept, others = ids_Rk, np.maximum(logp_RB, FP16_MIN).astype(np.float16)
                    else:
                        kept, others = different(ids_Rk)
                    ids.write(kept.astype(np.int32).tobytes())
                    beside.write(others.tobytes())
                    rows += len(kept)
                    progress.add(len(ids_Rk))
                self._write_heads(ids, beside, rows)
            found = all_sha256([drafts[name] for name in self.arrays])
            digests = dict(zip(self.arrays, found.values(), strict=True))
            about = self.fingerprint | {"sha256": digests}
            drafts["cache.json"].write_text(json.dumps(about, indent=1) + "\n")
            for name, draft in drafts.items():
                flush(draft)
                draft.rename(self.folder / name)
        except OSError as e:
            raise self._unwritable(e) from None
        finally:
            for draft in drafts.values():
                with contextlib.suppress(OSError):
                    draft.unlink(missing_ok=True)

    def _unwritable(self, e: OSError) -> UserError | RunFailed:
        return system_error(e, f"--kd_cache {self.folder} cannot be written")

    def _write_heads(self, ids, beside, rows: int) -> None:
        """The heads of both .npy files. Rows are appended: on a full disk a memory map would crash.

        A head has room for any number of rows, so it may be written again.
        """
        if self.draws_seed is None:
            heads = (ids, np.int32, (rows, self.k)), (beside, np.float16, (rows, self.k + 1))
        else:
            heads = (ids, np.int32, (rows,)), (beside, np.uint16, (rows,))
        for file, dtype, shape in heads:
            file.seek(0)
            descr = npy.dtype_to_descr(np.dtype(dtype))
            npy.write_array_header_1_0(file, dict(descr=descr, fortran_order=False, shape=shape))


def different(ids_Rk: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The different ids [M] of each row, one row after the other, and how often each comes."""
    sorted_Rk = np.sort(ids_Rk, 1)
    new_Rk = np.ones(sorted_Rk.shape, bool)
    new_Rk[:, 1:] = sorted_Rk[:, 1:] != sorted_Rk[:, :-1]
    places_M = np.flatnonzero(new_Rk)
    counts_M = np.diff(places_M, append=sorted_Rk.size)
    return sorted_Rk[new_Rk], counts_M.astype(np.uint16)


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
