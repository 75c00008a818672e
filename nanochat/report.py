"""The report of a run: stages append records as JSON lines, `generate` renders Markdown from them.

    python -m nanochat.report reset       # start a new report; the records of the last one are moved aside
    python -m nanochat.report generate    # write report.md from what the stages recorded so far

Not here: reading the Markdown back, or any number that a stage did not record.
"""

import argparse
import base64
import io
import json
import math
import os
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from nanochat.common import UserError, base_dir, disk_errors, print0, run_main, write_atomic
from nanochat.hardware import PRICES_AS_OF, gpu_hour_dollars

REPO = Path(__file__).resolve().parent.parent
ENVIRONMENT = "environment"  # the record that `reset` writes; every other record is a stage's

# Stages in the order they run: heading, and the model that the stage makes ("" where the setting `source` says which
# model it looked at).
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
}
MODELS = ("base", "mid", "sft", "rl")
CHAT_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "ChatCORE")
EXAMS = ("Spelling", "SmallWorld-")  # what the names of further exams begin with
SUMMARY = {  # metric: (stages that measure it, the surest first; models it is measured on)
    "CORE": (("base_eval", "base_train"), ("base",)),
    **{task: (("chat_eval",), ("mid", "sft", "rl")) for task in CHAT_TASKS},
    "val bpb": (("base_loss", "base_train", "mid_train", "chat_sft"), ("base", "mid", "sft")),
}
CURVES = {  # key in metrics.jsonl: (title, label of the axis with its unit, whether the axis starts at 0)
    "train_loss": ("training loss", "nats per token", False),
    "val_bpb": ("validation", "bits per byte", False),
    "core": ("CORE", "centred accuracy", False),
    "reward": ("reward in training", "mean of a step's replies", True),
    "val_reward": ("reward on held-out questions", "mean", True),
    "tokens_per_second": ("throughput", "tokens per second", True),
}
MAX_CURVE_POINTS = 300  # of more steps, means are drawn: all that can be seen at this width, in about 20 KB
CODE_SUFFIXES = {".py", ".rs", ".sh", ".html"}


@dataclass(frozen=True)
class Record:
    """What one run of a stage reported; the fields are those of `append_record`, `time` is in Unix seconds."""

    stage: str
    time: float
    settings: dict[str, Any]
    results: dict[str, Any]
    table: list[dict[str, Any]] | None = None
    samples: list[str] | None = None
    metrics_path: str | None = None  # relative to the base folder where it lies inside, so that the folder can move

    @property
    def model(self) -> str:
        """The model it is about: a name of `MODELS`, or the path of a yardstick from elsewhere."""
        made = STAGES.get(self.stage, ("", "other"))[1]
        return str(made or self.settings.get("hf_path") or self.settings.get("source") or "base")


def report_dir() -> Path:
    """Folder of the records and of the rendered report. Not created here."""
    return base_dir() / "report"


def records_path() -> Path:
    """The file of records of the current report, one JSON object a line."""
    return report_dir() / "records.jsonl"


# --- records -------------------------------------------------------------------------------------


def append_record(
    stage: str,
    *,
    settings: Mapping[str, Any],
    results: Mapping[str, Any],
    table: list[Mapping[str, Any]] | None = None,
    samples: list[str] | None = None,
    metrics_path: Path | None = None,
) -> None:
    """Add what a stage has to report to the records of the current report.

    `settings` are the stage's flags, `results` its final numbers, or `{"not_run": "no data"}` where it could not
    run. `table` holds rows of columns, `samples` generated texts; the curves are drawn from the run's `metrics.jsonl`
    at `metrics_path`. Values may be 0-d tensors, numpy scalars and paths. Numbers that are not finite are kept as
    the texts "nan", "inf" and "-inf", which JSON has no numbers for.

    One process should call this (rank 0); several that do at once each get a whole line. Raises `UserError` when
    the record cannot be written.
    """
    record = {"stage": stage, "time": time.time(), "settings": settings, "results": results}
    optional = {"table": table, "samples": samples, "metrics_path": _portable(metrics_path)}
    record.update({key: value for key, value in optional.items() if value is not None})
    line = json.dumps(_jsonable(record), ensure_ascii=False, allow_nan=False)
    path = records_path()
    with disk_errors(f"the record of {stage}", path), _locked(path), open(path, "a+b") as file:
        # A writer that was killed may have left half a line: it must not swallow this one.
        file.write((b"" if _ends_whole(file) else b"\n") + line.encode("utf-8", "replace") + b"\n")


