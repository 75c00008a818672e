"""Each published format of chat data becomes the same conversation; a row that cannot be learned from is refused."""

import pytest

from nanochat.common import UserError
from tasks.formats import read_row

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
ASKED = [{"role": "system", "content": "Be kind"}, *TURNS]
CALL = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]
CALLING = [TURNS[0], {"role": "assistant", "content": CALL}]
SHARED = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
TEXT_PARTS = [{"type": "text", "text": "H"}, {"type": "input_text", "text": "i"}]


@pytest.mark.parametrize(
    ("row", "name", "messages"),
    [
        ({"messages": TURNS, "id": 7}, "OpenAI", TURNS), (TURNS, "OpenAI", TURNS),
        ({"messages": ASKED}, "OpenAI", ASKED),
        ({"messages": [{"role": "developer", "content": "Be kind"}, *TURNS]}, "OpenAI", ASKED),
        ([{**TURNS[0], "name": "Ann"}, {**TURNS[1], "tool_calls": None, "weight": 1}], "OpenAI", TURNS),
        ([{"role": "user", "content": TEXT_PARTS}, {"role": "assistant", "content": TEXT_PARTS}], "OpenAI",
         [{"role": "user", "content": "H\ni"}, {"role": "assistant", "content": "Hi"}]),
        (CALLING, "OpenAI", CALLING),
        ({"messages": [{"role": "system", "content": " "}, *TURNS]}, "OpenAI", TURNS),
        ({"conversations": SHARED}, "ShareGPT", TURNS),
        ({"messages": None, "conversations": SHARED}, "ShareGPT", TURNS),
        ({"conversation": TURNS}, "OpenAI", TURNS), ({"conversations": SHARED, "system": "Be kind"}, "ShareGPT", ASKED),
        ({"conversations": SHARED, "system": ""}, "ShareGPT", TURNS),
        ({"conversations": [{"from": "system", "value": "Be kind"}, *SHARED]}, "ShareGPT", ASKED),
        ({"conversations": [{"from": " User", "value": "Hi"}, {"from": "Model", "value": "Hello"}]}, "ShareGPT", TURNS),
        ({"instruction": "Hi", "input": "", "output": "Hello", "text": "..."}, "Alpaca", TURNS),
        ({"instruction": "Hi", "output": "Hello", "system": "Be kind"}, "Alpaca", ASKED),
        ({"instruction": "Add", "input": "1, 2", "output": "3", "history": [["Hi", "Hello"]]}, "Alpaca",
         [*TURNS, {"role": "user", "content": "Add\n\n1, 2"}, {"role": "assistant", "content": "3"}]),
    ],
)  # fmt: skip
def test_every_format_gives_the_conversation(row, name, messages):
    assert read_row(row) == (name, {"messages": messages})


def said(role, content="x", **more):
    return {"messages": [TURNS[0], {"role": role, "content": content, **more}]}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "must be a list of messages, not of type int"), ("Hi", "not of type str"), ([], "at least one message"),
        ({"text": "Hi"}, "must have messages .*; this has text"), ({}, "this has no columns"),
        ({"instruction": "Hi"}, "this has instruction"), ({"messages": "Hi"}, "a list of messages, not of type str"),
        ({"messages": [TURNS[0], "Hello"]}, "message 2 must be an object with role and content, not of type str"),
        (said("bot"), "message 2 has the role 'bot'; known are system"), (said(None), "message 2 has no role"),
        ({"messages": [{"content": "Hi"}, TURNS[1]]}, "message 1 has no role"),
        (said("tool"), r"message 2 belongs to a tool call \(tool\)"),
        ({"conversations": [SHARED[0], {"from": "function_call", "value": "{}"}]}, r"a tool call \(function_call\)"),
        (said("assistant", None, tool_calls=[{"id": "1"}]), r"message 2 belongs to a tool call \(tool_calls\)"),
        (said("assistant", None), "message 2 has no content"),
        (said("assistant", 5), "message 2 has a content of type int, not a text"),
        (said("assistant", " \n"), "message 2 is empty"), (said("assistant", weight=0), "message 2 has the weight 0"),
        (said("assistant", [{"type": "image_url", "image_url": {}}]), "message 2 has a part of type 'image_url'"),
        (said("assistant", ["x"]), "a part of type 'str'"), (said("assistant", [{"type": "text"}]), "without a text"),
        ([{"role": "user", "content": CALL}, TURNS[1]], "message 1 has a part of type 'python'"),
        ({"messages": TURNS[1:]}, "message 1 must have the role 'user'"), (TURNS[:1], "last message must be the"),
        ({"conversations": SHARED[::-1]}, "message 1 must have the role 'user'"),
        ({"messages": [TURNS[0], TURNS[0], TURNS[1]]}, "message 2 must have the role 'assistant'"),
        ({"conversations": SHARED, "system": 1}, "system is of type int"),
        ({"instruction": "Hi", "output": ""}, "a text of the assistant is empty"),
        ({"instruction": "", "input": " ", "output": "x"}, "a text of the user is empty"),
        ({"instruction": "Hi", "output": 3}, "output is of type int, not a text"),
        ({"instruction": "Hi", "output": "x", "history": ["Hi"]}, "history must be a list of pairs"),
    ],
)  # fmt: skip
def test_a_row_that_cannot_be_learned_from_is_refused_with_the_reason(row, reason):
    with pytest.raises(UserError, match=reason) as refusal:
        read_row(row)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 200
