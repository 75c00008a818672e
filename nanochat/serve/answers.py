"""Replies in the format of OpenAI's API: `whole`, or streamed as `opening`, `chunks` and `closing`.

An answer belongs to one request and reads the replies of its job, which `worker.py` collects. Each method returns
models of `schema.py`, ready to be sent. Not here: HTTP, waiting.
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


class Answer:
    """What chats and completions have in common."""

    object: str
    chunk_object: str
    chunk_type: type[BaseModel]

    def __init__(self, tokenizer: Tokenizer, job: Job, settings: Settings, *, wants_usage: bool):
        self._tokenizer, self._job, self._settings, self._wants_usage = tokenizer, job, settings, wants_usage
        self._wants_logprobs = job.work.sampling.num_logprobs is not None
        self._special = frozenset(tokenizer.special_ids.values())
        self._head = {
            "id": f"{'chatcmpl' if isinstance(self, ChatAnswer) else 'cmpl'}-{secrets.token_hex(12)}",
            "object": self.object,
            "created": int(time.time()),
            "model": settings.model_name,
            "system_fingerprint": settings.fingerprint,
        }

    def usage(self) -> dict[str, Any]:
        num_prompt = sum(map(len, self._job.work.prompts))
        num_completion = sum(reply.num_tokens for reply in self._job.replies)
        return {
            "prompt_tokens": num_prompt,
            "completion_tokens": num_completion,
            "total_tokens": num_prompt + num_completion,
            "prompt_tokens_details": {"cached_tokens": self._job.num_cached},
        }

    def closing(self) -> list[BaseModel]:
        return [self._chunk([], usage=self.usage())] if self._wants_usage else []

    def _chunk(self, choices: list[dict[str, Any]], **more: Any) -> BaseModel:
        usage = {"usage": None} if self._wants_usage else {}
        return self.chunk_type(**self._head | {"object": self.chunk_object} | usage | more, choices=choices)

    def _text(self, token_id: int) -> str:
        return self._tokenizer.decode((token_id,))


def _sampled(tokens: Sequence[Token]) -> list[Token]:
    """Without what the tool answered, which has no probability."""
    return [token for token in tokens if token.logprob is not None]


class ChatAnswer(Answer):
    object, chunk_object, chunk_type = "chat.completion", "chat.completion.chunk", schema.ChatChunk

    def __init__(self, *args: Any, prompt: Prompt, **options: Any):
        super().__init__(*args, **options)
        self._prompt = prompt

    def whole(self) -> schema.ChatCompletion:
        choices = []
        for index, reply in enumerate(self._job.replies):
            parts, logprobs = {"parts": reply.parts}, self._logprobs(reply.tokens)
            message = {"role": "assistant", "content": visible_text(reply.parts), "refusal": None, "nanochat": parts}
            choice = {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason}
            choices.append(choice)
        return schema.ChatCompletion(**self._head, choices=choices, usage=self.usage(), nanochat=self._note())

    def opening(self) -> list[BaseModel]:
        """What is known before the first token: the role, and what became of the conversation."""
        delta, notes = {"role": "assistant", "content": ""}, [{"nanochat": self._note()}]
        notes += [{}] * (len(self._job.replies) - 1)
        return [self._choice_chunk(index, delta, **note) for index, note in enumerate(notes)]

    def chunks(self, news: Mapping[int, Reply]) -> list[BaseModel]:
        chunks = []
        for index, reply in news.items():
            logprobs = self._logprobs(reply.tokens)
            for delta in reply.deltas or [Delta("text", "")] * bool(logprobs and logprobs["content"]):
                content = {"content": delta.text if delta.type == "text" else ""}
                extra = {} if delta.type == "text" else {"nanochat": delta._asdict()}
                chunks.append(self._choice_chunk(index, content | extra, logprobs))
                logprobs = None  # the first chunk has those of all tokens
            if reply.finish_reason is not None:
                end = self._choice_chunk(index, {}, finish_reason=reply.finish_reason, nanochat=self._note())
                chunks.append(end)
        return chunks

    def _choice_chunk(
        self, index: int, delta: dict[str, Any], logprobs: dict | None = None, finish_reason: str | None = None,
        **more: Any,
    ) -> BaseModel:  # fmt: skip
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        return self._chunk([choice], **more)

    def _note(self) -> dict[str, Any]:
        used = len(self._prompt.ids) + max(reply.num_tokens for reply in self._job.replies)
        context = {"used": used, "limit": self._settings.context_len}
        return {"num_dropped_messages": self._prompt.num_dropped, "context": context}

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        if not self._wants_logprobs:
            return None
        content = []
        for token in _sampled(tokens):
            top = [self._described(id_, logprob) for id_, logprob in token.top]
            content.append(self._described(token.id, token.logprob) | {"top_logprobs": top})
        return {"content": content}

    def _described(self, token_id: int, logprob: float) -> dict[str, Any]:
        raw = None if token_id in self._special else list(self._tokenizer.decode_bytes((token_id,)))
        return {"token": self._text(token_id), "logprob": max(logprob, MIN_LOGPROB), "bytes": raw}


class CompletionAnswer(Answer):
    object = chunk_object = "text_completion"
    chunk_type = schema.Completion

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self._num_chars = [0] * len(self._job.replies)  # of the tokens described so far

    def whole(self) -> schema.Completion:
        choices = [self._choice(index, reply) for index, reply in enumerate(self._job.replies)]
        return schema.Completion(**self._head, choices=choices, usage=self.usage())

    def opening(self) -> list[BaseModel]:
        return []

    def chunks(self, news: Mapping[int, Reply]) -> list[BaseModel]:
        choices = (self._choice(index, reply) for index, reply in news.items())
        return [self._chunk([c]) for c in choices if c["text"] or c["logprobs"] or c["finish_reason"]]

    def _choice(self, index: int, reply: Reply) -> dict[str, Any]:
        text = "".join(delta.text for delta in reply.deltas)
        logprobs = self._logprobs(index, reply.tokens)
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reply.finish_reason}

    def _logprobs(self, index: int, tokens: Sequence[Token]) -> dict[str, Any] | None:
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
