"""Flags: ranges, defaults, help, and which may change when a run is resumed; the command line of every program."""

import importlib
import math
import re
from itertools import chain
from pathlib import Path

import pytest

from nanochat.common import UserError
from nanochat.flags import POSITIVE, SHARED, Flag, Parser, free_on_resume, parse, shared

SCRIPTS = sorted(f"scripts.{path.stem}" for path in (Path(__file__).parent.parent / "scripts").glob("[!_]*.py"))
FLAGS = {
    "run": (
        *shared("run", "resume", "num_steps", "max_conversations", "data", lr_mult=0.1, warmdown_frac=0.5),
        *shared("final_lr_frac", "eval_every", "eval_tokens", "device_type", "dtype"),
    ),
    "model": (
        Flag("arch", str, "a", "of the model", choices=("a", "b")),
        Flag("minutes", float, None, "of training (default: no limit)", POSITIVE),
    ),
}


def parsed(monkeypatch, text: str = ""):
    monkeypatch.setattr("sys.argv", ["stage", *text.split()])
    return parse("A stage.", FLAGS)


def test_defaults_are_those_of_the_table_unless_a_stage_has_its_own(monkeypatch):
    assert vars(parsed(monkeypatch)) == {
        "run": "", "resume": False, "num_steps": None, "final_lr_frac": 0.0, "max_conversations": 0,
        "data": ["mixture"], "lr_mult": 0.1, "warmdown_frac": 0.5, "eval_every": 0, "eval_tokens": None, "arch": "a",
        "minutes": None, "device_type": "", "dtype": "",
    }  # fmt: skip
    assert SHARED["lr_mult"].default == 1.0


def test_values_have_the_type_of_their_flag(monkeypatch):
    args = parsed(monkeypatch, "--resume --num-steps 3 --lr-mult 2 --data a b --arch b --dtype float32")
    assert (args.resume, args.num_steps, args.lr_mult, args.data, args.arch) == (True, 3, 2.0, ["a", "b"], "b")
    assert args.dtype == "float32"


@pytest.mark.parametrize(("flag", "value", "range"), [
    ("--minutes", "0", "be a number above 0"), ("--num-steps", "-1", "be a number above 0"),
    ("--minutes", "inf", "be a number above 0"), ("--lr-mult", "nan", "be a number of 0 or more"),
    ("--max-conversations", "-1", "be a number of 0 or more"), ("--warmdown-frac", "1.5", "lie between 0 and 1"),
    ("--final-lr-frac", "-0.5", "lie between 0 and 1"),
])  # fmt: skip
def test_a_flag_out_of_range_is_named_with_its_value(flag, value, range, monkeypatch):
    with pytest.raises(UserError, match=f"{flag} must {range}, not {value}"):
        parsed(monkeypatch, f"{flag} {value}")


def test_every_default_is_in_its_range_and_of_its_type_and_nan_in_no_range():
    for flag in SHARED.values():
        assert flag.default is None or isinstance(flag.default, flag.type | list)
        assert flag.default is None or flag.range is None or flag.range.contains(flag.default)
        assert flag.range is None or not flag.range.contains(math.nan)


def test_the_help_has_every_flag_with_its_meaning_and_default(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--help")
    text = " ".join(capsys.readouterr().out.split())
    for flag in chain(*FLAGS.values()):
        assert flag.option in text
        assert flag.help.replace("%%", "%") in text
    assert "multiplies every learning rate (default: 0.1)" in text
    assert "{a,b} of the model (default: a)" in text
    assert "name of the run on wandb (default: no wandb) --resume continue" in text
    assert "if there is one (default: off)" in text
    assert "run: --run RUN" in text


def test_what_is_only_watched_or_where_it_runs_is_free_on_resuming():
    assert free_on_resume(FLAGS) == {"run", "resume", "eval_every", "eval_tokens", "device_type", "dtype"}


# --- every script ---
PROGRAMS = [*SCRIPTS, "nanochat.data.dataset", "nanochat.report.__main__"]


@pytest.fixture(params=PROGRAMS)
def parser_of_program(request, monkeypatch) -> Parser:
    """The parser of a program, just before it reads the command line."""

    class BuiltError(Exception):
        pass

    def stop(parser):
        raise BuiltError(parser)

    monkeypatch.setattr(Parser, "parse_args", stop)
    with pytest.raises(BuiltError) as built:
        importlib.import_module(request.param).parse_args()
    return built.value.args[0]


def test_every_flag_of_every_program_is_in_a_named_group_and_has_a_help_that_tells_its_default(parser_of_program):
    parser = parser_of_program
    ungrouped = {"positional arguments": {"action", "model"}, "options": {"help"}}
    for group in parser._action_groups:
        for action in group._group_actions:
            if group.title in ungrouped:
                assert action.dest in ungrouped[group.title], f"{action.dest} is in no group"
                continue
            help_ = parser._get_formatter()._expand_help(action)
            is_told = re.search(r"\(default: (?!None|\[|\))|\(default, |\(required\)|with its default", help_)
            assert is_told, f"{action.dest}: {help_}"
    text = parser.format_help()
    assert text.startswith("usage: ")
    assert len(text.splitlines()[0]) < 80


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--num-stesp 4", "unknown flag --num-stesp; did you mean --num-steps? --help lists the flags"),
        ("--num_steps=4", "unknown flag --num_steps; did you mean --num-steps? --help lists the flags"),
        ("--num 4", "unknown flag --num; did you mean --num-steps? --help lists the flags"),  # no abbreviations
        ("--xyzzy", "unknown flag --xyzzy; --help lists the flags"),
        ("--num-steps", "--num-steps: a value is missing; --help lists the flags"),
        ("--data", "--data: a value is missing; --help lists the flags"),
        ("--num-steps many", "--num-steps must be a whole number, not 'many'"),
        ("--num-steps 1.5", "--num-steps must be a whole number, not '1.5'"),
        ("--lr-mult=low", "--lr-mult must be a number, not 'low'"),
        ("--arch c", "--arch must be one of a, b, not 'c'"),
        ("--dtype bf16", "--dtype must be one of float32, bfloat16, float16, fp8, not 'bf16'; did you mean bfloat16?"),
        ("--resume 4", "'4' is neither a flag nor the value of one; --help lists the flags"),
        ("-x", "'-x' is neither a flag nor the value of one; --help lists the flags"),
    ],
)
def test_a_mistake_on_the_command_line_is_one_line_that_says_what_was_probably_meant(text, message, monkeypatch):
    with pytest.raises(UserError) as refused:
        parsed(monkeypatch, text)
    assert str(refused.value) == message


def test_a_value_may_look_like_a_flag_and_what_torchrun_puts_first_is_passed_over(monkeypatch):
    parser = Parser("A chat.")
    group = parser.add_argument_group("chat")
    group.add_argument("-p", "--prompt", default="")
    group.add_argument("--number", type=int, default=0)
    assert parser.add_argument_group("chat") is group
    assert parser.parse_args(["-p", "--really now?", "--number", "-3"]).prompt == "--really now?"
    assert parser.parse_args(["--", "--prompt=--yes"]).prompt == "--yes"
