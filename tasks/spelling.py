"""Spelling words, and counting a letter in them: tokens hide the letters, so a model has to learn them by heart.

In the manner of nanochat's SpellingBee: words of a public list (dwyl/english-words, words_alpha.txt, Unlicense) and
questions phrased in many ways (`spelling.json`), generated from index and split alone. A hash of the word decides its
split: 80 % are for training, 10 % for validation, 10 % for testing, and no word is in two, however it is asked about.
The list is fetched once (`NANOCHAT_WORDS`: another address or a file). If that fails, the common words in `words.txt`
take its place for all stages of the work folder, so that these agree.
"""

import hashlib
import json
import logging
import os
import random
import re
import string
from functools import lru_cache
from pathlib import Path

from nanochat.common import UserError, base_dir, disk_errors, fetch_once
from nanochat.data.chat import visible_text
from nanochat.engine.calculator import calculate
from tasks.common import ANSWER_MARK, Completion, Conversation, NumericTask, Task, reference_text, single_turn

logger = logging.getLogger(__name__)

WORDS_URL = "https://raw.githubusercontent.com/dwyl/english-words/master/words_alpha.txt"
WORDS_VARIABLE = "NANOCHAT_WORDS"
QUESTIONS = json.loads(Path(__file__).with_name("spelling.json").read_text(encoding="utf-8"))
OWN_WORDS = Path(__file__).with_name("words.txt")
WORD = re.compile("[a-z]{3,15}")  # no letter names, no chemistry
MIN_WORDS = 100  # a shorter list is useless, and most likely not a word list
FETCH_ATTEMPTS = 3  # without pauses: there is a fallback, and machines without a network should not wait
FETCH_TIMEOUT_SECONDS = 10
SPLITS = ("train", "validation", "test")


def split_of(word: str) -> str:
    """The split a word belongs to."""
    share = hashlib.sha256(word.encode()).digest()[0]  # 0 to 255
    return "test" if share < 26 else "validation" if share < 52 else "train"


@lru_cache(maxsize=3)
def words_of(split: str, source: str, folder: Path) -> tuple[str, ...]:
    """The words of `split` in the list `source` (an address or a file; "": the public list), fetched into `folder`.
    Raises `UserError` when a list that was named cannot be had."""
    words = tuple(word for word in _read_words(source, folder) if split_of(word) == split)
    assert words, split
    return words


def _read_words(source: str, folder: Path) -> list[str]:
    if source and not source.startswith(("http://", "https://")):
        try:
            return _parse_words(Path(source).expanduser().read_text(encoding="utf-8"), source)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the word list {source} of {WORDS_VARIABLE} ({error})") from error
    key = hashlib.sha256((source or WORDS_URL).encode()).hexdigest()[:16]
    path = fetch_once(folder / f"{key}.txt", lambda partial: _fetch_words(source, partial))
    text = path.read_text(encoding="utf-8")
    if not source and text == OWN_WORDS.read_text(encoding="utf-8"):
        logger.warning("only the words of %s: the list could not be fetched; delete %s to try again", OWN_WORDS, path)
    return _parse_words(text, str(path))


def _parse_words(text: str, name: str) -> list[str]:
    """The plain English words in `text`, each once, in order."""
    words = [word for word in dict.fromkeys(text.lower().split()) if WORD.fullmatch(word)]
    if len(words) < MIN_WORDS:
        raise UserError(f"{name} is no word list: it has only {len(words)} words of 3 to 15 letters, one a line")
    return words


