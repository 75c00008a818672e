"""Token rows for training and evaluation: documents, tokenized ahead in a thread, packed into (B, T) batches.

Every row starts with BOS and is full. Of the documents at hand the largest that still fits is taken (best fit);
when none fits, the longest is cut, and the rest of it comes back as a document of its own: no token is ever
dropped. A row holds T + 1 tokens, inputs and next-token targets overlapping by T, so each token but a row's first,
always a BOS, is a target exactly once.

What every process sees must not depend on how many there are. The documents are dealt in turn to `NUM_STREAMS`
streams, each packed on its own; row n of the whole run comes from stream n modulo their number, and belongs to rank
n modulo the world size:

    documents  d0 d1 d2 ...          d_n -> stream n mod 8      (counted over the whole run, all epochs)
    rows       r0 r1 r2 ...          r_n <- stream n mod 8      (4 ranks: rank 1 packs streams 1 and 5)

So any world size that divides `NUM_STREAMS` gives the same global batches, and a run resumed on another one goes
on with the very next row. The state is what each stream has in hand, as tokens, and where it reads on.

At the end of the last epoch streams run dry one after the other and are then passed over, so ranks may end some
batches apart; until then, they are in step.

Reading files is `dataset.py`'s part.
"""

import bisect
import queue
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
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

NUM_STREAMS = 8  # a fixed number, or rows would depend on the number of processes
BUFFER_DOCS = 128  # per stream, and enough for a row: best fit chooses among about a thousand documents in all
DOCS_PER_READ = 1024  # tokenized and dealt at a time
READS_AHEAD = 2
POLL_SECONDS = 0.2  # how often a reader that is far enough ahead looks whether it is still wanted


class Place(NamedTuple):
    """Where reading goes on: the document `first` of a row group, the `number`-th of the run. Later is larger."""

    epoch: int = 0
    shard: int = 0
    row_group: int = 0
    first: int = 0
    number: int = 0


@dataclass(frozen=True)
class Batch:
    """idx, targets: (B, T) int64 on the device, `IGNORE_INDEX` where a row is padded; `num_targets` is the number of
    targets that count; `epoch` is the pass over the documents that its last row was read in, from 0. `weights`, (B,)
    float32, multiply the loss of each row's targets; None is 1 everywhere."""

    idx: Tensor
    targets: Tensor
    num_targets: int
    epoch: int
    weights: Tensor | None = None


class Packer:
    """Best-fit packing of documents into rows of `row_tokens` tokens, with `bos_id` in front of each document.

    documents: token arrays without BOS, by length, equal ones oldest first.
    num_tokens: what they take up in rows, BOS included.
    """

    def __init__(self, row_tokens: int, bos_id: int):
        assert row_tokens >= 2, row_tokens
        self.row_tokens, self.bos_id = row_tokens, bos_id
        self.documents: list[np.ndarray] = []
        self.num_tokens = 0

    def add(self, document: np.ndarray) -> None:
        bisect.insort(self.documents, document, key=len)
        self.num_tokens += 1 + len(document)

    def next_row(self) -> np.ndarray:
        """One row, int32; shorter than `row_tokens` only when the documents ran out. One at least must be there."""
        row, end = np.full(self.row_tokens, self.bos_id, dtype=np.int32), 0
        while end < self.row_tokens and self.documents:
            part = self._take(self.row_tokens - end - 1, starts_row=end == 0)
            row[end + 1 : end + 1 + len(part)] = part
            end += 1 + len(part)
        return row[:end]

    def _take(self, room: int, *, starts_row: bool) -> np.ndarray:
        """The next at most `room` tokens of a row behind a BOS: a whole document, or all the room of a longer one.
        Without room that is nothing, and the BOS of a document that comes later fills the row."""
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


@dataclass
class Stream:
    """One stream's documents and rows in hand. `waiting` are documents not yet offered to the packer, `ready` rows
    that were packed but not consumed; reading goes on at `place`."""

    packer: Packer
    place: Place = field(default_factory=Place)
    waiting: deque[np.ndarray] = field(default_factory=deque)
    ready: deque[np.ndarray] = field(default_factory=deque)

    def fill(self) -> bool:
        """Offer the packer what is waiting, as far as it needs it; False when it needs more than that."""
        packer = self.packer
        while len(packer.documents) < BUFFER_DOCS or packer.num_tokens < packer.row_tokens:
            if not self.waiting:
                return False
            packer.add(self.waiting.popleft())
        return True


