"""The official `openai` client against the server: what it sends is understood, and it understands what it gets."""

import asyncio
from functools import partial

import openai
import pytest
from live_server import KEY, MODEL, live_server, server_fixture
from test_answers import parts_of

PARTS = [{"type": "text", "text": "Let me see: "}, {"type": "python", "text": "2*3"},
         {"type": "python_output", "text": "6"}, {"type": "text", "text": " it is."}]  # fmt: skip

server = server_fixture(api_key=KEY, max_queue=16)


@pytest.fixture(scope="module")
def client(server):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0, timeout=30) as client:
        yield client


def message(role, content):
    return {"role": role, "content": content}


user, assistant, system = (partial(message, role) for role in ("user", "assistant", "system"))


def chat(client, *messages, **options):
    """A chat about messages; a text is a user's."""
    messages = [user(said) if isinstance(said, str) else said for said in messages]
    return client.chat.completions.create(model=MODEL, messages=messages, **options)


def complete(client, prompt, **options):
    return client.completions.create(model=MODEL, prompt=prompt, **options)


def count(last):
    return " ".join(str(number) for number in range(1, last + 1))


def test_models_are_listed_and_retrieved(client):
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "nanochat"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("gpt-nothing")
    assert caught.value.code == "model_not_found"


def test_a_reply_has_role_content_finish_reason_and_usage(client):
    reply = chat(client, "the river under the bridge")
    assert (reply.object, reply.model, reply.system_fingerprint) == ("chat.completion", MODEL, "test-1")
    [choice] = reply.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "stop", None)
    said = choice.message
    assert (said.role, said.content, said.refusal) == ("assistant", "the river under the bridge", None)
    usage = reply.usage
    assert usage.prompt_tokens == usage.completion_tokens + 4  # begin of text, user turn, and the assistant's start
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details.cached_tokens == 1


def test_all_roles_and_content_parts_are_understood(client):
    def in_parts(*texts):
        return [{"type": "text", "text": text} for text in texts]

    later = [user("Who?") | {"name": "someone"}, assistant("I."), user(in_parts("And", "where?"))]
    reply = chat(client, message("developer", in_parts("Be", "brief.")), *later)
    assert reply.choices[0].message.content == "And\nwhere?"
    assert chat(client, system("Be\nbrief."), *later).usage == reply.usage


def test_tool_calls_are_an_addition_that_plain_clients_do_not_see_and_can_be_sent_back_as_they_came(client):
    said = chat(client, "tool").choices[0].message
    assert (said.content, said.tool_calls) == ("Let me see:  it is.", None)
    assert said.nanochat["parts"] == PARTS
    as_it_came = chat(client, "tool", said.model_dump(), "and now?")
    by_parts = chat(client, "tool", assistant(PARTS), "and now?")
    assert as_it_came.choices[0].message.content == "and now?"
    assert as_it_came.usage.prompt_tokens == by_parts.usage.prompt_tokens  # the tool call has come back with it


def test_max_tokens_and_its_newer_name_end_a_reply_with_length(client):
    for name in ("max_tokens", "max_completion_tokens"):
        reply = chat(client, "count 50", **{name: 5})
        assert (reply.choices[0].finish_reason, reply.usage.completion_tokens) == ("length", 5)
    whole = chat(client, "count 9", max_tokens=10_000)  # more than fits the context is no mistake
    assert whole.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(("stop", "text"), [("6 7", "1 2 3 4 5 "), ([" 4 5", "6 7", "xyz"], "1 2 3")])
def test_stop_texts_end_a_reply_and_are_not_part_of_it(client, stop, text):
    choice = chat(client, "count 12", stop=stop).choices[0]
    assert (choice.message.content, choice.finish_reason) == (text, "stop")


def test_n_gives_as_many_choices(client):
    reply, alone = chat(client, "garden", n=3), chat(client, "garden")
    assert [(choice.index, choice.message.content) for choice in reply.choices] == [(i, "garden") for i in range(3)]
    assert reply.usage.prompt_tokens == alone.usage.prompt_tokens  # read once
    assert reply.usage.completion_tokens == 3 * alone.usage.completion_tokens


def test_logprobs_have_the_tokens_and_the_likeliest_beside_them(client):
    logprobs = chat(client, "café naïve", logprobs=True, top_logprobs=2).choices[0].logprobs
    assert b"".join(bytes(token.bytes) for token in logprobs.content).decode() == "café naïve"
    for token in logprobs.content:
        assert token.logprob < 0
        first, second = token.top_logprobs
        assert first.logprob > second.logprob
    assert all(not token.top_logprobs for token in chat(client, "x", logprobs=True).choices[0].logprobs.content)


