import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from nanochat.data.chat import check_conversation, visible_text
from nanochat.serve.messages import Messages, ignored_fields, join_turns
from nanochat.serve.schema import ChatRequest

USER, CALL = {"role": "user", "content": "Q"}, {"type": "python", "text": "1+1"}


def said(role, content):
    return {"role": role, "content": content}


def joined(*sent):
    """Role and content of each message that the model sees."""
    turns = join_turns(TypeAdapter(Messages).validate_python(list(sent)))
    return [(message["role"], message["content"]) for message in turns.messages]


roles = st.sampled_from(["system", "developer", "user", "assistant"])


@given(st.lists(roles, min_size=1, max_size=12))
def test_messages_in_any_order_become_a_conversation_and_nothing_is_lost(order):
    sent = [said(role, f"<{number}>") for number, role in enumerate(order)]
    turns = join_turns(TypeAdapter(Messages).validate_python(sent))
    messages = check_conversation(turns.conversation)
    texts = "".join(message["content"] for message in messages)
    assert sorted(texts.replace("\n", "").strip("<>").split("><")) == sorted(str(i) for i in range(len(order)))
    others = [message for message in messages if message["role"] != "system"]
    assert [message["content"].count("<") for message in others] == turns.sizes
    assert (messages[-1]["role"] == "assistant") == (order[-1] == "assistant")  # what is asked for stays the same


@pytest.mark.parametrize(
    ("sent", "expected"),
    [
        ([USER, said("user", ""), USER], [("user", "Q\n\nQ")]),
        ([said("system", "A"), USER, said("developer", "B")], [("system", "A\n\nB"), ("user", "Q")]),
        ([said("assistant", "Hi"), USER], [("user", ""), ("assistant", "Hi"), ("user", "Q")]),
        ([said("system", "A")], [("user", "A")]),
        ([USER, said("assistant", "R"), said("system", "Go on.")],
         [("user", "Q"), ("assistant", "R"), ("user", "Go on.")]),
        ([USER, {"role": "assistant"}, USER], [("user", "Q"), ("assistant", ""), ("user", "Q")]),
        ([USER, {"role": "assistant", "content": None, "refusal": "No."}], [("user", "Q"), ("assistant", "No.")]),
    ],
)  # fmt: skip
def test_each_side_speaks_in_turn(sent, expected):
    assert joined(*sent) == expected


def test_replies_in_parts_are_joined_with_their_tool_calls():
    *_, (role, parts) = joined(USER, said("assistant", "One."), said("assistant", [CALL]), said("assistant", "Two."))
    assert (role, visible_text(parts)) == ("assistant", "One.\n\n\n\nTwo.")
    assert CALL in parts


def test_fields_that_nothing_knows_are_named_once_by_their_place():
    parts = [{"type": "text", "text": "x", "cache_control": {}}] * 2
    body = {"messages": [said("user", parts) | {"id": "1"}, USER | {"id": "2"}], "user": "me",
            "stream_options": {"include_obfuscation": False}, "logit_bias": {"5": 1.0}}  # fmt: skip
    names = ["user", "stream_options.include_obfuscation", "messages.id", "messages.content.cache_control"]
    assert sorted(ignored_fields(ChatRequest.model_validate(body))) == sorted(names)
    assert ignored_fields(ChatRequest.model_validate({"messages": [USER]})) == []
