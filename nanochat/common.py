"""What all modules share: user errors, the base folder, the runtime (rank, device, dtype), one-time downloads.

Not here: anything only one module needs, and hardware tables (`hardware.py`).
"""

import argparse
import ctypes
import hashlib
import logging
import os
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.compiler.config
import torch.distributed as dist

from nanochat.watch import Watch, group_hosts, this_host

logger = logging.getLogger(__name__)

DEVICES = ("cuda", "mps", "cpu")  # best first
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FP8 = "fp8"  # a further choice for training: bfloat16, but for the products of the blocks, which are of float8
FP8_CAPABILITY = (8, 9)  # Ada; Hopper has (9, 0)
BF16_SPEEDUP_NEEDED = 1.2  # below this, halving the mantissa is not worth it on a CPU
PROBE_SIZE = 512  # side of the probe's matrices: large enough for the blocked kernels, a few ms in float32
SKIP_VARIABLE = "NANOCHAT_SKIP_NOTE"  # see `run_main`
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h of the GNU C library


class UserError(Exception):
    """Something the user can put right: the message says what is wrong, the value, and what to do."""


class Unavailable(UserError):
    """The data of a stage cannot be had. Other stages may do without."""


# --- files ---------------------------------------------------------------------------------------


def base_dir() -> Path:
    """Folder of all work files: `NANOCHAT_BASE_DIR`, or `~/.cache/nanochat`, created when missing. Raises `UserError`
    when it cannot be created or written to."""
    path = Path(os.environ.get("NANOCHAT_BASE_DIR") or Path.home() / ".cache" / "nanochat").expanduser()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot create the work folder {path} ({error.strerror}); set NANOCHAT_BASE_DIR") from error
    if not os.access(path, os.W_OK):
        raise UserError(f"no permission to write to the work folder {path}; set NANOCHAT_BASE_DIR to another one")
    return path


@contextmanager
def disk_errors(what: str, path: Path) -> Iterator[None]:
    """Turn an `OSError` while writing `what` to `path` (disk full, no permission, ...) into a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {what} to {path}: {error.strerror or error}") from error


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write `data` to `path` so that readers see the old content or the new, never a part. Raises `UserError`, leaving
    the old content, when it cannot be written."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with disk_errors(path.name, path.parent):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(partial, "wb") as file:
                file.write(data.encode() if isinstance(data, str) else data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        finally:
            partial.unlink(missing_ok=True)


@contextmanager
def only_one_process(path: Path) -> Iterator[None]:
    """Hold the lock of `path`, a hidden file beside it. The system frees it when its holder dies."""
    from filelock import FileLock, Timeout

    with disk_errors("a lock file", path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(path.with_name(f".{path.name}.lock"))
        try:
            held = lock.acquire(timeout=0)
        except Timeout:
            print0(f"another process is preparing {path}: waiting for it")
            held = lock.acquire()
    with held:
        yield


def fetch_once(path: Path, fetch: Callable[[Path], None]) -> Path:
    """Make sure `path` exists, and return it. Of the processes that ask for it, one calls `fetch(partial_path)`, which
    must write the whole file there or raise; the file is then renamed to `path`."""
    if path.exists():
        return path
    with only_one_process(path):
        if not path.exists():
            partial = path.with_name(f".{path.name}.partial")
            try:
                fetch(partial)
                os.replace(partial, path)
            finally:
                partial.unlink(missing_ok=True)
    return path


# --- runtime -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Runtime:
    """Which process this is and what it computes on. `dtype` is that of activations and matrix products; with `fp8`,
    the blocks multiply in float8."""

    rank: int
    local_rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype
    fp8: bool = False

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def is_cuda(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype_name(self) -> str:
        return FP8 if self.fp8 else str(self.dtype).removeprefix("torch.")

    def __str__(self) -> str:
        return f"{self.world_size} x {self.device.type}, {self.dtype_name}"


def init_runtime(device_type: str = "", dtype: str = "", *, trains: bool = False) -> Runtime:
    """Set up this process: join the process group under torchrun, choose the device ("cuda", "mps", "cpu", or "" for
    the best one present) and the compute dtype (a key of `DTYPES`, where it `trains` also `FP8`, or "" for what
    `choose_dtype` finds on rank 0). Raises `UserError` for a device or dtype that is not available."""
    rank, local_rank, world_size = _place()
    device = choose_device(device_type, local_rank)
    if device.type == "cpu":
        _tune_cpu()
    dtypes = DTYPES | ({FP8: torch.bfloat16} if trains else {})
    if dtype and dtype not in dtypes:
        raise UserError(f"--dtype {dtype!r} is unknown; choose one of {', '.join(dtypes)}")
    if dtype == FP8:
        _check_fp8(device, emulate=device_type == "cpu")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
        torch.backends.cuda.enable_cudnn_sdp(False)  # some 50 ms for each new shape; training asks for it by name
        keep_compiled()
    join_ranks(device_type)
    chosen = from_rank0(dtype or (choose_dtype(device) if rank == 0 else ""))
    return Runtime(rank, local_rank, world_size, device, dtypes[chosen], fp8=chosen == FP8)


def _place() -> tuple[int, int, int]:
    """Rank, local rank and world size, as torchrun tells them."""
    defaults = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    return tuple(int(os.environ.get(name, default)) for name, default in defaults.items())


def join_ranks(device_type: str = "") -> None:
    """Join the process group under torchrun, unless it is done already; on several hosts, watch over the others from
    then on. For what must be known to all ranks before `init_runtime`, which calls this too."""
    rank, local_rank, world_size = _place()
    device = choose_device(device_type, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if world_size == 1 or dist.is_initialized():
        return
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **_store_of_attempt(rank, world_size))
    hosts = group_hosts(gather_ranks(this_host()))
    if len(hosts) > 1:
        Watch.current = Watch(hosts, rank, from_rank0(uuid.uuid4().hex))
        print0("hosts: " + ", ".join(map(str, hosts)))


def _store_of_attempt(rank: int, world_size: int) -> dict:
    """Arguments that keep the addresses of ranks apart from those that they had before torchrun restarted them: its
    agent keeps them in one store, and a rank that finds an old one waits for it in vain."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return {}
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return {"store": dist.PrefixStore(f"nanochat/attempt_{attempt}", store), "rank": rank, "world_size": world_size}


