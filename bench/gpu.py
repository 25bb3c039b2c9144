"""One command for a bare GPU machine, in three parts of under ten minutes each.

    python -m bench.gpu gate      # ceilings, tests, rarely reached paths, checks under every ptxas
    python -m bench.gpu speed     # attention, head, decoding, engine
    python -m bench.gpu train     # SFT, KD and GRPO steps

Needs no network, no data, and none of transformers, math-verify and wandb (tests/test_gpu.py needs
pytest, and is one failed line without). Every step is a process with a limit of its own, so that
neither an illegal access nor a hang costs more than its line; what may hang comes last. The record
in FOLDER/<part>.json is written again after every step, and each step writes its own JSON there.
--dry runs the small form of every step on a CPU. Exit code 1: a step failed (one under another
assembler than the one in use does not count); 2: no GPU.
"""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench.assemblers import other_assemblers
from bench.measure import Bench
from bench.processes import last_json, run_limited

PARTS = ("gate", "speed", "train")
CHECKED = ("attention", "head", "decode")
COLUMNS = ("step", "seconds", "failed")
TAIL = 40  # lines of a step's output that are kept


@dataclass
class Step:
    """A process.

    Attributes:
        options: of `python -m module`.
        limit_s: seconds after which it is killed.
        required: whether the part fails with it.
    """

    name: str
    module: str
    options: list[str]
    limit_s: float
    env: dict[str, str] = field(default_factory=dict)
    required: bool = True


def gate(folder: Path, assemblers: dict[str, str]) -> list[Step]:
    """Whether it is right: decides which form of the kernels and which assembler to use."""
    steps = [Step("ceilings", "bench.ceilings", ["--out", str(folder / "ceilings.json")], 90)]
    steps.append(Step("tests", "pytest", ["-q", "tests/test_gpu.py"], 180))
    for name in ("chunks", "offsets", "step"):
        out = ["--out", str(folder / f"paths-{name}.json")]
        steps.append(Step(f"path {name}", "bench.paths", [name, *out], 90))
    for version, path in {"": "", **assemblers}.items():
        for name in CHECKED:
            label = f"check {name}"
            env = {}
            if version:
                label += f", ptxas {version}"
                cache = str((folder / f"triton-cache-{version}").absolute())
                env = {"TRITON_PTXAS_PATH": path, "TRITON_CACHE_DIR": cache}
            steps.append(Step(label, f"bench.{name}", ["--only-check"], 120, env, not version))
    eight = ["--only-check", "--steps", "8"]  # a shape that the engine never asks for
    last = Step("check decode, 8 tokens a step", "bench.decode", eight, 60, required=False)
    return [*steps, last]


def speed(folder: Path, assemblers: dict[str, str]) -> list[Step]:
    attention = ["--json", str(folder / "attention.json"), "--minutes", "1.5", "--one-assembler"]
    sweep = ["--json", str(folder / "sweep.json"), "--minutes", "1.5"]
    tune = ["--out", str(folder / "tune.json"), "--minutes", "1", "--one-assembler", "--tune"]
    head = ["--out", str(folder / "head.json"), "--minutes", "1.5", "--one-assembler"]
    profiled = ["--profile", str(folder / "rollouts.txt"), "--minutes", "1.5"]
    rollouts = ["engine", "--out", str(folder / "rollouts.json"), *profiled]
    decode = ["--json", str(folder / "decode.json"), "--minutes", "1", "--one-assembler"]
    return [
        Step("attention", "bench.attention", attention, 120),
        Step("head, configurations", "bench.head", tune, 120),
        Step("head", "bench.head", head, 120),
        Step("engine", "bench.rollouts", rollouts, 120),
        Step("attention, configurations", "bench.attention_sweep", sweep, 120),
        Step("decode", "bench.decode", decode, 120),  # transformers may hang: last
    ]


def train(folder: Path, assemblers: dict[str, str]) -> list[Step]:
    profiled = ["--profile", str(folder / "train_step.txt"), "--minutes", "4.5"]
    grpo = ["grpo", "--out", str(folder / "grpo.json"), "--minutes", "3.5"]
    return [
        Step(
            "train_step",
            "bench.train_step",
            ["--out", str(folder / "train_step.json"), *profiled],
            330,
        ),
        Step("grpo", "bench.rollouts", grpo, 240),
    ]


def run_step(bench: Bench, step: Step) -> None:
    """Run a step within its limit and the part's, and record how it ended."""
    left = bench.deadline - time.perf_counter()
    if left < 5:
        bench.record["right"] &= not step.required
        bench.keep("steps", {"step": step.name, "right": False, "failed": "out of time"}, COLUMNS)
        return
    command = [sys.executable, "-m", step.module, *step.options]
    if bench.dry and step.module.startswith("bench."):
        command.append("--dry")
    outcome = run_limited(command, min(step.limit_s, left), step.env)
    row = {"step": step.name, "seconds": outcome.seconds, "right": not outcome.failed}
    bench.record["right"] &= row["right"] or not step.required
    output = outcome.stdout.splitlines()[-TAIL:]
    errors = outcome.stderr.splitlines()[-TAIL:]
    found = last_json(outcome.stdout) if "--only-check" in step.options else None
    more = {"command": command, "record": found, "output": output, "errors": errors}
    bench.keep("steps", row | {"failed": outcome.failed or None} | more, COLUMNS)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--folder", type=Path, default=Path("runs/gpu"), help="of the JSON files")
    parser.add_argument("--minutes", type=float, default=9.5, help="of the whole part")
    parser.add_argument("--dry", action="store_true", help="the small form, on a CPU")
    parser.add_argument("--only", default="", help="only steps whose name contains this")
    args = parser.parse_args(argv)
    args.folder.mkdir(parents=True, exist_ok=True)
    bench = Bench(args.dry, args.minutes, str(args.folder / f"{args.part}.json"))
    assemblers = {} if args.dry else other_assemblers()
    bench.put("assemblers", assemblers)
    steps = {"gate": gate, "speed": speed, "train": train}[args.part](args.folder, assemblers)
    for step in steps:
        if args.only in step.name:
            run_step(bench, step)
    return bench.finish()


if __name__ == "__main__":
    sys.exit(main())
