"""The embedded task's arms at equal student tokens, over seeds: SFT, KD off-policy and on-policy, GRPO from scratch, KD then GRPO.

    python -m bench.arms --seeds 3

KD then GRPO is the default `kd` run and the default `grpo` run from its checkpoint. The other arms begin at the same random weights and get
as many steps as come to the same number of tokens that the student is trained on (prompts included; the longer run's own count, so within
a few per cent). One thread a run, two runs at a time; finished runs are read, not run again. Held-out accuracy of 400, greedy.
"""

import argparse
import json
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from bench.kd_vs_sft import ROOT, T_975, run

STEP_TOKENS = {
    "sft": 2143,
    "kd": 2143,
    "kd on-policy": 2143,
    "grpo": 13_500,
}  # measured; the count that was reached is printed


def tokens(runs, *names):
    """Tokens that the student was trained on in these runs together."""
    lines = [
        [json.loads(line) for line in (runs / n / "metrics.jsonl").read_text().splitlines()]
        for n in names
    ]
    return sum(max(m.get("train/tokens", 0) for m in run) for run in lines)


def interval(values):
    half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{statistics.mean(values):+.1%} [{statistics.mean(values) - half:+.1%}, {statistics.mean(values) + half:+.1%}]"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only-grpo", action="store_true", help="KD then GRPO alone")
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "arms")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    seeds = range(args.seeds)

    def chain(seed):
        before = run(f"kd-{seed}", args.runs, "--mode=kd", f"--seed={seed}")
        checkpoint = args.runs / f"kd-{seed}" / "checkpoints" / f"step-{before[2]}"
        after = run(
            f"grpo-after-kd-{seed}",
            args.runs,
            "--mode=grpo",
            f"--seed={seed}",
            f"--model={checkpoint}",
        )
        print(
            f"seed {seed}: KD {before[0]:.1%}, then GRPO {after[0]:.1%} ({after[1] * after[2]:.0f} s)",
            flush=True,
        )
        return before[0], after[0]

    with ThreadPoolExecutor(2) as pool:
        pairs = list(pool.map(chain, seeds))
        print(
            f"GRPO after KD raises accuracy by {interval([after - before for before, after in pairs])} (95 %, paired t, {args.seeds} seeds)",
            flush=True,
        )
        if args.only_grpo:
            return
        budget = tokens(args.runs, "kd-0", "grpo-after-kd-0")
        teacher = next(args.runs.glob("teacher-*/checkpoints/step-*[0-9][0-9][0-9]"))
        arms = {
            "sft": ["--mode=sft", f"--tokenizer={teacher}"],
            "kd": ["--mode=kd"],
            "kd on-policy": [
                "--mode=kd",
                "--kd_prefix=student",
                "--kd_mix=0.5",
                "--sample_tokens=96",
            ],
            "grpo": ["--mode=grpo", "--model=random", f"--tokenizer={teacher}"],
        }
        start = (
            args.runs / "random" / "checkpoints" / "step-1"
        )  # one step of sft at a rate of nothing: random weights as a checkpoint
        run("random", args.runs, "--mode=sft", f"--tokenizer={teacher}", "--steps=1", "--lr=1e-12")
        jobs = [(arm, seed) for arm in arms for seed in seeds]

        def one(job):
            arm, seed = job
            options = [o.replace("=random", f"={start}") for o in arms[arm]]
            name = f"{arm.replace(' ', '-')}-long-{seed}"
            result = run(
                name,
                args.runs,
                *options,
                f"--seed={seed}",
                f"--steps={round(budget / STEP_TOKENS[arm])}",
            )
            return result[0], tokens(args.runs, name)

        results = dict(zip(jobs, pool.map(one, jobs), strict=True))
    print(f"{'arm':<16}{'student tokens':>16}   accuracy by seed")
    for arm in arms:
        values = [results[arm, seed] for seed in seeds]
        print(
            f"{arm:<16}{statistics.mean(v[1] for v in values):>16,.0f}   {'  '.join(f'{v[0]:.1%}' for v in values)}   mean {interval([v[0] for v in values])}"
        )
    after = [pair[1] for pair in pairs]
    print(
        f"{'kd then grpo':<16}{budget:>16,.0f}   {'  '.join(f'{a:.1%}' for a in after)}   mean {interval(after)}"
    )


if __name__ == "__main__":
    main()
