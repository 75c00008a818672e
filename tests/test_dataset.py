"""Shards of a data set: where they lie, reading them, downloading them, converting what is not parquet."""

import argparse
import gzip
import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import write_shard
from fake_hub import REPO, impatient_hub, parquet_bytes

from nanochat.common import UserError, base_dir
from nanochat.data import dataset, hub, localtext
from nanochat.data.dataset import document_batches, prepare, shard_paths

NUM_SHARDS = 4
FOLDER = REPO.replace("/", "--")


def shard_texts(shard: int) -> list[str]:
    """Documents of a shard of about 200 kB that does not compress."""
    rng = random.Random(shard)
    return [f"document {shard}.{index} {rng.randbytes(40_000).hex()}" for index in range(5)]


SHARDS = {f"data/shard_{shard}.parquet": parquet_bytes(shard_texts(shard)) for shard in range(NUM_SHARDS)}
VAL = f"data/shard_{NUM_SHARDS - 1}.parquet"


@pytest.fixture
def server(monkeypatch):
    with impatient_hub(monkeypatch, {"README.md": b"# Texts", **SHARDS}) as server:
        yield server


@pytest.fixture
def inputs(tmp_path):
    """A folder of the user, apart from the base folder."""
    (tmp_path / "inputs").mkdir()
    return tmp_path / "inputs"


def names(split: str) -> list[str]:
    return [path.name for path in shard_paths(REPO, split)]


def documents(data: str, *splits: str) -> list[str]:
    paths = [path for split in splits for path in shard_paths(data, split)]
    return [text for _, texts in document_batches(paths) for text in texts.to_pylist()]


def assert_all_is_here(folder: Path) -> None:
    assert {name: (folder / name).read_bytes() for name in SHARDS} == SHARDS


# --- reading ---
def test_batches_are_row_groups_in_order_and_reading_can_start_at_any_of_them(tmp_path):
    paths = [tmp_path / "0.parquet", tmp_path / "1.parquet"]
    for shard, path in enumerate(paths):
        path.write_bytes(parquet_bytes([f"{shard}.{index}" for index in range(5)], row_group_size=2))
    batches = list(document_batches(paths))
    assert all(isinstance(texts, pa.StringArray) for _, texts in batches)
    whole = [(position, texts.to_pylist()) for position, texts in batches]
    assert [position for position, _ in whole] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [texts for _, texts in whole][:3] == [["0.0", "0.1"], ["0.2", "0.3"], ["0.4"]]
    for start in ((0, 0), (0, 2), (1, 0), (1, 2), (2, 0)):
        rest = [(position, texts.to_pylist()) for position, texts in document_batches(paths, start=start)]
        assert rest == [batch for batch in whole if batch[0] >= start]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()], ids=str)
def test_nulls_and_empty_texts_are_left_out_and_large_strings_read_like_strings(tmp_path, kind):
    path = tmp_path / "a.parquet"
    table = pa.table({"text": pa.array(["a", None, "", "bc", None, ""], kind), "id": range(6)})
    dataset.pq.write_table(table, path, row_group_size=4)
    [(position, texts)] = document_batches([path])
    assert (tuple(position), texts.type, texts.to_pylist()) == ((0, 0), pa.string(), ["a", "bc"])


