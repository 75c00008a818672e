"""A model in the files of nanochat's first public release (October 2025). Reading them executes nothing.

    model_000650.pt      the weights, maybe of a compiled model, some in bfloat16
    meta_000650.json     among other things model_config, the shape of the model
    tokenizer.pkl        a pickled `tiktoken.Encoding`; a tokenizer.json will do instead
    token_bytes.pt       the length of each token: no tokenizer, but a check of one

A pickle is a program: it may import and call anything. PyTorch reads model files with a loader that knows tensors only,
and `read_encoding` follows the few instructions of a pickled encoding itself, up to the values that it would be given.

Not here: downloads, and later releases, whose models have parts that the first one lacks (a `UserError` names them).
"""

import pickle
import pickletools
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.model.gpt import GPT, GPTConfig, build_model
from nanochat.model.hf import read_json
from nanochat.model.hf_tokenizer import parse_tokenizer_spec
from nanochat.tokenizer import Tokenizer

MODEL_FILE = re.compile(r"model_(\d+)\.pt")
TOKENIZER_FILES = ("tokenizer.pkl", "tokenizer.json")
TOKEN_BYTES_FILE = "token_bytes.pt"
STAGES = {  # by the names of its folders
    "base_checkpoints": "base", "mid_checkpoints": "mid", "chatsft_checkpoints": "sft", "chatrl_checkpoints": "rl",
}  # fmt: skip
SHAPE = {"sequence_len", "vocab_size", "n_layer", "n_head", "n_kv_head", "n_embd"}  # of model_config
ENCODING = "tiktoken.core.Encoding"
LITERALS = {  # instructions of a pickle that push a value
    "SHORT_BINUNICODE", "BINUNICODE", "SHORT_BINBYTES", "BINBYTES", "BININT", "BININT1", "BININT2",
}  # fmt: skip
MARK = object()
COMPILED_PREFIX = "_orig_mod."
MAX_NAMED = 4  # things named in a message


@dataclass(frozen=True)
class ReleaseFiles:
    """The files of one model, as paths below the folder or repository that holds them; "" for one it lacks."""

    model: str
    meta: str
    tokenizer: str
    token_bytes: str

    @property
    def stage(self) -> str:
        """The stage that the release's name of the folder tells, "" where it tells none."""
        return next((STAGES[part] for part in PurePosixPath(self.model).parts if part in STAGES), "")

    @property
    def step(self) -> int:
        return int(MODEL_FILE.fullmatch(PurePosixPath(self.model).name)[1])

    @property
    def names(self) -> list[str]:
        return [name for name in (self.model, self.meta, self.tokenizer, self.token_bytes) if name]


def find_release(names: Collection[str], folder: str = "") -> ReleaseFiles | None:
    """The files of the model of the last step below `folder` among `names`; the tokenizer lies beside it, or above it,
    or there in a folder `tokenizer`. None where there is no model. Raises `UserError` when there are models in several
    folders, or a file that is needed is missing."""
    models = [PurePosixPath(name) for name in names if MODEL_FILE.fullmatch(PurePosixPath(name).name)]
    models = [model for model in models if model.is_relative_to(folder)]
    if not models:
        return None
    folders = sorted({str(model.parent) for model in models})
    if len(folders) > 1:
        raise UserError(f"there are models in several folders ({_some(folders)}); give the one that you want")
    model = max(models, key=lambda path: int(MODEL_FILE.fullmatch(path.name)[1]))
    meta = model.with_name(model.name.replace("model_", "meta_")).with_suffix(".json")
    around = [place for parent in model.parents for place in (parent, parent / "tokenizer")]
    known = frozenset(names)
    tokenizer = next((str(at / name) for at in around for name in TOKENIZER_FILES if str(at / name) in known), "")
    lengths = next((str(at / TOKEN_BYTES_FILE) for at in around if str(at / TOKEN_BYTES_FILE) in known), "")
    if str(meta) not in known:
        raise UserError(f"{model} comes without {meta.name}, which has the shape of the model; put it beside it")
    if not tokenizer:
        only = f"{lengths} has only the lengths of the tokens: " if lengths else ""
        raise UserError(f"{only}{model} needs {' or '.join(TOKENIZER_FILES)} too; put one beside it")
    return ReleaseFiles(str(model), str(meta), tokenizer, lengths)


