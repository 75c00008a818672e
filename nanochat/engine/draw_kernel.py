"""Triton kernels for the end of a decode pass: the soft cap and the draw, from the head's raw outputs to tokens.

PyTorch would pass over the logits about twenty times, each pass a launch, for as few rows as decoding has. Here the
first kernel caps them and sums up blocks of the vocabulary, which takes the whole GPU; the second joins the blocks of
a row, finds the one with the token and scans it alone. The token is that of `sampling.draw`, up to rounding.

Not here: the settings of a draw, and draws on other devices (`sampling.py`). Importing this file needs Triton, which
comes with PyTorch for Linux with CUDA. With TRITON_INTERPRET=1 the kernels run on CPU tensors, as the tests do.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.engine.sampling import MIN_TEMPERATURE, draw_filtered

BLOCK = 1024  # tokens of a block
NUM_WARPS = 4


@triton.jit
def _is_allowed(ids, vocab_size, barred_0, barred_1, has_tool):
    is_barred = (ids == barred_0) | (ids == barred_1)
    return (ids < vocab_size) & tl.where(has_tool > 0, ~is_barred, True)


@triton.jit(do_not_specialize=["barred_0", "barred_1"])
def _cap_kernel(
    z_ptr, columns_ptr, logits_ptr, maxima_ptr, likeliest_ptr, sums_ptr, softcap, width, vocab_size, barred_0, barred_1,
    MIN_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program (b, n): the logits of block b in row n; of those allowed the maximum, the first id that has it, and the
    sum of their weights, which are relative to the maximum."""
    block, row, num_rows = tl.program_id(0), tl.program_id(1).to(tl.int64), tl.num_programs(1)
    ids = block * BLOCK + tl.arange(0, BLOCK)
    z = tl.load(z_ptr + row * width + ids, mask=ids < vocab_size, other=0.0).to(tl.float32)
    logits = softcap - 2.0 * softcap / (1.0 + tl.exp(2.0 / softcap * z))  # softcap * tanh(z / softcap)
    tl.store(logits_ptr + row * vocab_size + ids, logits, mask=ids < vocab_size)

    temperature = tl.maximum(tl.load(columns_ptr + row), MIN_TEMPERATURE)
    has_tool = tl.load(columns_ptr + 5 * num_rows + row)
    is_allowed = _is_allowed(ids, vocab_size, barred_0, barred_1, has_tool)
    allowed = tl.where(is_allowed, logits, -float("inf"))
    maximum = tl.max(allowed, axis=0)
    weights = tl.where(is_allowed, tl.exp((logits - maximum) / temperature), 0.0)
    place = row * tl.num_programs(0) + block
    tl.store(maxima_ptr + place, maximum)
    tl.store(likeliest_ptr + place, block * BLOCK + tl.argmax(allowed, axis=0))
    tl.store(sums_ptr + place, tl.sum(weights.to(tl.float64), axis=0))


@triton.jit
def _inverse(weights, target, SIZE: tl.constexpr):
    """The first place with a weight at which the running sum exceeds `target`; by default the last one."""
    places = tl.arange(0, SIZE)
    last = tl.max(tl.where(weights > 0, places, 0), axis=0)
    is_beyond = (weights > 0) & (tl.cumsum(weights, axis=0) > target)
    return tl.min(tl.where(is_beyond, places, last), axis=0)


