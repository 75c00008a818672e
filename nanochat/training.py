"""Passive parts of a training loop; the loops themselves stand in the stage scripts.

What is here would be a bug if two stages did it differently: how a step's loss is normalised, when something is due,
how speed is measured, where numbers are logged.
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat import hardware
from nanochat.common import Runtime, UserError, disk_errors, print0, write_atomic
from nanochat.dataloader import Batch
from nanochat.optim import MuonAdamW

LOSS_EMA_DECAY = 0.9  # of the smoothed training loss that is printed
WARMUP_STEPS_UNTIMED = 3  # of each process: compilation and first allocations are not its speed


def grad_accum_steps(total_tokens: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-steps per optimizer step. Raises `UserError` with the nearest sizes that fit when it is no whole number."""
    tokens = device_batch_size * sequence_len * world_size
    if total_tokens >= tokens and total_tokens % tokens == 0:
        return total_tokens // tokens
    below, above = max(1, total_tokens // tokens) * tokens, (total_tokens // tokens + 1) * tokens
    nearest = f"{below}" if below == above else f"{below} or {above}"
    raise UserError(
        f"a total batch of {total_tokens} tokens is no whole number of micro-batches of {tokens} (device batch "
        f"{device_batch_size} x {sequence_len} tokens x {world_size} processes); take --total-batch-size {nearest}, "
        f"or another --device-batch-size"
    )


def accumulate_gradients(
    model: torch.nn.Module, batches: Iterator[Batch], num_micro_steps: int, *, device: torch.device,
    world_size: int = 1, loss_scale: float = 1.0,
) -> Tensor:
    """Forward and backward over one step's micro-batches; gradients add up in the parameters.

    The loss is the mean over the supervised tokens of the whole step, on all ranks together, however they are split;
    summed over ranks, the gradients are its gradients, times `loss_scale`. Returns that loss, a 0-d float32 tensor
    on the device, without waiting for it.
    """
    step_batches = list(islice(batches, num_micro_steps))
    count = torch.full((), float(sum(batch.num_targets for batch in step_batches)), device=device)
    if world_size > 1:
        dist.all_reduce(count)
    divisor = count.clamp(min=1.0)
    total = torch.zeros((), device=device)
    for batch in step_batches:
        loss = model(batch.idx, batch.targets, reduction="sum") / divisor
        (loss * loss_scale).backward()
        total += loss.detach()
    if world_size > 1:
        dist.all_reduce(total)
    return total


def apply_schedule(optimizer: MuonAdamW, *, lr_mult: float, momentum: float, decay_mult: float) -> None:
    """Set the next step's rates of all groups, and momentum and weight decay of the Muon groups."""
    for group in optimizer.groups:
        group.lr = group.initial_lr * lr_mult
        if group.kind == "muon":
            group.momentum = momentum
            group.weight_decay = group.initial_weight_decay * decay_mult


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done `every` steps (0: never) is due at `step`: every so often, and always at the last."""
    return every > 0 and (step == last or (step > 0 and step % every == 0))


# --- fp16 ----------------------------------------------------------------------------------------


@dataclass
class LossScaler:
    """Dynamic loss scale for float16 (arXiv 1710.03740): halved when a gradient overflows on any rank, doubled after
    `growth_every` good steps. Of other dtypes the scale is 1 and nothing is looked at."""

    enabled: bool
    scale: float = 2.0**16
    growth_every: int = 1000
    num_good: int = 0

    def __post_init__(self):
        if not self.enabled:
            self.scale = 1.0

    @torch.no_grad()
    def unscale_(self, optimizer: MuonAdamW) -> bool:
        """Divide all gradients by the scale; False, on every rank alike, when the step must be skipped."""
        if not self.enabled:
            return True
        grads = [p.grad for group in optimizer.groups for p in group.params.values() if p.grad is not None]
        finite = torch.stack([torch.isfinite(g).all() for g in grads]).all().float()
        if optimizer.world_size > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        is_good = bool(finite.item())
        if is_good:
            torch._foreach_mul_(grads, 1.0 / self.scale)
        self._adapt(is_good)
        return is_good

    def _adapt(self, is_good: bool) -> None:
        self.num_good = self.num_good + 1 if is_good else 0
        if not is_good:
            self.scale = max(1.0, self.scale / 2)
        elif self.num_good % self.growth_every == 0:
            self.scale *= 2


# --- fitting the device --------------------------------------------------------------------------


def largest_fitting_batch(wanted: int, rows_per_step: int, try_batch: Callable[[int], None]) -> int:
    """The largest divisor of `rows_per_step` up to `wanted` rows with which `try_batch` runs out of no memory.

    On several ranks the smallest of what fits on each. Raises `UserError` when not even one row fits.
    """
    sizes = [size for size in range(min(wanted, rows_per_step), 0, -1) if rows_per_step % size == 0]
    fitting = 0
    for size in sizes:
        try:
            try_batch(size)
            fitting = size
            break
        except torch.OutOfMemoryError:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
    if dist.is_initialized():
        box = torch.tensor(float(fitting), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        fitting = int(box.item())
    if not fitting:
        raise UserError("not even one row fits in the device's memory; choose a smaller --depth or --sequence-len")
    return fitting


# --- measuring and logging -----------------------------------------------------------------------


@dataclass
class RunStats:
    """Loss average, time and speed of a run; its fields are saved with each checkpoint.

    `seconds` counts training steps only, not evaluation and saving, over all processes' lives of the run.
    """

    tokens_per_step: int
    flops_per_token: float
    device_name: str
    dtype: str
    world_size: int
    loss_ema: float = 0.0
    ema_weight: float = 0.0
    seconds: float = 0.0
    num_timed: int = field(default=0, metadata={"saved": False})  # steps of this process, warm-up left out
    timed_seconds: float = field(default=0.0, metadata={"saved": False})
    num_seen: int = field(default=0, metadata={"saved": False})

    def update(self, loss: float, seconds: float) -> None:
        """Take in one step's loss (nats) and duration."""
        self.loss_ema = LOSS_EMA_DECAY * self.loss_ema + (1 - LOSS_EMA_DECAY) * loss
        self.ema_weight = LOSS_EMA_DECAY * self.ema_weight + (1 - LOSS_EMA_DECAY)
        self.seconds += seconds
        self.num_seen += 1
        if self.num_seen > WARMUP_STEPS_UNTIMED:
            self.num_timed += 1
            self.timed_seconds += seconds

    @property
    def smooth_loss(self) -> float:
        """Exponential average of the loss, debiased."""
        return self.loss_ema / self.ema_weight if self.ema_weight else math.nan

    @property
    def tokens_per_second(self) -> float | None:
        """Of all ranks together; None until the warm-up is over."""
        return self.num_timed * self.tokens_per_step / self.timed_seconds if self.timed_seconds > 0 else None

    @property
    def mfu(self) -> float | None:
        """Model FLOPs per second over the devices' peak, 0 to 1; None while unknown or on an unknown device."""
        speed = self.tokens_per_second
        if speed is None:
            return None
        return hardware.mfu(self.flops_per_token, speed, self.device_name, self.dtype, self.world_size)

    def seconds_left(self, num_steps: int) -> float | None:
        speed = self.tokens_per_second
        return num_steps * self.tokens_per_step / speed if speed else None

    def state(self) -> dict:
        """What a checkpoint keeps; `restore` takes it back."""
        return {"loss_ema": self.loss_ema, "ema_weight": self.ema_weight, "seconds": self.seconds}

    def restore(self, state: Mapping) -> None:
        for name in ("loss_ema", "ema_weight", "seconds"):
            setattr(self, name, state[name])


class LateReader:
    """Reads 0-d device tensors one step late, so that the host never waits for the step it has just queued."""

    def __init__(self):
        self._waiting: tuple | None = None

    def push(self, key, value: Tensor) -> tuple | None:
        """Start reading `value`; returns the (key, number) pushed before, if it was not yet returned."""
        previous = self.flush()
        event = None
        if value.is_cuda:
            host = torch.empty_like(value, device="cpu", pin_memory=True)
            host.copy_(value, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            value = host
        self._waiting = (key, value, event)
        return previous

    def flush(self) -> tuple | None:
        """The (key, number) pushed last, waiting for it, or None."""
        if self._waiting is None:
            return None
        key, value, event = self._waiting
        self._waiting = None
        if event is not None:
            event.synchronize()
        return key, value.item()


class MetricsLog:
    """Every number of a run as JSON lines in a file, and on wandb when the run has a name there. Rank 0 only."""

    def __init__(self, path: Path, runtime: Runtime, *, run_name: str = "", settings: Mapping | None = None):
        self.path = path
        self._is_main = runtime.is_main
        self._wandb = _start_wandb(run_name, settings or {}) if run_name and runtime.is_main else None

    def rewind(self, step: int) -> None:
        """Drop the lines of later steps, written after the checkpoint that is being resumed; 0 drops all."""
        if self._is_main and self.path.exists():
            lines = self.path.read_text().splitlines(keepends=True)
            write_atomic(self.path, "".join(line for line in lines if _step_of(line) <= step and step))

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


def _start_wandb(run_name: str, settings: Mapping):
    try:
        import wandb
    except ImportError as error:
        raise UserError(f"--run {run_name} needs the package wandb; install it, or leave --run out") from error
    try:
        return wandb.init(project=os.environ.get("WANDB_PROJECT", "nanochat"), name=run_name, config=dict(settings))
    except wandb.errors.Error as error:
        raise UserError(f"wandb did not start ({error}); log in, set WANDB_MODE=offline, or leave --run out") from error
