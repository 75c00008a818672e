"""What a decode step launches for each layer, counted without a GPU: a Markdown table.

    python dev/engine_kernels.py                      # d20, bfloat16, for 1, 32 and 128 rows
    python dev/engine_kernels.py --depth 12 --architecture october

The engine's decode pass runs on PyTorch's fake "cuda" device, where tensors have shapes and no data. Every operation
that computes counts as one launch, each of our own (`torch.library`) too; views launch nothing. The passes of models
that differ by one repetition of the layers' pattern are compared, so that what a step does once drops out.

Bytes are those of an operation's tensor arguments and results, with two exceptions: of a table the rows looked up, and
of what an operation writes into (the cache) at most as much as it takes from elsewhere.
"""

import argparse
import math
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dev.roofline import ARCHITECTURES
from nanochat.common import run_main
from nanochat.engine.gpu import GpuModel
from nanochat.model.gpt import GPT, GPTConfig

PERIOD = 4  # layers after which windows and value embeddings repeat
MAKING = ("empty", "empty_strided", "empty_like", "new_empty", "lift_fresh")  # memory, or what fake tensors ask for


class Launches(TorchDispatchMode):
    """Within it operations are counted by name: how many kernels they launch, and the bytes these move. Of the `tables`
    each operation looks up `num_rows` rows."""

    def __init__(self, tables: Sequence[Tensor] = (), num_rows: int = 0):
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.num_bytes: Counter[str] = Counter()
        self._tables, self._num_rows = {_storage(table) for table in tables}, num_rows

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        arguments = zip(function._schema.arguments, args, strict=False)
        named = [(argument, (kwargs or {}).get(argument.name)) for argument in function._schema.arguments]
        given_to = [pair for pair in (*arguments, *named) if pair[1] is not None]
        written = [x for argument, value in given_to for x in _tensors(value) if _is_written(argument)]
        taken = [x for argument, value in given_to for x in _tensors(value) if not _is_written(argument)]
        known = {_storage(x) for x in (*taken, *written)}
        made = [x for x in _tensors(out) if _storage(x) not in known]
        is_on_gpu = any(x.device.type == "cuda" for x in (*taken, *written, *made))
        if is_on_gpu and (made or written) and function._schema.name.split("::")[1] not in MAKING:
            read = sum(self._bytes_read(x) for x in taken)
            rewritten = sum(_num_bytes(x) for x in written)
            self.counts[str(function)] += 1
            moved = min(rewritten, read) if read else 2 * rewritten  # in place: read and written
            self.num_bytes[str(function)] += read + sum(map(_num_bytes, made)) + moved
        return out

    def _bytes_read(self, x: Tensor) -> int:
        num_bytes = _num_bytes(x)
        return num_bytes if _storage(x) not in self._tables else num_bytes // x.size(0) * self._num_rows


def _is_written(argument) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _storage(x: Tensor) -> int:
    return x.untyped_storage()._cdata


def _num_bytes(x: Tensor) -> int:
    """Of the elements of `x`; one that is expanded counts once."""
    return x.element_size() * math.prod(n for n, step in zip(x.shape, x.stride(), strict=True) if step)


def count_launches(run: Callable[[], object], tables: Sequence[Tensor] = (), num_rows: int = 0) -> Launches:
    """What `run`, on fake tensors, would launch."""
    with torch.inference_mode(), Launches(tables, num_rows) as launches:
        run()
    return launches


def per_layer(shallow: Launches, deep: Launches, num_layers: int) -> dict[str, tuple[float, float]]:
    """Launches and bytes a layer by operation, given the passes of two models of which the second has `num_layers`
    more."""
    rows = {}
    for name in deep.counts:
        launches = (deep.counts[name] - shallow.counts[name]) / num_layers
        if launches:
            rows[name] = launches, (deep.num_bytes[name] - shallow.num_bytes[name]) / num_layers
    return rows


def decode_launches(config: GPTConfig, num_rows: int) -> Launches:
    """Of one decode of `num_rows`, each at the last position of its context."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        inference = GpuModel(GPT(config, compute_dtype=torch.bfloat16), num_rows)
        idx = torch.zeros(num_rows, dtype=torch.int64)
        places = torch.zeros(len(inference.write_places([1] * num_rows, num_rows)), dtype=torch.int32)
        tables = [x for x in (inference._weights.embed, inference._weights.smear, inference._weights.value_embeds)
                  if x is not None]  # fmt: skip
        run = partial(inference.decode_pass, idx, idx, places)
        return count_launches(run, tables, num_rows)


def table(columns: dict[int, dict[str, tuple[float, float]]]) -> str:
    """Markdown, launches and bytes in each cell, given `per_layer` for each number of rows."""
    heads = [f"{num_rows} rows" for num_rows in columns]
    lines = [f"| operation, launches a layer | {' | '.join(heads)} |", f"|---|{'---:|' * len(heads)}"]
    names = dict.fromkeys(name for column in columns.values() for name in column)
    for name in names:
        cells = [column.get(name) for column in columns.values()]
        shown = ["-" if cell is None else f"{cell[0]:g}: {cell[1]:,.0f}" for cell in cells]
        lines.append(f"| `{name.removesuffix('.default')}` | {' | '.join(shown)} |")
    sums = [[sum(numbers) for numbers in zip(*column.values(), strict=True)] for column in columns.values()]
    return "\n".join([*lines, f"| all | {' | '.join(f'{launches:g}: {moved:,.0f}' for launches, moved in sums)} |"])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=20)
    parser.add_argument("--architecture", default="recipe", choices=ARCHITECTURES)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 32, 128], help="rows that decode at once")
    parser.add_argument("--keys", type=int, default=512, help="positions that each row sees, itself included")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    whole = ARCHITECTURES[args.architecture](args.depth, vocab_size=32768)
    columns = {}
    for num_rows in args.batch:
        shallow, deep = (
            decode_launches(replace(whole, n_layer=n, sequence_len=args.keys), num_rows) for n in (PERIOD, 2 * PERIOD)
        )
        columns[num_rows] = per_layer(shallow, deep, PERIOD)
    print(table(columns))


if __name__ == "__main__":
    run_main(main, parse_args)
