"""What to sample with, and the draw: one token for each row of logits.

The order is fixed and each step works on what the one before it left: repetition penalty, temperature, top-k, top-p,
min-p. A row is drawn by one uniform number of its own sequence, so that a seed gives the same tokens whatever other
sequences share the batch.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nanochat.common import UserError

MAX_STOPS = 16
MIN_TEMPERATURE = 1e-4  # below it all but greedy, and logits over it would overflow
_LIMITS = {  # of each number, inclusive, and what it must be
    "max_tokens": (1, math.inf, int),
    "temperature": (0.0, 100.0, float),
    "top_k": (0, math.inf, int),
    "top_p": (0.0, 1.0, float),
    "min_p": (0.0, 1.0, float),
    "repetition_penalty": (0.01, 100.0, float),
    "seed": (-(2**63), 2**64, int),
    "num_logprobs": (0, 100, int),
}


@dataclass(frozen=True)
class Sampling:
    """How a sequence goes on. Checked on construction: `UserError` names the field and its value.

    max_tokens: tokens to generate, those of a tool's answers included; the context bounds them as well.
    temperature: 0 is greedy. top_k: None, 0 or the vocabulary's size and more leave all tokens.
    top_p: the likeliest tokens that together have this probability (arXiv 1904.09751).
    min_p: tokens at least this share as likely as the likeliest (arXiv 2407.01082).
    repetition_penalty: divides the logits of tokens that occurred, or multiplies negative ones (arXiv 1909.05858).
    seed: None draws one. stop: texts that end the answer and are not part of it.
    num_logprobs: None for no log probabilities; else those of the tokens and of this many likeliest ones.
    use_tool: whether tool calls are answered; if so, only the tool writes tool answers.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    use_tool: bool = True

    def __post_init__(self):
        optional = {field.name for field in fields(self) if field.default is None}
        for name, (low, high, kind) in _LIMITS.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            if not is_number or not low <= value <= high:
                limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"{name} must be {'a whole' if kind is int else 'a'} number {limit}, not {value!r}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop must be texts that are not empty, not {self.stop!r}")
        if len(self.stop) > MAX_STOPS:
            raise UserError(f"stop must be at most {MAX_STOPS} texts, not {len(self.stop)}")

    @property
    def is_filtered(self) -> bool:
        return bool(self.top_k) or self.top_p < 1.0 or self.min_p > 0.0


@torch.no_grad()
def draw(logits: Tensor, rows: Sequence[Sampling], uniforms: Sequence[float]) -> Tensor:
    """A token for each row: (N,) int64 on the device of logits (N, V) float32.

    `uniforms` has a number from 0 up to 1 for each row; greedy rows do not use theirs.
    """
    ids = logits.argmax(dim=-1)
    for is_filtered in (False, True):
        chosen = [i for i, row in enumerate(rows) if row.temperature > 0 and row.is_filtered == is_filtered]
        if not chosen:
            continue
        device = logits.device
        part = logits if len(chosen) == len(rows) else logits[torch.tensor(chosen, device=device)]
        settings = [rows[i] for i in chosen]
        columns = [[row.temperature for row in settings], [uniforms[i] for i in chosen]]
        temperature, uniform = torch.tensor(columns, dtype=torch.float32).to(device).unsqueeze(-1)  # (n, 1) each
        pick = _draw_filtered if is_filtered else _draw_freely
        drawn = pick(part / temperature.clamp(min=MIN_TEMPERATURE), settings, uniform)
        ids = drawn if len(chosen) == len(rows) else ids.index_copy(0, torch.tensor(chosen, device=device), drawn)
    return ids


def _draw_freely(logits: Tensor, rows: Sequence[Sampling], uniform: Tensor) -> Tensor:
    return _inverse(torch.softmax(logits, dim=-1), uniform)


def _draw_filtered(logits: Tensor, rows: Sequence[Sampling], uniform: Tensor) -> Tensor:
    """Draws among the tokens that top-k, top-p and min-p leave, in the order of their likelihood."""
    V, device = logits.size(-1), logits.device
    limits = [min(row.top_k or V, V) for row in rows]
    ordered, ids = torch.topk(logits, max(limits), dim=-1) if max(limits) < V else logits.sort(dim=-1, descending=True)
    top_k = torch.tensor(limits, device=device).unsqueeze(-1)
    rank = torch.arange(ordered.size(-1), device=device)
    probs = torch.softmax(ordered.masked_fill(rank >= top_k, -math.inf), dim=-1)  # (n, K)
    columns = [[row.top_p for row in rows], [row.min_p for row in rows]]
    top_p, min_p = torch.tensor(columns, dtype=torch.float32).to(device).unsqueeze(-1)
    above = probs.cumsum(dim=-1) - probs  # the probability of all likelier tokens
    kept = ((above < top_p) & (probs >= min_p * probs[:, :1])) | (rank == 0)
    return ids.gather(1, _inverse(probs * kept, uniform).unsqueeze(-1)).squeeze(-1)


def _inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first place at which the running sum of weights (n, K) passes that share (n, 1) of the whole: (n,) int64.

    The sum runs in float64: over a large vocabulary float32 would lose the unlikely tokens.
    """
    cumulative = weights.double().cumsum(dim=-1) if weights.device.type != "mps" else weights.cumsum(dim=-1)
    places = torch.searchsorted(cumulative, uniform.to(cumulative.dtype) * cumulative[:, -1:], right=True)
    last = (weights > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)  # rounding can pass the end
    return torch.minimum(places, last).squeeze(-1)


def penalize_(logits: Tensor, seen: Iterable[int], penalty: float) -> None:
    """Make the tokens `seen` less likely in logits (V,), in place; more likely for a penalty below 1."""
    ids = torch.tensor(sorted(seen), dtype=torch.int64, device=logits.device)
    values = logits[ids]
    logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
