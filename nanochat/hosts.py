"""What the hosts of a run have and send each other: the same data on all, checkpoints where no disk is shared.

A run's folder may be on a disk that all hosts share, or each may have its own; which it is, is found out by looking.
Every function here is called by all ranks. What travels goes through a gloo group, between the hosts' memories.

Not here: noticing that a host has vanished (`watch.py`), and the format of checkpoints (`checkpoint.py`).
"""

import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load, save
from torch import Tensor

from nanochat.common import UserError, disk_errors, from_rank0, gather_ranks, print0, together
from nanochat.watch import group_hosts, this_host

CHUNK_BYTES = 2**26  # sent at a time
SEND_LIMIT = timedelta(hours=2)  # of a chunk, behind which others may wait
MOST_NAMED = 5  # differences named in a message


def is_first_of_host() -> bool:
    """Whether this rank is the lowest of its host."""
    hosts = group_hosts(gather_ranks(this_host()))
    rank = dist.get_rank() if dist.is_initialized() else 0
    return any(host.ranks[0] == rank for host in hosts)


def check_hosts_agree(what: str, own: Mapping[str, Any], remedy: str) -> None:
    """Raise `UserError`, on every rank, unless `own` is the same on all: facts by the name of what they are about, such
    as sizes by the names of files. The message says which host has others than that of rank 0, and where they differ.
    """
    everywhere = gather_ranks((this_host()[1], dict(own)))
    first_name, first = everywhere[0]
    for rank, (name, facts) in enumerate(everywhere):
        wrong = [f"{key} is missing" for key in first if key not in facts]
        wrong += [f"{key} is only there" for key in facts if key not in first]
        wrong += [f"{key} is another" for key in facts if key in first and facts[key] != first[key]]
        if wrong:
            more = f" and {len(wrong) - MOST_NAMED:,} more" if len(wrong) > MOST_NAMED else ""
            where = f"{name} (rank {rank}) differs from {first_name} in {what}"
            raise UserError(f"{where}: {', '.join(wrong[:MOST_NAMED])}{more}; {remedy}")


# --- a run's folder --------------------------------------------------------------------------------


def ranks_apart(folder: Path) -> list[int]:
    """The ranks that do not see rank 0's `folder`, as they are on hosts with disks of their own. It is made if need be.
    Raises `UserError`, on every rank, when rank 0 cannot write there."""
    if len(set(gather_ranks(this_host()))) == 1:
        return []
    probe, is_main = folder / f".seen.{from_rank0(uuid.uuid4().hex)}", dist.get_rank() == 0
    with together(), disk_errors("a checkpoint", folder):
        if is_main:
            folder.mkdir(parents=True, exist_ok=True)
            probe.touch()
    apart = [rank for rank, is_seen in enumerate(gather_ranks(probe.exists())) if not is_seen]
    if is_main:
        probe.unlink(missing_ok=True)
    return apart


def collect(states: Mapping[str, Mapping[str, Tensor]], apart: Sequence[int], group: dist.ProcessGroup | None) -> dict:
    """Send this rank's `states`, tensors on the host by name, to rank 0 if it is `apart`. Returns those that arrived,
    {rank: states}: of all such ranks on rank 0, of none on others."""
    arrived, own = {}, dist.get_rank() if apart else 0
    for rank in apart:
        if own == rank:
            for name, tensors in states.items():
                _send(name.encode(), 0, group)
                _send(save(dict(tensors)), 0, group)
            _send(b"", 0, group)
        elif own == 0:
            arrived[rank] = {}
            while name := bytes(_receive(rank, group)):
                arrived[rank][name.decode()] = load(bytes(_receive(rank, group)))
    return arrived


def _send(data: bytes, to: int, group: dist.ProcessGroup) -> None:
    dist.send(torch.tensor(len(data)), to, group=group)
    for chunk in _chunks(torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0)):
        dist.send(chunk, to, group=group)


def _receive(source: int, group: dist.ProcessGroup) -> memoryview:
    size = torch.empty((), dtype=torch.int64)
    dist.recv(size, source, group=group)
    data = torch.empty(int(size), dtype=torch.uint8)
    for chunk in _chunks(data):
        dist.recv(chunk, source, group=group)
    return data.numpy().data


def _chunks(data: Tensor) -> Iterator[Tensor]:
    return iter(data.split(CHUNK_BYTES)) if data.numel() else iter(())


# --- a folder where it is missing ------------------------------------------------------------------


def bring(folder: Path, source: int, *, is_here: bool, make_room: Callable[[], None]) -> bool:
    """Copy `folder` of rank `source` to the hosts that have not got it: those on whose first rank it `is_here` not.
    There `make_room` is called before the copy gets its name, and it appears whole or not at all. Returns whether this
    rank made one. Raises `UserError`, on every rank, when it cannot be written on one of them."""
    hosts, has_it = group_hosts(gather_ranks(this_host())), gather_ranks(is_here)
    receivers = [host for host in hosts if source not in host.ranks and not has_it[host.ranks[0]]]
    if not receivers:
        return False
    print0(f"sending {folder.name} to {', '.join(map(str, receivers))}")
    members = sorted({source, *(host.ranks[0] for host in receivers)})
    group, rank = dist.new_group(members, backend="gloo", timeout=SEND_LIMIT), dist.get_rank()
    with together(), disk_errors("a copy of the checkpoint", folder):
        if rank == source:
            _share(folder, group)
        elif rank in members:
            _copy(folder, source, group, make_room)
    if rank in members:
        dist.destroy_process_group(group)
    return rank in members and rank != source


def _share(folder: Path, group: dist.ProcessGroup) -> None:
    own = dist.get_rank()
    files = [(path.relative_to(folder), path.stat().st_size) for path in folder.rglob("*") if path.is_file()]
    dist.broadcast_object_list([files], own, group=group, device=torch.device("cpu"))
    for name, size in files:
        with open(folder / name, "rb") as file:
            for start in range(0, size, CHUNK_BYTES):
                data = bytearray(file.read(min(CHUNK_BYTES, size - start)))
                dist.broadcast(torch.frombuffer(data, dtype=torch.uint8), own, group=group)


def _copy(folder: Path, source: int, group: dist.ProcessGroup, make_room: Callable[[], None]) -> None:
    failure, listed = None, [None]
    partial = folder.with_name(f".{folder.name}.partial")
    dist.broadcast_object_list(listed, source, group=group, device=torch.device("cpu"))
    shutil.rmtree(partial, ignore_errors=True)
    for name, size in listed[0]:
        for start in range(0, max(1, size), CHUNK_BYTES):
            data = torch.empty(min(CHUNK_BYTES, size - start), dtype=torch.uint8)
            if size:
                dist.broadcast(data, source, group=group)
            try:  # a disk that is full must not keep the others waiting
                (partial / name).parent.mkdir(parents=True, exist_ok=True)
                with open(partial / name, "ab") as file:
                    file.write(data.numpy().data)
            except OSError as error:
                failure = error
    if failure is None:
        make_room()
        partial.rename(folder)
        return
    shutil.rmtree(partial, ignore_errors=True)
    raise failure
