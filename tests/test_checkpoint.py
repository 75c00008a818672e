"""Checkpoints are whole or not there: identity of save and load, failures at every point of writing, refusals."""

import errno
import itertools
import json
import os
import resource
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import random_model
from ranks import run_ranks

from nanochat import checkpoint
from nanochat.checkpoint import find_checkpoint, load_rank_states, read_meta, run_dir
from nanochat.common import Runtime, UserError
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.model.load import load_model, load_weights
from nanochat.tokenizer import Tokenizer
from nanochat.training.optim import MuonAdamW, parameter_groups

RUNTIME = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)
STATE = {"a": torch.arange(5.0), "none": torch.zeros(0, 3), "number": torch.tensor(7)}


def save(run: Path, step: int, model, tokenizer, **other) -> Path:
    known = {"runtime": RUNTIME, "meta": {"args": {}}, "optimizer_state": STATE, "loader_state": STATE}
    return checkpoint.save_checkpoint(run, step, model=model, tokenizer=tokenizer, **{**known, **other})


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_loads(folder: Path, model) -> None:
    state, loaded = model.state_dict(), load_weights(folder, read_meta(folder), RUNTIME).state_dict()
    assert all(torch.equal(value, loaded[name]) for name, value in state.items())


@pytest.fixture
def run(base_folder) -> Path:
    return run_dir("base", "d3")


@pytest.fixture
def folder(run, tiny_model, tokenizer) -> Path:
    """A checkpoint of step 5."""
    return save(run, 5, tiny_model, tokenizer)


# --- identity ---
def test_whoever_may_read_the_folder_may_read_all_its_files(folder):
    modes = {path.stat().st_mode for path in folder.rglob("*") if path.is_file()}
    assert modes == {(folder / "meta.json").stat().st_mode}


