"""The tokenizer: text to token ids and back, the special tokens, and the files on disk.

BPE training and encoding themselves are in the `rustbpe` package, the chat format is in `data/chat.py`. The files are
plain: ranks in tiktoken's format, settings as JSON, and a listing for people.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np

import rustbpe
from nanochat.common import UserError, base_dir, print0, write_atomic

SPECIAL_TOKENS = (
    "<|bos|>",  # starts every document and every conversation
    "<|user_start|>",
    "<|user_end|>",
    "<|assistant_start|>",
    "<|assistant_end|>",
    "<|python_start|>",  # the assistant calls the Python tool
    "<|python_end|>",
    "<|output_start|>",  # the output of the tool
    "<|output_end|>",
)
NUM_BYTES = 256
MIN_VOCAB_SIZE = NUM_BYTES + len(SPECIAL_TOKENS)
MAX_VOCAB_SIZE = 1 << 24  # far beyond any use: a larger number is a typing error

# GPT-4's split pattern, but with groups of up to two digits instead of three, which is better for small vocabularies
# (published: 0.965 against 0.972 bits per byte). The pattern itself is defined in rustbpe.
SPLIT_PATTERN = rustbpe.split_pattern(2)

RANKS_FILE = "ranks.tiktoken"  # a line per token: its bytes in base64, a space, its rank
SETTINGS_FILE = "settings.json"  # pattern, special tokens and fingerprint; written last: vouches for the ranks
TOKEN_BYTES_FILE = "token_bytes.npy"  # `Tokenizer.token_bytes` for programs without this class
LISTING_FILE = "vocabulary.txt"  # for people; never read back
RETRAIN = "train the tokenizer again: python -m scripts.tok_train"

Progress = Callable[[str, int, int | None], None]  # stage ("count" or "merge"), done, total if known


def tokenizer_dir() -> Path:
    """Folder of the tokenizer that all stages use."""
    return base_dir() / "tokenizer"


class Tokenizer:
    """A BPE vocabulary: ids 0 to n - 1 are byte strings in the order they were learnt, then come the special tokens.

    Encoding text never yields a special token, whatever the text; callers insert those by id.
    """

    def __init__(self, tokens: Sequence[bytes], pattern: str, special_tokens: Sequence[str] = SPECIAL_TOKENS):
        """`tokens[i]` are the bytes of id `i`. Raises `UserError` if they are not a usable vocabulary."""
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
        """Learn a vocabulary of `vocab_size` tokens, including the special ones, from strings or Arrow string arrays.

        It ends up smaller if the documents have too few pairs to merge. Training takes about 2 GB at most: where the
        text has more distinct chunks than fit, as Chinese soon has, the rare ones are sampled, and a line says so.
        `progress(stage, done, total)` is called about ten times a second, in bytes for the stage "count" and in merges
        for "merge". Raises `UserError` if `vocab_size` has no room for all bytes and special tokens, or for invalid
        Unicode; errors raised by `documents` pass through.
        """
        if vocab_size < MIN_VOCAB_SIZE:
            raise UserError(
                f"the vocabulary size is {vocab_size}, but {NUM_BYTES} bytes and {len(SPECIAL_TOKENS)} "
                f"special tokens need at least {MIN_VOCAB_SIZE}"
            )
        bpe = rustbpe.Tokenizer()
        with _valid_unicode():
            size = vocab_size - len(SPECIAL_TOKENS)
            dropped = bpe.train_from_iterator(documents, size, pattern=pattern, progress=progress)
        if dropped:
            print0(f"to stay within memory, {dropped:,} rare chunks of the text were dropped; a sample stands for them")
        return cls([token for token, _ in bpe.get_mergeable_ranks()], pattern)

    # --- files ---

    @classmethod
    def load(cls, folder: Path) -> "Tokenizer":
        """Read what `save` wrote. Raises `UserError` if files are missing, damaged or do not belong together."""
        settings = _read_settings(folder / SETTINGS_FILE)
        tokens = parse_ranks(_read(folder / RANKS_FILE), folder / RANKS_FILE)
        tokenizer = cls(tokens, settings["pattern"], settings["special_tokens"])
        if tokenizer.fingerprint != settings["fingerprint"]:
            raise UserError(
                f"{folder / RANKS_FILE} and {SETTINGS_FILE} do not belong together or have been changed; {RETRAIN}"
            )
        return tokenizer

    def save(self, folder: Path) -> None:
        """Write the vocabulary, and a listing for people, to `folder`. Raises `UserError` if that fails."""
        settings = {"pattern": self.pattern, "special_tokens": list(self.special_ids), "fingerprint": self.fingerprint}
        # For people: special tokens as they are, others quoted, with escapes for unprintable text and invalid UTF-8.
        texts = [repr(token.decode("utf-8", errors="backslashreplace")) for token in self._tokens] + [*self.special_ids]
        write_atomic(folder / LISTING_FILE, "".join(f"{i:>7}  {text}\n" for i, text in enumerate(texts)))
        write_atomic(folder / RANKS_FILE, format_ranks(self._tokens))
        write_atomic(folder / SETTINGS_FILE, json.dumps(settings, indent=2) + "\n")

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of everything that determines the ids of a text."""
        ids = json.dumps([self.pattern, list(self.special_ids)]).encode()
        return hashlib.sha256(format_ranks(self._tokens) + ids).hexdigest()

    @cached_property
    def tiktoken(self):
        """This tokenizer as a `tiktoken.Encoding`."""
        import tiktoken

        ranks, special = {token: rank for rank, token in enumerate(self._tokens)}, self.special_ids
        return tiktoken.Encoding("nanochat", pat_str=self.pattern, mergeable_ranks=ranks, special_tokens=special)

    # --- ids ---

    @property
    def vocab_size(self) -> int:
        """Number of ids, including those of special tokens."""
        return len(self._tokens) + len(self.special_ids)

    def special_id(self, name: str) -> int:
        """Id of a special token, named as in `SPECIAL_TOKENS`. Raises `UserError` if there is no such token."""
        if name not in self.special_ids:
            raise UserError(f"{name!r} is not a special token of this tokenizer; it has {', '.join(self.special_ids)}")
        return self.special_ids[name]

    @property
    def bos_id(self) -> int:
        """Id of the token that starts every document."""
        return self.special_id("<|bos|>")

    @property
    def stop_ids(self) -> frozenset[int]:
        """Ids that end an assistant's turn: its end token, and those that can only start something else."""
        names = ("<|assistant_end|>", "<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>")
        return frozenset(self.special_ids[name] for name in names)

    def token_bytes(self) -> np.ndarray:
        """Length of each id in UTF-8 bytes: (V,) int32, 0 for special tokens, which are not text."""
        lengths = [len(token) for token in self._tokens] + [0] * len(self.special_ids)
        return np.array(lengths, dtype=np.int32)

    # --- text to ids ---

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, never special ones. Raises `UserError` for lone surrogates, which are invalid Unicode."""
        with _valid_unicode():
            return self._bpe.encode(text)

    def encode_batch(self, texts: Iterable[str], *, num_threads: int = 0) -> list[list[int]]:
        """Ids of each text, on `num_threads` threads (0: one per core). `texts` may be an Arrow string array."""
        with _valid_unicode():
            return self._bpe.batch_encode(texts, num_threads)

    def encode_packed(self, texts: Iterable[str], *, num_threads: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Ids of all texts end to end as arrays, without a Python object per id: the fast way for many documents.

        Returns `tokens` (total,) uint32 and `offsets` (n + 1,) int64; text `i` is `tokens[offsets[i]:offsets[i + 1]]`.
        """
        with _valid_unicode():
            tokens, offsets = self._bpe.encode_packed(texts, num_threads)
        return np.frombuffer(tokens, dtype=np.uint32), np.frombuffer(offsets, dtype=np.int64)

    # --- ids to text ---

    def decode(self, ids: Iterable[int]) -> str:
        """The text of `ids`, special tokens as their names; invalid UTF-8 becomes replacement characters."""
        return self.decode_bytes(ids).decode("utf-8", errors="replace")

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of `ids`, special tokens as their names. Raises `UserError` for an id outside the vocabulary."""
        try:
            return b"".join([self._bytes_of_id[i] for i in ids])
        except KeyError as error:
            raise UserError(f"token id {error.args[0]} is outside the vocabulary of {self.vocab_size}") from error

    @cached_property
    def _bytes_of_id(self) -> Mapping[int, bytes]:
        return dict(enumerate(self._tokens)) | {i: name.encode() for name, i in self.special_ids.items()}


def format_ranks(tokens: Sequence[bytes]) -> bytes:
    """`tokens` as a tiktoken rank file: `format_ranks([b"a"]) == b"YQ== 0\\n"`."""
    return b"".join(b"%b %d\n" % (base64.b64encode(token), rank) for rank, token in enumerate(tokens))


def parse_ranks(data: bytes, path: Path) -> list[bytes]:
    """The tokens of a rank file with ranks 0, 1, 2, ... Raises `UserError` naming `path` and the damaged line."""
    tokens = []
    for number, line in enumerate(data.splitlines()):
        encoded, _, rank = line.partition(b" ")
        try:
            tokens.append(base64.b64decode(encoded, validate=True))
            is_valid = int(rank) == number
        except ValueError:
            is_valid = False
        if not is_valid:
            found = f"{line[:60]!r} is not a base64 token and rank {number}"
            raise UserError(f"{path} is damaged at line {number + 1}: {found}; {RETRAIN}")
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
        is_valid = all(isinstance(settings[key], kind) for key, kind in kinds.items())
        is_valid = is_valid and all(isinstance(name, str) for name in settings["special_tokens"])
    except (ValueError, TypeError, KeyError):
        is_valid = False
    if not is_valid:
        raise UserError(f"{path} is damaged: it must hold {', '.join(kinds)}; {RETRAIN}")
    return settings


@contextmanager
def _valid_unicode() -> Iterator[None]:
    """Turn the error about a lone surrogate, which UTF-8 cannot encode, into a `UserError`."""
    try:
        yield
    except UnicodeEncodeError as error:
        notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
        raise UserError(
            f"the text is not valid Unicode: it has the lone surrogate {error.object[error.start]!r} "
            f"at character {error.start}{notes}; remove it first"
        ) from error
