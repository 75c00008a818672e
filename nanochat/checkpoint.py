"""Checkpoints: complete or absent, listed, loaded, checked. All safetensors, JSON or plain text; nothing is unpickled.

    <base>/base_checkpoints/<model tag>/
        metrics.jsonl                  every logged number of the run
        step_000500/
            meta.json                  schema, step, model config, flags, plan, statistics
            model.safetensors
            tokenizer/                 the tokenizer the model was trained with
            optimizer_rank0.safetensors, loader_rank0.safetensors     one of each per rank
            checksums_rank0.json       of the files that this rank wrote

A checkpoint is written under a hidden name and renamed once the files of every rank are on the disk, so a folder with
the name of a step is complete. Nothing here replaces a complete checkpoint, and only `delete_steps` deletes one. On
several hosts without a shared disk, rank 0 writes the files of all ranks; to resume, the others fetch a copy.
"""

import json
import os
import re
import shutil
import time
import zlib
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import count
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanochat.common import Runtime, UserError, base_dir, disk_errors, gather_ranks, print0, together, write_atomic
from nanochat.flags import SOURCES, add_flags, did_you_mean, shared
from nanochat.hosts import bring, collect, is_first_of_host
from nanochat.tokenizer import Tokenizer

SCHEMA = 1
_STEP_NAME = re.compile(r"step_([0-9]+)")
_MAX_TAG_BYTES = 255  # the usual limit of file systems for a name
TRAINED_BY = {  # the command that trains a stage, "" being all of them
    "": "bash speedrun.sh", "base": "python -m scripts.base_train", "mid": "python -m scripts.mid_train",
    "sft": "python -m scripts.chat_sft", "rl": "python -m scripts.chat_rl",
}  # fmt: skip
COPY_MARK = "copy_of_another_host"  # an empty file in a checkpoint that was fetched
_READ_BYTES = 2**24  # read at a time for a checksum


def source_dir(source: str) -> Path:
    """Folder of all checkpoints of a stage, one of `SOURCES`."""
    if source not in SOURCES:
        hint = did_you_mean(source, SOURCES)
        raise UserError(f"source {source!r} is unknown; {hint}choose one of {', '.join(SOURCES)}")
    return base_dir() / f"{source}_checkpoints"


def run_dir(source: str, model_tag: str) -> Path:
    """Folder of one run. Raises `UserError` for a tag that is not a plain file name."""
    is_name = model_tag not in ("", ".", "..") and "/" not in model_tag and "\0" not in model_tag
    if not is_name or len(os.fsencode(model_tag)) > _MAX_TAG_BYTES:
        raise UserError(f"--model-tag {model_tag!r} must be a plain file name of at most {_MAX_TAG_BYTES} bytes")
    return source_dir(source) / model_tag


def list_steps(run: Path, *, all_folders: bool = False) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending; with `all_folders` also of what has only the name."""
    names = [_STEP_NAME.fullmatch(entry.name) for entry in run.iterdir()] if run.is_dir() else []
    steps = {int(m[1]) for m in names if m}
    return sorted(step for step in steps if all_folders or (step_dir(run, step) / "meta.json").is_file())


def step_dir(run: Path, step: int) -> Path:
    return run / f"step_{step:06d}"


# --- writing -------------------------------------------------------------------------------------


def save_checkpoint(
    run: Path, step: int, *, runtime: Runtime, model: nn.Module, tokenizer: Tokenizer, meta: Mapping,
    optimizer_state: Mapping[str, Tensor] | None = None, loader_state: Mapping[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write one checkpoint, with the arguments of `Draft`; every rank calls this. Returns its folder."""
    draft = Draft(
        run, step, runtime=runtime, model=model, tokenizer=tokenizer, meta=meta, optimizer_state=optimizer_state,
        loader_state=loader_state,
    )  # fmt: skip
    draft.write()
    return draft.publish()


