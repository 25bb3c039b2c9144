"""Which implementation a fused operation uses: Triton's kernels on a GPU, PyTorch elsewhere, or what `use` says."""

import os

import torch

CHOICES = ("auto", "torch", "triton")
_chosen = "auto"


def use(name):
    """ "auto": the device decides; "torch", "triton": that one, for the whole process. Raises ValueError where Triton cannot run."""
    global _chosen
    if name == "triton" and not (
        torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"
    ):
        raise ValueError(
            "they need a CUDA device, or TRITON_INTERPRET=1 in the environment to be run slowly by a CPU"
        )
    _chosen = name


def chosen():
    return _chosen


def triton_serves(device):
    """Whether this device's operations have Triton kernels: an NVIDIA GPU of compute capability 8 or more, or "triton" was asked for."""
    if _chosen != "auto":
        return _chosen == "triton"
    return (
        device.type == "cuda"
        and torch.version.hip is None
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


def triton_attends(q_THE):
    """Whether the attention kernels take these heads: bf16 on a GPU, fp32 and fp64 in the interpreter; a head dimension of 16, 32, 64 or 128."""
    return (q_THE.dtype == torch.bfloat16) == q_THE.is_cuda and q_THE.shape[2] in (16, 32, 64, 128)


def triton_runs(x_nD):
    """Whether the Triton kernels take these rows: bf16 on a GPU of compute capability 8 or more, each row a multiple of 16 bytes.

    fp32 goes to PyTorch: kept whole, its matrix products use no tensor cores. The interpreter, on a CPU, takes nothing else.
    """
    if _chosen == "torch" or not len(x_nD) or x_nD.shape[1] * x_nD.element_size() % 16:
        return False
    if _chosen == "triton":
        return x_nD.dtype == (torch.bfloat16 if x_nD.is_cuda else torch.float32)
    return x_nD.is_cuda and x_nD.dtype == torch.bfloat16 and triton_serves(x_nD.device)
