"""Pretrain a base model on text, from the tokenizer and the shards of a data set.

Reads <base>/tokenizer and the data set's shards; writes checkpoints and metrics.jsonl under
<base>/base_checkpoints/<model tag>, and a record for the report.

    python -m scripts.base_train --depth 4 --sequence-len 256 --minutes 2 --data local            # a CPU
    python -m scripts.base_train --depth 12                                                        # one GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth 20 --run d20         # eight GPUs
"""

import argparse
import json
from dataclasses import asdict

import torch

from nanochat import hardware
from nanochat.checkpoint import check_tokenizer, resumable, run_dir
from nanochat.common import UserError, add_runtime_flags, from_rank0, init_runtime, print0, run_main
from nanochat.data.dataloader import TextLoader
from nanochat.data.dataset import DEFAULT_DATA, shard_paths
from nanochat.evals.core_bundle import fetch_bundle
from nanochat.evals.core_eval import evaluate_core
from nanochat.evals.loss_eval import SAMPLE_PROMPTS, evaluate_split, sample_completions
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.model.load import load_weights
from nanochat.tokenizer import Tokenizer, tokenizer_dir
from nanochat.training import recipe
from nanochat.training.loop import (
    DEVICE_BATCH_SIZE,
    TrainingRun,
    check_ranges,
    choose_device_batch,
    fitting_batch,
    make_optimizer,
    measure_tokens_per_second,
    wanted_device_batch,
)

