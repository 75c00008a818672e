"""Which sample has which slot of the KV cache, and what finished samples left in the others.

The slots are in this order, so that one decode pass reads the first ones as they lie:

    [ decoding, in any order | being prefilled, and free ones that may still hold a finished sample ]

What a free slot holds serves as a prefix for a later prompt with the same beginning: the next turn of a conversation,
or a common system message.

Not here: the tensors (`inference.py`), and when a sample begins or ends (`engine.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from nanochat.engine.generation import Sample
from nanochat.engine.inference import Cache

MIN_SHARED_TOKENS = 16  # a shorter common prefix costs less to read again than to look after


@dataclass
class Slot:
    """The sample in a slot, or in `left` the tokens of a finished one that are still in the cache; `used` orders slots
    by last use.

    `num_written` counts the positions ever written since the slot, or the one it was copied from, was empty. They can
    be more than its tokens, if a sample went on from a part of what was there, or a draw was dropped. It tells what
    windowed layers have overwritten.
    """

    sample: Sample | None = None
    left: list[int] = field(default_factory=list)
    used: int = 0
    earlier: int = 0  # `num_written` before the sample came

    @property
    def num_written(self) -> int:
        return self.earlier if self.sample is None else max(self.earlier, self.sample.num_cached)

    @property
    def tokens(self) -> list[int]:
        """The tokens known to be at its first positions."""
        return self.left if self.sample is None else self.sample.tokens[: self.sample.num_cached]


class Slots:
    """The slots of `cache`; the first `num_decoding` have the samples that decode."""

    def __init__(self, cache: Cache, context: int):
        self._cache, self._context = cache, context
        self._slots = [Slot() for _ in range(cache.num_slots)]
        self._clock = 0
        self.num_decoding = 0

    @property
    def decoding(self) -> list[Sample]:
        """The samples that decode, in the order of their slots."""
        return [slot.sample for slot in self._slots[: self.num_decoding]]

    # --- prefixes ---

    def find_prefix(self, tokens: list[int]) -> tuple[int | None, int, int | None]:
        """A slot whose first positions can serve a prompt, and how many of them (None, 0 if there is none). Third, the
        length of a longer common prefix that a slot held but has overwritten in its windows, or None: the slot of the
        prompt should be copied when that much of it has been read."""
        # the last token is never shared: the model has to read it for its logits
        shared = [_common_length(slot.tokens, tokens[:-1]) for slot in self._slots]
        usable = [n if self._can_go_back(slot, n) else 0 for slot, n in zip(self._slots, shared, strict=True)]
        longest = max(usable)
        reused = longest if longest >= MIN_SHARED_TOKENS else 0
        lost = max(shared) if max(shared) > max(reused, MIN_SHARED_TOKENS) else None
        return usable.index(longest) if reused else None, reused, lost

    def find_whole(self, tokens: list[int]) -> int | None:
        """A slot from which a sample whose tokens begin with `tokens` can go on."""
        n = len(tokens)
        fits = (i for i, slot in enumerate(self._slots) if self._can_go_back(slot, n) and slot.tokens[:n] == tokens)
        return next(fits, None)

    def _can_go_back(self, slot: Slot, position: int) -> bool:
        return self._cache.can_go_back(slot.num_written, position)

    # --- moves ---

    def take(self, sample: Sample, source: int | None, num_tokens: int) -> None:
        """Give a sample the first slot that has none, with the first `num_tokens` of what slot `source` holds."""
        target = next(i for i, slot in enumerate(self._slots) if slot.sample is None)
        spare = self._oldest_free(keep=source)
        if spare != target and self._slots[target].left:  # it may serve others yet
            self._copy(target, spare)
            self._slots[spare] = self._slots[target]
        earlier = 0
        if source is not None:
            if source == target:
                source = spare
            else:
                self._copy(source, target)
            earlier = self._slots[source].num_written
            self._slots[source].used = self._tick()
        sample.num_cached, sample.slot = num_tokens, target
        self._slots[target] = Slot(sample, earlier=earlier)

    def keep_copy(self, slot: int) -> None:
        """Leave what `slot` holds now in a free one as well, for prompts with the same beginning."""
        target, source = self._oldest_free(), self._slots[slot]
        self._copy(slot, target)
        self._slots[target] = Slot(None, list(source.tokens), self._tick(), source.num_written)

    def begin_decoding(self, slot: int) -> None:
        """The sample in `slot` decodes from now on."""
        self._swap(slot, self.num_decoding)
        self.num_decoding += 1

    def free_done(self) -> None:
        """Free the slots of decoding samples that are done; the last one that decodes moves to each."""
        for slot in reversed(range(self.num_decoding)):
            if self._slots[slot].sample.is_done:
                self.num_decoding -= 1
                self._swap(slot, self.num_decoding)
                self.free(self.num_decoding)

    def free(self, slot: int) -> None:
        """End the sample in `slot`; a later prompt may use what it leaves."""
        ended = self._slots[slot]
        tokens = ended.tokens[: self._context - 1]  # a dropped draw may have overwritten the last position
        self._slots[slot] = Slot(None, tokens, self._tick(), ended.num_written)

    def _oldest_free(self, keep: int | None = None) -> int:
        """The slot without a sample, other than `keep`, that is empty or was used longest ago."""
        free = [i for i, slot in enumerate(self._slots) if slot.sample is None and i != keep]
        return min(free, key=lambda i: (bool(self._slots[i].left), self._slots[i].used))

    def _copy(self, source: int, target: int) -> None:
        self._cache.copy_slot(source, target, self._slots[source].num_written)

    def _swap(self, a: int, b: int) -> None:
        if a == b:
            return
        slots = self._slots
        self._cache.swap_slots(a, b, max(slots[a].num_written, slots[b].num_written))
        slots[a], slots[b] = slots[b], slots[a]
        for place in (a, b):
            if slots[place].sample is not None:
                slots[place].sample.slot = place

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def share_prefix(a: Sample, b: Sample) -> bool:
    """Whether two samples have a common prefix that is worth sharing."""
    return a.request is b.request or _common_length(a.tokens, b.tokens) >= MIN_SHARED_TOKENS


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)
