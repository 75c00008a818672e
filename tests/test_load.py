"""The real engine behind the server, with many clients at once. The long version is dev/soak_server.py."""

import asyncio
import json
import random
import statistics
import threading
import time
from contextlib import suppress
from functools import partial

import httpx
import pytest
from conftest import WORDS, random_model
from live_server import ask, live_server, question, wait_until

from nanochat.data.chat import render_for_completion
from nanochat.engine.engine import Engine
from nanochat.engine.sampling import Sampling
from nanochat.model.gpt import GPTConfig

CHAT = "/v1/chat/completions"
CONTEXT = 256
NUM_CLIENTS = 64
MAX_ROWS = 8
MAX_TOKENS = 24


@pytest.fixture(scope="module")
def model(tokenizer):
    config = GPTConfig.from_depth(2, vocab_size=tokenizer.vocab_size, sequence_len=CONTEXT, head_dim=32)
    return random_model(config)


@pytest.fixture(scope="module")
def server(model, tokenizer, tmp_path_factory):
    page = tmp_path_factory.mktemp("page") / "ui.html"
    engines = [partial(Engine, model, tokenizer, max_rows=MAX_ROWS)] * 2
    options = {"max_rows": MAX_ROWS, "max_queue": 2 * NUM_CLIENTS, "context_len": CONTEXT}
    with live_server(tokenizer, page, make_engines=engines, **options) as server:
        yield server


def ragged_questions(number: int) -> list[str]:
    rng = random.Random(1)
    texts = [" ".join(rng.choices(WORDS, k=rng.choice((1, 3, 10, 40)))) for _ in range(number)]
    return [f"{i} {text}" for i, text in enumerate(texts)]


def client_of(server) -> httpx.AsyncClient:
    limits = httpx.Limits(max_connections=None)
    return httpx.AsyncClient(base_url=server.url, timeout=120, limits=limits)


async def answers_of(server, bodies: list[dict]) -> list[dict]:
    """The answers to all requests, asked at once."""
    async with client_of(server) as client:
        responses = await asyncio.gather(*(client.post(CHAT, json=body) for body in bodies))
    assert {response.status_code for response in responses} == {200}
    return [response.json() for response in responses]


def test_each_of_many_answers_equals_its_answer_alone(server, model, tokenizer):
    questions = ragged_questions(NUM_CLIENTS)
    bodies = [question(text, temperature=0, max_tokens=MAX_TOKENS) for text in questions]
    answers = asyncio.run(answers_of(server, bodies))
    alone = Engine(model, tokenizer, max_rows=1)
    for body, answer in zip(bodies, answers, strict=True):
        prompt = render_for_completion(tokenizer, body, max_tokens=CONTEXT - MAX_TOKENS).ids
        [[expected]] = alone.generate([prompt], Sampling(max_tokens=MAX_TOKENS, temperature=0))
        [choice] = answer["choices"]
        assert choice["message"]["nanochat"]["parts"] == expected.parts
        assert choice["finish_reason"] == expected.finish_reason
        assert answer["usage"]["prompt_tokens"] == len(prompt)
    lengths = [answer["usage"]["completion_tokens"] for answer in answers]
    assert statistics.mean(lengths) > MAX_TOKENS / 2  # else there was little that could have gone wrong
    assert server.pool.num_replies == 0


def test_a_seed_gives_the_same_answer_alone_and_among_many(server):
    fixed = question("river stone", seed=5, max_tokens=MAX_TOKENS)
    others = [question(text, max_tokens=MAX_TOKENS) for text in ragged_questions(15)]
    first, *_ = asyncio.run(answers_of(server, [fixed]))
    among = asyncio.run(answers_of(server, [*others, fixed]))[-1]
    assert among["choices"][0]["message"] == first["choices"][0]["message"]


def test_who_comes_while_others_are_answered_gets_a_token_before_they_end(server):
    body = {"temperature": 1, "max_tokens": 200, "stream": True, "seed": 1}

    async def read(client, text, delay):
        await asyncio.sleep(delay)
        times = []
        async with client.stream("POST", CHAT, json=question(text, **body)) as response:
            async for line in response.aiter_lines():
                if '"content":' in line and '"role"' not in line:
                    times.append(time.perf_counter())
        return times

    async def main():
        async with client_of(server) as client:
            early = [read(client, f"early {i}", 0) for i in range(6)]
            return await asyncio.gather(*early, read(client, "late", 0.05))

    *early, late = asyncio.run(main())
    assert max(times[-1] for times in early if times) > late[0]


def test_the_next_turn_finds_the_conversation_in_the_cache(server):
    turns = question("tell me about the river and the stone and the garden", temperature=0, max_tokens=8)
    first = ask(server.port, CHAT, turns).json
    turns["messages"] += [first["choices"][0]["message"], {"role": "user", "content": "go on"}]
    second = ask(server.port, CHAT, turns).json
    assert second["usage"]["prompt_tokens_details"]["cached_tokens"] >= first["usage"]["prompt_tokens"] - 1


def test_clients_that_leave_at_any_moment_free_their_rows_and_disturb_nobody(server):
    rng = random.Random(2)
    fixed = question("garden engine", temperature=0, max_tokens=MAX_TOKENS)
    expected = ask(server.port, CHAT, fixed).json["choices"]

    async def leave_early(client, number):
        with suppress(TimeoutError):
            async with asyncio.timeout(rng.random() * 0.2):
                body = question(f"count {number} " + "stone " * rng.randrange(60), max_tokens=150)
                async with client.stream("POST", CHAT, json=body | {"stream": number % 2 == 0}) as response:
                    await response.aread()

    async def main():
        async with client_of(server) as client:
            stayed = client.post(CHAT, json=fixed)
            left = [leave_early(client, number) for number in range(60)]
            return (await asyncio.gather(stayed, *left))[0]

    answer = asyncio.run(main())
    assert answer.json()["choices"] == expected
    wait_until(lambda: server.pool.num_replies == 0)
    wait_until(lambda: all(w.stats["active"] == w.stats["waiting"] == 0 for w in server.pool.workers))


def test_health_answers_while_all_rows_are_busy(server):
    """A wide margin, as tests share their machine; dev/soak_server.py has the figures."""
    done = threading.Event()
    bodies = [question(text, max_tokens=100) for text in ragged_questions(32)]
    thread = threading.Thread(target=lambda: (asyncio.run(answers_of(server, bodies)), done.set()))
    thread.start()
    seconds = []
    while not done.is_set():
        start = time.perf_counter()
        assert ask(server.port, "/health").json["status"] == "ok"
        seconds.append(time.perf_counter() - start)
    thread.join()
    assert statistics.median(seconds) < 0.25
    assert json.loads(ask(server.port, "/health").text)["active"] == 0
