"""Rollouts through the command: they run, resume bit for bit, and refuse what cannot work."""

import contextlib
import io
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import options
import train
from config import validate
from data.tokenizer import Tokenizer
from model.generate import Completion
from run import read_metrics
from tests import distributed_workers as workers
from tests.chat_templates import OPENED
from tests.test_train import SMALL, timeless

pytestmark = pytest.mark.usefixtures("undrawn")
GRPO = [
    "--mode=grpo",
    *SMALL,
    "--batch_size=8",
    "--grpo_samples=4",
    "--sample_tokens=10",
    "--steps=6",
    "--lr=1e-3",
]


def run(*args, cwd, ranks=0):
    """(exit code, output) of a run: in this process where one rank does, since a start is slow."""
    if ranks:
        result = workers.run(*args, cwd=cwd, ranks=ranks)
        return result.returncode, result.stderr
    said = io.StringIO()
    torch.set_num_threads(1)
    with contextlib.chdir(cwd), contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        return train.main(["--device=cpu", *args]), said.getvalue()


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """A checkpoint that writes something, from six steps of sft."""
    cwd = tmp_path_factory.mktemp("start")
    code, said = run("--mode=sft", *SMALL, "--name=t", "--model=tiny-teacher", cwd=cwd)
    assert code == 0, said
    return cwd / "runs/t/checkpoints/step-6"


@pytest.fixture
def reward(tmp_path):
    """A reward with spread on gibberish: how often the letter e is written."""
    (tmp_path / "mine.py").write_text(
        "def letters(example, completion):\n"
        "    return completion.count('e') + 0.01 * len(completion)\n"
    )
    return f"--grpo_reward={tmp_path / 'mine.py'}:letters"


def rollout_lines(folder):
    return [m for m in read_metrics(folder) if "rollout/reward" in m]


def test_grpo_logs_what_was_sampled_and_rewarded(start, reward, tmp_path):
    code, said = run(*GRPO, f"--model={start}", reward, "--name=r", cwd=tmp_path)
    assert code == 0, said
    lines = rollout_lines(tmp_path / "runs/r")
    names = ("truncated", "unparsed", "disagree", "spread", "kept", "tokens")
    assert len(lines) == 6 and {f"rollout/{name}" for name in names} <= set(lines[0])
    assert all(
        m["train/sampler_mismatch"] < 1e-4
        and 0 < m["train/entropy"] < 7
        and m["rollout/tokens"] <= 10
        for m in lines
    )
    assert any(m["train/grad_norm"] > 0 for m in lines)
    samples = [
        json.loads(line) for line in (tmp_path / "runs/r/samples.jsonl").read_text().splitlines()
    ]
    sampled = [s for s in samples if "reward" in s]
    assert len(sampled) == 6 * 8 and all(s["parts"] == {"letters": s["reward"]} for s in sampled)
    assert all(
        s["reward"] == pytest.approx(s["text"].count("e") + 0.01 * len(s["text"])) for s in sampled
    )


VARIED = [
    "--grpo_minibatches_per_rollout=2",
    "--grpo_ppo_epochs=2",
    "--grpo_kl_coef=0.1",
    "--grpo_dynamic_sampling_rounds=1",
    "--grpo_mask_truncated",
    "--grpo_tis=truncate",
]


