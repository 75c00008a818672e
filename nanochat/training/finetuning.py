"""How mid-training and finetuning begin: their common flags, and from flags and conversations to a run.

The two stages differ in what they train on, in their defaults and in what they evaluate; the rest of the way to the
first step is here. Not here: the loop (in the scripts), and what pretraining has in common with it (`training.py`).
"""

import argparse
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint import (
    Resumable,
    add_checkpoint_flags,
    find_checkpoint,
    load_tokenizer,
    read_meta,
    resumable,
    run_dir,
)
from nanochat.common import Runtime, UserError, add_runtime_flags, from_rank0, init_runtime, print0
from nanochat.data.chat_loader import ChatLoader, Conversations, Rows, pack_conversations, validation_batches
from nanochat.evals.loss_eval import evaluate_bpb
from nanochat.model.gpt import GPT
from nanochat.model.load import load_weights
from nanochat.tokenizer import Tokenizer
from nanochat.training import recipe, schedule
from nanochat.training.loop import (
    TrainingRun,
    check_ranges,
    choose_device_batch,
    fitting_batch,
    make_optimizer,
    wanted_device_batch,
)

MIN_STEPS = 100  # a short run takes a smaller batch rather than fewer steps than this
EVAL_TOKENS = {"cuda": 2**21}
SMALL_EVAL_TOKENS = 2**16
FREE_ON_RESUME = frozenset({  # flags that may differ from those of the run being resumed
    "resume", "run", "device_type", "dtype", "device_batch_size", "no_compile", "eval_every", "eval_tokens",
    "save_every",
})  # fmt: skip


@dataclass(frozen=True)
class Defaults:
    """What a stage's flags are where the user says nothing. `total_batch_tokens` None is what the source was pretrained
    with."""

    source: str
    total_batch_tokens: int | None
    lr_mult: float
    warmdown_frac: float
    final_lr_frac: float
    eval_every: int


def add_run_flags(parser: argparse.ArgumentParser, *, source: str) -> None:
    """The flags of every stage that goes on from a checkpoint of `source`: runtime, model, output."""
    add_runtime_flags(parser)
    add = parser.add_argument
    # runtime
    add("--run", default="", help="name of the run on wandb (default: no wandb)")
    add("--seed", type=int, default=42, help="of the order of conversations, and of what is drawn")
    # model
    add_checkpoint_flags(parser, source=source)
    # output
    add("--output-tag", default="", help="name of the checkpoint folder (default: that of the source)")
    add("--save-every", type=int, default=0, help="checkpoint period in steps; the last step is always saved")
    add("--resume", action="store_true", help="go on from the newest checkpoint of this tag, if there is one")


def add_rate_flags(
    parser: argparse.ArgumentParser, *, lr_mult: float, warmdown_frac: float, final_lr_frac: float
) -> None:
    """The flags of the optimizer's rates, with a stage's defaults."""
    add = parser.add_argument
    add("--lr-mult", type=float, default=lr_mult, help="multiplies every learning rate")
    add("--weight-decay", type=float, default=0.0, help="of the matrices")
    add("--warmup-steps", type=int, default=40, help="steps of linear warm-up, at most 5 %% of all")
    add("--warmdown-frac", type=float, default=warmdown_frac, help="share of the steps over which rates fall")
    add("--final-lr-frac", type=float, default=final_lr_frac, help="share of the rates left at the end")


