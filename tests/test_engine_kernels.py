"""The engine's Triton kernels against float64. Without a GPU they run in a process of their own, by the interpreter."""

import numpy as np
import pytest
import torch

from nanochat.engine.sampling import Sampling, draw, plan_draw
from tests.test_kernels import assert_prints

triton = pytest.importorskip("triton")

PRODUCTS = [(1, 1, 1), (2, 33, 255), (16, 70, 600), (7, 40, 1300), (5, 64, 1024)]  # rows, outputs, K
PRODUCT_PROGRAM = """
from tests.test_engine_kernels import PRODUCTS, check_products, mend_interpreter, torch
mend_interpreter()
for shape in PRODUCTS:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        check_products(*shape, dtype=dtype, device={device!r})
print("checked")
"""
VOCABULARIES = [1, 5, 397, 4096, 32768]
SOFTCAP = 15.0
DRAW_PROGRAM = """
from tests.test_engine_kernels import VOCABULARIES, check_draws, check_unlikely_tokens, torch
for vocab_size in VOCABULARIES:
    for dtype in (torch.float32, torch.bfloat16) if vocab_size < 4096 else (torch.bfloat16,):
        check_draws(vocab_size, dtype=dtype, device={device!r})
    check_unlikely_tokens(vocab_size, device={device!r})
print("checked")
"""
in_the_interpreter = pytest.mark.skipif(
    triton.__version__ < "3.7" and np.__version__ >= "2.4", reason="Triton's interpreter is too old"
)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def mend_interpreter():
    """Triton's interpreter keeps bfloat16 as whole numbers with the same bits, and would multiply those."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpreterBuilder

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def mended_cast(self, source, dtype):
        is_from_int = source.dtype.scalar.is_int() and dtype.scalar == tl.bfloat16
        return cast(self, cast(self, source, tl.float32) if is_from_int else source, dtype)

    def mended_dot(self, a, b, *rest):
        return dot(self, cast(self, a, tl.float32), cast(self, b, tl.float32), *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = mended_cast, mended_dot


def check_products(N, M, K, *, dtype, device):
    """All forms of a product against float64."""
    from nanochat.engine.product_kernel import few_rows_product

    generator = torch.Generator().manual_seed(N * M + K)
    x = torch.randn(N, K, generator=generator).to(device, dtype)
    weight = (torch.randn(M, K, generator=generator) / K**0.5).to(device, dtype)
    packed = torch.randint(-127, 128, (M, K), generator=generator).to(device, torch.int8)
    step = (torch.rand(M, generator=generator) / 64 / K**0.5).to(device)
    precision = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    for matrix, own_step, exact in (
        (weight, None, x.double() @ weight.double().T),
        (packed, step, x.double() @ packed.double().T * step.double()),
    ):
        y = few_rows_product(x, matrix, own_step)
        assert y.dtype == dtype
        torch.testing.assert_close(y.double(), exact, rtol=precision, atol=1e-5)
        squared = few_rows_product(x, matrix, own_step, relu_squared=True)
        torch.testing.assert_close(squared.double(), y.double().relu().square(), rtol=precision, atol=1e-7)
        for num_splits in (2, 8):
            parts = few_rows_product(x, matrix, own_step, num_splits=num_splits)
            assert (parts.dtype, parts.shape) == (torch.float32, (num_splits, N, M))
            torch.testing.assert_close(parts.sum(dim=0).double(), exact, rtol=1e-5, atol=1e-5)


def check_draws(vocab_size, *, dtype, device):
    """Tokens against `draw`, and logits against float64: greedy, random, filtered and barred rows side by side."""
    from nanochat.engine.draw_kernel import cap_and_draw

    generator = torch.Generator().manual_seed(vocab_size)
    settings = [{"temperature": 0.0}, {}, {"temperature": 1e-4}, {"temperature": 100.0}, {"temperature": 0.8}]
    filtered = [{"temperature": 0.0, "top_k": 3}, {"top_k": 3}, {"top_p": 0.9, "temperature": 1.3}, {"min_p": 0.1}]
    barred = (0, vocab_size - 1) if vocab_size > 1 else ()
    for own in (settings[:1], settings, settings + filtered):
        rows = [Sampling(**fields, use_tool=use_tool) for fields in own for use_tool in (True, False)] * 3
        rows = rows if vocab_size == 397 else rows[::7]  # the interpreter is slow
        for is_peaked in (False, True):
            uniforms = torch.rand(len(rows), generator=generator)
            uniforms[: len(rows) // 3], uniforms[len(rows) // 3 : 2 * len(rows) // 3] = 0.0, 0.999999
            z = torch.full((len(rows), vocab_size + 7), 200.0)  # the last columns are no tokens
            z[:, :vocab_size] = 3 * torch.randn(len(rows), vocab_size, generator=generator)
            if is_peaked:
                z[:, :vocab_size] -= 40
                z[:, [0, vocab_size // 2 - 1, vocab_size // 2, vocab_size - 1]] = 40  # of equals greedy takes the first
            z = z.to(device, dtype)
            drawing = plan_draw(rows, uniforms.tolist(), vocab_size, barred)
            columns = drawing.columns.to(device)
            logits, ids = cap_and_draw(z, columns, drawing.kind, SOFTCAP, vocab_size)
            exact = SOFTCAP * torch.tanh(z[:, :vocab_size].double() / SOFTCAP)
            torch.testing.assert_close(logits.double(), exact, rtol=0, atol=1e-5)
            assert logits.dtype == torch.float32
            assert torch.equal(ids, draw(logits, columns, drawing.kind)), (vocab_size, own, is_peaked)


def check_unlikely_tokens(vocab_size, *, device):
    """Random numbers in the middle of tokens' shares, down to 1e-13, give these tokens."""
    from nanochat.engine.draw_kernel import cap_and_draw

    generator = torch.Generator().manual_seed(vocab_size)
    targets = torch.randint(vocab_size, (8,), generator=generator)
    z = torch.randn(len(targets), vocab_size, generator=generator)
    z[4:, :-1] -= 40
    z[4:, -1] = 40
    z = z.to(device)
    kind, columns = (True, 0, ()), plan_draw([Sampling()] * len(targets), [0.0] * len(targets), vocab_size).columns
    logits, _ = cap_and_draw(z, columns.to(device), kind, SOFTCAP, vocab_size)
    shares = torch.softmax(logits.double(), dim=-1).cpu()
    rows = torch.arange(len(targets))
    columns[4] = shares.cumsum(dim=-1)[rows, targets] - shares[rows, targets] / 2
    _, ids = cap_and_draw(z, columns.to(device), kind, SOFTCAP, vocab_size)
    assert ids.tolist() == targets.tolist(), (vocab_size, shares[rows, targets])


