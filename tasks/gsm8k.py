"""GSM8K, grade-school word problems whose worked answers call a calculator.

Cobbe et al., "Training Verifiers to Solve Math Word Problems", arXiv 2110.14168. Hub: openai/gsm8k, MIT.

Train is for training and has all rows of the hub's train split but the last 473, which are the validation split, for
watching a run; test, 1,319 rows, is for reporting.

An answer reads `48/2 = <<48/2=24>>24 clips` and ends with a line `#### 72`. The expression in brackets becomes a tool
call whose result is our calculator's, since that is what the model will see: "24.0" here, or "0.30000000000000004" for
3*.10, after which the text goes on with the rounded number. A result of another value in the data would teach the model
to distrust the tool, so only the text of such a call is kept; the published data have none.

The standard prompt is that of lm-evaluation-harness (task gsm8k, version 3.0), with answers as they are in the data and
the first five of the train split as worked examples, where the harness draws others for each question. Answers are
compared as texts, by its two rules: "strict", which counts here, and "flexible".
"""

import math
import re
from functools import cached_property

from nanochat.data.chat import as_parts, visible_text
from nanochat.engine.calculator import calculate
from tasks.common import (
    ANSWER_MARK,
    Completion,
    Conversation,
    NumericTask,
    Task,
    last_number,
    marked_number,
    reference_text,
    single_turn,
    text_problem,
)
from tasks.loading import HubSplit, Rows

REPO = "openai/gsm8k"
NUM_ROWS = {"train": 7473, "test": 1319}
PARTS = {"train": slice(7000), "validation": slice(7000, None), "test": slice(None)}  # of the hub's split
COLUMNS = {"question": str, "answer": str}
_CALL = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
NUM_SHOTS = 5  # of the standard prompt
_STRICT = re.compile(r"#### (-?[0-9.,]+)")  # its first match is the answer
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")  # its last match


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

    def question(self, index: int) -> tuple[str, str]:
        """Question and worked answer."""
        row = self.rows[index]
        if marked_number(row["answer"]) is None:
            raise self.rows.error(index, f"the answer does not end with {ANSWER_MARK} and a number")
        return row["question"], row["answer"]

    def conversation(self, index: int) -> Conversation:
        question, answer = self.question(index)
        return single_turn(question, answer_parts(answer))


class StandardGSM8K(Task):
    """The test split with its standard prompt."""

    name = f"GSM8K {NUM_SHOTS}-shot"
    kind = "generative"
    purpose = "test"
    is_text, num_shots = True, NUM_SHOTS
    stops = ("Question:", "</s>", "<|im_end|>")

    def __init__(self) -> None:
        self.train, self.test = GSM8K("main", "train"), GSM8K("main", "test")
        self.rows = self.test.rows

    @cached_property
    def shots(self) -> list[str]:
        return [f"{_asked(question)} {answer}\n\n" for question, answer in map(self.train.question, range(NUM_SHOTS))]

    def conversation(self, index: int) -> Conversation:
        question, answer = self.test.question(index)
        return text_problem(_asked(question), answer, shots=self.shots)

    def score(self, conversation: Conversation, completion: Completion) -> dict[str, float]:
        said, truth = visible_text(completion), _bare(reference_text(conversation))
        strict, flexible = _STRICT.search(said), _FLEXIBLE.findall(said)
        return {
            "strict": float(strict is not None and _bare(strict[1]) == truth),
            "flexible": float(bool(flexible) and _bare(flexible[-1]) == truth),
        }

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        return bool(self.score(conversation, completion)["strict"])


def _asked(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _bare(answer: str) -> str:
    """What answers are compared by: the text behind the mark, without commas, dollar signs and a final full stop."""
    return re.sub("[,$]", "", answer.rpartition(f"{ANSWER_MARK} ")[2]).removesuffix(".")


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
