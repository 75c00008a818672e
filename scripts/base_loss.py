"""Bits per byte of a checkpoint on both splits, and samples of what it writes.

Reads a checkpoint and the shards of its training data; writes nothing but its record for the report.

    python -m scripts.base_loss --split-tokens 100000                      # a CPU
    python -m scripts.base_loss                                            # one GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss          # eight GPUs
"""

import argparse
import time

import torch

from nanochat.checkpoint import add_checkpoint_flags
from nanochat.common import UserError, add_runtime_flags, init_runtime, print0, run_main
from nanochat.data.dataset import shard_paths
from nanochat.evals.loss_eval import SAMPLE_PROMPTS, BpbResult, evaluate_split, sample_completions
from nanochat.model.load import load_model
from nanochat.report import append_record

SPLIT_TOKENS = {"cuda": 10_485_760}  # by device, where --split-tokens is not given: a minute or so at depth 20
OTHER_SPLIT_TOKENS = 524_288
SAMPLE_TEMPERATURE = 0.8


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runtime_flags(parser)
    add = parser.add_argument
    # model
    add_checkpoint_flags(parser)
    # data
    add("--data", default="", help="data set: hub repository or local folder (default: the checkpoint's)")
    add("--device-batch-size", type=int, default=8, help="rows of a batch on each device")
    # evaluation
    add(
        "--split-tokens",
        type=int,
        default=None,
        help="tokens of each split, 0 for the whole validation split and as many training tokens "
        "(default: what suits the device)",
    )
    add("--sample-tokens", type=int, default=32, help="length of each sample in tokens, 0 for no samples")
    add("--seed", type=int, default=42, help="of the random samples")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # runtime
    if args.device_batch_size < 1 or (args.split_tokens or 0) < 0 or args.sample_tokens < 0:
        raise UserError(
            "--device-batch-size must be at least 1, --split-tokens and --sample-tokens at least 0, not "
            f"{args.device_batch_size}, {args.split_tokens} and {args.sample_tokens}"
        )
    runtime = init_runtime(args.device_type, args.dtype)
    begin = time.perf_counter()

    # inputs
    loaded = load_model(args.source, runtime, model_tag=args.model_tag, step=args.step)
    data = args.data or loaded.meta["args"]["data"]
    split_tokens = args.split_tokens
    if split_tokens is None:
        split_tokens = SPLIT_TOKENS.get(runtime.device.type, OTHER_SPLIT_TOKENS)
        print0(f"--split-tokens {split_tokens:,}")

    # bits per byte
    model, tokenizer = loaded.model, loaded.tokenizer
    val_paths, train_paths = shard_paths(data, "val"), shard_paths(data, "train")
    val = evaluate_split(model, tokenizer, val_paths, runtime, args.device_batch_size, split_tokens)
    print_split("val", val)
    train = evaluate_split(model, tokenizer, train_paths, runtime, args.device_batch_size, split_tokens or val.tokens)
    print_split("train", train)

    # samples
    samples = []
    if args.sample_tokens and runtime.is_main:
        greedy = sample_completions(model, tokenizer, SAMPLE_PROMPTS, args.sample_tokens)
        generator = torch.Generator().manual_seed(args.seed)
        random = sample_completions(
            model, tokenizer, SAMPLE_PROMPTS, args.sample_tokens, temperature=SAMPLE_TEMPERATURE, generator=generator
        )
        samples = [
            f"{prompt}{text}" for texts in (greedy, random) for prompt, text in zip(SAMPLE_PROMPTS, texts, strict=True)
        ]
        print0("\n".join(samples))

    # output
    if runtime.is_main:
        results = {
            "val_bpb": val.bpb,
            "val_bpb_se": val.se,
            "train_bpb": train.bpb,
            "train_bpb_se": train.se,
            "val_tokens": val.tokens,
            "train_tokens": train.tokens,
            "val_bytes": val.bytes,
            "train_bytes": train.bytes,
            "elapsed_seconds": time.perf_counter() - begin,
        }
        settings = {**vars(args), "data": data, "split_tokens": split_tokens, "checkpoint": loaded.folder.name}
        append_record("base_loss", settings=settings, results=results, samples=samples)


def print_split(split: str, result: BpbResult) -> None:
    size = f"{result.tokens:,} tokens, {result.bytes:,} bytes"
    print0(f"{split:<5} {result.bpb:.4f} +- {result.se:.4f} bits per byte over {size}")


if __name__ == "__main__":
    run_main(main, parse_args)
