"""One parser for every command: a frozen dataclass is read from the command line, TOML and JSON.

A command declares its options, one `option` per field, and parses its arguments:

    @dataclasses.dataclass(frozen=True)
    class Options:
        checkpoints: tuple[str, ...] = option(REQUIRED, "folders or hub ids", positional=True)
        tasks: tuple[str, ...] = option(REQUIRED, "test sets", choices=("gsm8k", "math500"))
        evals: tuple[str, str] = option(REQUIRED, "the two folders of answers to compare")
        samples: int = option(1, "samples per problem", alias="n", minimum=1)
        greedy: bool = option(False, "always take the most probable token")
        system: str | None = option(None, "the system prompt; the run's own unless given")

    args = options.parse(Options, argv)

`checkpoints` takes one word or more, `--tasks gsm8k,math500` a list with commas, `--evals A B` two
words. Both spellings of a name (`--top_p`, `--top-p`), both ways of giving a value (`--lr 1e-5`,
`--lr=1e-5`; also `lr=1e-5` in a command without positional words) and all ways of writing a switch
(`--compile`, `--compile=False`) are accepted; `--lr=None` leaves an option out. So wandb's
`${args}`, `${args_no_hyphens}` and `${args_no_boolean_flags}` all work. Names are never
abbreviated. Whatever is wrong is a UserError of one line. `--help` prints the docstring of the
module in which the dataclass is defined and a line or two per option, and ends the command
(SystemExit, as in argparse).

Precedence: defaults < defaults that follow another option's value (`default_when`) < what a resumed
run has stored < `--config file.toml` < command line.
"""

import argparse
import difflib
import functools
import json
import math
import os
import re
import sys
import tomllib
from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, Field, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Protocol, TypeVar, get_args, get_origin

from errors import UserError
from files import parse_json, read_text, reason, without

REQUIRED = MISSING  # as a default: the option must be given on the command line
ABOVE_0 = ("above 0",)  # in a condition: a number that switches something on

Words = Sequence[str]
Values = dict[str, Any]  # {name of an option: its value}
# {other option: values, one of which it must have, or a function that returns them}; all must hold
Condition = dict[str, Any]


class Rules(NamedTuple):
    """What the parser knows about an option, beside its default and type.

    alias: a second name.
    also: words that a switch may have for its value, beside those for true and false.
    choices: allowed values, where the type is not a Literal, or a function that returns them.
    named: words that a value is made of, for --help.
    files: a value that ends in one of these names a file, and is none of the choices.
    load: a function that is called with the value, from wherever it is given, before any other
    option is looked at: choices may come from it. It returns whether they may have changed. The
    option may be given several times, which is one value with commas.
    above, minimum, maximum, below: bounds of a number; `above` and `below` themselves are excluded.
    read_when: a run reads the option only if this condition holds, or one of a list of conditions;
    an option in a condition must itself be read. Without it the class's `read_when_prefix`
    {prefix of names: condition on other options} decides; otherwise an option is always read.
    default_when: {other option: {its value: default}}, or {(two, options): {their values:
    default}}, or {other option: a function of its value that returns the default}; the other
    options are declared before this one, and where several say something, the last one counts.
    implies: {other option: its value wherever this one is given without it}.
    counted: the option that says how many, which others write as in `choice:4`.
    fixed: a resumed run keeps the stored value; a function of what is stored may say so.

    A class may have `sections`, {option: heading in --help, which it begins}, `hints`, {a name that
    is no option, but one of other programs: what to write here}, and `before`, {option: its value
    in a run's config.json from before there was the option}.
    """

    help: str
    positional: bool = False
    alias: str = ""
    also: Collection[str] = ()
    choices: Collection[str] | Callable[[], Collection[str]] = ()
    named: Collection[str] = ()
    files: tuple[str, ...] = ()
    load: Callable[[str], bool] | None = None
    above: float = -math.inf
    minimum: float = -math.inf
    maximum: float = math.inf
    below: float = math.inf
    read_when: Condition | list[Condition] | None = None
    default_when: dict[Any, Any] = {}
    implies: Values = {}
    counted: str = ""
    fixed: bool | Callable[[Values], bool] = False


class Options(Protocol):
    """A dataclass whose fields are made with `option`."""

    __dataclass_fields__: ClassVar[dict[str, Field]]


