"""The engines behind the server: each in a process of its own, which takes work and gives back text over a pipe.

A process, not a thread: one that dies takes no other with it, and engines that spend their time in Python, as they do
in front of a fast GPU, do not share an interpreter lock with the server and each other (1.4 times the tokens/s with one
engine of 64 rows, 1.9 times with two; on a CPU, where the time is spent in matrix products, there is no difference).
`Pool` belongs to the thread of the event loop, chooses the engine with the least to do, and bounds what waits. A worker
never outlives the server: where its pipe ends, it ends.
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
from dataclasses import asdict
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

from nanochat.common import UserError, init_runtime
from nanochat.data.chat import Delta
from nanochat.engine.engine import Engine
from nanochat.engine.generation import Event, Request, Token
from nanochat.engine.sampling import Sampling
from nanochat.model.load import load_model

logger = logging.getLogger(__name__)

CLOSE_SECONDS = 5.0  # after this, a worker that was asked to end is ended
MakeEngine = Callable[[], Engine]


# --- messages ------------------------------------------------------------------------------------


class Work(NamedTuple):
    """To a worker: answer each of `prompts` (token ids) `num_samples` times."""

    id: int
    prompts: list[list[int]]
    sampling: Sampling
    num_samples: int


class Cancel(NamedTuple):
    """To a worker: nobody waits for this work any more."""

    id: int


class Stop(NamedTuple):
    """To a worker: end."""


class Ready(NamedTuple):
    """From a worker: the model is loaded."""


class Piece(NamedTuple):
    """From a worker: what one step added to the reply `index` of a work (sample i of prompt p: p * num_samples + i).

    `tokens` are there only where log probabilities were asked for, `num_tokens` always.
    """

    work_id: int
    index: int
    deltas: Sequence[Delta]
    num_tokens: int
    tokens: Sequence[Token]
    num_cached: int  # tokens of the prompt that were in the cache already
    finish_reason: str | None


class Progress(NamedTuple):
    """From a worker: what a step brought, and the engine's counters after it."""

    pieces: list[Piece]
    stats: dict[str, int]


class Refused(NamedTuple):
    """From a worker: the engine does not take this work."""

    id: int
    message: str


class Failed(NamedTuple):
    """From a worker, or in its place when it died: it will do nothing more. `message` is for who started the server."""

    message: str


# --- in the worker -------------------------------------------------------------------------------


def run_worker(make_engine: MakeEngine, connection: Connection) -> None:
    """Build the engine and answer what comes through `connection` until it ends."""
    commands: queue.SimpleQueue = queue.SimpleQueue()
    reader = threading.Thread(target=_read_commands, args=(connection, commands), daemon=True)
    reader.start()
    try:
        engine = make_engine()
        connection.send(Ready())
        _EngineLoop(engine, connection.send).run(commands)
    except UserError as error:
        connection.send(Failed(str(error)))
    except (BrokenPipeError, ConnectionResetError):
        pass  # the server has gone
    except Exception as error:  # whatever it is, the server has to learn of it
        logger.exception("the engine failed")
        connection.send(Failed(f"{type(error).__name__} in the engine"))
    reader.join(CLOSE_SECONDS)  # the server answers `Failed` with `Stop`
    connection.close()


