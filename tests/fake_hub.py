"""A tiny hub for tests: serves the files of one repository, as data set and as model, with faults on request."""

import hashlib
import json
import re
import socket
import struct
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Event, Thread
from types import TracebackType
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import file_download

from nanochat.data import hub

REPO = "someone/texts"
REVISION = "c0ffee"
HTML = b"<html><body>Sign in to this network</body></html>"


class FakeHub:
    """Context manager. `faults[path]` is a list of what to do with the next requests of that file ("listing": of the
    listings), "" being no fault:

    "503", "404"    any status                       "wrong"       other bytes, as many
    "429"           that status, wait 2 seconds      "disguised"   HTML said to be a file
    "limit"         429 as the hub limits rates: 1 s
    "truncate"      half of the body                 "no-range"    the whole body, whatever was asked
    "reset"         half, then a reset connection
    "stall"         half, silence until the end      "silence"     no answer until the end
    "html"          HTML with status 200

    A client asks for a file's metadata first, which only 401, 403 and 404 refuse. `requests` has (path, range, status)
    of each other request, `tokens` the Authorization headers.
    """

    def __init__(self, files: dict[str, bytes], *, page_size: int = 1000, with_sha256: bool = True) -> None:
        self.files = files
        self.page_size = page_size
        self.with_sha256 = with_sha256
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str, int]] = []
        self.tokens: set[str] = set()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.closing = Event()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.endpoint = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self) -> "FakeHub":
        Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.closing.set()
        self.server.shutdown()
        self.server.server_close()

    def entries(self) -> list[dict]:
        listed: list[dict] = [{"type": "directory", "path": "data", "oid": "", "size": 0}]
        for path, content in self.files.items():
            lfs = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
            entry = {"type": "file", "path": path, "oid": "", "size": len(content)}
            listed.append(entry | {"lfs": lfs} if self.with_sha256 else entry)
        return listed

    def fetched(self, path: str) -> int:
        """How many requests of the file were answered with content."""
        return sum(1 for name, _, status in self.requests if name == path and status in (200, 206))


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        pass

    def handle(self) -> None:
        with suppress(ConnectionError):  # the client went away
            super().handle()

    def do_HEAD(self) -> None:
        name = unquote(self.path).partition(f"/resolve/{REVISION}/")[2]
        faults, body = self.hub.faults[name], self.hub.files.get(name, b"")
        if faults and faults[0] in ("401", "403", "404"):
            self.do_GET()
            return
        self.send_response(200 if name in self.hub.files else 404)
        self.send_header("X-Repo-Commit", REVISION)
        self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()

    def do_GET(self) -> None:
        path, _, query = unquote(self.path).partition("?")
        content = re.fullmatch(rf"(?:/datasets)?/{REPO}/resolve/{REVISION}/(.*)", path)
        name = content[1] if content else "listing"
        fault = self.hub.faults[name].pop(0) if self.hub.faults[name] else ""
        self.hub.tokens.add(self.headers.get("Authorization", ""))
        if fault == "silence":
            self.hub.closing.wait(30)
            self.close_connection = True
        elif fault == "limit":
            self.answer(name, 429, b"{}", "application/json", RateLimit='"resolvers";r=0;t=1')
        elif fault.isdigit():
            self.answer(name, int(fault), b"{}", "application/json", **{"Retry-After": "2" if fault == "429" else "0"})
        elif fault == "html":
            self.answer(name, 200, HTML, "text/html; charset=utf-8")
        elif content:
            self.send_content(name, fault)
        elif path in (f"/api/datasets/{REPO}", f"/api/models/{REPO}"):
            self.answer(name, 200, json.dumps({"id": REPO, "sha": REVISION}).encode(), "application/json")
        elif path in (f"/api/datasets/{REPO}/tree/{REVISION}", f"/api/models/{REPO}/tree/{REVISION}"):
            self.send_page(int(query.partition("page=")[2] or 0))
        else:
            self.answer(name, 404, b"{}", "application/json")

    def send_page(self, page: int) -> None:
        entries, size = self.hub.entries(), self.hub.page_size
        link = {}
        if (page + 1) * size < len(entries):
            address = f"{self.hub.endpoint}{self.path.partition('?')[0]}?recursive=true&page={page + 1}"
            link = {"Link": f'<{address}>; rel="next"'}
        body = json.dumps(entries[page * size : (page + 1) * size]).encode()
        self.answer("listing", 200, body, "application/json", **link)

    def send_content(self, name: str, fault: str) -> None:
        body = self.hub.files.get(name)
        if body is None:
            return self.answer(name, 404, b"", "text/plain")
        if fault == "wrong":
            body = bytes(len(body))
        if fault == "disguised":
            body = HTML
        start = int(re.sub(r"\D", "", self.headers.get("Range", "")) or 0) if fault != "no-range" else 0
        headers = {"Content-Range": f"bytes {start}-{len(body) - 1}/{len(body)}"} if start else {}
        send = (len(body) - start) // 2 if fault in ("truncate", "reset", "stall") else None
        self.answer(name, 206 if start else 200, body[start:], "application/octet-stream", send=send, **headers)
        self.wfile.flush()
        if fault == "stall":
            self.hub.closing.wait(30)
        if fault == "reset":
            time.sleep(0.2)  # let the client read what was sent
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()

    def answer(self, name: str, status: int, body: bytes, kind: str, send: int | None = None, **headers: str) -> None:
        self.hub.requests.append((name, self.headers.get("Range", ""), status))
        self.send_response(status)
        for key, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[:send])
        self.close_connection = send is not None


def parquet_bytes(texts: list[str | None], *, row_group_size: int = 1024, column: str = "text") -> bytes:
    """A parquet file of one column of strings."""
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({column: pa.array(texts, pa.string())}), sink, row_group_size=row_group_size)
    return sink.getvalue().to_pybytes()


@contextmanager
def impatient_hub(monkeypatch: pytest.MonkeyPatch, files: dict[str, bytes]) -> Iterator[FakeHub]:
    """The hub that downloads go to, without pauses between their attempts."""
    with FakeHub(files) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        monkeypatch.setattr(hub, "FIRST_PAUSE", 0.001)
        monkeypatch.setattr(file_download.time, "sleep", lambda seconds: None)  # of huggingface_hub's own retries
        yield server
