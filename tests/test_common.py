"""Files that are whole or absent, one download for many processes, and a runtime that rank 0 decides."""

import argparse
import ast
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from nanochat import common
from nanochat.common import Runtime, Unavailable, UserError

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


# --- files ---
def test_the_base_folder_is_made_where_the_variable_says_or_in_the_home_folder(monkeypatch, base_folder, tmp_path):
    assert not base_folder.exists()
    assert common.base_dir() == base_folder
    assert base_folder.is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "~/elsewhere")
    assert common.base_dir() == tmp_path / "elsewhere"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", "")
    assert common.base_dir() == tmp_path / ".cache" / "nanochat"
    monkeypatch.delenv("NANOCHAT_BASE_DIR")
    assert common.base_dir() == tmp_path / ".cache" / "nanochat"


def test_a_base_folder_that_cannot_be_made_or_written_to_is_named(monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        patch.setattr(common.os, "access", lambda path, mode: False)  # root may write everywhere
        with pytest.raises(UserError, match="no permission to write"):
            common.base_dir()
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "file" / "below"))
    with pytest.raises(UserError, match=r"cannot create the work folder .*below .*set NANOCHAT_BASE_DIR"):
        common.base_dir()


@pytest.mark.parametrize("data", [b"\x00\xff", "tëxt\n", b"", "x" * 100_000])
def test_atomic_writing_leaves_the_data_and_nothing_else(data, tmp_path):
    path = tmp_path / "new" / "folder" / "name.json"
    for _ in range(2):
        common.write_atomic(path, data)
    assert path.read_bytes() == (data.encode() if isinstance(data, str) else data)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_what_was_there(operation, error, tmp_path, monkeypatch):
    path = tmp_path / "name"
    common.write_atomic(path, "before")

    def fail(*args):
        raise error

    monkeypatch.setattr(common.os, operation, fail)
    expected = UserError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        common.write_atomic(path, "after")
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_disk_error_becomes_one_sentence():
    words = r"^cannot write the table to /x/y: No space left on device$"
    with pytest.raises(UserError, match=words), common.disk_errors("the table", Path("/x/y")):
        raise OSError(errno.ENOSPC, "No space left on device")


# --- one-time downloads ---
def fetch_on_rank(rank: int, world_size: int, path: Path) -> str:
    def fetch(partial: Path) -> None:
        (path.parent / f"fetched_by_{rank}_{time.monotonic_ns()}").write_text("")
        partial.write_text("half")
        time.sleep(0.3)  # long enough for the others to come and wait
        partial.write_text("whole")

    dist.barrier()
    return common.fetch_once(path, fetch).read_text()


def test_eight_processes_asking_for_one_file_fetch_it_once(tmp_path):
    path = tmp_path / "files" / "file"
    assert run_ranks(fetch_on_rank, 8, tmp_path / "ranks", path) == ["whole"] * 8
    assert len(list(path.parent.glob("fetched_by_*"))) == 1


def test_a_failed_fetch_leaves_no_file_and_the_next_one_tries_again_once(tmp_path):
    path = tmp_path / "folder" / "file"

    def broken(partial: Path) -> None:
        partial.write_text("half of it")
        raise UserError("the server went away")

    with pytest.raises(UserError, match="went away"):
        common.fetch_once(path, broken)
    assert [name for name in os.listdir(path.parent) if not name.endswith(".lock")] == []
    assert common.fetch_once(path, lambda partial: partial.write_text("whole")).read_text() == "whole"
    assert common.fetch_once(path, lambda partial: pytest.fail("fetched again")).read_text() == "whole"


# --- runtime ---
@pytest.fixture(autouse=True)
def untuned(monkeypatch):
    """The tests' own process keeps its threads and its memory allocator."""
    monkeypatch.setattr(common, "_tune_cpu", lambda: None)


def test_the_runtime_of_one_process_is_what_was_asked_for_or_refused_with_what_there_is():
    for name, dtype in common.DTYPES.items():
        runtime = common.init_runtime("cpu", name)
        assert runtime == Runtime(0, 0, 1, CPU, dtype)
        assert (runtime.is_main, runtime.is_cuda) == (True, False)
    with pytest.raises(UserError, match="--dtype 'int8' is unknown; choose one of float32, bfloat16, float16"):
        common.init_runtime("cpu", "int8")
    with pytest.raises(UserError, match="--device-type 'tpu' is unknown; choose one of cuda, mps, cpu"):
        common.init_runtime("tpu", "float32")


def test_devices_that_are_absent_or_too_few_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert common.choose_device() == CPU
    with pytest.raises(UserError, match="--device-type cuda is not available here; this machine has cpu"):
        common.choose_device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert common.choose_device("", 1) == torch.device("cuda", 1)
    with pytest.raises(UserError, match="process 2 has no GPU: this machine has 2"):
        common.choose_device("", 2)


