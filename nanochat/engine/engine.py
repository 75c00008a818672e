"""Generation for many sequences at once: admit, prefill in pieces, decode all, free.

A sequence lives in a slot of the cache (`inference.py`). The slots are in this order:

    [ decoding, in any order | being prefilled, and free ones still holding what finished sequences left ]

so that one decode pass reads the first slots as they lie. Each `step` prefills a bounded number of tokens of the
prompts that wait, first come first served, and decodes one token of every sequence, so a long prompt delays nobody for
long. What a free slot holds serves as a prefix for a later prompt that begins alike (the next turn of a conversation, a
common system message); all samples of one prompt are prefilled once.

A tool call is answered by tokens that are forced: they are read like a prompt. On CUDA the host reads what a step
sampled when the next one is already running (`overlap`); a sequence that ended meanwhile has one token too many in
flight, which is dropped.

Not here: passes over the model (`inference.py`), draws (`sampling.py`), the calculator (`calculator.py`).
"""

import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.data.chat import ReplyReader
from nanochat.engine.calculator import calculate
from nanochat.engine.generation import Completion, Event, Request, Token
from nanochat.engine.inference import InferenceModel, Piece
from nanochat.engine.sampling import Drawing, Sampling, draw, penalize_, plan_draw
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

SPARE_SLOTS = 4  # beyond the rows that decode: for prefixes that later prompts may share
MIN_SHARED_TOKENS = 16  # a shorter common beginning is read again faster than it is looked after
PREFILL_TOKENS = {"cuda": 2048}  # of one step, by device
OTHER_PREFILL_TOKENS = 256
TOOL_ERROR = "error"  # what the tool answers to what it refuses
MAX_TOOL_TOKENS = 64  # of one answer


@dataclass
class Stats:
    """Counters since the engine was made: tokens that went through a prefill, prompt tokens found in the cache
    instead, tokens that went through a decode, decode passes."""

    prefill_tokens: int = 0
    reused_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0


class _Sequence:
    """One sample on its way. The model has read, or is reading, the first `num_cached` of `tokens`, prompt and reply;
    while a decode is in flight they are all of them, and the token after them is on its way."""

    def __init__(self, request: Request, index: int, tokenizer: Tokenizer, seed: int):
        self.request, self.index = request, index
        self.sampling = request.sampling
        self.completion = request.completions[index]
        self.tokens = list(request.prompt)
        self.num_cached = 0
        self.slot: int | None = None
        self.snapshot_at: int | None = None  # length at which a copy of what the slot holds is left behind
        self.reader = ReplyReader(tokenizer, request.sampling.stop)
        self.completion.parts = self.reader.parts
        self.seen = set(self.tokens) if request.sampling.repetition_penalty != 1.0 else None
        self.call_start: int | None = None  # where in `tokens` the expression of an open tool call begins
        self._random = random.Random(f"{seed}/{index}")
        self._uniforms: list[float] = []

    @property
    def is_done(self) -> bool:
        return self.request.is_cancelled or self.completion.finish_reason is not None

    def uniform(self) -> float:
        """The random number, from 0 up to 1, of the position after those read. It belongs to the position: a draw
        that is dropped, as in overlapped steps, changes no later one."""
        place = self.num_cached - len(self.request.prompt)
        while len(self._uniforms) <= place:
            self._uniforms.append(self._random.random())
        return self._uniforms[place]


class _Dropped:
    """In place of a sequence whose draw in flight is not wanted."""

    is_done = True


@dataclass
class _Slot:
    """A slot's sequence, or `left`, the tokens that a finished one left in the cache; `used` orders by last use.

    Up to `written` positions were ever written since the slot, or what was copied into it, was empty: more than it
    holds tokens, where a sequence went on from a part of what was there, or a draw was dropped. It decides what the
    windows have lost.
    """

    sequence: _Sequence | None = None
    left: list[int] = field(default_factory=list)
    used: int = 0
    earlier: int = 0  # written before the sequence came

    @property
    def written(self) -> int:
        return self.earlier if self.sequence is None else max(self.earlier, self.sequence.num_cached)

    @property
    def tokens(self) -> list[int]:
        """What is known to be at the first positions."""
        return self.left if self.sequence is None else self.sequence.tokens[: self.sequence.num_cached]


