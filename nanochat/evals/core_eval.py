"""CORE: the mean centred accuracy over the 22 in-context tasks of DCLM (arXiv 2406.11794), scored without sampling.

There are three kinds of task; every question is preceded by worked examples ("shots") of the same task:
- multiple choice: one question, several answers; the answer with the lowest mean loss per token wins;
- schema: several beginnings, one ending; the beginning after which the ending has the lowest mean loss wins;
- language modelling: right when greedy decoding would produce every token of the answer.
Centred accuracy is (accuracy - baseline) / (1 - baseline): 0 for guessing, 1 for all right.

Not here: the bundle of tasks (`core_bundle.py`), flags, printing, result files.
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

from nanochat.common import UserError
from nanochat.evals import scoring
from nanochat.evals.core_bundle import Task, read_tasks
from nanochat.model.gpt import GPT

SHOT_SEED = 1234  # that of the published CORE tables of nanochat runs; another one draws other shots
SHOT_SEPARATOR = "\n\n"
ENCODE_EXAMPLES = 256  # tokenised together: enough for all threads, few enough to hold as Python lists


@dataclass(frozen=True)
class Example:
    """A tokenised example: a row for each option, whose tokens from `starts` to the end are scored.

    rows: 1-D int32 arrays that begin with the beginning-of-sequence token, a single one for language modelling;
    starts: at least 1, below the row's length; num_cut: tokens cut from the longest row.
    """

    rows: tuple[np.ndarray, ...]
    starts: tuple[int, ...]
    num_cut: int


@functools.lru_cache(maxsize=64)  # done once for all evaluations of a training run
def build_examples(task: Task, tokenizer, indices: range, max_row_tokens: int) -> tuple[Example, ...]:
    """The examples of `task` at `indices` (into `task.records`), no row longer than `max_row_tokens`."""
    examples = []
    for first in range(0, len(indices), ENCODE_EXAMPLES):
        prompts = [build_prompts(task, index) for index in indices[first : first + ENCODE_EXAMPLES]]
        encoded = iter(tokenizer.encode_batch([text for texts in prompts for text in texts]))
        for texts in prompts:
            rows = [[tokenizer.bos_id, *next(encoded)] for _ in texts]
            starts = span_starts(task.kind, rows)
            if task.kind == "language_modeling":
                rows, starts = rows[1:], starts[1:]
            num_cut = max(0, max(map(len, rows)) - max_row_tokens)
            cut = [cut_row(row, start, num_cut, max_row_tokens) for row, start in zip(rows, starts, strict=True)]
            rows, starts = zip(*cut, strict=True)
            examples.append(Example(tuple(np.array(row, dtype=np.int32) for row in rows), starts, num_cut))
    return tuple(examples)


def build_prompts(task: Task, index: int) -> list[str]:
    """The texts of one example, shots in front: one for each option, or for language modelling the prompt without
    its answer and with it."""
    shots = [task.records[shot] for shot in draw_shots(task, index)]
    is_text = task.kind == "language_modeling"
    answered = [_texts(task, shot)[-1 if is_text else shot["gold"]] for shot in shots]
    return [SHOT_SEPARATOR.join([*answered, text]) for text in _texts(task, task.records[index])]


def _texts(task: Task, record: dict) -> list[str]:
    if task.kind == "multiple_choice":
        return [record["query"] + task.delimiter + choice for choice in record["choices"]]
    if task.kind == "schema":
        return [option + task.delimiter + record["continuation"] for option in record["context_options"]]
    # The space of the delimiter belongs to the answer's first token, so the prompt alone goes without it.
    asked = record["context"].strip() + task.delimiter
    return [asked.rstrip(), asked + record["continuation"]]


def draw_shots(task: Task, index: int) -> list[int]:
    """Which other records precede record `index`: always the same, all of them when there are too few."""
    others = len(task.records) - 1
    drawn = random.Random(SHOT_SEED + index).sample(range(others), min(task.num_shots, others))
    return [shot + (shot >= index) for shot in drawn]


def span_starts(kind: str, rows: list[list[int]]) -> list[int]:
    """Where the scored span of each row begins; it reaches to the row's end and is never empty.

    Multiple choice: after the tokens that all rows begin with. Schema: at the tokens that all rows end with. Language
    modelling (rows: the prompt, then the prompt with its answer): after what both begin with. The last token is always
    scored, even where one row is the beginning or the end of another or all rows are equal; the first token, which
    nothing predicts, never is.
    """
    sides = [row[::-1] for row in rows] if kind == "schema" else rows
    # what the first and the last row in sorted order have in common, all rows have
    pairs = zip(min(sides), max(sides), strict=False)
    shortest = min(map(len, rows))
    common = next((t for t, (one, other) in enumerate(pairs) if one != other), shortest)
    length = len(rows[-1]) if kind == "language_modeling" else shortest
    common = max(1, min(common, length - 1))
    return [len(row) - common if kind == "schema" else common for row in rows]


def cut_row(row: list[int], start: int, num_cut: int, max_row_tokens: int) -> tuple[list[int], int]:
    """`row` and the start of its span after `num_cut` tokens behind the first one are dropped: as many as the example's
    longest row is too long, so that all options keep the same context. Less is dropped where it would reach into the
    span; a span that is too long by itself loses its beginning."""
    drop = max(min(num_cut, start - 1), len(row) - max_row_tokens)
    return row[:1] + row[1 + drop :], max(1, start - drop)


@dataclass(frozen=True)
class Score:
    """A model's mean loss per scored token of each option, and whether greedy decoding would produce the last option
    (for language modelling the only one)."""

    nats: tuple[float, ...]
    is_greedy: bool


@torch.no_grad()
def score_plainly(model, examples: Sequence[Example]) -> list[Score]:
    """One option at a time, all logits: slow and simple, the reference for `score_batched`."""
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
    """All options in batches of at most `batch_tokens` (0: what suits the device), rows of like length together. The
    options of an example share their common beginning where the model can; only scored tokens need logits."""
    if not examples:  # on a rank beyond the number of examples
        return []
    trees: list[scoring.Tree] = []
    spans: list[list[np.ndarray]] = []  # by tree, of each option in it (3, N): its number, places, tokens they predict
    num_options = 0
    for example in examples:
        # the last token of a row is only predicted, never read
        own, found = scoring.plant([row[:-1] for row in example.rows], shared=isinstance(model, GPT))
        spans += [[] for _ in own]
        for (tree, places), start, row in zip(found, example.starts, example.rows, strict=True):
            numbers = np.full(len(row) - start, num_options)
            spans[len(trees) + tree].append(np.stack([numbers, places[start - 1 :], row[start:]]))
            num_options += 1
        trees += own

    parts = []
    batch_tokens = batch_tokens or scoring.default_batch_tokens(model.device)
    for batch in scoring.batches_by_length(list(map(len, trees)), batch_tokens):
        scored = [np.concatenate(spans[i], axis=1) for i in batch]
        rows = np.repeat(np.arange(len(batch)), [span.shape[1] for span in scored])
        numbers, places, targets = np.concatenate(scored, axis=1)
        hidden = scoring.hidden_at(model, [trees[i] for i in batch], rows, places)  # (N, C)
        losses, is_best = scoring.token_losses(model, hidden, torch.from_numpy(targets).to(model.device))
        parts.append((numbers, torch.stack([losses, (~is_best).float()])))
    numbers = np.concatenate([numbers for numbers, _ in parts])
    losses, misses = torch.cat([part for _, part in parts], dim=1).cpu().double().numpy()
    nats = (np.bincount(numbers, losses) / np.bincount(numbers)).tolist()
    hits = (np.bincount(numbers, misses) == 0).tolist()
    ends = np.cumsum([len(example.rows) for example in examples]).tolist()
    return [Score(tuple(nats[end - len(e.rows) : end]), hits[end - 1]) for end, e in zip(ends, examples, strict=True)]


@dataclass(frozen=True)
class ItemResult:
    """One example: its line in the task's file, the option chosen, whether it was right, the mean loss of each."""

    line: int
    prediction: int
    is_correct: bool
    nats: tuple[float, ...]


