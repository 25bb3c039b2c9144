"""Generation on the training weights: packed prefill, a KV cache, continuous batching, sampling with log-probs.

The batch is the rows [0, n) of the cache. A row that finishes is overwritten by the last one, a new prompt is appended: no
row is ever computed for nothing, and the state of a row is a handful of numbers on the host. One step feeds every row its
newest token (a new row: the last token of its prompt), and brings the sampled tokens back in one transfer.

Random numbers are counter-based: a hash of (seed of the sample, index of the token). What is sampled therefore depends on
neither the batch, nor the order, nor the rank. Legend: T packed tokens, B rows, S cache slots, H query heads,
K key-value heads, E head dimension, D hidden, V vocabulary, P vocabulary padded to blocks, M blocks, C ids of a block.
"""

import copy
import dataclasses
import math
from collections import Counter

import numpy as np
import torch
import torch.nn.functional as F

from kernels import backend
from kernels.attention import PackedAttention
from kernels.decode_attention import decode_attention
from model.sampling import Sampler, random_keys, uniform

REFILL_SHARE = (
    1 / 8
)  # prompts are admitted once this share of the rows is free: fewer, larger prefills (1 to 4 % faster than at once)
PREFILL_TOKENS = 1 << 14  # prompts are prefilled in packs of at most this many tokens
CAPTURE_AFTER = (
    2  # steps of a batch size before it becomes a CUDA graph: the first compiles what it needs
)
GROW_SLOTS = 64  # the cache grows by at least this many slots per row, and by a quarter


@dataclasses.dataclass
class Completion:
    """New ids (the stop id that ended them is the last), the log-prob of each, and whether a stop id or string ended them."""

    tokens: list
    logp: list
    stopped: bool


@torch.no_grad()
def generate(
    model,
    prompts,
    max_new_tokens,
    stop_ids,
    *,
    vocab=None,
    temperature=0.0,
    top_k=0,
    top_p=1.0,
    seeds=None,
    stop_strings=(),
    decode=None,
    batch_size=256,
    on_token=None,
    on_done=None,
):
    """One Completion per prompt (a list of ids, not empty), of at most max_new_tokens ids below `vocab`.

    temperature 0 is greedy. top_k keeps every id whose logit is among the k largest (0: all; ties at the border stay), then
    top_p the smallest set of the likeliest ids whose mass is at least top_p (ties: lower ids first; 1: all). `seeds`: an int
    of up to 64 bits per prompt, needed to sample. logp is of softmax(logits / temperature) over all `vocab` ids, before
    top_k and top_p (greedy: temperature 1). stop_strings are looked for in the text that `decode` (ids -> text) makes of the
    newest tokens. on_token(index of the prompt, id, logp) is called for every new token, on_done(index, Completion) for every one
    that is finished. Raises ValueError.
    """
    if any(not len(p) for p in prompts):
        raise ValueError(
            f"prompt {next(i for i, p in enumerate(prompts) if not len(p))} is empty: there is nothing to continue"
        )
    if not 0 <= temperature < float("inf") or top_k < 0 or not 0 < top_p <= 1 or batch_size < 1:
        raise ValueError(
            "temperature and top_k must not be negative, top_p in (0, 1], batch_size at least 1"
        )
    if temperature > 0 and (seeds is None or len(seeds) != len(prompts)):
        raise ValueError("temperature > 0 needs one seed per prompt")
    if stop_strings and decode is None:
        raise ValueError("stop_strings need decode, which turns ids into text")
    if not prompts or max_new_tokens < 1:
        return [Completion([], [], False) for _ in prompts]
    model = in_compute_dtype(model)
    size = min(batch_size, len(prompts))
    sampler = Sampler(
        model.head_VD, vocab or model.head_VD.shape[0], size, temperature, top_k, top_p
    )
    keys = random_keys(seeds) if temperature > 0 else np.zeros(len(prompts), np.uint64)
    batch = _Batch(model, sampler, prompts, keys, max_new_tokens, size)
    batch.stop_ids, batch.on_token = np.array(sorted(stop_ids), dtype=np.int64), on_token
    batch.on_done = on_done
    if stop_strings:
        batch.ended = _StopStrings(stop_strings, decode)
    while batch.n or batch.pending:
        batch.admit()
        batch.step()
    return batch.results


