import sys

import numpy as np
import pytest
import torch
from conftest import random_model

import rustbpe
from nanochat.common import UserError
from nanochat.model.gguf_file import save_gguf
from nanochat.model.gpt import NORM_EPS, GPTConfig, build_model
from nanochat.model.hf import chat_template
from nanochat.model.hf_tokenizer import tokenizer_spec
from nanochat.tokenizer import Tokenizer

gguf = pytest.importorskip("gguf")


@pytest.fixture
def model(tokenizer):
    shape = {"sequence_len": 48, "head_dim": 64, "kv_ratio": 3}
    return random_model(GPTConfig.october_2025(3, vocab_size=tokenizer.vocab_size, **shape))


def settings_of(reader):
    return {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}


@pytest.mark.parametrize(("dtype", "name"), [(torch.bfloat16, "model-bf16.gguf"), (torch.float32, "model-f32.gguf")])
def test_tensors_read_back_equal(model, tokenizer, tmp_path, dtype, name):
    assert set(save_gguf(model, tokenizer, tmp_path, title="d3", dtype=dtype)) == {name}
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(tmp_path / name).tensors}
    ours = {"token_embd": model.wte.weight[:400], "output": model.lm_head.weight[:400]}
    for layer, block in enumerate(model.h):
        for part, weights in (("attn", block.attn), ("ffn", block.mlp)):
            names = (
                {"c_q": "q", "c_k": "k", "c_v": "v", "c_proj": "output"}
                if part == "attn"
                else {"c_fc": "up", "c_proj": "down"}
            )
            ours |= {f"blk.{layer}.{part}_{theirs}": getattr(weights, name).weight for name, theirs in names.items()}
    assert set(tensors) == {f"{name}.weight" for name in ours}
    for name, weight in ours.items():
        read = tensors[f"{name}.weight"]
        assert read.tensor_type.name == {torch.bfloat16: "BF16", torch.float32: "F32"}[dtype]
        assert tuple(read.shape) == tuple(weight.shape)[::-1]  # they count dimensions from the innermost one
        values = torch.from_numpy(np.array(read.data)).view(dtype).view(weight.shape)
        assert torch.equal(values, weight.to(dtype)), name


def test_settings_are_complete(model, tokenizer, tmp_path):
    save_gguf(model, tokenizer, tmp_path, title="my model")
    settings = settings_of(gguf.GGUFReader(tmp_path / "model-bf16.gguf"))
    spec = tokenizer_spec(tokenizer)["model"]
    end = tokenizer.special_id("<|assistant_end|>")
    assert settings.pop("tokenizer.ggml.tokens") == [*spec["vocab"], *tokenizer.special_ids]
    assert settings.pop("tokenizer.ggml.merges") == [" ".join(pair) for pair in spec["merges"]]
    assert settings.pop("tokenizer.ggml.token_type") == [1] * 391 + [3] * 9
    assert settings.pop("tokenizer.chat_template") == chat_template(tokenizer)
    assert settings.pop("nanochat.attention.layer_norm_rms_epsilon") == pytest.approx(NORM_EPS)
    assert settings == {
        "general.architecture": "nanochat", "general.type": "model", "general.name": "my model",
        "general.license": "mit", "general.file_type": gguf.LlamaFileType.MOSTLY_BF16,
        "nanochat.vocab_size": 400, "nanochat.context_length": 48, "nanochat.embedding_length": 192,
        "nanochat.block_count": 3, "nanochat.feed_forward_length": 768, "nanochat.attention.head_count": 3,
        "nanochat.attention.head_count_kv": 1, "nanochat.attention.key_length": 64,
        "nanochat.attention.value_length": 64, "nanochat.rope.dimension_count": 64,
        "nanochat.rope.freq_base": 10_000.0, "nanochat.final_logit_softcapping": 15.0,
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "nanochat", "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.bos_token_id": tokenizer.bos_id, "tokenizer.ggml.eos_token_id": end,
        "tokenizer.ggml.eot_token_id": end, "tokenizer.ggml.padding_token_id": end,
    }  # fmt: skip


def test_the_package_names_every_tensor_so(model):
    """The names are llama.cpp's own: those that the package has for a layer's parts."""
    names = {f"blk.0.{name}" for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_up", "ffn_down")}
    known = {name.format(bid=0) for name in gguf.TENSOR_NAMES.values()}
    assert names | {"token_embd", "output"} <= known


def test_what_the_format_has_no_counterpart_of_is_refused(model, tokenizer, texts, tmp_path, monkeypatch):
    recipe = build_model(GPTConfig.from_depth(3, vocab_size=400, head_dim=64), device="meta")
    digits = Tokenizer.train(texts, 400, pattern=rustbpe.split_pattern(3))
    unreached = Tokenizer([bytes([i]) for i in range(256)] + [b"x%03d" % i for i in range(135)], tokenizer.pattern)
    (tmp_path / "file").write_text("")
    for odd_model, odd_tokenizer, folder, fault in (
        (recipe, tokenizer, "a", "no counterpart in GGUF's nanochat: it has .*smear"), (model, digits, "a", "digits"),
        (model, unreached, "a", "do not reach some"), (model, tokenizer, "", "holds file"),
        (model, tokenizer, "file", "cannot write the model"), (model, Tokenizer.train(texts, 300), "a", "300 ids"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=fault):
            save_gguf(odd_model, odd_tokenizer, tmp_path / folder, title="")
    assert not (tmp_path / "a").exists()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match=r"needs the package gguf .*: pip install gguf"):
        save_gguf(model, tokenizer, tmp_path / "a", title="")
