"""Rows of conversations: targets exactly where the assistant speaks, nothing lost or doubled, resumable anywhere."""

import random
from collections import Counter
from itertools import islice, zip_longest

import pytest
import torch
from conftest import WORDS
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from safetensors.torch import load, save

from nanochat.common import Runtime, UserError
from nanochat.data.chat import render
from nanochat.data.chat_loader import ChatLoader, Rows, hold_out, pack_conversations, pack_whole, validation_batches
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.model.loss import IGNORE_INDEX
from nanochat.tokenizer import Tokenizer
from nanochat.training.loop import accumulate_gradients

T = 64
CPU = torch.device("cpu")


def make_conversation(rng: random.Random, num_words: int) -> dict:
    """One to three questions with answers, some with a system message, some with a tool call."""

    def words() -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(1, num_words)))

    messages = [{"role": "system", "content": words()}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        call = [{"type": "python", "text": "2+3"}, {"type": "python_output", "text": "5"}]
        parts = [{"type": "text", "text": words()}, *call, {"type": "text", "text": words()}]
        messages.append({"role": "user", "content": words()})
        messages.append({"role": "assistant", "content": parts if rng.random() < 0.4 else words()})
    return {"messages": messages}


def make_conversations(count: int, seed: int = 0, num_words: int = 8) -> list[dict]:
    rng = random.Random(seed)
    return [make_conversation(rng, num_words) for _ in range(count)]


CONVERSATIONS = make_conversations(61)


@pytest.fixture
def packed(tokenizer) -> Rows:
    return pack_conversations(CONVERSATIONS, tokenizer, T)


def make_world(packed: Rows, batch_size: int = 2, world_size: int = 1, **options) -> list[ChatLoader]:
    return [ChatLoader(packed, batch_size, rank=rank, world_size=world_size, **options) for rank in range(world_size)]


def rows_of(batches) -> list[tuple[list[int], list[int]]]:
    return [row for b in batches for row in zip(b.idx.tolist(), b.targets.tolist(), strict=True)]


def global_rows(world: list[ChatLoader], num_batches: int | None = None) -> list[tuple[list[int], list[int]]]:
    """The rows of the whole run in order: one of each rank in turn."""
    by_rank = [rows_of(islice(loader, num_batches)) for loader in world]
    return [row for together in zip_longest(*by_rank) for row in together if row]


def conversations_of(rows, bos_id: int) -> Counter:
    """The conversations in rows, as (tokens, targets): what stands between one BOS and the next."""
    found = Counter()
    for idx, targets in rows:
        tokens = [*idx, targets[-1] if targets[-1] != IGNORE_INDEX else bos_id]
        is_target = [False, *(target != IGNORE_INDEX for target in targets)]
        starts = [i for i, token in enumerate(tokens) if token == bos_id]
        for start, end in zip(starts, [*starts[1:], len(tokens)], strict=True):
            if end - start > 1:  # else padding
                found[tuple(tokens[start:end]), tuple(is_target[start:end])] += 1
    return found


def rendered(conversations, tokenizer, sequence_len: int = T) -> Counter:
    """What must be in the rows of an epoch; a conversation that does not fit is in none."""
    whole = [render(tokenizer, conversation, max_tokens=sequence_len + 1) for conversation in conversations]
    return Counter((tuple(one.ids), tuple(one.mask)) for one in whole if one.ids)


# --- packing ---
def plain_rows(lengths, row_tokens: int, choice: int) -> list[list[int]]:
    """The rule of `pack_whole` in words."""
    present = [i for i, length in enumerate(lengths) if length]
    waiting, upcoming, rows = present[:choice], present[choice:], []
    while waiting:
        row, room, candidates = [], row_tokens, waiting[:1]
        while candidates:
            best = max(candidates, key=lambda i: (lengths[i], -i))
            row.append(best)
            room -= lengths[best]
            waiting.remove(best)
            waiting += upcoming[:1]
            upcoming = upcoming[1:]
            candidates = [i for i in waiting if lengths[i] <= room]
        rows.append(row)
    return rows


@given(st.lists(st.integers(0, 20), max_size=60), st.integers(20, 45), st.sampled_from([1, 2, 5, 100]))
def test_packing_follows_the_rule_in_words(lengths, row_tokens, choice):
    rows = pack_whole(lengths, row_tokens, choice=choice)
    assert rows == plain_rows(lengths, row_tokens, choice)
    assert sorted(i for row in rows for i in row) == [i for i, length in enumerate(lengths) if length]
    assert all(sum(lengths[i] for i in row) <= row_tokens for row in rows)


def test_packing_by_best_fit_leaves_little_padding():
    rng = random.Random(0)
    lengths = [int(2000 * rng.random() ** 3) + 5 for _ in range(3000)]
    assert sum(lengths) / (2049 * len(pack_whole(lengths, 2049))) > 0.99


# --- targets ---
def spoken(tokens: list[int], tokenizer) -> list[bool]:
    """Whether each token is the assistant's own, read off the special tokens alone."""
    special = tokenizer.special_ids
    is_speaking, in_output, own = False, False, []
    for token in tokens:
        in_output = in_output or token == special["<|output_start|>"]
        own.append(is_speaking and not in_output)
        in_output = in_output and token != special["<|output_end|>"]
        is_speaking = (is_speaking or token == special["<|assistant_start|>"]) and token != special["<|assistant_end|>"]
    return own


@pytest.mark.parametrize("world_size", [1, 2])
def test_targets_are_exactly_the_next_tokens_that_the_assistant_says(packed, tokenizer, world_size):
    num_targets = 0
    for loader in make_world(packed, 3, world_size, epochs=1):
        for batch in loader:
            assert batch.idx.shape == batch.targets.shape == (3, T)
            assert batch.num_targets == (batch.targets != IGNORE_INDEX).sum().item()
            num_targets += batch.num_targets
            for idx, targets in rows_of([batch]):
                tokens = [*idx, targets[-1] if targets[-1] != IGNORE_INDEX else tokenizer.bos_id]
                own = spoken(tokens, tokenizer)
                assert targets == [t if is_own else IGNORE_INDEX for t, is_own in zip(tokens[1:], own[1:], strict=True)]
    assert num_targets == packed.num_targets > 0


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 4), (2, 3), (3, 2), (8, 1)])
def test_an_epoch_holds_every_conversation_exactly_once(packed, tokenizer, world_size, batch_size):
    rows = global_rows(make_world(packed, batch_size, world_size, epochs=1))
    assert conversations_of(rows, tokenizer.bos_id) == rendered(CONVERSATIONS, tokenizer)


