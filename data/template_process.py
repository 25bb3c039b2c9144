"""The process that renders chat templates, in the environment that `transformers` gives them.

A template is a program of somebody else's: it may loop for ever or write gigabytes.
"""

import functools
import json
import time
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from data.worker import serve
from files import reason

MEMORY = 1 << 30  # bytes
LONGEST = 10_000_000  # characters of a text
ENOUGH = 0.5  # seconds of rendering, after which the rest of many is to be asked for anew


def answer(question: str, *given: Any) -> tuple[Any, str]:
    """(What is asked for, "") or (None, what is wrong with the template, behind its name)."""
    try:
        if question == "arguments":
            return sorted(set().union(*map(_arguments, *given))), ""
        if question == "render_many":
            return _many(*given), ""
        source, variables = given
        template = _compiled(source)
    except Exception as e:  # jinja2 raises RecursionError and others beside its own errors
        return None, f"is not valid ({reason(e)})"
    try:
        text = template.render(variables)
    except Exception as e:
        return None, f"refuses these messages ({reason(e)})"
    if len(text) > LONGEST:
        return None, f"makes a text of {len(text):,} characters of these messages"
    return text, ""


def _many(source: str, given: list[dict]) -> list[tuple[Any, str]]:
    """The replies to the first of these, or to all: as many as take little time and room."""
    replies, room, until = [], LONGEST, time.process_time() + ENOUGH
    for variables in given:
        replies.append(answer("render", source, variables))
        room -= len(replies[-1][0] or "")
        if room < 0 or time.process_time() > until:
            break
    return replies


def _arguments(source: str) -> set[str]:
    """The names that a template reads and does not set itself."""
    return meta.find_undeclared_variables(_environment().parse(source))


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment


@functools.lru_cache(16)
def _compiled(source: str) -> Template:
    return _environment().from_string(source)


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: marks the assistant's text; here its text alone."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


if __name__ == "__main__":
    serve(answer, MEMORY)
