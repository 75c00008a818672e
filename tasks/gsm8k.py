"""GSM8K, grade-school word problems whose worked answers call a calculator.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168. Hub: openai/gsm8k, MIT.

Train is for training and has all rows of the hub's train split but the last 473, which are the validation split, for
watching a run; test, 1,319 rows, is for reporting.

An answer reads `48/2 = <<48/2=24>>24 clips` and ends with a line `#### 72`. The expression in brackets becomes a tool
call whose result is our calculator's, since that is what the model will see: "24.0" here, or "0.30000000000000004" for
3*.10, after which the text goes on with the rounded number. A result of another value in the data would teach the model
to distrust the tool, so only the text of such a call is kept; the published data have none.
"""

import math
import re

from nanochat.data.chat import as_parts
from nanochat.engine.calculator import calculate
from tasks.common import ANSWER_MARK, Conversation, NumericTask, last_number, marked_number, single_turn
from tasks.loading import HubSplit, Rows

REPO = "openai/gsm8k"
NUM_ROWS = {"train": 7473, "test": 1319}
PARTS = {"train": slice(7000), "validation": slice(7000, None), "test": slice(None)}  # of the hub's split
COLUMNS = {"question": str, "answer": str}
_CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")


class GSM8K(NumericTask):
    """`subset` is "main", `split` "train", "validation" or "test"."""

    name = "GSM8K"

    def __init__(self, subset: str, split: str) -> None:
        assert subset == "main", subset
        assert split in PARTS, split
        self.purpose = split
        hub_split = "test" if split == "test" else "train"
        # Scores are measured on rows of the hub's train split too, so it has to be complete.
        self.rows = Rows(
            HubSplit(REPO, subset, hub_split, COLUMNS, NUM_ROWS[hub_split], is_measured=True), PARTS[split]
        )

    def conversation(self, index: int) -> Conversation:
        row = self.rows[index]
        if marked_number(row["answer"]) is None:
            raise self.rows.error(index, f"the answer does not end with {ANSWER_MARK} and a number")
        return single_turn(row["question"], answer_parts(row["answer"]))


def answer_parts(answer: str) -> list[dict[str, str]]:
    """A worked answer as the parts of an assistant's message:

    >>> answer_parts("48/2 = <<48/2=24>>24 clips")
    [{'type': 'text', 'text': '48/2 = '}, {'type': 'python', 'text': '48/2'},
     {'type': 'python_output', 'text': '24.0'}, {'type': 'text', 'text': '24 clips'}]
    """
    parts, position = [], 0
    for call in _CALL.finditer(answer):
        parts.append({"type": "text", "text": answer[position : call.start()]})
        position = call.end()
        expression = call[1].strip()
        result = calculate(expression)
        if result is not None and _agree(result, call[2]):
            parts += [{"type": "python", "text": expression}, {"type": "python_output", "text": result}]
    parts.append({"type": "text", "text": answer[position:]})
    return as_parts([part for part in parts if part["text"]])


def _agree(result: str, written: str) -> bool:
    """Whether the calculator's `result` has the value written in the data, up to the rounding of floats."""
    theirs = last_number(written)
    try:
        return theirs is not None and math.isclose(float(result), theirs, rel_tol=1e-9, abs_tol=1e-12)
    except ValueError:  # the calculator's result is a text
        return False
