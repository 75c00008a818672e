"""Which files are for training: what their names say, and what the card says, as the hub reads them."""

import json

import pytest
from conftest import write_shard
from fake_hub import REPO, impatient_hub, parquet_bytes

from nanochat.common import UserError
from nanochat.data.dataset import document_batches, prepare, shard_paths
from nanochat.data.splits import Splits, split_files


def card(configs: str) -> str:
    return f"---\nlicense: mit\n{configs}\n---\n# Texts\n"


@pytest.mark.parametrize(
    ("names", "train", "val"),
    [
        ("test-0 train-0 validation-0", "train-0", "validation-0"),
        ("data/dev-0-of-2 data/dev-1-of-2 data/train_1 data/test", "data/train_1", "data/dev-0-of-2 data/dev-1-of-2"),
        ("training/a valid/b testing/c eval/d", "training/a", "valid/b"),
        ("test/train-0 Train.0 my_val", "test/train-0 Train.0", "my_val"),  # the file's own name goes first
        ("a/test/b/0 a/c/0", "a/c/0", ""),
        ("shard_0 latest_1 contest_2 devil_3", "shard_0 latest_1 contest_2 devil_3", ""),
        ("train-0 other", "train-0", ""),
        ("eval_0 testing.1 evaluation/2 x/3", "x/3", ""),
        ("train-test-split", "", ""),
    ],
)
def test_names_of_files_and_folders_tell_splits_and_test_data_is_in_none(names, train, val):
    splits = split_files([f"{name}.parquet" for name in names.split()])
    assert [name.removesuffix(".parquet") for name in splits.train] == train.split()
    assert [name.removesuffix(".parquet") for name in splits.val] == val.split()


NAMES = ["a/one.parquet", "a/two.parquet", "b/c/three.parquet", "b/four.jsonl"]


@pytest.mark.parametrize(
    ("data_files", "train", "val", "test"),
    [
        ("a/*.parquet", NAMES[:2], [], []),
        ("['b/*', ./a/one.parquet]", [NAMES[3], NAMES[0]], [], []),
        ("[{split: train, path: '**/t*'}, {split: test, path: [b/**]}]", [NAMES[1]], [], NAMES[2:]),
        ("{train: b/**/*.parquet, validation: 'a/[!t]*'}", [NAMES[2]], [NAMES[0]], []),
        ("[{split: train_sft, path: '*/????.jsonl'}, {split: test_sft, path: a/*}]", [NAMES[3]], [], NAMES[:2]),
    ],
)
def test_data_files_of_the_card_are_read_in_each_of_their_forms(data_files, train, val, test):
    assert split_files(NAMES, card(f"configs: [{{config_name: x, data_files: {data_files}}}]")) == Splits(
        train, val, test
    )


def test_the_default_configuration_or_the_only_one_with_files_here_is_taken():
    of_a, of_b = "{config_name: A, data_files: a/*}", "{config_name: B, data_dir: b}"
    assert split_files(NAMES[:2], card(f"configs: [{of_a}, {of_b}]")).train == NAMES[:2]
    assert split_files(NAMES, card(f"configs: [{of_a}, {of_b[:-1]}, default: true}}]")).train == NAMES[2:]
    assert split_files(NAMES, card("configs: [{data_files: a/*}, {config_name: B, data_dir: b}]")).train == NAMES[:2]
    with pytest.raises(UserError, match=r"several configurations \(A, B\); add the folder"):
        split_files(NAMES, card(f"configs: [{of_a}, {of_b}]"))
    for text in ("", "# Texts\n---\nconfigs: 3\n---\n", card(""), card("configs:")):
        assert split_files(NAMES, text).train == NAMES
    for broken in (
        "configs: [",
        "configs: 3",
        "configs: [{data_files: 3}]",
        "configs: [{data_files: [{path: 3}]}]",
    ):
        with pytest.raises(UserError, match=r"README.md cannot be read"):
            split_files(NAMES, card(broken))


FILES = {f"{name}.parquet": parquet_bytes([name]) for name in ("test-0", "train-0", "train-1", "validation-0")}


def texts(data: str, split: str) -> list[str]:
    return [text for _, batch in document_batches(shard_paths(data, split)) for text in batch.to_pylist()]


def test_test_files_of_a_hub_are_neither_fetched_nor_read_and_its_validation_files_are(monkeypatch, capsys):
    with impatient_hub(monkeypatch, {**FILES, "validation-1.parquet": parquet_bytes(["validation-1"])}) as server:
        prepare(REPO, 1)
        assert texts(REPO, "train") == ["train-0"]
        assert texts(REPO, "val") == ["validation-0", "validation-1"]
        assert server.fetched("test-0.parquet") == 0
        assert "1 test files are left out" in capsys.readouterr().out
        prepare(REPO, -1)
        assert texts(REPO, "train") == ["train-0", "train-1"]


def test_the_card_of_a_hub_decides_what_is_fetched(monkeypatch):
    configs = "configs: [{config_name: x, data_files: [{split: train, path: 'test-*'}, {split: dev, path: train-1*}]}]"
    with impatient_hub(monkeypatch, {"README.md": card(configs).encode(), **FILES}):
        prepare(REPO, -1)
    assert (texts(REPO, "train"), texts(REPO, "val")) == (["test-0"], ["train-1"])


def test_text_files_keep_their_splits_when_they_are_made_into_shards(monkeypatch):
    names = ("test", "train", "valid")
    files = {f"{name}.jsonl": "".join(f'{{"text": "{name} {i}"}}\n' for i in range(20)).encode() for name in names}
    with impatient_hub(monkeypatch, files):
        prepare(REPO, -1)
    assert sorted(texts(REPO, "train")) == sorted(f"train {i}" for i in range(20))
    assert sorted(texts(REPO, "val")) == sorted(f"valid {i}" for i in range(20))


def test_a_local_folder_goes_by_the_same_rule(tmp_path):
    folder = tmp_path / "inputs"
    for name, content in FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    assert prepare(str(folder), -1) == folder
    assert (texts(str(folder), "train"), texts(str(folder), "val")) == (["train-0", "train-1"], ["validation-0"])
    (folder / "validation-0.parquet").unlink()
    assert (texts(str(folder), "train"), texts(str(folder), "val")) == (["train-0"], ["train-1"])
    write_shard(folder / "train-0.parquet", [f"text {i}" for i in range(50)])
    (folder / "train-1.parquet").unlink()
    assert prepare(str(folder), -1) != folder  # one file is left, of which both splits are made
    assert len(texts(str(folder), "train") + texts(str(folder), "val")) == 50


def test_a_download_from_before_splits_were_told_apart_no_longer_trains_on_its_test_files(monkeypatch):
    with impatient_hub(monkeypatch, FILES):
        folder = prepare(REPO, -1)
    (folder / "test-0.parquet").write_bytes(FILES["test-0.parquet"])
    path = folder / "nanochat-shards.json"
    files = [{"name": name, "size": len(content), "sha256": ""} for name, content in FILES.items()]
    path.write_text(json.dumps({"source": REPO, "version": "c0ffee", "files": files, "verified": {}}))
    assert (texts(REPO, "train"), texts(REPO, "val")) == (["train-0", "train-1"], ["validation-0"])
