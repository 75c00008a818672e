"""Hugging Face folders, written and read: the October 2025 architecture, which transformers calls NanoChat.

    config.json, generation_config.json, model.safetensors        the model, in float32 (read in any width, and sharded)
    tokenizer.json, tokenizer_config.json                         the tokenizer and the conversation format

- The tables have one row per id there. Our padded rows, which no token and no logit uses, are left out.
- tokenizer.json gives our ids for any text (see `derive_merges`), with <|bos|> in front unless the caller passes
  add_special_tokens=False. The format itself causes one difference: the name of a special token within a text becomes
  that token, unless the caller passes split_special_tokens=True. In nanochat, text is never more than text.
- The conversation format is the Jinja template `chat_template.jinja`; it gives the ids of `chat.py`. Since a rendered
  conversation is tokenized as text, the template refuses messages that contain the name of a special token: they could
  end a turn wherever their author likes.

Not here: downloads, and architectures with features that NanoChat lacks (a `UserError` names them).
"""

import itertools
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

import rustbpe
from nanochat.common import UserError, disk_errors, write_atomic
from nanochat.model.gpt import GPT, NORM_EPS, GPTConfig, build_model
from nanochat.tokenizer import NUM_BYTES, Tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SHARDS_FILE = "model.safetensors.index.json"  # instead, where the weights are in several files
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"

