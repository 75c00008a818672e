"""Training in 8 bits, emulated on the CPU: the rounding, a layer against its formulas, and a whole model."""

import pytest
import torch
from fake_cuda import fake_cuda
from test_linear import CONFIGS, draw_idx, gradients_after, make_model
from torch import nn

from nanochat.common import Runtime, UserError
from nanochat.model.fp8 import E4M3, E5M2, quantise, scaled_product
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.model.linear import Linear
from nanochat.training import loop
from nanochat.training.optim import Group, MuonAdamW


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def in_8_bits(config):
    model = make_model(config)
    return model, loop.make_optimizer(model, Runtime(0, 0, 1, torch.device("cpu"), torch.bfloat16, fp8=True))


@pytest.mark.parametrize(("dtype", "mantissa_bits"), [(E4M3, 3), (E5M2, 2)])
@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_values_are_rounded_to_the_mantissa_whatever_their_size(dtype, mantissa_bits, size):
    x = size * draw(50, 70).bfloat16()
    rounded, scale = quantise(x, dtype)
    assert rounded.float().abs().max() == torch.finfo(dtype).max
    error = (rounded.float() * scale - x.float()).abs()
    smallest = torch.finfo(dtype).smallest_normal * scale
    assert (error <= torch.maximum(x.float().abs(), smallest) * 2.0 ** -(mantissa_bits + 1)).all()


def test_each_matrix_has_a_scale_of_its_own_and_zeros_stay_zeros():
    x = torch.stack((draw(4, 8), 1e-5 * draw(4, 8), torch.zeros(4, 8)))
    rounded, scale = quantise(x, E4M3, dims=(1, 2))
    assert scale.shape == (3, 1, 1)
    for matrix, its_rounded, its_scale in zip(x, rounded, scale, strict=True):
        alone, alone_scale = quantise(matrix, E4M3)
        assert torch.equal(alone.float(), its_rounded.float())
        assert its_scale.item() == alone_scale.item()
    assert not rounded[2].float().any()


def test_a_layer_is_the_product_of_its_rounded_operands_and_so_is_its_backward():
    layer = Linear(32, 48)
    layer.weight = nn.Parameter(draw(48, 32, seed=1))
    optimizer = MuonAdamW(
        [Group("matrices", "muon", {"weight": layer.weight}, 0.1)], copy_dtype=torch.bfloat16, use_fp8=True
    )
    layer.copy = optimizer.copies["weight"]
    x, grad_y = draw(2, 5, 32).bfloat16().requires_grad_(), draw(2, 5, 48, seed=2).bfloat16()
    y = layer(x)
    y.backward(grad_y)

    x8, w8, g8 = (
        rounded.double() * scale.double()
        for rounded, scale in (
            quantise(x.detach(), E4M3),
            quantise(layer.weight.detach(), E4M3),
            quantise(grad_y, E5M2),
        )
    )
    torch.testing.assert_close(y.double(), x8 @ w8.T, rtol=2**-8, atol=1e-6)
    torch.testing.assert_close(x.grad.double(), g8 @ w8, rtol=2**-8, atol=1e-6)
    exact = grad_y.flatten(0, 1).double().T @ x.detach().flatten(0, 1).double()  # of what was not rounded to 8 bits
    torch.testing.assert_close(layer.weight.grad.double(), exact, rtol=2**-8, atol=1e-6)
    assert not torch.equal(y, x @ layer.weight.bfloat16().T)
    with torch.no_grad():
        assert torch.equal(layer(x), x @ layer.weight.bfloat16().T)  # evaluation stays in 16 bits


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_a_model_trains_in_8_bits_in_one_compiled_graph_and_near_its_16_bits(config):
    (model, optimizer), (compiled, _), plain = in_8_bits(config), in_8_bits(config), make_model(config)
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, Linear)}
    in_8 = [layer for name, layer in layers.items() if name != "lm_head" and "value_gate" not in name]
    assert {layer for layer in layers.values() if layer.copy.scale is not None} == set(in_8)
    trunk = torch.compile(compiled.trunk, fullgraph=True, dynamic=False, backend="aot_eager")
    expected, in_16_bits = gradients_after(model), gradients_after(plain)
    for name, gradient in gradients_after(compiled, trunk).items():
        assert torch.equal(gradient, expected[name]), name
        distance = (gradient - in_16_bits[name]).norm() / in_16_bits[name].norm()
        assert gradient.ndim < 2 or 0 < distance < 0.15, (name, distance)
    loss = model(draw_idx(), draw_idx())
    assert loss.item() == pytest.approx(plain(draw_idx(), draw_idx()).item(), rel=2e-3)

    optimizer.step()
    for layer in in_8:
        rounded, scale = quantise(layer.weight.detach(), E4M3)
        assert torch.equal(layer.copy.values.float(), rounded.float())
        assert torch.equal(layer.copy.transposed.float(), rounded.T.float())
        assert layer.copy.scale == scale


def test_heads_of_a_size_that_does_not_fit_are_refused():
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.bfloat16, fp8=True)
    odd = GPTConfig.from_depth(1, vocab_size=100, head_dim=24)
    with pytest.raises(UserError, match=r"fp8 needs n_embd to be a multiple of 16, not 72; choose .*--head-dim"):
        loop.make_optimizer(build_model(odd, device="meta"), runtime)


def test_a_gpu_takes_the_operands_as_they_are_laid_out():
    """PyTorch checks shapes and strides of an 8-bit product on the fake device as on a real one."""
    with fake_cuda() as watch:
        a, copy, scale = (torch.empty(shape, device="cuda") for shape in ((40, 32), (48, 32), ()))
        a, copy = a.to(E4M3), copy.to(E4M3)
        y = scaled_product(a, copy.T, scale, scale, dtype=torch.bfloat16, is_forward=True)
        assert (y.shape, y.dtype, y.device.type) == ((40, 48), torch.bfloat16, "cuda")
        with pytest.raises(RuntimeError):
            scaled_product(a, copy.T.contiguous(), scale, scale, dtype=torch.bfloat16, is_forward=True)
    assert watch.off_device == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_computes_what_the_emulation_does():
    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no 8-bit products")
    (x8, x_scale), (w8, w_scale) = quantise(draw(64, 256), E4M3), quantise(draw(128, 256, seed=1), E4M3)
    for is_forward in (True, False):
        expected = scaled_product(x8, w8.T, x_scale, w_scale, dtype=torch.bfloat16, is_forward=is_forward)
        on_gpu = (t.cuda() for t in (x8, w8, x_scale, w_scale))
        a, b, a_scale, b_scale = on_gpu
        actual = scaled_product(a, b.T, a_scale, b_scale, dtype=torch.bfloat16, is_forward=is_forward)
        torch.testing.assert_close(actual.cpu(), expected, rtol=2e-2, atol=2e-2)
