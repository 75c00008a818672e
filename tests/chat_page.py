"""For the tests of the chat page: a small scripted server with the wire format and headers of nanochat/serve/api.py."""

import json
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from nanochat.serve.api import PAGE_PATH
from nanochat.serve.middleware import page_policy, read_page

LONGEST_WAIT_SECONDS = 20  # of a scripted reply for its test, and of a test for the page
NEVER = threading.Event()  # a reply that waits for it has no end


@dataclass
class Reply:
    """An answer to one chat request: `steps` are texts to send, seconds to wait, or events to wait for."""

    steps: list[str | bytes | float | threading.Event]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def sse(**chunk) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def delta(content: dict, **more) -> str:
    return sse(choices=[{"index": 0, "delta": content, "finish_reason": None}], **more)


def piece(content: str = "", **tool: str) -> str:
    """A piece of text, or of a tool call: `piece(python="1+1")`."""
    parts = [{"nanochat": {"type": type_, "text": text}} for type_, text in tool.items()]
    return delta({"content": content} | (parts[0] if parts else {}), usage=None)


def head(*, num_dropped: int = 0, used: int = 100, limit: int = 2048) -> str:
    info = {"num_dropped_messages": num_dropped, "context": {"used": used, "limit": limit}}
    return delta({"role": "assistant", "content": ""}, nanochat=info)


def end(finish_reason: str = "stop", num_tokens: int = 12) -> str:
    return (
        sse(choices=[{"index": 0, "delta": {}, "finish_reason": finish_reason}])
        + sse(choices=[], usage={"prompt_tokens": 5, "completion_tokens": num_tokens})
        + "data: [DONE]\n\n"
    )


def says(*steps: str | dict[str, str] | threading.Event, finish_reason: str = "stop", **context: int) -> Reply:
    """A whole answer: texts, pieces of tool calls such as `{"python": "1+1"}`, events to wait for in between."""
    pieces = [
        piece(step) if isinstance(step, str) else piece(**step) if isinstance(step, dict) else step for step in steps
    ]
    return Reply([head(**context), *pieces, end(finish_reason)])


def refuses(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return Reply([json.dumps(error)], status, {"Content-Type": "application/json", **headers})


class FakeServer(ThreadingHTTPServer):
    """Serves the page, and the replies of `script` one after another; notes what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.script: deque[Reply] = deque()
        self.health = {"status": "ok", "model": "nanochat-d4", "message": ""}
        self.key = ""
        self.requests: list[dict] = []
        self.num_disconnects = 0
        self.card: dict | None = None  # what it says of its model; an older server says nothing
        self.page = read_page(PAGE_PATH)

    def handle_error(self, request, client_address):
        pass  # a browser that goes away is part of the tests


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/":
            security = {"Content-Security-Policy": page_policy(self.server.page)}
            self._answer(200, {"Content-Type": "text/html", **security})
            self.wfile.write(self.server.page.encode())
        elif self.path == "/health":
            self._answer(200 if self.server.health["status"] == "ok" else 503, {"Content-Type": "application/json"})
            self.wfile.write(json.dumps(self.server.health).encode())
        elif self.path == "/v1/models" and not self._lacks_key():
            self._answer(200, {"Content-Type": "application/json"})
            card = {} if self.server.card is None else {"nanochat": self.server.card}
            self.wfile.write(json.dumps({"data": [{"id": self.server.health["model"], **card}]}).encode())
        else:
            self._answer(404, {})

    def _lacks_key(self) -> bool:
        return bool(self.server.key) and self.headers["Authorization"] != f"Bearer {self.server.key}"

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._lacks_key():
            reply = refuses(401, "The API key is missing or wrong.", "invalid_api_key")
        else:
            self.server.requests.append(body)
            reply = self.server.script.popleft()
        self._answer(reply.status, {"Content-Type": "text/event-stream", **reply.headers})
        try:
            for step in reply.steps:
                self._take(step)
        except OSError:
            self.server.num_disconnects += 1

    def _take(self, step: str | bytes | float | threading.Event) -> None:
        if isinstance(step, str | bytes):
            self.wfile.write(step.encode() if isinstance(step, str) else step)
            self.wfile.flush()
        elif isinstance(step, float):
            time.sleep(step)
        else:
            deadline = time.monotonic() + LONGEST_WAIT_SECONDS
            while not step.wait(0.02) and time.monotonic() < deadline:
                self.wfile.write(b": waiting\n")  # finds out whether the browser is still there

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