EVAL_TOKENS = {"cuda": 20 * 2**19}
SMALL_EVAL_TOKENS = 2**17
MINUTES_SHARE = 0.85  # of --minutes that forward and backward get; the rest is the optimizer's and the loader's
SAMPLE_TOKENS = 16
DRY_RUN_GPU, DRY_RUN_GPUS = "H100", 8  # where the machine has none
FREE_ON_RESUME = {  # flags that may differ from those of the run being resumed
    "resume", "run", "device_type", "dtype", "device_batch_size", "no_compile", "eval_every", "eval_tokens",
    "core_every", "core_max_per_task", "sample_every", "save_every", "bundle", "dry_run", "gpu", "num_gpus",
    "vocab_size",
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runtime_flags(parser)
    add = parser.add_argument
    # runtime
    add("--run", default="", help="name of the run on wandb (default: no wandb)")
    add("--no-compile", action="store_true", help="run the model eagerly on a GPU too")
    add("--seed", type=int, default=42, help="of the initial weights")
    # model
    add("--depth", type=int, default=20, help="layers; width, heads and all else follow from it")
    add("--arch", default="recipe", choices=["recipe", "october-2025"], help="today's recipe, or the first release's")
    add("--sequence-len", type=int, default=2048, help="tokens per row")
    add("--head-dim", type=int, default=128, help="channels per attention head")
    add("--kv-ratio", type=int, default=1, help="query heads that share one key head")
    add("--window-pattern", default="", help="S for short and L for full attention, repeated over the layers")
    # data
    add("--data", default=DEFAULT_DATA, help="data set: hub repository, local folder, or 'local'")
    # horizon: one of these, or the default ratio
    add(
        "--token-ratio", type=float,
        help=f"training tokens per parameter of matrices and head (default: {recipe.TOKEN_RATIO:g}); for october-2025, "
        f"of all parameters (default: {recipe.OCTOBER_TOKEN_RATIO:g})",
    )  # fmt: skip
    add("--target-flops", type=float, help="total training FLOPs")
    add("--num-steps", type=int, help="optimizer steps")
    add("--minutes", type=float, help="minutes of training, at the speed measured at the start")
    # optimization
    add("--total-batch-size", type=int, default=0, help="tokens per optimizer step (default: derived)")
    add("--device-batch-size", type=int, default=0, help="rows per micro-step on each device (default: what fits)")
    add("--lr-mult", type=float, default=1.0, help="multiplies every learning rate")
    add("--weight-decay", type=float, default=recipe.MATRIX_WEIGHT_DECAY, help="of the matrices, for a d12 run")
    add("--warmup-steps", type=int, default=40, help="steps of linear warm-up, at most 5 %% of all")
    add("--warmdown-frac", type=float, default=0.65, help="share of the steps over which rates fall")
    add("--final-lr-frac", type=float, default=0.05, help="share of the rates left at the end")
    # evaluation, in steps; 0 is off
    add("--eval-every", type=int, default=250, help="bits per byte on the validation split")
    add("--eval-tokens", type=int, help="validation tokens, 0 for the whole split (default: what suits the device)")
    add("--core-every", type=int, default=0, help="CORE")
    add("--core-max-per-task", type=int, default=500, help="examples of each CORE task, 0 for all")
    add("--bundle", default="", help="CORE bundle: URL, zip file or folder (default: the public one)")
    add("--sample-every", type=int, default=0, help="sample texts")
    # output
    add("--model-tag", default="", help="name of the checkpoint folder (default: d<depth>)")
    add("--save-every", type=int, default=0, help="checkpoint period in steps; the last step is always saved")
    add("--resume", action="store_true", help="go on from the newest checkpoint of this tag, if there is one")
    # planning
    add("--dry-run", action="store_true", help="print what the run would take, and stop")
    add("--gpu", default="", help="kind of GPU the dry run reckons with (default: this machine's, else H100)")
    add("--num-gpus", type=int, help=f"and how many (default: this machine's, else {DRY_RUN_GPUS})")
    add("--vocab-size", type=int, default=0, help="for a dry run (default: the tokenizer's, else 32768)")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Raise `UserError` for flags that contradict each other or lie out of range."""
    horizons = [
        name for name in ("token_ratio", "target_flops", "num_steps", "minutes") if getattr(args, name) is not None
    ]
    if len(horizons) > 1:
        raise UserError(f"give one horizon, not {' and '.join('--' + name.replace('_', '-') for name in horizons)}")
    check_ranges(
        args,
        positive=("token_ratio", "target_flops", "num_steps", "minutes", "num_gpus"),
        zero_or_more=(
            "total_batch_size", "device_batch_size", "warmup_steps", "eval_every", "eval_tokens", "core_every",
            "core_max_per_task", "sample_every", "save_every", "lr_mult", "weight_decay",
        ),
        shares=("warmdown_frac", "final_lr_frac"),
    )  # fmt: skip


def model_config(args: argparse.Namespace, vocab_size: int) -> GPTConfig:
    derive = GPTConfig.from_depth if args.arch == "recipe" else GPTConfig.october_2025
    other = {"window_pattern": args.window_pattern} if args.window_pattern else {}
    return derive(
        args.depth, vocab_size=vocab_size, sequence_len=args.sequence_len, head_dim=args.head_dim,
        kv_ratio=args.kv_ratio, **other,
    )  # fmt: skip


def make_plan(args: argparse.Namespace, config: GPTConfig, num_ranks: int, speed: float | None) -> recipe.Plan:
    train_tokens = None
    if args.num_steps is None:
        train_tokens = recipe.horizon_tokens(
            config, token_ratio=args.token_ratio, target_flops=args.target_flops,
            minutes=args.minutes, tokens_per_second=speed,
        )  # fmt: skip
    return recipe.make_plan(
        config, train_tokens=train_tokens, num_steps=args.num_steps, total_batch_tokens=args.total_batch_size,
        batch_multiple=config.sequence_len * num_ranks, token_ratio=args.token_ratio,
        lr_mult=args.lr_mult, matrix_weight_decay=args.weight_decay,
    )  # fmt: skip


def dry_run(args: argparse.Namespace) -> None:
    """Print what a run with these flags takes, for people, and as a JSON line for scripts. Writes nothing."""
    if args.minutes:
        raise UserError("--dry-run cannot know the speed that --minutes measures; give another horizon")
    vocab_size = args.vocab_size
    if not vocab_size:
        vocab_size = Tokenizer.load(tokenizer_dir()).vocab_size if tokenizer_dir().exists() else 32768
    config = model_config(args, vocab_size)
    here = torch.cuda.is_available()
    gpu = torch.cuda.get_device_name() if here and not args.gpu else hardware.full_name(args.gpu or DRY_RUN_GPU)
    num_gpus = args.num_gpus or (torch.cuda.device_count() if here else DRY_RUN_GPUS)
    peak_flops = hardware.peak_flops(gpu, "bfloat16") or hardware.peak_flops(gpu, "float16")
    price, memory = hardware.gpu_hour_dollars(gpu), hardware.memory_bytes(gpu)

    # the plan, and micro-batches that should fit
    T = config.sequence_len
    plan = make_plan(args, config, num_gpus, None)
    wanted = args.device_batch_size or DEVICE_BATCH_SIZE["cuda"]
    fitting = recipe.fitting_rows(config, num_gpus=num_gpus, memory_bytes=memory, wanted=wanted) if memory else wanted
    is_fixed = bool(args.device_batch_size)
    num_rows, num_micro_steps = choose_device_batch(
        plan.total_batch_tokens, wanted if is_fixed else max(1, fitting), T, num_gpus, is_fixed=is_fixed
    )
    estimate = recipe.estimate(
        config, plan, num_gpus=num_gpus, device_batch_size=num_rows, peak_flops=peak_flops, gpu_hour_dollars=price,
        save_every=args.save_every,
    )  # fmt: skip
    fits = None if memory is None else estimate.gpu_bytes <= recipe.usable_bytes(memory)

    # in words, and for scripts
    counts = recipe.count_model(config).parameter_counts()
    tables, counted = counts["wte"] + counts["value_embeds"], recipe.scaling_parameters(config)
    hours, mid_hours = (cost_in_words(hours, num_gpus, price) for hours in (estimate.hours, estimate.mid_hours))
    lines = {
        "model": f"depth {args.depth}, {args.arch} architecture, vocabulary {vocab_size:,}",
        "parameters": f"{counts['total']:,}: matrices {counts['matrices']:,}, head {counts['head']:,}, "
        f"embeddings {tables:,}",
        "tokens": f"{plan.train_tokens:,}, {plan.train_tokens / counted:.1f} for each of {counted:,} parameters",
        "steps": f"{plan.num_steps:,} of {plan.total_batch_tokens:,} tokens = {num_micro_steps} x {num_rows} x {T} x "
        f"{num_gpus} (micro-steps, rows, length, GPUs)",
        "text": f"{estimate.num_shards} shards of {recipe.SHARD_BYTES / 1e6:.0f} MB",
        "disk": f"{estimate.disk_bytes / 1e9:.0f} GB with {estimate.num_checkpoints} checkpoints",
        "memory per GPU": memory_in_words(estimate.gpu_bytes, memory, fitting),
        f"{num_gpus} x {gpu}": f"assumed: {recipe.EXPECTED_MFU:.0%} of peak, "
        + ("price not known" if price is None else f"${price:.2f} per GPU hour ({hardware.PRICES_AS_OF})"),
        "pretraining": hours,
        "mid-training": f"{mid_hours}, about {recipe.MID_TOKENS / 1e6:.0f} million tokens",
        "not estimated": "tokenizer, finetuning, evaluation",
    }
    print0("\n".join(f"{name:<20} {text}" for name, text in lines.items()))
    facts = {"gpu": gpu, "num_gpus": num_gpus, "device_batch_size": num_rows, "num_micro_steps": num_micro_steps}
    print0(json.dumps({**asdict(plan), **asdict(estimate), **facts, "fits": fits, "parameters": counts["total"]}))


def memory_in_words(needed: int, memory: int | None, fitting: int) -> str:
    """What training takes of a GPU's memory, and what to do where that is too much; all but `fitting` rows in bytes."""
    if memory is None:
        return f"{needed / 2**30:.1f} GiB, of a GPU whose memory is not known"
    usable = recipe.usable_bytes(memory)
    if needed <= usable:
        return f"{needed / 2**30:.1f} GiB of {usable / 2**30:.1f} usable"
    remedy = f"--device-batch-size {fitting} should" if fitting else "take a larger one, more of them, or less --depth"
    return f"{needed / 2**30:.1f} GiB, but only {usable / 2**30:.1f} are usable: DOES NOT FIT; {remedy}"


def cost_in_words(hours: float | None, num_gpus: int, price: float | None) -> str:
    if hours is None:
        return "no estimate: the speed of this GPU is not known"
    return f"{hours:.2f} hours" + (f", ${hours * num_gpus * price:,.0f}" if price is not None else "")


def main(args: argparse.Namespace) -> None:
    # runtime
    check_args(args)
    if args.dry_run:
        dry_run(args)
        return
    folder = run_dir("base", args.model_tag or f"d{args.depth}")
    resumed = resumable(folder, args, FREE_ON_RESUME)
    stored = resumed.meta if resumed else {}
    runtime = init_runtime(args.device_type, args.dtype or stored.get("dtype", ""))
    device, dtype_name = runtime.device, str(runtime.dtype).removeprefix("torch.")
    print0(f"{runtime.world_size} x {device.type}, {dtype_name}, {folder.name}")

    # inputs
    tokenizer = Tokenizer.load(tokenizer_dir())
    if resumed:
        check_tokenizer(tokenizer, stored, resumed.folder)
    train_paths, val_paths = shard_paths(args.data, "train"), shard_paths(args.data, "val")

    # model
    config = model_config(args, tokenizer.vocab_size)
    if resumed:
        model = load_weights(resumed.folder, stored, runtime)
    else:
        generator = torch.Generator(device).manual_seed(args.seed)
        model = build_model(config, device=device, compute_dtype=runtime.dtype, generator=generator)
    if runtime.is_cuda and not args.no_compile:
        model.compile_trunk()
    counts = model.parameter_counts()
    print0(", ".join(f"{name} {count:,}" for name, count in counts.items()), "parameters")

    # optimizer; its memory is taken before the batch size is fitted to the rest
    optimizer = make_optimizer(model, runtime)

    # batch size and horizon
    if resumed:
        plan, fitting = recipe.Plan(**stored["plan"]), args.device_batch_size or stored["device_batch_size"]
    else:
        row_tokens = config.sequence_len * runtime.world_size
        wanted = wanted_device_batch(device, args.device_batch_size, args.total_batch_size, row_tokens)
        fitting = fitting_batch(model, wanted)
        speed = None
        if args.minutes:
            speed = MINUTES_SHARE * measure_tokens_per_second(model, fitting, runtime.world_size)
        optimizer.zero_grad()
        plan = from_rank0(make_plan(args, config, runtime.world_size, speed))
    device_batch_size, num_micro_steps = choose_device_batch(
        plan.total_batch_tokens, fitting, config.sequence_len, runtime.world_size, is_fixed=bool(args.device_batch_size)
    )
    print0(
        f"{plan.train_tokens:,} tokens: {plan.num_steps:,} steps of {plan.total_batch_tokens:,} = {num_micro_steps} x "
        f"{device_batch_size} x {config.sequence_len} x {runtime.world_size}, rates x {plan.lr_scale:.3f}, "
        f"weight decay {plan.matrix_weight_decay:.3f}"
    )

    # data
    loader = TextLoader(
        tokenizer, train_paths, device_batch_size, config.sequence_len,
        rank=runtime.rank, world_size=runtime.world_size, device=device,
    )  # fmt: skip
    eval_tokens = args.eval_tokens
    if eval_tokens is None:
        eval_tokens = EVAL_TOKENS.get(device.type, SMALL_EVAL_TOKENS)

    # schedules, and what a checkpoint has kept
    run = TrainingRun(
        folder, args, runtime, model, tokenizer, optimizer, loader, plan, device_batch_size, num_micro_steps, resumed
    )

    # the loop
    last = plan.num_steps
    for step in run.steps():
        # evaluate
        if run.is_due(step, args.eval_every):
            run.note_bpb(step, evaluate_split(model, tokenizer, val_paths, runtime, device_batch_size, eval_tokens))
        if run.is_due(step, args.core_every):
            core = evaluate_core(model, tokenizer, fetch_bundle(args.bundle), max_per_task=args.core_max_per_task).core
            run.note(step, core=core)
            print0(f"step {step:>5} | CORE {core:.4f}")

        # sample
        if run.is_due(step, args.sample_every) and runtime.is_main:
            texts = sample_completions(model, tokenizer, SAMPLE_PROMPTS, SAMPLE_TOKENS)
            run.results = {**run.results, "samples": [p + t for p, t in zip(SAMPLE_PROMPTS, texts, strict=True)]}
            print0("\n".join(run.results["samples"]))

        # save
        if run.is_due(step, args.save_every or last):
            run.save(step)

        # stop?
        if step == last:
            break

        # step, log
        run.take_step(step)

    # summary to the report
    loader.close()
    run.finish("base_train")


if __name__ == "__main__":
    run_main(main, parse_args)
