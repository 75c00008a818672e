"""The records of a run: what each stage has to report, appended as JSON lines to `report/records.jsonl`.

Not here: what the records of a run say when read together (`results.py`), and the report made of them (`report`).
"""

import contextlib
import itertools
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from nanochat.common import base_dir, disk_errors
from nanochat.hardware import PRICES_AS_OF, gpu_hour_dollars

REPO = Path(__file__).resolve().parent.parent
PICTURES = "report_images"  # the folder of the pictures, beside report.md
REPORT_FILES = ("report.md", "report.html", PICTURES)  # what is made of the records
ENVIRONMENT = "environment"  # the record that `reset` writes; all others come from stages

# Stages in the order they run: heading, and the model the stage produces ("" for an evaluation, whose setting
# `source` names the model).
STAGES = {
    "tok_train": ("Tokenizer training", "tokenizer"),
    "tok_eval": ("Tokenizer evaluation", "tokenizer"),
    "base_train": ("Pretraining", "base"),
    "base_loss": ("Bits per byte", ""),
    "base_eval": ("CORE", ""),
    "mid_train": ("Mid-training", "mid"),
    "chat_sft": ("Supervised fine-tuning", "sft"),
    "chat_rl": ("Reinforcement learning", "rl"),
    "chat_eval": ("Chat evaluation", ""),
    "standard_eval": ("Exams with standard prompts", ""),
}
MODELS = ("base", "mid", "sft", "rl")


@dataclass(frozen=True)
class Record:
    """What one run of a stage reported: the arguments of `append_record`, and when (`time`, Unix seconds)."""

    stage: str
    time: float
    settings: dict[str, Any]
    results: dict[str, Any]
    table: list[dict[str, Any]] | None = None
    samples: list[str] | None = None
    metrics_path: str | None = None  # relative to the base folder, so that the folder can be moved

    @property
    def model(self) -> str:
        """The model it is about: one of `MODELS`, or the path of a reference model from elsewhere."""
        produced = STAGES.get(self.stage, ("", "other"))[1]
        return str(produced or self.settings.get("hf_path") or self.settings.get("source") or "base")

    @property
    def tag(self) -> str:
        """The model tag of a training stage: the name of its run's folder; "" for other stages."""
        return Path(self.metrics_path).parent.name if self.metrics_path else ""


def records_path() -> Path:
    """The records of the current report, one JSON object per line; `report.md` is rendered beside them."""
    return base_dir() / "report" / "records.jsonl"


def append_record(
    stage: str, *, settings: Mapping[str, Any], results: Mapping[str, Any], metrics_path: Path | None = None,
    table: list[Mapping[str, Any]] | None = None, samples: list[str] | None = None,
) -> None:  # fmt: skip
    """Add what a stage has to report to the current report. Call it on rank 0 only.

    `settings` are the stage's flags, `results` its final numbers, or `{"not_run": "no data"}` if it could not run.
    `table` holds rows (column to value), `samples` generated texts; curves are drawn from the run's `metrics.jsonl`
    at `metrics_path`. Values may be 0-d tensors, numpy scalars and paths. Non-finite numbers, which JSON lacks, are
    stored as the strings "nan", "inf" and "-inf". Raises `UserError` when the record cannot be written.
    """
    relative_path = metrics_path and os.path.relpath(metrics_path, base_dir())
    record = Record(stage, time.time(), settings, results, table, samples, relative_path)
    fields = {key: value for key, value in vars(record).items() if value is not None}
    line = json.dumps(_jsonable(fields), ensure_ascii=False, allow_nan=False)
    path = records_path()
    with disk_errors(f"the record of {stage}", path), FileLock(path.with_suffix(".lock")), open(path, "a+b") as file:
        # A stage that was killed while writing may have left half a line, which must not swallow this one.
        file.seek(0)
        is_whole = file.read()[-1:] in (b"", b"\n")
        file.write((b"" if is_whole else b"\n") + line.encode("utf-8", "replace") + b"\n")


def read_records() -> tuple[list[Record], int]:
    """All records of the current report, oldest first, and the number of unreadable lines; none without a report."""
    path, records = records_path(), []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            fields = json.loads(line)
            fields |= {key: dict(fields[key]) for key in ("settings", "results")}
            records.append(Record(**fields))
    return records, len(lines) - len(records)


def _jsonable(value: Any) -> Any:
    """`value` as types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if getattr(value, "ndim", None) == 0:  # a 0-d tensor or a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, int | float | str | None) else str(value)


def reset(dollars_per_gpu_hour: float | None = None) -> Path | None:
    """Start a new report with a record of this machine. Checkpoints and metrics are not touched.

    The last report, its pictures and records are moved to a folder named after their time of writing, never deleted;
    returns that folder, None if there was no report. `dollars_per_gpu_hour` overrides the price list. Raises
    `UserError` when the folder is not writable.
    """
    records, kept = records_path(), None
    with disk_errors("a new report", records.parent), FileLock(records.with_suffix(".lock")):
        if old := [path for name in (records.name, *REPORT_FILES) if (path := records.with_name(name)).exists()]:
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(old[0].stat().st_mtime))
            names = (records.with_name(f"{stamp}-{number}") for number in itertools.count(1))
            kept = next(folder for folder in names if not folder.exists())
            kept.mkdir()
            for path in old:
                path.rename(kept / path.name)
    append_record(ENVIRONMENT, settings={}, results=environment(dollars_per_gpu_hour))
    return kept


def environment(dollars_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """This machine, the versions a run depends on, and the price of a GPU-hour if known."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    cpuinfo = Path("/proc/cpuinfo")
    cpus = re.findall(r"^model name\s*: *(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else []
    listed, is_given = gpu_hour_dollars(gpus[0].name) if gpus else None, dollars_per_gpu_hour is not None
    return {
        "commit": git_commit(), "python": platform.python_version(), "torch": torch.__version__,
        "cuda": torch.version.cuda if gpus else None, "platform": platform.platform(),
        "cpu": cpus[0] if cpus else platform.processor() or platform.machine(), "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "gpus": [gpu.name for gpu in gpus], "gpu_memory_gib": gpus[0].total_memory / 2**30 if gpus else None,
        "gpu_hour_dollars": dollars_per_gpu_hour if is_given else listed,
        "price_source": "the price given" if is_given else f"price lists of {PRICES_AS_OF}",
    }  # fmt: skip


def git_commit() -> str:
    """Short hash of the checked-out commit, and whether tracked files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(REPO), "describe", "--always", "--exclude=*", "--dirty= with uncommitted changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
