"""Linear layers, and how their products run while a GPU trains.

A weight is kept in float32. Its product with activations of a narrower dtype needs a copy in that dtype, and its
gradient is a sum over micro-steps in float32. `F.linear` makes the copy in every forward pass, and autograd adds up
gradients with a kernel of its own for each weight. Once the optimizer has attached a `WeightCopy` to a layer, the copy
is made once per optimizer step, and the product that computes the gradient adds it to the sum itself.

Not here: when copies are refreshed (`training/optim.py`), and the arithmetic of 8 bits (`fp8.py`).
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from nanochat.model.fp8 import E4M3, linear8, quantise
from nanochat.model.products import WeightCopy, add_gradient_


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
        return linear8(x, x8, x_scale, copy.values, copy.transposed, copy.scale, copy.grad)


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
