"""Reinforcement learning of a chat model on tasks that reward right answers: GRPO in its simple form.

Reads a finetuned checkpoint and the tasks' data, which are fetched once, or files of conversations whose last answers
are the references; writes checkpoints and metrics.jsonl under <base>/rl_checkpoints/<model tag>, and a record for the
report. What is learned, and how, says `nanochat/training/rl.py`. Held-out questions are those of validation splits.

    python -m scripts.chat_rl --tasks Spelling --num-steps 20 --device-type cpu                    # a CPU
    python -m scripts.chat_rl                                                                      # one GPU, GSM8K
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --model-tag d20 --run rl        # eight GPUs
"""

import argparse
import math
import time
from collections.abc import Sequence

from nanochat.common import UserError, print0, run_main
from nanochat.data.chat_loader import hold_out
from nanochat.engine.engine import Engine
from nanochat.engine.inference import add_weights_flag
from nanochat.engine.sampling import Sampling
from nanochat.evals.chat_eval import prompt_budget
from nanochat.training import rl, schedule
from nanochat.training.finetuning import add_rate_flags, add_run_flags, load_start
from nanochat.training.loop import TrainingRun, check_ranges, make_optimizer
from nanochat.training.metrics import check_loss
from nanochat.training.recipe import Plan
from tasks.common import TaskMixture, TaskSlice
from tasks.custom_json import CustomJSON
from tasks.registry import ALL_NAMES, get_task, task_names

ENGINE_ROWS = {"cuda": 128}  # replies written at a time, by device
SMALL_ENGINE_ROWS = 32
LR_MULT = 0.15  # 0.05 and 0.5 did as well within the noise (dev/LOG.md)
START_MEANS = "start_means"  # of held-out questions, kept to compare each with itself; not for the report
FREE_ON_RESUME = frozenset({  # flags that may differ from those of the run being resumed
    "resume", "run", "device_type", "dtype", "device_batch_size", "engine_rows", "eval_every", "eval_questions",
    "eval_samples", "save_every",
})  # fmt: skip


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_run_flags(parser, source="sft")
    add = parser.add_argument
    # data
    add("--tasks", default="", metavar="TASK|TASK", help="tasks with a reward (default: GSM8K, unless --data is given)")
    add("--data", nargs="+", default=[], metavar="FILE", help="conversations as JSON lines, see tasks/custom_json.py")
    # horizon
    add("--epochs", type=int, default=1, help="passes over the questions")
    add("--num-steps", type=int, help="optimizer steps (default: those of the epochs)")
    # rollouts
    add("--questions-per-step", type=int, default=16, help="questions answered for each optimizer step")
    add("--num-samples", type=int, default=16, help="replies to each question")
    add("--max-tokens", type=int, default=256, help="length of a reply at most, in tokens")
    add("--temperature", type=float, default=1.0, help="of the replies; learning is only on-policy at 1 with --top-k 0")
    add("--top-k", type=int, default=0, help="draw from the likeliest tokens only, so many, 0 for all")
    add("--engine-rows", type=int, default=0, help="replies written at a time, 0 for what suits the device")
    add_weights_flag(parser)
    # optimization
    add("--device-batch-size", type=int, default=8, help="replies per micro-step on each device")
    add_rate_flags(parser, lr_mult=LR_MULT, warmdown_frac=1.0, final_lr_frac=0.0)
    # evaluation, in steps; 0 is off
    add("--eval-every", type=int, default=60, help="reward and pass@k on held-out questions")
    add("--eval-questions", type=int, default=400, help="held-out questions, 0 for all")
    add("--eval-samples", type=int, default=8, help="replies to each of them, for pass@1, pass@2, ...")
    return parser.parse_args()


