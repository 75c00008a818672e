import http.client
import json
import logging
import random
import socket
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from live_server import CONTEXT, MODEL, PAGE, ask, events, live_server, question, wait_until

from nanochat.common import UserError
from nanochat.serve.api import PAGE_PATH, create_app
from nanochat.serve.middleware import Settings
from nanochat.serve.worker import Pool

CHAT = "/v1/chat/completions"
KEY = "a-key-for-the-tests"


@pytest.fixture(scope="module")
def page_path(tmp_path_factory):
    return tmp_path_factory.mktemp("page") / "ui.html"


@pytest.fixture(scope="module")
def server(tokenizer, page_path):
    with live_server(tokenizer, page_path, max_queue=16) as server:
        yield server


@pytest.fixture(scope="module")
def slow_server(tokenizer, page_path):
    """10 ms a token, two rows, and two replies may wait."""
    with live_server(tokenizer, page_path, max_rows=2, max_queue=2, step_seconds=0.01) as server:
        yield server


@pytest.fixture(scope="module")
def locked_server(tokenizer, page_path):
    with live_server(tokenizer, page_path, api_key=KEY, max_body_bytes=2000, body_seconds=0.5) as server:
        yield server


class Stream:
    """A streamed chat whose client reads, or leaves, when it wants."""

    def __init__(self, port: int, text: str):
        self.connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        body = json.dumps(question(text, stream=True))
        self.connection.request("POST", CHAT, body, {"content-type": "application/json"})
        self.response = self.connection.getresponse()

    def read_event(self):
        line = self.response.readline().decode()
        assert self.response.readline() == b"\n"
        return json.loads(line.removeprefix("data: "))

    def leave(self):
        self.response.close()
        self.connection.close()


# --- the page, health, metrics -------------------------------------------------------------------


def test_page_is_sent_with_a_policy_that_allows_only_itself(server):
    answer = ask(server.port, "/")
    assert answer.status == 200
    assert answer.text == PAGE
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
    assert answer.status == 404
    assert answer.json["error"]["type"] == "invalid_request_error"


def test_the_page_of_the_repository_is_there():
    assert "<script" in PAGE_PATH.read_text(encoding="utf-8")


def test_a_missing_page_is_a_user_error(tokenizer, tmp_path):
    pool = Pool([lambda: None], max_rows=1, max_queue=0, in_threads=True)
    with pytest.raises(UserError, match="nowhere"):
        create_app(pool, tokenizer, Settings(MODEL, CONTEXT), page_path=tmp_path / "nowhere.html")


def test_health_counts_what_is_written_and_what_waits(slow_server):
    streams = [Stream(slow_server.port, "count 60") for _ in range(3)]
    health = ask(slow_server.port, "/health").json
    assert health == {"status": "ok", "model": MODEL, "message": "", "active": 2, "waiting": 1}
    for stream in streams:
        stream.leave()
    wait_until(lambda: ask(slow_server.port, "/health").json["active"] == 0)


def test_metrics_count_requests_tokens_and_engine(server):
    ask(server.port, CHAT, question("count 9"))
    ask(server.port, "/a/secret/path")
    text = ask(server.port, "/metrics").text
    assert f'nanochat_requests_total{{route="{CHAT}",status="200"}}' in text
    assert 'nanochat_requests_total{route="other",status="404"}' in text
    assert "secret" not in text
    assert 'nanochat_worker_up{worker="0"} 1.0' in text
    assert 'nanochat_engine_replies{state="active",worker="0"}' in text or "nanochat_engine_replies" in text
    for name in ("first_token_seconds_count", "token_seconds_count", "request_seconds_count", "disconnects_total"):
        assert f"nanochat_{name}" in text
    for kind in ("prompt", "completion", "cached"):
        assert f'nanochat_tokens_total{{kind="{kind}"}}' in text


def test_models_tell_the_context(server):
    [card] = ask(server.port, "/v1/models").json["data"]
    assert card["nanochat"] == {"context": CONTEXT, "max_tokens": CONTEXT}


# --- loading and failing -------------------------------------------------------------------------


def test_while_the_model_loads_the_page_is_there_and_the_api_says_when_to_ask_again(tokenizer, page_path):
    def load_slowly():
        time.sleep(0.5)
        raise UserError("the weights are damaged: /secret/place")

    with live_server(tokenizer, page_path, make_engines=[load_slowly], wait=False) as server:
        assert ask(server.port, "/").status == 200
        health = ask(server.port, "/health")
        assert (health.status, health.json["status"]) == (503, "loading")
        answer = ask(server.port, CHAT, question("hello"))
        assert (answer.status, answer.json["error"]["code"]) == (503, "model_loading")
        assert answer.headers["retry-after"] == health.headers["retry-after"] == "2"
        wait_until(lambda: ask(server.port, "/health").json["status"] == "failed")
        assert "secret" not in ask(server.port, "/health").text
        assert ask(server.port, CHAT, question("hello")).json["error"]["code"] == "worker_failed"


