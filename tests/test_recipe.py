"""The arithmetic of plans and estimates, against numbers worked out by hand and published ones."""

import math

import pytest

from nanochat import hardware, recipe
from nanochat.common import UserError
from nanochat.gpt import GPTConfig
from nanochat.recipe import MIN_STEPS, TOKEN_RATIO, Plan, estimate, horizon_tokens, make_plan, scaling_parameters
from nanochat.schedule import MIN_BATCH_TOKENS


def config(depth=12, **other) -> GPTConfig:
    return GPTConfig.from_depth(depth, **{"vocab_size": 32768, "sequence_len": 2048, **other})


# --- counts and horizon ---


def test_october_2025_d20_takes_11_2_billion_tokens_at_20_per_parameter():
    counts = recipe.count_model(GPTConfig.october_2025(20)).parameter_counts()
    assert counts["total"] == 560_988_160
    assert 20 * counts["total"] == 11_219_763_200
    plan = make_plan(GPTConfig.october_2025(20), train_tokens=20 * counts["total"], total_batch_tokens=2**19)
    assert plan.num_steps == 11_219_763_200 // 2**19 == 21_400
    assert round(plan.train_tokens / 1e9, 1) == 11.2


def test_scaling_parameters_are_those_of_matrices_and_head_without_padding():
    small = config(4, vocab_size=1000, head_dim=64)
    matrices = 4 * 12 * 256 * 256 + 2 * 12 * 4  # blocks of 12 C^2, and the gates of the value embeddings
    assert scaling_parameters(small) == matrices + 1000 * 256


def test_the_horizon_follows_from_each_kind_of_budget():
    small = config(4)
    assert horizon_tokens(small) == TOKEN_RATIO * scaling_parameters(small)
    assert horizon_tokens(small, token_ratio=3) == 3 * scaling_parameters(small)
    assert horizon_tokens(small, minutes=10, tokens_per_second=1000) == 600_000
    flops = recipe.count_model(small).flops_per_token()
    assert horizon_tokens(small, target_flops=5e6 * flops) == pytest.approx(5e6)


def test_parameter_arithmetic_makes_no_storage():
    assert recipe.count_model(config(26)).wte.weight.is_meta


# --- plans ---


def test_d12_at_the_usual_ratio_is_the_reference():
    plan = make_plan(config(12), train_tokens=horizon_tokens(config(12)))
    assert plan.total_batch_tokens == 2**19
    assert plan.lr_scale == 1.0
    assert plan.num_steps == int(TOKEN_RATIO * scaling_parameters(config(12)) / 2**19)
    assert plan.matrix_weight_decay == pytest.approx(recipe.MATRIX_WEIGHT_DECAY, rel=1e-3)


def test_d12_at_another_ratio_is_scaled_from_d12_at_that_ratio():
    plan = make_plan(config(12), train_tokens=horizon_tokens(config(12), token_ratio=20), token_ratio=20)
    assert plan.total_batch_tokens == 2**19
    assert plan.matrix_weight_decay == pytest.approx(recipe.MATRIX_WEIGHT_DECAY, rel=1e-3)


def test_larger_models_get_larger_batches_and_less_weight_decay():
    plans = [make_plan(config(depth), train_tokens=horizon_tokens(config(depth))) for depth in (6, 12, 20, 26)]
    assert [plan.total_batch_tokens for plan in plans] == sorted(plan.total_batch_tokens for plan in plans)
    decays = [plan.matrix_weight_decay for plan in plans[1:]]
    assert decays == sorted(decays, reverse=True)
    assert plans[2].total_batch_tokens == 2**20  # 2^19 * (477M / 110M) ** 0.383 = 2^19.8


@pytest.mark.parametrize("train_tokens", [5e3, 1e5, 1e6, 3e7, 1e9])
@pytest.mark.parametrize("depth", [2, 4, 8])
def test_a_short_run_takes_a_smaller_batch_before_it_takes_fewer_steps(train_tokens, depth):
    plan = make_plan(config(depth, sequence_len=256), train_tokens=train_tokens, batch_multiple=256)
    assert plan.total_batch_tokens & (plan.total_batch_tokens - 1) == 0
    assert plan.num_steps >= MIN_STEPS or plan.total_batch_tokens == MIN_BATCH_TOKENS
    assert 0 <= train_tokens - plan.train_tokens < plan.total_batch_tokens


