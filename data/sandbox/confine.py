"""The Linux system calls that confine a process, by ctypes.

They are namespaces, capabilities, resource limits, Landlock and a seccomp filter.
Each function does one thing and raises OSError where the system does not allow it.
`data/sandbox/jail.py` decides which of them are used together, and in what order.
"""

import ctypes
import errno
import glob
import os
import resource
import struct
from collections.abc import Iterable

LIBC = ctypes.CDLL(None, use_errno=True)
MACHINE = os.uname().machine

# mount(2), umount2(2) and mount_setattr(2)
MS_NOSUID = 2
MS_NODEV = 4
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2
MOUNT_ATTR_RDONLY = 1
MOUNT_ATTR_NOSUID = 2
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
# Numbers of system calls that the C library has no function for
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

# The flags of unshare(2) and clone(2)
NEW_MOUNTS = 0x20000
NEW_CGROUP = 0x2000000
NEW_UTS = 0x4000000
NEW_IPC = 0x8000000
NEW_USER = 0x10000000
NEW_PIDS = 0x20000000
NEW_NET = 0x40000000
CLONE_THREAD = 0x10000

# prctl(2)
PR_PDEATHSIG = 1
PR_DUMPABLE = 4
PR_SECCOMP = 22
PR_SUBREAPER = 36
PR_NO_NEW_PRIVS = 38
PR_AMBIENT = 47
AMBIENT_CLEAR_ALL = 4
SECCOMP_MODE_FILTER = 2

CAPABILITY_VERSION_3 = 0x20080522  # capset(2)


def call(function: str, *args: int | bytes | None) -> int:
    """Call a function of the C library and return its result.

    Args:
        function: its name.
        args: integers are passed as long, None as a null pointer.

    Raises:
        OSError: the result is negative.
    """
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in args]
    result = getattr(LIBC, function)(*converted)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return result


def prctl(option: int, value: int = 0, more: int | bytes = 0) -> None:
    """Set an attribute of this process, see prctl(2)."""
    call("prctl", option, value, more, 0, 0)


def mount_memory(path: str, options: str) -> None:
    """Mount an empty file system in memory over a folder."""
    flags = MS_NOSUID | MS_NODEV
    call("mount", b"tmpfs", os.fsencode(path), b"tmpfs", flags, options.encode())


