"""Plugins: what a file of one's own adds is chosen, trained, resumed, evaluated and studied."""

import contextlib
import io
import json

import pytest

import options
import plugins
import train
from data.tasks import TASKS
from errors import RunFailed, UserError
from eval import __main__ as evaluation
from eval import benchmarks, traces
from eval.study import plan as study_plan
from eval.study.jobs import fingerprint
from losses.grpo import VARIANTS
from losses.kd import DIVERGENCES, WITH_BETA
from rl.advantage import ADVANTAGES
from rl.reward import PARTS, parse_reward
from run import read_lines, read_metrics
from tests.evaluation import checkpoint, rows, speaker
from tests.test_train import SMALL, timeless

pytestmark = pytest.mark.usefixtures("undrawn", "tables")

# What is built in, written again: a run with it is the run with the other, and a few new things.
MINE = """
import torch

from data.grade import grade_number
from data.tasks import TASKS, Task
from losses.grpo import VARIANTS, Variant
from losses.kd import DIVERGENCES, WITH_BETA
from rl.advantage import ADVANTAGES
from rl.reward import PARTS


def kl(student_logp, teacher_logp, beta):
    forward = (teacher_logp.exp() * (teacher_logp - student_logp)).sum(-1)
    backward = (student_logp.exp() * (student_logp - teacher_logp)).sum(-1)
    return beta * forward + (1 - beta) * backward


def ppo(ratio, clipped, logp, advantage):
    return torch.maximum(-ratio * advantage, -clipped * advantage)


def centred(rewards_G):
    return rewards_G - sum(rewards_G) / len(rewards_G)


def letters(example, completion):
    return completion.count("e") / 10


def seen(example, completion, stopped, verdict, tokens):
    assert verdict.strict in (True, False) and example.question
    return tokens + 100 * stopped


def double(rng):
    n = rng.randrange(1000)
    return f"What is twice {n}?", f"#### {2 * n}", str(2 * n)


DIVERGENCES["my_kl"] = kl
WITH_BETA.append("my_kl")
VARIANTS["my_ppo"] = Variant(ppo, "token")
ADVANTAGES["my_mean"] = centred
PARTS["seen"] = seen
PARTS["my_letters"] = letters
TASKS["doubles"] = Task(double, grade_number)
"""
KD = ["--mode=kd", *SMALL, "--teacher=random:tiny-teacher", "--kd_beta=0.3"]
GRPO = ["--mode=grpo", *SMALL, "--model=tiny-teacher", "--grpo_samples=4", "--sample_tokens=6"]


@pytest.fixture
def tables(monkeypatch):
    """What a test adds to the tables is gone after it."""
    every = (DIVERGENCES, VARIANTS, ADVANTAGES, PARTS, TASKS, benchmarks.READERS)
    before, with_beta = [set(table) for table in every], list(WITH_BETA)
    monkeypatch.setattr(plugins, "LOADED", {})
    yield
    WITH_BETA[:] = with_beta
    for table, names in zip(every, before, strict=True):
        for name in set(table) - names:
            table.pop(name, None)
        table.added.clear()
    options._parser.cache_clear()


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(MINE)
    return tmp_path


def run(*args, main=train.main):
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        code = main(["--device=cpu", *args] if main is train.main else list(args))
    return code, said.getvalue()


def losses(name):
    return [m["train/loss"] for m in read_metrics(f"runs/{name}") if "train/loss" in m]


def test_a_divergence_of_a_plugin_trains_and_goes_on_as_the_built_in_one(home):
    mine = [*KD, "--plugin=mine.py", "--kd_divergence=my_kl"]
    assert run(*KD, "--kd_divergence=mixed_kl", "--name=theirs")[0] == 0
    code, said = run(*mine, "--name=mine")
    assert code == 0 and f"plugins    mine.py {plugins.digests()[0]}" in said
    assert losses("mine") == pytest.approx(losses("theirs"), rel=2e-3) and len(losses("mine")) == 6
    # stopped after four steps, it goes on by what its config.json says
    short = ["--schedule=constant", "--data=doubles:20"]
    assert run(*mine, *short, "--name=whole")[0] == 0
    assert run(*mine, *short, "--steps=4", "--name=parts")[0] == 0
    assert json.loads((home / "runs/parts/config.json").read_text())["plugin"] == "mine.py"
    forget()
    code, said = run("--resume", "--name=parts", "--steps=6")
    assert code == 0 and "plugins mine.py" not in said
    last = [m for m in timeless(home / "runs/parts") if m["step"] > 4]
    assert last == [m for m in timeless(home / "runs/whole") if m["step"] > 4] != []
    assert read_metrics("runs/whole")[0]["eval/doubles/problems"] == 3


