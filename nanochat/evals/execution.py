"""Runs Python that a model wrote, in processes that can do no harm, and grades it by tests that it cannot see.

Each problem gets two processes, in which `execution_child.py` runs: the *candidate* holds the program, the *tester* the
tests. The tester calls the candidate's function over a pair of pipes that carry only plain data, and sends the verdict
to this process over a pipe that the candidate does not have. So an exit code, a printed verdict, a patched builtin or
an object that equals everything cannot make a program pass.

Each process has: its own namespaces (processes, mounts, network, IPC, host name), through bubblewrap or else through
unshare(2); a read-only root with Python and the system's libraries, a scratch folder in memory, no /proc, no /dev, no
environment; another user when started by root; no capabilities; limits on time, CPU, memory, files and output; a
filter of system calls (seccomp) that denies new processes, execution, sockets, signals to others, shared or anonymous
memory files, mounts, tracing and keys. Where the system allows no namespaces, only the limits and the filter remain,
and nothing runs unless `allow_unsafe` (`--allow-unsafe-execution`) is set.

Not covered: errors in the kernel and side channels (there is no virtual machine); total memory (the limit is per
process, `num_workers` times two of them run, and scratch folders come on top); the load of one busy core per problem;
reading the system's libraries and Python's standard library; memorised answers, and arguments changed in place (the
tests keep their own copy). Without isolation also: files that this user can read or write, and on systems other than
Linux the network, other processes and children that outlive their parent.
"""

import functools
import itertools
import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from ast import FunctionDef, parse, unparse
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from nanochat.common import UserError

TIMEOUT_SECONDS = 5.0  # from the moment both processes are locked in to the verdict
STARTUP_SECONDS = 30.0  # allowed before that moment: a loaded machine is slow to start processes
OUTPUT_BYTES = 64 << 10  # of the program's standard output and error together
SCRATCH_BYTES = 16 << 20
KILL_SECONDS = 5.0  # for killed processes to be gone
EXIT_SECONDS = 1.0  # from the end of a process's pipes to its exit status
MAX_SOURCE = 1 << 20  # characters of a program or its tests
# of each process, beside its CPU time; "AS" is its address space
LIMITS = {"AS": 512 << 20, "FSIZE": 8 << 20, "NOFILE": 64, "NPROC": 64, "CORE": 0}

_USERS = itertools.cycle(range(64000, 64500))  # used by root: ids without an account, one each, so limits do not add up
# a virtual environment's interpreter is a link to the real one; graded code must not see the packages beside the link
_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
_METHODS = ("bubblewrap", "unshare")
_SYSTEM_LIBRARIES = ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store")


@dataclass(frozen=True)
class Isolation:
    """What a sandbox is built with: `method` is "bubblewrap", "unshare" or "none"; `reason` says why."""

    method: str
    reason: str


@dataclass(frozen=True)
class Verdict:
    """Whether the tests ran to their end without a failure, and what happened otherwise.

    status: "passed"; "wrong" (a test failed); "error" (the program or the tests raised or do not compile, or a result
    was not plain data); "timeout"; "memory"; "output" (too much of it); "crashed" (the program ended its process or was
    killed); "refused" (too large to run). `output` is what the program printed, undecodable bytes replaced.
    """

    passed: bool
    status: str
    detail: str
    output: str


class Problem(NamedTuple):
    """The arguments of `grade` for one program."""

    program: str
    tests: str
    entry_point: str


def grade(
    program: str, tests: str, entry_point: str, *,
    timeout_seconds: float = TIMEOUT_SECONDS, allow_unsafe: bool = False, sandbox: Isolation | None = None,
) -> Verdict:  # fmt: skip
    """Run `tests` against the function `entry_point` of `program` (both Python source).

    The tests are plain asserts on `entry_point`, or define `check(candidate)`, as HumanEval's do (arXiv 2107.03374).
    They see nothing else of the program; `with_helpers` adds what they need of its prompt. `sandbox` defaults to
    `isolation()`. Whatever the program does, a `Verdict` comes back within about the timeout and no process is left.
    Raises `UserError` when this system offers no isolation and `allow_unsafe` is false.
    """
    sandbox = sandbox or isolation()
    if sandbox.method == "none" and not allow_unsafe:
        raise UserError(
            f"this system cannot isolate the code to be graded ({sandbox.reason}); install bubblewrap, allow user "
            "namespaces or run as root, or accept the risk with --allow-unsafe-execution"
        )
    if not entry_point.isidentifier() or max(len(program), len(tests)) > MAX_SOURCE:
        return Verdict(False, "refused", "the entry point is not a name, or a source is too long", "")
    with closing(_Run(sandbox, timeout_seconds)) as run:
        run.start(program, tests, entry_point)
        return run.watch()


