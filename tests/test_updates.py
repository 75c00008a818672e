"""The two updates against references in float64."""

import math

import pytest
import torch
from torch import nn

from nanochat.training.updates import adamw_update, muon_update, polar_express


@pytest.mark.parametrize("grad_scale", [1.0, 1e-9, 1e-14])
def test_adamw_equals_torch_in_float64_also_for_tiny_gradients(grad_scale):
    generator = torch.Generator().manual_seed(0)
    lr, betas, eps, weight_decay = 0.03, (0.8, 0.95), 1e-10, 0.1
    ours = torch.randn(50, generator=generator, dtype=torch.float64)
    theirs = nn.Parameter(ours.clone())
    exp_avg, exp_avg_sq = torch.zeros_like(ours), torch.zeros_like(ours)
    reference = torch.optim.AdamW([theirs], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)
    for step in range(1, 101):
        grad = grad_scale * torch.randn(50, generator=generator, dtype=torch.float64)
        adamw_update(
            ours, grad, exp_avg, exp_avg_sq, step_size=lr / (1 - betas[0] ** step), beta1=betas[0], beta2=betas[1],
            correction2=math.sqrt(1 - betas[1] ** step), eps=eps, decay=lr * weight_decay,
        )  # fmt: skip
        theirs.grad = grad
        reference.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


def assert_in_band(orthogonalised):
    values = torch.linalg.svdvals(orthogonalised.float())
    assert values.min() > 0.84
    assert values.max() < 1.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (8, 12), (1, 9), (3, 1)])
def test_orthogonalised_singular_values_lie_in_the_stated_band(dtype, shape):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1.0, 0.01, 100.0, 1.0, 1.0])[:, None, None]
    assert_in_band(polar_express(x.to(dtype)))
    assert not polar_express(torch.zeros(2, *shape, dtype=dtype)).any()  # nor is a zero matrix NaN


def test_the_stated_band_holds_down_to_a_thousandth_of_the_norm():
    small = torch.logspace(-3, -0.2, 300, dtype=torch.float64)
    x = torch.diag_embed(torch.stack((small, (1 - small**2).sqrt()), dim=1)).float()
    assert_in_band(polar_express(x))


@pytest.mark.parametrize("shape", [(4, 6, 10), (2, 10, 6)])
def test_muon_equals_the_same_formulas_in_float64(shape):
    """One matrix at a time, the polar factor from an SVD: equal up to the band of the orthogonalisation."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(shape, generator=generator)
    wanted, (K, m, n) = p.double(), shape
    momentum_buffer, row_variance = torch.zeros(shape), torch.zeros(K, m, 1)
    lr, momentum, beta2, weight_decay = 0.02, 0.9, 0.9, 0.3
    average, variance = torch.zeros(shape, dtype=torch.float64), torch.zeros(K, m, dtype=torch.float64)
    for _ in range(5):
        grad = torch.randn(shape, generator=generator)
        before = p.clone()
        muon_update(
            p, grad, momentum_buffer, row_variance,
            lr=lr, momentum=momentum, beta2=beta2, weight_decay=weight_decay, dtype=torch.float32,
        )  # fmt: skip
        average = momentum * average + (1 - momentum) * grad.double()
        for k in range(K):
            x = (1 - momentum) * grad[k].double() + momentum * average[k]
            x = x / x.norm(dim=1, keepdim=True)
            update = polar_express(x)
            variance[k] = beta2 * variance[k] + (1 - beta2) * update.square().mean(dim=1)
            update = update / variance[k].sqrt()[:, None]
            update *= math.sqrt(min(m, n)) / update.norm()
            agrees = (update * before[k].double() > 0).double()
            wanted[k] -= lr * (math.sqrt(max(1, m / n)) * update + weight_decay * agrees * before[k].double())
    torch.testing.assert_close(p.double(), wanted, rtol=1e-4, atol=1e-5)


def test_muon_updates_have_one_size_whatever_the_gradients_size():
    grad = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    updates, rates = [], {"lr": 0.1, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0}
    for scale in (1.0, 1e-3, 1e4):
        p, buffer, variance = torch.zeros(3, 8, 20), torch.zeros(3, 8, 20), torch.zeros(3, 8, 1)
        muon_update(p, scale * grad, buffer, variance, **rates, dtype=torch.float32)
        updates.append(p)
        assert p.norm(dim=(1, 2)) == pytest.approx([0.1 * math.sqrt(8)] * 3, rel=1e-4)
        torch.testing.assert_close(p, updates[0], rtol=1e-3, atol=1e-5)
