"""The first page of the report, and its small table for the terminal: what was trained, on what, with what results.

What was not run or is not known is left out; an exam that could not be run is named once, with the reason.
"""

from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

from nanochat.records import MODELS, STAGES, Record
from nanochat.report.tables import escape, fenced, score, table, text_table
from nanochat.results import (
    BPB,
    CORE,
    EXAM_STAGES,
    GPT2_CORE,
    GPT2_SOURCE,
    REWARD,
    amount,
    current,
    data_of,
    dollars,
    hardware,
    machine_of,
    newest,
    replies,
    scores,
    seconds_of,
    trained,
)

MAX_REPLIES, MAX_CHARS = 8, 800  # of samples on the first page; all are whole in the stage's section
MODEL_NAMES = {"base": "base", "mid": "mid-trained", "sft": "finetuned", "rl": "after RL"}


def title(records: Sequence[Record]) -> str:
    """The name of what was trained last."""
    tags = [stage.tag for stage in trained(current(records)) if stage.tag]
    return f"nanochat report: {escape(tags[-1])}" if tags else "nanochat report"


def summary(records: Sequence[Record], loss: Sequence[str]) -> Iterator[str]:
    """The paragraphs of the first page; `loss` are the pictures of the loss."""
    now, machine, seconds = current(records), machine_of(records), seconds_of(records)
    stages = trained(now)
    if stages:
        yield f"{_model(stages)}, trained in {_time(stages, seconds)}{_on(machine)}."
    facts = {**_core(now), **_cost(machine, seconds)}
    yield "\n".join(f"- **{name}:** {words}" for name, words in facts.items())
    if stages:
        rows = [
            [STAGES[s.stage][0], escape(", ".join(data_of(s.settings))), f"{s.results['num_steps']:,}",
             _tokens(s), f"{s.results['train_seconds'] / 60:,.1f}" if s.results.get("train_seconds") else ""]
            for s in stages
        ]  # fmt: skip
        yield table(["Stage", "Data", "Steps", "Tokens", "Minutes of training"], rows, num_text=2)
    yield from loss
    model, texts = replies(now)
    if texts:
        more = f" ({MAX_REPLIES} of {len(texts)})" if len(texts) > MAX_REPLIES else ""
        what = "Continuations by the base model" if model == "base" else f"Replies of the model {MODEL_NAMES[model]}"
        yield "## Samples"
        yield f"{what}{more}, as the stages recorded them."
        yield fenced("\n\n".join(_short(text, MAX_CHARS) for text in texts[:MAX_REPLIES]))
    yield "## Results"
    yield from _results(now)


def summary_text(records: Sequence[Record]) -> str:
    """The results as a table of plain text, at most 100 characters wide."""
    now, machine, seconds = current(records), machine_of(records), seconds_of(records)
    rows = [["stage", "what", "value"]]
    for stage in trained(now):
        name = STAGES[stage.stage][0].lower()
        if stage.stage == "base_train" and "num_parameters" in stage.results:
            rows.append([name, "parameters", amount(stage.results["num_parameters"])])
        rows.append([name, "tokens", _tokens(stage)])
    found = scores(now)
    for name, values in found.items():
        models = [model for model in MODELS if model in values]
        rows.append([", ".join(models), name, "  ".join(score(values[model]) for model in models)])
    rows.append(["whole run", "time (h:mm:ss)", str(timedelta(seconds=round(seconds)))])
    if (cost := dollars(machine, seconds)) is not None:
        rows.append(["whole run", "dollars, an estimate", f"{cost:,.2f}"])
    rows += [["not run", name, reason] for name, reason in _not_run(now)]
    return text_table([[_short(cell, width) for cell, width in zip(row, (30, 36, 28), strict=True)] for row in rows])


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _model(stages: Sequence[Record]) -> str:
    """What was trained, in words."""
    last, kind = stages[-1], "chat" if stages[-1].stage != "base_train" else "base"
    config = last.settings.get("config", {})
    words = [f"depth {config['n_layer']}", f"vocabulary of {config['vocab_size']:,} tokens",
             f"context of {config['sequence_len']:,}"] if config else []  # fmt: skip
    size = f" of {amount(last.results['num_parameters'])} parameters" if "num_parameters" in last.results else ""
    return f"A {kind} model{size} ({', '.join(words)})" if words else f"A {kind} model{size}"


