"""What interrupts a run: signals and numbers that go wrong, and how all ranks come to act on them at the same step.

Not here: what is then saved (`run.py`).
"""

import json
import os
import signal
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType

import torch
import torch.distributed as dist

from nanochat.common import Runtime, write_atomic
from nanochat.data.dataloader import Batch
from nanochat.tokenizer import Tokenizer

SAME_SIGNAL_SECONDS = 0.5  # torchrun passes on what a scheduler has sent to its workers as well
SIGNALS = (signal.SIGTERM, signal.SIGINT)
RANK_WAIT = timedelta(hours=2)  # for ranks that evaluate or sample alone


class StopSignals:
    """Remembers the first SIGTERM or SIGINT as `number` (0: none yet), for the loop to stop at the next step. A second
    one ends the process at once."""

    def __init__(self, *, is_main: bool):
        self.number, self._is_main, self._time = 0, is_main, 0.0
        self._before: dict[int, object] = {}

    def listen(self) -> None:
        self._before = {number: signal.signal(number, self._note) for number in SIGNALS}

    def close(self) -> None:
        """Give the signals back their earlier meaning."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self.number:
            self.number, self._time = number, time.monotonic()
            if self._is_main:  # written past the buffer of `print`, which this may have interrupted
                name = signal.Signals(number).name
                os.write(2, f"{name}: the run saves and stops after this step; once more stops it now\n".encode())
        elif time.monotonic() - self._time > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


class Agreement:
    """The largest of a few numbers over all ranks. It travels between the hosts, so no GPU is waited for."""

    def __init__(self, runtime: Runtime):
        self.group = dist.new_group(backend="gloo", timeout=RANK_WAIT) if runtime.world_size > 1 else None

    def largest(self, *numbers: int) -> tuple[int, ...]:
        """Each of `numbers` as the largest that any rank has; every rank must call this."""
        if self.group is None:
            return tuple(map(int, numbers))
        shared = torch.tensor(numbers, dtype=torch.int64)
        dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(shared.tolist())


def write_batches(path: Path, batches: Sequence[Batch], tokenizer: Tokenizer) -> None:
    """Write the documents in the rows of a step's batches to a file of JSON lines, for someone to look at."""
    lines = []
    for micro_step, batch in enumerate(batches):
        for row, ids in enumerate(batch.idx.tolist()):
            documents = [text for text in tokenizer.decode(ids).split("<|bos|>") if text]
            lines.append({"micro_step": micro_step, "row": row, "epoch": batch.epoch, "documents": documents})
    write_atomic(path, "".join(f"{json.dumps(line, ensure_ascii=False)}\n" for line in lines))
