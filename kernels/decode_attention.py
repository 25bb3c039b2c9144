"""Attention of a sequence's newest tokens over its key-value cache (Flash-Decoding: Dao et al. 2023; grouped queries read a key once).

The context is cut into splits of SPLIT slots, whatever the batch: a program takes one split of one key-value head of one sequence and all
query heads that share it, and a second kernel joins the splits by their log-sum-exp, in their order. So a sequence's result depends on
neither the batch nor the cache's size. The grid covers the cache's capacity and lengths are read on the device: the launch fits
a CUDA graph, and programs beyond a sequence's end return at once. Slots beyond the end are never read, whatever lies there.

Legend: B sequences, L new tokens of each, S cache slots, H query heads, K key-value heads, E head dimension; J splits, R query rows of a
key-value head (L · H/K), padded to 16 or more for the tensor cores.
"""

import torch
from torch import library

from kernels import backend

try:
    import triton
    import triton.language as tl
except ModuleNotFoundError:  # installed on Linux alone; the reference below serves
    triton = None

SPLIT = 256  # slots of a program: part of the result's last bits, hence not tuned
BLOCK, WARPS, STAGES = 64, 4, 3  # slots at a time
JOIN = 16  # splits at a time
LOG2E = 1.4426950408889634


def decode_reference(q_BLHE, k_BKSE, v_BKSE, length_B):
    """What the kernels compute, in plain PyTorch: softmax in at least fp32, no host synchronisation."""
    (B, L, H, E), K, wide = (
        q_BLHE.shape,
        k_BKSE.shape[1],
        torch.promote_types(q_BLHE.dtype, torch.float32),
    )
    slot_S = torch.arange(k_BKSE.shape[2], device=q_BLHE.device)
    last_BL = length_B.unsqueeze(1) + torch.arange(L, device=q_BLHE.device) - L
    seen_BL1S = (slot_S <= last_BL.unsqueeze(2)).unsqueeze(2)
    used_B1S1 = (slot_S < length_B.unsqueeze(1))[:, None, :, None]
    k, v = (
        x[:B].to(wide).masked_fill(~used_B1S1, 0).repeat_interleave(H // K, 1)
        for x in (k_BKSE, v_BKSE)
    )
    score_BLHS = torch.einsum("blhe,bhse->blhs", q_BLHE.to(wide), k) * E**-0.5
    p_BLHS = (
        score_BLHS.masked_fill(~seen_BL1S, -torch.inf).softmax(-1).masked_fill(~seen_BL1S, 0)
    )  # a token that sees nothing gets 0
    return torch.einsum("blhs,bhse->blhe", p_BLHS, v).to(q_BLHE.dtype)


def decode_attention(q_BLHE, k_BKSE, v_BKSE, length_B):
    """[B, L, H, E] queries of each sequence's last L tokens over the first length_B slots of its cache row -> [B, L, H, E].

    The cache (at least B rows; a head's slots side by side) already holds the new tokens: query l stands at slot length − L + l and sees
    the slots up to its own. length_B: int32 or int64 on the device, at most S; a sequence of length 0 gets zeros. No gradient.
    """
    if k_BKSE.stride() != v_BKSE.stride() or k_BKSE.stride()[2:] != (k_BKSE.shape[3], 1):
        raise ValueError(
            "keys and values must share their strides, with a head's slots side by side"
        )
    by_kernel = (
        triton is not None
        and backend.triton_serves(q_BLHE.device)
        and backend.triton_attends(q_BLHE.flatten(0, 1))
    )
    return (_decode if by_kernel else decode_reference)(q_BLHE, k_BKSE, v_BKSE, length_B)


@library.custom_op("srlm::decode_attention", mutates_args=())
def _decode(
    q_BLHE: torch.Tensor, k_BKSE: torch.Tensor, v_BKSE: torch.Tensor, length_B: torch.Tensor
) -> torch.Tensor:
    q = q_BLHE.contiguous()
    (B, L, H, E), (_, K, S, _) = q.shape, k_BKSE.shape
    rows, splits = L * (H // K), triton.cdiv(S, SPLIT)
    padded = max(16, triton.next_power_of_2(rows))
    wide = torch.promote_types(q.dtype, torch.float32)
    part_BKJRE, lse_BKJR = (
        q.new_empty(B, K, splits, rows, E, dtype=wide),
        q.new_empty(B, K, splits, rows, dtype=wide),
    )
    o = torch.empty_like(q)
    if B and S:
        sizes = dict(K=K, GROUP=H // K, L=L, E=E, SPLIT=SPLIT)
        split_kernel[(splits, K, B)](
            q, k_BKSE, v_BKSE, length_B, part_BKJRE, lse_BKJR, k_BKSE.stride(0), k_BKSE.stride(1),
            ROWS=padded, BLOCK=BLOCK, SCALE=LOG2E * E**-0.5, num_warps=WARPS, num_stages=STAGES, **sizes,
        )  # fmt: skip
        join_kernel[(rows, K, B)](
            part_BKJRE, lse_BKJR, length_B, o, splits, JOIN=JOIN, num_warps=1, **sizes
        )
    return o if S else o.zero_()


@_decode.register_fake
def _(q_BLHE, k_BKSE, v_BKSE, length_B):
    return torch.empty_like(q_BLHE, memory_format=torch.contiguous_format)


if triton is not None:

    @triton.jit
    def _query(
        row, sequence, head, L: tl.constexpr, GROUP: tl.constexpr, K: tl.constexpr, E: tl.constexpr
    ):
        """Where query row `row` of a key-value head lies in [B, L, H, E]: its token is row // GROUP."""
        return ((sequence * L + row // GROUP) * K * GROUP + head * GROUP + row % GROUP) * E

    @triton.jit
    def split_kernel(
        q,
        k,
        v,
        lengths,
        part,
        lse,
        row_stride,
        head_stride,
        K: tl.constexpr,
        GROUP: tl.constexpr,
        L: tl.constexpr,
        E: tl.constexpr,
        ROWS: tl.constexpr,
        SPLIT: tl.constexpr,
        BLOCK: tl.constexpr,
        SCALE: tl.constexpr,
    ):
        """One split: part = softmax(q kᵀ / √E) v over its slots, and the log2 of the sum of their exponentials."""
        split, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        length = tl.load(lengths + sequence).to(tl.int32)
        if split * SPLIT < length:
            WIDE: tl.constexpr = part.dtype.element_ty
            row, e = tl.arange(0, ROWS), tl.arange(0, E)
            real = row < L * GROUP
            queries = tl.load(
                q + _query(row, sequence, head, L, GROUP, K, E)[:, None] + e[None, :],
                mask=real[:, None],
                other=0.0,
            )
            last = length - L + row // GROUP  # the last slot that a row sees
            cache = sequence * row_stride + head.to(tl.int64) * head_stride
            acc, total = tl.zeros((ROWS, E), WIDE), tl.zeros((ROWS,), WIDE)
            most = total - 1e30  # not −inf: a row that sees nothing here stays a number
            for lo in range(split * SPLIT, tl.minimum(split * SPLIT + SPLIT, length), BLOCK):
                slot = lo + tl.arange(0, BLOCK)
                at = cache + slot[:, None] * E + e[None, :]
                keys = tl.load(k + at, mask=(slot < length)[:, None], other=0.0)
                s = tl.dot(queries, keys.T, input_precision="ieee", out_dtype=WIDE)
                s = tl.where(slot[None, :] <= last[:, None], s * SCALE, float("-inf"))
                higher = tl.maximum(most, tl.max(s, 1))
                p, share = tl.exp2(s - higher[:, None]), tl.exp2(most - higher)
                total = total * share + tl.sum(p, 1)
                values = tl.load(v + at, mask=(slot < length)[:, None], other=0.0)
                acc = tl.dot(
                    p.to(values.dtype),
                    values,
                    acc * share[:, None],
                    input_precision="ieee",
                    out_dtype=WIDE,
                )
                most = higher
            out = ((sequence * K + head) * tl.num_programs(0) + split) * (L * GROUP) + row
            tl.store(
                part + out[:, None] * E + e[None, :],
                acc / tl.where(total > 0, total, 1.0)[:, None],
                mask=real[:, None],
            )
            tl.store(lse + out, most + tl.log2(total), mask=real)  # −inf where nothing is seen

    @triton.jit(do_not_specialize=["splits"])  # the cache grows
    def join_kernel(
        part,
        lse,
        lengths,
        o,
        splits,
        K: tl.constexpr,
        GROUP: tl.constexpr,
        L: tl.constexpr,
        E: tl.constexpr,
        SPLIT: tl.constexpr,
        JOIN: tl.constexpr,
    ):
        """One query row: its splits, weighted by their share of the exponentials, summed in order."""
        row, head, sequence = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
        length = tl.load(lengths + sequence).to(tl.int32)
        e = tl.arange(0, E)
        acc, total = tl.zeros((E,), part.dtype.element_ty), tl.zeros((1,), part.dtype.element_ty)
        most = total - 1e30
        first = (sequence * K + head) * splits * (L * GROUP) + row
        for lo in range(0, tl.cdiv(length, SPLIT), JOIN):
            split = lo + tl.arange(0, JOIN)
            at, real = first + split * (L * GROUP), split * SPLIT < length
            log = tl.load(lse + at, mask=real, other=float("-inf"))
            higher = tl.maximum(most, tl.max(log, 0))
            share, weight = tl.exp2(most - higher), tl.exp2(log - higher)
            parts = tl.load(part + at[:, None] * E + e[None, :], mask=real[:, None], other=0.0)
            acc = acc * share + tl.sum(parts * weight[:, None], 0)
            total, most = total * share + tl.sum(weight, 0), higher
        tl.store(
            o + _query(row, sequence, head, L, GROUP, K, E) + e,
            (acc / tl.where(total > 0, total, 1.0)).to(o.dtype.element_ty),
        )
