import json
import logging
import os
import string
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
from hub_fixtures import refuse_network
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.data.chat import check_conversation, visible_text
from nanochat.engine.calculator import calculate
from tasks import spelling
from tasks.spelling import OWN_WORDS, SPLITS, LetterCounting, Spelling, counting_answer, split_of, words_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(autouse=True)
def own_words(monkeypatch):
    monkeypatch.setenv(spelling.WORDS_VARIABLE, str(OWN_WORDS))


def answer_of(conversation):
    return conversation["messages"][-1]["content"]


def word_of(conversation) -> str:
    call = answer_of(conversation)[1]["text"]  # 'word'.count('x')
    return call.split("'")[1]


def test_our_own_words_fit_the_rule_and_belong_to_one_split_each_for_good(base_folder):
    own = OWN_WORDS.read_text().split("\n")[:-1]
    assert own == sorted(set(own))
    assert all(spelling.WORD.fullmatch(word) for word in own)
    words = {split: words_of(split, str(OWN_WORDS), base_folder) for split in SPLITS}
    assert sorted(word for split in SPLITS for word in words[split]) == own
    assert len(words["train"]) > 6 * len(words["test"]) > 300
    assert [split_of(word) for word in ("apple", "strawberry", "mississippi")] == ["train"] * 3


def test_a_named_file_is_read_with_what_is_no_word_left_out(tmp_path, base_folder):
    path = tmp_path / "list.txt"
    path.write_text("\r\n".join(["Apple", "apple", "it's", "a", "naïve", *OWN_WORDS.read_text().split()[:200]]))
    found = [word for split in SPLITS for word in words_of(split, str(path), base_folder)]
    assert sorted(found) == sorted({"apple", *OWN_WORDS.read_text().split()[:200]})


@pytest.mark.parametrize("content", [b"<html><body>Sign in</body></html>", b"", b"\xff\xfe", None])
def test_a_named_file_that_is_no_list_is_an_error(tmp_path, base_folder, content):
    path = tmp_path / "list.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"list\.txt"):
        words_of("train", str(path), base_folder)


