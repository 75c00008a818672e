"""Properties of the schedules over every length of run, and the scaling rules by hand."""

import math

import pytest

from nanochat.training import schedule as rules
from nanochat.training.schedule import LRSchedule, batch_lr_scale, best_batch_tokens, decay_mult, muon_momentum

LENGTHS = [*range(1, 60), 99, 100, 400, 801, 2500, 7001]
SHAPES = [{}, {"warmup_steps": 0}, {"warmdown_frac": 1.0, "final_frac": 0.0}, {"warmup_steps": 5000}]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_rate_is_full_at_the_end_of_the_warmup_and_only_falls_from_there(shape):
    final_frac = shape.get("final_frac", 0.05)
    for num_steps in LENGTHS:
        schedule = LRSchedule(num_steps, **shape)
        rates = [schedule(step) for step in range(num_steps)]
        assert 0 <= schedule.warmup_steps <= rules.MAX_WARMUP_FRAC * num_steps
        if schedule.warmup_steps:
            assert rates[schedule.warmup_steps - 1] == 1.0
            warmup = rates[: schedule.warmup_steps]
            assert warmup == sorted(warmup)
            assert warmup[0] > 0.0
        after = rates[schedule.warmup_steps :]
        assert after == sorted(after, reverse=True)
        assert all(0.0 <= rate <= 1.0 for rate in rates)
        assert rates[-1] == pytest.approx(final_frac, abs=1e-12)


@pytest.mark.parametrize("num_steps", [100, 1000, 3333])
def test_the_rate_falls_evenly_over_the_share_asked_for_and_without_one_stays_full(num_steps):
    schedule = LRSchedule(num_steps, warmdown_frac=0.5, final_frac=0.1)
    falling = [step for step in range(num_steps) if step >= schedule.warmup_steps and schedule(step) < 1.0]
    assert len(falling) == schedule.warmdown_steps == round(0.5 * num_steps)
    drops = [schedule(a) - schedule(a + 1) for a in falling[:-1]]
    assert drops == pytest.approx([0.9 / len(falling)] * len(drops))
    schedule = LRSchedule(num_steps, warmdown_frac=0.0)
    assert {schedule(step) for step in range(schedule.warmup_steps, num_steps)} == {1.0}
    assert LRSchedule(1, warmup_steps=0, warmdown_frac=0.0, final_frac=0.5)(0) == 1.0


def test_momentum_rises_to_its_peak_and_falls_with_the_warmdown():
    schedule = LRSchedule(4000)
    momenta = [muon_momentum(step, schedule) for step in range(4000)]
    start = 4000 - schedule.warmdown_steps
    assert momenta[0] == rules.MOMENTUM_START
    assert momenta[400:start] == [pytest.approx(rules.MOMENTUM_PEAK)] * (start - 400)
    assert momenta[:400] == sorted(momenta[:400])
    assert momenta[start:] == sorted(momenta[start:], reverse=True)
    assert momenta[-1] == pytest.approx(rules.MOMENTUM_END)


def test_in_runs_of_any_length_momentum_stays_in_its_range_and_weight_decay_falls_from_whole_to_nothing():
    for num_steps in LENGTHS:
        schedule = LRSchedule(num_steps)
        momenta = [muon_momentum(step, schedule) for step in range(num_steps)]
        assert all(rules.MOMENTUM_START <= momentum <= rules.MOMENTUM_PEAK for momentum in momenta)
        assert momenta[-1] <= rules.MOMENTUM_END + 1e-12
        mults = [decay_mult(step, num_steps) for step in range(num_steps)]
        assert mults[0] == 1.0
        assert mults == sorted(mults, reverse=True)
        assert decay_mult(num_steps, num_steps) == pytest.approx(0.0, abs=1e-12)


def test_the_best_batch_is_a_power_of_two_that_grows_with_the_run():
    sizes = [best_batch_tokens(tokens, 1e9) for tokens in (1e3, 1e6, 1e8, 1e9, 1e10, 1e11)]
    assert sizes == sorted(sizes)
    assert all(size & (size - 1) == 0 for size in sizes)
    assert min(sizes) == rules.MIN_BATCH_TOKENS
    assert best_batch_tokens(1e9, 1e9) == rules.REFERENCE_BATCH_TOKENS
    # (7.3 ** 0.383 = 2.14) * 2^19 is nearer to 2^20 than to 2^21
    assert best_batch_tokens(7.3e9, 1e9) == 2**20


def test_rates_go_with_the_square_root_of_the_batch_down_to_a_floor():
    assert batch_lr_scale(rules.REFERENCE_BATCH_TOKENS) == 1.0
    assert batch_lr_scale(4 * rules.REFERENCE_BATCH_TOKENS) == 2.0
    assert batch_lr_scale(rules.REFERENCE_BATCH_TOKENS // 4) == 0.5
    assert batch_lr_scale(rules.MIN_BATCH_TOKENS) == rules.MIN_LR_SCALE
    scales = [batch_lr_scale(2**power) for power in range(23)]
    assert scales == sorted(scales)


def test_weight_decay_by_hand():
    def scaled(decay, batch_tokens, train_tokens, matrix_lr=0.02):
        sizes = {"batch_tokens": batch_tokens, "train_tokens": train_tokens}
        return rules.scaled_weight_decay(decay, **sizes, d12_tokens=1e9, matrix_lr=matrix_lr)

    assert scaled(0.28, 2**19, 1e9) == pytest.approx(0.28)
    assert scaled(0.28, 2**21, 8e9) == pytest.approx(0.28 * 2 / 8)
    assert scaled(0.0, 2**15, 1e6) == 0.0
    assert math.isfinite(scaled(0.28, 2**12, 1e6, matrix_lr=0.0))


@pytest.mark.parametrize("train_tokens", [1e4, 1e6, 1e8, 1e10])
@pytest.mark.parametrize("batch_tokens", [2**12, 2**15, 2**19])
def test_the_decay_of_a_step_is_bounded_in_short_runs(train_tokens, batch_tokens):
    lr = 0.02 * batch_lr_scale(batch_tokens)
    sizes = {"batch_tokens": batch_tokens, "train_tokens": train_tokens, "d12_tokens": 1e9}
    scaled = rules.scaled_weight_decay(0.28, **sizes, matrix_lr=lr)
    assert scaled * lr <= max(rules.MAX_DECAY_PER_STEP, 0.28 * lr) * (1 + 1e-12)
    if train_tokens >= 1e9:
        assert scaled == pytest.approx(0.28 * batch_lr_scale(batch_tokens) * 1e9 / train_tokens)
