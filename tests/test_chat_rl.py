"""`scripts.chat_rl` as processes: on own questions, resumed, with several processes, and users' mistakes."""

import random
from itertools import product

import pytest
from conftest import WORDS
from test_chat_scripts import CHECKPOINT, changed, write_conversations, write_too_long
from test_scripts import assert_refused, hashes, metrics, records, run_folder, save_random_model, working_in

LAST = 4
TINY = (
    "--device-type cpu --dtype float32 --data own.jsonl --questions-per-step 3 --num-samples 4 --max-tokens 8 "
    "--device-batch-size 2 --num-steps 4 --save-every 1 --eval-every 2 --eval-questions 3 --eval-samples 2"
).split()

# in the child: a reward that replies of a random model differ in
ODD = """
import tasks.own_data
tasks.own_data.OwnFile.reward = lambda self, conversation, completion: float(
    len("".join(part["text"] for part in completion)) % 2
)
"""

SIGNAL_AFTER_UPDATE = """
import signal
from nanochat.training.metrics import MetricsLog
log = MetricsLog.log
def log_and_signal(self, **numbers):
    log(self, **numbers)
    if numbers["step"] == {step} and "reward" in numbers:
        os.kill(os.getpid(), signal.SIGTERM)
MetricsLog.log = log_and_signal
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A base folder with a random finetuned model, a file of questions, and a run of the stage on it."""
    folder = tmp_path_factory.mktemp("chat_rl")
    rng, conversations = random.Random(0), []
    for _ in range(40):
        question = {"role": "user", "content": " ".join(rng.choices(WORDS, k=4))}
        conversations.append([question, {"role": "assistant", "content": f"#### {rng.randrange(9)}"}])
    write_conversations(folder / "own.jsonl", conversations)
    save_random_model(folder / "base", "sft", meta={})
    with working_in(folder) as place:
        place.out = place.run_well("scripts.chat_rl", *TINY, before=ODD)
        yield place


def test_the_stage_says_what_it_asks_and_leaves_checkpoints_metrics_and_a_record(workplace):
    start, asked, taken = "tiny from sft_checkpoints/tiny/step_000007", "38 questions, 0 left out", "3 more steps take"
    for words in (start, asked, "2 held-out questions", taken):
        assert words in workplace.out
    assert workplace.out.count("<|assistant_start|>") == 2  # replies of the first evaluation only
    run = run_folder(workplace.base, "rl")
    assert sorted(path.name for path in run.iterdir()) == [
        "metrics.jsonl",
        "status.json",
        *(f"step_{i:06d}" for i in range(1, 5)),
    ]
    assert sorted(path.name for path in (run / "step_000004").iterdir()) == CHECKPOINT
    found = metrics(workplace.base, "rl")
    logged = "reward groups_frac reply_tokens cut_frac rollout_tokens train_tokens".split()
    evaluated = "val_reward val_reward_se val_greedy_reward val_pass_at_1 val_pass_at_2".split()
    assert found.keys() >= {*product(range(1, LAST + 1), logged), *product((0, 2, LAST), evaluated)}
    assert sum((step, "train_loss") in found for step in range(1, LAST + 1)) >= 2
    (record,) = [one for one in records(workplace.base) if one["stage"] == "chat_rl"]
    results = record["results"]
    assert results["val_reward"] == found[LAST, "val_reward"]
    for name in ("start_val_reward", "start_val_reward_se", "start_val_greedy_reward"):
        assert results[name] == found[0, name]
    for name in ("rollout_tokens", "train_tokens"):
        assert results[name] == sum(found[step, name] for step in range(1, LAST + 1))
    assert len(record["samples"]) == 2
    assert results["val_reward_gain"] == pytest.approx(results["val_reward"] - results["start_val_reward"])
    assert (0, "val_reward_gain") not in found
    assert "start_means" not in results


@pytest.mark.parametrize("step", [1, 2, 3])
def test_a_resumed_run_is_bit_equal_to_never_having_stopped(workplace, step):
    base = workplace.copy_base(f"resumed_{step}", first_steps=step, source="rl")
    out = workplace.run_well("scripts.chat_rl", *TINY, "--resume", base=base, before=ODD)
    assert f"resumed at step {step}" in out
    assert metrics(base, "rl") == metrics(workplace.base, "rl")
    assert hashes(base, LAST, "rl") == hashes(workplace.base, LAST, "rl")
    first, *_, last = records(base)
    assert last["results"]["train_tokens"] == first["results"]["train_tokens"]


