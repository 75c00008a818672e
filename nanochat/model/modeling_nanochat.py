"""A nanochat model for transformers: what `AutoModelForCausalLM.from_pretrained(..., trust_remote_code=True)` loads.

Beyond the architecture that transformers calls NanoChat it has value embeddings, learned scalars on the residual stream
and on its start x0, smear, backout, sliding windows and scaled QK-norm. RMSNorm has no gain, nothing has a bias.

Shapes: B batch, T new tokens, K with those in the cache, C channels, H heads, H_kv key heads, D head size, V ids.

The cache is a `DynamicCache`. Beside a layer for each of the model's it holds one of token ids in place of keys: smear
needs the token before the first new one. Rows of a batch may be padded on either side, with an `attention_mask`.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_nanochat import SLIDING, NanoChatRecipeConfig

NORM_EPS = torch.finfo(torch.float32).eps
SMEAR_CHANNELS = 24  # channels that the smear's gate reads
VALUE_GATE_CHANNELS = 12  # channels that the gate of the value embeddings reads
VALUE_GATE_SCALE = 3.0
# what transformers calls the cache in a model's arguments and results: before 5.24 "past_key_values"
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


def norm(x: Tensor) -> Tensor:
    """RMSNorm over the last dimension, without a gain."""
    return F.rms_norm(x, (x.size(-1),), eps=NORM_EPS)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions on the two halves of the head. x (B, H, T, D); cos, sin (B or 1, 1, T, D / 2)."""
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((x1 * cos + x2 * sin, x2 * cos - x1 * sin), dim=-1)


def visible_keys(q: Tensor, num_keys: int, past: int, window: int | None, padding: Tensor | None) -> Tensor | None:
    """Which of the last `num_keys` keys each of the new tokens, queries q (B, H, T, D) after `past` others, sees:
    (B or 1, 1, T, num_keys) bool, or None where all that came before. padding (B, K): 0 where a row has no token; such
    a place is seen by itself alone, so that no row of the mask is empty."""
    T, device = q.size(2), q.device
    reaches_all = window is None or num_keys <= window
    if padding is None and reaches_all and (T == 1 or num_keys == T):
        return None
    keys = torch.arange(past + T - num_keys, past + T, device=device)
    distance = torch.arange(past, past + T, device=device)[:, None] - keys
    visible = distance >= 0 if reaches_all else (distance >= 0) & (distance < window)
    if padding is None:
        return visible[None, None]
    return visible & padding[:, None, None, -num_keys:].to(device).bool() | (distance == 0)


class Attention(nn.Module):
    def __init__(self, config: NanoChatRecipeConfig, layer: int):
        super().__init__()
        self.layer, self.head_dim, self.qk_scale = layer, config.head_dim, config.qk_scale
        self.window = config.sliding_window if config.layer_types[layer] == SLIDING else None
        C, kv_dim = config.hidden_size, config.num_key_value_heads * config.head_dim
        self.c_q = nn.Linear(C, C, bias=False)
        self.c_k = nn.Linear(C, kv_dim, bias=False)
        self.c_v = nn.Linear(C, kv_dim, bias=False)
        self.c_proj = nn.Linear(C, C, bias=False)
        gate = nn.Linear(VALUE_GATE_CHANNELS, config.num_key_value_heads, bias=False)
        self.value_gate = gate if config.has_value_embed(layer) else None

    def forward(self, x: Tensor, rotary, value_embed: Tensor | None, cache: DynamicCache | None, past: int, padding):
        """x (B, T, C); rotary: cos and sin; value_embed (B, T, H_kv * D) or None; the rest as for `visible_keys`."""
        heads = (-1, self.head_dim)
        q, k, v = (layer(x).unflatten(-1, heads) for layer in (self.c_q, self.c_k, self.c_v))
        if self.value_gate is not None:
            gate = VALUE_GATE_SCALE * torch.sigmoid(self.value_gate(x[..., :VALUE_GATE_CHANNELS]))  # (B, T, H_kv)
            v = torch.addcmul(v, gate.unsqueeze(-1), value_embed.unflatten(-1, heads))
        q, k, v = (part.transpose(1, 2) for part in (q, k, v))  # (B, H, T, D)
        q, k = norm(rotate(q, *rotary)) * self.qk_scale**2, norm(rotate(k, *rotary))
        if cache is not None:
            k, v = cache.update(k, v, self.layer)
        mask = visible_keys(q, k.size(2), past, self.window, padding)
        is_causal, is_grouped = mask is None and q.size(2) > 1, q.size(1) != k.size(1)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=is_grouped)
        return self.c_proj(y.transpose(1, 2).flatten(-2))


