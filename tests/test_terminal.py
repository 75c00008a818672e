"""The chat in the terminal without a terminal: commands, what is printed, what a conversation holds after Ctrl-C."""

import io
import json
import os
import signal

import pytest

from nanochat.common import UserError
from nanochat.data.chat import Delta
from nanochat.engine.generation import Completion, Event, Request, Token
from nanochat.engine.sampling import Sampling
from nanochat.serve.terminal import COMMANDS, INTERRUPTED, Screen, TerminalChat, print_reply, single_prompt

TOOL_PIECES = [("text", "It is "), ("python", ""), ("python", "12*"), ("python", "34"), ("python_output", ""),
               ("python_output", "408"), ("text", "408.")]  # fmt: skip
TOOL_PARTS = [{"type": "text", "text": "It is "}, {"type": "python", "text": "12*34"},
              {"type": "python_output", "text": "408"}, {"type": "text", "text": "408."}]  # fmt: skip


class ScriptedEngine:
    """Says the replies it was given, a piece a step; each is a list of pieces and how it ends."""

    def __init__(self, *replies: tuple[list[tuple[str, str]], str], context: int = 200):
        self.replies = list(replies)
        self.context = context
        self.submitted: list[tuple[list[int], Sampling]] = []
        self.cancelled: list[Request] = []
        self.interrupt_at: int | None = None  # piece at which Ctrl-C is pressed

    def submit(self, prompt, sampling):
        self.submitted.append((prompt, sampling))
        pieces, self._reason = self.replies.pop(0)
        self._left, self._num_said = list(pieces), 0
        self._request = Request(prompt, sampling, (), [Completion()])
        return self._request

    def step(self):
        if self._num_said == self.interrupt_at:
            os.kill(os.getpid(), signal.SIGINT)
        parts, deltas = self._request.completions[0].parts, ()
        if self._left:
            type_, text = self._left.pop(0)
            if not parts or parts[-1]["type"] != type_:
                parts.append({"type": type_, "text": ""})
            parts[-1]["text"] += text
            deltas = (Delta(type_, text),)
        self._num_said += 1
        reason = None if self._left else self._reason
        return [Event(self._request, 0, (Token(7),), deltas, reason)]

    def cancel(self, request):
        self.cancelled.append(request)


class Tty(io.StringIO):
    def isatty(self):
        return True


def says(*texts, reason="stop"):
    """A scripted reply of words."""
    return [("text", text) for text in texts], reason


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


@pytest.fixture
def make_chat(tokenizer):
    def make(*replies, context=200, sampling=None, **options):
        out, err, engine = io.StringIO(), io.StringIO(), ScriptedEngine(*replies, context=context)
        chat = TerminalChat(engine, tokenizer, Screen(out, err), sampling=sampling or Sampling(), **options)
        chat.out, chat.err = out, err
        return chat

    return make


def run_lines(chat, *lines):
    """Everything the chat prints and notes when these lines are typed; an exception is a key of the keyboard."""
    typed = iter([*lines, EOFError])

    def read():
        line = next(typed)
        if isinstance(line, str):
            return line
        raise line

    chat.run(read)
    return chat.out.getvalue() + chat.err.getvalue()


def test_a_tool_call_stands_in_brackets_between_the_words_but_not_in_the_answer_to_a_single_question(make_chat):
    chat = make_chat((TOOL_PIECES, "stop"), name="d4")
    assert chat.ask("How much?") == "stop"
    assert chat.out.getvalue() == "\nd4: It is [python: 12*34 => 408] 408.\n"
    assert chat.messages == [user("How much?"), assistant(TOOL_PARTS)]
    single = make_chat((TOOL_PIECES, "length"), is_dialogue=False)
    single.ask("How much?")
    assert single.out.getvalue() == "It is 408.\n"
    assert single.err.getvalue() == "(the answer reached the token limit)\n"


