"""Check CORE's in-context tasks against lm-evaluation-harness, prediction by prediction: a table, then one JSON line.

    pip install lm-eval                              # 0.4.13 was used; not a dependency of the project
    python -m scripts.base_eval --model-tag d4 --dtype float32
    python -m scripts.export_hf --model-tag d4 --output d4-hf
    python dev/check_lm_eval.py d4-hf --items ~/.cache/nanochat/base_eval/base_d4_step_000500.items.jsonl

The harness loads the exported folder with transformers, renders the same examples with the same shots by its own code,
tokenises them with the exported tokenizer, and scores each answer. Its task definitions are built here from the bundle
(`harness_task`): question and answer as in the file, and a sampler that returns the shots we drew.

Columns: our accuracy; the accuracy by the harness's log-likelihoods under our rule (mean per token, not counting
tokens that all choices start with); how many predictions are the same, or differ for a known reason (`reason`) or an
unknown one; the largest difference of an answer's mean loss in nats. For information, the harness's own rules for
multiple choice: sum over the answer (acc), and sum divided by its characters (acc_norm). Exits with status 1 if a
prediction differs for no known reason.
"""

import argparse
import json
import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.common import UserError, run_main
from nanochat.evals.core_bundle import Task, fetch_bundle, read_tasks
from nanochat.evals.core_eval import SHOT_SEPARATOR, draw_shots

TASKS = ("arc_easy", "hellaswag", "piqa", "lambada_openai")
SAME_NATS = 1e-4  # closer mean losses are equal up to rounding: float32, different batch shapes

COLUMNS = {  # heading and format
    "items": ("items", ">5"),
    "ours": ("   ours", ">7.4f"),
    "harness": ("harness", ">7.4f"),
    "same": (" same", ">5"),
    "explained": ("explained", ">9"),
    "unexplained": ("unexplained", ">11"),
    "max_nats_difference": ("max nats", ">8.1e"),
    "acc": ("   acc", ">6.4f"),
    "acc_same": (" same", ">5"),
    "acc_norm": ("acc_norm", ">8.4f"),
    "acc_norm_same": (" same", ">5"),
}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Hugging Face folder that scripts.export_hf wrote")
    parser.add_argument("--items", required=True, help="predictions of scripts.base_eval (float32): *.items.jsonl")
    parser.add_argument("--bundle", default="", help="URL, zip file or folder of the tasks, as for scripts.base_eval")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), help="labels of the tasks to check")
    parser.add_argument("--max-per-task", type=int, default=0, help="maximum examples per task, 0 for all")
    parser.add_argument("--device-type", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-size", type=int, default=8, help="the harness's batch size")
    parser.add_argument("--cache", default="", help="file to cache the harness's scores in, for another check")
    return parser.parse_args()


# --- tasks for the harness -----------------------------------------------------------------------


def harness_task(task: Task) -> dict[str, Any]:
    """The harness's definition of a multiple-choice or language-modelling task.

    It scores everything after the question. Of the delimiter (such as "\\nAnswer: "), only the trailing white space,
    which merges with the answer's first token, is therefore counted as part of the answer.
    """
    from datasets import Dataset
    from lm_eval.api.samplers import ContextSampler

    class DrawnShots(ContextSampler):
        def sample(self, n, eval_doc=None, df=None, **kwargs):
            return [self.df[shot] for shot in eval_doc["shots"]]

    asked_end = task.delimiter.rstrip()
    answer_start = task.delimiter[len(asked_end) :]
    docs = []
    for index, record in enumerate(task.records):
        doc = {"line": task.lines[index], "shots": draw_shots(task, index)}
        if task.kind == "multiple_choice":
            doc |= {"asked": record["query"] + asked_end, "choices": record["choices"], "answer": record["gold"]}
        else:
            doc |= {"asked": record["context"].strip() + asked_end, "answer": answer_start + record["continuation"]}
        docs.append(doc)
    is_choice = task.kind == "multiple_choice"
    kind = {"output_type": "multiple_choice", "doc_to_choice": "choices"} if is_choice else {}
    return {
        "task": task.label,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(docs)},
        "test_split": "test",
        "fewshot_split": "test",
        "fewshot_config": {"sampler": DrawnShots},
        "num_fewshot": task.num_shots,
        "fewshot_delimiter": SHOT_SEPARATOR,
        "target_delimiter": answer_start if is_choice else "",
        "output_type": "loglikelihood",
        "doc_to_text": "asked",
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}, *([{"metric": "acc_norm"}] if is_choice else [])],
        **kind,
    }


