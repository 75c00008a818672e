import pytest
from hub_fixtures import arc_row, serve_rows

from nanochat.common import UserError
from tasks import arc
from tasks.arc import ARC, StandardARC


@pytest.fixture
def task(monkeypatch):
    rows = [arc_row("ABCD", "C", number=0), arc_row("1234", "4", number=1), arc_row("ABC", "A", number=2)]
    rows.append(arc_row("ABCDE", "E", number=3))
    serve_rows(monkeypatch, {(arc.REPO, "ARC-Easy", "validation"): rows})
    monkeypatch.setitem(arc.NUM_ROWS, ("ARC-Easy", "validation"), len(rows))
    return ARC("ARC-Easy", "validation")


def test_questions_keep_the_labels_they_have_and_only_the_right_one_is_right(task):
    assert [task.letters(c) for c in task] == [tuple("ABCD"), tuple("1234"), tuple("ABC"), tuple("ABCDE")]
    assert [c["messages"][-1]["content"] for c in task] == ["C", "4", "A", "E"]
    assert task[1]["messages"][0]["content"] == (
        "Multiple choice: Question 1?\n- choice 1 of 1 [1]\n- choice 2 of 1 [2]\n- choice 3 of 1 [3]\n"
        "- choice 4 of 1 [4]\nAnswer with the letter of the right choice."
    )
    for conversation, right in zip(task, "C4AE", strict=True):
        letters = task.letters(conversation)
        assert [task.evaluate(conversation, letter) for letter in letters] == [letter == right for letter in letters]


def test_a_task_says_what_its_rows_are_for(task):
    assert (task.name, task.kind, task.purpose, task.baseline) == ("ARC-Easy", "categorical", "validation", 0.25)
    assert ARC("ARC-Challenge", "test").purpose == "test"
    assert ARC("ARC-Challenge", "train").purpose == "train"


@pytest.mark.parametrize(("labels", "answer"), [("ABCD", "E"), ("ABCA", "A"), ("ABXY", "A"), ("1234", "A")])
def test_labels_that_do_not_fit_are_an_error_with_the_row(monkeypatch, labels, answer):
    serve_rows(monkeypatch, {(arc.REPO, "ARC-Easy", "train"): [arc_row(labels, answer)]})
    with pytest.raises(UserError, match="in row 0, "):
        ARC("ARC-Easy", "train")[0]


def test_the_standard_prompt_scores_the_choices_and_hides_them(monkeypatch):
    train = [arc_row("ABCD", "B", number=i) for i in range(30)]
    key = (arc.REPO, "ARC-Challenge")
    serve_rows(monkeypatch, {(*key, "test"): [arc_row("123", "3", number=99)], (*key, "train"): train})
    monkeypatch.setattr(arc, "NUM_ROWS", {("ARC-Challenge", "test"): 1, ("ARC-Challenge", "train"): 30})
    task = StandardARC("ARC-Challenge")
    problem = task[0]
    assert problem["messages"][0]["content"] == "Question: Question 99?\nAnswer:"
    assert problem["options"] == [" choice 1 of 99", " choice 2 of 99", " choice 3 of 99"]
    assert problem["shots"] == tuple(f"Question: Question {i}?\nAnswer: choice B of {i}\n\n" for i in range(25))
    assert [task.evaluate(problem, letter) for letter in task.letters(problem)] == [False, False, True]
    assert task.by_length
    arc.NUM_ROWS["ARC-Challenge", "train"] = 31  # a warning where it is for training
    with pytest.raises(UserError, match=r"has 30 rows at .* instead of the 31"):
        StandardARC("ARC-Challenge")[0]


@pytest.mark.parametrize(("subset", "split"), [("ARC-Hard", "test"), ("ARC-Easy", "dev")])
def test_unknown_subsets_and_splits_are_refused_at_once(subset, split):
    with pytest.raises(AssertionError):
        ARC(subset, split)
