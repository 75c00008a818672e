"""To and from a Hugging Face folder: the October 2025 architecture, which transformers calls NanoChat.

    config.json, generation_config.json, model.safetensors        the model, float32
    tokenizer.json, tokenizer_config.json                         the tokenizer, and the conversation format

- The vocabulary has its real size there: our padded rows, which no token and no logit uses, stay behind.
- tokenizer.json gives our ids for any text (see `derive_merges`), with <|bos|> in front unless the caller says
  add_special_tokens=False. One difference lies in the format: the name of a special token within a text becomes that
  token, unless the caller says split_special_tokens=True. With us text is never more than text.
- The conversation format is a Jinja template with the ids of `chat.py`. As it goes through text, it refuses a message
  that holds the name of a special token, which would otherwise end a turn where its author likes.

Not here: downloads, and architectures with features that NanoChat has not (`UserError` names them).
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
GENERATION_FILE = "generation_config.json"
WEIGHTS_FILE = "model.safetensors"
TOKENIZER_FILE = "tokenizer.json"
TOKENIZER_SETTINGS_FILE = "tokenizer_config.json"

MAX_NORM_EPS = 1e-6  # transformers' default, which some folders name: 2e-5 from ours in the logits
FIXED_SETTINGS = {  # what the architecture always is
    "model_type": "nanochat",
    "hidden_act": "relu2",
    "attention_bias": False,
    "tie_word_embeddings": False,
}
LAYER_WEIGHTS = {  # their name within a layer: ours
    "self_attn.q_proj": "attn.c_q",
    "self_attn.k_proj": "attn.c_k",
    "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
}
TABLES = {"model.embed_tokens": "wte", "lm_head": "lm_head"}  # a row for each id

# {% generation %} is transformers' mark of what the assistant wrote: its tokens are those of the mask in `chat.py`.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
  {%- if content is not string -%}
    {{- raise_exception('a content must be a text, or of the assistant a list of parts') -}}
  {%- endif -%}
  {%- for name in SPECIAL_TOKENS -%}
    {%- if name in content -%}
      {{- raise_exception('a message holds the name of the special token ' + name) -}}
    {%- endif -%}
  {%- endfor -%}
  {{- content -}}
{%- endmacro -%}
{{- '<|bos|>' -}}
{%- set has_system = messages[0]['role'] == 'system' -%}
{%- set turns = messages[1:] if has_system else messages -%}
{%- for message in turns -%}
  {%- if message['role'] != ('assistant' if loop.index0 % 2 else 'user') -%}
    {{- raise_exception('after a system message, if any, user and assistant must take turns') -}}
  {%- elif message['role'] == 'user' -%}
    {{- '<|user_start|>' -}}
    {%- if has_system and loop.first -%}
      {{- text(messages[0]['content']) + '\\n\\n' -}}
    {%- endif -%}
    {{- text(message['content']) + '<|user_end|>' -}}
  {%- else -%}
    {{- '<|assistant_start|>' -}}
    {%- set content = message['content'] -%}
    {%- set parts = [{'type': 'text', 'text': content}] if content is string else content -%}
    {%- set said = namespace(text='') -%}
    {%- for part in parts -%}
      {%- if part['type'] == 'text' -%}
        {%- set said.text = said.text + text(part['text']) -%}
      {%- elif part['type'] == 'python' -%}
        {%- set said.text = said.text + '<|python_start|>' + text(part['text']) + '<|python_end|>' -%}
      {%- elif part['type'] == 'python_output' -%}
        {%- if said.text -%}
          {%- generation -%}{{- said.text -}}{%- endgeneration -%}
        {%- endif -%}
        {%- set said.text = '' -%}
        {{- '<|output_start|>' + text(part['text']) + '<|output_end|>' -}}
      {%- else -%}
        {{- raise_exception('the type of a part must be text, python or python_output') -}}
      {%- endif -%}
    {%- endfor -%}
    {%- generation -%}{{- said.text + '<|assistant_end|>' -}}{%- endgeneration -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1]['role'] == 'user' -%}
  {{- '<|assistant_start|>' -}}
{%- endif -%}
"""


