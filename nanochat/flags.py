"""Command-line flags: the name, type, default, meaning and range of each, written once.

A script lists its flags by group: `shared("run", eval_every=150)` takes flags from the table below, `eval_every` with
a default of the script's own; a `Flag` belongs to that script alone. From these groups `parse` builds the command line
and checks the ranges, and `free_on_resume` tells which flags may change when a run is resumed. Scripts with flags of
other forms (lists, short names) give them to a `Parser` themselves.

Not here: checks that involve several flags (the scripts) or what the machine has (`common.py`).
"""

import argparse
import difflib
import math
import re
import sys
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain
from typing import Any, NoReturn

from nanochat.common import DEVICES, DTYPES, FP8, UserError

SOURCES = ("base", "mid", "sft", "rl")  # stages that write checkpoints
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
    choices: Collection[str] | None = None
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
        Flag("device_type", str, "", "kind of device (default: the best one present)", choices=DEVICES, **FREE),
        Flag("dtype", str, "", "type of activations and matrix products (default: what suits the device)",
             choices=(*DTYPES, FP8), **FREE),
        Flag("attention", str, "", "backend of attention in training (default: the fastest that fits)",
             choices=ATTENTION, **FREE),
        Flag("recompute", bool, False, "make the MLPs' activations again in backward: they take half "
             "the memory, and a step about a tenth more time", **FREE),
        Flag("no_compile", bool, False, "run the model eagerly on a GPU too", **FREE),
        Flag("run", str, "", "name of the run on wandb (default: no wandb)", **FREE),
        Flag("seed", int, 42, "random seed of the order of the data and of sampling"),
        # checkpoints
        Flag("source", str, "base", "stage of the checkpoint", choices=SOURCES),
        Flag("model_tag", str, "", "name of the checkpoint folder (default: the one saved last)"),
        Flag("step", int, None, "step of the checkpoint (default: the last)"),
        Flag("output_tag", str, "", "name of the new checkpoint folder (default: that of the source)"),
        Flag("save_every", int, 0, "checkpoint period in steps, 0 for the last step only", **COUNT),
        Flag("save_minutes", float, 0.0, "checkpoint period in minutes, in addition, 0 for none", **COUNT),
        Flag("keep_last", int, 0, "checkpoints of the run to keep, 0 for all; older ones are deleted", **COUNT),
        Flag("keep_every", int, 0, "period in steps of those to keep in addition to --keep-last, 0 for none", **COUNT),
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
        Flag("num_steps", int, None, "optimizer steps, instead of --epochs (default: those of the epochs)", POSITIVE),
        # optimization
        Flag("total_batch_size", int, 0, "tokens per optimizer step, 0 for what suits model and horizon", ZERO_OR_MORE),
        Flag("device_batch_size", int, 0, "rows per micro-step on each device, 0 for what fits the memory", **COUNT),
        Flag("lr_mult", float, 1.0, "multiplies every learning rate", ZERO_OR_MORE),
        Flag("weight_decay", float, 0.0, "weight decay of the matrices", ZERO_OR_MORE),
        Flag("warmup_steps", int, 40, "steps over which rates rise, at most 5 %% of all", ZERO_OR_MORE),
        Flag("warmdown_frac", float, 1.0, "share of the steps, 0 to 1, over which rates fall", SHARE),
        Flag("final_lr_frac", float, 0.0, "share of the rates, 0 to 1, left at the end", SHARE),
        # evaluation
        Flag("eval_every", int, 0, "period in steps of bits per byte on validation data, 0 for never", **COUNT),
        Flag("eval_tokens", int, None, "validation tokens, 0 for all (default: what suits the device)", **COUNT),
    )
}  # fmt: skip
RUN_FLAGS = ("save_every", "save_minutes", "keep_last", "keep_every", "skip_bad_steps", "resume")  # of every stage


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """The beginning of a sentence that offers the one of the `known` words that `word` was probably meant to be, as it
    begins with it or is much like it, in whatever case; empty if there is none."""
    by_lower, word = {each.lower(): each for each in known}, word.lower()
    near = [low for low in by_lower if word and low.startswith(word)] or difflib.get_close_matches(word, by_lower, n=1)
    return f"did you mean {by_lower[min(near, key=len)]}? " if near else ""


def shared(*names: str, **defaults: Any) -> tuple[Flag, ...]:
    """Flags of the table: `names` with its defaults, the keywords' with the defaults they give."""
    return tuple(SHARED[name] for name in names) + tuple(
        replace(SHARED[name], default=default) for name, default in defaults.items()
    )


