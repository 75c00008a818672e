"""Scoring without sampling: losses and logits of given tokens, for many texts at a time.

Texts that begin alike (the choices of one question) are kept in one row as a tree, their common beginning once:

    texts            tokens      a b c d x y z
    a b c d x y      positions   0 1 2 3 4 5 4
    a b c d z        branches    0 0 0 0 1 1 2      0 is the stem, which all branches see

A model is anything that has `device`, `config.sequence_len`, `config.vocab_size`, `hidden`, `logits` and `__call__`
like `GPT`. Only for a `GPT` itself are stems shared and is the last layer restricted to the places asked for.

Not here: which texts and tokens are scored (`core_eval.py`, `chat_eval.py`).
"""

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from nanochat.engine.transfer import to_device
from nanochat.engine.weights import Weights
from nanochat.model.attention import causal_attention, masked_attention, ragged_attention
from nanochat.model.gpt import GPT

if TYPE_CHECKING:
    from nanochat.engine.gpu_blocks import GpuBlocks

GPU_BATCH_TOKENS = 65536
CPU_BATCH_TOKENS = 4096  # activations of this many tokens stay near the cores
GPU_PIECE_ELEMENTS = 1 << 27  # float32 logits held at once: 512 MB
CPU_PIECE_ELEMENTS = 1 << 23  # rows enough for a fast product with the head
CPU_BLOCK_ELEMENTS = 1 << 20  # what the elementwise part takes at a time: 4 MB, to stay in the cache


@dataclass(frozen=True)
class Tree:
    """Texts in one row: `stem` tokens that all of them begin with, then the branches. Arrays are (L,) int64:
    `positions` counts from each text's beginning; `branches` is 0 on the stem, then 1, 2, ..."""

    tokens: np.ndarray
    positions: np.ndarray
    branches: np.ndarray
    stem: int

    def __len__(self) -> int:
        return len(self.tokens)


def plant(texts: Sequence[np.ndarray], *, shared: bool = True) -> tuple[list[Tree], list[tuple[int, np.ndarray]]]:
    """Trees that hold `texts` (1-D integer arrays, none empty); for each text its tree and the places of its tokens.
    A text that is the beginning of another one takes no room of its own. With `shared` all texts go into one tree if
    their first token is the same; otherwise each gets a tree without branches."""
    assert all(map(len, texts)), "a text without tokens predicts nothing"
    whole: list[np.ndarray] = []  # the texts that are not the beginning of another one
    owners = [0] * len(texts)
    for number in sorted(range(len(texts)), key=lambda number: -len(texts[number])):
        text = texts[number]
        owners[number] = next((i for i, one in enumerate(whole) if np.array_equal(one[: len(text)], text)), len(whole))
        if owners[number] == len(whole):
            whole.append(text)
    grown = [_grow(whole)] if shared and common_length(whole) > 0 else [_grow([text]) for text in whole]
    found = [(tree, places) for tree, (_, own) in enumerate(grown) for places in own]  # of each of `whole`
    of_texts = [(found[owner][0], found[owner][1][: len(text)]) for owner, text in zip(owners, texts, strict=True)]
    return [tree for tree, _ in grown], of_texts


def common_length(texts: Sequence[np.ndarray]) -> int:
    """How many tokens all of `texts` begin with."""
    shortest = min(map(len, texts))
    same = np.all([text[:shortest] == texts[0][:shortest] for text in texts], axis=0)
    return shortest if same.all() else int(same.argmin())


def _grow(texts: Sequence[np.ndarray]) -> tuple[Tree, list[np.ndarray]]:
    """The tree of texts of which none is the beginning of another, and the places of each text's tokens in it."""
    stem = common_length(texts)
    ends = [text[stem:] for text in texts if len(text) > stem]
    branches = np.repeat(np.arange(len(ends) + 1), [stem, *map(len, ends)])
    tokens = np.concatenate([texts[0][:stem], *ends]).astype(np.int64)
    positions = np.concatenate([np.arange(stem), *(np.arange(stem, stem + len(end)) for end in ends)])
    places = [np.flatnonzero((branches == 0) | (branches == number)) for number in range(1, len(texts) + 1)]
    return Tree(tokens, positions, branches, stem), places


