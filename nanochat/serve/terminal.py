"""A chat in a terminal: reading lines, commands, the reply as it comes. `scripts/chat_cli.py` runs it.

Not here: flags and loading a model (the script), the conversation's format (`chat.py`), generating (`engine.py`).
Importing this leaves the terminal alone; line editing begins with the first `LineReader`.
"""

import difflib
import glob
import json
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TextIO

from nanochat.common import UserError, write_atomic
from nanochat.data.chat import Delta, as_parts, check_conversation, render_for_completion, visible_text
from nanochat.engine.engine import Engine
from nanochat.engine.sampling import Sampling
from nanochat.tokenizer import Tokenizer

INTERRUPTED = "interrupted"  # how an answer ended, beside the engine's "stop" and "length"
REPLY_FRAC = 0.25  # at most this share of the context is kept free for a reply; older turns go first
HISTORY_LINES = 1000
INTERRUPT_POLL_SECONDS = 0.05  # how often the prompt looks whether Ctrl-C was pressed
PROMPT, CONTINUATION_PROMPT = "> ", ". "
DIM, CYAN, RED, PLAIN = "\x1b[2m", "\x1b[36m", "\x1b[31m", "\x1b[0m"

# What a model writes may hold any byte, and a terminal obeys some of them: those are shown instead.
_CONTROL_PICTURES = {code: chr(0x2400 + code) for code in range(32) if chr(code) not in "\n\t"}
_CONTROL_PICTURES |= {0x7F: "\u2421"} | dict.fromkeys(range(0x80, 0xA0), "\ufffd")


# --- writing -------------------------------------------------------------------------------------


class Screen:
    """Where a chat writes: replies and what a command was asked for on `out`, everything beside it on `err`.

    Colours and pictures of control characters only where the stream is a terminal; no colours with NO_COLOR set
    (https://no-color.org) or on a terminal that calls itself dumb.
    """

    def __init__(self, out: TextIO, err: TextIO, *, environ: Mapping[str, str] = os.environ):
        self._out, self._err = out, err
        self._has_color = not environ.get("NO_COLOR") and environ.get("TERM") != "dumb"

    def write(self, text: str, color: str = "") -> None:
        """`text` as it is, at once."""
        self._put(self._out, text, color)

    def line(self, text: str) -> None:
        self._put(self._out, text + "\n")

    def notice(self, text: str) -> None:
        self._put(self._err, f"({text})\n", DIM)

    def error(self, text: str) -> None:
        self._put(self._err, f"error: {text}\n", RED)

    def _put(self, stream: TextIO, text: str, color: str = "") -> None:
        if stream.isatty():
            text = text.translate(_CONTROL_PICTURES)
            if text and color and self._has_color:
                text = f"{color}{text}{PLAIN}"
        stream.write(text)
        stream.flush()


class ReplyPrinter:
    """Prints the pieces of a reply as they come.

    A tool call and its result stand in brackets between the words: `[python: 12*34 => 408]`; without `show_tools`
    only the words are printed.
    """

    def __init__(self, screen: Screen, *, show_tools: bool = True):
        self._screen = screen
        self._show_tools = show_tools
        self._type = "text"

    def add(self, deltas: Iterable[Delta]) -> None:
        for delta in deltas:
            if self._show_tools and delta.type != self._type:
                self._turn_to(delta.type)
            if delta.type == "text":
                self._screen.write(delta.text)
            elif self._show_tools:
                self._screen.write(delta.text, CYAN)

    def finish(self) -> None:
        """End the line; nothing may be added after."""
        self._turn_to("text")
        self._screen.write("\n")

    def _turn_to(self, type_: str) -> None:
        if type_ == "python_output" and self._type == "python":
            self._screen.write(" => ", CYAN)
        else:
            self._screen.write("]" if self._type != "text" else "", CYAN)
            self._screen.write({"text": "", "python": "[python: ", "python_output": "["}[type_], CYAN)
        self._type = type_


# --- reading -------------------------------------------------------------------------------------


