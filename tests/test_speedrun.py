"""speedrun.sh and its recipes: what they plan, and which stages they run, with stand-ins for set-up and Python."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat import hardware
from nanochat.model.gpt import GPTConfig
from nanochat.training import recipe
from tasks.registry import TASK_NAMES

ROOT = Path(__file__).parent.parent
H100 = "H100 80GB HBM3"
MODELS = {  # of each recipe: configuration, tokens per parameter, batch where it is given
    "speedrun.sh": (GPTConfig.from_depth(24, vocab_size=32768), 12, 0),
    "runs/d26.sh": (GPTConfig.from_depth(26, vocab_size=32768), 27, 0),
    "runs/d32.sh": (GPTConfig.from_depth(32, vocab_size=32768), 29, 0),
    "runs/october2025.sh": (GPTConfig.october_2025(20), 20, 2**19),
}
RECIPES = [*MODELS, "runs/laptop.sh"]
SETUP = """PATH="$PWD/bin:$PATH"
if [ -n "$without_gpu" ] && [ "$FAKE_GPUS" = 0 ]; then echo "$without_gpu" >&2; exit 2; fi
"""

# Answers what speedrun.sh asks about the machine, plans for real, and writes down the stages instead of running them.
PYTHON = """#!/usr/bin/env bash
case "$*" in
*device_count*) echo "$FAKE_GPUS" ;;
*isolation*) echo "${FAKE_NO_ISOLATION:-}" ;;
*append_record*) echo "$3: $4" >>"$FAKE_LOG.skipped" ;;
*wandb.login*) exit "${FAKE_WANDB:-0}" ;;
*--dry-run*) if [ -n "${FAKE_PLAN:-}" ]; then echo "$FAKE_PLAN"; else exec "$REAL_PYTHON" "$@"; fi ;;
*json.load*) exec "$REAL_PYTHON" "$@" ;;
*)
    echo "$(basename "$0") $*" >>"$FAKE_LOG"
    if [[ -n ${FAKE_FAILURE:-} && $* == *"$FAKE_FAILURE"* ]]; then exit 2; fi
    if [[ -n ${FAKE_NO_DATA:-} && $* == *"$FAKE_NO_DATA"* ]]; then
        echo "no $FAKE_NO_DATA; ask" >"$NANOCHAT_SKIP_NOTE"
    fi
    ;;
