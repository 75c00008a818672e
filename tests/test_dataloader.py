"""The loader: nothing lost, rows full, the same for any number of processes, and resumable at every point."""

import os
import random
import subprocess
import sys
import threading
import time
from collections import Counter
from itertools import islice, pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch
from conftest import write_shard
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save

from nanochat.common import UserError
from nanochat.data import dataloader
from nanochat.data.dataloader import Stream, TextLoader
from nanochat.model.loss import IGNORE_INDEX

T = 16


class NumberTokenizer:
    """Texts "5 3" become tokens 5, 6, 7: every token of a data set can be a number of its own."""

    bos_id = 0

    def encode_packed(self, texts):
        spans = [map(int, text.split()) for text in texts.to_pylist()]
        tokens = [np.arange(start, start + length, dtype=np.uint32) for start, length in spans]
        return np.concatenate([*tokens, np.empty(0, np.uint32)]), np.cumsum([0, *map(len, tokens)])


def numbered_texts(lengths):
    """Texts for `NumberTokenizer` with tokens 1, 2, 3, ... over all documents."""
    starts = np.cumsum([1, *lengths])[:-1]
    return [f"{start} {length}" for start, length in zip(starts, lengths, strict=True)]


def random_lengths(seed, num_documents):
    """Mostly a few to the row, some of one token, some of several rows."""
    rng = random.Random(seed)
    kinds = [lambda: 1, lambda: rng.randrange(1, T // 2), lambda: rng.randrange(1, T + 2), lambda: rng.randrange(6 * T)]
    return [1 + rng.choice(kinds)() for _ in range(num_documents)]


LENGTHS = random_lengths(0, 150)


@pytest.fixture(autouse=True)
def small_reads(monkeypatch):
    """Several reads in a row group, several row groups in an epoch, and choices of best fit that differ."""
    monkeypatch.setattr(dataloader, "BUFFER_DOCS", 3)
    monkeypatch.setattr(dataloader, "DOCS_PER_READ", 7)
    monkeypatch.setattr(dataloader, "READS_AHEAD", 2)


@pytest.fixture(autouse=True)
def no_thread_survives():
    """Wherever a test left its loaders, their threads end soon."""
    yield
    wait_for_reader_threads()


def wait_for_reader_threads(seconds=5.0):
    deadline = time.monotonic() + seconds
    while any(thread.name.startswith("text reader") for thread in threading.enumerate()):
        assert time.monotonic() < deadline, "a reader thread is still alive"
        time.sleep(0.01)


@pytest.fixture
def paths(tmp_path):
    texts = numbered_texts(LENGTHS)
    parts = [texts[:70], texts[70:110], texts[110:]]
    return [write_shard(tmp_path / f"shard_{i}.parquet", part, row_group_size=16) for i, part in enumerate(parts)]


def make_loader(paths, batch_size=2, rank=0, world_size=1, **options):
    return TextLoader(NumberTokenizer(), paths, batch_size, T, rank=rank, world_size=world_size, **options)


def make_world(paths, batch_size, world_size, **options):
    return [make_loader(paths, batch_size, rank, world_size, **options) for rank in range(world_size)]


def rows_of(batch):
    """The rows as tuples of tokens, inputs and targets checked against each other; those all padding left out."""
    assert batch.idx.dtype == batch.targets.dtype == torch.int64
    assert batch.num_targets == (batch.targets != IGNORE_INDEX).sum()
    rows = []
    for idx, targets in zip(batch.idx.tolist(), batch.targets.tolist(), strict=True):
        n = sum(target != IGNORE_INDEX for target in targets)
        assert targets[n:] == [IGNORE_INDEX] * (len(targets) - n)
        assert idx[1 : n + 1] == targets[: min(n, len(idx) - 1)]
        rows += [(idx[0], *targets[:n])] if n else []
    return rows


def rows_by_rank(world, num_batches=None):
    return [[row for batch in islice(loader, num_batches) for row in rows_of(batch)] for loader in world]


def rows_in_order(world, num_rows):
    """The next `num_rows` rows of the whole run, in the order they are dealt to the ranks."""
    num_batches = num_rows // (len(world) * world[0].batch_size)
    return [row for together in zip(*rows_by_rank(world, num_batches), strict=True) for row in together]


def pieces_of(rows, bos_id=0):
    """What stands between the beginning-of-sequence tokens, empty pieces (a row's filler) left out."""
    pieces = []
    for row in rows:
        assert row[0] == bos_id
        for token in row:
            if token == bos_id:
                pieces.append([])
            else:
                pieces[-1].append(token)
    return [tuple(piece) for piece in pieces if piece]


def resume(paths, world, batch_size, world_size, **options):
    """Other loaders that go on where those of `world` are, whose state was written and read."""
    states = [load(save(loader.state_dict())) for loader in world]
    resumed = make_world(paths, batch_size, world_size, **options)
    for loader in resumed:
        loader.load_state_dict(states)
    return resumed


def assert_same(batches, others):
    for a, b in zip(batches, others, strict=True):
        assert torch.equal(a.idx, b.idx)
        assert torch.equal(a.targets, b.targets)
        assert (a.num_targets, a.epoch) == (b.num_targets, b.epoch)


# --- packing ---
def reference_rows(lengths, row_tokens):
    """Rows as (document, begin, end) pieces, by the rule in words: the largest that fits, of equal ones the one that
    came first; when none fits, or the row is empty and there is one longer than it, the longest is cut."""
    documents = [(i, 0, length) for i, length in enumerate(lengths)]  # in order of arrival
    rows = []
    while documents:
        row, room = [], row_tokens
        while room and documents:
            sizes = [end - begin + 1 for _, begin, end in documents]
            fitting = [size for size in sizes if size <= room]
            if fitting and not (room == row_tokens and max(sizes) > room):
                document, begin, end = documents.pop(sizes.index(max(fitting)))
            else:
                last = len(sizes) - 1 - sizes[::-1].index(max(sizes))
                document, begin, whole = documents.pop(last)
                end = begin + room - 1
                documents.append((document, end, whole))
            row.append((document, begin, end))
            room -= end - begin + 1
        rows.append(row)
    return rows


document_lengths = st.lists(st.integers(1, 40), min_size=1, max_size=30)


@given(document_lengths, st.integers(2, 20))
def test_packing_follows_the_rule_in_words(lengths, row_tokens):
    packer, starts = Stream(row_tokens, bos_id=0), np.cumsum([1, *lengths])
    for start, length in zip(starts, lengths, strict=False):
        packer.add(np.arange(start, start + length, dtype=np.int32))
    for pieces in reference_rows(lengths, row_tokens):
        expected = [token for i, a, b in pieces for token in (0, *range(starts[i] + a, starts[i] + b))]
        assert packer.next_row().tolist() == expected
    assert not packer.documents


@given(document_lengths, document_lengths, st.integers(2, 20))
def test_packing_loses_nothing_and_fills_rows_while_documents_last(lengths, later_lengths, row_tokens):
    packer, starts, rows = Stream(row_tokens, bos_id=0), np.cumsum([1, *lengths, *later_lengths]), []
    for i, length in enumerate(lengths + later_lengths):
        packer.add(np.arange(starts[i], starts[i] + length, dtype=np.int32))
        assert packer.num_tokens == sum(len(document) + 1 for document in packer.documents)
        if i >= len(lengths) and packer.num_tokens >= row_tokens:  # some arrive when rows have been taken
            rows.append(packer.next_row())
            assert len(rows[-1]) == row_tokens
    while packer.documents:
        is_enough = packer.num_tokens >= row_tokens
        rows.append(packer.next_row())
        assert len(rows[-1]) == row_tokens or not is_enough
    assert packer.num_tokens == 0
    assert all(row[0] == 0 for row in rows)
    assert sorted(token for row in rows for token in row.tolist() if token) == list(range(1, starts[-1]))
    long = np.arange(1, 10**4, dtype=np.int32)  # cut into rows without being copied again
    packer.add(long)
    packer.next_row()
    assert np.shares_memory(packer.documents[0], long)


# --- every token once ---
def assert_epochs_are_whole(rows, lengths, num_epochs):
    """Each document occurs exactly `num_epochs` times, its pieces put together again."""
    pieces = pieces_of(rows)
    assert all(b - a == 1 for piece in pieces for a, b in pairwise(piece))  # of one document each
    counts = Counter(token for piece in pieces for token in piece)
    assert counts == dict.fromkeys(range(1, sum(lengths) + 1), num_epochs)
    starts = set(np.cumsum([1, *lengths])[:-1].tolist())
    assert all(not starts & set(piece[1:]) for piece in pieces)  # a document starts with BOS, never amid a piece


@pytest.mark.parametrize("num_epochs", [1, 2, 3])
@pytest.mark.parametrize(("batch_size", "world_size"), [(1, 1), (5, 1), (3, 2), (2, 8), (2, 3), (1, 5), (2, 16)])
def test_epochs_hold_every_token_of_every_document_exactly_once_each(paths, num_epochs, batch_size, world_size):
    by_rank = rows_by_rank(make_world(paths, batch_size, world_size, epochs=num_epochs))
    assert_epochs_are_whole([row for rows in by_rank for row in rows], LENGTHS, num_epochs)


def test_an_epoch_has_the_tokens_and_bytes_of_all_documents_most_of_them_whole(shards, texts, tokenizer):
    batches = list(TextLoader(tokenizer, shards, 4, 32, epochs=1))
    rows = [row for batch in batches for row in rows_of(batch)]
    lengths = tokenizer.token_bytes()
    assert sum(lengths[token] for row in rows for token in row[1:]) == sum(len(text.encode()) for text in texts)
    expected = Counter(token for text in texts for token in tokenizer.encode(text))
    assert Counter(token for piece in pieces_of(rows, tokenizer.bos_id) for token in piece) == expected
    assert sum(batch.num_targets for batch in batches) == sum(len(row) - 1 for row in rows)
    batches = TextLoader(tokenizer, shards, 1, 4096, epochs=1)  # no document is longer, none need be cut
    pieces = [piece for batch in batches for piece in pieces_of(rows_of(batch), tokenizer.bos_id)]
    whole = Counter(tuple(tokenizer.encode(text)) for text in texts)
    assert sum((Counter(pieces) & whole).values()) > 0.8 * len(texts)


def test_rows_of_an_endless_loader_are_full_and_start_with_bos_and_epochs_are_counted(paths):
    batches = list(islice(make_loader(paths, 4), 150))
    for batch in batches:
        assert (batch.idx[:, 0] == 0).all()
        assert batch.num_targets == (batch.targets != IGNORE_INDEX).sum() == 4 * T
    epochs = [batch.epoch for batch in batches]
    assert epochs[0] == 0
    assert epochs == sorted(epochs)
    assert epochs[-1] >= 2
    assert set(epochs) == set(range(epochs[-1] + 1))


def test_rows_are_full_however_short_the_documents(tmp_path):
    paths = [write_shard(tmp_path / "a.parquet", numbered_texts([1] * 900), row_group_size=200)]
    batches = list(make_loader(paths, 2, epochs=1))
    assert all(batch.num_targets == 2 * T for batch in [*batches[:-8], *islice(make_loader(paths, 2), 300)])
    assert_epochs_are_whole([row for batch in batches for row in rows_of(batch)], [1] * 900, 1)


def test_documents_of_many_rows_come_whole_and_in_order_and_the_last_batch_is_padded(tmp_path):
    lengths = [1000, 1, 700, 2, T, T + 1, T - 1]
    loader = make_loader([write_shard(tmp_path / "a.parquet", numbered_texts(lengths))], 64, epochs=1)
    *_, last = batches = list(loader)
    assert list(loader) == []  # iteration stays ended
    rows = [row for batch in batches for row in rows_of(batch)]
    assert_epochs_are_whole(rows, lengths, 1)
    assert [token for row in rows for token in row if 0 < token <= 1000] == list(range(1, 1001))
    assert (last.targets == IGNORE_INDEX).any()
    assert (last.targets != IGNORE_INDEX).any()
    assert last.idx.min() >= 0  # padding is a token the model knows


@pytest.mark.parametrize("row_group_size", [1, 3, 5, 10, 150])
def test_the_size_of_row_groups_changes_nothing(tmp_path, row_group_size, paths):
    other = write_shard(tmp_path / "other" / "a.parquet", numbered_texts(LENGTHS), row_group_size=row_group_size)
    loader = make_loader([other], 4)
    assert rows_by_rank([loader], 100) == rows_by_rank([make_loader(paths, 4)], 100)
    waiting = [len(stream.waiting) for stream in loader.streams.values()]
    assert max(waiting) < 60, waiting  # no stream is dealt more documents than the others


@pytest.mark.parametrize("num_documents", [1, 3, 8])
@pytest.mark.parametrize("world_size", [1, 4])
def test_fewer_documents_than_streams_are_repeated_endlessly(tmp_path, num_documents, world_size):
    paths = [write_shard(tmp_path / "a.parquet", numbered_texts([3] * num_documents))]
    rows = rows_in_order(make_world(paths, 2, world_size), 80)
    assert all(len(row) == T + 1 for row in rows)
    assert {token for row in rows for token in row} == set(range(3 * num_documents + 1))
    once = [row for ranks in rows_by_rank(make_world(paths, 2, world_size, epochs=1)) for row in ranks]
    assert_epochs_are_whole(once, [3] * num_documents, 1)


# --- any number of processes ---
@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 6])
def test_global_batches_do_not_depend_on_processes_or_device_batch(paths, world_size, batch_size):
    expected = rows_in_order([make_loader(paths, 1)], 192)
    assert rows_in_order(make_world(paths, batch_size, world_size), 192) == expected


