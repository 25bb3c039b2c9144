"""A rank that is gone ends the others, in a stated time, with the first cause in one line."""

import os
import signal
import sys
import threading
import time
from unittest import mock

import pytest
import torch.distributed as dist

import train
from errors import UserError
from model import parallel, watch
from tests.conftest import wait_until
from tests.distributed_workers import run
from tests.test_train import SMALL


@pytest.fixture
def ended(monkeypatch):
    """What ranks said as they were ended; they look 50 times as often."""
    told = []

    def end(code):
        told.append(code)

    monkeypatch.setattr(watch, "PERIOD", 0.02)
    monkeypatch.setattr(watch, "SILENCE", 20.0)
    monkeypatch.setattr(watch, "GRACE", 20.0)
    monkeypatch.setattr(os, "_exit", end)
    monkeypatch.setattr(watch, "say", lambda text, file: told.append(text))
    return told


def ranks(count):
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    made = [watch.Watch(store, rank, count) for rank in range(count)]
    for each in made:
        each.start()
    return made


@pytest.fixture
def quickly(monkeypatch):
    monkeypatch.setattr(watch, "SILENCE", 1.0)
    monkeypatch.setattr(watch, "GRACE", 0.1)


def looks(each, count):
    """Wait until a rank has looked so often."""
    wait_until(lambda: each.looks >= count)


def test_a_silent_rank_ends_all_with_one_cause(ended, quickly):
    others = ranks(3)
    others[2].stopped.set()  # it says nothing any more
    for each in others:
        each.join(timeout=60)
    cause = "rank 2 gave no sign of life for 1 s"
    assert sorted(ended, key=str) == [1, 1, f"rank 0 ends: {cause}", f"rank 1 ends: {cause}"]


def test_who_is_gone_is_named_and_the_first_cause_stays(ended, monkeypatch):
    monkeypatch.setattr(watch, "PERIOD", 0.2)
    a, b, c = ranks(3)
    for each in (a, b, c):
        looks(each, 2)
    b.stopped.set()
    b.join()
    gone = watch.Cause("rank 1 is gone")
    assert a.lost("Connection closed") == gone
    assert c.tell(watch.Cause("rank 2: ValueError: late", 2)) == gone
    for each in (a, c):
        each.stop()
        each.join()
    assert not ended, "they ended by themselves"


def test_the_first_cause_is_kept_when_the_store_is_gone(ended):
    """Rank 0 has failed, and its store goes with it: the others still know why, and its code."""
    a, b = ranks(2)
    a.tell(watch.Cause("rank 0: no such model", 2))
    wait_until(lambda: b.first)
    b.store = mock.Mock()
    b.store.check.side_effect = b.store.compare_set.side_effect = RuntimeError("gone")
    assert b.lost("Connection closed") == watch.Cause("rank 0: no such model", 2)
    assert b.tell(watch.Cause("late")) == watch.Cause("rank 0: no such model", 2)
    a.stop()
    b.stop()
    assert not ended


def test_a_store_that_does_not_answer_ends_the_rank(ended, quickly):
    """Its machine is cut off: no call of it returns."""
    (a,) = ranks(1)
    over = threading.Event()
    with mock.patch.object(a, "_read", lambda key: over.wait() and ""):
        wait_until(lambda: len(ended) == 2)
        a.stop()
        over.set()
        a.join()
    cause = "rank 0, through which ranks meet, gave no sign of life for 1 s"
    assert ended[:2] == [f"rank 0 ends: {cause}", 1]


@pytest.mark.parametrize("way", ["rank", "store"])
def test_a_job_that_was_stopped_and_continued_goes_on(way, ended, quickly, monkeypatch):
    """As a scheduler suspends one: no thread of any rank ran, and all clocks are late."""
    a, b = ranks(2)
    late, clock, over = [0.0], time.monotonic, threading.Event()
    monkeypatch.setattr(watch.time, "monotonic", lambda: clock() + late[0])
    for each in (a, b):
        looks(each, 2)
    if way == "rank":
        late[0] = 1000.0
    else:  # stopped while it asked the store
        asks, read = threading.Event(), a._read

        def slow(key):
            asks.set()
            over.wait()
            return read(key)

        with monkeypatch.context() as m:
            m.setattr(a, "_read", slow)
            asks.wait()
            late[0] = 1000.0
            time.sleep(5 * watch.PERIOD)
            over.set()
    for each in (a, b):
        wait_until(lambda each=each, last=each.looks + 5: ended or each.looks >= last)
    assert not ended and not a.first and not b.first
    for each in (a, b):
        each.stop()
        each.join()


def test_ranks_that_end_in_good_order_end_nobody(ended, monkeypatch):
    a, b = ranks(2)
    looks(a, 3)
    b.stop()
    b.join()
    monkeypatch.setattr(watch, "SILENCE", 0.4)
    looks(a, a.looks + 50)
    assert a.is_alive() and not ended
    a.stop()
    a.join()


def test_rank_0_keeps_the_store_until_the_others_have_left(ended):
    a, b = ranks(2)
    for each in (a, b):
        looks(each, 1)
    waiting = threading.Thread(target=a.linger)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive()
    b.linger()  # it has no store to keep
    b.stop()
    waiting.join(60)
    assert not waiting.is_alive()
    a.stop()