def save_hf(model: GPT, tokenizer: Tokenizer, folder: Path) -> None:
    """Write `model` and `tokenizer` to `folder`, replacing what an earlier call wrote there.

    Raises `UserError` when the model has features without a counterpart, the tokenizer is not the model's or splits
    text by an unknown pattern, or the folder cannot be written.
    """
    _check_model(model.config)
    _check_pattern(tokenizer.pattern)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; use the tokenizer "
            f"that the model was trained with"
        )
    with disk_errors("the model", folder):
        folder.mkdir(parents=True, exist_ok=True)
    files = {
        TOKENIZER_FILE: tokenizer_spec(tokenizer),
        TOKENIZER_SETTINGS_FILE: _tokenizer_settings(tokenizer, model.config.sequence_len),
        GENERATION_FILE: _generation_settings(tokenizer),
        CONFIG_FILE: _model_settings(model.config, tokenizer),
    }
    _save_tensors(folder / WEIGHTS_FILE, _to_their_weights(model))
    for name, content in files.items():
        write_atomic(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def load_hf(
    folder: Path, *, device: torch.device | str = "cpu", compute_dtype: torch.dtype = torch.float32
) -> tuple[GPT, Tokenizer]:
    """The model, on `device`, and the tokenizer of a folder that `save_hf` or transformers' `save_pretrained` wrote.

    Rows of the tables that the tokenizer has no ids for are left out. Raises `UserError` when a file is missing or
    broken, or the folder holds another architecture or another kind of tokenizer.
    """
    settings = _read_json(folder / CONFIG_FILE)
    tokenizer = parse_tokenizer_spec(_read_json(folder / TOKENIZER_FILE), folder / TOKENIZER_FILE)
    config = _parse_model_settings(settings, tokenizer.vocab_size, folder / CONFIG_FILE)
    model = build_model(config, device=device, compute_dtype=compute_dtype)
    try:
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"cannot read {folder / WEIGHTS_FILE} ({error}); the weights must be in this one file"
        ) from error
    _from_their_weights(model, tensors, settings["vocab_size"], folder / WEIGHTS_FILE)
    return model, tokenizer


# --- architecture --------------------------------------------------------------------------------


def _check_model(config: GPTConfig) -> None:
    """Raise `UserError` naming what NanoChat of transformers does not have."""
    features = {
        "sliding windows": any(config.window(layer) for layer in range(config.n_layer)),
        "scaled QK-norm": config.qk_scale != 1.0,
        "value embeddings": config.value_embeds,
        "scalars on the residual stream": config.residual_scalars,
        "smear": config.smear,
        "backout": config.backout,
    }
    if present := [name for name, is_there in features.items() if is_there]:
        raise UserError(
            f"the model has no counterpart in Hugging Face transformers: it has {', '.join(present)}; "
            f"only models of the first release's architecture do (scripts.base_train --arch october-2025)"
        )


def _model_settings(config: GPTConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["NanoChatForCausalLM"],
        **FIXED_SETTINGS,
        "dtype": "float32",
        "vocab_size": config.vocab_size,
        "hidden_size": config.n_embd,
        "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": NORM_EPS,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
        "final_logit_softcapping": config.softcap,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": tokenizer.special_id("<|assistant_end|>"),
        "pad_token_id": None,  # the embedding of a padding id would get no gradient
    }


def _parse_model_settings(settings: dict[str, Any], vocab_size: int, path: Path) -> GPTConfig:
    """The config for `vocab_size` ids; `UserError` names the setting of config.json that rules it out."""
    for name, value in FIXED_SETTINGS.items():
        if settings.get(name, value if name != "model_type" else None) != value:
            raise UserError(f"{path} is of another architecture: {name} is {settings.get(name)!r}, not {value!r}")
    try:
        rope = settings.get("rope_parameters") or {"rope_theta": settings["rope_theta"]}
        heads, width = settings["num_attention_heads"], settings["hidden_size"]
        config = GPTConfig.october_2025(
            settings["num_hidden_layers"],
            vocab_size=vocab_size,
            sequence_len=settings["max_position_embeddings"],
            n_embd=width,
            n_head=heads,
            n_kv_head=settings.get("num_key_value_heads") or heads,
            rope_base=float(rope["rope_theta"]),
            softcap=float(settings["final_logit_softcapping"]),
        )
        faults = {
            "intermediate_size": settings["intermediate_size"] != 4 * width,
            "head_dim": settings.get("head_dim", config.head_dim) != config.head_dim,
            "rope_parameters": rope.get("rope_type", "default") != "default",
            "rms_norm_eps": not 0 <= settings["rms_norm_eps"] <= MAX_NORM_EPS,
            "vocab_size": settings["vocab_size"] < vocab_size,
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the config of a NanoChat model ({type(error).__name__}: {error})") from error
    if fault := next((name for name, is_there in faults.items() if is_there), None):
        raise UserError(f"{path} has no counterpart here: {fault} is {settings.get(fault)!r}")
    return config


def _generation_settings(tokenizer: Tokenizer) -> dict[str, Any]:
    ends = {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids)}
    return {**ends, "pad_token_id": tokenizer.special_id("<|assistant_end|>")}


