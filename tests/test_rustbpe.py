"""The Rust tokenizer against a Python reference, the regex engine and tiktoken; and what it refuses."""

import ast
import random
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import regex
import tiktoken
from hypothesis import given, settings
from hypothesis import strategies as st

import rustbpe

PATTERN = rustbpe.split_pattern(2)

# Every class the pattern tells apart, several of each, and what has a habit of being overlooked.
ALPHABET = (
    "aLsStTdDmMlLvVrReEéÇſßʰªµ中あㅏ한ǅ𝒳059²½٣७Ⅷ𝟘㊿   \t\x0b\x0c\x1c\x85\xa0\u1680\u2003\u2028\u2029\u202f\u3000"
    "\r\r\n\n''''’ʼ.,-!$=\"_\u0301\u0903\u20dd\u200b\u200d\ufeff\0\x7f\xad😀🏳️\U000e0001\U0010ffff\ue000"
)
any_character = st.one_of(st.sampled_from(ALPHABET), st.characters(exclude_categories=["Cs"]))
any_text = st.text(alphabet=any_character, max_size=60)


BYTES = [bytes([i]) for i in range(256)]
PAIRS = [(token, rank) for rank, token in enumerate(BYTES)]


def trained(documents, vocab_size, pattern=PATTERN, **options):
    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(iter(documents), vocab_size, pattern=pattern, **options)
    return tokenizer


def merges(tokenizer):
    return [token for token, _ in tokenizer.get_mergeable_ranks()][256:]


def learnt(documents, vocab_size, pattern=PATTERN):
    return merges(trained(documents, vocab_size, pattern))


def ranked(tokens):
    return {token: rank for rank, token in enumerate(tokens)}


def as_tiktoken(tokens, pattern):
    return tiktoken.Encoding("test", pat_str=pattern, mergeable_ranks=ranked(tokens), special_tokens={})


def reference(documents, num_merges, pattern=PATTERN):
    """Byte-pair encoding by its definition: count all pairs, join the most frequent one, begin again."""
    chunks = Counter(chunk for text in documents for chunk in regex.findall(pattern, text))
    words = {tuple(chunk.encode()): count for chunk, count in chunks.items()}
    tokens = list(BYTES)
    while len(tokens) < 256 + num_merges:
        pairs = Counter()
        for word, count in words.items():
            for pair in pairwise(word):
                pairs[pair] += count
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        words = {joined(word, best, len(tokens)): count for word, count in words.items()}
        tokens.append(tokens[best[0]] + tokens[best[1]])
    return tokens[256:]


def joined(word, pair, new):
    result = []
    for token in word:
        if result and (result[-1], token) == pair:
            result[-1] = new
        else:
            result.append(token)
    return tuple(result)


@pytest.fixture(scope="module")
def documents():
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdeé", k=rng.randint(1, 9))) for _ in range(200)]
    return [" ".join(rng.choices(words, k=50)) + f"\n\n{rng.random()} it's 😀!" for _ in range(100)]


@pytest.fixture(scope="module")
def tokenizer(documents):
    return trained([*documents, ALPHABET * 3], 700)


@pytest.fixture(scope="module")
def encoding(tokenizer):
    return as_tiktoken([*BYTES, *merges(tokenizer)], tokenizer.get_pattern())


@settings(max_examples=400, deadline=None)
@given(any_text, st.integers(1, 3))
def test_scanner_and_regex_engine_give_the_chunks_of_tiktoken(text, max_digits):
    pattern = rustbpe.split_pattern(max_digits)
    tokenizer = rustbpe.Tokenizer.from_ranks(PAIRS, pattern)
    chunks = tokenizer.split(text)
    assert chunks == tokenizer.split(text, use_regex=True)
    assert "".join(chunks) == text
    # With all chunks as tokens, tiktoken's ids are the chunks if and only if it cuts the same ones.
    tokens = [*BYTES, *(chunk for chunk in dict.fromkeys(map(str.encode, chunks)) if len(chunk) > 1)]
    encoding = as_tiktoken(tokens, pattern)
    assert [encoding.decode_single_token_bytes(i).decode() for i in encoding.encode_ordinary(text)] == chunks


@pytest.mark.parametrize(("max_digits", "expected"), [(1, "1 2 3 4 5"), (2, "12 34 5"), (3, "123 45")])
def test_groups_of_digits_are_as_long_as_asked_for(max_digits, expected):
    assert trained([], 256, rustbpe.split_pattern(max_digits)).split("12345") == expected.split()


