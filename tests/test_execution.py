"""Grading: honest programs pass, attacks do not, and nothing remains of either.

Where this system offers no isolation, the tests that need it are skipped.
"""

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.evals import execution
from nanochat.evals.execution import Isolation, Verdict, grade, grade_many, isolation, with_helpers
from tests.attacks import ATTACKS, ENTRY_POINT, HONEST, TESTS, Targets, aim

isolated = pytest.mark.skipif(isolation().method == "none", reason=f"no isolation here: {isolation().reason}")
METHODS = [
    pytest.param(name, marks=pytest.mark.skipif(found.method == "none", reason=f"not here: {found.reason}"))
    for name, found in ((name, isolation(name)) for name in ("bubblewrap", "unshare"))
]
WITHOUT_TORCH = """
import sys, types
sys.modules["nanochat.common"] = types.SimpleNamespace(UserError=Exception)  # all that execution.py needs of it
"""
NO_ISOLATION = Isolation("none", "for the test")


def in_sandbox(program: str, expression: str, **options) -> Verdict:
    """The verdict on `assert expression` with the program's function `f`."""
    return grade(program, f"assert {expression}", "f", **options)


@pytest.fixture
def targets(tmp_path):
    """A secret, a port and a process, which must be untouched when the test is over."""
    (tmp_path / "secret").write_text("the secret word")
    (tmp_path / "secret").chmod(0o666)
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"]) as victim,
    ):
        server.setblocking(False)
        yield Targets(str(tmp_path / "secret"), str(tmp_path), server.getsockname()[1], victim.pid, os.getpid())
        assert victim.poll() is None
        victim.kill()
        assert (tmp_path / "secret").read_text() == "the secret word"
        assert not (tmp_path / "spoiled").exists()
        with pytest.raises(BlockingIOError):
            server.accept()


@isolated
@pytest.mark.parametrize("group", ATTACKS)
def test_no_attack_passes_or_escapes(group, targets):
    programs = {name: aim(program, targets) for name, program in ATTACKS[group].items()}
    problems = [(program, TESTS, ENTRY_POINT) for program in programs.values()]
    start = time.perf_counter()
    verdicts = dict(zip(programs, grade_many(problems, num_workers=4, timeout_seconds=0.7), strict=True))
    assert time.perf_counter() - start < 10 + 2 * len(programs)  # on a loaded machine
    assert not {name: verdict for name, verdict in verdicts.items() if verdict.passed}
    printed = {name: verdict.output for name, verdict in verdicts.items()}
    assert not {name: text for name, text in printed.items() if "ESCAPED" in text or "secret word" in text}


@pytest.mark.parametrize("method", METHODS)
def test_an_honest_program_passes_and_a_wrong_one_fails(method):
    sandbox = isolation(method)
    assert grade(HONEST, TESTS, ENTRY_POINT, sandbox=sandbox) == Verdict(True, "passed", "3 calls", "")
    wrong = grade(HONEST.replace("*", "+"), TESTS, ENTRY_POINT, sandbox=sandbox)
    assert (wrong.passed, wrong.status) == (False, "wrong")
    assert "assert candidate(number) == number * number" in wrong.detail


@pytest.mark.parametrize("method", METHODS)
def test_no_process_is_left_even_as_a_zombie(method):
    script = f"""{WITHOUT_TORCH}
import ctypes, os, pathlib
from nanochat.evals.execution import grade, isolation
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # what loses its parent becomes a child of this process
for program in ({HONEST!r}, "import os; os._exit(0)", "import time; time.sleep(9)", "print('x' * 10**6)"):
    print(grade(program, {TESTS!r}, {ENTRY_POINT!r}, timeout_seconds=0.5, sandbox=isolation({method!r})).status)
for task in pathlib.Path('/proc/self/task').iterdir():
    print('left:', (task / 'children').read_text())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.split() == ["passed", "crashed", "timeout", "output", "left:"]


@pytest.mark.parametrize("method", METHODS)
def test_the_sandbox_dies_with_the_process_that_grades(method):
    script = f"""{WITHOUT_TORCH}
from nanochat.evals.execution import grade, isolation
sandbox = isolation({method!r})
print("ready", flush=True)
grade("while True: pass", "", "f", timeout_seconds=60, sandbox=sandbox)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as grader:
        assert grader.stdout.readline() == "ready\n"
        wait_until(lambda: len(descendants(grader.pid)) >= 4)
        mine = descendants(grader.pid)
        grader.send_signal(signal.SIGKILL)
    wait_until(lambda: not any(alive(pid) for pid in mine))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def descendants(pid: int) -> set[int]:
    found = set()
    with suppress(OSError):  # gone meanwhile
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found |= {int(child)} | descendants(int(child))
    return found


