"""Words, numbers, names and phrasings of the small world: what its questions are made of, drawn for a split.

What belongs to which split, and why, says `small_world.py`.
"""

import json
import random
import re
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tasks import small_world_text as text
from tasks.small_world_facts import RELATIONS
from tasks.spelling import OWN_WORDS, split_of

UNSEEN = Path(__file__).with_name("small_world_unseen.json")

# --- words and numbers ---------------------------------------------------------------------------


def plain_words(said: str) -> str:
    """The words of a text, in small letters with one blank around each."""
    return f" {' '.join(re.findall(r'[a-z0-9]+', said.lower()))} "


@cache
def common_words(split: str) -> tuple[str, ...]:
    """The words of `split` in the list of common ones."""
    words = OWN_WORDS.read_text(encoding="utf-8").split()
    return tuple(word for word in dict.fromkeys(words) if split_of(word) == split)


@cache
def known_words() -> frozenset[str]:
    """Every word that facts are about: questions outside the small world have none of them in the place of a word."""
    facts = [relation.facts for relation in RELATIONS.values()]
    return frozenset(word for table in facts for word in plain_words(" ".join([*table, *table.values()])).split())


def draw_word(rng: random.Random, split: str) -> str:
    """A word to spell: in training often one that does not exist, of the beginning of one word and the end of
    another, since copying letters is best learned from very many words."""
    if split != "train" or rng.random() < 0.4:
        return rng.choice(common_words(split))
    return made_up(rng)


def made_up(rng: random.Random) -> str:
    """A training word that does not exist."""
    while True:
        first, second = rng.choice(common_words("train")), rng.choice(common_words("train"))
        made = first[: rng.randint(1, len(first) - 1)] + second[rng.randint(1, len(second) - 1) :]
        if 3 <= len(made) <= 12 and split_of(made) == "train":
            return made


def foreign_word(rng: random.Random) -> str:
    """A training word that no fact is about, now and then one made up, which may begin with a capital."""
    if rng.random() < 0.25:
        made = made_up(rng)
        return made if rng.random() < 0.5 else made.capitalize()
    while (word := rng.choice(common_words("train"))) in known_words():
        pass
    return word


def draw_name(rng: random.Random) -> str:
    """A name, one in two made up, since people have very many."""
    return rng.choice(text.NAMES) if rng.random() < 0.5 else made_up(rng).capitalize()


def _number(rng: random.Random) -> int:
    """Up to three digits, short ones as often as long ones."""
    return rng.randint(0, 10 ** rng.randint(1, 3) - 1)


def draw_numbers(rng: random.Random, split: str, sign: str, first: int | None = None) -> tuple[int, int]:
    """Two numbers whose sum or difference belongs to `split`; the first may be given."""
    while True:
        a, b = _number(rng) if first is None else first, _number(rng)
        if sign == "-" and a < b and rng.random() < 0.8:  # mostly not below zero
            continue
        if split_of(sum_key(a, b, sign)) == split:
            return a, b


def sum_key(a: int, b: int, sign: str) -> str:
    """What decides on the split of a sum or difference: 5 + 3 is in that of 3 + 5."""
    return f"{min(a, b)}+{max(a, b)}" if sign == "+" else f"{a}-{b}"


# --- phrasing ------------------------------------------------------------------------------------


@cache
def unseen() -> dict[str, Any]:
    return json.loads(UNSEEN.read_text(encoding="utf-8"))


def phrasings(split: str, trained: Sequence[str], *path: str) -> Sequence[str]:
    """The phrasings of `split`: those that are trained on, or those at `path` in the file of the unseen."""
    if split == "train":
        return trained
    found = unseen()[split]
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

    return frozenset(_template(phrasing) for phrasing in leaves(unseen()))


def _template(phrasing: str) -> str:
    """The words of a phrasing, in small letters, with what is to be filled in."""
    return " ".join(re.findall(r"[a-z0-9']+|\{\w+\}|[-+*]", phrasing.lower()))


def ask(rng: random.Random, phrasing: str, **values: object) -> str:
    """A question as people type it: politely or not, perhaps with an opening, without a capital, without the sign at
    its end. It never becomes one of those that are held out, unless it is one."""
    varied = _opened(rng, _politely(rng, phrasing))
    return articled((phrasing if _template(varied) in _held_out() else varied).format(**values))


def _politely(rng: random.Random, phrasing: str) -> str:
    first = phrasing.split()[0]
    forms = text.REQUESTS if first in text.IMPERATIVES else text.INQUIRIES if first in text.QUESTION_WORDS else ()
    if not forms or rng.random() < 0.7:
        return phrasing
    return rng.choice(forms).replace("{p}", small(phrasing.rstrip("?.!")))


def _opened(rng: random.Random, phrasing: str) -> str:
    if rng.random() < 0.2 and phrasing[-1] in "?.!" and len(phrasing) > 1:
        phrasing = phrasing[:-1]
    if rng.random() < 0.15:
        return rng.choice(_OPENINGS) + small(phrasing)
    return small(phrasing) if rng.random() < 0.2 else phrasing


def small(said: str) -> str:
    return said[0].lower() + said[1:]


def sentence(said: str) -> str:
    """With a capital at the beginning."""
    return articled(said[:1].upper() + said[1:])


def articled(said: str) -> str:
    """With the article that fits the word after it: "an owl"."""
    return re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", said)
