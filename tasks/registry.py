"""The tasks a model is examined in, by the names that tables and the flag `--tasks` use."""

from collections.abc import Sequence

from nanochat.common import UserError
from nanochat.flags import did_you_mean
from tasks.arc import ARC, StandardARC
from tasks.common import Purpose, Task
from tasks.gsm8k import GSM8K, StandardGSM8K
from tasks.humaneval import HumanEval, StandardHumanEval
from tasks.mmlu import MMLU, StandardMMLU
from tasks.mmlu_pro import MMLUPro, StandardMMLUPro
from tasks.small_world import EXAMS, Exam
from tasks.spelling import LetterCounting, Spelling

# Questions of the generated tasks; for testing as many as in the published tables of nanochat runs.
NUM_WORD_QUESTIONS = {"train": 8192, "validation": 512, "test": 256}
TASK_NAMES = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")  # ChatCORE is their mean
SMALL_WORLD = "small_world"  # the name of all exams of the miniature together
SMALL_WORLD_NAMES = tuple(f"SmallWorld-{subject}" for subject in EXAMS)
ALL_NAMES = (*TASK_NAMES, "MMLU-Pro", "Spelling", *SMALL_WORLD_NAMES)
STANDARD_NAMES = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "MMLU-Pro")  # have a standard prompt


def task_names(names: str) -> tuple[str, ...]:
    """The names in "TASK|TASK", each once, unchecked; `SMALL_WORLD` stands for all of its exams."""
    given = [name.strip() for name in names.split("|")]
    return tuple(dict.fromkeys(n for name in given for n in (SMALL_WORLD_NAMES if name == SMALL_WORLD else (name,))))


def get_task(name: str, *, purpose: Purpose = "test", allow_unsafe_execution: bool = False) -> Task:
    """The task called `name`, one of `ALL_NAMES`, with its rows for reporting ("test"), for watching a run
    ("validation") or for training ("train"). `allow_unsafe_execution` is for tasks that run code.

    Raises `UserError` for an unknown name, or when the task has no rows for that purpose.
    """
    makers = {
        "ARC-Easy": lambda: ARC("ARC-Easy", purpose),
        "ARC-Challenge": lambda: ARC("ARC-Challenge", purpose),
        "MMLU": lambda: MMLU("auxiliary_train" if purpose == "train" else "all", purpose),
        "GSM8K": lambda: GSM8K("main", purpose),
        "HumanEval": lambda: HumanEval(allow_unsafe_execution=allow_unsafe_execution),
        "SpellingBee": lambda: LetterCounting(NUM_WORD_QUESTIONS[purpose], purpose),
        "MMLU-Pro": lambda: MMLUPro("validation" if purpose == "validation" else "test"),
        "Spelling": lambda: Spelling(NUM_WORD_QUESTIONS[purpose], purpose),
    }
    _check_name(name, ALL_NAMES)
    task = makers[name]() if name in makers else Exam(name.removeprefix("SmallWorld-"), purpose)
    if task.purpose != purpose:
        raise UserError(f"{name} is only for the purpose {task.purpose!r}: it has no {purpose} split")
    return task


def get_standard_task(name: str, *, allow_unsafe_execution: bool = False) -> Task:
    """The test split of the task called `name`, one of `STANDARD_NAMES`, with the prompt of published scores. Its own
    name tells the number of worked examples, "MMLU 5-shot", so that nobody takes its results for those of our prompts.

    Raises `UserError` for an unknown name, or when the task has no such prompt.
    """
    makers = {
        "ARC-Easy": lambda: StandardARC("ARC-Easy"),
        "ARC-Challenge": lambda: StandardARC("ARC-Challenge"),
        "MMLU": StandardMMLU,
        "GSM8K": StandardGSM8K,
        "HumanEval": lambda: StandardHumanEval(allow_unsafe_execution=allow_unsafe_execution),
        "MMLU-Pro": StandardMMLUPro,
    }
    if name in ALL_NAMES and name not in makers:
        raise UserError(f"{name} has no standard prompt; {', '.join(STANDARD_NAMES)} have one")
    _check_name(name, STANDARD_NAMES)
    return makers[name]()


def _check_name(name: str, names: Sequence[str]) -> None:
    if name not in names:
        raise UserError(f"there is no task {name!r}; {did_you_mean(name, names)}there are {', '.join(names)}")
