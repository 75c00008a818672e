"""Several gloo ranks on this machine: `run_ranks` calls one function in each and gives back what they returned."""

import multiprocessing
import os
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

# the server imports these once, slow ones that a model on the meta device needs among them; ranks are forks of it
_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["nanochat.training.loop", "nanochat.checkpoint", "pytest", "torch.fx.experimental.symbolic_shapes", "torch._refs"]
)
TIMEOUT_SECONDS = 120


def run_ranks(work: Callable, world_size: int, folder: Path, *args, group_of_one: bool = False) -> list:
    """`work(rank, world_size, *args)` of each of `world_size` ranks joined in a process group.

    `work` must be a function at the top of a module. A rank that raises fails the caller with its traceback. One rank
    is the caller's own process, without a group, unless `group_of_one`.
    """
    if world_size == 1 and not group_of_one:
        return [work(0, 1, *args)]
    folder.mkdir(parents=True)
    ranks = [
        _context.Process(target=_run_rank, args=(work, rank, world_size, folder, args)) for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(TIMEOUT_SECONDS)
    for process in ranks:
        if process.is_alive():
            process.kill()
    problems = [path.read_text() for path in sorted(folder.glob("*.error"))]
    assert not problems, "\n".join(problems)
    codes = [process.exitcode for process in ranks]
    assert codes == [0] * world_size, codes
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world_size)]


def _run_rank(work: Callable, rank: int, world_size: int, folder: Path, args: tuple) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    try:
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world_size,
            timeout=timedelta(seconds=TIMEOUT_SECONDS / 2),
        )  # fmt: skip
        torch.save(work(rank, world_size, *args), folder / f"{rank}.pt")
        dist.destroy_process_group()
    except BaseException:
        (folder / f"{rank}.error").write_text(f"rank {rank}: {traceback.format_exc()}")
        raise


def assert_sum_of_gradients(ranks: list[dict], expected: dict, *, rtol: float, atol: float) -> None:
    """The gradients of all ranks must add up to `expected`; `atol` is relative to the largest of a parameter."""
    for name, gradient in expected.items():
        total = sum(gradients[name] for gradients in ranks)
        torch.testing.assert_close(total, gradient, rtol=rtol, atol=atol * gradient.abs().max().item() + 1e-9)
