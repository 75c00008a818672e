"""A Triton kernel for products with few rows, as decode passes have them: bound by reading the weights once.

cuBLAS is built for many rows, and has no product of 8-bit weights with 16-bit activations at all. Here each program
multiplies all rows with the weights of BLOCK_M outputs, converts 8-bit weights on the way, and may apply the relu^2 of
the MLP. Where a matrix has too few outputs to keep the GPU's memory busy, K is divided among several programs, and the
caller adds up what they give.

Not here: when the kernel is used, and the CPU path (`inference.py`). Importing this file needs Triton, which comes with
PyTorch for Linux with CUDA. With TRITON_INTERPRET=1 the kernel runs on CPU tensors, as the tests do.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

FEW_ROWS = 16  # the least that tensor cores multiply; rows that are missing cost nothing but zeros

# An H100 gives 3.3 TB/s to 132 SMs only while some 40 to 64 KB for each, 5 to 8 MB together, are on their way. A tile
# of weights is 16 KB (8 KB in 8 bits). One is multiplied while the other stages' come: 48 KB a program (40 KB), so that
# about one program for each SM keeps the memory busy. With their tiles of x, two programs fit into the 228 KB of shared
# memory. Fewer outputs a program would read x more often than the L2 cache can give it beside the weights: x of 16 rows
# is read in full for each 32 outputs, which is already half as many bytes as their weights.
BLOCK_M = 32
ROW_BYTES = 512  # of a row of x in a tile
SHARED_BYTES = 96 * 1024  # of a program
NUM_WARPS = 4
MIN_PROGRAMS = 120  # with fewer, K is divided
MAX_SPLITS = 8
MIN_SPLIT = 512  # of K; below, adding up costs more than it gains


@triton.jit(do_not_specialize=["num_rows"])
def _few_rows_kernel(
    x_ptr, weight_ptr, step_ptr, out_ptr, num_rows, M, K, split_K,
    RELU_SQUARED: tl.constexpr, ROWS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Program (i, s): outputs i * BLOCK_M and on, summed over the s-th `split_K` (a multiple of BLOCK_K) of K."""
    split = tl.program_id(1)
    rows = tl.arange(0, ROWS)
    outputs = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    ks = tl.arange(0, BLOCK_K)
    is_row, is_output = rows < num_rows, outputs < M
    x_rows = x_ptr + rows[:, None] * K
    weight_columns = weight_ptr + outputs.to(tl.int64)[None, :] * K

    total = tl.zeros([ROWS, BLOCK_M], dtype=tl.float32)
    for start in range(split * split_K, tl.minimum((split + 1) * split_K, K), BLOCK_K):
        k = start + ks
        x = tl.load(x_rows + k[None, :], mask=is_row[:, None] & (k < K)[None, :], other=0.0)
        weight = tl.load(weight_columns + k[:, None], mask=is_output[None, :] & (k < K)[:, None], other=0)
        total = tl.dot(x, weight.to(x.dtype), total, input_precision="ieee")

    if step_ptr is not None:
        total *= tl.load(step_ptr + outputs, mask=is_output, other=0.0).to(tl.float32)[None, :]
    if RELU_SQUARED:
        rounded = total.to(x_ptr.dtype.element_ty).to(tl.float32)  # as the product alone would be
        total = tl.where(rounded > 0, rounded * rounded, 0.0)
    places = (split * num_rows + rows).to(tl.int64)[:, None] * M + outputs[None, :]
    tl.store(out_ptr + places, total.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & is_output[None, :])


@torch.library.custom_op("nanochat::few_rows_product", mutates_args=())
def few_rows_product(
    x: Tensor, weight: Tensor, step: Tensor | None = None, *, relu_squared: bool = False, num_splits: int = 1
) -> Tensor:
    """x @ weight.T, summed in float32: (N, M) in x's dtype, or with relu(.)^2 of that.

    x (N, K) float32, bfloat16 or float16 with at most `FEW_ROWS` rows; weight (M, K) in x's dtype, or int8 with `step`
    (M,) of any float dtype, an output's weights being multiples of its step. All contiguous.

    With `num_splits` above 1, the partial sums over as many parts of K instead, for the caller to add up:
    (num_splits, N, M) float32.
    """
    (N, K), M = x.shape, weight.size(0)
    assert 1 <= N <= FEW_ROWS, N
    assert weight.size(1) == K, (x.shape, weight.shape)
    assert all(tensor.is_contiguous() for tensor in (x, weight))
    assert (step is None) == (weight.dtype == x.dtype), (x.dtype, weight.dtype)
    assert not (relu_squared and num_splits > 1)
    block_k = ROW_BYTES // x.element_size()
    tile_bytes = block_k * (FEW_ROWS * x.element_size() + BLOCK_M * weight.element_size())
    num_stages = SHARED_BYTES // tile_bytes + 1  # the one that is multiplied has its tile in registers
    split_k = triton.cdiv(triton.cdiv(K, block_k), num_splits) * block_k
    out = _result(x, weight, num_splits)
    _few_rows_kernel[(triton.cdiv(M, BLOCK_M), num_splits)](
        x, weight, step, out, N, M, K, split_k,
        RELU_SQUARED=relu_squared, ROWS=FEW_ROWS, BLOCK_M=BLOCK_M, BLOCK_K=block_k,
        num_warps=NUM_WARPS, num_stages=num_stages,
    )  # fmt: skip
    return out


def _result(x: Tensor, weight: Tensor, num_splits: int) -> Tensor:
    shape, dtype = (x.size(0), weight.size(0)), x.dtype
    return x.new_empty(
        shape if num_splits == 1 else (num_splits, *shape), dtype=dtype if num_splits == 1 else torch.float32
    )


@few_rows_product.register_fake
def _(x, weight, step=None, *, relu_squared=False, num_splits=1):
    return _result(x, weight, num_splits)


def choose_splits(M: int, K: int) -> int:
    """Into how many parts, a power of two, K should be divided so that the programs keep the memory busy."""
    num_splits = 1
    while (
        num_splits < MAX_SPLITS
        and triton.cdiv(M, BLOCK_M) * num_splits < MIN_PROGRAMS
        and K // (2 * num_splits) >= MIN_SPLIT
    ):
        num_splits *= 2
    return num_splits
