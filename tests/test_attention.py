"""Every backend against the definition, and which of them is taken where."""

import pytest
import torch
from torch._functorch._aot_autograd.autograd_cache import check_cacheable
from torch.nn.attention import flex_attention

from nanochat.common import UserError
from nanochat.flags import ATTENTION
from nanochat.model import attention
from nanochat.model.attention import BACKENDS, Backends, band_mask, causal_attention, choose_backends, window_block_mask

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
BF16 = torch.bfloat16


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
    y = causal_attention(q, k, v, window=window, backends=Backends(backend, backend))
    torch.testing.assert_close(y, plain_attention(q, k, v, window))


def with_gradients(backend, q, k, v, window, *, attend=causal_attention, block_mask=None):
    """Output of a backend, and the gradients of the sum of its squares."""
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]
    y = attend(*inputs, window=window, backends=Backends(backend, backend), block_mask=block_mask)
    return y, *torch.autograd.grad(y.float().square().sum(), inputs)


@pytest.mark.parametrize("window", [None, 3, 4])
def test_gradients_of_the_blocked_window_equal_the_masked_ones(window):
    assert_all_close(with_gradients("sdpa", *draw(10), window), with_gradients("masked", *draw(10), window))


def assert_all_close(actual, expected):
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.fixture
def flex_on_cpu(monkeypatch):
    """PyTorch has no Triton kernels for a CPU, but formulas for the same operation. It refuses them in training."""
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)


