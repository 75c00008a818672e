"""Folders for transformers and mlx-lm, written and read.

    config.json, generation_config.json, model.safetensors        the model (others shard it: then an index lists files)
    tokenizer.json, tokenizer_config.json                         the tokenizer and the conversation format
    configuration_nanochat.py, modeling_nanochat.py               its code, where transformers has none of its own

- Models of the October 2025 architecture are in the form of transformers' NanoChat, or in that of mlx-lm's `nanochat`,
  which takes the weights' names from the first release. All others bring copies of the two files of that name here,
  which transformers runs with `trust_remote_code=True`.
- The tables have one row per id there. Our padded rows, which no token and no logit uses, are left out.
- tokenizer.json gives our ids for any text (`hf_tokenizer.py`), with <|bos|> in front unless the caller passes
  add_special_tokens=False. The format itself causes one difference: the name of a special token within a text becomes
  that token, unless the caller passes split_special_tokens=True. In nanochat, text is never more than text.
- The conversation format is the Jinja template `chat_template.jinja`; it gives the ids of `chat.py`. Since a rendered
  conversation is tokenized as text, the template refuses messages that contain the name of a special token: they could
  end a turn wherever their author likes.

Not here: downloads, GGUF files (`gguf_file.py`), and the README of a folder (`nanochat/model_card.py`).
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from nanochat.checkpoint import save_tensors
from nanochat.common import UserError, disk_errors, write_atomic
from nanochat.model.gpt import GPT, NORM_EPS, GPTConfig, build_model
from nanochat.model.hf_tokenizer import check_pattern, parse_tokenizer_spec, template, tokenizer_spec
from nanochat.tokenizer import Tokenizer

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
SHARDS_FILE = "model.safetensors.index.json"  # instead, where others have written the weights as several files
TOKENIZER_FILE = "tokenizer.json"
SETTINGS_FILE = "tokenizer_config.json"
GENERATION_FILE = "generation_config.json"
README_FILE = "README.md"
FILES = {  # of every folder, with a few words on each
    WEIGHTS_FILE: "the weights", CONFIG_FILE: "the model's shape", TOKENIZER_FILE: "the vocabulary",
    SETTINGS_FILE: "special tokens and the chat template", GENERATION_FILE: "the tokens that end a reply",
}  # fmt: skip
CODE_FILES = {
    "modeling_nanochat.py": "the model's code for transformers",
    "configuration_nanochat.py": "the settings that this code reads",
}

# {% generation %} marks what the assistant wrote: its tokens are those of the loss mask in `chat.py`.
CHAT_TEMPLATE_PATH = Path(__file__).with_name("chat_template.jinja")
MAX_NORM_EPS = 1e-6  # transformers' default, which some folders name; it moves the logits by 2e-5
SOFTCAP = 15.0  # transformers' default: the first published folders name none, or call it logits_soft_cap
MAX_PADDED_ROWS = 255  # of the tables beyond the tokenizer's ids
MLX_SOFTCAP = 15.0  # of mlx-lm's model, which has no setting for it
FIXED_SETTINGS = ("model_type", "hidden_act", "attention_bias", "tie_word_embeddings")
ORIGIN = "nanochat"  # a setting of our exports, which other programs leave alone
RECIPE = "nanochat_recipe"  # the model_type of models with code of their own
RECIPE_SETTINGS = {  # our field: its name there, where that is another one
    "sequence_len": "max_position_embeddings", "n_layer": "num_hidden_layers", "n_embd": "hidden_size",
    "n_head": "num_attention_heads", "n_kv_head": "num_key_value_heads", "short_window": "sliding_window",
    "rope_base": "rope_theta", "softcap": "final_logit_softcapping",
}  # fmt: skip
LAYER_WEIGHTS = {  # their name within a layer: ours
    "self_attn.q_proj": "attn.c_q", "self_attn.k_proj": "attn.c_k", "self_attn.v_proj": "attn.c_v",
    "self_attn.o_proj": "attn.c_proj", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
}  # fmt: skip
TABLES = ("wte.weight", "embed_tokens.weight", "value_embeds.weight", "lm_head.weight")  # a row for each id


def save_hf(
    model: GPT, tokenizer: Tokenizer, folder: Path, *, dtype: torch.dtype = torch.float32, for_mlx: bool = False,
    origin: Mapping[str, Any] | None = None,
) -> dict[str, str]:  # fmt: skip
    """Write `model`, its weights in `dtype`, and `tokenizer` to `folder`, which is new or empty. `origin` is what else
    an import should find: stage and examples. Returns the files and a few words on each. Raises `UserError` when mlx-lm
    has no counterpart of the model, the tokenizer is not the model's or splits text by an unknown pattern, or the
    folder cannot be written or is not empty."""
    config = model.config
    check_tokenizer(model, tokenizer)
    if for_mlx:
        check_plain(config, "mlx-lm")
    has_code = not for_mlx and not is_plain(config)
    files = FILES | (CODE_FILES if has_code else {})
    prepare_folder(folder)
    weights = _by_their_names(model, "release" if for_mlx or has_code else "transformers")
    _save_weights(weights, folder / WEIGHTS_FILE, dtype, "mlx" if for_mlx else "pt")
    end = tokenizer.special_id("<|assistant_end|>")
    settings = {"model_max_length": config.sequence_len, "chat_template": chat_template(tokenizer)}
    contents = {
        TOKENIZER_FILE: tokenizer_spec(tokenizer),
        SETTINGS_FILE: template(SETTINGS_FILE) | settings,
        GENERATION_FILE: {"bos_token_id": tokenizer.bos_id, "eos_token_id": sorted(tokenizer.stop_ids),
                          "pad_token_id": end},
        CONFIG_FILE: _model_settings(config, dtype, bos_id=tokenizer.bos_id, end_id=end)
        | ({ORIGIN: origin} if origin else {}),
    }  # fmt: skip
    for name in CODE_FILES if has_code else ():
        write_atomic(folder / name, Path(__file__).with_name(name).read_bytes())
    for name, content in contents.items():
        write_atomic(folder / name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return files


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
    """What `load_hf` reads before the weights: the model's config, the tokenizer, and the rows of the tables."""
    path = folder / CONFIG_FILE
    settings = read_json(path)
    is_recipe = settings.get("model_type") == RECIPE
    if not is_recipe:
        _check_architecture(settings, path)  # first, as another one mostly has another tokenizer too
    tokenizer = parse_tokenizer_spec(read_json(folder / TOKENIZER_FILE), folder / TOKENIZER_FILE)
    parse = _parse_recipe_settings if is_recipe else _parse_plain_settings
    config, num_rows = parse(settings, tokenizer.vocab_size, path), settings["vocab_size"]
    if not config.vocab_size <= num_rows <= config.vocab_size + MAX_PADDED_ROWS:
        fault = f"{path} says that the tables have {num_rows} rows, but the tokenizer has {config.vocab_size} ids"
        raise UserError(f"{fault}; take the tokenizer that the model was trained with")
    return config, tokenizer, num_rows


