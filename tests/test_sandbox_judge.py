"""Tests and solution apart: honest, forged and hostile solutions, and the messages between them."""

import collections
import enum
import math
import sys
import time

import pytest

from data.sandbox import judge
from tests.sandbox_tools import TRY_CALLS, linux_only

pytest_plugins = ["tests.sandbox_fixtures"]
pytestmark = linux_only

# --- forged verdicts ----------------------------------------------------------------------------

TESTS = "from solution import f\nassert f(2) == 4\nassert f(3) == 9"
EQUAL = """
class Y:
    def __eq__(self, other): return True
    def __call__(self, *a): return self
"""
EVERYWHERE = """
import os, struct
messages = [b"passed\\n", b'["passed", ""]', b'["passed", "", 0]', b"0",
            b'{"passed": true, "reason": "passed", "detail": "", "seconds": 0}',
            b'["tuple", "value", null]', b'["tuple", "value", true]']
for data in messages:
    for fd in range(256):
        for text in (data, struct.pack("Q", len(data)) + data):
            try:
                os.write(fd, text)
            except OSError:
                pass
"""
# A program that finds the frame in which it is asked, and in it the pipe and the arguments.
PIPES = """
import struct, os, sys
def asked():
    frame = sys._getframe()
    while not ("replies" in frame.f_locals and "args" in frame.f_locals):
        frame = frame.f_back
    return frame.f_locals
def send(data):
    os.write(asked()["replies"], struct.pack("Q", len(data)) + data)
"""
ADVANCE = (
    PIPES
    + """
for value in {values}:
    send(sys.modules['judge'].encode(('value', value), None))
"""
)
WRONG = "\ndef f(x): return 0"
FORGERIES = {
    "prints": "print('passed')\nprint('[\"passed\", \"\"]')" + WRONG,
    "writes everywhere": EVERYWHERE + WRONG,
    "writes everywhere and leaves": EVERYWHERE + "os._exit(0)",
    "at exit": "import atexit, os, sys\natexit.register(lambda: os._exit(0))\nsys.exit()",
    "leaves in the call": "import os\ndef f(x): os._exit(0)",
    "exits in the call": "import sys\ndef f(x): sys.exit(0)",
    "equals everything": EQUAL + "f = lambda x: Y()",
    "is everything": EQUAL + "f = Y()",
    "an int that equals everything": """
class Y(int):
    def __eq__(self, other): return True
f = lambda x: Y(5)
""",
    "a list that equals everything": """
class Y(list):
    def __eq__(self, other): return True
f = lambda x: Y([5])
""",
    "no assertions": """
import builtins
builtins.AssertionError = None
builtins.compile = builtins.exec = lambda *a, **k: None
def f(x): return 0
""",
    "patched writer": """
import json, sys
json.JSONEncoder.encode = lambda *a: ''
sys.modules['judge'].encode = lambda *a: b''
def f(x): return 0
""",
    "reduces to a call": """
class Y:
    def __reduce__(self): return (eval, ('4',))
f = lambda x: Y()
""",
    "reduces as a list": """
class Y(list):
    __reduce_ex__ = lambda self, n: (exec, ('import os; os._exit(0)',))
f = lambda x: Y()
""",
    "sends a pickle": PIPES + "import pickle\ndef f(x): send(pickle.dumps(('value', x * x)))",
    "raises what is not": "class Y(BaseException): pass\ndef f(x): raise Y",
    "generator": "def f(x):\n    raise GeneratorExit",
    "kills the tests": "import os\ndef f(x):\n    os.kill(os.getppid(), 9)",
    "guesses by the clock": """
import time
last, guess = time.perf_counter(), 0
def f(x):  # a test that goes on at once was content
    global last, guess
    guess += 1 + int(1e9 * (time.perf_counter() - last)) % 1000
    last = time.perf_counter()
    return guess
""",
    "answers in the last moment": "import time\ndef f(x):\n    time.sleep(0.49)\n    return x",
    "answers in advance, all the time": PIPES
    + """
import threading
def flood(at):
    for number in range(10**6):
        message = sys.modules['judge'].encode(('value', number % 50), None)
        os.write(at, struct.pack("Q", len(message)) + message)
def f(x):
    threading.Thread(target=flood, args=(asked()["replies"],), daemon=True).start()
    return 5
""",
    "sets the clock": """
import signal, time
for change in (
    lambda: time.clock_settime(time.CLOCK_REALTIME, time.time()),
    lambda: signal.setitimer(signal.ITIMER_REAL, 0),
):
    try:
        change()
    except OSError:
        pass
time.monotonic = lambda: 0.0
def f(x):
    while True:
        pass
""",
    "other names": "set = sorted = len = abs = check = lambda *a: 0" + WRONG,
}


