"""Shared by the server's benchmark and soak test: scripts/chat_web.py on a model with random weights, and a client.

A random model writes random tokens until its limit, as fast as a trained one.
"""

import asyncio
import json
import os
import re
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dev.roofline import ARCHITECTURES
from nanochat.checkpoint import run_dir, save_checkpoint
from nanochat.common import Runtime
from nanochat.model.gpt import build_model
from nanochat.tokenizer import NUM_BYTES, SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
TAG = "random"


@dataclass(frozen=True)
class Server:
    port: int
    process: subprocess.Popen
    started: float  # `time.perf_counter`

    def get(self, path: str) -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=60) as response:
            return response.read().decode()


@contextmanager
def random_server(
    depth: int, *flags: str, vocab_size: int, sequence_len: int, architecture: str = "recipe"
) -> Iterator[Server]:
    """A running server with its model loaded; `flags` are passed on to chat_web. Until the end its checkpoint is the
    newest in the base folder."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NANOCHAT_BASE_DIR"] = folder
        _write_checkpoint(depth, vocab_size, sequence_len, architecture)
        command = [sys.executable, "-m", "scripts.chat_web", "--model-tag", TAG, "--port", "0"]
        command += ["--access-log", str(Path(folder, "access.log")), *flags]
        started = time.perf_counter()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        try:
            ready = (re.search(r"ready at http://127\.0\.0\.1:(\d+)", line) for line in process.stdout)
            if not (address := next(filter(None, ready), None)):
                raise RuntimeError("the server did not load its model")
            yield Server(int(address[1]), process, started)
        finally:
            process.terminate()
            process.wait(60)


def _write_checkpoint(depth: int, vocab_size: int, sequence_len: int, architecture: str) -> None:
    """Save an untrained model with a random head, since the initial one would make all tokens equally likely."""
    num_pairs = vocab_size - NUM_BYTES - len(SPECIAL_TOKENS)
    pairs = [bytes(((ord("a") + i // NUM_BYTES) % NUM_BYTES, i % NUM_BYTES)) for i in range(num_pairs)]
    tokenizer = Tokenizer([bytes((i,)) for i in range(NUM_BYTES)] + pairs, SPLIT_PATTERN)
    config = ARCHITECTURES[architecture](depth, vocab_size=tokenizer.vocab_size, sequence_len=sequence_len)
    generator = torch.Generator().manual_seed(0)
    model = build_model(config, generator=generator)
    with torch.no_grad():
        model.lm_head.weight.normal_(std=0.1, generator=generator)
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)
    save_checkpoint(run_dir("sft", TAG), 1, runtime=runtime, model=model, tokenizer=tokenizer, meta={"args": {}})


# --- a client ------------------------------------------------------------------------------------


@dataclass
class Answer:
    """A streamed reply; `times` (`time.perf_counter`) are when text arrived."""

    started: float
    status: int = 0
    times: list[float] = field(default_factory=list)
    text: str = ""
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    is_complete: bool = False


async def ask(port: int, body: dict[str, Any]) -> Answer:
    """A streamed chat request with minimal overhead, since client and server share a machine."""
    answer = Answer(time.perf_counter())
    raw = json.dumps(body | {"stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(request_head(CHAT, len(raw)) + raw)
        answer.status = int((await reader.readline()).split()[1])
        async for line in reader:
            if line == b"data: [DONE]\n":
                answer.is_complete = True
            elif line.startswith(b"data: "):
                _take_in(answer, json.loads(line[6:]))
    finally:
        writer.close()
    return answer


def request_head(path: str, length: int) -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-type: application/json\r\n"
        f"content-length: {length}\r\n\r\n"
    ).encode()


def _take_in(answer: Answer, event: dict[str, Any]) -> None:
    if event.get("usage"):
        answer.num_tokens = event["usage"]["completion_tokens"]
        answer.num_prompt_tokens = event["usage"]["prompt_tokens"]
    for choice in event.get("choices", ()):
        delta = choice["delta"]
        if delta.get("content") or "nanochat" in delta:
            answer.times.append(time.perf_counter())
            answer.text += delta.get("content", "")


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest value that is at least as large as this share of all values; NaN if there are none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")
