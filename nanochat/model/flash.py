"""FlashAttention 4 (package `flash-attn-4`, Hopper and newer) as an operation that `torch.compile` can trace.

`flash_attention` is what a caller gets. The package compiles its kernels when they are first called and wraps them in a
plain autograd function, which the compiler cannot look into. Here forward and backward are two registered operations
with shapes known beforehand, so that the graph around them stays whole.

Not here: which backend is used when (`attention.py`).
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor


@functools.cache
def flash_kernels() -> tuple[Callable, Callable] | None:
    """The package's forward and backward; None where it is missing or does not load."""
    try:
        interface = importlib.import_module("flash_attn.cute.interface")
        return interface._flash_attn_fwd, interface._flash_attn_bwd
    except (ImportError, AttributeError, OSError):
        return None


def flash_attention(q: Tensor, k: Tensor, v: Tensor, window: int | None) -> Tensor:
    """Causal attention with scale D ** -0.5; q (B, T, H, D), k and v (B, T, H_kv, D), bfloat16 or float16 on a GPU.

    Each position sees the `window` positions up to its own, None for all. Returns (B, T, H, D).
    """
    return _forward(q, k, v, window or 0)[0]


def _reach(window: int) -> dict[str, int | None]:
    """The window in the package's terms: positions to the left of the query's own, and to its right."""
    return {"window_size_left": window - 1 if window else None, "window_size_right": 0 if window else None}


@torch.library.custom_op("nanochat::flash_forward", mutates_args=())
def _forward(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """Output (B, T, H, D), and the log-sum-exp of the scores (B, H, T) float32; `window` 0 is none."""
    forward, _ = flash_kernels()
    out, lse, *_ = forward(q, k, v, causal=True, return_lse=True, **_reach(window))
    return out, lse


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, window: int) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    return q.new_empty(q.shape), q.new_empty((B, H, T), dtype=torch.float32)


@torch.library.custom_op("nanochat::flash_backward", mutates_args=())
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, given that of the output."""
    _, backward = flash_kernels()
    dq, dk, dv, *_ = backward(q, k, v, out, grad.contiguous(), lse, causal=True, **_reach(window))
    return dq, dk, dv


@_backward.register_fake
def _(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, window: int) -> tuple[Tensor, ...]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _keep(ctx, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    q, k, v, ctx.window = inputs
    ctx.save_for_backward(q, k, v, *output)
    ctx.set_materialize_grads(False)


def _gradients(ctx, grad: Tensor | None, grad_lse: None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return None, None, None, None
    return *_backward(grad, *ctx.saved_tensors, ctx.window), None


_forward.register_autograd(_gradients, setup_context=_keep)
