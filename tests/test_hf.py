import json
import sys
from argparse import Namespace
from dataclasses import replace

import pytest
import torch
from conftest import fill_randomly
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nanochat.checkpoint import run_dir, save_checkpoint
from nanochat.common import Runtime, UserError
from nanochat.model import hf
from nanochat.model.gpt import NORM_EPS, GPTConfig, build_model
from nanochat.model.hf import load_hf, save_hf
from nanochat.tokenizer import Tokenizer
from scripts import export_hf

pytestmark = pytest.mark.usefixtures("code_folder")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

BYTES = [bytes([byte]) for byte in range(256)]
any_unicode = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
ARCHITECTURES = {"october": GPTConfig.october_2025, "recipe": GPTConfig.from_depth}


def random_model(config):
    model = build_model(config, generator=torch.Generator().manual_seed(0))
    fill_randomly(model, scale=1.0)
    return model


@pytest.fixture
def architecture():
    return "october"


either_architecture = pytest.mark.parametrize("architecture", ARCHITECTURES)


@pytest.fixture
def config(tokenizer, architecture):
    return ARCHITECTURES[architecture](3, vocab_size=tokenizer.vocab_size, sequence_len=48, head_dim=32)


@pytest.fixture
def model(config):
    return random_model(config)


@pytest.fixture
def folder(model, tokenizer, tmp_path):
    save_hf(model, tokenizer, tmp_path / "saved")
    return tmp_path / "saved"


def change_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def draw_idx(config, rows=2, length=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (rows, length or config.sequence_len), generator=generator)


def assert_same_function(model, other):
    idx = draw_idx(model.config)
    assert model.config == other.config
    assert torch.equal(model(idx), other(idx))


@pytest.mark.parametrize(("architecture", "for_mlx"), [("october", False), ("october", True), ("recipe", False)])
def test_saving_and_loading_is_the_identity(model, tokenizer, tmp_path, architecture, for_mlx):
    folder = tmp_path / "saved"
    files = save_hf(model, tokenizer, folder, for_mlx=for_mlx)
    loaded, loaded_tokenizer = load_hf(folder)
    assert {path.name for path in folder.iterdir()} == set(files)
    assert set(files) == FILES | (set(hf.CODE_FILES) if architecture == "recipe" else set())
    assert not any(str(tmp_path).encode() in path.read_bytes() for path in folder.iterdir())  # nothing of the machine
    assert loaded.config == model.config
    assert loaded_tokenizer.fingerprint == tokenizer.fingerprint
    V = model.config.vocab_size
    for (name, ours), theirs in zip(model.named_parameters(), loaded.parameters(), strict=True):
        rows = slice(V) if name in ("wte.weight", "lm_head.weight", "value_embeds.weight") else slice(None)
        assert torch.equal(ours[rows], theirs[rows]), name
    save_hf(loaded, loaded_tokenizer, tmp_path / "again", for_mlx=for_mlx)
    for name in files:
        assert (folder / name).read_bytes() == (tmp_path / "again" / name).read_bytes(), name


