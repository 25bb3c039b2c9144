"""Programming tasks: the code in a completion found, real problems graded, MBPP trained on."""

import collections
import gzip
import json
import os
import threading

import pytest

from data import sandbox, tasks
from data.dataset import Dataset
from data.formats import read_examples, read_rows, to_example
from data.grade import Verdict
from data.grading import code
from data.grading.code import IMPORT, find_code, grade_code, humaneval, mbpp
from data.sandbox import at_once, check_many
from data.tasks import grade
from errors import UserError
from run import read_metrics
from tests.test_rl import run
from tests.test_train import SMALL

RIGHT, WRONG, LENIENT, NOTHING = (
    Verdict(True, True, True),
    Verdict(False, False, True),
    Verdict(False, True, False),
    Verdict(False, False, False),
)
ROW = {
    "task_id": "HumanEval/0",
    "entry_point": "double",
    "prompt": "import math\n\ndef helper(x):\n    return x + x\n\n\ndef double(x: int) -> int:\n"
    '    """Twice x.\n    >>> double(2)\n    4\n    """\n',
    "canonical_solution": "    return helper(x)\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n"
    "    assert candidate(2) == 4\n    assert candidate(0) == helper(0)\n",
}
PROBLEM = {
    "task_id": 601,
    "prompt": "Write a function to double.",
    "code": "import sys\ndef double(x):\n  return 2 * x",
    "test_imports": ["import math"],
    "test_list": ["assert double(2) == math.floor(4.5)", "assert double(sys.maxsize) > 0"],
}


def row(number, **more):
    return PROBLEM | {"task_id": number} | more


# --- completions ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text,verdict",
    [
        ("    return 2 * x\n", RIGHT),
        ("    y = x\n\n    # twice\n    return y + y", RIGHT),
        ("return 2 * x", RIGHT),
        ("y = x\nfor _ in [1]:\n    y += x\nreturn y", RIGHT),
        ("    return helper(x)", RIGHT),
        ("    return math.floor(2 * x)", RIGHT),
        ("    return 3 * x", WRONG),
        ("    return x * x * x\n", WRONG),
        ("", WRONG),
        ("    pass", WRONG),
        ("def double(x):\n    return 2 * x", RIGHT),
        ("def double(x):\n    return helper(x)", RIGHT),
        ("import sys\n\ndef other(x): return 2 * x\n\ndef double(x): return other(x)", RIGHT),
        ("double = lambda x: 2 * x", RIGHT),
        ("class double(int):\n    def __new__(cls, x): return 2 * x", RIGHT),
        ("def double(x):\n    return 3 * x", WRONG),
        ("```python\ndef double(x):\n    return 2 * x\n```", RIGHT),
        ("```\n    return 2 * x\n```", RIGHT),
        ("```py\nreturn 2 * x\n```", RIGHT),
        ("```Python3\ndef double(x): return 2 * x", RIGHT),
        ("Here it is:\n\n```python\ndef double(x):\n    return 2 * x\n```\n\nIt doubles.", RIGHT),
        ("```python\nimport math\n```\nand\n```python\ndef double(x): return 2*x\n```", RIGHT),
        (
            "```python\ndef double(x): return 2*x\n```\nUse it:\n```python\nprint(double(2))\n```\n"
            "```bash\nls\n```",
            RIGHT,
        ),
        (
            "```python\ndef double(x): return 3*x\n```\nNo:\n"
            "```python\ndef double(x): return 2*x\n```",
            RIGHT,
        ),
        ("```python\ndef double(x) return 2*x\n```", NOTHING),
        ("  ```python\ndef double(x):\n    return 2 * x\n  ```", RIGHT),
        ("```python\ndef double(x):\n    s = '```'\n    return 2 * x\n```", RIGHT),
        ("def double(x):\n    return 2 * x\n\nThis function doubles.", LENIENT),
        ("Sure! Here you are.\n\ndef double(x):\n    return 2 * x\n", LENIENT),
        (
            "Sure! Here you are.\n\nimport math\ndef double(x):\n    return 2 * x\n\n"
            "It's easy (see above).",
            LENIENT,
        ),
        ("    return 2 * x\n\nThat doubles x.", LENIENT),
        ("I do not know.", NOTHING),
        ("def double(x", NOTHING),
        ("\x00", NOTHING),
        ("(" * 60_000, NOTHING),
        ("#" * 60_000, NOTHING),
        ("(" * 40_000, NOTHING),
        ("\ud800", NOTHING),
        ("thought " * 10_000 + "\n```python\ndef double(x): return 2*x\n```", RIGHT),
        ("```python\ndef double(x): return 2*x" + "#" * 20_000, NOTHING),
        ("import os\nos._exit(0)", WRONG),
        ("print('passed')", WRONG),
        ("def double(x):\n    return 2 * x\nimport os\nos._exit(0)", WRONG),
        (
            "def helper(x): return 0\ndef double(x): return 0",
            WRONG,
        ),  # the tests have a helper of their own
    ],
)
def test_completions_of_a_humaneval_problem(text, verdict):
    example = to_example(ROW, "here:1")
    assert grade(example, text) == verdict


