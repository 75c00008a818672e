"""Training speed on synthetic tokens: a table, then one JSON line.

    python dev/bench_train.py --depth 4 --dtype float32 --sequence-len 512 --total-batch-size 16384     # a CPU
    python dev/bench_train.py --depth 12 20 24 --total-batch-size 524288                                 # a GPU
    python dev/bench_train.py --depth 6 --steps 200 --save-every 20 --blocking                       # with checkpoints

For each depth: time until the first optimizer step is done (model, compilation, data), tokens per second (median over
the later half of the steps, optimizer included), share of peak, seconds of an optimizer step alone, loss of a fixed
batch, peak memory beside what the plan expects of a GPU. On a GPU, peak is the data sheet's; on a CPU it is the rate of
a 1024^3 matrix product of the same dtype, the faster of one measured before and one after. With --save-every the mean
and the longest step matter: checkpoints go to a temporary folder, in the background unless --blocking.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from itertools import repeat
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat import hardware
from nanochat.common import init_runtime, matmul_seconds, run_main
from nanochat.data.dataloader import Batch
from nanochat.flags import add_flags, add_runtime_flags, shared
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.tokenizer import Tokenizer
from nanochat.training.loop import accumulate_gradients, fitting_batch, grad_accum_steps, make_optimizer
from nanochat.training.metrics import peak_memory_bytes
from nanochat.training.optim import MuonAdamW
from nanochat.training.recipe import training_bytes
from nanochat.training.saving import Saver

PRODUCT_SIZE = 1024


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runtime_flags(parser)
    parser.add_argument("--depth", type=int, nargs="+", default=[4, 6], help="depths to measure, one after another")
    parser.add_argument("--sequence-len", type=int, default=512)
    parser.add_argument("--vocab-size", type=int, default=32768)
    parser.add_argument("--device-batch-size", type=int, default=8, help="rows per micro-step")
    parser.add_argument("--total-batch-size", type=int, default=16384, help="tokens per optimizer step")
    parser.add_argument("--steps", type=int, default=6)
    add_flags(parser, shared("attention"))
    parser.add_argument("--window-pattern", default="SSSL", help="S for short and L for full attention, per layer")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--save-every", type=int, default=0, help="period in steps of checkpoints, 0 for none")
    parser.add_argument("--blocking", action="store_true", help="wait for each checkpoint until it is on the disk")
    parser.add_argument("--recompute", action="store_true", help="make the MLPs' activations again in backward")
    return parser.parse_args()


def measure(args: argparse.Namespace, runtime, depth: int) -> dict:
    """The numbers for one depth."""
    torch.compiler.reset()  # else the depths together pass the limit of eight variants, and run eagerly without a word
    if runtime.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    device, T = runtime.device, args.sequence_len
    product_rate = cpu_rate(runtime)
    started = time.perf_counter()
    config = GPTConfig.from_depth(depth, vocab_size=args.vocab_size, sequence_len=T, window_pattern=args.window_pattern)
    generator = torch.Generator(device).manual_seed(0)
    model = build_model(config, device=device, compute_dtype=runtime.dtype, generator=generator)
    if args.recompute:
        model.recompute_mlps()
    if runtime.is_cuda and not args.no_compile:
        model.compile_trunk()
    attention = model.choose_attention(args.attention)
    print(attention)
    optimizer = make_optimizer(model, runtime)  # first, as it changes what the trunk is compiled to
    rows = fitting_batch(model, args.device_batch_size)
    optimizer.zero_grad()
    num_micro_steps = grad_accum_steps(args.total_batch_size, rows, T, 1)
    tokens = torch.randint(args.vocab_size, (rows, T + 1), generator=torch.Generator().manual_seed(1)).to(device)
    batches = repeat(Batch(tokens[:, :-1], tokens[:, 1:], rows * T, 0))
    folder = tempfile.TemporaryDirectory()
    saver = Saver(Path(folder.name), runtime, keep_last=1, keep_every=0)
    tokenizer = Tokenizer.train(["some text"], 300)
    seconds = []
    for step in range(args.steps):
        loss = accumulate_gradients(model, batches, num_micro_steps, device=device)
        optimizer.step()
        optimizer.zero_grad()
        loss = loss.item()
        if not saver.is_writing:
            saver.finish()
        if args.save_every and step and step % args.save_every == 0:
            state = optimizer.state_dict()
            saver.start(step, model=model, tokenizer=tokenizer, meta={}, optimizer_state=state)
            if args.blocking:
                saver.finish()
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
    saver.finish()
    folder.cleanup()
    optimizer_seconds = seconds_of_optimizer(optimizer, runtime)
    speed = args.total_batch_size / statistics.median(seconds[len(seconds) // 2 :])
    flops = model.flops_per_token()
    estimated = training_bytes(config, num_gpus=1, device_batch_size=rows, recompute=args.recompute)
    if runtime.is_cuda:
        peak = hardware.peak_flops(torch.cuda.get_device_name(device), runtime.dtype)
    else:
        peak = max(product_rate, cpu_rate(runtime))
    return {
        "depth": depth, "parameters": model.parameter_counts()["total"], "attention": attention,
        "device_batch_size": rows, "first_step_seconds": seconds[0], "tokens_per_second": speed,
        "fastest_tokens_per_second": args.total_batch_size / min(seconds[1:]), "model_gflops": speed * flops / 1e9,
        "peak_gflops": peak / 1e9 if peak else None, "share_of_peak": speed * flops / peak if peak else None,
        "mean_step_seconds": statistics.mean(seconds[1:]), "longest_step_seconds": max(seconds[1:]),
        "optimizer_seconds": optimizer_seconds, "peak_memory_gib": peak_memory_bytes(runtime) / 2**30,
        "estimated_memory_gib": estimated / 2**30, "last_loss": loss,
    }  # fmt: skip


def seconds_of_optimizer(optimizer: MuonAdamW, runtime) -> float:
    """Of one step, with gradients of zero: the fastest of three. Several GPUs share this time."""
    seconds = []
    for _ in range(3):
        if runtime.is_cuda:
            torch.cuda.synchronize()
        started = time.perf_counter()
        optimizer.step()
        if runtime.is_cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def cpu_rate(runtime) -> float:
    """FLOP/s of a square matrix product on the CPU; 0 for other devices."""
    if runtime.device.type != "cpu":
        return 0.0
    return 2 * PRODUCT_SIZE**3 / matmul_seconds(runtime.dtype, PRODUCT_SIZE, repeats=10)


def main(args: argparse.Namespace) -> None:
    runtime = init_runtime(args.device_type, args.dtype, trains=True)
    print(f"{runtime.device.type}, {runtime.dtype}, T {args.sequence_len}, {args.total_batch_size} tokens a step")
    print("depth  first step s   tokens/s   GFLOP/s   share of peak   peak memory GiB")
    results = []
    for depth in args.depth:
        r = measure(args, runtime, depth)
        share = f"{r['share_of_peak']:.1%}" if r["share_of_peak"] else "unknown"
        print(f"{depth:>5} {r['first_step_seconds']:>13.2f} {r['tokens_per_second']:>10,.0f} {r['model_gflops']:>9,.0f}"
              f" {share:>15} {r['peak_memory_gib']:>17.2f}", flush=True)  # fmt: skip
        results.append(r)
    print(json.dumps({"settings": vars(args), "device": runtime.device.type, "torch": torch.__version__,
                      "results": results}))  # fmt: skip


if __name__ == "__main__":
    run_main(main, parse_args)
