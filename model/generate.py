"""Generation with the training weights: packed prefill, a KV cache, continuous batching.

An `Engine` keeps what one call needs for the next: a copy of the weights that is refreshed in
place, the cache, and on a GPU the recorded steps.

The batch is the first rows of the cache. A row that finishes is overwritten by the last one, and
waiting prompts are appended: no row is computed for nothing. A step feeds every row its newest
token (at first the last one of its prompt) and leaves on the device what the next one needs; the
sampled tokens come back in one transfer.

Random numbers are a hash of the sample's seed and the index of the token, so what is sampled
depends on neither the batch, nor the order, nor the rank.

Shapes: T packed tokens, B rows, D hidden.
"""

import dataclasses
import functools
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from model.kv_cache import (
    CAPACITY,
    DecodeAttention,
    KVCache,
    PrefillAttention,
    by_kernel,
    uses_graphs,
)
from model.lora import adapters, plain_parameters
from model.sampling import Sampler, random_keys, uniform
from model.sharding import InShards, generates_in_shards, is_sharded
from model.transformer import Fused, Transformer
from progress import Progress

Decode = Callable[[list[int]], str]

# Prompts are admitted once this share of the rows is free: fewer, larger prefills are faster.
REFILL_SHARE = 1 / 8
PREFILL_TOKENS = 1 << 14  # a prefill packs prompts up to this many tokens
SHARED_TOKENS = 64  # prompts that begin with as many equal tokens share their prefill
# A batch size runs this often before it becomes a CUDA graph: the first run compiles kernels.
CAPTURE_AFTER = 2
# A CUDA graph makes this many tokens per row: the host waits, and looks for stops, once for all.
STEPS = 4
# It covers the cache up to a multiple of this many slots, however few are used.
SLOTS = 1024
FIRST_SLOTS = 64  # the cache begins with room for this many new tokens per row, then doubles
KEPT_BYTES = 8 << 30  # a cache that is larger is not kept until the next call


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
    model: "Transformer | Engine",
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
    progress: Progress | None = None,
) -> list[Completion]:
    """Continue every prompt.

    Args:
        model: in training or evaluation mode; its weights are read, never changed. An Engine of a
            model for callers that generate again and again.
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
        on_token: called with (index of the prompt, id, log-prob) for every new token; from the
            first again for a prompt that had to wait because memory ended.
        on_done: called with (index of the prompt, its Completion) as soon as it is finished.
        progress: of the prompts; it is told how many are finished, and the new tokens.

    Returns:
        One Completion per prompt. Its log-probs are those of softmax(logits / temperature) over
        `vocab` ids before top_k and top_p (greedy: at temperature 1).

    Raises:
        ValueError: an argument that cannot work.
    """
    _check(prompts, temperature, top_k, top_p, batch_size)
    if temperature == 0:
        seeds = [0] * len(prompts)  # not read
    if seeds is None or len(seeds) != len(prompts):
        raise ValueError("temperature > 0 needs one seed per prompt")
    if stop_strings and decode is None:
        raise ValueError("stop_strings need decode, which turns ids into text")
    if not prompts or max_new_tokens < 1:
        return [Completion([], [], False) for _ in prompts]

    engine = model if isinstance(model, Engine) else Engine(model)
    size = min(batch_size, len(prompts))
    longest = max(map(len, prompts))
    decoder = engine.decoder(
        (vocab, temperature, top_k, top_p),
        size,
        longest + min(max_new_tokens, FIRST_SLOTS),
        longest + max_new_tokens,
    )
    batch = _Batch(decoder, prompts, random_keys(seeds), max_new_tokens, size)
    stop_ids = np.array(list(stop_ids), dtype=np.int64)
    completions = {}
    while batch.n_rows or batch.pending:
        batch.admit()
        token_SB, logp_SB = batch.decode()
        ended_B = np.zeros(batch.n_rows, dtype=bool)
        stopped_B = np.zeros(batch.n_rows, dtype=bool)
        for token_B, logp_B in zip(token_SB, logp_SB, strict=True):
            rows = np.flatnonzero(~ended_B)
            batch.append(rows, token_B[rows], logp_B[rows])
            if on_token:
                for row in rows.tolist():
                    on_token(int(batch.prompt_B[row]), int(token_B[row]), float(logp_B[row]))
            stopped_B[rows] = np.isin(token_B[rows], stop_ids)
            if decode and stop_strings:
                for row in rows.tolist():
                    stopped_B[row] |= _has_stop_string(batch.new_tokens(row), stop_strings, decode)
            ended_B |= stopped_B | (batch.count_B[: batch.n_rows] == max_new_tokens)
        finished = np.flatnonzero(ended_B)
        if progress:
            progress.add(len(finished), token_SB.size)
        for row in finished.tolist():
            index = int(batch.prompt_B[row])
            logp = batch.logp[row, : batch.count_B[row]].tolist()
            done = Completion(batch.new_tokens(row), logp, bool(stopped_B[row]))
            completions[index] = done
            if on_done:
                on_done(index, done)
        batch.remove(finished)
    engine.rest()
    return [completions[index] for index in range(len(prompts))]


