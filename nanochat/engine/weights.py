"""What a serving model has learned, laid out for decoding: matrices in the form they are kept in, tables, scalars.

Shapes: C channels, H heads, H_kv key heads, D head size, V vocabulary; a product takes x (N, K) to (N, M).

Not here: passes over the model (`inference.py`, and `gpu.py` for a GPU).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from nanochat.model import gpt
from nanochat.model.gpt import GPT, norm

INT8_MAX_ROWS = {"cpu": 4, "cuda": 16}  # more rows in one product are faster with the weights unpacked
PARTS_MAX_ROWS = 16  # more rows in one product keep all threads busy anyway
ROWS_MULTIPLE = 16  # the matrix of q, k, v and gate is padded to a multiple, so that threads can share it evenly


class Product:
    """x @ weight.T for weight (M, K), laid out for the number of rows of x (N, K).

    8 bits: an output's weights are multiples of its own step, the largest being 127 steps. Few rows (decoding is then
    bound by reading weights) go through an 8-bit kernel, PyTorch's for CPUs, which takes bfloat16, or on a GPU ours
    (`gpu.py`); more rows go through the same weights unpacked, so that a sequence's result does not depend on how many
    run beside it.

    Few rows in float32 on a CPU: PyTorch would leave the product to one thread, so the outputs are divided among the
    threads as a batch of products. A matrix with more outputs than inputs is kept transposed for that: adding up rows
    of outputs is faster than a dot product for each. Together this is two to three times faster (`dev/LOG.md`).
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype, *, int8: bool = False):
        self.int8: tuple[Tensor, Tensor] | None = None
        self.parts: Tensor | None = None  # (P, K, M / P), a view of the weight or a copy
        weight = weight.detach()
        if int8:
            step = weight.float().abs().amax(dim=1).clamp(min=1e-12) / 127
            packed = (weight.float() / step[:, None]).round().to(torch.int8)
            self.int8 = (packed.contiguous(), step.to(torch.bfloat16))  # the CPU kernel wants such steps
            weight = packed.float() * self.int8[1].float()[:, None]
        self.weight = _converted(weight, dtype).contiguous()
        if dtype == torch.float32 and weight.device.type == "cpu":
            M, K = self.weight.shape
            num_parts = max(p for p in range(1, torch.get_num_threads() + 1) if M % p == 0)
            self.parts = self.weight.view(num_parts, -1, K).transpose(1, 2)
            if M > K and not int8:
                self.parts = self.parts.contiguous()

    def __call__(self, x: Tensor) -> Tensor:
        N = x.size(0)
        if self.int8 is not None and INT8_MAX_ROWS["cpu"] >= N:
            return torch._weight_int8pack_mm(x.to(torch.bfloat16), *self.int8).to(x.dtype)
        if self.parts is not None and N <= PARTS_MAX_ROWS:
            y = torch.bmm(x.expand(self.parts.size(0), -1, -1), self.parts)  # (P, N, M / P)
            return y.transpose(0, 1).reshape(N, -1)
        return F.linear(x, self.weight)


class Weights:
    """Everything learned. Scalars are tensors too: a recorded CUDA graph would keep the value of a Python number."""

    @torch.no_grad()
    def __init__(self, model: GPT, dtype: torch.dtype, *, int8: bool):
        config, V = model.config, model.config.vocab_size
        self.embed = norm(model.wte.weight[:V].to(dtype)).to(dtype)  # (V, C)
        self.smear = None
        if config.smear:
            gate = torch.sigmoid(self.embed[:, : gpt.SMEAR_CHANNELS] @ model.smear_gate.to(dtype))
            self.smear = (model.smear_lambda.to(dtype) * gate).unsqueeze(-1)  # (V, 1)
        self.value_embeds = _converted(model.value_embeds.weight[:V], dtype) if config.value_embeds else None
        self.layers = [LayerWeights(model, layer, dtype, int8) for layer in range(config.n_layer)]
        self.head = Product(model.lm_head.weight[:V], dtype, int8=int8)
        self.backout = None  # (2,): shares of the last hidden state and of that at half depth
        if config.backout:
            self.backout = torch.cat((torch.ones_like(model.backout_lambda), -model.backout_lambda)).to(dtype)

    def embedded(self, idx: Tensor, previous: Tensor, at: Tensor | None) -> Tensor:
        """x (N, C) of idx (N,), each with a share of the token before it, except at position 0; `at` (N,) are the
        positions, None where none of them is 0."""
        x = F.embedding(idx, self.embed)
        if self.smear is None:
            return x
        share = F.embedding(idx, self.smear)
        if at is not None:
            share = share * (at > 0).unsqueeze(-1)
        return torch.addcmul(x, share, F.embedding(previous, self.embed))


class LayerWeights:
    """Weights of a block; `attend` makes q, k, v and the gate of the value embeddings."""

    def __init__(self, model: GPT, layer: int, dtype: torch.dtype, int8: bool):
        config, block = model.config, model.h[layer]
        matrices = [block.attn.c_q.weight, block.attn.c_k.weight, block.attn.c_v.weight]
        self.value_embed: slice | None = None  # this layer's columns of the table
        if config.has_value_embed(layer):
            # the gate reads the first channels only: as rows of the whole matrix it is zero elsewhere
            matrices.append(F.pad(block.attn.value_gate.weight, (0, config.n_embd - gpt.VALUE_GATE_CHANNELS)))
            start = sum(config.has_value_embed(earlier) for earlier in range(layer)) * config.kv_dim
            self.value_embed = slice(start, start + config.kv_dim)
        joined = torch.cat(matrices)
        joined = F.pad(joined, (0, 0, 0, -joined.size(0) % ROWS_MULTIPLE))
        self.attend, self.attend_out, self.expand, self.contract = (
            Product(weight, dtype, int8=int8)
            for weight in (joined, block.attn.c_proj.weight, block.mlp.c_fc.weight, block.mlp.c_proj.weight)
        )
        if config.residual_scalars:
            self.mix = torch.stack((model.resid_lambdas[layer], model.x0_lambdas[layer])).to(dtype)
            self.resid, self.x0 = self.mix  # views


def _converted(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """A weight in another dtype: on CUDA always a copy, for `refresh` writes to it; elsewhere maybe the model's own."""
    return weight.to(dtype, copy=weight.is_cuda)


def tensors_of(weights) -> list[Tensor]:
    """All tensors among the attributes of an object and the items of lists and tuples, in a fixed order."""
    if isinstance(weights, Tensor):
        return [weights]
    items = weights if isinstance(weights, (list, tuple)) else getattr(weights, "__dict__", {}).values()
    return [tensor for item in items for tensor in tensors_of(item)]
