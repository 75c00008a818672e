"""What passes between the engine and those who ask it: requests, and what becomes of them.

Not here: how to sample (`sampling.py`), how replies come about (`engine.py`).
"""

from collections.abc import Collection
from dataclasses import dataclass, field

from torch import Tensor

from nanochat.data.chat import Delta, visible_text
from nanochat.engine.sampling import Sampling


@dataclass(frozen=True)
class Token:
    """A token of a reply; `top` are the likeliest with their log probabilities. Forced tokens were not sampled."""

    id: int
    is_forced: bool = False
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """A sample's reply: its tokens, without the one that ended it, and its message content in `parts`.

    `finish_reason` is "stop" (end of turn, stop text), "length" (`max_tokens`, context) or None while it goes on.
    """

    tokens: list[Token] = field(default_factory=list)
    parts: list[dict[str, str]] = field(default_factory=list)
    finish_reason: str | None = None

    @property
    def ids(self) -> list[int]:
        return [token.id for token in self.tokens]

    @property
    def text(self) -> str:
        """What it says, without tool calls and their results."""
        return visible_text(self.parts)


@dataclass(eq=False)
class Request:
    """A prompt and the samples asked for; `num_reused` tokens of the prompt were in the cache already. `logits` (V,)
    after the prompt are kept until all samples have begun."""

    prompt: list[int]
    sampling: Sampling
    stop_ids: Collection[int]
    completions: list[Completion]
    num_reused: int = 0
    is_cancelled: bool = False
    logits: Tensor | None = None

    @property
    def is_done(self) -> bool:
        return all(completion.finish_reason for completion in self.completions)


@dataclass(frozen=True)
class Event:
    """What a step added to sample `index` of a request. `deltas` hold back text that may be the beginning of a stop
    text or an unfinished character; they are complete when `finish_reason` is set."""

    request: Request
    index: int
    tokens: tuple[Token, ...]
    deltas: tuple[Delta, ...]
    finish_reason: str | None