class LineReader:
    """Reads messages from the terminal, with line editing, a history kept in a file, and completion of commands,
    as far as this Python has readline; plain lines otherwise."""

    def __init__(self, history: Path, commands: Sequence[str]):
        self._history = history
        self._words = commands
        self._matches: list[str] = []
        try:
            import readline
        except ImportError:
            self._readline = None
            return
        self._readline = readline
        readline.set_history_length(HISTORY_LINES)
        readline.set_completer_delims(" ")
        readline.set_completer(self._complete)
        is_libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if is_libedit else "tab: complete")
        if history.exists():
            self._on_disk(readline.read_history_file)

    def read(self) -> str:
        """The next message; a line that ends with a backslash goes on in the next one.

        Raises `EOFError` at the end of input and `KeyboardInterrupt` on Ctrl-C.
        """
        with polled_interrupt():
            text = input(PROMPT)
            while text.endswith("\\"):
                text = text[:-1] + "\n" + input(CONTINUATION_PROMPT)
        return text

    def close(self) -> None:
        """Write the history, readable by its owner only."""
        if self._readline is not None:
            self._on_disk(self._write_history)

    def _write_history(self, path: str) -> None:
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT, 0o600))  # readline would create it for everyone to read
        os.chmod(path, 0o600)
        self._readline.write_history_file(path)

    def _on_disk(self, work: Callable[[str], None]) -> None:
        try:
            work(str(self._history))
        except OSError as error:
            print(f"warning: no history in {self._history}: {error.strerror or error}")

    def _complete(self, text: str, state: int) -> str | None:
        if state == 0:
            self._matches = [word for word in self._words if word.startswith(text)] if text.startswith("/") else []
            if not self._matches:
                self._matches = sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*"))
        return self._matches[state] if state < len(self._matches) else None


