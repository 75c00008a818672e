"""The Triton kernels against float64. Without a GPU they run in a process of their own, by Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.model.loss import IGNORE_INDEX

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parent.parent
SOFTCAP = 15.0
CASES = [(1, 1), (1, 7), (3, 64), (5, 4096), (4, 4097), (2, 10000), (7, 513)]
PROGRAM = """
from tests.test_kernels import check_softcap_loss, torch
for shape in {cases}:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for padding in (0, 3):
            check_softcap_loss(*shape, dtype=dtype, padding=padding, device={device!r})
print("checked")
"""


def check_softcap_loss(num_rows, vocab_size, *, dtype, padding, device):
    """Losses and gradients against autograd in float64, with ignored rows, columns that are no classes, and rows that
    are part of a wider buffer."""
    from nanochat.model.kernels import softcap_loss_

    generator = torch.Generator().manual_seed(num_rows * 1000 + vocab_size)
    buffer = 20 * torch.randn(num_rows, vocab_size + 2 * padding, generator=generator)
    buffer = buffer.to(device, dtype)
    z = buffer[:, : vocab_size + padding]
    targets = torch.randint(vocab_size, (num_rows,), generator=generator).to(device)
    targets[::3] = IGNORE_INDEX if num_rows > 1 else targets[::3]
    beyond = buffer[:, vocab_size + padding :].clone()

    exact = z[:, :vocab_size].double().requires_grad_()
    capped = SOFTCAP * torch.tanh(exact / SOFTCAP)
    expected = torch.nn.functional.cross_entropy(capped, targets, ignore_index=IGNORE_INDEX, reduction="none")
    expected.sum().backward()

    losses = softcap_loss_(z, targets, vocab_size, SOFTCAP, IGNORE_INDEX)
    torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=2e-4)
    # one unit in the last place: the interpreter rounds towards zero where a GPU rounds to nearest
    precision = {torch.float32: 1e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}[dtype]
    torch.testing.assert_close(z[:, :vocab_size].double(), exact.grad, rtol=precision, atol=1e-5)
    assert not z[:, vocab_size:].any()
    assert torch.equal(buffer[:, vocab_size + padding :], beyond)


def assert_prints(expected: str, program: str, **environment: str) -> None:
    """In a process of its own, as the interpreter is chosen when Triton is imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **environment}
    command = [sys.executable, "-W", "ignore", "-c", program]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250, check=False)
    assert ended.stdout == f"{expected}\n", ended.stderr[-2000:]


@pytest.mark.skipif(triton.__version__ < "3.7" and np.__version__ >= "2.4", reason="Triton's interpreter is too old")
def test_the_softcap_loss_equals_float64_in_the_interpreter():
    program = PROGRAM.format(cases=CASES, device="cpu")
    assert_prints("checked", program, TRITON_INTERPRET="1", CUDA_VISIBLE_DEVICES="")


def test_the_softcap_loss_compiles_for_an_h100_with_wide_loads():
    """Triton needs no GPU to compile for one: 16 bytes a load and store, as the bandwidth bound wants it."""
    program = """
import re
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
import triton
from nanochat.model import kernels
names = ["z_ptr", "targets_ptr", "losses_ptr", "vocab_size", "width", "row_stride", "softcap"]
signature = dict(zip(names, ["*bf16", "*i64", "*fp32", "i32", "i32", "i32", "fp32"]))
signature |= {"IGNORE": "constexpr", "BLOCK": "constexpr"}
source = ASTSource(
    fn=kernels._softcap_loss_kernel, signature=signature, constexprs={"IGNORE": -1, "BLOCK": kernels.BLOCK},
    attrs={(i,): [["tt.divisibility", 16]] for i in range(6)},
)
compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": kernels.NUM_WARPS})
wide = re.findall(r"(ld|st)\\.global\\S*\\.v4\\.b32", compiled.asm["ptx"])
print(wide.count("ld"), wide.count("st"))
"""
    assert_prints("4 2", program, TRITON_INTERPRET="0")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_softcap_loss_equals_float64_on_a_gpu():
    assert_prints("checked", PROGRAM.format(cases=CASES, device="cuda"))
