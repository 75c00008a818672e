"""What all tasks share: the `Task` itself, views on tasks, multiple-choice text, numbers in answers.

A task is a list of conversations (the format of `nanochat.chat`), each with the right answer as its last message, and,
where it can be examined, the judge of answers. Constructors read and fetch nothing: the data come with the first
`len(task)` or `task[i]`, and are the same in every process.
Not here: getting rows from the hub (`loading.py`), models, tokens, the loops of an evaluation (`nanochat.chat_eval`).
"""

import random
import re
from abc import ABC, abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from itertools import accumulate
from typing import Any, Literal, overload

from nanochat.data.chat import visible_text

Conversation = dict[str, Any]
Completion = str | Sequence[Mapping[str, str]]  # what a model answered: its text, or the parts of its message
Kind = Literal["categorical", "generative"] | None
Purpose = Literal["train", "validation", "test"]


class Task(ABC):
    """Conversations by index, and what is known about judging answers to them.

    `name`: what tables call it. `kind`: "categorical" when the answer is one of `letters(conversation)`, "generative"
    when it has to be written, None when it is only there to be trained on. `baseline`: accuracy of guessing, 0 to 1.
    `num_choices`: how many answers most of its questions offer, 0 unless categorical. `purpose`: what its rows may be
    used for; a stage trains on "train", watches "validation", and only an evaluation that is reported reads "test".
    `has_reward`: whether `reward` can be asked.
    """

    name: str
    kind: Kind = None
    baseline: float = 0.0
    num_choices: int = 0
    purpose: Purpose = "train"
    has_reward: bool = False

    @abstractmethod
    def __len__(self) -> int:
        """Number of conversations. Raises `UserError` when the data cannot be had or are not what they should be."""

    @abstractmethod
    def conversation(self, index: int) -> Conversation:
        """Conversation number `index`, 0 to len - 1: a new object that the caller may change. Raises like `len`."""

    @overload
    def __getitem__(self, index: int) -> Conversation: ...
    @overload
    def __getitem__(self, index: slice) -> "TaskSlice": ...
    def __getitem__(self, index):
        """`task[i]` is a conversation, `task[start:stop:step]` a task of some of them. Raises `IndexError`, and like
        `len`."""
        if isinstance(index, slice):
            return TaskSlice(self, range(len(self))[index])
        return self.conversation(range(len(self))[index])

    def __iter__(self) -> Iterator[Conversation]:
        return map(self.conversation, range(len(self)))

    def letters(self, conversation: Conversation) -> tuple[str, ...]:
        """The answers a categorical conversation offers, in the order of its choices."""
        return conversation["letters"]

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        """Whether `completion` answers `conversation` rightly; for a categorical task it is one of its letters."""
        assert self.kind == "categorical", f"{self.name} cannot tell right from wrong"
        return visible_text(completion).strip() == visible_text(conversation["messages"][-1]["content"])

    def evaluate_many(self, pairs: Sequence[tuple[Conversation, Completion]]) -> list[bool]:
        """`evaluate` of each pair, for tasks that can do many at a time faster than one after the other."""
        return [self.evaluate(conversation, completion) for conversation, completion in pairs]

    def score(self, conversation: Conversation, completion: Completion) -> dict[str, float]:
        """Further scores of an answer by name, each 0 to 1, where a task has more than right and wrong."""
        return {}

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        """What reinforcement learning is paid for the answer, 0 to 1; only where `has_reward`."""
        raise AssertionError(f"{self.name} has no reward")


# --- views ---------------------------------------------------------------------------------------


class TaskSlice(Task):
    """Some conversations of a task, in a given order; everything else is that task's."""

    def __init__(self, task: Task, indices: Sequence[int]) -> None:
        self.task, self.indices = task, indices
        self.name, self.kind, self.baseline = task.name, task.kind, task.baseline
        self.num_choices, self.purpose, self.has_reward = task.num_choices, task.purpose, task.has_reward

    def __len__(self) -> int:
        return len(self.indices)

    def conversation(self, index: int) -> Conversation:
        return self.task.conversation(self.indices[index])

    def letters(self, conversation: Conversation) -> tuple[str, ...]:
        return self.task.letters(conversation)

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        return self.task.evaluate(conversation, completion)

    def evaluate_many(self, pairs: Sequence[tuple[Conversation, Completion]]) -> list[bool]:
        return self.task.evaluate_many(pairs)

    def score(self, conversation: Conversation, completion: Completion) -> dict[str, float]:
        return self.task.score(conversation, completion)

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        return self.task.reward(conversation, completion)


