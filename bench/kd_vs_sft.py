"""The embedded default over seeds: KD against SFT at equal student tokens and at equal wall time.

    python -m bench.kd_vs_sft --seeds 5

For each seed three runs of train.py on one thread each, two at a time: KD as it is by default, SFT with the same steps (the same
tokens), SFT with as many more steps as fit the KD run's training time (the ratio of the two runs' seconds for that seed).
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
    """(held-out accuracy, training seconds, steps) of a run of train.py; a finished one is read, not run again."""
    folder = runs / name
    if not (folder / "curves.png").exists():
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        command = [sys.executable, "train.py", "--runs", str(runs), "--name", name, "--eval_every=0", "--save_every=0", *args]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    accuracy = [m[k] for m in metrics for k in m if k.endswith("/accuracy")][-1]
    return accuracy, sum(m.get("train/seconds", 0) for m in metrics), metrics[-1]["step"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs" / "kd_vs_sft")
    args = parser.parse_args()
    args.runs.mkdir(parents=True, exist_ok=True)
    subprocess.run([sys.executable, "train.py", "--runs", str(args.runs), "--name", "teacher-probe", "--steps=1", "--eval_examples=0"],
                   cwd=ROOT, check=not (args.runs / "teacher-probe").exists(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
    tokenizer = str(next(args.runs.glob("teacher-*/checkpoints/step-*[0-9][0-9][0-9]")))

    def one_seed(seed):
        kd = run(f"kd-{seed}", args.runs, "--mode=kd", f"--seed={seed}")
        same = ["--mode=sft", f"--seed={seed}", f"--tokenizer={tokenizer}"]
        sft = run(f"sft-{seed}", args.runs, *same)
        longer = run(f"sft-wall-{seed}", args.runs, *same, f"--steps={round(sft[2] * kd[1] / sft[1])}")
        print(f"seed {seed}: KD {kd[0]:.1%} ({kd[1]:.0f} s)  SFT, equal tokens {sft[0]:.1%} ({sft[1]:.0f} s)  "
              f"SFT, equal time {longer[0]:.1%} ({longer[2]} steps, {longer[1]:.0f} s)", flush=True)  # fmt: skip
        return kd[0], sft[0], longer[0]

    with ThreadPoolExecutor(2) as pool:
        kd, sft, longer = zip(*pool.map(one_seed, range(args.seeds)), strict=True)
    for name, values in (("KD", kd), ("SFT, equal tokens", sft), ("SFT, equal time", longer)):
        print(f"{name:<20} mean {statistics.mean(values):.1%}")
    for name, other in (("equal tokens", sft), ("equal time", longer)):
        gaps = [a - b for a, b in zip(kd, other, strict=True)]
        half = T_975[len(gaps)] * statistics.stdev(gaps) / len(gaps) ** 0.5
        print(f"KD - SFT at {name}: {statistics.mean(gaps):+.1%} [{statistics.mean(gaps) - half:+.1%}, {statistics.mean(gaps) + half:+.1%}]")


if __name__ == "__main__":
    main()
