"""The engine: replies to many prompts at once, by continuous batching.

Each `step` prefills a bounded number of tokens of the waiting prompts, first come first served, and decodes one token
of every running sample, so that a long prompt never holds up the others for long. Samples of one prompt read it once.

A tool call is answered by forced tokens, which the model reads like a prompt. On CUDA the host reads the tokens of a
step while the next one is already running (`overlap`); a sample that ended meanwhile has one token too many in flight,
which is dropped.

Not here: passes over the model (`inference.py`, `gpu.py`), slots of the cache and shared prefixes (`slots.py`), draws
(`sampling.py`), the calculator (`calculator.py`).
"""

import logging
import random
from collections import deque
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nanochat.common import UserError
from nanochat.engine.calculator import calculate
from nanochat.engine.generation import Completion, Event, Request, Sample, Token
from nanochat.engine.inference import InferenceModel, Piece
from nanochat.engine.sampling import Drawing, Sampling, draw, log_probabilities, plan_draw, reweigh_
from nanochat.engine.slots import Slots, share_prefix
from nanochat.engine.transfer import Arriving, to_device
from nanochat.model.gpt import GPT
from nanochat.tokenizer import Tokenizer

logger = logging.getLogger(__name__)

SPARE_SLOTS = 4  # beyond the rows that decode: for prefixes that later prompts may share
PREFILL_TOKENS = {"cuda": 2048}  # of one step, by device: those that decode wait for so many
OTHER_PREFILL_TOKENS = 256
IDLE_PREFILL = {"cuda": 4}  # times as many while none decodes
TOOL_ERROR = "error"  # the tool's answer to an expression that it refuses
MAX_TOOL_TOKENS = 64  # of one answer
SCORED_ROWS = 256  # logits of prompt tokens that are in memory at a time


@dataclass
class Stats:
    """Counters since the engine was made: tokens that went through a prefill, prompt tokens found in the cache
    instead, tokens that went through a decode, decode passes."""

    prefill_tokens: int = 0
    reused_tokens: int = 0
    decode_tokens: int = 0
    decode_steps: int = 0


@dataclass(frozen=True)
class _Drawn:
    """Tokens the host has not read yet: the samples by row (None where the draw is dropped), `ids` (N,) int64 on the
    device, and in `arriving` first these, then for each row whose log probabilities were asked for that of its token,
    and the likeliest ones with their ids."""

    samples: list[Sample | None]
    ids: Tensor
    arriving: Arriving
    has_logprobs: list[bool]

    def read(self) -> list[tuple[Sample, Token]]:
        """The samples with their tokens; waits for them."""
        ids, *numbers = self.arriving.read()
        tokens, found = [], iter(numbers)
        for id_, has_logprobs in zip(ids, self.has_logprobs, strict=True):
            if has_logprobs:
                logprob, values, likeliest = next(found), next(found), next(found)
                tokens.append(Token(id_, False, logprob, tuple(zip(likeliest, values, strict=True))))
            else:
                tokens.append(Token(id_))
        return [(sample, token) for sample, token in zip(self.samples, tokens, strict=True) if sample is not None]