def in_compute_dtype(model):
    """The model with weights in its compute dtype, so that no layer casts at every token: itself if they are already."""
    dtype = model.compute_dtype
    if dtype is None or all(p.dtype == dtype for p in model.parameters()):
        return model
    # deepcopy takes what `memo` holds for the copy: weights are cast, never copied, and those of that dtype (LoRA's frozen base) are shared
    return copy.deepcopy(
        model,
        {id(p): torch.nn.Parameter(p.to(dtype), requires_grad=False) for p in model.parameters()},
    )


# --- stop strings, the cache, the two forms of attention -------------------------------------------------------------


class _StopStrings:
    """Whether the newest token completes a stop string: only the tail of the text that can hold one is decoded."""

    def __init__(self, strings, decode):
        self.strings, self.decode, self.longest = (
            tuple(strings),
            decode,
            max(len(s) for s in strings),
        )

    def __call__(self, ids):
        newest, tail = (
            len(self.decode(ids[-1:].tolist())),
            self.longest + 4,
        )  # a cut character may stand at the start
        while len(text := self.decode(ids[-tail:].tolist())) < self.longest + newest and tail < len(
            ids
        ):
            tail *= 2  # tokens that are parts of characters, or no text
        return any(s in text for s in self.strings)


class _Cache:
    """Keys and values of all layers [layers, 2, B, K, S, E] (a head's slots side by side: the faster layout on a CPU)."""

    def __init__(self, config, rows, slots, most, dtype, device):
        shape = lambda slots: (
            config.num_layers,
            2,
            rows,
            config.num_kv_heads,
            slots,
            config.head_dim,
        )
        if (
            device.type == "cuda"
        ):  # all that may be needed at once, where it fits: graphs hold the addresses
            size = math.prod(shape(most)) * dtype.itemsize
            slots = most if size < torch.cuda.mem_get_info(device)[0] // 2 else slots
        self.layers, self.most = torch.zeros(shape(slots), dtype=dtype, device=device), most

    def reserve(self, slots):
        """Room for so many slots a row; whether the cache moved for it."""
        have = self.layers.shape[4]
        if slots <= have:
            return False
        more = max(slots - have, GROW_SLOTS, have if self.layers.is_cuda else have // 4)
        self.layers = F.pad(self.layers, (0, 0, 0, min(more, max(self.most, slots) - have)))
        return True

    def copy_rows(self, to, source, slots):
        to, source = (torch.as_tensor(x, device=self.layers.device) for x in (to, source))
        self.layers[:, :, to, :, :slots] = self.layers[:, :, source, :, :slots]


class _Prefill:
    """Attention of packed prompts that also fills rows of the cache."""

    def __init__(self, cache, rows, lengths, device):
        self.cache, self.packed = cache, PackedAttention(lengths, device)
        self.row_T = torch.from_numpy(np.repeat(rows, lengths)).to(device)
        self.position_T = torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])).to(
            device
        )

    @torch.compiler.disable
    def __call__(self, layer, q_THE, k_TKE, v_TKE):
        kv = self.cache.layers[layer]
        kv[0, self.row_T, :, self.position_T], kv[1, self.row_T, :, self.position_T] = k_TKE, v_TKE
        return self.packed(layer, q_THE, k_TKE, v_TKE)


class _Decode:
    """Attention of one new token per row over its cached past and itself; `used`: slots of the longest row."""

    def __init__(self, cache, position_B, used):
        self.cache, self.position_B, self.used = cache, position_B, used
        self.row_B = torch.arange(len(position_B), device=position_B.device)
        self.by_kernel = by_kernel(cache)
        if self.by_kernel:
            self.length_B = position_B + 1
            return
        slot_S = torch.arange(used, device=position_B.device)
        hidden_B11S = (slot_S > position_B.unsqueeze(1))[:, None, None, :]
        self.mask_B11S = torch.zeros(
            hidden_B11S.shape, dtype=cache.layers[0].dtype, device=position_B.device
        )
        self.mask_B11S.masked_fill_(hidden_B11S, float("-inf"))

    @torch.compiler.disable
    def __call__(self, layer, q_BHE, k_BKE, v_BKE):
        kv = self.cache.layers[layer]
        kv[0, self.row_B, :, self.position_B], kv[1, self.row_B, :, self.position_B] = k_BKE, v_BKE
        if self.by_kernel:
            return decode_attention(q_BHE.unsqueeze(1), kv[0], kv[1], self.length_B).squeeze(1)
        k_BKSE, v_BKSE = kv[:, : len(q_BHE), :, : self.used]
        # the query heads of a key-value head are its queries: nothing is repeated
        q_BKGE = q_BHE.unflatten(1, (k_BKE.shape[1], -1))
        return F.scaled_dot_product_attention(
            q_BKGE, k_BKSE, v_BKSE, attn_mask=self.mask_B11S
        ).flatten(1, 2)