def add_chat_training_flags(parser: argparse.ArgumentParser, defaults: Defaults) -> None:
    """The flags of the stages that train on given conversations; those that pretraining has too mean the same there."""
    add_run_flags(parser, source=defaults.source)
    add = parser.add_argument
    # runtime
    add("--no-compile", action="store_true", help="run the model eagerly on a GPU too")
    # data
    add(
        "--data", nargs="+", default=["mixture"], metavar="FILE",
        help="conversations as JSON lines; the word 'mixture' stands for the stage's own (default: only that)",
    )  # fmt: skip
    add("--max-conversations", type=int, default=0, help="conversations to train on at most, 0 for all")
    # horizon
    add("--epochs", type=int, default=1, help="passes over the conversations")
    add("--num-steps", type=int, help="optimizer steps (default: those of the epochs)")
    # optimization
    batch = "the source's" if defaults.total_batch_tokens is None else f"{defaults.total_batch_tokens}"
    add(
        "--total-batch-size", type=int, default=0,
        help=f"tokens per optimizer step (default: {batch}, less for few conversations)",
    )  # fmt: skip
    add("--device-batch-size", type=int, default=0, help="rows per micro-step on each device (default: what fits)")
    add_rate_flags(
        parser, lr_mult=defaults.lr_mult, warmdown_frac=defaults.warmdown_frac, final_lr_frac=defaults.final_lr_frac
    )
    # evaluation, in steps; 0 is off
    add("--eval-every", type=int, default=defaults.eval_every, help="bits per byte on held-out conversations")
    add("--eval-tokens", type=int, help="validation tokens, 0 for all (default: what suits the device)")


def check_chat_args(args: argparse.Namespace, *, zero_or_more: Collection[str] = ()) -> None:
    """Raise `UserError` for flags out of range; `zero_or_more` names those of the stage itself."""
    common = (
        "max_conversations", "total_batch_size", "device_batch_size", "warmup_steps", "eval_every", "eval_tokens",
        "save_every", "lr_mult", "weight_decay",
    )  # fmt: skip
    check_ranges(
        args, positive=("epochs", "num_steps"), zero_or_more=(*common, *zero_or_more),
        shares=("warmdown_frac", "final_lr_frac"),
    )  # fmt: skip


@dataclass(frozen=True)
class ChatRun:
    """A run on conversations, ready for its loop, and the held-out ones in rows (None: there are none)."""

    run: TrainingRun
    val: Rows | None

    def is_due(self, step: int) -> bool:
        """Whether to validate at `step`: at the start too, as what a stage is worth is the difference to it."""
        return self.val is not None and (step == 0 or self.run.is_due(step, self.run.args.eval_every))

    def validate(self, step: int) -> None:
        """Log, print and keep the bits per byte of what the assistant says in the held-out conversations."""
        run, num_tokens = self.run, self.run.args.eval_tokens
        if num_tokens is None:
            num_tokens = EVAL_TOKENS.get(run.runtime.device.type, SMALL_EVAL_TOKENS)
        batches = validation_batches(self.val, run.runtime, run.device_batch_size, num_tokens)
        found = evaluate_bpb(run.model, batches, run.tokenizer.token_bytes())
        if step == 0:
            run.note(step, start_val_bpb=found.bpb, start_val_bpb_se=found.se)
        run.note_bpb(step, found)


@dataclass(frozen=True)
class Start:
    """Where a stage begins: `folder` of its run, the model it goes on from and that checkpoint's `meta`; `resumed` is
    set when that is one of its own."""

    folder: Path
    runtime: Runtime
    model: GPT
    tokenizer: Tokenizer
    meta: dict
    resumed: Resumable | None


