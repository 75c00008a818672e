"""The model card of an exported checkpoint: README.md of its folder, with front matter that the Hugging Face hub reads.

What the card says of training and scores comes from the checkpoint's meta.json and from those records of the current
report that are about this very checkpoint and the ones it continued from; without them, from meta.json alone.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

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
EXAMS = {  # exam: data set on the hub, what is asked
    "ARC-Easy": ("allenai/ai2_arc", "science questions of primary school, four choices"),
    "ARC-Challenge": ("allenai/ai2_arc", "the harder ones of these questions"),
    "MMLU": ("cais/mmlu", "questions of 57 subjects, four choices"),
    "GSM8K": ("openai/gsm8k", "word problems of grade school, the final number must be right"),
    "HumanEval": ("openai/openai_humaneval", "Python functions that must pass tests"),
    "SpellingBee": ("", "counting a letter in a word"),
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
    meta: Mapping[str, Any], *, name: str, folder: Path, files: Mapping[str, str], remote_code: bool = False
) -> str:  # fmt: skip
    """The card of the checkpoint in `folder`, of which `meta` is the meta.json.

    name: what the export is called, as `from_pretrained` takes it. files: what else is in the exported folder, with a
    few words on each; with a tokenizer.json the card shows how transformers loads it. remote_code: whether the folder
    brings its own modelling code.
    """
    records, _ = read_records()
    source = folder.parent.parent.name.removesuffix("_checkpoints")
    stages = lineage(meta, source, folder, records)
    measured = exams_of(stages[-1], records)
    before = [row for record in stages[:-1] for row in exams_of(record, records) if row["task"] == CORE]
    hub_names = list(dict.fromkeys(found for record in stages for found in hub_data(record)))
    is_chat = source != "base"
    config = meta["config"]
    sections = {
        "Training": _training(stages, machine_of(records)), "Scores": _scores([*before, *measured], stages[-1]),
        "Use": _usage(name, files, is_chat, remote_code, meta.get("examples") or ["Why is the sky blue?"]),
        "Files": "\n".join(f"- `{file}`: {words}" for file, words in files.items()),
        "Limits": _limits(config, is_chat),
        "Licence": "MIT, as the code that trained it, unless the publisher of this folder says otherwise. The training "
        "data have licences of their own: see the pages of the data sets.",
    }  # fmt: skip
    size = amount(stages[-1].results["num_parameters"]) if "num_parameters" in stages[-1].results else None
    shape = f"{config['n_layer']} layers of width {config['n_embd']}"
    about = (
        f"A language model trained from scratch with nanochat: {STAGE_WORDS.get(source, source)}. It has "
        f"{f'{size} parameters in ' if size else ''}{shape}, a vocabulary of {config['vocab_size']:,} tokens, and "
        f"reads at most {config['sequence_len']:,} tokens at a time. This is step {meta['step']:,} of the run "
        f"`{folder.parent.name}`."
    )
    parts = [_front_matter(name, hub_names, measured, is_chat), f"# {name}", about]
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
        before = [i for i in range(index) if TRAINING.get(records[i].stage) == source and records[i].tag == tag]
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
    return [name for name in names if name.count("/") == 1 and not name.startswith((".", "/", "~")) and "." not in name]


# --- text ----------------------------------------------------------------------------------------


def _front_matter(name: str, hub_names: list[str], measured: Sequence[Mapping], is_chat: bool) -> str:
    """YAML between dashes; JSON on a line is YAML."""
    fields = {
        "license": "mit", "language": ["en"], "library_name": "transformers", "pipeline_tag": "text-generation",
        "tags": ["nanochat", *["conversational"] * is_chat], "datasets": hub_names,
    }  # fmt: skip
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": row["task"], "type": EXAMS.get(row["task"], ("",))[0] or row["task"].lower()},
            "metrics": [{"type": "accuracy", "name": _metric_name(row), "value": round(row["value"], 4)}],
        }
        for row in measured
    ]
    if results:
        fields["model-index"] = [{"name": name, "results": results}]
    lines = [f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items() if value]
    return "\n".join(["---", *lines, "---"])


def _metric_name(row: Mapping[str, Any]) -> str:
    return "mean centred accuracy" if row["task"] in (CORE, CHAT_CORE) else "accuracy"


def _training(stages: Sequence[Record], machine: Mapping[str, Any]) -> str:
    lines = []
    for record in stages:
        results = record.results
        words = [f"{results['num_steps']:,} steps"]
        if results.get("train_tokens"):
            words.append(f"{amount(results['train_tokens'])} tokens")
        words += [f"`{name}`" for name in data_of(record.settings)]
        if results.get("train_seconds"):
            words.append(f"{results['train_seconds'] / 60:.1f} minutes")
        lines.append(f"- {STAGES.get(record.stage, (record.stage,))[0]}: {', '.join(words)}")
    seconds = sum(record.results.get("train_seconds") or 0.0 for record in stages)
    cost = dollars(machine, seconds)
    if hardware(machine) and stages[-1].time:
        lines += ["", f"Trained on {hardware(machine)} in {seconds / 60:.1f} minutes of optimizer steps in all."]
    if cost is not None and stages[-1].time:
        source = f"{machine['gpu_hour_dollars']:.2f} an hour each, {machine.get('price_source')}"
        lines.append(f"At ${source}, these cost about ${cost:.2f}: an estimate, without evaluation and set-up.")
    return "\n".join(lines)


def _scores(measured: Sequence[Mapping], trained: Record) -> str:
    rows = []
    for row in measured:
        means = EXAMS.get(row["task"], ("", ""))[1]
        guessing = f"guessing {row['baseline']:.2f}" if row.get("baseline") else ""
        reference = f"GPT-2 (1.5 billion parameters) has {GPT2_CORE:.4f}" if row["task"] == CORE else ""
        count = f"{row['problems']:,} problems" if row.get("problems") else ""
        words = "; ".join(text for text in (means, count, guessing, reference) if text)
        rows.append(f"| {row['task']} | {row['model']} | {row['value']:.4f} | {words} |")
    if (bpb := trained.results.get("val_bpb")) is not None:
        words = "loss on held-out data of the stage: less is better, and only the same data compare"
        rows.append(f"| {BPB} | {TRAINING.get(trained.stage, '')} | {bpb:.4f} | {words} |")
    if not rows:
        return ""
    return "\n".join(["| exam | measured on | score | meaning |", "| --- | --- | --- | --- |", *rows])


def _usage(name: str, files: Mapping[str, str], is_chat: bool, remote_code: bool, examples: Sequence[str]) -> str:
    if "tokenizer.json" not in files:
        return ""
    trust = ", trust_remote_code=True" if remote_code else ""
    lines = [
        "from transformers import AutoModelForCausalLM, AutoTokenizer", "",
        f'tokenizer = AutoTokenizer.from_pretrained("{name}"{trust})',
        f'model = AutoModelForCausalLM.from_pretrained("{name}"{trust})',
    ]  # fmt: skip
    if is_chat:
        message = json.dumps(examples[0], ensure_ascii=False)
        lines += [
            f'messages = [{{"role": "user", "content": {message}}}]',
            "inputs = tokenizer.apply_chat_template(",
            '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True',
            ")",
        ]
    else:
        lines.append('inputs = tokenizer("Once upon a time", return_tensors="pt")')
    lines += [
        "ids = model.generate(**inputs, max_new_tokens=100)[0]",
        'print(tokenizer.decode(ids[inputs["input_ids"].shape[1]:], skip_special_tokens=True))',
    ]
    return "\n".join(["```python", *lines, "```"])


def _limits(config: Mapping[str, Any], is_chat: bool) -> str:
    lines = [
        "It is small, and states wrong things as confidently as right ones: do not rely on what it says.",
        "It was not trained to refuse what is harmful, and repeats the biases of its data.",
        f"Prompt and reply together have at most {config['sequence_len']:,} tokens.",
    ]
    if is_chat:
        lines.append(
            "In nanochat a calculator fills in the results of its sums; other programs let it make them up, after "
            "`<|output_start|>`."
        )
    return "\n".join(f"- {line}" for line in lines)