def keep_compiled() -> None:
    """Have compiled code kept in the base folder, for the next stage and for `--resume`. Folders that the user has set
    by the variables of PyTorch and Triton stay. To be called before PyTorch's compiler is imported: that sets them too.

    PyTorch finds compiled code by the operations it was traced from, and knows ours by name only: it would not notice
    a new formula for their gradients. So the model's source is a part of the key.
    """
    for variable, name in {"TORCHINDUCTOR_CACHE_DIR": "inductor", "TRITON_CACHE_DIR": "triton"}.items():
        os.environ.setdefault(variable, str(base_dir() / "compiled" / name))
    source = b"".join(path.read_bytes() for path in sorted((Path(__file__).parent / "model").glob("*.py")))
    torch.compiler.config.cache_key_tag = hashlib.sha256(source).hexdigest()


def _check_fp8(device: torch.device, *, emulate: bool) -> None:
    """Raise `UserError` if `device` has no unit for float8, unless it is a CPU that shall `emulate` one."""
    if device.type == "cpu" and emulate:
        print0("fp8 on a CPU is emulated: it rounds as a GPU does, and is slower than bfloat16")
        return
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"device type {device.type}"
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < FP8_CAPABILITY:
        remedy = "take --dtype bfloat16, or --device-type cpu, which emulates it slowly"
        raise UserError(f"--dtype fp8 needs a GPU of the generations Ada, Hopper or newer, not {name}; {remedy}")