@pytest.mark.parametrize(
    "text,verdict",
    [
        ("```python\ndef double(x):\n    return x + x\n```", RIGHT),
        ("def double(x): return x << 1", RIGHT),
        ("So:\ndef double(x): return x << 1", LENIENT),
        ("return 2 * x", NOTHING),
        ("```python\ndef twice(x): return 2 * x\n```", WRONG),
        ("def double(x): return 5", WRONG),
        ("", WRONG),
        ("abs = set = math = lambda *a: 0\ndef double(x): return 0", WRONG),
    ],
)
def test_completions_of_an_mbpp_problem(text, verdict):
    assert grade(to_example(PROBLEM, "here:1"), text) == verdict


def test_what_is_executed_is_shown(monkeypatch):
    """The tests are apart from the solution, and the problem's beginning belongs to both."""
    (prompt, solution, tests), (question, gold, answer) = humaneval(ROW, ""), mbpp(PROBLEM, "")
    assert prompt == ROW["prompt"] and solution == ROW["canonical_solution"]
    assert (
        tests
        == ROW["prompt"].rstrip()
        + IMPORT
        + "double\n"
        + ROW["test"].rstrip()
        + "\n\ncheck(double)\n"
    )
    assert (
        question
        == "Write a function to double.\nYour code should pass these tests:\n\n"
        + "\n".join(PROBLEM["test_list"])
    )
    assert gold == f"```python\n{PROBLEM['code']}\n```"
    assert (
        answer
        == "import math\nimport sys" + IMPORT + "double\n" + "\n".join(PROBLEM["test_list"]) + "\n"
    )
    program, marked = find_code("    return 2 * x", tests)
    assert (
        marked
        and program.startswith(ROW["prompt"].rstrip())
        and program.endswith("\n    return 2 * x")
    )
    program, _ = find_code("def double(x): return 2", tests)
    assert program.startswith("import math\n\ndef helper") and program.count("def double") == 1
    asked = []
    monkeypatch.setattr(
        code,
        "check",
        lambda *a, **k: asked.append((a, k)) or collections.namedtuple("O", "passed")(True),
    )
    assert (
        grade_code("return 1", tests) == RIGHT
        and asked[0][0][1] == tests
        and not grade_code("no (", tests).strict
        and len(asked) == 1
    )


# --- files ----------------------------------------------------------------------------------------


def write(path, rows):
    text = (
        json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(r) + "\n" for r in rows)
    )
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def test_splits_follow_the_data_sets_own_rules(tmp_path):
    rows = [row(n) for n in (2, 10, 11, 510, 511, 600, 601, 974, 975)]
    path = write(tmp_path / "mbpp.json", rows)
    numbers = {}
    for split in ("train", "test"):
        numbers[split] = [e.origin.rpartition(" ")[2] for e in read_examples(path, split)]
    assert numbers == {"train": ["7", "8"], "test": ["3", "4"]}
    assert {e.task for e in read_examples(path, "train")} == {"mbpp"}
    path = write(tmp_path / "HumanEval.jsonl.gz", [ROW, ROW])
    assert [e.task for e in read_examples(path, "test")] == ["humaneval"] * 2
    with pytest.raises(UserError, match="none of its 2 rows is for train"):
        Dataset(str(path), None, seed=0, max_tokens=9, vocab=9)


