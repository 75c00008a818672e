"""The engines behind the server: each in a process of its own, which receives work and returns text through a pipe.

Processes rather than threads: one that dies takes no other with it, and engines that spend their time in Python, as in
front of a fast GPU, do not share an interpreter lock with the server and each other (1.4 times the tokens/s with one
engine of 64 rows, 1.9 times with two; no difference on a CPU, where matrix products take the time). A worker never
outlives the server: when its pipe closes, it exits.
"""

import asyncio
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import NamedTuple

from nanochat.common import UserError, init_runtime
from nanochat.data.chat import Delta
from nanochat.engine.engine import Engine
from nanochat.engine.generation import Event, Request, Token
from nanochat.engine.sampling import Sampling
from nanochat.model.load import load_model
from nanochat.serve.errors import ApiError, ClientGone

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # a worker that was asked to exit is killed after this time
LOADING_RETRY_SECONDS = 2
QUEUE_RETRY_SECONDS = 1
MakeEngine = Callable[[], Engine]


# --- messages: to a worker `Work`, the id of one to cancel, or None to exit; from it `Progress` and `Failed` ---------


class Work(NamedTuple):
    """Answer each of `prompts` (token ids) `num_samples` times."""

    id: int
    prompts: list[list[int]]
    sampling: Sampling
    num_samples: int


class Piece(NamedTuple):
    """What one step added to a reply."""

    work_id: int
    index: int  # of the reply: sample i of prompt p has p * num_samples + i
    deltas: Sequence[Delta]
    num_tokens: int
    tokens: Sequence[Token]  # only when log probabilities were requested; then also the special one that ends a reply
    scored: Sequence[Token]  # the prompt's, when their log probabilities were requested; with its first piece
    num_cached: int  # prompt tokens that were in the cache already
    finish_reason: str | None


class Progress(NamedTuple):
    """What a step produced, and the engine's counters after it. The first one says that the model is loaded."""

    pieces: list[Piece]
    stats: dict[str, int]


class Failed(NamedTuple):
    """The engine refused the work of that id (the message is for the client) or, without an id, it has stopped."""

    message: str
    work_id: int | None = None


def run_worker(make_engine: MakeEngine, connection: Connection, *, is_process: bool) -> None:
    """Build the engine and do the work that comes through `connection` until it closes."""
    if is_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the server decides when to exit
        logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    commands: queue.SimpleQueue = queue.SimpleQueue()

    def read_commands() -> None:
        """Empty the pipe at once, whatever the engine does, so that no sender waits for the end of a step."""
        with suppress(EOFError, OSError):
            for command in iter(connection.recv, None):
                commands.put(command)
        commands.put(None)

    reader = threading.Thread(target=read_commands, daemon=True)
    reader.start()
    try:
        _serve(make_engine(), commands, connection.send)
    except UserError as error:
        connection.send(Failed(str(error)))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server has gone
    except Exception as error:  # the server has to learn of any fault
        logger.exception("the engine failed")
        connection.send(Failed(f"{type(error).__name__} in the engine"))
    reader.join(CLOSE_SECONDS)  # the server answers `Failed` with None
    connection.close()


def _serve(engine: Engine, commands: queue.SimpleQueue, send: Callable[[Progress | Failed], None]) -> None:
    """Step the engine while it has work, and accept commands between steps, until None comes."""
    origins: dict[Request, tuple[int, int]] = {}  # of each running request: id of the work, index of its first reply

    def report(events: Sequence[Event]) -> None:
        pieces = []
        for event in events:
            work_id, first_index = origins[event.request]
            request, end, tokens = event.request, event.request.completions[event.index].end, ()
            if request.sampling.num_logprobs is not None:
                tokens = event.tokens if end is None else (*event.tokens, end)
            pieces.append(Piece(work_id, first_index + event.index, event.deltas, len(event.tokens), tokens,
                                request.scored, request.num_reused, event.finish_reason))  # fmt: skip
            request.scored = []
        send(Progress(pieces, asdict(engine.stats) | {"active": engine.num_active, "waiting": engine.num_waiting}))

    def cancel(work_id: int) -> None:
        for request in [request for request, (id_, _) in origins.items() if id_ == work_id]:
            engine.cancel(request)
            del origins[request]

    report([])
    while True:
        while not commands.empty() or not engine.has_work:
            match commands.get():
                case None:
                    return
                case int(work_id):
                    cancel(work_id)
                    report([])
                case Work(work_id, prompts, sampling, num_samples):
                    try:
                        for number, prompt in enumerate(prompts):
                            request = engine.submit(prompt, sampling, num_samples=num_samples)
                            origins[request] = work_id, number * num_samples
                    except UserError as error:
                        cancel(work_id)
                        send(Failed(str(error), work_id))
        events = engine.step()
        if events:
            report(events)
        origins = {request: origin for request, origin in origins.items() if not request.is_done}


