"""The interactive side of a terminal chat: lines edited with prompt_toolkit, replies rendered as Markdown with rich.

A module of its own, imported when a dialogue starts: a single question needs neither library, and both take a moment.
Not here: commands and the conversation (`terminal.py`).
"""

import re
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TextIO

from markdown_it import MarkdownIt
from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.output import create_output
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.segment import Segment, SegmentLines
from rich.style import Style
from rich.theme import Theme

from nanochat.serve.terminal import YOU, Screen, printable

PROMPT = [("", "\n"), ("bold ansigreen", YOU)]
CONTINUATION_PROMPT = "   . "
NAME_STYLE = Style(color="magenta", bold=True)
REFRESH_SECONDS = 0.05  # at most this often

try:
    import termios
except ImportError:  # Windows
    termios = None

# HTML stays text, which rich would drop otherwise
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


class LineReader:
    """Reads messages from the terminal, with line editing, a history kept in a file, and completion by Tab.

    As a context manager, it has what is typed while an answer comes shown at the next prompt, not amid the answer.
    """

    def __init__(self, history: Path, commands: Sequence[str]):
        keys = KeyBindings()

        @keys.add("escape", "enter")
        def on_alt_enter(event: KeyPressEvent) -> None:
            event.current_buffer.insert_text("\n")

        @keys.add("enter")
        def on_enter(event: KeyPressEvent) -> None:
            """Send the message, or begin a new line: in place of a backslash, and where more has come at once, which is
            a paste in a terminal that does not tell (most do, and prompt_toolkit then inserts it whole)."""
            buffer = event.current_buffer
            if any(press.key != Keys.CPRResponse for press in event.key_processor.input_queue):
                buffer.insert_text("\n")
            elif buffer.document.text_before_cursor.endswith("\\"):
                buffer.delete_before_cursor()
                buffer.insert_text("\n")
            else:
                buffer.validate_and_handle()

        self._session: PromptSession[str] = PromptSession(
            history=_open_history(history), completer=_ChatCompleter(commands), complete_while_typing=False,
            key_bindings=keys, multiline=True, prompt_continuation=CONTINUATION_PROMPT,
            output=create_output(always_prefer_tty=True) if sys.stderr.isatty() and not sys.stdout.isatty() else None,
        )  # fmt: skip
        self._terminal_mode: list | None = None  # of before

    def __enter__(self) -> "LineReader":
        if termios and sys.stdin.isatty():
            self._terminal_mode = termios.tcgetattr(sys.stdin)
            mode = list(self._terminal_mode)
            mode[3] &= ~termios.ECHO
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, mode)
        return self

    def __exit__(self, *exception) -> None:
        if self._terminal_mode is not None:
            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._terminal_mode)

    def read(self) -> str:
        """The next message. Raises `EOFError` on Ctrl-D and `KeyboardInterrupt` on Ctrl-C."""
        return self._session.prompt(PROMPT)


def _open_history(path: Path) -> History:
    """The history in a file that only its owner can read; without a file when that cannot be written."""
    try:
        path.touch(mode=0o600)
        path.chmod(0o600)
    except OSError as error:
        print(f"warning: no history in {path}: {error.strerror or error}")
        return InMemoryHistory()
    return FileHistory(str(path))


class _ChatCompleter(Completer):
    """Completes a command, and behind it the path of a file."""

    def __init__(self, commands: Sequence[str]):
        self._commands, self._paths = WordCompleter(list(commands), sentence=True), PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        command, space, argument = document.text_before_cursor.partition(" ")
        if space and command.startswith("/"):
            return self._paths.get_completions(Document(argument.lstrip()), complete_event)
        return self._commands.get_completions(document, complete_event)


class MarkdownScreen(Screen):
    """A terminal on which replies are rendered as Markdown while they come.

    Finished paragraphs, lists and code blocks are printed for good. Only the last, unfinished one is redrawn as it
    grows, and never taller than the terminal, so that nothing is repeated in the scrollback.
    """

    def __init__(self, out: TextIO, err: TextIO):
        super().__init__(out, err)
        self._console = Console(file=out, highlight=False, theme=Theme({"markdown.code": "cyan"}))
        plain_streams = {"redirect_stdout": False, "redirect_stderr": False}
        self._live = Live(console=self._console, auto_refresh=False, transient=True, **plain_streams)
        self._pending, self._show_at = "", 0.0
        self._name = ""  # of the speaker, until it is printed

    def begin_reply(self, name: str) -> None:
        self._console.print()
        self._name = name

    def write(self, text: str, color: str = "") -> None:
        """More of a reply; with a colour it is no Markdown."""
        text = printable(text)
        self._live.start()
        self._pending += _escaped(text) if color else text
        end = _finished_length(self._pending)
        if end:
            self._console.print(SegmentLines([*self._lines(self._pending[:end]), []], new_lines=True), end="")
            self._pending, self._name = self._pending[end:], ""
        begin = time.perf_counter()
        if end or begin >= self._show_at:
            lines = self._lines(self._pending)[1 - self._console.height :]
            self._live.update(SegmentLines(lines, new_lines=True), refresh=True)
            seconds = time.perf_counter() - begin
            self._show_at = begin + max(REFRESH_SECONDS, 5 * seconds)  # a long block must not slow the model down

    def end_reply(self) -> None:
        self._live.update("")
        self._live.stop()
        self._console.print(SegmentLines(self._lines(self._pending), new_lines=True), end="")
        self._pending = self._name = ""

    def _lines(self, text: str) -> list[list[Segment]]:
        """`text` as it appears, below each other the lines from the first to the last that is not empty."""
        markdown = Markdown("", code_theme="ansi_dark", justify="default", hyperlinks=False)
        text = text.replace("\n", "  \n")  # two spaces keep the end of a line
        parsed = _PARSER.parse(text)
        if self._name and parsed:  # on the first line if that is one of words
            gap = " " if parsed[0].type == "paragraph_open" else "\n\n"
            parsed = _PARSER.parse(f"**{_escaped(self._name)}:**{gap}{text}")
        markdown.parsed = parsed
        lines = self._console.render_lines(markdown, pad=False)
        full = [number for number, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
        if self._name and full:
            first = lines[full[0]]
            first[0] = Segment(first[0].text, NAME_STYLE)
        return lines[full[0] : full[-1] + 1] if full else []


def _escaped(text: str) -> str:
    """`text` as Markdown that shows it as it is."""
    return re.sub(r"([\\`*_~\[\]()<>#+.!|-])", r"\\\1", text)


def _finished_length(text: str) -> int:
    """The length of what no further text can change: up to the last blank line that is not inside a code block."""
    end = text.rfind("\n\n")
    while end >= 0 and len(re.findall(r"^ *(?:```|~~~)", text[:end], re.MULTILINE)) % 2:
        end = text.rfind("\n\n", 0, end)
    return end + 2 if end >= 0 else 0