@pytest.mark.parametrize(
    "more",
    [
        [*VARIED, "--grpo_variant=gspo"],
        [
            "--grpo_variant=dr_grpo",
            "--grpo_kl_in=reward",
            "--grpo_kl_coef=0.1",
            "--grpo_advantage=leave_one_out",
            "--grpo_truncation_penalty=0.5",
        ],
        [
            "--grpo_variant=cispo",
            "--grpo_minibatches_per_rollout=3",
            "--grpo_entropy_coef=0.01",
            "--grpo_length_penalty=4",
            "--save_every=1",
        ],
        [
            "--grpo_variant=gmpo",
            "--grpo_minibatches_per_rollout=3",
            "--grpo_reward=random",
            "--grpo_advantage=maxrl",
            "--grpo_tis=mask_sequence",
        ],
    ],
    ids=["gspo", "dr_grpo", "cispo", "gmpo"],
)
def test_a_run_that_is_cut_in_the_middle_of_a_rollout_goes_on_bit_for_bit(
    start, reward, tmp_path, more
):
    args = [
        *GRPO,
        "--save_every=1",
        "--max_checkpoints=9",
        f"--model={start}",
        reward,
        *more,
        "--name=r",
    ]
    code, said = run(*args, cwd=tmp_path)
    assert code == 0, said
    whole = tmp_path / "runs/r"
    for step in (1, 3):
        cut = tmp_path / "cut" / str(step) / "r"
        shutil.copytree(whole, cut)
        for path in (cut / "checkpoints").iterdir():
            if int(path.name[5:]) > step:
                shutil.rmtree(path)
        code, said = run("--name=r", "--resume", f"--runs={cut.parent}", cwd=tmp_path)
        assert code == 0, said
        assert (
            timeless(cut) == timeless(whole)
            and timeless(cut)[-2]["train/flops"] > 0
            and (cut / "samples.jsonl").read_text() == (whole / "samples.jsonl").read_text()
        )


def test_unspent_samples_keep_what_they_were_scored_with(start, reward, tmp_path):
    assert (
        run(
            *GRPO,
            f"--model={start}",
            reward,
            "--grpo_minibatches_per_rollout=2",
            "--steps=1",
            "--name=r",
            cwd=tmp_path,
        )[0]
        == 0
    )
    for more in ("--grpo_kl_coef=0.1", "--sample_temperature=0.5", "--grpo_variant=gspo"):
        code, said = run("--name=r", "--resume", "--steps=4", more, cwd=tmp_path)
        assert code == 2 and "keeps it" in said
    assert run("--name=r", "--resume", "--steps=4", "--grpo_clip_high=0.3", cwd=tmp_path)[0] == 0


def test_rollouts_without_anything_to_learn_from_do_not_end_a_run(start, tmp_path):
    """No sample is right, so every refill is in vain."""
    args = [
        *GRPO,
        f"--model={start}",
        "--grpo_reward=accuracy",
        "--grpo_dynamic_sampling_rounds=1",
        "--grpo_minibatches_per_rollout=2",
        "--name=r",
    ]
    for more in (["--steps=4"], ["--steps=8", "--resume"]):  # moments of no update at all
        assert (done := run(*args, *more, cwd=tmp_path))[0] == 0, done[1]
    last = read_metrics(tmp_path / "runs/r")[-2]
    assert (last["train/no_gradient"], last["train/skipped"]) == (8, 0)


SPREAD_AT_FIRST = """
count = 0

def f(example, completion):
    global count
    count += 1
    return float(count % 3) if count <= 16 else 1.0
"""


@pytest.mark.parametrize("ranks", [0, 2])
def test_a_batch_without_spread_steps_nothing(start, tmp_path, ranks):
    """Two steps with advantages fill AdamW's momentum, three have none.

    In those weights and optimizer state stay as they are, to the bit.
    """
    (tmp_path / "mine.py").write_text(
        SPREAD_AT_FIRST.replace("16", "8" if ranks else "16")
    )  # each rank counts its own samples
    more = [
        f"--grpo_reward={tmp_path}/mine.py:f",
        "--weight_decay=0.5",
        "--save_every=1",
        "--max_checkpoints=9",
        "--steps=5",
        "--eval_examples=0",
    ]
    code, said = run(*GRPO, f"--model={start}", *more, "--name=r", cwd=tmp_path, ranks=ranks)
    assert code == 0, said
    lines = [m for m in read_metrics(tmp_path / "runs/r") if "train/no_gradient" in m]
    assert [m["train/no_gradient"] for m in lines] == [0, 0, 1, 2, 3] and not any(
        m["train/skipped"] for m in lines
    )
    assert [m["train/grad_norm"] > 0 for m in lines] == [True, True, False, False, False]
    if not ranks:
        assert "NOTHING TO LEARN: no group's rewards differ  no gradient 3" in said
        assert "\n3 of 5 steps had no gradient (no group's rewards differed)\n" in said
        (tmp_path / "flat.py").write_text("def f(example, completion):\n    return 1.0\n")
        more[0] = f"--grpo_reward={tmp_path}/flat.py:f"
        code, said = run(*GRPO, f"--model={start}", *more, "--steps=1", "--name=n", cwd=tmp_path)
        assert code == 0 and "1 of 1 steps had no gradient (no group's rewards differed); N" in said

    def tensors(step):
        folder = tmp_path / f"runs/r/checkpoints/step-{step}"
        return load_file(folder / "model.safetensors") | load_file(
            folder / "trainer/optimizer.safetensors"
        )

    first, moved = tensors(1), tensors(2)
    assert any(not torch.equal(x, first[name]) for name, x in moved.items())
    for step in (3, 4, 5):
        assert tensors(step).keys() == moved.keys() and all(
            torch.equal(x, moved[name]) for name, x in tensors(step).items()
        )


