"""Pretrain a base model on text, from the tokenizer and the shards of a data set.

Reads <base>/tokenizer and the data set's shards; writes checkpoints and metrics.jsonl under
<base>/base_checkpoints/<model tag>, and a record for the report.

    python -m scripts.base_train --depth 4 --sequence-len 256 --minutes 2 --data local            # a CPU
    python -m scripts.base_train --depth 12                                                        # one GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth 20 --run d20         # eight GPUs
"""

import argparse

import torch

from nanochat.checkpoint import check_tokenizer, resumable, run_dir, step_dir
from nanochat.common import from_rank0, init_runtime, join_ranks, print0, run_main, together
from nanochat.data.dataloader import TextLoader
from nanochat.data.dataset import DEFAULT_DATA
from nanochat.data.run_shards import check_same_shards, run_shards
from nanochat.evals.core_bundle import fetch_bundle
from nanochat.evals.core_eval import evaluate_core
from nanochat.evals.loss_eval import SAMPLE_PROMPTS, evaluate_split, sample_completions
from nanochat.flags import COUNT, FREE, POSITIVE, RUN_FLAGS, ZERO_OR_MORE, Flag, free_on_resume, parse, shared
from nanochat.hosts import check_hosts_agree
from nanochat.model.gpt import build_model
from nanochat.model.load import load_weights
from nanochat.tokenizer import Tokenizer, tokenizer_dir
from nanochat.training import loop, pretraining, recipe
from nanochat.training.run import TrainingRun

EVAL_TOKENS = {"cuda": 20 * 2**19}
SMALL_EVAL_TOKENS = 2**17
MINUTES_SHARE = 0.85  # of --minutes for forward and backward; the rest is for optimizer and loader
SAMPLE_TOKENS = 16

