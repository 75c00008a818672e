"""The model as it serves on a GPU: a cache in pages, ragged prefill, decode passes recorded as CUDA graphs.

The same questions are asked of a `GpuModel` as of an `InferenceModel`, and the same answers come, up to rounding:

    read              all tokens of all pieces in one pass without padding; each piece sees its own positions only
    decode            one token for each row; a graph for each number of rows (rounded up) and kind of draw

Not here: what a pass does in the blocks (`gpu_blocks.py`), which page holds what (`pages.py`), when to run what
(`engine.py`).
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from nanochat.engine.draw_kernel import cap_and_draw
from nanochat.engine.gpu_blocks import GpuBlocks
from nanochat.engine.inference import InferenceModel, LogitsIds, Piece, lay_out
from nanochat.engine.kernels import KEY_BLOCK, MAX_SPLITS, attend_to_pages, join_splits
from nanochat.engine.pages import PagedCache, PagedTable
from nanochat.engine.product_kernel import FEW_ROWS
from nanochat.engine.sampling import Drawing
from nanochat.engine.transfer import to_device
from nanochat.engine.weights import Weights, tensors_of
from nanochat.model.attention import ragged_attention
from nanochat.model.gpt import GPT

BATCH_BUCKETS = (1, 2, 4, 8, 16, 32, 64, 128, 256)  # rows of a recorded CUDA graph
MAX_GRAPHS = 24  # beyond, the one that was used longest ago is dropped
NUM_PROGRAMS = 256  # that attention of few rows is split into: about two for each multiprocessor


class GpuModel(InferenceModel):
    """A GPT's weights and a cache of `num_slots` slots on a GPU; `weights` as for an `InferenceModel`."""

    takes_int8 = ("cuda", "cpu")  # the latter in Triton's interpreter

    def _allocate(self, num_slots: int) -> None:
        self.cache = PagedCache(self.config, num_slots, self.dtype, self.device)
        self.blocks = GpuBlocks(self.config, self._weights, self.device)
        self._graphs = _DecodeGraphs()

    @torch.no_grad()
    def refresh(self, model: GPT) -> None:
        """Take over the present weights of `model`, in place: recorded graphs read the tensors they were recorded with.
        What the cache holds no longer fits them."""
        new = Weights(model, self.dtype, int8=self._int8)
        for own, tensor in zip(tensors_of(self._weights), tensors_of(new), strict=True):
            own.copy_(tensor)

    # --- prefill ---

    @torch.inference_mode()
    def read(self, pieces: Sequence[Piece]) -> Tensor:
        """Read pieces of sequences, each of another slot, in one pass over the weights. Returns the final normed hidden
        states (N, C) of all their tokens."""
        idx, previous, at = to_device(np.array(lay_out(pieces)), self.device)
        spans = [_Spans(table, pieces, self.device) for table in self.cache.tables]
        for piece in pieces:
            self.cache.make_writable(piece.slot, piece.start, piece.start + len(piece.ids))
        for span in spans:
            span.find_kept(pieces)

        def attend(layer: int, joined: Tensor) -> Tensor:
            own = self.cache.layers[layer]
            span = spans[own.table]
            k, v = (span.with_past(tensor) for tensor in (own.keys, own.values))
            q = self.blocks.place_heads(layer, joined, idx, at, span.new_at, k, v)
            attended = ragged_attention(q, k, v, span.lengths, span.ends, window=self.config.window(layer))
            span.keep(own.keys, k)  # not before: it may overwrite what this pass has read
            span.keep(own.values, v)
            return attended

        return self.blocks.hidden(self._weights.embedded(idx, previous, at), attend)

    # --- decode ---

    @torch.inference_mode()
    def decode_and_draw(self, idx: Tensor, previous: Tensor, positions: Sequence[int], drawing: Drawing) -> LogitsIds:
        """`decode`, and a draw from its logits, as a recorded CUDA graph. The next one overwrites the result."""
        return self._graphs.decode(self, idx, previous, positions, drawing)

    @torch.inference_mode()
    def decode(self, idx: Tensor, previous: Tensor, positions: Sequence[int]) -> Tensor:
        """One token in each of the first N slots, at `positions` (at least 1): idx and previous (N,) int64 on the
        device. Returns the logits (N, V) float32 after them."""
        places = to_device(self.write_places(positions, len(positions)), self.device)
        return self.logits(self.decode_pass(idx, previous, places))

    def write_places(self, positions: Sequence[int], num_rows: int) -> np.ndarray:
        """Let the first slots have the places of `positions` for themselves. Returns, as one int32 array for `num_rows`
        rows: the positions, then for each table the place of the new token, and the pages of each row. Rows beyond the
        positions write to the page that belongs to nobody."""
        count = len(positions)
        at = np.zeros(num_rows, dtype=np.int32)
        at[:count] = positions
        self.cache.make_next_writable(at[:count])
        parts = [at]
        for table in self.cache.tables:
            rows = np.zeros((num_rows, table.num_entries), dtype=np.int32)
            rows[:count] = table.rows[:count]
            parts += [table.places_of(rows, at), rows.ravel()]
        return np.concatenate(parts)

    def decode_pass(self, idx: Tensor, previous: Tensor, places: Tensor) -> Tensor:
        """Final normed hidden states (N, C) of tokens idx (N,), with the `places` that `write_places` found."""
        N = idx.size(0)
        at, places = places[:N], places[N:]
        new, rows = [], []
        for table in self.cache.tables:
            new.append(places[:N])
            rows.append(places[N : N * (1 + table.num_entries)].view(N, table.num_entries))
            places = places[N * (1 + table.num_entries) :]

        def attend(layer: int, joined: Tensor) -> Tensor:
            own = self.cache.layers[layer]
            q = self.blocks.place_heads(layer, joined, idx, at, new[own.table], own.keys, own.values)
            reach = self.cache.tables[own.table].reach
            num_splits = self._num_splits(N, reach)
            found = attend_to_pages(q, own.keys, own.values, rows[own.table], at, reach, num_splits)
            return found[0] if num_splits == 1 else join_splits(*found, self.dtype)

        return self.blocks.hidden(self._weights.embedded(idx, previous, None), attend)

    def _num_splits(self, num_rows: int, reach: int) -> int:
        """Programs that share the keys of a row: enough to occupy the GPU, for few rows."""
        if num_rows > FEW_ROWS:
            return 1
        wanted = min(NUM_PROGRAMS // (num_rows * self.config.n_kv_head), -(-reach // KEY_BLOCK), MAX_SPLITS)
        return 1 << max(1, wanted).bit_length() - 1

    def _head(self, hidden: Tensor) -> Tensor:
        return self.blocks.head(hidden)


class _Spans:
    """The keys that a prefill of `pieces` reads in the layers of a table: for each piece past positions, then new."""

    def __init__(self, table: PagedTable, pieces: Sequence[Piece], device: torch.device):
        self._table, self._device = table, device
        pasts = [max(0, piece.start + 1 - self._table.reach) for piece in pieces]  # the first that a piece sees
        num_past = [piece.start - past for piece, past in zip(pieces, pasts, strict=True)]
        self.lengths = [(len(piece.ids), past + len(piece.ids)) for piece, past in zip(pieces, num_past, strict=True)]
        ends = [[0, *accumulate(column)] for column in zip(*self.lengths, strict=True)]
        self.ends = to_device(np.array(ends, dtype=np.int32), device)  # (2, len(pieces) + 1)
        self._starts = ends[1][:-1]
        self._num_keys = ends[1][-1]
        new_at = [np.arange(n) for n, _ in self.lengths]
        self._new_at = [at + start + past for at, start, past in zip(new_at, self._starts, num_past, strict=True)]
        self.new_at = to_device(np.concatenate(self._new_at), device)  # (N,), where the new ones go
        self._past = None  # where the past ones go, and their places in the cache
        if any(num_past):
            at = [start + np.arange(past) for start, past in zip(self._starts, num_past, strict=True)]
            places = [self._table.places(p.slot, first, p.start) for p, first in zip(pieces, pasts, strict=True)]
            self._past = to_device(np.stack((np.concatenate(at), np.concatenate(places))), device)

    def find_kept(self, pieces: Sequence[Piece]) -> None:
        """Look up which new ones the cache will keep, and where; call it once their places are writable."""
        at, places = [], []
        for piece, own in zip(pieces, self._new_at, strict=True):
            end = piece.start + len(piece.ids)
            first = self._table.first_kept(piece.start, end)
            at.append(own[first - piece.start :])
            places.append(self._table.places(piece.slot, first, end))
        self._kept, self._kept_places = to_device(np.stack((np.concatenate(at), np.concatenate(places))), self._device)

    def with_past(self, cached: Tensor) -> Tensor:
        """Room for all keys or values (K, H_kv, D), with those of past positions from `cached`."""
        tensor = cached.new_empty(self._num_keys, *cached.shape[1:])
        if self._past is not None:
            tensor[self._past[0]] = cached[self._past[1]]
        return tensor

    def keep(self, cached: Tensor, tensor: Tensor) -> None:
        cached[self._kept_places] = tensor[self._kept]


class _DecodeGraphs:
    """Decode passes with their draws as CUDA graphs, which share their memory.

    The model is passed in, not kept: a cycle of references would leave gigabytes of cache to the garbage collector.
    """

    def __init__(self):
        self._ready: OrderedDict[tuple, tuple[Tensor, Tensor, Tensor, Callable]] = OrderedDict()
        self._stream = self._pool = None

    def decode(
        self, model: GpuModel, idx: Tensor, previous: Tensor, positions: Sequence[int], drawing: Drawing
    ) -> LogitsIds:
        """As `GpuModel.decode_and_draw`."""
        count = len(positions)
        num_rows = next((bucket for bucket in BATCH_BUCKETS if bucket >= count), count)
        places = model.write_places(positions, num_rows)
        key = (num_rows, drawing.kind)
        if key not in self._ready:
            self._ready[key] = self._prepare(model, num_rows, len(places), drawing)
            if len(self._ready) > MAX_GRAPHS:
                self._ready.popitem(last=False)
        self._ready.move_to_end(key)
        own_ids, own_places, own_columns, replay = self._ready[key]
        own_ids[:, :count] = torch.stack((idx, previous))
        own_places.copy_(to_device(places, model.device), non_blocking=True)
        own_columns[:, :count] = to_device(drawing.columns, model.device)
        logits, tokens = replay()
        return logits[:count], tokens[:count]

    def _prepare(
        self, model: GpuModel, num_rows: int, num_places: int, drawing: Drawing
    ) -> tuple[Tensor, Tensor, Tensor, Callable]:
        """Buffers of ids and previous ids (2, num_rows) int64, of what `write_places` gives, and of a `Drawing`'s
        columns (6, num_rows), and the function that runs on them."""
        ids = torch.zeros(2, num_rows, dtype=torch.int64, device=model.device)
        places = torch.zeros(num_places, dtype=torch.int32, device=model.device)
        columns = to_device(drawing.columns[:, :1].repeat(1, num_rows), model.device)

        def run() -> LogitsIds:
            z = model.blocks.head(model.decode_pass(*ids, places))
            return cap_and_draw(z, columns, drawing.kind, model.config.softcap, model.config.vocab_size)

        return ids, places, columns, self._record(run)

    def _record(self, run: Callable) -> Callable:
        """`run` as a CUDA graph over the tensors it was recorded with; its result is at the same address each time."""
        if self._stream is None:
            self._stream, self._pool = torch.cuda.Stream(), torch.cuda.graph_pool_handle()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            run()  # compiles kernels, and lets libraries allocate their workspaces outside of the graph
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            result = run()

        def replay() -> LogitsIds:
            graph.replay()
            return result

        return replay