def test_an_engine_that_fails_is_started_again(server):
    answer = ask(server.port, CHAT, question("crash"))
    assert (answer.status, answer.json["error"]["code"]) == (503, "worker_failed")
    wait_until(lambda: server.pool.state == "ok")
    assert ask(server.port, CHAT, question("hello")).status == 200
    assert server.pool.num_replies == 0


def test_what_the_engine_refuses_is_a_bad_request(server):
    answer = ask(server.port, CHAT, question("refuse"))
    assert (answer.status, answer.json["error"]["message"]) == (400, "the engine refuses this prompt")
    streamed = ask(server.port, CHAT, question("refuse", stream=True))
    assert events(streamed.text)[-1]["error"]["message"] == "the engine refuses this prompt"


# --- conversations -------------------------------------------------------------------------------


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


def test_a_last_assistant_message_is_gone_on_with(server, tokenizer):
    open_turn = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "Good"}]
    answer = ask(server.port, CHAT, {"messages": open_turn}).json
    closed = ask(server.port, CHAT, question("hello")).json
    num_more = len(tokenizer.encode("Good"))
    assert answer["usage"]["prompt_tokens"] == closed["usage"]["prompt_tokens"] + num_more


def test_answers_of_many_clients_at_once_do_not_mix(server):
    texts = [f"client {number} garden {number * 7}" for number in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda text: ask(server.port, CHAT, question(text)), texts))
    assert [answer.json["choices"][0]["message"]["content"] for answer in answers] == texts


# --- streams -------------------------------------------------------------------------------------


def test_a_stream_is_made_of_events_and_ends_with_done(server):
    answer = ask(server.port, CHAT, question("tool", stream=True))
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.headers["cache-control"] == "no-store"
    parsed = events(answer.text)
    assert parsed[-1] == "[DONE]"
    deltas = [event["choices"][0]["delta"] for event in parsed[:-1]]
    tools = [delta["nanochat"] for delta in deltas if "nanochat" in delta]
    assert tools[0] == {"type": "python", "text": ""}
    assert "".join(tool["text"] for tool in tools if tool["type"] == "python") == "2*3"
    assert all(delta["content"] == "" for delta in deltas if "nanochat" in delta)


def test_the_first_event_comes_at_once_also_for_who_has_to_wait(slow_server):
    busy = [Stream(slow_server.port, "count 60") for _ in range(2)]
    start = time.perf_counter()
    waiting = Stream(slow_server.port, "hello")
    first = waiting.read_event()
    assert time.perf_counter() - start < 0.5
    assert first["choices"][0]["delta"]["role"] == "assistant"
    for stream in (*busy, waiting):
        stream.leave()
    wait_until(lambda: slow_server.pool.num_replies == 0)


def test_tokens_come_while_others_still_wait_for_theirs(slow_server):
    stream = Stream(slow_server.port, "count 30")
    stream.read_event()
    first = stream.read_event()["choices"][0]["delta"]["content"]
    assert first
    assert len(first) < len(" ".join(map(str, range(1, 31)))) / 2
    stream.leave()


# --- clients that leave --------------------------------------------------------------------------


def test_a_client_that_leaves_frees_its_row_also_while_it_waits(slow_server):
    streams = [Stream(slow_server.port, "count 60") for _ in range(4)]
    assert slow_server.pool.num_replies == 4
    assert ask(slow_server.port, CHAT, question("hello")).status == 429
    for stream in streams:
        stream.leave()
    wait_until(lambda: slow_server.pool.num_replies == 0, seconds=2)
    assert ask(slow_server.port, CHAT, question("hello")).status == 200


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


# --- who may ask ---------------------------------------------------------------------------------


def test_without_the_key_only_page_and_health_are_there(locked_server):
    assert ask(locked_server.port, "/").status == 200
    assert ask(locked_server.port, "/health").status == 200
    paths = ["/v1/models", f"/v1/models/{MODEL}", "/metrics", "/openapi.json", "/docs", "/nothing", "/health/"]
    for path in paths:
        answer = ask(locked_server.port, path)
        assert (answer.status, answer.json["error"]["code"]) == (401, "invalid_api_key"), path
        assert answer.headers["www-authenticate"] == "Bearer"
    for path in (CHAT, "/v1/completions", "/", "/health"):
        assert ask(locked_server.port, path, question("hello")).status in (401, 405)


