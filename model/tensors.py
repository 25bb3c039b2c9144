"""The tensors of a checkpoint: which files hold them, under which names.

Only safetensors: nothing is ever unpickled.
"""

import contextlib
import json
import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from errors import UserError
from files import HEAD, Json, check_file, explain, named, read_json, reason, unreadable

# The weights of a checkpoint, in one file or in several.
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "BF16", "F16")  # dtypes as safetensors writes them


def save_tensors(
    tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None
) -> None:
    """Write a safetensors file with the permissions that the umask gives.

    The library makes files that only their owner may read.
    """
    path.touch()
    mode = path.stat().st_mode & 0o777
    save_file(tensors, path, metadata=metadata)
    path.chmod(mode)


def stream_tensors(
    shapes: dict[str, list[int]],
    dtype: torch.dtype,
    values: Iterable[tuple[str, Tensor]],
    path: Path,
) -> None:
    """Write what `save_tensors` would, one tensor after another: no more of them are held.

    Args:
        shapes: By key. All tensors are of one dtype.
        values: (key, tensor) of each, in any order.
    """
    header: Json = {"__metadata__": {"format": "pt"}}
    kind = FLOATS[[torch.float64, torch.float32, torch.bfloat16, torch.float16].index(dtype)]
    end = 0
    for key in sorted(shapes):
        begin, end = end, end + math.prod(shapes[key]) * dtype.itemsize
        header[key] = {"dtype": kind, "shape": shapes[key], "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for key, tensor in values:
            file.seek(8 + len(text) + header[key]["data_offsets"][0])
            file.write(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)


@contextlib.contextmanager
def open_tensors(file: Path) -> Iterator[safe_open]:
    """A safetensors file, opened for reading.

    Raises UserError that says what the file is instead, also for what fails inside `with`.
    """
    check_file(file)
    try:
        with safe_open(file, framework="pt", device="cpu") as tensors:
            yield tensors
    except (SafetensorError, OSError) as e:
        with contextlib.suppress(OSError), open(file, "rb") as f:
            if wrong := explain(f.read(HEAD), "safetensors"):
                raise UserError(f"{file}: damaged or not a safetensors file: it {wrong}") from None
        raise UserError(f"{file}: damaged or unreadable safetensors file ({reason(e)})") from None


def read_tensor(tensors: safe_open, file: Path, key: str) -> Tensor:
    """A tensor of an open file. Raises UserError for quantised weights."""
    _check_dtype(tensors, file, key)
    return tensors.get_tensor(key)


def _check_dtype(tensors: safe_open, file: Path, key: str) -> None:
    kind = tensors.get_slice(key).get_dtype()
    if kind not in FLOATS:
        raise UserError(
            f"{file}: {key} is {kind}: quantised weights are not supported; "
            "name a checkpoint in bf16, fp16 or fp32"
        )


# What savers leave in front of a tensor's name, or within it, and what does not change what the
# tensor is. torch.compile, DataParallel, FSDP and activation checkpointing wrap modules; PEFT wraps
# a model, and merging leaves the wrapper's name.
WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
PREFIXES = re.compile(r"(?:module\.|base_model\.|model\.)*")
UNMERGED = ("lora_", ".base_layer.", "modules_to_save.", ".original_module.")


class Stored(NamedTuple):
    """Where a tensor of a checkpoint is, under which name in which file, and its shape."""

    file: Path
    key: str
    shape: list[int]


def stored_tensors(folder: Path) -> dict[str, Stored]:
    """The tensors of a checkpoint folder by our names. Reads the files' headers only.

    Raises UserError for files that are missing or not safetensors, for an index that does not fit
    them, for a tensor in two of the files of an index (shards of two savings, mixed up), where two
    tensors would get one name, and for quantised weights.
    """
    index = _weight_index(folder)
    by_key: dict[str, Stored] = {}
    for file in sorted(index):
        with open_tensors(file) as tensors:
            for key in tensors.keys():
                _check_dtype(tensors, file, key)
                if key in by_key:
                    raise UserError(
                        f"{folder}: tensor {key} is in two files, {by_key[key].file.name} and "
                        f"{file.name}; download or save the checkpoint again"
                    )
                by_key[key] = Stored(file, key, tensors.get_slice(key).get_shape())
    found: dict[str, Stored] = {}
    for key, stored in by_key.items():
        file = stored.file
        name = PREFIXES.sub("", WRAPPERS.sub("", key), count=1)
        if name.endswith("rotary_emb.inv_freq"):
            continue  # computed, not loaded
        for part in UNMERGED:
            if part in key:
                raise UserError(
                    f"{file}: tensor {key} belongs to an adapter that is not merged "
                    f"({part.strip('._')}); merge it with PEFT"
                )
        if name in found:
            raise UserError(
                f"{folder}: {found[name].key} and {key} are both {name}; keep the one that is meant"
            )
        found[name] = stored
    for file, keys in index.items():
        for key in sorted(keys):
            if key not in by_key or by_key[key].file != file:
                raise UserError(
                    f"{file} has no tensor {key}, which the index says is there; "
                    "the download is incomplete or mixed up"
                )
    return found


def _weight_index(folder: Path) -> dict[Path, list[str]]:
    """The files with a checkpoint's weights, each with the tensors that an index says are in it.

    Where a single file and an index are there, the single file counts, as it does for
    `transformers`. Files that no index names are left alone.
    """
    single, index = folder / SINGLE, folder / INDEX
    if named(single) or not named(index):
        wrong = unreadable(single)
        if wrong == "is not there":
            raise UserError(f"{folder} has no {SINGLE}; {_instead(folder)}")
        if wrong:
            raise UserError(f"{single} {wrong}")
        return {single: []}
    weight_map = read_json(index, finite=True).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(
            f"{index}: weight_map must name the file of every tensor, found {weight_map!r:.40}"
        )
    keys_of: dict[Path, list[str]] = {}
    for key, name in weight_map.items():
        plain = isinstance(name, str) and name == PurePosixPath(name).name
        if not plain or not name.endswith(".safetensors"):
            raise UserError(
                f"{index}: the file of {key} is {name!r:.80}; "
                "it must be a .safetensors file of this folder"
            )
        keys_of.setdefault(folder / name, []).append(key)
    for file in sorted(keys_of):
        wrong = unreadable(file)
        if wrong == "is not there":
            raise UserError(
                f"{folder} has no {file.name}, which the index names; the download is incomplete"
            )
        if wrong:
            raise UserError(f"{file} {wrong}")
    return keys_of


def _instead(folder: Path) -> str:
    """What a folder without model.safetensors has, and what to do about it."""
    for shard in sorted(folder.glob("model-*-of-*.safetensors")):
        return f"it has {shard.name}, but {INDEX}, which says what is where, is missing"
    for pattern in ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf"):
        for file in sorted(folder.glob(pattern)):
            return (
                "weights are read from safetensors files only, "
                f"and it has {file.name}; save them as safetensors"
            )
    return "weights are read from safetensors files only"
