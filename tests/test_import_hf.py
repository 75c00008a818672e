"""`scripts.import_hf`: a published model goes in, works in every stage, and comes out again as it was."""

import json
import os
import pickle
import random
import sys

import pytest
import torch
from conftest import make_text
from fake_hub import REPO, impatient_hub
from safetensors.torch import load_file
from test_chat_loader import make_conversations
from test_chat_scripts import write_conversations
from test_first_release import MODEL, PICKLE, random_model, write_release
from test_hf import change_json
from test_scripts import assert_refused, run_folder, working_in

from nanochat.checkpoint import read_meta, run_dir, save_checkpoint, step_dir
from nanochat.common import Runtime, UserError, base_dir
from nanochat.model.gpt import GPTConfig
from nanochat.model.hf_tokenizer import tokenizer_spec
from nanochat.model.load import load_model
from scripts import export_hf, import_hf

transformers = pytest.importorskip("transformers")

CPU = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)
LEGACY = {"final_logit_softcapping": None, "rms_norm_eps": None, "rope_parameters": None}  # not in the first folders


def publish(folder, tokenizer, *, dtype=torch.bfloat16, shard_size="50GB"):
    """What people publish: a model of transformers' own class with a tokenizer.json that lists every cut of a token."""
    config = transformers.NanoChatConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.NanoChatForCausalLM(config).to(dtype)
    model.save_pretrained(folder, max_shard_size=shard_size)
    spec = tokenizer_spec(tokenizer)
    vocab = spec["model"]["vocab"]
    cuts = [[t[:i], t[i:]] for t in vocab for i in range(1, len(t)) if t[:i] in vocab and t[i:] in vocab]
    spec["model"] |= {"merges": cuts, "ignore_merges": False}
    (folder / "tokenizer.json").write_text(json.dumps(spec))
    return model


def command(monkeypatch, script, *args):
    monkeypatch.setattr(sys, "argv", ["script", *map(str, args)])
    script.main(script.parse_args())


@pytest.fixture
def published(tokenizer, tmp_path):
    publish(tmp_path / "d2-chat", tokenizer)
    return tmp_path / "d2-chat"


def test_an_export_tells_its_stage_and_what_to_ask(tmp_path, monkeypatch, tokenizer, base_folder):
    config = GPTConfig.from_depth(1, vocab_size=tokenizer.vocab_size, sequence_len=32, head_dim=64)
    model, meta = random_model(config), {"args": {}, "examples": ["What is 2 + 3?"]}
    save_checkpoint(run_dir("rl", "d1"), 3, runtime=CPU, model=model, tokenizer=tokenizer, meta=meta)
    command(monkeypatch, export_hf, "--output", tmp_path / "out")
    command(monkeypatch, import_hf, tmp_path / "out", "--model-tag", "again")
    assert read_meta(step_dir(run_dir("rl", "again"), 0))["examples"] == ["What is 2 + 3?"]


@pytest.mark.parametrize(("dtype", "shard_size"), [(torch.bfloat16, "50GB"), (torch.float32, "100KB")])
def test_a_published_model_comes_out_again_with_equal_tensors_and_ids(
    tokenizer, tmp_path, monkeypatch, capsys, dtype, shard_size
):
    state = publish(tmp_path / "d2-chat", tokenizer, dtype=dtype, shard_size=shard_size).state_dict()
    assert len(list((tmp_path / "d2-chat").glob("*.safetensors"))) == (1 if dtype == torch.bfloat16 else 7)
    command(monkeypatch, import_hf, tmp_path / "d2-chat")
    out = capsys.readouterr().out
    assert "d2-chat is now sft_checkpoints/d2-chat, step 0" in out
    assert "scripts.chat_web --source sft --model-tag d2-chat" in out
    loaded = load_model("sft", CPU)
    idx = torch.arange(40)[None]
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "d2-chat", dtype=torch.float32)
    torch.testing.assert_close(loaded.model(idx), theirs(idx).logits, rtol=1e-4, atol=1e-4)
    assert len(loaded.meta["examples"]) == 4
    command(monkeypatch, export_hf, "--source", "sft", "--output", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name].float()) for name in state)
    before, after = (transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("d2-chat", "out"))
    text = make_text(random.Random(0), 300)
    assert before(text, add_special_tokens=False) == after(text, add_special_tokens=False)


