"""The key-value cache of generation, and the two forms of attention that fill and read it.

Shapes: T packed tokens, B rows, S cache slots, H query heads, K key-value heads, G query heads of
a key-value head, E head dimension.
"""

import functools
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import backend
from kernels.attention import PackedAttention
from kernels.cpu import many_small_products
from kernels.decode_attention import decode_attention, rotate_and_store
from model.transformer import Rope

CAPACITY = 256  # a cache has at most a multiple of this many slots: calls of `generate` are alike


class KVCache:
    """Keys and values: `layers` holds a tensor [2, B, K, S, E] for each layer.

    The slots of a head lie side by side, which is the faster layout on a CPU.
    """

    def __init__(self, model: Any, rows: int, slots: int, max_slots: int) -> None:
        config, weight = model.config, model.head_VD
        shape = [2, rows, config.num_kv_heads, slots, config.head_dim]
        if weight.is_cuda:
            # All that may be needed, where it fits: CUDA graphs hold on to the addresses.
            size = config.num_layers * math.prod(shape) // slots * max_slots * weight.itemsize
            if size < free_bytes(weight.device) // 2:
                shape[3] = max_slots
        self.layers = [weight.new_zeros(shape) for _ in range(config.num_layers)]
        self.max_slots = max_slots
        # Counters of `decode_attention`; layers run one after the other.
        self.arrived = weight.new_zeros(rows * config.num_heads, dtype=torch.int32)

    @property
    def rows(self) -> int:
        return self.layers[0].shape[1]

    @property
    def slots(self) -> int:
        return self.layers[0].shape[3]

    @property
    def device(self) -> torch.device:
        return self.layers[0].device

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.layers)

    def shape_for(self, slots: int, rows: int) -> tuple[int, int]:
        """How many slots and rows a cache may have that needs so many: rows as memory allows.

        The slots are doubled while all rows fit.
        """
        slot_bytes = self.nbytes // (self.rows * self.slots)
        budget = (self.nbytes + 0.9 * free_bytes(self.device)) / slot_bytes
        doubled = min(max(slots, 2 * self.slots), self.max_slots)
        if rows * doubled <= budget:
            return doubled, rows
        needed = min(-(-slots // CAPACITY) * CAPACITY, self.max_slots)
        return needed, max(1, min(rows, int(budget / needed)))

    def grow(self, slots: int, rows: int) -> None:
        """Have so many slots from now on, and only the first `rows` rows.

        Layer by layer, so that there are never two caches.
        """
        more = slots - self.slots
        for layer in range(len(self.layers)):
            self.layers[layer] = F.pad(self.layers[layer][:, :rows], (0, 0, 0, more))

    def places(self, row_T: Tensor, slot_T: Tensor) -> Tensor:
        """Where `write` stores these tokens, heads side by side: indices [T * K] of vectors."""
        heads = self.layers[0].shape[2]
        head_K = torch.arange(heads, device=row_T.device)
        return ((row_T.unsqueeze(1) * heads + head_K) * self.slots + slot_T.unsqueeze(1)).flatten()

    def write(self, layer: int, places: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Store [T, K, E] keys and values of a layer. Returns all of the layer's."""
        kv = self.layers[layer]
        for whole, new in zip(kv, (keys, values), strict=True):
            whole.view(-1, whole.shape[-1]).index_copy_(0, places, new.flatten(0, 1))
        return kv

    def copy_rows(self, to: list[int], source: list[int], slots: int) -> None:
        """Copy the first slots of the rows `source` to the rows `to`."""
        to_B, source_B = torch.tensor([to, source], device=self.device)
        for layer in self.layers:
            layer[:, to_B, :, :slots] = layer[:, source_B, :, :slots]

    def clear(self) -> None:
        """Begin anew. Numbers that are masked are multiplied by 0: none may be infinite."""
        if not by_kernel(self):
            for layer in self.layers:
                layer.zero_()


def free_bytes(device: torch.device) -> float:
    """What can be allocated: memory that is free, or kept by PyTorch's allocator for reuse.

    Infinite on a CPU.
    """
    if device.type == "cpu":
        return math.inf
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


class PrefillAttention:
    """Attention within packed prompts, whose keys and values go to rows of the cache.

    Args:
        rows, lengths: where each prompt goes, and how many tokens of it are given.
        past: how many tokens before them are in the cache already, the same ones in all rows.
    """

    def __init__(self, cache: KVCache, rows: list[int], lengths: list[int], past: int = 0) -> None:
        device = cache.device
        self.cache, self.first_row, self.past = cache, rows[0], past
        self.packed = PackedAttention(lengths, device)
        self.position_T = torch.cat([torch.arange(past, past + n) for n in lengths]).to(device)
        row_T = torch.from_numpy(np.repeat(rows, lengths)).to(device)
        self.places = cache.places(row_T, self.position_T)

    def __call__(
        self, layer: int, q_THE: Tensor, k_TKE: Tensor, v_TKE: Tensor, window: int
    ) -> Tensor:
        kv = self.cache.write(layer, self.places, k_TKE, v_TKE)
        if not self.past:
            return self.packed(layer, q_THE, k_TKE, v_TKE, window)
        prefix_KPE = list(kv[:, self.first_row, :, : self.past])
        return self.packed.after_prefix(q_THE, k_TKE, v_TKE, prefix_KPE, window)


class DecodeAttention:
    """Attention of one new token per row over its cached past and itself.

    Args:
        position_B: the slot of each row's new token.
        used: at least as many slots as the longest row has, the new one included.
    """

    def __init__(self, cache: KVCache, position_B: Tensor, used: int) -> None:
        self.cache, self.position_B, self.used = cache, position_B, used
        self.by_kernel = by_kernel(cache)
        # The kernel that stores keys rotates them, and the queries: see `model.transformer.Attend`.
        self.rotates = self.by_kernel and backend.triton_serves(cache.device)
        self.length_B = position_B + 1
        self.masks: dict[int, Tensor] = {}  # by window

    @functools.cached_property
    def places(self) -> Tensor:
        row_B = torch.arange(len(self.position_B), device=self.cache.device)
        return self.cache.places(row_B, self.position_B)

    def mask(self, window: int) -> Tensor:
        """0 where a row's new token sees a slot, else −∞: [B, 1, 1, S]."""
        if window not in self.masks:
            past_BS = self.position_B.unsqueeze(1) - torch.arange(
                self.used, device=self.position_B.device
            )
            unseen_BS = past_BS < 0
            if window:
                unseen_BS |= past_BS >= window
            mask_BS = past_BS.new_zeros(past_BS.shape, dtype=self.cache.layers[0].dtype)
            self.masks[window] = mask_BS.masked_fill_(unseen_BS, -math.inf)[:, None, None]
        return self.masks[window]

    def __call__(
        self,
        layer: int,
        q_BHE: Tensor,
        k_BKE: Tensor,
        v_BKE: Tensor,
        window: int,
        rope: Rope | None = None,
    ) -> Tensor:
        """rope: where this `rotates`."""
        kv = self.cache.layers[layer]
        if rope:
            q_BHE = rotate_and_store(q_BHE, k_BKE, v_BKE, rope, kv, self.position_B)
        else:
            self.cache.write(layer, self.places, k_BKE, v_BKE)
        k_BKSE, v_BKSE = kv[:, : len(q_BHE), :, : self.used]
        if self.by_kernel:
            of_cache = k_BKSE, v_BKSE, self.length_B, window, self.cache.arrived
            return decode_attention(q_BHE.unsqueeze(1), *of_cache).squeeze(1)
        # The query heads of a key-value head are its queries: keys are not repeated.
        q_BKGE = q_BHE.unflatten(1, (k_BKE.shape[1], -1))
        mask = self.mask(window)
        if kv.dtype.itemsize < 4:  # its products would round the scores
            o_BKGE = F.scaled_dot_product_attention(q_BKGE, k_BKSE, v_BKSE, attn_mask=mask)
        else:  # for one query, PyTorch's kernel takes up to twice as long on two cores
            with many_small_products():
                scores_BKSG = k_BKSE @ (q_BKGE * q_BKGE.shape[-1] ** -0.5).transpose(2, 3)
                o_BKGE = (scores_BKSG.transpose(2, 3) + mask).softmax(-1) @ v_BKSE
        return o_BKGE.flatten(1, 2)


def by_kernel(cache: KVCache) -> bool:
    """Whether `decode_attention` has a kernel for this device, dtype and head dimension."""
    layer = cache.layers[0]
    return backend.triton_serves(layer.device) and backend.triton_attends(layer[0, 0])


def uses_graphs(cache: KVCache) -> bool:
    """Whether steps become CUDA graphs.

    Only with the kernel: without it the shapes change with the longest row.
    """
    return cache.device.type == "cuda" and by_kernel(cache)
