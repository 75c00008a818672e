"""Serving speed with 1, 8 and 64 concurrent clients: a table, then one JSON line.

    python dev/bench_serve.py --depth 6 --dtype float32                                     # a CPU
    python dev/bench_serve.py --depth 20 --max-rows 64 --requests 4 --reply-tokens 256      # a GPU

Starts scripts/chat_web.py on a random model. Each client sends one request after another, with prompts of different
lengths and no common prefix; the first round of each setting is not counted. Columns: tokens per second of all replies
together; time from the request to the first text; time between tokens of a reply, (last - first text) / (tokens - 1);
what decoding has to read for that (`roofline.py`), as if all rows were always busy, and its share of the device's
bandwidth; for one client, the share of peak FLOPs that reading its prompts reaches until the first text.
The last row serves the same requests one at a time (`--max-rows 1`), which shows how much batching gains.
"""

import argparse
import asyncio
import json
import os
import random
import time
from itertools import count

import torch
from random_server import Answer, ask, percentile, random_server

from dev.roofline import ARCHITECTURES, Form, decode_bytes, peaks, prefill_flops, share, shown
from nanochat.common import DTYPES, UserError, choose_device, choose_dtype, run_main
from nanochat.engine.weights import INT8_MAX_ROWS

PROMPT_CHARS = (20, 60, 200, 600)  # about two characters per token


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--depth", type=int, default=6)
    add("--architecture", default="recipe", choices=ARCHITECTURES)
    add("--sequence-len", type=int, default=1024)
    add("--vocab-size", type=int, default=32768)
    add("--device-type", default="")
    add("--dtype", default="")
    add("--weights", default="")
    add("--num-gpus", type=int, default=1)
    add("--max-rows", type=int, default=16, help="replies written at a time")
    add("--clients", type=int, nargs="+", default=[1, 8, 64])
    add("--requests", type=int, default=2, help="requests of each client that are counted")
    add("--reply-tokens", type=int, default=64)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    print(
        "clients  max rows   tokens/s   first token s p50 / p99   between tokens ms p50 / p99"
        "    GB/s  bandwidth  of FLOPs"
    )
    results = []
    with serve(args, args.max_rows) as server:
        for clients in args.clients:
            results.append(measure(args, server.port, clients, args.max_rows))
    with serve(args, 1) as server:
        results.append(measure(args, server.port, max(args.clients), 1))
    gain = results[-2]["tokens_per_second"] / results[-1]["tokens_per_second"]
    print(f"batching gives {gain:.2f} times the tokens/s")
    print(json.dumps({"settings": vars(args), "cpu_count": os.cpu_count(), "results": results, "gain": gain}))


def serve(args: argparse.Namespace, max_rows: int):
    flags = ["--device-type", args.device_type, "--dtype", args.dtype, "--weights", args.weights]
    flags += ["--num-gpus", str(args.num_gpus), "--max-rows", str(max_rows), "--max-queue", "1000"]
    return random_server(args.depth, *flags, vocab_size=args.vocab_size, sequence_len=args.sequence_len,
                         architecture=args.architecture)  # fmt: skip


def measure(args: argparse.Namespace, port: int, clients: int, max_rows: int) -> dict:
    answers, seconds = asyncio.run(run_clients(args, port, clients))
    statuses = sorted({answer.status for answer in answers if not answer.is_complete})
    if statuses:
        raise UserError(f"some requests had no full answer, but the status {statuses}; --sequence-len may be too small")
    first = [answer.times[0] - answer.started for answer in answers]
    between = [(a.times[-1] - a.times[0]) / (a.num_tokens - 1) for a in answers if a.num_tokens > 1]
    result = {
        "clients": clients, "max_rows": max_rows, "requests": len(answers), "seconds": seconds,
        "tokens_per_second": sum(answer.num_tokens for answer in answers) / seconds,
        "first_token_seconds_p50": percentile(first, 0.5), "first_token_seconds_p99": percentile(first, 0.99),
        "between_tokens_seconds_p50": percentile(between, 0.5), "between_tokens_seconds_p99": percentile(between, 0.99),
    }  # fmt: skip
    result |= of_peak(args, answers, result, clients, min(clients, max_rows))
    print(f"{clients:>7} {max_rows:>9} {result['tokens_per_second']:>10,.1f}"
          f" {result['first_token_seconds_p50']:>17.3f} / {result['first_token_seconds_p99']:.3f}"
          f" {result['between_tokens_seconds_p50'] * 1e3:>18.1f} / {result['between_tokens_seconds_p99'] * 1e3:<6.1f}"
          f" {result['gb_per_second']:>7,.1f} {shown(result['share_of_bandwidth'], '.0%'):>10}"
          f" {shown(result['share_of_flops'], '.1%'):>9}",
          flush=True)  # fmt: skip
    return result


def of_peak(args: argparse.Namespace, answers: list[Answer], result: dict, clients: int, num_rows: int) -> dict:
    """What decoding `num_rows` at a time reads per second, and shares of the device's peaks; None where not known."""
    device = choose_device(args.device_type)
    dtype = DTYPES["float32" if args.weights == "int8" else args.weights or args.dtype or choose_dtype(device)]
    bandwidth, flops = peaks(torch.cuda.get_device_name() if device.type == "cuda" else "cpu", dtype)
    config = ARCHITECTURES[args.architecture](args.depth, vocab_size=args.vocab_size, sequence_len=args.sequence_len)
    is_packed = args.weights == "int8" and num_rows <= INT8_MAX_ROWS[device.type]
    form = Form(1 if is_packed else dtype.itemsize, dtype.itemsize)
    num_keys = sum(answer.num_prompt_tokens + answer.num_tokens / 2 for answer in answers) / len(answers)
    moved = decode_bytes(config, form, num_rows, num_keys) * result["tokens_per_second"] / num_rows
    read = sum(prefill_flops(config, answer.num_prompt_tokens) for answer in answers)
    waited = sum(answer.times[0] - answer.started for answer in answers)
    return {
        "gb_per_second": moved / 1e9, "share_of_bandwidth": share(moved, bandwidth),
        "share_of_flops": share(read / waited, flops) if clients == 1 else None,
    }  # fmt: skip


async def run_clients(args: argparse.Namespace, port: int, clients: int) -> tuple[list[Answer], float]:
    """The answers that count, and the seconds they took together."""
    rng, numbers = random.Random(clients), count()

    async def client(num_requests: int) -> list[Answer]:
        answers = []
        for _ in range(num_requests):
            text = f"{next(numbers)} " + "".join(rng.choices("abcdefgh ", k=rng.choice(PROMPT_CHARS)))
            body = {"messages": [{"role": "user", "content": text}], "max_tokens": args.reply_tokens}
            answers.append(await ask(port, body))
        return answers

    await asyncio.gather(*(client(1) for _ in range(min(clients, args.max_rows))))
    start = time.perf_counter()
    groups = await asyncio.gather(*(client(args.requests) for _ in range(clients)))
    return [answer for group in groups for answer in group], time.perf_counter() - start


if __name__ == "__main__":
    run_main(main, parse_args)
