"""The official `openai` client against the server: what it sends is understood, and it understands what it gets."""

import openai
import pytest
from live_server import MODEL, live_server

KEY = "a-key-for-the-tests"


@pytest.fixture(scope="module")
def server(tokenizer, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "ui.html"
    with live_server(tokenizer, page, api_key=KEY, max_queue=16) as server:
        yield server


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def user(text):
    return [{"role": "user", "content": text}]


def chat(client, text, **options):
    return client.chat.completions.create(model=MODEL, messages=user(text), **options)


# --- models --------------------------------------------------------------------------------------


def test_models_are_listed_and_retrieved(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-nothing")
    assert caught.value.code == "model_not_found"


# --- whole answers -------------------------------------------------------------------------------


def test_a_reply_has_role_content_finish_reason_and_usage(client):
    reply = chat(client, "the river under the bridge")
    assert reply.object == "chat.completion"
    assert reply.model == MODEL
    assert reply.system_fingerprint == "test-1"
    [choice] = reply.choices
    assert (choice.index, choice.finish_reason) == (0, "stop")
    assert (choice.message.role, choice.message.content) == ("assistant", "the river under the bridge")
    assert choice.message.refusal is None
    assert choice.logprobs is None
    usage = reply.usage
    assert usage.prompt_tokens == usage.completion_tokens + 4  # begin of text, user turn, and the assistant's start
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 1


def test_all_roles_and_content_parts_are_understood(client, tokenizer):
    messages = [
        {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "brief."}]},
        {"role": "user", "content": "Who?", "name": "someone"},
        {"role": "assistant", "content": "I."},
        {"role": "user", "content": [{"type": "text", "text": "And"}, {"type": "text", "text": "where?"}]},
    ]
    reply = client.chat.completions.create(model=MODEL, messages=messages)
    assert reply.choices[0].message.content == "And\nwhere?"
    as_system = [{"role": "system", "content": "Be\nbrief."}, *messages[1:]]
    assert client.chat.completions.create(model=MODEL, messages=as_system).usage == reply.usage


def test_a_reply_can_be_sent_back_as_it_came(client):
    first = chat(client, "tool")
    history = [*user("tool"), first.choices[0].message.model_dump(), *user("and now?")]
    second = client.chat.completions.create(model=MODEL, messages=history)
    parts = [{"type": "text", "text": "Let me see: "}, {"type": "python", "text": "2*3"}]
    parts += [{"type": "python_output", "text": "6"}, {"type": "text", "text": " it is."}]
    by_parts = [*user("tool"), {"role": "assistant", "content": parts}, *user("and now?")]
    third = client.chat.completions.create(model=MODEL, messages=by_parts)
    assert second.choices[0].message.content == "and now?"
    assert second.usage.prompt_tokens == third.usage.prompt_tokens  # the tool call has come back with it


def test_tool_calls_are_an_addition_that_plain_clients_do_not_see(client):
    message = chat(client, "tool").choices[0].message
    assert message.content == "Let me see:  it is."
    assert message.tool_calls is None
    assert [part["type"] for part in message.nanochat["parts"]] == ["text", "python", "python_output", "text"]


def test_max_tokens_and_its_newer_name_end_a_reply_with_length(client):
    for name in ("max_tokens", "max_completion_tokens"):
        reply = chat(client, "count 50", **{name: 5})
        assert reply.choices[0].finish_reason == "length"
        assert reply.usage.completion_tokens == 5
    whole = chat(client, "count 9", max_tokens=10_000)  # more than fits the context is no mistake
    assert whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stop", ["6 7", [" 4 5", "6 7", "xyz"]])
def test_stop_texts_end_a_reply_and_are_not_part_of_it(client, stop):
    reply = chat(client, "count 12", stop=stop)
    assert reply.choices[0].message.content == ("1 2 3 4 5 " if isinstance(stop, str) else "1 2 3")
    assert reply.choices[0].finish_reason == "stop"


def test_n_gives_as_many_choices(client):
    reply = chat(client, "garden", n=3)
    assert [choice.index for choice in reply.choices] == [0, 1, 2]
    assert [choice.message.content for choice in reply.choices] == ["garden"] * 3
    alone = chat(client, "garden")
    assert reply.usage.prompt_tokens == alone.usage.prompt_tokens  # read once
    assert reply.usage.completion_tokens == 3 * alone.usage.completion_tokens