@pytest.mark.parametrize(
    ("pieces", "printed"),
    [
        ([("python", "1+")], "[python: 1+]"), ([("python_output", "3"), ("text", "!")], "[3]!"),
        ([("python", "1"), ("python_output", "1"), ("python", "2"), ("python_output", "2")],
         "[python: 1 => 1] [python: 2 => 2]"),
        ([("text", "First."), ("python", "1"), ("text", "Then"), ("text", "ce")], "First. [python: 1] Thence"),
        ([("text", "1+1="), ("python", "1+1"), ("python_output", "2"), ("text", ""), ("text", "2\n")],
         "1+1=[python: 1+1 => 2] 2\n"),
    ],
)  # fmt: skip
def test_brackets_close_whatever_follows_with_spaces_between_them_and_words(pieces, printed):
    out = io.StringIO()
    print_reply(Screen(out, out), (Delta(*piece) for piece in pieces))
    assert out.getvalue() == printed + "\n"


@pytest.mark.parametrize(
    ("pieces", "printed"),
    [(("1+1=", "2 in all."), "1+1=2 in all."), (("Wait.", "That is 2"), "Wait. That is 2"),
     (("Wait. ", "So"), "Wait. So"), (("It costs $", "2"), "It costs $2"), (("", "That is 2"), "That is 2")],
)  # fmt: skip
def test_words_around_a_tool_call_that_is_not_shown_are_not_run_together(pieces, printed):
    out = io.StringIO()
    deltas = [Delta("text", pieces[0]), Delta("python", "1+1"), Delta("python_output", "2"), Delta("text", pieces[1])]
    print_reply(Screen(out, out), deltas, show_tools=False)
    assert out.getvalue() == printed + "\n"


def test_control_characters_reach_a_file_but_not_a_terminal():
    text = "a\x1b[2J\r\x07\x7f\x9bb\tc\n"
    terminal, file = Tty(), io.StringIO()
    Screen(terminal, terminal).write(text)
    Screen(file, file).write(text)
    assert terminal.getvalue() == "a␛[2J␍␇␡\ufffdb\tc\n"
    assert file.getvalue() == text


@pytest.mark.parametrize(
    ("stream", "environ", "has_color"),
    [(Tty, {"TERM": "xterm"}, True), (Tty, {"TERM": "xterm", "NO_COLOR": "1"}, False),
     (Tty, {"TERM": "xterm", "NO_COLOR": ""}, True), (Tty, {"TERM": "dumb"}, False),
     (io.StringIO, {"TERM": "xterm"}, False)],
)  # fmt: skip
def test_colours_are_for_terminals_that_want_them(stream, environ, has_color):
    out = stream()
    Screen(out, out, environ=environ).notice("hello")
    assert ("\x1b[" in out.getvalue()) == has_color
    assert "(hello)" in out.getvalue()


def test_speed_and_context_are_shown_on_request(make_chat):
    chat = make_chat(says("a", "b", "c"), says("a"))
    printed = run_lines(chat, "/stats", "river", "/stats", "stone")
    num_prompt = len(chat.engine.submitted[0][0])
    assert "(3 tokens, " in printed
    assert f" tokens/s, the first after 0.00 s; {num_prompt + 3} of 200 tokens of context used)" in printed
    assert printed.count("of context used") == 1


def test_ctrl_c_stops_the_answer_and_what_was_said_stays(make_chat):
    chat = make_chat(says("one ", "two ", "three"))
    chat.engine.interrupt_at = 1
    assert chat.ask("Count.") == INTERRUPTED
    assert chat.messages == [user("Count."), assistant("one two ")]
    assert len(chat.engine.cancelled) == 1
    assert "the answer so far is kept" in chat.err.getvalue()
    with pytest.raises(KeyboardInterrupt):  # as before outside of an answer
        signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("interrupt_at", [2, 3, 5])
def test_ctrl_c_in_a_tool_call_leaves_the_call_out(make_chat, interrupt_at):
    chat = make_chat((TOOL_PIECES, "stop"))
    chat.engine.interrupt_at = interrupt_at
    chat.ask("How much?")
    assert chat.messages[1:] == [assistant("It is ")]
    assert chat.out.getvalue().endswith("]\n")


