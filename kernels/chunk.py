"""The vocabulary head in chunks of rows, so that the [N, V] logits never exist.

The head of a 0.5B model has 151,936 rows: one fp32 logits tensor for 8 x 1,024 tokens takes 5 GB,
and a plain implementation holds several of them. Here the logits of a chunk of rows are computed,
overwritten with their own gradient, and multiplied at once into the gradients of the hidden rows
and of the head: three products, two buffers.

`chunked_head` is the loop. The files beside this one say what happens to the logits of a chunk,
either in PyTorch (through `torch_step`) or with the kernels of kernels/triton_head.py.

Legend: N loss rows, n rows of a chunk, b rows of a block, D hidden, V vocabulary (the first V rows
of the head take part, padding rows beyond them are never read), P the same with padding.
"""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cpu import fastest_product

LOG2_E = math.log2(math.e)

# Logits held at once: 441 rows of 151,936 on a CPU, 4,400 rows on a GPU.
CHUNK_ELEMENTS = {"cpu": 64 << 20, "cuda": 640 << 20}
# On a CPU the element-wise work runs on blocks of rows that stay in the cache, of all models.
BLOCK_ELEMENTS = 5 << 18
LOW_TEMPERATURE = 0.1  # see `exponentials`

# step(hidden_nD, head_VD, rows, want_grad) -> (loss_n, grad_nP or None): see `chunked_head`
Step = Callable[[Tensor, Tensor, slice, bool], tuple[Tensor, Tensor | None]]


def accumulate_dtype(tensor: Tensor) -> torch.dtype:
    """Softmax, log-sum-exp and gradient sums run in at least fp32 (fp64 stays fp64)."""
    return torch.promote_types(tensor.dtype, torch.float32)


