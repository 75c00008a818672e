import random
import signal
import subprocess
import sys
import threading
import time
from collections import Counter

import numpy as np
import pyarrow as pa
import pytest
import rustbpe
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

PATTERN = rustbpe.split_pattern(2)

# Every class the pattern tells apart, several of each, and what has a habit of being overlooked.
ALPHABET = (
    "aLsStTdDmMlLvVrReE" + "éÇſßʰªµ中あㅏ한ǅ𝒳" + "059²½٣७Ⅷ𝟘㊿" + "   \t\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000"
    "\r\r\n\n" + "''''’ʼ.,-!$=\"_" + "\u0301\u0903\u20dd\u200b\u200d\ufeff\0\x7f\xad" + "😀🏳️\U000e0001\U0010ffff\ue000"
)
texts = st.text(alphabet=st.one_of(st.sampled_from(ALPHABET), st.characters(exclude_categories=["Cs"])), max_size=60)


def trained(documents, vocab_size, pattern=PATTERN, **options):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(documents), vocab_size, pattern=pattern, **options)
    return tokenizer


def learnt(documents, vocab_size, pattern=PATTERN):
    return [token for token, _ in trained(documents, vocab_size, pattern).get_mergeable_ranks()][256:]


def as_tiktoken(tokenizer):
    ranks = dict(tokenizer.get_mergeable_ranks())
    return tiktoken.Encoding("test", pat_str=tokenizer.get_pattern(), mergeable_ranks=ranks, special_tokens={})


def reference_merges(documents, num_merges, pattern=PATTERN):
    """Byte-pair encoding by its definition; tiktoken, with single bytes for a vocabulary, finds the chunks."""
    single_bytes = {bytes([i]): i for i in range(256)}
    splitter = tiktoken.Encoding("bytes", pat_str=pattern, mergeable_ranks=single_bytes, special_tokens={})
    chunks = Counter(
        chunk for text in documents for chunk in splitter._core_bpe.encode_ordinary_chunks(text)
    ) if hasattr(splitter._core_bpe, "encode_ordinary_chunks") else None
    return chunks
