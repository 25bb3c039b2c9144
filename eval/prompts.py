"""Questions as ids, in words that the results state: the chat template, the plain question, or worked examples before it."""

import dataclasses
import hashlib

from data.formatter import Formatter
from data.messages import check_text
from data.tokenizer import parse_template_kwargs
from errors import UserError
from eval.benchmarks import CODE

KINDS = ("auto", "chat", "plain", "few_shot")
NEXT_QUESTION = ("\nQuestion:",)  # a base model goes on with a question of its own
NEXT_CODE = (
    "\nclass",
    "\ndef",
    "\n#",
    "\nif",
    "\nprint",
)  # or, behind a function's body, with other code (Chen et al. 2021, section 2.2)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """ids: a list of ids per example; stated: what they are made of, for the results; stop: strings that end an answer."""

    ids: list
    stated: dict
    stop: tuple


def build(
    benchmark,
    tokenizer,
    run,
    kind="auto",
    system=None,
    instruction=None,
    prefill="",
    limit=0,
    template_kwargs=None,
):
    """The Prompts of the first `limit` examples (0: all). run: the config of the run that trained the checkpoint, {} if there is none: its template,
    its arguments, system prompt and suffix are the defaults; but code is asked for as its benchmark does, not with a suffix for other answers.
    prefill: text that begins the answer (Qwen3 without thinking: "<think>\\n\\n</think>\\n\\n"). template_kwargs: text, as enable_thinking=false."""
    template = tokenizer.chat_template
    if kind == "auto":
        asked = run.get("template", "auto")
        kind = asked if asked != "auto" else "chat" if template else "plain"
    if kind == "chat" and not template:
        raise UserError(f"{tokenizer.source} has no chat template; use --prompt plain or few_shot")
    if kind == "few_shot" and not benchmark.shots:
        raise UserError(
            f"{benchmark.name} has no worked examples for --prompt few_shot; use chat or plain"
        )
    system = run.get("system_prompt", "") if system is None else system
    completes = (
        kind == "plain" and benchmark.name == "humaneval"
    )  # a function that has begun: nothing is asked for
    if instruction is None:
        suffix = (
            benchmark.instruction
            if benchmark.name in CODE
            else run.get("prompt_suffix", benchmark.instruction)
        )
        instruction = "" if kind == "few_shot" or completes else suffix
    check_text(prefill, "--prefill")
    if kind != "chat" and template_kwargs:
        raise UserError(
            f"--chat_template_kwargs {template_kwargs}: the prompts of {benchmark.name} are {kind} ones, without a chat template; leave it out"
        )
    given = run.get("chat_template_kwargs", "") if template_kwargs is None else template_kwargs
    kwargs = parse_template_kwargs(given, "--chat_template_kwargs") if kind == "chat" else {}
    formatter = Formatter(
        tokenizer, "chat" if kind == "chat" else "plain", system, instruction, kwargs
    )
    shots = (
        "".join(f"Question: {q}\nAnswer: {a}\n\n" for q, a in benchmark.shots)
        if kind == "few_shot"
        else ""
    )
    ids = []
    for example in benchmark.examples[: limit or None]:
        if kind == "few_shot":
            user = {
                "role": "user",
                "content": f"{shots}Question: {example.question}{instruction}\nAnswer:",
            }
            example = dataclasses.replace(example, messages=(user, example.messages[-1]))
        ids.append([*formatter.prompt(example), *tokenizer.encode(prefill)])
    stated = {
        "kind": kind,
        "system": system,
        "instruction": instruction,
        "prefill": prefill,
        "template_sha256": hashlib.sha256(template.encode()).hexdigest()
        if kind == "chat"
        else None,
        "first_prompt": tokenizer.decode(ids[0]),
        "first_prompt_sha256": hashlib.sha256(str(ids[0]).encode()).hexdigest(),
    }
    stated |= {"chat_template_kwargs": kwargs} if kwargs else {}
    return Prompts(
        ids, stated, NEXT_QUESTION if kind == "few_shot" else NEXT_CODE if completes else ()
    )
