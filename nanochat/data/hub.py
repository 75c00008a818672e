"""Files of a repository on the Hugging Face hub, or on a mirror of it: list them, fetch them whole.

`huggingface_hub` makes the requests, continues broken transfers, and waits as long as a busy hub asks for. Its settings
hold: HF_ENDPOINT, HF_TOKEN, HF_HUB_DOWNLOAD_TIMEOUT, HF_HUB_ETAG_TIMEOUT. Added here are a time limit for listings,
further attempts after it has given up, and a check of size, sha256 and content before a file gets its name.
Not here: which files are wanted, what they mean, locks between processes (`dataset.py`).
"""

import hashlib
import os
import random
import re
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from nanochat.common import UserError, disk_errors

DEFAULT_ENDPOINT = "https://huggingface.co"
REPO_PATTERN = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/[\w.=-]+)*)")  # owner/name, then folders of the repository
ATTEMPTS = 5  # at a listing or a file; within each, huggingface_hub resumes as long as bytes arrive
FIRST_PAUSE = 1.0  # seconds after the first failed attempt, then twice as long each time
LONGEST_WAIT = (
    3600.0  # seconds in all that a request waits because the hub says so; it limits requests per five minutes
)
GIVE_UP_FAILURES = 8  # files in a row that could not be fetched: the network is gone, the rest need not be tried
RETRY_STATUSES = (408, 416, 425, 429)  # of the 4xx; asking again does not change the others
REQUEST_SECONDS = 60  # limit of each network operation where huggingface_hub has none
CARD = "README.md"
REMEDIES = {"dataset": ", or for pretraining --data local: text found on this machine", "model": ""}
STAGING = ".fetching"  # folder, beside the files, of those that are not yet whole

T = TypeVar("T")
Check = Callable[[Path, "HubFile"], None]  # raises TransferError when the right bytes are still not a good file


class TransferError(Exception):
    """What was asked for did not arrive, or is not what it should be."""


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it: path below the folder, size in bytes, sha256 in hex ("" when not listed)."""

    name: str
    size: int
    sha256: str = ""

    def is_whole(self, folder: Path) -> bool:
        """Whether it is in `folder` with its size; files get their final name only after they were verified."""
        path = folder / self.name
        return path.is_file() and path.stat().st_size == self.size


def endpoint() -> str:
    """Address of the hub: `HF_ENDPOINT`, or the public one. Read at each call, not when the library is imported."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def split_repository(data: str) -> tuple[str, str]:
    """`owner/name/folder` as (`owner/name`, `folder`). Raises `UserError` when it does not look like that."""
    match = REPO_PATTERN.fullmatch(data)
    if not match or ".." in data:
        raise UserError(f"{data!r} is no file or folder here and no hub repository (owner/name); check the spelling")
    return match[1], match[2].strip("/")


def _limit_requests() -> None:
    """Give every network operation of `huggingface_hub` a time limit: it asks for listings without one."""
    import httpx
    from huggingface_hub import set_client_factory

    def limit(request: httpx.Request) -> None:
        seconds = request.extensions["timeout"]
        request.extensions["timeout"] = {kind: given or REQUEST_SECONDS for kind, given in seconds.items()}

    set_client_factory(lambda: httpx.Client(follow_redirects=True, event_hooks={"request": [limit]}))


