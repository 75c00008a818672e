"""The kernels of the engine's passes against PyTorch's operations, and the pages of the cache. Without a GPU the
kernels run in a process of their own, by Triton's interpreter."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("triton")


from nanochat.engine import gpu, kernels, pages
from nanochat.engine.inference import Piece
from nanochat.model.gpt import GPTConfig, build_model
from tests import plain_kernels
from tests.conftest import fill_randomly
from tests.test_engine_kernels import in_the_interpreter, mend_interpreter  # noqa: F401
from tests.test_kernels import assert_prints

PROGRAM = """
from tests import test_gpu_passes as tests
if {device!r} == "cpu":
    tests.mend_interpreter()
for name in {names}:
    getattr(tests, "check_" + name)({device!r}, tests.torch.{dtype})
print("checked")
"""
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def close(a, b, dtype):
    a, b = a.float().cpu(), b.float().cpu()
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * b.abs().max().item())


def randn(*shape, device, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(device, dtype)


def check_mix_and_norm(device, dtype):
    for N, C in ((1, 24), (3, 100), (5, 128)):
        x, other, added = (randn(N, C, device=device, dtype=dtype, seed=seed) for seed in range(3))
        parts, scales = randn(3, N, C, device=device), randn(2, device=device, dtype=dtype)
        for case in ((x, None, None, None), (x, added, None, None), (x, parts, None, None), (x, added, other, scales)):
            on_cpu = [None if tensor is None else tensor.cpu() for tensor in case]
            for found, expected in zip(kernels.mix_and_norm(*case), plain_kernels.mix_and_norm(*on_cpu), strict=True):
                close(found, expected, dtype)


def check_place_heads(device, dtype):
    for N, H, H_kv, D in ((1, 1, 1, 16), (3, 4, 2, 8), (2, 6, 3, 24)):
        width = (H + 2 * H_kv) * D
        joined = randn(N, width + 16, device=device, dtype=dtype)
        at, places = torch.arange(N, dtype=torch.int32) * 2, torch.randperm(9)[:N]
        angles, idx, table = torch.rand(20, D), torch.arange(N) + 1, randn(9, 2 * H_kv * D, device="cpu", dtype=dtype)
        for embeds in (None, table[:, H_kv * D :]):
            caches = [torch.full((9, H_kv, D), 7.0, dtype=dtype) for _ in range(4)]
            on_device = [cache.to(device) for cache in caches[:2]]
            own = None if embeds is None else table.to(device)[:, H_kv * D :]
            moved = [tensor.to(device) for tensor in (at, places, angles, idx)]
            q = kernels.place_heads(joined, moved[0], moved[1], *on_device, moved[2], H, 1.44, moved[3], own)
            expected = plain_kernels.place_heads(joined.cpu(), at, places, *caches[2:], angles, H, 1.44, idx, embeds)
            close(q, expected, dtype)
            for found, cache in zip(on_device, caches[2:], strict=True):
                close(found, cache, dtype)


def check_attention(device, dtype):
    kernels.PAGE = plain_kernels.PAGE
    for N, H, H_kv, D, window, num_splits in (
        (1, 1, 1, 16, 1000, 1), (3, 4, 2, 8, 1000, 4), (4, 6, 3, 24, 30, 1), (4, 6, 1, 128, 70, 8),
        (2, 20, 1, 16, 5, 2),
    ):  # fmt: skip
        num_entries = 40 if window == 1000 else -(-(window + kernels.PAGE - 1) // kernels.PAGE)
        table = torch.randperm(N * num_entries).view(N, num_entries).int()
        at = torch.tensor([0, 3, 299, 128])[-N:].int()
        q = randn(N, H, D, device=device, dtype=dtype)
        keys, values = (randn(N * num_entries * 8, H_kv, D, device=device, dtype=dtype, seed=seed) for seed in (1, 2))
        found = kernels.attend_to_pages(q, keys, values, table.to(device), at.to(device), window, num_splits)
        out = found[0] if num_splits == 1 else kernels.join_splits(*found, dtype)
        close(out, plain_kernels.attend_to_pages(q.cpu(), keys.cpu(), values.cpu(), table, at, window, 1)[0], dtype)


def check_relu_squared(device, dtype):
    for size in (1, 2047, 5000):
        x = randn(1, size, device=device, dtype=dtype)
        expected = x.float().relu().square()
        kernels.relu_squared_(x)
        close(x, expected, dtype)


def check_model(device, dtype):
    """Prompts of several lengths, one read in two pieces, and steps on from them."""
    config = GPTConfig.from_depth(2, vocab_size=70, sequence_len=64, head_dim=32, kv_ratio=2)
    model = build_model(config, compute_dtype=dtype, generator=torch.Generator().manual_seed(0)).requires_grad_(False)
    fill_randomly(model)
    ids = torch.randint(70, (64,), generator=torch.Generator().manual_seed(3))
    expected = model.float()(ids[None])[0]
    model.compute_dtype = dtype
    kernels.PAGE = pages.PAGE = plain_kernels.PAGE
    inference = gpu.GpuModel(model.to(device), 3)
    if device == "cpu":
        inference._graphs._record = lambda run: run
    row = ids.tolist()
    inference.prefill([Piece(0, row[:9], 0, None), Piece(1, row[:30], 0, None)])
    (logits,) = inference.prefill([Piece(1, row[30:50], 30, row[29])])
    close(logits, expected[49], dtype)
    for step in (0, 1):
        ends = torch.tensor((10, 51)) + step
        tokens, previous = ids[ends - 1].to(device), ids[ends - 2].to(device)
        close(inference.decode(tokens, previous, (ends - 1).tolist()), expected[ends - 1], dtype)


def run_checks(device, dtype, *names):
    interpret = {} if device == "cuda" else {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    assert_prints("checked", PROGRAM.format(names=names, device=device, dtype=dtype), **interpret)


@in_the_interpreter
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kernels_equal_pytorchs_operations_in_the_interpreter(dtype):
    run_checks("cpu", dtype, "mix_and_norm", "place_heads", "attention", "relu_squared")


@in_the_interpreter
@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_prefill_and_decode_equal_the_whole_forward_pass_in_the_interpreter(dtype):
    run_checks("cpu", dtype, "model")


def compile_for_an_h100():
    """Triton needs no GPU to compile for one; the interpreter lets pass what its types do not allow."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    bf16, ints, floats = "*bf16", "*i32", "*fp32"
    signatures = {
        "_mix_and_norm_kernel": (
            [bf16, floats, bf16, bf16, bf16, bf16, "i32", "i32", "fp32"],
            {"NUM_ADDED": 4, "HAS_OTHER": True, "BLOCK": 2048},
        ),
        "_place_heads_kernel": (
            [bf16, bf16, bf16, bf16, ints, ints, floats, "*i64", bf16, "i32", "i32", "i32", "i32", "fp32", "fp32"],
            {"D": 128, "HALF": 64, "HAS_EMBED": True, "GATE_SCALE": 3.0},
        ),
        "_attend_kernel": (
            [bf16, bf16, bf16, ints, ints, floats, floats, floats, "i32", "i32", "i32", "i32", "fp32", "i32"],
            {"G": 1, "D": 128, "PAGE": 64, "IS_SPLIT": True, "BLOCK_G": 16, "BLOCK_D": 128, "BLOCK_K": 64},
        ),
        "_join_kernel": (
            [floats, floats, floats, bf16, "i32", "i32"],
            {"D": 128, "BLOCK_S": 16, "BLOCK_D": 128},
        ),
        "_relu_squared_kernel": ([bf16, "i32"], {"BLOCK": 2048}),
    }  # fmt: skip
    for name, (types, constants) in signatures.items():
        kernel = getattr(kernels, name)
        signature = dict(zip(kernel.arg_names, [*types, *["constexpr"] * len(constants)], strict=True))
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4})
    print("checked")