def read_records() -> tuple[list[Record], int]:
    """All records of the current report, oldest first, and the number of lines that were not whole.

    Raises `UserError` when there is no record.
    """
    path = records_path()
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else []
    records, broken = [], 0
    for line in filter(str.strip, lines):
        try:
            record = Record(**json.loads(line))
        except (ValueError, TypeError):
            broken += 1
            continue
        if isinstance(record.settings, dict) and isinstance(record.results, dict):
            records.append(record)
        else:
            broken += 1
    if not records:
        raise UserError(f"nothing to report, no records in {path}; run a stage first, or all: bash speedrun.sh")
    return records, broken


def _locked(path: Path):
    """The lock of the records, as a context manager; creates their folder."""
    from filelock import FileLock

    path.parent.mkdir(parents=True, exist_ok=True)
    return FileLock(path.with_suffix(".lock"))


def _ends_whole(file) -> bool:
    """Whether an open binary file is empty or ends with a newline."""
    if file.seek(0, os.SEEK_END) == 0:
        return True
    file.seek(-1, os.SEEK_END)
    return file.read(1) == b"\n"


def _portable(path: Path | None) -> str | None:
    """`path` relative to the base folder where it lies inside, else absolute."""
    if path is None:
        return None
    resolved, root = Path(path).resolve(), base_dir().resolve()
    return str(resolved.relative_to(root) if resolved.is_relative_to(root) else resolved)


def _jsonable(value: Any) -> Any:
    """`value` in the types that JSON has."""
    if isinstance(value, Mapping):
        return {str(key): _jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_jsonable(item) for item in value]
    if getattr(value, "ndim", None) == 0:  # a 0-d tensor or a numpy scalar
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


# --- a new report --------------------------------------------------------------------------------


def reset(dollars_per_gpu_hour: float | None = None) -> list[Path]:
    """Start a new report with a record of this machine; checkpoints and metrics stay as they are.

    The records and the report of the last run are renamed, never deleted: returns their new paths.
    `dollars_per_gpu_hour` replaces the price of the table. Raises `UserError` when the folder cannot be written.
    """
    moved = []
    with disk_errors("a new report", report_dir()), _locked(records_path()):
        for path in (records_path(), report_dir() / "report.md"):
            if path.exists():
                moved.append(path.rename(_free_name(path)))
    append_record(ENVIRONMENT, settings={}, results=environment(dollars_per_gpu_hour))
    return moved


