"""Triton kernels for causal attention over packed documents, forward and backward.

The algorithm is FlashAttention-2 (Dao, arXiv 2307.08691). A tile is up to TILE tokens of one
document; `tile_map` lists the tiles once per batch, on the host, for all layers. So no program ever
looks at two documents, an empty one has no tile, and a single token has one short tile. The tiles
with the most work come first, which keeps what still runs at the end short.

Keys that all queries of a program see need no mask. Each kernel therefore runs its loop twice: over
the blocks without a mask, and over those on the diagonal, where positions are compared. With a
sliding window the kernels that own queries have a third loop, over the blocks that the window's far
edge cuts, and the one that owns keys masks all its blocks; what lies beyond the window is never
read. Without a window nothing of this is compiled.
The query heads of a key-value head read the same keys; its gradient is their sum, made inside one
program. There are no atomics and no order that depends on timing: the same inputs give the same
bits, and a document's bits do not depend on its neighbours.

TRANSPOSED, on Hopper: a weighted sum like p v is computed as (vᵀ pᵀ)ᵀ. What was computed before (p)
is then the second operand of a tensor core instruction, which is read from shared memory, and never
the first, which Hopper's instruction can read from registers. ptxas before CUDA 13.3 may overwrite
such registers too early (triton-lang/triton#9433, #11781). Scores stay as [queries, keys], so that
the softmax of a row is a sum within a warp.

Legend: T packed tokens, H query heads, K key-value heads, E head dimension, J tiles. Positions
inside kernels count from the start of the document. A name that begins with d is a gradient.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor, library

TILE = 128  # tokens of the map's tiles; a kernel's own tile divides it
LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are powers of 2


@dataclass(frozen=True)
class Config:
    """How a kernel cuts its work.

    rows, keys: queries and keys at a time. warps, stages: of a program and of its loads' pipeline.
    transposed: whether weighted sums are.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    transposed: bool = False


class Configs(NamedTuple):
    """The configuration of each of the three kernels."""

    forward: Config
    queries: Config
    keys: Config


# By compute capability and head dimension. A fixed table, not a tuner at run time: the tile decides
# the order of sums, and the same run must give the same bits.
CONFIGS = {
    9: {
        64: Configs(
            forward=Config(128, 128, 8, 2, transposed=True),
            queries=Config(128, 64, 8, 2, transposed=True),
            keys=Config(64, 64, 4, 2, transposed=True),
        ),
        128: Configs(
            forward=Config(128, 64, 8, 2, transposed=True),
            queries=Config(128, 64, 8, 2, transposed=True),
            keys=Config(32, 128, 8, 2, transposed=True),
        ),
        256: Configs(
            forward=Config(128, 64, 8, 2, transposed=True),
            queries=Config(128, 32, 8, 2, transposed=True),
            keys=Config(32, 64, 8, 2, transposed=True),
        ),
    },
    8: {
        64: Configs(
            forward=Config(128, 64, 8, 3), queries=Config(64, 64, 4, 2), keys=Config(32, 64, 8, 2)
        ),
        128: Configs(
            forward=Config(128, 64, 8, 2), queries=Config(64, 64, 8, 2), keys=Config(64, 64, 8, 2)
        ),
        256: Configs(
            forward=Config(64, 32, 8, 2), queries=Config(32, 32, 4, 2), keys=Config(32, 32, 8, 2)
        ),
    },
}


def configs_for(device: torch.device, head_dim: int) -> Configs:
    """The configurations for a device and a head dimension of up to 256."""
    if device.type != "cuda":  # the interpreter
        config = Config(TILE, TILE, 4, 1)
        return Configs(config, config, config)
    major, _ = torch.cuda.get_device_capability(device)
    # 12.x has the shared memory of 8.9
    table = CONFIGS[9] if major in (9, 10) else CONFIGS[8]
    return table[max(64, triton.next_power_of_2(head_dim))]