# --- resuming ---
@pytest.mark.parametrize("num_batches", [0, 1, 2, 7, 30, 31, 32, 33, 34, 60, 97])
@pytest.mark.parametrize("batches_ahead", [0, 1, 3])
def test_resumed_batches_are_bit_equal_to_never_having_stopped(paths, num_batches, batches_ahead):
    loader, straight = make_loader(paths, 3), make_loader(paths, 3)
    loader.batches_ahead = batches_ahead
    list(islice(loader, num_batches))
    (resumed,) = resume(paths, [loader], 3, 1)
    resumed.batches_ahead = batches_ahead
    list(islice(straight, num_batches))
    expected = list(islice(straight, 60))
    assert_same(list(islice(resumed, 60)), expected)
    assert_same(list(islice(loader, 60)), expected)  # being asked for the state has changed nothing


def test_every_read_and_epoch_boundary_can_be_resumed_at(paths):
    loader = make_loader(paths, 1)
    states, batches = [save(loader.state_dict())], []
    for batch in islice(loader, 260):
        batches.append(batch)
        states.append(save(loader.state_dict()))
    places = {tuple(load(state)["0.place"].tolist()) for state in states}
    assert {place[0] for place in places} >= {0, 1}
    assert any(place[3] % 16 for place in places)  # amid a row group
    for i in range(0, 250, 3):
        resumed = make_loader(paths, 1)
        resumed.load_state_dict([load(states[i])])
        assert_same(list(islice(resumed, 10)), batches[i : i + 10])