def test_any_other_pattern_goes_through_the_regex_engine():
    pattern = r"(?<=b)a+|\w++(?!x)|\s"
    documents = ["bbaaa aab xab", "aab aab"]
    assert learnt(documents, 270, pattern) == reference(documents, 14, pattern)


def test_a_pattern_that_is_not_valid_is_a_value_error_and_one_that_gives_up_an_exception():
    with pytest.raises(ValueError, match="split pattern"):
        trained(["a"], 300, "(")
    with pytest.raises(ValueError, match="max_digits is 0"):
        rustbpe.split_pattern(0)
    with pytest.raises(RuntimeError, match="failed on a text"):
        trained([" " * 2_000_000], 300, PATTERN + "|never")


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(alphabet="aab =é1", max_size=80), max_size=8), st.integers(0, 60))
def test_merges_equal_the_reference_ties_included(documents, num_merges):
    assert learnt(documents, 256 + num_merges) == reference(documents, num_merges)


def test_merges_of_text_and_of_nul_equal_the_reference(documents):
    assert learnt(documents, 456) == reference(documents, 200)
    assert learnt(["a\0 a\0 a\0\0"], 258) == reference(["a\0 a\0 a\0\0"], 2)


def test_threads_buffer_and_kind_of_input_change_nothing(documents):
    expected = learnt(documents, 600)
    array = pa.array(documents)
    sources = {
        "one thread": trained(documents, 600, num_threads=1),
        "many threads": trained(documents, 600, num_threads=7),
        "small buffer": trained(documents, 600, buffer_size=3),
        "arrow": trained([array[:37], array[37:37], array[37:]], 600),
        "large arrow": trained([array.cast(pa.large_string())], 600),
        "chunked arrow": trained([pa.chunked_array([array[:10], array[10:]])], 600),
        "arrow and str": trained([documents[0], array[1:99], documents[99]], 600),
    }
    for name, tokenizer in sources.items():
        assert merges(tokenizer) == expected, name


@pytest.fixture(scope="module")
def chinese():
    """Documents of clauses hardly two of which are alike, made of words that recur."""
    rng = random.Random(2)
    words = ["".join(chr(0x4E00 + rng.randrange(600)) for _ in range(rng.randint(1, 3))) for _ in range(400)]
    weights = [1 / (1 + rank) for rank in range(len(words))]
    clauses = ("".join(rng.choices(words, weights, k=rng.randint(2, 8))) + rng.choice("，。？") for _ in range(40_000))
    return ["".join(clause for clause, _ in zip(clauses, range(20), strict=False)) for _ in range(2000)]


def test_where_memory_is_short_a_sample_of_rare_chunks_gives_nearly_the_same_merges(chinese):
    tokenizer, exact = rustbpe.Tokenizer(), set(learnt(chinese, 600))
    assert tokenizer.train_from_iterator(chinese, 600, pattern=PATTERN) == 0
    assert set(merges(tokenizer)) == exact
    dropped = tokenizer.train_from_iterator(chinese, 600, pattern=PATTERN, max_memory=8_000_000, num_threads=1)
    assert dropped > 15_000
    sampled = merges(tokenizer)
    assert len(exact & set(sampled)) > 0.9 * len(exact)
    assert tokenizer.train_from_iterator(chinese, 600, pattern=PATTERN, max_memory=8_000_000, num_threads=5) == dropped
    assert merges(tokenizer) == sampled


def test_training_stays_within_its_memory_when_every_clause_is_new():
    program = textwrap.dedent("""
        import random, rustbpe
        from pathlib import Path
        rng = random.Random(3)
        def peak():
            return next(int(l.split()[1]) for l in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in l)
        def documents():
            for _ in range(600):
                yield "，".join("".join(map(chr, rng.choices(range(0x4E00, 0x5000), k=8))) for _ in range(800))
        before = peak()
        dropped = rustbpe.Tokenizer().train_from_iterator(documents(), 300, max_memory=50_000_000)
        print(dropped, (peak() - before) * 1024)
    """)
    dropped, grown = map(int, subprocess.check_output([sys.executable, "-c", program], text=True).split())
    assert dropped > 100_000
    assert grown < 80_000_000  # of which 30 million are batches under way and the allocator's own