class MLP(nn.Module):
    def __init__(self, config: NanoChatRecipeConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.hidden_size, 4 * config.hidden_size, bias=False)
        self.c_proj = nn.Linear(4 * config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.c_proj(F.relu(self.c_fc(norm(x))).square())


class Block(nn.Module):
    def __init__(self, config: NanoChatRecipeConfig, layer: int):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rotary, value_embed, cache, past, padding) -> Tensor:
        x = x + self.attn(norm(x), rotary, value_embed, cache, past, padding)
        return x + self.mlp(x)


class NanoChatRecipePreTrainedModel(PreTrainedModel):
    config_class = NanoChatRecipeConfig
    base_model_prefix = "transformer"
    _no_split_modules = ["Block"]  # noqa: RUF012 (transformers' own form)
    _skip_keys_device_placement = "cache"
    _supports_sdpa = True


class NanoChatRecipeModel(NanoChatRecipePreTrainedModel):
    """The model without its head."""

    def __init__(self, config: NanoChatRecipeConfig):
        super().__init__(config)
        n_layer, kv_dim = config.num_hidden_layers, config.num_key_value_heads * config.head_dim
        num_value_embeds = sum(map(config.has_value_embed, range(n_layer)))
        self.wte = nn.Embedding(config.vocab_size, config.hidden_size)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(n_layer))
        # of all layers side by side
        self.value_embeds = nn.Embedding(config.vocab_size, num_value_embeds * kv_dim) if config.value_embeds else None
        self.resid_lambdas = nn.Parameter(torch.ones(n_layer)) if config.residual_scalars else None
        self.x0_lambdas = nn.Parameter(torch.zeros(n_layer)) if config.residual_scalars else None
        self.smear_gate = nn.Parameter(torch.zeros(SMEAR_CHANNELS)) if config.smear else None
        self.smear_lambda = nn.Parameter(torch.zeros(1)) if config.smear else None
        self.backout_lambda = nn.Parameter(torch.zeros(1)) if config.backout else None
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.wte

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        self.wte = value

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, position_ids: Tensor | None = None,
        cache: DynamicCache | None = None, use_cache: bool | None = None, output_hidden_states: bool | None = None,
        past_key_values: DynamicCache | None = None,
    ) -> BaseModelOutputWithPast:  # fmt: skip
        """Final normed hidden states (B, T, C) of input_ids (B, T); attention_mask (B, K), 0 where there is no token.
        On request also what each layer got, and these. Raises `ValueError` for another kind of mask or cache."""
        config, T, n_layer = self.config, input_ids.size(1), self.config.num_hidden_layers
        cache = past_key_values if cache is None else cache
        if cache is None and (config.use_cache and not self.training if use_cache is None else use_cache):
            cache = DynamicCache(config=config)
        if cache is not None and not isinstance(cache, DynamicCache):
            raise ValueError(f"the cache must be a DynamicCache, not {type(cache).__name__}: no cache_implementation")
        past = 0 if cache is None else cache.get_seq_length()
        mask = attention_mask
        if mask is not None and mask.shape != (input_ids.size(0), past + T):
            raise ValueError(f"attention_mask must be ({input_ids.size(0)}, {past + T}), not {tuple(mask.shape)}")
        padding = None if mask is None or mask.all() else mask
        if position_ids is None:
            position_ids = torch.arange(past, past + T, device=input_ids.device)[None]
            if padding is not None:
                position_ids = (padding.cumsum(-1) - 1).clamp(min=0)[:, -T:]

        x = norm(self.wte(input_ids))  # (B, T, C)
        if config.smear:
            x = self._smeared(x, input_ids, cache, padding)
        value_embeds = [None] * n_layer
        if config.value_embeds:
            layers = [layer for layer in range(n_layer) if config.has_value_embed(layer)]
            for layer, part in zip(layers, self.value_embeds(input_ids).chunk(len(layers), dim=-1), strict=True):
                value_embeds[layer] = part
        rotary = self._rotary(position_ids, x.dtype)
        x0, middle, states = x, x, []
        for layer, block in enumerate(self.h):
            if config.residual_scalars:
                x = self.resid_lambdas[layer].to(x.dtype) * x + self.x0_lambdas[layer].to(x.dtype) * x0
            if layer == n_layer // 2:
                middle = x
            states.append(x)
            x = block(x, rotary, value_embeds[layer], cache, past, padding)
        if config.backout:
            x = x - self.backout_lambda.to(x.dtype) * middle
        x = norm(x)
        states = (*states, x) if output_hidden_states else None
        return BaseModelOutputWithPast(last_hidden_state=x, hidden_states=states, **{CACHE: cache})

    def _rotary(self, position_ids: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin of the angles at position_ids (B or 1, T): (B or 1, 1, T, D / 2)."""
        D = self.config.head_dim
        pairs = torch.arange(0, D, 2, dtype=torch.float32, device=position_ids.device)
        angles = position_ids[:, None, :, None].float() * self.config.rope_theta ** (-pairs / D)
        return angles.cos().to(dtype), angles.sin().to(dtype)

    def _smeared(self, x: Tensor, input_ids: Tensor, cache: DynamicCache | None, padding: Tensor | None) -> Tensor:
        """x (B, T, C), each plus a gated share of the embedding of the token before it, where there is one."""
        T, ids = input_ids.size(1), input_ids
        if cache is not None:
            while len(cache.layers) <= self.config.num_hidden_layers:
                cache.layers.append(DynamicLayer())
            as_keys = ids[:, None, :, None]  # (B, 1, T, 1)
            ids = cache.update(as_keys, as_keys, self.config.num_hidden_layers)[0][:, 0, :, 0]  # (B, K)
        is_token = torch.ones_like(ids) if padding is None else padding
        before, has_before = (F.pad(row, (1, 0))[:, -T - 1 : -1] for row in (ids, is_token))  # (B, T)
        gate = torch.sigmoid(x[..., :SMEAR_CHANNELS] @ self.smear_gate.to(x.dtype))
        share = self.smear_lambda.to(x.dtype) * gate * has_before
        return torch.addcmul(x, share.unsqueeze(-1), norm(self.wte(before)))


class NanoChatRecipeForCausalLM(NanoChatRecipePreTrainedModel, GenerationMixin):
    """The model with its head."""

    def __init__(self, config: NanoChatRecipeConfig):
        super().__init__(config)
        self.transformer = NanoChatRecipeModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None, cache: DynamicCache | None = None, labels: Tensor | None = None,
        use_cache: bool | None = None, output_hidden_states: bool | None = None, output_attentions: bool | None = None,
        logits_to_keep: int = 0, return_dict: bool | None = None, inputs_embeds: None = None,
        past_key_values: DynamicCache | None = None, **kwargs,
    ) -> CausalLMOutputWithPast:  # fmt: skip
        """Logits (B, T, V) float32 of input_ids (B, T) int64, or of the last `logits_to_keep` of them if that is not 0;
        with labels (B, T), -100 where none is meant, the loss too. Raises `ValueError` for what the model cannot do."""
        if input_ids is None or inputs_embeds is not None:
            raise ValueError("nanochat needs input_ids: its value embeddings and smear look tokens up by id")
        if output_attentions:
            raise ValueError("nanochat's attention does not give out its weights; leave output_attentions out")
        cache = past_key_values if cache is None else cache
        outputs = self.transformer(input_ids, attention_mask, position_ids, cache, use_cache, output_hidden_states)
        softcap = self.config.final_logit_softcapping
        logits = self.lm_head(outputs.last_hidden_state[:, -logits_to_keep:]).float()
        logits = softcap * torch.tanh(logits / softcap)
        loss = None if labels is None else self.loss_function(logits, labels, self.config.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss, logits=logits, hidden_states=outputs.hidden_states, **{CACHE: outputs.get(CACHE)}
        )
        return result.to_tuple() if return_dict is False else result
