"""Causal attention, full or over a sliding window: one entry point, `causal_attention`, and its backends.

Shapes: q (B, T, H, D); k, v (B, T, H_kv, D) with H a multiple of H_kv (grouped queries share a key head).
Position t sees itself and the `window - 1` positions before it; with `window=None`, everything before it:

        full (T 6)          window 3
        x . . . . .         x . . . . .
        x x . . . .         x x . . . .
        x x x . . .         x x x . . .
        x x x x . .         . x x x . .
        x x x x x .         . . x x x .
        x x x x x x         . . . x x x

Backends
- "masked": PyTorch's SDPA with the mask above written out. The reference, O(T^2) in time and memory.
- "sdpa":   PyTorch's SDPA; a sequence is cut into blocks as long as the window, so that no (T, T) mask exists and
            the work is O(T * window).
- "flash":  FlashAttention's windowed kernels (`flash.py`; package `flash-attn-4`, Hopper and newer), where installed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.flash import flash_attention, flash_kernels

BACKENDS = ("masked", "sdpa", "flash")


def causal_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, backend: str = "") -> Tensor:
    """Softmax attention with scale D ** -0.5 over the visible positions; (B, T, H, D) in the dtype of `q`.

    `backend` is one of `BACKENDS`, or "" for `default_backend`; code that is compiled should pass one, because that
    choice cannot be traced.
    """
    assert k.shape == v.shape, (k.shape, v.shape)
    assert q.shape[:2] == k.shape[:2], (q.shape, k.shape)
    assert q.size(2) % k.size(2) == 0, (q.shape, k.shape)
    if window is not None and window >= q.size(1):
        window = None
    backend = backend or default_backend(q.device.type, q.dtype)
    if backend == "flash":
        return flash_attention(q, k, v, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), as SDPA wants it
    if window is None:
        y = _sdpa(q, k, v, is_causal=True)
    elif backend == "masked":
        y = _sdpa(q, k, v, attn_mask=band_mask(q.size(2), q.size(2), window, q.device))
    else:
        y = _blocked_sdpa(q, k, v, window)
    return y.transpose(1, 2)


def masked_attention(q: Tensor, k: Tensor, v: Tensor, visible: Tensor) -> Tensor:
    """Softmax attention of q (B, Q, H, D) over the places where `visible` (B, Q, T) is True, at least one per query,
    for rows that hold more than one sequence. Costs O(Q T), like the reference."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return _sdpa(q, k, v, attn_mask=visible.unsqueeze(1)).transpose(1, 2)


def band_mask(num_queries: int, num_keys: int, window: int | None, device: torch.device) -> Tensor:
    """(num_queries, num_keys) bool, True where visible; the last query is at the last key's position."""
    query_pos = torch.arange(num_keys - num_queries, num_keys, device=device).unsqueeze(1)
    key_pos = torch.arange(num_keys, device=device).unsqueeze(0)
    visible = key_pos <= query_pos
    return visible if window is None else visible & (key_pos > query_pos - window)


def default_backend(device_type: str, dtype: torch.dtype) -> str:
    """The fastest backend: "flash" for 16-bit floats on a GPU that runs its kernels, else "sdpa"."""
    if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16) and flash_kernels() is not None:
        return "flash"
    return "sdpa"


def _sdpa(q: Tensor, k: Tensor, v: Tensor, **mask) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.size(1) != k.size(1), **mask)


def _blocked_sdpa(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """Windowed attention as dense attention of blocks of `window` queries over their own and the previous block.

    q, k, v: (B, H, T, D). The first block is plain causal attention. The other blocks share one mask, so a single
    call takes them in the batch dimension.
    """
    B, _, T, _ = q.shape
    head = _sdpa(q[:, :, :window], k[:, :, :window], v[:, :, :window], is_causal=True)
    num_blocks = -(-T // window)
    padding = num_blocks * window - T
    if padding:  # padded keys come after every real query, so the band hides them
        q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))
    q_blocks = q[:, :, window:].unflatten(2, (num_blocks - 1, window))  # (B, H, N, window, D)
    q_blocks = q_blocks.transpose(1, 2).flatten(0, 1)  # (B * N, H, window, D)
    k_blocks, v_blocks = (_previous_and_own_block(x, window) for x in (k, v))
    mask = band_mask(window, 2 * window, window, q.device)
    tail = _sdpa(q_blocks, k_blocks, v_blocks, attn_mask=mask)  # (B * N, H, window, D)
    tail = tail.unflatten(0, (B, num_blocks - 1)).transpose(1, 2).flatten(2, 3)  # (B, H, N * window, D)
    return torch.cat((head, tail[:, :, : T - window]), dim=2)


def _previous_and_own_block(x: Tensor, window: int) -> Tensor:
    """(B, H, N * window, D) -> (B * (N - 1), H, 2 * window, D): every block but the first, behind the one before it."""
    pairs = x.unfold(2, 2 * window, window)  # (B, H, N - 1, D, 2 * window), a view
    return pairs.permute(0, 2, 1, 4, 3).flatten(0, 1)