def test_folders_of_the_first_weeks_are_read_too(published, monkeypatch):
    """They call the soft cap logits_soft_cap, or name none, and write rope_theta by itself."""
    change_json(published / "config.json", lambda config: [config.pop(name) for name in LEGACY])
    change_json(published / "config.json", lambda config: config.update(rope_theta=10000.0, logits_soft_cap=15.0))
    command(monkeypatch, import_hf, published)
    legacy = load_model("sft", CPU).model.config
    assert (legacy.softcap, legacy.rope_base) == (15.0, 10000.0)
    change_json(published / "config.json", lambda config: config.pop("logits_soft_cap"))
    command(monkeypatch, import_hf, published, "--source", "base")
    assert load_model("base", CPU).model.config == legacy
    assert "examples" not in load_model("base", CPU).meta  # it does not chat


@pytest.fixture
def release(tokenizer, tmp_path):
    config = GPTConfig.october_2025(2, vocab_size=tokenizer.vocab_size, sequence_len=64, head_dim=32)
    write_release(tmp_path / "release", random_model(config), tokenizer)
    return tmp_path / "release"


def test_a_release_folder_tells_stage_step_and_name(release, tokenizer, monkeypatch, capsys):
    command(monkeypatch, import_hf, release)
    command(monkeypatch, import_hf, (release / MODEL).parent, "--source", "rl", "--model-tag", "mine")
    assert "is now sft_checkpoints/d2, step 650" in capsys.readouterr().out
    one, other = load_model("sft", CPU, model_tag="d2"), load_model("rl", CPU, model_tag="mine")
    assert (one.meta["step"], one.meta["results"]) == (650, {"val_bpb": 0.5})
    assert one.tokenizer.fingerprint == other.tokenizer.fingerprint == tokenizer.fingerprint
    assert all(map(torch.equal, one.model.state_dict().values(), other.model.state_dict().values()))


def files_of(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_repository_is_fetched_as_far_as_it_is_needed(published, release, monkeypatch, capsys):
    others = {"pytorch_model.bin": b"x", "other/config.json": b"{}", "optim_000650.pt": b"x"}
    with impatient_hub(monkeypatch, others | files_of(published)) as server:
        command(monkeypatch, import_hf, REPO)
        assert not any(server.fetched(name) for name in others)
        with pytest.raises(UserError, match="holds checkpoints already; choose another --model-tag"):
            command(monkeypatch, import_hf, REPO)
    assert read_meta(step_dir(run_dir("sft", "texts"), 0))["imported"] == REPO
    with impatient_hub(monkeypatch, files_of(release)) as server:
        command(monkeypatch, import_hf, f"{REPO}/chatsft_checkpoints/d2")
    assert not list((base_dir() / "imports").glob("[!.]*"))
    loaded, local = load_model("sft", CPU, model_tag="d2"), load_model("sft", CPU, model_tag="texts")
    assert (loaded.meta["step"], local.meta["step"]) == (650, 0)


def test_of_another_architecture_on_the_hub_the_weights_are_not_fetched(published, monkeypatch, capsys):
    change_json(published / "config.json", lambda config: config.update(model_type="llama"))
    with impatient_hub(monkeypatch, files_of(published)) as server:
        with pytest.raises(UserError, match="another architecture: model_type is 'llama'"):
            command(monkeypatch, import_hf, REPO)
        assert server.fetched("model.safetensors") == 0


def replace_tokenizer(folder, change):
    change_json(folder / "tokenizer.json", change)


def drop_special(spec):
    spec["added_tokens"] = [token for token in spec["added_tokens"] if token["content"] != "<|output_end|>"]


DAMAGE = {
    "another architecture": lambda at: change_json(at / "config.json", lambda c: c.update(model_type="gpt2")),
    "another architecture: model_type is 't5'": lambda at: (
        change_json(at / "config.json", lambda config: config.update(model_type="t5")),
        (at / "tokenizer.json").unlink(),  # it has a spiece.model instead
    ),
    "no model that can be imported": lambda at: (at / "config.json").unlink(),
    "cannot read .*tokenizer.json": lambda at: (at / "tokenizer.json").unlink(),
    "cannot read .*model.safetensors": lambda at: os.truncate(at / "model.safetensors", 5000),
    "tables have 32768 rows, but the tokenizer has 400 ids": lambda at: change_json(
        at / "config.json", lambda config: config.update(vocab_size=32768)
    ),
    "not of a NanoChat model: it has no <.output_end.>": lambda at: replace_tokenizer(at, drop_special),
    "does not list the files": lambda at: (at / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "../other.safetensors"}}'
    ),
    "cannot read .*00002.safetensors": lambda at: (at / "model.safetensors.index.json").write_text(
        '{"weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}'
    ),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_a_folder_that_cannot_be_imported_is_refused_in_a_line_and_leaves_nothing(published, monkeypatch, words):
    DAMAGE[words](published)
    with pytest.raises(UserError, match=words) as refusal:
        command(monkeypatch, import_hf, published)
    assert "\n" not in str(refusal.value)
    assert not list(base_dir().rglob("*"))


