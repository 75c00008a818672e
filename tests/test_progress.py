"""What one sees of a run."""

import io
import json
import re
import socket
import sys
from dataclasses import replace

from test_metrics import RUNTIME

from nanochat.checkpoint import run_dir
from nanochat.training import progress
from nanochat.training.progress import BAR_SECONDS, LINE_SECONDS, STATUS_SECONDS, Progress, Status


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


def test_a_file_gets_the_first_step_the_last_and_one_every_so_often(monkeypatch, capsys):
    now, progress_of_run = 100.0, Progress(RUNTIME, 40)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for step in range(1, 41):
        progress_of_run.show(step, ["loss 2.0000", f"{step} s"])
        now += LINE_SECONDS / 10
        Progress(replace(RUNTIME, rank=1), 40).show(step, ["of another rank"])
    lines = capsys.readouterr().out.splitlines()
    assert [int(line.split("/")[0].split()[1]) for line in lines] == [1, 11, 21, 31, 40]
    assert lines[1] == "step    11/40 (27.5%) | loss 2.0000 | 11 s"


def test_a_terminal_gets_a_bar_on_one_line_below_what_else_is_printed(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    now, terminal, progress_of_run = 100.0, Terminal(), Progress(RUNTIME, 40)
    monkeypatch.setattr(sys, "stdout", terminal)
    for name, value in (("COLUMNS", "60"), ("TERM", "xterm")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    for step in range(1, 41):
        progress_of_run.show(step, ["loss 2.0000", "something too long for a terminal of sixty columns"])
        if step == 20:
            print("an evaluation")
        now += BAR_SECONDS / 2.5
    progress_of_run.close()
    shown = terminal.getvalue()
    assert sys.stdout is terminal
    assert shown.count("\n") == 2  # after the evaluation and after the last bar
    bars = re.findall(r"step (\d+)/40 \| loss 2.0000", shown)
    assert (bars[0], bars[-1]) == ("1", "40")
    assert 10 < len(bars) < 20
    assert "an evaluation\n" in re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")