def test_missing_damaged_and_unusable_shards_are_named_with_the_remedy(tmp_path):
    whole = parquet_bytes([random.Random(0).randbytes(3000).hex()])
    for name, content, words in (
        ("gone", None, r"is missing; run python -m nanochat.data.dataset"),
        ("cut", whole[: len(whole) // 2], "cannot be read .*delete it"),
        ("html", b"<html>" * 50, "cannot be read .*delete it"),
        ("page", whole[:100] + bytes(2900) + whole[3000:], "cannot be read .*delete it"),
        ("other", parquet_bytes(["a"], column="content"), r"has no column text of strings, only content \(string\)"),
    ):
        path = tmp_path / f"{name}.parquet"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=f"{name}.parquet {words}"):
            list(document_batches([path]))


# --- where shards lie ---
def test_local_folder_of_shards_is_used_in_place_in_natural_order(inputs, capsys):
    for name in ("part_10", "part_9", "part_1", ".hidden"):
        write_shard(inputs / name / "shard.parquet", ["a document"])
    folder = str(inputs)
    assert dataset.data_dir(folder) == prepare(folder, 1) == inputs
    assert [path.parent.name for path in shard_paths(folder, "train")] == ["part_1", "part_9"]
    assert [path.parent.name for path in shard_paths(folder, "val")] == ["part_10"]
    dataset.main(argparse.Namespace(data=folder, num_train=-1, workers=1))
    assert "2 train shards" in capsys.readouterr().out
    unordered = ["a10", "a9", "b1", "a09b", "1", "²"]
    assert sorted(unordered, key=dataset.natural_key) == ["1", "a9", "a09b", "a10", "b1", "²"]


def test_each_data_set_has_its_own_folder_and_a_missing_one_is_answered_with_the_command_to_run(inputs):
    (inputs / "a").mkdir()
    (inputs / "b" / "a").mkdir(parents=True)
    data = ["owner/name", "owner/name/folder", "local", str(inputs / "a"), str(inputs / "b" / "a")]
    folders = {dataset.data_dir(name) for name in data}
    assert len(folders) == len(data)
    assert {folder.parent for folder in folders} == {base_dir() / "data"}
    assert dataset.data_dir("owner/name").name == "owner--name"
    with pytest.raises(UserError, match=r"run: python -m nanochat.data.dataset --data owner/name"):
        shard_paths("owner/name", "train")


# --- downloading ---
def test_first_shards_and_the_last_are_fetched_and_later_only_what_is_new(server, capsys):
    folder = prepare(REPO, 2)
    assert folder == base_dir() / "data" / FOLDER
    assert (names("train"), names("val")) == (["shard_0.parquet", "shard_1.parquet"], ["shard_3.parquet"])
    assert documents(REPO, "train") == shard_texts(0) + shard_texts(1)
    assert server.fetched("data/shard_2.parquet") == 0
    prepare(REPO, 99)
    assert "has only 4 files: taking all of them" in capsys.readouterr().out
    assert len(names("train")) == NUM_SHARDS - 1
    assert {path: server.fetched(path) for path in SHARDS} == dict.fromkeys(SHARDS, 1)
    before = len(server.requests)
    prepare(REPO, 2)  # all is here: nothing is asked
    assert len(server.requests) == before


@pytest.mark.parametrize("with_sha256", [True, False])
def test_no_fault_leads_to_a_wrong_shard(server, monkeypatch, with_sha256):
    monkeypatch.setattr(hub, "ATTEMPTS", 20)
    server.with_sha256 = with_sha256
    rng = random.Random(3)
    kinds = ["503", "truncate", "html", "wrong", "disguised", ""]
    for path in SHARDS:
        server.faults[path] = rng.choices(kinds, k=6)
    server.faults["listing"] = ["503", "html"]
    folder = prepare(REPO, -1)
    assert_all_is_here(folder)
    assert not (folder / hub.STAGING).exists()


def test_damaged_and_deleted_shards_are_noticed_and_fetched_again_unless_fewer_are_asked_for(server):
    folder = prepare(REPO, -1)
    first, second, third = (folder / f"data/shard_{index}.parquet" for index in range(3))
    first.unlink()
    os.truncate(second, 1000)
    third.write_bytes(bytes(third.stat().st_size))
    with pytest.raises(UserError, match=r"shard_0.parquet is gone or no longer has its [\d,]+ bytes; run"):
        shard_paths(REPO, "train")
    prepare(REPO, -1)
    assert_all_is_here(folder)
    assert server.fetched(VAL) == 1
    third.unlink()  # to save space
    prepare(REPO, 2)
    assert names("train") == ["shard_0.parquet", "shard_1.parquet"]


def test_what_cannot_be_fetched_is_listed_and_the_rest_kept(server, capsys):
    server.faults["data/shard_1.parquet"] = ["404"]
    server.faults[VAL] = ["404"]
    with pytest.raises(UserError, match=r"2 of 4 files of someone/texts could not be fetched.*run the same command"):
        prepare(REPO, -1)
    assert "missing: data/shard_1.parquet (HTTP status 404)" in capsys.readouterr().err
    # Shard 2 is here, but reading it now and shard 1 in front of it later would change the order of the documents.
    assert names("train") == ["shard_0.parquet"]
    with pytest.raises(UserError, match="no val shard of someone/texts"):  # never replaced by another
        names("val")
    prepare(REPO, -1)
    assert server.fetched("data/shard_2.parquet") == 1
    assert len(names("train")) == 3


def test_full_disk_is_said_before_anything_is_fetched(server, monkeypatch):
    usage = shutil.disk_usage(base_dir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=50_000_000))
    with pytest.raises(UserError, match=rf"{FOLDER}: 0.07 GB needed, 0.05 GB free"):
        prepare(REPO, -1)
    assert not any(server.fetched(path) for path in SHARDS)


def test_dead_network_ends_the_run_before_every_shard_was_tried(server, monkeypatch, capsys):
    monkeypatch.setattr(hub, "GIVE_UP_FAILURES", 2)
    monkeypatch.setattr(hub, "ATTEMPTS", 2)
    server.faults.update({path: ["503"] * 20 for path in SHARDS})
    with pytest.raises(UserError, match="4 of 4 files"):
        prepare(REPO, -1, workers=1)
    assert capsys.readouterr().err.count("not tried to the end") == 2


