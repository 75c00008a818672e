"""Linear layers, and how their products run while a GPU trains.

A weight is kept in float32. Its product with activations of a narrower dtype needs a copy in that dtype, and its
gradient is a sum over micro-steps in float32. `F.linear` makes the copy in every forward pass, and autograd adds up
gradients with a kernel of its own for each weight. Once the optimizer has attached a `WeightCopy` to a layer, the copy
is made once per optimizer step, and the product that computes the gradient adds it to the sum itself.

Not here: when copies are refreshed (`training/optim.py`), and the arithmetic of 8 bits (`fp8.py`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.fp8 import E4M3, E5M2, quantise, scaled_product


@dataclass(frozen=True)
class WeightCopy:
    """What the products of one weight (out, in) read and write: views into buffers of the optimizer."""

    values: Tensor  # (out, in), of the compute dtype, or of 8 bits
    grad: Tensor | None  # (out, in) float32, to which backward adds; None for the head, whose loss does without
    # of 8 bits only:
    transposed: Tensor | None = None  # (in, out), contiguous
    scale: Tensor | None = None  # 0-d float32, by which `values` must be multiplied

    def of_matrix(self, number: int) -> "WeightCopy":
        """That of one matrix, of the copy of a stack of matrices."""
        parts = (self.values, self.grad, self.transposed, self.scale)
        return WeightCopy(*(None if part is None else part[number] for part in parts))


class Linear(nn.Module):
    """x @ weight.T, the float32 weight (out_features, in_features) cast to the dtype of x.

    Unlike `nn.Linear` it does not initialise its weight, `GPT.init_weights` does. (On the meta device, PyTorch's
    initialisation also imports its compiler: 9 seconds on a slow CPU.)
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.copy: WeightCopy | None = None

    def forward(self, x: Tensor) -> Tensor:
        copy, trains = self.copy, torch.is_grad_enabled()
        if copy is None or (copy.scale is not None and not trains):
            return F.linear(x, self.weight.to(x.dtype))
        if not trains:
            return F.linear(x, copy.values)
        if copy.scale is None:
            return _linear(x, copy.values, copy.grad)
        x8, x_scale = quantise(x.detach(), E4M3)
        return _linear8(x, x8, x_scale, copy.values, copy.transposed, copy.scale, copy.grad)


# called with no argument after something was added to the gradient whose memory begins at the address
_listeners: dict[int, Callable[[], None]] = {}


def on_gradient(copy: WeightCopy, listener: Callable[[], None]) -> None:
    """Have `listener` called each time backward has added to `copy.grad`, also from within a compiled backward."""
    _listeners[copy.grad.data_ptr()] = listener


@torch.library.custom_op("nanochat::linear", mutates_args=())
def _linear(x: Tensor, values: Tensor, grad: Tensor) -> Tensor:
    """x (..., in) @ values.T; `grad` is for backward."""
    return F.linear(x, values)


@_linear.register_fake
def _(x: Tensor, values: Tensor, grad: Tensor) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.size(0))


def _keep(ctx, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    x, values, ctx.grad = inputs  # what backward changes may not be saved as what it reads
    ctx.save_for_backward(x, values)


def _gradients(ctx, grad_y: Tensor) -> tuple[Tensor, None, None]:
    x, values = ctx.saved_tensors
    add_gradient_(ctx.grad, grad_y, x)
    return grad_y @ values, None, None


_linear.register_autograd(_gradients, setup_context=_keep)


@torch.library.custom_op("nanochat::linear8", mutates_args=())
def _linear8(
    x: Tensor, x8: Tensor, x_scale: Tensor, values: Tensor, transposed: Tensor, scale: Tensor, grad: Tensor
) -> Tensor:
    """x (..., in) @ values.T by way of 8 bits: `x8` is x rounded, with its scale; the rest as in `WeightCopy`."""
    rows = x8.flatten(0, -2)
    return scaled_product(rows, values.T, x_scale, scale, dtype=x.dtype, is_forward=True).view(*x.shape[:-1], -1)


@_linear8.register_fake
def _(x, x8, x_scale, values, transposed, scale, grad) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.size(0))


def _keep8(ctx, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    x, _, _, _, transposed, scale, ctx.grad = inputs
    ctx.save_for_backward(x, transposed, scale)


def _gradients8(ctx, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, transposed, scale = ctx.saved_tensors
    add_gradient_(ctx.grad, grad_y, x)
    rows, row_scale = quantise(grad_y.flatten(0, -2), E5M2)
    grad_x = scaled_product(rows, transposed.T, row_scale, scale, dtype=x.dtype, is_forward=False)
    return grad_x.view(x.shape), *[None] * 6


_linear8.register_autograd(_gradients8, setup_context=_keep8)


@torch.library.custom_op("nanochat::add_gradient_", mutates_args=("total",))
def add_gradient_(total: Tensor, grad_y: Tensor, x: Tensor) -> None:
    """total (out, in) float32 += grad_y (..., out).T @ x (..., in), summed in float32."""
    add_product_(total, grad_y.flatten(0, -2).T, x.flatten(0, -2))
    if listener := _listeners.get(total.data_ptr()):
        listener()


@add_gradient_.register_fake
def _(total: Tensor, grad_y: Tensor, x: Tensor) -> None:
    pass


def add_product_(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total (M, N) float32 += a (M, K) @ b (K, N), both of one float dtype. A CPU rounds the product to it, a GPU does
    not."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif not total.is_cuda:
        total.add_(a @ b)
    elif _adds_in_float32(a.dtype, total.device):
        torch.ops.aten.addmm.dtype_out(total, a, b, torch.float32, out=total)
    else:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))


@functools.cache
def _adds_in_float32(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether this PyTorch lets a product of 16-bit floats add to float32; older ones let it only write."""
    a, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.ops.aten.addmm.dtype_out(total, a, a, torch.float32, out=total)
    except RuntimeError:
        return False
    return True
