"""Finetune a mid-trained model on conversations, watching the tasks it will be asked.

Reads a checkpoint of mid-training and the data of the tasks, which are fetched once, or files of conversations; writes
checkpoints and metrics.jsonl under <base>/sft_checkpoints/<model tag>, and a record for the report. The loss is the
mean over the assistant's tokens of a whole step. Tasks are watched on validation splits only.

    python -m scripts.chat_sft --data mine.jsonl --device-type cpu                                 # a CPU
    python -m scripts.chat_sft                                                                     # one GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --model-tag d20 --run sft      # eight GPUs
"""

import argparse
from collections.abc import Sequence

from nanochat.common import print0, run_main
from nanochat.engine.engine import Engine
from nanochat.evals.chat_eval import EvalSettings, check_task, evaluate_task
from nanochat.evals.chat_results import chat_core
from nanochat.training.finetuning import Defaults, add_chat_training_flags, check_chat_args, start_run
from nanochat.training.loop import TrainingRun
from tasks.common import Task
from tasks.mixtures import MIXTURE, SFT_MIXTURES, load_corpus
from tasks.registry import get_task, task_names

DEFAULTS = Defaults(
    source="mid", total_batch_tokens=2**15, lr_mult=0.1, warmdown_frac=1.0, final_lr_frac=0.0, eval_every=100
)
CHAT_TASKS = "ARC-Easy|ARC-Challenge|MMLU|GSM8K|SpellingBee"  # all that have a validation split
CHAT_EVERY = 200  # where the mixture is trained on; else the tasks would be fetched only to be watched
ENGINE_ROWS = {"cuda": 128}  # answers written at a time, by device
SMALL_ENGINE_ROWS = 16
CHAT_FLAGS = ("chat_every", "chat_max_problems", "chat_max_tokens")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_chat_training_flags(parser, DEFAULTS)
    add = parser.add_argument
    # evaluation, in steps; 0 is off
    add("--chat-every", type=int, help=f"tasks (default: {CHAT_EVERY} when training on the mixture, else 0)")
    add("--chat-tasks", default=CHAT_TASKS, metavar="TASK|TASK", help="tasks to watch (default: %(default)s)")
    add("--chat-max-problems", type=int, default=200, help="problems of each task, 0 for all")
    add("--chat-max-tokens", type=int, default=256, help="length of a written answer at most, in tokens")
    return parser.parse_args()


def accuracies(run: TrainingRun, tasks: Sequence[Task], settings: EvalSettings) -> dict[str, float]:
    """Accuracy on each task, and the mean over them with guessing counted as 0."""
    engine = None
    if any(task.kind == "generative" for task in tasks):
        max_rows = ENGINE_ROWS.get(run.runtime.device.type, SMALL_ENGINE_ROWS)
        engine = Engine(run.model, run.tokenizer, max_rows=max_rows)
    results = [evaluate_task(task, run.model, run.tokenizer, settings, engine=engine) for task in tasks]
    numbers = {f"val_{result.task}": result.accuracy.value for result in results}
    return numbers | {"val_tasks": chat_core(results).value}


def main(args: argparse.Namespace) -> None:
    # data
    check_chat_args(args, zero_or_more=CHAT_FLAGS)
    train, val = load_corpus(args.data, SFT_MIXTURES, seed=args.seed, max_conversations=args.max_conversations)
    chat_every = args.chat_every
    if chat_every is None:
        chat_every = CHAT_EVERY if MIXTURE in args.data else 0
    settings = EvalSettings(max_problems=args.chat_max_problems, max_new_tokens=args.chat_max_tokens)
    names = task_names(args.chat_tasks) if chat_every else ()
    tasks = [get_task(name, purpose="validation") for name in names]
    for task in tasks:
        check_task(task)

    # runtime, model, optimizer, schedules
    chat = start_run("sft", args, DEFAULTS, train, val, free_on_resume=("chat_tasks", *CHAT_FLAGS))
    run, last = chat.run, chat.run.plan.num_steps

    # the loop
    for step in run.steps():
        # evaluate
        if chat.is_due(step):
            chat.validate(step)
        if chat_every and (step == 0 or run.is_due(step, chat_every)):
            numbers = accuracies(run, tasks, settings)
            run.note(step, **numbers)
            print0(f"step {step:>5} | " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))

        # save
        if run.is_due(step, args.save_every or last):
            run.save(step)

        # stop?
        if step == last:
            break

        # step, log
        run.take_step(step)

    # summary to the report
    run.finish("chat_sft")


if __name__ == "__main__":
    run_main(main, parse_args)
