"""Reinforcement learning of a chat model on tasks that reward right answers: GRPO in its simple form.

Reads a finetuned checkpoint and the tasks' data, which are fetched once, or files of conversations whose last answers
are the references; writes checkpoints and metrics.jsonl under <base>/rl_checkpoints/<model tag>, and a record for the
report. The objective is in `nanochat/training/rl.py`. Held-out questions are those of validation splits.

    python -m scripts.chat_rl --tasks Spelling --num-steps 20 --device-type cpu                    # a CPU
    python -m scripts.chat_rl                                                                      # one GPU, GSM8K
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --model-tag d20 --run rl        # eight GPUs
"""

import argparse
import math
import time

from nanochat.common import UserError, print0, run_main, together
from nanochat.engine.engine import Engine
from nanochat.engine.inference import add_weights_flag
from nanochat.engine.sampling import Sampling
from nanochat.evals.chat_eval import prompt_budget
from nanochat.flags import COUNT, FREE, POSITIVE, RUN_FLAGS, ZERO_OR_MORE, Flag, Range, free_on_resume, parse, shared
from nanochat.hosts import check_hosts_agree
from nanochat.training import rl, schedule
from nanochat.training.check_data import check_data
from nanochat.training.finetuning import check_source, load_start
from nanochat.training.loop import make_optimizer, time_in_words
from nanochat.training.recipe import Plan
from nanochat.training.run import TrainingRun
from tasks.mixtures import Corpus, Sources, load_corpus
from tasks.registry import ALL_NAMES, get_task, task_names

ENGINE_ROWS = {"cuda": 128}  # replies generated at a time, by device
SMALL_ENGINE_ROWS = 32
LR_MULT = 0.15  # 0.05 and 0.5 did as well within the noise (dev/LOG.md)
START_MEANS = "start_means"  # first rewards of the held-out questions, to compare later ones with; not reported
SUMS = ("rollout_tokens", "train_tokens", "rollout_seconds")  # over all steps, for the report
TWO_OR_MORE = Range("be at least 2", lambda value: value >= 2)

