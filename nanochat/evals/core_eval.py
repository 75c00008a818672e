"""CORE: the mean centred accuracy over the 22 in-context tasks of DCLM (arXiv 2406.11794), scored without sampling.

Three kinds of task, all asked with worked examples ("shots") of the same task in front:
- multiple choice: one question, several answers; the answer with the lowest mean loss per token wins;
- schema: several beginnings, one ending; the beginning that makes the ending likeliest per token wins;
- language modelling: right when greedy decoding would give every token of the answer.
Centred accuracy is (accuracy - baseline) / (1 - baseline), 0 for guessing and 1 for all right.

Here: prompts and scored spans, the fast scoring path and the plain one it is checked against, the sums over ranks and
tasks. Not here: the bundle of tasks (`core_bundle.py`), flags, printing, files of results.
"""

import functools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import UserError
from nanochat.evals.core_bundle import OPTIONS_FIELD, Task, read_tasks
from nanochat.evals.scoring import Tree, batches_by_length, default_batch_tokens, hidden_at, plant, token_losses
from nanochat.model.gpt import GPT

SHOT_SEED = 1234  # of the published CORE tables of nanochat runs; another one draws other shots
SHOT_SEPARATOR = "\n\n"
ENCODE_EXAMPLES = 256  # tokenised together: enough for all threads, little enough to be held as Python lists


