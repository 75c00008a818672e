"""The chat server as a FastAPI application: OpenAI's API for chats and completions, the page, health and metrics.

`create_app` takes a pool of engines (`server_worker.py`), a tokenizer and settings. Prompts are built by `chat.py`
like everywhere else. Requests and answers are described in `server_schema.py`, limits and log in `server_http.py`.
Not here: flags, `uvicorn.run`.
"""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response
from fastapi.security import HTTPBearer
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from nanochat.common import UserError
from nanochat.data import chat
from nanochat.engine.sampling import Sampling
from nanochat.serve import schema
from nanochat.serve.answers import ChatAnswer, CompletionAnswer
from nanochat.serve.middleware import (
    CLIENT_GONE,
    LOOPBACK_HOSTS,
    AccessLog,
    ApiError,
    BodyLimit,
    Guard,
    page_policy,
    validation_error,
)
from nanochat.serve.prometheus import Metrics
from nanochat.serve.worker import ClientGone, Job, NotReady, Pool, QueueFull, WorkerLost
from nanochat.tokenizer import Tokenizer

PAGE_PATH = Path(__file__).with_name("ui.html")
LOADING_RETRY_SECONDS = 2
QUEUE_RETRY_SECONDS = 1
REPLY_ROOM_FRAC = 0.25  # of the context: a long conversation is shortened until a reply of that length fits behind it
MIN_KEY_CHARS = 8

Answer = ChatAnswer | CompletionAnswer
Write = Callable[[Sequence[str | BaseModel]], Awaitable[None]]  # sends events: texts, or chunks of an answer


@dataclass(frozen=True)
class Settings:
    """What a server is told at its start. `UserError` names a value that makes no sense."""

    model_name: str  # the id that clients know the model by
    context_len: int  # of the model, in tokens
    fingerprint: str = ""  # tells apart what may answer differently to the same request
    max_tokens: int = 0  # the longest reply that may be asked for, 0: as long as the context
    max_replies: int = 16  # of one request: n, times the number of prompts
    max_body_bytes: int = 1 << 20
    body_seconds: float = 30.0  # within which a request must have arrived
    api_key: str | None = None
    allowed_hosts: tuple[str, ...] = LOOPBACK_HOSTS  # names the server answers to, none: any
    cors_origins: tuple[str, ...] = ()  # pages of other hosts that may use it
    log_texts: bool = False  # put prompts and replies in the access log

    def __post_init__(self):
        for name in ("context_len", "max_replies", "max_body_bytes", "body_seconds"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be more than 0, not {getattr(self, name)}")
        if self.max_tokens < 0:
            raise UserError(f"max_tokens must be at least 0, not {self.max_tokens}")
        if self.api_key is not None and (not self.api_key.isascii() or not self.api_key.isprintable()):
            raise UserError("the API key must consist of printable ASCII characters")
        if self.api_key is not None and len(self.api_key.strip()) < MIN_KEY_CHARS:
            raise UserError(f"the API key must have at least {MIN_KEY_CHARS} characters")

    @property
    def reply_limit(self) -> int:
        return min(self.max_tokens or self.context_len, self.context_len)


def create_app(pool: Pool, tokenizer: Tokenizer, settings: Settings, *, page_path: Path = PAGE_PATH) -> FastAPI:
    """The application; `pool` is started and closed with it. Raises `UserError` when the page cannot be read."""
    metrics = Metrics(lambda: pool.workers)
    api = _Api(pool, tokenizer, settings, metrics, page_path)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.close()

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, max_seconds=settings.body_seconds)
    names = {"allowed_hosts": settings.allowed_hosts, "cors_origins": settings.cors_origins}
    app.add_middleware(Guard, api_key=settings.api_key, **names)
    if settings.cors_origins:
        allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"]}
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origins), **allowed)
    app.add_middleware(AccessLog, observe=metrics.observe_request)
    for kind in (ApiError, UserError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _error_response)
    _add_routes(app, api, settings)
    return app


