"""Pretraining text as parquet shards with a `text` column: where they are, reading them, getting them.

    python -m nanochat.data.dataset -n 8                                    # 8 train shards of the default data set
    python -m nanochat.data.dataset -n -1 --data karpathy/fineweb-edu-100b-shuffle
    python -m nanochat.data.dataset --data ./my_texts                       # folder or file: parquet, jsonl, txt, md
    python -m nanochat.data.dataset --data local                            # documentation found on this machine

Whatever the source, the rest of the code sees shards in a fixed order, split into train and validation; where nothing
says which are which, the last shard is for validation.
Not here: transfers (`hub.py`), the conventions of splits (`splits.py`), making shards of other files (`localtext.py`),
tokenizing, batching.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from nanochat.common import UserError, base_dir, disk_errors, only_one_process, print0, run_main, write_atomic
from nanochat.data import hub, localtext
from nanochat.data.hub import CARD, HubFile, TransferError
from nanochat.data.splits import Splits, split_files
from nanochat.flags import Parser

DEFAULT_DATA = "karpathy/climbmix-400b-shuffle"
DEFAULT_TRAIN_SHARDS = 8  # of that data set: the two billion characters the tokenizer is trained on
DEFAULT_WORKERS = 8  # files fetched at a time
LOCAL_TEXT = "local"  # the name of the data set made of documentation found on this machine
MANIFEST = "nanochat-shards.json"  # a name no folder of the user will have for something else
SUFFIXES = (".parquet", *localtext.SUFFIXES)
TEXT_TYPES = (pa.string(), pa.large_string(), pa.string_view())
FETCH = "python -m nanochat.data.dataset"
DISK_MARGIN_BYTES = 64 << 20  # on top of 5 %: room for the logs and the file system's own needs


def data_dir(data: str) -> Path:
    """Folder of the shards of `data`: a local folder with parquet files for both splits itself, otherwise a folder
    below the base folder. Raises `UserError` when `data` is neither a local path, nor `local`, nor looks like a
    repository."""
    if data == LOCAL_TEXT:
        return base_dir() / "data" / LOCAL_TEXT
    path = Path(data).expanduser()
    if data and path.exists():
        if path.is_dir() and _split_folder(path, ".parquet").suffices:
            return path
        digest = hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]
        return base_dir() / "data" / f"{path.resolve().stem}-{digest}"
    hub.split_repository(data)
    return base_dir() / "data" / data.replace("/", "--")


def shard_paths(data: str, split: str) -> list[Path]:
    """The shards of `split`, "train" or "val". Of a partly downloaded data set, train is the unbroken run of its shards
    from the first on that are here, so that the order does not change while the rest arrives; val is always whole.
    Raises `UserError` when there are none, or one that was here is gone."""
    assert split in ("train", "val"), split
    folder, command = data_dir(data), f"run: {FETCH} --data {data}"
    manifest = Manifest.load(folder)
    if manifest is None:
        local = _split_folder(folder, ".parquet")
        if not local.suffices:
            raise UserError(f"the data set {data} is not in {folder}; {command}")
        return [folder / name for name in (local.train_names if split == "train" else local.val_names)]
    for file in manifest.files:
        if file.name in manifest.verified and not file.is_whole(folder):
            path = folder / file.name
            raise UserError(f"the shard {path} is gone or no longer has its {file.size:,} bytes; {command}")
    wanted = manifest.train if split == "train" else manifest.val
    chosen = list(takewhile(lambda file: file.is_whole(folder), wanted))
    if not chosen or (split == "val" and len(chosen) < len(wanted)):
        raise UserError(f"no {split} shard of {data} is in {folder} yet; {command}")
    return [folder / file.name for file in chosen]


def _split_folder(folder: Path, suffixes: str | tuple[str, ...]) -> Splits:
    """The files below a local folder that have one of the `suffixes`, by split."""
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return split_files([file.relative_to(folder).as_posix() for file in files_of(folder, suffixes)], text)


def document_batches(
    paths: Sequence[Path], *, start: tuple[int, int] = (0, 0)
) -> Iterator[tuple[tuple[int, int], pa.StringArray]]:
    """The documents of the shards, one row group at a time, each with its position: index of the shard in `paths`, and
    of the row group in it. `start` is the first. Nulls and empty texts are left out, and a row group of nothing else
    with them. Raises `UserError` for a shard that is missing or cannot be read, at the moment it is reached."""
    for shard in range(start[0], len(paths)):
        with _open_shard(paths[shard]) as parquet:
            first = start[1] if shard == start[0] else 0
            for row_group in range(first, parquet.num_row_groups):
                column = parquet.read_row_group(row_group, columns=["text"]).column("text")
                texts = column.cast(pa.string()).combine_chunks()
                # 0 or null, as for a null text, drops the text. Comparing with 0 would import pandas, 1.5 s.
                texts = texts.filter(pc.binary_length(texts).cast(pa.bool_()))
                if len(texts):
                    yield (shard, row_group), texts


@contextmanager
def _open_shard(path: Path) -> Iterator[pq.ParquetFile]:
    """The opened shard. Raises `UserError` when it is missing, cannot be read, or has no `text` column of strings."""
    try:
        with pq.ParquetFile(path) as parquet:
            _check_columns(parquet, str(path))
            yield parquet
    except FileNotFoundError as error:
        raise UserError(f"the shard {path} is missing; run {FETCH} again") from error
    except (pa.ArrowException, OSError) as error:
        fault = str(error).splitlines()[0][:200]
        remedy = f"if it is damaged, delete it and run {FETCH} again"
        raise UserError(f"the shard {path} cannot be read ({fault}); {remedy}") from error


def _check_columns(parquet: pq.ParquetFile, name: str) -> None:
    columns = {column.name: column.type for column in parquet.schema_arrow}
    if columns.get("text") not in TEXT_TYPES:
        listed = ", ".join(f"{column} ({kind})" for column, kind in list(columns.items())[:8]) or "none"
        remedy = "choose another data set with --data"
        raise UserError(f"the shard {name} has no column text of strings, only {listed}; {remedy}")


def files_of(path: Path, suffixes: str | tuple[str, ...]) -> list[Path]:
    """`path`, or the files at any depth below it, if they have one of the `suffixes`, in natural order (2 before 10).
    Below a folder, hidden files and those in hidden folders are left out."""
    found = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in found if file.name.endswith(suffixes) and file.is_file()]
    visible = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    return sorted(visible, key=lambda file: natural_key(file.as_posix()))


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that orders runs of digits as numbers: `a2` before `a10`."""
    return [(int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", name)]


@dataclass
class Manifest:
    """What a data folder should hold (`files`, all of the source in order, the last `num_val` for validation: 0 where
    the source does not say, and it is the last one) and which of it was found whole. `verified` has the modification
    time in ns of each verified file, so that nothing is hashed a second time; `version` pins the source: the commit of
    a repository, the fingerprint of converted files."""

    source: str
    version: str
    files: list[HubFile]
    verified: dict[str, int] = field(default_factory=dict)
    num_val: int = 0

    @property
    def train(self) -> list[HubFile]:
        return self.files[: -max(1, self.num_val)]

    @property
    def val(self) -> list[HubFile]:
        return self.files[-max(1, self.num_val) :]

    @classmethod
    def of_splits(cls, source: str, version: str, files: Sequence[HubFile], splits: Splits, verified=()) -> "Manifest":
        by_name = {file.name: file for file in files}
        ordered = [by_name[name] for name in splits.train + splits.val]
        return cls(source, version, ordered, dict(verified), num_val=len(splits.val))

    @classmethod
    def load(cls, folder: Path) -> "Manifest | None":
        """The manifest of `folder`; None when there is none. Raises `UserError` when it is damaged."""
        path = folder / MANIFEST
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
            manifest = cls(**{**values, "files": [HubFile(**file) for file in values["files"]]})
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} cannot be read ({error}); delete it and run the download again") from error
        if "num_val" not in values:  # written before splits were told apart
            splits = split_files([file.name for file in manifest.files])
            return cls.of_splits(manifest.source, manifest.version, manifest.files, splits, manifest.verified)
        return manifest

    def save(self, folder: Path) -> None:
        write_atomic(folder / MANIFEST, json.dumps(asdict(self)))

    def update(self, folder: Path, wanted: Sequence[HubFile], check: hub.Check) -> list[HubFile]:
        """Bring `verified` up to date and return those of `wanted` that are not in `folder` or not whole. A file that
        changed, or was never noted, is hashed. One that was deleted and is not wanted is forgotten."""
        names = {file.name for file in wanted}
        for file in self.files:
            path, is_whole = folder / file.name, file.is_whole(folder)
            if is_whole and (file.name not in names or self.verified.get(file.name) == path.stat().st_mtime_ns):
                continue
            self.verified.pop(file.name, None)
            if file.name in names and path.exists():
                try:
                    hub.verify_or_discard(path, file, check)
                    self.verified[file.name] = path.stat().st_mtime_ns
                except TransferError as error:
                    print0(f"{path} is not whole ({error}): fetching it again")
        self.save(folder)
        return [file for file in wanted if file.name not in self.verified]


def prepare(data: str, num_train: int, *, workers: int = DEFAULT_WORKERS) -> Path:
    """Make the shards of `data` ready and return their folder: download a hub repository (the first `num_train` train
    shards, -1 for all, and always those for validation), or convert local text, or check a local folder of shards. Of
    many processes that ask for the same, one does the work and the others wait. Doing it again only checks. Raises
    `UserError` when it cannot be had whole; what was fetched by then is kept."""
    if num_train < 1 and num_train != -1:
        raise UserError(f"-n {num_train} is out of range; give the number of train shards, or -1 for all")
    if workers < 1:
        raise UserError(f"--workers {workers} is out of range; give at least 1")
    folder, path = data_dir(data), Path(data).expanduser()
    if folder == path:
        for shard in shard_paths(data, "train") + shard_paths(data, "val"):
            with _open_shard(shard):
                pass
        return folder
    with only_one_process(folder):
        if data == LOCAL_TEXT:
            _convert(data, f"machine {localtext.VERSION}", localtext.machine_sources, folder, [])
        elif not path.exists():
            _download(data, num_train, folder, workers)
        elif path.is_file() and path.name.endswith(SUFFIXES):
            _convert_files(data, Splits(train=[path.name]), path.parent, folder)
        elif path.is_dir() and (splits := _split_folder(path, SUFFIXES)).train:
            _convert_files(data, splits, path, folder)
        else:
            raise UserError(
                f"{path} has no {', '.join(SUFFIXES)} file to train on; give --data another folder or a hub repository"
            )
    return folder


def _download(data: str, num_train: int, folder: Path, workers: int) -> None:
    """Fetch the shards of a hub repository into `folder`, or make them of its text files, fetched into a folder beside
    it, if there are no parquet shards. The hub is not asked when nothing is missing."""
    raw_folder = folder.with_name(f"{folder.name}.raw")
    manifest = Manifest.load(raw_folder) or Manifest.load(folder) or _list_usable(data)
    is_raw = len(manifest.files) < 2 or not all(file.name.endswith(".parquet") for file in manifest.files)
    if num_train > len(manifest.train):
        print0(f"{data} has only {len(manifest.files):,} files: taking all of them")
    train = manifest.train if num_train < 0 else manifest.train[:num_train]
    _fetch_missing(manifest, raw_folder if is_raw else folder, manifest.val + train, workers)
    if is_raw:
        names = [[file.name for file in files] for files in (train, manifest.val)]
        splits = Splits(*names) if manifest.num_val else Splits(train=names[1] + names[0])
        _convert_files(data, splits, raw_folder, folder)


def _list_usable(data: str) -> Manifest:
    """What there is to fetch: the parquet shards in natural order if there are some for both splits, else every file
    that can be made into shards, the description of the repository left out; nothing of a test split in either case."""
    revision, files, card = hub.list_files(data)
    names = sorted((file.name for file in files if file.name.endswith(SUFFIXES) and file.name != CARD), key=natural_key)
    splits = split_files([name for name in names if name.endswith(".parquet")], card)
    if not splits.suffices:
        splits = split_files(names, card)
    if not splits.train:
        fault = f"the hub repository {data} has no {', '.join(SUFFIXES)} file to train on"
        raise UserError(f"{fault}; choose another with --data")
    if splits.test:
        print0(f"{data}: {len(splits.test):,} test files are left out")
    return Manifest.of_splits(data, revision, files, splits)


def fetch_splits(data: str, folder: Path, choose: Callable[[Sequence[str], str], Splits]) -> Splits:
    """Fetch the files of a hub repository that `choose` takes, given all names in natural order and the card, for
    training and validation into `folder`, and return them. The hub is not asked when nothing is missing. Raises
    `UserError` when they cannot be had whole."""
    with only_one_process(folder):
        manifest = Manifest.load(folder)
        if manifest is None:
            revision, files, card = hub.list_files(data)
            splits = choose(sorted((file.name for file in files), key=natural_key), card)
            manifest = Manifest.of_splits(data, revision, files, splits)
        _fetch_missing(manifest, folder, manifest.files, DEFAULT_WORKERS, lambda *_: None)
    names = [file.name for file in manifest.files]
    num_train = len(names) - manifest.num_val
    return Splits(names[:num_train], names[num_train:])


def _fetch_missing(
    manifest: Manifest, folder: Path, wanted: list[HubFile], workers: int, check: hub.Check | None = None
) -> None:
    """Fetch those of `wanted` that are not in `folder` and whole. Raises `UserError` when some remain missing."""
    check = check or _check_fetched
    missing = manifest.update(folder, wanted, check)
    if not missing:
        return
    check_disk(folder, sum(file.size for file in missing))
    failed = hub.fetch_files(manifest.source, manifest.version, missing, folder, workers=workers, check=check)
    fetched = (file.name for file in missing if file.name not in failed)
    manifest.verified |= {name: (folder / name).stat().st_mtime_ns for name in fetched}
    manifest.save(folder)
    for name, reason in failed.items():
        print(f"missing: {name} ({reason})", file=sys.stderr)
    if failed:
        missed = f"{len(failed)} of {len(wanted)} files of {manifest.source} could not be fetched from {hub.endpoint()}"
        raise UserError(f"{missed}; the others are kept in {folder}: run the same command again to go on")


def _check_fetched(path: Path, file: HubFile) -> None:
    """Raise `TransferError` when a parquet file does not open, `UserError` when it has no `text` column."""
    if file.name.endswith(".parquet"):
        try:
            with pq.ParquetFile(path) as parquet:
                _check_columns(parquet, file.name)
        except (pa.ArrowException, OSError) as error:
            raise TransferError(f"it is no readable parquet file: {error}"[:200]) from error


def check_disk(folder: Path, num_bytes: int) -> None:
    """Raise `UserError` unless the disk of `folder` has room for `num_bytes` more and a margin."""
    needed, free = num_bytes + num_bytes // 20 + DISK_MARGIN_BYTES, shutil.disk_usage(folder).free
    if free < needed:
        fault = f"not enough disk space in {folder}: {needed / 1e9:.2f} GB needed, {free / 1e9:.2f} GB free"
        remedy = "ask for fewer shards with -n, or set NANOCHAT_BASE_DIR to a folder on a larger disk"
        raise UserError(f"{fault}; {remedy}")


def _convert_files(data: str, splits: Splits, root: Path, folder: Path) -> None:
    """Make shards of the files of `splits` below `root`, unless `folder` has those of the very same files."""
    digest = hashlib.sha256(localtext.VERSION.encode())
    sources = []
    for name in sorted(splits.train + splits.val, key=lambda name: root / name):
        file, mark = root / name, "val\0" if name in splits.val else ""
        status = file.stat()
        digest.update(f"{mark}{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
        sources.append(localtext.Source(name, status.st_size, partial(_read_documents, file)))
    _convert(data, digest.hexdigest(), lambda: sources, folder, splits.val)


def _read_documents(path: Path) -> Iterator[str]:
    if path.suffix == ".parquet":
        return (text for _, texts in document_batches([path]) for text in texts.to_pylist())
    return localtext.read_texts(path)


def _convert(
    data: str, version: str, get_sources: Callable[[], list[localtext.Source]], folder: Path, val_names: list[str]
) -> None:
    """Write the shards of `get_sources()` to `folder`, all or nothing, unless those of `version` are there. The sources
    in `val_names` are for validation; where there are none, a part of all is."""
    present = Manifest.load(folder)
    if present and present.version == version and all(file.is_whole(folder) for file in present.files):
        return
    sources = get_sources()
    num_bytes = sum(source.num_bytes for source in sources)
    print0(f"{data}: making shards of {num_bytes / 1e6:,.1f} MB from {len(sources):,} sources")
    check_disk(folder.parent, num_bytes)
    partial_folder = folder.with_name(f".{folder.name}.partial")
    try:
        with disk_errors("shards", folder.parent):
            shutil.rmtree(partial_folder, ignore_errors=True)
            shards = localtext.write_shards(sources, partial_folder, val_names=val_names)
            files = [HubFile(shard.name, shard.stat().st_size) for shard in shards]
            verified = {shard.name: shard.stat().st_mtime_ns for shard in shards}
            Manifest(data, version, files, verified).save(partial_folder)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(partial_folder, folder)
    finally:
        shutil.rmtree(partial_folder, ignore_errors=True)


def parse_args() -> argparse.Namespace:
    parser = Parser("Fetch or convert pretraining text: shards for training and for validation.")
    add = parser.add_argument_group("data").add_argument
    add("-n", "--num-train", type=int, default=DEFAULT_TRAIN_SHARDS, metavar="N",
        help="train shards to fetch from a hub repository, -1 for all (default: %(default)s); the "
        "validation shards always come with them, local text is always taken whole")  # fmt: skip
    add("--data", default=DEFAULT_DATA,
        help="hub repository owner/name or owner/name/folder, a local folder or file of parquet, jsonl "
        "or text, or 'local' for documentation found on this machine (default: %(default)s)")  # fmt: skip
    add("--workers", type=int, default=DEFAULT_WORKERS, help="files fetched at a time (default: %(default)s)")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    folder = prepare(args.data, args.num_train, workers=args.workers)
    train, val = shard_paths(args.data, "train"), shard_paths(args.data, "val")
    train_mb, val_mb = (sum(path.stat().st_size for path in paths) / 1e6 for paths in (train, val))
    held_out = f"validation shard {val[0].name}" if len(val) == 1 else f"{len(val):,} validation shards"
    found = f"{len(train):,} train shards ({train_mb:,.1f} MB) and {held_out} ({val_mb:,.1f} MB)"
    print0(f"{args.data}: {found} in {folder}")


if __name__ == "__main__":
    run_main(main, parse_args)
