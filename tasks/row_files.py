"""The rows of a file of chat data, one after the other: JSON lines, a JSON array, or parquet; JSON maybe gzipped.

The content tells which it is. A bracket begins an array unless a message follows: that is a conversation in a line. No
file is held in memory: an array is decoded item by item, parquet a thousand rows at a time.
Not here: what the rows mean (`formats.py`).
"""

import gzip
import io
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError
from tasks.formats import COLUMNS, EXPECTED

SUFFIXES = ((".parquet",), (".jsonl", ".jsonl.gz"), (".json", ".json.gz"))  # usual ones, the first preferred
HEAD_BYTES = 1 << 16
CHUNK_CHARS = 1 << 20
BATCH_ROWS = 1024

Row = tuple[str, Any]  # where it is in the file, such as "line 3", and its value, or a `UserError` if that is no JSON


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in their order. Raises `UserError` where it cannot be read on."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
        if head == b"PAR1":
            yield from _parquet_rows(path)
            return
        with gzip.open(path) if head.startswith(b"\x1f\x8b") else open(path, "rb") as file:
            yield from _array_rows(file, path) if _is_array(file) else _line_rows(file, path)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UserError(f"cannot read the conversations in {path} ({error}); the file is damaged") from error
    except OSError as error:
        raise UserError(f"cannot read the conversations in {path} ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error.reason}); convert the file") from error
    except pa.ArrowException as error:
        raise UserError(f"cannot read {path}: {str(error).splitlines()[0][:160]}") from error


def _is_array(file: BinaryIO) -> bool:
    """Whether `file` begins an array of rows; it is read on from its beginning."""
    head = file.read(HEAD_BYTES).decode("utf-8-sig", errors="ignore").lstrip()
    file.seek(0)
    first = head[1:].lstrip()
    if not head.startswith("[") or first.startswith("]"):
        return False
    try:
        item, _ = json.JSONDecoder().raw_decode(first)
    except (ValueError, RecursionError):
        return True  # it is long
    return not (isinstance(item, dict) and ("role" in item or "from" in item))


def _line_rows(file: BinaryIO, path: Path) -> Iterator[Row]:
    for number, line in enumerate(file, start=1):
        try:
            text = line.decode("utf-8-sig" if number == 1 else "utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number} is not UTF-8 text ({error.reason}); convert the file") from error
        if text.strip():
            try:
                yield f"line {number}", json.loads(text)
            except (ValueError, RecursionError) as error:  # nested too deeply, or a number with thousands of digits
                yield f"line {number}", UserError(f"it is not JSON ({error}); write one conversation a line")


def _array_rows(file: BinaryIO, path: Path) -> Iterator[Row]:
    text, decoder, at, number = io.TextIOWrapper(file, encoding="utf-8-sig"), json.JSONDecoder(), 0, 0
    buffer = text.read(CHUNK_CHARS).lstrip()[1:]  # after the bracket
    while True:
        while at < len(buffer) and buffer[at] in " \t\r\n,":
            at += 1
        if at < len(buffer) and buffer[at] == "]":
            if buffer[at + 1 :].strip() or text.read(CHUNK_CHARS).strip():
                fault = f"after row {number}, where its array ends, comes more"
                raise UserError(f"{path}: {fault}; it must be one array of conversations, or one in each line")
            return
        try:
            row, at = decoder.raw_decode(buffer, at)
        except (ValueError, RecursionError) as error:
            more = text.read(max(CHUNK_CHARS, len(buffer)))  # twice as much each time for a row of any length
            if not more:
                fault = f"after row {number} comes no JSON ({error})"
                raise UserError(
                    f"{path}: {fault}; it must be one array of conversations, or one in each line"
                ) from error
            buffer, at = buffer[at:] + more, 0
            continue
        number += 1
        yield f"row {number}", row


def _parquet_rows(path: Path) -> Iterator[Row]:
    with pq.ParquetFile(path) as parquet:
        names, number = parquet.schema_arrow.names, 0
        columns = [name for name in names if name in COLUMNS]
        if not columns:
            raise UserError(f"{path} has the columns {', '.join(names)[:100]}; a conversation must have {EXPECTED}")
        for batch in parquet.iter_batches(batch_size=BATCH_ROWS, columns=columns):
            for row in batch.to_pylist():
                number += 1
                yield f"row {number}", row