def test_forged_verdicts(jail):
    for name, program in FORGERIES.items():
        if name.endswith("equals everything"):
            space = {}
            exec(program, space)
            # With tests beside the solution it passes.
            assert space["f"](2) == 4 and space["f"](3) == 9
        assert not jail.check(program, TESTS, timeout=0.5).passed, name
        if "and leaves" in name or name == "at exit":
            assert not jail.check(program, timeout=0.5).passed, name


SCAN = """
import os
calls = {}
def write(pid, n):
    os.write(os.open(f"/proc/{pid}/fd/{n}", os.O_WRONLY), b'["passed", ""]')
for pid in range(1, 9):
    for n in range(16):
        calls[pid, n] = lambda pid=pid, n=n: write(pid, n)
"""


def test_a_program_that_knows_how_it_is_asked(jail):
    """It finds the pipes in the frames and answers in advance.

    That works on a program that judges itself. With tests apart from it, it would have to know
    what they expect.
    """
    right = "(asked()['args'][-1], 4, 9, True)"
    assert jail.check(ADVANCE.format(values=right) + "1 / 0").passed
    wrong = "(asked()['args'][-1], 0, 0, True)"
    assert not jail.check(ADVANCE.format(values=wrong) + WRONG, TESTS).passed
    jail.needs("filter of system calls")
    assert not jail.check(SCAN + TRY_CALLS + WRONG, TESTS).passed


# --- what goes from process to process ----------------------------------------------------------


def sent(value):
    return judge.decode(judge.encode(value, None), None)


def alike(a, b):
    """The same types all the way down, and the same digits: -0.0 is not 0.0, nan is nan."""
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(alike, a, b))
    return repr(a) == repr(b)


INTEGERS = [0, -1, True, (1 << 63) - 1, 1 << 63, -(1 << 63), 1 << 400_000]
FLOATS = [0.1, -0.0, 5e-324, math.inf, -math.inf, math.nan, complex(-0.0, 2)]
TEXTS = ["", "é\n\0", "\ud800", "\ud800\udc00", "\U0001f600", "list"]
BYTES = [b"", bytes(range(256)), bytearray(b"x")]
MAPPINGS = [{}, {1: {2: (3,)}, "a": [4], (5,): None, 2.0: ""}]
SETS = [set(), {1, (2, "3")}, frozenset([None])]
SEQUENCES = [(), [], [[]], [()], ["list", 1], ("object", 0), collections.deque([1, [2]])]
OTHERS = [None, ..., range(9, 1, -2)]


def test_plain_values_stay_what_they_are():
    values = [*INTEGERS, *FLOATS, *TEXTS, *BYTES, *MAPPINGS, *SETS, *SEQUENCES, *OTHERS]
    sys.set_int_max_str_digits(0)
    try:
        assert alike(sent(values), values)
    finally:
        sys.set_int_max_str_digits(4300)


def test_instances_of_subclasses_become_their_built_in_base():
    for value in (
        collections.Counter("aab"),
        collections.OrderedDict(a=1),
        collections.defaultdict(list, a=[1]),
        enum.IntEnum("E", "A").A,
        enum.Enum("Member", "A B", type=str).A,
        collections.namedtuple("P", "x y")(1, [2]),
    ):
        assert sent(value) == value and type(sent(value)).__module__ == "builtins"


def test_iterators_and_views_come_back_as_iterators():
    once = sent(iter([1, 2]))
    assert next(once) == 1 and list(once) == [2]
    assert list(sent({1: 2}.items())) == [(1, 2)]


def test_a_huge_integer_does_not_take_quadratic_time():
    huge = 3**2_000_000
    start = time.process_time()
    assert sent(huge) == huge and time.process_time() - start < 10  # by its decimals minutes


def nested(depth, value=0):
    for _ in range(depth):
        value = [value]
    return value


def test_deep_values_are_refused_and_shallow_ones_not():
    assert sent(nested(judge.MAX_DEPTH)) == nested(judge.MAX_DEPTH)
    for value in (nested(judge.MAX_DEPTH + 1), nested(100_000)):
        with pytest.raises(ValueError, match="too deeply"):
            sent(value)
    loop = []
    loop.append(loop)
    with pytest.raises(ValueError, match="too deeply"):
        sent(loop)


HOSTILE = [
    b"",
    b"\xff",
    b"[",
    b"{}",
    b'{"a": 1}',
    b"[]",
    b"[[]]",
    b"[1]",
    b"[null, 1]",
    b'[["list"], 1]',
    b'["no such kind"]',
    b'["exec", "1"]',
    b'["eval", "1"]',
    b'["__class__"]',
    b'["int", 5]',
    b'["int", ["list", 1]]',
    b'["int", "5", 10]',
    b'["int", "z"]',
    b'["bytes", "\\u0100"]',
    b'["bytes", 9]',
    b'["bytearray", 99999999999]',
    b'["range", 0.5]',
    b'["range", 1, 2, 0]',
    b'["complex", "x", 1]',
    b'["dict", 1]',
    b'["dict", ["list"], 1]',
    b'["set", ["list"]]',
    b'["set", ["dict"]]',
    b'["object"]',
    b'["object", 1, 2]',
    b'["object", ["list"]]',
    b'["int", ["object", 1]]',
    b'["range", ["object", 1]]',
    b'["bytes", ["object", 1]]',
    b'["dict", ["dict"], 1]',
    b'["tuple", "value"',
    b"9" * 5000,
    b"[" * 10**6,
    b'["list",' * 10**5,
    b'["list",' * 250 + b"1" + b"]" * 250,
    b"\x80\x04N.",
    b"cos\nsystem\n(S'true'\ntR.",
]


