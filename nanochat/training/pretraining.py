"""How pretraining begins: from flags to the model's config, the plan of the run, and what `--dry-run` prints.

Not here: the arithmetic behind a plan (`recipe.py`), and the loop (`scripts/base_train.py`).
"""

import argparse
import json
import os
from dataclasses import asdict

import torch

from nanochat import hardware
from nanochat.common import PROBE_SIZE, Runtime, UserError, from_rank0, matmul_seconds, print0
from nanochat.model.gpt import GPTConfig
from nanochat.tokenizer import Tokenizer, tokenizer_dir
from nanochat.training import recipe
from nanochat.training.loop import DEVICE_BATCH_SIZE, choose_device_batch, time_in_words

DRY_RUN_GPU, DRY_RUN_GPUS = "H100", 8  # where the machine has none
VOCAB_SIZES = {"recipe": 32768, "october-2025": 65536}  # of a dry run, by architecture
MAX_CPU_DAYS = 7.0
HORIZONS = ("token_ratio", "target_flops", "num_steps", "minutes")


def check_horizon(args: argparse.Namespace) -> None:
    """Raise `UserError` when more than one horizon is given, or one that a dry run cannot know."""
    given = [f"--{name.replace('_', '-')}" for name in HORIZONS if getattr(args, name) is not None]
    if len(given) > 1:
        raise UserError(f"give one horizon, not {' and '.join(given)}")
    if args.dry_run and args.minutes:
        raise UserError("--dry-run cannot know the speed that --minutes measures; give another horizon")


def model_config(args: argparse.Namespace, vocab_size: int) -> GPTConfig:
    derive = GPTConfig.from_depth if args.arch == "recipe" else GPTConfig.october_2025
    other = {"window_pattern": args.window_pattern} if args.window_pattern else {}
    shape = {name: getattr(args, name) for name in ("sequence_len", "head_dim", "kv_ratio")}
    return derive(args.depth, vocab_size=vocab_size, **shape, **other)


def make_plan(args: argparse.Namespace, config: GPTConfig, num_ranks: int, speed: float | None = None) -> recipe.Plan:
    """The plan for the horizon in `args`; `speed` in tokens a second is needed for `--minutes` only."""
    train_tokens = None
    if args.num_steps is None:
        budget = {name: getattr(args, name) for name in ("token_ratio", "target_flops", "minutes")}
        train_tokens = recipe.horizon_tokens(config, **budget, tokens_per_second=speed)
    return recipe.make_plan(
        config, train_tokens=train_tokens, num_steps=args.num_steps, total_batch_tokens=args.total_batch_size,
        batch_multiple=config.sequence_len * num_ranks, token_ratio=args.token_ratio, lr_mult=args.lr_mult,
        matrix_weight_decay=args.weight_decay,
    )  # fmt: skip


def check_cpu(args: argparse.Namespace, config: GPTConfig, runtime: Runtime) -> None:
    """Raise `UserError` for a run on a CPU that would not come to an end: for want of memory, or after more than
    `MAX_CPU_DAYS` at the full speed of its matrix products, which training does not reach. To be called before the
    model is made, which takes minutes where it is far too large."""
    if runtime.device.type != "cpu":
        return
    remedy = "take a GPU (--dry-run says what that takes), or less --depth: 4 suits two cores"
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    needed = num_local * recipe.training_bytes(config, num_gpus=runtime.world_size, device_batch_size=1)
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if needed > memory:
        found = f"needs {needed / 2**30:.0f} GiB of memory at least, and this machine has {memory / 2**30:.0f}"
        raise UserError(f"--depth {args.depth} {found}; {remedy}")
    if not args.minutes:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # several would wait for each other where other programs run
        flops_per_second = 2 * PROBE_SIZE**3 / from_rank0(matmul_seconds(runtime.dtype)) * threads * runtime.world_size
        torch.set_num_threads(threads)
        tokens = make_plan(args, config, runtime.world_size).train_tokens
        seconds = tokens * recipe.count_model(config).flops_per_token() / flops_per_second
        if seconds > MAX_CPU_DAYS * 86400:
            found = f"{tokens:,} tokens take {time_in_words(seconds)} or more on this CPU"
            raise UserError(f"--depth {args.depth}: {found}; {remedy}, or fewer steps (--num-steps, --minutes)")


