"""FlashAttention's operation with the package's kernels played by PyTorch: shapes, gradients, and whole graphs."""

import pytest
import torch

from nanochat.model import flash
from nanochat.model.attention import Backends, causal_attention


def scores_of(q, k, window_size_left, window_size_right):
    """Scaled scores (B, H, T, T), -inf where hidden."""
    assert (window_size_left is None) == (window_size_right is None)
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.size(-1) ** -0.5
    distance = torch.arange(q.size(1)).unsqueeze(1) - torch.arange(q.size(1))
    reach = q.size(1) if window_size_left is None else window_size_left
    return scores.masked_fill((distance < 0) | (distance > reach), -torch.inf)


def played_forward(q, k, v, *, causal, return_lse, **window):
    """As the package's forward: (B, T, H, D) in and out, the log-sum-exp (B, H, T) beside it."""
    assert causal
    assert return_lse
    k, v = (x.repeat_interleave(q.size(2) // k.size(2), 2) for x in (k, v))
    scores = scores_of(q, k, **window)
    out = torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)
    return out.contiguous(), scores.logsumexp(-1), None, None, None


def played_backward(q, k, v, out, grad, lse, *, causal, **window):
    """By the formulas of arXiv 2205.14135, algorithm 4; autograd is off within an operation."""
    assert causal
    assert grad.is_contiguous()
    groups = q.size(2) // k.size(2)
    k, v = (x.repeat_interleave(groups, 2) for x in (k, v))
    shares = (scores_of(q, k, **window) - lse.unsqueeze(-1)).exp()
    delta = (grad * out).sum(-1).transpose(1, 2).unsqueeze(-1)
    grad_scores = shares * (torch.einsum("bqhd,bkhd->bhqk", grad, v) - delta) * q.size(-1) ** -0.5
    dq = torch.einsum("bhqk,bkhd->bqhd", grad_scores, k).contiguous()
    dk = torch.einsum("bhqk,bqhd->bkhd", grad_scores, q)
    dv = torch.einsum("bhqk,bqhd->bkhd", shares, grad)
    dk, dv = (x.unflatten(2, (-1, groups)).sum(3).contiguous() for x in (dk, dv))
    return dq, dk, dv, None


@pytest.fixture(autouse=True)
def played_package(monkeypatch):
    monkeypatch.setattr(flash, "flash_kernels", lambda: (played_forward, played_backward))


def draw(T=12, H=4, H_kv=2, D=8):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, T, heads, D, generator=generator).requires_grad_() for heads in (H, H_kv, H_kv)]


@pytest.mark.parametrize("window", [None, 1, 5])
@pytest.mark.parametrize("compiled", [False, True])
def test_output_and_gradients_equal_the_reference_also_in_a_whole_graph(window, compiled):
    inputs = draw()

    def attend(q, k, v):
        return 2 * flash.flash_attention(q, k, v, window).transpose(1, 2)  # a gradient that is not contiguous

    run = torch.compile(attend, fullgraph=True, backend="aot_eager") if compiled else attend
    actual = run(*inputs)
    expected = 2 * causal_attention(*inputs, window=window, backends=Backends("masked", "masked")).transpose(1, 2)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn(actual.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(torch.autograd.grad(actual, inputs, grad), torch.autograd.grad(expected, inputs, grad))


def test_the_operations_are_what_they_are_registered_as():
    kinds = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(flash._forward, (*draw(), 5), test_utils=kinds)


def test_a_missing_package_is_no_error(monkeypatch):
    monkeypatch.undo()
    assert flash.flash_kernels() is None or len(flash.flash_kernels()) == 2
