import math
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from conftest import fill_randomly
from test_flash import played_backward, played_forward
from torch.nn.attention import flex_attention

from nanochat.common import UserError
from nanochat.model import attention, flash
from nanochat.model.attention import Backends
from nanochat.model.gpt import GPT, IGNORE_INDEX, GPTConfig, build_model


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def draw_idx(config, rows=2, length=None):
    return torch.randint(config.vocab_size, (rows, length or config.sequence_len), generator=seeded())


def tiny(depth, derive=GPTConfig.from_depth):
    """A model of that depth with random weights, of which none is zero."""
    model = build_model(derive(depth, vocab_size=100, sequence_len=16, head_dim=32), generator=seeded())
    fill_randomly(model)
    return model


@pytest.mark.parametrize("depth", [1, 2, 3, 4, 5, 12, 20, 24, 26, 32, 40])
@pytest.mark.parametrize("derive", [GPTConfig.from_depth, GPTConfig.october_2025])
def test_every_depth_builds_with_whole_heads(depth, derive):
    config = derive(depth, vocab_size=32768)
    model = build_model(config, device="meta")
    assert config.head_dim == 128
    assert 64 * depth <= config.n_embd < 64 * depth + 128
    assert model.parameter_counts()["total"] == sum(p.numel() for p in model.parameters())


def test_october_2025_d20_has_the_published_parameters():
    config = GPTConfig.october_2025(20, vocab_size=65536)
    counts = build_model(config, device="meta").parameter_counts()
    assert (config.n_embd, config.n_head, config.head_dim) == (1280, 10, 128)
    assert (counts["total"], counts["scalars"]) == (560_988_160, 0)
    assert round(20 * counts["total"] / 1e9, 1) == 11.2


@pytest.mark.parametrize(
    ("depth", "matrices", "total", "gflops"),
    [(12, 84.9e6, 286e6, 0.726), (20, 393e6, 897e6, 2.793), (22, 523e6, 1.12e9, 3.642), (24, 680e6, 1.38e9, 4.641)],
)
def test_counts_equal_the_published_table(depth, matrices, total, gflops):
    """Rooflines for vocabulary 32,768, T 2048, windows SSSL of 512."""
    model = build_model(GPTConfig.from_depth(depth, vocab_size=32768), device="meta")
    counts = model.parameter_counts()
    assert counts["matrices"] == pytest.approx(matrices, rel=2e-3)
    assert counts["total"] == pytest.approx(total, rel=5e-3)
    assert model.flops_per_token() / 1e9 == pytest.approx(gflops, rel=1e-3)


def test_flops_count_every_visible_position_once():
    config = GPTConfig.from_depth(4, vocab_size=100, sequence_len=16, head_dim=32)
    model = build_model(config, device="meta")
    visible = sum(min(t + 1, config.window(layer) or 16) / 16 for layer in range(4) for t in range(16))
    weights = model.parameter_counts()["matrices"] + 100 * config.n_embd
    assert model.flops_per_token() == pytest.approx(6 * weights + 12 * visible * config.n_embd)


def test_windows_and_value_embeddings_lie_where_they_should():
    config = GPTConfig.from_depth(9, vocab_size=100, sequence_len=64)
    assert [config.window(layer) for layer in range(9)] == [16, 16, 16, None, 16, 16, 16, None, None]
    assert [config.has_value_embed(layer) for layer in range(9)] == [True, False] * 4 + [True]


@pytest.mark.parametrize(
    ("change", "named"),
    [({"vocab_size": 0}, "vocab_size"), ({"n_head": 5}, "n_embd 96 over n_head 5"), ({"n_kv_head": 2}, "n_kv_head 2"),
     ({"window_pattern": "SX"}, "SX"), ({"sequence_len": -1}, "-1"),
     ({"softcap": 0.0}, "softcap"), ({"rope_base": -1.0}, "rope_base"), ({"qk_scale": float("nan")}, "qk_scale")],
)  # fmt: skip
def test_a_config_that_cannot_be_names_the_field(tiny_config, change, named):
    with pytest.raises(UserError, match=named):
        replace(tiny_config, **{"n_embd": 96, "n_head": 3, "n_kv_head": 3} | change)


@pytest.mark.parametrize("depth", [0, -3, 1000])
def test_a_depth_out_of_range_is_refused(depth):
    with pytest.raises(UserError, match=str(depth)):
        GPTConfig.from_depth(depth, vocab_size=100)


