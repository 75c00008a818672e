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
- "cudnn":  cuDNN's kernels, for full layers. They plan some 50 ms for each new shape: compiled training only.
- "flex":   FlexAttention's Triton kernels, for windowed layers: blocks of the mask that hide all are skipped. Compiled
            training only: outside of `torch.compile` it is slower than the reference.
- "flash":  FlashAttention's kernels for both kinds of layers (`flash.py`; package `flash-attn-4`).

`choose_backends` takes the fastest that fit. On an H100, forward and backward of 12 heads of 128 and 16 rows of 2,048,
cuDNN took 1.8 ms without a window, FlexAttention 1.6 and "sdpa" 3.6 with one of 512 (dev/LOG.md).
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.common import UserError
from nanochat.model.flash import flash_attention, flash_kernels

BACKENDS = ("flash", "flex", "cudnn", "sdpa", "masked")
MIN_CAPABILITY = {"flash": (9, 0), "flex": (8, 0), "cudnn": (8, 0)}  # of the GPU
NO_GPU = "no CUDA GPU"
FLEX_BLOCK = 128  # side of the blocks that are skipped or computed


@dataclass(frozen=True)
class Backends:
    """Names of the backends of full and of windowed layers, and why it is these."""

    full: str
    windowed: str
    reason: str = ""

    def in_words(self, window: int | None) -> str:
        """The line in a run's log, for a model with layers of this window (None: all are full)."""
        is_one = window is None or self.windowed == self.full
        names = self.full if is_one else f"{self.windowed} for windows of {window}, {self.full} for full layers"
        return f"attention: {names} ({self.reason})"


def choose_backends(
    device: torch.device, dtype: torch.dtype, head_dim: int, sequence_len: int, *, is_compiled: bool = False,
    wanted: str = "",
) -> Backends:  # fmt: skip
    """The fastest backends that fit, or `wanted` for the layers that it serves (flex: windowed, cudnn: full).

    is_compiled: the call is part of a compiled graph, in which shapes never change. Must not be traced itself, as it
    looks for packages. Raises `UserError` when `wanted` does not fit.
    """
    if device.type != "cuda" and not wanted:
        return Backends("sdpa", "sdpa", NO_GPU)
    settings = (device, dtype, head_dim, sequence_len, is_compiled)
    obstacles = {name: _obstacle(name, *settings) for name in MIN_CAPABILITY}
    if wanted and obstacles.get(wanted):
        possible = ", ".join(name for name in BACKENDS if not obstacles.get(name))
        raise UserError(f"--attention {wanted} cannot run here: {obstacles[wanted]}; possible are {possible}")
    if not obstacles["flash"]:
        chosen = Backends("flash", "flash", "the fastest here")
    else:
        reasons = {why: ", ".join(n for n in obstacles if obstacles[n] == why) for why in obstacles.values() if why}
        reason = "; ".join(f"{names}: {why}" for why, names in reasons.items())
        chosen = Backends("sdpa" if obstacles["cudnn"] else "cudnn", "sdpa" if obstacles["flex"] else "flex", reason)
    if not wanted:
        return chosen
    full, windowed = chosen.full if wanted == "flex" else wanted, chosen.windowed if wanted == "cudnn" else wanted
    return Backends(full, windowed, f"--attention {wanted}")


