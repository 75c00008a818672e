"""`dev/gpu_check.py` at toy sizes on the CPU: what it runs, and that no part stops another."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dev import gpu_check

ROOT = Path(__file__).resolve().parent.parent


def test_parts_run_apart_and_are_summed_up_in_a_json_line():
    parts = ["tests", "gloo", "losses", "attention", "loss"]
    command = [sys.executable, "dev/gpu_check.py", "--tiny", "--parts", *parts]
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    summary = json.loads(ended.stdout.splitlines()[-1])
    outcomes = {part["name"]: part for part in summary["parts"]}
    assert [outcomes[name]["status"] for name in parts[1:]] == ["passed"] * 4
    assert outcomes["gloo"]["figures"][0]["ranks"] == 2
    assert outcomes["loss"]["figures"][0]["both_ms"] > 0
    *timed, without, allowed = outcomes["attention"]["figures"]
    assert {figure["backend"] for figure in timed} == set(gpu_check.attention.BACKENDS)
    assert all(figure["both_tflops"] > 0 for figure in timed if figure["backend"] in ("sdpa", "masked"))
    assert (without["cudnn_allowed"], allowed["cudnn_allowed"]) == (False, True)
    assert ended.returncode == 0


@pytest.mark.parametrize(
    ("program", "status"),
    [("import time; print('begun'); time.sleep(60)", "out of time"), ("print('begun'); 1 / 0", "failed")],
)
def test_a_part_that_hangs_or_crashes_is_ended_with_its_last_lines(program, status):
    found, lines = gpu_check.run_command([sys.executable, "-c", program], 2.0)
    assert found == status
    assert lines[0] == "begun"


def test_a_part_whose_needs_are_not_met_is_skipped():
    part = gpu_check.Part("none", "nothing", 60, lambda tiny: [["false"]], needs=("no_such_package",))
    outcome = gpu_check.run_part(part, tiny=True, deadline=time.perf_counter() + 100)
    assert (outcome.status, outcome.reason) == ("skipped", "needs no_such_package")


def test_what_was_measured_of_the_engine_is_printed_beside_its_targets(capsys):
    row = {"batch": 128, "prompt": 256, "decode_tokens_per_second": {"median": 34000.0}}
    engine = {
        "settings": {"architecture": "recipe"}, "notes": [{"pause_ms": 31.0, "first_pause_ms": 700.0}],
        "rows": [row | {"prefill_tokens_per_second": {"median": 128 * 256 / 0.150}}],
    }  # fmt: skip
    gpu_check.print_targets([engine, {"gain": 9.5}, {"start": "chat", "seconds": 7.0}, {"ranks": 2, "rows": 64}])
    lines = [line.split()[-3:] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [
        ["33,000", "34,000.0", "met"], ["160", "150.0", "met"], ["30", "31.0", "missed"], ["1,000", "700.0", "met"],
        ["10", "9.5", "missed"], ["10", "7.0", "met"],
    ]  # fmt: skip


def test_a_command_that_ends_with_status_2_lacks_something_only_where_that_is_foreseen():
    commands = [[sys.executable, "-c", f"import sys; print('error: no {word}'); sys.exit(2)"] for word in ("a", "b")]
    for may_lack, status in ((True, "skipped"), (False, "failed")):
        part = gpu_check.Part("none", "nothing", 60, lambda tiny: commands, may_lack=may_lack)
        outcome = gpu_check.run_part(part, tiny=True, deadline=time.perf_counter() + 100)
        assert (outcome.status, outcome.reason) == (status, "error: no a\nerror: no b\n")