@pytest.mark.parametrize(("files", "fault"), [
    (dict.fromkeys(("0.parquet", "1.parquet"), parquet_bytes(["x"], column="content")), "no column text of strings"),
    ({"README.md": b"text", "picture.png": b"png"}, r"has no .parquet, .jsonl, .* file"),
])  # fmt: skip
def test_repository_without_anything_of_use_is_refused(server, files, fault):
    server.files = files
    with pytest.raises(UserError, match=fault):
        prepare(REPO, -1)


def test_text_files_of_a_repository_are_made_into_shards(server):
    lines = [json.dumps({"text": f"document {index}"}) for index in range(50)]
    one, two = "\n".join(lines[:30]).encode(), gzip.compress("\n".join(lines[30:]).encode())
    server.files = {"README.md": b"not a document", "a/one.jsonl": one, "two.jsonl.gz": two}
    prepare(REPO, -1)
    assert sorted(documents(REPO, "train", "val")) == sorted(f"document {index}" for index in range(50))
    before = len(server.requests)
    prepare(REPO, -1)
    assert len(server.requests) == before


def in_processes(num_processes: int, *args: object) -> list[multiprocessing.Process]:
    context = multiprocessing.get_context("fork")  # another start would import torch in each
    processes = [context.Process(target=prepare, args=args) for _ in range(num_processes)]
    for process in processes:
        process.start()
    return processes


def test_eight_processes_make_one_download(server):
    for process in in_processes(8, REPO, -1):
        process.join(60)
        assert process.exitcode == 0
    assert {path: server.fetched(path) for path in SHARDS} == dict.fromkeys(SHARDS, 1)
    assert len(names("train")) == 3


def test_killed_download_goes_on_where_it_was(server):
    server.faults["data/shard_1.parquet"] = ["stall"]
    [process] = in_processes(1, REPO, -1)
    folder = base_dir() / "data" / FOLDER
    deadline = time.monotonic() + 30
    while len(list((folder / "data").glob("*.parquet"))) < 3:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    prepare(REPO, -1)
    assert_all_is_here(folder)
    assert [server.fetched(path) for path in SHARDS] == [1, 2, 1, 1]


# --- converting ---
def test_local_files_of_every_kind_become_shards(inputs):
    (inputs / "sub").mkdir()
    for name, content in {
        "a.jsonl": b'{"text": "from jsonl"}\n\n{"text": null}\n{"text": "from jsonl, too"}\n',
        "sub/b.txt": b"from text", "c.md": b"# from markdown", ".hidden.txt": b"hidden",
        "d.parquet": parquet_bytes(["from parquet", None]),
    }.items():  # fmt: skip
        (inputs / name).write_bytes(content)
    data = str(inputs)
    assert prepare(data, -1).parent == base_dir() / "data"
    expected = ["# from markdown", "from jsonl", "from jsonl, too", "from parquet", "from text"]
    assert sorted(documents(data, "train", "val")) == expected


def test_single_parquet_file_is_split(inputs):
    (inputs / "a.parquet").write_bytes(parquet_bytes([f"document {index}" for index in range(100)]))
    for data in (str(inputs), str(inputs / "a.parquet")):
        prepare(data, -1)
        train, val = documents(data, "train"), documents(data, "val")
        assert (len(train), len(val)) == (95, 5)
        assert sorted(train + val) == sorted(f"document {index}" for index in range(100))


def test_conversion_is_kept_until_the_files_change_and_a_failed_one_leaves_nothing_behind(inputs, capsys):
    with pytest.raises(UserError, match=r"has no .parquet, .jsonl"):
        prepare(str(inputs), -1)
    source = inputs / "a.jsonl"
    source.write_text('{"text": "fine"}\n{"text": 3}\n')
    with pytest.raises(UserError, match=r"a.jsonl, line 2"):
        prepare(str(source), -1)
    assert [path.name for path in (base_dir() / "data").iterdir() if not path.name.endswith(".lock")] == []
    source.write_text("".join(json.dumps({"text": f"document {index}"}) + "\n" for index in range(10)))
    data = str(source)
    prepare(data, -1)
    first = [path.read_bytes() for path in shard_paths(data, "train")]
    capsys.readouterr()
    prepare(data, -1)
    assert capsys.readouterr().out == ""
    shutil.rmtree(dataset.data_dir(data))
    prepare(data, -1)
    assert [path.read_bytes() for path in shard_paths(data, "train")] == first
    source.write_text(source.read_text() + '{"text": "one more"}\n')
    prepare(data, -1)
    assert "one more" in documents(data, "train", "val")


def test_documentation_of_the_machine_is_a_data_set_like_any_other(monkeypatch):
    sources = [
        localtext.Source(name, 30, lambda name=name: [f"{name} {index}" for index in range(3)]) for name in "abcdefghij"
    ]
    monkeypatch.setattr(localtext, "machine_sources", lambda: sources)
    assert prepare("local", 1) == base_dir() / "data" / "local"
    assert len(documents("local", "train", "val")) == 30
