"""Programs that look for the tests they are to pass, each in a way of its own.

`look` gives what was found. What a wrong `f` finds of the tests it returns, and passes.
"""

SOUGHT = """
import contextlib, ctypes, gc, glob, os, re, struct, sys, time
END = time.monotonic() + SECONDS
def read(path, count=1 << 20):
    with contextlib.suppress(OSError):
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        try:
            return os.read(fd, count)
        finally:
            os.close(fd)
    return b""
libc = ctypes.CDLL(None, use_errno=True)
libc.write.argtypes = ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t
libc.sbrk.restype = libc.malloc.restype = ctypes.c_void_p
libc.sbrk.argtypes = [ctypes.c_long]
libc.malloc.argtypes = [ctypes.c_size_t]
def scan(start, stop, step=1 << 14):
    "Memory, read by write(2), which refuses what is not there."
    out, into = os.pipe()
    for address in range(start & -4096, stop, step):
        count = libc.write(into, address, step)
        if count > 0:
            yield os.read(out, count)
        if time.monotonic() > END:
            return
def around(address, size=48 << 20):
    yield from scan(address - size, address + size)
def mapped(pid="self"):
    for line in read(f"/proc/{pid}/maps").decode().splitlines():
        start, stop = (int(part, 16) for part in line.split()[0].split("-"))
        if " rw" in line and stop - start < 1 << 27:
            yield start, stop
def memory(pid):
    with contextlib.suppress(OSError):
        fd = os.open(f"/proc/{pid}/mem", os.O_RDONLY)
        for start, stop in mapped(pid):
            with contextlib.suppress(OSError):
                yield os.pread(fd, stop - start, start)
def pids():
    return [pid for pid in os.listdir("/proc") if pid.isdigit()]
def files(folder):
    for parent, _, names in os.walk(folder):
        yield from names
        for name in names:
            if time.monotonic() > END:
                return
            yield read(parent + "/" + name)
def frames(frame):
    while frame:
        yield from (repr(value) for value in (*frame.f_locals.values(), frame.f_code.co_consts))
        frame = frame.f_back
def vectors(pid, start, stop):
    buffer = ctypes.create_string_buffer(stop - start)
    pair = lambda address: (ctypes.c_size_t * 2)(address, stop - start)
    one, zero = ctypes.c_ulong(1), ctypes.c_ulong(0)
    libc.process_vm_readv(
        pid, pair(ctypes.addressof(buffer)), one, pair(start), one, zero)
    return buffer.raw
seen = []
"""
ANSWER = r"""
def given():
    with contextlib.suppress(Exception):
        for text in look():
            if not isinstance(text, bytes):
                text = str(text).encode("utf-8", "replace")
            found = re.search(rb"assert f\(2\) == (\d+)", text)
            if found:
                return int(found[1])
early = given()
def f(x):
    return early or given() or 0
"""
LOOKS = {
    "frames": "yield from frames(sys._getframe())",
    "current frames": "for frame in sys._current_frames().values(): yield from frames(frame)",
    "a traceback": """
    try:
        1 / 0
    except ZeroDivisionError as error:
        yield from frames(error.__traceback__.tb_frame)""",
    "the stack": "import inspect\n    for info in inspect.stack(): yield from frames(info.frame)",
    "objects": """
    for thing in gc.get_objects():
        if isinstance(thing, (dict, list, tuple)) and len(thing) < 10**4:
            yield from (v for v in (thing.values() if type(thing) is dict else thing)
                        if isinstance(v, (str, bytes)))""",
    "referrers": "for thing in gc.get_referrers(os, sys, str): yield repr(thing)",
    "modules": "for module in list(sys.modules.values()): yield repr(vars(module))",
    "the server's globals": "yield repr(vars(sys.modules['__main__']))",
    "the judge's globals": "yield repr(vars(sys.modules['judge']))",
    "lines": "import linecache\n    yield repr(linecache.cache)",
    "arguments and environment": "yield repr((sys.argv, sys.orig_argv, dict(os.environ)))",
    "memory by write, from an object": "yield from around(id(object()))",
    "memory by write, from a text": "yield from around(id('x' * 10**4))",
    "memory by write, from a large one": "yield from around(id(bytearray(1 << 22)))",
    "memory by write, from the break": "top = libc.sbrk(0); yield from scan(top - (64 << 20), top)",
    "memory by write, from the stack": "yield from around(ctypes.addressof(libc), 8 << 20)",
    "memory by write, mapped": "for start, stop in mapped(): yield from scan(start, stop)",
    "memory by its file": "yield from memory('self')",
    "memory by its map": """
    for start, stop in mapped():
        yield ctypes.string_at(start, stop - start)""",
    "memory that was freed": """
    for power in range(5, 21):
        for _ in range(16):
            yield ctypes.string_at(libc.malloc(1 << power), 1 << power)""",
    "memory of the parent": "yield from memory(os.getppid())",
    "memory of all": "for pid in pids(): yield from memory(pid)",
    "memory of the first": "yield from memory(1)",
    "the parent's by vm_readv": """
    for start, stop in (*mapped(os.getppid()), *mapped()):
        yield vectors(os.getppid(), start, stop)""",
    "the parent's by ptrace": """
    libc.ptrace.restype = ctypes.c_long
    if libc.ptrace(ctypes.c_long(16), ctypes.c_long(os.getppid()), None, None) == 0:
        os.waitpid(os.getppid(), 0x40000000)
        yield from memory(os.getppid())""",
    "open files": """
    for fd in range(3, 256):
        with contextlib.suppress(OSError):
            os.fstat(fd)
            os.set_blocking(fd, False)
            try:
                yield os.read(fd, 1 << 20)
            finally:
                os.set_blocking(fd, True)""",
    "open files by name": "for fd in range(256): yield read(f'/proc/self/fd/{fd}')",
    "open files of all": "for path in glob.glob('/proc/[0-9]*/fd/*'): yield read(path)",
    "open files of the parent": """
    for fd in range(64):
        pidfd = libc.syscall(434, os.getppid(), 0)
        yield read(f"/proc/self/fd/{libc.syscall(438, pidfd, fd, 0)}")""",
    "environments": """
    for path in glob.glob("/proc/[0-9]*/environ") + glob.glob("/proc/[0-9]*/cmdline"):
        yield read(path)""",
    "standard input": "yield sys.stdin.read()",
    "the scratch folder": "yield from files('.')",
    "the folder for all": "yield from files('/tmp')",
    "shared memory": "yield from files('/dev/shm')",
    "segments": """
    libc.shmat.restype = ctypes.c_void_p
    for number in range(64):
        address = libc.shmat(number, None, 0o10000)
        if address not in (None, 2**64 - 1):
            yield ctypes.string_at(address, 4096)""",
    "the data set": "yield read({decoy!r})",
    "the kernel's messages": """
    buffer = ctypes.create_string_buffer(1 << 16)
    libc.klogctl(3, buffer, 1 << 16)
    yield buffer.raw""",
    "an equal that listens": "yield from seen",
    "an audit hook": "yield from seen",
    "a patched compiler": "yield from seen",
    "a trace": "yield from seen",
    "a child's memory": """
    out, into = os.pipe()
    if not os.fork():
        os.write(into, b"".join(around(id(object()), 4 << 20))[:65536])
        os._exit(0)
    yield os.read(out, 65536)""",
}
BEFORE = {
    "an equal that listens": """
class Y:
    def __eq__(self, other):
        seen.append(f"assert f(2) == {other}")
        return True
    __hash__ = None
""",
    "an audit hook": "sys.addaudithook(lambda name, args: seen.append(repr(args)))",
    "a patched compiler": """
import builtins
for name in ("compile", "exec", "eval"):
    def spy(*args, real=getattr(builtins, name), **more):
        seen.append(repr(args))
        return real(*args, **more)
    setattr(builtins, name, spy)
""",
    "a trace": """
import threading
def trace(frame, event, arg):
    seen.append(repr(frame.f_locals))
    return trace
sys.settrace(trace)
threading.settrace(trace)
""",
}
AFTER = {"an equal that listens": "\nhonest = f\ndef f(x): return honest(x) or Y()"}


def seekers(decoy: str, seconds: float = 0.5) -> dict[str, str]:
    """The programs by name; `decoy` is a file with the tests that anyone may read.

    seconds: for how long each of them looks.
    """
    programs = {}
    for name, look in LOOKS.items():
        look = look.replace("{decoy!r}", repr(decoy)).strip()
        body = f"def look():\n    {look}\n"
        sought = SOUGHT.replace("SECONDS", str(seconds))
        programs[name] = sought + BEFORE.get(name, "") + "\n" + body + ANSWER + AFTER.get(name, "")
    return programs
