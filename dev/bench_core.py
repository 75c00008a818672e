"""Speed of CORE: the fast path, the plain path, and a loop over examples, on the same model. A table, then a JSON line.

    python dev/bench_core.py --bundle eval_bundle.zip --max-per-task 50                       # random weights, depth 4
    python dev/bench_core.py --bundle eval_bundle.zip --sequence-len 2048 --dtype bfloat16
    python dev/bench_core.py --bundle eval_bundle.zip --source base --max-per-task 0          # a checkpoint, everything

Needs a tokenizer (scripts.tok_train). The same tokenised examples are scored in three ways:
- fast: `core_eval.score_batched`;
- plain: `core_eval.score_plainly`, one option at a time, the reference;
- loop: one example at a time, its options padded to a batch, with all logits, as in the public nanochat (implemented
  anew, on our model).
Predictions on which fast and plain differ are printed with how close the decision was. Both wall-clock and processor
seconds are given, as other work on the machine affects the latter less; tokenising is added to each way.
"""

import argparse
import json
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.common import UserError, init_runtime, run_main
from nanochat.evals.core_bundle import fetch_bundle, read_tasks
from nanochat.evals.core_eval import Example, Score, build_examples, score_batched, score_plainly
from nanochat.flags import add_runtime_flags
from nanochat.model.gpt import GPT, GPTConfig, build_model
from nanochat.model.load import load_model
from nanochat.tokenizer import Tokenizer, tokenizer_dir

WAYS = ("fast", "loop", "plain")
WEIGHT_NOISE = 0.3  # added to initial weights, times 1 / sqrt(fan-in): the blocks of a fresh model output zero


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_runtime_flags(parser)
    parser.add_argument("--source", default="", help="kind of checkpoint, such as base (default: random weights)")
    parser.add_argument("--model-tag", default="", help="of the checkpoint (default: the newest)")
    parser.add_argument("--depth", type=int, default=4, help="of the model with random weights")
    parser.add_argument("--sequence-len", type=int, default=512, help="of the model with random weights, in tokens")
    parser.add_argument("--bundle", default="", help="as for scripts.base_eval")
    parser.add_argument("--tasks", default="", help="labels of tasks, separated by commas (default: all)")
    parser.add_argument("--max-per-task", type=int, default=20, help="examples of each task at most, 0 for all")
    parser.add_argument("--batch-tokens", type=int, default=0, help="of the fast path, 0 for what suits the device")
    parser.add_argument("--ways", default=",".join(WAYS), help=f"which of {', '.join(WAYS)} to run")
    return parser.parse_args()


def random_model(args: argparse.Namespace, runtime, vocab_size: int) -> GPT:
    """A random model in which every weight affects the output."""
    config = GPTConfig.from_depth(args.depth, vocab_size=vocab_size, sequence_len=args.sequence_len)
    generator = torch.Generator(runtime.device).manual_seed(0)
    model = build_model(config, device=runtime.device, compute_dtype=runtime.dtype, generator=generator)
    with torch.no_grad():
        for p in model.parameters():
            noise = torch.randn(p.shape, generator=generator, device=p.device, dtype=p.dtype)
            p.add_(noise, alpha=WEIGHT_NOISE * p.shape[-1] ** -0.5)
    return model


@torch.no_grad()
def score_by_loop(model, examples: tuple[Example, ...]) -> list[Score]:
    """One example at a time, its options as a padded batch, with losses and argmax at every position."""
    scores = []
    for example in examples:
        idx = torch.zeros(len(example.rows), max(map(len, example.rows)), dtype=torch.int64)  # (B, T)
        for b, row in enumerate(example.rows):
            idx[b, : len(row)] = torch.from_numpy(row)
        idx = idx.to(model.device)
        inputs, targets = idx[:, :-1], idx[:, 1:]
        logits = model(inputs)  # (B, T - 1, V)
        losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)
        is_best = logits.argmax(dim=-1) == targets
        spans = [slice(start - 1, len(row) - 1) for start, row in zip(example.starts, example.rows, strict=True)]
        nats = tuple(losses[b, span].mean().item() for b, span in enumerate(spans))
        scores.append(Score(nats, bool(is_best[-1, spans[-1]].all())))
    return scores


