"""How the chat stages begin: the model they continue from, and the run of mid-training and finetuning.

These two differ in data, defaults and evaluation; everything else before their first step is here. Not here: the loops
(in the scripts), and what they share with pretraining (`loop.py`, `run.py`).
"""

import argparse
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint import fault_in, fetch, find_on_hosts, load_tokenizer, read_meta, resumable, run_dir, step_dir
from nanochat.common import Runtime, UserError, init_runtime, join_ranks, print0
from nanochat.data.chat_loader import ChatLoader, Conversations, Rows, pack_conversations, validation_batches
from nanochat.evals.loss_eval import evaluate_bpb
from nanochat.model.gpt import GPT
from nanochat.model.load import load_weights
from nanochat.tokenizer import Tokenizer
from nanochat.training import loop, schedule
from nanochat.training.recipe import Plan
from nanochat.training.run import TrainingRun

MIN_STEPS = 100  # a short run takes a smaller batch rather than fewer steps than this
EVAL_TOKENS = {"cuda": 2**21}  # by device
SMALL_EVAL_TOKENS = 2**16


@dataclass(frozen=True)
class Start:
    """Where a stage starts: the folder of its run, and the model it continues from with its tokenizer and meta.json.
    `resumed` is the same as `meta` if that is a checkpoint of this run, else empty."""

    folder: Path
    runtime: Runtime
    model: GPT
    tokenizer: Tokenizer
    meta: dict
    resumed: dict


def check_source(args: argparse.Namespace) -> None:
    """Join the other ranks, and raise `UserError` if there is no checkpoint to start from, before data are fetched for
    a stage that cannot begin. With `--resume` the run's own may do, which `load_start` sees to."""
    join_ranks(args.device_type)
    if not args.resume:
        find_on_hosts(args.source, model_tag=args.model_tag, step=args.step)


def load_start(stage: str, args: argparse.Namespace, free: Collection[str], *, compile_trunk: bool = False) -> Start:
    """Set up this process and load the checkpoint that `args` choose: the newest of the stage's own run if there is one
    and `--resume` is given, else that of the source.

    free: names of the flags that may differ from those of a resumed run. compile_trunk: on a GPU, compile the model;
    for stages whose micro-steps all have one shape.
    """
    join_ranks(args.device_type)
    source, rank = None, 0
    if not (args.output_tag or args.model_tag):
        source, rank = find_on_hosts(args.source, step=args.step)
    folder = run_dir(stage, args.output_tag or args.model_tag or source.parent.name)
    resumed = resumable(folder, args, free)
    runtime = init_runtime(args.device_type, args.dtype or resumed.get("dtype", ""), trains=True)
    if resumed:
        origin = step_dir(folder, resumed["step"])
    else:
        if source is None:
            source, rank = find_on_hosts(args.source, model_tag=args.model_tag, step=args.step)
        origin = source
        fetch(origin, rank)
        if fault := fault_in(origin):
            raise UserError(f"{origin} is damaged: {fault}; choose another with --step, or train it again")
    meta = resumed or read_meta(origin)
    model, tokenizer = load_weights(origin, meta, runtime), load_tokenizer(origin, meta)
    if args.recompute:
        model.recompute_mlps()
    if runtime.is_cuda and compile_trunk:
        model.compile_trunk()
    print0(f"{runtime}, {folder.name} from {origin.relative_to(origin.parents[2])}")
    print0(model.choose_attention(args.attention))
    return Start(folder, runtime, model, tokenizer, meta, resumed)