# --- weights -------------------------------------------------------------------------------------


def _weight_names(config: GPTConfig) -> dict[str, str]:
    """Our name of each of their weights."""
    names = {f"{theirs}.weight": f"{ours}.weight" for theirs, ours in TABLES.items()}
    for layer in range(config.n_layer):
        for theirs, ours in LAYER_WEIGHTS.items():
            names[f"model.layers.{layer}.{theirs}.weight"] = f"h.{layer}.{ours}.weight"
    return names


def _to_their_weights(model: GPT) -> dict[str, Tensor]:
    """The weights by their names, on the CPU, float32, each in storage of its own."""
    ours, weights = model.state_dict(), {}
    for their_name, our_name in _weight_names(model.config).items():
        weight = ours[our_name]
        if our_name.removesuffix(".weight") in TABLES.values():
            weight = weight[: model.config.vocab_size]
        weights[their_name] = weight.to("cpu", torch.float32, copy=True, memory_format=torch.contiguous_format)
    return weights


@torch.no_grad()
def _from_their_weights(model: GPT, tensors: Mapping[str, Tensor], num_rows: int, path: Path) -> None:
    """Fill `model`; `num_rows` rows of each table are in the file. Padded rows become zero."""
    names = _weight_names(model.config)
    if odd := set(tensors) ^ set(names):
        raise UserError(f"{path} does not have the weights its config asks for: {min(odd)} is missing or too many")
    ours, V = model.state_dict(), model.config.vocab_size
    for their_name, our_name in names.items():
        theirs, weight = tensors[their_name], ours[our_name]  # `weight` shares the parameter's storage
        is_table = our_name.removesuffix(".weight") in TABLES.values()
        expected = (num_rows, weight.size(1)) if is_table else tuple(weight.shape)
        if tuple(theirs.shape) != expected:
            raise UserError(f"{path}: {their_name} has the shape {tuple(theirs.shape)}, not {expected}")
        if is_table:
            weight[V:] = 0
            weight, theirs = weight[:V], theirs[:V]
        weight.copy_(theirs)


def _save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with disk_errors("the weights", path):
            save_file(tensors, partial, metadata={"format": "pt"})
            os.replace(partial, path)
    except SafetensorError as error:  # a full disk, among others
        raise UserError(f"cannot write the weights to {path}: {error}") from error
    finally:
        partial.unlink(missing_ok=True)


# --- tokenizer -----------------------------------------------------------------------------------


def _byte_characters() -> list[str]:
    """The character that stands for each byte in tokenizer.json, as in GPT-2: a visible one for itself, for the
    others those from U+0100 on, in order."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(0x100)
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(NUM_BYTES)]


BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


def derive_merges(tokens: Sequence[bytes]) -> list[tuple[bytes, bytes]]:
    """The pairs of tokens that join to another one, in the order of that one's id, at most one for each token.

    Ours are tokens with a rank: whatever two neighbours make up the lowest one are joined. tokenizer.json instead
    lists the pairs that may join. The pair of a token is what joining leaves of its bytes before the last step. No
    other pair is ever met: until neighbours within a longer text become this token, nothing has joined across their
    ends, so what lies between went through the same steps as it does alone. A token whose bytes do not come down to
    two parts has no pair; it is only ever found as a whole chunk of text, as "ignore_merges" has it.
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
    """Only of these patterns is it known that the `tokenizers` package splits every text as we do."""
    if pattern not in {rustbpe.split_pattern(digits) for digits in (1, 2, 3)}:
        raise UserError(f"the tokenizer's split pattern {pattern!r} is not one that Hugging Face folders can have here")


