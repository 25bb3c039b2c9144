"""One token per row of hidden states: logits, temperature, top-k, top-p, the draw, its log-prob.

Nothing sorts the vocabulary, or sums it id by id, unless top-p asks for it. On a GPU nothing does,
and the logits are stored for top-k and top-p alone (kernels/triton_sampler.py). Random numbers are
counter-based: a hash of (seed of the sample, index of the token), the same in every batch and on
every rank.

Shapes: B rows, D hidden, V vocabulary, P vocabulary padded to whole blocks, M blocks,
C ids of a block, N candidates.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.backend import triton_runs
from kernels.chunk import (
    accumulate_dtype,
    blocks,
    default_chunk_rows,
    exponentials,
    product,
    wide_buffer,
)
from kernels.cpu import uses_onednn

BLOCK = 512  # ids whose probabilities are summed first
NUCLEUS = 1024  # ids that are sorted first for top-p; most often they hold its mass
# On a CPU, a head with more rows than this is multiplied in slices: of SMALL_SLICE rows for up to
# FEW hidden rows, of LARGE_SLICE for more.
LARGE_HEAD, SMALL_SLICE, LARGE_SLICE, FEW = 1 << 14, 128, 4096, 4
TRANSPOSED_BYTES = 1 << 30  # no larger head is copied


# --- random numbers -----------------------------------------------------------------------


GOLDEN = -0x61C8864680B583EB  # 2^64 / the golden ratio, as a signed number


def mix(x: Any) -> Any:
    """Hash the int64 numbers of an array or a tensor: a bit of x changes every bit of the result.

    The finaliser of splitmix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
    generators"); products wrap around.
    """
    x = (x ^ shift_right(x, 30)) * -0x40A7B892E31B1A47
    x = (x ^ shift_right(x, 27)) * -0x6B2FB644ECCEEE15
    return x ^ shift_right(x, 31)


def shift_right(x: Any, bits: int) -> Any:
    """x >> bits with zeros shifted in; int64 itself repeats the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def random_keys(seeds: Sequence[int]) -> np.ndarray:
    """A hashed int64 per seed: neighbouring seeds start far apart in the sequence of `uniform`."""
    bits = np.array([int(seed) % 2**64 for seed in seeds], dtype=np.uint64)
    return mix(bits.astype(np.int64) - 0x5F89E29B87429BD1)


def uniform(keys: Tensor, index: Tensor) -> Tensor:
    """fp64 numbers in (0, 1), both ends excluded, for int64 keys and the indices of tokens.

    52 bits of the index-th output of splitmix64; the same on every device.
    """
    numbers: Any = (keys, index)
    if keys.device.type == "cpu":  # a small operation of NumPy costs a quarter of PyTorch's
        numbers = keys.numpy(), index.numpy()
    bits = shift_right(mix(numbers[0] + (numbers[1] + 1) * GOLDEN), 12)
    return (torch.as_tensor(bits).double() + 0.5) * 2.0**-52


# --- sampling -----------------------------------------------------------------------------


