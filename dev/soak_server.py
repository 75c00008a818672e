"""A thousand misbehaving clients next to some that behave: nothing may break, leak, or slow /health down.

    python dev/soak_server.py                                   # about 3 minutes on 2 cores

Starts scripts/chat_web.py on a random model. Clients disconnect while sending, before or during the reply, and send
broken, oversized and unfinished requests; in between, a fixed greedy question must always get the same answer, and
/health is polled every 20 ms. Exits with status 1 if a 5xx was seen, a row was not freed, an answer differed, or
/health took more than 100 ms at p99 or 1 s at most. Prints a table, then one JSON line.
"""

import argparse
import asyncio
import http.client
import json
import random
import sys
import threading
import time
from collections import Counter

from random_server import CHAT, Server, ask, percentile, random_server, request_head

from nanochat.common import run_main

HEALTH_PERIOD = 0.02
MAX_HEALTH_P99, MAX_HEALTH = 0.1, 1.0
FIXED = {"messages": [{"role": "user", "content": "a fixed question"}], "temperature": 0, "max_tokens": 16}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--clients", type=int, default=1000, help="in all")
    add("--at-once", type=int, default=48)
    add("--depth", type=int, default=4)
    add("--sequence-len", type=int, default=512)
    add("--vocab-size", type=int, default=8192)
    add("--max-rows", type=int, default=8)
    add("--seed", type=int, default=0)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    flags = ["--max-rows", str(args.max_rows), "--max-queue", "24", "--dtype", "float32"]
    with random_server(args.depth, *flags, vocab_size=args.vocab_size, sequence_len=args.sequence_len) as server:
        before = server_errors(server)  # /health while the model was loading
        kinds, statuses, health, fixed = asyncio.run(soak(args, server.port))
        is_free = wait_until_free(server)
        errors = sorted(set(server_errors(server)) - set(before))
    num_wrong = len(fixed) - fixed.count(fixed[0])
    p50, p99, most = percentile(health, 0.5), percentile(health, 0.99), max(health)
    print(f"clients    {dict(kinds)}\nstatuses   {dict(statuses)}")
    print(f"/health    {len(health)} times, p50 {p50 * 1e3:.1f} ms, p99 {p99 * 1e3:.1f} ms, most {most * 1e3:.1f} ms")
    print(f"rows free  {is_free}\n5xx        {errors or 'none'}\nfixed      {len(fixed)} answers, {num_wrong} differ")
    result = {"kinds": kinds, "statuses": statuses, "rows_free": is_free, "errors": errors, "num_wrong": num_wrong}
    health_result = {"num": len(health), "p50": p50, "p99": p99, "max": most}
    print(json.dumps({"settings": vars(args), **result, "health_seconds": health_result}))
    if errors or not is_free or num_wrong or p99 > MAX_HEALTH_P99 or most > MAX_HEALTH:
        sys.exit(1)


def server_errors(server: Server) -> list[str]:
    return [line for line in server.get("/metrics").splitlines() if "requests_total{" in line and 'status="5' in line]


def wait_until_free(server: Server) -> bool:
    """Whether server and engine report within five seconds that they are idle."""
    for _ in range(50):
        health = json.loads(server.get("/health"))
        replies = [line for line in server.get("/metrics").splitlines() if "engine_replies{" in line]
        busy = [line for line in replies if not line.endswith(" 0.0")]
        if health["active"] == health["waiting"] == 0 and not busy:
            return True
        time.sleep(0.1)
    return False


async def soak(args: argparse.Namespace, port: int) -> tuple[Counter, Counter, list[float], list[str]]:
    """Counts of client kinds and of statuses, seconds of each /health request, and the answers to the fixed question,
    the first of them from an idle server."""
    rng = random.Random(args.seed)
    kinds, statuses, health = Counter(), Counter(), []
    fixed = [(await ask(port, FIXED)).text]
    limit, done = asyncio.Semaphore(args.at_once), threading.Event()

    async def client() -> None:
        async with limit:
            kind = rng.choice(list(KINDS))
            kinds[kind] += 1
            status = await KINDS[kind](port, rng)
            statuses[status] += 1
            if rng.random() < 0.1:
                answer = await ask(port, FIXED)
                fixed.extend([answer.text] if answer.is_complete else [])

    watcher = asyncio.create_task(asyncio.to_thread(watch_health, port, health, done))
    await asyncio.gather(*(client() for _ in range(args.clients)))
    done.set()
    await watcher
    return kinds, statuses, health, fixed


