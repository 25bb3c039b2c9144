"""The embedded default over seeds: KD against SFT at equal student tokens and at equal wall time.

    python -m bench.kd_vs_sft --seeds 5

For each seed three runs of train.py on one thread each, two at a time: KD as it is by default, SFT
with the same steps (the same tokens), SFT with as many more steps as fit the KD run's training time
(by the median, over seeds, of the ratio of median step times). Prints every held-out accuracy and
the mean differences with 95 % intervals (paired over seeds, Student's t).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from bench.measure import ROOT, median_ratio

# Student's t at 97.5 %, by the number of values.
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


class Run(NamedTuple):
    """A finished run of train.py: held-out accuracy, median seconds of a step, steps."""

    accuracy: float
    step_seconds: float
    steps: int


def read_metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def train(name: str, runs: Path, *options: str) -> Run:
    """Run train.py on one thread; a run that has finished is read, not run again."""
    folder = runs / name
    if not (folder / "curves.png").exists():
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "train.py", "--runs", str(runs), "--name", name]
        command += ["--eval_every=0", "--save_every=0", *options]
        env = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=env)
    accuracies, seconds = [], []
    metrics = read_metrics(folder)
    for line in metrics:
        accuracies += [value for key, value in line.items() if key.endswith("/accuracy")]
        if "train/seconds" in line:
            seconds.append(line["train/seconds"])
    return Run(accuracies[-1], statistics.median(seconds), metrics[-1]["step"])


def teacher_of(runs: Path) -> Path:
    """The checkpoint of the embedded teacher, which a run of one step trains where it is absent."""
    probe = runs / "teacher-probe"
    if not probe.exists():
        command = [sys.executable, "train.py", "--runs", str(runs), "--name", probe.name]
        command += ["--steps=1", "--eval_examples=0"]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return next(runs.glob("teacher-*/checkpoints/step-*[0-9][0-9][0-9]"))


def interval(values: Sequence[float]) -> str:
    """The mean with its 95 % interval, as percentages."""
    mean = statistics.mean(values)
    half = T_975[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1%} [{mean - half:+.1%}, {mean + half:+.1%}]"


def parser_of(doc: str, seeds: int, runs: Path) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=seeds, choices=sorted(T_975))
    parser.add_argument("--runs", type=Path, default=runs)
    return parser


def report(kd: list[Run], sft: list[Run], longer: list[Run]) -> None:
    """Accuracies by seed, their means, and the paired differences."""
    arms = {"KD": kd, "SFT, equal tokens": sft, "SFT, equal time": longer}
    for seed in range(len(kd)):
        accuracies = [f"{name} {runs[seed].accuracy:.1%}" for name, runs in arms.items()]
        print(f"seed {seed}: " + "  ".join(accuracies))
    for name, runs in arms.items():
        print(f"{name:<20} mean {statistics.mean(run.accuracy for run in runs):.1%}")
    for name, others in (("equal tokens", sft), ("equal time", longer)):
        gaps = [a.accuracy - b.accuracy for a, b in zip(kd, others, strict=True)]
        print(f"KD - SFT at {name}: {interval(gaps)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = parser_of(__doc__ or "", 5, ROOT / "runs" / "kd_vs_sft")
    args = parser.parse_args(argv)
    runs: Path = args.runs
    runs.mkdir(parents=True, exist_ok=True)
    tokenizer = f"--tokenizer={teacher_of(runs)}"

    def kd_run(seed: int) -> Run:
        return train(f"kd-{seed}", runs, "--mode=kd", f"--seed={seed}")

    def sft_run(seed: int) -> Run:
        return train(f"sft-{seed}", runs, "--mode=sft", f"--seed={seed}", tokenizer)

    seeds = range(args.seeds)
    with ThreadPoolExecutor(2) as pool:
        kd_futures, sft_futures = pool.map(kd_run, seeds), pool.map(sft_run, seeds)
        kd, sft = list(kd_futures), list(sft_futures)
        ratio = median_ratio([run.step_seconds for run in kd], [run.step_seconds for run in sft])
        steps = round(sft[0].steps * ratio)

        def long_run(seed: int) -> Run:
            options = ("--mode=sft", f"--seed={seed}", tokenizer, f"--steps={steps}")
            return train(f"sft-wall-{seed}", runs, *options)

        longer = list(pool.map(long_run, seeds))
    print(f"a KD step takes {ratio:.2f} times an SFT step: equal time is {steps} SFT steps")
    report(kd, sft, longer)
    return 0


if __name__ == "__main__":
    sys.exit(main())