def _run_process(make_engine: MakeEngine, connection: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process: the server says when to end
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    run_worker(make_engine, connection)


def _read_commands(connection: Connection, commands: queue.SimpleQueue) -> None:
    """Empty the pipe at once, whatever the engine does, so that no sender ever waits for a step to end."""
    command: Any = None
    while not isinstance(command, Stop):
        try:
            command = connection.recv()
        except (EOFError, OSError):
            command = Stop()
        commands.put(command)


class _EngineLoop:
    """Steps the engine while it has work, and takes in commands between steps."""

    def __init__(self, engine: Engine, send: Callable[[Any], None]):
        self._engine, self._send = engine, send
        self._requests: dict[int, set[Request]] = {}  # by id of the work: its engine requests that go on
        self._origins: dict[Request, tuple[int, int]] = {}  # of those: id of the work, index of the first reply

    def run(self, commands: queue.SimpleQueue) -> None:
        while True:
            while not commands.empty() or not self._engine.has_work:
                command = commands.get()
                if isinstance(command, Stop):
                    return
                self._obey(command)
            events = self._engine.step()
            if events:
                self._send(Progress([self._piece(event) for event in events], self._stats()))
            for request in {event.request for event in events}:
                if request.is_done:
                    self._forget(request)

    def _obey(self, command: Work | Cancel) -> None:
        if isinstance(command, Cancel):
            self._cancel(command.id)
            self._send(Progress([], self._stats()))
            return
        work = command
        self._requests[work.id] = set()
        for number, prompt in enumerate(work.prompts):
            try:
                request = self._engine.submit(prompt, work.sampling, num_samples=work.num_samples)
            except UserError as error:
                self._cancel(work.id)
                self._send(Refused(work.id, str(error)))
                return
            self._requests[work.id].add(request)
            self._origins[request] = work.id, number * work.num_samples

    def _cancel(self, work_id: int) -> None:
        for request in self._requests.pop(work_id, ()):
            self._engine.cancel(request)
            del self._origins[request]

    def _forget(self, request: Request) -> None:
        work_id, _ = self._origins.pop(request)
        self._requests[work_id].remove(request)
        if not self._requests[work_id]:
            del self._requests[work_id]

    def _piece(self, event: Event) -> Piece:
        request = event.request
        work_id, first_index = self._origins[request]
        return Piece(
            work_id=work_id,
            index=first_index + event.index,
            deltas=event.deltas,
            num_tokens=len(event.tokens),
            tokens=event.tokens if request.sampling.num_logprobs is not None else (),
            num_cached=request.num_reused,
            finish_reason=event.finish_reason,
        )

    def _stats(self) -> dict[str, int]:
        return asdict(self._engine.stats) | {"active": self._engine.num_active, "waiting": self._engine.num_waiting}


# --- in the server -------------------------------------------------------------------------------


class QueueFull(Exception):
    """As much waits already as may wait."""


class NotReady(Exception):
    """No engine can take work now: `state` is "loading", "failed" or "closing"."""

    def __init__(self, state: str):
        super().__init__(state)
        self.state = state


class WorkerLost(Exception):
    """The engine failed while it did this work."""


class ClientGone(Exception):
    """Nobody waits for this work any more."""


class Job:
    """Work handed to a worker, and what has come of it. Times are of `time.perf_counter`, None before a token."""

    def __init__(self, work: Work, worker: "Worker"):
        self.work, self.worker = work, worker
        self.num_replies = self.num_unfinished = len(work.prompts) * work.num_samples
        self.num_cached = 0
        self.is_cancelled = False
        self.started = time.perf_counter()
        self.first_token_time: float | None = None
        self.last_token_time: float | None = None
        self._pieces: list[Piece] = []
        self._failure: Exception | None = None
        self._news = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self._failure is not None or not self.num_unfinished

    async def next_pieces(self) -> list[Piece]:
        """What came since the last call, as soon as there is something; [] when every reply is finished.

        Raises `WorkerLost`, `ClientGone`, or `UserError` where the engine refuses the work.
        """
        while not self._pieces and not self.is_over:
            self._news.clear()
            await self._news.wait()
        pieces, self._pieces = self._pieces, []
        if not pieces and self._failure is not None:
            raise self._failure
        return pieces

    def add(self, piece: Piece) -> None:
        if piece.num_tokens:
            self.last_token_time = time.perf_counter()
            self.first_token_time = self.first_token_time or self.last_token_time
        self.num_cached = max(self.num_cached, piece.num_cached)
        self.num_unfinished -= piece.finish_reason is not None
        self._pieces.append(piece)
        self._news.set()

    def fail(self, error: Exception) -> None:
        self._failure = error
        self._news.set()


class Worker:
    """One engine's process (or thread) as seen from the server, with two threads that talk to it."""

    def __init__(self, make_engine: MakeEngine, *, in_thread: bool):
        self.make_engine = make_engine
        self.state, self.message = "loading", ""
        self.jobs: dict[int, Job] = {}
        self.stats: dict[str, int] = {}
        self._outbox: queue.SimpleQueue = queue.SimpleQueue()
        self.pipe, theirs = multiprocessing.Pipe()
        context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
        self._theirs = None if in_thread else theirs
        start = threading.Thread if in_thread else context.Process
        target = run_worker if in_thread else _run_process
        self.runner = start(target=target, args=(make_engine, theirs), name="engine", daemon=True)

    @property
    def num_replies(self) -> int:
        """Replies it has been asked for and has not finished."""
        return sum(job.num_unfinished for job in self.jobs.values())

    def start(self, on_message: Callable[[Any], None]) -> None:
        """`on_message` is called in a thread of its own, at last with `Failed`."""
        self.runner.start()
        if self._theirs is not None:
            self._theirs.close()  # the other process has it: so its death ends the pipe
        threading.Thread(target=self._send_all, daemon=True).start()
        threading.Thread(target=self._receive_all, args=(on_message,), daemon=True).start()

    def send(self, command: Work | Cancel | Stop) -> None:
        """Never waits."""
        self._outbox.put(command)

    def _send_all(self) -> None:
        command: Any = None
        while not isinstance(command, Stop):
            command = self._outbox.get()
            try:
                self.pipe.send(command)
            except OSError:  # it died; `_receive_all` tells
                return

    def _receive_all(self, on_message: Callable[[Any], None]) -> None:
        message: Any = None
        while not isinstance(message, Failed):
            try:
                message = self.pipe.recv()
            except (EOFError, OSError):
                message = Failed("the engine's process ended")
            try:
                on_message(message)
            except RuntimeError:  # the event loop is closed: nobody is interested
                break
        self.send(Stop())  # ends the thread that sends, and the one that reads on the other side

    def join(self, seconds: float) -> None:
        self.runner.join(seconds)
        if not isinstance(self.runner, threading.Thread) and self.runner.is_alive():
            self.runner.kill()
            self.runner.join()


class Pool:
    """Workers, one for each of `make_engines`. Everything but the constructor in the event loop's thread.

    `max_rows` replies are written at a time in each worker, `max_queue` more may wait. A worker that dies while it
    answers is started again; one that cannot load stays down, and when none is left `on_failure(message)` is called.
    With `in_threads` the engines are threads of this process, for tests.
    """

    def __init__(
        self,
        make_engines: Sequence[MakeEngine],
        *,
        max_rows: int,
        max_queue: int,
        in_threads: bool = False,
        on_failure: Callable[[str], None] | None = None,
    ):
        assert make_engines
        assert max_rows > 0, max_rows
        assert max_queue >= 0, max_queue
        self.capacity = len(make_engines) * max_rows + max_queue
        self._max_rows = max_rows
        self._new_worker = partial(Worker, in_thread=in_threads)
        self._workers = [self._new_worker(make_engine) for make_engine in make_engines]
        self._on_failure = on_failure
        self._num_works = 0
        self._is_closing = False

    async def start(self) -> None:
        """Begin to load the models; `state` says how far that is."""
        for worker in self._workers:
            self._start(worker)

    def _start(self, worker: Worker) -> None:
        loop = asyncio.get_running_loop()
        worker.start(lambda message: loop.call_soon_threadsafe(self._on_message, worker, message))

    async def close(self) -> None:
        """End all workers; what they had to do fails."""
        self._is_closing = True
        for worker in self._workers:
            self._fail_jobs(worker, WorkerLost("the server is shutting down"))
            worker.send(Stop())
        await asyncio.gather(*(asyncio.to_thread(worker.join, CLOSE_SECONDS) for worker in self._workers))

    @property
    def state(self) -> str:
        """ "ok": a worker can take work; "loading": none can yet; "failed": none ever will."""
        states = {worker.state for worker in self._workers}
        return "ok" if "ready" in states else "loading" if "loading" in states else "failed"

    @property
    def workers(self) -> list[tuple[str, dict[str, int]]]:
        """State and engine counters of each worker."""
        return [(worker.state, worker.stats) for worker in self._workers]

    @property
    def num_replies(self) -> int:
        """Replies asked for and not finished."""
        return sum(worker.num_replies for worker in self._workers)

    @property
    def num_active(self) -> int:
        """Of these, those that are being written."""
        return sum(min(worker.num_replies, self._max_rows) for worker in self._workers)

    def check_room(self, num_replies: int) -> None:
        """Raises `NotReady` or `QueueFull` when that many replies cannot be taken on now."""
        if self.state != "ok" or self._is_closing:
            raise NotReady("closing" if self._is_closing else self.state)
        if self.num_replies + num_replies > self.capacity:
            raise QueueFull

    def submit(self, prompts: list[list[int]], sampling: Sampling, *, num_samples: int = 1) -> Job:
        """Have `prompts` answered `num_samples` times each. Raises as `check_room`."""
        self.check_room(len(prompts) * num_samples)
        worker = min((w for w in self._workers if w.state == "ready"), key=lambda w: w.num_replies)
        self._num_works += 1
        work = Work(self._num_works, prompts, sampling, num_samples)
        job = worker.jobs[work.id] = Job(work, worker)
        worker.send(work)
        return job

    def cancel(self, job: Job) -> None:
        """Free what a job holds; nothing for one that is over."""
        if not job.is_over:
            job.is_cancelled = True
            job.fail(ClientGone())
            del job.worker.jobs[job.work.id]
            job.worker.send(Cancel(job.work.id))

    # --- what workers say ---

    def _on_message(self, worker: Worker, message: Any) -> None:
        if isinstance(message, Progress):
            worker.stats = message.stats
            for piece in message.pieces:
                job = worker.jobs.get(piece.work_id)  # None: cancelled meanwhile
                if job is not None:
                    job.add(piece)
                    if job.is_over:
                        del worker.jobs[piece.work_id]
        elif isinstance(message, Ready):
            worker.state = "ready"
        elif isinstance(message, Refused):
            job = worker.jobs.pop(message.id, None)
            if job is not None:
                job.fail(UserError(message.message))
        elif not self._is_closing:
            self._on_worker_failed(worker, message.message)

    def _on_worker_failed(self, worker: Worker, message: str) -> None:
        was_ready = worker.state == "ready"
        worker.state, worker.message = "failed", message
        self._fail_jobs(worker, WorkerLost("the engine failed"))
        if was_ready:
            logger.error("a worker failed (%s): starting it again", message)
            place = self._workers.index(worker)
            self._workers[place] = self._new_worker(worker.make_engine)
            self._start(self._workers[place])
        elif self.state == "failed" and self._on_failure is not None:
            self._on_failure(message)

    @staticmethod
    def _fail_jobs(worker: Worker, error: Exception) -> None:
        for job in worker.jobs.values():
            job.fail(error)
        worker.jobs.clear()


# --- engines -------------------------------------------------------------------------------------


def load_engine(
    gpu: int | None,
    *,
    source: str,
    model_tag: str,
    step: int,
    device_type: str,
    dtype: str,
    weights: str,
    max_rows: int,
) -> Engine:
    """An engine for a checkpoint, on the GPU of that number where there are several; to be called in its process."""
    if gpu is not None:
        os.environ["LOCAL_RANK"] = str(gpu)
    loaded = load_model(source, init_runtime(device_type, dtype), model_tag=model_tag, step=step)
    return Engine(loaded.model, loaded.tokenizer, max_rows=max_rows, weights=weights)
