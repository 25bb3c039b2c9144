"""Triton kernels for causal attention over packed documents, forward and backward (FlashAttention-2: Dao, arXiv 2307.08691).

A tile is up to TILE tokens of one document; `tile_map` lists them once per batch, on the host, for all layers: no program ever looks at
two documents, an empty one has no tile and a single token one small one. The tiles with the most work come first, so that what still runs
at the end is short. Keys all of whose queries come later need no mask: each kernel has two loops, and only the one on the diagonal compares
positions.
The query heads of a key-value head read the same keys; its gradient is their sum, made inside one program.
No atomics and no order that depends on timing: the same inputs give the same bits, and a document's bits do not depend on its neighbours.

FLIP: scores are kept as [keys, queries] instead of [queries, keys] (for keys' gradients the other way around), and the products with them as
(Bᵀ Aᵀ)ᵀ. What was computed is then the *second* operand of every tensor core instruction, which passes through shared memory, and never the
first, which Hopper's instruction takes from registers: ptxas before 13.3 may overwrite such registers too early (triton-lang/triton#9433, #11781).

Legend: T packed tokens, H query heads, K key-value heads, E head dimension; J tiles. Inside kernels positions count from the document's start.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import library

TILE = 128  # tokens of the map's tiles; a kernel's own tile divides it
LOG2E = 1.4426950408889634


@dataclass(frozen=True)
class Config:
    """How a kernel cuts its work: queries × keys at a time, warps, pipeline stages, and which operand the scores become."""

    rows: int
    keys: int
    warps: int
    stages: int
    flip: bool = False


# by compute capability and head dimension, for: the output, the queries' gradient, the keys' and values' gradients. A fixed table, not a
# tuner at run time: the tile decides the order of sums, and the same run must give the same bits
CONFIGS = {
    9: {
        64: (Config(64, 64, 4, 3, True), Config(64, 64, 4, 3, True), Config(64, 64, 4, 2, True)),
        128: (Config(64, 64, 4, 2, True), Config(64, 128, 8, 2, True), Config(128, 64, 8, 2, True)),
    },
    8: {
        64: (Config(128, 64, 8, 3), Config(64, 64, 4, 2), Config(32, 64, 8, 2)),
        128: (Config(128, 64, 8, 2), Config(64, 64, 8, 2), Config(64, 64, 8, 2)),
    },
}
# Hopper's table is flipped throughout: no product reads its first operand from registers, which assemblers before CUDA 13.3 are reported to
# get wrong. The other form of each has larger tiles; bench/attention.py checks and times both, and a GPU's word decides
OTHER = {
    64: (Config(128, 128, 8, 2), Config(128, 64, 8, 3), Config(64, 128, 8, 2)),
    128: (Config(128, 64, 8, 3), Config(128, 64, 8, 2), Config(32, 128, 8, 2)),
}


def configs_for(device, size):
    if device.type != "cuda":  # the interpreter
        return (Config(TILE, TILE, 4, 1),) * 3
    major, _ = torch.cuda.get_device_capability(device)
    return CONFIGS[9 if major in (9, 10) else 8][
        64 if size <= 64 else 128
    ]  # 12.x has the shared memory of 8.9


def tile_map(lengths):
    """[2, J, 3] int32 on the host: (document's start, its length, the tile's first position), sorted for kernels that own queries (most
    keys to see first) and for those that own keys (most queries that see them first)."""
    length = torch.tensor(lengths, dtype=torch.int64)
    tiles = (length + TILE - 1) // TILE
    document = torch.repeat_interleave(torch.arange(len(length)), tiles)
    first = (torch.arange(len(document)) - (tiles.cumsum(0) - tiles)[document]) * TILE
    rows = torch.stack(((length.cumsum(0) - length)[document], length[document], first), 1)
    by_keys = torch.minimum(first + TILE, rows[:, 1]).argsort(descending=True, stable=True)
    by_queries = (rows[:, 1] - first).argsort(descending=True, stable=True)
    return torch.stack((rows[by_keys], rows[by_queries])).int()


# the number of tokens and where a map lies change from batch to batch: nothing is compiled again for them
_kernel = triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["tiles"])


# --- what the kernels share ----------------------------------------------------------------------------------------


@triton.jit
def _tile(tiles, HEADS: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr):
    """This program's head, its document's start and length, and the first position of its SIZE tokens. Heads vary fastest."""
    program = tl.program_id(0)
    part = program // HEADS
    tile = tiles + part // (TILE // SIZE) * 3
    return (
        program % HEADS,
        tl.load(tile).to(tl.int64),
        tl.load(tile + 1),
        tl.load(tile + 2) + part % (TILE // SIZE) * SIZE,
    )


@triton.jit
def _at(first, SIZE: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    return (first + tl.arange(0, SIZE))[:, None] * WIDTH + tl.arange(0, E)[None, :]


@triton.jit
def _load(
    x, first, length, SIZE: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr
):
    """[SIZE, E]: one head's rows from `first` on; MASK: zeros where the document has ended, whatever lies there."""
    at = x + _at(first, SIZE, WIDTH, E)
    if MASK:
        return tl.load(at, mask=(first + tl.arange(0, SIZE) < length)[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(
    x,
    value,
    first,
    length,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    FLIP: tl.constexpr,
):
    if FLIP:
        value = value.T
    tl.store(
        x + _at(first, SIZE, WIDTH, E),
        value.to(x.dtype.element_ty),
        mask=(first + tl.arange(0, SIZE) < length)[:, None],
    )


@triton.jit
def _scores(a, b, FLIP: tl.constexpr):
    """a bᵀ, or its transpose."""
    WIDE: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return (
        tl.dot(b, a.T, input_precision="ieee", out_dtype=WIDE)
        if FLIP
        else tl.dot(a, b.T, input_precision="ieee", out_dtype=WIDE)
    )


@triton.jit
def _weighted(weights, rows, acc, FLIP: tl.constexpr):
    """acc + weights · rows; with FLIP all three but `rows` are transposed."""
    weights = weights.to(rows.dtype)
    if FLIP:
        return tl.dot(rows.T, weights, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(weights, rows, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _zeros(x, SIZE: tl.constexpr, E: tl.constexpr, FLIP: tl.constexpr):
    WIDE: tl.constexpr = tl.float64 if x.dtype.element_ty == tl.float64 else tl.float32
    return tl.zeros((E, SIZE) if FLIP else (SIZE, E), WIDE)


@triton.jit
def _per(x, FLIP: tl.constexpr):
    """A number per owned token, beside its scores."""
    return x[None, :] if FLIP else x[:, None]


# --- forward -------------------------------------------------------------------------------------------------------


@triton.jit
def _attend(
    q,
    k,
    v,
    acc,
    most,
    total,
    lo,
    hi,
    first,
    length,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    FLIP: tl.constexpr,
):
    AXIS: tl.constexpr = 0 if FLIP else 1
    for at in range(lo, hi, KEYS):
        s = _scores(q, _load(k, at, length, KEYS, WIDTH, E, DIAGONAL), FLIP)
        if DIAGONAL:
            s = tl.where(
                _per(first + tl.arange(0, ROWS), FLIP) >= _per(at + tl.arange(0, KEYS), not FLIP),
                s,
                float("-inf"),
            )
        higher = tl.maximum(most, tl.max(s, AXIS) * SCALE)
        p = tl.exp2(s * SCALE - _per(higher, FLIP))
        share = tl.exp2(most - higher)
        total = total * share + tl.sum(p, AXIS)
        acc = _weighted(
            p, _load(v, at, length, KEYS, WIDTH, E, DIAGONAL), acc * _per(share, FLIP), FLIP
        )
        most = higher
    return acc, most, total


@_kernel
def forward_kernel(
    q,
    k,
    v,
    o,
    lse,
    tiles,
    tokens,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    FLIP: tl.constexpr,
):
    """o = softmax(q kᵀ / √E) v over the document's keys up to the query's own, and lse_HT: log2 of the sum of the exponentials."""
    head, start, length, first = _tile(tiles, H, TILE, ROWS)
    if first < length:
        q += (start * H + head) * E
        k += (start * K + head // (H // K)) * E
        v += (start * K + head // (H // K)) * E
        rows = _load(q, first, length, ROWS, H * E, E, True)
        acc = _zeros(q, ROWS, E, FLIP)
        total = tl.zeros((ROWS,), acc.dtype)
        most = total - float("inf")
        seen, last = first // KEYS * KEYS, tl.minimum(first + ROWS, length)
        acc, most, total = _attend(
            rows,
            k,
            v,
            acc,
            most,
            total,
            0,
            seen,
            first,
            length,
            K * E,
            E,
            ROWS,
            KEYS,
            SCALE,
            False,
            FLIP,
        )
        acc, most, total = _attend(
            rows,
            k,
            v,
            acc,
            most,
            total,
            seen,
            last,
            first,
            length,
            K * E,
            E,
            ROWS,
            KEYS,
            SCALE,
            True,
            FLIP,
        )
        _store(
            o + (start * H + head) * E, acc / _per(total, FLIP), first, length, ROWS, H * E, E, FLIP
        )
        own = first + tl.arange(0, ROWS)
        tl.store(lse + head * tokens + start + own, most + tl.log2(total), mask=own < length)


# --- backward ------------------------------------------------------------------------------------------------------


@triton.jit
def _pull(
    q,
    do,
    k,
    v,
    lse,
    delta,
    acc,
    lo,
    hi,
    first,
    length,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    FLIP: tl.constexpr,
):
    for at in range(lo, hi, KEYS):
        keys = _load(k, at, length, KEYS, WIDTH, E, DIAGONAL)
        s = _scores(q, keys, FLIP)
        if DIAGONAL:
            s = tl.where(
                _per(first + tl.arange(0, ROWS), FLIP) >= _per(at + tl.arange(0, KEYS), not FLIP),
                s,
                float("-inf"),
            )
        p = tl.exp2(s * SCALE - _per(lse, FLIP))
        dp = _scores(do, _load(v, at, length, KEYS, WIDTH, E, DIAGONAL), FLIP)
        acc = _weighted(p * (dp - _per(delta, FLIP)), keys, acc, FLIP)
    return acc


@_kernel
def queries_kernel(
    q,
    k,
    v,
    o,
    do,
    lse,
    delta,
    dq,
    tiles,
    tokens,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    FLIP: tl.constexpr,
):
    """dq = ds k / √E for ds = p (do vᵀ − delta), and delta_HT = Σ o do, which keys_kernel reads."""
    head, start, length, first = _tile(tiles, H, TILE, ROWS)
    if first < length:
        own = (start * H + head) * E
        k += (start * K + head // (H // K)) * E
        v += (start * K + head // (H // K)) * E
        rows, do_rows = (
            _load(q + own, first, length, ROWS, H * E, E, True),
            _load(do + own, first, length, ROWS, H * E, E, True),
        )
        acc = _zeros(q, ROWS, E, FLIP)
        d = tl.sum(
            _load(o + own, first, length, ROWS, H * E, E, True).to(acc.dtype)
            * do_rows.to(acc.dtype),
            1,
        )
        at = first + tl.arange(0, ROWS)
        tl.store(delta + head * tokens + start + at, d, mask=at < length)
        log = tl.load(lse + head * tokens + start + at, mask=at < length, other=0.0)
        seen, last = first // KEYS * KEYS, tl.minimum(first + ROWS, length)
        acc = _pull(
            rows,
            do_rows,
            k,
            v,
            log,
            d,
            acc,
            0,
            seen,
            first,
            length,
            K * E,
            E,
            ROWS,
            KEYS,
            SCALE,
            False,
            FLIP,
        )
        acc = _pull(
            rows,
            do_rows,
            k,
            v,
            log,
            d,
            acc,
            seen,
            last,
            first,
            length,
            K * E,
            E,
            ROWS,
            KEYS,
            SCALE,
            True,
            FLIP,
        )
        _store(dq + own, acc * (E**-0.5), first, length, ROWS, H * E, E, FLIP)


@triton.jit
def _push(
    q,
    do,
    lse,
    delta,
    k,
    v,
    dk,
    dv,
    lo,
    hi,
    first,
    length,
    tokens,
    GROUP: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    DIAGONAL: tl.constexpr,
    FLIP: tl.constexpr,
):
    # one loop over blocks of queries and the heads of the group, so that short documents fill the pipeline too
    for i in range(0, tl.cdiv(hi - lo, ROWS) * GROUP):
        at, head = lo + i // GROUP * ROWS, i % GROUP
        own = at + tl.arange(0, ROWS)
        rows = _load(q + head * E, at, length, ROWS, WIDTH, E, True)
        s = _scores(k, rows, FLIP)
        if DIAGONAL:
            s = tl.where(
                _per(own, not FLIP) >= _per(first + tl.arange(0, KEYS), FLIP), s, float("-inf")
            )
        log = tl.load(
            lse + head * tokens + own, mask=own < length, other=float("inf")
        )  # beyond the end: p = 0
        p = tl.exp2(s * SCALE - _per(log, not FLIP))
        do_rows = _load(do + head * E, at, length, ROWS, WIDTH, E, True)
        dv = _weighted(p, do_rows, dv, FLIP)
        d = tl.load(delta + head * tokens + own, mask=own < length, other=0.0)
        dk = _weighted(p * (_scores(v, do_rows, FLIP) - _per(d, not FLIP)), rows, dk, FLIP)
    return dk, dv


@_kernel
def keys_kernel(
    q,
    k,
    v,
    do,
    lse,
    delta,
    dk,
    dv,
    tiles,
    tokens,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    SCALE: tl.constexpr,
    FLIP: tl.constexpr,
):
    """dk = dsᵀ q / √E and dv = pᵀ do, summed over the query heads of the key-value head."""
    head, start, length, first = _tile(tiles, K, TILE, KEYS)
    if first < length:
        GROUP: tl.constexpr = H // K
        own = (start * K + head) * E
        q += (start * H + head * GROUP) * E
        do += (start * H + head * GROUP) * E
        lse += head * GROUP * tokens + start
        delta += head * GROUP * tokens + start
        keys, values = (
            _load(k + own, first, length, KEYS, K * E, E, True),
            _load(v + own, first, length, KEYS, K * E, E, True),
        )
        d_keys, d_values = _zeros(k, KEYS, E, FLIP), _zeros(k, KEYS, E, FLIP)
        last = tl.minimum(first + (KEYS if KEYS > ROWS else ROWS), length)
        d_keys, d_values = _push(q, do, lse, delta, keys, values, d_keys, d_values, first, last, first, length, tokens,
                                 GROUP, H * E, E, ROWS, KEYS, SCALE, True, FLIP)  # fmt: skip
        d_keys, d_values = _push(q, do, lse, delta, keys, values, d_keys, d_values, last, length, first, length, tokens,
                                 GROUP, H * E, E, ROWS, KEYS, SCALE, False, FLIP)  # fmt: skip
        _store(dk + own, d_keys * (E**-0.5), first, length, KEYS, K * E, E, FLIP)
        _store(dv + own, d_values, first, length, KEYS, K * E, E, FLIP)


# --- operators -----------------------------------------------------------------------------------------------------


def _launch(kernel, config, tiles_J3, heads, size, q_THE, k_TKE, *tensors):
    """size: tokens that a program owns."""
    (tokens, n_q, width), n_kv = q_THE.shape, k_TKE.shape[1]
    kernel[(len(tiles_J3) * (TILE // size) * heads,)](
        q_THE, k_TKE, *tensors, tiles_J3, tokens,
        H=n_q, K=n_kv, E=width, TILE=TILE, ROWS=config.rows, KEYS=config.keys, SCALE=LOG2E * width**-0.5, FLIP=config.flip,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


@library.custom_op("srlm::attention", mutates_args=())
def attention(
    q_THE: torch.Tensor, k_TKE: torch.Tensor, v_TKE: torch.Tensor, tiles_2J3: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(o_THE, lse_HT in bits): differentiable in q, k and v. Every token belongs to a tile of the map."""
    q, k, v = q_THE.contiguous(), k_TKE.contiguous(), v_TKE.contiguous()
    o, lse = _outputs(q)
    if tiles_2J3.shape[1]:
        config = configs_for(q.device, q.shape[2])[0]
        _launch(forward_kernel, config, tiles_2J3[0], q.shape[1], config.rows, q, k, v, o, lse)
    return o, lse


@attention.register_fake
def _(q_THE, k_TKE, v_TKE, tiles_2J3):
    return _outputs(q_THE)


def _outputs(q_THE):
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    return torch.empty_like(q_THE, memory_format=torch.contiguous_format), q_THE.new_empty(
        q_THE.shape[1], q_THE.shape[0], dtype=wide
    )


@library.custom_op("srlm::attention_backward", mutates_args=())
def attention_backward(
    q_THE: torch.Tensor,
    k_TKE: torch.Tensor,
    v_TKE: torch.Tensor,
    o_THE: torch.Tensor,
    lse_HT: torch.Tensor,
    do_THE: torch.Tensor,
    tiles_2J3: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    q, k, v, do = (x.contiguous() for x in (q_THE, k_TKE, v_TKE, do_THE))
    grads, delta = [torch.empty_like(x) for x in (q, k, v)], torch.empty_like(lse_HT)
    if tiles_2J3.shape[1]:
        _, config, keys_config = configs_for(q.device, q.shape[2])
        _launch(
            queries_kernel,
            config,
            tiles_2J3[0],
            q.shape[1],
            config.rows,
            q,
            k,
            v,
            o_THE,
            do,
            lse_HT,
            delta,
            grads[0],
        )
        _launch(
            keys_kernel,
            keys_config,
            tiles_2J3[1],
            k.shape[1],
            keys_config.keys,
            q,
            k,
            v,
            do,
            lse_HT,
            delta,
            *grads[1:],
        )
    return tuple(grads)


@attention_backward.register_fake
def _(q_THE, k_TKE, v_TKE, o_THE, lse_HT, do_THE, tiles_2J3):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THE, k_TKE, v_TKE)
    )


def _save(ctx, inputs, output):
    *qkv, tiles_2J3 = inputs
    ctx.save_for_backward(*qkv, *output, tiles_2J3)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do_THE, _):
    *forward, tiles_2J3 = ctx.saved_tensors
    return *attention_backward(*forward, do_THE, tiles_2J3), None


attention.register_autograd(_backward, setup_context=_save)