def test_a_batch_without_spread_is_trained_on_where_something_else_teaches(start, tmp_path):
    (tmp_path / "mine.py").write_text("def f(example, completion):\n    return 1.0\n")
    for more in (
        ["--grpo_entropy_coef=0.01"],
        ["--grpo_kl_coef=0.1", "--reference=random:tiny-teacher"],
    ):
        args = [
            *GRPO,
            f"--model={start}",
            f"--grpo_reward={tmp_path}/mine.py:f",
            "--steps=2",
            "--eval_examples=0",
            f"--name={more[0][2:]}",
        ]
        assert (done := run(*args, *more, cwd=tmp_path))[0] == 0, done[1]
        lines = [m for m in read_metrics(tmp_path / f"runs/{more[0][2:]}") if "train/loss" in m]
        assert lines[-1]["train/no_gradient"] == 0 and lines[0]["train/grad_norm"] > 0


@pytest.mark.parametrize(
    "opens,text,parts",
    [
        (True, "6 and 6.\n</think>\n<answer>12</answer>", {"accuracy": 1.0, "format": 1.0}),
        (
            True,
            "<think>6 and 6.</think>\n<answer>12</answer>",
            {"accuracy": 1.0, "format": -1.0},
        ),  # the tag twice
        (False, "6 and 6.\n</think>\n<answer>12</answer>", {"accuracy": 1.0, "format": -1.0}),
        (False, "<think>6 and 6.</think>\n<answer>13</answer>", {"accuracy": 0.0, "format": 1.0}),
    ],
)
def test_the_format_is_that_of_prompt_and_completion_together(
    start, tmp_path, monkeypatch, opens, text, parts
):
    """Where the generation prompt opens <think>, the best completion begins behind it."""
    folder = tmp_path / "model"
    shutil.copytree(start, folder)
    if opens:
        (folder / "chat_template.jinja").write_text(OPENED)
    tokenizer = Tokenizer.load(folder)

    def write(model, prompts, *args, **more):
        assert all(tokenizer.decode(p).endswith("<think>\n") == opens for p in prompts)
        ids = [*tokenizer.encode(text), tokenizer.stop_ids()[0]]
        return [Completion(ids, [-1.0] * len(ids), True) for _ in prompts]

    monkeypatch.setattr("rl.rollout.generate", write)
    (tmp_path / "d.jsonl").write_text('{"question": "6+6?", "answer": "12"}\n')
    args = [
        f"--model={folder}",
        "--data=d.jsonl",
        "--eval_examples=0",
        "--steps=1",
        "--grpo_reward=accuracy,format",
        "--sample_tokens=90",
    ]
    code, said = run(*GRPO, *args, "--name=r", cwd=tmp_path)
    assert code == 0, said
    samples = [
        json.loads(line) for line in (tmp_path / "runs/r/samples.jsonl").read_text().splitlines()
    ]
    assert samples and all(s["parts"] == parts for s in samples)


def test_rewards_that_read_no_gold_answer_need_none(start, tmp_path):
    (tmp_path / "d.jsonl").write_text(
        "".join(json.dumps({"prompt": f"Say {i}."}) + "\n" for i in range(4))
    )
    args = [f"--model={start}", "--data=d.jsonl", "--eval_examples=0", "--steps=1"]
    code, said = run(*GRPO, *args, "--name=a", cwd=tmp_path)
    assert code == 2 and "d.jsonl:" in said and "no answer that a grader knows (4 such)" in said
    code, said = run(*GRPO, *args, "--name=b", "--grpo_reward=format", cwd=tmp_path)
    assert code == 0, said


