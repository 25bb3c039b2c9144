"""What the kernel offers to hold a process in: namespaces, Landlock, a filter of system calls, limits, another user. Linux, ctypes only.

Each function does one thing and raises OSError where the system does not allow it; `data/sandbox/jail.py` decides what is used together.
"""

import ctypes
import errno
import os
import resource
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = os.uname().machine
AT_RECURSIVE, MOUNT_READ_ONLY, MOUNT_NO_SUID = 0x8000, 1, 2
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = (
    0x20000,
    0x4000000,
    0x8000000,
    0x10000000,
    0x20000000,
    0x40000000,
)
PR_PDEATHSIG, PR_DUMPABLE, PR_SECCOMP, PR_SUBREAPER, PR_NO_NEW_PRIVS, PR_AMBIENT = (
    1,
    4,
    22,
    36,
    38,
    47,
)


def call(function, *args):
    """A C function whose negative result is an error. Integers are passed as long, None as a null pointer."""
    done = getattr(LIBC, function)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return done


def prctl(option, value=0, more=0):
    call("prctl", option, value, more, 0, 0)


def mount(source, target, kind, flags, options=""):
    call(
        "mount",
        *(x and x.encode() for x in (source, target, kind)),
        flags,
        options.encode() or None,
    )


def enter_root(paths):
    """A new root that holds `paths`, read-only, and an empty /tmp, and nothing else. After unshare(NEW_MOUNTS)."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount(
        "tmpfs", "/proc", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m"
    )  # over /proc: it exists, and holds none of the paths
    for path in paths:
        inside = "/proc" + path
        os.makedirs(inside if os.path.isdir(path) else os.path.dirname(inside), exist_ok=True)
        if not os.path.isdir(path):
            open(inside, "x").close()
        mount(path, inside, None, MS_BIND | MS_REC)
    os.mkdir("/proc/tmp")
    attributes = struct.pack("4Q", MOUNT_READ_ONLY | MOUNT_NO_SUID, 0, 0, 0)
    call(
        "syscall",
        number("mount_setattr"),
        -100,
        b"/proc",
        AT_RECURSIVE,
        attributes,
        len(attributes),
    )
    os.chdir("/proc")
    call("syscall", number("pivot_root"), b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def become(uid):
    """Another user, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def drop_capabilities():
    """None are left and none can be gained; other processes of the user may not look into this one."""
    prctl(PR_NO_NEW_PRIVS, 1)
    prctl(PR_AMBIENT, 4)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    prctl(PR_DUMPABLE, 0)


def limit(**limits):
    """limit(AS=2**29, NOFILE=64); never above what holds already."""
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(which)[1]
        value = value if most == resource.RLIM_INFINITY else min(value, most)
        resource.setrlimit(which, (value, value))


# --- Landlock: which files may be touched ----------------------------------------------------------------------------

ON_FILES, EXECUTE, READ = (
    0b1100000000000111,
    1,
    0b1100,
)  # rights that apply to a single file; read a file, list a folder
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = (
    444,
    445,
    446,
)  # the same numbers on every architecture