def _check(
    prompts: Sequence[Sequence[int]], temperature: float, top_k: int, top_p: float, batch_size: int
) -> None:
    """Refuse, with a ValueError, what cannot work."""
    for index, prompt in enumerate(prompts):
        if not len(prompt):
            raise ValueError(f"prompt {index} is empty: there is nothing to continue")
    if not 0 <= temperature < math.inf or top_k < 0 or not 0 < top_p <= 1 or batch_size < 1:
        raise ValueError(
            "temperature and top_k must not be negative, top_p in (0, 1], batch_size at least 1"
        )


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


def shared_length(prompts: list[Sequence[int]]) -> int:
    """How many tokens all prompts begin with; 0 for a single one."""
    return len(os.path.commonprefix([list(p) for p in prompts])) if len(prompts) > 1 else 0


# --- what is kept -------------------------------------------------------------------------


class Engine:
    """Generates with one model, and keeps its means from one call of `generate` to the next.

    `model` is what is read: a copy in the compute dtype, with the adapters merged into the weights
    and the layers of one input joined; or the model itself, where it is that already; or its shards
    (`sharding.InShards`), where it says that no GPU has room for the copy.
    """

    def __init__(self, source: Transformer) -> None:
        self.source = source
        self._decoder: _Decoder | None = None

    @functools.cached_property
    def model(self) -> Any:
        source = self.source
        dtype = source.compute_dtype or source.head_VD.dtype
        if generates_in_shards(source):
            return InShards(source, dtype)
        is_cuda = source.head_VD.is_cuda
        is_trained = any(p.requires_grad for p in source.parameters())
        is_cast = any(p.dtype != dtype for p in source.parameters())
        is_held = not adapters(source) and not is_sharded(source)
        if is_held and not is_cast and not (is_cuda and is_trained):
            if is_cuda:
                fuse_products(source)
            return source
        with torch.device("meta"):
            plain = Transformer(source.config, source.compute_dtype)
        # What has that dtype already (the frozen base under LoRA) is shared, not copied.
        weights = {name: p.detach().to(dtype) for name, p in plain_parameters(source)}
        plain.load_state_dict(weights, assign=True)
        plain.requires_grad_(False)
        fuse_products(plain)
        if source.layers[0].is_compiled:
            plain.compile_blocks()
        return plain

    def refresh(self) -> None:
        """Take over the weights as they are now, in place: recorded steps hold their addresses."""
        if "model" not in self.__dict__ or self.model is self.source:
            return
        if isinstance(self.model, InShards):
            self.model.refresh()
            return
        copies = dict(self.model.named_parameters())
        for name, p in plain_parameters(self.source):
            if copies[name].data_ptr() != p.data_ptr():
                copies[name].copy_(p)

    def decoder(self, settings: tuple, size: int, slots: int, max_slots: int) -> "_Decoder":
        """What makes tokens for `size` rows.

        Args:
            settings: (vocab, temperature, top_k, top_p) as for `generate`.
            slots, max_slots: of the cache, at first and at most.
        """
        self.refresh()
        max_slots = -(-(max_slots + STEPS) // CAPACITY) * CAPACITY
        kept = self._decoder
        is_fit = kept and size <= kept.cache.rows and max_slots <= kept.cache.max_slots
        if kept and is_fit and settings == kept.settings:
            if slots > kept.cache.slots:
                kept.grow(slots, kept.size)
            kept.cache.clear()
            kept.sampler.refresh()
            return kept
        self._decoder = kept = None  # its memory is free before there is another
        model = self.model
        vocab, *filters = settings
        sampler = Sampler(model.head_VD, vocab or len(model.head_VD), size, *filters)
        cache = KVCache(model, size, slots, max_slots)
        self._decoder = _Decoder(model, sampler, cache, settings)
        return self._decoder

    def rest(self) -> None:
        """Called after generation: training gets the memory of a large cache."""
        if self._decoder:
            self._decoder.sampler.rest()
        if self._decoder and self._decoder.cache.nbytes > KEPT_BYTES:
            self._decoder = None


def fuse_products(model: Transformer) -> None:
    """Compute queries, keys and values in one product, and the MLP's gate and up in one."""
    for block in model.layers:
        attention, mlp = cast(Any, block.self_attn), cast(Any, block.mlp)
        if attention.fused is None:
            attention.fused = _fuse(attention.q_proj, attention.k_proj, attention.v_proj)
            mlp.fused = _fuse(mlp.gate_proj, mlp.up_proj)


def _fuse(*layers: torch.nn.Linear) -> Fused:
    """One weight and bias for layers of one input.

    The layers' own become views of them: what is copied into those is seen here, at no memory.
    """
    weight_OD = _join([layer.weight for layer in layers])
    biases = [layer.bias for layer in layers]
    return weight_OD, None if biases[0] is None else _join(biases)


def _join(parts: Sequence[Tensor]) -> Tensor:
    joint = torch.cat([part.data for part in parts])
    views = joint.split([len(part) for part in parts])
    for part, view in zip(parts, views, strict=True):
        part.data = view
    return joint


@functools.cache
def capture_stream(device: torch.device) -> Any:
    """The one stream on which graphs are recorded: cuBLAS keeps a workspace for each."""
    return torch.cuda.Stream(device)


# --- a step -------------------------------------------------------------------------------


class _Decoder:
    """Makes new tokens for the first rows of the cache, in buffers that stay in place.

    On a GPU, launching the hundreds of small kernels of a step takes longer than running them. So
    the number of rows is rounded up to a bucket (further rows cost nothing, whatever they hold),
    and STEPS steps of a bucket that has come up CAPTURE_AFTER times are recorded as a CUDA graph
    and replayed.
    """

    def __init__(self, model: Any, sampler: Sampler, cache: KVCache, settings: tuple) -> None:
        self.model, self.sampler, self.cache, self.settings = model, sampler, cache, settings
        head_VD, self.size = model.head_VD, cache.rows
        # Of each row: its newest token, the key of its random numbers, the token's position, and
        # how many tokens are new. A step writes what the next one reads.
        self.host_4B = torch.zeros(4, self.size, dtype=torch.long, pin_memory=head_VD.is_cuda)
        self.state_4B = self.host_4B.to(head_VD.device, copy=True)
        self.hidden_BD = head_VD.new_zeros(self.size, head_VD.shape[1])
        self.uses_graphs = uses_graphs(cache) and not isinstance(model, InShards)
        self.steps = STEPS if self.uses_graphs and not sampler.synchronizes else 1
        self.step_S1 = torch.arange(self.steps, device=head_VD.device).unsqueeze(1)
        # Ids (exact in fp64) and log-probs: one transfer.
        self.sampled_2SB = torch.zeros(
            2, self.steps, self.size, dtype=torch.double, device=head_VD.device
        )
        self.graphs, self.runs, self.pool = {}, Counter(), None

    def grow(self, slots: int, rows: int) -> None:
        """Give the cache so many slots, and so many rows."""
        self.cache.grow(slots, rows)
        self.size = rows
        self.graphs, self.runs, self.pool = {}, Counter(), None  # they hold its old address

    def set(self, state_4B: np.ndarray) -> None:
        """Set the rows' tokens, keys, positions and counts."""
        n = state_4B.shape[1]
        self.host_4B[:, n:] = 0
        self.host_4B.numpy()[:, :n] = state_4B
        self.state_4B.copy_(self.host_4B, non_blocking=True)

    def __call__(self, n: int, used: int) -> tuple[np.ndarray, np.ndarray]:
        """Make self.steps tokens for each of n rows.

        Args:
            used: how many slots the longest row will have.

        Returns:
            Ids and their log-probs, [S, B].
        """
        with torch.cuda.device_of(self.state_4B):
            self._replay(n, used)
            if self.sampler.synchronizes:
                self._sample(n, self._numbers(n)[0], 0)
        token_SB, logp_SB = self.sampled_2SB[:, :, :n].cpu().numpy()
        return token_SB.astype(np.int64), logp_SB

    def _replay(self, n: int, used: int) -> None:
        if not self.uses_graphs:
            return self._run(n, used)
        rows = _bucket(n, self.size)
        used = min(-(-used // SLOTS) * SLOTS, self.cache.slots)
        key = rows, used
        if key in self.graphs:
            return self.graphs[key].replay()
        self._run(rows, used)
        self.runs[key] += 1
        if self.runs[key] == CAPTURE_AFTER:
            graph = record(functools.partial(self._run, rows, used), self.pool)
            self.graphs[key], self.pool = graph, graph.pool()

    def _run(self, rows: int, used: int) -> None:
        u_SB = None if self.sampler.synchronizes else self._numbers(rows)
        for step in range(self.steps):
            token_B, _, position_B, _ = self.state_4B[:, :rows]
            attend = DecodeAttention(self.cache, position_B, used)
            self.hidden_BD[:rows] = self.model(token_B, position_B, attend)
            if u_SB is not None:
                self._sample(rows, u_SB[step], step)

    def _numbers(self, rows: int) -> Tensor:
        """The random numbers of all steps, [S, B]: hashing is many small kernels."""
        _, key_B, _, count_B = self.state_4B[:, :rows]
        u_SB = uniform(key_B, count_B + self.step_S1)
        count_B += self.steps
        return u_SB

    def _sample(self, rows: int, u_B: Tensor, step: int) -> None:
        token_B, logp_B = self.sampler(self.hidden_BD[:rows], u_B)
        self.sampled_2SB[0, step, :rows], self.sampled_2SB[1, step, :rows] = token_B, logp_B
        self.state_4B[0, :rows] = token_B
        self.state_4B[2, :rows] += 1


def _bucket(n: int, size: int) -> int:
    """n rounded up to 1, 16 or a multiple of 64, at most `size`: few graphs."""
    for bucket in (1, 16):
        if n <= bucket:
            return min(size, bucket)
    return min(size, -(-n // 64) * 64)


def record(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
    """run() as a CUDA graph: replay() repeats its kernels on the same addresses.

    Graphs of one pool share their scratch memory. `torch.cuda.graph` would also return all unused
    memory to the driver, which training then has to ask for again.
    """
    graph, current = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    stream = capture_stream(current.device)
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        # thread_local: other threads may go on with what they do.
        graph.capture_begin(pool=pool, capture_error_mode="thread_local")
        try:
            run()
        finally:
            graph.capture_end()
    current.wait_stream(stream)
    return graph


# --- the batch ----------------------------------------------------------------------------


class _Batch:
    """The prompts that run in rows [0, n_rows), and those that wait.

    Of each row: the index of its prompt, its newest token, how many tokens are new, and these
    tokens with their log-probs.
    """

    def __init__(
        self,
        decoder: _Decoder,
        prompts: Sequence[Sequence[int]],
        keys: np.ndarray,
        max_new_tokens: int,
        size: int,
    ) -> None:
        self.decoder, self.prompts, self.keys = decoder, prompts, keys
        self.size, self.n_rows = size, 0
        self.is_changed = True  # whether the decoder has yet to be told which rows there are
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
        self.is_changed = True

    def _prefill(self, rows: list[int]) -> None:
        """Fill the cache for new rows, in packs of at most PREFILL_TOKENS (or one prompt).

        What all of them begin with, the examples of a few-shot prompt say, is computed once.
        """
        prompts = {row: self.prompts[self.prompt_B[row]][:-1] for row in rows}
        shared = shared_length(list(prompts.values()))
        if shared < SHARED_TOKENS or by_kernel(self.decoder.cache):
            shared = 0
        else:
            self._prefill_pack({rows[0]: prompts[rows[0]][:shared]}, 0)
            self.decoder.cache.copy_rows(rows[1:], rows[:1] * (len(rows) - 1), shared)
        pack, total = {}, 0
        for row, prompt in prompts.items():
            rest = prompt[shared:]
            if pack and total + len(rest) > PREFILL_TOKENS:
                self._prefill_pack(pack, shared)
                pack, total = {}, 0
            if len(rest):
                pack[row] = rest
            total += len(rest)
        if pack:
            self._prefill_pack(pack, shared)

    def _prefill_pack(self, pack: dict[int, Sequence[int]], past: int) -> None:
        """Read tokens into rows of the cache, behind the `past` tokens that are there."""
        cache = self.decoder.cache
        tokens_T = torch.from_numpy(np.concatenate(list(pack.values()))).to(cache.device)
        attend = PrefillAttention(cache, list(pack), [len(p) for p in pack.values()], past)
        self.decoder.model(tokens_T, attend.position_T, attend)

    def decode(self) -> tuple[np.ndarray, np.ndarray]:
        """New tokens for every row and their log-probs, [S, B]; `append` takes them in."""
        used = self._reserve()
        rows = np.arange(self.n_rows)
        if self.is_changed:
            key_B = self.keys[self.prompt_B[rows]]
            state = (self.token_B[rows], key_B, self.positions(rows), self.count_B[rows])
            self.decoder.set(np.stack(state))
            self.is_changed = False
        return self.decoder(self.n_rows, used)

    def _reserve(self) -> int:
        """Make room for what the decoder will write. Returns the slots that the longest row needs.

        Where memory ends, the batch gets smaller: the rows that lose least wait again, and then
        get the same tokens as before.
        """
        cache = self.decoder.cache
        used = int(self.positions(np.arange(self.n_rows)).max()) + self.decoder.steps
        if used > cache.slots:
            wanted = self.size if self.pending else self.n_rows
            slots, self.size = cache.shape_for(used, wanted)
            evicted = np.argsort(-self.count_B[: self.n_rows], kind="stable")[self.size :]
            self.pending.extend(self.prompt_B[evicted].tolist())
            self.remove(evicted)
            self.decoder.grow(slots, self.size)
        return used

    def append(self, rows: np.ndarray, token_B: np.ndarray, logp_B: np.ndarray) -> None:
        """Append a token to each of these rows."""
        count_B = self.count_B[rows]
        self.tokens[rows, count_B] = self.token_B[rows] = token_B
        self.logp[rows, count_B] = logp_B
        self.count_B[rows] += 1

    def remove(self, finished: np.ndarray) -> None:
        """Overwrite finished rows by the last ones."""
        if not len(finished):
            return
        self.is_changed = True
        keep = self.n_rows - len(finished)
        holes = finished[finished < keep]
        last = np.setdiff1d(np.arange(keep, self.n_rows), finished)
        self.n_rows = keep
        for state in (self.prompt_B, self.token_B, self.count_B, self.tokens, self.logp):
            state[holes] = state[last]
        self._copy_rows(holes.tolist(), last.tolist())

    def _copy_rows(self, to: list[int], source: list[int]) -> None:
        if len(to):
            self.decoder.cache.copy_rows(to, source, int(self.positions(to).max()))
