"""GSM8K, grade-school word problems whose worked answers call a calculator.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168. Hub: openai/gsm8k, MIT.

| split | rows | for |
|---|---:|---|
| train | 7,000 | training: all of the hub's train split but its last 473 rows |
| validation | 473 | watching a run: those rows, as the hub has no such split |
| test | 1,319 | reporting |

An answer reads `48/2 = <<48/2=24>>24 clips` and ends with a line `#### 72`. The expression in the brackets becomes a
tool call, and its result is what our calculator says, since that is what the model will get to see when it calls it:
"24.0" here, or "0.30000000000000004" for 3*.10, after which the text goes on with the rounded number. A call whose
result in the data is another number than the calculator's (by more than a 10^9th) would teach to distrust the tool, so
it is left out and only the text stays. In the data as published that never happens: of 23,716 calls in train, 17,368
have the very same text, 6,307 the same value ("24.0"), 41 differ by the rounding of floats; test has 4,282 of them.
"""

import math
import re

from nanochat.data.chat import as_parts, visible_text
from nanochat.engine.calculator import calculate
from tasks.common import ANSWER_MARK, Completion, Conversation, Task, last_number, marked_number
from tasks.loading import HubSplit, Rows

REPO = "openai/gsm8k"
NUM_ROWS = {"train": 7473, "test": 1319}
NUM_TRAIN_ROWS = 7000  # of the hub's train split; the others are the validation split
COLUMNS = {"question": str, "answer": str}
_CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")


class GSM8K(Task):
    """`subset` is "main", `split` as in the table above.

    `evaluate` takes the last number of the text for the answer; the strict score, which is the reward too, wants it
    after `####` on the last line and nothing else there. Numbers count by value: `72.`, `$72` and `72.0` are 72.
    """

    name = "GSM8K"
    kind = "generative"
    has_reward = True

    def __init__(self, subset: str, split: str) -> None:
        assert subset == "main", subset
        assert split in ("train", "validation", "test"), split
        self.split = self.purpose = split
        hub_split = "test" if split == "test" else "train"
        # Scores are measured on rows of the hub's train split too, so it has to be whole.
        self.rows = Rows(HubSplit(REPO, subset, hub_split, COLUMNS, NUM_ROWS[hub_split], is_measured=True))

    @property
    def _places(self) -> range:
        """Rows of the hub's split that are this one's."""
        everything = range(len(self.rows))
        return {
            "train": everything[:NUM_TRAIN_ROWS],
            "validation": everything[NUM_TRAIN_ROWS:],
            "test": everything,
        }[self.split]

    def __len__(self) -> int:
        return len(self._places)

    def conversation(self, index: int) -> Conversation:
        place = self._places[index]
        row = self.rows[place]
        if marked_number(row["answer"]) is None:
            raise self.rows.error(place, f"the answer does not end with {ANSWER_MARK} and a number")
        messages = [
            {"role": "user", "content": row["question"]},
            {"role": "assistant", "content": answer_parts(row["answer"])},
        ]
        return {"messages": messages}

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        return self._is_right(last_number, conversation, completion)

    def score(self, conversation: Conversation, completion: Completion) -> dict[str, float]:
        """ "flexible" is what `evaluate` says, "strict" wants the form that is trained too."""
        return {
            "flexible": float(self._is_right(last_number, conversation, completion)),
            "strict": float(self._is_right(marked_number, conversation, completion)),
        }

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        return float(self._is_right(marked_number, conversation, completion))

    def _is_right(self, find_number, conversation: Conversation, completion: Completion) -> bool:
        truth = marked_number(visible_text(conversation["messages"][-1]["content"]))
        return find_number(visible_text(completion)) == truth


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
        expression, result = call[1].strip(), calculate(call[1].strip())
        if result is not None and _agree(result, call[2]):
            parts.append({"type": "python", "text": expression})
            parts.append({"type": "python_output", "text": result})
    parts.append({"type": "text", "text": answer[position:]})
    return as_parts([part for part in parts if part["text"]])


def _agree(result: str, written: str) -> bool:
    """Whether a result in the data is the calculator's, but for the rounding of floats."""
    theirs = last_number(written)
    try:
        return theirs is not None and math.isclose(float(result), theirs, rel_tol=1e-9, abs_tol=1e-12)
    except ValueError:  # the calculator's result is a text
        return False