@pytest.mark.parametrize(
    "value", ["", KEY, f"Basic {KEY}", "Bearer", "Bearer wrong", f"Bearer {KEY}x", "Bearer \xff\xfe"]
)
def test_a_wrong_key_is_refused(locked_server, value):
    assert ask(locked_server.port, "/v1/models", headers={"authorization": value}).status == 401


def test_the_key_opens_all_routes(locked_server):
    for value in (f"Bearer {KEY}", f"bearer {KEY}"):
        assert ask(locked_server.port, "/v1/models", headers={"authorization": value}).status == 200


def test_pages_of_other_hosts_and_foreign_host_names_are_refused(server):
    own = {"origin": f"http://127.0.0.1:{server.port}", "host": f"127.0.0.1:{server.port}"}
    assert ask(server.port, CHAT, question("hello"), headers=own).status == 200
    for origin in ("http://evil.example", "null", f"http://localhost:{server.port}", "http://[", ""):
        assert ask(server.port, CHAT, question("hello"), headers={"origin": origin}).status == 403, origin
    for host in ("evil.example", f"evil.example:{server.port}", "127.0.0.1.evil.example"):
        assert ask(server.port, "/health", headers={"host": host}).status == 403, host
    for host in ("localhost", f"localhost:{server.port}", f"[::1]:{server.port}", "LOCALHOST:1"):
        assert ask(server.port, "/health", headers={"host": host}).status == 200, host


def test_there_is_no_cors_unless_asked_for(tokenizer, page_path, server):
    preflight = {"origin": "http://friend.example", "access-control-request-method": "POST"}
    refused = ask(server.port, CHAT, method="OPTIONS", headers=preflight)
    assert refused.status == 403
    assert "access-control-allow-origin" not in refused.headers
    with live_server(tokenizer, page_path, api_key=KEY, cors_origins=("http://friend.example",)) as open_server:
        answer = ask(open_server.port, CHAT, method="OPTIONS", headers=preflight)
        assert answer.headers["access-control-allow-origin"] == "http://friend.example"
        headers = {"origin": "http://friend.example", "authorization": f"Bearer {KEY}"}
        assert ask(open_server.port, CHAT, question("hello"), headers=headers).status == 200
        assert ask(open_server.port, CHAT, question("hello"), headers=headers | {"origin": "http://x.y"}).status == 403


# --- limits --------------------------------------------------------------------------------------


def test_too_large_a_request_is_refused_before_it_is_parsed(locked_server):
    key = {"authorization": f"Bearer {KEY}"}
    for size in (2001, 500_000):
        answer = ask(locked_server.port, CHAT, b"x" * size, headers=key)
        assert (answer.status, answer.json["error"]["code"]) == (413, "request_too_large")
    assert send_chunked(locked_server.port, [b"y" * 1000] * 5, key) == 413


def test_a_body_in_pieces_without_a_length_is_read_as_one(server):
    raw = json.dumps(question("hello")).encode()
    assert send_chunked(server.port, [raw[:9], raw[9:]], {}) == 200


def send_chunked(port: int, pieces: list[bytes], headers: dict[str, str]) -> int:
    """The status of the answer."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = headers | {"content-type": "application/json"}
    connection.request("POST", CHAT, iter(pieces), headers, encode_chunked=True)
    try:
        return connection.getresponse().status
    finally:
        connection.close()


def test_a_request_that_does_not_arrive_in_time_is_refused(locked_server):
    head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\ncontent-length: 50\r\n\r\n{{"
    with socket.create_connection(("127.0.0.1", locked_server.port), timeout=10) as connection:
        connection.sendall(head.encode())
        assert connection.recv(65536).startswith(b"HTTP/1.1 408")


def test_only_json_is_taken(server):
    for value in ("text/plain", "application/x-www-form-urlencoded", ""):
        answer = ask(server.port, CHAT, question("hello"), headers={"content-type": value})
        assert answer.status == 415
    value = "Application/JSON; charset=utf-8"
    assert ask(server.port, CHAT, question("hello"), headers={"content-type": value}).status == 200


MALFORMED = [
    b"",
    b"{",
    b"null",
    b"[]",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"messages": "\xff"}',
    b'{"messages": [{"role": "user", "content": "\xed\xa0\x80"}]}',
    b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    b'{"messages": [{"role": "\\ud800", "content": "x"}]}',
    b'{"messages": [{"role": "user", "content": "x"}], "stop": "\\udfff"}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
    b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
    b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": ' + b"9" * 5000 + b"}",
    b'{"messages": [{"role": "user", "content": "x"}], "n": true}',
    b'{"messages": [{"role": "user", "content": "x"}], "seed": 1.5}',
    b'{"messages": {"role": "user", "content": "x"}}',
    b"[" * 100_000,
    b'{"messages":' * 10_000,
    b'{"messages": [' + b'{"role": "user", "content": "x"},' * 5000 + b"1]}",
]


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


def test_disconnects_malformed_and_oversize_requests_leave_nothing_behind(tokenizer, page_path):
    """A small version of dev/soak_server.py."""
    rng = random.Random(0)
    statuses = set()
    with live_server(tokenizer, page_path, max_rows=2, max_queue=4, step_seconds=0.001, max_body_bytes=4000) as server:
        for number in range(120):
            kind = number % 4
            if kind == 0:
                try:
                    stream = Stream(server.port, "count 60")
                except http.client.RemoteDisconnected:
                    continue
                for _ in range(rng.randrange(4)):
                    stream.response.readline()
                stream.leave()
            elif kind == 1:
                statuses.add(ask(server.port, CHAT, rng.choice(MALFORMED)).status)
            elif kind == 2:
                statuses.add(ask(server.port, CHAT, b"{" * rng.randrange(4001, 9000)).status)
            else:
                statuses.add(ask(server.port, CHAT, question(f"count {number}", max_tokens=3)).status)
        wait_until(lambda: server.pool.num_replies == 0)
        assert statuses <= {200, 400, 413, 429}
        assert 'status="5' not in ask(server.port, "/metrics").text
        wait_until(lambda: 'nanochat_engine_replies{state="active",worker="0"} 0.0' in engine_lines(server))


def engine_lines(server) -> str:
    """The engines' lines of the metrics, labels in alphabetical order."""
    lines = [line for line in ask(server.port, "/metrics").text.splitlines() if "engine_replies{" in line]
    return "\n".join(line.replace('{worker="0",state="active"}', '{state="active",worker="0"}') for line in lines)


