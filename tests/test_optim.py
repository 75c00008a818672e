"""Updates against references in float64; the sharded optimizer against one process, in one process and over gloo."""

import math
import weakref

import pytest
import torch
from fake_cuda import fake_cuda
from ranks import run_ranks
from torch import nn

from nanochat.common import UserError
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.training import optim
from nanochat.training.optim import Group, MuonAdamW, adamw_update, muon_update, parameter_groups, polar_express

ROWS_PER_STEP = 4  # that the ranks share
MATRICES = {"a": (6, 10), "b": (6, 10), "c": (6, 10), "d": (10, 6), "e": (1, 1), "f": (7, 7)}
VECTORS = {"table": (403, 7), "scalar": (1,), "odd": (5,), "zero_d": ()}


def make_groups(dtype=torch.float32, matrices=MATRICES, vectors=VECTORS) -> list[Group]:
    """Two AdamW groups and a Muon group of odd shapes, filled the same each time."""
    generator = torch.Generator().manual_seed(0)

    def draw(shapes):
        drawn = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
        return {name: nn.Parameter(data) for name, data in drawn.items()}

    params = draw(vectors)
    tables = {name: params.pop(name) for name in list(params)[:1]}
    groups = [
        Group("tables", "adamw", tables, 0.1, 0.01, (0.8, 0.995)),
        Group("scalars", "adamw", params, 0.02, 0.0, (0.9, 0.95)),
        Group("matrices", "muon", draw(matrices), 0.02, 0.3),
    ]
    return [group for group in groups if group.params]


def named_params(groups) -> dict[str, nn.Parameter]:
    return {name: p for group in groups for name, p in group.params.items()}


def add_gradients(groups, step: int, rows) -> None:
    """Add to each gradient the part that each of `rows` of this step has in it: multiples of 1/64 below 1/2, whose
    sums are exact in bfloat16 too, in any order."""
    for number, (name, p) in enumerate(named_params(groups).items()):
        for row in rows:
            generator = torch.Generator().manual_seed(1000 * step + 100 * row + number)
            grad = (8 * torch.randn(p.shape, generator=generator)).round().clamp(-31, 31).to(p.dtype) / 64
            if name == "odd" and step == 1:
                continue  # a parameter that is not used in every step
            p.grad = grad if p.grad is None else p.grad.add_(grad)


def assert_equal(tensors, expected):
    """Bit for bit, of all names."""
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in tensors.items())


def run_steps(groups, optimizer, steps, rows):
    """Train for `steps` with the part of each step's gradients that `rows` have; the parameters after."""
    for step in steps:
        add_gradients(groups, step, rows)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in named_params(groups).items()}


def train(rank=0, world_size=1, num_steps=4, dtype=torch.float32):
    """The parameters after some steps, and the optimizer."""
    groups = make_groups(dtype)
    optimizer = MuonAdamW(groups, rank=rank, world_size=world_size)
    return run_steps(groups, optimizer, range(num_steps), range(rank, ROWS_PER_STEP, world_size)), optimizer


