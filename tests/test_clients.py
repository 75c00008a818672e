"""Requests of other programs: each is answered, whole or as a stream as it asks."""

import pytest
from client_requests import CHAT, QUESTION, REQUESTS
from live_server import ask, events, server_fixture

server = server_fixture()


def text_of(choice, key):
    return choice[key].get("content", "") if key in choice else choice["text"]


@pytest.mark.parametrize("name", REQUESTS)
def test_requests_of_other_programs_are_answered(server, name):
    path, body = REQUESTS[name]
    answer = ask(server.port, path, body)
    assert answer.status == 200, answer.text
    if body.get("stream"):
        chunks = events(answer.text)
        assert chunks[-1] == "[DONE]"
        choices = [choice for chunk in chunks[:-1] for choice in chunk["choices"]]
        text = "".join(text_of(choice, "delta") for choice in choices)
        assert choices[-1]["finish_reason"] == "stop"
        assert ("usage" in chunks[-2]) == ("stream_options" in body)
    else:
        text = text_of(answer.json["choices"][0], "message")
    if isinstance(body.get("prompt"), list):
        assert text.startswith("Hi!")
    else:
        assert QUESTION in text  # the fake engine says the question
    ignored = set(answer.headers.get("x-nanochat-ignored", "").split(", "))
    known = {"messages", "prompt", "model", "stream", "temperature", "stop", "tools", "max_tokens", "n", "seed"}
    assert not ignored & known
    if path == CHAT and "metadata" in body:
        assert "metadata" in ignored