def test_logprobs_have_the_tokens_and_the_likeliest_beside_them(client):
    logprobs = chat(client, "café naïve", logprobs=True, top_logprobs=2).choices[0].logprobs
    assert b"".join(bytes(token.bytes) for token in logprobs.content).decode() == "café naïve"
    for token in logprobs.content:
        assert token.logprob < 0
        assert len(token.top_logprobs) == 2
        assert token.top_logprobs[0].logprob > token.top_logprobs[1].logprob
    assert all(not token.top_logprobs for token in chat(client, "x", logprobs=True).choices[0].logprobs.content)


def test_sampling_options_and_ignored_fields_are_taken(client):
    options = {"temperature": 0.7, "top_p": 0.9, "seed": 7, "user": "someone", "metadata": {"a": "b"}, "store": False}
    extra = {"top_k": 50, "min_p": 0.05, "repetition_penalty": 1.1}
    assert chat(client, "music", **options, extra_body=extra).choices[0].message.content == "music"
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "tools": [], "response_format": {"type": "text"}}
    assert chat(client, "music", **neutral).choices[0].message.content == "music"


# --- streamed answers ----------------------------------------------------------------------------


def test_stream_begins_with_the_role_and_ends_with_the_reason(client):
    chunks = list(chat(client, "count 20", stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    assert chunks[0].choices[0].delta.role == "assistant"
    assert all(chunk.choices[0].delta.role is None for chunk in chunks[1:])
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len(chunks) > 5
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
    assert text == " ".join(str(number) for number in range(1, 21))
    assert all(chunk.usage is None for chunk in chunks)


def test_stream_and_whole_answer_are_the_same(client):
    for text in ("tool", "count 9", "café naïve 東京 🎉"):
        whole = chat(client, text).choices[0]
        chunks = [chunk.choices[0] for chunk in chat(client, text, stream=True)]
        assert "".join(choice.delta.content or "" for choice in chunks) == whole.message.content
        parts = []
        for choice in chunks:
            piece = getattr(choice.delta, "nanochat", None) or {"type": "text", "text": choice.delta.content or ""}
            begins_part = piece["type"] != "text" and not piece["text"]
            if begins_part or not parts or parts[-1]["type"] != piece["type"]:
                parts.append({"type": piece["type"], "text": ""})
            parts[-1]["text"] += piece["text"]
        assert [part for part in parts if part["text"]] == whole.message.nanochat["parts"]


def test_stream_counts_usage_when_asked(client):
    chunks = list(chat(client, "garden", stream=True, stream_options={"include_usage": True}))
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert chunks[-1].choices == []
    assert chunks[-1].usage == chat(client, "garden").usage


def test_streams_of_several_choices_do_not_mix(client):
    texts, reasons = ["", "", ""], []
    for chunk in chat(client, "count 15", stream=True, n=3):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons += [(choice.index, choice.finish_reason)] if choice.finish_reason else []
    assert texts == [" ".join(str(number) for number in range(1, 16))] * 3
    assert sorted(reasons) == [(0, "stop"), (1, "stop"), (2, "stop")]


def test_stream_carries_each_token_s_logprob_once(client):
    content = []
    for chunk in chat(client, "count 12", stream=True, logprobs=True, top_logprobs=1, stop="10"):
        logprobs = chunk.choices[0].logprobs
        content += logprobs.content if logprobs else []
    whole = chat(client, "count 12", logprobs=True, top_logprobs=1, stop="10").choices[0].logprobs.content
    assert content == whole


# --- completions ---------------------------------------------------------------------------------


def test_completion_goes_on_with_a_text(client, tokenizer):
    completion = client.completions.create(model=MODEL, prompt="silver engine", max_tokens=40)
    assert completion.object == "text_completion"
    assert completion.choices[0].text == "silver engine"
    ids = [tokenizer.bos_id, *tokenizer.encode("silver engine")]
    assert client.completions.create(model=MODEL, prompt=ids, max_tokens=40).usage == completion.usage
    assert completion.usage.prompt_tokens == len(ids)


def test_completion_has_sixteen_tokens_unless_told_otherwise(client):
    completion = client.completions.create(model=MODEL, prompt="count 60")
    assert completion.usage.completion_tokens == 16
    assert completion.choices[0].finish_reason == "length"


def test_completions_of_several_prompts_stand_in_their_order(client):
    completion = client.completions.create(model=MODEL, prompt=["river", "stone", "cloud"], n=2, max_tokens=40)
    texts = [choice.text for choice in sorted(completion.choices, key=lambda choice: choice.index)]
    assert texts == ["river", "river", "stone", "stone", "cloud", "cloud"]
    streamed = [""] * 6
    for chunk in client.completions.create(
        model=MODEL, prompt=["river", "stone", "cloud"], n=2, max_tokens=40, stream=True
    ):
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts


def test_completion_logprobs_have_offsets_into_the_text(client):
    choice = client.completions.create(model=MODEL, prompt="never seven twelve", logprobs=2, max_tokens=40).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens) == choice.text
    for offset, token in zip(logprobs.text_offset, logprobs.tokens, strict=True):
        assert choice.text[offset:].startswith(token)
    assert all(len(top) == 2 for top in logprobs.top_logprobs)


def test_completion_streams(client):
    stream = client.completions.create(
        model=MODEL, prompt="count 12", stream=True, max_tokens=60, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].text for c in chunks if c.choices) == " ".join(str(n) for n in range(1, 13))
    assert chunks[-1].usage.completion_tokens > 10