# --- AdamW ---
@pytest.mark.parametrize("grad_scale", [1.0, 1e-9, 1e-14])
def test_adamw_equals_torch_in_float64_also_for_tiny_gradients(grad_scale):
    generator = torch.Generator().manual_seed(0)
    lr, betas, eps, weight_decay = 0.03, (0.8, 0.95), 1e-10, 0.1
    ours = torch.randn(50, generator=generator, dtype=torch.float64)
    theirs = nn.Parameter(ours.clone())
    exp_avg, exp_avg_sq = torch.zeros_like(ours), torch.zeros_like(ours)
    reference = torch.optim.AdamW([theirs], lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, foreach=False)
    for step in range(1, 101):
        grad = grad_scale * torch.randn(50, generator=generator, dtype=torch.float64)
        adamw_update(
            ours, grad, exp_avg, exp_avg_sq, step_size=lr / (1 - betas[0] ** step), beta1=betas[0], beta2=betas[1],
            correction2=math.sqrt(1 - betas[1] ** step), eps=eps, decay=lr * weight_decay,
        )  # fmt: skip
        theirs.grad = grad
        reference.step()
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("grad_scale", [1.0, 1e-9])
def test_the_optimizer_equals_torch_adamw_over_100_steps(grad_scale):
    groups = make_groups(matrices={})
    wanted = {name: nn.Parameter(p.detach().double()) for name, p in named_params(groups).items()}
    reference = torch.optim.AdamW(
        [{"params": [wanted[name] for name in g.params], "lr": g.lr, "betas": g.betas, "weight_decay": g.weight_decay}
         for g in groups],
        eps=groups[0].eps,
    )  # fmt: skip
    optimizer = MuonAdamW(groups)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        for name, p in named_params(groups).items():
            p.grad = grad_scale * torch.randn(p.shape, generator=generator)
            wanted[name].grad = p.grad.double()
        optimizer.step()
        reference.step()
    for name, p in named_params(groups).items():
        torch.testing.assert_close(p.double(), wanted[name], rtol=1e-4, atol=1e-5, check_dtype=True)


def test_the_cpu_pieces_of_a_long_parameter_change_nothing(monkeypatch):
    whole, _ = train()
    monkeypatch.setattr(optim, "CPU_CHUNK", 100)
    assert_equal(train()[0], whole)


# --- Muon ---
def assert_in_band(orthogonalised):
    values = torch.linalg.svdvals(orthogonalised.float())
    assert values.min() > 0.84
    assert values.max() < 1.15


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (8, 12), (1, 9), (3, 1)])
def test_orthogonalised_singular_values_lie_in_the_stated_band(dtype, shape):
    x = torch.randn(5, *shape, generator=torch.Generator().manual_seed(0))
    x *= torch.tensor([1.0, 0.01, 100.0, 1.0, 1.0])[:, None, None]
    assert_in_band(polar_express(x.to(dtype)))
    assert not polar_express(torch.zeros(2, *shape, dtype=dtype)).any()  # nor is a zero matrix NaN


def test_the_stated_band_holds_down_to_a_thousandth_of_the_norm():
    small = torch.logspace(-3, -0.2, 300, dtype=torch.float64)
    x = torch.diag_embed(torch.stack((small, (1 - small**2).sqrt()), dim=1)).float()
    assert_in_band(polar_express(x))


@pytest.mark.parametrize("shape", [(4, 6, 10), (2, 10, 6)])
def test_muon_equals_the_same_formulas_in_float64(shape):
    """One matrix at a time, the polar factor from an SVD: equal up to the band of the orthogonalisation."""
    generator = torch.Generator().manual_seed(0)
    p = torch.randn(shape, generator=generator)
    wanted, (K, m, n) = p.double(), shape
    momentum_buffer, row_variance = torch.zeros(shape), torch.zeros(K, m, 1)
    lr, momentum, beta2, weight_decay = 0.02, 0.9, 0.9, 0.3
    average, variance = torch.zeros(shape, dtype=torch.float64), torch.zeros(K, m, dtype=torch.float64)
    for _ in range(5):
        grad = torch.randn(shape, generator=generator)
        before = p.clone()
        muon_update(
            p, grad, momentum_buffer, row_variance,
            lr=lr, momentum=momentum, beta2=beta2, weight_decay=weight_decay, dtype=torch.float32,
        )  # fmt: skip
        average = momentum * average + (1 - momentum) * grad.double()
        for k in range(K):
            x = (1 - momentum) * grad[k].double() + momentum * average[k]
            x = x / x.norm(dim=1, keepdim=True)
            update = polar_express(x)
            variance[k] = beta2 * variance[k] + (1 - beta2) * update.square().mean(dim=1)
            update = update / variance[k].sqrt()[:, None]
            update *= math.sqrt(min(m, n)) / update.norm()
            agrees = (update * before[k].double() > 0).double()
            wanted[k] -= lr * (math.sqrt(max(1, m / n)) * update + weight_decay * agrees * before[k].double())
    torch.testing.assert_close(p.double(), wanted, rtol=1e-4, atol=1e-5)


