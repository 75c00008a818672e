"""Kernels of the engine's passes on a GPU, written in Triton: what lies between the matrix products of a block.

A block of PyTorch's operations starts some 25 kernels, each of which reads and writes all activations. Here it is, with
at most four matrix products, these:

    mix_and_norm      the residual stream takes in a block's output and a share of x0, and is normed
    place_heads       QK-norm, rotary positions, gated value embedding; keys and values go to their places in the cache
    attend_to_pages   one query for each row over the keys of its pages, split among programs (arXiv 2311.01282)
    join_splits       the results of the splits become one
    relu_squared_     the MLP's activation

Shapes: N tokens, C channels, H heads, H_kv key heads, D head size, P places of the cache, E pages in a row of a table.
All are registered operations, so that a pass can be traced, and counted, on any machine. With TRITON_INTERPRET=1 they
run on CPU tensors, as the tests do.

Not here: matrix products (`product_kernel.py`), the head's draw (`draw_kernel.py`), who calls what (`gpu.py`).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from nanochat.model.gpt import NORM_EPS, VALUE_GATE_SCALE

PAGE = 64  # positions of a page
KEY_BLOCK = 64  # keys that one step of attention's loop takes
ELEMENT_BLOCK = 2048  # elements of a program of `relu_squared_`
MAX_SPLITS = 16  # programs that share the keys of one row
MIN_DOT = 16  # the smallest matrix that tensor cores take


# --- residual stream -----------------------------------------------------------------------------


@triton.jit
def _mix_and_norm_kernel(
    x_ptr, added_ptr, other_ptr, scales_ptr, mixed_ptr, normed_ptr, C, size, eps,
    NUM_ADDED: tl.constexpr, HAS_OTHER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program a token; `size` is the number of elements of x."""
    channel = tl.arange(0, BLOCK)
    is_channel = channel < C
    place = tl.program_id(0).to(tl.int64) * C + channel
    x = tl.load(x_ptr + place, mask=is_channel, other=0.0).to(tl.float32)
    for i in tl.static_range(NUM_ADDED):
        x += tl.load(added_ptr + i * size + place, mask=is_channel, other=0.0).to(tl.float32)
    if HAS_OTHER:
        x = x * tl.load(scales_ptr).to(tl.float32)
        x += tl.load(scales_ptr + 1).to(tl.float32) * tl.load(other_ptr + place, mask=is_channel).to(tl.float32)
    rounded = x.to(mixed_ptr.dtype.element_ty)
    tl.store(mixed_ptr + place, rounded, mask=is_channel)
    x = tl.where(is_channel, rounded.to(tl.float32), 0.0)
    x = x / tl.sqrt(tl.sum(x * x, axis=0) / C + eps)
    tl.store(normed_ptr + place, x.to(normed_ptr.dtype.element_ty), mask=is_channel)