def start_run(
    stage: str, args: argparse.Namespace, free: Collection[str], train: Conversations, val: Conversations,
    examples: Sequence[str], *, total_batch_tokens: int = 0,
) -> tuple[TrainingRun, Rows | None]:  # fmt: skip
    """The run of a stage, "mid" or "sft", from the weights of its source or from its own last checkpoint, and the
    packed validation conversations (None: there are none).

    free: see `load_start`. examples: questions that the stage teaches, for the checkpoints. total_batch_tokens: the
    stage's usual batch; 0 is the one its source was pretrained with.
    Raises `UserError` if there is no source, a flag differs from that of the resumed run, or no conversation fits.
    """
    # runtime, model and tokenizer
    start = load_start(stage, args, free, compile_trunk=not args.no_compile)
    runtime, model, tokenizer = start.runtime, start.model, start.tokenizer

    # conversations
    T = model.config.sequence_len
    train_rows = pack_conversations(train, tokenizer, T)
    print0(f"training: {train_rows}")
    if not train_rows.rows:
        raise UserError(
            f"of {len(train)} conversations none fits the context of {T} tokens with its first answer; give shorter "
            f"ones, or a model with a longer context"
        )
    val_rows = pack_conversations(val, tokenizer, T) if args.eval_every else None
    print0(f"validation: {val_rows or 'off'}")

    # optimizer, before the batch size is fitted to the memory it leaves
    optimizer = loop.make_optimizer(model, runtime)

    # batch size and horizon
    if start.resumed:
        plan, fitting = Plan(**start.meta["plan"]), args.device_batch_size or start.meta["device_batch_size"]
    else:
        usual = total_batch_tokens or start.meta.get("plan", {}).get("total_batch_tokens")
        plan = make_plan(args, train_rows, usual or schedule.REFERENCE_BATCH_TOKENS, runtime.world_size)
        wanted = loop.wanted_device_batch(
            runtime.device, args.device_batch_size, plan.total_batch_tokens, T * runtime.world_size
        )
        fitting = loop.fitting_batch(model, wanted)
    device_batch_size, num_micro_steps = loop.choose_device_batch(
        plan.total_batch_tokens, fitting, T, runtime.world_size, is_fixed=bool(args.device_batch_size)
    )
    print0(
        f"{plan.num_steps:,} steps of {plan.total_batch_tokens:,} = {num_micro_steps} x {device_batch_size} x {T} x "
        f"{runtime.world_size}, rates x {plan.lr_scale:.3f}"
    )
    num_left = plan.num_steps - start.resumed.get("step", 0)
    loop.say_how_long(model, runtime, device_batch_size, num_left, plan.total_batch_tokens)
    loader = ChatLoader(
        train_rows, device_batch_size, rank=runtime.rank, world_size=runtime.world_size, device=runtime.device,
        epochs=None if args.num_steps else args.epochs, step_rows=plan.total_batch_tokens // T, seed=args.seed,
    )  # fmt: skip
    run = TrainingRun(
        start.folder, args, runtime, model, tokenizer, optimizer, loader, plan, device_batch_size, num_micro_steps,
        start.resumed, examples=examples,
    )  # fmt: skip
    return run, val_rows if val_rows and val_rows.rows else None


def validate_if_due(run: TrainingRun, val: Rows | None, step: int) -> None:
    """Every `--eval-every` steps, and at step 0 to see what the stage adds, log, print and keep the bits per byte of
    the assistant's text in the validation conversations."""
    if val is None or not (step == 0 or run.is_due(step, run.args.eval_every)):
        return
    num_tokens = run.args.eval_tokens
    if num_tokens is None:
        num_tokens = EVAL_TOKENS.get(run.runtime.device.type, SMALL_EVAL_TOKENS)
    batches = validation_batches(val, run.runtime, run.device_batch_size, num_tokens)
    found = evaluate_bpb(run.model, batches, run.tokenizer.token_bytes())
    if step == 0:
        run.note(step, start_val_bpb=found.bpb, start_val_bpb_se=found.se)
    run.note_bpb(step, found)


def make_plan(args: argparse.Namespace, rows: Rows, usual_batch_tokens: int, world_size: int) -> Plan:
    """Batch, steps and rates of a run over `rows`.

    A step has `--total-batch-size` tokens; or else `usual_batch_tokens`, halved while the epochs would take fewer than
    `MIN_STEPS` steps, and rounded up to whole rows on every rank. Raises `UserError` for a batch of less than a row.
    """
    T, num_rows = rows.sequence_len, args.epochs * len(rows.rows)
    total = args.total_batch_size
    if not total:
        total, multiple = usual_batch_tokens, T * world_size
        while num_rows * T < MIN_STEPS * total and total > multiple:
            total //= 2
        total = -(-total // multiple) * multiple
    if total < T:
        raise UserError(f"--total-batch-size {total} is less than a row of {T} tokens; take a multiple of {T}")
    num_steps = args.num_steps or -(-num_rows // (total // T))
    return Plan(num_steps, total, args.lr_mult * schedule.batch_lr_scale(total), args.weight_decay)
