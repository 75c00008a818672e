"""What all tasks share: `Task`, slices and mixtures of tasks, multiple-choice text, numbers in answers.

A task is a list of conversations (the format of `nanochat.data.chat`) that end with the right answer, and often a
judge of other answers. Constructors read and fetch nothing: the data come with the first `len(task)` or `task[i]`, and
are the same in every process. Not here: models, tokens, the evaluation loops (`nanochat.evals.chat_eval`).
"""

import random
import re
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from typing import Any, Literal

from nanochat.data.chat import visible_text

Conversation = dict[str, Any]
Completion = str | Sequence[Mapping[str, str]]  # what a model answered: its text, or the parts of its message
Kind = Literal["categorical", "generative"] | None
Purpose = Literal["train", "validation", "test"]


def single_turn(question: str, answer: Completion, **extra: Any) -> Conversation:
    """A conversation of one question and its answer, with `extra` as further keys."""
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra}


class Task(ABC):
    """Conversations by index, one for each of `rows`, and the judge of answers to them. Reading the rows raises
    `UserError` when the data cannot be had or are not as expected."""

    rows: Sequence[Any]
    name: str
    kind: Kind = None  # an answer is one of `letters(conversation)`, or has to be written; None: cannot be judged
    baseline: float = 0.0  # accuracy of guessing, 0 to 1
    purpose: Purpose = "train"  # stages train on "train" and watch "validation"; only reported evaluations read "test"
    has_reward: bool = False  # whether `reward` may be called
    is_text: bool = False  # asked in plain text after worked examples (`text_problem`), instead of in a chat
    stops: tuple[str, ...] = ()  # texts that end an answer written in plain text
    num_shots: int = 0  # of the worked examples before a question in plain text
    by_length: bool = False  # in plain text, the likeliest choice per character is the answer, not the likeliest one

    @abstractmethod
    def conversation(self, index: int) -> Conversation:
        """Conversation `index`, 0 to len - 1: a new object that the caller may change."""

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | slice) -> "Conversation | TaskSlice":
        """`task[i]` is a conversation, `task[start:stop:step]` a task."""
        found = range(len(self))[index]
        return TaskSlice(self, found) if isinstance(index, slice) else self.conversation(found)

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.conversation, range(len(self)))

    def letters(self, conversation: Conversation) -> tuple[str, ...]:
        """The answers that a categorical conversation offers, in the order of its choices."""
        return conversation["letters"]

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        """Whether `completion` is right; a categorical task wants exactly the letter of the right choice."""
        assert self.kind == "categorical", f"{self.name} cannot tell right from wrong"
        return visible_text(completion).strip() == reference_text(conversation)

    def evaluate_many(self, pairs: Sequence[tuple[Conversation, Completion]]) -> list[bool]:
        """`evaluate` of each pair; a task overrides it when it can judge several at a time."""
        return [self.evaluate(conversation, completion) for conversation, completion in pairs]

    def score(self, conversation: Conversation, completion: Completion) -> dict[str, float]:
        """Further scores of an answer by name, 0 to 1, for tasks that have more than right and wrong."""
        return {}

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        """The reward of reinforcement learning, 0 to 1; only for tasks with `has_reward`."""
        assert self.has_reward, f"{self.name} has no reward"
        return float(self.evaluate(conversation, completion))


def reference_text(conversation: Conversation) -> str:
    """What the right answer says, without its tool calls."""
    return visible_text(conversation["messages"][-1]["content"])


class TaskSlice(Task):
    """Some conversations of a task, in the order of `indices`; everything else is as in that task."""

    def __init__(self, task: Task, indices: Sequence[int]) -> None:
        self.task, self.rows = task, indices
        for name in ("name", "kind", "baseline", "purpose", "has_reward", "is_text", "stops", "num_shots", "by_length"):
            setattr(self, name, getattr(task, name))
        for judge in ("letters", "evaluate", "evaluate_many", "score", "reward"):
            setattr(self, judge, getattr(task, judge))

    def conversation(self, index: int) -> Conversation:
        return self.task.conversation(self.rows[index])