def test_a_reward_that_fails_on_one_rank_ends_all_and_is_said_once(start, tmp_path):
    (tmp_path / "bad.py").write_text(
        "import os\n"
        "def f(e, c):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise KeyError('x')\n"
        "    return 1.0\n"
    )
    code, said = run(
        *GRPO,
        f"--model={start}",
        f"--grpo_reward={tmp_path}/bad.py:f",
        "--name=r",
        "--eval_examples=0",
        cwd=tmp_path,
        ranks=2,
    )
    assert code and said.count("train.py: --grpo_reward") == 1 and "gloo" not in said


def test_two_ranks_sample_and_learn_the_same(start, reward, tmp_path):
    args = [
        *GRPO,
        "--dtype=float64",
        "--steps=3",
        "--grpo_minibatches_per_rollout=2",
        f"--model={start}",
        reward,
        "--name=r",
    ]
    (one, _), (two, said) = (
        run(*args, "--runs=one", cwd=tmp_path),
        run(*args, "--runs=two", cwd=tmp_path, ranks=2),
    )
    assert one == two == 0, said
    for a, b in zip(timeless(tmp_path / "one/r"), timeless(tmp_path / "two/r"), strict=True):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
        assert a.get("train/flops", 1) and a.get(
            "train/sampled_tokens", 1
        )  # compared like all others, and not 0


@pytest.mark.parametrize(
    "more",
    [
        ["--kd_prefix=student", "--kd_mix=0.5"],
        ["--kd_prefix=teacher", "--kd_signal=topk", "--kd_topk=5"],
        [
            "--kd_prefix=student",
            "--kd_signal=sampled",
            "--kd_divergence=reverse_kl",
            "--kd_temperature=1",
        ],
    ],
    ids=["mixture", "teacher, top-k", "sampled"],
)
def test_distillation_on_what_a_model_writes(start, tmp_path, more):
    args = ["--mode=kd", *SMALL, "--sample_tokens=8", f"--teacher={start}", *more, "--name=r"]
    code, said = run(*args, cwd=tmp_path)
    assert code == 0, said
    lines = [m for m in read_metrics(tmp_path / "runs/r") if "train/loss" in m]
    written = sum("rollout/tokens" in m for m in lines)
    assert len(lines) == 6 and (0 < written < 6 if "--kd_mix=0.5" in more else written == 6)


def test_unlikely_tokens_become_less_likely_without_a_teacher(start, tmp_path):
    args = ["--mode=kd", *SMALL, "--sample_tokens=8", "--kd_prefix=student", "--kd_signal=unlikely"]
    code, said = run(*args, f"--model={start}", "--lr=1e-3", "--steps=6", "--name=r", cwd=tmp_path)
    assert code == 0, said
    assert "train/teacher" not in json.loads((tmp_path / "runs/r/config.json").read_text())
    lines = [m for m in read_metrics(tmp_path / "runs/r") if "train/loss" in m]
    assert len(lines) == 6 and lines[-1]["train/teacher_tokens"] == 0
    assert all(0 < m["train/loss"] < 0.5 and m["train/grad_norm"] > 0 for m in lines)
    assert lines[-1]["train/entropy"] < lines[0]["train/entropy"]


def test_a_divergence_joins_the_policy_gradient(start, tmp_path):
    args = [
        *GRPO,
        f"--model={start}",
        f"--teacher={start}",
        "--grpo_kd_coef=0.5",
        "--grpo_reward=accuracy",
        "--steps=2",
        "--name=r",
    ]
    code, said = run(*args, cwd=tmp_path)
    assert code == 0, said
    lines = [m for m in read_metrics(tmp_path / "runs/r") if "train/loss" in m]
    assert (
        lines[0]["train/reverse_kl"] < 1e-6 < lines[-1]["train/grad_norm"] + 1
    )  # the teacher is the policy itself


