"""Files of a Hugging Face hub (or a mirror of it): list a data set repository, fetch a file whole or go on fetching it.

Plain HTTP with our own judgement: every request has a time limit, transfers go on after any kind of stop, and each body
is checked (size, sha256, a check of the caller's) before it takes its final name. The hub's client library only
provides the user's token: its listing waits without limit and its download takes any body of the right length.
Not here: what the files mean, which of them are wanted, locks between processes (`dataset.py`).
"""

import hashlib
import os
import random
import re
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import quote

from nanochat.common import UserError, disk_errors

DEFAULT_ENDPOINT = "https://huggingface.co"
REPO_PATTERN = re.compile(
    r"(\w[\w.-]*/\w[\w.-]*)((?:/[\w.=-]+)*)"
)  # owner/name, or owner/name/folder of the repository
PIECE_BYTES = 1 << 16  # a broken connection loses at most this much of what had arrived
CONNECT_SECONDS, READ_SECONDS = 10, 60  # patience of one request: until it is accepted, and between two pieces
UNREACHABLE_ATTEMPTS = 3  # of a listing when nobody answers at all: a machine without network should say so soon
RETRY_STATUSES = (408, 416, 425, 429)  # of the 4xx; the others will not change by asking again


class TransferError(Exception):
    """A request or its answer was not good: why, whether asking again is useless (`is_final`), whether nobody
    answered (`is_unreachable`), and how many seconds the server asked to wait."""

    def __init__(
        self, reason: str, *, is_final: bool = False, is_unreachable: bool = False, asked_seconds: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.is_final = is_final
        self.is_unreachable = is_unreachable
        self.asked_seconds = asked_seconds


@dataclass(frozen=True)
class HubFile:
    """A file as its source lists it: path below the folder, size in bytes, sha256 in hex ("" when not listed)."""

    name: str
    size: int
    sha256: str = ""

    def is_whole(self, folder: Path) -> bool:
        """Whether it is in `folder` with its size; files get their final name only after they were verified."""
        try:
            return (folder / self.name).stat().st_size == self.size
        except OSError:
            return False


@dataclass(frozen=True)
class Retry:
    """How many requests may fail in a row without getting further, and how long to wait after each: a random share
    of `first_seconds` x 2^(failures - 1), between half and all of it, so that many clients do not come back at once.
    `sleep` replaces the waiting in tests."""

    attempts: int = 6
    first_seconds: float = 1.0
    longest_seconds: float = 60.0
    sleep: Callable[[float], Any] | None = None
    rng: random.Random = field(default_factory=random.Random)

    def pause(self, failures: int, error: TransferError, stop: threading.Event) -> None:
        """Wait after the `failures`-th failure in a row, at least as long as the server asked for, until `stop`."""
        backoff = self.first_seconds * 2 ** (failures - 1) * self.rng.uniform(0.5, 1.0)
        (self.sleep or stop.wait)(min(max(backoff, error.asked_seconds), self.longest_seconds))


# --- listing -------------------------------------------------------------------------------------


def endpoint() -> str:
    """Address of the hub: `HF_ENDPOINT`, or the public one. Read at each call, not when the library is imported."""
    return (os.environ.get("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")


def split_repository(data: str) -> tuple[str, str]:
    """`owner/name/folder` as (`owner/name`, `folder`). Raises `UserError` when it does not look like that."""
    match = REPO_PATTERN.fullmatch(data)
    if not match or ".." in data:
        raise UserError(f"{data!r} is no file or folder here and no hub repository (owner/name); check the spelling")
    return match[1], match[2].strip("/")


def list_files(data: str, retry: Retry) -> tuple[str, list[HubFile]]:
    """Newest commit of a data set repository (or of a folder of it), and its files as the hub lists them.

    Raises `UserError` when the hub cannot be reached or does not have it.
    """
    repo, folder = split_repository(data)
    address = f"{endpoint()}/api/datasets/{repo}"
    try:
        info, _ = _get_json(address, retry)
        revision = info.get("sha") or "main"
        next_page = f"{address}/tree/{revision}/{quote(folder)}".rstrip("/") + "?recursive=true"
        entries: list[dict[str, Any]] = []
        while next_page:
            page, next_page = _get_json(next_page, retry)
            entries.extend(entry for entry in page if entry["type"] == "file")
        files = [HubFile(entry["path"], entry["size"], (entry.get("lfs") or {}).get("oid", "")) for entry in entries]
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{endpoint()} does not answer like a hub ({error!r}); check HF_ENDPOINT") from error
    except TransferError as error:
        raise UserError(
            f"cannot list {data} on the hub at {endpoint()} ({error}); check the name and the network, set "
            f"HF_ENDPOINT to a mirror, or give --data a local folder, or 'local' for text found on this machine"
        ) from error
    # A name from outside must not lead out of the folder it is written to.
    return revision, [
        file for file in files if not file.name.startswith("/") and ".." not in PurePosixPath(file.name).parts
    ]


def _get_json(url: str, retry: Retry) -> tuple[Any, str]:
    """The JSON value at `url`, and the address of the next page ("" for the last).

    Raises `TransferError` when `retry.attempts` requests failed, fewer when nobody answers at all.
    """
    failures = 0
    while True:
        try:
            return _get_json_once(url)
        except TransferError as error:
            failures += 1
            attempts = min(UNREACHABLE_ATTEMPTS, retry.attempts) if error.is_unreachable else retry.attempts
            if error.is_final or failures >= attempts:
                raise
            retry.pause(failures, error, threading.Event())


def _get_json_once(url: str) -> tuple[Any, str]:
    import requests

    try:
        response = requests.get(url, headers=request_headers(), timeout=(CONNECT_SECONDS, READ_SECONDS))
        if response.status_code != 200:
            raise _status_error(response.status_code, response.headers)
        return response.json(), response.links.get("next", {}).get("url", "")
    except requests.ConnectionError as error:
        raise TransferError(_reason(error), is_unreachable=True) from error
    except requests.RequestException as error:  # broken bodies, and what is no JSON
        raise TransferError(_reason(error)) from error


def _reason(error: Exception) -> str:
    """The innermost message of a network error, which is nested five deep, in one short line."""
    while error.__context__ is not None and isinstance(error.__context__, Exception):
        error = error.__context__
    return " ".join(f"{type(error).__name__}: {error}".split())[:160]


def _status_error(status: int, headers: Any) -> TransferError:
    """The error an HTTP status stands for: whether to come back, and when."""
    remedy = "; it is private or gated: ask for access on its page and set HF_TOKEN" if status in (401, 403) else ""
    asked = headers.get("Retry-After") or ""
    return TransferError(
        f"HTTP status {status}{remedy}",
        asked_seconds=float(asked) if asked.isdigit() else 0.0,
        is_final=400 <= status < 500 and status not in RETRY_STATUSES,
    )


def file_url(data: str, revision: str, file: HubFile) -> str:
    """Address of the content of `file` in commit `revision`."""
    repo, _ = split_repository(data)
    return f"{endpoint()}/datasets/{repo}/resolve/{revision}/{quote(file.name)}"


def request_headers() -> dict[str, str]:
    """Headers of a request to the hub, with the user's token (`HF_TOKEN`, or from logging in) where there is one."""
    from huggingface_hub import get_token

    token = get_token()
    return {"User-Agent": "nanochat", **({"Authorization": f"Bearer {token}"} if token else {})}


# --- fetching ------------------------------------------------------------------------------------

OnBytes = Callable[[int], Any]  # told how many bytes came in; negative when some were thrown away
Check = Callable[[Path, HubFile], None]  # raises TransferError when a file with the right bytes is still not good


def partial_path(path: Path) -> Path:
    """Where a file is kept until it is whole and verified."""
    return path.with_name(f".{path.name}.partial")


def size_of(path: Path) -> int:
    """Bytes of the file, 0 when there is none."""
    return path.stat().st_size if path.exists() else 0


def fetch_file(
    url: str,
    path: Path,
    file: HubFile,
    *,
    retry: Retry,
    headers: dict[str, str] | None = None,
    check: Check = lambda path, file: None,
    on_bytes: OnBytes = lambda num_bytes: None,
    stop: threading.Event | None = None,
) -> None:
    """Fetch `url` to `path`, going on from what an earlier call, of this process or another, left beside it.

    The file takes its final name only when it is what `file` says and passes `check`. Raises `TransferError` when
    `retry.attempts` requests in a row failed without getting further than before (what arrived is kept) or `stop`
    is set, `UserError` when the disk is at fault, and what `check` raises.
    """
    partial = partial_path(path)
    stop = stop or threading.Event()
    failures = furthest = 0
    with disk_errors(path.name, path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
    while True:
        try:
            _receive(url, partial, file, headers or {}, on_bytes, stop)
            verify_or_discard(partial, file, check, on_bytes)
            with disk_errors(path.name, path.parent):
                os.replace(partial, path)
            return
        except TransferError as error:
            have = size_of(partial)
            failures = 1 if have > furthest else failures + 1
            furthest = max(furthest, have)
            if error.is_final or failures >= retry.attempts or stop.is_set():
                raise
            retry.pause(failures, error, stop)


def _receive(
    url: str, partial: Path, file: HubFile, headers: dict[str, str], on_bytes: OnBytes, stop: threading.Event
) -> None:
    """Bring `partial` to the size of `file` with one request. Raises `TransferError` when it falls short."""
    import requests

    have = size_of(partial)
    if have >= file.size:  # nothing to ask for; the verification has the last word
        return
    asked = {**headers, "Accept-Encoding": "identity", **({"Range": f"bytes={have}-"} if have else {})}
    try:
        response = requests.get(url, headers=asked, stream=True, timeout=(CONNECT_SECONDS, READ_SECONDS))
    except requests.RequestException as error:
        raise TransferError(f"no answer ({_reason(error)})") from error
    with response, disk_errors(file.name, partial.parent):
        start = _check_answer(response, have, file)
        on_bytes(start - have)
        with open(partial, "r+b" if start else "wb") as output:
            output.seek(start)
            for piece in _pieces(response):
                if stop.is_set():
                    raise TransferError("stopped")
                output.write(piece)
                on_bytes(len(piece))
            output.flush()
            os.fsync(output.fileno())
    if size_of(partial) < file.size:
        raise TransferError(f"the body ended at {size_of(partial):,} of {file.size:,} bytes")


def _check_answer(response: Any, have: int, file: HubFile) -> int:
    """Offset in the file at which the body of `response` starts: `have`, or 0 where the server does not resume.

    Raises `TransferError` for a status, type or length that cannot be the rest of `file`; what is here stays then.
    """
    if response.status_code not in (200, 206):
        raise _status_error(response.status_code, response.headers)
    if "text/html" in response.headers.get("Content-Type", ""):
        raise TransferError("an HTML page came instead of the file")
    start = have if response.status_code == 206 else 0
    content_range = response.headers.get("Content-Range", "")
    if start and not content_range.startswith(f"bytes {start}-"):
        raise TransferError(f"the server resumed at another place than {start}: {content_range!r}")
    announced = response.headers.get("Content-Length", "")
    if announced.isdigit() and int(announced) != file.size - start:
        raise TransferError(f"the server announces {int(announced):,} bytes instead of {file.size - start:,}")
    return start


def _pieces(response: Any) -> Iterator[bytes]:
    """The body piece by piece; a broken connection as `TransferError`, as requests' own would pass for a disk error."""
    import requests

    try:
        yield from response.iter_content(PIECE_BYTES)
    except requests.RequestException as error:
        raise TransferError(f"the connection broke ({_reason(error)})") from error


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