@pytest.mark.parametrize(
    ("before", "after"), [(1, 2), (4, 1), (2, 8), (8, 4), (1, 8), (8, 1), (3, 1), (3, 3), (5, 5), (16, 8), (16, 16)]
)
@pytest.mark.parametrize("num_rows", [48, 240])
def test_a_run_goes_on_with_the_very_next_row_at_another_world_size(paths, before, after, num_rows):
    world, batch_size = make_world(paths, 1, before), 3
    for loader in world:
        loader.batches_ahead = 2
    num_rows = len(rows_in_order(world, num_rows))
    expected = rows_in_order(make_world(paths, 1, before), num_rows + 240)[num_rows:]
    count = len(expected) // (after * batch_size) * after * batch_size
    assert rows_in_order(resume(paths, world, batch_size, after), count) == expected[:count]


@pytest.mark.parametrize("num_rows", [1, 3, 5, 6])
def test_rows_that_the_new_ranks_could_not_have_shared_evenly_are_no_obstacle(paths, num_rows):
    loader = make_loader(paths, 1)
    rows_in_order([loader], num_rows)
    resumed = resume(paths, [loader], 2, 4)
    assert sorted(rows_in_order(resumed, 40)) == sorted(rows_in_order([loader], 40))


def test_a_run_changes_its_world_size_again_and_again(paths):
    world, rows = [make_loader(paths, 1)], []
    for world_size in (2, 8, 1, 4, 8, 2, 1):
        rows += rows_in_order(world, 16)
        world = resume(paths, world, 1, world_size)
    assert rows == rows_in_order([make_loader(paths, 1)], len(rows))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_an_epoch_resumed_anywhere_has_the_same_state_and_ends_as_it_would_have(paths, world_size):
    whole = [list(loader) for loader in make_world(paths, 2, world_size, epochs=1)]
    for num_batches in range(min(map(len, whole)) + 1):
        world = make_world(paths, 2, world_size, epochs=1)
        for loader in world:
            loader.batches_ahead = 1
            list(islice(loader, num_batches))
        resumed = resume(paths, world, 2, world_size, epochs=1)
        for before, loader, batches in zip(world, resumed, whole, strict=True):
            assert save(loader.state_dict()) == save(before.state_dict())
            assert_same(list(loader), batches[num_batches:])


