"""ESTIMATE of the minutes until a model has GPT-2's CORE score, 0.2565, on 8 H100: arithmetic on measured parts.

    python dev/time_to_gpt2.py                                     # no measurement: assumptions, printed as such
    python dev/time_to_gpt2.py --measured gpu_check.txt            # saved output of dev/gpu_check.py or bench_train.py
    python dev/time_to_gpt2.py --measured gpu_check.txt --dtype fp8
    python dev/time_to_gpt2.py --tokens-per-second 122875 --token-ratio 8

Counted are the training steps alone, as in the published figures: not the start, evaluations and other stages.

A step. One card's measured speed without its optimizer; the optimizer's time divided by the number of GPUs, as each
updates its share; gradients (bfloat16) and updated weights (float32, tables bfloat16) over a stated bandwidth, a stated
share of the gradients' way being hidden behind backward. A depth that was not measured gets the share of peak of the
measured ones around it.

Tokens. What was published is the d24 of the public nanochat (its dev/LEADERBOARD.md, March 2026, the recipe that ours
follows): with 8 tokens per parameter of matrices and head the mean CORE of five runs was 0.2626, in 99 minutes. The
range is from there to 12, which `speedrun.sh` takes, the expectation the recipe's 10, and seeds widen it. Which tokens
make another depth as good follows from a loss of the form N^-a + (D / r)^-a in parameters N and tokens D, with the
published compute-optimal r of 10.5 tokens per parameter. So the table also says which depth should be there soonest.
"""

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.common import UserError, run_main
from nanochat.flags import POSITIVE, SHARE, Flag, parse
from nanochat.model.gpt import GPTConfig
from nanochat.training import recipe

DEPTHS = range(20, 27)
VOCAB_SIZE = 32768
ANCHOR_DEPTH = 24
TOKEN_RATIOS = (8.0, recipe.TOKEN_RATIO, 12.0)  # at the anchor: least, expected, most
OPTIMAL_RATIO = 10.5  # of compute-optimal models, in the same LEADERBOARD.md
LOSS_EXPONENT = 0.3  # a, of parameters and of tokens alike; published fits lie between 0.25 and 0.37 (arXiv 2203.15556)
CORE_SIGMA = 0.005  # between seeds; the public nanochat saw 0.002 to 0.005
# October 2025, d20 and d32: CORE 0.2219 and 0.3168 with 3.5 doublings of compute between them
CORE_PER_DOUBLING = 0.027
H100_D12_SPEED = 486_800  # tokens/s of one H100 at d12 with full attention, measured on this repository
TARGET_SHARE = 0.50  # of peak, what this repository wants of d24 in bfloat16
SPEED_SPREAD = 0.03  # of a measured speed, between cards and days
BENCH_BATCH = 524_288  # tokens a step of one card, where no measurement says it
MUON_FLOPS_SHARE = 0.5  # of peak
MEMORY_BANDWIDTH = 2.7e12  # bytes/s that elementwise kernels reach on an H100, of 3.35e12

