"""Replies in the format of OpenAI's API: `whole`, or streamed as `opening`, `chunks` and `closing`.

An answer belongs to one request and reads the replies of its job, which `worker.py` collects. A chunk of a chat has a
`delta` in each choice. A piece of a tool call or of its result is there as `nanochat`: {"type", "text"}, and an empty
text begins a new part. Not here: HTTP, waiting.
"""

import codecs
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
    """What chats and completions have in common. Each kind also has `chunks`, `_choice` for a reply of a whole answer,
    and `_describe` for the log probabilities of the tokens of a reply."""

    whole_type: type[BaseModel]
    object: str
    chunk_object: str
    id_prefix: str

    def __init__(self, tokenizer: Tokenizer, job: Job, settings: Settings, *, wants_usage: bool):
        self._tokenizer, self._job, self._settings, self._wants_usage = tokenizer, job, settings, wants_usage
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

    def opening(self) -> list[Json]:
        """The chunks before the first token."""
        return []

    def closing(self) -> list[Json]:
        """The chunks after the last token."""
        return [self._chunk([], usage=self._usage())] if self._wants_usage else []

    def _note(self) -> Json:
        """What an answer has besides OpenAI's fields."""
        return {}

    def _usage(self) -> Json:
        num_prompt = sum(map(len, self._job.work.prompts))
        num_completion = sum(reply.num_tokens for reply in self._job.replies)
        total, details = num_prompt + num_completion, {"cached_tokens": self._job.num_cached}
        counts = {"prompt_tokens": num_prompt, "completion_tokens": num_completion, "total_tokens": total}
        return counts | {"prompt_tokens_details": details}

    def _chunk(self, choices: list[Json], **more: Any) -> Json:
        usage = {"usage": None} if self._wants_usage else {}
        return self._head | {"object": self.chunk_object, "choices": choices} | usage | more

    def _logprobs(self, index: int, reply: Reply) -> Json | None:
        """None when they were not requested."""
        if self._job.work.sampling.num_logprobs is None:
            return None
        return self._describe(index, [token for token in reply.tokens if not token.is_forced])


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
            logprobs = self._logprobs(index, reply)
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
        parts, logprobs = reply.parts, self._logprobs(index, reply)
        message = {"role": "assistant", "content": visible_text(parts), "nanochat": {"parts": parts}}
        return {"index": index, "message": message, "logprobs": logprobs, "finish_reason": reply.finish_reason}

    def _note(self) -> Json:
        used = len(self._prompt.ids) + max(reply.num_tokens for reply in self._job.replies)
        context = {"used": used, "limit": self._settings.context_len}
        return {"nanochat": {"num_dropped_messages": self._prompt.num_dropped, "context": context}}

    def _describe(self, _: int, tokens: Sequence[Token]) -> Json:
        def entry(token_id: int, logprob: float) -> Json:
            raw = None if token_id in self._special else list(self._tokenizer.decode_bytes((token_id,)))
            text = self._tokenizer.decode((token_id,))
            return {"token": text, "logprob": max(logprob, MIN_LOGPROB), "bytes": raw}

        ends = self._tokenizer.stop_ids
        tokens = [token for token in tokens if token.id not in ends]
        return {"content": [entry(t.id, t.logprob) | {"top_logprobs": [entry(*top) for top in t.top]} for t in tokens]}


def _chunk_choice(index: int, delta: Json, logprobs: Json | None = None, finish_reason: str | None = None) -> Json:
    return {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}


class CompletionAnswer(Answer):
    """With `echo`, each reply begins with its prompt. Special tokens are in the log probabilities, but not in texts."""

    whole_type, id_prefix = schema.Completion, "cmpl"
    object = chunk_object = "text_completion"

    def __init__(self, *args: Any, echo: bool = False, **options: Any):
        super().__init__(*args, **options)
        self._to_echo = set(range(len(self._job.replies))) if echo else set()
        self._lengths = [_Length(self._tokenizer) for _ in self._job.replies]

    def chunks(self, news: Mapping[int, Reply]) -> list[Json]:
        choices = (self._choice(index, reply) for index, reply in news.items())
        return [self._chunk([c]) for c in choices if c["text"] or c["logprobs"] or c["finish_reason"]]

    def _choice(self, index: int, reply: Reply) -> Json:
        text = "".join(delta.text for delta in reply.deltas)
        if index not in self._to_echo:
            logprobs = self._logprobs(index, reply)
        else:
            self._to_echo.remove(index)
            number = index // self._job.work.num_samples
            logprobs = self._logprobs(index, Reply(tokens=list(self._job.scored[number])))
            prompt = (token for token in self._job.work.prompts[number] if token not in self._special)
            text = self._tokenizer.decode(prompt) + text
            self._lengths[index].end()  # a prompt may end within a character
            if logprobs is not None:
                for name, values in self._logprobs(index, reply).items():
                    logprobs[name] += values
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reply.finish_reason}

    def _describe(self, index: int, tokens: Sequence[Token]) -> Json:
        return {
            "tokens": [self._name(token.id) for token in tokens],
            "token_logprobs": [None if t.logprob is None else max(t.logprob, MIN_LOGPROB) for t in tokens],
            "top_logprobs": [None if t.logprob is None else self._top(t) for t in tokens],
            "text_offset": [self._lengths[index].add(token.id) for token in tokens],
        }

    def _top(self, token: Token) -> dict[str, float]:
        """The likeliest tokens, and always the one that is there."""
        return {self._name(id_): max(value, MIN_LOGPROB) for id_, value in (*token.top, (token.id, token.logprob))}

    def _name(self, token_id: int) -> str:
        """A token's text or, as at OpenAI, its bytes where these are no text: what is a key must not be ambiguous."""
        raw = self._tokenizer.decode_bytes((token_id,))
        try:
            return raw.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class _Length:
    """Counts the characters of a text, which is given token by token."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._special = tokenizer, frozenset(tokenizer.special_ids.values())
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._num_chars = 0

    def add(self, token_id: int) -> int:
        """Where in the text a token begins: after the characters that were complete before it."""
        before = self._num_chars
        if token_id not in self._special:
            self._num_chars += len(self._decoder.decode(self._tokenizer.decode_bytes((token_id,))))
        return before

    def end(self) -> None:
        """Count what is left of an unfinished character."""
        self._num_chars += len(self._decoder.decode(b"", final=True))