def read_origin(folder: Path) -> dict[str, Any]:
    """The `origin` that `save_hf` wrote; empty for a folder that others made."""
    origin = read_json(folder / CONFIG_FILE).get(ORIGIN)
    return origin if isinstance(origin, dict) else {}


def chat_template(tokenizer: Tokenizer) -> str:
    names = json.dumps(list(tokenizer.special_ids))  # a list of strings reads the same in Jinja
    return CHAT_TEMPLATE_PATH.read_text(encoding="utf-8").replace("SPECIAL_TOKENS", names)


def check_tokenizer(model: GPT, tokenizer: Tokenizer) -> None:
    """Raise `UserError` unless the tokenizer has the model's ids, and a pattern that other programs know."""
    check_pattern(tokenizer.pattern)
    if tokenizer.vocab_size != model.config.vocab_size:
        remedy = "use the tokenizer that the model was trained with"
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, the model {model.config.vocab_size}; {remedy}")


def prepare_folder(folder: Path) -> None:
    """Make a folder to export to. Raises `UserError` where it holds anything but hidden files: nothing may be lost."""
    with disk_errors("the model", folder):
        folder.mkdir(parents=True, exist_ok=True)
        found = sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))
    if found:
        raise UserError(f"{folder} already holds {found[0]}; give a new folder, or remove what is in this one")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file of a model. Raises `UserError` when it cannot be read or holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path} ({error}); give the folder of a whole model, or fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must hold a JSON object")
    return content


# --- architecture --------------------------------------------------------------------------------


def _features(config: GPTConfig) -> list[str]:
    """What the model has beyond the October 2025 architecture."""
    features = {
        "sliding windows": any(config.window(layer) for layer in range(config.n_layer)),
        "scaled QK-norm": config.qk_scale != 1.0, "value embeddings": config.value_embeds,
        "scalars on the residual stream": config.residual_scalars, "smear": config.smear, "backout": config.backout,
    }  # fmt: skip
    return [name for name, is_there in features.items() if is_there]


def is_plain(config: GPTConfig) -> bool:
    """Whether the architecture is that of October 2025."""
    return not _features(config)


def check_plain(config: GPTConfig, program: str) -> None:
    """Raise `UserError` naming what the model has that `program` has not."""
    features = _features(config)
    if program == "mlx-lm" and config.softcap != MLX_SOFTCAP:
        features.append(f"a soft cap of {config.softcap} instead of {MLX_SOFTCAP}")
    if features:
        remedy = "only models of the first release's architecture do (scripts.base_train --arch october-2025)"
        raise UserError(f"the model has no counterpart in {program}: it has {', '.join(features)}; {remedy}")


def _model_settings(config: GPTConfig, dtype: torch.dtype, *, bos_id: int, end_id: int) -> dict[str, Any]:
    """config.json. It has no padding id: the embedding of one would get no gradient."""
    ids = {"dtype": str(dtype).removeprefix("torch."), "bos_token_id": bos_id, "eos_token_id": end_id}
    if not is_plain(config):
        named = {RECIPE_SETTINGS.get(name, name): value for name, value in asdict(config).items()}
        return template(RECIPE) | named | ids
    settings = template(CONFIG_FILE)
    settings["rope_parameters"]["rope_theta"] = config.rope_base
    return settings | {
        "vocab_size": config.vocab_size, "hidden_size": config.n_embd, "intermediate_size": 4 * config.n_embd,
        "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head, "max_position_embeddings": config.sequence_len,
        "rms_norm_eps": NORM_EPS, "final_logit_softcapping": config.softcap,
        "rope_theta": config.rope_base,  # where mlx-lm reads it
        **ids,
    }  # fmt: skip


