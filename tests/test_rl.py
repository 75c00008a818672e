"""Policy gradients: advantages, gradients however a step is split, skipped groups, tool tokens, pass@k."""

import itertools
import math
import random

import pytest
import torch
from conftest import random_model
from ranks import assert_sum_of_gradients, run_ranks

from nanochat.common import UserError
from nanochat.data.chat import render_for_completion
from nanochat.engine.engine import Engine
from nanochat.engine.sampling import Sampling
from nanochat.model.gpt import GPTConfig
from nanochat.model.loss import IGNORE_INDEX
from nanochat.tokenizer import Tokenizer
from nanochat.training import rl
from nanochat.training.loop import accumulate_gradients
from nanochat.training.optim import MuonAdamW, parameter_groups
from tasks.common import Task, TaskMixture

CPU = torch.device("cpu")
T = 48


class FirstToken(Task):
    """Pays for replies that begin with a token of the first half of the vocabulary."""

    name, kind, has_reward = "FirstToken", "generative", True

    def __init__(self, tokenizer, size=40):
        self.tokenizer, self.size = tokenizer, size

    def __len__(self):
        return self.size

    def conversation(self, index):
        content = f"river stone {index}"
        return {"messages": [{"role": "user", "content": content}, {"role": "assistant", "content": "seven"}]}

    def reward(self, conversation, completion):
        ids = self.tokenizer.encode("".join(part["text"] for part in completion))
        return float(bool(ids) and ids[0] < self.tokenizer.vocab_size // 2)


def make_model(tokenizer):
    config = GPTConfig.from_depth(2, vocab_size=tokenizer.vocab_size, sequence_len=T, head_dim=32)
    return random_model(config)


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def sample(model, tokenizer):
    """Rollouts of questions, or with `evaluate` what is found with them."""
    engine = Engine(model, tokenizer, max_rows=32)

    def run(asked, max_tokens, num_samples, seed, work=rl.roll_out):
        return work(engine, model, asked, Sampling(max_tokens=max_tokens), num_samples=num_samples, seed=seed)

    return run


def make_rollouts(vocab_size: int, num_groups: int = 6, num_samples: int = 4) -> list[list[rl.Rollout]]:
    """Groups with random tokens, lengths, tool answers and rewards."""
    rng, groups = random.Random(0), []
    for _ in range(num_groups):
        prompt = [rng.randrange(vocab_size) for _ in range(rng.randint(1, 9))]
        rewards = [float(rng.random() < 0.5) for _ in range(num_samples)]
        rewards[0], rewards[1] = 0.0, 1.0
        group = []
        for reward, advantage in zip(rewards, rl.advantages(rewards), strict=True):
            length = rng.randint(1, 20)
            reply = [rng.randrange(vocab_size) for _ in range(length)]
            is_sampled = [rng.random() < 0.8 for _ in range(length)]
            group.append(rl.Rollout(prompt, reply, is_sampled, reward, advantage, True))
        groups.append(group)
    return groups


# --- advantages and gradients ---
def test_advantages_of_a_group_sum_to_zero_and_groups_of_equal_rewards_are_left_out():
    rng = random.Random(0)
    for size in range(1, 40):
        values = rl.advantages([rng.random() for _ in range(size)])
        assert abs(math.fsum(values)) < 1e-12
    assert rl.advantages([1.0, 0.0, 0.0, 1.0]) == [0.5, -0.5, -0.5, 0.5]
    groups, same = make_rollouts(400), [rl.Rollout([1], [2], [True], 1.0, 0.0, True)] * 3
    assert rl.differing([same, *groups, same]) == groups


def gradients_of(model) -> dict:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def reference_gradients(model, rollouts) -> tuple[float, dict]:
    """Each rollout alone, through plain log probabilities."""
    num_tokens = sum(sum(r.is_sampled) for r in rollouts)
    total = 0.0
    for r in rollouts:
        tokens = torch.tensor([[*r.prompt, *r.reply]])
        logprobs = torch.log_softmax(model(tokens[:, :-1])[0], dim=-1)
        for place, (token, is_sampled) in enumerate(zip(r.reply, r.is_sampled, strict=True)):
            if is_sampled:
                total = total - r.advantage * logprobs[len(r.prompt) - 1 + place, token]
    loss = total / num_tokens
    loss.backward()
    return loss.item(), gradients_of(model)


def step_gradients(rank: int, world_size: int, folder, batch_size: int):
    tokenizer = Tokenizer.load(folder)
    groups = make_rollouts(tokenizer.vocab_size)[rank::world_size]
    batches = rl.make_batches([r for group in rl.differing(groups) for r in group], batch_size)
    model = make_model(tokenizer)
    loss = accumulate_gradients(model, iter(batches), len(batches), device=CPU, world_size=world_size)
    return loss.item(), gradients_of(model)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 2), (1, 4), (1, 100), (2, 1), (2, 2), (2, 4)])
