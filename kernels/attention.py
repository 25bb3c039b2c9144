"""Causal attention over packed documents.

On a GPU it runs Triton's kernels (kernels/triton_attention.py), elsewhere the reference path below.
The reference gathers documents of nearly equal length into [B, L] blocks and hands them to
PyTorch's fused attention. Right padding needs no mask: under a causal mask no real query sees a
later slot. So nothing is computed across documents, and no [T, T] mask exists.

Legend: T packed tokens, H query heads, K key-value heads, E head dimension, B documents of a block,
L slots of its longest document.
"""

import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend

MAX_PADDING = 1 / 4  # a block holds documents at least 3/4 as long as its longest


class Block(NamedTuple):
    """Documents that the reference path attends together."""

    index: Tensor  # [B · L]: the packed token in every slot; padding repeats the last token
    documents: int


@functools.lru_cache(maxsize=8)
def window_mask(length: int, window: int, device: torch.device) -> Tensor:
    """Which keys [L] each query [L] of a document sees through a window."""
    slot_L = torch.arange(length, device=device)
    distance_LL = slot_L.unsqueeze(1) - slot_L
    return (distance_LL >= 0) & (distance_LL < window)


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

    def _by_blocks(self, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, window: int) -> Tensor:
        blocks, slot_T = self.blocks
        if not blocks:
            return torch.empty_like(q_THE)
        grouped = q_THE.shape[1] != k_TKE.shape[1]
        outputs = []
        for block in blocks:
            q_BHLE, k_BKLE, v_BKLE = (
                x.index_select(0, block.index).unflatten(0, (block.documents, -1)).transpose(1, 2)
                for x in (q_THE, k_TKE, v_TKE)
            )
            seen_LL = None
            if 0 < window < q_BHLE.shape[2]:
                seen_LL = window_mask(q_BHLE.shape[2], window, q_BHLE.device)
            o_BHLE = F.scaled_dot_product_attention(
                q_BHLE,
                k_BKLE,
                v_BKLE,
                attn_mask=seen_LL,
                is_causal=seen_LL is None,
                enable_gqa=grouped,
            )
            outputs.append(o_BHLE.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, slot_T)