SCORERS = {"loop": score_by_loop, "plain": score_plainly}


@dataclass(frozen=True)
class Seconds:
    """Wall-clock and processor time."""

    clock: float
    processor: float

    def __add__(self, other: "Seconds") -> "Seconds":
        return Seconds(self.clock + other.clock, self.processor + other.processor)


def timed(function, *args):
    """The result of `function`, and the `Seconds` it took."""
    clock, processor = time.perf_counter(), time.process_time()
    result = function(*args)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return result, Seconds(time.perf_counter() - clock, time.process_time() - processor)


def prediction(kind: str, score: Score) -> int:
    return int(score.is_greedy) if kind == "language_modeling" else score.nats.index(min(score.nats))


@torch.no_grad()
def decision_gap(model, kind: str, example: Example, plain: Score) -> float:
    """How close a plain prediction was: nats between the two best options, or for language modelling the smallest
    logit difference between a token of the answer and the best other token."""
    if kind != "language_modeling":
        best, second = sorted(plain.nats)[:2]
        return second - best
    row, start = torch.from_numpy(example.rows[0]).long().to(model.device), example.starts[0]
    logits = model(row[None, :-1])[0, start - 1 :]  # (N, V)
    targets = row[start:].unsqueeze(1)
    of_targets = logits.gather(1, targets)
    best_other = logits.scatter(1, targets, -torch.inf).amax(dim=1, keepdim=True)
    return (of_targets - best_other).abs().min().item()


def measure(model, tokenizer, tasks, args: argparse.Namespace) -> tuple[dict, list[dict], dict]:
    """Seconds by (kind, way), predictions on which fast and plain differ, and counts by kind."""
    seconds, differences, counts = defaultdict(lambda: Seconds(0.0, 0.0)), [], defaultdict(lambda: defaultdict(int))
    warm_up = build_examples(tasks[0], tokenizer, range(2), model.config.sequence_len + 1)
    for task in tasks:
        count = min(args.max_per_task or len(task.records), len(task.records))
        examples, spent = timed(build_examples, task, tokenizer, range(count), model.config.sequence_len + 1)
        seconds[task.kind, "tokenising"] += spent
        scores = {}
        for way in args.ways.split(","):
            scorer = SCORERS.get(way, lambda model, examples: score_batched(model, examples, args.batch_tokens))
            scorer(model, warm_up)
            scores[way], spent = timed(scorer, model, examples)
            seconds[task.kind, way] += spent
        kind_counts = counts[task.kind]
        kind_counts["examples"] += count
        kind_counts["tokens"] += sum(len(row) - 1 for example in examples for row in example.rows)
        if {"fast", "plain"} <= scores.keys():
            pairs = list(zip(scores["fast"], scores["plain"], strict=True))
            worst = max(abs(x - y) for fast, plain in pairs for x, y in zip(fast.nats, plain.nats, strict=True))
            kind_counts["max_nats_difference"] = max(kind_counts["max_nats_difference"], worst)
            for index, (fast, plain) in enumerate(pairs):
                if prediction(task.kind, fast) != prediction(task.kind, plain):
                    gap = decision_gap(model, task.kind, examples[index], plain)
                    differences.append({"task": task.label, "line": task.lines[index], "gap": gap,
                                        "fast": fast.nats, "plain": plain.nats})  # fmt: skip
                    kind_counts["differing"] += 1
        print(f"  {task.label}: {count} examples", file=sys.stderr, flush=True)
    return seconds, differences, counts