def test_a_missing_file_of_a_release_is_named_by_its_whole_path(release, monkeypatch):
    (release / PICKLE).unlink()
    with pytest.raises(UserError, match=f"^{release}/tokenizer/token_bytes.pt has only .*: {release / MODEL} needs"):
        command(monkeypatch, import_hf, release)


def test_neither_a_file_nor_what_is_nowhere_is_taken_for_a_model(published, tmp_path, monkeypatch):
    for model, words in (
        (published / "model.safetensors", "is a file; give the folder that it is in"), ("nowhere", "no hub repository"),
        (tmp_path / "no" / "where", "is no file or folder here"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            command(monkeypatch, import_hf, model)


# --- every stage takes it ---
def test_an_imported_model_chats_is_evaluated_finetuned_and_rewarded(tokenizer, tmp_path):
    publish(tmp_path / "d2", tokenizer)
    write_conversations(tmp_path / "own.jsonl", make_conversations(30))
    cpu = "--device-type cpu --dtype float32".split()
    with working_in(tmp_path) as place:
        place.run_well("scripts.import_hf", "d2", "--model-tag", "tiny")
        chosen = ["--source", "sft", "--model-tag", "tiny", *cpu]
        assert place.run("scripts.chat_cli", *chosen, "--max-tokens", "4", "-p", "river").status == 0
        exam = "--tasks SmallWorld-sums --max-problems 2 --max-tokens 4".split()
        assert "SmallWorld-sums" in place.run_well("scripts.chat_eval", *chosen, *exam)
        short = "--num-steps 1 --data own.jsonl --output-tag more".split()
        place.run_well("scripts.chat_sft", *chosen, *short, "--total-batch-size", "256")
        small = "--num-samples 2 --questions-per-step 2 --max-tokens 4 --eval-every 0".split()
        place.run_well("scripts.chat_rl", *chosen, *short, *small)
        refused = place.run("scripts.chat_sft", *chosen, *short[:-2], "--resume")
        assert_refused(refused, "in the run being resumed", "--model-tag")
        sft, rl = (place.base / f"{stage}_checkpoints" / "more" / "step_000001" for stage in ("sft", "rl"))
        examples = [json.loads((step / "meta.json").read_text())["examples"] for step in (sft, rl)]
        assert len(examples[0]) == len(examples[1]) == 4
        assert examples[0] != examples[1]  # its own data's; those of the model that it began with
        assert run_folder(place.base, "sft").is_dir()


def test_a_pickle_that_would_run_code_is_refused_by_the_command(release, tmp_path):
    class Call:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    (release / PICKLE).write_bytes(pickle.dumps(Call()))
    with working_in(tmp_path) as place:
        ended = place.run("scripts.import_hf", "release")
    assert_refused(ended, "tokenizer.pkl is refused: it would call", "mkdir")
    assert not (tmp_path / "ran").exists()
