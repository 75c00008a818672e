"""The code that exported models bring, run by transformers: the same function as ours, with its cache and padding."""

import pytest
import torch
from conftest import fill_randomly

from nanochat.engine.engine import Engine
from nanochat.engine.sampling import Sampling
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.model.hf import CODE_FILES, save_hf

transformers = pytest.importorskip("transformers")

T, WINDOW, PAD = 32, 8, 7  # the first three of four layers have windows
SHAPES = {
    "recipe": {},
    "grouped queries": {"kv_ratio": 2},
    "no value embeddings": {"value_embeds": False},
    "no scalars, no backout": {"residual_scalars": False, "backout": False, "qk_scale": 1.0},
    "full layers, no smear": {"window_pattern": "L", "smear": False},
}


@pytest.fixture(scope="module", params=SHAPES)
def pair(request, tokenizer, code_folder, tmp_path_factory):
    """Our model and transformers', and the folder between them."""
    shape = {"sequence_len": T, "head_dim": 64, **SHAPES[request.param]}
    config = GPTConfig.from_depth(4, vocab_size=tokenizer.vocab_size, **shape)
    assert config.short_window == WINDOW
    ours = build_model(config, generator=torch.Generator().manual_seed(0))
    fill_randomly(ours, scale=1.0)
    folder = tmp_path_factory.mktemp("hf") / "model"
    save_hf(ours.requires_grad_(False), tokenizer, folder)
    return ours, load(folder), folder


def load(folder, **options):
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    return model.requires_grad_(False)


def draw_idx(rows, length=T, seed=0):
    return torch.randint(400, (rows, length), generator=torch.Generator().manual_seed(seed))


def in_pieces(theirs, idx, mask, lengths, cache):
    """Logits of idx (B, T), read in pieces of these lengths and then token by token."""
    logits, start = [], 0
    for length in [*lengths, *[1] * (idx.size(1) - sum(lengths))]:
        end = start + length
        out = theirs(idx[:, start:end], attention_mask=mask[:, :end], past_key_values=cache, use_cache=True)
        cache, start = out.past_key_values, end
        logits.append(out.logits)
    return torch.cat(logits, dim=1)


def assert_equal(logits, expected):
    assert expected.std() > 0.5
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5)


def test_logits_equal_ours_without_a_cache(pair):
    ours, theirs, _ = pair
    idx = draw_idx(2)
    logits = theirs(idx, use_cache=False).logits
    assert logits.dtype == torch.float32
    assert_equal(logits, ours(idx))


@pytest.mark.parametrize("lengths", [[1], [WINDOW - 1], [WINDOW], [WINDOW + 1], [5, 1, 20]])
def test_logits_equal_ours_with_a_cache_past_the_window(pair, lengths):
    ours, theirs, _ = pair
    idx = draw_idx(2)
    assert_equal(in_pieces(theirs, idx, torch.ones_like(idx), lengths, None), ours(idx))


def test_a_cache_that_knows_of_no_windows_does_as_well(pair):
    ours, theirs, _ = pair
    idx = draw_idx(2)
    assert_equal(in_pieces(theirs, idx, torch.ones_like(idx), [20], transformers.DynamicCache()), ours(idx))


def test_a_cache_keeps_no_more_than_the_windows(pair):
    ours, theirs, _ = pair
    cache = theirs(draw_idx(1), use_cache=True).past_key_values
    kept = [layer.keys.size(2) for layer in cache.layers[:4]]
    assert kept == [T if ours.config.window(layer) is None else WINDOW - 1 for layer in range(4)]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_changes_nothing(pair, side):
    ours, theirs, _ = pair
    idx, length = draw_idx(2), 19
    mask = torch.ones_like(idx)
    padded, place = idx.clone(), slice(T - length, T) if side == "left" else slice(length)
    padded[1], mask[1] = PAD, 0
    padded[1, place], mask[1, place] = idx[1, :length], 1
    expected = ours(idx)
    for logits in (theirs(padded, attention_mask=mask).logits, in_pieces(theirs, padded, mask, [5, 1, 20], None)):
        assert_equal(logits[0], expected[0])
        assert_equal(logits[1, place], expected[1, :length])


def test_greedy_generation_equals_our_engine(pair, tokenizer):
    ours, theirs, _ = pair
    engine = Engine(ours, tokenizer, max_rows=2)
    prompts = [draw_idx(1, length, seed=length)[0].tolist() for length in (3, WINDOW + 3)]
    replies = engine.generate(prompts, Sampling(max_tokens=20, temperature=0.0, use_tool=False))
    longest = max(map(len, prompts))
    idx = torch.tensor([[PAD] * (longest - len(prompt)) + prompt for prompt in prompts])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
    made = theirs.generate(idx, attention_mask=mask, max_new_tokens=20, do_sample=False)
    for row, (reply,) in zip(made[:, longest:].tolist(), replies, strict=True):
        assert row[: len(reply.ids)] == reply.ids
        assert len(reply.ids) > 1


def test_beams_move_the_cache_with_them(pair):
    _, theirs, _ = pair
    idx = draw_idx(2, 5)
    options = {"attention_mask": torch.ones_like(idx), "num_beams": 3, "do_sample": False, "max_new_tokens": 15}
    assert torch.equal(theirs.generate(idx, **options), theirs.generate(idx, **options, use_cache=False))


def test_the_loss_of_labels_is_that_of_ours(pair):
    ours, theirs, _ = pair
    idx = draw_idx(2)
    labels = idx.clone()
    labels[1, 20:] = -100
    targets = torch.where(labels[:, 1:] < 0, -1, labels[:, 1:])
    torch.testing.assert_close(theirs(idx, labels=labels).loss, ours(idx[:, :-1], targets))


def test_a_model_saved_again_is_the_same_and_still_has_its_code(pair, tmp_path):
    _, theirs, _ = pair
    theirs.save_pretrained(tmp_path)
    assert set(CODE_FILES) <= {path.name for path in tmp_path.iterdir()}
    again, idx = load(tmp_path), draw_idx(1)
    assert again.config.to_dict() == {**theirs.config.to_dict(), "_name_or_path": str(tmp_path)}
    assert torch.equal(again(idx).logits, theirs(idx).logits)


def test_a_narrow_model_is_as_close_to_ours_as_ours_in_that_dtype(pair):
    ours, _, folder = pair
    theirs = load(folder, dtype=torch.bfloat16)
    narrow = build_model(ours.config, compute_dtype=torch.bfloat16).requires_grad_(False)
    narrow.load_state_dict(ours.state_dict())
    idx = draw_idx(2)
    assert {parameter.dtype for parameter in theirs.parameters()} == {torch.bfloat16}
    error, our_error = ((logits - ours(idx)).abs().mean() for logits in (theirs(idx).logits, narrow(idx)))
    assert 0 < error < 1.1 * our_error


def test_what_the_model_cannot_do_is_refused(pair):
    _, theirs, _ = pair
    idx = draw_idx(1, 4)
    with pytest.raises(ValueError, match=r"attention_mask must be \(1, 4\)"):
        theirs(idx, attention_mask=torch.ones(1, 1, 4, 4))
    with pytest.raises(ValueError, match="needs input_ids"):
        theirs(inputs_embeds=torch.zeros(1, 4, theirs.config.hidden_size))
    with pytest.raises(ValueError, match="output_attentions"):
        theirs(idx, output_attentions=True)
    with pytest.raises(ValueError, match="must be a DynamicCache, not StaticCache"):
        theirs.generate(idx, attention_mask=torch.ones_like(idx), cache_implementation="static", max_new_tokens=2)
