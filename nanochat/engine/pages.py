"""The KV cache of a GPU: keys and values in pages, so that no sequence is ever moved.

A page holds `PAGE` consecutive positions of a sequence. Which pages a slot has is a row of a table, kept on the host
and sent along with every pass. Exchanging two slots exchanges two rows; copying one lets both have the same pages. A
page that several slots have is never written to: who goes on writing in the middle of one gets a copy of that page
(arXiv 2309.06180).

Layers that see the same number of positions share a table. Where that is a window, the table is a ring: position p is
in entry p // PAGE % E, and the E pages hold the window and what is left of a page before it, so that a page begins anew
only when nothing in it is seen any more.

Not here: who has which slot (`slots.py`), the kernels that read pages (`kernels.py`).
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from nanochat.engine.kernels import PAGE
from nanochat.model.gpt import GPTConfig


class PagedTable:
    """The pages of `num_slots` slots in all layers that see `reach` positions, the window or the whole context T.

    rows: (num_slots, E) int32, the pages of each slot; 0, a page that belongs to nobody, where it has none.
    """

    def __init__(self, reach: int, num_slots: int, context: int):
        is_ring = reach < context
        self.reach, self.is_ring = reach, is_ring
        self.num_entries = -(-(reach + PAGE - 1) // PAGE) if is_ring else -(-context // PAGE)
        self.num_pages = 1 + num_slots * self.num_entries  # enough, as each slot has at most `num_entries` of them
        self.rows = np.zeros((num_slots, self.num_entries), dtype=np.int32)
        self._users = np.zeros(self.num_pages, dtype=np.int64)  # slots that have each page
        self._free = list(range(self.num_pages - 1, 0, -1))

    def first_kept(self, start: int, end: int) -> int:
        """Of positions `start` to `end` - 1, written one after another, the first that is there in the end."""
        if not self.is_ring:
            return start
        return max(start, ((end - 1) // PAGE - self.num_entries + 1) * PAGE)

    def places(self, slot: int, start: int, end: int) -> np.ndarray:
        """Where positions `start` to `end` - 1 of a slot are: int64."""
        positions = np.arange(start, end)
        return self.rows[slot, positions // PAGE % self.num_entries].astype(np.int64) * PAGE + positions % PAGE

    def places_of(self, rows: np.ndarray, at: np.ndarray) -> np.ndarray:
        """Where position `at[n]` of a slot with the pages `rows[n]` (N, E) is: (N,) int32."""
        pages = rows[np.arange(len(at)), at // PAGE % self.num_entries]
        return pages * PAGE + at % PAGE

    def make_writable(self, slot: int, start: int, end: int) -> list[tuple[int, int]]:
        """Let the slot alone have the pages of positions `start` to `end` - 1. Returns the pages whose content must be
        copied beforehand, each with the one to copy it to: at most one."""
        copies = []
        for number in range(start // PAGE, (end - 1) // PAGE + 1):
            entry = number % self.num_entries
            page = self.rows[slot, entry]
            if page and self._users[page] == 1:
                continue
            own = self._free.pop()
            self._users[own] = 1
            self.rows[slot, entry] = own
            if page:
                self._users[page] -= 1
                if number * PAGE < start:
                    copies.append((int(page), own))
        return copies

    def not_writable(self, positions: np.ndarray) -> np.ndarray:
        """Of the first slots, those that do not have the page of their one of `positions` (N,) for themselves."""
        pages = self.rows[np.arange(len(positions)), positions // PAGE % self.num_entries]
        return np.flatnonzero((pages == 0) | (self._users[pages] != 1))

    def share(self, source: int, target: int) -> None:
        """Let `target` have the pages of `source` instead of its own."""
        for page in self.rows[target][self.rows[target] > 0]:
            self._users[page] -= 1
            if not self._users[page]:
                self._free.append(int(page))
        self.rows[target] = self.rows[source]
        self._users[self.rows[source][self.rows[source] > 0]] += 1

    def can_go_back(self, length: int, position: int) -> bool:
        kept = self.first_kept(0, length) if length else 0
        return kept <= max(0, position + 1 - self.reach)


@dataclass
class LayerPages:
    """What a layer has of the cache: keys and values (P, H_kv, D), and the number of its table."""

    keys: Tensor
    values: Tensor
    table: int


class PagedCache:
    """Keys and values of `num_slots` slots; the same questions and changes as `inference.Cache`."""

    def __init__(self, config: GPTConfig, num_slots: int, dtype: torch.dtype, device: torch.device):
        self.num_slots, T = num_slots, config.sequence_len
        reaches = [min(config.window(layer) or T, T) for layer in range(config.n_layer)]
        self.tables = [PagedTable(reach, num_slots, T) for reach in sorted(set(reaches))]
        # of each table's layers together: (layers, keys and values, pages, PAGE, H_kv, D)
        self._pools = [
            torch.zeros(
                reaches.count(table.reach), 2, table.num_pages, PAGE, config.n_kv_head, config.head_dim,
                dtype=dtype, device=device,
            )
            for table in self.tables
        ]  # fmt: skip
        numbers = [[table.reach for table in self.tables].index(reach) for reach in reaches]
        self.layers = []
        for layer, number in enumerate(numbers):
            keys, values = self._pools[number][numbers[:layer].count(number)].flatten(1, 2)
            self.layers.append(LayerPages(keys, values, number))

    def make_writable(self, slot: int, start: int, end: int) -> None:
        """Let the slot alone have the places of positions `start` to `end` - 1, as far as they will be kept."""
        for table, pool in zip(self.tables, self._pools, strict=True):
            for source, target in table.make_writable(slot, table.first_kept(start, end), end):
                pool[:, :, target] = pool[:, :, source]

    def make_next_writable(self, positions: np.ndarray) -> None:
        """Let each of the first slots alone have the place of its one of `positions` (N,)."""
        for slot in sorted({slot for table in self.tables for slot in table.not_writable(positions).tolist()}):
            self.make_writable(slot, int(positions[slot]), int(positions[slot]) + 1)

    def copy_slot(self, source: int, target: int, num_tokens: int) -> None:
        """Make `target` hold what `source` holds. No key or value is moved."""
        for table in self.tables:
            table.share(source, target)

    def swap_slots(self, a: int, b: int, num_tokens: int) -> None:
        """Exchange two slots. No key or value is moved."""
        for table in self.tables:
            table.rows[[a, b]] = table.rows[[b, a]]

    def can_go_back(self, length: int, position: int) -> bool:
        """Whether a slot that has held `length` positions still holds everything that a token at `position` sees."""
        return all(table.can_go_back(length, position) for table in self.tables)
