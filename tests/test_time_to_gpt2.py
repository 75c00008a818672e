"""`dev/time_to_gpt2.py`: the published run, hand-worked parts, and what it reads."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

from dev import time_to_gpt2
from dev.time_to_gpt2 import OPTIMAL_RATIO, Speed, config_of, read_speeds, run_of, speed_at, tokens_needed, wire_seconds
from nanochat.common import UserError
from nanochat.training import recipe

ROOT = Path(__file__).resolve().parent.parent
EIGHT = Namespace(num_gpus=8, bandwidth=360.0, overlap=0.5)


def estimate(*flags):
    command = [sys.executable, "dev/time_to_gpt2.py", *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)


def test_the_published_run_took_as_long_as_estimated():
    """d24 of the public nanochat: 983,000 tokens/s on 8 H100 in 8 bits, 8 tokens per parameter, 99 minutes."""
    speed = Speed(983_000 / 8, time_to_gpt2.optimizer_seconds(config_of(24)), 524_288)
    assert run_of(24, tokens_needed(24, 8.0), speed, EIGHT).minutes == pytest.approx(99, abs=1.5)


def test_one_gpu_is_as_fast_as_it_was_measured():
    alone = Namespace(num_gpus=1, bandwidth=360.0, overlap=0.5)
    run = run_of(20, 1e10, Speed(160_000, 0.03, 1_048_576), alone)
    assert run.wire_ms == 0
    assert run.batch == 1_048_576
    assert run.batch / (run.compute_ms + run.optimizer_ms) * 1e3 == pytest.approx(160_000)


def test_another_depth_needs_the_tokens_that_make_its_loss_the_anchors():
    parameters = {depth: recipe.scaling_parameters(config_of(depth)) for depth in (20, 24, 26)}
    assert tokens_needed(24, 10.0) == pytest.approx(10 * parameters[24])
    for depth in (20, 26):
        needed = tokens_needed(depth, 10.0)
        losses = [N**-0.3 + (D / OPTIMAL_RATIO) ** -0.3 for N, D in
                  ((parameters[depth], needed), (parameters[24], 10 * parameters[24]))]  # fmt: skip
        assert losses[0] == pytest.approx(losses[1])
        assert (needed > 10 * parameters[24]) == (depth == 20)
    assert tokens_needed(8, 10.0) == float("inf")  # too small, whatever it reads


def test_the_wire_carries_two_bytes_of_each_gradient_and_the_weights():
    counts = recipe.count_model(config_of(24)).parameter_counts()
    tables = counts["wte"] + counts["value_embeds"]
    hidden, whole = (wire_seconds(config_of(24), 8, 1e9, overlap) for overlap in (1.0, 0.0))
    assert whole - hidden == pytest.approx(7 / 8 * 2 * counts["total"] / 1e9)
    assert hidden == pytest.approx(7 / 8 * (4 * (counts["total"] - tables) + 2 * tables) / 1e9)


def test_depths_between_measured_ones_have_a_share_of_peak_between_theirs():
    measured = {20: Speed(150_000, 0.03, 524_288), 24: Speed(100_000, 0.06, 524_288)}
    shares = [time_to_gpt2.peak_share(depth, speed_at(depth, measured).tokens_per_second) for depth in (20, 22, 24, 26)]
    assert shares[1] == pytest.approx((shares[0] + shares[2]) / 2)
    assert shares[3] == pytest.approx(shares[2])


def test_speeds_are_the_fastest_of_the_recipe_in_a_saved_output(tmp_path):
    def figures(depth, speed, **settings):
        usual = {"window_pattern": "SSSL", "dtype": "", "total_batch_size": 524_288}
        result = {"depth": depth, "tokens_per_second": speed, "optimizer_seconds": 0.01}
        return {"settings": usual | settings, "results": [result]}

    parts = [
        {"name": "train", "figures": [figures(12, 5.0), figures(12, 6.0), figures(12, 9.0, window_pattern="L")]},
        {"name": "deep", "figures": [{"rows": 3, "both_ms": 1.0}, figures(24, 1.0), figures(24, 2.0, dtype="fp8")]},
        {"name": "memory", "figures": [figures(20, 0.5), figures(24, 3.0, recompute=True)]},
    ]
    path = tmp_path / "output.txt"
    path.write_text("a table\n" + json.dumps({"parts": parts}) + "\n")
    assert {depth: s.tokens_per_second for depth, s in read_speeds(path, "").items()} == {12: 6.0, 24: 1.0}
    assert read_speeds(path, "fp8") == {24: Speed(2.0, 0.01, 524_288)}
    path.write_text(json.dumps(figures(20, 4.0)))
    assert list(read_speeds(path, "")) == [20]
    with pytest.raises(UserError, match="no training speed"):
        read_speeds(path, "fp8")


def test_the_output_says_that_it_is_an_estimate_and_which_depth_is_there_soonest():
    ended = estimate()
    assert ended.stdout.startswith("ESTIMATE")
    assert "ASSUMED, no measurement" in ended.stdout
    summary = json.loads(ended.stdout.splitlines()[-1])
    assert summary["estimate"]
    assert [run["depth"] for run in summary["runs"]] == [20, 21, 22, 23, 24, 25, 26]
    assert summary["soonest"] == min(summary["runs"], key=lambda run: run["minutes"])["depth"] == 24
    assert all(run["minutes_from"] < run["minutes"] < run["minutes_to"] for run in summary["runs"])


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--measured", "nowhere.txt"), "--measured nowhere.txt: no JSON line at its end"),
        (("--num-gpus", "0"), "--num-gpus must be a number above 0, not 0"),
        (("--overlap", "1.5"), "--overlap must lie between 0 and 1, not 1.5"),
    ],
)
def test_mistakes_get_one_line(flags, words):
    ended = estimate(*flags)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {words}")
    assert ended.stderr.count("\n") == 1
