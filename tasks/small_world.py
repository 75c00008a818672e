"""The small world: generated conversations from which the miniature learns to chat, and exams in what it should know.

A model of a few million parameters that sees a million or two tokens cannot learn the world, but a small one: who it
is, greetings, sums with the calculator (and "and 15 more?"), letters in words, some six hundred everyday facts,
multiple choice about them, what the user or a system message said earlier, and that it does not know the rest. All is
made by code from the tables of `small_world_*.py`, each conversation by a generator of its own, so the
task is the same in every process and as long as asked for. Offline: words come from `words.txt`, nothing is fetched.

Never trained on, so that an exam shows more than memory:

- phrasings and questions of validation and test, which stand in `small_world_unseen.json` and nowhere else;
- numbers of sums and words to spell or count letters in, whose split is decided by their hash, as in `spelling.py`.

Facts are the same in all splits: what was never told cannot be known. Not here: what the stages mix (`mixtures.py`).
"""

import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

from nanochat.data.chat import visible_text
from nanochat.engine.calculator import calculate
from tasks import small_world_text as text
from tasks.common import Completion, Conversation, Task, choice_conversation, last_number
from tasks.small_world_facts import RELATIONS, Relation
from tasks.small_world_outside import DECLINE, DECLINED, ask_outside
from tasks.small_world_words import (
    articled,
    ask,
    draw_name,
    draw_numbers,
    draw_word,
    phrasings,
    plain_words,
    sentence,
    unseen,
)  # fmt: skip
from tasks.spelling import SPLITS

LETTERS = "ABCD"
LETTER_ONLY_SHARE = 0.3  # of the choices in training; more of them did not help (dev/LOG.md)
EXAM_SIZE = {"train": 4096, "validation": 320, "test": 320}  # questions of an exam that can be made without end
_NUM_SKILLS = ((1, 0.4), (2, 0.3), (3, 0.2), (4, 0.1))  # subjects in one conversation, and how often


class Exchange(NamedTuple):
    """A question, its answer, and the judge of other answers (see `is_right`); None where nothing is asked."""

    question: str
    answer: str | list[dict[str, str]]
    judge: Mapping[str, Any] | None = None


Skill = Callable[[random.Random, str], list[Exchange]]  # a generator and a split, to what is said about one subject


# --- the judge -----------------------------------------------------------------------------------


def is_right(judge: Mapping[str, Any], completion: Completion) -> bool:
    """Whether `completion` is what `judge` wants, by its one key:

    number: the last number. words: of each entry one of the alternatives, with | between them; those of `never`, a
    second key, must not occur. only: nothing else but this. spelled: this word's letters with blanks between them.
    declined: whether it says not to know.
    """
    said = visible_text(completion)
    if "number" in judge:
        return last_number(said) == judge["number"]
    if "declined" in judge:
        return (DECLINED in said.lower()) == judge["declined"]
    if "spelled" in judge:
        return re.search(rf"(?<!\b\w ){' '.join(judge['spelled'])}(?! ?\w)", said.lower()) is not None
    plain = plain_words(said)
    if "only" in judge:
        return plain == plain_words(judge["only"])
    found = all(any(plain_words(word) in plain for word in group.split("|")) for group in judge["words"])
    return found and not any(plain_words(word) in plain for word in judge.get("never", ()))


# --- skills --------------------------------------------------------------------------------------


def _call(expression: str, after: str) -> list[dict[str, str]]:
    """An answer with a tool call; {r} in the text after it is the tool's result."""
    result = calculate(expression)
    return [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": str(result)},
        {"type": "text", "text": after.format(r=result)},
    ]


def sums(rng: random.Random, split: str) -> list[Exchange]:
    """A sum or difference of numbers of up to three digits, and often one or two that go on from its result."""
    exchanges, total = [], None
    for turn in range(rng.choice((1, 1, 2, 3))):
        sign = rng.choice("+-")
        a, b = draw_numbers(rng, split, sign, total)
        if not turn:
            table, key = (text.SUMS, "sums") if sign == "+" else (text.DIFFERENCES, "differences")
        else:
            table, key = (text.MORE, "more") if sign == "+" else (text.LESS, "less")
        question = ask(
            rng, rng.choice(phrasings(split, table, key)), a=a, b=b, n=draw_name(rng), t=rng.choice(text.THINGS)
        )
        total = a + b if sign == "+" else a - b
        answer = _call(f"{a}{sign}{b}", text.RESULT)
        exchanges.append(Exchange(question, answer, {"number": total}))
        if not 0 <= total <= 999:
            break
    return exchanges