def test_ctrl_c_before_the_first_word_takes_the_question_back(make_chat):
    chat = make_chat((TOOL_PIECES[1:], "stop"))
    chat.messages = [user("Hi"), assistant("Hello")]
    chat.engine.interrupt_at = 0
    chat.ask("How much?")
    assert chat.messages == [user("Hi"), assistant("Hello")]
    assert "the question is taken back" in chat.err.getvalue()


def test_ctrl_c_with_the_last_word_changes_nothing_and_at_the_prompt_the_chat_goes_on(make_chat):
    chat = make_chat(says("Hello"))
    chat.engine.interrupt_at = 0
    assert "kept" not in run_lines(chat, KeyboardInterrupt, "Hi")
    assert chat.messages == [user("Hi"), assistant("Hello")]
    assert chat.engine.cancelled == []


def test_turns_that_no_longer_fit_are_left_out_and_told(make_chat):
    chat = make_chat(*[says("cloud")] * 4, context=32, sampling=Sampling(max_tokens=1000))
    printed = run_lines(chat, *["river stone garden window"] * 4)
    assert all(len(prompt) <= 24 for prompt, _ in chat.engine.submitted)  # a quarter is kept for the reply
    assert "the model no longer sees the first 2 messages" in printed
    assert len(chat.messages) == 8


def test_a_question_that_cannot_be_asked_changes_nothing_but_an_answer_without_a_word_is_an_answer(make_chat):
    chat = make_chat(([], "stop"), context=40)
    printed = run_lines(chat, "Hi", "river " * 50, "half a \ud83c character")
    assert "error: the last message" in printed
    assert "lone surrogate" in printed
    assert "the model gave an empty answer" in printed
    assert chat.messages == [user("Hi"), assistant("")]


def test_an_answer_cut_by_length_can_go_on(make_chat, tokenizer):
    chat = make_chat(says("one ", reason="length"), says("two"))
    printed = run_lines(chat, "Count.", "/continue")
    assert "/continue goes on" in printed
    assert chat.messages == [user("Count."), assistant("one two")]
    first, second = (prompt for prompt, _ in chat.engine.submitted)
    assert second == first + tokenizer.encode("one ")


def test_another_try_replaces_the_answer_and_draws_anew(make_chat):
    chat = make_chat(says("one"), says("two"), sampling=Sampling(seed=5))
    run_lines(chat, "Count.", "/retry")
    assert chat.messages == [user("Count."), assistant("two")]
    (first, settings), (again, new_settings) = chat.engine.submitted
    assert first == again
    assert (settings.seed, new_settings.seed) == (5, 6)


def test_the_system_message_can_be_set_seen_and_removed(make_chat, tokenizer):
    chat = make_chat(*[says("Hello")] * 2, system="Be kind.")
    printed = run_lines(chat, "Hi", "/system  Be brief. ", "/clear", "/system", "Hi", "/system -", "/system")
    assert "(new conversation, with the same system message)" in printed
    assert printed.count("(system message: Be brief.)") == 2
    assert printed.count("(no system message)") == 2
    assert [tokenizer.decode(prompt).count("kind") for prompt, _ in chat.engine.submitted] == [1, 0]
    assert "<|user_start|>Be brief.\n\nHi<|user_end|>" in tokenizer.decode(chat.engine.submitted[1][0])


def test_settings_hold_for_the_next_answer(make_chat):
    chat = make_chat(says("Hello"))
    printed = run_lines(chat, "/temperature 0.5", "/topk 3", "/maxtokens 9", "Hi", "/topk")
    assert chat.engine.submitted[0][1] == Sampling(temperature=0.5, top_k=3, max_tokens=9)
    assert printed.count("(top_k 3)") == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("/tempreature 1", "unknown command /tempreature; did you mean /temperature? /help lists them"),
        ("/xyzzy", "unknown command /xyzzy; /help lists them"),
        ("/temperature cold", "temperature must be a number, not 'cold'"), ("/temperature -1", "temperature must be"),
        ("/temperature nan", "temperature must be"), ("/topk 1.5", "top_k must be a whole number, not '1.5'"),
        ("/maxtokens 0", "max_tokens must be"), ("/save", "/save needs the name of a file"),
        ("/save talk.json", "there is nothing to save yet"), ("/load", "/load needs the name of a file"),
        ("/load /absent/talk.json", "cannot read /absent/talk.json"), ("/retry", "there is no answer yet"),
        ("/continue", "there is no answer yet"),
    ],
)  # fmt: skip
def test_a_wrong_command_says_what_is_wrong_and_changes_nothing(make_chat, line, message):
    chat = make_chat()
    assert f"error: {message}" in run_lines(chat, line)
    assert (chat.messages, chat.sampling) == ([], Sampling())


