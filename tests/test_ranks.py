"""What goes wrong on one rank alone is the same line on all, and no traceback of the group."""

import contextlib
import functools
import re
import signal
from pathlib import Path
from unittest import mock

import pytest
import torch

import prepare
import toy_models
import train
from config import Config
from errors import RunFailed, UserError
from eval.__main__ import main as evaluate
from model import parallel
from run import StopSignal
from tests.distributed_workers import failing_main, spawned
from tests.test_train import SMALL

FULL = OSError(28, "No space left on device")
SFT = [
    "--mode=sft",
    "--device=cpu",
    "--model=tiny",
    "--data=word_problems:40",
    *SMALL,
    "--steps=2",
    "--save_every=1",
    "--eval_examples=0",
]


def patched(name, error):
    return functools.partial(mock.patch, name, side_effect=error)


def lock_of_the_embedded_teacher(runs):
    """The path that `toy_models.toy_model` would lock."""

    class Found(Exception):
        pass

    with (
        mock.patch("toy_models.waiting_for", side_effect=Found) as waiting_for,
        pytest.raises(Found),
    ):
        toy_models.toy_model("teacher", toy_models.TEACHER, str(runs), "cpu", 0)
    return waiting_for.call_args.args[0]


def test_an_error_of_rank_0_alone_reaches_all_ranks(tmp_path):
    lock_of_the_embedded_teacher(tmp_path / "runs").mkdir(parents=True)
    blocked = [
        "--mode=kd",
        "--device=cpu",
        "--steps=1",
        "--eval_examples=0",
        f"--runs={tmp_path}/runs",
        "--name=k",
    ]
    cases = {
        "lock": (
            blocked,
            patched("toy_models.say", None),
            2,
            "teacher-.*lock is a folder, not a file",
        ),
        "record": (
            SFT,
            patched("prepare.training_record", UserError("a trained_on.json that is no JSON")),
            2,
            "a trained_on.json that is no JSON",
        ),
        "save": (
            SFT,
            patched("train.save_model", FULL),
            1,
            "step-1 could not be written .*No space left",
        ),
        "log": (SFT, patched("run.open", FULL), 1, "metrics.jsonl could not be written"),
        "begin": (
            SFT,
            patched("run.cut_back", RunFailed("metrics.jsonl is no file")),
            1,
            "metrics.jsonl is no file",
        ),
        "curves": (
            SFT,
            patched("train.draw_curves", FULL),
            1,
            "curves.png could not be written .*the run itself is complete",
        ),
        "find": (
            blocked,
            patched("toy_models.finished_run", ValueError("odd\nin two lines")),
            "ValueError",
            "rank 0 failed .ValueError: odd",
        ),
    }
    jobs = [
        (
            train.main,
            [*argv, *([f"--runs={tmp_path}/{name}", "--name=r"] if argv is SFT else [])],
            0,
            sabotage,
        )
        for name, (argv, sabotage, *_) in cases.items()
    ]
    checkpoint = tmp_path / "curves/r/checkpoints/step-2"  # of a run that failed at the very end
    asked = [
        str(checkpoint),
        "--tasks",
        "word_problems",
        "--limit",
        "2",
        "--max_tokens",
        "4",
        "--n",
        "1",
    ]
    (tmp_path / "file").touch()
    jobs.append(
        (
            evaluate,
            [*asked, "--out", str(tmp_path / "out")],
            1,
            patched("eval.sampling.generate", OSError(28, "No space left", "a part")),
        )
    )
    jobs.append(
        (evaluate, [*asked, "--out", str(tmp_path / "file" / "out")], 0, contextlib.nullcontext)
    )
    *told, full, no_folder = spawned(failing_main, 2, jobs)
    assert_said_once(full, 1, "^eval: a part: No space left; the same command goes on$")
    assert_said_once(no_folder, 2, "file/out")
    for (name, (_, _, code, words)), found in zip(cases.items(), told, strict=True):
        if isinstance(code, int):
            assert_said_once(found, code, f"^train.py: .*{words}")
        else:  # rank 0 ends in its traceback
            assert [code for code, _ in found] == [code, 1], name
            (line,) = errors_in(found[1][1])
            assert re.search(words, line), line


def errors_in(said):
    """The lines of a command's errors, without a bar that shows progress."""
    return [line for line in said.splitlines() if re.match("(train.py|eval): ", line)]


def assert_said_once(told, code, words):
    """Every rank has the exit code, and one of them the line."""
    assert [found for found, _ in told] == [code] * len(told), told
    (line,) = errors_in("".join(said for _, said in told))
    assert "gloo" not in line and re.search(words, line), line


def disagreeing(argv):
    return train.main([*argv, f"--lr={1 + parallel.rank()}"])


