"""`dev/roofline.py`: what passes must move and compute, beside what models and engines hold."""

import pytest
import torch

from dev.roofline import ARCHITECTURES, Form, decode_bytes, prefill_flops
from nanochat.model.gpt import build_model


@pytest.fixture(params=ARCHITECTURES)
def config(request):
    return ARCHITECTURES[request.param](4, vocab_size=512, sequence_len=64)


def test_a_decode_step_reads_all_weights_but_the_tables_which_give_rows(config):
    counts = build_model(config, device="meta").parameter_counts()
    one_row = decode_bytes(config, Form(2, 0), 1, 1)
    gates = config.num_value_embeds * config.n_kv_head * (config.n_embd - 12)  # kept as wide as the other matrices
    assert one_row == 2 * (counts["matrices"] + gates + counts["head"])
    rows = config.n_embd * (1 + config.smear) + config.num_value_embeds * config.kv_dim
    keys_and_values = 2 * config.n_layer * config.kv_dim
    assert decode_bytes(config, Form(2, 4), 3, 1) == one_row + 3 * 4 * (rows + keys_and_values)


def test_a_row_reads_keys_and_values_of_what_its_windows_let_it_see():
    config = ARCHITECTURES["recipe"](4, vocab_size=512, sequence_len=64)  # three layers see 16 positions
    at = [decode_bytes(config, Form(0, 1), 1, keys) for keys in (16, 17, 64)]
    assert at[1] - at[0] == 2 * config.kv_dim
    assert at[2] - at[0] == 48 * 2 * config.kv_dim


def test_weights_of_8_bits_have_a_step_for_each_output(config):
    half, eighth = (decode_bytes(config, Form(size, 0), 1, 1) for size in (2, 1))
    outputs = config.n_layer * (3 + 1 + 4 + 1) * config.n_embd + config.num_value_embeds * config.n_kv_head
    assert eighth == half / 2 + 2 * (outputs + config.vocab_size)


def test_reading_a_prompt_takes_a_third_of_its_training_but_for_the_head(config):
    T = config.sequence_len
    model = build_model(config, device="meta")
    gates = config.num_value_embeds * config.n_kv_head * (config.n_embd - 12)
    head = 2 * config.n_embd * config.vocab_size
    expected = (model.flops_per_token() / 3 - head + 2 * gates) * T + head
    assert prefill_flops(config, T) == pytest.approx(expected)


def test_d20_in_bfloat16_reads_under_a_gigabyte():
    config = ARCHITECTURES["recipe"](20, vocab_size=32768)
    assert 0.85e9 < decode_bytes(config, Form(torch.bfloat16.itemsize, 2), 1, 256) < 0.9e9
