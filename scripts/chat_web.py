"""Serve a chat model: a page for the browser, and OpenAI's API for programs.

Reads a checkpoint; writes nothing but, with `--access-log`, one JSON line per request, without prompts and replies.
Listens on this machine only, unless told otherwise.

    python -m scripts.chat_web                                          # a CPU or one GPU: http://127.0.0.1:8000
    python -m scripts.chat_web --num-gpus 8 --max-rows 64               # a copy of the model on each of eight GPUs
    ssh -L 8000:127.0.0.1:8000 NODE                                     # from home, to a server on a rented node
    NANOCHAT_API_KEY=... python -m scripts.chat_web --host 0.0.0.0      # for others, who need the key
"""

import argparse
import errno
import logging
import os
import queue
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from logging.handlers import QueueHandler, QueueListener

import torch
import uvicorn

from nanochat.checkpoint import add_checkpoint_flags, find_checkpoint, load_tokenizer, read_meta, stage_of
from nanochat.common import UserError, choose_device, disk_errors, run_main
from nanochat.engine.inference import add_weights_flag
from nanochat.flags import Parser, add_runtime_flags
from nanochat.model.gpt import build_model
from nanochat.model.load import read_config
from nanochat.serve.api import create_app
from nanochat.serve.middleware import LOOPBACK_HOSTS, Settings, access_logger, is_loopback
from nanochat.serve.worker import Pool, load_engine

MAX_ROWS = {"cuda": 32, "mps": 8, "cpu": 8}  # where --max-rows is not given
KEY_VARIABLE = "NANOCHAT_API_KEY"
MAX_PORT = 65535
MAX_EXAMPLES = 4  # questions that the page offers


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser, source="")
    add = parser.add_argument_group("model").add_argument
    add("--model-name", default="", help="id by which clients know the model (default: nanochat-MODEL_TAG)")
    add = parser.add_argument_group("network").add_argument
    add("--host", default="127.0.0.1", help="address to listen on; 0.0.0.0 for all")
    add("--port", type=int, default=8000, help="port to listen on, 0 for any free one")
    add("--api-key", default="", help=f"key that clients must send (default, and better: the variable {KEY_VARIABLE})")
    add("--no-api-key", action="store_true", help="let everyone who can reach --host use the server")
    add("--allowed-host", action="append", default=[], help="host name by which the server may be called, such as a "
        "proxy's; may be repeated (default: localhost and its addresses if it listens there, else any)")  # fmt: skip
    add("--cors-origin", action="append", default=[], help="origin whose pages may use the server; may be repeated "
        "(default: none)")  # fmt: skip
    add = parser.add_argument_group("limits").add_argument
    add("--max-rows", type=int, help="replies generated at a time on each device (default: by device)")
    add("--max-queue", type=int, default=128, help="replies that may wait; more are refused with status 429")
    add("--max-tokens", type=int, default=0, help="most tokens of a reply that a request may ask for, 0: the context")
    add("--max-body-kib", type=int, default=1024, help="largest request in KiB")
    add("--drain-seconds", type=int, default=30, help="seconds for running replies to finish at shutdown")
    add = parser.add_argument_group("output").add_argument
    add("--access-log", default="", help='file for one JSON line per request, "-": standard output (default: none)')
    add("--log-texts", action="store_true", help="include prompts and replies in the access log")
    add = parser.add_argument_group("runtime").add_argument
    add("--num-gpus", type=int, default=1, help="number of GPUs, each with a copy of the model")
    add_weights_flag(parser)
    add_runtime_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # runtime
    api_key = check_flags(args)
    gpus = list(range(args.num_gpus)) if args.num_gpus > 1 else [None]
    device_type = choose_device(args.device_type).type
    if len(gpus) > 1 and (device_type != "cuda" or len(gpus) > torch.cuda.device_count()):
        raise UserError(f"--num-gpus {args.num_gpus}: this machine has {torch.cuda.device_count()} GPUs to use")
    max_rows = args.max_rows or MAX_ROWS[device_type]

    # inputs
    folder = find_checkpoint(args.source, model_tag=args.model_tag, step=args.step)
    meta = read_meta(folder)
    tokenizer = load_tokenizer(folder, meta)
    model_tag, stage = folder.parent.name, stage_of(folder)
    examples = [text for text in meta.get("examples") or [] if isinstance(text, str)][:MAX_EXAMPLES]

    # model: the workers load it while the page is already served
    checkpoint = {"source": stage, "model_tag": model_tag, "step": meta["step"]}
    runtime = {"device_type": args.device_type, "dtype": args.dtype}
    failures: list[str] = []

    def announce() -> None:
        print(f"{about} is ready at http://{address}, Ctrl-C stops", flush=True)

    def stop_server(message: str) -> None:
        failures.append(message)
        server.should_exit = True

    options = {"weights": args.weights, "max_rows": max_rows}
    loads = [partial(load_engine, gpu, checkpoint, runtime, **options) for gpu in gpus]
    pool = Pool(loads, max_rows=max_rows, max_queue=args.max_queue, on_ready=announce, on_failure=stop_server)

    # server
    settings = Settings(
        model_name=args.model_name or f"nanochat-{model_tag}", context_len=meta["config"]["sequence_len"],
        fingerprint=f"{stage}-{model_tag}-{meta['step']}", stage=stage, step=meta["step"], examples=tuple(examples),
        parameters=build_model(read_config(folder, meta), device="meta").parameter_counts()["total"],
        max_tokens=args.max_tokens, max_body_bytes=args.max_body_kib * 1024, api_key=api_key,
        cors_origins=tuple(args.cors_origin),
        allowed_hosts=(*(LOOPBACK_HOSTS if is_loopback(args.host) else ()), *map(str.lower, args.allowed_host)),
        log_texts=args.log_texts,
    )  # fmt: skip
    app = create_app(pool, tokenizer, settings)
    log_writer = open_access_log(args.access_log) if args.access_log else None
    listener = listen(args.host, args.port)
    address = f"{f'[{args.host}]' if ':' in args.host else args.host}:{listener.getsockname()[1]}"
    about = f"{settings.model_name} ({stage}, step {meta['step']})"
    print(f"loading {about} ...", flush=True)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # otherwise a line for anything sent that is not HTTP
    # uvicorn's own access log would contain whole paths
    options = {"log_config": None, "access_log": False, "server_header": False, "ws": "none"}
    server = Server(uvicorn.Config(app, timeout_graceful_shutdown=args.drain_seconds, **options))
    try:
        server.run(sockets=[listener])
    finally:
        if log_writer is not None:
            log_writer.stop()
    if failures:
        raise UserError(failures[0])


