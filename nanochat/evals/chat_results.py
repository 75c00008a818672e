"""Results of chat tasks: accuracies with confidence intervals, ChatCORE, single answers and the files they are kept in.

Not here: asking a model and judging what it says (`chat_eval.py`), tables for people.
"""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from nanochat.common import UserError, disk_errors, write_atomic

Z = 1.959964  # 95 % of a normal distribution lie within so many standard deviations


# --- estimates -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Estimate:
    """A value with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def centered(self, baseline: float) -> "Estimate":
        """An accuracy on the scale where guessing, which has the accuracy `baseline`, is 0 and all right is 1."""
        return Estimate(*((end - baseline) / (1 - baseline) for end in (self.value, self.low, self.high)))


def wilson(share: float, count: int) -> Estimate:
    """An accuracy of `share` (0 to 1) over `count` problems, with Wilson's score interval (E. B. Wilson, Journal of
    the American Statistical Association 22, 1927), which stays within 0 and 1 and is right for few problems and for
    none or all solved. Where problems have several samples, `share` is the mean and `count` still the problems: the
    interval is then too wide rather than too narrow, as samples of one problem tell little about others."""
    assert count > 0, count
    assert 0 <= share <= 1, share
    z2 = Z * Z / count
    center = (share + z2 / 2) / (1 + z2)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count)) / (1 + z2)
    # the interval holds the share itself, also where rounding would put an end next to it
    return Estimate(share, min(share, max(0.0, center - half)), max(share, min(1.0, center + half)))


def mean_estimate(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of independent estimates. Each side of its interval comes from that side of theirs, the distances from
    the values adding as squares (G. Y. Zou and A. Donner, Statistics in Medicine 27, 2008): plain propagation of
    errors, but with unequal sides, so that a task with nothing solved is not taken for one without error."""
    count = len(estimates)
    mean = sum(e.value for e in estimates) / count
    below, above = (
        math.sqrt(sum(d * d for d in side)) / count for side in zip(*map(_distances, estimates), strict=True)
    )
    return Estimate(mean, mean - below, mean + above)


def _distances(estimate: Estimate) -> tuple[float, float]:
    return estimate.value - estimate.low, estimate.high - estimate.value


# --- results -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """An answer: a letter, or the parts of a message; whether it is right; further scores of the task by name, 0 to 1;
    how a written answer ended ("stop", or "length" where there was no room for more) and its number of tokens."""

    output: str | list[dict[str, str]]
    is_correct: bool
    scores: dict[str, float] = field(default_factory=dict)
    finish_reason: str = ""
    num_tokens: int = 0


@dataclass(frozen=True)
class Item:
    """A problem by its place in the task: the prompt as the model saw it, special tokens by name; whether something
    had to be cut from it; what a right answer says; the logits by letter or the seed of the samples; the samples."""

    index: int
    prompt: str
    is_cut: bool
    expected: str
    logits: dict[str, float] | None
    seed: int | None
    samples: tuple[Sample, ...]

    @property
    def share(self) -> float:
        """The part of the samples that is right."""
        return sum(sample.is_correct for sample in self.samples) / len(self.samples)


@dataclass(frozen=True)
class TaskResult:
    """A task: accuracy as it is and centred, the mean of each further score, the part of the problems that at least
    one sample solves, how many prompts were cut and answers not brought to an end, how many of the `items` are of an
    earlier run, and the seconds of this one."""

    task: str
    kind: str
    baseline: float
    accuracy: Estimate
    centered: Estimate
    scores: dict[str, Estimate]
    pass_at_k: Estimate
    num_cut: int
    num_unfinished: int
    num_earlier: int
    seconds: float
    items: tuple[Item, ...]


def chat_core(results: Sequence[TaskResult]) -> Estimate:
    """The mean of the tasks' centred accuracies (accuracy - baseline) / (1 - baseline)."""
    return mean_estimate([result.centered for result in results])


