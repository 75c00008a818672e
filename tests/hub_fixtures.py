"""Rows made by us in place of the hub's: `datasets.load_dataset` answers from a table, the rest of the code is real."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import datasets
import pytest

Key = tuple[str, str, str]  # repository, configuration, split


def serve_rows(monkeypatch: pytest.MonkeyPatch, tables: Mapping[Key, Sequence[dict[str, Any]]]) -> list[Key]:
    """Let the `datasets` library find `tables` and nothing else; returns the list of what it was asked for."""
    asked: list[Key] = []

    def load_dataset(repo: str, config: str, *, split: str) -> datasets.Dataset:
        asked.append((repo, config, split))
        if asked[-1] not in tables:
            raise ConnectionError(f"Couldn't reach '{repo}' on the Hub")
        return datasets.Dataset.from_list(list(tables[asked[-1]]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    return asked


def refuse_network(monkeypatch: pytest.MonkeyPatch) -> Callable[[], int]:
    """Let every HTTP request of the `requests` library fail; returns a function that counts them."""
    import requests

    attempts: list[str] = []

    def get(url: str, **options: Any) -> None:
        attempts.append(url)
        raise requests.ConnectionError("no network in tests")

    monkeypatch.setattr(requests, "get", get)
    return lambda: len(attempts)


def arc_row(labels: str, answer: str, *, number: int = 0) -> dict[str, Any]:
    choices = {"text": [f"choice {label} of {number}" for label in labels], "label": list(labels)}
    return {"id": f"row_{number}", "question": f"Question {number}?", "choices": choices, "answerKey": answer}


def mmlu_row(subject: str, answer: int, *, number: int = 0) -> dict[str, Any]:
    choices = [f"choice {i} of {number}" for i in range(4)]
    return {"question": f"Question {number}?", "subject": subject, "choices": choices, "answer": answer}


def mmlu_pro_row(
    category: str, answer: int, *, num_options: int = 10, number: int = 0, worked: bool = False
) -> dict[str, Any]:
    letter = "ABCDEFGHIJ"[answer]
    cot = f"A: Let's think step by step. It is {answer}. The answer is ({letter})." if worked else ""
    row = {"question_id": number, "question": f"Question {number}?", "category": category, "src": "tests"}
    row["options"] = [f"choice {i} of {number}" for i in range(num_options)]
    return row | {"answer": letter, "answer_index": answer, "cot_content": cot}


def gsm8k_row(a: int, b: int) -> dict[str, str]:
    total, half = a + b, f"{(a + b) / 2:g}"
    answer = f"There are {a}+{b} = <<{a}+{b}={total}>>{total} pens.\nHalf is <<{total}/2={half}>>{half}.\n#### {half}"
    return {"question": f"{a} pens and {b} pens, halved?", "answer": answer}


HUMANEVAL_ROW = {
    "task_id": "HumanEval/0",
    "prompt": 'import math\n\n\ndef helper(x):\n    return x + 1\n\n\ndef double(x: int) -> int:\n    """Twice x."""\n',
    "canonical_solution": "    y = 2 * x\n    return y\n",
    "test": "def check(candidate):\n    assert candidate(2) == 4\n    assert candidate(helper(2)) == 6\n",
    "entry_point": "double",
}
