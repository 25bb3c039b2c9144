"""Causal attention over packed documents: the reference path, for any device.

Documents are gathered into a few [B, L] blocks of nearly equal length and handed to PyTorch's fused attention. Right
padding needs no mask: under a causal mask no real query sees a later slot. So nothing is computed across documents
and no [T, T] mask exists. Legend: T packed tokens, H query heads, K key-value heads, E head dimension.
"""

import torch
import torch.nn.functional as F

MAX_PADDING = 1 / 4  # a block holds documents at least 3/4 as long as its longest


class PackedAttention:
    """How the T tokens of a micro-batch attend: built once from the documents' lengths, used by every layer."""

    def __init__(self, lengths, device="cpu"):
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
        packed = torch.cat([*indices, back])
        if torch.device(device).type != "cpu":
            packed = packed.pin_memory().to(device, non_blocking=True)  # one copy that nobody waits for
        *parts, self.back_T = packed.split([*map(len, indices), len(back)])
        self.blocks = list(zip(parts, sizes, strict=True))

    @torch.compiler.disable
    def __call__(self, layer, q_THE, k_TKE, v_TKE):
        """[T, H, E], [T, K, E], [T, K, E] -> [T, H, E]; scores are scaled by E^-1/2. `layer` is for caches; unused here."""
        outputs = []
        for index, size in self.blocks:
            q, k, v = (x.index_select(0, index).unflatten(0, (size, -1)).transpose(1, 2) for x in (q_THE, k_TKE, v_TKE))
            o_BHLE = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
            outputs.append(o_BHLE.transpose(1, 2).flatten(0, 1))
        return torch.cat(outputs).index_select(0, self.back_T) if outputs else torch.empty_like(q_THE)
