"""Every script as a process of its own: the pipeline in miniature, resuming, several processes, and users' mistakes."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from conftest import WORDS, make_text, write_shard

from nanochat.checkpoint import run_dir, save_checkpoint
from nanochat.common import Runtime
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.tokenizer import Tokenizer

ROOT = Path(__file__).parent.parent
SCRIPTS = sorted(f"scripts.{path.stem}" for path in (ROOT / "scripts").glob("[!_]*.py"))
COMMANDS = [*SCRIPTS, "nanochat.data.dataset", "nanochat.report"]

TINY = (
    "--depth 2 --head-dim 32 --sequence-len 32 --device-type cpu --dtype float32 --total-batch-size 256 "
    "--device-batch-size 2 --eval-tokens 512 --model-tag tiny"
).split()
LAST, SAVE_EVERY = 9, 3
SCHEDULE = ["--num-steps", str(LAST), "--save-every", str(SAVE_EVERY), "--eval-every", "4"]

# Starting Python with torch takes seconds. This program does so once, then reads lines of JSON, each a list of commands
# to run at the same time, and forks for each; `before` is Python text run in the child, to break something there.
FORKER = """
import gc, json, os, runpy, sys, traceback
import torch.fx.experimental.symbolic_shapes  # what PyTorch would import late, at the first model
from nanochat import checkpoint, report
from nanochat.data import dataset
from nanochat.evals import core_eval, loss_eval
from nanochat.training import optim, recipe, loop as training

gc.freeze()  # or every child would copy all of it at its first collection
for line in sys.stdin:
    children = []
    for command in json.loads(line):
        children.append(os.fork())
        if children[-1] == 0:
            sys.stdin.close()
            for number, path in ((1, command["stdout"]), (2, command["stderr"])):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ.update(command["environment"])
            os.chdir(command["folder"])
            sys.argv = [command["module"], *command["args"]]
            sys.modules.pop(command["module"], None)
            status = 0
            try:
                exec(command["before"])
                runpy.run_module(command["module"], run_name="__main__", alter_sys=True)
            except SystemExit as end:
                status = end.code or 0
            except BaseException:
                traceback.print_exc()
                status = 1
            sys.stdout.flush()
            os._exit(status)  # taking the interpreter down in good order is most of a short command's time
    print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]), flush=True)
"""


def environment(base):
    """One thread, so that sums are done in the same order; nothing of the user's settings or home folder."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("NANOCHAT_", "HF_", "WANDB_"))}
    own = {"NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    return kept | own | {"HOME": str(Path(base).parent), "CUDA_VISIBLE_DEVICES": ""}


@dataclass
class Ended:
    """A process that has ended: its exit status (negative: the signal) and what it wrote."""

    status: int
    stdout: str
    stderr: str


def run_apart(args, folder, base):
    """Run `python args` in `folder`, in an interpreter of its own."""
    ended = subprocess.run(
        [sys.executable, *args],
        cwd=folder,
        env=environment(base),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


@dataclass
class Workplace:
    """A folder with a data set `data` and base folders; scripts run in it."""

    folder: Path
    forker: subprocess.Popen
    numbers: Iterator[int] = field(default_factory=itertools.count)

    @property
    def data(self):
        return self.folder / "data"

    @property
    def base(self):
        return self.folder / "base"

    def run(self, module, *args, base=None, before="", num_processes=1):
        """Run `python -m module args` to its end; with several processes, each is told its rank as by torchrun."""
        common = environment(base or self.base)
        if num_processes > 1:
            common |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(num_processes)}
        commands = []
        for rank in range(num_processes):
            output = self.folder / str(next(self.numbers))
            ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if num_processes > 1 else {}
            commands.append({
                "module": module, "args": list(map(str, args)), "before": before, "folder": str(self.folder),
                "stdout": f"{output}.out", "stderr": f"{output}.err", "environment": common | ranks,
            })  # fmt: skip
        self.forker.stdin.write(json.dumps(commands) + "\n")
        self.forker.stdin.flush()
        statuses = json.loads(self.forker.stdout.readline())
        texts = ("".join(Path(command[stream]).read_text() for command in commands) for stream in ("stdout", "stderr"))
        return Ended(max(statuses, key=abs), *texts)

    def run_well(self, module, *args, **options):
        ended = self.run(module, *args, **options)
        assert ended.status == 0, ended
        assert ended.stderr == ""
        return ended.stdout

    def train(self, *args, **options):
        return self.run("scripts.base_train", *TINY, *SCHEDULE, "--data", self.data, *args, **options)

    def train_well(self, *args, **options):
        return self.run_well("scripts.base_train", *TINY, *SCHEDULE, "--data", self.data, *args, **options)

    def copy_base(self, name, *, first_steps=LAST, source="base"):
        """A copy of the base folder, with the checkpoints of a stage up to step `first_steps`."""
        copy = self.folder / name
        shutil.copytree(self.base, copy)
        for path in run_folder(copy, source).glob("step_*"):
            if int(path.name.removeprefix("step_")) > first_steps:
                shutil.rmtree(path)
        return copy

    def copy_part(self, name, part):
        """A base folder with nothing but a copy of one folder of the base folder."""
        shutil.copytree(self.base / part, self.folder / name / part)
        return self.folder / name


@contextmanager
def working_in(folder, **variables):
    """A workplace, its processes forks of one interpreter."""
    command, pipe = [sys.executable, "-c", FORKER], subprocess.PIPE
    variables = environment(folder / "base") | variables
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables) as forker:
        yield Workplace(folder, forker)
        forker.stdin.close()


