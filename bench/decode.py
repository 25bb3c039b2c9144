"""Decoding on a GPU: is its attention right, how near the copy ceiling, and the whole engine.

    python -m bench.decode --json decode.json      # a few minutes; --no-engine: the kernel alone

First correctness (kernels/decode_attention.py), with every assembler at hand: against fp64 on
ragged lengths and several tokens a step, a row alone against the same row in a batch to the bit, a
CUDA graph whose lengths change under it, slots of NaN beyond the ends, 100 repeats to the bit.
Then a step's attention of 24 layers, each with its own cache (one layer's would stay in the L2
cache), as one CUDA graph: batch 64 and 256 at 1,024 tokens, 14 query heads on 2 key-value heads of
dimension 64 (and 12 on 2 of 128). Bytes are those of the keys and values that a step must read;
the ceiling is a device copy, timed beside. Last, 256 sequences x 512 new tokens of a Qwen2.5-0.5B
with random weights, prompts of 64 ids, sampled at temperature 1, beside `transformers`. What may
hang or fail without harm to training comes at the end, in processes of its own. Exit code 1: a
check failed; 2: no GPU.
"""

import argparse
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import measure
from bench.assemblers import check_with_others
from bench.attention import HEADS, LIMIT
from bench.measure import Bench
from bench.processes import last_json, run_limited
from kernels import backend
from kernels.decode_attention import decode_attention, decode_reference, rotate_and_store
from model.transformer import rope_tables

EDGES = [0, 1, 63, 64, 65, 255, 256, 257, 511, 512, 513, 1000, 1023, 1024]
SAMPLING = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "pad_token_id": 0}
PROMPT = 64
# Its manager thread may hang, and it sizes a cache from the memory that is free: last, and alone.
BATCHING = "transformers continuous batching"
ENGINE_COLUMNS = ("way", "tokens_per_s", "seconds", "note")

# Queries [B, steps, heads, E], keys and values [B, kv heads, slots, E], lengths [B].
Case = tuple[Tensor, Tensor, Tensor, Tensor]


def cache(
    lengths: Sequence[int],
    size: int,
    slots: int,
    steps: int,
    device: torch.device,
    empty: float = float("nan"),
) -> Case:
    """Random queries and a cache; `empty` lies in the slots beyond the ends."""
    generator = torch.Generator(device=device).manual_seed(len(lengths))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    heads, kv_heads = HEADS[size]

    def make(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=dtype)

    keys_values = make(2, len(lengths), kv_heads, slots, size)
    length_B = torch.tensor(lengths, device=device)
    beyond_BS = torch.arange(slots, device=device) >= length_B.unsqueeze(1)
    keys_values.masked_fill_(beyond_BS[None, :, None, :, None], empty)
    keys, values = keys_values
    return make(len(lengths), steps, heads, size), keys, values, length_B


def exact(q: Tensor, k: Tensor, v: Tensor, length_B: Tensor) -> Tensor:
    """From the definition in fp64: a sequence and a token at a time."""
    output = torch.zeros_like(q, dtype=torch.float64)
    group, steps = q.shape[2] // k.shape[1], q.shape[1]
    for b, length in enumerate(length_B.tolist()):
        for i in range(steps):
            seen = length - steps + i + 1
            if seen <= 0:
                continue
            keys = k[b, :, :seen].double().repeat_interleave(group, 0)
            values = v[b, :, :seen].double().repeat_interleave(group, 0)
            score = torch.einsum("he,hse->hs", q[b, i].double(), keys) * q.shape[3] ** -0.5
            output[b, i] = torch.einsum("hs,hse->he", score.softmax(1), values)
    return output


def graphed(
    run: Callable[[], Sequence[Tensor]], device: torch.device
) -> tuple[Callable[[], Any], Sequence[Tensor]]:
    """run as a CUDA graph (as it is on a CPU): (replay, the tensors that a replay fills)."""
    if device.type != "cuda":
        out = run()

        def again() -> None:
            for kept, new in zip(out, run(), strict=True):
                kept.copy_(new)

        return again, out
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        run()  # compiles outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    return graph.replay, out