def test_a_signal_saves_at_the_next_step_and_the_run_goes_on_from_there(workplace):
    base = workplace.copy_part("stopped", "sft_checkpoints")
    signal = SIGNAL_AFTER_UPDATE.format(step=3)
    seldom = [*TINY, "--save-every", "0"]
    ended = workplace.run("scripts.chat_rl", *seldom, base=base, before=ODD + signal)
    assert ended.status == 143
    assert "stopped by SIGTERM at step 3" in ended.stdout
    assert [path.name for path in run_folder(base, "rl").glob("step_*")] == ["step_000003"]
    workplace.run_well("scripts.chat_rl", *seldom, "--resume", base=base, before=ODD)
    assert metrics(base, "rl") == metrics(workplace.base, "rl")
    assert hashes(base, LAST, "rl") == hashes(workplace.base, LAST, "rl")


@pytest.mark.parametrize("num_processes", [2, 4])  # with 4 there are ranks without a question
def test_several_processes_train_like_one(workplace, num_processes):
    base = workplace.copy_part(f"processes_{num_processes}", "sft_checkpoints")
    workplace.run_well("scripts.chat_rl", *TINY, base=base, before=ODD, num_processes=num_processes)
    found, expected = metrics(base, "rl"), metrics(workplace.base, "rl")
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    exact = [key for key in expected if key[1] in ("reward", "rollout_tokens", "train_tokens")]
    assert [found[key] for key in exact] == [expected[key] for key in exact]


@pytest.mark.slow
def test_four_two_one_and_again_four_processes_answer_the_questions_of_one(workplace):
    base = workplace.copy_part("elastic", "sft_checkpoints")
    for step, num_processes in enumerate((4, 2, 1, 4), start=1):
        signal = SIGNAL_AFTER_UPDATE.format(step=step)
        flags, options = [*TINY, "--resume"], {"base": base, "num_processes": num_processes}
        ended = workplace.run("scripts.chat_rl", *flags, before=ODD + signal, **options)
        assert ended.status == (0 if step == LAST else 143), ended
    found, expected = metrics(base, "rl"), metrics(workplace.base, "rl")
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-6)
    exact = [key for key in expected if key[1] in ("reward", "rollout_tokens", "train_tokens")]
    assert [found[key] for key in exact] == [expected[key] for key in exact]


def test_without_a_difference_in_reward_nothing_changes(workplace):
    base = workplace.copy_part("equal", "sft_checkpoints")
    workplace.run_well("scripts.chat_rl", *TINY, base=base)  # a random model never writes the right number
    found = metrics(base, "rl")
    assert all(found[step, "groups_frac"] == found[step, "train_tokens"] == 0 for step in range(1, LAST + 1))
    assert not any(name == "train_loss" for _, name in found)
    before = hashes(base, 7, "sft")["model.safetensors"]
    assert [hashes(base, step, "rl")["model.safetensors"] for step in (1, LAST)] == [before, before]


def test_the_model_can_be_chatted_with(workplace):
    flags = ["--source", "rl", "--device-type", "cpu", "--dtype", "float32", "--max-tokens", "4"]
    assert workplace.run("scripts.chat_cli", *flags, "-p", "river").status == 0


@pytest.mark.parametrize(("flags", "words"), [
    ("--tasks ARC-Easy", ["ARC-Easy has no reward", "GSM8K, SpellingBee, Spelling, SmallWorld"]),
    ("--tasks HumanEval", ["HumanEval is only for the purpose 'test'"]), ("--tasks Chess", ["no task 'Chess'"]),
    ("--data missing.jsonl", ["cannot read the conversations in missing.jsonl"]),
    ("--num-samples 1", ["--num-samples must be at least 2, not 1"]),
    ("--temperature 0", ["--temperature must be a number above 0"]),
    ("--device-batch-size 0", ["--device-batch-size must be a number above 0"]),
    ("--source mid", ["no mid checkpoint"]), ("", ["holds checkpoints of an earlier run", "--resume"]),
    ("--resume --num-samples 8", ["--num-samples is 8 here but 4"]),
    ("--data long.jsonl --output-tag new", ["none of", "questions fits into 56 tokens"]),
])  # fmt: skip
def test_a_mistake_is_named(workplace, flags, words):
    write_too_long(workplace.folder / "long.jsonl")
    assert_refused(workplace.run("scripts.chat_rl", *TINY, *flags.split()), *words)


def test_questions_changed_since_are_refused_on_resuming(workplace):
    base, own = workplace.copy_base("changed", source="rl"), workplace.folder / "own.jsonl"
    with changed(own, own.read_text().replace("river", "stone")):
        ended = workplace.run("scripts.chat_rl", *TINY, "--resume", base=base, before=ODD)
    assert_refused(ended, "not those of the run being resumed")