esac
"""


def script_of(stage: str) -> str:
    return re.search(r"-m ([\w.]+)", stage).group(1)


def only(stages: list[str], text: str) -> str:
    """The one of `stages` with `text` in it."""
    (stage,) = (stage for stage in stages if text in stage)
    return stage


class Checkout:
    """The scripts, with a set-up that puts stand-ins for `python` and `torchrun` on PATH."""

    def __init__(self, folder: Path):
        self.folder, self.base, self.log = folder, folder / "base", folder / "log"
        for name in ("runs", "bin"):
            (folder / name).mkdir()
        for name in (*RECIPES, "runs/stages.sh"):
            shutil.copy(ROOT / name, folder / name)
        for name in ("nanochat", "scripts", "tasks"):
            (folder / name).symlink_to(ROOT / name)
        for name in ("python", "torchrun"):
            (folder / "bin" / name).write_text(PYTHON)
            (folder / "bin" / name).chmod(0o755)
        (folder / "runs" / "setup.sh").write_text(SETUP)

    def start(self, name: str, *args: str, **variables: str) -> subprocess.Popen:
        inherited = {key: os.environ[key] for key in ("PATH", "HOME", "LD_LIBRARY_PATH") if key in os.environ}
        own = {
            "NANOCHAT_BASE_DIR": str(self.base), "FAKE_LOG": str(self.log), "FAKE_GPUS": "0",
            "REAL_PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1",
        }  # fmt: skip
        return subprocess.Popen(
            ["bash", str(self.folder / name), *args], env=inherited | own | variables, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    def run(self, name: str, *args: str, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(name, *args, **variables)
        out, err = process.communicate()
        return subprocess.CompletedProcess(args, process.returncode, out, err)

    def refusal(self, name: str, *args: str) -> str:
        """What a run says that must end with status 2, without output and without a stage."""
        ended = self.run(name, *args)
        assert (ended.returncode, ended.stdout) == (2, "")
        assert not self.log.exists()
        return ended.stderr

    def stages(self, name: str = "speedrun.sh", **variables: str) -> list[str]:
        """The commands of a run on 8 GPUs, or as `variables` say. What it printed is kept in `said`."""
        self.log.unlink(missing_ok=True)
        plan = 'what it takes\n{"num_shards": 92, "hours": 3.21, "mid_hours": 0.2, "total_hours": 4.2}'
        ended = self.run(name, **{"FAKE_GPUS": "8", "FAKE_PLAN": plan, **variables})
        assert ended.returncode == 0, ended.stderr
        self.said = ended.stdout
        self.check_headers()
        return self.log.read_text().splitlines()

    def check_headers(self) -> None:
        """The headers in `said` count to the number of stages announced, or to one after which the rest is skipped."""
        announced = int(re.search(r"^(\d+) stages", self.said, re.MULTILINE)[1])
        numbers = [tuple(map(int, pair)) for pair in re.findall(r"^== (\d+) of (\d+) · \w", self.said, re.MULTILINE)]
        assert numbers == [(number, announced) for number in range(1, len(numbers) + 1)]
        assert len(numbers) == announced or "skipped, and tried again at the next start: " in self.said


@pytest.fixture
def checkout(tmp_path):
    return Checkout(tmp_path)


@pytest.fixture(scope="module")
def plans(tmp_path_factory):
    """The lines of each recipe's dry run by their names, on a machine without a GPU."""
    checkout = Checkout(tmp_path_factory.mktemp("plans"))
    started = {name: checkout.start(name, "--dry-run") for name in MODELS}
    started["too small"] = checkout.start("runs/d32.sh", "--dry-run", GPU="RTX 4090", NPROC="2")
    lines = {}
    for name, process in started.items():
        out, err = process.communicate()
        assert process.returncode == 0, err
        lines[name] = dict(re.split(r" {2,}", line, maxsplit=1) for line in out.splitlines())
    assert not checkout.base.exists()
    assert not checkout.log.exists()
    return lines


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_a_dry_run_says_what_the_arithmetic_says(plans, name):
    config, token_ratio, batch = MODELS[name]
    tokens = recipe.horizon_tokens(config, token_ratio=token_ratio)
    plan = recipe.make_plan(
        config, train_tokens=tokens, token_ratio=token_ratio, total_batch_tokens=batch, batch_multiple=8 * 2048
    )
    rows = recipe.fitting_rows(config, num_gpus=8, memory_bytes=hardware.memory_bytes(H100), wanted=32)
    needs = recipe.estimate(
        config, plan, num_gpus=8, device_batch_size=rows, peak_flops=989e12, gpu_hour_dollars=3.0,
        save_every={"speedrun.sh": 1000, "runs/october2025.sh": 4000}.get(name, 2000),
    )  # fmt: skip
    said = plans[name]
    assert said["parameters"].startswith(f"{recipe.count_model(config).parameter_counts()['total']:,}: ")
    assert said["tokens"].startswith(f"{plan.train_tokens:,}, {token_ratio}.0 for each of ")
    micro_steps = plan.total_batch_tokens // (rows * 2048 * 8)
    assert f"{plan.num_steps:,} of {plan.total_batch_tokens:,} tokens = {micro_steps} x {rows} x " in said["steps"]
    assert said["text"] == f"{needs.num_shards} shards of 100 MB"
    assert said["disk"] == f"{needs.disk_bytes / 1e9:.0f} GB with {needs.num_checkpoints} checkpoints"
    assert said["memory per GPU"].startswith(f"{needs.gpu_bytes / 2**30:.1f} GiB of 73.6 usable")
    assert said[f"8 x {H100}"] == f"assumed: 45% of peak, $3.00 per GPU hour ({hardware.PRICES_AS_OF})"
    assert said["pretraining"] == f"{needs.hours:.2f} hours"
    assert said["whole run"] == f"{needs.total_hours:.1f} hours, ${needs.dollars:,.0f}"


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name.startswith("runs/")])
def test_the_header_of_a_recipe_says_what_its_dry_run_says(plans, name):
    header = " ".join(line.removeprefix("# ") for line in (ROOT / name).read_text().splitlines()[1:6])
    hours, dollars, disk = re.search(r"takes ([\d.]+ hours) and (\$\d+) .* and (\d+ GB) of disk", header).groups()
    assert plans[name]["whole run"] == f"{hours}, {dollars}"
    assert plans[name]["disk"].startswith(disk)


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_readmes_table_says_what_the_dry_runs_say(plans, name):
    readme = (ROOT / "README.md").read_text()
    (row,) = (line for line in readme.splitlines() if line.startswith(f"| `{name}`"))
    said = plans[name]
    parameters, tokens = (
        int(said[key].split(":")[0].split(", ")[0].replace(",", "")) for key in ("parameters", "tokens")
    )
    hours, dollars = re.fullmatch(r"([\d.]+) hours, (\$[\d,]+)", said["whole run"]).groups()
    cells = [f"{parameters / 1e6:,.0f}M", f"{tokens / 1e9:.1f}B", said["text"].removesuffix(" of 100 MB"),
             said["disk"].partition(" with")[0], said["memory per GPU"].partition(" ")[0], hours, dollars]  # fmt: skip
    assert [cell.strip() for cell in row.split("|")[2:-1]] == cells
    if name == "runs/d26.sh":
        sample = "".join(f"{key:<20} {text}\n" for key, text in said.items())
        assert sample in (ROOT / "docs" / "running.md").read_text()


