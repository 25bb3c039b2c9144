"""Triton kernels for the vocabulary head: logits with their softmax statistics, and gradients.

`logits_kernel` multiplies hidden rows by the head, tile by tile. From the fp32 accumulator of a
tile it takes each row's largest logit and its sum of exponentials, and stores the logits as fp16
*differences from the tile's largest*: 2 bytes an element. At temperature 1, with teacher and
student close, that costs 0.1 to 0.3 % of error in a divergence's gradient, where raw bf16 logits
are off by 9 to 69 % (tests/test_rounding.py repeats every rounding step, at other temperatures
too). `gradient_kernel` overwrites a row of them with its bf16 gradient, in the same bytes.
There are no atomics and no order that depends on timing: the same inputs give the same bits.

Legend: n rows of a chunk, V vocabulary, P padded vocabulary (a multiple of the tile), J tiles,
D hidden.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

LOWEST = tl.constexpr(-1e30)  # stands for −inf: differences of two of them stay numbers
LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are powers of 2
# The lowest fp16: a logit further below its tile's largest counts as this far below.
FLOOR16 = tl.constexpr(-65504.0)


@dataclass(frozen=True)
class Config:
    """How `logits_kernel` cuts its work.

    rows, ids, width: of a product's tile, over hidden rows, vocabulary and D.
    warps, stages: of a program and of its loads' pipeline.
    resident: programs that a multiprocessor holds at once.
    flatten: the loads of the next tile begin while this one ends.
    tma: tiles are loaded by the tensor copy engine.
    halves: a product's ids are two tiles, finished one after the other. That takes half the
        registers.
    """

    rows: int
    ids: int
    width: int
    warps: int
    stages: int
    resident: int = 1
    flatten: bool = False
    tma: bool = False
    halves: bool = False

    @property
    def tile(self) -> int:
        """Ids of a tile of the statistics."""
        return self.ids // (1 + self.halves)


# By compute capability. A fixed table, not a tuner at run time: the tile decides the order of sums,
# and the same run must give the same bits.
CONFIGS = {
    9: Config(128, 256, 64, 8, 3, flatten=True, tma=True, halves=True),
    8: Config(128, 128, 64, 8, 3),
}
# Of tiles alone, in the place of 8: that would spill, and two programs fit.
TILES_ALONE_8 = Config(128, 128, 32, 8, 4, resident=2)
CACHED_BYTES = 24 << 20  # hidden rows that should stay in the L2 cache
# Ids per step and warps of the gradient kernel: a 16-byte load per thread, at most 64 registers.
ROW_BLOCK, ROW_WARPS = 2048, 8
STATISTICS_WARPS = 4


# --- logits --------------------------------------------------------------------------------------


@triton.jit
def _finish_tile(
    acc,
    row0,
    j,
    z_ptr,
    max_ptr,
    sum_ptr,
    moment_ptr,
    kl_sum_ptr,
    n_rows,
    vocab,
    n_tiles,
    inv_t,
    inv_kl,
    STORE: tl.constexpr,
    MOMENT: tl.constexpr,
    KL_SUM: tl.constexpr,
):
    """Stores the statistics of tile j of the logits of some rows, and with STORE the logits."""
    ROWS: tl.constexpr = acc.shape[0]
    TILE: tl.constexpr = acc.shape[1]
    rows, ids = row0 + tl.arange(0, ROWS), j * TILE + tl.arange(0, TILE)
    real = (rows < n_rows) & (j < n_tiles)
    acc = tl.where(ids[None, :] < vocab, acc, float("-inf"))
    largest = tl.maximum(tl.max(acc, 1), LOWEST)
    z = tl.maximum(acc - largest[:, None], FLOOR16, propagate_nan=tl.PropagateNan.ALL)
    at = rows.to(tl.int64) * n_tiles + j
    tl.store(max_ptr + at, largest, mask=real)
    if STORE:
        at_z = rows.to(tl.int64)[:, None] * (n_tiles * TILE) + ids[None, :]
        stored = z if STORE == 1 else acc
        tl.store(z_ptr + at_z, stored.to(z_ptr.dtype.element_ty), mask=real[:, None])
    if KL_SUM:
        tl.store(kl_sum_ptr + at, tl.sum(tl.exp2(z * inv_kl), 1), mask=real)
    e = tl.exp2(z * inv_t)
    tl.store(sum_ptr + at, tl.sum(e, 1), mask=real)
    if MOMENT:
        tl.store(moment_ptr + at, tl.sum(e * z, 1), mask=real)


# The number of rows changes from step to step: nothing is compiled again for it.
@triton.jit(do_not_specialize=["n_rows", "vocab", "n_tiles", "group"])
def logits_kernel(
    x,
    w,
    z_ptr,
    max_ptr,
    sum_ptr,
    moment_ptr,
    kl_sum_ptr,
    n_rows,
    vocab,
    n_tiles,
    group,
    inv_t,
    inv_kl,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALVES: tl.constexpr,
    STORE: tl.constexpr,
    MOMENT: tl.constexpr,
    KL_SUM: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Logits x wᵀ of [n, D] hidden rows and a [V, D] head, with their statistics.

    With z the logits less their tile's largest, it stores per row and tile: the largest (max),
    Σ e^{z/t} (sum), with MOMENT Σ z e^{z/t} (moment), with KL_SUM Σ e^{z/t_kl} (kl_sum); with
    STORE 1 z itself, with 2 the logits.

    x, w: with TMA tensor descriptors, else pointers. inv_t, inv_kl: log2(e)/t and log2(e)/t_kl.
    group: tiles of rows that stay in the cache while the head passes by once.
    """
    row_tiles, products = tl.cdiv(n_rows, ROWS), tl.cdiv(vocab, IDS)
    for tile in tl.range(
        tl.program_id(0), row_tiles * products, tl.num_programs(0), flatten=FLATTEN
    ):
        first = tile // (group * products) * group
        size, inside = tl.minimum(row_tiles - first, group), tile % (group * products)
        row0, j = (first + inside % size) * ROWS, inside // size
        acc = tl.zeros((ROWS, IDS), tl.float32)
        for k in range(0, D, WIDTH):
            if TMA:
                a, b = x.load([row0, k]), w.load([j * IDS, k])
            else:  # rows and ids beyond the end read the last one: their products are never used
                rows = tl.minimum(row0 + tl.arange(0, ROWS), n_rows - 1).to(tl.int64)[:, None]
                ids = tl.minimum(j * IDS + tl.arange(0, IDS), vocab - 1).to(tl.int64)[:, None]
                columns = k + tl.arange(0, WIDTH)[None, :]
                a = tl.load(x + rows * D + columns, mask=columns < D, other=0.0)
                b = tl.load(w + ids * D + columns, mask=columns < D, other=0.0)
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        if HALVES:
            left, right = acc.reshape((ROWS, 2, IDS // 2)).permute((0, 2, 1)).split()
            _finish_tile(
                left, row0, 2 * j, z_ptr, max_ptr, sum_ptr, moment_ptr, kl_sum_ptr,
                n_rows, vocab, n_tiles, inv_t, inv_kl, STORE, MOMENT, KL_SUM,
            )  # fmt: skip
            _finish_tile(
                right, row0, 2 * j + 1, z_ptr, max_ptr, sum_ptr, moment_ptr, kl_sum_ptr,
                n_rows, vocab, n_tiles, inv_t, inv_kl, STORE, MOMENT, KL_SUM,
            )  # fmt: skip
        else:
            _finish_tile(
                acc, row0, j, z_ptr, max_ptr, sum_ptr, moment_ptr, kl_sum_ptr,
                n_rows, vocab, n_tiles, inv_t, inv_kl, STORE, MOMENT, KL_SUM,
            )  # fmt: skip


@triton.jit(do_not_specialize=["vocab", "n_tiles"])
def statistics_kernel(
    max_ptr,
    sum_ptr,
    moment_ptr,
    kl_sum_ptr,
    row_ptr,
    x_ptr,
    w_ptr,
    target_ptr,
    target_logit_ptr,
    vocab,
    n_tiles,
    inv_t,
    inv_kl,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    TILES: tl.constexpr,
    MOMENT: tl.constexpr,
    KL_SUM: tl.constexpr,
    TARGET: tl.constexpr,
):
    """The columns of RowStatistics of one row, from its tiles as `logits_kernel` leaves them.

    With TARGET also its target's logit, a product of its own: to look for it in every tile would
    make the tiles' work after their product a sixth longer.

    inv_t, inv_kl: as there. WIDTH: at least D. TILES: at least n_tiles.
    """
    row, j = tl.program_id(0).to(tl.int64), tl.arange(0, TILES)
    at, real = row * n_tiles + j, j < n_tiles
    largest = tl.load(max_ptr + at, mask=real, other=LOWEST)
    sums = tl.load(sum_ptr + at, mask=real, other=0.0)
    most = tl.max(largest, 0)
    below = largest - most
    scale = tl.exp2(below * inv_t)
    total = tl.sum(sums * scale, 0)
    lse, mean = tl.log(total), 0.0
    kl_lse = lse
    if KL_SUM:
        kl_sums = tl.load(kl_sum_ptr + at, mask=real, other=0.0)
        kl_lse = tl.log(tl.sum(kl_sums * tl.exp2(below * inv_kl), 0))
    if MOMENT:
        moments = tl.load(moment_ptr + at, mask=real, other=0.0)
        mean = tl.sum((moments + sums * below) * scale, 0) / total * (inv_t / LOG2E)
    if TARGET:
        target, column = tl.load(target_ptr + row), tl.arange(0, WIDTH)
        known = (target >= 0) & (target < vocab)
        x = tl.load(x_ptr + row * D + column, mask=column < D, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + target * D + column, mask=(column < D) & known, other=0.0)
        # sums in another order than the tiles': it could be above the largest
        logit = tl.minimum(tl.sum(x * w.to(tl.float32), 0), most, propagate_nan=tl.PropagateNan.ALL)
        tl.store(target_logit_ptr + row, tl.where(known, logit, float("nan")))
    row_ptr += row * 4
    tl.store(row_ptr, most)
    tl.store(row_ptr + 1, kl_lse)
    tl.store(row_ptr + 2, lse)
    tl.store(row_ptr + 3, mean)


class RowStatistics(NamedTuple):
    """Statistics of every row of a chunk's logits z at a temperature t, [n, 1] each.

    `gradient_kernel` reads them as the columns of one tensor, in this order.
    """

    max_logit_n1: Tensor
    kl_lse_n1: Tensor  # log Σ e^{(z − max_logit)/t} at the divergence's temperature
    lse_n1: Tensor  # the same at the log-prob's temperature
    mean_n1: Tensor  # the mean of (z − max_logit)/t there


@dataclass
class Logits:
    """The logits of a chunk as `logits_kernel` leaves them.

    z_nP: logits less their tile's largest; None where they were not stored.
    largest_nJ: the largest logit of each tile.
    sum_nJ: Σ e^{(logit − the tile's largest)/t} at the divergence's temperature.
    row_n4: the columns of RowStatistics, as `gradient_kernel` reads them; None: not asked for.
    target_logit_n: NaN where the target is no id of the vocabulary; None without targets.
    tile: ids of a tile.
    """

    z_nP: Any
    largest_nJ: Tensor
    sum_nJ: Tensor
    row_n4: Any
    target_logit_n: Tensor | None
    tile: int

    @property
    def row(self) -> RowStatistics:
        return RowStatistics(*self.row_n4.split(1, 1))

    def logp_n(self, temperature: float) -> Tensor:
        """Log-probs of the targets in nats.

        They are never above 0: no target's logit is above the largest.
        """
        assert self.target_logit_n is not None
        row = self.row
        above_n = self.target_logit_n - row.max_logit_n1.squeeze(1)
        return above_n / temperature - row.lse_n1.squeeze(1)

    def entropy_n(self) -> Tensor:
        """Entropy of each row in nats, where `logits` was asked for the moment."""
        row = self.row
        return (row.lse_n1 - row.mean_n1).squeeze(1)


def config_for(device: torch.device) -> Config:
    """The configuration of `logits_kernel` for a device."""
    if device.type != "cuda":  # the interpreter
        return Config(32, 128, 64, 4, 1)
    major, _ = torch.cuda.get_device_capability(device)
    return CONFIGS[9 if major in (9, 10) else 8]  # 12.x has the shared memory of 8.x


def chunk_rows(vocab: int, like_ND: Tensor) -> int:
    """Rows of a chunk: few chunks of equal size, in whole tiles.

    The logits of one take at most 2.5 GB, or a sixteenth of a smaller GPU's memory: every chunk
    more costs a pass over the head's gradient, and the products want several thousand rows.
    """
    room = 5 << 29
    if like_ND.is_cuda:
        room = min(room, torch.cuda.get_device_properties(like_ND.device).total_memory // 16)
    most = max(256, room // (vocab * like_ND.element_size()) // 256 * 256)
    chunks = max(1, triton.cdiv(len(like_ND), most))
    return max(1, triton.cdiv(triton.cdiv(len(like_ND), chunks), 256)) * 256


def buffer(n_rows: int, vocab: int, like: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Room for the logits of n_rows, each row a whole number of tiles.

    Without a dtype an element has 2 bytes, for fp32 hidden rows 4.
    """
    tile = config_for(like.device).tile
    dtype = dtype or (torch.float32 if like.dtype == torch.float32 else torch.float16)
    return torch.empty(n_rows, triton.cdiv(vocab, tile) * tile, dtype=dtype, device=like.device)


def logits(
    x_nD: Tensor,
    head_VD: Tensor,
    *,
    temperature: float = 1.0,
    kl_temperature: float | None = None,
    target_n: Tensor | None = None,
    moment: bool = False,
    whole_rows: bool = True,
    out_nP: Tensor | None = None,
    centred: bool = True,
) -> Logits:
    """Logits of x_nD under all rows of head_VD, with their statistics.

    Args:
        temperature: of the log-prob, and of the divergence unless kl_temperature is given.
        kl_temperature: of the divergence where it differs.
        target_n: ids whose logits are wanted.
        moment: whether the entropy is wanted.
        whole_rows: whether the statistics of rows are wanted beside those of tiles.
        out_nP: where to store the logits (see `buffer`); None for the statistics alone.
        centred: whether they are stored less their tile's largest, as `gradient` reads them.
    """
    config, device = config_for(x_nD.device), x_nD.device
    if config == CONFIGS[8] and out_nP is None:
        config = TILES_ALONE_8
    (n, width), vocab = x_nD.shape, head_VD.shape[0]
    n_tiles = triton.cdiv(vocab, config.tile)

    def per_tile(wanted: bool = True):
        return torch.empty(n, n_tiles, device=device) if wanted else None

    largest, sums = per_tile(), per_tile()
    moments, kl_sums = per_tile(moment), per_tile(kl_temperature is not None)
    target_logit = None if target_n is None else torch.empty(n, device=device)
    programs = triton.cdiv(n, config.rows) * triton.cdiv(vocab, config.ids)
    if device.type == "cuda":
        processors = torch.cuda.get_device_properties(device).multi_processor_count
        programs = min(programs, processors * config.resident)
    inv_t, inv_kl = LOG2E.value / temperature, LOG2E.value / (kl_temperature or 1.0)
    x_nD, head_VD = x_nD.contiguous(), head_VD.contiguous()
    group = max(1, CACHED_BYTES // (config.rows * width * x_nD.element_size()))
    matrices = x_nD, head_VD
    if config.tma:
        matrices = (
            TensorDescriptor.from_tensor(x_nD, [config.rows, config.width]),
            TensorDescriptor.from_tensor(head_VD, [config.ids, config.width]),
        )
    store = 0 if out_nP is None else 1 if centred else 2
    with torch.cuda.device_of(x_nD):
        logits_kernel[(programs,)](
            *matrices, out_nP, largest, sums, moments, kl_sums,
            n, vocab, n_tiles, group, inv_t, inv_kl,
            D=width, ROWS=config.rows, IDS=config.ids, WIDTH=config.width, HALVES=config.halves,
            STORE=store, MOMENT=moment, KL_SUM=kl_temperature is not None,
            TMA=config.tma, FLATTEN=config.flatten,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        row_n4 = None
        if whole_rows:
            row_n4 = torch.empty(n, 4, device=device)
            statistics_kernel[(n,)](
                largest, sums, moments, kl_sums, row_n4, x_nD, head_VD, target_n, target_logit,
                vocab, n_tiles, inv_t, inv_kl,
                D=width, WIDTH=triton.next_power_of_2(width),
                TILES=triton.next_power_of_2(n_tiles), MOMENT=moment,
                KL_SUM=kl_sums is not None, TARGET=target_n is not None,
                num_warps=STATISTICS_WARPS,
            )  # fmt: skip
    divergence_sums = sums if kl_sums is None else kl_sums
    return Logits(out_nP, largest, divergence_sums, row_n4, target_logit, config.tile)


# --- gradient ------------------------------------------------------------------------------------


@triton.jit
def _exp(x):
    # a product and an instruction; tl.exp also guards against results below the normal range
    return tl.exp2(x * LOG2E)


@triton.jit
def _series(x):
    """e^x − 1 − x for |x| < 1/4, to full precision."""
    inner = 1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040)))
    return x * x * (1 / 2 + x * (1 / 6 + x * inner))


@triton.jit
def _expm1(x):
    return tl.where(tl.abs(x) < 0.25, _series(x) + x, _exp(x) - 1)


@triton.jit
def _log1p(x):
    """log(1 + x) for −1 < x ≤ 0: 2 artanh(x / (2 + x)) where x is small."""
    s = x / (2 + x)
    q = s * s
    return tl.where(x > -0.25, 2 * s * (1 + q * (1 / 3 + q * (1 / 5 + q * (1 / 7)))), tl.log(1 + x))


@triton.jit
def _log_ratios(d, weight_t):
    """log(p_s/m) and log(p_t/m), for m = weight_t p_t + (1 − weight_t) p_s and d = log(p_s/p_t)."""
    down = -tl.abs(d)
    q = _log1p(tl.where(d > 0, weight_t, 1 - weight_t) * _expm1(down))
    return tl.minimum(d, 0.0) - q, tl.minimum(-d, 0.0) - q


@triton.jit
def _terms(ls, lt, beta, NAME: tl.constexpr):
    """One divergence per id, from the log-probs ls, lt of student and teacher.

    Returns (value, s, u, p_s): the divergence is Σ value, and with S = Σ s its derivative by a
    logit is u − p_s S. The formulas, and why they stay precise where teacher and student are
    close: kernels/divergences.py.
    """
    ps, pt, d = _exp(ls), _exp(lt), ls - lt
    close = tl.abs(d) < 0.25
    g = tl.where(close, pt * (_series(d) + d), ps - pt)  # p_s − p_t
    if NAME == "forward_kl":
        value = tl.where(close, pt * _series(d), g - pt * d)
        s, u = value, g  # S is unused
    elif NAME == "reverse_kl":
        value = tl.where(close, ps * _series(-d), ps * d - g)
        s, u = value, ps * d
    elif NAME == "mixed_kl":
        forward = tl.where(close, pt * _series(d), g - pt * d)
        s = (1 - beta) * tl.where(close, ps * _series(-d), ps * d - g)
        value = beta * forward + s
        u = beta * g + (1 - beta) * ps * d
    elif NAME == "jsd":
        rs, rt = _log_ratios(d, beta)
        value = beta * pt * rt + (1 - beta) * ps * rs
        s, u = (1 - beta) * (ps * rs - beta * g), (1 - beta) * ps * rs
    elif NAME == "skew_forward_kl":
        rs, rt = _log_ratios(d, beta)
        value = tl.where(tl.abs(rt) < 0.25, pt * _series(-rt), (1 - beta) * g + pt * rt)
        u = _exp(rs) * g * (1 - beta) * (1 - beta)
        s = u
    elif NAME == "skew_reverse_kl":
        rs, rt = _log_ratios(d, 1 - beta)
        value = tl.where(tl.abs(rs) < 0.25, ps * _series(-rs), (beta - 1) * g + ps * rs)
        u = ps * (rs - beta * _expm1(rs))
        s = u
    else:
        tl.static_assert(NAME == "total_variation")
        value = 0.5 * tl.abs(g)
        u = tl.where(d > 0, 0.5, tl.where(d < 0, -0.5, 0.0)) * ps
        s = u
    return value, s, u, ps


@triton.jit
def _centred(z_ptr, max_ptr, j, n_tiles, row_max, TILE: tl.constexpr):
    """Logits [len(j), TILE] of the tiles j, less the row's largest."""
    inside = j < n_tiles
    at = j[:, None] * TILE + tl.arange(0, TILE)[None, :]
    z = tl.load(z_ptr + at, mask=inside[:, None], other=FLOOR16).to(tl.float32)
    return z + (tl.load(max_ptr + j, mask=inside, other=LOWEST) - row_max)[:, None]


@triton.jit(do_not_specialize=["n_tiles"])
def gradient_kernel(
    s_ptr,
    grad_ptr,
    s_max_ptr,
    s_row_ptr,
    t_ptr,
    u_ptr,
    t_max_ptr,
    t_row_ptr,
    coefficient_ptr,
    target_ptr,
    value_ptr,
    n_tiles,
    inv_kl,
    inv_lp,
    beta,
    DIVERGENCE: tl.constexpr,
    LOGPROB: tl.constexpr,
    ENTROPY: tl.constexpr,
    SAME: tl.constexpr,
    WRITE: tl.constexpr,
    TILES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One program per row: its divergence, and with WRITE its gradient in place of its logits.

    With p the student's probabilities and H its entropy, the gradient by logit v is

        c_kl (u_v − p_v S) + c_lp (1[v = target] − p_v) − c_h p_v (log p_v + H)

    where u and S are those of `_terms` and c_kl, c_lp, c_h the row's coefficients. A divergence
    other than the forward KL needs S first: a pass more, which leaves u in the teacher's bytes for
    the second one. DIVERGENCE "proportional": c_kl p_v as the first term, without a teacher.
    s_…: the student's; t_…: the teacher's; …_row_ptr: the columns of RowStatistics.
    inv_kl, inv_lp: 1/t of divergence and log-prob. SAME: both are one.
    """
    PAIR: tl.constexpr = (DIVERGENCE != "none") & (DIVERGENCE != "proportional")
    TWICE: tl.constexpr = PAIR & (DIVERGENCE != "forward_kl")
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * n_tiles * TILE
    grad_ptr += row * n_tiles * TILE
    s_max_ptr += row * n_tiles
    s_row_ptr += row * 4
    coefficient_ptr += row * 3
    s_max, s_lse, c_kl = tl.load(s_row_ptr), tl.load(s_row_ptr + 1), tl.load(coefficient_ptr)
    value = tl.zeros((TILES, TILE), tl.float32)
    row_sum = 0.0
    if PAIR:
        t_ptr += row * n_tiles * TILE
        t_max_ptr += row * n_tiles
        t_row_ptr += row * 4
        t_max, t_lse = tl.load(t_row_ptr), tl.load(t_row_ptr + 1)
    if TWICE:
        u_ptr += row * n_tiles * TILE
        total = tl.zeros((TILES, TILE), tl.float32)
        for lo in range(0, n_tiles, TILES):
            j = lo + tl.arange(0, TILES)
            ls = _centred(s_ptr, s_max_ptr, j, n_tiles, s_max, TILE) * inv_kl - s_lse
            lt = _centred(t_ptr, t_max_ptr, j, n_tiles, t_max, TILE) * inv_kl - t_lse
            v, s, u, _ = _terms(ls, lt, beta, DIVERGENCE)
            value += v
            total += s
            if WRITE:
                at = j[:, None] * TILE + tl.arange(0, TILE)[None, :]
                tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=(j < n_tiles)[:, None])
        row_sum = tl.sum(tl.sum(total, 1), 0)
        tl.debug_barrier()  # u is read below, by other threads than wrote it
    if LOGPROB:
        lp_lse, lp_mean = tl.load(s_row_ptr + 2), tl.load(s_row_ptr + 3)
        c_lp, c_h = tl.load(coefficient_ptr + 1), tl.load(coefficient_ptr + 2)
        target = tl.load(target_ptr + row).to(tl.int32)
    if WRITE | (DIVERGENCE == "forward_kl"):
        for lo in range(0, n_tiles, TILES):
            j = lo + tl.arange(0, TILES)
            at, inside = j[:, None] * TILE + tl.arange(0, TILE)[None, :], (j < n_tiles)[:, None]
            z = _centred(s_ptr, s_max_ptr, j, n_tiles, s_max, TILE)
            grad = tl.zeros((TILES, TILE), tl.float32)
            if DIVERGENCE == "forward_kl":
                lt = _centred(t_ptr, t_max_ptr, j, n_tiles, t_max, TILE) * inv_kl - t_lse
                v, _, u, ps = _terms(z * inv_kl - s_lse, lt, beta, DIVERGENCE)
                value += v
                grad = c_kl * u
            elif DIVERGENCE != "none":
                ps = _exp(z * inv_kl - s_lse)
                if TWICE:
                    u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
                    grad = c_kl * (u - ps * row_sum)
                else:
                    grad = c_kl * ps
            if LOGPROB:
                x = z * inv_lp
                if SAME:
                    p = ps
                else:
                    p = _exp(x - lp_lse)
                factor = c_lp
                if ENTROPY:
                    factor = c_lp + c_h * (x - lp_mean)  # log p + H = x − mean
                grad += tl.where(at == target, c_lp, 0.0) - p * factor
            if WRITE:
                tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    if PAIR:
        tl.store(value_ptr + row, tl.sum(tl.sum(value, 1), 0))


def gradient(
    student: Logits,
    teacher: Logits | None = None,
    *,
    divergence: str = "none",
    beta: float = 0.5,
    kl_temperature: float = 1.0,
    lp_temperature: float = 1.0,
    coefficient_n3: Tensor,
    target_n: Tensor | None = None,
    entropy: bool = False,
    dtype: torch.dtype,
    write: bool = True,
) -> tuple[Tensor | None, Tensor]:
    """Overwrite the student's logits with their gradient. The teacher's logits are lost too.

    Args:
        divergence: a name, "none", or "proportional": coefficient · p, without a teacher.
        coefficient_n3: fp32 factors of the gradients of the divergence, of the target's log-prob
            and of the entropy; they include 1/t.
        target_n: where a log-prob loss takes part; an id of −1 is no id.
        entropy: whether the entropy takes part, too.
        dtype: of the gradient, as many bytes as an element of the logits.
        write: whether the gradient is wanted beside the divergence.

    Returns (divergence_n or None without a teacher, grad_nP in the student's bytes).
    """
    n, padded = student.z_nP.shape
    grad_nP = student.z_nP.view(dtype)
    value_n, t_z, u, t_max, t_row = None, None, None, None, None
    if teacher:
        value_n = torch.empty(n, dtype=torch.float32, device=grad_nP.device)
        t_z, u = teacher.z_nP, teacher.z_nP.view(dtype)
        t_max, t_row = teacher.largest_nJ, teacher.row_n4
    same = divergence != "none" and kl_temperature == lp_temperature
    with torch.cuda.device_of(grad_nP):
        gradient_kernel[(n,)](
            student.z_nP, grad_nP, student.largest_nJ, student.row_n4, t_z, u, t_max, t_row,
            coefficient_n3, target_n, value_n,
            padded // student.tile, 1 / kl_temperature, 1 / lp_temperature, beta,
            DIVERGENCE=divergence, LOGPROB=target_n is not None, ENTROPY=entropy, SAME=same,
            WRITE=write, TILES=max(1, ROW_BLOCK // student.tile), TILE=student.tile,
            num_warps=ROW_WARPS,
        )  # fmt: skip
    return value_n, grad_nP