class Engine:
    """Generates for a model; one thread owns it.

    model, tokenizer: as `load_model` returns them. max_rows: how many samples decode at once. weights: see
    `InferenceModel`. tool: answers the expressions of tool calls, None for those it refuses. overlap: whether the host
    reads a step's tokens one step late (default: on CUDA).
    """

    def __init__(
        self, model: GPT, tokenizer: Tokenizer, *, max_rows: int = 8, weights: str = "",
        tool: Callable[[str], str | None] = calculate, overlap: bool | None = None,
    ):  # fmt: skip
        if max_rows < 1:
            raise UserError(f"the engine needs at least 1 row, not {max_rows}")
        self.tokenizer, self.tool, self.max_rows = tokenizer, tool, max_rows
        self.model = serving_model(model, max_rows + SPARE_SLOTS, weights)
        self.stats = Stats()
        self.context = model.config.sequence_len
        self._slots = Slots(self.model.cache, self.context)
        self._prefilling: list[Sample] = []
        self._waiting: deque[Sample] = deque()
        self._flying: _Drawn | None = None
        device_type = self.model.device.type
        self._overlap = device_type == "cuda" if overlap is None else overlap
        self._prefill_tokens = PREFILL_TOKENS.get(device_type, OTHER_PREFILL_TOKENS)
        special = tokenizer.special_ids
        self._call = (special["<|python_start|>"], special["<|python_end|>"])
        self._answer = (special["<|output_start|>"], special["<|output_end|>"])

    # --- requests ---

    def submit(
        self, prompt: Sequence[int], sampling: Sampling, *, num_samples: int = 1,
        stop_ids: Collection[int] | None = None,
    ) -> Request:  # fmt: skip
        """Queue a prompt, a list of token ids, for `num_samples` replies.

        The model reads at most its context, so prompt and reply together have at most one token more. `stop_ids` end
        a reply (default: what ends an assistant's turn). Raises `UserError` for a prompt that is empty, too long or
        has ids outside the vocabulary, and for a bias of such ids.
        """
        prompt, vocab_size, limit = list(prompt), self.tokenizer.vocab_size, self.context
        if not 1 <= len(prompt) <= limit:
            raise UserError(f"the prompt has {len(prompt)} tokens; it must have 1 to {limit}, the model's context")
        if not all(0 <= token < vocab_size for token in prompt):
            raise UserError(f"the prompt has token ids outside the vocabulary of {vocab_size}")
        if not all(0 <= token < vocab_size for token, _ in sampling.logit_bias):
            raise UserError(f"logit_bias has token ids outside the vocabulary of {vocab_size}")
        if num_samples < 1:
            raise UserError(f"the number of samples must be at least 1, not {num_samples}")
        stops = self.tokenizer.stop_ids if stop_ids is None else stop_ids
        request = Request(prompt, sampling, stops, [Completion() for _ in range(num_samples)])
        seed = random.SystemRandom().getrandbits(64) if sampling.seed is None else sampling.seed
        self._waiting.extend(Sample(request, index, self.tokenizer, seed) for index in range(num_samples))
        return request

    def cancel(self, request: Request) -> None:
        """Stop a request and free its rows; it gets no further events."""
        request.is_cancelled = True
        self._waiting = deque(sample for sample in self._waiting if sample.request is not request)
        for sample in self._prefilling:
            if sample.is_done:
                self._slots.free(sample.slot)
        self._prefilling = [sample for sample in self._prefilling if not sample.is_done]
        self._slots.free_done()

    @property
    def has_work(self) -> bool:
        return bool(self._waiting or self.num_active or self._flying)

    @property
    def num_active(self) -> int:
        """Samples that have a slot."""
        return self._slots.num_decoding + len(self._prefilling)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    def refresh(self, model: GPT) -> None:
        """Take over the present weights of `model` and forget what is cached. From here on, all results are to the last
        bit those of a new engine."""
        assert not self.has_work, "weights can only change between requests"
        self.model.refresh(model)
        self._slots = Slots(self.model.cache, self.context)

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: Sampling, *, num_samples: int = 1,
        stop_ids: Collection[int] | None = None, progress: Callable[[Request], None] | None = None,
    ) -> list[list[Completion]]:  # fmt: skip
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
        """Admit and prefill within the step's budget, decode a token of every sample, and report what was added."""
        events: list[Event] = []
        self._prefill(events)
        # a penalty has to know the token before, so steps with one cannot overlap
        overlap = self._overlap and not any(sample.reweighs for sample in self._slots.decoding)
        if not overlap:
            self._land(self._take_flying(), events)
        before = self._take_flying()
        if self._slots.num_decoding:
            self._flying = self._launch(before)
        self._land(before, events)
        if not overlap:
            self._land(self._take_flying(), events)
        return events

    def _take_flying(self) -> _Drawn | None:
        drawn, self._flying = self._flying, None
        return drawn

    # --- prefill ---

    def _prefill(self, events: list[Event]) -> None:
        """Read waiting prompts, up to the step's budget of tokens."""
        budget = self._prefill_tokens
        if not self._slots.num_decoding:
            budget *= IDLE_PREFILL.get(self.model.device.type, 1)
        while budget > 0 and (pieces := self._next_pieces(budget, events)):
            budget -= sum(end - sample.num_cached for sample, end in pieces)
            logits, begun = self._read(pieces), {}
            for row, (sample, end) in enumerate(pieces):
                if end == sample.copy_at:
                    self._slots.keep_copy(sample.slot)
                if end == len(sample.tokens):
                    self._begin_decoding(sample, logits[row])
                    begun[row] = sample
            if begun:
                self._land(self._draw(list(begun.values()), logits[list(begun)]), events)

    def _next_pieces(self, budget: int, events: list[Event]) -> list[tuple[Sample, int]]:
        """The samples of the next pass, and how far each prompt is read, `budget` tokens in all: first those partly
        read, then waiting ones. One that begins like another of the pass waits for the next pass, to share its prefix.
        """
        pieces: list[tuple[Sample, int]] = []
        candidates = deque(self._prefilling)
        while budget > 0:
            if candidates:
                sample = candidates.popleft()
            elif self._waiting and self.num_active < self.max_rows:
                if any(share_prefix(self._waiting[0], other) for other, _ in pieces):
                    break
                sample = self._waiting.popleft()
                if self._begin_as_sibling(sample, events):
                    continue
                # what is in the cache has no log probabilities
                prefix = (None, 0, None) if sample.scores_prompt else self._slots.find_prefix(sample.tokens)
                source, num_reused, sample.copy_at = prefix
                self._take_slot(sample, source, num_reused)
                self._prefilling.append(sample)
            else:
                break
            end = min(len(sample.tokens), sample.num_cached + budget)
            if sample.copy_at is not None and sample.copy_at > sample.num_cached:
                end = min(end, sample.copy_at)
            budget -= end - sample.num_cached
            pieces.append((sample, end))
        return pieces

    def _take_slot(self, sample: Sample, source: int | None, num_reused: int) -> None:
        self._slots.take(sample, source, num_reused)
        sample.request.num_reused = max(sample.request.num_reused, num_reused)
        self.stats.reused_tokens += num_reused

    def _read(self, pieces: list[tuple[Sample, int]]) -> Tensor:
        """Let the model read each sample up to its token `end`: logits (len(pieces), V) after these."""
        inputs = []
        for sample, end in pieces:
            start, tokens = sample.num_cached, sample.tokens
            inputs.append(Piece(sample.slot, tokens[start:end], start, tokens[start - 1] if start else None))
            self.stats.prefill_tokens += end - start
            sample.num_cached = end
        hidden = self.model.read(inputs)
        begin = 0
        for (sample, _), piece in zip(pieces, inputs, strict=True):
            if sample.scores_prompt and len(sample.request.scored) < len(sample.request.prompt):
                self._score(sample.request, piece.start, hidden[begin : begin + len(piece.ids)])
            begin += len(piece.ids)
        return self.model.logits_of_last(inputs, hidden)

    def _score(self, request: Request, start: int, hidden: Tensor) -> None:
        """Add to the scored tokens of a prompt those that come after its positions from `start` on, of which the model
        has the hidden states (N, C)."""
        request.scored[:0] = [] if start else [Token(request.prompt[0])]
        followers = torch.tensor(request.prompt[start + 1 : start + 1 + len(hidden)], device=self.model.device)
        for first in range(0, len(followers), SCORED_ROWS):
            ids = followers[first : first + SCORED_ROWS]
            logits = self.model.logits(hidden[first : first + len(ids)])
            found = log_probabilities(logits, ids, request.sampling.num_logprobs or 0)
            for id_, logprob, values, likeliest in zip(ids.tolist(), *(x.tolist() for x in found), strict=True):
                request.scored.append(Token(id_, False, logprob, tuple(zip(likeliest, values, strict=True))))

    def _begin_decoding(self, sample: Sample, logits: Tensor) -> None:
        """The prompt of `sample` has been read, with `logits` (V,) after it: from now on it decodes."""
        if sample in self._prefilling:
            self._prefilling.remove(sample)
        self._slots.begin_decoding(sample.slot)
        siblings = sum(waiting.request is sample.request for waiting in self._waiting)
        if siblings:
            sample.request.logits = logits
            if siblings > self.max_rows - self.num_active:
                self._slots.keep_copy(sample.slot)  # for siblings that have to wait for a row

    def _begin_as_sibling(self, sample: Sample, events: list[Event]) -> bool:
        """Let a sample begin without reading its prompt, if another sample of the request has read it."""
        request, logits = sample.request, sample.request.logits
        if logits is None:
            return False
        if sample.index == len(request.completions) - 1:
            request.logits = None
        source = self._slots.find_whole(sample.tokens)
        if source is None:
            return False
        self._take_slot(sample, source, len(sample.tokens))
        self._begin_decoding(sample, logits)
        self._land(self._draw([sample], logits.unsqueeze(0).clone()), events)
        return True

    # --- decoding ---

    def _launch(self, before: _Drawn | None) -> _Drawn:
        """Start the decode of every sample. Tokens that the host has not read yet are taken from `before`."""
        samples = self._slots.decoding
        rows = {} if before is None else {id(sample): row for row, sample in enumerate(before.samples)}
        source = [rows.get(id(sample), -1) for sample in samples]
        newest = [0 if row >= 0 else s.tokens[s.num_cached] for s, row in zip(samples, source, strict=True)]
        previous = [sample.tokens[sample.num_cached - 1] for sample in samples]
        inputs = to_device(torch.tensor([newest, previous, source]), self.model.device)
        idx = inputs[0]
        if before is not None:
            idx = torch.where(inputs[2] >= 0, before.ids[inputs[2].clamp(min=0)], idx)
        # a sample whose last token is in flight may go one beyond the context; that draw is dropped
        positions = [min(sample.num_cached, self.context - 1) for sample in samples]
        for sample in samples:
            sample.num_cached += 1
        self.stats.decode_tokens += len(samples)
        self.stats.decode_steps += 1
        if any(sample.reweighs for sample in samples):
            return self._draw(samples, self.model.decode(idx, inputs[1], positions))
        logits, ids = self.model.decode_and_draw(idx, inputs[1], positions, self._drawing(samples))
        return self._drawn(samples, logits, ids)

    def _draw(self, samples: list[Sample], logits: Tensor) -> _Drawn:
        """Draw the next token of each sample from logits (N, V)."""
        weighed = logits
        if any(sample.reweighs for sample in samples):
            weighed = logits.clone()
            for row, sample in zip(weighed, samples, strict=True):
                reweigh_(row, sample.sampling, sample.seen, sample.counts)
        drawing = self._drawing(samples)
        return self._drawn(samples, logits, draw(weighed, to_device(drawing.columns, logits.device), drawing.kind))

    def _drawing(self, samples: list[Sample]) -> Drawing:
        """How the next token of each sample is drawn; only the tool writes the tool's answers."""
        settings = [sample.sampling for sample in samples]
        barred = self._answer if any(sampling.use_tool for sampling in settings) else ()
        return plan_draw(settings, [sample.uniform() for sample in samples], self.tokenizer.vocab_size, barred)

    def _drawn(self, samples: list[Sample], logits: Tensor, ids: Tensor) -> _Drawn:
        """Tokens `ids` (N,) drawn from the model's logits (N, V)."""
        numbers = [ids]
        for row, sample in enumerate(samples):
            if (count := sample.sampling.num_logprobs) is not None:
                numbers += [x[0] for x in log_probabilities(logits[row : row + 1], ids[row : row + 1], count)]
        has_logprobs = [sample.sampling.num_logprobs is not None for sample in samples]
        return _Drawn(list(samples), ids, Arriving(numbers), has_logprobs)

    def _land(self, drawn: _Drawn | None, events: list[Event]) -> None:
        """Read what was drawn, if anything; samples that ended are freed."""
        if drawn is None:
            return
        events += [self._accept(sample, token) for sample, token in drawn.read() if not sample.is_done]
        self._slots.free_done()

    def _accept(self, sample: Sample, token: Token) -> Event:
        """Add a drawn token to its sample, and the tool's answer if it ends a call."""
        room = min(self.context + 1 - len(sample.tokens), sample.sampling.max_tokens - len(sample.completion.tokens))
        if room and token.id in sample.request.stop_ids:
            sample.completion.finish_reason, sample.completion.end = "stop", token
            return self._event(sample, [])
        added = [token, *self._tool_answer(sample, token)][:room]
        sample.tokens += [one.id for one in added]
        sample.completion.tokens += added
        if sample.reweighs:
            sample.seen.update(one.id for one in added)
            sample.counts.update(one.id for one in added if not one.is_forced)
        if len(added) == room:
            sample.completion.finish_reason = "length"
        event = self._event(sample, added)
        if len(added) > 1 and not event.finish_reason:
            self._read_forced(sample)
        return event

    def _tool_answer(self, sample: Sample, token: Token) -> list[Token]:
        """The tool's answer, if `token` ends a call."""
        call_start, call_end = self._call
        if token.id == call_start:
            sample.call_start = len(sample.tokens) + 1
        if token.id != call_end or sample.call_start is None or not sample.sampling.use_tool:
            return []
        result = self.tool(self.tokenizer.decode(sample.tokens[sample.call_start :]))
        sample.call_start = None
        text = self.tokenizer.encode(TOOL_ERROR if result is None else result)[:MAX_TOOL_TOKENS]
        return [Token(forced, is_forced=True) for forced in (self._answer[0], *text, self._answer[1])]

    def _read_forced(self, sample: Sample) -> None:
        """Let the model read the tool's answer except for its last token, which is the next decode's input. A decode in
        flight has read the end of the call; its draw is dropped."""
        if self._flying is not None and sample in self._flying.samples:
            self._flying.samples[self._flying.samples.index(sample)] = None
        self._read([(sample, len(sample.tokens) - 1)])

    def _event(self, sample: Sample, added: list[Token]) -> Event:
        """The text of the added tokens; a stop text in it ends the sample."""
        completion, reader = sample.completion, sample.reader
        deltas = reader.add(token.id for token in added)
        if completion.finish_reason:
            deltas += reader.finish()
        if reader.is_stopped:
            completion.finish_reason = "stop"
        return Event(sample.request, sample.index, tuple(added), tuple(deltas), completion.finish_reason)


def serving_model(model: GPT, num_slots: int, weights: str) -> InferenceModel:
    """The model with the passes that suit its device; those of `gpu.py` need Triton."""
    if model.device.type == "cuda":
        try:
            from nanochat.engine.gpu import GpuModel
        except ImportError:
            logger.warning("Triton is not installed: the engine runs without its GPU kernels, many times slower")
        else:
            return GpuModel(model, num_slots, weights=weights)
    return InferenceModel(model, num_slots, weights=weights)