FLAGS = {
    "model": shared("model_tag", "step", source="sft"),
    "data": (
        Flag("tasks", str, "", "tasks with a reward (default: GSM8K, unless --data is given)", metavar="TASK|TASK"),
        Flag("data", str, [], "own questions: a file or folder of jsonl, json or parquet, or a hub repository; the "
             "last answer of each is the reference (default: none)", nargs="+", metavar="DATA"),
        *shared("skip_bad_rows", "check_data", "seed"),
    ),
    "horizon": shared("epochs", "num_steps"),
    "replies": (
        Flag("questions_per_step", int, 16, "questions answered for each optimizer step", POSITIVE),
        Flag("num_samples", int, 16, "replies to each question, which are compared with each other", TWO_OR_MORE),
        Flag("max_tokens", int, 256, "longest reply in tokens", POSITIVE),
        Flag("temperature", float, 1.0, "of the replies; learning is on-policy only at 1 with --top-k 0", POSITIVE),
        Flag("top_k", int, 0, "sample from this many of the likeliest tokens only, 0 for all", ZERO_OR_MORE),
        Flag("engine_rows", int, 0, "replies generated at a time, 0 for what suits the device", **COUNT),
    ),
    "optimization": (
        Flag("device_batch_size", int, 8, "replies per micro-step on each device", POSITIVE, **FREE),
        *shared("weight_decay", "warmup_steps", "warmdown_frac", "final_lr_frac", lr_mult=LR_MULT),
    ),
    "evaluation": (
        Flag("eval_every", int, 60, "period in steps of reward and pass@k on held-out questions, 0 for never", **COUNT),
        Flag("eval_questions", int, 400, "held-out questions, 0 for all", **COUNT),
        Flag("eval_samples", int, 8, "replies to each of them, for pass@1, pass@2, ...", POSITIVE, **FREE),
    ),
    "checkpoints": shared("output_tag", *RUN_FLAGS),
    "runtime": shared("device_type", "dtype", "attention", "recompute", "run"),
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    return parse(__doc__, FLAGS, add_weights_flag)


def named_tasks(tasks: str) -> Corpus:
    """The train and validation splits of `tasks`, "TASK|TASK". Raises `UserError` for a task without reward."""
    train, val = [], []
    for name in task_names(tasks) if tasks else ():
        train.append(get_task(name, purpose="train"))
        val.append(get_task(name, purpose="validation"))
        if not train[-1].has_reward:
            raise UserError(f"{name} has no reward to learn from; tasks that have are {', '.join(rewarding_names())}")
    return Corpus(train, val)


def rewarding_names() -> list[str]:
    names = []
    for name in ALL_NAMES:
        try:
            names += [name] * get_task(name, purpose="train").has_reward
        except UserError:  # it has no split to train on
            continue
    return names


def note(run: TrainingRun, step: int, found: rl.Evaluation) -> None:
    """Log, print and keep an evaluation. The first is also kept as the start, and its sample replies are printed."""
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


def log(run: TrainingRun, step: int, loss: float, numbers: dict[str, float], seconds: tuple[float, float]) -> None:
    """Log and print step `step`, counted from 1, and add it to the sums; `loss` is nan when nothing was learned,
    `seconds` are those of the rollouts and of the update."""
    rollout_seconds, update_seconds = seconds
    speed = numbers["rollout_tokens"] / rollout_seconds
    run.stats.update(loss, rollout_seconds + update_seconds)
    if run.stats.num_seen == 1 and not run.runtime.is_cuda and (num_left := run.plan.num_steps - step):
        duration = time_in_words(num_left * (rollout_seconds + update_seconds))
        print0(f"{num_left:,} more steps take about {duration} here")
    new = {**numbers, "rollout_seconds": rollout_seconds}
    sums = {name: run.results.get(name, 0) + new[name] for name in SUMS}
    run.results = {**run.results, **sums}
    run.metrics.log(
        step=step, train_loss=loss if math.isfinite(loss) else None, **numbers, lr_mult=run.rates(step - 1),
        rollout_seconds=rollout_seconds, update_seconds=update_seconds, rollout_tokens_per_second=speed,
        elapsed_seconds=run.stats.seconds,
    )  # fmt: skip
    parts = [
        f"reward {numbers['reward']:.4f}, {numbers['groups_frac']:.0%} of groups differ",
        f"{numbers['reply_tokens']:.1f} tokens a reply, {numbers['cut_frac']:.1%} cut",
        f"replies {rollout_seconds:.1f} s ({speed:,.0f} tokens/s), update {update_seconds:.1f} s",
    ]
    run.progress.show(step, parts)


def main(args: argparse.Namespace) -> None:
    # data
    tasks = args.tasks or ("" if args.data else "GSM8K")
    if args.check_data:
        check_data(args, Sources(args.data, {}, named_tasks(tasks)), reply_tokens=args.max_tokens)
        return
    check_source(args)
    with together():
        sources = Sources(args.data, {}, named_tasks(tasks))
        train, val, _ = load_corpus(sources, skip_bad_rows=args.skip_bad_rows)

    # runtime, model, tokenizer
    start = load_start("rl", args, free_on_resume(FLAGS))  # not compiled: no two steps have the same shapes
    runtime, model, tokenizer = start.runtime, start.model, start.tokenizer
    ranks = {"rank": runtime.rank, "world_size": runtime.world_size}

    # questions
    max_prompt = prompt_budget("generative", model.config.sequence_len, args.max_tokens)
    questions = rl.Questions(train, tokenizer, max_prompt, seed=args.seed)
    check_hosts_agree("the questions", {"text": questions.digest.hex()}, "give all hosts the same data")
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
        args.device_batch_size, 1, start.resumed, examples=start.meta.get("examples", ()),
    )  # fmt: skip
    print0(f"{num_steps:,} steps of {per_step} questions x {args.num_samples} replies, rates x {plan.lr_scale:.4f}")

    # the loop
    for step in run.steps():
        # evaluate
        if num_val and (step == 0 or run.is_due(step, args.eval_every)):
            found = rl.evaluate(engine, model, val_questions, sampling, num_samples=args.eval_samples, seed="held out")
            note(run, step, found)

        # save, stop?
        run.save_if_due(step)
        if step == num_steps:
            break

        # replies
        begin = time.perf_counter()
        asked = questions.take(step * per_step, per_step, **ranks)
        groups = rl.roll_out(engine, model, asked, sampling, num_samples=args.num_samples, seed=f"{args.seed}/{step}")
        numbers = rl.step_numbers(groups)
        middle = time.perf_counter()

        # step
        loss = math.nan
        if numbers["groups_frac"] > 0:
            chosen = [rollout for group in rl.differing(groups) for rollout in group]
            batches = rl.make_batches(chosen, args.device_batch_size, runtime.device)
            loss, squares = run.update(step, batches).tolist()
            run.examine(step + 1, loss, squares, batches)

        # log
        log(run, step + 1, loss, numbers, (middle - begin, time.perf_counter() - middle))

    # summary to the report
    run.results.pop(START_MEANS, None)
    train_tokens = run.results["train_tokens"]
    run.finish(
        "chat_rl", train_tokens=train_tokens, train_flops=train_tokens * model.flops_per_token(),
        tokens_per_second=run.results["rollout_tokens"] / run.results["rollout_seconds"], mfu=None,
    )  # fmt: skip


if __name__ == "__main__":
    run_main(main, parse_args)
