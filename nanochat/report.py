"""The report of a run: stages append records as JSON lines, `generate` renders them as one Markdown file.

    python -m nanochat.report reset       # start a new report; the last one is kept under another name
    python -m nanochat.report generate    # write report.md from what the stages have recorded so far

The Markdown is never read back, and shows no number that a stage did not record.
"""

import argparse
import base64
import contextlib
import io
import itertools
import json
import math
import os
import platform
import re
import subprocess
import time
from collections import ChainMap, Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from nanochat.common import UserError, base_dir, disk_errors, print0, run_main, write_atomic
from nanochat.flags import Parser
from nanochat.hardware import PRICES_AS_OF, gpu_hour_dollars

REPO = Path(__file__).resolve().parent.parent
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
}
MODELS = ("base", "mid", "sft", "rl")
CHAT_TASKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "ChatCORE")
EXTRA_TASKS = ("Spelling", "SmallWorld-")  # prefixes of chat tasks that are listed only where they were run
SUMMARY = {  # result: (name in the summary, stages that record it, most accurate first, models it is measured on)
    "core": ("CORE", ("base_eval", "base_train"), ("base",)),
    **{task: (task, ("chat_eval",), ("mid", "sft", "rl")) for task in CHAT_TASKS},
    "val_bpb": ("val bpb", ("base_loss", "base_train", "mid_train", "chat_sft"), ("base", "mid", "sft")),
}
CURVES = {  # key in metrics.jsonl: (title, y axis label with unit, whether the y axis starts at 0)
    "train_loss": ("training loss", "nats per token", False),
    "val_bpb": ("validation", "bits per byte", False),
    "core": ("CORE", "centred accuracy", False),
    "reward": ("reward in training", "mean of a step's replies", True),
    "val_reward": ("reward on held-out questions", "mean", True),
    "tokens_per_second": ("throughput", "tokens per second", True),
}
MAX_CURVE_POINTS = 300  # longer runs are drawn as means of several steps: no visible loss, and pictures of about 20 KB
MEASURED = re.compile(r"second|mfu|peak_memory")  # in the names of results that differ between runs otherwise the same
CODE_SUFFIXES = {".py", ".rs", ".sh", ".html"}


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
    def title(self) -> str:
        """Heading of its section, with the model if the stage evaluates several."""
        name, produced = STAGES.get(self.stage, (self.stage, "other"))
        return _escape(name if produced else f"{name} ({self.model})")


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
    """All records of the current report, oldest first, and the number of unreadable lines.

    Raises `UserError` when there is no record.
    """
    path, records = records_path(), []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = [line for line in text.split("\n") if line.strip()]
    for line in lines:
        with contextlib.suppress(ValueError, TypeError, KeyError):
            fields = json.loads(line)
            fields |= {key: dict(fields[key]) for key in ("settings", "results")}
            records.append(Record(**fields))
    if not records:
        raise UserError(f"nothing to report, no records in {path}; run a stage first, or all: bash speedrun.sh")
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


def reset(dollars_per_gpu_hour: float | None = None) -> list[Path]:
    """Start a new report with a record of this machine. Checkpoints and metrics are not touched.

    The last report and its records are renamed after their time of writing, never deleted; returns their new paths.
    `dollars_per_gpu_hour` overrides the price list. Raises `UserError` when the folder is not writable.
    """
    records, moved = records_path(), []
    with disk_errors("a new report", records.parent), FileLock(records.with_suffix(".lock")):
        for path in filter(Path.exists, (records, records.with_name("report.md"))):
            stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime(path.stat().st_mtime))
            names = (path.with_stem(f"{path.stem}-{stamp}-{number}") for number in itertools.count(1))
            moved.append(path.rename(next(name for name in names if not name.exists())))
    append_record(ENVIRONMENT, settings={}, results=environment(dollars_per_gpu_hour))
    return moved


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


# --- the report ----------------------------------------------------------------------------------


def generate() -> list[Path]:
    """Write `report.md` to the report folder and to the working directory; returns both paths."""
    markdown = render(*read_records())
    paths = [records_path().with_name("report.md"), Path.cwd() / "report.md"]
    for path in paths:
        write_atomic(path, markdown)
    return paths


