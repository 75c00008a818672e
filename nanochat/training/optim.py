"""The optimizer: Muon for the matrices, AdamW for the rest, sharded over ranks.

With several ranks, optimizer state and updates are sharded (ZeRO-2, arXiv 1910.02054): each rank receives the
gradients of its share of the parameters from all others and sums them, updates the share, and all-gather distributes
the result; one rank is the case without communication. Shards are cut along the first dimension of a *bucket*:

    AdamW   one bucket for each parameter, flattened: (numel,)
    Muon    one bucket for all matrices of one shape, stacked: (number, rows, columns)

both padded to a multiple of the world size. Parameters are views into the storage of their bucket, and so are the
gradients of the stacked matrices, so a step copies nothing to stack or unstack them. A bucket's gradients travel in
*pieces*, each of them while backward still computes the next: an AdamW parameter is one piece; of the matrices, as many
consecutive ones as there are ranks, one for each. Saved states know neither padding nor ranks: those of AdamW,
concatenated over ranks, are the whole state of a parameter; those of Muon are each a matrix's.

Not here: the two updates (`updates.py`), what changes from step to step, and how rates depend on batch and horizon
(`schedule.py`).
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nanochat.common import UserError
from nanochat.model import fp8
from nanochat.model.gpt import GPT
from nanochat.model.products import WeightCopy, on_gradient
from nanochat.training.updates import adamw_update, muon_update

# Learning rates and weight decay of the public nanochat's d12, where they were tuned
MATRIX_LR = 0.02
MATRIX_WEIGHT_DECAY = 0.28
REFERENCE_WIDTH = 768  # of d12; the rates of the embeddings and the head change with the width

MIN_COMPILED_NUMEL = 1 << 14  # smaller parameters are updated eagerly: each size would be compiled anew
CPU_CHUNK = 1 << 17  # elements per pass of AdamW on a CPU, so that successive passes find them in the cache
TABLE_EPS = 1e-10  # of AdamW, for the embeddings and the head
SCALAR_EPS = 1e-6  # for the scalars, whose first gradients are only rounding errors, of up to 1e-9


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
    """Parameters updated together, in `values` along dim 0: an AdamW parameter flattened, or matrices, number i at
    `slots[i]`. `grads` is of the same layout, and `grad_views` are the parameters' parts of it; both None for AdamW,
    whose gradients autograd allocates at each step. `copies` are those of `values` that products read, all together;
    None where there are none."""

    names: list[str]
    group: Group
    params: list[nn.Parameter]
    slots: list[int]
    values: Tensor
    grads: Tensor | None
    grad_views: list[Tensor | None]
    copies: WeightCopy | None
    own: slice  # this rank's rows
    state: dict[str, Tensor]
    transfers: list["_Transfer | None"]  # of the pieces
    num_missing: list[int]  # gradients of each piece that the last backward has yet to make; 0 outside of it

    @property
    def is_muon(self) -> bool:
        return self.group.kind == "muon"


@dataclass
class _Transfer:
    """A tensor that is complete after `wait`, and what the collective reads until then, which must stay alive."""

    arriving: Tensor
    source: Tensor
    work: dist.Work

    def wait(self) -> Tensor:
        self.work.wait()
        return self.arriving


class MuonAdamW:
    """Applies `muon_update` and `adamw_update` to groups of parameters, sharded over `world_size` ranks.

    Build it last, as it moves the storage of the parameters. Gradients are *summed* over ranks, so each rank's loss
    must already be divided by the token count of all ranks. They travel as `wire_dtype` and are summed in float32. The
    matrix products of Muon are in `muon_dtype`. With a `copy_dtype`, `copies` has for each parameter that a product
    reads its `WeightCopy`, up to date after every step; backward must then add the gradients of the matrices to that.
    With `use_fp8`, the copies of matrices whose dimensions allow it are in 8 bits.
    """

    def __init__(
        self, groups: list[Group], *, rank: int = 0, world_size: int = 1, muon_dtype: torch.dtype = torch.float32,
        wire_dtype: torch.dtype = torch.float32, copy_dtype: torch.dtype | None = None, use_fp8: bool = False,
    ):  # fmt: skip
        self.groups = groups
        self.rank, self.world_size, self.muon_dtype = rank, world_size, muon_dtype
        self.wire_dtype, self.copy_dtype, self.use_fp8 = wire_dtype, copy_dtype, use_fp8
        self.num_steps = 0
        self.copies: dict[str, WeightCopy] = {}
        self._buckets = [bucket for group in groups for bucket in self._make_buckets(group)]
        if world_size > 1:
            self._listen()
        functions = adamw_update, muon_update, _quantise
        if any(bucket.values.is_cuda for bucket in self._buckets):
            functions = (torch.compile(function, dynamic=False) for function in functions)
        self._adamw_update, self._muon_update, self._quantise = functions
        self._refresh_copies()

    def zero_grad(self) -> None:
        for bucket in self._buckets:
            if bucket.grads is not None:
                bucket.grads.zero_()
            for p, view in zip(bucket.params, bucket.grad_views, strict=True):
                p.grad = view

    def expect_last_backward(self) -> None:
        """Say that the next backward is the last before `step`: each piece is sent as soon as its gradients are there.
        Every parameter may get only one gradient in it."""
        for bucket in self._buckets:
            for i in range(len(bucket.params)):
                bucket.num_missing[self._piece_of(bucket, i)] += 1

    @torch.no_grad()
    def step(self) -> None:
        """One step of every group from the parameters' gradients. A missing gradient counts as zero."""
        self.num_steps += 1
        for bucket in self._buckets:
            bucket.num_missing = [0] * len(bucket.num_missing)
            for piece, transfer in enumerate(bucket.transfers):
                if transfer is None and self.world_size > 1:
                    self._send(bucket, piece)
        leaving = []  # keeps the tensors of the collectives alive until they are waited for
        for bucket in self._buckets:
            self._update(bucket, self._receive(bucket))
            if self.world_size > 1:
                leaving.append(self._start_gather(bucket))
        for transfer in leaving:
            transfer.wait()
        self._refresh_copies()

    # --- the state ---

    def state_dict(self) -> dict[str, Tensor]:
        """This rank's share of the state, "parameter.state": float32, without padding; and "num_steps"."""
        state = {"num_steps": torch.tensor(self.num_steps)}
        for bucket in self._buckets:
            for key, value in bucket.state.items():
                if bucket.is_muon:
                    state |= {f"{name}.{key}": value[row] for name, row in self._own_rows(bucket)}
                else:
                    rows = max(0, bucket.params[0].numel() - bucket.own.start)
                    state[f"{bucket.names[0]}.{key}"] = value[:rows]
        return state

    def load_state_dict(self, shards: list[dict[str, Tensor]]) -> None:
        """Restore the state saved by any number of ranks: `shards[r]` is what `state_dict` gave on rank r.

        Raises `UserError`, leaving the state unchanged, when it is not the state of exactly these parameters.
        """
        saved = self._joined(shards)
        shapes: dict[str, tuple[int, ...]] = {"num_steps": ()}
        for bucket in self._buckets:
            for name, p in zip(bucket.names, bucket.params, strict=True):
                for key, value in bucket.state.items():
                    shapes[f"{name}.{key}"] = tuple(value.shape[1:]) if bucket.is_muon else (p.numel(),)
        found = {name: tuple(value.shape) for name, value in saved.items()}
        if different := {name for name in found.keys() | shapes.keys() if found.get(name) != shapes.get(name)}:
            raise UserError(
                f"the optimizer state in the checkpoint is of another model: {', '.join(sorted(different)[:5])} "
                f"differ; use the checkpoint with the model it was saved with"
            )
        for bucket in self._buckets:
            for key, value in bucket.state.items():
                if bucket.is_muon:
                    for name, row in self._own_rows(bucket):
                        value[row].copy_(saved[f"{name}.{key}"])
                else:
                    own = saved[f"{bucket.names[0]}.{key}"][bucket.own]
                    value[: own.size(0)].copy_(own)
        self.num_steps = int(saved["num_steps"])

    def _joined(self, shards: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """The whole state by name, from the shards of all ranks."""
        parts = defaultdict(list)
        for shard in shards:
            for name, value in shard.items():
                parts[name].append(value)
        saved = {name: torch.cat(values) if values[0].ndim else values[0] for name, values in parts.items()}
        for bucket in filter(lambda bucket: bucket.is_muon, self._buckets):
            for key in bucket.state:  # until November 2026, the stack of all matrices had the name of the first
                stack = saved.get(f"{bucket.names[0]}.{key}")
                if stack is not None and stack.ndim == 3 and stack.size(0) == len(bucket.names):
                    saved |= {f"{name}.{key}": row for name, row in zip(bucket.names, stack, strict=True)}
        return saved

    def _own_rows(self, bucket: _Bucket) -> Iterator[tuple[str, int]]:
        """Name and row, within this rank's rows, of each matrix that it updates."""
        for name, slot in zip(bucket.names, bucket.slots, strict=True):
            if bucket.own.start <= slot < bucket.own.stop:
                yield name, slot - bucket.own.start

    # --- buckets ---

    def _make_buckets(self, group: Group) -> Iterator[_Bucket]:
        """Move the parameters into storage padded to whole shards, and allocate this rank's state."""
        is_muon = group.kind == "muon"
        alike: dict[torch.Size | str, dict[str, nn.Parameter]] = {}
        for name, p in group.params.items():
            alike.setdefault(p.shape if is_muon else name, {})[name] = p
        for named in alike.values():
            names, params = list(named), list(named.values())
            rows = len(params) if is_muon else params[0].numel()
            share = -(-rows // self.world_size)
            slots = [i % self.world_size * share + i // self.world_size for i in range(len(params))]
            shape = params[0].shape if is_muon else ()
            values = params[0].data.new_zeros(self.world_size * share, *shape)
            grads = torch.zeros_like(values) if is_muon else None
            is_copied = self.copy_dtype is not None and (is_muon or group.name == "lm_head")
            copies = self._make_copies(values, grads) if is_copied else None
            grad_views = []
            for name, p, slot in zip(names, params, slots, strict=True):
                place = slot if is_muon else slice(0, rows)
                grad_views.append(grads[place] if is_muon else None)
                values[place] = p.data if is_muon else p.data.flatten()
                p.data, p.grad = values[place].view(p.shape), grad_views[-1]
                if is_copied and is_muon:
                    self.copies[name] = copies.of_matrix(slot)
                elif is_copied:
                    self.copies[name] = WeightCopy(copies.values[:rows].view(p.shape), None)
            own = slice(self.rank * share, (self.rank + 1) * share)
            keys = ("momentum_buffer",) if is_muon else ("exp_avg", "exp_avg_sq")
            state = {key: torch.zeros_like(values[own], dtype=torch.float32) for key in keys}
            if is_muon:
                state["row_variance"] = torch.zeros_like(values[own][..., :1], dtype=torch.float32)
            num_pieces = share if is_muon else 1
            yield _Bucket(
                names, group, params, slots, values, grads, grad_views, copies, own, state,
                [None] * num_pieces, [0] * num_pieces,
            )  # fmt: skip

    def _make_copies(self, values: Tensor, grads: Tensor | None) -> WeightCopy:
        if self.use_fp8 and values.ndim == 3 and not any(size % fp8.MULTIPLE for size in values.shape[1:]):
            number, rows, columns = values.shape
            copy, transposed = (
                torch.empty(number, *shape, dtype=fp8.E4M3, device=values.device)
                for shape in ((rows, columns), (columns, rows))
            )
            scale = values.new_empty(number, 4)[:, 0]  # at multiples of 16 bytes, or the compiler avoids wide loads
            return WeightCopy(copy, grads, transposed, scale)
        return WeightCopy(torch.empty_like(values, dtype=self.copy_dtype), grads)

    @torch.no_grad()
    def _refresh_copies(self) -> None:
        for bucket in self._buckets:
            copies = bucket.copies
            if copies is not None and copies.scale is not None:
                self._quantise(bucket.values, copies.values, copies.transposed, copies.scale)
            elif copies is not None:
                copies.values.copy_(bucket.values)

    def _gradient(self, bucket: _Bucket) -> Tensor:
        """The bucket's gradient in the layout of its `values`; zero for parameters without one."""
        if bucket.grads is not None:
            for p, view in zip(bucket.params, bucket.grad_views, strict=True):
                if p.grad is None and bucket.copies is None:  # `model.zero_grad()` has removed the view
                    view.zero_()
                elif p.grad is not None and p.grad is not view:
                    view.copy_(p.grad)
            return bucket.grads
        (p,) = bucket.params
        grad = (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
        num_padding = bucket.values.size(0) - p.numel()
        return torch.cat((grad, grad.new_zeros(num_padding))) if num_padding else grad

    # --- communication ---

    def _piece_of(self, bucket: _Bucket, i: int) -> int:
        """The piece that parameter number `i` of the bucket is in."""
        return i // self.world_size if bucket.is_muon else 0

    def _listen(self) -> None:
        """Have `_note_gradient` called whenever backward has added to the gradient of a parameter."""
        for bucket in self._buckets:
            for i, (name, p) in enumerate(zip(bucket.names, bucket.params, strict=True)):
                note = partial(self._note_gradient, bucket, self._piece_of(bucket, i))
                if name in self.copies and bucket.is_muon:
                    on_gradient(self.copies[name].grad, note)
                else:
                    p.register_post_accumulate_grad_hook(note)

    def _note_gradient(self, bucket: _Bucket, piece: int, p: nn.Parameter | None = None) -> None:
        if bucket.num_missing[piece]:
            bucket.num_missing[piece] -= 1
            if not bucket.num_missing[piece]:
                self._send(bucket, piece)

    @torch.no_grad()
    def _send(self, bucket: _Bucket, piece: int) -> None:
        """Start to send each rank its rows of a piece of the gradient; those of this rank arrive from all."""
        grads = self._gradient(bucket).unflatten(0, (self.world_size, -1))
        source = (grads[:, piece] if bucket.is_muon else grads).to(self.wire_dtype).contiguous()
        arriving = torch.empty_like(source)  # (world_size, ...)
        work = dist.all_to_all_single(arriving, source, async_op=True)
        bucket.transfers[piece] = _Transfer(arriving, source, work)

    def _receive(self, bucket: _Bucket) -> Tensor:
        """The gradient of this rank's rows, summed over all ranks."""
        if self.world_size == 1:
            return self._gradient(bucket)
        arrived = [transfer.wait().sum(0, dtype=torch.float32) for transfer in bucket.transfers]
        bucket.transfers = [None] * len(arrived)
        return torch.stack(arrived) if bucket.is_muon else arrived[0]

    def _start_gather(self, bucket: _Bucket) -> _Transfer:
        """Start to exchange the updated rows; those of all ranks arrive in `bucket.values`."""
        own = bucket.values[bucket.own].clone()
        return _Transfer(bucket.values, own, dist.all_gather_into_tensor(bucket.values, own, async_op=True))

    # --- updates ---

    def _update(self, bucket: _Bucket, grad: Tensor) -> None:
        group, values, state = bucket.group, bucket.values[bucket.own], bucket.state
        if bucket.is_muon:
            numbers = {name: getattr(group, name) for name in ("lr", "momentum", "beta2", "weight_decay")}
            self._muon_update(values, grad, **state, **self._as_inputs(values, **numbers), dtype=self.muon_dtype)
            return
        beta1, beta2 = group.betas
        numbers = self._as_inputs(
            values, step_size=group.lr / (1 - beta1**self.num_steps), beta1=beta1, beta2=beta2,
            correction2=math.sqrt(1 - beta2**self.num_steps), eps=group.eps, decay=group.lr * group.weight_decay,
        )  # fmt: skip
        update = adamw_update if values.numel() < MIN_COMPILED_NUMEL else self._adamw_update
        tensors = (values, grad, state["exp_avg"], state["exp_avg_sq"])
        chunk = max(1, values.numel()) if values.is_cuda else CPU_CHUNK
        for pieces in zip(*(t.split(chunk) for t in tensors), strict=True):
            update(*pieces, **numbers)

    @staticmethod
    def _as_inputs(values: Tensor, **numbers: float) -> dict[str, Tensor | float]:
        """The numbers of a step in the form the compiled updates need: 0-d tensors on the GPU.

        A Python number would be recompiled for each new value. What is computed from a CPU tensor (1 - decay) would
        stay on the CPU, and its address would be passed to a Triton kernel.
        """
        if not values.is_cuda:
            return numbers
        on_device = torch.tensor(list(numbers.values())).to(values.device, non_blocking=True)
        return dict(zip(numbers, on_device.unbind(), strict=True))


def _quantise(matrices: Tensor, copy: Tensor, transposed: Tensor, scale: Tensor) -> None:
    """Write `matrices` (number, rows, columns) in 8 bits, each with a scale of its own."""
    rounded, scales = fp8.quantise(matrices, fp8.E4M3, dims=(1, 2))
    copy.copy_(rounded)
    transposed.copy_(rounded.mT)
    scale.copy_(scales.flatten())
