"""Reinforcement learning on a model's own replies: rollouts, advantages, the batches of a step, pass@k.

GRPO in its simple form. Every question is answered several times by the model as it is, a group. The advantage of a
reply is its reward minus the mean of its group (arXiv 2402.03300, without the division by the deviation, which favours
questions that are too easy or too hard, arXiv 2503.20783), and the loss of a step is

    - sum over sampled tokens of advantage * log p(token) / number of those tokens                (arXiv 2503.14476)

over all replies of the step on all ranks. Each reply is used for one step only, so there is nothing to clip and no
reference model to stay near. Groups whose rewards are all equal teach nothing and are left out before any work.

Not here: the loop (`scripts/chat_rl.py`), rewards (the tasks), how replies come about (`engine.py`).
"""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from nanochat.common import UserError
from nanochat.data.chat import render_for_completion
from nanochat.data.dataloader import Batch
from nanochat.engine.engine import Engine
from nanochat.engine.sampling import Sampling
from nanochat.model.gpt import GPT
from nanochat.model.loss import IGNORE_INDEX
from nanochat.tokenizer import Tokenizer

FULL_REWARD = 1.0  # what counts as solved in pass@k
NUM_SAMPLES_SHOWN = 2


@dataclass(frozen=True)
class Question:
    """Question `index` of `task`, of class `tasks.common.Task` or one like it: the conversation, whose last message is
    the reference, and the prompt that asks for it."""

    index: int
    task: Any
    conversation: Mapping[str, Any]
    prompt: list[int]


@dataclass(frozen=True)
class Rollout:
    """A reply to a prompt: its tokens with the one that ended it, which of them were sampled (a tool's answer was not),
    its reward and that minus the mean of its group; `is_whole` unless it was cut off."""

    prompt: list[int]
    reply: list[int]
    is_sampled: list[bool]
    reward: float
    advantage: float
    is_whole: bool

    @property
    def num_sampled(self) -> int:
        return sum(self.is_sampled)


# --- questions -----------------------------------------------------------------------------------