def test_kernels_compile_for_an_h100():
    program = "from tests import test_gpu_passes; test_gpu_passes.compile_for_an_h100()"
    assert_prints("checked", program, TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_kernels_and_passes_equal_pytorchs_operations_on_a_gpu(dtype):
    run_checks("cuda", dtype, "mix_and_norm", "place_heads", "attention", "relu_squared", "model")


@pytest.mark.parametrize(("reach", "context"), [(24, 96), (7, 96), (1, 40), (96, 96)])
def test_pages_keep_what_each_slot_wrote_whatever_others_share(reach, context, monkeypatch):
    """Slots write on, go back, are copied and exchanged at random; a place holds what was written there last."""
    monkeypatch.setattr(pages, "PAGE", plain_kernels.PAGE)
    rng = random.Random(reach)
    table = pages.PagedTable(reach, 4, context)
    memory = np.full(table.num_pages * pages.PAGE, -1)
    texts, lengths = [[] for _ in range(4)], [0] * 4  # what a slot holds; how far it was ever written
    for step in range(600):
        a, b = rng.sample(range(4), 2)
        action = rng.random()
        if action < 0.1:
            table.rows[[a, b]] = table.rows[[b, a]]
            texts[a], texts[b], lengths[a], lengths[b] = texts[b], texts[a], lengths[b], lengths[a]
        elif action < 0.25:
            table.share(a, b)
            texts[b], lengths[b] = list(texts[a]), lengths[a]
        else:
            start = rng.randint(0, len(texts[a])) if rng.random() < 0.3 else len(texts[a])
            if not table.can_go_back(lengths[a], start):
                start = len(texts[a])
            if start == len(texts[a]) < lengths[a] and not table.can_go_back(lengths[a], start):
                continue
            end = min(context, start + rng.randint(1, 40))
            if start == end:
                texts[a], lengths[a] = [], 0
                continue
            first = table.first_kept(start, end)
            for source, target in table.make_writable(a, first, end):
                size = pages.PAGE
                memory[target * size : (target + 1) * size] = memory[source * size : (source + 1) * size]
            texts[a] = texts[a][:start] + [1000 * step + i for i in range(end - start)]
            places = table.places(a, first, end)
            assert len(set(places.tolist())) == len(places)
            memory[places] = texts[a][first:]
            lengths[a] = max(lengths[a], end)
        for slot, text in enumerate(texts):
            if text and table.can_go_back(lengths[slot], len(text)):
                first = max(0, len(text) - reach + 1)
                assert memory[table.places(slot, first, len(text))].tolist() == text[first:]
