"""`dev/engine_kernels.py`: what counts as a launch, and as its bytes."""

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dev.engine_kernels import count_launches, per_layer, table


@torch.library.custom_op("nanochat_test::store_and_look_up", mutates_args=("cache",))
def store_and_look_up(x: torch.Tensor, table: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
    raise NotImplementedError


@store_and_look_up.register_fake
def _(x, table, cache):
    return torch.empty_like(x)


def stand_in(num_layers):
    """A pass over fake tensors: once a sum, in each layer a view, a product and an operation of our own."""
    with FakeTensorMode(), torch.device("cuda"):
        x, weight = torch.empty(2, 8), torch.empty(8, 8)
        values, cache = torch.empty(100, 8), torch.empty(1000, 8)

        def run():
            y = x.sum(dim=0).expand(2, 8)
            for _ in range(num_layers):
                y = store_and_look_up(y.view(2, 8) @ weight, values, cache)

        return count_launches(run, tables=[values], num_rows=2)


def test_a_layer_launches_what_deeper_passes_launch_more_and_views_launch_nothing():
    rows = per_layer(stand_in(1), stand_in(3), 2)
    assert {name: launches for name, (launches, _) in rows.items()} == {
        "aten.matmul.default": 1, "nanochat_test.store_and_look_up.default": 1,
    }  # fmt: skip


def test_tables_count_the_rows_looked_up_and_the_cache_no_more_than_is_stored():
    moved = {name: num_bytes for name, (_, num_bytes) in per_layer(stand_in(1), stand_in(3), 2).items()}
    x, weight = 4 * 2 * 8, 4 * 8 * 8
    assert moved["aten.matmul.default"] == x + weight + x
    assert moved["nanochat_test.store_and_look_up.default"] == x + 2 * 4 * 8 + x + (x + 2 * 4 * 8)


def test_the_table_has_a_line_for_each_operation_and_their_sum():
    columns = {1: {"a": (1, 1000.0), "b": (0.5, 10.0)}, 32: {"a": (1, 2000.0), "c": (2, 20.0)}}
    lines = table(columns).splitlines()
    assert lines[2:4] == ["| `a` | 1: 1,000 | 1: 2,000 |", "| `b` | 0.5: 10 | - |"]
    assert lines[4:] == ["| `c` | - | 2: 20 |", "| all | 1.5: 1,010 | 3: 2,020 |"]