def check_args(args: argparse.Namespace) -> None:
    """Raise `UserError` for flags out of range."""
    check_ranges(
        args,
        positive=(
            "epochs", "num_steps", "questions_per_step", "max_tokens", "temperature", "device_batch_size",
            "eval_samples",
        ),
        zero_or_more=(
            "top_k", "engine_rows", "lr_mult", "weight_decay", "warmup_steps", "eval_every",
            "eval_questions", "save_every",
        ),
        shares=("warmdown_frac", "final_lr_frac"),
    )  # fmt: skip
    if args.num_samples < 2:
        raise UserError(f"--num-samples must be at least 2, not {args.num_samples}: replies are compared to each other")


def load_questions(tasks: str, files: Sequence[str]) -> tuple[TaskMixture, TaskMixture]:
    """What is asked in training, and what is held out: of `tasks`, "TASK|TASK", their train and validation splits, and
    of `files` of conversations all but every twentieth, and these."""
    train, val = [], []
    for name in task_names(tasks) if tasks else ():
        train.append(get_task(name, purpose="train"))
        val.append(get_task(name, purpose="validation"))
        if not train[-1].has_reward:
            raise UserError(f"{name} has no reward to learn from; tasks that have are {', '.join(rewarding_names())}")
    for path in files:
        task = CustomJSON(path)
        for part, indices in zip((train, val), hold_out(task), strict=True):
            part.append(TaskSlice(task, indices))
    return TaskMixture(train), TaskMixture(val)


def rewarding_names() -> list[str]:
    names = []
    for name in ALL_NAMES:
        try:
            has_reward = get_task(name, purpose="train").has_reward
        except UserError:  # it has no split to train on
            continue
        names += [name] * has_reward
    return names


def note(run: TrainingRun, step: int, found: rl.Evaluation) -> None:
    """Log, print and keep an evaluation; the first one is kept as the start too, and shows what replies look like."""
    numbers = found.numbers
    if step == 0:
        kept = [name for name in numbers if name.startswith(("val_reward", "val_greedy_reward"))]
        numbers = {f"start_{name}": numbers[name] for name in kept} | numbers
        run.results = {**run.results, START_MEANS: found.means}
        for sample in found.samples:
            print0(sample)
    elif len(start := run.results.get(START_MEANS, [])) == len(found.means):  # the same questions as at the start
        gain, se = rl.mean_and_error([now - before for now, before in zip(found.means, start, strict=True)])
        numbers = numbers | {"val_reward_gain": gain, "val_reward_gain_se": se}
    run.note(step, **numbers)
    run.results = {**run.results, "samples": found.samples}
    more = "".join(f", {k.removeprefix('val_')} {v:.4f}" for k, v in numbers.items() if k.startswith("val_pass"))
    for name, value in numbers.items():
        if f"{name}_se" in numbers and name.startswith("val_reward_"):
            more += f", {name.removeprefix('val_reward_')} {value:.4f} +- {numbers[name + '_se']:.4f}"
    print0(
        f"step {step:>5} | held out: reward {numbers['val_reward']:.4f} +- {numbers['val_reward_se']:.4f}, greedy "
        f"{numbers['val_greedy_reward']:.4f}{more}"
    )


def log(
    run: TrainingRun, step: int, loss: float, numbers: dict[str, float], rollout_seconds: float, update_seconds: float
) -> None:
    """Log and print step `step`, counted from 1, and add it to the sums; `loss` is nan where nothing was learned."""
    rollout_tokens = numbers["rollout_tokens"]
    speed = rollout_tokens / rollout_seconds
    run.stats.update(loss, rollout_seconds + update_seconds)
    own = {"rollout_tokens": rollout_tokens, "train_tokens": numbers["train_tokens"]}
    own["rollout_seconds"] = rollout_seconds
    run.results = {**run.results, **{name: run.results.get(name, 0) + value for name, value in own.items()}}
    run.metrics.log(
        step=step, train_loss=loss if math.isfinite(loss) else None, **numbers, lr_mult=run.rates(step - 1),
        rollout_seconds=rollout_seconds, update_seconds=update_seconds, rollout_tokens_per_second=speed,
        elapsed_seconds=run.stats.seconds,
    )  # fmt: skip
    print0(
        f"step {step:>5}/{run.plan.num_steps} | reward {numbers['reward']:.4f}, {numbers['groups_frac']:.0%} of groups "
        f"differ | {numbers['reply_tokens']:.1f} tokens a reply, {numbers['cut_frac']:.1%} cut | replies "
        f"{rollout_seconds:.1f} s ({speed:,.0f} tokens/s), update {update_seconds:.1f} s"
    )


