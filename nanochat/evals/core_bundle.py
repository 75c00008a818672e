"""The bundle of in-context tasks behind CORE: fetched once, then read with every row checked.

A bundle is a folder or a zip file, which is read as it is. It holds `core.yaml` (label, file, kind, shots and delimiter
of each task), `eval_meta_data.csv` (accuracy of guessing) and `eval_data/**.jsonl` (one example a line). Not here:
prompts and scores (`core_eval.py`).
"""

import csv
import functools
import hashlib
import json
import os
import random
import time
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import Unavailable, UserError, base_dir, fetch_once

BUNDLE_URL = "https://karpathy-public.s3.us-west-2.amazonaws.com/eval_bundle.zip"
BUNDLE_VARIABLE = "NANOCHAT_EVAL_BUNDLE"
FETCH_ATTEMPTS, FETCH_TIMEOUT_SECONDS = 4, 30
ORDER_SEED = 1337  # that of the published CORE tables of nanochat runs; it decides which examples a limited run asks
DEFAULT_DELIMITER = " "  # between question and answer, where the bundle names none
FIELDS = {  # of a record, by kind of task
    "multiple_choice": {"query": str, "choices": list, "gold": int},
    "schema": {"context_options": list, "continuation": str, "gold": int},
    "language_modeling": {"context": str, "continuation": str},
}
OPTIONS_FIELD = {"multiple_choice": "choices", "schema": "context_options"}


def fetch_bundle(source: str = "") -> Path:
    """The task bundle, a folder or a zip file, at `source`: a path, or a URL that is fetched the first time; "" means
    the environment variable `NANOCHAT_EVAL_BUNDLE`, else the public address. Raises `UserError` when it cannot be
    fetched or is not a bundle."""
    source = source or os.environ.get(BUNDLE_VARIABLE, "") or BUNDLE_URL
    if source.startswith(("http://", "https://")):
        key = hashlib.sha256(source.encode()).hexdigest()[:16]
        return fetch_once(base_dir() / "eval_bundle" / f"{key}.zip", lambda partial: _download(source, partial))
    bundle = Path(source).expanduser()
    if not bundle.exists():
        raise UserError(f"no evaluation bundle at {source}; give --bundle a URL, a zip file or a folder")
    if fault := bundle_fault(bundle):
        raise UserError(f"{source} is {fault}; give --bundle another one")
    return bundle


def _download(url: str, partial: Path) -> None:
    """Fetch `url` to `partial`, retrying with growing pauses until it is a whole bundle."""
    import requests

    for attempt in range(FETCH_ATTEMPTS):
        time.sleep(2**attempt - 1)
        try:
            with requests.get(url, stream=True, timeout=FETCH_TIMEOUT_SECONDS) as response, open(partial, "wb") as file:
                response.raise_for_status()
                for block in response.iter_content(1 << 20):
                    file.write(block)
            fault = bundle_fault(partial)
        except requests.RequestException as error:  # an OSError too, so it must come before the disk's
            fault = type(error).__name__ if error.response is None else f"status {error.response.status_code}"
        except OSError as error:
            raise UserError(f"cannot write the evaluation bundle to {partial.parent}: {error.strerror}") from error
        if not fault:
            return
    raise Unavailable(
        f"cannot fetch the evaluation bundle from {url} ({fault}); check the network, or give --bundle (or "
        f"{BUNDLE_VARIABLE}) another URL, a zip file or a folder"
    )


def bundle_fault(bundle: Path) -> str:
    """Why `bundle` cannot be used, or "" when it is a folder or an undamaged zip file that holds a `core.yaml`."""
    if not bundle.is_dir():
        try:
            with zipfile.ZipFile(bundle) as archive:
                damaged = archive.testzip()
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, NotImplementedError, RuntimeError) as error:
            return f"not a readable zip file: {error}"
        if damaged is not None:
            return f"damaged: {damaged} does not match its checksum"
    return "" if (_root(bundle) / "core.yaml").is_file() else "not an evaluation bundle: it holds no core.yaml"