def _on(machine: Mapping[str, Any]) -> str:
    return f", on {escape(hardware(machine))}" if hardware(machine) else ""


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"


def _tokens(stage: Record) -> str:
    tokens = stage.results.get("train_tokens")
    return "" if tokens is None else amount(tokens)


def _time(stages: Sequence[Record], seconds: float) -> str:
    training = sum(stage.results.get("train_seconds") or 0.0 for stage in stages)
    return f"{_minutes(seconds)} from start to end, {_minutes(training)} of it in training steps"


def _cost(machine: Mapping[str, Any], seconds: float) -> dict[str, str]:
    """The estimate where a price is known; without GPUs nothing."""
    gpus, cost = machine.get("gpus") or [], dollars(machine, seconds)
    if cost is not None:
        rate = f"{len(gpus)} GPU{'s' * (len(gpus) > 1)} at {machine['gpu_hour_dollars']:.2f} dollars an hour each"
        return {
            "Cost": f"about **{cost:,.2f} dollars**: {rate} ({machine.get('price_source')}). An estimate, not a bill."
        }
    if gpus:
        return {"Cost": f"no price is known for {escape(gpus[0])}; give one with `reset --dollars-per-gpu-hour`"}
    return {}


def _core(now: Sequence[Record]) -> dict[str, str]:
    """CORE beside those of GPT-2, of guessing, and of reference models that were measured here."""
    measured = [r for r in now if r.results.get("core") is not None and r.model in MODELS]
    if not measured:
        return {}
    record = measured[-1]
    others = [f"{escape(r.model)} measured here {r.results['core']:.4f}" for r in now
              if "core" in r.results and r.model not in MODELS]  # fmt: skip
    limit = record.settings.get("max_per_task" if record.stage == "base_eval" else "core_max_per_task")
    rows = [row for row in record.table or [] if row.get("baseline") is not None]
    counted = f" over {len(rows)} tasks" if rows else ""
    counted += f", at most {limit:,} examples of each" if limit else ""
    guess = "guessing 0"
    if rows:
        right, chance = (sum(row[key] for row in rows) / len(rows) for key in ("accuracy", "baseline"))
        guess += f" (right answers: {right:.1%} by the model, {chance:.1%} by guessing)"
    references = [f"GPT-2 with 1.5 billion parameters {GPT2_CORE:.4f} ([source]({GPT2_SOURCE}))", guess, *others]
    return {CORE: f"**{record.results['core']:.4f}**{counted}. In comparison: {', '.join(references)}"}


def _not_run(now: Sequence[Record]) -> list[tuple[str, str]]:
    """Names and reasons of what was tried and could not be run, and has no result."""
    failed = [record for record in newest(now).values() if "not_run" in record.results]
    found = scores(now)
    return [
        (STAGES.get(r.stage, (r.stage,))[0] + f" of {r.model}" * (r.model != "base"), str(r.results["not_run"]))
        for r in failed if not (r.stage == "base_eval" and r.model in found.get(CORE, {}))
    ]  # fmt: skip


def _results(now: Sequence[Record]) -> Iterator[str]:
    """The table of what was measured, a column for each model that anything was measured on."""
    found = scores(now)
    models = [model for model in MODELS if any(model in values for values in found.values())]
    if found:
        rows = [
            [escape(name), *(score(values[m]) if m in values else "" for m in models)] for name, values in found.items()
        ]
        yield table(["Measured", *(MODEL_NAMES[model] for model in models)], rows, num_text=1)
        notes = []
        if found.keys() - {BPB, REWARD}:
            notes.append("Exams: the share of right answers; CORE and ChatCORE: 0 for guessing, 1 for all right.")
        if BPB in found:
            notes.append("Bits per byte: on text for the base model, on conversations after that; less is better.")
        if REWARD in found:
            notes.append("Reward: the mean over sampled replies, before RL and after.")
        yield " ".join(notes)
    missing = [f"{escape(name)} ({escape(reason)})" for name, reason in _not_run(now)]
    if missing:
        yield f"Not run: {', '.join(missing)}."
    elif not any(record.stage in ("base_eval", *EXAM_STAGES) for record in now):
        yield "No exams were run."
