"""Reinforcement learning on a model's own replies: rollouts, advantages, the batches of a step, pass@k.

GRPO in its simple form. The current model answers each question several times, a group. The advantage of a reply is its
reward minus the mean of its group (arXiv 2402.03300, without the division by the standard deviation, which favours
questions that are too easy or too hard, arXiv 2503.20783), and the loss of a step is

    - sum over sampled tokens of advantage * log p(token) / number of those tokens                (arXiv 2503.14476)

over all replies of the step on all ranks. Each reply is used in one step only, so there is nothing to clip and no
reference model to stay near. Groups whose rewards are all equal have no gradient and are left out.

Not here: the loop (`scripts/chat_rl.py`), rewards (the tasks), how replies are generated (`engine.py`).
"""

import hashlib
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from nanochat.common import UserError, gather_ranks
from nanochat.data.chat import render_for_completion
from nanochat.data.chat_loader import epoch_order
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
    """Question `index` of a run: its task (a `tasks.common.Task`), the conversation with the reference as last message,
    and the prompt that asks for it."""

    index: int
    task: Any
    conversation: Mapping[str, Any]
    prompt: list[int]


@dataclass(frozen=True)
class Rollout:
    """A reply to a prompt, in tokens with the one that ended it. Tokens of tool results are not `is_sampled`; a reply
    that was cut off is not `is_whole`. The advantage is the reward minus the mean of the group."""

    prompt: list[int]
    reply: list[int]
    is_sampled: list[bool]
    reward: float
    advantage: float
    is_whole: bool


Group = Sequence[Rollout]  # of one question


class Questions:
    """The questions of a mixture of tasks in a random order, another one each epoch, dealt out to ranks. mixture: a
    `tasks.common.TaskMixture`. Questions with a prompt of more than `max_prompt` tokens are left out, `num_left_out` of
    them; raises `UserError` if none is left."""

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
            remedy = "lower --max-tokens, or take a model with a longer context"
            raise UserError(f"none of {len(mixture)} questions fits into {max_prompt} tokens of context; {remedy}")

    def __len__(self) -> int:
        return len(self.indices)

    def take(self, first: int, count: int, *, rank: int = 0, world_size: int = 1) -> list[Question]:
        """This rank's share of `count` questions, from number `first` of the whole run on."""
        questions = []
        for number in range(first, first + count)[rank::world_size]:
            epoch, place = divmod(number, len(self.indices))
            index = self.indices[epoch_order(self.seed, epoch, len(self.indices))[place]]
            conversation = self.mixture[index]
            questions.append(Question(number, self.mixture.locate(index)[0], conversation, self._prompt(conversation)))
        return questions

    def _prompt(self, conversation: Mapping[str, Any]) -> list[int]:
        return render_for_completion(self.tokenizer, {"messages": conversation["messages"][:-1]}).ids

    def state_dict(self) -> dict[str, Tensor]:
        """What identifies the questions; the position in them follows from the step."""
        return {"digest": torch.tensor(list(self.digest), dtype=torch.uint8), "seed": torch.tensor(self.seed)}

    def load_state_dict(self, shards: Sequence[Mapping[str, Tensor]]) -> None:
        """Raises `UserError` if the run that saved `shards` had other questions."""
        own = self.state_dict()
        if any(not torch.equal(shard[name], own[name]) for shard in shards for name in own):
            remedy = "bring back the data it was started with, or start another run"
            raise UserError(f"the questions are not those of the run being resumed; {remedy}")


def roll_out(
    engine: Engine, model: GPT, questions: Sequence[Question], sampling: Sampling, *, num_samples: int, seed: str
) -> list[Group]:
    """`num_samples` replies of `model` to each question, all decoded in one batch of the engine. What is sampled
    depends only on `seed` and the index of the question, not on the others in the batch. Raises `UserError` for a
    reward that is not finite."""
    engine.refresh(model)  # the weights have changed; the cache must not depend on what came before
    end = engine.tokenizer.special_ids["<|assistant_end|>"]
    requests = []
    for question in questions:
        own = replace(sampling, seed=random.Random(f"{seed}/{question.index}").getrandbits(63))
        requests.append(engine.submit(question.prompt, own, num_samples=num_samples, stop_ids=(end,)))
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
            is_sampled = [not token.is_forced for token in completion.tokens] + [True] * is_whole
            reply = completion.ids + [end] * is_whole
            group.append(Rollout(question.prompt, reply, is_sampled, reward, advantage, is_whole))
        groups.append(group)
    return groups


def advantages(rewards: Sequence[float]) -> list[float]:
    """Each reward minus their mean: `advantages([1, 0, 0, 1]) == [0.5, -0.5, -0.5, 0.5]`."""
    mean = math.fsum(rewards) / len(rewards)
    return [reward - mean for reward in rewards]


def differing(groups: Sequence[Group]) -> list[Group]:
    """The groups whose rewards are not all equal, which are those with a gradient."""
    return [group for group in groups if len({rollout.reward for rollout in group}) > 1]


