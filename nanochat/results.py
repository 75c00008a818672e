"""What the records of a run say when read together: what was trained, on what, for how long, and with what results.

An evaluation counts for the model that was there when it was made: training that model again outdates it. A report that
was not reset may hold records of several runs, whose folders have different names: the last one counts.
Not here: writing and reading records (`records.py`), and the texts made of this (`report`, `model_card.py`).
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from nanochat.records import ENVIRONMENT, MODELS, STAGES, Record

# CORE of GPT-2 with 1.5 billion parameters, the goal of the public nanochat's table of records ("time to GPT-2"): on
# the same 22 tasks of DCLM, with the same shots.
GPT2_CORE = 0.256525
GPT2_SOURCE = "https://github.com/karpathy/nanochat"

EXAM_STAGES = ("chat_eval", "standard_eval")
TRAINING = {stage: model for stage, (_, model) in STAGES.items() if model in MODELS}
MEASURED = re.compile(r"second|mfu|peak_memory")  # in the names of results that differ between runs otherwise the same
NO_SCORE = re.compile(r"_low$|_high$|seconds|^not_run$")  # in the names of an exam's results
CORE, BPB, CHAT_CORE, REWARD = "CORE", "validation, bits per byte", "ChatCORE", "reward on held-out questions"
SPECIAL = {  # tokens in a recorded sample: what stands for them in text
    "<|bos|>": "", "<|user_start|>": "\n> ", "<|user_end|>": "\n", "<|assistant_start|>": "", "<|assistant_end|>": "",
    "<|python_start|>": "[python: ", "<|python_end|>": "", "<|output_start|>": " => ", "<|output_end|> ": "] ",
    "<|output_end|>": "] ",
}  # fmt: skip


def content(record: Record) -> str:
    """What a record says but for times and speeds: equal for a run that only continued after its end."""
    results = {name: value for name, value in record.results.items() if not MEASURED.search(name)}
    return json.dumps([record.stage, record.model, record.settings, results])


def current(records: Iterable[Record]) -> list[Record]:
    """The records of stages, oldest first, of the run that is going on: without evaluations of a model that was trained
    again since, and without the later models of another run, by its tag, that came before."""
    kept: list[Record] = []
    for record in records:
        is_new = record.stage in TRAINING and content(record) not in map(content, kept)
        if is_new and "not_run" not in record.results:  # a stage that was skipped left its model as it was
            after = MODELS[MODELS.index(record.model) + 1 :]
            others = {old.model for old in kept if old.tag != record.tag and TRAINING.get(old.stage) in after}
            kept = [old for old in kept if old.model not in others]
            kept = [old for old in kept if old.stage in TRAINING or old.model != record.model]
        kept += [record] * (record.stage != ENVIRONMENT)
    return kept


def newest(records: Iterable[Record]) -> dict[tuple[str, str], Record]:
    """The last of the records by stage and model."""
    return {(record.stage, record.model): record for record in records}


def machine_of(records: Iterable[Record]) -> dict[str, Any]:
    """What `reset` noted of the machine; empty if it was not run before the stages."""
    return next((record.results for record in records if record.stage == ENVIRONMENT), {})


def gpu_kinds(machine: Mapping[str, Any]) -> list[str]:
    """The GPUs of a machine, such as ["8 x NVIDIA H100 80GB HBM3"]."""
    gpus = machine.get("gpus") or []
    return [f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)]


def hardware(machine: Mapping[str, Any]) -> str:
    """The GPUs of a machine, or else its processor, in words; "" if unknown."""
    kinds = gpu_kinds(machine)
    if not kinds and machine.get("cores"):
        kinds = [f"{machine['cores']} CPU cores ({machine.get('cpu', 'unknown')}), without a GPU"]
    return ", ".join(kinds)


def dollars(machine: Mapping[str, Any], seconds: float) -> float | None:
    """An estimate of what the machine's GPUs cost in that time; None without GPUs or a known price."""
    num_gpus, price = len(machine.get("gpus") or []), machine.get("gpu_hour_dollars")
    return price * num_gpus * seconds / 3600 if num_gpus and price is not None else None


def seconds_of(records: Sequence[Record]) -> float:
    """Wall-clock time from the start of the report to the last record."""
    # Without `reset`, the first record was written at the end of its stage.
    return records[-1].time - records[0].time + records[0].results.get("elapsed_seconds", 0.0)


def scores(records: Iterable[Record]) -> dict[str, dict[str, Any]]:
    """What was measured, by name and by model; a later and finer measurement replaces an earlier one. `records` are
    current ones. Reference models from elsewhere are left out."""
    found: dict[str, dict[str, Any]] = {CORE: {}, BPB: {}}
    for record in records:
        results = record.results
        numbers = {CORE: results.get("core"), BPB: results.get("val_bpb"), REWARD: results.get("val_reward")}
        if record.stage in EXAM_STAGES:
            numbers = {name: value for name, value in results.items() if not NO_SCORE.search(name)}
        if record.stage == "chat_rl" and results.get("start_val_reward") is not None:
            found.setdefault(REWARD, {})["sft"] = results["start_val_reward"]
        for name, value in numbers.items():
            if value is not None and record.model in MODELS:
                found.setdefault(name, {})[record.model] = value
    last = {name: found.pop(name) for name in (CHAT_CORE, REWARD) if name in found}
    return {name: values for name, values in (found | last).items() if values}


def trained(records: Iterable[Record]) -> list[Record]:
    """The last record of each stage that trained a model, in the order of the stages."""
    last = {record.stage: record for record in records if "num_steps" in record.results}
    return [last[stage] for stage in TRAINING if stage in last]


def data_of(settings: Mapping[str, Any]) -> list[str]:
    """The data sets, files and tasks that a stage with these settings was trained on."""
    data = settings.get("data") or []
    tasks = settings.get("tasks") or ("" if data else "GSM8K" if "questions_per_step" in settings else "")
    return [str(name) for name in ([data] if isinstance(data, str) else data)] + [t for t in tasks.split("|") if t]


def amount(count: float) -> str:
    """A number in words: `amount(8_810_000_000) == "8.8 billion"`."""
    for least, unit, name in ((1e9, 1e9, "billion"), (1e5, 1e6, "million")):
        if count >= least:
            return f"{count / unit:.3g} {name}" if count < 10 * unit else f"{count / unit:,.0f} {name}"
    return f"{count:,}"


def replies(records: Sequence[Record]) -> tuple[str, list[str]]:
    """The model whose sample texts say most about the run, and these: replies to questions of the last chat model, or
    else what the base model goes on with after the beginning of a text."""
    for stage, model in (*(("chat_eval", model) for model in MODELS[:0:-1]), ("chat_rl", "rl"), ("base_loss", "base")):
        record = newest(records).get((stage, model))
        if record is not None and record.samples:
            if model == "base":  # which ends nowhere: each on a line of its own
                return model, [" ".join(sample.split()) for sample in record.samples]
            return model, [plain_text(sample) for sample in record.samples]
    return "", []


def plain_text(sample: str) -> str:
    """A recorded sample without special tokens: questions begin with ">", a use of the calculator is in brackets."""
    for token, text in SPECIAL.items():
        sample = sample.replace(token, text)
    return sample.strip()
