"""The tokenizer around rustbpe: special tokens, ids both ways, and the files."""

import json
import random
import shutil

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import rustbpe
from nanochat import tokenizer as tok
from nanochat.common import UserError
from nanochat.tokenizer import RANKS_FILE, SETTINGS_FILE, SPECIAL_TOKENS, Tokenizer

any_unicode = st.text(alphabet=st.characters(exclude_categories=["Cs"]))
SPECIAL_TEXT = "".join(SPECIAL_TOKENS) + " <|bos|> <|endoftext|>"


def test_the_vocabulary_has_the_size_asked_for_and_the_special_tokens_in_order(tokenizer):
    assert tokenizer.vocab_size == 400
    names = """<|bos|> <|user_start|> <|user_end|> <|assistant_start|> <|assistant_end|>
        <|python_start|> <|python_end|> <|output_start|> <|output_end|>"""
    assert list(SPECIAL_TOKENS) == list(tokenizer.special_ids) == names.split()
    assert list(tokenizer.special_ids.values()) == list(range(391, 400))
    assert tokenizer.bos_id == tokenizer.special_id("<|bos|>") == 391


def test_training_on_arrow_arrays_gives_the_same_tokenizer(tokenizer, texts):
    assert Tokenizer.train([pa.array(texts)], 400).fingerprint == tokenizer.fingerprint


def test_a_vocabulary_is_as_large_as_the_pairs_allow_and_never_smaller_than_bytes_and_specials():
    assert Tokenizer.train(["abc"], 1000).vocab_size == 256 + 2 + len(SPECIAL_TOKENS)
    assert Tokenizer.train(["abc"], 265).vocab_size == 265
    with pytest.raises(UserError, match=r"264.*at least 265"):
        Tokenizer.train(["abc"], 264)


def test_a_lone_surrogate_is_refused_and_located(tokenizer):
    with pytest.raises(UserError, match=r"'\\ud800' at character 2 .*document 1"):
        Tokenizer.train(["fine", "ab\ud800"], 300)
    for encode in [tokenizer.encode, lambda text: tokenizer.encode_batch([text])]:
        with pytest.raises(UserError, match="lone surrogate"):
            encode("ab\ud800")


def test_an_error_of_the_documents_comes_out_unchanged():
    def failing():
        yield "one"
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        Tokenizer.train(failing(), 300)