def enter_root(paths: Iterable[str]) -> None:
    """Enter a new root that holds `paths`, read-only, an empty /tmp, and nothing else.

    Call it after unshare(NEW_MOUNTS).
    """
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    # The new root is built over /proc, which exists everywhere and holds none of the paths.
    mount_memory("/proc", "mode=755,size=1m")
    for path in paths:
        inside = "/proc" + path
        is_folder = os.path.isdir(path)
        os.makedirs(inside if is_folder else os.path.dirname(inside), exist_ok=True)
        if not is_folder:
            open(inside, "x").close()
        call("mount", os.fsencode(path), os.fsencode(inside), None, MS_BIND | MS_REC, None)
        # Installed packages are not the standard library, and may bring the tests of a benchmark.
        for packages in glob.glob(f"{inside}/*-packages/") + glob.glob(f"{inside}/*/*-packages/"):
            mount_memory(packages, "mode=755,size=4k")
    os.mkdir("/proc/tmp")
    attributes = struct.pack("4Q", MOUNT_ATTR_RDONLY | MOUNT_ATTR_NOSUID, 0, 0, 0)
    size = len(attributes)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, b"/proc", AT_RECURSIVE, attributes, size)
    os.chdir("/proc")
    call("syscall", PIVOT_ROOT.get(MACHINE, -1), b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


def drop_capabilities() -> None:
    """Give up all capabilities and the means to gain any.

    Afterwards other processes of the same user may not look into this one either.
    """
    prctl(PR_NO_NEW_PRIVS, 1)
    prctl(PR_AMBIENT, AMBIENT_CLEAR_ALL)
    call("capset", struct.pack("Ii", CAPABILITY_VERSION_3, 0), bytes(24))
    prctl(PR_DUMPABLE, 0)


def set_limits(**limits: int) -> None:
    """Set resource limits, such as set_limits(AS=2**29, NOFILE=64).

    A limit is never raised above the hard limit that holds already.
    """
    for name, value in limits.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(kind)[1]
        if hard != resource.RLIM_INFINITY:
            value = min(value, hard)
        resource.setrlimit(kind, (value, value))


# --- Landlock: which files may be touched -------------------------------------------------------

# These three calls have the same numbers on every architecture.
LANDLOCK_CREATE_RULESET = 444
LANDLOCK_ADD_RULE = 445
LANDLOCK_RESTRICT_SELF = 446
CREATE_RULESET_VERSION = 1
RULE_PATH_BENEATH = 1
NEWEST_LANDLOCK = 6  # of which something is used here

EXECUTE = 1
READ = 0b1100  # read a file, list a folder
FILE_RIGHTS = 0b1100000000000111  # execute, write, read, truncate and ioctl: they apply to files
SCOPES = 0b11  # abstract Unix sockets and signals
NETWORK_RIGHTS = 0b11  # bind and connect by TCP


def landlock_version() -> int:
    """The version of Landlock that the kernel offers; 0 where it has none."""
    try:
        return min(
            call("syscall", LANDLOCK_CREATE_RULESET, None, 0, CREATE_RULESET_VERSION),
            NEWEST_LANDLOCK,
        )
    except OSError:
        return 0


def restrict_files(readable: list[str], writable: list[str]) -> None:
    """Close all files to this process but these paths and what is beneath them.

    No file may be executed. Where the kernel can, TCP and signals to processes outside are refused
    too. A process that is restricted after its parent cannot look into the parent, by ptrace or
    by /proc/<pid>/mem.
    """
    version = landlock_version()
    # Newer versions add rights and fields; an older kernel refuses what it does not know.
    rights_count = 13 + (version >= 2) + (version >= 3) + (version >= 5)
    rights = (1 << rights_count) - 1
    field_count = 1 + (version >= 4) + (version >= 6)
    attributes = struct.pack("3Q", rights, NETWORK_RIGHTS, SCOPES)[: 8 * field_count]
    ruleset = call("syscall", LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
    for path in readable + writable:
        allowed = READ if path in readable else rights & ~EXECUTE
        if not os.path.isdir(path):
            allowed &= FILE_RIGHTS
        fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
        rule = struct.pack("=Qi", allowed, fd)
        call("syscall", LANDLOCK_ADD_RULE, ruleset, RULE_PATH_BENEATH, rule, 0)
        os.close(fd)
    call("syscall", LANDLOCK_RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


# --- seccomp: which system calls may be made ----------------------------------------------------

# How the kernel names an architecture to a filter (AUDIT_ARCH in linux/audit.h).
AUDIT_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}

# Classic BPF: the codes of the instructions (linux/bpf_common.h), what a filter may return
# (linux/seccomp.h), and where it finds the fields of a call (struct seccomp_data).
LOAD = 0x20
JUMP_IF_EQUAL = 0x15
JUMP_IF_AT_LEAST = 0x35
JUMP_IF_ANY_BIT = 0x45
RETURN = 0x06
KILL_PROCESS = 0x80000000
FAIL = 0x50000  # to which the errno is added
ALLOW = 0x7FFF0000
NUMBER_OFFSET = 0
ARCHITECTURE_OFFSET = 4
ARGUMENTS_OFFSET = 16
X32_CALLS = 0x40000000  # from this number on, x86_64 has the calls once more, as x32

# A test of an argument: its jump, and how many instructions to skip if it holds and if not. The
# argument has any or none of the bits in a value, or it is or is not equal to the value.
TESTS = {
    "any": (JUMP_IF_ANY_BIT, 0, 1),
    "none": (JUMP_IF_ANY_BIT, 1, 0),
    "is": (JUMP_IF_EQUAL, 0, 1),
    "not": (JUMP_IF_EQUAL, 1, 0),
}


ERRORS = {"": errno.EPERM, "ENOSYS": errno.ENOSYS, "NOTHING": 0}


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    """One instruction; a jump skips `if_true` or `if_false` of the following ones."""
    return struct.pack("HBBI", code, if_true, if_false, value)


def compile_rules(table: str) -> bytes:
    """Compile rules into the part of a filter that refuses their calls.

    Args:
        table: rows of `name x86_64 aarch64`, separated by commas: a system call and its number on
            each architecture, 0 where it does not exist. The call fails with EPERM; with ENOSYS
            where that follows, or does nothing and succeeds where NOTHING does; where `argument
            test value` follows, only if that test holds.

    Returns:
        Instructions that expect the number of the call to be loaded, and leave it so.
    """
    program = b""
    for row in table.split(","):
        _, x86_64, aarch64, *condition = row.split()
        number = int({"x86_64": x86_64, "aarch64": aarch64}.get(MACHINE, 0))
        if not number:
            continue
        if len(condition) < 3:
            program += _instruction(JUMP_IF_EQUAL, number, 0, 1)
            program += _instruction(RETURN, FAIL | ERRORS[" ".join(condition)])
            continue
        argument, test, value = condition
        jump, *skips = TESTS[test]
        program += _instruction(JUMP_IF_EQUAL, number, 0, 4)
        program += _instruction(LOAD, ARGUMENTS_OFFSET + 8 * int(argument))
        program += _instruction(jump, int(value), *skips)
        program += _instruction(RETURN, FAIL | errno.EPERM)
        program += _instruction(LOAD, NUMBER_OFFSET)
    return program


NAMESPACES = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_USER | NEW_PIDS | NEW_NET | NEW_CGROUP
NOT_STREAM = 0b110  # the bits of every type of socket but SOCK_STREAM
F_SETOWN = 8  # fcntl(2): who gets the signals of a file
F_SETOWN_EX = 15
FIOSETOWN = 0x8901  # ioctl(2): the same
SIOCSPGRP = 0x8902

# Refused to every program: the network, other processes, new namespaces, other programs, memory
# that no limit counts, and what has often been a way into the kernel. Sockets are refused even
# where there is no network: a Unix socket is a file, and a door to whatever service listens behind
# it; a pair of datagram sockets could be used to send elsewhere. clone3 hides its flags from a
# filter; the C library falls back on clone where clone3 does not exist.
NEVER = compile_rules(
    f"""socket 41 198, connect 42 203, bind 49 200, listen 50 201, execve 59 221,
    execveat 322 281, ptrace 101 117, process_vm_readv 310 270, process_vm_writev 311 271,
    process_madvise 440 440, kcmp 312 272, move_pages 279 239, migrate_pages 256 238,
    pidfd_getfd 438 438, unshare 272 97, setns 308 268, mount 165 40, umount2 166 39,
    pivot_root 155 41, chroot 161 51, open_tree 428 428, open_tree_attr 467 467,
    move_mount 429 429, fsopen 430 430, fsmount 432 432, mount_setattr 442 442, bpf 321 280,
    perf_event_open 298 241, userfaultfd 323 282, io_uring_setup 425 425,
    io_uring_register 427 427, keyctl 250 219, add_key 248 217, request_key 249 218,
    init_module 175 105, finit_module 313 273, kexec_load 246 104, personality 135 92,
    modify_ldt 154 0, open_by_handle_at 304 265, name_to_handle_at 303 264, fanotify_init 300 262,
    syslog 103 116, acct 163 89, quotactl 179 60, shmget 29 194, msgget 68 186, semget 64 190,
    mq_open 240 180, memfd_create 319 279, memfd_secret 447 447,
    socketpair 53 199 1 any {NOT_STREAM}, clone3 435 435 ENOSYS, clone 56 220 0 any {NAMESPACES}"""
)
# No processes; threads remain possible.
NO_CHILDREN = compile_rules(f"fork 57 0, vfork 58 0, clone 56 220 0 none {CLONE_THREAD}")
# No file may be opened, made, moved or removed, where nothing else protects files.
NO_FILES = compile_rules(
    """open 2 0, openat 257 56, openat2 437 437, creat 85 0, unlink 87 0, unlinkat 263 35,
    rename 82 0, renameat 264 38, renameat2 316 276, mkdir 83 0, mkdirat 258 34, rmdir 84 0,
    link 86 0, linkat 265 37, symlink 88 0, symlinkat 266 36, mknod 133 0, mknodat 259 33"""
)
# No attribute of a file may change, where programs can see files of others. The first versions of
# Landlock let a file be truncated.
NO_ATTRIBUTES = compile_rules(
    """chmod 90 0, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452, chown 92 0, fchown 93 55,
    lchown 94 0, fchownat 260 54, setxattr 188 5, lsetxattr 189 6, fsetxattr 190 7,
    setxattrat 463 463, removexattr 197 14, lremovexattr 198 15, fremovexattr 199 16,
    removexattrat 466 466, file_setattr 469 469, utime 132 0, utimes 235 0, futimesat 261 0,
    utimensat 280 88, truncate 76 45"""
)


# No signals to others, in any form, and none of their limits. Landlock refuses signals too, but
# only in newer kernels; limits and scheduling, which can end a process as well, it does not know.
# All that a program starts stays in its group of processes, so that one signal ends them.
NO_SIGNALS = compile_rules(
    f"""tkill 200 130, rt_sigqueueinfo 129 138, rt_tgsigqueueinfo 297 240,
    pidfd_send_signal 424 424, pidfd_open 434 434, process_mrelease 448 448,
    fcntl 72 25 1 is {F_SETOWN}, fcntl 72 25 1 is {F_SETOWN_EX}, ioctl 16 29 1 is {FIOSETOWN},
    ioctl 16 29 1 is {SIOCSPGRP}, setpriority 141 140, sched_setaffinity 203 122,
    sched_setscheduler 144 119, sched_setparam 142 118, sched_setattr 314 274, ioprio_set 251 30,
    prlimit64 302 261 0 not 0, setsid 112 157 NOTHING, setpgid 109 154 NOTHING"""
)


def only_itself(pid: int) -> bytes:
    """The rules for process `pid`: signals to itself and to nobody else."""
    own = compile_rules(f"kill 62 129 0 not {pid}, tgkill 234 131 0 not {pid}")
    return NO_SIGNALS + own


def refuse(rules: bytes) -> None:
    """Let the calls of these compiled rules fail from now on. Call `drop_capabilities` first.

    Raises:
        OSError: the kernel has no such filter, or the calls of this machine are not known here.
    """
    if MACHINE not in AUDIT_ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no table of system calls for {MACHINE}")
    # Calls of another architecture have other numbers, so they end the process.
    kill = _instruction(RETURN, KILL_PROCESS)
    program = _instruction(LOAD, ARCHITECTURE_OFFSET)
    program += _instruction(JUMP_IF_EQUAL, AUDIT_ARCHITECTURES[MACHINE], 1, 0) + kill
    program += _instruction(LOAD, NUMBER_OFFSET)
    if MACHINE == "x86_64":
        program += _instruction(JUMP_IF_AT_LEAST, X32_CALLS, 0, 1) + kill
    program += rules + _instruction(RETURN, ALLOW)
    buffer = ctypes.create_string_buffer(program, len(program))
    filter_program = struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer))
    prctl(PR_SECCOMP, SECCOMP_MODE_FILTER, filter_program)