# --- a step ----------------------------------------------------------------------------------------------------------


class _Step:
    """One new token for each of the first n rows, on buffers that stay where they are.

    On a GPU launching a step's hundreds of small kernels takes longer than running them. So n is rounded up to a bucket (further rows are
    free, whatever they hold), and a bucket that has come up CAPTURE_AFTER times is recorded as a CUDA graph and replayed from then on.
    """

    def __init__(self, model, sampler, cache, size):
        self.model, self.sampler, self.cache, self.size = model, sampler, cache, size
        device = model.head_VD.device
        self.records = records(cache)
        self.host = torch.zeros(
            3, size, dtype=torch.long, pin_memory=device.type == "cuda"
        )  # tokens, positions, the bits of random numbers
        self.inputs = torch.zeros(3, size, dtype=torch.long, device=device)
        self.hidden_BD = torch.zeros(
            size, model.config.hidden_size, dtype=cache.layers.dtype, device=device
        )
        self.sampled = torch.zeros(
            2, size, dtype=torch.double, device=device
        )  # ids (exact) and log-probs: one transfer
        self.forget()

    def forget(self):
        """The cache moved: what was recorded holds its old address."""
        self.graphs, self.times = {}, Counter()

    def __call__(self, token, position, u, used):
        n = len(token)
        rows = _bucket(n, self.size) if self.records else n
        self.host[:, n:rows] = 0
        for line, values in zip(self.host.numpy(), (token, position, u.view(np.int64))):
            line[:n] = values
        self.inputs.copy_(self.host, non_blocking=True)
        if rows in self.graphs:
            self.graphs[rows].replay()
        else:
            self.body(rows, used)
            self.times[rows] += 1
            if self.records and self.times[rows] == CAPTURE_AFTER:
                self.graphs[rows] = record(
                    lambda: self.body(rows, used),
                    next((g.pool() for g in self.graphs.values()), None),
                )
        if not self.sampler.waits:
            return self.sampled[:, :n].cpu().numpy()
        return self.choose(n)[:, :n].cpu().numpy()

    def body(self, rows, used):
        token_B, position_B, _ = self.inputs[:, :rows]
        self.hidden_BD[:rows] = self.model(
            token_B, position_B, _Decode(self.cache, position_B, used)
        )
        if not self.sampler.waits:
            self.choose(rows)

    def choose(self, rows):
        u_B = self.inputs[2, :rows].view(torch.double) if self.sampler.temperature else None
        token_B, logp_B = self.sampler(self.hidden_BD[:rows], u_B)
        self.sampled[0, :rows], self.sampled[1, :rows] = token_B, logp_B
        return self.sampled


