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
from errors import UserError
from eval import compare, summary
from eval.stats import difference, over_seeds
from eval.study.plots import mean_curve, panels
from eval.study.results import Outcome
from eval.study.short import more_seeds
from locks import is_held, lock

CONFIG = {"mode": "sft", "model": "tiny", "runs": "runs", "seed": 0, "lr": 0.005, "steps": 4}
QUESTIONS = [f"What is {i} + 1?" for i in range(10)]


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder, right=(), steps=4, **config):
    """A run of four steps, evaluated before and after; `right`: the held-out questions it gets."""
    folder.mkdir(parents=True)
    config = CONFIG | config
    (folder / "config.json").write_text(json.dumps(config))
    lines = [{"step": 0, "eval/w/accuracy": 0.0, "eval/w/problems": 10, "eval/w/loss": 2.0}]
    for step in range(1, steps + 1):
        spent = {"train/tokens": 100 * step, "train/seconds": 0.5, "train/flops": 1e9 * step}
        spent |= {"train/sampled_tokens": 0, "train/teacher_tokens": 0}
        lines.append({"step": step, "train/loss": 1.0 / step} | spent)
    end = {"eval/w/accuracy": len(right) / 10, "eval/w/problems": 10, "eval/w/loss": 1.0}
    jsonl(folder / "metrics.jsonl", [*lines, {"step": steps} | end])
    samples = [
        {"step": step, "question": q, "correct": step > 0 and i in right}
        for step in (0, steps)
        for i, q in enumerate(QUESTIONS)
    ]
    rollout = {"step": steps, "question": QUESTIONS[0], "correct": False, "reward": 0.0}
    jsonl(folder / "samples.jsonl", [*samples, rollout])
    packages = {"torch": f"2.{config['seed']}"}
    about = {"ranks": 1, "git_commit": "a" * 40, "packages": packages}
    (folder / "environment.json").write_text(json.dumps(about))
    return folder


def evaluation(evals, run, right, step=4, **identity):
    """What `python -m eval` leaves of a run: ten problems with two samples each."""
    folder = evals / f"{run.name}-step-{step}-abcdef"
    folder.mkdir(parents=True)
    rows = {}
    for p, s in itertools.product(range(10), range(2)):
        verdict = p in right
        rows[p, s] = {"problem": p, "sample": s, "question": QUESTIONS[p], "strict": verdict}
        rows[p, s] |= {"lenient": verdict, "parsed": True, "stopped": True, "tokens": 5}
        rows[p, s] |= {"vote": str(p), "math_verify": verdict}
    (folder / "t.jsonl").write_text("".join(summary.json_line(row) for row in rows.values()))
    identity = {"prompt": {"kind": "chat"}, "temperature": 0.6, "test set": "x"} | identity
    about = {"name": str(run)}
    stated = {"identity": identity, "about": about, "generated": {"tokens": 100, "seconds": 1.0}}
    (folder / "t.json").write_text(json.dumps(stated))


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
    assert ["lr", "0.005 (default)", "0.005 (default)", "0.001"] in cells
    assert ["seed", "0 (default)", "1", "0 (default)"] in cells
    assert ["torch", "2.0", "2.1", "2.0"] in cells
    assert not [row for row in cells if row[0] in ("batch_size", "runs", "mode", "git_commit")]
    low, high = scipy.stats.binomtest(6, 10).proportion_ci(method="wilson")
    reached = next(row for row in cells if row[0] == "a0" and row[1] == "finished")
    assert reached[2:5] == [f"60.0 [{100 * low:.1f}, {100 * high:.1f}]", "60.0 (4)", "1"]
    assert reached[6:] == ["400", "0", "0", "4e+09", "2", "0.000556"]
    # of two seeds: 0.7 and 0.5
    mean, sem = 60.0, 100 * 0.1
    reach = scipy.stats.t.ppf(0.975, 1) * sem
    bounds = f"[{max(0.0, mean - reach):.1f}, {min(100.0, mean + reach):.1f}]"
    assert ["a0 and 1 more", "t", "2", f"60.0 {bounds}"] in cells
    # b less a0, which has the same seed: problems 0, 3, 4, 5, 6 are lost
    paired = [row for row in cells if row[:3] == ["b", "a0 and 1 more", "t"]]
    assert len(paired) == 1 and paired[0][3] == "10" and paired[0][4].startswith("-50.0 [")
    assert float(paired[0][5]) == pytest.approx(2 / 2**5, rel=0.05)
    assert paired[0][6:] == ["0", "5", "alike"]
    held_out = [row for row in cells if row[2:3] == ["held-out problems"] and row[0] == "b"]
    assert held_out[0][3:5][0] == "10" and held_out[0][4].startswith("-30.0 [")
    assert (out / "comparison.png").read_bytes()[:4] == b"\x89PNG"
    assert f"{out}: comparison.md, comparison.png" in said


def test_options_that_one_mode_alone_reads_are_listed_where_they_were_chosen(tmp_path):
    sft, grpo = run(tmp_path / "a"), run(tmp_path / "b", mode="grpo", grpo_samples=4)
    rows = compare.differing([compare.read_run(sft, "a", []), compare.read_run(grpo, "b", [])])
    assert ["mode", "sft", "grpo"] in rows and ["grpo_samples", "not read", "4"] in rows
    assert ["batch_size", "32 (default)", "128 (default)"] in rows  # read by both
    assert "grpo_clip_low" not in [row[0] for row in rows]


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