@pytest.mark.parametrize(
    "body, words",
    [
        ("raise KeyError('x')", "raised KeyError"),
        ("return float('nan')", "returned nan"),
        ("return 'many'", "returned 'many', which is no finite number"),
        ("raise SystemExit(0)", "raised SystemExit"),
    ],
)
def test_a_reward_that_fails_is_one_line_that_names_the_sample(
    start, tmp_path, capsys, body, words
):
    (tmp_path / "bad.py").write_text(f"def f(example, completion):\n    {body}\n")
    assert (
        train.main(
            [
                *GRPO,
                f"--model={start}",
                f"--grpo_reward={tmp_path}/bad.py:f",
                f"--runs={tmp_path}/runs",
                "--name=r",
                "--eval_examples=0",
            ]
        )
        == 2
    )
    err = capsys.readouterr().err
    assert words in err and "word_problems problem" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "args, words",
    [
        (["--sample_top_p=0.9"], "change who samples"),
        (["--sample_top_k=5"], "change who samples"),
        (["--grpo_samples=3"], "no whole groups"),
        (["--grpo_samples=1"], "at least 2"),
        (["--grpo_reward=accurcy"], "choose from accuracy"),
        (["--grpo_reward=nofile.py:f"], "--grpo_reward nofile.py is not there"),
        (["--kd_temperature=2"], "not read with mode=grpo"),
        (["--weighting=sequence"], "not read with mode=grpo"),
        (
            ["--teacher=random:tiny-teacher"],
            "not read with grpo_kd_coef=0.0, only with --mode kd, and there with --kd_signal full "
            "or topk or student_topk or draws or sampled, or with --grpo_kd_coef above 0",
        ),
        (["--grpo_kl_estimator=k1"], "not read with grpo_kl_coef=0.0"),
        (["--grpo_variant=sapo", "--grpo_clip_low=0.1"], "not read with grpo_variant=sapo"),
        (["--grpo_advantage=maxrl", "--grpo_reward=signed_accuracy"], "must not be negative"),
        (["--grpo_advantage=maxrl", "--grpo_truncation_penalty=0.1"], "must not be negative"),
        (["--grpo_advantage=maxrl", "--grpo_reward=accuracy,format:-1"], "must not be negative"),
        (["--grpo_paced", "--grpo_reward=random"], "random looks at no answer: add accuracy"),
        (
            ["--mode=kd", "--kd_signal=unlikely"],
            "--kd_signal unlikely is an expectation over the student's own tokens",
        ),
        (
            ["--mode=kd", "--kd_signal=unlikely", "--kd_prefix=student", "--kd_mix=0.5"],
            "--kd_signal unlikely takes no --kd_mix",
        ),
        (
            ["--mode=kd", "--kd_signal=unlikely", "--teacher=random:tiny-teacher"],
            "teacher is not read with",
        ),
        (["--reference=tiny"], "not read with grpo_kl_coef"),
        (["--sample_tokens=300", "--micro_batch_tokens=256"], "do not fit --micro_batch_tokens"),
        (["--sample_temperature=inf"], "sample_temperature: inf is not a number that is finite"),
        (["--sample_temperature=0"], "must be above 0"),
        (["--grpo_kl_coef=0.1", "--grpo_kl_in=rewards"], "did you mean reward"),
        (
            ["--grpo_kl_coef=0.1", "--grpo_kl_in=reward", "--grpo_kl_estimator=k3"],
            "set --grpo_kl_estimator k1, or --grpo_kl_in loss",
        ),
        (
            ["--grpo_kl_coef=0.1", "--grpo_kl_in=reward", "--grpo_kl_estimator=k2"],
            "set --grpo_kl_estimator k1, or --grpo_kl_in loss",
        ),
        (
            ["--grpo_kl_coef=0.1", "--grpo_kl_estimator=k1"],
            "set --grpo_kl_estimator k3 or k2, or --grpo_kl_in reward",
        ),
        (
            [
                "--grpo_kd_coef=0.5",
                "--teacher=random:tiny-teacher",
                "--kd_divergence=skew_forward_kl",
                "--kd_beta=1",
            ],
            "zero everywhere",
        ),
        (
            [
                "--grpo_kd_coef=0.5",
                "--teacher=random:tiny-teacher",
                "--kd_divergence=skew_reverse_kl",
                "--kd_beta=1",
            ],
            "zero everywhere",
        ),
        (
            ["--mode=kd", "--kd_prefix=student", "--kd_ce=0.1"],
            "set --kd_ce 0, or --kd_prefix data or teacher",
        ),
        (
            ["--mode=kd", "--kd_prefix=student", "--kd_mix=0.5", "--kd_ce=1"],
            "set --kd_ce 0, or --kd_prefix data or teacher",
        ),
    ],
)
def test_settings_that_cannot_work(start, tmp_path, capsys, args, words):
    common = GRPO if "--mode=kd" not in args else ["--mode=kd", "--device=cpu"]
    assert train.main([*common, f"--model={start}", f"--runs={tmp_path}", *args]) == 2
    err = capsys.readouterr().err
    assert words in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "args",
    [
        ["--mode=grpo", "--grpo_kl_coef=0.1", "--grpo_kl_in=reward"],
        ["--mode=grpo", "--grpo_kl_coef=0.1", "--grpo_kl_in=reward", "--grpo_kl_estimator=k1"],
        ["--mode=grpo", "--grpo_kl_coef=0.1", "--grpo_kl_estimator=k2"],
        ["--mode=grpo", "--grpo_kd_coef=0.5", "--kd_divergence=skew_forward_kl", "--kd_beta=0.9"],
        [
            "--mode=grpo",
            "--grpo_kd_coef=0.5",
            "--kd_divergence=jsd",
            "--kd_beta=1",
        ],  # by convention the reverse KL
        ["--mode=kd", "--kd_prefix=teacher", "--kd_ce=0.5"],
        ["--mode=kd", "--kd_prefix=student", "--kd_mix=0", "--kd_ce=0.5"],  # all on the data
    ],
)
def test_their_neighbours_work(args):
    validate(options.parse(train.Config, args))


