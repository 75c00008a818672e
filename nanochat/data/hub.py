"""Files of a data set repository on the Hugging Face hub, or on a mirror of it: list them, fetch them whole.

`huggingface_hub` makes the requests. This module adds what a long download needs: a time limit for every request,
new attempts after transient failures, partial files that the next attempt or process continues, and a check of size,
sha256 and content before a file gets its final name.
Not here: which files are wanted, what they mean, locks between processes (`dataset.py`).
"""

import hashlib
import os
import random
import re
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any, TypeVar

from nanochat.common import UserError, disk_errors

DEFAULT_ENDPOINT = "https://huggingface.co"
REPO_PATTERN = re.compile(r"(\w[\w.-]*/\w[\w.-]*)((?:/[\w.=-]+)*)")  # owner/name, then folders of the repository
ATTEMPTS = 6  # requests that may fail in a row without any progress
UNREACHABLE_ATTEMPTS = 3  # when nobody answers at all: a machine without network should say so soon
FIRST_PAUSE, LONGEST_PAUSE = 1.0, 300.0  # seconds between attempts; the hub limits requests per five minutes
GIVE_UP_FAILURES = 8  # files in a row that ran out of attempts: the network is gone, the rest need not be tried
RETRY_STATUSES = (408, 416, 425, 429)  # of the 4xx; asking again does not change the others
LISTING_SECONDS = 60  # limit of each network operation of a listing; HF_HUB_DOWNLOAD_TIMEOUT is that of a download
PIECE_BYTES = 1 << 18  # a broken connection loses at most this much of what had arrived

T = TypeVar("T")


@dataclass(eq=False)
class TransferError(Exception):
    """A request failed or its answer is not usable. `is_final`: asking again is useless; `is_unreachable`: nobody
    answered at all; `asked_seconds`: how long the server asked to wait."""

    reason: str
    is_final: bool = False
    is_unreachable: bool = False
    asked_seconds: float = 0.0

    def __str__(self) -> str:
        return self.reason


@dataclass(frozen=True)
class HubFile:
    """A file as the hub lists it: path below the folder, size in bytes, sha256 in hex ("" when not listed)."""

    name: str
    size: int
    sha256: str = ""

    def is_whole(self, folder: Path) -> bool:
        """Whether it is in `folder` with its size; files get their final name only after they were verified."""
        path = folder / self.name
        return path.is_file() and size_of(path) == self.size


OnBytes = Callable[[int], Any]  # told how many bytes came in; negative when some were thrown away
Check = Callable[[Path, HubFile], None]  # raises TransferError when the right bytes are still not a good file


# --- requests ------------------------------------------------------------------------------------