def grade_many(problems: Iterable[tuple[str, str, str]], *, num_workers: int = 0, **options) -> list[Verdict]:
    """The verdicts on `problems` in order, `num_workers` at a time (0: one per core); `options` as for `grade`."""
    options.setdefault("sandbox", isolation())  # found before the threads ask for it
    workers = num_workers or len(os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else [0])
    with ThreadPoolExecutor(workers) as pool:
        return list(pool.map(lambda problem: grade(*problem, **options), problems))


def with_helpers(tests: str, prompt: str, entry_point: str) -> str:
    """`tests` preceded by everything that `prompt` defines beside `entry_point`: some of HumanEval's tests call helpers
    of the prompt (`poly`, `encode_cyclic`). Those of the graded program could be redefined to agree with anything."""
    try:
        body = parse(prompt).body
    except (SyntaxError, ValueError):
        return tests
    helpers = [unparse(node) for node in body if not (isinstance(node, FunctionDef) and node.name == entry_point)]
    return "\n\n".join([*helpers, tests])


# --- isolation --------------------------------------------------------------------------------------


_PROBE = """
import os, socket
def look(canary):
    try:
        socket.socket()
        network = True
    except OSError:
        network = False
    return [network, os.path.exists(canary), os.access("/", os.W_OK), os.getpid() < 10, os.access(".", os.W_OK)]
"""


@functools.cache
def isolation(method: str = "") -> Isolation:
    """The best isolation that works on this system, or whether `method` does. Found by using it, once: this starts
    processes and creates a canary file in the temporary folder."""
    if not sys.platform.startswith("linux"):
        return Isolation("none", f"{sys.platform} has no namespaces")
    reasons = []
    for candidate in [method] if method else _METHODS:
        if not (fault := _probe(candidate)):
            return Isolation(candidate, f"{candidate} works")
        reasons.append(f"{candidate}: {fault}")
    return Isolation("none", "; ".join(reasons))


def _probe(method: str) -> str:
    """Why `method` does not isolate here, or "" when it does."""
    if method == "bubblewrap" and not shutil.which("bwrap"):
        return "bwrap is not installed"
    with tempfile.NamedTemporaryFile() as canary:
        test = f"assert look({canary.name!r}) == [False, False, False, True, True]"
        try:
            verdict = grade(_PROBE, test, "look", timeout_seconds=10, sandbox=Isolation(method, "being probed"))
        except UserError as error:
            return str(error)
    return "" if verdict.passed else verdict.detail


@functools.cache
def _visible() -> tuple[list[str], list[str]]:
    """The paths that the sandbox shows, none below another one, and the package folders in them that it empties."""
    base = {"base": sys.base_prefix, "platbase": sys.base_exec_prefix}
    stdlib = {os.path.realpath(sysconfig.get_path(name, vars=base)) for name in ("stdlib", "platstdlib")}
    shared = os.path.join(sysconfig.get_config_var("LIBDIR") or "", sysconfig.get_config_var("INSTSONAME") or "")
    own_libraries = Path(sys.base_prefix, "lib").glob("*.so*")  # of conda, or of a Python built as a library
    paths = {*_SYSTEM_LIBRARIES, *stdlib, _PYTHON, shared, *map(str, own_libraries)}
    packages = [f"{folder}/{name}-packages" for folder in (*stdlib, "/usr/lib/python3") for name in ("site", "dist")]
    found = sorted(path for path in paths if os.path.isabs(path) and os.path.exists(path))
    visible = [path for path in found if not any(path.startswith(f"{parent}/") for parent in found)]
    return visible, [path for path in packages if os.path.isdir(path)]