def test_loading_gives_back_all_that_was_saved_without_unpickling(run, tiny_model, tokenizer):
    optimizer = MuonAdamW(parameter_groups(tiny_model))  # from here on, parameters share storage
    idx = torch.randint(tokenizer.vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    tiny_model(idx, idx).backward()
    optimizer.step()
    meta = {"args": {"depth": 3, "data": "näme", "nothing": None}, "plan": {"rate": 1 / 3}, "best": float("inf")}
    folder = save(run, 12, tiny_model, tokenizer, meta=meta, optimizer_state=optimizer.state_dict())
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert suffixes <= {".json", ".safetensors", ".txt", ".tiktoken"}

    loaded = load_model("base", RUNTIME)
    assert loaded.folder == folder
    assert loaded.model.config == tiny_model.config
    assert loaded.tokenizer.fingerprint == tokenizer.fingerprint
    assert {name: loaded.meta[name] for name in meta} == meta
    assert (loaded.meta["step"], loaded.meta["world_size"]) == (12, 1)
    assert_loads(folder, tiny_model)
    torch.testing.assert_close(loaded.model(idx), tiny_model(idx), rtol=1e-4, atol=1e-4)
    assert not loaded.model.training
    assert not any(p.requires_grad for p in loaded.model.parameters())
    for name, state in (("optimizer", optimizer.state_dict()), ("loader", STATE)):
        (saved,) = load_rank_states(folder, loaded.meta, name)
        assert saved.keys() == state.keys()
        for key, value in state.items():
            assert saved[key].dtype == value.dtype
            assert torch.equal(saved[key], value)


def test_a_checkpoint_without_training_state_is_a_model_into_whose_dtype_narrow_tables_are_loaded(
    run, tiny_model, tokenizer
):
    tiny_model.wte.to(torch.bfloat16)
    folder = save(run, 1, tiny_model, tokenizer, optimizer_state=None, loader_state=None)
    assert names_in(folder) == ["checksums_rank0.json", "meta.json", "model.safetensors", "tokenizer"]
    assert_loads(folder, tiny_model)
    assert checkpoint.load_tensors(folder / "model.safetensors")["wte.weight"].dtype == torch.bfloat16
    assert load_weights(folder, read_meta(folder), RUNTIME).wte.weight.dtype == torch.float32


# --- names ---
@pytest.mark.parametrize(
    "tag", ["d20", "with space", ".hidden", "[a]*?", "~", "-x", "ünï 東京", "a\nb", "step_000001", "x" * 255, "%s{0}"]
)
def test_any_legal_file_name_is_a_model_tag(tag, tiny_model, tokenizer):
    save(run_dir("sft", tag), 3, tiny_model, tokenizer)
    assert find_checkpoint("sft", model_tag=tag).name == "step_000003"
    assert find_checkpoint("sft").parent == run_dir("sft", tag)


def test_a_tag_that_is_no_file_name_and_an_unknown_source_are_refused():
    for tag in ("", ".", "..", "a/b", "/etc", "../x", "a\0b", "x" * 256, "é" * 128):
        with pytest.raises(UserError, match="--model-tag"):
            run_dir("base", tag)
    with pytest.raises(UserError, match="'xyz' is unknown; choose one of base, mid, sft, rl"):
        run_dir("xyz", "d4")


def test_steps_sort_as_numbers_and_only_complete_checkpoints_are_listed(run, tiny_model, tokenizer):
    assert checkpoint.list_steps(run) == []
    steps = [1_000_000, 5, 999_999, 0, 40, 123_456_789]
    for step in steps:
        folder = save(run, step, tiny_model, tokenizer, optimizer_state=None, loader_state=None)
    for name in (".step_000009.partial", "step_9", "step_000010.bak", "xstep_000010", "step_٠٠٠٠١١"):
        shutil.copytree(folder, run / name)
    (run / "step_000011").mkdir()
    (run / "step_000012").write_text("a file")
    assert checkpoint.list_steps(run) == sorted(steps)
    assert find_checkpoint("base").name == "step_123456789"
    assert find_checkpoint("base", step=40).name == "step_000040"


# --- choice ---
@pytest.fixture
def save_at(tiny_model, tokenizer):
    """Saves a checkpoint as one that says it was written at that second."""

    def save_at(second: int, source: str, tag: str, step: int) -> Path:
        folder = save(run_dir(source, tag), step, tiny_model, tokenizer)
        (folder / "meta.json").write_text(json.dumps(read_meta(folder) | {"saved_at": second}))
        return folder

    return save_at


def test_the_run_saved_last_is_taken_unless_one_is_named_whenever_its_files_were_copied(save_at):
    for second, tag, step in ((100, "older", 900), (200, "newer", 10), (50, "oldest", 20)):
        os.utime(save_at(second, "base", tag, step) / "meta.json", (-second, -second))
    assert find_checkpoint("base").parent.name == "newer"
    assert find_checkpoint("base", model_tag="oldest").name == "step_000020"
    meta_path = run_dir("base", "oldest") / "step_000020" / "meta.json"
    meta = json.loads(meta_path.read_text())
    del meta["saved_at"]  # of before November 2026, where the file's time must do
    meta_path.write_text(json.dumps(meta))
    os.utime(meta_path, (300, 300))
    assert find_checkpoint("base").parent.name == "oldest"


def test_without_a_source_it_is_the_chat_model_saved_last_and_a_base_model_where_there_is_none(save_at):
    found = lambda **chosen: checkpoint.stage_of(find_checkpoint(**chosen))  # noqa: E731
    save_at(900, "base", "d4", 100)
    assert found() == "base"
    for second, source in ((100, "mid"), (200, "sft"), (300, "rl")):
        save_at(second, source, "d4", 10)
        assert found() == source
    save_at(400, "sft", "d4", 20)  # finetuned anew
    assert found() == "sft"
    save_at(950, "base", "d8", 100)
    assert found() == "sft"
    assert found(model_tag="d8") == "base"
    save_at(500, "mid", "d8", 10)
    assert find_checkpoint() == run_dir("mid", "d8") / "step_000010"
    assert find_checkpoint("rl") == run_dir("rl", "d4") / "step_000010"


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"source": "mid"}, "no mid checkpoint in {}; choose --source base or sft; train one first: "
         "python -m scripts.mid_train"),
        ({"source": "sft", "model_tag": "d20"}, "no sft checkpoint with --model-tag 'd20' in {}; did you mean d12? "
         "there are d12; choose --source base; train one first: python -m scripts.chat_sft"),
        ({"model_tag": "d21"}, "no checkpoint with --model-tag 'd21' in {}; did you mean d20? there are d12, d20"),
        ({"model_tag": "a/b"}, "no checkpoint with --model-tag 'a/b' in {}; there are d12, d20"),
        ({"source": "stf"}, "source 'stf' is unknown; did you mean sft? choose one of base, mid, sft, rl"),
        ({"source": "base", "step": 6}, "no checkpoint of step 6 in {}/base_checkpoints/d20; there are 5, 70"),
    ],
)  # fmt: skip
def test_a_missing_checkpoint_is_named_with_those_that_exist(chosen, words, save_at, base_folder):
    for source, tag, step in (("base", "d20", 5), ("base", "d20", 70), ("sft", "d12", 9)):
        save_at(1, source, tag, step)
    with pytest.raises(UserError) as refused:
        find_checkpoint(**chosen)
    assert str(refused.value) == words.format(base_folder)


