"""The first release's own files: read as they were written, and refused when they would run code or do not fit."""

import json
import os
import pickle
import re

import pytest
import torch
from conftest import random_model
from test_hf import change_json

from nanochat.common import UserError
from nanochat.model.first_release import find_release, load_release, read_encoding
from nanochat.model.gpt import GPTConfig
from nanochat.model.hf_tokenizer import tokenizer_spec
from nanochat.tokenizer import Tokenizer

MODEL, META = "chatsft_checkpoints/d2/model_000650.pt", "chatsft_checkpoints/d2/meta_000650.json"
PICKLE, LENGTHS = "tokenizer/tokenizer.pkl", "tokenizer/token_bytes.pt"


@pytest.fixture
def model(tokenizer):
    config = GPTConfig.october_2025(2, vocab_size=tokenizer.vocab_size, sequence_len=48, head_dim=32, kv_ratio=2)
    return random_model(config)


@pytest.fixture
def root(model, tokenizer, tmp_path):
    """A release as it lies in its base folder: compiled weights, the embedding in bfloat16."""
    write_release(tmp_path / "release", model, tokenizer)
    return tmp_path / "release"


def write_release(root, model, tokenizer):
    for name in (MODEL, PICKLE):
        (root / name).parent.mkdir(parents=True)
    V, config = tokenizer.vocab_size, model.config
    with torch.no_grad():
        model.wte.weight.copy_(model.wte.weight.bfloat16())
    state = {}
    for name, weight in model.state_dict().items():
        name = name if name == "lm_head.weight" else f"transformer.{name}"
        rows = weight[:V] if name in ("lm_head.weight", "transformer.wte.weight") else weight
        state[f"_orig_mod.{name}"] = rows.bfloat16() if "wte" in name else rows.clone()
    torch.save(state, root / MODEL)
    fields = ("sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd")
    shape = {name: getattr(config, name) for name in fields}
    (root / META).write_text(json.dumps({"step": 650, "val_bpb": 0.5, "model_config": shape, "user_config": {}}))
    (root / PICKLE).write_bytes(pickle.dumps(tokenizer.tiktoken))
    special = set(tokenizer.special_ids.values())
    lengths = [0 if i in special else len(tokenizer.decode([i]).encode()) for i in range(V)]  # as it counted them
    torch.save(torch.tensor(lengths, dtype=torch.int32), root / LENGTHS)


def load(root, folder=""):
    names = [path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()]
    return load_release(root, find_release(names, folder))


def test_model_and_tokenizer_are_those_that_were_written(root, model, tokenizer):
    loaded, loaded_tokenizer, meta = load(root)
    assert (loaded.config, meta["step"]) == (model.config, 650)
    assert loaded_tokenizer.fingerprint == tokenizer.fingerprint
    V = tokenizer.vocab_size
    for (name, theirs), ours in zip(loaded.named_parameters(), model.parameters(), strict=True):
        rows = slice(V) if name in ("wte.weight", "lm_head.weight") else slice(None)
        assert torch.equal(theirs[rows], ours[rows]), name


@pytest.mark.parametrize("protocol", [3, 4, 5])  # of Python 3.0 to 3.14
def test_every_protocol_of_a_pickled_encoding_is_read(tokenizer, tmp_path, protocol):
    path = tmp_path / "tokenizer.pkl"
    path.write_bytes(pickle.dumps(tokenizer.tiktoken, protocol))
    assert read_encoding(path).fingerprint == tokenizer.fingerprint


def test_the_last_step_is_taken_and_the_nearest_tokenizer():
    names = ["a/model_000009.pt", "a/meta_000009.json", "a/model_000100.pt", "a/meta_000100.json", "tokenizer.json"]
    found = find_release([*names, "b/token_bytes.pt"])
    assert (found.names, found.step, found.stage) == ([*names[2:4], "tokenizer.json"], 100, "")
    found = find_release([*names, "tokenizer/tokenizer.pkl", "a/tokenizer.pkl", "tokenizer/token_bytes.pt"], "a")
    assert found.names == [*names[2:4], "a/tokenizer.pkl", "tokenizer/token_bytes.pt"]
    assert find_release([MODEL, META, PICKLE]).stage == "sft"
    assert find_release(["README.md", "model_final.pt"]) is None
    with pytest.raises(UserError, match=r"several folders \(a, b\); give the one"):
        find_release([*names, "b/model_000001.pt"])


@pytest.mark.parametrize(
    ("gone", "words"),
    [
        (META, "comes without meta_000650.json"),
        (PICKLE, r"token_bytes.pt has only the lengths of the tokens: .* needs tokenizer.pkl or tokenizer.json too"),
    ],
)
def test_a_missing_file_is_named(root, gone, words):
    (root / gone).unlink()
    with pytest.raises(UserError, match=words):
        load(root)


def test_a_tokenizer_json_will_do(root, tokenizer):
    (root / PICKLE).unlink()
    (root / "tokenizer.json").write_text(json.dumps(tokenizer_spec(tokenizer)))
    assert load(root)[1].fingerprint == tokenizer.fingerprint