@pytest.mark.parametrize("form", ["{} |= {}", "{}.update({})", "{}.setdefault(*{}.popitem())"])
@pytest.mark.parametrize(
    "entry,words",
    [
        ("{'forward_kl': lambda a, b, c: a}", "a divergence 'forward_kl' already"),
        ("{'mine': lambda a: a}", "'mine' must be a function of"),
        ("{'a b': lambda a, b, c: a}", "'a b' is no name"),
    ],
)
def test_a_table_is_checked_however_it_is_filled(form, entry, words, home):
    if "setdefault" in form and "already" in words:
        return  # it leaves what is there
    text = f"from losses.kd import DIVERGENCES\n{form.format('DIVERGENCES', entry)}\n"
    (home / "table.py").write_text(text)
    with pytest.raises(UserError, match=words):
        plugins.load("table.py")
    good = "{'good': lambda a, b, c: a}"
    (home / "good.py").write_text(text.replace(entry, good))
    assert plugins.load("good.py") and DIVERGENCES.added == {"good"}


def test_what_fails_in_training_is_one_line_with_its_place(home, capsys):
    plain = [word for word in KD if not word.startswith("--kd_beta")]
    text = "from losses.kd import DIVERGENCES\n\n\ndef bad(student_logp, teacher_logp, beta):\n"
    text += "    return nothing\n\n\nDIVERGENCES['fails'] = bad\n"
    (home / "fails.py").write_text(text)
    assert train.main([*plain, "--plugin=fails.py", "--kd_divergence=fails"]) == 2
    said = capsys.readouterr().err
    assert said == "train.py: fails.py:5: NameError: name 'nothing' is not defined\n"


def forget():
    """Another process knows nothing of what a plugin added."""
    plugins.LOADED.clear()
    for table in (DIVERGENCES, VARIANTS, ADVANTAGES, PARTS, TASKS):
        for name in list(table.added):
            table.pop(name, None)
        table.added.clear()
    WITH_BETA[:] = [name for name in WITH_BETA if name in DIVERGENCES]


def test_a_run_that_fails_before_its_first_line_leaves_no_folder(home, monkeypatch):
    """What fails once it has begun stays, and so does what was there before."""
    kd = ["--mode=kd", *SMALL, "--teacher=random:tiny"]

    def broken(*args, **more):
        raise RunFailed("no weights")

    with monkeypatch.context() as m:
        m.setattr("prepare.load_policy", broken)
        assert run(*kd, "--name=a")[0] == run(*kd)[0] == 1
        assert not (home / "runs").exists()
        (home / "runs/b").mkdir(parents=True)
        (home / "runs/b/notes.txt").touch()
        assert run(*kd, "--name=b")[0] == 2 and (home / "runs/b/notes.txt").exists()
    with monkeypatch.context() as m:
        m.setattr(train, "compute_gradients", broken)
        assert run(*kd, "--name=c", "--eval_examples=0")[0] == 1
        assert list((home / "runs").iterdir()) == [home / "runs/b"]
        assert run(*kd, "--name=c")[0] == 1 and len(read_metrics("runs/c")) == 1
        assert run("--name=c", "--resume")[0] == 1 and (home / "runs/c/config.json").exists()