def run_harness(lm, tasks: Sequence[Task], max_per_task: int, cache: str) -> dict[str, list[dict[str, Any]]]:
    """The harness's log of every example, by task."""
    from lm_eval import simple_evaluate

    definitions = [harness_task(task) for task in tasks]
    results = simple_evaluate(
        lm, tasks=definitions, limit=max_per_task or None, use_cache=cache or None, bootstrap_iters=0, log_samples=True
    )
    return results["samples"]


# --- comparison ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One example: our item; the harness's mean loss per answer (nats) and prediction under our rule; its predictions
    under its own two rules and whether they were right; `reason` why it may differ from ours, "" for none."""

    item: dict[str, Any]
    nats: tuple[float, ...]
    prediction: int
    by_sum: int
    by_characters: int
    acc: float
    acc_norm: float
    reason: str

    @property
    def is_same(self) -> bool:
        return self.prediction == self.item["prediction"]

    @property
    def nats_difference(self) -> float:
        return max(abs(ours - theirs) for ours, theirs in zip(self.item["nats"], self.nats, strict=True))


@dataclass(frozen=True)
class Answer:
    """An answer as the harness saw it: tokens of context and answer, and its log-likelihood."""

    text: str
    context: list[int]
    tokens: list[int]
    loglikelihood: float
    is_greedy: bool
    is_split: bool  # tokenised together, context and answer give different tokens
    is_cut: bool


def read_answers(lm, sample: dict[str, Any]) -> list[Answer]:
    answers = []
    for (context, text), (loglikelihood, is_greedy) in zip(sample["arguments"], sample["filtered_resps"], strict=True):
        context_tokens, tokens = lm._encode_pair(context, text)
        whole = context_tokens + tokens
        is_split = lm.tok_encode(context + text) != whole
        is_cut = len(whole) > lm.max_length + 1
        answers.append(Answer(text, context_tokens, tokens, loglikelihood, is_greedy, is_split, is_cut))
    return answers


def compare(lm, kind: str, sample: dict[str, Any], item: dict[str, Any]) -> Comparison:
    answers = read_answers(lm, sample)
    num_shared = shared_tokens([answer.tokens for answer in answers]) if kind == "multiple_choice" else 0
    shared = 0.0
    if num_shared:
        first = answers[0]
        ((shared, _),) = lm._loglikelihood_tokens(
            [(("", ""), first.context, first.tokens[:num_shared])], disable_tqdm=True
        )
    nats = tuple((shared - a.loglikelihood) / (len(a.tokens) - num_shared) for a in answers)
    if kind == "multiple_choice":
        prediction = nats.index(min(nats))
        by_sum = argmax([a.loglikelihood for a in answers])
        by_characters = argmax(
            [a.loglikelihood / len(choice) for a, choice in zip(answers, sample["doc"]["choices"], strict=True)]
        )
    else:
        prediction = by_sum = by_characters = int(answers[0].is_greedy)
    acc, acc_norm = sample["acc"], sample.get("acc_norm", sample["acc"])
    return Comparison(item, nats, prediction, by_sum, by_characters, acc, acc_norm, reason(answers, nats, kind))


def argmax(values: list[float]) -> int:
    return values.index(max(values))


def shared_tokens(rows: list[list[int]]) -> int:
    """Length of the common prefix of all answers, leaving at least one token of each."""
    shortest = min(map(len, rows))
    common = next((t for t in range(shortest) if len({row[t] for row in rows}) > 1), shortest)
    return min(common, shortest - 1)


def reason(answers: Sequence[Answer], nats: tuple[float, ...], kind: str) -> str:
    """Why the harness may predict something else than we do, "" if there is no reason."""
    if any(answer.is_cut for answer in answers):
        return "too long: the harness cuts each answer's row separately, <|bos|> included"
    if any(answer.is_split for answer in answers):
        return "context and answer merge at their boundary: the harness tokenises them separately"
    if kind == "multiple_choice" and sorted(nats)[1] - sorted(nats)[0] < SAME_NATS:
        return "a tie within rounding"
    return ""


# --- output --------------------------------------------------------------------------------------


def report(task: Task, comparisons: list[Comparison]) -> dict[str, Any]:
    """Print a task's row and its differences; returns the row."""
    count = len(comparisons)
    gold = {line: record.get("gold", 1) for line, record in zip(task.lines, task.records, strict=True)}

    def same(attribute: str) -> int:
        return sum(getattr(c, attribute) == c.item["prediction"] for c in comparisons)

    row = {
        "task": task.label,
        "items": count,
        "ours": sum(c.item["is_correct"] for c in comparisons) / count,
        "harness": sum(c.prediction == gold[c.item["line"]] for c in comparisons) / count,
        "same": same("prediction"),
        "explained": sum(not c.is_same and bool(c.reason) for c in comparisons),
        "unexplained": sum(not c.is_same and not c.reason for c in comparisons),
        "max_nats_difference": max((c.nats_difference for c in comparisons if not c.reason), default=0.0),
        "acc": sum(c.acc for c in comparisons) / count,
        "acc_same": same("by_sum"),
        "acc_norm": sum(c.acc_norm for c in comparisons) / count,
        "acc_norm_same": same("by_characters"),
    }
    numbers = [f"{row[name]:{form}}" for name, (_, form) in COLUMNS.items()]
    print(f"{task.label:<28}", *numbers)
    for text, number in Counter(c.reason for c in comparisons if c.reason).items():
        differing = [c.item["line"] for c in comparisons if c.reason == text and not c.is_same]
        print(f"    {number} examples, {len(differing)} predicted differently (lines {differing}): {text}")
    for c in comparisons:
        if not c.is_same and not c.reason:
            ours = f"{c.item['prediction']} {c.item['nats']}"
            print(f"    line {c.item['line']}: ours {ours}, harness {c.prediction} {c.nats}")
    return row


