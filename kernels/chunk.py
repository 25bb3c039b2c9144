"""The vocabulary head in chunks of rows, so that [N, V] logits never exist.

The head of a 0.5B model has 151,936 rows: one fp32 logits tensor for 8 x 1,024 tokens is 5 GB, and a plain
implementation holds several. Here the logits of a few rows are made, turned into their own gradient in place and
multiplied out at once into the gradients of the hidden rows and of the head: three products, two buffers.

`chunked_head` is the loop; the files beside this one supply what happens to a chunk. Legend: N loss rows, n rows of a
chunk, D hidden, V vocabulary (the first V rows of the head take part, padding rows beyond are never seen).
"""

import torch

CHUNK_ELEMENTS = {"cpu": 64 << 20, "cuda": 640 << 20}  # logits held at once: 441 rows of 151,936 on a CPU, 4,400 on a GPU
BLOCK_ELEMENTS = 5 << 17  # on a CPU the element-wise work runs on blocks of rows that stay in the cache


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
        return torch.addmm(out, a, b, out_dtype=out.dtype, out=out) if add else torch.mm(a, b, out_dtype=out.dtype, out=out)
    a, b = a.to(out.dtype), b.to(out.dtype)
    return torch.addmm(out, a, b, out=out) if add else torch.mm(a, b, out=out)


def chunked_head(hidden_ND, head_VD, rows_loss, vocab=None, chunk_rows=None):
    """Sum of a row loss over all rows, differentiable in hidden_ND and head_VD.

    rows_loss(logits_nV, lo, want_grad) -> loss_n gets the logits of rows lo … lo+n in at least fp32, overwrites them
    with d loss_sum / d logits (when want_grad) and returns the rows' losses, weights included.
    Returns a scalar. Backward may run once: the gradients are handed over, not kept.
    """
    vocab = vocab or head_VD.shape[0]
    chunk_rows = chunk_rows or default_chunk_rows(vocab, hidden_ND.device)
    want_grad = torch.is_grad_enabled() and (hidden_ND.requires_grad or head_VD.requires_grad)
    return _ChunkedHead.apply(hidden_ND, head_VD, rows_loss, vocab, chunk_rows, want_grad)


class _ChunkedHead(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, head_VD, rows_loss, vocab, chunk_rows, want_grad):
        n_rows, dtype, device = hidden_ND.shape[0], accumulate_dtype(hidden_ND), hidden_ND.device
        weight_VD = head_VD[:vocab].to(hidden_ND.dtype)
        logits = torch.empty(min(chunk_rows, n_rows), vocab, dtype=dtype, device=device)
        need_hidden, need_head = (want_grad and need for need in ctx.needs_input_grad[:2])
        grad_hidden = torch.empty(hidden_ND.shape, dtype=dtype, device=device) if need_hidden else None
        grad_head = torch.empty(head_VD.shape, dtype=dtype, device=device) if need_head else None
        if need_head:
            (grad_head[vocab:] if n_rows else grad_head).zero_()
        total = torch.zeros((), dtype=dtype, device=device)
        for lo in range(0, n_rows, chunk_rows):
            rows_nD = hidden_ND[lo : lo + chunk_rows]
            logits_nV = product(rows_nD, weight_VD.t(), logits[: rows_nD.shape[0]])
            total += rows_loss(logits_nV, lo, want_grad).sum()
            grad_nV = logits_nV.to(rows_nD.dtype)
            if need_hidden:
                product(grad_nV, weight_VD, grad_hidden[lo : lo + chunk_rows])
            if need_head:
                product(grad_nV.t(), rows_nD, grad_head[:vocab], add=lo > 0)
        ctx.grads, ctx.dtypes = (grad_hidden, grad_head), (hidden_ND.dtype, head_VD.dtype)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        if ctx.grads is None:
            raise RuntimeError("the chunked head's backward runs once; its gradients were handed over")
        (grad_hidden, grad_head), ctx.grads = ctx.grads, None
        grad_hidden = None if grad_hidden is None else grad_hidden.mul_(grad_total).to(ctx.dtypes[0])
        grad_head = None if grad_head is None else grad_head.mul_(grad_total).to(ctx.dtypes[1])
        return grad_hidden, grad_head, None, None, None, None
