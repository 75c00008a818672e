"""The tasks a chat model is examined in, by the names that tables and the flag `--task` use."""

from collections.abc import Callable
from functools import partial

from nanochat.common import UserError
from tasks.arc import ARC
from tasks.common import Purpose, Task
from tasks.gsm8k import GSM8K
from tasks.humaneval import HumanEval
from tasks.mmlu import MMLU
from tasks.small_world import EXAMS, Exam
from tasks.spelling import LetterCounting, Spelling

WORD_QUESTIONS = {  # of the generated tasks; for testing as many as published tables of nanochat runs have
    "train": 8192,
    "validation": 512,
    "test": 256,
}

_MAKERS: dict[str, Callable[[Purpose, bool], Task]] = {
    "ARC-Easy": lambda split, _: ARC("ARC-Easy", split),
    "ARC-Challenge": lambda split, _: ARC("ARC-Challenge", split),
    "MMLU": lambda split, _: MMLU("auxiliary_train" if split == "train" else "all", split),
    "GSM8K": lambda split, _: GSM8K("main", split),
    "HumanEval": lambda split, allow_unsafe: HumanEval(allow_unsafe_execution=allow_unsafe),
    "SpellingBee": lambda split, _: LetterCounting(WORD_QUESTIONS[split], split),
}
TASK_NAMES = tuple(_MAKERS)  # ChatCORE is the mean over all of these
_MAKERS["Spelling"] = lambda split, _: Spelling(WORD_QUESTIONS[split], split)
SMALL_WORLD_NAMES = tuple(f"SmallWorld-{subject}" for subject in EXAMS)  # what the miniature is examined in
_MAKERS |= {
    name: partial(lambda subject, split, _: Exam(subject, split), subject)
    for name, subject in zip(SMALL_WORLD_NAMES, EXAMS, strict=True)
}
ALL_NAMES = tuple(_MAKERS)
SMALL_WORLD = "small_world"  # the name of all of the miniature's together


def task_names(names: str) -> tuple[str, ...]:
    """The names in "TASK|TASK", each once; `SMALL_WORLD` stands for all of its exams. None is looked up."""
    given = [name.strip() for name in names.split("|")]
    return tuple(dict.fromkeys(n for name in given for n in (SMALL_WORLD_NAMES if name == SMALL_WORLD else (name,))))


def get_task(name: str, *, purpose: Purpose = "test", allow_unsafe_execution: bool = False) -> Task:
    """The task called `name`, one of `ALL_NAMES`: its rows for reporting, or for watching a run ("validation") or
    training ("train"). `allow_unsafe_execution` is for those that run code.

    Raises `UserError` for an unknown name, or when the task has no rows for that purpose.
    """
    if name not in _MAKERS:
        raise UserError(f"there is no task {name!r}; there are {', '.join(ALL_NAMES)}")
    task = _MAKERS[name](purpose, allow_unsafe_execution)
    if task.purpose != purpose:
        raise UserError(f"{name} is only for the purpose {task.purpose!r}: it has no {purpose} split")
    return task
