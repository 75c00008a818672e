"""`scripts.chat_web` as a process: flags that make no sense, and a whole life from loading to a gentle end."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from live_server import KEY, ask, events, question

from nanochat.checkpoint import load_tensors, run_dir, save_checkpoint
from nanochat.common import Runtime, UserError
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.serve.api import PAGE_PATH
from nanochat.serve.middleware import read_page
from scripts.chat_web import main, parse_args

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent
CHAT = "/v1/chat/completions"
TIMEOUT_SECONDS = 120  # a start takes 8 seconds on an idle machine, many times that on a crowded one


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    """A base folder with a model that has learnt nothing."""
    folder = tmp_path_factory.mktemp("base")
    config = GPTConfig.from_depth(2, vocab_size=tokenizer.vocab_size, sequence_len=128, head_dim=32)
    model = build_model(config, generator=torch.Generator().manual_seed(0))
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        run = run_dir("sft", "tiny")
        meta = {"args": {}, "examples": ["one", "two", 3, "three", "four", "five"]}
        save_checkpoint(run, 7, runtime=runtime, model=model, tokenizer=tokenizer, meta=meta)
    return folder


def start(base: Path, *flags: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "scripts.chat_web", "--port", "0", "--dtype", "float32", *flags]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(base), "OMP_NUM_THREADS": "1", **environment}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)


def test_the_server_loads_answers_and_ends_when_its_answers_have_ended(base):
    process = start(base, "--access-log", "-", NANOCHAT_API_KEY=KEY)
    try:
        assert process.stdout.readline() == "loading nanochat-tiny (sft, step 7) ...\n"
        line = process.stdout.readline()
        pattern = r"nanochat-tiny \(sft, step 7\) is ready at http://127\.0\.0\.1:(\d+), Ctrl-C stops\n"
        port = int(re.fullmatch(pattern, line)[1])
        assert ask(port, "/health").status == 200
        assert ask(port, "/").text == read_page(PAGE_PATH)
        assert ask(port, CHAT, question("hello")).status == 401
        key = {"authorization": f"Bearer {KEY}"}
        [card] = ask(port, "/v1/models", headers=key).json["data"]
        assert (card["id"], card["nanochat"]["context"]) == ("nanochat-tiny", 128)
        assert (card["nanochat"]["stage"], card["nanochat"]["step"]) == ("sft", 7)
        assert card["nanochat"]["examples"] == ["one", "two", "three", "four"]
        [weights] = base.rglob("model.safetensors")
        assert card["nanochat"]["parameters"] == sum(tensor.numel() for tensor in load_tensors(weights).values())
        streamed = ask(port, CHAT, question("hello", stream=True, max_tokens=60, seed=1), headers=key)
        assert events(streamed.text)[-1] == "[DONE]"
        process.send_signal(signal.SIGTERM)
        log, messages = process.communicate(timeout=TIMEOUT_SECONDS)
    finally:
        process.kill()
    assert (process.returncode, messages) == (0, "")
    last = json.loads(log.splitlines()[-1])
    assert (last["route"], last["status"], last["stream"]) == (CHAT, 200, True)
    assert "hello" not in log
    assert KEY not in log


def test_an_engine_that_cannot_load_ends_the_server_with_its_message(base, tmp_path):
    broken = shutil.copytree(base, tmp_path / "broken")
    [weights] = broken.rglob("model.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    process = start(broken)
    log, messages = process.communicate(timeout=TIMEOUT_SECONDS)
    assert (process.returncode, log) == (2, "loading nanochat-tiny (sft, step 7) ...\n")
    assert re.fullmatch(r"error: .*model\.safetensors.*\n", messages)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--host 0.0.0.0", "NANOCHAT_API_KEY"), ("--host 0.0.0.0 --api-key short", "at least 8 characters"),
        ("--api-key long-enough --no-api-key", "choose one"), ("--max-queue -1", "--max-queue"),
        ("--max-rows 0", "--max-rows"), ("--port 70000", "at most 65535, not 70000"), ("--log-texts", "--access-log"),
        ("--host 192.0.2.1 --no-api-key", "192.0.2.1: it is no address of this machine"), ("--model-tag no", "no"),
        ("--num-gpus 99", "--num-gpus 99"), ("--access-log /nowhere/at/all", "/nowhere/at/all"),
    ],
)  # fmt: skip
def test_flags_that_make_no_sense_are_user_errors(base, monkeypatch, flags, message):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setattr(sys, "argv", ["chat_web", *flags.split()])
    with pytest.raises(UserError, match=message):
        main(parse_args())


def test_a_port_in_use_is_named_with_the_next_free_one(base, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    with socket.create_server(("127.0.0.1", 0)) as first:
        port = first.getsockname()[1]
        monkeypatch.setattr(sys, "argv", ["chat_web", "--port", str(port)])
        with pytest.raises(UserError) as caught:
            main(parse_args())
    free = re.fullmatch(rf"port {port} is used by another program; --port (\d+) is free", str(caught.value))
    assert port < int(free[1]) < port + 100