def dry_run(args: argparse.Namespace) -> None:
    """Print what a run with these flags takes: a table for people, then a JSON line for scripts. Writes nothing."""
    vocab_size = args.vocab_size or VOCAB_SIZES[args.arch]
    config = model_config(args, vocab_size)
    here = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if here and not args.gpu else hardware.full_name(args.gpu or DRY_RUN_GPU)
    num_gpus = args.num_gpus or (torch.cuda.device_count() if here else DRY_RUN_GPUS)
    peak_flops = hardware.peak_flops(gpu, "bfloat16") or hardware.peak_flops(gpu, "float16")
    price, memory = hardware.gpu_hour_dollars(gpu), hardware.memory_bytes(gpu)

    # the plan, and micro-batches that should fit
    T = config.sequence_len
    plan = make_plan(args, config, num_gpus)
    wanted, is_fixed = args.device_batch_size or DEVICE_BATCH_SIZE["cuda"], bool(args.device_batch_size)
    shape = {"num_gpus": num_gpus, "recompute": args.recompute}
    fitting = recipe.fitting_rows(config, **shape, memory_bytes=memory, wanted=wanted) if memory else wanted
    num_rows, num_micro_steps = choose_device_batch(
        plan.total_batch_tokens, wanted if is_fixed else max(1, fitting), T, num_gpus, is_fixed=is_fixed
    )
    estimate = recipe.estimate(
        config, plan, **shape, device_batch_size=num_rows, peak_flops=peak_flops, gpu_hour_dollars=price,
        save_every=args.save_every,
    )  # fmt: skip
    fits = None if memory is None else estimate.gpu_bytes <= recipe.usable_bytes(memory)

    # in words, and for scripts
    counts = recipe.count_model(config).parameter_counts()
    tables, counted = counts["wte"] + counts["value_embeds"], recipe.scaling_parameters(config)
    dollars = "price not known" if price is None else f"${price:.2f} per GPU hour ({hardware.PRICES_AS_OF})"
    lines = {
        "model": f"depth {args.depth}, {args.arch} architecture, vocabulary {vocab_size:,}"
        + ("" if args.vocab_size else _vocabulary_in_words(vocab_size)),
        "parameters": f"{counts['total']:,}: matrices {counts['matrices']:,}, head {counts['head']:,}, "
        f"embeddings {tables:,}",
        "tokens": f"{plan.train_tokens:,}, {plan.train_tokens / counted:.1f} for each of {counted:,} parameters",
        "steps": f"{plan.num_steps:,} of {plan.total_batch_tokens:,} tokens = {num_micro_steps} x {num_rows} x {T} x "
        f"{num_gpus} (micro-steps, rows, length, GPUs)",
        "text": f"{estimate.num_shards} shards of {recipe.SHARD_BYTES / 1e6:.0f} MB",
        "disk": f"{estimate.disk_bytes / 1e9:.0f} GB with {estimate.num_checkpoints} checkpoints",
        "memory per GPU": _memory_in_words(estimate.gpu_bytes, memory, fitting, args.recompute),
        f"{num_gpus} x {gpu}": f"assumed: {recipe.EXPECTED_MFU:.0%} of peak, {dollars}",
    }
    if estimate.total_hours is None:
        lines["whole run"] = "no estimate: the speed of this GPU is not known"
    else:
        others = estimate.total_hours - estimate.hours - estimate.mid_hours
        lines["pretraining"] = f"{estimate.hours:.2f} hours"
        lines["mid-training"] = f"{estimate.mid_hours:.2f} hours, about {recipe.MID_TOKENS / 1e6:.0f} million tokens"
        lines["other stages"] = f"about {others:.2f} hours: tokenizer, finetuning, evaluation"
        cost = "" if estimate.dollars is None else f", ${estimate.dollars:,.0f}"
        lines["whole run"] = f"{estimate.total_hours:.1f} hours{cost}"
    print0("\n".join(f"{name:<20} {text}" for name, text in lines.items()))
    facts = {"gpu": gpu, "num_gpus": num_gpus, "device_batch_size": num_rows, "num_micro_steps": num_micro_steps}
    print0(json.dumps({**asdict(plan), **asdict(estimate), **facts, "fits": fits, "parameters": counts["total"]}))


def _vocabulary_in_words(vocab_size: int) -> str:
    """Why the dry run takes this vocabulary, and what the tokenizer in the base folder has, if that is another."""
    here = Tokenizer.load(tokenizer_dir()).vocab_size if tokenizer_dir().exists() else vocab_size
    return "" if here == vocab_size else f" (the usual one; for that of the tokenizer here: --vocab-size {here})"


def _memory_in_words(needed: int, memory: int | None, fitting: int, recompute: bool) -> str:
    """What training takes of a GPU's memory, and what to do when that is too much; `fitting` is in rows, 0 for none."""
    if memory is None:
        return f"{needed / 2**30:.1f} GiB, of a GPU whose memory is not known"
    usable = recipe.usable_bytes(memory)
    if needed <= usable:
        return f"{needed / 2**30:.1f} GiB of {usable / 2**30:.1f} usable"
    other = f"take {'' if recompute else '--recompute, '}a larger GPU, more of them, or less --depth"
    remedy = f"--device-batch-size {fitting} should" if fitting else other
    return f"{needed / 2**30:.1f} GiB, but only {usable / 2**30:.1f} are usable: DOES NOT FIT; {remedy}"
