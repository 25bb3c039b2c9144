"""What a sample earns: named parts with weights, or a Python function of yours; less for length."""

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from data.grade import Verdict, format_reward
from data.tasks import TASKS, Example, grade
from errors import UserError
from limits import OverTime, within

VERDICTS = ("accuracy", "lenient", "signed_accuracy")  # the parts that say what is right
PARTS = (*VERDICTS, "format", "random")
PENALTIES = ("length_penalty", "truncation_penalty")  # what length costs


def part_values(text: str, verdict: Verdict, coin: bool) -> dict[str, float]:
    """The value of every part; a fork adds one here, and its name to PARTS.

    text: the completion, behind the tag with which its prompt may have opened it. The signed parts
    are the study's (arXiv 2506.13404, section 3): +1 or −1.
    coin: the sample's own toss: a reward that says nothing, as a control (arXiv 2506.10947).
    """
    return {
        "accuracy": float(verdict.strict),
        "lenient": float(verdict.lenient),
        "signed_accuracy": 1.0 if verdict.strict else -1.0,
        "format": format_reward(text),
        "random": float(coin),
    }


@dataclasses.dataclass(frozen=True)
class Reward:
    """The reward of a sample. Built by `parse_reward`.

    Args:
        parts: Weights by name of a part; empty where there is a function.
        function: The user's `reward(example, completion) -> float`, or None.
        spec: The text of --grpo_reward.
        limit: The most tokens that a sample can have.
        length_penalty: Over so many last tokens before the limit a sample loses linearly up to 1
            (DAPO, arXiv 2503.14476, eq. 13); 0: nothing.
        truncation_penalty: What a sample that did not stop loses.
        seconds: The longest that the function may take for a sample; 0: any time.
    """

    parts: dict[str, float]
    function: Callable | None
    spec: str
    limit: int
    length_penalty: int = 0
    truncation_penalty: float = 0.0
    seconds: float = 0.0

    @property
    def reads_gold(self) -> bool:
        """Whether it looks at gold answers: without them it would be the same for every sample."""
        return any(self.parts.get(name) for name in VERDICTS)

    @property
    def may_be_negative(self) -> bool:
        """Whether a part or a penalty can take it below 0; of a function nobody knows."""
        below = [name for name, weight in self.parts.items() if weight < 0]
        signed = self.parts.get("signed_accuracy")
        return bool(below or signed or self.length_penalty or self.truncation_penalty)

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
            coin: A toss that belongs to the sample alone, for the part `random`.
            verdict: What `judge` says of the completion, if it was asked before.

        Returns:
            (reward, {part: what it adds to the reward}, verdict).
        """
        verdict = verdict or self.judge(example, text)
        if self.function:
            values = {"function": self._call(self.function, example, text)}
        else:
            every = part_values(opened + text, verdict, coin)
            values = {name: weight * every[name] for name, weight in self.parts.items()}
        if self.length_penalty:
            excess = max(0, tokens - (self.limit - self.length_penalty))
            values["length_penalty"] = -min(1.0, excess / self.length_penalty)
        if self.truncation_penalty and not stopped:
            values["truncation_penalty"] = -self.truncation_penalty
        return sum(values.values()), values, verdict

    def judge(self, example: Example, text: str) -> Verdict:
        """Whether a completion is right; other threads may ask."""
        if example.answer is not None and example.task in TASKS:
            return grade(example, text)
        return Verdict(False, False, False)

    def correctness(self, values: dict[str, float]) -> float:
        """What a sample's {part: value} says of its correctness, for dynamic sampling.

        That is the sum of the parts that are verdicts on the answer. Where the reward has none (or
        gives them no weight): what the user's function returned, or the sum of all parts. Never a
        penalty for length: samples that are all right differ by it, and teach nothing of right and
        wrong (DAPO, arXiv 2503.14476, eq. 11).
        """
        verdicts = [name for name in VERDICTS if self.parts.get(name)]
        names = verdicts or [name for name in values if name not in PENALTIES]
        return sum(values[name] for name in names)

    def _call(self, function: Callable, example: Example, text: str) -> float:
        sample = f"the sample {text[:60]!r} for {example.origin}"
        try:
            with within(self.seconds):
                value = float(function(example, text))
        except OverTime:
            took = f" took longer than --grpo_reward_seconds {self.seconds:g}"
            refuse(self.spec, f"{took} on {sample}")
        except (Exception, SystemExit) as e:  # the user's code may raise anything
            refuse(self.spec, f" raised {type(e).__name__}: {e} on {sample}")
        if not math.isfinite(value):
            refuse(self.spec, f" returned {value} on {sample}")
        return value


def parse_reward(
    spec: str,
    limit: int,
    length_penalty: int = 0,
    truncation_penalty: float = 0.0,
    seconds: float = 0.0,
) -> Reward:
    """The Reward of `accuracy,format:0.5`, or of `path/to/file.py:function`.

    Such a function is `reward(example, completion) -> float`. Raises UserError.
    """
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        function = load_function(path, name, seconds)
        return Reward({}, function, spec, limit, length_penalty, truncation_penalty, seconds)
    parts = {}
    for item in spec.split(","):
        part, _, text = item.strip().partition(":")
        try:
            weight = float(text or 1)
        except ValueError:
            refuse(spec, f": {text!r} is not a number")
        if part not in PARTS:
            known = f"{', '.join(PARTS)}, or write path/to/file.py:function"
            refuse(spec, f": no {item.strip()!r}; choose from {known}")
        if not math.isfinite(weight):
            refuse(spec, f": {text} is not a number that is finite")
        if part in parts:
            refuse(spec, f": {part} is there twice; give it one weight")
        parts[part] = weight
    if not any(parts.values()):
        refuse(spec, ": every weight is 0, so nothing is rewarded; give a part another weight")
    return Reward(parts, None, spec, limit, length_penalty, truncation_penalty)


def load_function(path: str, name: str, seconds: float = 0.0) -> Callable:
    """The function `name` of a Python file, which may take so long to load. Raises UserError."""
    if not Path(path).is_file():
        refuse(path, ": no such file")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    sys.path.append(str(Path(path).resolve().parent))  # it may import its neighbours
    try:
        with within(seconds):
            spec.loader.exec_module(module)
    except OverTime:
        refuse(path, f" could not be loaded within --grpo_reward_seconds {seconds:g}")
    except (Exception, SystemExit) as e:
        refuse(path, f" could not be loaded ({type(e).__name__}: {e})")
    function = getattr(module, name, None)
    if not callable(function):
        refuse(path, f" has no function {name!r}")
    return function


def refuse(spec: str, problem: str) -> NoReturn:
    raise UserError(f"--grpo_reward {spec}{problem}") from None