@pytest.mark.parametrize("source", ["", "base", "rl"])
def test_where_there_is_no_checkpoint_at_all_the_command_that_makes_one_is_named(source):
    with pytest.raises(UserError, match=r"train one first: bash speedrun.sh; or set NANOCHAT_BASE_DIR"):
        load_model(source, RUNTIME)


# --- failures while writing ---
class Killed(BaseException):
    """Stands for the process ending at this point."""


def fail_at(monkeypatch, number: int, error: BaseException) -> list[str]:
    """Make the `number`-th of all file operations of a save raise; the list grows with each one begun."""
    begun = []

    def failing(name, original):
        def operation(*args, **kwargs):
            begun.append(name)
            if len(begun) == number:
                raise error
            return original(*args, **kwargs)

        return operation

    for owner, name in (
        (Path, "rename"), (checkpoint, "save_file"), (checkpoint, "write_atomic"),
        (checkpoint.os, "fsync"), (checkpoint.shutil, "rmtree"), (Tokenizer, "save"),
    ):  # fmt: skip
        monkeypatch.setattr(owner, name, failing(name, getattr(owner, name)))
    return begun


@pytest.fixture
def num_operations(run, tiny_model, tokenizer) -> int:
    """How many a save has; step 1 has been saved."""
    with pytest.MonkeyPatch.context() as patch:
        begun = fail_at(patch, -1, Killed())
        save(run, 1, tiny_model, tokenizer)
    assert {"save_file", "write_atomic", "rename", "fsync"} <= set(begun)
    return len(begun)


def test_killed_at_any_operation_the_newest_complete_checkpoint_loads(
    num_operations, run, tiny_model, tokenizer, monkeypatch
):
    monkeypatch.setattr(checkpoint.shutil, "rmtree", lambda *args, **kwargs: None)  # a killed process tidies nothing
    for number in range(1, num_operations + 1):
        with pytest.MonkeyPatch.context() as patch:
            begun = fail_at(patch, number, Killed())
            with pytest.raises(Killed):
                save(run, 1 + number, tiny_model, tokenizer)
        is_published = "rename" in begun[:-1]
        newest = checkpoint.list_steps(run)[-1]
        assert (newest == 1 + number) == is_published
        for step in (1, newest):
            assert_loads(checkpoint.step_dir(run, step), tiny_model)


def test_what_a_killed_process_left_is_cleared_by_the_next_save(run, tiny_model, tokenizer):
    save(run, 1, tiny_model, tokenizer)
    for step in (2, 3):
        shutil.copytree(checkpoint.step_dir(run, 1), run / f".step_{step:06d}.partial")
        (run / f".step_{step:06d}.partial" / "rest").write_text("of an earlier attempt")
    folder = save(run, 3, tiny_model, tokenizer)
    assert names_in(run) == ["step_000001", "step_000003"]
    assert names_in(folder) == names_in(checkpoint.step_dir(run, 1))


def test_a_full_disk_at_any_operation_is_a_clear_error_and_leaves_no_trace(num_operations, run, tiny_model, tokenizer):
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    for number in range(1, num_operations + 1):
        with pytest.MonkeyPatch.context() as patch:
            begun = fail_at(patch, number, full)
            with pytest.raises(UserError, match="No space left on device"):
                save(run, 1 + number, tiny_model, tokenizer)
        if "rename" not in begun[:-1]:
            assert names_in(run) == ["step_000001"]
        shutil.rmtree(checkpoint.step_dir(run, 1 + number), ignore_errors=True)
    assert_loads(checkpoint.step_dir(run, 1), tiny_model)


def test_a_checkpoint_is_never_replaced(run, folder, tiny_model, tokenizer):
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    other = build_model(tiny_model.config, generator=torch.Generator().manual_seed(9))
    with pytest.raises(UserError, match="step_000005 is there already"):
        save(run, 5, other, tokenizer)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert names_in(run) == ["step_000005"]


# --- damaged and foreign checkpoints ---
FILES = ["model.safetensors", "meta.json", "optimizer_rank0.safetensors"]


