import pytest
from hub_fixtures import gsm8k_row, serve_rows

from nanochat.common import UserError
from nanochat.data.chat import check_conversation, visible_text
from nanochat.engine.calculator import calculate
from tasks import gsm8k
from tasks.gsm8k import GSM8K, StandardGSM8K, answer_parts


@pytest.fixture
def rows(monkeypatch):
    train = [gsm8k_row(a, 4) for a in range(10)]
    test = [gsm8k_row(a, 8) for a in range(3)]
    monkeypatch.setattr(gsm8k, "NUM_ROWS", {"train": 10, "test": 3})
    monkeypatch.setattr(gsm8k, "PARTS", {"train": slice(7), "validation": slice(7, None), "test": slice(None)})
    serve_rows(monkeypatch, {(gsm8k.REPO, "main", "train"): train, (gsm8k.REPO, "main", "test"): test})
    return train, test


@pytest.mark.parametrize(
    ("call", "result"),
    [
        ("48/2=24", "24.0"), ("3*.10=.3", "0.30000000000000004"), ("1,000+1=1,001", "1001"), ("5-5=0", "0"),
        (".3-.1*3=0", "-5.551115123125783e-17"), ("1+1=3", None), ("1/3=.33", None), ("x+1=2", None),
        ("'a'+'b'=2", None), ("1/0=0", None), ("2=two", None),
    ],
)  # fmt: skip
def test_a_call_becomes_parts_with_the_tools_result_only_if_the_calculator_agrees(call, result):
    found = [(part["type"], part["text"]) for part in answer_parts(f"It is <<{call}>>so much.")]
    if result is None:
        assert found == [("text", "It is so much.")]
    else:
        tool = [("python", call.split("=")[0]), ("python_output", result)]
        assert found == [("text", "It is "), *tool, ("text", "so much.")]


def test_an_answer_without_its_calls_is_the_text_of_the_data(rows):
    conversation = GSM8K("main", "train")[3]
    check_conversation(conversation)
    assert conversation["messages"][0]["content"] == "3 pens and 4 pens, halved?"
    answer = conversation["messages"][1]["content"]
    assert visible_text(answer) == "There are 3+4 = 7 pens.\nHalf is 3.5.\n#### 3.5"
    calls = [part["text"] for part in answer if part["type"] == "python"]
    assert [part["text"] for part in answer if part["type"] == "python_output"] == [calculate(call) for call in calls]
    assert calls == ["3+4", "7/2"]


def test_training_and_validation_share_no_row_and_no_test_row(rows):
    tasks = {split: GSM8K("main", split) for split in ("train", "validation", "test")}
    questions = {split: [c["messages"][0]["content"] for c in task] for split, task in tasks.items()}
    train, test = rows
    assert questions["train"] + questions["validation"] == [row["question"] for row in train]
    assert (len(questions["train"]), len(questions["validation"])) == (7, 3)
    assert questions["test"] == [row["question"] for row in test]
    assert [task.purpose for task in tasks.values()] == list(tasks)
    for task in tasks.values():  # every reference answer is right
        for conversation in task:
            answer = conversation["messages"][-1]["content"]
            assert task.score(conversation, answer) == {"flexible": 1, "strict": 1}
            assert task.evaluate_many([(conversation, answer), (conversation, "#### 77")]) == [True, False]


def test_the_standard_prompt_has_five_worked_answers_as_they_are_in_the_data(rows):
    train, test = rows
    problem = StandardGSM8K()[1]
    assert problem["messages"][0]["content"] == "Question: 1 pens and 8 pens, halved?\nAnswer:"
    assert problem["shots"] == tuple(f"Question: {row['question']}\nAnswer: {row['answer']}\n\n" for row in train[:5])
    assert problem["messages"][-1]["content"] == test[1]["answer"]


@pytest.mark.parametrize(
    ("completion", "strict", "flexible"),
    [
        ("#### 1,450.", 1, 1), ("so #### 1450 and #### 7", 1, 0), ("It is $1,450.", 0, 1), ("#### $1450", 0, 1),
        ("#### 1450.00", 0, 0), ("#### 7\nor 1450", 0, 1), ("", 0, 0), ("none", 0, 0),
    ],
)  # fmt: skip
def test_standard_answers_are_compared_as_texts(rows, completion, strict, flexible):
    task = StandardGSM8K()
    problem = task[0]
    problem["messages"][-1]["content"] = "It is <<1000+450=1450>>1450.\n#### 1,450"
    assert task.score(problem, completion) == {"strict": strict, "flexible": flexible}
    assert task.evaluate(problem, completion) == strict


def test_the_real_split_points():
    assert gsm8k.NUM_ROWS == {"train": 7473, "test": 1319}
    assert {"train": slice(7000), "validation": slice(7000, None), "test": slice(None)} == gsm8k.PARTS


@pytest.mark.parametrize(
    ("completion", "flexible", "strict"),
    [
        ("Half is 6.\n#### 6", 1, 1), ("#### 6.0", 1, 1), ("#### $6", 1, 1), ("#### 06", 1, 1), ("It is 6.", 1, 0),
        ("It is 6 pens, not more", 1, 0), ("#### 6 pens", 1, 0), ("#### 6\nIs that right?", 1, 0), ("#### 7", 0, 0),
        ("6\n#### 7", 0, 0), ("#### 6\n#### 7", 0, 0), ("", 0, 0), ("six", 0, 0),
    ],
)  # fmt: skip
def test_answers_count_by_value_with_a_strict_score_beside_the_flexible_one(rows, completion, flexible, strict):
    task = GSM8K("main", "test")
    question = task[1]
    question["messages"][-1]["content"] = "Half is 6.\n#### 6"
    assert task.evaluate(question, completion) == bool(flexible)
    assert task.score(question, completion) == {"flexible": flexible, "strict": strict}
    assert task.reward(question, completion) == strict


def test_numbers_in_tool_calls_are_no_answer(rows):
    task = GSM8K("main", "test")
    parts = [{"type": "python", "text": "9/2"}, {"type": "python_output", "text": "4.5"}]
    assert not task.evaluate(task[1], parts)
    assert task.evaluate(task[1], [*parts, {"type": "text", "text": "#### 4.50"}])


def test_an_answer_without_a_number_at_its_end_is_an_error_with_the_row(monkeypatch, rows):
    serve_rows(monkeypatch, {(gsm8k.REPO, "main", "train"): [gsm8k_row(1, 2)] * 9 + [{"question": "?", "answer": "5"}]})
    with pytest.raises(UserError, match="row 9, the answer does not end with #### and a number"):
        GSM8K("main", "validation")[2]