def test_without_a_network_our_own_words_are_used_and_kept(monkeypatch, base_folder, caplog):
    monkeypatch.delenv(spelling.WORDS_VARIABLE)
    num_attempts = refuse_network(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert set(words_of("test", "", base_folder)) <= set(OWN_WORDS.read_text().split())
    assert "could not be fetched; delete" in caplog.text
    assert num_attempts() == spelling.FETCH_ATTEMPTS
    words_of("train", "", base_folder)
    assert num_attempts() == spelling.FETCH_ATTEMPTS, "stages of one work folder agree on their words"


def test_what_is_fetched_is_checked_and_kept_and_no_answer_is_an_error(monkeypatch, base_folder):
    pages = iter(["<html>Sign in</html>", OWN_WORDS.read_text() + "zyzzyva\n"])
    respond = lambda url, timeout: SimpleNamespace(text=next(pages), raise_for_status=lambda: None)  # noqa: E731
    monkeypatch.setattr(requests, "get", respond)
    url = "http://somewhere/words.txt"
    assert sum(len(words_of(split, url, base_folder)) for split in SPLITS) == 1 + len(OWN_WORDS.read_text().split())
    assert len(list(base_folder.glob("*.txt"))) == 1
    refuse_network(monkeypatch)
    with pytest.raises(UserError, match=r"cannot fetch the word list of NANOCHAT_WORDS \(ConnectionError: no network"):
        words_of("train", "http://127.0.0.1:9/words.txt", base_folder)


def test_the_answer_spells_counts_and_calls_the_tool():
    assert counting_answer("strawberry", "r") == [
        {"type": "text", "text": "Spelled out: s t r(1) a w b e r(2) r(3) y\nThat makes 3. Python counts "},
        {"type": "python", "text": "'strawberry'.count('r')"},
        {"type": "python_output", "text": "3"},
        {"type": "text", "text": "3, so the letter r is in strawberry 3 times.\n\n#### 3"},
    ]


@given(st.text("abcxyz", min_size=1, max_size=15), st.sampled_from("abz"))
def test_the_count_is_pythons_for_every_word_and_letter(word, letter):
    parts = counting_answer(word, letter)
    assert parts[2]["text"] == calculate(parts[1]["text"]) == str(word.count(letter))
    spelled = parts[0]["text"].split("\n")[0].removeprefix("Spelled out: ").split(" ")
    assert "".join(piece[0] for piece in spelled) == word
    counts = [int(piece[2:-1]) for piece in spelled if len(piece) > 1]
    assert counts == list(range(1, word.count(letter) + 1))


def test_a_generated_task_is_the_same_everywhere_and_reads_no_global_state():
    first = [LetterCounting(20, "train")[i] for i in range(20)]
    assert first == list(LetterCounting(500, "train")[:20])
    code = "import json; from tasks.spelling import LetterCounting as T; print(json.dumps(list(T(20, 'train'))))"
    environment = os.environ | {"PYTHONHASHSEED": "5"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, check=True)
    assert json.loads(done.stdout) == first


@pytest.mark.parametrize("split", SPLITS)
def test_questions_stay_within_the_words_of_their_split(split):
    task = LetterCounting(300, split)
    assert {split_of(word_of(conversation)) for conversation in task} == {split}
    assert task.purpose == split


def test_questions_are_varied_and_in_order():
    task = list(LetterCounting(1000, "train"))
    for conversation in task:
        check_conversation(conversation)
        assert word_of(conversation) in conversation["messages"][0]["content"].lower()
    counts = [answer_of(conversation)[2]["text"] for conversation in task]
    assert len({c["messages"][0]["content"] for c in task}) > 950
    assert 50 < counts.count("0") < 200
    assert counts.count("1") < 700
    assert sum(int(count) > 1 for count in counts) > 250
    assert len(spelling.QUESTIONS["counting"]) >= 30
    assert len(spelling.QUESTIONS["spelling"]) >= 20


def test_counts_are_judged_by_value_with_a_strict_score():
    task = LetterCounting(50, "test")
    for conversation in task:
        right = answer_of(conversation)
        assert task.score(conversation, right) == {"flexible": 1, "strict": 1}
        assert task.reward(conversation, right) == 1
        count = int(right[2]["text"])
        assert task.evaluate(conversation, f"There are {count}.")
        assert task.reward(conversation, f"There are {count}.") == 0
        assert not task.evaluate(conversation, f"{count}\n#### {count + 1}")
        assert not task.evaluate(conversation, right[1:3]), "the tool's output alone is no answer"


def test_spelling_is_judged_by_the_letters():
    task = Spelling(30, "validation")
    for conversation in task:
        check_conversation(conversation)
        text = visible_text(answer_of(conversation))
        word = text.split(":")[0]
        assert split_of(word) == "validation"
        assert text == f"{word}: {' '.join(word)}"
        assert task.evaluate(conversation, text)
        assert task.reward(conversation, "-".join(word).upper()) == 1
        assert task.evaluate(conversation, f"I spell a word: {', '.join(word)}.")
        for wrong in ("", word, " ".join(word[:-1]), " ".join(word[::-1] + "x"), f"{' '.join(word)} or x y z"):
            assert not task.evaluate(conversation, wrong), wrong


def test_every_letter_of_a_spelling_is_a_token_that_all_words_share():
    """With a vocabulary that knows the letters behind blanks, which any trained on much text does."""
    from nanochat.tokenizer import MIN_VOCAB_SIZE, Tokenizer

    texts = [" ".join(string.ascii_lowercase) + " the of strawberry (1)(2)\n"] * 30
    tokenizer = Tokenizer.train(texts, MIN_VOCAB_SIZE + 60)
    ids = {letter: tokenizer.encode(f" {letter}") for letter in string.ascii_lowercase}
    assert all(len(letter_ids) == 1 for letter_ids in list(ids.values())[1:])
    tokens = tokenizer.encode(counting_answer("strawberry", "r")[0]["text"].split("\n")[0])
    for letter in set("strawberry"):
        assert tokens.count(ids[letter][0]) == "strawberry".count(letter)
