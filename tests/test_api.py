import http.client
import json
import logging
import random
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
from live_server import CONTEXT, KEY, MODEL, PAGE, ask, events, live_server, question, server_fixture, wait_until

from nanochat.common import UserError
from nanochat.serve.answers import ChatAnswer
from nanochat.serve.api import PAGE_PATH, create_app
from nanochat.serve.middleware import Settings
from nanochat.serve.worker import Pool

CHAT = "/v1/chat/completions"
BEARER = {"authorization": f"Bearer {KEY}"}

server = server_fixture(max_queue=16)
slow_server = server_fixture(max_rows=2, max_queue=2, step_seconds=0.01)  # 10 ms a token, and two replies may wait
locked_server = server_fixture(api_key=KEY, max_body_bytes=2000, body_seconds=0.5)


@pytest.fixture
def serve(tokenizer, tmp_path):
    """A server for one test: `with serve(api_key=KEY) as server`."""
    return partial(live_server, tokenizer, tmp_path / "ui.html")


def chat(server, text="hello", *, headers=None, **options):
    return ask(server.port, CHAT, question(text, **options), headers=headers)


class Stream:
    """A streamed chat whose client reads, or leaves, when it wants."""

    def __init__(self, server, text: str):
        self.connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
        body = json.dumps(question(text, stream=True))
        self.connection.request("POST", CHAT, body, {"content-type": "application/json"})
        self.response = self.connection.getresponse()

    def read_delta(self):
        line = self.response.readline().decode()
        assert self.response.readline() == b"\n"
        return json.loads(line.removeprefix("data: "))["choices"][0]["delta"]

    def leave(self):
        self.response.close()
        self.connection.close()


def test_page_is_sent_with_a_policy_that_allows_only_itself(server):
    answer = ask(server.port, "/")
    assert (answer.status, answer.text) == (200, PAGE)
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert ask(server.port, "/", method="HEAD").status == 200


@pytest.mark.parametrize(
    "path",
    ["/ui.html", "/server.py", "/../server.py", "/%2e%2e/server.py", "/..%2fserver.py", "//etc/passwd", "/static/",
     "/docs"],
)  # fmt: skip
def test_no_path_reaches_another_file(server, path):
    answer = ask(server.port, path)
    assert (answer.status, answer.json["error"]["type"]) == (404, "invalid_request_error")


def test_the_repository_has_a_page_and_a_missing_one_is_a_user_error(tokenizer, tmp_path):
    assert "<script" in PAGE_PATH.read_text(encoding="utf-8")
    pool = Pool([lambda: None], max_rows=1, max_queue=0, in_threads=True)
    with pytest.raises(UserError, match="nowhere"):
        create_app(pool, tokenizer, Settings(MODEL, CONTEXT), page_path=tmp_path / "nowhere.html")


def test_metrics_count_requests_tokens_and_engine_and_models_tell_the_context(server):
    chat(server, "count 9")
    ask(server.port, "/a/secret/path")
    text = ask(server.port, "/metrics").text
    assert "secret" not in text
    for expected in (
        f'requests_total{{route="{CHAT}",status="200"}}', 'requests_total{route="other",status="404"}',
        'worker_up{worker="0"} 1.0', 'engine_replies{state="active",worker="0"}', "first_token_seconds_count",
        "token_seconds_count", "request_seconds_count", "disconnects_total",
        *(f'tokens_total{{kind="{kind}"}}' for kind in ("prompt", "completion", "cached")),
    ):  # fmt: skip
        assert f"nanochat_{expected}" in text
    [card] = ask(server.port, "/v1/models").json["data"]
    facts = {"stage": "", "step": 0, "parameters": 0, "temperature": 0.6, "top_k": 50, "examples": []}
    assert card["nanochat"] == {"context": CONTEXT, "max_tokens": CONTEXT} | facts


def test_while_the_model_loads_the_page_is_there_and_the_api_says_when_to_ask_again(serve):
    def load_slowly():
        time.sleep(0.5)
        raise UserError("the weights are damaged: /secret/place")

    with serve(make_engines=[load_slowly], wait=False) as server:
        assert ask(server.port, "/").status == 200
        health = ask(server.port, "/health")
        assert (health.status, health.json["status"]) == (503, "loading")
        answer = chat(server)
        assert (answer.status, answer.json["error"]["code"]) == (503, "model_loading")
        assert answer.headers["retry-after"] == health.headers["retry-after"] == "2"
        wait_until(lambda: ask(server.port, "/health").json["status"] == "failed")
        assert "secret" not in ask(server.port, "/health").text
        assert chat(server).json["error"]["code"] == "worker_failed"


