"""The arithmetic of plans and estimates, against numbers worked out by hand and published ones."""

import math
from functools import partial

import pytest
import torch

from nanochat import hardware
from nanochat.common import UserError
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.training import recipe
from nanochat.training.recipe import estimate, horizon_tokens, make_plan, scaling_parameters
from nanochat.training.schedule import MIN_BATCH_TOKENS


def config(depth=12, **other) -> GPTConfig:
    return GPTConfig.from_depth(depth, **{"vocab_size": 32768, "sequence_len": 2048, **other})


# --- counts and horizon ---
def test_october_2025_counts_every_parameter_takes_20_tokens_for_each_and_is_scaled_from_its_own_d12():
    october, d12 = GPTConfig.october_2025(20), GPTConfig.october_2025(12)
    assert scaling_parameters(october) == recipe.count_model(october).parameter_counts()["total"] == 560_988_160
    assert horizon_tokens(october) == horizon_tokens(october, token_ratio=20) == 11_219_763_200
    plan = make_plan(october, train_tokens=horizon_tokens(october), total_batch_tokens=2**19)
    assert plan.num_steps == 21_400  # as that release's report says
    assert plan.lr_scale == 1.0
    plan = make_plan(d12, train_tokens=horizon_tokens(d12))
    assert plan.total_batch_tokens == 2**19
    assert plan.matrix_weight_decay == pytest.approx(recipe.MATRIX_WEIGHT_DECAY, rel=1e-3)


def test_the_horizon_follows_from_each_kind_of_budget_and_counts_matrices_and_head_without_padding():
    small = config(4, vocab_size=1000, head_dim=64)
    matrices = 4 * 12 * 256 * 256 + 2 * 12 * 4  # blocks of 12 C^2, and the gates of the value embeddings
    assert scaling_parameters(small) == matrices + 1000 * 256
    assert horizon_tokens(small) == recipe.TOKEN_RATIO * scaling_parameters(small)
    assert horizon_tokens(small, token_ratio=3) == 3 * scaling_parameters(small)
    assert horizon_tokens(small, minutes=10, tokens_per_second=1000) == 600_000
    model = recipe.count_model(small)
    assert model.wte.weight.is_meta
    assert horizon_tokens(small, target_flops=5e6 * model.flops_per_token()) == pytest.approx(5e6)


# --- plans ---
@pytest.mark.parametrize("ratio", [None, 20])
def test_d12_is_the_reference_at_any_ratio(ratio):
    plan = make_plan(config(12), train_tokens=horizon_tokens(config(12), token_ratio=ratio), token_ratio=ratio)
    assert (plan.total_batch_tokens, plan.lr_scale) == (2**19, 1.0)
    assert plan.num_steps == int((ratio or recipe.TOKEN_RATIO) * scaling_parameters(config(12)) / 2**19)
    assert plan.matrix_weight_decay == pytest.approx(recipe.MATRIX_WEIGHT_DECAY, rel=1e-3)


def test_larger_models_get_larger_batches_and_less_weight_decay():
    plans = [make_plan(config(depth), train_tokens=horizon_tokens(config(depth))) for depth in (6, 12, 20, 26)]
    batches, decays = (
        [getattr(plan, name) for plan in plans] for name in ("total_batch_tokens", "matrix_weight_decay")
    )
    assert batches == sorted(batches)
    assert batches[2] == 2**20  # 2^19 * (477M / 110M) ** 0.383 = 2^19.8
    assert decays[1:] == sorted(decays[1:], reverse=True)


@pytest.mark.parametrize("train_tokens", [5e3, 1e5, 1e6, 3e7, 1e9])
@pytest.mark.parametrize("depth", [2, 4, 8])
def test_a_short_run_takes_a_smaller_batch_before_it_takes_fewer_steps(train_tokens, depth):
    plan = make_plan(config(depth, sequence_len=256), train_tokens=train_tokens, batch_multiple=256)
    assert plan.total_batch_tokens & (plan.total_batch_tokens - 1) == 0
    assert plan.num_steps >= recipe.MIN_STEPS or plan.total_batch_tokens == MIN_BATCH_TOKENS
    assert 0 <= train_tokens - plan.train_tokens < plan.total_batch_tokens


@pytest.mark.parametrize("batch_multiple", [2048, 3 * 2048, 8 * 2048, 5000, 8 * 65536])
def test_the_chosen_batch_is_a_whole_number_of_rows_on_every_rank(batch_multiple):
    for train_tokens in (2e6, 1e9, 2e10):
        plan = make_plan(config(12), train_tokens=train_tokens, batch_multiple=batch_multiple)
        assert plan.total_batch_tokens % batch_multiple == 0
        assert plan.total_batch_tokens >= batch_multiple