def table_rows(seconds: dict, counts: dict, ways: list[str]) -> list[dict]:
    """A row for each kind of task and one for all: examples, tokens, seconds of each way, and speed-ups."""
    rows = []
    for kind in [*counts, "all"]:
        kinds = list(counts) if kind == "all" else [kind]
        row = {key: sum(counts[k][key] for k in kinds) for key in ("examples", "tokens", "differing")}
        row["max_nats_difference"] = max(counts[k]["max_nats_difference"] for k in kinds)
        tokenising = sum((seconds[k, "tokenising"] for k in kinds), Seconds(0.0, 0.0))
        spent = {way: sum((seconds[k, way] for k in kinds), tokenising) for way in ways}
        row |= {"kind": kind, "tokenising": vars(tokenising), **{way: vars(value) for way, value in spent.items()}}
        for way in set(ways) - {"fast"} if "fast" in ways else ():
            row[f"speed_up_over_{way}"] = {
                key: vars(spent[way])[key] / vars(spent["fast"])[key] for key in ("clock", "processor")
            }
        rows.append(row)
    return rows


def print_table(rows: list[dict], ways: list[str]) -> None:
    others = [way for way in ways if way != "fast" and "fast" in ways]
    print("wall-clock seconds (processor seconds), tokenising included")
    head = f"{'kind':<18} {'examples':>8} {'tokens':>10} {'tokenising':>16}"
    print(head + "".join(f" {way:>18}" for way in ways) + "".join(f" {'over ' + way:>16}" for way in others)
          + "  differing  largest difference, nats")  # fmt: skip
    for row in rows:
        spent = "".join(f" {row[way]['clock']:>8.2f} ({row[way]['processor']:>7.2f})" for way in ways)
        factors = (row[f"speed_up_over_{way}"] for way in others)
        faster = "".join(f" {factor['clock']:>7.2f} ({factor['processor']:>5.2f}x)" for factor in factors)
        tokenising = f"{row['tokenising']['clock']:>6.2f} ({row['tokenising']['processor']:>6.2f})"
        print(f"{row['kind']:<18} {row['examples']:>8} {row['tokens']:>10,} {tokenising:>16}{spent}{faster}"
              f" {row['differing']:>10} {row['max_nats_difference']:>24.1e}")  # fmt: skip


def main(args: argparse.Namespace) -> None:
    ways = args.ways.split(",")
    if set(ways) - set(WAYS):
        raise UserError(f"--ways {args.ways}: known are {', '.join(WAYS)}")
    runtime = init_runtime(args.device_type, args.dtype)
    if args.source:
        loaded = load_model(args.source, runtime, model_tag=args.model_tag)
        model, tokenizer = loaded.model, loaded.tokenizer
    else:
        tokenizer = Tokenizer.load(tokenizer_dir())
        model = random_model(args, runtime, tokenizer.vocab_size)
    tasks = read_tasks(fetch_bundle(args.bundle))
    chosen = args.tasks.split(",") if args.tasks else [task.label for task in tasks]
    if unknown := set(chosen) - {task.label for task in tasks}:
        raise UserError(f"--tasks: the bundle has no {', '.join(sorted(unknown))}")
    config = model.config
    print(f"{runtime.device.type}, {runtime.dtype}, {torch.get_num_threads()} threads, depth {config.n_layer}, "
          f"T {config.sequence_len}, vocabulary {config.vocab_size}")  # fmt: skip
    seconds, differences, counts = measure(model, tokenizer, [t for t in tasks if t.label in chosen], args)
    rows = table_rows(seconds, counts, ways)
    print_table(rows, ways)
    for one in differences:
        print(
            f"differs: {one['task']} line {one['line']}: gap {one['gap']:.2e}, fast {one['fast']}, plain {one['plain']}"
        )
    print(json.dumps({"settings": vars(args), "device": runtime.device.type, "dtype": str(runtime.dtype),
                      "threads": torch.get_num_threads(), "torch": torch.__version__, "depth": config.n_layer,
                      "sequence_len": config.sequence_len, "vocab_size": config.vocab_size, "results": rows,
                      "differences": differences}))  # fmt: skip


if __name__ == "__main__":
    run_main(main, parse_args)
