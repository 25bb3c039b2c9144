"""The report of a study against values worked out by hand from a folder that is written by hand."""

import json
import math
import re
import struct

import pytest

from eval.study.plan import Study
from eval.study.report import fenced, write
from eval.study.results import Outcome, Results, check_claim, cost
from eval.study.schema import Arm, Claim
from eval.study.tables import claims_table

SEEDS, PROBLEMS = [0, 1], 40
ARMS = {
    "instruct": Arm("@instruct", [], paper={"gsm8k": 45.5}),
    "sft": Arm("@instruct", ["sft"], paper={"gsm8k": 30.9}),
    "kd_grpo": Arm("@instruct", ["kd", "grpo"], paper="collapsed"),
    "grpo": Arm("@instruct", ["grpo"], paper={"gsm8k": 54.0}),
}
CLAIMS = [
    Claim("SFT harms", better="instruct", worse="sft"),
    Claim("SFT beats RL", better="sft", worse="grpo"),
    Claim("RL helps", better="grpo", worse="instruct"),
    Claim("hybrids collapse", better="sft", worse="kd_grpo"),
    Claim("not run", better="sft", worse="dapo"),
    Claim("on another task", better="instruct", worse="sft", task="gsm8k"),
]
RIGHT = {
    ("instruct", 0): 20,
    ("instruct", 1): 20,
    ("sft", 0): 8,
    ("sft", 1): 10,
    ("kd_grpo", 0): 30,
    ("grpo", 0): 38,
    ("grpo", 1): 6,
}  # of 40


def report_of(out, outcomes, title="T", seeds=(0,), arms=ARMS, claims=()):
    """Write the report of a study; returns the text for the terminal."""
    return write(
        out, Study(title, list(seeds), 1, arms, list(claims), arm_jobs={}, jobs=[]), outcomes
    )


