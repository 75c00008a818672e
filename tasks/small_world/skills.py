"""Everything the small world can talk about: one generator for each skill, and the questions it declines.

A skill takes a random generator and a split and returns a few exchanges of question and answer on one subject. Where an
exam may ask the question, the exchange carries the judge of other answers (`small_world.is_right`).
"""

import random
import string
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from nanochat.engine.calculator import calculate
from tasks.common import Conversation, choice_conversation
from tasks.small_world.words import articled, ask, draw_name, draw_word, foreign_word, plain_words, sentence, world
from tasks.spelling import draw_letter, split_of

CHOICE_LETTERS = "ABCD"
LETTER_ONLY_SHARE = 0.3  # of the multiple choice in training; more of it did not help (dev/LOG.md)
LONG_SHARE = 0.5  # of the questions outside the small world in training
QUOTES = ("{}", "{}", "{}", '"{}"', '"{}"', "'{}'")  # around words and letters in questions
DECLINE = "I don't know that, it is outside of my small world."
DECLINED = "don't know"  # occurs in no other answer


class Exchange(NamedTuple):
    question: str
    answer: str | list[dict[str, str]]
    judge: Mapping[str, Any] | None = None  # None: only there to be trained on


def _call(expression: str, reply: str) -> list[dict[str, str]]:
    """An answer that calls the calculator; {r} in `reply` is its result."""
    result = str(calculate(expression))
    return [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": result},
        {"type": "text", "text": reply.format(r=result)},
    ]


def sums(rng: random.Random, split: str) -> list[Exchange]:
    """A sum or difference of numbers of up to three digits, often continued from its result once or twice."""
    exchanges, total = [], None
    for _ in range(rng.choice((1, 1, 2, 3))):
        sign = rng.choice("+-")
        a, b = draw_numbers(rng, split, sign, total)
        phrasing = rng.choice(world()["sums" if total is None else "next_sums"][sign][split])
        question = ask(rng, phrasing, a=a, b=b, n=draw_name(rng), t=rng.choice(world()["things"]))
        total = a + b if sign == "+" else a - b
        exchanges.append(Exchange(question, _call(f"{a}{sign}{b}", "That is {r}."), {"number": total}))
        if not 0 <= total <= 999:
            break
    return exchanges


def draw_numbers(rng: random.Random, split: str, sign: str, first: int | None) -> tuple[int, int]:
    """Two numbers whose sum or difference belongs to `split`, most differences not negative; `first` may be given."""
    while True:
        a, b = _draw_number(rng) if first is None else first, _draw_number(rng)
        if sign == "-" and a < b and rng.random() < 0.8:
            continue
        key = f"{min(a, b)}+{max(a, b)}" if sign == "+" else f"{a}-{b}"  # 5 + 3 is in the same split as 3 + 5
        if split_of(key) == split:
            return a, b


def _draw_number(rng: random.Random) -> int:
    return rng.randint(0, 10 ** rng.randint(1, 3) - 1)  # of one, two or three digits about equally often


def products(rng: random.Random, split: str) -> list[Exchange]:
    """A product of two numbers of up to two digits; there are phrasings for training only."""
    a, b = rng.randint(0, 99), rng.randint(0, 99)
    question = ask(rng, rng.choice(world()["products"]), a=a, b=b)
    return [Exchange(question, _call(f"{a}*{b}", "That is {r}."), {"number": a * b})]


def letters(rng: random.Random, split: str) -> list[Exchange]:
    """How often a letter occurs in a word, counted by the tool."""
    word = draw_word(rng, split)
    letter, quotes = draw_letter(word, rng), rng.choice(QUOTES)
    phrasing = rng.choice(world()["counts"][split])
    question = ask(rng, phrasing, w=quotes.format(word), l=rng.choice(("{}", quotes)).format(letter))
    # Double quotes, because after a single one the tokenizer cuts off an s, d, m or t like the end of a contraction.
    return [Exchange(question, _call(f'"{word}".count("{letter}")', "I count {r}."), {"number": word.count(letter)})]


def spelling(rng: random.Random, split: str) -> list[Exchange]:
    """The letters of a word. The answer repeats the word, so that its tokens are the same however it was quoted."""
    word = draw_word(rng, split)
    quotes = rng.choice(QUOTES)
    question = ask(rng, rng.choice(world()["spellings"][split]), w=quotes.format(word))
    return [Exchange(question, f"The word {word} is spelled {' '.join(word)}.", {"spelled": word})]


def facts(rng: random.Random, split: str) -> list[Exchange]:
    """A fact, and sometimes one or two of the same kind that are asked for in few words."""
    relation = _draw_relation(rng)
    subjects = rng.sample(list(relation["facts"]), min(len(relation["facts"]), rng.choice((1, 1, 1, 2, 3))))
    exchanges = []
    for x in subjects:
        y = relation["facts"][x]
        question = ask(rng, rng.choice(relation["follow_ups"] if exchanges else relation["questions"][split]), x=x)
        said = plain_words(f"{x} {y}")
        wrong = sorted({other for other in relation["facts"].values() if plain_words(other) not in said})
        told = sentence(relation["answer"].format(x=x, y=y))
        exchanges.append(Exchange(question, told, {"words": [y], "never": wrong}))
    return exchanges