class TextLoader:
    """Iterator of `Batch` for one rank over the documents of parquet shards; see the module's header.

    Endless with `epochs=None`; otherwise ends after that many passes, the last batch padded. Raises `UserError` when
    the shards hold no document.
    """

    def __init__(
        self,
        tokenizer,
        paths: Sequence[Path],
        batch_size: int,
        sequence_len: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device | str = "cpu",
        epochs: int | None = None,
    ):
        assert batch_size >= 1, batch_size
        self.tokenizer, self.paths = tokenizer, list(paths)
        self.batch_size, self.sequence_len = batch_size, sequence_len
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.epochs = epochs
        self.num_streams = NUM_STREAMS if NUM_STREAMS % world_size == 0 else world_size
        self.streams = self._new_streams()
        self.row = rank  # of the whole run: the next one this rank packs
        self._reader: _Reader | None = None
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
            self._sent.append((rows, self._send(rows)))
        if not self._sent:
            self.close()
            raise StopIteration
        batch = self._sent.popleft()[1]
        if self._copy_stream:
            torch.cuda.current_stream(self.device).wait_stream(self._copy_stream)
            for tensor in (batch.idx, batch.targets):
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return batch

    def close(self) -> None:
        """Stop the reading thread. Reading may go on afterwards, with a new one."""
        if self._reader is not None:
            self._reader.stop()
            self._reader = None

    # --- rows ---

    def _new_streams(self) -> dict[int, Stream]:
        row_tokens, bos_id = self.sequence_len + 1, self.tokenizer.bos_id
        return {s: Stream(Packer(row_tokens, bos_id)) for s in range(self.rank, self.num_streams, self.world_size)}

    def _rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """The next rows of this rank with their numbers, in order; ends when all streams are dry."""
        num_dry = 0
        while num_dry < len(self.streams):
            number, stream = self.row, self.streams[self.row % self.num_streams]
            if not stream.ready:
                self._read_for(stream)
            self.row += self.world_size
            if stream.ready:
                yield number, stream.ready.popleft()
            elif stream.packer.documents:
                yield number, stream.packer.next_row()
            else:
                num_dry += 1
                continue
            num_dry = 0

    def _read_for(self, stream: Stream) -> None:
        """Give `stream` documents to choose from: as many as its buffer holds, or all that are left."""
        while not stream.fill():
            if self._reader is None:
                start = min(s.place for s in self.streams.values())
                self._reader = _Reader(self.tokenizer, self.paths, start, self.epochs, self.num_streams, self.streams)
            dealt = self._reader.next()
            if dealt is None:
                return
            for number, documents in dealt.documents.items():
                receiver = self.streams[number]
                if dealt.place >= receiver.place:  # after a resume, streams may have read unequally far
                    receiver.waiting.extend(documents)
                    receiver.place = dealt.next_place

    def _send(self, rows: list[tuple[int, np.ndarray]]) -> Batch:
        B, T = self.batch_size, self.sequence_len
        pinned = self._copy_stream is not None
        idx = torch.full((B, T), self.tokenizer.bos_id, dtype=torch.int64, pin_memory=pinned)
        targets = torch.full((B, T), IGNORE_INDEX, dtype=torch.int64, pin_memory=pinned)
        for b, (_, row) in enumerate(rows):
            tokens = torch.from_numpy(row.astype(np.int64))
            idx[b, : min(len(row), T)] = tokens[:T]
            targets[b, : len(row) - 1] = tokens[1:]
        num_targets = sum(len(row) - 1 for _, row in rows)
        epoch = self.streams[rows[-1][0] % self.num_streams].place.epoch
        if pinned:
            with torch.cuda.stream(self._copy_stream):
                idx, targets = (x.to(self.device, non_blocking=True) for x in (idx, targets))
        elif self.device.type != "cpu":
            idx, targets = idx.to(self.device), targets.to(self.device)
        return Batch(idx, targets, num_targets, epoch)

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Where this rank stands after the batches it gave out: the streams' tokens in hand and reading places."""
        unused = [numbered for rows, _ in self._sent for numbered in rows]  # sent ahead, not yet given out
        state = {"row": torch.tensor(unused[0][0] if unused else self.row),
                 "num_streams": torch.tensor(self.num_streams),
                 "sequence_len": torch.tensor(self.sequence_len)}  # fmt: skip
        for number, stream in self.streams.items():
            given_back = [row for n, row in unused if n % self.num_streams == number]
            held = {"ready": given_back + list(stream.ready), "buffer": stream.packer.documents,
                    "waiting": list(stream.waiting)}  # fmt: skip
            state[f"{number}.place"] = torch.tensor(stream.place)
            for name, arrays in held.items():
                state[f"{number}.{name}.tokens"] = torch.from_numpy(np.concatenate([np.empty(0, np.int32), *arrays]))
                state[f"{number}.{name}.lengths"] = torch.tensor([len(a) for a in arrays], dtype=torch.int64)
        return state

    def load_state_dict(self, shards: list[dict[str, Tensor]]) -> None:
        """Go on where the ranks that saved `shards` stood, however many they were.

        Raises `UserError` when the rows of that run cannot be continued by this loader.
        """
        saved_streams, saved_len = (int(shards[0][key]) for key in ("num_streams", "sequence_len"))
        if saved_len != self.sequence_len:
            raise UserError(
                f"the checkpoint's rows are {saved_len} tokens long, not {self.sequence_len}; "
                f"resume with --sequence-len {saved_len}"
            )
        if saved_streams % self.world_size:
            raise UserError(
                f"the checkpoint's data is in {saved_streams} streams, which {self.world_size} processes "
                f"cannot share evenly; resume with a number of processes that divides {saved_streams}"
            )
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
                stream.packer.add(document)