def render(records: list[Record], broken: int = 0) -> str:
    """The report in Markdown: summary, environment, cost, code size, a section per stage, pictures at the end.

    If a stage ran several times, its last record counts. `broken` is the number of unreadable lines to mention.
    """
    # Without `reset`, the first record was written at the end of its stage.
    started = records[0].time - records[0].results.get("elapsed_seconds", 0.0)
    duration = timedelta(seconds=round(records[-1].time - started))
    machine = next((record.results for record in records if record.stage == ENVIRONMENT), {})
    latest = {(record.stage, record.model): record for record in records if record.stage != ENVIRONMENT}
    contents = set()  # of attempts: a stage that ended twice, as it was killed just after its end, is one
    for record in records:
        results = {name: value for name, value in record.results.items() if not MEASURED.search(name)}
        contents.add((record.stage, record.model, json.dumps([record.settings, results])))
    attempts = Counter(content[:2] for content in contents)
    parts = [
        "# nanochat report", f"Generated {_utc(time.time())} from records up to {_utc(records[-1].time)}.",
        "## Summary", _summary(latest),
        f"Total wall-clock time (h:mm:ss), start of the report to last record: **{duration}**.",
        "## Environment", _environment(machine),
        "## Cost estimate", _cost(machine, duration),
        "## Code size", _code_size(),
    ]  # fmt: skip
    pictures: dict[str, bytes] = {}
    not_run = []
    for stage in (*STAGES, *sorted({stage for stage, _ in latest}.difference(STAGES))):
        models = {model for name, model in latest if name == stage}
        if not models:
            not_run.append(f"- {STAGES[stage][0]} (`{stage}`): not run")
        for model in sorted(models, key=lambda model: ((*MODELS, model).index(model), model)):
            record = latest[stage, model]
            if "not_run" in record.results:
                not_run.append(f"- {record.title}: {_not_run(record.results)}")
            else:
                parts += [f"## {record.title}", *_stage(record, attempts[stage, model] - 1, pictures)]
    parts += ["## Not run", "\n".join(not_run)] if not_run else []
    if broken:
        parts.append(f"{broken} unreadable line(s) of the records were skipped (a stage was killed while writing).")
    parts += [f"[{name}]: data:image/png;base64,{base64.b64encode(png).decode()}" for name, png in pictures.items()]
    return "\n\n".join(parts) + "\n"


def _summary(latest: Mapping[tuple[str, str], Record]) -> str:
    """The table of the main metrics, a column per model; extra tasks only where one was run."""
    evaluated = [name for (stage, _), record in latest.items() if stage == "chat_eval" for name in record.results]
    extra = [name for name in evaluated if name.startswith(EXTRA_TASKS) and name not in SUMMARY]
    metrics = SUMMARY | {name: (name, ("chat_eval",), ()) for name in extra}
    rows = []
    for key, (name, stages, measured_on) in metrics.items():
        cells = []
        for model in MODELS:
            results = ChainMap(*(latest[stage, model].results for stage in stages if (stage, model) in latest))
            is_due = results.get(key) is None and model in measured_on
            cells.append(_not_run(results) if is_due else format_value(results.get(key)))
        rows.append([f"**{name}**", *cells])
    return _table(["Metric", *map(str.upper, MODELS)], rows) + "\n\nA dash: not measured at that stage."


def _not_run(results: Mapping[str, Any]) -> str:
    return f"not run, {_escape(results['not_run'])}" if "not_run" in results else "not run"


def _environment(machine: Mapping[str, Any]) -> str:
    if not machine:
        return "Not recorded: `python -m nanochat.report reset` was not run before the stages."
    gpus = machine.get("gpus") or []
    kinds = [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]
    return _pairs("Machine", {**machine, "gpus": kinds or "none"})


def _cost(machine: Mapping[str, Any], duration: timedelta) -> str:
    gpus, price = machine.get("gpus") or [], machine.get("gpu_hour_dollars")
    if not gpus:
        return "No GPU, so no estimate."
    if price is None:
        return f"No price is known for {_escape(gpus[0])}; give one with `reset --dollars-per-gpu-hour`."
    hourly = price * len(gpus)
    return (
        f"{len(gpus)} GPU(s) at ${price:.2f} an hour each ({machine.get('price_source')}) cost ${hourly:.2f} an hour: "
        f"about **${hourly * duration.total_seconds() / 3600:.2f}** for {duration}. An estimate, not a bill."
    )


