"""report.md: the first page, a section for each stage, and what the run was made with.

The Markdown is never read back, and shows no number that a stage did not record. What others wrote in it (samples,
settings, names) cannot become markup: texts are fenced, all else is escaped.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.records import MODELS, REPO, STAGES, Record
from nanochat.report import summary
from nanochat.report.pictures import Pictures
from nanochat.report.tables import escape, fenced, folded, format_value, pairs, table, utc
from nanochat.results import content, current, gpu_kinds, machine_of, newest, trained
from nanochat.tokenizer import Tokenizer, tokenizer_dir

CODE_SUFFIXES = {".py", ".rs", ".sh", ".html"}


def render(records: Sequence[Record], broken: int = 0) -> tuple[str, Pictures]:
    """The report in Markdown, and the pictures that it shows.

    If a stage ran several times, its last record counts. `broken` is the number of unreadable lines to mention.
    """
    pictures, now = Pictures(), current(records)
    contents = {(record.stage, record.model, content(record)) for record in records}
    attempts = Counter(found[:2] for found in contents)  # a stage killed just after its end, and so run again, is one
    parts = [
        f"# {summary.title(records)}",
        *summary.summary(records, pictures.loss(trained(now))),
        "## Stages",
    ]
    latest = newest(now)
    for stage in (*STAGES, *sorted({stage for stage, _ in latest}.difference(STAGES))):
        models = {model for name, model in latest if name == stage}
        for model in sorted(models, key=lambda model: ((*MODELS, model).index(model), model)):
            if "not_run" not in latest[stage, model].results:
                parts += _stage(latest[stage, model], attempts[stage, model] - 1, pictures)
    parts += [
        "## Machine", _machine(machine_of(records)),
        "## Source", _code_size(),
        f"Written from the records of {utc(records[0].time)} to {utc(records[-1].time)}.",
    ]  # fmt: skip
    if broken:
        parts.append(f"{broken} unreadable line(s) of the records were skipped (a stage was killed while writing).")
    return "\n\n".join(part for part in parts if part) + "\n", pictures


def _stage(record: Record, num_earlier: int, pictures: Pictures) -> Iterator[str]:
    """The paragraphs of a stage's section."""
    name, produced = STAGES.get(record.stage, (record.stage, "other"))
    yield f"### {escape(name if produced else f'{name} ({record.model})')}"
    earlier = f"; {num_earlier} earlier attempt(s) not shown" if num_earlier else ""
    yield f"`{record.stage}`, recorded {utc(record.time)}{earlier}."
    in_table = {row.get("task") for row in record.table or []}
    if alone := {name: value for name, value in record.results.items() if name not in in_table}:
        yield pairs("Result", alone)
    if record.table:
        columns = list(dict.fromkeys(column for row in record.table for column in row))
        rows = [[format_value(row.get(column, "")) for column in columns] for row in record.table]
        yield table(list(map(escape, columns)), rows)
    yield from pictures.curves(record)
    if record.samples:
        yield folded(f"{len(record.samples)} samples", "\n\n".join(map(fenced, record.samples)))
    if record.settings:
        yield folded("Settings", pairs("Setting", record.settings))


def _machine(machine: Mapping[str, Any]) -> str:
    if not machine:
        return "Not recorded: `python -m nanochat.report reset` was not run before the stages."
    kinds = gpu_kinds(machine)
    known = {key: value for key, value in machine.items() if value is not None and (kinds or "price" not in key)}
    return pairs("Machine", {**known, "gpus": kinds or "none"})


def _code_size() -> str:
    """Size of the source (without hidden folders and build output), also in tokens, and of the dependency lock."""
    texts = []
    for root, folders, names in os.walk(REPO):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in ("target", "wandb")]
        paths = [Path(root, name) for name in names if Path(name).suffix in CODE_SUFFIXES and name != "report.html"]
        texts += [path.read_text(encoding="utf-8", errors="replace") for path in paths]
    try:
        num_tokens = sum(map(len, Tokenizer.load(tokenizer_dir()).encode_batch(texts)))
    except UserError:
        num_tokens = None
    lock = REPO / "requirements.lock"
    locked = lock.read_text(encoding="utf-8").splitlines() if lock.exists() else []
    rows = {
        "Characters": sum(map(len, texts)),
        "Lines": sum(text.count("\n") for text in texts),
        "Files": len(texts),
        **({"Tokens (our tokenizer)": num_tokens} if num_tokens is not None else {}),
        "Lines of requirements.lock": f"{len(locked):,} ({sum('==' in line for line in locked)} of packages)",
    }
    return pairs("Source", rows)
