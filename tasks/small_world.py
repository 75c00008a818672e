"""The small world: generated conversations from which the miniature learns to chat, and exams in what it should know.

A model of a few million parameters that sees a million or two tokens cannot learn the world, but a small one: who it
is, greetings, sums with the calculator (and "and 15 more?"), letters in words, some six hundred everyday facts,
multiple choice about them, what the user or a system message said earlier, and that it does not know the rest. All is
made by code from `small_world_facts.py` and `small_world_text.py`, each conversation by a generator of its own, so the
task is the same in every process and as long as asked for. Offline: words come from `words.txt`, nothing is fetched.

Never trained on, so that an exam shows more than memory:

- phrasings and questions of validation and test, which stand in `small_world_unseen.json` and nowhere else;
- numbers of sums and words to spell or count letters in, whose split is decided by their hash, as in `spelling.py`.

Facts are the same in all splits: what was never told cannot be known. Not here: what the stages mix (`mixtures.py`).
"""

import json
import random
import re
import string
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from nanochat.calculator import calculate
from nanochat.chat import visible_text
from tasks import small_world_text as text
from tasks.common import Completion, Conversation, Task, choice_conversation, last_number
from tasks.small_world_facts import RELATIONS, Relation
from tasks.spelling import OWN_WORDS, SPLITS, split_of

UNSEEN = Path(__file__).with_name("small_world_unseen.json")
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
        return (text.DECLINED in said.lower()) == judge["declined"]
    if "spelled" in judge:
        return re.search(rf"(?<!\b\w ){' '.join(judge['spelled'])}(?! ?\w)", said.lower()) is not None
    plain = _plain(said)
    if "only" in judge:
        return plain == _plain(judge["only"])
    found = all(any(_plain(word) in plain for word in group.split("|")) for group in judge["words"])
    return found and not any(_plain(word) in plain for word in judge.get("never", ()))


def _plain(said: str) -> str:
    """The words of a text, in small letters with one blank around each."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', said.lower()))} "


# --- words and numbers ---------------------------------------------------------------------------


@cache
def _words(split: str) -> tuple[str, ...]:
    words = OWN_WORDS.read_text(encoding="utf-8").split()
    return tuple(word for word in dict.fromkeys(words) if split_of(word) == split)


@cache
def _known_words() -> frozenset[str]:
    """Every word that facts are about: questions outside the small world have none of them in the place of a word."""
    facts = [relation.facts for relation in RELATIONS.values()]
    return frozenset(word for table in facts for word in _plain(" ".join([*table, *table.values()])).split())


def _word(rng: random.Random, split: str) -> str:
    """A word to spell: in training often one that does not exist, of the beginning of one word and the end of
    another, since copying letters is best learned from very many words."""
    if split != "train" or rng.random() < 0.4:
        return rng.choice(_words(split))
    return _made_up(rng)


def _made_up(rng: random.Random) -> str:
    """A training word that does not exist."""
    while True:
        first, second = rng.choice(_words("train")), rng.choice(_words("train"))
        made = first[: rng.randint(1, len(first) - 1)] + second[rng.randint(1, len(second) - 1) :]
        if 3 <= len(made) <= 12 and split_of(made) == "train":
            return made


def _foreign_word(rng: random.Random) -> str:
    """A training word that no fact is about, now and then one made up, which may begin with a capital."""
    if rng.random() < 0.25:
        made = _made_up(rng)
        return made if rng.random() < 0.5 else made.capitalize()
    while (word := rng.choice(_words("train"))) in _known_words():
        pass
    return word


def _number(rng: random.Random) -> int:
    """Up to three digits, short ones as often as long ones."""
    return rng.randint(0, 10 ** rng.randint(1, 3) - 1)


def _numbers(rng: random.Random, split: str, sign: str, first: int | None = None) -> tuple[int, int]:
    """Two numbers whose sum or difference belongs to `split`; the first may be given."""
    while True:
        a, b = _number(rng) if first is None else first, _number(rng)
        if sign == "-" and a < b and rng.random() < 0.8:  # mostly not below zero
            continue
        if split_of(f"{a}{sign}{b}") == split:
            return a, b


# --- phrasing ------------------------------------------------------------------------------------


@cache
def _unseen() -> dict[str, Any]:
    return json.loads(UNSEEN.read_text(encoding="utf-8"))


def _questions(split: str, trained: Sequence[str], *path: str) -> Sequence[str]:
    """The phrasings of `split`: those that are trained on, or those at `path` in the file of the unseen."""
    if split == "train":
        return trained
    found = _unseen()[split]
    for key in path:
        found = found[key]
    return found


_OPENINGS = ("Please: ", "Quick question: ", "Tell me: ", "Ok, ", "So, ", "Hey, ", "Now: ", "And ", "Well, ")


@cache
def _held_out() -> frozenset[str]:
    """All phrasings that are not for training, in plain words."""

    def leaves(tree: Any) -> list[str]:
        if isinstance(tree, str):
            return [tree]
        return [leaf for branch in (tree.values() if isinstance(tree, dict) else tree) for leaf in leaves(branch)]

    return frozenset(_template(phrasing) for phrasing in leaves(_unseen()))


def _template(phrasing: str) -> str:
    """The words of a phrasing, in small letters, with what is to be filled in."""
    return " ".join(re.findall(r"[a-z0-9']+|\{\w+\}|[-+*]", phrasing.lower()))


def _ask(rng: random.Random, phrasing: str, **values: object) -> str:
    """A question as people type it: politely or not, perhaps with an opening, without a capital, without the sign at
    its end. It never becomes one of those that are held out, unless it is one."""
    varied = _opened(rng, _politely(rng, phrasing))
    return _articled((phrasing if _template(varied) in _held_out() else varied).format(**values))


def _politely(rng: random.Random, phrasing: str) -> str:
    first = phrasing.split()[0]
    forms = text.REQUESTS if first in text.IMPERATIVES else text.INQUIRIES if first in text.QUESTION_WORDS else ()
    if not forms or rng.random() < 0.7:
        return phrasing
    return rng.choice(forms).replace("{p}", _small(phrasing.rstrip("?.!")))


def _opened(rng: random.Random, phrasing: str) -> str:
    if rng.random() < 0.2 and phrasing[-1] in "?.!" and len(phrasing) > 1:
        phrasing = phrasing[:-1]
    if rng.random() < 0.15:
        return rng.choice(_OPENINGS) + _small(phrasing)
    return _small(phrasing) if rng.random() < 0.2 else phrasing


def _small(said: str) -> str:
    return said[0].lower() + said[1:]


def _sentence(said: str) -> str:
    """With a capital at the beginning."""
    return _articled(said[:1].upper() + said[1:])


def _articled(said: str) -> str:
    """With the article that fits the word after it: "an owl"."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", said)


