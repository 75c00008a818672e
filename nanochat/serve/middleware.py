"""What every request passes before it reaches a route: access log and metrics, host, origin and API key, limits.

`api.py` wraps its application in `AccessLog`, starlette's CORS middleware and `Gate`, outermost first. They are plain
ASGI: starlette's base class for middleware would wrap `receive`, through which a client's disconnect is noticed. Its
`TrustedHostMiddleware` answers in plain text, not in the format of OpenAI's errors.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import re
import secrets
import time
import traceback
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect, Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nanochat.common import UserError
from nanochat.serve.errors import CLIENT_GONE, ApiError, ClientGone, as_api_error
from nanochat.serve.worker import Pool

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("nanochat.access")

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
PUBLIC_PATHS = ("/", "/health")  # served without a key
MIN_KEY_CHARS = 8
IGNORED_HEADER = "x-nanochat-ignored"  # names the fields of a request that had no effect
DRAIN_BYTES = 1 << 26  # read and discard this much of a body that is too large, or the client never reads the answer
SECONDS_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


@dataclass(frozen=True)
class Settings:
    """How a server is configured. Raises `UserError` for a value that makes no sense."""

    model_name: str  # the id by which clients know the model
    context_len: int  # of the model, in tokens
    fingerprint: str = ""  # differs between models that may answer the same request differently
    stage: str = ""  # of training, from which the model is
    step: int = 0
    parameters: int = 0
    examples: tuple[str, ...] = ()  # questions that the model was trained to answer
    max_tokens: int = 0  # longest reply that a request may ask for, 0: the context
    max_replies: int = 64  # per request: n times the number of prompts
    max_body_bytes: int = 1 << 20
    body_seconds: float = 30.0  # time limit for receiving a request
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = LOOPBACK_HOSTS  # host names by which the server may be called, none: any
    cors_origins: tuple[str, ...] = ()  # other origins whose pages may call the server, "*": all
    log_texts: bool = False  # include prompts and replies in the access log

    def __post_init__(self):
        for name in ("context_len", "max_replies", "max_body_bytes", "body_seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be more than 0, not {getattr(self, name)}")
        if self.max_tokens < 0:
            raise UserError(f"max_tokens must be at least 0, not {self.max_tokens}")
        if self.api_key is not None:
            if not (self.api_key.isascii() and self.api_key.isprintable()):
                raise UserError("the API key must consist of printable ASCII characters")
            if len(self.api_key.strip()) < MIN_KEY_CHARS:
                raise UserError(f"the API key must have at least {MIN_KEY_CHARS} characters")

    @property
    def reply_limit(self) -> int:
        return min(self.max_tokens or self.context_len, self.context_len)


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or name to listen on, can be reached from this machine only."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def read_page(path: Path) -> str:
    """A page with the scripts that it names, which lie beside it, set into it: one file to send, one policy for it.
    Raises `UserError` when one of them cannot be read."""
    try:
        html = path.read_text(encoding="utf-8")
        named = re.compile(r' src="([\w.]+)"></script>')
        return named.sub(lambda match: f">{path.with_name(match[1]).read_text(encoding='utf-8')}</script>", html)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the chat page {path}: {error}") from error


def page_policy(html: str) -> str:
    """The content security policy of a page: its own inline scripts and styles by hash, requests to its own server."""
    hashes, none = {"script": "", "style": ""}, " 'none'"
    for tag, text in re.findall(r"<(script|style)\b[^>]*>(.*?)</\1>", html, re.DOTALL):
        hashes[tag] += f" 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
    return (
        f"default-src 'none'; script-src{hashes['script'] or none}; style-src{hashes['style'] or none}; "
        "connect-src 'self'; img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class Metrics:
    """Prometheus metrics, with a registry of their own, so that several applications can live in one process."""

    def __init__(self, pool: Pool):
        self._pool, self.registry = pool, CollectorRegistry()
        self.registry.register(self)
        new = {"registry": self.registry, "namespace": "nanochat"}
        timing = {"buckets": SECONDS_BUCKETS, **new}
        self.requests = Counter("requests", "Requests answered", ["route", "status"], **new)
        self.request_seconds = Histogram("request_seconds", "From request to end of answer", ["route"], **timing)
        self.first_token_seconds = Histogram("first_token_seconds", "From request to first token", **timing)
        self.token_seconds = Histogram("token_seconds", "Mean time between tokens of a reply", **timing)
        self.tokens = Counter("tokens", "Tokens by kind; cached ones are part of the prompts", ["kind"], **new)
        self.disconnects = Counter("disconnects", "Clients that disconnected before their answer was complete", **new)

    def collect(self) -> Iterable[Metric]:
        """The engines' own counters, read at each scrape."""
        up = GaugeMetricFamily("nanochat_worker_up", "1 if the engine accepts work", labels=["worker"])
        replies = GaugeMetricFamily("nanochat_engine_replies", "Replies in the engine", labels=["worker", "state"])
        counts = CounterMetricFamily("nanochat_engine", "Counters of the engine", labels=["worker", "count"])
        for number, worker in enumerate(self._pool.workers):
            up.add_metric([str(number)], float(worker.state == "ready"))
            for name, value in worker.stats.items():
                family = replies if name in ("active", "waiting") else counts
                family.add_metric([str(number), name], value)
        return up, replies, counts


