"""What a sample earns: named parts with weights, or any Python function of yours, and a price for length."""

import dataclasses
import importlib.util
import math
import sys
from collections.abc import Callable
from pathlib import Path

from data.grade import Verdict, format_reward
from data.tasks import TASKS, grade
from errors import UserError

# part -> f(text, verdict), the text with the tag that the prompt opened. The signed ones are the paper's (arXiv 2506.13404, section 3): +1 or −1
PARTS = {
    "accuracy": lambda text, verdict: float(verdict.strict),
    "lenient": lambda text, verdict: float(verdict.lenient),
    "signed_accuracy": lambda text, verdict: 1.0 if verdict.strict else -1.0,
    "format": lambda text, verdict: format_reward(text),
}
VERDICTS = (
    "accuracy",
    "lenient",
    "signed_accuracy",
)  # the parts that say whether an answer is right
PENALTIES = ("overlong", "truncated")  # what length costs


@dataclasses.dataclass(frozen=True)
class Reward:
    """reward(example, text, tokens, stopped, opened) -> (total, {part: value}, verdict). Built by `parse_reward`.

    text: the completion. opened: the tag with which the generation prompt has begun it (`<think>`), else empty.

    overlong: from limit − overlong tokens on, a sample loses linearly up to 1 (DAPO, arXiv 2503.14476, eq. 13); 0: nothing.
    truncated: what a sample that never stopped loses.
    """

    parts: dict
    function: Callable | None
    where: str
    limit: int
    overlong: int = 0
    truncated: float = 0.0

    @property
    def reads_gold(self) -> bool:
        """Whether it looks at gold answers: without them it would be the same for every sample."""
        return any(self.parts.get(name) for name in VERDICTS)

    def __call__(self, example, text, tokens, stopped, opened=""):
        known = example.answer is not None and example.task in TASKS
        verdict = grade(example, text) if known else Verdict(False, False, False)
        if self.function:
            values = {"function": self._ask(example, text)}
        else:
            values = {
                name: weight * PARTS[name](opened + text, verdict)
                for name, weight in self.parts.items()
            }
        if self.overlong:
            values["overlong"] = -min(
                1.0, max(0, tokens - (self.limit - self.overlong)) / self.overlong
            )
        if self.truncated and not stopped:
            values["truncated"] = -self.truncated
        return sum(values.values()), values, verdict

    def correctness(self, values):
        """What a sample's {part: value} says of its correctness: dynamic sampling looks at nothing else.

        That is the sum of the parts that are verdicts on the answer. Where the reward has none (or
        gives them no weight): what the user's function returned, or the sum of all parts. Never a
        penalty for length: samples that are all right differ by it, and teach nothing of right and
        wrong (DAPO, arXiv 2503.14476, eq. 11).
        """
        verdicts = [name for name in VERDICTS if self.parts.get(name)]
        names = verdicts or [name for name in values if name not in PENALTIES]
        return sum(values[name] for name in names)

    def _ask(self, example, text):
        try:
            value = float(self.function(example, text))
        except Exception as e:  # the user's code may raise anything
            raise UserError(
                f"--grpo_reward {self.where} raised {type(e).__name__}: {e} on {_sample(example, text)}"
            ) from None
        if not math.isfinite(value):
            raise UserError(
                f"--grpo_reward {self.where} returned {value} on {_sample(example, text)}"
            )
        return value


def parse_reward(spec, limit, overlong=0, truncated=0.0):
    """`accuracy,format:0.5` or `path/to/file.py:function`, the latter `reward(example, completion) -> float`."""
    path, _, name = spec.rpartition(":")
    if path.endswith(".py"):
        return Reward({}, load_function(path, name), spec, limit, overlong, truncated)
    parts = {}
    for item in spec.split(","):
        part, _, text = item.strip().partition(":")
        try:
            weight = float(text or 1)
        except ValueError:
            raise UserError(f"--grpo_reward {spec}: {text!r} is not a number") from None
        if part not in PARTS:
            raise UserError(
                f"--grpo_reward {spec}: no {item.strip()!r}; choose from {', '.join(PARTS)}, or write path/to/file.py:function"
            )
        if not math.isfinite(weight):
            raise UserError(f"--grpo_reward {spec}: {text} is not a number that is finite")
        if part in parts:
            raise UserError(f"--grpo_reward {spec}: {part} is there twice; give it one weight")
        parts[part] = weight
    if not any(parts.values()):
        raise UserError(
            f"--grpo_reward {spec}: every weight is 0, so nothing is rewarded; give a part another weight"
        )
    return Reward(parts, None, spec, limit, overlong, truncated)


def load_function(path, name):
    if not Path(path).is_file():
        raise UserError(f"--grpo_reward {path}: no such file")
    spec = importlib.util.spec_from_file_location(f"reward_{Path(path).stem}", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look themselves up there
    sys.path.append(str(Path(path).resolve().parent))  # it may import its neighbours
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise UserError(
            f"--grpo_reward {path} could not be loaded ({type(e).__name__}: {e})"
        ) from None
    if not callable(getattr(module, name, None)):
        raise UserError(f"--grpo_reward {path} has no function {name!r}")
    return getattr(module, name)


def _sample(example, text):
    return f"the sample {text[:60]!r} for {example.origin}"