def jsonl(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def run(folder, steps, each, accuracies, ranks=1, more=True):
    """A run whose every step trains `each` tokens in 0.5 s; evaluated before and after."""
    factors = {"sampled_tokens": 2, "teacher_tokens": 3, "flops": 1e9} if more else {}
    rows = [{"step": 0, "eval/w/accuracy": accuracies[0], "eval/w/loss": 1.0}]
    for step in range(1, steps + 1):
        known = {f"train/{name}": factor * each * step for name, factor in factors.items()}
        rows.append({"step": step, "train/tokens": each * step, "train/seconds": 0.5} | known)
    jsonl(folder / "metrics.jsonl", [*rows, {"step": steps, "eval/w/accuracy": accuracies[1]}])
    (folder / "environment.json").write_text(json.dumps({"ranks": ranks}))
    return folder


def evaluation(
    folder,
    right,
    text="so\n#### {p}",
    task="word_problems",
    trained_on=(0, ()),
    prompt=(),
    **identity,
):
    """40 problems with two samples each, of which the first `right` problems are right in both.

    They are asked at temperature 0.6 unless `identity` says otherwise. trained_on: the number of
    questions, and the models of which nothing is recorded.
    """
    rows = [
        dict(
            problem=p,
            sample=s,
            question=f"What is {p} + 0?",
            gold=str(p),
            text=text.format(p=p),
            tokens=7,
            stopped=s == 0,
            strict=p < right,
        )
        for p in range(PROBLEMS)
        for s in (0, 1)
    ]
    jsonl(folder / "ckpt-abc" / f"{task}.jsonl", rows)
    accuracy = [right / PROBLEMS, right / PROBLEMS - 0.1, right / PROBLEMS + 0.1]
    more = [min(1.0, rate + 0.1) for rate in accuracy]
    identity = {
        "prompt": {"kind": "chat", "instruction": " Go.", "prefill": ""} | dict(prompt),
        "temperature": 0.6,
        "max_tokens": 99,
        "seed": 0,
    } | identity
    (folder / "ckpt-abc" / f"{task}.json").write_text(
        json.dumps({"identity": identity, "about": {"new_tokens": identity["max_tokens"]}})
    )
    summary = {
        "conditions": ["temperature 0.6, top-p 0.95", "a note on training"],
        "training": ["a note on training"],
        "comparisons": [],
        "summaries": [["ckpt-abc", task, {"accuracy": accuracy, "pass@10": more, "pass@2": more}]],
    }
    if trained_on:
        summary["trained_on"] = [["ckpt-abc", task, *trained_on]]
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def synthetic(out):
    """{(arm, seed): Outcome}.

    kd_grpo's seed 1 failed; instruct was evaluated once for both seeds; sft is trained on traces.
    """
    outcomes = {}
    traces = out / "traces" / "t"
    made = {"tokens": 5000, "seconds": 36.0, "flops": 7e12}
    about = {"identity": {}, "about": {"environment": {"ranks": 2}}, "generated": made}
    jsonl(traces / "samples.json", [about])
    for (arm, seed), right in RIGHT.items():
        evals = out / "evals" / (arm if arm == "instruct" else f"{arm}-{seed}")
        evaluation(evals, right, "```\n````\n#### {p}" if arm == "grpo" else "so\n#### {p}")
        runs = []
        for link in ARMS[arm].chain:
            folder = out / "runs" / f"{link}-{arm}-{seed}"
            each = 100 * (1 + seed)
            runs.append(run(folder, 10, each, (0.5, 0.6), ranks=4, more=arm != "kd_grpo"))
        kl = out / "kl" / f"{arm}-{seed}.json"
        if runs:
            own = {"reverse_kl": 0.1 + 0.2 * seed, "top1": 0.9, "entropy": 0.5}
            jsonl(kl, [{"on_own": own, "on_reference": {"forward_kl": 0.4, "top1": 0.8}}])
        outcomes[arm, seed] = Outcome(
            runs=runs,
            traces=[traces] if arm == "sft" else [],
            evals=evals,
            start_evals=out / "evals" / "instruct" if runs else None,
            kl=kl if runs else None,
        )
    failure = f"train.py: 5 steps in a row had no finite gradient in {out.resolve()}/runs/x"
    outcomes["kd_grpo", 1] = Outcome(failure=failure)
    return outcomes


def rows_of(page):
    """{first cell: line} of a page's tables."""
    lines = [line for line in page.splitlines() if line.startswith("|")]
    return {line.split(" | ")[0].strip("| "): line for line in lines}


def size_of(picture):
    """Width and height of a PNG, in pixels."""
    head = picture.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    return struct.unpack(">II", head[16:])


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    out = tmp_path_factory.mktemp("study")
    outcomes = synthetic(out)
    said = report_of(out, outcomes, "A study", SEEDS, claims=CLAIMS)
    return out, outcomes, said, json.loads((out / "report.json").read_text())


def test_accuracies_gains_and_costs(study):
    arms = {a["arm"]: a for a in study[3]["arms"]}
    # Student's t of one degree of freedom; the standard error of 0.20 and 0.25
    reach = 12.706205 * 0.05 / 2
    got = arms["sft"]["accuracy"]["word_problems"]
    assert got["over"] == "seeds" and got["each"] == [0.2, 0.25]
    assert got["figure"] == pytest.approx([0.225, 0.0, 0.225 + reach], rel=1e-5)
    assert arms["instruct"]["accuracy"]["word_problems"] == {
        "figure": [0.5, 0.4, 0.6],
        "each": [0.5, 0.5],
        "over": "problems",
    }  # one evaluation: no news from seeds
    assert arms["kd_grpo"]["accuracy"]["word_problems"]["over"] == "problems"
    assert arms["kd_grpo"]["seeds"] == [0]
    passed = arms["sft"]["pass_at_k"]["word_problems"]
    assert list(passed) == ["pass@10"] and passed["pass@10"]["each"] == pytest.approx([0.3, 0.35])
    assert passed["pass@10"]["figure"][0] == pytest.approx(0.325)
    assert arms["instruct"]["gain"]["word_problems"]["figure"] is None
    gain, mean = arms["sft"]["gain"]["word_problems"], -0.275
    assert gain["each"] == pytest.approx([-0.3, -0.25])
    low, high = gain["over_problems"]
    assert -0.45 < low < mean < high < -0.1
    assert gain["over_seeds"] == pytest.approx([mean - reach, mean + reach], rel=1e-5)
    bound = mean - math.hypot(mean - low, reach)
    assert gain["figure"][:2] == pytest.approx([mean, bound], rel=1e-5)
    # seeds trained 1,000 and 2,000 tokens in 5 s on 4 ranks; the traces took 36 s on 2 ranks
    assert arms["sft"]["cost"] == pytest.approx(
        {
            "student_tokens": 1500,
            "sampled_tokens": 3000,
            "teacher_tokens": 4500 + 5000,
            "flops": 1.5e12 + 7e12,
            "seconds": 5 + 36,
            "device_hours": (5 * 4 + 36 * 2) / 3600,
        }
    )
    # two runs of a metrics.jsonl without FLOPs, seed 0 alone
    old = {"student_tokens": 2000, "sampled_tokens": None, "flops": None, "seconds": 10}
    assert arms["kd_grpo"]["cost"] == arms["kd_grpo"]["cost"] | old
    assert set(arms["instruct"]["cost"].values()) == {0}
    assert arms["sft"]["kl"]["on_own/reverse_kl"] == pytest.approx(0.2)
    assert arms["instruct"]["kl"] == {}


def test_verdicts(study):
    verdicts = {c["text"]: (c["verdict"], c["paper"]) for c in study[3]["claims"]}
    assert verdicts == {
        "hybrids collapse": ("paper: collapsed", "collapsed"),
        "not run": ("-", None),
        "SFT beats RL": ("not shown", pytest.approx(-23.1)),  # seeds differ: -75 and +10 points
        "RL helps": ("not shown", pytest.approx(8.5)),
        "SFT harms": ("not shown", pytest.approx(14.6)),  # two seeds know little
        # what was named was not evaluated, and nothing else is taken for it
        "on another task": ("-", pytest.approx(14.6)),
    }
    assert {claim["column"] for claim in study[3]["claims"]} == {"gsm8k"}


@pytest.mark.parametrize("right,expected", [(8, "agrees"), (38, "contradicts"), (21, "not shown")])
def test_verdicts_on_one_seed_are_sure_of_problems_alone(right, expected, tmp_path):
    outcomes = {}
    for arm, n in (("instruct", 20), ("sft", right)):
        outcomes[arm, 0] = Outcome(evals=evaluation(tmp_path / arm, n))
    # where the paper says nothing, the claim's own sign counts
    unasked = {name: Arm("m", []) for name in ARMS}
    for arms, paper in ((ARMS, pytest.approx(14.6)), (unasked, None)):
        claim = check_claim(Results([0], arms, outcomes), CLAIMS[0])
        assert claim["ours"]["over_seeds"] is None and claim["paper"] == paper
        assert claims_table([claim])[0]["verdict"] == f"{expected} (one seed)"


def test_the_page(study):
    out, _, said, _ = study
    page = (out / "report.md").read_text()
    rows = rows_of(page.split("## What")[0])
    first = "| arm | chain | seeds | word_problems | gain word_problems |"
    first += " pass@10 word_problems | paper gsm8k |"
    assert f"{first} student tokens |" in page
    assert "instruct → kd → grpo | 1 of 2 | 75.0 [65.0, 85.0] |" in rows["kd_grpo"]
    assert "| collapsed | 2,000 | - | - | - |" in rows["kd_grpo"]
    assert "| 22.5 [0.0, 54.3] | -27.5 [" in rows["sft"]
    assert "| 30.9 | 1,500 | 3,000 | 9,500 | 8.5e+12 | 41 |" in rows["sft"]
    failed = "kd_grpo, seed 1 FAILED: train.py: 5 steps in a row had no finite gradient in runs/x"
    assert failed in page and page.count("temperature 0.6") == 1
    for name in ("curves.png", "cost.png", "samples.md"):
        assert f"]({name})" in page and (out / name).stat().st_size > 500
    for name in ("curves.png", "cost.png"):
        assert all(400 < pixels < 3000 for pixels in size_of(out / name))
    for name in ("report.md", "report.json", "samples.md"):
        assert str(out) not in (out / name).read_text()
    assert "22.5 [0.0, 54.3]" in said and "not shown" in said and failed in said
    assert max(map(len, said.splitlines())) <= 160


@pytest.mark.parametrize(
    "change,said",
    [
        ({"seed": 5}, None),
        ({"prompt": {"prefill": "So"}}, "prefill"),
        ({"temperature": 1.0, "prompt": {"kind": "plain"}}, "prompt, temperature"),
        (None, "conditions not known"),
    ],
)
def test_a_pair_that_was_asked_differently_is_marked_in_the_tables(change, said, tmp_path):
    """A gain over the start and a claim, of two seeds; only the second was asked differently."""
    start = evaluation(tmp_path / "start", 20)
    outcomes = {}
    for seed, own in enumerate(({}, change or {})):
        evals = evaluation(tmp_path / f"sft-{seed}", 8, **own)
        outcomes["instruct", seed] = Outcome(evals=start)
        outcomes["sft", seed] = Outcome(evals=evals, start_evals=start)
    if change is None:
        (tmp_path / "sft-1" / "ckpt-abc" / "word_problems.json").unlink()
    arms = {name: ARMS[name] for name in ("instruct", "sft")}
    text = report_of(tmp_path, outcomes, seeds=SEEDS, arms=arms, claims=CLAIMS[:1])
    page = (tmp_path / "report.md").read_text()
    rows = rows_of(page.split("## Where")[0])
    note = f"†: sft on word_problems was asked differently: {said}"
    for place, wanted in (
        (rows["sft"], " † |"),
        (page, note),
        (rows["SFT harms"], f"| differently: {said} |"),
        (text, note),
        (text, f"differently: {said}  "),
    ):
        assert (wanted in place) == (said is not None)
    assert ("| alike |" in rows["SFT harms"]) == (said is None)
    assert "| instruct | 2 of 2 | 50.0 [40.0, 60.0] | - |" in rows["instruct"]


def test_what_was_trained_on_is_said_and_unknown_is_not_none(tmp_path):
    base = ("Qwen/Base",)
    about = {"a": (0, ()), "b": (None, base), "c": (None, base)}
    about |= {"d": (3, ()), "e": (2, base), "f": None}
    outcomes = {}
    for arm, known in about.items():
        outcomes[arm, 0] = Outcome(evals=evaluation(tmp_path / arm, 20, trained_on=known))
    report_of(tmp_path, outcomes, arms={arm: Arm("m", []) for arm in about})
    report = json.loads((tmp_path / "report.json").read_text())
    unknown = "Whether these arms were trained on questions of word_problems is not known, "
    old = "a checkpoint evaluated before this was kept"
    assert report["conditions"] == ["temperature 0.6, top-p 0.95"]
    assert report["training"] == [
        "d, seed 0, WAS TRAINED ON 3 of word_problems's questions",
        "e, seed 0, WAS TRAINED ON AT LEAST 2 of word_problems's questions",
        f"{unknown}for nobody recorded what Qwen/Base learned from: b, c",
        f"{unknown}for nobody recorded what {old} learned from: f",
    ]
    page = (tmp_path / "report.md").read_text()
    assert all(f"- {line}" in page for line in report["training"])


@pytest.mark.parametrize(
    "file,missing,seconds,tokens",
    [
        ("environment.json", "ranks", 1.5, 300),
        ("environment.json", "", 1.5, 300),
        ("metrics.jsonl", "train/seconds", math.nan, 300),
        ("metrics.jsonl", "", math.nan, math.nan),
    ],
)
def test_costs_that_nobody_measured_are_not_0(file, missing, seconds, tokens, tmp_path):
    """missing: in the file; empty: all of it."""
    path = run(tmp_path / "run", 3, 100, (0.1, 0.2)) / file
    text = path.read_text()
    path.unlink()
    if missing:
        path.write_text(text.replace(missing, "other"))
    found = cost(Outcome(runs=[path.parent]))
    expected = {"seconds": seconds, "student_tokens": tokens, "device_hours": math.nan}
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, nan_ok=True)


