"""From the pieces that an engine gives to the answers that the API gives: whole, or chunk by chunk.

A `ChatAnswer` or `CompletionAnswer` belongs to one request. Pieces go in through `chunks`, which says what a streamed
answer adds by them, or through `add`; `whole` is the answer so far. Not here: HTTP, waiting.
"""

import secrets
import time
from collections.abc import Iterable, Sequence

from pydantic import BaseModel

from nanochat.data.chat import Delta, Prompt, visible_text
from nanochat.engine.generation import Token
from nanochat.serve import schema
from nanochat.serve.worker import Job, Piece
from nanochat.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI's value for what is all but impossible


def merged(deltas: Iterable[Delta]) -> list[Delta]:
    """The same text in fewer pieces. An empty piece of a tool part stays: it begins a new part.

    merged([("text", "a"), ("text", "b"), ("python", ""), ("python", "1")]) is
    [("text", "ab"), ("python", ""), ("python", "1")].
    """
    result: list[Delta] = []
    for delta in deltas:
        is_new_part = not delta.text and delta.type != "text"
        if result and result[-1].type == delta.type and result[-1].text and not is_new_part:
            result[-1] = Delta(delta.type, result[-1].text + delta.text)
        elif delta.text or is_new_part:
            result.append(Delta(*delta))
    return result


class _Reply:
    """One of the replies of an answer, as far as it has come."""

    def __init__(self) -> None:
        self.parts: list[dict[str, str]] = []
        self.tokens: list[Token] = []
        self.num_tokens = 0
        self.num_chars = 0  # of the tokens' texts, where log probabilities are asked for
        self.finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        for type_, text in merged(piece.deltas):
            begins_part = not text and type_ != "text"
            if begins_part or not self.parts or self.parts[-1]["type"] != type_:
                self.parts.append({"type": type_, "text": ""})
            self.parts[-1]["text"] += text
        self.tokens += piece.tokens
        self.num_tokens += piece.num_tokens
        self.finish_reason = piece.finish_reason or self.finish_reason


class _Answer:
    """What chats and completions have in common."""

    object: str
    id_prefix: str

    def __init__(
        self, tokenizer: Tokenizer, job: Job, *, model: str, fingerprint: str, wants_usage: bool, wants_logprobs: bool
    ):
        self._tokenizer, self._job = tokenizer, job
        self._wants_usage, self._wants_logprobs = wants_usage, wants_logprobs
        self._special = frozenset(tokenizer.special_ids.values())
        self.replies = [_Reply() for _ in range(job.num_replies)]
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "object": self.object,
            "created": int(time.time()),
            "model": model,
            "system_fingerprint": fingerprint,
        }

    def add(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            self.replies[piece.index].add(piece)

    @property
    def usage(self) -> schema.Usage:
        num_prompt = sum(len(prompt) for prompt in self._job.work.prompts)
        num_completion = sum(reply.num_tokens for reply in self.replies)
        return schema.Usage(
            prompt_tokens=num_prompt,
            completion_tokens=num_completion,
            total_tokens=num_prompt + num_completion,
            prompt_tokens_details=schema.CachedTokens(cached_tokens=self._job.num_cached),
        )

    def _by_reply(self, pieces: Sequence[Piece]) -> list[tuple[int, list[Piece]]]:
        by_index: dict[int, list[Piece]] = {}
        for piece in pieces:
            by_index.setdefault(piece.index, []).append(piece)
        return list(by_index.items())

    def _text_of(self, token_id: int) -> str:
        return self._tokenizer.decode((token_id,))


class ChatAnswer(_Answer):
    object = "chat.completion"
    id_prefix = "chatcmpl"

    def __init__(self, *args, prompt: Prompt, context_len: int, **options):
        super().__init__(*args, **options)
        self._prompt, self._context_len = prompt, context_len

    # --- whole ---

    def whole(self) -> schema.ChatCompletion:
        choices = []
        for index, reply in enumerate(self.replies):
            parts = schema.ReplyParts(parts=[schema.ReplyPart(**part) for part in reply.parts])
            choices.append(
                schema.ChatChoice(
                    index=index,
                    message=schema.ReplyMessage(
                        role="assistant", content=visible_text(reply.parts), refusal=None, nanochat=parts
                    ),
                    logprobs=self._logprobs(reply.tokens),
                    finish_reason=reply.finish_reason,
                )
            )
        return schema.ChatCompletion(**self._head, choices=choices, usage=self.usage, nanochat=self._note())

    # --- in chunks ---

    def opening(self) -> list[BaseModel]:
        """What is known before the first token: who speaks, and what became of the conversation."""
        delta = schema.ChatDelta(role="assistant", content="")
        chunks = [self._chunk(index, delta) for index in range(len(self.replies))]
        chunks[0].nanochat = self._note()
        return chunks

    def chunks(self, pieces: Sequence[Piece]) -> list[BaseModel]:
        """What the answer gains by `pieces`."""
        self.add(pieces)
        chunks: list[BaseModel] = []
        for index, own in self._by_reply(pieces):
            logprobs = self._logprobs([token for piece in own for token in piece.tokens])
            for delta in merged(delta for piece in own for delta in piece.deltas):
                chunks.append(self._chunk(index, _chat_delta(delta), logprobs))
                logprobs = None  # of all tokens, in the first chunk
            if logprobs and logprobs.content:
                chunks.append(self._chunk(index, schema.ChatDelta(content=""), logprobs))
            if own[-1].finish_reason is not None:
                last = self._chunk(index, schema.ChatDelta(), None, own[-1].finish_reason)
                last.nanochat = self._note()
                chunks.append(last)
        return chunks

    def closing(self) -> list[BaseModel]:
        if not self._wants_usage:
            return []
        return [schema.ChatChunk(**self._chunk_head(), choices=[], usage=self.usage)]

    def _chunk(
        self,
        index: int,
        delta: schema.ChatDelta,
        logprobs: schema.ChatLogprobs | None = None,
        finish_reason: str | None = None,
    ) -> schema.ChatChunk:
        choice = schema.ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=finish_reason)
        usage = {"usage": None} if self._wants_usage else {}
        return schema.ChatChunk(**self._chunk_head(), choices=[choice], **usage)

    def _chunk_head(self) -> dict:
        return self._head | {"object": "chat.completion.chunk"}

    # --- parts of both ---

    def _note(self) -> schema.ChatNote:
        used = len(self._prompt.ids) + max(reply.num_tokens for reply in self.replies)
        context = schema.Context(used=used, limit=self._context_len)
        return schema.ChatNote(num_dropped_messages=self._prompt.num_dropped, context=context)

    def _logprobs(self, tokens: Sequence[Token]) -> schema.ChatLogprobs | None:
        """Of the tokens that were sampled: what the tool answered has no probability."""
        if not self._wants_logprobs:
            return None
        sampled = [token for token in tokens if token.logprob is not None]
        return schema.ChatLogprobs(content=[self._token_logprob(token) for token in sampled])

    def _token_logprob(self, token: Token) -> schema.TokenLogprob:
        top = [schema.TopLogprob(**self._described(id_, logprob)) for id_, logprob in token.top]
        return schema.TokenLogprob(**self._described(token.id, token.logprob), top_logprobs=top)

    def _described(self, token_id: int, logprob: float) -> dict:
        raw = None if token_id in self._special else list(self._tokenizer.decode_bytes((token_id,)))
        return {"token": self._text_of(token_id), "logprob": max(logprob, MIN_LOGPROB), "bytes": raw}