def test_no_text_and_empty_texts_teach_nothing():
    for documents in ([], [""], ["", "a"], [pa.array([], pa.string()), pa.array(["", ""])]):
        assert learnt(documents, 300) == []


def test_a_vocabulary_below_the_bytes_is_a_value_error():
    for vocab_size in [0, 255]:
        with pytest.raises(ValueError, match=f"vocab_size is {vocab_size}"):
            trained(["ab"], vocab_size)
    assert learnt(["ab"], 256) == []
    with pytest.raises(OverflowError):
        trained(["ab"], -1)


def test_the_error_of_an_iterator_comes_out_unchanged():
    class Mine(Exception):
        pass

    def failing():
        yield from ["one", "two"]
        raise error

    error, tokenizer = Mine("three"), trained(["ab ab"], 258)
    before = tokenizer.get_mergeable_ranks()
    with pytest.raises(Mine) as caught:
        tokenizer.train_from_iterator(failing(), 300)
    assert caught.value is error
    assert tokenizer.get_mergeable_ranks() == before


def string_array(offsets, data):
    """An Arrow string array of bytes that nobody has checked to be UTF-8."""
    buffer = pa.array(offsets, pa.int32()).buffers()[1]
    return pa.StringArray.from_buffers(len(offsets) - 1, buffer, pa.py_buffer(data))


NO_TEXT = [
    (3, TypeError, "got int"), (None, TypeError, "got NoneType"), (b"bytes", TypeError, "got bytes"),
    (pa.array([1, 2]), TypeError, "int64"), (pa.array(["a", None]), ValueError, "nulls"),
    (string_array([0, 2], b"a\xff"), ValueError, "document 0 is not UTF-8 at byte 1"),
    (string_array([0, 1, 2], "é".encode()), ValueError, "document 0 is not UTF-8"),
]  # fmt: skip


@pytest.mark.parametrize(("item", "error", "match"), NO_TEXT)
def test_items_that_are_no_text_are_refused_and_located(item, error, match):
    with pytest.raises(error, match=match) as caught:
        trained(["one", "two", item], 300)
    assert "document 2" in caught.value.__notes__[0]


def test_lone_surrogates_are_refused():
    with pytest.raises(UnicodeEncodeError, match="surrogates not allowed"):
        trained(["fine", "\ud800"], 300)
    with pytest.raises(UnicodeEncodeError):
        rustbpe.Tokenizer().encode("a\udfff")


@pytest.mark.parametrize("call", ["train_from_iterator", "batch_encode"])
def test_a_single_str_instead_of_a_list_is_refused(call):
    with pytest.raises(TypeError, match="single str"):
        getattr(rustbpe.Tokenizer(), call)("abc", 300)


