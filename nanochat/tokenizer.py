"""The tokenizer: text to token ids and back, the special tokens, and the files it is kept in.

Not here: how pairs are learnt and merged (the `rustbpe` package), and where special tokens go in a conversation
(`chat.py`). Files are plain: ranks in tiktoken's format, settings as JSON, and a listing for people.
"""

import base64
import binascii
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

import rustbpe
from nanochat.common import UserError, base_dir, disk_errors, write_atomic

SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the tool
    "<|python_end|>",
    "<|output_start|>",  # what the tool answered
    "<|output_end|>",
)
NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 1 << 24  # far beyond any use; larger numbers are typing errors

# GPT-4's split pattern with groups of one or two digits instead of up to three: small vocabularies do better with
# them (0.965 against 0.972 bits per byte, published). The pattern itself is written down once, in rustbpe.
SPLIT_PATTERN = rustbpe.split_pattern(2)

RANKS_FILE = "ranks.tiktoken"  # a line per token: base64 of its bytes, a blank, its rank
SETTINGS_FILE = "settings.json"  # pattern, special tokens and fingerprint; written last, so it vouches for the ranks
TOKEN_BYTES_FILE = "token_bytes.npy"  # the array of `Tokenizer.token_bytes`, for programs without this class
LISTING_FILE = "vocabulary.txt"  # for people; never read back

Progress = Callable[[str, int, int | None], None]  # stage ("count" or "merge"), done, total if known


def tokenizer_dir() -> Path:
    """Folder of the tokenizer that all stages use."""
    return base_dir() / "tokenizer"


class Tokenizer:
    """A vocabulary of byte strings, ids 0 to n-1 in the order they were learnt, then the special tokens.

    Text never encodes to a special token, whatever it says; those are put in by id.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str, special_tokens: Sequence[str] = SPECIAL_TOKENS):
        """`tokens[i]` are the bytes of id `i`. Raises `UserError` when no encoder can be built from this."""
        self.pattern = pattern
        self.special_ids = {name: len(tokens) + i for i, name in enumerate(special_tokens)}
        self._tokens = list(tokens)
        try:
            self._bpe = rustbpe.Tokenizer.from_ranks(list(zip(tokens, range(len(tokens)), strict=True)), pattern)
        except ValueError as error:
            raise UserError(f"the vocabulary cannot be used: {error}") from error
        if len(self.special_ids) < len(special_tokens):
            raise UserError(f"the vocabulary cannot be used: special tokens repeat in {list(special_tokens)}")

    @classmethod
    def train(
        cls, documents: Iterable, vocab_size: int, *, pattern: str = SPLIT_PATTERN, progress: Progress | None = None
    ) -> "Tokenizer":
        """Learn a vocabulary of `vocab_size` tokens, special ones included, from str or Arrow string arrays.

        Smaller when the documents hold too few pairs. `progress(stage, done, total)` is called about ten times a
        second: stage "count" in bytes, "merge" in merges. Raises `UserError` for a size that cannot hold the
        bytes and special tokens, or text that is not valid Unicode; what `documents` raises passes through.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"the vocabulary size is {vocab_size}, but {NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} "
                f"special tokens need at least {MIN_VOCAB_SIZE}"
            )
        bpe = rustbpe.Tokenizer()
        with _valid_unicode():
            bpe.train_from_iterator(documents, vocab_size - len(SPECIAL_TOKENS), pattern=pattern, progress=progress)
        return cls([token for token, _ in bpe.get_mergeable_ranks()], pattern)

    # --- files ---

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises `UserError` when it is missing, malformed or not of one piece."""
        settings = _read_settings(folder / SETTINGS_FILE)
        tokens = parse_ranks(_read(folder / RANKS_FILE), folder / RANKS_FILE)
        tokenizer = cls(tokens, settings["pattern"], settings["special_tokens"])
        if tokenizer.fingerprint != settings["fingerprint"]:
            raise UserError(
                f"{folder / RANKS_FILE} and {SETTINGS_FILE} do not belong together or have been changed; "
                f"train the tokenizer again: python -m scripts.tok_train"
            )
        return tokenizer

    def save(self, folder: Path) -> None:
        """Write the vocabulary to `folder`, and a listing for people. Raises `UserError` when it cannot."""
        settings = {"pattern": self.pattern, "special_tokens": list(self.special_ids), "fingerprint": self.fingerprint}
        with disk_errors("the tokenizer", folder):
            folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / RANKS_FILE, format_ranks(self._tokens))
        write_atomic(folder / LISTING_FILE, self._listing())
        write_atomic(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")

    def _listing(self) -> str:
        """A line per token: id, and its text, with escapes for what is not printable and bytes that are not UTF-8."""
        texts = [repr(token.decode("utf-8", errors="backslashreplace")) for token in self._tokens]
        texts += self.special_ids
        return "".join(f"{i:>7}  {text}\n" for i, text in enumerate(texts))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 in hex of all that decides which ids a text gets: equal for tokenizers that never differ."""
        digest = hashlib.sha256(format_ranks(self._tokens))
        digest.update(json.dumps([self.pattern, list(self.special_ids)]).encode())
        return digest.hexdigest()

    @cached_property
    def tiktoken(self):
        """The same tokenizer as a `tiktoken.Encoding`, for programs that take one."""
        import tiktoken

        ranks = {token: rank for rank, token in enumerate(self._tokens)}
        return tiktoken.Encoding(
            "nanochat", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=dict(self.special_ids)
        )

    # --- ids ---

    @property
    def vocab_size(self) -> int:
        """Number of ids, special ones included."""
        return len(self._tokens) + len(self.special_ids)

    def special_id(self, name: str) -> int:
        """Id of a special token, written as in `SPECIAL_TOKENS`. Raises `UserError` when there is no such token."""
        if name not in self.special_ids:
            raise UserError(f"{name!r} is no special token of this tokenizer; it has {', '.join(self.special_ids)}")
        return self.special_ids[name]

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every document."""
        return self.special_id("<|bos|>")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an assistant's turn: its end, and what only begins something else."""
        names = ("<|assistant_end|>", "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>")
        return frozenset(self.special_ids[name] for name in names)

    def token_bytes(self) -> np.ndarray:
        """Length in UTF-8 bytes of every id: (V,) int32, 0 for special tokens, which stand for no text."""
        lengths = [len(token) for token in self._tokens] + [0] * len(self.special_ids)
        return np.array(lengths, dtype=np.int32)

    # --- text to ids ---

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never special ones. Raises `UserError` for a lone surrogate, which is no Unicode text."""
        with _valid_unicode():
            return self._bpe.encode(text)

    def encode_batch(self, texts: Iterable[str], *, num_threads: int = 0) -> list[list[int]]:
        """Ids of each text, on `num_threads` threads (0: one per core); an Arrow string array will do as well."""
        with _valid_unicode():
            return self._bpe.batch_encode(texts, num_threads)

    def encode_packed(self, texts: Iterable[str], *, num_threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end, without a Python object per id: the fast way for many documents.

        Returns `tokens` (total,) uint32 and `offsets` (n + 1,) int64; text `i` has `tokens[offsets[i]:offsets[i+1]]`.
        """
        with _valid_unicode():
            tokens, offsets = self._bpe.encode_packed(texts, num_threads)
        return np.frombuffer(tokens, dtype=np.uint32), np.frombuffer(offsets, dtype=np.int64)

    # --- ids to text ---

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens by name; bytes that are not UTF-8 become replacement characters."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, special tokens by name. Raises `UserError` for an id outside the vocabulary."""
        try:
            return b"".join([self._bytes_of_id[i] for i in ids])
        except KeyError as error:
            raise UserError(f"token id {error.args[0]} is outside the vocabulary of {self.vocab_size}") from error

    @cached_property
    def _bytes_of_id(self) -> Mapping[int, bytes]:
        return dict(enumerate(self._tokens)) | {i: name.encode() for name, i in self.special_ids.items()}


