"""Byte-pair encoding: train a vocabulary, or take a given one, and encode and decode with it."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol, TypeAlias

class ArrowStrings(Protocol):
    """An Arrow array of type string or large_string without nulls, as pyarrow has it (chunked ones too)."""

    def __len__(self) -> int: ...

Progress: TypeAlias = Callable[[str, int, int | None], object]

__version__: str

def split_pattern(max_digits: int = 3) -> str:
    """GPT-4's split pattern, with groups of at most `max_digits` digits (1 to 99).

    Text is split by a hand-written scanner for these patterns and by a regex engine for any other; the chunks are
    the same either way.
    """

class Tokenizer:
    """A vocabulary of byte strings, each with its rank, and a split pattern.

    No chunk that the pattern cuts from a text shares a token with the next one. Text that the pattern does not match
    gets no tokens, as in tiktoken; the patterns of `split_pattern` match everything.
    """

    def __init__(self) -> None:
        """The 256 bytes as vocabulary, and the pattern `split_pattern()`."""

    @staticmethod
    def from_ranks(ranks: dict[bytes, int] | Iterable[tuple[bytes, int]], pattern: str) -> Tokenizer:
        """A tokenizer for given ranks, which are the ids: those of tiktoken's `mergeable_ranks`, for example.

        Raises ValueError when one of the 256 bytes is missing, a token or rank is given twice, or `pattern` is not
        valid.
        """

    def train_from_iterator(
        self,
        iterator: Iterable[str | ArrowStrings],
        vocab_size: int,
        buffer_size: int = 8192,
        pattern: str | None = None,
        *,
        progress: Progress | None = None,
        num_threads: int = 0,
        max_memory: int = 2_000_000_000,
    ) -> int:
        """Learn a vocabulary of `vocab_size` tokens: the 256 bytes, and one token for each merge.

        `iterator` yields documents (str), or Arrow string arrays of documents; at most `buffer_size` str are read
        ahead at a time. `pattern` is `split_pattern()` when None. `num_threads` count chunks besides the thread that
        iterates (0: as many as there are cores), all without the GIL.

        Counting and learning take about `max_memory` bytes at most, whatever the text. Where its distinct chunks would
        take more, a sample of the rare ones stands for all of them, the same whatever the number of threads; returned
        is how many chunks were dropped for that. When that is 0, merges are exact. Of pairs that occur equally often
        the one with the smaller left id is merged first, then the one with the smaller right id. Training ends early
        when no pair is left.

        `progress(stage, done, total)` is called some ten times a second and at the end of each stage: "count" in bytes
        of text (total None), then "merge" in merges.

        Raises ValueError for a vocabulary below 256 or a pattern that is not valid, UnicodeEncodeError for a lone
        surrogate, TypeError for an item that is neither str nor Arrow strings, RuntimeError when the regex engine
        gives up on a text (a run of a million blanks, for example; the scanner has no such limit), and whatever
        `iterator` or `progress` raise, KeyboardInterrupt included. The tokenizer is then as it was before.
        """

    def get_mergeable_ranks(self) -> list[tuple[bytes, int]]:
        """The vocabulary in order of rank; `dict` of it is what tiktoken takes."""

    def get_pattern(self) -> str:
        """The split pattern."""

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""

    def encode(self, text: str) -> list[int]:
        """Ids of `text`: those tiktoken's `encode_ordinary` gives for the same ranks and pattern."""

    def batch_encode(self, texts: Iterable[str] | ArrowStrings, num_threads: int = 0) -> list[list[int]]:
        """Ids of each of `texts`, on `num_threads` threads (0: as many as there are cores)."""

    def encode_packed(self, texts: Iterable[str] | ArrowStrings, num_threads: int = 0) -> tuple[bytearray, bytearray]:
        """Ids of all `texts` end to end, without a Python object per id.

        Returns `tokens`, to be read as native uint32, and `offsets`, as native int64 and one more than there are
        texts: `numpy.frombuffer(tokens, "u4")[offsets[i]:offsets[i + 1]]` are the ids of text `i`.
        """

    def decode(self, ids: Sequence[int], errors: str = "strict") -> str:
        """The text of `ids`; `errors` as in `bytes.decode`. Raises ValueError for an id outside the vocabulary."""

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """The bytes of `ids`. Raises ValueError for an id outside the vocabulary."""

    def split(self, text: str, *, use_regex: bool = False) -> list[str]:
        """The chunks of `text`, by the scanner where the pattern has one or, with `use_regex`, by the regex engine."""

    def first_split_difference(self, texts: Iterable[str] | ArrowStrings) -> int | None:
        """Index of the first of `texts` on which scanner and regex engine disagree; None when they agree on all."""
