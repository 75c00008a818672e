"""Listing and fetching from a hub that answers badly in every way we know of."""

import errno
import hashlib
import random
import threading
from datetime import UTC, datetime
from email.utils import format_datetime
from pathlib import Path

import httpx
import pytest
from fake_hub import REPO, REVISION, impatient_hub
from huggingface_hub import constants, file_download
from huggingface_hub.errors import HfHubHTTPError

from nanochat.common import UserError
from nanochat.data import hub
from nanochat.data.hub import HubFile, TransferError

NAME = "data/a.bin"
PIECE_BYTES = 1 << 14
CONTENT = random.Random(1).randbytes(400_000)
FILE = HubFile(NAME, len(CONTENT), hashlib.sha256(CONTENT).hexdigest())


@pytest.fixture
def server(monkeypatch):
    with impatient_hub(monkeypatch, {NAME: CONTENT, "b.bin": b"b" * 10}) as server:
        monkeypatch.setattr(hub, "ATTEMPTS", 4)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.2)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", PIECE_BYTES)
        yield server


def fetch(folder: Path, check=lambda path, file: None) -> str:
    """Why the file could not be fetched, "" when it is there."""
    return hub.fetch_files(REPO, REVISION, [FILE], folder, workers=2, check=check).get(NAME, "")


def test_listing_gives_commit_sizes_and_checksums_of_all_pages_and_survives_faults_on_each(server, monkeypatch):
    revision, files, _ = hub.list_files(REPO)
    assert revision == REVISION
    assert [(file.name, file.size, len(file.sha256)) for file in files] == [(NAME, len(CONTENT), 64), ("b.bin", 10, 64)]
    assert files[0] == FILE
    monkeypatch.setattr(hub, "ATTEMPTS", 5)
    server.page_size = 1
    server.faults["listing"] = ["503", "html", "", "503", "", "503"]
    assert [file.name for file in hub.list_files(REPO)[1]] == [NAME, "b.bin"]
    assert hub.list_files(REPO)[2] == ""
    server.files[hub.CARD] = b"# Texts"
    assert hub.list_files(REPO)[2] == "# Texts"
    server.files = {"../evil.bin": b"1", "/etc/evil": b"2", "good.bin": b"3"}
    assert [file.name for file in hub.list_files(REPO)[1]] == ["good.bin"]


@pytest.mark.parametrize(("status", "remedy"), [("404", "HF_ENDPOINT"), ("401", "private or gated: .* set HF_TOKEN")])
def test_listing_that_is_refused_is_reported_at_once_with_the_endpoint(server, status, remedy):
    server.faults["listing"] = [status]
    with pytest.raises(UserError, match=rf"{server.endpoint} \(HTTP status {status}.*{remedy}"):
        hub.list_files(REPO)
    assert len(server.requests) == 1


def test_a_hub_that_is_none_or_does_not_answer_is_named(server, monkeypatch):
    monkeypatch.setattr(hub, "REQUEST_SECONDS", 0.1)
    server.faults["listing"] = ["silence", "", "silence"] * 2
    with pytest.raises(UserError, match="ReadTimeout"):
        hub.list_files(REPO)
    server.faults["listing"] = []
    monkeypatch.setattr(server, "entries", lambda: ["surprise"])
    with pytest.raises(UserError, match="does not answer like a hub"):
        hub.list_files(REPO)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"cannot list someone/texts on the hub at http://127\.0\.0\.1:9"):
        hub.list_files(REPO)


def test_folders_of_a_repository_can_be_named_and_misspelt_repositories_are_refused():
    assert hub.split_repository("owner/name") == ("owner/name", "")
    assert hub.split_repository("owner/na.me/sample/10BT") == ("owner/na.me", "sample/10BT")
    for name in ("", "owner", "./owner/name", "owner/../name", "owner/name/../..", "a b/c", "-/x"):
        with pytest.raises(UserError, match="no hub repository"):
            hub.split_repository(name)


@pytest.mark.parametrize(
    "fault", ["503", "408", "416", "truncate", "reset", "html", "wrong", "disguised", "stall", "silence"]
)
def test_file_arrives_whole_after_each_kind_of_fault(server, tmp_path, fault):
    server.faults[NAME] = [fault, fault] if fault not in ("stall", "silence") else [fault]
    assert fetch(tmp_path) == ""
    assert (tmp_path / NAME).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.rglob("*.*")] == ["a.bin"]


