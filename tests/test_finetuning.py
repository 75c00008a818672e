"""What mid-training and finetuning have in common: one gradient however a step is split, plans, flags."""

from argparse import ArgumentParser

import pytest
import torch
from conftest import fill_randomly
from ranks import run_ranks
from test_chat_loader import make_conversations

from nanochat.common import UserError
from nanochat.data.chat_loader import ChatLoader, pack_conversations
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.tokenizer import Tokenizer
from nanochat.training.finetuning import MIN_STEPS, Defaults, add_chat_training_flags, check_chat_args, make_plan
from nanochat.training.loop import accumulate_gradients, check_ranges, wanted_device_batch

CPU = torch.device("cpu")
T = 64
STEP_ROWS = 8
DEFAULTS = Defaults(
    source="mid", total_batch_tokens=2**15, lr_mult=0.1, warmdown_frac=1.0, final_lr_frac=0.0, eval_every=100
)


def parse(*flags: str):
    parser = ArgumentParser()
    add_chat_training_flags(parser, DEFAULTS)
    return parser.parse_args(flags)


# --- one step's gradients ------------------------------------------------------------------------


def step_gradients(rank: int, world_size: int, folder, batch_size: int, num_conversations: int):
    """Loss of the first step, and this rank's part of its gradients."""
    tokenizer = Tokenizer.load(folder)
    packed = pack_conversations(make_conversations(num_conversations), tokenizer, T)
    config = GPTConfig.from_depth(2, vocab_size=tokenizer.vocab_size, sequence_len=T, head_dim=32)
    model = build_model(config, generator=torch.Generator().manual_seed(0))
    fill_randomly(model)
    loader = ChatLoader(packed, batch_size, rank=rank, world_size=world_size, epochs=1, step_rows=STEP_ROWS)
    num_micro_steps = STEP_ROWS // (batch_size * world_size)
    loss = accumulate_gradients(model, loader, num_micro_steps, device=CPU, world_size=world_size)
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.fixture
def folder(tokenizer, tmp_path):
    tokenizer.save(tmp_path / "tokenizer")
    return tmp_path / "tokenizer"


# of 3 conversations, most rows of the step are empty: ranks and micro-steps without a single target
@pytest.mark.parametrize("num_conversations", [61, 3])
@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 2), (1, 4), (2, 1), (2, 2), (2, 4)])
def test_gradients_do_not_depend_on_device_batch_size_and_world_size(
    folder, tmp_path, world_size, batch_size, num_conversations
):
    loss, expected = step_gradients(0, 1, folder, STEP_ROWS, num_conversations)
    if world_size == 1:
        ranks = [step_gradients(0, 1, folder, batch_size, num_conversations)]
    else:
        ranks = run_ranks(step_gradients, world_size, tmp_path / "ranks", folder, batch_size, num_conversations)
    assert loss > 0
    for rank_loss, _ in ranks:
        assert rank_loss == pytest.approx(loss, rel=1e-6)
    for name, gradient in expected.items():
        total = sum(gradients[name] for _, gradients in ranks)
        torch.testing.assert_close(total, gradient, rtol=1e-4, atol=1e-6 * gradient.abs().max().item() + 1e-9)


# --- plans ---------------------------------------------------------------------------------------


@pytest.fixture
def packed(tokenizer):
    return pack_conversations(make_conversations(61), tokenizer, T)


def test_an_epoch_has_as_many_steps_as_hold_all_rows(packed):
    num_rows = len(packed.rows)
    plan = make_plan(parse("--total-batch-size", str(8 * T)), packed, 2**15, 1)
    assert (plan.total_batch_tokens, plan.num_steps) == (8 * T, -(-num_rows // 8))
    plan = make_plan(parse("--total-batch-size", str(8 * T), "--epochs", "3"), packed, 2**15, 1)
    assert plan.num_steps == -(-3 * num_rows // 8)
    plan = make_plan(parse("--total-batch-size", str(8 * T), "--num-steps", "5"), packed, 2**15, 1)
    assert plan.num_steps == 5


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_few_conversations_get_a_smaller_batch_of_whole_rows_on_every_rank(packed, world_size):
    plan = make_plan(parse("--epochs", "40"), packed, 2**15, world_size)
    assert plan.total_batch_tokens % (T * world_size) == 0
    assert plan.num_steps >= MIN_STEPS
    assert make_plan(parse("--epochs", "4000000"), packed, 2**15, 1).total_batch_tokens == 2**15
    assert make_plan(parse(), packed, 2**15, world_size).total_batch_tokens == T * world_size


def test_a_batch_of_less_than_a_row_is_refused(packed):
    with pytest.raises(UserError, match=f"--total-batch-size {T - 1} is less than a row"):
        make_plan(parse("--total-batch-size", str(T - 1)), packed, 2**15, 1)


def test_rates_go_with_the_batch_and_the_multiplier(packed):
    one, two = (
        make_plan(parse("--total-batch-size", str(2**19), "--lr-mult", mult), packed, 2**15, 1) for mult in ("0.5", "2")
    )
    assert (one.lr_scale, two.lr_scale) == (0.5, 2.0)


def test_the_first_batch_tried_is_no_more_than_the_step_has():
    assert wanted_device_batch(CPU, 0, 0, T) == 8
    assert wanted_device_batch(CPU, 0, 4 * T, T) == 4
    assert wanted_device_batch(CPU, 3, 4 * T, T) == 3
    assert wanted_device_batch(CPU, 3, T // 2, T) == 1


# --- flags ---------------------------------------------------------------------------------------


def test_defaults_are_in_range():
    check_chat_args(parse())


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--epochs 0", "--epochs must be a number above 0, not 0"),
        ("--num-steps -1", "--num-steps must be a number above 0, not -1"),
        ("--lr-mult nan", "--lr-mult must be a number of 0 or more, not nan"),
        ("--max-conversations -1", "--max-conversations must be a number of 0 or more"),
        ("--warmdown-frac 1.5", "--warmdown-frac must lie between 0 and 1, not 1.5"),
        ("--final-lr-frac -0.5", "--final-lr-frac must lie between 0 and 1"),
    ],
)
def test_a_flag_out_of_range_is_named_with_its_value(flags, words):
    with pytest.raises(UserError, match=words):
        check_chat_args(parse(*flags.split()))


def test_a_flag_left_out_is_in_every_range():
    args = parse()
    args.num_steps = args.eval_tokens = None
    check_ranges(args, positive=["num_steps"], zero_or_more=["eval_tokens"], shares=["eval_tokens"])