def _add_routes(app: FastAPI, api: "_Api", settings: Settings) -> None:
    errors = {status: {"model": schema.ErrorBody} for status in ("4XX", "5XX")}
    error_body = {"application/json": {"schema": {"$ref": "#/components/schemas/ErrorBody"}}}  # of a route with texts
    text_errors = {status: {"description": "Error", "content": error_body} for status in errors}
    # checked by `Guard`; here for the description of the API
    key = {"dependencies": [Depends(HTTPBearer(auto_error=False))]} if settings.api_key else {}
    about = 'each event has in `data` a chunk of the answer as JSON, the last one "[DONE]"'
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"], "description": about}
    stream = {200: {"content": {"text/event-stream": {"schema": event}}}}
    add = app.add_api_route
    add("/", api.page, methods=["GET", "HEAD"], include_in_schema=False)
    health = {status: {"model": schema.Health} for status in (200, 503)}
    add("/health", api.health, methods=["GET"], response_model=schema.Health, responses=health)
    add("/metrics", api.metrics, response_class=PlainTextResponse, responses=text_errors, **key)
    add("/v1/models", api.models, response_model=schema.ModelList, responses=errors, **key)
    add("/v1/models/{model}", api.model, response_model=schema.ModelCard, responses=errors, **key)
    for path, answer, body in (
        ("/v1/chat/completions", api.answer_chat, schema.ChatCompletion),
        ("/v1/completions", api.answer_completion, schema.Completion),
    ):
        add(path, answer, methods=["POST"], response_model=body, responses=stream | errors, **key)


# --- routes --------------------------------------------------------------------------------------


