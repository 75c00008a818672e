"""The configuration of a nanochat model that brings its own code (`modeling_nanochat.py`), for transformers.

This file and that one are copied into the exported folder; they import nothing of nanochat.
"""

from transformers import PretrainedConfig

FULL, SLIDING = "full_attention", "sliding_attention"


class NanoChatRecipeConfig(PretrainedConfig):
    """What fixes the shape and the function of a model.

    window_pattern: a letter for each layer, repeated as often as needed: S sees the last `sliding_window` positions,
    its own included, L all; the last layer is always L. qk_scale: queries and keys are multiplied by it after their
    norm. value_embeds: whether every second layer, the last one included, adds an embedding of the token to its values.
    residual_scalars: whether each layer has a factor for the residual stream and one for its start. smear: whether each
    token's embedding gets a gated share of the one before it. backout: whether a share of the residual stream at half
    depth is subtracted at the end. Raises `ValueError` where this does not fit together.
    """

    model_type = "nanochat_recipe"
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012 (transformers' own form)

    def __init__(
        self,
        vocab_size: int = 32768,
        hidden_size: int = 768,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 6,
        num_key_value_heads: int = 6,
        max_position_embeddings: int = 2048,
        window_pattern: str = "SSSL",
        sliding_window: int = 512,
        rope_theta: float = 100_000.0,
        qk_scale: float = 1.2,
        final_logit_softcapping: float = 15.0,
        value_embeds: bool = True,
        residual_scalars: bool = True,
        smear: bool = True,
        backout: bool = True,
        use_cache: bool = True,
        **kwargs,
    ):
        if hidden_size % num_attention_heads or num_attention_heads % num_key_value_heads:
            sizes = f"{hidden_size}, {num_attention_heads}, {num_key_value_heads}"
            raise ValueError(f"hidden_size, num_attention_heads, num_key_value_heads must divide: {sizes}")
        if not window_pattern or set(window_pattern) - set("SL"):
            raise ValueError(f"window_pattern must consist of the letters S and L, not {window_pattern!r}")
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.max_position_embeddings = max_position_embeddings
        self.window_pattern = window_pattern
        self.sliding_window = sliding_window
        self.rope_theta = rope_theta
        self.qk_scale = qk_scale
        self.final_logit_softcapping = final_logit_softcapping
        self.value_embeds = value_embeds
        self.residual_scalars = residual_scalars
        self.smear = smear
        self.backout = backout
        self.use_cache = use_cache
        super().__init__(**{"tie_word_embeddings": False, **kwargs})

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """What each layer sees; transformers' cache keeps no more than that."""
        last = self.num_hidden_layers - 1
        letters = (self.window_pattern[layer % len(self.window_pattern)] for layer in range(last + 1))
        return [SLIDING if letter == "S" and layer < last else FULL for layer, letter in enumerate(letters)]

    def has_value_embed(self, layer: int) -> bool:
        return self.value_embeds and layer % 2 == (self.num_hidden_layers - 1) % 2
