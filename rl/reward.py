"""What a sample earns: named parts with weights, some of them yours; less for length."""

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple, NoReturn

from data.grade import Verdict, format_reward
from data.tasks import TASKS, Example, grade
from errors import UserError
from limits import OverTime, within
from plugins import Table, check_call, function_of

VERDICTS = ("accuracy", "lenient", "signed_accuracy")  # the parts that say what is right
PENALTIES = ("length_penalty", "truncation_penalty")  # what length costs
# What a part may take by name, beside the example and the completion (`Reward.__call__`).
SEEN = ("tokens", "stopped", "verdict", "opened", "coin")
FORM = "example, completion"
FILE = re.compile(r"(.+\.py)(?::([^:]*))?(?::([^:]*))?")  # mine.py:function:0.5


def accuracy(example: Example, text: str, verdict: Verdict) -> float:
    return float(verdict.strict)


def lenient(example: Example, text: str, verdict: Verdict) -> float:
    return float(verdict.lenient)


def signed_accuracy(example: Example, text: str, verdict: Verdict) -> float:
    """+1 or −1, as in the study (arXiv 2506.13404, section 3)."""
    return 1.0 if verdict.strict else -1.0


def form(example: Example, text: str, opened: str) -> float:
    return format_reward(opened + text)


def toss(example: Example, text: str, coin: bool) -> float:
    """A reward that says nothing, as a control (arXiv 2506.10947)."""
    return float(coin)


# part(example, completion, what it takes of SEEN) -> float
PARTS: Table[Callable[..., float]] = Table(
    "part of the reward",
    FORM,
    {
        "accuracy": accuracy,
        "lenient": lenient,
        "signed_accuracy": signed_accuracy,
        "format": form,
        "random": toss,
    },
    SEEN,
)


class Part(NamedTuple):
    """A part of a reward: its weight, its function, what of SEEN that takes; whose it is."""

    weight: float
    function: Callable[..., float]
    takes: Sequence[str]

    @property
    def is_own(self) -> bool:
        """Whether its function is the user's."""
        return self.function.__module__ != __name__