@pytest.mark.parametrize(
    "bad,words",
    [
        (row(601, test_list=[]), "'test_list'"),
        (row(601, test_list=[3]), "'test_list'"),
        (row(601, code="def f(:"), "no Python"),
        (row(601, test_list=["assert f("]), "no Python"),
        (row(601, prompt=""), "'prompt'"),
        (row(601, code=None), "'code'"),
        (row(601, test_list=["assert 1"]), "use nothing"),
        (ROW | {"entry_point": ""}, "'entry_point'"),
        (ROW | {"test": 3}, "'test'"),
    ],
)
def test_a_malformed_problem_is_named(bad, words):
    with pytest.raises(UserError) as e:
        to_example(bad, "file:3")
    assert "file:3" in str(e.value) and words in str(e.value) and "\n" not in str(e.value)


def test_a_broken_archive_is_one_line(tmp_path):
    for i, data in enumerate((b"no archive", gzip.compress(b'{"a": 1}\n' * 99)[:-20])):
        path = tmp_path / f"{i}.jsonl.gz"
        path.write_bytes(data)
        with pytest.raises(UserError, match="gzip|cut off"):
            list(read_rows(path))


# --- real problems --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def problems():
    """[(example, row)] of HumanEval and MBPP, each with its row."""
    from pathlib import Path

    if not os.environ.get("SRLM_DATA"):
        pytest.skip("SRLM_DATA is not set: it names the folder with the real data")
    found = []
    for name in ("humaneval/HumanEval.jsonl.gz", "mbpp/sanitized-mbpp.json"):
        if not (path := Path(os.environ["SRLM_DATA"]) / name).is_file():
            pytest.skip(f"SRLM_DATA has no {name}")
        found += [(to_example(r, origin), r) for origin, r in read_rows(path)]
    assert collections.Counter(e.task for e, _ in found) == {"humaneval": 164, "mbpp": 427}
    return found


def outcomes(problems, completion):
    jobs = []
    for example, r in problems:
        program, marked = find_code(completion(example, r), example.answer)
        assert marked, example.origin
        jobs.append((program, example.answer))
    return collections.Counter(o.reason for o in check_many(jobs, timeout=60.0)), jobs


