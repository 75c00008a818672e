"""Line editing on a pipe instead of a keyboard, and Markdown on a terminal that a string stands for."""

import io
import re

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput

from nanochat.data.chat import Delta
from nanochat.serve.console import LineReader, MarkdownScreen
from nanochat.serve.terminal import print_reply

UP = "\x1b[A"


@pytest.fixture
def read_typed(tmp_path):
    """What a reader with that history returns for what is typed, or pasted, all at once."""

    def read(typed, history=tmp_path / "history"):
        with create_pipe_input() as keyboard, create_app_session(input=keyboard, output=DummyOutput()):
            keyboard.send_text(typed)
            return LineReader(history, []).read()

    return read


@pytest.mark.parametrize(
    "typed",
    [
        "\x1b[200~one\rtwo\r\n\nthree\x1b[201~\r",  # how most terminals mark a paste
        "one\rtwo\r\rthree\r",  # others do not
        "one\x1b\rtwo\x1b\r\x1b\rthree\r",  # Alt+Enter
    ],
)
def test_pasted_lines_and_those_ended_with_alt_enter_are_one_message(typed, read_typed):
    assert read_typed(typed) == "one\ntwo\n\nthree"


def test_lines_can_be_edited_and_taken_from_the_history_of_an_earlier_session(read_typed, tmp_path):
    assert read_typed("stone\x01the \r") == "the stone"  # Ctrl-A goes to the beginning
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o600
    assert read_typed(f"{UP}\r") == "the stone"


def test_ctrl_c_and_ctrl_d_are_exceptions(read_typed):
    for key, error in (("\x03", KeyboardInterrupt), ("\x04", EOFError)):
        with pytest.raises(error):
            read_typed(key)


def test_a_history_of_before_becomes_private_and_one_that_cannot_be_written_is_a_warning(read_typed, tmp_path, capsys):
    (tmp_path / "history").touch(mode=0o644)
    assert read_typed("stone\r") == "stone"
    assert (tmp_path / "history").stat().st_mode & 0o777 == 0o600
    assert capsys.readouterr().out == ""
    assert read_typed("stone\r", history=tmp_path / "absent" / "history") == "stone"
    assert "no history in" in capsys.readouterr().out


def test_commands_and_the_paths_behind_them_are_completed(tmp_path):
    (tmp_path / "talk.json").touch()
    with create_app_session(output=DummyOutput()):
        completer = LineReader(tmp_path / "history", ["/save", "/stats", "/help"])._session.completer

    def complete(text):
        found = completer.get_completions(Document(text), CompleteEvent())
        return [text[: len(text) + each.start_position] + each.text for each in found]

    assert complete("/s") == ["/save", "/stats"]
    assert complete(f"/load {tmp_path}/ta") == [f"/load {tmp_path}/talk.json"]
    assert complete("say /s") == []


class Tty(io.StringIO):
    def isatty(self):
        return True


def rendered(monkeypatch, *deltas, height=25, width=40, speaker=""):
    """What a terminal shows in the end, without styles; and all that was written to it."""
    for name, value in {"TERM": "xterm", "COLUMNS": str(width), "LINES": str(height)}.items():
        monkeypatch.setenv(name, value)
    out = Tty()
    screen = MarkdownScreen(out, out)
    if speaker:
        screen.begin_reply(speaker)
    print_reply(screen, deltas)
    return screen_after(out.getvalue(), height), out.getvalue()


def screen_after(written, height):
    """Obeys the cursor movements that rich uses: to the beginning of a line, one line up, erase the line."""
    lines, row = [""], 0
    for piece in re.findall(r"\x1b\[[?0-9;]*[a-zA-Z]|[^\x1b]", re.sub(r"\x1b\[[?0-9;]*[mhl]", "", written)):
        if piece == "\n":
            row += 1
            lines += [""] * (row == len(lines))
        elif piece == "\x1b[1A":
            row -= 1
            assert row > len(lines) - 1 - height, "what has scrolled out of the terminal cannot be erased"
        elif piece == "\x1b[2K":
            lines[row] = ""
        elif piece != "\r":
            lines[row] += piece
    return "\n".join(line.rstrip() for line in lines)


def test_markdown_is_rendered_and_other_text_stays(monkeypatch):
    text = "# Title\n\nSome **bold** words,\na <b>second</b> line.\n\n- one\n\n```\na = *b*\n\nc\n```\n\n2 * 3 * 4"
    deltas = [Delta("text", text[i : i + 3]) for i in range(0, len(text), 3)]
    shown, written = rendered(monkeypatch, *deltas)
    assert "Title" in shown
    assert "#" not in shown
    assert "Some bold words,\na <b>second</b> line.\n\n \u2022 one\n\n a = *b*\n\n c\n\n2 * 3 * 4\n" in shown
    assert "\x1b[1mbold" in written


def test_tool_calls_are_not_taken_for_markdown_and_control_characters_do_not_reach_the_terminal(monkeypatch):
    deltas = [Delta("python", "2**3*_4_"), Delta("python_output", "32"), Delta("text", "(http://x.y)")]
    assert rendered(monkeypatch, *deltas)[0] == "[python: 2**3*_4_ => 32] (http://x.y)\n"
    assert rendered(monkeypatch, Delta("text", "a\x1b[2J\x07\x9bb"))[0] == "a\u241b[2J\u2407\ufffdb\n"


def test_the_speaker_is_named_once_before_words_and_above_blocks(monkeypatch):
    pieces = ["One", " word.", "\n\n", "- two"]
    shown, written = rendered(monkeypatch, *(Delta("text", piece) for piece in pieces), speaker="my_d*4")
    assert shown == "\nmy_d*4: One word.\n\n \u2022 two\n"
    assert "\x1b[1;35mmy_d*4:" in written
    for text in ("```\na = 1\n```", "- a = 1", "1. a = 1", "# a = 1"):
        lines = rendered(monkeypatch, *(Delta("text", piece) for piece in text), speaker="d4")[0].splitlines()
        assert lines[:3] == ["", "d4:", ""]
        assert "a = 1" in lines[-1]


def test_a_block_taller_than_the_terminal_is_shown_once(monkeypatch):
    monkeypatch.setattr("nanochat.serve.console.REFRESH_SECONDS", 0.0)
    code = "```\n" + "\n".join(f"line{i}" for i in range(30)) + "\n```"
    shown, _ = rendered(monkeypatch, *(Delta("text", c) for c in code), height=8)
    assert [line.strip() for line in shown.splitlines()] == [f"line{i}" for i in range(30)]


def test_words_appear_as_they_come(monkeypatch):
    _, written = rendered(monkeypatch, Delta("text", "first "), Delta("text", "second"))
    assert "first" in written[: written.index("second")]