def summed(task, items: Sequence[Item], num_earlier: int, seconds: float) -> TaskResult:
    """The result of `task` from those of its problems, of which there is at least one."""
    count = len(items)
    accuracy = wilson(sum(item.share for item in items) / count, count)
    names = dict.fromkeys(name for item in items for sample in item.samples for name in sample.scores)
    return TaskResult(
        task=task.name,
        kind=task.kind,
        baseline=task.baseline,
        accuracy=accuracy,
        centered=accuracy.centered(task.baseline),
        scores={name: wilson(sum(_mean_score(item, name) for item in items) / count, count) for name in names},
        pass_at_k=wilson(sum(item.share > 0 for item in items) / count, count),
        num_cut=sum(item.is_cut for item in items),
        num_unfinished=sum(sample.finish_reason == "length" for item in items for sample in item.samples),
        num_earlier=num_earlier,
        seconds=seconds,
        items=tuple(items),
    )


def _mean_score(item: Item, name: str) -> float:
    return sum(sample.scores.get(name, 0.0) for sample in item.samples) / len(item.samples)


# --- results on the disk -------------------------------------------------------------------------


class ResultLog:
    """The results of one task as JSON lines: what they depend on, then a line for each problem.

    While a task runs, each process appends to a part of its own, which a process that is killed leaves behind; at the
    end the whole file, in the order of the task, takes their place. `settings` are what the results depend on.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]):
        self.path = path
        self.settings = json.loads(json.dumps(settings))  # as they will be read back

    def _part(self, rank: int) -> Path:
        return self.path.with_suffix(f".part{rank}.jsonl")

    def _parts(self) -> list[Path]:
        name = re.compile(rf"{re.escape(self.path.stem)}\.part[0-9]+\.jsonl")
        return sorted(path for path in self.path.parent.glob("*.jsonl") if name.fullmatch(path.name))

    def discard(self) -> None:
        """Forget all results."""
        for path in (self.path, *self._parts()):
            with disk_errors("new results", path):
                path.unlink(missing_ok=True)

    def recover(self) -> list[Item]:
        """The results of earlier runs, whatever number of processes they had; parts become one whole file.

        Lines that are not whole count for nothing. Raises `UserError` where the settings were others.
        """
        found = {item.index: item for path in (self.path, *self._parts()) for item in self._read(path)}
        if found:
            self.write_whole(list(found.values()))
        return list(found.values())

    def _read(self, path: Path) -> Iterator[Item]:
        # not splitlines: a text may hold other ends of line, which JSON writes as they are
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
        header = _parsed(lines[0]).get("settings") if lines else None
        if not isinstance(header, dict):
            return
        for name in sorted({*self.settings, *header}):
            before, now = header.get(name), self.settings.get(name)
            if before != now:
                raise UserError(
                    f"{path} was made with {name} {before!r}, which is {now!r} now; "
                    f"leave it as it was, or start anew without --resume"
                )
        yield from filter(None, map(_item_of, lines[1:]))

    def appender(self, rank: int) -> Callable[[Item], None]:
        """A function that appends a result to this process's part: it is with the system when it returns."""
        path = self._part(rank)
        with disk_errors("results", path):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(_line({"settings": self.settings}), encoding="utf-8")

        def append(item: Item) -> None:
            with disk_errors("results", path), open(path, "a", encoding="utf-8") as file:
                file.write(_line(asdict(item)))

        return append

    def write_whole(self, items: Iterable[Item]) -> None:
        """All results in one file; the parts go."""
        ordered = sorted(items, key=lambda item: item.index)
        write_atomic(self.path, "".join([_line({"settings": self.settings}), *(_line(asdict(i)) for i in ordered)]))
        for path in self._parts():
            path.unlink(missing_ok=True)


def _line(value: Mapping[str, Any]) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _parsed(line: str) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def _item_of(line: str) -> Item | None:
    """The result that a line holds, None where it is not whole."""
    value = _parsed(line)
    try:
        return Item(**{**value, "samples": tuple(Sample(**sample) for sample in value["samples"])})
    except (KeyError, TypeError):
        return None
