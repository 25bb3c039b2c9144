"""math-verify in a process of its own, so that no expression can hang, crash or swell a run.

Some answers (`9^{9^{9^9}}`) never finish, and math-verify's own time limit is SIGALRM: main thread only, and deaf while one long
multiplication runs. So a long-lived worker answers one JSON line per question, and whoever waits for it kills it when time is up.
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
    """Asks one worker process, started at the first question and again after a kill. Any thread may ask; questions queue.

    limit: seconds per question. timeouts, crashes: questions that ended so. missing: math-verify cannot be imported."""

    def __init__(self, limit=5.0):
        self.limit, self.timeouts, self.crashes, self.missing = limit, 0, 0, False
        self._lock, self._process, self._owner = threading.Lock(), None, None

    def compare(self, answer, gold, whole=False):
        """(answer could be parsed, answer equals gold); (False, False) after a time-out or a crash; None without math-verify.

        whole: `answer` is a text in which math-verify is to find the answer by its own rules."""
        with self._lock:
            for _ in range(2):  # a worker found dead before its time is replaced once
                reply, expired = None, False
                if self.missing or not self._start():
                    break
                reply, expired = self._exchange([answer, gold, self.limit, *[True] * whole], self.limit)
                if reply or expired:
                    break
            if self.missing:
                return None
            self.timeouts += expired
            self.crashes += not (reply or expired)
            return tuple(reply or (False, False))

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
        if self._process is not None and self._owner == os.getpid() and self._process.poll() is None:
            return True
        self.close()
        self._process, self._owner = subprocess.Popen(
            [sys.executable, __file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy's order of terms, and with it a verdict, may follow the hash seed
            start_new_session=True,  # Ctrl-C is the run's to handle
        ), os.getpid()  # fmt: skip
        ready, _ = self._exchange(None, START_LIMIT)
        self.missing = ready == [False]
        if self.missing:
            self.close()
        return ready == [True]

    def _exchange(self, question, limit):
        """(the reply or None, whether time was up). Without a reply the worker is ended: its next line would answer this question."""
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
    """The worker's side: reads questions until the pipe closes, which is when the run ends, however it ends."""
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [p for p in sys.path if os.path.abspath(p) != here]  # this folder's module names are not top-level ones
    replies, sys.stdout = sys.stdout, sys.stderr
    send = lambda reply: print(json.dumps(reply), file=replies, flush=True)
    try:
        from math_verify import LatexExtractionConfig, parse, verify
    except ImportError:
        return send([False])
    _limit_memory()

    def compare(answer, gold, whole=False):
        # No fall-back to plain numbers or strings: it would find an 18 in any text that is not mathematics.
        read = lambda text: parse(f"${text}$", [LatexExtractionConfig()], "no_fallback", parsing_timeout=None)
        parsed = parse(answer, parsing_timeout=None) if whole else read(answer)
        return [bool(parsed), bool(parsed and verify(read(gold), parsed, timeout_seconds=None))]

    compare("x", "x+1")  # the first call compiles patterns
    send([True])
    for line in sys.stdin:
        answer, gold, limit, *whole = json.loads(line)
        # The system ends a worker that outlives its parent in the midst of a question, whatever Python is doing.
        signal.setitimer(signal.ITIMER_REAL, limit + 1)
        try:
            reply = compare(answer, gold, bool(whole))
        except Exception:  # noqa: BLE001 (whatever sympy raises, the answer is not shown to be right)
            reply = [False, False]
        signal.setitimer(signal.ITIMER_REAL, 0)
        send(reply)


def _limit_memory():
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    except (ImportError, ValueError, OSError):  # not every system has it
        pass


if __name__ == "__main__":
    serve()
