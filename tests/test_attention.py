import pytest
import torch

from nanochat.model import attention
from nanochat.model.attention import band_mask, causal_attention


def plain_attention(q, k, v, window):
    """One query at a time, in float64: the definition."""
    group = q.size(2) // k.size(2)
    out = torch.zeros_like(q)
    for b in range(q.size(0)):
        for t in range(q.size(1)):
            first = 0 if window is None else max(0, t - window + 1)
            for h in range(q.size(2)):
                keys, values = k[b, first : t + 1, h // group], v[b, first : t + 1, h // group]
                weights = torch.softmax(keys @ q[b, t, h] * q.size(-1) ** -0.5, dim=0)
                out[b, t, h] = weights @ values
    return out


def draw(T, H=4, H_kv=2, B=2, D=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((B, T, H, D), (B, T, H_kv, D), (B, T, H_kv, D))
    return [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]


@pytest.mark.parametrize("backend", ["masked", "sdpa"])
@pytest.mark.parametrize("window", [None, 1, 2, 5, 7, 8, 19, 20, 50])
@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 20])
def test_every_backend_equals_the_definition(backend, window, T):
    q, k, v = draw(T)
    y = causal_attention(q, k, v, window=window, backend=backend)
    torch.testing.assert_close(y, plain_attention(q, k, v, window))


@pytest.mark.parametrize("window", [None, 3, 4])
def test_gradients_of_the_blocked_window_equal_the_masked_ones(window):
    gradients = []
    for backend in ("masked", "sdpa"):
        tensors = [x.requires_grad_() for x in draw(10)]
        causal_attention(*tensors, window=window, backend=backend).square().sum().backward()
        gradients.append([x.grad for x in tensors])
    for masked, blocked in zip(*gradients, strict=True):
        torch.testing.assert_close(blocked, masked)


def test_the_band_of_a_window_is_the_one_drawn_in_the_header():
    rows = ["x.....", "xx....", "xxx...", ".xxx..", "..xxx.", "...xxx"]
    expected = torch.tensor([[c == "x" for c in row] for row in rows])
    assert torch.equal(band_mask(6, 6, 3, torch.device("cpu")), expected)
    assert torch.equal(band_mask(2, 6, 3, torch.device("cpu")), expected[4:])


def test_a_cpu_uses_sdpa():
    assert attention.default_backend("cpu", torch.bfloat16) == "sdpa"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("window", [None, 64])
def test_the_default_gpu_backend_equals_the_reference(window):
    q, k, v = (x.to("cuda", torch.bfloat16) for x in draw(256, D=128))
    expected = causal_attention(q.float(), k.float(), v.float(), window=window, backend="masked")
    actual = causal_attention(q, k, v, window=window)
    torch.testing.assert_close(actual.float(), expected, rtol=2e-2, atol=2e-2)
