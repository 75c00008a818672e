"""`scripts.chat_eval` as a process of its own: table, files and record, being killed, several processes, mistakes."""

import json
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS, fill_randomly, make_text
from test_scripts import FORKER, Workplace, environment

from nanochat.checkpoint import run_dir, save_checkpoint
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.tokenizer import Tokenizer
from scripts.chat_eval import of_chat_core
from tasks.registry import TASK_NAMES

TASKS = "ARC-Easy|SpellingBee"
FLAGS = ["-i", "sft", "--device-type", "cpu", "--dtype", "float32", "--max-tokens", "8", "--batch-rows", "4"]
NUM_QUESTIONS, NUM_WORDS = 30, 6
LIMIT = ["--max-problems", str(NUM_WORDS)]
FOLDER = "chat_eval/sft_tiny_step_000007"

# in the child: ARC's rows without a hub, small groups, and a progress bar that would show on a terminal only
FIXTURE = f"""
import random
import tasks.arc, nanochat.evals.chat_eval, nanochat.evals.scoring
class Rows:
    def __init__(self, source):
        pass
    def __len__(self):
        return {NUM_QUESTIONS}
    def __getitem__(self, index):
        rng = random.Random(index)
        choices = {{"text": rng.choices({WORDS!r}, k=4), "label": list("ABCD")}}
        return {{"question": f"Question {{index}}?", "choices": choices, "answerKey": rng.choice("ABCD")}}
tasks.arc.Rows = Rows
nanochat.evals.chat_eval.GRADE_PROBLEMS = 2
nanochat.evals.scoring.CPU_BATCH_TOKENS = 50
"""

KILL = """
import signal
from nanochat.evals.chat_results import ResultLog
appender = ResultLog.appender
written = []
def dying(self, rank):
    append = appender(self, rank)
    def append_or_die(item):
        if len(written) == {count}:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(item)
        append(item)
    return append_or_die
ResultLog.appender = dying
"""


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """A base folder with a random model, and a word list."""
    folder = tmp_path_factory.mktemp("chat_eval")
    rng = random.Random(0)
    words = {"".join(rng.choices("abcdefghijklmnop", k=rng.randint(3, 9))) for _ in range(3000)}
    (folder / "words.txt").write_text("\n".join(sorted(words)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder / "base"))
        tokenizer = Tokenizer.train([make_text(rng, 100) for _ in range(100)], 400)
        config = GPTConfig.from_depth(2, vocab_size=400, sequence_len=160, head_dim=32)
        model = build_model(config, generator=torch.Generator().manual_seed(0))
        fill_randomly(model)
        runtime = SimpleNamespace(rank=0, is_main=True, world_size=1)
        save_checkpoint(run_dir("sft", "tiny"), 7, runtime=runtime, model=model, tokenizer=tokenizer, meta={"args": {}})
    command, pipe = [sys.executable, "-c", FORKER], subprocess.PIPE
    variables = environment(folder / "base") | {"NANOCHAT_WORDS": str(folder / "words.txt")}
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=variables) as forker:
        yield Workplace(folder, forker)
        forker.stdin.close()


def evaluate(workplace, *args, tasks=TASKS, before="", **options):
    return workplace.run("scripts.chat_eval", *FLAGS, "-a", tasks, *args, before=FIXTURE + before, **options)


def evaluate_well(workplace, *args, **options):
    ended = evaluate(workplace, *args, **options)
    assert (ended.status, ended.stderr) == (0, ""), ended
    return ended.stdout


def results(workplace, folder=FOLDER):
    """The lines of both files, the settings among them."""
    paths = sorted((workplace.base / folder).iterdir())
    assert [path.name for path in paths] == ["ARC-Easy.jsonl", "SpellingBee.jsonl"]
    return [[json.loads(line) for line in path.read_text().split("\n")[:-1]] for path in paths]


def without_logits(lines, first=0):
    return [[{**line, "logits": None} for line in part[first:]] for part in lines]


@pytest.fixture(scope="module")
def finished(workplace):
    """What an evaluation in one go prints, and the results it leaves."""
    out = evaluate_well(workplace, *LIMIT)
    return out, results(workplace)


def test_the_table_has_accuracies_intervals_and_counts(finished):
    out, (arc, spelling) = finished
    rows = {line.split()[0]: line.split() for line in out.splitlines() if line.startswith(("ARC", "Spelling"))}
    for lines, name in ((arc, "ARC-Easy"), (spelling, "SpellingBee")):
        right = sum(line["samples"][0]["is_correct"] for line in lines[1:])
        task, count, accuracy, low, dash, high = rows[name][:6]
        assert (task, int(count), dash) == (name, NUM_WORDS, "-")
        assert float(accuracy) == pytest.approx(right / NUM_WORDS, abs=1e-4)
        assert float(low) <= float(accuracy) <= float(high)
    assert "strict" in out
    assert "mean centred accuracy" in out
    assert "ChatCORE" not in out


def test_chat_core_is_the_mean_of_its_tasks_whatever_else_was_evaluated():
    named = [SimpleNamespace(task=name) for name in ("Spelling", *TASK_NAMES)]
    assert [result.task for result in of_chat_core(named)] == list(TASK_NAMES)
    assert of_chat_core(named[:-1]) == []


