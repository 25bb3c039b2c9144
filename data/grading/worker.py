"""Mathematics compared in a process of its own, so that no expression can hang, crash or swell a
run.

Some answers never finish in sympy, and math-verify's own time limit is SIGALRM: main thread only,
and deaf while one long multiplication runs. So a long-lived process (questions.py) answers one JSON
line per question, and whoever waits for it kills it when time is up.
"""

import json
import os
import subprocess
import sys
import threading
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
START_LIMIT = 120.0  # seconds for the process's imports, which a busy machine makes slow


class MathWorker:
    """Asks one process, started at the first question and again after a kill. Any thread may ask;
    questions queue.

    limit: seconds per question.
    timeouts, crashes: questions that ended so.
    missing: math-verify cannot be imported.
    """

    def __init__(self, limit: float = 5.0):
        self.limit = limit
        self.timeouts = self.crashes = 0
        self.missing = False
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0  # the id of the process that started ours

    def compare(self, answer: str, gold: str) -> tuple[bool, bool]:
        """Returns whether the answer was understood and whether it equals the gold one; (False,
        False) after a time-out or a crash."""
        understood, equal = self._ask("compare", answer, gold) or (False, False)
        return understood, equal

    def math_verify(self, text: str, gold: str) -> tuple[bool, bool] | None:
        """Returns the same from math-verify alone, which finds the answer in the whole text by its
        own rules; None where it cannot be imported."""
        understood, equal = self._ask("math_verify", text, gold) or (False, False)
        return None if self.missing else (understood, equal)

    def key(self, text: str) -> str | None:
        """Returns a text that equal answers share; None where the answer was not understood."""
        return self._ask("key", text)

    def close(self) -> None:
        """Ends the process, if there is one; the next question starts another."""
        if self._process is not None and self._owner == os.getpid():  # else a fork's parent has it
            self._process.kill()
            self._process.communicate()
        self._process = None

    def pid(self) -> int | None:
        """Returns the id of the process, if there is one."""
        return self._process and self._process.pid

    def _ask(self, *question: str) -> Any:
        """The reply to one question; None after a time-out or a crash."""
        with self._lock:
            for _ in range(2):  # a process found dead before its time is replaced once
                try:
                    return self._exchange(self._start(), [self.limit, *question], self.limit)
                except TimeoutError:
                    self.timeouts += 1
                    return None
                except (ConnectionError, ValueError):  # it is gone, before or in its reply
                    continue
            self.crashes += 1
            return None

    def _start(self) -> subprocess.Popen[str]:
        """The process, if need be a new one."""
        process = self._process
        if process is not None and self._owner == os.getpid() and process.poll() is None:
            return process
        self.close()
        self._owner = os.getpid()
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "data.grading.questions"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            # sympy's order of terms, and with it a verdict, may follow the hash seed
            env=os.environ | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is the run's to handle
        )
        self.missing = not self._exchange(process, None, START_LIMIT)
        return process

    def _exchange(self, process: subprocess.Popen[str], question: list | None, limit: float) -> Any:
        """The next reply. Without one the process is ended: its next line would be that reply."""
        stdin, stdout = process.stdin, process.stdout
        assert stdin and stdout
        try:
            if question:
                stdin.write(json.dumps(question) + "\n")
                stdin.flush()
            if not wait([stdout], limit):  # type: ignore[list-item]
                raise TimeoutError
            return json.loads(stdout.readline())
        except BaseException:
            self.close()
            raise