def _tune_cpu() -> None:
    """Share the cores among this machine's processes, and make the allocator keep freed memory: large temporaries would
    otherwise be fresh zeroed pages each time, 25 % of a training step."""
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if num_local > 1:  # torchrun sets one thread per process, whatever the number of cores
        num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        torch.set_num_threads(max(1, num_cores // num_local))
    if sys.platform == "linux":
        try:
            libc = ctypes.CDLL("libc.so.6")
            libc.mallopt(_M_MMAP_MAX, 0)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
        except (OSError, AttributeError):
            logger.debug("this C library has no mallopt: large temporaries will be slower")


def choose_device(device_type: str = "", local_rank: int = 0) -> torch.device:
    """The device asked for, or the best one present. Raises `UserError` when it is not there."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device_type not in ("", *available):
        raise UserError(f"--device-type {device_type!r} is unknown; choose one of {', '.join(available)}")
    if device_type in ("", "cuda") and not available["cuda"]:
        _check_driver()
    present = [name for name in available if available[name]]
    chosen = device_type or present[0]
    if chosen not in present:
        raise UserError(f"--device-type {chosen} is not available here; this machine has {', '.join(present)}")
    if chosen != "cuda":
        return torch.device(chosen)
    if local_rank >= (num_gpus := torch.cuda.device_count()):
        remedy = "start that many processes at most (torchrun --nproc_per_node)"
        raise UserError(f"process {local_rank} has no GPU: this machine has {num_gpus}; {remedy}")
    return torch.device("cuda", local_rank)


def _check_driver() -> None:
    """Raise `UserError` if there is an NVIDIA driver that is too old for this PyTorch, which then finds no GPU."""
    driver, needed = cuda_driver_version(), torch.version.cuda
    is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == ""
    if driver and needed and driver[0] < int(needed.split(".")[0]) and not is_hidden:
        raise UserError(
            f"the NVIDIA driver is too old: it runs CUDA {driver[0]}.{driver[1]}, this PyTorch needs CUDA {needed}; "
            f"install a newer driver, or a PyTorch built for CUDA {driver[0]}, or take --device-type cpu"
        )


def cuda_driver_version() -> tuple[int, int] | None:
    """Newest version of CUDA that the NVIDIA driver here runs, such as (12, 4); None without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    version = ctypes.c_int()
    driver.cuDriverGetVersion(ctypes.byref(version))  # 12040, and 0 if it does not know
    return divmod(version.value // 10, 100)


def choose_dtype(device: torch.device) -> str:
    """Name of the compute dtype for `device`: bfloat16 on CUDA from Ampere on, float16 on older GPUs, float32 on MPS.
    On a CPU it is found by timing: bfloat16 is 2x faster than float32 on some and 160x slower on others."""
    if device.type == "cuda":
        return "bfloat16" if torch.cuda.get_device_capability(device) >= (8, 0) else "float16"
    if device.type != "cpu":
        return "float32"
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # on a busy machine, threads that wait for each other are late by more than the difference
    speedup = matmul_seconds(torch.float32) / matmul_seconds(torch.bfloat16)
    torch.set_num_threads(num_threads)
    return "bfloat16" if speedup > BF16_SPEEDUP_NEEDED else "float32"


def matmul_seconds(dtype: torch.dtype, size: int = PROBE_SIZE, repeats: int = 5) -> float:
    """Seconds of a `size`^3 matrix product of `dtype` on the CPU: the fastest of `repeats` after a warm-up."""
    a, fastest = torch.ones(size, size, dtype=dtype), float("inf")
    for _ in range(repeats + 1):
        start = time.perf_counter()
        a @ a
        elapsed = time.perf_counter() - start
        if elapsed > 1.0:  # far too slow to be chosen
            return elapsed
        fastest = min(fastest, elapsed)
    return fastest


def gather_ranks(value) -> list:
    """The `value` of every rank, in the order of ranks, on every rank (anything picklable)."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_rank0(value):
    """The `value` of rank 0, on every rank (anything picklable)."""
    return gather_ranks(value)[0]


@contextmanager
def together() -> Iterator[None]:
    """Wait for all ranks at the end of the block. If it raises `UserError` on one of them, every rank raises one of the
    same kind, so that none waits for another that has stopped."""
    failure = None
    try:
        yield
    except UserError as error:
        failure = error
    found = gather_ranks((this_host(), failure and (type(failure), str(failure))))
    if failure is not None:
        raise failure
    num_hosts = len({host for host, _ in found})
    for rank, ((_, name), raised) in enumerate(found):
        if raised is not None:
            kind, message = raised
            raise kind(f"process {rank}{f' on host {name}' if num_hosts > 1 else ''}: {message}")


def print0(*args, **kwargs) -> None:
    """`print` on rank 0 only, flushed so that the log of a long run can be followed."""
    if int(os.environ.get("RANK", "0")) == 0:
        print(*args, **kwargs, flush=True)


def run_main(main: Callable[[argparse.Namespace], None], parse_args: Callable[[], argparse.Namespace]) -> None:
    """Run a script. A `UserError` ends it with one line on stderr and exit status 2, Ctrl-C with status 130, the loss
    of a host with a line and status 1; in every other case the process group is closed.

    `speedrun.sh` names a file in `SKIP_VARIABLE` for a stage that it can do without. `Unavailable` then goes into that
    file, and the status is 0: otherwise torchrun would turn it into a failure with a page of traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        main(parse_args())
    except UserError as error:
        if isinstance(error, Unavailable) and (note := os.environ.get(SKIP_VARIABLE)):
            write_atomic(Path(note), f"{error}\n")
            return
        print(f"error: {error}", file=sys.stderr, flush=True)
        sys.exit(2)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr, flush=True)
        sys.exit(130)
    except RuntimeError:
        if Watch.current is not None:
            Watch.current.end_if_lost()
        raise
    finally:
        if Watch.current is not None:
            Watch.current.close()
        if dist.is_initialized():
            dist.destroy_process_group()
