"""Scoring without sampling: what a model thinks of tokens that are given, many texts at a time.

Here: batches by length, and the logits of candidate tokens behind a prompt. Not here: which texts and tokens
(`core_eval.py`, `chat_eval.py`), flags, printing.

A model is anything that has `device`, `config.vocab_size`, `hidden`, `logits` and `__call__` as `GPT` has. Every fast
function has a plain twin, named `..._plainly`, that shares nothing with it: one text at a time, all logits.
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch

GPU_BATCH_TOKENS = 65536
CPU_BATCH_TOKENS = 4096  # activations of this many tokens stay near the cores


def default_batch_tokens(device: torch.device) -> int:
    """How many tokens a batch should hold on a device: few enough for a CPU's cache, enough to fill a GPU."""
    return GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Places in `lengths`, longest first, in batches whose padded size stays within `batch_tokens` (one always may).

    The largest batch comes first: memory that suffices for it, suffices.
    """
    ordered = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    first = 0
    while first < len(ordered):
        count = max(1, batch_tokens // max(1, lengths[ordered[first]]))
        yield ordered[first : first + count]
        first += count


@torch.no_grad()
def last_position_logits(
    model, prompts: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]], *, batch_tokens: int = 0
) -> list[np.ndarray]:
    """For each prompt the logits of its candidates for the next token.

    prompts: ids (lists or 1-D integer arrays), none empty, none longer than the model's context; token_ids: the
    candidates of each; returns for each a 1-D float32 array with a logit for each candidate, in their order. Batches
    hold at most `batch_tokens` tokens (0: what suits the device); the vocabulary head runs at last positions only.
    """
    assert len(prompts) == len(token_ids), (len(prompts), len(token_ids))
    answers: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
    lengths = [len(prompt) for prompt in prompts]
    assert min(lengths, default=1) > 0, "an empty prompt predicts nothing"
    for places in batches_by_length(lengths, batch_tokens or default_batch_tokens(model.device)):
        # padded on the right, which a causal model cannot see
        idx = np.zeros((len(places), lengths[places[0]]), dtype=np.int64)  # (B, T)
        for row, place in zip(idx, places, strict=True):
            row[: lengths[place]] = prompts[place]
        last = torch.tensor([lengths[place] - 1 for place in places], device=model.device)
        hidden = model.hidden(torch.from_numpy(idx).to(model.device))  # (B, T, C)
        logits = model.logits(hidden[torch.arange(len(places), device=model.device), last])  # (B, V)
        for row, place in zip(logits.float().cpu().numpy(), places, strict=True):
            answers[place] = row[np.asarray(token_ids[place], dtype=np.int64)]
    return answers


@torch.no_grad()
def last_position_logits_plainly(
    model, prompts: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]]
) -> list[np.ndarray]:
    """What `last_position_logits` must agree with: one prompt at a time, all logits of all its positions."""
    answers = []
    for prompt, candidates in zip(prompts, token_ids, strict=True):
        logits = model(torch.tensor([list(map(int, prompt))], device=model.device))[0, -1]  # (V,)
        answers.append(np.array([logits[token].item() for token in candidates], dtype=np.float32))
    return answers
