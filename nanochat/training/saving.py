"""Checkpoints of a run while it trains: written in a thread, kept or deleted, and whether the disk has room for them.

Not here: what a checkpoint holds (`run.py`) and its format (`nanochat/checkpoint.py`).
"""

import os
import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from threading import Thread

import torch.distributed as dist

from nanochat.checkpoint import Draft, delete_steps, list_steps
from nanochat.common import Runtime, UserError, from_rank0, gather_ranks, print0
from nanochat.hosts import ranks_apart


class Saver:
    """Writes the checkpoints of a run in a thread, one after another. Of the older ones it deletes all but the newest
    `keep_last` (0: none are deleted) and those of every `keep_every`-th step. `group` joins all ranks by gloo, for what
    travels to rank 0 from hosts that do not share its disk."""

    def __init__(
        self, run: Path, runtime: Runtime, *, keep_last: int, keep_every: int, group: dist.ProcessGroup | None = None
    ):
        self._apart = {"apart": ranks_apart(run), "group": group}
        self.run, self.runtime, self.keep_last, self.keep_every = run, runtime, keep_last, keep_every
        self.last_saved: int | None = None  # the step of the last checkpoint, once it is complete
        self.started = time.monotonic()  # when the last one was begun
        self._step = 0
        self._draft: Draft | None = None
        self._thread: Thread | None = None

    @property
    def is_writing(self) -> bool:
        """Whether this rank's thread is at work."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, step: int, **parts) -> None:
        """Copy `parts`, the arguments of `Draft`, to the host and write them while training goes on; the checkpoint
        before it is completed first. Every rank calls this."""
        self.finish()
        self._step, self.started = step, time.monotonic()
        self._draft = Draft(self.run, step, runtime=self.runtime, **self._apart, **parts)
        self._thread = Thread(target=self._draft.write, name="checkpoint writer")
        self._thread.start()

    def finish(self) -> None:
        """Wait for the files of the checkpoint being written, if there is one, and complete it. Every rank calls this.
        Raises `UserError`, on every rank alike, when they could not be written on one of them."""
        if self._draft is None:
            return
        draft, self._draft = self._draft, None
        self._thread.join()
        folder = draft.publish()
        self.last_saved = self._step
        print0(f"step {self._step:>5} | saved {folder.name}")
        if self.runtime.is_main:
            steps = [step for step in list_steps(self.run) if step <= self._step]  # later ones are damaged
            delete_steps(self.run, self._expendable(steps))

    def check_disk(self, num_bytes: int, steps_to_come: Iterable[int]) -> None:
        """Raise `UserError`, on every rank alike, unless the run's folder can be written to, and its disk has room for
        the checkpoints of `steps_to_come`, in each of which this rank has `num_bytes`."""
        one_bytes = sum(gather_ranks(num_bytes))
        if problem := from_rank0(self._disk_problem(one_bytes, steps_to_come) if self.runtime.is_main else ""):
            raise UserError(problem)

    def _disk_problem(self, one_bytes: int, steps_to_come: Iterable[int]) -> str:
        try:
            self.run.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            return f"cannot create {self.run}: {error.strerror}"
        if not os.access(self.run, os.W_OK):
            return f"cannot write to {self.run}: no permission, or the disk is read-only"
        num_more, free = self._num_more(list_steps(self.run), steps_to_come), shutil.disk_usage(self.run).free
        if num_more * one_bytes <= free:
            return ""
        one, need, room = (f"{size / 1e9:.3g} GB" for size in (one_bytes, num_more * one_bytes, free))
        return (
            f"{num_more} more checkpoints of {one} need {need}, but the disk of {self.run} has {room} free; make room, "
            f"save less often, or set --keep-last"
        )

    def _num_more(self, present: Sequence[int], to_come: Iterable[int]) -> int:
        """By how many the checkpoints on the disk will at most outnumber those `present`."""
        held, most = list(present), len(present)
        for step in to_come:
            held.append(step)
            most = max(most, len(held))
            gone = set(self._expendable(held))
            held = [step for step in held if step not in gone]
        return most - len(present)

    def _expendable(self, steps: Sequence[int]) -> list[int]:
        """Of `steps`, ascending, those whose checkpoints need not be kept."""
        older = steps[: -self.keep_last] if self.keep_last else ()
        return [step for step in older if not (self.keep_every and step % self.keep_every == 0)]
