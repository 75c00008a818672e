"""The tokenizer as a tokenizer.json, written and read: the same ids for any text, in the `tokenizers` package's format.

Our tokenizer has ranks, that format has merges: `derive_merges` makes the one of the other.

Not here: the other files of a Hugging Face folder (`hf.py`).
"""

import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import rustbpe
from nanochat.common import UserError
from nanochat.tokenizer import NUM_BYTES, Tokenizer

TEMPLATES_PATH = Path(__file__).with_name("hf_templates.json")


def template(name: str) -> dict[str, Any]:
    """The fixed content of a file; null stands where the model's own values go."""
    return json.loads(TEMPLATES_PATH.read_text(encoding="utf-8"))[name]


def _byte_characters() -> list[str]:
    """The character that stands for each byte in tokenizer.json, as in GPT-2: visible ones stand for themselves, the
    others are replaced by the characters from U+0100 on, in order."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    others = itertools.count(0x100)
    return [chr(byte) if byte in visible else chr(next(others)) for byte in range(NUM_BYTES)]


BYTE_TO_CHARACTER = _byte_characters()
CHARACTER_TO_BYTE = {character: byte for byte, character in enumerate(BYTE_TO_CHARACTER)}


def as_characters(token: bytes) -> str:
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


def check_pattern(pattern: str) -> None:
    """Only for these patterns is it known that the `tokenizers` package splits every text as we do."""
    if pattern not in [rustbpe.split_pattern(digits) for digits in (1, 2, 3)]:
        raise UserError(f"the tokenizer's split pattern {pattern!r} is not one that Hugging Face folders can have here")


def tokenizer_spec(tokenizer: Tokenizer) -> dict[str, Any]:
    """tokenizer.json as the `tokenizers` package reads it: the same ids for every text (see the module's docstring)."""
    tokens = [tokenizer.decode_bytes([i]) for i in range(tokenizer.vocab_size - len(tokenizer.special_ids))]
    spec = template("tokenizer.json")
    (flags,) = spec["added_tokens"]
    spec["added_tokens"] = [{"id": i, "content": name, **flags} for name, i in tokenizer.special_ids.items()]
    spec["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = tokenizer.pattern
    spec["post_processor"]["special_tokens"]["<|bos|>"]["ids"] = [tokenizer.bos_id]
    spec["model"]["vocab"] = {as_characters(token): i for i, token in enumerate(tokens)}
    spec["model"]["merges"] = [[as_characters(left), as_characters(right)] for left, right in derive_merges(tokens)]
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
    except (KeyError, TypeError, ValueError, IndexError, AttributeError) as error:
        fault = f"{type(error).__name__}: {error}"
    if fault:
        raise UserError(f"{path} is not a byte-level tokenizer like ours ({fault})")
    check_pattern(pattern)
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
    derived = [(as_characters(left), as_characters(right)) for left, right in derive_merges(tokens)]
    known, listed = set(derived), [tuple(pair) for pair in spec["model"]["merges"]]
    if [pair for pair in listed if pair in known] != derived:  # the other pairs never occur, see `derive_merges`
        return "its merges do not follow from the order of its tokens"
    if not spec["model"]["ignore_merges"] and len(derived) < len(tokens) - NUM_BYTES:
        return "some of its tokens are never reached"
    return ""