@dataclass(frozen=True)
class TaskResult:
    """One task: `accuracy` and `baseline` from 0 to 1; `num_cut` examples had to be cut to fit the context."""

    label: str
    num_shots: int
    baseline: float
    num_cut: int
    seconds: float
    items: tuple[ItemResult, ...]

    @property
    def accuracy(self) -> float:
        return sum(item.is_correct for item in self.items) / len(self.items)

    @property
    def centered(self) -> float:
        return (self.accuracy - self.baseline) / (1 - self.baseline)


@dataclass(frozen=True)
class CoreResult:
    """All tasks, and `core`, the mean of their centred accuracies."""

    tasks: tuple[TaskResult, ...]
    core: float
    seconds: float

    @property
    def accuracy(self) -> float:
        """The mean of the tasks' accuracies."""
        return sum(task.accuracy for task in self.tasks) / len(self.tasks)

    @property
    def baseline(self) -> float:
        """What guessing would give for `accuracy`; for `core` it gives 0."""
        return sum(task.baseline for task in self.tasks) / len(self.tasks)


def evaluate_core(
    model, tokenizer, bundle: Path, *, max_per_task: int = 0, batch_tokens: int = 0, slow: bool = False,
    progress: Callable[[TaskResult], object] = lambda task: None,
) -> CoreResult:  # fmt: skip
    """CORE of `model` on the tasks of `bundle`, as `fetch_bundle` returns it.

    model: a `GPT` or what `scoring.py` takes for one; tokenizer: has `bos_id` and `encode_batch`. `max_per_task` limits
    the examples of each task (0: all), always the same ones with the same shots. `batch_tokens` 0 is what suits the
    device; `slow` takes the plain path. `progress` is called after each task. With a process group every rank must call
    this; each scores its share, all get the result. Raises `UserError` for a malformed bundle and for NaN losses.
    """
    begin = time.perf_counter()
    rank, world_size = scoring.rank_and_world_size()
    results = []
    for task in read_tasks(bundle):
        task_begin = time.perf_counter()
        mine = range(len(task.records))[: max_per_task or None][rank::world_size]
        # the last token of a row is only predicted, never read: a row may be one longer than the context
        examples = build_examples(task, tokenizer, mine, model.config.sequence_len + 1)
        scores = score_plainly(model, examples) if slow else score_batched(model, examples, batch_tokens)
        own = [(index, score, one.num_cut > 0) for index, score, one in zip(mine, scores, examples, strict=True)]
        gathered = sorted(scoring.gather_from_ranks(own), key=lambda one: one[0])
        items = tuple(_judge(task, index, score) for index, score, _ in gathered)
        num_cut = sum(is_cut for _, _, is_cut in gathered)
        seconds = time.perf_counter() - task_begin
        results.append(TaskResult(task.label, task.num_shots, task.baseline, num_cut, seconds, items))
        progress(results[-1])
    core = sum(result.centered for result in results) / len(results)
    return CoreResult(tuple(results), core, time.perf_counter() - begin)


def _judge(task: Task, index: int, score: Score) -> ItemResult:
    """The option with the lowest loss, the first one in a tie. Raises `UserError` when a loss is NaN: no comparison
    with NaN is true, so a broken model would win."""
    line = task.lines[index]
    if any(map(math.isnan, score.nats)):
        raise UserError(f"task {task.label}, line {line}: the losses are {score.nats}; the model's weights are broken")
    if task.kind == "language_modeling":
        return ItemResult(line, int(score.is_greedy), score.is_greedy, score.nats)
    prediction = score.nats.index(min(score.nats))
    return ItemResult(line, prediction, prediction == task.records[index]["gold"], score.nats)
