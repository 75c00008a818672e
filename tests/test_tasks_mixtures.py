"""The mixtures: no test split, train and validation apart, own files instead of them or beside them."""

import json

import pytest
from test_chat_loader import make_conversations

from nanochat.common import UserError
from tasks import loading
from tasks.common import TaskSlice
from tasks.mixtures import (
    GENERAL_EXAMPLES,
    MID_MIXTURES,
    SFT_MIXTURES,
    SMALL_WORLD_EXAMPLES,
    Corpus,
    Sources,
    load_corpus,
    mid_mixture,
    sft_mixture,
    some_of,
)
from tasks.own_data import OwnFile


class FakeSplit:
    """Stands for a split of the hub, of which only the length is asked."""

    def __init__(self, source):
        self.num_rows = min(source.num_rows, 20_000)

    def __len__(self):
        return self.num_rows


def write_own(path, count, **options):
    path.write_text("\n".join(json.dumps(conversation) for conversation in make_conversations(count, **options)))
    return str(path)


@pytest.fixture
def own(tmp_path):
    return write_own(tmp_path / "own.jsonl", 40)


def load(names, mixtures=MID_MIXTURES, **options):
    """Conversations to train on and to validate on."""
    return load_corpus(Sources(names, mixtures), **options)[:2]


def texts(task) -> list[str]:
    return [json.dumps(conversation) for conversation in task]


@pytest.mark.parametrize("mixture", [mid_mixture, sft_mixture])
def test_mixtures_train_on_train_splits_and_validate_on_validation_splits(monkeypatch, mixture):
    monkeypatch.setattr(loading, "load_split", FakeSplit)
    corpus = mixture()
    assert {task.purpose for task in corpus.train} == {"train"}
    assert {task.purpose for task in corpus.val} == {"validation"}
    assert {task.name for task in corpus.val} <= {task.name for task in corpus.train}


def test_some_of_a_task_are_drawn_from_all_of_it_and_always_the_same(own):
    task = OwnFile(own)
    part = some_of(task, 10)
    assert isinstance(part, TaskSlice)
    assert len(part) == 10
    assert list(part.rows) == sorted(set(part.rows)) != list(range(10))
    assert list(some_of(task, 10).rows) == list(part.rows)
    assert len(some_of(task, 1000)) == 40


def test_own_conversations_take_the_place_of_the_mixture_or_are_added_to_it(own, tmp_path):
    def forbidden() -> Corpus:
        raise AssertionError("the mixture was not asked for")

    train, val = load([own], {"mixture": forbidden})
    assert (len(train), len(val)) == (38, 2)
    assert sorted(texts(train) + texts(val)) == sorted(texts(OwnFile(own)))
    other = OwnFile(write_own(tmp_path / "other.jsonl", 5, seed=1))
    train, val = load(["mixture", own], {"mixture": lambda: Corpus([other], [])})
    assert (len(train), len(val)) == (38 + 5, 2)


def test_the_order_is_the_seeds_and_a_part_is_its_beginning(own):
    first, again, other = (load([own], seed=seed)[0] for seed in (1, 1, 2))
    assert texts(first) == texts(again) != texts(other)
    part, val = load([own], seed=1, max_conversations=7)
    assert texts(part) == texts(first)[:7]
    assert len(val) == 2


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl"):
        load([str(tmp_path / "none.jsonl")])


def test_the_small_world_stands_for_generated_conversations_that_differ_by_stage():
    (mid, mid_val), (sft, sft_val) = (load(["small_world"], m) for m in (MID_MIXTURES, SFT_MIXTURES))
    assert len(mid) > len(sft) > 0
    assert texts(mid[:50]) != texts(sft[:50])
    assert sorted(texts(mid_val)) == sorted(texts(sft_val))


def test_examples_are_those_of_what_is_trained_on_in_turn(own, tmp_path, monkeypatch):
    def examples(*names):
        return list(load_corpus(Sources(names, SFT_MIXTURES))[2])

    monkeypatch.setattr(loading, "load_split", FakeSplit)
    assert examples("small_world") == list(SMALL_WORLD_EXAMPLES)
    turns = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}]
    long, lines = ([{**turns[0], "content": text}, turns[1]] for text in ("why " * 30, "Why?\nWhy?"))
    with_system = [{"role": "system", "content": "Rhyme."}, {**turns[0], "content": "What?"}, turns[1]]
    path = tmp_path / "few.jsonl"
    path.write_text("\n".join(map(json.dumps, [long, lines, with_system, turns, turns])))
    assert examples(str(path)) == ["Why?"]
    assert examples(str(path), "mixture") == ["Why?", *GENERAL_EXAMPLES[:3]]