def test_an_epoch_resumed_at_another_world_size_still_holds_every_token_once(paths):
    for num_batches in range(0, 24, 3):
        world = make_world(paths, 2, 4, epochs=1)
        rows = [row for ranks in rows_by_rank(world, num_batches) for row in ranks]
        rows += [row for ranks in rows_by_rank(resume(paths, world, 3, 2, epochs=1)) for row in ranks]
        assert_epochs_are_whole(rows, LENGTHS, 1)


def test_four_two_one_and_again_four_ranks_read_every_document_of_an_epoch_once(paths):
    world, rows = make_world(paths, 2, 4, epochs=1), []
    for world_size in (2, 1, 4):
        rows += rows_in_order(world, 16)
        world = resume(paths, world, 2, world_size, epochs=1)
    rows += [row for ranks in rows_by_rank(world) for row in ranks]
    assert_epochs_are_whole(rows, LENGTHS, 1)
    assert sorted(rows) == sorted(rows_by_rank(make_world(paths, 1, 1, epochs=1))[0])


def test_a_world_size_that_cannot_share_the_streams_and_another_sequence_length_are_refused(paths):
    for before, after in ((1, 3), (8, 5), (3, 2), (5, 3), (1, 16)):
        with pytest.raises(UserError, match=rf"{after} processes cannot share"):
            resume(paths, make_world(paths, 1, before), 1, after)
    with pytest.raises(UserError, match=f"--sequence-len {T}"):
        TextLoader(NumberTokenizer(), paths, 2, T + 1).load_state_dict([make_loader(paths).state_dict()])


