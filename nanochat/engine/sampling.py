"""Sampling settings, and the draw: one token for each row of logits.

The steps have a fixed order, and each works on the result of the one before: repetition penalty, the other penalties
and the bias, temperature, top-k, top-p, min-p. A row is drawn with one uniform number of its own sequence, so that a
seed gives the same tokens whatever else is in the batch.
"""

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from nanochat.common import UserError

CHAT_TEMPERATURE, CHAT_TOP_K = 0.6, 50  # of the terminal chat and the page, where their user asks for nothing else
MAX_STOPS = 16
MAX_BIAS = 100.0  # of a logit, up or down: beyond, a token is certain or impossible anyway
MIN_TEMPERATURE = 1e-4  # lower ones are practically greedy, and dividing logits by them would overflow
_LIMITS = {  # smallest and largest value of each number, and its type
    "max_tokens": (1, math.inf, int),
    "temperature": (0.0, 100.0, float),
    "top_k": (0, math.inf, int),
    "top_p": (0.0, 1.0, float),
    "min_p": (0.0, 1.0, float),
    "repetition_penalty": (0.01, 100.0, float),
    "frequency_penalty": (-2.0, 2.0, float),
    "presence_penalty": (-2.0, 2.0, float),
    "seed": (-(2**63), 2**64, int),
    "num_logprobs": (0, 100, int),
}