def test_an_engine_that_fails_is_started_again_and_what_it_refuses_is_a_bad_request(server):
    answer = chat(server, "crash")
    assert (answer.status, answer.json["error"]["code"]) == (503, "worker_failed")
    wait_until(lambda: server.pool.state == "ok")
    assert chat(server).status == 200
    assert server.pool.num_replies == 0
    answer = chat(server, "refuse")
    assert (answer.status, answer.json["error"]["message"]) == (400, "the engine refuses this prompt")
    streamed = chat(server, "refuse", stream=True)
    assert events(streamed.text)[-1]["error"]["message"] == "the engine refuses this prompt"


def test_dropped_turns_are_told_in_whole_and_streamed_answers(server):
    turns = [{"role": role, "content": "river stone cloud garden " * 4} for role in ("user", "assistant") * 8]
    body = {"messages": [{"role": "system", "content": "Be kind."}, *turns, {"role": "user", "content": "hello"}]}
    whole = ask(server.port, CHAT, body).json
    assert whole["choices"][0]["message"]["content"] == "hello"
    num_dropped = whole["nanochat"]["num_dropped_messages"]
    assert 0 < num_dropped < len(turns)
    assert num_dropped % 2 == 0
    assert whole["nanochat"]["context"] == {"used": whole["usage"]["total_tokens"], "limit": CONTEXT}
    assert whole["usage"]["prompt_tokens"] <= CONTEXT * 3 // 4  # there is room for a reply
    streamed = events(ask(server.port, CHAT, body | {"stream": True}).text)
    notes = [event["nanochat"] for event in streamed[:-1] if "nanochat" in event]
    assert [note["num_dropped_messages"] for note in notes] == [num_dropped] * 2
    assert notes[0]["context"]["used"] == whole["usage"]["prompt_tokens"]
    assert notes[1] == whole["nanochat"]


def test_dropped_messages_are_counted_as_they_were_sent(server):
    half, short = ({"role": "user", "content": "river stone cloud garden " * times} for times in (24, 1))
    messages = [half, half, {"role": "assistant", "content": "Yes."}, short, {"role": "assistant", "content": "No."}]
    answer = ask(server.port, CHAT, {"messages": [*messages, {"role": "user", "content": "hello"}]}).json
    assert answer["nanochat"]["num_dropped_messages"] == 3


def test_ignored_fields_are_named_in_few_characters_and_once_in_the_log(serve, caplog):
    def names(fields):
        return ask(server.port, CHAT, question("hello") | fields).headers["x-nanochat-ignored"].split(", ")

    with serve() as server:
        for _ in range(3):
            assert names({"cache_prompt": 1}) == ["cache_prompt"]
        assert caplog.text.count("cache_prompt") == 1
        assert names({"a\r\nset-cookie: é": 1}) == ["a??set-cookie???"[:16]]
        assert names({"x" * 10_000: 1, "": 1}) == ["x" * 64, "?"]
        assert names({f"f{number}": 1 for number in range(1000)}) == [*(f"f{n}" for n in range(16)), "..."]
        for number in range(400):
            names({f"many{number}": 1})
        assert 200 < caplog.text.count("many") < 257


def test_tokens_of_a_text_or_of_messages_are_given_and_turned_back(server, tokenizer):
    def tokenize(**fields):
        return ask(server.port, "/tokenize", fields).json

    ids, text = tokenizer.encode("the café <|bos|>"), "the café <|bos|>"
    told = tokenize(prompt=text, return_token_strs=True, model=MODEL)
    assert (told["tokens"], told["count"], told["max_model_len"]) == ([tokenizer.bos_id, *ids], len(ids) + 1, CONTEXT)
    assert told["token_strs"] == [tokenizer.decode([token]) for token in told["tokens"]]
    plain = tokenize(prompt=text, add_special_tokens=False)
    assert (plain["tokens"], plain["token_strs"]) == (ids, None)
    assert ask(server.port, "/detokenize", {"tokens": told["tokens"]}).json == {"prompt": f"<|bos|>{text}"}
    assert ask(server.port, "/detokenize", {"tokens": []}).json == {"prompt": ""}

    asked, answered = question("hello")["messages"], [{"role": "assistant", "content": "Good"}]
    special = tokenizer.special_ids
    for messages, opened in ((asked, "<|assistant_start|>"), (asked + answered, None)):
        prompt = tokenize(messages=messages)
        usage = ask(server.port, CHAT, {"messages": messages}).json["usage"]
        assert prompt["count"] == usage["prompt_tokens"]
        closed = tokenize(messages=messages, add_generation_prompt=False)["tokens"]
        if opened:
            assert prompt["tokens"] == [*closed, special[opened]]
        else:
            assert closed == [*prompt["tokens"], special["<|assistant_end|>"]]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"), ("/tokenize", {"prompt": "x"} | question("x"), "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"), ("/tokenize", {"messages": []}, "messages"),
        ("/tokenize", {"prompt": "x", "model": "y"}, "model"), ("/detokenize", {"tokens": [10**6]}, "tokens"),
        ("/detokenize", {"tokens": "x"}, "tokens"), ("/detokenize", {"tokens": [-1]}, "tokens[0]"),
    ],
)  # fmt: skip
def test_what_cannot_be_tokenized_is_a_bad_request(server, path, body, param):
    answer = ask(server.port, path, body)
    assert answer.status == (404 if param == "model" else 400)
    assert answer.json["error"]["param"] == param