def test_digits_are_cut_in_twos(tokenizer):
    assert rustbpe.split_pattern(2) == tok.SPLIT_PATTERN
    tokens = [tokenizer.decode([i]) for i in tokenizer.encode("x 20251107")]
    assert all(len(token) <= 2 for token in tokens[2:])


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(text=any_unicode)
def test_encoding_then_decoding_returns_the_text(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert ids == tokenizer.tiktoken.encode_ordinary(text)
    assert max(ids, default=0) < tokenizer.bos_id
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


def test_text_never_encodes_to_special_tokens_which_have_names_and_no_bytes(tokenizer):
    special = list(tokenizer.special_ids.values())
    ids = tokenizer.encode(SPECIAL_TEXT)
    assert not set(ids) & set(special)
    assert tokenizer.decode(ids) == SPECIAL_TEXT
    ids = [tokenizer.bos_id, *tokenizer.encode("hi"), tokenizer.special_id("<|output_end|>")]
    assert tokenizer.decode(ids) == "<|bos|>hi<|output_end|>"
    lengths = tokenizer.token_bytes()
    assert (lengths.shape, lengths.dtype) == ((400,), np.int32)
    assert (lengths[special] == 0).all()
    assert lengths[ids].sum() == 2
    encoding = tokenizer.tiktoken  # which knows the special tokens too
    assert encoding.n_vocab == tokenizer.vocab_size
    assert encoding.encode("<|bos|>hi", allowed_special="all") == ids[:-1]


def test_batches_and_packed_batches_hold_the_ids_of_each_text(tokenizer, texts):
    texts = [*texts, "", "a", ""]
    expected = [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch(texts) == expected
    assert tokenizer.encode_batch(pa.array(texts), num_threads=2) == expected
    for source in [texts, pa.array(texts)]:
        tokens, offsets = tokenizer.encode_packed(source, num_threads=2)
        assert (tokens.dtype, offsets.dtype) == (np.uint32, np.int64)
        assert len(offsets) == len(texts) + 1
        assert [part.tolist() for part in np.split(tokens, offsets[1:-1])] == expected


def test_bytes_that_are_not_text_decode_to_replacement_characters(tokenizer):
    assert tokenizer.decode_bytes([0xE6, 0x9D]) == b"\xe6\x9d"
    assert tokenizer.decode([0xE6, 0x9D]) == "\ufffd"
    assert tokenizer.decode(np.array([104, 105])) == "hi"


@pytest.mark.parametrize("wrong", [-1, 400, 10**9])
def test_ids_outside_the_vocabulary_are_refused(tokenizer, wrong):
    with pytest.raises(UserError, match=f"token id {wrong} is outside the vocabulary of 400"):
        tokenizer.decode([104, wrong])


def test_an_unknown_special_token_is_refused_with_the_names_there_are(tokenizer):
    with pytest.raises(UserError, match=r"'<\|eos\|>'.*<\|bos\|>"):
        tokenizer.special_id("<|eos|>")


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "saved")
    return tmp_path / "saved"


def test_saving_then_loading_is_the_identity(tokenizer, folder, texts):
    loaded = Tokenizer.load(folder)
    assert loaded.fingerprint == tokenizer.fingerprint
    assert (loaded.pattern, loaded.special_ids) == (tokenizer.pattern, tokenizer.special_ids)
    assert loaded.encode_batch(texts) == tokenizer.encode_batch(texts)
    assert (loaded.token_bytes() == tokenizer.token_bytes()).all()


def test_saved_files_suit_tiktoken_and_people(tokenizer, folder):
    from tiktoken.load import load_tiktoken_bpe

    assert load_tiktoken_bpe(str(folder / RANKS_FILE)) == tokenizer.tiktoken._mergeable_ranks
    lines = (folder / tok.LISTING_FILE).read_text().splitlines()
    assert len(lines) == tokenizer.vocab_size
    assert lines[97] == "     97  'a'"
    assert lines[-1] == "    399  <|output_end|>"


def test_fingerprints_tell_apart_whatever_changes_an_id(tokenizer, texts):
    tokens = tokenizer._tokens
    others = [
        Tokenizer(tokens[:-1], tokenizer.pattern),
        Tokenizer([*tokens[:-2], tokens[-1], tokens[-2]], tokenizer.pattern),
        Tokenizer(tokens, rustbpe.split_pattern(3)),
        Tokenizer(tokens, tokenizer.pattern, SPECIAL_TOKENS[::-1]),
        Tokenizer(tokens, tokenizer.pattern, SPECIAL_TOKENS[:-1]),
    ]
    assert len({tokenizer.fingerprint, *(other.fingerprint for other in others)}) == 6
    assert Tokenizer(tokens, tokenizer.pattern).fingerprint == tokenizer.fingerprint


def test_a_missing_tokenizer_says_how_to_train_one():
    with pytest.raises(UserError, match=r"python -m scripts\.tok_train"):
        Tokenizer.load(tok.tokenizer_dir())


DAMAGE = [
    lambda data: data.replace(b"\n", b"!\n", 300), lambda data: data.replace(data.splitlines(keepends=True)[300], b""),
    lambda data: data[:3001], lambda data: b"\x00" * 50,
]  # fmt: skip


@pytest.mark.parametrize("change", DAMAGE)
def test_damaged_ranks_are_refused(folder, change):
    path = folder / RANKS_FILE
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(UserError, match=r"ranks\.tiktoken.*scripts\.tok_train"):
        Tokenizer.load(folder)


def test_ranks_of_another_training_are_refused(folder, tmp_path):
    Tokenizer.train(["other text altogether"], 270).save(tmp_path / "other")
    shutil.copy(tmp_path / "other" / RANKS_FILE, folder)
    with pytest.raises(UserError, match="do not belong together"):
        Tokenizer.load(folder)


BAD_SETTINGS = [
    "", "{", "[]", "{}", "null", '{"pattern": 1, "special_tokens": [], "fingerprint": ""}',
    '{"pattern": "a", "special_tokens": [1], "fingerprint": ""}',
]  # fmt: skip


@pytest.mark.parametrize("data", BAD_SETTINGS)
def test_damaged_settings_are_refused(folder, data):
    (folder / SETTINGS_FILE).write_text(data)
    with pytest.raises(UserError, match=r"settings\.json is damaged"):
        Tokenizer.load(folder)


@pytest.mark.parametrize(("key", "value"), [("pattern", "("), ("special_tokens", ["<|bos|>", "<|bos|>"])])
def test_settings_no_tokenizer_can_have_are_refused(folder, key, value):
    path = folder / SETTINGS_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match="cannot be used"):
        Tokenizer.load(folder)


def test_rank_files_of_any_tokens_come_back(tmp_path):
    rng = random.Random(0)
    tokens = [rng.randbytes(rng.randint(1, 40)) for _ in range(500)]
    assert tok.parse_ranks(tok.format_ranks(tokens), tmp_path) == tokens
