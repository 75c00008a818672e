"""Measuring and logging a run: statistics, metrics.jsonl that survives crashes and resumes, the log of steps."""

import errno
import json
import math
import sys
from dataclasses import replace

import pytest
import torch

from nanochat import hardware
from nanochat.common import Runtime, UserError
from nanochat.training.metrics import WARMUP_STEPS_UNTIMED, MetricsLog, RunStats, StepLog, _clock, peak_memory_bytes
from nanochat.training.progress import Progress

RUNTIME = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)


# --- statistics ---
def make_stats(**other) -> RunStats:
    known = {"tokens_per_step": 4096, "flops_per_token": 1e9, "device_name": "cpu", "dtype": torch.float32}
    return RunStats(**{**known, "world_size": 1, **other})


def test_speed_leaves_the_first_steps_out():
    stats = make_stats()
    for _ in range(WARMUP_STEPS_UNTIMED):
        stats.update(1.0, 50.0)
        assert stats.tokens_per_second is stats.mfu is stats.seconds_left(10) is None
    for seconds in (1.0, 3.0):
        stats.update(1.0, seconds)
    assert stats.tokens_per_second == 2 * 4096 / 4.0
    assert stats.seconds_left(10) == pytest.approx(20.0)
    assert stats.seconds == 50.0 * WARMUP_STEPS_UNTIMED + 4.0


def test_mfu_is_a_share_of_all_devices_peak_and_none_for_an_unknown_device():
    known = make_stats(device_name="NVIDIA H100 80GB HBM3", dtype=torch.bfloat16, world_size=8)
    unknown = make_stats()
    for stats in (known, unknown):
        for _ in range(WARMUP_STEPS_UNTIMED + 5):
            stats.update(1.0, 0.25)
    peak = hardware.peak_flops("NVIDIA H100 80GB HBM3", torch.bfloat16)
    assert known.mfu == pytest.approx(1e9 * (4096 / 0.25) / (8 * peak))
    assert (unknown.tokens_per_second, unknown.mfu) == (4096 / 0.25, None)
    stats = RunStats.for_runtime(replace(RUNTIME, world_size=3), 100, 2.0)
    assert (stats.device_name, stats.dtype, stats.world_size) == ("cpu", torch.float32, 3)


def test_the_smoothed_loss_is_debiased_and_restored_statistics_go_on_and_time_this_process_alone():
    whole, resumed = make_stats(), make_stats()
    assert math.isnan(whole.smooth_loss)
    for _ in range(3):
        whole.update(2.5, 1.0)
        assert whole.smooth_loss == pytest.approx(2.5)
    resumed.restore(json.loads(json.dumps(whole.state())))
    for stats in (whole, resumed):
        stats.update(1.0, 1.0)
    assert 1.0 < resumed.smooth_loss == whole.smooth_loss < 2.5
    assert resumed.seconds == whole.seconds == 4.0
    assert resumed.tokens_per_second is None