@in_the_interpreter
def test_products_of_few_rows_equal_float64_in_the_interpreter():
    program = PRODUCT_PROGRAM.format(device="cpu")
    assert_prints("checked", program, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@on_a_gpu
def test_products_of_few_rows_equal_float64_on_a_gpu():
    assert_prints("checked", PRODUCT_PROGRAM.format(device="cuda").replace("mend_interpreter()\n", ""))


def test_k_is_divided_where_outputs_alone_would_leave_the_memory_idle():
    from nanochat.engine.product_kernel import choose_splits

    C = 1280
    shapes = [(3 * C + 16, C), (C, C), (4 * C, C), (C, 4 * C), (32768, C), (64, 64), (64, 8192)]
    assert [choose_splits(*shape) for shape in shapes] == [1, 2, 1, 4, 1, 1, 8]


def test_products_compile_for_an_h100_with_all_loads_asynchronous_and_two_programs_a_multiprocessor():
    """Triton needs no GPU to compile for one: the stages' loads are copies of 16 bytes from memory to shared memory."""
    program = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from nanochat.engine import product_kernel as kernel
pointers = {"x_ptr": "*bf16", "weight_ptr": "*bf16", "step_ptr": "constexpr", "out_ptr": "*bf16"}
numbers = dict.fromkeys(("num_rows", "M", "K", "split_K"), "i32")
constants = {"RELU_SQUARED": False, "ROWS": kernel.FEW_ROWS, "BLOCK_M": kernel.BLOCK_M, "BLOCK_K": 256}
source = ASTSource(
    fn=kernel._few_rows_kernel, signature=pointers | numbers | dict.fromkeys(constants, "constexpr"),
    constexprs={"step_ptr": None} | constants, attrs={(i,): [["tt.divisibility", 16]] for i in (0, 1, 3, 5, 6, 7)},
)
options = {"num_warps": kernel.NUM_WARPS, "num_stages": 5}
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)
copies = re.findall(r"cp\\.async\\.c[ag]\\.shared\\.global.*, (\\w+), ", compiled.asm["ptx"])
print(set(copies), compiled.asm["ptx"].count("ld.global"), compiled.metadata.shared <= 113 * 1024)
"""
    assert_prints("{'0x10'} 0 True", program, TRITON_INTERPRET="0")


@in_the_interpreter
def test_draws_equal_those_of_pytorch_in_the_interpreter():
    assert_prints("checked", DRAW_PROGRAM.format(device="cpu"), TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


@pytest.mark.gpu
@on_a_gpu
def test_draws_equal_those_of_pytorch_on_a_gpu():
    assert_prints("checked", DRAW_PROGRAM.format(device="cuda"))