@dataclasses.dataclass(frozen=True)
class Reward:
    """The reward of a sample. Built by `parse_reward`.

    Args:
        parts: By name.
        spec: The text of --grpo_reward.
        limit: The most tokens that a sample can have.
        length_penalty: Over so many last tokens before the limit a sample loses linearly up to 1
            (DAPO, arXiv 2503.14476, eq. 13); 0: nothing.
        truncation_penalty: What a sample that did not stop loses.
        seconds: The longest that the function may take for a sample; 0: any time.
    """

    parts: dict[str, Part]
    spec: str
    limit: int
    length_penalty: int = 0
    truncation_penalty: float = 0.0
    seconds: float = 0.0

    def takes(self, name: str) -> bool:
        """Whether a part that counts takes this of SEEN."""
        return any(name in part.takes for part in self.parts.values() if part.weight)

    @property
    def reads_gold(self) -> bool:
        """Whether it looks at gold answers: without them it would be the same for every sample."""
        return self.takes("verdict")

    @property
    def may_be_negative(self) -> bool:
        """Whether a part or a penalty can take it below 0; of a function nobody knows."""
        below = [part for part in self.parts.values() if part.weight < 0]
        signed = self.parts.get("signed_accuracy")
        is_signed = signed is not None and signed.weight != 0
        return bool(below or is_signed or self.length_penalty or self.truncation_penalty)

    def __call__(
        self,
        example: Example,
        text: str,
        tokens: int,
        stopped: bool,
        opened: str = "",
        coin: bool = False,
        verdict: Verdict | None = None,
    ) -> tuple[float, dict[str, float], Verdict]:
        """Grade a completion.

        Args:
            text: The completion.
            tokens: Its length in tokens.
            stopped: Whether it ended by itself.
            opened: The tag with which the generation prompt has begun it (`<think>`), else empty.
            coin: A toss that belongs to the sample alone.
            verdict: What `judge` says of the completion, if it was asked before.

        Returns:
            (reward, {part: what it adds to the reward}, verdict).
        """
        verdict = verdict or self.judge(example, text)
        seen = dict(zip(SEEN, (tokens, stopped, verdict, opened, coin), strict=True))
        values = {}
        for name, part in self.parts.items():
            values[name] = part.weight * self._value(part, example, text, seen)
        if self.length_penalty:
            excess = max(0, tokens - (self.limit - self.length_penalty))
            values["length_penalty"] = -min(1.0, excess / self.length_penalty)
        if self.truncation_penalty and not stopped:
            values["truncation_penalty"] = -self.truncation_penalty
        return sum(values.values()), values, verdict

    def rehearse(self, example: Example, tokens: int) -> None:
        """Call the user's own parts once, on a row and its answer. Raises UserError."""
        own = {name: part for name, part in self.parts.items() if part.is_own}
        rehearsed = dataclasses.replace(self, parts=own)
        verdict = Verdict(False, False, False)
        rehearsed(example, example.own_answer, tokens, True, verdict=verdict)

    def judge(self, example: Example, text: str) -> Verdict:
        """Whether a completion is right; other threads may ask."""
        if example.answer is not None and example.task in TASKS:
            return grade(example, text)
        return Verdict(False, False, False)

    def correctness(self, values: dict[str, float]) -> float:
        """What a sample's {part: value} says of its correctness, for dynamic sampling.

        That is the sum of the parts that are verdicts on the answer. Where the reward has none (or
        gives them no weight): the sum of all parts. Never a penalty for length: samples that are
        all right differ by it, and teach nothing of right and wrong (DAPO, arXiv 2503.14476,
        eq. 11).
        """
        verdicts = [name for name in VERDICTS if name in self.parts and self.parts[name].weight]
        names = verdicts or [name for name in values if name not in PENALTIES]
        return sum(values[name] for name in names)

    def _value(self, part: Part, example: Example, text: str, seen: dict) -> float:
        where = f"on the sample {text[:60]!r} for {example.origin}"
        late = f"took longer than --grpo_reward_seconds {self.seconds:g}"
        deaf = f"--grpo_reward {self.spec} {late} {where}, and hears no signal: the run ends here"
        try:
            with within(self.seconds if part.is_own else 0, deaf):
                value = part.function(example, text, **{n: seen[n] for n in part.takes})
            if hasattr(value, "__float__") and math.isfinite(float(value)):
                return float(value)
            problem = f"returned {value!r}, which is no finite number,"
        except OverTime:
            problem = late
        except (Exception, SystemExit) as e:  # the user's code may raise anything
            problem = f"raised {type(e).__name__}: {e}"
        refuse(self.spec, f" {problem} {where}")


def parse_reward(
    spec: str,
    limit: int,
    length_penalty: int = 0,
    truncation_penalty: float = 0.0,
    seconds: float = 0.0,
) -> Reward:
    """The Reward of `accuracy,format:0.5`, or with `path/to/file.py:function:0.5` as a part.

    A part of the user's own is such a function, or one that a plugin put into `PARTS`. Raises
    UserError.
    """
    parts = {}
    for item in spec.split(","):
        name, _, text = item.strip().partition(":")
        file = FILE.fullmatch(item.strip())
        function = PARTS.get(name)
        if file:
            path, name, text = file[1], file[2] or "", file[3]
            function = function_of(path, name, "--grpo_reward")
        try:
            weight = float(text or 1)
        except ValueError:
            refuse(spec, f": {text!r} is not a number")
        if function is None:
            known = f"{', '.join(PARTS)}, or write path/to/file.py:function"
            refuse(spec, f": no {item.strip()!r}; choose from {known}")
        if not math.isfinite(weight):
            refuse(spec, f": {text} is not a number that is finite")
        if name in parts:
            refuse(spec, f": {name} is there twice; give it one weight")
        if name in PENALTIES or (file and name in VERDICTS):
            refuse(spec, f": {name} is the name of another part; give your function its own")
        what = f"--grpo_reward {spec}: {name}"
        parts[name] = Part(weight, function, check_call(function, what, FORM, SEEN))
    if not any(part.weight for part in parts.values()):
        refuse(spec, ": every weight is 0, so nothing is rewarded; give a part another weight")
    return Reward(parts, spec, limit, length_penalty, truncation_penalty, seconds)


def refuse(spec: str, problem: str) -> NoReturn:
    raise UserError(f"--grpo_reward {spec}{problem}") from None
