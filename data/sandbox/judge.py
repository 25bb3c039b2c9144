"""Two processes that do not trust each other: one runs a solution, the other the tests, which see of the solution only what it returns.

The tests `from solution import f`; f is then a stand-in whose calls are sent to the solution's process. What comes back are values of exact
built-in types, so a result that calls itself equal to everything is no such result here; they are read from JSON, which makes nothing else.
What JSON cannot hold (a class of the solution's, a function) comes back as a stand-in too. The verdict is written by the tests' process, to a
pipe that the other never had.
"""

import builtins
import collections
import gc
import json
import os
import random
import select
import signal
import struct
import sys
import time
import traceback
import types
from collections.abc import Iterator, MappingView

LONGEST = 200  # characters of an error that are told
LARGEST, DEEPEST = (
    32 << 20,
    200,
)  # bytes of a message between solution and tests, and how deep its values may be nested


class Gone(BaseException):
    """The solution's process ended. No Exception: tests that expect one do not take it for theirs."""


# --- messages --------------------------------------------------------------------------------------------------------


def send(fd, data):
    data = memoryview(struct.pack("Q", len(data)) + data)
    while data:
        data = data[os.write(fd, data) :]


def receive(fd, largest=1 << 40, until=None):
    """The next message, or None at the end, or when it is `until` (time.monotonic()). Raises ValueError if it is larger than `largest`."""
    head = _exactly(fd, 8, until)
    if head is None:
        return None
    (size,) = struct.unpack("Q", head)
    if size > largest:
        raise ValueError("a message is too large")
    return _exactly(fd, size, until)


def _exactly(fd, count, until):
    poll, parts = select.poll(), []
    poll.register(fd, select.POLLIN)
    while count:
        if (
            until
            and not poll.poll(max(0, until - time.monotonic()) * 1000)
            or not (part := os.read(fd, min(count, 1 << 20)))
        ):
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


# --- values ----------------------------------------------------------------------------------------------------------

# kind: (the parts of a value, how they make it again). Decimals of a huge integer would take quadratic time.
KINDS = {
    int: (lambda i: [hex(i)], lambda text: int(text, 16)),
    complex: (lambda z: [z.real, z.imag], complex),
    bytes: (lambda b: [b.decode("latin-1")], lambda text: bytes(text, "latin-1")),
    bytearray: (lambda b: [b.decode("latin-1")], lambda text: bytearray(text, "latin-1")),
    range: (lambda r: [r.start, r.stop, r.step], range),
    type(...): (lambda _: [], lambda: ...),
    dict: (
        lambda d: [x for item in d.items() for x in item],
        lambda *x: dict(zip(x[::2], x[1::2], strict=True)),
    ),
    iter: (iter, lambda *x: iter(x)),
} | {
    kind: (iter, lambda *x, kind=kind: kind(x))
    for kind in (list, tuple, set, frozenset, collections.deque)
}
MAKE = {kind.__name__: make for kind, (_, make) in KINDS.items()}
BASES = (float, str, *(kind for kind in KINDS if kind is not iter))
JSON = json.JSONEncoder(ensure_ascii=False, check_circular=False)


def write(value, stand_in):
    """A value as a message: JSON, in which every list begins with the kind of what it holds. A subclass of a kind becomes that kind (a named
    tuple a tuple, a Counter a dict); anything else is the number that stand_in(value) says."""
    return JSON.encode(_plain(value, stand_in, DEEPEST)).encode("utf-8", "surrogatepass")


def read(message, lookup):
    """The value of a message that may be anything: it raises, or makes values of these kinds and whatever lookup(number) says."""
    return _value(json.loads(message.decode("utf-8", "surrogatepass")), lookup, DEEPEST)


def _plain(value, stand_in, depth):
    kind = type(value)
    if value is None or kind in (bool, float, str) or kind is int and abs(value) < 1 << 63:
        return value
    if not depth:
        raise ValueError("a value is nested too deeply")
    if kind not in KINDS:
        if isinstance(value, (Iterator, MappingView)) and not hasattr(value, "read"):
            kind = iter
        elif base := next((b for b in BASES if isinstance(value, b)), None):
            return _plain(str.__str__(value) if base is str else base(value), stand_in, depth - 1)
        else:
            return ["object", stand_in(value)]
    return [kind.__name__, *(_plain(part, stand_in, depth - 1) for part in KINDS[kind][0](value))]


