"""A server on a free port of this machine, in a thread of the test's process, and ways to talk to it."""

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import uvicorn
from fake_engine import FakeEngine

from nanochat.serve.api import create_app
from nanochat.serve.middleware import Settings
from nanochat.serve.worker import Pool
from nanochat.tokenizer import Tokenizer

MODEL = "nanochat-test"
KEY = "a-key-for-the-tests"
CONTEXT = 256
PAGE = "<!doctype html><title>page</title><style>p { margin: 0 }</style><p>page</p><script>let a = 1 < 2;</script>"


@contextmanager
def live_server(
    tokenizer: Tokenizer, page_path: Path, *, make_engines: list | None = None, max_rows: int = 4, max_queue: int = 64,
    step_seconds: float = 0.0, wait: bool = True, **settings: Any,
) -> Iterator[SimpleNamespace]:  # fmt: skip
    """`url`, `port` and `pool` of a server, with a `FakeEngine` unless told otherwise."""
    page_path.write_text(PAGE)
    fake = partial(FakeEngine, tokenizer, max_rows=max_rows, step_seconds=step_seconds, context=CONTEXT)
    pool = Pool(make_engines or [fake], max_rows=max_rows, max_queue=max_queue, in_threads=True)
    settings = {"model_name": MODEL, "context_len": CONTEXT, "fingerprint": "test-1"} | settings
    app = create_app(pool, tokenizer, Settings(**settings), page_path=page_path)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    config = uvicorn.Config(app, log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    port = listener.getsockname()[1]
    try:
        if wait:
            wait_until(lambda: pool.state == "ok")
        yield SimpleNamespace(url=f"http://127.0.0.1:{port}", port=port, pool=pool, app=app, server=server)
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not end"


def server_fixture(**options: Any):
    """A fixture of a test module: one `live_server` for all its tests."""

    @pytest.fixture(scope="module")
    def server(tokenizer, tmp_path_factory):
        with live_server(tokenizer, tmp_path_factory.mktemp("page") / "ui.html", **options) as server:
            yield server

    return server


def wait_until(condition, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.005)


def ask(
    port: int, path: str, body: Any = None, *, method: str = "", headers: dict[str, str] | None = None
) -> SimpleNamespace:
    """One request: `status`, `headers`, `text` and, where the answer is JSON, `json`.

    A body of bytes is sent as it is, an iterator of bytes in pieces without a length, anything else as JSON.
    """
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    raw = body if body is None or isinstance(body, bytes | Iterator) else json.dumps(body).encode()
    own = {"content-type": "application/json"} if raw is not None else {}
    try:
        connection.request(method or ("GET" if raw is None else "POST"), path, raw, own | (headers or {}))
        response = connection.getresponse()
        text = response.read().decode()
    finally:
        connection.close()
    is_json = response.headers.get("content-type", "") == "application/json"
    parsed = json.loads(text) if is_json and text else None
    return SimpleNamespace(status=response.status, headers=response.headers, text=text, json=parsed)


def question(text: str, **options: Any) -> dict[str, Any]:
    """A chat request of one user message."""
    return {"messages": [{"role": "user", "content": text}], **options}


def events(text: str) -> list[Any]:
    """The parsed events of a stream; "[DONE]" as a text."""
    assert text.endswith("\n\n")
    lines = text.removesuffix("\n\n").split("\n\n")
    assert all(line.startswith("data: ") for line in lines)
    payloads = [line.removeprefix("data: ") for line in lines]
    return [payload if payload == "[DONE]" else json.loads(payload) for payload in payloads]