@pytest.mark.parametrize("kv_ratio", [1, 3])
@torch.no_grad()
def test_logits_equal_those_of_transformers_for_ids_that_exist(kv_ratio, tokenizer, tmp_path):
    config = GPTConfig.october_2025(
        3, vocab_size=tokenizer.vocab_size, sequence_len=48, head_dim=64, kv_ratio=kv_ratio,
        rope_base=500.0, softcap=7.0,
    )  # fmt: skip
    model = random_model(config)
    save_hf(model, tokenizer, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    assert theirs.config.rms_norm_eps == NORM_EPS
    idx = draw_idx(config)
    logits = theirs(idx).logits
    assert logits.shape == (2, 48, 400)  # 448 rows with padding
    assert logits.std() > 0.1
    torch.testing.assert_close(model(idx), logits, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_greedy_generation_of_transformers_equals_ours(model, tokenizer, folder):
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert set(theirs.generation_config.eos_token_id) == tokenizer.stop_ids
    for seed in range(4):
        ours = prompt = draw_idx(model.config, rows=1, length=5, seed=seed)
        while ours.size(1) < 40 and int(ours[0, -1]) not in tokenizer.stop_ids:
            ours = torch.cat((ours, model(ours)[:, -1:].argmax(-1)), dim=1)
        made = theirs.generate(prompt, attention_mask=torch.ones_like(prompt), max_length=40, do_sample=False)
        assert made.tolist() == ours.tolist()


@either_architecture
def test_a_model_that_transformers_saved_loads_unchanged(model, tokenizer, folder, tmp_path):
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    loaded.save_pretrained(tmp_path / "theirs")
    transformers.AutoTokenizer.from_pretrained(folder).save_pretrained(tmp_path / "theirs")
    loaded, loaded_tokenizer = load_hf(tmp_path / "theirs")
    assert loaded_tokenizer.fingerprint == tokenizer.fingerprint
    assert_same_function(model, loaded)


@either_architecture
def test_rows_that_the_tokenizer_has_no_ids_for_are_left_out(model, folder):
    """Other programs write the padded rows, as if there were such ids."""
    weights = load_file(folder / "model.safetensors")
    for name, weight in weights.items():
        if name.endswith(hf.TABLES):
            weights[name] = torch.cat((weight, torch.full((48, weight.size(1)), 9.0)))
    save_file(weights, folder / "model.safetensors")
    change_json(folder / "config.json", lambda content: content.update(vocab_size=448))
    loaded, _ = load_hf(folder)
    assert (loaded.wte.weight[400:] == 0).all()
    assert_same_function(model, loaded)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@either_architecture
def test_weights_are_saved_in_the_dtype_asked_for_and_loaded_as_float32(model, tokenizer, tmp_path, dtype):
    model.wte.to(torch.bfloat16)
    save_hf(model, tokenizer, tmp_path / "saved", dtype=dtype)
    weights = load_file(tmp_path / "saved" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {dtype}
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "saved", dtype="auto", trust_remote_code=True)
    assert {parameter.dtype for parameter in theirs.parameters()} == {dtype}
    loaded, _ = load_hf(tmp_path / "saved", compute_dtype=torch.bfloat16)
    assert loaded.compute_dtype == torch.bfloat16
    for (name, ours), read in zip(model.named_parameters(), loaded.parameters(), strict=True):
        V = 400 if name.endswith(hf.TABLES) else None
        assert torch.equal(read[:V], ours[:V].to(dtype).float()), name


FEATURES = {
    "sliding windows": {"window_pattern": "SL"}, "scaled QK-norm": {"qk_scale": 1.2},
    "value embeddings": {"value_embeds": True}, "scalars on the residual": {"residual_scalars": True},
    "smear": {"smear": True}, "backout": {"backout": True}, "a soft cap of 7.0 instead of 15.0": {"softcap": 7.0},
}  # fmt: skip


@pytest.mark.parametrize("named", FEATURES)
def test_each_feature_without_counterpart_in_mlx_lm_is_refused_alone(config, tokenizer, tmp_path, named):
    model = build_model(replace(config, **FEATURES[named]), device="meta")
    with pytest.raises(UserError, match=f"no counterpart in mlx-lm: it has {named}"):
        save_hf(model, tokenizer, tmp_path / "no", for_mlx=True)
    assert not (tmp_path / "no").exists()


def test_a_folder_that_is_not_empty_is_left_alone(model, tokenizer, folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match=r"saved already holds config.json; give a new folder"):
        save_hf(build_model(model.config, device="meta"), tokenizer, folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    (tmp_path / "clone" / ".git").mkdir(parents=True)  # of a repository that has no files yet
    save_hf(model, tokenizer, tmp_path / "clone")


def test_a_tokenizer_that_is_not_the_models_and_a_folder_that_cannot_be_written_are_refused(model, texts, tmp_path):
    (tmp_path / "file").write_text("")
    for folder, other, fault in (
        (tmp_path / "new", Tokenizer.train(texts, 300), "300 ids, the model 400"),
        (tmp_path / "new", Tokenizer.train(texts, 400, pattern=r"\w+|\W+"), "split pattern"),
        (tmp_path / "file", Tokenizer.train(texts, 400), "file"),
    ):
        with pytest.raises(UserError, match=fault):
            save_hf(model, other, folder)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("model_type", "llama"), ("model_type", None), ("hidden_act", "silu"), ("attention_bias", True),
        ("tie_word_embeddings", True), ("intermediate_size", 100), ("head_dim", 16), ("rms_norm_eps", 1e-5),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}), ("rope_parameters", {"rope_type": "default"}),
        ("final_logit_softcapping", None), ("vocab_size", 399), ("hidden_size", "many"), ("num_hidden_layers", 0),
        ("num_attention_heads", 5),
    ],
)  # fmt: skip
def test_a_config_of_another_architecture_is_refused(folder, setting, value):
    change_json(folder / "config.json", lambda content: content.update({setting: value}))
    with pytest.raises(UserError):
        load_hf(folder)


