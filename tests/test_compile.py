"""Compiled training: MLPs made again in backward, and compiled code that the next process finds."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nanochat import common
from nanochat.model.gpt import GPT, GPTConfig, build_model
from nanochat.model.linear import Linear
from nanochat.model.products import WeightCopy

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = [GPTConfig.from_depth, GPTConfig.october_2025]


def make_model(derive=GPTConfig.from_depth, *, layers: int = 2, recompute: bool = False, backend: str = "") -> GPT:
    """Tiny, no weight of it zero; compiled if a `backend` of the compiler is named."""
    config = derive(layers, vocab_size=64, sequence_len=32, head_dim=16, n_embd=32, n_head=2, n_kv_head=2)
    generator = torch.Generator().manual_seed(0)
    model = build_model(config, generator=generator)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn(p.shape, generator=generator)
    if recompute:
        model.recompute_mlps()
    if backend:
        torch._dynamo.reset()
        model._compiled_trunk = torch.compile(model.trunk, dynamic=False, fullgraph=True, backend=backend)
    return model


def train(model: GPT) -> list[Tensor]:
    """The gradients of one batch."""
    idx = torch.randint(64, (2, 32), generator=torch.Generator().manual_seed(1))
    model(idx, idx.roll(-1, 1)).backward()
    return [p.grad for p in model.parameters()]


# --- recompute ---
@pytest.mark.parametrize("backend", ["", "aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
@pytest.mark.parametrize("derive", ARCHITECTURES)
def test_mlps_made_again_in_backward_change_no_gradient(derive, backend):
    plain, again = (train(make_model(derive, recompute=recompute, backend=backend)) for recompute in (False, True))
    torch.testing.assert_close(again, plain, rtol=1e-5, atol=1e-7)


def test_of_an_mlp_made_again_only_its_input_is_kept():
    def kept(recompute: bool) -> int:
        storages = {}

        def keep(x: Tensor) -> Tensor:
            storages[x.untyped_storage().data_ptr()] = x
            return x

        model = make_model(recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            model.hidden(torch.zeros(2, 32, dtype=torch.int64))
        return sum(x.untyped_storage().nbytes() for x in storages.values() if not isinstance(x, torch.nn.Parameter))

    # of each layer: norm, its mean, c_fc's output, the same under relu (C and twice 4 C channels), relu^2
    freed = (kept(False) - kept(True)) / (2 * 2 * 32 * 32 * 4)  # channels, for each layer, token, and channel of C
    assert 12 < freed < 15


def add_to_buffers(model: GPT) -> list[Tensor]:
    """Have the blocks' products add to buffers in backward, as on a GPU. Returns the buffers."""
    buffers = []
    for layer in model.h.modules():
        if isinstance(layer, Linear):
            buffers.append(torch.zeros_like(layer.weight))
            layer.copy = WeightCopy(layer.weight.detach(), buffers[-1])
    return buffers


@pytest.mark.parametrize("backend", ["", "aot_eager"])
def test_what_backward_adds_to_a_buffer_is_added_once_though_forward_runs_twice(backend):
    expected = dict(zip((name for name, _ in make_model().named_parameters()), train(make_model()), strict=True))
    model = make_model(recompute=True, backend=backend)
    buffers = add_to_buffers(model)
    train(model)
    matrices = [gradient for name, gradient in expected.items() if name.startswith("h.")]
    torch.testing.assert_close(buffers, matrices, rtol=1e-4, atol=1e-6)


# --- kept code ---
def test_compiled_code_is_kept_in_the_base_folder_or_where_the_user_says(base_folder, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")  # so that its old value comes back
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setenv("TRITON_CACHE_DIR", "mine")
    with torch.compiler.config.patch(cache_key_tag=""):
        common.keep_compiled()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(base_folder / "compiled" / "inductor")
    assert os.environ["TRITON_CACHE_DIR"] == "mine"


def test_code_compiled_from_another_source_of_the_model_is_not_used(tmp_path, monkeypatch):
    """Its key has the operations that we define by their names, not by the formulas of their gradients."""
    monkeypatch.setattr(common, "__file__", str(tmp_path / "common.py"))
    for variable in ("TORCHINDUCTOR_CACHE_DIR", "TRITON_CACHE_DIR"):
        monkeypatch.setenv(variable, "unused")
    tags = []
    for source in ("a = 1", "a = 2", "a = 1"):
        common.write_atomic(tmp_path / "model" / "linear.py", source)
        with torch.compiler.config.patch(cache_key_tag=""):
            common.keep_compiled()
            tags.append(torch.compiler.config.cache_key_tag)
    assert tags[0] == tags[2] != tags[1]


def report_compilation() -> None:
    """Compile a trunk with operations of our own, and print as JSON what the caches did."""
    common.keep_compiled()  # before anything imports the compiler, which sets the folder's variable itself

    from torch._dynamo.utils import counters

    model = make_model(layers=1, recompute=True, backend="inductor")
    add_to_buffers(model)
    train(model)
    counts = {name: n for group in ("inductor", "aot_autograd") for name, n in counters[group].items()}
    print(json.dumps({name: n for name, n in counts.items() if "cache" in name}))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_a_second_process_finds_what_the_first_has_compiled(base_folder):
    inherited = {name: value for name, value in os.environ.items() if not name.endswith("_CACHE_DIR")}
    command = [sys.executable, "-c", "import test_compile; test_compile.report_compilation()"]
    environment = inherited | {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "NANOCHAT_BASE_DIR": str(base_folder)}
    first, second = (
        json.loads(subprocess.run(command, env=environment, check=True, capture_output=True, text=True).stdout)
        for _ in range(2)
    )
    assert (first["autograd_cache_miss"], first["fxgraph_cache_miss"]) == (1, 2)  # forward and backward
    assert (second["autograd_cache_hit"], second["fxgraph_cache_hit"]) == (1, 2)
    assert not [name for name in first | second if "bypass" in name]
