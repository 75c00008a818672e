"""What a pass of the engine must read and compute, and the time that takes at a device's peak: arithmetic alone.

Shapes follow from the config (see `nanochat/model/gpt.py`): C channels, V vocabulary.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat import hardware
from nanochat.model.gpt import GPTConfig

ARCHITECTURES = {"october": GPTConfig.october_2025, "recipe": GPTConfig.from_depth}


@dataclass(frozen=True)
class Form:
    """In which an engine keeps its numbers: the bytes of a weight of the matrices, and of all others (table rows, keys,
    values). Weights of one byte have a step of two bytes for each output."""

    weight_bytes: int
    other_bytes: int


def matrices(config: GPTConfig, layer: int) -> list[tuple[int, int]]:
    """Outputs and inputs of each matrix of a layer: q, k, v (with the value gate), the attention's output, the MLP."""
    C, gates = config.n_embd, config.n_kv_head * config.has_value_embed(layer)
    return [(C + 2 * config.kv_dim + gates, C), (C, C), (4 * C, C), (C, 4 * C)]


def visible(config: GPTConfig, num_keys: float) -> list[float]:
    """How many positions each layer sees, its own included, when `num_keys` are there."""
    return [min(config.window(layer) or num_keys, num_keys) for layer in range(config.n_layer)]


def decode_bytes(config: GPTConfig, form: Form, num_rows: int, num_keys: float) -> float:
    """Bytes that a decode step of `num_rows` must move, each row with `num_keys` positions, the new one included: all
    matrices and the head once, of each table a row (two where smear adds the token before), keys and values."""
    C = config.n_embd
    every = [shape for layer in range(config.n_layer) for shape in matrices(config, layer)] + [(config.vocab_size, C)]
    steps = 2 * sum(outputs for outputs, _ in every) if form.weight_bytes == 1 else 0
    weights = sum(outputs * inputs for outputs, inputs in every) * form.weight_bytes + steps
    looked_up = C * (2 if config.smear else 1) + config.num_value_embeds * config.kv_dim
    attended = 2 * config.kv_dim * sum(visible(config, num_keys))
    return weights + num_rows * (looked_up + attended) * form.other_bytes


def prefill_flops(config: GPTConfig, length: int) -> float:
    """Operations that reading a prompt of `length` tokens takes: two for each weight and token, four for each channel
    and visible position, and the head for the last token."""
    C = config.n_embd
    weights = sum(outputs * inputs for layer in range(config.n_layer) for outputs, inputs in matrices(config, layer))
    pairs = sum(reach * (reach + 1) / 2 + (length - reach) * reach for reach in visible(config, length))
    return 2.0 * weights * length + 4.0 * C * pairs + 2.0 * C * config.vocab_size


def share(amount_per_second: float, peak: float | None) -> float | None:
    """Of `peak`; None where that is not known."""
    return None if peak is None else amount_per_second / peak


def peaks(device_name: str, dtype: object) -> tuple[float | None, float | None]:
    """Bytes and FLOP per second of a device at most; None where they are not known."""
    return hardware.peak_bandwidth(device_name), hardware.peak_flops(device_name, dtype)


def shown(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