def test_epochs_repeat_all_rows_in_another_order_and_are_counted(packed, tokenizer):
    batches = list(ChatLoader(packed, 1, epochs=3))
    assert [batch.epoch for batch in batches] == [epoch for epoch in range(3) for _ in packed.rows]
    num_rows = len(packed.rows)
    epochs = [rows_of(batches[i * num_rows : (i + 1) * num_rows]) for i in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    assert len({str(sorted(epoch)) for epoch in epochs}) == 1


def test_a_conversation_of_exactly_a_row_fits_and_one_token_more_is_cut_after_an_answer_or_left_out(packed, tokenizer):
    conversation = make_conversation(random.Random(3), 8)
    expected = render(tokenizer, conversation).ids
    conversation["messages"] += [{"role": "user", "content": "And?"}, {"role": "assistant", "content": "Yes."}]
    length = len(render(tokenizer, conversation).ids)
    whole = pack_conversations([conversation], tokenizer, length - 1)
    assert (whole.num_tokens, whole.num_cut, whole.num_left_out) == (length, 0, 0)
    cut = pack_conversations([conversation], tokenizer, length - 2)
    assert (cut.num_cut, cut.num_left_out) == (1, 0)
    assert "1 cut after an answer" in str(cut)
    ((idx, _),) = rows_of(ChatLoader(cut, 1, epochs=1))
    assert idx[: len(expected)] == expected
    assert set(idx[len(expected) :]) <= {tokenizer.bos_id}
    long = {"messages": [{"role": "user", "content": "river " * 200}, {"role": "assistant", "content": "Yes."}]}
    with_long = pack_conversations([*CONVERSATIONS, long], tokenizer, T)
    assert with_long.num_left_out == packed.num_left_out + 1
    assert f"{with_long.num_left_out} left out" in str(with_long)
    assert with_long.rows == packed.rows
    assert pack_conversations([long], tokenizer, T).rows == []


# --- the same for any number of processes ---
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 4), (2, 1), (2, 2), (4, 1), (3, 2)])
def test_global_batches_do_not_depend_on_processes_or_device_batch(packed, world_size, batch_size):
    num_rows = 24
    reference = global_rows(make_world(packed, 1, 1), num_rows)
    world = make_world(packed, batch_size, world_size)
    assert global_rows(world, num_rows // (batch_size * world_size)) == reference


def test_an_epoch_is_filled_up_to_whole_steps_with_rows_that_do_not_count(packed):
    step_rows = 16
    assert len(packed.rows) % step_rows, "or the test shows nothing"
    for world_size, batch_size in ((1, 4), (2, 2), (2, 8)):
        world = [list(loader) for loader in make_world(packed, batch_size, world_size, epochs=1, step_rows=step_rows)]
        assert len({len(batches) for batches in world}) == 1
        assert len(world[0]) * batch_size * world_size == -(-len(packed.rows) // step_rows) * step_rows
        assert sum(batch.num_targets for batches in world for batch in batches) == packed.num_targets


def measure_on_rank(rank: int, world_size: int, folder):
    """What `packed` is made of; and, of conversations one of which is broken, the error."""
    tokenizer = Tokenizer.load(folder)
    packed = pack_conversations(CONVERSATIONS, tokenizer, T)
    broken = [*CONVERSATIONS[:4], {"messages": [{"role": "nobody", "content": "Hello"}]}]
    with pytest.raises(UserError, match="nobody") as error:
        pack_conversations(broken, tokenizer, T)
    return packed.rows, packed.num_targets, packed.fingerprint, str(error.value)


def test_ranks_that_share_the_measuring_find_the_same_rows_and_errors(packed, tokenizer_folder, tmp_path):
    first, second = run_ranks(measure_on_rank, 2, tmp_path / "ranks", tokenizer_folder)
    assert first == second
    assert first[:3] == (packed.rows, packed.num_targets, packed.fingerprint)


# --- resuming ---
def resume(packed: Rows, world: list[ChatLoader], batch_size: int, world_size: int, **options) -> list[ChatLoader]:
    """Other loaders that go on where those of `world` are, whose state was written and read."""
    states = [load(save(loader.state_dict())) for loader in world]
    resumed = make_world(packed, batch_size, world_size, **options)
    for loader in resumed:
        loader.load_state_dict(states)
    return resumed


@pytest.mark.parametrize("epochs", [None, 2])
@pytest.mark.parametrize("num_batches", [0, 1, 3, 9, 11])
def test_resumed_batches_are_equal_to_never_having_stopped(packed, num_batches, epochs):
    world = make_world(packed, 2, 2, epochs=epochs)
    global_rows(world, num_batches)
    resumed = resume(packed, world, 2, 2, epochs=epochs)
    assert global_rows(resumed, 8) == global_rows(world, 8)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 2)])
