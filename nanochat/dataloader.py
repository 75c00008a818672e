"""Token rows for training and evaluation: documents, tokenized ahead in a thread, packed into (B, T) batches.

Every row starts with BOS and is full. Of the documents at hand the largest that still fits is taken (best fit);
when none fits, the longest is cut, and the rest of it comes back as a document of its own: no token is ever
dropped. A row holds T + 1 tokens, inputs and next-token targets overlapping by T, so each token but a row's first,
always a BOS, is a target exactly once.

What every process sees must not depend on how many there are. The documents of each row group are dealt to
`NUM_STREAMS` streams, each packed on its own; row n of the whole run comes from stream n modulo their number, and
belongs to rank n modulo the world size:

    documents  d0 d1 d2 ...          d_j -> stream j mod 8
    rows       r0 r1 r2 ...          r_n <- stream n mod 8      (4 ranks: rank 1 packs streams 1 and 5)

So any world size that divides `NUM_STREAMS` gives the same global batches, and a run resumed on another one goes
on with the very next row. The state is what each stream has in hand, as tokens, and where it reads on.

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

import numpy as np
import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.dataset import document_batches
from nanochat.loss import IGNORE_INDEX

NUM_STREAMS = 8  # a fixed number, or rows would depend on the number of processes
BUFFER_DOCS = 128  # per stream: best fit chooses among about a thousand documents in all
DOCS_PER_READ = 1024  # tokenized and dealt at a time
READS_AHEAD = 2

Place = tuple[int, int, int, int]  # epoch, shard, row group, first document


@dataclass(frozen=True)
class Batch:
    """idx, targets: (B, T) int64 on the device, `IGNORE_INDEX` where a row is padded; `num_targets` is the number of
    targets that count; `epoch` is the pass over the documents that its last row was read in, from 0."""

    idx: Tensor
    targets: Tensor
    num_targets: int
    epoch: int


class Packer:
    """Best-fit packing of token arrays, each starting with BOS, into rows of `row_tokens` tokens."""

    def __init__(self, row_tokens: int):
        assert row_tokens >= 2, row_tokens
        self.row_tokens = row_tokens
        self.documents: list[np.ndarray] = []  # by length, equal ones oldest first

    def add(self, document: np.ndarray) -> None:
        bisect.insort(self.documents, document, key=len)

    def next_row(self) -> np.ndarray:
        """One row; shorter than `row_tokens` only when the documents ran out. At least one document must be there."""
        parts, room = [], self.row_tokens
        while room and self.documents:
            part = self._take(room, starts_row=not parts)
            parts.append(part)
            room -= len(part)
        return np.concatenate(parts)

    def _take(self, room: int, *, starts_row: bool) -> np.ndarray:
        fitting = bisect.bisect_right(self.documents, room, key=len)
        longest = self.documents[-1]
        if fitting and not (starts_row and len(longest) > room):
            oldest = bisect.bisect_left(self.documents, len(self.documents[fitting - 1]), key=len)
            return self.documents.pop(oldest)
        if room == 1:  # no use cutting: the BOS of the next document fills the row
            return longest[:1]
        self.documents.pop()
        self.add(np.concatenate((longest[:1], longest[room:])))
        return longest[:room]


@dataclass
class Stream:
    """One stream's documents and rows in hand. `waiting` are documents not yet offered to the packer, `ready` rows
    that were packed but not consumed; reading goes on at `place`."""

    packer: Packer
    place: Place = (0, 0, 0, 0)
    waiting: deque[np.ndarray] = field(default_factory=deque)
    ready: deque[np.ndarray] = field(default_factory=deque)

    def fill(self) -> None:
        while self.waiting and len(self.packer.documents) < BUFFER_DOCS:
            self.packer.add(self.waiting.popleft())


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
        self.tokenizer, self.paths = tokenizer, list(paths)
        self.batch_size, self.sequence_len = batch_size, sequence_len
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.epochs = epochs
        self.num_streams = NUM_STREAMS if NUM_STREAMS % world_size == 0 else world_size
        own = range(rank, self.num_streams, world_size)
        self.streams = {s: Stream(Packer(sequence_len + 1)) for s in own}
        self.row = rank  # of the whole run: the next one this rank packs
        self._reader: _Reader | None = None
        self._sent: deque[tuple[list[tuple[int, np.ndarray]], Batch]] = deque()  # on their way to the device
        self._copy_stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        ahead = 2 if self._copy_stream else 1  # on a GPU the next batch travels while this one is used
        while len(self._sent) < ahead:
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

    def _rows(self) -> Iterator[tuple[int, np.ndarray]]:
        """The next rows of this rank with the number of their stream, in order; ends when all streams are dry."""
        dry = 0
        while dry < len(self.streams):
            number = self.row % self.num_streams
            stream = self.streams[number]
            if not stream.ready:
                self._read_for(stream)
            if not stream.ready and not stream.packer.documents:
                dry += 1
                self.row += self.world_size
                continue
            dry = 0
            row = stream.ready.popleft() if stream.ready else stream.packer.next_row()
            self.row += self.world_size
            yield number, row

    def _read_for(self, stream: Stream) -> None:
        """Give `stream` documents to choose from: as many as its buffer holds, or all that are left."""
        stream.fill()
        while len(stream.packer.documents) < BUFFER_DOCS:
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
            stream.fill()

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
        epoch = self.streams[rows[-1][0]].place[0]
        if pinned:
            with torch.cuda.stream(self._copy_stream):
                idx, targets = (x.to(self.device, non_blocking=True) for x in (idx, targets))
        elif self.device.type != "cpu":
            idx, targets = idx.to(self.device), targets.to(self.device)
        return Batch(idx, targets, num_targets, epoch)

    # --- state ---

    def state_dict(self) -> dict[str, Tensor]:
        """Where this rank stands after the batches it gave out: the streams' tokens in hand and reading places."""
        unused = [pair for rows, _ in self._sent for pair in rows]  # sent ahead, not yet given out
        state = {"rows": torch.tensor(self.row - self.rank - len(unused) * self.world_size),
                 "num_streams": torch.tensor(self.num_streams), "sequence_len": torch.tensor(self.sequence_len)}
        for number, stream in self.streams.items():
            given_back = [row for s, row in unused if s == number]
            held = {"ready": given_back + list(stream.ready), "buffer": stream.packer.documents,
                    "waiting": list(stream.waiting)}
            state[f"{number}.place"] = torch.tensor(stream.place)
            for name, arrays in held.items():
                flat = np.concatenate([np.empty(0, np.int64), *arrays]).astype(np.int32)
                state[f"{number}.{name}.tokens"] = torch.from_numpy(flat)
                state[f"{number}.{name}.lengths"] = torch.tensor([len(a) for a in arrays], dtype=torch.int64)
        return state

    def load_state_dict(self, shards: list[dict[str, Tensor]]) -> None:
        """Go on where the ranks that saved `shards` stood, however many they were.

        Raises `UserError` when the rows of that run cannot be continued by this loader.
        """
        saved_streams, saved_len = (int(shards[0][key]) for key in ("num_streams", "sequence_len"))
        if saved_len != self.sequence_len:
            raise UserError(f"the checkpoint's rows are {saved_len} tokens long, not {self.sequence_len}; "
                            f"resume with --sequence-len {saved_len}")
        if saved_streams % self.world_size:
            raise UserError(f"the checkpoint's data is in {saved_streams} streams, which {self.world_size} processes "
                            f"cannot share evenly; resume with a number of processes that divides {saved_streams}")
        self.close()
        self._sent.clear()
        self.num_streams = saved_streams
        merged = {key: value for shard in shards for key, value in shard.items()}
        self.row = int(merged["rows"]) + self.rank
        self.streams = {}
        for number in range(self.rank, saved_streams, self.world_size):
            stream = self.streams[number] = Stream(Packer(self.sequence_len + 1))
            stream.place = tuple(merged[f"{number}.place"].tolist())
            stream.ready.extend(_split(merged, f"{number}.ready"))
            stream.waiting.extend(_split(merged, f"{number}.waiting"))
            stream.packer.documents = _split(merged, f"{number}.buffer")


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
        work = _deal(tokenizer, paths, start, epochs, num_streams, tuple(own))
        # the thread holds no reference to this object, so an abandoned loader is collected and its thread ends
        threading.Thread(target=_pump, args=(work, self._queue, self._stopped), daemon=True).start()

    def next(self) -> _Dealt | None:
        """What was read next, or None at the end. Raises what the thread raised."""
        item = self._queue.get()
        if isinstance(item, Exception):
            raise item
        if item is None:
            self._queue.put(None)  # for whoever asks again
        return item

    def stop(self) -> None:
        self._stopped.set()

    __del__ = stop


