"""How a training run is measured and logged: speed, smoothed loss, `metrics.jsonl`, wandb, one printed line a step."""

import json
import math
import os
import resource
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nanochat import hardware
from nanochat.common import Runtime, UserError, base_dir, disk_errors, print0, write_atomic

LOSS_EMA_DECAY = 0.9  # of the smoothed training loss that is printed
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
    num_seen: int = 0  # steps of this process
    timed_seconds: float = 0.0  # of these, without the warm-up

    @classmethod
    def for_runtime(cls, runtime: Runtime, tokens_per_step: int, flops_per_token: float) -> "RunStats":
        name = torch.cuda.get_device_name(runtime.device) if runtime.is_cuda else runtime.device.type
        return cls(tokens_per_step, flops_per_token, name, runtime.dtype, runtime.world_size)

    def update(self, loss: float, seconds: float) -> None:
        """Add one step with its loss in nats."""
        if math.isfinite(loss):  # an overflow in float16 would make the average infinite for good
            self.loss_ema = LOSS_EMA_DECAY * self.loss_ema + (1 - LOSS_EMA_DECAY) * loss
            self.ema_weight = LOSS_EMA_DECAY * self.ema_weight + (1 - LOSS_EMA_DECAY)
        self.seconds += seconds
        self.num_seen += 1
        if self.num_seen > WARMUP_STEPS_UNTIMED:
            self.timed_seconds += seconds

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

    def state(self) -> dict[str, float]:
        """What a checkpoint stores for `restore`."""
        return {"loss_ema": self.loss_ema, "ema_weight": self.ema_weight, "seconds": self.seconds}

    def restore(self, state: Mapping[str, float]) -> None:
        self.loss_ema, self.ema_weight, self.seconds = (state[k] for k in ("loss_ema", "ema_weight", "seconds"))


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
    """Times, logs and prints each training step. On a GPU the loss of a step is read only once the next step is queued,
    so that the GPU is never idle meanwhile."""

    def __init__(self, stats: RunStats, metrics: MetricsLog, num_steps: int):
        self.stats, self.metrics, self.num_steps = stats, metrics, num_steps
        self._pending: tuple[int, Tensor, torch.cuda.Event | None, dict] | None = None
        self._mark = 0.0

    def start(self) -> None:
        """Call this when a step begins."""
        if self._pending is None:
            self._mark = time.perf_counter()

    def end(self, step: int, loss: Tensor, **numbers) -> None:
        """Call this when step `step`, counted from 1, is queued, with its loss (0-d) and further numbers to log."""
        event = None
        if loss.is_cuda:
            host = torch.empty_like(loss, device="cpu", pin_memory=True)
            host.copy_(loss, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            loss = host
        self.flush()  # the step before this one
        self._pending = (step, loss, event, numbers)
        if event is None:
            self.flush()

    def flush(self) -> None:
        """Wait for the last step and log it. Raises `UserError` when its loss is not finite."""
        if self._pending is None:
            return
        (step, loss_t, event, numbers), self._pending = self._pending, None
        if event is not None:
            event.synchronize()
        now, loss, stats = time.perf_counter(), loss_t.item(), self.stats
        stats.update(loss, now - self._mark)
        self._mark = now
        check_loss(step, loss, stats.dtype)
        self.metrics.log(
            step=step, train_loss=loss, **numbers, tokens=step * stats.tokens_per_step,
            tokens_per_second=stats.tokens_per_second, mfu=stats.mfu, elapsed_seconds=stats.seconds,
        )  # fmt: skip
        print0(self._line(step))

    def _line(self, step: int) -> str:
        stats, total = self.stats, self.num_steps
        parts = [f"step {step:>5}/{total} ({step / total:.1%})", f"loss {stats.smooth_loss:.4f}"]
        if stats.tokens_per_second is not None:
            parts.append(f"{stats.tokens_per_second:,.0f} tokens/s")
        if stats.mfu is not None:
            parts.append(f"{stats.mfu:.1%} of peak")
        left = stats.seconds_left(total - step)
        parts.append(_clock(stats.seconds) + (f", {_clock(left)} left" if left is not None else ""))
        return " | ".join(parts)


def check_loss(step: int, loss: float, dtype: torch.dtype) -> None:
    """Raise `UserError` when the loss of a step is not finite, except in float16, where such steps are skipped."""
    if not math.isfinite(loss) and dtype != torch.float16:
        remedy = "resume from a checkpoint before it with a lower --lr-mult, or another --dtype"
        raise UserError(f"the loss at step {step} is {loss}; {remedy}")


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
