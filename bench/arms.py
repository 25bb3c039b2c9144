"""The embedded task's arms at equal student tokens, over seeds.

    python -m bench.arms --seeds 3

SFT, KD off-policy and on-policy, GRPO from scratch, KD then GRPO. KD then GRPO is the default `kd`
run and the default `grpo` run from its checkpoint. The other arms begin at the same random weights
and get as many steps as come to the same number of tokens that the student is trained on (prompts
included; the longer run's own count, so within a few per cent). One thread a run, two runs at a
time; finished runs are read, not run again. Held-out accuracy of 400, greedy.
"""

import statistics
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.kd_vs_sft import ROOT, interval, parser_of, read_metrics, train

# Tokens of a step, measured; the count that was reached is printed.
STEP_TOKENS = {"sft": 2143, "kd": 2143, "kd on-policy": 2143, "grpo": 13_500}


class Result(NamedTuple):
    accuracy: float
    tokens: int


def tokens_of(runs: Path, *names: str) -> int:
    """Tokens that the student was trained on in these runs together."""
    total = 0
    for name in names:
        total += max(line.get("train/tokens", 0) for line in read_metrics(runs / name))
    return total


def kd_then_grpo(runs: Path, seed: int) -> tuple[float, float]:
    """Held-out accuracy after KD, and after GRPO from its checkpoint."""
    kd = train(f"kd-{seed}", runs, "--mode=kd", f"--seed={seed}")
    checkpoint = runs / f"kd-{seed}" / "checkpoints" / f"step-{kd.steps}"
    options = ("--mode=grpo", f"--seed={seed}", f"--model={checkpoint}")
    grpo = train(f"grpo-after-kd-{seed}", runs, *options)
    seconds = grpo.step_seconds * grpo.steps
    print(
        f"seed {seed}: KD {kd.accuracy:.1%}, then GRPO {grpo.accuracy:.1%} ({seconds:.0f} s)",
        flush=True,
    )
    return kd.accuracy, grpo.accuracy


def random_weights(runs: Path, tokenizer: str) -> Path:
    """Random weights as a checkpoint: one step of SFT at a rate of nothing."""
    train("random", runs, "--mode=sft", tokenizer, "--steps=1", "--lr=1e-12")
    return runs / "random" / "checkpoints" / "step-1"


def arm_options(runs: Path) -> dict[str, list[str]]:
    teacher = next(runs.glob("teacher-*/checkpoints/step-*[0-9][0-9][0-9]"))
    tokenizer = f"--tokenizer={teacher}"
    on_policy = ["--kd_prefix=student", "--kd_mix=0.5", "--sample_tokens=96"]
    start = random_weights(runs, tokenizer)
    return {
        "sft": ["--mode=sft", tokenizer],
        "kd": ["--mode=kd"],
        "kd on-policy": ["--mode=kd", *on_policy],
        "grpo": ["--mode=grpo", f"--model={start}", tokenizer],
    }


def run_arms(
    pool: ThreadPoolExecutor, runs: Path, seeds: Sequence[int], budget: int
) -> dict[str, list[Result]]:
    """Every arm at `budget` student tokens, its results by seed."""
    arms = arm_options(runs)

    def one(arm: str, seed: int) -> Result:
        name = f"{arm.replace(' ', '-')}-long-{seed}"
        steps = round(budget / STEP_TOKENS[arm])
        run = train(name, runs, *arms[arm], f"--seed={seed}", f"--steps={steps}")
        return Result(run.accuracy, tokens_of(runs, name))

    futures = {arm: [pool.submit(one, arm, seed) for seed in seeds] for arm in arms}
    return {arm: [future.result() for future in futures[arm]] for arm in arms}


def print_arm(name: str, results: Sequence[Result]) -> None:
    accuracies = [result.accuracy for result in results]
    tokens = statistics.mean(result.tokens for result in results)
    by_seed = "  ".join(f"{accuracy:.1%}" for accuracy in accuracies)
    print(f"{name:<16}{tokens:>16,.0f}   {by_seed}   mean {interval(accuracies)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__ or "", 3, ROOT / "runs" / "arms")
    parser.add_argument("--only-grpo", action="store_true", help="KD then GRPO alone")
    args = parser.parse_args(argv)
    runs: Path = args.runs
    runs.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seeds)
    with ThreadPoolExecutor(2) as pool:
        pairs = list(pool.map(lambda seed: kd_then_grpo(runs, seed), seeds))
        gains = [after - before for before, after in pairs]
        print(
            f"GRPO after KD raises accuracy by {interval(gains)} "
            f"(95 %, paired t, {args.seeds} seeds)",
            flush=True,
        )
        if args.only_grpo:
            return 0
        budget = tokens_of(runs, "kd-0", "grpo-after-kd-0")
        results = run_arms(pool, runs, seeds, budget)
    print(f"{'arm':<16}{'student tokens':>16}   accuracy by seed")
    for arm, of_arm in results.items():
        print_arm(arm, of_arm)
    print_arm("kd then grpo", [Result(after, budget) for _, after in pairs])
    return 0


if __name__ == "__main__":
    sys.exit(main())