@pytest.mark.slow
def test_the_run_of_october_2025_is_the_first_releases_and_a_plan_that_does_not_fit_says_so(plans):
    said = plans["runs/october2025.sh"]
    assert said["model"] == "depth 20, october-2025 architecture, vocabulary 65,536"
    assert said["tokens"].startswith("11,219,763,200, 20.0 for each of 560,988,160 parameters")
    assert said["steps"].startswith("21,400 of 524,288 tokens")
    assert said["text"] == "240 shards of 100 MB"
    assert "but only 22.1 are usable: DOES NOT FIT" in plans["too small"]["memory per GPU"]


@pytest.mark.slow
def test_without_a_depth_the_deepest_model_that_fits_is_planned(checkout):
    small, fixed = (
        checkout.run(
            "speedrun.sh", "--dry-run", GPU="RTX 4090", NPROC="1", PRETRAIN_FLAGS="--device-batch-size 4", **depth
        )
        for depth in ({}, {"DEPTH": "24"})
    )
    assert "DOES NOT FIT" in fixed.stdout
    assert "DOES NOT FIT" not in small.stdout
    assert small.stdout.startswith("model                depth 20,")


@pytest.mark.parametrize("name", MODELS)
def test_unknown_arguments_are_refused_in_one_line(checkout, name):
    told = checkout.refusal(name, "--dry-run", "--depth")
    assert re.fullmatch(r"error: unknown argument --depth: .*--dry-run.*--help.*\n", told)


