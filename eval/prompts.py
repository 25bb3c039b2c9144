"""Questions as token ids: through the chat template, as plain text, or behind worked examples.

What they are made of is stated in the results, so that two evaluations can be compared.
"""

import dataclasses

from data.formatter import Formatter
from data.messages import check_text
from data.tasks import Example
from data.tokenizer import Tokenizer, parse_template_kwargs
from digests import sha256
from errors import UserError
from eval.benchmarks import CODE, Benchmark
from options import option

KINDS = ("auto", "chat", "plain", "few_shot")
# A base model continues its answer with a question of its own.
NEXT_QUESTION = ("\nQuestion:",)
# Or the body of a function with other code (Chen et al. 2021, section 2.2).
NEXT_CODE = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")


@dataclasses.dataclass(frozen=True)
class PromptOptions:
    """How questions are asked. None stands for what the checkpoint's run did."""

    prompt: str = option(
        "auto",
        "auto: as the run was trained, else chat if the tokenizer has a template",
        choices=KINDS,
    )
    system: str | None = option(None, "the system prompt; a run's own unless given")
    instruction: str | None = option(
        None, "put behind every question; a run's own unless given, else the task's"
    )
    # Qwen3 without thinking: "<think>\n\n</think>\n\n"
    prefill: str = option("", "text that begins every answer")
    chat_template_kwargs: str | None = option(
        None,
        "arguments of the chat template, as in enable_thinking=false,x=3 or JSON; "
        "a run's own unless given",
    )
    limit: int = option(0, "the first so many problems only; 0: all", minimum=0)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Token ids per example, what they are made of, and strings that end an answer."""

    ids: list[list[int]]
    stated: dict
    stop: tuple[str, ...]


def build(
    benchmark: Benchmark, tokenizer: Tokenizer, settings: dict, args: PromptOptions
) -> Prompts:
    """The prompts of the first `args.limit` examples of a benchmark (0: all).

    Args:
        settings: The config of the run that trained the checkpoint, {} if there is none. Its
            template, its arguments, system prompt and suffix are the defaults.

    Raises:
        UserError: for a kind of prompt that the tokenizer or the benchmark does not have.
    """
    kind = _kind(args.prompt, benchmark, tokenizer, settings)
    stop = ()
    if kind == "few_shot":
        stop = NEXT_QUESTION
    elif kind == "plain" and benchmark.name == "humaneval":
        stop = NEXT_CODE
    system = settings.get("system_prompt", "") if args.system is None else args.system
    instruction = args.instruction
    if instruction is None:
        instruction = _usual_instruction(benchmark, settings, stop)
    check_text(args.prefill, "--prefill")
    kwargs = {}
    if kind == "chat":
        kwargs = template_kwargs(args.chat_template_kwargs, settings)
    elif args.chat_template_kwargs:
        raise UserError(
            f"--chat_template_kwargs {args.chat_template_kwargs}: the prompts of {benchmark.name} "
            f"are {kind} ones, without a chat template; leave it out"
        )
    examples = benchmark.examples[: args.limit or None]
    if kind == "few_shot":
        examples = [_with_shots(example, benchmark, instruction) for example in examples]
    formatter = Formatter(
        tokenizer,
        "chat" if kind == "chat" else "plain",
        system,
        "" if kind == "few_shot" else instruction,
        kwargs,
    )
    ids = [formatter.prompt(example) for example in examples]
    for prompt in ids:
        prompt += tokenizer.encode(args.prefill, before=prompt)
    stated = {
        "kind": kind,
        "system": system,
        "instruction": instruction,
        "prefill": args.prefill,
        "template_sha256": sha256(str(tokenizer.chat_template)) if kind == "chat" else None,
        "first_prompt": tokenizer.decode(ids[0]),
        "first_prompt_sha256": sha256(str(ids[0])),
    }
    if kwargs:
        stated["chat_template_kwargs"] = kwargs
    return Prompts(ids, stated, stop)


def template_kwargs(given: str | None, settings: dict) -> dict:
    """The arguments of the chat template: those given, else those of the checkpoint's run."""
    text = settings.get("chat_template_kwargs", "") if given is None else given
    return parse_template_kwargs(text, "--chat_template_kwargs")


def _usual_instruction(benchmark: Benchmark, settings: dict, stop: tuple[str, ...]) -> str:
    """What stands behind the question where nobody said what."""
    if stop:
        return ""  # these prompts show by their form what is asked for
    if benchmark.name in CODE:
        return benchmark.instruction  # a run's own suffix asks for other answers
    return settings.get("prompt_suffix", benchmark.instruction)


def _kind(kind: str, benchmark, tokenizer, settings) -> str:
    """The kind of prompt that "auto" stands for; what cannot be had is refused."""
    if kind == "auto":
        kind = settings.get("template", "auto")
    if kind == "auto":
        kind = "chat" if tokenizer.chat_template else "plain"
    if kind == "chat" and not tokenizer.chat_template:
        raise UserError(f"{tokenizer.source} has no chat template; use --prompt plain or few_shot")
    if kind == "few_shot" and not benchmark.shots:
        raise UserError(
            f"{benchmark.name} has no worked examples for --prompt few_shot; use chat or plain"
        )
    return kind


def _with_shots(example: Example, benchmark: Benchmark, instruction: str) -> Example:
    """The example with the benchmark's worked examples before its question."""
    shots = "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in benchmark.shots)
    content = f"{shots}Question: {example.question}{instruction}\nAnswer:"
    messages = ({"role": "user", "content": content}, example.messages[-1])
    return dataclasses.replace(example, messages=messages)