class TaskMixture(Task):
    """The conversations of all tasks, each exactly once, in an order that depends on `seed` alone.

    So the order is the same for any number of processes. Weights are whole epochs: a task given twice comes twice.
    """

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], *, seed: int = 0) -> None:
        self.tasks, self.seed = list(tasks), seed

    @cached_property
    def rows(self) -> Sequence[int]:
        """Places in the sequence of all conversations of all tasks, shuffled."""
        order = array("q", range(sum(map(len, self.tasks))))
        random.Random(self.seed).shuffle(order)
        return order

    def locate(self, index: int) -> tuple[Task, int]:
        """The task that conversation `index` is from, and its index there."""
        place = self.rows[index]
        for task in self.tasks:
            if place < len(task):
                return task, place
            place -= len(task)
        raise AssertionError(f"a task became shorter: {[len(task) for task in self.tasks]}")

    def conversation(self, index: int) -> Conversation:
        task, inner = self.locate(index)
        return task.conversation(inner)


def render_choices(question: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    """A multiple-choice question as a user writes it:

        Multiple choice: What do bees make?
        - wax and honey [A]
        - silk [B]
        Answer with the letter of the right choice.

    The letter follows its choice because small models learn to copy what comes after the right choice long before they
    can look back to a letter in front of it. It stands in brackets so that it is the same single token in prompt and
    answer: a blank or other sign just before letters may be joined to them (" A" and "=A" are not "A"), but
    `SPLIT_PATTERN` joins only one, so " [" is always cut from the letter, or from the digits "1" to "5".
    """
    lines = [f"- {choice.strip()} [{letter}]\n" for choice, letter in zip(choices, letters, strict=True)]
    return f"Multiple choice: {question.strip()}\n{''.join(lines)}Answer with the letter of the right choice."


def choice_conversation(
    question: str, choices: Sequence[str], letters: Sequence[str], right: str, **extra: Any
) -> Conversation:
    """A multiple-choice question answered with the letter `right`, with `letters` and `extra` as further keys."""
    assert right in letters, (right, letters)
    return single_turn(render_choices(question, choices, letters), right, letters=tuple(letters), **extra)


def text_problem(
    question: str, answer: str, *, intro: str = "", shots: Sequence[str] = (), **extra: Any
) -> Conversation:
    """A problem for a model that continues plain text: `intro`, then the first of `shots` (worked examples with what
    separates them), as many as fit, then `question`. Of multiple choice, `options` are the continuations offered, and
    `letters` their names, of which `answer` is one."""
    return single_turn(question, answer, intro=intro, shots=tuple(shots), **extra)


def lettered(choices: Sequence[str], letters: Sequence[str]) -> str:
    """Choices as most published prompts list them, a line each: `lettered(["red"], "A") == "A. red\\n"`."""
    return "".join(f"{letter}. {choice}\n" for letter, choice in zip(letters, choices, strict=True))


ANSWER_MARK = "####"  # stands before the number at the end of an answer, as in GSM8K
# Digits with or without groups of thousands, decimals, one sign; "5-3" is 5 and 3, and "72." is 72.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]])[-−])?\$?(?:(?<=\$)[-−])?(?:{_DIGITS})", re.ASCII)
_MAX_DIGITS = 100  # no answer is longer, and Python refuses to parse more than a few thousand digits


def last_number(text: str) -> Fraction | None:
    """Value of the last number in `text`, such as `1,000`, `$5`, `-$5`, `72.`, `10.0`, `.5` or `50%`; None without."""
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def marked_number(text: str) -> Fraction | None:
    """Value of the number after `####` if the last line of `text` has nothing else, otherwise None."""
    last_line = text.rstrip().rsplit("\n", 1)[-1].strip()
    if not last_line.startswith(ANSWER_MARK):
        return None
    marked = last_line.removeprefix(ANSWER_MARK).strip().removesuffix("%").removesuffix(".")
    return _value(marked) if _NUMBER.fullmatch(marked) else None


def _value(number: str) -> Fraction | None:
    return Fraction(re.sub(r"[$,]", "", number).replace("−", "-")) if len(number) <= _MAX_DIGITS else None


class NumericTask(Task):
    """Questions whose reference ends with a line `#### 72`. Answers count by value: `72.`, `$72` and `72.0` are right.

    `evaluate` takes the last number of the text for the answer; the "strict" score, also the reward, wants that line.
    """

    kind = "generative"
    has_reward = True

    def score(self, conversation: Conversation, completion: Completion) -> dict[str, float]:
        said, truth = visible_text(completion), marked_number(reference_text(conversation))
        return {"flexible": float(last_number(said) == truth), "strict": float(marked_number(said) == truth)}

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        return bool(self.score(conversation, completion)["flexible"])

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        return self.score(conversation, completion)["strict"]