RECIPE_SETTINGS = [
    ("hidden_size", None), ("num_hidden_layers", "three"), ("smear", 1), ("window_pattern", "SX"), ("vocab_size", 399),
    ("num_attention_heads", 5), ("rope_theta", [1]),
]  # fmt: skip


@pytest.mark.parametrize(("setting", "value"), RECIPE_SETTINGS)
@pytest.mark.parametrize("architecture", ["recipe"])
def test_an_odd_setting_of_a_model_with_its_own_code_is_refused(folder, setting, value):
    change_json(folder / "config.json", lambda content: content.update({setting: value}))
    with pytest.raises(UserError):
        load_hf(folder)


def test_a_folder_of_another_model_is_refused(folder):
    transformers.GPT2Config(vocab_size=400).save_pretrained(folder)
    with pytest.raises(UserError, match="model_type is 'gpt2'"):
        load_hf(folder)


DAMAGE = {
    "missing": lambda path: path.unlink(),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[:-100]),
    "other": lambda path: path.write_bytes(b"[]" if path.suffix == ".json" else b""),
}


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_missing_or_damaged_file_is_named(folder, name, damage):
    damage(folder / name)
    with pytest.raises(UserError, match=name):
        load_hf(folder)


@pytest.mark.parametrize("fault", ["missing", "too many", "shape"])
def test_weights_that_do_not_fit_the_config_are_refused(folder, fault):
    weights = load_file(folder / "model.safetensors")
    weight = weights.pop("model.layers.1.mlp.fc1.weight")
    if fault != "missing":
        weights["model.layers.1.mlp.fc1.weight"] = weight if fault == "too many" else weight[:-1].clone()
    if fault == "too many":
        weights["model.layers.3.mlp.fc1.weight"] = weight.clone()
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(UserError, match="fc1"):
        load_hf(folder)


def test_mlx_lm_finds_its_own_names_and_settings(model, tokenizer, tmp_path):
    """Those of its file nanochat.py, where the model was loaded and gave our logits (dev/LOG.md)."""
    save_hf(model, tokenizer, tmp_path, for_mlx=True)
    layer = ("attn.c_q", "attn.c_k", "attn.c_v", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    names = {"transformer.wte", "lm_head", *(f"transformer.h.{i}.{name}" for i in range(3) for name in layer)}
    assert set(load_file(tmp_path / "model.safetensors")) == {f"{name}.weight" for name in names}
    settings = json.loads((tmp_path / "config.json").read_text())
    taken = {
        "model_type": "nanochat", "hidden_size": 192, "num_hidden_layers": 3, "num_attention_heads": 6,
        "num_key_value_heads": 6, "vocab_size": 400, "max_position_embeddings": 48, "intermediate_size": 768,
        "rope_theta": 10_000.0,
    }  # fmt: skip
    assert settings.items() >= taken.items()


@pytest.mark.parametrize(("format_", "weights"), [("transformers", "F32"), ("mlx", "F32"), ("gguf", "BF16")])
def test_a_checkpoint_is_exported_by_the_command(model, tokenizer, tmp_path, monkeypatch, capsys, format_, weights):
    gguf = pytest.importorskip("gguf") if format_ == "gguf" else None
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)
    save_checkpoint(run_dir("base", "d3"), 7, runtime=runtime, model=model, tokenizer=tokenizer, meta={"results": {}})
    out = tmp_path / "out"
    monkeypatch.setattr(sys, "argv", ["export_hf", "--output", str(out), "--format", format_])
    args = export_hf.parse_args()
    assert args == Namespace(source="", model_tag="", step=None, output=str(out), format=format_, dtype=None)
    export_hf.main(args)
    assert f"step_000007 is now in {out} for {format_}" in capsys.readouterr().out
    card = (out / "README.md").read_text()
    files = {path.name for path in out.iterdir()} - {"README.md"}
    assert all(f"`{name}`" in card for name in files)
    if gguf:
        (tensor, *_) = gguf.GGUFReader(out / "model-bf16.gguf").tensors
        assert tensor.tensor_type.name == weights
    else:
        assert_same_function(model, load_hf(out)[0])