def load_start(
    stage: str, args: argparse.Namespace, *, free_on_resume: Collection[str], compile_trunk: bool = False
) -> Start:
    """Set up this process, and load the checkpoint that `args` lead to: the last of the stage's own run with
    `--resume`, else that of the source. Flags but `free_on_resume` must be those of the run that is resumed.
    `compile_trunk` is for a GPU, where all micro-steps have one shape."""
    source = None if args.output_tag or args.model_tag else find_checkpoint(args.source, step=args.step)
    folder = run_dir(stage, args.output_tag or args.model_tag or source.parent.name)
    resumed = resumable(folder, args, free_on_resume)
    runtime = init_runtime(args.device_type, args.dtype or (resumed.meta["dtype"] if resumed else ""))
    if resumed:
        start, meta = resumed.folder, resumed.meta
    else:
        start = source or find_checkpoint(args.source, model_tag=args.model_tag, step=args.step)
        start = from_rank0(start)  # a new one may appear meanwhile
        meta = read_meta(start)
    model, tokenizer = load_weights(start, meta, runtime), load_tokenizer(start, meta)
    if runtime.is_cuda and compile_trunk:
        model.compile_trunk()
    dtype_name = str(runtime.dtype).removeprefix("torch.")
    print0(
        f"{runtime.world_size} x {runtime.device.type}, {dtype_name}, {folder.name} from "
        f"{start.relative_to(start.parents[2])}"
    )
    return Start(folder, runtime, model, tokenizer, meta, resumed)


def start_run(
    stage: str,
    args: argparse.Namespace,
    defaults: Defaults,
    train: Conversations,
    val: Conversations,
    *,
    free_on_resume: Collection[str] = (),
) -> ChatRun:
    """The run of a stage, "mid" or "sft": from the weights of its source, or where its last checkpoint stands.

    `free_on_resume` names flags of the stage itself that may change when it is resumed. Raises `UserError` for what
    the user can put right: no source, flags of another run, conversations that do not fit.
    """
    # runtime, model and tokenizer
    start = load_start(
        stage, args, free_on_resume=FREE_ON_RESUME | set(free_on_resume), compile_trunk=not args.no_compile
    )
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

    # optimizer; its memory is taken before the batch size is fitted to the rest
    optimizer = make_optimizer(model, runtime)

    # batch size and horizon
    if start.resumed:
        plan, fitting = recipe.Plan(**start.meta["plan"]), args.device_batch_size or start.meta["device_batch_size"]
    else:
        usual = defaults.total_batch_tokens or start.meta.get("plan", {}).get("total_batch_tokens")
        plan = make_plan(args, train_rows, usual or schedule.REFERENCE_BATCH_TOKENS, runtime.world_size)
        row_tokens = T * runtime.world_size
        fitting = fitting_batch(
            model, wanted_device_batch(runtime.device, args.device_batch_size, plan.total_batch_tokens, row_tokens)
        )
        optimizer.zero_grad()
    device_batch_size, num_micro_steps = choose_device_batch(
        plan.total_batch_tokens, fitting, T, runtime.world_size, is_fixed=bool(args.device_batch_size)
    )
    print0(
        f"{plan.num_steps:,} steps of {plan.total_batch_tokens:,} = {num_micro_steps} x {device_batch_size} x {T} x "
        f"{runtime.world_size}, rates x {plan.lr_scale:.3f}"
    )
    loader = ChatLoader(
        train_rows, device_batch_size, rank=runtime.rank, world_size=runtime.world_size, device=runtime.device,
        epochs=None if args.num_steps else args.epochs, step_rows=plan.total_batch_tokens // T, seed=args.seed,
    )  # fmt: skip
    run = TrainingRun(
        start.folder, args, runtime, model, tokenizer, optimizer, loader, plan, device_batch_size, num_micro_steps,
        start.resumed,
    )  # fmt: skip
    return ChatRun(run, val_rows if val_rows and val_rows.rows else None)


def make_plan(args: argparse.Namespace, rows: Rows, usual_batch_tokens: int, world_size: int) -> recipe.Plan:
    """Batch, steps and rates of a run over `rows`: `--total-batch-size` tokens a step, or `usual_batch_tokens`, halved
    as long as the epochs would be less than `MIN_STEPS` steps, and a whole number of rows on every rank.

    Raises `UserError` for a batch of less than a row.
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
    return recipe.Plan(
        num_steps=num_steps,
        total_batch_tokens=total,
        lr_scale=args.lr_mult * schedule.batch_lr_scale(total),
        matrix_weight_decay=args.weight_decay,
    )