def products(rng: random.Random, split: str) -> list[Exchange]:
    """A product of two small numbers, which only training has."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    question = ask(rng, rng.choice(text.PRODUCTS), a=a, b=b)
    return [Exchange(question, _call(f"{a}*{b}", text.RESULT), {"number": a * b})]


def letters(rng: random.Random, split: str) -> list[Exchange]:
    """How often a letter is in a word, counted by the tool."""
    word = draw_word(rng, split)
    share = rng.random()
    most = max(map(word.count, word))
    letter = rng.choice(
        "abcdefghijklmnopqrstuvwxyz" if share < 0.2
        else word if share < 0.5
        else [letter for letter in word if word.count(letter) == most]
    )  # fmt: skip
    mark = rng.choice(("{}", "{}", "{}", '"{}"', '"{}"', "'{}'"))
    question = ask(
        rng, rng.choice(phrasings(split, text.COUNTS, "counts")), w=mark.format(word),
        l=rng.choice(("{}", mark)).format(letter),
    )  # fmt: skip
    count = word.count(letter)
    # double quotes: behind a single one the tokenizer cuts off an s, d, m or t as if it were a contraction
    answer = _call(f'"{word}".count("{letter}")', text.COUNTED)
    return [Exchange(question, answer, {"number": count})]


def spelling(rng: random.Random, split: str) -> list[Exchange]:
    """The letters of a word."""
    word = draw_word(rng, split)
    mark = rng.choice(("{}", "{}", "{}", '"{}"', '"{}"', "'{}'"))
    question = ask(rng, rng.choice(phrasings(split, text.SPELLINGS, "spellings")), w=mark.format(word))
    return [Exchange(question, text.SPELLED.format(w=word, letters=" ".join(word)), {"spelled": word})]


def facts(rng: random.Random, split: str) -> list[Exchange]:
    """A fact, and sometimes others of its kind that are asked for in few words."""
    name = _draw_relation(rng)
    relation = RELATIONS[name]
    subjects = rng.sample(list(relation.facts), min(len(relation.facts), rng.choice((1, 1, 1, 2, 3))))
    exchanges = []
    for number, x in enumerate(subjects):
        known = relation.follow_ups if number else phrasings(split, relation.questions, "relations", name)
        exchanges.append(_fact(rng, relation, x, ask(rng, rng.choice(known), x=x)))
    return exchanges


@cache
def _relation_weights() -> tuple[list[str], list[int]]:
    """Relations and how often they are drawn: a fact of a large one about as often as one of a small one."""
    return list(RELATIONS), [max(8, len(relation.facts)) for relation in RELATIONS.values()]


def _draw_relation(rng: random.Random) -> str:
    names, weights = _relation_weights()
    return rng.choices(names, weights)[0]


def _fact(rng: random.Random, relation: Relation, x: str, question: str) -> Exchange:
    y = relation.facts[x]
    answer = sentence(relation.answer.format(x=x, y=y))
    said = plain_words(f"{x} {y}")
    never = sorted({other for other in relation.facts.values() if plain_words(other) not in said})
    return Exchange(question, answer, {"words": [y], "never": never})


def choices(rng: random.Random, split: str) -> list[Exchange]:
    """Multiple choice about a fact: the right choice and its letter are asked for, in training at times the letter
    alone, as in the common format."""
    conversation, right = choice_letter(rng, split)
    question, letter = (message["content"] for message in conversation["messages"])
    if split == "train" and rng.random() < LETTER_ONLY_SHARE:
        return [Exchange(question, letter, {"only": letter})]
    question = question.rpartition("\n")[0] + "\n" + text.CHOICE_AND_LETTER
    answer = f"It is {right} [{letter}]."
    return [Exchange(question, answer, {"only": answer})]


def choice_letter(rng: random.Random, split: str) -> tuple[Conversation, str]:
    """A multiple-choice question about a fact in the common format, whose answer is a letter, and the right choice.

    In training some name the choice itself: to find a word among the choices is half of what is to be learned.
    """
    name = _draw_relation(rng)
    relation = RELATIONS[name]
    x = rng.choice(list(relation.facts))
    right = relation.facts[x]
    others = sorted(set(relation.facts.values()) - {right, x})
    offered = [right, *rng.sample(others, min(len(others), 3 if split != "train" else rng.randint(1, 3)))]
    rng.shuffle(offered)
    if split == "train" and rng.random() < 0.3:
        question = rng.choice(text.POINTERS).format(y=right)
    else:
        phrasing = rng.choice(phrasings(split, relation.questions, "relations", name))
        question = articled(phrasing.format(x=x))
    labels = LETTERS[: len(offered)]
    return choice_conversation(question, offered, labels, labels[offered.index(right)]), right


def marks(rng: random.Random, split: str) -> list[Exchange]:
    """Which letters stand behind words in a list: what multiple choice needs besides knowledge, with many letters to
    learn it from in each list. Only training has it."""
    words = [draw_word(rng, split) for _ in range(rng.randint(2, 5))]
    letter_of = dict(zip(words, rng.sample(string.ascii_uppercase, len(words)), strict=True))
    lines = "\n".join(f"- {word} [{letter}]" for word, letter in letter_of.items())
    asked = [rng.choice(words) for _ in range(rng.randint(2, 5))]
    question = rng.choice(text.MARKS).format(lines=lines, words=", ".join(asked))
    exchanges = [Exchange(question, f"That is {', '.join(f'{word} [{letter_of[word]}]' for word in asked)}.")]
    for _ in range(rng.randint(0, 2)):
        word = rng.choice(words)
        exchanges.append(Exchange(rng.choice(text.POINTERS).format(y=word), letter_of[word]))
    return exchanges


def identity(rng: random.Random, split: str) -> list[Exchange]:
    """Who and what it is, and how it came about."""
    return [_topic(rng, split, "identity", text.IDENTITY)]


def small_talk(rng: random.Random, split: str) -> list[Exchange]:
    """Greetings, thanks, and so on."""
    return [_topic(rng, split, "small_talk", text.SMALL_TALK)]


def _topic(rng: random.Random, split: str, kind: str, topics: Mapping[str, text.Topic]) -> Exchange:
    name = rng.choice(list(topics))
    return _about(rng, topics[name], rng.choice(phrasings(split, topics[name].questions, kind, name)))


def _about(rng: random.Random, topic: text.Topic, phrasing: str) -> Exchange:
    return Exchange(ask(rng, phrasing), rng.choice(topic.answers), {"words": list(topic.needed)})


def outside(rng: random.Random, split: str) -> list[Exchange]:
    """A question that the small world has no answer to."""
    return [Exchange(ask_outside(rng, split), DECLINE, {"declined": True})]


def memory(rng: random.Random, split: str) -> list[Exchange]:
    """Something the user says about himself, perhaps something else, and the question for it."""
    kind = rng.choice(list(text.MEMORIES))
    statements, questions, answer = text.MEMORIES[kind]
    value = _memory_value(rng, split, kind)
    told = text.REMEMBERED if kind != "name" else f"Nice to meet you, {value}!"
    exchanges = [Exchange(ask(rng, rng.choice(statements), v=value), told)]
    if rng.random() < 0.5:
        exchanges += rng.choice((facts, sums, small_talk, letters, spelling))(rng, "train")[:1]
    question = ask(rng, rng.choice(phrasings(split, questions, "memories", kind)))
    return [*exchanges, Exchange(question, answer.format(v=value), {"words": [value]})]


def _memory_value(rng: random.Random, split: str, kind: str) -> str:
    if kind == "number":
        return str(rng.randint(2, 99))
    if kind != "name":
        return rng.choice(text.MEMORY_VALUES[kind])
    return draw_name(rng) if split == "train" else rng.choice(unseen()[split]["names"])


def told_by_system(rng: random.Random, split: str) -> tuple[str, list[Exchange]]:
    """A system message, and what is said after it that it has a bearing on."""
    kind = rng.choice(("user", "short", "title") if split != "train" else ("user", "short", "short", "title"))
    if kind == "user":
        name = _memory_value(rng, split, "name")
        _, questions, answer = text.MEMORIES["name"]
        question = ask(rng, rng.choice(phrasings(split, questions, "memories", "name")))
        exchange = Exchange(question, answer.format(v=name), {"words": [name]})
        before = rng.choice((facts, sums, small_talk))(rng, "train")[:1] if rng.random() < 0.3 else []
        return rng.choice(text.SYSTEM_USER).format(v=name), [*before, exchange]
    exchanges = facts(rng, split)
    if kind == "short":
        short = [e.judge["words"][0] for e in exchanges]
        answers = [Exchange(e.question, y, {"only": y}) for e, y in zip(exchanges, short, strict=True)]
        return rng.choice(text.SYSTEM_SHORT), answers
    title = rng.choice(text.TITLES)
    answers = [
        Exchange(e.question, f"{title}: {e.answer}", {**e.judge, "words": [*e.judge["words"], title]})
        for e in exchanges
    ]
    return rng.choice(text.SYSTEM_TITLE).format(t=title), answers


# --- conversations to train on -------------------------------------------------------------------

# How often each subject is drawn, in conversations that do not begin with a system message.
MIX: dict[str, float] = {
    "sums": 0.13, "products": 0.02, "letters": 0.13, "spelling": 0.17, "facts": 0.17, "choices": 0.16, "marks": 0.10,
    "identity": 0.13, "small_talk": 0.04, "outside": 0.15, "memory": 0.04,
}  # fmt: skip
SYSTEM_SHARE = 0.12
SKILLS: dict[str, Skill] = {
    "sums": sums, "products": products, "letters": letters, "spelling": spelling, "facts": facts, "choices": choices,
    "marks": marks, "identity": identity, "small_talk": small_talk, "outside": outside, "memory": memory,
}  # fmt: skip


class SmallWorld(Task):
    """`size` conversations of `split`, about one to four subjects each. Different `edition`s are different ones."""

    name = "SmallWorld"

    def __init__(self, size: int, split: str, *, edition: str = "") -> None:
        assert split in SPLITS, split
        self.size, self.split, self.purpose, self.edition = size, split, split, edition

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int) -> Conversation:
        rng = random.Random(f"small world {self.edition} {self.split} {index}")
        if rng.random() < SYSTEM_SHARE:
            system, exchanges = told_by_system(rng, self.split)
            return _conversation(exchanges, system)
        counts, weights = zip(*_NUM_SKILLS, strict=True)
        names = rng.choices(list(MIX), list(MIX.values()), k=rng.choices(counts, weights)[0])
        return _conversation([exchange for name in names for exchange in SKILLS[name](rng, self.split)])


def _conversation(exchanges: Sequence[Exchange], system: str = "") -> Conversation:
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    for exchange in exchanges:
        messages += [
            {"role": "user", "content": exchange.question},
            {"role": "assistant", "content": exchange.answer},
        ]
    return {"messages": messages}


# --- exams ---------------------------------------------------------------------------------------

EXAMS = (
    "sums", "letters", "spelling", "facts", "choices", "choice_letters", "identity", "small_talk", "memory", "system",
    "outside", "inside",
)  # fmt: skip
_INSIDE = ("sums", "letters", "spelling", "facts", "identity", "small_talk", "memory")
_TOPICS = {"identity": text.IDENTITY, "small_talk": text.SMALL_TALK}


class Exam(Task):
    """Questions of `split` about one of `EXAMS`; of a conversation the last answer is asked for.

    "choices" wants the right choice and its letter; "choice_letters" is categorical, the letter alone. "inside" asks a
    bit of everything, and only whether it is not declined. Of "identity" and "small_talk" there are as many questions
    as phrasings; "outside" has real questions, then some made of templates.
    """

    kind = "generative"
    has_reward = True

    def __init__(self, subject: str, split: str) -> None:
        assert subject in EXAMS, subject
        assert split in SPLITS, split
        self.subject, self.split, self.purpose = subject, split, split
        self.name = f"SmallWorld-{subject}"
        self.size = len(_topic_questions(subject, split)) if subject in _TOPICS else EXAM_SIZE[split]
        if subject == "choice_letters":
            self.kind, self.num_choices = "categorical", len(LETTERS)
            self.baseline = 1 / self.num_choices

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int) -> Conversation:
        rng, subject = random.Random(f"exam {self.subject} {self.split} {index}"), self.subject
        if subject == "choice_letters":
            return choice_letter(rng, self.split)[0]
        if subject == "system":
            system, exchanges = told_by_system(rng, self.split)
            return {**_conversation(exchanges, system), "judge": exchanges[-1].judge}
        if subject in _TOPICS:
            exchanges = [_about(rng, *_topic_questions(subject, self.split)[index])]
        elif subject == "outside":
            exchanges = [_outside_question(rng, self.split, index)]
        elif subject == "inside":
            exchanges = SKILLS[rng.choice(_INSIDE)](rng, self.split)
            exchanges[-1] = exchanges[-1]._replace(judge={"declined": False})
        else:
            exchanges = SKILLS[subject](rng, self.split)
            if subject == "facts":  # what follows the first is asked in the words of the training
                exchanges = exchanges[:1]
        return {**_conversation(exchanges), "judge": exchanges[-1].judge}

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        if self.subject == "choice_letters":
            return super().evaluate(conversation, completion)
        return is_right(conversation["judge"], completion)

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        return float(self.evaluate(conversation, completion))


def _topic_questions(subject: str, split: str) -> list[tuple[text.Topic, str]]:
    topics = _TOPICS[subject]
    return [
        (topics[name], asked) for name in topics for asked in phrasings(split, topics[name].questions, subject, name)
    ]


def _outside_question(rng: random.Random, split: str, index: int) -> Exchange:
    """Each of the real questions once, then questions made of templates."""
    real = phrasings(split, (), "outside")
    if index < len(real):
        return Exchange(real[index], DECLINE, {"declined": True})
    return outside(rng, split)[0]