def test_muon_updates_have_one_size_whatever_the_gradients_size():
    grad = torch.randn(3, 8, 20, generator=torch.Generator().manual_seed(0))
    updates, rates = [], {"lr": 0.1, "momentum": 0.9, "beta2": 0.9, "weight_decay": 0.0}
    for scale in (1.0, 1e-3, 1e4):
        p, buffer, variance = torch.zeros(3, 8, 20), torch.zeros(3, 8, 20), torch.zeros(3, 8, 1)
        muon_update(p, scale * grad, buffer, variance, **rates, dtype=torch.float32)
        updates.append(p)
        assert p.norm(dim=(1, 2)) == pytest.approx([0.1 * math.sqrt(8)] * 3, rel=1e-4)
        torch.testing.assert_close(p, updates[0], rtol=1e-3, atol=1e-5)


# --- precision ---
def test_bfloat16_parameters_get_the_float32_step_rounded_once_and_have_float32_state():
    for shapes in ({"matrices": {}, "vectors": {"t": (30, 4)}}, {"vectors": {}}):
        wide = make_groups(torch.bfloat16, **shapes)
        params = named_params(wide)
        copies = {name: nn.Parameter(p.detach().float()) for name, p in params.items()}
        narrow = [Group(g.name, g.kind, {n: copies[n] for n in g.params}, g.lr, g.weight_decay, g.betas) for g in wide]
        optimizers = MuonAdamW(wide), MuonAdamW(narrow)
        generator = torch.Generator().manual_seed(3)
        for name in params:
            grad = torch.randn(params[name].shape, generator=generator).bfloat16()
            for p in (params[name], copies[name]):
                p.grad = grad.to(p.dtype) if p.grad is None else p.grad.copy_(grad)
        for optimizer in optimizers:
            optimizer.step()
        for name in params:
            assert torch.equal(params[name], copies[name].bfloat16()), name
        for key, value in optimizers[0].state_dict().items():
            assert value.dtype == torch.float32 or key == "num_steps"
            assert torch.equal(value, optimizers[1].state_dict()[key]), key


# --- parameters and gradients ---
def test_parameters_keep_their_values_when_they_move_into_buckets():
    groups = make_groups()
    before = {name: p.detach().clone() for name, p in named_params(groups).items()}
    for world_size in (1, 2, 3, 4, 8):
        MuonAdamW(groups, rank=world_size - 1, world_size=world_size)
        assert_equal(named_params(groups), before)


def test_gradients_that_backward_makes_are_found_after_any_zero_grad():
    """`p.grad = None`, the usual `model.zero_grad()`, must not cut the matrices off from their stacked gradient."""
    groups = make_groups()
    optimizer = MuonAdamW(groups)
    for step in range(4):
        for p in named_params(groups).values():
            p.grad = None
        add_gradients(groups, step, range(ROWS_PER_STEP))
        optimizer.step()
        if step % 2:
            optimizer.zero_grad()
    assert_equal(named_params(groups), train()[0])


def test_zero_grad_clears_every_gradient_and_a_missing_one_counts_as_zero():
    results = []
    for missing in (False, True):
        groups = make_groups()
        optimizer = MuonAdamW(groups)
        add_gradients(groups, 0, range(ROWS_PER_STEP))
        optimizer.step()
        optimizer.zero_grad()
        assert all(p.grad is None or not p.grad.any() for p in named_params(groups).values())
        for p in named_params(groups).values():
            p.grad = None if missing else torch.zeros_like(p)
        optimizer.step()
        results.append(named_params(groups))
    assert_equal(*results)