def test_sampling_options_and_fields_that_ask_for_nothing_are_taken(client):
    tool = {"type": "function", "function": {"name": "f"}}
    options = {"temperature": 0.7, "top_p": 0.9, "seed": 7, "frequency_penalty": 0.5, "presence_penalty": -2,
               "logit_bias": {"5": -100, "6": 1.5}}  # fmt: skip
    extra = {"extra_body": {"top_k": -1, "min_p": 0.05, "repetition_penalty": 1.1}}
    neutral = {"tools": [], "tool_choice": "none", "response_format": {"type": "text"}, "modalities": ["text"],
               "stream_options": {"include_usage": True}, "top_p": 0, "functions": [], "logit_bias": {}}  # fmt: skip
    for given in (options | extra, neutral, {"tools": [tool], "tool_choice": "none"}):
        assert chat(client, "music", **given).choices[0].message.content == "music"


@pytest.mark.parametrize("stream", [False, True])
def test_fields_without_effect_are_ignored_and_named_in_a_header(client, stream):
    harmless = {"user": "someone", "metadata": {"a": "b"}, "store": False, "reasoning_effort": "low",
                "verbosity": "low", "parallel_tool_calls": False, "prediction": {"type": "content", "content": "x"},
                "service_tier": "auto", "prompt_cache_key": "k", "safety_identifier": "s"}  # fmt: skip
    extra = {"cache_prompt": True, "chat_template_kwargs": {"enable_thinking": False}}
    messages = [
        user("music") | {"id": "1", "metadata": {"a": 1}},
        assistant("y") | {"reasoning_content": "z"},
        user("x"),
    ]
    api = client.chat.completions.with_raw_response
    answer = api.create(model=MODEL, messages=messages, stream=stream, extra_body=extra, **harmless)
    names = {*harmless, *extra, "messages.id", "messages.metadata", "messages.reasoning_content"}
    assert set(answer.headers["x-nanochat-ignored"].split(", ")) == names
    texts = (
        [c.choices[0].delta.content or "" for c in answer.parse()]
        if stream
        else [answer.parse().choices[0].message.content]
    )
    assert "".join(texts) == "x"
    assert "x-nanochat-ignored" not in api.create(model=MODEL, messages=[user("x")]).headers


def test_messages_in_any_order_are_understood(client):
    def prompt_tokens(*messages):
        return chat(client, *messages).usage.prompt_tokens

    assert chat(client, "river", "stone").choices[0].message.content == "river\n\nstone"
    asked = [user("river"), assistant("Yes?"), user("stone")]
    for late in ([system("Be brief."), system("Be kind."), *asked], [system("Be brief."), *asked, system("Be kind.")]):
        assert chat(client, *late).choices[0].message.content == "stone"
        assert prompt_tokens(*late) == prompt_tokens(system("Be brief.\n\nBe kind."), *asked)
    greeted = [assistant("Welcome!"), user("river")]
    assert prompt_tokens(*greeted) == prompt_tokens("", assistant("Welcome!"), "river")
    for empty in ({"role": "assistant"}, assistant(None), assistant("")):
        assert prompt_tokens("river", empty, "stone") == prompt_tokens("river", assistant(""), "stone")
    assert chat(client, system("river")).choices[0].message.content == "river"


@pytest.mark.parametrize("name", ["default", "nanochat", "", MODEL])
def test_the_served_model_has_several_names_and_answers_by_its_own(client, name):
    reply = client.chat.completions.create(model=name, messages=[user("hello")])
    assert reply.model == MODEL
    with pytest.raises(openai.NotFoundError, match=MODEL):
        client.chat.completions.create(model="gpt-4o", messages=[user("hello")])


def test_stream_begins_with_the_role_and_ends_with_the_reason_and_usage_when_asked(client):
    chunks = list(chat(client, "count 20", stream=True))
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({(chunk.id, chunk.model, chunk.created) for chunk in chunks}) == 1
    num_more = len(chunks) - 1
    assert num_more >= 5
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant"] + [None] * num_more
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * num_more + ["stop"]
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == count(20)
    assert all(chunk.usage is None for chunk in chunks)
    *chunks, last = chat(client, "garden", stream=True, stream_options={"include_usage": True})
    assert all(chunk.usage is None for chunk in chunks)
    assert (last.choices, last.usage) == ([], chat(client, "garden").usage)


