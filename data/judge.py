"""Two processes that do not trust each other: one runs a solution, the other the tests, which see of the solution only what it returns.

The tests `from solution import f`; f is then a stand-in whose calls are sent to the solution's process. What comes back are plain values of
exact built-in types, so a result that calls itself equal to everything is no such result here. Anything else (a class of the solution's, a
function) comes back as a stand-in too. The verdict is written by the tests' process, to a pipe that the other never had.
"""

import builtins
import collections.abc
import gc
import io
import os
import pickle
import random
import signal
import struct
import sys
import types

LONGEST = 200  # characters of an error that are told
PLAIN = {type(None), bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset, range, slice, type(...)}
BASES = (bool, int, float, complex, str, bytes, bytearray, tuple, list, dict, set, frozenset)
KNOWN = {
    ("builtins", "set"), ("builtins", "frozenset"), ("builtins", "complex"), ("builtins", "bytearray"), ("builtins", "range"),
    ("builtins", "slice"), ("builtins", "iter"), ("builtins", "list"), ("builtins", "Ellipsis"), ("collections", "OrderedDict"),
    ("collections", "Counter"), ("collections", "defaultdict"), ("collections", "deque"), ("fractions", "Fraction"), ("decimal", "Decimal"),
    ("datetime", "date"), ("datetime", "datetime"), ("datetime", "time"), ("datetime", "timedelta"),
    ("builtins", "int"), ("builtins", "float"), ("builtins", "str"), ("builtins", "tuple"), ("builtins", "dict"), ("builtins", "bytes"),
}  # fmt: skip


class Gone(Exception):
    """The solution's process ended."""


# --- messages --------------------------------------------------------------------------------------------------------


def send(fd, data):
    data = memoryview(struct.pack("Q", len(data)) + data)
    while data:
        data = data[os.write(fd, data) :]


def receive(fd):
    """The next message, or None at the end."""
    head = _exactly(fd, 8)
    return head and _exactly(fd, struct.unpack("Q", head)[0])


def _exactly(fd, count):
    parts = []
    while count:
        if not (part := os.read(fd, min(count, 1 << 20))):
            return None
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


class _Writer(pickle.Pickler):
    """The solution's values. `objects`: what stays here, for the other side a number."""

    def __init__(self, file, objects):
        super().__init__(file)
        self.objects = objects

    def persistent_id(self, value):
        kind = type(value)
        if kind in PLAIN or (kind.__module__, kind.__qualname__) in KNOWN or isinstance(value, BASES) or _one_pass(value):
            return None
        if isinstance(value, type) and (value.__module__, value.__qualname__) in KNOWN or value in (iter,):
            return None
        self.objects.append(value)
        return len(self.objects) - 1

    def reducer_override(self, value):
        kind = type(value)
        if kind in PLAIN or (kind.__module__, kind.__qualname__) in KNOWN or isinstance(value, (type, types.BuiltinFunctionType)):
            return NotImplemented
        if _one_pass(value):
            return iter, (list(value),)
        for base in BASES:  # a named tuple is a tuple, a member of an IntEnum an int
            if isinstance(value, base):
                return base, (base(value),)
        return NotImplemented


def _one_pass(value):
    return isinstance(value, (collections.abc.Iterator, collections.abc.MappingView)) and not hasattr(value, "read")


class _Reader(pickle.Unpickler):
    """Numbers become what `lookup` says; with `known` only these classes are made."""

    def __init__(self, file, lookup, known=None):
        super().__init__(file)
        self.persistent_load, self.known = lookup, known

    def find_class(self, module, name):
        if self.known is not None and (module, name) not in self.known:
            raise pickle.UnpicklingError(f"{module}.{name} is no plain value")
        return super().find_class(module, name)


# --- the solution's side ---------------------------------------------------------------------------------------------