def test_a_changed_or_missing_plugin_is_said_when_a_run_goes_on(home):
    assert run(*KD, "--plugin=mine.py", "--kd_divergence=my_kl", "--name=r", "--steps=2")[0] == 0
    (home / "mine.py").write_text(MINE + "# other words\n")
    forget()
    code, said = run("--resume", "--name=r", "--steps=3")
    first, second = (line["plugins"] for line in read_lines(home / "runs/r/sittings.jsonl"))
    assert code == 0 and first != second
    assert f"other than in the sitting before: steps 2 -> 3, plugins {first} -> {second}" in said
    (home / "mine.py").rename(home / "moved.py")
    forget()
    assert run("--resume", "--name=r", "--steps=4") == (
        2,
        "train.py: --plugin mine.py is not there\n",
    )
    assert run("--resume", "--name=r", "--steps=4", "--plugin=moved.py")[0] == 0


def test_objective_advantage_and_rewards_of_a_plugin(home):
    mine = ["--plugin=mine.py", "--grpo_variant=my_ppo", "--grpo_clip_high=0.28"]
    mine += ["--grpo_advantage=my_mean", "--grpo_reward=my_letters,accuracy:0.5"]
    several = ["--grpo_ppo_epochs=2", "--lr=1e-2"]
    theirs = ["--grpo_variant=token", "--grpo_advantage=mean"]
    theirs += ["--grpo_reward=mine.py:letters,accuracy:0.5"]
    assert run(*GRPO, *theirs, *several, "--name=theirs")[0] == 0
    forget()
    assert run(*GRPO, *mine, *several, "--name=mine")[0] == 0
    assert losses("mine") == pytest.approx(losses("theirs"), rel=1e-5) and any(losses("mine"))
    rewards = [m["rollout/reward"] for m in read_metrics("runs/mine") if "rollout/reward" in m]
    assert any(rewards)
    for name, part in (("mine", "my_letters"), ("theirs", "letters")):
        samples = [s for s in read_lines(home / f"runs/{name}/samples.jsonl") if "reward" in s]
        assert samples and all(s["parts"].keys() == {part, "accuracy"} for s in samples)
        assert all(s["reward"] == pytest.approx(s["text"].count("e") / 10) for s in samples)


def test_a_reward_sees_row_length_end_and_verdict(home):
    reward = ["--plugin=mine.py", "--grpo_reward=seen:0.5,accuracy"]
    assert run(*GRPO, *reward, "--steps=2", "--name=r")[0] == 0
    samples = [s for s in read_lines(home / "runs/r/samples.jsonl") if "reward" in s]
    for s in samples:
        assert s["parts"]["seen"] == 0.5 * (s["tokens"] + 100 * s["stopped"])
    assert len(samples) == 8
    assert parse_reward("seen", 9).reads_gold and not parse_reward("my_letters", 9).reads_gold


MISTAKES = [
    ("x = (\n", "bad.py:1: SyntaxError: '(' was never closed"),
    ("\nimport nothing_like_it\n", "bad.py:2: ModuleNotFoundError: No module named"),
    ("\n\nraise SystemExit(0)\n", "bad.py:3: SystemExit: 0"),
    ("\nimport broken\n", "bad.py:2: SyntaxError: invalid syntax (broken.py, line 1)"),
    ("def f():\n    return 1 / 0\nf()\n", "bad.py:2: ZeroDivisionError"),
    ("from losses.kd import DIVERGENCES as D\nD['jsd'] = max\n", "bad.py:2: there is a divergence"),
    ("from losses.kd import DIVERGENCES as D\nD['a b'] = max\n", "'a b' is no name"),
    (
        "from losses.kd import DIVERGENCES as D\nD['mine'] = lambda s, t: s\n",
        "must be a function of (student_logp, teacher_logp, beta): too many positional",
    ),
    ("from losses.grpo import VARIANTS as V\nV['mine'] = max\n", "'mine' must be a Variant"),
    ("from data.tasks import TASKS as T\nT['mine'] = max\n", "the task 'mine' must be a Task"),
    ("from rl.advantage import ADVANTAGES as A\nA['mine'] = 3\n", "it cannot be called"),
    (
        "from rl.reward import PARTS as P\nP['mine'] = lambda example: 1.0\n",
        "(example, completion; by name also tokens, stopped, verdict, opened, coin)",
    ),
    ("a = 'caf\\xe9'".encode().decode("unicode_escape").encode("latin-1"), "is not UTF-8 text"),
]


