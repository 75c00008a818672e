"""Training runs and speedrun.sh, killed at random moments and started again: they must end as if nothing had happened.

    python dev/kill_test.py --kills 200                   # every stage with tiny models; 10 minutes on 2 cores
    python dev/kill_test.py --speedrun --kills 20         # the miniature with a few steps; half an hour

Each stage runs in one process, in two, and pretraining also under torchrun. SIGKILL, SIGTERM or SIGINT reach one
process or all of them at a random moment of the run's life, or as soon as a checkpoint is being written. It is started
again with --resume until it is at its end. Then the last checkpoint must be equal in every bit to that of a run never
interrupted, and metrics.jsonl and the record of the report but for times; and no start may begin from less than the
newest checkpoint. Prints a table, then one JSON line; the exit status is 1 if anything differs, and the folder stays.
"""

import argparse
import contextlib
import gc
import hashlib
import importlib
import itertools
import json
import math
import os
import random
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.fx.experimental.symbolic_shapes  # what PyTorch would import late, at the first model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.checkpoint import list_steps, step_dir
from nanochat.common import UserError, run_main
from nanochat.data.chat import visible_text
from nanochat.records import read_records
from nanochat.report.markdown import render
from nanochat.results import MEASURED
from tasks.own_data import OwnFile

ROOT = Path(__file__).resolve().parent.parent
WORDS = "river stone cloud garden window bread summer engine letter music doctor harbour silver under never".split()
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
RUNTIME = "--device-type cpu --dtype float32"
BASE = f"{RUNTIME} --depth 2 --head-dim 32 --sequence-len 32 --total-batch-size 256 --device-batch-size 2 --model-tag"
CHAT = f"{RUNTIME} --total-batch-size 256 --device-batch-size 2 --eval-every 6 --data own.jsonl --model-tag source"
RL = (
    f"{RUNTIME} --data questions.jsonl --questions-per-step 3 --num-samples 4 --max-tokens 8 --device-batch-size 2 "
    "--eval-every 4 --eval-questions 3 --eval-samples 2 --model-tag source"
)
BASE_TASK = "--data data --eval-every 6 --eval-tokens 512"
TAG = "killed"
STAGES = {  # script: source of its checkpoints, flags
    "base_train": ("base", f"{BASE} {TAG} {BASE_TASK} --num-steps 40"),
    "mid_train": ("mid", f"{CHAT} --output-tag {TAG} --num-steps 30"),
    "chat_sft": ("sft", f"{CHAT} --output-tag {TAG} --num-steps 30"),
    "chat_rl": ("rl", f"{RL} --output-tag {TAG} --num-steps 12"),
}
PROCESSES = ("1", "2", "torchrun")
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
MOST_KILLS = 6  # of one run, which then goes on to its end
SAVING_SHARE = 0.4  # of the kills wait for a checkpoint that is being written
POLL_SECONDS, GRACE_SECONDS, END_SECONDS = 0.001, 5.0, 120.0
FREE = ("save_every", "keep_last", "resume")  # flags that differ between runs compared


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kills", type=int, default=200, help="in all")
    add("--seed", type=int, default=0)
    add("--stages", nargs="+", default=[*STAGES], choices=[*STAGES])
    add("--processes", nargs="+", default=[*PROCESSES], choices=PROCESSES, help="of a stage (torchrun: only base)")
    add("--speedrun", action="store_true", help="kill speedrun.sh instead")
    add("--num-steps", type=int, default=3, help="steps of every stage of speedrun.sh")
    return parser.parse_args()


# --- one run -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A stage and how it runs."""

    script: str
    num_processes: int
    has_launcher: bool = False  # torchrun, in interpreters of their own; else processes are forks of this one

    def __str__(self) -> str:
        return f"{self.script} x {self.num_processes}" + (" torchrun" if self.has_launcher else "")

    def run_folder(self, base: Path) -> Path:
        return base / f"{STAGES[self.script][0]}_checkpoints" / TAG