def test_a_model_is_found_by_a_name_with_slashes(serve):
    with serve(model_name="me/nanochat-d4") as server:
        assert ask(server.port, "/v1/models/me/nanochat-d4").json["id"] == "me/nanochat-d4"
        assert ask(server.port, "/v1/models/me/other").status == 404


def test_the_server_answers_others_while_it_writes_a_long_answer(server, monkeypatch):
    has_begun, may_end, whole = threading.Event(), threading.Event(), ChatAnswer.whole

    def slow_whole(answer):
        has_begun.set()
        return whole(answer) if may_end.wait(10) else None

    monkeypatch.setattr(ChatAnswer, "whole", slow_whole)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(chat, server)
        assert has_begun.wait(10)
        assert ask(server.port, "/health").status == 200
        may_end.set()
        assert asked.result().status == 200


def test_a_last_assistant_message_is_continued(server, tokenizer):
    open_turn = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Good"}]
    answer, closed = ask(server.port, CHAT, {"messages": open_turn}).json, chat(server).json
    num_more = len(tokenizer.encode("Good"))
    assert answer["usage"]["prompt_tokens"] == closed["usage"]["prompt_tokens"] + num_more


def test_answers_of_many_clients_at_once_do_not_mix(server):
    texts = [f"client {number} garden {number * 7}" for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: chat(server, text), texts))
    assert [answer.json["choices"][0]["message"]["content"] for answer in answers] == texts


def test_a_stream_is_made_of_events_and_ends_with_done(server):
    answer = chat(server, "tool", stream=True)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    parsed = events(answer.text)
    assert parsed[-1] == "[DONE]"
    deltas = [event["choices"][0]["delta"] for event in parsed[:-1]]
    tools = [delta["nanochat"] for delta in deltas if "nanochat" in delta]
    assert tools[0] == {"type": "python", "text": ""}
    assert "".join(tool["text"] for tool in tools if tool["type"] == "python") == "2*3"
    assert all(delta["content"] == "" for delta in deltas if "nanochat" in delta)


def test_streams_begin_at_once_even_in_the_queue_and_one_that_is_left_frees_its_row(slow_server):
    streams = [Stream(slow_server, "count 60") for _ in range(2)]
    start = time.perf_counter()
    streams.append(Stream(slow_server, "hello"))
    assert streams[2].read_delta()["role"] == "assistant"
    assert time.perf_counter() - start < 0.5
    health = ask(slow_server.port, "/health").json
    assert health == {"status": "ok", "model": MODEL, "message": "", "active": 2, "waiting": 1}
    streams[0].read_delta()
    assert 0 < len(streams[0].read_delta()["content"]) < len(" ".join(map(str, range(1, 61)))) / 2
    streams.append(Stream(slow_server, "count 60"))
    assert slow_server.pool.num_replies == 4
    assert chat(slow_server).status == 429
    for stream in streams:
        stream.leave()
    wait_until(lambda: slow_server.pool.num_replies == 0, seconds=2)
    wait_until(lambda: ask(slow_server.port, "/health").json["active"] == 0)
    assert chat(slow_server).status == 200


def test_a_client_that_leaves_before_a_whole_answer_frees_its_row(slow_server):
    connection = http.client.HTTPConnection("127.0.0.1", slow_server.port)
    connection.request("POST", CHAT, json.dumps(question("count 60")), {"content-type": "application/json"})
    wait_until(lambda: slow_server.pool.num_replies == 1)
    connection.close()
    wait_until(lambda: slow_server.pool.num_replies == 0, seconds=1)


