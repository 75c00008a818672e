"""Everything one GPU can tell us, in one command of at most nine minutes and without a network.

    python dev/gpu_check.py                                   # all parts, the most telling first
    python dev/gpu_check.py --parts tests train --seconds 240 # some of them, in four minutes
    python dev/gpu_check.py --tiny                            # toy sizes, also on a CPU: checks this program itself

Each part runs in a process of its own with a time limit, and its output is passed on as it comes. A part that crashes
or runs out of time is reported with its last lines and stops no other part. A table and one JSON line with the figures
of all parts end the output. Parts that need something this machine lacks (a GPU, fastapi) are skipped and say so.

Exit status: 0 when every part that ran passed, else 1.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.model import attention
from nanochat.model.gpt import GPTConfig
from nanochat.model.loss import softcap_cross_entropy
from nanochat.training import recipe

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 540
LAST_LINES = 15  # shown of a part that failed
PYTHON = sys.executable


@dataclass(frozen=True)
class Part:
    """One thing to find out: `commands` run one after another, within `seconds` together."""

    name: str
    about: str
    seconds: int
    commands: Callable[[bool], list[list[str]]]  # given whether sizes are tiny
    needs: tuple[str, ...] = ()  # packages
    needs_gpu: bool = False


@dataclass
class Outcome:
    """What became of a part; `figures` are the JSON lines its commands printed."""

    name: str
    status: str  # "passed", "failed", "out of time", "skipped"
    seconds: float = 0.0
    reason: str = ""
    figures: list[dict] = field(default_factory=list)


def dev(script: str, *flags: object) -> list[str]:
    return [PYTHON, f"dev/{script}.py", *map(str, flags)]


def train(tiny: bool, *depths: int, rows: int = 32, flags: tuple[str, ...] = ()) -> list[str]:
    size = ("--sequence-len", 64, "--device-batch-size", 2, "--total-batch-size", 128, "--vocab-size", 512)
    if not tiny:
        size = ("--sequence-len", 2048, "--device-batch-size", rows, "--total-batch-size", 524288, "--steps", 10)
    return dev("bench_train", "--depth", *((2,) if tiny else depths), *size, *flags)


def engine(tiny: bool, depth: int, *batches: int) -> list[str]:
    size = ("--prompt", 16, "--new-tokens", 8, "--vocab-size", 512, "--batch", 2)
    if not tiny:
        size = ("--prompt", 256, "--new-tokens", 128, "--batch", *batches)
    common = ("--against", "--samples", 0, "--quality-tokens", 0, "--repeats", 1)
    return dev("bench_engine", "--depth", 2 if tiny else depth, *size, *common)


def serve(tiny: bool) -> list[str]:
    size = ("--depth", 2, "--clients", 1, 4, "--reply-tokens", 8) if tiny else ("--depth", 12, "--clients", 1, 64)
    return dev("bench_serve", *size)


def inner(name: str, *launcher: str) -> Callable[[bool], list[list[str]]]:
    """The command that runs a part written in this file."""
    return lambda tiny: [[PYTHON, *launcher, "dev/gpu_check.py", "--inner", name, *(["--tiny"] if tiny else [])]]


def gpu_tests(tiny: bool) -> list[list[str]]:
    return [[PYTHON, "-m", "pytest", "-q", "-m", "gpu", "tests"]]


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1")
PARTS = [
    Part("tests", "tests marked gpu", 90, gpu_tests, ("pytest",), needs_gpu=True),
    Part(
        "train", "training speed at d12 with windows, with full attention", 120,
        lambda tiny: [train(tiny, 12), train(tiny, 12, flags=("--window-pattern", "L"))],
    ),
    Part("pipeline", "all stages on generated text, pretraining killed and resumed", 180, inner("pipeline")),
    Part(
        "engine", "decode and prefill at d12 and d20", 90,
        lambda tiny: [engine(tiny, 12, 1, 32, 128), engine(tiny, 20, 1, 32, 128)],
    ),
    Part("deep", "training speed at d20 and d24", 120, lambda tiny: [train(tiny, 20, 24, rows=16)]),
    Part("attention", "attention backends alone", 60, inner("attention")),
    Part("loss", "the loss alone", 40, inner("loss")),
    Part("memory", "estimated memory beside measured at d12", 60, inner("memory"), needs_gpu=True),
    Part("nccl", "the optimizer with one rank under torchrun", 60, inner("nccl", *TORCHRUN)),
    Part("serve", "the server under load", 60, lambda tiny: [serve(tiny)], ("fastapi", "uvicorn")),
]  # fmt: skip


# --- running parts -------------------------------------------------------------------------------


def run_part(part: Part, *, tiny: bool, seconds_left: float) -> Outcome:
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing or (part.needs_gpu and not torch.cuda.is_available()):
        return Outcome(part.name, "skipped", reason=f"needs {', '.join(missing) or 'a CUDA device'}")
    limit = min(part.seconds, seconds_left)
    if limit < 10:
        return Outcome(part.name, "skipped", reason="no time left")
    begin, outcome = time.perf_counter(), Outcome(part.name, "passed")
    for command in part.commands(tiny):
        left = limit - (time.perf_counter() - begin)
        status, lines = run_command(command, left)
        outcome.figures += [json.loads(line) for line in lines if line.startswith("{")]
        if status != "passed":
            outcome.status, outcome.reason = status, "\n".join(list(lines)[-LAST_LINES:])
            break
    outcome.seconds = time.perf_counter() - begin
    return outcome


def run_command(command: list[str], seconds: float) -> tuple[str, deque[str]]:
    """Run a command within `seconds`, passing on what it prints; how it ended, and its last lines."""
    print(f"$ {' '.join(command)}", flush=True)
    lines: deque[str] = deque(maxlen=1000)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip

    def pass_on() -> None:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(f"  {line}", end="", flush=True)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        status = "passed" if process.wait(max(1.0, seconds)) == 0 else "failed"
    except subprocess.TimeoutExpired:
        status = "out of time"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    reader.join(5)
    return status, lines


# --- parts written here --------------------------------------------------------------------------


def pipeline(tiny: bool) -> None:
    """Every stage with a few steps, on text and conversations made here; pretraining is killed once and resumed."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCHAT_BASE_DIR"] = f"{folder}/base"
        texts, rng = Path(folder) / "texts", random.Random(0)
        texts.mkdir()
        words = ["".join(rng.choices("aeioulmnrst", k=rng.randrange(2, 9))) for _ in range(5000)]
        for number in range(40):
            (texts / f"{number}.txt").write_text(" ".join(rng.choices(words, k=20000)))
        data, few = ["--data", str(texts)], ["--eval-every", "4", "--eval-tokens", "8192"]
        size = ["--depth", "2", "--sequence-len", "128", "--head-dim", "64"]
        steps = ["--num-steps", "8", "--total-batch-size", "4096", "--save-every", "2"]
        num_steps = "6" if tiny else "200"  # enough for replies that differ in reward
        chat = ["--data", "small_world", "--num-steps", num_steps, "--total-batch-size", "4096", *few]
        base = ["scripts.base_train", *data, *size, *few, *steps]
        stage("nanochat.report", "reset")
        stage("nanochat.data.dataset", *data)
        stage("scripts.tok_train", *data, "--vocab-size", "1024")
        kill_after_first_checkpoint(base, Path(folder) / "base" / "base_checkpoints" / "d2")
        stage(*base, "--resume")
        stage("scripts.base_loss", "--split-tokens", "8192")
        stage("scripts.mid_train", *chat)
        stage("scripts.chat_sft", *chat)
        stage("scripts.chat_eval", "-i", "sft", "--tasks", "small_world", "--max-problems", "8", "--max-tokens", "16")
        few_replies = ["--questions-per-step", "4", "--num-samples", "4", "--max-tokens", "16", "--eval-questions", "8"]
        stage("scripts.chat_rl", "--tasks", "SmallWorld-spelling", "--num-steps", "3", *few_replies)
        stage("scripts.chat_cli", "--source", "rl", "-p", "How are you?", "--max-tokens", "16")
        stage("nanochat.report", "generate")


