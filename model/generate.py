"""Generation with the training weights: packed prefill, a KV cache, continuous batching.

The batch is the first rows of the cache. A row that finishes is overwritten by the last one, and
waiting prompts are appended: no row is computed for nothing. A step feeds every row its newest
token (at first the last one of its prompt) and brings the sampled tokens back in one transfer.

Random numbers are a hash of the sample's seed and the index of the token, so what is sampled
depends on neither the batch, nor the order, nor the rank.

Shapes: T packed tokens, B rows, D hidden.
"""

import copy
import dataclasses
import functools
import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
import torch

from model.kv_cache import DecodeAttention, KVCache, PrefillAttention, uses_graphs
from model.sampling import Sampler, random_keys, uniform
from model.transformer import Transformer

Decode = Callable[[list[int]], str]

# Prompts are admitted once this share of the rows is free: fewer, larger prefills are faster.
REFILL_SHARE = 1 / 8
PREFILL_TOKENS = 1 << 14  # a prefill packs prompts up to this many tokens
# A batch size runs this often before it becomes a CUDA graph: the first run compiles kernels.
CAPTURE_AFTER = 2
FIRST_SLOTS = 64  # the cache begins with room for this many new tokens per row, then doubles


@dataclasses.dataclass
class Completion:
    """What was generated for a prompt.

    Attributes:
        tokens: the new ids; a stop id is the last of them.
        logp: the log-prob of each.
        stopped: whether a stop id or a stop string ended it, not the limit.
    """

    tokens: list[int]
    logp: list[float]
    stopped: bool


@torch.no_grad()
def generate(  # noqa: PLR0913  every option is a keyword, which all callers name
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop_ids: Iterable[int],
    *,
    vocab: int | None = None,
    temperature: float = 0.0,
    top_k: int = 0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    stop_strings: Sequence[str] = (),
    decode: Decode | None = None,
    batch_size: int = 256,
    on_token: Callable[[int, int, float], object] | None = None,
    on_done: Callable[[int, Completion], object] | None = None,
) -> list[Completion]:
    """Continue every prompt.

    Args:
        model: in training or evaluation mode; its weights are read, never changed.
        prompts: ids, none of them empty.
        max_new_tokens: of each prompt, the stop id included.
        stop_ids: end a completion.
        vocab: sample ids below this one; None: all rows of the head.
        temperature: 0 is greedy.
        top_k: keep the ids whose logit is among the k largest (ties stay); 0: all.
        top_p: of those, keep the smallest set of the most probable ids with at least this mass
            (lower ids first among equals).
        seeds: an int of up to 64 bits for each prompt; needed to sample.
        stop_strings: end a completion once its text contains one. Needs `decode`.
        decode: ids to text.
        batch_size: prompts that run at the same time.
        on_token: called with (index of the prompt, id, log-prob) for every new token.
        on_done: called with (index of the prompt, its Completion) as soon as it is finished.

    Returns:
        One Completion per prompt. Its log-probs are those of softmax(logits / temperature) over
        `vocab` ids before top_k and top_p (greedy: at temperature 1).

    Raises:
        ValueError: an argument that cannot work.
    """
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: there is nothing to continue")
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1 or batch_size < 1:
        raise ValueError(
            "temperature and top_k must not be negative, top_p in (0, 1], batch_size at least 1"
        )
    if temperature == 0:
        seeds = [0] * len(prompts)  # not read
    if seeds is None or len(seeds) != len(prompts):
        raise ValueError("temperature > 0 needs one seed per prompt")
    if stop_strings and decode is None:
        raise ValueError("stop_strings need decode, which turns ids into text")
    if not prompts or max_new_tokens < 1:
        return [Completion([], [], False) for _ in prompts]

    model = in_compute_dtype(model)
    size = min(batch_size, len(prompts))
    vocab = vocab or len(model.head_VD)
    sampler = Sampler(model.head_VD, vocab, size, temperature, top_k, top_p)
    batch = _Batch(model, sampler, prompts, random_keys(seeds), max_new_tokens, size)
    stop_ids = np.array(list(stop_ids), dtype=np.int64)
    completions = {}
    while batch.n_rows or batch.pending:
        batch.admit()
        logp_B = batch.step()
        if on_token:
            for row, logp in enumerate(logp_B.tolist()):
                on_token(int(batch.prompt_B[row]), int(batch.token_B[row]), logp)
        stopped_B = np.isin(batch.token_B[: batch.n_rows], stop_ids)
        if decode and stop_strings:
            for row in range(batch.n_rows):
                stopped_B[row] |= _has_stop_string(batch.new_tokens(row), stop_strings, decode)
        finished = np.flatnonzero(stopped_B | (batch.count_B[: batch.n_rows] == max_new_tokens))
        for row in finished.tolist():
            index = int(batch.prompt_B[row])
            logp = batch.logp[row, : batch.count_B[row]].tolist()
            done = Completion(batch.new_tokens(row), logp, bool(stopped_B[row]))
            completions[index] = done
            if on_done:
                on_done(index, done)
        batch.remove(finished)
    return [completions[index] for index in range(len(prompts))]