def default_chunk_rows(vocab: int, n_rows: int, device: torch.device, models: int = 1) -> int:
    """How many of n_rows logits of one or more models are there at a time.

    Chunks have the same size, as large as this device's budget allows.
    """
    budget = CHUNK_ELEMENTS["cuda" if device.type == "cuda" else "cpu"]
    chunks = -(-n_rows // max(1, budget // (vocab * models)))
    return -(-n_rows // max(1, chunks)) or 1


def blocks(n_rows: int, vocab: int, device: torch.device, models: int = 1) -> list[slice]:
    """Slices of rows for element-wise work: cache-sized on a CPU, the whole chunk on a GPU."""
    size = n_rows if device.type == "cuda" else max(1, BLOCK_ELEMENTS // (vocab * models))
    return [slice(start, min(start + size, n_rows)) for start in range(0, n_rows, size)]


def wide_buffer(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """An empty [rows, vocab] whose rows lie a multiple of 64 elements apart.

    151,665 is odd: cuBLAS takes a kernel without tensor cores for bf16 rows of that distance, and
    MKL halves its speed. A distance of whole pages would fill few lines of a CPU's cache.
    """
    distance = -(-vocab // 64) * 64
    if distance % 4096 == 0:
        distance += 64
    return torch.empty((rows, distance), dtype=dtype, device=device)[:, :vocab]


def product(a: Tensor, b: Tensor, out: Tensor, add: bool = False) -> Tensor:
    """out = a @ b (out += a @ b with `add`), summed in the dtype of `out`.

    bf16 operands keep an fp32 result: rounded logits ruin the gradients of distillation.
    """
    options = {}
    if out.is_cuda and a.dtype == b.dtype != out.dtype:
        options["out_dtype"] = out.dtype
    else:
        a, b = a.to(out.dtype), b.to(out.dtype)
    with fastest_product(out, out.numel() * a.shape[1]):
        if add:
            return torch.addmm(out, a, b, out=out, **options)
        return torch.mm(a, b, out=out, **options)


def exponentials(logits_bV: Tensor, temperature: float, out: Tensor) -> Tensor:
    """e^((logits − the largest of the row) / temperature) in `out`. Returns the largest, [b, 1].

    A power of 2 costs a CPU a fifth of exp, and the factor that it needs is free: it rides on the
    subtraction, but for low temperatures, at which scale · largest would lose what lies below it.
    """
    scale = LOG2_E / temperature
    largest_b1 = logits_bV.amax(1, keepdim=True)
    if temperature < LOW_TEMPERATURE:
        torch.sub(logits_bV, largest_b1, out=out).mul_(scale).exp2_()
    else:
        torch.add(largest_b1 * -scale, logits_bV, alpha=scale, out=out).exp2_()
    return largest_b1


def softmax(logits_bV: Tensor, temperature: float, out: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of logits / temperature in `out`, and the log-normalizer of each row, [b, 1].

    torch.softmax is one pass less, but its sum over 151,665 ids is off by 1e-5.
    """
    largest_b1 = exponentials(logits_bV, temperature, out)
    sum_b1 = out.sum(1, keepdim=True)
    return out.div_(sum_b1), largest_b1 / temperature + sum_b1.log()


def torch_step(
    block_loss: Callable[..., Tensor],
    chunk_rows: int,
    vocab: int,
    hidden_ND: Tensor,
    teacher: tuple[Tensor, Tensor] | None = None,
) -> Step:
    """A step of `chunked_head` in PyTorch: the logits of a chunk, then the loss block by block.

    Args:
        block_loss: block_loss(logits_bV, rows, want_grad) -> loss_b, where `rows` says which of
            the N rows these are. The logits are at least fp32; with want_grad they must be
            overwritten with d loss_sum / d logits. With a teacher: block_loss(logits_bV,
            teacher_logits_bV, rows, want_grad).
        chunk_rows: the most rows a chunk has; one buffer of that size serves all chunks.
        teacher: the hidden rows and the head of a teacher, (hidden_NC, head_VC).
    """
    dtype, device = accumulate_dtype(hidden_ND), hidden_ND.device

    @functools.cache
    def buffers() -> list[Tensor]:
        """Of the student and the teacher: made when the gradients are there, which stay longer."""
        most_rows = min(chunk_rows, len(hidden_ND))
        return [wide_buffer(most_rows, vocab, dtype, device) for _ in range(2 if teacher else 1)]

    def step(hidden_nD: Tensor, compute_head_VD: Tensor, rows: slice, want_grad: bool):
        n_rows = len(hidden_nD)
        logits = [product(hidden_nD, compute_head_VD[:vocab].t(), buffers()[0][:n_rows])]
        if teacher:
            teacher_hidden_NC, teacher_VC = teacher
            out = buffers()[1][:n_rows]
            logits.append(product(teacher_hidden_NC[rows], teacher_VC.t(), out))
        losses = []
        for block in blocks(n_rows, vocab, device, models=len(logits)):
            block_rows = slice(rows.start + block.start, rows.start + block.stop)
            losses.append(block_loss(*(z[block] for z in logits), block_rows, want_grad))
        grad_nV = logits[0]
        if want_grad and hidden_nD.dtype != dtype:
            grad_nV = wide_buffer(n_rows, vocab, hidden_nD.dtype, device).copy_(grad_nV)
        return torch.cat(losses), grad_nV if want_grad else None

    return step


def chunked_head(
    hidden_ND: Tensor, head_VD: Tensor, step: Step, vocab: int, chunk_rows: int
) -> Tensor:
    """Sum of a row loss over all rows, differentiable in hidden_ND and head_VD.

    Args:
        step: step(hidden_nD, head_VD, rows, want_grad) -> (loss_n, grad_nP): the losses of the
            rows [rows.start, rows.stop), weights included, and (with want_grad) d loss_sum / d
            logits in the dtype of hidden_nD. Its columns beyond `vocab`, if any, are 0.

    Returns a scalar. Its backward may run once: the gradients are handed over, not kept.
    """
    want_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad)
    return _ChunkedHead.apply(hidden_ND, head_VD, step, vocab, chunk_rows, want_grad)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, step, vocab, chunk_rows, want_grad):
        dtype, device = accumulate_dtype(hidden_ND), hidden_ND.device
        compute_head_VD = head_VD.to(hidden_ND.dtype)
        grad_hidden, grad_head = (
            torch.empty(x.shape, dtype=dtype, device=device) if want_grad and needed else None
            for x, needed in zip((hidden_ND, head_VD), ctx.needs_input_grad[:2], strict=True)
        )
        if grad_head is not None:  # rows that no product below writes
            grad_head[vocab if len(hidden_ND) else 0 :].zero_()
        total = torch.zeros((), dtype=dtype, device=device)
        for start in range(0, len(hidden_ND), chunk_rows):
            rows = slice(start, min(start + chunk_rows, len(hidden_ND)))
            hidden_nD = hidden_ND[rows]
            loss_n, grad_nP = step(hidden_nD, compute_head_VD, rows, want_grad)
            total += loss_n.sum()
            if not want_grad:
                continue
            grad_nP = grad_nP[:, : len(head_VD)]  # padded logits may be wider than the head
            width = grad_nP.shape[1]
            if grad_hidden is not None:
                product(grad_nP, compute_head_VD[:width], grad_hidden[rows])
            if grad_head is not None:
                product(grad_nP.t(), hidden_nD, grad_head[:width], add=start > 0)
        ctx.grads, ctx.dtypes = (grad_hidden, grad_head), (hidden_ND.dtype, head_VD.dtype)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        if ctx.grads is None:
            raise RuntimeError("the chunked head's backward runs once: its gradients are gone")
        (grad_hidden, grad_head), ctx.grads = ctx.grads, None
        hidden_dtype, head_dtype = ctx.dtypes
        grad_hidden = _scaled(grad_hidden, grad_total, hidden_dtype)
        return grad_hidden, _scaled(grad_head, grad_total, head_dtype), None, None, None, None


def _scaled(grad: Tensor | None, factor: Tensor, dtype: torch.dtype) -> Tensor | None:
    """grad · factor in `dtype`, in place where the dtype is the same."""
    if grad is None:
        return None
    out = grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    return torch.mul(grad, factor, out=out)