def _root(bundle: Path) -> Path | zipfile.Path:
    """The folder of `bundle` that holds `core.yaml`: the bundle itself, or its folder `eval_bundle`."""
    top = bundle if bundle.is_dir() else zipfile.Path(bundle)
    return top / "eval_bundle" if (top / "eval_bundle" / "core.yaml").is_file() else top


@dataclass(frozen=True, eq=False)
class Task:
    """One task of the bundle: `records` are its rows in the order in which they are asked, `lines` their line numbers
    in the file, `baseline` the accuracy of guessing, 0 to 1."""

    label: str
    kind: str
    num_shots: int
    delimiter: str
    baseline: float
    records: tuple[dict, ...]
    lines: tuple[int, ...]


@functools.lru_cache(maxsize=1)
def read_tasks(bundle: Path) -> tuple[Task, ...]:
    """The tasks of a bundle, in its order. Raises `UserError` naming the file and line that is wrong."""
    import yaml

    root = _root(bundle)
    path = root / "core.yaml"
    try:
        entries = yaml.safe_load(path.read_text(encoding="utf-8"))["icl_tasks"]
        with (root / "eval_meta_data.csv").open(newline="", encoding="utf-8") as file:
            percent = {row["Eval Task"]: row["Random baseline"] for row in csv.DictReader(file)}
        tasks = tuple(_read_task(root, entry, percent) for entry in entries)
    except (OSError, zipfile.BadZipFile, yaml.YAMLError, KeyError, TypeError, IndexError, UnicodeDecodeError) as error:
        raise UserError(f"{path} or a file it names cannot be read ({type(error).__name__}: {error})") from error
    if not tasks:
        raise UserError(f"{path} names no tasks")
    return tasks


def _read_task(root: Path | zipfile.Path, entry: dict, percent: dict[str, str]) -> Task:
    label, kind = entry["label"], entry["icl_task_type"]
    if kind not in FIELDS:
        raise UserError(f"task {label} of {root} is of the unknown kind {kind!r}; known are {', '.join(FIELDS)}")
    try:
        baseline = float(percent.get(label, "nan")) / 100
    except ValueError as error:
        raise UserError(f"{root / 'eval_meta_data.csv'}: a random baseline is not a number ({error})") from error
    if not 0 <= baseline < 1:
        raise UserError(f"{root / 'eval_meta_data.csv'} has no random baseline from 0 to 100 for task {label}")
    numbered = _read_records(root / "eval_data" / entry["dataset_uri"], kind)
    random.Random(ORDER_SEED).shuffle(numbered)
    lines, records = zip(*numbered, strict=True)
    delimiter = entry.get("continuation_delimiter", DEFAULT_DELIMITER)
    return Task(label, kind, int(entry["num_fewshot"][0]), delimiter, baseline, records, lines)


def _read_records(path: Path | zipfile.Path, kind: str) -> list[tuple[int, dict]]:
    """The rows of a task file with their line numbers. Raises `UserError` naming the line that is wrong."""
    records = []
    for line, text in enumerate(path.read_text(encoding="utf-8").split("\n"), start=1):
        if not text.strip():
            continue
        try:
            record = json.loads(text)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {line} is not JSON ({error})") from error
        if fault := _record_fault(record, kind):
            raise UserError(f"{path}, line {line}: {fault}")
        records.append((line, record))
    if not records:
        raise UserError(f"{path} holds no examples")
    return records


def _record_fault(record, kind: str) -> str:
    """Why `record` is not an example of `kind`, or ""."""
    if not isinstance(record, dict):
        return "not a JSON object"
    for field, type_ in FIELDS[kind].items():
        if type(record.get(field)) is not type_:
            return f"the field {field!r} must be of type {type_.__name__}, not {record.get(field)!r}"
    if not record.get("continuation", "some"):
        return "the continuation is empty"
    options = record.get(OPTIONS_FIELD.get(kind), [])
    if not all(isinstance(option, str) and option for option in options):
        return f"an option is not a text or is empty: {options!r}"
    if "gold" in FIELDS[kind] and not 0 <= record["gold"] < len(options):
        return f"gold is {record['gold']}, but there are {len(options)} options"
    return ""
