"""MMLU, four-choice questions on 57 subjects from elementary to professional level.

Hendrycks et al., "Measuring Massive Multitask Language Understanding", arXiv 2009.03300. Hub: cais/mmlu, MIT.

Of the subset "all", validation and dev are for watching a run, test for reporting. The subset "auxiliary_train", whose
questions MMLU's authors collected from other public sets, is for training. None of these is in the test split with the
same choices; 14 test questions share their text, but not their choices, with one of the 8,336 that a mirror has.

The standard prompt is the paper's, with the spaces of lm-evaluation-harness (task mmlu, version 1.0): the subject, its
five questions of the dev split with their answers, the question; the likeliest letter is the answer.
"""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from nanochat.common import UserError
from tasks.common import Conversation, Task, choice_conversation, lettered, text_problem
from tasks.loading import HubSplit, Rows

REPO = "cais/mmlu"
LETTERS = ("A", "B", "C", "D")
NUM_SUBJECTS = 57
NUM_SHOTS = 5  # of the standard prompt
NUM_ROWS = {
    ("auxiliary_train", "train"): 99842, ("all", "validation"): 1531, ("all", "dev"): 285, ("all", "test"): 14042,
}  # fmt: skip
COLUMNS = {"question": str, "subject": str, "choices": [str], "answer": int}


class MMLU(Task):
    """`subset` is "all", or "auxiliary_train" with the split "train". A conversation has a `subject`, there ""."""

    name = "MMLU"
    kind = "categorical"
    baseline = 0.25

    def __init__(self, subset: str, split: str) -> None:
        assert (subset, split) in NUM_ROWS, (subset, split)
        self.purpose = "validation" if split == "dev" else split
        # The hub has auxiliary_train both as a split of the configuration "all", with these columns, and as a
        # configuration with other columns; mirrors have the former.
        hub_split = "auxiliary_train" if subset == "auxiliary_train" else split
        self.source = HubSplit(REPO, "all", hub_split, COLUMNS, NUM_ROWS[subset, split], is_measured=subset == "all")

    @cached_property
    def rows(self) -> Rows:
        """The rows. Raises `UserError` unless a split that is measured on has all of the subjects."""
        rows = Rows(self.source)
        if self.source.is_measured and (found := len(set(rows.column("subject")))) != NUM_SUBJECTS:
            raise UserError(f"{self.source} has {found} subjects instead of {NUM_SUBJECTS}; set HF_ENDPOINT to the hub")
        return rows

    def question(self, index: int) -> dict[str, Any]:
        """Row `index`, whose answer is one of four choices."""
        row = self.rows[index]
        if len(row["choices"]) != len(LETTERS) or row["answer"] not in range(len(LETTERS)):
            fault = f"there are {len(row['choices'])} choices and the answer is number {row['answer']}"
            raise self.rows.error(index, fault)
        return row

    def conversation(self, index: int) -> Conversation:
        row = self.question(index)
        right = LETTERS[row["answer"]]
        return choice_conversation(row["question"], row["choices"], LETTERS, right, subject=row["subject"])


class StandardMMLU(MMLU):
    """The test split with its standard prompt."""

    name = f"MMLU {NUM_SHOTS}-shot"
    is_text, num_shots = True, NUM_SHOTS

    def __init__(self) -> None:
        super().__init__("all", "test")
        self.dev = MMLU("all", "dev")

    @cached_property
    def shots(self) -> dict[str, list[str]]:
        """The worked examples of each subject."""
        shots: dict[str, list[str]] = {}
        for row in map(self.dev.question, range(len(self.dev))):
            shots.setdefault(row["subject"], []).append(f"{_asked(row)} {LETTERS[row['answer']]}\n\n")
        return {subject: texts[:NUM_SHOTS] for subject, texts in shots.items()}

    def conversation(self, index: int) -> Conversation:
        row = self.question(index)
        subject = row["subject"].replace("_", " ")
        return text_problem(
            _asked(row), LETTERS[row["answer"]], shots=self.shots[row["subject"]],
            intro=f"The following are multiple choice questions (with answers) about {subject}.\n\n",
            letters=LETTERS, options=[f" {letter}" for letter in LETTERS], subject=row["subject"],
        )  # fmt: skip


def _asked(row: Mapping[str, Any]) -> str:
    return f"{row['question'].strip()}\n{lettered(row['choices'], LETTERS)}Answer:"
