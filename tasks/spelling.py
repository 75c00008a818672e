"""Spelling words, and counting a letter in them: what tokens hide from a model and it has to learn by heart.

In the manner of nanochat's SpellingBee: words of a public list (dwyl/english-words, words_alpha.txt, Unlicense), and
questions asked in many ways, all templates our own. Everything is generated from index and split, by generators of
their own, so a task is the same in every process, and as long as asked for.

A hash of the word decides its split: 80 % of the words are for training, 10 % for validation, 10 % for testing, and no
word, however it is asked about, is in two. The list is fetched once (`NANOCHAT_WORDS`: another address or file); where
that fails, the common words in `words.txt` are used, and kept for all stages of the work folder, so that these agree.
"""

import hashlib
import logging
import os
import random
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

from nanochat.common import UserError, base_dir, disk_errors, fetch_once
from nanochat.data.chat import visible_text
from nanochat.engine.calculator import calculate
from tasks.common import ANSWER_MARK, Completion, Conversation, Task, last_number, marked_number

logger = logging.getLogger(__name__)

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/master/words_alpha.txt"
WORDS_VARIABLE = "NANOCHAT_WORDS"
OWN_WORDS = Path(__file__).with_name("words.txt")
WORD = re.compile("[a-z]{3,15}")  # no letter names, no chemistry
MIN_WORDS = 100  # a list of fewer has no use, and is most likely something else
FETCH_ATTEMPTS = 3  # in a row: there is a fallback, and machines without a network should not wait
FETCH_TIMEOUT_SECONDS = 10
SPLITS = ("train", "validation", "test")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

# --- words ---------------------------------------------------------------------------------------


def split_of(word: str) -> str:
    """The split a word belongs to."""
    share = hashlib.sha256(word.encode()).digest()[0]  # 0 to 255
    return "test" if share < 26 else "validation" if share < 52 else "train"


@lru_cache(maxsize=3)
def words_of(split: str, source: str, folder: Path) -> tuple[str, ...]:
    """The words of `split` from the list `source` ("": the public one), kept in `folder`. Raises `UserError` when a
    list that was named cannot be had."""
    words = tuple(word for word in _read_words(source, folder) if split_of(word) == split)
    assert words, split
    return words


def _read_words(source: str, folder: Path) -> list[str]:
    if source and not source.startswith(("http://", "https://")):
        try:
            text = Path(source).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the word list {source} of {WORDS_VARIABLE} ({error})") from error
        return _parse_words(text, source)
    key = hashlib.sha256((source or WORDS_URL).encode()).hexdigest()[:16]
    path = fetch_once(folder / f"{key}.txt", lambda partial: _fetch_words(source, partial))
    text = path.read_text(encoding="utf-8")
    if not source and text == OWN_WORDS.read_text(encoding="utf-8"):
        logger.warning("only the words of %s: the list could not be fetched; delete %s to try again", OWN_WORDS, path)
    return _parse_words(text, str(path))


def _parse_words(text: str, name: str) -> list[str]:
    """The words in `text`, one a line, each once, in order; lines that are no plain English word are left out."""
    words = [word for word in dict.fromkeys(text.lower().split()) if WORD.fullmatch(word)]
    if len(words) < MIN_WORDS:
        raise UserError(f"{name} is no word list: it has only {len(words)} words of 3 to 15 letters, one a line")
    return words


def _fetch_words(source: str, partial: Path) -> None:
    """Write the list at `source` to `partial`; with "" that at the public address, or else our own."""
    text, fault = _download(source or WORDS_URL)
    if fault and source:
        raise UserError(f"cannot fetch the word list of {WORDS_VARIABLE} ({fault}); give another address or a file")
    with disk_errors("the word list", partial.parent):
        partial.write_text(OWN_WORDS.read_text(encoding="utf-8") if fault else text, encoding="utf-8")