FLAGS = {
    "model": (
        Flag("depth", int, 20, "layers; width, heads and all else follow from it"),
        Flag("arch", str, "recipe", "today's recipe, or the first release's", choices=("recipe", "october-2025")),
        Flag("sequence_len", int, 2048, "tokens per row, which is the model's context"),
        Flag("head_dim", int, 128, "channels per attention head"),
        Flag("kv_ratio", int, 1, "query heads that share one key head"),
        Flag("window_pattern", str, "", "S for short and L for full attention, repeated over the layers (default: that "
             "of the architecture)"),
        Flag("seed", int, 42, "random seed of the initial weights"),
    ),
    "data": (Flag("data", str, DEFAULT_DATA, "hub repository, local folder or file, or 'local'"),),
    "horizon, one of these": (
        Flag("token_ratio", float, None, "training tokens per parameter of matrices and head (default: "
             f"{recipe.TOKEN_RATIO:g}); for october-2025, of all parameters (default: {recipe.OCTOBER_TOKEN_RATIO:g})",
             POSITIVE),
        Flag("target_flops", float, None, "total training FLOPs (default: those of --token-ratio)", POSITIVE),
        Flag("num_steps", int, None, "optimizer steps (default: those of --token-ratio)", POSITIVE),
        Flag("minutes", float, None, "minutes of training, at the speed measured at the start (default: no limit)",
             POSITIVE),
    ),
    "optimization": (
        *shared("total_batch_size", "device_batch_size", "lr_mult"),
        Flag("weight_decay", float, recipe.MATRIX_WEIGHT_DECAY, "of the matrices, for a run of depth 12; others' "
             "follows from it", ZERO_OR_MORE),
        *shared("warmup_steps", warmdown_frac=0.65, final_lr_frac=0.05),
    ),
    "evaluation": (
        *shared("eval_tokens", eval_every=250),
        Flag("core_every", int, 0, "period in steps of CORE, 0 for never", **COUNT),
        Flag("core_max_per_task", int, 500, "examples of each CORE task, 0 for all", **COUNT),
        Flag("bundle", str, "", "CORE bundle: URL, zip file or folder (default: the public one)", **FREE),
        Flag("sample_every", int, 0, "period in steps of sample texts, 0 for never", **COUNT),
    ),
    "checkpoints": (
        Flag("model_tag", str, "", "name of the checkpoint folder (default: d and the depth)"),
        *shared(*RUN_FLAGS),
    ),
    "runtime": shared("device_type", "dtype", "attention", "recompute", "no_compile", "run"),
    "planning": (
        Flag("dry_run", bool, False, "print what the run would take, and stop", **FREE),
        Flag("gpu", str, "", "kind of GPU that --dry-run assumes (default: this machine's, else H100)", **FREE),
        Flag("num_gpus", int, None, "how many of them (default: this machine's, else 8)", POSITIVE, **FREE),
        Flag("vocab_size", int, 0, "tokens of the vocabulary that --dry-run assumes (default: the usual 32768, for "
             "october-2025 65536)", **FREE),
    ),
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    return parse(__doc__, FLAGS)


def main(args: argparse.Namespace) -> None:
    # runtime
    pretraining.check_horizon(args)
    if args.dry_run:
        pretraining.dry_run(args)
        return
    folder = run_dir("base", args.model_tag or f"d{args.depth}")
    join_ranks(args.device_type)
    resumed = resumable(folder, args, free_on_resume(FLAGS))
    runtime = init_runtime(args.device_type, args.dtype or resumed.get("dtype", ""), trains=True)
    device = runtime.device
    print0(f"{runtime}, {folder.name}")

    # inputs
    with together():
        tokenizer = Tokenizer.load(tokenizer_dir())
        if resumed:
            check_tokenizer(tokenizer, resumed, step_dir(folder, resumed["step"]))
        paths, shards = run_shards(args.data, resumed.get("shards"))
    check_hosts_agree("the tokenizer", {"vocabulary": tokenizer.fingerprint}, f"copy {tokenizer_dir()} there")
    check_same_shards(args.data, shards)

    # model
    config = pretraining.model_config(args, tokenizer.vocab_size)
    if resumed:
        model = load_weights(step_dir(folder, resumed["step"]), resumed, runtime)
    else:
        pretraining.check_cpu(args, config, runtime)
        generator = torch.Generator(device).manual_seed(args.seed)
        model = build_model(config, device=device, compute_dtype=runtime.dtype, generator=generator)
    if args.recompute:
        model.recompute_mlps()
    if runtime.is_cuda and not args.no_compile:
        model.compile_trunk()
    print0(model.choose_attention(args.attention))
    print0(", ".join(f"{name} {count:,}" for name, count in model.parameter_counts().items()), "parameters")

    # optimizer, before the batch size is fitted to the memory it leaves
    optimizer = loop.make_optimizer(model, runtime)

    # batch size and horizon
    if resumed:
        plan, fitting = recipe.Plan(**resumed["plan"]), args.device_batch_size or resumed["device_batch_size"]
    else:
        row_tokens = config.sequence_len * runtime.world_size
        wanted = loop.wanted_device_batch(device, args.device_batch_size, args.total_batch_size, row_tokens)
        fitting = loop.fitting_batch(model, wanted)
        speed = None
        if args.minutes:
            speed = MINUTES_SHARE * loop.measure_tokens_per_second(model, fitting, runtime.world_size)
        plan = from_rank0(pretraining.make_plan(args, config, runtime.world_size, speed))
    device_batch_size, num_micro_steps = loop.choose_device_batch(
        plan.total_batch_tokens, fitting, config.sequence_len, runtime.world_size, is_fixed=bool(args.device_batch_size)
    )
    print0(
        f"{plan.train_tokens:,} tokens: {plan.num_steps:,} steps of {plan.total_batch_tokens:,} = {num_micro_steps} x "
        f"{device_batch_size} x {config.sequence_len} x {runtime.world_size}, rates x {plan.lr_scale:.3f}, "
        f"weight decay {plan.matrix_weight_decay:.3f}"
    )
    num_left = plan.num_steps - resumed.get("step", 0)
    loop.say_how_long(model, runtime, device_batch_size, num_left, plan.total_batch_tokens)

    # data
    loader = TextLoader(
        tokenizer, paths["train"], device_batch_size, config.sequence_len, rank=runtime.rank,
        world_size=runtime.world_size, device=device,
    )  # fmt: skip
    eval_tokens = args.eval_tokens
    if eval_tokens is None:
        eval_tokens = EVAL_TOKENS.get(device.type, SMALL_EVAL_TOKENS)

    # schedules, and the state of a resumed run
    run = TrainingRun(
        folder, args, runtime, model, tokenizer, optimizer, loader, plan, device_batch_size, num_micro_steps, resumed,
        shards=shards,
    )  # fmt: skip

    # the loop
    for step in run.steps():
        # evaluate
        if run.is_due(step, args.eval_every):
            run.note_bpb(step, evaluate_split(model, tokenizer, paths["val"], runtime, device_batch_size, eval_tokens))
        if run.is_due(step, args.core_every):
            core = evaluate_core(model, tokenizer, fetch_bundle(args.bundle), max_per_task=args.core_max_per_task).core
            run.note(step, core=core)
            print0(f"step {step:>5} | CORE {core:.4f}")

        # sample
        if run.is_due(step, args.sample_every) and runtime.is_main:
            texts = sample_completions(model, tokenizer, SAMPLE_PROMPTS, SAMPLE_TOKENS)
            run.results = {**run.results, "samples": [p + t for p, t in zip(SAMPLE_PROMPTS, texts, strict=True)]}
            print0("\n".join(run.results["samples"]))

        # save, step, log
        run.save_if_due(step)
        if step < plan.num_steps:
            run.take_step(step)

    # summary to the report
    loader.close()
    run.finish("base_train")


if __name__ == "__main__":
    run_main(main, parse_args)
