"""How a training run is measured and logged: speed, average and spikes of the loss, `metrics.jsonl`, wandb."""

import json
import math
import os
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nanochat import hardware
from nanochat.common import Runtime, UserError, base_dir, disk_errors, print0, write_atomic
from nanochat.data.dataloader import Batch
from nanochat.training.progress import Progress

LOSS_EMA_DECAY = 0.9  # of the training loss's average
SPIKE_WINDOW, SPIKE_SCORE = 64, 6.0  # recent losses compared with, and from which distance to them one is reported
HIGH_LOSS = 1.1  # times the average before it: such a loss of a step that is not shown is told with the next one
WARMUP_STEPS_UNTIMED = 3  # of each process, as they include compilation and first allocations


@dataclass
class RunStats:
    """Loss average, time and speed of a run. `seconds` are those of training steps only, not of evaluation and saving,
    since the beginning of the run; the speed is that of this process."""

    tokens_per_step: int
    flops_per_token: float
    device_name: str
    dtype: torch.dtype
    world_size: int
    loss_ema: float = 0.0
    ema_weight: float = 0.0
    seconds: float = 0.0
    num_skipped: int = 0  # steps left out as their numbers were not finite
    recent: list[float] = field(default_factory=list)  # the last losses
    num_seen: int = 0  # steps of this process
    timed_seconds: float = 0.0  # of these, without the warm-up

    @classmethod
    def for_runtime(cls, runtime: Runtime, tokens_per_step: int, flops_per_token: float) -> "RunStats":
        name = torch.cuda.get_device_name(runtime.device) if runtime.is_cuda else runtime.device.type
        return cls(tokens_per_step, flops_per_token, name, runtime.dtype, runtime.world_size)

    def update(self, loss: float, seconds: float) -> None:
        """Add one step with its loss in nats."""
        if math.isfinite(loss):  # an overflow in float16 would make the average infinite for good
            self.recent = [*self.recent[1 - SPIKE_WINDOW :], loss]
            self.loss_ema = LOSS_EMA_DECAY * self.loss_ema + (1 - LOSS_EMA_DECAY) * loss
            self.ema_weight = LOSS_EMA_DECAY * self.ema_weight + (1 - LOSS_EMA_DECAY)
        self.seconds += seconds
        self.num_seen += 1
        if self.num_seen > WARMUP_STEPS_UNTIMED:
            self.timed_seconds += seconds

    def spike_score(self, loss: float) -> float | None:
        """How far `loss` is above the median of the losses before it, in robust standard deviations (1.4826 times the
        median absolute deviation, but at least 0.1 % of the median); None while these are less than half a window."""
        if len(self.recent) < SPIKE_WINDOW // 2:
            return None
        middle = statistics.median(self.recent)
        deviation = 1.4826 * statistics.median(abs(value - middle) for value in self.recent)
        return (loss - middle) / max(deviation, 1e-3 * abs(middle))

    @property
    def smooth_loss(self) -> float:
        """Exponential average of the loss, debiased."""
        return self.loss_ema / self.ema_weight if self.ema_weight else math.nan

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks together; None until the warm-up is over."""
        num_timed = self.num_seen - WARMUP_STEPS_UNTIMED
        return num_timed * self.tokens_per_step / self.timed_seconds if self.timed_seconds else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs per second over the devices' peak, 0 to 1; None while unknown or on an unknown device."""
        speed = self.tokens_per_second
        return speed and hardware.mfu(self.flops_per_token, speed, self.device_name, self.dtype, self.world_size)

    def seconds_left(self, num_steps: int) -> float | None:
        speed = self.tokens_per_second
        return speed and num_steps * self.tokens_per_step / speed

    def state(self) -> dict[str, Any]:
        """What a checkpoint stores for `restore`."""
        names = ("loss_ema", "ema_weight", "seconds", "num_skipped", "recent")
        return {name: getattr(self, name) for name in names}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state` gave, which had fewer names until November 2026."""
        for name, value in state.items():
            setattr(self, name, value)


class MetricsLog:
    """Writes every number of a run to a file of JSON lines, and to wandb if the run has a name there. Rank 0 only.
    `wandb_id` is the run's id on wandb, None without one; given that of a run before, it goes on there."""

    def __init__(
        self, path: Path, runtime: Runtime, *, run_name: str = "", settings: Mapping | None = None,
        wandb_id: str | None = None,
    ):  # fmt: skip
        self.path, self._is_main = path, runtime.is_main
        self._wandb = _start_wandb(run_name, settings or {}, wandb_id) if run_name and runtime.is_main else None
        self.wandb_id = wandb_id if self._wandb is None else self._wandb.id

    def rewind(self, step: int) -> None:
        """Drop the lines of steps after `step`, that of the checkpoint being resumed; 0 drops all."""
        if self._is_main and self.path.exists():
            lines = self.path.read_text(errors="replace").splitlines()
            write_atomic(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step and step))

    def log(self, **numbers) -> None:
        """Append one line; `step` must be among the numbers. None values are left out."""
        if not self._is_main:
            return
        record = {key: value for key, value in numbers.items() if value is not None}
        with disk_errors("metrics", self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a") as file:
                file.write(json.dumps(record) + "\n")
        if self._wandb is not None:
            self._wandb.log({k: v for k, v in record.items() if k != "step"}, step=record["step"])

    def finish(self) -> None:
        if self._wandb is not None:
            self._wandb.finish()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return math.inf  # a line cut off by a crash


def _start_wandb(run_name: str, settings: Mapping, run_id: str | None):
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"--run {run_name} needs the package wandb; install it, or leave --run out") from error
    try:
        return wandb.init(
            project=os.environ.get("WANDB_PROJECT", "nanochat"), name=run_name, config=dict(settings), dir=base_dir(),
            id=run_id, resume="allow",
        )  # fmt: skip
    except wandb.errors.Error as error:
        raise UserError(f"wandb did not start ({error}); log in, set WANDB_MODE=offline, or leave --run out") from error


class StepLog:
    """Times, logs and prints each training step. On a GPU the numbers of a step are read only once the next step is
    queued, so that the GPU is never idle meanwhile. `examine(step, loss, squares, batches)` is called with each step's,
    before they are logged, and may raise."""

    def __init__(
        self, stats: RunStats, metrics: MetricsLog, progress: Progress,
        examine: Callable[[int, float, float, Sequence[Batch]], None],
    ):  # fmt: skip
        self.stats, self.metrics, self.progress, self.examine = stats, metrics, progress, examine
        self.val_bpb: float | None = None  # the last known, to show
        self._highest = (0.0, 0)  # high loss and its step, since one was shown
        self._pending: tuple[int, Tensor, torch.cuda.Event | None, Sequence[Batch], dict] | None = None
        self._mark = 0.0

    def start(self) -> None:
        """Call this when a step begins."""
        if self._pending is None:
            self._mark = time.perf_counter()

    def end(self, step: int, found: Tensor, batches: Sequence[Batch], **numbers) -> None:
        """Call this when step `step`, counted from 1, is queued, with what `TrainingRun.update` gave for its batches,
        and further numbers to log."""
        event = None
        if found.is_cuda:
            host = torch.empty_like(found, device="cpu", pin_memory=True)
            host.copy_(found, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            found = host
        self.flush()  # the step before this one
        self._pending = (step, found, event, batches, numbers)
        if event is None:
            self.flush()

    def flush(self) -> None:
        """Wait for the last step, examine and log it."""
        if self._pending is None:
            return
        (step, found, event, batches, numbers), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        now, (loss, squares), stats = time.perf_counter(), found.tolist(), self.stats
        self.examine(step, loss, squares, batches)
        score = stats.spike_score(loss)
        is_spike = score is not None and score > SPIKE_SCORE
        if is_spike:
            where = f"{score:.1f} robust standard deviations above the median of the last {len(stats.recent)} steps"
            print0(f"step {step:>5} | loss spike: {loss:.4f}, {where}")
        if loss > HIGH_LOSS * stats.smooth_loss:
            self._highest = max(self._highest, (loss, step))
        stats.update(loss, now - self._mark)
        self._mark = now
        self.metrics.log(
            step=step, train_loss=loss if math.isfinite(loss) else None,
            train_loss_average=stats.smooth_loss if stats.ema_weight else None, **numbers,
            tokens=step * stats.tokens_per_step,
            tokens_per_second=stats.tokens_per_second, mfu=stats.mfu, elapsed_seconds=stats.seconds,
            loss_spike=score if is_spike else None,
        )  # fmt: skip
        if self.progress.show(step, self._parts(step, loss)):
            self._highest = (0.0, 0)

    def _parts(self, step: int, loss: float) -> list[str]:
        stats, (highest, where) = self.stats, self._highest
        hidden = f", highest {highest:.4f} at step {where}" if 0 < where < step else ""
        parts = [f"loss {loss:.4f} (average {stats.smooth_loss:.4f}{hidden})"]
        left = stats.seconds_left(self.progress.num_steps - step)
        parts.append(_clock(stats.seconds) + (f", {_clock(left)} left" if left is not None else ""))
        if stats.tokens_per_second is not None:
            parts.append(f"{stats.tokens_per_second:,.0f} tokens/s")
        if stats.mfu is not None:
            parts.append(f"{stats.mfu:.1%} of peak")
        if self.val_bpb is not None:
            parts.append(f"validation {self.val_bpb:.4f} bits per byte")
        return parts


def peak_memory_bytes(runtime: Runtime) -> int:
    """Peak memory of this process: allocated on its GPU, or resident on the host."""
    if runtime.is_cuda:
        return torch.cuda.max_memory_allocated(runtime.device)
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