def _chat_delta(delta: Delta) -> schema.ChatDelta:
    if delta.type == "text":
        return schema.ChatDelta(content=delta.text)
    return schema.ChatDelta(content="", nanochat=schema.ReplyPart(type=delta.type, text=delta.text))


class CompletionAnswer(_Answer):
    object = "text_completion"
    id_prefix = "cmpl"

    def whole(self) -> schema.Completion:
        choices = [
            schema.CompletionChoice(
                index=index,
                text="".join(part["text"] for part in reply.parts),
                logprobs=self._logprobs(reply, reply.tokens),
                finish_reason=reply.finish_reason,
            )
            for index, reply in enumerate(self.replies)
        ]
        return schema.Completion(**self._head, choices=choices, usage=self.usage)

    def opening(self) -> list[BaseModel]:
        return []

    def chunks(self, pieces: Sequence[Piece]) -> list[BaseModel]:
        """What the answer gains by `pieces`."""
        self.add(pieces)
        chunks: list[BaseModel] = []
        for index, own in self._by_reply(pieces):
            text = "".join(delta.text for piece in own for delta in piece.deltas)
            tokens = [token for piece in own for token in piece.tokens]
            finish_reason = own[-1].finish_reason
            if text or tokens or finish_reason is not None:
                logprobs = self._logprobs(self.replies[index], tokens)
                choice = schema.CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=finish_reason)
                usage = {"usage": None} if self._wants_usage else {}
                chunks.append(schema.Completion(**self._head, choices=[choice], **usage))
        return chunks

    def closing(self) -> list[BaseModel]:
        return [schema.Completion(**self._head, choices=[], usage=self.usage)] if self._wants_usage else []

    def _logprobs(self, reply: _Reply, tokens: Sequence[Token]) -> schema.CompletionLogprobs | None:
        if not self._wants_logprobs:
            return None
        sampled = [token for token in tokens if token.logprob is not None]
        texts = [self._text_of(token.id) for token in sampled]
        offsets = []
        for text in texts:
            offsets.append(reply.num_chars)
            reply.num_chars += len(text)
        return schema.CompletionLogprobs(
            tokens=texts,
            token_logprobs=[max(token.logprob, MIN_LOGPROB) for token in sampled],
            top_logprobs=[{self._text_of(i): max(value, MIN_LOGPROB) for i, value in t.top} for t in sampled],
            text_offset=offsets,
        )
