"""A Triton kernel that draws ids from the tile statistics of the vocabulary head.

`triton_head.logits` multiplies hidden rows by the head and keeps of each tile of ids only the
largest logit and the sum of exponentials. `draw_kernel` takes a row of them: it finds the tile
at which the distribution function passes the row's random number, computes that tile's logits once
more, and finds the id in it. The logits are never in memory: for 256 rows of 151,665 ids a step
moves 0.08 GB beside the head, where a sampler of stored logits moves 0.94 GB.

The distribution function is summed in fp64 in the order of the ids, as `model.sampling.draw` does
it: the same random number gives the same id, but for rounding at the border of two ids.

Legend: B rows, D hidden, V vocabulary, J tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_head
from kernels.triton_head import LOG2E, LOWEST

WARPS = 8
WIDTH = 64  # numbers of a head's row at a time
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def _invert(mass, u):
    """The first place at which the cumulative mass exceeds u · total, never one without mass.

    Returns it, what is left of u · total there as a share of the place's mass, and the total.
    """
    at = tl.arange(0, mass.shape[0])
    sums = tl.cumsum(mass, 0)
    total = tl.max(sums, 0)
    target = u * total
    beyond = tl.where((sums > target) & (mass > 0), at, mass.shape[0])
    # Rounding may leave nothing beyond the target: then it is the last place that has mass.
    place = tl.minimum(tl.min(beyond, 0), tl.max(tl.where(mass > 0, at, 0), 0))
    before = tl.sum(tl.where(at == place, sums - mass, 0.0), 0)
    share = tl.maximum(target - before, 0.0) / tl.sum(tl.where(at == place, mass, 0.0), 0)
    return place, share, total


@triton.jit
def _first_largest(x):
    """The first place of the largest number."""
    at = tl.arange(0, x.shape[0])
    return tl.min(tl.where(x == tl.max(x, 0), at, x.shape[0] - 1), 0)


@triton.jit(do_not_specialize=["vocab", "n_tiles"])
def draw_kernel(
    x_ptr,
    w_ptr,
    max_ptr,
    sum_ptr,
    u_ptr,
    id_ptr,
    logp_ptr,
    vocab,
    n_tiles,
    inv_t,
    D: tl.constexpr,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    WIDTH: tl.constexpr,
    GREEDY: tl.constexpr,
):
    """One row: its id, and the id's log-prob in nats under softmax(logits / t).

    max, sum: of its tiles, as `triton_head.logits_kernel` leaves them. inv_t: log2(e)/t.
    TILES: at least n_tiles.
    """
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    at, real = row * n_tiles + j, j < n_tiles
    largest = tl.load(max_ptr + at, mask=real, other=LOWEST)
    sums = tl.load(sum_ptr + at, mask=real, other=0.0)
    most = tl.max(largest, 0)
    mass = sums.to(tl.float64) * tl.exp2((largest - most) * inv_t)
    if GREEDY:
        tile, total = _first_largest(largest), tl.sum(mass, 0)
    else:
        tile, share, total = _invert(mass, tl.load(u_ptr + row))
    ids = tile * TILE + tl.arange(0, TILE)
    # ids beyond the end read the last one: their products are never used
    at_w = tl.minimum(ids, vocab - 1).to(tl.int64)[:, None] * D
    logits = tl.zeros((TILE,), tl.float32)
    for k in range(0, D, WIDTH):
        columns = k + tl.arange(0, WIDTH)
        x = tl.load(x_ptr + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + at_w + columns[None, :], mask=columns[None, :] < D, other=0.0)
        logits += tl.sum(w.to(tl.float32) * x[None, :], 1)
    logits = tl.where(ids < vocab, logits, float("-inf"))
    if GREEDY:
        place = _first_largest(logits)
    else:
        e = tl.exp2((logits - tl.max(logits, 0)) * inv_t)
        place, _, _ = _invert(e.to(tl.float64), share)
    logit = tl.sum(tl.where(tl.arange(0, TILE) == place, logits, 0.0), 0)
    logp = (logit - most).to(tl.float64) * (inv_t * LN2) - tl.log(total)
    # of logits that are no numbers none is the largest: what is drawn is an id all the same
    tl.store(id_ptr + row, tl.minimum(tile * TILE + place, vocab - 1).to(tl.int64))
    tl.store(
        logp_ptr + row, tl.minimum(logp, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float32)
    )


def draw(x_BD: Tensor, head_VD: Tensor, temperature: float, u_B: Tensor) -> tuple[Tensor, Tensor]:
    """Ids drawn from softmax(x headᵀ / temperature), and their log-probs, fp32.

    Args:
        temperature: 0: the first id of the largest logit, with its log-prob at temperature 1.
        u_B: fp64 numbers in (0, 1); not read at temperature 0.
    """
    x_BD, head_VD = x_BD.contiguous(), head_VD.contiguous()
    (n, width), vocab = x_BD.shape, head_VD.shape[0]
    tiles = triton_head.logits(x_BD, head_VD, temperature=temperature or 1.0, whole_rows=False)
    n_tiles = tiles.largest_nJ.shape[1]
    ids_B = torch.empty(n, dtype=torch.long, device=x_BD.device)
    logp_B = torch.empty(n, dtype=torch.float32, device=x_BD.device)
    with torch.cuda.device_of(x_BD):
        draw_kernel[(n,)](
            x_BD, head_VD, tiles.largest_nJ, tiles.sum_nJ, u_B, ids_B, logp_B,
            vocab, n_tiles, LOG2E.value / (temperature or 1.0),
            D=width, TILE=tiles.tile,
            TILES=triton.next_power_of_2(n_tiles), WIDTH=WIDTH, GREEDY=temperature == 0,
            num_warps=WARPS,
        )  # fmt: skip
    return ids_B, logp_B