def test_costs_of_traces_that_nobody_measured_are_not_0(tmp_path):
    about = {"about": {}, "generated": {"tokens": 5, "seconds": 2.0}}
    jsonl(tmp_path / "samples.json", [about])
    found = cost(Outcome(traces=[tmp_path]))
    assert (found["teacher_tokens"], found["seconds"]) == (5, 2.0)
    assert math.isnan(found["device_hours"]) and math.isnan(found["flops"])


def test_the_report_begins_with_what_it_says_and_ends_with_where_it_is(study):
    out, _, said, report = study
    page = (out / "report.md").read_text()
    short = page.partition("## In short")[2].partition("## All arms")[0].strip().splitlines()
    # kd_grpo has one seed, in which grpo is 8 of 40 problems above it
    assert report["short"]["arm"] == "kd_grpo"
    first = "**Highest on word_problems**: kd_grpo, 75.0 [65.0, 85.0] % (1 seed)"
    assert short[0].startswith(f"- {first}") and first[:40] in said
    assert "-20.0 [" in short[1]
    assert "the next one, grpo (paired on 40 problems and 1 seed," in short[1]
    assert f"p {2 / 2**8:.2g} by sign flips over problems; asked alike" in short[1]
    assert short[2].endswith("of 3 comparisons, not corrected for their number): grpo.")
    assert "2,000 student tokens" in short[3] and "FLOPs" not in short[3]  # not measured
    assert "kd_grpo +25.0 [" in short[4] and "over @instruct" not in short[4]
    assert "`--arms kd_grpo,grpo --seeds 0,1,2`" in short[5] and "takes 160 of them" in short[5]
    rows = {(row["arm"], row["seed"]): row for row in report["where"]}
    assert rows["grpo", "1"]["evaluation"] == "evals/grpo-1"
    command = "`python train.py --config STUDY/runs/grpo-grpo-1/config.json"
    assert rows["grpo", "1"]["command"].startswith(command)
    assert rows["instruct", "0"]["command"] == "none: the model as it is"
    assert page.index("## Where everything is") > page.index("## Accuracy against cost")