WRONG = {
    "no folder": "it has no config.json",
    "nothing measured": "metrics.jsonl is not there: nothing of this run was measured",
    "no line": "has no line that can be read",
    "words": "entry 2, has train/loss 'low', which is not a number",
    "no step": "entry 1, has no 'step'",
    "list": "config.json: lr [1] is not supported",
    "seed": "config.json has seed 'a', which is not a whole number",
    "alone": "name two runs or more",
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_run_is_one_line(tmp_path, capsys, what):
    folder = run(tmp_path / "a")
    metrics, config = folder / "metrics.jsonl", folder / "config.json"
    if what == "no folder":
        config.unlink()
    elif what == "nothing measured":
        metrics.unlink()
    elif what in ("list", "seed"):
        changed = {"lr": [1]} if what == "list" else {"seed": "a"}
        config.write_text(json.dumps(CONFIG | changed))
    elif what != "alone":
        rows = {"no line": "\0\0\n", "words": '{"step": 0}\n{"step": 1, "train/loss": "low"}\n'}
        metrics.write_text(rows.get(what, '{"train/loss": 1.0}\n'))
    argv = [str(folder)] if what == "alone" else [str(folder), str(run(tmp_path / "b"))]
    assert compare.main([*argv, f"--out={tmp_path}/out"]) == 2
    said = capsys.readouterr()
    assert WRONG[what] in said.err and said.err.count("\n") == 1 and not said.out
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
    each = [
        float(np.mean([(ours[s][p][1] - theirs[s][p][1]) / 40 for p in range(7)])) for s in ours
    ]
    assert found["each"] == pytest.approx(each) and found["problems"] == 7
    assert found["figure"][0] == pytest.approx(np.mean(each))
    flips = [sum(ours[s][p][1] - theirs[s][p][1] for s in ours) for p in range(7)]
    signs = np.array(list(itertools.product((1, -1), repeat=7))) @ np.array(flips)
    assert found["p"] == pytest.approx(np.mean(abs(signs) >= abs(sum(flips))))
    reach = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem(each)
    assert over_seeds(each) == pytest.approx((np.mean(each), reach))
    low, high = found["over_problems"]
    mean = found["figure"][0]
    assert found["figure"][2] - mean == pytest.approx(math.hypot(high - mean, reach))
    assert mean - found["figure"][1] == pytest.approx(math.hypot(mean - low, reach))
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
        expected = scipy.stats.binomtest(right, count).proportion_ci(method="wilson")
        assert curves.wilson(right / count, count) == pytest.approx(tuple(expected), abs=1e-7)


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
        low, high = scipy.stats.binomtest(6, 10).proportion_ci(method="wilson")
        at_end = [y for x, y in band.get_paths()[0].vertices if x == ends]
        assert (min(at_end), max(at_end)) == pytest.approx((100 * low, 100 * high))
        assert "%" in ax.get_ylabel() and ax.get_ylim() == (0, 100)
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


def test_a_studys_curves_have_the_mean_and_its_interval(tmp_path):
    arm = {"arm": "x", "chain": ["sft"], "model": "base", "seeds": [0, 1, 2]}

    outcomes = {
        ("x", seed): Outcome(runs=[run(tmp_path / f"r{seed}", right=range(2 + 3 * seed))])
        for seed in range(3)
    }
    results: Any = SimpleNamespace(outcomes=outcomes)
    found = mean_curve(results, arm)
    assert found is not None
    x, y, low, high, ends = found
    assert x.tolist() == [0, 400] and y == pytest.approx([0, 50]) and ends.tolist() == [0, 1]
    reach = scipy.stats.t.ppf(0.975, 2) * scipy.stats.sem([20, 50, 80])
    assert (low[1], high[1]) == pytest.approx((max(0, 50 - reach), min(100, 50 + reach)))
    one = mean_curve(results, arm | {"seeds": [1]})
    bounds = scipy.stats.binomtest(5, 10).proportion_ci(method="wilson")
    assert one is not None and one[2:4, 1] == pytest.approx([100 * b for b in bounds])
    arms = [arm | {"chain": [f"m{i // 2}"]} for i in range(20)] + [arm | {"chain": []}]
    assert [len(shown) for shown in panels(arms)] == [6, 4]


def test_options_of_the_command():
    with pytest.raises(UserError, match="RUNS"):
        compare.parse([])
    assert compare.parse(["a", "b", "--evals=x,y"]).evals == ("x", "y")


def test_a_run_is_named_once_and_seeds_that_agree_have_no_interval(tmp_path, capsys):
    a0 = run(tmp_path / "a0", right=range(6))
    a1 = run(tmp_path / "a1", right=range(6), seed=1)
    assert compare.main([str(a0), f"{a0}/", f"--out={tmp_path}/out"]) == 2
    assert "a run is named twice" in capsys.readouterr().err
    assert compare.main([str(a0), str(a1), f"--out={tmp_path}/out"]) == 0
    cells = words((tmp_path / "out/comparison.md").read_text())
    assert ["a0 and 1 more", "held-out problems", "2", "60.0"] in cells
