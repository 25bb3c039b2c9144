"""The key-value cache of generation, and the two forms of attention that fill and read it.

Shapes: T packed tokens, B rows, S cache slots, H query heads, K key-value heads, G query heads of
a key-value head, E head dimension.
"""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.attention import PackedAttention
from kernels.decode_attention import decode_attention
from model.transformer import Transformer


class KVCache:
    """Keys and values of all layers and rows, [layers, 2, B, K, S, E].

    The slots of a head lie side by side, which is the faster layout on a CPU.
    """

    def __init__(self, model: Transformer, rows: int, slots: int, max_slots: int) -> None:
        config, weight = model.config, model.head_VD
        shape = [config.num_layers, 2, rows, config.num_kv_heads, slots, config.head_dim]
        if weight.is_cuda:
            # All that may be needed, where it fits: CUDA graphs hold on to the addresses.
            size = math.prod(shape) // slots * max_slots * weight.itemsize
            if size < torch.cuda.mem_get_info(weight.device)[0] // 2:
                shape[4] = max_slots
        self.layers = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self.max_slots = max_slots

    def reserve(self, slots: int) -> bool:
        """Make room for so many slots per row. Returns whether the cache moved in memory."""
        have = self.layers.shape[4]
        if slots <= have:
            return False
        more = min(max(slots - have, have), self.max_slots - have)
        self.layers = F.pad(self.layers, (0, 0, 0, more))
        return True

    def write(self, layer: int, row: Tensor, slot: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store [T, K, E] keys and values of a layer. Returns all of the layer's."""
        kv = self.layers[layer]
        kv[0, row, :, slot], kv[1, row, :, slot] = keys, values
        return kv

    def copy_rows(self, to: list[int], source: list[int], slots: int) -> None:
        """Copy the first slots of the rows `source` to the rows `to`."""
        self.layers[:, :, to, :, :slots] = self.layers[:, :, source, :, :slots]


class PrefillAttention:
    """Attention within packed prompts, whose keys and values go to rows of the cache."""

    def __init__(self, cache: KVCache, rows: list[int], lengths: list[int]) -> None:
        device = cache.layers.device
        self.cache = cache
        self.packed = PackedAttention(lengths, device)
        self.row_T = torch.from_numpy(np.repeat(rows, lengths)).to(device)
        self.position_T = torch.cat([torch.arange(n) for n in lengths]).to(device)

    @torch.compiler.disable
    def __call__(self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor) -> Tensor:
        self.cache.write(layer, self.row_T, self.position_T, k_TKE, v_TKE)
        return self.packed(layer, q_THE, k_TKE, v_TKE)


class DecodeAttention:
    """Attention of one new token per row over its cached past and itself.

    Args:
        position_B: the slot of each row's new token.
        used: how many slots the longest row has, the new one included.
    """

    def __init__(self, cache: KVCache, position_B: Tensor, used: int) -> None:
        device = position_B.device
        self.cache, self.position_B, self.used = cache, position_B, used
        self.row_B = torch.arange(len(position_B), device=device)
        self.by_kernel = by_kernel(cache)
        self.length_B = position_B + 1
        if not self.by_kernel:
            beyond_BS = torch.arange(used, device=device) > position_B.unsqueeze(1)
            mask_BS = torch.zeros(beyond_BS.shape, dtype=cache.layers.dtype, device=device)
            self.mask_B11S = mask_BS.masked_fill_(beyond_BS, -math.inf)[:, None, None]

    @torch.compiler.disable
    def __call__(self, layer: int, q_BHE: Tensor, k_BKE: Tensor, v_BKE: Tensor) -> Tensor:
        kv = self.cache.write(layer, self.row_B, self.position_B, k_BKE, v_BKE)
        if self.by_kernel:
            return decode_attention(q_BHE.unsqueeze(1), kv[0], kv[1], self.length_B).squeeze(1)
        k_BKSE, v_BKSE = kv[:, : len(q_BHE), :, : self.used]
        # The query heads of a key-value head are its queries: keys are not repeated.
        q_BKGE = q_BHE.unflatten(1, (k_BKE.shape[1], -1))
        o_BKGE = F.scaled_dot_product_attention(q_BKGE, k_BKSE, v_BKSE, attn_mask=self.mask_B11S)
        return o_BKGE.flatten(1, 2)


def by_kernel(cache: KVCache) -> bool:
    """Whether `decode_attention` has a kernel for this device, dtype and head dimension."""
    layers = cache.layers
    return backend.triton_serves(layers.device) and backend.triton_attends(layers[0, 0, 0])


def uses_graphs(cache: KVCache) -> bool:
    """Whether steps become CUDA graphs.

    Only with the kernel: without it the shapes change with the longest row.
    """
    return cache.layers.is_cuda and by_kernel(cache)