# --- prompts and scored spans --------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    """A tokenised example: one row for each option, of which the tokens from `starts` to the end are scored.

    rows: 1-D int32 arrays beginning with the beginning-of-sequence token, for language modelling a single one;
    starts: at least 1, below the row's length; num_cut: tokens cut from the longest row.
    """

    rows: tuple[np.ndarray, ...]
    starts: tuple[int, ...]
    num_cut: int


def build_examples(task: Task, tokenizer, indices: Sequence[int], max_row_tokens: int) -> tuple[Example, ...]:
    """The examples of `task` at `indices` (places in `task.records`), no row longer than `max_row_tokens`."""
    examples = []
    for first in range(0, len(indices), ENCODE_EXAMPLES):
        part = indices[first : first + ENCODE_EXAMPLES]
        prompts = [build_prompts(task, index) for index in part]
        encoded = iter(tokenizer.encode_batch([text for texts in prompts for text in texts]))
        for texts in prompts:
            rows = [[tokenizer.bos_id, *next(encoded)] for _ in texts]
            examples.append(_build_example(task.kind, rows, max_row_tokens))
    return tuple(examples)


def build_prompts(task: Task, index: int) -> list[str]:
    """The texts of one example, shots in front: one for each option, or for language modelling the prompt without
    its answer and with it."""
    record, d = task.records[index], task.delimiter
    if task.kind == "multiple_choice":
        texts = [record["query"] + d + choice for choice in record["choices"]]
    elif task.kind == "schema":
        texts = [option + d + record["continuation"] for option in record["context_options"]]
    else:
        # The space of the delimiter belongs to the answer's first token, so the prompt alone goes without it.
        asked = record["context"].strip() + d
        texts = [asked.rstrip(), asked + record["continuation"]]
    shots = "".join(_answered(task, task.records[shot]) + SHOT_SEPARATOR for shot in draw_shots(task, index))
    return [shots + text for text in texts]


def draw_shots(task: Task, index: int) -> list[int]:
    """Which other records stand in front of record `index`: always the same, all of them where there are too few."""
    others = len(task.records) - 1
    drawn = random.Random(SHOT_SEED + index).sample(range(others), min(task.num_shots, others))
    return [shot + (shot >= index) for shot in drawn]


def _answered(task: Task, record: dict) -> str:
    if task.kind == "multiple_choice":
        return record["query"] + task.delimiter + record["choices"][record["gold"]]
    if task.kind == "schema":
        return record["context_options"][record["gold"]] + task.delimiter + record["continuation"]
    return record["context"].strip() + task.delimiter + record["continuation"]


def _build_example(kind: str, rows: list[list[int]], max_row_tokens: int) -> Example:
    starts = span_starts(kind, rows)
    if kind == "language_modeling":
        rows, starts = rows[1:], starts[1:]
    num_cut = max(0, max(map(len, rows)) - max_row_tokens)
    cut = [cut_row(row, start, num_cut, max_row_tokens) for row, start in zip(rows, starts, strict=True)]
    arrays = tuple(np.array(row, dtype=np.int32) for row, _ in cut)
    return Example(arrays, tuple(start for _, start in cut), num_cut)


def span_starts(kind: str, rows: list[list[int]]) -> list[int]:
    """Where the scored span of each row begins; it goes on to the row's end and is never empty.

    Multiple choice: behind what all rows begin with. Schema: where what all rows end with begins. Language modelling,
    with the prompt's row and the whole one: behind what both begin with, for the whole one. At least the last token
    is scored, also where one row is the beginning or the end of another or all are equal, and never the first token,
    which nothing predicts.
    """
    shortest = min(map(len, rows))
    backwards = kind == "schema"
    sides = [row[::-1] for row in rows] if backwards else rows
    # what the first and the last of them in sorted order have in common, all others have too
    pairs = zip(min(sides), max(sides), strict=False)
    common = next((t for t, (one, other) in enumerate(pairs) if one != other), shortest)
    if backwards:
        return [len(row) - max(1, min(common, shortest - 1)) for row in rows]
    if kind == "language_modeling":
        shortest = len(rows[-1])
    return [max(1, min(common, shortest - 1))] * len(rows)


def cut_row(row: list[int], start: int, num_cut: int, max_row_tokens: int) -> tuple[list[int], int]:
    """A row and its span's start after the tokens behind the first one lost `num_cut`, what the longest row of the
    example has too many: so all options keep the same context. Less is cut where that would reach into the span;
    a span that is too long by itself loses its beginning."""
    drop = max(min(num_cut, start - 1), len(row) - max_row_tokens)
    return row[:1] + row[1 + drop :], max(1, start - drop)


# --- scoring -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Score:
    """What a model makes of an example: mean loss per scored token of each option, and whether the last option
    (for language modelling the only one) is what greedy decoding gives."""

    nats: tuple[float, ...]
    is_greedy: bool


@torch.no_grad()
def score_plainly(model, examples: Sequence[Example]) -> list[Score]:
    """One option at a time, all logits: slow and easy to believe. `score_batched` must agree with it."""
    scores = []
    for example in examples:
        nats, is_greedy = [], False
        for row, start in zip(example.rows, example.starts, strict=True):
            tokens = torch.tensor(row.tolist(), device=model.device)
            log_probs = torch.log_softmax(model(tokens[None, :-1])[0], dim=-1)  # (T - 1, V)
            losses = [-log_probs[t - 1, tokens[t]].item() for t in range(start, len(row))]
            nats.append(sum(losses) / len(losses))
            is_greedy = all(log_probs[t - 1].argmax() == tokens[t] for t in range(start, len(row)))
        scores.append(Score(tuple(nats), is_greedy))
    return scores


@torch.no_grad()
def score_batched(model, examples: Sequence[Example], batch_tokens: int = 0) -> list[Score]:
    """All options in batches of at most `batch_tokens` (0: what suits the device), rows of like length together.

    The options of an example share what they begin with (`scoring.py`), where the model can; an option whose input
    begins another one's never costs anything; the vocabulary head runs only where a token is scored.
    """
    if not examples:  # a rank beyond the number of examples
        return []
    trees, spans = _plant_examples(examples, shared=isinstance(model, GPT))
    batches = batches_by_length(list(map(len, trees)), batch_tokens or default_batch_tokens(model.device))
    parts = [_score_batch(model, [trees[i] for i in batch], [spans[i] for i in batch]) for batch in batches]
    slots = np.concatenate([slots for slots, _ in parts])  # of every scored token
    losses, misses = torch.cat([part for _, part in parts], dim=1).cpu().double().numpy()
    nats = (np.bincount(slots, losses) / np.bincount(slots)).tolist()
    hits = (np.bincount(slots, misses) == 0).tolist()
    ends = np.cumsum([len(example.rows) for example in examples]).tolist()
    return [Score(tuple(nats[end - len(e.rows) : end]), hits[end - 1]) for end, e in zip(ends, examples, strict=True)]


def _plant_examples(examples: Sequence[Example], *, shared: bool) -> tuple[list[Tree], list[list[np.ndarray]]]:
    """Trees that hold the options of all examples, and for each tree what is scored on it: for each option (3, N) of
    its slot (its number among the options of all examples), the places that predict its tokens, and these tokens."""
    trees, spans, num_slots = [], [], 0
    for example in examples:
        # the last token of a row is only predicted, never read
        own, found = plant([row[:-1] for row in example.rows], shared=shared)
        own_spans: list[list[np.ndarray]] = [[] for _ in own]
        for (tree, places), start, row in zip(found, example.starts, example.rows, strict=True):
            targets = row[start:]
            own_spans[tree].append(np.stack([np.full_like(targets, num_slots), places[start - 1 :], targets]))
            num_slots += 1
        trees += own
        spans += own_spans
    return trees, spans


def _score_batch(model, trees: list[Tree], spans: list[list[np.ndarray]]) -> tuple[np.ndarray, Tensor]:
    """The slots (N,) of all scored tokens of a batch, and, (2, N) float32 still on the device, their losses and
    whether another token was likelier."""
    slots, places, targets = np.concatenate([span for own in spans for span in own], axis=1, dtype=np.int64)
    rows = np.repeat(np.arange(len(trees)), [sum(span.shape[1] for span in own) for own in spans])
    hidden = hidden_at(model, trees, rows, places)  # (N, C)
    losses, is_best = token_losses(model, hidden, torch.from_numpy(targets).to(model.device))
    return slots, torch.stack([losses, (~is_best).float()])


# --- CORE ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ItemResult:
    """One example: its line in the task's file, the option chosen, whether that was right, the mean loss of each."""

    line: int
    prediction: int
    is_correct: bool
    nats: tuple[float, ...]