def wait_until(condition, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


TOO_LONG = "x" * (execution.MAX_SOURCE + 1)
BUSY_THREADS = """import hashlib, threading
def f(x):
    def g():
        while True: hashlib.sha256(bytes(1 << 20))
    for _ in range(4): threading.Thread(target=g).start()
    g()
"""
COUNTER = "import collections\ndef f(x): return collections.Counter(x)"
RAISES = "class Own(Exception): pass\ndef f(x):\n    raise {'v': ValueError, 'o': Own, 's': SystemExit}[x]('why')"
EXPECTS = "try:\n    f({!r})\nexcept {} as error:\n    assert 'why' in str(error)\nelse:\n    assert False"


@isolated
@pytest.mark.parametrize(
    ("program", "tests", "status", "detail"),
    [
        ("def f(x): return x", "assert f(1) == 1", "passed", "1 calls"),
        ("def f(x): return x", "assert f(1) == 2, 'one is not two'", "wrong", "one is not two"),
        ("def f(x): pass", "assert f(1) + 1 == 2", "wrong", "TypeError"),
        ("def f(x): return x[9]", "assert f([]) == 1", "error", "IndexError"),
        ("def f(x): return object()", "assert f(1)", "error", "not plain data"),
        ("def f(x) return x", "assert f(1) == 1", "error", "SyntaxError"),
        ("import numpy\ndef f(x): return x", "assert f(1) == 1", "error", "ModuleNotFoundError"),
        ("def f(x): return x", "assert g(1) == 1", "error", "NameError"),
        ("def f(x): return x", "assert f(1 == 1", "error", "SyntaxError"),
        ("def f(x): return x", "pass", "error", "never called"),
        ("def f(x): return x", "assert f(object())", "wrong", "not plain data"),
        ("def f(x): return x", "f(1)\nraise SystemExit(0)", "error", "SystemExit"),
        ("import time\ndef f(x): time.sleep(60)", "assert f(1)", "timeout", "0.5 s"),
        (BUSY_THREADS, "f(1)", "timeout", ""),  # ends by its processor time or by the clock
        ("def f(x): return bytearray(4 << 30)", "assert f(1)", "memory", "MemoryError"),
        ("def f(x): print('x' * 10**6)", "assert f(1)", "output", "65536"),
        ("import os\ndef f(x): os._exit(3)", "assert f(1)", "crashed", "exit status 3"),
        ("import os\ndef f(x): os.abort()", "assert f(1)", "crashed", "SIG"),
        (TOO_LONG, "", "refused", ""), ("", TOO_LONG, "refused", ""),
        # results of subclasses compare as what they extend
        (COUNTER, "assert f('aab') == {'a': 2, 'b': 1}", "passed", ""),
        ("class L(list): pass\ndef f(x): return L(x)", "assert f('ab') == ['a', 'b']", "passed", ""),
        # exceptions cross by name, and tests may expect them
        (RAISES, EXPECTS.format("v", "ValueError"), "passed", ""),
        (RAISES, EXPECTS.format("o", "Exception"), "passed", ""),
        (RAISES, EXPECTS.format("s", "BaseException"), "crashed", ""),
        # a call without an answer ends the tests, whatever they catch; any detail can be written down
        ("import os\ndef f(x): os._exit(0)", "try:\n    f(1)\nexcept BaseException:\n    pass\n", "crashed", ""),
        ("def f(x): raise ValueError('\\ud800')", "f(1)", "error", "ValueError: ?"),
    ],
)  # fmt: skip
def test_the_status_says_what_happened(program, tests, status, detail):
    verdict = grade(program, tests, "f", timeout_seconds=0.5 if status == "timeout" else 10)
    assert (verdict.status, verdict.passed) == (status, status == "passed")
    assert detail in verdict.detail
    assert verdict.detail.encode()  # no lone surrogates


@isolated
@pytest.mark.parametrize("timeout_seconds", [0.3, 1.2])
def test_a_timeout_is_kept(timeout_seconds):
    start = time.perf_counter()
    assert in_sandbox("while True: pass", "f(1)", timeout_seconds=timeout_seconds).status == "timeout"
    assert timeout_seconds <= time.perf_counter() - start < timeout_seconds + 10


@isolated
def test_all_plain_data_crosses_in_both_directions():
    tests = r"""
values = [None, True, 0, -(10**50), 1.5, float('inf'), 'é\ud800', b'\xff', 2j, (1, [2]), {1, 2}, {(1,): {'a': []}}]
assert f(values) == values
assert [type(v) for v in f(values)] == [type(v) for v in values]
assert f(x=float('nan')) != f(x=float('nan'))
assert f(frozenset([1])) == frozenset([1])
"""
    assert grade("def f(x): return x", tests, "f").passed


@isolated
def test_programs_can_use_the_standard_library_threads_and_the_scratch_folder():
    program = """
import dataclasses, hashlib, math, re, tempfile, threading, typing, zlib
from concurrent.futures import ThreadPoolExecutor
@dataclasses.dataclass
class Point:
    x: "int"
def f(n: typing.List[int]):
    with ThreadPoolExecutor(4) as pool:
        squares = list(pool.map(lambda v: v * v, n))
    with tempfile.TemporaryFile("w+") as file:
        file.write(str(Point(3)))
        file.seek(0)
        text = file.read()
    return squares, text, hashlib.md5(b"").hexdigest()[:4], math.gcd(4, 6), re.sub("a", "b", "a")
"""
    verdict = in_sandbox(program, "f([1, 2]) == ([1, 4], 'Point(x=3)', 'd41d', 2, 'b')")
    assert verdict.passed, verdict


@isolated
def test_what_is_printed_comes_back_undecodable_bytes_replaced():
    program = "import os\ndef f(x):\n    print('hello', flush=True)\n    os.write(1, b'\\xff\\n')\n    return x"
    assert grade(program, "assert f(1) == 1", "f") == Verdict(True, "passed", "1 calls", "hello\n\ufffd\n")


@isolated
def test_the_same_program_gets_the_same_result_every_time():
    program = "def f(x): return list({'apple', 'pear', 'plum', 'fig', 'lime'})"
    assert len({in_sandbox(program, "False, f(1)").detail for _ in range(3)}) == 1
    tests = "import random\ndef check(c):\n    n = random.random()\n    assert c(n) != n, n"
    assert len({grade("def f(x): return x", tests, "f").detail for _ in range(3)}) == 1


@isolated
def test_many_are_graded_at_a_time_and_keep_their_order():
    problems = [(f"def f(x): return x + {i % 3}", "assert f(1) == 2", "f") for i in range(12)]
    assert [verdict.passed for verdict in grade_many(problems, num_workers=4)] == [i % 3 == 1 for i in range(12)]
    assert grade_many([]) == []
    assert grade("", "", "no name").status == "refused"


@isolated
def test_descriptors_are_all_closed_again():
    grade(HONEST, TESTS, ENTRY_POINT)
    before = len(os.listdir("/proc/self/fd"))
    grade_many([(HONEST, TESTS, ENTRY_POINT), ("import os; os._exit(0)", TESTS, ENTRY_POINT)] * 3, num_workers=3)
    assert len(os.listdir("/proc/self/fd")) == before


PROMPT = """import math


def poly(xs: list, x: float):
    return sum(c * math.pow(x, i) for i, c in enumerate(xs))


def find_zero(xs: list):
    \"\"\" A zero of poly.\"\"\"
"""


@isolated
def test_helpers_of_the_tests_come_from_the_prompt_and_not_from_the_program():
    tests = with_helpers("def check(c):\n    assert abs(poly([2, -1], c([2, -1]))) < 1e-6", PROMPT, "find_zero")
    assert grade(PROMPT + "    return -xs[0] / xs[1]\n", tests, "find_zero").passed
    cheat = PROMPT + "    return 0.0\n\ndef poly(xs, x):\n    return 0.0\n"
    assert grade(cheat, tests, "find_zero").status == "wrong"
    assert with_helpers("assert f(1)", "def f(", "f") == "assert f(1)"  # a prompt that does not parse adds nothing


def test_nothing_runs_without_isolation_unless_allowed():
    with pytest.raises(UserError, match="--allow-unsafe-execution"):
        grade(HONEST, TESTS, ENTRY_POINT, sandbox=NO_ISOLATION)
    with pytest.raises(UserError, match="--allow-unsafe-execution"):
        grade_many([(HONEST, TESTS, ENTRY_POINT)] * 3, sandbox=NO_ISOLATION)


def test_where_it_is_allowed_limits_and_the_separate_tests_are_left():
    def run(program, expression="f(1)", **options):
        return in_sandbox(program, expression, sandbox=NO_ISOLATION, allow_unsafe=True, **options)

    assert grade(HONEST, TESTS, ENTRY_POINT, sandbox=NO_ISOLATION, allow_unsafe=True).passed
    assert run("import os; os._exit(0)").status == "crashed"
    assert run("def f(x): return bytearray(4 << 30)").status == "memory"
    assert run("while True: pass", timeout_seconds=0.3).status == "timeout"
    environment = "import os\ndef f(x): return dict(os.environ)"
    assert run(environment, "'HOME' not in f(1) and 'NANOCHAT_BASE_DIR' not in f(1)").passed
    if sys.platform.startswith("linux"):  # whose filter of system calls still forbids processes and the network
        for body in ("import os; os.fork()", "import socket; socket.socket()", "import os; os.kill(os.getppid(), 9)"):
            verdict = run(f"def f(x):\n    {body}\n    return x", "f(1) == 1")
            assert verdict.status == "error"
            assert "PermissionError" in verdict.detail


def test_a_sandbox_that_does_not_start_is_an_error_and_no_verdict(monkeypatch):
    monkeypatch.setattr(execution, "_child_source", lambda: "import sys; sys.exit('no such luck')")
    with pytest.raises(UserError, match="did not start: no such luck"):
        grade(HONEST, TESTS, ENTRY_POINT, sandbox=NO_ISOLATION, allow_unsafe=True)


def test_the_reason_why_there_is_no_isolation_is_told(monkeypatch):
    monkeypatch.setattr(execution, "_METHODS", ("bubblewrap",))
    monkeypatch.setattr(execution.shutil, "which", lambda name: None)
    execution.isolation.cache_clear()
    assert isolation() == Isolation("none", "bubblewrap: bwrap is not installed")
    execution.isolation.cache_clear()