class Call:
    """Pickled as a call of `function`."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("name", [MODEL, PICKLE, LENGTHS])
def test_a_pickle_that_would_run_code_is_refused_by_name_and_nothing_runs(root, name):
    ran, system = root / "ran", f"{os.system.__module__}.system"
    trap = {"a": torch.zeros(1), "b": Call(os.system, f"touch {ran}")}
    if name == PICKLE:
        (root / name).write_bytes(pickle.dumps(trap["b"]))
    else:
        torch.save(trap, root / name)
    with pytest.raises(UserError, match=rf"{name} is refused: it would call {re.escape(system)}") as refusal:
        load(root)
    assert "\n" not in str(refusal.value)
    assert not ran.exists()


def test_other_pickles_are_no_tokenizer(tokenizer, tmp_path):
    import tiktoken

    gap = {bytes([i]): i + (i > 9) for i in range(256)}
    whole = pickle.dumps(tokenizer.tiktoken)
    cases = {
        "it has the instruction STOP": pickle.dumps({"mergeable_ranks": {}}), "no whole pickle": whole[:-500],
        "no tiktoken.Encoding with the ids": b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)\x81}b.",
        "it has the instruction REDUCE": b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)R.",
        "with the ids 0, 1, 2": pickle.dumps(
            tiktoken.Encoding("x", pat_str=".", mergeable_ranks=gap, special_tokens={})
        ),
        "it would call torch._utils": pickle.dumps(torch.zeros(2)),
        "only names the encoding 'gpt2'": b"\x80\x04\x8c\rtiktoken.core\x8c\x08Encoding\x93)\x81\x8c\x04gpt2b.",
    }  # fmt: skip
    for words, data in cases.items():
        (tmp_path / "tokenizer.pkl").write_bytes(data)
        with pytest.raises(UserError, match=words):
            read_encoding(tmp_path / "tokenizer.pkl")


def test_a_small_pickle_cannot_make_an_endless_text(tmp_path):
    """Forty dictionaries, each twice in the next, whose text as the name of a function would have 2 ** 40 parts."""
    nested = b"\x80\x04}\x94" + b"".join(b"}(K\x00h%cK\x01h%cu\x94" % (i, i) for i in range(40))
    (tmp_path / "tokenizer.pkl").write_bytes(nested + b"\x8c\x08Encoding\x93.")
    with pytest.raises(UserError, match="no whole pickle"):
        read_encoding(tmp_path / "tokenizer.pkl")


def change_state(root, change):
    state = torch.load(root / MODEL, weights_only=True)
    change(state)
    torch.save(state, root / MODEL)


TWO_LAMBDAS = {"_orig_mod.resid_lambdas": torch.ones(2), "_orig_mod.x0_lambdas": torch.ones(2)}
DAMAGE = {
    "has window_pattern, which": lambda root: change_json(
        root / META, lambda meta: meta["model_config"].update(window_pattern="SSSL")
    ),
    "no model_config with n_embd": lambda root: change_json(root / META, lambda meta: meta.pop("model_config")),
    "vocabulary of 65536, .* one of 400": lambda root: change_json(
        root / META, lambda meta: meta["model_config"].update(vocab_size=65536)
    ),
    "h.1.mlp.c_fc.weight is missing": lambda root: change_state(
        root, lambda state: state.pop("_orig_mod.transformer.h.1.mlp.c_fc.weight")
    ),
    "not of the first release: it has resid_lambdas, x0_lambdas": lambda root: change_state(
        root, lambda state: state.update(TWO_LAMBDAS)
    ),
    "lm_head.weight has the shape": lambda root: change_state(
        root, lambda state: state.update({"lm_head.weight": torch.zeros(300, 128)})
    ),
    "does not hold tensors by name": lambda root: torch.save([1, 2], root / MODEL),
    "cannot read .*model_000650.pt": lambda root: os.truncate(root / MODEL, 5000),
    "cannot read .*meta_000650.json": lambda root: os.truncate(root / META, 20),
    "no whole pickle": lambda root: os.truncate(root / PICKLE, 500),
    "do not belong together": lambda root: torch.save(torch.ones(400), root / LENGTHS),
    "cannot read .*token_bytes.pt": lambda root: os.truncate(root / LENGTHS, 100),
}


@pytest.mark.parametrize("words", DAMAGE)
def test_files_that_are_broken_or_do_not_fit_are_named(root, words):
    DAMAGE[words](root)
    with pytest.raises(UserError, match=words) as refusal:
        load(root)
    assert "\n" not in str(refusal.value)


def test_tokens_that_are_no_utf_8_do_not_count_in_the_check_of_lengths(root, texts):
    """The release counted three bytes for each replacement character; a later one counts the bytes of the token."""
    tokenizer = Tokenizer.train(texts, 400)
    torch.save(torch.tensor(tokenizer.token_bytes().tolist()), root / LENGTHS)
    assert load(root)[1].fingerprint == tokenizer.fingerprint
