"""Checkpoints: complete or absent, listed, loaded, checked. All safetensors, JSON or plain text; nothing is unpickled.

    <base>/base_checkpoints/<model tag>/
        metrics.jsonl                  every logged number of the run
        step_000500/
            meta.json                  schema, step, model config, flags, plan, statistics
            model.safetensors
            tokenizer/                 the tokenizer the model was trained with
            optimizer_rank0.safetensors, loader_rank0.safetensors     one of each per rank

A checkpoint is written under a hidden name and renamed once the files of every rank are on the disk, so a folder with
the name of a step is complete. Nothing here deletes or replaces a complete checkpoint.
"""

import json
import os
import re
import shutil
from argparse import ArgumentParser, Namespace
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from nanochat.common import Runtime, UserError, base_dir, disk_errors, gather_ranks, write_atomic
from nanochat.flags import SOURCES, add_flags, shared
from nanochat.tokenizer import Tokenizer

SCHEMA = 1
_STEP_NAME = re.compile(r"step_([0-9]+)")
_MAX_TAG_BYTES = 255  # the usual limit of file systems for a name


def source_dir(source: str) -> Path:
    """Folder of all checkpoints of a stage, one of `SOURCES`."""
    if source not in SOURCES:
        raise UserError(f"source {source!r} is unknown; choose one of {', '.join(SOURCES)}")
    return base_dir() / f"{source}_checkpoints"


def run_dir(source: str, model_tag: str) -> Path:
    """Folder of one run. Raises `UserError` for a tag that is not a plain file name."""
    is_name = model_tag not in ("", ".", "..") and "/" not in model_tag and "\0" not in model_tag
    if not is_name or len(os.fsencode(model_tag)) > _MAX_TAG_BYTES:
        raise UserError(f"--model-tag {model_tag!r} must be a plain file name of at most {_MAX_TAG_BYTES} bytes")
    return source_dir(source) / model_tag


def list_steps(run: Path) -> list[int]:
    """Steps of the complete checkpoints of a run, ascending."""
    names = [_STEP_NAME.fullmatch(entry.name) for entry in run.iterdir()] if run.is_dir() else []
    steps = {int(m[1]) for m in names if m}
    return sorted(step for step in steps if (step_dir(run, step) / "meta.json").is_file())


def step_dir(run: Path, step: int) -> Path:
    return run / f"step_{step:06d}"


# --- writing -------------------------------------------------------------------------------------


def save_checkpoint(
    run: Path, step: int, *, runtime: Runtime, model: nn.Module, tokenizer: Tokenizer, meta: Mapping,
    optimizer_state: Mapping[str, Tensor] | None = None, loader_state: Mapping[str, Tensor] | None = None,
) -> Path:  # fmt: skip
    """Write one checkpoint; every rank calls this. Returns its folder.

    `model.config` is a dataclass; `meta` is the stage's own record, of values that JSON can hold, to which config,
    tokenizer fingerprint and schema are added. Raises `UserError`, on every rank alike, when it cannot be written or
    the step has a checkpoint already. Earlier checkpoints are never touched.
    """
    final = step_dir(run, step)
    partial = run / f".{final.name}.partial"
    try:
        with _on_all_ranks(run):
            if runtime.is_main:
                if final.exists():
                    raise UserError(f"{final} is there already; move it away, or choose another --model-tag")
                for abandoned in run.glob(".step_*.partial"):  # by a run that was killed while writing
                    shutil.rmtree(abandoned)
                partial.mkdir(parents=True)
        with _on_all_ranks(run):
            for name, state in (("optimizer", optimizer_state), ("loader", loader_state)):
                if state is not None:
                    _save_tensors(partial / f"{name}_rank{runtime.rank}.safetensors", state)
            if runtime.is_main:
                _save_tensors(partial / "model.safetensors", model.state_dict())
                tokenizer.save(partial / "tokenizer")
                own = {"schema": SCHEMA, "step": step, "world_size": runtime.world_size}
                own |= {"config": asdict(model.config), "tokenizer_fingerprint": tokenizer.fingerprint}
                write_atomic(partial / "meta.json", json.dumps({**meta, **own}, indent=1))
        with _on_all_ranks(run):
            if runtime.is_main:
                _sync(partial / "tokenizer")
                _sync(partial)
                partial.rename(final)
                _sync(run)
    except BaseException:
        if runtime.is_main:
            shutil.rmtree(partial, ignore_errors=True)
        raise
    return final


@contextmanager
def _on_all_ranks(run: Path) -> Iterator[None]:
    """Wait for all ranks at the end of the block. If it fails on one of them, every rank raises a `UserError`, so that
    none waits for another that has stopped."""
    failure = None
    try:
        with disk_errors("the checkpoint", run):
            yield
    except UserError as error:
        failure = error
    messages = gather_ranks(failure and str(failure))
    if failure is not None:
        raise failure
    for rank, message in enumerate(messages):
        if message is not None:
            raise UserError(f"process {rank}: {message}")


def _save_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    # parameters are views into shared storage, which safetensors refuses, so each tensor is copied
    as_own = {"device": "cpu", "copy": True, "memory_format": torch.contiguous_format}
    try:
        save_file({name: tensor.detach().to(**as_own) for name, tensor in tensors.items()}, path)
    except SafetensorError as error:
        raise UserError(f"cannot write {path.name} to {path.parent.parent}: {error}") from error
    _sync(path)


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
    """The meta.json of the newest checkpoint of a run, from which a stage with the flags `args` continues; empty if
    there is none yet.

    Raises `UserError` if there is one but `args.resume` is not set, or if a flag not in `free` differs from that of the
    run, naming both values.
    """
    steps = list_steps(run)
    if not steps:
        return {}
    if not args.resume:
        raise UserError(
            f"{run} holds checkpoints of an earlier run; continue it with --resume, choose another --model-tag, or "
            f"move the folder away"
        )
    folder = step_dir(run, steps[-1])
    meta = read_meta(folder)
    for name, value in vars(args).items():
        before = meta["args"].get(name)
        if name not in free and before != value:
            raise UserError(
                f"--{name.replace('_', '-')} is {value} here but {before} in the run being resumed ({folder}); "
                f"leave it as it was, or choose another --model-tag"
            )
    return meta


# --- choosing ------------------------------------------------------------------------------------


def add_checkpoint_flags(parser: ArgumentParser, *, source: str = "base") -> None:
    """The flags that choose a checkpoint, for scripts that only read one; `source` is the default stage."""
    add_flags(parser, shared("model_tag", "step", source=source))


def find_checkpoint(source: str, *, model_tag: str = "", step: int | None = None) -> Path:
    """Folder of a checkpoint: by default the newest step of the run saved last. Raises `UserError` if there is none."""
    root = source_dir(source)
    if model_tag:
        run = run_dir(source, model_tag)
    else:
        runs = [path for path in root.iterdir() if list_steps(path)] if root.is_dir() else []
        if not runs:
            raise UserError(f"no {source} checkpoint in {root}; train one first, or set NANOCHAT_BASE_DIR")
        run = max(runs, key=lambda path: (step_dir(path, list_steps(path)[-1]) / "meta.json").stat().st_mtime)
    steps = list_steps(run)
    if not steps:
        raise UserError(f"no checkpoint in {run}; check --model-tag, or train one first")
    if step is not None and step not in steps:
        raise UserError(f"no checkpoint of step {step} in {run}; there are {', '.join(map(str, steps))}")
    return step_dir(run, steps[-1] if step is None else step)