class _Api:
    """The routes."""

    def __init__(self, pool: Pool, tokenizer: Tokenizer, settings: Settings, metrics: Metrics, page_path: Path):
        self._pool, self._tokenizer, self._settings, self._metrics = pool, tokenizer, settings, metrics
        try:
            self._page = page_path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the chat page {page_path}: {error}") from error
        self._page_policy = page_policy(self._page)
        self._created = int(time.time())

    async def page(self) -> HTMLResponse:
        return HTMLResponse(self._page, headers={"content-security-policy": self._page_policy})

    async def health(self) -> JSONResponse:
        """Whether the model can answer."""
        state = self._pool.state
        messages = {"loading": "the model is being loaded", "failed": "the model could not be loaded: see the log"}
        num_active = self._pool.num_active
        body = {
            "status": state,
            "model": self._settings.model_name,
            "message": messages.get(state, ""),
            "active": num_active,
            "waiting": self._pool.num_replies - num_active,
        }
        headers = {"retry-after": str(LOADING_RETRY_SECONDS)} if state == "loading" else {}
        return JSONResponse(body, 200 if state == "ok" else 503, headers)

    async def metrics(self) -> Response:
        """Figures for Prometheus."""
        return PlainTextResponse(self._metrics.text())

    async def models(self) -> schema.ModelList:
        """The models served: one."""
        return schema.ModelList(data=[self._card()])

    async def model(self, model: str) -> schema.ModelCard:
        self._check_model(model)
        return self._card()

    async def answer_chat(self, body: schema.ChatRequest, request: Request) -> Response:
        """The assistant's next reply in a conversation, or the rest of its last one."""
        log = self._begin(body, request, body.num_samples)
        sampling = body.sampling(self._settings.reply_limit)
        prompt = await asyncio.to_thread(self._render, body.conversation, sampling.max_tokens)
        if self._settings.log_texts:
            log["messages"] = body.conversation["messages"]
        log["num_dropped"] = prompt.num_dropped
        job = self._submit([prompt.ids], sampling, body.num_samples)
        options = self._answer_options(body) | {"prompt": prompt, "context_len": self._settings.context_len}
        return await self._respond(request, job, ChatAnswer(self._tokenizer, job, **options), bool(body.stream))

    async def answer_completion(self, body: schema.CompletionRequest, request: Request) -> Response:
        """How the model would go on with a text."""
        log = self._begin(body, request, body.num_samples * len(body.prompts))
        sampling = body.sampling(self._settings.reply_limit)
        prompts = await asyncio.to_thread(self._encode, body.prompts)
        if self._settings.log_texts:
            log["prompts"] = body.prompts
        job = self._submit(prompts, sampling, body.num_samples)
        answer = CompletionAnswer(self._tokenizer, job, **self._answer_options(body))
        return await self._respond(request, job, answer, bool(body.stream))

    # --- before the answer ---

    def _begin(self, body: schema.SamplingFields, request: Request, num_replies: int) -> dict[str, Any]:
        """The request's line of the access log. Raises `ApiError` for what can be refused without a closer look."""
        self._check_model(body.model)
        if body.stream_options is not None and not body.stream:
            raise ApiError(400, "stream_options is for streamed answers only", param="stream_options")
        limit = self._settings.max_replies
        if num_replies > limit:
            raise ApiError(400, f"{num_replies} replies are asked for, at most {limit} are given at once", param="n")
        with _pool_errors():
            self._pool.check_room(num_replies)
        request.scope["log"]["stream"] = bool(body.stream)
        return request.scope["log"]

    def _check_model(self, name: str | None) -> None:
        if name is not None and name != self._settings.model_name:
            message = f"the model {name!r} is not served here; there is {self._settings.model_name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def _render(self, conversation: chat.Conversation, max_tokens: int) -> chat.Prompt:
        """The prompt, with room for the reply behind it. Raises `ApiError` for a conversation not in order."""
        context_len = self._settings.context_len
        room = max(1, min(max_tokens, int(context_len * REPLY_ROOM_FRAC)))
        try:
            chat.check_conversation(conversation)
        except UserError as error:
            raise ApiError(400, str(error), param="messages") from error
        try:
            return chat.render_for_completion(self._tokenizer, conversation, max_tokens=context_len - room)
        except UserError as error:
            raise ApiError(400, str(error), code="context_length_exceeded", param="messages") from error

    def _encode(self, prompts: list[str | list[int]]) -> list[list[int]]:
        """Texts to ids. Raises `ApiError` for a prompt that does not fit, or is none."""
        limit, vocab_size = self._settings.context_len, self._tokenizer.vocab_size
        result = []
        for prompt in prompts:
            ids = [self._tokenizer.bos_id, *self._tokenizer.encode(prompt)] if isinstance(prompt, str) else prompt
            if len(ids) > limit:
                message = f"the prompt has {len(ids)} tokens, but only {limit} fit"
                raise ApiError(400, message, code="context_length_exceeded", param="prompt")
            if max(ids) >= vocab_size:
                message = f"token id {max(ids)} is outside the vocabulary of {vocab_size}"
                raise ApiError(400, message, param="prompt")
            result.append(ids)
        return result

    def _submit(self, prompts: list[list[int]], sampling: Sampling, num_samples: int) -> Job:
        with _pool_errors():
            return self._pool.submit(prompts, sampling, num_samples=num_samples)

    # --- the answer ---

    def _answer_options(self, body: schema.SamplingFields) -> dict[str, Any]:
        return {
            "model": self._settings.model_name,
            "fingerprint": self._settings.fingerprint,
            "wants_usage": body.wants_usage,
            "wants_logprobs": body.wants_logprobs,
        }

    async def _respond(self, request: Request, job: Job, answer: Answer, stream: bool) -> Response:
        if stream:
            return EventStream(lambda receive, write: self._stream(receive, write, job, answer, request.scope["log"]))
        async with self._attended(job, answer, request.receive, request.scope["log"]):
            try:
                while pieces := await job.next_pieces():
                    answer.add(pieces)
            except ClientGone:
                return Response(status_code=CLIENT_GONE)
            except WorkerLost as error:
                raise _lost(error) from error
        return Response(answer.whole().model_dump_json(), media_type="application/json")

    async def _stream(self, receive: Receive, write: Write, job: Job, answer: Answer, log: dict[str, Any]) -> None:
        async with self._attended(job, answer, receive, log):
            try:
                await write(answer.opening())
                while pieces := await job.next_pieces():
                    await write(answer.chunks(pieces))
                await write(answer.closing())
                await write(["[DONE]"])
            except ClientGone:
                return
            except (WorkerLost, UserError) as error:
                log["error"] = type(error).__name__
                failure = _lost(error) if isinstance(error, WorkerLost) else ApiError(400, str(error))
                await write([json.dumps(failure.body)])

    @asynccontextmanager
    async def _attended(self, job: Job, answer: Answer, receive: Receive, log: dict[str, Any]) -> AsyncIterator[None]:
        """While the block runs, a client that leaves ends the job; after it, so does whatever else ended the block."""
        watcher = asyncio.create_task(self._cancel_when_gone(job, receive))
        try:
            yield
        finally:
            watcher.cancel()
            if not job.is_over:
                self._pool.cancel(job)
            self._record(job, answer, log)

    async def _cancel_when_gone(self, job: Job, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        self._pool.cancel(job)

    def _record(self, job: Job, answer: Answer, log: dict[str, Any]) -> None:
        """A finished job in the log and the metrics."""
        usage, metrics = answer.usage, self._metrics
        log["prompt_tokens"], log["completion_tokens"] = usage.prompt_tokens, usage.completion_tokens
        log["cached_tokens"] = job.num_cached
        log["finish_reasons"] = [reply.finish_reason for reply in answer.replies]
        if self._settings.log_texts:
            log["replies"] = [reply.parts for reply in answer.replies]
        for kind in ("prompt", "completion", "cached"):
            metrics.tokens.labels(kind).inc(log[f"{kind}_tokens"])
        if job.is_cancelled:
            log["disconnected"] = True
            metrics.disconnects.inc()
        if job.first_token_time is not None:
            log["first_token_seconds"] = round(job.first_token_time - job.started, 4)
            metrics.first_token_seconds.observe(job.first_token_time - job.started)
            num_steps = max(reply.num_tokens for reply in answer.replies) - 1
            if num_steps > 0:
                metrics.token_seconds.observe((job.last_token_time - job.first_token_time) / num_steps)

    def _card(self) -> schema.ModelCard:
        note = schema.ModelNote(context=self._settings.context_len, max_tokens=self._settings.reply_limit)
        return schema.ModelCard(id=self._settings.model_name, created=self._created, nanochat=note)


class EventStream(Response):
    """Server-sent events, written by `produce(receive, write)` as they come."""

    def __init__(self, produce: Callable[[Receive, Write], Awaitable[None]]):
        super().__init__(media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        del self.headers["content-length"]
        self._produce = produce

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})

        async def write(events: Sequence[str | BaseModel]) -> None:
            texts = [e if isinstance(e, str) else e.model_dump_json(exclude_unset=True) for e in events]
            if texts:
                body = "".join(f"data: {text}\n\n" for text in texts).encode()
                await send({"type": "http.response.body", "body": body, "more_body": True})

        await self._produce(receive, write)
        await send({"type": "http.response.body", "body": b"", "more_body": False})


