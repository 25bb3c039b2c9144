"""Causal attention over packed documents.

On a GPU it runs Triton's kernels (kernels/triton_attention.py), elsewhere the reference path below.
The reference gathers documents of nearly equal length into [B, L] blocks and hands them to
PyTorch's fused attention. Right padding needs no mask: under a causal mask no real query sees a
later slot. So nothing is computed across documents, and no [T, T] mask exists.

Legend: T packed tokens, H query heads, K key-value heads, E head dimension, B documents of a block,
L slots of its longest document, P tokens before it, S = P + L keys.
"""

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.cpu import many_small_products

MAX_PADDING = 1 / 4  # a block holds documents at least 3/4 as long as its longest
FEW_SCORES = 1 << 20  # 4 MB, which stay in a CPU's cache


class Block(NamedTuple):
    """Documents that the reference path attends together."""

    index: Tensor  # [B · L]: the packed token in every slot; padding repeats the last token
    documents: int


@functools.lru_cache(maxsize=64)
def causal_mask(
    length: int, past: int, window: int, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """[L, P + L]: 0 where a query sees a key, −∞ elsewhere.

    The keys are `past` earlier tokens and the queries' own; a window, if not 0, hides the farther
    ones.
    """
    slot_L = torch.arange(past, past + length, device=device)
    distance_LS = slot_L.unsqueeze(1) - torch.arange(past + length, device=device)
    unseen_LS = (distance_LS < 0) | (distance_LS >= (window or past + length))
    return torch.zeros_like(unseen_LS, dtype=dtype).masked_fill_(unseen_LS, -torch.inf)


def attend_by_products(q_BHLE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_LS: Tensor) -> Tensor:
    """Attention with its scores in memory: for short documents the fastest on a CPU."""
    length = q_BHLE.shape[2]
    # The query heads of a key-value head are rows of one product.
    scaled_BHLE = q_BHLE * q_BHLE.shape[-1] ** -0.5
    q_BKRE = scaled_BHLE.unflatten(1, (k_BKSE.shape[1], -1)).flatten(2, 3)
    scores_BKGLS = (q_BKRE @ k_BKSE.transpose(2, 3)).unflatten(2, (-1, length))
    p_BKRS = scores_BKGLS.add_(mask_LS).softmax(-1).flatten(2, 3)
    return (p_BKRS @ v_BKSE).unflatten(2, (-1, length)).flatten(1, 2)


def fused_attention(
    q_BHLE: Tensor, k_BKSE: Tensor, v_BKSE: Tensor, mask_LS: Tensor | None
) -> Tensor:
    """PyTorch's fused attention, which keeps no scores; without a mask it is causal."""
    with many_small_products():
        o_BHLE = F.scaled_dot_product_attention(
            q_BHLE,
            k_BKSE,
            v_BKSE,
            attn_mask=mask_LS,
            is_causal=mask_LS is None,
            enable_gqa=q_BHLE.shape[1] != k_BKSE.shape[1],
        )
    if o_BHLE.grad_fn:  # and the same around its backward
        around = contextlib.ExitStack()
        o_BHLE.grad_fn.register_prehook(lambda _: around.enter_context(many_small_products()))
        o_BHLE.grad_fn.register_hook(lambda *_: around.close())
    return o_BHLE


class PackedAttention:
    """The attention of one micro-batch: built once from the documents' lengths, for all layers.

    Args:
        lengths: tokens of each document, in packed order; 0 is allowed.
        device: where the queries will be.
    """

    def __init__(self, lengths: Sequence[int], device: torch.device | str = "cpu"):
        self.lengths = list(lengths)
        self.tokens = sum(self.lengths)
        self.device = torch.device(device)
        self.tiles = None
        if backend.triton_serves(self.device):
            from kernels import triton_attention  # here: not everyone has Triton

            self.tiles = self._to_device(triton_attention.tile_map(self.lengths))
            self.attention: Callable[..., tuple[Tensor, Tensor]] = triton_attention.attention

    def __call__(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, window: int = 0
    ) -> Tensor:
        """softmax(q kᵀ / √E) v within each document, over the keys up to the query's own.

        Args:
            layer: unused; a key-value cache in this place needs it.
            q_THE: queries; k_TKE, v_TKE: keys and values, each shared by H/K query heads.
            window: how many keys a query sees, its own included; 0: all.

        Returns [T, H, E].
        """
        if len(q_THE) != self.tokens:
            raise ValueError(f"{len(q_THE)} tokens; the documents have {self.tokens}")
        if self.tiles is not None and backend.triton_attends(q_THE):
            return self.attention(q_THE, k_TKE, v_TKE, self.tiles, window)[0]
        return self._by_blocks(q_THE, k_TKE, v_TKE, window)

    def _to_device(self, x: Tensor) -> Tensor:
        """A copy that the host does not wait for."""
        if self.device.type == "cpu":
            return x
        return x.pin_memory().to(self.device, non_blocking=True)

    @functools.cached_property
    def blocks(self) -> tuple[list[Block], Tensor]:
        """The reference's plan: its blocks, and which of their slots is each packed token's."""
        length = torch.tensor(self.lengths, dtype=torch.long)
        start = length.cumsum(0) - length
        order = length.argsort(descending=True, stable=True)
        order = order[length[order] > 0]
        slot_T = torch.empty(self.tokens, dtype=torch.long)
        indices, sizes, n_slots = [], [], 0
        while len(order):
            longest = length[order[0]]
            n_documents = int((length[order] >= (1 - MAX_PADDING) * longest).sum())
            block, order = order[:n_documents], order[n_documents:]
            length_B1 = length[block].unsqueeze(1)
            slot_1L = torch.arange(int(longest)).unsqueeze(0)
            index_BL = start[block].unsqueeze(1) + torch.minimum(slot_1L, length_B1 - 1)
            real_BL = slot_1L < length_B1
            slot_T[index_BL[real_BL]] = n_slots + real_BL.flatten().nonzero().squeeze(1)
            n_slots += index_BL.numel()
            indices.append(index_BL.flatten())
            sizes.append(n_documents)
        # one copy to the device
        everything = self._to_device(torch.cat([*indices, slot_T]))
        *parts, slot_T = everything.split([*map(len, indices), self.tokens])
        return [Block(*pair) for pair in zip(parts, sizes, strict=True)], slot_T

    def after_prefix(
        self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, prefix_KPE: list[Tensor], window: int
    ) -> Tensor:
        """As a call, of documents that go on after the same earlier tokens: their keys and values.

        For any device, but not by Triton's kernel.
        """
        return self._by_blocks(q_THE, k_TKE, v_TKE, window, prefix_KPE)

    def _by_blocks(
        self,
        q_THE: Tensor,
        k_TKE: Tensor,
        v_TKE: Tensor,
        window: int,
        prefix_KPE: Sequence[Tensor] = (),
    ) -> Tensor:
        blocks, slot_T = self.blocks
        if not blocks:
            return torch.empty_like(q_THE)
        outputs = []
        for block in blocks:
            q_BHLE, k_BKSE, v_BKSE = (
                x.index_select(0, block.index).unflatten(0, (block.documents, -1)).transpose(1, 2)
                for x in (q_THE, k_TKE, v_TKE)
            )
            if prefix_KPE:
                past_k, past_v = (x.expand(block.documents, -1, -1, -1) for x in prefix_KPE)
                k_BKSE, v_BKSE = torch.cat((past_k, k_BKSE), 2), torch.cat((past_v, v_BKSE), 2)
            length, n_keys = q_BHLE.shape[2], k_BKSE.shape[2]
            at_once = FEW_SCORES // (q_BHLE.shape[1] * length * n_keys)  # documents
            mask = functools.partial(
                causal_mask, length, n_keys - length, window, q_BHLE.dtype, q_BHLE.device
            )
            # in less than fp32 the products would round the scores
            if at_once and not q_BHLE.is_cuda and q_BHLE.dtype.itemsize >= 4:
                parts = zip(*(x.split(at_once) for x in (q_BHLE, k_BKSE, v_BKSE)), strict=True)
                o_BHLE = torch.cat([attend_by_products(*part, mask()) for part in parts])
            else:
                needs_mask = n_keys > length or 0 < window < length
                o_BHLE = fused_attention(q_BHLE, k_BKSE, v_BKSE, mask() if needs_mask else None)
            outputs.append(o_BHLE.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, slot_T)