@dataclass(frozen=True)
class _Drawn:
    """Tokens the host has not read yet: the sequences by row, `ids` (N,) int64 on the device, and where asked for
    log probabilities (V,) with the likeliest of them."""

    sequences: list[_Sequence | type[_Dropped]]
    ids: Tensor
    logprobs: list[tuple[Tensor, Tensor, Tensor] | None]


class Engine:
    """Generates for a model; one thread owns it.

    model, tokenizer: as `load_model` returns them. max_rows: sequences that decode at once. weights: see
    `InferenceModel`. tool: answers the expressions of tool calls, None for those it refuses. overlap: whether the host
    reads a step late (default: on CUDA).
    """

    def __init__(
        self,
        model: GPT,
        tokenizer: Tokenizer,
        *,
        max_rows: int = 8,
        weights: str = "",
        tool: Callable[[str], str | None] = calculate,
        overlap: bool | None = None,
    ):
        if max_rows < 1:
            raise UserError(f"the engine needs at least 1 row, not {max_rows}")
        self.tokenizer, self.tool, self.max_rows = tokenizer, tool, max_rows
        self.model = InferenceModel(model, max_rows + SPARE_SLOTS, weights=weights)
        self.stats = Stats()
        self.context = model.config.sequence_len
        self._slots = [_Slot() for _ in range(max_rows + SPARE_SLOTS)]
        self._num_decoding = 0
        self._prefilling: list[_Sequence] = []
        self._waiting: deque[_Sequence] = deque()
        self._flying: _Drawn | None = None
        self._clock = 0
        on_cuda = self.model.device.type == "cuda"
        self._overlap = on_cuda if overlap is None else overlap
        self._prefill_tokens = PREFILL_TOKENS.get(self.model.device.type, OTHER_PREFILL_TOKENS)
        special = tokenizer.special_ids
        self._call = (special["<|python_start|>"], special["<|python_end|>"])
        self._answer = (special["<|output_start|>"], special["<|output_end|>"])

    # --- requests ---

    def submit(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        *,
        num_samples: int = 1,
        stop_ids: Collection[int] | None = None,
    ) -> Request:
        """Queue a prompt, a list of token ids, for `num_samples` replies.

        The model reads at most its context, so prompt and reply together have at most one token more. `stop_ids` end
        a reply (default: what ends an assistant's turn). Raises `UserError` for a prompt that is empty, too long or
        has ids outside the vocabulary.
        """
        prompt = list(prompt)
        if not 1 <= len(prompt) <= self.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; it must have 1 to {self.context}, the model's context"
            )
        if not all(0 <= token < self.tokenizer.vocab_size for token in prompt):
            raise UserError(f"the prompt has token ids outside the vocabulary of {self.tokenizer.vocab_size}")
        if num_samples < 1:
            raise UserError(f"the number of samples must be at least 1, not {num_samples}")
        stops = self.tokenizer.stop_ids if stop_ids is None else stop_ids
        request = Request(prompt, sampling, stops, [Completion() for _ in range(num_samples)])
        seed = random.SystemRandom().getrandbits(64) if sampling.seed is None else sampling.seed
        self._waiting.extend(_Sequence(request, index, self.tokenizer, seed) for index in range(num_samples))
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request and free its rows; no further event comes of it."""
        request.is_cancelled = True
        self._waiting = deque(sequence for sequence in self._waiting if sequence.request is not request)
        for sequence in self._prefilling:
            if sequence.request is request:
                self._leave(sequence.slot)
        self._prefilling = [sequence for sequence in self._prefilling if sequence.request is not request]
        for slot in reversed(range(self._num_decoding)):
            if self._slots[slot].sequence.request is request:
                self._free(slot)

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self._num_decoding or self._prefilling or self._flying)

    @property
    def num_active(self) -> int:
        """Sequences that have a slot."""
        return self._num_decoding + len(self._prefilling)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def refresh(self, model: GPT) -> None:
        """Take over the present weights of `model`; what the cache holds of earlier ones is forgotten. From here on all
        is to the last bit as with a new engine."""
        assert not self.has_work, "weights can only change between requests"
        self.model.refresh(model)
        self._slots = [_Slot() for _ in self._slots]
        self._clock = 0

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        num_samples: int = 1,
        stop_ids: Collection[int] | None = None,
        progress: Callable[[Request], None] | None = None,
    ) -> list[list[Completion]]:
        """The completions of each prompt, in order; `progress` is called with every request that is done."""
        requests = [self.submit(prompt, sampling, num_samples=num_samples, stop_ids=stop_ids) for prompt in prompts]
        unfinished = set(requests)
        while unfinished:
            done = {event.request for event in self.step() if event.request.is_done} & unfinished
            unfinished -= done
            if progress is not None:
                for request in done:
                    progress(request)
        return [request.completions for request in requests]

    # --- a step ---

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Admit and prefill within the step's budget, decode a token of every sequence, and say what came of it."""
        events: list[Event] = []
        self._prefill(events)
        active = [self._slots[slot].sequence for slot in range(self._num_decoding)]
        # a repetition penalty needs to know the token before
        overlap = self._overlap and all(sequence.seen is None for sequence in active)
        if not overlap:
            self._land_flying(events)
        before, self._flying = self._flying, None
        if self._num_decoding:
            self._flying = self._launch(before)
        if before is not None:
            self._land(before, events)
        if not overlap:
            self._land_flying(events)
        return events

    def _land_flying(self, events: list[Event]) -> None:
        drawn, self._flying = self._flying, None
        if drawn is not None:
            self._land(drawn, events)

    # --- prefill ---

    def _prefill(self, events: list[Event]) -> None:
        """Read what waits, up to the step's budget of tokens."""
        budget = self._prefill_tokens
        while budget > 0 and (pieces := self._next_pieces(budget, events)):
            begun, rows = [], []
            budget -= sum(end - sequence.num_cached for sequence, end in pieces)
            logits = self._read(pieces)
            for row, (sequence, end) in enumerate(pieces):
                if end == sequence.snapshot_at:
                    self._keep_copy(sequence.slot)
                if end == len(sequence.tokens):
                    self._begin_decoding(sequence, logits[row])
                    begun.append(sequence)
                    rows.append(row)
            if begun:
                self._land(self._draw(begun, logits[rows]), events)

    def _next_pieces(self, budget: int, events: list[Event]) -> list[tuple[_Sequence, int]]:
        """The sequences of the next pass, and how far each of them is read: those that are being read, then those
        that wait, `budget` tokens in all. One that begins like another of the pass waits for the next one."""
        pieces: list[tuple[_Sequence, int]] = []
        candidates = deque(self._prefilling)
        while budget > 0:
            if candidates:
                sequence = candidates.popleft()
            elif self._waiting and self.num_active < self.max_rows:
                if any(self._begins_alike(self._waiting[0], other) for other, _ in pieces):
                    break
                sequence = self._waiting.popleft()
                if self._begin_as_sibling(sequence, events):
                    continue
                self._admit(sequence)
            else:
                break
            end = min(len(sequence.tokens), sequence.num_cached + budget)
            if sequence.snapshot_at is not None and sequence.snapshot_at > sequence.num_cached:
                end = min(end, sequence.snapshot_at)
            budget -= end - sequence.num_cached
            pieces.append((sequence, end))
        return pieces

    def _begins_alike(self, sequence: _Sequence, other: _Sequence) -> bool:
        if sequence.request is other.request:
            return True
        return _common_length(sequence.tokens, other.tokens) >= MIN_SHARED_TOKENS

    def _read(self, pieces: list[tuple[_Sequence, int]]) -> Tensor:
        """Let the model read each sequence up to its token `end`: logits (len(pieces), V) after these."""
        inputs = []
        for sequence, end in pieces:
            start, tokens = sequence.num_cached, sequence.tokens
            inputs.append(Piece(sequence.slot, tokens[start:end], start, tokens[start - 1] if start else None))
            self.stats.prefill_tokens += end - start
            sequence.num_cached = end
        return self.model.prefill(inputs)

    def _begin_decoding(self, sequence: _Sequence, logits: Tensor) -> None:
        """The prompt of `sequence` is read: it takes its place among those that decode."""
        if sequence in self._prefilling:
            self._prefilling.remove(sequence)
        self._swap(sequence.slot, self._num_decoding)
        self._num_decoding += 1
        siblings = sum(waiting.request is sequence.request for waiting in self._waiting)
        if siblings:
            sequence.request.logits = logits
            if siblings > self.max_rows - self.num_active:
                self._keep_copy(sequence.slot)  # for those that there is no room for yet

    def _begin_as_sibling(self, sequence: _Sequence, events: list[Event]) -> bool:
        """Let a sample begin without reading its prompt, where another sample of the request has read it."""
        request, length = sequence.request, len(sequence.tokens)
        if request.logits is None:
            return False
        logits = request.logits
        if sequence.index == len(request.completions) - 1:
            request.logits = None
        source = next((i for i, slot in enumerate(self._slots) if self._holds(slot, sequence.tokens)), None)
        if source is None:
            return False
        self._take_slot(sequence, source, length)
        self._begin_decoding(sequence, logits)
        self._land(self._draw([sequence], logits.unsqueeze(0).clone()), events)
        return True

    def _holds(self, slot: _Slot, tokens: list[int]) -> bool:
        """Whether a slot could go on from all of `tokens`."""
        length = len(tokens)
        return self.model.cache.can_go_back(slot.written, length) and slot.tokens[:length] == tokens

    # --- decoding ---

    def _launch(self, before: _Drawn | None) -> _Drawn:
        """Start the decode of every sequence. Tokens that the host has not read are taken from `before`."""
        sequences = [self._slots[slot].sequence for slot in range(self._num_decoding)]
        rows = {} if before is None else {id(sequence): row for row, sequence in enumerate(before.sequences)}
        source = [rows.get(id(sequence), -1) for sequence in sequences]
        newest = [0 if row >= 0 else s.tokens[s.num_cached] for s, row in zip(sequences, source, strict=True)]
        previous = [sequence.tokens[sequence.num_cached - 1] for sequence in sequences]
        inputs = torch.tensor([newest, previous, source]).to(self.model.device, non_blocking=True)
        idx = inputs[0]
        if before is not None:
            idx = torch.where(inputs[2] >= 0, before.ids[inputs[2].clamp(min=0)], idx)
        # a sequence whose last token is in flight may run one beyond the context; that draw is dropped
        positions = [min(sequence.num_cached, self.context - 1) for sequence in sequences]
        for sequence in sequences:
            sequence.num_cached += 1
        self.stats.decode_tokens += len(sequences)
        self.stats.decode_steps += 1
        if any(sequence.seen is not None for sequence in sequences):
            return self._draw(sequences, self.model.decode(idx, inputs[1], positions))
        logits, ids = self.model.decode_and_draw(idx, inputs[1], positions, self._drawing(sequences))
        return self._drawn(sequences, logits, ids)

    def _draw(self, sequences: list[_Sequence], logits: Tensor) -> _Drawn:
        """Draw the next token of each sequence from logits (N, V)."""
        weighed = logits
        if any(sequence.seen is not None for sequence in sequences):
            weighed = logits.clone()
            for row, sequence in enumerate(sequences):
                if sequence.seen is not None:
                    penalize_(weighed[row], sequence.seen, sequence.sampling.repetition_penalty)
        drawing = self._drawing(sequences)
        return self._drawn(sequences, logits, draw(weighed, drawing.columns.to(logits.device), drawing.kind))

    def _drawing(self, sequences: list[_Sequence]) -> Drawing:
        """How the next token of each sequence is drawn; what the tool answers is written by the tool only."""
        settings = [sequence.sampling for sequence in sequences]
        uniforms = [sequence.uniform() for sequence in sequences]
        barred = self._answer if any(sampling.use_tool for sampling in settings) else ()
        return plan_draw(settings, uniforms, self.tokenizer.vocab_size, barred)

    def _drawn(self, sequences: list[_Sequence], logits: Tensor, ids: Tensor) -> _Drawn:
        """Tokens `ids` (N,) drawn from the model's logits (N, V)."""
        return _Drawn(list(sequences), ids, [_logprobs(one, logits, row) for row, one in enumerate(sequences)])

    def _land(self, drawn: _Drawn, events: list[Event]) -> None:
        """Read what was drawn; sequences that ended are freed."""
        for row, (sequence, token) in enumerate(zip(drawn.sequences, drawn.ids.tolist(), strict=True)):
            if not sequence.is_done:
                events.append(self._accept(sequence, _token(token, drawn.logprobs[row])))
        for slot in reversed(range(self._num_decoding)):
            if self._slots[slot].sequence.is_done:
                self._free(slot)

    def _accept(self, sequence: _Sequence, token: Token) -> Event:
        """Add a drawn token to its sequence, and what the tool answers if that was the end of a call."""
        if token.id in sequence.request.stop_ids:
            sequence.completion.finish_reason = "stop"
            return self._event(sequence, [])
        added = [token, *self._tool_answer(sequence, token)]
        room = self.context + 1 - len(sequence.tokens)
        room = min(room, sequence.sampling.max_tokens - len(sequence.completion.tokens))
        added = added[:room]
        sequence.tokens += [one.id for one in added]
        sequence.completion.tokens += added
        if sequence.seen is not None:
            sequence.seen.update(one.id for one in added)
        if len(added) == room:
            sequence.completion.finish_reason = "length"
        event = self._event(sequence, added)
        if len(added) > 1 and not event.finish_reason:
            self._read_forced(sequence)
        return event

    def _tool_answer(self, sequence: _Sequence, token: Token) -> list[Token]:
        """The tokens that the tool puts behind `token`: its answer behind the end of a call."""
        call_start, call_end = self._call
        if token.id == call_start:
            sequence.call_start = len(sequence.tokens) + 1
        if token.id != call_end or sequence.call_start is None or not sequence.sampling.use_tool:
            return []
        result = self.tool(self.tokenizer.decode(sequence.tokens[sequence.call_start :]))
        sequence.call_start = None
        text = self.tokenizer.encode(TOOL_ERROR if result is None else result)[:MAX_TOOL_TOKENS]
        return [Token(forced, is_forced=True) for forced in (self._answer[0], *text, self._answer[1])]

    def _read_forced(self, sequence: _Sequence) -> None:
        """Let the model read the tool's answer but for its last token, which is the next decode's input. A decode in
        flight has read the end of the call; what it draws is not wanted."""
        if self._flying is not None and sequence in self._flying.sequences:
            self._flying.sequences[self._flying.sequences.index(sequence)] = _Dropped
        self._read([(sequence, len(sequence.tokens) - 1)])

    def _event(self, sequence: _Sequence, added: list[Token]) -> Event:
        """The text of the added tokens; a stop text in it ends the sequence."""
        completion, reader = sequence.completion, sequence.reader
        deltas = reader.add(token.id for token in added)
        if completion.finish_reason:
            deltas += reader.finish()
        if reader.is_stopped:
            completion.finish_reason = "stop"
        return Event(sequence.request, sequence.index, tuple(added), tuple(deltas), completion.finish_reason)

    # --- slots ---

    def _admit(self, sequence: _Sequence) -> None:
        """Give a sequence a slot, with as much of its prompt as some slot holds already."""
        # the last token is always read: its logits are needed
        shared = [_common_length(slot.tokens, sequence.tokens[:-1]) for slot in self._slots]
        usable = [
            length if self.model.cache.can_go_back(slot.written, length) else 0
            for slot, length in zip(self._slots, shared, strict=True)
        ]
        source = max(range(len(usable)), key=usable.__getitem__)
        reused = usable[source] if usable[source] >= MIN_SHARED_TOKENS else 0
        # where another began alike but has overwritten that in its windows, a copy is kept on the way this time
        if max(shared) > max(reused, MIN_SHARED_TOKENS):
            sequence.snapshot_at = max(shared)
        self._take_slot(sequence, source if reused else None, reused)
        self._prefilling.append(sequence)

    def _take_slot(self, sequence: _Sequence, source: int | None, num_tokens: int) -> None:
        """Give a sequence the first slot that none has, holding `num_tokens` of what slot `source` holds."""
        target = next(i for i, slot in enumerate(self._slots) if slot.sequence is None)
        earlier = 0
        if source == target:  # what it holds may serve others yet, as it is now
            source = self._oldest_free(keep=target)
            self._copy(target, source)
            self._slots[source] = self._slots[target]
        else:
            self._make_room(target, keep=source)
        if source is not None:
            self._copy(source, target)
            earlier = self._slots[source].written
            self._slots[source].used = self._tick()
        sequence.num_cached, sequence.slot = num_tokens, target
        sequence.request.num_reused = max(sequence.request.num_reused, num_tokens)
        self.stats.reused_tokens += num_tokens
        self._slots[target] = _Slot(sequence, earlier=earlier)

    def _make_room(self, target: int, *, keep: int | None = None) -> None:
        """Empty slot `target`, which no sequence has: what it holds replaces what was used longest ago in another."""
        victim = self._oldest_free(keep)
        if victim != target and self._slots[target].left:
            self._copy(target, victim)
            self._slots[victim] = self._slots[target]
        self._slots[target] = _Slot()

    def _oldest_free(self, keep: int | None = None) -> int:
        """The slot without a sequence, other than `keep`, that is empty or was used longest ago."""
        free = [i for i, slot in enumerate(self._slots) if slot.sequence is None and i != keep]
        return min(free, key=lambda i: (bool(self._slots[i].left), self._slots[i].used))

    def _keep_copy(self, slot: int) -> None:
        """Leave what `slot` holds now in a free one, for prompts that begin alike."""
        target, source = self._oldest_free(), self._slots[slot]
        self._copy(slot, target)
        self._slots[target] = _Slot(None, list(source.tokens), self._tick(), source.written)

    def _copy(self, source: int, target: int) -> None:
        self.model.cache.copy_slot(source, target, self._slots[source].written)

    def _swap(self, a: int, b: int) -> None:
        if a != b:
            self.model.cache.swap_slots(a, b, max(self._slots[a].written, self._slots[b].written))
            self._slots[a], self._slots[b] = self._slots[b], self._slots[a]
            for place in (a, b):
                if self._slots[place].sequence is not None:
                    self._slots[place].sequence.slot = place

    def _free(self, slot: int) -> None:
        """End the sequence that decodes in `slot`; the last decoding one takes its place."""
        self._num_decoding -= 1
        self._swap(slot, self._num_decoding)
        self._leave(self._num_decoding)

    def _leave(self, slot: int) -> None:
        """The sequence of `slot` is over; what the cache holds of it may serve a later prompt."""
        over = self._slots[slot]
        tokens = over.tokens[: self.context - 1]  # a dropped draw may have written to the last place
        self._slots[slot] = _Slot(None, tokens, self._tick(), over.written)

    def _tick(self) -> int:
        self._clock += 1
        return self._clock


def _common_length(a: Sequence[int], b: Sequence[int]) -> int:
    shortest = min(len(a), len(b))
    return next((i for i in range(shortest) if a[i] != b[i]), shortest)


def _logprobs(sequence: _Sequence, logits: Tensor, row: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Log probabilities (V,) of a row of logits (N, V), and the likeliest of them with their ids, where asked for."""
    count = sequence.sampling.num_logprobs
    if count is None:
        return None
    logprobs = torch.log_softmax(logits[row], dim=-1)
    return logprobs, *logprobs.topk(min(count, logprobs.numel()))


def _token(token: int, logprobs: tuple[Tensor, Tensor, Tensor] | None) -> Token:
    if logprobs is None:
        return Token(token)
    of_all, values, ids = logprobs
    return Token(token, False, of_all[token].item(), tuple(zip(ids.tolist(), values.tolist(), strict=True)))