class AccessLog:
    """Logs one JSON line per request to `nanochat.access`, sets security headers, and answers unexpected exceptions.

    Routes add fields to the line through `scope["log"]`; `ignored` becomes a header of the answer too. A client appears
    as a hash of its address under a key drawn at each start: requests of one client can be related to each other, but
    not to an address.
    """

    def __init__(self, app: ASGIApp, *, metrics: Metrics):
        self._app, self._metrics, self._key = app, metrics, secrets.token_bytes(16)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        start, status, request_id = time.perf_counter(), 0, f"req-{secrets.token_hex(12)}"
        scope["log"] = log = {}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if log.get("ignored"):
                    headers[IGNORED_HEADER] = log["ignored"]
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            # without the message, which may quote what the client sent
            logger.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            log["error"] = type(error).__name__
            if not status:
                await as_api_error(error).response()(scope, receive, send_with_headers)
        finally:
            seconds, status = time.perf_counter() - start, status or CLIENT_GONE
            # the route's pattern and not the path, which can contain anything: each value makes a series of metrics
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.requests.labels(route, status).inc()
            self._metrics.request_seconds.labels(route).observe(seconds)
            address = scope["client"][0] if scope.get("client") else ""
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "id": request_id,
                "client": hmac.new(self._key, address.encode(), hashlib.sha256).hexdigest()[:12],
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
            }
            if access_logger.isEnabledFor(logging.INFO):
                access_logger.info(json.dumps(line | log))


class Gate:
    """Refuses callers without the API key, foreign host names and origins, and bodies that are too large or too slow.

    Host and origin protect a server on loopback from web pages in its user's browser: any page can send a request to
    127.0.0.1, and one whose own host name resolves to that address could even read the answer.
    """

    def __init__(self, app: ASGIApp, settings: Settings):
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        messages: list[Message] = []  # the whole body, before anything else that comes from the client
        if scope["type"] == "http":
            try:
                self._check_caller(scope)
                if scope["method"] in ("POST", "PUT", "PATCH"):
                    messages.append({"type": "http.request", "body": await self._read_body(scope, receive)})
            except ApiError as error:
                return await error.response()(scope, receive, send)

        async def receive_whole() -> Message:
            return messages.pop() if messages else await receive()

        await self._app(scope, receive_whole, send)

    def _check_caller(self, scope: Scope) -> None:
        settings, headers = self._settings, Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if settings.allowed_hosts and re.sub(r":\d+$", "", host).lower() not in settings.allowed_hosts:
            raise ApiError(403, "this server does not answer to this host name", code="unknown_host")
        is_foreign = origin is not None and origin.partition("://")[2] != host
        if is_foreign and not {origin, "*"} & set(settings.cors_origins):
            raise ApiError(403, "pages of other origins may not use this server", code="foreign_origin")
        if settings.api_key is None or scope["path"] in PUBLIC_PATHS:
            return
        scheme, _, key = headers.get("authorization", "").partition(" ")
        expected = settings.api_key.encode()
        if scheme.lower() != "bearer" or not hmac.compare_digest(key.strip().encode("latin-1"), expected):
            message = "wrong API key" if key else "an API key is required, as the header Authorization: Bearer KEY"
            raise ApiError(401, message, code="invalid_api_key")

    async def _read_body(self, scope: Scope, receive: Receive) -> bytes:
        settings, request, body, size = self._settings, Request(scope, receive), bytearray(), 0
        try:
            async with asyncio.timeout(settings.body_seconds):
                async for chunk in request.stream():
                    size += len(chunk)
                    if size <= settings.max_body_bytes:
                        body += chunk
                    elif size > DRAIN_BYTES:
                        break
        except ClientDisconnect as error:
            raise ClientGone from error
        except TimeoutError as error:
            message = f"the request took longer than {settings.body_seconds:g} s to arrive"
            raise ApiError(408, message, headers={"connection": "close"}) from error
        if size > settings.max_body_bytes:
            message = f"the request is larger than {settings.max_body_bytes} bytes"
            raise ApiError(413, message, code="request_too_large")
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise ApiError(415, "the request must have the content type application/json")
        return bytes(body)