def main(args: argparse.Namespace) -> None:
    # data
    check_args(args)
    tasks = args.tasks or ("" if args.data else "GSM8K")
    train, val = load_questions(tasks, args.data)

    # runtime, model, tokenizer
    start = load_start("rl", args, free_on_resume=FREE_ON_RESUME)  # not compiled: no two steps have the same shapes
    runtime, model, tokenizer = start.runtime, start.model, start.tokenizer
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}

    # questions
    max_prompt = prompt_budget("generative", model.config.sequence_len, args.max_tokens)
    questions = rl.Questions(train, tokenizer, max_prompt, seed=args.seed)
    print0(f"{len(questions):,} questions, {questions.num_left_out:,} left out as too long for the context")
    num_val, val_questions = 0, []
    if args.eval_every and len(val):
        held_out = rl.Questions(val, tokenizer, max_prompt)
        num_val = min(len(held_out), args.eval_questions or len(held_out))
        val_questions = held_out.take(0, num_val, **ranks)
    print0(f"{num_val:,} held-out questions")

    # engine
    sampling = Sampling(max_tokens=args.max_tokens, temperature=args.temperature, top_k=args.top_k)
    rows = args.engine_rows or ENGINE_ROWS.get(runtime.device.type, SMALL_ENGINE_ROWS)
    engine = Engine(model, tokenizer, max_rows=rows, weights=args.weights)

    # optimizer, schedule
    per_step = args.questions_per_step
    num_steps = args.num_steps or -(-args.epochs * len(questions) // per_step)
    most_tokens = per_step * args.num_samples * args.max_tokens
    plan = Plan(num_steps, most_tokens, args.lr_mult * schedule.batch_lr_scale(most_tokens), args.weight_decay)
    run = TrainingRun(
        start.folder, args, runtime, model, tokenizer, make_optimizer(model, runtime), questions, plan,
        args.device_batch_size, 1, start.resumed,
    )  # fmt: skip
    print0(f"{num_steps:,} steps of {per_step} questions x {args.num_samples} replies, rates x {plan.lr_scale:.4f}")

    # the loop
    for step in run.steps():
        # evaluate
        if num_val and (step == 0 or run.is_due(step, args.eval_every)):
            found = rl.evaluate(engine, model, val_questions, sampling, num_samples=args.eval_samples, seed="held out")
            note(run, step, found)

        # save
        if run.is_due(step, args.save_every or num_steps):
            run.save(step)

        # stop?
        if step == num_steps:
            break

        # replies
        begin = time.perf_counter()
        asked = questions.take(step * per_step, per_step, **ranks)
        seed = f"{args.seed}/{step}"
        groups = rl.roll_out(engine, model, asked, sampling, num_samples=args.num_samples, seed=seed)
        numbers = rl.step_numbers(groups)
        middle = time.perf_counter()

        # step
        loss = math.nan
        if numbers["groups_frac"] > 0:
            chosen = [rollout for group in rl.differing(groups) for rollout in group]
            batches = rl.make_batches(chosen, args.device_batch_size, runtime.device)
            loss = run.update(step, iter(batches), len(batches)).item()
            check_loss(step + 1, loss, runtime.dtype)
        end = time.perf_counter()

        # log
        log(run, step + 1, loss, numbers, middle - begin, end - middle)

    # summary to the report
    run.results.pop(START_MEANS, None)
    train_tokens = run.results["train_tokens"]
    run.finish(
        "chat_rl", train_tokens=train_tokens, train_flops=train_tokens * model.flops_per_token(),
        tokens_per_second=run.results["rollout_tokens"] / run.results["rollout_seconds"], mfu=None,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main, parse_args)