T = TypeVar("T", bound=Options)
Cls = type[Options]


def option(default: Any, help: str, **rules: Any) -> Any:
    """Make a field of an options dataclass.

    Args:
        default: The default value, or REQUIRED.
        help: What the option means, in words that can be understood alone.
        rules: The other fields of `Rules`.
    """
    metadata = {"rules": Rules(help, **rules)}
    return field(default=default, kw_only=True, metadata=metadata)


def turned_round(hints: dict[str, str]) -> dict[str, str]:
    """The `hints` of a class from {what to write here: names of other programs}."""
    return {name: hint for hint, names in hints.items() for name in names.split()}


def parse(
    cls: type[T],
    argv: Words,
    stored: Values | None = None,
    conditions: bool = True,
    notes: list[str] | None = None,
) -> T:
    """Build `cls` from a command line.

    Args:
        stored: What a resumed run has stored, between the defaults and `--config`.
        conditions: Refuse an option that is given and not read beside the others.
        notes: Gets a sentence on options that are ignored; None: they are refused. These are
            options of a `--config` file that are not read because of a later one or of the command
            line, and in a trial of a wandb sweep, which draws coupled options one by one, those of
            the command line, too.

    Raises:
        UserError: One line that names the option, and the nearest valid name for a wrong one.
    """
    stored = of_a_run(cls, stored) if stored else {}
    _load_choices(cls, argv, stored)
    layers = read_layers(cls, argv)
    stored = {k: _convert(_find(cls, k, f"config.json: {k}"), v, k) for k, v in stored.items()}
    values = _overlay(cls, [stored, *layers])
    config = cls(**with_defaults(cls, values))
    given = [name for layer in layers for name in layer if name in values]
    may_ignore = set() if notes is None else _may_ignore(cls, stored, layers)
    ignored = {}
    for name in given:
        _check_fixed(cls, name, values[name], stored)
        unmet = _unmet(config, name)
        if unmet and name in may_ignore:
            ignored[name] = f"{name} (read with {_needs(config, name)})"
        elif unmet and conditions:
            raise UserError(
                f"{name} is not read with {unmet}={getattr(config, unmet)}, "
                f"only with {_needs(config, name)}"
            )
    if ignored and notes is not None:
        notes.append(f"ignored, as this run does not read them: {', '.join(ignored.values())}")
        config = cls(**with_defaults(cls, without(values, ignored)))
    return config


def _load_choices(cls: Cls, argv: Words, stored: Values) -> None:
    """Call the `load` of every option that has one with its value."""
    for spec in fields(cls):
        load = _rules(spec).load
        if load:
            value = (stored | peek(cls, argv, spec.name)).get(spec.name)
            if value and load(value):
                _parser.cache_clear()  # its help shows the choices


def _may_ignore(cls: Cls, stored: Values, layers: list[Values]) -> set[str]:
    """The options of which a note says that they are not read, instead of an error.

    Those of a file that were read before a later layer, and in a sweep those of the command line.
    """
    found = set()
    for number, layer in enumerate(layers[:-1], 1):
        files = cls(**with_defaults(cls, _overlay(cls, [stored, *layers[:number]])))
        found |= {name for name in layer if not _unmet(files, name)}
    if os.environ.get("WANDB_SWEEP_ID"):
        return found | layers[-1].keys()
    return found - layers[-1].keys()


def _check_fixed(cls: Cls, name: str, value: Any, stored: Values) -> None:
    """Raise UserError if a resumed run keeps another value than this one."""
    fixed = _rules(cls.__dataclass_fields__[name]).fixed
    if callable(fixed):
        fixed = fixed(stored)
    if fixed and value != stored.get(name, value):
        raise UserError(
            f"--{name} {value}: the run was begun with {stored[name]!r} and keeps it; "
            "leave it out, or begin a new run"
        )


def peek(cls: Cls, argv: Words, *names: str) -> Values:
    """Return what a command line says of some options, before the others are looked at.

    An option that is not given is not there. Raises UserError.
    """
    found = {}
    for layer in read_layers(cls, argv, names):
        found |= layer
    return found


