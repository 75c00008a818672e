"""What one sees of a run: `status.json` for whoever watches from outside, and its progress on the screen.

Not here: the numbers of every step (`metrics.py`).
"""

import json
import os
import socket
import time
from datetime import UTC, datetime
from pathlib import Path

from nanochat.common import Runtime, disk_errors

STATUS_SECONDS = 5.0  # between two writes of status.json at least


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