def test_in_short_with_seeds_that_agree_and_with_one_arm(tmp_path):
    outcomes = {}
    for arm, right in (("sft", (20, 24, 28)), ("grpo", (10, 15, 20))):
        for seed, number in enumerate(right):
            outcomes[arm, seed] = Outcome(evals=evaluation(tmp_path / f"{arm}{seed}", number))
    arms = {arm: ARMS[arm] for arm in ("sft", "grpo")}
    report_of(tmp_path, outcomes, seeds=(0, 1, 2), arms=arms)
    short = (tmp_path / "report.md").read_text().partition("## In short")[2].splitlines()
    (line,) = [line for line in short if "**Next**" in line]
    # t(2) / sqrt(3) = 2.484; half of it is 1.242: t(4) / sqrt(5) = 1.2417
    assert "5 seeds (now 3)" in line and "`--arms sft,grpo --seeds 0,1,2,3,4`" in line
    one = {("sft", 0): outcomes["sft", 0]}
    report_of(tmp_path, one, arms={"sft": ARMS["sft"]})
    page = (tmp_path / "report.md").read_text()
    assert "**Highest on word_problems**: sft, 50.0" in page and "**Next**" not in page


def test_equal_outcomes_have_equal_reports(study, tmp_path):
    out, outcomes, _, _ = study
    names = ("report.md", "report.json", "samples.md")
    before = [(out / name).read_bytes() for name in names]
    report_of(out, dict(reversed(outcomes.items())), "A study", SEEDS, claims=CLAIMS)
    assert before == [(out / name).read_bytes() for name in names]
    assert not list(out.glob("*draft*"))