def load_release(root: Path, files: ReleaseFiles) -> tuple[GPT, Tokenizer, dict]:
    """The model in float32 on the CPU, the tokenizer, and what the release's meta says, of `files` below `root`. Raises
    `UserError` when a file is missing or broken, would run code, is of a later release, or does not fit the others."""
    meta_path, model_path, tokenizer_path = root / files.meta, root / files.model, root / files.tokenizer
    meta = read_json(meta_path)
    tokenizer = read_tokenizer(tokenizer_path)
    if files.token_bytes:
        check_token_bytes(root / files.token_bytes, tokenizer, tokenizer_path)
    config = _parse_config(meta.get("model_config"), meta_path)
    if config.vocab_size != tokenizer.vocab_size:
        fault = f"{meta_path} has a vocabulary of {config.vocab_size}, {tokenizer_path} one of {tokenizer.vocab_size}"
        raise UserError(f"{fault}; take the tokenizer that the model was trained with")
    model = build_model(config)
    _fill(model, model_path)
    return model, tokenizer, meta


def _some(names: Collection[str]) -> str:
    more = f" and {len(names) - MAX_NAMED} more" if len(names) > MAX_NAMED else ""
    return ", ".join(sorted(names)[:MAX_NAMED]) + more


# --- model ---------------------------------------------------------------------------------------


def _parse_config(shape: Any, path: Path) -> GPTConfig:
    if not isinstance(shape, dict) or any(type(shape.get(name)) is not int for name in SHAPE):
        raise UserError(f"{path} has no model_config with {', '.join(sorted(SHAPE))}")
    if later := set(shape) - SHAPE:
        raise UserError(f"{path} is of a later release: its model has {_some(later)}, which the first one's has not")
    depth, rest = shape["n_layer"], {name: value for name, value in shape.items() if name != "n_layer"}
    return GPTConfig.october_2025(depth, **rest)


def _load(path: Path) -> Any:
    """What `torch.save` wrote, by the loader that knows tensors only."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f"it would call {named[1]}" if named else "it holds more than tensors"
        raise UserError(f"{path} is refused: {what}, and nothing but tensors is loaded from such a file") from error
    except (OSError, RuntimeError, EOFError, ValueError) as error:
        reason = str(error).splitlines()[0][:120] if str(error) else type(error).__name__
        raise UserError(f"cannot read {path} ({reason}); fetch it again") from error


@torch.no_grad()
def _fill(model: GPT, path: Path) -> None:
    """Copy the tensors of `path` into `model`. The tables may have rows beyond the vocabulary, which no token uses."""
    state = _load(path)
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise UserError(f"{path} does not hold tensors by name")
    tensors = {str(name).removeprefix(COMPILED_PREFIX): tensor for name, tensor in state.items()}
    ours = {name if name == "lm_head.weight" else f"transformer.{name}": p for name, p in model.named_parameters()}
    if later := set(tensors) - set(ours):
        raise UserError(f"{path} is not of the first release: it has {_some(later)}; only that one's can be imported")
    if missing := set(ours) - set(tensors):
        raise UserError(f"{path} does not fit its meta file: {_some(missing)} is missing")
    V = model.config.vocab_size
    for name, weight in ours.items():
        found = tensors[name]
        is_table = name in ("transformer.wte.weight", "lm_head.weight")
        rows = V if is_table else weight.size(0)
        if found.shape != (rows, weight.size(1)) and not (is_table and found.shape == weight.shape):
            shape = f"{tuple(found.shape)}, not {(rows, weight.size(1))}"
            raise UserError(f"{path} does not fit its meta file and tokenizer: {name} has the shape {shape}")
        if is_table:
            weight.zero_()
        weight[:rows] = found[:rows].to(weight.dtype)


# --- tokenizer -----------------------------------------------------------------------------------


def read_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer of a tokenizer.pkl or tokenizer.json. Raises `UserError` when it is broken or would run code."""
    return parse_tokenizer_spec(read_json(path), path) if path.suffix == ".json" else read_encoding(path)


