"""A flat dataclass <-> command line, TOML and JSON.

Precedence: defaults < defaults of a mode's or a variant's own < what a resumed run has stored < `--config file.toml` < command line. Both spellings of a name (`--kd_ce`, `--kd-ce`), both ways of
giving a value (`--lr 1e-5`, `--lr=1e-5`) and all ways of writing a switch (`--compile`, `--compile=False`) are accepted,
so wandb's `${args}` and `${args_no_boolean_flags}` both work.
"""

import dataclasses
import difflib
import json
import math
import re
import tomllib
from pathlib import Path

from errors import UserError
from files import parse_json, read_text, reason

ABOVE_0 = ("a value above 0",)  # in `only`: a number that switches something on


def knob(default, help, only=None, choices=None, by=None):
    """A config field.

    only: what must hold for a run to read it, {"mode": ("kd",), "kd_divergence": ("jsd",)}, or a
    list of such, one of which must hold.
    by: defaults of its own where a knob that is declared before it has some value,
    {"mode": {"grpo": 64}}; where several hold, the last one counts.
    """
    only = [only or {}] if isinstance(only or {}, dict) else only
    metadata = {"help": help, "only": only, "choices": choices, "by": by or {}}
    return dataclasses.field(default=default, metadata=metadata)


def with_defaults(cls, given):
    """`given` ({name: value}), and for every other knob of `cls` the default that goes with it."""
    values = {}
    for field in dataclasses.fields(cls):
        values[field.name] = given.get(field.name, _default(field, values))
    return values


def _default(field, values):
    """A field's default beside the `values` of the fields that are declared before it."""
    default = field.default
    for other, own_defaults in field.metadata["by"].items():
        default = own_defaults.get(values[other], default)
    return default


def _layered(cls, layers):
    """{name: value} of several such, later ones over earlier ones.

    A layer that changes a knob which brings defaults of its own (`by`) changes these too: where an
    earlier layer has just the default that went with the old value (as a run's config.json does,
    which holds every knob), that is dropped, and the new value's default counts. Values that were
    chosen stay.
    """
    values = {}
    for layer in layers:
        before, after, remaining = with_defaults(cls, values), {}, dict(values)
        for field in dataclasses.fields(cls):
            name = field.name
            changed = [k for k in field.metadata["by"] if k in values and after[k] != before[k]]
            if changed and values.get(name) == _default(field, before):
                del remaining[name]
            after[name] = (remaining | layer).get(name, _default(field, after))
        values = remaining | layer
    return values