def _bubblewrap() -> list[str]:
    """The command in front of the interpreter's that gives it namespaces and a root of its own."""
    visible, hidden = _visible()
    command = ["bwrap", "--unshare-pid", "--unshare-net", "--unshare-ipc", "--unshare-uts", "--unshare-cgroup-try"]
    if os.geteuid() == 0:  # the sandboxed process changes its user itself; mapped by bubblewrap it would stay root
        command += ["--cap-drop", "ALL", "--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID"]
    else:
        command += ["--unshare-user", "--uid", "65534", "--gid", "65534"]
    # as process 1 itself: bubblewrap's own reaper would be left as a zombie for the system to reap
    command += ["--as-pid-1", "--die-with-parent", "--new-session", "--hostname", "sandbox"]
    for folder in sorted({str(parent) for path in visible for parent in Path(path).parents} - {"/"}):
        command += ["--perms", "0755", "--dir", folder]  # by default bubblewrap may close them to other users
    for path in visible:
        command += ["--symlink", os.readlink(path), path] if os.path.islink(path) else ["--ro-bind", path, path]
    for path in hidden:
        command += ["--size", "4096", "--tmpfs", path, "--remount-ro", path]
    command += ["--perms", "1777", "--size", str(SCRATCH_BYTES), "--tmpfs", "/scratch", "--chdir", "/scratch"]
    return [*command, "--remount-ro", "/", "--"]


# --- one run ----------------------------------------------------------------------------------------


