"""ARC, grade-school science questions with three to five choices, in an easy and a challenge set.

Clark et al., "Think you have Solved Question Answering? Try ARC, the AI2 Reasoning Challenge", arXiv 1803.05457.
Hub: allenai/ai2_arc, CC BY-SA 4.0. Train is for training, validation for watching a run, test for reporting.
As published, 3 of ARC-Easy's 2,376 test questions are in its train split as well.

Choices keep their labels, A to E, or 1 to 5 in about one question in thirty, so `letters` differs from row to row.
Every label is one character, hence one token (`common.render_choices`).

The standard prompt is that of lm-evaluation-harness (tasks arc_easy and arc_challenge, version 1.0): choices are not
shown, and the text of each is scored as a continuation. `acc` takes the likeliest; `acc_norm`, which counts here, the
likeliest per character. ARC-Easy comes without worked examples, ARC-Challenge with 25 as in the Open LLM Leaderboard
(2023), the first of the train split; the harness draws others for each question.
"""

from dataclasses import replace
from functools import cached_property

from tasks.common import Conversation, Task, choice_conversation, text_problem
from tasks.loading import HubSplit, Rows

REPO = "allenai/ai2_arc"
NUM_ROWS = {
    ("ARC-Easy", "train"): 2251, ("ARC-Easy", "validation"): 570, ("ARC-Easy", "test"): 2376,
    ("ARC-Challenge", "train"): 1119, ("ARC-Challenge", "validation"): 299, ("ARC-Challenge", "test"): 1172,
}  # fmt: skip
COLUMNS = {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}
LABELS = frozenset("ABCDE12345")
NUM_SHOTS = {"ARC-Easy": 0, "ARC-Challenge": 25}  # of the standard prompt


class ARC(Task):
    """`subset` is "ARC-Easy" or "ARC-Challenge", `split` "train", "validation" or "test"."""

    kind = "categorical"
    baseline = 0.25  # the mean of 1 / choices is within 0.0007 of it in every split

    def __init__(self, subset: str, split: str) -> None:
        assert (subset, split) in NUM_ROWS, (subset, split)
        self.name, self.purpose = subset, split
        is_measured = split != "train"
        self.source = HubSplit(REPO, subset, split, COLUMNS, NUM_ROWS[subset, split], is_measured)
        self.rows = Rows(self.source)

    def question(self, index: int) -> tuple[str, list[str], list[str], str]:
        """Question, choices, their labels, and the right label."""
        row = self.rows[index]
        texts, labels, right = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
        if len(texts) != len(labels) or len(set(labels)) != len(labels) or not LABELS.issuperset(labels):
            raise self.rows.error(index, f"{len(texts)} choices are labelled {labels}")
        if right not in labels:
            raise self.rows.error(index, f"the answer is {right!r}, but the choices are labelled {labels}")
        return row["question"], texts, labels, right

    def conversation(self, index: int) -> Conversation:
        return choice_conversation(*self.question(index))


class StandardARC(ARC):
    """The test split of `subset` with its standard prompt."""

    is_text = by_length = True

    def __init__(self, subset: str) -> None:
        super().__init__(subset, "test")
        self.num_shots = NUM_SHOTS[subset]
        self.name = f"{subset} {self.num_shots}-shot"
        self.train = ARC(subset, "train")
        self.train.rows = Rows(replace(self.train.source, is_measured=True))  # shots are part of the benchmark

    @cached_property
    def shots(self) -> list[str]:
        questions = map(self.train.question, range(self.num_shots))
        return [f"{_asked(question)} {texts[labels.index(right)]}\n\n" for question, texts, labels, right in questions]

    def conversation(self, index: int) -> Conversation:
        question, texts, labels, right = self.question(index)
        options = [f" {text}" for text in texts]
        return text_problem(_asked(question), right, shots=self.shots, letters=tuple(labels), options=options)


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"