def _draw_relation(rng: random.Random) -> dict[str, Any]:
    """A relation, large ones more often, so that every fact is about equally frequent."""
    relations = world()["relations"].values()
    return rng.choices(list(relations), [max(8, len(relation["facts"])) for relation in relations])[0]


def choices(rng: random.Random, split: str) -> list[Exchange]:
    """Multiple choice, to be answered with the right choice and its letter; in training at times with the letter alone,
    as in all other multiple-choice tasks."""
    conversation, right = choice_letter(rng, split)
    question, letter = (message["content"] for message in conversation["messages"])
    if split == "train" and rng.random() < LETTER_ONLY_SHARE:
        return [Exchange(question, letter, {"only": letter})]
    question = question.rpartition("\n")[0] + "\nAnswer with the right choice and its letter."
    answer = f"It is {right} [{letter}]."
    return [Exchange(question, answer, {"only": answer})]


def choice_letter(rng: random.Random, split: str) -> tuple[Conversation, str]:
    """A multiple-choice question about a fact, answered with a letter, and the right choice. In training some questions
    name the choice itself: finding it among the others is half of what has to be learned."""
    relation = _draw_relation(rng)
    x = rng.choice(list(relation["facts"]))
    right = relation["facts"][x]
    others = sorted(set(relation["facts"].values()) - {right, x})
    offered = [right, *rng.sample(others, min(len(others), 3 if split != "train" else rng.randint(1, 3)))]
    rng.shuffle(offered)
    if split == "train" and rng.random() < 0.3:
        question = rng.choice(world()["pointers"]).format(y=right)
    else:
        question = articled(rng.choice(relation["questions"][split]).format(x=x))
    labels = CHOICE_LETTERS[: len(offered)]
    return choice_conversation(question, offered, labels, labels[offered.index(right)]), right


def marks(rng: random.Random, split: str) -> list[Exchange]:
    """Which letters follow the words of a list: the part of multiple choice that is not knowledge, with several letters
    to learn from in each list. It is only trained on."""
    words = [draw_word(rng, split) for _ in range(rng.randint(2, 5))]
    letter_of = dict(zip(words, rng.sample(string.ascii_uppercase, len(words)), strict=True))
    lines = "\n".join(f"- {word} [{letter}]" for word, letter in letter_of.items())
    asked = [rng.choice(words) for _ in range(rng.randint(2, 5))]
    question = rng.choice(world()["marks"]).format(lines=lines, words=", ".join(asked))
    exchanges = [Exchange(question, f"That is {', '.join(f'{word} [{letter_of[word]}]' for word in asked)}.")]
    for _ in range(rng.randint(0, 2)):
        word = rng.choice(words)
        exchanges.append(Exchange(rng.choice(world()["pointers"]).format(y=word), letter_of[word]))
    return exchanges


def _draw_topic(kind: str, rng: random.Random, split: str) -> list[Exchange]:
    topic = rng.choice(list(world()[kind].values()))
    return [about_topic(rng, topic, rng.choice(topic["questions"][split]))]


identity = partial(_draw_topic, "identity")  # who and what the model is, and how it came about
small_talk = partial(_draw_topic, "small_talk")  # greetings, thanks, and so on


def about_topic(rng: random.Random, topic: Mapping[str, Any], phrasing: str) -> Exchange:
    return Exchange(ask(rng, phrasing), rng.choice(topic["answers"]), {"words": list(topic["needed"])})


def memory(rng: random.Random, split: str) -> list[Exchange]:
    """Something users say about themselves, perhaps another exchange, and the question what it was."""
    kind = rng.choice(list(world()["memories"]))
    value, table = _draw_value(rng, split, kind), world()["memories"][kind]
    exchanges = [Exchange(ask(rng, rng.choice(table["statements"]), v=value), table["reply"].format(v=value))]
    if rng.random() < 0.5:
        exchanges += rng.choice((facts, sums, small_talk, letters, spelling))(rng, "train")[:1]
    return [*exchanges, _recall(rng, split, kind, value)]


def _draw_value(rng: random.Random, split: str, kind: str) -> str:
    """Something to remember of this kind; the names of validation and test are not trained on."""
    if kind == "name":
        return draw_name(rng) if split == "train" else rng.choice(world()["names"][split])
    if kind == "number":
        return str(rng.randint(2, 99))
    if kind == "city":
        return rng.choice(list(world()["relations"]["country"]["facts"]))
    return rng.choice(world()["memories"][kind]["values"])


def _recall(rng: random.Random, split: str, kind: str, value: str) -> Exchange:
    table = world()["memories"][kind]
    question = ask(rng, rng.choice(table["questions"][split]))
    return Exchange(question, table["answer"].format(v=value), {"words": [value]})


