"""Chat with a model in the terminal, or ask it a single question.

Reads a checkpoint. In a terminal: a conversation with line editing, a history (in `chat_history` in the base folder)
and commands, which /help lists. With --prompt, or when standard input is not a terminal (it is then read whole): prints
the answer and nothing else.

    python -m scripts.chat_cli --device-type cpu --weights int8 --stats        # a CPU
    python -m scripts.chat_cli                                                 # one GPU
    echo "Why is the sky blue?" | python -m scripts.chat_cli --temperature 0   # one question; more GPUs do not help
"""

import argparse
import signal
import sys
from dataclasses import fields

from nanochat.checkpoint import add_checkpoint_flags
from nanochat.common import Runtime, base_dir, init_runtime, run_main
from nanochat.engine.engine import Engine
from nanochat.engine.inference import add_weights_flag
from nanochat.engine.sampling import CHAT_TEMPERATURE, CHAT_TOP_K, Sampling
from nanochat.flags import Parser, add_runtime_flags
from nanochat.model.load import LoadedModel, load_model
from nanochat.serve.terminal import COMMANDS, INTERRUPTED, Screen, TerminalChat, single_prompt


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser, source="")
    add = parser.add_argument_group("conversation").add_argument
    add("-p", "--prompt", help="ask this, print the answer and exit (default: a conversation)")
    add("--system", default="", help="system message, which precedes the conversation (default: none)")
    # each of these has the name of a field of `Sampling`
    add = parser.add_argument_group("sampling").add_argument
    add("--temperature", type=float, default=CHAT_TEMPERATURE, help="randomness of the answer, 0 for greedy")
    add("--top-k", type=int, default=CHAT_TOP_K, help="sample from this many of the likeliest tokens only, 0 for all")
    add("--max-tokens", type=int, default=256, help="longest answer in tokens")
    add("--seed", type=int, help="random seed (default: a new one each time)")
    add = parser.add_argument_group("output").add_argument
    add("--stats", action="store_true", help="show tokens per second and context use after each answer")
    add_weights_flag(parser)
    add_runtime_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # runtime
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a model writes characters that not every terminal has
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends the program without a traceback
    sampling = Sampling(**{field.name: getattr(args, field.name) for field in fields(Sampling) if field.name in args})
    prompt = single_prompt(args.prompt, sys.stdin)
    runtime = init_runtime(args.device_type, args.dtype)

    # model
    loaded = load_model(args.source, runtime, model_tag=args.model_tag, step=args.step)
    engine = Engine(loaded.model, loaded.tokenizer, max_rows=1, weights=args.weights)
    screen = Screen(sys.stdout, sys.stderr)
    options = {"sampling": sampling, "system": args.system, "show_stats": args.stats}

    # one question
    if prompt is not None:
        chat = TerminalChat(engine, loaded.tokenizer, screen, is_dialogue=False, **options)
        if chat.ask(prompt) == INTERRUPTED:
            raise KeyboardInterrupt
        return

    # conversation
    from nanochat.serve.console import LineReader, MarkdownScreen

    if screen.is_styled:
        screen = MarkdownScreen(sys.stdout, sys.stderr)
    screen.notice(describe(loaded, runtime, args.weights))
    screen.notice("/help lists the commands, Ctrl-C stops an answer, Ctrl-D leaves")
    if examples := loaded.meta.get("examples"):
        screen.notice("try: " + " | ".join(map(str, examples)))
    name = f"nanochat-{loaded.folder.parent.name}"
    with LineReader(base_dir() / "chat_history", list(COMMANDS)) as reader:
        TerminalChat(engine, loaded.tokenizer, screen, name=name, **options).run(reader.read)


def describe(loaded: LoadedModel, runtime: Runtime, weights: str) -> str:
    """One line about the model."""
    run, context = loaded.folder.parent, loaded.model.config.sequence_len
    name = f"{loaded.source} {run.name} step {loaded.meta['step']}"
    size = f"{loaded.model.parameter_counts()['total'] / 1e6:,.1f}M parameters, context of {context:,} tokens"
    return f"{name}: {size}, {weights or runtime.dtype_name} on {runtime.device.type}"


if __name__ == "__main__":
    run_main(main, parse_args)
