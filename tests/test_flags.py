"""Flags: their ranges, defaults, help, and which may change when a run is resumed."""

import math

import pytest

from nanochat.common import UserError, add_runtime_flags
from nanochat.flags import POSITIVE, SHARED, Flag, free_on_resume, parse, shared

FLAGS = (
    *shared("run", "resume", "num_steps", "final_lr_frac", "max_conversations", "data", lr_mult=0.1, warmdown_frac=0.5),
    *shared("eval_every", "eval_tokens"),
    Flag("arch", str, "a", "of the model", choices=("a", "b")),
    Flag("minutes", float, None, "of training", POSITIVE),
)


def parsed(monkeypatch, text: str = ""):
    monkeypatch.setattr("sys.argv", ["stage", *text.split()])
    return parse("A stage.", FLAGS, add_runtime_flags)


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
    for flag in FLAGS:
        assert flag.option in text
        assert flag.help.replace("%%", "%") in text
    assert "multiplies every learning rate (default: 0.1)" in text
    assert "{a,b} of the model (default: a)" in text
    assert "name of the run on wandb (default: no wandb) --resume" in text


def test_what_is_only_watched_or_where_it_runs_is_free_on_resuming():
    assert free_on_resume(FLAGS) == {"run", "resume", "eval_every", "eval_tokens", "device_type", "dtype"}
