"""Pretrain a base model on text, from the tokenizer and the shards of a data set.

Reads <base>/tokenizer and the data set's shards; writes checkpoints and metrics.jsonl under
<base>/base_checkpoints/<model tag>, and a record for the report.

    python -m scripts.base_train --depth 4 --sequence-len 256 --minutes 2 --data local            # a CPU
    python -m scripts.base_train --depth 12                                                        # one GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth 20 --run d20         # eight GPUs
"""

import argparse
import gc
import json
import math
from dataclasses import asdict

import torch

from nanochat import hardware, recipe, schedule
from nanochat.checkpoint import (
    check_tokenizer,
    load_rank_states,
    load_weights,
    resumable,
    run_dir,
    save_checkpoint,
)
from nanochat.common import DTYPES, Runtime, UserError, add_runtime_flags, from_rank0, init_runtime, print0, run_main
from nanochat.core_bundle import fetch_bundle
from nanochat.core_eval import evaluate_core
from nanochat.dataloader import TextLoader
from nanochat.dataset import DEFAULT_DATA, shard_paths
from nanochat.gpt import GPTConfig, build_model
from nanochat.loss_eval import SAMPLE_PROMPTS, evaluate_split, sample_completions
from nanochat.optim import MuonAdamW, parameter_groups
from nanochat.report import append_record
from nanochat.tokenizer import Tokenizer, tokenizer_dir
from nanochat.training import (
    LossScaler,
    MetricsLog,
    RunStats,
    StepLog,
    accumulate_gradients,
    apply_schedule,
    choose_device_batch,
    fitting_batch,
    is_due,
    measure_tokens_per_second,
    peak_memory_bytes,
    scale_rates,
)

