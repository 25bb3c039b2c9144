"""Comparing runs, and pictures: figures against scipy and brute force, curves by their data."""

import itertools
import json
import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import scipy.stats
from matplotlib.figure import Figure

import curves
import options
from errors import UserError
from eval import compare
from eval.stats import difference, over_seeds
from eval.study.plots import mean_curve, panels
from eval.study.results import Outcome
from eval.study.short import more_seeds
from locks import is_held, lock
from tests.test_study_report import jsonl

CONFIG = {"mode": "sft", "model": "tiny", "runs": "runs", "seed": 0, "lr": 0.01, "steps": 4}
QUESTIONS = [f"What is {i} + 1?" for i in range(10)]


def wilson(right, count):
    """The interval of a share as scipy has it."""
    return tuple(scipy.stats.binomtest(right, count).proportion_ci(method="wilson"))


def run(folder, right=(), steps=4, **config):
    """A run of four steps, evaluated before and after; `right`: the held-out questions it gets."""
    config = CONFIG | config
    jsonl(folder / "config.json", [config])
    lines = [{"step": 0, "eval/w/accuracy": 0.0, "eval/w/problems": 10, "eval/w/loss": 2.0}]
    for step in range(1, steps + 1):
        spent = {"train/tokens": 100 * step, "train/seconds": 0.5, "train/flops": 1e9 * step}
        spent |= {"train/sampled_tokens": 0, "train/teacher_tokens": 0}
        lines.append({"step": step, "train/loss": 1.0 / step} | spent)
    end = {"step": steps, "eval/w/accuracy": len(right) / 10, "eval/w/loss": 1.0}
    jsonl(folder / "metrics.jsonl", [*lines, lines[0] | end])
    samples = [{"step": steps, "question": QUESTIONS[0], "correct": False, "reward": 0.0}]
    for i, question in enumerate(QUESTIONS):
        samples.append({"step": 0, "question": question, "correct": False})
        samples.append({"step": steps, "question": question, "correct": i in right})
    jsonl(folder / "samples.jsonl", samples)
    about = {"ranks": 1, "git_commit": "a" * 40, "packages": {"torch": f"2.{config['seed']}"}}
    jsonl(folder / "environment.json", [about])
    return folder


def evaluation(evals, run, right, step=4, **identity):
    """What `python -m eval` leaves of a run: ten problems with two samples each."""
    folder, rows = evals / f"{run.name}-step-{step}-abcdef", []
    for p, s in itertools.product(range(10), range(2)):
        row = {"problem": p, "sample": s, "question": QUESTIONS[p], "vote": str(p), "tokens": 5}
        row |= dict.fromkeys(("strict", "lenient", "math_verify"), p in right)
        rows.append(row | {"parsed": True, "stopped": True})
    jsonl(folder / "t.jsonl", rows)
    identity = {"prompt": {"kind": "chat"}, "temperature": 0.6, "test set": "x"} | identity
    generated = {"tokens": 100, "seconds": 1.0}
    stated = {"identity": identity, "about": {"name": str(run)}, "generated": generated}
    jsonl(folder / "t.json", [stated])


