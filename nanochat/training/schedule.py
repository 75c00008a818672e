"""What depends on the step or on the size of the run, as pure functions: rates, momentum, decay, horizon, batch size.

Sources: the scaling rules and constants are those of the public nanochat's d12 to d26 runs (its log, 2026); the
bounds for short runs and small batches are ours (dev/LOG.md).
"""

import math
from dataclasses import dataclass

REFERENCE_BATCH_TOKENS = 2**19  # the batch at which the learning rates were tuned
BATCH_EXPONENT = 0.383  # of the best batch size as a function of training tokens (Power Lines, arXiv 2505.13738)
MIN_BATCH_TOKENS = 2**12
MIN_LR_SCALE = 0.35  # the square root falls too far for small batches (dev/LOG.md, 4,096 tokens a step)
MAX_WARMUP_FRAC = 0.05  # of the run: 40 steps would otherwise eat a short one
MAX_DECAY_PER_STEP = 0.003  # of Muon's lr * weight_decay: the rule for long runs grows past 0.1 in short ones
MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90
MOMENTUM_RAMP_STEPS = 400


@dataclass(frozen=True)
class LRSchedule:
    """Rate multiplier of each step: linear up over `warmup_steps`, 1, linear down to `final_frac` over the last
    `warmdown_steps`. Steps count from 0 to `num_steps - 1`."""

    num_steps: int
    warmup_steps: int
    warmdown_steps: int
    final_frac: float

    def __call__(self, step: int) -> float:
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        return 1.0 - (1.0 - self.final_frac) * self.warmdown_progress(step)

    def warmdown_progress(self, step: int) -> float:
        """0 before the warm-down, 1 at the last step."""
        if not self.warmdown_steps:
            return 0.0
        done = step + 1 - (self.num_steps - self.warmdown_steps)
        return min(max(done / self.warmdown_steps, 0.0), 1.0)


def lr_schedule(
    num_steps: int, *, warmup_steps: int = 40, warmdown_frac: float = 0.65, final_frac: float = 0.05
) -> LRSchedule:
    """The schedule of a run of `num_steps`, its warm-up bounded to `MAX_WARMUP_FRAC` of them."""
    warmup = min(warmup_steps, int(MAX_WARMUP_FRAC * num_steps))
    return LRSchedule(num_steps, warmup, min(round(warmdown_frac * num_steps), num_steps - warmup), final_frac)


def muon_momentum(step: int, schedule: LRSchedule) -> float:
    """Rises over the first `MOMENTUM_RAMP_STEPS` steps, and falls again with the warm-down."""
    rise = min(step / MOMENTUM_RAMP_STEPS, 1.0)
    momentum = MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * rise
    return momentum + (min(MOMENTUM_END, momentum) - momentum) * schedule.warmdown_progress(step)


def decay_mult(step: int, num_steps: int) -> float:
    """Weight-decay multiplier: half a cosine, 1 at the first step, 0 at the end."""
    return 0.5 * (1.0 + math.cos(math.pi * step / max(1, num_steps)))


def best_batch_tokens(train_tokens: float, d12_tokens: float) -> int:
    """Total batch size, a power of two, for a run of `train_tokens`; `d12_tokens` are those of a d12 run with as many
    tokens per parameter, for which 2^19 is best."""
    exact = REFERENCE_BATCH_TOKENS * (train_tokens / d12_tokens) ** BATCH_EXPONENT
    return max(MIN_BATCH_TOKENS, 2 ** round(math.log2(exact)))


def batch_lr_scale(batch_tokens: int) -> float:
    """Learning rates go with the square root of the batch size, down to `MIN_LR_SCALE`."""
    return max(MIN_LR_SCALE, math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS))


def scaled_weight_decay(
    weight_decay: float, *, batch_tokens: int, train_tokens: float, d12_tokens: float, matrix_lr: float
) -> float:
    """Muon's weight decay for a run of this size, tuned as `weight_decay` for d12 at the reference batch.

    `matrix_lr` is the scaled peak rate. Their product stays below `MAX_DECAY_PER_STEP`, unless it is above it for
    `weight_decay` as it is: then that is the bound.
    """
    scaled = weight_decay * batch_lr_scale(batch_tokens) * d12_tokens / train_tokens
    bound = max(weight_decay * matrix_lr, MAX_DECAY_PER_STEP)
    return scaled if scaled * matrix_lr <= bound else bound / matrix_lr