def _split(state: dict[str, Tensor], name: str) -> list[np.ndarray]:
    lengths = state[f"{name}.lengths"].numpy()
    return np.split(state[f"{name}.tokens"].numpy(), np.cumsum(lengths)[:-1]) if len(lengths) else []


@dataclass(frozen=True)
class _Dealt:
    """Tokenized documents by stream, of those read from `place` to `next_place`."""

    place: Place
    next_place: Place
    documents: dict[int, list[np.ndarray]]


class _Reader:
    """A thread that reads and tokenizes the documents of some streams ahead of their use."""

    def __init__(self, tokenizer, paths, start: Place, epochs: int | None, num_streams: int, own):
        self._queue: queue.Queue = queue.Queue(maxsize=READS_AHEAD)
        self._stopped = threading.Event()
        work = _deal(tokenizer, paths, start, epochs, num_streams, frozenset(own))
        # The thread holds no reference to this object, so an abandoned loader is collected and its thread ends. It is
        # no daemon: one that is inside the encoder when Python shuts down would take the process down with it.
        threading.Thread(target=_pump, args=(work, self._queue, self._stopped), name="text reader").start()

    def next(self) -> _Dealt | None:
        """What was read next, or None at the end. Raises what the thread raised."""
        item = self._queue.get()
        if item is None or isinstance(item, BaseException):
            self._queue.put(item)  # for whoever asks again
        if isinstance(item, BaseException):
            raise item
        return item

    def stop(self) -> None:
        self._stopped.set()

    __del__ = stop


def _pump(work: Iterator[_Dealt], items: queue.Queue, stopped: threading.Event) -> None:
    """Put `work` into the queue, and at its end None or what it raised, until stopped or the main thread is over."""

    def put(item) -> bool:
        while not stopped.is_set() and threading.main_thread().is_alive():
            try:
                items.put(item, timeout=POLL_SECONDS)
                return True
            except queue.Full:
                continue
        return False

    try:
        for dealt in work:
            if not put(dealt):
                return
        put(None)
    except BaseException as error:  # handed to the thread that asks next; a panic in Rust is no Exception
        put(error)


def _deal(tokenizer, paths, start: Place, epochs: int | None, num_streams: int, own) -> Iterator[_Dealt]:
    """Read the shards over and over from `start` on, tokenize the documents of the `own` streams, deal them out."""
    epoch, shard, row_group, first, number = start
    while epochs is None or epoch < epochs:
        is_whole_epoch, number_before = (shard, row_group, first) == (0, 0, 0), number
        for position, texts in document_batches(paths, start=(shard, row_group)):
            for offset in range(first, len(texts), DOCS_PER_READ):
                piece = texts[offset : offset + DOCS_PER_READ]
                place, number = Place(epoch, *position, offset, number), number + len(piece)
                next_place = Place(epoch, *position, offset + len(piece), number)
                yield _Dealt(place, next_place, _tokenize(tokenizer, piece, place.number, num_streams, own))
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
