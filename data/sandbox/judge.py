"""Two processes that do not trust each other: one runs a solution, the other tests it.

The tests `from solution import f`. In their process `f` is a stand-in: its calls are sent to the
solution's process, and what comes back are values of exact built-in types, so an object that calls
itself equal to everything cannot pass for one. They travel as JSON, from which nothing else can be
made. What JSON cannot hold (an instance of the solution's class, a function) comes back as a
stand-in too. The verdict is written by the tests' process, to a pipe that the other never had.
"""

import builtins
import collections
import gc
import itertools
import json
import os
import signal
import struct
import sys
import traceback
import types
from collections.abc import Callable, Iterator, MappingView
from functools import partial
from typing import Any, NamedTuple

MAX_ERROR_CHARS = 200
MAX_MESSAGE_BYTES = 32 << 20  # of a message from a solution to its tests
MAX_DEPTH = 200  # of the values in a message

# The objects of the solution's process that the tests know before they ask for any.
MODULE = 0
RUN = 1
GETATTR = 2


class SolutionEnded(BaseException):
    """The solution's process ended. No Exception: tests may expect one of those."""


# --- messages between processes -------------------------------------------------------------------


def send(fd: int, data: bytes) -> None:
    """Write one message to a pipe: its length, then its bytes."""
    rest = memoryview(struct.pack("Q", len(data)) + data)
    while rest:
        rest = rest[os.write(fd, rest) :]


def receive(fd: int, max_bytes: int = 1 << 40) -> bytes | None:
    """Read one message from a pipe.

    Returns:
        The message; None if the other side is gone.

    Raises:
        ValueError: the message is larger than `max_bytes`.
    """
    header = _read_exactly(fd, 8)
    if header is None:
        return None
    (size,) = struct.unpack("Q", header)
    if size > max_bytes:
        raise ValueError("a message is too large")
    return _read_exactly(fd, size)


def _read_exactly(fd: int, count: int) -> bytes | None:
    parts = []
    while count:
        part = os.read(fd, min(count, 1 << 20))
        if not part:
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


# --- values in messages ---------------------------------------------------------------------------

COLLECTIONS = [list, tuple, set, frozenset, collections.deque]
# Values of exactly these types stay what they are, besides None, bool, float and str.
KINDS = [int, complex, bytes, bytearray, range, type(...), dict, *COLLECTIONS]
# How a value is made again: from the list of its parts, or with its parts as arguments.
FROM_LIST = {kind.__name__: kind for kind in (*COLLECTIONS, iter)}
FROM_PARTS = {
    "int": partial(int, base=16),
    "complex": complex,
    "bytes": partial(bytes, encoding="latin-1"),
    "bytearray": partial(bytearray, encoding="latin-1"),
    "range": range,
    "ellipsis": type(...),
}
# Sent as the values that they give: they come back as an iterator.
ITERATORS: Any = Iterator, MappingView
JSON = json.JSONEncoder(ensure_ascii=False, check_circular=False)


def encode(value: object, stand_in: Callable) -> bytes:
    """Encode a value as a message: JSON in which a list begins with the kind of what it holds.

    An instance of a subclass is sent as its built-in base: a named tuple as a tuple, a Counter as
    a dict. Anything else is sent as the number that `stand_in(value)` returns.

    Raises:
        ValueError: the value is nested too deeply.
    """
    return JSON.encode(_to_json(value, stand_in, MAX_DEPTH)).encode("utf-8", "surrogatepass")


def decode(message: bytes, lookup: Callable) -> Any:
    """Decode a message, which may be hostile.

    Returns:
        A value of the kinds above, in which numbered objects are what `lookup(number)` returns.

    Raises:
        ValueError, TypeError, LookupError, RecursionError: the message is no such value.
    """
    return _from_json(json.loads(message.decode("utf-8", "surrogatepass")), lookup, MAX_DEPTH)


def _to_json(value: Any, stand_in: Callable, depth: int):
    kind: Any = type(value)
    if value is None or kind in (bool, float, str):
        return value
    if kind is int and abs(value) < 1 << 63:
        return value
    if not depth:
        raise ValueError("a value is nested too deeply")
    if kind not in KINDS:
        if isinstance(value, ITERATORS) and not hasattr(value, "read"):
            kind = iter
        elif isinstance(value, str):  # str(value) would be what a subclass wants to print
            return str.__str__(value)
        else:
            for base in (float, *KINDS):
                if isinstance(value, base):
                    return _to_json(base(value), stand_in, depth - 1)
            return ["object", stand_in(value)]
    parts = [_to_json(part, stand_in, depth - 1) for part in _parts(value, kind)]
    return [kind.__name__, *parts]


def _parts(value, kind):
    """What a value of a kind is made of."""
    if kind is int:
        return [hex(value)]  # decimals of a huge integer would take quadratic time
    if kind is complex:
        return [value.real, value.imag]
    if kind in (bytes, bytearray):
        return [value.decode("latin-1")]
    if kind is range:
        return [value.start, value.stop, value.step]
    if kind is type(...):
        return []
    if kind is dict:
        return itertools.chain.from_iterable(value.items())
    return value


