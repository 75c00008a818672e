"""Token rows of conversations: whole ones packed into (B, T) batches, with targets only where the assistant speaks.

A row has T + 1 tokens: inputs and next-token targets overlap by T. It is filled with whole conversations, each
beginning with its BOS, and padded at the end with targets that do not count. Nothing is cut inside a turn: a
conversation longer than a row loses whole turns at its end (`chat.render`) and is left out where not even the first
answer fits; both are counted. So every supervised token that fits the context is a target exactly once per epoch, and
no token of a user, a system message or a tool's output ever is. Mid-training and finetuning share this.

All conversations are measured once, before the first step; the ranks share the work. From the lengths every process
computes the same rows, so the number of steps of an epoch is known, and a position in the data is one number. Every
epoch goes through all rows in an order of its own, and row n of the whole run belongs to rank n mod world size: every
world size gives the same global batches, and a resumed run continues with the very next row. Conversations are
rendered again when their row is due: memory holds the lengths, not the tokens.
Not here: the packer of pretraining (`dataloader.py`), which cuts documents so that every row is full.
"""

import bisect
import hashlib
import json
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import islice
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Runtime, UserError, gather_ranks
from nanochat.data import chat
from nanochat.data.dataloader import Batch, make_batch
from nanochat.hosts import check_hosts_agree
from nanochat.tokenizer import Tokenizer

CHOICE = 1024  # conversations a row is chosen from: of rows of 512 of the mid mixture, 0.9 % is then padding
COMPARED = 64  # conversations at most that are compared between hosts
HELD_OUT_SHARE = 0.05  # of conversations that come without a validation split

Conversations = Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Rows:
    """Conversations packed into rows of `sequence_len` + 1 tokens. `rows`: the indices of each row's conversations,
    which have `num_tokens`, `num_targets` of them supervised. `num_cut` conversations lost turns at their end,
    `num_left_out` are in no row. `fingerprint` differs where the lengths or the numbers of supervised tokens do."""

    conversations: Conversations
    tokenizer: Tokenizer
    sequence_len: int
    rows: list[list[int]]
    num_tokens: int
    num_targets: int
    num_cut: int
    num_left_out: int
    fingerprint: int

    def __str__(self) -> str:
        padding = 1 - self.num_tokens / max(1, len(self.rows) * (self.sequence_len + 1))
        text = f"{len(self.conversations) - self.num_left_out:,} conversations, {self.num_targets:,} supervised tokens "
        text += f"of {self.num_tokens:,}, in {len(self.rows):,} rows ({padding:.1%} padding)"
        if self.num_cut or self.num_left_out:
            text += f"; too long for the context: {self.num_cut:,} cut after an answer, {self.num_left_out:,} left out"
        return text