@pytest.mark.parametrize("text", ["tool", "count 9", "café naïve 東京 🎉"])
def test_stream_and_whole_answer_are_the_same(client, text):
    whole = chat(client, text).choices[0].message
    deltas = [chunk.choices[0].delta for chunk in chat(client, text, stream=True)]
    assert "".join(delta.content or "" for delta in deltas) == whole.content
    pieces = [getattr(delta, "nanochat", None) or {"type": "text", "text": delta.content or ""} for delta in deltas]
    parts = parts_of((piece["type"], piece["text"]) for piece in pieces)
    assert [part for part in parts if part[1]] == [[part["type"], part["text"]] for part in whole.nanochat["parts"]]


def test_streams_of_several_choices_do_not_mix(client):
    texts, reasons = ["", "", ""], []
    for chunk in chat(client, "count 15", stream=True, n=3):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            reasons += [(choice.index, choice.finish_reason)] if choice.finish_reason else []
    assert texts == [count(15)] * 3
    assert sorted(reasons) == [(0, "stop"), (1, "stop"), (2, "stop")]


def test_stream_carries_each_token_s_logprob_once(client):
    options, content = {"logprobs": True, "top_logprobs": 1, "stop": "10"}, []
    for chunk in chat(client, "count 12", stream=True, **options):
        logprobs = chunk.choices[0].logprobs
        content += logprobs.content if logprobs else []
    assert content == chat(client, "count 12", **options).choices[0].logprobs.content


def test_completion_goes_on_with_a_text_for_sixteen_tokens_unless_told_otherwise(client, tokenizer):
    completion = complete(client, "silver engine", max_tokens=40)
    assert (completion.object, completion.choices[0].text) == ("text_completion", "silver engine")
    ids = [tokenizer.bos_id, *tokenizer.encode("silver engine")]
    assert complete(client, ids, max_tokens=40).usage == completion.usage
    assert completion.usage.prompt_tokens == len(ids)
    cut = complete(client, "count 60")
    assert (cut.usage.completion_tokens, cut.choices[0].finish_reason) == (16, "length")


def test_completions_of_several_prompts_stand_in_their_order_also_streamed(client):
    options = {"n": 2, "max_tokens": 40}
    completion = complete(client, ["river", "stone", "count 12"], **options)
    texts = [choice.text for choice in sorted(completion.choices, key=lambda choice: choice.index)]
    assert texts == ["river", "river", "stone", "stone", count(12), count(12)]
    streamed = [""] * 6
    stream = complete(
        client, ["river", "stone", "count 12"], stream=True, stream_options={"include_usage": True}, **options
    )
    for chunk in stream:
        for choice in chunk.choices:
            streamed[choice.index] += choice.text
    assert streamed == texts
    assert chunk.usage == completion.usage
    assert chunk.usage.completion_tokens > 20


def test_completion_logprobs_have_offsets_into_the_text(client):
    choice = complete(client, "never seven twelve", logprobs=2, max_tokens=40).choices[0]
    logprobs = choice.logprobs
    assert "".join(logprobs.tokens[:-1]) == choice.text
    for offset, token in zip(logprobs.text_offset[:-1], logprobs.tokens[:-1], strict=True):
        assert choice.text[offset:].startswith(token)
    assert all(len(top) == 2 for top in logprobs.top_logprobs[:-1])
    assert logprobs.tokens[-1] == "<|assistant_end|>"  # and the one that ended the reply, which is no text
    assert logprobs.text_offset[-1] == len(choice.text)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1])
def test_echo_gives_the_prompts_with_their_log_probabilities(client, tokenizer, as_ids, max_tokens):
    """As lm-evaluation-harness asks for them."""
    texts = ["never seven twelve", "café 東京 river"]
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    options = {"echo": True, "logprobs": 1, "max_tokens": max_tokens, "temperature": 0, "seed": 1234}
    completion = complete(client, ids if as_ids else texts, **options)
    for choice, text, prompt in zip(completion.choices, texts, ids, strict=True):
        assert choice.text == (text + tokenizer.decode(prompt[1:2]) if max_tokens else text)
        assert choice.finish_reason == "length"
        found = choice.logprobs
        assert len(found.tokens) == len(found.top_logprobs) == len(found.text_offset) == len(prompt) + max_tokens
        assert (found.token_logprobs[0], found.top_logprobs[0]) == (None, None)
        for id_, logprob, top in zip(prompt[1:], found.token_logprobs[1:], found.top_logprobs[1:], strict=False):
            assert logprob == -0.25 * (1 + id_ % 8) == max(top.values())
        begins = [len(tokenizer.decode_bytes(prompt[1:end]).decode(errors="ignore")) for end in range(1, len(prompt))]
        assert found.text_offset[: len(prompt)] == [0, *begins]
    assert completion.usage.completion_tokens == 2 * max_tokens
    streamed = list(complete(client, texts, stream=True, n=2, **options))
    said = [[c.choices[0] for c in streamed if c.choices[0].index == index] for index in range(4)]
    assert ["".join(c.text for c in part) for part in said] == [c.text for c in completion.choices for _ in range(2)]
    for part, choice in zip(said, [c for c in completion.choices for _ in range(2)], strict=True):
        found = [value for chunk in part for value in chunk.logprobs.token_logprobs]
        assert found == choice.logprobs.token_logprobs


