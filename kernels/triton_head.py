"""Triton kernels for the vocabulary head: logits with their softmax statistics, and the gradient that overwrites them.

`logits_kernel` multiplies hidden rows by the head, tile by tile. Of a tile it keeps the largest logit and the sum of the exponentials in
fp32, straight from the fp32 accumulator, and stores the logits themselves as fp16 *differences from the tile's largest*: 2 bytes an
element, and 0.1 to 0.3 % of error in a divergence's gradient where raw bf16 logits are off by 9 to 69 % (teacher and student close, at
temperature 1; tests/test_rounding.py repeats every rounding step and knows the other temperatures). `gradient_kernel` turns a row of them into bf16 gradients in the same bytes.
No atomics and no order that depends on timing: the same inputs give the same bits.

Legend: n rows of a chunk, V vocabulary, P padded vocabulary (a multiple of the tile), J tiles, D hidden.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

LOWEST = tl.constexpr(-1e30)  # stands for −inf: differences of two of them stay numbers
LOG2E = tl.constexpr(1.4426950408889634)
FLOOR16 = tl.constexpr(
    -65504.0
)  # the lowest fp16: a logit further below its tile's largest counts as this far


@dataclass(frozen=True)
class Config:
    """How the logits product is cut: tiles of rows × ids × width, warps, pipeline stages, programs an SM holds at once."""

    rows: int
    ids: int
    width: int
    warps: int
    stages: int
    resident: int = 1
    flatten: bool = False  # the next tile's loads begin during this one's end
    tma: bool = False
    halves: bool = False  # see logits_kernel

    @property
    def tile(self):
        """Ids of a tile of the statistics."""
        return self.ids // (1 + self.halves)


# by compute capability; a fixed table, not a tuner at run time: the tile decides the order of sums, and the same run must give the same bits
CONFIGS = {
    9: Config(128, 256, 64, 8, 3, flatten=True, tma=True, halves=True),
    8: Config(128, 128, 64, 8, 3),
}
CACHED_BYTES = 24 << 20  # hidden rows that should stay in the L2 cache
ROW_BLOCK, ROW_WARPS = (
    2048,
    8,
)  # ids per step and warps of the gradient kernel: one 16-byte load a thread, at most 64 registers


# --- logits --------------------------------------------------------------------------------------------------------


@triton.jit
def _keep(
    acc,
    row0,
    j,
    z_ptr,
    max_ptr,
    sum_ptr,
    moment_ptr,
    sum2_ptr,
    target_ptr,
    target_logit_ptr,
    n_rows,
    vocab,
    n_tiles,
    inv_t,
    inv_t2,
    STORE: tl.constexpr,
    MOMENT: tl.constexpr,
    SECOND: tl.constexpr,
    TARGET: tl.constexpr,
):
    """What is kept of a finished tile of logits."""
    ROWS: tl.constexpr = acc.shape[0]
    TILE: tl.constexpr = acc.shape[1]
    rows, ids = row0 + tl.arange(0, ROWS), j * TILE + tl.arange(0, TILE)
    real = (rows < n_rows) & (j < n_tiles)
    if TARGET:  # from the accumulator, before any rounding; exactly one tile holds a row's target
        target = tl.load(target_ptr + rows, mask=real, other=-1).to(tl.int32)
        logit = tl.sum(tl.where(ids[None, :] == target[:, None], acc, 0.0), 1)
        here = (target >= j * TILE) & (target < tl.minimum((j + 1) * TILE, vocab))
        tl.store(target_logit_ptr + rows, logit, mask=real & here)
    acc = tl.where(ids[None, :] < vocab, acc, float("-inf"))
    largest = tl.maximum(tl.max(acc, 1), LOWEST)
    z = tl.maximum(acc - largest[:, None], FLOOR16, propagate_nan=tl.PropagateNan.ALL)
    at = rows.to(tl.int64) * n_tiles + j
    tl.store(max_ptr + at, largest, mask=real)
    if STORE:
        tl.store(
            z_ptr + rows.to(tl.int64)[:, None] * (n_tiles * TILE) + ids[None, :],
            z.to(z_ptr.dtype.element_ty),
            mask=real[:, None],
        )
    if SECOND:
        tl.store(sum2_ptr + at, tl.sum(tl.exp2(z * inv_t2), 1), mask=real)
    e = tl.exp2(z * inv_t)
    tl.store(sum_ptr + at, tl.sum(e, 1), mask=real)
    if MOMENT:
        tl.store(moment_ptr + at, tl.sum(e * z, 1), mask=real)


@triton.jit(
    do_not_specialize=["n_rows", "vocab", "n_tiles", "group"]
)  # rows differ from step to step: compiled once all the same
def logits_kernel(
    x,
    w,
    z_ptr,
    max_ptr,
    sum_ptr,
    moment_ptr,
    sum2_ptr,
    target_ptr,
    target_logit_ptr,
    n_rows,
    vocab,
    n_tiles,
    group,
    inv_t,
    inv_t2,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    IDS: tl.constexpr,
    WIDTH: tl.constexpr,
    HALVES: tl.constexpr,
    STORE: tl.constexpr,
    MOMENT: tl.constexpr,
    SECOND: tl.constexpr,
    TARGET: tl.constexpr,
    TMA: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """x, w: descriptors of [n, D] and [V, D] (TMA: the tensor copy engine), else pointers. z = x wᵀ − the tile's largest, and per row and
    tile: the largest, Σ e^{z/t}, with MOMENT Σ z e^{z/t}, with SECOND Σ e^{z/t2}; with TARGET the logit of each row's target.
    inv_t, inv_t2: log2(e)/t. HALVES: a product's ids are two tiles, finished one after the other, which halves the registers that takes.
    `group` tiles of rows stay in the cache while the head passes by once."""
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
                rows, ids, columns = (
                    row0 + tl.arange(0, ROWS),
                    j * IDS + tl.arange(0, IDS),
                    k + tl.arange(0, WIDTH)[None, :],
                )
                a = tl.load(
                    x + tl.minimum(rows, n_rows - 1).to(tl.int64)[:, None] * D + columns,
                    mask=columns < D,
                    other=0.0,
                )
                b = tl.load(
                    w + tl.minimum(ids, vocab - 1).to(tl.int64)[:, None] * D + columns,
                    mask=columns < D,
                    other=0.0,
                )
            acc = tl.dot(a, b.T, acc, input_precision="ieee")
        if HALVES:
            left, right = acc.reshape((ROWS, 2, IDS // 2)).permute((0, 2, 1)).split()
            _keep(left, row0, 2 * j, z_ptr, max_ptr, sum_ptr, moment_ptr, sum2_ptr, target_ptr, target_logit_ptr,
                  n_rows, vocab, n_tiles, inv_t, inv_t2, STORE, MOMENT, SECOND, TARGET)  # fmt: skip
            _keep(right, row0, 2 * j + 1, z_ptr, max_ptr, sum_ptr, moment_ptr, sum2_ptr, target_ptr, target_logit_ptr,
                  n_rows, vocab, n_tiles, inv_t, inv_t2, STORE, MOMENT, SECOND, TARGET)  # fmt: skip
        else:
            _keep(acc, row0, j, z_ptr, max_ptr, sum_ptr, moment_ptr, sum2_ptr, target_ptr, target_logit_ptr,
                  n_rows, vocab, n_tiles, inv_t, inv_t2, STORE, MOMENT, SECOND, TARGET)  # fmt: skip


class RowStatistics(NamedTuple):
    """What the kernel keeps of every row of a chunk's logits z at a temperature t, [n, 1] each."""

    max_logit_n1: torch.Tensor
    kl_lse_n1: torch.Tensor  # log Σ e^{(z − max_logit)/t} at the divergence's temperature
    lse_n1: torch.Tensor  # the same at the log-prob's temperature
    mean_n1: torch.Tensor  # the mean of (z − max_logit)/t there


