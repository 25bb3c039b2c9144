"""Models that no GPU holds alone: weights, gradients and optimizer states in shards (FSDP2).

Every block, and what is around the blocks, is whole only while it computes. Between that a rank has
its rows of every matrix. All ranks compute a sharded model together, so each of its forward passes
is one of all ranks (`Lockstep`), whatever each of them has to do.
"""

import functools
import warnings
from collections.abc import Callable, Collection, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from errors import UserError
from files import reason
from kernels.attention import PackedAttention
from model import parallel
from model.tensors import open_tensors


def make_mesh(ranks: int, device_type: str) -> Any:
    """The device mesh in which `ranks` neighbours hold a model together.

    Groups of as many ranks are replicas of each other: with those of a machine in a group, weights
    move within the machine and only the sums of gradients' shards between machines.
    """
    from torch.distributed.device_mesh import init_device_mesh  # here: it imports the compiler

    world = dist.get_world_size()
    if ranks == world:
        return init_device_mesh(device_type, (world,), mesh_dim_names=("shard",))
    shape = (world // ranks, ranks)
    return init_device_mesh(device_type, shape, mesh_dim_names=("replicate", "shard"))


def shard(model: Any, mesh: Any, device: torch.device | str) -> None:
    """Give a Transformer of the meta device memory on `device`: this rank's rows, not filled yet.

    What a block computes with is gathered in the compute dtype, as its layers cast it anyway, and
    gradients are summed in the dtype of the weights. What is around the blocks stays whole
    from a forward pass until all ranks meet: losses read the head outside `forward`.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    compute, master = model.compute_dtype, max_dtype(model.parameters())
    mixed = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute not in (None, master) and not model.config.norm_offset:  # those norms are in fp32
        mixed = MixedPrecisionPolicy(compute, master, cast_forward_inputs=False)
    for block in model.layers:
        fully_shard(block, mesh=mesh, mp_policy=mixed)
    fully_shard(model, mesh=mesh, reshard_after_forward=False)
    model.set_reshard_after_backward(False, recurse=False)
    for module in (model, *model.layers):  # losses are sums, and neither call is recursive
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no other
    model.to_empty(device=device)
    parallel.when_resting(Lockstep(model).rest)
    for p in model.parameters():
        p.gathering = parallel.register(functools.partial(_full, p))


def max_dtype(tensors: Iterable[Tensor]) -> torch.dtype:
    """The widest dtype: that of the trained weights, where what is frozen is held in less."""
    return functools.reduce(torch.promote_types, {t.dtype for t in tensors})


class Lockstep:
    """Makes each forward pass of a sharded model one of all ranks.

    A rank that has no such pass to do (fewer micro-batches, prompts or teachers' texts) computes
    one of a single token in its place, and its backward pass, which adds nothing.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.takes_part, self.is_at_rest = model, False, True
        self.numbers = [parallel.register(functools.partial(self.take_part, g)) for g in (0, 1)]
        model.register_forward_pre_hook(self.before, prepend=True)

    def before(self, *_: Any) -> None:
        self.is_at_rest = False
        if not self.takes_part:
            trained = any(p.requires_grad for p in self.model.parameters())
            parallel.meet(self.numbers[trained and torch.is_grad_enabled()])

    def take_part(self, with_gradient: int) -> None:
        model, token_T = self.model, torch.zeros(1, dtype=torch.long)
        token_T = token_T.to(model.head_VD.device)
        self.takes_part = True
        with torch.set_grad_enabled(bool(with_gradient)):
            hidden_TD = model(token_T, token_T, PackedAttention([1], token_T.device))
            if with_gradient:
                ((hidden_TD.sum() + model.head_VD.sum()) * 0).backward()
        self.takes_part = False

    def rest(self) -> None:
        """Keep nothing whole, and forget the order of passes that no backward pass will ask for.

        FSDP itself forgets it in the backward pass, which frozen models never have.
        """
        if self.is_at_rest:
            return
        if hasattr(self.model, "reset_iter_state"):
            self.model.reset_iter_state()
        else:  # torch 2.11: the order grows by an entry a block and pass
            self.model.reshard()
        self.is_at_rest = True


class InShards:
    """A sharded model as generation reads it: no more of it is whole than in training.

    Each of its steps is one of all ranks: those that have finished, or had no prompts, compute a
    token for nothing (`Lockstep`). Its head alone is copied, in the compute dtype.
    """

    def __init__(self, model: Any, dtype: torch.dtype) -> None:
        self.model, self.config = model, model.config
        self.head_VD = whole(model.head_VD).to(dtype)

    def refresh(self) -> None:
        """Take over the head as it is now, in place."""
        self.head_VD.copy_(whole(self.model.head_VD))

    def __call__(self, *arguments: Any) -> Tensor:
        return self.model(*arguments)


def generates_in_shards(model: Any) -> bool:
    """Whether generation reads a model as it is, since no GPU is to hold a copy of it."""
    return is_sharded(model) and model.decodes_in_shards


# --- tensors, whole and in shards -----------------------------------------------------------------


def is_sharded(thing: Any) -> bool:
    """Whether a model or a tensor is in shards."""
    return hasattr(thing, "full_tensor") or hasattr(thing, "reshard")  # DTensor, FSDPModule


def whole(parameter: Tensor) -> Tensor:
    """A parameter's values, gathered from its shards if need be, with the other ranks' help."""
    if not is_sharded(parameter):
        return parameter
    parallel.meet(parameter.gathering)  # pyright: ignore[reportAttributeAccessIssue]
    return _full(parameter)


def _full(parameter: Any) -> Tensor:
    return parameter.detach().full_tensor()


def local(tensor: Any) -> Tensor:
    """This rank's rows of a tensor: a view."""
    return tensor.to_local() if is_sharded(tensor) else tensor


@torch.no_grad()
def fill(parameter: Any, values: Tensor) -> None:
    """Copy a whole tensor into a parameter, or this rank's rows of it into its shard."""
    local(parameter).copy_(own_rows(values, parameter))


def own_rows(values: Tensor, parameter: Any) -> Tensor:
    """This rank's rows of a whole tensor that is split as a parameter is; a view."""
    if not is_sharded(parameter):
        return values
    mesh, rows = parameter.device_mesh, len(values)
    begin = mesh.get_local_rank("shard") * -(-rows // mesh["shard"].size())
    return values[min(begin, rows) :][: len(local(parameter))]


def gathered(rows: Tensor, parameter: Any) -> Tensor:
    """A whole tensor of this rank's rows and those of the others, split as a parameter is."""
    if not is_sharded(parameter):
        return rows
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        rows,
        parameter.device_mesh,
        parameter.placements,
        shape=parameter.shape,
        stride=parameter.stride(),
    ).full_tensor()


def norm_over_shards(model: nn.Module, norm: Tensor) -> Tensor:
    """The norm of all shards together, of each rank's own, fp64."""
    parameter: Any = next(model.parameters())
    if not is_sharded(parameter):
        return norm
    total = norm.square()
    dist.all_reduce(total, group=parameter.device_mesh.get_group("shard"))
    return total.sqrt()


# --- optimizer states -----------------------------------------------------------------------------


def save_shards(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write tensors, each rank its shards, in safetensors files. Called on all ranks.

    Raises OSError on all of them if one could not write.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    writer = HuggingFaceStorageWriter(str(folder), save_distributed=True)
    try:
        save(tensors, storage_writer=writer, no_dist=not dist.is_initialized())
    except CheckpointException as e:
        first: Any = next(iter(e.failures.values()))[0]
        raise OSError(reason(first)) from None


def load_shards(
    folder: Path, check: Callable[[Collection[str]], object], place: Callable[[str], Tensor | None]
) -> dict[str, Tensor]:
    """Read such files, whatever number of ranks wrote them. Raises UserError.

    Returns the tensors that were read, as `place` gave them.

    check: Raises UserError if these are not the names of the tensors.
    place: Returns what a stored tensor is copied into; None: it is not wanted.
    """
    from torch.distributed.checkpoint.api import CheckpointException
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    reader, tensors = HuggingFaceStorageReader(str(folder)), {}
    for file in sorted(folder.glob("*.safetensors")):
        with open_tensors(file):  # says what is wrong with it
            pass
    found = reader.read_metadata().state_dict_metadata
    for name, stored in found.items():
        tensor = place(name)
        if tensor is None:
            continue
        tensors[name] = tensor
        chunks: Any = getattr(stored, "chunks", [])
        if sum(chunk.sizes.numel() for chunk in chunks) != tensor.numel():
            raise UserError(
                f"{folder}: rows of {name} are missing; copy the files of all ranks of the run"
            )
    check(found)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that this is a single process
        try:
            load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as e:
            first: Any = next(iter(e.failures.values()))[0]
            raise UserError(f"{folder} could not be read ({reason(first)})") from None
    return tensors