def test_a_given_batch_and_number_of_steps_are_taken_as_they_are_and_one_alone_is_completed_or_refused():
    plan = make_plan(config(4), num_steps=7, total_batch_tokens=200_001, lr_mult=2.0)
    assert (plan.num_steps, plan.total_batch_tokens, plan.train_tokens) == (7, 200_001, 1_400_007)
    assert plan.lr_scale == pytest.approx(2.0 * math.sqrt(200_001 / 2**19))
    usual = make_plan(config(12), train_tokens=horizon_tokens(config(12)))
    assert make_plan(config(12), num_steps=20).total_batch_tokens == usual.total_batch_tokens
    assert make_plan(config(4), train_tokens=1e7, lr_mult=0.0).lr_scale == 0.0
    words = r"the budget is 1e\+03 tokens, less than one batch of 4096.*--total-batch-size"
    with pytest.raises(UserError, match=words):
        make_plan(config(4), train_tokens=1000)


# --- shards ---
def test_shards_hold_the_text_of_all_tokens_and_little_more_as_in_the_first_releases_runs():
    d20, d32 = (horizon_tokens(GPTConfig.october_2025(depth)) for depth in (20, 32))
    assert math.ceil(d20 * recipe.CHARS_PER_TOKEN / recipe.SHARD_CHARS) == 216
    assert (recipe.shards_for(1.0), recipe.shards_for(d20), recipe.shards_for(d32)) == (1, 240, 800)
    previous = 0
    for tokens in [10**n * k for n in range(5, 12) for k in (1, 1.5, 2, 3, 5, 7, 9.5)]:
        shards = recipe.shards_for(tokens)
        exact = tokens * recipe.CHARS_PER_TOKEN / recipe.SHARD_CHARS
        assert max(previous, exact * (1 + recipe.SPARE_SHARDS_FRAC)) <= shards <= exact * 1.1 * 1.1 + 1
        assert len(str(shards).rstrip("0")) <= 2
        previous = shards


# --- memory ---
def test_memory_is_what_was_measured():
    """On one H100, depth 12, full attention, 32 rows: 26.2 GiB (docs/results.md). The loss then had 1 GiB of the logits
    in flight; and two gradients of the head, of 0.1 GiB each."""
    measured = 26.2 * 2**30 - (2**30 - recipe.LOGIT_BYTES) - 0.1 * 2**30
    full = config(12, window_pattern="L")
    assert recipe.training_bytes(full, num_gpus=1, device_batch_size=32) == pytest.approx(measured, rel=0.03)


def test_memory_is_a_little_more_than_the_first_release_measured():
    """75,422 MiB, say reports of its d20 on 8 H100 with 32 rows: with logits and their gradients of the whole batch."""
    october = GPTConfig.october_2025(20)
    needed = recipe.training_bytes(october, num_gpus=8, device_batch_size=32)
    logits = 2 * (32 * 2048 * 65536 * 2)
    assert 1.0 < (needed - recipe.LOGIT_BYTES + logits) / (75_422 * 2**20) < 1.1


def test_d24_fits_80_gb_with_16_rows_and_with_mlps_made_again_a_card_of_24_gb_takes_more_rows():
    fits = partial(recipe.fitting_rows, num_gpus=1, wanted=32)
    assert fits(config(24), memory_bytes=80 << 30) == 16
    rows = [fits(config(16), memory_bytes=24 << 30, recompute=recompute) for recompute in (False, True)]
    assert rows == [8, 16]
    needed = [recipe.training_bytes(config(24), num_gpus=1, device_batch_size=1, recompute=r) for r in (False, True)]
    assert needed[1] < needed[0]


def test_rows_are_halved_until_they_fit():
    d32 = config(32)
    h100 = hardware.memory_bytes("H100 80GB HBM3")
    rows = recipe.fitting_rows(d32, num_gpus=8, memory_bytes=h100, wanted=32)
    assert rows == 8  # as many as the first release's d32 had
    needed = [recipe.training_bytes(d32, num_gpus=8, device_batch_size=n) for n in (rows, 2 * rows)]
    assert needed[0] <= recipe.usable_bytes(h100) < needed[1]
    assert recipe.fitting_rows(d32, num_gpus=1, memory_bytes=24 << 30, wanted=32) == 0
    assert recipe.fitting_rows(config(4), num_gpus=1, memory_bytes=h100, wanted=5) == 5


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Dynamo detected a call")
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("derive", [GPTConfig.from_depth, GPTConfig.october_2025])
def test_activations_are_what_autograd_keeps_of_the_compiled_trunk(derive, recompute):
    """On a CPU, with the partition between forward and backward that a compiled model has on a GPU."""
    shape = {"vocab_size": 64, "sequence_len": 256, "head_dim": 64, "n_embd": 64, "n_head": 1, "n_kv_head": 1}
    models = [derive(layers, window_pattern="L", **shape) for layers in (4, 8)]
    channel_bytes = recipe.RECOMPUTED_LAYER_BYTES if recompute else recipe.LAYER_BYTES
    channel_bytes += recipe.VALUE_EMBED_BYTES / 2 * models[0].value_embeds
    kept = [kept_bytes(config, recompute) for config in models]
    copies = 2 * (4 if recompute else 12) * 64 * 64  # bfloat16
    assert ((kept[1] - kept[0]) / 4 - copies) / (2 * 256 * 64) == pytest.approx(channel_bytes, rel=0.03)


