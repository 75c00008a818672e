"""What one optimizer step does; the loops themselves are in the stage scripts.

Here is what must not differ between stages: how the loss is normalised over micro-batches and ranks, how a device batch
is chosen, when something is due. Not here: the state of a whole run and what its checkpoints store (`run.py`).
"""

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import Runtime, UserError, gather_ranks, print0
from nanochat.data.dataloader import Batch
from nanochat.model.fp8 import check_fp8
from nanochat.model.gpt import GPT
from nanochat.model.loss import IGNORE_INDEX
from nanochat.training.optim import MuonAdamW, parameter_groups

DEVICE_BATCH_SIZE = {"cuda": 32}  # rows, by device; fewer when that does not fit
SMALL_DEVICE_BATCH_SIZE = 8  # on other devices: activations that stay in or near the cache
OPTIMIZER_TOKENS = 3  # per channel: tokens whose forward and backward take as long as an optimizer step (depth 4, CPU)


def grad_accum_steps(total_tokens: int, device_batch_size: int, sequence_len: int, world_size: int) -> int:
    """Micro-steps per optimizer step. Raises `UserError`, naming the nearest total batches that fit, unless whole."""
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
    model: GPT, batches: Iterator[Batch], num_micro_steps: int, *, device: torch.device, world_size: int = 1,
    loss_scale: float = 1.0, before_last: Callable[[], None] | None = None,
) -> Tensor:  # fmt: skip
    """Forward and backward over the micro-batches of one step, adding to the parameters' gradients. Returns the loss

        sum over supervised tokens of weight(row) * loss(token) / number of supervised tokens

    over all micro-batches and ranks, so that it does not depend on how the step is split; the weight is 1 for batches
    without weights. It is a 0-d float32 tensor on the device, not synchronised with the host. The gradients, once
    summed over ranks, are those of this loss times `loss_scale`. `before_last` is called before the last backward pass,
    unless that is several passes, as it is for batches with weights.
    """
    step_batches = list(islice(batches, num_micro_steps))
    count = torch.full((), float(sum(batch.num_targets for batch in step_batches)), device=device)
    if world_size > 1:
        dist.all_reduce(count)
    divisor = count.clamp(min=1.0)
    total = torch.zeros((), device=device)
    for number, batch in enumerate(step_batches, start=1):
        if batch.weights is None:
            if before_last is not None and number == len(step_batches):
                before_last()
            loss = model(batch.idx, batch.targets, reduction="sum") / divisor
            (loss * loss_scale).backward()
            total += loss.detach()
        else:
            total += _backward_weighted(model, batch, loss_scale / divisor) / divisor
    if world_size > 1:
        dist.all_reduce(total)
    return total


def _backward_weighted(model: GPT, batch: Batch, scale: Tensor) -> Tensor:
    """Backward of `scale` times the sum of the row losses of `batch`, each times its weight. Returns that sum unscaled,
    0-d float32.

    Rows go through the head one at a time, to hold the logits of one row only, and only at positions with targets, so
    that prompts cost no product with the vocabulary. The targets are on the host.
    """
    hidden = model.hidden(batch.idx)
    total = torch.zeros((), device=hidden.device)
    gradients = []
    for row, targets, weight in zip(hidden.detach(), batch.targets, batch.weights, strict=True):
        row = row.requires_grad_()
        places = (targets != IGNORE_INDEX).nonzero().squeeze(1)  # found on the host: the device is not waited for
        its_rows = row[places.to(row.device, non_blocking=True)]
        its_targets = targets[places].to(row.device, non_blocking=True)
        loss = weight * model.loss(its_rows, its_targets, reduction="sum")
        (loss * scale).backward()
        total += loss.detach()
        gradients.append(row.grad)
    hidden.backward(torch.stack(gradients))
    return total


@torch.no_grad()
def squared_gradients(optimizer: MuonAdamW) -> Tensor:
    """Sum of the squares of all gradients of all ranks, before they are added up: not finite if one of them is not. 0-d
    float32 on the device, not synchronised with the host."""
    grads = [p.grad for group in optimizer.groups for p in group.params.values() if p.grad is not None]
    total = torch.stack(torch._foreach_norm(grads, dtype=torch.float32)).square().sum()
    if optimizer.world_size > 1:
        dist.all_reduce(total)
    return total


def make_optimizer(model: GPT, runtime: Runtime) -> MuonAdamW:
    """The optimizer of every stage, sharded over the ranks. On a GPU, and in 8 bits everywhere, it keeps copies of the
    weights in the compute dtype, which the model's products then read. Raises `UserError` for a shape that 8 bits do
    not fit."""
    if runtime.fp8:
        check_fp8(n_embd=model.config.n_embd, kv_dim=model.config.kv_dim)
    is_narrow = runtime.is_cuda and runtime.dtype != torch.float32
    optimizer = MuonAdamW(
        parameter_groups(model), rank=runtime.rank, world_size=runtime.world_size, muon_dtype=runtime.dtype,
        wire_dtype=runtime.dtype if is_narrow else torch.float32,
        copy_dtype=runtime.dtype if is_narrow or runtime.fp8 else None, use_fp8=runtime.fp8,
    )  # fmt: skip
    for name, copy in optimizer.copies.items():
        model.get_submodule(name.removesuffix(".weight")).copy = copy
    return optimizer