@dataclass(frozen=True)
class TaskResult:
    """One task: `accuracy`, `baseline` from 0 to 1; `num_cut` examples did not fit the context and were cut."""

    label: str
    kind: str
    num_shots: int
    accuracy: float
    baseline: float
    num_cut: int
    seconds: float
    items: tuple[ItemResult, ...]

    @property
    def centered(self) -> float:
        return (self.accuracy - self.baseline) / (1 - self.baseline)


@dataclass(frozen=True)
class CoreResult:
    """All tasks, and `core`, the mean of their centred accuracies."""

    tasks: tuple[TaskResult, ...]
    core: float
    seconds: float


def evaluate_core(
    model,
    tokenizer,
    bundle: Path,
    *,
    max_per_task: int = 0,
    batch_tokens: int = 0,
    slow: bool = False,
    progress: Callable[[TaskResult], None] | None = None,
) -> CoreResult:
    """CORE of `model` on the tasks of the folder `bundle`, as `fetch_bundle` returns it.

    model: has `device`, `config.sequence_len`, `config.vocab_size`, `hidden`, `logits` and `__call__` as `GPT` has;
    tokenizer: has `bos_id` and `encode_batch`. `max_per_task` examples of each task at most, 0 for all: always the
    same ones, asked with the same shots as in a whole run. With a process group every rank must call this; each
    scores its share, all get the result. `slow` takes the plain path. `progress` is called after each task.

    Raises `UserError` for a bundle that is not in order and for scores that are not numbers.
    """
    begin = time.perf_counter()
    results = []
    for task in read_tasks(bundle):
        results.append(_evaluate_task(model, tokenizer, task, max_per_task, batch_tokens, slow))
        if progress is not None:
            progress(results[-1])
    core = sum(result.centered for result in results) / len(results)
    return CoreResult(tuple(results), core, time.perf_counter() - begin)


def _evaluate_task(model, tokenizer, task: Task, max_per_task: int, batch_tokens: int, slow: bool) -> TaskResult:
    begin = time.perf_counter()
    count = min(max_per_task or len(task.records), len(task.records))
    rank, world_size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    mine = range(rank, count, world_size)
    # the last token of a row is only predicted, never read: a row may be one longer than the context
    examples = _cached_examples(task, tokenizer, mine, model.config.sequence_len + 1)
    scores = score_plainly(model, examples) if slow else score_batched(model, examples, batch_tokens)
    gathered, num_cut = _gather(task, count, mine, scores, examples, model.device)
    items = tuple(_judge(task, index, score) for index, score in enumerate(gathered))
    accuracy = sum(item.is_correct for item in items) / count
    seconds = time.perf_counter() - begin
    return TaskResult(task.label, task.kind, task.num_shots, accuracy, task.baseline, num_cut, seconds, items)


@functools.lru_cache(maxsize=64)
def _cached_examples(task: Task, tokenizer, indices: range, max_row_tokens: int) -> tuple[Example, ...]:
    """`build_examples`, done once for the evaluations of one training run."""
    return build_examples(task, tokenizer, indices, max_row_tokens)


def _gather(
    task: Task, count: int, mine: range, scores: list[Score], examples: Sequence[Example], device: torch.device
) -> tuple[list[Score], int]:
    """The scores of examples 0 to `count` - 1 from all ranks, in order, and how many of them were cut."""
    widths = [_num_options(task, index) for index in range(count)]
    table = torch.zeros(count, max(widths) + 2, dtype=torch.float64)
    for index, score, example in zip(mine, scores, examples, strict=True):
        row = [*score.nats, float(score.is_greedy), float(example.num_cut > 0)]
        table[index, : widths[index]] = torch.tensor(row[:-2], dtype=torch.float64)
        table[index, -2:] = torch.tensor(row[-2:], dtype=torch.float64)
    if dist.is_initialized():
        table = table.to(device)
        dist.all_reduce(table)
    rows = table.tolist()
    gathered = [Score(tuple(row[:width]), row[-2] == 1) for row, width in zip(rows, widths, strict=True)]
    return gathered, sum(row[-1] == 1 for row in rows)


def _num_options(task: Task, index: int) -> int:
    return 1 if task.kind == "language_modeling" else len(task.records[index][OPTIONS_FIELD[task.kind]])


def _judge(task: Task, index: int, score: Score) -> ItemResult:
    """The option with the lowest loss, the first of them in a tie. Raises `UserError` when a loss is NaN: a broken
    model must not win by comparisons that are all false."""
    line = task.lines[index]
    if any(map(math.isnan, score.nats)):
        raise UserError(f"task {task.label}, line {line}: the losses are {score.nats}; the model's weights are broken")
    if task.kind == "language_modeling":
        return ItemResult(line, int(score.is_greedy), score.is_greedy, score.nats)
    prediction = score.nats.index(min(score.nats))
    return ItemResult(line, prediction, prediction == task.records[index]["gold"], score.nats)