@pytest.mark.parametrize("text,words", MISTAKES, ids=[words for _, words in MISTAKES])
@pytest.mark.parametrize("main", [train.main, evaluation.main])
def test_a_faulty_plugin_is_one_line(home, text, words, main):
    (home / "broken.py").write_text("1 +\n")
    more = [] if main is train.main else ["model", "--tasks=gsm8k"]
    (home / "bad.py").write_bytes(text if isinstance(text, bytes) else text.encode())
    code, said = run("--plugin=bad.py", *more, main=main)
    assert code == 2 and said.count("\n") == 1 and words in said and "--plugin bad.py" in said


@pytest.mark.parametrize(
    "args,words",
    [
        ("--plugin=nope.py", "--plugin nope.py is not there"),
        ("--plugin=.", "--plugin . is a folder"),
        ("--plugin", "--plugin: expected one argument"),
        ("--plugin=mine.py --kd_divergence=my_kll", "did you mean my_kl?"),
        ("--kd_divergence=my_kl", "--kd_divergence: no 'my_kl'"),
        ("--plugin=mine.py --plugin=nope.py", "--plugin nope.py is not there"),
        ("--mode=grpo --grpo_reward=accuracy,mine.py:kl", "kl must be a function of (example"),
        ("--mode=grpo --grpo_reward=mine.py:letters:x", "'x' is not a number"),
        ("--mode=grpo --plugin=mine.py --grpo_reward=sen", "random, seen, my_letters"),
        ("--mode=sft --data=doubles", "doubles"),
    ],
)
def test_what_a_plugin_does_not_add_is_one_line(home, args, words):
    code, said = run(*args.split())
    assert code == 2 and said.count("\n") == 1 and words in said


@pytest.mark.parametrize("name", ["accuracy", "length_penalty"])
def test_a_reward_of_ones_own_has_a_name_of_its_own(home, name):
    (home / "r.py").write_text(f"def {name}(example, completion): return 1.0\n")
    with pytest.raises(UserError, match=f"{name} is the name of another part"):
        parse_reward(f"r.py:{name}", 64, length_penalty=8)


def test_a_folder_may_have_a_colon_in_its_name(home):
    (home / "a:b").mkdir()
    (home / "mine.py").rename(home / "a:b/mine.py")
    code, said = run("--mode=sft", *SMALL, "--plugin=a:b/mine.py", "--dry_run")
    assert code == 0 and f"plugins    mine.py {plugins.digests()[0]}" in said


def test_help_and_files_know_what_a_plugin_adds(home, capsys):
    (home / "c.toml").write_text('plugin = "mine.py"\nmode = "kd"\nkd_divergence = "my_kl"\n')
    assert options.parse(train.Config, ["--config=c.toml"]).kd_divergence == "my_kl"
    with pytest.raises(SystemExit):
        options.parse(train.Config, ["--config=c.toml", "--help"])
    shown = " ".join(capsys.readouterr().out.split())
    for words in ("total_variation | my_kl)", "mis | my_ppo)", "maxrl | my_mean)"):
        assert words in shown
    assert "random | seen | my_letters)" in shown and "or mis or my_ppo" in shown


# --- evaluation and studies ----------------------------------------------------------------------

ROWS = [{"question": f"How much is {n} + 1?", "answer": f"#### {n + 1}"} for n in range(5)]


