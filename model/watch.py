"""Ranks that notice that another one is gone, and end with the first cause.

A process group notices at the next sum, if at all: a machine that is cut off is waited for during
minutes. So each rank says every second, in a thread, that it is there, and listens to the next one.
It also looks after torchrun, which may be killed: nobody could end its ranks any more.

Silence is counted in looks, not by a clock: a job that was stopped and continued as a whole, as
schedulers suspend one, finds all its clocks late and nobody gone.
"""

import math
import os
import signal
import sys
import threading
import time
from contextlib import suppress
from typing import Any, NamedTuple

from errors import say

PERIOD = 1.0
SILENCE = 90.0  # seconds of looks without a sign of life after which a rank is given up
GRACE = 10.0  # seconds in which a rank may end by itself once another one has
STOPPING = 600.0  # the same for a rank that is to save its checkpoint first
DONE = "done"


class Cause(NamedTuple):
    """Why ranks end: in words, and with which exit code."""

    words: str
    code: int = 1


STORE_GONE = Cause("rank 0, through which ranks meet, is gone")


class Watch(threading.Thread):
    """Says that this rank is there, and ends it GRACE seconds after the first cause to end."""

    def __init__(self, store: Any, rank: int, world: int) -> None:
        super().__init__(daemon=True)
        self.store, self.rank, self.world = store, rank, world
        self.first: Cause | None = None  # as soon as it is known; the store may be gone later
        self.looks = 0.0  # how often the store was asked; infinite: it is asked no more
        self.stopped = threading.Event()
        self.is_leaving = False  # the group has failed, and this rank is about to say why
        self.launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None

    def run(self) -> None:
        next_rank = (self.rank + 1) % self.world
        heard, silent = "", 0
        threading.Thread(target=self._guard, daemon=True).start()
        while not self.stopped.wait(PERIOD):
            self.looks += 1
            if self.launcher not in (None, os.getppid()):
                say(f"rank {self.rank}: torchrun is gone; stopping as by SIGTERM", sys.stderr)
                os.kill(os.getpid(), signal.SIGTERM)
                # and with it, perhaps, the store
                return self._end(Cause("torchrun is gone"), STOPPING)
            try:
                self.store.set(f"alive/{self.rank}", str(self.looks))
                found = self._read(f"alive/{next_rank}")
                silent = silent + 1 if found == heard != DONE else 0
                heard = found
                if silent * PERIOD > SILENCE:
                    self.tell(Cause(f"rank {next_rank} gave no sign of life for {SILENCE:.0f} s"))
                if cause := self._read("cause"):
                    self._learn(cause)
            except RuntimeError:  # which torch's DistError is
                self.first = self.first or STORE_GONE
            if self.first:
                # one that heard late of what the first one said at once is given as much again
                return self._end(self.first, GRACE, GRACE)

    def _guard(self) -> None:
        """End this process if the store is silent: then no call of it returns."""
        seen, silent = 0.0, 0
        while not self.stopped.wait(PERIOD):
            silent = silent + 1 if seen == self.looks < math.inf else 0
            seen = self.looks
            if silent * PERIOD > SILENCE:
                words = (
                    f"rank 0, through which ranks meet, gave no sign of life for {SILENCE:.0f} s"
                )
                self.first = self.first or Cause(words)
                return self._end(self.first, GRACE)

    def _end(self, cause: Cause, grace: float, leaving: float = 0.0) -> None:
        """End this process, unless it has left the group by itself within the grace.

        leaving: what it is given beyond that if it is about to.
        """
        self.looks = math.inf  # enough of one thread
        ended = self.stopped.wait(grace)
        if self.is_leaving and not ended:
            ended = self.stopped.wait(leaving)
        if not ended:
            say(f"rank {self.rank} ends: {cause.words}", sys.stderr)
            os._exit(cause.code)

    def _read(self, key: str) -> str:
        return self.store.get(key).decode() if self.store.check([key]) else ""

    def _learn(self, text: str) -> Cause:
        code, _, words = text.partition(" ")
        self.first = Cause(words, int(code))
        return self.first

    def tell(self, cause: Cause) -> Cause:
        """Let the others know why this rank ends. Returns the first cause that any rank knew."""
        try:
            return self._learn(
                self.store.compare_set("cause", "", f"{cause.code} {cause.words}").decode()
            )
        except RuntimeError:
            return self.first or cause

    def lost(self, error: str) -> Cause:
        """Who is gone, or what the first one to end said, after an error of the group."""
        try:
            before = self._alive()
            for _ in range(40):
                if not self.first:
                    time.sleep(PERIOD / 10)
            after = self._alive()
        except RuntimeError:
            return self.first or STORE_GONE
        others = [rank for rank in range(self.world) if rank != self.rank]
        gone = [str(rank) for rank in others if before[rank] == after[rank] != DONE]
        return self.tell(Cause(f"rank {' and '.join(gone)} is gone" if gone else error))

    def linger(self) -> None:
        """Keep the store, which is rank 0's, until the others have left or had time to read why."""
        end = time.monotonic() + GRACE / 2
        with suppress(RuntimeError):  # it was torchrun's, which is gone
            while self.rank == 0 and time.monotonic() < end and {*self._alive()[1:]} != {DONE}:
                time.sleep(PERIOD / 2)

    def _alive(self) -> list[str]:
        return [self._read(f"alive/{r}") for r in range(self.world)]

    def stop(self) -> None:
        """Called as this rank leaves the group in good order."""
        self.stopped.set()
        try:
            self.store.set(f"alive/{self.rank}", DONE)
        except RuntimeError:
            return
