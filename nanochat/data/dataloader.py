"""Token rows for training and evaluation: documents are tokenized ahead in a thread and packed into (B, T) batches.

Every row starts with BOS and is full. Of the documents at hand, the largest that still fits is taken (best fit); when
none fits, the longest is cut and its rest becomes a document of its own, so no token is ever dropped. A row has
T + 1 tokens: inputs and next-token targets overlap by T, and each token except a row's first is a target exactly once.

Batches do not depend on the number of processes. Documents are dealt in turn to `NUM_STREAMS` streams, each packed on
its own; row n of the run comes from stream n mod NUM_STREAMS and belongs to rank n mod world size:

    documents  d0 d1 d2 ...          d_n -> stream n mod 8      (counted over the whole run, all epochs)
    rows       r0 r1 r2 ...          r_n <- stream n mod 8      (4 ranks: rank 1 packs streams 1 and 5)

So every world size that divides `NUM_STREAMS` gives the same global batches, and a run resumed at another one
continues with the very next row. At the end of the last epoch the streams run dry one after another and are skipped
from then on, so ranks may end some batches apart.
Not here: reading files (`dataset.py`).
"""

import bisect
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.data.dataset import document_batches
from nanochat.model.loss import IGNORE_INDEX

NUM_STREAMS = 8  # fixed, or rows would depend on the number of processes
BUFFER_DOCS = 128  # per stream, and enough for a row: best fit chooses among about a thousand documents in all
DOCS_PER_READ = 1024  # tokenized and dealt at a time
READS_AHEAD = 3


class Place(NamedTuple):
    """Where reading goes on: document `first` of a row group, the `number`-th of the run. Later places are greater."""

    epoch: int = 0
    shard: int = 0
    row_group: int = 0
    first: int = 0
    number: int = 0


@dataclass(frozen=True)
class Batch:
    """idx, targets: (B, T) int64 on the device, `IGNORE_INDEX` where a row is padded; `num_targets` is the number of
    targets that count; `epoch` is the pass over the documents that its last row was read in, from 0. `weights`, (B,)
    float32, multiply the loss of each row's targets, which are on the host then; None is 1 everywhere."""

    idx: Tensor
    targets: Tensor
    num_targets: int
    epoch: int
    weights: Tensor | None = None


def make_batch(rows: Sequence[tuple], shape: tuple[int, int], pad_id: int, device: torch.device, epoch: int) -> Batch:
    """The `Batch` of `rows`: their token ids, and which of these are targets (a list, or True for all). `shape` is
    (B, T + 1); what the rows leave empty is padded with `pad_id`."""
    tokens, counts = np.full(shape, pad_id, dtype=np.int64), np.zeros(shape, dtype=bool)
    for b, (ids, is_target) in enumerate(rows):
        tokens[b, : len(ids)], counts[b, : len(ids)] = ids, is_target

    def send(array: np.ndarray) -> Tensor:
        tensor, is_cuda = torch.from_numpy(np.ascontiguousarray(array)), device.type == "cuda"
        return (tensor.pin_memory() if is_cuda else tensor).to(device, non_blocking=is_cuda)

    targets = np.where(counts[:, 1:], tokens[:, 1:], IGNORE_INDEX)
    return Batch(send(tokens[:, :-1]), send(targets), int(counts[:, 1:].sum()), epoch)


class Stream:
    """The documents one stream has in hand, packed by best fit into rows of `row_tokens` tokens, with `bos_id` in front
    of each document. Documents are token arrays without BOS."""

    def __init__(self, row_tokens: int, bos_id: int):
        assert row_tokens >= 2, row_tokens
        self.row_tokens, self.bos_id = row_tokens, bos_id
        self.documents: list[np.ndarray] = []  # those to choose from, by length, equal ones oldest first
        self.num_tokens = 0  # that they take up in rows, BOS included
        self.waiting: deque[np.ndarray] = deque()  # documents that are not yet among them
        self.ready: deque[np.ndarray] = deque()  # rows packed but not consumed
        self.place = Place()  # where reading continues

    def add(self, document: np.ndarray) -> None:
        bisect.insort(self.documents, document, key=len)
        self.num_tokens += 1 + len(document)

    def fill(self) -> bool:
        """Add waiting documents until there are enough to choose from; False when it takes more than there are."""
        while len(self.documents) < BUFFER_DOCS or self.num_tokens < self.row_tokens:
            if not self.waiting:
                return False
            self.add(self.waiting.popleft())
        return True

    def next_row(self) -> np.ndarray:
        """One row, int32; shorter than `row_tokens` only when the documents ran out. There must be one at least."""
        if self.ready:
            return self.ready.popleft()
        row, end = np.full(self.row_tokens, self.bos_id, dtype=np.int32), 0
        while end < self.row_tokens and self.documents:
            part = self._take(self.row_tokens - end - 1, starts_row=end == 0)
            row[end + 1 : end + 1 + len(part)] = part
            end += 1 + len(part)
        return row[:end]

    def _take(self, room: int, *, starts_row: bool) -> np.ndarray:
        """The next tokens of a row after a BOS: a whole document of at most `room` tokens, or as many of a longer
        one. Without any room that is nothing: the row ends with the BOS of a document that begins in a later row."""
        num_fitting = bisect.bisect_right(self.documents, room, key=len)
        if num_fitting and not (starts_row and num_fitting < len(self.documents)):
            return self._pop(bisect.bisect_left(self.documents, len(self.documents[num_fitting - 1]), key=len))
        longest = self._pop(-1)
        self.add(longest[room:])  # a view: cutting a whole book into rows copies nothing
        return longest[:room]

    def _pop(self, index: int) -> np.ndarray:
        document = self.documents.pop(index)
        self.num_tokens -= 1 + len(document)
        return document


