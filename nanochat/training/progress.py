"""What one sees of a run: `status.json` for whoever watches from outside, and its progress on the screen.

Not here: the numbers of every step (`metrics.py`).
"""

import atexit
import json
import os
import socket
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from rich import progress as bars
from rich.table import Column

from nanochat.common import Runtime, disk_errors

STATUS_SECONDS = 5.0  # between two writes of status.json at least
LINE_SECONDS = 15.0  # between two lines of steps at least, where the output is a file
BAR_SECONDS = 0.2  # between two changes of the bar at least


class Status:
    """Keeps `status.json` in the run's folder up to date: stage, step, speed, time left, last checkpoint, host. Rank 0
    only."""

    def __init__(self, run: Path, runtime: Runtime, num_steps: int):
        self.path, self._is_main = run / "status.json", runtime.is_main
        self._known = {
            "stage": run.parent.name.removesuffix("_checkpoints"), "model_tag": run.name, "num_steps": num_steps,
            "host": socket.gethostname(), "pid": os.getpid(), "num_processes": runtime.world_size,
        }  # fmt: skip
        self._written = -STATUS_SECONDS

    def write(self, state: str, *, is_news: bool = False, **numbers: float | str | None) -> None:
        """Write `state` ("training", "stopped", "failed" or "done") and `numbers`, unless it has just been done and
        there `is_news` not. Readers see the old file or the new one. It need not survive a power cut, so nothing is
        synchronised, which would wait for a checkpoint on its way to the disk."""
        if not self._is_main or not (is_news or time.monotonic() >= self._written + STATUS_SECONDS):
            return
        self._written = time.monotonic()
        now = datetime.now(UTC).isoformat(timespec="seconds")
        partial = self.path.with_name(".status.json.partial")
        with disk_errors(self.path.name, self.path.parent):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps({"state": state, **self._known, **numbers, "time": now}, indent=1))
            os.replace(partial, self.path)


class Progress:
    """The steps of a run on the screen, of rank 0 only: on a terminal a bar that stays on one line, below whatever else
    is printed; in a file a line for the first step, the last, and every `LINE_SECONDS`."""

    def __init__(self, runtime: Runtime, num_steps: int):
        self.num_steps, self._is_main, self._shown = num_steps, runtime.is_main, -LINE_SECONDS
        self._bar: bars.Progress | None = None

    def show(self, step: int, parts: Sequence[str]) -> bool:
        """Show step `step`, counted from 1, with `parts` that say something about it, unless one was shown just now.
        Returns whether it is shown."""
        now, is_terminal = time.monotonic(), sys.stdout.isatty() or self._bar is not None
        is_due = step == self.num_steps or now >= self._shown + (BAR_SECONDS if is_terminal else LINE_SECONDS)
        if not self._is_main or not is_due:
            return False
        self._shown = now
        if not is_terminal:
            print(" | ".join((f"step {step:>5}/{self.num_steps} ({step / self.num_steps:.1%})", *parts)), flush=True)
            return True
        if self._bar is None:
            self._start()
        self._bar.update(self._task, completed=step, description=" | ".join((f"step {step}/{self.num_steps}", *parts)))
        self._bar.refresh()
        return True

    def _start(self) -> None:
        text = bars.TextColumn("{task.description}", table_column=Column(no_wrap=True, overflow="ellipsis", ratio=1))
        self._bar = bars.Progress(bars.BarColumn(10), text, auto_refresh=False, expand=True)
        self._task = self._bar.add_task("", total=self.num_steps)
        self._bar.start()
        self._bar.console.show_cursor()  # which a run that is killed would leave hidden
        atexit.register(self.close)

    def close(self) -> None:
        """Leave the bar as it is, with the last step."""
        if self._bar is not None:
            self._bar.stop()
