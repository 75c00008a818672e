"""`scripts.mid_train` and `scripts.chat_sft` as processes: on own conversations, resumed, with several processes."""

import hashlib
import json
import random
import shutil
import subprocess
import sys

import pytest
import torch
from conftest import WORDS, make_text
from test_chat_loader import make_conversations
from test_scripts import FORKER, Workplace, environment

from nanochat.checkpoint import run_dir, save_checkpoint
from nanochat.common import Runtime
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.tokenizer import Tokenizer

TINY = (
    "--device-type cpu --dtype float32 --total-batch-size 512 --device-batch-size 2 --num-steps 6 --save-every 3 "
    "--eval-every 3"
).split()
LAST = 6

# in the child: ARC's rows without a hub, in each split others, and no test split
ROWS = f"""
import random
import tasks.arc
class Rows:
    def __init__(self, source):
        assert source.split in ("train", "validation"), source
    def __len__(self):
        return 12
    def __getitem__(self, index):
        rng = random.Random(index)
        choices = {{"text": rng.choices({WORDS!r}, k=4), "label": list("ABCD")}}
        return {{"question": f"Question {{index}}?", "choices": choices, "answerKey": rng.choice("ABCD")}}
tasks.arc.Rows = Rows
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A base folder with a random base model, a word list, and a file of conversations; mid and sft have been run."""
    folder = tmp_path_factory.mktemp("chat_training")
    rng = random.Random(0)
    words = {"".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 9))) for _ in range(3000)}
    (folder / "words.txt").write_text("\n".join(sorted(words)))
    lines = [json.dumps(conversation) for conversation in make_conversations(60)]
    (folder / "own.jsonl").write_text("\n".join(lines))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        save_base_model()
    command, pipe = [sys.executable, "-c", FORKER], subprocess.PIPE
    variables = environment(folder / "base") | {"NANOCHAT_WORDS": str(folder / "words.txt")}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables) as forker:
        place = Workplace(folder, forker)
        place.run_well("scripts.mid_train", *TINY, "--data", "own.jsonl")
        tasks = ["--chat-every", "3", "--chat-tasks", "ARC-Easy|SpellingBee", "--chat-max-problems", "4"]
        place.out = place.run_well(
            "scripts.chat_sft", *TINY, "--data", "own.jsonl", *tasks, "--chat-max-tokens", "4", before=ROWS
        )
        yield place
        forker.stdin.close()


def save_base_model():
    rng = random.Random(0)
    tokenizer = Tokenizer.train([make_text(rng, 100) for _ in range(100)], 400)
    config = GPTConfig.from_depth(2, vocab_size=400, sequence_len=64, head_dim=32)
    model = build_model(config, generator=torch.Generator().manual_seed(0))
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)
    meta = {"plan": {"total_batch_tokens": 4096}}
    save_checkpoint(run_dir("base", "tiny"), 7, runtime=runtime, model=model, tokenizer=tokenizer, meta=meta)


def numbers(base, source) -> dict:
    lines = (base / f"{source}_checkpoints" / "tiny" / "metrics.jsonl").read_text().splitlines()
    clock = ("step", "tokens_per_second", "elapsed_seconds", "mfu")
    records = map(json.loads, lines)
    return {(one["step"], name): value for one in records for name, value in one.items() if name not in clock}


def hashes(base, source, step) -> dict[str, str]:
    paths = (base / f"{source}_checkpoints" / "tiny" / f"step_{step:06d}").glob("*.safetensors")
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in paths}


def copy_until(workplace, name, source, step):
    """A copy of the base folder as it was when that step had been saved, and some lines logged after it."""
    copy = workplace.folder / name
    shutil.copytree(workplace.base, copy)
    for folder in (copy / f"{source}_checkpoints" / "tiny").glob("step_*"):
        if int(folder.name.removeprefix("step_")) > step:
            shutil.rmtree(folder)
    return copy


@pytest.mark.parametrize("source", ["mid", "sft"])
def test_a_stage_leaves_checkpoints_metrics_and_a_record(workplace, source):
    run = workplace.base / f"{source}_checkpoints" / "tiny"
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "step_000003", "step_000006"]
    names = {path.name for path in (run / "step_000006").iterdir()}
    assert names == {
        "meta.json", "model.safetensors", "tokenizer", "optimizer_rank0.safetensors", "loader_rank0.safetensors",
    }  # fmt: skip
    found = numbers(workplace.base, source)
    assert all((step, "train_loss") in found for step in range(1, LAST + 1))
    assert found[LAST, "val_bpb"] < found[0, "val_bpb"] == found[0, "start_val_bpb"]
    stage = {"mid": "mid_train", "sft": "chat_sft"}[source]
    records = [json.loads(line) for line in (workplace.base / "report" / "records.jsonl").read_text().splitlines()]
    (record,) = [one for one in records if one["stage"] == stage]
    assert record["results"]["val_bpb"] == found[LAST, "val_bpb"]
    assert record["settings"]["data"] == ["own.jsonl"]


