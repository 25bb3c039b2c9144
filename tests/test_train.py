"""The command itself: runs, resumes, refuses, and leaves behind what it says."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import toy_models
import train
from config import Config, sampling_of
from run import RunFolder, read_metrics
from tests.conftest import ROOT
from tests.distributed_workers import run, start

SMALL = [
    "--steps=6",
    "--batch_size=4",
    "--eval_examples=3",
    "--eval_tokens=8",
    "--eval_every=4",
    "--save_every=2",
    "--warmup=2",
    "--data=word_problems:20",
]
TIMES = ("seconds", "tokens_per_second", "mfu", "memory_gb")


def command(*args, cwd, ranks=0):
    torchrun = (
        ["-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--standalone"]
        if ranks
        else []
    )
    return [sys.executable, *torchrun, str(ROOT / "train.py"), "--device=cpu", *args], dict(
        cwd=cwd, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )


def as_users_run(*args, cwd, ranks=0):
    argv, options = command(*args, cwd=cwd, ranks=ranks)
    return subprocess.run(argv, **options, capture_output=True, text=True, timeout=600)


def sft(*args, cwd, **more):
    return run("--mode=sft", *SMALL, *args, cwd=cwd, **more)


def timeless(folder):
    """The run's metrics without what a clock or a memory gauge says; [] before there are any."""
    lines = []
    for metrics in read_metrics(folder):
        lines.append({k: v for k, v in metrics.items() if not k.endswith(TIMES)})
    return lines


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """A checkpoint of a six-step run, and everything that run left behind."""
    cwd = tmp_path_factory.mktemp("teacher")
    result = as_users_run("--mode=sft", *SMALL, "--name=t", "--model=tiny-teacher", cwd=cwd)
    assert result.returncode == 0, result.stderr
    return cwd / "runs" / "t", result


def test_what_a_run_leaves_behind(teacher):
    folder, result = teacher
    files = {
        "config.json",
        "environment.json",
        "sittings.jsonl",
        "metrics.jsonl",
        "samples.jsonl",
        "curves.png",
        "checkpoints",
    }
    assert {p.name for p in folder.iterdir()} == files
    assert (folder / "curves.png").read_bytes()[:4] == b"\x89PNG"
    config = json.loads((folder / "config.json").read_text())
    assert (
        config["mode"] == "sft"
        and config["steps"] == 6
        and not any(k.startswith(("kd_", "teacher", "epochs")) for k in config)
    )
    environment = json.loads((folder / "environment.json").read_text())
    assert (
        environment["packages"]["torch"] == torch.__version__
        and "--mode=sft" in environment["command"]
    )
    metrics = read_metrics(folder)
    steps = [m["step"] for m in metrics if "train/loss" in m]
    assert steps == [1, 2, 3, 4, 5, 6] and [
        m["step"] for m in metrics if "eval/word_problems/accuracy" in m
    ] == [0, 4, 6]
    assert (
        metrics[-2]["train/tokens"] > 6 * 4 * 30
        and metrics[-2]["train/loss"] < metrics[1]["train/loss"]
    )
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 9 and set(samples[0]) == {
        "step",
        "question",
        "gold",
        "text",
        "correct",
        "lenient",
        "parsed",
        "tokens",
        "stopped",
    }
    checkpoints = RunFolder(folder)
    assert checkpoints.steps() == [4, 6] and not list((folder / "checkpoints").glob(".*"))
    assert "before" in result.stdout and "accuracy" in result.stdout and "left" in result.stdout


def test_the_checkpoint_is_a_model_for_everyone(teacher):
    transformers = pytest.importorskip("transformers")
    folder = teacher[0] / "checkpoints" / "step-6"
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert theirs.generation_config.eos_token_id == [2, 0]
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Mia has 3 books."}],
        tokenize=False,
        add_generation_prompt=True,
    )
    assert text == toy_models.toy_tokenizer().render(
        [{"role": "user", "content": "Mia has 3 books."}], generate=True
    )


