"""Muon for the matrices, AdamW for the rest: two pure update functions and the one class that applies them.

With several ranks, optimizer state and updates are sharded (ZeRO-2, arXiv 1910.02054): gradients are summed by
reduce-scatter, each rank updates its share of the parameters, all-gather distributes the result; one rank is the case
without communication. Shards are cut along the first dimension of a *bucket*:

    AdamW   one bucket for each parameter, flattened: (numel,)
    Muon    one bucket for all matrices of one shape, stacked: (number, rows, columns)

both padded to a multiple of the world size. Parameters are views into the storage of their bucket, and so are the
gradients of the stacked matrices, so a step copies nothing to stack or unstack them. Saved states leave the padding
out: concatenated, the shards of any number of ranks are the whole state.

Not here: what changes from step to step, and how rates depend on batch and horizon (`schedule.py`).
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.common import UserError
from nanochat.model.gpt import GPT

# Learning rates and weight decay of the public nanochat's d12, where they were tuned
MATRIX_LR = 0.02
MATRIX_WEIGHT_DECAY = 0.28
REFERENCE_WIDTH = 768  # of d12; the rates of the embeddings and the head change with the width

# Polar Express (arXiv 2505.16932), degree 5, five steps: coefficients (a, b, c) of X <- a X + b (XX')X + c (XX')^2 X
POLAR_STEPS = (
    (8.15655, -22.48329, 15.87877),
    (4.04293, -2.80892, 0.50002),
    (3.89167, -2.77248, 0.50606),
    (3.28575, -2.36813, 0.46449),
    (2.34654, -1.70978, 0.42324),
)
POLAR_SAFETY = 1.02  # factor on the norm: rounding must not leave the interval in which the iteration converges
TINY = 1e-7  # added to norms that may be zero (padding, parameters without gradient)
CPU_CHUNK = 1 << 17  # elements per pass of AdamW on a CPU, so that successive passes find them in the cache
TABLE_EPS = 1e-10  # of AdamW, for the embeddings and the head
SCALAR_EPS = 1e-6  # for the scalars, whose first gradients are only rounding errors, of up to 1e-9


def adamw_update(p, grad, exp_avg, exp_avg_sq, *, step_size, beta1, beta2, correction2, eps, decay) -> None:
    """One AdamW step (arXiv 1711.05101) in place on `p` and its two moments, all of one shape.

    step_size = lr / (1 - beta1^t), correction2 = sqrt(1 - beta2^t), decay = lr * weight_decay; numbers or 0-d tensors.
    The bias is corrected before eps is added. The moments are float32, `p` may be narrower.
    """
    grad = grad.to(exp_avg.dtype)
    exp_avg.lerp_(grad, 1 - beta1)
    exp_avg_sq.lerp_(grad.square(), 1 - beta2)
    direction = exp_avg / (exp_avg_sq.sqrt().div_(correction2).add_(eps))
    p.copy_(p.to(exp_avg.dtype) * (1 - decay) - direction.mul_(step_size))


def polar_express(x: Tensor) -> Tensor:
    """Approximate the orthogonal polar factor of each matrix of x (..., m, n): singular values of at least 1e-3 of the
    Frobenius norm end between 0.84 and 1.15, smaller ones below that."""
    is_tall = x.size(-2) > x.size(-1)
    x = x.mT if is_tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) * POLAR_SAFETY + TINY)
    for a, b, c in POLAR_STEPS:
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return x.mT if is_tall else x


def muon_update(p, grad, momentum_buffer, row_variance, *, lr, momentum, beta2, weight_decay, dtype) -> None:
    """One Muon step in place on stacked matrices p (K, m, n) and their state.

    Nesterov momentum; rows normalised, then orthogonalised in `dtype`; per-row variance normalisation (NorMuon, arXiv
    2510.05491) at constant Frobenius norm sqrt(min(m, n)); a rate that grows with sqrt(m / n) for tall matrices; weight
    decay only where it has the sign of the update (arXiv 2510.12402). momentum_buffer: (K, m, n), row_variance:
    (K, m, 1), both float32.
    """
    m, n = p.shape[-2:]
    grad = grad.to(momentum_buffer.dtype)
    momentum_buffer.lerp_(grad, 1 - momentum)
    update = grad.lerp(momentum_buffer, momentum)
    update = update / (update.norm(dim=-1, keepdim=True) + TINY)
    update = polar_express(update.to(dtype)).float()
    row_variance.lerp_(update.square().mean(dim=-1, keepdim=True), 1 - beta2)
    update = update / (row_variance.sqrt() + TINY)
    update = update * (math.sqrt(min(m, n)) / (update.norm(dim=(-2, -1), keepdim=True) + TINY))
    decayed = torch.where(update * p > 0, p, torch.zeros_like(p))
    p.sub_(lr * math.sqrt(max(1.0, m / n)) * update + lr * weight_decay * decayed)


# --- groups --------------------------------------------------------------------------------------


@dataclass
class Group:
    """Parameters that share hyperparameters. `lr`, `momentum` and `weight_decay` hold for the next step; a schedule
    multiplies the `initial_` ones."""

    name: str
    kind: str  # "adamw" or "muon"
    params: dict[str, nn.Parameter]
    lr: float
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.8, 0.95)  # AdamW
    eps: float = TABLE_EPS  # AdamW
    momentum: float = 0.95  # Muon
    beta2: float = 0.9  # Muon
    initial_lr: float = field(init=False)
    initial_weight_decay: float = field(init=False)

    def __post_init__(self):
        assert self.kind in ("adamw", "muon"), self.kind
        self.initial_lr, self.initial_weight_decay = self.lr, self.weight_decay


def parameter_groups(model: GPT) -> list[Group]:
    """The model's parameters in groups with the recipe's rates; every parameter once.

    The rates of the embeddings and the head go with width ** -0.5. The scalars need a larger eps: while the output
    projections are zero, scalars only change the length of the residual stream, which the last norm removes, so their
    gradients are rounding errors. With the other tables' eps, AdamW would make full steps of these, and within 20 steps
    losses would differ by 1e-2 with the split of the batch; with `SCALAR_EPS` it is 1e-6.
    """
    width = (model.config.n_embd / REFERENCE_WIDTH) ** -0.5
    table = {  # prefix of the parameter's name: lr, betas, weight decay, eps
        "lm_head": (0.008 * width, (0.8, 0.96), 0.01, TABLE_EPS),
        "wte": (0.3 * width, (0.8, 0.995), 0.001, TABLE_EPS),
        "value_embeds": (0.15 * width, (0.8, 0.995), 0.01, TABLE_EPS),
        "resid_lambdas": (0.005, (0.8, 0.95), 0.05, SCALAR_EPS),
        "x0_lambdas": (0.5, (0.96, 0.95), 0.0, SCALAR_EPS),
        "smear": (0.2, (0.8, 0.95), 0.0, SCALAR_EPS),
        "backout": (0.2, (0.8, 0.95), 0.0, SCALAR_EPS),
    }
    named = dict(model.named_parameters())
    groups = []
    for prefix, (lr, betas, weight_decay, eps) in table.items():
        params = {name: p for name, p in named.items() if name.startswith(prefix)}
        if params:
            groups.append(Group(prefix, "adamw", params, lr, weight_decay, betas, eps))
    matrices = {name: p for name, p in named.items() if name.startswith("h.")}
    groups.append(Group("matrices", "muon", matrices, MATRIX_LR, MATRIX_WEIGHT_DECAY))
    assert sum(len(group.params) for group in groups) == len(named), "a parameter is in no group, or in two"
    return groups


# --- the optimizer -------------------------------------------------------------------------------


@dataclass
class _Bucket:
    """Parameters updated together. `values`, and for Muon `grads`, hold them along dim 0, padded to whole shards.
    `grad_views` are the parameters' parts of `grads`, None where autograd allocates them at each step."""

    name: str
    group: Group
    params: list[nn.Parameter]
    rows: int  # of dim 0, without padding
    values: Tensor
    grads: Tensor | None
    grad_views: list[Tensor | None]
    own: slice  # this rank's rows
    state: dict[str, Tensor]