def test_finetuning_starts_from_the_weights_of_mid_training(workplace):
    assert "tiny from mid_checkpoints/tiny/step_000006" in workplace.out


def test_tasks_are_watched_on_their_validation_split_while_finetuning(workplace):
    found = numbers(workplace.base, "sft")
    for step in (0, 3, 6):
        assert 0.0 <= found[step, "val_ARC-Easy"] <= 1.0
        assert 0.0 <= found[step, "val_SpellingBee"] <= 1.0
        assert (step, "val_tasks") in found


@pytest.mark.parametrize("stage", ["mid_train", "chat_sft"])
def test_a_resumed_run_is_bit_equal_to_never_having_stopped(workplace, stage):
    source = {"mid_train": "mid", "chat_sft": "sft"}[stage]
    base = copy_until(workplace, f"resumed_{source}", source, 3)
    tasks = ["--chat-every", "3", "--chat-tasks", "ARC-Easy|SpellingBee", "--chat-max-problems", "4"]
    more = [*tasks, "--chat-max-tokens", "4"] if stage == "chat_sft" else []
    out = workplace.run_well(
        f"scripts.{stage}", *TINY, "--data", "own.jsonl", *more, "--resume", base=base, before=ROWS
    )
    assert "resumed at step 3" in out
    assert numbers(base, source) == numbers(workplace.base, source)
    assert hashes(base, source, LAST) == hashes(workplace.base, source, LAST)


def test_two_processes_train_like_one(workplace):
    base = workplace.folder / "two"
    shutil.copytree(workplace.base / "base_checkpoints", base / "base_checkpoints")
    workplace.run_well("scripts.mid_train", *TINY, "--data", "own.jsonl", base=base, num_processes=2)
    found, expected = numbers(base, "mid"), numbers(workplace.base, "mid")
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-4)


def test_an_epoch_is_the_default_and_the_batch_then_small(workplace):
    base = workplace.folder / "epoch"
    shutil.copytree(workplace.base / "base_checkpoints", base / "base_checkpoints")
    (workplace.folder / "few.jsonl").write_text("\n".join(json.dumps(c) for c in make_conversations(8)))
    flags = ["--device-type", "cpu", "--dtype", "float32", "--data", "few.jsonl", "--output-tag", "other"]
    out = workplace.run_well("scripts.mid_train", *flags, base=base)
    assert "of 64 = 1 x 1 x 64 x 1" in out
    assert (base / "mid_checkpoints" / "other").is_dir()


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("mid_train --source sft --model-tag none", ["no checkpoint in", "none"]),
        ("mid_train --step 5 --output-tag new", ["no checkpoint of step 5"]),
        ("mid_train --data missing.jsonl", ["cannot read the conversations in missing.jsonl"]),
        ("mid_train --epochs 0", ["--epochs must be a number above 0"]),
        ("mid_train", ["holds checkpoints of an earlier run", "--resume"]),
        ("mid_train --resume --lr-mult 0.5", ["--lr-mult is 0.5 here but 1.0"]),
        ("chat_sft --chat-every -1", ["--chat-every must be a number of 0 or more"]),
        ("chat_sft --chat-every 1 --chat-tasks HumanEval", ["HumanEval is only for the purpose 'test'"]),
        ("chat_sft --chat-every 1 --chat-tasks Chess", ["no task 'Chess'"]),
        ("mid_train --data long.jsonl --output-tag new", ["of 2 conversations none fits the context of 64 tokens"]),
    ],
)
def test_a_mistake_is_named(workplace, command, words):
    question = {"role": "user", "content": "river " * 500}
    long = {"messages": [question, {"role": "assistant", "content": "Yes."}]}
    (workplace.folder / "long.jsonl").write_text("\n".join([json.dumps(long)] * 2))
    script, *flags = command.split()
    flags += [] if "--data" in flags else ["--data", "own.jsonl"]
    ended = workplace.run(f"scripts.{script}", *TINY, *flags)
    assert ended.status == 2, ended
    assert ended.stderr.startswith("error: ")
    assert ended.stderr.count("\n") == 1
    for word in words:
        assert word in ended.stderr


def test_conversations_changed_since_are_refused_on_resuming(workplace):
    base = copy_until(workplace, "changed", "mid", 3)
    own = workplace.folder / "own.jsonl"
    before = own.read_text()
    own.write_text("\n".join(json.dumps(c) for c in make_conversations(60, seed=1)))
    try:
        ended = workplace.run("scripts.mid_train", *TINY, "--data", "own.jsonl", "--resume", base=base)
    finally:
        own.write_text(before)
    assert ended.status == 2
    assert "not those of the run being resumed" in ended.stderr