def without_a_shard(argv):
    if parallel.rank() == 1:
        for folder in Path(argv[-1]).rglob("trainer/optimizer"):
            sorted(folder.glob("*.safetensors"))[1].unlink()
        for sums in Path(argv[-1]).rglob("SHA256SUMS"):
            sums.unlink()
    parallel.barrier()
    return train.main([*argv[:-1], "--resume"])


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_what_cannot_work_is_said_once_and_ends_all_ranks(tmp_path, world):
    other_data = functools.partial(mock.patch, "data.dataset.SPLIT_SEED", 7)
    full = patched(
        "torch.distributed.checkpoint.hf_storage.HuggingFaceStorageWriter.write_data", FULL
    )
    sharded = [*SFT, "--shard=on", f"--runs={tmp_path}", "--name=s"]
    plain = contextlib.nullcontext
    cases = [
        (train.main, [*SFT, "--lr=much"], 0, plain, 2, "^train.py: --lr: 'much' is not a number"),
        (train.main, [*SFT, "--shard=on", "--shard_ranks=3"], 0, plain, 2, "no groups of 3"),
        (train.main, [*SFT, "--shard=on", "--shard_ranks=8"], 0, plain, 2, "no groups of 8"),
        (disagreeing, SFT, 0, plain, 2, "the ranks have different options"),
        (train.main, SFT, 1, other_data, 2, "ranks read different examples"),
        (train.main, SFT, 1, patched("prepare.load_dataset", UserError("no file")), 2, "no file"),
        (train.main, sharded, 1, full, 1, "step-1.*could not be written .*No space left"),
        (train.main, [*sharded, "--resume"], 0, plain, 0, ""),
        (without_a_shard, [*sharded, str(tmp_path)], 0, plain, 2, "rows of .* are missing"),
    ]
    told = spawned(failing_main, world, [case[:4] for case in cases])
    for (*_, code, words), found in zip(cases, told, strict=True):
        if code:
            assert_said_once(found, code, words)
        else:
            assert found == [(0, "")] * world


def test_alone_there_is_nobody_to_tell():
    assert parallel.on_rank_0(0, lambda: 7) == 7
    assert parallel.on_rank_0(1, lambda: 1 / 0) is None
    for error in (UserError("u"), RunFailed("r"), KeyError("k")):
        with pytest.raises(type(error)) as e:
            parallel.on_rank_0(0, mock.Mock(side_effect=error))
        assert e.value is error
    parallel.raise_on_all(None)
    with pytest.raises(RunFailed):
        parallel.raise_on_all(RunFailed("r"))


def test_a_signal_while_the_toy_teacher_trains_ends_no_rank_alone(monkeypatch):
    """Ranks above 0 note a signal and wait for what rank 0 makes of it."""
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(toy_models, "_find_or_train", lambda *_: signal.getsignal(signal.SIGTERM))
    monkeypatch.setattr("model.parallel.on_rank_0", lambda rank, call: call())
    handlers = [toy_models.toy_model("teacher", {}, "runs", "cpu", rank) for rank in (0, 1)]
    assert handlers[0] == before and isinstance(handlers[1], StopSignal)
    assert signal.getsignal(signal.SIGTERM) == before


def test_sharding_that_cannot_work_is_one_line():
    """Before any weight is read; what four ranks would do, in one process."""
    student = mock.Mock(parameters=3 * 10**9)
    teacher = mock.Mock(parameters=32 * 10**9)

    def chosen(world, device="cpu", **options):
        place = parallel.Device(torch.device(device), torch.bfloat16, 0, world)
        cfg = Config(**options)
        return tuple(prepare.choose_shards(cfg, place, student, [teacher, None]))[:3]

    assert chosen(1) == (1, False, False)
    assert chosen(4) == (4, False, False) and chosen(4, shard_ranks=3) == (3, False, False)
    assert chosen(4, shard="on") == (4, True, False)
    assert chosen(4, shard="on", shard_frozen="on", shard_ranks=2) == (2, True, True)
    memory = mock.Mock(total_memory=80 * 10**9)
    with mock.patch("torch.cuda.get_device_properties", return_value=memory):
        assert chosen(4, "cuda") == (4, True, True)
        assert chosen(4, "cuda", lora_rank=8) == (4, False, True)
        assert chosen(4, "cuda", shard="off", shard_frozen="off") == (4, False, False)
    for options, words in (
        ({"world": 1, "shard": "on"}, "--shard on: this is one process"),
        ({"world": 1, "shard_frozen": "on"}, "--shard_frozen on: this is one process"),
        ({"world": 4, "shard": "on", "shard_ranks": 3}, "4 ranks are no groups of 3"),
        ({"world": 4, "shard": "on", "shard_ranks": 1}, "4 ranks are no groups of 1"),
        ({"world": 4, "shard": "on", "shard_ranks": 8}, "4 ranks are no groups of 8"),
    ):
        with pytest.raises(UserError, match=words):
            chosen(**options)
    with (
        mock.patch.object(parallel, "gather", lambda value: [value, "other"]),
        pytest.raises(UserError, match="different options"),
    ):
        prepare.setup(Config(device="cpu"))
