"""Shared by all tests: a private base folder, a tiny tokenizer and model, shards of generated text."""

import random
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat.model.gpt import GPT, GPTConfig, build_model
from nanochat.tokenizer import Tokenizer
from tests.plain_kernels import plain_gpu_model  # noqa: F401

torch.set_num_threads(1)  # the tests' tensors are tiny: more threads only wait for each other

WORDS = (
    "river stone cloud garden window bread summer engine letter music doctor harbour silver yellow quickly under "
    "because never seven twelve walked painted it's don't between café naïve 東京 mountain table"
).split()


def make_text(rng: random.Random, num_words: int) -> str:
    """Sentences of random words, some numbers and line breaks among them."""
    words = [rng.choice(WORDS) if rng.random() < 0.9 else str(rng.randrange(2000)) for _ in range(num_words)]
    for i in range(9, num_words, 10):
        words[i] += rng.choice([".", "!\n", ",", "?\n\n"])
    return " ".join(words)


def write_shard(path: Path, texts: list[str], *, row_group_size: int = 16) -> Path:
    """A parquet shard with one column `text`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group_size)
    return path


@pytest.fixture(autouse=True)
def base_folder(tmp_path, monkeypatch) -> Path:
    """Every test works in a base folder of its own."""
    folder = tmp_path / "base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def texts() -> list[str]:
    rng = random.Random(0)
    return [make_text(rng, rng.randrange(5, 120)) for _ in range(200)]


@pytest.fixture(scope="session")
def tokenizer(texts) -> Tokenizer:
    return Tokenizer.train(texts, 400)


@pytest.fixture
def tokenizer_folder(tokenizer, tmp_path) -> Path:
    """Where the tokenizer is saved, for processes that load it."""
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


@pytest.fixture(scope="session")
def code_folder(tmp_path_factory):
    """Where transformers keeps the code that models bring: one place for all tests, since it is imported from there."""
    module = pytest.importorskip("transformers.dynamic_module_utils")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("code")))
        yield


@pytest.fixture
def shards(tmp_path, texts) -> list[Path]:
    """Three training shards and a validation shard in one folder, in order."""
    parts = [texts[:60], texts[60:120], texts[120:170], texts[170:]]
    return [write_shard(tmp_path / "data" / f"shard_{i}.parquet", part) for i, part in enumerate(parts)]


@pytest.fixture
def tiny_config(tokenizer) -> GPTConfig:
    return GPTConfig.from_depth(3, vocab_size=tokenizer.vocab_size, sequence_len=32, head_dim=32, kv_ratio=2)


@pytest.fixture
def tiny_model(tiny_config) -> GPT:
    return random_model(tiny_config)


def random_model(config: GPTConfig) -> GPT:
    """Every weight random and not zero, so that no path through the model is dead."""
    model = build_model(config, generator=torch.Generator().manual_seed(0))
    fill_randomly(model)
    return model


@torch.no_grad()
def fill_randomly(model: GPT, scale: float = 0.3, seed: int = 1) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(scale * parameter.shape[-1] ** -0.5 * torch.randn(parameter.shape, generator=generator))