def endpoint() -> str:
    """Address of the hub: `HF_ENDPOINT`, or the public one. Read at each call, not when the library is imported."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def split_repository(data: str) -> tuple[str, str]:
    """`owner/name/folder` as (`owner/name`, `folder`). Raises `UserError` when it does not look like that."""
    match = REPO_PATTERN.fullmatch(data)
    if not match or ".." in data:
        raise UserError(f"{data!r} is no file or folder here and no hub repository (owner/name); check the spelling")
    return match[1], match[2].strip("/")


@contextmanager
def _strict_client() -> Iterator[None]:
    """Requests of `huggingface_hub` inside this context end within a time limit (its listings have none otherwise),
    and an answer that cannot be good raises `TransferError` before its body is read."""
    from huggingface_hub import constants, set_client_factory
    from huggingface_hub.utils._http import default_client_factory

    def new_client():
        client = default_client_factory()
        client.event_hooks = {"request": [*client.event_hooks["request"], _limit_time], "response": [_check_answer]}
        return client

    constants.DOWNLOAD_CHUNK_SIZE = PIECE_BYTES
    set_client_factory(new_client)
    try:
        yield
    finally:
        set_client_factory(default_client_factory)


def _limit_time(request: Any) -> None:
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {kind: limit or LISTING_SECONDS for kind, limit in limits.items()}


def _check_answer(response: Any) -> None:
    status, headers = response.status_code, response.headers
    if status >= 400:
        remedy = "; it is private or gated: ask for access on its page and set HF_TOKEN" if status in (401, 403) else ""
        pauses = [headers.get("Retry-After", "")]
        if status == 429:
            pauses += re.findall(r"\bt=(\d+)", headers.get("RateLimit", ""))  # seconds until the hub counts anew
        raise TransferError(
            f"HTTP status {status}{remedy}",
            is_final=status < 500 and status not in RETRY_STATUSES,
            asked_seconds=max((float(pause) for pause in pauses if pause.isdigit()), default=0.0),
        )
    if response.is_success and "text/html" in headers.get("Content-Type", ""):
        raise TransferError("an HTML page came instead of the file")
    asked_range = response.request.headers.get("Range", "").removeprefix("bytes=")
    if status == 206 and not headers.get("Content-Range", "").startswith(f"bytes {asked_range}"):
        raise TransferError("the server resumed at another place than it was asked for")


@contextmanager
def _network_errors() -> Iterator[None]:
    """Turn what `huggingface_hub` raises about the network or about an unreadable answer into `TransferError`."""
    import httpx
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    try:
        yield
    except (httpx.HTTPError, ValueError, OSError) as error:  # ValueError: the body is no JSON; OSError: its length
        if isinstance(error, OSError) and error.errno is not None:  # the disk's
            raise
        raise TransferError(
            " ".join(f"{type(error).__name__}: {error}".split())[:160],
            is_final=isinstance(error, (OfflineModeIsEnabled, HFValidationError)),
            is_unreachable=isinstance(error, (httpx.ConnectError, httpx.ConnectTimeout)),
        ) from error


def _persist(request: Callable[[], T], stop: threading.Event, progress: Callable[[], int]) -> T:
    """The result of `request()`, called again after a `TransferError` until `ATTEMPTS` calls in a row failed without
    `progress()` getting further, or `stop` is set. Raises the last error."""
    failures = furthest = 0
    while True:
        try:
            return request()
        except TransferError as error:
            reached = progress()
            failures = 1 if reached > furthest else failures + 1
            furthest = max(furthest, reached)
            attempts = min(ATTEMPTS, UNREACHABLE_ATTEMPTS) if error.is_unreachable else ATTEMPTS
            if error.is_final or failures >= attempts or stop.is_set():
                raise
            # Twice as long each time, with jitter so that many clients do not come back at the same moment.
            pause = FIRST_PAUSE * 2 ** (failures - 1) * random.uniform(0.5, 1.0)
            stop.wait(min(max(pause, error.asked_seconds), LONGEST_PAUSE))


# --- listing -------------------------------------------------------------------------------------


def list_files(data: str) -> tuple[str, list[HubFile]]:
    """Newest commit of a data set repository (or of a folder of it), and its files as the hub lists them.

    Raises `UserError` when the hub cannot be reached or does not have it.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

    repo, folder = split_repository(data)
    api = HfApi(endpoint=endpoint(), library_name="nanochat")

    def request() -> tuple[str, list[HubFile]]:
        with _network_errors():
            revision = api.dataset_info(repo).sha or "main"
            entries = api.list_repo_tree(repo, folder or None, recursive=True, revision=revision, repo_type="dataset")
            files = [entry for entry in entries if isinstance(entry, RepoFile)]
        return revision, [HubFile(file.path, file.size, file.lfs.sha256 if file.lfs else "") for file in files]

    try:
        with _strict_client():
            revision, files = _persist(request, threading.Event(), lambda: 0)
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{endpoint()} does not answer like a hub ({error!r}); check HF_ENDPOINT") from error
    except TransferError as error:
        raise UserError(
            f"cannot list {data} on the hub at {endpoint()} ({error}); check the name and the network, set "
            f"HF_ENDPOINT to a mirror, or give --data a local folder, or 'local' for text found on this machine"
        ) from error
    # A name from outside must not lead out of the folder it is written to.
    return revision, [f for f in files if not f.name.startswith("/") and ".." not in PurePosixPath(f.name).parts]


