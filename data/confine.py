"""What the kernel offers to hold a process in: namespaces, Landlock, a filter of system calls, limits, another user. Linux, ctypes only.

Each function does one thing and raises OSError where the system does not allow it; `data/jail.py` decides what is used together.
"""

import ctypes
import errno
import os
import platform
import resource
import struct

LIBC = ctypes.CDLL(None, use_errno=True)
AT_RECURSIVE, MOUNT_READ_ONLY, MOUNT_NO_SUID = 0x8000, 1, 2
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
NEW_MOUNTS, NEW_UTS, NEW_IPC, NEW_USER, NEW_PIDS, NEW_NET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
PR_PDEATHSIG, PR_DUMPABLE, PR_SECCOMP, PR_SUBREAPER, PR_NO_NEW_PRIVS, PR_AMBIENT = 1, 4, 22, 36, 38, 47


def call(function, *args):
    """A C function whose negative result is an error. Integers are passed as long, None as a null pointer."""
    done = getattr(LIBC, function)(*(ctypes.c_long(a) if isinstance(a, int) else a for a in args))
    if done < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")
    return done


def prctl(option, value=0):
    call("prctl", option, value, 0, 0, 0)


def unshare(flags):
    call("unshare", flags)


def mount(source, target, kind, flags, options=""):
    call("mount", *(x and x.encode() for x in (source, target, kind)), flags, options.encode() or None)


def map_own_user(uid, gid):
    """After unshare(NEW_USER): the same user and group inside; no others exist there."""
    for name, text in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
        with open(f"/proc/self/{name}", "w") as f:
            f.write(text)


def enter_root(paths):
    """A new root that holds `paths`, read-only, and an empty /tmp, and nothing else. After unshare(NEW_MOUNTS)."""
    mount(None, "/", None, MS_REC | MS_PRIVATE)
    mount("tmpfs", "/proc", "tmpfs", MS_NOSUID | MS_NODEV, "mode=755,size=1m")  # over /proc: it exists, and holds none of the paths
    for path in paths:
        inside = "/proc" + path
        if os.path.isdir(path):
            os.makedirs(inside, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(inside), exist_ok=True)
            open(inside, "x").close()
        mount(path, inside, None, MS_BIND | MS_REC)
    os.mkdir("/proc/tmp")
    attributes = struct.pack("4Q", MOUNT_READ_ONLY | MOUNT_NO_SUID, 0, 0, 0)
    call("syscall", _number("mount_setattr"), -100, b"/proc", AT_RECURSIVE, attributes, len(attributes))
    os.chdir("/proc")
    call("syscall", _number("pivot_root"), b".", b".")
    call("umount2", b".", MNT_DETACH)
    os.chdir("/")


# --- users and limits ------------------------------------------------------------------------------------------------


def become(uid):
    """Another user, for good."""
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)


def drop_capabilities():
    """None are left and none can be gained; other processes of the user may not look into this one."""
    prctl(PR_NO_NEW_PRIVS, 1)
    call("prctl", PR_AMBIENT, 4, 0, 0, 0)
    call("capset", struct.pack("Ii", 0x20080522, 0), bytes(24))
    prctl(PR_DUMPABLE, 0)


def limit(**limits):
    """limit(AS=2**29, NOFILE=64): soft and hard, or a pair of both; never above what holds already."""
    for name, value in limits.items():
        which = getattr(resource, f"RLIMIT_{name}")
        most = resource.getrlimit(which)[1]
        soft, hard = (v if most == resource.RLIM_INFINITY else min(v, most) for v in (value if isinstance(value, tuple) else (value, value)))
        resource.setrlimit(which, (soft, hard))


# --- Landlock: which files may be touched ----------------------------------------------------------------------------

ON_FILES, EXECUTE, READ = 0b1100000000000111, 1, 0b1100  # rights that apply to a single file; read a file, list a folder
LANDLOCK_CREATE, LANDLOCK_ADD, LANDLOCK_RESTRICT = 444, 445, 446  # the same numbers on every architecture


def landlock_version():
    """0: the kernel has none."""
    try:
        return call("syscall", LANDLOCK_CREATE, None, 0, 1)
    except OSError:
        return 0


