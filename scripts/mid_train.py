"""Mid-train a base model on conversations: the chat format, tool calls, multiple choice, spelling, who it is.

Reads a base checkpoint and the data of the tasks, which are fetched once, or files of conversations; writes checkpoints
and metrics.jsonl under <base>/mid_checkpoints/<model tag>, and a record for the report. Only what the assistant says
is learned, as in finetuning: questions and results of tools are context.

    python -m scripts.mid_train --data mine.jsonl --device-type cpu                                # a CPU
    python -m scripts.mid_train                                                                    # one GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --model-tag d20 --run mid     # eight GPUs
"""

import argparse

from nanochat.common import run_main
from nanochat.training.finetuning import Defaults, add_chat_training_flags, check_chat_args, start_run
from tasks.mixtures import MID_MIXTURES, load_corpus

DEFAULTS = Defaults(
    source="base", total_batch_tokens=None, lr_mult=1.0, warmdown_frac=0.5, final_lr_frac=0.0, eval_every=150
)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_chat_training_flags(parser, DEFAULTS)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # data
    check_chat_args(args)
    train, val = load_corpus(args.data, MID_MIXTURES, seed=args.seed, max_conversations=args.max_conversations)

    # runtime, model, optimizer, schedules
    chat = start_run("mid", args, DEFAULTS, train, val)
    run, last = chat.run, chat.run.plan.num_steps

    # the loop
    for step in run.steps():
        # evaluate
        if chat.is_due(step):
            chat.validate(step)

        # save
        if run.is_due(step, args.save_every or last):
            run.save(step)

        # stop?
        if step == last:
            break

        # step, log
        run.take_step(step)

    # summary to the report
    run.finish("mid_train")


if __name__ == "__main__":
    run_main(main, parse_args)
