"""One token per row of hidden states: logits, temperature, top-k, top-p, the draw, its log-prob, the random numbers.

Nothing sorts the vocabulary, or sums it up id by id, unless top-p asks for it. Random numbers are counter-based: a hash of
(seed of the sample, index of the token), the same in every batch and on every rank.
Legend: B rows, D hidden, V vocabulary, P vocabulary padded to whole blocks, M blocks, C ids of a block, N candidates.
"""

import numpy as np
import torch

from kernels.chunk import accumulate_dtype, blocks, default_chunk_rows, product

BLOCK = 512  # ids whose probabilities are summed first
LARGE_HEAD, SLICE, TURNED = (
    1 << 14,
    128,
    4096,
)  # on a CPU, heads with more rows are multiplied in slices: up to 4 rows, more rows
NUCLEUS = 1024  # ids that are sorted first for top-p; most often they hold its mass


# --- random numbers --------------------------------------------------------------------------------------------------


def _mix(x):
    """The finaliser of splitmix64 (Steele, Lea & Flood 2014) on uint64, whose products wrap around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def random_keys(seeds):
    """One hashed uint64 per seed, so that neighbouring seeds begin far apart in the sequence that `uniform` walks."""
    return _mix(
        np.array([int(s) & (1 << 64) - 1 for s in seeds], dtype=np.uint64)
        + np.uint64(0xA0761D6478BD642F)
    )


def uniform(keys, index):
    """fp64 in (0, 1), both ends excluded, for (key, index of the token): 52 bits of splitmix64's index-th output."""
    bits = _mix(
        keys + (index.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    ) >> np.uint64(12)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


# --- sampling --------------------------------------------------------------------------------------------------------


class Sampler:
    """hidden_BD -> (token_B, logp_B). Logits are made once, in buffers that are allocated once."""

    def __init__(self, head_VD, vocab, rows, temperature=0.0, top_k=0, top_p=1.0):
        self.temperature, self.top_k, self.top_p = temperature, min(top_k, vocab), top_p
        self.synchronizes = (
            temperature > 0 and top_p < 1
        )  # for a look at numbers on the device: no part of a CUDA graph
        device, wide = head_VD.device, accumulate_dtype(head_VD)
        # a CPU has no product of bf16 operands with an fp32 result: the head is widened here, once
        self.head_VD, self.vocab = (
            head_VD[:vocab].to(head_VD.dtype if head_VD.is_cuda else wide),
            vocab,
        )
        self.rows = min(rows, default_chunk_rows(vocab, device))
        padded = -(-vocab // BLOCK) * BLOCK
        self.logits_BP = torch.full((self.rows, padded), float("-inf"), dtype=wide, device=device)
        block = max(s.stop - s.start for s in blocks(self.rows, padded, device))
        self.probs_BP = torch.empty(block, padded, dtype=wide, device=device)

    def __call__(self, hidden_BD, u_B=None):
        pairs = []
        for lo in range(0, len(hidden_BD), self.rows):
            rows_BD = hidden_BD[lo : lo + self.rows].to(self.head_VD.dtype)
            logits_BP = self.logits_BP[: len(rows_BD)]
            head_product(rows_BD, self.head_VD, logits_BP[:, : self.vocab])
            for rows in blocks(*logits_BP.shape, logits_BP.device):
                pairs.append(
                    self._choose(
                        logits_BP[rows],
                        None if u_B is None else u_B[lo + rows.start : lo + rows.stop],
                    )
                )
        return [torch.cat(x) for x in zip(*pairs)]

    def _choose(self, logits_BP, u_B):
        if self.temperature not in (0.0, 1.0):
            logits_BP[:, : self.vocab].mul_(1 / self.temperature)
        probs_BP = torch.softmax(logits_BP, 1, out=self.probs_BP[: len(logits_BP)])
        if self.temperature == 0.0:
            token_B = argmax(logits_BP)
            return token_B, probs_BP.gather(1, token_B.unsqueeze(1)).squeeze(1).log()
        kept_BP = probs_BP
        if 0 < self.top_k < self.vocab:
            kept_BP = keep_top_k(logits_BP, kept_BP, self.top_k)
        if self.top_p < 1:
            kept_BP = keep_top_p(kept_BP, self.top_p, self.top_k + 1 if self.top_k else NUCLEUS)
        token_B = draw(kept_BP, u_B)
        return token_B, probs_BP.gather(1, token_B.unsqueeze(1)).squeeze(1).log()


def head_product(rows_BD, head_VD, out_BV):
    """out = rows @ head.T. For a few rows of a large head a CPU's matrix product spends its time on packing the transposed head,
    anew at every call. The other way around, in slices whose result stays in the cache until it is turned, costs less."""
    n, vocab = out_BV.shape
    if out_BV.is_cuda or vocab < LARGE_HEAD:
        return product(rows_BD, head_VD.t(), out_BV)
    if n <= 4:
        whole = vocab - vocab % SLICE
        slices_MCD = head_VD[:whole].unflatten(0, (-1, SLICE))
        out_BMC = out_BV[:, :whole].unflatten(1, (-1, SLICE))
        out_BMC.copy_(
            torch.bmm(slices_MCD, rows_BD.t().expand(len(slices_MCD), -1, n)).movedim(2, 0)
        )
        out_BV[:, whole:] = rows_BD @ head_VD[whole:].t()
        return
    turned_CB = torch.empty(TURNED, n, dtype=out_BV.dtype)
    for lo in range(0, vocab, TURNED):
        part_VD = head_VD[lo : lo + TURNED]
        out_BV[:, lo : lo + TURNED] = torch.mm(
            part_VD, rows_BD.t(), out=turned_CB[: len(part_VD)]
        ).t()


def argmax(x_BP):
    """The first id of the largest value. torch.argmax is slow beside amax, so it only sees the blocks' maxima and one block."""
    x_BMC = x_BP.unflatten(1, (-1, BLOCK))
    block_B = x_BMC.amax(2).argmax(1)
    return block_B * BLOCK + x_BMC[torch.arange(len(x_BP), device=x_BP.device), block_B].argmax(1)


def draw(probs_BP, u_B):
    """The id at which the cumulative sum passes u · total; never one of probability 0. Sums of blocks, then inside one block."""
    probs_BMC = probs_BP.unflatten(1, (-1, BLOCK))
    mass_BM = probs_BMC.sum(2).double()
    block_B, rest_B = _pass(mass_BM, u_B * mass_BM.sum(1))
    inside_BC = probs_BMC[torch.arange(len(probs_BP), device=probs_BP.device), block_B].double()
    return block_B * BLOCK + _pass(inside_BC, rest_B)[0]


def _pass(mass_BM, target_B):
    """(the first m whose cumulative sum exceeds the target, what of the target is left for it). There, mass > 0: the sum rose."""
    sum_BM = mass_BM.cumsum(1)
    # rounding may leave the target at or beyond the end, or below the start
    target_B = torch.minimum(
        target_B, torch.nextafter(sum_BM[:, -1], torch.zeros_like(target_B))
    ).clamp_min(0)
    at_B1 = (sum_BM <= target_B.unsqueeze(1)).sum(1, keepdim=True)
    return at_B1.squeeze(1), target_B - (
        sum_BM.gather(1, at_B1) - mass_BM.gather(1, at_B1)
    ).squeeze(1)


def keep_top_k(logits_BP, probs_BP, k):
    """Probabilities of the ids whose logit is at least the k-th largest, 0 elsewhere."""
    return probs_BP.masked_fill(logits_BP < logits_BP.topk(k).values[:, -1:], 0)


def keep_top_p(probs_BP, top_p, candidates):
    """Probabilities of the smallest set of the likeliest ids (equal ones: lower ids first) with top_p of the mass, 0 elsewhere.

    Only the likeliest `candidates` are sorted where they hold that mass; a row in which they do not is sorted whole.
    """
    goal_B = probs_BP.sum(1, dtype=torch.float64) * top_p
    kept_BP = torch.zeros_like(probs_BP)
    top = probs_BP.topk(min(candidates, probs_BP.shape[1]))
    # of ids as likely as the last candidate some may be missing: they count only if the mass is reached before them
    enough_B = (top.values * (top.values > top.values[:, -1:])).sum(
        1, dtype=torch.float64
    ) >= goal_B
    ids_BN = top.indices.sort(1).values
    _nucleus(kept_BP, probs_BP.gather(1, ids_BN), ids_BN, goal_B)
    if not bool(enough_B.all()):
        rest = (~enough_B).nonzero().squeeze(1)
        whole = torch.zeros_like(probs_BP[rest])
        _nucleus(whole, probs_BP[rest], None, goal_B[rest])
        kept_BP[rest] = whole
    return kept_BP


def _nucleus(kept_BP, probs_BN, ids_BN, goal_B):
    """Write into kept_BP those of probs_BN (of ids_BN, ascending; None: all ids) before which less than the goal is reached."""
    sorted_BN, order_BN = probs_BN.sort(dim=1, descending=True, stable=True)
    before_BN = sorted_BN.double().cumsum(1) - sorted_BN
    sorted_BN.masked_fill_(before_BN >= goal_B.unsqueeze(1), 0)
    kept_BP.scatter_(1, order_BN if ids_BN is None else ids_BN.gather(1, order_BN), sorted_BN)