def single_prompt(given: str | None, stdin: TextIO) -> str | None:
    """The one question to ask: the one given, or all of a standard input that is no terminal; None to converse.

    Raises `UserError` when there is nothing in it, or it is not UTF-8.
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


@contextmanager
def held_interrupt() -> Iterator[Callable[[], bool]]:
    """Inside, Ctrl-C raises nothing; the function given says whether it was pressed. Main thread only.

    An exception in the middle of the engine's step would leave the rows of its cache half written.
    """
    pressed = False

    def note(signum: int, frame: Any) -> None:
        nonlocal pressed
        pressed = True

    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: pressed
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def polled_interrupt() -> Iterator[None]:
    """Inside, Ctrl-C raises `KeyboardInterrupt` within `INTERRUPT_POLL_SECONDS`. Main thread only.

    `input` alone misses some: it looks for signals only when one cuts its wait short, so a Ctrl-C just before the wait
    stays unseen until the next (https://github.com/python/cpython/issues/112585). Hence an alarm. Only the alarm
    raises: where Ctrl-C did, the alarm's handler, due at the same time, could make a `SystemError` of it
    (https://github.com/python/cpython/issues/134644). Without alarms (Windows) Ctrl-C is what `input` makes of it.
    """
    if not hasattr(signal, "setitimer"):
        yield
        return
    with held_interrupt() as is_interrupted:

        def look(signum: int, frame: Any) -> None:
            if is_interrupted():
                signal.setitimer(signal.ITIMER_REAL, 0)
                raise KeyboardInterrupt

        before = signal.signal(signal.SIGALRM, look)
        signal.setitimer(signal.ITIMER_REAL, INTERRUPT_POLL_SECONDS, INTERRUPT_POLL_SECONDS)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
        if is_interrupted():
            raise KeyboardInterrupt


# --- files ---------------------------------------------------------------------------------------


def save_conversation(path: Path, conversation: Mapping[str, Any]) -> None:
    """Write one conversation as JSON. Raises `UserError` when it cannot, and where another kind of file stands."""
    if path.exists():
        try:
            load_conversation(path)
        except UserError as error:
            raise UserError(f"{path} is there and holds no conversation; choose another name") from error
    write_atomic(path, json.dumps(conversation, ensure_ascii=False, indent=1) + "\n")


def load_conversation(path: Path) -> list[dict[str, Any]]:
    """The messages of a conversation written as JSON. Raises `UserError` when there is none, or not in order."""
    try:
        return check_conversation(json.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: {error}") from error
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


# --- the chat ------------------------------------------------------------------------------------


@dataclass
class Answer:
    """What came of a prompt: message content, how it ended, how many tokens, and when the first and the last of them
    came, in seconds from the question."""

    parts: list[dict[str, str]]
    reason: str = ""
    num_tokens: int = 0
    first_seconds: float = 0.0
    last_seconds: float = 0.0

    def speed(self) -> str:
        text = f"{self.num_tokens} tokens"
        if self.num_tokens > 1 and self.last_seconds > self.first_seconds:
            text += f", {(self.num_tokens - 1) / (self.last_seconds - self.first_seconds):.1f} tokens/s"
        return f"{text}, the first after {self.first_seconds:.2f} s"


class TerminalChat:
    """One conversation with a model, and the commands that steer it.

    With a seed in `sampling` the same inputs give the same session; each answer draws from a seed of its own, so that
    `/retry` is another try. For a single question (`is_dialogue` False) only words are printed as the answer, and no
    notice speaks of commands.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        screen: Screen,
        *,
        sampling: Sampling,
        system: str = "",
        show_stats: bool = False,
        is_dialogue: bool = True,
    ):
        self.engine, self.tokenizer, self.screen = engine, tokenizer, screen
        self.sampling = sampling
        self.system = system
        self.show_stats, self.is_dialogue = show_stats, is_dialogue
        self.messages: list[dict[str, Any]] = []  # without the system message
        self._num_answers = 0
        self._num_dropped = 0  # messages that the last prompt left out

    @property
    def conversation(self) -> dict[str, Any]:
        """All of it, as `chat.py` describes; without a question it is not one yet."""
        return {"messages": self._with_system(self.messages)}

    def _with_system(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        return [{"role": "system", "content": self.system}, *messages] if self.system else messages

    def begin(self, messages: Sequence[dict[str, Any]] = ()) -> None:
        """A new conversation, or the one of `messages`, which hold no system message and end with an answer."""
        self.messages, self._num_dropped = list(messages), 0

    # --- answers ---

    def ask(self, text: str) -> str:
        """Print the answer to a question, and add both to the conversation. Returns how the answer ended: "stop",
        "length" or `INTERRUPTED`.

        Of an answer stopped by Ctrl-C what was said stays; when nothing was said yet, the question is taken back.
        Raises `UserError` when the question cannot be asked; the conversation is then as before.
        """
        return self._answer([*self.messages, {"role": "user", "content": text}])

    def retry(self) -> str:
        """Another answer to the last question, in place of the last one; otherwise like `ask`."""
        if not self.messages:
            raise UserError("there is no answer yet to try again")
        return self._answer(self.messages[:-1])

    def go_on(self) -> str:
        """More of the last answer; otherwise like `ask`."""
        if not self.messages:
            raise UserError("there is no answer yet to go on with")
        return self._answer(self.messages)

    def _answer(self, messages: list[dict[str, Any]]) -> str:
        """The next words after `messages`, which become the conversation: an answer, or the rest of one."""
        room = max(1, min(self.sampling.max_tokens, int(REPLY_FRAC * self.engine.context)))
        full = {"messages": self._with_system(messages)}
        prompt = render_for_completion(self.tokenizer, full, max_tokens=self.engine.context - room)
        self._tell_dropped(prompt.num_dropped)
        sampling = self.sampling
        if sampling.seed is not None:
            sampling = replace(sampling, seed=sampling.seed + self._num_answers)
        self._num_answers += 1

        answer = self._generate(prompt.ids, sampling)
        begun: list[dict[str, str]] = []
        if messages[-1]["role"] == "assistant":
            begun, messages = as_parts(messages[-1]["content"]), messages[:-1]
        parts = as_parts([*begun, *(answer.parts if answer.reason == "stop" else _whole_parts(answer.parts))])
        if parts or answer.reason == "stop":
            is_text = all(part["type"] == "text" for part in parts)
            self.messages = [*messages, {"role": "assistant", "content": visible_text(parts) if is_text else parts}]
        self._tell_end(answer.reason, bool(parts))
        if self.show_stats:
            used = len(prompt.ids) + answer.num_tokens
            self.screen.notice(f"{answer.speed()}; {used:,} of {self.engine.context:,} tokens of context used")
        return answer.reason

    def _generate(self, prompt_ids: list[int], sampling: Sampling) -> Answer:
        """Print what the model says after the prompt, to its end or to Ctrl-C."""
        begin, printer = time.perf_counter(), ReplyPrinter(self.screen, show_tools=self.is_dialogue)
        with held_interrupt() as is_interrupted:
            request = self.engine.submit(prompt_ids, sampling)
            answer = Answer(request.completions[0].parts)
            while not answer.reason:
                for event in self.engine.step():
                    if event.tokens:
                        answer.last_seconds = time.perf_counter() - begin
                        answer.first_seconds = answer.first_seconds or answer.last_seconds
                        answer.num_tokens += len(event.tokens)
                    printer.add(event.deltas)
                    answer.reason = event.finish_reason or ""
                if is_interrupted() and not answer.reason:
                    self.engine.cancel(request)
                    answer.reason = INTERRUPTED
            printer.finish()
        return answer

    def _tell_dropped(self, num_dropped: int) -> None:
        if num_dropped > self._num_dropped:
            self.screen.notice(
                f"the conversation is longer than the context: the model no longer sees the first {num_dropped} "
                f"messages; /clear begins a new one"
            )
        self._num_dropped = num_dropped

    def _tell_end(self, reason: str, has_parts: bool) -> None:
        if reason == INTERRUPTED and self.is_dialogue:
            self.screen.notice(
                f"stopped; {'what was said so far stays' if has_parts else 'the question is taken back'}"
            )
        elif reason == "length":
            hint = "; /continue goes on, /maxtokens sets the limit" if self.is_dialogue else ""
            self.screen.notice(f"the answer is cut at the limit of tokens{hint}")
        elif reason == "stop" and not has_parts:
            self.screen.notice("the model had nothing to say")

    # --- the loop ---

    def run(self, read: Callable[[], str]) -> None:
        """Read and answer until `read` raises `EOFError`; Ctrl-C at the prompt only clears the line."""
        while True:
            try:
                self.handle(read())
            except EOFError:
                self.screen.line("")
                return
            except KeyboardInterrupt:
                self.screen.line("")
            except UserError as error:
                self.screen.error(str(error))
            except UnicodeDecodeError as error:
                self.screen.error(f"the line is not valid {error.encoding}; it is left out")

    def handle(self, line: str) -> None:
        """One line of the user: a command, or a message. Raises `UserError` when it cannot be done, `EOFError`
        when the chat is to end."""
        if not line.strip():
            return
        if not line.startswith("/"):
            self.ask(line)
        elif line.startswith("//"):
            self.ask(line[1:])
        else:
            name, *argument = line.split(maxsplit=1)
            find_command(name).run(self, "".join(argument).strip())


# --- commands ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """`usage` begins with the command's name; `run(chat, argument)` does it."""

    usage: str
    help: str
    run: Callable[[TerminalChat, str], None]

    @property
    def name(self) -> str:
        return self.usage.split()[0]


def find_command(name: str) -> Command:
    """Raises `UserError`, with the nearest name, for a command that does not exist."""
    for command in COMMANDS:
        if command.name == name:
            return command
    near = difflib.get_close_matches(name, [command.name for command in COMMANDS], n=1)
    hint = f"did you mean {near[0]}? " if near else ""
    raise UserError(f"{name} is no command; {hint}/help lists them, and // begins a message with a slash")


def _clear(chat: TerminalChat, argument: str) -> None:
    chat.begin()
    chat.screen.notice("a new conversation" + (", with the same system message" if chat.system else ""))


def _system(chat: TerminalChat, argument: str) -> None:
    if argument:
        chat.system = "" if argument == "-" else argument
    chat.screen.notice(f"system message: {chat.system}" if chat.system else "no system message")


def _setting(field: str, convert: Callable[[str], Any], kind: str) -> Callable[[TerminalChat, str], None]:
    """A command that shows or sets one field of `Sampling`."""

    def run(chat: TerminalChat, argument: str) -> None:
        if argument:
            try:
                value = convert(argument)
            except ValueError as error:
                raise UserError(f"{field} must be {kind}, not {argument!r}") from error
            chat.sampling = replace(chat.sampling, **{field: value})
        chat.screen.notice(f"{field} {getattr(chat.sampling, field)}")

    return run


def _switch_stats(chat: TerminalChat, argument: str) -> None:
    chat.show_stats = not chat.show_stats
    chat.screen.notice(f"speed and context use are {'shown' if chat.show_stats else 'not shown'} after each answer")


def _save(chat: TerminalChat, argument: str) -> None:
    if not argument:
        raise UserError("/save needs the name of a file: /save talk.json")
    if not chat.messages:
        raise UserError("there is nothing to save yet")
    path = Path(argument).expanduser()
    save_conversation(path, chat.conversation)
    chat.screen.notice(f"{len(chat.conversation['messages'])} messages saved to {path}")


def _load(chat: TerminalChat, argument: str) -> None:
    if not argument:
        raise UserError("/load needs the name of a file: /load talk.json")
    path = Path(argument).expanduser()
    messages = load_conversation(path)
    render_for_completion(chat.tokenizer, {"messages": messages})  # text that cannot be encoded is refused now
    has_system = messages[0]["role"] == "system"
    chat.system = messages[0]["content"] if has_system else ""
    turns = messages[has_system:]
    question = turns.pop()["content"] if turns[-1]["role"] == "user" else ""
    chat.begin(turns)
    chat.screen.notice(f"{len(messages)} messages loaded from {path}")
    for message in turns[-2:]:
        if message["role"] == "user":
            chat.screen.line(PROMPT + message["content"])
        else:
            printer = ReplyPrinter(chat.screen)
            printer.add(Delta(part["type"], part["text"]) for part in as_parts(message["content"]))
            printer.finish()
    if question:
        chat.screen.line(PROMPT + question)
        chat.ask(question)


def _quit(chat: TerminalChat, argument: str) -> None:
    raise EOFError  # as Ctrl-D does


def _help(chat: TerminalChat, argument: str) -> None:
    width = max(len(command.usage) for command in COMMANDS)
    for command in COMMANDS:
        chat.screen.line(f"{command.usage:<{width}}  {command.help}")
    chat.screen.line(
        "A backslash at the end of a line lets the message go on in the next one; // begins a message with a slash.\n"
        "Ctrl-C stops an answer, Ctrl-D leaves."
    )


COMMANDS = (
    Command("/help", "this list", _help),
    Command("/clear", "begin a new conversation; system message and settings stay", _clear),
    Command("/system [TEXT]", "show or set the system message; - removes it", _system),
    Command("/temperature [X]", "show or set the randomness; 0 is greedy", _setting("temperature", float, "a number")),
    Command(
        "/topk [N]", "show or set how many tokens are drawn from; 0 is all", _setting("top_k", int, "a whole number")
    ),
    Command("/maxtokens [N]", "show or set how long an answer may get", _setting("max_tokens", int, "a whole number")),
    Command("/retry", "another answer to the last question", lambda chat, _: chat.retry()),
    Command("/continue", "let the last answer go on", lambda chat, _: chat.go_on()),
    Command("/stats", "switch speed and context use after each answer on or off", _switch_stats),
    Command("/save FILE", "write the conversation as JSON", _save),
    Command("/load FILE", "go on with a conversation that was saved", _load),
    Command("/quit", "leave", _quit),
)


# --- parts of an answer --------------------------------------------------------------------------


def _whole_parts(parts: Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """What stays of an answer that was cut: a tool call at its end goes, as its expression or result may be cut."""
    whole = [dict(part) for part in parts]
    while whole and whole[-1]["type"] != "text":
        whole.pop()
    return whole
