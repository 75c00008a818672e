"""Bits per byte of a model, and samples of what it writes, while and after it trains.

Bits per byte is the loss in a unit that does not depend on the vocabulary: the information the model needs for a text,
divided by the text's length in UTF-8. Not here: in-context tasks (`core_eval.py`) and fast sampling (the engine).
"""

import math
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Runtime
from nanochat.data.dataloader import TextLoader
from nanochat.model.gpt import IGNORE_INDEX

# Plain beginnings that a base model can continue: facts, a procedure, a story, a little arithmetic.
SAMPLE_PROMPTS = (
    "The largest planet in the solar system is",
    "Water freezes when its temperature",
    "The first president of the United States was",
    "To make a cup of tea, you first",
    "Once upon a time, in a village by the sea,",
    "The opposite of cold is",
    "If a box holds three apples and I add two more, it holds",
)


@dataclass(frozen=True)
class BpbResult:
    """`bpb` in bits per byte (inf when there were no bytes) and its standard error `se`; the `nats`, `bytes` and
    `tokens` of the text, in which special and ignored tokens do not count."""

    bpb: float
    se: float
    nats: float
    bytes: int
    tokens: int


@torch.no_grad()
def evaluate_bpb(model, batches: Iterable, token_bytes: np.ndarray | Tensor) -> BpbResult:
    """Bits per byte of `model` on all of `batches`, summed over the ranks of a process group.

    model: called as `model(idx, targets, reduction="none")`, giving nats, (B, T) float32.
    batches: each with `idx` and `targets`, (B, T) int64 on the model's device; ranks may have different numbers.
    token_bytes: (V,) int, the UTF-8 length of each token; 0 marks special tokens, which count neither nats nor bytes.

    Without a single byte `bpb` is inf, worse than every model. The standard error is that of a ratio of sums over rows,
    taken as independent draws (W. G. Cochran, Sampling Techniques, 1977, section 6.3); inf for fewer than two rows.
    """
    lengths = torch.as_tensor(token_bytes, device=model.device).long()  # (V,)
    rows = []
    for batch in batches:
        losses = model(batch.idx, batch.targets, reduction="none")  # (B, T)
        num_bytes = lengths[batch.targets.clamp(min=0)].masked_fill(batch.targets == IGNORE_INDEX, 0)  # (B, T)
        counted = num_bytes > 0
        rows.append((losses.float().masked_fill(~counted, 0).sum(1), num_bytes.sum(1), counted.sum(1)))
    # One value per row stays on the device and is read once at the end, so the host never waits inside the loop.
    columns = zip(*rows, strict=True) if rows else [[torch.zeros(0)]] * 3
    row_nats, row_bytes, row_tokens = (torch.cat(column).cpu().double() for column in columns)
    totals = [row_nats.sum(), row_bytes.sum(), row_tokens.sum(), (row_bytes > 0).sum().double()]
    sums = torch.stack([*totals, row_nats @ row_nats, row_nats @ row_bytes, row_bytes @ row_bytes])
    if dist.is_initialized():
        sums = sums.to(model.device)
        dist.all_reduce(sums)
    nats_sum, bytes_sum, tokens_sum, count, nats_nats, nats_bytes, bytes_bytes = sums.tolist()
    if not bytes_sum:
        return BpbResult(math.inf, math.inf, nats_sum, 0, 0)
    rate = nats_sum / bytes_sum
    squares = max(0.0, nats_nats - 2 * rate * nats_bytes + rate**2 * bytes_bytes)  # squared residuals of the rows
    se = math.sqrt(squares * count / (count - 1)) / bytes_sum if count > 1 else math.inf
    return BpbResult(rate / math.log(2), se / math.log(2), nats_sum, int(bytes_sum), int(tokens_sum))


def evaluate_split(model, tokenizer, paths: list[Path], runtime: Runtime, batch_size: int, num_tokens=0) -> BpbResult:
    """Bits per byte of `model` on the documents of the shards `paths`: on their first `num_tokens` tokens, rounded up
    to whole batches of `batch_size` rows on every rank, or with 0 on each token of every document once."""
    T, ranks = model.config.sequence_len, {"rank": runtime.rank, "world_size": runtime.world_size}
    num_batches = math.ceil(num_tokens / (batch_size * T * runtime.world_size)) or None
    with closing(TextLoader(tokenizer, paths, batch_size, T, **ranks, device=runtime.device, epochs=1)) as loader:
        return evaluate_bpb(model, islice(loader, num_batches), tokenizer.token_bytes())


@torch.no_grad()
def sample_completions(
    model, tokenizer, prompts: Iterable[str], max_tokens: int, *,
    temperature: float = 0.0, generator: torch.Generator | None = None,
) -> list[str]:  # fmt: skip
    """The model's continuation of each prompt: text of at most `max_tokens` tokens, without the prompt.

    All prompts run as one batch of whole forward passes, without a cache, which is fast enough for a few short samples.
    A row ends at the next beginning-of-sequence token (a new document) or when the context is full. A prompt that fills
    the context loses its beginning, so that one token can follow. `temperature` 0 is greedy; otherwise draws come from
    `generator`, on the CPU.
    """
    limit = model.config.sequence_len
    rows = [[tokenizer.bos_id, *tokenizer.encode(prompt)[-(limit - 1) :]] for prompt in prompts]
    starts = list(map(len, rows))
    active = list(range(len(rows)))
    for _ in range(max_tokens):
        if not active:
            break
        last = [len(rows[i]) - 1 for i in active]  # the padding on the right cannot be seen from there
        T = max(last) + 1
        idx = torch.tensor([rows[i] + [0] * (T - len(rows[i])) for i in active], device=model.device)  # (B, T)
        logits = model.logits(model.hidden(idx)[torch.arange(len(active)), last])  # (B, V) float32
        if temperature == 0:
            next_ids = logits.argmax(-1)
        else:
            probs = torch.softmax(logits.cpu() / temperature, dim=-1)
            next_ids = torch.multinomial(probs, 1, generator=generator).flatten()
        for i, token in zip(active, next_ids.tolist(), strict=True):
            rows[i].append(token)
        active = [i for i in active if rows[i][-1] != tokenizer.bos_id and len(rows[i]) <= limit]
    ends = [len(row) - (row[-1] == tokenizer.bos_id) for row in rows]
    return [tokenizer.decode(row[s : max(s, e)]) for row, s, e in zip(rows, starts, ends, strict=True)]
