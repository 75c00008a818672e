"""Everything one GPU can tell us, in one command of at most nine minutes and without a network.

    python dev/gpu_check.py                                   # all parts, the most telling first
    python dev/gpu_check.py --parts tests train --seconds 240 # some of them, in four minutes
    python dev/gpu_check.py --tiny                            # toy sizes, also on a CPU: checks this program itself

Each part runs in processes of its own with a time limit, and its output is passed on as it comes. A part that crashes
or runs out of time is reported with its last lines and stops no other part. Parts that time nothing run at once, those
that do run alone. Tables and one JSON line with the figures of all parts end the output. What this machine or this
version lacks (a GPU, fastapi, an attention backend, fp8) is skipped and said. Parts that nine minutes have no room for
come last; `--parts` runs them first thing.

Exit status: 0 when every part that ran passed, else 1.
"""

import argparse
import asyncio
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from itertools import repeat, takewhile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.common import Runtime, gather_ranks, init_runtime
from nanochat.data.dataloader import Batch
from nanochat.evals.core_bundle import BUNDLE_VARIABLE
from nanochat.model import attention
from nanochat.model.gpt import GPT, GPTConfig, build_model
from nanochat.model.loss import IGNORE_INDEX, softcap_cross_entropy
from nanochat.tokenizer import Tokenizer, tokenizer_dir
from nanochat.training.loop import accumulate_gradients, make_optimizer
from nanochat.training.optim import MuonAdamW, parameter_groups

ROOT = Path(__file__).resolve().parent.parent
TOTAL_SECONDS = 540
MIN_SECONDS = 10  # a part with less is not begun
LAST_LINES = 15  # shown of a command that failed
GRAVITY = ("skipped", "passed", "out of time", "failed")  # of a part's commands, the gravest counts
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
    times_nothing: bool = False  # so that it may run beside others
    may_lack: bool = False  # a command that ends with status 2 lacks a flag, a backend or a precision


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


def train(tiny: bool, depth: int, *flags: object, rows: int = 32, tokens: int = 524288, steps: int = 6) -> list[str]:
    size = ("--sequence-len", 64, "--device-batch-size", 2, "--total-batch-size", 128, "--vocab-size", 512)
    if not tiny:
        size = ("--sequence-len", 2048, "--device-batch-size", rows, "--total-batch-size", tokens, "--steps", steps)
    return dev("bench_train", "--depth", 2 if tiny else depth, *size, *flags)


def engine(tiny: bool, depth: int, *batches: int, weights: tuple[str, ...], architecture: str) -> list[str]:
    size = ("--prompt", 16, "--new-tokens", 8, "--vocab-size", 512, "--batch", 2, "--arrival-rows", 4, "--arrival", 300)
    if not tiny:
        size = ("--prompt", 256, "--new-tokens", 128, "--batch", *batches, "--arrival", 2000)
    size += ("--architecture", architecture, "--weights", *weights)
    common = ("--against", "--samples", 0, "--quality-tokens", 0, "--repeats", 1)
    return dev("bench_engine", "--depth", 2 if tiny else depth, *size, *common)


def serve(tiny: bool) -> list[str]:
    size = ("--depth", 2, "--clients", 1, 4, "--reply-tokens", 8)
    if not tiny:
        size = ("--depth", 12, "--max-rows", 64, "--clients", 1, 64)
    return dev("bench_serve", *size)


def inner(name: str, *launcher: str) -> Callable[[bool], list[list[str]]]:
    """The command that runs a part written in this file."""
    return lambda tiny: [[PYTHON, *launcher, "dev/gpu_check.py", "--inner", name, *(["--tiny"] if tiny else [])]]


def gpu_tests(tiny: bool) -> list[list[str]]:
    return [[PYTHON, "-m", "pytest", "-q", "-m", "gpu", "tests"]]


def memory(tiny: bool) -> list[list[str]]:
    """Two steps of two micro-batches each have all that a long run has. Parts before tell of d12 and d24 without the
    flag."""
    few = partial(train, tiny, steps=2)
    deep = [few(depth, "--recompute", rows=16, tokens=2 * 16 * 2048) for depth in (24, 20)]
    return [*deep, few(20, rows=16, tokens=2 * 16 * 2048), few(12, "--recompute", tokens=2 * 32 * 2048)]


def each_backend(tiny: bool) -> list[list[str]]:
    names = [name for name in attention.BACKENDS if name != "masked"]
    return [train(tiny, 12, "--attention", name) for name in names] + [train(tiny, 12, "--dtype", "fp8")]