def read_layers(cls: Cls, argv: Words, names: tuple[str, ...] = ()) -> list[Values]:
    """Return what each `--config` file sets, then what the command line sets; later ones win.

    names: of these options alone; empty: of all.
    """
    parser, words = _parser(cls, names), _normalize(cls, argv)
    given = vars(parser.parse_known_args(words)[0] if names else parser.parse_args(words))
    sources = []
    for file in given.pop("config", []):
        values = read_file(file)
        is_of_a_run = Path(file).name == "config.json"
        sources.append((f"{file}: ", of_a_run(cls, values) if is_of_a_run else values))
    layers = []
    for prefix, values in [*sources, ("--", given)]:
        layer = {}
        for name, value in values.items():
            source = prefix + name
            spec = _find(cls, name, source)
            if names and spec.name not in names:
                continue
            if _rules(spec).load and isinstance(value, list):
                value = ",".join(value)
            if _rules(spec).positional:
                source = name.upper()
            layer[spec.name] = _convert(spec, value, source)
        for name in list(layer):
            layer = _rules(cls.__dataclass_fields__[name]).implies | layer
        layers.append(layer)
    return layers


def of_a_run(cls: Cls, stored: Values) -> Values:
    """What a run's config.json says, and what it means where an option came later."""
    return getattr(cls, "before", {}) | stored


def with_defaults(cls: Cls, given: Values) -> Values:
    """Add to `given` the default of every other option of `cls` that goes with these values."""
    values = {}
    for spec in fields(cls):
        values[spec.name] = given.get(spec.name, _default(spec, values))
    return values


def resolved(config: Options, without: Words = ()) -> Values:
    """Return the options that this run reads, no others, valid again as a `--config` file.

    without: names to leave out.
    """
    names = [n for n in config.__dataclass_fields__ if n not in without and not _unmet(config, n)]
    return {name: getattr(config, name) for name in names}


# --- the command line ----------------------------------------------------------------------------
class _Parser(argparse.ArgumentParser):
    """Sorts the words of a command line by option; `_convert` reads the values.

    names: of these options alone, and without --help; empty: of all.
    """

    def __init__(self, cls: Cls, names: tuple[str, ...]):
        super().__init__(
            usage=argparse.SUPPRESS,
            description=sys.modules[cls.__module__].__doc__,
            formatter_class=partial(
                argparse.RawDescriptionHelpFormatter, width=100, max_help_position=38
            ),
            argument_default=argparse.SUPPRESS,
            add_help=not names,
            allow_abbrev=False,
        )
        self.add_argument(
            "--config", action="append", metavar="FILE", help="a TOML or JSON file of options"
        )
        self.cls = cls
        group, sections = self, getattr(cls, "sections", {})
        for spec in fields(cls):
            rules, shape = _rules(spec), _shape(spec)
            if names and spec.name not in names:
                continue
            if spec.name in sections:
                group = self.add_argument_group(sections[spec.name])
            help = _help(cls, spec)
            if rules.positional:
                nargs = "+" if shape.size == 0 else None
                group.add_argument(spec.name, metavar=spec.name.upper(), nargs=nargs, help=help)
                continue
            group.add_argument(
                f"--{spec.name}",
                action="append" if rules.load else "store",
                metavar=shape.kind.__name__.upper(),
                nargs=shape.size or None,
                required=spec.default is REQUIRED,
                help=help,
            )

    def error(self, message: str):
        _, found, words = message.partition("unrecognized arguments: ")
        if found and not words.replace("-", " ").split():
            raise UserError(f"{words!r} is no option")
        if found:
            name = words.lstrip("-").split()[0].partition("=")[0].rpartition(".")[2]
            spec = _find(self.cls, name.replace("-", "_"), words)
            raise UserError(f"{words}: an option begins with two dashes, as in --{spec.name}")
        raise UserError(message)


@functools.cache
def _parser(cls: Cls, names: tuple[str, ...]) -> _Parser:
    """The parser of a class. A study parses hundreds of runs, and making one takes longer."""
    return _Parser(cls, names)