def _obstacle(
    backend: str, device: torch.device, dtype: torch.dtype, head_dim: int, sequence_len: int, is_compiled: bool
) -> str:
    """Why a backend of `MIN_CAPABILITY` cannot run, "" if it can."""
    if device.type != "cuda":
        return NO_GPU
    if dtype not in (torch.bfloat16, torch.float16):
        return f"{str(dtype).removeprefix('torch.')} is neither bfloat16 nor float16"
    capability = torch.cuda.get_device_capability(device)
    if capability < MIN_CAPABILITY[backend]:
        return "compute capability {}.{} is below {}.{}".format(*capability, *MIN_CAPABILITY[backend])
    if head_dim % 8 or not 16 <= head_dim <= 128:
        return f"heads of {head_dim} channels are not 16 to 128 and a multiple of 8"
    if backend == "flash":
        return "" if flash_kernels() else "package flash-attn-4 is not installed or does not load"
    if not is_compiled:
        return "the model is not compiled"
    if backend == "flex" and sequence_len < FLEX_BLOCK:
        return f"rows are shorter than {FLEX_BLOCK} tokens"
    return ""


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, backends: Backends | None = None, block_mask=None
) -> Tensor:
    """Softmax attention with scale D ** -0.5 over the visible positions; (B, T, H, D) in the dtype of `q`.

    Without `backends`, the choice of `choose_backends` for code that is not compiled. "flex" needs the `block_mask` of
    `window_block_mask`.
    """
    assert k.shape == v.shape, (k.shape, v.shape)
    assert q.shape[:2] == k.shape[:2], (q.shape, k.shape)
    assert q.size(2) % k.size(2) == 0, (q.shape, k.shape)
    if window is not None and window >= q.size(1):
        window = None
    backends = backends or choose_backends(q.device, q.dtype, q.size(-1), q.size(1))
    backend = backends.full if window is None else backends.windowed
    if backend == "flash":
        return flash_attention(q, k, v, window)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # (B, H, T, D), as SDPA wants it
    if backend == "flex":
        y = _flex(q, k, v, block_mask)
    elif backend == "cudnn":
        y = _cudnn(q, k, v)
    elif window is None:
        y = _sdpa(q, k, v, is_causal=True)
    elif backend == "masked":
        y = _sdpa(q, k, v, attn_mask=band_mask(q.size(2), q.size(2), window, q.device))
    else:
        y = _blocked_sdpa(q, k, v, window)
    return y.transpose(1, 2)


def ragged_attention(
    q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[tuple[int, int]], ends: Tensor, *, window: int | None
) -> Tensor:
    """Causal attention within sequences that lie one after another without padding: q (N, H, D) has the last positions
    of each, k and v (K, H_kv, D) all that these see. Returns (N, H, D). Not for training.

    lengths: queries and keys of each sequence; ends (2, number + 1) int32, on the device: where each of its queries and
    keys begin, 0 first, the sums last. window as for `causal_attention`.
    """
    if _takes_ragged(q):
        from torch.nn.attention.varlen import varlen_attn  # imports for 0.3 s

        k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) if x.size(1) < q.size(1) else x for x in (k, v))
        num_queries, num_keys = (max(column) for column in zip(*lengths, strict=True))
        reach = (-1 if window is None else window - 1, 0)
        return varlen_attn(q, k, v, ends[0], ends[1], num_queries, num_keys, window_size=reach)
    split = ([own for own, _ in lengths], [seen for _, seen in lengths])
    parts = []
    for one_q, one_k, one_v in zip(q.split(split[0]), k.split(split[1]), v.split(split[1]), strict=True):
        if one_q.size(0) == one_k.size(0):
            parts.append(causal_attention(one_q[None], one_k[None], one_v[None], window=window)[0])
            continue
        mask = band_mask(one_q.size(0), one_k.size(0), window, q.device)
        one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in (one_q, one_k, one_v))
        parts.append(_sdpa(one_q, one_k, one_v, attn_mask=mask)[0].transpose(0, 1))
    return torch.cat(parts)


def _takes_ragged(q: Tensor) -> bool:
    """Whether PyTorch's FlashAttention for packed sequences takes such queries."""
    is_half = q.dtype in (torch.bfloat16, torch.float16)
    fits = q.is_cuda and is_half and q.size(-1) % 8 == 0 and q.size(-1) <= 256
    return fits and torch.cuda.get_device_capability(q.device) >= (8, 0)


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


@functools.cache
def window_block_mask(sequence_len: int, window: int, device: torch.device):
    """FlexAttention's description of a window: which blocks are computed, and which positions in them are visible."""
    from torch.nn.attention.flex_attention import create_block_mask  # imports for 0.4 s

    def visible(row, head, query_pos, key_pos):
        return (key_pos <= query_pos) & (key_pos > query_pos - window)

    return create_block_mask(visible, None, None, sequence_len, sequence_len, device, BLOCK_SIZE=FLEX_BLOCK)


def _flex(q: Tensor, k: Tensor, v: Tensor, block_mask) -> Tensor:
    from torch.nn.attention.flex_attention import flex_attention

    return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=q.size(1) != k.size(1))


def _cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full causal attention. PyTorch's way to ask for cuDNN, `sdpa_kernel`, would put a switch into the graph, and such
    a graph is not kept in the compile cache: every start would compile again."""
    k, v = (x.repeat_interleave(q.size(1) // x.size(1), 1) if x.size(1) < q.size(1) else x for x in (k, v))
    return torch.ops.aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, is_causal=True)[0]


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