# {% generation %} marks what the assistant wrote: its tokens are those of the loss mask in `chat.py`.
CHAT_TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")
TEMPLATES_PATH = Path(__file__).with_name("hf_templates.json")
MAX_NORM_EPS = 1e-6  # transformers' default, which some folders name; it moves the logits by 2e-5
SOFTCAP = 15.0  # transformers' default; the first folders name none, or call it logits_soft_cap
MAX_PADDED_ROWS = 255  # of the tables beyond the tokenizer's ids
FIXED_SETTINGS = ("model_type", "hidden_act", "attention_bias", "tie_word_embeddings")
LAYER_WEIGHTS = {  # their name within a layer: ours
    "self_attn.q_proj": "attn.c_q", "self_attn.k_proj": "attn.c_k", "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
TABLES = ("model.embed_tokens.weight", "lm_head.weight")  # a row for each id


def save_hf(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `model` and `tokenizer` to `folder`, replacing what an earlier call wrote there. Raises `UserError` when
    the model has features without a counterpart, the tokenizer is not the model's or splits text by an unknown
    pattern, or the folder cannot be written."""
    config = model.config
    _check_model(config)
    _check_pattern(tokenizer.pattern)
    if tokenizer.vocab_size != config.vocab_size:
        remedy = "use the tokenizer that the model was trained with"
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {config.vocab_size}; {remedy}")
    with disk_errors("the model", folder):
        folder.mkdir(parents=True, exist_ok=True)
    _save_weights(model, folder / WEIGHTS_FILE)
    end = tokenizer.special_id("<|assistant_end|>")
    names = json.dumps(list(tokenizer.special_ids))  # a list of strings reads the same in Jinja
    chat_template = CHAT_TEMPLATE_PATH.read_text(encoding="utf-8").replace("SPECIAL_TOKENS", names)
    tokenizer_settings = {"model_max_length": config.sequence_len, "chat_template": chat_template}
    files = {
        TOKENIZER_FILE: tokenizer_spec(tokenizer),
        SETTINGS_FILE: _template(SETTINGS_FILE) | tokenizer_settings,
        "generation_config.json": {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids),
                                   "pad_token_id": end},
        CONFIG_FILE: _model_settings(config, bos_id=tokenizer.bos_id, end_id=end),
    }  # fmt: skip
    for name, content in files.items():
        write_atomic(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def load_hf(
    folder: Path, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer]:
    """The model, on `device`, and the tokenizer of a folder that `save_hf` or transformers' `save_pretrained` wrote.
    Rows of the tables beyond the tokenizer's ids are left out. Raises `UserError` when a file is missing or broken, or
    the folder holds another architecture or another kind of tokenizer."""
    config, tokenizer, num_rows = read_hf_config(folder)
    model = build_model(config, device=device, compute_dtype=compute_dtype)
    _load_weights(model, folder, num_rows=num_rows)
    return model, tokenizer


def read_hf_config(folder: Path) -> tuple[GPTConfig, Tokenizer, int]:
    """All that `load_hf` reads but the weights: the model's config, the tokenizer, and the rows of the tables."""
    settings = _read_json(folder / CONFIG_FILE)
    tokenizer = parse_tokenizer_spec(_read_json(folder / TOKENIZER_FILE), folder / TOKENIZER_FILE)
    return (
        _parse_model_settings(settings, tokenizer.vocab_size, folder / CONFIG_FILE),
        tokenizer,
        settings["vocab_size"],
    )


def _template(name: str) -> dict[str, Any]:
    """The fixed content of a file; null stands where the model's own values go."""
    return json.loads(TEMPLATES_PATH.read_text(encoding="utf-8"))[name]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); give the folder of a Hugging Face model") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


# --- architecture --------------------------------------------------------------------------------


def _check_model(config: GPTConfig) -> None:
    """Raise `UserError` naming the model's features that transformers' NanoChat does not have."""
    features = {
        "sliding windows": any(config.window(layer) for layer in range(config.n_layer)),
        "scaled QK-norm": config.qk_scale != 1.0, "value embeddings": config.value_embeds,
        "scalars on the residual stream": config.residual_scalars, "smear": config.smear, "backout": config.backout,
    }  # fmt: skip
    if present := [name for name, is_there in features.items() if is_there]:
        remedy = "only models of the first release's architecture do (scripts.base_train --arch october-2025)"
        fault = f"the model has no counterpart in Hugging Face transformers: it has {', '.join(present)}"
        raise UserError(f"{fault}; {remedy}")


def _model_settings(config: GPTConfig, *, bos_id: int, end_id: int) -> dict[str, Any]:
    settings = _template(CONFIG_FILE)  # it has no padding id: the embedding of one would get no gradient
    settings["rope_parameters"]["rope_theta"] = config.rope_base
    return settings | {
        "vocab_size": config.vocab_size, "hidden_size": config.n_embd, "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head, "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": NORM_EPS, "final_logit_softcapping": config.softcap,
        "bos_token_id": bos_id, "eos_token_id": end_id,
    }  # fmt: skip


def _parse_model_settings(settings: dict[str, Any], vocab_size: int, path: Path) -> GPTConfig:
    """The config for `vocab_size` ids. Raises a `UserError` that names the offending setting of config.json."""
    template = _template(CONFIG_FILE)
    for name in FIXED_SETTINGS:
        value = template[name]
        if settings.get(name, None if name == "model_type" else value) != value:
            raise UserError(f"{path} is of another architecture: {name} is {settings.get(name)!r}, not {value!r}")
    try:
        rope = settings.get("rope_parameters") or {"rope_theta": settings["rope_theta"]}
        heads, width, rows = (settings[name] for name in ("num_attention_heads", "hidden_size", "vocab_size"))
        softcap = settings.get("final_logit_softcapping", settings.get("logits_soft_cap", SOFTCAP))
        config = GPTConfig.october_2025(
            settings["num_hidden_layers"], vocab_size=vocab_size, sequence_len=settings["max_position_embeddings"],
            n_embd=width, n_head=heads, n_kv_head=settings.get("num_key_value_heads") or heads,
            rope_base=float(rope["rope_theta"]), softcap=float(softcap),
        )  # fmt: skip
        is_odd = {
            "intermediate_size": settings["intermediate_size"] != 4 * width,
            "head_dim": settings.get("head_dim", config.head_dim) != config.head_dim,
            "rope_parameters": rope.get("rope_type", "default") != "default",
            "rms_norm_eps": not 0 <= settings.get("rms_norm_eps", MAX_NORM_EPS) <= MAX_NORM_EPS,
        }
        fits = vocab_size <= rows <= vocab_size + MAX_PADDED_ROWS
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the config of a NanoChat model ({type(error).__name__}: {error})") from error
    if not fits:
        fault = f"{path} says that the tables have {rows} rows, but the tokenizer has {vocab_size} ids"
        raise UserError(f"{fault}; take the tokenizer that the model was trained with")
    if odd := [name for name in is_odd if is_odd[name]]:
        raise UserError(f"{path} has no counterpart here: {odd[0]} is {settings.get(odd[0])!r}")
    return config


# --- weights -------------------------------------------------------------------------------------


def _by_their_names(model: GPT) -> dict[str, Tensor]:
    """The model's parameters, or views of them: the tables come without their padded rows."""
    V = model.config.vocab_size
    weights = dict(zip(TABLES, (model.wte.weight[:V], model.lm_head.weight[:V]), strict=True))
    for layer, block in enumerate(model.h):
        for theirs, ours in LAYER_WEIGHTS.items():
            weights[f"model.layers.{layer}.{theirs}.weight"] = block.get_submodule(ours).weight
    return weights


@torch.no_grad()
def _save_weights(model: GPT, path: Path) -> None:
    own_storage = {"device": "cpu", "dtype": torch.float32, "copy": True, "memory_format": torch.contiguous_format}
    tensors = {name: weight.to(**own_storage) for name, weight in _by_their_names(model).items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with disk_errors("the weights", path):
            save_file(tensors, partial, metadata={"format": "pt"})
            os.replace(partial, path)
    except SafetensorError as error:  # a full disk, among others
        raise UserError(f"cannot write the weights to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def _load_weights(model: GPT, folder: Path, *, num_rows: int) -> None:
    """Fill `model` from files whose tables have `num_rows` rows, one at a time. The model's padded rows become zero."""
    weights = _by_their_names(model)
    missing = set(weights)
    for table in (model.wte, model.lm_head):
        table.weight.zero_()
    for path in _weight_files(folder):
        try:
            tensors = load_file(path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"cannot read {path} ({error}); the weights must be there whole") from error
        if odd := set(tensors) - missing:
            raise UserError(f"{path} does not have the weights its config asks for: {min(odd)} is too many")
        for name, tensor in tensors.items():
            weight = weights[name]
            shape = (num_rows if name in TABLES else weight.size(0), weight.size(1))
            if tensor.shape != shape:
                raise UserError(f"{path}: {name} has the shape {tuple(tensor.shape)}, not {shape}")
            weight.copy_(tensor[: weight.size(0)])
        missing -= set(tensors)
    if missing:
        raise UserError(f"{folder} does not have the weights its config asks for: {min(missing)} is missing")


def _weight_files(folder: Path) -> list[Path]:
    index = folder / SHARDS_FILE
    if not index.exists():
        return [folder / WEIGHTS_FILE]
    shards = _read_json(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{index} does not list the files of the weights in this folder")
    return [folder / name for name in sorted(names)]


# --- tokenizer -----------------------------------------------------------------------------------


def _byte_characters() -> list[str]:
    """The character that stands for each byte in tokenizer.json, as in GPT-2: visible ones stand for themselves, the
    others are replaced by the characters from U+0100 on, in order."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(0x100)
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(NUM_BYTES)]


BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


def _characters(token: bytes) -> str:
    return "".join(BYTE_TO_CHARACTER[byte] for byte in token)


def derive_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that merge into another one, ordered by the id of the result, at most one for each token.

    Our tokenizer has ranks instead of merges: it always joins the two neighbours that make up the token of lowest rank.
    The pair of a token is what remains of its bytes, joined by that rule, before the last step. No other pair occurs:
    until neighbours within a longer text become this token, nothing is joined across its ends, so its bytes go through
    the same steps as they do alone. A token whose bytes do not come down to two parts has no pair; it is found only as
    a whole chunk of text, which is what "ignore_merges" means.
    """
    ranks = {token: rank for rank, token in enumerate(tokens)}
    return [pair for token in tokens if (pair := _last_pair(token, ranks)) is not None]


def _last_pair(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(left + right, len(ranks)) for left, right in itertools.pairwise(parts)]
        lowest = min(joined)
        if lowest == len(ranks):
            return None
        at = joined.index(lowest)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


def _check_pattern(pattern: str) -> None:
    """Only for these patterns is it known that the `tokenizers` package splits every text as we do."""
    if pattern not in {rustbpe.split_pattern(digits) for digits in (1, 2, 3)}:
        raise UserError(f"the tokenizer's split pattern {pattern!r} is not one that Hugging Face folders can have here")


def tokenizer_spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json as the `tokenizers` package reads it: the same ids for every text (see the module's docstring)."""
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size - len(tokenizer.special_ids))]
    spec = _template(TOKENIZER_FILE)
    (flags,) = spec["added_tokens"]
    spec["added_tokens"] = [{"id": i, "content": name, **flags} for name, i in tokenizer.special_ids.items()]
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = tokenizer.pattern
    spec["post_processor"]["special_tokens"]["<|bos|>"]["ids"] = [tokenizer.bos_id]
    spec["model"]["vocab"] = {_characters(token): i for i, token in enumerate(tokens)}
    spec["model"]["merges"] = [[_characters(left), _characters(right)] for left, right in derive_merges(tokens)]
    return spec


def parse_tokenizer_spec(spec: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes. Raises `UserError` if ours would give other ids than it does."""
    try:
        vocab, special = spec["model"]["vocab"], sorted(spec["added_tokens"], key=lambda token: token["id"])
        names = sorted(vocab, key=vocab.get)
        tokens = [bytes(CHARACTER_TO_BYTE[character] for character in name) for name in names]
        ids = [vocab[name] for name in names] + [token["id"] for token in special]
        fault = _spec_fault(spec, tokens) if ids == list(range(len(ids))) else "its ids are not 0, 1, 2, ..."
        pattern = "" if fault else spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        special_names = [token["content"] for token in special]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise UserError(f"{path} is not a byte-level tokenizer like ours ({fault})")
    _check_pattern(pattern)
    return Tokenizer(tokens, pattern, special_names)


def _spec_fault(spec: dict[str, Any], tokens: list[bytes]) -> str:
    """Why a tokenizer.json gives other ids than the ranks of its tokens do; "" if it does not."""
    split, to_characters = spec["pre_tokenizer"]["pretokenizers"]
    if spec["normalizer"] is not None or spec["model"]["type"] != "BPE":
        return "it normalizes the text, or is no BPE"
    if (split["type"], split["behavior"], split["invert"]) != ("Split", "Isolated", False):
        return f"it splits text by {split}"
    if to_characters["type"] != "ByteLevel" or to_characters["add_prefix_space"] or to_characters["use_regex"]:
        return f"it turns bytes into characters by {to_characters}"
    derived = [(_characters(left), _characters(right)) for left, right in derive_merges(tokens)]
    known, listed = set(derived), [tuple(pair) for pair in spec["model"]["merges"]]
    if [pair for pair in listed if pair in known] != derived:  # the other pairs never occur, see `derive_merges`
        return "its merges do not follow from the order of its tokens"
    if not spec["model"]["ignore_merges"] and len(derived) < len(tokens) - NUM_BYTES:
        return "some of its tokens are never reached"
    return ""
