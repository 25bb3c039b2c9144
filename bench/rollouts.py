"""Rollouts and GRPO steps of the 0.5B on a GPU, with random weights and prompts of 64 ids.

    python -m bench.rollouts engine     # ragged rollouts one by one, eager and compiled
    python -m bench.rollouts grpo       # whole steps, compiled

engine: six rollouts of 256 sequences with at most 512 new tokens, of which a random 1/256 of the
ids stops one; per rollout the tokens per second, how many CUDA graphs were recorded and how long
that took, and the memory that is allocated afterwards (a leak shows as a rise); then the kernels of
one. grpo: twelve steps of 16 prompts x 16 samples in micro-batches of 32,768 tokens; seconds of
rollout and update, and the peak of memory.
"""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from bench import measure
from bench.grpo_step import GrpoStep, Size
from bench.measure import Bench, timed_seconds
from bench.train_step import profile
from model import generate as engine_module
from model.checkpoint import build_model
from model.presets import PRESETS
from model.transformer import Transformer

COLUMNS = ("model", "rollout", "seconds", "tokens/s", "graphs", "graph seconds", "gb")
STEP_COLUMNS = ("step", "rollout seconds", "update seconds", "tokens/s", "peak gb")


def allocated_gb(device: torch.device, peak: bool = False) -> float:
    if device.type != "cuda":
        return 0.0
    return (torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()) / 1e9


@contextmanager
def counted_graphs(seconds: list[float]) -> Iterator[None]:
    """Appends the seconds that each recording of a CUDA graph takes."""
    record = engine_module.record

    def counted(run: Callable[[], None], pool: Any) -> torch.cuda.CUDAGraph:
        began = time.perf_counter()
        graph = record(run, pool)
        seconds.append(time.perf_counter() - began)
        return graph

    engine_module.record = counted
    try:
        yield
    finally:
        engine_module.record = record


def body(bench: Bench) -> Transformer:
    preset = PRESETS["tiny" if bench.dry else "qwen2.5-0.5b"]
    options = {"device": bench.device, "seed": 0, "compute_dtype": bench.dtype}
    return build_model(preset, None, **options)


def random_ids(model: Transformer, bench: Bench) -> tuple[list[list[int]], list[int]]:
    """Prompts of 64 ids, and the ids that stop a sequence."""
    vocab = model.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    count = 4 if bench.dry else 256
    prompts = torch.randint(vocab, (count, 64), generator=generator).tolist()
    return prompts, torch.randperm(vocab, generator=generator)[: vocab // 256].tolist()


def engine(bench: Bench, profile_path: str) -> None:
    model = body(bench)
    prompts, stop_ids = random_ids(model, bench)
    new_tokens = 8 if bench.dry else 512
    for name in ("eager", "compiled"):
        if name == "compiled" and not bench.dry:
            model.compile_blocks()
        generator = engine_module.Engine(model)

        def rollout(number: int = 0, generator: engine_module.Engine = generator) -> int:
            seeds = range(number * len(prompts), (number + 1) * len(prompts))
            options = {"temperature": 1.0, "seeds": seeds, "batch_size": len(prompts)}
            done = engine_module.generate(generator, prompts, new_tokens, stop_ids, **options)
            return sum(len(completion.tokens) for completion in done)

        for number in range(2 if bench.dry else 6):
            if bench.out_of_time():
                return
            graphs: list[float] = []
            with counted_graphs(graphs):
                seconds, tokens = timed_seconds(lambda n=number: rollout(n), bench.device)
            row = {
                "model": name,
                "rollout": number,
                "seconds": seconds,
                "tokens/s": tokens / seconds,
                "graphs": len(graphs),
                "graph seconds": sum(graphs),
                "gb": allocated_gb(bench.device),
            }
            bench.keep("rollouts", row, COLUMNS)
        if profile_path and not bench.dry:
            profile(rollout, f"{profile_path}.{name}")


def grpo(bench: Bench) -> None:
    model = body(bench)
    if not bench.dry:
        model.compile_blocks()
    prompts, stop_ids = random_ids(model, bench)
    vocab = 500 if bench.dry else 151_665
    size = Size(2, 2, 4, vocab) if bench.dry else Size(16, 16, 512, vocab)
    step = GrpoStep(model, prompts, size, 32_768, stop_ids)
    for number in range(2 if bench.dry else 12):
        if bench.out_of_time():
            return
        if not bench.dry:
            torch.cuda.reset_peak_memory_stats()
        rollout_seconds, _ = timed_seconds(step.rollout, bench.device)
        update_seconds, _ = timed_seconds(step.update, bench.device)
        row = {
            "step": number,
            "rollout seconds": rollout_seconds,
            "update seconds": update_seconds,
            "tokens/s": sum(step.batch.lengths) / (rollout_seconds + update_seconds),
            "peak gb": allocated_gb(bench.device, peak=True),
        }
        bench.keep("steps", row, STEP_COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = measure.parser_of(__doc__ or "", "--out", "rollouts.json", minutes=4)
    parser.add_argument("what", choices=("engine", "grpo"))
    parser.add_argument("--profile", default="", help="write tables of GPU kernels here")
    args = parser.parse_args(argv)
    bench = Bench(args.dry, args.minutes, args.path)
    if args.what == "engine":
        engine(bench, args.profile)
    else:
        grpo(bench)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
