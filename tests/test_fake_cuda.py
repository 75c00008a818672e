"""The model and the engine on a GPU that is only pretended: no operation and no result may be on another device."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_cuda import _Watch, fake_cuda
from test_inference import CONFIGS

from nanochat.common import Runtime
from nanochat.engine.inference import Piece
from nanochat.engine.sampling import Sampling, plan_draw
from nanochat.evals.scoring import hidden_at, plant
from nanochat.model import attention
from nanochat.model.gpt import GPT, build_model
from nanochat.training.loop import make_optimizer


@pytest.fixture(params=CONFIGS.values(), ids=CONFIGS)
def config(request):
    return request.param


@pytest.fixture(autouse=True)
def without_driver(monkeypatch):
    """No compiler, and no question to the driver about the kernels it can run: cuDNN's, in training."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))


@pytest.fixture
def watch():
    with fake_cuda() as watch:
        yield watch


def on_gpu(config):
    """As `build_model` makes it; that goes over the meta device, where a fake tensor cannot be."""
    with torch.device("cuda"):
        model = GPT(config, compute_dtype=torch.bfloat16)
    for table in filter(None, (model.wte, model.value_embeds)):
        table.weight = torch.nn.Parameter(torch.empty_like(table.weight, dtype=torch.bfloat16))
    return model


def attach_copies(model, use_fp8):
    make_optimizer(model, Runtime(0, 0, 1, torch.device("cuda"), torch.bfloat16, fp8=use_fp8))


def draw_idx(shape):
    return torch.zeros(shape, dtype=torch.int64, device="cuda")


def serving_on_gpu(config, weights="", num_slots=4):
    pytest.importorskip("triton")
    from nanochat.engine.gpu import GpuModel

    inference = GpuModel(on_gpu(config), num_slots, weights=weights)
    inference._graphs._record = lambda run: run
    return inference


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("use_fp8", [False, True])
def test_the_forward_of_training_and_evaluation_stays_on_the_gpu(config, watch, reduction, use_fp8):
    model = on_gpu(config)
    attach_copies(model, use_fp8)
    model.compile_trunk()
    idx = draw_idx((2, 48))
    loss = model(idx, idx, reduction=reduction)
    assert loss.device.type == "cuda"
    if reduction == "sum":
        gradients = loss.grad_fn.apply(torch.empty((), device="cuda"))  # the loss's own backward
        assert [gradient.device.type for gradient in gradients[:2]] == ["cuda", "cuda"]
    with torch.no_grad():
        assert model(idx).device.type == model(idx, idx, reduction="none").device.type == "cuda"
    assert watch.num_operations > 100
    assert watch.off_device == watch.waits == []


def test_rows_of_logits_are_aligned_whatever_the_vocabulary(config, watch, monkeypatch):
    """16 bytes, which matrix kernels need to be fast."""
    seen = []
    monkeypatch.setattr("nanochat.model.loss._gpu_kernel", lambda z, *_: (seen.append(z), (z.sum(), z))[1])
    model = on_gpu(replace(config, vocab_size=397))
    model(draw_idx((2, 48)), draw_idx((2, 48)))
    assert [z.stride() for z in seen] == [(448, 1)]
    assert watch.off_device == []


def test_the_mask_of_a_window_is_made_on_the_gpu(watch):
    mask = attention.window_block_mask.__wrapped__(300, 100, torch.device("cuda"))
    assert {x.device.type for x in mask.as_tuple() if isinstance(x, torch.Tensor)} == {"cuda"}
    assert watch.off_device == []


@pytest.mark.parametrize("use_fp8", [False, True])
def test_the_backward_of_the_trunk_stays_on_its_device(config, use_fp8):
    """On the meta device: autograd asks CUDA's driver for its streams, also for a fake tensor."""
    model = build_model(config, device="meta", compute_dtype=torch.bfloat16)
    attach_copies(model, use_fp8)
    idx = torch.zeros(2, 48, dtype=torch.int64, device="meta")
    with _Watch() as watch:
        model.hidden(idx).sum().backward()
    assert watch.num_operations > 200
    assert watch.off_device == []


def test_scoring_stays_on_the_gpu(config, watch):
    """Texts with a common stem, and one alone."""
    stem = np.arange(20)
    trees, _ = plant([np.append(stem, ending) for ending in (1, 2)] + [np.arange(30, 43)])
    model = on_gpu(config)
    with torch.no_grad():
        hidden = hidden_at(model, trees, np.array([0, 0, 1]), np.array([20, 21, 12]))
    assert (hidden.device.type, hidden.shape) == ("cuda", (3, config.n_embd))
    assert watch.mixed == []  # the batch is laid out on the host, then sent


@pytest.mark.parametrize("weights", ["", "float32", "int8"])
def test_prefill_and_decode_stay_on_the_gpu(config, watch, weights):
    inference = serving_on_gpu(config, weights)
    pieces = [Piece(0, [1] * 20, 0, None), Piece(1, [2], 7, 3), Piece(2, [4] * 30, 9, 5)]
    idx = draw_idx((3,))
    assert inference.prefill(pieces).device.type == "cuda"
    assert inference.decode(idx, idx, [20, 8, 39]).device.type == "cuda"
    for rows in ([Sampling(temperature=0.0)], [Sampling()], [Sampling(top_k=5)], [Sampling(top_p=0.9)] * 3):
        drawing = plan_draw(rows, [0.5] * len(rows), 400, barred=(3, 4))
        watch.waits.clear()
        logits, ids = inference.decode_and_draw(idx[: len(rows)], idx[: len(rows)], [20, 8, 39][: len(rows)], drawing)
        assert (logits.device.type, ids.device.type) == ("cuda", "cuda")
        assert watch.mixed == watch.waits == []  # the pass is laid out on the host, then sent
    inference.cache.copy_slot(0, 2, 20)
    inference.cache.swap_slots(0, 1, 20)
    inference.refresh(on_gpu(config))
    assert watch.mixed == []


@pytest.mark.parametrize("num_rows", [1, 4, 16, 32, 128])
def test_a_decode_step_launches_at_most_nine_kernels_a_layer(config, watch, num_rows):
    """Each operation that is not a view is one, as those of our own are; `cap_and_draw` is two."""
    names = []
    for num_layers in (2, 3):
        inference = serving_on_gpu(replace(config, n_layer=num_layers, window_pattern="L"), num_slots=num_rows)
        places = torch.zeros(
            num_rows * (1 + 1 + inference.cache.tables[0].num_entries), dtype=torch.int32, device="cuda"
        )
        watch.launches.clear()
        inference.decode_pass(draw_idx((num_rows,)), draw_idx((num_rows,)), places)
        names.append(list(watch.launches))
    assert len(names[1]) - len(names[0]) <= 9, names[1]
    assert len(names[0]) < 2 * 9 + 6, names[0]
