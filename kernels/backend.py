"""The choice between Triton's kernels and PyTorch for the fused operations."""

import os

import torch

CHOICES = ("auto", "torch", "triton")
_chosen = "auto"


def use(name: str) -> None:
    """Choose the implementation for the whole process.

    Args:
        name: "auto" (the device decides), "torch" or "triton".

    Raises:
        ValueError: "triton" was asked for where Triton cannot run.
    """
    global _chosen
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if name == "triton" and not (torch.cuda.is_available() or interpreted):
        raise ValueError(
            "they need a CUDA device, or TRITON_INTERPRET=1 in the environment to be run slowly "
            "by a CPU"
        )
    _chosen = name


def chosen() -> str:
    """The name that was last given to `use`, at first "auto"."""
    return _chosen


def triton_serves(device: torch.device) -> bool:
    """Whether operations on this device use Triton's kernels.

    They do on an NVIDIA GPU of compute capability 8.0 or more, and wherever "triton" was chosen.
    """
    if _chosen != "auto":
        return _chosen == "triton"
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def triton_attends(q_THE: torch.Tensor) -> bool:
    """Whether the attention kernels take queries of this dtype and head dimension.

    They take bf16 on a GPU, fp32 and fp64 in the interpreter, and 16, 32, 64, 128 or 256 as E.
    """
    sizes = (16, 32, 64, 128, 256)
    return (q_THE.dtype == torch.bfloat16) == q_THE.is_cuda and q_THE.shape[2] in sizes


def triton_runs(x_nD: torch.Tensor) -> bool:
    """Whether the kernels of the vocabulary head take these hidden rows.

    They take bf16 on a GPU and fp32 in the interpreter, each row a multiple of 16 bytes. fp32 on a
    GPU goes to PyTorch: at full precision its matrix products use no tensor cores.
    """
    if _chosen == "torch" or not len(x_nD) or x_nD.shape[1] * x_nD.element_size() % 16:
        return False
    if _chosen == "triton":
        return x_nD.dtype == (torch.bfloat16 if x_nD.is_cuda else torch.float32)
    return x_nD.is_cuda and x_nD.dtype == torch.bfloat16 and triton_serves(x_nD.device)
