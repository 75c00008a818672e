"""Matrix products of 8-bit floats (arXiv 2209.05433), for training on Hopper and newer GPUs.

Two of the three products of a layer run in 8 bits: y = x W^T, with x and W rounded to e4m3 (3 bits of mantissa, values
up to 448), and grad_x = grad_y W, with grad_y rounded to e5m2 (2 bits of mantissa, values up to 57,344). Each tensor is
scaled so that its largest magnitude becomes the largest value of its type. The third, grad_W = grad_y^T x, stays in
16 bits: 8-bit products want both operands with the summed dimension contiguous, which here is that of the tokens, and
the transposed copies would cost about half of what the product saves (dev/LOG.md).

Not here: the layer (`linear.py`), and when its weights are rounded (`training/optim.py`).
"""

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.model.products import add_gradient_

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MULTIPLE = 16  # GPUs want dimensions of 8-bit products to be multiples of this
TINY = 1e-12  # instead of the largest magnitude of a tensor of zeros


def check_fp8(**sides: int) -> None:
    """Raise `UserError` unless all of these sides of the blocks' matrices allow products in 8 bits."""
    for name, side in sides.items():
        if side % MULTIPLE:
            remedy = "choose another --head-dim, or --dtype bfloat16"
            raise UserError(f"--dtype fp8 needs {name} to be a multiple of {MULTIPLE}, not {side}; {remedy}")


def quantise(x: Tensor, dtype: torch.dtype, dims: tuple[int, ...] | None = None) -> tuple[Tensor, Tensor]:
    """x rounded to an 8-bit `dtype`, and the float32 scale, such that their product is about x.

    One scale for all of x, 0-d; with `dims`, the largest magnitude is taken over these only, and they remain in the
    scale's shape with size 1. Plain operations, which the compiler fuses with those that make x.
    """
    largest = x.abs().amax() if dims is None else x.abs().amax(dims, keepdim=True)
    scale = largest.float().clamp(min=TINY) / torch.finfo(dtype).max
    return (x.float() / scale).to(dtype), scale


def scaled_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, *, dtype: torch.dtype, is_forward: bool
) -> Tensor:
    """(a * a_scale) @ (b * b_scale) in `dtype`, for a (M, K) and b (K, N) of 8-bit types, b with contiguous columns.

    In forward, a GPU may sum in the fewer bits of its tensor cores. Other devices emulate the product in float32.
    """
    if a.is_cuda:
        return torch._scaled_mm(a.contiguous(), b, a_scale, b_scale, out_dtype=dtype, use_fast_accum=is_forward)
    return ((a.float() @ b.float()) * (a_scale * b_scale)).to(dtype)


@torch.library.custom_op("nanochat::linear8", mutates_args=())
def linear8(
    x: Tensor, x8: Tensor, x_scale: Tensor, values: Tensor, transposed: Tensor, scale: Tensor, grad: Tensor
) -> Tensor:
    """x (..., in) @ values.T by way of 8 bits: `x8` is x rounded, with its scale; the rest as in `WeightCopy`."""
    rows = x8.flatten(0, -2)
    return scaled_product(rows, values.T, x_scale, scale, dtype=x.dtype, is_forward=True).view(*x.shape[:-1], -1)


@linear8.register_fake
def _(x, x8, x_scale, values, transposed, scale, grad) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.size(0))


def _keep(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, _, _, _, transposed, scale, ctx.grad = inputs
    ctx.save_for_backward(x, transposed, scale)


def _gradients(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, transposed, scale = ctx.saved_tensors
    add_gradient_(ctx.grad, grad_y, x)
    rows, row_scale = quantise(grad_y.flatten(0, -2), E5M2)
    grad_x = scaled_product(rows, transposed.T, row_scale, scale, dtype=x.dtype, is_forward=False)
    return grad_x.view(x.shape), *[None] * 6


linear8.register_autograd(_gradients, setup_context=_keep)
