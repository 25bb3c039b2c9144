"""The vocabulary head in chunks of rows, so that [N, V] logits never exist.

The head of a 0.5B model has 151,936 rows: one fp32 logits tensor for 8 x 1,024 tokens is 5 GB, and a plain
implementation holds several. Here the logits of a few rows are made, turned into their own gradient in place and
multiplied out at once into the gradients of the hidden rows and of the head: three products, two buffers.

`chunked_head` is the loop; the files beside this one supply what happens to a chunk: in PyTorch (`torch_step`) or by the kernels of
kernels/triton_head.py. Legend: N loss rows, n rows of a
chunk, D hidden, V vocabulary (the first V rows of the head take part, padding rows beyond are never seen).
"""

import torch

CHUNK_ELEMENTS = {
    "cpu": 64 << 20,
    "cuda": 640 << 20,
}  # logits held at once: 441 rows of 151,936 on a CPU, 4,400 on a GPU
BLOCK_ELEMENTS = (
    5 << 17
)  # on a CPU the element-wise work runs on blocks of rows that stay in the cache


def accumulate_dtype(tensor):
    """Softmax, log-sum-exp and gradient sums run in at least fp32 (fp64 stays fp64)."""
    return torch.promote_types(tensor.dtype, torch.float32)


def default_chunk_rows(vocab, device):
    return max(1, CHUNK_ELEMENTS["cuda" if device.type == "cuda" else "cpu"] // vocab)


def blocks(n_rows, vocab, device):
    """Slices of rows for element-wise work: cache-sized on a CPU, the whole chunk on a GPU."""
    size = n_rows if device.type == "cuda" else max(1, BLOCK_ELEMENTS // vocab)
    return [slice(lo, min(lo + size, n_rows)) for lo in range(0, n_rows, size)]


def product(a, b, out, add=False):
    """out (+)= a @ b, summed in `out`'s dtype. bf16 operands keep an fp32 result: rounded logits ruin KD gradients."""
    if a.dtype == b.dtype == out.dtype:
        return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)
    if out.is_cuda and a.dtype == b.dtype:
        return (
            torch.addmm(out, a, b, out_dtype=out.dtype, out=out)
            if add
            else torch.mm(a, b, out_dtype=out.dtype, out=out)
        )
    a, b = a.to(out.dtype), b.to(out.dtype)
    return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def torch_step(rows_loss, n_rows, vocab, like):
    """A step of `chunked_head` in PyTorch. rows_loss(logits_nV, lo, want_grad) -> loss_n gets the logits of rows lo … lo+n in at least fp32
    and overwrites them with d loss_sum / d logits (when want_grad). One buffer of n_rows serves all chunks."""
    logits = torch.empty(n_rows, vocab, dtype=accumulate_dtype(like), device=like.device)

    def step(rows_nD, weight_VD, lo, want_grad):
        logits_nV = product(rows_nD, weight_VD[:vocab].t(), logits[: len(rows_nD)])
        return rows_loss(logits_nV, lo, want_grad), logits_nV.to(
            rows_nD.dtype
        ) if want_grad else None

    return step


def chunked_head(hidden_ND, head_VD, step, vocab, chunk_rows):
    """Sum of a row loss over all rows, differentiable in hidden_ND and head_VD.

    step(rows_nD, weight_VD, lo, want_grad) -> (loss_n, grad_nP): the losses of rows lo … lo+n, weights included, and (when want_grad)
    d loss_sum / d logits in rows_nD's dtype; its columns beyond `vocab`, if any, are 0.
    Returns a scalar. Backward may run once: the gradients are handed over, not kept.
    """
    want_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad)
    return _ChunkedHead.apply(hidden_ND, head_VD, step, vocab, chunk_rows, want_grad)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, step, vocab, chunk_rows, want_grad):
        n_rows, dtype, device = hidden_ND.shape[0], accumulate_dtype(hidden_ND), hidden_ND.device
        weight_VD = head_VD.to(hidden_ND.dtype)
        need_hidden, need_head = (want_grad and need for need in ctx.needs_input_grad[:2])
        grad_hidden = (
            torch.empty(hidden_ND.shape, dtype=dtype, device=device) if need_hidden else None
        )
        grad_head = torch.empty(head_VD.shape, dtype=dtype, device=device) if need_head else None
        if need_head:
            (grad_head[vocab:] if n_rows else grad_head).zero_()
        total = torch.zeros((), dtype=dtype, device=device)
        for lo in range(0, n_rows, chunk_rows):
            rows_nD = hidden_ND[lo : lo + chunk_rows]
            loss_n, grad_nP = step(rows_nD, weight_VD, lo, want_grad)
            total += loss_n.sum()
            if want_grad:
                grad_nP = grad_nP[
                    :, : head_VD.shape[0]
                ]  # a padded row of logits may be wider than the head
                width = grad_nP.shape[1]
            if need_hidden:
                product(grad_nP, weight_VD[:width], grad_hidden[lo : lo + chunk_rows])
            if need_head:
                product(grad_nP.t(), rows_nD, grad_head[:width], add=lo > 0)
        ctx.grads, ctx.dtypes = (grad_hidden, grad_head), (hidden_ND.dtype, head_VD.dtype)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        if ctx.grads is None:
            raise RuntimeError(
                "the chunked head's backward runs once; its gradients were handed over"
            )
        grads, ctx.grads = ctx.grads, None
        return (
            *(
                _scaled(grad, grad_total, dtype)
                for grad, dtype in zip(grads, ctx.dtypes, strict=True)
            ),
            None,
            None,
            None,
            None,
        )


def _scaled(grad, factor, dtype):
    """grad · factor in `dtype`, in place or in one pass."""
    if grad is None:
        return None
    return torch.mul(
        grad, factor, out=grad if grad.dtype == dtype else torch.empty_like(grad, dtype=dtype)
    )