def test_help_is_the_header(checkout):
    ended = checkout.run("speedrun.sh", "--help")
    assert ended.returncode == 0
    names = set(re.findall(r"\$\{([A-Z_]+)[:}-]", (ROOT / "speedrun.sh").read_text()))
    assert {"DEPTH", "RL", "TOKEN_RATIO"} < names
    for name in names - {"BASH_SOURCE", "BASH_VERSION", "OMP_NUM_THREADS", "RECIPE", "VIRTUAL_ENV"}:
        assert name in ended.stdout
    assert "set -euo" not in ended.stdout


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"DEPTH": "abc"}, "DEPTH=abc must be a whole number above 0"),
        ({"NUM_STEPS": "0"}, "NUM_STEPS=0 must be a whole number above 0"),
        ({"TOKEN_RATIO": "1e3"}, "TOKEN_RATIO=1e3 must be a number"),
        ({"RL": "yes"}, "RL=yes must be 0 or 1"),
        ({"CHAT_DATA": "mine"}, "CHAT_DATA=mine must be mixture or small_world"),
        ({"NANOCHAT_BASE_DIR": "/proc/none"}, "cannot write to the work folder /proc/none: set NANOCHAT_BASE_DIR .*"),
        ({"NPROC": "9", "FAKE_GPUS": "8"}, "NPROC=9 is more than the 8 GPUs of this machine"),
        ({"DEPTH": "26"}, "DEPTH=26 needs GPUs, and this machine has none: leave it out .*--dry-run.*"),
    ],
)
def test_what_cannot_be_meant_is_refused_in_one_line_before_anything_is_done(checkout, variables, words):
    told = checkout.run("speedrun.sh", **variables)
    assert (told.returncode, told.stdout) == (2, "")
    assert re.fullmatch(rf"error: {words}\n", told.stderr)
    assert not checkout.log.exists()


def test_a_recipe_is_not_trained_without_gpus_and_the_laptops_run_has_nothing_to_plan(checkout):
    told = checkout.refusal("runs/d26.sh")
    assert told == "error: runs/d26.sh needs GPUs, and this machine has none: --dry-run says what it takes\n"
    assert "BASE_STEPS=450" in checkout.refusal("runs/laptop.sh", "--dry-run")


def test_a_second_run_in_the_same_folder_is_refused_while_the_first_one_is_alive(checkout):
    checkout.stages()
    pid = checkout.base / "speedrun" / "pid"
    assert not pid.exists()
    pid.write_text(f"{os.getpid()}\n")
    told = checkout.run("speedrun.sh")
    assert told.returncode == 2
    assert f"already: process {os.getpid()} " in told.stderr
    ended = subprocess.Popen(["true"])
    ended.wait()
    pid.write_text(f"{ended.pid}\n")
    checkout.stages()


def test_a_killed_run_that_had_the_same_process_number_is_no_other_one(checkout):
    """As in a container that is started again."""
    notes = checkout.base / "speedrun"
    notes.mkdir(parents=True)
    (checkout.folder / "again.sh").write_text(f'echo $$ >"{notes}/pid"; exec bash "{checkout.folder}/speedrun.sh"')
    assert "stages, about" in checkout.run("again.sh").stdout


def test_all_stages_run_on_all_gpus(checkout):
    stages = checkout.stages()
    scripts = list(map(script_of, stages))
    downloads = [stage.split()[-1] for stage in stages if "nanochat.data.dataset" in stage]
    assert sorted(downloads) == ["8", "92"]
    assert [script for script in scripts if script != "nanochat.data.dataset"] == [
        "nanochat.report", "scripts.tok_train", "scripts.tok_eval", "scripts.base_train", "scripts.base_loss",
        "scripts.base_eval", "scripts.mid_train", "scripts.chat_sft", "scripts.chat_eval", "nanochat.report",
        "nanochat.report",
    ]  # fmt: skip
    assert only(stages, "scripts.base_train") == (
        "torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --data karpathy/climbmix-400b-shuffle "
        "--depth 24 --token-ratio 12 --save-every 1000 --run  --resume"
    )