def test_a_loader_can_be_closed_and_used_again_and_draining_validation_changes_none_of_its_batches(paths):
    loader, batches = make_loader(paths[:2]), []
    for i in range(10):
        batches += islice(loader, 4)
        state = save(loader.state_dict())
        list(make_loader(paths[2:], epochs=1))
        list(islice(make_loader(paths[2:], epochs=1), 2))
        assert save(loader.state_dict()) == state
        if i % 2:
            loader.close()
    assert_same(batches, list(islice(make_loader(paths[:2]), 40)))


# --- errors and threads ---
def test_shards_without_documents_are_refused(tmp_path):
    empty = write_shard(tmp_path / "empty.parquet", pa.array([], pa.string()))
    blank = write_shard(tmp_path / "blank.parquet", ["", ""])
    for paths in ([empty], [blank], [empty, blank], []):
        for epochs in (None, 1):
            with pytest.raises(UserError, match=r"hold no documents|no shards given"):
                next(make_loader(paths, epochs=epochs))


@pytest.mark.parametrize("fault", ["is missing", "cannot be read"])
def test_an_error_of_the_reading_thread_is_raised_where_batches_are_asked_for_every_time(paths, fault):
    paths[1].unlink() if fault == "is missing" else os.truncate(paths[1], paths[1].stat().st_size - 20)
    loader = make_loader(paths)
    for _ in range(2):
        with pytest.raises(UserError, match=f"shard_1.parquet {fault}"):
            list(loader)


def test_even_a_panic_in_the_encoder_surfaces(paths, monkeypatch):
    class Panic(BaseException):
        pass

    def panic(self, texts):
        raise Panic("index out of bounds")

    monkeypatch.setattr(NumberTokenizer, "encode_packed", panic)
    with pytest.raises(Panic, match="index out of bounds"):
        next(make_loader(paths))


@pytest.mark.parametrize("end", ["close", "abandon", "drain"])
def test_reading_threads_end(paths, end):
    loader = make_loader(paths, epochs=1 if end == "drain" else None)
    next(loader)
    if end == "close":
        loader.close()
    elif end == "drain":
        list(loader)
    else:
        del loader
    wait_for_reader_threads()


def test_a_process_that_leaves_a_loader_behind_ends_at_once_with_its_own_status(paths):
    program = "import sys, test_dataloader as t; next(t.make_loader(sys.argv[1:])); sys.exit(2)"
    ended = subprocess.run(
        [sys.executable, "-c", program, *map(str, paths)], capture_output=True, text=True, timeout=120, check=False,
        cwd=Path(__file__).parent, env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (2, "")


# --- on a GPU ---
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_batches_on_a_gpu_equal_those_on_the_cpu_also_when_resumed(paths):
    on_gpu, straight = make_loader(paths, 3, device="cuda"), make_loader(paths, 3)
    assert on_gpu.batches_ahead
    for _ in range(3):
        for a, b in zip(islice(on_gpu, 40), islice(straight, 40), strict=True):
            torch.cuda._sleep(10**6)  # work queued before the batch is used
            assert a.idx.device.type == "cuda"
            assert torch.equal(a.idx.cpu(), b.idx)
            assert torch.equal(a.targets.cpu(), b.targets)
        (on_gpu,) = resume(paths, [on_gpu], 3, 1, device="cuda")
