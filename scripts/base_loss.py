"""Bits per byte of a checkpoint on both splits, and samples of what it writes.

Reads a checkpoint and the shards of its training data; writes nothing but its record for the report.

    python -m scripts.base_loss --split-tokens 100000                      # a CPU
    python -m scripts.base_loss                                            # one GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss          # eight GPUs
"""

import argparse
import time
from functools import partial

import torch

from nanochat.checkpoint import add_checkpoint_flags
from nanochat.common import UserError, init_runtime, print0, run_main
from nanochat.data.run_shards import run_shards
from nanochat.evals.loss_eval import SAMPLE_PROMPTS, evaluate_split, sample_completions
from nanochat.flags import Parser, add_runtime_flags
from nanochat.model.load import load_model
from nanochat.records import append_record

SPLIT_TOKENS = {"cuda": 10_485_760}  # by device, where --split-tokens is not given: a minute or so at depth 20
OTHER_SPLIT_TOKENS = 524_288
SAMPLE_TEMPERATURE = 0.8


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    add = parser.add_argument_group("data").add_argument
    add("--data", default="", help="data set: hub repository or local folder (default: the checkpoint's)")
    add("--device-batch-size", type=int, default=8, help="rows of a batch on each device")
    add = parser.add_argument_group("evaluation").add_argument
    split_help = "tokens of each split, 0 for all of validation and as many training tokens (default: by device)"
    add("--split-tokens", type=int, help=split_help)
    add("--sample-tokens", type=int, default=32, help="length of each sample in tokens, 0 for no samples")
    add("--seed", type=int, default=42, help="random seed of the samples")
    add_runtime_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # runtime
    if args.device_batch_size < 1 or (args.split_tokens or 0) < 0 or args.sample_tokens < 0:
        given = f"{args.device_batch_size}, {args.split_tokens} and {args.sample_tokens}"
        raise UserError(
            f"--device-batch-size must be at least 1, --split-tokens and --sample-tokens at least 0, not {given}"
        )
    runtime = init_runtime(args.device_type, args.dtype)
    begin = time.perf_counter()

    # inputs
    loaded = load_model(args.source, runtime, model_tag=args.model_tag, step=args.step)
    model, tokenizer = loaded.model, loaded.tokenizer
    data = args.data or loaded.meta["args"].get("data")
    if not data:
        raise UserError(f"{loaded.folder} was imported: choose the text with --data")
    split_tokens = args.split_tokens
    if split_tokens is None:
        split_tokens = SPLIT_TOKENS.get(runtime.device.type, OTHER_SPLIT_TOKENS)
        print0(f"--split-tokens {split_tokens:,}")

    # bits per byte; with --split-tokens 0 as many training tokens as the whole validation split has
    paths, _ = run_shards(data, None if args.data else loaded.meta.get("shards"))
    num_tokens, results = split_tokens, {}
    for split in ("val", "train"):
        result = evaluate_split(model, tokenizer, paths[split], runtime, args.device_batch_size, num_tokens)
        size = f"{result.tokens:,} tokens, {result.bytes:,} bytes"
        print0(f"{split:<5} {result.bpb:.4f} +- {result.se:.4f} bits per byte over {size}")
        numbers = {"bpb": result.bpb, "bpb_se": result.se, "tokens": result.tokens, "bytes": result.bytes}
        results |= {f"{split}_{name}": number for name, number in numbers.items()}
        num_tokens = split_tokens or result.tokens

    # samples
    samples = []
    if args.sample_tokens and runtime.is_main:
        sample = partial(sample_completions, model, tokenizer, SAMPLE_PROMPTS, args.sample_tokens)
        texts = sample() + sample(temperature=SAMPLE_TEMPERATURE, generator=torch.Generator().manual_seed(args.seed))
        samples = [prompt + text for prompt, text in zip(SAMPLE_PROMPTS * 2, texts, strict=True)]
        print0("\n".join(samples))

    # output
    if runtime.is_main:
        results["elapsed_seconds"] = time.perf_counter() - begin
        settings = {**vars(args), "data": data, "split_tokens": split_tokens, "checkpoint": loaded.folder.name}
        append_record("base_loss", settings=settings, results=results, samples=samples)


if __name__ == "__main__":
    run_main(main, parse_args)
