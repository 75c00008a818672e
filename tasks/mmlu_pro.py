"""MMLU-Pro, harder questions on 14 subjects with up to ten choices.

Wang et al., "MMLU-Pro: A More Robust and Challenging Multi-Task Language Understanding Benchmark", arXiv 2406.01574.
Hub: TIGER-Lab/MMLU-Pro, MIT. Test is for reporting; validation, five questions of each subject with worked answers, is
for watching a run. There is nothing to train on.

The standard prompt is the paper's, as lm-evaluation-harness has it (task mmlu_pro, version 3.1): the subject, its five
questions of the validation split with their worked answers, the question. The model reasons in writing, and its answer
is the letter in the first "the answer is (X)".
"""

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from nanochat.data.chat import visible_text
from tasks.common import (
    Completion,
    Conversation,
    Task,
    choice_conversation,
    lettered,
    reference_text,
    text_problem,
)
from tasks.loading import HubSplit, Rows

REPO = "TIGER-Lab/MMLU-Pro"
NUM_ROWS = {"validation": 70, "test": 12032}
COLUMNS = {
    "question": str, "options": [str], "answer": str, "answer_index": int, "category": str, "cot_content": str,
}  # fmt: skip
LETTERS = tuple("ABCDEFGHIJ")
NUM_SHOTS = 5  # of the standard prompt
REASONING = "Let's think step by step."  # with which worked answers, and the answers asked for, begin
_ANSWER = re.compile(r"answer is \(?([A-J])\)?")


class MMLUPro(Task):
    """`split` is "validation" or "test". A conversation has a `category`, its subject."""

    name = "MMLU-Pro"
    kind = "categorical"

    def __init__(self, split: str) -> None:
        assert split in NUM_ROWS, split
        self.purpose = split
        self.rows = Rows(HubSplit(REPO, "default", split, COLUMNS, NUM_ROWS[split], is_measured=True))

    @cached_property
    def baseline(self) -> float:
        """Of guessing: about one question in six has fewer than ten choices."""
        options = self.rows.column("options")
        return sum(1 / len(choices) for choices in options) / len(options)

    def question(self, index: int) -> dict[str, Any]:
        """Row `index`, whose answer is the letter of one of its choices."""
        row = self.rows[index]
        letters, right = LETTERS[: len(row["options"])], row["answer"]
        if len(row["options"]) > len(LETTERS) or right not in letters or letters.index(right) != row["answer_index"]:
            found = f"the answer is {right!r}, number {row['answer_index']} of {len(row['options'])} choices"
            raise self.rows.error(index, found)
        return row

    def conversation(self, index: int) -> Conversation:
        row = self.question(index)
        letters = LETTERS[: len(row["options"])]
        return choice_conversation(row["question"], row["options"], letters, row["answer"], category=row["category"])


class StandardMMLUPro(MMLUPro):
    """The test split with its standard prompt."""

    name = f"MMLU-Pro {NUM_SHOTS}-shot"
    kind = "generative"
    is_text, num_shots = True, NUM_SHOTS
    stops = ("Question:",)

    def __init__(self) -> None:
        super().__init__("test")
        self.validation = MMLUPro("validation")

    @cached_property
    def shots(self) -> dict[str, list[str]]:
        """The worked examples of each subject."""
        shots: dict[str, list[str]] = {}
        for row in map(self.validation.question, range(len(self.validation))):
            worked = row["cot_content"].removeprefix(f"A: {REASONING} ")
            shots.setdefault(row["category"], []).append(f"{_asked(row)} {worked}\n\n")
        return {category: texts[:NUM_SHOTS] for category, texts in shots.items()}

    def conversation(self, index: int) -> Conversation:
        row = self.question(index)
        intro = (
            f"The following are multiple choice questions (with answers) about {row['category']}. Think step by step "
            'and then finish your answer with "the answer is (X)" where X is the correct letter choice.\n'
        )
        answer = f"The answer is ({row['answer']})."
        return text_problem(
            _asked(row), answer, intro=intro, shots=self.shots[row["category"]], category=row["category"]
        )

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        said = _ANSWER.search(visible_text(completion))
        return said is not None and said[1] == _ANSWER.search(reference_text(conversation))[1]


def _asked(row: Mapping[str, Any]) -> str:
    choices = [choice.strip() for choice in row["options"]]
    return f"Question:\n{row['question']}\nOptions:\n{lettered(choices, LETTERS[: len(choices)])}Answer: {REASONING}"
