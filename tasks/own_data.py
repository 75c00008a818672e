"""Users' own conversations, to train on: files, folders, or repositories of the Hugging Face hub.

A row is a conversation in one of the formats of `formats.py`, a file anything that `row_files.py` reads. Of a folder or
repository, the files for training are trained on and those for validation validated on, as the names or the card tell
them apart (`nanochat/data/splits.py`); those for testing are for neither. If it has parquet files, only these are read;
if not, those in JSON lines, or else in JSON. Where no file is for validation, one conversation in twenty is.

Every row is checked before the first is given out. One that is refused is named with file, place and reason, and a run
does not start unless it is told to leave out so many. In reinforcement learning the last answer is the reference, and
the reward is 1 for an answer that agrees with it: by value, on a line `#### 42` at the end, if the reference has one,
otherwise by text, without regard to letter case and spacing.
"""

import json
import os
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from tempfile import TemporaryFile
from typing import BinaryIO

from nanochat.common import UserError, base_dir, disk_errors
from nanochat.data import dataset, hub
from nanochat.data.chat import visible_text
from nanochat.data.splits import Splits, split_files
from tasks.common import Completion, Conversation, Task, marked_number, reference_text
from tasks.formats import read_row
from tasks.row_files import SUFFIXES, read_rows

ANY_SUFFIX = sum(SUFFIXES, ())
MAX_FAULTS = 1000  # kept of a file; the others are counted
MOST_NAMED = 3  # refused rows named in an error
NUM_EXAMPLES = 4
MAX_EXAMPLE_CHARS = 80
EXAMPLES_SOUGHT_IN = 1000  # conversations at the beginning of a file


class OwnFile(Task):
    """The conversations of a file. It is read at the first use, which raises `UserError` if it cannot be, or holds no
    rows. Those refused are left out: `num_refused`, the first of them in `faults` with place and reason. `formats`
    counts the conversations by format, `label` names the file for the user.

    Memory holds only where each conversation is in a nameless file below the base folder, which vanishes with the
    process; so the run goes on whatever becomes of the file.
    """

    has_reward = True

    def __init__(self, path: str | Path, *, name: str = "", label: str = "") -> None:
        self.path = Path(path).expanduser()
        self.name, self.label = name or self.path.stem, label or str(path)
        self.faults: list[str] = []
        self.num_refused = 0
        self.formats: Counter[str] = Counter()

    @cached_property
    def rows(self) -> range:
        return range(len(self._stored[1]) - 1)

    @cached_property
    def _stored(self) -> tuple[BinaryIO, array]:
        """A file of the conversations as JSON, end to end, and where in it each one begins, and the last ends."""
        with disk_errors("the conversations", base_dir()):
            file, borders = TemporaryFile(dir=base_dir()), array("q", [0])  # noqa: SIM115 - open as long as the task
            for place, row in read_rows(self.path):
                try:
                    if isinstance(row, UserError):
                        raise row
                    format_name, conversation = read_row(row)
                    data = _as_bytes(conversation)
                except UserError as error:
                    self.num_refused += 1
                    if len(self.faults) < MAX_FAULTS:
                        self.faults.append(f"{place}: {error}")
                    continue
                self.formats[format_name] += 1
                borders.append(borders[-1] + file.write(data))
            file.flush()
        if len(borders) == 1 and not self.num_refused:
            raise UserError(f"{self.label} holds no conversations")
        return file, borders

    def conversation(self, index: int) -> Conversation:
        file, borders = self._stored
        # Unlike seek and read, this is safe in forked processes and threads.
        return json.loads(os.pread(file.fileno(), borders[index + 1] - borders[index], borders[index]))

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        said, reference = visible_text(completion), reference_text(conversation)
        number = marked_number(reference)
        if number is not None:
            return float(marked_number(said) == number)
        return float(said.casefold().split() == reference.casefold().split())

    def __str__(self) -> str:
        """Such as `mine.jsonl: 1,234 ShareGPT conversations, 2 rows refused`."""
        kinds = " and ".join(f"{count:,} {name}" for name, count in self.formats.most_common()) or "0"
        refused = f", {self.num_refused:,} row{'s' * (self.num_refused > 1)} refused" if self.num_refused else ""
        return f"{self.label}: {kinds} conversations{refused}"


def _as_bytes(conversation: Conversation) -> bytes:
    try:
        return json.dumps(conversation, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, UTF-8 and the tokenizer cannot
        raise UserError(f"a text is not valid Unicode ({error.reason})") from error


@dataclass(frozen=True)
class OwnData:
    """Files to train on, and files to validate on, of which there may be none."""

    train: list[OwnFile]
    val: list[OwnFile]

    @property
    def files(self) -> list[OwnFile]:
        return self.train + self.val


def find_data(name: str) -> OwnData:
    """The files behind a name that is given as data; those of a hub repository are fetched, once. Raises `UserError`
    when there are none to train on."""
    path = Path(name).expanduser()
    if path.is_file() or (name.endswith(ANY_SUFFIX) and not path.is_dir()):
        return OwnData([OwnFile(name)], [])
    if path.is_dir():
        card = path / hub.CARD
        text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        names = [file.relative_to(path).as_posix() for file in dataset.files_of(path, ANY_SUFFIX)]
        root, splits = path, choose_files(names, text)
    else:
        hub.split_repository(name)
        root = base_dir() / "data" / f"{name.replace('/', '--')}.conversations"
        splits = dataset.fetch_splits(name, root, choose_files)
    if not splits.train:
        remedy = "give another file, folder or hub repository"
        raise UserError(f"{name} has no {', '.join(ANY_SUFFIX)} file to train on; {remedy}")
    train, val = (
        [OwnFile(root / file, name=path.name, label=f"{name}: {file}") for file in files]
        for files in (splits.train, splits.val)
    )
    return OwnData(train, val)


def choose_files(names: Sequence[str], card: str) -> Splits:
    """The files of the preferred kind that has some to train on, by split."""
    for suffixes in SUFFIXES:
        splits = split_files([name for name in names if name.endswith(suffixes)], card)
        if splits.train:
            return splits
    return Splits()


def check_refused(files: Sequence[OwnFile], skip_bad_rows: int) -> None:
    """Raise `UserError` if more than `skip_bad_rows` rows of all `files` are refused, or all are."""
    num_rows, num_refused = sum(map(len, files)), sum(file.num_refused for file in files)
    named = [f"{file.label}, {fault}" for file in files for fault in file.faults][:MOST_NAMED]
    more = f"; and {num_refused - len(named):,} more" if num_refused > len(named) else ""
    fault = f"{num_refused:,} of {num_rows + num_refused:,} rows cannot be learned from: {'; '.join(named)}{more}"
    if num_refused and not num_rows:
        raise UserError(fault)
    if num_refused > skip_bad_rows:
        remedy = f"mend them (--check-data lists them), or leave them out with --skip-bad-rows {num_refused}"
        raise UserError(f"{fault}; {remedy}")


def first_questions(files: Sequence[OwnFile]) -> list[str]:
    """Up to four short ones among the first questions of conversations without a system message, each once."""
    found = dict.fromkeys(question for file in files for question in _short_questions(file))
    return list(islice(found, NUM_EXAMPLES))


def _short_questions(file: OwnFile) -> Iterator[str]:
    for index in range(min(len(file), EXAMPLES_SOUGHT_IN)):
        message = file[index]["messages"][0]
        if message["role"] == "user":
            question = message["content"].strip()
            if len(question) <= MAX_EXAMPLE_CHARS and "\n" not in question:
                yield question