def _bucket(n, size):
    """n rounded up, to a power of two or a multiple of 64: few graphs, little for nothing."""
    return min(size, 1 << (n - 1).bit_length() if n <= 64 else -(-n // 64) * 64)


def by_kernel(cache):
    """Whether decode_attention serves: device, dtype and head dimension are such as its kernel takes."""
    return backend.triton_serves(cache.layers.device) and backend.triton_attends(
        cache.layers[0, 0, 0]
    )


def records(cache):
    """Whether steps are recorded: with the kernel alone, since otherwise a step's shapes change with its longest row."""
    return cache.layers.is_cuda and by_kernel(cache)


def record(run, pool=None):
    """run() as a CUDA graph: replay() repeats its kernels on the same addresses. Graphs of one pool share their scratch memory."""
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(
        graph, pool=pool, capture_error_mode="thread_local"
    ):  # other threads may go on with what they do
        run()
    return graph


# --- the batch -------------------------------------------------------------------------------------------------------


class _Batch:
    """The running rows [0, n) and the prompts that wait. `rows` says of each row which prompt it continues, its newest token
    and that token's position, how many tokens are new, and the key of its random numbers."""

    def __init__(self, model, sampler, prompts, keys, limit, size):
        self.model, self.sampler, self.prompts, self.keys, self.limit = (
            model,
            sampler,
            prompts,
            keys,
            limit,
        )
        self.device = model.head_VD.device
        first = {}  # equal prompts share what they are called: the first one's index
        self.kind = [first.setdefault(tuple(p), i) for i, p in enumerate(prompts)]
        # longest first: rows that run together are of like length, and equal prompts are admitted together
        self.pending = sorted(
            range(len(prompts)), key=lambda i: (len(prompts[i]), -self.kind[i], -i)
        )
        self.rows = np.zeros(
            size,
            [("prompt", "i8"), ("token", "i8"), ("position", "i8"), ("count", "i8"), ("key", "u8")],
        )
        self.tokens, self.logp = np.empty((size, limit), np.int64), np.empty((size, limit))
        self.results, self.n, self.size = [None] * len(prompts), 0, size
        longest = len(prompts[self.pending[-1]])
        slots, dtype = longest + min(limit, GROW_SLOTS), model.compute_dtype or model.head_VD.dtype
        self.cache = _Cache(model.config, size, slots, longest + limit, dtype, self.device)
        self.next = _Step(model, sampler, self.cache, size)
        self.stop_ids, self.on_token, self.on_done, self.ended = (
            np.empty(0, np.int64),
            None,
            None,
            None,
        )

    def admit(self):
        """Append waiting prompts to the rows if enough of them are free. All but a prompt's last token is prefilled, or copied
        from a row that holds the same prompt."""
        free = self.size - self.n
        if not self.pending or (self.n and free < REFILL_SHARE * self.size):
            return
        holder = {self.kind[p]: row for row, p in enumerate(self.rows["prompt"][: self.n].tolist())}
        fresh, copies = [], []
        for _ in range(min(free, len(self.pending))):
            index, row = self.pending.pop(), self.n
            prompt, kind = self.prompts[index], self.kind[index]
            self.rows[row] = (index, prompt[-1], len(prompt) - 1, 0, self.keys[index])
            self.n += 1
            if kind in holder:
                copies.append((row, holder[kind]))
            elif len(prompt) > 1:
                holder[kind] = row
                fresh.append(row)
        self._prefill(fresh)
        if copies:
            to, source = np.array(copies).T
            self.cache.copy_rows(to, source, int(self.rows["position"][to].max()))

    def _prefill(self, rows):
        while rows:
            lengths, total = [], 0
            for row in rows:
                total += self.rows[row]["position"]
                if lengths and total > PREFILL_TOKENS:
                    break
                lengths.append(int(self.rows[row]["position"]))
            now, rows = rows[: len(lengths)], rows[len(lengths) :]
            attend = _Prefill(self.cache, np.array(now), lengths, self.device)
            tokens = np.concatenate([self.prompts[self.rows[row]["prompt"]][:-1] for row in now])
            self.model(torch.from_numpy(tokens).to(self.device), attend.position_T, attend)

    def step(self):
        """One new token for every row; finished rows are handed over and overwritten by the last ones."""
        rows = self.rows[: self.n]
        used = int(rows["position"].max()) + 1
        if self.cache.reserve(used):
            self.next.forget()
        u = uniform(rows["key"], rows["count"]) if self.sampler.temperature else np.zeros(self.n)
        sampled = self.next(rows["token"], rows["position"], u, used)
        tokens, logp = sampled[0].astype(np.int64), sampled[1]
        at = np.arange(self.n), rows["count"]
        self.tokens[at], self.logp[at] = tokens, logp
        rows["token"], rows["position"], rows["count"] = (
            tokens,
            rows["position"] + 1,
            rows["count"] + 1,
        )
        if self.on_token:
            for row, token, value in zip(rows, tokens.tolist(), logp.tolist()):
                self.on_token(int(row["prompt"]), token, value)
        stopped = np.isin(tokens, self.stop_ids)
        if self.ended:
            stopped |= [self.ended(self.tokens[i, : rows["count"][i]]) for i in range(self.n)]
        finished = np.flatnonzero(stopped | (rows["count"] == self.limit))
        for row in finished:
            count = rows["count"][row]
            index, done = (
                rows["prompt"][row],
                Completion(
                    self.tokens[row, :count].tolist(),
                    self.logp[row, :count].tolist(),
                    bool(stopped[row]),
                ),
            )
            self.results[index] = done
            if self.on_done:
                self.on_done(int(index), done)
        if len(finished):
            self._drop(finished)

    def _drop(self, finished):
        keep = self.n - len(finished)
        holes = finished[finished < keep]
        source = np.setdiff1d(np.arange(keep, self.n), finished)
        self.n = keep
        if len(holes):
            self.rows[holes], self.tokens[holes], self.logp[holes] = (
                self.rows[source],
                self.tokens[source],
                self.logp[source],
            )
            self.cache.copy_rows(holes, source, int(self.rows["position"][holes].max()))
