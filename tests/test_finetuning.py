"""What mid-training and finetuning have in common: one gradient however a step is split, and plans."""

from types import SimpleNamespace

import pytest
import torch
from conftest import random_model
from ranks import assert_sum_of_gradients, run_ranks
from test_chat_loader import make_conversations

from nanochat.common import UserError
from nanochat.data.chat_loader import ChatLoader, pack_conversations
from nanochat.model.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.training.finetuning import MIN_STEPS, make_plan
from nanochat.training.loop import accumulate_gradients, wanted_device_batch

CPU = torch.device("cpu")
T = 64
STEP_ROWS = 8


def plan_of(rows, *, world_size: int = 1, **flags):
    known = {"epochs": 1, "num_steps": None, "total_batch_size": 0, "lr_mult": 0.1, "weight_decay": 0.0}
    return make_plan(SimpleNamespace(**{**known, **flags}), rows, 2**15, world_size)


# --- one step's gradients ---
def step_gradients(rank: int, world_size: int, folder, batch_size: int, num_conversations: int):
    """Loss of the first step, and this rank's part of its gradients."""
    tokenizer = Tokenizer.load(folder)
    packed = pack_conversations(make_conversations(num_conversations), tokenizer, T)
    config = GPTConfig.from_depth(2, vocab_size=tokenizer.vocab_size, sequence_len=T, head_dim=32)
    model = random_model(config)
    loader = ChatLoader(packed, batch_size, rank=rank, world_size=world_size, epochs=1, step_rows=STEP_ROWS)
    num_micro_steps = STEP_ROWS // (batch_size * world_size)
    loss = accumulate_gradients(model, loader, num_micro_steps, device=CPU, world_size=world_size)
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


# of 3 conversations, most rows of the step are empty: ranks and micro-steps without a single target
@pytest.mark.parametrize("num_conversations", [61, 3])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)])
def test_gradients_do_not_depend_on_device_batch_size_and_world_size(
    tokenizer_folder, tmp_path, world_size, batch_size, num_conversations
):
    loss, expected = step_gradients(0, 1, tokenizer_folder, STEP_ROWS, num_conversations)
    ranks = run_ranks(step_gradients, world_size, tmp_path / "ranks", tokenizer_folder, batch_size, num_conversations)
    assert loss > 0
    assert [rank_loss for rank_loss, _ in ranks] == pytest.approx([loss] * world_size, rel=1e-6)
    assert_sum_of_gradients([gradients for _, gradients in ranks], expected, rtol=1e-4, atol=1e-6)


# --- plans ---
@pytest.fixture
def packed(tokenizer):
    return pack_conversations(make_conversations(61), tokenizer, T)


def test_an_epoch_has_as_many_steps_as_hold_all_rows_and_rates_that_go_with_batch_and_multiplier(packed):
    num_rows = len(packed.rows)
    plan = plan_of(packed, total_batch_size=8 * T)
    assert (plan.total_batch_tokens, plan.num_steps) == (8 * T, -(-num_rows // 8))
    assert plan_of(packed, total_batch_size=8 * T, epochs=3).num_steps == -(-3 * num_rows // 8)
    assert plan_of(packed, total_batch_size=8 * T, num_steps=5).num_steps == 5
    assert [plan_of(packed, total_batch_size=2**19, lr_mult=mult).lr_scale for mult in (0.5, 2.0)] == [0.5, 2.0]
    with pytest.raises(UserError, match=f"--total-batch-size {T - 1} is less than a row"):
        plan_of(packed, total_batch_size=T - 1)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_few_conversations_get_a_smaller_batch_of_whole_rows_on_every_rank(packed, world_size):
    plan = plan_of(packed, epochs=40, world_size=world_size)
    assert plan.total_batch_tokens % (T * world_size) == 0
    assert plan.num_steps >= MIN_STEPS
    assert plan_of(packed, epochs=4_000_000).total_batch_tokens == 2**15
    assert plan_of(packed, world_size=world_size).total_batch_tokens == T * world_size


def test_the_first_batch_tried_is_no_more_than_the_step_has():
    wanted = [wanted_device_batch(CPU, *sizes, T) for sizes in ((0, 0), (0, 4 * T), (3, 4 * T), (3, T // 2))]
    assert wanted == [8, 4, 3, 1]