class Draft:
    """A checkpoint that is being written: a copy in the host's memory, then files under a hidden name, then published.

    Every rank makes one and publishes it. `write` waits for no other rank, so a thread may run it while training goes
    on. `model.config` is a dataclass; `meta` is the stage's own record, of values that JSON can hold, to which config,
    tokenizer fingerprint and schema are added. Ranks `apart` do not see the folder `run` of rank 0, which receives
    their states through `group` and writes them. Raises `UserError`, on every rank alike, when the step has a whole
    checkpoint already; a damaged one is set aside.
    """

    def __init__(
        self, run: Path, step: int, *, runtime: Runtime, model: nn.Module, tokenizer: Tokenizer, meta: Mapping,
        optimizer_state: Mapping[str, Tensor] | None = None, loader_state: Mapping[str, Tensor] | None = None,
        apart: Sequence[int] = (), group: dist.ProcessGroup | None = None,
    ):  # fmt: skip
        self.run, self.folder, self.runtime = run, step_dir(run, step), runtime
        self._partial = run / f".{self.folder.name}.partial"
        self._error: BaseException | None = None
        with together(), disk_errors("the checkpoint", run):
            if runtime.is_main:
                self._make_room()
        states = {f"optimizer_rank{runtime.rank}": optimizer_state, f"loader_rank{runtime.rank}": loader_state}
        if runtime.is_main:
            states["model"] = model.state_dict()
            own = {"schema": SCHEMA, "step": step, "world_size": runtime.world_size, "saved_at": time.time()}
            own |= {"config": asdict(model.config), "tokenizer_fingerprint": tokenizer.fingerprint}
            self._meta, self._tokenizer = json.dumps({**meta, **own}, indent=1), tokenizer
        on_host = {name: _on_host(state) for name, state in states.items() if state is not None}
        self._parts = collect(on_host, apart, group)  # by rank, all that are written here
        if runtime.rank not in apart:
            self._parts[runtime.rank] = on_host

    def _make_room(self) -> None:
        if self.folder.exists():
            if fault_in(self.folder) is None:
                raise UserError(f"{self.folder} is there already; move it away, or choose another --model-tag")
            _set_aside(self.folder)
        for abandoned in self.run.glob(".step_*.partial"):  # by a run that was killed while writing or deleting
            shutil.rmtree(abandoned)
        self._partial.mkdir(parents=True)

    def write(self) -> None:
        """Write the files of this rank, and on rank 0 those of ranks apart. What goes wrong is kept for `publish` to
        raise."""
        partial = self._partial
        try:
            while self._parts:
                rank, states = self._parts.popitem()
                for name, tensors in states.items():
                    save_tensors(partial / f"{name}.safetensors", tensors)
                    _sync(partial / f"{name}.safetensors")
                names = [f"{name}.safetensors" for name in states]
                del states
                if rank == 0:
                    self._tokenizer.save(partial / "tokenizer")
                    write_atomic(partial / "meta.json", self._meta)
                    names += ["meta.json", *(f"tokenizer/{path.name}" for path in (partial / "tokenizer").iterdir())]
                sums = {name: _checksum(partial / name) for name in sorted(names)}
                write_atomic(partial / f"checksums_rank{rank}.json", json.dumps(sums, indent=1))
        except BaseException as error:
            self._error = error

    def publish(self) -> Path:
        """Once `write` is done on this rank, give the checkpoint its name. Returns its folder. Raises `UserError`, on
        every rank alike, when it could not be written on one of them."""
        try:
            with together(), disk_errors("the checkpoint", self.run):
                if self._error is not None:
                    raise self._error
            with together(), disk_errors("the checkpoint", self.run):
                if self.runtime.is_main:
                    _sync(self._partial / "tokenizer")
                    _sync(self._partial)
                    self._partial.rename(self.folder)
                    _sync(self.run)
        except BaseException:
            if self.runtime.is_main:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise
        return self.folder


def delete_steps(run: Path, steps: Collection[int]) -> None:
    """Delete checkpoints. One whose deletion is interrupted is not listed any more, and the next `Draft` clears it."""
    with disk_errors("a checkpoint's deletion", run):
        for step in steps:
            hidden = run / f".{step_dir(run, step).name}.partial"
            step_dir(run, step).rename(hidden)
            shutil.rmtree(hidden)


def _set_aside(folder: Path) -> None:
    names = (f"{folder.name}.damaged{number}" for number in count(1))
    folder.rename(next(folder.with_name(name) for name in names if not folder.with_name(name).exists()))


def _on_host(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies that training does not change. They also have storage of their own, as safetensors demands."""
    as_own = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
    return {name: tensor.detach().to(**as_own) for name, tensor in tensors.items()}


def save_tensors(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file. Raises `UserError` when it cannot be written, `OSError` for a full disk."""
    try:
        path.touch()
        mode = path.stat().st_mode
        save_file(tensors, path, metadata)
        path.chmod(mode)  # safetensors makes files that only their owner may read
    except SafetensorError as error:
        raise UserError(f"cannot write {path.name} to {path.parent}: {error}") from error


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with open(path, "rb") as file:
        while data := file.read(_READ_BYTES):
            crc = zlib.crc32(data, crc)
    return crc


def _sync(path: Path) -> None:
    """Make a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- reading -------------------------------------------------------------------------------------


def read_meta(folder: Path) -> dict:
    """meta.json of a checkpoint. Raises `UserError` when it is missing, broken or of another schema."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} is no readable checkpoint ({error}); choose another step or tag") from error
    schema = meta.get("schema") if isinstance(meta, dict) else None
    if schema != SCHEMA:
        known = f"this version reads schema {SCHEMA}; choose another step or tag"
        raise UserError(f"checkpoint {folder} has schema {schema!r}, but {known}")
    return meta


