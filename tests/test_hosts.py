"""Several hosts: what they compare and send each other; two network namespaces as hosts, and the cable pulled out."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from conftest import make_text, random_model, write_shard
from live_server import wait_until
from ranks import run_ranks
from test_scripts import ROOT, SCHEDULE, TINY, environment, losses, run_folder

from nanochat import checkpoint
from nanochat.common import Runtime, UserError
from nanochat.hosts import check_hosts_agree, ranks_apart
from nanochat.model.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer
from nanochat.watch import Host, group_hosts

MEMBERS = ("checksums_rank0", "checksums_rank1", "meta", "model", "optimizer_rank0", "optimizer_rank1")


def test_hosts_are_told_apart_by_number_and_name_that_of_rank_0_first():
    places = [("1", "b"), ("1", "b"), ("0", "a"), ("2", "a")]
    assert group_hosts(places) == [Host("b", (0, 1)), Host("a", (2,)), Host("a", (3,))]
    assert [str(host) for host in group_hosts(places)][:2] == ["b (ranks 0, 1)", "a (rank 2)"]


# --- ranks of one machine that take themselves for hosts ---
def compare(rank: int, world_size: int) -> list[str]:
    os.environ["GROUP_RANK"] = str(rank)
    check_hosts_agree("the shards", {"a": 1}, "copy them")
    messages = []
    for own in ({"a": rank, "b": 1}, {"a": 1} if rank else {"a": 1, "b": 1}):
        with pytest.raises(UserError) as error:
            check_hosts_agree("the shards", own, "copy them")
        messages.append(str(error.value))
    return messages


def test_hosts_with_other_data_are_named(tmp_path):
    first, second = run_ranks(compare, 2, tmp_path / "ranks")
    assert first == second
    assert "(rank 1) differs from" in first[0]
    assert "in the shards: a is another; copy them" in first[0]
    assert "in the shards: b is missing; copy them" in first[1]


def save_and_resume(rank: int, world_size: int, folder: Path, tokenizer_folder: Path) -> dict:
    """Saves steps 1 and 2 on two hosts, each with a disk of its own; then resumes with what was lost in between."""
    os.environ["GROUP_RANK"] = str(rank)
    tokenizer, run = Tokenizer.load(tokenizer_folder), folder / f"disk_{rank}" / "base_checkpoints" / "d2"
    model = random_model(GPTConfig.from_depth(2, vocab_size=tokenizer.vocab_size, sequence_len=16, head_dim=32))
    args, group = Namespace(resume=True), dist.new_group(backend="gloo")
    assert checkpoint.resumable(run, args, ()) == {}
    apart, shared = ranks_apart(run), ranks_apart(folder / "shared")
    runtime = Runtime(rank, rank, world_size, torch.device("cpu"), torch.float32)
    for step in (1, 2):
        draft = checkpoint.Draft(
            run, step, runtime=runtime, model=model, tokenizer=tokenizer, meta={"args": {"resume": False}},
            optimizer_state={"value": torch.full((3,), float(rank))}, apart=apart, group=group,
        )  # fmt: skip
        draft.write()
        draft.publish()
    found = {"apart": apart, "shared": shared, "written": sorted(path.name for path in run.glob("*"))}

    def resume() -> int:
        dist.barrier()
        meta = checkpoint.resumable(run, args, {"resume"})
        states = checkpoint.load_rank_states(run / f"step_{meta['step']:06d}", meta, "optimizer")
        assert [int(state["value"][0]) for state in states] == [0, 1]
        return meta["step"]

    if rank == 0:
        shutil.rmtree(run / "step_000002")
    found["first"] = resume(), sorted(path.name for path in run.glob("*"))
    if rank == 1:  # damaged here, whole there
        with open(run / "step_000001" / "optimizer_rank0.safetensors", "r+b") as file:
            file.seek(-1, os.SEEK_END)
            file.write(b"\xff")
    found["damaged"] = resume(), sorted(path.name for path in run.glob("*"))
    if rank == 0:  # a host with a new disk is rank 0
        shutil.rmtree(run)
    found["lost"] = resume(), sorted(path.name for path in run.glob("*"))
    if rank == 1:
        shutil.rmtree(run)
    found["size"] = sum(path.stat().st_size for path in (folder / "disk_0").rglob("*.safetensors"))
    return found


def test_checkpoints_need_no_shared_disk_and_a_host_that_lost_its_own_gets_a_copy(tmp_path, tokenizer_folder):
    first, second = run_ranks(save_and_resume, 2, tmp_path / "ranks", tmp_path, tokenizer_folder)
    assert (first["apart"], first["shared"]) == ([1], [])
    assert first["written"] == ["step_000001", "step_000002"]
    assert second["written"] == []
    assert first["first"] == second["first"] == (1, ["step_000001"])
    assert second["damaged"] == (1, ["step_000001"])
    assert first["lost"] == second["lost"] == (1, ["step_000001"])
    names = {path.name.split(".")[0] for path in (tmp_path / "disk_0").rglob("step_000001/*")}
    assert names == {*MEMBERS, checkpoint.COPY_MARK, "tokenizer"}


# --- network namespaces ---
QUICK = """
import runpy, sys, time
from nanochat import watch
from nanochat.training.run import TrainingRun
watch.SILENCE_SECONDS, watch.LOST_SECONDS, watch.BEAT_SECONDS = 6.0, 3.0, 0.5
take_step = TrainingRun.take_step
def take_step_slowly(self, step):
    take_step(self, step)
    time.sleep(seconds)
