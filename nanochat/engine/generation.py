"""Requests to the engine, their completions, and the events that add to them; `Sample` is a completion in the making.

Not here: sampling settings (`sampling.py`), how samples are scheduled (`engine.py`).
"""

import random
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from nanochat.data.chat import Delta, ReplyReader, visible_text
from nanochat.engine.sampling import Sampling
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class Token:
    """A token of a reply; `top` are the likeliest ones with their log probabilities. Forced tokens were not sampled."""

    id: int
    is_forced: bool = False
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """One sampled reply: its tokens, without the one that ended it, and its message content in `parts`.

    `finish_reason` is "stop" (end of turn, stop text), "length" (`max_tokens`, context) or None while it goes on. `end`
    is the special token that ended it, if one did.
    """

    tokens: list[Token] = field(default_factory=list)
    parts: list[dict[str, str]] = field(default_factory=list)
    finish_reason: str | None = None
    end: Token | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        """The reply's text, without tool calls and their results."""
        return visible_text(self.parts)


@dataclass(eq=False)
class Request:
    """A prompt and the completions asked for; `num_reused` tokens of the prompt were in the cache already. `logits`
    (V,) after the prompt are kept until all samples have begun. `scored` are the tokens of the prompt with their log
    probabilities, if these were asked for; the first token has none."""

    prompt: list[int]
    sampling: Sampling
    stop_ids: Collection[int]
    completions: list[Completion]
    num_reused: int = 0
    is_cancelled: bool = False
    scored: list[Token] = field(default_factory=list)
    logits: Tensor | None = None

    @property
    def is_done(self) -> bool:
        return all(completion.finish_reason for completion in self.completions)


@dataclass(frozen=True)
class Event:
    """What a step added to completion `index` of a request. `deltas` hold back text that may be the beginning of a stop
    text or an unfinished character; nothing is held back once `finish_reason` is set."""

    request: Request
    index: int
    tokens: tuple[Token, ...]
    deltas: tuple[Delta, ...]
    finish_reason: str | None


class Sample:
    """Completion `index` of a request in the making. The model has read the first `num_cached` of `tokens`, prompt and
    reply; while a decode is in flight that is all of them, and the next token is on its way."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer, seed: int):
        self.request, self.index = request, index
        self.sampling = request.sampling
        self.completion = request.completions[index]
        self.tokens = list(request.prompt)
        self.num_cached = 0
        self.slot: int | None = None
        self.copy_at: int | None = None  # number of cached tokens at which its slot is copied for later prompts
        self.reader = ReplyReader(tokenizer, request.sampling.stop)
        self.completion.parts = self.reader.parts
        self.scores_prompt = request.sampling.prompt_logprobs and index == 0
        self.reweighs = request.sampling.reweighs
        self.seen, self.counts = set(self.tokens), Counter()  # for that: tokens so far, and how often each was sampled
        self.call_start: int | None = None  # where in `tokens` the expression of an open tool call begins
        self._random = random.Random(f"{seed}/{index}")
        self._uniforms: list[float] = []

    @property
    def is_done(self) -> bool:
        return self.request.is_cancelled or self.completion.finish_reason is not None

    def uniform(self) -> float:
        """The random number, from 0 up to 1, for the position after the cached ones. Each position has its own, so that
        a dropped draw (see `Engine`) changes no later one."""
        position = self.num_cached - len(self.request.prompt)
        while len(self._uniforms) <= position:
            self._uniforms.append(self._random.random())
        return self._uniforms[position]
