"""ARC, grade-school science questions with three to five choices, in an easy and a challenge set.

Clark et al., "Think you have Solved Question Answering? Try ARC, the AI2 Reasoning Challenge", arXiv 1803.05457.
Hub: allenai/ai2_arc, CC BY-SA 4.0. Train is for training, validation for watching a run, test for reporting.
As published, 3 of ARC-Easy's 2,376 test questions are in its train split as well.

Choices keep their labels, A to E, or 1 to 5 in about one question in thirty, so `letters` differs from row to row.
Every label is one character, hence one token (`common.render_choices`).
"""

from tasks.common import Conversation, Task, choice_conversation
from tasks.loading import HubSplit, Rows

REPO = "allenai/ai2_arc"
NUM_ROWS = {
    ("ARC-Easy", "train"): 2251, ("ARC-Easy", "validation"): 570, ("ARC-Easy", "test"): 2376,
    ("ARC-Challenge", "train"): 1119, ("ARC-Challenge", "validation"): 299, ("ARC-Challenge", "test"): 1172,
}  # fmt: skip
COLUMNS = {"question": str, "choices": {"text": [str], "label": [str]}, "answerKey": str}
LABELS = frozenset("ABCDE12345")


class ARC(Task):
    """`subset` is "ARC-Easy" or "ARC-Challenge", `split` "train", "validation" or "test"."""

    kind = "categorical"
    baseline = 0.25  # the mean of 1 / choices is within 0.0007 of it in every split

    def __init__(self, subset: str, split: str) -> None:
        assert (subset, split) in NUM_ROWS, (subset, split)
        self.name, self.purpose = subset, split
        is_measured = split != "train"
        self.rows = Rows(HubSplit(REPO, subset, split, COLUMNS, NUM_ROWS[subset, split], is_measured))

    def conversation(self, index: int) -> Conversation:
        row = self.rows[index]
        texts, labels, right = row["choices"]["text"], row["choices"]["label"], row["answerKey"]
        if len(texts) != len(labels) or len(set(labels)) != len(labels) or not LABELS.issuperset(labels):
            raise self.rows.error(index, f"{len(texts)} choices are labelled {labels}")
        if right not in labels:
            raise self.rows.error(index, f"the answer is {right!r}, but the choices are labelled {labels}")
        return choice_conversation(row["question"], texts, labels, right)