def parse(cls, argv, base=None, kept=(), together=True):
    """Build `cls` from `argv`; `base` (a dict) sits between the defaults and `--config`.

    kept: names whose value in `base` may not be changed. together=False: whether a knob is read beside the others is not asked.
    Returns (config, given): `given` holds the names that were set by a file or on the command line.
    Raises UserError naming the key and the nearest valid one.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    from_argv, files = {}, []
    args = list(argv)
    while args:
        arg = args.pop(0)
        if not arg.startswith("--"):
            raise UserError(
                f"{arg!r} is not an option; options are written --name value or --name=value"
            )
        name, has_value, value = arg[2:].partition("=")
        name = name.replace("-", "_")
        if name == "config":
            if not has_value and not args:
                raise UserError("--config needs the path of a .toml or .json file")
            files.append(value if has_value else args.pop(0))
            continue
        field = _field(fields, name, f"--{name}")
        if not has_value:
            if field.type is bool and (not args or args[0].lower() not in _BOOLS):
                value = "true"
            elif not args:
                raise UserError(f"--{name} needs a value")
            else:
                value = args.pop(0)
        from_argv[name] = _convert(field, value, f"--{name}")

    layers = []
    for file in files:
        layers.append({})
        for name, value in read_file(file).items():
            where = f"{file}: {name}"
            layers[-1][name] = _convert(_field(fields, name, where), value, where)
    layers.append(from_argv)
    stored = {k: _convert(fields[k], v, k) for k, v in (base or {}).items() if k in fields}
    values = _layered(cls, [stored, *layers])
    config = cls(**with_defaults(cls, values))
    names = [name for layer in layers for name in layer if name in values]
    given = {name: values[name] for name in names}
    for name, value in given.items():
        if name in kept and value != stored.get(name, value):
            raise UserError(
                f"--{name} {value}: the run was begun with {stored[name]!r} and keeps it; leave it out, or begin a new run"
            )
        if together and not _reads(config, fields[name]):
            raise UserError(_unread(config, fields[name]))
    return config, set(given)


def read_file(path):
    """A flat .toml or .json file as a dict. Raises UserError."""
    path = Path(path)
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
        raise UserError(
            f"{label}: expected one object of names and values, found a {type(values).__name__}"
        )
    nested = {k: v for k, v in values.items() if isinstance(v, (dict, list))}
    if nested:
        name, value = next(iter(nested.items()))
        if isinstance(value, dict) and "value" in value:
            raise UserError(
                f'{label}: {name} is written as wandb writes it, {{"value": ...}}; write {name} = {_toml(value["value"])}, '
                "or name the config.json in the run's own folder, which is flat"
            )
        raise UserError(f"{label}: {name} is not a plain value; the configuration is flat")
    return values


OTHER_FORMS = {
    ".yaml": "YAML",
    ".yml": "YAML",
    ".py": "Python",
    ".ini": "INI",
    ".cfg": "INI",
    ".jsonl": "a list of JSON lines",
}
TOML_FORM = 'write TOML, one line for an option, as in lr = 1e-5 or data = "train.jsonl" (recipes/ has examples)'
YAML_LINE = re.compile(r"^[\w-]+:(\s|$)", re.MULTILINE)


def _toml(value):
    """A value as it is written in a TOML file; anything but a plain one as its place only."""
    return json.dumps(value) if isinstance(value, (str, int, float)) else "..."


def resolved(config, without=()):
    """The knobs that this run reads, no others; valid again as a `--config` file. `without`: names to leave out."""
    return {
        f.name: getattr(config, f.name)
        for f in dataclasses.fields(config)
        if _reads(config, f) and f.name not in without
    }


def usage(cls, program):
    """The text of --help: every knob with its default."""
    lines = [f"usage: {program} [--config file.toml] [--name value ...]", ""]
    for f in dataclasses.fields(cls):
        only = " or".join(
            "".join(f" [{k}: {', '.join(map(str, v))}]" for k, v in c.items())
            for c in f.metadata["only"]
        )
        choices = f" ({' | '.join(f.metadata['choices'])})" if f.metadata["choices"] else ""
        values = [str(f.default)]
        for other, own_defaults in f.metadata["by"].items():
            values += [f"{other}={at}: {value}" for at, value in own_defaults.items()]
        default = "" if f.default == "" and len(values) == 1 else f" [{', '.join(values)}]"
        lines.append(f"  --{f.name:<20} {f.metadata['help']}{choices}{default}{only}")
    return "\n".join(lines)


_BOOLS = {
    "true": True,
    "1": True,
    "yes": True,
    "on": True,
    "false": False,
    "0": False,
    "no": False,
    "off": False,
}


def _field(fields, name, where):
    if name not in fields:
        near = difflib.get_close_matches(name, [*fields, "config"], n=1, cutoff=0.5)
        raise UserError(
            f"{where} is not an option" + (f"; did you mean {near[0]}?" if near else "; see --help")
        )
    return fields[name]


def _convert(field, value, where):
    kind = field.type
    try:
        if kind is bool:
            value = value if isinstance(value, bool) else _BOOLS[str(value).strip().lower()]
        elif kind is int:
            if isinstance(value, bool) or float(value) != int(float(value)):
                raise ValueError
            value = int(float(value))
        elif kind is float:
            if isinstance(value, bool):
                raise ValueError
            value = float(value)
            if not math.isfinite(value):
                raise UserError(f"{where}: {value} is not a number that is finite")
        elif not isinstance(value, str):
            raise ValueError
    except (ValueError, KeyError, OverflowError):
        raise UserError(f"{where}: {value!r} is not {_KINDS[kind]}") from None
    choices = field.metadata["choices"]
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(choices)}"
        raise UserError(f"{where}: no {value!r}; {hint}")
    return value


_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a string"}


def _holds(config, condition):
    return not _unmet(config, condition)


def _unmet(config, condition):
    holds = lambda value, wanted: value > 0 if wanted == ABOVE_0 else str(value) in map(str, wanted)
    return {k: v for k, v in condition.items() if not holds(getattr(config, k), v)}


def _reads(config, field):
    return any(_holds(config, condition) for condition in field.metadata["only"])


def _unread(config, field):
    """Why this run does not read the knob, by the condition that is nearest to holding."""
    key, values = next(
        iter(
            min(
                (_unmet(config, c) for c in field.metadata["only"]),
                key=lambda unmet: ("mode" in unmet, len(unmet)),
            ).items()
        )
    )
    readable = [f.name for f in dataclasses.fields(config) if _reads(config, f)]
    near = difflib.get_close_matches(field.name, readable, n=1, cutoff=0.5)
    hint = f" (nearest that is: {near[0]})" if near else ""
    return f"{field.name} is not read with {key}={getattr(config, key)}, only with {' or '.join(map(str, values))}{hint}"
