"""Signals at random moments and disks that fill up, in every mode, evaluation, traces and a study:
what goes on ends as if nothing had been, and leaves nothing else behind.

SRLM_KILLS=25 sends as many to each of the ten: 130 SIGKILLs and 40 each of SIGTERMs, Ctrl-Cs once
and twice. SRLM_DISKS=3 fills as many disks for each. SRLM_SEED, which is printed, repeats the
moments; without it they are new.
"""

import os
import shutil
import signal
import subprocess
import time
from functools import partial
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train
from data import sandbox
from eval import __main__ as evaluate
from eval import traces
from eval.study import __main__ as study
from tests.conftest import moments, wait_until
from tests.distributed_workers import run, start
from tests.test_train import timeless

KILLS = int(os.environ.get("SRLM_KILLS", "12"))
DISKS = int(os.environ.get("SRLM_DISKS", "1"))
SMALL = "--steps=6 --batch_size=4 --eval_examples=2 --eval_tokens=4 --eval_every=3 --save_every=2"
SMALL += " --warmup=2 --data=word_problems:20 --model=tiny --name=r"
MODES = {
    "sft": "--mode=sft",
    "lora": "--mode=sft --lora_rank=2",
    "kd": "--mode=kd --teacher=random:tiny",
    "cache": "--mode=kd --teacher=random:tiny --kd_signal=topk --kd_topk=8 --kd_cache=cache",
    "on policy": "--mode=kd --teacher=random:tiny --kd_prefix=student --sample_tokens=8",
    "grpo": "--mode=grpo --model=tiny-teacher --grpo_samples=2 --sample_tokens=8",
}
SIGNALS = [*["KILL", "TERM", "KILL", "INT", "KILL", "INT twice"] * 3, "KILL"]  # 10, 3, 3, 3
STUDY = """
[study]
seeds = [0]
[eval]
tasks = "word_problems"
max_tokens = 4
limit = 4
[common]
batch_size = 4
eval_examples = 0
[run.sft]
mode = "sft"
data = "word_problems:8"
steps = 4
save_every = 1
[arm.sft]
model = "tiny"
chain = ["sft"]
"""


ALL = [*MODES, "sandbox", "evaluation", "traces", "study"]
REWARD = """
from data.sandbox import check
def passes(example, completion):
    program = "import time; time.sleep(0.05); open('x', 'w').write('x'); "
    return float(check(program + f"assert {len(completion) % 2}").passed)
"""


def with_sandbox(argv):
    """train.main, of whose sandbox the processes have the mark in their command lines."""
    sandbox.Helper = partial(sandbox.Helper, [os.environ.get("SRLM_MARK", "none")])
    return train.main(argv)


def without_device(main, argv):
    return main([word for word in argv if word != "--device=cpu"])


def commands(home):
    """{name: (main, argv)} of what is killed; `home` has a checkpoint for those that need one."""
    found = {name: (train.main, [*SMALL.split(), *mode.split()]) for name, mode in MODES.items()}
    (home / "reward.py").write_text(REWARD)
    reward = f"--grpo_reward={home}/reward.py:passes"
    found["sandbox"] = (with_sandbox, [*SMALL.split(), *MODES["grpo"].split(), reward])
    checkpoint = str(home / "runs/r/checkpoints/step-6")
    asked = ["--tasks=word_problems", "--limit=12", "--n=2", "--max_tokens=8", "--out=out"]
    found["evaluation"] = (partial(without_device, evaluate.main), [checkpoint, *asked])
    asked = ["--data=word_problems:12", "--n=2", "--max_tokens=8", "--out=out"]
    found["traces"] = (partial(without_device, traces.main), [checkpoint, *asked])
    (home / "s.toml").write_text(STUDY)
    argv = [str(home / "s.toml"), "--out=out"]
    found["study"] = (partial(without_device, study.main), argv)
    return found


def begun(main, argv):
    """A run goes on; evaluations and traces do so by themselves."""
    return [*argv, "--resume=auto"] if main in (train.main, with_sandbox) else argv


def contents(folder):
    """What is left, without what a clock says: {file: what is in it}."""
    found = {}
    for path in folder.rglob("*"):
        name = str(path.relative_to(folder))
        if name in ("stdout", "stderr") or ".before-" in name:
            continue
        found[name] = None
        if path.is_dir():
            continue
        if path.name == "metrics.jsonl":
            found[name] = timeless(path.parent)
        elif path.suffix == ".safetensors":
            found[name] = {k: v.numpy().tobytes() for k, v in load_file(path).items()}
        elif path.name in ("SHA256SUMS", "sittings.jsonl", "README.md"):
            continue
        elif path.suffix in (".npy", ".jsonl") or "checkpoints" in path.parts:
            found[name] = path.read_bytes()
    return found