def test_a_run_that_is_cut_and_resumed_writes_what_it_would_have_written(teacher, tmp_path):
    args = ["--name=r", f"--teacher={teacher[0] / 'checkpoints' / 'step-6'}", "--kd_ce=0.2"]
    whole = run("--mode=kd", *SMALL, *args, "--runs=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    process = start("--mode=kd", *SMALL, *args, "--runs=cut", cwd=tmp_path)
    metrics = tmp_path / "cut" / "r" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 4) and process.is_alive():
        time.sleep(0.002)
    process.kill()
    process.join()
    with open(metrics, "a") as f:
        f.write('{"step": 3, "train/lo')  # as if cut while writing
    resumed = run(
        "--name=r", "--runs=cut", "--resume", cwd=tmp_path
    )  # the run's own config.json says the rest
    assert resumed.returncode == 0, resumed.stderr
    assert timeless(tmp_path / "cut" / "r") == timeless(tmp_path / "whole" / "r") != []
    assert (tmp_path / "cut/r/samples.jsonl").read_text() == (
        tmp_path / "whole/r/samples.jsonl"
    ).read_text()
    for name in ("model.safetensors", "trainer/optimizer.safetensors", "trainer/state.json"):
        a, b = (tmp_path / w / "r/checkpoints/step-6" / name for w in ("cut", "whole"))
        assert a.read_bytes() == b.read_bytes(), name


def test_sigterm_saves_and_exits_and_the_run_goes_on(tmp_path):
    sft = ["--mode=sft", *SMALL, "--steps=9999", "--save_every=0", "--eval_every=0", "--name=s"]
    process, said = start(*sft, cwd=tmp_path), tmp_path / "stdout"
    while not (said.exists() and "0/9999" in said.read_text()):
        assert process.is_alive()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(600)
    out, err = said.read_text(), (tmp_path / "stderr").read_text()
    assert process.exitcode == 0 and "--name s --resume" in out, (out, err)
    (step,) = RunFolder(tmp_path / "runs" / "s").steps()
    assert (
        step < 9999
        and len([m for m in read_metrics(tmp_path / "runs/s") if "train/loss" in m]) == step
    )
    again = run("--name=s", "--resume", f"--steps={step + 2}", cwd=tmp_path)
    assert again.returncode == 0 and f"resumed at step {step}" in again.stdout, again.stderr


def test_torchrun_with_two_ranks_trains_the_same_model(teacher, tmp_path):
    args = [
        "--mode=kd",
        *SMALL,
        "--steps=3",
        "--dtype=float64",
        "--micro_batch_tokens=130",
        f"--teacher={teacher[0] / 'checkpoints/step-6'}",
    ]
    results = [
        run(*args, "--name=w1", cwd=tmp_path, ranks=1),
        as_users_run(*args, "--name=w2", cwd=tmp_path, ranks=2),
    ]
    assert all(r.returncode == 0 for r in results), results[1].stderr
    one, two = (timeless(tmp_path / "runs" / f"w{n}") for n in (1, 2))
    assert len(one) == len(two) == 5
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys() and all(b[k] == pytest.approx(a[k], rel=1e-9) for k in a)
    assert results[1].stdout.count("step 0/3") == 1  # rank 0 alone speaks
    samples = [(tmp_path / "runs" / f"w{n}" / "samples.jsonl").read_text() for n in (1, 2)]
    assert samples[0] == samples[1] and samples[0].count("\n") == 6


def test_non_finite_steps_are_skipped_counted_and_end_the_run(tmp_path):
    result = sft(
        "--lr=1e30",
        "--max_grad_norm=0",
        "--max_skipped=3",
        "--save_every=0",
        "--steps=20",
        "--eval_examples=0",
        "--name=n",
        cwd=tmp_path,
    )
    assert (
        result.returncode == 1
        and "3 steps in a row had no finite gradient" in result.stderr
        and "Traceback" not in result.stderr
    )
    train_lines = read_metrics(tmp_path / "runs/n")
    assert train_lines[-1]["train/skipped"] == 3 and train_lines[0]["train/skipped"] == 0


