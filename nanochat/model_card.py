"""The model card of an exported checkpoint: README.md of its folder, with front matter that the Hugging Face hub reads.

What the card says of training and scores comes from the checkpoint's meta.json and from those records of the current
report that are about this very checkpoint and the ones it continued from; without them, from meta.json alone.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nanochat.checkpoint import stage_of
from nanochat.records import STAGES, Record, read_records
from nanochat.results import (
    BPB,
    CHAT_CORE,
    CORE,
    GPT2_CORE,
    NO_SCORE,
    TRAINING,
    amount,
    content,
    data_of,
    dollars,
    hardware,
    machine_of,
)

# Data sets on the hub that "mixture" stands for, by stage (tasks/mixtures.py).
MIXTURE = {
    "mid_train": ["HuggingFaceTB/smol-smoltalk", "cais/mmlu", "openai/gsm8k"],
    "chat_sft": ["allenai/ai2_arc", "openai/gsm8k", "HuggingFaceTB/smol-smoltalk"],
}
REPOSITORY = re.compile(r"\w[\w.-]*/\w[\w.-]*")  # owner/name
ENGLISH = ("mixture", "small_world", "local", "karpathy/climbmix-400b-shuffle", "karpathy/fineweb-edu-100b-shuffle")
EXAMS = {  # exam: data set on the hub, what is asked
    "ARC-Easy": ("allenai/ai2_arc", "science questions of primary school, four choices"),
    "ARC-Challenge": ("allenai/ai2_arc", "the harder ones of these questions"),
    "MMLU": ("cais/mmlu", "questions of 57 subjects, four choices"),
    "GSM8K": ("openai/gsm8k", "word problems of grade school, the final number must be right"),
    "HumanEval": ("openai/openai_humaneval", "Python functions that must pass tests"),
    "SpellingBee": ("", "counting a letter in a word"),
    "MMLU-Pro": ("TIGER-Lab/MMLU-Pro", "questions of 14 subjects, up to ten choices"),
    CORE: ("", "mean over 22 tasks without a chat format, 0 for guessing and 1 for all right"),
    CHAT_CORE: ("", "mean of the exams, 0 for guessing and 1 for all right"),
}
STAGE_WORDS = {
    "base": "a base model: it goes on with a text, and was not trained to answer",
    "mid": "a chat model after mid-training on conversations",
    "sft": "a chat model, finetuned on conversations",
    "rl": "a chat model, finetuned on conversations and then by reinforcement learning",
}


def model_card(
    meta: Mapping[str, Any], *, name: str, folder: Path, files: Mapping[str, str], remote_code: bool = False,
    library: str = "transformers",
) -> str:  # fmt: skip
    """The card of the checkpoint in `folder`, of which `meta` is the meta.json.

    name: what the export is called, as `from_pretrained` takes it. files: what else is in the exported folder, with a
    few words on each. remote_code: whether the folder brings its own modelling code. library: what reads the folder,
    "transformers", "mlx" or "gguf".
    """
    records, _ = read_records()
    source = stage_of(folder)
    stages = lineage(meta, source, folder, records)
    measured = exams_of(stages[-1], records)
    core = [row for record in stages[:-1] for row in exams_of(record, records) if row["task"] == CORE]
    message = (meta.get("examples") or ["Why is the sky blue?"])[0] if source != "base" else ""
    origin = meta.get("imported")
    licence = "MIT, as the code that trained it, unless whoever publishes this folder says otherwise."
    sections = {
        "Training": _training(stages, machine_of(records)),
        "Scores": _scores([*core, *measured], stages[-1]),
        "Use": _usage(name, message, remote_code, library),
        "Files": "\n".join(f"- `{file}`: {words}" for file, words in files.items()),
        "Limits": _limits(meta["config"], source != "base"),
        "Licence": f"That of {origin}." if origin else f"{licence} The data sets have licences of their own.",
    }
    about = f"{_about(meta, source, stages[-1])} This is step {meta['step']:,} of the run `{folder.parent.name}`."
    parts = [_front_matter(name, stages, measured, source != "base", library, origin), f"# {name}", about]
    parts += [f"## {heading}\n\n{text}" for heading, text in sections.items() if text]
    return "\n\n".join(parts) + "\n"


def lineage(meta: Mapping[str, Any], source: str, folder: Path, records: Sequence[Record]) -> list[Record]:
    """The training records of the checkpoint and of those it continued from, the first stage first. At least one: where
    the report has none of this checkpoint, its last is made of `meta`, and there is nothing before it."""
    own = [index for index, record in enumerate(records) if _is_of(record, meta, source, folder.parent.name)]
    if not own:
        return [_record_of(meta, source, folder)]
    index, stages = own[-1], []
    is_last = meta["step"] == records[index].results["num_steps"]
    stages.append(records[index] if is_last else _record_of(meta, source, folder))
    while index is not None and (source := records[index].settings.get("source")):
        settings = records[index].settings
        tag = settings.get("model_tag") or ("" if settings.get("output_tag") else records[index].tag)
        stages_before = [i for i in range(index) if TRAINING.get(records[i].stage) == source]
        before = [i for i in stages_before if records[i].tag == tag and "num_steps" in records[i].results]
        index = before[-1] if before else None
        if index is not None and settings.get("step") in (None, records[index].results["num_steps"]):
            stages.insert(0, records[index])
    return stages


def _is_of(record: Record, meta: Mapping[str, Any], source: str, tag: str) -> bool:
    """Whether a record is of the run that wrote the checkpoint: same stage, tag, model and plan, and at its last step
    the same results to the last digit."""
    if TRAINING.get(record.stage) != source or record.tag != tag or record.settings.get("config") != meta["config"]:
        return False
    if any(record.settings.get(key) != value for key, value in meta.get("plan", {}).items()):
        return False
    shared = [key for key in meta.get("results", {}) if key in record.results]
    return meta["step"] != record.results["num_steps"] or all(record.results[k] == meta["results"][k] for k in shared)


def _record_of(meta: Mapping[str, Any], source: str, folder: Path) -> Record:
    plan, stage = meta.get("plan", {}), next((stage for stage, model in TRAINING.items() if model == source), source)
    results = {"num_steps": meta["step"], "train_seconds": meta.get("stats", {}).get("seconds")}
    if plan and source != "rl":  # of replies, the plan only knows how long they may be
        results["train_tokens"] = meta["step"] * plan["total_batch_tokens"]
    path = folder.parent / "metrics.jsonl"
    settings = {**meta.get("args", {}), **plan, "config": meta["config"]}
    return Record(stage, 0.0, settings, {**meta.get("results", {}), **results}, metrics_path=str(path))


def exams_of(trained: Record, records: Sequence[Record]) -> list[dict[str, Any]]:
    """The exams of the model that a training record is about, a row each: name, value, and where known model, number of
    problems and the score of guessing. Those of another run with the same name do not count."""
    if trained not in records:
        return []
    model, rows = TRAINING[trained.stage], {}
    label = f"{model}_{trained.tag}_step_{trained.results['num_steps']:06d}"
    for record in records[records.index(trained) + 1 :]:
        if (record.stage, record.tag) == (trained.stage, trained.tag) and content(record) != content(trained):
            break
        if record.settings.get("model") != label or "not_run" in record.results:
            continue
        if record.stage == "base_eval":
            rows[CORE] = {"task": CORE, "value": record.results["core"], "problems": record.results.get("examples")}
        else:
            table = {row["task"]: row for row in record.table or []}
            names = [key for key in record.results if not NO_SCORE.search(key)]
            rows |= {key: {**table.get(key, {}), "task": key, "value": record.results[key]} for key in names}
    return [row | {"model": model} for row in rows.values()]


def hub_data(record: Record) -> list[str]:
    """The data sets on the hub that a stage was trained on."""
    known = {"mixture": MIXTURE.get(record.stage, []), "GSM8K": ["openai/gsm8k"]}
    names = [found for name in data_of(record.settings) for found in known.get(name, [name])]
    return [name for name in names if REPOSITORY.fullmatch(name) and not Path(name).exists()]


# --- text ----------------------------------------------------------------------------------------


def _front_matter(
    name: str, stages: Sequence[Record], measured: Sequence[Mapping], is_chat: bool, library: str, origin: str | None
) -> str:
    """YAML between dashes. The value of each key is JSON, which is YAML."""
    data = [found for record in stages for found in data_of(record.settings)]
    is_english = bool(data) and all(found in ENGLISH or found in EXAMS or "SmallWorld" in found for found in data)
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": row["task"], "type": _exam(row["task"])[0]},
            "metrics": [{"type": "accuracy", "name": _metric(row["task"]), "value": round(row["value"], 4)}],
        }
        for row in measured
    ]
    fields = {
        "license": "" if origin else "mit", "language": ["en"] * is_english, "library_name": library,
        "pipeline_tag": "text-generation", "tags": ["nanochat", *["conversational"] * is_chat],
        "datasets": list(dict.fromkeys(found for record in stages for found in hub_data(record))),
        "model-index": [{"name": name, "results": results}] if results else [],
    }  # fmt: skip
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value]
    return "\n".join(["---", *lines, "---"])


def _exam(task: str) -> tuple[str, str]:
    """Name of the data set, and what is asked; "" if unknown. Names such as "MMLU 5-shot" are of standard prompts."""
    exam, _, shots = task.partition(" ")
    data, asked = EXAMS.get(exam, ("", ""))
    return data or exam.lower(), f"{asked}, with the standard prompt" if shots and asked else asked


def _metric(task: str) -> str:
    return "mean centred accuracy" if task in (CORE, CHAT_CORE) else "accuracy"


def _about(meta: Mapping[str, Any], source: str, trained: Record) -> str:
    config, count = meta["config"], trained.results.get("num_parameters")
    size = f"{amount(count)} parameters in " if count else ""
    origin = f"imported from {meta['imported']}" if meta.get("imported") else "trained from scratch with nanochat"
    return (
        f"A language model {origin}: {STAGE_WORDS[source]}. It has {size}{config['n_layer']} layers of width "
        f"{config['n_embd']} and a vocabulary of {config['vocab_size']:,} tokens, and reads at most "
        f"{config['sequence_len']:,} tokens at a time."
    )


def _training(stages: Sequence[Record], machine: Mapping[str, Any]) -> str:
    """What the stages were trained on and for how long; on which machine, and an estimate of the cost, if the report
    is about them."""
    lines = []
    for record in stages:
        numbers, data = record.results, ", ".join(f"`{_shown(name)}`" for name in data_of(record.settings))
        words = [f"{numbers['num_steps']:,} steps"]
        if numbers.get("train_tokens"):
            words.append(f"{amount(numbers['train_tokens'])} tokens")
        if numbers.get("train_seconds"):
            words.append(f"{numbers['train_seconds'] / 60:,.1f} minutes")
        if data or record.results["num_steps"]:
            lines.append(f"- {STAGES[record.stage][0]}{f' on {data}' if data else ''}: {', '.join(words)}")
    if len(stages) > 1 or stages[-1].time:
        seconds = sum(record.results.get("train_seconds") or 0.0 for record in stages)
        if hardware(machine):
            lines += ["", f"Trained on {hardware(machine)}, {seconds / 60:,.0f} minutes of training steps in all."]
        if (cost := dollars(machine, seconds)) is not None:
            price = f"{machine['gpu_hour_dollars']:.2f} dollars for an hour of a GPU ({machine['price_source']})"
            lines.append(f"At {price} these cost about {cost:,.2f} dollars, an estimate without evaluation and set-up.")
    return "\n".join(lines)


def _shown(data: str) -> str:
    """The name of a data set; of a local file or folder, not where it lies on this machine."""
    return data if REPOSITORY.fullmatch(data) and not Path(data).exists() else Path(data).name


def _scores(measured: Sequence[Mapping], trained: Record) -> str:
    rows = []
    for row in measured:
        parts = [_exam(row["task"])[1]]
        parts += [f"GPT-2 with 1.5 billion parameters has {GPT2_CORE:.4f}"] * (row["task"] == CORE)
        parts += [f"{row['problems']:,} problems"] if row.get("problems") else []
        parts += [f"95 % interval {row['low']:.2f} to {row['high']:.2f}"] if "low" in row else []
        parts += [f"guessing {row['baseline']:.2f}"] if row.get("baseline") else []
        rows.append(f"| {row['task']} | {row['model']} | {row['value']:.4f} | {'; '.join(filter(None, parts))} |")
    if (bpb := trained.results.get("val_bpb")) is not None:
        words = "loss on held-out data of the last stage: less is better, and only on the same data it compares"
        rows.append(f"| {BPB} | {TRAINING[trained.stage]} | {bpb:.4f} | {words} |")
    return "\n".join(["| exam | measured on | score | meaning |", "| --- | --- | ---: | --- |", *rows]) if rows else ""


def _usage(name: str, message: str, remote_code: bool, library: str) -> str:
    """An example; `message` is what to ask, "" for a base model."""
    if library == "gguf":
        return "Forks of llama.cpp that have the architecture `nanochat` run it; llama.cpp itself does not."
    if library == "mlx":
        options, text = "", '"Once upon a time"'
        load = ["from mlx_lm import generate, load", "", f'model, tokenizer = load("{name}")']
        generate = ["print(generate(model, tokenizer, prompt=inputs, max_tokens=100))"]
    else:
        trust = ", trust_remote_code=True" if remote_code else ""
        options, text = ', return_tensors="pt", return_dict=True', 'tokenizer("Once upon a time", return_tensors="pt")'
        load = [
            "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
            f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})',
            f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})',
        ]  # fmt: skip
        generate = [
            "ids = model.generate(**inputs, max_new_tokens=100)[0]",
            'print(tokenizer.decode(ids[inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
        ]
    inputs = [f"inputs = {text}"]
    if message:
        inputs = [
            f'messages = [{{"role": "user", "content": {json.dumps(message, ensure_ascii=False)}}}]',
            f"inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True{options})",
        ]
    return "\n".join(["```python", *load, *inputs, *generate, "```"])


def _limits(config: Mapping[str, Any], is_chat: bool) -> str:
    lines = [
        "It is small, and states wrong things as confidently as right ones: do not rely on what it says.",
        "It was not trained to refuse what is harmful, and repeats the biases of its data.",
        f"Prompt and reply together have at most {config['sequence_len']:,} tokens.",
    ]
    if is_chat:
        lines.append("In nanochat a calculator fills in the results of its sums; elsewhere it makes them up itself.")
    return "\n".join(f"- {line}" for line in lines)