def test_a_task_of_a_plugin_and_a_file_of_ones_own_are_evaluated(home, monkeypatch):
    checkpoint(home / "model")
    (home / "own.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    monkeypatch.setattr("eval.sampling.generate", speaker(lambda i: f"#### {i + 1}"))
    args = ["model", "--plugin=mine.py", "--max_tokens=8", "--limit=5", "--out=out"]
    code, said = run(*args, "--tasks=doubles,own.jsonl,word_problems", main=evaluation.main)
    assert code == 0, said
    own = rows(home / "out", "own")
    assert [row["strict"] for row in own] == [True] * 5
    assert [row["gold"] for row in own] == ["1", "2", "3", "4", "5"]
    assert "What is twice" in rows(home / "out", "doubles")[0]["question"]
    # a grader that changed makes other figures; the file's are not concerned
    (home / "mine.py").write_text(MINE + "# other words\n")
    forget()
    code, said = run(*args, "--tasks=doubles", main=evaluation.main)
    assert code == 2 and "was made with another plugin" in said
    assert run(*args, "--tasks=own.jsonl", main=evaluation.main)[0] == 0
    assert traces.parse(["m", "--plugin=mine.py", "--data=doubles:4", "--out=o"]).data


@pytest.mark.parametrize(
    "args,words",
    [
        ("--tasks=nope.jsonl", "nope.jsonl is not there"),
        ("--tasks=asks.jsonl", "asks.jsonl:1: no answer that a grader knows; give it a column"),
        ("--tasks=own.json", "own.json is not there"),
        ("--tasks=own", "no 'own'"),
        ("--tasks=gsm8k --grader=number", "--grader is for files of your own"),
        ("--tasks=own.jsonl --grader=numbr", "did you mean number?"),
        ("--tasks=own.jsonl,sub/own.jsonl", "two of the files would be own in the results"),
        ("--tasks=own.jsonl --max_new_tokens=4", "here it is --max_tokens"),
    ],
)
def test_a_test_set_of_ones_own_that_cannot_be_used_is_one_line(home, args, words):
    checkpoint(home / "model")
    (home / "own.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (home / "asks.jsonl").write_text('{"prompt": "Say it."}\n')
    code, said = run("model", *args.split(), main=evaluation.main)
    assert code == 2 and said.count("\n") == 1 and words in said


def test_names_that_exist_win_over_files(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gsm8k.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    assert benchmarks.label("gsm8k") == "gsm8k"
    assert benchmarks.load("gsm8k.jsonl", "sets").name == "gsm8k.jsonl"
    assert benchmarks.label("a/own.jsonl.gz") == benchmarks.label("own.parquet") == "own"
    (tmp_path / "own.jsonl").write_text(json.dumps(ROWS[0] | {"task": "math"}) + "\n")
    assert benchmarks.load("own.jsonl", "sets").examples[0].task == "math"
    assert benchmarks.load("own.jsonl", "sets", grader="number").examples[0].task == "number"


STUDY = """
[study]
seeds = [0]
plugin = "mine.py"
[eval]
tasks = "doubles,own.jsonl"
[run.kd]
mode = "kd"
data = "doubles:8"
teacher = "random:tiny-teacher"
kd_divergence = "my_kl"
[arm.kd]
model = "tiny"
chain = ["kd"]
[arm.begun]
model = "runs/r"
chain = ["kd"]
[[claim]]
text = "one is better"
better = "kd"
worse = "begun"
task = "own"
"""


def test_a_study_has_a_plugin(home):
    checkpoint(home / "runs/r/checkpoints/step-3")
    (home / "own.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (home / "s.toml").write_text(STUDY)
    study = study_plan.read("s.toml")
    study.check_test_sets()
    for job in study.jobs:
        if job.kind in ("train", "eval"):
            assert f"--plugin={home}/mine.py" in job.command(home)
    names = [job.name for job in study.jobs]
    changes = [(home / "mine.py", MINE + "#"), (home / "own.jsonl", json.dumps(ROWS[0]))]
    for file, text in changes:  # what depends on a file is another job when that changes
        file.write_text(text)
        forget()
        fingerprint.cache_clear()
        now = [job.name for job in study_plan.read("s.toml").jobs]
        assert len(now) == len(names) and now != names
        names = now
    checkpoint(home / "runs/r/checkpoints/step-5", seed=1)
    fingerprint.cache_clear()
    assert [job.name for job in study_plan.read("s.toml").jobs] != names
    (home / "other.toml").write_text(STUDY.replace('plugin = "mine.py"', ""))
    forget()
    with pytest.raises(UserError, match="no 'my_kl'"):
        study_plan.read("other.toml")
    forget()
    assert study_plan.read("other.toml", plugin="mine.py").jobs