@dataclass(frozen=True)
class Sampling:
    """How a reply is sampled. Checked on construction: `UserError` names the field and its value.

    max_tokens: tokens to generate, a tool's answers included; the context is a further bound. 0 for
    `prompt_logprobs` alone.
    temperature: 0 is greedy. top_k: None, 0 and anything from the vocabulary's size on keep all tokens.
    top_p: keeps the likeliest tokens that together have this probability (arXiv 1904.09751).
    min_p: keeps tokens with at least this share of the likeliest one's probability (arXiv 2407.01082).
    repetition_penalty: divides the logits of tokens that occurred, or multiplies negative ones (arXiv 1909.05858).
    frequency_penalty, presence_penalty: what a token's logit loses for each time, and for any time, it was sampled.
    logit_bias: pairs of a token id and what is added to its logit, from -100 (never) to 100 (nothing else).
    seed: None draws one. stop: texts that end the reply and are not part of it.
    num_logprobs: None for no log probabilities; otherwise those of the tokens and of this many likeliest ones. They are
    the model's own, whatever the settings. prompt_logprobs: whether also those of the prompt's tokens.
    use_tool: whether tool calls are answered; if so, only the tool writes tool answers.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    stop: tuple[str, ...] = ()
    num_logprobs: int | None = None
    prompt_logprobs: bool = False
    use_tool: bool = True

    def __post_init__(self):
        optional = {field.name for field in fields(self) if field.default is None}
        for name, (low, high, kind) in _LIMITS.items():
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
            low = 0 if name == "max_tokens" and self.prompt_logprobs else low
            if not is_number or not low <= value <= high:
                limit = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise UserError(f"{name} must be {'a whole' if kind is int else 'a'} number {limit}, not {value!r}")
        if not isinstance(self.stop, tuple) or not all(isinstance(text, str) and text for text in self.stop):
            raise UserError(f"stop must be texts that are not empty, not {self.stop!r}")
        if len(self.stop) > MAX_STOPS:
            raise UserError(f"stop must be at most {MAX_STOPS} texts, not {len(self.stop)}")
        for token, bias in self.logit_bias:
            if not -MAX_BIAS <= bias <= MAX_BIAS:
                raise UserError(f"logit_bias of token {token} must be from -{MAX_BIAS:g} to {MAX_BIAS:g}, not {bias!r}")

    @property
    def reweighs(self) -> bool:
        """Whether logits change before the draw, by what was said before or a bias (see `reweigh_`)."""
        has_penalty = self.repetition_penalty != 1.0 or self.frequency_penalty or self.presence_penalty
        return bool(has_penalty or self.logit_bias)


@dataclass(frozen=True)
class Drawing:
    """How the rows of a batch are drawn: `columns` (6, N) float32 are temperature, top-k (the vocabulary's size for
    all), top-p, min-p, random number, and 1 for rows that must not draw `barred` tokens.

    `is_random` and `num_ordered` say what has to be computed at all: a draw, and how many of the likeliest tokens have
    to be sorted (0: no row is filtered). Many batches share them, and so share a recorded CUDA graph.
    """

    columns: Tensor
    is_random: bool
    num_ordered: int
    barred: tuple[int, ...]

    @property
    def kind(self) -> tuple:
        return self.is_random, self.num_ordered, self.barred


def plan_draw(
    rows: Sequence[Sampling], uniforms: Sequence[float], vocab_size: int, barred: tuple[int, ...] = ()
) -> Drawing:
    """The drawing of `rows`, on the CPU. `uniforms` has a number from 0 up to 1 for each, which greedy rows do not use;
    `barred` are the tokens that rows with a tool must not draw."""
    top_k = [min(row.top_k or vocab_size, vocab_size) for row in rows]
    table = [
        (row.temperature, k, row.top_p, row.min_p, uniform, row.use_tool)
        for row, k, uniform in zip(rows, top_k, uniforms, strict=True)
    ]
    filtered = [k for t, k, top_p, min_p, *_ in table if t > 0 and (k < vocab_size or top_p < 1 or min_p > 0)]
    # rounded up to a power of two, so that common settings need few recorded graphs
    num_ordered = min(vocab_size, 1 << (max(filtered) - 1).bit_length()) if filtered else 0
    columns = torch.tensor(table, dtype=torch.float32).T.contiguous()
    return Drawing(columns, any(row.temperature > 0 for row in rows), num_ordered, barred)


def draw(logits: Tensor, columns: Tensor, kind: tuple) -> Tensor:
    """A token for each row, (N,) int64, from logits (N, V) float32, which are not changed; `columns` (6, N) on their
    device, and `kind`, are those of a `Drawing`. Nothing here waits for the device."""
    is_random, num_ordered, barred = kind
    temperature, top_k, top_p, min_p, uniform, has_tool = columns.unsqueeze(-1)  # (N, 1) each
    if barred:
        logits = logits.clone()
        for token in barred:
            column = logits[:, token : token + 1]
            column.copy_(torch.where(has_tool > 0, -math.inf, column))
    greedy = logits.argmax(dim=-1)
    if not is_random:
        return greedy
    scaled = logits / temperature.clamp(min=MIN_TEMPERATURE)
    drawn = _inverse(torch.softmax(scaled, dim=-1), uniform)
    if num_ordered:
        is_filtered = ((top_k < logits.size(-1)) | (top_p < 1) | (min_p > 0)).squeeze(-1)
        drawn = torch.where(is_filtered, draw_filtered(scaled, num_ordered, top_k, top_p, min_p, uniform), drawn)
    return torch.where(temperature.squeeze(-1) > 0, drawn, greedy)


def draw_filtered(logits: Tensor, num_ordered: int, top_k, top_p, min_p, uniform) -> Tensor:
    """Draws among the tokens that top-k, top-p and min-p, (N, 1) each, keep, in the order of their likelihood."""
    order_all = num_ordered == logits.size(-1)
    ordered, ids = logits.sort(dim=-1, descending=True) if order_all else logits.topk(num_ordered, dim=-1)
    rank = torch.arange(num_ordered, device=logits.device)
    probs = torch.softmax(ordered.masked_fill(rank >= top_k, -math.inf), dim=-1)  # (N, K)
    above = probs.cumsum(dim=-1) - probs  # the probability of all likelier tokens
    kept = ((above < top_p) & (probs >= min_p * probs[:, :1])) | (rank == 0)
    return ids.gather(1, _inverse(probs * kept, uniform).unsqueeze(-1)).squeeze(-1)


def _inverse(weights: Tensor, uniform: Tensor) -> Tensor:
    """The first index at which the running sum of weights (n, K) exceeds the share `uniform` (n, 1) of the total: (n,)
    int64. The sum is in float64: over a large vocabulary float32 would lose the unlikely tokens."""
    cumulative = weights.double().cumsum(dim=-1) if weights.device.type != "mps" else weights.cumsum(dim=-1)
    places = torch.searchsorted(cumulative, uniform.to(cumulative.dtype) * cumulative[:, -1:], right=True)
    last = (weights > 0).long().cumsum(dim=-1).argmax(dim=-1, keepdim=True)  # rounding can go past the end
    return torch.minimum(places, last).squeeze(-1)


def reweigh_(logits: Tensor, sampling: Sampling, seen: Collection[int], counts: Mapping[int, int]) -> None:
    """Apply penalties and bias to logits (V,), in place. `seen` are the tokens that occurred, also in the prompt, and
    `counts` says how often each was sampled."""
    if sampling.repetition_penalty != 1.0:
        ids = torch.tensor(sorted(seen), dtype=torch.int64, device=logits.device)
        values = logits[ids]
        penalty = sampling.repetition_penalty
        logits[ids] = torch.where(values > 0, values / penalty, values * penalty)
    shifts = Counter(dict(sampling.logit_bias))
    if sampling.frequency_penalty or sampling.presence_penalty:
        for token, count in counts.items():
            shifts[token] -= count * sampling.frequency_penalty + sampling.presence_penalty
    if shifts:
        ids, values = torch.tensor(list(shifts), dtype=torch.int64), torch.tensor(list(shifts.values()))
        logits[ids.to(logits.device)] += values.to(logits.device, logits.dtype)


def log_probabilities(logits: Tensor, ids: Tensor, num_top: int) -> list[Tensor]:
    """Of tokens ids (N,), each drawn from a row of logits (N, V): the log probability (N,) float32, and those of the
    likeliest tokens with their ids, (N, min(num_top, V)) each."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return [logprobs.gather(1, ids.unsqueeze(1)).squeeze(1), *logprobs.topk(min(num_top, logprobs.size(1)))]
