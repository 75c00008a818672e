"""Passive parts of a training loop; the loops themselves stand in the stage scripts.

What is here would be a bug if two stages did it differently: how a step's loss is normalised, when something is due,
what a checkpoint keeps of a run. Not here: how speed is measured and where numbers are logged (`metrics.py`).
"""

import gc
import math
import time
from argparse import Namespace
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.checkpoint import Resumable, load_rank_states, save_checkpoint
from nanochat.common import Runtime, UserError, print0
from nanochat.data.dataloader import Batch
from nanochat.evals.loss_eval import BpbResult
from nanochat.model.gpt import GPT
from nanochat.model.loss import IGNORE_INDEX, softcap_cross_entropy
from nanochat.report import append_record
from nanochat.tokenizer import Tokenizer
from nanochat.training import schedule
from nanochat.training.metrics import MetricsLog, RunStats, StepLog, peak_memory_bytes
from nanochat.training.optim import MuonAdamW, parameter_groups
from nanochat.training.recipe import MATRIX_LR, Plan

DEVICE_BATCH_SIZE = {"cuda": 32}  # rows, by device; less where that does not fit
SMALL_DEVICE_BATCH_SIZE = 8  # elsewhere: activations that stay near the cache


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
    model: torch.nn.Module,
    batches: Iterator[Batch],
    num_micro_steps: int,
    *,
    device: torch.device,
    world_size: int = 1,
    loss_scale: float = 1.0,
) -> Tensor:
    """Forward and backward over one step's micro-batches; gradients add up in the parameters.

    The loss is the mean over the supervised tokens of the whole step, on all ranks together, however they are split,
    each times the weight of its row where batches have weights, which do not enter the divisor; summed over ranks, the
    gradients are its gradients, times `loss_scale`. Returns that loss, a 0-d float32 tensor on the device, without
    waiting for it.
    """
    step_batches = list(islice(batches, num_micro_steps))
    count = torch.full((), float(sum(batch.num_targets for batch in step_batches)), device=device)
    if world_size > 1:
        dist.all_reduce(count)
    divisor = count.clamp(min=1.0)
    total = torch.zeros((), device=device)
    for batch in step_batches:
        if batch.weights is None:
            loss = model(batch.idx, batch.targets, reduction="sum") / divisor
            (loss * loss_scale).backward()
            total += loss.detach()
        else:
            total += _backward_weighted(model, batch, loss_scale / divisor) / divisor
    if world_size > 1:
        dist.all_reduce(total)
    return total


def _backward_weighted(model: GPT, batch: Batch, scale: Tensor) -> Tensor:
    """Backward of the summed loss of `batch`, each row's times its weight, times `scale`; returns the sum, 0-d float32.

    Rows go through the head one by one, as it keeps a gradient of the size of the vocabulary for each, and only where
    they have targets: a prompt costs no product with the vocabulary.
    """
    hidden = model.hidden(batch.idx)
    head = model.lm_head.weight[: model.config.vocab_size]
    total = torch.zeros((), device=hidden.device)
    gradients = []
    for row, targets, weight in zip(hidden.detach(), batch.targets, batch.weights, strict=True):
        row = row.requires_grad_()
        counts = targets != IGNORE_INDEX
        losses = softcap_cross_entropy(
            row[counts], head, targets[counts], softcap=model.config.softcap, reduction="sum"
        )
        loss = losses * weight
        (loss * scale).backward()
        total += loss.detach()
        gradients.append(row.grad)
    hidden.backward(torch.stack(gradients))
    return total


def make_optimizer(model: GPT, runtime: Runtime) -> MuonAdamW:
    """The optimizer of every stage, at the recipe's rates, sharded over the ranks."""
    return MuonAdamW(
        parameter_groups(model, matrix_lr=MATRIX_LR), rank=runtime.rank, world_size=runtime.world_size,
        muon_dtype=runtime.dtype,
    )  # fmt: skip


