"""Mathematics compared in processes of their own, so that no expression can hang, crash or swell a
run (data/worker.py, questions.py)."""

from typing import Any

from data.worker import Worker


class MathWorker(Worker):
    """Asks processes that know mathematics.

    timeouts, crashes: questions that ended so.
    """

    def __init__(self, limit: float = 5.0):
        super().__init__("data.grading.questions", limit)
        self.timeouts = self.crashes = 0

    @property
    def missing(self) -> bool:
        """Whether math-verify cannot be imported, as far as is known."""
        return self.ready is False

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

    def _ask(self, *question: str) -> Any:
        """The reply to one question; None after a time-out or a crash."""
        try:
            return self.ask(*question)
        except TimeoutError:
            self.timeouts += 1
        except ConnectionError:
            self.crashes += 1
        return None