def _help(cls: Cls, spec: Field) -> str:
    """Return an option's help with its choices, its defaults and when it is read."""
    rules, facts = _rules(spec), []
    choices = _shape(spec).choices or rules.named
    if spec.default not in (REQUIRED, "", None, ()):
        facts.append(f"default {spec.default}")
    for key, defaults in rules.default_when.items():
        if callable(defaults):
            continue
        for value, default in defaults.items():
            own = (value,) if isinstance(key, str) else value
            shown = [f"--{n} {v}" for n, v in zip(_names(key), own, strict=True)]
            facts.append(f"{default} with {' '.join(shown)}")
    conditions = _conditions(cls, spec.name)
    if conditions:
        facts.append(f"read with {_describe(conditions)}")
    text = rules.help
    if choices:
        text += f" ({' | '.join(choices)})"
    if facts:
        text += f" [{'; '.join(facts)}]"
    return text.replace("%", "%%")


def _normalize(cls: Cls, argv: Words) -> list[str]:
    """Rewrite a command line for argparse: every option is one word, --name=value.

    So a value may begin with dashes, a switch may have a value or none, and names are never
    abbreviated.
    """
    words, normal = list(argv), []
    has_operands = any(_rules(spec).positional for spec in fields(cls))
    while words:
        word = words.pop(0)
        if not has_operands and word.partition("=")[0] in cls.__dataclass_fields__:
            word = f"--{word}"
        name, equals, value = word[2:].partition("=")
        if word.startswith("--") and name not in ("help", "config"):
            spec = _find(cls, name.replace("-", "_"), f"--{name}")
            shape = _shape(spec)
            if not equals and shape.kind is bool and shape.size is None:
                has_value = words and words[0].lower() in (*SWITCH, *_rules(spec).also, "none")
                equals, value = "=", words.pop(0) if has_value else "true"
            elif not equals and words and not shape.size and not _is_option(cls, words[0]):
                equals, value = "=", words.pop(0)
            if value == "None":
                continue
            word = f"--{spec.name}{equals}{value}"
        if value == "--":  # which argparse would drop
            raise UserError(f"{word}: -- is no value")
        normal.append(word)
    return normal


def _is_option(cls: Cls, word: str) -> bool:
    """Whether a word of a command line is an option, and no value of the one before it."""
    name = word[2:].partition("=")[0].replace("-", "_")
    names = {"config", "help", *(rules.alias for rules in map(_rules, fields(cls)))}
    return word.startswith("--") and name in names.union(cls.__dataclass_fields__)


def _find(cls: Cls, name: str, source: str) -> Field:
    """Return the field of an option, by its name or alias."""
    known = cls.__dataclass_fields__
    for spec in known.values():
        if name and name in (spec.name, _rules(spec).alias):
            return spec
    last = name.rpartition(".")[2]  # as in actor_rollout_ref.actor.optim.lr
    near = _nearest(last, [*known, "config", "help"], "; did you mean {}?", "; see --help")
    hint = getattr(cls, "hints", {}).get(last)
    if hint:
        near = f", but of other programs; here it is {hint}"
    raise UserError(f"{source} is not an option{near}")


def _nearest(word: str, known: Collection[str], hint: str, otherwise: str = "") -> str:
    """Return `hint` with the name most like `word`, of the same letters first, or `otherwise`."""
    near = [name for name in known if sorted(name) == sorted(word)]
    near += difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return hint.format(near[0]) if near else otherwise


# --- values --------------------------------------------------------------------------------------

TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
SWITCH: dict[str, bool] = dict.fromkeys(TRUE, True) | dict.fromkeys(FALSE, False)
FEW = 6  # choices that are all named where a value is none of them
KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


class _Shape(NamedTuple):
    """The type of an option's values, which there are, and how many: None for one, 0 for a list."""

    kind: type
    choices: Collection[str]
    size: int | None = None


def _rules(spec: Field) -> Rules:
    return spec.metadata["rules"]


def _shape(spec: Field) -> _Shape:
    declared: Any = spec.type
    items, choices = get_args(declared), _rules(spec).choices
    if callable(choices):
        choices = choices()
    if get_origin(declared) is Literal:
        return _Shape(str, items)
    if get_origin(declared) is tuple:
        return _Shape(items[0], choices, 0 if ... in items else len(items))
    return _Shape(items[0] if items else declared, choices)  # str | None is read as str