TrainingRun.take_step = take_step_slowly
seconds, sys.argv = float(sys.argv[1]), sys.argv[2:]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
"""


def ip(*args, **options):
    return subprocess.run(["ip", *args], capture_output=True, text=True, check=True, **options)


class Namespaces:
    """Two network namespaces as hosts "a" and "b", joined by a cable. Each has a disk of its own, with data."""

    def __init__(self, folder: Path, name: str):
        self.folder, self.names = folder, {host: f"{name}{host}" for host in "ab"}
        (folder / "quick.py").write_text(QUICK)

    def base(self, host: str) -> Path:
        return self.folder / host / "base"

    def log(self, host: str) -> str:
        return (self.folder / f"{host}.log").read_text()

    def start(self, host: str, *, seconds_per_step=0.0, flags=(), restarts=0) -> subprocess.Popen:
        """torchrun with two processes on `host`."""
        address = f"10.77.0.{'ab'.index(host) + 1}"
        torchrun = [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc_per_node=2", "--rdzv-backend=c10d",
            "--rdzv-endpoint=10.77.0.1:29500", "--rdzv-id=test", f"--local-addr={address}",
            f"--rdzv-conf=is_host={str(host == 'a').lower()}", f"--max-restarts={restarts}",
        ]  # fmt: skip
        script = [str(self.folder / "quick.py"), str(seconds_per_step), "scripts.base_train", *TINY, *SCHEDULE]
        command = [*torchrun, *script, "--data", "data", "--resume", *flags]
        name_it = ["unshare", "--uts", "sh", "-c", f'hostname host-{host}; exec "$@"', "sh"]
        variables = {"GLOO_SOCKET_IFNAME": f"v{self.names[host]}", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
        with open(self.folder / f"{host}.log", "a") as log:
            return subprocess.Popen(
                ["ip", "netns", "exec", self.names[host], *name_it, *command], stdout=log, stderr=log,
                env=environment(self.base(host)) | variables, cwd=self.folder / host,
            )  # fmt: skip

    def pull_the_cable(self) -> None:
        ip("-n", self.names["a"], "link", "set", f"v{self.names['a']}", "down")

    def plug_it_in(self) -> None:
        ip("-n", self.names["a"], "link", "set", f"v{self.names['a']}", "up")

    def switch_off(self, host: str) -> None:
        """Kill all processes in the namespace."""
        for pid in ip("netns", "pids", self.names[host]).stdout.split():
            os.kill(int(pid), signal.SIGKILL)


@contextmanager
def in_namespaces(folder: Path):
    spaces = Namespaces(folder, f"n{os.getpid() % 100_000}")
    a, b = spaces.names.values()
    try:
        try:
            for name in (a, b):
                ip("netns", "add", name)
                ip("-n", name, "link", "set", "lo", "up")
            ip("link", "add", f"v{a}", "netns", a, "type", "veth", "peer", "name", f"v{b}", "netns", b)
            for number, name in enumerate((a, b), start=1):
                ip("-n", name, "addr", "add", f"10.77.0.{number}/24", "dev", f"v{name}")
                ip("-n", name, "link", "set", f"v{name}", "up")
            subprocess.run(["ip", "netns", "exec", a, "unshare", "--uts", "hostname", "x"], check=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"no network namespaces here: {error}")
        yield spaces
    finally:
        for host, name in spaces.names.items():
            if Path("/var/run/netns", name).exists():
                spaces.switch_off(host)
                ip("netns", "del", name)


@pytest.fixture
def hosts(tmp_path):
    """Two hosts, and the losses of one process that trains on the same batches."""
    rng = random.Random(0)
    texts = [[make_text(rng, rng.randrange(5, 120)) for _ in range(60)] for _ in range(4)]
    for host in ("a", "b", "one"):
        for number, part in enumerate(texts):
            write_shard(tmp_path / host / "data" / f"shard_{number}.parquet", part, row_group_size=40)
        Tokenizer.train(texts[0], 400).save(tmp_path / host / "base" / "tokenizer")
    with in_namespaces(tmp_path) as spaces:
        base = tmp_path / "one" / "base"
        command = ["-m", "scripts.base_train", *TINY, *SCHEDULE, "--data", str(tmp_path / "one" / "data")]
        subprocess.run([sys.executable, *command], env=environment(base), cwd=ROOT, check=True, capture_output=True)
        spaces.expected = losses(base)
        yield spaces


def last_lines_of(hosts) -> str:
    return f"{hosts.log('a')[-3000:]}\n---\n{hosts.log('b')[-3000:]}"


@pytest.mark.slow
def test_two_hosts_without_a_shared_disk_train_like_one_process_and_a_missing_shard_is_named(hosts):
    shutil.copy(hosts.folder / "b" / "data" / "shard_1.parquet", hosts.folder)
    (hosts.folder / "b" / "data" / "shard_1.parquet").unlink()
    assert [process.wait(100) for process in [hosts.start(host) for host in "ba"]] == [1, 1], last_lines_of(hosts)
    differs = "error: host-b (rank 2) differs from host-a in the shards of"
    assert all(differs in hosts.log(host) for host in "ab"), last_lines_of(hosts)
    assert "shard_1.parquet is missing" in hosts.log("a")

    shutil.copy(hosts.folder / "shard_1.parquet", hosts.folder / "b" / "data")
    assert [process.wait(100) for process in [hosts.start(host) for host in "ba"]] == [0, 0], last_lines_of(hosts)
    assert "hosts: host-a (ranks 0, 1), host-b (ranks 2, 3)" in hosts.log("a")
    assert losses(hosts.base("a")) == pytest.approx(hosts.expected, rel=1e-5)
    assert json.loads((run_folder(hosts.base("a")) / "step_000009" / "meta.json").read_text())["world_size"] == 4
    assert not run_folder(hosts.base("b")).exists()


@pytest.mark.slow
def test_a_host_that_vanishes_is_named_and_the_run_goes_on_when_it_is_back_with_an_empty_disk(hosts):
    options = {"seconds_per_step": 0.5, "restarts": 3}
    first, second = (hosts.start(host, **options) for host in "ab")
    wait_until(lambda: (run_folder(hosts.base("a")) / "step_000003").exists(), 100)
    hosts.pull_the_cable()
    told = {"a": "error: nothing heard of host-b (ranks 2, 3)", "b": "error: nothing heard of host-a (ranks 0, 1)"}
    wait_until(lambda: all(told[host] in hosts.log(host) for host in "ab"), 15)  # 6 s, and a second's grace
    hosts.switch_off("b")
    second.wait(20)
    assert all(hosts.log(host).count("error: nothing heard") == 1 for host in "ab"), last_lines_of(hosts)

    shutil.rmtree(hosts.base("b") / "base_checkpoints", ignore_errors=True)
    hosts.plug_it_in()
    second = hosts.start("b", **options)
    assert [first.wait(120), second.wait(20)] == [0, 0], last_lines_of(hosts)
    assert "sending step_00000" in hosts.log("a")
    assert losses(hosts.base("a")) == pytest.approx(hosts.expected, rel=1e-5)
