"""A chat in a terminal: the conversation, the commands that steer it, and printing replies as they come.

`scripts/chat_cli.py` runs it. Importing this leaves the terminal alone. Not here: flags and loading a model (the
script), editing lines and rendering Markdown (`console.py`).
"""

import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from nanochat.common import UserError, write_atomic
from nanochat.data.chat import Delta, as_parts, check_conversation, prompt_limit, render_for_completion, visible_text
from nanochat.engine.engine import Engine
from nanochat.engine.sampling import Sampling
from nanochat.flags import did_you_mean
from nanochat.tokenizer import Tokenizer

INTERRUPTED = "interrupted"  # how an answer ended, besides the engine's "stop" and "length"
YOU = "You: "
DIM, CYAN, RED, GREEN, MAGENTA, PLAIN = "\x1b[2m", "\x1b[36m", "\x1b[31m", "\x1b[1;32m", "\x1b[1;35m", "\x1b[0m"

# A model can write any byte, and a terminal obeys some of them: those are replaced by visible characters.
_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_CONTROL_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


def printable(text: str) -> str:
    return text.translate(_CONTROL_PICTURES)


class Screen:
    """Where a chat writes: replies and the output of commands to `out`, everything else to `err`.

    A stream that is a terminal gets visible characters for control characters, and colours unless NO_COLOR is set
    (https://no-color.org) or the terminal calls itself dumb.
    """

    def __init__(self, out: TextIO, err: TextIO, *, environ: Mapping[str, str] = os.environ):
        self._out, self._err = out, err
        self._has_color = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"

    @property
    def is_styled(self) -> bool:
        """Whether replies go to a terminal with colours."""
        return self._has_color and self._out.isatty()

    def question(self, text: str) -> None:
        """A question of an earlier session, as if it were typed."""
        self._put(self._out, "\n")
        self._put(self._out, YOU, GREEN)
        self._put(self._out, text + "\n")

    def begin_reply(self, name: str) -> None:
        """Say that it is `name` who speaks from here on."""
        self._put(self._out, "\n")
        self._put(self._out, f"{name}: ", MAGENTA)

    def write(self, text: str, color: str = "") -> None:
        """More of a reply, at once."""
        self._put(self._out, text, color)

    def end_reply(self) -> None:
        self._put(self._out, "\n")

    def line(self, text: str) -> None:
        self._put(self._out, text + "\n")

    def notice(self, text: str) -> None:
        self._put(self._err, f"({text})\n", DIM)

    def error(self, text: str) -> None:
        self._put(self._err, f"error: {text}\n", RED)

    def _put(self, stream: TextIO, text: str, color: str = "") -> None:
        if stream.isatty():
            text = printable(text)
            if text and color and self._has_color:
                text = f"{color}{text}{PLAIN}"
        stream.write(text)
        stream.flush()


def print_reply(screen: Screen, deltas: Iterable[Delta], *, show_tools: bool = True) -> None:
    """Print the pieces of a reply as they come.

    A tool call and its result appear in brackets, `[python: 12*34 => 408]`; without `show_tools` only the words do.
    Where the model writes none, a space separates them from the words beside them.
    """
    openings, open_type, last, is_new = {"text": "", "python": "[python: ", "python_output": "["}, "text", "", False

    def put(text: str, color: str = "") -> None:
        nonlocal last
        if text:
            screen.write(text, color)
            last = text[-1]

    try:
        for type_, text in deltas:
            if type_ != open_type:
                is_answered = (open_type, type_) == ("python", "python_output")
                if show_tools and open_type != "text" and not is_answered:
                    put("]", CYAN)
                if show_tools:
                    put(" => " if is_answered else _gap(last, openings[type_]) + openings[type_], CYAN)
                open_type, is_new = type_, True
            if type_ == "text" and text:
                put(_gap(last, text) + text if is_new else text)
                is_new = False
            elif type_ != "text" and show_tools:
                put(text, CYAN)
    finally:
        if show_tools and open_type != "text":
            put("]", CYAN)
        screen.end_reply()


