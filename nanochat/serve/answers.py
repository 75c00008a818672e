"""Replies in the format of OpenAI's API: `whole`, or streamed as `opening`, `chunks` and `closing`.

An answer belongs to one request and reads the replies of its job, which `worker.py` collects. A chunk of a chat has a
`delta` in each choice. A piece of a tool call or of its result is there as `nanochat`: {"type", "text"}, and an empty
text begins a new part. Not here: HTTP, waiting.
"""

import secrets
import time
from collections.abc import Mapping, Sequence
from typing import Any

from pydantic import BaseModel

from nanochat.data.chat import Delta, Prompt, visible_text
from nanochat.engine.generation import Token
from nanochat.serve import schema
from nanochat.serve.middleware import Settings
from nanochat.serve.worker import Job, Reply
from nanochat.tokenizer import Tokenizer

MIN_LOGPROB = -9999.0  # JSON has no minus infinity; OpenAI sends this for a token that is all but impossible
Json = dict[str, Any]


class Answer:
    """What chats and completions have in common; each kind also has `opening`, `chunks`, and `_choice` and `_note` for
    whole answers."""

    whole_type: type[BaseModel]
    object: str
    chunk_object: str
    id_prefix: str

    def __init__(self, tokenizer: Tokenizer, job: Job, settings: Settings, *, wants_usage: bool):
        self._tokenizer, self._job, self._settings, self._wants_usage = tokenizer, job, settings, wants_usage
        self._wants_logprobs = job.work.sampling.num_logprobs is not None
        self._special = frozenset(tokenizer.special_ids.values())
        self._head = {
            "id": f"{self.id_prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": settings.model_name,
            "system_fingerprint": settings.fingerprint,
        }

    def whole(self) -> BaseModel:
        choices = [self._choice(index, reply) for index, reply in enumerate(self._job.replies)]
        head = self._head | {"object": self.object, "usage": self._usage()}
        return self.whole_type(**head, **self._note(), choices=choices)

    def closing(self) -> list[Json]:
        """The chunks after the last token."""
        return [self._chunk([], usage=self._usage())] if self._wants_usage else []

    def _usage(self) -> Json:
        num_prompt = sum(map(len, self._job.work.prompts))
        num_completion = sum(reply.num_tokens for reply in self._job.replies)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": self._job.num_cached},
        }

    def _chunk(self, choices: list[Json], **more: Any) -> Json:
        usage = {"usage": None} if self._wants_usage else {}
        return self._head | {"object": self.chunk_object, "choices": choices} | usage | more

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode((token_id,))


def _sampled(tokens: Sequence[Token]) -> list[Token]:
    """Without what the tool answered, which has no probability."""
    return [token for token in tokens if token.logprob is not None]


class ChatAnswer(Answer):
    whole_type, id_prefix = schema.ChatCompletion, "chatcmpl"
    object, chunk_object = "chat.completion", "chat.completion.chunk"

    def __init__(self, *args: Any, prompt: Prompt, **options: Any):
        super().__init__(*args, **options)
        self._prompt = prompt

    def opening(self) -> list[Json]:
        """The role, and what became of the conversation."""
        delta = {"role": "assistant", "content": ""}
        chunks = [self._chunk([_chunk_choice(index, delta)]) for index in range(len(self._job.replies))]
        return [chunks[0] | self._note(), *chunks[1:]]

    def chunks(self, news: Mapping[int, Reply]) -> list[Json]:
        chunks = []
        for index, reply in news.items():
            logprobs = self._logprobs(reply.tokens)
            for delta in reply.deltas or [Delta("text", "")] * bool(logprobs and logprobs["content"]):
                is_text = delta.type == "text"
                content = {"content": delta.text} if is_text else {"content": "", "nanochat": delta._asdict()}
                chunks.append(self._chunk([_chunk_choice(index, content, logprobs)]))
                logprobs = None  # the first chunk has those of all tokens
            if reply.finish_reason is not None:
                end = _chunk_choice(index, {}, finish_reason=reply.finish_reason)
                chunks.append(self._chunk([end], **self._note()))
        return chunks

    def _choice(self, index: int, reply: Reply) -> Json:
        parts, logprobs = reply.parts, self._logprobs(reply.tokens)
        message = {"role": "assistant", "content": visible_text(parts), "nanochat": {"parts": parts}}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason}

    def _note(self) -> Json:
        used = len(self._prompt.ids) + max(reply.num_tokens for reply in self._job.replies)
        context = {"used": used, "limit": self._settings.context_len}
        return {"nanochat": {"num_dropped_messages": self._prompt.num_dropped, "context": context}}

    def _logprobs(self, tokens: Sequence[Token]) -> Json | None:
        if not self._wants_logprobs:
            return None
        content = []
        for token in _sampled(tokens):
            top = [self._described(id_, logprob) for id_, logprob in token.top]
            content.append(self._described(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content}

    def _described(self, token_id: int, logprob: float) -> Json:
        raw = None if token_id in self._special else list(self._tokenizer.decode_bytes((token_id,)))
        return {"token": self._text(token_id), "logprob": max(logprob, MIN_LOGPROB), "bytes": raw}


def _chunk_choice(index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionAnswer(Answer):
    whole_type, id_prefix = schema.Completion, "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._num_chars = [0] * len(self._job.replies)  # of the tokens described so far

    def opening(self) -> list[Json]:
        return []

    def chunks(self, news: Mapping[int, Reply]) -> list[Json]:
        choices = (self._choice(index, reply) for index, reply in news.items())
        return [self._chunk([c]) for c in choices if c["text"] or c["logprobs"] or c["finish_reason"]]

    def _note(self) -> Json:
        return {}

    def _choice(self, index: int, reply: Reply) -> Json:
        text = "".join(delta.text for delta in reply.deltas)
        logprobs = self._logprobs(index, reply.tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reply.finish_reason}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> Json | None:
        if not self._wants_logprobs:
            return None
        sampled, offsets = _sampled(tokens), []
        texts = [self._text(token.id) for token in sampled]
        for text in texts:
            offsets.append(self._num_chars[index])
            self._num_chars[index] += len(text)
        return {
            "tokens": texts,
            "token_logprobs": [max(token.logprob, MIN_LOGPROB) for token in sampled],
            "top_logprobs": [{self._text(id_): max(value, MIN_LOGPROB) for id_, value in t.top} for t in sampled],
            "text_offset": offsets,
        }