def _pump(work: Iterator[_Dealt], items: queue.Queue, stopped: threading.Event) -> None:
    def put(item) -> bool:
        while not stopped.is_set():
            try:
                items.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    try:
        for dealt in work:
            if not put(dealt):
                return
        put(None)
    except Exception as error:  # handed to the thread that asks next
        put(error)


def _deal(tokenizer, paths, start: Place, epochs: int | None, num_streams: int, own) -> Iterator[_Dealt]:
    """Read the shards over and over from `start` on, tokenize the documents of the `own` streams, deal them out."""
    epoch, shard, row_group, first = start
    while epochs is None or epoch < epochs:
        num_documents, from_the_start = 0, (shard, row_group, first) == (0, 0, 0)
        for position, texts in document_batches(paths, start=(shard, row_group)):
            for offset in range(first, len(texts), DOCS_PER_READ):
                piece = texts[offset : offset + DOCS_PER_READ]
                num_documents += len(piece)
                place = (epoch, position[0], position[1], offset)
                following = (epoch, position[0], position[1], offset + DOCS_PER_READ)
                yield _Dealt(place, following, _tokenize(tokenizer, piece, offset, num_streams, own))
            first = 0
        if from_the_start and not num_documents:
            raise UserError(f"the shards of {Path(paths[0]).parent} hold no documents" if paths else "no shards given")
        epoch, shard, row_group, first = epoch + 1, 0, 0, 0


def _tokenize(tokenizer, texts, offset: int, num_streams: int, own) -> dict[int, list[np.ndarray]]:
    """Tokens of the documents of each own stream, BOS in front; document j of the row group is for stream j mod n."""
    dealt = {}
    for number in own:
        mine = texts.take(np.arange((number - offset) % num_streams, len(texts), num_streams))
        tokens, bounds = tokenizer.encode_packed(mine)
        bos = np.array([tokenizer.bos_id], dtype=np.int32)
        tokens = tokens.astype(np.int32)
        dealt[number] = [np.concatenate((bos, tokens[a:b])) for a, b in zip(bounds[:-1], bounds[1:], strict=True)]
    return dealt