def scale_rates(optimizer: MuonAdamW, *, lr_scale: float, matrix_weight_decay: float) -> None:
    """Scale what the schedule starts from to the size of the run: every rate, and the matrices' weight decay."""
    for group in optimizer.groups:
        group.initial_lr *= lr_scale
        if group.kind == "muon":
            group.initial_weight_decay = matrix_weight_decay


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


# --- flags ---------------------------------------------------------------------------------------


def check_ranges(
    args: Namespace, *, positive: Collection[str] = (), zero_or_more: Collection[str] = (), shares: Collection[str] = ()
) -> None:
    """Raise `UserError` for the first flag in `args` out of its range; shares lie from 0 to 1, None is always right."""
    for name in (*positive, *zero_or_more, *shares):
        value = getattr(args, name)
        if name in shares:
            is_right, range_ = value is None or 0.0 <= value <= 1.0, "lie between 0 and 1"
        elif name in positive:
            is_right, range_ = value is None or 0 < value < math.inf, "be a number above 0"
        else:
            is_right, range_ = value is None or 0 <= value < math.inf, "be a number of 0 or more"
        if not is_right:
            raise UserError(f"--{name.replace('_', '-')} must {range_}, not {value}")


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

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps; `restore` takes it back."""
        return {"enabled": self.enabled, "scale": self.scale, "num_good": self.num_good}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take the scale over, unless the run went on in another dtype, for which it would be wrong."""
        if self.enabled and state["enabled"]:
            self.scale, self.num_good = state["scale"], int(state["num_good"])


# --- fitting the device --------------------------------------------------------------------------


def choose_device_batch(
    total_tokens: int, fitting: int, sequence_len: int, world_size: int, *, is_fixed: bool
) -> tuple[int, int]:
    """Rows of a micro-batch on each device, and micro-steps per step.

    The most rows up to `fitting` that divide the step evenly; exactly `fitting` when the user fixed it (`is_fixed`).
    Raises `UserError` when the step cannot be divided.
    """
    rows = total_tokens // (sequence_len * world_size)
    if not is_fixed and rows * sequence_len * world_size == total_tokens:
        fitting = max(size for size in range(1, min(fitting, rows) + 1) if rows % size == 0)
    return fitting, grad_accum_steps(total_tokens, fitting, sequence_len, world_size)