def tile_map(lengths: Sequence[int]) -> Tensor:
    """The tiles of a batch, [2, J, 3] int32 on the host.

    A tile is (its document's first token, the document's length, the tile's first position). The
    first list is for kernels that own queries, most keys to see first; the second has the same
    tiles for kernels that own keys, most queries that see them first.
    """
    length = torch.tensor(lengths, dtype=torch.int64)
    tiles = (length + TILE - 1) // TILE
    document = torch.repeat_interleave(torch.arange(len(length)), tiles)
    first = (torch.arange(len(document)) - (tiles.cumsum(0) - tiles)[document]) * TILE
    rows = torch.stack(((length.cumsum(0) - length)[document], length[document], first), 1)
    by_keys = torch.minimum(first + TILE, rows[:, 1]).argsort(descending=True, stable=True)
    by_queries = (rows[:, 1] - first).argsort(descending=True, stable=True)
    return torch.stack((rows[by_keys], rows[by_queries])).int()


# The number of tokens and the address of a map change from batch to batch, windows from layer to
# layer: nothing is compiled again for them.
_kernel = triton.jit(
    do_not_specialize=["tokens", "window"], do_not_specialize_on_alignment=["tiles_ptr"]
)


# --- what the kernels share ----------------------------------------------------------------------


@triton.jit
def _tile(tiles_ptr, HEADS: tl.constexpr, TILE: tl.constexpr, SIZE: tl.constexpr):
    """(head, document's first token, document's length, first position) of this program's SIZE
    tokens. Heads vary fastest."""
    program = tl.program_id(0)
    part = program // HEADS
    tile_ptr = tiles_ptr + part // (TILE // SIZE) * 3
    return (
        program % HEADS,
        tl.load(tile_ptr).to(tl.int64),
        tl.load(tile_ptr + 1),
        tl.load(tile_ptr + 2) + part % (TILE // SIZE) * SIZE,
    )


@triton.jit
def _at(first, SIZE: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr):
    """Offsets [SIZE, E] of one head's tokens from position `first` on; a token is WIDTH wide."""
    return (first + tl.arange(0, SIZE))[:, None] * WIDTH + tl.arange(0, E)[None, :]


@triton.jit
def _load(
    ptr, first, length, SIZE: tl.constexpr, WIDTH: tl.constexpr, E: tl.constexpr, MASK: tl.constexpr
):
    """One head's rows [SIZE, E] from `first` on.

    MASK: zeros beyond the document's end, whatever lies there.
    """
    at = ptr + _at(first, SIZE, WIDTH, E)
    if MASK:
        return tl.load(at, mask=(first + tl.arange(0, SIZE) < length)[:, None], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def _store(
    ptr,
    value,
    first,
    length,
    SIZE: tl.constexpr,
    WIDTH: tl.constexpr,
    E: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    if TRANSPOSED:
        value = value.T
    tl.store(
        ptr + _at(first, SIZE, WIDTH, E),
        value.to(ptr.dtype.element_ty),
        mask=(first + tl.arange(0, SIZE) < length)[:, None],
    )


@triton.jit
def _scores(a, b):
    """a bᵀ."""
    WIDE: tl.constexpr = tl.float64 if a.dtype == tl.float64 else tl.float32
    return tl.dot(a, b.T, input_precision="ieee", out_dtype=WIDE)


@triton.jit
def _weighted(weights, rows, acc, TRANSPOSED: tl.constexpr):
    """acc + weights · rows; `acc` may be transposed."""
    weights = weights.to(rows.dtype)
    if TRANSPOSED:
        return tl.dot(rows.T, weights.T, acc, input_precision="ieee", out_dtype=acc.dtype)
    else:
        return tl.dot(weights, rows, acc, input_precision="ieee", out_dtype=acc.dtype)


@triton.jit
def _zeros(ptr, SIZE: tl.constexpr, E: tl.constexpr, TRANSPOSED: tl.constexpr):
    """The accumulator of `_weighted`."""
    WIDE: tl.constexpr = tl.float64 if ptr.dtype.element_ty == tl.float64 else tl.float32
    return tl.zeros((E, SIZE) if TRANSPOSED else (SIZE, E), WIDE)


@triton.jit
def _per(x, TRANSPOSED: tl.constexpr):
    """A number per token, shaped to be broadcast over the accumulator of `_weighted`."""
    return x[None, :] if TRANSPOSED else x[:, None]


@triton.jit
def _hide(s, query, key, window, WINDOWED: tl.constexpr):
    """The scores s, with −inf where a query does not see the key. query, key: their positions."""
    seen = query >= key
    if WINDOWED:
        seen = seen & (query - window < key)
    return tl.where(seen, s, float("-inf"))


@triton.jit
def _key_bounds(
    first, length, window, ROWS: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr
):
    """Where the three loops over the keys of ROWS queries begin, and where the last one ends: over
    the window's edge, over keys that all queries see, over the diagonal."""
    diagonal, end = first // KEYS * KEYS, tl.minimum(first + ROWS, length)
    begin, clear = 0, 0
    if WINDOWED:
        begin = tl.maximum(first - window + 1, 0) // KEYS * KEYS
        clear = tl.minimum(tl.cdiv(tl.maximum(end - window, 0), KEYS) * KEYS, diagonal)
    return begin, clear, diagonal, end


# --- forward -------------------------------------------------------------------------------------


@_kernel
def forward_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    lse_ptr,
    tiles_ptr,
    tokens,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """o = softmax(q kᵀ / √E) v over the document's keys up to the query's own, and lse_HT: log2 of
    the sum of the exponentials. A program owns ROWS queries of one head."""
    SCALE: tl.constexpr = LOG2E * E**-0.5
    head, start, length, first = _tile(tiles_ptr, H, TILE, ROWS)
    if first < length:
        q_ptr += (start * H + head) * E
        k_ptr += (start * K + head // (H // K)) * E
        v_ptr += (start * K + head // (H // K)) * E
        q = _load(q_ptr, first, length, ROWS, H * E, E, True)
        query = first + tl.arange(0, ROWS)
        acc = _zeros(q_ptr, ROWS, E, TRANSPOSED)
        total = tl.zeros((ROWS,), acc.dtype)
        # With a window a query may see nothing of its first blocks: its maximum stays a number.
        most = total - (1e30 if WINDOWED else float("inf"))
        bounds = _key_bounds(first, length, window, ROWS, KEYS, WINDOWED)
        for PART in tl.static_range(0 if WINDOWED else 1, 3):
            for at in range(bounds[PART], bounds[PART + 1], KEYS):
                k = _load(k_ptr, at, length, KEYS, K * E, E, PART == 2)
                s = _scores(q, k)
                if PART != 1:
                    key = at + tl.arange(0, KEYS)
                    s = _hide(s, query[:, None], key[None, :], window, WINDOWED)
                # the online softmax: what was summed before is scaled to the new maximum
                higher = tl.maximum(most, tl.max(s, 1) * SCALE)
                p = tl.exp2(s * SCALE - higher[:, None])
                rescale = tl.exp2(most - higher)
                total = total * rescale + tl.sum(p, 1)
                v = _load(v_ptr, at, length, KEYS, K * E, E, PART == 2)
                acc = _weighted(p, v, acc * _per(rescale, TRANSPOSED), TRANSPOSED)
                most = higher
        if E > 128:
            head, start, length, first = _tile(tiles_ptr, H, TILE, ROWS)
        o_ptr += (start * H + head) * E
        _store(o_ptr, acc / _per(total, TRANSPOSED), first, length, ROWS, H * E, E, TRANSPOSED)
        lse_ptr += head * tokens + start
        tl.store(lse_ptr + query, most + tl.log2(total), mask=query < length)


# --- backward ------------------------------------------------------------------------------------


@_kernel
def queries_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    o_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dq_ptr,
    tiles_ptr,
    tokens,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """dq = ds k / √E for ds = p (do vᵀ − delta), and delta_HT = Σ o do, which keys_kernel reads.
    A program owns ROWS queries of one head."""
    SCALE: tl.constexpr = LOG2E * E**-0.5
    head, start, length, first = _tile(tiles_ptr, H, TILE, ROWS)
    if first < length:
        own = (start * H + head) * E
        k_ptr += (start * K + head // (H // K)) * E
        v_ptr += (start * K + head // (H // K)) * E
        q = _load(q_ptr + own, first, length, ROWS, H * E, E, True)
        do = _load(do_ptr + own, first, length, ROWS, H * E, E, True)
        acc = _zeros(q_ptr, ROWS, E, TRANSPOSED)
        o = _load(o_ptr + own, first, length, ROWS, H * E, E, True)
        delta = tl.sum(o.to(acc.dtype) * do.to(acc.dtype), 1)
        query = first + tl.arange(0, ROWS)
        delta_ptr += head * tokens + start
        lse_ptr += head * tokens + start
        tl.store(delta_ptr + query, delta, mask=query < length)
        lse = tl.load(lse_ptr + query, mask=query < length, other=0.0)
        bounds = _key_bounds(first, length, window, ROWS, KEYS, WINDOWED)
        for PART in tl.static_range(0 if WINDOWED else 1, 3):
            for at in range(bounds[PART], bounds[PART + 1], KEYS):
                k = _load(k_ptr, at, length, KEYS, K * E, E, PART == 2)
                s = _scores(q, k)
                if PART != 1:
                    key = at + tl.arange(0, KEYS)
                    s = _hide(s, query[:, None], key[None, :], window, WINDOWED)
                p = tl.exp2(s * SCALE - lse[:, None])
                v = _load(v_ptr, at, length, KEYS, K * E, E, PART == 2)
                ds = p * (_scores(do, v) - delta[:, None])
                acc = _weighted(ds, k, acc, TRANSPOSED)
        _store(dq_ptr + own, acc * (E**-0.5), first, length, ROWS, H * E, E, TRANSPOSED)


@_kernel
def keys_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    do_ptr,
    lse_ptr,
    delta_ptr,
    dk_ptr,
    dv_ptr,
    tiles_ptr,
    tokens,
    window,
    H: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    KEYS: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """dk = dsᵀ q / √E and dv = pᵀ do, summed over the query heads of the key-value head. A program
    owns KEYS keys of one key-value head."""
    SCALE: tl.constexpr = LOG2E * E**-0.5
    GROUP: tl.constexpr = H // K
    head, start, length, first = _tile(tiles_ptr, K, TILE, KEYS)
    if first < length:
        own = (start * K + head) * E
        q_ptr += (start * H + head * GROUP) * E
        do_ptr += (start * H + head * GROUP) * E
        lse_ptr += head * GROUP * tokens + start
        delta_ptr += head * GROUP * tokens + start
        k = _load(k_ptr + own, first, length, KEYS, K * E, E, True)
        v = _load(v_ptr + own, first, length, KEYS, K * E, E, True)
        key = first + tl.arange(0, KEYS)
        dk, dv = _zeros(k_ptr, KEYS, E, TRANSPOSED), _zeros(k_ptr, KEYS, E, TRANSPOSED)
        diagonal_end = tl.minimum(first + (KEYS if KEYS > ROWS else ROWS), length)
        end = tl.minimum(first + KEYS - 1 + window, length) if WINDOWED else length
        for DIAGONAL in tl.static_range(1, -1, -1):
            lo, hi = (first, diagonal_end) if DIAGONAL else (diagonal_end, end)
            # One loop over blocks of queries and the heads of the group, so that short documents
            # fill the pipeline too.
            for i in range(0, tl.cdiv(hi - lo, ROWS) * GROUP):
                at, in_group = lo + i // GROUP * ROWS, i % GROUP
                query = at + tl.arange(0, ROWS)
                inside = query < length
                q = _load(q_ptr + in_group * E, at, length, ROWS, H * E, E, True)
                s = _scores(k, q)
                if DIAGONAL:
                    s = _hide(s, query[None, :], key[:, None], window, WINDOWED)
                elif WINDOWED:
                    s = tl.where(query[None, :] < (key + window)[:, None], s, float("-inf"))
                # p = 0 beyond the document's end
                lse = tl.load(lse_ptr + in_group * tokens + query, mask=inside, other=float("inf"))
                p = tl.exp2(s * SCALE - lse[None, :])
                do = _load(do_ptr + in_group * E, at, length, ROWS, H * E, E, True)
                dv = _weighted(p, do, dv, TRANSPOSED)
                delta = tl.load(delta_ptr + in_group * tokens + query, mask=inside, other=0.0)
                ds = p * (_scores(v, do) - delta[None, :])
                dk = _weighted(ds, q, dk, TRANSPOSED)
        if E > 128:
            # read again, or addresses that were needed before the loops keep their registers
            head, start, length, first = _tile(tiles_ptr, K, TILE, KEYS)
            own = (start * K + head) * E
        _store(dk_ptr + own, dk * (E**-0.5), first, length, KEYS, K * E, E, TRANSPOSED)
        _store(dv_ptr + own, dv, first, length, KEYS, K * E, E, TRANSPOSED)


# --- operators -----------------------------------------------------------------------------------


def _launch(
    kernel, config: Config, tiles_J3: Tensor, heads: int, owned: int, *tensors, window: int = 0
) -> None:
    """Start one program per `owned` tokens of a tile and head. tensors: q and k come first."""
    (tokens, H, E), K = tensors[0].shape, tensors[1].shape[1]
    with torch.cuda.device_of(tensors[0]):
        kernel[(len(tiles_J3) * (TILE // owned) * heads,)](
            *tensors, tiles_J3, tokens, min(window, tokens),  # of 32 bits, and so are sums with it
            H=H, K=K, E=E, TILE=TILE, ROWS=config.rows, KEYS=config.keys,
            TRANSPOSED=config.transposed, WINDOWED=window > 0,
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip


@library.custom_op("srlm::attention", mutates_args=())
def attention(
    q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, tiles_2J3: Tensor, window: int = 0
) -> tuple[Tensor, Tensor]:
    """Causal attention within documents, differentiable in q, k and v.

    Args:
        tiles_2J3: the `tile_map` of the documents, on the device; every token belongs to a tile.
        window: how many keys a query sees, its own the last; 0: all up to its own.

    Returns (o_THE, lse_HT), where lse is in bits and has no gradient.
    """
    q, k, v = q_THE.contiguous(), k_TKE.contiguous(), v_TKE.contiguous()
    o, lse = _outputs(q)
    if tiles_2J3.shape[1]:
        config = configs_for(q.device, q.shape[2]).forward
        _launch(
            forward_kernel, config, tiles_2J3[0], q.shape[1], config.rows, q, k, v, o, lse,
            window=window,
        )  # fmt: skip
    return o, lse


@attention.register_fake
def _(q_THE, k_TKE, v_TKE, tiles_2J3, window=0):
    return _outputs(q_THE)


def _outputs(q_THE: Tensor) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(q_THE.dtype, torch.float32)
    o_THE = torch.empty_like(q_THE, memory_format=torch.contiguous_format)
    return o_THE, q_THE.new_empty(q_THE.shape[1], q_THE.shape[0], dtype=wide)


@library.custom_op("srlm::attention_backward", mutates_args=())
def attention_backward(
    q_THE: Tensor,
    k_TKE: Tensor,
    v_TKE: Tensor,
    o_THE: Tensor,
    lse_HT: Tensor,
    do_THE: Tensor,
    tiles_2J3: Tensor,
    window: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of q, k and v for the gradient do_THE of the output."""
    q, k, v, do = (x.contiguous() for x in (q_THE, k_TKE, v_TKE, do_THE))
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    delta = torch.empty_like(lse_HT)
    if tiles_2J3.shape[1]:
        configs, (by_keys, by_queries) = configs_for(q.device, q.shape[2]), tiles_2J3
        _launch(
            queries_kernel, configs.queries, by_keys, q.shape[1], configs.queries.rows,
            q, k, v, o_THE, do, lse_HT, delta, dq, window=window,
        )  # fmt: skip
        _launch(
            keys_kernel, configs.keys, by_queries, k.shape[1], configs.keys.keys,
            q, k, v, do, lse_HT, delta, dk, dv, window=window,
        )  # fmt: skip
    return dq, dk, dv


@attention_backward.register_fake
def _(q_THE, k_TKE, v_TKE, o_THE, lse_HT, do_THE, tiles_2J3, window):
    return tuple(
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q_THE, k_TKE, v_TKE)
    )


def _save(ctx, inputs, output):
    *qkv, tiles_2J3, ctx.window = inputs
    ctx.save_for_backward(*qkv, *output, tiles_2J3)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx, do_THE, _):
    *forward, tiles_2J3 = ctx.saved_tensors
    return *attention_backward(*forward, do_THE, tiles_2J3, ctx.window), None, None


attention.register_autograd(_backward, setup_context=_save)
