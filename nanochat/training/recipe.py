"""From a model and a budget to the numbers of its run: tokens, batch, steps, rates, disk, memory, hours, dollars.

All of it is arithmetic on counts. Not here: training, printing, and what this machine has.
"""

import math
from dataclasses import dataclass

from nanochat.common import UserError
from nanochat.model.gpt import GPT, GPTConfig, build_model
from nanochat.training import schedule
from nanochat.training.optim import MATRIX_LR, MATRIX_WEIGHT_DECAY

TOKEN_RATIO = 10.0  # training tokens per parameter of `scaling_parameters`; 8 to 12 are about equally cost-effective
OCTOBER_TOKEN_RATIO = 20.0  # of the first release, which counted every parameter
REFERENCE_DEPTH = 12  # where learning rates, batch size and weight decay were tuned
MIN_STEPS = 400  # a short run takes a smaller batch rather than fewer steps than this

CHARS_PER_TOKEN = 4.8  # the first release's figure for FineWeb-Edu and 65,536 tokens; smaller vocabularies pack less
SHARD_CHARS = 250_000_000  # text in one shard of the default data sets
SHARD_BYTES = 100_000_000  # size of such a shard on disk
SPARE_SHARDS_FRAC = 0.1  # a run that is short of text reads some of it twice
EXPECTED_MFU = 0.45  # by our count, 8 H100 reached 0.44 with the first release's d20 and 0.475 with its d32
MID_TOKENS = 809 * 2**19  # of mid-training: the steps of the first release, with spelling tasks, on the same mixture
# Tokenizer, finetuning, evaluation: 8 GPUs for 51 minutes. That is what the first release's run took beside pretraining
# and mid-training: 3 h 51 min in all, 2 h 52 min of it pretraining.
OTHER_H100_HOURS = 6.8
H100_PEAK_FLOPS = 989e12  # bfloat16, dense
STAGES_AFTER = 2  # mid-training and finetuning, each of which leaves a checkpoint of the same size

# Bytes per token and channel that a compiled trunk holds at its peak (dev/LOG.md, memory of a training step)
LAYER_BYTES = 36.2  # per layer: 18 values of bfloat16, and norms
RECOMPUTED_LAYER_BYTES = 18.2  # the same when the MLP is made again in backward
VALUE_EMBED_BYTES = 2  # more per layer with a value embedding
TRUNK_BYTES = 10.1  # once: before and after the layers, and what backward makes first
RECOMPUTE_BYTES = 30.1  # once: an MLP made again, and its gradients
LOGIT_BYTES = 1 << 28  # the piece of the logits in flight in the head
USABLE_MEMORY_FRAC = 0.92  # of the data sheet's memory, for tensors: drivers, kernels and fragmentation take the rest


@dataclass(frozen=True)
class Plan:
    """The numbers of a run that follow from model and horizon; stored in every checkpoint."""

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
    """The number of parameters that the token ratio multiplies: those of matrices and head, as tables cost no time; in
    the architecture of October 2025, without value embeddings, all of them, as that release counted."""
    counts = count_model(config).parameter_counts()
    return counts["matrices"] + config.vocab_size * config.n_embd if config.value_embeds else counts["total"]


def usual_token_ratio(config: GPTConfig) -> float:
    """Training tokens per parameter of `scaling_parameters` by default."""
    return TOKEN_RATIO if config.value_embeds else OCTOBER_TOKEN_RATIO


def horizon_tokens(
    config: GPTConfig, *, token_ratio: float | None = None, target_flops: float | None = None,
    tokens_per_second: float | None = None, minutes: float | None = None,
) -> float:  # fmt: skip
    """Training tokens for the budget given: FLOPs, minutes at a measured speed, or tokens per parameter."""
    if target_flops is not None:
        return target_flops / count_model(config).flops_per_token()
    if minutes is not None:
        assert tokens_per_second is not None
        return tokens_per_second * 60.0 * minutes
    return (usual_token_ratio(config) if token_ratio is None else token_ratio) * scaling_parameters(config)


def make_plan(
    config: GPTConfig, *, train_tokens: float | None = None, num_steps: int | None = None,
    token_ratio: float | None = None, total_batch_tokens: int = 0, batch_multiple: int = 1, lr_mult: float = 1.0,
    matrix_weight_decay: float = MATRIX_WEIGHT_DECAY,
) -> Plan:  # fmt: skip
    """Batch size, steps and scaled rates of a run of `train_tokens`, or of `num_steps`.

    Rates and weight decay are scaled from d12 trained on `token_ratio` tokens per parameter. Give the ratio of the run
    if it determined `train_tokens`; None is the usual one, so that a small budget counts as a short run.

    `total_batch_tokens` 0 takes the best power of two that leaves `MIN_STEPS` steps, rounded up to a multiple of
    `batch_multiple` tokens (one row on every rank). Raises `UserError` when the budget is less than one step.
    """
    same = {name: getattr(config, name) for name in ("vocab_size", "sequence_len", "value_embeds")}
    d12 = GPTConfig.from_depth(REFERENCE_DEPTH, **same)
    token_ratio = usual_token_ratio(config) if token_ratio is None else token_ratio
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
            remedy = "raise it, or lower --total-batch-size"
            raise UserError(
                f"the budget is {train_tokens:.3g} tokens, less than one batch of {total_batch_tokens}; {remedy}"
            )
    lr_scale = lr_mult * schedule.batch_lr_scale(total_batch_tokens)
    weight_decay = schedule.scaled_weight_decay(
        matrix_weight_decay, batch_tokens=total_batch_tokens, train_tokens=num_steps * total_batch_tokens,
        d12_tokens=d12_tokens, matrix_lr=MATRIX_LR * lr_scale,
    )  # fmt: skip
    return Plan(num_steps, total_batch_tokens, lr_scale, weight_decay)