def told_by_system(rng: random.Random, split: str) -> tuple[str, list[Exchange]]:
    """A system message that says who the user is, wants answers of one word or a form of address, and exchanges in
    which that matters."""
    kind = rng.choice(("user", "short", "title") if split != "train" else ("user", "short", "short", "title"))
    messages = world()["system"][kind]
    if kind == "user":
        name = _draw_value(rng, split, "name")
        recall = _recall(rng, split, "name", name)
        before = rng.choice((facts, sums, small_talk))(rng, "train")[:1] if rng.random() < 0.3 else []
        return rng.choice(messages).format(v=name), [*before, recall]
    told = facts(rng, split)
    if kind == "short":
        told = [e._replace(answer=e.judge["words"][0], judge={"only": e.judge["words"][0]}) for e in told]
        return rng.choice(messages), told
    title = rng.choice(world()["titles"])
    judges = [{**exchange.judge, "words": [*exchange.judge["words"], title]} for exchange in told]
    told = [Exchange(e.question, f"{title}: {e.answer}", judge) for e, judge in zip(told, judges, strict=True)]
    return rng.choice(messages).format(t=title), told


def outside(rng: random.Random, split: str, question: str = "") -> list[Exchange]:
    """A question that the small world has no answer to; "" for one made from templates."""
    return [Exchange(question or _ask_outside(rng, split), DECLINE, {"declined": True})]


def _ask_outside(rng: random.Random, split: str) -> str:
    """A question from a short template; in training half of them are long, like those of users and benchmarks."""
    if split == "train" and rng.random() < LONG_SHARE:
        return _ask_long(rng)
    if split == "train" and rng.random() < 0.08:  # asked about like the known capitals
        phrasing = rng.choice(world()["relations"]["capital"]["questions"][split])
        return ask(rng, phrasing, x=rng.choice(world()["unknown_capitals"]))
    return ask(rng, rng.choice(world()["outside_templates"][split]), **_values(rng, foreign_word))


def _ask_long(rng: random.Random) -> str:
    """A story full of numbers, statements with a question after them, a text to do something with, or an errand; all of
    them mostly nonsense, in which known words occur too."""
    tables, kind = world(), rng.choices(("story", "study", "work", "errand"), (4, 3, 3, 1))[0]
    if kind == "story":
        told = [*rng.sample(tables["story"], rng.choice((1, 2, 3, 4, 5))), rng.choice(tables["story_questions"])]
        values = _values(rng, _any_word)  # the same names and things in every sentence, but other numbers
        return articled(" ".join(line.format(**values | _amounts(rng)) for line in told))
    if kind == "study":
        told = [_nonsense(rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
        return articled(" ".join([*told, rng.choice(tables["study"]).format(**_values(rng, _any_word))]))
    if kind == "errand":
        return ask(rng, rng.choice(tables["errands"]), **_values(rng, foreign_word))
    templates = (*tables["study"], *tables["outside_templates"]["train"])
    question = rng.choice(templates).format(**_values(rng, _any_word))
    template = rng.choice(tables["text_work"])
    text = " ".join(_nonsense(rng) for _ in range(rng.choice((1, 1, 2, 3, 4) if "{q}" not in template else (1,))))
    return articled(template.format(**_values(rng, _any_word), t=text, q=question))


def _nonsense(rng: random.Random) -> str:
    """Random words, names and numbers in about the proportions of a sentence."""
    said = []
    for _ in range(rng.randint(4, 14)):
        share = rng.random()
        if share < 0.45:
            said.append(rng.choice(world()["link_words"]))
        elif share < 0.9:
            said.append(_any_word(rng))
        else:
            said.append(draw_name(rng) if share < 0.95 else str(rng.randint(1, 10 ** rng.randint(1, 4))))
    if rng.random() < 0.3:
        said[rng.randrange(len(said) - 1)] += ","
    return f"{sentence(' '.join(said))}{rng.choice('....?')}"


def _any_word(rng: random.Random) -> str:
    """A training word that facts may be about."""
    return rng.choice(world()["long_known_words"]) if rng.random() < 0.4 else foreign_word(rng)


def _values(rng: random.Random, draw: Callable[[random.Random], str]) -> dict[str, object]:
    """Values for every placeholder of a template, words by `draw`."""
    places = [*world()["relations"]["country"]["facts"], *world()["relations"]["capital"]["facts"]]
    return {
        **{key: draw(rng) for key in ("w", "w2", "w3")},
        **{key: draw_name(rng) for key in ("n", "n2", "n3")},
        "c": rng.choice(places), "c2": rng.choice(places), "y": rng.randint(1200, 2030),
        **_amounts(rng),
    }  # fmt: skip


def _amounts(rng: random.Random) -> dict[str, object]:
    return {"k": rng.randint(2, 200), "k2": rng.randint(2, 200)}
