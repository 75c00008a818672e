"""`scripts.mid_train` and `scripts.chat_sft` as processes: on own conversations, resumed, with several processes."""

import json
import random
import re
from contextlib import contextmanager

import pytest
from conftest import WORDS
from test_chat_loader import make_conversations
from test_scripts import (
    assert_refused,
    check_elastic,
    hashes,
    metrics,
    records,
    run_folder,
    save_random_model,
    working_in,
)

TINY = (
    "--device-type cpu --dtype float32 --total-batch-size 512 --device-batch-size 2 --num-steps 6 --save-every 3 "
    "--eval-every 3"
).split()
LAST = 6
OWN = ["--data", "own.jsonl"]
WATCHED = "--chat-every 3 --chat-tasks ARC-Easy|SpellingBee --chat-max-problems 4 --chat-max-tokens 4".split()
CHECKPOINT = (
    "checksums_rank0.json loader_rank0.safetensors meta.json model.safetensors optimizer_rank0.safetensors tokenizer"
).split()

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
    write_conversations(folder / "own.jsonl", make_conversations(60))
    save_random_model(folder / "base", "base", meta={"plan": {"total_batch_tokens": 4096}})
    with working_in(folder, NANOCHAT_WORDS=str(folder / "words.txt")) as place:
        place.run_well("scripts.mid_train", *TINY, *OWN)
        place.out = place.run_well("scripts.chat_sft", *TINY, *OWN, *WATCHED, before=ROWS)
        yield place


def write_conversations(path, conversations):
    path.write_text("\n".join(map(json.dumps, conversations)))


def write_too_long(path):
    """Two conversations that do not fit a context of 64 tokens."""
    turns = [{"role": "user", "content": "river " * 500}, {"role": "assistant", "content": "Yes."}]
    write_conversations(path, [turns] * 2)


@contextmanager
def changed(path, text):
    """Within it the file holds `text`."""
    before = path.read_text()
    path.write_text(text)
    try:
        yield
    finally:
        path.write_text(before)


@pytest.mark.parametrize("source", ["mid", "sft"])
def test_a_stage_leaves_checkpoints_metrics_and_a_record(workplace, source):
    run = run_folder(workplace.base, source)
    assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", "status.json", "step_000003", "step_000006"]
    assert sorted(path.name for path in (run / "step_000006").iterdir()) == CHECKPOINT
    found = metrics(workplace.base, source)
    assert all((step, "train_loss") in found for step in range(1, LAST + 1))
    assert found[LAST, "val_bpb"] < found[0, "val_bpb"] == found[0, "start_val_bpb"]
    stage = {"mid": "mid_train", "sft": "chat_sft"}[source]
    (record,) = [one for one in records(workplace.base) if one["stage"] == stage]
    assert record["results"]["val_bpb"] == found[LAST, "val_bpb"]
    assert record["settings"]["data"] == ["own.jsonl"]
    examples = json.loads((run / "step_000006" / "meta.json").read_text())["examples"]
    asked = [one["messages"][0]["content"].strip() for one in make_conversations(60)]
    assert len(set(examples)) == 4
    assert set(examples) <= set(asked)


def test_finetuning_starts_from_the_weights_of_mid_training_and_watches_tasks_on_their_validation_split(workplace):
    assert "tiny from mid_checkpoints/tiny/step_000006" in workplace.out
    assert re.search(r"^6 steps take about \d+ seconds here$", workplace.out, re.MULTILINE)
    found = metrics(workplace.base, "sft")
    for step in (0, 3, 6):
        assert 0.0 <= found[step, "val_ARC-Easy"] <= 1.0
        assert 0.0 <= found[step, "val_SpellingBee"] <= 1.0
        assert (step, "val_tasks") in found


@pytest.mark.parametrize(("stage", "source", "more"), [("mid_train", "mid", []), ("chat_sft", "sft", WATCHED)])
def test_a_resumed_run_is_bit_equal_to_never_having_stopped(workplace, stage, source, more):
    base = workplace.copy_base(f"resumed_{source}", first_steps=3, source=source)
    if source == "sft":  # of before a flag existed that is free
        path = run_folder(base, source) / "step_000003" / "meta.json"
        meta = json.loads(path.read_text())
        del meta["args"]["chat_max_tokens"]
        meta["args"]["a_flag_of_then"] = 1
        path.write_text(json.dumps(meta))
        (path.parent / "checksums_rank0.json").unlink()  # of before there were any
    again = ["--resume", "--recompute"]  # the latter changes no number
    out = workplace.run_well(f"scripts.{stage}", *TINY, *OWN, *more, *again, base=base, before=ROWS)
    assert "resumed at step 3" in out
    assert metrics(base, source) == metrics(workplace.base, source)
    assert hashes(base, LAST, source) == hashes(workplace.base, LAST, source)


