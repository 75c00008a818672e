"""Listing and fetching from a hub that answers badly in every way we know of."""

import random
import threading
from pathlib import Path

import pytest
from fake_hub import REPO, REVISION, FakeHub

from nanochat.common import UserError
from nanochat.data import hub
from nanochat.data.hub import HubFile, Retry, TransferError

CONTENT = random.Random(1).randbytes(400_000)


class Pauses:
    """Stands in for `time.sleep` and remembers what it was asked."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.seconds.append(seconds)


@pytest.fixture
def server(monkeypatch):
    with FakeHub({"data/a.bin": CONTENT, "b.bin": b"b" * 10}) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.endpoint)
        yield server


def retry(attempts: int = 4) -> Retry:
    return Retry(attempts=attempts, sleep=Pauses(), rng=random.Random(0))


def fetch(path: Path, **options) -> None:
    _, files = hub.list_files(REPO, retry())
    hub.fetch_file(hub.file_url(REPO, REVISION, files[0]), path, files[0], **{"retry": retry(), **options})


def test_listing_gives_commit_sizes_and_checksums(server):
    revision, files = hub.list_files(REPO, retry())
    assert revision == REVISION
    assert [(file.name, file.size, len(file.sha256)) for file in files] == [
        ("data/a.bin", len(CONTENT), 64),
        ("b.bin", 10, 64),
    ]


def test_listing_goes_through_all_pages_and_survives_faults_on_each(server):
    server.page_size = 1
    server.faults["listing"] = ["503", "html", "", "503", "", "503"]
    assert [file.name for file in hub.list_files(REPO, retry())[1]] == ["data/a.bin", "b.bin"]


def test_listing_drops_names_that_lead_out_of_the_folder(server):
    server.files = {"../evil.bin": b"1", "/etc/evil": b"2", "good.bin": b"3"}
    assert [file.name for file in hub.list_files(REPO, retry())[1]] == ["good.bin"]


def test_missing_repository_is_reported_at_once_with_the_endpoint(server):
    server.faults["listing"] = ["404"]
    with pytest.raises(UserError, match=rf"{server.endpoint} \(HTTP status 404\).*HF_ENDPOINT"):
        hub.list_files(REPO, retry())
    assert len(server.requests) == 1


def test_unreachable_hub_is_given_up_after_few_attempts(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    patience = retry(attempts=50)
    with pytest.raises(UserError, match=r"cannot list someone/texts on the hub at http://127\.0\.0\.1:9"):
        hub.list_files(REPO, patience)
    assert len(patience.sleep.seconds) == hub.UNREACHABLE_ATTEMPTS - 1


def test_answers_that_are_not_a_hubs_are_named(server, monkeypatch):
    monkeypatch.setattr(server, "entries", lambda: ["surprise"])
    with pytest.raises(UserError, match="does not answer like a hub"):
        hub.list_files(REPO, retry())


@pytest.mark.parametrize("name", ["", "owner", "./owner/name", "owner/../name", "owner/name/../..", "a b/c", "-/x"])
def test_misspelt_repositories_are_refused(name):
    with pytest.raises(UserError, match="no hub repository"):
        hub.split_repository(name)


def test_folders_of_a_repository_can_be_named():
    assert hub.split_repository("owner/name") == ("owner/name", "")
    assert hub.split_repository("owner/na.me/sample/10BT") == ("owner/na.me", "sample/10BT")


@pytest.mark.parametrize("fault", ["503", "truncate", "html", "wrong", "disguised"])
def test_file_arrives_whole_after_each_kind_of_fault(server, tmp_path, fault):
    server.faults["data/a.bin"] = [fault, fault]
    fetch(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["a.bin"]


def test_truncated_transfer_goes_on_where_it_broke(server, tmp_path):
    server.faults["data/a.bin"] = ["truncate"]
    counted = []
    fetch(tmp_path / "a.bin", on_bytes=counted.append)
    first, second = [asked for name, asked, _ in server.requests if name == "data/a.bin"]
    start = int(second.removeprefix("bytes=").removesuffix("-"))
    assert first == ""
    assert len(CONTENT) // 2 - hub.PIECE_BYTES <= start <= len(CONTENT) // 2
    assert sum(counted) == len(CONTENT)


def test_html_answer_does_not_cost_what_had_arrived(server, tmp_path):
    partial = hub.partial_path(tmp_path / "a.bin")
    partial.write_bytes(CONTENT[:300_000])
    server.faults["data/a.bin"] = ["html", "disguised"]
    fetch(tmp_path / "a.bin")
    assert [asked for name, asked, _ in server.requests if name == "data/a.bin"] == ["bytes=300000-"] * 3
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_partial_file_with_wrong_bytes_is_found_out_and_fetched_anew(server, tmp_path):
    hub.partial_path(tmp_path / "a.bin").write_bytes(bytes(100_000))
    counted = []
    fetch(tmp_path / "a.bin", on_bytes=counted.append)
    assert (tmp_path / "a.bin").read_bytes() == CONTENT
    assert sum(counted) == len(CONTENT) - 100_000


def test_server_without_resume_sends_all_again(server, tmp_path):
    hub.partial_path(tmp_path / "a.bin").write_bytes(CONTENT[:100_000])
    server.faults["data/a.bin"] = ["no-range"]
    fetch(tmp_path / "a.bin")
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_attempts_end_when_nothing_moves_and_keep_what_arrived(server, tmp_path):
    server.faults["data/a.bin"] = ["truncate", *["503"] * 10]
    with pytest.raises(TransferError, match="HTTP status 503"):
        fetch(tmp_path / "a.bin", retry=retry(attempts=3))
    assert len([1 for name, _, _ in server.requests if name == "data/a.bin"]) == 3
    assert not (tmp_path / "a.bin").exists()
    assert CONTENT.startswith(hub.partial_path(tmp_path / "a.bin").read_bytes())


def test_progress_resets_the_count_of_failures(server, tmp_path):
    server.faults["data/a.bin"] = ["truncate", "503"] * 3
    fetch(tmp_path / "a.bin", retry=retry(attempts=3))
    assert (tmp_path / "a.bin").read_bytes() == CONTENT


def test_file_that_is_always_wrong_ends_after_the_attempts(server, tmp_path):
    server.faults["data/a.bin"] = ["wrong"] * 20
    with pytest.raises(TransferError, match="sha256"):
        fetch(tmp_path / "a.bin", retry=retry(attempts=3))
    assert list(tmp_path.iterdir()) == []
    assert server.fetched("data/a.bin") == 3


def test_missing_file_is_not_asked_for_twice(server, tmp_path):
    server.faults["data/a.bin"] = ["404"]
    with pytest.raises(TransferError, match="HTTP status 404"):
        fetch(tmp_path / "a.bin")
    assert len([1 for name, _, _ in server.requests if name == "data/a.bin"]) == 1


def test_check_of_the_caller_has_the_last_word(server, tmp_path):
    seen = []

    def check(path: Path, file: HubFile) -> None:
        seen.append(path.read_bytes() == CONTENT)
        if len(seen) == 1:
            raise TransferError("not to my taste")

    fetch(tmp_path / "a.bin", check=check)
    assert seen == [True, True]


def test_stop_ends_a_transfer(server, tmp_path):
    stop = threading.Event()
    with pytest.raises(TransferError, match="stopped"):
        fetch(tmp_path / "a.bin", on_bytes=lambda num_bytes: stop.set(), stop=stop)
    assert not (tmp_path / "a.bin").exists()


def test_pauses_double_with_jitter_up_to_a_limit_and_heed_the_server():
    patience = Retry(sleep=Pauses(), rng=random.Random(0), first_seconds=1.0, longest_seconds=20.0)
    for failures in range(1, 8):
        patience.pause(failures, TransferError(""), threading.Event())
    patience.pause(1, TransferError("", asked_seconds=7.0), threading.Event())
    *backoffs, asked = patience.sleep.seconds
    assert asked == 7.0
    for failures, seconds in enumerate(backoffs, start=1):
        assert min(2 ** (failures - 1) / 2, 20) <= seconds <= min(2 ** (failures - 1), 20)


def test_full_disk_is_a_user_error_and_no_reason_to_retry(server, tmp_path):
    hub.partial_path(tmp_path / "a.bin").mkdir()  # what open() then raises is an OSError, as a full disk would
    with pytest.raises(UserError, match=r"cannot write .*a.bin"):
        fetch(tmp_path / "a.bin")
    assert server.fetched("data/a.bin") == 1


def test_token_is_sent_when_there_is_one(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert hub.request_headers()["Authorization"] == "Bearer hf_secret"
