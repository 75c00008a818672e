"""Model cards: what they say of a checkpoint, from which records, and that the hub can read them."""

import json
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard

from nanochat.common import base_dir
from nanochat.model_card import MIXTURE, model_card
from nanochat.records import append_record, read_records
from nanochat.results import GPT2_CORE
from tasks import arc, gsm8k, mmlu, smoltalk

CONFIG = {"n_layer": 4, "n_embd": 256, "vocab_size": 1024, "sequence_len": 256}
FILES = {"model.safetensors": "the weights", "tokenizer.json": "the tokenizer"}
GPUS = {"gpus": ["NVIDIA H100 80GB HBM3"] * 8, "gpu_hour_dollars": 3.0, "price_source": "a list"}


class Run:
    """A run of one stage: its checkpoints' meta.json, and its record."""

    def __init__(self, model: str, stage: str, *, steps: int, val_bpb: float, tag: str = "d4", **args) -> None:
        self.model, self.stage, self.tag, self.steps = model, stage, tag, steps
        self.args = args | ({"model_tag": tag, "output_tag": "", "step": None} if model != "base" else {})
        self.plan = {"num_steps": steps, "total_batch_tokens": 1000}
        self.meta = {"args": self.args, "plan": self.plan, "config": CONFIG, "step": steps,
                     "results": {"val_bpb": val_bpb}, "stats": {"seconds": 600.0}}  # fmt: skip

    def record(self) -> None:
        results = self.meta["results"] | {"num_steps": self.steps, "train_tokens": 1000 * self.steps,
                                          "train_seconds": 600.0, "num_parameters": 4_200_000}  # fmt: skip
        path = base_dir() / f"{self.model}_checkpoints" / self.tag / "metrics.jsonl"
        settings = self.args | self.plan | {"config": CONFIG}
        append_record(self.stage, settings=settings, results=results, metrics_path=path)

    def folder(self, step: int | None = None) -> Path:
        return base_dir() / f"{self.model}_checkpoints" / self.tag / f"step_{step or self.steps:06d}"

    def exam(self, stage: str, results: dict, **more) -> None:
        settings = {"source": self.model, "model": f"{self.model}_{self.tag}_{self.folder().name}"}
        append_record(stage, settings=settings, results=results, **more)

    def card(self, **more) -> str:
        return model_card(self.meta, name="me/mine", folder=self.folder(), files=FILES, **more)


@pytest.fixture
def runs() -> dict[str, Run]:
    """Pretraining, mid-training and finetuning, recorded with exams."""
    append_record("environment", settings={}, results=GPUS)
    base = Run("base", "base_train", steps=5000, val_bpb=0.75, data="karpathy/climbmix-400b-shuffle")
    mid = Run("mid", "mid_train", steps=800, val_bpb=0.5, source="base", data=["mixture"])
    sft = Run("sft", "chat_sft", steps=700, val_bpb=0.4, source="mid", data=["mixture", "/home/me/own.jsonl"])
    base.record()
    base.exam("base_eval", {"core": 0.2713, "examples": 900})
    mid.record()
    sft.record()
    table = [{"task": "ARC-Easy", "problems": 2376, "low": 0.58, "high": 0.62, "baseline": 0.25}]
    sft.exam("standard_eval", {"MMLU 5-shot": 0.37})
    sft.exam("chat_eval", {"ARC-Easy": 0.6, "ChatCORE": 0.33, "ChatCORE_low": 0.3, "elapsed_seconds": 9.0}, table=table)
    return {"base": base, "mid": mid, "sft": sft}


def test_a_card_tells_the_whole_way_to_the_checkpoint_with_scores_and_cost(runs):
    card = runs["sft"].card()
    assert "- Pretraining on `karpathy/climbmix-400b-shuffle`: 5,000 steps, 5 million tokens, 10.0 minutes" in card
    assert "- Mid-training on `mixture`: 800 steps, 0.8 million tokens" in card
    assert "- Supervised fine-tuning on `mixture`, `own.jsonl`: 700 steps" in card  # not where the file lies
    assert "Trained on 8 x NVIDIA H100 80GB HBM3, 30 minutes of training steps in all." in card
    assert "At 3.00 dollars for an hour of a GPU (a list) these cost about 12.00 dollars, an estimate" in card
    assert "| CORE | base | 0.2713 |" in card
    assert f"GPT-2 with 1.5 billion parameters has {GPT2_CORE:.4f}" in card
    assert "2,376 problems; 95 % interval 0.58 to 0.62; guessing 0.25 |" in card
    assert "| validation, bits per byte | sft | 0.4000 |" in card
    assert "ChatCORE_low" not in card


