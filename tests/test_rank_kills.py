"""Ranks and whole nodes that are killed under torchrun's agents: the run goes on as if undisturbed.

Most agents are torchrun's (`elastic_launch`) with ranks that are forks of a process that has
imported everything, so that a restart takes seconds; the last test types the command lines of
docs/scaling.md.
"""

import os
import signal
import subprocess
import sys
import time

import pytest
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import train
from model import parallel
from run import RunFolder
from tests import distributed_workers as workers
from tests.conftest import ROOT, moments
from tests.test_sweeps import SHORT_TEACHER
from tests.test_train import SMALL, timeless

KILLS = int(os.environ.get("SRLM_KILLS", "5"))  # of each run, as far as it lasts
RUN = [*SMALL, "--steps=16", "--save_every=2", "--eval_every=8", "--batch_size=8", "--name=r"]
MODES = {
    "sft": ["--mode=sft", "--model=tiny"],
    "kd": ["--mode=kd", "--model=tiny", "--teacher=random:tiny-teacher", "--kd_prefix=student"],
    "grpo": ["--mode=grpo", "--model=tiny-gemma3", "--grpo_samples=2", "--grpo_reward=random"],
}
MODES["kd"] += ["--sample_tokens=8"]
MODES["grpo"] += ["--sample_tokens=8", "--grpo_minibatches_per_rollout=2"]
SHARDED = ["--shard=on", "--shard_frozen=on", "--shard_ranks=2"]


def rank_main(argv, cwd, main=train.main):
    os.chdir(cwd)
    (cwd / f"pid-{os.environ['RANK']}").write_text(str(os.getpid()))
    code = main(["--device=cpu", *argv])
    parallel.close()
    if code:
        sys.exit(code)


def agent_main(argv, cwd, nodes, ranks, port, main=train.main):
    """One node: torchrun's agent with its ranks, as often restarted as it takes."""
    for name, number in (("stdout", 1), ("stderr", 2)):
        os.dup2(os.open(cwd / name, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    config = LaunchConfig(
        min_nodes=nodes,
        max_nodes=nodes,
        nproc_per_node=ranks,
        run_id="r",
        rdzv_backend="c10d",
        rdzv_endpoint=f"127.0.0.1:{port}",
        max_restarts=100,
        start_method="fork",
        monitor_interval=0.1,
    )
    elastic_launch(config, rank_main)(argv, cwd, main)


def start(*arguments):
    process = workers.forks().Process(target=agent_main, args=arguments)
    process.start()
    return process


def pids(cwd, ranks):
    """Of the ranks that are there."""
    found = []
    for rank in ranks:
        file = cwd / f"pid-{rank}"
        pid = int(file.read_text() or 0) if file.exists() else 0
        if pid and os.path.exists(f"/proc/{pid}"):
            found.append(pid)
    return found


def kill(number):
    try:
        os.kill(number, signal.SIGKILL)
    except ProcessLookupError:
        return


def undisturbed(argv, cwd):
    cwd.mkdir()
    began = time.monotonic()
    result = workers.run(*RUN, *argv, cwd=cwd, ranks=4, timeout=600)
    assert result.returncode == 0, result.stderr
    return time.monotonic() - began


def assert_same(got, want, step=16):
    assert timeless(got) == timeless(want)
    for name in ("samples.jsonl", f"checkpoints/step-{step}/model.safetensors"):
        assert (got / name).read_bytes() == (want / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], SHARDED], ids=["replicated", "sharded"])
