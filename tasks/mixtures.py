"""What mid-training and finetuning train and validate on: mixtures of tasks, and users' own conversations.

The mixtures and their proportions are those of nanochat's first release (its mid_train and chat_sft, October 2025);
what they validate on is not: no test split of a benchmark is in here.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from itertools import chain, islice, zip_longest
from typing import NamedTuple

from nanochat.common import print0
from nanochat.data.chat_loader import hold_out
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSlice
from tasks.gsm8k import GSM8K
from tasks.identity import Identity
from tasks.mmlu import MMLU
from tasks.own_data import NUM_EXAMPLES, OwnData, OwnFile, check_refused, find_data, first_questions
from tasks.small_world import SmallWorld
from tasks.smoltalk import SmolTalk
from tasks.spelling import LetterCounting, Spelling

MIXTURE = "mixture"  # the name of a stage's own mixture among data files
SMALL_WORLD = "small_world"  # the name of the generated conversations that the miniature learns to chat from
VALIDATION_SMOLTALK = 1000  # conversations; the smaller validation splits are used whole
GENERAL_EXAMPLES = (  # what a model trained on the mixture may be asked; kept in its checkpoints
    "Why is the sky blue?", "Write a short poem about a lighthouse in winter", "What is 12.5 * 384?",
    "How many r are in strawberry?",
)  # fmt: skip
SMALL_WORLD_EXAMPLES = (
    "Who are you?", "What is 345 + 278?", "How many r are in strawberry?", "Spell birthday",
)  # fmt: skip
MID_SMALL_WORLD, SFT_SMALL_WORLD, VALIDATION_SMALL_WORLD = 18_500, 5_000, 400


class Corpus(NamedTuple):
    """Tasks to train on and tasks to validate on, which share no conversation, and questions to try afterwards."""

    train: list[Task]
    val: list[Task]
    examples: Sequence[str] = ()


NOTHING = Corpus([], [])
Mixtures = Mapping[str, Callable[[], Corpus]]


def mid_mixture() -> Corpus:
    """Much conversation, multiple choice, word problems with the calculator, spelling, and who the model is."""
    return Corpus(
        train=[
            SmolTalk("train"), MMLU("auxiliary_train", "train"), GSM8K("main", "train"),
            Spelling(200_000, "train"), LetterCounting(80_000, "train"), Identity(), Identity(),
        ],
        val=[
            SmolTalk("test")[:VALIDATION_SMOLTALK], MMLU("all", "validation"), GSM8K("main", "validation"),
            Spelling(200, "validation"), LetterCounting(200, "validation"),
        ],
        examples=GENERAL_EXAMPLES,
    )  # fmt: skip


def sft_mixture() -> Corpus:
    """The tasks the model will be asked, and a little of everything else it has learned."""
    return Corpus(
        train=[
            ARC("ARC-Easy", "train"), ARC("ARC-Challenge", "train"), GSM8K("main", "train"),
            some_of(SmolTalk("train"), 10_000), Spelling(300, "train"), LetterCounting(300, "train"), Identity(),
        ],
        val=[
            ARC("ARC-Easy", "validation"), ARC("ARC-Challenge", "validation"), GSM8K("main", "validation"),
            SmolTalk("test")[:VALIDATION_SMOLTALK], Spelling(100, "validation"), LetterCounting(100, "validation"),
        ],
        examples=GENERAL_EXAMPLES,
    )  # fmt: skip


def small_world(size: int, *, edition: str) -> Corpus:
    """`size` generated conversations to train on, and others, with phrasings of their own, to validate on."""
    val = SmallWorld(VALIDATION_SMALL_WORLD, "validation")
    return Corpus([SmallWorld(size, "train", edition=edition)], [val], SMALL_WORLD_EXAMPLES)


MID_MIXTURES: Mixtures = {MIXTURE: mid_mixture, SMALL_WORLD: lambda: small_world(MID_SMALL_WORLD, edition="mid")}
SFT_MIXTURES: Mixtures = {MIXTURE: sft_mixture, SMALL_WORLD: lambda: small_world(SFT_SMALL_WORLD, edition="sft")}


def some_of(task: Task, count: int) -> Task:
    """`count` conversations drawn from all of `task`, in their order; all of them when there are no more."""
    return TaskSlice(task, sorted(random.Random(0).sample(range(len(task)), min(count, len(task)))))


class Sources:
    """The tasks `more`, and what `names` stand for: a name is a key of `mixtures`, or own data (`own_data.py`), which
    is found, or fetched from the hub, at once. Raises `UserError` when it cannot be."""

    def __init__(self, names: Sequence[str], mixtures: Mixtures, more: Corpus = NOTHING) -> None:
        self.parts = [more, *(mixtures[name]() if name in mixtures else find_data(name) for name in names)]

    @property
    def own_files(self) -> list[OwnFile]:
        return [file for part in self.parts if isinstance(part, OwnData) for file in part.files]

    @property
    def tasks(self) -> list[Task]:
        """All of them: files whole, what is held out included."""
        return [task for part in self.parts for task in (*part.train, *part.val)]

    def check(self, skip_bad_rows: int = 0) -> None:
        """Raise `UserError` for files that cannot be read, or more than `skip_bad_rows` rows that are refused."""
        check_refused(self.own_files, skip_bad_rows)

    def corpus(self) -> Corpus:
        """The tasks to train and to validate on: of own data without files for that, one conversation in twenty."""
        corpora = [part if isinstance(part, Corpus) else _split(part) for part in self.parts]
        train, val, examples = zip(*corpora, strict=True)
        in_turn = (question for questions in zip_longest(*examples) for question in questions if question)
        return Corpus([*chain(*train)], [*chain(*val)], [*islice(dict.fromkeys(in_turn), NUM_EXAMPLES)])


def _split(data: OwnData) -> Corpus:
    examples = first_questions(data.train)
    if data.val:
        return Corpus(list(data.train), list(data.val), examples)
    parts = [[TaskSlice(file, indices) for indices in hold_out(file)] for file in data.train]
    return Corpus(*map(list, zip(*parts, strict=True)), examples)


def load_corpus(
    sources: Sources, *, seed: int = 0, max_conversations: int = 0, skip_bad_rows: int = 0
) -> tuple[Task, Task, Sequence[str]]:
    """All conversations to train on, at most `max_conversations` (0: all), and those to validate on, both shuffled by
    `seed`; and the examples. Says what the user's files hold. Raises `UserError` like `Sources.check` and the tasks."""
    sources.check(skip_bad_rows)
    for file in sources.own_files:
        print0(file)
    train, val, examples = sources.corpus()
    mixed = TaskMixture(train, seed=seed)
    return mixed[:max_conversations] if max_conversations else mixed, TaskMixture(val, seed=seed), examples
