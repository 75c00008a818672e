"""From a model and a budget to the numbers of its run: tokens, batch, steps, rates, disk, memory, hours, dollars.

Everything here is arithmetic on counts; nothing trains, prints or looks at the machine.
"""

import math
from dataclasses import dataclass

from nanochat import schedule
from nanochat.common import UserError
from nanochat.gpt import GPT, GPTConfig, build_model

TOKEN_RATIO = 10.0  # training tokens per matrix and head parameter; 8 to 12 are about equally good for the money
REFERENCE_DEPTH = 12  # where learning rates, batch size and weight decay were tuned
MIN_STEPS = 400  # a short run takes a smaller batch rather than fewer steps than this
MATRIX_WEIGHT_DECAY = 0.28
MATRIX_LR = 0.02

CHARS_PER_TOKEN = 4.5  # of English web text with a vocabulary of 32,768, somewhat low to be on the safe side
SHARD_CHARS = 250_000_000  # text in one shard of the default data sets
SHARD_BYTES = 100_000_000  # and what it takes on the disk
EXPECTED_MFU = 0.45  # for the estimate of hours; the run prints what it really reaches
ACTIVATION_BYTES_PER_CHANNEL = 34  # per token and layer, kept for backward: 17 bfloat16 values (counted by hand)
LOGIT_BYTES = 1 << 30  # the pieces of the vocabulary head at work


@dataclass(frozen=True)
class Plan:
    """The numbers of one pretraining run that follow from model and horizon; stored with every checkpoint."""

    num_steps: int
    total_batch_tokens: int
    lr_scale: float
    matrix_weight_decay: float

    @property
    def train_tokens(self) -> int:
        return self.num_steps * self.total_batch_tokens


def count_model(config: GPTConfig) -> GPT:
    """The model without storage, for its counts."""
    return build_model(config, device="meta")


def scaling_parameters(config: GPTConfig) -> int:
    """Matrix and head parameters: what the token ratio multiplies."""
    counts = count_model(config).parameter_counts()
    return counts["matrices"] + config.vocab_size * config.n_embd


def horizon_tokens(
    config: GPTConfig,
    *,
    token_ratio: float | None = None,
    target_flops: float | None = None,
    tokens_per_second: float | None = None,
    minutes: float | None = None,
) -> float:
    """Training tokens by whichever budget is given: FLOPs, minutes at a measured speed, or tokens per parameter."""
    if target_flops is not None:
        return target_flops / count_model(config).flops_per_token()
    if minutes is not None:
        assert tokens_per_second is not None
        return tokens_per_second * 60.0 * minutes
    return (TOKEN_RATIO if token_ratio is None else token_ratio) * scaling_parameters(config)


def make_plan(
    config: GPTConfig,
    *,
    train_tokens: float | None = None,
    num_steps: int | None = None,
    token_ratio: float | None = None,
    total_batch_tokens: int = 0,
    batch_multiple: int = 1,
    lr_mult: float = 1.0,
    matrix_weight_decay: float = MATRIX_WEIGHT_DECAY,
) -> Plan:
    """Batch size, steps and scaled rates of a run of `train_tokens`, or of `num_steps`.

    They are scaled from d12 trained on `token_ratio` tokens per parameter: give the run's own where that fixed
    `train_tokens`. None is `TOKEN_RATIO`, so that a budget short for the model counts as short.

    `total_batch_tokens` 0 takes the best power of two, at least `batch_multiple` tokens (one row on every rank) and
    small enough for `MIN_STEPS`; else it is taken as it is. Raises `UserError` when the budget is not one step.
    """
    d12 = GPTConfig.from_depth(REFERENCE_DEPTH, vocab_size=config.vocab_size, sequence_len=config.sequence_len)
    token_ratio = TOKEN_RATIO if token_ratio is None else token_ratio
    d12_tokens = token_ratio * scaling_parameters(d12)
    assert train_tokens is not None or num_steps is not None
    if not total_batch_tokens:
        usual_tokens = token_ratio * scaling_parameters(config)
        total_batch_tokens = schedule.best_batch_tokens(train_tokens or usual_tokens, d12_tokens)
        if train_tokens is not None:
            total_batch_tokens = min(total_batch_tokens, 2 ** int(math.log2(max(1.0, train_tokens / MIN_STEPS))))
        total_batch_tokens = max(total_batch_tokens, batch_multiple, schedule.MIN_BATCH_TOKENS)
        total_batch_tokens = -(-total_batch_tokens // batch_multiple) * batch_multiple
    if num_steps is None:
        num_steps = int(train_tokens // total_batch_tokens)
        if num_steps < 1:
            raise UserError(
                f"the budget is {train_tokens:.3g} tokens, less than one batch of {total_batch_tokens}; "
                f"raise it, or lower --total-batch-size"
            )
    lr_scale = lr_mult * schedule.batch_lr_scale(total_batch_tokens)
    weight_decay = schedule.scaled_weight_decay(
        matrix_weight_decay, batch_tokens=total_batch_tokens, train_tokens=num_steps * total_batch_tokens,
        d12_tokens=d12_tokens, matrix_lr=MATRIX_LR * lr_scale,
    )  # fmt: skip
    return Plan(num_steps, total_batch_tokens, lr_scale, weight_decay)


@dataclass(frozen=True)
class Estimate:
    """What a plan needs on `num_gpus` GPUs: shards of text, disk and memory in bytes, hours, dollars.

    Hours and dollars are None where the GPU's peak or price is not known. Memory is per GPU, at a device batch of
    `device_batch_size` rows.
    """

    num_shards: int
    disk_bytes: int
    gpu_bytes: int
    hours: float | None
    dollars: float | None


def estimate(
    config: GPTConfig,
    plan: Plan,
    *,
    num_gpus: int,
    device_batch_size: int,
    peak_flops: float | None,
    gpu_hour_dollars: float | None,
) -> Estimate:
    """Arithmetic from counts and the constants above, bfloat16 activations and tables, float32 matrices and states."""
    model = count_model(config)
    counts = model.parameter_counts()
    num_shards = math.ceil(plan.train_tokens * CHARS_PER_TOKEN / SHARD_CHARS)
    tables, matrices = counts["wte"] + counts["value_embeds"], counts["matrices"] + counts["head"]
    weights = 2 * tables + 4 * matrices
    states = (8 * (tables + counts["head"]) + 4 * counts["matrices"]) / num_gpus  # two AdamW moments, one of Muon
    rows = device_batch_size * config.sequence_len
    activations = rows * config.n_layer * config.n_embd * ACTIVATION_BYTES_PER_CHANNEL
    checkpoint = weights + 8 * (tables + counts["head"]) + 4 * counts["matrices"]
    hours = dollars = None
    if peak_flops:
        flops = model.flops_per_token() * plan.train_tokens
        hours = flops / (peak_flops * EXPECTED_MFU * num_gpus) / 3600
        dollars = hours * num_gpus * gpu_hour_dollars if gpu_hour_dollars else None
    return Estimate(
        num_shards=num_shards,
        disk_bytes=int((num_shards + 1) * SHARD_BYTES + 2 * checkpoint),
        gpu_bytes=int(2 * weights + states + activations + LOGIT_BYTES),
        hours=hours,
        dollars=dollars,
    )