@pytest.mark.parametrize("mode", MODES)
def test_a_killed_rank_changes_nothing(tmp_path, mode, more, kills=KILLS):
    argv = [*MODES[mode], *more]
    seconds = undisturbed(argv, tmp_path / "whole")
    rng, cwd, done = moments(f"{mode}{more}"), tmp_path / "killed", 0
    cwd.mkdir()
    began = time.monotonic()
    port = workers.free_port()
    agent = start([*RUN, *argv, "--resume=auto"], cwd, 1, 4, port)
    while agent.is_alive():
        time.sleep(0.05)
        there = pids(cwd, range(4))
        if done < kills and len(there) == 4:
            time.sleep(rng.uniform(0, 0.35 * seconds))
            kill(rng.choice(there))
            done += 1
            for file in cwd.glob("pid-*"):
                file.unlink()
        assert time.monotonic() - began < 900, (cwd / "stderr").read_text()
    agent.join()
    took = time.monotonic() - began
    print(f"{mode} {more[:1]}: {done} kills, {took:.0f} s; undisturbed {seconds:.0f} s")
    assert agent.exitcode == 0, (cwd / "stderr").read_text()
    assert_same(cwd / "runs/r", tmp_path / "whole/runs/r")


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["kd", "grpo"])
def test_a_killed_node_changes_nothing(tmp_path, mode, kills=KILLS):
    """Two agents on loopback; the killed one is started again, as a scheduler does."""
    argv = [*MODES[mode], *(SHARDED if mode == "kd" else [])]
    seconds = undisturbed(argv, tmp_path / "whole")
    rng, cwd, done = moments(mode), tmp_path / "killed", 0
    cwd.mkdir()
    began = time.monotonic()
    arguments = ([*RUN, *argv, "--resume=auto"], cwd, 2, 2, workers.free_port())
    agents = [start(*arguments), start(*arguments)]
    while any(agent.exitcode != 0 for agent in agents):
        time.sleep(0.05)
        for node, agent in enumerate(agents):
            if not agent.is_alive() and agent.exitcode:
                agents[node] = start(*arguments)
        if done < kills and len(pids(cwd, range(4))) == 4:
            time.sleep(rng.uniform(0, 0.35 * seconds))
            node = rng.randrange(2)
            own = [pid for pid in pids(cwd, range(4)) if parent(pid) == agents[node].pid]
            for number in (agents[node].pid, *own):
                kill(number)
            agents[node].join()
            done += 1
            for file in cwd.glob("pid-*"):
                file.unlink()
        assert time.monotonic() - began < 1200, (cwd / "stderr").read_text()
    took = time.monotonic() - began
    print(f"{mode}: {done} nodes killed, {took:.0f} s; undisturbed {seconds:.0f} s")
    assert_same(cwd / "runs/r", tmp_path / "whole/runs/r")


def parent(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return int(file.read().rpartition(")")[2].split()[1])
    except OSError:
        return 0


# Else torch's agents that live on do not tell a new one where ranks meet: all end after a minute.
NOT_SHARED = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


def torchrun(argv, cwd, agent, script=ROOT / "train.py"):
    """torchrun with these options of its own; cwd/said has what it and its ranks say."""
    command = [sys.executable, "-m", "torch.distributed.run", *agent, str(script), *argv]
    with open(cwd / "said", "a") as said:
        return subprocess.Popen(
            command,
            stdout=said,
            stderr=said,
            cwd=cwd,
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)} | NOT_SHARED,
            start_new_session=True,
        )


def one_of_two(ranks):
    """torchrun's options on each of two nodes, which meet on this machine."""
    meeting = ["--rdzv_backend=c10d", f"--rdzv_endpoint=127.0.0.1:{workers.free_port()}"]
    return ["--nnodes=2", f"--nproc_per_node={ranks}", *meeting]


