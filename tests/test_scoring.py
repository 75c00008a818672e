"""Scoring without sampling: trees of texts that begin alike, and the fast paths against the plain ones."""

import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import fill_randomly
from hypothesis import given
from hypothesis import strategies as st

from nanochat.evals import scoring
from nanochat.evals.scoring import hidden_at, last_position_logits, plant, token_losses
from nanochat.model.gpt import GPTConfig, build_model

VOCAB_SIZE = 50
CONTEXT_TOKENS = 48
A, B, C, D, X, Y, Z = range(7)


def small_gpt(arch="from_depth", **shape):
    """A model with every weight at work, a window of 6 and two query heads to a key head."""
    shape = {"depth": 4, "sequence_len": CONTEXT_TOKENS, "head_dim": 32, "kv_ratio": 2, "short_window": 6} | shape
    depth = shape.pop("depth")
    config = getattr(GPTConfig, arch)(depth, vocab_size=VOCAB_SIZE, **shape)
    model = build_model(config, generator=torch.Generator().manual_seed(0))
    fill_randomly(model)
    return model


def random_texts(rng, low=1, high=12):
    """Texts that begin alike for a while, some of them twice or the beginning of others."""
    stem = [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, 30))]
    texts = [stem + [rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(low, high))] for _ in range(4)]
    texts += [texts[0][:-1], texts[1], stem]
    rng.shuffle(texts)
    return [np.array(text) for text in texts]


def test_a_tree_is_as_written_out_here():
    texts = [np.array([A, B, C, D, Z]), np.array([A, B, C, D, X, Y]), np.array([A, B, C, D]), np.array([A, B, C, D, X])]
    (tree,), places = plant(texts)
    assert tree.tokens.tolist() == [A, B, C, D, X, Y, Z]
    assert tree.positions.tolist() == [0, 1, 2, 3, 4, 5, 4]
    assert tree.branches.tolist() == [0, 0, 0, 0, 1, 1, 2]
    assert (tree.stem, len(tree)) == (4, 7)
    found = [(number, at.tolist()) for number, at in places]
    assert found == [(0, [0, 1, 2, 3, 6]), (0, [0, 1, 2, 3, 4, 5]), (0, [0, 1, 2, 3]), (0, [0, 1, 2, 3, 4])]


def test_texts_that_begin_differently_or_must_not_share_get_trees_of_their_own():
    texts = [np.array([A, B]), np.array([A, B, C]), np.array([A, D])]
    for given_texts, shared, expected in (
        (texts, False, [[A, B, C], [A, D]]),
        ([*texts, np.array([X])], True, [[A, B, C], [A, D], [X]]),
    ):
        trees, places = plant(given_texts, shared=shared)
        assert [tree.tokens.tolist() for tree in trees] == expected
        assert not any(tree.branches.any() for tree in trees)
        for text, (number, at) in zip(given_texts, places, strict=True):
            assert trees[number].tokens[at].tolist() == text.tolist()


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=8), min_size=1, max_size=6), st.booleans())
def test_every_text_can_be_read_off_its_tree_along_one_branch(texts, shared):
    texts = [np.array(text) for text in texts]
    trees, found = plant(texts, shared=shared)
    for text, (number, places) in zip(texts, found, strict=True):
        tree = trees[number]
        assert tree.tokens[places].tolist() == text.tolist()
        assert tree.positions[places].tolist() == list(range(len(text)))
        assert tree.branches[places[: tree.stem]].max(initial=0) == 0
        assert len(set(tree.branches[places[tree.stem :]].tolist())) <= 1
    used = {(number, place) for number, places in found for place in places.tolist()}
    assert len(used) == sum(map(len, trees))  # nothing is there that no text needs


@pytest.mark.parametrize(
    ("texts", "length"),
    [([[1, 2, 3]], 3), ([[1, 2, 3], [1, 2]], 2), ([[1, 2, 3], [1, 4, 3], [1, 2, 3]], 1), ([[1], [2]], 0)],
)
def test_common_beginnings_are_measured(texts, length):
    assert scoring.common_length(list(map(np.array, texts))) == length


def test_batches_hold_every_place_once_longest_first_within_the_limit():
    lengths = [3, 9, 1, 4, 4, 30, 2]
    batches = list(scoring.batches_by_length(lengths, 10))
    assert batches[0] == [5]  # longer than the limit, so alone
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    flat = [lengths[place] for batch in batches for place in batch]
    assert flat == sorted(flat, reverse=True)
    assert all(len(batch) * lengths[batch[0]] <= 10 for batch in batches[1:])
    assert list(scoring.batches_by_length([], 10)) == []


MODELS = {
    "recipe": {}, "one layer": {"depth": 1}, "two layers": {"depth": 2}, "window of one": {"short_window": 1},
    "October 2025": {"arch": "october_2025"},
}  # fmt: skip