def tokenizer_spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json as the `tokenizers` package reads it: the same ids for every text (see the module's head)."""
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size - len(tokenizer.special_ids))]
    split = {"type": "Split", "pattern": {"Regex": tokenizer.pattern}, "behavior": "Isolated", "invert": False}
    to_characters = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": i, "content": name, **plain} for name, i in tokenizer.special_ids.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, to_characters]},
        "post_processor": _bos_in_front(tokenizer),
        "decoder": to_characters,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,
            "vocab": {_characters(token): i for i, token in enumerate(tokens)},
            "merges": [[_characters(left), _characters(right)] for left, right in derive_merges(tokens)],
        },
    }


def _bos_in_front(tokenizer: Tokenizer) -> dict[str, Any]:
    bos = {"SpecialToken": {"id": "<|bos|>", "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    ids = {"id": "<|bos|>", "ids": [tokenizer.bos_id], "tokens": ["<|bos|>"]}
    return {
        "type": "TemplateProcessing",
        "single": [bos, first],
        "pair": [bos, first, second],
        "special_tokens": {"<|bos|>": ids},
    }


def _characters(token: bytes) -> str:
    return "".join(BYTE_TO_CHARACTER[byte] for byte in token)


def _tokenizer_settings(tokenizer: Tokenizer, sequence_len: int) -> dict[str, Any]:
    names = json.dumps(list(tokenizer.special_ids))  # a list of strings reads the same in Jinja
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|assistant_end|>",
        "pad_token": "<|assistant_end|>",
        "clean_up_tokenization_spaces": False,
        "model_max_length": sequence_len,
        "chat_template": CHAT_TEMPLATE.replace("SPECIAL_TOKENS", names),
    }


def parse_tokenizer_spec(spec: dict[str, Any], path: Path) -> Tokenizer:
    """The tokenizer that a tokenizer.json describes. Raises `UserError` when it would give other ids than that."""
    try:
        vocab, added = spec["model"]["vocab"], spec["added_tokens"]
        names = sorted(vocab, key=vocab.get)
        tokens = [bytes(CHARACTER_TO_BYTE[character] for character in name) for name in names]
        special = sorted(added, key=lambda token: token["id"])
        is_numbered = [vocab[name] for name in names] + [token["id"] for token in special]
        fault = "" if is_numbered == list(range(len(tokens) + len(special))) else "ids are not 0, 1, 2, ..."
        fault = fault or _spec_fault(spec, tokens)
        pattern = "" if fault else spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"]
        special_names = [token["content"] for token in special]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise UserError(f"{path} is not a byte-level tokenizer like ours ({fault})")
    _check_pattern(pattern)
    return Tokenizer(tokens, pattern, special_names)


def _spec_fault(spec: dict[str, Any], tokens: list[bytes]) -> str:
    """What makes a tokenizer.json give other ids than ranks do, "" for nothing."""
    split, to_characters = spec["pre_tokenizer"]["pretokenizers"]
    if spec["normalizer"] is not None or spec["model"]["type"] != "BPE":
        return "it changes the text first, or is no BPE"
    if (split["type"], split["behavior"], split["invert"]) != ("Split", "Isolated", False):
        return f"its text is split by {split}"
    if to_characters["type"] != "ByteLevel" or to_characters["add_prefix_space"] or to_characters["use_regex"]:
        return f"its bytes become characters by {to_characters}"
    derived = [(_characters(left), _characters(right)) for left, right in derive_merges(tokens)]
    known, listed = set(derived), [tuple(pair) for pair in spec["model"]["merges"]]
    if [pair for pair in listed if pair in known] != derived:  # further ones are never met, see `derive_merges`
        return "its merges do not follow from the order of its tokens"
    if not spec["model"]["ignore_merges"] and len(derived) < len(tokens) - NUM_BYTES:
        return "some of its tokens are never reached"
    return ""


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); give the folder of a Hugging Face model") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content