class Questions:
    """The questions of a mixture of tasks in an order drawn from `seed`, epoch after epoch, dealt out to ranks.

    mixture: of class `tasks.common.TaskMixture` or one like it. Those whose prompt is longer than `max_prompt` tokens
    are left out, `num_left_out` of them. Raises `UserError` where none is left.
    """

    def __init__(self, mixture: Any, tokenizer: Tokenizer, max_prompt: int, *, seed: int = 0):
        self.mixture, self.tokenizer, self.seed = mixture, tokenizer, seed
        self.indices, digest = [], hashlib.sha256()
        for index in range(len(mixture)):
            conversation = mixture[index]
            if len(self._prompt(conversation)) <= max_prompt:
                self.indices.append(index)
                digest.update(json.dumps(conversation["messages"]).encode())
        self.digest = digest.digest()
        self.num_left_out = len(mixture) - len(self.indices)
        if not self.indices:
            raise UserError(
                f"none of {len(mixture)} questions fits into {max_prompt} tokens of context; lower --max-tokens, or "
                f"take a model with a longer context"
            )
        self._order: tuple[int, list[int]] | None = None  # an epoch and its order

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, first: int, count: int, *, rank: int = 0, world_size: int = 1) -> list[Question]:
        """This rank's share of the `count` questions from number `first` of the whole run on."""
        return [self._question(number) for number in range(first, first + count)[rank::world_size]]

    def _question(self, number: int) -> Question:
        epoch, place = divmod(number, len(self.indices))
        if self._order is None or self._order[0] != epoch:
            order = list(self.indices)
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = epoch, order
        index = self._order[1][place]
        task, _ = self.mixture.locate(index)
        conversation = self.mixture[index]
        return Question(number, task, conversation, self._prompt(conversation))

    def _prompt(self, conversation: Mapping[str, Any]) -> list[int]:
        return render_for_completion(self.tokenizer, {"messages": conversation["messages"][:-1]}).ids

    # where a run stands follows from its step; a checkpoint keeps what shows that the questions are the same

    def state_dict(self) -> dict[str, Tensor]:
        return {"digest": torch.tensor(list(self.digest), dtype=torch.uint8), "seed": torch.tensor(self.seed)}

    def load_state_dict(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """Raises `UserError` where the run that saved `shards` had other questions."""
        own = self.state_dict()
        if any(not torch.equal(shard[name], own[name]) for shard in shards for name in own):
            raise UserError(
                "the questions are not those of the run being resumed; bring back the data it was started with, or "
                "start another run"
            )


# --- rollouts ------------------------------------------------------------------------------------


def roll_out(
    engine: Engine, model: GPT, questions: Sequence[Question], sampling: Sampling, *, num_samples: int, seed: str
) -> list[list[Rollout]]:
    """A group of `num_samples` replies of `model` to each question, all of them in one batch of its engine.

    What is drawn depends on `seed` and the question's number only, so not on who else is answered at the time. Raises
    `UserError` for a reward that is not finite.
    """
    engine.refresh(model)  # the weights have changed, and what the cache holds must not depend on what came before
    end = engine.tokenizer.special_ids["<|assistant_end|>"]
    requests = [
        engine.submit(
            question.prompt, replace(sampling, seed=random.Random(f"{seed}/{question.index}").getrandbits(63)),
            num_samples=num_samples, stop_ids=(end,),
        )
        for question in questions
    ]  # fmt: skip
    while engine.has_work:
        engine.step()
    groups = []
    for question, request in zip(questions, requests, strict=True):
        rewards = [question.task.reward(question.conversation, c.parts) for c in request.completions]
        for reward in rewards:
            if not math.isfinite(reward):
                raise UserError(f"the task {question.task.name} gave the reward {reward}; rewards must be finite")
        group = []
        for completion, reward, advantage in zip(request.completions, rewards, advantages(rewards), strict=True):
            is_whole = completion.finish_reason == "stop"
            reply = completion.ids + [end] * is_whole
            is_sampled = [not token.is_forced for token in completion.tokens] + [True] * is_whole
            group.append(
                Rollout(question.prompt, reply, is_sampled, reward, advantage, is_whole)
            )  # fmt: skip
        groups.append(group)
    return groups


def advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward minus their mean: `advantages([1, 0, 0, 1]) == [0.5, -0.5, -0.5, 0.5]`."""
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def differing(groups: Sequence[Sequence[Rollout]]) -> list[Sequence[Rollout]]:
    """The groups that have different rewards, and so something to learn from."""
    return [group for group in groups if len({rollout.reward for rollout in group}) > 1]


# --- batches -------------------------------------------------------------------------------------


def make_batches(rollouts: Sequence[Rollout], batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Rollouts as batches of at most `batch_size` rows, alike in length so that little is padding.

    Targets are the sampled tokens, each row's weight is its advantage. There is always a batch, without a target if
    need be, so that every rank has gradients.
    """
    in_order = sorted(rollouts, key=lambda r: len(r.prompt) + len(r.reply), reverse=True)
    chunks = [in_order[i : i + batch_size] for i in range(0, len(in_order), batch_size)]
    return [_batch(chunk, device) for chunk in chunks or [[]]]


def _batch(rollouts: Sequence[Rollout], device: torch.device | str) -> Batch:
    B = max(1, len(rollouts))
    T = max([len(r.prompt) + len(r.reply) - 1 for r in rollouts], default=1)
    idx = torch.zeros((B, T), dtype=torch.int64)
    targets = torch.full((B, T), IGNORE_INDEX)
    weights = torch.zeros(B)
    for b, r in enumerate(rollouts):
        tokens = torch.tensor([*r.prompt, *r.reply])
        begin, end = len(r.prompt) - 1, len(tokens) - 1  # where the reply's tokens are predicted
        idx[b, :end] = tokens[:-1]
        targets[b, begin:end] = torch.tensor(r.reply).masked_fill(~torch.tensor(r.is_sampled), IGNORE_INDEX)
        weights[b] = r.advantage
    num_targets = sum(r.num_sampled for r in rollouts)
    return Batch(idx.to(device), targets.to(device), num_targets, 0, weights.to(device))


# --- evaluation ----------------------------------------------------------------------------------


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that one of `k` samples is right, estimated without bias from `num_samples` of which `num_right`
    are (arXiv 2107.03374, equation 1)."""
    assert 1 <= k <= num_samples, (num_samples, k)
    assert 0 <= num_right <= num_samples, (num_samples, num_right)
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: numbers by name, the mean reward of each question in their order, and some greedy replies
    as texts, prompt and special tokens included."""

    numbers: dict[str, float]
    means: list[float]
    samples: list[str]


def evaluate(
    engine: Engine, model: GPT, questions: Sequence[Question], sampling: Sampling, *, num_samples: int, seed: str
) -> Evaluation:
    """Of this rank's `questions` and those of all others: the mean reward of `num_samples` replies with its standard
    error over questions, where there are several tasks of each one too, that of a greedy reply, pass@k for powers of
    two, mean length in tokens, share cut off."""
    groups = roll_out(engine, model, questions, sampling, num_samples=num_samples, seed=seed)
    greedy = roll_out(engine, model, questions, replace(sampling, temperature=0.0), num_samples=1, seed=seed)
    own = [
        (question.index, question.task.name, [r.reward for r in group], one.reward, sum(len(r.reply) for r in group),
         sum(not r.is_whole for r in group))
        for question, group, (one,) in zip(questions, groups, greedy, strict=True)
    ]  # fmt: skip
    rows = sorted((row for part in gathered(own) for row in part), key=lambda row: row[0])
    _, names, rewards, greedy_rewards, lengths, cut = zip(*rows, strict=True)
    means = [math.fsum(group) / num_samples for group in rewards]
    num_questions, num_replies = len(means), len(means) * num_samples
    mean, se = mean_and_error(means)
    numbers = {
        "val_reward": mean, "val_reward_se": se,
        "val_greedy_reward": math.fsum(greedy_rewards) / num_questions,
        "val_reply_tokens": sum(lengths) / num_replies, "val_cut_frac": sum(cut) / num_replies,
    }  # fmt: skip
    num_right = [sum(reward >= FULL_REWARD for reward in group) for group in rewards]
    for k in (2**i for i in range(num_samples.bit_length())):
        numbers[f"val_pass_at_{k}"] = math.fsum(pass_at_k(num_samples, right, k) for right in num_right) / num_questions
    if len(set(names)) > 1:
        for name in sorted(set(names)):
            of_task = mean_and_error([m for m, its_name in zip(means, names, strict=True) if its_name == name])
            numbers[f"val_reward_{name}"], numbers[f"val_reward_{name}_se"] = of_task
    shown = [one for (one,) in greedy[:NUM_SAMPLES_SHOWN]]
    return Evaluation(
        numbers, means, [f"{engine.tokenizer.decode(r.prompt + r.reply)}\nreward {r.reward:g}" for r in shown]
    )


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of `values` and its standard error, 0 for a single one."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def gathered(own: Any) -> list[Any]:
    """What every rank has, in the order of ranks."""
    if not dist.is_initialized():
        return [own]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, own)
    return parts


def step_numbers(groups: Sequence[Sequence[Rollout]]) -> dict[str, float]:
    """Of all ranks' replies of a step: mean reward, share of groups that differ, mean length in tokens, share cut off,
    `rollout_tokens` of all of them, and `train_tokens`, those sampled in groups that differ."""
    learned = {id(group) for group in differing(groups)}
    own = [
        ([r.reward for r in group], [len(r.reply) for r in group], sum(not r.is_whole for r in group),
         sum(r.num_sampled for r in group) if id(group) in learned else 0)
        for group in groups
    ]  # fmt: skip
    rewards, lengths, cut, trained = zip(*(row for part in gathered(own) for row in part), strict=True)
    num_replies = sum(map(len, rewards))
    return {
        "reward": math.fsum(map(math.fsum, rewards)) / num_replies,
        "groups_frac": sum(count > 0 for count in trained) / len(trained),
        "reply_tokens": sum(map(sum, lengths)) / num_replies,
        "cut_frac": sum(cut) / num_replies,
        "rollout_tokens": sum(map(sum, lengths)),
        "train_tokens": sum(trained),
    }