def test_help_lists_every_command_and_quit_leaves_and_two_slashes_begin_a_message_with_one(make_chat):
    chat = make_chat(says("A folder."))
    printed = run_lines(chat, "/help", "", "  ", "//etc?", "/quit", "never read")
    assert all(f"{name} {command.argument}" in printed for name, command in COMMANDS.items())
    assert {"/clear", "/system", "/temperature", "/topk", "/save", "/load", "/help"} <= COMMANDS.keys()
    assert chat.messages == [user("/etc?"), assistant("A folder.")]


def test_a_conversation_is_saved_and_loaded_whole(make_chat, tmp_path):
    path = tmp_path / "my talks" / "talk.json"
    chat = make_chat((TOOL_PIECES, "stop"), says("Gern. 東京 🌿"), system="Be kind.")
    printed = run_lines(chat, "How much?", f"/save {path}", "Danke!")
    assert f"error: there is no folder {path.parent}; make it first" in printed
    assert not path.parent.exists()
    path.parent.mkdir()
    run_lines(chat, f"/save {path}")
    saved = json.loads(path.read_text(encoding="utf-8"))
    assert saved == chat.conversation
    assert "東京 🌿" in path.read_text(encoding="utf-8")

    other = make_chat(name="d4")
    printed = run_lines(other, f"/load {path}")
    assert other.conversation == saved
    assert "\nYou: Danke!\n\nd4: Gern. 東京 🌿\n" in printed


def test_a_question_at_the_end_of_a_loaded_conversation_is_answered(make_chat, tmp_path):
    path = tmp_path / "talk.json"
    path.write_text(json.dumps({"messages": [user("Hi"), assistant("Hello"), user("How much?")]}))
    chat = make_chat(says("408"), system="to be replaced", name="d4")
    printed = run_lines(chat, f"/load {path}")
    assert chat.conversation == {"messages": [user("Hi"), assistant("Hello"), user("How much?"), assistant("408")]}
    assert "\nYou: How much?\n\nd4: 408\n" in printed


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("no JSON", "is not JSON"), ("[" * 100_000, "is not JSON"), ("[1]", "a conversation must be"),
        ('{"messages": [{"role": "assistant", "content": "Hi"}]}', "message 1 must have the role 'user'"),
        ('{"messages": [{"role": "user", "content": "\\ud83c"}]}', "lone surrogate"),
    ],
)  # fmt: skip
def test_a_file_that_is_no_conversation_is_neither_loaded_nor_replaced(make_chat, tmp_path, content, message):
    path = tmp_path / "thesis.tex"
    path.write_text(content)
    chat = make_chat(says("Hello"))
    assert message in run_lines(chat, "Hi", f"/load {path}")
    assert chat.messages == [user("Hi"), assistant("Hello")]
    path.write_text("years of work")
    assert "is not a conversation; choose another name" in run_lines(chat, f"/save {path}")
    assert path.read_text() == "years of work"


def test_a_prompt_is_the_one_given_else_all_of_a_standard_input_that_is_no_terminal():
    def piped(content):
        return io.TextIOWrapper(io.BytesIO(content), encoding="ascii")

    lines = " zwei\nZeilen 🌿\n".encode()
    assert single_prompt("given", piped(lines)) == "given"
    assert single_prompt(None, piped(lines)) == "zwei\nZeilen 🌿"
    assert single_prompt(None, Tty()) is None
    for content, message in ((b" \n", "empty"), (b"caf\xe9", "not valid UTF-8 at byte 3")):
        with pytest.raises(UserError, match=message):
            single_prompt(None, piped(content))
