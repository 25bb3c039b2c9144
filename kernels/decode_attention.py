"""Attention of a sequence's newest tokens over its key-value cache, and the step that fills it.

The algorithm is Flash-Decoding (Dao et al. 2023).

The context is cut into splits of SPLIT slots, whatever the batch. A program takes one split of one
key-value head of one sequence and up to ROWS of the query heads that share it, so a key is read
once. Each adds one to a counter of its sequence and head; the one that comes last joins the splits
by their log-sum-exp, in the order of the splits: which one that is changes no bit. So a sequence's
result depends on neither the batch nor the size of the cache, nor on timing. The grid covers the
cache's capacity and lengths are read on the device: the launch fits a CUDA graph, and programs
beyond a sequence's end return at once. Slots beyond the end are never read, whatever lies there;
with a sliding window, nor are the splits before it, whose programs return and which the join leaves
out.

Legend: B sequences, L new tokens of each, S cache slots, H query heads, K key-value heads, E head
dimension, J splits, R query rows of a key-value head (L · H/K).
"""

import torch
from torch import Tensor, library

from kernels import backend

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # installed on Linux alone; the reference below serves
    triton = None

SPLIT = 256  # slots of a program: part of the result's last bits, hence not tuned
BLOCK, WARPS, STAGES = 64, 4, 3  # slots at a time
JOIN = 4  # splits that are joined at a time
# Query rows of a program. With 64 or more Hopper's products would read registers, which ptxas
# before CUDA 13.3 may overwrite too early.
ROWS = 16