def fault_in(folder: Path) -> str | None:
    """What is wrong with the files of a checkpoint: one is missing, unreadable or not as it was written. None if they
    are whole; one from before November 2026 has no checksums, and passes. Raises `UserError` for another schema."""
    sums = sorted(folder.glob("checksums_rank*.json"))
    for path in sums:
        try:
            for name, crc in json.loads(path.read_text()).items():
                if _checksum(folder / name) != crc:
                    return f"{name} has changed since it was written"
        except OSError as error:
            return f"cannot read {error.filename}: {error.strerror}"
        except (ValueError, AttributeError):
            return f"{path.name} cannot be read"
    if not (folder / "meta.json").is_file():
        return "it has no meta.json"
    world_size = read_meta(folder)["world_size"]
    return (
        f"it has checksums of {len(sums)} processes, not of {world_size}" if sums and len(sums) != world_size else None
    )


def load_tensors(path: Path, device: str = "cpu") -> dict[str, Tensor]:
    """A safetensors file. Raises `UserError` when it is missing, truncated or damaged."""
    try:
        return load_file(path, device=device)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {path} ({error}); choose another checkpoint with --step") from error


def load_rank_states(folder: Path, meta: Mapping, name: str) -> list[dict[str, Tensor]]:
    """The files `name` ("optimizer" or "loader") of all ranks that wrote the checkpoint, on the CPU."""
    return [load_tensors(folder / f"{name}_rank{rank}.safetensors") for rank in range(meta["world_size"])]


def load_tokenizer(folder: Path, meta: Mapping) -> Tokenizer:
    """The checkpoint's own tokenizer, checked against the model it was saved with."""
    if not (folder / "tokenizer").is_dir():
        raise UserError(f"{folder} has no folder tokenizer; choose another checkpoint with --step or --model-tag")
    tokenizer = Tokenizer.load(folder / "tokenizer")
    check_tokenizer(tokenizer, meta, folder)
    return tokenizer


def check_tokenizer(tokenizer: Tokenizer, meta: Mapping, folder: Path) -> None:
    """Raise `UserError` unless `tokenizer` is the one the checkpoint's model was trained with."""
    vocab_size = meta["config"]["vocab_size"]
    if tokenizer.vocab_size != vocab_size or tokenizer.fingerprint != meta["tokenizer_fingerprint"]:
        raise UserError(
            f"the tokenizer (vocabulary {tokenizer.vocab_size}) is not the one checkpoint {folder} was "
            f"trained with (vocabulary {vocab_size}); use the copy in its tokenizer folder"
        )


def resumable(run: Path, args: Namespace, free: Collection[str]) -> dict:
    """The meta.json of the newest whole checkpoint of a run, from which a stage with the flags `args` continues; empty
    if there is none yet. Prints which ones are passed over as damaged. Every rank calls this; the newest is that of all
    hosts, and those that have not got it receive a copy.

    Raises `UserError` if there is one but `args.resume` is not set, if all are damaged, or if a flag not in `free`
    differs from that of the run, naming both values.
    """
    own_steps = list_steps(run, all_folders=True)
    if not any(gather_ranks(own_steps)):
        return {}
    if not args.resume:
        raise UserError(
            f"{run} holds checkpoints of an earlier run; continue it with --resume, choose another --model-tag, or "
            f"move the folder away"
        )
    step, faults, is_first = -1, {}, is_first_of_host()
    with together():
        for number in reversed(own_steps if is_first else []):
            fault = fault_in(step_dir(run, number))
            if fault is None:
                step = number
                break
            faults[number] = fault
    found = gather_ranks((step, faults))
    newest, source = max((number, -rank) for rank, (number, _) in enumerate(found))
    if newest < 0:
        worst = max(fault for _, all_faults in found for fault in all_faults.items())[1]
        raise UserError(f"every checkpoint in {run} is damaged, the newest because {worst}; move it away")
    for damaged, fault in sorted({item for _, all_faults in found for item in all_faults.items()}, reverse=True):
        if damaged > newest:
            print0(f"passed over {step_dir(run, damaged).name}, which is damaged: {fault}")
    folder = step_dir(run, newest)
    fetch(folder, -source, is_whole=step == newest)
    with together():
        meta = read_meta(folder)
        for name, value in vars(args).items():
            before = meta["args"].get(name)
            if name not in free and before != value:
                raise UserError(
                    f"--{name.replace('_', '-')} is {value} here but {before} in the run being resumed ({folder}); "
                    f"leave it as it was, or choose another --model-tag"
                )
    return meta


