import pytest
from hub_fixtures import mmlu_row, serve_rows

from nanochat.common import UserError
from tasks import mmlu
from tasks.mmlu import MMLU, NUM_SUBJECTS, StandardMMLU

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


def test_the_standard_prompt_names_the_subject_and_has_its_first_five_dev_questions(monkeypatch):
    dev = [mmlu_row(f"{subject}_law", i % 4, number=i) for i, subject in enumerate(SUBJECTS * 6)]
    test = [mmlu_row(f"{subject}_law", 2, number=i) for i, subject in enumerate(SUBJECTS)]
    serve_rows(monkeypatch, {(mmlu.REPO, "all", "test"): test, (mmlu.REPO, "all", "dev"): dev})
    monkeypatch.setattr(mmlu, "NUM_ROWS", {("all", "test"): len(test), ("all", "dev"): len(dev)})
    problem = StandardMMLU()[3]
    assert problem["intro"] == "The following are multiple choice questions (with answers) about subject 3 law.\n\n"
    lines = "A. choice 0 of {0}\nB. choice 1 of {0}\nC. choice 2 of {0}\nD. choice 3 of {0}\nAnswer:"
    asked = [("Question {0}?\n" + lines).format(number) for number in range(3, len(dev), NUM_SUBJECTS)]
    assert problem["messages"][0]["content"] == asked[0]
    assert problem["shots"] == tuple(f"{one} {letter}\n\n" for one, letter in zip(asked, "DABCD", strict=False))
    assert (problem["letters"], problem["options"]) == (tuple("ABCD"), [" A", " B", " C", " D"])


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