def make_batches(rollouts: Sequence[Rollout], batch_size: int, device: torch.device | str = "cpu") -> list[Batch]:
    """Rollouts in batches of at most `batch_size` rows, sorted by length to save padding. Targets are the sampled
    tokens; the weight of a row is its advantage. Without rollouts there is one batch without targets, so that every
    rank has gradients."""
    in_order = sorted(rollouts, key=lambda r: len(r.prompt) + len(r.reply), reverse=True)
    return [_batch(in_order[i : i + batch_size], device) for i in range(0, max(1, len(in_order)), batch_size)]


def _batch(rollouts: Sequence[Rollout], device: torch.device | str) -> Batch:
    B, T = max(1, len(rollouts)), max([len(r.prompt) + len(r.reply) - 1 for r in rollouts], default=1)
    idx, targets, weights = torch.zeros((B, T), dtype=torch.int64), torch.full((B, T), IGNORE_INDEX), torch.zeros(B)
    for b, r in enumerate(rollouts):
        tokens = torch.tensor([*r.prompt, *r.reply])
        begin, end = len(r.prompt) - 1, len(tokens) - 1  # positions that predict the reply
        idx[b, :end], weights[b] = tokens[:-1], r.advantage
        targets[b, begin:end] = torch.tensor(r.reply).masked_fill(~torch.tensor(r.is_sampled), IGNORE_INDEX)
    num_sampled = sum(sum(r.is_sampled) for r in rollouts)
    return Batch(idx.to(device), targets, num_sampled, 0, weights.to(device))


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """Probability that one of `k` samples is right, estimated without bias from `num_samples` of which `num_right`
    are (arXiv 2107.03374, equation 1)."""
    assert 0 <= num_right <= num_samples >= k >= 1, (num_samples, num_right, k)
    return 1.0 - math.comb(num_samples - num_right, k) / math.comb(num_samples, k)


@dataclass(frozen=True)
class Evaluation:
    """Numbers by name, the mean reward of each question in their order, and some greedy replies as text, prompt and
    special tokens included."""

    numbers: dict[str, float]
    means: list[float]
    samples: list[str]


def evaluate(
    engine: Engine, model: GPT, questions: Sequence[Question], sampling: Sampling, *, num_samples: int, seed: str
) -> Evaluation:
    """Answer this rank's `questions`, and summarise the replies of all ranks. The numbers are the mean reward of
    `num_samples` replies with its standard error over questions (overall and, if there are several tasks, for each),
    that of a greedy reply, pass@k for powers of two, and those of `_lengths`."""
    groups = roll_out(engine, model, questions, sampling, num_samples=num_samples, seed=seed)
    greedy = roll_out(engine, model, questions, replace(sampling, temperature=0.0), num_samples=1, seed=seed)
    answered = zip(questions, groups, greedy, strict=True)
    own = [(question.index, question.task.name, group, one.reward) for question, group, (one,) in answered]
    rows = sorted((row for part in gather_ranks(own) for row in part), key=lambda row: row[0])
    _, names, all_groups, greedy_rewards = zip(*rows, strict=True)
    means = [math.fsum(r.reward for r in group) / num_samples for group in all_groups]
    numbers = dict(zip(("val_reward", "val_reward_se"), mean_and_error(means), strict=True))
    numbers["val_greedy_reward"] = math.fsum(greedy_rewards) / len(rows)
    numbers |= {f"val_{name}": value for name, value in _lengths(all_groups).items()}
    num_right = [sum(r.reward >= FULL_REWARD for r in group) for group in all_groups]
    for k in (2**i for i in range(num_samples.bit_length())):
        numbers[f"val_pass_at_{k}"] = math.fsum(pass_at_k(num_samples, right, k) for right in num_right) / len(rows)
    if len(set(names)) > 1:
        for task in sorted(set(names)):
            of_task = [mean for mean, name in zip(means, names, strict=True) if name == task]
            numbers[f"val_reward_{task}"], numbers[f"val_reward_{task}_se"] = mean_and_error(of_task)
    shown = greedy[:NUM_SAMPLES_SHOWN]
    texts = [f"{engine.tokenizer.decode(one.prompt + one.reply)}\nreward {one.reward:g}" for (one,) in shown]
    return Evaluation(numbers, means, texts)


def step_numbers(groups: Sequence[Group]) -> dict[str, float]:
    """Of the replies of all ranks in a step: mean reward, share of groups whose rewards differ, those of `_lengths`,
    the number of `rollout_tokens`, and of `train_tokens`, which are sampled in groups that differ."""
    groups = [group for part in gather_ranks(groups) for group in part]
    learned = differing(groups)
    return {
        "reward": math.fsum(math.fsum(r.reward for r in group) for group in groups) / sum(map(len, groups)),
        "groups_frac": len(learned) / len(groups),
        **_lengths(groups),
        "rollout_tokens": sum(len(r.reply) for group in groups for r in group),
        "train_tokens": sum(sum(r.is_sampled) for group in learned for r in group),
    }


def _lengths(groups: Sequence[Group]) -> dict[str, float]:
    """Mean length of the replies in tokens, and the share that was cut off."""
    replies = [r for group in groups for r in group]
    num_tokens, num_cut = sum(len(r.reply) for r in replies), sum(not r.is_whole for r in replies)
    return {"reply_tokens": num_tokens / len(replies), "cut_frac": num_cut / len(replies)}


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """The mean of `values` and its standard error, 0 for a single one."""
    mean = math.fsum(values) / len(values)
    variance = math.fsum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, math.sqrt(variance / len(values))
