"""Products with copies of the weights beside plain ones: same values, same gradients, also in one compiled graph."""

import pytest
import torch
from torch import nn

from nanochat.common import Runtime
from nanochat.model import linear, products
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.model.linear import Linear
from nanochat.model.products import WeightCopy, add_product_
from nanochat.training import loop

SHAPE = {"vocab_size": 300, "sequence_len": 32, "head_dim": 16}
CONFIGS = {
    "recipe": GPTConfig.from_depth(2, **SHAPE, n_head=4, n_kv_head=2, n_embd=64),
    "october": GPTConfig.october_2025(2, **SHAPE, n_head=4, n_kv_head=4, n_embd=64),
}


def make_model(config):
    model = build_model(config, compute_dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    generator = torch.Generator().manual_seed(1)
    for p in model.parameters():  # none zero, so that all gradients count
        p.data.add_(0.05 * torch.randn(p.shape, generator=generator))
    return model


def with_copies(config, monkeypatch):
    """A model as `make_optimizer` prepares it for a GPU, and its optimizer; both on the CPU."""
    monkeypatch.setattr(Runtime, "is_cuda", True)
    model = make_model(config)
    return model, loop.make_optimizer(model, Runtime(0, 0, 1, torch.device("cpu"), torch.bfloat16))


def draw_idx():
    return torch.randint(300, (2, 32), generator=torch.Generator().manual_seed(2))


def gradients_after(model, trunk=None):
    """Of two micro-steps."""
    if trunk is not None:
        model._compiled_trunk, model._training_shape = trunk, draw_idx().shape
    for _ in range(2):
        model(draw_idx(), draw_idx()).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_losses_and_gradients_are_bit_equal_to_those_of_plain_products(config, monkeypatch):
    plain, (model, _) = make_model(config), with_copies(config, monkeypatch)
    assert all(layer.copy is not None for layer in model.modules() if isinstance(layer, Linear))
    assert torch.equal(model(draw_idx(), draw_idx()), plain(draw_idx(), draw_idx()))
    with torch.no_grad():
        assert torch.equal(model(draw_idx()), plain(draw_idx()))
    expected = gradients_after(plain)
    for name, gradient in gradients_after(model).items():
        assert torch.equal(gradient, expected[name]), name


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_compiled_trunk_is_one_graph_and_adds_to_the_same_gradients(config, monkeypatch):
    (eager, _), (model, _) = with_copies(config, monkeypatch), with_copies(config, monkeypatch)
    trunk = torch.compile(model.trunk, fullgraph=True, dynamic=False, backend="aot_eager")
    expected = gradients_after(eager)
    for name, gradient in gradients_after(model, trunk).items():
        assert torch.equal(gradient, expected[name]), name


def test_copies_follow_the_weights_at_every_step(monkeypatch):
    model, optimizer = with_copies(CONFIGS["recipe"], monkeypatch)
    before = model.h[0].mlp.c_fc.copy.values.clone()
    for _ in range(2):
        model(draw_idx(), draw_idx()).backward()
        optimizer.step()
        optimizer.zero_grad()
        for layer in model.modules():
            if isinstance(layer, Linear):
                assert torch.equal(layer.copy.values, layer.weight.bfloat16())
                assert layer.copy.grad is None or not layer.copy.grad.any()
    assert not torch.equal(model.h[0].mlp.c_fc.copy.values, before)


def test_training_with_copies_is_bit_equal_to_training_without(monkeypatch):
    plain, (model, optimizer) = make_model(CONFIGS["recipe"]), with_copies(CONFIGS["recipe"], monkeypatch)
    monkeypatch.undo()
    optimizers = optimizer, loop.make_optimizer(plain, Runtime(0, 0, 1, torch.device("cpu"), torch.bfloat16))
    for _ in range(3):
        for each, its_optimizer in zip((model, plain), optimizers, strict=True):
            gradients_after(each)
            its_optimizer.step()
            its_optimizer.zero_grad()
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_listener_hears_of_every_addition_also_from_a_compiled_backward():
    weights = [torch.randn(8, 8) for _ in range(3)]
    layers, heard = [Linear(8, 8) for _ in weights], []
    for number, (layer, weight) in enumerate(zip(layers, weights, strict=True)):
        layer.copy = WeightCopy(weight.bfloat16(), torch.zeros(8, 8))
        products.on_gradient(layer.copy.grad, lambda number=number: heard.append(number))
    chain = nn.Sequential(*layers)
    for run in (chain, torch.compile(chain, fullgraph=True)):  # the compiler must let it add in place
        heard.clear()
        run(torch.randn(4, 8, dtype=torch.bfloat16).requires_grad_()).sum().backward()
        assert heard == [2, 1, 0]


def test_the_operations_are_what_they_are_registered_as():
    x, values = torch.randn(3, 5, 8).requires_grad_(), torch.randn(4, 8)
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(linear._linear, (x, values, torch.zeros(4, 8)), test_utils=kinds)
    with torch.no_grad():
        arguments = (torch.zeros(4, 8), torch.randn(3, 5, 4), torch.randn(3, 5, 8))
        torch.library.opcheck(products.add_gradient_, arguments, test_utils=kinds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_rounds_no_product_to_16_bits_before_it_is_added():
    a, b = (torch.randn(256, 256, device="cuda").bfloat16() for _ in range(2))
    total = torch.full((256, 256), 1e-3, device="cuda")
    add_product_(total, a, b)
    exact = a.double() @ b.double() + 1e-3
    assert (total - exact).abs().max() < 1e-4
    assert (total - exact).abs().max() < (total.bfloat16() - exact).abs().max() / 50
