"""Chat tasks of a checkpoint: accuracies with confidence intervals, and ChatCORE.

Reads a checkpoint and the tasks' data, which are fetched once. Prints the table, and writes every prompt, answer and
verdict, as they come, to a JSON lines file for each task in `chat_eval/` in the work folder.

`--prompts standard` asks in plain text with worked examples, as published scores of base models were measured, whatever
the stage of the model. These results have names of their own ("MMLU 5-shot") and are no part of ChatCORE.

    python -m scripts.chat_eval -i sft -a "ARC-Easy|GSM8K" --max-problems 40       # minutes on a CPU
    python -m scripts.chat_eval -i sft                                             # one GPU, all six tasks
    python -m scripts.chat_eval -i base --prompts standard                         # to compare with published scores
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_eval -- -i sft        # eight GPUs
"""

import argparse
import hashlib
import json
import re
import time
from functools import partial

from tqdm import tqdm

from nanochat.checkpoint import SOURCES, add_checkpoint_flags
from nanochat.common import Runtime, UserError, base_dir, init_runtime, print0, run_main, together
from nanochat.engine.engine import Engine
from nanochat.evals.chat_eval import EvalSettings, check_task, evaluate_task, prepare_logs
from nanochat.evals.chat_results import ResultLog, TaskResult, chat_core
from nanochat.flags import Parser, add_runtime_flags
from nanochat.model.load import LoadedModel, load_model
from nanochat.records import append_record
from tasks.common import Task
from tasks.registry import SMALL_WORLD, STANDARD_NAMES, TASK_NAMES, get_standard_task, get_task, task_names

BATCH_ROWS = {"cuda": 128}  # by device, where --batch-rows is not given
OTHER_BATCH_ROWS = 16
# parts of a reply in the report's samples, as in the prompt
MARKED = {"python": "<|python_start|>{}<|python_end|>", "python_output": "<|output_start|>{}<|output_end|>"}


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser, source="")
    short = {"dest": "source", "choices": SOURCES, "default": argparse.SUPPRESS}
    parser.add_argument_group("model").add_argument("-i", **short, help="short for --source, with its default")
    add = parser.add_argument_group("data").add_argument
    tasks_help = f"tasks separated by |, {SMALL_WORLD} for the miniature's (default: {'|'.join(TASK_NAMES)})"
    add("-a", "--tasks", default="", metavar="TASK|TASK", help=tasks_help)
    add("--prompts", choices=("ours", "standard"), default="ours", help="how questions are put")
    add("--max-problems", type=int, default=0, help="problems of each task at most, always the same ones, 0 for all")
    add = parser.add_argument_group("evaluation").add_argument
    add("--temperature", type=float, default=0.0, help="randomness of written answers, 0 for greedy")
    add("--top-k", type=int, default=0, help="draw only from this many of the likeliest tokens, 0 for all")
    add("--max-tokens", type=int, default=512, help="longest written answer in tokens")
    add("--num-samples", type=int, default=1, help="written answers to each problem")
    add("--seed", type=int, default=42, help="random seed of the answers")
    add("--batch-rows", type=int, default=0, help="answers written at a time, 0 for what suits the device")
    add("--slow", action="store_true", help="one problem at a time without a cache, to check the fast paths")
    unsafe_help = "run the code that the model writes for HumanEval even where this system cannot isolate it"
    add("--allow-unsafe-execution", action="store_true", help=unsafe_help)
    resume_help = "keep earlier results and ask only what is missing, rather than replace them"
    parser.add_argument_group("output").add_argument("--resume", action="store_true", help=resume_help)
    add_runtime_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # runtime
    begin = time.perf_counter()
    if args.batch_rows < 0:
        raise UserError(f"--batch-rows must not be negative, but is {args.batch_rows}")
    settings = EvalSettings(
        max_problems=args.max_problems, num_samples=args.num_samples, temperature=args.temperature, top_k=args.top_k,
        max_new_tokens=args.max_tokens, seed=args.seed, slow=args.slow,
    )  # fmt: skip
    is_standard = args.prompts == "standard"
    default_names = tuple(name for name in TASK_NAMES if name in STANDARD_NAMES or not is_standard)
    make_task = get_standard_task if is_standard else get_task
    names = task_names(args.tasks) if args.tasks else default_names
    tasks = [make_task(name, allow_unsafe_execution=args.allow_unsafe_execution) for name in names]
    stage = "standard_eval" if is_standard else "chat_eval"  # in the report
    runtime = init_runtime(args.device_type, args.dtype)

    # inputs
    loaded = load_model(args.source, runtime, model_tag=args.model_tag, step=args.step)
    model, tokenizer = loaded.model, loaded.tokenizer
    try:
        with together():
            for task in tasks:
                check_task(task)
    except UserError:
        if runtime.is_main:
            results = {"not_run": f"{task.name} has no data or cannot be judged"}
            append_record(stage, settings={**vars(args), "source": loaded.source}, results=results)
        raise
    print0(f"{loaded.folder}: {', '.join(f'{task.name} {len(task):,}' for task in tasks)} problems")

    # model
    engine = None
    if not args.slow and any(task.kind == "generative" for task in tasks):
        batch_rows = args.batch_rows or BATCH_ROWS.get(runtime.device.type, OTHER_BATCH_ROWS)
        print0(f"--batch-rows {batch_rows}")
        engine = Engine(model, tokenizer, max_rows=batch_rows)

    # evaluation
    slow = "_slow" if args.slow else ""
    name = re.sub(r"[^\w.-]+", "_", f"{loaded.source}_{loaded.folder.parent.name}_{loaded.folder.name}{slow}")
    logs = [result_log(name, task, loaded, settings, runtime) for task in tasks]
    prepare_logs(logs, resume=args.resume)
    print0("task                     problems accuracy    95 % interval guessing centered   cut  long  seconds")
    results = []
    for task, log in zip(tasks, logs, strict=True):
        # a progress bar in the first process, if it has a terminal
        bar = partial(tqdm, desc=task.name, unit="problem", leave=False, disable=None if runtime.is_main else True)
        result = evaluate_task(task, model, tokenizer, settings, engine=engine, log=log, progress=bar)
        print_task(result)
        results.append(result)
    core_results = of_chat_core(results)
    averaged, title = (core_results, "ChatCORE") if core_results else (results, "mean centred accuracy")
    core = chat_core(averaged)
    print0(f"{title} {core.value:.4f} ({core.low:.4f} - {core.high:.4f}) over {len(averaged)} tasks")
    print0("intervals: 95 % confidence, Wilson's for a task; cut: prompts shortened; long: answers without an end")
    print0("guessing: its accuracy, which is 0 when centered")

    # output
    if runtime.is_main:
        print0(f"prompts, answers and verdicts: {base_dir() / 'chat_eval' / name}/")
        numbers = {name_in_report(result): result.accuracy.value for result in results}
        if core_results:
            numbers |= {"ChatCORE": core.value, "ChatCORE_low": core.low, "ChatCORE_high": core.high}
        numbers["elapsed_seconds"] = time.perf_counter() - begin
        table = [row for result in results for row in table_rows(result)]
        settings = {**vars(args), "source": loaded.source, "model": name}
        append_record(stage, settings=settings, results=numbers, table=table, samples=sample_replies(results))


