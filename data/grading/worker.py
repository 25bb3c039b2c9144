"""Mathematics compared in a process of its own, so that no expression can hang, crash or swell a
run.

Some answers never finish in sympy, and math-verify's own time limit is SIGALRM: main thread only,
and deaf while one long
multiplication runs. So a long-lived worker answers one JSON line per question, and whoever waits
for it kills it when time is up.
This file is both sides: imported by the run, executed as the worker.
"""

import json
import os
import signal
import subprocess
import sys
import threading

START_LIMIT = 120.0  # seconds for the worker's imports, which a busy machine makes slow
MEMORY_LIMIT = 4 << 30  # bytes of address space: a huge power is refused, not paid for


class MathWorker:
    """Asks one worker process, started at the first question and again after a kill. Any thread may
    ask; questions queue.

    limit: seconds per question. timeouts, crashes: questions that ended so.
    missing: math-verify cannot be imported.
    """

    def __init__(self, limit=5.0):
        self.limit, self.timeouts, self.crashes, self.missing = limit, 0, 0, False
        self._lock, self._process, self._owner = threading.Lock(), None, None

    def compare(self, answer: str, gold: str) -> tuple[bool, bool]:
        """(the answer was understood, it equals the gold one); (False, False) after a time-out or a
        crash."""
        return tuple(self._ask("compare", answer, gold) or (False, False))

    def math_verify(self, text: str, gold: str) -> tuple[bool, bool] | None:
        """The same from math-verify alone, which finds the answer in the whole text by its own
        rules; None where it cannot be imported."""
        reply = self._ask("math_verify", text, gold)
        return None if self.missing else tuple(reply or (False, False))

    def key(self, text: str) -> str | None:
        """A text that equal answers share; None where the answer was not understood."""
        return self._ask("key", text)

    def _ask(self, *question):
        """The reply to one question; None after a time-out or a crash."""
        with self._lock:
            reply, expired = None, False
            for _ in range(2):  # a worker found dead before its time is replaced once
                if not self._start():
                    break
                reply, expired = self._exchange([*question, self.limit], self.limit)
                if reply or expired:
                    break
            self.timeouts += expired
            self.crashes += not (reply or expired)
            return reply and reply[0]

    def close(self):
        """Ends the worker, if there is one; the next question starts another."""
        if self._process is not None:
            if self._owner == os.getpid():  # after a fork it is the parent's
                self._process.kill()
                self._process.communicate()
            self._process = None

    def pid(self):
        return self._process and self._process.pid

    def _start(self):
        """Whether a worker is running, if need be a new one."""
        if (
            self._process is not None
            and self._owner == os.getpid()
            and self._process.poll() is None
        ):
            return True
        self.close()
        # sympy's order of terms, and with it a verdict, may follow the hash seed
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=os.environ | {"PYTHONHASHSEED": "0"},
            start_new_session=True,  # Ctrl-C is the run's to handle
        )
        self._owner = os.getpid()
        ready, _ = self._exchange(None, START_LIMIT)
        self.missing = ready == [False]
        return ready is not None

    def _exchange(self, question, limit):
        """(the reply or None, whether time was up). Without a reply the worker is ended: its next
        line would answer this question."""
        reply, expired, process = None, threading.Event(), self._process
        timer = threading.Timer(limit, lambda: (expired.set(), process.kill()))
        timer.daemon = True
        timer.start()
        try:
            if question:
                process.stdin.write(json.dumps(question) + "\n")
                process.stdin.flush()
            line = process.stdout.readline()
            reply = json.loads(line) if line.endswith("\n") else None
        except OSError:  # the worker is gone
            pass
        finally:
            timer.cancel()
            if reply is None:
                self.close()
        return reply, reply is None and expired.is_set()


def serve():
    """The worker's side: reads questions until the pipe closes, which is when the run ends, however
    it ends."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [
        p for p in sys.path if os.path.abspath(p) != here
    ]  # this folder's module names are not top-level ones
    sys.path.append(os.path.dirname(os.path.dirname(here)))
    replies, sys.stdout = sys.stdout, sys.stderr

    def send(reply):
        print(json.dumps(reply), file=replies, flush=True)

    from data.grading import questions

    _limit_memory()
    send([questions.warm_up()])
    for line in sys.stdin:
        question, *texts, limit = json.loads(line)
        # The system ends a worker that outlives its parent in the midst of a question, whatever
        # Python is doing.
        signal.setitimer(signal.ITIMER_REAL, limit + 1)
        reply = questions.ask(question, *texts)
        signal.setitimer(signal.ITIMER_REAL, 0)
        send([reply])


def _limit_memory():
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ImportError, ValueError, OSError):  # not every system has it
        pass


if __name__ == "__main__":
    serve()
