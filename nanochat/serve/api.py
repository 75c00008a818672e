"""The chat server as a FastAPI application: OpenAI's API for chats and completions, the page, health and metrics.

`create_app` takes a pool of engines (`worker.py`), a tokenizer and `Settings`. Prompts are built by `chat.py`, as
everywhere. Not here: flags, running the server.
"""

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncIterator, Iterable
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from prometheus_client import generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.types import Receive, Scope, Send

from nanochat.common import UserError
from nanochat.data.chat import Prompt, prompt_limit, render_for_completion
from nanochat.engine.sampling import CHAT_TEMPERATURE, CHAT_TOP_K
from nanochat.serve import schema
from nanochat.serve.answers import Answer, ChatAnswer, CompletionAnswer
from nanochat.serve.errors import ApiError, ClientGone, as_api_error
from nanochat.serve.messages import Checked, Turns, ignored_fields, join_turns
from nanochat.serve.middleware import IGNORED_HEADER, AccessLog, Gate, Metrics, Settings, page_policy, read_page
from nanochat.serve.worker import LOADING_RETRY_SECONDS, Job, Pool
from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

PAGE_PATH = Path(__file__).with_name("ui.html")
_to_json = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
MODEL_NAMES = (None, "", "default", "nanochat")  # by which the served model is known beside its own
MAX_NAMED, MAX_NAME_CHARS, MAX_NAMES_KEPT = 16, 64, 256  # of ignored fields: in a header; of each; in the log
HEALTH_MESSAGES = {"ok": "", "loading": "the model is being loaded", "failed": "see the server's log"}