def list_files(data: str, *, kind: str = "dataset") -> tuple[str, list[HubFile], str]:
    """Newest commit of a repository (or of a folder of it) of the `kind` "dataset" or "model", its files as the hub
    lists them, and the text of the repository's card ("" if it has none).

    Raises `UserError` when the hub cannot be reached or does not have it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RemoteEntryNotFoundError
    from huggingface_hub.hf_api import RepoFile

    repo, folder = split_repository(data)
    _limit_requests()
    api = HfApi(endpoint=endpoint(), library_name="nanochat")

    def listing() -> tuple[str, list[HubFile], str]:
        revision = api.repo_info(repo, repo_type=kind).sha
        entries = api.list_repo_tree(repo, folder or None, recursive=True, revision=revision, repo_type=kind)
        files = [entry for entry in entries if isinstance(entry, RepoFile)]
        listed = [HubFile(file.path, file.size, file.lfs.sha256 if file.lfs else "") for file in files]
        card = ""
        if folder or any(file.name == CARD for file in listed):
            with tempfile.TemporaryDirectory() as scratch, suppress(RemoteEntryNotFoundError):
                path = api.hf_hub_download(repo, CARD, revision=revision, repo_type=kind, local_dir=scratch)
                card = Path(path).read_text(encoding="utf-8", errors="replace")
        return revision, listed, card

    try:
        revision, files, card = _persist(listing, threading.Event())
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{endpoint()} does not answer like a hub ({error!r}); check HF_ENDPOINT") from error
    except TransferError as error:
        raise UserError(
            f"cannot list {data} on the hub at {endpoint()} ({error}); check the name and the network, set "
            f"HF_ENDPOINT to a mirror, or give a local folder{REMEDIES[kind]}"
        ) from error
    # A name from outside must not lead out of the folder it is written to.
    safe = [f for f in files if not f.name.startswith("/") and ".." not in PurePosixPath(f.name).parts]
    return revision, safe, card


def fetch_files(
    data: str, revision: str, files: Sequence[HubFile], folder: Path, *, workers: int, check: Check,
    kind: str = "dataset",
) -> dict[str, str]:  # fmt: skip
    """Fetch `files` of commit `revision` into `folder`, `workers` at a time, with a progress bar.

    A file gets its name when it has its size and sha256 and passes `check`; what arrived of it is kept for the next
    call. Returns the reason by name for those that could not be fetched. Raises `UserError` when the disk is at fault,
    and what `check` raises besides `TransferError`.
    """
    from huggingface_hub import hf_hub_download
    from tqdm import tqdm

    repo, _ = split_repository(data)
    _limit_requests()
    source = {"repo_id": repo, "repo_type": kind, "revision": revision, "endpoint": endpoint()}
    stop = threading.Event()
    bar = tqdm(
        desc=f"{len(files)} files", total=sum(file.size for file in files), unit="B", unit_scale=True,
        unit_divisor=1024, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )  # fmt: skip

    class Share(tqdm):
        """The part of one file in the common bar; also where a transfer learns that it must end."""

        def __init__(self, *args: Any, initial: int = 0, **options: Any):
            super().__init__(*args, disable=True)
            bar.update(initial)

        def update(self, n: float = 1) -> None:
            if stop.is_set():
                raise TransferError("stopped")
            bar.update(n)

    def fetch(file: HubFile) -> None:
        def attempt() -> None:
            arrived = Path(hf_hub_download(filename=file.name, local_dir=folder / STAGING, tqdm_class=Share, **source))
            verify_or_discard(arrived, file, check)
            (folder / file.name).parent.mkdir(parents=True, exist_ok=True)
            os.replace(arrived, folder / file.name)

        with disk_errors(file.name, folder):
            _persist(attempt, stop)

    failed = {file.name: "not tried to the end" for file in files}
    failures_in_a_row = 0
    with bar, ThreadPoolExecutor(workers) as pool:
        jobs = {pool.submit(fetch, file): file.name for file in files}
        try:
            for job in as_completed(jobs):
                try:
                    job.result()
                    del failed[jobs[job]]
                    failures_in_a_row = 0
                except TransferError as error:
                    failed[jobs[job]] = str(error)
                    failures_in_a_row += 1
                    if failures_in_a_row >= GIVE_UP_FAILURES:
                        break
        finally:  # also after Ctrl-C or a full disk: end the other transfers
            stop.set()
            pool.shutdown(cancel_futures=True)
    if not failed:
        shutil.rmtree(folder / STAGING, ignore_errors=True)
    return failed


def verify_or_discard(path: Path, file: HubFile, check: Check) -> None:
    """Delete `path` and raise `TransferError` unless it has the size and sha256 of `file` and passes `check`."""
    try:
        if path.stat().st_size != file.size:
            raise TransferError(f"it has {path.stat().st_size:,} bytes instead of {file.size:,}")
        with open(path, "rb") as content:
            if file.sha256 and hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                raise TransferError("its sha256 is not the listed one")
        check(path, file)
    except TransferError:
        path.unlink()
        raise


def _persist(request: Callable[[], T], stop: threading.Event) -> T:
    """The result of `request()`, tried up to `ATTEMPTS` times after faults of the network, and again whenever a busy
    hub has been given the time it asked for. Raises `TransferError`."""
    import httpx
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    attempt, waited_seconds = 1, 0.0
    while True:
        try:
            return request()
        except (httpx.HTTPError, ValueError, OSError, TransferError) as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's
                raise
            cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) and error.__cause__ else error
            response = cause.response if isinstance(cause, HfHubHTTPError) else None
            is_final = response is not None and 400 <= response.status_code < 500
            is_final = is_final and response.status_code not in RETRY_STATUSES
            told_seconds = _told_seconds(response.headers) if response is not None else 0.0
            may_wait = told_seconds > 0 and waited_seconds + told_seconds <= LONGEST_WAIT
            if is_final or stop.is_set() or (not may_wait and (told_seconds or attempt >= ATTEMPTS)):
                raise TransferError(_reason(cause)) from error
        if may_wait:  # a busy hub is no broken one: this is not counted as an attempt
            print(f"{endpoint()} is busy and asks to wait {told_seconds:,.0f} s; going on then", file=sys.stderr)
            waited_seconds += told_seconds
            stop.wait(told_seconds + random.random())
        else:  # twice as long each time, with jitter so that many clients do not come back at the same moment
            stop.wait(FIRST_PAUSE * 2 ** (attempt - 1) * random.uniform(0.5, 1.0))
            attempt += 1


def _told_seconds(headers: Mapping[str, str]) -> float:
    """How long a busy hub says to wait: `Retry-After` in seconds or as a date, or the `RateLimit` that is used up."""
    retry_after = headers.get("Retry-After", "").strip()
    told = re.findall(r"\br=0\s*;\s*t=(\d+)", headers.get("RateLimit", ""))
    if retry_after.isdecimal():
        told.append(retry_after)
    elif retry_after:
        with suppress(ValueError):
            told.append(parsedate_to_datetime(retry_after).timestamp() - time.time())
    return max(map(float, told), default=0.0)


def _reason(error: BaseException) -> str:
    from huggingface_hub.errors import HfHubHTTPError

    if isinstance(error, TransferError):
        return str(error)
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        remedy = "; it is private or gated: ask for access on its page and set HF_TOKEN" if status in (401, 403) else ""
        return f"HTTP status {status}{remedy}"
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]
