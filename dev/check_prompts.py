"""Check the standard prompts and their scores against lm-evaluation-harness, item by item: a table, then one JSON line.

    pip install lm-eval                              # 0.4.13 was used; not a dependency of the project
    python -m scripts.chat_eval -i base --prompts standard --dtype float32 --max-problems 30
    python -m scripts.export_hf --output d4-hf
    python dev/check_prompts.py d4-hf --results ~/.cache/nanochat/chat_eval/base_d4_step_000500

The harness loads the exported folder with transformers, its own task definitions, and the data sets from the hub or
HF_ENDPOINT, and answers the questions that our results are about. Two of its settings are ours: worked examples are the
first of their split, where it would draw them for ARC and GSM8K; and HumanEval's answers are compared as texts only,
since its judge needs the network. Questions that had no room for all worked examples, or were cut, are left out: the
harness cuts texts elsewhere.

Columns: items compared; prompts that are the same text; of these the answers (texts, or log-likelihoods within 0.001
nats), and every score; items that differ, with their numbers. Exits with status 1 if one does.
"""

import argparse
import functools
import json
import logging
import re
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.common import UserError, run_main
from nanochat.data.chat import visible_text

SAME_NATS = 1e-3  # closer log-likelihoods of a choice are equal up to rounding: float32, sums of many tokens
BOS = "<|bos|>"
FIRST_SHOTS = {"fewshot_config": {"sampler": "first_n"}}
SCORES = {"acc": "acc", "acc_norm": "acc_norm", "strict": "strict-match", "flexible": "flexible-extract"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Hugging Face folder that scripts.export_hf wrote")
    parser.add_argument("--results", required=True, help="folder of scripts.chat_eval's results (float32, greedy)")
    parser.add_argument("--max-tokens", type=int, default=512, help="as for scripts.chat_eval")
    parser.add_argument("--device-type", default="cpu", help="cpu or cuda")
    parser.add_argument("--batch-size", type=int, default=8, help="the harness's batch size")
    return parser.parse_args()


# --- the harness's side --------------------------------------------------------------------------


def definitions(name: str, indices: list[int]) -> Iterator[tuple[dict[str, Any], dict[int, int]]]:
    """The harness's tasks that hold our items `indices`, and where: its number of each of these items."""
    same = {index: index for index in indices}
    if name.startswith("ARC-Easy"):
        yield {"task": "arc_easy", "num_fewshot": 0}, same
    elif name.startswith("ARC-Challenge"):
        yield {"task": "arc_challenge", "num_fewshot": 25, **FIRST_SHOTS}, same
    elif name.startswith("GSM8K"):
        yield {"task": "gsm8k", **FIRST_SHOTS}, same
    elif name.startswith("HumanEval"):
        yield humaneval(), same
    else:
        repo, config, kind = (
            ("TIGER-Lab/MMLU-Pro", "default", "mmlu_pro") if "Pro" in name else ("cais/mmlu", "all", "mmlu")
        )
        column, shots = ("category", "validation") if "Pro" in name else ("subject", "dev")
        splits = {split: load(repo, config, split) for split in ("test", shots)}
        places: dict[str, list[int]] = defaultdict(list)
        for place, subject in enumerate(splits["test"][column]):
            places[subject].append(place)
        for subject, own in places.items():
            if wanted := sorted(set(indices) & set(own)):
                rows = {split: of_subject(data, column, subject) for split, data in splits.items()}
                data = functools.partial(lambda rows, **_: rows, rows)
                task = {"task": f"{kind}_{subject.replace(' ', '_')}", "num_fewshot": 5, "custom_dataset": data}
                yield task, {own.index(index): index for index in wanted}


@functools.cache
def load(repo: str, config: str, split: str):
    import datasets

    return datasets.load_dataset(repo, config, split=split)


def of_subject(data, column: str, subject: str):
    return data.select([place for place, own in enumerate(data[column]) if own == subject])


def humaneval() -> dict[str, Any]:
    """The harness's task without its judge, which is fetched from the network when the task is read."""
    import lm_eval.tasks

    class Loader(yaml.SafeLoader):
        pass

    Loader.add_constructor("!function", lambda loader, node: None)
    path = Path(lm_eval.tasks.__file__).parent / "humaneval" / "humaneval.yaml"
    config = yaml.load(path.read_text(), Loader)
    del config["filter_list"]
    return config | {"task": "humaneval_texts", "metric_list": [{"metric": "bypass"}], "unsafe_code": False}


@functools.cache
def harness_tasks():
    from lm_eval.tasks import TaskManager

    return TaskManager()


def answer(lm, task: Mapping[str, Any], numbers: list[int], max_tokens: int) -> dict[int, dict[str, Any]]:
    """What the harness made of items `numbers`: prompt, answer (a text, or log-likelihoods), scores by our names."""
    from lm_eval import simple_evaluate

    manager = harness_tasks()
    entry = manager._entry(task["task"])  # one of the harness's own, which a dictionary alone would not be read from
    built = manager._factory.build(entry, overrides=dict(task), registry=manager._index) if entry else dict(task)
    found = simple_evaluate(
        lm, tasks=[built], samples={task["task"]: numbers}, bootstrap_iters=0, log_samples=True,
        gen_kwargs={"max_gen_toks": max_tokens, "do_sample": False}, confirm_run_unsafe_code=True,
    )  # fmt: skip
    items: dict[int, dict[str, Any]] = {}
    for sample in found["samples"][task["task"]]:
        item = items.setdefault(sample["doc_id"], {"prompt": sample["arguments"][0][0], "scores": {}})
        if len(sample["resps"]) > 1 or isinstance(sample["resps"][0][0], tuple):
            item["answer"] = [float(response[0][0]) for response in sample["resps"]]
            item["scores"] |= {ours: sample[theirs] for ours, theirs in SCORES.items() if theirs in sample}
        else:
            item["answer"] = sample["resps"][0][0]
            if "exact_match" in sample:
                ours = next((ours for ours, theirs in SCORES.items() if theirs == sample["filter"]), "accuracy")
                item["scores"][ours] = sample["exact_match"]
    return items


# --- comparison ----------------------------------------------------------------------------------


def compare(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, bool]:
    """What is the same of an item."""
    (sample,) = ours["samples"]
    if ours["logits"] is not None:
        pairs = zip(ours["logits"].values(), theirs["answer"], strict=True)
        is_same = max(abs(a - b) for a, b in pairs) < SAME_NATS
    else:
        is_same = visible_text(sample["output"]) == theirs["answer"]
    own = {**sample["scores"], "accuracy": float(sample["is_correct"])}
    own.setdefault("acc", own["accuracy"])
    scores = all(own[name] == value for name, value in theirs["scores"].items())
    return {"prompts": BOS + theirs["prompt"] == ours["prompt"], "answers": is_same, "scores": scores}


def read(path: Path) -> tuple[str, list[dict[str, Any]]]:
    """The name of a task, and its items with all worked examples."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
    settings, items = lines[0]["settings"], [item for item in lines[1:] if item.get("num_shots") is not None]
    num_shots = int(re.search(r"(\d+)-shot", settings["task"])[1])
    return settings["task"], [item for item in items if item["num_shots"] == num_shots and not item["is_cut"]]


def main(args: argparse.Namespace) -> None:
    try:
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise UserError(f"this check needs lm-evaluation-harness ({error}); install it: pip install lm-eval") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    results = [read(path) for path in sorted(Path(args.results).expanduser().glob("*-shot.jsonl"))]
    if not any(items for _, items in results):
        raise UserError(f"--results {args.results} has no results of standard prompts; run scripts.chat_eval first")
    lm = HFLM(
        pretrained=str(Path(args.folder).expanduser()), dtype="float32", device=args.device_type,
        batch_size=args.batch_size, add_bos_token=True,
    )  # fmt: skip
    print(f"{'task':<24} items prompts answers scores   accuracy by harness")
    rows = []
    for name, items in results:
        ours, same, theirs = {item["index"]: item for item in items}, {}, {}
        with torch.no_grad():
            for task, numbers in definitions(name, list(ours)):
                for number, item in answer(lm, task, sorted(numbers), args.max_tokens).items():
                    theirs[numbers[number]] = item
        for index, item in ours.items():
            same[index] = compare(item, theirs[index])
        row: dict[str, Any] = {"task": name, "items": len(same)}
        row |= {key: sum(one[key] for one in same.values()) for key in ("prompts", "answers", "scores")}
        main_score = "acc_norm" if name.startswith("ARC") else "strict" if name.startswith("GSM8K") else "acc"
        found = [item["scores"].get(main_score, item["scores"].get("accuracy")) for item in theirs.values()]
        row["harness"] = None if None in found else sum(found) / len(found)
        print("{task:<24} {items:>5} {prompts:>7} {answers:>7} {scores:>6}   {harness}".format_map(row))
        for index, one in same.items():
            if not all(one.values()):
                print(f"    item {index}: other {', '.join(key for key, value in one.items() if not value)}")
        rows.append(row)
    print(json.dumps(rows))
    if any(row[key] < row["items"] for row in rows for key in ("prompts", "answers", "scores")):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, parse_args)
