"""Results of chat tasks: intervals by hand, ChatCORE, and files that survive being stopped."""

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.evals import chat_results
from nanochat.evals.chat_results import Estimate, Item, ResultLog, Sample, TaskResult, chat_core, mean_estimate, wilson

SETTINGS = {"task": "Quiz", "temperature": 0.5, "top_k": None}


def make_item(index, *verdicts, is_cut=False, finish_reason="stop"):
    samples = tuple(
        Sample([{"type": "text", "text": "a\u2028b 東京\n"}], verdict, {"strict": float(verdict)}, finish_reason, 3)
        for verdict in verdicts
    )
    return Item(index, "<|bos|>Why?", is_cut, "Because.", None, 7, samples)


@pytest.mark.parametrize(
    ("right", "count", "low", "high"),
    [
        (8, 10, 0.4902, 0.9433),  # centre (0.8 + 0.19207) / 1.38415 = 0.71674, half width 0.22658
        (0, 10, 0.0, 0.2775),  # z^2 / (10 + z^2)
        (10, 10, 0.7225, 1.0), (50, 100, 0.4038, 0.5962),
    ],
)  # fmt: skip
def test_wilson_intervals_are_those_worked_out_by_hand(right, count, low, high):
    estimate = wilson(right / count, count)
    assert estimate.value == right / count
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 20000), st.floats(0, 1))
def test_wilson_intervals_end_where_the_share_is_just_not_surprising(count, part):
    share = round(part * count) / count
    estimate = wilson(share, count)
    assert 0 <= estimate.low <= share <= estimate.high <= 1
    for end in (estimate.low, estimate.high):
        if 0 < end < 1:
            assert abs(share - end) == pytest.approx(
                chat_results.Z * math.sqrt(end * (1 - end) / count), rel=1e-6, abs=1e-9
            )


def test_errors_of_a_mean_add_as_squares_on_each_side():
    a, b = Estimate(0.5, 0.2, 0.6), Estimate(0.3, -0.1, 0.5)
    mean = mean_estimate([a, b])
    assert mean.value == pytest.approx(0.4)
    assert mean.low == pytest.approx(0.4 - 0.25)  # sqrt(0.3^2 + 0.4^2) / 2
    assert mean.high == pytest.approx(0.4 + math.sqrt(0.1**2 + 0.2**2) / 2)
    single = mean_estimate([a])
    assert (single.value, single.low, single.high) == pytest.approx((a.value, a.low, a.high))


def test_chat_core_is_the_mean_of_accuracies_centred_to_0_for_guessing_and_1_for_all_right():
    assert Estimate(0.625, 0.25, 1.0).centered(0.25) == Estimate(0.5, 0.0, 1.0)
    half = TaskResult("half", 0.25, (make_item(0, True), make_item(1, False)), 0, 1.0)
    all_ = TaskResult("all", 0.0, (make_item(0, True),), 0, 1.0)
    assert chat_core([half, all_]).value == pytest.approx(((0.5 - 0.25) / 0.75 + 1.0) / 2)


def test_a_task_sums_samples_scores_and_counts():
    cut, long = make_item(1, False, False, is_cut=True), make_item(2, True, True, finish_reason="length")
    result = TaskResult("Quiz", 0.25, (make_item(0, True, False), cut, long), 1, 2.5)
    assert result.accuracy == wilson(0.5, 3)
    assert result.scores == {"strict": wilson(0.5, 3)}
    assert result.pass_at_k == wilson(2 / 3, 3)
    assert (result.num_cut, result.num_unfinished) == (1, 2)


def test_results_come_back_as_they_were_written_whatever_the_number_of_processes(tmp_path):
    log = ResultLog(tmp_path / "new" / "Quiz.jsonl", SETTINGS)
    items = [make_item(index, index % 2 == 0) for index in range(5)]
    log.write_whole(items[:1])
    for rank in range(2):
        append = log.appender(rank)
        for item in items[1 + rank :: 2]:
            append(item)
    ResultLog(tmp_path / "new" / "Quiz2.jsonl", SETTINGS).appender(0)(make_item(9, True))  # another task's
    assert sorted(log.recover(), key=lambda item: item.index) == items
    assert sorted(path.name for path in log.path.parent.iterdir()) == ["Quiz.jsonl", "Quiz2.part0.jsonl"]
    lines = log.path.read_text(encoding="utf-8").split("\n")
    assert json.loads(lines[0]) == {"settings": SETTINGS}
    assert [json.loads(line)["index"] for line in lines[1:-1]] == [0, 1, 2, 3, 4]


def test_a_line_that_is_not_whole_counts_for_nothing(tmp_path):
    assert ResultLog(tmp_path / "none" / "Quiz.jsonl", SETTINGS).recover() == []
    log = ResultLog(tmp_path / "Quiz.jsonl", SETTINGS)
    append = log.appender(0)
    append(make_item(0, True))
    append(make_item(1, True))
    part = tmp_path / "Quiz.part0.jsonl"
    part.write_bytes(part.read_bytes()[:-30])
    assert log.recover() == [make_item(0, True)]
    (tmp_path / "Quiz.part1.jsonl").write_text('{"sett')
    assert log.recover() == [make_item(0, True)]


@pytest.mark.parametrize("changed", [{"temperature": 1.0}, {"extra": 1}])
def test_results_of_other_settings_are_refused_with_both_values(tmp_path, changed):
    ResultLog(tmp_path / "Quiz.jsonl", SETTINGS).appender(0)(make_item(0, True))
    name, value = next(iter(changed.items()))
    with pytest.raises(UserError, match=rf"{name} {SETTINGS.get(name)}, which is {value} now.*without --resume"):
        ResultLog(tmp_path / "Quiz.jsonl", SETTINGS | changed).recover()


def test_discarded_results_are_gone_and_a_full_disk_is_named(tmp_path):
    log = ResultLog(tmp_path / "Quiz.jsonl", SETTINGS)
    log.write_whole([make_item(0, True)])
    log.appender(3)(make_item(1, True))
    log.discard()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write results"):
        ResultLog(tmp_path / "file" / "Quiz.jsonl", SETTINGS).appender(0)