class TaskSequence(Task):
    """Tasks one after the other, as one task to train on. A task given twice comes twice."""

    name = "sequence"

    def __init__(self, tasks: Sequence[Task]) -> None:
        self.tasks = list(tasks)
        self._ends: list[int] | None = None  # of each task in the row of all conversations

    def __len__(self) -> int:
        if self._ends is None:
            self._ends = list(accumulate(map(len, self.tasks)))
        return self._ends[-1] if self._ends else 0

    def locate(self, index: int) -> tuple[Task, int]:
        """The task that conversation `index` is from, and its index there."""
        assert 0 <= index < len(self), (index, len(self))
        number = bisect_right(self._ends, index)
        return self.tasks[number], index - (self._ends[number - 1] if number else 0)

    def conversation(self, index: int) -> Conversation:
        task, inner = self.locate(index)
        return task.conversation(inner)


class TaskMixture(TaskSequence):
    """The conversations of all tasks, each exactly once, in an order drawn from `seed` alone.

    So the order is the same in every process and for any number of them, and does not touch or depend on the state of
    other generators. Weights are whole epochs: give a task twice and each of its conversations comes twice.
    """

    name = "mixture"

    def __init__(self, tasks: Sequence[Task], *, seed: int = 0) -> None:
        super().__init__(tasks)
        self.seed = seed
        self._order: array | None = None

    def locate(self, index: int) -> tuple[Task, int]:
        if self._order is None:
            self._order = array("q", range(len(self)))
            random.Random(self.seed).shuffle(self._order)
        return super().locate(self._order[index])


# --- multiple choice -----------------------------------------------------------------------------


def render_choices(question: str, choices: Sequence[str], letters: Sequence[str]) -> str:
    """A multiple-choice question as a user writes it:

        Multiple choice: What do bees make?
        - wax and honey [A]
        - silk [B]
        Answer with the letter of the right choice.

    The letter follows its choice, so that finding the choice that was meant leaves only one thing to do, to copy what
    comes after it; small models can do that long before they can look back from a choice to what stood before it.
    And it stands in brackets because the answer must be one token and the very one of the prompt. Where the tokenizer
    cuts text, a blank or any other single sign is drawn to the letters after it (" A" and "=A" may be tokens of their
    own, different from "A"), but " [" is cut from "A" by every vocabulary trained with `SPLIT_PATTERN`, as the pattern
    takes only one sign along and that one has to stand directly before the letters. In the answer, "A" follows a
    special token. Labels that are a digit ("1" to "5") are cut the same way.
    """
    assert len(choices) == len(letters), (choices, letters)
    lines = [f"- {choice.strip()} [{letter}]" for choice, letter in zip(choices, letters, strict=True)]
    return "\n".join([f"Multiple choice: {question.strip()}", *lines, "Answer with the letter of the right choice."])


def choice_conversation(
    question: str, choices: Sequence[str], letters: Sequence[str], right: str, **extra: Any
) -> Conversation:
    """The conversation of a multiple-choice question whose answer is the letter `right`, with `letters` and `extra` as
    further keys."""
    assert right in letters, (right, letters)
    messages = [
        {"role": "user", "content": render_choices(question, choices, letters)},
        {"role": "assistant", "content": right},
    ]
    return {"messages": messages, "letters": tuple(letters), **extra}


# --- numbers in answers --------------------------------------------------------------------------

ANSWER_MARK = "####"  # before the number that an answer ends with, as GSM8K writes it
# Digits with or without groups of thousands, decimals, one sign; "5-3" is 5 and 3, and "72." is 72.
_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_NUMBER = re.compile(rf"(?:(?<![\w.)\]])[-−])?\$?(?:(?<=\$)[-−])?(?:{_DIGITS})", re.ASCII)
_MAX_DIGITS = 100  # what is longer is no answer to anything, and Python refuses to read more than a few thousand


def last_number(text: str) -> Fraction | None:
    """Value of the last number in `text`, None when there is none.

    `1,000`, `$5`, `-$5`, `72.`, `10.0` and `.5` are numbers, and a percent sign after them counts for nothing.
    """
    found = _NUMBER.findall(text)
    return _value(found[-1]) if found else None


def marked_number(text: str) -> Fraction | None:
    """Value of the number after `####`, when it is all that stands on the last line of `text`; else None."""
    last_line = text.rstrip().rsplit("\n", 1)[-1].strip()
    if not last_line.startswith(ANSWER_MARK):
        return None
    marked = last_line.removeprefix(ANSWER_MARK).strip().removesuffix("%").removesuffix(".")
    return _value(marked) if _NUMBER.fullmatch(marked) else None


def _value(number: str) -> Fraction | None:
    return Fraction(re.sub(r"[$,]", "", number).replace("−", "-")) if len(number) <= _MAX_DIGITS else None
