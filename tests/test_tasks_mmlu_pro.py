import pytest
from hub_fixtures import mmlu_pro_row, serve_rows

from nanochat.common import UserError
from nanochat.data.chat import check_conversation
from tasks import mmlu_pro
from tasks.mmlu_pro import MMLUPro, StandardMMLUPro

SUBJECTS = ("law", "computer science")


@pytest.fixture
def asked(monkeypatch):
    test = [mmlu_pro_row("law", 9, number=0), mmlu_pro_row("computer science", 2, num_options=4, number=1)]
    shots = [mmlu_pro_row(SUBJECTS[i % 2], i, number=10 + i, worked=True) for i in range(10)]
    monkeypatch.setattr(mmlu_pro, "NUM_ROWS", {"validation": 10, "test": 2})
    tables = {(mmlu_pro.REPO, "default", "test"): test, (mmlu_pro.REPO, "default", "validation"): shots}
    return serve_rows(monkeypatch, tables)


def test_a_question_offers_up_to_ten_letters_and_guessing_is_the_mean_of_their_chances(asked):
    task = MMLUPro("test")
    for conversation, letters, right in zip(task, ("ABCDEFGHIJ", "ABCD"), "JC", strict=True):
        check_conversation(conversation)
        assert (task.letters(conversation), conversation["messages"][-1]["content"]) == (tuple(letters), right)
        assert f"[{letters[-1]}]\n" in conversation["messages"][0]["content"]
    assert task.baseline == pytest.approx((1 / 10 + 1 / 4) / 2)
    assert (task.kind, task.purpose, MMLUPro("validation").purpose) == ("categorical", "test", "validation")
    assert asked == [(mmlu_pro.REPO, "default", "test")]


def test_the_standard_prompt_has_the_five_worked_questions_of_the_subject(asked):
    problem = StandardMMLUPro()[1]
    assert problem["intro"] == (
        "The following are multiple choice questions (with answers) about computer science. Think step by step and "
        'then finish your answer with "the answer is (X)" where X is the correct letter choice.\n'
    )
    assert len(problem["shots"]) == 5
    options = "".join(f"{letter}. choice {i} of 11\n" for i, letter in enumerate("ABCDEFGHIJ"))
    assert problem["shots"][0] == (
        f"Question:\nQuestion 11?\nOptions:\n{options}Answer: Let's think step by step. It is 1. The answer is (B).\n\n"
    )
    assert problem["messages"][0]["content"] == (
        "Question:\nQuestion 1?\nOptions:\nA. choice 0 of 1\nB. choice 1 of 1\nC. choice 2 of 1\nD. choice 3 of 1\n"
        "Answer: Let's think step by step."
    )


@pytest.mark.parametrize(
    ("said", "is_right"),
    [
        (" So the answer is (C).", True), (" answer is C", True), ("the answer is (C). No, the answer is (A).", True),
        ("the answer is (A). No, the answer is (C).", False), ("(C)", False), ("The answer is (c).", False),
        ("", False),
    ],
)  # fmt: skip
def test_the_answer_is_the_letter_that_is_first_said_to_be_it(asked, said, is_right):
    task = StandardMMLUPro()
    problem = task[1]
    assert task.evaluate(problem, problem["messages"][-1]["content"])
    assert task.evaluate(problem, said) == is_right


def test_a_wrong_row_and_an_incomplete_split_are_errors(monkeypatch):
    rows = [mmlu_pro_row("law", 1) | {"answer": "C"}]
    serve_rows(monkeypatch, {(mmlu_pro.REPO, "default", "test"): rows})
    with pytest.raises(UserError, match=r"has 1 rows at .* instead of the 12,032 it is known for"):
        len(MMLUPro("test"))
    monkeypatch.setattr(mmlu_pro, "NUM_ROWS", {"test": 1})
    with pytest.raises(UserError, match="row 0, the answer is 'C', number 1 of 10 choices"):
        MMLUPro("test")[0]
