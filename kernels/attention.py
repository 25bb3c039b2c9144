"""Causal attention over packed documents: Triton's kernels on a GPU (kernels/triton_attention.py), the reference path on any device.

The reference gathers documents into a few [B, L] blocks of nearly equal length and hands them to PyTorch's fused attention. Right
padding needs no mask: under a causal mask no real query sees a later slot. So nothing is computed across documents
and no [T, T] mask exists. Legend: T packed tokens, H query heads, K key-value heads, E head dimension.
"""

import functools

import torch
import torch.nn.functional as F

from kernels import backend

MAX_PADDING = 1 / 4  # a block holds documents at least 3/4 as long as its longest


class PackedAttention:
    """How the T tokens of a micro-batch attend: built once from the documents' lengths, used by every layer."""

    def __init__(self, lengths, device: torch.device | str = "cpu"):
        self.lengths, self.device, self.tokens, self.tiles = (
            list(lengths),
            torch.device(device),
            sum(lengths),
            None,
        )
        if backend.triton_serves(self.device):
            from kernels import (
                triton_attention,
            )  # here, so that nothing needs Triton where it is not used

            self.tiles, self.attention = (
                self._moved(triton_attention.tile_map(self.lengths)),
                triton_attention.attention,
            )

    def __call__(self, layer, q_THE, k_TKE, v_TKE):
        """[T, H, E], [T, K, E], [T, K, E] -> [T, H, E]; scores are scaled by E^-1/2. `layer` is for caches; unused here."""
        if len(q_THE) != self.tokens:
            raise ValueError(f"{len(q_THE)} tokens; the documents have {self.tokens}")
        if self.tiles is not None and backend.triton_attends(q_THE):
            return self.attention(q_THE, k_TKE, v_TKE, self.tiles)[0]
        return self._by_blocks(q_THE, k_TKE, v_TKE)

    def _moved(self, x):
        """One copy that nobody waits for."""
        return x if self.device.type == "cpu" else x.pin_memory().to(self.device, non_blocking=True)

    @functools.cached_property
    def blocks(self):
        """The reference's plan: per block the tokens that it gathers and how many documents it has; last, where each token's output lies."""
        lengths = self.lengths
        starts = torch.tensor([0, *lengths]).cumsum(0).tolist()
        order = sorted((i for i, n in enumerate(lengths) if n), key=lambda i: -lengths[i])
        indices, sizes, back, lo, slots = [], [], torch.empty(starts[-1], dtype=torch.long), 0, 0
        while lo < len(order):
            longest = lengths[order[lo]]
            hi = lo + 1
            while hi < len(order) and lengths[order[hi]] >= (1 - MAX_PADDING) * longest:
                hi += 1
            start_B1 = torch.tensor([starts[i] for i in order[lo:hi]]).unsqueeze(1)
            length_B1 = torch.tensor([lengths[i] for i in order[lo:hi]]).unsqueeze(1)
            slot_1L = torch.arange(longest).unsqueeze(0)
            index_BL = start_B1 + torch.minimum(slot_1L, length_B1 - 1)
            real_BL = slot_1L < length_B1
            back[index_BL[real_BL]] = slots + real_BL.flatten().nonzero().squeeze(1)
            slots += index_BL.numel()
            indices.append(index_BL.flatten())
            sizes.append(hi - lo)
            lo = hi
        *parts, back_T = self._moved(torch.cat([*indices, back])).split(
            [*map(len, indices), len(back)]
        )
        return list(zip(parts, sizes, strict=True)), back_T

    @torch.compiler.disable
    def _by_blocks(self, q_THE, k_TKE, v_TKE):
        outputs, (blocks, back_T) = [], self.blocks
        for index, size in blocks:
            q, k, v = (
                x.index_select(0, index).unflatten(0, (size, -1)).transpose(1, 2)
                for x in (q_THE, k_TKE, v_TKE)
            )
            o_BHLE = F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1]
            )
            outputs.append(o_BHLE.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, back_T) if outputs else torch.empty_like(q_THE)
