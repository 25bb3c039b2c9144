"""The faster of a CPU's two libraries for fp32 matrix products, where it is as exact.

PyTorch's CPU build has two: MKL, its default, and oneDNN. For the shapes of a vocabulary head
oneDNN is the faster one on a CPU with AVX-512: 1.1 to 1.8 times, most where the leading dimension
is odd (151,665) or the rows are few (LOG.md). PyTorch takes it when
`torch.backends.mkldnn.matmul.fp32_precision` allows bf16: a permission that oneDNN uses on CPUs
with AMX alone, where it would round the operands. So it is given only where there is no AMX and a
measurement finds nothing rounded.
"""

import contextlib
import ctypes
import functools
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

# A product of random numbers in fp32 is off by less, relative to its largest element; rounding the
# operands to bf16 costs more than 1e-3.
EXACT = 1e-5

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


# Below so many multiplications MKL is the faster: a call of oneDNN costs 20 microseconds more.
LEAST_PRODUCT = 5 << 19


# Models with fewer parameters are computed by one thread. Measured on two cores (LOG.md): idle, two
# threads are 1.08 times as fast for `tiny` and 1.3 times for `tiny-teacher` (250,000 and 350,000);
# beside other work, where each waits, spinning, for the other, they take 20 times as long for
# `tiny` and 10 times at two million. Larger models were not measured.
SMALL_MODEL = 2_000_000


@functools.cache
def default_threads() -> int:
    """PyTorch's choice: how many threads there were when this was first asked."""
    return torch.get_num_threads()


def choose_threads(parameters: int, given: int = 0) -> str:
    """Set the threads of a CPU's operations. Returns how many there are, in words.

    parameters: of the largest model. given: as many as the user asks for; 0: one for a small model,
    unless the environment says how many, else PyTorch's choice.
    """
    why, default = "--threads", default_threads()
    if given:
        torch.set_num_threads(given)
    elif "OMP_NUM_THREADS" in os.environ:
        why = "OMP_NUM_THREADS"
    elif parameters < SMALL_MODEL:
        torch.set_num_threads(1)
        why = "for a model this small more gain little, and on a busy machine lose much; "
        why += "--threads sets another number"
    else:
        torch.set_num_threads(default)
        why = "PyTorch's choice; --threads sets another number"
    return f"{torch.get_num_threads()} ({why})"


@contextlib.contextmanager
def fastest_product(like: Tensor, multiplications: int) -> Iterator[None]:
    """Inside, products run in the faster library that is exact on this machine.

    Args:
        like: has the dtype and device of the products.
        multiplications: how many the smallest of them has.
    """
    if multiplications < LEAST_PRODUCT or not uses_onednn(like):
        yield
        return
    with _products_by("bf16"):
        yield


def many_small_products() -> contextlib.AbstractContextManager[None]:
    """Inside, products run in PyTorch's default again, whatever `fastest_product` says outside.

    PyTorch's fused attention is made of thousands of them: in oneDNN it takes three to ten times as
    long (LOG.md).
    """
    return _products_by("none")


@contextlib.contextmanager
def _products_by(precision: str) -> Iterator[None]:
    settings = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = settings.fp32_precision
    settings.fp32_precision = precision
    try:
        yield
    finally:
        settings.fp32_precision = before


def uses_onednn(out: Tensor) -> bool:
    """Whether `fastest_product` takes oneDNN for large products like `out`."""
    return out.device.type == "cpu" and out.dtype == torch.float32 and onednn_is_exact()


@functools.cache
def onednn_is_exact() -> bool:
    """Whether oneDNN's fp32 products may be used: no AMX, and no rounding is seen."""
    if not torch.backends.mkldnn.is_available() or _has_amx():
        return False
    generator = torch.Generator().manual_seed(0)
    for m, k, n in ((64, 256, 4096), (4, 256, 512), (256, 1024, 256)):
        a, b = (torch.randn(shape, generator=generator) for shape in ((m, k), (k, n)))
        exact = a.double() @ b.double()
        with _products_by("bf16"):
            error = (a @ b - exact).abs().max() / exact.abs().max()
        if error > EXACT:
            return False
    return True


def _has_amx() -> bool:
    """Whether the CPU has matrix units (AMX), or nothing is known of it."""
    try:
        return "amx" in Path("/proc/cpuinfo").read_text()
    except OSError:
        return True


def keep_freed_memory() -> None:
    """Let this process keep what it frees (glibc only; elsewhere nothing happens).

    A step on a CPU frees and allocates hundreds of MB of logits and gradients. glibc gives each
    such block back to the system, which fills its pages with zeros the next time: 10 % of a step.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(M_MMAP_MAX, 0)
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