def _convert(spec: Field, value: Any, source: str) -> Any:
    """Return an option's value, as its type says. Raises UserError, naming its source."""
    if _shape(spec).size is None:
        return _convert_one(spec, value, source)
    if not isinstance(value, list):
        text = str(value)
        value = text.split(",")
        if text.startswith("[") and text.endswith("]"):  # as Python writes a list, and wandb
            value = [part.strip(" '\"") for part in text[1:-1].split(",")]
    return tuple(_convert_one(spec, part.strip(), source) for part in value if part.strip())


def _convert_one(spec: Field, value: Any, source: str) -> Any:
    rules, kind = _rules(spec), _shape(spec).kind
    text = str(value).strip()
    try:
        if text in rules.also:
            value = text if kind is bool else kind(0)  # 0: what is to be found out
        elif kind is bool:
            value = SWITCH[text.lower()]
        elif kind in (int, float):
            value = _number(kind, text, source)
            _check_bounds(rules, value, source)
        elif not isinstance(value, str):
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        words = " or ".join((KINDS[kind], *rules.also))
        raise UserError(f"{source}: {value!r} is not {words}") from None
    if kind is str:
        _check_choice(spec, value, source)
    return value


def _number(kind: type, text: str, source: str) -> float:
    """An int or a float; whole numbers are exact, whatever their size. Raises ValueError."""
    number = int(text) if text.lstrip("+-").isdecimal() else float(text)
    if kind is float and not math.isfinite(number):
        raise UserError(f"{source}: {text} is not a number that is finite")
    if kind is int and number != int(number):
        raise ValueError
    if kind is int and abs(number) > sys.maxsize:
        raise UserError(f"{source}: {text:.20}... is too large")
    return kind(number)


def _check_choice(spec: Field, value: str, source: str) -> None:
    rules, choices = _rules(spec), _shape(spec).choices
    is_file = rules.files and value.endswith(rules.files)
    if not choices or value in choices or is_file:
        return
    every = ", ".join(choices)
    hint = "did you mean {}?" if len(choices) > FEW else f"did you mean {{}}? There are {every}"
    near = _nearest(value, choices, hint, f"choose from {every}")
    name, _, number = value.partition(":")
    if rules.counted and (name in choices or name.endswith(rules.files or "/")):
        near = f"write {name} and --{rules.counted} {number}"
    elif rules.files and Path(value).suffix:
        near = f"a file ends in {', '.join(rules.files)}"
    raise UserError(f"{source}: no {value!r}; {near}")


def _check_bounds(rules: Rules, value: float, source: str) -> None:
    for holds, bound in (
        (value > rules.above, f"above {rules.above}"),
        (value >= rules.minimum, f"at least {rules.minimum}"),
        (value <= rules.maximum, f"at most {rules.maximum}"),
        (value < rules.below, f"below {rules.below}"),
    ):
        if not holds:
            raise UserError(f"{source} must be {bound}, not {value}")


# --- what follows from other options -------------------------------------------------------------
def _default(spec: Field, values: Values) -> Any:
    """Return an option's default beside the values of the fields that are declared before it."""
    default = spec.default
    for other, own in _rules(spec).default_when.items():
        if isinstance(other, str):
            value = values[other]
        else:
            value = tuple(values[name] for name in other)
        default = own(value) if callable(own) else own.get(value, default)
    return default


def _names(other: str | tuple[str, ...]) -> tuple[str, ...]:
    """The options that a key of `default_when` names."""
    return (other,) if isinstance(other, str) else other


def _overlay(cls: Cls, layers: list[Values]) -> Values:
    """Merge layers of values, later ones over earlier ones.

    A layer that changes an option which other defaults follow (`default_when`) changes those too:
    where an earlier layer has just the default that went with the old value (as a run's config.json
    does, which holds every option), it is dropped. Values that were chosen stay.
    """
    values = {}
    for layer in layers:
        before = with_defaults(cls, values)
        after, chosen = {}, dict(values)
        for spec in fields(cls):
            name = spec.name
            others = [n for key in _rules(spec).default_when for n in _names(key)]
            for other in others:
                changed = other in values and after[other] != before[other]
                if changed and before[name] == _default(spec, before):
                    chosen.pop(name, None)
            after[name] = (chosen | layer).get(name, _default(spec, after))
        values = chosen | layer
    return values


