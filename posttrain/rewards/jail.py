"""What a forked child does to lock itself in before it becomes somebody else's program; nothing here returns.

The child `A` takes new namespaces (user, mount, process, network, IPC, host name, control groups) and builds a root of
its own in memory: Python and the system's libraries, read-only, four devices and a folder to write in. Nothing else
exists there, no /proc and no /etc either. `A` then forks `B`, the first process of its process namespace, with which
all others end; `B` gives up its privileges and executes the program. What is trusted is the kernel.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import sys
from dataclasses import dataclass
from pathlib import Path

SCRATCH = "/work"
NOBODY = 65534
MAIN = "main.py"

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
NAMESPACES = CLONE_NEWUSER | CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE, MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
ATTR_RDONLY, ATTR_NOSUID, ATTR_NODEV, AT_FDCWD, AT_RECURSIVE = 1, 2, 4, -100, 0x8000
PR_SET_PDEATHSIG, PR_CAPBSET_DROP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 1, 24, 36, 38
MOUNT_SETATTR = 442
PIVOT_ROOT = {"x86_64": 155, "aarch64": 41}

ROOT = "/proc"
"""Where the new root is built: a folder that every system has, and that holds nothing which is taken along."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
SYSTEM = ("/usr", "/lib", "/lib64", "/bin")

PYTHON = os.path.realpath(sys.executable)
"""Itself, not the link to it in a virtual environment, which the new root does not hold."""

_libc = ctypes.CDLL(None, use_errno=True)


@dataclass(frozen=True)
class Limits:
    """What a program may use: wall-clock (and processor) seconds, MiB of address space for each process, processes."""

    seconds: float
    memory_mb: int
    processes: int
    output_bytes: int
    files_mb: int = 32


@dataclass(frozen=True)
class Ends:
    """File descriptors of a child: standard output, where it says why it failed, and its talk with its parent."""

    output: int
    failure: int
    said: int
    told: int


def enter_namespaces(source: str, stdin: bytes, limits: Limits, ends: Ends, parent: int) -> None:
    """Child `A`. Its parent writes its user map when it has said that it has its namespaces."""
    die_with(parent)
    os.umask(0o022)
    Path("/proc/self/oom_score_adj").write_text("1000")
    _call("unshare", ctypes.c_int(NAMESPACES))
    os.write(ends.said, b"u")
    if os.read(ends.told, 1) != b"m":
        os._exit(1)
    die_with(parent)
    # Else the program could make a user namespace of its own and be root in it.
    Path("/proc/sys/user/max_user_namespaces").write_text("0")
    own = 1 if os.getuid() == 0 and _mapped_ids() > 1 else 0
    _build_root(limits, own)
    _leave_old_root()
    _write_files(Path(SCRATCH), source, stdin)
    first = os.fork()
    if first == 0:
        _become_program(limits, ends, own)
    os.write(ends.said, f"{first:10d}".encode())
    os.close(ends.output)
    os.close(ends.failure)
    status = os.waitpid(first, 0)[1]
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)


def enter_limits(source: str, stdin: bytes, limits: Limits, ends: Ends, parent: int, folder: Path) -> None:
    """The child where there are no namespaces: limits alone, and another user than root."""
    die_with(parent)
    _write_files(folder, source, stdin)
    os.chdir(folder)
    os.setsid()
    if os.getuid() == 0:
        os.setgroups([])
        os.setresgid(NOBODY, NOBODY, NOBODY)
        os.setresuid(NOBODY, NOBODY, NOBODY)
    die_with(parent)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    _limit(limits, 0)
    _execute(ends)


def die_with(parent: int) -> None:
    """Have this process killed when its parent ends. A change of user forgets it."""
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(1)


def adopt_orphans() -> None:
    """Make this process the parent of its descendants' orphans, so that they can be found."""
    _prctl(PR_SET_CHILD_SUBREAPER, 1)


def _become_program(limits: Limits, ends: Ends, own: int) -> None:
    """Child `B`, process 1: no privileges from here on."""
    os.setsid()
    for capability in range(64):
        if _libc.prctl(PR_CAPBSET_DROP, capability, 0, 0, 0) != 0:
            break
    if own:
        os.setgroups([])
        os.setresgid(own, own, own)
        os.setresuid(own, own, own)
    _prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    _prctl(PR_SET_NO_NEW_PRIVS, 1)
    # `A` counts as one of the user's where both are the same user.
    _limit(limits, 0 if own else 1)
    os.chdir(SCRATCH)
    _execute(ends)


