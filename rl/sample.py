"""What the stages of a rollout share: its settings, and the samples that they add to."""

import dataclasses
from collections.abc import Callable

from data.batch import Document
from data.grade import Verdict
from data.tasks import Example
from progress import Halt, go_on


@dataclasses.dataclass(frozen=True)
class RolloutConfig:
    """How completions are sampled, and what GRPO makes of them."""

    prompts_per_batch: int  # over all ranks
    weighting: Callable[[Document], Document]  # of a document's tokens; see data/batch.py
    max_new_tokens: int
    stop_ids: list[int]
    vocab_size: int
    micro_batch_tokens: int = 8192
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    generation_batch: int = 256  # sequences generated at once
    seed: int = 0  # of the samples
    prompt_seed: int = 0  # of the order of the prompts
    rank: int = 0
    world: int = 1
    start_tokens: int = 0  # new tokens in the first rollout, from where they grow; 0: the maximum
    rollouts: int = 1  # over which they grow
    taught: bool = False  # whether a teacher scores samples: it may see a prompt of its own
    continues: bool = False  # whether samples go on from the beginning of the reference answer
    halt: Halt = go_on  # raises Halted in the midst of a rollout
    # GRPO alone
    samples_per_prompt: int = 1
    advantage: str = "std"  # a name in rl.advantage.ADVANTAGES
    kl_penalty_coef: float = 0.0  # of the KL to the reference that is subtracted from rewards
    old_logprobs: bool = False  # whether the log-probs at the time of sampling are needed
    tis: str = "none"  # importance weights, as --grpo_tis (add_tis_weights)
    tis_cap: float = 2.0
    tis_by_sequence: bool = False
    paced: bool = False  # whether a prompt weighs p(1 − p), p its share of right samples
    dynamic_sampling_rounds: int = 0
    mask_truncated: bool = False  # samples that did not stop: no loss, but part of the group's mean
    minibatches: int = 1  # of a rollout
    ppo_epochs: int = 1  # passes over them
    logged_samples: int = 8  # of each rollout


@dataclasses.dataclass
class Sample:
    """One completion of a prompt, and what the stages of a rollout find out about it."""

    position: int  # of its prompt in the run's order of prompts
    number: int  # among the samples of its prompt
    example: Example
    prompt: list[int]
    teacher: int = 0  # which teacher scores it
    teacher_prompt: list[int] | None = None  # what that teacher sees in place of the prompt
    completion: list[int] = dataclasses.field(default_factory=list)
    stopped: bool = False
    document: Document = dataclasses.field(init=False)  # its fields are the log-probs per token
    text: str = ""
    reward: float = 0.0
    reward_parts: dict[str, float] = dataclasses.field(default_factory=dict)
    verdict: Verdict = Verdict(False, False, False)
    correctness: float = 0.0
    kl_penalty: float = 0.0
    advantage: float = 0.0


def sample_line(
    example: Example, text: str, verdict: Verdict, tokens: int, stopped: bool, **reward
) -> dict:
    """A line of samples.jsonl."""
    asked = {"question": example.question, "gold": example.answer, "text": text}
    graded = {"correct": verdict.strict, "lenient": verdict.lenient, "parsed": verdict.parsed}
    return asked | reward | graded | {"tokens": tokens, "stopped": stopped}