class _HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Tells each flag's default where its help does not say it already."""

    def _get_help_string(self, action: argparse.Action) -> str:
        if "default" in action.help or action.dest == "help" or not action.option_strings:
            return action.help
        default = "off" if action.nargs == 0 else "%(default)s"
        return f"{action.help} ({'required' if action.required else f'default: {default}'})"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return {int: "N", float: "X"}.get(action.type) or action.dest.split("_")[-1].upper()


class Parser(argparse.ArgumentParser):
    """The parser of every script: a mistake is a `UserError` of one line that names the value and what was probably
    meant; the help shows each flag's default. Groups of one title are one group. Flags cannot be abbreviated, or a
    mistyped one could mean another, and a new one change the meaning of an old command.

    usage: what follows the program's name, besides flags.
    """

    def __init__(self, description: str, usage: str = "[flags]"):
        spec = sys.modules["__main__"].__spec__
        super().__init__(
            prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
            usage=f"%(prog)s {usage}",
            description=description,
            formatter_class=partial(_HelpFormatter, max_help_position=28),
            allow_abbrev=False,
        )

    def add_argument_group(self, title: str, *args, **kwargs):
        known = [group for group in self._action_groups if group.title == title]
        return known[0] if known else super().add_argument_group(title, *args, **kwargs)

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        words = list(sys.argv[1:] if args is None else args)
        if words[:1] == ["--"]:  # which torchrun passes on, depending on the version of Python
            del words[0]
        for word in words[: words.index("--") if "--" in words else None]:
            name = word.partition("=")[0]  # looked at first, as a mistyped flag may be one that is required
            if name.startswith("--") and " " not in name and name not in self._option_string_actions:
                self.error(f"unknown flag {name}; {did_you_mean(name, self._option_string_actions)}")
        found, rest = self.parse_known_args(words, namespace)
        if rest:
            self.error(f"{rest[0]!r} is neither a flag nor the value of one; ")
        return found

    def _get_value(self, action: argparse.Action, text: str) -> Any:
        try:
            return super()._get_value(action, text)
        except argparse.ArgumentError as error:
            kind = {int: "a whole number", float: "a number"}[action.type]
            raise UserError(f"{'/'.join(action.option_strings)} must be {kind}, not {text!r}") from error

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in (*action.choices, action.default):  # "" may be given as such
            name, hint = "/".join(action.option_strings) or action.dest, did_you_mean(str(value), action.choices)
            raise UserError(f"{name} must be one of {', '.join(action.choices)}, not {value!r}; {hint}".rstrip("; "))

    def error(self, message: str) -> NoReturn:
        message = re.sub("expected (at least )?one argument", "a value is missing", message.removeprefix("argument "))
        raise UserError(f"{message}{'' if message.endswith(' ') else '; '}--help lists the flags")


Group = argparse.ArgumentParser | argparse._ArgumentGroup


def add_flags(group: Group, flags: Iterable[Flag]) -> None:
    """Add `flags` to a parser or a group of its flags."""
    for flag in flags:
        options: dict[str, Any] = {"default": flag.default, "help": flag.help}
        if flag.type is bool:
            options |= {"action": "store_true"}
        else:
            options |= {"type": flag.type, "choices": flag.choices, "nargs": flag.nargs, "metavar": flag.metavar}
        group.add_argument(flag.option, **options)


def add_runtime_flags(parser: argparse.ArgumentParser) -> None:
    """The arguments of `init_runtime`, for scripts that run a model but do not train it."""
    add_flags(parser.add_argument_group("runtime"), (SHARED["device_type"], replace(SHARED["dtype"], choices=DTYPES)))


def parse(
    description: str, groups: Mapping[str, Iterable[Flag]], *add_more: Callable[[argparse.ArgumentParser], None]
) -> argparse.Namespace:
    """The command line as a namespace. `groups` are flags by the title of their group, `add_more` functions that add
    further ones to the parser.

    Raises `UserError` for the first flag that is unknown, of the wrong type or out of its range.
    """
    parser = Parser(description)
    for title, flags in groups.items():
        add_flags(parser.add_argument_group(title), flags)
    for add in add_more:
        add(parser)
    args = parser.parse_args()
    for flag in chain(*groups.values()):
        value = getattr(args, flag.name)
        if flag.range and value is not None and not flag.range.contains(value):
            raise UserError(f"{flag.option} must {flag.range.words}, not {value}")
    return args


def free_on_resume(groups: Mapping[str, Iterable[Flag]]) -> set[str]:
    """Names of the flags that may differ from those of the run being resumed."""
    return {flag.name for flag in chain(*groups.values()) if flag.is_free}