@pytest.mark.parametrize("derive", [GPTConfig.from_depth, GPTConfig.october_2025])
def test_initialisation_fills_all_storage(derive):
    model = build_model(derive(4, vocab_size=300, sequence_len=32, head_dim=32))
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)
    model.init_weights(torch.Generator().manual_seed(0))
    assert all(p.isfinite().all() for p in model.parameters())
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert not list(model.buffers())


def test_initial_weights_have_the_stated_sizes_and_follow_the_seed():
    config = GPTConfig.from_depth(4, vocab_size=1000, sequence_len=32)
    model, again, other = (build_model(config, generator=seeded(seed)) for seed in (7, 7, 8))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    assert not torch.equal(model.wte.weight, other.wte.weight)
    std = config.n_embd**-0.5
    block = model.h[1]
    for weight, expected in [
        (model.wte.weight, 0.8), (model.lm_head.weight, 1e-3), (model.value_embeds.weight, std),
        (block.attn.c_q.weight, std), (block.mlp.c_fc.weight, 0.4 * std),
    ]:  # fmt: skip
        assert weight.std().item() == pytest.approx(expected, rel=0.05)
    assert (block.attn.c_proj.weight == 0).all()
    assert (block.mlp.c_proj.weight == 0).all()
    assert model.resid_lambdas[[0, -1]].tolist() == pytest.approx([1.15, 1.05])
    assert model.x0_lambdas[[0, -1]].tolist() == pytest.approx([0.20, 0.05])
    assert model.smear_lambda.item() == 0.0
    idx = draw_idx(config)
    assert model(idx, idx).item() == pytest.approx(math.log(1000), abs=0.05)  # a new model predicts about uniformly


def test_a_later_token_never_changes_an_earlier_logit_even_beyond_the_training_length(tiny_model, tiny_config):
    idx = draw_idx(tiny_config)
    changed = idx.clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % tiny_config.vocab_size
    before, after = tiny_model(idx), tiny_model(changed)
    torch.testing.assert_close(after[:, :20], before[:, :20], rtol=0, atol=1e-6)
    assert (after[:, 20:] - before[:, 20:]).abs().max() > 1e-2
    idx = draw_idx(tiny_config, length=70)
    torch.testing.assert_close(tiny_model(idx)[:, :32], tiny_model(idx[:, :32]), rtol=1e-5, atol=1e-5)
    assert tiny_model(idx[:, :1]).shape == (2, 1, 400)


def test_a_short_window_layer_sees_exactly_its_window(tiny_config):
    """With one windowed layer and no smear, a position `window` back is out of sight, one nearer is not."""
    config = replace(tiny_config, n_layer=2, smear=False, window_pattern="S")
    model = build_model(config, generator=seeded())
    fill_randomly(model)
    with torch.no_grad():  # the last layer sees everything: mute its attention
        model.h[1].attn.c_proj.weight.zero_()
    idx, window, t = draw_idx(config, rows=1), config.short_window, 20
    before = model(idx)[0, t]
    for distance, is_seen in ((window - 1, True), (window, False)):
        changed = idx.clone()
        changed[0, t - distance] = (changed[0, t - distance] + 1) % config.vocab_size
        difference = (model(changed)[0, t] - before).abs().max()
        assert (difference > 1e-6) == is_seen


def test_logits_of_padded_vocabulary_rows_are_cut_off(tiny_model, tiny_config):
    assert tiny_config.vocab_size == 400 < tiny_config.padded_vocab_size == 448
    idx = draw_idx(tiny_config)
    assert tiny_model(idx).shape == (2, 32, 400)
    before = tiny_model(idx, idx).item()
    with torch.no_grad():
        tiny_model.lm_head.weight[400:] = 1e3
    assert tiny_model(idx, idx).item() == before
    tiny_model(idx, idx).backward()
    assert (tiny_model.lm_head.weight.grad[400:] == 0).all()


def test_loss_equals_cross_entropy_of_the_logits(tiny_model, tiny_config):
    idx = draw_idx(tiny_config)
    targets = idx.roll(-1, 1)
    targets[:, -1] = IGNORE_INDEX
    logits = tiny_model(idx)
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX)
    torch.testing.assert_close(tiny_model(idx, targets), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(tiny_model(idx, targets, reduction="none").sum() / 62, expected, rtol=1e-5, atol=1e-5)


def test_every_parameter_gets_a_gradient(tiny_model, tiny_config):
    idx = draw_idx(tiny_config)
    tiny_model(idx, idx.roll(-1, 1)).backward()
    for name, p in tiny_model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name
        assert (p.grad != 0).any(), name


def test_bfloat16_activations_stay_near_float32(tiny_model, tiny_config):
    narrow = GPT(tiny_config, compute_dtype=torch.bfloat16)
    narrow.load_state_dict(tiny_model.state_dict())
    idx = draw_idx(tiny_config)
    assert narrow.hidden(idx).dtype == torch.bfloat16
    error = (narrow(idx) - tiny_model(idx)).norm() / tiny_model(idx).norm()
    assert error < 0.05


def test_the_compiled_trunk_serves_batches_of_the_training_shape_only(tiny_model, tiny_config, monkeypatch):
    compiled = Mock(wraps=tiny_model.trunk)
    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled)
    tiny_model.compile_trunk()
    tiny_model(draw_idx(tiny_config))
    with torch.no_grad():
        tiny_model(draw_idx(tiny_config))
        tiny_model(draw_idx(tiny_config, length=7))
    assert [call.args[0].size(1) for call in compiled.call_args_list] == [32, 32]