def wanted_device_batch(device: torch.device, asked: int, total_tokens: int, row_tokens: int) -> int:
    """Rows of a micro-batch to try first: `asked`, or with 0 what suits the device; no more than the step has, when
    its `total_tokens` are known (else 0). `row_tokens` are those of one row on every rank."""
    wanted = asked or DEVICE_BATCH_SIZE.get(device.type, SMALL_DEVICE_BATCH_SIZE)
    return min(wanted, max(1, total_tokens // row_tokens)) if total_tokens else wanted


def fitting_batch(model: GPT, wanted: int, try_batch: Callable[[GPT, int], None] | None = None) -> int:
    """The first of `wanted`, half of it, a quarter, ... rows whose forward and backward fit in the memory of every
    rank's device. Says so when it is not `wanted`; raises `UserError` when not even one row fits."""
    try_batch = try_batch or _forward_backward
    on_cuda, size = model.device.type == "cuda", wanted
    while size >= 1:
        try:
            if on_cuda or try_batch is not _forward_backward:  # elsewhere, memory runs out without an exception
                try_batch(model, size)
            break
        except torch.OutOfMemoryError:
            size //= 2
        if on_cuda:
            torch.cuda.empty_cache()
    if dist.is_initialized():
        box = torch.tensor(float(size), device=model.device)
        dist.all_reduce(box, op=dist.ReduceOp.MIN)
        size = int(box.item())
    if size < 1:
        raise UserError("not even one row fits in the device's memory; choose a smaller --depth or --sequence-len")
    if size < wanted:
        print0(f"{wanted} rows do not fit in the device's memory: micro-batches of at most {size} rows")
    return size


def measure_tokens_per_second(model: GPT, num_rows: int, world_size: int, repeats: int = 3) -> float:
    """Tokens a second that forward and backward reach on all ranks together: the median of `repeats` micro-batches."""
    _forward_backward(model, num_rows)
    seconds = sorted(_forward_backward(model, num_rows) for _ in range(repeats))
    return num_rows * model.config.sequence_len * world_size / seconds[repeats // 2]


def _forward_backward(model: GPT, num_rows: int) -> float:
    """Seconds of one micro-batch of random tokens; leaves no gradients behind."""
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, model.config.sequence_len)
    idx = torch.randint(model.config.vocab_size, shape, generator=generator).to(model.device)
    started = time.perf_counter()
    model(idx, idx).backward()
    if model.device.type == "cuda":
        torch.cuda.synchronize(model.device)
    seconds = time.perf_counter() - started
    model.zero_grad(set_to_none=True)
    return seconds


# --- a run ---------------------------------------------------------------------------------------


@dataclass
class TrainingRun:
    """What a stage's loop works with at every step, and what of it a checkpoint keeps. The loop stands in the script.

    A step is `num_micro_steps` batches of `loader`, each of `device_batch_size` rows, on every rank. `args` are the
    stage's flags, among them `run`, `warmup_steps`, `warmdown_frac` and `final_lr_frac`. What is resumed takes over
    everything but model and tokenizer, which the caller has loaded. `results` are the numbers for the report.
    """

    folder: Path
    args: Namespace
    runtime: Runtime
    model: GPT
    tokenizer: Tokenizer
    optimizer: MuonAdamW
    loader: Iterator[Batch]
    plan: Plan
    device_batch_size: int
    num_micro_steps: int
    resumed: Resumable | None = None
    results: dict = field(default_factory=dict)
    first_step: int = 0

    def __post_init__(self):
        args, plan, runtime = self.args, self.plan, self.runtime
        scale_rates(self.optimizer, lr_scale=plan.lr_scale, matrix_weight_decay=plan.matrix_weight_decay)
        self.rates = schedule.lr_schedule(
            plan.num_steps, warmup_steps=args.warmup_steps, warmdown_frac=args.warmdown_frac,
            final_frac=args.final_lr_frac,
        )  # fmt: skip
        self.scaler = LossScaler(enabled=runtime.dtype == torch.float16)
        self.stats = RunStats.for_runtime(runtime, plan.total_batch_tokens, self.model.flops_per_token())
        self.metrics = MetricsLog(self.folder / "metrics.jsonl", runtime, run_name=args.run, settings=vars(args))
        if self.resumed:
            self._restore(self.resumed)
        self.metrics.rewind(self.first_step)
        self.log = StepLog(self.stats, self.metrics, plan.num_steps)

    def _restore(self, resumed: Resumable) -> None:
        folder, meta = resumed.folder, resumed.meta
        self.optimizer.load_state_dict(load_rank_states(folder, meta, "optimizer"))
        self.loader.load_state_dict(load_rank_states(folder, meta, "loader"))
        self.first_step, self.results = meta["step"], meta["results"]
        self.scaler.restore(meta["scaler"])
        self.stats.restore(meta["stats"])
        print0(f"resumed at step {self.first_step:,}")

    @property
    def dtype_name(self) -> str:
        return str(self.runtime.dtype).removeprefix("torch.")

    def steps(self) -> Iterator[int]:
        """The step numbers of the loop, the last one being for what is done after the last step."""
        gc.collect()
        gc.freeze()  # what lives until the end is not looked through again; collections paused training for 0.5 s
        try:
            yield from range(self.first_step, self.plan.num_steps + 1)
        finally:
            gc.unfreeze()

    def is_due(self, step: int, every: int) -> bool:
        """`is_due` of this run; what was done at the step of the checkpoint is not done again. Waits for the step in
        flight where something is due, so that nothing else is taken for its time."""
        is_new = step > self.first_step or not self.resumed
        due = is_new and is_due(step, every, self.plan.num_steps)
        if due:
            self.log.flush()
        return due

    def note(self, step: int, **numbers: float) -> None:
        """Log and keep numbers that an evaluation at `step` found."""
        self.results = {**self.results, **numbers}
        self.metrics.log(step=step, **numbers)

    def note_bpb(self, step: int, found: BpbResult) -> None:
        """Log, print and keep the validation loss at `step` with its standard error, and the lowest so far."""
        bpb, se = found.bpb, found.se
        self.metrics.log(step=step, val_bpb=bpb, val_bpb_se=se, tokens=step * self.plan.total_batch_tokens)
        lowest = min(bpb, self.results.get("min_val_bpb", math.inf))
        self.results = {**self.results, "val_bpb": bpb, "val_bpb_se": se, "min_val_bpb": lowest}
        print0(f"step {step:>5} | validation {bpb:.4f} +- {se:.4f} bits per byte")

    def save(self, step: int) -> None:
        """Write a checkpoint of everything the run needs to go on."""
        meta = {
            "args": vars(self.args), "plan": asdict(self.plan), "dtype": self.dtype_name, "results": self.results,
            "device_batch_size": self.device_batch_size, "stats": self.stats.state(), "scaler": self.scaler.state(),
        }  # fmt: skip
        folder = save_checkpoint(
            self.folder, step, runtime=self.runtime, model=self.model, tokenizer=self.tokenizer, meta=meta,
            optimizer_state=self.optimizer.state_dict(), loader_state=self.loader.state_dict(),
        )  # fmt: skip
        print0(f"step {step:>5} | saved {folder.name}")

    def take_step(self, step: int) -> None:
        """One optimizer step on the next batches of the loader, and its line in the log."""
        self.log.start()
        loss_t = self.update(step, self.loader, self.num_micro_steps)
        self.log.end(step + 1, loss_t, lr_mult=self.rates(step))

    def update(self, step: int, batches: Iterator[Batch], num_micro_steps: int) -> Tensor:
        """One optimizer step, at the rates of the schedule, on so many of `batches`; its loss, 0-d on the device."""
        lr_mult = self.rates(step)
        momentum = schedule.muon_momentum(step, self.rates)
        decay_mult = schedule.decay_mult(step, self.plan.num_steps)
        apply_schedule(self.optimizer, lr_mult=lr_mult, momentum=momentum, decay_mult=decay_mult)
        loss_t = accumulate_gradients(
            self.model, batches, num_micro_steps, device=self.runtime.device,
            world_size=self.runtime.world_size, loss_scale=self.scaler.scale,
        )  # fmt: skip
        if self.scaler.unscale_(self.optimizer):
            self.optimizer.step()
        self.optimizer.zero_grad()
        return loss_t

    def finish(self, stage: str, **own: float | None) -> None:
        """End the metrics, and add the stage's record to the report; `own` results replace those of that name."""
        self.metrics.finish()
        plan, stats, runtime = self.plan, self.stats, self.runtime
        results = self.results | {
            "train_loss": stats.smooth_loss, "num_parameters": self.model.parameter_counts()["total"],
            "num_steps": plan.num_steps, "train_tokens": plan.train_tokens,
            "train_flops": plan.train_tokens * self.model.flops_per_token(),
            "tokens_per_second": stats.tokens_per_second, "mfu": stats.mfu, "train_seconds": stats.seconds,
            "peak_memory_bytes": peak_memory_bytes(runtime), **own,
        }  # fmt: skip
        samples = results.pop("samples", None)
        if runtime.is_main:
            settings = {**vars(self.args), **asdict(plan), "dtype": self.dtype_name}
            append_record(
                stage, settings=settings | {"config": asdict(self.model.config)}, results=results, samples=samples,
                metrics_path=self.metrics.path,
            )  # fmt: skip
        minutes = stats.seconds / 60
        print0(f"done: {self.folder.name}, {plan.num_steps:,} steps in {minutes:.1f} minutes of training")