class Job:
    """A run that has been started, as one process or several; each is its own process or torchrun's."""

    def __init__(self, case: Case, folder: Path, base: Path, flags: list[str]):
        self.case, self.output, self.begun = case, base.with_suffix(".out"), time.monotonic()
        self.run, self.hung = case.run_folder(base), False
        self.abandoned = self.partials()  # by a run that was killed
        args = [*STAGES[case.script][1].split(), *flags]
        env = ENVIRONMENT | {"NANOCHAT_BASE_DIR": str(base)}
        module, num = f"scripts.{case.script}", case.num_processes
        self.output.unlink(missing_ok=True)
        if case.has_launcher:
            launch = f"-m torch.distributed.run --standalone --nproc_per_node={num} --max-restarts=2 -m {module} --"
            command = [sys.executable, *launch.split(), *args]
            self.codes = {fork(lambda: os.execv(command[0], command), folder, env, self.output): None}
            return
        if num > 1:
            env |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num)}
        self.codes: dict[int, int | None] = {}  # by process: exit status, negative for a signal; None while it lives
        for rank in range(num):
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num > 1 else {}
            self.codes[fork(lambda: run_script(module, args), folder, env | ranks, self.output)] = None

    def living(self) -> list[int]:
        """Those of the processes that have not ended yet."""
        for pid in [pid for pid, code in self.codes.items() if code is None]:
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [pid for pid, code in self.codes.items() if code is None]

    def partials(self) -> set[tuple[str, int]]:
        """Names and inodes of checkpoints that are not complete."""
        found = set()
        with contextlib.suppress(OSError):  # it has just been completed
            found |= {(path.name, path.stat().st_ino) for path in self.run.glob(".step_*.partial")}
        return found

    def is_saving(self) -> bool:
        """Whether this run is writing a checkpoint, or deleting one, at the moment."""
        return bool(self.partials() - self.abandoned)

    def victims(self) -> list[int]:
        """All processes that a signal may be meant for: also torchrun's workers."""
        found = self.living()
        for pid in found if self.case.has_launcher else ():
            with contextlib.suppress(OSError):
                found = found + list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))
        return found

    def sleep_until(self, moment: float) -> bool:
        """Wait until `moment` seconds after the start. Returns whether the run still lives."""
        while alive := self.living():
            if time.monotonic() - self.begun >= moment:
                break
            time.sleep(POLL_SECONDS)
        return bool(alive)

    def wait(self) -> int:
        """Wait for all processes, those that outlive another's failure for a few seconds only, as launchers do. Returns
        the exit status: the one of largest magnitude."""
        deadline = time.monotonic() + END_SECONDS
        while self.living():
            now = time.monotonic()
            if any(self.codes.values()):
                deadline = min(deadline, now + GRACE_SECONDS)
            if now > deadline:
                self.hung = not any(self.codes.values())
                for pid in self.victims():
                    os.kill(pid, signal.SIGKILL)
            time.sleep(POLL_SECONDS)
        return max(self.codes.values(), key=abs)


def fork(work, folder: Path, env: dict[str, str], output: Path) -> int:
    """Have a child process do `work` in `folder`, its output appended to a file. Returns its process id."""
    if pid := os.fork():
        return pid
    status = 1
    try:
        for number in (1, 2):
            os.dup2(os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.update(env)
        os.chdir(folder)
        work()
        status = 0
    except SystemExit as end:
        status = end.code or 0
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_script(module: str, args: list[str]) -> None:
    """Run a stage in this process. A random model gets no question right: replies are rewarded by their length."""
    OwnFile.reward = lambda self, conversation, completion: float(len(visible_text(completion)) % 2)
    sys.argv = [module, *args]
    sys.modules.pop(module, None)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


# --- what is left --------------------------------------------------------------------------------


def outcome(case: Case, base: Path) -> dict:
    """All that a run leaves but times: digests of the last checkpoint's files, lines of metrics.jsonl, the record."""
    run = case.run_folder(base)
    folder = step_dir(run, list_steps(run)[-1])
    paths = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".json"]
    found = {path.relative_to(run): hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}
    metrics = [timeless(json.loads(line)) for line in (run / "metrics.jsonl").read_text().splitlines()]
    record = json.loads((base / "report" / "records.jsonl").read_text().splitlines()[-1])
    record["settings"] = {name: value for name, value in record["settings"].items() if name not in FREE}
    return found | {"metrics": metrics, "record": timeless(record)}


