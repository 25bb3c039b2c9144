"""Triton kernels that draw ids from the tile statistics of the vocabulary head.

`triton_head.logits` multiplies hidden rows by the head and keeps of each tile of ids only the
largest logit and the sum of exponentials. `draw_kernel` takes a row of them: it finds the tile
at which the distribution function passes the row's random number, computes that tile's logits once
more, and finds the id in it. The logits are never in memory: for 256 rows of 151,665 ids a step
moves 0.08 GB beside the head, where a sampler of stored logits moves 0.94 GB.

For top-k and top-p the head's product stores the logits, and `filtered_kernel` reads those tiles of
a row that can hold what is kept: the tiles' statistics bound its least logit from below. It lists
the ids at or above that bound, mostly a few hundred, and halves the interval in which the least
logit lies until it has it. Nothing is sorted, and nothing comes back to the host: a step with top-p
is part of a CUDA graph.

The distribution function is summed in fp64 in the order of the ids, as `model.sampling.draw` does
it: the same random number gives the same id, but for rounding at the border of two ids.

Legend: B rows, D hidden, V vocabulary, P padded vocabulary, J tiles.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels import triton_head
from kernels.triton_head import LOG2E, LOWEST

WARPS = 8
WIDTH = 64  # numbers of a head's row at a time
BLOCK = 1024  # logits of a row at a time
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


@triton.jit
def _tiles(max_ptr, sum_ptr, n_tiles, inv_t, TILES: tl.constexpr):
    """Of a row's tiles the largest logit and the mass, and the largest logit of all."""
    j = tl.arange(0, TILES)
    largest = tl.load(max_ptr + j, mask=j < n_tiles, other=float("-inf"))
    sums = tl.load(sum_ptr + j, mask=j < n_tiles, other=0.0)
    most = tl.max(largest, 0)
    return largest, sums.to(tl.float64) * tl.exp2((largest - most) * inv_t), most


@triton.jit
def _store(id_ptr, logp_ptr, drawn, logit, most, total, inv_t):
    logp = (logit - most).to(tl.float64) * (inv_t * LN2) - tl.log(total)
    tl.store(id_ptr, drawn.to(tl.int64))
    tl.store(logp_ptr, tl.minimum(logp, 0.0, propagate_nan=tl.PropagateNan.ALL).to(tl.float32))


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
    row = tl.program_id(0).to(tl.int64)
    at = row * n_tiles
    largest, mass, most = _tiles(max_ptr + at, sum_ptr + at, n_tiles, inv_t, TILES)
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
    # of logits that are no numbers none is the largest: what is drawn is an id all the same
    drawn = tl.minimum(tile * TILE + place, vocab - 1)
    _store(id_ptr + row, logp_ptr + row, drawn, logit, most, total, inv_t)


# --- top-k and top-p -----------------------------------------------------------------------------


@triton.jit
def _in_order(bits):
    """The bits of fp32 numbers as integers in the numbers' order, and back."""
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _key(x):
    return _in_order(x.to(tl.int32, bitcast=True)).to(tl.int64)


@triton.jit
def _number(key):
    return _in_order(key.to(tl.int32)).to(tl.float32, bitcast=True)


@triton.jit
def _listed(z_ptr, list_ptr, lo, n, BLOCK: tl.constexpr):
    """BLOCK of the n ids of a list, from place lo on, and their logits."""
    place = lo + tl.arange(0, BLOCK)
    ids = tl.load(list_ptr + place, mask=place < n, other=0)
    return ids, tl.load(z_ptr + ids, mask=place < n, other=float("-inf"))


