"""The glossary of docs/metrics.md has every metric that a run of any mode writes, and no other."""

import re

import pytest

import train
from losses.kd import DIVERGENCES
from run import read_metrics
from tests.conftest import ROOT

SMALL = "--device=cpu --steps=1 --batch_size=2 --data=word_problems:40 --eval_examples=2".split()
SMALL += ["--eval_tokens=2", "--save=none"]
TEACHER = "--teacher=random:tiny-teacher"
RUNS = {
    "sft": ["--mode=sft", "--eval_examples=0"],
    "kd": ["--mode=kd", TEACHER, "--kd_prefix=student", "--sample_tokens=4", "--kd_clip=1"],
    "draws": ["--mode=kd", TEACHER, "--kd_signal=draws", "--kd_draws=4", "--eval_examples=0"],
    "grpo": [
        *("--mode=grpo", "--model=tiny-teacher", TEACHER, "--grpo_kd_coef=0.5"),
        *("--sample_tokens=4", "--grpo_samples=2", "--grpo_kl_coef=0.1", "--eval_examples=0"),
    ],
}
ON_A_GPU = {"train/memory_gb", "train/mfu"}
PLACEHOLDERS = {
    "DIVERGENCE": f"({'|'.join(DIVERGENCES)})",
    "PART": r"\w+",
    "TASK": "[^/]+",
    "TEXT": "on_(teacher|student)",
    "N": r"\d+",
}


def glossary():
    """{a name as the glossary writes it: its pattern}."""
    found = {}
    for line in (ROOT / "docs" / "metrics.md").read_text().splitlines():
        for name in re.findall("`([^`]+)`", line.split("|")[1] if "|" in line else ""):
            pattern = re.escape(name)
            for placeholder, meaning in PLACEHOLDERS.items():
                meaning = meaning.replace("\\", r"\\")
                pattern = re.sub(rf"(?<![A-Z]){placeholder}(?![A-Z])", meaning, pattern)
            found[name] = pattern
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Every name that tiny runs of all modes write."""
    home, names = tmp_path_factory.mktemp("runs"), set()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "draw_curves", lambda run: None)
        for name, more in RUNS.items():
            assert train.main([*SMALL, *more, f"--runs={home}", f"--name={name}"]) == 0
            names.update(n for line in read_metrics(home / name) for n in line)
    return names


def test_every_metric_is_in_the_glossary(written):
    patterns = glossary().values()
    unknown = {n for n in written if not any(re.fullmatch(p, n) for p in patterns)}
    assert not unknown and len(written) > 50


def test_the_glossary_has_no_metric_that_nothing_writes(written):
    for name, pattern in glossary().items():
        assert name in ON_A_GPU or any(re.fullmatch(pattern, n) for n in written), name