def test_every_model_parameter_is_in_one_group_with_the_recipes_rates():
    for derive in (GPTConfig.from_depth, GPTConfig.october_2025):
        model = build_model(derive(4, vocab_size=300), device="meta")
        groups = {group.name: group for group in parameter_groups(model)}
        names = [name for group in groups.values() for name in group.params]
        assert sorted(names) == sorted(name for name, _ in model.named_parameters())
        width = math.sqrt(768 / model.config.n_embd)
        assert groups["lm_head"].lr == pytest.approx(0.008 * width)
        assert groups["wte"].lr == pytest.approx(0.3 * width)
        assert groups["matrices"].lr == pytest.approx(0.02)
        assert groups["matrices"].kind == "muon"
        assert all(p.ndim == 2 for p in groups["matrices"].params.values())


# --- several ranks ---
def train_rank(rank, world_size):
    results = {}
    for dtype in (torch.float32, torch.bfloat16):
        params, optimizer = train(rank, world_size, dtype=dtype)
        results[dtype] = params, {name: value.clone() for name, value in optimizer.state_dict().items()}
    return results


def concatenate(shards):
    names = [name for name in shards[0] if name != "num_steps"]
    return {name: torch.cat([shard[name] for shard in shards]) for name in names}


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks_equal_one_process_and_each_other(world_size, tmp_path):
    results = run_ranks(train_rank, world_size, tmp_path / "ranks")
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 0.01)):
        wanted, optimizer = train(dtype=dtype)
        for name in wanted:
            first = results[0][dtype][0][name]
            torch.testing.assert_close(first, wanted[name], rtol=tolerance, atol=tolerance)
            assert all(torch.equal(result[dtype][0][name], first) for result in results)
        state = optimizer.state_dict()
        whole = concatenate([result[dtype][1] for result in results])
        for name, value in whole.items():
            torch.testing.assert_close(value, state[name], rtol=tolerance, atol=tolerance)


def test_a_group_of_one_rank_is_bit_equal_to_none(tmp_path):
    ((_, (params, state)), _) = run_ranks(train_rank, 1, tmp_path / "ranks", group_of_one=True)[0].items()
    wanted, optimizer = train()
    assert_equal(params, wanted)
    assert_equal(state, optimizer.state_dict())


class LateWork:
    """A collective that touches its tensors only when it is waited for; they must still be there."""

    def __init__(self, output, source, run):
        self.output, self.source, self.run = weakref.ref(output), weakref.ref(source), run

    def wait(self):
        output, source = self.output(), self.source()
        assert output is not None, "the output of a collective was dropped"
        assert source is not None, "the input of a collective was dropped"
        self.run(output, source)