def timeless(value):
    """`value` without the numbers that are measured anew in each run, at any depth."""
    if isinstance(value, dict):
        return {name: timeless(item) for name, item in value.items() if name != "time" and not MEASURED.search(name)}
    return [timeless(item) for item in value] if isinstance(value, list) else value


def newest(run: Path) -> int:
    """The step of the newest complete checkpoint, 0 if there is none."""
    return max(list_steps(run), default=0)


# --- kills ---------------------------------------------------------------------------------------


@dataclass
class Tally:
    """What happened in the runs of a case."""

    runs: int = 0
    kills: Counter = field(default_factory=Counter)  # by signal
    saving: int = 0  # kills while a checkpoint was being written
    stops: int = 0  # of these signals, those after which the run saved and stopped by itself
    faults: list[str] = field(default_factory=list)


class Killer:
    """Kills the runs of one case, each again and again."""

    def __init__(self, case: Case, folder: Path, rng: random.Random):
        self.case, self.folder, self.rng, self.tally = case, folder, rng, Tally()
        base = self.new_base("reference")
        job = Job(case, folder, base, ["--save-every", "5"])
        metrics = case.run_folder(base) / "metrics.jsonl"
        while job.living() and not metrics.exists():
            time.sleep(POLL_SECONDS)
        self.first, status = time.monotonic() - job.begun, job.wait()
        if status:
            raise UserError(f"{case} does not run: {job.output.read_text()}")
        self.life = time.monotonic() - job.begun
        self.expected = outcome(case, base)

    def new_base(self, name: str) -> Path:
        base = self.folder / f"{str(self.case).replace(' ', '')}_{name}"
        shutil.copytree(self.folder / "start", base)
        return base

    def one_run(self, most_kills: int) -> int:
        """A run from its beginning to its end, with at most `most_kills` kills. Returns how many there were."""
        rng, tally, num_kills = self.rng, self.tally, 0
        base = self.new_base(str(tally.runs))
        run = self.case.run_folder(base)
        flags = ["--resume", "--save-every", str(rng.randint(1, 4)), "--keep-last", str(rng.randint(0, 2))]
        tally.runs += 1
        while True:
            before, job, struck = newest(run), Job(self.case, self.folder, base, flags), 0
            while num_kills < most_kills and (number := self.strike(job)):
                num_kills, struck = num_kills + 1, number
                if not (self.case.has_launcher and self.still_lives(job)):
                    break
            status, said = job.wait(), job.output.read_text()
            self.check(run, before, struck, status, said)
            if job.hung:
                tally.faults.append(f"{base.name} did not end within {END_SECONDS:.0f} s: {said}")
            if status == 0:
                break
            if not struck:
                tally.faults.append(f"{base.name} ended with status {status}: {said[-2000:]}")
                return num_kills
        found = outcome(self.case, base)
        wrong = [str(key) for key in self.expected | found if self.expected.get(key) != found.get(key)]
        if wrong:
            tally.faults.append(f"{base.name} differs from the reference in {', '.join(wrong)}")
        else:
            shutil.rmtree(base)
        return num_kills

    def still_lives(self, job: Job) -> bool:
        """Whether torchrun goes on after a signal: it starts the workers again when one of them was killed."""
        return job.sleep_until(time.monotonic() - job.begun + self.first)

    def strike(self, job: Job) -> int:
        """Send a signal to `job` at a random moment. Returns its number, 0 if the run ended before."""
        rng, first = self.rng, self.first if self.case.has_launcher else 0.0
        is_patient = rng.random() < SAVING_SHARE
        if not job.sleep_until(max(first, time.monotonic() - job.begun) + rng.uniform(0, self.life - first)):
            return 0
        while is_patient and job.living() and not job.is_saving():
            time.sleep(POLL_SECONDS)
        if is_patient:
            time.sleep(rng.uniform(0, 0.01))
        victims = job.victims()
        if not job.living():
            return 0
        number = rng.choice(SIGNALS)
        self.tally.saving += job.is_saving()
        chosen = victims if rng.random() < 0.5 else [rng.choice(victims)]
        if self.case.has_launcher and number == signal.SIGKILL and victims[0] in chosen:
            chosen = victims  # else torchrun would leave its workers behind
        for pid in chosen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
        self.tally.kills[number.name] += 1
        return number

    def check(self, run: Path, before: int, struck: int, status: int, said: str) -> None:
        """Note as a fault what must not be after a start at the checkpoint `before`, and after a signal."""
        after, faults = newest(run), self.tally.faults
        if after < before:
            faults.append(f"{run}: the newest checkpoint was {before} and is {after} now")
        for step in map(int, re.findall(r"resumed at step ([\d,]+)", said.replace(",", ""))):
            if step < before:
                faults.append(f"{run}: resumed at {step}, not at {before}")
        if stopped := re.search(r"stopped by SIG\w+ at step ([\d,]+)", said):
            self.tally.stops += 1
            if int(stopped[1].replace(",", "")) != after:
                faults.append(f"{run}: stopped at step {stopped[1]}, but the newest checkpoint is {after}")
        if "Traceback" in said and self.case.num_processes == 1:
            faults.append(f"{run}: after signal {struck}, status {status}: {said[-2000:]}")