# --- metrics.jsonl ---
def read_lines(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def metrics(tmp_path) -> MetricsLog:
    return MetricsLog(tmp_path / "run" / "metrics.jsonl", RUNTIME)


def test_every_number_but_none_is_a_json_line_of_rank_0(metrics):
    metrics.log(step=1, train_loss=2.5, mfu=None)
    metrics.log(step=1, val_bpb=1.25)
    assert read_lines(metrics.path) == [{"step": 1, "train_loss": 2.5}, {"step": 1, "val_bpb": 1.25}]
    other = MetricsLog(metrics.path.with_name("other.jsonl"), replace(RUNTIME, rank=1), run_name="never asked for")
    other.rewind(0)
    other.log(step=1, train_loss=2.5)
    other.finish()
    assert not other.path.exists()


def test_a_resumed_run_drops_the_lines_after_its_checkpoint_and_a_new_one_all(metrics):
    for step in range(1, 8):
        metrics.log(step=step, train_loss=float(step))
    metrics.log(step=5, val_bpb=1.0)
    metrics.rewind(5)
    assert [line["step"] for line in read_lines(metrics.path)] == [1, 2, 3, 4, 5, 5]
    metrics.log(step=6, train_loss=0.0)
    assert read_lines(metrics.path)[-1] == {"step": 6, "train_loss": 0.0}
    metrics.log(step=0, val_bpb=3.0)
    metrics.rewind(0)
    assert metrics.path.read_text() == ""


@pytest.mark.parametrize(
    "torn", ["", '{"step": 3, "tr', '{"step": 3', "{", '"step"', "3", "[1]", '{"loss": 1}', "\0\0"]
)
def test_a_line_cut_off_by_a_crash_is_dropped_and_does_not_swallow_the_next(torn, metrics):
    for step in (1, 2):
        metrics.log(step=step, train_loss=1.0)
    metrics.path.write_text(metrics.path.read_text()[: None if torn else -1] + torn)
    metrics.rewind(9)
    metrics.log(step=10, train_loss=1.0)
    assert [line["step"] for line in read_lines(metrics.path)] == [1, 2, 10]


def test_a_full_disk_is_a_clear_error(metrics, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    metrics.log(step=1, train_loss=1.0)
    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(UserError, match=r"cannot write metrics to .*metrics.jsonl: No space left on device"):
        metrics.log(step=2, train_loss=1.0)


class FakeWandb:
    """Records what a run would send."""

    class errors:
        Error = ConnectionError

    def __init__(self):
        self.logged, self.settings, self.is_finished = [], None, False

    def init(self, *, project, name, config, dir, id, resume):
        if name == "offline":
            raise self.errors.Error("no network")
        assert resume == "allow"
        self.settings, self.dir, self.id = (project, name, config), dir, id or "new"
        return self

    def log(self, numbers, step):
        self.logged.append((step, numbers))

    def finish(self):
        self.is_finished = True


def test_a_named_run_goes_to_wandb_as_well_which_if_it_cannot_start_says_what_to_do(tmp_path, base_folder, monkeypatch):
    wandb, path = FakeWandb(), tmp_path / "metrics.jsonl"
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    metrics = MetricsLog(path, RUNTIME, run_name="d4", settings={"depth": 4})
    metrics.log(step=3, train_loss=1.5, mfu=None)
    metrics.finish()
    assert wandb.settings == ("nanochat", "d4", {"depth": 4})
    assert (wandb.dir, metrics.wandb_id) == (base_folder, "new")
    assert MetricsLog(path, RUNTIME, run_name="d4", wandb_id="before").wandb_id == wandb.id == "before"
    assert MetricsLog(path, RUNTIME, wandb_id="before").wandb_id == "before"  # resumed without --run, and then with it
    assert (wandb.logged, wandb.is_finished) == ([(3, {"train_loss": 1.5})], True)
    assert read_lines(path) == [{"step": 3, "train_loss": 1.5}]
    with pytest.raises(UserError, match=r"wandb did not start \(no network\).*WANDB_MODE=offline"):
        MetricsLog(path, RUNTIME, run_name="offline")
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="--run d4 needs the package wandb"):
        MetricsLog(path, RUNTIME, run_name="d4")


# --- the log of steps ---
def run_steps(metrics, losses, stats=None, num_steps=10, examine=lambda *numbers: None) -> StepLog:
    log = StepLog(stats or make_stats(), metrics, Progress(RUNTIME, num_steps), examine)
    for step, loss in enumerate(losses, start=1):
        log.start()
        log.end(step, torch.tensor([loss, 1.0]), [f"batch {step}"], lr_mult=0.5)
    log.flush()
    return log


def test_every_step_is_logged_once_in_order(metrics, capsys):
    losses = [3.0, 2.5, 2.25, 2.0, 1.75]
    log = run_steps(metrics, losses, num_steps=5)
    lines = read_lines(metrics.path)
    known = [(line["step"], line["train_loss"], line["tokens"], line["lr_mult"]) for line in lines]
    assert known == [(step, loss, 4096 * step, 0.5) for step, loss in enumerate(losses, start=1)]
    assert all("mfu" not in line for line in lines)
    assert ["tokens_per_second" in line for line in lines] == [False] * WARMUP_STEPS_UNTIMED + [True] * 2
    times = [line["elapsed_seconds"] for line in lines]
    assert times == sorted(times)
    assert times[-1] == log.stats.seconds > 0
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 2
    assert printed[0].startswith("step     1/5 (20.0%) | loss 3.0000 (average 3.0000) | 0:00")
    assert printed[1].startswith(f"step     5/5 (100.0%) | loss 1.7500 (average {log.stats.smooth_loss:.4f}) | ")
    assert "tokens/s" in printed[1]
    assert "of peak" not in printed[1]


def test_the_steps_own_loss_is_shown_with_its_average_and_a_high_one_of_a_step_that_was_not_shown(metrics, capsys):
    log = run_steps(metrics, [4.5, 4.5, 8.0, 4.5, 4.75, 4.5], num_steps=6)
    first, last = capsys.readouterr().out.splitlines()
    assert "| loss 4.5000 (average 4.5000) |" in first
    assert f"| loss 4.5000 (average {log.stats.smooth_loss:.4f}, highest 8.0000 at step 3) |" in last
    assert read_lines(metrics.path)[-1]["train_loss_average"] == log.stats.smooth_loss > 4.6
    log.progress.num_steps = 7
    log.end(7, torch.tensor([4.5, 1.0]), [])
    assert "at step" not in capsys.readouterr().out


def test_time_between_steps_does_not_count(metrics, monkeypatch):
    clock = iter([1000.0, 1002.0, 2000.0, 2002.0])  # with an evaluation between
    monkeypatch.setattr("nanochat.training.metrics.time.perf_counter", lambda: next(clock))
    assert run_steps(metrics, [1.0, 1.0]).stats.seconds == 4.0


def test_every_step_is_examined_with_its_own_batches_before_it_is_logged(metrics):
    examined = []

    def examine(*numbers):
        examined.append(numbers)
        if numbers[0] == 3:
            raise SystemExit(1)

    with pytest.raises(SystemExit):
        run_steps(metrics, [2.5, 1.5, 1.0, 3.0], examine=examine)
    assert examined == [(1, 2.5, 1.0, ["batch 1"]), (2, 1.5, 1.0, ["batch 2"]), (3, 1.0, 1.0, ["batch 3"])]
    assert [line["step"] for line in read_lines(metrics.path)] == [1, 2]


def test_a_loss_that_is_not_finite_is_in_no_average_and_no_line(metrics):
    log = run_steps(metrics, [1.0, math.inf, math.nan, 1.0])
    assert [line.get("train_loss") for line in read_lines(metrics.path)] == [1.0, None, None, 1.0]
    assert log.stats.smooth_loss == pytest.approx(1.0)


def test_a_loss_spike_is_reported_and_neither_a_slope_nor_noise_is(metrics, capsys):
    generator = torch.Generator().manual_seed(0)
    noise = (0.05 * torch.randn(400, generator=generator)).tolist()
    losses = [4.0 - 0.004 * step + value for step, value in enumerate(noise)]
    losses[200] += 2.0
    log = run_steps(metrics, losses, num_steps=400)
    reported = [(line["step"], line["loss_spike"]) for line in read_lines(metrics.path) if "loss_spike" in line]
    assert [step for step, _ in reported] == [201]
    assert reported[0][1] > 10
    assert f"step   201 | loss spike: {losses[200]:.4f}, {reported[0][1]:.1f} robust" in capsys.readouterr().out
    resumed = make_stats()
    resumed.restore(json.loads(json.dumps(log.stats.state())))
    assert resumed.spike_score(9.0) == log.stats.spike_score(9.0) > 10


def test_times_read_as_clocks_and_peak_memory_is_that_of_this_process():
    clocks = [_clock(seconds) for seconds in (0, 59.4, 61, 3600, 36061.6)]
    assert clocks == ["0:00", "0:59", "1:01", "1:00:00", "10:01:02"]
    assert 1e7 < peak_memory_bytes(RUNTIME) < 1e12