def watch_health(port: int, seconds: list[float], done: threading.Event) -> None:
    """Poll /health. Run this in its own thread, so that busy clients in this process do not distort the times."""
    while not done.wait(HEALTH_PERIOD):
        start = time.perf_counter()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        connection.request("GET", "/health")
        response = connection.getresponse()
        assert response.status == 200, response.read()
        connection.close()
        seconds.append(time.perf_counter() - start)


# --- clients: each returns the status it got, 0 if it left before there was one -------------------


async def exchange(port: int, data: bytes, *, leave_after: float | None = None) -> int:
    """Send bytes and read the reply to its end, or disconnect after `leave_after` seconds. Returns the status."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    status = 0
    try:
        async with asyncio.timeout(60 if leave_after is None else leave_after):
            writer.write(data)
            await writer.drain()
            line = await reader.readline()
            status = int(line.split()[1]) if line else 0
            await reader.read()
    except (TimeoutError, ConnectionError):
        pass
    finally:
        writer.transport.abort() if leave_after is not None else writer.close()
    return status


def chat_request(rng: random.Random, *, stream: bool) -> bytes:
    text = "".join(rng.choices("abcdefgh ", k=rng.randrange(1, 500)))
    body = {"messages": [{"role": "user", "content": text}], "stream": stream, "n": rng.randrange(1, 3)}
    raw = json.dumps(body).encode()
    return request_head(CHAT, len(raw)) + raw


async def leaves_amid_stream(port: int, rng: random.Random) -> int:
    return await exchange(port, chat_request(rng, stream=True), leave_after=rng.random() ** 3 * 4)


async def leaves_before_answer(port: int, rng: random.Random) -> int:
    return await exchange(port, chat_request(rng, stream=False), leave_after=rng.random() ** 3 * 4)


async def leaves_amid_request(port: int, rng: random.Random) -> int:
    data = chat_request(rng, stream=True)
    return await exchange(port, data[: rng.randrange(len(data))], leave_after=rng.random() * 0.3)


async def sends_too_much(port: int, rng: random.Random) -> int:
    size = rng.randrange(1 << 20, 1 << 23)
    return await exchange(port, request_head(CHAT, size) + b"[" * size)


async def sends_bytes(port: int, rng: random.Random) -> int:
    raw = rng.randbytes(rng.randrange(2000))
    return await exchange(port, request_head(rng.choice((CHAT, "/v1/completions")), len(raw)) + raw)


async def sends_no_http(port: int, rng: random.Random) -> int:
    return await exchange(port, rng.randbytes(200) + b"\r\n\r\n")


async def sends_broken_json(port: int, rng: random.Random) -> int:
    _, _, raw = chat_request(rng, stream=True).partition(b"\r\n\r\n")
    place = rng.randrange(len(raw))
    broken = raw[:place] + rng.randbytes(3) + raw[place + rng.randrange(4) :]
    leave_after = 1.0  # sometimes the JSON is still valid
    return await exchange(port, request_head(CHAT, len(broken)) + broken, leave_after=leave_after)


async def sends_wrong_values(port: int, rng: random.Random) -> int:
    names = ("temperature", "n", "max_tokens", "messages", "stop", "seed", "top_k", "stream", "model", "logprobs")
    values = (None, -1, 1e308, 10**30, "x", [], {}, [[]], "\ud800", True, [None])
    body = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 4, rng.choice(names): rng.choice(values)}
    raw = json.dumps(body).encode()
    return await exchange(port, request_head(CHAT, len(raw)) + raw, leave_after=5.0)


KINDS = {
    kind.__name__: kind
    for kind in (
        leaves_amid_stream, leaves_before_answer, leaves_amid_request, sends_too_much, sends_bytes, sends_no_http,
        sends_broken_json, sends_wrong_values,
    )
}  # fmt: skip


if __name__ == "__main__":
    run_main(main, parse_args)