@dataclass(frozen=True)
class Estimate:
    """What a plan needs on `num_gpus` GPUs.

    `num_shards` of text; disk for these and the checkpoints of all stages; memory of each GPU at a device batch of
    `device_batch_size` rows; hours of pretraining, of mid-training, and of all stages together, and what these cost in
    dollars. Hours and dollars are None if the peak or the price of the GPU is not known.
    """

    num_shards: int
    num_checkpoints: int
    disk_bytes: int
    gpu_bytes: int
    hours: float | None
    mid_hours: float | None
    total_hours: float | None
    dollars: float | None


def shards_for(train_tokens: float) -> int:
    """Training shards of the default data sets for this many tokens: a tenth to spare, rounded up to two significant
    digits. For the runs of the first release these are its 240 and 800 shards."""
    exact = math.ceil(train_tokens * CHARS_PER_TOKEN / SHARD_CHARS * (1 + SPARE_SHARDS_FRAC))
    unit = 10 ** max(0, len(str(exact)) - 2)
    return math.ceil(exact / unit) * unit


def training_bytes(config: GPTConfig, *, num_gpus: int, device_batch_size: int, recompute: bool = False) -> int:
    """Memory of one GPU while it trains in bfloat16: float32 matrices, head and states, bfloat16 tables, activations.

    The optimizer's state is sharded over the GPUs (`optim.py`), weights and gradients are not; of matrices and head
    there is a bfloat16 copy. `recompute` as the flag. Assumes that no window is computed in blocks (`attention.py`).
    """
    counts = count_model(config).parameter_counts()
    tables, matrices, head = counts["wte"] + counts["value_embeds"], counts["matrices"], counts["head"]
    weights = 2 * tables + 4 * (matrices + head)
    copies = 2 * (matrices + head)
    states = (8 * (tables + head) + 4 * matrices) / num_gpus  # two AdamW moments, one of Muon
    channel_bytes = TRUNK_BYTES + config.n_layer * (RECOMPUTED_LAYER_BYTES if recompute else LAYER_BYTES)
    channel_bytes += VALUE_EMBED_BYTES * config.num_value_embeds + RECOMPUTE_BYTES * recompute
    activations = device_batch_size * config.sequence_len * config.n_embd * channel_bytes
    return int(2 * weights + copies + states + activations + LOGIT_BYTES)


def fitting_rows(
    config: GPTConfig, *, num_gpus: int, memory_bytes: int, wanted: int, recompute: bool = False
) -> int:  # fmt: skip
    """The first of `wanted`, half of it, ... rows that fit in a GPU's usable memory; 0 if not even one does."""
    shape = {"num_gpus": num_gpus, "recompute": recompute}
    while wanted and training_bytes(config, device_batch_size=wanted, **shape) > usable_bytes(memory_bytes):
        wanted //= 2
    return wanted


def usable_bytes(memory_bytes: int) -> int:
    """Memory left for tensors, of that in a GPU's data sheet."""
    return int(USABLE_MEMORY_FRAC * memory_bytes)


def estimate(
    config: GPTConfig, plan: Plan, *, num_gpus: int, device_batch_size: int, peak_flops: float | None,
    gpu_hour_dollars: float | None, save_every: int = 0, recompute: bool = False,
) -> Estimate:  # fmt: skip
    """What `plan` needs, from counts and the constants above; `save_every` and `recompute` as the flags."""
    model = count_model(config)
    counts = model.parameter_counts()
    num_shards = shards_for(plan.train_tokens)
    num_checkpoints = (math.ceil(plan.num_steps / save_every) if save_every else 1) + STAGES_AFTER
    tables = counts["wte"] + counts["value_embeds"]
    checkpoint = 10 * tables + 12 * counts["head"] + 8 * counts["matrices"]  # weights and optimizer state
    hours = mid_hours = total_hours = dollars = None
    if peak_flops:
        hours_per_token = model.flops_per_token() / (peak_flops * EXPECTED_MFU * num_gpus) / 3600
        hours, mid_hours = hours_per_token * plan.train_tokens, hours_per_token * MID_TOKENS
        total_hours = hours + mid_hours + OTHER_H100_HOURS * H100_PEAK_FLOPS / peak_flops / num_gpus
        dollars = total_hours * num_gpus * gpu_hour_dollars if gpu_hour_dollars else None
    disk_bytes = (num_shards + 1) * SHARD_BYTES + num_checkpoints * checkpoint
    gpu_bytes = training_bytes(config, num_gpus=num_gpus, device_batch_size=device_batch_size, recompute=recompute)
    return Estimate(num_shards, num_checkpoints, disk_bytes, gpu_bytes, hours, mid_hours, total_hours, dollars)