def decode_reference(
    q_BLHE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, length_B: Tensor, window: int = 0
) -> Tensor:
    """What the kernels compute, in plain PyTorch. See `decode_attention`.

    The softmax runs in at least fp32, and the host never waits for the device.
    """
    B, L, H, E = q_BLHE.shape
    K, S = k_BKSE.shape[1:3]
    wide = torch.promote_types(q_BLHE.dtype, torch.float32)
    slot_S = torch.arange(S, device=q_BLHE.device)
    last_BL = length_B.unsqueeze(1) + torch.arange(L, device=q_BLHE.device) - L
    seen_BLS = slot_S <= last_BL.unsqueeze(2)
    if window:
        seen_BLS &= slot_S > last_BL.unsqueeze(2) - window
    seen_BL1S = seen_BLS.unsqueeze(2)
    used_B1S1 = (slot_S < length_B.unsqueeze(1))[:, None, :, None]
    k_BHSE, v_BHSE = (
        x[:B].to(wide).masked_fill(~used_B1S1, 0).repeat_interleave(H // K, 1)
        for x in (k_BKSE, v_BKSE)
    )
    score_BLHS = torch.einsum("blhe,bhse->blhs", q_BLHE.to(wide), k_BHSE) * E**-0.5
    p_BLHS = score_BLHS.masked_fill(~seen_BL1S, -torch.inf).softmax(-1)
    p_BLHS = p_BLHS.masked_fill(~seen_BL1S, 0)  # a token that sees nothing gets 0, not NaN
    return torch.einsum("blhs,bhse->blhe", p_BLHS, v_BHSE).to(q_BLHE.dtype)


def decode_attention(
    q_BLHE: Tensor,
    k_BKSE: Tensor,
    v_BKSE: Tensor,
    length_B: Tensor,
    window: int = 0,
    arrived: Tensor | None = None,
) -> Tensor:
    """Attention of each sequence's last L tokens over its row of the cache. No gradient.

    Args:
        q_BLHE: queries; query l stands at slot length − L + l and sees the slots up to its own.
        k_BKSE, v_BKSE: the cache, of at least B rows, with a head's slots side by side. It already
            holds the new tokens.
        length_B: used slots of each row, int32 or int64 on the device, at most S. A sequence of
            length 0 gets zeros.
        window: how many slots a query sees, its own the last; 0: all up to its own.
        arrived: B · L · H counters or more, int32 zeros, and zeros again afterwards: who calls
            often keeps them. Calls that run at the same time need their own.

    Returns [B, L, H, E].

    Raises:
        ValueError: the cache has another layout.
    """
    if k_BKSE.stride() != v_BKSE.stride() or k_BKSE.stride()[2:] != (k_BKSE.shape[3], 1):
        raise ValueError(
            "keys and values must share their strides, with a head's slots side by side"
        )
    if (
        triton is not None
        and backend.triton_serves(q_BLHE.device)
        and backend.triton_attends(q_BLHE.flatten(0, 1))
    ):
        if arrived is None:
            arrived = length_B.new_zeros(q_BLHE.shape[:3].numel(), dtype=torch.int32)
        return _decode(q_BLHE, k_BKSE, v_BKSE, length_B, window, arrived)
    return decode_reference(q_BLHE, k_BKSE, v_BKSE, length_B, window)


@library.custom_op("srlm::decode_attention", mutates_args=("arrived",))
def _decode(
    q_BLHE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, length_B: Tensor, window: int, arrived: Tensor
) -> Tensor:
    q = q_BLHE.contiguous()
    B, L, H, E = q.shape
    K, S = k_BKSE.shape[1:3]
    rows, splits = L * (H // K), triton.cdiv(S, SPLIT)
    wide = torch.promote_types(q.dtype, torch.float32)
    part_BKJRE = q.new_empty(B, K, splits, rows, E, dtype=wide)
    lse_BKJR = q.new_empty(B, K, splits, rows, dtype=wide)
    o = torch.empty_like(q)
    if B and S:
        with torch.cuda.device_of(q):
            decode_kernel[(splits, K * triton.cdiv(rows, ROWS), B)](
                q, k_BKSE, v_BKSE, length_B, part_BKJRE, lse_BKJR, arrived, o,
                k_BKSE.stride(0), k_BKSE.stride(1), min(window, S),
                K=K, GROUP=H // K, L=L, E=E, ROWS=ROWS, SPLIT=SPLIT, BLOCK=BLOCK, JOIN=JOIN,
                WINDOWED=window > 0, num_warps=WARPS,
                num_stages=STAGES if E <= 128 else 2,  # what fits into 99 KB of shared memory
            )  # fmt: skip
    return o if S else o.zero_()


@_decode.register_fake
def _(q_BLHE, k_BKSE, v_BKSE, length_B, window, arrived):
    return torch.empty_like(q_BLHE, memory_format=torch.contiguous_format)


def rotate_and_store(
    q_BHE: Tensor,
    k_BKE: Tensor,
    v_BKE: Tensor,
    rope: tuple[Tensor, Tensor],
    kv: Tensor,
    slot_B: Tensor,
) -> Tensor:
    """Rotate one token's queries and keys a sequence, and store keys and values in the cache.

    In one launch, where `model.transformer.rotate` and `KVCache.write` would take ten.

    Args:
        rope: cosines and signed sines [B, 1, E], as `model.transformer.rope_tables` makes them.
        kv: the cache of a layer, [2, at least B, K, S, E]; written to.
        slot_B: where each sequence's token goes, int64.

    Returns the rotated queries.
    """
    B, H, E = q_BHE.shape
    q_BHE, k_BKE, v_BKE = (
        x if x.stride()[1:] == (E, 1) else x.contiguous() for x in (q_BHE, k_BKE, v_BKE)
    )
    rotated_BHE = torch.empty(q_BHE.shape, dtype=q_BHE.dtype, device=q_BHE.device)
    keys, values = kv
    with torch.cuda.device_of(q_BHE):
        store_kernel[(B, H + 2 * k_BKE.shape[1])](
            q_BHE, k_BKE, v_BKE, *rope, slot_B, rotated_BHE, keys, values,
            q_BHE.stride(0), k_BKE.stride(0), v_BKE.stride(0), keys.stride(0), keys.stride(1),
            H=H, K=k_BKE.shape[1], E=E, num_warps=1,
        )  # fmt: skip
    return rotated_BHE


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are powers of 2

    @triton.jit
    def _first_slot(length, window, L: tl.constexpr):
        """The first slot that any of a sequence's L queries sees."""
        return tl.maximum(length - L + 1 - window, 0)

    @triton.jit(do_not_specialize=["window"])  # it differs from layer to layer
    def decode_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        length_ptr,
        part_ptr,
        lse_ptr,
        arrived_ptr,
        o_ptr,
        row_stride,
        head_stride,
        window,
        K: tl.constexpr,
        GROUP: tl.constexpr,
        L: tl.constexpr,
        E: tl.constexpr,
        ROWS: tl.constexpr,
        SPLIT: tl.constexpr,
        BLOCK: tl.constexpr,
        JOIN: tl.constexpr,
        WINDOWED: tl.constexpr,
    ):
        """One split: softmax(q kᵀ / √E) v over its slots, for ROWS query rows of a key-value head.

        It is the result where there is no other split. Else it goes to part_BKJRE, with lse_BKJR,
        log2 of the sum of its exponentials, and the last program to come joins them.
        """
        SCALE: tl.constexpr = LOG2E * E**-0.5
        split, head, sequence = tl.program_id(0), tl.program_id(1) % K, tl.program_id(2)
        counter_ptr = arrived_ptr + sequence * tl.num_programs(1) + tl.program_id(1)
        sequence = sequence.to(tl.int64)
        row, e = tl.program_id(1) // K * ROWS + tl.arange(0, ROWS), tl.arange(0, E)
        real = row < L * GROUP
        # of a query row in [B, L, H, E]; its token is row // GROUP
        at_q = (sequence * L + row // GROUP) * K * GROUP + head * GROUP + row % GROUP
        at_q = at_q[:, None] * E + e[None, :]
        length = tl.load(length_ptr + sequence).to(tl.int32)
        begin, first_split = split * SPLIT, 0
        if WINDOWED:
            first = _first_slot(length, window, L)
            first_split = first // SPLIT
            begin = tl.maximum(begin, first // BLOCK * BLOCK)
        end_split = tl.cdiv(length, SPLIT)
        if (split >= first_split) & (split < end_split):
            WIDE: tl.constexpr = part_ptr.dtype.element_ty
            q = tl.load(q_ptr + at_q, mask=real[:, None], other=0.0)
            last = length - L + row // GROUP  # the last slot that a row sees
            cache = sequence * row_stride + head.to(tl.int64) * head_stride
            acc, total = tl.zeros((ROWS, E), WIDE), tl.zeros((ROWS,), WIDE)
            most = total - 1e30  # not −inf: a row that sees nothing here stays a number
            for lo in range(begin, tl.minimum(split * SPLIT + SPLIT, length), BLOCK):
                slot = lo + tl.arange(0, BLOCK)
                filled = (slot < length)[:, None]
                at = cache + slot[:, None] * E + e[None, :]
                k = tl.load(k_ptr + at, mask=filled, other=0.0)
                s = tl.dot(q, k.T, input_precision="ieee", out_dtype=WIDE)
                seen = slot[None, :] <= last[:, None]
                if WINDOWED:
                    seen = seen & (slot[None, :] > last[:, None] - window)
                s = tl.where(seen, s * SCALE, float("-inf"))
                # the online softmax: what was summed before is scaled to the new maximum
                higher = tl.maximum(most, tl.max(s, 1))
                p, rescale = tl.exp2(s - higher[:, None]), tl.exp2(most - higher)
                total = total * rescale + tl.sum(p, 1)
                v = tl.load(v_ptr + at, mask=filled, other=0.0)
                acc = acc * rescale[:, None]
                acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee", out_dtype=WIDE)
                most = higher
            mean = acc / tl.where(total > 0, total, 1.0)[:, None]
            if end_split - first_split == 1:
                tl.store(o_ptr + at_q, mean.to(o_ptr.dtype.element_ty), mask=real[:, None])
            else:
                # of the row in the split 0
                at_row = (sequence * K + head) * tl.num_programs(0) * (L * GROUP) + row
                at = at_row + split * (L * GROUP)
                tl.store(part_ptr + at[:, None] * E + e[None, :], mean, mask=real[:, None])
                tl.store(lse_ptr + at, most + tl.log2(total), mask=real)  # −inf: nothing is seen
                tl.debug_barrier()  # all threads have written before one of them counts
                if tl.atomic_add(counter_ptr, 1, sem="acq_rel") == end_split - first_split - 1:
                    tl.store(counter_ptr, 0)
                    o = _join(
                        part_ptr, lse_ptr, at_row, real, first_split, end_split, L * GROUP, E, JOIN
                    )
                    tl.store(o_ptr + at_q, o.to(o_ptr.dtype.element_ty), mask=real[:, None])
        elif (split == 0) & (length == 0):
            zero = tl.zeros((ROWS, E), o_ptr.dtype.element_ty)
            tl.store(o_ptr + at_q, zero, mask=real[:, None])

    @triton.jit
    def _join(
        part_ptr,
        lse_ptr,
        at_row,
        real,
        first_split,
        end_split,
        DISTANCE: tl.constexpr,
        E: tl.constexpr,
        JOIN: tl.constexpr,
    ):
        """The mean of some rows' splits, weighted by their sums of exponentials.

        at_row: of the rows in the split 0, the others lie DISTANCE rows apart.
        """
        WIDE: tl.constexpr = part_ptr.dtype.element_ty
        acc, total = tl.zeros((at_row.shape[0], E), WIDE), tl.zeros((at_row.shape[0],), WIDE)
        most = total - 1e30
        for lo in range(first_split, end_split, JOIN):
            split = lo + tl.arange(0, JOIN)
            at = at_row[None, :] + split[:, None] * DISTANCE
            there = (split < end_split)[:, None] & real[None, :]
            # .cg: other multiprocessors wrote it, an own cache may have what was there before
            lse = tl.load(lse_ptr + at, mask=there, other=float("-inf"), cache_modifier=".cg")
            higher = tl.maximum(most, tl.max(lse, 0))
            rescale, weight = tl.exp2(most - higher), tl.exp2(lse - higher[None, :])
            at_part = at[:, :, None] * E + tl.arange(0, E)[None, None, :]
            part = tl.load(
                part_ptr + at_part, mask=there[:, :, None], other=0.0, cache_modifier=".cg"
            )
            acc = acc * rescale[:, None] + tl.sum(part * weight[:, :, None], 0)
            total, most = total * rescale + tl.sum(weight, 0), higher
        return acc / tl.where(total > 0, total, 1.0)[:, None]

    @triton.jit
    def store_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        cos_ptr,
        sin_ptr,
        slot_ptr,
        rotated_ptr,
        keys_ptr,
        values_ptr,
        q_stride,
        k_stride,
        v_stride,
        row_stride,
        head_stride,
        H: tl.constexpr,
        K: tl.constexpr,
        E: tl.constexpr,
    ):
        """One head of one sequence's token: a query (the first H), a key or a value."""
        row, head, e = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, E)
        at_cache = row * row_stride + tl.load(slot_ptr + row) * E + e
        if head >= H + K:
            value = tl.load(v_ptr + row * v_stride + (head - H - K) * E + e)
            tl.store(values_ptr + at_cache + (head - H - K) * head_stride, value)
        else:
            if head < H:
                from_ptr, to_ptr = q_ptr + row * q_stride + head * E, rotated_ptr
                to_ptr += (row * H + head) * E + e
            else:
                from_ptr, to_ptr = k_ptr + row * k_stride + (head - H) * E, keys_ptr
                to_ptr += at_cache + (head - H) * head_stride
            WIDE: tl.constexpr = tl.float64 if q_ptr.dtype.element_ty == tl.float64 else tl.float32
            x = tl.load(from_ptr + e).to(WIDE)
            other = tl.load(from_ptr + (e + E // 2) % E).to(WIDE)
            cos, sin = tl.load(cos_ptr + row * E + e), tl.load(sin_ptr + row * E + e)
            rotated = x * cos.to(WIDE) + other * sin.to(WIDE)
            tl.store(to_ptr, rotated.to(rotated_ptr.dtype.element_ty))
