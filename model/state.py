"""What a checkpoint keeps for the trainer, looked at before it is used.

Optimizer kernels read and write as many numbers as the parameter has, whatever the file holds, and
training goes on from any number without a word.
"""

import math
from collections.abc import Collection, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from errors import UserError
from files import Fields, Json, read_json

MOST_PROMPTS = 100_000  # per step
COUNT = 1e40  # of FLOPs, at most


def read_state(path: Path, step: int) -> Json:
    """The counters, and where each rank's source of batches stands, after `step` steps.

    The sources' own parts are looked at by their `load`. Raises UserError.
    """
    state = read_json(path)
    fields = Fields(state, path)
    counters = fields.part("counters")
    for name in counters.values:
        counters.get(name, int, most=COUNT)
    sources = fields.get("source", list)
    if not sources:
        raise UserError(f"{path} has no 'source' for any rank")
    for source in sources:
        _check_source(Fields(source, f"{path}: source"), step)
    return state | {"counters": counters.values}


def _check_source(source: Fields, step: int) -> None:
    """Refuse counts that so many steps cannot have come to."""
    for name in ("consumed", "number", "count"):
        source.get(name, int, 0, most=step)
    source.get("position", int, 0, most=step * MOST_PROMPTS)
    for part in source.get("sources", list, []):
        _check_source(Fields(part, source.where), step)


def updates(counters: Mapping[str, int], step: int) -> int:
    """How many of the steps changed the weights."""
    return step - counters.get("skipped", 0) - counters.get("no_gradient", 0)


def check_tensors(
    tensors: safe_open, file: Path, own: Mapping[str, Tensor], updates: int, averaged: bool
) -> None:
    """Refuse the file of an optimizer that has not just the tensors of this one.

    Reads the headers only. Raises UserError, which names a tensor.

    Args:
        own: This optimizer's tensors, and those of a moving average.
        updates: How many there were: without any there need be no moments.
        averaged: Whether the file must have a moving average of the weights; else it may.
    """
    found = set(tensors.keys())
    check_names(found, file, own, updates, averaged)
    for key in found:
        part, shape = tensors.get_slice(key), list(own[key].shape)
        if part.get_shape() != shape or part.get_dtype() not in ("F32", "F64"):
            raise UserError(
                f"{file}: {key} is {part.get_dtype()} of shape {part.get_shape()}, "
                f"the model's is {shape}; {OTHER}"
            )


def check_names(
    found: Collection[str], file: Path, own: Mapping[str, Tensor], updates: int, averaged: bool
) -> None:
    """Refuse names that are not those of an optimizer's tensors. Raises UserError likewise."""
    for key in sorted(set(found) - own.keys()):
        raise UserError(
            f"{file}: unexpected tensor {key}; this model's optimizer has none of that name"
        )
    for key in own:
        is_needed = averaged if key.startswith("average.") else updates > 0
        if is_needed and key not in found:
            raise UserError(f"{file}: tensor {key} is missing; {OTHER}")


OTHER = "take another checkpoint, or begin a new run with this one as --model"


def check_values(tensor: Tensor, file: Path, key: str, updates: int) -> None:
    """Refuse numbers that no optimizer leaves. Raises UserError."""
    part = key.partition(".")[0]
    low, high = (float(bound) for bound in tensor.aminmax())  # NaN where a number is
    fits = math.isfinite(low) and math.isfinite(high)
    if part == "exp_avg_sq":
        fits = fits and low >= 0
    if part == "step":
        fits = fits and low == int(low) and 0 <= low <= updates
    if not fits:
        raise UserError(f"{file}: {key} holds numbers that no training leaves; {OTHER}")