@pytest.mark.parametrize("message", HOSTILE, ids=lambda m: m[:30].decode("latin-1"))
def test_hostile_messages_raise(message):
    solution = judge.Solution(0, -1, -1)  # to ask it would raise an OSError
    with pytest.raises((ValueError, TypeError, LookupError, RecursionError)):
        judge.decode(message, {1: judge.Remote(solution, 1)}.__getitem__)


ENDLESS = """
def f(x):
    os.write(asked()["replies"], struct.pack("Q", {size}))
    while True: pass
"""


def test_hostile_replies_fail(jail):
    """As the tests' process meets them; also a length that no memory holds, and an endless one."""
    for message in (b"{}", b'["eval", "1"]', b"[" * 10**6, b'["tuple", "value"', b"\x80\x04N."):
        program = PIPES + f"def f(x): send(bytes.fromhex('{message.hex()}'))"
        assert jail.check(program, TESTS).reason == "failed", message
    limit = judge.MAX_MESSAGE_BYTES
    for size, reason in ((1 << 62, "failed"), (limit + 1, "failed"), (limit, "timeout")):
        program = PIPES + ENDLESS.format(size=size)
        seconds = 0.3 if reason == "timeout" else 60.0
        assert jail.check(program, TESTS, timeout=seconds).reason == reason, size


HONEST = """
import collections, dataclasses, enum
Point = collections.namedtuple("Point", "x y")
class Colour(enum.IntEnum):
    RED = 1
@dataclasses.dataclass
class Pair:
    a: int
    b: int
def same(x): return x
def pair(a, b): return Pair(a, b)
def total(p): return p.a + p.b
def squares(n): return (i * i for i in range(n))
def views(d): return d.keys(), d.items(), zip(d, d), map(str, d)
def point(): return Point(1, 2)
def colour(): return Colour.RED
def wrong(x): raise ValueError("not " + x)
def adder(n): return lambda x: x + n
def own(): raise type("Mine", (Exception,), {})("mine")
constant = [1, 2]
"""
HONEST_TESTS = """
from solution import same, pair, total, squares, views, point, colour, wrong, adder, own, constant
from solution import Pair
assert same([1, (2.5, {"a": None})]) == [1, (2.5, {"a": None})] and list(same(iter([1]))) == [1]
assert total(pair(1, 2)) == 3 == total(Pair(1, 2)) and pair(1, 2).b == 2 and pair(3, 4) != 3
assert list(squares(4)) == [0, 1, 4, 9] and next(squares(3)) == 0
keys, items, zipped, mapped = views({1: 2})
assert list(keys) == [1] and list(items) == [(1, 2)]
assert list(zipped) == [(1, 1)] and list(mapped) == ["1"]
assert point() == (1, 2) and colour() == 1 and adder(2)(3) == 5 and constant == [1, 2]
for call, error, text in (
    (lambda: wrong("x"), ValueError, "not x"),
    (own, RuntimeError, "Mine: mine"),
    (lambda: pair(1), TypeError, "missing"),
):
    try:
        call()
    except error as e:
        assert text in str(e), str(e)
    else:
        assert False
"""
EXPECTS_AN_EXCEPTION = """
from solution import f
try:
    f()
except Exception:
    pass
"""


def test_honest_programs_pass_with_tests_apart(jail):
    outcome = jail.check(HONEST, HONEST_TESTS)
    assert outcome.passed, outcome
    sends_a_function = "from solution import f\nassert f(lambda: 1) == 1"
    assert jail.check("def f(x): return x", sends_a_function).reason == "failed"
    assert jail.check("x = 1", "from solution import f").detail.startswith("ImportError")
    # The end of the process is not the exception that tests expect.
    for expected in ("Exception", "BaseException"):
        tests = EXPECTS_AN_EXCEPTION.replace("Exception", expected)
        assert jail.check("import os\ndef f(): os._exit(0)", tests).reason == "crashed"
    # Nor does an exception end a loop of the tests.
    for error in ("StopIteration", "StopAsyncIteration", "GeneratorExit"):
        tests = "from solution import f\nassert all(map(f, [1, 2]))"
        assert not jail.check(f"def f(x): raise {error}", tests).passed