def stage(module: str, *flags: str) -> None:
    begin = time.perf_counter()
    subprocess.run([PYTHON, "-m", module, *flags], cwd=ROOT, check=True)
    print(json.dumps({"stage": module, "seconds": round(time.perf_counter() - begin, 1)}), flush=True)


def kill_after_first_checkpoint(command: list[str], run: Path) -> None:
    process = subprocess.Popen([PYTHON, "-m", *command], cwd=ROOT)
    while process.poll() is None and not list(run.glob("step_*")):
        time.sleep(0.02)
    process.kill()
    process.wait()


def time_attention(tiny: bool) -> None:
    """Milliseconds and TFLOP/s of forward, and of forward and backward, of each backend; errors against float32."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cuda.enable_cudnn_sdp(False)  # as in every run
    B, T, H, D, short = (1, 64, 2, 16, 16) if tiny else (16, 2048, 12, 128, 512)
    generator = torch.Generator(device).manual_seed(0)
    inputs = [torch.randn(B, T, H, D, device=device, generator=generator).bfloat16().requires_grad_() for _ in "qkv"]
    for window in (None, short):
        reach = window or T
        visible = reach * (reach + 1) / 2 + (T - reach) * reach
        flops = 4 * B * H * D * visible  # of forward; backward has twice as many
        with torch.no_grad():
            first_row, reference = (x[:1].float() for x in inputs), attention.Backends("masked", "masked")
            exact = attention.causal_attention(*first_row, window=window, backends=reference)
        for backend in attention.BACKENDS:
            attend, options, figures = attention.causal_attention, {}, {"window": window, "backend": backend}
            try:
                choice = {"is_compiled": True, "wanted": backend}
                options["backends"] = attention.choose_backends(device, torch.bfloat16, D, T, **choice)
                if backend == ("flex" if window is None else "cudnn"):
                    continue  # it serves the other kind of layers
                if backend == "flex":
                    options["block_mask"] = attention.window_block_mask(T, short, device)
                if device.type == "cuda" and backend in ("flex", "sdpa"):  # the others gain nothing
                    attend = torch.compile(attend, dynamic=False)
                run = partial(attend, *inputs, window=window, **options)
                figures["error"] = (run()[:1].float() - exact).abs().max().item()
                for name, share, work in (("forward", 1, run), ("both", 3, lambda run=run: run().sum().backward())):
                    spent = milliseconds(work)
                    figures |= {f"{name}_ms": spent, f"{name}_tflops": share * flops / spent / 1e9}
            except Exception as error:  # a backend that does not run here is a finding, not a failure
                figures["failure"] = f"{type(error).__name__}: {error}"[:200]
            print(json.dumps(figures), flush=True)
    for is_allowed in (False, True):  # whether SDPA may take cuDNN, which plans for each new length
        torch.backends.cuda.enable_cudnn_sdp(is_allowed)
        batches = [torch.randn(4, H, 100 + 37 * n, D, device=device).bfloat16() for n in range(20)]
        begin = time.perf_counter()
        for x in batches:
            torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        spent = 1e3 * (time.perf_counter() - begin)
        print(json.dumps({"new_lengths": len(batches), "cudnn_allowed": is_allowed, "all_ms": spent}), flush=True)


def time_loss(tiny: bool) -> None:
    """Milliseconds and GB/s of the loss with its gradients; the logits are read and written once each."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    N, C, V = (64, 32, 512) if tiny else (32 * 2048, 768, 32768)
    hidden = torch.randn(N, C, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (0.02 * torch.randn(V, C, device=device)).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    spent = milliseconds(lambda: softcap_cross_entropy(hidden, weight, targets, softcap=15.0).backward())
    products = 6 * N * C * V / (spent / 1e3) / 1e12
    print(json.dumps({"rows": N, "channels": C, "vocab": V, "both_ms": spent, "tflops_of_products": products}))


def compare_memory(tiny: bool) -> None:
    """Peak memory of a few training steps at depth 12 beside what the plan expects."""
    rows, T = 32, 2048
    command = train(False, 12, flags=("--steps", "3"))
    ended = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    measured = json.loads(ended.stdout.splitlines()[-1])["results"][0]["peak_memory_gib"]
    config = GPTConfig.from_depth(12, vocab_size=32768, sequence_len=T)
    expected = recipe.training_bytes(config, num_gpus=1, device_batch_size=rows) / 2**30
    print(json.dumps({"measured_gib": measured, "expected_gib": expected, "ratio": expected / measured}))


def check_nccl(tiny: bool) -> None:
    """Collectives of the optimizer with one rank of a real process group."""
    import torch.distributed as dist

    from nanochat.common import init_runtime
    from nanochat.model.gpt import build_model
    from nanochat.training.optim import MuonAdamW, parameter_groups

    runtime = init_runtime()
    if not dist.is_initialized():  # one rank needs none for training
        dist.init_process_group("nccl" if runtime.is_cuda else "gloo")
    config = GPTConfig.from_depth(2, vocab_size=512, sequence_len=64)
    model = build_model(config, device=runtime.device, generator=torch.Generator(runtime.device).manual_seed(0))
    optimizer = MuonAdamW(parameter_groups(model))
    idx = torch.randint(512, (2, 64), device=runtime.device)
    model(idx, idx).backward()
    optimizer.step()
    total = torch.ones((), device=runtime.device)
    dist.all_reduce(total)
    print(json.dumps({"backend": dist.get_backend(), "ranks": total.item()}))
    dist.destroy_process_group()


INNER = {
    "pipeline": pipeline, "attention": time_attention, "loss": time_loss, "memory": compare_memory, "nccl": check_nccl,
}  # fmt: skip


def milliseconds(work: Callable[[], object], repeats: int = 10) -> float:
    """Of one call of `work`: the median of `repeats`, after three that do not count."""
    spent = []
    for number in range(repeats + 3):
        begin = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if number >= 3:
            spent.append(1e3 * (time.perf_counter() - begin))
    return sorted(spent)[repeats // 2]


# --- command -------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [part.name for part in PARTS]
    parser.add_argument("--parts", nargs="+", choices=names, default=names, help="in which order they run is fixed")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="for all parts together")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, also without a GPU")
    parser.add_argument("--inner", choices=list(INNER), help=argparse.SUPPRESS)
    return parser.parse_args()


def main(args: argparse.Namespace) -> int:
    if args.inner:
        INNER[args.inner](args.tiny)
        return 0
    if not torch.cuda.is_available() and not args.tiny:
        print("error: no CUDA device here; --tiny runs toy sizes on the CPU", file=sys.stderr)
        return 2
    deadline = time.perf_counter() + args.seconds
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(f"{device}, torch {torch.__version__}, Python {sys.version.split()[0]}", flush=True)
    outcomes = []
    for part in PARTS:
        if part.name not in args.parts:
            continue
        print(f"\n== {part.name}: {part.about}", flush=True)
        outcomes.append(run_part(part, tiny=args.tiny, seconds_left=deadline - time.perf_counter()))
        print(f"-- {part.name}: {outcomes[-1].status}\n{outcomes[-1].reason}".rstrip(), flush=True)
    print("\npart        status        seconds")
    for outcome in outcomes:
        print(f"{outcome.name:<11} {outcome.status:<12} {outcome.seconds:>8.1f}")
    print(json.dumps({"device": device, "torch": torch.__version__, "parts": [asdict(o) for o in outcomes]}))
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(parse_args()))