def _parse_recipe_settings(settings: dict[str, Any], vocab_size: int, path: Path) -> GPTConfig:
    """The config for `vocab_size` ids of a model with code of its own. Raises `UserError` naming a setting that is
    missing or odd."""
    values = {}
    for field in fields(GPTConfig):
        name = RECIPE_SETTINGS.get(field.name, field.name)
        value = settings.get(name)
        if type(value) is not field.type and (type(value), field.type) != (int, float):
            raise UserError(f"{path} is not the config of a nanochat model: {name} is {value!r}")
        values[field.name] = value
    return GPTConfig(**values | {"vocab_size": vocab_size})


def _check_architecture(settings: dict[str, Any], path: Path) -> None:
    fixed = template(CONFIG_FILE)
    for name in FIXED_SETTINGS:
        value = fixed[name]
        if settings.get(name, None if name == "model_type" else value) != value:
            raise UserError(f"{path} is of another architecture: {name} is {settings.get(name)!r}, not {value!r}")


def _parse_plain_settings(settings: dict[str, Any], vocab_size: int, path: Path) -> GPTConfig:
    """The config for `vocab_size` ids. Raises a `UserError` that names the offending setting of config.json."""
    try:
        rope = settings.get("rope_parameters") or {"rope_theta": settings["rope_theta"]}
        heads, width = settings["num_attention_heads"], settings["hidden_size"]
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
            **{name: type(settings[name]) is not int for name in ("vocab_size", "num_hidden_layers", "hidden_size")},
        }
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is not the config of a NanoChat model ({type(error).__name__}: {error})") from error
    if odd := [name for name in is_odd if is_odd[name]]:
        raise UserError(f"{path} has no counterpart here: {odd[0]} is {settings.get(odd[0])!r}")
    return config


# --- weights -------------------------------------------------------------------------------------


def _by_their_names(model: GPT, layout: str = "transformers") -> dict[str, Tensor]:
    """The model's parameters, or views of them: the tables come without their padded rows. `layout` is "transformers",
    for its NanoChat, or "release": the first release's names, which mlx-lm has too, and our own code."""
    V = model.config.vocab_size
    ours = {name: weight[:V] if name.endswith(TABLES) else weight for name, weight in model.named_parameters()}
    if layout == "release":
        return {name if name.startswith("lm_head") else f"transformer.{name}": ours[name] for name in ours}
    weights = {"model.embed_tokens.weight": ours["wte.weight"], "lm_head.weight": ours["lm_head.weight"]}
    for layer in range(model.config.n_layer):
        for theirs, name in LAYER_WEIGHTS.items():
            weights[f"model.layers.{layer}.{theirs}.weight"] = ours[f"h.{layer}.{name}.weight"]
    return weights


@torch.no_grad()
def _save_weights(weights: dict[str, Tensor], path: Path, dtype: torch.dtype, kind: str) -> None:
    own_storage = {"device": "cpu", "dtype": dtype, "copy": True, "memory_format": torch.contiguous_format}
    tensors = {name: weight.to(**own_storage) for name, weight in weights.items()}
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with disk_errors("the weights", path):
            save_tensors(partial, tensors, {"format": kind})
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@torch.no_grad()
def _load_weights(model: GPT, folder: Path, *, num_rows: int) -> None:
    """Fill `model` from files whose tables have `num_rows` rows. The model's padded rows become zero."""
    files = {}  # by the names of tensors
    with ExitStack() as stack:
        for path in _weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read {path} ({error}); fetch the folder's weights again") from error
            files |= dict.fromkeys(file.keys(), file)
        weights = _by_their_names(model, "release" if "transformer.wte.weight" in files else "transformers")
        if odd := set(files) ^ set(weights):
            raise UserError(
                f"{folder} does not have the weights its config asks for: {min(odd)} is missing or too many"
            )
        for table in (model.wte, model.value_embeds, model.lm_head):
            if table is not None:
                table.weight.zero_()
        for name, weight in weights.items():
            shape = (num_rows, *weight.shape[1:]) if name.endswith(TABLES) else tuple(weight.shape)
            tensor = files[name].get_tensor(name)
            if tensor.shape != shape:
                raise UserError(f"{folder}: {name} has the shape {tuple(tensor.shape)}, not {shape}")
            weight.copy_(tensor[: weight.size(0)])


def _weight_files(folder: Path) -> list[Path]:
    index = folder / SHARDS_FILE
    if not index.exists():
        return [folder / WEIGHTS_FILE]
    shards = read_json(index).get("weight_map")
    names = set(shards.values()) if isinstance(shards, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise UserError(f"{index} does not list the files of the weights in this folder")
    return [folder / name for name in sorted(names)]