def landlock_version():
    """0: the kernel has none."""
    try:
        return call("syscall", LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return 0


def restrict_files(readable, writable):
    """From now on only these paths and what is beneath them, and none may be executed. Also no TCP and no signals to processes outside, where
    the kernel knows how. A process restricted after its parent cannot look into the parent (no ptrace, no /proc/<pid>/mem)."""
    version = landlock_version()
    rights = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    attributes = struct.pack("3Q", rights, 0b11, 0b11)[
        : 8 if version < 4 else 16 if version < 6 else 24
    ]
    ruleset = call("syscall", LANDLOCK_CREATE, attributes, len(attributes), 0)
    for path in readable + writable:
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        allowed = READ if path in readable else rights & ~EXECUTE
        here = allowed if os.path.isdir(path) else allowed & (ON_FILES | 0b10 | 0b100) & rights
        call("syscall", LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", here, fd), 0)
        os.close(fd)
    call("syscall", LANDLOCK_RESTRICT, ruleset, 0)
    os.close(ruleset)


# --- seccomp: which system calls may be made -------------------------------------------------------------------------

ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
NUMBERS = {}  # of a call, on each


def number(name):
    return NUMBERS[name][ARCHITECTURES.get(MACHINE, (0,))[0]]


def _calls(text):
    """The names in a table of `name x86_64 aarch64` (0: there is none), which are added to NUMBERS."""
    found = {
        name: (int(x86), int(arm))
        for name, x86, arm in map(str.split, text.replace("\n", "|").split("|"))
    }
    NUMBERS.update(found)
    return [(name,) for name in found]


_calls(
    "clone 56 220|clone3 435 435|fork 57 0|vfork 58 0|prlimit64 302 261|socketpair 53 199|kill 62 129|tgkill 234 131|fcntl 72 25|open 2 0"
    "|openat 257 56|openat2 437 437"
)

# The network, other processes, new namespaces, programs, memory that no limit counts, and what has often been a way into the kernel.
# Sockets go even where there is no network: a Unix socket is a file, and a door to whatever service listens behind it. Datagram pairs could
# be sent elsewhere; clone3 hides its flags from a filter, and the C library knows the way round its absence.
NEVER = [
    *_calls("""socket 41 198|connect 42 203|bind 49 200|listen 50 201|execve 59 221|execveat 322 281|ptrace 101 117|process_vm_readv 310 270
process_vm_writev 311 271|process_madvise 440 440|kcmp 312 272|move_pages 279 239|migrate_pages 256 238|pidfd_getfd 438 438|unshare 272 97
setns 308 268|mount 165 40|umount2 166 39|pivot_root 155 41|chroot 161 51|open_tree 428 428|move_mount 429 429|fsopen 430 430|fsmount 432 432
mount_setattr 442 442|bpf 321 280|perf_event_open 298 241|userfaultfd 323 282|io_uring_setup 425 425|io_uring_register 427 427|keyctl 250 219
add_key 248 217|request_key 249 218|init_module 175 105|finit_module 313 273|kexec_load 246 104|personality 135 92|modify_ldt 154 0
open_by_handle_at 304 265|name_to_handle_at 303 264|fanotify_init 300 262|syslog 103 116|acct 163 89|quotactl 179 60|shmget 29 194|msgget 68 186
semget 64 190|mq_open 240 180|memfd_create 319 279|memfd_secret 447 447"""),
    ("socketpair", 1, "any", 6),
    ("clone3", errno.ENOSYS),
    ("clone", 0, "any", NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_USER | NEW_PIDS | NEW_NET | 0x2000000),
]
NO_CHILDREN = [("fork",), ("vfork",), ("clone", 0, "none", 0x10000)]  # but threads
# Where other processes can be seen: their signals and limits (fcntl: F_SETOWN, F_SETOWN_EX), and the attributes of files. And see `only_itself`.
OF_OTHERS = [
    *_calls("""tkill 200 130|rt_sigqueueinfo 129 138|rt_tgsigqueueinfo 297 240|pidfd_send_signal 424 424|pidfd_open 434 434
setpriority 141 140|sched_setaffinity 203 122|sched_setscheduler 144 119|sched_setparam 142 118|sched_setattr 314 274|ioprio_set 251 30|chmod 90 0
fchmod 91 52|fchmodat 268 53|fchmodat2 452 452|chown 92 0|fchown 93 55|lchown 94 0|fchownat 260 54|setxattr 188 5|lsetxattr 189 6|fsetxattr 190 7
removexattr 197 14|lremovexattr 198 15|fremovexattr 199 16|utime 132 0|utimes 235 0|futimesat 261 0|utimensat 280 88"""),
    ("fcntl", 1, "is", 8),
    ("fcntl", 1, "is", 15),
    ("prlimit64", 0, "not", 0),
]
# Where nothing else protects files: none may be opened to write.
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
NO_WRITING = [
    *_calls("""creat 85 0|unlink 87 0|unlinkat 263 35|rename 82 0|renameat 264 38|renameat2 316 276|mkdir 83 0|mkdirat 258 34|rmdir 84 0
link 86 0|linkat 265 37|symlink 88 0|symlinkat 266 36|truncate 76 45|mknod 133 0|mknodat 259 33"""),
    ("open", 1, "any", WRITE_FLAGS),
    ("openat", 2, "any", WRITE_FLAGS),
    ("openat2", errno.ENOSYS),
]


def only_itself(pid):
    """Rules where other processes can be seen: no signals but to this one."""
    return [*OF_OTHERS, ("kill", 0, "not", pid), ("tgkill", 0, "not", pid)]


def refuse(rules):
    """Lets these calls fail from now on. A rule is (name), (name, errno) or (name, argument, "any"|"none"|"is"|"not", value): the argument has
    any or none of these bits, is or is not this number. Needs PR_NO_NEW_PRIVS (`drop_capabilities`)."""
    if MACHINE not in ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no table of system calls for {MACHINE}")
    column, architecture = ARCHITECTURES[MACHINE]
    load, equal, bits, back = 0x20, 0x15, 0x45, 0x06
    fail, kill, allow = (
        lambda why: (back, 0, 0, 0x50000 | why),
        (back, 0, 0, 0x80000000),
        (back, 0, 0, 0x7FFF0000),
    )
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), kill, (load, 0, 0, 0)]
    if column == 0:
        code += [(0x35, 0, 1, 0x40000000), kill]  # the x32 calls have numbers of their own
    for name, *how in rules:
        if not (which := NUMBERS[name][column]):
            continue
        if len(how) < 2:
            code += [(equal, 0, 1, which), fail(*how or [errno.EPERM])]
            continue
        argument, test, value = how
        jump = (
            bits if test in ("any", "none") else equal,
            *((0, 1) if test in ("any", "is") else (1, 0)),
            value,
        )
        code += [
            (equal, 0, 4, which),
            (load, 0, 0, 16 + 8 * argument),
            jump,
            fail(errno.EPERM),
            (load, 0, 0, 0),
        ]
    program = b"".join(struct.pack("HBBI", *line) for line in [*code, allow])
    buffer = ctypes.create_string_buffer(program, len(program))
    prctl(PR_SECCOMP, 2, struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)))