def _code_size() -> str:
    """Size of the source (without hidden folders and build output), also in tokens, and of the dependency lock."""
    from nanochat.tokenizer import Tokenizer, tokenizer_dir  # loads rustbpe, which `append_record` does not need

    texts = []
    for root, folders, names in os.walk(REPO):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("target", "wandb")]
        paths = [Path(root, name) for name in names if Path(name).suffix in CODE_SUFFIXES]
        texts += [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    try:
        num_tokens = sum(map(len, Tokenizer.load(tokenizer_dir()).encode_batch(texts)))
    except UserError:
        num_tokens = "not counted: no tokenizer trained yet"
    lock = REPO / "requirements.lock"
    locked = lock.read_text(encoding="utf-8").splitlines() if lock.exists() else []
    rows = {
        "Characters": sum(map(len, texts)),
        "Lines": sum(text.count("\n") for text in texts),
        "Files": len(texts),
        "Tokens (our tokenizer)": num_tokens,
        "Lines of requirements.lock": f"{len(locked):,} ({sum('==' in line for line in locked)} of packages)",
    }
    return _pairs("Source", rows)


def _stage(record: Record, num_earlier: int, pictures: dict[str, bytes]) -> Iterator[str]:
    """The paragraphs of a stage's section; its curves are added to `pictures` (name to PNG)."""
    earlier = f"; {num_earlier} earlier attempt(s) not shown" if num_earlier else ""
    yield f"`{record.stage}`, recorded {_utc(record.time)}{earlier}."
    if record.results:
        yield _pairs("Result", record.results)
    if record.table:
        columns = list(dict.fromkeys(column for row in record.table for column in row))
        rows = [[format_value(row.get(column, "")) for column in columns] for row in record.table]
        yield _table(list(map(_escape, columns)), rows)
    if record.metrics_path is not None:
        yield from _curves(record, pictures)
    for number, sample in enumerate(record.samples or [], start=1):
        fence = "`" * max(3, 1 + max(map(len, re.findall(r"`+", sample)), default=0))  # longer than any in the sample
        yield f"Sample {number}:\n\n{fence}text\n{sample}\n{fence}"
    if record.settings:
        yield f"<details><summary>Settings</summary>\n\n{_pairs('Setting', record.settings)}\n\n</details>"


def _curves(record: Record, pictures: dict[str, bytes]) -> list[str]:
    """References to the pictures of a record's curves, or why there are none."""
    path = base_dir() / record.metrics_path
    if not path.exists():
        return [f"No curves: {_escape(path.name)} of this run is gone."]
    curves = {key: points for key, points in read_curves(path).items() if len(points) > 1}
    names = {key: f"{record.stage}-{record.model}-{key}".replace("_", "-") for key in curves}
    try:
        pictures |= {names[key]: draw_curve(key, points) for key, points in curves.items()}
    except ImportError:
        return ["No curves: matplotlib is not installed."]
    references = [f"![{CURVES[key][0]}, {CURVES[key][1]}, by step][{name}]" for key, name in names.items()]
    return references or ["No curves: too few steps."]


def read_curves(path: Path) -> dict[str, list[tuple[int, float]]]:
    """The (step, value) points of each of `CURVES` in a `metrics.jsonl`; the last value of a step counts."""
    curves: dict[str, dict[int, float]] = {key: {} for key in CURVES}
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):  # an incomplete line
            metrics = json.loads(line)
            for key, values in curves.items():
                if key in metrics and math.isfinite(metrics[key]):
                    values[int(metrics["step"])] = float(metrics[key])
    return {key: sorted(values.items()) for key, values in curves.items() if values}


def draw_curve(key: str, points: list[tuple[int, float]]) -> bytes:
    """The curve `CURVES[key]` as a PNG. Raises `ImportError` if matplotlib is missing."""
    from matplotlib.figure import Figure  # the object interface: no display, no global state
    from matplotlib.ticker import EngFormatter

    title, label, from_zero = CURVES[key]
    every = math.ceil(len(points) / MAX_CURVE_POINTS)
    groups = [points[i : i + every] for i in range(0, len(points), every)]
    steps = [group[-1][0] for group in groups]
    values = [sum(value for _, value in group) / len(group) for group in groups]
    figure = Figure(figsize=(6.4, 2.8), dpi=100, layout="constrained")
    axes = figure.add_subplot()
    axes.plot(steps, values, color="#1f5a99", linewidth=1.6, marker="o" if len(values) <= 40 else "", markersize=3)
    axes.set(xlabel=f"step (each point the mean of {every})" if every > 1 else "step", ylabel=label)
    axes.set_title(f"{title}: {format_value(points[-1][1])} at step {points[-1][0]:,}", fontsize=10)
    axes.set_ylim(bottom=0 if from_zero else None)
    if max(values) >= 1e4:
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


# --- Markdown ------------------------------------------------------------------------------------


def _table(columns: list[str], rows: Iterable[list[str]]) -> str:
    """A table; the cells are Markdown already."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (columns, ["---"] * len(columns), *rows))


def _pairs(heading: str, mapping: Mapping[str, Any]) -> str:
    """A mapping as a table of two columns; an item of a mapping inside it is named `outer.inner`."""
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        is_nested = isinstance(value, Mapping) and value
        flat |= {f"{key}.{name}": item for name, item in value.items()} if is_nested else {key: value}
    return _table([heading, "Value"], [[_escape(key), format_value(value)] for key, value in flat.items()])


def format_value(value: Any) -> str:
    """A value as a table cell: thousands separators, at most four decimals, three digits for very small or large."""
    if isinstance(value, float):
        if value == 0 or 0.01 <= abs(value) < 1000:
            return f"{value:.4f}".rstrip("0").rstrip(".") or "0"
        return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, (list, tuple)):
        return ", ".join(map(format_value, value))
    return "-" if value is None else _escape(value)


def _utc(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(seconds))


def _escape(value: Any) -> str:
    """`value` as text on one line that Markdown, also in a table, shows literally."""
    return re.sub(r"([\\|*`<\[\]])", r"\\\1", " ".join(str(value).split()))


# --- command -------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = Parser("Start or render the report.", "ACTION [flags]")
    parser.add_argument("action", choices=("reset", "generate"), help="start a new report, or write report.md")
    price_help = "price for the cost estimate, with reset (default: a table by GPU name)"
    parser.add_argument_group("cost").add_argument("--dollars-per-gpu-hour", type=float, help=price_help)
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