class Sampler:
    """Draws a token from the logits of each row. Its buffers are allocated once.

    Args:
        head_VD: the output head.
        vocab: the ids below this one can be drawn.
        rows: at most so many rows are sampled at once.
        temperature, top_k, top_p: as for `model.generate.generate`.
    """

    def __init__(
        self,
        head_VD: Tensor,
        vocab: int,
        rows: int,
        temperature: float = 0.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> None:
        self.vocab, self.temperature, self.top_p = vocab, temperature, top_p
        self.top_k = top_k if top_k < vocab else 0  # 0: no filter
        device, wide = head_VD.device, accumulate_dtype(head_VD)
        # A CPU has no product of bf16 operands with an fp32 result: the head is widened once.
        self.source_VD = head_VD[:vocab]
        self.head_VD = self.source_VD if head_VD.is_cuda else self.source_VD.to(wide)
        self.head_DV: Tensor | None = None  # made for the first draw of more than FEW rows
        self.by_kernel = triton_runs(self.source_VD)  # it has buffers of its own
        # In PyTorch top-p looks at numbers on the device: it cannot be part of a CUDA graph.
        self.synchronizes = not self.by_kernel and temperature > 0 and top_p < 1
        self.rows = default_chunk_rows(vocab, 1 if self.by_kernel else rows, device)
        padded = -(-vocab // BLOCK) * BLOCK
        self.logits_BP = head_VD.new_empty((self.rows, padded), dtype=wide)
        # Filters copy the weights of the rows that are drawn together: those of a CPU's cache.
        is_filtered = self.top_k or top_p < 1
        self.together = blocks(self.rows, padded, device)[0].stop if is_filtered else self.rows

    def refresh(self) -> None:
        """Called when the head's numbers have changed, in place."""
        if self.head_VD.dtype != self.source_VD.dtype:
            self.head_VD.copy_(self.source_VD)
        self.head_DV = None

    def rest(self) -> None:
        """Called after generation: training gets the memory of the head's copy."""
        self.head_DV = None

    def __call__(self, hidden_BD: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
        """Ids and their log-probs before top-k and top-p; u_B: numbers in (0, 1)."""
        if self.by_kernel:
            from kernels import triton_sampler  # here: not everyone has Triton

            rows_BD = hidden_BD.to(self.head_VD.dtype)
            filters = self.top_k, self.top_p
            return triton_sampler.draw(rows_BD, self.head_VD, self.temperature, u_B, *filters)
        tokens, logps = [], []
        for rows_BD, rows_u_B in zip(hidden_BD.split(self.rows), u_B.split(self.rows), strict=True):
            logits_BP = self.logits_BP[: len(rows_BD)]
            self._product(rows_BD.to(self.head_VD.dtype), logits_BP[:, : self.vocab])
            logits_BP[:, self.vocab :] = -torch.inf
            parts = logits_BP.split(self.together), rows_u_B.split(self.together)
            for part_BP, part_u_B in zip(*parts, strict=True):
                token_B, logp_B = self._draw(part_BP, part_u_B)
                tokens.append(token_B)
                logps.append(logp_B)
        return torch.cat(tokens), torch.cat(logps)

    def _product(self, rows_BD: Tensor, out_BV: Tensor) -> None:
        """out = rows @ head.T.

        oneDNN packs the head as it lies anew at every call. From a transposed copy a product of 8
        to 64 rows takes 0.7 to 0.9 of the time, and the copy costs no more than it saves in 10. Its
        rows may not lie an odd number of elements apart: that takes a third longer.
        """
        large = LARGE_HEAD <= self.vocab and self.head_VD.nbytes <= TRANSPOSED_BYTES
        if len(rows_BD) <= FEW or not large or not uses_onednn(out_BV):
            return head_product(rows_BD, self.head_VD, out_BV)
        if self.head_DV is None:
            head_VD = self.head_VD
            self.head_DV = wide_buffer(head_VD.shape[1], self.vocab, head_VD.dtype, head_VD.device)
            for rows_CD, columns_DC in zip(
                self.head_VD.split(1024), self.head_DV.split(1024, 1), strict=True
            ):
                columns_DC.copy_(rows_CD.t())  # in parts: one copy runs in one thread
        product(rows_BD, self.head_DV, out_BV)

    def _draw(self, logits_BP: Tensor, u_B: Tensor) -> tuple[Tensor, Tensor]:
        """The logits are overwritten."""
        is_greedy = self.temperature == 0
        token_B = argmax(logits_BP) if is_greedy else None
        removed_BP = below_top_k(logits_BP, self.top_k) if self.top_k and not is_greedy else None
        for rows in blocks(len(logits_BP), logits_BP.shape[1], logits_BP.device):
            exponentials(logits_BP[rows], self.temperature or 1.0, out=logits_BP[rows])
        weight_BP, mass_BM = logits_BP, block_mass(logits_BP)
        total_B = mass_BM.sum(1)
        if token_B is None:
            kept_BP = weight_BP
            if removed_BP is not None:
                kept_BP = kept_BP.masked_fill(removed_BP, 0)
            if self.top_p < 1:
                candidates = self.top_k + 1 if self.top_k else NUCLEUS
                kept_BP = keep_top_p(kept_BP, self.top_p, candidates)
            token_B = draw(kept_BP, mass_BM if kept_BP is weight_BP else block_mass(kept_BP), u_B)
        logp_B = (weight_BP.gather(1, token_B.unsqueeze(1)).squeeze(1) / total_B).log()
        return token_B, logp_B.to(weight_BP.dtype)


def head_product(rows_BD: Tensor, head_VD: Tensor, out_BV: Tensor) -> None:
    """out = rows @ head.T.

    For a few rows of a large head, a CPU's matrix product spends its time on packing the transposed
    head, anew at every call. The other way around, in slices whose result stays in the cache until
    it is transposed, costs less; oneDNN, where it may be used, does so from 5 rows on by itself.
    """
    n, vocab = out_BV.shape
    if out_BV.is_cuda or vocab < LARGE_HEAD or (n > FEW and uses_onednn(out_BV)):
        product(rows_BD, head_VD.t(), out_BV)
    elif n <= FEW:
        whole = vocab - vocab % SMALL_SLICE
        slices_MCD = head_VD[:whole].unflatten(0, (-1, SMALL_SLICE))
        out_MCB = torch.bmm(slices_MCD, rows_BD.t().expand(len(slices_MCD), -1, n))
        out_BV[:, :whole].unflatten(1, (-1, SMALL_SLICE)).copy_(out_MCB.movedim(2, 0))
        out_BV[:, whole:] = rows_BD @ head_VD[whole:].t()
    else:
        buffer_CB = out_BV.new_empty(LARGE_SLICE, n)
        for head_CD, out_BC in zip(
            head_VD.split(LARGE_SLICE), out_BV.split(LARGE_SLICE, 1), strict=True
        ):
            torch.mm(head_CD, rows_BD.t(), out=buffer_CB[: len(head_CD)])
            out_BC.copy_(buffer_CB[: len(head_CD)].t())


def _block_of(x_BP: Tensor, block_B: Tensor) -> Tensor:
    """The values [B, C] of one block of each row."""
    rows_B = torch.arange(len(x_BP), device=x_BP.device)
    return x_BP.unflatten(1, (-1, BLOCK))[rows_B, block_B]


def argmax(x_BP: Tensor) -> Tensor:
    """The first id of the largest value in each row.

    torch.argmax is slow beside amax, so it only sees the maxima of the blocks and one block.
    """
    block_B = x_BP.unflatten(1, (-1, BLOCK)).amax(2).argmax(1)
    return block_B * BLOCK + _block_of(x_BP, block_B).argmax(1)


def block_mass(weight_BP: Tensor) -> Tensor:
    """The sums of the blocks of each row, [B, M]."""
    return weight_BP.unflatten(1, (-1, BLOCK)).sum(2).double()


def draw(weight_BP: Tensor, mass_BM: Tensor, u_B: Tensor) -> Tensor:
    """The id at which the cumulative sum exceeds u · total; never one of weight 0.

    Args:
        weight_BP: probabilities, or a multiple of them.
        mass_BM: their `block_mass`: a block is found first, then the id inside it.
    """
    block_B, rest_B = _first_beyond(mass_BM, u_B * mass_BM.sum(1))
    id_B, _ = _first_beyond(_block_of(weight_BP, block_B).double(), rest_B)
    return block_B * BLOCK + id_B


def _first_beyond(mass_BM: Tensor, target_B: Tensor) -> tuple[Tensor, Tensor]:
    """The first m whose cumulative sum exceeds the target, and the target less what lies before.

    The mass there is positive, because the sum rose.
    """
    sum_BM = mass_BM.cumsum(1)
    # Rounding may leave the target at or beyond the end, or below the start.
    largest_B = torch.nextafter(sum_BM[:, -1], torch.zeros_like(target_B))
    target_B = torch.minimum(target_B, largest_B).clamp_min(0)
    at_B1 = (sum_BM <= target_B.unsqueeze(1)).sum(1, keepdim=True)
    before_B1 = sum_BM.gather(1, at_B1) - mass_BM.gather(1, at_B1)
    return at_B1.squeeze(1), target_B - before_B1.squeeze(1)


def below_top_k(logits_BP: Tensor, k: int) -> Tensor:
    """Where a logit is below the k-th largest of its row."""
    return logits_BP < logits_BP.topk(k).values[:, -1:]


def keep_top_p(probs_BP: Tensor, top_p: float, candidates: int) -> Tensor:
    """Probabilities of the smallest set of most probable ids with top_p of the mass, 0 elsewhere.

    Among equals, lower ids come first. Only the most probable `candidates` are sorted where they
    hold that mass; a row in which they do not is sorted as a whole.
    """
    goal_B = probs_BP.sum(1, dtype=torch.float64) * top_p
    top = probs_BP.topk(min(candidates, probs_BP.shape[1]))
    # Some ids as probable as the last candidate may be missing: these count only if the mass is
    # reached before them.
    certain_BN = top.values * (top.values > top.values[:, -1:])
    enough_B = certain_BN.sum(1, dtype=torch.float64) >= goal_B
    ids_BN = top.indices.sort(1).values
    kept_BN = _nucleus(probs_BP.gather(1, ids_BN), goal_B)
    kept_BP = torch.zeros_like(probs_BP).scatter_(1, ids_BN, kept_BN)
    if not enough_B.all():
        kept_BP[~enough_B] = _nucleus(probs_BP[~enough_B], goal_B[~enough_B])
    return kept_BP


def _nucleus(probs_BN: Tensor, goal_B: Tensor) -> Tensor:
    """Keep the ids, in order of probability, before which less mass than the goal is reached."""
    sorted_BN, order_BN = probs_BN.sort(dim=1, descending=True, stable=True)
    before_BN = sorted_BN.double().cumsum(1) - sorted_BN
    sorted_BN.masked_fill_(before_BN >= goal_B.unsqueeze(1), 0)
    return torch.zeros_like(probs_BN).scatter_(1, order_BN, sorted_BN)