def file_rules(readable, writable):
    """A ruleset (a file descriptor) for `restrict_files`: these paths, and what is beneath them."""
    version = landlock_version()
    rights = (1 << (13 if version < 2 else 14 if version < 3 else 15 if version < 5 else 16)) - 1
    attributes = struct.pack("3Q", rights, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = call("syscall", LANDLOCK_CREATE, attributes, len(attributes), 0)
    for paths, allowed in ((readable, READ), (writable, rights & ~EXECUTE)):
        for path in paths:
            fd = os.open(path, os.O_PATH | os.O_CLOEXEC)
            here = allowed if os.path.isdir(path) else allowed & (ON_FILES | 0b10 | 0b100) & rights
            call("syscall", LANDLOCK_ADD, ruleset, 1, struct.pack("=Qi", here, fd), 0)
            os.close(fd)
    return ruleset


def restrict_files(ruleset):
    """From now on only its files, and none may be executed. Also no TCP and no signals to processes outside, where the kernel knows how.

    A process restricted after its parent cannot look into the parent (no ptrace, no /proc/<pid>/mem)."""
    call("syscall", LANDLOCK_RESTRICT, ruleset, 0)


# --- seccomp: which system calls may be made -------------------------------------------------------------------------

# name: number on x86_64, on aarch64 (0: there is none)
NUMBERS = {line.split()[0]: tuple(map(int, line.split()[1:])) for line in """
mount_setattr 442 442|pivot_root 155 41|clone 56 220|clone3 435 435|fork 57 0|vfork 58 0|execve 59 221|execveat 322 281|prlimit64 302 261
socket 41 198|socketpair 53 199|connect 42 203|bind 49 200|listen 50 201|kill 62 129|tkill 200 130|tgkill 234 131|fcntl 72 25
rt_sigqueueinfo 129 138|rt_tgsigqueueinfo 297 240|pidfd_send_signal 424 424|pidfd_open 434 434|pidfd_getfd 438 438|setpriority 141 140
sched_setaffinity 203 122|sched_setscheduler 144 119|sched_setparam 142 118|sched_setattr 314 274|ioprio_set 251 30|ptrace 101 117
process_vm_readv 310 270|process_vm_writev 311 271|process_madvise 440 440|kcmp 312 272|move_pages 279 239|migrate_pages 256 238
unshare 272 97|setns 308 268|mount 165 40|umount2 166 39|chroot 161 51|open_tree 428 428|move_mount 429 429|fsopen 430 430|fsmount 432 432
bpf 321 280|perf_event_open 298 241|userfaultfd 323 282|io_uring_setup 425 425|io_uring_register 427 427|keyctl 250 219|add_key 248 217
request_key 249 218|init_module 175 105|finit_module 313 273|kexec_load 246 104|personality 135 92|modify_ldt 154 0|open_by_handle_at 304 265
name_to_handle_at 303 264|fanotify_init 300 262|syslog 103 116|acct 163 89|quotactl 179 60|shmget 29 194|msgget 68 186|semget 64 190
mq_open 240 180|memfd_create 319 279|memfd_secret 447 447|chmod 90 0|fchmod 91 52|fchmodat 268 53|fchmodat2 452 452|chown 92 0|fchown 93 55
lchown 94 0|fchownat 260 54|setxattr 188 5|lsetxattr 189 6|fsetxattr 190 7|removexattr 197 14|lremovexattr 198 15|fremovexattr 199 16
utime 132 0|utimes 235 0|futimesat 261 0|utimensat 280 88|open 2 0|openat 257 56|openat2 437 437|creat 85 0|unlink 87 0|unlinkat 263 35
rename 82 0|renameat 264 38|renameat2 316 276|mkdir 83 0|mkdirat 258 34|rmdir 84 0|link 86 0|linkat 265 37|symlink 88 0|symlinkat 266 36
truncate 76 45|mknod 133 0|mknodat 259 33
""".replace("|", "\n").strip().splitlines()}  # fmt: skip
ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}