def in_compute_dtype(model: Transformer) -> Transformer:
    """The model with its weights in its compute dtype: itself if they are already.

    So no layer casts its weight again at every token.
    """
    dtype = model.compute_dtype
    if dtype is None or all(p.dtype == dtype for p in model.parameters()):
        return model
    # What deepcopy finds in the memo it takes for the copy. So weights are cast, never copied, and
    # those of that dtype already (the frozen base under LoRA) are shared.
    memo = {}
    for p in model.parameters():
        memo[id(p)] = torch.nn.Parameter(p.to(dtype), requires_grad=False)
    return copy.deepcopy(model, memo)


def _has_stop_string(tokens: list[int], stop_strings: Sequence[str], decode: Decode) -> bool:
    """Whether the newest token completes a stop string.

    Only the end of the text is decoded, enough to hold a stop string and the newest token's text.
    """
    needed = max(map(len, stop_strings)) + len(decode(tokens[-1:]))
    tail = max(map(len, stop_strings)) + 4  # a character that is cut may stand at the start
    text = decode(tokens[-tail:])
    # Tokens may be parts of characters, or no text at all.
    while len(text) < needed and tail < len(tokens):
        tail *= 2
        text = decode(tokens[-tail:])
    return any(string in text for string in stop_strings)


# --- a step -------------------------------------------------------------------------------


class _Decoder:
    """Makes one new token for each of the first rows of the cache, in buffers that stay in place.

    On a GPU, launching the hundreds of small kernels of a step takes longer than running them. So
    the number of rows is rounded up to a bucket (further rows cost nothing, whatever they hold),
    and a bucket that has come up CAPTURE_AFTER times is recorded as a CUDA graph and replayed.
    """

    def __init__(self, model: Transformer, sampler: Sampler, cache: KVCache, size: int) -> None:
        self.model, self.sampler, self.cache, self.size = model, sampler, cache, size
        head_VD = model.head_VD
        # Tokens, positions, and the bits of the random numbers, which are fp64.
        self.host_3B = torch.zeros(3, size, dtype=torch.long, pin_memory=head_VD.is_cuda)
        self.inputs_3B = self.host_3B.to(head_VD.device, copy=True)
        self.hidden_BD = head_VD.new_zeros(size, head_VD.shape[1])
        # Ids (exact in fp64) and log-probs: one transfer.
        self.sampled_2B = torch.zeros(2, size, dtype=torch.double, device=head_VD.device)
        self.uses_graphs = uses_graphs(cache)
        self.graphs, self.runs, self.pool = {}, Counter(), None

    def __call__(self, token_B: np.ndarray, position_B: np.ndarray, u_B: np.ndarray) -> np.ndarray:
        """Feed every row a token at a position. Returns new ids and their log-probs, [2, B]."""
        used = int(position_B.max()) + 1
        if self.cache.reserve(used):
            self.graphs, self.runs, self.pool = {}, Counter(), None  # they hold its old address
        n = len(token_B)
        rows = _bucket(n, self.size) if self.uses_graphs else n
        self.host_3B[:, n:rows] = 0
        self.host_3B.numpy()[:, :n] = token_B, position_B, u_B.view(np.int64)
        self.inputs_3B.copy_(self.host_3B, non_blocking=True)
        if rows in self.graphs:
            self.graphs[rows].replay()
        else:
            self._forward(rows, used)
            self.runs[rows] += 1
            if self.uses_graphs and self.runs[rows] == CAPTURE_AFTER:
                graph = record(functools.partial(self._forward, rows, used), self.pool)
                self.graphs[rows], self.pool = graph, graph.pool()
        if self.sampler.synchronizes:
            self._sample(n)
        return self.sampled_2B[:, :n].cpu().numpy()

    def _forward(self, rows: int, used: int) -> None:
        token_B, position_B, _ = self.inputs_3B[:, :rows]
        attend = DecodeAttention(self.cache, position_B, used)
        self.hidden_BD[:rows] = self.model(token_B, position_B, attend)
        if not self.sampler.synchronizes:
            self._sample(rows)

    def _sample(self, rows: int) -> None:
        u_B = self.inputs_3B[2, :rows].view(torch.double)
        token_B, logp_B = self.sampler(self.hidden_BD[:rows], u_B)
        self.sampled_2B[0, :rows], self.sampled_2B[1, :rows] = token_B, logp_B