def test_show_batch_prints_the_masks_and_trains_nothing(tmp_path):
    result = sft("--show_batch=2", cwd=tmp_path)
    assert (
        result.returncode == 0
        and result.stdout.count("--- example") == 2
        and not (tmp_path / "runs").exists()
    )
    assert (
        "⟦" in result.stdout
        and "####" in result.stdout.split("⟦")[1].split("⟧")[0]
        and "How many" in result.stdout.split("⟦")[0]
    )


@pytest.mark.parametrize(
    "args,words",
    [
        (["--mod=kd"], "did you mean mode"),
        (["--mode=sft", "--kd_beta=0.1"], "mode=sft"),
        (["--mode=sft", "--model=nowhere"], "--model nowhere"),
        (["--mode=kd", "--teacher=nowhere"], "--teacher nowhere"),
        (["--mode=sft", "--data=nowhere.jsonl"], "--data nowhere.jsonl"),
        (["--mode=sft", "--model=qwen2.5-0.5b", "--micro_batch_tokens=9"], "--micro_batch_tokens"),
        (["--mode=kd", "--model=qwen2.5-0.5b"], "--teacher is needed"),
        (["--mode=sft", "--lr=-1"], "--lr"),
        (["--mode=sft", "--seed=-1"], "--seed"),
        (["--mode=sft", "--seed=1e30"], "--seed"),
        (
            [
                "--mode=sft",
                "--data=word_problems",
                "--max_length_policy=drop",
                "--micro_batch_tokens=9",
            ],
            "--micro_batch_tokens",
        ),
        (["--mode=sft", "--resume"], "--name"),
        (["--mode=sft", "--resume", "--name=never"], "there is no run"),
        (["--mode=sft", "--data=word_problems", "--steps=0"], "endless"),
        (["--config=none.toml"], "none.toml"),
        (["--mode=sft", "--name=../x"], "plain folder name"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(args, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert train.main(args) == 2
    err = capsys.readouterr().err
    assert words in err and err.startswith("train.py: ") and err.count("\n") == 1
    assert not list(tmp_path.rglob("*.safetensors"))


def test_an_existing_run_is_not_overwritten(teacher, capsys):
    before = (teacher[0] / "metrics.jsonl").read_text()
    assert train.main(["--mode=sft", *SMALL, f"--runs={teacher[0].parent}", "--name=t"]) == 2
    assert (
        "continue it with --resume" in capsys.readouterr().err
        and (teacher[0] / "metrics.jsonl").read_text() == before
    )


def test_a_teacher_with_another_tokenizer_is_refused(teacher, tmp_path, capsys):
    from data.tokenizer import build_tiny

    (tmp_path / "other").mkdir()
    build_tiny(["some other words with other merges"] * 5).save(tmp_path / "other")
    args = [
        "--mode=kd",
        *SMALL,
        f"--teacher={teacher[0] / 'checkpoints/step-6'}",
        f"--tokenizer={tmp_path / 'other'}",
        f"--runs={tmp_path}",
    ]
    assert train.main(args) == 2
    assert "merges" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sft", "kd with lora"])
def test_a_student_of_some_of_the_layers_goes_on_as_it_was(teacher, kind, tmp_path):
    """Stopped after its first checkpoint and resumed, it has the metrics of the run in one go."""
    whole = str(teacher[0] / "checkpoints/step-6")
    args = ["--device=cpu", *SMALL, f"--model={whole}", "--drop_layers=1", f"--runs={tmp_path}"]
    more = {"sft": ["--mode=sft"], "kd with lora": ["--mode=kd", "--lora_rank=2"]}[kind]
    args += more
    if kind != "sft":
        args += [f"--teacher={whole}"]
    assert train.main([*args, "--name=once"]) == 0
    assert train.main([*args, "--name=twice", "--steps=2"]) == 0
    assert train.main([*args, "--name=twice", "--resume"]) == 0
    assert timeless(tmp_path / "twice")[-1] == timeless(tmp_path / "once")[-1]
    config = json.loads((tmp_path / "once/checkpoints/step-6/config.json").read_text())
    assert config["num_hidden_layers"] == 2


def test_a_checkpoint_that_does_not_fit_is_refused_before_there_is_a_run(teacher, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(teacher[0] / "checkpoints/step-6", broken)
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("model.layers.1.mlp.up_proj.weight")
    save_file(tensors, broken / "model.safetensors")
    (broken / "SHA256SUMS").unlink()
    args = [
        "--mode=sft",
        "--device=cpu",
        *SMALL,
        f"--model={broken}",
        f"--runs={tmp_path / 'runs'}",
    ]
    assert train.main(args) == 2
    assert "layers.1.mlp.up_proj.weight is missing" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "change,want",
    [
        ({"mode": "sft"}, None),
        ({"mode": "kd"}, None),
        ({"mode": "kd", "kd_prefix": "teacher"}, None),
        ({"mode": "kd", "kd_prefix": "student", "sample_top_k": 5}, (1.0, 5, 1.0)),
        ({"mode": "grpo", "sample_temperature": 0.7}, (0.7, 0, 1.0)),
    ],
)
def test_the_sampling_that_is_exported_is_that_of_training(change, want):
    found = sampling_of(Config(**change))
    assert found == (want and dict(zip(("temperature", "top_k", "top_p"), want, strict=True)))


def on_a_full_disk(argv):
    save = train.save_model

    def fail(model, folder, *more, **options):
        if folder.name == ".draft-4":
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        save(model, folder, *more, **options)

    train.save_model = fail
    return train.main(argv)


def test_a_full_disk_while_saving_loses_nothing(tmp_path):
    """A limit of file size stands in for a full disk: the second checkpoint's weights fail."""
    result = run("--mode=sft", *SMALL, "--name=d", cwd=tmp_path, main=on_a_full_disk)
    assert (
        result.returncode == 1
        and "could not be written" in result.stderr
        and "step 2" in result.stderr
    )
    assert "Traceback" not in result.stderr and result.stderr.count("\n") == 1
    assert RunFolder(tmp_path / "runs/d").steps() == [2] and not list(
        (tmp_path / "runs/d/checkpoints").glob(".draft*")
    )
    again = run("--name=d", "--resume", cwd=tmp_path)
    assert again.returncode == 0 and "resumed at step 2" in again.stdout


def test_nothing_optional_is_imported_unasked():
    """triton is hidden, as on a machine without it: PyTorch's own compiler loads it where it is."""
    optional = ("wandb", "matplotlib", "pyarrow", "transformers", "huggingface_hub")
    optional += ("torch._dynamo",)  # takes as long as all of torch
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); sys.modules['triton'] = None\n"
    code += f"import train; print([m for m in {optional} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "[]\n"


def test_real_gsm8k_with_the_real_vocabulary(real_data, tmp_path):
    """Real tokenizer, 151,936 head rows, a small body: the loss falls; the mask begins right."""
    args = [
        f"--data={real_data / 'gsm8k'}",
        "--train_examples=200",
        f"--tokenizer={real_data / 'qwen2.5-tokenizer'}",
        "--model=small",
        "--micro_batch_tokens=1024",
    ]
    more = [
        "--steps=5",
        "--batch_size=2",
        "--lr=1e-3",
        "--warmup=1",
        "--eval_examples=2",
        "--eval_tokens=2",
        "--save_every=0",
        "--name=g",
    ]
    result = run("--mode=sft", *args, *more, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    losses = [m["train/loss"] for m in read_metrics(tmp_path / "runs/g") if "train/loss" in m]
    assert losses[0] > 11 and losses[-1] < losses[0] - 1
    shown = run("--mode=sft", *args, "--show_batch=1", cwd=tmp_path).stdout
    trained = shown.split("⟦")[1].split("⟧")[0]
    assert (
        "####" in trained
        and trained.endswith("<|im_end|>")
        and "<<" not in trained
        and Path(ROOT).exists()
    )


def asleep(argv):
    time.sleep(float(argv[-1]))
    return 0


def test_a_hang_says_so(tmp_path):
    hung = run("600", cwd=tmp_path, main=asleep, timeout=0.5)
    assert (hung.returncode, hung.stderr) == (-9, "a hang: the test waited 0.5 s\n")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["sft", "kd", "grpo", "grpo+lora"])
def test_ten_kills_at_random_moments(mode, teacher, tmp_path):
    import random

    rng = random.Random(mode)
    extra = {"sft": [], "kd": [f"--teacher={teacher[0] / 'checkpoints/step-6'}"]}
    if mode.startswith("grpo"):
        # Kills fall into rollouts and updates; some checkpoints hold samples not yet trained on.
        (tmp_path / "mine.py").write_text(
            "def letters(example, completion):\n"
            "    return completion.count('e') + 0.01 * len(completion)\n"
        )
        extra["grpo"] = [
            f"--model={teacher[0] / 'checkpoints/step-6'}",
            f"--grpo_reward={tmp_path}/mine.py:letters",
            "--batch_size=8",
        ]
        extra["grpo"] += [
            "--grpo_samples=4",
            "--grpo_minibatches_per_rollout=2",
            "--grpo_ppo_epochs=2",
            "--sample_tokens=12",
            "--grpo_kl_coef=0.01",
            "--lr=1e-3",
        ]
        extra["grpo+lora"] = [*extra["grpo"], "--lora_rank=4", "--lora_dropout=0.1"]
    args = [
        f"--mode={mode.split('+')[0]}",
        *SMALL,
        "--steps=600",
        "--save_every=7",
        "--eval_every=50",
        "--name=k",
        *extra[mode],
    ]
    whole = run(*args, "--runs=whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    folder = tmp_path / "cut/k"

    def again():  # a run killed before its config.json was written needs its options once more
        return ["--name=k", "--resume"] if (folder / "config.json").exists() else args

    def lines():
        return (
            (folder / "metrics.jsonl").read_text().count("\n")
            if (folder / "metrics.jsonl").exists()
            else 0
        )

    lines_at_kill = []
    for kill in range(10):
        argv, options = command(*again(), "--runs=cut", cwd=tmp_path)
        process, begun = (
            subprocess.Popen(argv, **options, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL),
            time.time(),
        )
        target, patience = (
            lines() + rng.randint(1, 70),
            rng.uniform(0, 5) if kill % 4 == 3 else 60,
        )  # some die while starting
        while lines() < target and process.poll() is None and time.time() - begun < patience:
            time.sleep(rng.uniform(0, 0.02))
        process.kill()
        process.wait()
        lines_at_kill.append(lines())
    last = run(*again(), "--runs=cut", cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert len(set(lines_at_kill)) > 5 and lines_at_kill[-1] < 600  # kills did land in the middle
    assert timeless(folder) == timeless(tmp_path / "whole/k")


@pytest.mark.slow
def test_compiled_blocks_train_the_same(tmp_path):
    """On a CPU torch.compile needs a C++ compiler."""
    import shutil

    if not (shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler for torch.compile on a CPU")
    plain = sft("--name=p", cwd=tmp_path)
    compiled = sft("--name=c", "--compile", cwd=tmp_path, timeout=600)
    assert plain.returncode == compiled.returncode == 0, compiled.stderr
    losses = [
        [m["train/loss"] for m in read_metrics(tmp_path / "runs" / n) if "train/loss" in m]
        for n in "pc"
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
