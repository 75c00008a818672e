import itertools
import random
import subprocess
import sys
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.common import Task, TaskMixture, choice_conversation, last_number, marked_number, render_choices


class Numbers(Task):
    """Conversations that only have a number; counts how often they are made."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.rows = name, range(size)
        self.num_made = 0

    def conversation(self, index: int) -> dict:
        self.num_made += 1
        return {"messages": [], "from": self.name, "number": index}


def numbers(task: Task) -> list[int]:
    return [conversation["number"] for conversation in task]


@pytest.mark.parametrize("slice_", [slice(3, 8), slice(None, None, -1), slice(-3, None), slice(2, 100, 4), slice(5, 5)])
def test_indices_and_slices_behave_like_those_of_a_list(slice_):
    task = Numbers("a", 10)
    assert numbers(task[slice_]) == list(range(10))[slice_]
    assert task.num_made == len(task[slice_]) == len(range(10)[slice_]), "only what is asked for is made"
    assert numbers(task[1:9][slice_]) == list(range(10))[1:9][slice_]
    assert task[-1]["number"] == 9
    for view, index in ((task, 10), (task, -11), (task[1:3], 2), (task[1:3], -3)):
        with pytest.raises(IndexError):
            view[index]


def test_a_slice_judges_answers_like_its_task():
    class Judge(Numbers):
        kind, baseline, purpose, has_reward = "generative", 0.1, "validation", True

        def evaluate(self, conversation, completion):
            return completion == str(conversation["number"])

        def score(self, conversation, completion):
            return {"length": len(completion)}

        def reward(self, conversation, completion):
            return 0.5

        def letters(self, conversation):
            return ("x",)

    part = Judge("judge", 9)[4:]
    assert (part.name, part.kind, part.baseline) == ("judge", "generative", 0.1)
    assert (part.purpose, part.has_reward) == ("validation", True)
    assert part.evaluate(part[0], "4")
    assert part.evaluate_many([(part[0], "4"), (part[1], "4")]) == [True, False]
    assert part.score(part[0], "four") == {"length": 4}
    assert part.reward(part[0], "4") == 0.5
    assert part.letters(part[0]) == ("x",)


@given(st.lists(st.integers(0, 30), max_size=5), st.integers(0, 3))
def test_a_mixture_holds_every_conversation_exactly_once(sizes, seed):
    mixture = TaskMixture([Numbers(str(i), size) for i, size in enumerate(sizes)], seed=seed)
    found = sorted((int(c["from"]), c["number"]) for c in mixture)
    assert found == [(i, number) for i, size in enumerate(sizes) for number in range(size)]


def test_a_mixture_interleaves_and_gives_a_repeated_task_twice():
    a, b = Numbers("a", 50), Numbers("b", 50)
    names = [c["from"] for c in TaskMixture([a, b, a])]
    assert names.count("a") == 100
    assert sum(1 for _ in itertools.groupby(names)) > 40
    task, index = TaskMixture([a, b]).locate(7)
    assert TaskMixture([a, b])[7] == task[index]


def test_the_order_of_a_mixture_depends_on_its_seed_only():
    def order(seed):
        return [(c["from"], c["number"]) for c in TaskMixture([Numbers("a", 40), Numbers("b", 9)], seed=seed)]

    random.seed(1)
    state, first = random.getstate(), order(5)
    assert random.getstate() == state
    random.seed(2)
    assert first == order(5) != order(6)
    # fixed for good: a checkpoint that goes on in the middle of an epoch depends on it
    assert numbers(TaskMixture([Numbers("a", 10)], seed=0)) == [7, 8, 1, 5, 3, 4, 2, 0, 9, 6]


def test_a_task_to_train_on_cannot_be_examined():
    task = Numbers("a", 1)
    for judge in (task.evaluate, task.reward):
        with pytest.raises(AssertionError):
            judge({}, "")
    assert task.score({}, "") == {}


def test_importing_the_tasks_prints_nothing_and_does_not_load_the_datasets_library():
    code = "import sys, tasks.registry, tasks.smoltalk, tasks.identity; assert 'datasets' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == done.stderr == ""


def test_multiple_choice_text_is_as_documented():
    text = render_choices(" What do bees make? ", ["wax and honey", "silk\n"], "AB")
    lines = ["Multiple choice: What do bees make?", "- wax and honey [A]", "- silk [B]"]
    assert text.split("\n") == [*lines, "Answer with the letter of the right choice."]
    assert text in (render_choices.__doc__ or "").replace("\n        ", "\n")


@pytest.mark.parametrize("letters", ["ABCDE", "12345"])
def test_a_letter_is_one_token_and_the_same_in_question_and_answer(tokenizer, letters):
    choices = ["tea", "x = y", "(a, b)", "50 %", "“so”"]
    text = render_choices("Which?", choices, letters)
    ids = tokenizer.encode(text)
    for letter, choice in zip(letters, choices, strict=True):
        (answer_id,) = tokenizer.encode(letter)
        before = tokenizer.encode(text[: text.index(f"- {choice} [") + len(f"- {choice} [")])
        assert ids[: len(before)] == before, "the text up to the letter ends in a token of its own"
        assert ids[len(before)] == answer_id


def test_a_letter_stays_alone_when_the_vocabulary_was_trained_on_nothing_else():
    """Even with " A", "=A" and "[A]" as frequent as can be, no token joins the letter and the bracket."""
    from nanochat.tokenizer import MIN_VOCAB_SIZE, Tokenizer

    texts = [" A B x=A x=B [A] [B] (A) - A\nA\n- tea [A]\n- milk [B]\n"] * 50
    tokenizer = Tokenizer.train(texts, MIN_VOCAB_SIZE + 40)
    assert len(tokenizer.encode(" A")) == 1, "a joined token exists, so the test can fail"
    (answer_id,) = tokenizer.encode("A")
    assert tokenizer.encode("- tea [A]\n").count(answer_id) == 1
    assert tokenizer.encode("- tea=A\n").count(answer_id) == 0


def test_categorical_answers_are_right_only_when_they_are_the_letter():
    class Choice(Numbers):
        kind = "categorical"

    task = Choice("choice", 1)
    conversation = choice_conversation("Q?", ["x", "y"], ("A", "B"), "B", subject="tea")
    assert conversation["subject"] == "tea"
    assert task.letters(conversation) == ("A", "B")
    assert task.evaluate(conversation, "B")
    assert task.evaluate(conversation, [{"type": "text", "text": "B\n"}])
    for wrong in ("A", "", "b", "BB", "B."):
        assert not task.evaluate(conversation, wrong)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so 72.", 72), ("10.0", 10), ("1,000", 1000), ("12,345,678.50", Fraction(2469135700, 200)), ("50%", 50),
        ("$5", 5), ("-$5", -5), ("$-5", -5), ("$1,234.50!", Fraction(2469, 2)), (".5", Fraction(1, 2)), ("1,00", 0),
        ("-3", -3), ("−3", -3), ("x=-3", -3), ("8-3", 3), ("8 - 3", 3), ("(8)-3", 3), ("10-12 of them", 12),
        ("- 4 apples", 4), ("2 of 1,2", 2), ("in 1999,", 1999), ("#### 7\n\nanything", 7),
        ("none at all", None), ("", None), ("$", None), ("٣", None), ("9" * 5000, None),
    ],
)  # fmt: skip
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("so\n#### 72", 72), ("####72.0\n", 72), ("a\n#### $1,000", 1000), ("#### -5", -5), ("#### 40%", 40),
        ("#### 40.", 40), ("#### 72 apples", None), ("#### 72\nThat is all.", None), ("72", None),
        ("so #### 72", None), ("####", None), ("##### 5", None), ("#### 5 6", None), ("", None),
    ],
)  # fmt: skip
def test_a_marked_number_has_the_last_line_to_itself(text, value):
    assert marked_number(text) == value


@given(st.decimals(-(10**9), 10**9, places=2), st.sampled_from(["{}", "{} cats", "It is {}.", "#### {}", "({})"]))
def test_numbers_are_compared_by_value_however_they_are_written(number, template):
    for form in (f"{number}", f"{number:,}", f"{number:f}", f"{number:,}00"):
        assert last_number(template.format(form)) == Fraction(number)


@given(st.text())
def test_no_text_makes_the_search_for_numbers_fail(text):
    last_number(text)
    marked_number("####" + text)
