"""Attack the sandbox of `nanochat/evals/execution.py` and the calculator; prints the outcome of each attack.

    python -m dev.attack_sandbox                          # all attacks, about two minutes
    python -m dev.attack_sandbox --isolation unshare      # with another isolation than the best one available
    python -m dev.attack_sandbox --humaneval              # HumanEval's own solutions, whole and damaged (needs the hub)

Exits with status 1 if an attack passes the tests, prints `ESCAPED` or the secret, changes a file, reaches the port,
harms the victim, leaves a process behind, exceeds its timeout, or raises in this process. The attacks are in
`tests/attacks.py`.
"""

import argparse
import ctypes
import os
import resource
import secrets
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

from nanochat.common import UserError
from nanochat.engine.calculator import calculate
from nanochat.evals.execution import Isolation, Verdict, grade, grade_many, isolation, with_helpers
from tests.attacks import ATTACKS, ENTRY_POINT, FALSE_SUMS, HONEST, TESTS, Targets, aim

TIMEOUT_SECONDS = 2.0  # per attack
SLACK_SECONDS = 4.0  # a loaded machine is slow to start and end processes
CALCULATOR_SECONDS = 0.1
MAX_PARENT_BYTES = 200 << 20  # growth of the grading process over all attacks


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--isolation", choices=["bubblewrap", "unshare"], default="", help="default: the best one here")
    parser.add_argument("--allow-unsafe-execution", action="store_true", help="--humaneval also without isolation")
    parser.add_argument("--only", default="", help="attacks whose name contains this")
    parser.add_argument("--humaneval", action="store_true", help="grade HumanEval's canonical solutions instead")
    parser.add_argument("--num-workers", type=int, default=0, help="problems at a time; 0: one per core")
    return parser.parse_args()


class Range:
    """The targets of the attacks, and a check whether they are still intact."""

    def __init__(self, stack: ExitStack) -> None:
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        self.folder.chmod(0o777)
        self.word = secrets.token_hex(16)
        self.secret = self.folder / "secret"
        self.secret.write_text(self.word)
        self.secret.chmod(0o666)
        self.server = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        self.server.setblocking(False)
        self.victim = stack.enter_context(subprocess.Popen(["sleep", "3600"]))
        stack.callback(self.victim.kill)
        self.known = {self.victim.pid}
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER: orphaned descendants become our children

    def targets(self) -> Targets:
        port = self.server.getsockname()[1]
        return Targets(str(self.secret), str(self.folder), port, self.victim.pid, os.getpid())

    def damage(self, output: str) -> list[str]:
        """What is wrong after an attack, in words."""
        found = []
        if "ESCAPED" in output or self.word in output:
            found.append("says it escaped")
        if [path.name for path in self.folder.iterdir()] != ["secret"] or self.secret.read_text() != self.word:
            found.append("files changed")
        try:
            self.server.accept()[0].close()
            found.append("port reached")
        except BlockingIOError:
            pass
        if self.victim.poll() is not None or state_of(self.victim.pid) != "S":
            found.append("victim harmed")
        left = set(children(os.getpid())) - self.known
        self.known |= left
        return [*found, *(f"process {pid} left" for pid in sorted(left))]


def state_of(pid: int) -> str:
    """The state letter of a process: "S" sleeping, "T" stopped, "Z" dead."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def children(pid: int) -> list[int]:
    """Child processes of `pid`, adopted ones included, that have not been waited for."""
    return [
        int(child) for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
    ]


def attack_sandbox(sandbox: Isolation, *, only: str) -> list[str]:
    """Run the attacks, print a row for each, and return what went wrong.

    Raises `UserError` without isolation, because some of the attacks do damage if they succeed.
    """
    if sandbox.method == "none":
        raise UserError(f"nothing protects this machine from the attacks: {sandbox.reason}")
    problems = []
    statuses: Counter[str] = Counter()
    with ExitStack() as stack:
        targets = Range(stack)
        honest, _ = timed(HONEST, sandbox)
        if not honest.passed:
            problems.append(f"the honest program does not pass: {honest}")
        start_bytes = peak_bytes()
        print(f"{'attack':62} {'verdict':8} {'seconds':>7}  detail")
        for group, programs in ATTACKS.items():
            for name, program in programs.items():
                if only not in name:
                    continue
                verdict, seconds = timed(aim(program, targets.targets()), sandbox)
                wrong = targets.damage(verdict.output)
                wrong += ["PASSED"] if verdict.passed else []
                wrong += ["took too long"] if seconds > TIMEOUT_SECONDS + SLACK_SECONDS else []
                statuses[verdict.status] += 1
                outcome = ", ".join(wrong) or said(verdict)
                print(f"{group + ': ' + name:62.62} {verdict.status:8} {seconds:7.2f}  {outcome}")
                problems += [f"{name}: {what}" for what in wrong]
        if peak_bytes() - start_bytes > MAX_PARENT_BYTES:
            problems.append(f"the grading process grew by {(peak_bytes() - start_bytes) >> 20} MiB")
    print(f"\n{sum(statuses.values())} attacks on {sandbox.method}: {dict(statuses.most_common())}\n")
    return problems


def timed(program: str, sandbox: Isolation) -> tuple[Verdict, float]:
    """The verdict on `program`, and how many seconds it took."""
    start = time.perf_counter()
    verdict = grade(program, TESTS, ENTRY_POINT, timeout_seconds=TIMEOUT_SECONDS, sandbox=sandbox)
    return verdict, time.perf_counter() - start


def said(verdict: Verdict, width: int = 60) -> str:
    """What to show of a verdict: the program's output (why the attack failed) if a test failed, else the detail."""
    text = verdict.output if verdict.status == "wrong" and verdict.output.strip() else verdict.detail
    return ascii(" ".join(text.split())[:width])[1:-1]


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10