def _call(expression: str, after: str) -> list[dict[str, str]]:
    """An answer with a tool call; {r} in the text after it is the tool's result."""
    result = calculate(expression)
    return [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": str(result)},
        {"type": "text", "text": after.format(r=result)},
    ]


# --- skills --------------------------------------------------------------------------------------


def sums(rng: random.Random, split: str) -> list[Exchange]:
    """A sum or difference of numbers of up to three digits, and often one or two that go on from its result."""
    exchanges, total = [], None
    for turn in range(rng.choice((1, 1, 2, 3))):
        sign = rng.choice("+-")
        a, b = _numbers(rng, split, sign, total)
        if not turn:
            table, key = (text.SUMS, "sums") if sign == "+" else (text.DIFFERENCES, "differences")
        else:
            table, key = (text.MORE, "more") if sign == "+" else (text.LESS, "less")
        question = _ask(
            rng, rng.choice(_questions(split, table, key)), a=a, b=b, n=_name(rng), t=rng.choice(text.THINGS)
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
    question = _ask(rng, rng.choice(text.PRODUCTS), a=a, b=b)
    return [Exchange(question, _call(f"{a}*{b}", text.RESULT), {"number": a * b})]


def letters(rng: random.Random, split: str) -> list[Exchange]:
    """How often a letter is in a word, counted by the tool."""
    word = _word(rng, split)
    share = rng.random()
    most = max(map(word.count, word))
    letter = rng.choice(
        "abcdefghijklmnopqrstuvwxyz" if share < 0.2
        else word if share < 0.5
        else [letter for letter in word if word.count(letter) == most]
    )  # fmt: skip
    mark = rng.choice(("{}", "{}", "{}", '"{}"', '"{}"', "'{}'"))
    question = _ask(
        rng, rng.choice(_questions(split, text.COUNTS, "counts")), w=mark.format(word),
        l=rng.choice(("{}", mark)).format(letter),
    )  # fmt: skip
    count = word.count(letter)
    # double quotes: behind a single one the tokenizer cuts off an s, d, m or t as if it were a contraction
    answer = _call(f'"{word}".count("{letter}")', text.COUNTED)
    return [Exchange(question, answer, {"number": count})]


def spelling(rng: random.Random, split: str) -> list[Exchange]:
    """The letters of a word."""
    word = _word(rng, split)
    mark = rng.choice(("{}", "{}", "{}", '"{}"', '"{}"', "'{}'"))
    question = _ask(rng, rng.choice(_questions(split, text.SPELLINGS, "spellings")), w=mark.format(word))
    return [Exchange(question, f"It is spelled {' '.join(word)}.", {"spelled": word})]


def facts(rng: random.Random, split: str) -> list[Exchange]:
    """A fact, and sometimes others of its kind that are asked for in few words."""
    name = _draw_relation(rng)
    relation = RELATIONS[name]
    subjects = rng.sample(list(relation.facts), min(len(relation.facts), rng.choice((1, 1, 1, 2, 3))))
    exchanges = []
    for number, x in enumerate(subjects):
        phrasings = relation.follow_ups if number else _questions(split, relation.questions, "relations", name)
        exchanges.append(_fact(rng, relation, x, _ask(rng, rng.choice(phrasings), x=x)))
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
    answer = _sentence(relation.answer.format(x=x, y=y))
    said = _plain(f"{x} {y}")
    never = sorted({other for other in relation.facts.values() if _plain(other) not in said})
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
        phrasing = rng.choice(_questions(split, relation.questions, "relations", name))
        question = _articled(phrasing.format(x=x))
    labels = LETTERS[: len(offered)]
    return choice_conversation(question, offered, labels, labels[offered.index(right)]), right


def marks(rng: random.Random, split: str) -> list[Exchange]:
    """Which letters stand behind words in a list: what multiple choice needs besides knowledge, with many letters to
    learn it from in each list. Only training has it."""
    words = [_word(rng, split) for _ in range(rng.randint(2, 5))]
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
    return _about(rng, topics[name], rng.choice(_questions(split, topics[name].questions, kind, name)))


def _about(rng: random.Random, topic: text.Topic, phrasing: str) -> Exchange:
    return Exchange(_ask(rng, phrasing), rng.choice(topic.answers), {"words": list(topic.needed)})


def outside(rng: random.Random, split: str) -> list[Exchange]:
    """A question that the small world has no answer to."""
    if split == "train" and rng.random() < 0.08:
        relation = RELATIONS["capital"]
        question = _ask(rng, rng.choice(relation.questions), x=rng.choice(text.UNKNOWN_CAPITALS))
    else:
        question = _ask_outside(rng, rng.choice(_questions(split, text.OUTSIDE, "outside_templates")))
    return [Exchange(question, text.DECLINE, {"declined": True})]


def _ask_outside(rng: random.Random, phrasing: str) -> str:
    cities = list(RELATIONS["country"].facts) + list(RELATIONS["capital"].facts)
    return _ask(
        rng, phrasing, w=_foreign_word(rng), w2=_foreign_word(rng), n=_name(rng), n2=_name(rng), c=rng.choice(cities),
        c2=rng.choice(cities), y=rng.randint(1200, 2030), k=rng.randint(2, 200), k2=rng.randint(2, 200),
    )  # fmt: skip


def _name(rng: random.Random) -> str:
    """A name, one in two made up, since people have very many."""
    return rng.choice(text.NAMES) if rng.random() < 0.5 else _made_up(rng).capitalize()


def memory(rng: random.Random, split: str) -> list[Exchange]:
    """Something the user says about himself, perhaps something else, and the question for it."""
    kind = rng.choice(list(text.MEMORIES))
    statements, questions, answer = text.MEMORIES[kind]
    value = _memory_value(rng, split, kind)
    told = text.REMEMBERED if kind != "name" else f"Nice to meet you, {value}!"
    exchanges = [Exchange(_ask(rng, rng.choice(statements), v=value), told)]
    if rng.random() < 0.5:
        exchanges += rng.choice((facts, sums, small_talk))(rng, "train")[:1]
    question = _ask(rng, rng.choice(_questions(split, questions, "memories", kind)))
    return [*exchanges, Exchange(question, answer.format(v=value), {"words": [value]})]


def _memory_value(rng: random.Random, split: str, kind: str) -> str:
    if kind == "number":
        return str(rng.randint(2, 99))
    if kind != "name":
        return rng.choice(text.MEMORY_VALUES[kind])
    return _name(rng) if split == "train" else rng.choice(_unseen()[split]["names"])


def told_by_system(rng: random.Random, split: str) -> tuple[str, list[Exchange]]:
    """A system message, and what is said after it that it has a bearing on."""
    kind = rng.choice(("user", "short", "title"))
    if kind == "user":
        name = _memory_value(rng, split, "name")
        _, questions, answer = text.MEMORIES["name"]
        question = _ask(rng, rng.choice(_questions(split, questions, "memories", "name")))
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
    "sums": 0.13, "products": 0.02, "letters": 0.15, "spelling": 0.05, "facts": 0.17, "choices": 0.15, "marks": 0.10,
    "identity": 0.12, "small_talk": 0.04, "outside": 0.12, "memory": 0.04,
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
        (topics[name], asked) for name in topics for asked in _questions(split, topics[name].questions, subject, name)
    ]


def _outside_question(rng: random.Random, split: str, index: int) -> Exchange:
    """Each of the real questions once, then questions made of templates."""
    real = _questions(split, (), "outside")
    if index < len(real):
        return Exchange(real[index], text.DECLINE, {"declined": True})
    return outside(rng, split)[0]