# --- fetching ------------------------------------------------------------------------------------


def partial_path(path: Path) -> Path:
    """Where a file is kept until it is whole and verified."""
    return path.with_name(f".{path.name}.partial")


def size_of(path: Path) -> int:
    """Bytes of the file, 0 when there is none."""
    return path.stat().st_size if path.exists() else 0


def fetch_files(
    data: str, revision: str, files: Sequence[HubFile], folder: Path, *, workers: int, check: Check
) -> dict[str, str]:
    """Fetch `files` of commit `revision` into `folder`, `workers` at a time, with a progress bar.

    A file gets its name when it has its size and sha256 and passes `check`; a part of it is kept for the next call.
    Returns the reason by name for those that could not be fetched. Raises `UserError` when the disk is at fault, and
    what `check` raises besides `TransferError`.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers
    from tqdm import tqdm

    repo, _ = split_repository(data)
    headers = {**build_hf_headers(library_name="nanochat"), "Accept-Encoding": "identity"}
    stop = threading.Event()
    bar = tqdm(
        desc=f"{len(files)} files", total=sum(file.size for file in files),
        initial=sum(size_of(partial_path(folder / file.name)) for file in files), unit="B", unit_scale=True,
        unit_divisor=1024, dynamic_ncols=True, mininterval=0.5 if sys.stderr.isatty() else 15.0,
    )  # fmt: skip

    def fetch(file: HubFile) -> None:
        url = hf_hub_url(repo, file.name, repo_type="dataset", revision=revision, endpoint=endpoint())
        path = folder / file.name
        request = partial(_fetch_once, partial(http_get, url, headers=headers), path, file, check, bar.update, stop)
        _persist(request, stop, lambda: size_of(partial_path(path)))

    failed = {file.name: "not tried to the end" for file in files}
    failures_in_a_row = 0
    with _strict_client(), bar, ThreadPoolExecutor(workers) as pool:
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
    return failed


def _fetch_once(
    get: Callable[..., None], path: Path, file: HubFile, check: Check, on_bytes: OnBytes, stop: threading.Event
) -> None:
    """Complete and verify the partial file of `path`, then give it its name. `get` is `http_get` of its address."""
    part = partial_path(path)
    have = size_of(part)

    def update(num_bytes: int) -> None:
        if stop.is_set():
            raise TransferError("stopped")
        on_bytes(num_bytes)

    @contextmanager
    def progress_bar(*, initial: int, **options: Any) -> Iterator[Any]:
        on_bytes(initial - have)  # a server that does not resume begins anew
        yield SimpleNamespace(update=update)

    with disk_errors(path.name, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        if have < file.size:
            with open(part, "ab") as output:
                with _network_errors():
                    get(output, resume_size=have, tqdm_class=progress_bar)
                output.flush()
                os.fsync(output.fileno())
        verify_or_discard(part, file, check, on_bytes)
        os.replace(part, path)


def verify_or_discard(path: Path, file: HubFile, check: Check, on_bytes: OnBytes = lambda num_bytes: None) -> None:
    """Delete `path` and raise `TransferError` unless it has the size and sha256 of `file` and passes `check`."""
    try:
        if size_of(path) != file.size:
            raise TransferError(f"it has {size_of(path):,} bytes instead of {file.size:,}")
        with open(path, "rb") as content:
            if file.sha256 and hashlib.file_digest(content, "sha256").hexdigest() != file.sha256:
                raise TransferError("its sha256 is not the listed one")
        check(path, file)
    except TransferError:
        on_bytes(-size_of(path))
        path.unlink()
        raise