@dataclass
class Reply:
    """A reply, or a part of one, in as few deltas as possible. An empty delta begins a new part of the message."""

    deltas: list[Delta] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: str | None = None

    def add(self, piece: Piece) -> None:
        for delta in piece.deltas:
            last = self.deltas[-1] if self.deltas else Delta("", "")
            if delta.text and last.text and last.type == delta.type:
                self.deltas[-1] = Delta(delta.type, last.text + delta.text)
            else:
                self.deltas.append(delta)
        self.tokens += piece.tokens
        self.num_tokens += piece.num_tokens
        self.finish_reason = piece.finish_reason

    @property
    def parts(self) -> list[dict[str, str]]:
        """The content of a message: Delta("python", ""), Delta("python", "1+1") are one part."""
        parts: list[dict[str, str]] = []
        for type_, text in self.deltas:
            if not text or not parts or parts[-1]["type"] != type_:
                parts.append({"type": type_, "text": ""})
            parts[-1]["text"] += text
        return parts


class Job:
    """Work given to a worker, and its replies so far. Times are `time.perf_counter()`, None before the first token."""

    def __init__(self, work: Work, worker: "Worker"):
        self.work, self.worker = work, worker
        self.num_unfinished = len(work.prompts) * work.num_samples
        self.replies = [Reply() for _ in range(self.num_unfinished)]
        self.scored: list[Sequence[Token]] = [()] * len(work.prompts)
        self.num_cached = 0
        self.failure: ApiError | None = None
        self.started = time.perf_counter()
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self._news: dict[int, Reply] = {}
        self._has_news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self.failure is not None or not self.num_unfinished

    async def next_news(self) -> dict[int, Reply]:
        """What was added to replies, by index, since the last call, as soon as there is something; empty when all are
        finished. Raises `ApiError` when the engine refused the work or failed, and when the job was cancelled."""
        while not self._news and not self.is_over:
            self._has_news.clear()
            await self._has_news.wait()
        news, self._news = self._news, {}
        if not news and self.failure is not None:
            raise self.failure
        return news

    def add(self, piece: Piece) -> None:
        if piece.num_tokens:
            self.last_token_time = time.perf_counter()
            self.first_token_time = self.first_token_time or self.last_token_time
        self.num_cached = max(self.num_cached, piece.num_cached)
        self.num_unfinished -= piece.finish_reason is not None
        if piece.scored:
            self.scored[piece.index // self.work.num_samples] = piece.scored
        for reply in self.replies[piece.index], self._news.setdefault(piece.index, Reply()):
            reply.add(piece)
        self._has_news.set()

    def fail(self, error: ApiError) -> None:
        self.failure = error
        self._has_news.set()


class Worker:
    """One engine's process (or thread) as seen from the server, with two threads that talk to it: one sends, the other
    calls `on_message`, at last with `Failed`."""

    def __init__(self, make_engine: MakeEngine, on_message: Callable[["Worker", Progress | Failed], None],
                 *, in_thread: bool):  # fmt: skip
        self.make_engine, self._on_message = make_engine, on_message
        self.state = "loading"  # then "ready", at last "failed"
        self.jobs: dict[int, Job] = {}
        self.stats: dict[str, int] = {}
        self._sender = ThreadPoolExecutor(1)
        self.pipe, theirs = multiprocessing.Pipe()
        start = threading.Thread if in_thread else multiprocessing.get_context("spawn").Process  # CUDA forbids fork
        target = partial(run_worker, make_engine, theirs, is_process=not in_thread)
        self.runner = start(target=target, name="engine", daemon=True)
        self.runner.start()
        if not in_thread:
            theirs.close()  # now only the process holds it, so its death closes the pipe
        threading.Thread(target=self._receive_all, daemon=True).start()

    @property
    def num_replies(self) -> int:
        """Those it was given and has not finished."""
        return sum(job.num_unfinished for job in self.jobs.values())

    def send(self, command: Work | int | None) -> None:
        """Never blocks. An error stays in the future: it means that the worker died, which `_receive_all` reports."""
        self._sender.submit(self.pipe.send, command)

    def _receive_all(self) -> None:
        with suppress(RuntimeError):  # the event loop is closed
            try:
                while True:
                    self._on_message(self, self.pipe.recv())
            except (EOFError, OSError):
                self._on_message(self, Failed("the engine's process ended"))

    def fail(self, message: str) -> None:
        """End the worker and fail its jobs."""
        for job in self.jobs.values():
            job.fail(ApiError(503, f"{message}; try again in a moment", code="worker_failed",
                              retry_seconds=LOADING_RETRY_SECONDS))  # fmt: skip
        self.jobs.clear()
        self.send(None)

    def join(self, seconds: float) -> None:
        self.runner.join(seconds)
        if not isinstance(self.runner, threading.Thread) and self.runner.is_alive():
            self.runner.kill()
            self.runner.join()


class Pool:
    """Workers, one for each of `make_engines`, that run from `start` to `close`; for the event loop's thread.

    Work goes to the worker with the least to do. `max_rows` replies are generated at a time in each, and `max_queue`
    more may wait. `on_ready()` is called when the first can answer. A worker that dies while it serves is restarted;
    one that cannot load stays down, and when none is left `on_failure(message)` is called. With `in_threads` the
    engines are threads of this process, for tests.
    """

    def __init__(
        self, make_engines: Sequence[MakeEngine], *, max_rows: int, max_queue: int, in_threads: bool = False,
        on_ready: Callable[[], None] = lambda: None, on_failure: Callable[[str], None] = lambda message: None,
    ):  # fmt: skip
        assert make_engines
        assert max_rows > 0, max_rows
        assert max_queue >= 0, max_queue
        self.workers: list[Worker] = []
        self._make_engines, self._in_threads = make_engines, in_threads
        self._on_ready, self._on_failure, self._was_ready = on_ready, on_failure, False
        self._max_rows, self._capacity = max_rows, len(make_engines) * max_rows + max_queue
        self._num_works = 0
        self._is_closing = False

    async def start(self) -> None:
        """Begin to load the models, which `state` follows."""
        self.workers = [self._new_worker(make_engine) for make_engine in self._make_engines]

    def _new_worker(self, make_engine: MakeEngine) -> Worker:
        on_message = partial(asyncio.get_running_loop().call_soon_threadsafe, self._on_message)
        return Worker(make_engine, on_message, in_thread=self._in_threads)

    async def close(self) -> None:
        """End all workers; what they were doing fails."""
        self._is_closing = True
        for worker in self.workers:
            worker.fail("the server is shutting down")
        await asyncio.gather(*(asyncio.to_thread(worker.join, CLOSE_SECONDS) for worker in self.workers))

    @property
    def state(self) -> str:
        """ "ok": a worker is ready; "loading": none is yet; "failed": none ever will be."""
        states = {worker.state for worker in self.workers} or {"loading"}
        return "ok" if "ready" in states else "loading" if "loading" in states else "failed"

    @property
    def num_replies(self) -> int:
        """Replies requested and not finished."""
        return sum(worker.num_replies for worker in self.workers)

    @property
    def num_active(self) -> int:
        """How many of them are being generated now."""
        return sum(min(worker.num_replies, self._max_rows) for worker in self.workers)

    def check_room(self, num_replies: int) -> None:
        """Raises `ApiError` when that many replies cannot be accepted now."""
        if self._is_closing:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if self.state == "failed":
            raise ApiError(503, "the model could not be loaded", code="worker_failed")
        if self.state == "loading":
            message, wait = "the model is being loaded; try again in a moment", LOADING_RETRY_SECONDS
            raise ApiError(503, message, code="model_loading", retry_seconds=wait)
        if self.num_replies + num_replies > self._capacity:
            message = "too many requests are waiting; try again in a moment"
            raise ApiError(429, message, code="queue_full", retry_seconds=QUEUE_RETRY_SECONDS)

    def submit(self, prompts: list[list[int]], sampling: Sampling, *, num_samples: int = 1) -> Job:
        """Have each of `prompts` answered `num_samples` times. Raises like `check_room`."""
        self.check_room(len(prompts) * num_samples)
        worker = min((w for w in self.workers if w.state == "ready"), key=lambda w: w.num_replies)
        self._num_works += 1
        work = Work(self._num_works, prompts, sampling, num_samples)
        job = worker.jobs[work.id] = Job(work, worker)
        worker.send(work)
        return job

    def cancel(self, job: Job) -> None:
        """End a job and free what it holds; does nothing when it is over."""
        if not job.is_over:
            job.fail(ClientGone())
            del job.worker.jobs[job.work.id]
            job.worker.send(job.work.id)

    def _on_message(self, worker: Worker, message: Progress | Failed) -> None:
        if isinstance(message, Progress):
            worker.state, worker.stats = "ready", message.stats
            if not self._was_ready:
                self._was_ready = True
                self._on_ready()
            for piece in message.pieces:
                if job := worker.jobs.get(piece.work_id):  # None: cancelled in the meantime
                    job.add(piece)
                    if job.is_over:
                        del worker.jobs[piece.work_id]
        elif message.work_id is not None:
            if job := worker.jobs.pop(message.work_id, None):
                job.fail(ApiError(400, message.message))
        elif worker.state != "failed" and not self._is_closing:
            was_ready, worker.state = worker.state == "ready", "failed"
            worker.fail("the engine failed")
            if was_ready:
                logger.error("a worker failed (%s) and is restarted", message.message)
                self.workers[self.workers.index(worker)] = self._new_worker(worker.make_engine)
            elif self.state == "failed":
                self._on_failure(message.message)


def load_engine(gpu: int | None, checkpoint: dict, runtime: dict, *, weights: str, max_rows: int) -> Engine:
    """An engine on GPU number `gpu` (None: the only device); to be called in its process.

    `checkpoint` has source, model_tag and step, `runtime` device_type and dtype.
    """
    if gpu is not None:
        os.environ["LOCAL_RANK"] = str(gpu)
    loaded = load_model(runtime=init_runtime(**runtime), **checkpoint)
    return Engine(loaded.model, loaded.tokenizer, max_rows=max_rows, weights=weights)