def ranks_of(agent):
    """The processes of an agent that have begun to run train.py."""
    found = []
    for number in filter(str.isdecimal, os.listdir("/proc")):
        try:
            with open(f"/proc/{number}/cmdline") as file:
                is_rank = parent(number) == agent.pid and "train.py" in file.read()
        except OSError:
            continue
        if is_rank:
            found.append(int(number))
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode, more", [("sft", []), ("kd", SHARDED)], ids=["sft", "kd sharded"])
def test_the_command_line_of_torchrun_survives_kills(tmp_path, mode, more, ranks=5, nodes=3):
    """Kills of a rank and of a whole node, in a random order, each when the run is further."""
    argv = [*RUN, *MODES[mode], *more, "--steps=24", "--max_checkpoints=100", "--device=cpu"]
    whole = workers.run(*argv, cwd=tmp_path, ranks=4, timeout=900)
    assert whole.returncode == 0, whole.stderr
    rng, cwd = moments(mode), tmp_path / "killed"
    cwd.mkdir()
    kinds = ["rank"] * ranks + ["node"] * nodes
    rng.shuffle(kinds)
    due = [24 * number / len(kinds) for number in range(len(kinds))]
    done, began = 0, time.monotonic()
    argv, agent = [*argv, "--resume=auto"], ["--max-restarts=100", *one_of_two(2)]
    agents = [torchrun(argv, cwd, agent) for _ in range(2)]
    while any(started.poll() != 0 for started in agents):
        time.sleep(0.2)
        assert time.monotonic() - began < 3000, (cwd / "said").read_text()[-5000:]
        for node in range(2):
            if agents[node].poll():  # the other one, too, if it had the store
                agents[node] = torchrun(argv, cwd, agent)
        there = [ranks_of(started) for started in agents]
        is_due = done < len(kinds) and newest(cwd) >= due[done]
        if not is_due or [len(own) for own in there] != [2, 2]:
            continue
        time.sleep(rng.uniform(0, 2))
        node = rng.randrange(2)
        killed = [rng.choice(there[node])]
        if kinds[done] == "node":
            killed = [agents[node].pid, *there[node]]
        for number in killed:
            kill(number)
        took = time.monotonic() - began
        print(f"{took:.0f} s: step {newest(cwd)}, {kinds[done]} {node}", flush=True)
        done += 1
        while pids_alive(killed):
            agents[node].poll()
            time.sleep(0.1)
    print(f"{mode}: {done} kills, {time.monotonic() - began:.0f} s")
    assert done == len(kinds), "the run was over before the last kill"
    assert_same(cwd / "runs/r", tmp_path / "runs/r", step=24)


def newest(cwd):
    """The step of the newest checkpoint, or 0."""
    return max(RunFolder(cwd / "runs/r").steps(), default=0)


def pids_alive(numbers):
    return [number for number in numbers if os.path.exists(f"/proc/{number}")]


@pytest.mark.slow
def test_a_node_is_replaced_while_the_other_lives_on(tmp_path, kills=2):
    argv = [*RUN, *MODES["sft"], "--device=cpu"]
    whole = workers.run(*argv, cwd=tmp_path, ranks=2, timeout=900)
    assert whole.returncode == 0, whole.stderr
    cwd = tmp_path / "killed"
    cwd.mkdir()
    agent, argv = ["--max-restarts=100", *one_of_two(1)], [*argv, "--resume=auto"]
    first = torchrun(argv, cwd, [*agent, "--rdzv_conf=is_host=true"])
    for done in range(kills + 1):
        second = torchrun(argv, cwd, [*agent, "--rdzv_conf=is_host=false"])
        began = time.monotonic()
        while done < kills and newest(cwd) < 5 * done + 2:
            assert time.monotonic() - began < 600 and first.poll() is None
            time.sleep(0.1)
        if done < kills:
            for number in (second.pid, *ranks_of(second)):
                kill(number)
            second.wait()
    assert (first.wait(600), second.wait(600)) == (0, 0), (cwd / "said").read_text()[-5000:]
    assert_same(cwd / "runs/r", tmp_path / "runs/r")


@pytest.mark.slow
def test_two_agents_as_two_nodes_make_the_student_of_one(tmp_path):
    """`make kd` in shards across two nodes: the same bits in fp64. Shortened, its teacher, too."""
    short = tmp_path / "short.py"
    short.write_text(SHORT_TEACHER)
    kd = ["--mode=kd", "--shard=on", "--shard_frozen=on", "--dtype=float64", "--device=cpu"]
    kd += ["--steps=6", "--eval_examples=8", "--eval_every=3", "--name=kd"]
    for name, agent, nodes in (
        ("one", ["--standalone", "--nproc_per_node=2"], 1),
        ("two", one_of_two(1), 2),
    ):
        cwd = tmp_path / name
        cwd.mkdir()
        agents = [torchrun(kd, cwd, agent, short) for _ in range(nodes)]
        codes = [started.wait(900) for started in agents]
        assert codes == [0] * nodes, (cwd / "said").read_text()
        assert "in shards of 2 ranks" in (cwd / "said").read_text()
    assert_same(tmp_path / "two/runs/kd", tmp_path / "one/runs/kd", step=6)
