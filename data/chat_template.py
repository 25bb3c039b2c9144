"""A checkpoint's chat templates, in the environment that `transformers` gives them."""

import functools
import json
from collections.abc import Sequence
from datetime import datetime
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, meta, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from errors import UserError
from files import parse_json, reason

JSON_CONSTANTS = {"true": "true", "false": "false", "null": "null", "none": "null"}


class ChatTemplates:
    """Templates by name; one alone is "default".

    sources: name -> text of the template. label: begins the errors.
    """

    def __init__(self, sources: dict[str, str], label: str):
        self.sources, self.label = sources, label

    @functools.cached_property
    def arguments(self) -> frozenset[str]:
        """The names that the templates read and do not set themselves."""
        names = set()
        for name, source in self.sources.items():
            environment = self._compiled[name].environment
            names |= meta.find_undeclared_variables(environment.parse(source))
        return frozenset(names)

    @functools.cached_property
    def _compiled(self) -> dict[str, Template]:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = functools.partial(json.dumps, ensure_ascii=False)
        environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
        try:
            return {name: environment.from_string(text) for name, text in self.sources.items()}
        except Exception as e:  # jinja2 raises RecursionError and others beside its own errors
            raise UserError(f"{self.label}: the chat template is not valid ({reason(e)})") from None

    def render(
        self,
        messages: Sequence[dict],
        generate: bool,
        tools: list[dict] | None,
        variables: dict[str, Any],
    ) -> str:
        """Write messages as text.

        Args:
            messages: Dicts in the form of data/messages.py.
            generate: Whether the text is to end where the assistant begins.
            tools: What may be called; the template "tool_use" is for them where there is one.
            variables: What else the template reads.

        Raises UserError.
        """
        name = "tool_use" if tools and "tool_use" in self.sources else "default"
        if name not in self.sources:
            raise UserError(f"{self.label} has no chat template; use --template plain")
        template = self._compiled[name]
        shown = []
        for message in messages:
            if reasoning := message.get("reasoning_content"):  # templates have three names for it
                message = message | {"reasoning": reasoning, "thinking": reasoning}
            shown.append(message)
        defaults = {"tools": tools or None, "documents": None}
        try:
            return template.render(
                **defaults | variables, messages=shown, add_generation_prompt=generate
            )
        except Exception as e:  # a template is a program of somebody else's
            raise UserError(
                f"{self.label}: the chat template refuses these messages ({reason(e)})"
            ) from None


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


def parse_template_kwargs(text: str, option: str = "--chat_template_kwargs") -> dict[str, Any]:
    """Parse arguments of a chat template: `enable_thinking=false,name=x` or a JSON object.

    option: begins the errors. Raises UserError.
    """
    text = text.strip()
    if text.startswith("{"):
        return parse_json(text, option)
    result = {}
    for item in text.split(",") if text else ():
        name, equals, value = (part.strip() for part in item.partition("="))
        if not equals or not name.isidentifier():
            raise UserError(
                f"{option}: {item.strip()!r}; write name=value,name=value or a JSON object"
            )
        if name in result:
            raise UserError(f"{option}: {name} is there twice; give it one value")
        try:
            result[name] = json.loads(JSON_CONSTANTS.get(value.lower(), value))
        except ValueError:
            result[name] = value
    return result
