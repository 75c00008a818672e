"""How many questions of public data sets the miniature declines. All of them are outside its small world.

    python -m dev.check_declines --source rl

The exam `SmallWorld-outside` consists of questions written for it; these are other people's, and none is trained on.
To see what the training conversations lack, look at the training splits (`--split train --show 20`); the number that
counts is that of the test splits. Needs the hub, or a mirror named by HF_ENDPOINT, and a checkpoint of the miniature.
Prints for each data set how many questions fit the context, and the share declined with its 95 % interval.
"""

import argparse

from nanochat.checkpoint import add_checkpoint_flags
from nanochat.common import UserError, init_runtime, print0, run_main
from nanochat.data.chat import render_for_completion, visible_text
from nanochat.engine.engine import Engine
from nanochat.engine.sampling import Sampling
from nanochat.evals.chat_results import wilson
from nanochat.flags import add_runtime_flags
from nanochat.model.load import load_model
from tasks.common import Task
from tasks.registry import get_task
from tasks.small_world import is_right
from tasks.smoltalk import SmolTalk

MAX_TOKENS = 40  # per answer
ROWS = 32
BENCHMARKS = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K")


def first_question(task: Task, index: int) -> str:
    """The first user message of conversation `index`; for multiple choice only the question."""
    message = next(message for message in task[index]["messages"] if message["role"] == "user")
    if task.kind == "categorical":
        return message["content"].partition("\n")[0].removeprefix("Multiple choice: ")
    return message["content"]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runtime_flags(parser)
    add_checkpoint_flags(parser, source="rl")
    add = parser.add_argument
    add("--split", choices=("train", "test"), default="test", help="of the data sets (default: %(default)s)")
    add("--max-problems", type=int, default=300, help="questions per data set (default: %(default)s)")
    add("--show", type=int, default=0, help="number of answers to show that were not declined")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.max_problems < 1:
        raise UserError(f"--max-problems must be at least 1, not {args.max_problems}")
    runtime = init_runtime(args.device_type, args.dtype)
    loaded = load_model(args.source, runtime, model_tag=args.model_tag, step=args.step)
    engine = Engine(loaded.model, loaded.tokenizer, max_rows=ROWS)
    longest = loaded.model.config.sequence_len - MAX_TOKENS
    for task in (*(get_task(name, purpose=args.split) for name in BENCHMARKS), SmolTalk(args.split)):
        questions, prompts = [], []
        for index in range(len(task)):
            if len(prompts) == args.max_problems:
                break
            question = first_question(task, index)
            prompt = render_for_completion(loaded.tokenizer, {"messages": [{"role": "user", "content": question}]}).ids
            if len(prompt) <= longest:
                questions.append(question)
                prompts.append(prompt)
        answers = [
            found[0].parts for found in engine.generate(prompts, Sampling(max_tokens=MAX_TOKENS, temperature=0.0))
        ]
        declined = [is_right({"declined": True}, answer) for answer in answers]
        share = wilson(sum(declined) / len(declined), len(declined))
        print0(f"{task.name:<14} {len(prompts):>5}  {share.value:.4f} ({share.low:.4f} - {share.high:.4f})")
        others = [pair for pair, was in zip(zip(questions, answers, strict=True), declined, strict=True) if not was]
        for question, answer in others[: args.show]:
            print0(f"  ? {question}\n  > {visible_text(answer)}")


if __name__ == "__main__":
    run_main(main, parse_args)
