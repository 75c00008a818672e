"""MMLU, four-choice questions on 57 subjects from elementary to professional level.

Hendrycks et al., "Measuring Massive Multitask Language Understanding", arXiv 2009.03300. Hub: cais/mmlu, MIT.

| subset | split | for |
|---|---|---|
| auxiliary_train | train | training: 99,842 questions without a subject |
| all | validation, dev | watching a run |
| all | test | reporting |

MMLU's authors collected the auxiliary questions from other public school and science sets. None of them is in the test
split with the same choices; 14 test questions share their text, but not their choices, with one of the 8,336 that the
mirror has.
"""

from functools import cached_property

from nanochat.common import UserError
from tasks.common import Conversation, Task, choice_conversation
from tasks.loading import HubSplit, Rows

REPO = "cais/mmlu"
LETTERS = ("A", "B", "C", "D")
NUM_ROWS = {
    ("auxiliary_train", "train"): 99842, ("all", "validation"): 1531, ("all", "dev"): 285, ("all", "test"): 14042,
}  # fmt: skip
COLUMNS = {"question": str, "subject": str, "choices": [str], "answer": int}
SUBJECTS = tuple(
    """abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology college_chemistry
    college_computer_science college_mathematics college_medicine college_physics computer_security conceptual_physics
    econometrics electrical_engineering elementary_mathematics formal_logic global_facts high_school_biology
    high_school_chemistry high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics high_school_microeconomics
    high_school_physics high_school_psychology high_school_statistics high_school_us_history high_school_world_history
    human_aging human_sexuality international_law jurisprudence logical_fallacies machine_learning management marketing
    medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology public_relations
    security_studies sociology us_foreign_policy virology world_religions""".split()
)


class MMLU(Task):
    """`subset` and `split` as in the table above; `subject`, one of `SUBJECTS`, keeps only its questions.

    A conversation's `subject` is that of its row, "" in auxiliary_train. Raises `UserError` for an unknown subject.
    """

    name = "MMLU"
    kind = "categorical"
    baseline = 0.25

    def __init__(self, subset: str, split: str, *, subject: str = "") -> None:
        assert (subset, split) in NUM_ROWS, (subset, split)
        if subject and (subject not in SUBJECTS or subset != "all"):
            raise UserError(f"MMLU ({subset}) has no subject {subject!r}; there are {', '.join(SUBJECTS)}")
        self.subset, self.subject = subset, subject
        self.purpose = "validation" if split == "dev" else split
        # The hub has auxiliary_train both as a split of the configuration "all", with these columns, and as a
        # configuration with other columns; mirrors have the former.
        hub_split = "auxiliary_train" if subset == "auxiliary_train" else split
        self.rows = Rows(HubSplit(REPO, "all", hub_split, COLUMNS, NUM_ROWS[subset, split], subset == "all"))

    @cached_property
    def _places(self) -> range | list[int]:
        """The rows of this task. Raises `UserError` when a subject is missing, since the split is not MMLU's then."""
        if self.subset == "auxiliary_train":
            return range(len(self.rows))
        subjects = self.rows.column("subject")
        if odd := sorted(set(subjects) ^ set(SUBJECTS)):
            raise UserError(f"{self.rows.source} should have {len(SUBJECTS)} subjects; missing or unknown: {odd[:5]}")
        return [i for i, subject in enumerate(subjects) if self.subject in ("", subject)]

    def __len__(self) -> int:
        return len(self._places)

    def conversation(self, index: int) -> Conversation:
        place = self._places[index]
        row = self.rows[place]
        if len(row["choices"]) != len(LETTERS) or row["answer"] not in range(len(LETTERS)):
            fault = f"there are {len(row['choices'])} choices and the answer is number {row['answer']}"
            raise self.rows.error(place, fault)
        right = LETTERS[row["answer"]]
        return choice_conversation(row["question"], row["choices"], LETTERS, right, subject=row["subject"])
