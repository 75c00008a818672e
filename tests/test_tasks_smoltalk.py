import pytest
from hub_fixtures import serve_rows

from nanochat.common import UserError
from tasks import smoltalk
from tasks.smoltalk import SmolTalk

TURNS = [
    {"content": "Be kind.", "role": "system"},
    {"content": "Hello", "role": "user"},
    {"content": "Hi!", "role": "assistant"},
]


def serve(monkeypatch, *conversations, split="train"):
    rows = [{"messages": messages, "source": "here"} for messages in conversations]
    serve_rows(monkeypatch, {(smoltalk.REPO, "default", split): rows})


def test_conversations_are_those_of_the_rows(monkeypatch):
    serve(monkeypatch, TURNS, TURNS[1:])
    task = SmolTalk("train")
    assert list(task) == [{"messages": TURNS}, {"messages": TURNS[1:]}]
    assert (task.kind, task.purpose, SmolTalk("test").purpose) == (None, "train", "validation")


@pytest.mark.parametrize("messages", [[*TURNS[1:], TURNS[2]], [TURNS[2]], TURNS[:1]])
def test_turns_out_of_order_are_an_error_with_the_row(monkeypatch, messages):
    serve(monkeypatch, TURNS, messages, split="test")
    with pytest.raises(UserError, match=r"smol-smoltalk \(default, test\) .* in row 1, "):
        SmolTalk("test")[1]