def rank_and_world_size() -> tuple[int, int]:
    """Of the process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def gather_from_ranks(own: list) -> list:
    """The items of all ranks, on every rank (anything picklable); without a process group, `own`."""
    gathered = [own] * rank_and_world_size()[1]
    if dist.is_initialized():
        dist.all_gather_object(gathered, own)
    return [item for items in gathered for item in items]


def default_batch_tokens(device: torch.device) -> int:
    """How many tokens a batch should hold: few enough for a CPU's cache, enough to fill a GPU."""
    return GPU_BATCH_TOKENS if device.type == "cuda" else CPU_BATCH_TOKENS


def batches_by_length(lengths: Sequence[int], batch_tokens: int) -> Iterator[list[int]]:
    """Indices into `lengths`, longest first, in batches of at most `batch_tokens` with padding, or of a single text.
    The largest batch comes first, so that a lack of memory shows at once."""
    left = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    while left:
        count = max(1, batch_tokens // max(1, lengths[left[0]]))
        yield left[:count]
        left = left[count:]


def hidden_at(model, trees: Sequence[Tree], rows: np.ndarray, places: np.ndarray) -> Tensor:
    """Final hidden states (N, C) at `places` (N,) of `trees[rows]` (N,), run as one batch padded on the right. Only a
    `GPT` can run trees with branches."""
    idx = _padded([tree.tokens for tree in trees]).to(model.device)  # (B, T)
    if model.device.type == "cuda" and isinstance(model, GPT) and (blocks := _gpu_blocks(model)) is not None:
        starts = np.cumsum([0, *map(len, trees)])[rows]
        return _ragged_hidden(blocks, trees)[to_device(starts + places, model.device)]
    if not isinstance(model, GPT):
        assert not any(tree.branches.any() for tree in trees), "this model cannot share stems"
        return model.hidden(idx)[tuple(torch.from_numpy(np.stack([rows, places])).to(model.device))]
    # the last layer computes each wanted place once: asked (B, Q), rows filled up with place 0
    wanted, inverse = np.unique(rows * idx.size(1) + places, return_inverse=True)
    wanted_rows, wanted_places = np.divmod(wanted, idx.size(1))
    asked = _padded(np.split(wanted_places, np.searchsorted(wanted_rows, np.arange(1, len(trees)))))
    slots = np.arange(len(wanted)) - np.searchsorted(wanted_rows, wanted_rows)
    rows_of_asked = torch.arange(len(trees), device=model.device).unsqueeze(1)  # (B, 1)
    hidden = model.trunk(idx, **_forest(model, trees, (rows_of_asked, asked.to(model.device))))  # (B, Q, C)
    return hidden.flatten(0, 1)[torch.from_numpy((wanted_rows * asked.shape[1] + slots)[inverse]).to(model.device)]


def _gpu_blocks(model: GPT) -> "GpuBlocks | None":
    """The model's present weights as the engine serves them on a GPU; None without Triton."""
    try:
        from nanochat.engine.gpu_blocks import GpuBlocks
    except ImportError:
        return None
    return GpuBlocks(model.config, Weights(model, model.compute_dtype, int8=False), model.device)


def _ragged_hidden(blocks: "GpuBlocks", trees: Sequence[Tree]) -> Tensor:
    """Final hidden states (N, C) of all tokens of trees, one after another without padding.

    A stem is a sequence, and so is each branch, which sees the keys of its stem before its own.
    """
    tokens = [tree.tokens for tree in trees]
    firsts = np.cumsum([0, *map(len, trees)])
    before = [np.maximum(np.arange(len(tree)) - 1, 0) for tree in trees]
    seen, lengths = [], []  # of each sequence: the places of its keys, how many queries and keys
    for tree, first, own in zip(trees, firsts, before, strict=False):
        own[np.diff(tree.branches, prepend=0) > 0] = tree.stem - 1  # where a branch begins
        stem = np.arange(tree.stem)
        for number in range(tree.branches[-1] + 1):
            branch = np.flatnonzero(tree.branches == number)
            keys = branch if number == 0 else np.concatenate((stem, branch))
            seen.append(first + keys)
            lengths.append((len(branch), len(keys)))
    idx, positions = np.concatenate(tokens), np.concatenate([tree.positions for tree in trees])
    previous = np.concatenate([own[at] for own, at in zip(tokens, before, strict=True)])
    idx, previous, at, own_places = to_device(np.stack((idx, previous, positions, np.arange(len(idx)))), blocks.device)
    seen = to_device(np.concatenate(seen), blocks.device)
    ends = to_device(np.cumsum([(0, 0), *lengths], axis=0, dtype=np.int32).T.copy(), blocks.device)
    config = blocks.config

    def attend(layer: int, joined: Tensor) -> Tensor:
        k, v = joined.new_empty(2, len(idx), config.n_kv_head, config.head_dim)
        q = blocks.place_heads(layer, joined, idx, at, own_places, k, v)
        return ragged_attention(q, k[seen], v[seen], lengths, ends, window=config.window(layer))

    return blocks.hidden(blocks.weights.embedded(idx, previous, at), attend)


def _padded(arrays: Sequence[np.ndarray], filler: int = 0) -> Tensor:
    """1-D int64 arrays as the rows of one (B, longest) tensor."""
    return pad_sequence([torch.from_numpy(array) for array in arrays], batch_first=True, padding_value=filler)


def _forest(model: GPT, trees: Sequence[Tree], asking: tuple[Tensor, Tensor]) -> dict[str, Any]:
    """The arguments with which `GPT.trunk` runs a batch of trees for the places `asking`: rows (B, 1), places (B, Q).

    A place sees the stem and its own branch up to itself. Causal attention covers the stems; the places behind them
    and those asked for get masks.
    """
    positions = _padded([tree.positions for tree in trees]).to(model.device)  # (B, T)
    branches = _padded([tree.branches for tree in trees], -1).to(model.device)  # (B, T), nothing sees the padding
    cos, sin = (table[0, positions] for table in model.rotary(max(int(tree.positions.max()) for tree in trees) + 1))
    stems, lasts = np.array([[tree.stem] for tree in trees]), np.array([[len(tree) - 1] for tree in trees])
    stem = slice(int(stems.max()))
    previous = None  # (B, T) place of the token before; None: always the place to the left
    branching = None  # the places behind the stems, as `asking`
    if (lasts >= stems).any():
        before = [np.maximum(np.arange(len(tree)) - 1, 0) for tree in trees]
        for tree, places in zip(trees, before, strict=True):
            places[np.diff(tree.branches, prepend=0) > 0] = tree.stem - 1  # where a branch begins
        previous = _padded(before).to(model.device)
        places = np.minimum(stems + np.arange((lasts - stems).max() + 1), lasts)  # short rows repeat their last
        branching = asking[0], torch.from_numpy(places).to(model.device)

    @functools.cache  # layers with the same window share a mask
    def visible(window: int | None, is_asking: bool) -> Tensor:
        """(B, Q, T) bool: what the places asked for, or else those behind the stems, see."""
        at = asking if is_asking else branching
        own_positions, own_branches = positions[at].unsqueeze(2), branches[at].unsqueeze(2)  # (B, Q, 1)
        key_positions, key_branches = positions.unsqueeze(1), branches.unsqueeze(1)  # (B, 1, T)
        mask = ((key_branches == 0) | (key_branches == own_branches)) & (key_positions <= own_positions)
        return mask if window is None else mask & (key_positions > own_positions - window)

    def attend(q: Tensor, k: Tensor, v: Tensor, *, window: int | None, asking=None) -> Tensor:
        """Like `causal_attention`; with `asking`, q and the result have only the places it names."""
        if asking is not None:
            return masked_attention(q, k, v, visible(window, True))
        if branching is None:
            return causal_attention(q, k, v, window=window)
        y = torch.zeros_like(q)
        y[:, stem] = causal_attention(q[:, stem], k[:, stem], v[:, stem], window=window)
        y[branching] = masked_attention(q[branching], k, v, visible(window, False))
        return y

    return {"cos": cos, "sin": sin, "previous": previous, "attend": attend, "asking": asking}


def token_losses(model, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Losses (N,) float32 in nats of `targets` (N,) after hidden states `hidden` (N, C), and (N,) bool whether each is
    the likeliest token (the first one in a tie). Only a piece of the logits exists at a time."""
    on_gpu = hidden.device.type == "cuda"
    V = model.config.vocab_size
    piece = max(1, (GPU_PIECE_ELEMENTS if on_gpu else CPU_PIECE_ELEMENTS) // V)
    block = piece if on_gpu else max(1, CPU_BLOCK_ELEMENTS // V)
    head, softcap = model.logits, None
    if isinstance(model, GPT):
        weight = model.lm_head.weight[:V].to(hidden.dtype)  # cast once for all pieces
        head, softcap = (lambda h: h @ weight.T), model.config.softcap
    losses, hits = [], []
    for h, y in zip(hidden.split(piece), targets.split(piece), strict=True):
        for z, target in zip(head(h).split(block), y.split(block), strict=True):
            z = z.float()  # (n, V): logits, of a `GPT` before they are capped, which keeps their order
            is_best = z.gather(1, target.unsqueeze(1)).squeeze(1) == z.amax(dim=1)  # finding an index would be slower
            ties = is_best.nonzero().squeeze(1)
            is_best[ties] = z[ties].argmax(dim=1) == target[ties]
            if softcap is not None:
                # softcap * tanh(z / softcap) up to a constant, which softmax ignores; five times faster on a CPU
                z = z.mul_(2 / softcap).sigmoid_().mul_(2 * softcap)
            losses.append(F.cross_entropy(z, target, reduction="none"))
            hits.append(is_best)
    return torch.cat(losses), torch.cat(hits)


@torch.no_grad()
def last_position_logits(
    model, prompts: Sequence[Sequence[int]], token_ids: Sequence[Sequence[int]], *, batch_tokens: int = 0
) -> list[np.ndarray]:
    """For each prompt the logits of its candidates for the next token, a 1-D float32 array.

    prompts: ids (lists or 1-D integer arrays), none empty or longer than the model's context; token_ids: the candidates
    of each prompt. Batches hold at most `batch_tokens` tokens (0: what suits the device); the vocabulary head runs at
    last positions only.
    """
    assert len(prompts) == len(token_ids), (len(prompts), len(token_ids))
    trees = [plant([np.asarray(prompt, dtype=np.int64)])[0][0] for prompt in prompts]
    answers: list[np.ndarray] = [np.empty(0, np.float32)] * len(prompts)
    for batch in batches_by_length(list(map(len, trees)), batch_tokens or default_batch_tokens(model.device)):
        last = np.array([len(trees[i]) - 1 for i in batch])
        hidden = hidden_at(model, [trees[i] for i in batch], np.arange(len(batch)), last)  # (B, C)
        for row, i in zip(model.logits(hidden).float().cpu().numpy(), batch, strict=True):  # row (V,)
            answers[i] = row[np.asarray(token_ids[i], dtype=np.int64)]
    return answers


@torch.no_grad()
def last_position_logits_plainly(model, prompts: Sequence, token_ids: Sequence) -> list[np.ndarray]:
    """The reference for `last_position_logits`: one prompt at a time, all logits of all its positions."""
    answers = []
    for prompt, candidates in zip(prompts, token_ids, strict=True):
        logits = model(torch.tensor([list(map(int, prompt))], device=model.device))  # (1, T, V)
        answers.append(logits[0, -1, list(candidates)].float().cpu().numpy())
    return answers