# --- errors --------------------------------------------------------------------------------------


@contextmanager
def _pool_errors() -> Iterator[None]:
    """Turn a pool's refusal into what the client is told."""
    try:
        yield
    except QueueFull as error:
        message = "too many requests are waiting already; try again in a moment"
        raise ApiError(429, message, code="queue_full", retry_seconds=QUEUE_RETRY_SECONDS) from error
    except NotReady as error:
        if error.state == "loading":
            message = "the model is being loaded; try again in a moment"
            raise ApiError(503, message, code="model_loading", retry_seconds=LOADING_RETRY_SECONDS) from error
        if error.state == "closing":
            raise ApiError(503, "the server is shutting down", code="shutting_down") from error
        raise ApiError(503, "the model could not be loaded", code="worker_failed") from error


def _lost(error: WorkerLost) -> ApiError:
    return ApiError(503, f"{error}; try again in a moment", code="worker_failed", retry_seconds=LOADING_RETRY_SECONDS)


async def _error_response(_: Request, error: Exception) -> Response:
    """An exception as the client gets to see it."""
    if isinstance(error, ApiError):
        return error.response()
    if isinstance(error, RequestValidationError):
        return validation_error(error.errors()).response()
    if not isinstance(error, HTTPException):
        return ApiError(400, str(error)).response()
    messages = {
        400: "the request is no JSON text in UTF-8",
        404: "there is no such path here",
        405: "this path does not take this method",
    }
    message = messages.get(error.status_code, str(error.detail))
    return ApiError(error.status_code, message).response(error.headers)
