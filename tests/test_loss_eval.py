"""Bits per byte by hand, over ranks, and the plain sampler against a one-row loop."""

import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ranks import run_ranks

from nanochat.common import Runtime
from nanochat.evals.loss_eval import SAMPLE_PROMPTS, evaluate_bpb, evaluate_split, sample_completions
from nanochat.model.gpt import IGNORE_INDEX

BOS = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
VOCAB_SIZE = 1 + len(LETTERS)


class FixedLosses:
    """A model whose loss for a target is the target itself divided by 10, in nats."""

    device = torch.device("cpu")

    def __call__(self, idx, targets, *, reduction):
        assert reduction == "none"
        return targets / 10


class LetterTokenizer:
    bos_id = BOS

    def encode(self, text):
        return [1 + LETTERS.index(letter) for letter in text]

    def decode(self, ids):
        assert BOS not in ids
        return "".join(LETTERS[i - 1] for i in ids)


class BigramModel:
    """Causal, and sensitive to the two tokens before; from `bos_after` positions on it wants to begin a document."""

    device = torch.device("cpu")

    def __init__(self, sequence_len=16, bos_after=10**9):
        self.config = SimpleNamespace(sequence_len=sequence_len, vocab_size=VOCAB_SIZE)
        self.bos_after = bos_after
        self.table = torch.randn(VOCAB_SIZE, VOCAB_SIZE, generator=torch.Generator().manual_seed(0))
        self.table[:, BOS] = -20
        self.longest = 0

    def hidden(self, idx):
        self.longest = max(self.longest, idx.size(1))
        previous = torch.cat((idx[:, :1], idx[:, :-1]), dim=1)
        hidden = self.table[idx] + 0.9 * self.table[previous]
        hidden[:, self.bos_after :, BOS] = 50
        return hidden

    def logits(self, hidden):
        return hidden


def batch(*rows):
    targets = torch.tensor(rows)
    return SimpleNamespace(idx=torch.zeros_like(targets), targets=targets)


SIZES = np.array([0, 1, 2, 3])  # bytes of each token


def test_bits_per_byte_match_a_sum_by_hand():
    result = evaluate_bpb(FixedLosses(), [batch([1, 2], [3, 3]), batch([2, 1])], SIZES.astype(np.int32))
    assert result.nats == pytest.approx(0.1 + 0.2 + 0.3 + 0.3 + 0.2 + 0.1)
    assert (result.bytes, result.tokens) == (1 + 2 + 3 + 3 + 2 + 1, 6)
    assert result.bpb == pytest.approx(result.nats / math.log(2) / 12)


def test_the_standard_error_is_the_spread_of_resampled_rows_and_unknown_for_one():
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 4, size=(400, 6))  # token 0 has no text
    token_bytes = np.array([0, 3, 1, 2])
    result = evaluate_bpb(FixedLosses(), [batch(*part.tolist()) for part in np.split(rows, 10)], token_bytes)
    nats, sizes = (rows / 10).sum(1), token_bytes[rows].sum(1)
    drawn = rng.integers(0, len(rows), size=(4000, len(rows)))
    resampled = nats[drawn].sum(1) / sizes[drawn].sum(1) / math.log(2)
    assert result.se == pytest.approx(resampled.std(), rel=0.05)
    assert evaluate_bpb(FixedLosses(), [batch([1, 2]), batch([0, 0])], SIZES).se == math.inf
    assert evaluate_bpb(FixedLosses(), [batch([1, 2]), batch([2, 3])], SIZES).se < math.inf


def test_special_and_ignored_tokens_count_neither_nats_nor_bytes():
    token_bytes = torch.tensor([2, 1, 0, 0])  # ignored targets must not be read as token 0, nor as the last one
    result = evaluate_bpb(FixedLosses(), [batch([1, 2, IGNORE_INDEX, 3, 1])], token_bytes)
    assert result.nats == pytest.approx(0.2)
    assert (result.bytes, result.tokens) == (2, 2)


@pytest.mark.parametrize("batches", [[], [batch([2, IGNORE_INDEX])]])
def test_without_any_byte_the_result_is_inf_and_no_crash(batches):
    result = evaluate_bpb(FixedLosses(), batches, np.array([1, 1, 0]))
    assert (result.bpb, result.nats, result.bytes, result.tokens) == (math.inf, 0.0, 0, 0)