# --- errors --------------------------------------------------------------------------------------


def test_a_wrong_key_is_an_authentication_error(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another-key", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        chat(client, "hello")
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"top_p": "high"}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
        ({"stop": ""}, "stop"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format.type"),
        ({"frequency_penalty": 1}, "frequency_penalty"),
        ({"logit_bias": {"5": 10}}, "logit_bias"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"extra_body": {"temprature": 1}}, "temprature"),
        ({"seed": 2**64}, "seed"),
    ],
)
def test_a_bad_option_is_a_bad_request_that_names_it(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "hello", **options)
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        ([{"role": "tool", "content": "x"}], "messages[0].role"),
        ([{"role": "assistant", "content": "x"}], "messages"),
        ([{"role": "system", "content": "x"}], "messages"),
        ([*user("a"), *user("b")], "messages"),
        ([*user("a"), {"role": "system", "content": "x"}], "messages"),
        ([{"role": "user", "content": 5}], "messages[0].content"),
        ([{"role": "user", "content": None}], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "messages[0].content[0]"),
        ([*user("a"), {"role": "assistant", "content": [{"type": "code", "text": "x"}]}], "messages[1].content[0]"),
    ],
)
def test_messages_not_in_order_are_a_bad_request(client, messages, param):
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model=MODEL, messages=messages)
    assert caught.value.param.startswith(param)


def test_too_long_a_question_is_a_bad_request_with_its_code(client):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "word " * 500)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="word " * 500)
    assert caught.value.code == "context_length_exceeded"


def test_a_full_queue_is_a_rate_limit_error(tokenizer, tmp_path):
    page = tmp_path / "ui.html"
    with (
        live_server(tokenizer, page, max_rows=1, max_queue=1, step_seconds=0.05) as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client,
    ):
        streams = [chat(client, "count 60", stream=True) for _ in range(2)]
        for stream in streams:
            next(iter(stream))  # both are accepted, one waits
        with pytest.raises(openai.RateLimitError) as caught:
            chat(client, "hello")
        assert caught.value.code == "queue_full"
        assert caught.value.response.headers["retry-after"] == "1"
        for stream in streams:
            stream.close()
        assert chat(client.with_options(max_retries=5), "hello").choices[0].message.content == "hello"


def test_a_fault_of_the_engine_is_told_within_a_stream(client, server):
    with pytest.raises(openai.APIError) as caught:
        list(chat(client, "crash", stream=True))
    assert caught.value.code == "worker_failed"
    retrying = client.with_options(max_retries=5)
    assert chat(retrying, "hello").choices[0].message.content == "hello"  # it was started again


@pytest.mark.anyio
async def test_the_asynchronous_client_works_as_well(server):
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
        stream = await client.chat.completions.create(model=MODEL, messages=user("count 9"), stream=True)
        assert "".join([c.choices[0].delta.content or "" async for c in stream]) == "1 2 3 4 5 6 7 8 9"


@pytest.fixture
def anyio_backend():
    return "asyncio"
