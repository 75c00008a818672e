"""The pool of engines, with threads and with processes. A process has to find its engine by name: `build_fake`."""

import asyncio
import multiprocessing
import os
import queue
import signal
import socket
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest
from fake_engine import FakeEngine

from nanochat.common import UserError
from nanochat.engine.sampling import Sampling
from nanochat.serve.errors import ApiError, ClientGone
from nanochat.serve.worker import Failed, Job, Pool, Work, Worker
from nanochat.tokenizer import Tokenizer

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend():
    return "asyncio"


def build_fake(folder: Path, **options) -> FakeEngine:
    return FakeEngine(Tokenizer.load(folder), **options)


def fail_to_load():
    raise UserError("the weights are damaged")


async def wait_until(condition, seconds=30.0):
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.005)


async def read_all(job: Job) -> list[str]:
    """The texts of a job's replies, which are also what its news add up to."""
    texts = [""] * len(job.replies)
    while news := await job.next_news():
        for index, reply in news.items():
            texts[index] += "".join(delta.text for delta in reply.deltas)
    assert texts == ["".join(delta.text for delta in reply.deltas) for reply in job.replies]
    return texts


async def failure_of(job: Job) -> str | None:
    """The code of the error that ends a job."""
    with pytest.raises(ApiError) as caught:
        await read_all(job)
    return caught.value.code


def refusal_of(pool: Pool, num_samples: int = 1) -> str | None:
    """The code of the error with which a pool refuses work."""
    with pytest.raises(ApiError) as caught:
        pool.submit([[1]], Sampling(), num_samples=num_samples)
    return caught.value.code


def all_ready(pool: Pool) -> bool:
    return all(worker.state == "ready" for worker in pool.workers)


@asynccontextmanager
async def running(tokenizer, *, num_workers=1, max_queue=4, **options):
    """A pool of fake engines with two rows, in threads; and a function that submits texts to it."""
    engine = partial(FakeEngine, tokenizer, max_rows=2, **options)
    pool = Pool([engine] * num_workers, max_rows=2, max_queue=max_queue, in_threads=True)
    await pool.start()
    try:
        await wait_until(lambda: all_ready(pool))
        yield pool, lambda *texts, **more: pool.submit([tokenizer.encode(text) for text in texts], Sampling(), **more)
    finally:
        await pool.close()


async def test_replies_come_in_pieces_and_end(tokenizer):
    async with running(tokenizer) as (pool, ask):
        job = ask("count 9")
        assert pool.num_replies == 1
        assert await read_all(job) == ["1 2 3 4 5 6 7 8 9"]
        assert job.is_over
        assert (pool.num_replies, job.num_cached) == (0, 1)
        assert job.started <= job.first_token_time < job.last_token_time
        assert await job.next_news() == {}
        assert await read_all(ask("river", "stone", num_samples=2)) == ["river"] * 2 + ["stone"] * 2


async def test_the_queue_is_bounded_and_a_cancelled_job_makes_room(tokenizer):
    async with running(tokenizer, max_queue=1, step_seconds=0.01) as (pool, ask):
        assert refusal_of(pool, 4) == "queue_full"
        jobs = [ask("count 60") for _ in range(3)]
        assert refusal_of(pool) == "queue_full"
        assert (pool.num_active, pool.num_replies) == (2, 3)
        pool.cancel(jobs[0])
        pool.cancel(jobs[0])  # a second time changes nothing
        with pytest.raises(ClientGone):
            await read_all(jobs[0])
        assert await read_all(ask("hello")) == ["hello"]
        for job in jobs:
            pool.cancel(job)
        assert pool.num_replies == 0
        await wait_until(lambda: pool.workers[0].stats["active"] == 0)


async def test_work_goes_to_the_engine_with_the_least_to_do(tokenizer):
    async with running(tokenizer, num_workers=3, step_seconds=0.01) as (pool, ask):
        jobs = [ask("count 30") for _ in range(6)]
        assert sorted(jobs.count(job) for job in jobs) == [1] * 6
        assert [sum(job.worker is worker for job in jobs) for worker in pool.workers] == [2, 2, 2]
        assert len({text for job in jobs for text in await read_all(job)}) == 1