def test_reinforcement_learning_comes_last_when_asked_for(checkout):
    stages = [stage.partition(" -m ")[2] for stage in checkout.stages(RL="1", WANDB_RUN="mine")]
    assert stages[-4:-2] == [
        "scripts.chat_rl -- --model-tag d24 --run mine --resume --tasks GSM8K",
        f"scripts.chat_eval -- -i rl --model-tag d24 --tasks {'|'.join(TASK_NAMES)} --resume",
    ]


def test_the_recipe_of_october_2025_trains_as_it_plans(checkout):
    stages = checkout.stages("runs/october2025.sh", PRETRAIN_FLAGS="--eval-every 0")
    assert only(stages, "scripts.base_train").endswith(
        "--data karpathy/fineweb-edu-100b-shuffle --depth 20 --token-ratio 20 --save-every 4000 --run  --resume "
        "--arch october-2025 --total-batch-size 524288 --warmup-steps 0 --warmdown-frac 0.2 --final-lr-frac 0 "
        "--weight-decay 0 --eval-every 0"
    )
    assert only(stages, "scripts.tok_train").endswith("--vocab-size 65536")


def test_stages_are_not_repeated_unless_their_command_changed(checkout):
    everything = checkout.stages()
    assert checkout.stages() == everything[-2:]  # the report
    assert checkout.said.count(" · finished before\n") == 9
    changed = checkout.stages(SAVE_EVERY="500", RL="1")
    rerun = "base_train base_loss base_eval chat_rl chat_eval"  # what is evaluated may be another model
    assert [script_of(stage) for stage in changed[:-2]] == [f"scripts.{name}" for name in rerun.split()]


def test_headers_say_how_long_a_stage_takes_where_that_is_known(checkout):
    checkout.stages()
    assert "== 4 of 9 · pretraining · about 3.2 hours\n" in checkout.said
    assert "== 7 of 9 · mid-training · about 12 minutes\n" in checkout.said
    assert "== 8 of 9 · finetuning\n" in checkout.said
    checkout.stages(FAKE_GPUS="0")
    assert "== 4 of 11 · pretraining · about 2 minutes\n" in checkout.said
    assert "    python -m scripts.base_train --data local --depth 4 " in checkout.said
    checkout.stages(FAKE_GPUS="0", NUM_STEPS="3")
    assert "== 4 of 11 · pretraining\n" in checkout.said
    checkout.stages(CHAT="0", SAVE_EVERY="7")
    assert "== 4 of 6 · pretraining" in checkout.said


def test_what_has_no_data_is_skipped_by_name_and_tried_again(checkout):
    stages = checkout.stages(FAKE_NO_DATA="mid_train")
    assert "mid_train" in stages[-3]  # the base model remains
    assert "nanochat.report generate" in stages[-2]
    assert "\nskipped: no mid_train; ask\n" in checkout.said
    last = "skipped, and tried again at the next start: mid-training (no mid_train) and all stages after it\n"
    assert last in checkout.said
    skipped = Path(f"{checkout.log}.skipped")
    assert skipped.read_text() == "mid_train: no mid_train; ask\n"
    assert "mid_train" in checkout.stages()[0]
    assert "skipped" not in checkout.said

    skipped.unlink()
    changed = checkout.stages(SAVE_EVERY="7", FAKE_NO_DATA="eval", RL="1")  # exams are nothing that others need
    assert [script_of(stage) for stage in changed[2:-2]] == [
        "scripts.base_eval", "scripts.chat_rl", "scripts.chat_eval"
    ]  # fmt: skip
    assert "CORE (no eval); chat evaluation after RL (no eval)\n" in checkout.said
    assert not skipped.exists()  # they tell the report themselves


def test_humaneval_is_left_out_where_code_cannot_be_isolated(checkout):
    stages = checkout.stages(FAKE_NO_ISOLATION="no namespaces")
    assert "HumanEval" not in only(stages, "chat_eval")
    assert "skipped: HumanEval: no isolation here for code that a model writes; no namespaces\n" in checkout.said
    assert "the next start: HumanEval (HumanEval: no isolation here" in checkout.said


