"""What runs inside the two sandboxed processes of `execution.py`. Standard library only: it is started from its text.

The *candidate* process holds the graded program and answers calls of its functions; the *tester* process holds the
tests and reports the verdict. Each first locks itself in (`lock_in`), then plays its part (`serve_candidate`,
`run_tests`).

They talk in lines of JSON, `[number, kind, value]`, over two pipes. What crosses is plain data: None, bool, int, float,
complex, str, bytes and their lists, tuples, sets and dicts, rebuilt on the other side as exactly these types (`pack`,
`unpack`). Every request carries a fresh random number that the answer must repeat, so an answer written in advance is
none.
"""

import ctypes
import json
import os
import resource
import struct
import sys
import types
from collections.abc import Callable

MAX_LINE = 1 << 20  # bytes of one message
MAX_DETAIL = 400  # characters of an explanation

# --- plain data across the border -----------------------------------------------------------------


def pack(value: object) -> object:
    """`value` as JSON data; subclasses of the plain types become what they extend. Raises TypeError for anything else.

    The base types' own methods are used, so that what a subclass overrides plays no part.
    """
    if value is None or value is True or value is False:
        return value
    for kind in (int, float):
        if isinstance(value, kind):
            return kind.__pos__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, list):
        return [pack(item) for item in list.__iter__(value)]
    for kind in (tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [pack(item) for item in kind.__iter__(value)]}
    if isinstance(value, dict):
        return {"dict": [[pack(key), pack(item)] for key, item in dict.items(value)]}
    if isinstance(value, bytes):
        return {"bytes": list(bytes.__iter__(value))}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise TypeError(f"a value of type {type(value).__name__} is not plain data")


_REBUILD = {
    "tuple": tuple,
    "set": set,
    "frozenset": frozenset,
    "dict": dict,
    "bytes": bytes,
    "complex": lambda parts: complex(*parts),
}


def unpack(line: str | bytes) -> object:
    """The value whose packed form `line` is the JSON of. Raises ValueError, TypeError, KeyError or RecursionError."""

    def rebuild(tagged: dict) -> object:
        ((kind, content),) = tagged.items()
        return _REBUILD[kind](content)

    return json.loads(line, object_hook=rebuild)


class ChannelClosed(Exception):
    """The process at the other end is gone."""


class BadMessage(Exception):
    """What came is not a message of this protocol."""


class Channel:
    """Lines of JSON over a pair of pipe ends."""

    def __init__(self, read_fd: int, write_fd: int) -> None:
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.pending = b""

    def send(self, number: int, kind: str, value: object) -> None:
        """Raises TypeError, ValueError or RecursionError if `value` cannot cross, `ChannelClosed` if nobody listens."""
        line = json.dumps([number, kind, pack(value)]).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise ValueError(f"a value of {len(line)} bytes is too large to pass on")
        try:
            while line:
                line = line[os.write(self.write_fd, line) :]
        except OSError:
            raise ChannelClosed from None

    def receive(self) -> tuple[int, str, object]:
        """The next (number, kind, value). Raises `ChannelClosed` or `BadMessage`."""
        while b"\n" not in self.pending:
            chunk = os.read(self.read_fd, 1 << 16)
            if not chunk:
                raise ChannelClosed
            self.pending += chunk
            if len(self.pending) > MAX_LINE:
                raise BadMessage("too long a message")
        line, _, self.pending = self.pending.partition(b"\n")
        try:
            number, kind, value = unpack(line)
        except (ValueError, TypeError, KeyError, RecursionError, MemoryError, OverflowError) as error:
            raise BadMessage(f"no message of this protocol ({type(error).__name__})") from None
        return number, kind, value


def describe(error: BaseException) -> tuple[str, str]:
    """(name, message) of an exception, whatever its class does when asked."""
    try:
        return str(type(error).__name__)[:MAX_DETAIL], str(error)[:MAX_DETAIL]
    except BaseException:  # a `__str__` of the graded program: anything may come out of it
        return "Exception", "without a readable message"


# --- the candidate: holds the graded program --------------------------------------------------------