# --- files ---------------------------------------------------------------------------------------


def format_ranks(tokens: Sequence[bytes]) -> bytes:
    """`tokens` as the lines of a tiktoken rank file: `format_ranks([b"a"]) == b"YQ== 0\\n"`."""
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def parse_ranks(data: bytes, path: Path) -> list[bytes]:
    """The tokens of a rank file, whose ranks must be 0, 1, 2, ... Raises `UserError` naming `path` and the line."""
    tokens = []
    for number, line in enumerate(data.splitlines()):
        try:
            encoded, rank = line.split(b" ")
            tokens.append(base64.b64decode(encoded, validate=True))
            well_formed = int(rank) == number
        except (ValueError, binascii.Error):
            well_formed = False
        if not well_formed:
            raise UserError(
                f"{path} is damaged at line {number + 1}: {line[:60]!r} is not a base64 token and rank "
                f"{number}; train the tokenizer again: python -m scripts.tok_train"
            )
    return tokens


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError as error:
        raise UserError(f"no tokenizer in {path.parent}: run python -m scripts.tok_train first") from error
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error


def _read_settings(path: Path) -> dict:
    """The settings file, checked for the keys and types that `save` writes."""
    kinds = {"pattern": str, "special_tokens": list, "fingerprint": str}
    try:
        settings = json.loads(_read(path))
        well_formed = all(isinstance(settings[key], kind) for key, kind in kinds.items())
        well_formed = well_formed and all(isinstance(name, str) for name in settings["special_tokens"])
    except (ValueError, TypeError, KeyError):
        well_formed = False
    if not well_formed:
        raise UserError(
            f"{path} is damaged: it must hold {', '.join(kinds)}; "
            f"train the tokenizer again: python -m scripts.tok_train"
        )
    return settings


@contextmanager
def _valid_unicode() -> Iterator[None]:
    """Turn the error for a lone surrogate, which has no UTF-8, into a `UserError`."""
    try:
        yield
    except UnicodeEncodeError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        raise UserError(
            f"the text is not valid Unicode: it holds the lone surrogate "
            f"{error.object[error.start]!r} at character {error.start}{notes}; remove it first"
        ) from error