def _bucket(n: int, size: int) -> int:
    """n rounded up to a power of two or a multiple of 64, at most `size`: few graphs."""
    if n > 64:
        return min(size, -(-n // 64) * 64)
    return min(size, 1 << (n - 1).bit_length())


def record(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """run() as a CUDA graph: replay() repeats its kernels on the same addresses.

    Graphs of one pool share their scratch memory.
    """
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    # thread_local: other threads may go on with what they do.
    with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
        run()
    return graph


# --- the batch ----------------------------------------------------------------------------


class _Batch:
    """The prompts that run in rows [0, n_rows), and those that wait.

    Of each row: the index of its prompt, its newest token, how many tokens are new, and these
    tokens with their log-probs.
    """

    def __init__(
        self,
        model: Transformer,
        sampler: Sampler,
        prompts: Sequence[Sequence[int]],
        keys: np.ndarray,
        max_new_tokens: int,
        size: int,
    ) -> None:
        self.model, self.prompts, self.keys = model, prompts, keys
        self.size, self.n_rows = size, 0
        # Equal prompts are one group, with the index of the first of them.
        first = {}
        self.group = [first.setdefault(tuple(p), index) for index, p in enumerate(prompts)]
        # Taken from the end, longest first: rows that run together have similar lengths, and equal
        # prompts are admitted together.
        self.pending = sorted(
            range(len(prompts)), key=lambda i: (len(prompts[i]), -self.group[i], -i)
        )
        self.prompt_B, self.token_B, self.count_B = np.zeros((3, size), np.int64)
        self.tokens = np.empty((size, max_new_tokens), np.int64)
        self.logp = np.empty((size, max_new_tokens))
        # All of a prompt but its last token is prefilled.
        self.prefix = np.array([len(p) - 1 for p in prompts])
        longest = max(map(len, prompts))
        slots = longest + min(max_new_tokens, FIRST_SLOTS)
        self.cache = KVCache(model, size, slots, longest + max_new_tokens)
        self.decoder = _Decoder(model, sampler, self.cache, size)

    def positions(self, rows: Any) -> np.ndarray:
        """The cache slot of the newest token of these rows (an index of an array)."""
        return self.prefix[self.prompt_B[rows]] + self.count_B[rows]

    def new_tokens(self, row: int) -> list[int]:
        return self.tokens[row, : self.count_B[row]].tolist()

    def admit(self) -> None:
        """Append waiting prompts if enough rows are free.

        A prompt is prefilled, or copied from a row that holds the same prompt.
        """
        free = self.size - self.n_rows
        if not self.pending or (self.n_rows and free < REFILL_SHARE * self.size):
            return
        row_of_group = {}
        for row, index in enumerate(self.prompt_B[: self.n_rows].tolist()):
            row_of_group[self.group[index]] = row
        fresh, copies, sources = [], [], []
        for _ in range(min(free, len(self.pending))):
            index, row = self.pending.pop(), self.n_rows
            prompt, group = self.prompts[index], self.group[index]
            self.prompt_B[row], self.token_B[row], self.count_B[row] = index, prompt[-1], 0
            self.n_rows += 1
            if group in row_of_group:
                copies.append(row)
                sources.append(row_of_group[group])
            elif len(prompt) > 1:
                row_of_group[group] = row
                fresh.append(row)
        self._prefill(fresh)
        self._copy_rows(copies, sources)

    def _prefill(self, rows: list[int]) -> None:
        """Fill the cache for new rows, in packs of at most PREFILL_TOKENS (or one prompt)."""
        pack, total = [], 0
        for row in rows:
            length = self.positions(row)
            if pack and total + length > PREFILL_TOKENS:
                self._prefill_pack(pack)
                pack, total = [], 0
            pack.append(row)
            total += length
        if pack:
            self._prefill_pack(pack)

    def _prefill_pack(self, rows: list[int]) -> None:
        prompts = [self.prompts[index][:-1] for index in self.prompt_B[rows]]
        tokens_T = torch.from_numpy(np.concatenate(prompts)).to(self.cache.layers.device)
        attend = PrefillAttention(self.cache, rows, [len(p) for p in prompts])
        self.model(tokens_T, attend.position_T, attend)

    def step(self) -> np.ndarray:
        """Append a token to every row. Returns the log-probs of these tokens."""
        rows = np.arange(self.n_rows)
        count_B = self.count_B[rows]
        u_B = uniform(self.keys[self.prompt_B[rows]], count_B)
        token_B, logp_B = self.decoder(self.token_B[rows], self.positions(rows), u_B)
        self.tokens[rows, count_B] = self.token_B[rows] = token_B
        self.logp[rows, count_B] = logp_B
        self.count_B[rows] += 1
        return logp_B

    def remove(self, finished: np.ndarray) -> None:
        """Overwrite finished rows by the last ones."""
        keep = self.n_rows - len(finished)
        holes = finished[finished < keep]
        last = np.setdiff1d(np.arange(keep, self.n_rows), finished)
        self.n_rows = keep
        for state in (self.prompt_B, self.token_B, self.count_B, self.tokens, self.logp):
            state[holes] = state[last]
        self._copy_rows(holes.tolist(), last.tolist())

    def _copy_rows(self, to: list[int], source: list[int]) -> None:
        if len(to):
            self.cache.copy_rows(to, source, int(self.positions(to).max()))