def test_every_prompt_answer_and_verdict_is_written_with_its_seed(finished):
    _, (arc, spelling) = finished
    expected = {"task": "ARC-Easy", "num_problems": NUM_QUESTIONS, "dtype": "float32"}
    assert expected.items() <= arc[0]["settings"].items()
    assert spelling[0]["settings"]["max_new_tokens"] == 8
    for line in arc[1:]:
        assert line["prompt"].startswith("<|bos|><|user_start|>Multiple choice: Question ")
        assert line["prompt"].endswith("<|user_end|><|assistant_start|>")
        answer = max(line["logits"], key=line["logits"].get)
        assert line["samples"][0]["output"] == answer
        assert line["samples"][0]["is_correct"] == (answer == line["expected"])
    for line in spelling[1:]:
        assert isinstance(line["seed"], int)
        assert set(line["samples"][0]["scores"]) == {"flexible", "strict"}
        assert line["samples"][0]["num_tokens"] <= 8


def test_the_report_gets_a_record(workplace, finished):
    record = json.loads((workplace.base / "report" / "records.jsonl").read_text().splitlines()[0])
    assert (record["stage"], record["settings"]["source"]) == ("chat_eval", "sft")
    assert {"ARC-Easy", "SpellingBee"} < set(record["results"])
    assert [row["task"] for row in record["table"]][:2] == ["ARC-Easy", "SpellingBee"]
    (sample,) = record["samples"]  # of the task that is answered in writing
    assert re.fullmatch(r"<\|bos\|><\|user_start\|>.*<\|assistant_start\|>.*\n\((right|wrong)\)", sample, re.DOTALL)


def test_an_evaluation_killed_again_and_again_ends_as_one_in_one_go(workplace, finished):
    for count in (3, 1, 6):
        assert evaluate(workplace, *LIMIT, *["--resume"] * (count != 3), before=KILL.format(count=count)).status == -9
    assert "answered in an earlier run" in evaluate_well(workplace, *LIMIT, "--resume")
    assert without_logits(results(workplace)) == without_logits(finished[1])


def test_two_processes_have_the_results_of_one(workplace, finished):
    evaluate_well(workplace, *LIMIT, num_processes=2)
    assert without_logits(results(workplace)) == without_logits(finished[1])


def test_the_plain_paths_have_the_results_of_the_fast_ones_in_a_folder_of_their_own(workplace, finished):
    evaluate_well(workplace, *LIMIT, "--slow")  # whose settings, in the first line, are others
    assert without_logits(results(workplace, FOLDER + "_slow"), 1) == without_logits(finished[1], 1)


def test_standard_prompts_have_results_names_and_a_record_of_their_own(workplace, finished):
    out = evaluate_well(workplace, *LIMIT, "--prompts", "standard", tasks="ARC-Challenge")
    assert "ARC-Challenge 25-shot" in out
    assert re.search(r"acc_norm .* 0\.2500\n  .*\d of 25 worked examples fit; 6 problems", out)
    path = workplace.base / FOLDER / "ARC-Challenge_25-shot.jsonl"
    items = [json.loads(line) for line in path.read_text().splitlines()[1:]]
    assert all(0 < item["num_shots"] < 25 and item["prompt"].count("Answer:") > 1 for item in items)
    record = json.loads((workplace.base / "report" / "records.jsonl").read_text().splitlines()[-1])
    assert (record["stage"], record["settings"]["prompts"]) == ("standard_eval", "standard")
    name = f"ARC-Challenge 25-shot ({max(item['num_shots'] for item in items)} fit)"
    assert set(record["results"]) == {name, "elapsed_seconds"}
    assert record["table"][0]["task"] == name
    assert record["table"][0]["baseline"] == 0.25
    assert record["table"][0]["short_of_shots"] == NUM_WORDS
    before = path.read_text()
    assert "6 of the problems were answered" in evaluate_well(
        workplace, *LIMIT, "--prompts", "standard", "--resume", tasks="ARC-Challenge"
    )
    assert path.read_text() == before
    path.unlink()
    assert results(workplace) == finished[1]


def test_several_samples_give_pass_at_k(workplace):
    out = evaluate_well(workplace, "--max-problems", 2, "--num-samples", 3, "--temperature", 1, tasks="SpellingBee")
    assert "pass@3" in out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["-a", "Quiz"], "no task 'Quiz'"), (["-a", "ARC-Easy||SpellingBee"], "no task ''"),
        (["--prompts", "standard"], "SpellingBee has no standard prompt"),
        (["--model-tag", "other"], "other"), (["--num-samples", "4"], "set --temperature"),
        (["--batch-rows", "-1"], "--batch-rows"),
        (["--seed", "3", "--resume"], "seed 42, which is 3 now"),  # before ARC-Easy is asked again
    ],
)  # fmt: skip
def test_a_mistake_is_named(workplace, finished, args, words):
    evaluate_well(workplace, *LIMIT, tasks="SpellingBee")
    ended = evaluate(workplace, *LIMIT, *args)
    assert ended.status == 2
    assert words in ended.stderr
    assert len(ended.stderr.splitlines()) == 1
    assert "accuracy" not in ended.stdout


def test_data_that_cannot_be_had_are_named_and_noted_in_the_report(workplace):
    ended = workplace.run("scripts.chat_eval", *FLAGS, "-a", "GSM8K", base=workplace.base)
    assert ended.status == 2
    assert "openai/gsm8k" in ended.stderr
    record = json.loads((workplace.base / "report" / "records.jsonl").read_text().splitlines()[-1])
    assert "GSM8K" in record["results"]["not_run"]
