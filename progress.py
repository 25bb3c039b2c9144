"""Progress of what takes long, by time: a line every few seconds, none of what is over soon."""

import time
from collections.abc import Callable, Iterable, Iterator, Sized
from typing import TypeVar

from errors import say

EVERY = 10.0  # seconds between two lines
T = TypeVar("T")
Halt = Callable[[], None]  # raises what ends something


def go_on() -> None:
    """Nothing ends what is under way."""


def duration(seconds: float) -> str:
    """Format seconds as 0m32s, 59m59s or 2h00m00s, rounded first: 59.7 seconds are a minute."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h{minutes:02}m{seconds:02}s" if hours else f"{minutes}m{seconds:02}s"


class Progress:
    """How far something has come.

    what: in words. total: how much there is to do; 0: nobody knows. unit: of it. speaks: whether
    this process says so: of several that do the same, or parts of it, one. halt: called at every
    part; raises what ends the whole.
    """

    def __init__(
        self, what: str, total: float, unit: str, speaks: bool = True, halt: Halt = go_on
    ) -> None:
        self.what, self.total, self.unit, self.speaks, self.halt = what, total, unit, speaks, halt
        self.done = self.tokens = 0.0
        self.began = self.said = time.monotonic()

    def add(self, done: float, tokens: int = 0) -> None:
        """Count what was done since the last call, and the tokens that were generated for it."""
        self.done += done
        self.tokens += tokens
        if not self.total or self.done < self.total:  # what is done is kept
            self.halt()
        now = time.monotonic()
        if not self.speaks or now - self.said < EVERY:
            return
        self.said = now
        total = f" of {self.total:,.0f}" if self.total else ""
        parts = [f"{self.what}: {self.done:,.0f}{total} {self.unit}"]
        seconds = now - self.began
        if self.tokens:
            parts.append(f"{self.tokens:,.0f} tokens, {self.tokens / seconds:,.0f} tok/s")
        if self.done and total:
            left = seconds * max(0.0, self.total - self.done) / self.done
            parts.append(f"about {duration(left)} left")
        say(", ".join(parts))


def watched(
    what: str, items: Iterable[T], unit: str, speaks: bool = True, halt: Halt = go_on
) -> Iterator[T]:
    """The items, with their Progress."""
    items = items if isinstance(items, Sized) else list(items)
    progress = Progress(what, len(items), unit, speaks, halt)
    for item in items:
        yield item
        progress.add(1)