TARGETS = (  # of the engine: key in `print_targets`, what, in which direction, figure
    ("rows 1", "d20, 1 row, tokens/s", ">=", 1500),
    ("rows 32", "d20, 32 rows, tokens/s", ">=", 20000),
    ("rows 128", "d20, 128 rows, tokens/s", ">=", 33000),
    ("read 128", "d20, 128 prompts of 256 tokens read, ms", "<=", 160),
    ("pause", "d20, 64 rows, a prompt of 2,000 arrives: pause, ms", "<=", 30),
    ("first pause", "the same for the first time, ms", "<=", 1000),
    ("gain", "64 clients over one after another, times tokens/s", ">=", 10),
    ("chat", "first token of the chat in a terminal, s", "<=", 10),
    ("server", "first token of the server, s", "<=", 10),
)
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node")
PARTS = [
    Part(
        "train", "training speed at d12 with windows, with full attention", 120,
        lambda tiny: [train(tiny, 12), train(tiny, 12, "--window-pattern", "L")],
    ),
    # beside one another
    Part("tests", "tests marked gpu", 180, gpu_tests, ("pytest",), needs_gpu=True, times_nothing=True),
    Part(
        "pipeline", "all stages on generated text, pretraining killed and resumed", 200, inner("pipeline"),
        times_nothing=True,
    ),
    Part("nccl", "collectives and a few steps, one rank", 90, inner("ranks", *TORCHRUN, "1"), times_nothing=True),
    Part("gloo", "the same, two ranks on one device", 120, inner("gloo", *TORCHRUN, "2"), times_nothing=True),
    Part("losses", "200 steps of the fast path beside the plain one", 150, inner("losses"), times_nothing=True),
    Part(
        "memory", "measured beside estimated, with --recompute and without", 200, memory, needs_gpu=True,
        times_nothing=True, may_lack=True,
    ),
    # alone
    Part("deep", "training speed at d24", 120, lambda tiny: [train(tiny, 24, rows=16, steps=4)]),
    Part(
        "fp8", "the same in 8 bits", 120, lambda tiny: [train(tiny, 24, "--dtype", "fp8", rows=16, steps=4)],
        may_lack=True,
    ),
    Part("loss", "the loss alone", 40, inner("loss")),
    Part("attention", "attention backends alone", 60, inner("attention")),
    Part("again", "a second start at d12, what is compiled being kept", 60, lambda tiny: [train(tiny, 12, steps=2)]),
    Part("core", "CORE on made-up questions at d12", 60, inner("core")),
    Part(
        "engine", "decode, prefill and the arrival of a long prompt at d20; d12 beside its ids in float32", 120,
        lambda tiny: [
            engine(tiny, 20, 1, 32, 128, weights=("bfloat16",), architecture="recipe"),
            engine(tiny, 12, 1, 32, 128, weights=("float32", "bfloat16"), architecture="october"),
        ],
    ),
    Part("start", "seconds until the first token of the chat and of the server", 90, inner("start"),
         ("fastapi", "uvicorn")),
    Part("backends", "training at d12 with each attention backend, and in 8 bits", 240, each_backend, may_lack=True),
    Part(
        "d20", "training speed at d20, and in 8 bits", 180,
        lambda tiny: [train(tiny, 20, *flags, rows=16, steps=4) for flags in ((), ("--dtype", "fp8"))], may_lack=True,
    ),
    Part("serve", "the server under load", 60, lambda tiny: [serve(tiny)], ("fastapi", "uvicorn")),
]  # fmt: skip


# --- running parts -------------------------------------------------------------------------------


def run_part(part: Part, *, tiny: bool, deadline: float) -> Outcome:
    """Run the commands of a part, each also where one before it failed, until `deadline` (of `time.perf_counter`)."""
    begin = time.perf_counter()
    outcome = Outcome(part.name, "skipped")
    end = min(begin + part.seconds, deadline)
    missing = [name for name in part.needs if importlib.util.find_spec(name) is None]
    if missing or (part.needs_gpu and not torch.cuda.is_available()):
        outcome.reason = f"needs {', '.join(missing) or 'a CUDA device'}"
    elif end - begin < MIN_SECONDS:
        outcome.reason = "no time left"
    else:
        print(f"\n== {part.name}: {part.about}", flush=True)
        for command in part.commands(tiny):
            status, lines = run_command(command, end - time.perf_counter(), part.name)
            outcome.figures += [json.loads(line) for line in lines if line.startswith("{")]
            is_lacking = status == "status 2" and part.may_lack
            if status != "passed":
                outcome.reason += "\n".join(list(lines)[-1 if is_lacking else -LAST_LINES :]) + "\n"
            if is_lacking:
                continue
            outcome.status = max(outcome.status, "failed" if status == "status 2" else status, key=GRAVITY.index)
            if status == "out of time":
                break
        outcome.seconds = time.perf_counter() - begin
    print(f"-- {part.name}: {outcome.status}\n{outcome.reason}".rstrip(), flush=True)
    return outcome


