"""Command-line flags: the name, type, default, meaning and range of each, written once.

A script lists its flags in a tuple: `shared("run", eval_every=150)` takes flags from the table below, `eval_every` with
a default of the script's own; a `Flag` belongs to that script alone. From this tuple `parse` builds the command line
and checks the ranges, and `free_on_resume` tells which flags may change when a run is resumed.

Not here: checks that involve several flags (the scripts) or what the machine has (`common.py`).
"""

import argparse
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

from nanochat.common import UserError

SOURCES = ("base", "mid", "sft", "rl")  # stages that write checkpoints
RUNTIME_FLAGS = ("device_type", "dtype")  # of `common.add_runtime_flags`
ATTENTION = ("flash", "flex", "cudnn", "sdpa", "masked")  # the backends of `nanochat/model/attention.py`


@dataclass(frozen=True)
class Range:
    """The values a flag may have; `words` continue the sentence "--flag must". NaN is in no range."""

    words: str
    contains: Callable[[Any], bool]


POSITIVE = Range("be a number above 0", lambda value: 0 < value < math.inf)
ZERO_OR_MORE = Range("be a number of 0 or more", lambda value: 0 <= value < math.inf)
SHARE = Range("lie between 0 and 1", lambda value: 0.0 <= value <= 1.0)


@dataclass(frozen=True)
class Flag:
    """One flag. `name` is the attribute of `args`; on the command line its underscores are dashes.

    A `type` of bool makes a switch. A `default` of None means that the value is derived, and is in every range.
    """

    name: str
    type: type
    default: Any
    help: str
    range: Range | None = None
    is_free: bool = False  # on resuming, it may differ from the value of the run
    choices: tuple[str, ...] | None = None
    nargs: str | None = None
    metavar: str | None = None

    @property
    def option(self) -> str:
        return "--" + self.name.replace("_", "-")


FREE = {"is_free": True}
COUNT = {"range": ZERO_OR_MORE, "is_free": True}  # of what is only watched or saved
SHARED = {
    flag.name: flag
    for flag in (
        # runtime
        Flag("run", str, "", "name of the run on wandb (default: no wandb)", **FREE),
        Flag("no_compile", bool, False, "run the model eagerly on a GPU too", **FREE),
        Flag("attention", str, "", "backend of attention in training (default: the fastest that fits)",
             choices=ATTENTION, **FREE),
        Flag("recompute", bool, False, "make the MLPs' activations again in backward: they take half "
             "the memory, and a step about a tenth more time", **FREE),
        Flag("seed", int, 42, "random seed of the order of the data and of sampling"),
        # checkpoints
        Flag("source", str, "base", "stage of the checkpoint", choices=SOURCES),
        Flag("model_tag", str, "", "name of the checkpoint folder (default: the newest)"),
        Flag("step", int, None, "step of the checkpoint (default: the last)"),
        Flag("output_tag", str, "", "name of the new checkpoint folder (default: that of the source)"),
        Flag("save_every", int, 0, "checkpoint period in steps, 0 for the last step only", **COUNT),
        Flag("save_minutes", float, 0.0, "checkpoint period in minutes, in addition, 0 for none", **COUNT),
        Flag("keep_last", int, 0, "checkpoints of the run to keep, 0 for all; older ones are deleted", **COUNT),
        Flag("keep_every", int, 0, "period in steps of those to keep in addition to --keep-last", **COUNT),
        Flag("skip_bad_steps", int, 0, "steps to leave out at most whose loss or gradient is not finite; with more "
             "than 0 the host waits for every step", **COUNT),
        Flag("resume", bool, False, "continue from the newest whole checkpoint of this tag, if there is one", **FREE),
        # data and horizon
        Flag("data", str, ["mixture"], "conversations: a file or folder of jsonl, json or parquet, a hub repository, "
             "'small_world', or 'mixture' for the stage's own (default: mixture)", nargs="+", metavar="DATA"),
        Flag("skip_bad_rows", int, 0, "rows of own data to leave out at most that cannot be learned from", **COUNT),
        Flag("check_data", bool, False, "read all data, say what is in them and what is refused, and train nothing",
             **FREE),
        Flag("max_conversations", int, 0, "conversations to train on at most, 0 for all", ZERO_OR_MORE),
        Flag("epochs", int, 1, "passes over the data", POSITIVE),
        Flag("num_steps", int, None, "optimizer steps (default: those of the epochs)", POSITIVE),
        # optimization
        Flag("total_batch_size", int, 0, "tokens per optimizer step (default: derived)", ZERO_OR_MORE),
        Flag("device_batch_size", int, 0, "rows per micro-step on each device (default: what fits)", **COUNT),
        Flag("lr_mult", float, 1.0, "multiplies every learning rate", ZERO_OR_MORE),
        Flag("weight_decay", float, 0.0, "weight decay of the matrices", ZERO_OR_MORE),
        Flag("warmup_steps", int, 40, "steps of linear warm-up, at most 5 %% of all", ZERO_OR_MORE),
        Flag("warmdown_frac", float, 1.0, "share of the steps over which rates fall", SHARE),
        Flag("final_lr_frac", float, 0.0, "share of the rates left at the end", SHARE),
        # evaluation
        Flag("eval_every", int, 0, "period in steps of bits per byte on validation data, 0 for never", **COUNT),
        Flag("eval_tokens", int, None, "validation tokens, 0 for all (default: what suits the device)", **COUNT),
    )
}  # fmt: skip
RUN_FLAGS = ("save_every", "save_minutes", "keep_last", "keep_every", "skip_bad_steps", "resume")  # of every stage


def shared(*names: str, **defaults: Any) -> tuple[Flag, ...]:
    """Flags of the table: `names` with its defaults, the keywords' with the defaults they give."""
    return tuple(SHARED[name] for name in names) + tuple(
        replace(SHARED[name], default=default) for name, default in defaults.items()
    )


def add_flags(parser: argparse.ArgumentParser, flags: Iterable[Flag]) -> None:
    """Add `flags` to `parser`. The help of each tells its default."""
    for flag in flags:
        if flag.type is bool:
            parser.add_argument(flag.option, action="store_true", help=flag.help)
            continue
        is_told = "default" in flag.help or flag.default in (None, "")
        parser.add_argument(
            flag.option, type=flag.type, default=flag.default, choices=flag.choices, nargs=flag.nargs,
            metavar=flag.metavar, help=flag.help if is_told else f"{flag.help} (default: %(default)s)",
        )  # fmt: skip


def parse(description: str, flags: Iterable[Flag], *add_more: Callable[[argparse.ArgumentParser], None]):
    """The command line as a namespace; `add_more` are functions that add further flags to the parser.

    Raises `UserError` for the first flag out of its range.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add in add_more:
        add(parser)
    add_flags(parser, flags)
    args = parser.parse_args()
    for flag in flags:
        value = getattr(args, flag.name)
        if flag.range and value is not None and not flag.range.contains(value):
            raise UserError(f"{flag.option} must {flag.range.words}, not {value}")
    return args


def free_on_resume(flags: Iterable[Flag]) -> set[str]:
    """Names of the flags that may differ from those of the run being resumed, the runtime's among them."""
    return {*RUNTIME_FLAGS, *(flag.name for flag in flags if flag.is_free)}