def _gap(last: str, text: str) -> str:
    """The space that belongs between the `last` character and `text`, if any: "48/2=" and "24" need none."""
    is_end, is_begin = last.isalpha() or last in tuple(".,;:!?)]"), text[:1].isalnum() or text[:1] in tuple("[(\"'")
    return " " if is_end and is_begin else ""


def single_prompt(given: str | None, stdin: TextIO) -> str | None:
    """The one question to ask: the one given, or all of a standard input that is not a terminal; None for a dialogue.

    Raises `UserError` when it is empty or not UTF-8.
    """
    if given is None:
        if stdin.isatty():
            return None
        try:
            given = stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"standard input is not valid UTF-8 at byte {error.start}; convert it first") from error
    if not given.strip():
        raise UserError("the prompt is empty; give one with --prompt or on standard input")
    return given.strip()


class TerminalChat:
    """One conversation with a model, and the commands that steer it.

    With a seed in `sampling` the same inputs give the same session; each answer draws from a seed of its own, so that
    `/retry` gives another answer. `name` is that of the model. For a single question (`is_dialogue` False) only the
    words of the answer are printed, and no notice mentions commands.
    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, screen: Screen, *, sampling: Sampling, name: str = "",
        system: str = "", show_stats: bool = False, is_dialogue: bool = True,
    ):  # fmt: skip
        self.engine, self.tokenizer, self.screen = engine, tokenizer, screen
        self.sampling, self.name, self.system = sampling, name, system
        self.show_stats, self.is_dialogue = show_stats, is_dialogue
        self.messages: list[dict[str, Any]] = []  # without the system message
        self._num_answers = 0
        self._num_dropped = 0  # messages that the last prompt left out

    @property
    def conversation(self) -> dict[str, Any]:
        """In the format of `chat.py`; before the first question it is not a valid one."""
        return self._with_system(self.messages)

    def _with_system(self, messages: list[dict[str, Any]]) -> dict[str, Any]:
        return {"messages": [{"role": "system", "content": self.system}, *messages] if self.system else messages}

    def begin(self, messages: Sequence[dict[str, Any]] = ()) -> None:
        """A new conversation, or that of `messages`, which have no system message and end with an answer."""
        self.messages, self._num_dropped = list(messages), 0

    def ask(self, text: str) -> str:
        """Print the answer to a question and add both to the conversation. Returns how the answer ended: "stop",
        "length" or `INTERRUPTED`.

        An answer stopped by Ctrl-C keeps what it said; one that said nothing yet takes the question back. Raises
        `UserError` when the question cannot be asked; the conversation is then as before.
        """
        return self.answer([*self.messages, {"role": "user", "content": text}])

    def answer(self, messages: list[dict[str, Any]]) -> str:
        """Like `ask`, with `messages` as the conversation: a last answer among them is continued."""
        if not messages:
            raise UserError("there is no answer yet")
        limit = prompt_limit(self.engine.context, self.sampling.max_tokens)
        prompt = render_for_completion(self.tokenizer, self._with_system(messages), max_tokens=limit)
        if prompt.num_dropped > self._num_dropped:
            dropped = f"the model no longer sees the first {prompt.num_dropped} messages"
            self.screen.notice(f"the conversation is longer than the context: {dropped}; /clear begins a new one")
        self._num_dropped = prompt.num_dropped
        seed = self.sampling.seed
        sampling = replace(self.sampling, seed=None if seed is None else seed + self._num_answers)
        self._num_answers += 1

        added, reason, times = self._generate(prompt.ids, sampling)
        begun: list[dict[str, str]] = []
        if messages[-1]["role"] == "assistant":
            begun, messages = as_parts(messages[-1]["content"]), messages[:-1]
        while reason != "stop" and added and added[-1]["type"] != "text":
            added.pop()  # a tool call or result at the end of a cut answer may itself be cut
        parts = as_parts([*begun, *added])
        if parts or reason == "stop":
            is_text = all(part["type"] == "text" for part in parts)
            self.messages = [*messages, {"role": "assistant", "content": visible_text(parts) if is_text else parts}]
        self._tell_end(reason, bool(parts))
        if self.show_stats:
            first, last = (times[0], times[-1]) if times else (0.0, 0.0)
            rate = f", {(len(times) - 1) / (last - first):.1f} tokens/s" if last > first else ""
            used = f"{len(prompt.ids) + len(times):,} of {self.engine.context:,} tokens of context used"
            self.screen.notice(f"{len(times)} tokens{rate}, the first after {first:.2f} s; {used}")
        return reason

    def _generate(self, prompt_ids: list[int], sampling: Sampling) -> tuple[list[dict[str, str]], str, list[float]]:
        """Print what the model says after the prompt, until it ends or Ctrl-C is pressed: message parts, how it ended,
        and when each token came, in seconds from the call."""
        begin, times, reason = time.perf_counter(), [], ""
        presses: list[int] = []  # of Ctrl-C; an exception during a step would leave rows of the KV cache half written
        before = signal.signal(signal.SIGINT, lambda number, _: presses.append(number))

        def deltas() -> Iterator[Delta]:
            nonlocal reason
            while not reason:
                for event in self.engine.step():
                    times.extend([time.perf_counter() - begin] * len(event.tokens))
                    yield from event.deltas
                    reason = event.finish_reason or ""
                if presses and not reason:
                    self.engine.cancel(request)
                    reason = INTERRUPTED

        try:
            request = self.engine.submit(prompt_ids, sampling)
            if self.is_dialogue:
                self.screen.begin_reply(self.name)
            print_reply(self.screen, deltas(), show_tools=self.is_dialogue)
        finally:
            signal.signal(signal.SIGINT, before)
        return request.completions[0].parts, reason, times

    def _tell_end(self, reason: str, has_parts: bool) -> None:
        if reason == INTERRUPTED and self.is_dialogue:
            self.screen.notice(f"stopped; {'the answer so far is kept' if has_parts else 'the question is taken back'}")
        elif reason == "length":
            hint = "; /continue goes on, /maxtokens changes the limit" if self.is_dialogue else ""
            self.screen.notice(f"the answer reached the token limit{hint}")
        elif reason == "stop" and not has_parts:
            self.screen.notice("the model gave an empty answer")

    # --- the loop ---

    def run(self, read: Callable[[], str]) -> None:
        """Read and answer until `read` raises `EOFError`; Ctrl-C at the prompt only discards the line."""
        while True:
            try:
                self.handle(read())
            except EOFError:
                return
            except KeyboardInterrupt:
                continue
            except UserError as error:
                self.screen.error(str(error))

    def handle(self, line: str) -> None:
        """A command or a message. Raises `UserError` when it cannot be done, `EOFError` to end the chat."""
        if not line.strip():
            return
        line = line.rstrip()
        if not line.startswith("/"):
            self.ask(line)
        elif line.startswith("//"):
            self.ask(line[1:])
        else:
            name, *argument = line.split(maxsplit=1)
            argument = "".join(argument).strip()
            if name not in COMMANDS:
                hint = did_you_mean(name, COMMANDS)
                raise UserError(f"unknown command {name}; {hint}/help lists them, and // begins a message with a slash")
            if COMMANDS[name].argument == "FILE" and not argument:
                raise UserError(f"{name} needs the name of a file: {name} talk.json")
            COMMANDS[name].run(self, argument)


class Command(NamedTuple):
    argument: str  # as /help shows it
    help: str
    run: Callable[[TerminalChat, str], Any]


def _help(chat: TerminalChat, _: str) -> None:
    usages = [f"{name} {command.argument}".strip() for name, command in COMMANDS.items()]
    for usage, command in zip(usages, COMMANDS.values(), strict=True):
        chat.screen.line(f"{usage:<{max(map(len, usages))}}  {command.help}")
    chat.screen.line("Alt+Enter begins a new line, as does Enter after a backslash; pasted lines are one message.")
    chat.screen.line("// begins a message with a slash. Ctrl-C stops an answer, Ctrl-D leaves.")


def _clear(chat: TerminalChat, _: str) -> None:
    chat.begin()
    chat.screen.notice("new conversation" + (", with the same system message" if chat.system else ""))


def _system(chat: TerminalChat, argument: str) -> None:
    if argument:
        chat.system = "" if argument == "-" else argument
    chat.screen.notice(f"system message: {chat.system}" if chat.system else "no system message")


def _setting(field: str, convert: Callable[[str], Any], help_: str) -> Command:
    """A command that shows or sets one field of `Sampling`."""

    def run(chat: TerminalChat, argument: str) -> None:
        if argument:
            try:
                value = convert(argument)
            except ValueError as error:
                kind = "a whole number" if convert is int else "a number"
                raise UserError(f"{field} must be {kind}, not {argument!r}") from error
            chat.sampling = replace(chat.sampling, **{field: value})
        chat.screen.notice(f"{field} {getattr(chat.sampling, field)}")

    return Command("[N]", f"show or set {help_}", run)


def _stats(chat: TerminalChat, _: str) -> None:
    chat.show_stats = not chat.show_stats
    chat.screen.notice(f"speed and context use are {'shown' if chat.show_stats else 'not shown'} after each answer")


def load_conversation(path: Path) -> list[dict[str, Any]]:
    """The messages of a conversation in a JSON file. Raises `UserError` when there is none, or it is malformed."""
    try:
        return check_conversation(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def _save(chat: TerminalChat, argument: str) -> None:
    path = Path(argument).expanduser()
    if not chat.messages:
        raise UserError("there is nothing to save yet")
    if not path.parent.is_dir():
        raise UserError(f"there is no folder {path.parent}; make it first, or give another name")
    if path.exists():
        try:
            load_conversation(path)
        except UserError as error:
            raise UserError(f"{path} exists and is not a conversation; choose another name") from error
    write_atomic(path, json.dumps(chat.conversation, ensure_ascii=False, indent=1) + "\n")
    chat.screen.notice(f"{len(chat.conversation['messages'])} messages saved to {path}")


def _load(chat: TerminalChat, argument: str) -> None:
    path = Path(argument).expanduser()
    messages = load_conversation(path)
    render_for_completion(chat.tokenizer, {"messages": messages})  # refuses text that cannot be encoded
    has_system = messages[0]["role"] == "system"
    chat.system = messages[0]["content"] if has_system else ""
    turns = messages[has_system:]
    is_open = turns[-1]["role"] == "user"
    chat.begin(turns[:-1] if is_open else turns)
    chat.screen.notice(f"{len(messages)} messages loaded from {path}")
    for message in turns[-3 if is_open else -2 :]:
        if message["role"] == "user":
            chat.screen.question(message["content"])
        else:
            chat.screen.begin_reply(chat.name)
            print_reply(chat.screen, (Delta(**part) for part in as_parts(message["content"])))
    if is_open:
        chat.answer(turns)


def _quit(chat: TerminalChat, _: str) -> None:
    raise EOFError  # like Ctrl-D


COMMANDS = {
    "/help": Command("", "this list", _help),
    "/clear": Command("", "begin a new conversation; system message and settings stay", _clear),
    "/system": Command("[TEXT]", "show or set the system message; - removes it", _system),
    "/temperature": _setting("temperature", float, "the randomness; 0 is greedy"),
    "/topk": _setting("top_k", int, "how many of the most likely tokens to sample from; 0: all"),
    "/maxtokens": _setting("max_tokens", int, "the token limit of an answer"),
    "/retry": Command("", "another answer to the last question", lambda chat, _: chat.answer(chat.messages[:-1])),
    "/continue": Command("", "continue the last answer", lambda chat, _: chat.answer(chat.messages)),
    "/stats": Command("", "turn speed and context use after each answer on or off", _stats),
    "/save": Command("FILE", "write the conversation as JSON", _save),
    "/load": Command("FILE", "continue a saved conversation", _load),
    "/quit": Command("", "leave", _quit),
}