def prepare(folder: Path) -> None:
    """Make text, conversations and questions, and train the models from which the stages start."""
    rng = random.Random(0)
    (folder / "data").mkdir()
    for i in range(4):
        texts = [" ".join(rng.choices(WORDS, k=rng.randrange(5, 120))) for _ in range(60)]
        pq.write_table(pa.table({"text": texts}), folder / "data" / f"shard_{i}.parquet")
    turns = lambda answer: [  # noqa: E731
        {"role": "user", "content": " ".join(rng.choices(WORDS, k=3))}, {"role": "assistant", "content": answer()},
    ]  # fmt: skip
    for name, answer in {
        "own.jsonl": lambda: " ".join(rng.choices(WORDS, k=4)), "questions.jsonl": lambda: f"#### {rng.randrange(9)}",
    }.items():  # fmt: skip
        (folder / name).write_text("\n".join(json.dumps(turns(answer)) for _ in range(80)))
    env = ENVIRONMENT | {"NANOCHAT_BASE_DIR": str(folder / "start")}
    for script, flags in {
        "tok_train": "--data data --vocab-size 300", "base_train": f"{BASE} source {BASE_TASK} --num-steps 4",
        "mid_train": f"{CHAT} --num-steps 2", "chat_sft": f"{CHAT} --num-steps 2",
    }.items():  # fmt: skip
        output = folder / f"{script}.out"
        pid = fork(lambda: run_script(f"scripts.{script}", flags.split()), folder, env, output)  # noqa: B023
        if os.waitpid(pid, 0)[1]:
            raise UserError(f"{script} does not run: {output.read_text()}")
    (folder / "start" / "report" / "records.jsonl").unlink()


def kill_stages(args: argparse.Namespace, folder: Path) -> tuple[dict, list[str]]:
    for script in STAGES:  # what they import, once for all forks
        importlib.import_module(f"scripts.{script}")
    gc.freeze()  # or every fork would copy all of it at its first collection
    prepare(folder)
    numbers = [int(num) for num in args.processes if num != "torchrun"]
    cases = [Case(script, num) for num in numbers for script in args.stages]
    if "torchrun" in args.processes:
        cases.append(Case("base_train", 2, has_launcher=True))
    rng, num_kills = random.Random(args.seed), 0
    killers = [Killer(case, folder, rng) for case in cases]
    for number in range(10 * args.kills):
        if num_kills >= args.kills:
            break
        killer = killers[number % len(killers)]
        num_kills += killer.one_run(min(MOST_KILLS, args.kills - num_kills))
    print(f"{'stage x processes':<26} seconds  runs  kills  SIGKILL SIGTERM SIGINT  while saving  stopped  faults")
    totals = {}
    for killer in killers:
        tally, kills = killer.tally, killer.tally.kills
        totals[str(killer.case)] = {
            "runs": tally.runs, "kills": dict(kills), "while_saving": tally.saving, "stopped": tally.stops,
            "faults": tally.faults,
        }  # fmt: skip
        counts = "".join(f"{kills[number.name]:>8}" for number in SIGNALS)
        print(f"{killer.case!s:<26} {killer.life:>7.1f} {tally.runs:>5} {kills.total():>6} {counts} {tally.saving:>12} "
              f"{tally.stops:>8} {len(tally.faults):>7}")  # fmt: skip
    return totals, [fault for killer in killers for fault in killer.tally.faults]


