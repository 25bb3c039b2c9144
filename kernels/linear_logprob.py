"""Log-prob (and entropy) of target tokens under hidden_ND @ head_VDᵀ, and any loss of them, in three products.

Cross-entropy and token-level policy gradients are functions of a row's log-prob, its entropy and a few numbers that
belong to the row. Their derivative with respect to the log-prob is one coefficient c per row, and
d loss / d logits = c · (onehot(target) − p) / temperature, so the gradient is known the moment the chunk's logits are.
"""

import torch

from kernels.backend import triton_runs
from kernels.chunk import blocks, chunked_head, default_chunk_rows, torch_step


class LogprobTerm:
    """What a log-prob loss does with a block of logits; shared by `linear_logprob` and `linear_kl`.

    row_loss(logp_n, entropy_n, fields) -> loss_n is plain differentiable torch; `fields` holds the block's slice of
    each [N] tensor in `fields`; entropy_n is None unless entropy=True. temperature divides the logits.
    """

    def __init__(self, target_N, weight_N, row_loss, fields=None, temperature=1.0, entropy=False):
        self.target_N, self.weight_N, self.row_loss, self.fields = (
            target_N,
            weight_N,
            row_loss,
            fields or {},
        )
        self.temperature, self.entropy = temperature, entropy
        self.logp_N = torch.zeros(
            weight_N.shape,
            dtype=torch.promote_types(weight_N.dtype, torch.float32),
            device=weight_N.device,
        )
        self.entropy_N = torch.zeros_like(self.logp_N) if entropy else None

    def block(self, logits_nV, rows, want_grad):
        """Overwrite the block's logits with d loss / d logits; return the weighted losses. rows: slice of [0, N)."""
        target_n1 = self.target_N[rows].unsqueeze(1)
        if self.temperature != 1.0:
            logits_nV.div_(self.temperature)
        logits_nV.sub_(logits_nV.amax(1, keepdim=True))
        target_logit_n = logits_nV.gather(1, target_n1).squeeze(1)
        p_nV = torch.exp(logits_nV, out=None if self.entropy else logits_nV)
        sum_n = p_nV.sum(1)
        entropy_n = None
        if self.entropy:  # H = −Σ p log p with log p = logits − log Σe
            mean_n = (p_nV * logits_nV).nan_to_num_().sum(1) / sum_n
            entropy_n = sum_n.log() - mean_n
        loss_n, c_logp_n, c_entropy_n = self.coefficients(
            target_logit_n - sum_n.log(), entropy_n, rows, want_grad
        )
        if not want_grad:
            return loss_n
        scale_n = 1 / self.temperature
        if c_entropy_n is None:
            logits_nV = torch.mul(p_nV, (-scale_n * c_logp_n / sum_n).unsqueeze(1), out=logits_nV)
        else:  # dH/dlogits = −p (log p + H) = −p (logits − mean)
            logits_nV.sub_(mean_n.unsqueeze(1)).mul_(c_entropy_n.unsqueeze(1)).add_(
                c_logp_n.unsqueeze(1)
            ).nan_to_num_()
            logits_nV.mul_(p_nV).mul_((-scale_n / sum_n).unsqueeze(1))
        logits_nV.scatter_add_(1, target_n1, (scale_n * c_logp_n).unsqueeze(1))
        return loss_n

    def coefficients(self, logp_n, entropy_n, rows, want_grad):
        """The weighted losses of a block, and (when want_grad) their derivatives by log-prob and by entropy."""
        self.logp_N[rows] = logp_n.to(self.logp_N.dtype)
        if self.entropy:
            self.entropy_N[rows] = entropy_n.to(self.entropy_N.dtype)
        fields = {name: field_N[rows] for name, field_N in self.fields.items()}
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (logp_n, entropy_n) if x is not None]
            loss_n = (
                self.row_loss(leaves[0], leaves[1] if self.entropy else None, fields)
                * self.weight_N[rows]
            )
            if not want_grad:
                return loss_n.detach(), None, None
            grads = torch.autograd.grad(
                loss_n.sum(), leaves, allow_unused=True, materialize_grads=True
            )
        return loss_n.detach(), grads[0], grads[1] if self.entropy else None


def linear_logprob(
    hidden_ND,
    head_VD,
    target_N,
    weight_N,
    row_loss,
    fields=None,
    *,
    temperature=1.0,
    entropy=False,
    vocab=None,
    chunk_rows=None,
):
    """Σ_n weight_n · row_loss(log p(target_n), entropy_n, fields_n), differentiable in hidden_ND and head_VD.

    Log-probs are in nats under softmax(hidden @ head[:vocab]ᵀ / temperature). Returns (loss_sum, {"logp": [N], "entropy": [N]}),
    the latter detached. Under `torch.no_grad` only the logits product runs. Raises ValueError for a target ≥ vocab on a CPU.
    """
    vocab = vocab or head_VD.shape[0]
    if target_N.device.type == "cpu" and target_N.numel() and int(target_N.max()) >= vocab:
        raise ValueError(f"target id {int(target_N.max())} is outside the vocabulary of {vocab}")
    term = LogprobTerm(target_N, weight_N, row_loss, fields, temperature, entropy)
    step, chunk_rows = (_triton_step if triton_runs(hidden_ND) else _torch_step)(
        term, hidden_ND, vocab, chunk_rows
    )
    loss_sum = chunked_head(hidden_ND, head_VD, step, vocab, chunk_rows)
    return loss_sum, {"logp": term.logp_N} | ({"entropy": term.entropy_N} if entropy else {})


def _torch_step(term, hidden_ND, vocab, chunk_rows):
    chunk_rows = chunk_rows or default_chunk_rows(vocab, hidden_ND.device)

    def rows_loss(logits_nV, lo, want_grad):
        parts = [
            term.block(logits_nV[b], slice(lo + b.start, lo + b.stop), want_grad)
            for b in blocks(logits_nV.shape[0], vocab, logits_nV.device)
        ]
        return torch.cat(parts)

    return torch_step(rows_loss, min(chunk_rows, len(hidden_ND)), vocab, hidden_ND), chunk_rows


def _triton_step(term, hidden_ND, vocab, chunk_rows):
    from kernels import triton_head  # here, so that nothing needs Triton where it is not used

    chunk_rows = chunk_rows or triton_head.chunk_rows(vocab, hidden_ND)
    buffer = None

    def step(rows_nD, weight_VD, lo, want_grad):
        nonlocal buffer
        if want_grad and buffer is None:  # without gradients no logits are kept
            buffer = triton_head.buffer(len(rows_nD), vocab, hidden_ND)
        rows, out = slice(lo, lo + len(rows_nD)), buffer[: len(rows_nD)] if want_grad else None
        student = triton_head.logits(
            rows_nD, weight_VD[:vocab], out_nP=out, **triton_head.of_term(term, rows)
        )
        loss_n, coefficient_n3 = triton_head.term_loss(term, student, rows, want_grad)
        if not want_grad:
            return loss_n, None
        return loss_n, triton_head.gradient_of(
            student, term, coefficient_n3, rows, dtype=rows_nD.dtype
        )[1]

    return step, chunk_rows
