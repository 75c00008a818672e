"""A short form of `dev/kill_test.py`: every stage, one process, a few kills. Its long form is run by hand."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dev import kill_test

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_stages_killed_at_random_moments_end_as_if_nothing_had_happened(tmp_path):
    command = [sys.executable, "dev/kill_test.py", "--kills", "8", "--processes", "1"]
    ended = subprocess.run(
        command, cwd=ROOT, env=os.environ | {"TMPDIR": str(tmp_path)}, capture_output=True, text=True, timeout=280,
        check=False,
    )  # fmt: skip
    assert (ended.returncode, ended.stderr) == (0, "")
    summary = json.loads(ended.stdout.splitlines()[-1])
    kills = [sum(figures["kills"].values()) for figures in summary["figures"].values()]
    assert (len(kills), sum(kills), summary["faults"]) == (4, 8, [])
    assert not list(tmp_path.glob("kill_test_*"))


def test_only_what_is_measured_anew_is_left_out_of_what_is_compared():
    line = {"step": 3, "train_loss": 1.5, "tokens_per_second": 9.0, "mfu": 0.1, "elapsed_seconds": 2.0}
    assert kill_test.timeless({"time": 5, "lines": [line]}) == {"lines": [{"step": 3, "train_loss": 1.5}]}