# --- the log -------------------------------------------------------------------------------------


def test_access_log_has_a_line_per_request_and_no_prompts(server, caplog):
    caplog.set_level(logging.INFO, logger="nanochat.access")
    ask(server.port, CHAT, question("my secret", stream=True))
    ask(server.port, "/v1/secret?secret=1")
    ask(server.port, CHAT, b'{"messages": [{"role": "secret", "content": "secret"}], "secret": "secret"}')
    wait_until(lambda: len(caplog.records) == 3)
    lines = [json.loads(record.message) for record in caplog.records]
    assert [(line["method"], line["route"], line["status"]) for line in lines] == [
        ("POST", CHAT, 200),
        ("GET", "other", 404),
        ("POST", CHAT, 400),
    ]
    assert "secret" not in caplog.text
    assert "127.0.0.1" not in caplog.text
    assert lines[0]["client"] == lines[1]["client"]
    first = lines[0]
    assert first["stream"] is True
    assert first["prompt_tokens"] > 0
    assert first["completion_tokens"] > 0
    assert first["finish_reasons"] == ["stop"]
    assert 0 <= first["first_token_seconds"] <= first["seconds"]


def test_texts_are_in_the_log_when_asked_for(tokenizer, page_path, caplog):
    caplog.set_level(logging.INFO, logger="nanochat.access")
    with live_server(tokenizer, page_path, log_texts=True) as server:
        ask(server.port, CHAT, question("hello"))
        wait_until(lambda: caplog.records)
    line = json.loads(caplog.records[0].message)
    assert line["messages"] == [{"role": "user", "content": "hello"}]
    assert line["replies"] == [[{"type": "text", "text": "hello"}]]


def test_a_fault_of_the_server_is_told_in_the_usual_shape_and_logged_without_texts(tokenizer, page_path, caplog):
    with live_server(tokenizer, page_path) as server:

        def fail(prompts, *_, **__):
            raise RuntimeError(tokenizer.decode(prompts[0]))

        server.pool.submit = fail
        answer = ask(server.port, CHAT, question("my secret"))
    assert answer.status == 500
    assert answer.json["error"]["type"] == "server_error"
    assert "RuntimeError in" in caplog.text
    assert "secret" not in caplog.text


# --- settings, the end ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value"),
    [("context_len", 0), ("max_replies", 0), ("max_body_bytes", -1), ("max_tokens", -1), ("api_key", "short"),
     ("api_key", "ein-schlüssel"), ("api_key", " " * 20)],
)  # fmt: skip
def test_settings_that_make_no_sense_are_user_errors(field, value):
    with pytest.raises(UserError):
        Settings(**({"model_name": MODEL, "context_len": CONTEXT} | {field: value}))


def test_shutdown_lets_running_answers_end(tokenizer, page_path):
    with live_server(tokenizer, page_path, step_seconds=0.01) as server:
        stream = Stream(server.port, "count 30")
        stream.read_event()
        server.server.should_exit = True
        text = stream.response.read().decode()
    assert text.endswith("data: [DONE]\n\n")
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)
