"""A study: arms that are chains of training runs, over seeds, evaluated alike, in one report.

    python -m eval.study recipes/study/mini.toml --out studies/mini [--seeds 0,1,2] [--arms kd,kd_grpo]

A file has `[study]` (seeds, and `eval`, options of `python -m eval`), `[common]` (knobs of every run) and one `[arm.NAME]` for each arm: `chain`, a list of
knobs, one per run; each run begins from the checkpoint of the one before. Runs that arms have in common are made once. Every run is
the command `train.py …` in a process of its own, under --out; the same study goes on with what was interrupted, and skips what is done.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

from errors import RunFailed, UserError, as_command
from eval.results import aligned, markdown
from eval.statistics import student_t
from model.runs import RunFolder, replace_file

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Link:
    """One run of a chain: its knobs, its seed, and the run that it begins from."""

    knobs: tuple
    seed: int
    before: "Link | None"

    @property
    def name(self):
        key = json.dumps([self.knobs, self.seed, self.before and self.before.name])
        return f"{dict(self.knobs)['mode']}-s{self.seed}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"


def parse(argv):
    parser = argparse.ArgumentParser(prog="eval.study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.error = lambda message: (_ for _ in ()).throw(UserError(message))
    parser.add_argument("file", help="a TOML file, as in recipes/study")
    parser.add_argument("--out", default="", help="folder of runs, evaluations and the report; empty: studies/NAME")
    parser.add_argument("--seeds", default="", help="instead of the file's, with commas between them")
    parser.add_argument("--arms", default="", help="these arms only, with commas between them")
    return parser.parse_args(argv)


def read(args):
    """(study, {arm: [[Link, …] per seed]}) of the file. Raises UserError."""
    try:
        with open(args.file, "rb") as f:
            content = tomllib.load(f)
    except OSError as e:
        raise UserError(f"{args.file}: {e.strerror}") from None
    except tomllib.TOMLDecodeError as e:
        raise UserError(f"{args.file}: not valid TOML ({e})") from None
    study, common, arms = (content.get(key, {}) for key in ("study", "common", "arm"))
    if extra := set(content) - {"study", "common", "arm"}:
        raise UserError(f"{args.file}: unknown table [{min(extra)}]; there are [study], [common] and [arm.NAME]")
    try:
        study["seeds"] = [int(s) for s in args.seeds.split(",")] if args.seeds else study["seeds"]
        chains = {name: [{**common, **link} for link in arm["chain"]] for name, arm in arms.items()}
    except (KeyError, ValueError, TypeError) as e:
        raise UserError(f"{args.file}: {type(e).__name__} {e}: [study] needs seeds, every [arm.NAME] a chain (a list of tables of knobs)") from None
    for name, chain in chains.items():
        if not chain or any("mode" not in link for link in chain):
            raise UserError(f"{args.file}: [arm.{name}] needs a chain, each run of it with a mode")
    if missing := [a for a in filter(None, args.arms.split(",")) if a not in chains]:
        raise UserError(f"--arms: no arm {missing[0]!r}; there are {', '.join(chains)}")
    wanted = [a for a in args.arms.split(",") if a] or list(chains)
    return study, {name: [links(chains[name], seed) for seed in study["seeds"]] for name in wanted}


def links(chain, seed):
    made = []
    for knobs in chain:
        made.append(Link(tuple(sorted(knobs.items())), seed, made[-1] if made else None))
    return made


# --- running ---------------------------------------------------------------------------------------------------------


def checkpoint(out, link):
    run = RunFolder(out / "runs" / link.name)
    return run.step_folder(run.steps()[-1])


def train(out, link, arm):
    """Make a run, or go on with it; nothing if it is done."""
    folder = out / "runs" / link.name
    if (folder / "done").exists():
        return
    given = dict(link.knobs) | ({"model": str(checkpoint(out, link.before))} if link.before else {})
    argv = [f"--{k}={v}" for k, v in given.items()] + [f"--seed={link.seed}", f"--runs={out / 'runs'}", f"--name={link.name}"]
    begun = (folder / "config.json").exists()
    print(f"{arm}, seed {link.seed}: {dict(link.knobs)['mode']} -> {folder}{' (goes on)' if begun else ''}", flush=True)
    done = subprocess.run([sys.executable, str(ROOT / "train.py"), *argv, *(["--resume"] if begun else [])], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()
        kind = UserError if done.returncode == 2 else RunFailed
        raise kind(f"arm {arm}, seed {link.seed}: {said[-1] if said else f'train.py ended with {done.returncode}'}")
    replace_file(folder / "done", "")


def evaluate(out, study, ends):
    """{(arm, seed): {task: figures}} of the last checkpoints, by `python -m eval` (which keeps what it has)."""
    folders = list(dict.fromkeys(str(checkpoint(out, link)) for link in ends.values()))
    options = [f"--{k}={v}" if v is not True else f"--{k}" for k, v in study.get("eval", {}).items()]
    done = subprocess.run([sys.executable, "-m", "eval", *folders, *options, f"--out={out / 'evals'}"], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    if done.returncode:
        raise (UserError if done.returncode == 2 else RunFailed)(done.stderr.strip().splitlines()[-1])
    summaries = json.loads((out / "evals" / "summary.json").read_text())["summaries"]
    per_folder = len(summaries) // len(folders)
    found = {f: {task: figures for _, task, figures in summaries[i * per_folder : (i + 1) * per_folder]} for i, f in enumerate(folders)}
    return {key: found[str(checkpoint(out, link))] for key, link in ends.items()}


# --- the report ------------------------------------------------------------------------------------------------------


def cost(out, chain):
    """Tokens the student was trained on and seconds of training, over the whole chain."""
    tokens = seconds = 0
    for link in chain:
        rows = [json.loads(line) for line in (out / "runs" / link.name / "metrics.jsonl").read_text().splitlines()]
        trained = [r for r in rows if "train/tokens" in r]
        tokens, seconds = tokens + trained[-1]["train/tokens"], seconds + sum(r["train/seconds"] for r in trained)
    return tokens, seconds


def interval(values, single):
    """Mean and 95 % interval over seeds (Student's t); of one seed the evaluation's own, over problems."""
    if len(values) == 1:
        return single
    mean, reach = statistics.mean(values), student_t(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - reach, mean + reach


def report(out, study, arms, figures):
    """report.md, report.json; returns the table as text."""
    tasks = list(next(iter(figures.values())))
    rows, kept = [["arm", "seeds", *tasks, "student tokens", "seconds"]], []
    for arm, chains in arms.items():
        seeds = study["seeds"]
        cells, values = [], {}
        for task in tasks:
            accuracies = [figures[arm, seed][task]["accuracy"] for seed in seeds]
            values[task] = interval([a[0] for a in accuracies], accuracies[0])
            cells.append("{:.1f} [{:.1f}, {:.1f}]".format(*(100 * x for x in values[task])))
        costs = [cost(out, chain) for chain in chains]
        tokens, seconds = (statistics.mean(c[i] for c in costs) for i in (0, 1))
        rows.append([arm, str(len(seeds)), *cells, f"{tokens:,.0f}", f"{seconds:,.0f}"])
        kept.append({"arm": arm, "seeds": seeds, "accuracy": values, "tokens": tokens, "seconds": seconds, "runs": [[link.name for link in c] for c in chains]})
    what = "Accuracy in %, mean over seeds with its 95 % interval (one seed: over problems); tokens and seconds of training, whole chains, mean over seeds."
    replace_file(out / "report.md", f"{markdown(rows)}\n\n{what}\n")
    replace_file(out / "report.json", json.dumps(kept, indent=1) + "\n")
    return f"{aligned(rows)}\n\n{what}\n{out}/report.md has the table, {out}/evals every sample"


def run(args):
    study, arms = read(args)
    out = Path(args.out or Path("studies") / Path(args.file).stem).resolve()
    for arm, chains in arms.items():
        for chain in chains:
            for link in chain:
                train(out, link, arm)
    ends = {(arm, seed): chain[-1] for arm, chains in arms.items() for seed, chain in zip(study["seeds"], chains, strict=True)}
    print(report(out, study, arms, evaluate(out, study, ends)), flush=True)


def main(argv):
    return as_command("eval.study", lambda: run(parse(argv)))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