def run_command(command: list[str], seconds: float, label: str = "") -> tuple[str, deque[str]]:
    """Run a command within `seconds`, passing on what it prints behind the `label`; how it ended ("passed", "status 2",
    "failed" or "out of time"), and its last lines."""
    print(f"{label} $ {' '.join(command)}", flush=True)
    lines: deque[str] = deque(maxlen=1000)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace",
        start_new_session=True, env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )  # fmt: skip

    def pass_on() -> None:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            print(f"{label} | {line}", end="", flush=True)

    reader = threading.Thread(target=pass_on, daemon=True)
    reader.start()
    try:
        status = {0: "passed", 2: "status 2"}.get(process.wait(max(1.0, seconds)), "failed")
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
        texts = Path(folder) / "texts"
        texts.mkdir()
        for number in range(40):
            (texts / f"{number}.txt").write_text(made_up_text(number, 20000))
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


def made_up_text(seed: int, num_words: int) -> str:
    """Words of a language that has 5,000 of them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("aeioulmnrst", k=rng.randrange(2, 9))) for _ in range(5000)]
    return " ".join(random.Random(seed + 1).choices(words, k=num_words))


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
    """The loss with its gradients, in ms and TFLOP/s of its products; its kernel, in ms and GB/s of logits read
    once and written once."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    N, C, V = (64, 32, 512) if tiny else (32 * 2048, 768, 32768)
    hidden = torch.randn(N, C, device=device, dtype=torch.bfloat16).requires_grad_()
    weight = (0.02 * torch.randn(V, C, device=device)).requires_grad_()
    targets = torch.randint(V, (N,), device=device)
    loss = partial(softcap_cross_entropy, hidden, weight, targets, softcap=15.0)
    spent = milliseconds(lambda: loss().backward())
    products = 6 * N * C * V / (spent / 1e3) / 1e12
    figures = {"rows": N, "channels": C, "vocab": V, "both_ms": spent, "tflops_of_products": products}
    if device == "cuda":
        from nanochat.model.kernels import softcap_loss_

        logits = torch.randn(N // 16, V, device=device, dtype=torch.bfloat16)
        spent = milliseconds(lambda: softcap_loss_(logits, targets[: N // 16], V, 15.0, IGNORE_INDEX))
        figures |= {"kernel_ms": spent, "kernel_gb_per_second": 2 * logits.nbytes / (spent / 1e3) / 1e9}
    print(json.dumps(figures))


def make_model(config: GPTConfig, runtime: Runtime) -> GPT:
    generator = torch.Generator(runtime.device).manual_seed(0)
    return build_model(config, device=runtime.device, compute_dtype=runtime.dtype, generator=generator)


def check_ranks(tiny: bool, backend: str = "nccl") -> None:
    """The optimizer's collectives, then steps whose batch the ranks share, beside steps of one process with all of it.
    With gloo all ranks have the same device; NCCL refuses that."""
    dist.init_process_group(backend if torch.cuda.is_available() else "gloo")
    os.environ["LOCAL_RANK"] = "0"
    runtime = init_runtime()
    device, rank, size = runtime.device, runtime.rank, runtime.world_size
    for dtype in (torch.bfloat16, torch.float32):
        own = torch.ones(size, 8, device=device, dtype=dtype)
        exchanged, whole = torch.empty_like(own), own.new_empty(size * size, 8)
        dist.all_to_all_single(exchanged, own)
        dist.all_gather_into_tensor(whole, own)
        dist.all_reduce(own)
        assert (exchanged == 1).all(), exchanged
        assert (whole == 1).all(), whole
        assert (own == size).all(), own
    config = GPTConfig.from_depth(2, vocab_size=512, sequence_len=64 if tiny else 512)
    shape, generator = (2 * size, config.sequence_len), torch.Generator().manual_seed(0)
    idx = torch.randint(config.vocab_size, shape, generator=generator).to(device)

    def losses_of(runtime: Runtime) -> list[float]:
        model = make_model(config, runtime)
        optimizer = make_optimizer(model, runtime)
        rows = idx[runtime.rank :: runtime.world_size]
        batches, losses = repeat(Batch(rows, rows, rows.numel(), 0)), []
        for _ in range(5):
            loss = accumulate_gradients(
                model, batches, 2, device=device, world_size=runtime.world_size,
                before_last=optimizer.expect_last_backward,
            )  # fmt: skip
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        sums = gather_ranks(sum(p.double().sum().item() for p in model.parameters()))
        assert len(set(sums)) == 1, f"the ranks' parameters differ: {sums}"
        return losses

    shared, alone = losses_of(runtime), losses_of(replace(runtime, rank=0, world_size=1))
    largest = max(abs(a - b) for a, b in zip(shared, alone, strict=True))
    if rank == 0:
        found = {"backend": dist.get_backend(), "ranks": size, "losses": shared, "largest_difference": largest}
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()
    assert largest < 0.02 * alone[0], "the ranks together compute something else than one process"


def compare_losses(tiny: bool) -> None:
    """Losses of the fast path (compiled, the usual attention, our loss) beside those of the plain one (eager, attention
    with a mask, logits in float32), and beside the plain one in float32: the difference that rounding makes."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    depth, rows, T, steps = (2, 2, 64, 6) if tiny else (4, 16, 256, 200)
    config = GPTConfig.from_depth(depth, vocab_size=1024, sequence_len=T)
    generator = torch.Generator().manual_seed(0)
    successors = torch.randint(1024, (1024, 4), generator=generator)  # of each token; 1.39 nats are the least loss
    texts = torch.randint(1024, (steps, rows, 1), generator=generator)
    for choices in torch.randint(4, (T, steps, rows, 1), generator=generator):
        texts = torch.cat((texts, successors[texts[..., -1]].gather(-1, choices)), dim=-1)
    texts = texts.to(device)

    attend = partial(attention.causal_attention, backends=attention.Backends("masked", "masked"))

    def take_plain_gradients(model: GPT, batch: Batch) -> torch.Tensor:
        logits = model.logits(model.trunk(batch.idx, *model.rotary(T), attend=attend))  # (B, T, V) float32
        loss = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten())
        loss.backward()
        return loss.detach()

    def losses_of(dtype: torch.dtype, *, is_fast: bool) -> torch.Tensor:
        runtime = Runtime(0, 0, 1, device, dtype)
        model = make_model(config, runtime)
        optimizer = make_optimizer(model, runtime) if is_fast else MuonAdamW(parameter_groups(model), muon_dtype=dtype)
        if is_fast and runtime.is_cuda:
            model.compile_trunk()
        losses = []
        for text in texts:
            batch = Batch(text[:, :-1].contiguous(), text[:, 1:].contiguous(), rows * T, 0)
            if is_fast:
                losses.append(accumulate_gradients(model, iter([batch]), 1, device=device))
            else:
                losses.append(take_plain_gradients(model, batch))
            optimizer.step()
            optimizer.zero_grad()
        return torch.stack(losses).cpu()

    fast, plain = (losses_of(torch.bfloat16, is_fast=is_fast) for is_fast in (True, False))
    exact = losses_of(torch.float32, is_fast=False)
    ends = {name: losses[-max(1, steps // 4) :].mean().item() for name, losses in
            {"fast": fast, "plain": plain, "plain_float32": exact}.items()}  # fmt: skip
    found = {"steps": steps, "first_loss": plain[0].item(), "last_quarter": ends}
    found |= {"largest_difference": (fast - plain).abs().max().item()}
    found |= {"largest_by_rounding": (plain - exact).abs().max().item()}
    print(json.dumps(found), flush=True)
    spread = max(0.01, 2 * abs(ends["plain"] - ends["plain_float32"]))
    assert abs(ends["fast"] - ends["plain"]) < spread, "the fast path learns something else than the plain one"


def bench_core(tiny: bool) -> None:
    """dev/bench_core.py on a tokenizer and questions made here: ten shots, four choices of three words."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCHAT_BASE_DIR"] = f"{folder}/base"
        Tokenizer.train([made_up_text(0, 200_000)], 4096).save(tokenizer_dir())
        os.environ[BUNDLE_VARIABLE] = folder
        data = Path(folder) / "eval_data"
        data.mkdir()
        task = {"label": "words", "dataset_uri": "words.jsonl", "num_fewshot": [10], "icl_task_type": "multiple_choice"}
        (Path(folder) / "core.yaml").write_text(json.dumps({"icl_tasks": [task]}))  # JSON is YAML
        (Path(folder) / "eval_meta_data.csv").write_text("Eval Task,Random baseline\nwords,25\n")
        words = iter(made_up_text(1, 60_000).split())

        def take(count: int) -> str:
            return " ".join(next(words) for _ in range(count))

        questions = [{"query": take(60), "choices": [take(3) for _ in range(4)], "gold": 0} for _ in range(800)]
        (data / "words.jsonl").write_text("\n".join(map(json.dumps, questions)))
        size = ("--depth", 12, "--sequence-len", 2048, "--max-per-task", 400)
        if tiny:
            size = ("--depth", 2, "--max-per-task", 4)
        subprocess.run(dev("bench_core", "--ways", "fast,loop", *size), cwd=ROOT, check=True)


def time_start(tiny: bool) -> None:
    """Seconds from the start of the server, then of the chat in a terminal, to the first token; the disk is warm."""
    from random_server import ask, random_server

    size = {"vocab_size": 512, "sequence_len": 256} if tiny else {"vocab_size": 32768, "sequence_len": 2048}
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 16}
    with random_server(2 if tiny else 20, **size) as server:
        answer = asyncio.run(ask(server.port, body))
        print(json.dumps({"start": "server", "seconds": answer.times[0] - server.started}), flush=True)
        server.process.terminate()  # the chat is to have the machine for itself
        server.process.wait()
        begin = time.perf_counter()
        command = [PYTHON, "-m", "scripts.chat_cli", "--prompt", "Hello", "--max-tokens", "16"]
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as chat:
            chat.stdout.read(1)
            print(json.dumps({"start": "chat", "seconds": time.perf_counter() - begin}), flush=True)


INNER = {
    "pipeline": pipeline, "attention": time_attention, "loss": time_loss, "ranks": check_ranks,
    "gloo": partial(check_ranks, backend="gloo"), "losses": compare_losses, "core": bench_core, "start": time_start,
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
    outcomes: list[Outcome] = []
    waiting = [part for part in PARTS if part.name in args.parts]
    while waiting:
        together = list(takewhile(lambda part: part.times_nothing, waiting)) or waiting[:1]
        waiting = waiting[len(together) :]
        with ThreadPoolExecutor(len(together)) as pool:
            outcomes += pool.map(partial(run_part, tiny=args.tiny, deadline=deadline), together)
    print_tables(outcomes)
    if not args.tiny:
        print_targets([figure for outcome in outcomes for figure in outcome.figures])
    print(json.dumps({"device": device, "torch": torch.__version__, "parts": [asdict(o) for o in outcomes]}))
    return int(any(outcome.status in ("failed", "out of time") for outcome in outcomes))


def print_tables(outcomes: list[Outcome]) -> None:
    rows = [(o.name, f["settings"], r) for o in outcomes for f in o.figures for r in f.get("results", ())]
    print("\npart        depth  flags                 tokens/s   of peak  first step s    GiB  estimated")
    for name, settings, r in rows:
        if "first_step_seconds" in r:
            flags = f"{settings['window_pattern']} {settings['dtype']} {settings.get('attention', '')}"
            flags += " recompute" if settings.get("recompute") else ""
            share = f"{r['share_of_peak']:.1%}" if r["share_of_peak"] else "unknown"
            print(
                f"{name:<11} {r['depth']:>5}  {flags:<18} {r['tokens_per_second']:>11,.0f} {share:>9}"
                f" {r['first_step_seconds']:>13.1f} {r['peak_memory_gib']:>6.1f} {r['estimated_memory_gib']:>10.1f}"
            )
    print("\npart        status        seconds")
    for outcome in outcomes:
        print(f"{outcome.name:<11} {outcome.status:<12} {outcome.seconds:>8.1f}")


def print_targets(figures: list[dict]) -> None:
    """What was measured of the recipe's engine in bfloat16, beside what it shall reach on an H100."""
    found: dict[str, float] = {}
    for figure in figures:
        if "notes" in figure and figure["settings"]["architecture"] == "recipe":  # of bench_engine
            for row in figure["rows"]:
                found[f"rows {row['batch']}"] = row["decode_tokens_per_second"]["median"]
                tokens = row["batch"] * row["prompt"]
                found[f"read {row['batch']}"] = 1e3 * tokens / row["prefill_tokens_per_second"]["median"]
            for note in figure["notes"]:
                found |= {"pause": note["pause_ms"], "first pause": note["first_pause_ms"]}
        if "gain" in figure:
            found["gain"] = figure["gain"]
        if "start" in figure:
            found[figure["start"]] = figure["seconds"]
    print("\ntarget                                                      at      measured")
    for key, about, sign, target in TARGETS:
        if key in found:
            is_met = found[key] >= target if sign == ">=" else found[key] <= target
            print(f"{about:<54} {sign} {target:>7,}  {found[key]:>10,.1f}  {'met' if is_met else 'missed'}")


if __name__ == "__main__":
    sys.exit(main(parse_args()))
