"""Mid-train a base model on conversations: the chat format, tool calls, multiple choice, spelling, its own identity.

Reads a base checkpoint and the data of the tasks, which are fetched once, or files of conversations; writes checkpoints
and metrics.jsonl under <base>/mid_checkpoints/<model tag>, and a record for the report. As in finetuning, only the
assistant's text enters the loss; questions and tool results are context.

    python -m scripts.mid_train --data mine.jsonl --device-type cpu                                # a CPU
    python -m scripts.mid_train                                                                    # one GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --model-tag d20 --run mid     # eight GPUs
"""

import argparse

from nanochat.common import run_main, together
from nanochat.flags import RUN_FLAGS, ZERO_OR_MORE, Flag, free_on_resume, parse, shared
from nanochat.training.check_data import check_data
from nanochat.training.finetuning import check_source, start_run, validate_if_due
from tasks.mixtures import MID_MIXTURES, Sources, load_corpus

FLAGS = {
    "model": shared("model_tag", "step", source="base"),
    "data": shared("data", "skip_bad_rows", "check_data", "max_conversations", "seed"),
    "horizon": shared("epochs", "num_steps"),
    "optimization": (
        Flag("total_batch_size", int, 0, "tokens per step, 0 for the source's, or less for few conversations",
             ZERO_OR_MORE),
        *shared("device_batch_size", "lr_mult", "weight_decay", "warmup_steps", "final_lr_frac", warmdown_frac=0.5),
    ),
    "evaluation": shared("eval_tokens", eval_every=150),
    "checkpoints": shared("output_tag", *RUN_FLAGS),
    "runtime": shared("device_type", "dtype", "attention", "recompute", "no_compile", "run"),
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    return parse(__doc__, FLAGS)


def main(args: argparse.Namespace) -> None:
    # data
    if args.check_data:
        check_data(args, Sources(args.data, MID_MIXTURES))
        return
    check_source(args)
    options = {"seed": args.seed, "max_conversations": args.max_conversations, "skip_bad_rows": args.skip_bad_rows}
    with together():
        train, val, examples = load_corpus(Sources(args.data, MID_MIXTURES), **options)

    # runtime, model, optimizer, schedules
    run, val_rows = start_run("mid", args, free_on_resume(FLAGS), train, val, examples)

    # the loop: evaluate, save, step and log
    for step in run.steps():
        validate_if_due(run, val_rows, step)
        run.save_if_due(step)
        if step < run.plan.num_steps:
            run.take_step(step)

    # summary to the report
    run.finish("mid_train")


if __name__ == "__main__":
    run_main(main, parse_args)
