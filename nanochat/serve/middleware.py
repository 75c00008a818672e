"""What stands between the network and the routes: who may ask, how much at once, what is logged and counted.

Plain ASGI middleware around the application of `server.py`, outermost first: `AccessLog`, `Guard`, `BodyLimit`.
Errors have the shape of OpenAI's API wherever they come from. Not here: routes, prompts, engines.
"""

import asyncio
import base64
import hashlib
import hmac
import ipaddress
import json
import logging
import secrets
import time
import traceback
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = logging.getLogger(__name__)
access_logger = logging.getLogger("nanochat.access")

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")
PUBLIC_PATHS = ("/", "/health")  # answered without a key
DRAIN_BYTES = 1 << 26  # of a body that is too large, this much is read and thrown away, so that the answer is read
ROLES = ("system", "developer", "user", "assistant")
CLIENT_GONE = 499  # in log and metrics, where a client left before it had an answer (as nginx has it)

SECURITY_HEADERS = {
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
}


class ApiError(Exception):
    """Ends a request with an error that its sender is told."""

    def __init__(
        self, status: int, message: str, *, code: str | None = None, param: str | None = None, retry_seconds: int = 0
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_seconds = retry_seconds

    @property
    def body(self) -> dict[str, Any]:
        """In the shape of OpenAI's API."""
        types = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        type_ = types.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": type_, "param": self.param, "code": self.code}}

    def response(self, headers: dict[str, str] | None = None) -> Response:
        # ASCII only: a message may quote a lone surrogate, which has no UTF-8
        headers = dict(headers or {})
        if self.retry_seconds:
            headers["retry-after"] = str(self.retry_seconds)
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(json.dumps(self.body), self.status, headers, media_type="application/json")


def validation_error(errors: Sequence[dict[str, Any]]) -> ApiError:
    """What a client is told when its request does not fit the schema, from pydantic's list of faults.

    Where a value may be of several kinds there is a fault for each: the one that lies deepest is of the kind meant.
    """
    error = max(errors, key=lambda error: len(error["loc"]))
    param, kind, context = _param(error["loc"][1:]), error["type"], error.get("ctx", {})
    if kind == "json_invalid":
        return ApiError(400, f"the request is not valid JSON: {context.get('error', '')}")
    if kind == "extra_forbidden":
        message = f"{param} is no field of this request"
    elif kind == "none_required" or (kind == "too_long" and context["max_length"] == 0):
        message = f"{param} is not supported here"
    elif kind == "union_tag_invalid":
        param = f"{param}.role"
        message = f"{param} is unknown; known are {context['expected_tags']}"
    else:
        message = f"{param or 'the request'}: {error['msg']}"
    return ApiError(400, message, param=param or None)


def _param(path: Sequence[str | int]) -> str:
    """A place in a request: of ("messages", 0, "user", "content", "list[TextPart]", 1) it is "messages[0].content[1]".

    Alternatives that were tried stand in the path by name, and are left out.
    """
    param, before = "", None
    for step in path:
        if isinstance(step, int):
            param += f"[{step}]"
        elif step.isidentifier() and step != "str" and not (step in ROLES and isinstance(before, int)):
            param += f".{step}" if param else step
        before = step
    return param


# --- the page ------------------------------------------------------------------------------------


def page_policy(html: str) -> str:
    """A content security policy for a page: its own inline scripts and styles by their hashes, requests to its own
    server, nothing else."""
    finder = _InlineBlocks()
    finder.feed(html)
    finder.close()
    hashes = {tag: "".join(f" '{_hash(text)}'" for text in texts) or " 'none'" for tag, texts in finder.texts.items()}
    return (
        f"default-src 'none'; script-src{hashes['script']}; style-src{hashes['style']}; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


class _InlineBlocks(HTMLParser):
    """Collects what stands between <script> and </script>, <style> and </style>."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=False)
        self.texts: dict[str, list[str]] = {"script": [], "style": []}
        self._inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in self.texts:
            self._inside = tag
            self.texts[tag].append("")

    def handle_endtag(self, tag: str) -> None:
        if tag == self._inside:
            self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[self._inside][-1] += data


# --- log and metrics -----------------------------------------------------------------------------


class AccessLog:
    """One JSON line in the logger `nanochat.access` per request, security headers, and an answer to what went wrong.

    Handlers add to the line through `scope["log"]`. Clients stand in it as a keyed hash of their address that changes
    with every start: requests of one client can be told together, but not where they came from. `observe` gets route,
    status and seconds of every request.
    """

    def __init__(self, app: ASGIApp, *, observe: Callable[[str, int, float], None]):
        self._app, self._observe = app, observe
        self._key = secrets.token_bytes(16)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        start, status = time.perf_counter(), 0
        request_id = f"req-{secrets.token_hex(12)}"
        scope["log"] = log = {}

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self._app(scope, receive, send_with_headers)
        except Exception as error:
            # where it happened, but not the message, which may quote what the client sent
            logger.error("%s in\n%s", type(error).__name__, "".join(traceback.format_tb(error.__traceback__)))
            log["error"] = type(error).__name__
            if not status:
                await ApiError(500, "the server failed; its log says where").response()(
                    scope, receive, send_with_headers
                )
        finally:
            seconds = time.perf_counter() - start
            route = _route_of(scope)
            status = status or CLIENT_GONE
            self._observe(route, status, seconds)
            line = {
                "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
                "id": request_id,
                "client": self._client_hash(scope),
                "method": scope["method"],
                "route": route,
                "status": status,
                "seconds": round(seconds, 4),
                **log,
            }
            access_logger.info(json.dumps(line))

    def _client_hash(self, scope: Scope) -> str:
        address = scope["client"][0] if scope.get("client") else ""
        return hmac.new(self._key, address.encode(), hashlib.sha256).hexdigest()[:12]


def _route_of(scope: Scope) -> str:
    """The pattern of the path, "other" for what is no route: paths may hold anything, and have no end."""
    return getattr(scope.get("route"), "path", "other")


# --- who may ask ---------------------------------------------------------------------------------


class Guard:
    """Turns away who has not the key (`api_key`, None: no key), pages of other hosts, and names that are not ours.

    The last two protect a server on loopback from web pages in its user's browser: a page may send a request to
    127.0.0.1, and with a host name of its own that leads there even read the answer. Pages at `cors_origins` ("*": all)
    may ask. `allowed_hosts` are the names under which the server may be called; none: any.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None,
        allowed_hosts: tuple[str, ...] = (),
        cors_origins: tuple[str, ...] = (),
    ):
        self._app = app
        self._key = None if api_key is None else api_key.encode()
        self._allowed_hosts, self._cors_origins = frozenset(allowed_hosts), frozenset(cors_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = self._refusal(scope) if scope["type"] == "http" else None
        await (error.response() if error else self._app)(scope, receive, send)

    def _refusal(self, scope: Scope) -> ApiError | None:
        headers = Headers(scope=scope)
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._allowed_hosts and _without_port(host) not in self._allowed_hosts:
            return ApiError(403, "this server does not answer to this host name", code="unknown_host")
        is_foreign = origin is not None and _netloc(origin) != host
        if is_foreign and not {origin, "*"} & self._cors_origins:
            return ApiError(403, "pages of other origins may not use this server", code="foreign_origin")
        if self._key is None or scope["path"] in PUBLIC_PATHS:
            return None
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and hmac.compare_digest(key.strip().encode("latin-1"), self._key):
            return None
        fault = "the API key is wrong" if key else "an API key is needed, as the header Authorization: Bearer KEY"
        return ApiError(401, fault, code="invalid_api_key")


def _without_port(host: str) -> str:
    name, colon, port = host.rpartition(":")
    return (name if colon and port.isdigit() else host).lower()


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return ""


def is_loopback(host: str) -> bool:
    """Whether `host`, an address or a name to listen on, can only be reached from this machine."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


# --- how much at once ----------------------------------------------------------------------------


class BodyLimit:
    """Reads the body of a request before anything else sees it: at most `max_bytes` within `max_seconds`, JSON only."""

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_seconds: float):
        self._app, self._max_bytes, self._max_seconds = app, max_bytes, max_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] not in ("POST", "PUT", "PATCH"):
            await self._app(scope, receive, send)
            return
        try:
            async with asyncio.timeout(self._max_seconds):
                body = await self._read(scope, receive)
        except TimeoutError:
            error = ApiError(408, f"the request took longer than {self._max_seconds:g} s to arrive")
            await error.response({"connection": "close"})(scope, receive, send)
        except ApiError as error:
            await error.response()(scope, receive, send)
        else:
            if body is not None:
                await self._app(scope, _replayed(body, receive), send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        """The body, None when the client has gone. Raises `ApiError` for one that is too large or no JSON."""
        chunks, size, more = [], 0, True
        while more and size <= DRAIN_BYTES:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            chunk, more = message.get("body", b""), message.get("more_body", False)
            size += len(chunk)
            if size <= self._max_bytes:
                chunks.append(chunk)
        if size > self._max_bytes:
            raise ApiError(413, f"the request is larger than {self._max_bytes} bytes", code="request_too_large")
        media_type = Headers(scope=scope).get("content-type", "").partition(";")[0].strip().lower()
        if media_type != "application/json":
            raise ApiError(415, "the request must have the content type application/json")
        return b"".join(chunks)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the whole body first; after it, what comes from the client."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
