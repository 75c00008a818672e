"""Rows of a file are the same in every kind of file, whatever it is called, and know their place in it."""

import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat.common import UserError
from tasks import row_files
from tasks.row_files import read_rows

ROWS = [{"messages": [{"role": "user", "content": f"é {number}, ]"}], "input": None} for number in range(9)]
BARE = [row["messages"] for row in ROWS]


def in_lines(rows):
    return "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode() + b"\r\n"


def as_parquet(rows):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist([{"id": 1, **row} for row in rows]), sink, row_group_size=2)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    ("content", "rows"),
    [
        (in_lines(ROWS), ROWS), (b"\xef\xbb\xbf" + in_lines(ROWS), ROWS), (gzip.compress(in_lines(ROWS)), ROWS),
        (in_lines(BARE), BARE), (json.dumps(ROWS).encode(), ROWS), (json.dumps(ROWS, indent=2).encode(), ROWS),
        (b"\xef\xbb\xbf\n " + json.dumps(BARE).encode(), BARE), (gzip.compress(json.dumps(ROWS).encode()), ROWS),
        (as_parquet(ROWS), ROWS),
    ],
)  # fmt: skip
@pytest.mark.parametrize("size", [3, 1 << 20])
def test_every_kind_of_file_gives_the_rows(tmp_path, monkeypatch, content, rows, size):
    monkeypatch.setattr(row_files, "CHUNK_CHARS", size)  # of an array, each item is then read in pieces
    monkeypatch.setattr(row_files, "BATCH_ROWS", 4)
    path = tmp_path / "rows.dat"
    path.write_bytes(content)
    places, found = zip(*read_rows(path), strict=True)
    assert list(found) == rows
    plain = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
    assert places[2] == ("line 5" if plain.endswith(b"\r\n") else "row 3")


def test_lines_that_are_no_json_come_as_errors_among_the_others(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(["{}", "{", "[" * 100_000, "9" * 5000, "[]"]))
    found = [row if not isinstance(row, UserError) else "it is not JSON" in str(row) for _, row in read_rows(path)]
    assert found == [{}, True, True, True, []]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (json.dumps(ROWS).encode()[:-30], "after row 8 comes no JSON"), (b"[[" * 9999, "after row 0 comes no JSON"),
        (b"\n".join([json.dumps(ROWS[:3]).encode()] * 2), "after row 3, where its array ends, comes more"),
        ("é\n".encode("latin-1"), "line 1 is not UTF-8"), (b'[{"a": "\xe9"}]', "is not UTF-8"),
        (gzip.compress(in_lines(ROWS))[:-20], "the file is damaged"), (as_parquet(ROWS)[:-20], "cannot read"),
        (as_parquet([{"text": "Hi"}]), "has the columns id, text; a conversation must have messages"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_read_on_is_named(tmp_path, content, words):
    path = tmp_path / "rows.dat"
    path.write_bytes(content)
    with pytest.raises(UserError, match=words) as refusal:
        list(read_rows(path))
    assert "rows.dat" in str(refusal.value)
    assert "\n" not in str(refusal.value)
