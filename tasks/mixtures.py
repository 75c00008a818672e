"""What mid-training and finetuning train and validate on: mixtures of tasks, and users' own conversations.

The mixtures and their proportions are those of nanochat's first release (its mid_train and chat_sft, October 2025);
what they validate on is not: no test split of a benchmark is in here.
"""

import random
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from nanochat.data.chat_loader import hold_out
from tasks.arc import ARC
from tasks.common import Task, TaskMixture, TaskSlice
from tasks.custom_json import CustomJSON
from tasks.gsm8k import GSM8K
from tasks.identity import Identity
from tasks.mmlu import MMLU
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
MID_SMALL_WORLD, SFT_SMALL_WORLD, VALIDATION_SMALL_WORLD = 18_500, 5_000, 400


class Corpus(NamedTuple):
    """Tasks to train on and tasks to validate on, which share no conversation."""

    train: list[Task]
    val: list[Task]


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
    )  # fmt: skip


def small_world(size: int, *, edition: str) -> Corpus:
    """`size` generated conversations to train on, and others, with phrasings of their own, to validate on."""
    return Corpus([SmallWorld(size, "train", edition=edition)], [SmallWorld(VALIDATION_SMALL_WORLD, "validation")])


MID_MIXTURES: Mixtures = {MIXTURE: mid_mixture, SMALL_WORLD: lambda: small_world(MID_SMALL_WORLD, edition="mid")}
SFT_MIXTURES: Mixtures = {MIXTURE: sft_mixture, SMALL_WORLD: lambda: small_world(SFT_SMALL_WORLD, edition="sft")}


def some_of(task: Task, count: int) -> Task:
    """`count` conversations drawn from all of `task`, in their order; all of them when there are no more."""
    return TaskSlice(task, sorted(random.Random(0).sample(range(len(task)), min(count, len(task)))))


def load_corpus(
    names: Sequence[str], mixtures: Mixtures, *, seed: int = 0, max_conversations: int = 0
) -> tuple[Task, Task]:
    """All conversations of `names` to train on, at most `max_conversations` (0: all), and those to validate on, both
    shuffled by `seed`. A name is a key of `mixtures`, or a file of conversations (`custom_json.py`) of which one in
    twenty is held out for validation. Raises `UserError` like the tasks."""
    train, val = [], []
    for name in names:
        if name in mixtures:
            corpus = mixtures[name]()
        else:
            task = CustomJSON(name)
            corpus = Corpus(*([TaskSlice(task, indices)] for indices in hold_out(task)))
        train += corpus.train
        val += corpus.val
    mixed = TaskMixture(train, seed=seed)
    return mixed[:max_conversations] if max_conversations else mixed, TaskMixture(val, seed=seed)
