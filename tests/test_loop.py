"""The parts of a training loop: one loss however a step is split, and bookkeeping that survives crashes and resumes."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from ranks import run_ranks

from nanochat.common import Runtime, UserError
from nanochat.data.dataloader import Batch
from nanochat.model.gpt import IGNORE_INDEX, GPTConfig, build_model
from nanochat.training import loop as training
from nanochat.training.loop import LossScaler, accumulate_gradients, apply_schedule, fitting_batch
from nanochat.training.optim import Group, MuonAdamW, parameter_groups
from nanochat.training.schedule import LRSchedule

CPU = torch.device("cpu")

ROWS = 8
CONFIG = GPTConfig.from_depth(3, vocab_size=83, sequence_len=16, head_dim=32)  # the vocabulary is padded to 128


def make_model():
    return random_model(CONFIG)


def make_rows(step: int, kept: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    """(ROWS, T) inputs and targets; rows hold unequal numbers of targets, row 3 none at all."""
    generator = torch.Generator().manual_seed(step)
    idx = torch.randint(CONFIG.vocab_size, (ROWS, CONFIG.sequence_len), generator=generator)
    targets = torch.randint(CONFIG.vocab_size, (ROWS, CONFIG.sequence_len), generator=generator)
    share = kept * 2 * torch.arange(1, ROWS + 1).unsqueeze(1) / ROWS
    targets[torch.rand(targets.shape, generator=generator) > share] = IGNORE_INDEX
    targets[3] = IGNORE_INDEX
    return idx, targets


def split(idx, targets, rows_per_batch: int, rank: int = 0, world_size: int = 1) -> list[Batch]:
    own = range(rank, len(idx), world_size)
    parts = [list(own)[i : i + rows_per_batch] for i in range(0, len(own), rows_per_batch)]
    return [Batch(idx[p], targets[p], int((targets[p] != IGNORE_INDEX).sum()), 0) for p in parts]


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# --- one step's loss ---
@pytest.mark.parametrize("rows_per_batch", [1, 2, 4, 8])
def test_loss_and_gradients_are_those_of_the_whole_batch_however_it_is_split(rows_per_batch):
    idx, targets = make_rows(0)
    model = make_model()
    wanted = model(idx, targets)
    wanted.backward()
    wanted_gradients = gradients(model)
    model.zero_grad()
    batches = split(idx, targets, rows_per_batch)
    iterator = iter([*batches, *batches])
    loss = accumulate_gradients(model, iterator, len(batches), device=CPU)
    assert len(list(iterator)) == len(batches)  # those of the next step are left
    torch.testing.assert_close(loss, wanted.detach(), rtol=1e-6, atol=0.0)
    assert not loss.requires_grad
    assert (loss.shape, loss.dtype) == ((), torch.float32)
    for name, grad in gradients(model).items():
        torch.testing.assert_close(grad, wanted_gradients[name], rtol=1e-4, atol=1e-7)
    for table in (model.wte, model.lm_head, model.value_embeds):  # padded ids have no gradient
        assert table.weight.size(0) == 128
        assert not table.weight.grad[CONFIG.vocab_size :].any()


def test_gradients_are_multiplied_by_the_loss_scale_and_the_loss_is_not():
    model, results = make_model(), []
    for scale in (1.0, 1024.0):
        model.zero_grad()
        loss = accumulate_gradients(model, iter(split(*make_rows(0), 4)), 2, device=CPU, loss_scale=scale)
        results.append((loss, gradients(model)))
    (loss, plain), (scaled_loss, scaled) = results
    assert torch.equal(loss, scaled_loss)
    for name, grad in plain.items():
        torch.testing.assert_close(scaled[name], 1024.0 * grad, rtol=1e-6, atol=1e-9)


def test_a_step_without_any_target_has_loss_zero_and_no_gradient():
    idx, targets = make_rows(0)
    for rows_per_batch in (1, 8):
        batches, model = split(idx, torch.full_like(targets, IGNORE_INDEX), rows_per_batch), make_model()
        assert accumulate_gradients(model, iter(batches), len(batches), device=CPU).item() == 0.0
        assert not any(grad.any() for grad in gradients(model).values())


def make_optimizer(model, *, lr_scale: float, **ranks) -> MuonAdamW:
    groups = parameter_groups(model)
    for group in groups:
        group.lr, group.initial_lr = lr_scale * group.lr, lr_scale * group.initial_lr
    return MuonAdamW(groups, **ranks)


def losses_from_the_start(rows_per_batch: int, num_steps: int = 12) -> list[float]:
    """Losses from the recipe's own initial weights on, at its rates."""
    model = build_model(CONFIG, generator=torch.Generator().manual_seed(1))
    optimizer = make_optimizer(model, lr_scale=0.35)
    losses = []
    for step in range(num_steps):
        batches = split(*make_rows(step), rows_per_batch)
        losses.append(accumulate_gradients(model, iter(batches), len(batches), device=CPU).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_rounding_errors_of_the_split_do_not_grow_into_other_losses():
    """Gradients that are zero but for rounding must not become full steps: the scalars' are, at the start."""
    assert losses_from_the_start(2) == pytest.approx(losses_from_the_start(ROWS), rel=1e-5)


def train(rank: int = 0, world_size: int = 1, rows_per_batch: int = 1, num_steps: int = 4):
    """Losses, and the parameters after some steps of the whole machinery."""
    model = make_model()
    optimizer = make_optimizer(model, lr_scale=0.1, rank=rank, world_size=world_size)
    schedule, losses = LRSchedule(num_steps), []
    for step in range(num_steps):
        apply_schedule(optimizer, lr_mult=schedule(step), momentum=0.9, decay_mult=0.5)
        batches = split(*make_rows(step), rows_per_batch, rank, world_size)
        loss = accumulate_gradients(model, iter(batches), len(batches), device=CPU, world_size=world_size)
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_train_like_one_process_fed_all_rows(world_size, tmp_path):
    """With 4 ranks, rank 3 has a row without targets; rows differ in their number of targets throughout."""
    results = run_ranks(train, world_size, tmp_path / "ranks")
    losses, params = train(rows_per_batch=ROWS)
    for rank_losses, rank_params in results:
        assert rank_losses == pytest.approx(losses, rel=1e-5)
        for name, value in rank_params.items():
            assert torch.equal(value, results[0][1][name])
            torch.testing.assert_close(value, params[name], rtol=1e-3, atol=1e-4)


def test_the_schedule_reaches_every_group():
    groups = [Group("tables", "adamw", {}, 0.4, 0.1), Group("matrices", "muon", {}, 0.02, 0.3)]
    optimizer = SimpleNamespace(groups=groups)
    for lr_mult in (0.1, 0.5):  # multiplies what a group began with, not what it has now
        apply_schedule(optimizer, lr_mult=lr_mult, momentum=0.9, decay_mult=0.25)
    tables, matrices = groups
    assert (tables.lr, tables.weight_decay) == (0.2, 0.1)
    assert (matrices.lr, matrices.momentum, matrices.weight_decay) == (0.01, 0.9, 0.075)


# --- how a step is divided ---
def test_micro_steps_multiply_to_the_total_batch_or_the_nearest_that_can_be_divided_is_named():
    for total, sizes, micro_steps in (
        (524288, (32, 2048, 8), 1), (524288, (32, 2048, 1), 8), (3 * 5 * 7, (5, 7, 1), 3),
    ):  # fmt: skip
        assert training.grad_accum_steps(total, *sizes) == micro_steps
    for total, sizes, nearest in (
        (100, (4, 16, 1), "64 or 128"), (63, (4, 16, 1), "64,"), (1000, (2, 100, 3), "600 or 1200"),
        (1, (1, 2, 1), "2,"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=f"total batch of {total} tokens .*--total-batch-size {nearest}"):
            training.grad_accum_steps(total, *sizes)


def test_a_device_batch_is_the_most_rows_that_divide_the_step_and_a_fixed_one_is_taken_or_refused():
    for rows, fitting, world_size, chosen in (
        (8, 8, 1, (8, 1)), (8, 100, 1, (8, 1)), (6, 4, 1, (3, 2)), (7, 4, 1, (1, 7)), (12, 5, 3, (4, 1)),
    ):  # fmt: skip
        assert training.choose_device_batch(rows * 512, fitting, 512, world_size, is_fixed=False) == chosen
    for rows, fitting in itertools.product(range(1, 40), range(1, 20)):
        size, micro_steps = training.choose_device_batch(2 * rows * 8, fitting, 8, 2, is_fixed=False)
        assert size <= fitting
        assert size * micro_steps == rows
    assert training.choose_device_batch(8 * 512, 4, 512, 1, is_fixed=True) == (4, 2)
    with pytest.raises(UserError, match=r"device batch 4 x 512 tokens x 1 processes.*--total-batch-size 2048 or 4096"):
        training.choose_device_batch(6 * 512, 4, 512, 1, is_fixed=True)
    with pytest.raises(UserError, match="total batch of 100 tokens"):
        training.choose_device_batch(100, 4, 512, 1, is_fixed=False)


@pytest.mark.parametrize(("every", "last", "due"), [(5, 11, [5, 10, 11]), (5, 10, [5, 10]), (0, 11, []), (100, 3, [3])])
def test_something_due_is_due_every_so_often_and_always_at_the_last_step(every, last, due):
    assert [step for step in range(last + 1) if training.is_due(step, every, last)] == due


# --- float16 ---
def optimizer_with_gradients(*grads: float) -> MuonAdamW:
    params = {f"p{i}": torch.nn.Parameter(torch.zeros(3)) for i in range(len(grads))}
    optimizer = MuonAdamW([Group("all", "adamw", params, 0.1)])
    for p, grad in zip(params.values(), grads, strict=True):
        p.grad = torch.tensor([1.0, grad, 2.0])
    return optimizer


@pytest.mark.parametrize(
    ("enabled", "grads", "left"),
    [(False, [math.inf], [[1.0, math.inf, 2.0]]), (True, [8.0, -4.0], [[0.25, 2.0, 0.5], [0.25, -1.0, 0.5]])],
)
def test_finite_gradients_are_divided_by_the_scale_which_other_dtypes_do_not_have(enabled, grads, left):
    scaler, optimizer = LossScaler(enabled, scale=4.0), optimizer_with_gradients(*grads)
    assert scaler.scale == (4.0 if enabled else 1.0)
    assert scaler.unscale_(optimizer)
    assert [p.grad.tolist() for p in optimizer.groups[0].params.values()] == left


@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_an_overflow_in_any_gradient_skips_the_step_and_halves_the_scale_which_grows_again(bad):
    scaler, scales = LossScaler(enabled=True, scale=8.0, growth_every=3), []
    for grad in (1.0, 1.0, bad, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0):
        assert scaler.unscale_(optimizer_with_gradients(1.0, grad)) == (grad == 1.0)
        scales.append(scaler.scale)
    assert scales == [8.0, 8.0, 4.0, 4.0, 4.0, 8.0, 8.0, 8.0, 16.0]
    for _ in range(40):
        scaler.unscale_(optimizer_with_gradients(bad))
    assert scaler.scale == 1.0


def test_the_scaler_goes_on_where_its_state_was_saved_unless_the_dtype_is_another():
    saved, resumed, other, fresh = (LossScaler(enabled, growth_every=4) for enabled in (True, True, False, True))
    for grad in (math.inf, 1.0, 1.0):
        saved.unscale_(optimizer_with_gradients(grad))
    for scaler in (resumed, other):
        scaler.restore(json.loads(json.dumps(saved.state())))
    fresh.restore(other.state())
    assert (resumed.scale, other.scale, fresh.scale) == (2.0**15, 1.0, 2.0**16)
    for _ in range(2):
        for scaler in (saved, resumed):
            scaler.unscale_(optimizer_with_gradients(1.0))
    assert saved == resumed
    assert saved.scale == 2.0**16


def skip_on_rank(rank: int, world_size: int) -> list:
    p = torch.nn.Parameter(torch.zeros(3))
    optimizer = MuonAdamW([Group("all", "adamw", {"p": p}, 0.1)], rank=rank, world_size=world_size)
    scaler, results = LossScaler(enabled=True, scale=8.0), []
    for bad_rank in (None, 1, None):
        p.grad = torch.full((3,), math.inf if rank == bad_rank else 8.0)
        is_good = scaler.unscale_(optimizer)
        if is_good:
            optimizer.step()
        optimizer.zero_grad()
        results.append((is_good, scaler.scale, p.tolist()))
    return results


def test_an_overflow_on_one_rank_makes_every_rank_skip_the_step(tmp_path):
    results = run_ranks(skip_on_rank, 2, tmp_path / "ranks")
    assert results[0] == results[1]
    (*first, p), (*second, skipped), (*third, stepped) = results[0]
    assert [first, second, third] == [[True, 8.0], [False, 4.0], [True, 4.0]]
    assert p == skipped != stepped


# --- fitting the device ---
def memory_for(rows: int, tried: list[int]):
    def try_batch(model, size: int) -> None:
        tried.append(size)
        if size > rows:
            raise torch.OutOfMemoryError("out of memory")

    return try_batch


@pytest.mark.parametrize(("rows", "tries"), [(100, [24]), (24, [24]), (13, [24, 12]), (1, [24, 12, 6, 3, 1])])
def test_the_batch_is_halved_until_it_fits(rows, tries, capsys):
    tried = []
    assert fitting_batch(make_model(), 24, memory_for(rows, tried)) == tries[-1]
    assert tried == tries
    words = f"24 rows do not fit in the device's memory: micro-batches of at most {tries[-1]} rows"
    assert (words in capsys.readouterr().out) == (len(tries) > 1)


def test_no_row_that_fits_is_refused_but_other_errors_are_no_lack_of_memory_and_a_cpu_takes_the_batch_as_it_is():
    def broken(model, size):
        raise RuntimeError("a bug")

    with pytest.raises(UserError, match=r"not even one row fits .* take --recompute, or a smaller --depth"):
        fitting_batch(make_model(), 8, memory_for(0, []))
    with pytest.raises(RuntimeError, match="a bug"):
        fitting_batch(make_model(), 8, broken)
    assert fitting_batch(make_model(), 5) == 5


def fit_on_rank(rank: int, world_size: int) -> list[int | str]:
    results = [fitting_batch(make_model(), 16, memory_for(room[rank], [])) for room in ((100, 5), (3, 100))]
    with pytest.raises(UserError, match="not even one row fits"):
        fitting_batch(make_model(), 16, memory_for((0, 100)[rank], []))
    return results


def test_the_rank_with_the_least_memory_decides_for_all(tmp_path):
    assert run_ranks(fit_on_rank, 2, tmp_path / "ranks") == [[4, 2]] * 2


def test_speed_counts_the_tokens_of_all_ranks_and_leaves_no_gradients(monkeypatch):
    model = make_model()
    assert training.measure_tokens_per_second(model, 2, 1, repeats=1) > 0
    assert all(p.grad is None for p in model.parameters())
    seconds = iter([100.0, 0.5, 2.0, 1.0])  # the first one warms up
    monkeypatch.setattr(training, "_forward_backward", lambda model, rows: next(seconds))
    assert training.measure_tokens_per_second(model, 3, 4) == 3 * 16 * 4 / 1.0


def test_how_long_the_steps_take_is_said_in_the_unit_that_suits_it(monkeypatch, capsys):
    model = make_model()
    tokens = 100 * (32 + training.OPTIMIZER_TOKENS * model.config.n_embd)
    runtime = Runtime(0, 0, 1, CPU, torch.float32)
    for seconds, words in (
        (20, "20 seconds"),
        (89.4, "89 seconds"),
        (90, "1.5 minutes"),
        (9000, "2.5 hours"),
        (9e8, "10,417 days"),
    ):
        monkeypatch.setattr(training, "measure_tokens_per_second", lambda *args, seconds=seconds: tokens / seconds)
        training.say_how_long(model, runtime, 2, 100, 32)
        assert capsys.readouterr().out == f"100 steps take about {words} here\n"
    training.say_how_long(model, runtime, 2, 0, 32)  # a run at its end
    training.say_how_long(model, replace(runtime, device=torch.device("cuda")), 2, 100, 32)
    assert capsys.readouterr().out == ""