def create_app(pool: Pool, tokenizer: Tokenizer, settings: Settings, *, page_path: Path = PAGE_PATH) -> FastAPI:
    """The application; it starts and closes `pool`. Raises `UserError` when the page cannot be read."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await pool.start()
        try:
            yield
        finally:
            await pool.close()

    app = FastAPI(title="nanochat", docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan)
    html, metrics, created = read_page(page_path), Metrics(pool), int(time.time())
    policy = page_policy(html)
    server = _Server(pool, tokenizer, settings, metrics)

    app.add_middleware(Gate, settings=settings)
    if settings.cors_origins:
        allowed = {"allow_methods": ["GET", "POST"], "allow_headers": ["authorization", "content-type"],
                   "expose_headers": [IGNORED_HEADER]}  # fmt: skip
        app.add_middleware(CORSMiddleware, allow_origins=list(settings.cors_origins), **allowed)
    app.add_middleware(AccessLog, metrics=metrics)
    for kind in (ApiError, UserError, HTTPException, RequestValidationError):
        app.add_exception_handler(kind, _error_response)

    # for the description of the API: `Gate` checks the key, `_error_response` builds the errors
    key = {"dependencies": [Depends(HTTPBearer(auto_error=False))]} if settings.api_key else {}
    errors = {status: {"model": schema.ErrorBody} for status in ("4XX", "5XX")}
    text = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}
    about = 'the `data` of each event is a chunk of the answer as JSON; the last one is "[DONE]"'
    event = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"], "description": about}
    stream = {200: {"content": {"text/event-stream": {"schema": event}}}}

    @app.api_route("/", methods=["GET", "HEAD"], include_in_schema=False)
    async def page() -> HTMLResponse:
        return HTMLResponse(html, headers={"content-security-policy": policy})

    @app.get("/health", responses={status: {"model": schema.Health} for status in (200, 503)})
    async def health() -> JSONResponse:
        """Whether the model can answer."""
        state, active = pool.state, pool.num_active
        counts = {"active": active, "waiting": pool.num_replies - active}
        body = {"status": state, "model": settings.model_name, "message": HEALTH_MESSAGES[state], **counts}
        headers = {"retry-after": str(LOADING_RETRY_SECONDS)} if state == "loading" else {}
        return JSONResponse(body, 200 if state == "ok" else 503, headers)

    @app.get("/metrics", response_class=Response, responses=text | errors, **key)
    async def prometheus() -> Response:
        """Metrics for Prometheus."""
        return PlainTextResponse(generate_latest(metrics.registry))

    @app.get("/v1/models", responses=errors, **key)
    async def models() -> schema.ModelList:
        """The one model that is served."""
        facts = schema.ModelFacts(
            context=settings.context_len, max_tokens=settings.reply_limit, stage=settings.stage, step=settings.step,
            parameters=settings.parameters, temperature=CHAT_TEMPERATURE, top_k=CHAT_TOP_K,
            examples=list(settings.examples),
        )  # fmt: skip
        return schema.ModelList(data=[schema.ModelCard(id=settings.model_name, created=created, nanochat=facts)])

    @app.get("/v1/models/{model:path}", responses=errors, **key)
    async def model(model: str) -> schema.ModelCard:
        server.check_model(model)
        return (await models()).data[0]

    post = {"methods": ["POST"], "responses": stream | errors, **key}
    app.add_api_route("/v1/chat/completions", server.chat, response_model=schema.ChatCompletion, **post)
    app.add_api_route("/v1/completions", server.completion, response_model=schema.Completion, **post)
    post |= {"responses": errors}
    app.add_api_route("/tokenize", server.tokenize, response_model=schema.TokenizeAnswer, **post)
    app.add_api_route("/detokenize", server.detokenize, response_model=schema.DetokenizeAnswer, **post)
    return app


async def _error_response(_: Request, error: Exception) -> Response:
    return as_api_error(error).response()


@dataclass
class _Server:
    """The routes that take a request with a body."""

    pool: Pool
    tokenizer: Tokenizer
    settings: Settings
    metrics: Metrics
    named: set[str] = field(default_factory=set)  # ignored fields that are in the log already

    async def chat(self, body: schema.ChatRequest, request: Request) -> Response:
        """The assistant's next reply in a conversation, or the rest of its last one."""
        log = self._check(body, request, num_prompts=1)
        sampling = body.sampling(self.settings.reply_limit)
        prompt = await asyncio.to_thread(self._render, body.turns, sampling.max_tokens)
        log["num_dropped"] = prompt.num_dropped
        if self.settings.log_texts:
            log["messages"] = body.turns.messages
        job = self.pool.submit([prompt.ids], sampling, num_samples=body.n or 1)
        return await self._respond(body, request, job, ChatAnswer, prompt=prompt)

    async def completion(self, body: schema.CompletionRequest, request: Request) -> Response:
        """The continuation of a text."""
        log = self._check(body, request, num_prompts=len(body.prompts))
        sampling = body.sampling(self.settings.reply_limit)
        prompts = await asyncio.to_thread(self._encode, body.prompts)
        if self.settings.log_texts:
            log["prompts"] = body.prompts
        job = self.pool.submit(prompts, sampling, num_samples=body.n or 1)
        return await self._respond(body, request, job, CompletionAnswer, echo=bool(body.echo))

    async def tokenize(self, body: schema.TokenizeRequest, request: Request) -> Response:
        """The token ids of a text, or of messages as a chat request has them."""
        self._admit(body, request)
        return await asyncio.to_thread(self._tokenize, body)

    async def detokenize(self, body: schema.DetokenizeRequest, request: Request) -> Response:
        """The text of token ids."""
        self._admit(body, request)
        self._check_ids(body.tokens, "tokens")
        return _json_response(schema.DetokenizeAnswer(prompt=self.tokenizer.decode(body.tokens)))

    def check_model(self, name: str | None) -> None:
        if name not in (*MODEL_NAMES, self.settings.model_name):
            message = f"the model {name!r} does not exist; this server has {self.settings.model_name!r}"
            raise ApiError(404, message, code="model_not_found", param="model")

    def _check(self, body: schema.SamplingFields, request: Request, *, num_prompts: int) -> dict[str, Any]:
        """The request's log line, to add to. Raises `ApiError` for what can be refused before encoding."""
        self._admit(body, request)
        self._check_ids(map(int, body.logit_bias or ()), "logit_bias")
        num_replies, limit = num_prompts * (body.n or 1), self.settings.max_replies
        if num_replies > limit:
            message = f"the request asks for {num_replies} replies; the limit is {limit} per request"
            raise ApiError(400, message, param="n")
        self.pool.check_room(num_replies)
        request.scope["log"]["stream"] = bool(body.stream)
        return request.scope["log"]

    def _admit(self, body: Checked, request: Request) -> None:
        """Check the model's name, and name the fields that are ignored: in a header, and once in the log."""
        self.check_model(body.model)
        names = [re.sub(r"[^\w.-]", "?", name, flags=re.A)[:MAX_NAME_CHARS] or "?" for name in ignored_fields(body)]
        if names:
            named = names[:MAX_NAMED] + ["..."] * (len(names) > MAX_NAMED)
            request.scope["log"]["ignored"] = ", ".join(named)
            new = [name for name in dict.fromkeys(names[:MAX_NAMED]) if name not in self.named]
            if new and len(self.named) < MAX_NAMES_KEPT:
                self.named.update(new)
                logger.warning("fields of requests that have no effect here: %s", ", ".join(new))

    def _check_ids(self, ids: Iterable[int], param: str) -> None:
        if (largest := max(ids, default=0)) >= self.tokenizer.vocab_size:
            message = f"token id {largest} is outside the vocabulary of {self.tokenizer.vocab_size}"
            raise ApiError(400, message, param=param)

    def _render(self, turns: Turns, max_tokens: int) -> Prompt:
        """The prompt, with room for the reply, and how many of the messages sent did not fit. Raises `ApiError` for a
        conversation that is too long."""
        limit = prompt_limit(self.settings.context_len, max_tokens)
        try:
            prompt = render_for_completion(self.tokenizer, turns.conversation, max_tokens=limit)
        except UserError as error:
            raise ApiError(400, str(error), code="context_length_exceeded", param="messages") from error
        return Prompt(prompt.ids, sum(turns.sizes[: prompt.num_dropped]))

    def _tokenize(self, body: schema.TokenizeRequest) -> Response:
        if body.messages is not None:
            conversation, opens = join_turns(body.messages).conversation, body.add_generation_prompt
            tokens = render_for_completion(self.tokenizer, conversation, opens=opens).ids
        else:
            tokens = [self.tokenizer.bos_id] * body.add_special_tokens + self.tokenizer.encode(body.prompt)
        texts = [self.tokenizer.decode((token,)) for token in tokens] if body.return_token_strs else None
        sizes = {"count": len(tokens), "max_model_len": self.settings.context_len}
        return _json_response(schema.TokenizeAnswer(**sizes, tokens=tokens, token_strs=texts))

    def _encode(self, prompts: Iterable[str | list[int]]) -> list[list[int]]:
        """Token ids of the prompts. Raises `ApiError` for one that is too long or has unknown ids."""
        limit = self.settings.context_len
        encoded = [[self.tokenizer.bos_id, *self.tokenizer.encode(p)] if isinstance(p, str) else p for p in prompts]
        for ids in encoded:
            if len(ids) > limit:
                message = f"the prompt has {len(ids)} tokens, but only {limit} fit"
                raise ApiError(400, message, code="context_length_exceeded", param="prompt")
            self._check_ids(ids, "prompt")
        return encoded

    async def _respond(
        self, body: schema.SamplingFields, request: Request, job: Job, kind: type[Answer], **options: Any
    ) -> Response:
        wants_usage = body.stream_options is not None and body.stream_options.include_usage
        answer = kind(self.tokenizer, job, self.settings, wants_usage=wants_usage, **options)
        if body.stream:
            headers = {"x-accel-buffering": "no"}
            return EventStream(self._events(request, job, answer), headers=headers, media_type="text/event-stream")
        async with self._attended(request, job):
            while await job.next_news():
                pass
        # in a thread: log probabilities of a whole batch of prompts take a second, in which other streams go on
        return await asyncio.to_thread(lambda: _json_response(answer.whole()))

    async def _events(self, request: Request, job: Job, answer: Answer) -> AsyncIterator[str]:
        """A streamed answer; events of the same engine step are yielded, and so sent, together."""
        async with self._attended(request, job):
            try:
                yield _as_events(answer.opening())
                while news := await job.next_news():
                    yield _as_events(answer.chunks(news))
                yield _as_events(answer.closing()) + "data: [DONE]\n\n"
            except ClientGone:
                pass
            except ApiError as error:
                request.scope["log"]["error"] = error.code or "refused"
                yield f"data: {error.json}\n\n"

    @asynccontextmanager
    async def _attended(self, request: Request, job: Job) -> AsyncIterator[None]:
        """Cancels the job when its client leaves, and at the end in any case; then records what it did."""

        async def cancel_when_gone() -> None:
            while (await request.receive())["type"] != "http.disconnect":
                pass
            self.pool.cancel(job)

        watcher = asyncio.create_task(cancel_when_gone())
        try:
            yield
        finally:
            watcher.cancel()
            self.pool.cancel(job)
            self._record(job, request.scope["log"])

    def _record(self, job: Job, log: dict[str, Any]) -> None:
        """Add a finished job to log and metrics."""
        log["prompt_tokens"] = sum(map(len, job.work.prompts))
        log["completion_tokens"] = sum(reply.num_tokens for reply in job.replies)
        log["cached_tokens"] = job.num_cached
        log["finish_reasons"] = [reply.finish_reason for reply in job.replies]
        if self.settings.log_texts:
            log["replies"] = [reply.parts for reply in job.replies]
        for kind in ("prompt", "completion", "cached"):
            self.metrics.tokens.labels(kind).inc(log[f"{kind}_tokens"])
        if isinstance(job.failure, ClientGone):
            log["disconnected"] = True
            self.metrics.disconnects.inc()
        if job.first_token_time is not None:
            log["first_token_seconds"] = round(job.first_token_time - job.started, 4)
            self.metrics.first_token_seconds.observe(job.first_token_time - job.started)
            num_steps = max(reply.num_tokens for reply in job.replies) - 1
            if num_steps > 0:
                self.metrics.token_seconds.observe((job.last_token_time - job.first_token_time) / num_steps)


def _json_response(answer: BaseModel) -> Response:
    return Response(answer.model_dump_json(), media_type="application/json")


def _as_events(chunks: Iterable[dict[str, Any]]) -> str:
    return "".join(f"data: {_to_json(chunk)}\n\n" for chunk in chunks)


class EventStream(StreamingResponse):
    """Server-sent events. Unlike its base class it reads nothing from the client, which the generator of the events
    does, and it always closes the generator before it returns."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self.body_iterator):
            await self.stream_response(send)
