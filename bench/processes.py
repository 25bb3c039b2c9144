"""Child processes of the benchmarks: with a limit, under Triton's interpreter, several in turn."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from bench.measure import ROOT, resident_gb


class Outcome(NamedTuple):
    """How a process ended. code: its exit code, negative for a signal; None: over its limit."""

    code: int | None
    seconds: float
    stdout: str
    stderr: str

    @property
    def failed(self) -> str:
        """Why there is no good result, in a line; empty if there is one."""
        if self.code == 0:
            return ""
        if self.code is None:
            return f"not done in {self.seconds:.0f} s"
        if self.code < 0:
            return f"ended by signal {-self.code}"
        lines = (self.stderr.strip() or self.stdout.strip() or "no output").splitlines()
        return f"exit code {self.code}: {lines[-1][:200]}"


def run_limited(
    command: Sequence[str], limit_s: float, env: dict[str, str] | None = None
) -> Outcome:
    """Run a command in the project's folder; over its limit it is killed with all its children."""
    began = time.perf_counter()
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=os.environ | (env or {}),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    code = None
    try:
        stdout, stderr = process.communicate(timeout=limit_s)
        code = process.returncode
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        stdout, stderr = process.communicate()
    except BaseException:  # Ctrl-C reaches this process alone
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return Outcome(code, time.perf_counter() - began, stdout, stderr)


def last_json(text: str) -> dict | None:
    """The JSON object that is the last line of a text, if it is one."""
    lines = text.strip().splitlines()
    if not lines or not lines[-1].startswith("{"):
        return None
    return json.loads(lines[-1])


def interpreted(module: str, argv: Sequence[str]) -> int | None:
    """Run a benchmark of Triton's kernels again under its interpreter; the exit code.

    None: this process is the one that interprets. Triton reads the variable when a kernel is
    defined, so it must be there from the start.
    """
    if os.environ.get("TRITON_INTERPRET") == "1":
        return None
    command = [sys.executable, "-m", module, *argv]
    env = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=env).returncode


def serve(facts: dict, step: Callable[[], dict], before: float | None = None) -> None:
    """The child's side of `in_turn`: a step per line of standard input.

    Prints `facts`, then a JSON line per step: its seconds, the peak of memory above `before` (None:
    what is resident now, in GB), and what step() returns (which may be other seconds).
    """
    before = resident_gb() if before is None else before
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        began = time.perf_counter()
        result = step()
        seconds = time.perf_counter() - began
        figures = {"seconds": seconds, "gb": resident_gb(peak=True) - before}
        print(json.dumps(figures | result), flush=True)


def in_turn(commands: dict[str, Sequence[str]], repeats: int) -> tuple[dict, dict[str, list]]:
    """Steps of several processes, one of each per round, so that all see the same load.

    Returns:
        The facts of the first process, and by name the results of its steps. The first round is
        the warm-up: there are repeats + 1 of them.
    """
    workers = {}
    try:
        for name, command in commands.items():
            workers[name] = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
            )
        facts = [_answer(worker) for worker in workers.values()]
        results: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for repeat in range(repeats + 1):
            for name, worker in workers.items():
                worker.stdin.write("go\n")
                worker.stdin.flush()
                results[name].append(_answer(worker))
            print(f"\rround {repeat}/{repeats}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
    finally:
        for worker in workers.values():
            worker.stdin.close()
            worker.wait()
    return facts[0], results


def _answer(worker: subprocess.Popen) -> dict:
    line = worker.stdout.readline() if worker.stdout else ""
    if not line:
        raise RuntimeError(f"a child process ended early: {worker.args}")
    return json.loads(line)
