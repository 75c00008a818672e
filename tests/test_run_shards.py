"""A resumed run keeps its shards and their split, whatever has become of the data set."""

import json

import pytest
from conftest import write_shard

from nanochat.common import UserError
from nanochat.data.run_shards import run_shards


@pytest.fixture
def data(shards):
    return str(shards[0].parent)


@pytest.fixture
def note(data):
    """As a checkpoint gives it back."""
    return json.loads(json.dumps(run_shards(data, None)[1]))


def test_a_new_run_has_the_shards_of_the_data_set_and_a_note_of_each(data, shards, note):
    paths, _ = run_shards(data, None)
    assert paths == {"train": shards[:3], "val": shards[3:]}
    assert [shard["name"] for shard in note["train"]] == ["shard_0.parquet", "shard_1.parquet", "shard_2.parquet"]
    assert [shard["size"] for shard in note["val"]] == [shards[3].stat().st_size]
    assert len({shard["footer"] for shard in note["train"] + note["val"]}) == 4


def test_an_unchanged_data_set_is_not_spoken_of(data, shards, note, capsys):
    assert run_shards(data, note) == ({"train": shards[:3], "val": shards[3:]}, note)
    assert capsys.readouterr().out == ""


def test_new_shards_are_named_and_the_run_keeps_those_it_had(data, shards, note, capsys):
    for name in ("shard_00.parquet", "shard_9.parquet"):
        write_shard(shards[0].parent / name, ["a new document"])
    assert run_shards(data, note) == ({"train": shards[:3], "val": shards[3:]}, note)
    said = capsys.readouterr().out
    assert "shard_00.parquet is new, shard_9.parquet is new, shard_3.parquet was val and is train now" in said
    for split in ("train", "test", "val"):
        write_shard(shards[0].parent / f"{split}.parquet", ["now names tell the split"])
    assert run_shards(data, note)[0] == {"train": shards[:3], "val": shards[3:]}
    assert "shard_0.parquet is not among its shards" in capsys.readouterr().out


def test_a_shard_that_is_gone_or_changed_is_named_and_the_run_refused(data, shards, note):
    content = shards[1].read_bytes()
    write_shard(shards[1], ["something else"])
    with pytest.raises(UserError, match=rf"shard_1.parquet has [\d,]+ bytes instead of {len(content):,}; put back"):
        run_shards(data, note)
    at = len(content) - 20  # in the footer
    shards[1].write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(UserError, match=r"shard_1.parquet has other contents"):
        run_shards(data, note)
    shards[1].write_bytes(b"")
    shards[3].unlink()
    with pytest.raises(
        UserError, match=r"shard_1.parquet has 0 bytes instead of .*, shard_3.parquet is gone; put back"
    ):
        run_shards(data, note)


def test_a_checkpoint_from_before_there_were_notes_goes_on_with_what_is_there(data, shards):
    shards.append(write_shard(shards[0].parent / "shard_4.parquet", ["a new document"]))
    assert run_shards(data, None)[0] == {"train": shards[:4], "val": shards[4:]}