def test_a_run_keeps_the_values_that_its_variant_brought(start, reward, tmp_path):
    """config.json holds what was resolved: a resumed run has it whatever later defaults say."""
    args = [
        *GRPO,
        f"--model={start}",
        reward,
        "--grpo_variant=gspo",
        "--grpo_kl_coef=0.1",
        "--grpo_kl_in=reward",
        "--steps=1",
        "--name=r",
    ]
    assert (done := run(*args, cwd=tmp_path))[0] == 0, done[1]
    path = tmp_path / "runs/r/config.json"
    stored = json.loads(path.read_text())
    assert {
        k: stored[k]
        for k in ("grpo_clip_low", "grpo_clip_high", "grpo_advantage", "grpo_kl_estimator")
    } == {
        "grpo_clip_low": 3e-4,
        "grpo_clip_high": 4e-4,
        "grpo_advantage": "std",
        "grpo_kl_estimator": "k1",
    }
    path.write_text(json.dumps(stored | {"grpo_clip_low": 0.125}))
    assert (done := run("--name=r", "--resume", "--steps=2", cwd=tmp_path))[0] == 0, done[1]
    assert (
        json.loads(path.read_text())["grpo_clip_low"] == 0.125
        and json.loads(path.read_text())["grpo_clip_high"] == 4e-4
    )


def test_grpo_on_real_gsm8k(real_data, start, tmp_path):
    """A few steps with the real tokenizer and vocabulary and a small random body."""
    (tmp_path / "mine.py").write_text(
        "def length(example, completion):\n    return len(completion)\n"
    )
    args = [
        f"--data={real_data / 'gsm8k'}",
        f"--tokenizer={real_data / 'qwen2.5-tokenizer'}",
        "--model=small",
        "--micro_batch_tokens=1024",
        "--train_examples=200",
        "--steps=2",
        "--batch_size=4",
        "--grpo_samples=2",
        "--sample_tokens=12",
        "--eval_examples=0",
        "--save_every=0",
        f"--grpo_reward={tmp_path}/mine.py:length",
    ]
    code, said = run("--mode=grpo", *args, "--name=g", cwd=tmp_path)
    assert code == 0, said
    lines = rollout_lines(tmp_path / "runs/g")
    assert len(lines) == 2 and all(
        m["train/sampler_mismatch"] < 1e-3 and m["train/entropy"] > 9 and m["train/grad_norm"] > 0
        for m in lines
    )