@pytest.mark.parametrize(
    ("driver", "words"),
    [
        (None, ""),
        ((13, 0), ""),
        ((14, 1), ""),
        ((12, 4), r"driver is too old: it runs CUDA 12\.4, this PyTorch needs CUDA 13\.2; install a newer driver, or a "
         r"PyTorch built for CUDA 12, or take --device-type cpu"),
    ],
)  # fmt: skip
def test_a_driver_too_old_for_this_pytorch_is_named_instead_of_training_on_the_cpu(driver, words, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    monkeypatch.setattr(common, "cuda_driver_version", lambda: driver)
    for asked in ("", "cuda") if words else ():
        with pytest.raises(UserError, match=words):
            common.choose_device(asked)
    assert common.choose_device("" if not words else "cpu") == CPU
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # GPUs hidden on purpose
    assert common.choose_device() == CPU


def test_the_drivers_version_is_read_from_its_library(monkeypatch):
    def tell(pointer) -> None:
        pointer._obj.value = 12040

    monkeypatch.setattr(common.ctypes, "CDLL", lambda name: SimpleNamespace(cuDriverGetVersion=tell))
    assert common.cuda_driver_version() == (12, 4)


def test_fp8_is_for_training_on_a_gpu_that_has_it_and_emulated_on_a_cpu_only_when_asked_for(monkeypatch, capsys):
    with pytest.raises(UserError, match="--dtype 'fp8' is unknown; choose one of float32, bfloat16, float16"):
        common.init_runtime("cpu", "fp8")
    runtime = common.init_runtime("cpu", "fp8", trains=True)
    assert runtime == Runtime(0, 0, 1, CPU, torch.bfloat16, fp8=True)
    assert runtime.dtype_name == "fp8"
    assert "emulated" in capsys.readouterr().out
    monkeypatch.setattr(common, "choose_device", lambda *_: CPU)  # as the best one present
    with pytest.raises(UserError, match=r"needs a GPU of .* not device type cpu; take --dtype bfloat16"):
        common.init_runtime("", "fp8", trains=True)
    monkeypatch.setattr(common, "choose_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(UserError, match="not NVIDIA A100"):
        common.init_runtime("cuda", "fp8", trains=True)
    for capability in ((8, 9), (9, 0), (12, 0)):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        common._check_fp8(torch.device("cuda", 0), emulate=False)


@pytest.mark.parametrize(("narrow", "chosen"), [(0.5, "bfloat16"), (0.9, "float32"), (160.0, "float32")])
def test_a_cpu_takes_bfloat16_only_where_a_probe_finds_it_clearly_faster(narrow, chosen, monkeypatch):
    assert 0 < common.matmul_seconds(torch.float32, size=16) < 1
    seconds = {torch.float32: 1.0, torch.bfloat16: narrow}
    monkeypatch.setattr(common, "matmul_seconds", lambda dtype: seconds[dtype])
    assert common.choose_dtype(CPU) == chosen


def decide_on_rank(rank: int, world_size: int) -> tuple:
    common._tune_cpu = lambda: None
    common.choose_dtype = lambda device: ["bfloat16", "float32"][rank]
    return common.init_runtime("cpu"), common.from_rank0({"rows": 8 >> rank})


def test_what_rank_0_finds_holds_for_all_ranks(tmp_path):
    for rank, (runtime, value) in enumerate(run_ranks(decide_on_rank, 2, tmp_path / "ranks")):
        assert runtime == Runtime(rank, rank, 2, CPU, torch.bfloat16)
        assert value == {"rows": 8}
    assert common.from_rank0([1, 2]) == [1, 2]  # without a process group


def test_only_rank_0_prints(monkeypatch, capsys):
    common.print0("of one process")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        common.print0("rank", rank)
    assert capsys.readouterr().out == "of one process\nrank 0\n"


# --- scripts ---
def test_a_stage_that_cannot_go_on_ends_with_one_line_and_a_status_and_a_bug_shows_itself(
    capsys, tmp_path, monkeypatch
):
    def run_with(error: BaseException | None) -> None:
        def main(args: argparse.Namespace) -> None:
            assert args.number == 3
            if error is not None:
                raise error

        common.run_main(main, lambda: argparse.Namespace(number=3))

    for error, status, line in (
        (UserError("no shards: run it"), 2, "error: no shards: run it\n"), (KeyboardInterrupt(), 130, "stopped\n"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as ended:
            run_with(error)
        assert ended.value.code == status
        assert capsys.readouterr() == ("", line)
    run_with(None)
    with pytest.raises(ZeroDivisionError):
        run_with(ZeroDivisionError())
    assert capsys.readouterr() == ("", "")

    # a stage that speedrun.sh can do without, when it is its data that cannot be had
    note = tmp_path / "skipped"
    monkeypatch.setenv(common.SKIP_VARIABLE, str(note))
    run_with(Unavailable("no data: ask the hub"))
    assert capsys.readouterr() == ("", "")
    assert note.read_text() == "no data: ask the hub\n"
    note.unlink()
    with pytest.raises(SystemExit):
        run_with(UserError("the disk is full"))
    assert not note.exists()


def test_outside_of_the_environment_a_command_says_so_in_one_line_and_a_bug_still_shows_itself(tmp_path):
    def run(*args: str) -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, *args], cwd=tmp_path, capture_output=True, text=True, check=False)

    for package, module, line in (
        ("nanochat", "tool", "import torch_of_nobody"), ("scripts", "tool", "import torch_of_nobody"),
        ("nanochat", "bug", "from nanochat import nothing_there"), ("nanochat", "stopped", "raise KeyboardInterrupt"),
    ):  # fmt: skip
        (tmp_path / package).mkdir(exist_ok=True)
        shutil.copy(ROOT / package / "__init__.py", tmp_path / package)
        (tmp_path / package / f"{module}.py").write_text(line)
        ended = run("-m", f"{package}.{module}")
        assert ended.returncode == (-signal.SIGINT if module == "stopped" else 1)
        if module == "stopped":
            assert ended.stderr == "stopped\n"
        elif module == "bug":
            assert ended.stderr.startswith("Traceback")
        else:
            assert re.fullmatch(r"error: .* cannot import torch_of_nobody; .*source \.venv.*\n", ended.stderr)
    assert run("-c", "import nanochat.tool").stderr.startswith("Traceback")  # the library changes nothing of Python's
    for package in ("nanochat", "scripts"):  # and Pythons too old to run the rest can read the advice
        ast.parse((ROOT / package / "__init__.py").read_text(), feature_version=(3, 4))
