"""Results of chat tasks: accuracies with confidence intervals, ChatCORE, and the files that single answers are kept in.

Not here: asking a model and judging its answers (`chat_eval.py`), tables for people.
"""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat.common import UserError, disk_errors, write_atomic

Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def centered(self, baseline: float) -> "Estimate":
        """An accuracy rescaled so that guessing, which has the accuracy `baseline`, is 0 and all right is 1."""
        return Estimate(*((end - baseline) / (1 - baseline) for end in (self.value, self.low, self.high)))


def wilson(share: float, count: int) -> Estimate:
    """An accuracy of `share` (0 to 1) over `count` problems, with Wilson's score interval (E. B. Wilson, Journal of
    the American Statistical Association 22, 1927), which stays within 0 and 1 and holds for few problems and for none
    or all solved. With several samples per problem, `share` is their mean and `count` still the number of problems:
    samples of one problem say little about others, so the interval errs on the wide side."""
    assert count > 0, count
    assert 0 <= share <= 1, share
    z2 = Z * Z / count
    center = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    # the interval contains the share itself, even where rounding would put an end next to it
    return Estimate(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates. The distances from value to end add as squares, each side of the interval by
    itself (G. Y. Zou and A. Donner, Statistics in Medicine 27, 2008). Unequal sides keep a task with nothing solved
    from counting as one without error."""
    count = len(estimates)
    mean = sum(e.value for e in estimates) / count
    below = math.sqrt(sum((e.value - e.low) ** 2 for e in estimates)) / count
    above = math.sqrt(sum((e.high - e.value) ** 2 for e in estimates)) / count
    return Estimate(mean, mean - below, mean + above)


@dataclass(frozen=True)
class Sample:
    """An answer: a letter, or the parts of a message; whether it is right; further scores of the task by name, 0 to 1;
    how a written answer ended ("stop", or "length" when it ran out of room) and its number of tokens."""

    output: str | list[dict[str, str]]
    is_correct: bool
    scores: dict[str, float] = field(default_factory=dict)
    finish_reason: str = ""
    num_tokens: int = 0


@dataclass(frozen=True)
class Item:
    """A problem by its index in the task: the prompt as the model saw it, special tokens by name; whether it was cut
    to fit; the right answer; the logits by letter (in plain text the log-likelihoods of the choices, in nats) or the
    seed of the samples; the samples; of a plain text with worked examples, how many of these there was room for."""

    index: int
    prompt: str
    is_cut: bool
    expected: str
    logits: dict[str, float] | None = None
    seed: int | None = None
    samples: tuple[Sample, ...] = ()
    num_shots: int | None = None

    @property
    def share(self) -> float:
        """The part of the samples that is right."""
        return sum(sample.is_correct for sample in self.samples) / len(self.samples)


@dataclass(frozen=True)
class TaskResult:
    """The results of a task's problems, at least one. `num_earlier` of the `items` come from an earlier run; `seconds`
    is the time of this one; `num_shots` worked examples should precede each question in plain text."""

    task: str
    baseline: float
    items: tuple[Item, ...]
    num_earlier: int
    seconds: float
    num_shots: int = 0

    @property
    def accuracy(self) -> Estimate:
        return self._mean(item.share for item in self.items)

    @property
    def centered(self) -> Estimate:
        return self.accuracy.centered(self.baseline)

    @property
    def pass_at_k(self) -> Estimate:
        """The part of the problems that at least one sample solves."""
        return self._mean(item.share > 0 for item in self.items)

    @property
    def scores(self) -> dict[str, Estimate]:
        """The mean of each further score of the task."""
        means = {}
        for name in dict.fromkeys(name for item in self.items for sample in item.samples for name in sample.scores):
            given = ([sample.scores.get(name, 0.0) for sample in item.samples] for item in self.items)
            means[name] = self._mean(sum(scores) / len(scores) for scores in given)
        return means

    @property
    def num_cut(self) -> int:
        return sum(item.is_cut for item in self.items)

    @property
    def given_shots(self) -> tuple[int, ...]:
        """The number of worked examples before each question in plain text."""
        return tuple(item.num_shots for item in self.items if item.num_shots is not None)

    @property
    def num_unfinished(self) -> int:
        """How many answers ran out of room."""
        return sum(sample.finish_reason == "length" for item in self.items for sample in item.samples)

    def _mean(self, values: Iterable[float]) -> Estimate:
        return wilson(sum(values) / len(self.items), len(self.items))


def chat_core(results: Sequence[TaskResult]) -> Estimate:
    """The mean of the tasks' centred accuracies (accuracy - baseline) / (1 - baseline)."""
    return mean_estimate([result.centered for result in results])


class ResultLog:
    """The results of one task as JSON lines: the settings they depend on, then a line for each problem.

    While a task runs, each process appends to a part file of its own, which survives when the process is killed. At
    the end one whole file, in the order of the task, replaces the parts.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as they will be read back

    def _parts(self) -> list[Path]:
        return sorted(self.path.parent.glob(f"{self.path.stem}.part*.jsonl"))

    def discard(self) -> None:
        """Delete all results."""
        for path in (self.path, *self._parts()):
            with disk_errors("new results", path):
                path.unlink(missing_ok=True)

    def recover(self) -> list[Item]:
        """The results of earlier runs on any number of processes, parts merged into one whole file. Incomplete lines
        are ignored. Raises `UserError` when the settings were others."""
        found = {item.index: item for path in (self.path, *self._parts()) for item in self._read(path)}
        if found:
            self.write_whole(found.values())
        return list(found.values())

    def _read(self, path: Path) -> list[Item]:
        # not splitlines: a text may hold other line ends, which JSON leaves as they are
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
        try:
            header = dict(json.loads(lines[0])["settings"])
        except (ValueError, KeyError, TypeError):  # nothing was written, or not to the end of the line
            return []
        for name in sorted({*self.settings, *header}):
            before, now = header.get(name), self.settings.get(name)
            if before != now:
                change = f"{path} was made with {name} {before!r}, which is {now!r} now"
                raise UserError(f"{change}; leave it as it was, or start anew without --resume")
        items = []
        for line in lines[1:]:
            try:
                value = json.loads(line)
                items.append(Item(**value | {"samples": tuple(Sample(**sample) for sample in value["samples"])}))
            except (ValueError, KeyError, TypeError):  # an incomplete line
                continue
        return items

    def appender(self, rank: int) -> Callable[[Item], None]:
        """A function that appends a result to this process's part file and returns when the system has it."""
        path = self.path.with_suffix(f".part{rank}.jsonl")
        with disk_errors("results", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_line({"settings": self.settings}), encoding="utf-8")

        def append(item: Item) -> None:
            with disk_errors("results", path), open(path, "a", encoding="utf-8") as file:
                file.write(_line(asdict(item)))

        return append

    def write_whole(self, items: Iterable[Item]) -> None:
        """Write all results to one file and delete the parts."""
        ordered = sorted(items, key=lambda item: item.index)
        write_atomic(self.path, "".join(map(_line, [{"settings": self.settings}, *map(asdict, ordered)])))
        for path in self._parts():
            path.unlink(missing_ok=True)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