def save_random_model(base, source, *, meta):
    """A checkpoint of a stage with a context of 64 tokens, step 7."""
    rng = random.Random(0)
    tokenizer = Tokenizer.train([make_text(rng, 100) for _ in range(100)], 400)
    config = GPTConfig.from_depth(2, vocab_size=400, sequence_len=64, head_dim=32)
    model = build_model(config, generator=torch.Generator().manual_seed(0))
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(base))
        save_checkpoint(run_dir(source, "tiny"), 7, runtime=runtime, model=model, tokenizer=tokenizer, meta=meta)


def free_port():
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return probe.getsockname()[1]


def run_folder(base, source="base"):
    return base / f"{source}_checkpoints" / "tiny"


def metrics(base, source="base"):
    """The numbers of the run by step and name, except those of the clock."""
    lines = [json.loads(line) for line in (run_folder(base, source) / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train_loss" in line]
    assert steps == sorted(set(steps))
    is_clock = lambda name: name in ("step", "mfu") or "second" in name  # noqa: E731
    return {(line["step"], name): value for line in lines for name, value in line.items() if not is_clock(name)}


def losses(base):
    return {key: value for key, value in metrics(base).items() if key[1] in ("train_loss", "val_bpb")}


def hashes(base, step, source="base"):
    """Digests of all tensors of a checkpoint."""
    paths = (run_folder(base, source) / f"step_{step:06d}").glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def records(base):
    return [json.loads(line) for line in (base / "report" / "records.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """Shards, a bundle of tasks, and a base folder where tokenizer and model have been trained."""
    folder = tmp_path_factory.mktemp("scripts")
    rng = random.Random(0)
    for i in range(4):
        texts = [make_text(rng, rng.randrange(5, 120)) for _ in range(60)]
        write_shard(folder / "data" / f"shard_{i}.parquet", texts, row_group_size=40)
    write_bundle(folder / "bundle")
    with working_in(folder) as place:
        place.run_well("nanochat.report", "reset")
        place.run_well("scripts.tok_train", "--data", place.data, "--vocab-size", 400)
        place.train_well("--sample-every", LAST)
        yield place


def write_bundle(folder):
    """A miniature of the CORE tasks, one of each kind."""
    tasks = {
        "multiple_choice": [{"query": f"Is {i} even?", "choices": ["yes", "no"], "gold": i % 2} for i in range(6)],
        "schema": [{"context_options": ["The sun", "A stone"], "continuation": "shines", "gold": 0}] * 3,
        "language_modeling": [{"context": f"{i} river", "continuation": "stone"} for i in range(4)],
    }
    entries = [
        {"label": kind, "dataset_uri": f"{kind}.jsonl", "num_fewshot": [1], "icl_task_type": kind} for kind in tasks
    ]
    (folder / "eval_data").mkdir(parents=True)
    for kind, lines in tasks.items():
        (folder / "eval_data" / f"{kind}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))  # JSON is YAML
    baselines = "".join(f"{kind},mini,{25 * (kind == 'multiple_choice')}\n" for kind in tasks)
    (folder / "eval_meta_data.csv").write_text(f"Eval Task,Task Category,Random baseline\n{baselines}")


# --- the pipeline ---
def test_training_logs_every_step_and_learns(workplace):
    values = metrics(workplace.base)
    train_losses = [values[step, "train_loss"] for step in range(1, LAST + 1)]
    assert train_losses[-1] < train_losses[0]
    assert {step for step, name in values if name == "val_bpb"} == {4, 8, LAST}
    assert values[LAST, "tokens"] == LAST * 256


NO_REFERENCES = """
import tiktoken
def get_encoding(name):
    raise OSError("no network")
tiktoken.get_encoding = get_encoding
"""


def test_each_stage_runs_and_the_report_shows_it(workplace):
    on_cpu = ["--device-type", "cpu", "--dtype", "float32"]
    out = workplace.run_well("scripts.base_loss", *on_cpu, "--split-tokens", 0, "--sample-tokens", 4)
    assert "val" in out
    assert "train" in out
    bundle = workplace.folder / "bundle"
    out = workplace.run_well("scripts.base_eval", *on_cpu, "--bundle", bundle, "--max-per-task", 3)
    assert "; guessing has 0\n" in out
    (record,) = (record for record in records(workplace.base) if record.get("stage") == "base_eval")
    assert f"guessing has {record['results']['baseline']:.4f}" in out
    assert record["results"]["baseline"] == pytest.approx(
        sum(row["baseline"] for row in record["table"]) / len(record["table"])
    )
    flags = ["--data", workplace.data, "--max-chars", 500]
    out = workplace.run_well("scripts.tok_eval", *flags, before=NO_REFERENCES)
    assert all(name in out for name in ("news", "Korean", "data, val", "GPT-4: skipped, cannot be loaded"))
    workplace.run_well("nanochat.report", "generate")
    text = (workplace.folder / "report.md").read_text()
    assert text == (workplace.base / "report" / "report.md").read_text()
    stages = {record.get("stage") for record in records(workplace.base)}
    assert {"tok_train", "base_train", "base_loss", "base_eval"} <= stages
    assert "core" in text
    assert "val_bpb" in text


def test_core_is_evaluated_while_training(workplace):
    base = workplace.copy_base("core", first_steps=6)
    out = workplace.train_well("--resume", "--core-every", "3", "--bundle", workplace.folder / "bundle", base=base)
    assert "CORE" in out
    assert {step for step, name in metrics(base) if name == "core"} == {LAST}
    assert losses(base) == losses(workplace.base)  # looking on changes nothing


def test_a_dry_run_needs_nothing_writes_nothing_and_plans_for_the_usual_vocabulary_whatever_is_at_hand(workplace):
    base = workplace.folder / "dry"
    out = workplace.run_well("scripts.base_train", "--dry-run", "--depth", 4, "--num-gpus", 8, base=base)
    plan = json.loads(out.splitlines()[-1])
    assert plan["num_steps"] > 0
    assert plan["num_shards"] > 0
    assert not list(base.rglob("*.*"))
    assert "vocabulary 32,768\n" in out
    told = workplace.run_well("scripts.base_train", "--dry-run", "--depth", 4)
    assert "vocabulary 32,768 (the usual one; for that of the tokenizer here: --vocab-size 400)\n" in told
    assert "vocabulary 400\n" in workplace.run_well(
        "scripts.base_train", "--dry-run", "--depth", 4, "--vocab-size", 400
    )
    assert "vocabulary 65,536 (" in workplace.run_well("scripts.base_train", "--dry-run", "--arch", "october-2025")


def test_a_model_far_too_large_for_a_cpu_is_refused_before_it_is_made(workplace):
    base, data = workplace.copy_part("cpu", "tokenizer"), ("--data", workplace.data, "--device-type", "cpu")
    slow = workplace.run("scripts.base_train", *data, "--depth", 12, base=base)
    assert (slow.status, slow.stderr.count("\n")) == (2, 1)
    assert re.search(r"error: --depth 12: [\d,]+ tokens take [\d,]+ days or more on this CPU; .*--dry-run", slow.stderr)
    for flags in (("--num-steps", 3), ("--minutes", 1)):
        large = workplace.run("scripts.base_train", *data, "--depth", 96, *flags, base=base)
        assert large.status == 2
        assert re.search(r"--depth 96 needs \d+ GiB of memory at least, and this machine has \d+; ", large.stderr)
    assert not (base / "base_checkpoints").exists()


# --- resuming ---
DIE_AFTER_LOGGING = """
import signal
from nanochat.training.metrics import MetricsLog
log = MetricsLog.log
def log_and_die(self, **numbers):
    log(self, **numbers)
    if numbers["step"] == {step} and "train_loss" in numbers:
        os.kill(os.getpid(), signal.SIGKILL)
MetricsLog.log = log_and_die
"""

DIE_WHILE_SAVING = """
import signal
from nanochat import checkpoint
from nanochat.tokenizer import Tokenizer
save = Tokenizer.save
def save_and_die(self, folder):
    save(self, folder)
    if "{step:06d}" in str(folder):
        os.kill(os.getpid(), signal.SIGKILL)
Tokenizer.save = save_and_die
"""


def test_a_run_killed_again_and_again_ends_as_one_never_interrupted(workplace):
    base = workplace.copy_part("killed", "tokenizer")
    kills = [
        (DIE_AFTER_LOGGING.format(step=2), 0),  # before the first checkpoint
        (DIE_WHILE_SAVING.format(step=6), 3),
        (DIE_AFTER_LOGGING.format(step=5), 3),
        (DIE_AFTER_LOGGING.format(step=8), 6),
    ]
    for before, newest in kills:
        assert workplace.train("--resume", "--sample-every", LAST, base=base, before=before).status == -9
        complete = {int(path.name.removeprefix("step_")) for path in run_folder(base).glob("step_*")}
        assert complete <= {step for step in (3, 6) if step <= newest}  # the last one may have been on its way
    workplace.train_well("--resume", "--sample-every", LAST, "--recompute", base=base)  # which changes no number
    logged = metrics(base)
    workplace.train_well("--resume", base=base)  # a finished run does nothing more
    assert metrics(base) == logged
    assert losses(base) == losses(workplace.base)
    for step in (3, 6, LAST):
        assert hashes(base, step) == hashes(workplace.base, step)
    assert len(hashes(base, LAST)) == 3
    assert not list(run_folder(base).glob(".*"))


def test_a_shard_added_before_resuming_is_named_and_changes_nothing_and_one_taken_away_is_refused(workplace):
    base, data = workplace.copy_part("grown", "tokenizer"), workplace.folder / "grown_data"
    shutil.copytree(workplace.data, data)
    died = workplace.train("--data", data, base=base, before=DIE_AFTER_LOGGING.format(step=5))
    assert died.status == -9
    last = sorted(data.glob("*.parquet"))[-1]
    write_shard(data / "z.parquet", ["a new document"])
    out = workplace.train_well("--data", data, "--resume", base=base)
    assert "z.parquet is new" in out
    assert losses(base) == losses(workplace.base)
    assert hashes(base, LAST) == hashes(workplace.base, LAST)
    last.rename(data / "elsewhere")
    assert_refused(workplace.train("--data", data, "--resume", base=base), f"{last.name} is gone")


STUB_OF_WANDB = """
import sys, types
class Stub(types.ModuleType):
    class errors:
        Error = ConnectionError
    def init(self, *, id, name, dir, **other):
        self.id = id or "a-new-one"
        print("wandb", id, name, dir)
        return self
    def log(self, numbers, step): pass
    def finish(self): pass
sys.modules["wandb"] = Stub("wandb")
"""


def test_a_resumed_run_is_the_same_run_on_wandb(workplace):
    base = workplace.copy_part("wandb", "tokenizer")
    assert f"wandb None d2 {base}" in workplace.train_well("--run", "d2", base=base, before=STUB_OF_WANDB)
    shutil.rmtree(run_folder(base) / f"step_{LAST:06d}")
    out = workplace.train_well("--run", "d2", "--resume", base=base, before=STUB_OF_WANDB)
    assert f"wandb a-new-one d2 {base}" in out


SIGNAL_AFTER_LOGGING = """
import signal
from nanochat.training.run import TrainingRun
take_step = TrainingRun.take_step
def take_step_and_signal(self, step):
    take_step(self, step)
    if step + 1 == {step} and self.runtime.rank == {rank}:
        os.kill(os.getpid(), signal.{name})
TrainingRun.take_step = take_step_and_signal
"""


@pytest.mark.parametrize(
    ("name", "status", "num_processes"), [("SIGTERM", 143, 1), ("SIGINT", 130, 1), ("SIGTERM", 143, 2)]
)
def test_a_signal_saves_at_the_next_step_on_all_ranks_and_the_run_goes_on_from_there(
    workplace, name, status, num_processes
):
    base = workplace.copy_part(f"{name}_{num_processes}", "tokenizer")
    before = SIGNAL_AFTER_LOGGING.format(step=5, rank=num_processes - 1, name=name)
    ended = workplace.train("--sample-every", LAST, base=base, before=before, num_processes=num_processes)
    assert ended.status == status, ended
    assert f"stopped by {name} at step 5: the same command with --resume goes on from here" in ended.stdout
    assert sorted(path.name for path in run_folder(base).glob("*step_*")) == ["step_000003", "step_000005"]
    workplace.train_well("--resume", "--sample-every", LAST, base=base)
    if num_processes == 1:
        assert losses(base) == losses(workplace.base)
        assert hashes(base, LAST) == hashes(workplace.base, LAST)
    else:
        assert losses(base) == pytest.approx(losses(workplace.base), rel=1e-5)


def test_two_processes_under_torchrun_have_the_losses_of_one_which_can_take_over(workplace):
    expected, base = losses(workplace.base), workplace.copy_part("both", "tokenizer")
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.base_train", "--"]
    ended = run_apart([*command, *TINY, *SCHEDULE, "--data", str(workplace.data)], workplace.folder, base)
    assert ended.status == 0, ended
    assert losses(base) == pytest.approx(expected, rel=1e-5)

    for step in (6, LAST):
        shutil.rmtree(run_folder(base) / f"step_{step:06d}")
    assert "resumed at step 3" in workplace.train_well("--resume", "--device-batch-size", "4", base=base)
    assert losses(base) == pytest.approx(expected, rel=1e-5)


RECORD_ROWS = """
from nanochat.training.run import TrainingRun
update = TrainingRun.update
def update_and_record(self, step, batches):
    rows = [row for batch in batches for row in batch.idx.tolist()]
    with open("{path}", "a") as file:
        file.write("".join(json.dumps([step, row]) + chr(10) for row in rows))
    return update(self, step, batches)
TrainingRun.update = update_and_record
"""


def check_elastic(place, run, stops, last, *, name, source):
    """Run a stage, with `run(base, before, num_processes, *flags)`, on 4, 2, 1 and again 4 processes, each but the last
    stopped by a signal after the step in `stops`: the same rows in the same steps as of one process, and its numbers.
    """
    part = {"base": "tokenizer", "mid": "base_checkpoints", "sft": "base_checkpoints"}[source]
    whole, base = (place.copy_part(f"{name}_{kind}", part) for kind in ("whole", "elastic"))
    records = [place.folder / f"{name}_{kind}.jsonl" for kind in ("whole", "elastic")]
    assert run(whole, RECORD_ROWS.format(path=records[0]), 1).status == 0
    for num_processes, first, stop in zip((4, 2, 1, 4), (0, *stops), (*stops, last), strict=True):
        before = RECORD_ROWS.format(path=records[1]) + SIGNAL_AFTER_LOGGING.format(step=stop, rank=0, name="SIGTERM")
        ended = run(base, before, num_processes, "--resume")
        assert ended.status == (0 if stop == last else 143), ended
        assert f"resumed at step {first}" in ended.stdout or not first
    assert metrics(base, source) == pytest.approx(metrics(whole, source), rel=1e-4)
    one, many = (sorted(map(json.loads, path.read_text().splitlines())) for path in records)
    assert one == many
    return one


def test_four_two_one_and_again_four_processes_read_the_documents_of_one(workplace):
    def run(base, before, num_processes, *flags):
        return workplace.train(*flags, base=base, before=before, num_processes=num_processes)

    rows = check_elastic(workplace, run, (2, 4, 6), LAST, name="base", source="base")
    assert len(rows) == LAST * 256 // 32


def test_processes_that_cannot_share_the_data_are_refused_with_one_line_each(workplace):
    base = workplace.copy_base("three", first_steps=3)
    ended = workplace.train("--resume", "--device-batch-size", "1", base=base, num_processes=3)
    assert ended.status == 2
    lines = ended.stderr.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("error: ") for line in lines)


# --- mistakes ---
def assert_refused(ended, *words):
    """One line that says what is wrong, exit status 2, no traceback."""
    assert ended.status == 2, ended
    assert ended.stderr.startswith("error: "), ended.stderr
    assert ended.stderr.count("\n") == 1, ended.stderr
    for word in words:
        assert str(word) in ended.stderr


@pytest.mark.parametrize(
    "flags",
    [
        "--depth 0", "--sequence-len 0", "--head-dim 0", "--head-dim 33",
        "--kv-ratio 0", "--kv-ratio 3", "--window-pattern SX", "--num-steps 0", "--num-steps -1",
        "--num-steps 4 --minutes 1", "--token-ratio -1", "--token-ratio nan", "--token-ratio inf",
        "--target-flops 0", "--target-flops 1", "--target-flops inf", "--minutes nan",
        "--total-batch-size -1", "--total-batch-size 100", "--device-batch-size -1", "--device-batch-size 3",
        "--eval-every -1", "--eval-tokens -1", "--save-every -1", "--core-every -1",
        "--warmup-steps -1", "--warmdown-frac 1.5", "--warmdown-frac nan",
        "--final-lr-frac -0.1", "--lr-mult -1", "--lr-mult nan", "--weight-decay -1",
        "--dtype float12", "--device-type tpu", "--device-type cuda", "--attention flex", "--model-tag a/b",
        "--model-tag ..", "--dry-run --minutes 1", "--dry-run --num-gpus 0", "--dry-run --vocab-size -1",
    ],
)  # fmt: skip
def test_a_flag_out_of_range_is_refused(workplace, flags):
    base = workplace.folder / "flags"
    if not base.exists():
        workplace.copy_part("flags", "tokenizer")
    tiny = [*TINY[:-2], "--model-tag", "fresh", "--data", str(workplace.data)]
    if not any(horizon in flags for horizon in ("--num-steps", "--token-ratio", "--target-flops", "--minutes")):
        tiny += ["--num-steps", "2", "--eval-every", "0"]
    ended = workplace.run("scripts.base_train", *tiny, *flags.split(), base=base)
    assert_refused(ended)
    assert not list(base.rglob("model.safetensors"))


@pytest.mark.parametrize(("command", "words"), [
    ("scripts.tok_train --vocab-size 10", ["--vocab-size must be", "not 10"]),
    ("scripts.tok_train --vocab-size 99999999", ["--vocab-size must be", "not 99999999"]),
    ("scripts.tok_train --vocab-size 60000", ["smaller --vocab-size"]),
    ("scripts.tok_train --max-chars -1", ["--max-chars must be a number of 0 or more, not -1"]),
    ("scripts.tok_train --doc-cap -1", ["--doc-cap must be a number of 0 or more, not -1"]),
    ("scripts.base_loss --split-tokens -1", ["--split-tokens"]), ("scripts.base_loss --source sft", ["no sft check"]),
    ("scripts.base_loss --device-batch-size 0", ["--device-batch-size"]),
    ("scripts.base_loss --sample-tokens -1", ["--sample-tokens"]),
    ("scripts.base_loss --step 5", ["no checkpoint of step 5", "3, 6, 9"]),
    ("scripts.base_loss --model-tag other", ["no base checkpoint with --model-tag 'other' in", "there are tiny"]),
    ("scripts.base_loss --dtype float12", ["--dtype must be one of", "not 'float12'"]),
    ("scripts.base_eval --max-per-task -1", ["--max-per-task -1"]),
    ("scripts.base_eval --batch-tokens -1", ["--batch-tokens -1"]),
    ("scripts.base_eval --bundle missing.zip", ["no evaluation bundle at missing.zip"]),
    ("scripts.base_eval --bundle data", ["holds no core.yaml"]),
    ("scripts.base_eval --hf-path missing", ["--hf-path missing cannot be loaded"]),
    ("nanochat.data.dataset -n 0", ["-n 0 is out of range"]), ("nanochat.data.dataset -n -2", ["-n -2 is out of"]),
    ("nanochat.data.dataset --workers 0", ["--workers 0 is out of"]), ("nanochat.data.dataset --data none", ["none"]),
    ("nanochat.report reset --dollars-per-gpu-hour -1", ["-1.0 is not a price"]),
    ("scripts.base_train", ["--resume", "--model-tag"]),  # an earlier run is not overwritten
])  # fmt: skip
def test_a_mistake_is_named(workplace, command, words):
    module, *flags = command.split()
    if module == "scripts.base_train":
        flags += [*TINY, *SCHEDULE]
    if "--data" not in flags and module in ("scripts.tok_train", "scripts.base_train"):
        flags += ["--data", "data"]
    if module in ("scripts.base_loss", "scripts.base_eval"):
        flags += ["--device-type", "cpu"] + ([] if "--dtype" in flags else ["--dtype", "float32"])
    assert_refused(workplace.run(module, *flags), *words)


@pytest.mark.parametrize("module", ["scripts.tok_train", "scripts.base_train"])
def test_missing_data_is_named_with_the_command_that_gets_it(workplace, module):
    options = TINY[:-2] if module == "scripts.base_train" else ()
    for data in ("some-one/some-data", "data/shard_0.parquet"):
        ended = workplace.run(module, *options, "--data", data)
        assert_refused(ended, data, "python -m nanochat.data.dataset")


def test_a_shard_that_was_there_and_is_gone_is_named(workplace):
    base, source = workplace.copy_part("gone", "tokenizer"), workplace.folder / "texts.txt"
    source.write_text("\n\n".join(make_text(random.Random(i), 400) for i in range(40)))
    workplace.run_well("nanochat.data.dataset", "--data", source, base=base)
    shard = sorted((base / "data").rglob("*.parquet"))[0]
    shard.unlink()
    ended = workplace.run("scripts.base_train", *TINY, *SCHEDULE, "--data", source, base=base)
    assert_refused(ended, shard.name)


def test_no_tokenizer_or_another_than_the_checkpoint_was_trained_with_is_refused(workplace):
    assert_refused(workplace.train(base=workplace.folder / "none"), "no tokenizer", "scripts.tok_train")
    base = workplace.copy_base("other_tokenizer", first_steps=3)
    for flags, words in ((["--vocab-size", 300], ("300", "400")), (["--vocab-size", 400, "--doc-cap", 40], ())):
        workplace.run_well("scripts.tok_train", "--data", workplace.data, *flags, base=base)
        assert_refused(workplace.train("--resume", base=base), "tokenizer", *words)


@pytest.mark.parametrize("flags", ["--seed 7", "--num-steps 12", "--depth 3", "--lr-mult 0.5", "--data elsewhere"])
def test_a_flag_changed_on_resuming_is_refused_with_both_values(workplace, flags):
    flag, value = flags.split()
    before = {"--seed": 42, "--num-steps": LAST, "--depth": 2, "--lr-mult": 1.0, "--data": workplace.data}[flag]
    assert_refused(workplace.train("--resume", flag, value), flag, value, before)


def test_a_damaged_checkpoint_is_passed_over_and_kept(workplace):
    base = workplace.copy_base("damaged", first_steps=6)
    path = run_folder(base) / "step_000006" / "optimizer_rank0.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    out = workplace.train_well("--resume", base=base)
    assert "passed over step_000006, which is damaged: optimizer_rank0.safetensors has changed" in out
    assert "resumed at step 3" in out
    assert losses(base) == losses(workplace.base)
    assert hashes(base, 6) == hashes(workplace.base, 6)
    assert (run_folder(base) / "step_000006.damaged1").is_dir()


def test_checkpoints_are_kept_as_asked_and_saved_by_the_clock_too(workplace):
    for flags, kept in (
        ("--save-every 1 --keep-last 2 --keep-every 4", [4, 8, 9]),
        ("--save-every 0 --save-minutes 1e-9", [*range(1, LAST + 1)]),
    ):
        base = workplace.copy_part(f"kept_{len(kept)}", "tokenizer")
        workplace.train_well(*flags.split(), base=base)
        assert sorted(path.name for path in run_folder(base).glob("*step_*")) == [f"step_{step:06d}" for step in kept]
        assert hashes(base, LAST) == hashes(workplace.base, LAST)


SMALL_DISK = """
import collections, shutil
Usage = collections.namedtuple("Usage", "total used free")
shutil.disk_usage = lambda path: Usage(1, 1, {free})
"""


def test_a_disk_that_is_too_small_for_the_run_is_refused_before_its_first_step(workplace):
    base = workplace.copy_part("small_disk", "tokenizer")
    one = sum(path.stat().st_size for path in (run_folder(workplace.base) / "step_000009").glob("[mo]*.safetensors"))
    for flags, num_needed in (("", 3), ("--save-every 1", 9), ("--save-every 1 --keep-last 1 --keep-every 5", 3)):
        ended = workplace.train(*flags.split(), base=base, before=SMALL_DISK.format(free=int((num_needed - 0.5) * one)))
        assert_refused(ended, f"{num_needed} more checkpoints of", "free; make room", "--keep-last")
    assert not list(run_folder(base).iterdir())


@pytest.mark.parametrize("module", ["scripts.base_train", "scripts.tok_train", "scripts.base_loss", "nanochat.report"])
def test_a_base_folder_that_cannot_be_made_is_named(workplace, module):
    in_the_way = workplace.folder / "a_file"
    in_the_way.touch()
    args = {"nanochat.report": ["reset"], "scripts.base_train": TINY}.get(module, [])
    ended = workplace.run(module, *args, base=in_the_way / "base")
    assert_refused(ended, in_the_way, "NANOCHAT_BASE_DIR")


FULL_DISK = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({num_bytes}, {num_bytes}))
"""


def test_a_full_disk_leaves_the_earlier_checkpoint_whole(workplace):
    base = workplace.copy_base("full", first_steps=3)
    for num_bytes in (40_000, 400):  # room for small files but not the weights, and for hardly anything
        ended = workplace.train("--resume", base=base, before=FULL_DISK.format(num_bytes=num_bytes))
        assert_refused(ended, "cannot write")
        assert [path.name for path in run_folder(base).glob("*step_*")] == ["step_000003"]
        assert hashes(base, 3) == hashes(workplace.base, 3)
    workplace.train_well("--resume", base=base)
    assert losses(base) == losses(workplace.base)


def test_a_loss_that_is_no_number_ends_the_run_and_its_process(workplace):
    """In an interpreter of its own, to see it go down in good order while a thread reads ahead."""
    flags = ["--data", str(workplace.data), "--lr-mult", "1e30", "--model-tag", "diverging"]
    command = ["-m", "scripts.base_train", *TINY, *SCHEDULE, *flags]
    ended = run_apart(command, workplace.folder, workplace.base)
    assert ended.status == 1
    assert re.fullmatch(r"error: the loss at step \d+ is nan .*--lr-mult\n", ended.stderr)


BAD_NUMBERS = """
import torch
from nanochat.training import run
accumulate = run.accumulate_gradients
calls = 0
def accumulate_badly(model, batches, *args, **options):
    global calls
    calls += 1
    loss = accumulate(model, batches, *args, **options)
    if calls in {steps} and os.environ.get("RANK", "1") == "1":
        model.lm_head.weight.grad[3] = float("inf")
    return loss
run.accumulate_gradients = accumulate_badly
"""


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_gradient_that_is_not_finite_on_one_rank_ends_the_run_before_anything_is_saved(workplace, num_processes):
    base = workplace.copy_part(f"bad_{num_processes}", "tokenizer")
    ended = workplace.train(base=base, before=BAD_NUMBERS.format(steps=[6]), num_processes=num_processes)
    assert ended.status == 1
    assert ended.stderr.startswith("error: the gradient at step 6 is not finite")
    assert ended.stderr.count("\n") == 1
    assert [path.name for path in run_folder(base).glob("*step_*")] == ["step_000003"]
    assert max(step for step, _ in metrics(base)) == 5
    paths = sorted((run_folder(base) / "bad_steps").iterdir())
    assert [path.name for path in paths] == [f"step_000006_rank{rank}.jsonl" for rank in range(num_processes)]
    lines = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    assert len(lines) == 256 // 32
    assert all(any(word in line["documents"][0] for word in WORDS) for line in lines)
    assert json.loads((run_folder(base) / "status.json").read_text())["state"] == "failed"
    workplace.train_well("--resume", base=base)
    assert losses(base) == pytest.approx(losses(workplace.base), rel=1e-5)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_bad_steps_are_left_out_as_often_as_allowed(workplace, num_processes):
    base = workplace.copy_part(f"skipped_{num_processes}", "tokenizer")
    flags, options = ["--save-every", "1"], {"base": base, "num_processes": num_processes}
    bad = BAD_NUMBERS.format(steps=[4, 6])
    ended = workplace.train(*flags, "--skip-bad-steps", "1", before=bad, **options)
    assert (ended.status, "the gradient at step 6" in ended.stderr) == (1, True)
    assert "the gradient at step 4 is not finite" in ended.stdout
    assert "left out, 1 of at most 1" in ended.stdout
    names = ("model.safetensors", "optimizer_rank0.safetensors")
    three, four, five = (hashes(base, step) for step in (3, 4, 5))
    assert [three[name] == four[name] for name in names] == [True, True]
    assert [four[name] == five[name] for name in names] == [False, False]
    assert sorted(path.name for path in run_folder(base).glob("*step_*"))[-1] == "step_000005"
    ended = workplace.train(
        *flags, "--resume", "--skip-bad-steps", "2", before=BAD_NUMBERS.format(steps=[1]), **options
    )
    assert (ended.status, ended.stderr) == (0, "")
    assert "the gradient at step 6 is not finite" in ended.stdout
    assert "left out, 2 of at most 2" in ended.stdout
    assert hashes(base, 5)["model.safetensors"] == hashes(base, 6)["model.safetensors"]


# --- help and imports ---
@pytest.mark.parametrize("module", COMMANDS)
def test_help_of_every_command_works_and_writes_nothing(workplace, module):
    base = workplace.folder / "help"
    out = workplace.run_well(module, "--help", base=base)
    assert out.startswith("usage: ")
    assert "--help" in out
    assert not base.exists()


def test_importing_the_library_prints_nothing_and_writes_nothing(tmp_path):
    exported = {"configuration_nanochat.py", "modeling_nanochat.py"}  # copied into exports, imported by nothing here
    files = (path for path in (ROOT / "nanochat").rglob("[!_]*.py") if path.name not in exported)
    paths = (path.relative_to(ROOT) for path in files)
    modules = ", ".join(".".join(path.with_suffix("").parts) for path in paths)
    program = f"import sys, {modules}\nassert not {{'wandb', 'matplotlib', 'transformers'}} & set(sys.modules)"
    ended = run_apart(["-c", program], tmp_path, tmp_path / "base")
    assert (ended.status, ended.stdout, ended.stderr) == (0, "", "")
    assert not list(tmp_path.iterdir())