@pytest.mark.parametrize("is_8_bits", [False, True])
def test_an_evaluation_takes_the_graph_with_gradients_but_not_its_8_bits(tiny_model, monkeypatch, is_8_bits):
    tiny_config, modes = tiny_model.config, []

    def compiled(idx, *_, **__):
        modes.append(torch.is_grad_enabled())
        return torch.zeros(*idx.shape, tiny_config.n_embd)

    monkeypatch.setattr(torch, "compile", lambda function, **options: compiled)
    tiny_model.compile_trunk()
    tiny_model.h[0].mlp.c_fc.copy = Mock(scale=torch.ones(()) if is_8_bits else None)
    tiny_model.hidden(draw_idx(tiny_config))
    with torch.no_grad():
        tiny_model.hidden(draw_idx(tiny_config))
    assert modes == [True, not is_8_bits]


@pytest.mark.parametrize("backend", ["masked", "sdpa", "cudnn", "flex", "flash"])
@pytest.mark.parametrize("derive", [GPTConfig.from_depth, GPTConfig.october_2025])
def test_the_trunk_compiles_to_one_graph_forward_and_backward(derive, backend, monkeypatch):
    """A break would leave most of the speed behind; so would the choice of a backend within the graph. What needs a GPU
    is played: FlexAttention by PyTorch's own formulas, the others as in `test_flash.py` and by SDPA."""
    model = tiny(2, derive)
    idx = draw_idx(model.config)

    def gradients():
        return torch.autograd.grad(model(idx, idx.roll(-1, 1)), list(model.parameters()))

    def choose(*settings, **more):
        assert not torch.compiler.is_compiling()
        return Backends(*{"cudnn": ("cudnn", "sdpa"), "flex": ("sdpa", "flex")}.get(backend, (backend, backend)))

    expected, evaluated = gradients(), model.hidden(idx).detach()
    monkeypatch.setattr(attention, "choose_backends", choose)
    monkeypatch.setattr(attention, "_cudnn", lambda q, k, v: attention._sdpa(q, k, v, is_causal=True))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *qkv: None)
    monkeypatch.setattr(flash, "flash_kernels", lambda: (played_forward, played_backward))
    torch._dynamo.reset()
    compile_, options = torch.compile, {"fullgraph": True, "backend": "aot_eager"}
    monkeypatch.setattr(torch, "compile", lambda function, **given: compile_(function, **given, **options))
    model.compile_trunk()
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(2):
            for ours, theirs in zip(gradients(), expected, strict=True):
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            with torch.no_grad():  # an evaluation takes the same graph
                hidden = model.hidden(idx)
            assert not hidden.requires_grad
            torch.testing.assert_close(hidden, evaluated, rtol=1e-5, atol=1e-6)


def test_a_backend_asked_for_serves_the_batches_of_training_only(tiny_model, tiny_config, monkeypatch):
    assert tiny_model.choose_attention() == "attention: sdpa (no CUDA GPU)"
    assert tiny_model.choose_attention("masked") == "attention: masked (--attention masked)"
    choose = Mock(wraps=attention.choose_backends)
    monkeypatch.setattr(attention, "choose_backends", choose)
    tiny_model(draw_idx(tiny_config))
    with torch.no_grad():
        tiny_model(draw_idx(tiny_config))
        tiny_model(draw_idx(tiny_config, length=7))
    assert [call.kwargs["wanted"] for call in choose.call_args_list] == ["masked", "masked", ""]


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
def test_backout_takes_out_something_else_than_the_end_itself(depth):
    """Else its gradient is zero but for rounding, which AdamW turns into steps of full size."""
    model = tiny(depth)
    idx = draw_idx(model.config)
    model(idx, idx.roll(-1, 1)).backward()
    assert model.backout_lambda.grad.abs().item() > 1e-5