def test_a_client_that_leaves_amid_its_request_costs_nothing(server):
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-length: 50\r\n\r\n{{".encode())
    wait_until(lambda: 'status="499"' in ask(server.port, "/metrics").text)
    assert server.pool.num_replies == 0


def test_without_the_key_only_page_and_health_are_there(locked_server):
    for path in ("/", "/health"):
        assert ask(locked_server.port, path).status == 200
    for path in ("/v1/models", f"/v1/models/{MODEL}", "/metrics", "/openapi.json", "/docs", "/nothing", "/health/"):
        answer = ask(locked_server.port, path)
        assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key"), path
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in (CHAT, "/v1/completions", "/", "/health"):
        assert ask(locked_server.port, path, question("hello")).status in (401, 405)
    for value in (f"Bearer {KEY}", f"bearer {KEY}"):
        assert ask(locked_server.port, "/v1/models", headers={"authorization": value}).status == 200
    for value in ("", KEY, f"Basic {KEY}", "Bearer", "Bearer wrong", f"Bearer {KEY}x", "Bearer \xff\xfe"):
        assert ask(locked_server.port, "/v1/models", headers={"authorization": value}).status == 401, value


def test_pages_of_other_hosts_and_foreign_host_names_are_refused(server):
    own = {"origin": f"http://127.0.0.1:{server.port}", "host": f"127.0.0.1:{server.port}"}
    assert chat(server, headers=own).status == 200
    for origin in ("http://evil.example", "null", f"http://localhost:{server.port}", "http://[", ""):
        assert chat(server, headers={"origin": origin}).status == 403, origin
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example"):
        assert ask(server.port, "/health", headers={"host": host}).status == 403, host
    for host in ("localhost", f"localhost:{server.port}", f"[::1]:{server.port}", "LOCALHOST:1"):
        assert ask(server.port, "/health", headers={"host": host}).status == 200, host


def test_there_is_no_cors_unless_asked_for(serve, server):
    friend = {"origin": "http://friend.example"}
    preflight = {"method": "OPTIONS", "headers": friend | {"access-control-request-method": "POST"}}
    refused = ask(server.port, CHAT, **preflight)
    assert refused.status == 403
    assert "access-control-allow-origin" not in refused.headers
    with serve(api_key=KEY, cors_origins=("http://friend.example",)) as open_server:
        answer = ask(open_server.port, CHAT, **preflight)
        assert answer.headers["access-control-allow-origin"] == "http://friend.example"
        assert chat(open_server, headers=BEARER | friend).status == 200
        assert chat(open_server, headers=BEARER | {"origin": "http://x.y"}).status == 403


def test_too_large_or_too_slow_a_request_is_refused_before_it_is_parsed(locked_server):
    for body in (b"x" * 2001, b"x" * 500_000, iter([b"y" * 1000] * 5)):
        answer = ask(locked_server.port, CHAT, body, headers=BEARER)
        assert (answer.status, answer.json["error"]["code"]) == (413, "request_too_large")
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\ncontent-length: 50\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", locked_server.port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_only_json_is_taken_also_in_pieces_without_a_length(server):
    for value in ("text/plain", "application/x-www-form-urlencoded", ""):
        assert chat(server, headers={"content-type": value}).status == 415
    assert chat(server, headers={"content-type": "Application/JSON; charset=utf-8"}).status == 200
    raw = json.dumps(question("hello")).encode()
    assert ask(server.port, CHAT, iter([raw[:9], raw[9:]])).status == 200


MALFORMED = [
    b"", b"{", b"null", b"[]", b'"text"', b"\xff\xfe\x00", b"[" * 100_000, b'{"messages":' * 10_000,
    b'{"messages": "\xff"}',
    b'{"messages": {"role": "user", "content": "x"}}',
    b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "\\ud800", "content": "x"}]}',
    b'{"messages": [' + b'{"role": "user", "content": "x"},' * 5000 + b"1]}",
    *(b'{"messages": [{"role": "user", "content": "x"}], %s}' % field
      for field in (b'"stop": "\\udfff"', b'"temperature": NaN', b'"temperature": 1e999', b'"n": true', b'"seed": 1.5',
                    b'"max_tokens": ' + b"9" * 5000)),
]  # fmt: skip