def _download(url: str) -> tuple[str, str]:
    """The word list at `url` and "", or "" and why it cannot be had."""
    import requests

    fault = ""
    for _ in range(FETCH_ATTEMPTS):
        try:
            response = requests.get(url, timeout=FETCH_TIMEOUT_SECONDS)
            response.raise_for_status()
            _parse_words(response.text, url)
            return response.text, ""
        except (requests.RequestException, UserError) as error:
            fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return "", fault


# --- tasks ---------------------------------------------------------------------------------------


class _WordTask(Task):
    """`size` conversations about words of `split` ("train", "validation" or "test"), each drawn for its index."""

    kind = "generative"
    has_reward = True

    def __init__(self, size: int, split: str) -> None:
        assert size >= 0, size
        assert split in SPLITS, split
        self.size, self.split, self.purpose = size, split, split

    def __len__(self) -> int:
        return self.size

    def conversation(self, index: int) -> Conversation:
        rng = random.Random(f"{self.name} {self.split} {index}")
        word = rng.choice(words_of(self.split, os.environ.get(WORDS_VARIABLE, ""), base_dir() / "words"))
        return self.ask(word, rng)

    def ask(self, word: str, rng: random.Random) -> Conversation:
        """A conversation about `word`."""
        raise NotImplementedError

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        return float(self.evaluate(conversation, completion))


class LetterCounting(_WordTask):
    """How often a letter occurs in a word. The answer spells the word, counting on the way, has Python count too, and
    ends with `#### 3`; `evaluate` takes the last number for the answer, "strict" and the reward want that form."""

    name = "SpellingBee"

    def ask(self, word: str, rng: random.Random) -> Conversation:
        letter = _draw_letter(word, rng)
        question = _vary(rng.choice(COUNT_QUESTIONS).format(word=_quoted(word, rng), letter=_quoted(letter, rng)), rng)
        return _conversation(question, counting_answer(word, letter))

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        return last_number(visible_text(completion)) == _true_count(conversation)

    def score(self, conversation: Conversation, completion: Completion) -> dict[str, float]:
        strict = marked_number(visible_text(completion)) == _true_count(conversation)
        return {"flexible": float(self.evaluate(conversation, completion)), "strict": float(strict)}

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        return self.score(conversation, completion)["strict"]


class Spelling(_WordTask):
    """The letters of a word in order, with blanks between them. `evaluate` takes the last row of single letters in the
    text for the answer, with blanks, commas, dots or hyphens between them, in either case."""

    name = "Spelling"

    def ask(self, word: str, rng: random.Random) -> Conversation:
        question = _vary(rng.choice(SPELL_QUESTIONS).format(word=_quoted(word, rng)), rng)
        return _conversation(question, f"{word}: {' '.join(word)}")

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        truth = _letter_rows(visible_text(conversation["messages"][-1]["content"]))[-1]
        return _letter_rows(visible_text(completion))[-1:] == [truth]


def counting_answer(word: str, letter: str) -> list[dict[str, str]]:
    """The parts of the answer to how often `letter` is in `word`.

    Every letter of the spelling stands behind a blank and before a blank or a bracket, so that each is a token that is
    the same for all words; the running count stands where it changes.
    """
    spelled, count = [], 0
    for character in word:
        count += character == letter
        spelled.append(f"{character}({count})" if character == letter else character)
    expression = f"'{word}'.count('{letter}')"
    times = "once" if count == 1 else f"{count} times"
    return [
        {"type": "text", "text": f"Spelled out: {' '.join(spelled)}\nThat makes {count}. Python counts "},
        {"type": "python", "text": expression},
        {"type": "python_output", "text": str(calculate(expression))},
        {"type": "text", "text": f"{count}, so the letter {letter} is in {word} {times}.\n\n{ANSWER_MARK} {count}"},
    ]


