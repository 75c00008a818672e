"""Checkpoints written while training goes on: what is saved, what is kept, and how failures reach the run."""

import threading

import pytest
import torch
from test_checkpoint import RUNTIME, STATE, assert_loads, names_in

from nanochat import checkpoint
from nanochat.checkpoint import list_steps, run_dir
from nanochat.common import UserError
from nanochat.training import saving
from nanochat.training.saving import Saver


@pytest.fixture
def run(base_folder):
    return run_dir("base", "d3")


@pytest.fixture
def gate(monkeypatch) -> threading.Event:
    """Files are written once this is set."""
    gate, save_file = threading.Event(), checkpoint.save_file

    def wait_and_save(tensors, path, metadata):
        assert gate.wait(20)
        save_file(tensors, path)

    monkeypatch.setattr(checkpoint, "save_file", wait_and_save)
    return gate


def make_saver(run, *, keep_last: int = 0, keep_every: int = 0) -> Saver:
    return Saver(run, RUNTIME, keep_last=keep_last, keep_every=keep_every)


@pytest.fixture
def parts(tiny_model, tokenizer) -> dict:
    state = {name: tensor.clone() for name, tensor in STATE.items()}
    return {
        "model": tiny_model, "tokenizer": tokenizer, "meta": {"args": {}}, "optimizer_state": state,
        "loader_state": state,
    }  # fmt: skip


def test_what_is_saved_is_what_was_there_when_saving_began(run, gate, parts, tiny_model):
    before = {name: tensor.clone() for name, tensor in tiny_model.state_dict().items()}
    saver = make_saver(run)
    saver.start(5, **parts)
    with torch.no_grad():
        for tensor in (*tiny_model.parameters(), *parts["optimizer_state"].values()):
            tensor.fill_(7)
    assert saver.is_writing
    assert list_steps(run) == []
    gate.set()
    saver.finish()
    assert (list_steps(run), saver.last_saved, saver.is_writing) == ([5], 5, False)
    with torch.no_grad():
        tiny_model.load_state_dict(before)
    assert_loads(checkpoint.step_dir(run, 5), tiny_model)
    saved = checkpoint.load_tensors(checkpoint.step_dir(run, 5) / "optimizer_rank0.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in STATE.items())
    saver.finish()  # nothing to wait for


def test_an_error_of_the_thread_is_raised_when_the_checkpoint_would_be_complete(run, parts, monkeypatch):
    def full(tensors, path, metadata):
        raise OSError(28, "No space left on device")

    saver = make_saver(run)
    saver.start(5, **parts)
    saver.finish()
    monkeypatch.setattr(checkpoint, "save_file", full)
    saver.start(10, **parts)
    with pytest.raises(UserError, match=r"cannot write the checkpoint .* No space left"):
        saver.start(15, **parts)
    assert names_in(run) == ["step_000005"]
    assert saver.last_saved == 5


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        ({}, [2, 4, 6, 8, 10]), ({"keep_every": 4}, [2, 4, 6, 8, 10]), ({"keep_last": 1}, [10]),
        ({"keep_last": 2, "keep_every": 4}, [4, 8, 10]), ({"keep_last": 9}, [2, 4, 6, 8, 10]),
    ],
)  # fmt: skip
def test_the_newest_checkpoints_are_kept_and_some_older_ones(keep, kept, run, parts):
    run.mkdir(parents=True)
    (run / "step_000099.damaged1").mkdir()
    saver, steps = make_saver(run, **keep), range(2, 12, 2)
    most = 0
    for step in steps:
        saver.start(step, **parts)
        most = max(most, 1 + len(list_steps(run)))  # the one being written takes room as well
        saver.finish()
    assert list_steps(run) == kept
    assert names_in(run) == [*(f"step_{step:06d}" for step in kept), "step_000099.damaged1"]
    assert saver._num_more([], steps) == most
    assert saver._num_more(kept, [12]) == 1


@pytest.mark.parametrize("trouble", ["a file in the way", "a read-only disk"])
def test_a_folder_that_cannot_be_written_to_is_named_before_the_first_step(trouble, run, monkeypatch):
    if trouble == "a file in the way":
        run.parent.parent.mkdir(exist_ok=True)
        run.parent.touch()
        words = f"cannot create {run}: "
    else:
        monkeypatch.setattr(saving.os, "access", lambda path, mode: False)
        words = f"cannot write to {run}: no permission, or the disk is read-only"
    with pytest.raises(UserError, match=words):
        make_saver(run).check_disk(1000, [5])


def test_an_interrupted_deletion_leaves_no_half_checkpoint_and_is_made_up_for(run, parts, monkeypatch):
    saver = make_saver(run, keep_last=1)
    saver.start(1, **parts)
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)
        saver.start(2, **parts)
        saver.finish()
    assert names_in(run) == [".step_000001.partial", "step_000002"]
    saver.start(3, **parts)
    saver.finish()
    assert names_in(run) == ["step_000003"]
