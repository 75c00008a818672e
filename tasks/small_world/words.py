"""What the small world is made of: tables of facts and phrasings, words and names drawn for a split, varied questions.

The tables are the JSON files beside this module. Where a table has the keys "train", "validation" and "test", each
split has its own entries; everything else is shared by all splits. Placeholders: {x} what a fact is about, {y} its
answer (in outside.json: a year), {v} something the user said, {w} {w2} words, {l} a letter, {n} a name, {c} a city or
country, {a} {b} {k} numbers, {t} things to count (in "text_work": some sentences), {q} a question, {p} a phrasing.
"""

import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

from tasks.spelling import OWN_WORDS, split_of


@cache
def world() -> dict[str, Any]:
    """All tables by name, with "held_out" (templates of validation and test) and "known_words" (of facts); read-only.

    A relation has `facts` from what is asked about to the answer; the file may give them as those of another relation,
    swapped (`inverse_of`), or mean both directions (`both_ways`). Its `follow_ups` ask the same about something else.
    A topic has `answers` to choose from; any is right that has a word of each entry of `needed` (|: alternatives).
    """
    held_out: set[str] = set()

    def collect(table: dict[str, Any]) -> dict[str, Any]:
        held_out.update(map(template, [*table.get("validation", ()), *table.get("test", ())]))
        return table

    tables: dict[str, Any] = {"held_out": held_out}
    for name in ("facts", "talk", "outside"):
        text = Path(__file__).with_name(f"{name}.json").read_text(encoding="utf-8")
        tables |= json.loads(text, object_hook=collect)
    relations, known = tables["relations"], []
    for relation in relations.values():
        if "inverse_of" in relation:
            relation["facts"] = {y: x for x, y in relations[relation["inverse_of"]]["facts"].items()}
        if relation.get("both_ways"):
            relation["facts"] |= {y: x for x, y in relation["facts"].items()}
        relation.setdefault("follow_ups", tables["follow_ups"])
        known += [*relation["facts"], *relation["facts"].values()]
    words = set(plain_words(" ".join(known)).split())
    return tables | {"known_words": words, "long_known_words": sorted(word for word in words if len(word) > 2)}


def plain_words(said: str) -> str:
    """The words of a text in lower case, each with a blank before and after it."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', said.lower()))} "


@cache
def common_words(split: str) -> tuple[str, ...]:
    """The words of `words.txt` that belong to `split`."""
    return tuple(word for word in OWN_WORDS.read_text(encoding="utf-8").split() if split_of(word) == split)


def draw_word(rng: random.Random, split: str) -> str:
    """A word to spell; in training often a made-up one, since copying letters is best learned from very many words."""
    return rng.choice(common_words(split)) if split != "train" or rng.random() < 0.4 else made_up(rng)


def made_up(rng: random.Random) -> str:
    """A training word that does not exist: the beginning of one word and the end of another."""
    while True:
        first, second = rng.choice(common_words("train")), rng.choice(common_words("train"))
        made = first[: rng.randint(1, len(first) - 1)] + second[rng.randint(1, len(second) - 1) :]
        if 3 <= len(made) <= 12 and split_of(made) == "train":
            return made


def foreign_word(rng: random.Random) -> str:
    """A training word that no fact is about. One in four is made up, and may begin with a capital."""
    if rng.random() < 0.25:
        made = made_up(rng)
        return made if rng.random() < 0.5 else made.capitalize()
    while (word := rng.choice(common_words("train"))) in world()["known_words"]:
        pass
    return word


def draw_name(rng: random.Random) -> str:
    """A training name, every second one made up, since people have very many."""
    return rng.choice(world()["names"]["train"]) if rng.random() < 0.5 else made_up(rng).capitalize()


def ask(rng: random.Random, phrasing: str, **values: object) -> str:
    """`phrasing` filled in as people might type it: politely, after an opening, without the capital or the final mark.

    A variation never turns a training phrasing into one that is held out for validation or test.
    """
    varied = phrasing
    for kind in world()["politeness"].values():
        if phrasing.split()[0] in kind["first_words"] and rng.random() >= 0.7:
            varied = rng.choice(kind["forms"]).replace("{p}", _uncapitalized(phrasing.rstrip("?.!")))
    if rng.random() < 0.2 and varied[-1] in "?.!" and len(varied) > 1:
        varied = varied[:-1]
    if rng.random() < 0.15:
        varied = rng.choice(world()["openings"]) + _uncapitalized(varied)
    elif rng.random() < 0.2:
        varied = _uncapitalized(varied)
    return articled((phrasing if template(varied) in world()["held_out"] else varied).format(**values))


def _uncapitalized(said: str) -> str:
    return said[0].lower() + said[1:]


def template(phrasing: str) -> str:
    """The words and placeholders of a phrasing, in lower case, without punctuation."""
    return " ".join(re.findall(r"[a-z0-9']+|\{\w+\}|[-+*]", phrasing.lower()))


def articled(said: str) -> str:
    """`said` with "an" in place of "a" before a vowel."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", said)


def sentence(said: str) -> str:
    """`said` with a capital at the beginning and fitting articles."""
    return articled(said[:1].upper() + said[1:])
