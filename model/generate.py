"""Generation on the training weights: packed prefill, a KV cache, greedy decoding.

Finished sequences leave the batch as soon as enough of them are done, so a wave costs what its live rows cost.
Legend: T packed tokens, B sequences, S cache slots, H query heads, K key-value heads, E head dimension, V vocabulary.
"""

import torch
import torch.nn.functional as F

from kernels.attention import PackedAttention
from kernels.chunk import accumulate_dtype

LIVE_SHARE = 3 / 4  # rows are compacted when fewer than this share of them still runs


class _Cache:
    """Keys and values of B sequences in slots [0, S), per layer; length_B counts the slots in use."""

    def __init__(self, config, size, slots, dtype, device):
        shape = (config.num_layers, 2, size, slots, config.num_kv_heads, config.head_dim)
        self.kv = torch.zeros(shape, dtype=dtype, device=device)
        self.length_B = torch.zeros(size, dtype=torch.long, device=device)

    def keep(self, rows):
        self.kv, self.length_B = self.kv[:, :, rows], self.length_B[rows]


class _Prefill:
    """Attention of packed prompts that also fills the cache."""

    def __init__(self, cache, lengths, positions_T):
        self.cache, self.packed, self.positions_T = cache, PackedAttention(lengths, positions_T.device), positions_T
        lengths = torch.tensor(lengths, device=positions_T.device)
        self.row_T = torch.repeat_interleave(torch.arange(len(lengths), device=positions_T.device), lengths)
        cache.length_B.copy_(lengths)

    def __call__(self, layer, q_THE, k_TKE, v_TKE):
        self.cache.kv[layer, 0, self.row_T, self.positions_T] = k_TKE
        self.cache.kv[layer, 1, self.row_T, self.positions_T] = v_TKE
        return self.packed(layer, q_THE, k_TKE, v_TKE)


class _Decode:
    """Attention of one new token per sequence over its cached past and itself."""

    def __init__(self, cache):
        self.cache, size = cache, cache.length_B.shape[0]
        self.row_B, self.at_B = torch.arange(size, device=cache.length_B.device), cache.length_B.clone()
        self.used = int(cache.length_B.max()) + 1
        slot_S = torch.arange(self.used, device=cache.length_B.device)
        self.mask_B11S = (slot_S <= self.at_B.unsqueeze(1))[:, None, None, :]
        cache.length_B += 1

    def __call__(self, layer, q_BHE, k_BKE, v_BKE):
        kv = self.cache.kv[layer]
        kv[0, self.row_B, self.at_B], kv[1, self.row_B, self.at_B] = k_BKE, v_BKE
        k_BKSE, v_BKSE = (x[:, : self.used].transpose(1, 2) for x in kv)
        gqa = q_BHE.shape[1] != k_BKE.shape[1]
        out = F.scaled_dot_product_attention(q_BHE.unsqueeze(2), k_BKSE, v_BKSE, attn_mask=self.mask_B11S, enable_gqa=gqa)
        return out.squeeze(2)


@torch.no_grad()
def generate(model, prompts, max_new_tokens, stop_ids, *, vocab=None, batch_size=256):
    """Greedy continuations. prompts: lists of ids, none empty; vocab: ids at or beyond it are never chosen.

    Returns one list of new ids per prompt; the stop id that ended it is its last, if any did within max_new_tokens.
    """
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    results = [None] * len(prompts)
    for lo in range(0, len(order), batch_size):
        wave = order[lo : lo + batch_size]
        for i, ids in zip(wave, _wave(model, [prompts[i] for i in wave], max_new_tokens, set(stop_ids), vocab)):
            results[i] = ids
    return results


def _wave(model, prompts, max_new_tokens, stop_ids, vocab):
    head_VD = model.head_VD[: vocab or model.head_VD.shape[0]]
    device, dtype = head_VD.device, model.compute_dtype or head_VD.dtype
    head_VD = head_VD.to(dtype)
    lengths = [len(p) for p in prompts]
    positions_T = torch.tensor([i for n in lengths for i in range(n)], device=device)
    tokens_T = torch.tensor([i for p in prompts for i in p], device=device)
    cache = _Cache(model.config, len(prompts), max(lengths) + max_new_tokens, dtype, device)
    hidden_TD = model(tokens_T, positions_T, _Prefill(cache, lengths, positions_T))
    hidden_BD = hidden_TD[torch.tensor(lengths, device=device).cumsum(0) - 1]
    new = [[] for _ in prompts]
    live = list(range(len(prompts)))  # which prompt each row of the batch continues; None once finished
    for _ in range(max_new_tokens):
        token_B = (hidden_BD @ head_VD.t()).to(accumulate_dtype(hidden_BD)).argmax(1)
        for row, token in enumerate(token_B.tolist()):
            if live[row] is not None:
                new[live[row]].append(token)
                if token in stop_ids:
                    live[row] = None
        running = [row for row, prompt in enumerate(live) if prompt is not None]
        if not running or len(new[live[running[0]]]) == max_new_tokens:
            break
        if len(running) < LIVE_SHARE * len(live):
            rows = torch.tensor(running, device=device)
            cache.keep(rows)
            token_B, live = token_B[rows], [live[row] for row in running]
        hidden_BD = model(token_B, cache.length_B.clone(), _Decode(cache))
    return new
