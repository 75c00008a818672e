"""Copies of weights for products to read, and gradients that the products themselves add up: on a GPU, one kernel
instead of three.

Not here: the layers whose weights these are (`linear.py`, `fp8.py`, `loss.py`).
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


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


# called with no argument after something was added to the gradient whose memory begins at the address
_listeners: dict[int, Callable[[], None]] = {}


def on_gradient(grad: Tensor, listener: Callable[[], None]) -> None:
    """Have `listener` called each time backward has added to `grad`, also from within a compiled backward."""
    _listeners[grad.data_ptr()] = listener


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
    except (RuntimeError, TypeError):
        return False
    return True
