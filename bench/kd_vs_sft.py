"""The embedded default over seeds: KD against SFT at equal student tokens and at equal wall time.

    python -m bench.kd_vs_sft --seeds 5

For each seed three runs of train.py on one thread each, two at a time: KD as it is by default, SFT with the same steps (the same
tokens), SFT with as many more steps as fit the KD run's training time (by the median, over seeds, of the ratio of median step times).
Prints every held-out accuracy and the mean differences with 95 % intervals (paired over seeds, Student's t).
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
T_975 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def run(name, runs, *args):
    """(held-out accuracy, median seconds of a step, steps) of a run of train.py; a finished one is read, not run again."""
    folder = runs / name
    if not (folder / "curves.png").exists():
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        command = [
            sys.executable,
            "train.py",
            "--runs",
            str(runs),
            "--name",
            name,
            "--eval_every=0",
            "--save_every=0",
            *args,
        ]
        subprocess.run(
            command,
            cwd=ROOT,
            check=True,
            stdout=subprocess.DEVNULL,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = [m[k] for m in metrics for k in m if k.endswith("/accuracy")][-1]
    return (
        accuracy,
        statistics.median(m["train/seconds"] for m in metrics if "train/seconds" in m),
        metrics[-1]["step"],
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "kd_vs_sft")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    subprocess.run(
        [
            sys.executable,
            "train.py",
            "--runs",
            str(args.runs),
            "--name",
            "teacher-probe",
            "--steps=1",
            "--eval_examples=0",
        ],
        cwd=ROOT,
        check=not (args.runs / "teacher-probe").exists(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    tokenizer = str(next(args.runs.glob("teacher-*/checkpoints/step-*[0-9][0-9][0-9]")))

    seeds = range(args.seeds)
    same = lambda seed: ["--mode=sft", f"--seed={seed}", f"--tokenizer={tokenizer}"]
    with ThreadPoolExecutor(2) as pool:
        kd_runs = pool.map(
            lambda seed: run(f"kd-{seed}", args.runs, "--mode=kd", f"--seed={seed}"), seeds
        )
        sft_runs = pool.map(lambda seed: run(f"sft-{seed}", args.runs, *same(seed)), seeds)
        kd_runs, sft_runs = list(kd_runs), list(sft_runs)
        ratio = statistics.median(k[1] / s[1] for k, s in zip(kd_runs, sft_runs, strict=True))
        steps = round(sft_runs[0][2] * ratio)
        long_runs = list(
            pool.map(
                lambda seed: run(f"sft-wall-{seed}", args.runs, *same(seed), f"--steps={steps}"),
                seeds,
            )
        )
    kd, sft, longer = ([r[0] for r in runs] for runs in (kd_runs, sft_runs, long_runs))
    print(f"a KD step takes {ratio:.2f} times an SFT step: equal time is {steps} SFT steps")
    for seed, values in enumerate(zip(kd, sft, longer, strict=True)):
        print(
            "seed {}: KD {:.1%}  SFT, equal tokens {:.1%}  SFT, equal time {:.1%}".format(
                seed, *values
            )
        )
    for name, values in (("KD", kd), ("SFT, equal tokens", sft), ("SFT, equal time", longer)):
        print(f"{name:<20} mean {statistics.mean(values):.1%}")
    for name, other in (("equal tokens", sft), ("equal time", longer)):
        gaps = [a - b for a, b in zip(kd, other, strict=True)]
        half = T_975[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5
        print(
            f"KD - SFT at {name}: {statistics.mean(gaps):+.1%} [{statistics.mean(gaps) - half:+.1%}, {statistics.mean(gaps) + half:+.1%}]"
        )


if __name__ == "__main__":
    main()