@dataclass
class _Transfer:
    """A tensor that is complete after `wait`, and what the collective reads until then, which must stay alive."""

    arriving: Tensor
    source: Tensor | None = None
    work: dist.Work | None = None

    def wait(self) -> Tensor:
        if self.work is not None:
            self.work.wait()
        return self.arriving


class MuonAdamW:
    """Applies `muon_update` and `adamw_update` to groups of parameters, sharded over `world_size` ranks.

    Build it last, as it moves the storage of the parameters. Gradients are *summed* over ranks, so each rank's loss
    must already be divided by the token count of all ranks. The matrix products of Muon are in `muon_dtype`.
    """

    def __init__(
        self, groups: list[Group], *, rank: int = 0, world_size: int = 1, muon_dtype: torch.dtype = torch.float32
    ):
        self.groups = groups
        self.rank, self.world_size, self.muon_dtype = rank, world_size, muon_dtype
        self.num_steps = 0
        self._buckets = [bucket for group in groups for bucket in self._make_buckets(group)]
        on_cuda = any(bucket.values.is_cuda for bucket in self._buckets)
        self._adamw_update = torch.compile(adamw_update, dynamic=False) if on_cuda else adamw_update
        self._muon_update = torch.compile(muon_update, dynamic=False) if on_cuda else muon_update

    def zero_grad(self) -> None:
        for bucket in self._buckets:
            if bucket.grads is not None:
                bucket.grads.zero_()
            for p, view in zip(bucket.params, bucket.grad_views, strict=True):
                p.grad = view

    @torch.no_grad()
    def step(self) -> None:
        """One step of every group from the parameters' gradients. A missing gradient counts as zero."""
        self.num_steps += 1
        # the two lists keep the tensors of the collectives alive until they are waited for
        arriving = [self._start_reduce(bucket) for bucket in self._buckets]
        leaving = []
        for bucket, transfer in zip(self._buckets, arriving, strict=True):
            self._update(bucket, transfer.wait())
            leaving.append(self._start_gather(bucket))
        for transfer in leaving:
            transfer.wait()

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's share of the state, "parameter.state": float32, without padding; and "num_steps"."""
        state = {
            f"{bucket.name}.{key}": value[: max(0, bucket.rows - bucket.own.start)]
            for bucket in self._buckets
            for key, value in bucket.state.items()
        }
        return {**state, "num_steps": torch.tensor(self.num_steps)}

    def load_state_dict(self, shards: list[dict[str, Tensor]]) -> None:
        """Restore the state saved by any number of ranks: `shards[r]` is what `state_dict` gave on rank r.

        Raises `UserError`, leaving the state unchanged, when it is not the state of exactly these parameters.
        """
        states = [(f"{b.name}.{key}", b, value) for b in self._buckets for key, value in b.state.items()]
        expected = {name: (bucket.rows, *value.shape[1:]) for name, bucket, value in states}
        names = {*expected, "num_steps"}
        different = set().union(*(shard.keys() ^ names for shard in shards)) or {
            name
            for name, shape in expected.items()
            if shape != (sum(shard[name].size(0) for shard in shards), *shards[0][name].shape[1:])
        }
        if different:
            raise UserError(
                f"the optimizer state in the checkpoint is of another model: {', '.join(sorted(different)[:5])} "
                f"differ; use the checkpoint with the model it was saved with"
            )
        for name, bucket, value in states:
            own = torch.cat([shard[name] for shard in shards])[bucket.own]
            value.zero_()[: own.size(0)].copy_(own)
        self.num_steps = int(shards[0]["num_steps"])

    def _make_buckets(self, group: Group) -> Iterator[_Bucket]:
        """Move the parameters into storage padded to whole shards, and allocate this rank's state."""
        is_muon = group.kind == "muon"
        alike: dict[torch.Size | str, dict[str, nn.Parameter]] = {}
        for name, p in group.params.items():
            alike.setdefault(p.shape if is_muon else name, {})[name] = p
        for named in alike.values():
            name, params = next(iter(named)), list(named.values())
            values = torch.stack([p.data for p in params]) if is_muon else params[0].data.flatten()
            rows, share = values.size(0), -(-values.size(0) // self.world_size)
            if num_padding := share * self.world_size - rows:
                values = torch.cat((values, values.new_zeros(num_padding, *values.shape[1:])))
            grads = torch.zeros_like(values) if is_muon else None
            grad_views = list(grads[:rows].unbind()) if is_muon else [None]
            for i, (p, view) in enumerate(zip(params, grad_views, strict=True)):
                p.data = values[i] if is_muon else values[:rows].view(p.shape)
                p.grad = view
            own = slice(self.rank * share, (self.rank + 1) * share)
            keys = ("momentum_buffer",) if is_muon else ("exp_avg", "exp_avg_sq")
            state = {key: torch.zeros_like(values[own], dtype=torch.float32) for key in keys}
            if is_muon:
                state["row_variance"] = torch.zeros_like(values[own][..., :1], dtype=torch.float32)
            yield _Bucket(name, group, params, rows, values, grads, grad_views, own, state)

    def _start_reduce(self, bucket: _Bucket) -> _Transfer:
        """Start to sum the gradients of all ranks; this rank's own rows of the sum arrive."""
        grads = self._gradient(bucket)
        if self.world_size == 1:
            return _Transfer(grads)
        own = torch.empty_like(grads[bucket.own])
        return _Transfer(own, grads, dist.reduce_scatter_tensor(own, grads, async_op=True))

    def _start_gather(self, bucket: _Bucket) -> _Transfer:
        """Start to exchange the updated rows; those of all ranks arrive in `bucket.values`."""
        if self.world_size == 1:
            return _Transfer(bucket.values)
        own = bucket.values[bucket.own].clone()
        return _Transfer(bucket.values, own, dist.all_gather_into_tensor(bucket.values, own, async_op=True))

    def _gradient(self, bucket: _Bucket) -> Tensor:
        """The bucket's gradient in the layout of its `values`; zero for parameters without one."""
        if bucket.grads is not None:
            for p, view in zip(bucket.params, bucket.grad_views, strict=True):
                if p.grad is None:  # `model.zero_grad()` has removed the view
                    view.zero_()
                elif p.grad is not view:
                    view.copy_(p.grad)
            return bucket.grads
        (p,) = bucket.params
        grad = (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        num_padding = bucket.values.size(0) - bucket.rows
        return torch.cat((grad, grad.new_zeros(num_padding))) if num_padding else grad

    def _update(self, bucket: _Bucket, grad: Tensor) -> None:
        group, values, state = bucket.group, bucket.values[bucket.own], bucket.state
        if group.kind == "muon":
            numbers = {name: getattr(group, name) for name in ("lr", "momentum", "beta2", "weight_decay")}
            self._muon_update(values, grad, **state, **self._as_inputs(values, **numbers), dtype=self.muon_dtype)
            return
        beta1, beta2 = group.betas
        numbers = self._as_inputs(
            values, step_size=group.lr / (1 - beta1**self.num_steps),
            correction2=math.sqrt(1 - beta2**self.num_steps), decay=group.lr * group.weight_decay,
        )  # fmt: skip
        tensors = (values, grad, state["exp_avg"], state["exp_avg_sq"])
        chunk = max(1, values.numel()) if values.is_cuda else CPU_CHUNK
        for pieces in zip(*(t.split(chunk) for t in tensors), strict=True):
            self._adamw_update(*pieces, beta1=beta1, beta2=beta2, eps=group.eps, **numbers)

    @staticmethod
    def _as_inputs(values: Tensor, **numbers: float) -> dict[str, Tensor | float]:
        """Numbers that change from step to step, in the form the compiled updates need: 0-d tensors on the GPU.

        A Python number would be recompiled for each new value. What is computed from a CPU tensor (1 - decay) would
        stay on the CPU, and its address would be passed to a Triton kernel.
        """
        if not values.is_cuda:
            return numbers
        on_device = torch.tensor(list(numbers.values())).to(values.device, non_blocking=True)
        return dict(zip(numbers, on_device.unbind(), strict=True))