@pytest.mark.parametrize("batch_multiple", [2048, 3 * 2048, 8 * 2048, 5000, 8 * 65536])
def test_the_chosen_batch_is_a_whole_number_of_rows_on_every_rank(batch_multiple):
    for train_tokens in (2e6, 1e9, 2e10):
        plan = make_plan(config(12), train_tokens=train_tokens, batch_multiple=batch_multiple)
        assert plan.total_batch_tokens % batch_multiple == 0
        assert plan.total_batch_tokens >= batch_multiple


def test_a_given_batch_and_number_of_steps_are_taken_as_they_are():
    plan = make_plan(config(4), num_steps=7, total_batch_tokens=200_001, lr_mult=2.0)
    assert (plan.num_steps, plan.total_batch_tokens, plan.train_tokens) == (7, 200_001, 1_400_007)
    assert plan.lr_scale == pytest.approx(2.0 * math.sqrt(200_001 / 2**19))


def test_a_number_of_steps_alone_gets_the_batch_of_a_usual_run():
    usual = make_plan(config(12), train_tokens=horizon_tokens(config(12)))
    assert make_plan(config(12), num_steps=20).total_batch_tokens == usual.total_batch_tokens


def test_a_budget_below_one_batch_is_refused():
    with pytest.raises(
        UserError, match=r"the budget is 1e\+03 tokens, less than one batch of 4096.*--total-batch-size"
    ):
        make_plan(config(4), train_tokens=1000)


def test_a_rate_of_zero_still_makes_a_plan():
    assert make_plan(config(4), train_tokens=1e7, lr_mult=0.0).lr_scale == 0.0


# --- estimates ---


def d20_estimate(**other):
    d20 = config(20)
    plan = make_plan(d20, train_tokens=horizon_tokens(d20))
    known = {"num_gpus": 8, "device_batch_size": 32, "peak_flops": 989e12, "gpu_hour_dollars": 3.0}
    return d20, plan, estimate(d20, plan, **{**known, **other})


def test_d20_on_eight_gpus_costs_what_arithmetic_says():
    d20, plan, needs = d20_estimate()
    flops = recipe.count_model(d20).flops_per_token() * plan.train_tokens
    assert needs.hours == pytest.approx(flops / (8 * 989e12 * recipe.EXPECTED_MFU * 3600))
    assert needs.dollars == pytest.approx(needs.hours * 8 * 3.0)
    assert 0.5 < needs.hours < 3.0
    assert needs.num_shards == math.ceil(plan.train_tokens * recipe.CHARS_PER_TOKEN / recipe.SHARD_CHARS)
    assert needs.disk_bytes > needs.num_shards * recipe.SHARD_BYTES
    assert 10e9 < needs.gpu_bytes < 141e9


def test_more_gpus_take_less_time_for_the_same_money_and_hold_less_state_each():
    _, _, one = d20_estimate(num_gpus=1)
    _, _, eight = d20_estimate(num_gpus=8)
    assert one.hours == pytest.approx(8 * eight.hours)
    assert one.dollars == pytest.approx(eight.dollars)
    assert one.gpu_bytes > eight.gpu_bytes
    assert one.disk_bytes == eight.disk_bytes


def test_a_larger_device_batch_takes_more_memory():
    assert d20_estimate(device_batch_size=32)[2].gpu_bytes > d20_estimate(device_batch_size=4)[2].gpu_bytes


def test_an_unknown_peak_or_price_has_no_estimate_rather_than_zero():
    peak = hardware.peak_flops("a processor nobody listed", "bfloat16")
    _, _, unknown = d20_estimate(peak_flops=peak)
    assert unknown.hours is None
    assert unknown.dollars is None
    _, _, unpriced = d20_estimate(gpu_hour_dollars=None)
    assert unpriced.hours > 0
    assert unpriced.dollars is None


def test_a_miniature_needs_one_shard():
    small = config(2, sequence_len=128)
    needs = estimate(
        small, Plan(100, 4096, 1.0, 0.1), num_gpus=1, device_batch_size=8, peak_flops=None, gpu_hour_dollars=None
    )
    assert needs.num_shards == 1