def words(page):
    """The cells of every line of a page's tables."""
    lines = [line for line in page.splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_runs_are_compared_by_options_figures_and_problems(tmp_path, capsys):
    a0 = run(tmp_path / "runs" / "a0", right=range(6))
    a1 = run(tmp_path / "runs" / "a1", right=range(8), seed=1)
    b = run(tmp_path / "runs" / "b", right=range(3), lr=0.001)
    for folder, right in ((a0, range(7)), (a1, range(5)), (b, range(1, 3))):
        evaluation(tmp_path / "evals", folder, right)
    out = tmp_path / "out"
    argv = [str(a0), str(a1), str(b), f"--evals={tmp_path}/evals", f"--out={out}"]
    assert compare.main(argv) == 0
    said, page = capsys.readouterr().out, (out / "comparison.md").read_text()
    cells = words(page)
    assert ["lr", "0.01 (default)", "0.01 (default)", "0.001"] in cells
    assert ["seed", "0 (default)", "1", "0 (default)"] in cells
    assert ["torch", "2.0", "2.1", "2.0"] in cells
    assert not [row for row in cells if row[0] in ("batch_size", "runs", "mode", "git_commit")]
    low, high = wilson(6, 10)
    reached = next(row for row in cells if row[0] == "a0" and row[1] == "finished")
    assert reached[2:5] == [f"60.0 [{100 * low:.1f}, {100 * high:.1f}]", "60.0 (4)", "1"]
    assert reached[6:] == ["400", "0", "0", "4e+09", "2", "0.000556"]
    # of two seeds, 0.7 and 0.5: t of one degree of freedom is 12.7, and shares end at 0 and 1
    assert ["a0 and 1 more", "t", "2", "60.0 [0.0, 100.0]"] in cells
    # b less a0, which has the same seed: problems 0, 3, 4, 5, 6 are lost
    (paired,) = [row for row in cells if row[:3] == ["b", "a0 and 1 more", "t"]]
    assert paired[3] == "10" and paired[4].startswith("-50.0 [")
    assert float(paired[5]) == pytest.approx(2 / 2**5, rel=0.05)
    assert paired[6:] == ["0", "5", "alike"]
    (held_out,) = [row for row in cells if row[0] == "b" and row[2] == compare.HELD_OUT]
    assert held_out[3] == "10" and held_out[4].startswith("-30.0 [")
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{out}: comparison.md, comparison.png" in said


def test_options_that_one_mode_alone_reads_are_listed_where_they_were_chosen(tmp_path):
    sft, grpo = run(tmp_path / "a"), run(tmp_path / "b", mode="grpo", grpo_samples=4)
    rows = compare.differing([compare.read_run(sft, "a", []), compare.read_run(grpo, "b", [])])
    assert ["mode", "sft", "grpo"] in rows and ["grpo_samples", "not read", "4"] in rows
    assert ["batch_size", "32 (default)", "128 (default)"] in rows  # read by both
    assert "grpo_clip_low" not in [row[0] for row in rows]


def test_a_checkpoint_is_compared_as_the_run_was_then(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(compare, "parameters", lambda run: "-")
    path = run(tmp_path / "runs/a", right=range(8))
    jsonl(path / "sittings.jsonl", [{"step": 0, "steps": 4, "options": {}}])
    (path / "checkpoints/step-2").mkdir(parents=True)
    evaluation(tmp_path / "evals", path, range(3), step=2)
    evaluation(tmp_path / "evals", path, range(9), step=4)
    argv = [str(path), str(path / "checkpoints/step-2"), f"--evals={tmp_path}/evals"]
    assert compare.main([*argv, f"--out={tmp_path}/out"]) == 0
    said = capsys.readouterr().out
    assert "step 2 of 4" in said and "a/step-2, step 2" in said and "a, step 4" in said
    early = compare.read_run(path / "checkpoints/step-2", "early", [str(tmp_path / "evals")])
    assert early.metrics[-1]["step"] == 2 and [r.step for r in early.results.values()] == [2]
    with pytest.raises(UserError, match="is no run"):
        compare.read_run(path / "checkpoints/step-3", "none", [])
    ax = axis()
    compare._draw_runs(ax, [compare.read_run(path, "whole", []), early], "train/loss", "step")
    assert {text.get_text() for text in ax.texts} == {"whole", "early (to 2)"}


def test_what_was_asked_otherwise_is_not_compared(tmp_path, capsys):
    a, b = run(tmp_path / "a"), run(tmp_path / "b", lr=0.1, system_prompt="Think.")
    evaluation(tmp_path / "evals", a, range(5))
    evaluation(tmp_path / "evals", b, range(9), temperature=0.0)
    out = tmp_path / "out"
    assert compare.main([str(a), str(b), f"--evals={tmp_path}/evals", f"--out={out}"]) == 0
    page = (out / "comparison.md").read_text()
    assert "t (temperature 0.6)" in page and "t (temperature 0.0)" in page
    assert "Paired" not in page and "nothing to test" in capsys.readouterr().out


def test_the_newest_evaluation_of_a_run_counts_and_no_other_runs(tmp_path):
    a, other = run(tmp_path / "runs" / "a"), run(tmp_path / "elsewhere" / "a")
    run(tmp_path / "runs" / "a-step-2")
    evaluation(tmp_path / "evals", a, range(1), step=2)
    evaluation(tmp_path / "evals", a, range(2), step=10)
    evaluation(tmp_path / "more", other, range(9), step=99)
    evaluation(tmp_path / "evals", tmp_path / "runs" / "a-step-2", range(9), step=4)
    found = compare.read_run(a, "a", [str(tmp_path / "evals"), str(tmp_path / "more")])
    steps = {result.task: result.step for result in found.results.values()}
    assert steps == {"t": 10, compare.HELD_OUT: 4}
    result = next(r for r in found.results.values() if r.task == "t")
    assert sum(right for _, right in result.counts.values()) == 4


def test_runs_that_began_from_other_seeds_of_one_run_are_one_arm(tmp_path):
    arms = []
    for seed in (0, 1):
        first = run(tmp_path / f"first-{seed}", seed=seed)
        start = first / "checkpoints" / "step-4"
        start.mkdir(parents=True)
        start = (start, first)[seed]  # the newest checkpoint, by either name
        arms.append(compare.arm_of(run(tmp_path / f"second-{seed}", seed=seed, model=str(start))))
    other = run(tmp_path / "third", lr=1.0)
    start = other / "checkpoints" / "step-4"
    assert arms[0] == arms[1] != compare.arm_of(run(tmp_path / "fourth", model=str(start)))


def test_a_run_under_way_and_one_that_was_killed(tmp_path):
    killed = run(tmp_path / "killed", steps=4)
    (killed / "config.json").write_text(json.dumps(CONFIG | {"steps": 100}))
    with open(killed / "metrics.jsonl", "a") as file:
        file.write('{"step": 5, "train/lo')  # cut off
    assert compare.read_run(killed, "k", []).state == "stopped at 4 of 100"
    with lock(killed / ".lock"):
        assert is_held(killed / ".lock")
        assert compare.read_run(killed, "k", []).state == "running, at 4 of 100"
    assert not is_held(killed / ".lock") and not is_held(tmp_path / "nothing")


@pytest.mark.parametrize(
    "file,rows,words",
    [
        ("config.json", [], "it has no config.json"),
        ("config.json", [CONFIG | {"lr": [1]}], "config.json: lr [1] is not supported"),
        ("config.json", [CONFIG | {"seed": "a"}], "has seed 'a', which is not a whole number"),
        ("metrics.jsonl", [], "metrics.jsonl is not there: nothing of this run was measured"),
        ("metrics.jsonl", ["no object"], "has no line that can be read"),
        ("metrics.jsonl", [{"train/loss": 1.0}], "entry 1, has no 'step'"),
        (
            "metrics.jsonl",
            [{"step": 0}, {"step": 1, "train/loss": "low"}],
            "entry 2, has train/loss 'low', which is not a number",
        ),
        ("", [], "name two runs or more"),
    ],
)
def test_what_is_no_run_is_one_line(tmp_path, capsys, file, rows, words):
    folders = [run(tmp_path / "a")]
    if file:
        folders.append(run(tmp_path / "b"))
        (folders[0] / file).unlink()
    if rows:
        jsonl(folders[0] / file, rows)
    assert compare.main([*map(str, folders), f"--out={tmp_path}/out"]) == 2
    said = capsys.readouterr()
    assert words in said.err and said.err.count("\n") == 1 and not said.out
    assert not (tmp_path / "out").exists()


# --- estimates ------------------------------------------------------------------------------------


def test_the_difference_of_arms_by_brute_force():
    rng = np.random.default_rng(0)
    ours, theirs = (
        {seed: {p: (40, int(rng.integers(15, 26))) for p in range(8)} for seed in (0, 1, 2)}
        for _ in range(2)
    )
    theirs[1].pop(7)  # not asked: compared are the other seven
    found = difference(ours, theirs)
    assert found is not None
    right_SP = np.array([[ours[s][p][1] - theirs[s][p][1] for p in range(7)] for s in ours])
    each, flips_P = (right_SP / 40).mean(1), right_SP.sum(0)
    assert found["each"] == pytest.approx(each) and found["problems"] == 7
    signs = np.array(list(itertools.product((1, -1), repeat=7))) @ flips_P
    assert found["p"] == pytest.approx(np.mean(abs(signs) >= abs(flips_P.sum())))
    mean, reach = each.mean(), scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(each)
    assert over_seeds(each.tolist()) == pytest.approx((mean, reach))
    low, high = found["over_problems"]
    bounds = [mean - math.hypot(mean - low, reach), mean + math.hypot(high - mean, reach)]
    assert found["figure"] == pytest.approx([mean, *bounds])
    # a seed that one side lacks does not count
    alone, more = {0: theirs[0]}, {0: ours[0], 5: ours[1]}
    assert difference(more, alone) == difference({0: ours[0]}, alone)
    assert difference(alone, more) == difference(alone, {0: ours[0]})
    # other seeds on either side: pooled, and nothing is said of seeds
    apart = difference({0: ours[0]}, {1: ours[1]})
    assert apart is not None and apart["each"] == [] and apart["over_seeds"] is None
    assert difference({0: {}}, {0: ours[0]}) is None


def test_seeds_for_half_the_interval():
    def width(n):
        return scipy.stats.t.ppf(0.975, n - 1) / math.sqrt(n)

    for n in (2, 3, 5, 10):
        wanted = more_seeds(n)
        assert width(wanted) <= width(n) / 2 < width(wanted - 1)
    assert more_seeds(2) == 3 and more_seeds(10) > 30


def test_wilson_against_scipy():
    for right, count in ((0, 10), (3, 10), (400, 400), (200, 400)):
        expected = pytest.approx(wilson(right, count), abs=1e-7)
        assert curves.wilson(right / count, count) == expected


# --- pictures -------------------------------------------------------------------------------------


def axis() -> Any:
    return Figure().subplots()


def test_the_mean_of_a_ramp_is_the_ramp():
    for count in (1, 2, 7, 500):
        ramp = [3.0 * i - 5 for i in range(count)]
        means, window = curves.centred_mean(ramp)
        assert means == pytest.approx(ramp)
    assert window == 15  # of 500 steps
    bump = [0.0] * 100 + [1.0] + [0.0] * 100
    means, window = curves.centred_mean(bump)
    assert np.flatnonzero(means).tolist() == list(range(100 - window // 2, 101 + window // 2))
    assert means.max() == pytest.approx(1 / window)


def test_curves_lie_where_their_data_is(tmp_path):
    folder = run(tmp_path / "a", right=range(6))
    metrics = compare.read_run(folder, "a", []).metrics
    for against, ends in {"step": 4, "tokens": 400, "seconds": 2.0}.items():
        ax = axis()
        curves.draw_metric(ax, metrics, "eval/w/accuracy", against)
        (line,) = ax.get_lines()
        assert line.get_xdata().tolist() == [0, ends]
        assert line.get_ydata() == pytest.approx([0, 60])
        (band,) = ax.collections
        at_end = [y / 100 for x, y in band.get_paths()[0].vertices if x == ends]
        assert (min(at_end), max(at_end)) == pytest.approx(wilson(6, 10))
        assert "%" in ax.get_ylabel() and ax.get_ylim() == (0, 100)
        assert against != "step" or all(tick == int(tick) for tick in ax.get_xticks())
    ax = axis()
    curves.draw_metric(ax, metrics, "train/loss", "step")
    raw, mean = ax.get_lines()
    assert raw.get_xdata().tolist() == mean.get_xdata().tolist() == [1, 2, 3, 4]
    assert raw.get_ydata() == pytest.approx([1, 1 / 2, 1 / 3, 1 / 4])
    assert "per token" in ax.get_ylabel()


def test_a_teachers_line_is_where_its_own_run_ended(tmp_path):
    teacher = run(tmp_path / "teacher", right=range(9))
    weights = {"teacher": str(teacher / "checkpoints" / "step-4")}
    students = [run(tmp_path / f"s{i}", right=range(2)) for i in range(2)]
    for student in students:
        jsonl(student / "sittings.jsonl", [{"weights": weights, "steps": 4}])
    ax = axis()
    curves.draw_teachers(ax, students, "eval/w/accuracy")
    (line,) = ax.get_lines()  # of both, once
    assert line.get_ydata() == [90, 90] and ax.texts[0].get_text() == "teacher 90 %"
    curves.draw_teachers(ax, [teacher], "eval/w/accuracy")
    assert len(ax.get_lines()) == 1
    curves.draw_curves(students[0])
    assert (students[0] / "curves.png").read_bytes()[:4] == b"\x89PNG"


def test_labels_do_not_lie_on_each_other():
    ax = axis()
    ax.set(ylim=(0, 100), xlim=(0, 1))
    values = [99, 98, 99.5, 50, 1, 1, 0]
    curves.label_ends(ax, [(1, y, str(y), "k") for y in values], 0.05)
    heights = {text.get_text(): text.xyann[1] for text in ax.texts}
    ordered = [heights[str(y)] for y in sorted(values)]
    assert np.diff(sorted(heights.values())).min() >= 0.05 - 1e-9
    assert min(heights.values()) >= 0 and max(heights.values()) <= 1
    assert ordered == sorted(ordered) and heights["50"] == pytest.approx(0.5)
    assert all(text.arrow_patch for text in ax.texts)
    # no line from a curve that ends far to the left crosses the picture; many labels stay inside
    ax = axis()
    ax.set(ylim=(0, 100), xlim=(0, 1000))
    curves.label_ends(
        ax, [(8, 1, "killed", "k"), *((1000, y, str(y), "k") for y in range(30))], reach=0.2
    )
    killed = next(text for text in ax.texts if "killed" in text.get_text())
    assert killed.get_text() == "killed (to 8)" and killed.arrow_patch is None
    heights = [text.xyann[1] for text in ax.texts]
    assert min(heights) >= 0 and max(heights) <= 1 and np.diff(sorted(heights)).min() > 0.03


def test_a_studys_curves_have_the_mean_and_its_interval(tmp_path):
    arm = {"arm": "x", "chain": ["sft"], "model": "base", "seeds": [0, 1, 2]}
    outcomes = {}
    for seed in range(3):
        runs = [run(tmp_path / f"r{seed}", right=range(2 + 3 * seed))]
        outcomes["x", seed] = Outcome(runs=runs)
    results: Any = SimpleNamespace(outcomes=outcomes)
    found = mean_curve(results, arm)
    assert found is not None
    x, y, low, high, ends = found
    assert x.tolist() == [0, 400] and y == pytest.approx([0, 50]) and ends.tolist() == [0, 1]
    reach = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem([20, 50, 80])
    assert (low[1], high[1]) == pytest.approx((max(0, 50 - reach), min(100, 50 + reach)))
    one = mean_curve(results, arm | {"seeds": [1]})
    assert one is not None and one[2:4, 1] / 100 == pytest.approx(wilson(5, 10))
    arms = [arm | {"chain": [f"m{i // 2}"]} for i in range(20)] + [arm | {"chain": []}]
    assert [len(shown) for shown in panels(arms)] == [6, 4]


def test_options_of_the_command():
    with pytest.raises(UserError, match="RUNS"):
        options.parse(compare.CompareOptions, [])
    args = options.parse(compare.CompareOptions, ["a", "b", "--evals=x,y"])
    assert args.evals == ("x", "y")


def test_a_run_is_named_once_and_seeds_that_agree_have_no_interval(tmp_path, capsys):
    a0 = run(tmp_path / "a0", right=range(6))
    a1 = run(tmp_path / "a1", right=range(6), seed=1)
    assert compare.main([str(a0), f"{a0}/", f"--out={tmp_path}/out"]) == 2
    assert "a run is named twice" in capsys.readouterr().err
    assert compare.main([str(a0), str(a1), f"--out={tmp_path}/out"]) == 0
    cells = words((tmp_path / "out/comparison.md").read_text())
    assert ["a0 and 1 more", "held-out problems", "2", "60.0"] in cells
