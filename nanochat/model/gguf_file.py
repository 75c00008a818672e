"""A model of the October 2025 architecture as a GGUF file, the format of llama.cpp.

llama.cpp itself has no such architecture; forks of it do, under the name "nanochat". They take llama.cpp's usual names
for tensors and settings, and know the rest from that name: norms without weights, the sign of the rotary angles, order
of rotation and QK-norm, split pattern. 16 bits means bfloat16: the squares in the MLP leave the range of float16.

Not here: quantization (such a fork's `llama-quantize`), other architectures (a `UserError` names what they have more).
"""

import os
from pathlib import Path

import torch
from torch import Tensor

import rustbpe
from nanochat.common import UserError, disk_errors
from nanochat.model.gpt import GPT, NORM_EPS
from nanochat.model.hf import chat_template, check_plain, check_tokenizer, prepare_folder
from nanochat.model.hf_tokenizer import as_characters, derive_merges
from nanochat.tokenizer import NUM_BYTES, Tokenizer

NAME = "nanochat"  # of the architecture, and of the split pattern with groups of up to two digits
LICENSE = "mit"  # as the model card has it
FILES = {torch.bfloat16: "model-bf16.gguf", torch.float32: "model-f32.gguf"}
LAYER_TENSORS = {  # ours within a layer: theirs
    "attn.c_q": "attn_q", "attn.c_k": "attn_k", "attn.c_v": "attn_v", "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down",
}  # fmt: skip


def save_gguf(
    model: GPT, tokenizer: Tokenizer, folder: Path, *, title: str, dtype: torch.dtype = torch.bfloat16
) -> dict[str, str]:
    """Write `model`, called `title`, its weights in `dtype`, and `tokenizer` to a file in `folder`, which is new or
    empty. Returns the file, with a few words on it. Raises `UserError` when the package gguf is missing, there is no
    counterpart of model or tokenizer, or the folder cannot be written or is not empty."""
    try:
        import gguf
    except ImportError as error:
        raise UserError(f"a GGUF file needs the package gguf ({error}): pip install gguf") from error

    check_plain(model.config, "GGUF's nanochat")
    check_tokenizer(model, tokenizer)
    settings = _tokenizer_settings(tokenizer)
    prepare_folder(folder)
    path = folder / FILES[dtype]
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    kind = gguf.GGMLQuantizationType.BF16 if dtype == torch.bfloat16 else gguf.GGMLQuantizationType.F32
    file_type = gguf.LlamaFileType.MOSTLY_BF16 if dtype == torch.bfloat16 else gguf.LlamaFileType.ALL_F32
    writer = gguf.GGUFWriter(partial, NAME)
    settings |= {"type": "model", "name": title, "license": LICENSE, "file_type": file_type, **_model_settings(model)}
    for setting, value in settings.items():
        getattr(writer, f"add_{setting}")(value)
    for name, weight in their_tensors(model).items():
        data = weight.detach().to("cpu", dtype).contiguous()
        writer.add_tensor(name, data.view(torch.uint8).numpy(), raw_dtype=kind)
    try:
        with disk_errors("the model", path):
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
            writer.close()
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return {path.name: "weights, shape, vocabulary and chat template for forks of llama.cpp that have nanochat"}


def their_tensors(model: GPT) -> dict[str, Tensor]:
    """The model's parameters, or views of them, by their names there: the tables come without their padded rows."""
    V = model.config.vocab_size
    tensors = {"token_embd.weight": model.wte.weight[:V], "output.weight": model.lm_head.weight[:V]}
    for layer, block in enumerate(model.h):
        for ours, theirs in LAYER_TENSORS.items():
            tensors[f"blk.{layer}.{theirs}.weight"] = block.get_submodule(ours).weight
    return tensors


def _model_settings(model: GPT) -> dict[str, int | float]:
    """The model's shape, by the names that the package gguf has for it."""
    config = model.config
    return {
        "vocab_size": config.vocab_size, "context_length": config.sequence_len, "embedding_length": config.n_embd,
        "block_count": config.n_layer, "feed_forward_length": 4 * config.n_embd, "head_count": config.n_head,
        "head_count_kv": config.n_kv_head, "key_length": config.head_dim, "value_length": config.head_dim,
        "rope_dimension_count": config.head_dim, "rope_freq_base": config.rope_base,
        "layer_norm_rms_eps": NORM_EPS, "final_logit_softcapping": config.softcap,
    }  # fmt: skip


def _tokenizer_settings(tokenizer: Tokenizer) -> dict[str, object]:
    """The vocabulary, by the names that the package gguf has for its parts. Raises `UserError` where a program that
    joins by merges, and splits text by a pattern that it knows by name, would find other ids than we do."""
    special = tokenizer.special_ids
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size - len(special))]
    merges = derive_merges(tokens)
    if tokenizer.pattern != rustbpe.split_pattern(2):
        raise UserError("GGUF has no name for the tokenizer's split pattern, only for that with groups of two digits")
    if len(merges) < len(tokens) - NUM_BYTES:
        raise UserError("GGUF has no counterpart of the tokenizer: merges alone do not reach some of its tokens")
    end = tokenizer.special_id("<|assistant_end|>")
    normal, control = 1, 3  # of gguf.TokenType
    return {
        "tokenizer_model": "gpt2", "tokenizer_pre": NAME, "token_list": [*map(as_characters, tokens), *special],
        "token_types": [normal] * len(tokens) + [control] * len(special),
        "token_merges": [f"{as_characters(left)} {as_characters(right)}" for left, right in merges],
        "bos_token_id": tokenizer.bos_id, "eos_token_id": end, "eot_token_id": end, "pad_token_id": end,
        "add_bos_token": True, "chat_template": chat_template(tokenizer),
    }  # fmt: skip