def _value(plain, lookup, depth):
    if plain is None or type(plain) in (bool, int, float, str):
        return plain
    if type(plain) is not list or not depth:
        raise ValueError("no value, or one nested too deeply")
    kind, *parts = plain
    return (lookup if kind == "object" else MAKE[kind])(
        *[_value(part, lookup, depth - 1) for part in parts]
    )


# --- the solution's side ---------------------------------------------------------------------------------------------


def serve(requests, replies, name):
    """Answers ("run", module, source, token), ("get", object, name) and ("call", object, args, kwargs) until the other side is gone."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    gc.enable()
    objects, me = [module], os.getpid()
    stand_in = lambda value: objects.append(value) or len(objects) - 1
    while (message := receive(requests)) is not None:
        try:
            what, target, *rest = read(message, objects.__getitem__)
            if what == "run":
                exec(compile(rest[0], f"<{name}>", "exec"), target.__dict__)
                value = rest[1]
            else:
                value = getattr(target, rest[0]) if what == "get" else target(*rest[0], **rest[1])
            reply = write(("value", value), stand_in)
        except BaseException as e:  # noqa: BLE001 (whatever it is, it is the tests' to know)
            reply = write(("error", type(e).__name__, describe(e)), stand_in)
        if os.getpid() != me:  # a child that came back from the solution's code
            os._exit(0)
        send(replies, reply)


def describe(error, otherwise=""):
    """`Kind: message` in one short line; otherwise: for the message of an error that has none."""
    try:
        text = str(error) or otherwise
    except BaseException:  # noqa: BLE001 (the solution's own class may do anything)
        text = ""
    return " ".join(f"{type(error).__name__}: {text}".split())[:LONGEST].rstrip(": ")


# --- the tests' side -------------------------------------------------------------------------------------------------


class Remote:
    """Stands in for an object of the solution's process: it can be called and has attributes, and equals nothing else."""

    __slots__ = ("_ask", "_number")

    def __init__(self, ask, number):
        self._ask, self._number = ask, number

    def __call__(self, *args, **kwargs):
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)


def asking(requests, replies):
    """ask(*request) -> the solution's value; raises what it raised. And the stand-in for its module."""
    remotes = {}
    remote = lambda number: remotes.setdefault(number, Remote(ask, number))

    def ask(*request):
        try:
            send(requests, write(request, number_of))
            message = receive(replies, LARGEST)
        except BrokenPipeError:
            message = None
        if message is None:
            raise Gone
        what, *rest = read(message, remote)
        if what == "value":
            return rest[0]
        kind, text = (str(part)[:LONGEST] for part in rest)
        error = getattr(builtins, kind, None)
        known = (
            isinstance(error, type)
            and issubclass(error, Exception)
            and not issubclass(error, UnicodeError)
        )
        raise error(text.removeprefix(f"{kind}: ")) if known else RuntimeError(text)

    def number_of(value):
        if type(value) is not Remote:
            raise TypeError(f"tests cannot hand a solution a {type(value).__name__}")
        return value._number

    return ask, remote(0)


def examine(program, tests, solution):
    """(reason, detail), in the tests' process. solution(): starts the other one and returns (pid, requests, replies).

    Without tests the program is its own judge, and that it came to its end is its own word, if only with a token that a program
    finds that goes looking for it; with tests it is not asked."""
    random.seed(0)
    pid, requests, replies = solution()
    (ask, module), token = asking(requests, replies), os.urandom(16)
    try:
        if ask("run", module, program, token) != token:
            return "failed", "the program wrote into the sandbox's pipes"
        if tests:
            sys.modules["solution"] = module
            exec(compile(tests, "<tests>", "exec"), {"__name__": "tests"})
        return "passed", ""
    except Gone:
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        return (
            "crashed",
            f"ended by signal {-code} ({signal.strsignal(-code)})"
            if code < 0
            else f"ended with exit code {code} before its end",
        )
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as e:  # noqa: BLE001 (whatever it is, the program has not passed)
        where = [
            line
            for frame, line in traceback.walk_tb(e.__traceback__)
            if frame.f_code.co_filename == "<tests>"
        ]
        return "failed", describe(e, tests.splitlines()[where[-1] - 1].strip() if where else "")
