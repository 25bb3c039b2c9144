"""Tokens per second of the generation engine beside `transformers.generate`, on a CPU.

    python -m bench.generate

A body of 4 layers x 256 with random weights under the full vocabulary of 151,936 (the preset
`small`), fp32, prompts of 64 ids, sampling at temperature 1 without filters. Both systems have the
same weights and run in turn in one process; medians of `--repeats`.
  equal lengths   16 sequences x 128 new tokens
  ragged          64 sequences that stop at a random 1/40 of the ids (at most 256 tokens): at once,
                  and in batches of 16. The lengths are those of the engine's sequences; a stopping
                  criterion ends those of transformers at the same lengths, which runs each batch
                  until its last sequence stops.
The engine also records every token's log-prob; transformers does not here (it would keep all
scores: 1.2 GB for 16 x 128). Also timed: the head's product alone at 16 rows, the floor that both
share.
"""

import argparse
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bench.measure import median_ratio, timed_seconds
from kernels.chunk import product

PROMPT = 64
CPU = torch.device("cpu")


class Case(NamedTuple):
    """What is generated: new tokens at most, the ids that stop, rows of a batch."""

    name: str
    prompts: list[list[int]]
    limit: int
    stop_ids: list[int]
    batch_size: int


def reference(model: Any) -> Any:
    """transformers' model with the same weights, or None where it is not installed."""
    try:
        import transformers
    except ImportError:
        return None
    from model.hf import config_to_hf

    transformers.logging.set_verbosity_error()
    config = transformers.Qwen2Config(**config_to_hf(model.config, None, "float32"))
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    weights = {f"model.{name}": weight for name, weight in model.state_dict().items()}
    theirs.load_state_dict(weights, strict=False)
    theirs.tie_weights()
    return theirs


def run_ours(model: Any, case: Case) -> list[int]:
    """The lengths that our engine generates."""
    from model.generate import generate

    completions = generate(
        model,
        case.prompts,
        case.limit,
        case.stop_ids,
        temperature=1.0,
        seeds=range(len(case.prompts)),
        batch_size=case.batch_size,
    )
    return [len(completion.tokens) for completion in completions]


def run_theirs(theirs: Any, case: Case, lengths: Sequence[int]) -> None:
    """transformers on the same prompts, a batch after another, each row of the given length."""
    for start in range(0, len(case.prompts), case.batch_size):
        batch = slice(start, start + case.batch_size)
        rows, ends_B = torch.tensor(case.prompts[batch]), torch.tensor(lengths[batch])

        def ended(ids: torch.Tensor, scores: Any, ends_B: torch.Tensor = ends_B) -> torch.Tensor:
            return ids.shape[1] - PROMPT >= ends_B

        theirs.generate(
            rows,
            attention_mask=torch.ones_like(rows),
            max_new_tokens=int(ends_B.max()),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            pad_token_id=0,
            stopping_criteria=[ended],
        )


def compare(case: Case, model: Any, theirs: Any, repeats: int) -> None:
    """Print tokens per second of both."""
    ours_rates, their_rates, lengths = [], [], []
    for _ in range(repeats):
        seconds, lengths = timed_seconds(lambda: run_ours(model, case), CPU)
        ours_rates.append(sum(lengths) / seconds)
        if theirs:
            seconds, _ = timed_seconds(lambda n=lengths: run_theirs(theirs, case, n), CPU)
            their_rates.append(sum(lengths) / seconds)
        print(".", end="", file=sys.stderr, flush=True)
    mean = sum(lengths) / len(lengths)
    facts = (
        f"{case.name:<22}{len(case.prompts):>4} sequences, {mean:5.1f} tokens on average, "
        f"{max(lengths):>3} at most, {case.batch_size:>2} rows:"
    )
    gain = ""
    if theirs:
        ratio = median_ratio(ours_rates, their_rates)
        gain = f"{statistics.median(their_rates):8.1f} transformers, ours {ratio:.2f}x"
    print(f"\r{facts}{statistics.median(ours_rates):8.1f} tokens/s {gain}", flush=True)


def print_floor(model: Any, threads: int) -> None:
    """The head's product of 16 rows, which no engine avoids: the fastest way that was found."""
    hidden, head_VD = torch.randn(16, model.config.hidden_size), model.head_VD.detach()
    transposed_DV, out = head_VD.t().contiguous(), torch.empty(16, len(head_VD))
    ways: list[Callable[[], Tensor]] = [
        lambda: hidden @ head_VD.t(),
        lambda: product(hidden, head_VD.t(), out),
        lambda: product(hidden, transposed_DV, out),
    ]
    floor = min(statistics.median(timed_seconds(w, CPU)[0] for _ in range(9)) for w in ways)
    print(
        f"{model.config.vocab_size:,} ids, {threads} threads, torch {torch.__version__}; the "
        f"head's product of 16 rows: {floor * 1e3:.1f} ms, so at most {16 / floor:.0f} tokens/s "
        "for 16 rows by that product"
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dry", action="store_true", help="a tiny body and few tokens: the script")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    from model.checkpoint import build_model
    from model.presets import PRESETS

    model = build_model(PRESETS["tiny" if args.dry else "small"], None, device="cpu", seed=0)
    theirs, vocab = reference(model), model.config.vocab_size
    generator = torch.Generator().manual_seed(1)
    prompts = torch.randint(vocab, (64, PROMPT), generator=generator).tolist()
    stop_ids = torch.randperm(vocab, generator=generator)[: vocab // 40].tolist()
    equal, most = (4, 8) if args.dry else (128, 256)
    with torch.no_grad():
        warm_up = Case("", prompts[:16], 2, [], 16)
        run_ours(model, warm_up)
        if theirs:
            run_theirs(theirs, warm_up, [2] * 16)
        print_floor(model, args.threads)
        for case in (
            Case("equal lengths", prompts[:16], equal, [], 16),
            Case("ragged", prompts, most, stop_ids, 64),
            Case("ragged, refilled", prompts, most, stop_ids, 16),
        ):
            compare(case, model, theirs, args.repeats)
    return 0


if __name__ == "__main__":
    sys.exit(main())
