"""The small world: conversations generated for the miniature to learn to chat from, and exams in what they teach.

A model of a few million parameters that sees a million or two tokens cannot learn about the world, but it can learn a
small one: who it is, greetings, sums with the calculator (and "and 15 more?"), letters in words, some six hundred
everyday facts, multiple choice about them, what the user or a system message said earlier, and that it does not know
the rest. Everything is generated offline, from index and split alone.

Two things are never trained on, so that an exam measures more than memory: the phrasings of validation and test, and
the numbers and words of those splits, which a hash assigns as in `spelling.py`. Facts are shared by all splits, since
nobody can know what was never told. `words.py` has the tables (the JSON files) and draws from them, `skills.py` makes
questions and answers, this module the tasks; `tasks/mixtures.py` says how many conversations a stage trains on.
"""

import random
import re
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from nanochat.data.chat import visible_text
from tasks.common import Completion, Conversation, Task, last_number, single_turn
from tasks.small_world import skills
from tasks.small_world.skills import DECLINED, Exchange, about_topic, choice_letter, outside, told_by_system
from tasks.small_world.words import plain_words, world
from tasks.spelling import SPLITS

MIX = {  # how often each skill is drawn, without a system message; the order of the entries matters to the draws
    "sums": 0.13, "products": 0.02, "letters": 0.13, "spelling": 0.17, "facts": 0.17, "choices": 0.16, "marks": 0.10,
    "identity": 0.13, "small_talk": 0.04, "outside": 0.15, "memory": 0.04,
}  # fmt: skip
SKILLS = {name: getattr(skills, name) for name in MIX}
NUM_SKILLS = {1: 0.4, 2: 0.3, 3: 0.2, 4: 0.1}  # skills in a conversation, and how often
SYSTEM_SHARE = 0.12  # of the conversations
EXAMS = (
    "sums", "letters", "spelling", "facts", "choices", "choice_letters", "identity", "small_talk", "memory", "system",
    "outside", "inside",
)  # fmt: skip
EXAM_SIZE = {"train": 4096, "validation": 320, "test": 320}  # questions, where any number can be generated
TOPICS = ("identity", "small_talk")  # exams with one question for each phrasing
INSIDE = ("sums", "letters", "spelling", "facts", "identity", "small_talk", "memory")


class SmallWorld(Task):
    """`size` conversations of `split` about one to four subjects each. Each `edition` has conversations of its own."""

    name = "SmallWorld"

    def __init__(self, size: int, split: str, *, edition: str = "") -> None:
        assert split in SPLITS, split
        self.rows, self.split, self.purpose, self.edition = range(size), split, split, edition

    def conversation(self, index: int) -> Conversation:
        rng = random.Random(f"small world {self.edition} {self.split} {index}")
        if rng.random() < SYSTEM_SHARE:
            return _conversation(*told_by_system(rng, self.split))
        [count] = rng.choices(list(NUM_SKILLS), list(NUM_SKILLS.values()))
        names = rng.choices(list(MIX), list(MIX.values()), k=count)
        return _conversation("", [exchange for name in names for exchange in SKILLS[name](rng, self.split)])


def _conversation(system: str, exchanges: Sequence[Exchange]) -> Conversation:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages += single_turn(exchange.question, exchange.answer)["messages"]
    return {"messages": messages}


class Exam(Task):
    """Questions of `split` about `subject`, one of `EXAMS`; the last answer of each conversation is asked for.

    "choices" wants the right choice and its letter; "choice_letters" is categorical and wants the letter alone.
    "outside" asks real questions first, then templates; "inside" asks a bit of everything and only judges that the
    model does not decline.
    """

    kind = "generative"
    has_reward = True

    def __init__(self, subject: str, split: str) -> None:
        assert subject in EXAMS, subject
        assert split in SPLITS, split
        self.name, self.subject, self.split, self.purpose = f"SmallWorld-{subject}", subject, split, split
        if subject == "choice_letters":
            self.kind, self.baseline = "categorical", 1 / len(skills.CHOICE_LETTERS)

    @cached_property
    def rows(self) -> Sequence[Any]:
        """Numbers, or in `TOPICS` each topic with each of its phrasings."""
        if self.subject not in TOPICS:
            return range(EXAM_SIZE[self.split])
        topics = world()[self.subject].values()
        return [(topic, phrasing) for topic in topics for phrasing in topic["questions"][self.split]]

    def conversation(self, index: int) -> Conversation:
        rng, system = random.Random(f"exam {self.subject} {self.split} {index}"), ""
        if self.subject == "choice_letters":
            return choice_letter(rng, self.split)[0]
        if self.subject == "system":
            system, exchanges = told_by_system(rng, self.split)
        elif self.subject in TOPICS:
            exchanges = [about_topic(rng, *self.rows[index])]
        elif self.subject == "outside":
            real_questions = world()["outside_questions"].get(self.split, [])
            exchanges = outside(rng, self.split, *real_questions[index : index + 1])
        elif self.subject == "inside":
            exchanges = SKILLS[rng.choice(INSIDE)](rng, self.split)
            exchanges[-1] = exchanges[-1]._replace(judge={"declined": False})
        else:
            exchanges = SKILLS[self.subject](rng, self.split)
        if self.subject == "facts":
            exchanges = exchanges[:1]  # its follow-ups have the phrasings of training
        return {**_conversation(system, exchanges), "judge": exchanges[-1].judge}

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        if self.subject == "choice_letters":
            return super().evaluate(conversation, completion)
        return is_right(conversation["judge"], completion)


def is_right(judge: Mapping[str, Any], completion: Completion) -> bool:
    """Whether `completion` is as `judge` wants it: its last number is `number`; it has one of the alternatives (divided
    by |) of each entry of `words`, and none of `never`; it says `only` this; it has the letters of the word `spelled`
    with blanks between them; it says that it does not know if `declined`, and does not say so otherwise."""
    said = visible_text(completion)
    plain = plain_words(said)
    if "number" in judge:
        return last_number(said) == judge["number"]
    if "declined" in judge:
        return (DECLINED in said.lower()) == judge["declined"]
    if "spelled" in judge:
        return re.search(rf"(?<!\b\w ){' '.join(judge['spelled'])}(?! ?\w)", said.lower()) is not None
    if "only" in judge:
        return plain == plain_words(judge["only"])
    found = all(any(plain_words(word) in plain for word in group.split("|")) for group in judge["words"])
    return found and not any(plain_words(word) in plain for word in judge.get("never", ()))