def _free_name(path: Path) -> Path:
    """A name beside `path` that no file has: its date of change, and a number where two share a second."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(path.stat().st_mtime))
    candidate, number = path.with_stem(f"{path.stem}-{stamp}"), 2
    while candidate.exists():
        candidate, number = path.with_stem(f"{path.stem}-{stamp}-{number}"), number + 1
    return candidate


def environment(dollars_per_gpu_hour: float | None = None) -> dict[str, Any]:
    """This machine and the versions a run depends on, with the price of a GPU-hour where one is known."""
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    listed = gpu_hour_dollars(gpus[0].name) if gpus else None
    given = dollars_per_gpu_hour is not None
    return {
        "commit": git_commit(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda if gpus else None,
        "platform": platform.platform(),
        "cpu": cpu_model(),
        "cores": os.cpu_count(),
        "memory_gib": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30,
        "gpus": [gpu.name for gpu in gpus],
        "gpu_memory_gib": gpus[0].total_memory / 2**30 if gpus else None,
        "gpu_hour_dollars": dollars_per_gpu_hour if given else listed,
        "price_source": "the price given" if given else f"price lists of {PRICES_AS_OF}",
    }


def git_commit() -> str:
    """Short id of the commit the code is at, and whether files differ from it; "unknown" outside a checkout."""
    try:
        commit, changes = (
            subprocess.run(["git", "-C", str(REPO), *command], capture_output=True, text=True, check=True).stdout
            for command in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown (not a git checkout)"
    return commit.strip() + (" with uncommitted changes" if changes.strip() else "")


def cpu_model() -> str:
    """Name of the processor; its architecture where the system tells no more."""
    cpuinfo = Path("/proc/cpuinfo")
    match = re.search(r"^model name\s*:\s*(.+)$", cpuinfo.read_text(), re.MULTILINE) if cpuinfo.exists() else None
    return match[1].strip() if match else platform.processor() or platform.machine()


# --- the report ----------------------------------------------------------------------------------


def generate() -> list[Path]:
    """Write the report of the current records to the report folder and, as `report.md`, to the working folder.

    Returns the paths written. Raises `UserError` when there are no records or a file cannot be written.
    """
    markdown = render(*read_records())
    paths = [report_dir() / "report.md", Path.cwd() / "report.md"]
    for path in paths:
        write_atomic(path, markdown)
    return paths


def render(records: list[Record], broken: int = 0) -> str:
    """The report in Markdown: summary, environment, cost, code size, a section per stage, pictures at the end.

    Of a stage that ran several times the last record counts. `broken` is the number of unreadable lines to mention.
    """
    machine = next((record.results for record in records if record.stage == ENVIRONMENT), {})
    latest = {(record.stage, record.model): record for record in records if record.stage != ENVIRONMENT}
    seconds = wall_clock_seconds(records)
    parts = ["# nanochat report", f"Generated {_utc(time.time())} from records up to {_utc(records[-1].time)}."]
    parts += ["## Summary", _summary(latest)]
    parts += [f"Total wall-clock time, start of the report to last record: **{format_duration(seconds)}**."]
    parts += ["## Environment", _environment(machine), "## Cost estimate", _cost(machine, seconds)]
    parts += ["## Code size", _code_size()]
    recorded = {stage for stage, _ in latest}
    not_run = [f"- {name} (`{stage}`): not run" for stage, (name, _) in STAGES.items() if stage not in recorded]
    pictures: dict[str, bytes] = {}
    for key in sorted(latest, key=_stage_order):
        title, reason = _title(latest[key]), latest[key].results.get("not_run")
        if reason is not None:
            not_run.append(f"- {title}: not run, {_escape(reason)}")
        else:
            attempts = sum((record.stage, record.model) == key for record in records)
            parts += [f"## {title}", *_stage(latest[key], attempts, pictures)]
    parts += ["## Not run", "\n".join(not_run)] if not_run else []
    parts += [f"{broken} line(s) of the records were unreadable (a stage stopped while writing)."] if broken else []
    parts += [f"[{name}]: data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in pictures.items()]
    return "\n\n".join(parts) + "\n"


def wall_clock_seconds(records: list[Record]) -> float:
    """From the start of the report (or of the first stage, if it says how long it took) to the last record."""
    first = records[0]
    took = first.results.get("elapsed_seconds", 0.0)
    return records[-1].time - first.time + (took if isinstance(took, (int, float)) else 0.0)


def _summary(latest: Mapping[tuple[str, str], Record]) -> str:
    """The table of the main metrics, one column a model; further exams only where one was taken."""
    results = [latest[stage, model].results for stage, model in latest if stage == "chat_eval"]
    exams = dict.fromkeys(
        name for numbers in results for name in numbers if name.startswith(EXAMS) and name not in SUMMARY
    )
    rows = [
        {"Metric": f"**{metric}**", **{m.upper(): _cell(latest, metric, m) for m in MODELS}}
        for metric in (*SUMMARY, *exams)
    ]
    return _markdown_table(rows) + "\n\nA dash: not measured at that stage."


def _cell(latest: Mapping[tuple[str, str], Record], metric: str, model: str) -> str:
    """What the summary says of a metric of a model: its value, or that and why there is none."""
    stages, measured_on = SUMMARY.get(metric, (("chat_eval",), ()))
    found = [latest[stage, model].results for stage in stages if (stage, model) in latest]
    value = next((value for results in found if (value := _lookup(results, metric)) is not None), None)
    if value is not None:
        return format_value(value)
    if model not in measured_on:
        return "-"
    reason = next((results["not_run"] for results in found if "not_run" in results), None)
    return "not run" if reason is None else f"not run, {_escape(reason)}"


def _lookup(results: Mapping[str, Any], metric: str) -> Any:
    """The result of that name, however it is spelled: `val_bpb` for "val bpb", `arc_easy` for "ARC-Easy"."""
    plain = {re.sub(r"[^a-z0-9]", "", key.lower()): value for key, value in results.items()}
    return plain.get(re.sub(r"[^a-z0-9]", "", metric.lower()))


def _environment(machine: Mapping[str, Any]) -> str:
    """The table of the machine and its versions."""
    if not machine:
        return "Not recorded: `python -m nanochat.report reset` was not run before the stages."
    gpus = machine.get("gpus") or []
    kinds = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus))
    rows = {
        "Code": machine.get("commit"),
        "Python, torch": f"{machine.get('python')}, {machine.get('torch')}",
        "Platform": machine.get("platform"),
        "CPU": f"{machine.get('cpu')}, {machine.get('cores')} cores, {machine.get('memory_gib', 0):.0f} GiB of memory",
        "GPU": f"{kinds}, {machine['gpu_memory_gib']:.0f} GiB each, CUDA {machine.get('cuda')}" if gpus else "none",
    }
    return _markdown_table([{"": key, "Value": _escape(value)} for key, value in rows.items()])


def _cost(machine: Mapping[str, Any], seconds: float) -> str:
    """What the run cost, from the price of the GPUs and the wall-clock time."""
    gpus, price = machine.get("gpus") or [], machine.get("gpu_hour_dollars")
    if not gpus:
        return "No GPU, so no estimate."
    if price is None:
        return f"No price is known for {_escape(gpus[0])}; give one with `reset --dollars-per-gpu-hour`."
    hourly = price * len(gpus)
    return (
        f"{len(gpus)} GPU(s) at ${price:.2f} an hour ({machine.get('price_source')}) are ${hourly:.2f} an hour: "
        f"about **${hourly * seconds / 3600:.2f}** for {format_duration(seconds)}. An estimate, not a bill."
    )


def _code_size() -> str:
    """Characters, lines, files and tokens of the source, and the length of the list of dependencies."""
    texts = [path.read_text(encoding="utf-8", errors="replace") for path in _source_files(REPO)]
    lock = REPO / "requirements.lock"
    locked = lock.read_text(encoding="utf-8").splitlines() if lock.exists() else []
    rows = {
        "Characters": f"{sum(map(len, texts)):,}",
        "Lines": f"{sum(text.count(chr(10)) for text in texts):,}",
        "Files": f"{len(texts):,}",
        "Tokens (our tokenizer)": _count_tokens(texts),
        "Lines of `requirements.lock`": f"{len(locked):,} ({sum('==' in line for line in locked)} of packages)",
    }
    return _markdown_table([{"": key, "Count": value} for key, value in rows.items()])


def _source_files(folder: Path) -> Iterator[Path]:
    """Source files below `folder`, leaving out hidden folders and build output."""
    for root, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in ("target", "wandb"))
        yield from (Path(root, name) for name in sorted(names) if Path(name).suffix in CODE_SUFFIXES)


def _count_tokens(texts: list[str]) -> str:
    """Tokens of the texts under the tokenizer of this run, in words where there is none."""
    from nanochat.tokenizer import Tokenizer, tokenizer_dir  # loads tiktoken, which `append_record` has no use for

    try:
        tokenizer = Tokenizer.load(tokenizer_dir())
    except UserError:
        return "not counted: no tokenizer trained yet"
    return f"{sum(map(len, tokenizer.encode_batch(texts))):,}"


# --- sections of the stages ----------------------------------------------------------------------


def _stage_order(key: tuple[str, str]) -> tuple[int, int, str]:
    """Sorts (stage, model) in the order of the pipeline, what is not part of it last."""
    stage, model = key
    stage_at = list(STAGES).index(stage) if stage in STAGES else len(STAGES)
    return stage_at, MODELS.index(model) if model in MODELS else len(MODELS), stage + model


def _title(record: Record) -> str:
    """Heading of a record, with the model where a stage can look at several."""
    name, made = STAGES.get(record.stage, (record.stage, "other"))
    return _escape(name if made else f"{name} ({record.model})")


def _stage(record: Record, attempts: int, pictures: dict[str, bytes]) -> Iterator[str]:
    """The blocks of a stage's section; its curves are added to `pictures`, name to PNG."""
    earlier = f"; {attempts - 1} earlier attempt(s) not shown" if attempts > 1 else ""
    yield f"`{record.stage}`, recorded {_utc(record.time)}{earlier}."
    if record.results:
        yield _pairs(record.results, "Result")
    if record.table:
        columns = dict.fromkeys(column for row in record.table for column in row)
        yield _markdown_table([{_escape(c): format_value(row.get(c, "")) for c in columns} for row in record.table])
    if record.metrics_path is not None:
        yield from _curves(record, pictures)
    for number, sample in enumerate(record.samples or [], start=1):
        yield f"Sample {number}:\n\n{_fenced(sample)}"
    if record.settings:
        yield f"<details><summary>Settings</summary>\n\n{_pairs(record.settings, 'Setting')}\n\n</details>"


