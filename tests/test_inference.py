"""Prefill and decode with a cache against the whole forward pass; those of a GPU, too, with its kernels in PyTorch's
operations (`plain_kernels.py`)."""

import copy
import random

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx

from nanochat.common import UserError
from nanochat.engine.inference import InferenceModel, Piece
from nanochat.engine.sampling import Sampling, plan_draw
from nanochat.engine.weights import Product
from nanochat.model.gpt import GPTConfig, build_model
from tests.conftest import fill_randomly

T, WINDOW, V = 64, 16, 400
SHAPE = {"vocab_size": V, "sequence_len": T, "head_dim": 32}
CONFIGS = {
    "recipe": GPTConfig.from_depth(4, **SHAPE),
    "grouped": GPTConfig.from_depth(2, kv_ratio=2, **SHAPE),
    "full": GPTConfig.from_depth(2, window_pattern="L", **SHAPE),
    "october": GPTConfig.october_2025(2, **SHAPE),
}


@pytest.fixture(scope="module", params=CONFIGS)
def model(request):
    model = build_model(CONFIGS[request.param], generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    fill_randomly(model)
    if model.smear_lambda is not None:
        model.smear_lambda.fill_(0.5)
    return model


@pytest.fixture(scope="module", params=["cpu", "gpu"])
def serve(request):
    """Makes a serving model of a GPT."""
    return InferenceModel if request.param == "cpu" else request.getfixturevalue("plain_gpu_model")


@pytest.fixture(scope="module")
def ids():
    return torch.randint(V, (T,), generator=torch.Generator().manual_seed(3)).tolist()


def whole(model, ids):
    """Logits (T, V) after every token."""
    return model(torch.tensor([ids]))[0]


def piece_of(slot, ids, start, end):
    return Piece(slot, ids[start:end], start, ids[start - 1] if start else None)


def read(inference, slot, ids, *, start=0, piece=T):
    """Prefill `ids[start:]` in pieces; the last logits."""
    return [inference.prefill([piece_of(slot, ids, i, i + piece)])[0] for i in range(start, len(ids), piece)][-1]


def decode(inference, rows):
    """One decode step; `rows` are token lists whose last token is to be read."""
    idx, previous = torch.tensor([[row[-1] for row in rows], [row[-2] for row in rows]])
    drawing = plan_draw([Sampling(temperature=0.0)] * len(rows), [0.0] * len(rows), V)
    logits, tokens = inference.decode_and_draw(idx, previous, [len(row) - 1 for row in rows], drawing)
    assert tokens.tolist() == logits.argmax(-1).tolist()
    return logits


def close(a, b, tolerance=1e-4):
    assert torch.allclose(a, b, atol=tolerance, rtol=0), (a - b).abs().max()


@pytest.mark.parametrize("piece", [1, 5, WINDOW, T])
@pytest.mark.parametrize("length", [1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 40, T])
def test_prefill_equals_the_whole_forward_pass(serve, model, ids, length, piece):
    inference = serve(model, 2)
    close(read(inference, 1, ids[:length], piece=piece), whole(model, ids)[length - 1])


def test_pieces_of_several_sequences_are_read_in_one_pass(serve, model, ids):
    inference = serve(model, 3)
    rows, starts, ends = [ids, ids[::-1], ids[7:] + ids[:7]], [0, 5, 30], [40, 6, T]
    for slot in (1, 2):
        read(inference, slot, rows[slot][: starts[slot]])
    pieces = [piece_of(slot, rows[slot], starts[slot], ends[slot]) for slot in range(3)]
    for logits, row, end in zip(inference.prefill(pieces), rows, ends, strict=True):
        close(logits, whole(model, row)[end - 1])


@pytest.mark.parametrize("length", [1, WINDOW - 1, WINDOW, WINDOW + 1, T - 1])
def test_decoding_equals_the_whole_forward_pass_up_to_the_context(serve, model, ids, length):
    inference, logits = serve(model, 1), whole(model, ids)
    read(inference, 0, ids[:length])
    for end in range(length + 1, T + 1):
        close(decode(inference, [ids[:end]])[0], logits[end - 1])


def test_rows_of_different_lengths_decode_together(serve, model):
    rng = random.Random(0)
    inference = serve(model, 5)
    rows = [[rng.randrange(V) for _ in range(length)] for length in (1, WINDOW, 37)]
    for slot, row in enumerate(rows):
        read(inference, slot, row)
    spare = [rng.randrange(V) for _ in range(20)]
    read(inference, 4, spare)
    for _ in range(T - 37):
        for row in rows:
            row.append(rng.randrange(V))
        for logits, row in zip(decode(inference, rows), rows, strict=True):
            close(logits, whole(model, row)[-1])
    close(decode(inference, [rows[0], rows[1]])[1], whole(model, rows[1])[-1])  # reading a token twice changes nothing
    inference.cache.swap_slots(0, 4, T)
    close(decode(inference, [[*spare, 7]])[0], whole(model, [*spare, 7])[-1])  # nobody wrote to the spare slot


def test_a_copied_slot_goes_on_like_the_one_it_came_from(serve, model, ids):
    inference = serve(model, 3)
    for length in (3, WINDOW, 30):
        read(inference, 0, ids[:length])
        inference.cache.copy_slot(0, 1, length)
        read(inference, 0, list(reversed(ids)))
        for end in range(length + 1, T + 1):
            inference.cache.swap_slots(0, 1, T)
            close(decode(inference, [ids[:end]])[0], whole(model, ids[:end])[-1])
            inference.cache.swap_slots(0, 1, T)


@pytest.mark.parametrize("length", [10, WINDOW, WINDOW + 1, 40])
def test_a_slot_can_go_back_exactly_where_it_says_so(serve, model, ids, length):
    inference = serve(model, 1)
    for position in range(1, length + 1):
        read(inference, 0, ids[:length])
        other = [*ids[:position], 5, 6]
        logits, expected = read(inference, 0, other, start=position), whole(model, other)[-1]
        assert inference.cache.can_go_back(length, position) == torch.allclose(logits, expected, atol=1e-5)


@pytest.mark.parametrize(("weights", "tolerance"), [("bfloat16", 0.1), ("int8", 0.05)])
def test_narrow_weights_change_little_and_not_with_the_number_of_rows(serve, model, ids, weights, tolerance):
    inference = serve(model, 8, weights=weights)
    logits, exact = [read(inference, slot, ids[:20]) for slot in range(8)][-1], whole(model, ids[:20])[-1]
    assert 0 < (logits - exact).abs().max() < tolerance * exact.abs().max()
    alone = decode(inference, [ids[:21]])[0]
    together = decode(inference, [ids[:21]] * 8)
    close(together, alone.expand(8, -1), 0.05 * alone.abs().max().item())


def test_eight_bit_products_are_within_half_a_step_of_each_weight():
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(0))
    product = Product(weight, torch.float32, int8=True)
    step = weight.abs().amax(dim=1, keepdim=True) / 127
    assert ((product.weight - weight).abs() <= 0.5 * step + 0.005 * weight.abs()).all()
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(1))
    exact = x @ product.weight.T
    for rows in (1, 4, 6):
        close(product(x[:rows]), exact[:rows], 0.02 * exact.abs().max().item())


def test_refreshed_weights_are_those_of_the_model(serve, model, ids, monkeypatch):
    """Also in decode passes recorded before, here as a CUDA graph records them: numbers keep the value they had."""
    trained = copy.deepcopy(model)
    inference = serve(trained, 1)
    recorded = []
    if serve is not InferenceModel:
        monkeypatch.setattr(inference._graphs, "_record", lambda run: recorded.append(run) or make_fx(run)())
    for _ in range(2):
        read(inference, 0, ids[:20])
        close(decode(inference, [ids[:21]])[0], whole(trained, ids[:21])[-1])
        fill_randomly(trained, seed=7)
        inference.refresh(trained)
    assert len(recorded) == (serve is not InferenceModel)


def test_unknown_weights_are_refused_and_refreshing_leaves_the_model_it_was_made_of_alone():
    first, second = (build_model(CONFIGS["recipe"], generator=torch.Generator().manual_seed(i)) for i in (0, 1))
    with pytest.raises(UserError, match="--weights 'int4' is unknown"):
        InferenceModel(first, 1, weights="int4")
    before = copy.deepcopy(first.state_dict())
    InferenceModel(first, 1).refresh(second)
    assert all(torch.equal(value, before[name]) for name, value in first.state_dict().items())