# --- correctness ---------------------------------------------------------------------------------


def alone_equals_batch(case: Case, cut: int, whole: Tensor) -> bool:
    """Whether each row by itself, in a cache of `cut` slots, gives the same bits."""
    q, k, v, length_B = case
    alone = []
    for i in range(len(length_B)):
        row = slice(i, i + 1)
        alone.append(decode_attention(q[row], k[row, :, :cut], v[row, :, :cut], length_B[row]))
    return torch.equal(torch.cat(alone), whole)


def stored(size: int, device: torch.device) -> float:
    """The error of rotated queries and keys in a cache, beside fp64, and of values (none)."""
    heads, kv_heads = HEADS[size]
    generator = torch.Generator(device=device).manual_seed(0)
    widths = [heads * size, kv_heads * size, kv_heads * size]
    joint = torch.randn(64, sum(widths), generator=generator, device=device).bfloat16()
    q, k, v = (x.unflatten(1, (-1, size)) for x in joint.split(widths, 1))
    slot_B = torch.arange(64, device=device)
    rope = rope_tables(slot_B, size, 1e6, torch.bfloat16)
    kv = joint.new_zeros(2, 64, kv_heads, 64, size)
    rotated = rotate_and_store(q, k, v, rope, kv, slot_B)
    cos, sin = (x.double() for x in rope)
    keys, values = (x[slot_B, :, slot_B] for x in kv)
    errors = [measure.relative_error(values, v)]
    for got, x in ((rotated, q.double()), (keys, k.double())):
        errors.append(measure.relative_error(got, x * cos + x.roll(size // 2, -1) * sin))
    return max(errors)


def graph_follows(case: Case, device: torch.device) -> tuple[bool, bool]:
    """Whether a recorded step follows lengths that change; whether empty rows give zeros."""
    q, k, v, length_B = case
    replay, (out,) = graphed(lambda: (decode_attention(q, k, v, length_B),), device)
    follows = True
    for lengths in (length_B.clamp(min=1) - 1, torch.zeros_like(length_B)):
        length_B.copy_(lengths)  # the graph reads the lengths on the device
        replay()
        follows &= torch.equal(out, decode_attention(q, k, v, length_B))
    return follows, not out.any().item()


def check(device: torch.device, size: int, all_steps: Sequence[int], dry: bool) -> dict:
    """One head dimension, with so many tokens a step each: a row of the record."""
    lengths, slots, cut, times = EDGES, 1100, 1024, 100
    many = [1024] * 64
    if dry:
        lengths, slots, cut, times = EDGES[:5], 80, 80, 2
        many = [40] * 2
    errors = {}
    for steps in all_steps:
        case = cache(lengths, size, slots, steps, device)
        error = measure.relative_error(decode_attention(*case), exact(*case))
        errors[f"steps_{steps}"] = error
    case = cache(lengths, size, slots, 1, device)
    same = alone_equals_batch(case, cut, decode_attention(*case))
    follows, zero = graph_follows(case, device)
    case = cache(many, size, slots, 1, device)
    unequal = measure.unequal_repeats(lambda: (decode_attention(*case),), times)
    if not dry:  # a kernel alone: interpreted by tests/triton_interpreter/test_sampler.py
        errors["store"] = stored(size, device)
    right = max(errors.values()) <= LIMIT and follows and zero and unequal == 0 and (same or dry)
    return errors | {
        "alone_equals_batch": same,
        "graph_follows": follows,
        "empty_is_zero": zero,
        "unequal_repeats": unequal,
        "right": right,
    }


def checks(bench: Bench, all_steps: Sequence[int]) -> None:
    for size in HEADS:
        run = functools.partial(check, bench.device, size, all_steps, bench.dry)
        row, why = measure.attempt(run)
        bench.check("checks", {"E": size} | (row or {"failed": why, "right": False}))


# --- the kernel's speed --------------------------------------------------------------------------


def masked_sdpa(q: Tensor, k: Tensor, v: Tensor, length_B: Tensor) -> Tensor:
    """What a user has in PyTorch: the whole capacity under a mask."""
    seen = torch.arange(k.shape[2], device=k.device) < length_B[:, None, None, None]
    queries = q.transpose(1, 2)
    output = F.scaled_dot_product_attention(queries, k, v, attn_mask=seen, enable_gqa=True)
    return output.transpose(1, 2)


def layer_ms(attend: Callable[..., Tensor], cases: Sequence[Case], device: torch.device) -> float:
    """Milliseconds of a layer, in one graph of all."""
    replay, _ = graphed(lambda: [attend(*case) for case in cases], device)
    return measure.milliseconds(replay, device) / len(cases)


def speeds(bench: Bench) -> None:
    layers, context, batches = (2, 40, (2, 3)) if bench.dry else (24, 1024, (64, 256))
    arrived = torch.zeros(256 * 16, dtype=torch.int32, device=bench.device)

    def ours(q: Tensor, k: Tensor, v: Tensor, length_B: Tensor) -> Tensor:
        """With counters that are kept, as the engine has them."""
        return decode_attention(q, k, v, length_B, 0, arrived)

    ways = {"srlm": ours, "reference": decode_reference, "masked sdpa": masked_sdpa}
    ceiling = bench.copy_ceiling()
    bench.put("copy_bytes_per_s", ceiling)
    for size in HEADS:
        for batch in batches:
            cases = []
            for _ in range(layers):
                cases.append(cache([context] * batch, size, context + 64, 1, bench.device, empty=0))
            _, kv_heads = HEADS[size]
            needed = 2 * cases[0][1].element_size() * batch * kv_heads * context * size
            for name, attend in ways.items():
                run = functools.partial(layer_ms, attend, cases, bench.device)
                ms, why = measure.attempt(run)
                row = {"E": size, "batch": batch, "way": name, "microseconds_a_layer": None}
                if ms:
                    rate = needed / ms * 1e3
                    row["microseconds_a_layer"] = ms * 1e3
                    row |= {"bytes_per_s": rate, "of_copy": rate / ceiling}
                bench.keep("decode", row | {"note": why})


# --- the whole engine ----------------------------------------------------------------------------


class Engine:
    """The same random weights in our engine and in `transformers`; nothing stops early."""

    def __init__(self, bench: Bench) -> None:
        from model.checkpoint import build_model
        from model.presets import PRESETS

        self.device, self.dtype = bench.device, bench.dtype
        preset, self.count, self.new = "qwen2.5-0.5b", 256, 512
        if bench.dry:
            preset, self.count, self.new = "tiny", 3, 6
        config = PRESETS[preset]
        self.model = build_model(
            config,
            None,
            device=self.device,
            seed=0,
            weight_dtype=self.dtype,
            compute_dtype=self.dtype,
        )
        generator = torch.Generator().manual_seed(0)
        shape = (self.count, PROMPT)
        self.prompts = torch.randint(config.vocab_size, shape, generator=generator).tolist()

    def ours(self, engine: Any, new: int) -> int:
        """How many tokens were generated, as all ways say."""
        from model.generate import generate

        options = {"temperature": 1.0, "seeds": range(self.count), "batch_size": self.count}
        return sum(len(c.tokens) for c in generate(engine, self.prompts, new, [], **options))

    def compiled(self) -> Any:
        model = copy.deepcopy(self.model)
        model.compile_blocks()
        return model

    def theirs(self) -> Any:
        from bench.generate import reference

        model = reference(self.model)
        if model is None:
            raise ImportError("transformers is not installed")
        return model.to(self.device, self.dtype)

    def their_generate(self, model: Any, new: int) -> int:
        rows = torch.tensor(self.prompts, device=self.device)
        mask = torch.ones_like(rows)
        out = model.generate(rows, attention_mask=mask, max_new_tokens=new, **SAMPLING)
        return out[:, PROMPT:].numel()

    def their_batching(self, model: Any, new: int) -> int:
        from transformers import GenerationConfig

        settings = GenerationConfig(max_new_tokens=new, eos_token_id=-1, **SAMPLING)
        results = model.generate_batch(
            inputs=self.prompts, generation_config=settings, progress_bar=False
        )
        return sum(len(result.generated_tokens) for result in results.values())

    def way(self, name: str) -> Callable[[int], int]:
        """The function (new tokens a sequence -> tokens generated) of a name in `names`."""
        from model import generate as model_generate

        if name == "srlm":
            return functools.partial(self.ours, model_generate.Engine(self.model))
        if name == "srlm, compiled":
            return functools.partial(self.ours, model_generate.Engine(self.compiled()))
        if name == BATCHING:
            return functools.partial(self.their_batching, self.theirs())
        return functools.partial(self.their_generate, self.theirs())

    def names(self) -> list[str]:
        if self.device.type != "cuda":
            return ["srlm", "transformers generate"]
        return ["srlm", "srlm, compiled", "transformers generate"]

    def timed(self, name: str) -> dict:
        """A row: new tokens per second; a way that ended before its time has no rate."""
        row = {"way": name, "tokens_per_s": None, "seconds": None}

        def run() -> tuple[float, int]:
            generate = self.way(name)
            generate(4)
            return measure.timed_seconds(lambda: generate(self.new), self.device)

        got, why = measure.attempt(run)
        if got:
            seconds, tokens = got
            if tokens == self.count * self.new:
                row |= {"tokens_per_s": tokens / seconds, "seconds": seconds}
            else:
                why = f"{tokens:,} tokens of {self.count * self.new:,}"
        return row | {"note": why}


def engine(bench: Bench) -> None:
    built, why = measure.attempt(lambda: Engine(bench))
    if not built:
        bench.keep("engine", {"way": "srlm", "tokens_per_s": None, "note": why}, ENGINE_COLUMNS)
        return
    for name in built.names():
        bench.keep("engine", built.timed(name), ENGINE_COLUMNS)


def batching(bench: Bench) -> None:
    """Continuous batching of transformers, in a process with a limit."""
    command = [sys.executable, "-m", "bench.decode", "--batching"]
    outcome = run_limited(command, limit_s=120)
    row = last_json(outcome.stdout) or {"way": BATCHING, "note": outcome.failed}
    bench.keep("engine", row, ENGINE_COLUMNS)


def eight_steps(bench: Bench) -> None:
    """Eight tokens a step, which the engine never asks for: a failure is told, and no more."""
    outcome = run_limited(
        [sys.executable, "-m", "bench.decode", "--only-check", "--steps", "8"], limit_s=90
    )
    row = {"failed": outcome.failed, "record": last_json(outcome.stdout)}
    bench.keep("eight_steps", row, ("failed",))


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__ or "", "--json", "decode.json", minutes=6)
    measure.add_check_options(parser)
    parser.add_argument("--steps", default="1,2", help="tokens a step that are checked")
    parser.add_argument("--no-engine", action="store_true", help="leave the whole engine out")
    parser.add_argument("--batching", action="store_true", help=f"{BATCHING} alone")
    args = parser.parse_args(argv)
    bench = Bench(args.dry, args.minutes, "" if args.only_check or args.batching else args.path)
    if args.batching:
        bench.record = Engine(bench).timed(BATCHING) | {"right": True}
        return bench.only_checked()
    backend.use("torch" if args.dry else "triton")
    steps = [int(number) for number in args.steps.split(",")]
    checks(bench, [*steps, 8] if args.dry else steps)
    if args.only_check:
        return bench.only_checked()
    speeds(bench)
    print(f"copy ceiling {bench.record['copy_bytes_per_s'] / 1e12:.2f} TB/s")
    print(measure.table(bench.record["decode"]))
    if not args.no_engine:
        backend.use("torch" if args.dry else "auto")  # the engine chooses by itself
        engine(bench)
    if not args.dry:
        later(bench, args)
    return bench.finish()


def later(bench: Bench, args: argparse.Namespace) -> None:
    """What may hang or fail: processes of their own, while there is time."""
    if not args.one_assembler and not bench.out_of_time():
        check_with_others(bench, "bench.decode", limit_s=60)
    if not bench.out_of_time():
        eight_steps(bench)
    if not args.no_engine and not bench.out_of_time():
        batching(bench)


if __name__ == "__main__":
    sys.exit(main())