def test_the_gradient_is_that_of_each_reply_alone_however_a_step_is_split(
    model, tokenizer_folder, tmp_path, world_size, batch_size
):
    rollouts = [r for group in make_rollouts(model.config.vocab_size) for r in group]
    loss, expected = reference_gradients(model, rollouts)
    ranks = run_ranks(step_gradients, world_size, tmp_path / "ranks", tokenizer_folder, batch_size)
    assert [rank_loss for rank_loss, _ in ranks] == pytest.approx([loss] * world_size, rel=1e-4, abs=1e-6)
    assert_sum_of_gradients([gradients for _, gradients in ranks], expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("rollouts", [[], [rl.Rollout([7, 8], [1, 2, 3], [False] * 3, 1.0, 0.5, True)]])
def test_a_rank_without_replies_or_sampled_tokens_has_gradients_of_zero(rollouts, model):
    assert accumulate_gradients(model, iter(rl.make_batches(rollouts, 4)), 1, device=CPU).item() == 0
    gradients = gradients_of(model)
    assert gradients
    assert not any(gradient.any() for gradient in gradients.values())


def test_targets_are_the_sampled_tokens_only():
    rollout = rl.Rollout([7, 8], [1, 2, 3, 4], [True, False, False, True], 1.0, 0.5, True)
    longer = rl.Rollout([7, 8, 9], [1, 2, 3, 4, 5], [True] * 5, 0.0, -0.5, True)
    (batch,) = rl.make_batches([rollout, longer], 2)
    x = IGNORE_INDEX
    assert batch.idx.tolist() == [[7, 8, 9, 1, 2, 3, 4], [7, 8, 1, 2, 3, 0, 0]]
    assert batch.targets.tolist() == [[x, x, 1, 2, 3, 4, 5], [x, 1, x, x, 4, x, x]]
    assert batch.weights.tolist() == [-0.5, 0.5]
    assert batch.num_targets == 7


# --- rollouts ---
def questions_of(tokenizer, **options) -> rl.Questions:
    return rl.Questions(TaskMixture([FirstToken(tokenizer)]), tokenizer, T - 8, **options)


def test_rollouts_are_what_the_engine_samples_with_the_end_added(sample, tokenizer):
    asked = questions_of(tokenizer).take(0, 5)
    groups = sample(asked, 12, 4, "s")
    end = tokenizer.special_ids["<|assistant_end|>"]
    assert [len(group) for group in groups] == [4] * 5
    for question, group in zip(asked, groups, strict=True):
        assert abs(sum(r.advantage for r in group)) < 1e-9
        for r in group:
            assert r.prompt == question.prompt
            assert len(r.reply) == len(r.is_sampled)
            assert (r.reply[-1] == end) == r.is_whole
    replies, again, other = (
        [r.reply for group in some for r in group]
        for some in (groups, sample(asked[3:], 12, 4, "s"), sample(asked, 12, 4, "t"))
    )
    assert again == replies[12:]
    assert other != replies


def test_tool_answers_are_not_sampled(sample, model, tokenizer):
    special = tokenizer.special_ids
    with torch.no_grad():
        model.lm_head.weight[[special["<|python_start|>"], special["<|python_end|>"]]] *= 10  # calls are likely
    num_forced = 0
    for r in (r for group in sample(questions_of(tokenizer).take(0, 4), 20, 32, "calls") for r in group):
        inside = False
        for token, is_sampled in zip(r.reply, r.is_sampled, strict=True):
            inside = inside or token == special["<|output_start|>"]
            assert is_sampled != inside
            num_forced += inside
            inside = inside and token != special["<|output_end|>"]
    assert num_forced > 20


@pytest.mark.parametrize("reward", [math.nan, math.inf])
def test_a_reward_that_is_not_finite_is_an_error_that_names_the_task(reward, sample, tokenizer, monkeypatch):
    monkeypatch.setattr(FirstToken, "reward", lambda *args: reward)
    with pytest.raises(UserError, match=f"FirstToken gave the reward {reward}"):
        sample(questions_of(tokenizer).take(0, 1), 2, 2, "")


# --- questions ---
def test_every_question_is_asked_once_an_epoch_by_one_rank_and_others_are_not_resumed_with(tokenizer):
    one = questions_of(tokenizer, seed=3)
    numbers = [q.conversation["messages"][0]["content"] for q in one.take(0, 80)]
    assert len(set(numbers[:40])) == len(set(numbers[40:])) == 40
    assert numbers[:40] != numbers[40:]
    parts = [questions_of(tokenizer, seed=3).take(32, 16, rank=rank, world_size=3) for rank in range(3)]
    merged = sorted((q.index, q.conversation["messages"][0]["content"]) for part in parts for q in part)
    assert merged == [(i, numbers[i]) for i in range(32, 48)]
    sizes = (4, 2, 1, 4)  # ranks of one step after another
    steps = [one.take(10 * i, 10, rank=r, world_size=n) for i, n in enumerate(sizes) for r in range(n)]
    assert sorted(question.index for part in steps for question in part) == list(range(40))
    assert {question.conversation["messages"][0]["content"] for part in steps for question in part} == set(numbers[:40])
    one.load_state_dict([questions_of(tokenizer, seed=3).state_dict()] * 2)
    with pytest.raises(UserError, match="not those of the run being resumed"):
        one.load_state_dict([questions_of(tokenizer, seed=1).state_dict()])


def test_what_is_too_long_is_left_out_and_none_left_is_an_error(tokenizer):
    mixture = TaskMixture([FirstToken(tokenizer)])
    prompts = ({"messages": mixture[i]["messages"][:-1]} for i in range(len(mixture)))
    lengths = [len(render_for_completion(tokenizer, prompt).ids) for prompt in prompts]
    longest = sorted(lengths)[10]
    questions = rl.Questions(mixture, tokenizer, longest)
    assert len(questions) == sum(length <= longest for length in lengths)
    assert questions.num_left_out == 40 - len(questions)
    with pytest.raises(UserError, match="none of 40 questions fits into 1 tokens"):
        rl.Questions(mixture, tokenizer, 1)


# --- evaluation ---
def test_pass_at_k_is_the_share_of_choices_with_a_right_sample():
    for n in range(1, 7):
        for right in range(n + 1):
            for k in range(1, n + 1):
                choices = list(itertools.combinations([True] * right + [False] * (n - right), k))
                assert rl.pass_at_k(n, right, k) == pytest.approx(sum(map(any, choices)) / len(choices))


def test_evaluation_agrees_with_the_rollouts_it_is_made_of(sample, tokenizer):
    asked = questions_of(tokenizer).take(0, 12)
    evaluation = sample(asked, 6, 4, "e", rl.evaluate)
    found = evaluation.numbers
    rewards = [[r.reward for r in group] for group in sample(asked, 6, 4, "e")]
    assert found["val_reward"] == pytest.approx(sum(map(sum, rewards)) / 48)
    assert evaluation.means == pytest.approx([sum(group) / 4 for group in rewards])
    assert found["val_pass_at_1"] == pytest.approx(found["val_reward"])
    assert found["val_pass_at_4"] == pytest.approx(sum(map(any, rewards)) / 12)
    assert found["val_pass_at_1"] <= found["val_pass_at_2"] <= found["val_pass_at_4"]
    means = torch.tensor(rewards).mean(dim=1)
    assert found["val_reward_se"] == pytest.approx((means.std() / 12**0.5).item())


def test_evaluation_of_several_tasks_has_the_reward_of_each(sample, tokenizer):
    class Unpaid(FirstToken):
        name = "Unpaid"

        def reward(self, conversation, completion):
            return 0.0

    mixture = TaskMixture([FirstToken(tokenizer, 12), Unpaid(tokenizer, 6)])
    asked = rl.Questions(mixture, tokenizer, 40).take(0, 18)
    found = sample(asked, 6, 4, "e", rl.evaluate).numbers
    assert (found["val_reward_Unpaid"], found["val_reward_Unpaid_se"]) == (0, 0)
    assert found["val_reward_FirstToken"] * 12 == pytest.approx(found["val_reward"] * 18)
    assert found["val_reward_FirstToken_se"] > 0
    alone = [question for question in asked if question.task.name == "FirstToken"]
    assert not any("FirstToken" in name for name in sample(alone, 6, 4, "e", rl.evaluate).numbers)


# --- learning ---
def test_the_reward_rises(sample, model, tokenizer):
    optimizer = MuonAdamW(parameter_groups(model), rank=0, world_size=1, muon_dtype=torch.float32)
    for group in optimizer.groups:
        group.lr = group.initial_lr * 0.5
    questions, means = questions_of(tokenizer), []
    for step in range(12):
        groups = sample(questions.take(step * 8, 8), 2, 8, f"{step}")
        means.append(rl.step_numbers(groups)["reward"])
        batches = rl.make_batches([r for group in rl.differing(groups) for r in group], 16)
        accumulate_gradients(model, iter(batches), len(batches), device=CPU)
        optimizer.step()
        optimizer.zero_grad()
    assert max(means[:2]) < 0.75
    assert min(means[-3:]) > 0.9