def apply_schedule(optimizer: MuonAdamW, *, lr_mult: float, momentum: float, decay_mult: float) -> None:
    """Set the learning rate of all groups, and momentum and weight decay of the Muon groups, for the next step."""
    for group in optimizer.groups:
        group.lr = group.initial_lr * lr_mult
        if group.kind == "muon":
            group.momentum = momentum
            group.weight_decay = group.initial_weight_decay * decay_mult


def is_due(step: int, every: int, last: int) -> bool:
    """Whether something done `every` steps (0: never) is due at `step`; the `last` step is always due, step 0 never."""
    return every > 0 and (step == last or (step > 0 and step % every == 0))


@dataclass
class LossScaler:
    """Dynamic loss scale for float16 (arXiv 1710.03740): halved when a gradient overflows on any rank, doubled after
    `growth_every` good steps. Unless `enabled`, the scale is 1 and gradients are not inspected."""

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
        if not finite.item():
            self.num_good, self.scale = 0, max(1.0, self.scale / 2)
            return False
        torch._foreach_mul_(grads, 1.0 / self.scale)
        self.num_good += 1
        if self.num_good % self.growth_every == 0:
            self.scale *= 2
        return True

    def state(self) -> dict[str, float]:
        """What a checkpoint stores for `restore`."""
        return {"enabled": self.enabled, "scale": self.scale, "num_good": self.num_good}

    def restore(self, state: Mapping[str, float]) -> None:
        """Take over the saved scale, unless either side is not float16 and has none."""
        if self.enabled and state["enabled"]:
            self.scale, self.num_good = state["scale"], int(state["num_good"])


def choose_device_batch(
    total_tokens: int, fitting: int, sequence_len: int, world_size: int, *, is_fixed: bool
) -> tuple[int, int]:
    """Rows of a micro-batch on each device, and micro-steps per optimizer step.

    The most rows up to `fitting` that divide the step evenly, or exactly `fitting` if the user chose it (`is_fixed`).
    Raises `UserError` when the step cannot be divided.
    """
    rows = total_tokens // (sequence_len * world_size)
    if not is_fixed and rows * sequence_len * world_size == total_tokens:
        fitting = max(size for size in range(1, min(fitting, rows) + 1) if rows % size == 0)
    return fitting, grad_accum_steps(total_tokens, fitting, sequence_len, world_size)


def wanted_device_batch(device: torch.device, asked: int, total_tokens: int, row_tokens: int) -> int:
    """Rows of a micro-batch to try first: `asked`, or what suits the device if 0, but no more than a step has when its
    `total_tokens` are known (else 0). `row_tokens` is the number of tokens of one row on every rank."""
    wanted = asked or DEVICE_BATCH_SIZE.get(device.type, SMALL_DEVICE_BATCH_SIZE)
    return min(wanted, max(1, total_tokens // row_tokens)) if total_tokens else wanted


def fitting_batch(model: GPT, wanted: int, try_batch: Callable[[GPT, int], object] | None = None) -> int:
    """The first of `wanted`, half of it, a quarter, ... rows whose forward and backward fit in the memory of every
    rank's device. Prints when it is not `wanted`. Raises `UserError` when not even one row fits."""
    size = wanted
    if try_batch is None and model.device.type == "cuda":  # elsewhere, memory runs out without an exception
        try_batch = _forward_backward
    while try_batch and size >= 1:
        try:
            try_batch(model, size)
            break
        except torch.OutOfMemoryError:
            size //= 2
        torch.cuda.empty_cache()
    size = min(gather_ranks(size))
    if size < 1:
        remedy = "take --recompute, or a smaller --depth or --sequence-len"
        raise UserError(f"not even one row fits in the device's memory; {remedy}")
    if size < wanted:
        print0(f"{wanted} rows do not fit in the device's memory: micro-batches of at most {size} rows")
    return size


def measure_tokens_per_second(model: GPT, num_rows: int, world_size: int, repeats: int = 3) -> float:
    """Tokens a second of forward and backward on all ranks together, from the median of `repeats` micro-batches."""
    _forward_backward(model, num_rows)
    seconds = sorted(_forward_backward(model, num_rows) for _ in range(repeats))
    return num_rows * model.config.sequence_len * world_size / seconds[repeats // 2]


def say_how_long(model: GPT, runtime: Runtime, num_rows: int, num_steps: int, step_tokens: int) -> None:
    """Print how long `num_steps` steps of `step_tokens` tokens take here, at the speed of a few micro-batches of
    `num_rows` rows. Not on a GPU, where these would be compiled first, and where the dry run says it."""
    if runtime.is_cuda or not num_steps:
        return
    tokens = num_steps * (step_tokens + OPTIMIZER_TOKENS * model.config.n_embd)
    seconds = tokens / measure_tokens_per_second(model, num_rows, runtime.world_size)
    print0(f"{num_steps:,} steps take about {time_in_words(seconds)} here")


def time_in_words(seconds: float) -> str:
    """`seconds` in the unit that suits them, in words."""
    for limit, unit, name in ((90, 1, "seconds"), (90 * 60, 60, "minutes"), (48 * 3600, 3600, "hours")):
        if seconds < limit:
            return f"{seconds / unit:.{int(unit > 1)}f} {name}"
    return f"{seconds / 86400:,.0f} days"


def _forward_backward(model: GPT, num_rows: int) -> float:
    """Run one micro-batch of random tokens, leaving no gradients. Returns the seconds it took."""
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