def test_broken_transfer_goes_on_where_it_broke_or_where_the_server_resumes(server, tmp_path):
    server.faults[NAME] = ["truncate"]
    assert fetch(tmp_path / "a") == ""
    first, second = [asked for name, asked, _ in server.requests if name == NAME]
    assert first == ""
    start = int(second.removeprefix("bytes=").removesuffix("-"))
    assert len(CONTENT) // 2 - PIECE_BYTES <= start <= len(CONTENT) // 2
    server.faults[NAME] = ["truncate", "no-range"]
    assert fetch(tmp_path / "b") == ""
    assert (tmp_path / "b" / NAME).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("fault", "reason", "num_requests"), [("503", "status 503", 4), ("wrong", "sha256", 4), ("404", "status 404", 1)]
)
def test_attempts_end_when_nothing_moves(server, tmp_path, fault, reason, num_requests):
    server.faults[NAME] = [fault] * 20
    assert reason in fetch(tmp_path)
    assert len(server.requests) == num_requests
    assert not (tmp_path / NAME).exists()


def test_check_of_the_caller_has_the_last_word_and_its_error_ends_the_other_transfers(server, tmp_path):
    seen = []

    def check(path: Path, file: HubFile) -> None:
        seen.append(path.read_bytes() == CONTENT)
        if len(seen) == 1:
            raise TransferError("not to my taste")
        if file.name == "b.bin":
            raise UserError("no column text")

    assert fetch(tmp_path / "a", check) == ""
    assert seen == [True, True]
    server.faults[NAME] = ["stall"] * 100
    with pytest.raises(UserError, match="no column text"):
        hub.fetch_files(REPO, REVISION, [FILE, HubFile("b.bin", 10)], tmp_path / "b", workers=2, check=check)
    assert not (tmp_path / "b" / NAME).exists()


class Pauses(threading.Event):
    """Never set, and never waits: notes the seconds instead."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def wait(self, seconds: float) -> None:
        self.seconds.append(seconds)


def answers(*headers: dict[str, str], status: int = 429):
    """A request that is refused with each of `headers` in turn and then answered."""
    left = list(headers)

    def request() -> str:
        if not left:
            return "answer"
        response = httpx.Response(status, headers=left.pop(0), request=httpx.Request("GET", "http://hub"))
        raise HfHubHTTPError("busy", response=response)

    return request


def test_pauses_of_a_hub_that_says_nothing_double_with_jitter_and_attempts_end():
    pauses = Pauses()
    with pytest.raises(TransferError, match="HTTP status 429"):
        hub._persist(answers(*[{"RateLimit": '"api";r=3;t=99'}] * 9), pauses)  # not used up: not the reason
    assert len(pauses.seconds) == hub.ATTEMPTS - 1
    for failures, seconds in enumerate(pauses.seconds):
        assert 2**failures / 2 <= seconds <= 2**failures


NOW = 1_800_000_000
IN_TWO_MINUTES = format_datetime(datetime.fromtimestamp(NOW + 120, UTC), usegmt=True)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"RateLimit": '"resolvers";r=0;t=40'}, 40), ({"Retry-After": "300"}, 300),
     ({"Retry-After": IN_TWO_MINUTES}, 120), ({"Retry-After": "7", "RateLimit": '"api";r=0;t=40'}, 40)],
)  # fmt: skip
def test_a_busy_hub_is_given_the_time_it_asks_for_which_is_said_and_is_no_attempt(
    monkeypatch, headers, seconds, capsys
):
    monkeypatch.setattr(hub.time, "time", lambda: NOW)
    pauses, num_waits = Pauses(), hub.ATTEMPTS + 3
    assert hub._persist(answers(*[headers] * num_waits), pauses) == "answer"
    assert len(pauses.seconds) == num_waits
    assert all(seconds <= pause <= seconds + 1 for pause in pauses.seconds)
    assert f"is busy and asks to wait {seconds} s" in capsys.readouterr().err


def test_a_hub_that_asks_for_more_than_an_hour_is_given_up():
    pauses = Pauses()
    with pytest.raises(TransferError, match="429"):
        hub._persist(answers({"Retry-After": "86400"}), pauses)
    with pytest.raises(TransferError, match="429"):
        hub._persist(answers(*[{"Retry-After": "300"}] * 99), pauses)
    assert len(pauses.seconds) == 12


def test_listing_and_files_go_on_after_a_rate_limit_without_using_up_an_attempt(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(hub, "ATTEMPTS", 1)
    server.faults.update({"listing": ["limit"], NAME: ["limit"]})
    assert hub.list_files(REPO)[0] == REVISION
    assert fetch(tmp_path) == ""
    assert "asks to wait 1 s" in capsys.readouterr().err


def test_token_is_sent_when_there_is_one(server, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    hub.list_files(REPO)
    fetch(tmp_path)
    assert server.tokens == {"Bearer hf_secret"}


def test_full_disk_is_a_user_error_and_no_reason_to_retry(server, tmp_path, monkeypatch):
    def write(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(file_download, "http_get", write)
    with pytest.raises(UserError, match=r"cannot write .*a.bin.*No space left"):
        fetch(tmp_path)
