"""An engine without a model, with the interface of the real one: what it answers stands in the question.

count 5      1 2 3 4 5, a word or so per step
tool         a tool call with its result, and text around it
crash        the step raises an error
refuse       the request is not taken
other text   the same text
"""

import re
import time
from collections import deque
from collections.abc import Sequence

from nanochat.common import UserError
from nanochat.data.chat import ReplyReader
from nanochat.engine.engine import Stats
from nanochat.engine.generation import Completion, Event, Request, Token
from nanochat.engine.sampling import Sampling
from nanochat.tokenizer import Tokenizer


class FakeEngine:
    def __init__(self, tokenizer: Tokenizer, *, max_rows: int = 4, step_seconds: float = 0.0, context: int = 256):
        self.tokenizer, self.max_rows, self.step_seconds, self.context = tokenizer, max_rows, step_seconds, context
        self.stats = Stats()
        self._active: list[_Row] = []
        self._waiting: deque[_Row] = deque()

    def submit(self, prompt: Sequence[int], sampling: Sampling, *, num_samples: int = 1, stop_ids=None) -> Request:
        question = self._question(prompt)
        if question == "refuse":
            raise UserError("the engine refuses this prompt")
        request = Request(list(prompt), sampling, (), [Completion() for _ in range(num_samples)], num_reused=1)
        if sampling.prompt_logprobs:
            request.scored = [Token(prompt[0]), *(self.describe(token, sampling) for token in prompt[1:])]
        self._waiting.extend(_Row(self, request, index, question) for index in range(num_samples))
        return request

    def cancel(self, request: Request) -> None:
        request.is_cancelled = True
        self._active = [row for row in self._active if row.request is not request]
        self._waiting = deque(row for row in self._waiting if row.request is not request)

    has_work = property(lambda self: bool(self._active or self._waiting))
    num_active = property(lambda self: len(self._active))
    num_waiting = property(lambda self: len(self._waiting))

    def step(self) -> list[Event]:
        time.sleep(self.step_seconds)
        while self._waiting and len(self._active) < self.max_rows:
            self._active.append(self._waiting.popleft())
            self.stats.prefill_tokens += len(self._active[-1].request.prompt)
        events = [row.step() for row in self._active]
        self.stats.decode_tokens += len(events)
        self.stats.decode_steps += 1
        self._active = [row for row in self._active if row.completion.finish_reason is None]
        return events

    def _question(self, prompt: Sequence[int]) -> str:
        """The last user message; of a plain text, all of it."""
        special, ids = self.tokenizer.special_ids, list(prompt)
        if special["<|user_start|>"] in ids:
            start = len(ids) - ids[::-1].index(special["<|user_start|>"])
            ids = ids[start : ids.index(special["<|user_end|>"], start)]
        return self.tokenizer.decode(token for token in ids if token != self.tokenizer.bos_id)

    def describe(self, token: int, sampling: Sampling) -> Token:
        """A token with made-up log probabilities, where these are asked for."""
        if sampling.num_logprobs is None:
            return Token(token)
        logprob = -0.25 * (1 + token % 8)
        return Token(token, False, logprob, tuple((token - i, logprob - i) for i in range(sampling.num_logprobs)))

    def reply_ids(self, question: str) -> list[int]:
        encode, special = self.tokenizer.encode, self.tokenizer.special_ids
        if question == "tool":
            call = [special["<|python_start|>"], *encode("2*3"), special["<|python_end|>"]]
            result = [special["<|output_start|>"], *encode("6"), special["<|output_end|>"]]
            return [*encode("Let me see: "), *call, *result, *encode(" it is.")]
        count = re.fullmatch(r"count (\d+)", question)
        return encode(" ".join(str(n) for n in range(1, int(count[1]) + 1)) if count else question)


class _Row:
    """A sample on its way."""

    def __init__(self, engine: FakeEngine, request: Request, index: int, question: str):
        self.request, self.index, self.question, self._engine = request, index, question, engine
        self.completion = request.completions[index]
        self._ids = deque(engine.reply_ids(question))
        self._room = min(request.sampling.max_tokens, engine.context + 1 - len(request.prompt))
        self._reader = ReplyReader(engine.tokenizer, request.sampling.stop)
        self.completion.parts = self._reader.parts

    def step(self) -> Event:
        if self.question == "crash":
            raise RuntimeError("a fault in the engine, as asked for")
        completion, added, sampling = self.completion, [], self.request.sampling
        if self._ids and self._room:
            added.append(self._engine.describe(self._ids.popleft(), sampling))
            completion.tokens += added
        if len(completion.tokens) == self._room:
            completion.finish_reason = "length"
        elif not added:
            completion.finish_reason = "stop"
            completion.end = self._engine.describe(self._engine.tokenizer.special_id("<|assistant_end|>"), sampling)
        deltas = self._reader.add(token.id for token in added)
        if self._reader.is_stopped:
            completion.finish_reason = "stop"
        elif completion.finish_reason:
            deltas += self._reader.finish()
        return Event(self.request, self.index, tuple(added), tuple(deltas), completion.finish_reason)