@triton.jit(do_not_specialize=["barred_0", "barred_1"])
def _draw_kernel(
    logits_ptr, columns_ptr, maxima_ptr, likeliest_ptr, sums_ptr, drawn_ptr, vocab_size, num_blocks, barred_0, barred_1,
    MIN_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr, NUM_BLOCKS: tl.constexpr,
):  # fmt: skip
    """Program n: the token of row n. NUM_BLOCKS is `num_blocks` rounded up to a power of two."""
    row, num_rows = tl.program_id(0).to(tl.int64), tl.num_programs(0)
    temperature, uniform = tl.load(columns_ptr + row), tl.load(columns_ptr + 4 * num_rows + row)
    has_tool = tl.load(columns_ptr + 5 * num_rows + row)
    heat = tl.maximum(temperature, MIN_TEMPERATURE)

    # float64, for float32 would lose the unlikely tokens beside likely ones
    blocks = tl.arange(0, NUM_BLOCKS)
    is_block, places = blocks < num_blocks, row * num_blocks + blocks
    maxima = tl.load(maxima_ptr + places, mask=is_block, other=-float("inf"))
    maximum = tl.max(maxima, axis=0)
    sums = tl.load(sums_ptr + places, mask=is_block, other=0.0) * tl.exp((maxima - maximum) / heat).to(tl.float64)
    target = uniform.to(tl.float64) * tl.sum(sums, axis=0)
    block = _inverse(sums, target, NUM_BLOCKS)
    target = tl.maximum(target - tl.sum(tl.where(blocks < block, sums, 0.0), axis=0), 0.0)
    share = target / tl.sum(tl.where(blocks == block, sums, 0.0), axis=0)

    ids = block * BLOCK + tl.arange(0, BLOCK)
    logits = tl.load(logits_ptr + row * vocab_size + ids, mask=ids < vocab_size, other=0.0)
    is_allowed = _is_allowed(ids, vocab_size, barred_0, barred_1, has_tool)
    weights = tl.where(is_allowed, tl.exp((logits - maximum) / heat), 0.0).to(tl.float64)
    drawn = block * BLOCK + _inverse(weights, share * tl.sum(weights, axis=0), BLOCK)

    greedy = tl.load(likeliest_ptr + row * num_blocks + tl.argmax(maxima, axis=0))
    token = tl.where(temperature > 0, drawn, greedy)
    tl.store(drawn_ptr + row, tl.minimum(token, vocab_size - 1).to(tl.int64))  # where logits are not numbers


def cap_and_draw(z: Tensor, columns: Tensor, kind: tuple, softcap: float, vocab_size: int) -> tuple[Tensor, Tensor]:
    """The logits `softcap * tanh(z / softcap)`, (N, vocab_size) float32, and a token drawn from each row, (N,) int64.

    z (N, V'), the head's outputs of any float dtype, V' at least `vocab_size`; `columns` (6, N) float32 and `kind` are
    those of a `sampling.Drawing`, at most two tokens being barred. All contiguous. Nothing here waits for the device.
    """
    _, num_ordered, barred = kind
    logits, ids = _cap_and_draw(z, columns, *(*barred, -1, -1)[: max(2, len(barred))], softcap, vocab_size)
    if num_ordered:
        temperature, top_k, top_p, min_p, uniform, has_tool = columns.unsqueeze(-1)  # (N, 1) each
        scaled = logits / temperature.clamp(min=MIN_TEMPERATURE)
        for token in barred:
            scaled[:, token : token + 1].masked_fill_(has_tool > 0, -math.inf)
        is_filtered = (temperature > 0) & ((top_k < vocab_size) | (top_p < 1) | (min_p > 0))
        filtered = draw_filtered(scaled, num_ordered, top_k, top_p, min_p, uniform)
        ids = torch.where(is_filtered.squeeze(-1), filtered, ids)
    return logits, ids


@torch.library.custom_op("nanochat::cap_and_draw", mutates_args=())
def _cap_and_draw(
    z: Tensor, columns: Tensor, barred_0: int, barred_1: int, softcap: float, vocab_size: int
) -> tuple[Tensor, Tensor]:
    """`cap_and_draw` where no row is filtered; -1 bars nothing."""
    N, width = z.shape
    assert z.is_contiguous()
    assert columns.is_contiguous()
    num_blocks = triton.cdiv(vocab_size, BLOCK)
    logits, ids = _results(z, vocab_size)
    maxima, likeliest, sums = (
        torch.empty(N, num_blocks, dtype=dtype, device=z.device)
        for dtype in (torch.float32, torch.int32, torch.float64)
    )
    _cap_kernel[(num_blocks, N)](
        z, columns, logits, maxima, likeliest, sums, softcap, width, vocab_size, barred_0, barred_1,
        MIN_TEMPERATURE=MIN_TEMPERATURE, BLOCK=BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip
    _draw_kernel[(N,)](
        logits, columns, maxima, likeliest, sums, ids, vocab_size, num_blocks, barred_0, barred_1,
        MIN_TEMPERATURE=MIN_TEMPERATURE, BLOCK=BLOCK, NUM_BLOCKS=triton.next_power_of_2(num_blocks),
        num_warps=NUM_WARPS,
    )  # fmt: skip
    return logits, ids


def _results(z: Tensor, vocab_size: int) -> tuple[Tensor, Tensor]:
    return z.new_empty(z.size(0), vocab_size, dtype=torch.float32), z.new_empty(z.size(0), dtype=torch.int64)


@_cap_and_draw.register_fake
def _(z, columns, barred_0, barred_1, softcap, vocab_size):
    return _results(z, vocab_size)