def test_a_stage_that_fails_stops_the_run_and_says_where(checkout):
    ended = checkout.run("speedrun.sh", FAKE_FAILURE="chat_sft")
    assert ended.returncode == 2
    assert ended.stderr.startswith(
        "stopped at stage 8 of 11, finetuning, with status 2; the same command goes on from "
    )
    assert "chat_sft" in checkout.stages(FAKE_GPUS="0")[0]


def test_wandb_is_asked_before_the_first_stage(checkout):
    ended = checkout.run("speedrun.sh", WANDB_RUN="mine", FAKE_WANDB="1")
    assert ended.returncode == 2
    assert not checkout.log.exists()


def test_the_run_ends_with_a_command_for_a_chat_with_this_model(checkout):
    checkout.stages(FAKE_GPUS="0")
    *_, activate, chat = checkout.said.splitlines()
    assert activate == f"    cd {checkout.folder} && source .venv/bin/activate"
    assert chat == f"    NANOCHAT_BASE_DIR={checkout.base} python -m scripts.chat_web"


def test_without_a_gpu_it_is_a_miniature(checkout):
    stages = checkout.stages(FAKE_GPUS="0")
    train = only(stages, "scripts.base_train")
    assert train.startswith("python -m scripts.base_train --data local --depth 4 --sequence-len 256")
    assert "--num-steps 170 --total-batch-size 4096 " in train
    assert "--token-ratio 3 --save-every" in only(checkout.stages(FAKE_GPUS="0", TOKEN_RATIO="3"), "base_train")
    assert list(map(script_of, stages[-7:])) == [
        "scripts.mid_train", "scripts.chat_sft", "scripts.chat_eval", "scripts.chat_rl", "scripts.chat_eval",
        "nanochat.report", "nanochat.report",
    ]  # fmt: skip
    assert all("--data small_world" in stage for stage in stages if "mid_train" in stage or "chat_sft" in stage)


def test_the_miniature_can_learn_from_the_hubs_conversations(checkout):
    stages = checkout.stages(FAKE_GPUS="0", CHAT_DATA="mixture", RL="0")
    assert "small_world" not in only(stages, "chat_sft")
    assert not any("chat_rl" in stage for stage in stages)
    assert not any("mid_train" in stage for stage in checkout.stages(FAKE_GPUS="0", CHAT="0", VOCAB_SIZE="512"))


def test_the_laptops_run_is_small_and_on_real_data_whatever_the_machine(checkout):
    stages = checkout.stages("runs/laptop.sh", FAKE_GPUS="0", PRETRAIN_FLAGS="--eval-every 0")
    train = only(stages, "scripts.base_train")
    assert train.startswith("python -m scripts.base_train --data karpathy/climbmix-400b-shuffle --depth 4")
    assert train.endswith(
        "--num-steps 450 --total-batch-size 4096 --save-every 100 --run  --resume "
        "--sequence-len 512 --total-batch-size 8192 --eval-every 0"
    )
    for script, flags in {
        "mid_train": "--max-conversations 16000", "chat_sft": "--max-conversations 8000",
        "chat_rl": "--tasks Spelling|SpellingBee", "chat_eval -i rl": f"--tasks {'|'.join(TASK_NAMES)}|Spelling",
    }.items():  # fmt: skip
        stage = only(stages, f"scripts.{script}")
        assert flags in stage
        assert "small_world" not in stage
    assert 'export CUDA_VISIBLE_DEVICES=""' in (ROOT / "runs/laptop.sh").read_text()


@pytest.mark.parametrize("name", [*RECIPES, "runs/stages.sh"])
def test_scripts_are_sound_bash(name):
    subprocess.run(["bash", "-n", ROOT / name], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", "-e", "SC1091", ROOT / name], check=True)