@pytest.mark.parametrize("step", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_gold_solutions_all_pass(problems, step):
    """HumanEval 164 of 164, MBPP 427 of 427, no exceptions; a fourth of them here."""
    found, _ = outcomes(problems[::step], lambda example, _: example.messages[1]["content"])
    assert found == {"passed": {4: 148, 1: 591}[step]}


def test_splits_of_the_real_mbpp(problems):
    split = collections.Counter(code.split_of(r) for _, r in problems)
    assert split == {"test": 164 + 257, "train": 120, "": 50}


BREAK = """

_right = {name}


def {name}(*args, **kwargs):
    value = _right(*args, **kwargs)
    return not value if isinstance(value, bool) else {how}
"""


def corrupted(example, r, how):
    name = example.answer.partition(IMPORT)[2].split("\n")[0].split(",")[0]
    body = r.get("code") or r["prompt"] + r["canonical_solution"]
    return body + BREAK.format(name=name, how=how)


def test_corrupted_solutions_all_fail(problems):
    """A sixth of them here; each calls its gold solution and returns something else."""
    assert (
        outcomes(problems[::6], lambda e, r: corrupted(e, r, "None if value else 7"))[0]["passed"]
        == 0
    )


@pytest.mark.slow
@pytest.mark.parametrize("how", ["None if value else 7", "[value]", "...", "(value, value)"])
def test_corrupted_solutions_all_fail_all_of_them(problems, how):
    assert outcomes(problems, lambda e, r: corrupted(e, r, how))[0]["passed"] == 0


@pytest.mark.slow
def test_gold_solutions_in_other_forms(problems):
    """HumanEval as a complete function, fenced or bare; MBPP bare. And another problem's solution
    passes nowhere."""

    def complete(example, r):
        return r.get("code") or r["prompt"] + r["canonical_solution"]

    def fenced(example, r):
        return f"Here:\n```python\n{complete(example, r)}\n```\nDone."

    for completion in (complete, fenced):
        assert outcomes(problems, completion)[0] == {"passed": 591}
    programs = [find_code(complete(e, r), e.answer)[0] for e, r in problems]
    jobs = [(programs[i - 1], e.answer) for i, (e, _) in enumerate(problems)]
    assert not [jobs[i] for i, o in enumerate(check_many(jobs, timeout=60.0)) if o.passed]


@pytest.mark.parametrize("task,together", [("mbpp", 3), ("gsm8k", 1), ("", 1)])
def test_several_are_graded_at_once_where_that_helps(task, together, monkeypatch):
    monkeypatch.setattr(tasks, "at_once", lambda: 3)
    barrier = threading.Barrier(together, timeout=300)

    def grade_one(example, number):
        barrier.wait()
        return number

    assert tasks.grade_all(
        grade_one, [(tasks.Example((), task=task), i) for i in range(9)]
    ) == list(range(9))
    with pytest.raises(threading.BrokenBarrierError):
        barrier.abort()
        tasks.grade_all(grade_one, [(tasks.Example((), task=task), 1)])


def test_ranks_share_the_processors(tmp_path, monkeypatch):
    cores = len(os.sched_getaffinity(0))
    monkeypatch.setattr(sandbox, "PROCESSOR_QUOTA", tmp_path / "none")
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert at_once() == cores
    for ranks, share in ((1, cores), (cores, 1), (4 * cores, 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        assert at_once() == share


@pytest.mark.parametrize("quota,share", [("max 100000", 8), ("250000 100000", 2), ("9 100000", 1)])
def test_a_container_has_the_time_of_fewer_processors(quota, share, tmp_path, monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(8))
    monkeypatch.setattr(sandbox, "PROCESSOR_QUOTA", tmp_path / "cpu.max")
    (tmp_path / "cpu.max").write_text(f"{quota}\n")
    assert at_once() == share


# --- training -------------------------------------------------------------------------------------


def test_mbpp_is_trained_on(tmp_path):
    """sft on gold solutions, then grpo with the sandbox as its reward; the rows that are not for
    training are left out."""
    tests = {"test_imports": [], "test_list": ["assert double(2) == 4"]}
    path = write(
        tmp_path / "mbpp.json",
        [row(n, prompt=f"Double {n}.", **tests) for n in (11, 12, *range(601, 609))],
    )
    data = [o for o in SMALL if not o.startswith("--data")] + [
        f"--data={path}",
        "--micro_batch_tokens=600",
    ]
    code_, said = run("--mode=sft", *data, "--name=s", cwd=tmp_path)
    assert code_ == 0, said
    model = tmp_path / "runs/s/checkpoints/step-6"
    small = ["--batch_size=4", "--grpo_samples=2", "--sample_tokens=10", "--steps=2"]
    code_, said = run("--mode=grpo", *data, *small, f"--model={model}", "--name=g", cwd=tmp_path)
    assert code_ == 0, said
    assert all(
        "eval/mbpp/accuracy" in read_metrics(tmp_path / f"runs/{name}")[-1] for name in "sg"
    )  # graded within the run too
    lines = [m for m in read_metrics(tmp_path / "runs/g") if "rollout/reward" in m]
    assert len(lines) == 2 and all(
        m["rollout/accuracy"] == m["rollout/reward_accuracy"] for m in lines
    )
    samples = [
        json.loads(line) for line in (tmp_path / "runs/g/samples.jsonl").read_text().splitlines()
    ]
    assert samples and all("Double 6" in s["question"] for s in samples if "reward" in s)