# --- speedrun.sh ---------------------------------------------------------------------------------


def start_speedrun(base: Path, num_steps: int) -> subprocess.Popen:
    env = os.environ | {"NANOCHAT_BASE_DIR": str(base), "NUM_STEPS": str(num_steps)}
    with open(base.with_suffix(".out"), "a") as output:
        return subprocess.Popen(
            ["bash", "speedrun.sh"], cwd=ROOT, env=env, stdout=output, stderr=output, start_new_session=True
        )


def report_lines(base: Path) -> list[str]:
    """The report without times: rendered from records that have none, and without the picture of the speed."""
    os.environ["NANOCHAT_BASE_DIR"] = str(base)
    records, broken = read_records()
    parts = ("settings", "results", "table")
    records = [replace(one, time=0.0, **{part: timeless(getattr(one, part)) for part in parts}) for one in records]
    markdown, pictures = render(records, broken)
    digests = [
        f"{name} {hashlib.sha256(png).hexdigest()}" for name, png in pictures.items() if "per-second" not in name
    ]
    return markdown.splitlines() + digests


def kill_speedrun(args: argparse.Namespace, folder: Path) -> tuple[dict, list[str]]:
    rng, kills, faults, begun = random.Random(args.seed), Counter(), [], time.monotonic()
    if start_speedrun(folder / "undisturbed", args.num_steps).wait():
        raise UserError(f"speedrun.sh does not run: {folder / 'undisturbed.out'}")
    life, expected = time.monotonic() - begun, report_lines(folder / "undisturbed")
    stage_seconds = life / num_stages(folder / "undisturbed")
    print(f"undisturbed: {life:.0f} s, {len(expected)} lines of the report", flush=True)
    for number in itertools.count(1):
        base, status = folder / f"killed_{number}", -1
        while status < 0:
            process, is_last = start_speedrun(base, args.num_steps), kills.total() == args.kills
            in_stage = math.inf if is_last else num_stages(base) + rng.randint(1, 3)
            while process.poll() is None and num_stages(base) < in_stage:
                time.sleep(0.1)
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = process.wait(rng.uniform(0, 2 * stage_seconds))
            if process.poll() is None:
                chosen = rng.choice(SIGNALS)
                os.killpg(process.pid, chosen)
                kills[chosen.name] += 1
                process.wait()
                wait_for_group(process.pid)
                last = base.with_suffix(".out").read_text().splitlines()[-1:]
                print(f"{time.monotonic() - begun:>6.0f} s {chosen.name} at: {' '.join(last)[:90]}", flush=True)
        found = report_lines(base) if status == 0 else []
        faults += [f"{base.name} ended with status {status}"] if status else []
        faults += [f"the report of {base.name} lacks {line[:200]}" for line in expected if line not in found]
        faults += [f"the report of {base.name} has {line[:200]}" for line in found if line not in expected]
        print(f"{base.name}: {kills.total()} kills so far, {len(faults)} faults", flush=True)
        if kills.total() == args.kills:
            break
    return {"runs": number, "kills": dict(kills), "seconds": life, "lines": len(expected)}, faults


def num_stages(base: Path) -> int:
    """How many stages speedrun.sh has begun, those it began again after a kill counted each time."""
    return len(re.findall(r"^== (?!finished before)", base.with_suffix(".out").read_text(), re.MULTILINE))


def wait_for_group(group: int) -> None:
    """Wait until all processes of a group have ended; kill those that have not after a few seconds."""
    deadline = time.monotonic() + GRACE_SECONDS
    with contextlib.suppress(ProcessLookupError):
        while True:
            os.killpg(group, signal.SIGKILL if time.monotonic() > deadline else 0)
            time.sleep(0.01)


def main(args: argparse.Namespace) -> None:
    torch.set_num_threads(1)  # of the forks: so sums are done in the same order
    folder = Path(tempfile.mkdtemp(prefix="kill_test_"))
    figures, faults = (kill_speedrun if args.speedrun else kill_stages)(args, folder)
    print(json.dumps({"settings": vars(args), "figures": figures, "faults": faults}))
    if faults:
        print("\n".join(faults), file=sys.stderr)
        print(f"see {folder}", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(folder)


if __name__ == "__main__":
    run_main(main, parse_args)