@dataclass
class Logits:
    """A chunk's logits as the kernel leaves them. row_n4: the columns of RowStatistics, as the kernels read them."""

    z_nP: Any  # a tensor, or None where the logits were not kept
    largest_nJ: torch.Tensor
    sum_nJ: torch.Tensor  # Σ e^{(z − the tile's largest)/t} at the divergence's temperature
    row_n4: torch.Tensor
    target_logit_n: torch.Tensor | None
    tile: int

    @property
    def row(self):
        return RowStatistics(*self.row_n4.split(1, 1))

    def logp_n(self, temperature):
        """Log-prob of the targets in nats: never above 0, since target and largest logit are the same fp32 numbers."""
        row = self.row
        above_n = self.target_logit_n - row.max_logit_n1.squeeze(1)
        return above_n / temperature - row.lse_n1.squeeze(1)

    def entropy_n(self):
        row = self.row
        return (row.lse_n1 - row.mean_n1).squeeze(1)


def config_for(device):
    if device.type != "cuda":  # the interpreter
        return Config(32, 128, 64, 4, 1)
    major, _ = torch.cuda.get_device_capability(device)
    return CONFIGS[9 if major in (9, 10) else 8]  # 12.x has the shared memory of 8.x


def chunk_rows(vocab, like_ND) -> int:
    """Rows of a chunk: few chunks of equal size, whole tiles. Logits of one fill at most 2.5 GB, or a sixteenth of a smaller GPU's memory:
    each chunk more costs a pass over the head's gradient, and the products want several thousand rows."""
    room = (
        5 << 29
        if not like_ND.is_cuda
        else min(5 << 29, torch.cuda.get_device_properties(like_ND.device).total_memory // 16)
    )
    most = max(256, room // (vocab * like_ND.element_size()) // 256 * 256)
    chunks = triton.cdiv(len(like_ND), most)
    return triton.cdiv(triton.cdiv(len(like_ND), chunks), 256) * 256


def buffer(n_rows, vocab, like):
    """Room for n_rows of logits: 2 bytes an element (fp32 for fp32 inputs), each row a whole number of tiles."""
    tile = config_for(like.device).tile
    dtype = torch.float32 if like.dtype == torch.float32 else torch.float16
    return torch.empty(n_rows, triton.cdiv(vocab, tile) * tile, dtype=dtype, device=like.device)


def logits(
    x_nD, head_VD, *, temperature=1.0, second=None, target_n=None, moment=False, out_nP=None
):
    """Logits of x_nD under all rows of head_VD and their statistics. temperature: of the log-prob, `second` of the divergence where it
    differs; out_nP: where to keep the logits (see `buffer`), or None for the statistics alone."""
    config, device, (n, width), vocab = (
        config_for(x_nD.device),
        x_nD.device,
        x_nD.shape,
        head_VD.shape[0],
    )
    n_tiles = triton.cdiv(vocab, config.tile)
    empty = lambda wanted, *shape: (
        torch.empty(*shape, dtype=torch.float32, device=device) if wanted else None
    )
    largest, sums, moments, sums2 = (
        empty(wanted, n, n_tiles) for wanted in (True, True, moment, second is not None)
    )
    target_logit = (
        None if target_n is None else torch.full((n,), torch.nan, device=device)
    )  # of a target that is no id
    products = triton.cdiv(n, config.rows) * triton.cdiv(vocab, config.ids)
    programs = (
        torch.cuda.get_device_properties(device).multi_processor_count * config.resident
        if device.type == "cuda"
        else products
    )
    x, w = x_nD.contiguous(), head_VD.contiguous()
    group = max(1, CACHED_BYTES // (config.rows * width * x.element_size()))
    if config.tma:
        x, w = (
            TensorDescriptor.from_tensor(m, [size, config.width])
            for m, size in ((x, config.rows), (w, config.ids))
        )
    with torch.cuda.device_of(x_nD):
        logits_kernel[(min(products, programs),)](
            x, w, out_nP, largest, sums, moments, sums2, target_n, target_logit,
            n, vocab, n_tiles, group, LOG2E.value / temperature, LOG2E.value / (second or 1.0),
            D=width, ROWS=config.rows, IDS=config.ids, WIDTH=config.width, HALVES=config.halves,
            STORE=out_nP is not None, MOMENT=moment, SECOND=second is not None, TARGET=target_n is not None, TMA=config.tma, FLATTEN=config.flatten,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
    row_n4 = _rows(largest, sums, moments, sums2, temperature, second)
    return Logits(
        out_nP, largest, sums if second is None else sums2, row_n4, target_logit, config.tile
    )


def _rows(largest_nJ, sum_nJ, moment_nJ, sum2_nJ, temperature, second):
    """The tiles' statistics made one per row, in a fixed order."""
    largest_n1 = largest_nJ.amax(1, keepdim=True)
    below_nJ = largest_nJ - largest_n1
    share_nJ = (below_nJ / temperature).exp_()
    total_n = (sum_nJ * share_nJ).sum(1)
    mean_n = torch.zeros_like(total_n)
    if moment_nJ is not None:
        mean_n = ((moment_nJ + sum_nJ * below_nJ) * share_nJ).sum(1) / total_n / temperature
    log_n = total_n.log()
    second_n = log_n if sum2_nJ is None else (sum2_nJ * (below_nJ / second).exp_()).sum(1).log()
    return torch.stack((largest_n1.squeeze(1), second_n, log_n, mean_n), 1)


# --- gradient ------------------------------------------------------------------------------------------------------


@triton.jit
def _exp(x):
    return tl.exp2(
        x * LOG2E
    )  # one instruction and a product; tl.exp also guards against results below the normal range


@triton.jit
def _series(x):
    """e^x − 1 − x for |x| < 1/4, to full precision."""
    return (
        x
        * x
        * (1 / 2 + x * (1 / 6 + x * (1 / 24 + x * (1 / 120 + x * (1 / 720 + x * (1 / 5040))))))
    )


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
    """log(p_s/m) and log(p_t/m) for m = weight_t · p_t + (1 − weight_t) · p_s."""
    down = -tl.abs(d)
    q = _log1p(tl.where(d > 0, weight_t, 1 - weight_t) * _expm1(down))
    return tl.minimum(d, 0.0) - q, tl.minimum(-d, 0.0) - q


@triton.jit
def _terms(ls, lt, beta, NAME: tl.constexpr):
    """Per id: the summand of the value, the summand of the row sum S, u, and p_s, so that d value / d logit = u − p_s S.

    The formulas, and why they keep their digits where teacher and student are close: kernels/divergences.py.
    """
    ps, pt, d = _exp(ls), _exp(lt), ls - lt
    close = tl.abs(d) < 0.25
    g = tl.where(close, pt * (_series(d) + d), ps - pt)
    if NAME == "forward_kl":
        value = tl.where(close, pt * _series(d), g - pt * d)
        s, u = value, g  # s is unused
    elif NAME == "reverse_kl":
        value = tl.where(close, ps * _series(-d), ps * d - g)
        s, u = value, ps * d
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
    """Logits of some tiles, less the row's largest."""
    inside = j < n_tiles
    z = tl.load(
        z_ptr + j[:, None] * TILE + tl.arange(0, TILE)[None, :], mask=inside[:, None], other=FLOOR16
    ).to(tl.float32)
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
    """One program a row: overwrites its logits with c_kl · d divergence/dz + c_lp · (onehot − p) − c_H · p (log p + H); coefficient_n3.

    A divergence other than the forward KL needs a row sum first: a pass more, which leaves u in the teacher's bytes for the second one.
    "proportional": c_kl · p alone, no teacher. SAME: both temperatures are one. WRITE: else the value alone.
    """
    PAIR: tl.constexpr = (DIVERGENCE != "none") & (DIVERGENCE != "proportional")
    TWICE: tl.constexpr = PAIR & (DIVERGENCE != "forward_kl")
    row = tl.program_id(0).to(tl.int64)
    s_ptr += row * n_tiles * TILE
    grad_ptr += row * n_tiles * TILE
    s_max_ptr += row * n_tiles
    s_max, s_log, c_kl = (
        tl.load(s_row_ptr + row * 4),
        tl.load(s_row_ptr + row * 4 + 1),
        tl.load(coefficient_ptr + row * 3),
    )
    value = tl.zeros((TILES, TILE), tl.float32)
    row_sum = 0.0
    if PAIR:
        t_ptr += row * n_tiles * TILE
        t_max_ptr += row * n_tiles
        t_max, t_log = tl.load(t_row_ptr + row * 4), tl.load(t_row_ptr + row * 4 + 1)
    if TWICE:
        u_ptr += row * n_tiles * TILE
        total = tl.zeros((TILES, TILE), tl.float32)
        for lo in range(0, n_tiles, TILES):
            j = lo + tl.arange(0, TILES)
            ls = _centred(s_ptr, s_max_ptr, j, n_tiles, s_max, TILE) * inv_kl - s_log
            lt = _centred(t_ptr, t_max_ptr, j, n_tiles, t_max, TILE) * inv_kl - t_log
            v, s, u, _ = _terms(ls, lt, beta, DIVERGENCE)
            value += v
            total += s
            if WRITE:
                at = j[:, None] * TILE + tl.arange(0, TILE)[None, :]
                tl.store(u_ptr + at, u.to(u_ptr.dtype.element_ty), mask=(j < n_tiles)[:, None])
        row_sum = tl.sum(tl.sum(total, 1), 0)
        tl.debug_barrier()  # u is read below, by whichever thread
    if LOGPROB:
        lp_log, lp_mean = tl.load(s_row_ptr + row * 4 + 2), tl.load(s_row_ptr + row * 4 + 3)
        c_lp, c_h = tl.load(coefficient_ptr + row * 3 + 1), tl.load(coefficient_ptr + row * 3 + 2)
        target = tl.load(target_ptr + row).to(tl.int32)
    if WRITE | (DIVERGENCE == "forward_kl"):
        for lo in range(0, n_tiles, TILES):
            j = lo + tl.arange(0, TILES)
            at, inside = j[:, None] * TILE + tl.arange(0, TILE)[None, :], (j < n_tiles)[:, None]
            z = _centred(s_ptr, s_max_ptr, j, n_tiles, s_max, TILE)
            grad = tl.zeros((TILES, TILE), tl.float32)
            if DIVERGENCE == "forward_kl":
                lt = _centred(t_ptr, t_max_ptr, j, n_tiles, t_max, TILE) * inv_kl - t_log
                v, _, u, ps = _terms(z * inv_kl - s_log, lt, beta, DIVERGENCE)
                value += v
                grad = c_kl * u
            elif DIVERGENCE != "none":
                ps = _exp(z * inv_kl - s_log)
                if TWICE:
                    grad = c_kl * (
                        tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32) - ps * row_sum
                    )
                else:
                    grad = c_kl * ps
            if LOGPROB:
                x = z * inv_lp
                if SAME:
                    p = ps
                else:
                    p = _exp(x - lp_log)
                factor = c_lp
                if ENTROPY:
                    factor = c_lp + c_h * (x - lp_mean)
                grad += tl.where(at == target, c_lp, 0.0) - p * factor
            if WRITE:
                tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=inside)
    if PAIR:
        tl.store(value_ptr + row, tl.sum(tl.sum(value, 1), 0))


def gradient(
    student,
    teacher=None,
    *,
    divergence="none",
    beta=0.5,
    kl_temperature=1.0,
    lp_temperature=1.0,
    coefficient_n3,
    target_n=None,
    entropy=False,
    dtype,
    write=True,
):
    """Overwrite the student's logits with their gradient; returns (divergence_n or None, grad_nP of `dtype` in the same bytes). The
    teacher's logits are lost too.

    coefficient_n3: of d divergence / d logits, of the target's log-prob and of the entropy, the temperature's 1/t included.
    target_n: where a log-prob loss takes part; an id of −1 is no id.
    """
    n, padded = student.z_nP.shape
    grad_nP = student.z_nP.view(dtype)
    value_n = torch.empty(n, dtype=torch.float32, device=grad_nP.device) if teacher else None
    other = (
        (teacher.z_nP, teacher.z_nP.view(dtype), teacher.largest_nJ, teacher.row_n4)
        if teacher
        else (None,) * 4
    )
    with torch.cuda.device_of(grad_nP):
        gradient_kernel[(n,)](
            student.z_nP, grad_nP, student.largest_nJ, student.row_n4, *other, coefficient_n3, target_n, value_n,
            padded // student.tile, 1 / kl_temperature, 1 / lp_temperature, beta,
            DIVERGENCE=divergence, LOGPROB=target_n is not None, ENTROPY=entropy, SAME=divergence != "none" and kl_temperature == lp_temperature,
            WRITE=write, TILES=max(1, ROW_BLOCK // student.tile), TILE=student.tile, num_warps=ROW_WARPS,
        )  # fmt: skip
    return value_n, grad_nP