def test_samples(study):
    page = (study[0] / "samples.md").read_text()
    arms = {part.split(",")[0]: part for part in page.split("\n## ")[1:]}
    assert list(arms) == list(ARMS)
    for part in arms.values():
        assert part.count("**right**") == part.count("**wrong**") == 2
    ours, theirs = (set(re.findall("What is .*", arms[arm])) for arm in ("instruct", "sft"))
    assert len(ours) == 4 and len(ours & theirs) >= 2  # the same ones where the verdicts allow
    assert "`````text\n```\n````\n####" in arms["grpo"]
    assert fenced("a" * 1300).splitlines()[1] == "a" * 1200 + "… (100 more characters)"
    assert fenced("`" * 9).startswith("`" * 10 + "text")


def test_a_study_with_nothing_done(tmp_path):
    outcomes = {("sft", 0): Outcome(failure="it\nbroke")}
    said = report_of(tmp_path, outcomes, "Nothing", claims=CLAIMS)
    assert "sft, seed 0 FAILED: it broke" in said
    page = (tmp_path / "report.md").read_text()
    assert "| sft | instruct → sft | 0 of 1 | 30.9 | - | - |" in page


def test_models_as_they_are(tmp_path):
    """The shape of comparison.toml: no chain at all, tasks under the paper's names.

    One model is a folder, the other is evaluated on a single problem.
    """
    arms = {
        "a": Arm("/somewhere/big-1.5b", [], paper={"olympiad": 6.2, "gsm8k": 62.5}),
        "b": Arm("hub/b", []),
    }
    outcomes = {}
    for arm in arms:
        outcomes[arm, 0] = Outcome(evals=evaluation(tmp_path / arm, 20, task="gsm8k"))
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    summary["summaries"][0][2]["accuracy"][1:] = [math.nan] * 2
    (tmp_path / "b" / "summary.json").write_text(json.dumps(summary))
    claim = Claim("a > b", better="a", worse="b", task="olympiad")
    report_of(tmp_path, outcomes, "Larger models", arms=arms, claims=[claim])
    page = (tmp_path / "report.md").read_text()
    for line in (
        "| seeds | gsm8k | paper gsm8k | gain gsm8k | pass@10 gsm8k | paper olympiad | student",
        "| a | big-1.5b | 1 of 1 | 50.0 [40.0, 60.0] | 62.5 | - | 60.0 [50.0, 70.0] | 6.2 | 0 |",
        "| 50.0 | - | - | 60.0 [50.0, 70.0] | - | 0 |",
    ):
        assert line in page
    assert "/somewhere" not in page
    report = json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)
    assert report["arms"][1]["accuracy"]["gsm8k"]["figure"] == [0.5, None, None]
    assert report["claims"][0]["task"] is None and report["claims"][0]["verdict"] == "-"


def test_arms_on_tasks_of_their_own(tmp_path):
    """An arm that is asked something else has its samples and its panel of costs too."""
    arms, height = {"a": Arm("m", []), "b": Arm("m", [])}, {}
    for name, other in (("alike", "gsm8k"), ("apart", "mbpp")):
        out = tmp_path / name
        outcomes = {}
        for arm, task in (("a", "gsm8k"), ("b", other)):
            outcomes[arm, 0] = Outcome(evals=evaluation(out / arm, 20, task=task))
        report_of(out, outcomes, name, arms=arms)
        page = (out / "samples.md").read_text()
        assert "## a, seed 0, on gsm8k\n" in page and f"## b, seed 0, on {other}\n" in page
        height[name] = size_of(out / "cost.png")[1]
    assert height["apart"] > 1.5 * height["alike"]