def test_two_processes_train_like_one(workplace):
    base = workplace.copy_part("two", "base_checkpoints")
    workplace.run_well("scripts.mid_train", *TINY, *OWN, base=base, num_processes=2)
    assert metrics(base, "mid") == pytest.approx(metrics(workplace.base, "mid"), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "source"), [("mid_train", "mid"), ("chat_sft", "sft")])
def test_four_two_one_and_again_four_processes_read_the_conversations_of_one(workplace, stage, source):
    def run(base, before, num_processes, *flags):
        flags, options = (*TINY, *OWN, "--source", "base", *flags), {"base": base, "num_processes": num_processes}
        return workplace.run(f"scripts.{stage}", *flags, before=before, **options)

    rows = check_elastic(workplace, run, (1, 2, 4), LAST, name=stage, source=source)
    assert len(rows) == LAST * 512 // 64


def test_an_epoch_is_the_default_and_the_batch_then_small(workplace):
    base = workplace.copy_part("epoch", "base_checkpoints")
    write_conversations(workplace.folder / "few.jsonl", make_conversations(8))
    flags = ["--device-type", "cpu", "--dtype", "float32", "--data", "few.jsonl", "--output-tag", "other"]
    out = workplace.run_well("scripts.mid_train", *flags, base=base)
    assert "of 64 = 1 x 1 x 64 x 1" in out
    assert (base / "mid_checkpoints" / "other").is_dir()


@pytest.mark.parametrize(("command", "words"), [
    ("mid_train --source sft --model-tag none", ["no sft checkpoint with --model-tag 'none' in", "there are tiny"]),
    ("mid_train --step 5 --output-tag new", ["no checkpoint of step 5"]),
    ("mid_train --source rl --data missing.jsonl", ["no rl checkpoint", "choose --source base or mid or sft"]),
    ("mid_train --data missing.jsonl", ["cannot read the conversations in missing.jsonl"]),
    ("mid_train --epochs 0", ["--epochs must be a number above 0"]),
    ("mid_train", ["holds checkpoints of an earlier run", "--resume"]),
    ("mid_train --resume --lr-mult 0.5", ["--lr-mult is 0.5 here but 1.0"]),
    ("chat_sft --chat-every -1", ["--chat-every must be a number of 0 or more"]),
    ("chat_sft --chat-every 1 --chat-tasks HumanEval", ["HumanEval is only for the purpose 'test'"]),
    ("chat_sft --chat-every 1 --chat-tasks Chess", ["no task 'Chess'"]),
    ("mid_train --data long.jsonl --output-tag new", ["of 2 conversations none fits the context of 64 tokens"]),
])  # fmt: skip
def test_a_mistake_is_named(workplace, command, words):
    write_too_long(workplace.folder / "long.jsonl")
    script, *flags = command.split()
    assert_refused(workplace.run(f"scripts.{script}", *TINY, *([] if "--data" in flags else OWN), *flags), *words)


def test_a_damaged_source_is_refused(workplace):
    base = workplace.copy_part("damaged", "base_checkpoints")
    path = run_folder(base) / "step_000007" / "model.safetensors"
    whole = path.read_bytes()
    path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    ended = workplace.run("scripts.mid_train", *TINY, *OWN, base=base)
    assert_refused(ended, path.parent, "is damaged: model.safetensors has changed since it was written", "--step")


def test_conversations_changed_since_are_refused_on_resuming(workplace):
    base = workplace.copy_base("changed", first_steps=3, source="mid")
    with changed(workplace.folder / "own.jsonl", "\n".join(map(json.dumps, make_conversations(60, seed=1)))):
        ended = workplace.run("scripts.mid_train", *TINY, *OWN, "--resume", base=base)
    assert_refused(ended, "not those of the run being resumed")