def test_a_run_goes_on_with_the_very_next_row_at_another_world_size(packed, before, after):
    world = make_world(packed, 1, before)
    rows = global_rows(world, 6)
    rows += global_rows(resume(packed, world, 1, after), 6)
    assert rows == global_rows(make_world(packed, 1, 1), len(rows))


def test_four_two_one_and_again_four_ranks_read_every_conversation_of_an_epoch_once(packed, tokenizer):
    world, rows, options = make_world(packed, 1, 4, epochs=1, step_rows=4), [], {"epochs": 1, "step_rows": 4}
    for world_size in (2, 1, 4):
        rows += global_rows(world, 4 // len(world))
        world = resume(packed, world, 1, world_size, **options)
    rows += global_rows(world)
    assert rows == global_rows(make_world(packed, 1, 1, **options))
    assert conversations_of(rows, tokenizer.bos_id) == rendered(CONVERSATIONS, tokenizer)


def test_other_conversations_or_another_order_are_refused(packed, tokenizer):
    world = make_world(packed)
    changed = pack_conversations([*CONVERSATIONS[:-1], make_conversation(random.Random(99), 8)], tokenizer, T)
    for rows, options in ((changed, {}), (packed, {"seed": 1})):
        with pytest.raises(UserError, match="not those of the run"):
            resume(rows, world, 2, 1, **options)


# --- validation ---
@pytest.mark.parametrize("num_tokens", [0, 1, 5 * T])
def test_validation_begins_anew_every_time_and_ends(packed, num_tokens):
    runtime = Runtime(0, 0, 1, CPU, torch.float32)
    first, second = (rows_of(validation_batches(packed, runtime, 2, num_tokens)) for _ in range(2))
    assert first == second
    whole = len(packed.rows) + len(packed.rows) % 2
    assert len(first) == {0: whole, 1: 2, 5 * T: 6}[num_tokens]


def test_conversations_held_out_are_others_however_often_they_come_and_of_one_none():
    conversations = CONVERSATIONS + CONVERSATIONS[:30]
    train, val = hold_out(conversations)
    assert sorted(train + val) == list(range(len(conversations)))
    texts = [{str(conversations[i]) for i in side} for side in (train, val)]
    assert not texts[0] & texts[1]
    assert len(texts[1]) == 4  # 5 % of 61, rounded up
    reversed_train, _ = hold_out(conversations[::-1])
    assert {str(conversations[::-1][i]) for i in reversed_train} == texts[0]
    assert [len(side) for side in hold_out(CONVERSATIONS[:2])] == [1, 1]
    assert hold_out(CONVERSATIONS[:1]) == ([0], [])
    assert hold_out([]) == ([], [])


# --- the loss ---
@pytest.fixture(scope="session")
def tiny_tokenizer(texts) -> Tokenizer:
    return Tokenizer.train(texts[:50], 300)


@settings(max_examples=25, deadline=None)
@given(st.integers(64, 200), st.integers(1, 5), st.integers(1, 60), st.integers(1, 6))
def test_losses_and_gradients_are_finite_at_any_context_length_and_batch_size(
    tiny_tokenizer, sequence_len, batch_size, num_words, count
):
    """Also where most rows are padding, and where no conversation is short enough to be there at all."""
    packed = pack_conversations(make_conversations(count, sequence_len, num_words), tiny_tokenizer, sequence_len)
    config = GPTConfig.from_depth(1, vocab_size=tiny_tokenizer.vocab_size, sequence_len=sequence_len, head_dim=32)
    model = build_model(config, generator=torch.Generator().manual_seed(0))
    loader = ChatLoader(packed, batch_size, epochs=1, step_rows=2 * batch_size)
    for _ in range(loader.end // (2 * batch_size)):
        assert torch.isfinite(accumulate_gradients(model, loader, 2, device=CPU))
    assert next(loader, None) is None
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