def test_ranks_stop_when_torchrun_was_killed(ended, monkeypatch):
    sent, store = [], dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    monkeypatch.setattr(watch.os, "kill", lambda pid, number: sent.append((pid, number)))
    for run_id in (None, "x"):
        with monkeypatch.context() as patch:
            if run_id:
                patch.setenv("TORCHELASTIC_RUN_ID", run_id)
            a = watch.Watch(store, 0, 1)
            patch.setattr(watch.os, "getppid", lambda: 1)
            a.start()
            wait_until(lambda a=a: sent or a.looks == 10)
            a.stop()
            a.join()
        assert sent == ([(os.getpid(), signal.SIGTERM)] if run_id else [])  # once


def test_an_error_of_one_rank_reaches_the_others():
    told = mock.Mock(spec=watch.Watch)
    told.lost.return_value = watch.Cause("rank 3 is gone")
    with mock.patch.object(parallel, "_watch", [told]):
        with pytest.raises(KeyError), parallel.telling():
            raise KeyError("k")
        assert told.tell.call_args.args == (watch.Cause("rank 0: KeyError: 'k'"),)
        for error, *cause in (
            (UserError("no row"), "rank 0: no row", 2),
            (OSError(28, "full", "x"), "rank 0: x: full", 1),
            (OSError(2, "not there", "x"), "rank 0: x: not there", 2),
        ):
            with pytest.raises(type(error)), parallel.telling():
                raise error
            assert told.tell.call_args.args == (tuple(cause),)
        with pytest.raises(train.RunFailed, match="rank 3 is gone; go on"), parallel.telling():
            raise RuntimeError("[pair.cc] Connection closed by peer gloo")
        told.lost.return_value = watch.Cause("rank 3: rows.jsonl:7: no answer", 2)
        with pytest.raises(UserError, match="^rank 3: rows.jsonl:7: no answer$"):
            with parallel.telling():
                raise dist.DistNetworkError("failed to recv, got 0 bytes")
    with pytest.raises(train.RunFailed, match="another rank is gone"), parallel.telling():
        raise dist.DistNetworkError("failed to recv, got 0 bytes")  # without a watch, too
    gloo = "[/home/gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:18"
    words = r"is gone \(Connection closed by peer \[127\.0\.0\.1\]:18\)$"
    with pytest.raises(train.RunFailed, match=words), parallel.telling():
        raise RuntimeError(gloo)


def test_a_rank_that_torchrun_ends_while_it_looks_for_the_cause_is_not_gone(monkeypatch):
    told, old = mock.Mock(spec=watch.Watch), signal.signal(signal.SIGTERM, lambda *_: None)
    told.lost.side_effect = lambda error: os.kill(os.getpid(), signal.SIGTERM)
    monkeypatch.setattr(os, "_exit", sys.exit)
    try:
        ours = signal.getsignal(signal.SIGTERM)
        with mock.patch.object(parallel, "_watch", [told]):
            with pytest.raises(SystemExit), parallel.telling():
                raise dist.DistNetworkError("failed to recv, got 0 bytes")
        told.stop.assert_called_once_with()
        assert signal.getsignal(signal.SIGTERM) == ours
    finally:
        signal.signal(signal.SIGTERM, old)


def test_a_start_after_another_one_has_a_name_of_its_own():
    """torchrun's store outlives its restarts."""
    store = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
    store.set("asks/1", "of a rank that is gone")
    names = []

    def start(rank):
        names.append(parallel._name_of_start(store, parallel.Place(rank, 3, rank, 3, "")))

    for _ in range(2):
        threads = [threading.Thread(target=start, args=(rank,), daemon=True) for rank in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    assert len(names) == 6 and len(set(names[:3])) == len(set(names[3:])) == 1
    assert names[0] != names[3]


def failing(how):
    """train.main on two ranks, of which the second one ends at its third step."""

    def main(argv):
        steps = []

        def clip(*args):
            steps.append(args)
            if len(steps) == 3 and parallel.rank() == 1:
                how()
            return before(*args)

        before = train.clip_gradients
        with mock.patch.object(train, "clip_gradients", clip):
            return train.main(argv)

    return main


def killed(argv):
    return failing(lambda: os.kill(os.getpid(), signal.SIGKILL))(argv)


def raising(argv):
    def fail():
        raise ValueError("odd")

    return failing(fail)(argv)


def raising_on_a_busy_machine(argv):
    """It takes long to end, once it has said why."""
    try:
        return raising(argv)
    finally:
        time.sleep(0.8 * watch.GRACE * parallel.rank())


@pytest.mark.slow
@pytest.mark.parametrize(
    "main, cause",
    [
        (killed, "rank 1 is gone"),
        (raising, "rank 1: ValueError: odd"),
        (raising_on_a_busy_machine, "rank 1: ValueError: odd"),
    ],
)
@pytest.mark.parametrize("more", [[], ["--shard=on"]])
def test_the_other_rank_says_why_it_ends(tmp_path, main, cause, more):
    argv = ["--mode=sft", "--model=tiny", *SMALL, "--eval_examples=0", "--name=r", *more]
    started = time.monotonic()
    result = run(*argv, cwd=tmp_path, ranks=2, main=main)
    assert result.returncode != 0 and time.monotonic() - started < 90
    own = [line for line in result.stderr.splitlines() if line.startswith("train.py: ")]
    assert own == [f"train.py: {cause}; go on with --resume"]
    assert (tmp_path / "runs/r/checkpoints/step-2/model.safetensors").exists()