# Never: the network, other processes, new namespaces, programs, memory that no limit counts, and what has often been a way into the kernel.
# Sockets go even where there is no network: a Unix socket is a file, and a door to whatever service listens behind it.
NEVER = """socket connect bind listen execve execveat ptrace process_vm_readv process_vm_writev process_madvise kcmp move_pages migrate_pages
pidfd_getfd unshare setns mount umount2 pivot_root chroot open_tree move_mount fsopen fsmount mount_setattr bpf perf_event_open userfaultfd
io_uring_setup io_uring_register keyctl add_key request_key init_module finit_module kexec_load personality modify_ldt open_by_handle_at
name_to_handle_at fanotify_init syslog acct quotactl shmget msgget semget mq_open memfd_create memfd_secret""".split()
OF_OTHERS = """tkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_send_signal pidfd_open setpriority sched_setaffinity sched_setscheduler
sched_setparam sched_setattr ioprio_set chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat setxattr lsetxattr fsetxattr removexattr
lremovexattr fremovexattr utime utimes futimesat utimensat""".split()
WRITES = "creat unlink unlinkat rename renameat renameat2 mkdir mkdirat rmdir link linkat symlink symlinkat truncate mknod mknodat".split()
WRITE_FLAGS = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND


def _number(name):
    return NUMBERS[name][ARCHITECTURES.get(platform.machine(), (0,))[0]]


def never():
    """Rules for `call_filter`: what generated code has no use for."""
    new = NEW_MOUNTS | NEW_UTS | NEW_IPC | NEW_USER | NEW_PIDS | NEW_NET | 0x2000000
    # datagram pairs could be sent elsewhere; clone3 hides its flags from a filter, and the C library knows the way round its absence
    return [(n,) for n in NEVER] + [("clone", 0, "any", new), ("socketpair", 1, "any", 6), ("clone3", errno.ENOSYS)]


def no_children():
    """Threads, but no processes."""
    return [("fork",), ("vfork",), ("clone", 0, "none", 0x10000)]


def only_itself(pid):
    """Where other processes can be seen: no signals to them and no changes to their limits; nor to the attributes of files."""
    signals = [(n, 0, "not", pid) for n in ("kill", "tgkill")] + [("fcntl", 1, "is", 8), ("fcntl", 1, "is", 15)]  # F_SETOWN, F_SETOWN_EX
    return [(n,) for n in OF_OTHERS] + signals + [("prlimit64", 0, "not", 0)]


def no_writing():
    """Where nothing else protects files: none may be opened to write."""
    return [(n,) for n in WRITES] + [("open", 1, "any", WRITE_FLAGS), ("openat", 2, "any", WRITE_FLAGS), ("openat2", errno.ENOSYS)]


def call_filter(rules):
    """A program for `filter_calls` that lets these calls fail. A rule is (name), (name, errno) or (name, argument, "any"|"none"|"is"|"not",
    value): the argument has any or none of these bits, is or is not this number. Raises OSError on an unknown architecture."""
    if platform.machine() not in ARCHITECTURES or struct.calcsize("P") != 8:
        raise OSError(errno.ENOSYS, f"no table of system calls for {platform.machine()}")
    column, architecture = ARCHITECTURES[platform.machine()]
    load, equal, bits, back = 0x20, 0x15, 0x45, 0x06
    refuse, kill, allow = lambda number: (back, 0, 0, 0x50000 | number), (back, 0, 0, 0x80000000), (back, 0, 0, 0x7FFF0000)
    code = [(load, 0, 0, 4), (equal, 1, 0, architecture), kill, (load, 0, 0, 0)]
    if column == 0:
        code += [(0x35, 0, 1, 0x40000000), kill]  # the x32 calls have numbers of their own
    for name, *how in rules:
        if not (number := NUMBERS[name][column]):
            continue
        if len(how) < 2:
            code += [(equal, 0, 1, number), refuse(*how or [errno.EPERM])]
            continue
        argument, test, value = how
        jump = (bits if test in ("any", "none") else equal, *((0, 1) if test in ("any", "is") else (1, 0)), value)
        code += [(equal, 0, 4, number), (load, 0, 0, 16 + 8 * argument), jump, refuse(errno.EPERM), (load, 0, 0, 0)]
    return b"".join(struct.pack("HBBI", *line) for line in [*code, allow])


def filter_calls(program):
    """From now on. Needs PR_NO_NEW_PRIVS (`drop_capabilities`)."""
    buffer = ctypes.create_string_buffer(program, len(program))
    call("prctl", PR_SECCOMP, 2, struct.pack("HxxxxxxQ", len(program) // 8, ctypes.addressof(buffer)), 0, 0)