def _execute(ends: Ends) -> None:
    stdin = os.open(".stdin", os.O_RDONLY)
    nothing = os.open(os.devnull, os.O_WRONLY)
    for source, target in ((stdin, 0), (ends.output, 1), (nothing, 2)):
        os.dup2(source, target)
    # The failure's end closes itself when the program begins, which is how the parent learns of it.
    os.closerange(3, ends.failure)
    os.closerange(ends.failure + 1, 1 << 16)
    environment = {"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "PYTHONHASHSEED": "0", "HOME": os.getcwd()}
    os.execve(PYTHON, [PYTHON, "-P", "-s", "-S", "-B", MAIN], environment)


def _limit(limits: Limits, others: int) -> None:
    seconds = int(limits.seconds) + 2  # the wall clock comes first: it says what happened
    sizes = {
        resource.RLIMIT_CPU: seconds,
        resource.RLIMIT_AS: limits.memory_mb << 20,
        resource.RLIMIT_FSIZE: limits.files_mb << 20,
        resource.RLIMIT_NOFILE: 64,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_NPROC: limits.processes + others,
    }
    for what, size in sizes.items():
        resource.setrlimit(what, (size, size))


def _write_files(folder: Path, source: str, stdin: bytes) -> None:
    (folder / MAIN).write_text(source, encoding="utf-8", errors="replace")
    (folder / ".stdin").write_bytes(stdin)


def _mapped_ids() -> int:
    return sum(int(line.split()[2]) for line in Path("/proc/self/uid_map").read_text().splitlines())


def _build_root(limits: Limits, own: int) -> None:
    _mount("none", "/", "", MS_REC | MS_PRIVATE)
    sources = _read_only_places()
    links = {place: os.readlink(place) for place in SYSTEM if os.path.islink(place)}
    _mount("tmpfs", ROOT, "tmpfs", MS_NOSUID | MS_NODEV, "size=1m,mode=755")
    for place in sources:
        os.makedirs(ROOT + place, exist_ok=True)
        _mount(place, ROOT + place, "", MS_BIND | MS_REC)
        _set_attributes(ROOT + place, ATTR_NODEV)
    for place, target in links.items():
        os.symlink(target, ROOT + place)
    os.makedirs(ROOT + "/dev", exist_ok=True)
    for device in DEVICES:
        Path(ROOT + device).touch()
        _mount(device, ROOT + device, "", MS_BIND)
    os.mkdir(ROOT + SCRATCH)
    os.symlink(SCRATCH, ROOT + "/tmp")
    _set_attributes(ROOT, ATTR_RDONLY | ATTR_NOSUID)
    options = f"size={limits.files_mb}m,nr_inodes=1000,mode=700,uid={own},gid={own}"
    _mount("tmpfs", ROOT + SCRATCH, "tmpfs", MS_NOSUID | MS_NODEV, options)


def _read_only_places() -> list[str]:
    """What is taken along: the system's libraries, and Python, unless it lies within them."""
    places = [place for place in SYSTEM if os.path.isdir(place) and not os.path.islink(place)]
    python = os.path.realpath(sys.base_prefix)
    return places if any(f"{python}/".startswith(f"{place}/") for place in places) else [*places, python]


def _leave_old_root() -> None:
    os.chdir(ROOT)
    if _libc.syscall(PIVOT_ROOT[platform.machine()], b".", b".") != 0:
        _fail("pivot_root")
    _call("umount2", b".", ctypes.c_int(MNT_DETACH))
    os.chdir("/")


class _Attributes(ctypes.Structure):
    _fields_ = [(name, ctypes.c_uint64) for name in ("set", "clear", "propagation", "user_namespace")]


def _set_attributes(path: str, attributes: int) -> None:
    wanted = _Attributes(attributes, 0, 0, 0)
    size = ctypes.c_size_t(ctypes.sizeof(wanted))
    if _libc.syscall(MOUNT_SETATTR, AT_FDCWD, path.encode(), AT_RECURSIVE, ctypes.byref(wanted), size) != 0:
        _fail("mount_setattr")


def _mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    words = [word.encode() for word in (source, target, kind)]
    _call("mount", *words, ctypes.c_ulong(flags), options.encode(), about=target)


def _prctl(option: int, value: int) -> None:
    _call("prctl", *(ctypes.c_ulong(number) for number in (option, value, 0, 0, 0)))


def _call(name: str, *arguments: object, about: str = "") -> None:
    if getattr(_libc, name)(*arguments) != 0:
        _fail(f"{name} {about}".strip())


def _fail(what: str) -> None:
    code = ctypes.get_errno()
    raise OSError(code, f"{what}: {os.strerror(code)}")