def _fetch_words(source: str, partial: Path) -> None:
    """Write the list at the address `source` to `partial`; for "" the public list, or else our own words."""
    import requests

    for _ in range(FETCH_ATTEMPTS):
        try:
            response = requests.get(source or WORDS_URL, timeout=FETCH_TIMEOUT_SECONDS)
            response.raise_for_status()
            text = response.text
            _parse_words(text, source or WORDS_URL)
            break
        except (requests.RequestException, UserError) as error:
            fault = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    else:
        if source:
            raise UserError(f"cannot fetch the word list of {WORDS_VARIABLE} ({fault}); give another address or a file")
        text = OWN_WORDS.read_text(encoding="utf-8")
    with disk_errors("the word list", partial.parent):
        partial.write_text(text, encoding="utf-8")


class WordTask(Task):
    """`size` conversations about words of `split` ("train", "validation" or "test")."""

    kind = "generative"
    has_reward = True

    def __init__(self, size: int, split: str) -> None:
        assert split in SPLITS, split
        self.rows, self.split, self.purpose = range(size), split, split

    def draw(self, index: int) -> tuple[random.Random, str]:
        """The random generator of conversation `index`, and the word it is about."""
        rng = random.Random(f"{self.name} {self.split} {index}")
        return rng, rng.choice(words_of(self.split, os.environ.get(WORDS_VARIABLE, ""), base_dir() / "words"))


class LetterCounting(NumericTask, WordTask):
    """How often a letter occurs in a word. The answer counts while spelling, has Python count too, ends `#### 3`."""

    name = "SpellingBee"

    def conversation(self, index: int) -> Conversation:
        rng, word = self.draw(index)
        letter = draw_letter(word, rng)
        question = rng.choice(QUESTIONS["counting"]).format(word=_quoted(word, rng), letter=_quoted(letter, rng))
        return single_turn(_vary(question, rng), counting_answer(word, letter))


class Spelling(WordTask):
    """The letters of a word in order, with blanks between them. `evaluate` takes the last row of single letters in the
    text for the answer, with blanks, commas, dots or hyphens between them, in either case."""

    name = "Spelling"

    def conversation(self, index: int) -> Conversation:
        rng, word = self.draw(index)
        question = rng.choice(QUESTIONS["spelling"]).format(word=_quoted(word, rng))
        return single_turn(_vary(question, rng), f"{word}: {' '.join(word)}")

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        truth = _letter_rows(reference_text(conversation))[-1]
        return _letter_rows(visible_text(completion))[-1:] == [truth]


def counting_answer(word: str, letter: str) -> list[dict[str, str]]:
    """The parts of the answer to how often `letter` is in `word`. A blank before each letter of the spelling, and a
    blank or a bracket after it, make it a token that all words share."""
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


def _letter_rows(text: str) -> list[str]:
    """Words spelled in `text`, in order: `_letter_rows("It is C-a-t.") == ["cat"]`."""
    rows = re.findall(r"\b[a-z](?:[ ,.\-]+[a-z]\b)+", text.lower())
    return [re.sub("[^a-z]", "", row) for row in rows]


def draw_letter(word: str, rng: random.Random) -> str:
    """A letter to count: any, one of the word, or one of the most frequent in it; evenly, most answers would be 1."""
    share = rng.random()
    if share < 0.2:
        return rng.choice(string.ascii_lowercase)
    most = max(map(word.count, word))
    return rng.choice(word if share < 0.5 else [letter for letter in word if word.count(letter) == most])


def _quoted(text: str, rng: random.Random) -> str:
    """`text` plain or in one of several kinds of quotes, sometimes in capitals."""
    shown = rng.choice(("{}", "{}", "{}", '"{}"', "'{}'", "“{}”", "`{}`")).format(text)
    return shown.upper() if rng.random() < 0.1 else shown


def _vary(question: str, rng: random.Random) -> str:
    """`question` as people type it: with a greeting, without the capital or the final mark."""
    if rng.random() < 0.25:
        question = question[0].lower() + question[1:]
    if rng.random() < 0.15:
        question = question.rstrip("?.")
    greetings = ("Please: ", "Hi! ", "Hello, ", "Hey, ", "Quick question: ", "One more: ")
    return rng.choice(("",) * 6 + greetings) + question