FLAGS = {
    "what was measured": (
        Flag("measured", str, "", "output of dev/gpu_check.py or dev/bench_train.py, on one H100 (default: none)"),
        Flag("dtype", str, "", "of the measured runs, as their flag (default: those without the flag)"),
        Flag("tokens_per_second", float, None, "of one H100 at --depth, in place of --measured (default: measured)",
             POSITIVE),
        Flag("depth", int, ANCHOR_DEPTH, "that --tokens-per-second is of", POSITIVE),
    ),
    "what is assumed": (
        Flag("token_ratio", float, None, f"tokens per parameter with which d{ANCHOR_DEPTH} is there (default: "
             f"{TOKEN_RATIOS[1]:g}, from {TOKEN_RATIOS[0]:g} to {TOKEN_RATIOS[2]:g})", POSITIVE),
        Flag("num_gpus", int, 8, "GPUs of one machine", POSITIVE),
        Flag("bandwidth", float, 360.0, "GB/s of a collective, each way; NVLink's", POSITIVE),
        Flag("overlap", float, 0.5, "share of the gradients' way that backward hides", SHARE),
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Speed:
    """Of one card at one depth: tokens/s, optimizer included, in steps of `batch` tokens; seconds of its optimizer."""

    tokens_per_second: float
    optimizer: float
    batch: int


@dataclass(frozen=True)
class Run:
    """A run to GPT-2's CORE: its size, and where the milliseconds of a step go on all GPUs together."""

    depth: int
    tokens: float
    token_ratio: float
    batch: int
    share_of_peak: float
    compute_ms: float
    optimizer_ms: float
    wire_ms: float
    minutes: float


def config_of(depth: int) -> GPTConfig:
    return GPTConfig.from_depth(depth, vocab_size=VOCAB_SIZE)


def peak_share(depth: int, tokens_per_second: float) -> float:
    return tokens_per_second * recipe.count_model(config_of(depth)).flops_per_token() / recipe.H100_PEAK_FLOPS


def tokens_needed(depth: int, anchor_ratio: float) -> float:
    """Tokens with which `depth` is as good as the anchor with `anchor_ratio` tokens per parameter."""
    anchor, own = (recipe.scaling_parameters(config_of(d)) for d in (ANCHOR_DEPTH, depth))
    loss = anchor**-LOSS_EXPONENT + (anchor * anchor_ratio / OPTIMAL_RATIO) ** -LOSS_EXPONENT
    left = loss - own**-LOSS_EXPONENT
    return OPTIMAL_RATIO * left ** (-1 / LOSS_EXPONENT) if left > 0 else math.inf


def optimizer_seconds(config: GPTConfig) -> float:
    """Of one step on one card, by arithmetic: five iterations of 4 m^2 n + 2 m^3 FLOPs for a matrix (m, n), m <= n, and
    the passes over weights, gradients and moments (24 bytes an element of AdamW's, 40 of Muon's)."""
    model = recipe.count_model(config)
    sides = [sorted(p.shape) for p in model.h.parameters()]
    flops = sum(5 * (4 * m * m * n + 2 * m**3) for m, n in sides)
    counts = model.parameter_counts()
    num_bytes = 40 * counts["matrices"] + 24 * (counts["total"] - counts["matrices"])
    return flops / (MUON_FLOPS_SHARE * recipe.H100_PEAK_FLOPS) + num_bytes / MEMORY_BANDWIDTH


def wire_seconds(config: GPTConfig, num_gpus: int, bandwidth: float, overlap: float) -> float:
    """Of a step's transfers, those of gradients less the share `overlap` that backward hides."""
    counts = recipe.count_model(config).parameter_counts()
    tables = counts["wte"] + counts["value_embeds"]
    gradients = 2 * counts["total"]
    weights = 4 * (counts["total"] - tables) + 2 * tables
    return (num_gpus - 1) / num_gpus * (gradients * (1 - overlap) + weights) / bandwidth


def assumed_speed(depth: int, share_of_peak: float) -> Speed:
    config = config_of(depth)
    rate = share_of_peak * recipe.H100_PEAK_FLOPS / recipe.count_model(config).flops_per_token()
    return Speed(rate, optimizer_seconds(config), BENCH_BATCH)


def speed_at(depth: int, measured: dict[int, Speed]) -> Speed:
    """The measured speed, or one with the share of peak of the measured depths around, or of the nearest one."""
    if depth in measured:
        return measured[depth]
    below, above = (
        max((d for d in measured if d < depth), default=None),
        min((d for d in measured if d > depth), default=None),
    )
    if below is None or above is None:
        nearest = above if below is None else below
        return assumed_speed(depth, peak_share(nearest, measured[nearest].tokens_per_second))
    low, high = (peak_share(d, measured[d].tokens_per_second) for d in (below, above))
    return assumed_speed(depth, low + (high - low) * (depth - below) / (above - below))


def run_of(depth: int, tokens: float, speed: Speed, args: argparse.Namespace) -> Run:
    config, N = config_of(depth), args.num_gpus
    plan = recipe.make_plan(config, train_tokens=tokens, batch_multiple=config.sequence_len * N)
    forward_backward = speed.batch / speed.tokens_per_second - speed.optimizer  # seconds of one card's step
    compute = plan.total_batch_tokens / N * forward_backward / speed.batch
    optimizer = speed.optimizer / N
    wire = wire_seconds(config, N, args.bandwidth * 1e9, args.overlap)
    step = compute + optimizer + wire
    return Run(
        depth, tokens, tokens / recipe.scaling_parameters(config), plan.total_batch_tokens,
        peak_share(depth, plan.total_batch_tokens / step / N), 1e3 * compute, 1e3 * optimizer, 1e3 * wire,
        plan.num_steps * step / 60,
    )  # fmt: skip


def read_speeds(path: Path, dtype: str) -> dict[int, Speed]:
    """The fastest runs of the recipe by depth, from the JSON line at the end of a saved output. Raises `UserError`."""
    try:
        last = json.loads(path.read_text(encoding="utf-8").splitlines()[-1])
    except (OSError, ValueError, IndexError) as error:
        raise UserError(f"--measured {path}: no JSON line at its end ({error})") from error
    # the part `memory` runs beside others
    of_parts = [figures for part in last.get("parts", []) if part["name"] != "memory" for figures in part["figures"]]
    speeds: dict[int, Speed] = {}
    for figures in of_parts or [last]:
        settings = figures.get("settings", {})
        if settings.get("window_pattern") != "SSSL" or settings.get("recompute") or settings["dtype"] != dtype:
            continue
        for r in figures["results"]:
            speed = Speed(r["tokens_per_second"], r["optimizer_seconds"], settings["total_batch_size"])
            if speed.tokens_per_second > getattr(speeds.get(r["depth"]), "tokens_per_second", 0):
                speeds[r["depth"]] = speed
    if not speeds:
        raise UserError(f"--measured {path}: no training speed with --dtype {dtype or 'of the default'} in it")
    return speeds


def parse_args() -> argparse.Namespace:
    return parse(__doc__, FLAGS)


def main(args: argparse.Namespace) -> None:
    # speeds: slow, expected, fast
    if args.measured:
        measured, source = read_speeds(Path(args.measured), args.dtype), f"measured, {args.measured}"
    elif args.tokens_per_second:
        config = config_of(args.depth)
        measured = {args.depth: Speed(args.tokens_per_second, optimizer_seconds(config), BENCH_BATCH)}
        source = f"given, {args.tokens_per_second:,.0f} tokens/s at d{args.depth}"
    else:
        measured = {}
        full = GPTConfig.from_depth(12, vocab_size=VOCAB_SIZE, window_pattern="L")
        d12_share = H100_D12_SPEED * recipe.count_model(full).flops_per_token() / recipe.H100_PEAK_FLOPS
        shares = (d12_share, recipe.EXPECTED_MFU, TARGET_SHARE)
        source = (
            f"ASSUMED, no measurement: {recipe.EXPECTED_MFU:.0%} of peak at every depth; slowest {d12_share:.1%}, what "
            f"one H100 measured at d12 ({H100_D12_SPEED:,} tokens/s), fastest {TARGET_SHARE:.0%}, the target"
        )

    def speeds(depth: int) -> list[Speed]:
        if not measured:
            return [assumed_speed(depth, share) for share in shares]
        one = speed_at(depth, measured)
        factors = (1 - SPEED_SPREAD, 1, 1 + SPEED_SPREAD)
        return [Speed(factor * one.tokens_per_second, one.optimizer, one.batch) for factor in factors]

    # tokens: most, expected, least
    seeds = 2 ** (CORE_SIGMA / CORE_PER_DOUBLING)
    least, expected, most = (args.token_ratio,) * 3 if args.token_ratio else TOKEN_RATIOS
    ratios = (most * seeds, expected, least / seeds)

    print(f"ESTIMATE of the minutes to CORE 0.2565 on {args.num_gpus} H100: arithmetic, not a measurement")
    print(f"speed       {source}")
    print(f"tokens      d{ANCHOR_DEPTH} there with {expected:g} per parameter, {ratios[2]:.1f} to {ratios[0]:.1f} (8 "
          f"published, 12 in speedrun.sh, seeds +- {CORE_SIGMA} CORE = {seeds - 1:.0%})")  # fmt: skip
    print(f"wire        {args.bandwidth:g} GB/s, {args.overlap:.0%} of the gradients' way hidden")
    print("\ndepth  tokens  ratio  of peak   tokens/s  compute ms  optimizer  wire   minutes (from - to)")
    table = []
    for depth in DEPTHS:
        slow, run, fast = (
            run_of(depth, tokens_needed(depth, ratio), speed, args)
            for ratio, speed in zip(ratios, speeds(depth), strict=True)
        )
        rate = run.tokens / (60 * run.minutes)
        print(f"{depth:>5} {run.tokens / 1e9:>6.2f}B {run.token_ratio:>6.1f} {run.share_of_peak:>8.1%} {rate:>10,.0f}"
              f" {run.compute_ms:>11.0f} {run.optimizer_ms:>10.1f} {run.wire_ms:>5.1f} {run.minutes:>9.0f}"
              f" ({fast.minutes:.0f} - {slow.minutes:.0f})")  # fmt: skip
        table.append({**asdict(run), "minutes_from": fast.minutes, "minutes_to": slow.minutes})
    best = min(table, key=lambda row: row["minutes"])
    close = [row["depth"] for row in table if row["minutes"] < 1.03 * best["minutes"]]
    print(f"\nsoonest: d{best['depth']} in about {best['minutes']:.0f} minutes ({best['minutes_from']:.0f} - "
          f"{best['minutes_to']:.0f}); within 3 %: {', '.join(f'd{depth}' for depth in close)}")  # fmt: skip
    print("published, public nanochat: d24 in 99 minutes, its best variant, a d22, in 81.8")
    settings = {**vars(args), "measured": str(args.measured or "")}
    print(
        json.dumps({"estimate": True, "settings": settings, "speed": source, "runs": table, "soonest": best["depth"]})
    )


if __name__ == "__main__":
    run_main(main, parse_args)