def test_echo_without_log_probabilities_and_best_of_as_many_as_are_wanted(client):
    completion = complete(client, "river stone", echo=True, max_tokens=40, n=2, best_of=2)
    assert [(c.text, c.logprobs) for c in completion.choices] == [("river stoneriver stone", None)] * 2


@pytest.mark.parametrize(
    ("options", "param"),
    [({"best_of": 3}, "best_of"), ({"suffix": "end"}, "suffix"), ({"max_tokens": 0}, "max_tokens"),
     ({"extra_body": {"guided_regex": "a+"}}, "guided_regex"), ({"logprobs": 6}, "logprobs")],
)  # fmt: skip
def test_what_a_completion_cannot_do_is_a_bad_request(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        complete(client, "x", **options)
    assert caught.value.param == param


def test_a_wrong_key_is_an_authentication_error(server):
    client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="another-key", max_retries=0)
    with pytest.raises(openai.AuthenticationError) as caught:
        chat(client, "hello")
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"), ({"top_p": "high"}, "top_p"), ({"n": 0}, "n"), ({"n": 1000}, "n"),
        ({"max_tokens": 0}, "max_tokens"), ({"stop": ["a"] * 17}, "stop"), ({"stop": ""}, "stop"),
        ({"top_logprobs": 21}, "top_logprobs"), ({"seed": 2**64}, "seed"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"), ({"modalities": ["text", "audio"]}, "modalities"),
        ({"function_call": {"name": "f"}}, "function_call"), ({"functions": [{"name": "f"}]}, "functions"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"web_search_options": {}}, "web_search_options"),
        ({"frequency_penalty": 2.5}, "frequency_penalty"), ({"logit_bias": {"5": 101}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"), ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"audio": {"voice": "x", "format": "wav"}}, "audio"),
        ({"extra_body": {"json_schema": {"a": 1}}}, "json_schema"),
    ],
)  # fmt: skip
def test_a_bad_option_is_a_bad_request_that_names_it(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, "hello", **options)
    assert (caught.value.param, caught.value.type) == (param, "invalid_request_error")


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"), ([message("tool", "x")], "messages[0].role"), ([message("x", "x")], "messages[0].role"),
        (["a", assistant("") | {"tool_calls": [{"id": "1"}]}], "messages[1].tool_calls"),
        ([user(5)], "messages[0].content"), ([user(None)], "messages[0].content"),
        ([{"role": "user"}], "messages[0].content"),
        ([user([{"type": "image_url", "image_url": {"url": "x"}}])], "messages[0].content[0]"),
        (["a", assistant([{"type": "code", "text": "x"}])], "messages[1].content[0]"),
    ],
)  # fmt: skip
def test_messages_that_cannot_be_understood_are_a_bad_request(client, messages, param):
    with pytest.raises(openai.BadRequestError) as caught:
        chat(client, *messages)
    assert caught.value.param.startswith(param)


@pytest.mark.parametrize("ask", [chat, complete])
def test_too_long_a_question_is_a_bad_request_with_its_code(client, ask):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, "word " * 500)
    assert caught.value.code == "context_length_exceeded"


def test_a_full_queue_is_a_rate_limit_error(tokenizer, tmp_path):
    with (
        live_server(tokenizer, tmp_path / "ui.html", max_rows=1, max_queue=1, step_seconds=0.05) as server,
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


def test_a_fault_of_the_engine_is_told_within_a_stream(client):
    with pytest.raises(openai.APIError) as caught:
        list(chat(client, "crash", stream=True))
    assert caught.value.code == "worker_failed"
    retrying = client.with_options(max_retries=5)
    assert chat(retrying, "hello").choices[0].message.content == "hello"  # it was started again


def test_the_asynchronous_client_works_as_well(server):
    async def main():
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key=KEY) as client:
            stream = await chat(client, "count 9", stream=True)
            assert "".join([chunk.choices[0].delta.content or "" async for chunk in stream]) == count(9)

    asyncio.run(main())