def _from_json(plain: Any, lookup: Callable, depth: int):
    if plain is None or type(plain) in (bool, int, float, str):
        return plain
    if type(plain) is not list or not depth:
        raise ValueError("no value, or one nested too deeply")
    kind, *parts = plain
    parts = [_from_json(part, lookup, depth - 1) for part in parts]
    if kind == "object":
        return lookup(*parts)
    if kind == "dict":
        return dict(zip(parts[::2], parts[1::2], strict=True))
    if kind in FROM_LIST:
        return FROM_LIST[kind](parts)
    return FROM_PARTS[kind](*parts)


# --- the solution's process -----------------------------------------------------------------------


def serve(requests: int, replies: int, name: str) -> None:
    """Answer the requests of the tests' process until it is gone.

    A request is (function, args, kwargs), its reply ("value", result) or ("error", class, text).

    Args:
        requests: the pipe to read from.
        replies: the pipe to write to.
        name: of the module in which the program runs.
    """
    module = types.ModuleType(name)
    sys.modules[name] = module
    gc.enable()
    pid = os.getpid()

    def run(program, token):
        exec(compile(program, f"<{name}>", "exec"), module.__dict__)
        return token

    objects: list[Any] = [module, run, getattr]

    def stand_in(value):
        objects.append(value)
        return len(objects) - 1

    while (message := receive(requests)) is not None:
        try:
            function, args, kwargs = decode(message, objects.__getitem__)
            reply = encode(("value", function(*args, **kwargs)), stand_in)
        except BaseException as error:  # whatever it is, the tests decide what it means
            reply = encode(("error", type(error).__name__, describe(error)), stand_in)
        if os.getpid() != pid:  # a child that the solution's code started and that came back
            os._exit(0)
        send(replies, reply)


def describe(error: BaseException, default: str = "") -> str:
    """One short line, `Class: message`; `default` stands for the message of an error with none."""
    try:
        text = str(error) or default
    except BaseException:  # the solution's own class may do anything
        text = ""
    line = " ".join(f"{type(error).__name__}: {text}".split())
    return line[:MAX_ERROR_CHARS].rstrip(": ")


# --- the tests' process ---------------------------------------------------------------------------


class Remote:
    """Stands in for an object of the solution's process; it equals nothing but itself."""

    __slots__ = ("_number", "_solution")

    def __init__(self, solution: "Solution", number: int) -> None:
        self._solution = solution
        self._number = number

    def __call__(self, *args: object, **kwargs: object) -> Any:
        return self._solution.ask(self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Remote(self._solution, GETATTR)(self, name)


class Solution(NamedTuple):
    """The solution's process, as the tests see it: two pipes on which it is asked."""

    pid: int
    requests: int
    replies: int

    def ask(self, *request: object) -> Any:
        """Send a request, see `serve`; return the value or raise the error of the reply."""
        try:
            send(self.requests, encode(request, _number_of))
            message = receive(self.replies, MAX_MESSAGE_BYTES)
        except BrokenPipeError:
            message = None
        if message is None:
            raise SolutionEnded
        status, *values = decode(message, partial(Remote, self))
        if status == "value":
            return values[0]
        name, text = (str(value)[:MAX_ERROR_CHARS] for value in values)
        error = getattr(builtins, name, None)
        if isinstance(error, type) and issubclass(error, Exception):
            # A text alone cannot make the first; the others would end a loop of the tests.
            if not issubclass(error, (UnicodeError, StopIteration, StopAsyncIteration)):
                raise error(text.removeprefix(f"{name}: "))
        raise RuntimeError(text)


def _number_of(value: object):
    if type(value) is not Remote:
        raise TypeError(f"tests cannot hand a solution a {type(value).__name__}")
    return value._number


def grade(program: str, tests: str, solution: Solution) -> tuple[str, str]:
    """Grade a program, in the tests' process.

    Without tests the program is its own judge. That it came to its end is then its own word, if
    only with a token that it has to look for in its interpreter. With tests it is not asked.

    Returns:
        (reason, detail) of an `Outcome`.
    """
    token = os.urandom(16)
    try:
        if Remote(solution, RUN)(program, token) != token:
            return "failed", "the program wrote into the sandbox's pipes"
        if tests:
            module: Any = Remote(solution, MODULE)
            sys.modules["solution"] = module
            exec(compile(tests, "<tests>", "exec"), {"__name__": "tests"})
            Remote(solution, RUN)("", token)  # it is still there, whatever the tests caught
        return "passed", ""
    except SolutionEnded:
        code = os.waitstatus_to_exitcode(os.waitpid(solution.pid, 0)[1])
        if code < 0:
            return "crashed", f"ended by signal {-code} ({signal.strsignal(-code)})"
        return "crashed", f"ended with exit code {code} before its end"
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as error:  # whatever it is, the program has not passed
        line = ""  # of the tests, in which it was raised
        for frame, number in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename == "<tests>":
                line = tests.splitlines()[number - 1].strip()
        return "failed", describe(error, line)
