import pytest

from nanochat.common import UserError
from tasks.registry import SMALL_WORLD_NAMES, TASK_NAMES, get_task, task_names


def test_the_six_tasks_are_there_without_loading_anything():
    assert TASK_NAMES == ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
    for name in TASK_NAMES:
        task = get_task(name)
        assert task.name == name
        assert task.purpose == "test"
        assert task.kind in ("categorical", "generative")
        assert task.baseline == (0.25 if task.kind == "categorical" else 0)


@pytest.mark.parametrize("purpose", ["train", "validation"])
def test_other_purposes_have_rows_of_their_own(purpose):
    for name in TASK_NAMES:
        if name != "HumanEval":
            assert get_task(name, purpose=purpose).purpose == purpose


def test_human_eval_is_for_reporting_only():
    with pytest.raises(UserError, match="HumanEval is only for the purpose 'test'"):
        get_task("HumanEval", purpose="train")


def test_an_unknown_name_is_an_error_that_lists_the_known():
    with pytest.raises(UserError, match=r"no task 'arc'; there are ARC-Easy, ARC-Challenge, MMLU"):
        get_task("arc")


def test_code_runs_without_isolation_only_when_that_was_allowed():
    assert not get_task("HumanEval").allow_unsafe_execution
    assert get_task("HumanEval", allow_unsafe_execution=True).allow_unsafe_execution


def test_words_to_spell_are_a_task_of_their_own_with_more_to_train_on():
    tasks = {purpose: get_task("Spelling", purpose=purpose) for purpose in ("train", "validation", "test")}
    assert "Spelling" not in TASK_NAMES
    assert all((task.name, task.has_reward) == ("Spelling", True) for task in tasks.values())
    assert len(tasks["train"]) > len(tasks["validation"]) > len(tasks["test"]) == len(get_task("SpellingBee")) == 256


def test_the_small_worlds_exams_have_rows_for_every_purpose():
    for name in SMALL_WORLD_NAMES:
        for purpose in ("train", "validation", "test"):
            task = get_task(name, purpose=purpose)
            assert (task.name, task.purpose, task.has_reward) == (name, purpose, True)


def test_names_are_divided_and_the_small_world_stands_for_its_exams():
    assert task_names("GSM8K | MMLU|GSM8K") == ("GSM8K", "MMLU")
    assert task_names("small_world|GSM8K|SmallWorld-sums") == (*SMALL_WORLD_NAMES, "GSM8K")
