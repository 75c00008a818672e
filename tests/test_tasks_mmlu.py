import pytest
from hub_fixtures import mmlu_row, serve_rows

from nanochat.common import UserError
from tasks import mmlu
from tasks.mmlu import MMLU, NUM_SUBJECTS

SUBJECTS = [f"subject {i}" for i in range(NUM_SUBJECTS)]


@pytest.fixture
def asked(monkeypatch):
    rows = [mmlu_row(subject, i % 4, number=i) for i, subject in enumerate(SUBJECTS * 2)]
    training = [mmlu_row("", 3, number=1000), mmlu_row("", 0, number=1001)]
    tables = {(mmlu.REPO, "all", "test"): rows, (mmlu.REPO, "all", "auxiliary_train"): training}
    monkeypatch.setitem(mmlu.NUM_ROWS, ("all", "test"), len(rows))
    monkeypatch.setitem(mmlu.NUM_ROWS, ("all", "dev"), len(rows) - 1)
    return serve_rows(monkeypatch, tables | {(mmlu.REPO, "all", "dev"): rows[1:57] + rows[58:] + rows[58:59]})


def test_answers_are_the_letters_of_the_right_choices(asked):
    task = MMLU("all", "test")
    assert len(task) == 114
    for i, conversation in enumerate(task):
        assert conversation["messages"][-1]["content"] == "ABCD"[i % 4]
        assert f"- choice {i % 4} of {i} [{'ABCD'[i % 4]}]\n" in conversation["messages"][0]["content"]
        assert conversation["subject"] == SUBJECTS[i % 57]


def test_a_split_that_lacks_a_subject_is_not_taken_for_mmlu(asked):
    with pytest.raises(UserError, match="has 56 subjects instead of 57"):
        len(MMLU("all", "dev"))


def test_training_questions_come_from_the_auxiliary_split_and_from_no_other(asked):
    task = MMLU("auxiliary_train", "train")
    assert [c["messages"][-1]["content"] for c in task] == ["D", "A"]
    assert asked == [(mmlu.REPO, "all", "auxiliary_train")]
    purposes = {key: MMLU(*key).purpose for key in mmlu.NUM_ROWS}
    assert [key for key, purpose in purposes.items() if purpose == "train"] == [("auxiliary_train", "train")]
    assert [key for key, purpose in purposes.items() if purpose == "test"] == [("all", "test")]


def test_an_answer_that_is_no_choice_is_an_error_with_the_row(monkeypatch):
    serve_rows(monkeypatch, {(mmlu.REPO, "all", "auxiliary_train"): [mmlu_row("", 4)]})
    with pytest.raises(UserError, match="row 0, there are 4 choices and the answer is number 4"):
        MMLU("auxiliary_train", "train")[0]
