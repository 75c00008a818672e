"""The model: a GPT whose shape follows from one number, its depth.

Shapes: B batch, T time, C channels (`n_embd`), H heads, H_kv key heads, D head size, V vocabulary.

One class covers two architectures:
- this project's recipe, `GPTConfig.from_depth`: value embeddings, learned scalars on the residual stream and on its
  start x0, smear (a gated share of the previous token's embedding is added to each one), backout (a share of the
  residual at half depth is subtracted at the end), sliding windows, scaled QK-norm;
- that of October 2025, `GPTConfig.october_2025`: none of these, RoPE base 10,000, full attention.
Both have RMSNorm without a gain, rotary positions, QK-norm, relu^2, an untied soft-capped head and no biases.

Not here: learning rates, sampling, checkpoints.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nanochat.common import UserError
from nanochat.model import attention
from nanochat.model.linear import Linear
from nanochat.model.loss import IGNORE_INDEX, softcap_cross_entropy, softcap_logits

__all__ = ["GPT", "IGNORE_INDEX", "GPTConfig", "build_model"]

NORM_EPS = torch.finfo(torch.float32).eps
VOCAB_MULTIPLE = 64  # the tables are padded to a multiple of this many rows, which matrix kernels prefer
CHANNELS_PER_LAYER = 64  # width over depth
MAX_DEPTH = 256
SHORT_WINDOW_FRAC = 0.25  # of the sequence length
SMEAR_CHANNELS = 24  # channels that the smear's gate reads
VALUE_GATE_CHANNELS = 12  # channels that the gate of the value embeddings reads
EMBEDDING_STD = 0.8
HEAD_STD = 1e-3
MLP_INIT_MULT = 0.4  # c_fc starts this much smaller than the other input matrices
GATE_INIT_MAX = 0.02
BACKOUT_INIT = 0.2
RESID_INIT = (1.15, 1.05)  # first and last layer
X0_INIT = (0.20, 0.05)
VALUE_GATE_SCALE = 3.0

Attend = Callable[..., Tensor]  # called as `causal_attention` is
Places = tuple[Tensor, Tensor]  # index tensors (B, 1) and (B, Q): rows, and positions in them


@dataclass(frozen=True)
class GPTConfig:
    """Everything that fixes the model's shape and function. Checked on construction: `UserError` names the field."""

    sequence_len: int = 2048
    vocab_size: int = 32768
    n_layer: int = 12
    n_embd: int = 768
    n_head: int = 6
    n_kv_head: int = 6
    window_pattern: str = "SSSL"  # S: the last `short_window` positions, L: all; repeats, but the last layer is L
    short_window: int = 512
    rope_base: float = 100_000.0
    qk_scale: float = 1.2
    softcap: float = 15.0
    value_embeds: bool = True  # on every second layer, the last one included
    residual_scalars: bool = True
    smear: bool = True
    backout: bool = True

    def __post_init__(self):
        for name in ("sequence_len", "vocab_size", "n_layer", "n_embd", "n_head", "n_kv_head", "short_window"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} must be at least 1, not {getattr(self, name)}")
        for name in ("rope_base", "qk_scale", "softcap"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"{name} must be a number above 0, not {getattr(self, name)}")
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise UserError(f"n_embd {self.n_embd} over n_head {self.n_head} must be an even whole head size")
        if self.n_head % self.n_kv_head:
            raise UserError(f"n_head {self.n_head} must be a multiple of n_kv_head {self.n_kv_head}")
        if not self.window_pattern or set(self.window_pattern) - set("SL"):
            raise UserError(f"window_pattern {self.window_pattern!r} must consist of the letters S and L")
        if self.n_embd < max(SMEAR_CHANNELS, VALUE_GATE_CHANNELS):
            raise UserError(f"n_embd must be at least {SMEAR_CHANNELS}, not {self.n_embd}; choose a larger depth")

    @classmethod
    def from_depth(
        cls, depth: int, *, vocab_size: int, sequence_len: int = 2048, head_dim: int = 128, kv_ratio: int = 1, **other
    ) -> "GPTConfig":
        """The recipe's shape: width 64 * depth, rounded up to a whole number of heads of `head_dim` channels.

        `kv_ratio` query heads share one key head; `other` sets further fields. Raises `UserError` when out of range.
        """
        if not 1 <= depth <= MAX_DEPTH:
            raise UserError(f"depth must lie between 1 and {MAX_DEPTH}, not {depth}")
        if head_dim < 2 or kv_ratio < 1:
            raise UserError(f"head_dim must be at least 2 and kv_ratio at least 1, not {head_dim} and {kv_ratio}")
        n_head = math.ceil(CHANNELS_PER_LAYER * depth / head_dim)
        if n_head % kv_ratio:
            raise UserError(f"{n_head} heads at depth {depth} cannot share key heads in groups of {kv_ratio}")
        shape = {"n_layer": depth, "n_embd": n_head * head_dim, "n_head": n_head, "n_kv_head": n_head // kv_ratio}
        windows = {"short_window": max(1, int(sequence_len * SHORT_WINDOW_FRAC))}
        return cls(**{"sequence_len": sequence_len, "vocab_size": vocab_size, **shape, **windows, **other})

    @classmethod
    def october_2025(cls, depth: int, *, vocab_size: int = 65536, sequence_len: int = 2048, **other) -> "GPTConfig":
        """The plain architecture of the first public release, which Hugging Face transformers calls NanoChat."""
        plain = {"window_pattern": "L", "rope_base": 10_000.0, "qk_scale": 1.0}
        plain |= dict.fromkeys(("value_embeds", "residual_scalars", "smear", "backout"), False)
        return cls.from_depth(depth, vocab_size=vocab_size, sequence_len=sequence_len, **{**plain, **other})

    @property
    def head_dim(self) -> int:
        return self.n_embd // self.n_head

    @property
    def kv_dim(self) -> int:
        return self.n_kv_head * self.head_dim

    @property
    def padded_vocab_size(self) -> int:
        return math.ceil(self.vocab_size / VOCAB_MULTIPLE) * VOCAB_MULTIPLE

    def window(self, layer: int) -> int | None:
        """How many positions layer `layer` sees, its own included; None for all."""
        is_short = self.window_pattern[layer % len(self.window_pattern)] == "S" and layer != self.n_layer - 1
        return self.short_window if is_short else None

    def has_value_embed(self, layer: int) -> bool:
        return self.value_embeds and layer % 2 == (self.n_layer - 1) % 2

    @property
    def num_value_embeds(self) -> int:
        return sum(self.has_value_embed(layer) for layer in range(self.n_layer))


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a gain (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotary_angles(config: GPTConfig, length: int, device: torch.device | str) -> Tensor:
    """(length, D / 2) float32: by how much each pair of channels is rotated at positions 0 to length - 1."""
    D = config.head_dim
    frequencies = config.rope_base ** (-torch.arange(0, D, 2, dtype=torch.float32, device=device) / D)
    return torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)


def activation(x: Tensor) -> Tensor:
    """relu^2 (arXiv 2109.08668), of the MLP, here and in the engine."""
    return F.relu(x).square()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (arXiv 2104.09864) on the two halves of the head; the angle's sign is opposite to Llama's.

    x (B, T, H, D); cos, sin (1, T, 1, D / 2).
    """
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


class Embedding(nn.Module):
    """Rows of a table (num_rows, channels), looked up by idx; not initialised on construction, as `Linear`."""

    def __init__(self, num_rows: int, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_rows, channels))

    def forward(self, idx: Tensor) -> Tensor:
        return F.embedding(idx, self.weight)


class Attention(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.qk_scale = config.qk_scale
        self.window = config.window(layer)
        self.c_q = Linear(config.n_embd, config.n_embd)
        self.c_k = Linear(config.n_embd, config.kv_dim)
        self.c_v = Linear(config.n_embd, config.kv_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)
        self.value_gate = Linear(VALUE_GATE_CHANNELS, config.n_kv_head) if config.has_value_embed(layer) else None

    def forward(self, x: Tensor, rotary, value_embed: Tensor | None, attend: Attend, asking: Places | None) -> Tensor:
        """x (B, T, C); rotary: cos and sin; value_embed (B, T, H_kv * D) or None; the rest as for `GPT.trunk`."""
        heads = (-1, self.head_dim)
        q = self.c_q(x if asking is None else x[asking]).unflatten(-1, heads)  # (B, T, H, D)
        k = self.c_k(x).unflatten(-1, heads)  # (B, T, H_kv, D)
        v = self.c_v(x).unflatten(-1, heads)
        if value_embed is not None:
            gate = VALUE_GATE_SCALE * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, H_kv)
            v = torch.addcmul(v, gate.unsqueeze(-1), value_embed.unflatten(-1, heads))
        q_rotary = rotary if asking is None else tuple(table[asking] for table in rotary)
        q, k = norm(rotate(q, *q_rotary)), norm(rotate(k, *rotary))
        if self.qk_scale != 1.0:
            q = q * self.qk_scale**2  # the scale of q and that of k: only their product counts
        options = {} if asking is None else {"asking": asking}
        return self.c_proj(attend(q, k, v, window=self.window, **options).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(activation(self.c_fc(norm(x))))


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)
        self.recomputes_mlp = False  # see `GPT.recompute_mlps`

    def forward(self, x: Tensor, rotary, value_embed, attend, asking) -> Tensor:
        residual = x if asking is None else x[asking]
        x = residual + self.attn(norm(x), rotary, value_embed, attend, asking)
        if self.recomputes_mlp:
            return x + checkpoint(self.mlp, x, use_reentrant=False, preserve_rng_state=False)
        return x + self.mlp(x)


class GPT(nn.Module):
    """The whole model. Weights are float32 (the embedding tables may be narrower), activations `compute_dtype`.

    Its weights are not initialised on construction (also on the meta device): call `init_weights` or load a checkpoint.
    """

    def __init__(self, config: GPTConfig, *, compute_dtype: torch.dtype = torch.float32):
        super().__init__()
        self.config = config
        self.compute_dtype = compute_dtype
        V, C = config.padded_vocab_size, config.n_embd
        self.wte = Embedding(V, C)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.lm_head = Linear(C, V)
        # the value embeddings of all layers side by side, so that one gather serves them all
        self.value_embeds = Embedding(V, config.num_value_embeds * config.kv_dim) if config.value_embeds else None
        self.resid_lambdas = nn.Parameter(torch.empty(config.n_layer)) if config.residual_scalars else None
        self.x0_lambdas = nn.Parameter(torch.empty(config.n_layer)) if config.residual_scalars else None
        self.smear_gate = nn.Parameter(torch.empty(SMEAR_CHANNELS)) if config.smear else None
        self.smear_lambda = nn.Parameter(torch.empty(1)) if config.smear else None
        self.backout_lambda = nn.Parameter(torch.empty(1)) if config.backout else None
        self._rotary: tuple[Tensor, Tensor] | None = None  # cos and sin, as long as the longest input seen
        self._compiled_trunk: Callable[..., Tensor] | None = None
        self._training_shape: torch.Size | None = None
        self._attention = ""

    @property
    def device(self) -> torch.device:
        return self.wte.weight.device

    # --- initialisation ---

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator | None = None) -> None:
        """Fill every parameter. `generator` must live on the model's device; the same seed gives the same weights."""
        config, random = self.config, {"generator": generator}
        bound = math.sqrt(3.0 / config.n_embd)  # of a uniform distribution with standard deviation n_embd ** -0.5
        self.wte.weight.normal_(0.0, EMBEDDING_STD, **random)
        self.lm_head.weight.normal_(0.0, HEAD_STD, **random)
        if config.value_embeds:
            self.value_embeds.weight.uniform_(-bound, bound, **random)
        for block in self.h:
            for matrix in (block.attn.c_q, block.attn.c_k, block.attn.c_v):
                matrix.weight.uniform_(-bound, bound, **random)
            block.mlp.c_fc.weight.uniform_(-MLP_INIT_MULT * bound, MLP_INIT_MULT * bound, **random)
            block.attn.c_proj.weight.zero_()
            block.mlp.c_proj.weight.zero_()
            if block.attn.value_gate is not None:
                block.attn.value_gate.weight.uniform_(0.0, GATE_INIT_MAX, **random)
        if config.residual_scalars:
            self.resid_lambdas.copy_(torch.linspace(*RESID_INIT, config.n_layer))
            self.x0_lambdas.copy_(torch.linspace(*X0_INIT, config.n_layer))
        if config.smear:
            self.smear_gate.uniform_(0.0, GATE_INIT_MAX, **random)
            self.smear_lambda.zero_()
        if config.backout:
            self.backout_lambda.fill_(BACKOUT_INIT)

    def rotary(self, length: int) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles of positions 0 to length - 1, each (1, length, 1, D / 2)."""
        ready = self._rotary
        if ready is None or ready[0].size(1) < length or ready[0].device != self.device:
            angles = rotary_angles(self.config, max(length, self.config.sequence_len), self.device)[None, :, None, :]
            ready = self._rotary = (angles.cos().to(self.compute_dtype), angles.sin().to(self.compute_dtype))
        return ready[0][:, :length], ready[1][:, :length]

    # --- forward ---

    def forward(self, idx: Tensor, targets: Tensor | None = None, *, reduction: str = "mean") -> Tensor:
        """Logits (B, T, V) float32 of idx (B, T) int64; or, given targets (B, T), their cross-entropy in nats.

        `reduction` as in `loss.softcap_cross_entropy`.
        """
        hidden = self.hidden(idx)
        if targets is None:
            return self.logits(hidden)
        return self.loss(hidden, targets, reduction=reduction)

    def loss(self, hidden: Tensor, targets: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy in nats of targets (...) given final hidden states (..., C)."""
        copy, vocab_size = self.lm_head.copy, self.config.vocab_size
        return softcap_cross_entropy(
            hidden, self.lm_head.weight, targets, vocab_size=vocab_size, softcap=self.config.softcap,
            copy=None if copy is None else copy.values, reduction=reduction,
        )  # fmt: skip

    def logits(self, hidden: Tensor) -> Tensor:
        """Soft-capped logits (..., V) float32 of hidden states (..., C); the padded ids are left out."""
        return softcap_logits(hidden, self.lm_head.weight[: self.config.vocab_size], self.config.softcap)

    def hidden(self, idx: Tensor) -> Tensor:
        """Final normed hidden states (B, T, C) in the compute dtype of idx (B, T) int64."""
        if torch.is_grad_enabled():
            self._training_shape = idx.shape
        # evaluation brings batches of many shapes, too many to compile for each
        is_training_shape = idx.shape == self._training_shape
        is_compiled = self._compiled_trunk is not None and is_training_shape
        T = idx.size(1)
        backends = self._backends(T, is_compiled, self._attention if is_training_shape else "")
        block_mask = None
        if backends.windowed == "flex":
            block_mask = attention.window_block_mask(T, self.config.short_window, self.device)
        attend = partial(attention.causal_attention, backends=backends, block_mask=block_mask)
        inputs = (idx, *self.rotary(T))
        if not is_compiled:
            return self.trunk(*inputs, attend=attend)
        # An evaluation takes training's graph too, as one of its own would have to be compiled first. Not in 8 bits: in
        # these only training computes.
        copy = self.h[0].mlp.c_fc.copy
        is_narrow = copy is not None and copy.scale is not None
        with torch.set_grad_enabled(torch.is_grad_enabled() or not is_narrow):
            hidden = self._compiled_trunk(*inputs, attend=attend)
        return hidden if torch.is_grad_enabled() else hidden.detach()

    def compile_trunk(self) -> None:
        """Compile `trunk` for the shape of training's batches."""
        self._compiled_trunk = torch.compile(self.trunk, dynamic=False)

    def recompute_mlps(self) -> None:
        """From now on, keep of each MLP only its input, and make the rest again in backward: half of what backward
        needs of a layer, for a ninth more work in its matrix products. Call before `compile_trunk`."""
        for block in self.h:
            block.recomputes_mlp = True

    def choose_attention(self, wanted: str = "") -> str:
        """Use the attention backend `wanted` ("": the fastest that fits) for training's batches; call it after
        `compile_trunk`. Returns the choice in words. Raises `UserError` when it does not fit."""
        self._attention, T = wanted, self.config.sequence_len
        windows = {self.config.window(layer) for layer in range(self.config.n_layer)} - {None}
        return self._backends(T, self._compiled_trunk is not None, wanted).in_words(max(windows, default=None))

    def _backends(self, length: int, is_compiled: bool, wanted: str) -> attention.Backends:
        return attention.choose_backends(
            self.device, self.compute_dtype, self.config.head_dim, length, is_compiled=is_compiled, wanted=wanted
        )

    def trunk(
        self, idx: Tensor, cos: Tensor, sin: Tensor, *, previous: Tensor | None = None,
        attend: Attend = attention.causal_attention, asking: Places | None = None,
    ) -> Tensor:  # fmt: skip
        """`hidden`, given cos and sin of the rotary angles: one graph for `torch.compile`.

        The other arguments serve scoring, where a row may hold several texts with a common beginning (`scoring.py`).
        previous: (B, T) int64, the place of the token before each one; None: it is the place to the left. asking: the
        places whose hidden states (B, Q, C) are wanted, None for all; the last layer calls `attend` with the queries of
        these places only, and with the argument `asking`.
        """
        config = self.config
        x = norm(self.wte(idx).to(self.compute_dtype))  # (B, T, C)
        if config.smear:
            x = self._smeared(x, previous)
        value_embeds = iter(())
        if config.value_embeds:
            value_embeds = iter(self.value_embeds(idx).to(x.dtype).split(config.kv_dim, dim=-1))
        x0, middle = x, x
        for layer, block in enumerate(self.h):
            if config.residual_scalars:
                x = self.resid_lambdas[layer].to(x.dtype) * x + self.x0_lambdas[layer].to(x.dtype) * x0
            if layer == config.n_layer // 2:
                middle = x
            value_embed = next(value_embeds) if config.has_value_embed(layer) else None
            x = block(x, (cos, sin), value_embed, attend, asking if layer == config.n_layer - 1 else None)
        if config.backout:
            x = x - self.backout_lambda.to(x.dtype) * (middle if asking is None else middle[asking])
        return norm(x)

    def _smeared(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """x (B, T, C), each plus a gated share of the one before it, which is to its left or at `previous` (B, T)."""
        gate = torch.sigmoid(x[:, 1:, :SMEAR_CHANNELS] @ self.smear_gate.to(x.dtype))  # (B, T - 1)
        share = (self.smear_lambda.to(x.dtype) * gate).unsqueeze(-1)
        if previous is None:
            before = x[:, :-1]
        else:
            before = x[torch.arange(x.size(0), device=x.device).unsqueeze(1), previous[:, 1:]]
        return torch.cat((x[:, :1], torch.addcmul(x[:, 1:], share, before)), dim=1)

    # --- counts ---

    def parameter_counts(self) -> dict[str, int]:
        """Parameters by kind, padding included: the blocks' matrices, head, wte, value_embeds, scalars, total."""
        parts = {"matrices": self.h, "head": self.lm_head, "wte": self.wte, "value_embeds": self.value_embeds}
        counts = {name: sum(p.numel() for p in part.parameters()) if part else 0 for name, part in parts.items()}
        total = sum(p.numel() for p in self.parameters())
        return {**counts, "scalars": total - sum(counts.values()), "total": total}

    def flops_per_token(self, sequence_len: int | None = None) -> float:
        """Floating point operations of forward and backward per token, for rows of `sequence_len` tokens.

        Six per matrix and head weight (a multiplication and an addition in forward, two of each in backward), and
        twelve per channel and visible position for attention, counting only what causal mask and window leave visible.
        """
        T = sequence_len or self.config.sequence_len
        weights = sum(p.numel() for p in self.h.parameters()) + self.config.vocab_size * self.config.n_embd
        windows = [min(self.config.window(layer) or T, T) for layer in range(self.config.n_layer)]
        visible = sum(w * (w + 1) / 2 + (T - w) * w for w in windows) / T  # per token, summed over layers
        return 6.0 * weights + 12.0 * visible * self.config.n_embd


def build_model(
    config: GPTConfig, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32,
    generator: torch.Generator | None = None,
) -> GPT:  # fmt: skip
    """A model on `device`, its weights drawn from `generator` (on that device); without one they are uninitialised.

    On a GPU that computes in bfloat16 the embedding tables have that dtype too: they are looked up, not multiplied.
    """
    with torch.device(device):  # not by way of the meta device: to leave it, PyTorch imports much of its compiler
        model = GPT(config, compute_dtype=compute_dtype)
    if torch.device(device).type == "cuda" and compute_dtype == torch.bfloat16:
        for table in (model.wte, model.value_embeds):
            if table is not None:
                table.to(torch.bfloat16)
    if generator is not None:
        model.init_weights(generator)
    return model
