"""What depends on the step or the size of a run, as pure functions: rates, momentum, weight decay, batch size.

The scaling rules and constants are those of the public nanochat's d12 to d26 runs (its log, 2026); the bounds for short
runs and small batches are ours (dev/LOG.md).
"""

import math

REFERENCE_BATCH_TOKENS = 2**19  # the batch at which the learning rates were tuned
BATCH_EXPONENT = 0.383  # of the best batch size as a function of training tokens (Power Lines, arXiv 2505.13738)
MIN_BATCH_TOKENS = 2**12
MIN_LR_SCALE = 0.35  # the square root falls too far for small batches (dev/LOG.md, 4,096 tokens a step)
MAX_WARMUP_FRAC = 0.05  # of the run, as 40 steps would be most of a short one
MAX_DECAY_PER_STEP = 0.003  # of Muon's lr * weight_decay, as the rule for long runs gives more than 0.1 in short ones
MOMENTUM_START, MOMENTUM_PEAK, MOMENTUM_END = 0.85, 0.97, 0.90
MOMENTUM_RAMP_STEPS = 400


class LRSchedule:
    """Rate multiplier of the steps 0 to `num_steps` - 1: linear up over `warmup_steps` (at most `MAX_WARMUP_FRAC` of
    the run), then 1, then linear down to `final_frac` over the last `warmdown_frac` of the run."""

    def __init__(
        self, num_steps: int, *, warmup_steps: int = 40, warmdown_frac: float = 0.65, final_frac: float = 0.05
    ):
        self.num_steps, self.final_frac = num_steps, final_frac
        self.warmup_steps = min(warmup_steps, int(MAX_WARMUP_FRAC * num_steps))
        self.warmdown_steps = min(round(warmdown_frac * num_steps), num_steps - self.warmup_steps)

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


def muon_momentum(step: int, schedule: LRSchedule) -> float:
    """Muon's momentum: rises over the first `MOMENTUM_RAMP_STEPS` steps, and falls during the warm-down."""
    rise = min(step / MOMENTUM_RAMP_STEPS, 1.0)
    momentum = MOMENTUM_START + (MOMENTUM_PEAK - MOMENTUM_START) * rise
    return momentum + (min(MOMENTUM_END, momentum) - momentum) * schedule.warmdown_progress(step)


def decay_mult(step: int, num_steps: int) -> float:
    """Weight-decay multiplier: half a cosine, 1 at the first step, 0 at the end."""
    return 0.5 * (1.0 + math.cos(math.pi * step / max(1, num_steps)))


def best_batch_tokens(train_tokens: float, d12_tokens: float) -> int:
    """Tokens of an optimizer step, a power of two, for a run of `train_tokens`; `d12_tokens` are those of a d12 run
    with the same tokens per parameter, for which 2^19 is best."""
    exact = REFERENCE_BATCH_TOKENS * (train_tokens / d12_tokens) ** BATCH_EXPONENT
    return max(MIN_BATCH_TOKENS, 2 ** round(math.log2(exact)))


def batch_lr_scale(batch_tokens: int) -> float:
    """Learning rates go with the square root of the batch size, down to `MIN_LR_SCALE`."""
    return max(MIN_LR_SCALE, math.sqrt(batch_tokens / REFERENCE_BATCH_TOKENS))


def scaled_weight_decay(
    weight_decay: float, *, batch_tokens: int, train_tokens: float, d12_tokens: float, matrix_lr: float
) -> float:
    """Muon's weight decay for a run of this size, if `weight_decay` is right for d12 at the reference batch.

    Its product with `matrix_lr`, the scaled peak rate, is at most `MAX_DECAY_PER_STEP` or what it is without scaling,
    whichever is more.
    """
    scaled = weight_decay * batch_lr_scale(batch_tokens) * d12_tokens / train_tokens
    bound = max(weight_decay * matrix_lr, MAX_DECAY_PER_STEP)
    return scaled if scaled * matrix_lr <= bound else bound / matrix_lr
