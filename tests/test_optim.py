"""The optimizer against PyTorch's, and sharded over gloo ranks against one process."""

import math
import weakref

import pytest
import torch
from fake_cuda import fake_cuda
from ranks import run_ranks
from torch import nn

from nanochat.common import Runtime, UserError
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.training import optim
from nanochat.training.loop import make_optimizer
from nanochat.training.optim import Group, MuonAdamW, parameter_groups
from nanochat.training.updates import adamw_update, muon_update

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


def join(shards):
    """The whole state: a flat one is cut over the ranks, a matrix is on one of them."""
    names = {name for shard in shards for name in shard} - {"num_steps"}
    return {name: torch.cat([shard[name] for shard in shards if name in shard]) for name in names}


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
        whole = join([result[dtype][1] for result in results])
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

    def arrive(received, sent):  # from rank 0 its own rows, from rank 1 nothing
        received.zero_()[0] = sent[0]

    monkeypatch.setattr(optim.dist, "all_to_all_single", late(arrive))
    monkeypatch.setattr(optim.dist, "all_gather_into_tensor", late(lambda full, own: first_half(full).copy_(own)))
    wanted, _ = train(num_steps=1)
    groups = make_groups()
    params = run_steps(groups, MuonAdamW(groups, rank=0, world_size=2), [0], range(ROWS_PER_STEP))
    for name in ("table", "odd", "scalar"):
        rows = -(-wanted[name].numel() // 2)
        torch.testing.assert_close(params[name].flatten()[:rows], wanted[name].flatten()[:rows])
    torch.testing.assert_close(params["a"], wanted["a"])
    torch.testing.assert_close(params["c"], wanted["c"])


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


def train_overlapping(rank, world_size, overlaps, device, dtype):
    """Parameters after two steps of a small model, and in which order pieces were sent and backward came to its end."""
    shape = {"vocab_size": 64, "sequence_len": 16, "head_dim": 16}
    model = build_model(GPTConfig.from_depth(3, **shape), generator=torch.Generator().manual_seed(0))
    model.compute_dtype = dtype
    optimizer = make_optimizer(model, Runtime(rank, rank, world_size, torch.device(device), dtype))
    order, send = [], optimizer._send
    optimizer._send = lambda bucket, piece: (order.append(f"{bucket.names[0]} {piece}"), send(bucket, piece))
    model.wte.weight.register_post_accumulate_grad_hook(lambda p: order.append("the end of backward"))
    for step in range(2):
        idx = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(10 * step + rank))
        if overlaps:
            optimizer.expect_last_backward()
        model(idx, idx).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, order


@pytest.mark.parametrize(("device", "dtype"), [("cpu", torch.float32), ("cuda", torch.bfloat16)])
def test_gradients_travel_while_backward_still_runs_and_no_sum_changes(device, dtype, tmp_path):
    """With the optimizer as made for a CPU, and as for a GPU: with copies of the weights, and 16 bits on the wire."""
    early, late = (
        run_ranks(train_overlapping, 2, tmp_path / str(overlaps), overlaps, device, dtype) for overlaps in (True, False)
    )
    for (params, order), (wanted, late_order) in zip(early, late, strict=True):
        assert_equal(params, wanted)
        end = len(order) // 2
        assert order[:end] == order[end:]
        assert sorted(order) == sorted(late_order)
        assert late_order[0] == "the end of backward"
        assert order[0] == "lm_head.weight 0"
        sent = order[: order.index("the end of backward")]
        matrices = [name for name in order[:end] if name.startswith("h.")]
        assert matrices[0] == "h.0.mlp.c_proj.weight 1"  # that of the last layer
        assert set(matrices) <= set(sent)
    assert early[0][1] == early[1][1]  # collectives meet only in one order


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
    assert all(torch.equal(value, whole[name]) for name, value in join(shards).items())


def test_a_state_of_stacked_matrices_as_saved_before_still_loads():
    whole = train()[1].state_dict()
    old = {name: value for name, value in whole.items() if "momentum" not in name and "variance" not in name}
    for alike in ("abc", "d", "e", "f"):
        for key in ("momentum_buffer", "row_variance"):
            old[f"{alike[0]}.{key}"] = torch.stack([whole[f"{name}.{key}"] for name in alike])
    cut = {name: (value[:2], value[2:]) if value.ndim else (value, value) for name, value in old.items()}
    optimizer = MuonAdamW(make_groups())
    optimizer.load_state_dict([{name: parts[rank] for name, parts in cut.items()} for rank in (0, 1)])
    assert_equal(optimizer.state_dict(), whole)


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


def test_the_updates_are_compiled_once_for_each_shape(monkeypatch):
    """PyTorch gives up after eight variants of a function, and runs it eagerly without a word."""
    monkeypatch.setattr(optim, "CPU_CHUNK", 1 << 20)
    as_tensors = staticmethod(lambda values, **numbers: {key: torch.tensor(value) for key, value in numbers.items()})
    monkeypatch.setattr(MuonAdamW, "_as_inputs", as_tensors)
    compiled = {"adamw": 0, "muon": 0}

    def counting(name):
        def backend(graph, inputs):
            compiled[name] += 1
            return graph

        return backend

    torch.compiler.reset()
    config = GPTConfig.from_depth(12, vocab_size=512, head_dim=16)
    model = build_model(config, generator=torch.Generator().manual_seed(0))
    optimizer = MuonAdamW(parameter_groups(model))
    optimizer._adamw_update = torch.compile(adamw_update, dynamic=False, backend=counting("adamw"))
    optimizer._muon_update = torch.compile(muon_update, dynamic=False, backend=counting("muon"))
    for step in range(3):
        for group in optimizer.groups:
            group.lr = 0.01 * step
        model(torch.zeros(1, 8, dtype=torch.int64), torch.ones(1, 8, dtype=torch.int64)).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert compiled == {"adamw": 3, "muon": 4}  # three tables, four shapes of matrices


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
        assert watch.off_device == watch.waits == []
        torch.empty(4, device="cuda").mul_(1 - torch.tensor(0.5))  # which the watch finds
    assert watch.off_device == ["aten.rsub.Scalar: ['cpu'] -> ['cpu']", "aten.mul_.Tensor: ['cpu', 'cuda'] -> ['cuda']"]