@pytest.mark.parametrize("path", [CHAT, "/v1/completions"])
def test_malformed_requests_are_bad_requests(server, path):
    for body in MALFORMED:
        answer = ask(server.port, path, body)
        assert answer.status == 400, body[:60]
        assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert server.pool.num_replies == 0


@pytest.mark.parametrize("prompt", [[], [[]], [400000], [-1], [1.5], [True], "", ["", ""], None, {"a": 1}, ["a", 1]])
def test_prompts_that_are_none_are_bad_requests(server, prompt):
    answer = ask(server.port, "/v1/completions", {"prompt": prompt})
    assert answer.status == (200 if prompt in ("", ["", ""]) else 400)  # an empty text is a beginning


def test_disconnects_malformed_and_oversize_requests_leave_nothing_behind(serve):
    """A small version of dev/soak_server.py."""
    rng, statuses = random.Random(0), set()
    with serve(max_rows=2, max_queue=4, step_seconds=0.001, max_body_bytes=4000) as server:
        for number in range(120):
            if number % 4:
                bodies = (
                    rng.choice(MALFORMED),
                    b"{" * rng.randrange(4001, 9000),
                    question(f"count {number}", max_tokens=3),
                )
                statuses.add(ask(server.port, CHAT, bodies[number % 4 - 1]).status)
                continue
            try:
                stream = Stream(server, "count 60")
            except http.client.RemoteDisconnected:
                continue
            for _ in range(rng.randrange(4)):
                stream.response.readline()
            stream.leave()
        wait_until(lambda: server.pool.num_replies == 0)
        assert statuses <= {200, 400, 413, 429}
        assert 'status="5' not in ask(server.port, "/metrics").text
        idle = 'nanochat_engine_replies{state="active",worker="0"} 0.0'
        wait_until(lambda: idle in ask(server.port, "/metrics").text)


def test_access_log_has_a_line_per_request_and_no_prompts(server, caplog):
    caplog.set_level(logging.INFO, logger="nanochat.access")
    chat(server, "my secret", stream=True)
    ask(server.port, "/v1/secret?secret=1")
    ask(server.port, CHAT, b'{"messages": [{"role": "secret", "content": "secret"}], "secret": "secret"}')
    wait_until(lambda: len(caplog.records) == 3)
    lines = [json.loads(record.message) for record in caplog.records]
    seen = [(line["method"], line["route"], line["status"]) for line in lines]
    assert seen == [("POST", CHAT, 200), ("GET", "other", 404), ("POST", CHAT, 400)]
    assert "secret" not in caplog.text
    assert "127.0.0.1" not in caplog.text
    first = lines[0]
    assert first["client"] == lines[1]["client"]
    assert (first["stream"], first["finish_reasons"]) == (True, ["stop"])
    assert min(first["prompt_tokens"], first["completion_tokens"]) > 0
    assert 0 <= first["first_token_seconds"] <= first["seconds"]


def test_texts_are_in_the_log_when_asked_for(serve, caplog):
    caplog.set_level(logging.INFO, logger="nanochat.access")
    with serve(log_texts=True) as server:
        chat(server)
        wait_until(lambda: caplog.records)
    line = json.loads(caplog.records[0].message)
    assert line["messages"] == [{"role": "user", "content": "hello"}]
    assert line["replies"] == [[{"type": "text", "text": "hello"}]]


def test_a_fault_of_the_server_is_told_in_the_usual_shape_and_logged_without_texts(serve, tokenizer, caplog):
    def fail(prompts, *_, **__):
        raise RuntimeError(tokenizer.decode(prompts[0]))

    with serve() as server:
        server.pool.submit = fail
        answer = chat(server, "my secret")
    assert (answer.status, answer.json["error"]["type"]) == (500, "server_error")
    assert "RuntimeError in" in caplog.text
    assert "secret" not in caplog.text


@pytest.mark.parametrize(
    ("field", "value"),
    [("context_len", 0), ("max_replies", 0), ("max_body_bytes", -1), ("max_tokens", -1), ("api_key", "short"),
     ("api_key", "ein-schlüssel"), ("api_key", " " * 20)],
)  # fmt: skip
def test_settings_that_make_no_sense_are_user_errors(field, value):
    with pytest.raises(UserError):
        Settings(**({"model_name": MODEL, "context_len": CONTEXT} | {field: value}))


def test_shutdown_lets_running_answers_end(serve):
    with serve(step_seconds=0.01) as server:
        stream = Stream(server, "count 30")
        stream.read_delta()
        server.server.should_exit = True
        text = stream.response.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)