def kept_bytes(config: GPTConfig, recompute: bool) -> int:
    """Bytes of all storages saved for the backward of two rows, but for parameters."""
    model = build_model(config, compute_dtype=torch.bfloat16, generator=torch.Generator().manual_seed(0))
    if recompute:
        model.recompute_mlps()
    idx = torch.zeros(2, config.sequence_len, dtype=torch.int64)
    torch._dynamo.reset()
    trunk = torch.compile(model.trunk, dynamic=False, backend="aot_eager_decomp_partition")
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        hidden = trunk(idx, *model.rotary(config.sequence_len))
    assert hidden.requires_grad
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in saved}
    return sum(size for pointer, size in storages.items() if pointer not in own)


# --- estimates ---
def d20_estimate(**other):
    d20 = config(20)
    plan = make_plan(d20, train_tokens=horizon_tokens(d20))
    known = {"num_gpus": 8, "device_batch_size": 32, "peak_flops": 989e12, "gpu_hour_dollars": 3.0}
    return d20, plan, estimate(d20, plan, **{**known, **other})


def test_d20_on_eight_gpus_costs_what_arithmetic_says_and_on_one_as_much_in_more_time():
    d20, plan, needs = d20_estimate()
    flops = recipe.count_model(d20).flops_per_token() * plan.train_tokens
    assert needs.hours == pytest.approx(flops / (8 * 989e12 * recipe.EXPECTED_MFU * 3600))
    assert needs.total_hours == pytest.approx(needs.hours + needs.mid_hours + recipe.OTHER_H100_HOURS / 8)
    assert needs.dollars == pytest.approx(needs.total_hours * 8 * 3.0)
    assert 0.5 < needs.hours < 3.0
    assert needs.mid_hours == pytest.approx(needs.hours * recipe.MID_TOKENS / plan.train_tokens)
    assert needs.num_shards == recipe.shards_for(plan.train_tokens)
    assert needs.gpu_bytes == recipe.training_bytes(d20, num_gpus=8, device_batch_size=32)
    _, _, one = d20_estimate(num_gpus=1)
    assert (one.hours, one.dollars) == pytest.approx((8 * needs.hours, needs.dollars))
    assert one.gpu_bytes > needs.gpu_bytes > d20_estimate(device_batch_size=4)[2].gpu_bytes
    assert one.disk_bytes == needs.disk_bytes


def test_the_disk_holds_the_shards_and_every_checkpoint():
    d20, plan, last_only = d20_estimate()
    _, _, often = d20_estimate(save_every=1000)
    assert plan.num_steps == 4150
    assert (last_only.num_checkpoints, often.num_checkpoints) == (3, 7)  # with mid-training's and finetuning's
    counts = recipe.count_model(d20).parameter_counts()
    tables = counts["wte"] + counts["value_embeds"]
    weights = 2 * tables + 4 * counts["matrices"] + 4 * counts["head"]
    states = 4 * counts["matrices"] + 8 * (tables + counts["head"])
    assert often.disk_bytes - last_only.disk_bytes == 4 * (weights + states)
    assert last_only.disk_bytes == 93 * recipe.SHARD_BYTES + 3 * (weights + states)


def test_an_unknown_peak_or_price_has_no_estimate_rather_than_zero_and_a_miniature_needs_one_shard():
    _, _, unknown = d20_estimate(peak_flops=hardware.peak_flops("a processor nobody listed", "bfloat16"))
    assert unknown.hours is unknown.dollars is None
    _, _, unpriced = d20_estimate(gpu_hour_dollars=None)
    assert unpriced.hours > 0
    assert unpriced.dollars is None
    known = {"num_gpus": 1, "device_batch_size": 8, "peak_flops": None, "gpu_hour_dollars": None}
    assert estimate(config(2, sequence_len=128), recipe.Plan(100, 4096, 1.0, 0.1), **known).num_shards == 1