@pytest.mark.parametrize(
    ("name", "kept"), [*itertools.product(FILES, [None, 0.0, 0.001, 0.5, 0.999]), ("tokenizer", None)]
)
def test_a_truncated_file_never_loads_and_a_missing_one_is_named(name, kept, folder):
    if kept is None:
        shutil.rmtree(folder / name) if name == "tokenizer" else (folder / name).unlink()
    else:
        os.truncate(folder / name, int(kept * (folder / name).stat().st_size))
    with pytest.raises(UserError, match=name if kept is None else str(folder)):  # noqa: PT012
        meta = read_meta(folder)
        load_weights(folder, meta, RUNTIME)
        checkpoint.load_tokenizer(folder, meta)
        load_rank_states(folder, meta, "optimizer")


def test_a_flipped_bit_or_a_missing_file_is_a_fault_wherever_it_is(folder):
    assert checkpoint.fault_in(folder) is None
    paths = [path for path in folder.rglob("*") if path.is_file()]
    assert len(paths) >= 7
    for path in paths:
        whole = path.read_bytes()
        for place in (0, len(whole) // 2, len(whole) - 1):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 4]) + whole[place + 1 :])
            fault = checkpoint.fault_in(folder)
            assert fault is not None
            assert "checksums" in path.name or path.name in fault
        path.unlink()
        assert "checksums" in path.name or path.name in checkpoint.fault_in(folder)
        path.write_bytes(whole)
    assert checkpoint.fault_in(folder) is None
    meta = read_meta(folder)
    (folder / "checksums_rank0.json").unlink()  # as before there were any
    assert checkpoint.fault_in(folder) is None
    (folder / "meta.json").write_text(json.dumps(meta | {"schema": 2}))
    with pytest.raises(UserError, match="schema 2"):
        checkpoint.fault_in(folder)


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"schema": schema}, f"has schema {schema!r}, but this version reads schema 1") for schema in (0, 2, "1", None)]
    + [({"config": {"num_experts": 8}}, "num_experts"), ({"config": {"n_layer": 4}}, "do not fit")]
    + [(other, "schema None") for other in ([], 3, None, "a", {})],
)
def test_a_checkpoint_of_another_version_model_or_kind_is_refused_by_name(changes, words, folder):
    meta = read_meta(folder)
    if isinstance(changes, dict) and changes:
        changes = {**meta, **changes, "config": meta["config"] | changes.get("config", {})}
    (folder / "meta.json").write_text(json.dumps(changes))
    with pytest.raises(UserError, match=words):
        load_model("base", RUNTIME)


def test_the_tokenizer_of_another_vocabulary_is_refused(folder, texts):
    for other in (Tokenizer.train(texts, 390), Tokenizer.train([text[::-1] for text in texts], 400)):
        with pytest.raises(UserError, match="is not the one checkpoint"):
            checkpoint.check_tokenizer(other, read_meta(folder), folder)
        shutil.rmtree(folder / "tokenizer")
        other.save(folder / "tokenizer")
        with pytest.raises(UserError, match="is not the one checkpoint"):
            load_model("base", RUNTIME)


# --- resuming ---
def test_a_new_run_has_nothing_to_resume_and_an_earlier_one_is_not_overwritten(run, tiny_model, tokenizer):
    for resume in (False, True):
        assert checkpoint.resumable(run, Namespace(resume=resume), ()) == {}
    save(run, 5, tiny_model, tokenizer)
    with pytest.raises(UserError, match="--resume"):
        checkpoint.resumable(run, Namespace(resume=False), {"resume"})


def test_resuming_goes_on_from_the_newest_step_if_no_flag_contradicts(run, tiny_model, tokenizer):
    args = {"depth": 3, "lr_mult": 0.5, "data": "x", "token_ratio": None, "resume": False, "run": ""}
    for step in (5, 10):
        save(run, step, tiny_model, tokenizer, meta={"args": args, "results": {"step": step}})
    free = {"resume", "run"}
    resumed = checkpoint.resumable(run, Namespace(**{**args, "resume": True, "run": "name"}), free)
    assert (resumed["step"], resumed["results"]) == (10, {"step": 10})
    for name, value in (("depth", 4), ("lr_mult", 1.0), ("token_ratio", 8.0)):
        flag = f"--{name.replace('_', '-')}"
        with pytest.raises(UserError, match=f"{flag} is {value} here but {args[name]} in the run"):
            checkpoint.resumable(run, Namespace(**{**args, "resume": True, name: value}), free)