class _Run:
    """The two processes of one grading and their pipes. After `close` nothing of them remains."""

    def __init__(self, sandbox: Isolation, timeout_seconds: float) -> None:
        self.sandbox, self.timeout_seconds = sandbox, timeout_seconds
        self.processes: dict[str, subprocess.Popen] = {}
        self.output, self.told = bytearray(), bytearray()  # by the program, by the tester
        self.open = ExitStack()
        self.selector = self.open.enter_context(selectors.DefaultSelector())

    def close(self) -> None:
        self.kill()
        self.open.close()

    def start(self, program: str, tests: str, entry_point: str) -> None:
        """Start the candidate and the tester, connected. Raises `UserError` when the system has no room for them."""
        try:
            with ExitStack() as theirs:  # pipe ends that only the processes keep, so a pipe ends with its process
                requests, answers = _pipe(theirs, theirs), _pipe(theirs, theirs)
                output, told = _pipe(self.open, theirs), _pipe(self.open, theirs)
                self.spawn("candidate", [requests[0], answers[1]], output[1], program=program)
                ends = [answers[0], requests[1], told[1]]
                self.spawn("tester", ends, subprocess.DEVNULL, tests=tests, entry_point=entry_point)
        except OSError as error:
            raise UserError(f"cannot start a process for the code to be graded ({error}); try fewer workers") from error
        self.selector.register(output[0], selectors.EVENT_READ, self.output)
        self.selector.register(told[0], selectors.EVENT_READ, self.told)

    def spawn(self, part: str, descriptors: list[int], output: int, **task: str) -> None:
        """Start the process `part`. Its set-up, `task` included, waits in a file that is its standard input."""
        method = self.sandbox.method
        visible, hidden = _visible()
        setup = task | {
            "part": part, "descriptors": descriptors, "method": method,
            "limits": LIMITS | {"CPU": int(self.timeout_seconds) + 1},
            "user": next(_USERS) if os.geteuid() == 0 and method != "none" else None,
            "visible": visible, "hidden": hidden, "scratch_bytes": SCRATCH_BYTES,
        }  # fmt: skip
        instructions = self.open.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        instructions.write(json.dumps(setup).encode())
        instructions.seek(0)
        folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True) if method == "none" else nullcontext("/")
        command = [_PYTHON, "-s", "-S", "-P", "-B", "-X", "utf8", "-c", _child_source()]
        self.processes[part] = subprocess.Popen(
            [*(_bubblewrap() if method == "bubblewrap" else []), *command],
            stdin=instructions, stdout=output, stderr=output, pass_fds=descriptors,
            cwd=self.open.enter_context(folder), start_new_session=True,
            env={"PYTHONHASHSEED": "0"},  # a fixed order of sets, so that the verdict is the same every time
        )  # fmt: skip

    def watch(self) -> Verdict:
        """Wait for the verdict, the deadline or too much output, then kill both processes. Raises `UserError` when they
        did not get as far as loading the program."""
        status, detail = self.hear(STARTUP_SECONDS)
        if status != "started":
            with suppress(subprocess.TimeoutExpired):  # the candidate may be about to say what is wrong
                self.processes["candidate"].wait(EXIT_SECONDS)
            self.kill()
            said = self.output.decode(errors="replace").strip().splitlines() or [detail]
            raise UserError(f"the sandbox ({self.sandbox.method}) did not start: {said[-1]}")
        status, detail = self.hear(self.timeout_seconds)
        if status == "ended":
            status, detail = self.explain_crash(detail)
        self.kill()
        if status == "passed" and len(self.output) > OUTPUT_BYTES:
            status, detail = "output", "too much output"
        output = self.output[:OUTPUT_BYTES].decode(errors="replace")
        detail = detail.encode(errors="replace").decode()  # a lone surrogate could not be written to a file
        return Verdict(status == "passed", status, detail, output)

    def hear(self, seconds: float) -> tuple[str, str]:
        """The tester's next (status, detail), or why there is none."""
        deadline = time.monotonic() + seconds  # a trickle of output does not extend the wait
        while b"\n" not in self.told:
            if not self.pump(deadline - time.monotonic()):
                return "timeout", f"no verdict after {seconds:g} s"
            if all(key.data is not self.told for key in self.selector.get_map().values()):
                return "error", "the tests' process ended without a verdict"
            if len(self.output) > OUTPUT_BYTES:
                return "output", f"more than {OUTPUT_BYTES} bytes of output"
        line, _, self.told[:] = self.told.partition(b"\n")
        return tuple(json.loads(line))

    def pump(self, seconds: float) -> bool:
        """Read once from each pipe that has something within `seconds`, dropping those that ended; false if none."""
        events = self.selector.select(seconds) if seconds > 0 else []
        for key, _ in events:
            if chunk := os.read(key.fd, 1 << 16):
                key.data.extend(chunk)
            else:
                self.selector.unregister(key.fd)
        return bool(events)

    def explain_crash(self, detail: str) -> tuple[str, str]:
        """(status, detail) for a candidate that is gone, from how its process ended."""
        try:
            code = self.processes["candidate"].wait(EXIT_SECONDS)
        except subprocess.TimeoutExpired:  # it only closed its pipes
            return "crashed", detail
        number = -code if code < 0 else code - 128  # a signal is reported as -n by Python, 128 + n by bubblewrap
        if number == signal.SIGXCPU:
            return "timeout", "out of processor time"
        how = signal.Signals(number).name if number in set(signal.Signals) else f"exit status {code}"
        return "crashed", f"{detail} ({how})"

    def kill(self) -> None:
        """Kill both processes and their descendants, and wait until they are gone: a pipe ends with its last holder."""
        for process in self.processes.values():
            if process.returncode is None:  # once reaped, its number may belong to another process
                _kill(process)
        deadline = time.monotonic() + KILL_SECONDS
        while self.selector.get_map() and self.pump(deadline - time.monotonic()):
            pass


def _kill(process: subprocess.Popen) -> None:
    """Kill `process` and what it started, the inside of a sandbox first: the outer process then reaps the inner one and
    ends by itself. Killed first, it would leave a zombie in a container whose first process reaps none."""
    with suppress(OSError, subprocess.TimeoutExpired):  # no /proc, or already gone
        inside = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        for pid in inside:
            os.kill(int(pid), signal.SIGKILL)
        if inside:
            process.wait(KILL_SECONDS)
            return
    with suppress(ProcessLookupError, PermissionError):  # PermissionError: macOS, for a process that has ended
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _pipe(out_owner: ExitStack, in_owner: ExitStack) -> tuple[int, int]:
    """The reading and the writing end of a pipe, each closed together with its owner."""
    ends = os.pipe()
    out_owner.callback(os.close, ends[0])
    in_owner.callback(os.close, ends[1])
    return ends


@functools.cache
def _child_source() -> str:
    """The text of `execution_child.py`, passed on the command line so that the sandbox needs no file of ours."""
    return Path(__file__).with_name("execution_child.py").read_text()