def result_log(name: str, task: Task, loaded: LoadedModel, settings: EvalSettings, runtime: Runtime) -> ResultLog:
    """The log of a task, with everything its results depend on except the device."""

    def digest(content: bytes) -> str:
        return hashlib.sha256(content).hexdigest()[:16]

    depends_on = {
        "task": task.name, "num_problems": len(task),
        "data": digest(json.dumps([task[0], task[len(task) - 1]]).encode()),
        "checkpoint": digest((loaded.folder / "meta.json").read_bytes()),
        "dtype": str(runtime.dtype).removeprefix("torch."),
    }  # fmt: skip
    path = base_dir() / "chat_eval" / name / f"{re.sub(r'[^A-Za-z0-9_-]+', '_', task.name)}.jsonl"
    return ResultLog(path, depends_on | settings.of_kind(task.kind))


def of_chat_core(results: list[TaskResult]) -> list[TaskResult]:
    """The results that ChatCORE is the mean of; none when one of its tasks is missing."""
    found = [result for result in results if result.task in TASK_NAMES]
    return found if len(found) == len(TASK_NAMES) else []


def name_in_report(result: TaskResult) -> str:
    """The name of a task's score, which says so where no question had room for all worked examples."""
    most = max(result.given_shots, default=result.num_shots)
    return result.task if most == result.num_shots else f"{result.task} ({most} fit)"


def table_rows(result: TaskResult) -> list[dict]:
    """The rows of a task in the report: the task, then each further score."""
    estimates = {result.task: result.accuracy}
    estimates |= {f"{result.task} {name}": estimate for name, estimate in result.scores.items()}
    num_samples = len(result.items[0].samples)
    if num_samples > 1:
        estimates[f"{result.task} pass@{num_samples}"] = result.pass_at_k
    rows = [
        {"task": name, "accuracy": e.value, "low": e.low, "high": e.high, "baseline": result.baseline}
        for name, e in estimates.items()
    ]
    if num_samples > 1:
        rows[-1]["baseline"] = 1 - (1 - result.baseline) ** num_samples
    rows[0] = {"task": result.task, "problems": len(result.items), **rows[0]} | {"task": name_in_report(result)}
    rows[0] |= {"centered": result.centered.value, "cut": result.num_cut}
    rows[0] |= {"unfinished": result.num_unfinished, "seconds": result.seconds}
    if given := result.given_shots:
        short = sum(count < result.num_shots for count in given)
        rows[0] |= {"shots": result.num_shots, "fewest_shots": min(given), "most_shots": max(given)}
        rows[0]["short_of_shots"] = short
    return rows


def sample_replies(results: list[TaskResult]) -> list[str]:
    """The first question of each task that is answered in a chat, with the reply and whether it is right."""
    texts = []
    for item in (result.items[0] for result in results):
        reply = item.samples[0]
        if not isinstance(reply.output, str) and item.prompt.endswith("<|assistant_start|>"):
            parts = (MARKED.get(part["type"], "{}").format(part["text"]) for part in reply.output)
            texts.append(f"{item.prompt}{''.join(parts)}\n({'right' if reply.is_correct else 'wrong'})")
    return texts


def print_task(result: TaskResult) -> None:
    """The line of a task, then a line for each further score."""
    estimate = " {accuracy:>8.4f} {low:>7.4f} - {high:.4f} {baseline:>8.4f}"
    counts = " {centered:>8.4f} {cut:>5} {unfinished:>5} {seconds:>8.1f}"
    first, *further = table_rows(result)
    print0(("{task:<24} {problems:>8}" + estimate + counts).format_map(first | {"task": result.task}))
    for row in further:
        print0(("  {task:<31}" + estimate).format_map(row))
    if first.get("short_of_shots"):
        fit = " to ".join(map(str, sorted({first["fewest_shots"], first["most_shots"]})))
        print0(
            f"  {fit} of {first['shots']} worked examples fit; {first['short_of_shots']:,} problems had room for fewer"
        )
    if result.num_earlier:
        print0(f"  {result.num_earlier} of the problems were answered in an earlier run")


if __name__ == "__main__":
    run_main(main, parse_args)