def _curves(record: Record, pictures: dict[str, bytes]) -> Iterator[str]:
    """References to the pictures of a record's curves, or why there are none."""
    path = base_dir() / record.metrics_path
    if not path.exists():
        yield f"No curves: {_escape(path.name)} of this run is gone."
        return
    series = read_curves(path)
    drawable = {key: points for key, points in series.items() if len(points) > 1}
    if not drawable:
        yield "No curves: too few steps."
        return
    for key, points in drawable.items():
        title, label, from_zero = CURVES[key]
        name = f"{record.stage}-{record.model}-{key}".replace("_", "-")
        try:
            pictures[name] = draw_curve(points, title=title, label=label, from_zero=from_zero)
        except ImportError:
            yield "No curves: matplotlib is not installed."
            return
        yield f"![{title}, {label}, by step][{name}]"


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) points of every curve in a `metrics.jsonl`, in the order of `CURVES`.

    A run that resumed from an earlier step wrote some steps twice: what it wrote last replaces them. Lines that are
    not whole and values that are not finite are left out.
    """
    series: dict[str, list[tuple[int, float]]] = {key: [] for key in CURVES}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            metrics = json.loads(line)
            step = int(metrics["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for key, points in series.items():
            value = metrics.get(key)
            if isinstance(value, (int, float)) and math.isfinite(value):
                while points and points[-1][0] >= step:
                    points.pop()
                points.append((step, float(value)))
    return {key: points for key, points in series.items() if points}


def draw_curve(points: list[tuple[int, float]], *, title: str, label: str, from_zero: bool = False) -> bytes:
    """A curve over the steps as a PNG. Raises `ImportError` where matplotlib is missing."""
    from matplotlib.figure import Figure  # the object interface: no display, no global state
    from matplotlib.ticker import EngFormatter

    every = math.ceil(len(points) / MAX_CURVE_POINTS)
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    steps = [group[-1][0] for group in groups]
    values = [sum(value for _, value in group) / len(group) for group in groups]
    figure = Figure(figsize=(6.4, 2.8), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="#1f5a99", linewidth=1.6, marker="o" if len(values) <= 40 else "", markersize=3)
    axes.set(xlabel=f"step (each point the mean of {every})" if every > 1 else "step", ylabel=label)
    axes.set_title(f"{title}: {format_value(points[-1][1])} at step {points[-1][0]:,}", fontsize=10)
    if from_zero:
        axes.set_ylim(bottom=0)
    if max(values) >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# --- Markdown ------------------------------------------------------------------------------------


def _markdown_table(rows: list[Mapping[str, str]]) -> str:
    """Rows of already escaped cells as a table; the first row names the columns."""
    lines = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _pairs(mapping: Mapping[str, Any], heading: str) -> str:
    """A mapping as a table of two columns, nested mappings flattened with dots."""
    return _markdown_table([{heading: _escape(k), "Value": format_value(v)} for k, v in _flatten(mapping)])


def _flatten(mapping: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def format_value(value: Any) -> str:
    """A value for a cell: thousands separated, four decimals at most, small numbers with three digits."""
    if isinstance(value, float):
        if value == 0 or 0.01 <= abs(value) < 1000:
            return f"{value:.4f}".rstrip("0").rstrip(".") or "0"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    return "-" if value is None else _escape(value)


def format_duration(seconds: float) -> str:
    """Seconds in the two largest units that matter: "3 h 51 min", "4 min 7 s", "12 s"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _escape(value: Any) -> str:
    """Text that Markdown and its tables show as it is, on one line."""
    return re.sub(r"([\\|*`<\[\]])", r"\\\1", " ".join(str(value).split()))


def _fenced(text: str) -> str:
    """Text in a code fence longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


# --- command -------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m nanochat.report", description="Start or render the report.")
    parser.add_argument("action", choices=("reset", "generate"), help="start a new report, or write report.md")
    parser.add_argument("--dollars-per-gpu-hour", type=float, default=None,
                        help="price for the cost estimate, with reset (default: a table by GPU name)")  # fmt: skip
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.dollars_per_gpu_hour is not None and not 0 <= args.dollars_per_gpu_hour < math.inf:
        raise UserError(f"--dollars-per-gpu-hour {args.dollars_per_gpu_hour} is not a price; give 0 or more")
    if args.action == "reset":
        for path in reset(args.dollars_per_gpu_hour):
            print0(f"kept the last report's {path.name}")
        print0(f"new report: {records_path()}")
    else:
        print0("wrote " + " and ".join(map(str, generate())))


if __name__ == "__main__":
    run_main(main, parse_args)