@pytest.mark.parametrize("shape", MODELS.values(), ids=MODELS)
@pytest.mark.parametrize("shared", [True, False])
@torch.no_grad()
def test_hidden_states_in_trees_equal_those_of_each_text_alone(shape, shared, plain_gpu_model):
    """Also by the passes of a GPU, with its kernels in PyTorch's operations."""
    model, rng = small_gpt(**shape), random.Random(0)
    groups = [random_texts(rng) for _ in range(6)] + [[np.array([7])]]
    trees, wanted, rows, places = [], [], [], []
    for texts in groups:
        own, found = plant(texts, shared=shared)
        for text, (number, at) in zip(texts, found, strict=True):
            wanted.append(model.hidden(torch.from_numpy(text)[None])[0])
            rows.append(np.full(len(text), len(trees) + number))
            places.append(at)
        trees += own
    rows, places, wanted = np.concatenate(rows), np.concatenate(places), torch.cat(wanted)
    torch.testing.assert_close(hidden_at(model, trees, rows, places), wanted, atol=2e-5, rtol=0)
    some = np.random.default_rng(0).permutation(len(rows))[: len(rows) // 5]  # in any order, as few as wanted
    torch.testing.assert_close(hidden_at(model, trees, rows[some], places[some]), wanted[some], atol=2e-5, rtol=0)
    ragged = scoring._ragged_hidden(scoring._gpu_blocks(model), trees)
    starts = np.cumsum([0, *map(len, trees)])
    torch.testing.assert_close(ragged[starts[rows] + places], wanted, atol=2e-5, rtol=0)


def test_a_place_never_sees_another_branch():
    model, stem = small_gpt(), [3, 1, 4, 1, 5]
    (tree,), places = plant([np.array([*stem, 9, 2, 6]), np.array([*stem, 8, 8])])
    (other,), _ = plant([np.array([*stem, 9, 2, 6]), np.array([*stem, 7, 11])])
    at = places[0][1]
    one, two = (hidden_at(model, [t], np.zeros(len(at), dtype=np.int64), at) for t in (tree, other))
    assert torch.equal(one, two)


def test_other_models_take_trees_without_branches_only():
    model = SimpleNamespace(device=torch.device("cpu"), hidden=lambda idx: F.one_hot(idx, VOCAB_SIZE).float())
    texts = [np.array([1, 2]), np.array([1, 3, 4])]
    trees, _ = plant(texts, shared=False)
    hidden = hidden_at(model, trees, np.array([0, 1]), np.array([0, 1]))
    assert hidden.argmax(dim=1).tolist() == [trees[0].tokens[0], trees[1].tokens[1]]
    with pytest.raises(AssertionError, match="cannot share"):
        hidden_at(model, plant(texts)[0], np.array([0]), np.array([0]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_losses_and_likeliest_tokens_are_those_of_all_the_logits(monkeypatch, dtype):
    monkeypatch.setattr("nanochat.evals.scoring.CPU_PIECE_ELEMENTS", 7 * VOCAB_SIZE)
    monkeypatch.setattr("nanochat.evals.scoring.CPU_BLOCK_ELEMENTS", 3 * VOCAB_SIZE)
    model, generator = small_gpt(), torch.Generator().manual_seed(0)
    hidden = (40 * torch.randn(60, model.config.n_embd, generator=generator)).to(dtype)  # far into the cap
    logits = model.logits(hidden)
    targets = torch.where(torch.arange(60) % 2 == 0, logits.argmax(dim=1), logits.argmin(dim=1))
    losses, is_best = token_losses(model, hidden, targets)
    torch.testing.assert_close(losses, F.cross_entropy(logits, targets, reduction="none"), atol=1e-5, rtol=0)
    assert is_best.tolist() == [True, False] * 30


def test_of_equally_likely_tokens_the_first_is_the_likeliest():
    model = SimpleNamespace(config=SimpleNamespace(vocab_size=4), logits=lambda hidden: hidden)
    hidden = torch.tensor([[0.0, 2.0, 2.0, 1.0]] * 3)
    losses, is_best = token_losses(model, hidden, torch.tensor([1, 2, 3]))
    assert is_best.tolist() == [True, False, False]
    assert losses[0] == losses[1] < losses[2]


def assert_logits_equal_the_plain_ones(model, prompts, candidates, **options):
    fast = last_position_logits(model, prompts, candidates, **options)
    plain = scoring.last_position_logits_plainly(model, prompts, candidates)
    for one, other, ids in zip(fast, plain, candidates, strict=True):
        assert one.shape == other.shape == (len(ids),)
        assert one.dtype == other.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("batch_tokens", [1, 70, 0])
def test_the_logits_of_candidates_equal_the_plain_ones(batch_tokens):
    rng = random.Random(0)
    prompts, candidates = (
        [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))] for _ in range(23)]
        for longest in (CONTEXT_TOKENS, 5)
    )
    assert_logits_equal_the_plain_ones(small_gpt(), prompts, candidates, batch_tokens=batch_tokens)


def test_prompts_may_be_arrays_and_there_may_be_none(tiny_model):
    prompts = [np.array([1, 2, 3], dtype=np.int32), np.array([7], dtype=np.uint16)]
    assert_logits_equal_the_plain_ones(tiny_model, prompts, [[5, 6], [5]])
    assert last_position_logits(tiny_model, [], []) == []
