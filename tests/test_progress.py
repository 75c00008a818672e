"""What one sees of a run."""

import json
import socket
from dataclasses import replace

from test_metrics import RUNTIME

from nanochat.checkpoint import run_dir
from nanochat.training import progress
from nanochat.training.progress import STATUS_SECONDS, Status


def test_the_status_is_a_whole_file_written_every_few_seconds_at_most_and_at_once_when_there_is_news(
    base_folder, monkeypatch
):
    now = 100.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    run = run_dir("mid", "d3")
    status = Status(run, RUNTIME, 50)
    steps = []
    for step, seconds in ((1, 0.0), (2, STATUS_SECONDS - 1), (3, 1.5), (4, 0.0)):
        now += seconds
        status.write("training", step=step, tokens_per_second=None)
        steps.append(json.loads(status.path.read_text())["step"])
    assert steps == [1, 1, 3, 3]
    status.write("stopped", is_news=True, step=5, last_checkpoint="step_000005")
    found = json.loads((run / "status.json").read_text())
    assert found.pop("pid") > 0
    assert "T" in found.pop("time")
    assert found == {
        "state": "stopped", "stage": "mid", "model_tag": "d3", "num_steps": 50, "host": socket.gethostname(),
        "num_processes": 1, "step": 5, "last_checkpoint": "step_000005",
    }  # fmt: skip
    assert [path.name for path in run.iterdir()] == ["status.json"]
    Status(run, replace(RUNTIME, rank=1), 50).write("training", is_news=True, step=9)
    assert json.loads((run / "status.json").read_text())["step"] == 5