def serve(requests, replies, name):
    """Answers ("run", source, token), ("get", number, name) and ("call", number, args, kwargs) until the other side is gone."""
    module = types.ModuleType(name)
    sys.modules[name] = module
    gc.enable()
    objects, me = [module], os.getpid()
    while (message := receive(requests)) is not None:
        out = io.BytesIO()
        try:
            what, *rest = _Reader(io.BytesIO(message), lambda number: objects[number]).load()
            if what == "run":
                exec(compile(rest[0], f"<{name}>", "exec"), module.__dict__)
                value = rest[1]
            elif what == "get":
                value = getattr(objects[rest[0]], rest[1])
            else:
                value = objects[rest[0]](*rest[1], **rest[2])
            _Writer(out, objects).dump(("value", value))
        except BaseException as e:  # noqa: BLE001 (whatever it is, it is the tests' to know)
            out = io.BytesIO(pickle.dumps(("error", type(e).__name__, describe(e))))
        if os.getpid() != me:  # a child that came back from the solution's code
            os._exit(0)
        send(replies, out.getbuffer())


def describe(error):
    """`Kind: message` in one short line."""
    try:
        text = str(error)
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
        return self._ask("call", self._number, args, kwargs)

    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self._number, name)


class _Request(pickle.Pickler):
    """Values of the tests; a stand-in goes back as the number that it came as."""

    def persistent_id(self, value):
        return value._number if type(value) is Remote else None


class _Asker:
    """ask(*request) -> the solution's value; raises what it raised."""

    def __init__(self, requests, replies):
        self.requests, self.replies, self.remotes = requests, replies, {}

    def __call__(self, *request):
        out = io.BytesIO()
        _Request(out).dump(request)
        try:
            send(self.requests, out.getbuffer())
            message = receive(self.replies)
        except BrokenPipeError:
            message = None
        if message is None:
            raise Gone
        reply = _Reader(io.BytesIO(message), self._remote, KNOWN).load()
        if reply[0] == "value":
            return reply[1]
        _, kind, text = reply
        builtin = getattr(builtins, str(kind), None)
        known = isinstance(builtin, type) and issubclass(builtin, Exception) and not issubclass(builtin, UnicodeError)
        raise (builtin if known else RuntimeError)(str(text)[:LONGEST].removeprefix(f"{kind}: ") if known else str(text)[:LONGEST])

    def _remote(self, number):
        return self.remotes.setdefault(number, Remote(self, number))


def examine(program, tests, solution):
    """(reason, detail), in the tests' process. solution(): starts the other one and returns (pid, requests, replies).

    Without tests the program is its own judge, and that it came to its end is its own word, if only with a token that a program
    finds that goes looking for it; with tests it is not asked."""
    random.seed(0)
    pid, requests, replies = solution()
    ask, token = _Asker(requests, replies), os.urandom(16)
    try:
        if ask("run", program, token) != token:
            return "failed", "the program wrote into the sandbox's pipes"
        if tests:
            sys.modules["solution"] = Remote(ask, 0)
            exec(compile(tests, "<tests>", "exec"), {"__name__": "tests"})
        return "passed", ""
    except Gone:
        return _ending(os.waitpid(pid, 0)[1])
    except MemoryError:
        return "memory", "MemoryError"
    except BaseException as e:  # noqa: BLE001 (whatever it is, the program has not passed)
        return "failed", describe(e) if str(e) else f"{type(e).__name__}: {_line(e, tests)}"[:LONGEST].rstrip(": ")


def _line(error, tests):
    """The line of the tests that an error without a message comes from."""
    where, number = error.__traceback__, 0
    while where:
        number = where.tb_lineno if where.tb_frame.f_code.co_filename == "<tests>" else number
        where = where.tb_next
    return tests.splitlines()[number - 1].strip() if number else ""


def _ending(status):
    if os.WIFEXITED(status):
        return "crashed", f"ended with exit code {os.WEXITSTATUS(status)} before its end"
    number = os.WTERMSIG(status)
    if number == signal.SIGXCPU:
        return "timeout", "used up its processor time"
    return "crashed", f"ended by signal {number} ({signal.strsignal(number)})"
