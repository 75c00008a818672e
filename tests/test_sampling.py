"""The draw: distributions, filters, seeds."""

import math

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine.sampling import Sampling, plan_draw, reweigh_
from nanochat.engine.sampling import draw as draw_planned

LOGITS = torch.log(torch.tensor([0.1, 0.4, 0.2, 0.25, 0.05]))
EVENLY = [(i + 0.5) / 2000 for i in range(2000)]


def draw(logits, rows, uniforms, barred=()):
    drawing = plan_draw(rows, uniforms, logits.size(-1), barred)
    return draw_planned(logits, drawing.columns, drawing.kind)


def frequencies(sampling, logits=LOGITS):
    """The share of each token among draws with evenly spread random numbers: its probability, without noise."""
    ids = draw(logits.expand(len(EVENLY), -1), [sampling] * len(EVENLY), EVENLY)
    return torch.bincount(ids, minlength=len(logits)) / len(EVENLY)


def close(a, b):
    assert torch.allclose(a, torch.tensor(b, dtype=a.dtype), atol=2e-3), a


SQUARES = [p**2 for p in (0.1, 0.4, 0.2, 0.25, 0.05)]


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.25, 0.05]),
        ({"temperature": 0.5}, [p / sum(SQUARES) for p in SQUARES]),
        ({"temperature": 0.0}, [0, 1, 0, 0, 0]), ({"temperature": 1e-30}, [0, 1, 0, 0, 0]),
        # the likeliest k; no limit for None, 0 and the vocabulary's size or more
        ({"top_k": 2}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]), ({"top_k": 1}, [0, 1, 0, 0, 0]),
        *(({"top_k": k}, [0.1, 0.4, 0.2, 0.25, 0.05]) for k in (None, 0, 5, 99)),
        # the likeliest that reach p together
        ({"top_p": 0.6}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]), ({"top_p": 0.0}, [0, 1, 0, 0, 0]),
        ({"top_p": 0.7}, [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]),
        # those likely enough beside the likeliest
        ({"min_p": 0.45}, [0, 0.4 / 0.85, 0.2 / 0.85, 0.25 / 0.85, 0]), ({"min_p": 1.0}, [0, 1, 0, 0, 0]),
        # top-p sees what top-k left
        ({"top_k": 3, "top_p": 0.7}, [0, 0.4 / 0.65, 0, 0.25 / 0.65, 0]),
    ],
)  # fmt: skip
def test_tokens_are_drawn_with_the_probabilities_that_the_settings_leave(settings, expected):
    close(frequencies(Sampling(**settings)), expected)


def test_a_row_does_not_depend_on_the_others():
    rows = [Sampling(temperature=0.0), Sampling(), Sampling(top_k=3), Sampling(top_p=0.8, temperature=1.3)] * 2
    logits = torch.randn(len(rows), 50, generator=torch.Generator().manual_seed(0))
    uniforms = [0.05, 0.31, 0.62, 0.99, 0.5, 0.999999, 0.0, 0.77]
    together = draw(logits, rows, uniforms)
    alone = [draw(logits[i : i + 1], rows[i : i + 1], uniforms[i : i + 1]).item() for i in range(len(rows))]
    assert together.tolist() == alone
    assert together[0] == logits[0].argmax()


@pytest.mark.parametrize("uniform", [0.0, 1 - 2**-53])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(top_k=3), Sampling(top_p=0.5)])
def test_impossible_tokens_are_never_drawn_at_the_edges(uniform, sampling):
    logits = torch.tensor([[-math.inf, 1.0, -math.inf, 0.5, -math.inf]])
    assert draw(logits, [sampling], [uniform]).item() in (1, 3)


def test_of_equal_tokens_top_k_keeps_exactly_k_and_the_last_of_a_large_vocabulary_can_be_drawn():
    assert (frequencies(Sampling(top_k=2), torch.zeros(5)) > 0).sum() == 2
    assert draw(torch.zeros(1, 100_000), [Sampling()], [0.999995]).item() == 99_999


def test_barred_tokens_are_drawn_only_where_there_is_no_tool():
    logits = torch.tensor([[9.0, 1.0, 8.0]])
    rows = [Sampling(temperature=t, use_tool=use_tool) for t in (0.0, 1.0) for use_tool in (True, False)]
    assert draw(logits.expand(4, -1), rows, [0.1] * 4, barred=(0, 2)).tolist() == [1, 0, 1, 0]
    assert logits.tolist() == [[9.0, 1.0, 8.0]]


def test_draws_that_people_ask_for_are_of_few_kinds():
    kinds = {plan_draw([Sampling(top_k=k)], [0.5], 5000).kind for k in (33, 40, 50, 64)}
    assert kinds == {(True, 64, ())}
    assert plan_draw([Sampling(temperature=0.0, top_k=50)], [0.5], 5000).kind == (False, 0, ())
    assert plan_draw([Sampling(top_p=0.9)], [0.5], 5000).kind == (True, 5000, ())


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"repetition_penalty": 2.0}, [1.0, -4.0, 1.0, 0.0]),  # of those that occurred
        ({"frequency_penalty": 0.5, "presence_penalty": 0.25}, [2.0, -2.75, 0.25, 0.0]),  # -0.25 - 0.5 for each time
        ({"logit_bias": ((0, -100.0), (3, 7.5))}, [-98.0, -2.0, 1.0, 7.5]),
        ({"repetition_penalty": 2.0, "presence_penalty": 1.0, "logit_bias": ((1, 3.0),)}, [1.0, -2.0, 0.0, 0.0]),
    ],
)
def test_penalties_and_bias_change_the_logits_of_their_tokens(settings, expected):
    logits = torch.tensor([2.0, -2.0, 1.0, 0.0])
    sampling = Sampling(**settings)
    assert sampling.reweighs
    reweigh_(logits, sampling, {0, 1}, {1: 1, 2: 1})
    assert logits.tolist() == expected
    assert not Sampling().reweighs


@pytest.mark.parametrize(
    ("name", "value", "fault"),
    [
        ("max_tokens", 0, "a whole number at least 1, not 0"), ("max_tokens", 1.5, "a whole number"),
        ("max_tokens", True, "a whole number"), ("temperature", -1, "a number from 0.0 to 100.0, not -1"),
        ("temperature", math.nan, "a number"), ("temperature", None, "a number"), ("top_k", -1, "a whole number"),
        ("top_p", 1.5, "a number from 0.0 to 1.0, not 1.5"), ("min_p", "x", "a number"),
        ("repetition_penalty", 0.0, "a number"), ("seed", 0.5, "a whole number"),
        ("num_logprobs", -1, "a whole number"), ("stop", ("",), "texts that are not empty"), ("stop", "END", "texts"),
        ("stop", ("a",) * 17, "at most 16 texts, not 17"), ("frequency_penalty", 2.5, "a number from -2.0 to 2.0"),
        ("presence_penalty", math.inf, "a number from"), ("logit_bias", ((5, 101.0),), "from -100 to 100, not 101.0"),
    ],
)  # fmt: skip
def test_settings_out_of_range_are_refused_by_name_and_value(name, value, fault):
    with pytest.raises(UserError, match=f"{name} .*must be {fault}"):
        Sampling(**{name: value})
