"""What runs on a GPU, there and as the same program on the CPU: equal numbers, and a host that never waits.

The cases on the CPU show that these tests are right: there, what would be compiled is only traced and differentiated
beforehand ("aot_eager"), and a recorded CUDA graph is the pass itself.
"""

import gc
import weakref
from contextlib import contextmanager, nullcontext
from functools import partial
from itertools import repeat

import numpy as np
import pytest
import torch

from nanochat.common import Runtime
from nanochat.data.dataloader import Batch
from nanochat.engine.engine import Engine, serving_model
from nanochat.engine.inference import Piece
from nanochat.engine.sampling import Sampling, plan_draw
from nanochat.evals.scoring import hidden_at, plant, token_losses
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.training.loop import accumulate_gradients, apply_schedule, make_optimizer
from tests.conftest import fill_randomly

B, T, V = 2, 128, 400
SHAPE = {"vocab_size": V, "sequence_len": T, "head_dim": 64}
CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["cpu", CUDA])
def device(request, monkeypatch):
    """A device, on which float32 products are not rounded to fewer bits, and without graphs of other tests."""
    if request.param == "cpu":
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    torch.compiler.reset()
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield torch.device(request.param)
    torch.set_float32_matmul_precision(before)


@pytest.fixture(params=["recipe", "october"])
def config(request):
    return (GPTConfig.from_depth if request.param == "recipe" else GPTConfig.october_2025)(2, **SHAPE)


def random_model(config, device, dtype=torch.bfloat16, seed=1):
    """With every weight at work."""
    on_cpu = build_model(config, generator=torch.Generator().manual_seed(0))
    fill_randomly(on_cpu, seed=seed)
    model = build_model(config, device=device, compute_dtype=dtype)
    model.load_state_dict(on_cpu.state_dict())
    return model


def optimizer_of(model):
    return make_optimizer(model, Runtime(0, 0, 1, model.device, model.compute_dtype))


def random_ids(*shape, seed=0):
    return torch.randint(V, shape, generator=torch.Generator().manual_seed(seed))


def batches_on(device):
    """The same batch again and again."""
    idx, targets = random_ids(B, T).to(device), random_ids(B, T, seed=1).to(device)
    return repeat(Batch(idx, targets, B * T, 0))


@contextmanager
def no_waiting(device):
    """Within it, on a GPU, an operation that makes the host wait for the device raises an error."""
    if device.type == "cuda":
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if device.type == "cuda":
            torch.cuda.set_sync_debug_mode("default")


def test_a_training_step_never_waits_for_the_device(device, config):
    model = random_model(config, device)
    model.compile_trunk()
    optimizer = optimizer_of(model)

    def take_step():
        apply_schedule(optimizer, lr_mult=0.5, momentum=0.9, decay_mult=0.5)
        loss = accumulate_gradients(model, batches_on_device, 2, device=device)
        optimizer.step()
        optimizer.zero_grad()
        return loss

    batches_on_device = batches_on(device)
    losses = [take_step() for _ in range(3)]  # the first ones compile
    with no_waiting(device):
        losses += [take_step() for _ in range(2)]
    assert sorted(losses, reverse=True) == losses


def test_a_decode_step_never_waits_for_the_device(device, config):
    inference = serving_model(random_model(config, device).requires_grad_(False), 4, "")
    prompts = random_ids(3, 20).tolist()
    inference.prefill([Piece(slot, prompt, 0, None) for slot, prompt in enumerate(prompts)])
    previous, idx = (torch.tensor(column, device=device) for column in list(zip(*prompts, strict=True))[-2:])
    drawing = plan_draw([Sampling(temperature=0.8, top_k=5)] * 3, [0.1, 0.5, 0.9], V)
    drawn = []
    for position in range(20, 24):
        with no_waiting(device) if position > 20 else nullcontext():  # the first one records
            previous, (_, idx) = idx, inference.decode_and_draw(idx, previous, [position] * 3, drawing)
        drawn.append(idx)
    assert all(((ids >= 0) & (ids < V)).all() for ids in drawn)


def test_steps_of_the_optimizer_equal_plain_ones_on_the_cpu(device, config):
    expected = random_model(config, "cpu", torch.float32)
    model = random_model(config, device, torch.float32)
    plain, optimizer = optimizer_of(expected), optimizer_of(model)
    generator = torch.Generator().manual_seed(2)
    for _ in range(3):
        grads = [torch.randn(p.shape, generator=generator) for p in expected.parameters()]
        for own, one in ((expected, plain), (model, optimizer)):
            sum((p * grad.to(p.device)).sum() for p, grad in zip(own.parameters(), grads, strict=True)).backward()
            one.step()
            one.zero_grad()
    for (name, p), q in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(p.cpu(), q, rtol=1e-3, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_losses_of_compiled_steps_equal_eager_ones(device, config):
    """Within what rounding to bfloat16 makes of them: the compiler leaves out some of it."""
    losses = []
    for is_compiled in (False, True):
        model = random_model(config, device)
        if is_compiled:
            model.compile_trunk()
        optimizer = optimizer_of(model)
        losses.append([])
        for _ in range(8):
            losses[-1].append(accumulate_gradients(model, batches_on(device), 1, device=device).item())
            optimizer.step()
            optimizer.zero_grad()
    assert losses[0][-1] < losses[0][0] - 0.1
    np.testing.assert_allclose(losses[1], losses[0], rtol=2e-2)


def test_refreshed_weights_give_the_log_probabilities_of_a_new_engine(device, config, tokenizer):
    """To the last bit, though the passes were recorded with other weights."""
    first, second = (random_model(config, device, seed=seed).requires_grad_(False) for seed in (1, 2))

    def reply(engine):
        sampling = Sampling(max_tokens=12, temperature=0.9, seed=0, num_logprobs=5)
        prompts = random_ids(3, 20).tolist()
        return [completion.tokens for (completion,) in engine.generate(prompts, sampling, stop_ids=())]

    engine, fresh = Engine(first, tokenizer, max_rows=4), Engine(second, tokenizer, max_rows=4)
    before = reply(engine)
    engine.refresh(second)
    after = reply(engine)
    assert after == reply(fresh)
    assert after != before


def test_scores_of_a_batch_equal_those_on_the_cpu(device, config):
    """Texts that share a stem, as the choices of a question do."""
    stem = random_ids(30).numpy()
    texts = [np.concatenate((stem, random_ids(length, seed=length).numpy())) for length in (3, 5, 9)]
    trees, of_texts = plant(texts)
    rows = np.concatenate([np.full(len(places) - 1, tree) for tree, places in of_texts])
    places = np.concatenate([places[:-1] for _, places in of_texts])
    targets = torch.from_numpy(np.concatenate([text[1:] for text in texts]))
    scores = []
    with torch.no_grad():
        for place in ("cpu", device):
            model = random_model(config, place, torch.float32)
            losses, hits = token_losses(model, hidden_at(model, trees, rows, places), targets.to(place))
            scores.append((losses.cpu(), hits.cpu()))
    torch.testing.assert_close(scores[1], scores[0], rtol=1e-3, atol=1e-3)


def test_a_dropped_engine_gives_its_cache_back_at_once(device, config, tokenizer):
    engine = Engine(random_model(config, device).requires_grad_(False), tokenizer, max_rows=4)
    engine.generate(random_ids(2, 20).tolist(), Sampling(max_tokens=4))
    cache = weakref.ref(engine.model.cache)
    gc.disable()  # as good as in training, which exempts what it found
    try:
        del engine
        assert cache() is None
    finally:
        gc.enable()