def fetch(folder: Path, source: int, *, is_whole: bool = True) -> None:
    """See to it that every host has the checkpoint `folder` of rank `source`, as it is there. A copy replaces copies
    fetched before; another checkpoint, or one that `is_whole` not, is set aside. Every rank calls this."""
    own = _identity(folder) if is_whole else None
    everywhere = gather_ranks(own)

    def make_room() -> None:
        for mark in folder.parent.glob(f"step_*/{COPY_MARK}"):
            shutil.rmtree(mark.parent)
        if folder.exists():
            _set_aside(folder)

    if bring(folder, source, is_here=own == everywhere[source], make_room=make_room):
        (folder / COPY_MARK).touch()


def _identity(folder: Path) -> list[bytes] | None:
    """What tells a checkpoint from another of the same step; None if there is none."""
    if not (folder / "meta.json").is_file():
        return None
    return [path.read_bytes() for path in (folder / "meta.json", *sorted(folder.glob("checksums_rank*.json")))]


# --- choosing ------------------------------------------------------------------------------------


def add_checkpoint_flags(parser: ArgumentParser, *, source: str = "base") -> None:
    """The flags that choose a checkpoint, for scripts that only read one; `source` is the default stage, or "" for what
    `find_checkpoint` takes without one."""
    (stage,) = shared(source=source)
    if not source:
        stage = replace(stage, help=f"{stage.help} (default: that of the chat model saved last)")
    add_flags(parser.add_argument_group("model"), (stage, *shared("model_tag", "step")))


def stage_of(folder: Path) -> str:
    """The stage, one of `SOURCES`, of a checkpoint's folder."""
    return folder.parent.parent.name.removesuffix("_checkpoints")


def find_checkpoint(source: str = "", *, model_tag: str = "", step: int | None = None) -> Path:
    """Folder of a checkpoint: by default the newest step of the run saved last. Without a `source`, that is the run of
    a chat stage, and one of pretraining only where there is no other. Raises `UserError` if there is none."""
    runs = [run for stage in ((source,) if source else reversed(SOURCES)) for run in _runs(stage)]
    fitting = [run for run in runs if model_tag in ("", run.name)]
    chats = [run for run in fitting if run.parent != source_dir("base")]
    fitting = fitting if source else chats or fitting
    if not fitting:
        raise UserError(_none_found(source, model_tag, {run.name for run in runs}))
    run = max(fitting, key=lambda run: _saved_at(step_dir(run, list_steps(run)[-1])))
    steps = list_steps(run)
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {run}; there are {', '.join(map(str, steps))}")
    return step_dir(run, steps[-1] if step is None else step)


def _runs(source: str) -> list[Path]:
    """The folders of a stage's runs that have a checkpoint."""
    root = source_dir(source)
    return [path for path in sorted(root.iterdir()) if list_steps(path)] if root.is_dir() else []


def _none_found(source: str, model_tag: str, tags: Collection[str]) -> str:
    """Says that there is no checkpoint of `model_tag` among the `tags` of a stage, which others there are, and what
    makes one."""
    what = f"no {source} checkpoint".replace("  ", " ") + (f" with --model-tag {model_tag!r}" if model_tag else "")
    others = [stage for stage in SOURCES if any(model_tag in ("", run.name) for run in _runs(stage))]
    hints = [f"{did_you_mean(model_tag, tags)}there are {', '.join(sorted(tags))}"] if tags else []
    hints += [f"choose --source {' or '.join(others)}"] if others else []
    hints += [f"train one first: {TRAINED_BY[source if others else '']}"] if others or not tags else []
    hints += [] if others or tags else ["or set NANOCHAT_BASE_DIR to where one is"]
    return f"{what} in {base_dir()}; {'; '.join(hints)}"


def _saved_at(folder: Path) -> float:
    """When a checkpoint was written, in seconds since 1970. It says so itself, as copying a folder changes the times of
    its files; one from before November 2026 does not."""
    try:
        return read_meta(folder)["saved_at"]
    except (UserError, KeyError):
        return (folder / "meta.json").stat().st_mtime


def find_on_hosts(source: str, *, model_tag: str = "", step: int | None = None) -> tuple[Path, int]:
    """As `find_checkpoint`, on the disks of all hosts, and a rank that has it. Every rank calls this."""
    folder, when, failure = None, 0.0, None
    try:
        folder = find_checkpoint(source, model_tag=model_tag, step=step)
        when = _saved_at(folder)
    except UserError as error:
        failure = error
    found = gather_ranks((when, folder and folder.relative_to(base_dir())))
    newest, rank = max((when, -rank) for rank, (when, path) in enumerate(found))
    if not newest:
        raise failure
    return base_dir() / found[-rank][1], -rank
