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
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from data.batch import Document
from digests import all_sha256
from errors import Halted, RunFailed, UserError, system_error
from files import check_place, draft_of, flush, made, read_json
from locks import sweep, waiting_for
from model import parallel
from progress import Halt, Progress, go_on

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
                check_place(self.folder)
                for name in self.files:
                    draft_of(self.folder / name)  # removes what others left as they died
            except OSError as e:
                raise self._unwritable(e) from None

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

    def fill(
        self,
        topk: Callable[[int], Iterable[tuple[np.ndarray, np.ndarray]]],
        halt: Halt = go_on,
        micro_batch_tokens: int = 0,
    ) -> None:
        """Write (ids_Rk, logp_RB) arrays of consecutive positions, and complete the cache.

        Where another process fills it at the same time this one waits, and takes what is there.

        Args:
            topk: Returns the arrays, without those of so many micro-batches of
                `micro_batch_tokens`, which are kept already.
            halt: Raises Halted when a signal came: what there is by then is kept.
        """
        with made(self.folder), waiting_for(self.folder / ".lock", f"the cache {self.folder}"):
            if not (self.folder / "cache.json").is_file():
                self._fill(topk, halt, micro_batch_tokens)
            self.complete = True
            self._open()

    def _fill(self, topk, halt, micro_batch_tokens):
        drafts = {name: draft_of(self.folder / name) for name in self.files}
        kept = {name: self.folder / f"{name}.part" for name in self.files}
        own, stopped_by = self.fingerprint | {"micro_batch_tokens": micro_batch_tokens}, ""
        try:
            done = self._take_up(kept, drafts, own)
            batches, positions, entries = done or (0, 0, 0)
            with (
                open(drafts[self.arrays[0]], "r+b" if done else "wb") as ids,
                open(drafts[self.arrays[1]], "r+b" if done else "wb") as beside,
            ):
                self._write_heads(ids, beside, entries)
                for file in (ids, beside):
                    file.seek(0, os.SEEK_END)
                name = f"the cache {self.folder}"
                progress = Progress(name, self.positions - positions, "positions", halt=halt)
                for ids_Rk, logp_RB in topk(batches):
                    if self.draws_seed is None:
                        own_ids, others = ids_Rk, np.maximum(logp_RB, FP16_MIN).astype(np.float16)
                    else:
                        own_ids, others = different(ids_Rk)
                    ids.write(own_ids.astype(np.int32).tobytes())
                    beside.write(others.tobytes())
                    batches += 1
                    positions += len(ids_Rk)
                    entries += len(own_ids)
                    try:
                        progress.add(len(ids_Rk))
                    except Halted as e:
                        stopped_by = str(e)
                        break
                self._write_heads(ids, beside, entries)
            if stopped_by:
                self._put(drafts, kept, own | {"done": [batches, positions, entries]})
                raise RunFailed(
                    f"stopped by {stopped_by}: {positions:,} of {self.positions:,} positions are "
                    f"kept in {self.folder}; the same command goes on with them"
                )
            self._put(drafts, {name: self.folder / name for name in drafts}, self.fingerprint)
        except OSError as e:
            raise self._unwritable(e) from None
        finally:
            for draft in drafts.values():
                with contextlib.suppress(OSError):
                    draft.unlink(missing_ok=True)

    def _put(self, drafts: dict[str, Path], places: dict[str, Path], about: dict) -> None:
        """Move complete drafts to their places, last the one that says what they are."""
        found = all_sha256([drafts[name] for name in self.arrays])
        about = about | {"sha256": dict(zip(self.arrays, found.values(), strict=True))}
        drafts["cache.json"].write_text(json.dumps(about, indent=1) + "\n")
        for name, draft in drafts.items():
            flush(draft)
            draft.rename(places[name])

    def _take_up(
        self, kept: dict[str, Path], drafts: dict[str, Path], own: dict
    ) -> list[int] | None:
        """Go on with what a process kept as it was stopped: [micro-batches, positions, entries].

        None, and nothing is left of it, if it is of something else or not what was written.
        """
        done = None
        with contextlib.suppress(UserError, OSError):
            found = read_json(kept["cache.json"]) if kept["cache.json"].is_file() else {}
            written = all_sha256([kept[name] for name in self.arrays]) if found else {}
            digests = dict(zip(self.arrays, written.values(), strict=False))
            if found and found == own | {"sha256": digests, "done": found.get("done")}:
                for name in self.arrays:
                    kept[name].rename(drafts[name])
                done = found["done"]
        for place in kept.values():
            place.unlink(missing_ok=True)
        return done

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
