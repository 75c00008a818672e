"""The report's pictures, drawn from the `metrics.jsonl` of the runs as PNG files.

A picture has a name, which is its file's; `Pictures` collects them while the Markdown that shows them is rendered.
"""

import contextlib
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from nanochat.common import base_dir
from nanochat.records import PICTURES, STAGES, Record
from nanochat.report.tables import escape, format_value

CURVES = {  # key in metrics.jsonl: (title, y axis label with unit, whether the y axis starts at 0)
    "train_loss": ("training loss", "nats per token", False),
    "val_bpb": ("validation", "bits per byte", False),
    "core": ("CORE", "centred accuracy", False),
    "reward": ("reward in training", "mean of a step's replies", True),
    "val_reward": ("reward on held-out questions", "mean", True),
    "tokens_per_second": ("throughput", "tokens per second", True),
}
MAX_POINTS = 300  # longer runs are drawn as means of several steps: no visible loss, and pictures of 30 to 80 KB
BLUE, ORANGE = "#1f5a99", "#c4581a"
Points = Sequence[tuple[int, float]]


class Pictures(dict[str, bytes]):
    """PNG files by name. The methods add what they draw, and return the Markdown that shows it, or says why not."""

    def curves(self, record: Record) -> list[str]:
        """A picture for each curve of a stage."""
        if record.metrics_path is None:
            return []
        path = base_dir() / record.metrics_path
        if not path.exists():
            return [f"No curves: {escape(path.name)} of this run is gone."]
        found = {key: points for key, points in read_curves(path).items() if len(points) > 1}
        stem = f"{record.stage}-{record.model}"
        shown = [
            self._add(f"{stem}-{key}", f"{CURVES[key][0]}, {CURVES[key][1]}, by step", draw_curve, key, points)
            for key, points in found.items()
        ]
        return list(dict.fromkeys(shown)) or ["No curves: too few steps."]

    def loss(self, stages: Sequence[Record]) -> list[str]:
        """The loss of pretraining, and that of the stages after it that learn from conversations."""
        found = {}
        for record in stages:
            path = base_dir() / (record.metrics_path or "")
            if record.stage != "chat_rl" and path.is_file():
                found[record.stage] = read_curves(path)
        shown = []
        base = found.pop("base_train", {})
        if len(base.get("train_loss", ())) > 1:
            shown.append(self._add("loss", "loss of pretraining by step", draw_pretraining, base))
        chat = {STAGES[stage][0].lower(): curves.get("train_loss", []) for stage, curves in found.items()}
        if any(len(points) > 1 for points in chat.values()):
            shown.append(self._add("chat-loss", "loss of the chat stages by step", draw_chat_loss, chat))
        return list(dict.fromkeys(shown))

    def _add(self, name: str, words: str, draw, *args) -> str:
        file = f"{name.replace('_', '-')}.png"
        try:
            self[file] = draw(*args)
        except ImportError:
            return "No curves: matplotlib is not installed."
        return f"![{words}]({PICTURES}/{file})"


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) points of each of `CURVES` in a `metrics.jsonl`; the last value of a step counts."""
    curves: dict[str, dict[int, float]] = {key: {} for key in CURVES}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # an incomplete line
            metrics = json.loads(line)
            for key, values in curves.items():
                if key in metrics and math.isfinite(metrics[key]):
                    values[int(metrics["step"])] = float(metrics[key])
    return {key: sorted(values.items()) for key, values in curves.items() if values}


def draw_curve(key: str, points: Points) -> bytes:
    """The curve `CURVES[key]` as a PNG. Raises `ImportError` if matplotlib is missing, as all here do."""
    title, label, from_zero = CURVES[key]
    figure, axes = _figure()
    every = _plot(axes, points, color=BLUE)
    axes.set(xlabel=f"step (each point the mean of {every})" if every > 1 else "step", ylabel=label)
    axes.set_title(f"{title}: {format_value(points[-1][1])} at step {points[-1][0]:,}", fontsize=10)
    axes.set_ylim(bottom=0 if from_zero else None)
    if max(value for _, value in points) >= 1e4:
        from matplotlib.ticker import EngFormatter

        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    return _png(figure)


def draw_pretraining(curves: Mapping[str, Points]) -> bytes:
    """Training loss, and on an axis of its own the validation loss."""
    figure, axes = _figure()
    train, val = curves["train_loss"], curves.get("val_bpb", [])
    _plot(axes, train, color=BLUE)
    axes.set_xlabel("step of pretraining")
    axes.set_ylabel("training, nats per token", color=BLUE)
    title = f"pretraining: {train[-1][1]:.3f} nats per token at step {train[-1][0]:,}"
    if val:
        other = axes.twinx()
        _plot(other, val, color=ORANGE)
        other.set_ylabel("validation, bits per byte", color=ORANGE)
        other.spines[["top"]].set_visible(False)
        title = f"pretraining: {val[-1][1]:.4f} bits per byte on held-out text at step {val[-1][0]:,}"
    axes.set_title(title, fontsize=10)
    return _png(figure)


def draw_chat_loss(stages: Mapping[str, Points]) -> bytes:
    """The training losses of several stages, one after the other."""
    figure, axes = _figure()
    begin = 0
    for (name, points), color in zip(stages.items(), (BLUE, ORANGE), strict=False):
        if points:
            _plot(axes, [(begin + step, value) for step, value in points], color=color, label=name)
            begin += points[-1][0]
    axes.set(xlabel="step", ylabel="training, nats per token", ylim=(0, None))
    axes.set_title("chat stages, one after the other", fontsize=10)
    axes.legend(frameon=False)
    return _png(figure)


def _figure():
    from matplotlib.figure import Figure  # the object interface: no display, no global state

    figure = Figure(figsize=(6.4, 2.8), dpi=150, layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _plot(axes, points: Points, **style) -> int:
    """Draw a curve as at most `MAX_POINTS` means of as many steps as are returned."""
    every = math.ceil(len(points) / MAX_POINTS)
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    steps = [group[-1][0] for group in groups]
    values = [sum(value for _, value in group) / len(group) for group in groups]
    axes.plot(steps, values, linewidth=1.6, marker="o" if len(values) <= 40 else "", markersize=3, **style)
    return every


def _png(figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