def serve_candidate(channel: Channel, program: str) -> None:
    """Answer "hello", "load" (run `program`) and "call" ([name, args, kwargs]) until the tester is gone."""
    module = types.ModuleType("candidate")
    while True:
        try:
            number, kind, value = channel.receive()
        except ChannelClosed:
            return
        try:
            result = None
            if kind == "load":
                sys.modules["candidate"] = module  # as dataclasses and pickle expect of a module
                exec(compile(program, "candidate.py", "exec"), module.__dict__)
            elif kind == "call":
                name, args, kwargs = value
                result = module.__dict__[name](*args, **kwargs) if name in module.__dict__ else _missing(name)
            flush_output()
            channel.send(number, "returned", result)
        except ChannelClosed:
            return
        except BaseException as error:  # SystemExit and KeyboardInterrupt of the program among them
            flush_output()
            channel.send(number, "raised", [*describe(error), isinstance(error, Exception)])


def _missing(name: str) -> None:
    raise NameError(f"the program defines no {name}")


def flush_output() -> None:
    """Let what the program printed out, if it left us a `sys.stdout` that can."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BaseException:  # the program may have put anything in its place
            continue


# --- the tester: holds the tests --------------------------------------------------------------------


class CandidateError(Exception):
    """Raised in the tests for an exception of the graded program whose type is not a built-in one."""


class Candidate:
    """Stands for the graded function in the tests: each call is made in the other process."""

    def __init__(self, channel: Channel, name: str, report: Callable[[str, str], None]) -> None:
        self.channel = channel
        self.name = name
        self.report = report
        self.num_calls = 0
        self.last_error: BaseException | None = None

    def __call__(self, *args: object, **kwargs: object) -> object:
        """What the graded function returned; raises what it raised. A call that got no answer ends the tests."""
        self.num_calls += 1
        return self.ask("call", [self.name, args, kwargs])

    def ask(self, kind: str, value: object = None) -> object:
        number = int.from_bytes(os.urandom(8), "big")
        try:
            self.channel.send(number, kind, value)
            answered, outcome, result = self.channel.receive()
        except ChannelClosed:
            self.give_up("ended", f"the program's process ended during {self.where(kind)}")
        except BadMessage as error:
            self.give_up("error", f"{error} instead of the result of {self.where(kind)}")
        if answered != number or self.channel.pending or outcome not in ("returned", "raised"):
            self.give_up("error", f"an answer that nobody asked for during {self.where(kind)}")
        if outcome == "raised":
            self.reraise(result, kind)
        return result

    def reraise(self, raised: object, kind: str) -> None:
        try:
            name, message, is_exception = raised
            name, message = str(name), str(message)
        except (TypeError, ValueError):
            self.give_up("error", f"an answer out of form during {self.where(kind)}")
        if is_exception is not True:
            self.give_up("crashed", f"{name}: {message} in {self.where(kind)}")
        known = getattr(sys.modules["builtins"], name, None)
        if not (isinstance(known, type) and issubclass(known, Exception)):
            known, message = CandidateError, f"{name}: {message}"
        try:
            self.last_error = known(message)
        except TypeError:  # UnicodeDecodeError and its like want more arguments
            self.last_error = CandidateError(f"{name}: {message}")
        raise self.last_error

    def where(self, kind: str) -> str:
        return f"call {self.num_calls}" if kind == "call" else "loading" if kind == "load" else "the start"

    def give_up(self, status: str, detail: str) -> None:
        """Report and end this process at once: an exception could be caught by the tests."""
        self.report(status, detail)
        os._exit(0)


def run_tests(channel: Channel, tests: str, entry_point: str, report: Callable[[str, str], None]) -> None:
    """Run `tests`, then their `check` if they define one, against the candidate.

    `report(status, detail)` is told "started", then a status of `execution.Verdict`, or "ended" when the candidate's
    process is gone. It is told "passed" only after the tests ran to their end with at least one call of the candidate.
    """
    candidate = Candidate(channel, entry_point, report)
    try:
        candidate.ask("hello")
        report("started", "")
        candidate.ask("load")
        namespace = {"__name__": "tests", entry_point: candidate}
        exec(compile(tests, "tests.py", "exec"), namespace)
        if "random" in sys.modules:
            sys.modules["random"].seed(0)  # the same program gets the same verdict every time
        if callable(namespace.get("check")):
            namespace["check"](candidate)
        if not candidate.num_calls:
            candidate.give_up("error", "the tests never called the function")
        report("passed", f"{candidate.num_calls} calls")
    except BaseException as error:  # the tests may raise anything, and the verdict must go out
        report(classify(error, candidate), explain(error, tests))


def classify(error: BaseException, candidate: Candidate) -> str:
    """The status that an exception which ended the tests stands for."""
    if error is candidate.last_error:
        return "memory" if isinstance(error, MemoryError) else "error"
    if not isinstance(error, Exception) or isinstance(error, (NameError, ImportError, SyntaxError, MemoryError)):
        return "error"
    return "wrong"  # an assertion, or a result that the tests cannot work with (None + 1)


def explain(error: BaseException, tests: str) -> str:
    """`error` in one line, with the line of the tests it came from."""
    number, trace = 0, error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code.co_filename == "tests.py":
            number = trace.tb_lineno
        trace = trace.tb_next
    lines = tests.splitlines()
    source = f" at {lines[number - 1].strip()!r}" if 0 < number <= len(lines) else ""
    return ": ".join(part for part in describe(error) if part)[:MAX_DETAIL] + source[:MAX_DETAIL]


# --- locking in -------------------------------------------------------------------------------------

_PR_SET_PDEATHSIG, _PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, _SIGKILL = 1, 38, 22, 2, 9
_CLONE_NEW = 0x20000 | 0x2000000 | 0x4000000 | 0x8000000 | 0x20000000 | 0x40000000  # mount, cgroup, uts, ipc, pid, net
_CLONE_NEWUSER, _CLONE_THREAD = 0x10000000, 0x10000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 2, 4, 4096, 16384, 1 << 18, 2
_AT_RECURSIVE, _MOUNT_ATTR_READ_ONLY = 0x8000, 1 | 2 | 4  # read-only, no set-uid, no devices

_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column below, AUDIT_ARCH of linux/audit.h
_DENIED = {  # system calls that graded code has no use for: their numbers on x86_64 and aarch64 (None: not there)
    # other processes
    "fork": (57, None), "vfork": (58, None), "execve": (59, 221), "execveat": (322, 281), "kill": (62, 129),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240),
    "pidfd_send_signal": (424, 424), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438), "ptrace": (101, 117),
    "process_vm_readv": (310, 270), "process_vm_writev": (311, 271), "kcmp": (312, 272),
    # the network
    "socket": (41, 198),
    # namespaces and mounts
    "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41),
    "chroot": (161, 51), "open_tree": (428, 428), "move_mount": (429, 429), "fsopen": (430, 430),
    "fsconfig": (431, 431), "fsmount": (432, 432), "fspick": (433, 433), "mount_setattr": (442, 442),
    # memory outside the limit
    "memfd_create": (319, 279), "memfd_secret": (447, 447), "shmget": (29, 194), "shmat": (30, 196),
    "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    # parts of the kernel with a history
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219), "bpf": (321, 280),
    "perf_event_open": (298, 241), "userfaultfd": (323, 282), "io_uring_setup": (425, 425),
    "io_uring_enter": (426, 426), "io_uring_register": (427, 427), "personality": (135, 92),
}  # fmt: skip
_CLONE, _CLONE3, _TGKILL = (56, 220), (435, 435), (234, 131)


def system_call_filter(machine: str, pid: int) -> bytes:
    """A seccomp program for `machine` ("x86_64", "aarch64"): `_DENIED` fail with EPERM, as do new processes.

    Threads are allowed, signals only to threads of `pid`, the process itself. Raises KeyError for another machine.
    See seccomp(2) and linux/filter.h.
    """
    column, architecture = _ARCHITECTURES[machine]
    load, jump_equal, jump_from, jump_bits, leave = 0x20, 0x15, 0x35, 0x45, 0x06
    allow, kill, not_permitted, not_there = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026
    number_at, architecture_at, first_argument_at = 0, 4, 16
    steps = [(load, 0, 0, architecture_at), (jump_equal, 1, 0, architecture), (leave, 0, 0, kill)]
    steps += [(load, 0, 0, number_at), (jump_from, 0, 1, 0x40000000), (leave, 0, 0, not_permitted)]  # the x32 twins
    for numbers in _DENIED.values():
        if numbers[column] is not None:
            steps += [(jump_equal, 0, 1, numbers[column]), (leave, 0, 0, not_permitted)]
    # clone3 hides its flags in memory: the C library falls back to clone when it is "not there"
    steps += [(jump_equal, 0, 1, _CLONE3[column]), (leave, 0, 0, not_there)]
    steps += [(jump_equal, 0, 4, _CLONE[column]), (load, 0, 0, first_argument_at)]
    steps += [(jump_bits, 0, 1, _CLONE_THREAD), (leave, 0, 0, allow), (leave, 0, 0, not_permitted)]
    steps += [(jump_equal, 0, 4, _TGKILL[column]), (load, 0, 0, first_argument_at)]
    steps += [(jump_equal, 0, 1, pid), (leave, 0, 0, allow), (leave, 0, 0, not_permitted)]
    steps.append((leave, 0, 0, allow))
    return b"".join(struct.pack("=HBBI", *step) for step in steps)


class Kernel:
    """The few system calls that Python 3.11 has no function for. Each raises OSError when the kernel refuses."""

    def __init__(self) -> None:
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.is_arm = os.uname().machine == "aarch64"

    def call(self, name: str, *arguments: int | bytes | None) -> None:
        converted = [ctypes.c_ulong(item) if isinstance(item, int) else ctypes.c_char_p(item) for item in arguments]
        if getattr(self.libc, name)(*converted) == -1:
            error = ctypes.get_errno()
            raise OSError(error, f"{name}: {os.strerror(error)}")

    def die_with_parent(self) -> None:
        self.call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)

    def filter_system_calls(self) -> None:
        program = system_call_filter(os.uname().machine, os.getpid())
        buffer = ctypes.create_string_buffer(program, len(program))
        header = struct.pack("@HP", len(program) // 8, ctypes.addressof(buffer))
        self.call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        self.call("prctl", _PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, header, 0, 0)

    def drop_capabilities(self) -> None:
        version_3 = struct.pack("=Ii", 0x20080522, 0)
        self.call("capset", version_3, bytes(24))

    def pivot_root(self, new: bytes, old: bytes) -> None:
        self.call("syscall", 41 if self.is_arm else 155, new, old)

    def make_read_only(self, path: bytes) -> None:
        """`path` and every mount below it."""
        attributes = struct.pack("=QQQQ", _MOUNT_ATTR_READ_ONLY, 0, 0, 0)
        self.call("syscall", 442, (1 << 64) - 100, path, _AT_RECURSIVE, attributes, len(attributes))  # AT_FDCWD


def enter_namespaces(kernel: Kernel, visible: list[str], hidden: list[str], scratch_bytes: int) -> None:
    """Move into namespaces of our own that hold nothing but `visible` (read-only) and a scratch folder.

    Returns in a child process. `visible` are files, folders and symbolic links, parents first; of these, the folders
    `hidden` are made empty.
    """
    as_root, user, group = os.geteuid() == 0, os.geteuid(), os.getegid()
    kernel.call("unshare", _CLONE_NEW | (0 if as_root else _CLONE_NEWUSER))
    if not as_root:
        for name, text in [("setgroups", "deny"), ("uid_map", f"65534 {user} 1"), ("gid_map", f"65534 {group} 1")]:
            with open(f"/proc/self/{name}", "w") as file:
                file.write(text)
    continue_in_child()
    kernel.die_with_parent()
    kernel.call("mount", b"none", b"/", None, _MS_REC | _MS_PRIVATE, None)
    kernel.call("mount", b"tmpfs", b"/tmp", b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=1m,mode=755")
    os.mkdir("/tmp/old")
    kernel.pivot_root(b"/tmp", b"/tmp/old")
    os.chdir("/")
    for path in visible:
        show(kernel, path)
    for path in hidden:
        kernel.call("mount", b"tmpfs", path.encode(), b"tmpfs", _MS_NOSUID | _MS_NODEV, b"size=4k,mode=755")
    os.mkdir("/scratch")
    kernel.call("umount2", b"/old", _MNT_DETACH)
    os.rmdir("/old")
    kernel.make_read_only(b"/")
    options = f"size={scratch_bytes},nr_inodes=1024,mode=1777"
    kernel.call("mount", b"tmpfs", b"/scratch", b"tmpfs", _MS_NOSUID | _MS_NODEV, options.encode())
    os.chdir("/scratch")


def continue_in_child() -> None:
    """Return in a child process; the calling process only waits for its end, and ends alike."""
    child = os.fork()
    if not child:
        return
    os.closerange(3, 1 << 16)  # the pipes are the child's: they must end with it
    status = os.waitpid(child, 0)[1]
    os._exit(128 + os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status))


def show(kernel: Kernel, path: str) -> None:
    """Let `path` of the old root, mounted at /old, appear at its place in the new one."""
    if os.path.lexists(path):
        return  # below a folder that is visible already
    old = "/old" + path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    if os.path.islink(old):
        os.symlink(os.readlink(old), path)
        return
    if os.path.isdir(old):
        os.mkdir(path)
    else:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY))
    kernel.call("mount", old.encode(), path.encode(), None, _MS_BIND | _MS_REC, None)


def limit_resources(limits: dict[str, int]) -> None:
    """Set each limit of `limits` ("AS": bytes, ...), soft and hard. Raises OSError or ValueError when it cannot be."""
    for name, value in limits.items():
        number = getattr(resource, f"RLIMIT_{name}")
        hard = resource.getrlimit(number)[1]
        ceiling = value + 1 if name == "CPU" else value  # SIGXCPU first, SIGKILL a second later
        ceiling = ceiling if hard == resource.RLIM_INFINITY else min(ceiling, hard)
        resource.setrlimit(number, (min(value, ceiling), ceiling))


def lock_in(setup: dict) -> None:
    """Give up everything `setup` says, for good. Raises OSError, ValueError or KeyError when a part does not work."""
    if not sys.platform.startswith("linux"):
        limit_resources({name: value for name, value in setup["limits"].items() if name != "AS"})  # macOS refuses it
        return
    kernel = Kernel()
    kernel.die_with_parent()
    os.umask(0o022)
    if setup["method"] == "unshare":
        enter_namespaces(kernel, setup["visible"], setup["hidden"], setup["scratch_bytes"])
    elif setup["user"] is not None:
        # process 1 remains root's: bubblewrap, without the right to signal other users, could not take us along
        continue_in_child()
    limit_resources(setup["limits"])
    if setup["user"] is not None:
        os.setgroups([])
        os.setresgid(setup["user"], setup["user"], setup["user"])
        os.setresuid(setup["user"], setup["user"], setup["user"])
        kernel.die_with_parent()  # the change of user cleared it
    try:
        kernel.drop_capabilities()
        kernel.filter_system_calls()
    except (OSError, KeyError):
        if setup["method"] != "none":  # there, what works is taken along, and the user has agreed to the rest
            raise


def main() -> None:
    """Read the set-up from standard input, lock in, and play the part it names."""
    setup = json.loads(sys.stdin.buffer.read())
    os.close(0)
    os.close(os.pipe()[1])  # the lowest free number is 0: standard input is an empty pipe now
    lock_in(setup)
    channel = Channel(*setup["descriptors"][:2])
    if setup["part"] == "candidate":
        serve_candidate(channel, setup["program"])
        os._exit(0)

    def report(status: str, detail: str) -> None:
        os.write(setup["descriptors"][2], json.dumps([status, detail]).encode() + b"\n")

    run_tests(channel, setup["tests"], setup["entry_point"], report)
    os._exit(0)


if __name__ == "__main__":
    main()
