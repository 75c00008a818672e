"""The model of a checkpoint: its weights in a `GPT` built from its config, together with its own tokenizer.

This joins two files that do not know each other: the model, and the format of checkpoints (`nanochat/checkpoint.py`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint import find_checkpoint, load_tensors, load_tokenizer, read_meta, stage_of
from nanochat.common import Runtime, UserError, from_rank0
from nanochat.model.gpt import GPT, GPTConfig, build_model
from nanochat.tokenizer import Tokenizer


@dataclass(frozen=True)
class LoadedModel:
    model: GPT
    tokenizer: Tokenizer
    meta: dict
    folder: Path

    @property
    def source(self) -> str:
        """The stage that the model is of."""
        return stage_of(self.folder)


def load_model(source: str, runtime: Runtime, *, model_tag: str = "", step: int | None = None) -> LoadedModel:
    """The model that `find_checkpoint` chooses, with its tokenizer, in eval mode. Raises `UserError` if there is none
    or it is damaged."""
    folder = from_rank0(find_checkpoint(source, model_tag=model_tag, step=step))  # a new one may appear meanwhile
    meta = read_meta(folder)
    model = load_weights(folder, meta, runtime).eval().requires_grad_(False)
    return LoadedModel(model, load_tokenizer(folder, meta), meta, folder)


def load_weights(folder: Path, meta: Mapping, runtime: Runtime) -> GPT:
    """The model of a checkpoint on the runtime's device, in its compute dtype. Raises `UserError` if it is damaged."""
    model = build_model(read_config(folder, meta), device=runtime.device, compute_dtype=runtime.dtype)
    state = load_tensors(folder / "model.safetensors", str(runtime.device))
    try:
        model.load_state_dict(state, strict=True)
    except RuntimeError as error:
        raise UserError(f"the weights in {folder} do not fit their config: {error}") from error
    return model


def read_config(folder: Path, meta: Mapping) -> GPTConfig:
    try:
        return GPTConfig(**meta["config"])
    except TypeError as error:
        raise UserError(f"checkpoint {folder} has a model config this version does not know: {error}") from error
