"""Code of the user's own: Python files that add to the tables of the project.

    from losses.kd import DIVERGENCES

    def mine(student_logp, teacher_logp, beta): ...
    DIVERGENCES["mine"] = mine

A file that `--plugin` names runs before any other option is looked at, so that what it adds is a
choice like every other (docs/forking.md).
"""

import inspect
import sys
import traceback
from collections.abc import Callable, MutableMapping
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from digests import sha256
from errors import UserError
from files import read_text, resolved
from limits import OverTime, within

T = TypeVar("T")
LOADING = 300.0  # seconds that a file may take
LOADED: dict[Path, tuple[str, ModuleType]] = {}  # file -> (digest of its text, module)


class Table(dict[str, T], Generic[T]):
    """{name: one of the things that an option chooses from}; a name is given once.

    Args:
        what: Such a thing, in a word.
        form: The parameters of a function, or the class of what it must be.
        entries: What is there from the beginning.
        named: What a function may take by name, too.
    """

    def __init__(
        self, what: str, form: str | type, entries: dict[str, T], named: tuple[str, ...] = ()
    ):
        super().__init__(entries)
        self.added: set[str] = set()  # names of the user's own
        self.what, self.form, self.named = what, form, named

    def __setitem__(self, name: str, value: T) -> None:
        if name in self:
            raise UserError(f"there is a {self.what} {name!r} already; choose another name")
        if not isinstance(name, str) or not name.isidentifier():
            raise UserError(f"{name!r} is no name for a {self.what}; write letters, digits and _")
        if isinstance(self.form, str):
            check_call(value, f"the {self.what} {name!r}", self.form, self.named)
        elif not isinstance(value, self.form):
            raise UserError(f"the {self.what} {name!r} must be a {self.form.__name__}")
        self.added.add(name)
        super().__setitem__(name, value)

    update, setdefault = MutableMapping.update, MutableMapping.setdefault  # dict's pass over that

    def __ior__(self, entries: Any) -> "Table[T]":
        self.update(entries)
        return self


def check_call(function: object, what: str, form: str, named: tuple[str, ...] = ()) -> list[str]:
    """Which of the names in `named` a function takes beside the parameters of `form`.

    Raises UserError where it cannot be called with these.
    """
    more = "; by name also " + ", ".join(named) if named else ""
    try:
        if not callable(function):
            raise TypeError("it cannot be called")
        signature = inspect.signature(function)
        takes = [name for name in named if name in signature.parameters]
        signature.bind(*form.split(", "), **dict.fromkeys(takes))
    except (TypeError, ValueError) as e:
        raise UserError(f"{what} must be a function of ({form}{more}): {e}") from None
    return takes


def load(files: str) -> bool:
    """Run the files of a --plugin that did not run yet. Returns whether any did."""
    before = dict(LOADED)
    for file in filter(None, map(str.strip, files.split(","))):
        load_module(file, "--plugin")
    return before != LOADED


def load_module(file: str, label: str) -> ModuleType:
    """The module of a Python file, which runs once in a process.

    label: The option that names it. Raises UserError, with the line where the file fails.
    """
    path = Path(file)
    text = read_text(path, f"{label} {file}")
    if path.suffix != ".py":
        raise UserError(f"{label} {file}: a Python file ends in .py")
    key, digest = resolved(path), sha256(text)
    known, module = LOADED.get(key, ("", None))
    if module and known == digest:
        return module
    module = ModuleType(f"plugin_{path.stem}_{sha256(str(key))[:8]}")
    module.__file__ = str(key)
    sys.modules[module.__name__] = module  # dataclasses look themselves up there
    sys.path.append(str(key.parent))  # it may import its neighbours
    late = f"{label} {file}: it took more than {LOADING:g} s to load"
    try:
        with within(LOADING, late):
            exec(compile(text, str(key), "exec"), vars(module))
    except OverTime:
        raise UserError(late) from None
    except (Exception, SystemExit) as e:
        line, said = None, f"{type(e).__name__}: {e}"
        if isinstance(e, SyntaxError) and e.filename == str(key):
            line, said = e.lineno, f"SyntaxError: {e.msg}"
        elif isinstance(e, UserError):
            said = str(e)
        for frame in traceback.extract_tb(e.__traceback__):
            if frame.filename == str(key):
                line = frame.lineno
        raise UserError(f"{label} {file}{f':{line}' if line else ''}: {said}") from None
    LOADED[key] = digest, module
    return module


def digests() -> list[str]:
    """The first digits of the SHA-256 of every file that ran."""
    return [digest[:12] for digest, _ in LOADED.values()]


def named_digests() -> str:
    """The same, behind the files' names."""
    return ", ".join(
        f"{path.name} {digest}" for path, digest in zip(LOADED, digests(), strict=True)
    )


def where_raised(e: Exception) -> str | None:
    """`mine.py:12: NameError: …` of an error in code of the user's; None of any other."""
    place = None
    for frame in traceback.extract_tb(e.__traceback__):
        if Path(frame.filename) in LOADED:
            place = f"{Path(frame.filename).name}:{frame.lineno}: {type(e).__name__}: {e}"
    return place


def function_of(file: str, name: str, label: str) -> Callable:
    """The function `name` of a Python file. Raises UserError."""
    if not name:
        raise UserError(f"{label} {file}: which function? write {file}:NAME")
    function = getattr(load_module(file, label), name, None)
    if not callable(function):
        raise UserError(f"{label} {file} has no function {name!r}")
    return function