def test_collectives_tensors_live_until_they_are_waited_for(monkeypatch):
    """Rank 0 of 2, the other with zero gradients: its own rows must change as they do in one process."""

    def late(run):
        def collective(output, source, async_op):
            assert async_op
            return LateWork(output, source, run)

        return collective

    def first_half(t):
        return t[: t.size(0) // 2]

    monkeypatch.setattr(optim.dist, "reduce_scatter_tensor", late(lambda own, full: own.copy_(first_half(full))))
    monkeypatch.setattr(optim.dist, "all_gather_into_tensor", late(lambda full, own: first_half(full).copy_(own)))
    wanted, _ = train(num_steps=1)
    groups = make_groups()
    params = run_steps(groups, MuonAdamW(groups, rank=0, world_size=2), [0], range(ROWS_PER_STEP))
    for name in ("table", "odd", "scalar"):
        rows = -(-wanted[name].numel() // 2)
        torch.testing.assert_close(params[name].flatten()[:rows], wanted[name].flatten()[:rows])
    torch.testing.assert_close(params["b"], wanted["b"])


def state_bytes(optimizer) -> int:
    return sum(v.numel() * v.element_size() for name, v in optimizer.state_dict().items() if name != "num_steps")


@pytest.mark.parametrize("depth", [4, 12, 20, 24])
@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_no_rank_holds_more_than_its_share_of_the_state(depth, world_size):
    def held(rank, world_size):
        model = build_model(GPTConfig.from_depth(depth, vocab_size=32768), device="meta")
        return state_bytes(MuonAdamW(parameter_groups(model), rank=rank, world_size=world_size))

    shares, whole = [held(rank, world_size) for rank in range(world_size)], held(0, 1)
    assert sum(shares) == whole
    assert max(shares) <= (1 / world_size + 0.05) * whole


# --- saving the state ---
@pytest.mark.parametrize("before", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("after", [1, 2, 4, 5])
def test_state_of_any_number_of_ranks_loads_into_any_other(before, after):
    whole = train()[1].state_dict()
    shards = [whole]
    for world_size in (before, after):
        optimizers = [MuonAdamW(make_groups(), rank=rank, world_size=world_size) for rank in range(world_size)]
        for optimizer in optimizers:
            optimizer.load_state_dict(shards)
        shards = [optimizer.state_dict() for optimizer in optimizers]
    assert all(int(shard["num_steps"]) == 4 for shard in shards)
    assert all(torch.equal(value, whole[name]) for name, value in concatenate(shards).items())


def test_training_goes_on_bit_equal_from_a_loaded_state():
    wanted, _ = train(num_steps=6)
    halfway, optimizer = train(num_steps=3)
    groups = make_groups()
    for name, p in named_params(groups).items():
        p.data.copy_(halfway[name])
    resumed = MuonAdamW(groups)
    resumed.load_state_dict([optimizer.state_dict()])
    assert_equal(run_steps(groups, resumed, range(3, 6), range(ROWS_PER_STEP)), wanted)


@pytest.mark.parametrize("change", [
    {"matrices": {**MATRICES, "g": (6, 10)}}, {"matrices": {name: MATRICES[name] for name in "abdef"}},
    {"matrices": {**MATRICES, "d": (6, 10)}}, {"matrices": {**MATRICES, "f": (7, 8)}},
    {"vectors": {**VECTORS, "table": (402, 7)}}, {"vectors": {**VECTORS, "table": (404, 7)}},
    {"vectors": {**VECTORS, "odd": (6,)}}, {"vectors": {**VECTORS, "other": (2,)}},
    {"vectors": {name: VECTORS[name] for name in ("table", "odd")}},
], ids=str)  # fmt: skip
@pytest.mark.parametrize("world_size", [1, 2])
def test_the_state_of_another_model_is_refused_and_nothing_taken_over(change, world_size):
    saved = [MuonAdamW(make_groups(**change), rank=r, world_size=world_size).state_dict() for r in range(world_size)]
    _, optimizer = train()
    before = {name: value.clone() for name, value in optimizer.state_dict().items()}
    with pytest.raises(UserError, match="model"):
        optimizer.load_state_dict(saved)
    assert_equal(optimizer.state_dict(), before)


@pytest.mark.parametrize(("rank", "world_size"), [(0, 1), (1, 2)])
def test_every_operation_of_an_update_stays_on_the_gpu(monkeypatch, rank, world_size):
    """The first run on a GPU ended here: 1 - decay was a CPU tensor, handed to a kernel as an address."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    with fake_cuda() as watch:
        groups = make_groups()
        for group in groups:
            dtype = torch.bfloat16 if group.name == "tables" else torch.float32
            group.params = {
                name: nn.Parameter(torch.empty(p.shape, device="cuda", dtype=dtype)) for name, p in group.params.items()
            }
        optimizer = MuonAdamW(groups, rank=rank, world_size=world_size, muon_dtype=torch.bfloat16)
        optimizer.num_steps, watch.num_operations = 1, 0
        watch.off_device.clear()  # the CPU tensors that the groups were made of
        for bucket in optimizer._buckets:
            optimizer._update(bucket, torch.empty_like(bucket.values[bucket.own]))
        assert watch.num_operations > 100
        assert watch.off_device == []
        torch.empty(4, device="cuda").mul_(1 - torch.tensor(0.5))  # which the watch finds
    assert watch.off_device == ["aten.rsub.Scalar: ['cpu'] -> ['cpu']", "aten.mul_.Tensor: ['cpu', 'cuda'] -> ['cuda']"]