def read_encoding(path: Path) -> Tokenizer:
    """The tokenizer of a pickled `tiktoken.Encoding`, without executing anything. Raises `UserError` for any other
    pickle, or if its ids are not those of a tokenizer of ours."""
    try:
        state = _read_state(path.read_bytes())
    except UserError as error:
        expected = "the tokenizer.pkl of nanochat is a tiktoken.Encoding and nothing else"
        raise UserError(f"{path} is refused: {error}; {expected}") from error
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); fetch it again") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise UserError(f"{path} is no whole pickle ({reason}); fetch it again") from error
    if isinstance(state, str):
        raise UserError(f"{path} only names the encoding {state!r}, it does not hold it; nanochat trains its own")
    try:
        ranks, special, pattern = state["mergeable_ranks"], state["special_tokens"], state["pat_str"]
        tokens, names = sorted(ranks, key=ranks.get), sorted(special, key=special.get)
        ids = [ranks[token] for token in tokens] + [special[name] for name in names]
        is_valid = ids == list(range(len(ids))) and isinstance(pattern, str)
        is_valid = is_valid and {*map(type, tokens)} == {bytes} and {*map(type, names)} <= {str}
    except (TypeError, KeyError, AttributeError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{path} is no tiktoken.Encoding with the ids 0, 1, 2, ..., special tokens last")
    return Tokenizer(tokens, pattern, names)


def _read_state(data: bytes) -> Any:
    """What the pickle `data` would give to the `tiktoken.Encoding` it makes: mostly a dict. Only the instructions that
    such a pickle consists of are followed, and none of them calls anything; `UserError` names any other."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    for instruction, value, _ in pickletools.genops(data):
        name = instruction.name
        if name in LITERALS:
            stack.append(value)
        elif name in ("EMPTY_DICT", "EMPTY_TUPLE", "MARK"):
            stack.append({} if name == "EMPTY_DICT" else () if name == "EMPTY_TUPLE" else MARK)
        elif name in ("MEMOIZE", "BINPUT", "LONG_BINPUT"):
            memo[len(memo) if value is None else value] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(memo[value])
        elif name in ("SETITEM", "SETITEMS"):
            at = len(stack) - 2 if name == "SETITEM" else max(i for i, item in enumerate(stack) if item is MARK)
            items = [item for item in stack[at:] if item is not MARK]
            del stack[at:]
            stack[-1].update(zip(items[::2], items[1::2], strict=True))
        elif name in ("GLOBAL", "STACK_GLOBAL"):
            called = value.replace(" ", ".") if value else ".".join(stack.pop(i) for i in (-2, -1))
            if called != ENCODING:
                raise UserError(f"it would call {' '.join(called.split())[:80]}")
            stack.append(ENCODING)
        elif name == "NEWOBJ":
            if stack.pop() != () or stack[-1] != ENCODING:
                raise ValueError("it makes an object of something else")
        elif name == "BUILD":
            return stack.pop()
        elif name not in ("PROTO", "FRAME"):
            raise UserError(f"it has the instruction {name}")
    raise ValueError("it makes no object")


def check_token_bytes(path: Path, tokenizer: Tokenizer, tokenizer_path: Path) -> None:
    """Raise `UserError` unless the lengths in `path` are those of the tokenizer's ids. The release counted the bytes of
    the decoded text: tokens that are not UTF-8 by themselves have other lengths there, and are not compared."""
    found, ours = _load(path), tokenizer.token_bytes().tolist()
    lengths = found.tolist() if isinstance(found, Tensor) and found.shape == (len(ours),) else None
    comparable = [i for i in range(len(ours)) if "\ufffd" not in tokenizer.decode([i])]
    if lengths is None or any(lengths[i] != ours[i] for i in comparable):
        raise UserError(f"{path} and {tokenizer_path} do not belong together: the tokens have other lengths there")
