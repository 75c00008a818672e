"""The blocks of a model on a GPU: a pass over tokens of any sequences, with few kernels between the matrix products.

How tokens attend to one another is the caller's: decoding reads a cache (`gpu.py`), scoring does not
(`evals/scoring.py`). Products of few rows are ours (`product_kernel.py`): such a pass is bound by reading the weights,
once; those of more rows are the library's.

Not here: the kernels (`kernels.py`), the weights (`weights.py`).
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.engine.kernels import mix_and_norm, place_heads, relu_squared_
from nanochat.engine.product_kernel import FEW_ROWS, choose_splits, few_rows_product
from nanochat.engine.weights import Product, Weights
from nanochat.model.gpt import GPTConfig, rotary_angles

Attend = Callable[[int, Tensor], Tensor]  # layer, joined q, k, v and gates (N, M) -> (N, H, D)


class GpuBlocks:
    """The blocks of `weights`, whose tensors are read anew at each pass."""

    def __init__(self, config: GPTConfig, weights: Weights, device: torch.device):
        self.config, self.weights, self.device = config, weights, device
        angles = rotary_angles(config, config.sequence_len, device)
        self._angles = torch.cat((angles.cos(), angles.sin()), dim=1)  # (T, D) float32

    def hidden(self, x: Tensor, attend: Attend) -> Tensor:
        """Final normed hidden states (N, C) of embedded tokens x (N, C)."""
        config, weights = self.config, self.weights
        x0 = middle = x
        added = None
        for i, layer in enumerate(weights.layers):
            other, scales = (x0, layer.mix) if config.residual_scalars else (None, None)
            x, normed = mix_and_norm(x, added, other, scales)
            if i == config.n_layer // 2:
                middle = x
            attended = attend(i, _product(layer.attend, normed))
            x, normed = mix_and_norm(x, _addend(layer.attend_out, attended.flatten(1)), None, None)
            added = _addend(layer.contract, _product(layer.expand, normed, relu_squared=True))
        other, scales = (middle, weights.backout) if config.backout else (None, None)
        return mix_and_norm(x, added, other, scales)[1]

    def place_heads(
        self, layer: int, joined: Tensor, idx: Tensor, at: Tensor, places: Tensor, keys: Tensor, values: Tensor
    ) -> Tensor:
        """Rotated queries (N, H, D) of tokens idx (N,) at positions at (N,), given `joined` as `Attend` is; keys and
        values go to `places` (N,) in `keys` and `values` (P, H_kv, D)."""
        columns, table = self.weights.layers[layer].value_embed, self.weights.value_embeds
        value_embeds = None if columns is None else table[:, columns]
        scale, H = self.config.qk_scale**2, self.config.n_head
        return place_heads(joined, at, places, keys, values, self._angles, H, scale, idx, value_embeds)

    def head(self, hidden: Tensor) -> Tensor:
        """The head's outputs (N, V) in the compute dtype, before the soft cap."""
        return _product(self.weights.head, hidden)


def _product(product: Product, x: Tensor, *, relu_squared: bool = False) -> Tensor:
    """x @ weight.T, (N, M), or relu of it squared."""
    if x.size(0) <= FEW_ROWS:
        return few_rows_product(x, *_few_rows_form(product), relu_squared=relu_squared)
    y = F.linear(x, product.weight)
    if relu_squared:
        relu_squared_(y)
    return y


def _addend(product: Product, x: Tensor) -> Tensor:
    """x @ weight.T in a form that `mix_and_norm` adds: (N, M), or parts of it (S, N, M) float32."""
    if x.size(0) <= FEW_ROWS:
        return few_rows_product(x, *_few_rows_form(product), num_splits=choose_splits(*product.weight.shape))
    return F.linear(x, product.weight)


def _few_rows_form(product: Product) -> tuple[Tensor, Tensor | None]:
    return (product.weight, None) if product.int8 is None else product.int8
