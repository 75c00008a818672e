"""The shards of a run, noted in its checkpoints: on resuming, it goes on with the very same ones in the same order and
split, or not at all. A data set may grow in the meantime; of the local folder it may be, nobody keeps the versions.

Not here: which shards a data set has now, and their split (`dataset.py`).
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from nanochat.common import UserError, print0
from nanochat.data.dataset import FETCH, data_dir, shard_paths
from nanochat.hosts import check_hosts_agree

SPLITS = ("train", "val")
TRAILER_BYTES = 8  # of a parquet file: the length of the footer before it, and a magic word
MOST_NAMED = 5  # changed shards named in a message

# By split, a record with the name, size and footer of each shard, as JSON has it.
Note = dict[str, list[dict]]


def run_shards(data: str, note: Mapping | None) -> tuple[dict[str, list[Path]], Note]:
    """The shards of a run on the data set `data` by split, and the note of them for its checkpoints. `note` is that of
    the checkpoint being resumed: its shards are the run's, and what is otherwise in the data set by now is named; None
    for a new run, and one from before there were notes. Raises `UserError` when a shard of the note is not as it was.
    """
    folder = data_dir(data)
    if note is not None:
        check_unchanged(data, folder, note)
        paths = {split: [folder / shard["name"] for shard in note[split]] for split in SPLITS}
        if changes := _changes(folder, paths, {split: shard_paths(data, split) for split in SPLITS}):
            print0(f"{data} has changed since the run began: {_some(changes)}; the run goes on with the shards it had")
        return paths, dict(note)
    paths = {split: shard_paths(data, split) for split in SPLITS}
    return paths, {split: [describe(folder, path) for path in paths[split]] for split in SPLITS}


def describe(folder: Path, path: Path) -> dict:
    """Name below `folder`, size in bytes, and sha256 in hex of the footer, which tells where each column chunk lies and
    the range of its values: enough to know a shard again without reading it whole."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        file.seek(-min(TRAILER_BYTES, size), os.SEEK_END)
        footer_bytes = int.from_bytes(file.read(4), "little") + TRAILER_BYTES
        file.seek(-min(footer_bytes, size), os.SEEK_END)
        footer = hashlib.sha256(file.read()).hexdigest()
    return {"name": path.relative_to(folder).as_posix(), "size": size, "footer": footer}


def check_unchanged(data: str, folder: Path, note: Mapping) -> None:
    """Raise `UserError` unless every shard of `note` is in `folder` as it was."""
    faults = []
    for shard in (shard for split in SPLITS for shard in note[split]):
        path = folder / shard["name"]
        if not path.is_file():
            faults.append(f"{shard['name']} is gone")
        elif (now := describe(folder, path)) != shard:
            sizes = f"{now['size']:,} bytes instead of {shard['size']:,}"
            faults.append(f"{shard['name']} has {sizes if now['size'] != shard['size'] else 'other contents'}")
    if faults:
        remedy = f"put back what was in {folder} (for a hub repository run {FETCH} --data {data}), or begin a new run"
        raise UserError(f"the shards of {data} are not those of the run being continued: {_some(faults)}; {remedy}")


def check_same_shards(data: str, note: Note) -> None:
    """Raise `UserError`, on every rank, unless the shards of `note` are the same on all hosts, which need not share a
    disk."""
    facts = {shard["name"]: (split, shard["size"], shard["footer"]) for split in SPLITS for shard in note[split]}
    remedy = f"run {FETCH} --data {data} there, with the same -n, or copy the files"
    check_hosts_agree(f"the shards of {data}", facts, remedy)


def _changes(folder: Path, before: Mapping[str, list[Path]], now: Mapping[str, list[Path]]) -> list[str]:
    """What is different in the data set, in words."""
    split_before, split_now = ({path: split for split in SPLITS for path in paths[split]} for paths in (before, now))
    names = {path: path.relative_to(folder).as_posix() for path in [*split_now, *split_before]}
    changes = [f"{names[path]} is new" for path in split_now if path not in split_before]
    changes += [f"{names[path]} is not among its shards" for path in split_before if path not in split_now]
    common = [path for path in split_now if split_before.get(path, split_now[path]) != split_now[path]]
    return changes + [f"{names[path]} was {split_before[path]} and is {split_now[path]} now" for path in common]


def _some(sentences: list[str]) -> str:
    more = f" and {len(sentences) - MOST_NAMED:,} more" if len(sentences) > MOST_NAMED else ""
    return ", ".join(sentences[:MOST_NAMED]) + more