@torch.library.custom_op("nanochat::mix_and_norm", mutates_args=())
def mix_and_norm(
    x: Tensor, added: Tensor | None, other: Tensor | None, scales: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scales[0] * (x + added) + scales[1] * other` (N, C), and that after RMSNorm (arXiv 1910.07467), in x's dtype.

    x, other (N, C); added (N, C), or (S, N, C) float32 where its sum over S is meant; scales (2,) on the device.
    Without `added`, or without `other` and `scales`, these count as nothing. The sums are in float32.
    """
    N, C = x.shape
    mixed, normed = torch.empty_like(x), torch.empty_like(x)
    num_added = 0 if added is None else added.numel() // x.numel()
    _mix_and_norm_kernel[(N,)](
        x, added, other, scales, mixed, normed, C, N * C, NORM_EPS,
        NUM_ADDED=num_added, HAS_OTHER=other is not None, BLOCK=triton.next_power_of_2(C), num_warps=4,
    )  # fmt: skip
    return mixed, normed


@mix_and_norm.register_fake
def _(x, added, other, scales):
    return torch.empty_like(x), torch.empty_like(x)


# --- heads ---------------------------------------------------------------------------------------


@triton.jit
def _place_heads_kernel(
    joined_ptr, q_ptr, k_ptr, v_ptr, at_ptr, places_ptr, angles_ptr, idx_ptr, embed_ptr,
    joined_stride, embed_stride, H, H_kv, eps, qk_scale,
    D: tl.constexpr, HALF: tl.constexpr, HAS_EMBED: tl.constexpr, GATE_SCALE: tl.constexpr,
):  # fmt: skip
    """One program for each token and each head of q and k; that of a key head writes its values too."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half = tl.arange(0, HALF)
    is_half = half < D // 2
    row = joined_ptr + token * joined_stride
    x1 = tl.load(row + head * D + half, mask=is_half, other=0.0).to(tl.float32)
    x2 = tl.load(row + head * D + D // 2 + half, mask=is_half, other=0.0).to(tl.float32)
    is_query = head < H
    scale = tl.where(is_query, qk_scale, 1.0) / tl.sqrt((tl.sum(x1 * x1, 0) + tl.sum(x2 * x2, 0)) / D + eps)
    angle = angles_ptr + tl.load(at_ptr + token).to(tl.int64) * D  # cos and sin side by side
    cos = scale * tl.load(angle + half, mask=is_half, other=0.0)
    sin = scale * tl.load(angle + D // 2 + half, mask=is_half, other=0.0)
    y1, y2 = x1 * cos + x2 * sin, x2 * cos - x1 * sin
    if is_query:
        target = q_ptr + (token * H + head) * D + half
        tl.store(target, y1.to(q_ptr.dtype.element_ty), mask=is_half)
        tl.store(target + D // 2, y2.to(q_ptr.dtype.element_ty), mask=is_half)
    else:
        kv_head = head - H
        place = (tl.load(places_ptr + token).to(tl.int64) * H_kv + kv_head) * D + half
        tl.store(k_ptr + place, y1.to(k_ptr.dtype.element_ty), mask=is_half)
        tl.store(k_ptr + place + D // 2, y2.to(k_ptr.dtype.element_ty), mask=is_half)
        source = row + (H + H_kv + kv_head) * D + half
        v1 = tl.load(source, mask=is_half, other=0.0).to(tl.float32)
        v2 = tl.load(source + D // 2, mask=is_half, other=0.0).to(tl.float32)
        if HAS_EMBED:
            gate = tl.load(row + (H + 2 * H_kv) * D + kv_head).to(tl.float32)
            gate = GATE_SCALE / (1.0 + tl.exp(-gate))
            embed = embed_ptr + tl.load(idx_ptr + token).to(tl.int64) * embed_stride + kv_head * D + half
            v1 += gate * tl.load(embed, mask=is_half, other=0.0).to(tl.float32)
            v2 += gate * tl.load(embed + D // 2, mask=is_half, other=0.0).to(tl.float32)
        tl.store(v_ptr + place, v1.to(v_ptr.dtype.element_ty), mask=is_half)
        tl.store(v_ptr + place + D // 2, v2.to(v_ptr.dtype.element_ty), mask=is_half)


@torch.library.custom_op("nanochat::place_heads", mutates_args=("keys", "values"))
def place_heads(
    joined: Tensor, at: Tensor, places: Tensor, keys: Tensor, values: Tensor, angles: Tensor, num_heads: int,
    qk_scale: float, idx: Tensor, value_embeds: Tensor | None,
) -> Tensor:  # fmt: skip
    """Rotated queries (N, H, D) of `joined` (N, M): q, k, v and the gates of the value embeddings, as a product made
    them. Keys and values go to `keys` and `values` (P, H_kv, D) at `places` (N,), no place twice.

    at (N,): positions; angles (T, D) float32: cos and sin of the rotary angles (arXiv 2104.09864); qk_scale: what
    normed queries are multiplied by; idx (N,): the tokens, rows of `value_embeds` (V, H_kv * D), whose rows may be a
    part of wider ones; None for a layer without.
    """
    _, H_kv, D = keys.shape
    q = torch.empty(joined.size(0), num_heads, D, dtype=joined.dtype, device=joined.device)
    _place_heads_kernel[(joined.size(0), num_heads + H_kv)](
        joined, q, keys, values, at, places, angles, idx, value_embeds,
        joined.stride(0), 0 if value_embeds is None else value_embeds.stride(0), num_heads, H_kv, NORM_EPS, qk_scale,
        D=D, HALF=triton.next_power_of_2(D // 2), HAS_EMBED=value_embeds is not None, GATE_SCALE=VALUE_GATE_SCALE,
        num_warps=1,
    )  # fmt: skip
    return q


@place_heads.register_fake
def _(joined, at, places, keys, values, angles, num_heads, qk_scale, idx, value_embeds):
    return joined.new_empty(joined.size(0), num_heads, keys.size(2))


# --- attention -----------------------------------------------------------------------------------


@triton.jit
def _attend_kernel(
    q_ptr, keys_ptr, values_ptr, table_ptr, at_ptr, out_ptr, peaks_ptr, sums_ptr,
    table_stride, num_pages, H_kv, window, scale, num_rows,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, IS_SPLIT: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program for each row, key head and split: the G heads that share the key head, over a part of the keys."""
    row, kv_head, split = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    group, channel, step = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_K)
    is_channel = channel < D
    is_query = (group < G)[:, None] & is_channel[None, :]
    head = kv_head * G + group
    query = (row * H_kv * G + head)[:, None] * D + channel[None, :]
    q = tl.load(q_ptr + query, mask=is_query, other=0.0)

    last = tl.load(at_ptr + row)
    visible = tl.minimum(last + 1, window)
    share = tl.cdiv(tl.cdiv(visible, BLOCK_K), tl.num_programs(2)) * BLOCK_K  # keys of a split
    first = last + 1 - visible + split * share
    end = tl.minimum(first + share, last + 1)
    peak = tl.full([BLOCK_G], float("-inf"), dtype=tl.float32)
    total = tl.zeros([BLOCK_G], dtype=tl.float32)
    sums = tl.zeros([BLOCK_G, BLOCK_D], dtype=tl.float32)
    for start in range(first, end, BLOCK_K):
        position = start + step
        is_key = position < end
        page = tl.load(table_ptr + row * table_stride + (position // PAGE) % num_pages, mask=is_key, other=0)
        place = (page.to(tl.int64) * PAGE + position % PAGE) * H_kv + kv_head
        at_key = place[:, None] * D + channel[None, :]
        is_there = is_key[:, None] & is_channel[None, :]
        k = tl.load(keys_ptr + at_key, mask=is_there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        scores = tl.where(is_key[None, :], scores, float("-inf"))
        higher = tl.maximum(peak, tl.max(scores, axis=1))
        weights = tl.exp(scores - higher[:, None])
        shrink = tl.exp(peak - higher)
        v = tl.load(values_ptr + at_key, mask=is_there, other=0.0)
        sums = sums * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        total = total * shrink + tl.sum(weights, axis=1)
        peak = higher

    if not IS_SPLIT:
        tl.store(out_ptr + query, (sums / total[:, None]).to(out_ptr.dtype.element_ty), mask=is_query)
    else:  # unnormalised; a split without keys has the peak -inf and zeros
        offset = split * num_rows * H_kv * G
        tl.store(out_ptr + offset.to(tl.int64) * D + query, sums, mask=is_query)
        at_head = offset + row * H_kv * G + head
        tl.store(peaks_ptr + at_head, peak, mask=group < G)
        tl.store(sums_ptr + at_head, total, mask=group < G)


@torch.library.custom_op("nanochat::attend_to_pages", mutates_args=())
def attend_to_pages(
    q: Tensor, keys: Tensor, values: Tensor, table: Tensor, at: Tensor, window: int, num_splits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Softmax attention with scale D ** -0.5 of q (N, H, D), one query a row at position `at` (N,), over the last
    `window` positions up to its own: with one split the result (N, H, D) in q's dtype, and two tensors without meaning.

    keys, values (P, H_kv, D): position p of row n is at place `table[n, p // PAGE % E] * PAGE + p % PAGE`; table (N, E)
    int32, contiguous along E. With more splits, for `join_splits` and float32: (S, N, H, D) sums of values by
    exp(score - peak), the peaks (S, N, H), and the sums of exp(score - peak) (S, N, H).
    """
    N, H, D = q.shape
    H_kv = keys.size(1)
    out, peaks, sums = _attention_results(q, num_splits)
    _attend_kernel[(N, H_kv, num_splits)](
        q, keys, values, table, at, out, peaks, sums, table.stride(0), table.size(1), H_kv, window, D**-0.5, N,
        G=H // H_kv, D=D, PAGE=PAGE, IS_SPLIT=num_splits > 1, BLOCK_G=max(MIN_DOT, triton.next_power_of_2(H // H_kv)),
        BLOCK_D=max(MIN_DOT, triton.next_power_of_2(D)), BLOCK_K=KEY_BLOCK, num_warps=4,
    )  # fmt: skip
    return out, peaks, sums


def _attention_results(q: Tensor, num_splits: int) -> tuple[Tensor, Tensor, Tensor]:
    if num_splits == 1:
        return torch.empty_like(q), q.new_empty(0, dtype=torch.float32), q.new_empty(0, dtype=torch.float32)
    return tuple(
        q.new_empty((num_splits, *shape), dtype=torch.float32) for shape in (q.shape, q.shape[:2], q.shape[:2])
    )


@attend_to_pages.register_fake
def _(q, keys, values, table, at, window, num_splits):
    return _attention_results(q, num_splits)


@triton.jit
def _join_kernel(
    parts_ptr, peaks_ptr, sums_ptr, out_ptr, num_heads, num_splits,
    D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One program for each row and head; `num_heads` counts those of all rows."""
    head = tl.program_id(0).to(tl.int64)
    split, channel = tl.arange(0, BLOCK_S), tl.arange(0, BLOCK_D)
    at = split * num_heads + head
    peaks = tl.load(peaks_ptr + at, mask=split < num_splits, other=float("-inf"))
    weights = tl.exp(peaks - tl.max(peaks, axis=0))
    total = tl.sum(weights * tl.load(sums_ptr + at, mask=split < num_splits, other=0.0), axis=0)
    is_part = (split < num_splits)[:, None] & (channel < D)[None, :]
    parts = tl.load(parts_ptr + at[:, None] * D + channel[None, :], mask=is_part, other=0.0)
    joined = tl.sum(parts * weights[:, None], axis=0) / total
    tl.store(out_ptr + head * D + channel, joined.to(out_ptr.dtype.element_ty), mask=channel < D)


@torch.library.custom_op("nanochat::join_splits", mutates_args=())
def join_splits(parts: Tensor, peaks: Tensor, sums: Tensor, dtype: torch.dtype) -> Tensor:
    """The attention (N, H, D) in `dtype` of which `attend_to_pages` made `parts`, `peaks` and `sums`."""
    S, N, H, D = parts.shape
    out = torch.empty(N, H, D, dtype=dtype, device=parts.device)
    _join_kernel[(N * H,)](
        parts, peaks, sums, out, N * H, S, D=D, BLOCK_S=MAX_SPLITS, BLOCK_D=triton.next_power_of_2(D), num_warps=1,
    )  # fmt: skip
    return out


@join_splits.register_fake
def _(parts, peaks, sums, dtype):
    return parts.new_empty(parts.shape[1:], dtype=dtype)


# --- MLP -----------------------------------------------------------------------------------------


@triton.jit
def _relu_squared_kernel(x_ptr, size, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + place, mask=place < size, other=0.0).to(tl.float32)
    x = tl.maximum(x, 0.0)
    tl.store(x_ptr + place, (x * x).to(x_ptr.dtype.element_ty), mask=place < size)


@torch.library.custom_op("nanochat::relu_squared_", mutates_args=("x",))
def relu_squared_(x: Tensor) -> None:
    """relu(x)^2 (arXiv 2109.08668) in place; x contiguous."""
    _relu_squared_kernel[(triton.cdiv(x.numel(), ELEMENT_BLOCK),)](x, x.numel(), BLOCK=ELEMENT_BLOCK, num_warps=4)


@relu_squared_.register_fake
def _(x):
    return None
