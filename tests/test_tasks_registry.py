import pytest

from nanochat.common import UserError
from tasks.registry import (
    ALL_NAMES,
    SMALL_WORLD_NAMES,
    STANDARD_NAMES,
    TASK_NAMES,
    get_standard_task,
    get_task,
    task_names,
)


def test_the_six_tasks_are_there_without_loading_anything():
    assert TASK_NAMES == ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee")
    for name in TASK_NAMES:
        task = get_task(name)
        assert (task.name, task.purpose) == (name, "test")
        assert task.kind in ("categorical", "generative")
        assert task.baseline == (0.25 if task.kind == "categorical" else 0)


@pytest.mark.parametrize("purpose", ["train", "validation", "test"])
def test_every_purpose_has_rows_of_its_own(purpose):
    for name in ALL_NAMES:
        if name not in ("HumanEval", "MMLU-Pro"):
            task = get_task(name, purpose=purpose)
            assert (task.name, task.purpose) == (name, purpose)
            assert task.has_reward or name not in ("Spelling", *SMALL_WORLD_NAMES)


def test_an_unknown_name_and_a_missing_split_are_errors():
    with pytest.raises(UserError, match=r"no task 'arc'; did you mean ARC-Easy\? there are ARC-Easy, ARC"):
        get_task("arc")
    with pytest.raises(UserError, match=r"no task 'mmlu-por'; did you mean MMLU-Pro\?"):
        get_task("mmlu-por")
    for name in ("HumanEval", "MMLU-Pro"):
        with pytest.raises(UserError, match=f"{name} is only for the purpose 'test'"):
            get_task(name, purpose="train")


def test_a_standard_prompt_has_a_name_that_tells_its_shots_and_is_no_part_of_chat_core():
    tasks = {name: get_standard_task(name) for name in STANDARD_NAMES}
    assert [f"{name} {task.num_shots}-shot" for name, task in tasks.items()] == [task.name for task in tasks.values()]
    assert [task.num_shots for task in tasks.values()] == [0, 25, 5, 5, 0, 5]
    assert all(task.is_text and task.purpose == "test" for task in tasks.values())
    assert not {task.name for task in tasks.values()} & set(ALL_NAMES)
    with pytest.raises(UserError, match="SpellingBee has no standard prompt; ARC-Easy, "):
        get_standard_task("SpellingBee")
    with pytest.raises(UserError, match=r"no task 'GSM8'; did you mean GSM8K\?"):
        get_standard_task("GSM8")


def test_code_runs_without_isolation_only_when_that_was_allowed():
    assert not get_task("HumanEval").allow_unsafe_execution
    assert get_task("HumanEval", allow_unsafe_execution=True).allow_unsafe_execution


def test_there_are_more_words_to_train_on_than_to_test():
    assert "Spelling" not in TASK_NAMES
    for name in ("Spelling", "SpellingBee"):
        train, validation, test = (len(get_task(name, purpose=p)) for p in ("train", "validation", "test"))
        assert train > validation > test == 256


def test_names_are_divided_and_the_small_world_stands_for_its_exams():
    assert task_names("GSM8K | MMLU|GSM8K") == ("GSM8K", "MMLU")
    assert task_names("small_world|GSM8K|SmallWorld-sums") == (*SMALL_WORLD_NAMES, "GSM8K")