class Server(uvicorn.Server):
    """Exits with status 0 after a signal; uvicorn's own class raises the signal again after shutting down."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle_exit)
        yield


def check_flags(args: argparse.Namespace) -> str | None:
    """The API key, if one is to be required. Raises `UserError` for flags that make no sense."""
    limits = dict(num_gpus=1, port=0, max_rows=1, max_queue=0, max_tokens=0, max_body_kib=1, drain_seconds=0)
    for name, low in limits.items():
        value = getattr(args, name)
        if value is not None and value < low:
            raise UserError(f"--{name.replace('_', '-')} must be at least {low}, not {value}")
    if args.port > MAX_PORT:
        raise UserError(f"--port must be at most {MAX_PORT}, not {args.port}")
    if args.log_texts and not args.access_log:
        raise UserError("--log-texts adds texts to the access log; pass --access-log too")
    api_key = args.api_key or os.environ.get(KEY_VARIABLE, "")
    if api_key and args.no_api_key:
        raise UserError(f"both an API key (--api-key or {KEY_VARIABLE}) and --no-api-key are given; choose one")
    if not api_key and not args.no_api_key and not is_loopback(args.host):
        raise UserError(f"--host {args.host} lets other machines in: set a key in {KEY_VARIABLE} or pass --no-api-key")
    return api_key or None


def listen(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `UserError` with what to do where that is not possible."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            free = next((later for later in range(port + 1, MAX_PORT + 1) if is_free(family, host, later)), 0)
            raise UserError(f"port {port} is used by another program; --port {free} is free") from error
        if error.errno == errno.EACCES:
            raise UserError(f"port {port} is for administrators only; choose a --port from 1024 on") from error
        raise UserError(f"cannot listen on {host}: it is no address of this machine; choose another --host") from error


def is_free(family: int, host: str, port: int) -> bool:
    try:
        socket.create_server((host, port), family=family).close()
    except OSError:
        return False
    return True


def open_access_log(path: str) -> QueueListener:
    """A running thread that writes the log to `path`: a reader that stops reading, as `less` does, must not stop the
    server."""
    with disk_errors("the access log", path):
        handler = logging.StreamHandler(sys.stdout) if path == "-" else logging.FileHandler(path)
    lines: queue.SimpleQueue = queue.SimpleQueue()
    access_logger.addHandler(QueueHandler(lines))
    access_logger.setLevel(logging.INFO)
    access_logger.propagate = False
    writer = QueueListener(lines, handler)
    writer.start()
    return writer


if __name__ == "__main__":
    run_main(main, parse_args)