def read_items(path: Path) -> dict[str, dict[int, dict[str, Any]]]:
    """Our predictions by task and line in the task's file."""
    try:
        items = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the predictions in {path} ({error}); run scripts.base_eval first") from error
    by_task: dict[str, dict[int, dict[str, Any]]] = {}
    for item in items:
        by_task.setdefault(item["task"], {})[item["line"]] = item
    return by_task


def choose_tasks(bundle: Path, labels: Sequence[str]) -> list[Task]:
    tasks = {task.label: task for task in read_tasks(bundle) if task.kind != "schema"}
    if unknown := [label for label in labels if label not in tasks]:
        raise UserError(f"--tasks {' '.join(unknown)}: no such task here; there are {' '.join(tasks)}")
    return [tasks[label] for label in labels]


def main(args: argparse.Namespace) -> None:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"this check needs lm-evaluation-harness ({error}); install it: pip install lm-eval") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    items = read_items(Path(args.items).expanduser())
    tasks = choose_tasks(fetch_bundle(args.bundle), args.tasks)
    if missing := [task.label for task in tasks if task.label not in items]:
        raise UserError(f"{args.items} has no predictions for {' '.join(missing)}")
    lm = HFLM(
        pretrained=str(Path(args.folder).expanduser()), dtype="float32", device=args.device_type,
        batch_size=args.batch_size, add_bos_token=True,
    )  # fmt: skip
    with torch.no_grad():
        samples = run_harness(lm, tasks, args.max_per_task, args.cache)
    print(f"{'task':<28}", *(heading for heading, _ in COLUMNS.values()))
    rows = []
    for task in tasks:
        ours = items[task.label]
        known = [sample for sample in samples[task.label] if sample["doc"]["line"] in ours]
        rows.append(report(task, [compare(lm, task.kind, sample, ours[sample["doc"]["line"]]) for sample in known]))
    print(json.dumps(rows))
    if any(row["unexplained"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, parse_args)