@triton.jit
def _sum_from(x, z_ptr, list_ptr, n, most, inv_t, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The mass of the listed ids whose logit is at least x; with COUNT their number."""
    total = tl.zeros((BLOCK,), tl.float64)
    for lo in range(0, n, BLOCK):
        _, logit = _listed(z_ptr, list_ptr, lo, n, BLOCK)
        if COUNT:
            total += (logit >= x).to(tl.float64)
        else:
            total += tl.where(logit >= x, tl.exp2((logit - most) * inv_t), 0.0).to(tl.float64)
    return tl.sum(total, 0)


@triton.jit
def _least_of_tiles(largest, mass, most, goal, inv_t, COUNT: tl.constexpr, TILE: tl.constexpr):
    """A logit such that the ids at or above it have at least the mass `goal`, whatever the tiles
    hold; with COUNT at least that number."""
    low, high = _key(tl.full((), LOWEST, tl.float32)), _key(most) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        x = _number(middle)
        if COUNT:
            reached = tl.sum((largest >= x).to(tl.float64), 0)
        else:  # the ids of a tile below x have less than TILE times its mass
            below = tl.exp2((x - most) * inv_t).to(tl.float64) * TILE
            reached = tl.sum(tl.maximum(mass - below, 0.0), 0)
        low, high = tl.where(reached >= goal, middle, low), tl.where(reached >= goal, high, middle)
    return _number(low)


@triton.jit
def _least(least, z_ptr, list_ptr, n, most, goal, inv_t, COUNT: tl.constexpr, BLOCK: tl.constexpr):
    """The largest logit such that the listed ids at or above it have the mass `goal`; with COUNT
    that number. It is at least `least`."""
    low, high = _key(least), _key(most) + 1
    while high - low > 1:
        middle = (low + high) >> 1
        reached = _sum_from(_number(middle), z_ptr, list_ptr, n, most, inv_t, COUNT, BLOCK)
        low, high = tl.where(reached >= goal, middle, low), tl.where(reached >= goal, high, middle)
    return _number(low)


@triton.jit(do_not_specialize=["vocab", "n_tiles", "top_k"])
def filtered_kernel(
    z_ptr,
    list_ptr,
    max_ptr,
    sum_ptr,
    u_ptr,
    id_ptr,
    logp_ptr,
    vocab,
    n_tiles,
    inv_t,
    top_k,
    top_p,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    TOP_K: tl.constexpr,
    TOP_P: tl.constexpr,
):
    """One row: its id among those that top-k and then top-p keep, and its log-prob before them.

    z: the logits. list: room for as many int32. Others: see `draw_kernel`.
    """
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * n_tiles * TILE
    list_ptr += row * n_tiles * TILE
    max_ptr += row * n_tiles
    largest, mass, most = _tiles(max_ptr, sum_ptr + row * n_tiles, n_tiles, inv_t, TILES)
    total = tl.sum(mass, 0)
    goal = top_k.to(tl.float64) if TOP_K else total * top_p
    least = _least_of_tiles(largest, mass, most, goal, inv_t, TOP_K, TILE)
    n = 0
    for first in range(0, n_tiles, BLOCK // TILE):
        j = first + tl.arange(0, BLOCK // TILE)
        read = tl.load(max_ptr + j, mask=j < n_tiles, other=float("-inf")) >= least
        if tl.max(read.to(tl.int32), 0) > 0:
            ids = j[:, None] * TILE + tl.arange(0, TILE)[None, :]
            logit = tl.load(z_ptr + ids, mask=read[:, None], other=float("-inf"))
            listed = tl.reshape((logit >= least).to(tl.int32), (BLOCK,))
            place = n + tl.cumsum(listed, 0) - listed
            tl.store(list_ptr + place, tl.reshape(ids, (BLOCK,)), mask=listed > 0)
            n += tl.sum(listed, 0)
    tl.debug_barrier()  # all threads have written before one of them reads
    if TOP_K:
        least = _least(least, z_ptr, list_ptr, n, most, goal, inv_t, True, BLOCK)
        goal = total * float("inf")
    if TOP_P:
        if TOP_K:
            goal = top_p * _sum_from(least, z_ptr, list_ptr, n, most, inv_t, False, BLOCK)
        least = _least(least, z_ptr, list_ptr, n, most, goal, inv_t, False, BLOCK)
    # Of equals at the edge the first are kept, until the goal is reached; top-k keeps all.
    next_x = _number(_key(least) + 1)
    above = _sum_from(next_x, z_ptr, list_ptr, n, most, inv_t, False, BLOCK)
    equals = _sum_from(least, z_ptr, list_ptr, n, most, inv_t, True, BLOCK)
    equals -= _sum_from(next_x, z_ptr, list_ptr, n, most, inv_t, True, BLOCK)
    each = tl.exp2((least - most) * inv_t).to(tl.float64)
    equals = tl.minimum(tl.maximum(tl.ceil((goal - above) / each), 1.0), equals)
    target = tl.load(u_ptr + row) * (above + equals * each)
    drawn, last = vocab, 0
    before, passed = tl.zeros((), tl.float64), tl.zeros((), tl.float64)
    for lo in range(0, n, BLOCK):
        ids, logit = _listed(z_ptr, list_ptr, lo, n, BLOCK)
        equal = (logit == least).to(tl.float64)
        earlier = passed + tl.cumsum(equal, 0) - equal
        kept = (logit > least) | ((equal > 0) & (earlier < equals))
        e = tl.where(kept, tl.exp2((logit - most) * inv_t), 0.0).to(tl.float64)
        sums = before + tl.cumsum(e, 0)
        beyond = tl.where((sums > target) & (e > 0), ids, vocab)
        drawn = tl.minimum(drawn, tl.min(beyond, 0))
        last = tl.maximum(last, tl.max(tl.where(e > 0, ids, 0), 0))
        before, passed = tl.max(sums, 0), passed + tl.sum(equal, 0)
    # Rounding may leave nothing beyond the target: then it is the last id that has mass.
    drawn = tl.minimum(drawn, last)
    logit = tl.load(z_ptr + drawn)
    _store(id_ptr + row, logp_ptr + row, drawn, logit, most, total, inv_t)


def draw(
    x_BD: Tensor,
    head_VD: Tensor,
    temperature: float,
    u_B: Tensor,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Ids drawn from softmax(x headᵀ / temperature), and their log-probs there, fp32.

    Args:
        temperature: 0: the first id of the largest logit, with its log-prob at temperature 1.
        u_B: fp64 numbers in (0, 1); not read at temperature 0.
        top_k, top_p: as for `model.generate.generate`.
    """
    x_BD, head_VD, u_B = x_BD.contiguous(), head_VD.contiguous(), u_B.contiguous()
    (n, width), vocab = x_BD.shape, head_VD.shape[0]
    by_k = temperature > 0 and 0 < top_k < vocab
    by_p = temperature > 0 and top_p < 1
    z_BP = triton_head.buffer(n, vocab, x_BD, torch.float32) if by_k or by_p else None
    tiles = triton_head.logits(
        x_BD, head_VD, temperature=temperature or 1.0, whole_rows=False, out_nP=z_BP, centred=False
    )
    n_tiles, inv_t = tiles.largest_nJ.shape[1], LOG2E.value / (temperature or 1.0)
    ids_B = torch.empty(n, dtype=torch.long, device=x_BD.device)
    logp_B = torch.empty(n, dtype=torch.float32, device=x_BD.device)
    drawn = tiles.largest_nJ, tiles.sum_nJ, u_B, ids_B, logp_B, vocab, n_tiles, inv_t
    sizes = dict(TILE=tiles.tile, TILES=triton.next_power_of_2(n_tiles), num_warps=WARPS)
    with torch.cuda.device_of(x_BD):
        if z_BP is None:
            greedy = temperature == 0
            draw_kernel[(n,)](x_BD, head_VD, *drawn, D=width, WIDTH=WIDTH, GREEDY=greedy, **sizes)
        else:
            list_BP = torch.empty_like(z_BP, dtype=torch.int32)
            filtered_kernel[(n,)](
                z_BP, list_BP, *drawn, top_k, top_p,
                BLOCK=max(BLOCK, tiles.tile), TOP_K=by_k, TOP_P=by_p, **sizes,
            )  # fmt: skip
    return ids_B, logp_B