def test_the_hub_reads_the_front_matter(runs):
    card = runs["sft"].card()
    data = ModelCard(card).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "transformers", "text-generation")
    assert data.datasets == [
        "karpathy/climbmix-400b-shuffle",
        *dict.fromkeys(MIXTURE["mid_train"] + MIXTURE["chat_sft"]),
    ]
    assert data.language is None  # nobody knows that of own.jsonl
    assert "| MMLU 5-shot | sft | 0.3700 | questions of 57 subjects, four choices, with the standard prompt |" in card
    values = {(found.dataset_name, found.dataset_type): found.metric_value for found in data.eval_results}
    assert values == {
        ("ARC-Easy", "allenai/ai2_arc"): 0.6,
        ("ChatCORE", "chatcore"): 0.33,
        ("MMLU 5-shot", "cais/mmlu"): 0.37,
    }  # CORE is its base's
    assert ModelCard(runs["base"].card()).data.language == ["en"]
    assert {repo for repos in MIXTURE.values() for repo in repos} == {m.REPO for m in (arc, gsm8k, mmlu, smoltalk)}


def test_without_a_report_a_card_says_what_the_checkpoint_knows():
    card = Run("rl", "chat_rl", steps=40, val_bpb=0.3, source="sft", tasks="GSM8K", data=[]).card()
    assert "- Reinforcement learning on `GSM8K`: 40 steps, 10.0 minutes" in card
    assert "| validation, bits per byte | rl | 0.3000 |" in card
    assert "model-index" not in card
    assert "Trained on" not in card


@pytest.mark.parametrize("change", ["tag", "plan", "config", "results"])
def test_numbers_of_another_run_never_get_into_a_card(runs, change):
    other = Run("sft", "chat_sft", steps=700, val_bpb=0.41, source="mid", data=["mine"], tag="d4")
    if change == "tag":
        other.tag = "d5"
    elif change == "results":  # trained again under the same name, with another result
        other.meta["plan"] = other.plan = runs["sft"].plan
    else:
        other.meta[change] = {**other.meta[change], "extra": 1}
    card = other.card()
    for words in ("ARC-Easy", "CORE", "Pretraining", "H100", "0.4000", "own.jsonl"):
        assert words not in card
    assert "0.4100" in card


def test_exams_of_the_same_name_count_until_it_was_trained_again(runs):
    sft = runs["sft"]
    again = Run("sft", "chat_sft", steps=700, val_bpb=0.2, source="mid", data=["mine"])
    again.record()
    again.exam("chat_eval", {"ARC-Easy": 0.9})
    assert "0.6000" in sft.card()
    assert "0.9000" not in sft.card()
    assert "0.9000" in again.card()
    assert "0.6000" not in again.card()


def test_an_earlier_step_of_a_run_has_its_own_numbers_and_no_later_scores(runs):
    sft = runs["sft"]
    meta = sft.meta | {"step": 350, "results": {"val_bpb": 0.45}, "stats": {"seconds": 300.0}}
    card = model_card(meta, name="me/mine", folder=sft.folder(350), files=FILES)
    assert "350 steps, 0.35 million tokens, 5.0 minutes" in card
    assert "| validation, bits per byte | sft | 0.4500 |" in card
    assert "| CORE | base | 0.2713 |" in card
    assert "ARC-Easy" not in card


def test_a_stage_that_was_skipped_is_no_origin_of_a_model(runs):
    append_record("mid_train", settings={}, results={"not_run": "no data"})
    mine = Run("sft", "chat_sft", steps=70, val_bpb=0.3, tag="mine", source="mid", data=["own.jsonl"])
    mine.args |= {"model_tag": "", "output_tag": "mine"}
    mine.record()
    assert "Mid-training" not in mine.card()


def test_an_imported_model_is_not_said_to_be_ours(runs):
    meta = {"args": {}, "results": {}, "imported": "owner/model", "config": CONFIG, "step": 0}
    folder = base_dir() / "sft_checkpoints" / "theirs" / "step_000000"
    card = model_card(meta, name="me/mine", folder=folder, files=FILES)
    assert "imported from owner/model" in card
    assert "license" not in card
    assert "from scratch" not in card
    assert "## Training" not in card


@pytest.mark.parametrize(
    ("library", "words"),
    [
        ("transformers", 'from_pretrained("me/mine", trust_remote_code=True)'),
        ("mlx", 'load("me/mine")'),
        ("gguf", "Forks"),
    ],
)
def test_a_card_shows_how_to_use_the_format(runs, library, words):
    runs["sft"].meta["examples"] = ['Say "hi"', "other"]
    card = runs["sft"].card(library=library, remote_code=True)
    assert words in card
    assert yaml.safe_load(card.split("---")[1])["library_name"] == library
    if library != "gguf":
        code = card.split("```python\n")[1].split("```")[0]
        compile(code, "card", "exec")
        assert json.dumps('Say "hi"') in code
        assert "Once upon a time" in runs["base"].card(library=library)
    assert len(read_records()[0]) == 7
