import json

import pytest

from nanochat.common import UserError
from tasks.custom_json import CustomJSON

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\u2028you \U0001f642"}]
PARTS = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]


@pytest.fixture
def write(tmp_path):
    def write(*lines: str, encoding: str = "utf-8") -> CustomJSON:
        path = tmp_path / "mine.jsonl"
        path.write_bytes("\n".join(lines).encode(encoding))
        return CustomJSON(path)

    return write


def test_lines_are_objects_or_bare_lists(write):
    with_parts = [TURNS[0], {"role": "assistant", "content": PARTS}]
    lines = [json.dumps({"messages": TURNS, "source": "here"}), "", json.dumps(with_parts)]
    task = write(*lines, json.dumps(TURNS, ensure_ascii=False))
    assert list(task) == [{"messages": TURNS}, {"messages": with_parts}, {"messages": TURNS}]
    assert (task.name, task.kind, task.purpose) == ("mine", None, "train")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(write):
    assert list(write(json.dumps(TURNS) + "\r", json.dumps(TURNS), encoding="utf-8-sig")) == [{"messages": TURNS}] * 2


def test_the_file_is_read_at_the_first_use_and_conversations_may_be_changed(tmp_path):
    path = tmp_path / "later.jsonl"
    task = CustomJSON(path)
    path.write_text(json.dumps(TURNS))
    assert len(task) == 1
    path.unlink()
    task[0]["messages"].clear()
    assert task[0]["messages"] == TURNS


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "is not JSON"), ("3", "a conversation must be"), ("[]", "at least one message"),
        ('{"message": []}', "a conversation must be"), ("[" * 100_000, "is not JSON"), ("9" * 5000, "is not JSON"),
        (json.dumps(TURNS[:1]), "the last message must be the assistant's"),
        (json.dumps(TURNS[1:]), "message 1 must have the role 'user'"),
        (json.dumps([TURNS[0], {"role": "bot", "content": ""}]), "message 2 has the role 'bot'"),
        (json.dumps([TURNS[0], {"role": "assistant", "content": [{"type": "image"}]}]), "message 2 has the part"),
        (json.dumps([TURNS[0], {"role": "assistant", "content": "\ud800"}]), "not valid Unicode"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_conversation_is_named(write, line, fault):
    with pytest.raises(UserError, match=rf"mine\.jsonl, line 3.*{fault}"):
        len(write(json.dumps(TURNS), "", line))


def test_files_that_cannot_be_read_are_named(write, tmp_path):
    for task, fault in (
        (write("", " "), "holds no conversations"), (CustomJSON(tmp_path), "cannot read"),
        (CustomJSON(tmp_path / "nowhere.jsonl"), r"nowhere\.jsonl .*check the path"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=fault):
            len(task)
    with pytest.raises(UserError, match="not UTF-8"):
        len(write(json.dumps("é", ensure_ascii=False), encoding="latin-1"))


NUMBER = "It is 1,000.\n#### 1,000"


@pytest.mark.parametrize(
    ("reference", "said", "reward"),
    [
        (NUMBER, "#### 1000.0", 1.0), (NUMBER, "1000", 0.0), (NUMBER, "#### 1001", 0.0),  # the mark must be there too
        ("Paris", " paris\n", 1.0), ("New  York", "new york", 1.0), ("Paris", "Paris.", 0.0), ("Paris", "", 0.0),
        (PARTS, "2", 1.0), (PARTS, PARTS, 1.0),  # tool calls do not count on either side
    ],
)  # fmt: skip
def test_the_reward_is_for_agreeing_with_the_last_answer(write, reference, said, reward):
    task = write(json.dumps([*TURNS, TURNS[0], {"role": "assistant", "content": reference}]))
    assert task.has_reward
    assert task.reward(task[0], said) == reward
    assert task.reward(task[0], said if said is PARTS else [{"type": "text", "text": said}]) == reward
