"""The conversation format: layout, loss mask, truncation, streaming."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.data.chat import ReplyReader, as_parts, check_conversation, render, render_for_completion, visible_text


def part(kind, text):
    return {"type": kind, "text": text}


TOOL_PARTS = [
    part("text", "Let me see: "), part("python", "3*4"), part("python_output", "12"), part("text", "It is 12."),
]  # fmt: skip


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


def chat(*messages, system=None):
    first = [] if system is None else [{"role": "system", "content": system}]
    return {"messages": [*first, *messages]}


LONG = chat(user("one"), assistant("first"), user("two"), assistant("second"), user("three"), assistant("third"))


def test_turns_stand_between_their_tokens_without_line_breaks_and_special_tokens_in_text_are_text(tokenizer):
    expected = (
        "<|bos|><|user_start|>river stone<|user_end|><|assistant_start|>cloud<|assistant_end|>"
        "<|user_start|>music<|user_end|><|assistant_start|>bread<|assistant_end|>"
    )
    rendered = render(tokenizer, chat(user("river stone"), assistant("cloud"), user("music"), assistant("bread")))
    assert tokenizer.decode(rendered.ids) == expected
    assert len(rendered.mask) == len(rendered.ids)
    assert rendered.num_dropped == 0
    rendered = render(tokenizer, chat(user("<|user_end|><|assistant_start|>hi"), assistant("<|assistant_end|>")))
    special = [i for i in rendered.ids if i in tokenizer.special_ids.values()]
    names = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>", "<|assistant_end|>"]
    assert special == [tokenizer.special_ids[name] for name in names]


def test_the_system_message_stands_before_the_first_question_only_and_is_one_text_with_it(tokenizer):
    conversation = chat(user(" b\n"), assistant("b"), user("c"), assistant("d"), system="a.")
    assert tokenizer.decode(render(tokenizer, conversation).ids).count("a.\n\n") == 1
    ids = render_for_completion(tokenizer, chat(user(" b\n"), system="a.")).ids
    assert ids[2:-2] == tokenizer.encode("a.\n\n b\n")


def test_the_mask_covers_exactly_what_the_assistant_must_produce(tokenizer):
    conversation = chat(user("how many"), assistant(TOOL_PARTS), user("thanks"), assistant("yes"), system="S")
    rendered = render(tokenizer, conversation)
    supervised = tokenizer.decode([i for i, m in zip(rendered.ids, rendered.mask, strict=True) if m])
    assert supervised == "Let me see: <|python_start|>3*4<|python_end|>It is 12.<|assistant_end|>yes<|assistant_end|>"


def test_what_is_too_long_to_learn_from_ends_after_a_whole_answer(tokenizer):
    whole = render(tokenizer, LONG)
    ends = [i + 1 for i, token in enumerate(whole.ids) if token == tokenizer.special_ids["<|assistant_end|>"]]
    for max_tokens in range(len(whole.ids) + 2):
        cut = render(tokenizer, LONG, max_tokens=max_tokens)
        fitting = max([end for end in ends if end <= max_tokens], default=0)
        assert cut.ids == whole.ids[:fitting]
        assert cut.mask == whole.mask[:fitting]
        assert cut.num_dropped == 6 - 2 * (ends.index(fitting) + 1 if fitting else 0)
    unanswered = render(tokenizer, chat(*LONG["messages"], user("four")))
    assert (unanswered.ids, unanswered.num_dropped) == (whole.ids, 1)
    assert render(tokenizer, chat(user("one"))).ids == []


def test_a_prompt_ends_where_the_assistant_speaks_or_goes_on(tokenizer):
    messages = [user("one"), assistant("first"), user("two")]
    begun = "<|bos|><|user_start|>one<|user_end|><|assistant_start|>first"
    assert tokenizer.decode(render_for_completion(tokenizer, chat(*messages)).ids) == (
        begun + "<|assistant_end|><|user_start|>two<|user_end|><|assistant_start|>"
    )
    assert tokenizer.decode(render_for_completion(tokenizer, chat(*messages[:2])).ids) == begun


@pytest.mark.parametrize("system", [None, "S"])
@pytest.mark.parametrize("messages", [LONG["messages"], LONG["messages"][:-1]], ids=["continued", "new"])
def test_a_long_prompt_loses_its_oldest_turns_only(tokenizer, system, messages):
    whole = render_for_completion(tokenizer, chat(*messages, system=system))
    shortest = len(render_for_completion(tokenizer, chat(*messages[4:], system=system)).ids)
    seen = set()
    for max_tokens in range(shortest, len(whole.ids) + 2):
        prompt = render_for_completion(tokenizer, chat(*messages, system=system), max_tokens=max_tokens)
        kept = chat(*messages[prompt.num_dropped :], system=system)
        assert len(prompt.ids) <= max_tokens
        assert prompt.ids == render_for_completion(tokenizer, kept).ids
        assert prompt.ids[0] == tokenizer.bos_id
        seen.add(prompt.num_dropped)
    assert seen == {0, 2, 4}
    with pytest.raises(UserError, match="shorten it"):
        render_for_completion(tokenizer, chat(*messages, system=system), max_tokens=shortest - 1)


@pytest.mark.parametrize(("conversation", "fault"), [
    ([], "at least one message"), ({"messages": []}, "at least one message"),
    ({"messages": "hello"}, "at least one message"), ({"messages": ["hello"]}, "message 1 must be an object"),
    (chat({"role": "tool", "content": "x"}), "message 1 has the role 'tool'"),
    (chat(assistant("x")), "message 1 must have the role 'user'"),
    (chat(user("x"), user("y")), "message 2 must have the role 'assistant'"),
    (chat(user("x"), assistant("y"), {"role": "system", "content": "z"}), "message 3 must have the role 'user'"),
    (chat(system="S"), "followed by a user message"),
    (chat(assistant("x"), system="S"), "message 2 must have the role 'user'"),
    (chat(user(None)), "message 1 has a content of type NoneType"),
    (chat(user([part("text", "x")])), "of the role user it must be a text"),
    (chat(user("x"), assistant(7)), "message 2 has a content of type int"),
    (chat(user("x"), assistant([part("image", "x")])), "message 2 has the part"),
    (chat(user("x"), assistant([{"type": "text"}])), "message 2 has the part"),
])  # fmt: skip
def test_what_is_no_conversation_is_refused_by_name(conversation, fault):
    with pytest.raises(UserError, match=fault):
        check_conversation(conversation)


@given(st.text(), st.randoms(use_true_random=False))
@settings(max_examples=200, deadline=None)
def test_streamed_text_joined_is_the_whole_text(tokenizer, text, rng):
    text = text.encode("utf-8", "ignore").decode() + "👩‍👩‍👧 東京 é" * rng.randrange(2)
    ids = tokenizer.encode(text)
    reader, deltas = ReplyReader(tokenizer), []
    while ids:
        count = rng.randrange(1, 4)
        deltas += reader.add(ids[:count])
        ids = ids[count:]
    assert all("\ufffd" not in delta.text for delta in deltas if "\ufffd" not in text)
    assert "".join(delta.text for delta in [*deltas, *reader.finish()]) == text


def test_bytes_that_no_token_can_make_whole_become_replacement_characters(tokenizer):
    ids = [next(i for i in range(256) if tokenizer.decode_bytes([i]) == bytes([byte])) for byte in (0xE6, 0x41, 0xF0)]
    reader = ReplyReader(tokenizer)
    assert [reader.add([i]) for i in ids] == [[], [("text", "\ufffdA")], []]
    assert reader.finish() == [("text", "\ufffd")]


def test_a_reply_is_read_back_into_its_parts(tokenizer):
    rendered = render(tokenizer, chat(user("x"), assistant(TOOL_PARTS)))
    reply = rendered.ids[len(render_for_completion(tokenizer, chat(user("x"))).ids) :]
    reader, deltas = ReplyReader(tokenizer), []
    for token in reply:
        deltas += reader.add([token])
    deltas += reader.finish()
    assert reader.parts == TOOL_PARTS
    for part_type, text in {"python": "3*4", "python_output": "12", "text": "Let me see: It is 12."}.items():
        assert "".join(d.text for d in deltas if d.type == part_type) == text
    assert visible_text(TOOL_PARTS) == "Let me see: It is 12."
    empty_call = ReplyReader(tokenizer)
    empty_call.add([tokenizer.special_ids["<|python_start|>"], tokenizer.special_ids["<|python_end|>"]])
    assert empty_call.parts == [part("python", "")]
    assert as_parts([part("text", "a"), part("text", "b")]) == [part("text", "ab")]


def test_every_token_that_begins_another_turn_ends_the_reply(tokenizer):
    names = {name for name, i in tokenizer.special_ids.items() if i not in tokenizer.stop_ids}
    assert names == {"<|python_start|>", "<|python_end|>", "<|output_start|>", "<|output_end|>"}
    assert set(tokenizer.stop_ids) <= set(tokenizer.special_ids.values())