def marked(mark):
    """Processes that were started with this in their environment or command line."""
    found = []
    for path in (*Path("/proc").glob("[0-9]*/environ"), *Path("/proc").glob("[0-9]*/cmdline")):
        try:
            if mark.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("home")
    done = run(*SMALL.split(), "--mode=sft", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_signals_at_random_moments(name, home, tmp_path, capsys):
    main, argv = commands(home)[name]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    began = time.monotonic()
    done = run(*begun(main, argv), cwd=whole, main=main, timeout=300)
    assert done.returncode == 0, done.stderr
    span = time.monotonic() - began
    rng, sent, mark = moments(name), dict.fromkeys(SIGNALS, 0), f"srlm-kills-{os.getpid()}"
    while sum(sent.values()) < KILLS:
        kind = SIGNALS[sum(sent.values()) % len(SIGNALS)]
        process = start(*begun(main, argv), cwd=killed, main=main, SRLM_MARK=mark)
        process.join(rng.uniform(0, span))
        if process.exitcode is None:
            assert process.pid
            sent[kind] += 1
            os.kill(process.pid, getattr(signal, f"SIG{kind[:4].split()[0]}"))
            if kind == "INT twice":
                process.join(rng.uniform(0, 0.5))
                if process.exitcode is None:
                    os.kill(process.pid, signal.SIGINT)
            process.join(600)
        elif process.exitcode == 0:  # it was done before: sooner, and from the beginning
            span *= 0.8
            assert_same(killed, whole)
            emptied(killed)
        assert process.exitcode in (0, 1, 130, -9, -2, -15), (name, kind, process.exitcode)
    done = run(*begun(main, argv), cwd=killed, main=main, timeout=300)
    assert done.returncode == 0, done.stderr
    with capsys.disabled():
        print(f"\n{name}: {sent}")
    assert_same(killed, whole)
    said = (killed / "stderr").read_text()
    assert "Traceback" not in said, said
    wait_until(lambda: not marked(mark))


def emptied(folder):
    """Nothing is left there but what was said."""
    for path in folder.iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name not in ("stdout", "stderr"):
            path.unlink()


def assert_same(got, wanted):
    """The same files, but for a checkpoint at which a signal came, in the place of an older one."""
    steps = [[path.name for path in folder.rglob("step-*")] for folder in (got, wanted)]
    assert len(steps[0]) == len(steps[1]), steps
    other = set(steps[0]) ^ set(steps[1])
    parts = [contents(folder) for folder in (wanted, got)]
    expected, found = (
        {name: part[name] for name in part if other.isdisjoint(Path(name).parts)} for part in parts
    )
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    assert [path for path in found if found[path] != expected[path]] == []


@pytest.fixture
def disk(tmp_path):
    """disk(bytes): a folder that holds so much; asked again, the same one with another size."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def mounted(size):
        more = ["-o", f"remount,size={size}"] if os.path.ismount(folder) else ["-o", f"size={size}"]
        command = ["mount", "-t", "tmpfs", *more, "tmpfs", str(folder)]
        if subprocess.run(command, capture_output=True).returncode:
            pytest.skip("needs the right to mount a file system in memory")
        return folder

    yield mounted
    if os.path.ismount(folder):
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_disks_that_fill_up(name, home, tmp_path, disk, capsys):
    main, argv = commands(home)[name]
    whole, rng, told = tmp_path / "whole", moments(name), []
    whole.mkdir()
    done = run(*begun(main, argv), cwd=whole, main=main, timeout=600)
    assert done.returncode == 0, done.stderr
    used = sum(-(-p.stat().st_size // 4096) * 4096 for p in whole.rglob("*") if p.is_file())
    for _ in range(DISKS):
        folder, size = disk(1 << 30), int(rng.uniform(0.05, 1) * used) + 8192
        emptied(folder)
        for stream in ("stdout", "stderr"):
            if not (folder / stream).is_symlink():
                (folder / stream).symlink_to(tmp_path / stream)
        disk(size)
        done = run(*begun(main, argv), cwd=folder, main=main, timeout=600)
        told.append((size, done.returncode, done.stderr.strip()))
        assert done.returncode in (0, 1) and "Traceback" not in done.stderr, done.stderr
        assert done.returncode == 0 or "No space left" in done.stderr, done.stderr
        if main in (train.main, with_sandbox):
            assert done.stderr.count("\n") == done.returncode, done.stderr
        disk(1 << 30)
        done = run(*begun(main, argv), cwd=folder, main=main, timeout=600)
        assert done.returncode == 0, done.stderr
        assert_same(folder, whole)
    with capsys.disabled():
        print(f"\n{name} takes {used:,} bytes: {told}")
