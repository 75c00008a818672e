"""Finetune a mid-trained model on conversations, evaluating it on chat tasks meanwhile.

Reads a checkpoint of mid-training and the data of the tasks, which are fetched once, or files of conversations; writes
checkpoints and metrics.jsonl under <base>/sft_checkpoints/<model tag>, and a record for the report. The loss is the
mean over the assistant's tokens of a whole step. Tasks are evaluated on validation splits only.

    python -m scripts.chat_sft --data mine.jsonl --device-type cpu                                 # a CPU
    python -m scripts.chat_sft                                                                     # one GPU
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --model-tag d20 --run sft      # eight GPUs
"""

import argparse
from collections.abc import Sequence

from nanochat.common import print0, run_main, together
from nanochat.engine.engine import Engine
from nanochat.evals.chat_eval import EvalSettings, check_task, evaluate_task
from nanochat.evals.chat_results import chat_core
from nanochat.flags import COUNT, FREE, RUN_FLAGS, ZERO_OR_MORE, Flag, free_on_resume, parse, shared
from nanochat.training.check_data import check_data
from nanochat.training.finetuning import check_source, start_run, validate_if_due
from nanochat.training.run import TrainingRun
from tasks.common import Task
from tasks.mixtures import MIXTURE, SFT_MIXTURES, Sources, load_corpus
from tasks.registry import get_task, task_names

BATCH_TOKENS = 2**15
CHAT_TASKS = "ARC-Easy|ARC-Challenge|MMLU|GSM8K|SpellingBee"  # all that have a validation split
CHAT_EVERY = 200  # when training on the mixture; with other data, the tasks would be fetched for this alone
ENGINE_ROWS = {"cuda": 128}  # answers generated at a time, by device
SMALL_ENGINE_ROWS = 16

FLAGS = {
    "model": shared("model_tag", "step", source="mid"),
    "data": shared("data", "skip_bad_rows", "check_data", "max_conversations", "seed"),
    "horizon": shared("epochs", "num_steps"),
    "optimization": (
        Flag("total_batch_size", int, 0, f"tokens per step, 0 for {BATCH_TOKENS}, or less for few conversations",
             ZERO_OR_MORE),
        *shared("device_batch_size", "weight_decay", "warmup_steps", "warmdown_frac", "final_lr_frac", lr_mult=0.1),
    ),
    "evaluation": (
        *shared("eval_tokens", eval_every=100),
        Flag("chat_every", int, None, "period in steps of the tasks, 0 for never "
             f"(default: {CHAT_EVERY} when training on the mixture, else 0)", **COUNT),
        Flag("chat_tasks", str, CHAT_TASKS, "tasks to evaluate meanwhile", metavar="TASK|TASK", **FREE),
        Flag("chat_max_problems", int, 200, "problems of each task, 0 for all", **COUNT),
        Flag("chat_max_tokens", int, 256, "longest generated answer in tokens", **COUNT),
    ),
    "checkpoints": shared("output_tag", *RUN_FLAGS),
    "runtime": shared("device_type", "dtype", "attention", "recompute", "no_compile", "run"),
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    return parse(__doc__, FLAGS)


def accuracies(run: TrainingRun, tasks: Sequence[Task], settings: EvalSettings) -> dict[str, float]:
    """Accuracy on each task, and the ChatCORE of them: the mean of the accuracies above guessing."""
    engine = None
    if any(task.kind == "generative" for task in tasks):
        max_rows = ENGINE_ROWS.get(run.runtime.device.type, SMALL_ENGINE_ROWS)
        engine = Engine(run.model, run.tokenizer, max_rows=max_rows)
    results = [evaluate_task(task, run.model, run.tokenizer, settings, engine=engine) for task in tasks]
    numbers = {f"val_{result.task}": result.accuracy.value for result in results}
    return numbers | {"val_tasks": chat_core(results).value}


def main(args: argparse.Namespace) -> None:
    # data
    if args.check_data:
        check_data(args, Sources(args.data, SFT_MIXTURES))
        return
    check_source(args)
    options = {"seed": args.seed, "max_conversations": args.max_conversations, "skip_bad_rows": args.skip_bad_rows}
    with together():
        train, val, examples = load_corpus(Sources(args.data, SFT_MIXTURES), **options)
    chat_every = args.chat_every
    if chat_every is None:
        chat_every = CHAT_EVERY if MIXTURE in args.data else 0
    settings = EvalSettings(max_problems=args.chat_max_problems, max_new_tokens=args.chat_max_tokens)
    names = task_names(args.chat_tasks) if chat_every else ()
    tasks = [get_task(name, purpose="validation") for name in names]
    with together():
        for task in tasks:
            check_task(task)

    # runtime, model, optimizer, schedules
    usual = {"total_batch_tokens": BATCH_TOKENS}
    run, val_rows = start_run("sft", args, free_on_resume(FLAGS), train, val, examples, **usual)

    # the loop
    for step in run.steps():
        # evaluate
        validate_if_due(run, val_rows, step)
        if chat_every and (step == 0 or run.is_due(step, chat_every)):
            numbers = accuracies(run, tasks, settings)
            run.note(step, **numbers)
            print0(f"step {step:>5} | " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))

        # save, step, log
        run.save_if_due(step)
        if step < run.plan.num_steps:
            run.take_step(step)

    # summary to the report
    run.finish("chat_sft")


if __name__ == "__main__":
    run_main(main, parse_args)
