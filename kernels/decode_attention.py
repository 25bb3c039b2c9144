"""Attention of a sequence's newest tokens over its key-value cache.

The algorithm is Flash-Decoding (Dao et al. 2023).

The context is cut into splits of SPLIT slots, whatever the batch. A program takes one split of one
key-value head of one sequence and all query heads that share it, so a key is read once; a second
kernel joins the splits by their log-sum-exp, in their order. So a sequence's result depends on
neither the batch nor the size of the cache. The grid covers the cache's capacity and lengths are
read on the device: the launch fits a CUDA graph, and programs beyond a sequence's end return at
once. Slots beyond the end are never read, whatever lies there; with a sliding window, nor are the
splits before it, whose programs return and which the join leaves out.

Legend: B sequences, L new tokens of each, S cache slots, H query heads, K key-value heads, E head
dimension, J splits, R query rows of a key-value head (L · H/K; padded to 16 or more for the tensor
cores).
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
BLOCK, WARPS, STAGES = 64, 4, 3  # slots that split_kernel takes at a time
JOIN = 16  # splits that join_kernel takes at a time


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
    q_BLHE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, length_B: Tensor, window: int = 0
) -> Tensor:
    """Attention of each sequence's last L tokens over its row of the cache. No gradient.

    Args:
        q_BLHE: queries; query l stands at slot length − L + l and sees the slots up to its own.
        k_BKSE, v_BKSE: the cache, of at least B rows, with a head's slots side by side. It already
            holds the new tokens.
        length_B: used slots of each row, int32 or int64 on the device, at most S. A sequence of
            length 0 gets zeros.
        window: how many slots a query sees, its own the last; 0: all up to its own.

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
        return _decode(q_BLHE, k_BKSE, v_BKSE, length_B, window)
    return decode_reference(q_BLHE, k_BKSE, v_BKSE, length_B, window)


@library.custom_op("srlm::decode_attention", mutates_args=())
def _decode(
    q_BLHE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, length_B: Tensor, window: int
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
        sizes = dict(K=K, GROUP=H // K, L=L, E=E, SPLIT=SPLIT, WINDOWED=window > 0)
        window = min(window, S)
        stages = STAGES if E <= 128 else 2  # what fits into 99 KB of shared memory
        padded_rows = max(16, triton.next_power_of_2(rows))
        with torch.cuda.device_of(q):
            split_kernel[(splits, K, B)](
                q, k_BKSE, v_BKSE, length_B, part_BKJRE, lse_BKJR,
                k_BKSE.stride(0), k_BKSE.stride(1), window,
                ROWS=padded_rows, BLOCK=BLOCK, num_warps=WARPS, num_stages=stages, **sizes,
            )  # fmt: skip
            join_kernel[(rows, K, B)](
                part_BKJRE, lse_BKJR, length_B, o, splits, window, JOIN=JOIN, num_warps=1, **sizes
            )
    return o if S else o.zero_()


@_decode.register_fake
def _(q_BLHE, k_BKSE, v_BKSE, length_B, window):
    return torch.empty_like(q_BLHE, memory_format=torch.contiguous_format)


if triton is not None:
    LOG2E = tl.constexpr(1.4426950408889634)  # exponentials are powers of 2

    @triton.jit
    def _query(
        row, sequence, head, L: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, E: tl.constexpr
    ):
        """Where a query row of a key-value head lies in [B, L, H, E]. Its token is row // GROUP."""
        return ((sequence * L + row // GROUP) * K * GROUP + head * GROUP + row % GROUP) * E

    @triton.jit
    def _first_slot(length, window, L: tl.constexpr):
        """The first slot that any of a sequence's L queries sees."""
        return tl.maximum(length - L + 1 - window, 0)

    @triton.jit(do_not_specialize=["window"])  # it differs from layer to layer
    def split_kernel(
        q_ptr,
        k_ptr,
        v_ptr,
        length_ptr,
        part_ptr,
        lse_ptr,
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
        WINDOWED: tl.constexpr,
    ):
        """One split: part_BKJRE = softmax(q kᵀ / √E) v over its slots, and lse_BKJR: log2 of the
        sum of their exponentials."""
        SCALE: tl.constexpr = LOG2E * E**-0.5
        split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        length = tl.load(length_ptr + sequence).to(tl.int32)
        begin, used = split * SPLIT, split * SPLIT < length
        if WINDOWED:
            first = _first_slot(length, window, L)
            used = used & (begin + SPLIT > first)
            begin = tl.maximum(begin, first // BLOCK * BLOCK)
        if used:
            WIDE: tl.constexpr = part_ptr.dtype.element_ty
            row, e = tl.arange(0, ROWS), tl.arange(0, E)
            real = row < L * GROUP
            at_q = _query(row, sequence, head, L, GROUP, K, E)[:, None] + e[None, :]
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
            out = ((sequence * K + head) * tl.num_programs(0) + split) * (L * GROUP) + row
            at_part = out[:, None] * E + e[None, :]
            mean = acc / tl.where(total > 0, total, 1.0)[:, None]
            tl.store(part_ptr + at_part, mean, mask=real[:, None])
            tl.store(lse_ptr + out, most + tl.log2(total), mask=real)  # −inf: nothing is seen

    @triton.jit(do_not_specialize=["splits", "window"])  # the cache grows
    def join_kernel(
        part_ptr,
        lse_ptr,
        length_ptr,
        o_ptr,
        splits,
        window,
        K: tl.constexpr,
        GROUP: tl.constexpr,
        L: tl.constexpr,
        E: tl.constexpr,
        SPLIT: tl.constexpr,
        JOIN: tl.constexpr,
        WINDOWED: tl.constexpr,
    ):
        """One query row: the mean of its splits, weighted by their sums of exponentials."""
        row, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        length = tl.load(length_ptr + sequence).to(tl.int32)
        e = tl.arange(0, E)
        WIDE: tl.constexpr = part_ptr.dtype.element_ty
        acc, total = tl.zeros((E,), WIDE), tl.zeros((1,), WIDE)
        most = total - 1e30
        first = (sequence * K + head) * splits * (L * GROUP) + row
        begin = 0
        if WINDOWED:
            begin = _first_slot(length, window, L) // SPLIT
        for lo in range(begin // JOIN * JOIN, tl.cdiv(length, SPLIT), JOIN):
            split = lo + tl.arange(0, JOIN)
            at, real = first + split * (L * GROUP), split * SPLIT < length
            if WINDOWED:
                real = real & (split >= begin)
            lse = tl.load(lse_ptr + at, mask=real, other=float("-inf"))
            higher = tl.maximum(most, tl.max(lse, 0))
            rescale, weight = tl.exp2(most - higher), tl.exp2(lse - higher)
            part = tl.load(part_ptr + at[:, None] * E + e[None, :], mask=real[:, None], other=0.0)
            acc = acc * rescale + tl.sum(part * weight[:, None], 0)
            total, most = total * rescale + tl.sum(weight, 0), higher
        o = acc / tl.where(total > 0, total, 1.0)
        at_o = _query(row, sequence, head, L, GROUP, K, E) + e
        tl.store(o_ptr + at_o, o.to(o_ptr.dtype.element_ty))