def _draw_letter(word: str, rng: random.Random) -> str:
    """A letter to count: any, one of the word, or one that is most frequent in it. Drawn evenly, three answers in four
    would be 1."""
    share = rng.random()
    if share < 0.2:
        return rng.choice(ALPHABET)
    most = max(map(word.count, word))
    return rng.choice(word if share < 0.5 else [letter for letter in word if word.count(letter) == most])


def _true_count(conversation: Conversation) -> Fraction | None:
    return marked_number(visible_text(conversation["messages"][-1]["content"]))


def _letter_rows(text: str) -> list[str]:
    """Words spelled in `text`, in order: `_letter_rows("It is C-a-t.") == ["cat"]`."""
    rows = re.findall(r"\b[a-z](?:[ ,.\-]+[a-z]\b)+", text.lower())
    return [re.sub("[^a-z]", "", row) for row in rows]


# --- questions -----------------------------------------------------------------------------------

COUNT_QUESTIONS = (
    "How many {letter} are in {word}?",
    "How many {letter} are there in {word}?",
    "How many times does {letter} occur in {word}?",
    "How many times does the letter {letter} appear in the word {word}?",
    "How many times can you find {letter} in {word}?",
    "How many letters {letter} does {word} have?",
    "How many {letter}s does the word {word} contain?",
    "How often does {letter} occur in {word}?",
    "How often is the letter {letter} used in {word}?",
    "How often do I have to write {letter} when I write {word}?",
    "What is the number of {letter} in {word}?",
    "What's the count of {letter} in the word {word}?",
    "In {word}, how many {letter} do you see?",
    "In the word {word}, how many times is there a {letter}?",
    "Count the letter {letter} in {word}.",
    "Count how many {letter} {word} has.",
    "Count every {letter} in the word {word}.",
    "Tell me how many {letter} are in {word}.",
    "Tell me the number of times {letter} comes up in {word}.",
    "Take the word {word}. How many {letter} has it got?",
    "Look at the word {word} and count the {letter}.",
    "I need to know how many {letter} there are in {word}.",
    "Does {word} have any {letter}, and if so, how many?",
    "Is there a {letter} in {word}? How many of them?",
    "Letter count: {letter} in {word}",
    "Number of {letter} in {word}",
    "{word}: how many {letter}?",
    "Could you count the {letter} in {word} for me?",
    "Can you work out how often {letter} is in {word}?",
    "My friend and I disagree about how many {letter} are in {word}. How many are there?",
)
SPELL_QUESTIONS = (
    "Spell the word {word}.",
    "Spell {word}.",
    "Spell out {word}.",
    "Spell {word} letter by letter.",
    "How do you spell {word}?",
    "How is {word} spelled?",
    "How is the word {word} written, letter by letter?",
    "What are the letters of {word}?",
    "What letters make up the word {word}?",
    "Which letters do I need to write {word}?",
    "Give me the letters of {word} one by one.",
    "Give me the spelling of {word}.",
    "List the letters in {word} in order.",
    "Write {word} with a blank between the letters.",
    "Break {word} into its letters.",
    "Take the word {word} apart into letters.",
    "Can you spell {word}?",
    "Could you spell {word} for me?",
    "I forgot how to spell {word}. Can you help?",
    "Spelling of {word}?",
)
_OPENINGS = ("",) * 6 + ("Please: ", "Hi! ", "Hello, ", "Hey, ", "Quick question: ", "One more: ")
_QUOTES = ("{}",) * 3 + ('"{}"', "'{}'", "“{}”", "`{}`")


def _quoted(text: str, rng: random.Random) -> str:
    """`text` plain, in one of several kinds of quotes, or in capitals."""
    shown = rng.choice(_QUOTES).format(text)
    return shown.upper() if rng.random() < 0.1 else shown


def _vary(question: str, rng: random.Random) -> str:
    """The question as people type it: with a greeting, without a capital or a question mark."""
    if rng.random() < 0.25:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.")
    return rng.choice(_OPENINGS) + question


def _conversation(question: str, answer: str | Sequence[Mapping[str, str]]) -> Conversation:
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