@pytest.mark.parametrize("unit", ["a", " ", "é", "xy", "\n", "!?"])
def test_words_of_ten_megabytes_are_learnt_and_encoded(unit):
    width = len(unit.encode())
    text = unit * (10_000_000 // width)
    tokenizer = trained([text], 256 + 8)
    doublings = range(1, 9) if width == 1 else range(8)
    assert merges(tokenizer) == [unit.encode() * 2**i for i in doublings]
    assert tokenizer.encode(unit * (1024 * 256 // width)) == [263] * 1024  # of 256 bytes each
    assert tokenizer.split(text) == [text]


def test_progress_is_reported_for_both_stages_and_its_error_stops_the_training():
    def fail(stage, done, total):
        raise RuntimeError(f"no {stage}")

    calls = []
    trained(["ab ab abc"] * 10, 258, progress=lambda *call: calls.append(call))
    assert ("count", 90, None) in calls
    assert calls[-1] == ("merge", 2, 2)
    with pytest.raises(RuntimeError, match="no count"):
        trained(["ab ab"], 260, progress=fail)


@pytest.mark.parametrize("endless", ["iter(lambda: 'some text again', None)", "[random_letters()]"])
def test_ctrl_c_stops_counting_and_merging(endless):
    program = textwrap.dedent(f"""
        import random, rustbpe
        def random_letters():
            return "".join(random.Random(0).choices("abcdefghijklmnop", k=4_000_000))
        documents = {endless}
        print("ready", flush=True)
        try:
            rustbpe.Tokenizer().train_from_iterator(documents, 1_000_000)
        except KeyboardInterrupt:
            print("stopped", flush=True)
    """)
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(0.7)
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=20)[0] == "stopped\n"


def test_training_again_and_again_leaks_nothing(documents):
    resident = []
    for _ in range(60):
        trained(documents, 400)
        resident.append(int(Path("/proc/self/statm").read_text().split()[1]))
    assert resident[-1] - resident[20] < 2000  # pages of 4 KB; a leak of the smallest table would be 4,000


@settings(max_examples=500, deadline=None)
@given(any_text)
def test_ids_are_those_of_tiktoken_and_decode_to_the_text(tokenizer, encoding, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == encoding.encode_ordinary(text)


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet="ab", max_size=400), st.randoms(use_true_random=False))
def test_any_ranks_give_the_ids_of_tiktoken(text, rng):
    tokens = {"".join(rng.choices("ab", k=rng.randint(2, 6))).encode(): 0 for _ in range(40)}
    tokens = [*BYTES, *tokens]
    rng.shuffle(tokens)
    tokenizer = rustbpe.Tokenizer.from_ranks(ranked(tokens), PATTERN)
    assert tokenizer.encode(text) == as_tiktoken(tokens, PATTERN).encode_ordinary(text)


def test_batches_equal_texts_one_by_one(tokenizer, documents):
    texts = [*documents, "", "x", ""] * 20
    expected = [tokenizer.encode(text) for text in texts]
    for num_threads in [0, 1, 3]:
        assert tokenizer.batch_encode(texts, num_threads) == expected
        for source in [texts, tuple(texts), pa.array(texts), pa.chunked_array([texts[:9], texts[9:]])]:
            tokens, offsets = tokenizer.encode_packed(source, num_threads)
            tokens, offsets = np.frombuffer(tokens, np.uint32), np.frombuffer(offsets, np.int64)
            assert [tokens[a:b].tolist() for a, b in pairwise(offsets)] == expected
    tokens, offsets = tokenizer.encode_packed([])
    assert (len(tokens), np.frombuffer(offsets, np.int64).tolist()) == (0, [0])


def test_one_tokenizer_serves_many_threads(tokenizer, documents):
    expected = [tokenizer.encode(text) for text in documents]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(5):
            assert list(pool.map(tokenizer.encode, documents)) == expected


def test_half_a_character_and_ids_outside_the_vocabulary_are_errors(tokenizer):
    assert tokenizer.decode_bytes([0xC3]) == b"\xc3"
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode([0xC3])
    assert tokenizer.decode([0xC3], "replace") == "\ufffd"
    with pytest.raises(ValueError, match="token id 99999"):
        tokenizer.decode([99999])


TWICE = [*PAIRS, (b"ab", 256), (b"ab", 257)]


@pytest.mark.parametrize("ranks", [[(b"a", 0)], [(token, 0) for token in BYTES], [*PAIRS, (b"", 256)], TWICE])
def test_ranks_that_are_no_vocabulary_are_value_errors(ranks):
    with pytest.raises(ValueError, match="no vocabulary"):
        rustbpe.Tokenizer.from_ranks(ranks, PATTERN)


def test_the_interface_of_0_1_0_is_there():
    tokenizer = rustbpe.Tokenizer()
    assert tokenizer.vocab_size == 256
    tokenizer.train_from_iterator(iter(["aaaaaaaa bab abab ba"]), 260, 8192, None)
    ranks = tokenizer.get_mergeable_ranks()
    assert ranks[:2] == [(b"\x00", 0), (b"\x01", 1)]
    assert ranks[256:] == [(b"aa", 256), (b"ab", 257), (b"aaaa", 258), (b" b", 259)]  # as 0.1.0 has them
    assert tokenizer.get_pattern() == rustbpe.split_pattern(3)
    assert tokenizer.vocab_size == 260
    assert tokenizer.batch_encode(["ab", "cd"]) == [[257], [99, 100]]
    assert tokenizer.decode(tokenizer.encode("héllo")) == "héllo"


def test_the_stubs_name_every_public_method():
    tree = ast.parse((Path(rustbpe.__file__).parent / "__init__.pyi").read_text())
    described = next(node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "Tokenizer")
    names = {node.name for node in described.body if isinstance(node, ast.FunctionDef)} - {"__init__"}
    assert names == {name for name in dir(rustbpe.Tokenizer) if not name.startswith("_")}