def test_bits_per_byte_do_not_depend_on_how_rows_are_batched():
    rows = torch.randint(0, 4, (6, 5), generator=torch.Generator().manual_seed(1)).tolist()
    together = evaluate_bpb(FixedLosses(), [batch(*rows)], SIZES)
    apart = evaluate_bpb(FixedLosses(), [batch(row) for row in rows], SIZES)
    assert apart.bpb == pytest.approx(together.bpb, rel=1e-6)
    assert (apart.bytes, apart.tokens) == (together.bytes, together.tokens)


def bpb_on_rank(rank, world_size):
    mine = [[batch([1, 2, 3])], [batch([3, 3, 0]), batch([1, 1, 1])]][rank]  # one batch here, two there
    return evaluate_bpb(FixedLosses(), mine, SIZES)


def test_ranks_with_unequal_numbers_of_batches_sum_to_what_one_process_finds(tmp_path):
    alone = evaluate_bpb(FixedLosses(), [batch([1, 2, 3]), batch([3, 3, 0]), batch([1, 1, 1])], SIZES)
    for result in run_ranks(bpb_on_rank, 2, tmp_path / "ranks"):
        assert result.nats == pytest.approx(alone.nats)
        assert (result.bytes, result.tokens) == (alone.bytes, alone.tokens)


def test_greedy_samples_of_a_batch_equal_a_loop_over_one_row():
    model, tokenizer = BigramModel(), LetterTokenizer()
    prompts = ["the cat", "a", "", "hello wor"]
    for prompt, text in zip(prompts, sample_completions(model, tokenizer, prompts, 5), strict=True):
        row = [BOS, *tokenizer.encode(prompt)]
        for _ in range(5):
            row.append(model.hidden(torch.tensor([row]))[0, -1].argmax().item())
        assert text == tokenizer.decode(row[-5:])


def test_samples_end_at_the_context_at_the_next_document_and_at_the_number_of_tokens_asked_for():
    model = BigramModel(sequence_len=8)
    texts = sample_completions(model, LetterTokenizer(), ["abc", "abcdefg", "a" * 30], 100)
    assert (list(map(len, texts)), model.longest) == ([5, 1, 1], 8)
    texts = sample_completions(BigramModel(bos_after=6), LetterTokenizer(), ["abc", "a"], 9)
    assert list(map(len, texts)) == [3, 5]
    assert sample_completions(BigramModel(), LetterTokenizer(), ["abc", ""], 0) == ["", ""]


def test_random_samples_repeat_with_the_seed_and_differ_without():
    def draw(seed):
        options = {"temperature": 1.0, "generator": torch.Generator().manual_seed(seed)}
        return sample_completions(BigramModel(), LetterTokenizer(), ["abc"] * 3, 9, **options)

    assert draw(1) == draw(1) != draw(2)
    assert len(set(draw(1))) == 3  # rows with the same prompt draw apart


def test_sample_prompts_are_texts_that_invite_a_continuation():
    assert len(SAMPLE_PROMPTS) == len(set(SAMPLE_PROMPTS)) >= 5
    assert all(prompt and prompt == prompt.strip() for prompt in SAMPLE_PROMPTS)


def test_a_whole_split_counts_every_byte_once_and_a_part_is_rounded_up_to_batches(tokenizer, tiny_model, shards, texts):
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)
    whole = evaluate_split(tiny_model, tokenizer, shards[3:], runtime, 2)
    assert whole.bytes == sum(len(text.encode()) for text in texts[170:])
    assert whole.tokens == sum(map(len, tokenizer.encode_batch(texts[170:])))
    guessing = math.log2(tokenizer.vocab_size) * whole.tokens / whole.bytes
    assert whole.bpb == pytest.approx(guessing, rel=0.2)  # random weights know next to nothing
    T = tiny_model.config.sequence_len
    part = evaluate_split(tiny_model, tokenizer, shards[:1], runtime, 2, num_tokens=2 * T + 1)
    assert 2 * T < part.tokens <= 4 * T  # two batches of two rows, but for the beginnings of documents


def test_bits_per_byte_agree_with_the_mean_loss_of_the_model(tokenizer, tiny_model):
    ids = [tokenizer.bos_id, *tokenizer.encode("the river under the silver mountain")]
    row = torch.tensor([ids])
    one = SimpleNamespace(idx=row[:, :-1], targets=row[:, 1:])
    loss = tiny_model(one.idx, one.targets).item()
    result = evaluate_bpb(tiny_model, [one], tokenizer.token_bytes())
    assert result.bpb == pytest.approx(loss * (len(ids) - 1) / math.log(2) / 35, rel=1e-5)