@pytest.mark.parametrize(("T", "window"), [(20, 1), (20, 7), (256, 128), (300, 40), (300, 200)])
def test_flex_attention_equals_the_reference_forward_and_backward(T, window, flex_on_cpu):
    torch._dynamo.reset()
    attend = torch.compile(causal_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    inputs, expected = draw(T), with_gradients("masked", *draw(T), window)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            mask = window_block_mask(T, window, CPU)
            assert_all_close(with_gradients("flex", *inputs, window, attend=attend, block_mask=mask), expected)


def test_only_the_blocks_that_a_window_touches_are_computed():
    """Of 16 x 16 blocks of 128, a window of 512 touches the diagonal and the four before it."""
    mask = window_block_mask(2048, 512, CPU)
    partly = torch.tensor([1] * 4 + [2] * 12)  # the diagonal, and the block where the window begins
    wholly = torch.tensor([0, 1, 2] + [3] * 13)
    assert torch.equal(mask.kv_num_blocks.flatten().long(), partly)
    assert torch.equal(mask.full_kv_num_blocks.flatten().long(), wholly)
    assert (partly + wholly).sum() == 70
    assert mask is window_block_mask(2048, 512, CPU)


@pytest.mark.parametrize("backend", ["cudnn", "flex"])
def test_a_graph_with_kernels_for_a_gpu_is_whole_and_can_be_cached(backend, flex_on_cpu):
    """On the meta device: shapes without data, forward and backward."""
    device = torch.device("meta" if backend == "cudnn" else "cpu")
    q, k, v = (x.to(device, BF16).requires_grad_() for x in draw(256, D=64))
    graphs = []

    def cacheable(graph, inputs):
        check_cacheable(graph)
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    attend = torch.compile(causal_attention, fullgraph=True, backend=cacheable, dynamic=False)
    options = {"window": 100, "block_mask": window_block_mask(256, 100, device)} if backend == "flex" else {}
    attend(q, k, v, backends=Backends(backend, backend), **options).sum().backward()
    assert [x.grad.shape for x in (q, k, v)] == [x.shape for x in (q, k, v)]
    assert len(graphs) == 1
    assert backend in graphs[0].code


def test_the_band_of_a_window_is_the_one_drawn_in_the_header():
    rows = ["x.....", "xx....", "xxx...", ".xxx..", "..xxx.", "...xxx"]
    expected = torch.tensor([[c == "x" for c in row] for row in rows])
    assert torch.equal(band_mask(6, 6, 3, torch.device("cpu")), expected)
    assert torch.equal(band_mask(2, 6, 3, torch.device("cpu")), expected[4:])


# --- the choice ---


@pytest.fixture
def machine(monkeypatch):
    """Pretends to be a GPU of a compute capability, with FlashAttention 4 or without."""

    def pretend(capability, has_flash=False):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
        monkeypatch.setattr(attention, "flash_kernels", lambda: ("forward", "backward") if has_flash else None)

    return pretend


@pytest.mark.parametrize(
    ("capability", "dtype", "has_flash", "is_compiled", "full", "windowed"),
    [
        ((9, 0), BF16, True, True, "flash", "flash"),
        ((9, 0), BF16, True, False, "flash", "flash"),
        ((9, 0), BF16, False, True, "cudnn", "flex"),
        ((9, 0), torch.float16, False, True, "cudnn", "flex"),
        ((9, 0), BF16, False, False, "sdpa", "sdpa"),  # shapes may be any
        ((9, 0), torch.float32, True, True, "sdpa", "sdpa"),
        ((10, 0), BF16, True, True, "flash", "flash"),
        ((8, 0), BF16, True, True, "cudnn", "flex"),
        ((8, 9), BF16, False, True, "cudnn", "flex"),
        ((7, 5), torch.float16, True, True, "sdpa", "sdpa"),
    ],
)
def test_the_fastest_that_fit_are_taken(machine, capability, dtype, has_flash, is_compiled, full, windowed):
    machine(capability, has_flash)
    chosen = choose_backends(GPU, dtype, 128, 2048, is_compiled=is_compiled)
    assert (chosen.full, chosen.windowed) == (full, windowed)


def test_the_choice_is_told_with_its_reason(machine):
    machine((9, 0))
    chosen = choose_backends(GPU, BF16, 128, 2048, is_compiled=True)
    assert chosen.in_words(512) == (
        "attention: flex for windows of 512, cudnn for full layers "
        "(flash: package flash-attn-4 is not installed or does not load)"
    )
    assert chosen.in_words(None).startswith("attention: cudnn (flash: package")
    assert choose_backends(CPU, BF16, 128, 2048).in_words(512) == "attention: sdpa (no CUDA GPU)"
    machine((8, 6))
    assert choose_backends(GPU, BF16, 128, 2048).reason == (
        "flash: compute capability 8.6 is below 9.0; flex, cudnn: the model is not compiled"
    )
    assert choose_backends(GPU, BF16, 256, 2048).reason.endswith("heads of 256 channels are not 16 to 128 and a "
                                                                 "multiple of 8")  # fmt: skip
    assert choose_backends(GPU, BF16, 128, 64, is_compiled=True).windowed == "sdpa"
    machine((9, 0), has_flash=True)
    assert choose_backends(GPU, BF16, 128, 2048).in_words(512) == "attention: flash (the fastest here)"


@pytest.mark.parametrize(
    ("wanted", "full", "windowed"),
    [("flash", "flash", "flash"), ("sdpa", "sdpa", "sdpa"), ("masked", "masked", "masked"), ("flex", "flash", "flex"),
     ("cudnn", "cudnn", "flash")],
)  # fmt: skip
def test_a_backend_asked_for_serves_the_layers_that_it_can(machine, wanted, full, windowed):
    machine((9, 0), has_flash=True)
    reason = f"--attention {wanted}"
    assert choose_backends(GPU, BF16, 128, 2048, is_compiled=True, wanted=wanted) == Backends(full, windowed, reason)


@pytest.mark.parametrize(
    ("device", "wanted", "is_compiled", "dtype", "words"),
    [
        (CPU, "flex", False, BF16, "no CUDA GPU; possible are sdpa, masked"),
        (GPU, "flash", True, BF16, "package flash-attn-4 is not installed .* possible are flex, cudnn, sdpa, masked"),
        (GPU, "flex", False, BF16, "the model is not compiled; possible are sdpa, masked"),
        (GPU, "cudnn", True, torch.float32, "float32 is neither bfloat16 nor float16; possible are sdpa, masked"),
    ],
)
def test_a_backend_that_does_not_fit_is_refused_with_those_that_do(machine, device, wanted, is_compiled, dtype, words):
    machine((9, 0))
    with pytest.raises(UserError, match=f"--attention {wanted} cannot run here: {words}"):
        choose_backends(device, dtype, 128, 2048, is_compiled=is_compiled, wanted=wanted)


def test_the_flag_offers_every_backend():
    assert ATTENTION == BACKENDS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("window", [None, 100])
def test_every_backend_on_a_gpu_equals_the_reference(backend, window):
    T, device, options = 456, torch.device("cuda", 0), {}
    try:
        chosen = choose_backends(device, BF16, 128, T, is_compiled=True, wanted=backend)
    except UserError as error:
        pytest.skip(str(error))
    if backend != (chosen.full if window is None else chosen.windowed):
        pytest.skip("serves the other kind of layers")
    if backend == "flex":
        torch._dynamo.reset()
        options["attend"] = torch.compile(causal_attention, fullgraph=True, dynamic=False)
        options["block_mask"] = window_block_mask(T, window, device)
    inputs = [x.to(device, BF16) for x in draw(T, D=128)]
    expected = with_gradients("masked", *(x.float() for x in inputs), window)
    for ours, exact in zip(with_gradients(backend, *inputs, window, **options), expected, strict=True):
        assert (ours.float() - exact).norm() < 0.01 * exact.norm()  # a window longer by one is above that