def attack_calculator(only: str) -> list[str]:
    """Give the calculator expressions it must refuse, print a row for each, and return what went wrong."""
    problems = []
    print(f"{'expression':40} {'answer':8} {'seconds':>9}")
    for name, expression in FALSE_SUMS.items():
        if only not in name:
            continue
        start = time.perf_counter()
        answer = calculate(expression)
        seconds = time.perf_counter() - start
        print(f"{name:40} {answer!s:8} {seconds:9.6f}")
        if answer is not None or seconds > CALCULATOR_SECONDS:
            problems.append(f"calculator, {name}: {answer!r} after {seconds:.3f} s")
    return problems


def grade_humaneval(sandbox: Isolation, *, num_workers: int, allow_unsafe: bool) -> list[str]:
    """Grade HumanEval's canonical solutions: whole, with an empty body, and without their last line.

    Prints the counts, and the names of those that pass without their last line. Returns what went wrong.
    """
    from datasets import load_dataset

    rows = list(load_dataset("openai/openai_humaneval", split="test"))
    variants = {
        "canonical solution": lambda body: body,
        "body replaced by pass": lambda body: "    pass\n",
        "last line removed": lambda body: "\n".join(body.rstrip().split("\n")[:-1]) + "\n",
    }
    passed = {}
    for name, change in variants.items():
        problems = [
            (
                row["prompt"] + change(row["canonical_solution"]),
                with_helpers(row["test"], row["prompt"], row["entry_point"]),
                row["entry_point"],
            )
            for row in rows
        ]
        start = time.perf_counter()
        verdicts = grade_many(problems, num_workers=num_workers or None, sandbox=sandbox, allow_unsafe=allow_unsafe)
        seconds = time.perf_counter() - start
        passed[name] = [row for row, verdict in zip(rows, verdicts, strict=True) if verdict.passed]
        counts = dict(Counter(verdict.status for verdict in verdicts).most_common())
        print(f"{name:22} {len(passed[name]):3} of {len(rows)} pass, {seconds:5.1f} s, {counts}")
        if name == "canonical solution":
            for row, verdict in zip(rows, verdicts, strict=True):
                if not verdict.passed:
                    print(f"    {row['task_id']}: {verdict.status}: {verdict.detail}")
    print("\nStill correct without the last line:" + ("" if passed["last line removed"] else " none"))
    for row in passed["last line removed"]:
        lost = row["canonical_solution"].rstrip().split("\n")[-1].strip()
        print(f"    {row['task_id']:14} {row['entry_point']:28} lost: {lost}")
    problems = [f"{len(rows)} problems instead of 164"] if len(rows) != 164 else []
    problems += ["a canonical solution fails"] if len(passed["canonical solution"]) != len(rows) else []
    problems += ["an empty solution passes"] if passed["body replaced by pass"] else []
    return problems


def main(args: argparse.Namespace) -> int:
    sandbox = isolation(args.isolation)
    print(f"isolation: {sandbox.method} ({sandbox.reason})\n")
    if args.humaneval:
        problems = grade_humaneval(sandbox, num_workers=args.num_workers, allow_unsafe=args.allow_unsafe_execution)
    else:
        problems = attack_sandbox(sandbox, only=args.only)
        problems += attack_calculator(args.only)
    print("\n" + ("\n".join(f"FAILED {problem}" for problem in problems) or "all as it should be"))
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main(parse_args()))
    except UserError as error:
        sys.exit(f"error: {error}")