async def test_a_failed_engine_fails_its_jobs_only_and_is_started_again(tokenizer):
    async with running(tokenizer, num_workers=2, step_seconds=0.01) as (pool, ask):
        good, bad = ask("count 30"), ask("crash")
        assert good.worker is not bad.worker
        assert await failure_of(bad) == "worker_failed"
        assert pool.state == "ok"
        assert (await read_all(good))[0].endswith("30")
        await wait_until(lambda: all_ready(pool))


async def test_what_the_engine_refuses_is_a_user_error_and_leaves_nothing(tokenizer):
    async with running(tokenizer) as (pool, ask):
        with pytest.raises(ApiError, match="refuses"):
            await read_all(ask("hello", "refuse"))
        assert pool.num_replies == 0
        assert await read_all(ask("hello")) == ["hello"]


async def test_nothing_is_taken_before_the_model_is_loaded_or_when_it_cannot_be():
    failures = []
    pool = Pool([fail_to_load] * 2, max_rows=1, max_queue=1, in_threads=True, on_failure=failures.append)
    assert pool.state == "loading"
    assert refusal_of(pool) == "model_loading"
    await pool.start()
    await wait_until(lambda: pool.state == "failed")
    assert refusal_of(pool) == "worker_failed"
    assert failures == ["the weights are damaged"]  # told once, when no engine is left
    await pool.close()


async def test_close_fails_what_is_running(tokenizer):
    async with running(tokenizer, step_seconds=0.01) as (pool, ask):
        job = ask("count 60")
        await job.next_news()
    with pytest.raises(ApiError, match="shutting down"):
        await read_all(job)
    assert refusal_of(pool) == "shutting_down"


@pytest.mark.slow
def test_a_process_answers_and_ends_when_its_server_is_gone(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    messages: queue.SimpleQueue = queue.SimpleQueue()
    worker = Worker(partial(build_fake, tmp_path), lambda _, message: messages.put(message), in_thread=False)
    assert messages.get(timeout=120).pieces == []
    os.kill(worker.runner.pid, signal.SIGINT)  # Ctrl-C at the server's terminal: not for the worker to decide
    worker.send(Work(1, [tokenizer.encode("count 9")], Sampling(num_logprobs=1, stop=("7",)), 1))
    pieces = []
    while not pieces or pieces[-1].finish_reason is None:
        pieces += messages.get(timeout=60).pieces
    assert "".join(delta.text for piece in pieces for delta in piece.deltas) == "1 2 3 4 5 6 "
    assert pieces[0].tokens[0].logprob < 0
    with socket.socket(fileno=os.dup(worker.pipe.fileno())) as pipe:
        pipe.shutdown(socket.SHUT_WR)  # as if the server had been killed
    assert isinstance(messages.get(timeout=60), Failed)
    worker.join(60)
    assert worker.runner.exitcode == 0


@pytest.mark.slow
async def test_the_death_of_a_process_is_noticed_and_it_is_started_again(tokenizer, tmp_path):
    tokenizer.save(tmp_path)
    pool = Pool([partial(build_fake, tmp_path, step_seconds=0.01)], max_rows=2, max_queue=2)
    await pool.start()
    await wait_until(lambda: pool.state == "ok", seconds=120)
    job = pool.submit([tokenizer.encode("count 60")], Sampling())
    await job.next_news()
    [child] = multiprocessing.active_children()
    os.kill(child.pid, signal.SIGKILL)
    assert await failure_of(job) == "worker_failed"
    await wait_until(lambda: pool.state == "ok", seconds=120)
    assert await read_all(pool.submit([tokenizer.encode("hello")], Sampling())) == ["hello"]
    await pool.close()
    assert not multiprocessing.active_children()
