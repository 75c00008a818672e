"""The hosts of a run, and how the others notice that one of them has vanished: cut off, frozen, or switched off.

A collective would wait for it for half an hour and not know whom it waits for. So the first rank of every host counts
up a number in the store through which the ranks have found each other, every few seconds, in a thread; every rank reads
those of the other hosts. Where one stands still for `SILENCE_SECONDS`, or for `LOST_SECONDS` when a connection has
broken, the process ends, and the first of its host says which one it was.

Not here: what hosts send each other (`hosts.py`). Processes that fail on one host are torchrun's to end.
"""

import os
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from threading import Event, Thread

import torch.distributed as dist

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 60.0  # less than NCCL's and gloo's limits, more than a network needs to find another way
LOST_SECONDS = 10.0


def this_host() -> tuple[str, str]:
    """What tells this host from the others of the run: its number under torchrun, and its name."""
    return os.environ.get("GROUP_RANK", ""), socket.gethostname()


@dataclass(frozen=True)
class Host:
    """A host of the run by its name and its ranks, ascending."""

    name: str
    ranks: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.name} ({'rank' if len(self.ranks) == 1 else 'ranks'} {', '.join(map(str, self.ranks))})"


def group_hosts(places: Sequence[tuple[str, str]]) -> list[Host]:
    """The hosts of a run, that of rank 0 first, from what `this_host` gave on every rank."""
    return [Host(place[1], tuple(r for r, p in enumerate(places) if p == place)) for place in dict.fromkeys(places)]


class Watch:
    """Tells the other hosts that this one is there, and ends this process when one of them is not. `token` is the same
    on all ranks, and no other run's. `current` is that of this process, None when the run has one host."""

    current: "Watch | None" = None

    def __init__(self, hosts: Sequence[Host], rank: int, token: str):
        self._own = next(host for host in hosts if rank in host.ranks)
        self._others = [host for host in hosts if host is not self._own]
        self._is_first = rank == self._own.ranks[0]
        self._host_of_store = None if self._own is hosts[0] else hosts[0]
        self._prefix, self._closed, self._is_cut_off = f"nanochat/{token}", Event(), False
        self._heard = dict.fromkeys(self._others, time.monotonic())
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        limit = timedelta(seconds=2 * SILENCE_SECONDS)  # longer than it matters
        self._store = dist.TCPStore(address, port, is_master=False, timeout=limit, wait_for_workers=False)
        for work in (self._exchange, self._judge):
            Thread(target=work, name="watch over hosts", daemon=True).start()

    def close(self) -> None:
        self._closed.set()

    def _exchange(self) -> None:
        """Count up this host's number and read the others'. Ends when the store is out of reach: nothing is heard of
        anyone then."""
        keys, before, count = [self._key(host) for host in self._others], [b""] * len(self._others), 0
        try:
            while not self._closed.is_set():
                if self._is_first:
                    count += 1
                    self._store.set(self._key(self._own), str(count))
                now = self._store.multi_get(keys)  # waits for those that are not there yet
                for host, old, new in zip(self._others, before, now, strict=True):
                    if new != old:
                        self._heard[host] = time.monotonic()
                before = now
                self._closed.wait(BEAT_SECONDS)
        except RuntimeError:
            self._is_cut_off = True

    def _judge(self) -> None:
        while not self._closed.wait(BEAT_SECONDS / 2):
            if silent := self.silent(SILENCE_SECONDS):
                self.end(silent, SILENCE_SECONDS)

    def silent(self, seconds: float) -> list[Host]:
        """The hosts not heard of for `seconds`. Without the store that is all of them, but only its host is named."""
        silent = [host for host in self._others if time.monotonic() > self._heard[host] + seconds]
        has_no_store = self._host_of_store in silent and (self._is_cut_off or len(silent) == len(self._others))
        return [self._host_of_store] if has_no_store else silent

    def end_if_lost(self) -> None:
        """After an error that a lost connection may explain: wait until it is known whether a host has vanished, and
        if so, end this process."""
        deadline = time.monotonic() + LOST_SECONDS + 2 * BEAT_SECONDS
        while time.monotonic() < deadline:
            if silent := self.silent(LOST_SECONDS):
                self.end(silent, LOST_SECONDS)
            time.sleep(BEAT_SECONDS / 4)

    def end(self, silent: Sequence[Host], seconds: float) -> None:
        """End this process, wherever its other threads are. All but the host's first rank wait until that has spoken,
        as torchrun ends all when one has ended."""
        self.close()
        if self._is_first:
            names = " and ".join(map(str, silent))
            fault = f"error: nothing heard of {names} for {seconds:.0f} s, so {self._own} ends; "
            remedy = "see to it and the network, then the same command with --resume goes on"
            os.write(sys.stderr.fileno(), f"{fault}{remedy}\n".encode())
        else:
            time.sleep(2 * BEAT_SECONDS)
        os._exit(1)

    def _key(self, host: Host) -> str:
        return f"{self._prefix}/{host.ranks[0]}"