class TextLoader:
    """Iterator of `Batch` for one rank over the documents of parquet shards; see the module's header. Endless with
    `epochs=None`; otherwise ends after that many passes, the last batch padded. Raises `UserError` when the shards hold
    no document."""

    def __init__(
        self, tokenizer, paths: Sequence[Path], batch_size: int, sequence_len: int, *,
        rank: int = 0, world_size: int = 1, device: torch.device | str = "cpu", epochs: int | None = None,
    ):  # fmt: skip
        assert batch_size >= 1, batch_size
        self.tokenizer, self.paths, self.epochs = tokenizer, list(paths), epochs
        self.batch_size, self.sequence_len = batch_size, sequence_len
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.num_streams = NUM_STREAMS if NUM_STREAMS % world_size == 0 else world_size
        self.streams = self._new_streams()
        self.row = rank  # of the whole run: the next one this rank packs
        self._reader: Generator[Dealt, None, None] | None = None
        self._sent: deque[tuple[list[tuple[int, np.ndarray]], Batch]] = deque()  # rows by number, and as a batch
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self.batches_ahead = 1 if self._copy_stream else 0  # on a GPU the next batch travels while this one is used

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        while len(self._sent) < 1 + self.batches_ahead:
            rows = list(islice(self._rows(), self.batch_size))
            if not rows:
                break
            epoch = self.streams[rows[-1][0] % self.num_streams].place.epoch
            full, shape = [(row, True) for _, row in rows], (self.batch_size, self.sequence_len + 1)
            with torch.cuda.stream(self._copy_stream):  # no effect without one
                self._sent.append((rows, make_batch(full, shape, self.tokenizer.bos_id, self.device, epoch)))
        if not self._sent:
            self.close()
            raise StopIteration
        batch = self._sent.popleft()[1]
        if self._copy_stream:
            current = torch.cuda.current_stream(self.device)
            current.wait_stream(self._copy_stream)
            batch.idx.record_stream(current)
            batch.targets.record_stream(current)
        return batch

    def close(self) -> None:
        """Stop the reading thread. Iterating again starts a new one."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def _new_streams(self) -> dict[int, Stream]:
        own = range(self.rank, self.num_streams, self.world_size)
        return {number: Stream(self.sequence_len + 1, self.tokenizer.bos_id) for number in own}

    def _rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """The next rows of this rank with their numbers, in order; ends when all streams are dry."""
        num_dry = 0
        while num_dry < len(self.streams):
            number, stream = self.row, self.streams[self.row % self.num_streams]
            if not stream.ready:
                self._read_for(stream)
            self.row += self.world_size
            num_dry += 1
            if stream.ready or stream.documents:
                num_dry = 0
                yield number, stream.next_row()

    def _read_for(self, stream: Stream) -> None:
        """Give `stream` documents to choose from: as many as its buffer holds, or all that are left."""
        while not stream.fill():
            if self._reader is None:
                start, own = min(s.place for s in self.streams.values()), frozenset(self.streams)
                self._reader = _read_ahead(_deal(self.tokenizer, self.paths, start, self.epochs, self.num_streams, own))
            try:
                place, next_place, dealt = next(self._reader)
            except StopIteration:
                return
            except BaseException:
                self._reader = None  # whoever goes on iterating meets the same error again
                raise
            for number, documents in dealt.items():
                receiver = self.streams[number]
                if place >= receiver.place:  # after a resume, streams may have read unequally far
                    receiver.waiting.extend(documents)
                    receiver.place = next_place

    def state_dict(self) -> dict[str, Tensor]:
        """Where this rank stands after the batches it gave out: the tokens each stream has in hand and its place."""
        unused = [numbered for rows, _ in self._sent for numbered in rows]  # sent ahead, not yet given out
        state = {"row": torch.tensor(unused[0][0] if unused else self.row),
                 "num_streams": torch.tensor(self.num_streams),
                 "sequence_len": torch.tensor(self.sequence_len)}  # fmt: skip
        for number, stream in self.streams.items():
            given_back = [row for n, row in unused if n % self.num_streams == number]
            held = {"ready": [*given_back, *stream.ready], "buffer": stream.documents, "waiting": stream.waiting}
            state[f"{number}.place"] = torch.tensor(stream.place)
            for name, arrays in held.items():
                state[f"{number}.{name}.tokens"] = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *arrays]))
                state[f"{number}.{name}.lengths"] = torch.tensor([len(a) for a in arrays], dtype=torch.int64)
        return state

    def load_state_dict(self, shards: list[dict[str, Tensor]]) -> None:
        """Continue where the ranks that saved `shards` stood, however many they were. Raises `UserError` when the rows
        of that run cannot be continued by this loader."""
        saved_streams, saved_len = (int(shards[0][key]) for key in ("num_streams", "sequence_len"))
        if saved_len != self.sequence_len:
            remedy = f"resume with --sequence-len {saved_len}"
            raise UserError(f"the checkpoint's rows are {saved_len} tokens long, not {self.sequence_len}; {remedy}")
        if saved_streams % self.world_size:
            fault = f"in {saved_streams} streams, which {self.world_size} processes cannot share evenly"
            remedy = f"resume with a number of processes that divides {saved_streams}"
            raise UserError(f"the checkpoint's data is {fault}; {remedy}")
        self.close()
        self._sent.clear()
        self.num_streams = saved_streams
        merged = {key: value for shard in shards for key, value in shard.items()}
        rows = [int(shard["row"]) for shard in shards]  # the next one of each rank that was
        if len(rows) == self.world_size:
            self.row = rows[self.rank]
        else:
            self.row = min(rows) + (self.rank - min(rows)) % self.world_size
        self.streams = self._new_streams()
        for number, stream in self.streams.items():
            stream.place = Place(*merged[f"{number}.place"].tolist())
            stream.ready.extend(_split(merged, f"{number}.ready"))
            stream.waiting.extend(_split(merged, f"{number}.waiting"))
            for document in _split(merged, f"{number}.buffer"):
                stream.add(document)


def _split(state: dict[str, Tensor], name: str) -> list[np.ndarray]:
    lengths = state[f"{name}.lengths"].numpy()
    return np.split(state[f"{name}.tokens"].numpy(), np.cumsum(lengths)[:-1]) if len(lengths) else []


# Tokenized documents by stream, and the places where reading them began and ended.
Dealt = tuple[Place, Place, dict[int, list[np.ndarray]]]


def _read_ahead(work: Iterator[Dealt]) -> Generator[Dealt, None, None]:
    """The items of `work`, made in a thread up to `READS_AHEAD` before they are asked for. The thread ends when this
    iterator is closed, or abandoned, and is no daemon: one that is inside the encoder when Python shuts down would
    take the process down with it."""
    pool = ThreadPoolExecutor(1, "text reader")
    try:
        ahead = deque(pool.submit(next, work, None) for _ in range(READS_AHEAD))
        while (dealt := ahead.popleft().result()) is not None:
            ahead.append(pool.submit(next, work, None))
            yield dealt
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def _deal(tokenizer, paths, start: Place, epochs: int | None, num_streams: int, own) -> Iterator[Dealt]:
    """Read the shards over and over from `start` on, tokenize the documents of the `own` streams, deal them out."""
    epoch, shard, row_group, first, number = start
    while epochs is None or epoch < epochs:
        is_whole_epoch, number_before = (shard, row_group, first) == (0, 0, 0), number
        for position, texts in document_batches(paths, start=(shard, row_group)):
            for offset in range(first, len(texts), DOCS_PER_READ):
                piece = texts[offset : offset + DOCS_PER_READ]
                place, number = Place(epoch, *position, offset, number), number + len(piece)
                next_place = Place(epoch, *position, offset + len(piece), number)
                yield place, next_place, _tokenize(tokenizer, piece, place.number, num_streams, own)
            first = 0
        if is_whole_epoch and number == number_before:
            raise UserError(f"the shards of {Path(paths[0]).parent} hold no documents" if paths else "no shards given")
        epoch, shard, row_group, first = epoch + 1, 0, 0, 0


def _tokenize(tokenizer, texts, number: int, num_streams: int, own) -> dict[int, list[np.ndarray]]:
    """Tokens of the documents of each own stream, int32, without BOS; `number` is that of the first of `texts`."""
    mine = [n for n in range(number, number + len(texts)) if n % num_streams in own]
    indices = pa.py_buffer(np.array(mine, np.int64) - number)  # as an array, Arrow would import pandas: up to a second
    own_texts = texts.take(pa.Array.from_buffers(pa.int64(), len(mine), [None, indices]))
    tokens, bounds = tokenizer.encode_packed(own_texts)
    dealt: dict[int, list[np.ndarray]] = {stream: [] for stream in own}
    for n, begin, end in zip(mine, bounds[:-1], bounds[1:], strict=True):
        dealt[n % num_streams].append(tokens[begin:end].astype(np.int32))  # a copy: the rest need not stay in memory
    return dealt