def pack_conversations(conversations: Conversations, tokenizer: Tokenizer, sequence_len: int) -> Rows:
    """Measure `conversations` and pack them. With a process group every rank must call this, and each measures a part.
    Raises `UserError`, on every rank alike, for a conversation that is not in order, or when hosts have others."""
    sample = [conversations[i] for i in range(0, len(conversations), 1 + len(conversations) // COMPARED)]
    facts = {"number": len(conversations), "text": hashlib.sha256(json.dumps(sample).encode()).hexdigest()}
    check_hosts_agree("the conversations", facts, "give all hosts the same data")
    table = _measure_all(conversations, tokenizer, sequence_len + 1)
    lengths = table[:, 0]
    return Rows(
        conversations, tokenizer, sequence_len, pack_whole(lengths.tolist(), sequence_len + 1),
        num_tokens=int(lengths.sum()), num_targets=int(table[:, 1].sum()),
        num_cut=int(((table[:, 2] > 0) & (lengths > 0)).sum()), num_left_out=int((lengths == 0).sum()),
        fingerprint=int.from_bytes(hashlib.sha256(table.astype("<i8").tobytes()).digest()[:7], "little"),
    )  # fmt: skip


def _measure_all(conversations: Conversations, tokenizer: Tokenizer, max_tokens: int) -> np.ndarray:
    """(N, 3) int64: of each conversation its tokens, the supervised ones, and the messages that do not fit."""
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    own: list[tuple[int, int, int]] | UserError = []
    try:
        for index in range(rank, len(conversations), world_size):
            rendered = chat.render(tokenizer, conversations[index], max_tokens=max_tokens)
            own.append((len(rendered.ids), sum(rendered.mask), rendered.num_dropped))
    except UserError as error:
        own = error  # raised below: the other ranks must not wait for this one
    table = np.zeros((len(conversations), 3), dtype=np.int64)
    for first, part in enumerate(gather_ranks(own)):
        if isinstance(part, UserError):
            raise part
        table[first::world_size] = np.array(part, dtype=np.int64).reshape(-1, 3)
    return table


def pack_whole(lengths: Sequence[int], row_tokens: int, *, choice: int = CHOICE) -> list[list[int]]:
    """Rows of at most `row_tokens` tokens, as indices into `lengths`; those of length 0 are in none. Each row begins
    with the first that is in none yet, so that no short one waits for the end, and goes on with the longest that still
    fits among the next `choice` of them: `pack_whole([4, 3, 0, 6, 2], 8) == [[0, 1], [3, 4]]`."""
    waiting = [(length, -index) for index, length in enumerate(lengths) if length]
    assert all(length <= row_tokens for length, _ in waiting), row_tokens
    upcoming, packed = iter(waiting), set()
    at_hand = sorted(islice(upcoming, choice))  # of equal length, the earliest is last
    rows: list[list[int]] = []
    for first in waiting:
        if first in packed:
            continue
        row, room, taken = [], row_tokens, bisect.bisect_left(at_hand, first)
        while taken >= 0:
            item = at_hand.pop(taken)
            for newcomer in islice(upcoming, 1):
                bisect.insort(at_hand, newcomer)
            packed.add(item)
            row.append(-item[1])
            room -= item[0]
            taken = bisect.bisect_right(at_hand, (room, 0)) - 1
        rows.append(row)
    return rows


def hold_out(conversations: Conversations) -> tuple[list[int], list[int]]:
    """Indices of the conversations to train on, and of those to validate on: 5 % of the different ones, rounded up. A
    hash of its content decides, so equal conversations are on the same side, whatever their order. A single
    conversation is to train on."""
    keys = [hashlib.sha256(json.dumps(c, sort_keys=True).encode()).hexdigest() for c in conversations]
    different = sorted(set(keys))
    num_held = min(len(different) - 1, math.ceil(HELD_OUT_SHARE * len(different)))
    held = set(different[:num_held])
    train, val = ([i for i, key in enumerate(keys) if (key in held) == is_held] for is_held in (False, True))
    return train, val


class ChatLoader:
    """Iterator of `Batch` for one rank over packed rows; see the module's header. Endless with `epochs=None`. Otherwise
    it ends after that many passes, extended with empty rows, in which nothing counts, to a multiple of `step_rows` over
    all ranks: every rank has all micro-batches of the last training step. `seed` sets the order of rows."""

    def __init__(
        self, packed: Rows, batch_size: int, *, rank: int = 0, world_size: int = 1,
        device: torch.device | str = "cpu", epochs: int | None = None, step_rows: int = 1, seed: int = 0,
    ):  # fmt: skip
        assert batch_size >= 1, batch_size
        self.packed, self.batch_size, self.seed = packed, batch_size, seed
        self.rank, self.world_size, self.device = rank, world_size, torch.device(device)
        self.row = rank  # of the whole run: the next one of this rank
        self.num_rows = math.inf if epochs is None else epochs * len(packed.rows)
        self.end = math.inf if epochs is None else -(-self.num_rows // step_rows) * step_rows

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        numbers = range(self.row, self.row + self.batch_size * self.world_size, self.world_size)
        if self.row >= self.end:
            raise StopIteration
        self.row += self.batch_size * self.world_size
        packed, shape = self.packed, (self.batch_size, self.packed.sequence_len + 1)
        rows, epoch = [], 0
        for number in (n for n in numbers if n < self.num_rows):
            epoch, place = divmod(number, len(packed.rows))
            ids, mask = [], []
            for index in packed.rows[epoch_order(self.seed, epoch, len(packed.rows))[place]]:
                one = chat.render(packed.tokenizer, packed.conversations[index], max_tokens=shape[1])
                ids += one.ids
                mask += one.mask
            rows.append((ids, mask))
        return make_batch(rows, shape, packed.tokenizer.bos_id, self.device, epoch)

    def state_dict(self) -> dict[str, Tensor]:
        """Where the run stands after the batches given out, the same on all ranks that gave out equally many."""
        numbers = {"row": self.row - self.rank, "fingerprint": self.packed.fingerprint, "seed": self.seed}
        return {name: torch.tensor(number) for name, number in numbers.items()}

    def load_state_dict(self, shards: list[dict[str, Tensor]]) -> None:
        """Continue where the ranks that saved `shards` stood, however many they were. Raises `UserError` when they had
        other conversations."""
        rows, fingerprints, seeds = ({int(shard[key]) for shard in shards} for key in ("row", "fingerprint", "seed"))
        assert len(rows) == 1, rows
        if fingerprints != {self.packed.fingerprint} or seeds != {self.seed}:
            remedy = "bring back the data it was started with, or start another run"
            raise UserError(f"the conversations are not those of the run being resumed; {remedy}")
        self.row = rows.pop() + self.rank


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, size: int) -> list[int]:
    """The indices below `size` in the random order of one epoch."""
    order = list(range(size))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def validation_batches(packed: Rows, runtime: Runtime, batch_size: int, num_tokens: int = 0) -> Iterator[Batch]:
    """One pass over `packed`, in batches of `batch_size` rows on every rank: over its first `num_tokens` positions,
    rounded up to whole batches, or with 0 over all."""
    loader = ChatLoader(
        packed, batch_size, rank=runtime.rank, world_size=runtime.world_size, device=runtime.device, epochs=1
    )
    batch_tokens = batch_size * packed.sequence_len * runtime.world_size
    return islice(loader, -(-num_tokens // batch_tokens) or None)