def test_resuming_passes_over_damaged_checkpoints_with_a_word_and_sets_them_aside_when_in_the_way(
    run, tiny_model, tokenizer, capsys
):
    for step in (5, 10, 15):
        folder = save(run, step, tiny_model, tokenizer)
    shutil.copytree(checkpoint.step_dir(run, 5), checkpoint.step_dir(run, 20))
    missing = checkpoint.step_dir(run, 20) / "meta.json"
    missing.unlink()
    checkpoint.step_dir(run, 25).mkdir()
    args = Namespace(resume=True)
    for step, name in ((15, "loader_rank0.safetensors"), (10, "meta.json")):
        os.truncate(checkpoint.step_dir(run, step) / name, 100)
    assert checkpoint.resumable(run, args, {"resume"})["step"] == 5
    said = capsys.readouterr().out.splitlines()
    assert said == [
        "passed over step_000025, which is damaged: it has no meta.json",
        f"passed over step_000020, which is damaged: cannot read {missing}: No such file or directory",
        "passed over step_000015, which is damaged: loader_rank0.safetensors has changed since it was written",
        "passed over step_000010, which is damaged: meta.json has changed since it was written",
    ]
    save(run, 15, tiny_model, tokenizer)
    whole = [f"step_{number:06}" for number in (5, 10, 15, 20, 25)]
    assert names_in(run) == [*whole[:3], "step_000015.damaged1", *whole[3:]]
    assert_loads(folder, tiny_model)
    shutil.rmtree(folder)
    os.truncate(checkpoint.step_dir(run, 5) / "model.safetensors", 100)
    with pytest.raises(UserError, match=r"every checkpoint in .* is damaged, the newest because it has no meta.json"):
        checkpoint.resumable(run, args, {"resume"})


# --- several ranks ---
def rank_model(rank: int, tokenizer) -> tuple:
    """The tiny model and an optimizer that has taken one step of made-up gradients, on this rank of two."""
    config = GPTConfig.from_depth(2, vocab_size=tokenizer.vocab_size, sequence_len=16, head_dim=32)
    model = random_model(config)
    optimizer = MuonAdamW(parameter_groups(model), rank=rank, world_size=2)
    generator = torch.Generator().manual_seed(rank)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator)
    optimizer.step()
    return model, optimizer


def save_on_two_ranks(rank: int, world_size: int, run: Path, tokenizer_folder: Path) -> dict:
    """Saves step 1; then steps 2 and 3, where the disk of rank 1, then of rank 0, is full. What came of it."""
    tokenizer = Tokenizer.load(tokenizer_folder)
    model, optimizer = rank_model(rank, tokenizer)
    runtime = Runtime(rank, rank, world_size, torch.device("cpu"), torch.float32)
    known = {"runtime": runtime, "model": model, "tokenizer": tokenizer, "meta": {"args": {}}}
    states = {"optimizer_state": optimizer.state_dict(), "loader_state": {"rank": torch.tensor(rank)}}
    checkpoint.save_checkpoint(run, 1, **known, **states)
    messages = []
    for step, full_rank in ((2, 1), (3, 0)):
        if rank == full_rank:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            checkpoint.save_checkpoint(run, step, **known, **states)
        except UserError as error:
            messages.append(str(error))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    return {"messages": messages, "model": model.state_dict(), "state": optimizer.state_dict()}


def test_two_ranks_save_together_and_fail_together(run, tokenizer_folder, tmp_path):
    results = run_ranks(save_on_two_ranks, 2, tmp_path / "ranks", run, tokenizer_folder)
    assert names_in(run) == ["step_000001"]
    for result in results:
        assert len(result["messages"]) == 2
        assert all("File too large" in message for message in result["messages"])
        assert "optimizer_rank1.safetensors" in result["messages"][0]
    folder = checkpoint.step_dir(run, 1)
    meta = read_meta(folder)
    assert meta["world_size"] == 2
    weights = load_weights(folder, meta, RUNTIME).state_dict()
    assert all(torch.equal(weights[name], value) for name, value in results[1]["model"].items())
    assert [int(state["rank"]) for state in load_rank_states(folder, meta, "loader")] == [0, 1]
    states = load_rank_states(folder, meta, "optimizer")
    for saved, result in zip(states, results, strict=True):
        assert all(torch.equal(saved[name], value) for name, value in result["state"].items())
    whole = MuonAdamW(parameter_groups(load_weights(folder, meta, RUNTIME)))
    whole.load_state_dict(states)
    key = "wte.weight.exp_avg"
    assert torch.equal(whole.state_dict()[key], torch.cat([state[key] for state in states]))
