"""Scoring without sampling: the fast paths against the plain ones."""

import random

import numpy as np
import pytest

from nanochat.scoring import batches_by_length, last_position_logits, last_position_logits_plainly


def random_prompts(count, vocab_size, longest, seed=0):
    rng = random.Random(seed)
    return [[rng.randrange(vocab_size) for _ in range(rng.randint(1, longest))] for _ in range(count)]


def test_batches_hold_every_place_once_longest_first_within_the_limit():
    lengths = [3, 9, 1, 4, 4, 30, 2]
    batches = list(batches_by_length(lengths, 10))
    assert batches[0] == [5]  # longer than the limit, so alone
    assert sorted(place for batch in batches for place in batch) == list(range(7))
    flat = [lengths[place] for batch in batches for place in batch]
    assert flat == sorted(flat, reverse=True)
    assert all(len(batch) * lengths[batch[0]] <= 10 for batch in batches[1:])
    assert list(batches_by_length([], 10)) == []


@pytest.mark.parametrize("batch_tokens", [1, 70, 0])
def test_the_logits_of_candidates_equal_the_plain_ones(tiny_model, batch_tokens):
    prompts = random_prompts(23, 400, tiny_model.config.sequence_len)
    rng = random.Random(1)
    candidates = [[rng.randrange(400) for _ in range(rng.randint(1, 5))] for _ in prompts]
    fast = last_position_logits(tiny_model, prompts, candidates, batch_tokens=batch_tokens)
    plain = last_position_logits_plainly(tiny_model, prompts, candidates)
    for one, other, ids in zip(fast, plain, candidates, strict=True):
        assert one.shape == other.shape == (len(ids),)
        assert one.dtype == other.dtype == np.float32
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_prompts_may_be_arrays_and_there_may_be_none(tiny_model):
    prompts = [np.array([1, 2, 3], dtype=np.int32), np.array([7], dtype=np.uint16)]
    fast = last_position_logits(tiny_model, prompts, [[5, 6], [5]])
    plain = last_position_logits_plainly(tiny_model, prompts, [[5, 6], [5]])
    for one, other in zip(fast, plain, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert last_position_logits(tiny_model, [], []) == []
