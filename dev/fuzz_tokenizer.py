"""Fuzz the tokenizer against three independent references with random strings; none may differ.

    python dev/fuzz_tokenizer.py --strings 100000
    python dev/fuzz_tokenizer.py                     # ten million

For every string, the hand-written scanner must split like the regex engine, decoding must return the string, and the
ids must be tiktoken's. Strings are drawn from an alphabet with all character classes of the split pattern, with
repetitions, and occasionally any code point. Patterns with groups of at most 1, 2 and 3 digits alternate, each with
two vocabularies: a trained one, and one with every pair of bytes as a token, which reveals most differences in chunk
boundaries.
"""

import argparse
import random
import sys
import time
from itertools import chain, cycle, product

import numpy as np
import tiktoken

import rustbpe

ALPHABET = "".join(
    [
        "abcxyzABCXYZ" + 2 * "sdmtSDMTlvreLVRE",  # letters, mostly those of contractions
        "éÇßſKİıªºʰǅ中あア한ㅏאبक𝒳𐐷",
        "0123456789²½٣७๕Ⅷ㊿𝟘",
        12 * " " + 5 * "\r" + 5 * "\n",
        "\t\x0b\x0c\x1c\x1f\x85\xa0\u1680\u2003\u2028\u2029\u202f\u205f\u3000",
        10 * "'" + '’ʼ`.,;:!?-—_()[]{}<>/\\|@#$%^&*+=~"€£§',
        "\u0301\u0308\u0903\u20dd\u200b\u200d\u2060\ufeff\0\x01\x7f\xad",  # marks, joiners, controls
        "😀👩🏽🏳️\U000e0001\ue000\uffff\U0010ffff",
    ]
)
MAX_LENGTH = 24  # characters before repetition
REPEATS = (1, 1, 1, 1, 1, 1, 2, 2, 3, 6)  # of each character, so that runs of each class occur
ANY_FRAC = 0.03  # share of characters drawn from all code points


def random_strings(rng: np.random.Generator, count: int) -> list[str]:
    alphabet = np.array([ord(character) for character in ALPHABET], dtype=np.uint32)
    lengths = rng.integers(1, MAX_LENGTH + 1, count)
    codes = rng.choice(alphabet, lengths.sum())
    anywhere = rng.random(len(codes)) < ANY_FRAC
    codes[anywhere] = rng.integers(0, 0x110000 - 0x800, anywhere.sum(), dtype=np.uint32)
    codes[anywhere & (codes >= 0xD800)] += 0x800  # skip the surrogates, which are not valid in text
    repeats = rng.choice(REPEATS, len(codes))
    ends = np.cumsum(repeats)[np.cumsum(lengths) - 1]
    text = np.repeat(codes, repeats).astype("<u4").tobytes().decode("utf-32-le")
    return [text[start:end] for start, end in zip(np.r_[0, ends[:-1]].tolist(), ends.tolist(), strict=True)]


def vocabularies(rng: np.random.Generator, pattern: str) -> list[list[bytes]]:
    """A trained vocabulary, and one of all bytes and all pairs of bytes in random order."""
    trained = rustbpe.Tokenizer()
    trained.train_from_iterator(random_strings(rng, 100_000), 20_000, pattern=pattern)
    pairs = [bytes(pair) for pair in product(range(256), repeat=2)]
    random.Random(0).shuffle(pairs)
    return [[token for token, _ in trained.get_mergeable_ranks()], [*(bytes([i]) for i in range(256)), *pairs]]


class Contestant:
    """Our tokenizer and tiktoken's with the same vocabulary and pattern."""

    def __init__(self, tokens: list[bytes], pattern: str):
        ranks = {token: rank for rank, token in enumerate(tokens)}
        self.ours = rustbpe.Tokenizer.from_ranks(ranks, pattern)
        self.theirs = tiktoken.Encoding("fuzz", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
        self.widths = np.array([len(token) for token in tokens])

    def first_failure(self, texts: list[str]) -> str | None:
        """What differs and on which of `texts`, or None."""
        at = self.ours.first_split_difference(texts)
        if at is not None:
            return f"scanner and regex engine differ on {texts[at]!r}"
        packed, starts = self.ours.encode_packed(texts)
        tokens, offsets = np.frombuffer(packed, np.uint32), np.frombuffer(starts, np.int64)
        theirs = self.theirs.encode_ordinary_batch(texts, num_threads=1)
        their_offsets = np.cumsum([0, *map(len, theirs)])
        if not np.array_equal(offsets, their_offsets) or tokens.tolist() != list(chain.from_iterable(theirs)):
            parts = np.split(tokens, offsets[1:-1])
            at = next(i for i, ids in enumerate(theirs) if parts[i].tolist() != ids)
            return f"ids differ from tiktoken's on {texts[at]!r}"
        # Decode all texts at once: the bytes must match, and so must the number of bytes of each text.
        encoded = [text.encode() for text in texts]
        ends = np.r_[0, np.cumsum(self.widths[tokens])][offsets]
        sizes = np.cumsum([0, *map(len, encoded)])
        if not np.array_equal(ends, sizes) or self.ours.decode_bytes(tokens.tolist()) != b"".join(encoded):
            at = next(i for i, text in enumerate(texts) if self.ours.decode(self.ours.encode(text), "replace") != text)
            return f"decoding does not return {texts[at]!r}"
        return None


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--strings", type=int, default=10_000_000, help="how many to try")
    parser.add_argument("--batch", type=int, default=50_000, help="how many at a time")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    rng = np.random.default_rng(args.seed)
    patterns = [rustbpe.split_pattern(max_digits) for max_digits in (2, 1, 3)]
    contestants = [Contestant(tokens, pattern) for pattern in patterns for tokens in vocabularies(rng, pattern)]
    tried, num_chars, start = 0, 0, time.perf_counter()
    for batch, contestant in enumerate(cycle(contestants)):
        texts = random_strings(rng, min(args.batch, args.strings - tried))
        failure = contestant.first_failure(texts)
        if failure:
            sys.exit(f"after {tried:,} strings, pattern {contestant.ours.get_pattern()}: {failure}")
        tried += len(texts)
        num_chars += sum(map(len, texts))
        if batch % 20 == 19 or tried == args.strings:
            print(f"{tried:,} strings, {num_chars:,} characters, {time.perf_counter() - start:.0f} s", flush=True)
        if tried == args.strings:
            break
    print("no difference: scanner = regex engine, ids = tiktoken's, decode(encode(text)) = text")


if __name__ == "__main__":
    main(parse_args())