DEVICE_BATCH_SIZE = {"cuda": 32}  # rows, by device; less where that does not fit
SMALL_DEVICE_BATCH_SIZE = 8  # elsewhere: activations that stay near the cache
EVAL_TOKENS = {"cuda": 20 * 2**19}
SMALL_EVAL_TOKENS = 2**17
MINUTES_SHARE = 0.85  # of --minutes that forward and backward get; the rest is the optimizer's and the loader's
SAMPLE_TOKENS = 16
FREE_ON_RESUME = {  # flags that may differ from those of the run being resumed
    "resume", "run", "device_type", "dtype", "device_batch_size", "no_compile", "eval_every", "eval_tokens",
    "core_every", "core_max_per_task", "sample_every", "save_every", "bundle", "dry_run", "num_gpus", "vocab_size",
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
    add("--token-ratio", type=float, help=f"training tokens per parameter (default: {recipe.TOKEN_RATIO})")
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
    add("--num-gpus", type=int, help="GPUs the dry run reckons with (default: the processes started)")
    add("--vocab-size", type=int, default=0, help="for a dry run without a tokenizer")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Raise `UserError` for flags that contradict each other or lie out of range."""
    horizons = [
        name for name in ("token_ratio", "target_flops", "num_steps", "minutes") if getattr(args, name) is not None
    ]
    if len(horizons) > 1:
        raise UserError(f"give one horizon, not {' and '.join('--' + name.replace('_', '-') for name in horizons)}")
    for name in ("token_ratio", "target_flops", "num_steps", "minutes", "num_gpus"):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be a number above 0, not {value}")
    zero_or_more = ("total_batch_size", "device_batch_size", "warmup_steps", "eval_every", "eval_tokens", "core_every")
    for name in (*zero_or_more, "core_max_per_task", "sample_every", "save_every", "lr_mult", "weight_decay"):
        value = getattr(args, name)
        if value is not None and not 0 <= value < math.inf:
            raise UserError(f"--{name.replace('_', '-')} must be a number of 0 or more, not {value}")
    for name in ("warmdown_frac", "final_lr_frac"):
        if not 0.0 <= getattr(args, name) <= 1.0:
            raise UserError(f"--{name.replace('_', '-')} must lie between 0 and 1, not {getattr(args, name)}")


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


def dry_run(args: argparse.Namespace, runtime: Runtime) -> None:
    """Print what a run with these flags takes, for people and as a JSON line for scripts."""
    if args.minutes:
        raise UserError("--dry-run cannot know the speed that --minutes measures; give another horizon")
    has_tokenizer = tokenizer_dir().exists()
    vocab_size = args.vocab_size or (Tokenizer.load(tokenizer_dir()).vocab_size if has_tokenizer else 32768)
    config = model_config(args, vocab_size)
    num_gpus = args.num_gpus or runtime.world_size
    plan = make_plan(args, config, num_gpus, None)
    estimate = recipe.estimate(
        config, plan, num_gpus=num_gpus, device_batch_size=args.device_batch_size or DEVICE_BATCH_SIZE["cuda"],
        peak_flops=hardware.peak_flops("H100 80GB HBM3", "bfloat16"),
        gpu_hour_dollars=hardware.gpu_hour_dollars("H100 80GB HBM3"),
    )  # fmt: skip
    counts = recipe.count_model(config).parameter_counts()
    print0(f"depth {args.depth}, vocabulary {vocab_size:,}: {counts['total']:,} parameters")
    print0(f"{plan.train_tokens:,} tokens in {plan.num_steps:,} steps of {plan.total_batch_tokens:,}")
    print0(f"{estimate.num_shards} shards, {estimate.disk_bytes / 1e9:.1f} GB of disk, "
           f"{estimate.gpu_bytes / 2**30:.1f} GiB per GPU")  # fmt: skip
    print0(f"on {num_gpus} H100 at {recipe.EXPECTED_MFU:.0%} of peak: {estimate.hours:.2f} hours, "
           f"about {estimate.dollars:.0f} dollars")  # fmt: skip
    print0(json.dumps({**asdict(plan), **asdict(estimate), "parameters": counts["total"]}))


def main(args: argparse.Namespace) -> None:
    # runtime
    check_args(args)
    run = run_dir("base", args.model_tag or f"d{args.depth}")
    resumed = None if args.dry_run else resumable(run, args, FREE_ON_RESUME)
    stored = resumed.meta if resumed else {}
    runtime = init_runtime(args.device_type, args.dtype or stored.get("dtype", ""))
    if args.dry_run:
        dry_run(args, runtime)
        return
    device, dtype_name = runtime.device, str(runtime.dtype).removeprefix("torch.")
    print0(f"{runtime.world_size} x {device.type}, {dtype_name}, {run.name}")

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
    optimizer = MuonAdamW(
        parameter_groups(model, matrix_lr=recipe.MATRIX_LR),
        rank=runtime.rank,
        world_size=runtime.world_size,
        muon_dtype=runtime.dtype,
    )

    # batch size and horizon
    if resumed:
        plan, fitting = recipe.Plan(**stored["plan"]), args.device_batch_size or stored["device_batch_size"]
    else:
        wanted = args.device_batch_size or DEVICE_BATCH_SIZE.get(device.type, SMALL_DEVICE_BATCH_SIZE)
        if args.total_batch_size:
            wanted = min(wanted, max(1, args.total_batch_size // (config.sequence_len * runtime.world_size)))
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

    # schedules
    scale_rates(optimizer, lr_scale=plan.lr_scale, matrix_weight_decay=plan.matrix_weight_decay)
    rates = schedule.lr_schedule(
        plan.num_steps, warmup_steps=args.warmup_steps, warmdown_frac=args.warmdown_frac, final_frac=args.final_lr_frac
    )
    scaler = LossScaler(enabled=runtime.dtype == DTYPES["float16"])
    stats = RunStats.for_runtime(runtime, plan.total_batch_tokens, model.flops_per_token())
    metrics = MetricsLog(run / "metrics.jsonl", runtime, run_name=args.run, settings=vars(args))
    first_step, results = 0, {}
    if resumed:
        optimizer.load_state_dict(load_rank_states(resumed.folder, stored, "optimizer"))
        loader.load_state_dict(load_rank_states(resumed.folder, stored, "loader"))
        first_step, results = stored["step"], stored["results"]
        scaler.restore(stored["scaler"])
        stats.restore(stored["stats"])
        print0(f"resumed at step {first_step:,}")
    metrics.rewind(first_step)
    log = StepLog(stats, metrics, plan.num_steps)

    # the loop
    last = plan.num_steps
    gc.collect()
    gc.freeze()  # what lives until the end need not be looked through again; collections paused training for 0.5 s
    for step in range(first_step, last + 1):
        periods = (args.eval_every, args.core_every, args.sample_every, args.save_every)
        if step == last or any(is_due(step, every, last) for every in periods):
            log.flush()
        is_new = step > first_step or not resumed  # what was done at the step of the checkpoint is not done again

        # evaluate
        if is_new and is_due(step, args.eval_every, last):
            bpb = evaluate_split(model, tokenizer, val_paths, runtime, device_batch_size, eval_tokens).bpb
            results = {**results, "val_bpb": bpb, "min_val_bpb": min(bpb, results.get("min_val_bpb", math.inf))}
            metrics.log(step=step, val_bpb=bpb, tokens=step * plan.total_batch_tokens)
            print0(f"step {step:>5} | validation {bpb:.4f} bits per byte")
        if is_new and is_due(step, args.core_every, last):
            core = evaluate_core(model, tokenizer, fetch_bundle(args.bundle), max_per_task=args.core_max_per_task).core
            results = {**results, "core": core}
            metrics.log(step=step, core=core)
            print0(f"step {step:>5} | CORE {core:.4f}")

        # sample
        if is_new and is_due(step, args.sample_every, last) and runtime.is_main:
            texts = sample_completions(model, tokenizer, SAMPLE_PROMPTS, SAMPLE_TOKENS)
            results = {**results, "samples": [p + t for p, t in zip(SAMPLE_PROMPTS, texts, strict=True)]}
            print0("\n".join(results["samples"]))

        # save
        if is_new and (is_due(step, args.save_every, last) or step == last):
            meta = {
                "args": vars(args), "plan": asdict(plan), "dtype": dtype_name, "results": results,
                "device_batch_size": device_batch_size, "stats": stats.state(), "scaler": scaler.state(),
            }  # fmt: skip
            folder = save_checkpoint(
                run, step, runtime=runtime, model=model, tokenizer=tokenizer, meta=meta,
                optimizer_state=optimizer.state_dict(), loader_state=loader.state_dict(),
            )  # fmt: skip
            print0(f"step {step:>5} | saved {folder.name}")

        # stop?
        if step == last:
            break

        # step
        log.start()
        lr_mult = rates(step)
        momentum, decay_mult = schedule.muon_momentum(step, rates), schedule.decay_mult(step, last)
        apply_schedule(optimizer, lr_mult=lr_mult, momentum=momentum, decay_mult=decay_mult)
        loss_t = accumulate_gradients(
            model, loader, num_micro_steps, device=device, world_size=runtime.world_size, loss_scale=scaler.scale
        )
        if scaler.unscale_(optimizer):
            optimizer.step()
        optimizer.zero_grad()

        # log
        log.end(step + 1, loss_t, lr_mult=lr_mult)

    # summary to the report
    gc.unfreeze()
    loader.close()
    metrics.finish()
    results |= {
        "train_loss": stats.smooth_loss, "num_parameters": counts["total"], "num_steps": last,
        "train_tokens": plan.train_tokens, "train_flops": plan.train_tokens * model.flops_per_token(),
        "tokens_per_second": stats.tokens_per_second, "mfu": stats.mfu, "train_seconds": stats.seconds,
        "peak_memory_bytes": peak_memory_bytes(runtime),
    }  # fmt: skip
    if runtime.is_main:
        samples = results.pop("samples", None)
        append_record(
            "base_train", settings={**vars(args), **asdict(plan), "dtype": dtype_name, "config": asdict(config)},
            results=results, samples=samples, metrics_path=metrics.path,
        )  # fmt: skip
    print0(f"done: {run.name}, {last:,} steps in {stats.seconds / 60:.1f} minutes of training")


if __name__ == "__main__":
    run_main(main, parse_args)
