import pytest
import torch
import torch.nn.functional as F

from nanochat.model import loss
from nanochat.model.loss import IGNORE_INDEX, loss_and_logit_gradient_, softcap_cross_entropy, softcap_logits

SOFTCAP = 15.0


def draw(rows=37, channels=16, vocab_size=53, masked=0.3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, channels, generator=generator)
    weight = 3.0 * torch.randn(vocab_size, channels, generator=generator)
    targets = torch.randint(vocab_size, (rows,), generator=generator)
    targets[torch.rand(rows, generator=generator) < masked] = IGNORE_INDEX
    return hidden.to(dtype).requires_grad_(), weight.requires_grad_(), targets


def plain_loss(hidden, weight, targets, reduction="mean"):
    logits = SOFTCAP * torch.tanh(hidden.double() @ weight.double().T / SOFTCAP)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction=reduction)


def loss_and_gradients(function, hidden, weight, targets, scale=1.0, **options):
    value = function(hidden, weight, targets, **options)
    return value.detach().double(), *torch.autograd.grad(scale * value, (hidden, weight))


def capped_loss(*inputs, **options):
    return softcap_cross_entropy(*inputs, softcap=SOFTCAP, **options)


@pytest.mark.parametrize("piece_rows", [1, 5, 36, 37, 1000])
@pytest.mark.parametrize("block_rows", [1, 3, 1000])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_loss_and_gradients_equal_plain_cross_entropy_however_they_are_cut(
    monkeypatch, piece_rows, block_rows, reduction
):
    hidden, weight, targets = draw()
    monkeypatch.setattr(loss, "CPU_PIECE_ELEMENTS", piece_rows * weight.size(0))
    monkeypatch.setattr(loss, "CPU_BLOCK_ELEMENTS", block_rows * weight.size(0))
    expected, *expected_gradients = loss_and_gradients(plain_loss, hidden, weight, targets, 2.5, reduction=reduction)
    actual, *gradients = loss_and_gradients(capped_loss, hidden, weight, targets, 2.5, reduction=reduction)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-4, atol=1e-5)


def test_per_target_losses_are_zero_where_ignored_and_exact_elsewhere():
    hidden, weight, targets = draw()
    losses = capped_loss(hidden.view(1, 37, 16), weight, targets.view(1, 37), reduction="none")
    assert losses.shape == (1, 37)
    assert (losses[0][targets == IGNORE_INDEX] == 0).all()
    expected = plain_loss(hidden, weight, targets, reduction="none")
    torch.testing.assert_close(losses[0].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("factor", "has_targets"), [(1.0, False), (1e4, True)])
def test_without_targets_all_is_zero_and_extreme_logits_stay_finite(factor, has_targets):
    hidden, weight, targets = draw()
    if not has_targets:
        targets = torch.full((37,), IGNORE_INDEX)
    hidden = (factor * hidden.detach()).requires_grad_()
    for tensor in loss_and_gradients(capped_loss, hidden, weight, targets):
        assert tensor.isfinite().all()
        assert has_targets or (tensor == 0).all()


def test_bfloat16_activations_give_gradients_near_the_exact_ones():
    hidden, weight, targets = draw(dtype=torch.bfloat16)
    _, *expected = loss_and_gradients(plain_loss, hidden, weight, targets)
    _, *actual = loss_and_gradients(capped_loss, hidden, weight, targets)
    assert [gradient.dtype for gradient in actual] == [torch.bfloat16, torch.float32]
    for ours, theirs in zip(actual, expected, strict=True):
        error = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert error < 0.03


def test_the_kernel_does_not_read_what_it_overwrites():
    z = torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    targets = torch.arange(8)
    total, gradient = loss_and_logit_gradient_(z.clone(), targets, SOFTCAP)
    z64 = z.double().requires_grad_()
    expected = F.cross_entropy(SOFTCAP * torch.tanh(z64 / SOFTCAP), targets, reduction="sum")
    expected.backward()
    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient.double(), z64.grad, rtol=1e-4, atol=1e-6)


def test_logits_are_capped_and_float32():
    hidden, weight, _ = draw(dtype=torch.bfloat16)
    logits = softcap_logits(100 * hidden, weight, SOFTCAP)
    assert logits.dtype == torch.float32
    assert logits.abs().max() <= SOFTCAP


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_compiled_gpu_kernel_equals_the_plain_loss():
    hidden, weight, targets = (x.detach().cuda().requires_grad_(x.requires_grad) for x in draw())
    _, *expected = loss_and_gradients(plain_loss, hidden, weight, targets)
    _, *actual = loss_and_gradients(capped_loss, hidden, weight, targets)
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4)