def _conditions(options: Options | Cls, name: str) -> list[Condition]:
    """Return the conditions of which one must hold for a run to read an option; [] if always."""
    found = _rules(options.__dataclass_fields__[name]).read_when
    if found is None:
        for prefix, condition in getattr(options, "read_when_prefix", {}).items():
            if found is None and name.startswith(prefix) and name not in condition:
                found = condition
    if isinstance(found, dict):
        return [found]
    return found or []


def _unmet(config: Options, name: str) -> str:
    """Name an option for whose value this run does not read the option `name`; "" if it does."""
    unmet = ""
    for condition in _conditions(config, name):
        unmet = ""
        for other, wanted in condition.items():
            value = getattr(config, other)
            unmet = unmet or _unmet(config, other)
            holds = value > 0 if wanted == ABOVE_0 else value in _values(wanted)
            if not unmet and not holds:
                unmet = other
        if not unmet:
            break
    return unmet


def _values(wanted: Collection | Callable[[], Collection]) -> Collection:
    """The values that a condition wants of an option."""
    return wanted() if callable(wanted) else wanted


def _needs(config: Options, name: str) -> str:
    """Say with what an option is read, behind the same of one that this needs and that is not read.

    As in --mode kd, and there with --kd_divergence jsd.
    """
    conditions = _conditions(config, name)
    for condition in conditions:
        for other in condition:
            if _unmet(config, other):
                return f"{_needs(config, other)}, and there with {_describe(conditions)}"
    return _describe(conditions)


def _describe(conditions: list[Condition]) -> str:
    """Return conditions in words, as in --mode kd, or with --grpo_kd_coef above 0."""
    parts = []
    for condition in conditions:
        items = []
        for name, wanted in condition.items():
            items.append(f"--{name} {' or '.join(map(str, _values(wanted)))}")
        parts.append(" and ".join(items))
    return ", or with ".join(parts)


# --- files ---------------------------------------------------------------------------------------

OTHER_FORMS = {".yaml": "YAML", ".yml": "YAML", ".py": "Python", ".ini": "INI", ".cfg": "INI"}
OTHER_FORMS |= {".jsonl": "JSON Lines"}
TOML_FORM = (
    "write TOML, one line for an option, as in lr = 1e-5 or "
    'data = "train.jsonl" (recipes/ has examples)'
)
YAML_LINE = re.compile(r"^[\w-]+:(\s|$)", re.MULTILINE)


def read_file(file: str | Path) -> Values:
    """Read a flat .toml or .json file. Raises UserError."""
    path = Path(file)
    label, kind = f"--config {path}", path.suffix.lower()
    if path.is_dir() and (path / "config.json").is_file():
        raise UserError(f"{label} is a folder; name the file: {path / 'config.json'}")
    if path.is_file() and path.stat().st_size == 0 and kind not in (".json", *OTHER_FORMS):
        return {}  # valid TOML, which sets nothing
    text = read_text(path, label)
    if kind in OTHER_FORMS:
        raise UserError(f"{label}: {OTHER_FORMS[kind]} is not read; {TOML_FORM}")
    try:
        values = parse_json(text, label) if kind == ".json" else tomllib.loads(text)
    except RecursionError:
        raise UserError(f"{label}: not valid TOML: nested too deeply") from None
    except ValueError as e:
        if YAML_LINE.search(text):
            raise UserError(f"{label} looks like YAML, which is not read; {TOML_FORM}") from None
        if text.lstrip().startswith("{"):
            raise UserError(f"{label} looks like JSON; give it a name that ends in .json") from None
        raise UserError(f"{label}: not valid {kind[1:] or 'TOML'}: {reason(e)}") from None
    if not isinstance(values, dict):
        found = type(values).__name__
        raise UserError(f"{label}: expected one object of names and values, found a {found}")
    for name, value in values.items():
        if isinstance(value, dict) and "value" in value:
            plain = value["value"]
            shown = json.dumps(plain) if isinstance(plain, (str, int, float)) else "..."
            raise UserError(
                f'{label}: {name} is written as wandb writes it, {{"value": ...}}; write '
                f"{name} = {shown}, or name the config.json in the run's own folder, which is flat"
            )
        if name == "study" and isinstance(value, dict):
            raise UserError(f"{label} is a study: python -m eval.study {path}")
        if isinstance(value, (dict, list)):
            raise UserError(f"{label}: {name} is not a plain value; the configuration is flat")
    return values
