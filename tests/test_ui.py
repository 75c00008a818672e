"""The chat page in a real browser, against a small scripted server with the wire format of nanochat/server.py.

Without Playwright or a Chromium the tests of behaviour are skipped, with the reason; those of the file always run.
"""

import base64
import hashlib
import json
import re
import shutil
import socket
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "nanochat" / "ui.html"
LONGEST_WAIT_SECONDS = 10  # of a scripted reply for its test
ATTACK = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"


# --- the scripted server -------------------------------------------------------------------------


@dataclass
class Reply:
    """An answer to one chat request: `steps` are texts to send, seconds to wait, or events to wait for."""

    steps: list[str | bytes | float | threading.Event]
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)


def sse(**chunk) -> str:
    return f"data: {json.dumps(chunk, ensure_ascii=False)}\n\n"


def piece(content: str = "", **tool: str) -> str:
    """A piece of text, or of a tool call: `piece(python="1+1")`."""
    delta: dict = {"content": content}
    if tool:
        ((type_, text),) = tool.items()
        delta["nanochat"] = {"type": type_, "text": text}
    return sse(choices=[{"index": 0, "delta": delta, "finish_reason": None}], usage=None)


def head(*, num_dropped: int = 0, used: int = 100, limit: int = 2048) -> str:
    info = {"num_dropped_messages": num_dropped, "context": {"used": used, "limit": limit}}
    return sse(
        choices=[{"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}], nanochat=info
    )


def end(finish_reason: str = "stop", num_tokens: int = 12) -> str:
    return (
        sse(choices=[{"index": 0, "delta": {}, "finish_reason": finish_reason}])
        + sse(choices=[], usage={"prompt_tokens": 5, "completion_tokens": num_tokens})
        + "data: [DONE]\n\n"
    )


def says(*texts: str, finish_reason: str = "stop") -> Reply:
    return Reply([head(), *(piece(text) for text in texts), end(finish_reason)])


def refuses(status: int, message: str, code: str | None = None, **headers: str) -> Reply:
    error = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": code}}
    return Reply([json.dumps(error)], status, {"Content-Type": "application/json", **headers})


class FakeServer(ThreadingHTTPServer):
    """Serves the page, and the replies of `script` one after another; notes what it was asked."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/"
        self.script: deque[Reply] = deque()
        self.health = {"status": "ok", "model": "nanochat-d4", "message": ""}
        self.key = ""
        self.requests: list[dict] = []
        self.num_disconnects = 0
        self.page = PAGE.read_bytes()

    def handle_error(self, request, client_address):
        pass  # a browser that goes away is part of the tests


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer

    def log_message(self, *args):
        pass

    def do_GET(self):
        if self.path == "/":
            self._answer(
                200, {"Content-Type": "text/html", "Content-Security-Policy": policy(self.server.page.decode())}
            )
            self.wfile.write(self.server.page)
        elif self.path == "/health":
            self._answer(200 if self.server.health["status"] == "ok" else 503, {"Content-Type": "application/json"})
            self.wfile.write(json.dumps(self.server.health).encode())
        else:
            self._answer(404, {})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.server.key and self.headers["Authorization"] != f"Bearer {self.server.key}":
            reply = refuses(401, "The API key is missing or wrong.", "invalid_api_key")
        else:
            self.server.requests.append(body)
            reply = self.server.script.popleft()
        self._answer(reply.status, {"Content-Type": "text/event-stream", **reply.headers})
        try:
            for step in reply.steps:
                self._take(step)
        except OSError:
            self.server.num_disconnects += 1

    def _take(self, step: str | bytes | float | threading.Event) -> None:
        if isinstance(step, str | bytes):
            self.wfile.write(step.encode() if isinstance(step, str) else step)
            self.wfile.flush()
        elif isinstance(step, float):
            time.sleep(step)
        else:
            deadline = time.monotonic() + LONGEST_WAIT_SECONDS
            while not step.wait(0.02) and time.monotonic() < deadline:
                self.wfile.write(b": waiting\n")  # finds out whether the browser is still there

    def _answer(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()


def policy(page: str) -> str:
    """The content security policy of the real server: this script, this style, this host."""

    def source(tag: str) -> str:
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)[1]
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    return (
        f"default-src 'none'; script-src {source('script')}; style-src {source('style')}; connect-src 'self'; "
        "img-src 'self' data:; form-action 'none'; base-uri 'none'; frame-ancestors 'none'"
    )


@pytest.fixture
def server():
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


# --- the browser ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: the page is not tested")
    with api.sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome")
        path = next(filter(None, map(shutil.which, names)), playwright.chromium.executable_path)
        if not Path(path).exists():
            pytest.skip("no Chromium is installed: the page is not tested")
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


class Chat:
    """The page as a user has it: finds things by what a screen reader would say."""

    def __init__(self, page, server: FakeServer):
        self.page, self.server = page, server
        self.input = page.get_by_label("Message", exact=True)
        self.answers = page.locator(".message.assistant .body")
        self.questions = page.locator(".message.user .body")

    def button(self, name: str, **options):
        return self.page.get_by_role("button", name=name, **options)

    def send(self, text: str, *replies: Reply) -> None:
        self.server.script.extend(replies)
        self.input.fill(text)
        self.input.press("Enter")

    def wait_for(self, text: str) -> None:
        self.page.get_by_text(text).filter(visible=True).first.wait_for()

    def until(self, expression: str) -> None:
        """Waits for something in the page to be true; its policy forbids what Playwright has for this."""
        wait_until(lambda: self.page.evaluate(expression))

    def wait_until_done(self) -> None:
        self.until("state.replies.size === 0")
        self.until("!isUpdateDue")

    def ask(self, text: str, *answers: str) -> None:
        self.send(text, says(*answers))
        self.wait_until_done()

    def command(self, text: str) -> None:
        self.input.fill(text)
        self.page.keyboard.press("Escape")  # closes the list of commands
        self.input.press("Enter")
        self.until("!isUpdateDue")

    def is_overflowing(self) -> bool:
        return self.page.evaluate(
            "document.documentElement.scrollWidth > innerWidth || $('scroll').scrollWidth > innerWidth"
        )


@pytest.fixture
def open_chat(browser, server):
    """Opens the page in a fresh browser profile; afterwards no script may have failed nor the policy been broken."""
    contexts, faults = [], []

    def open_chat(*, width: int = 1280, height: int = 800, context=None, **options) -> Chat:
        if context is None:
            context = browser.new_context(viewport={"width": width, "height": height}, accept_downloads=True, **options)
            context.set_default_timeout(20_000)
            contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if "Security Policy" in message.text else None)
        page.on("request", lambda request: faults.append(request.url) if not is_own(request.url) else None)
        page.goto(server.url)
        return Chat(page, server)

    def is_own(url: str) -> bool:
        return url.startswith((server.url, "data:image/svg+xml", "blob:"))

    yield open_chat
    for context in contexts:
        context.close()
    assert faults == []


@pytest.fixture
def chat(open_chat) -> Chat:
    return open_chat()


@pytest.fixture(scope="module")
def script(browser):
    """A page to try the functions of the script in."""
    page = browser.new_page()
    page.set_content(PAGE.read_text())
    yield page
    page.close()


# --- the file ------------------------------------------------------------------------------------


def test_the_page_is_one_file_that_builds_no_html_from_text():
    page = PAGE.read_text()
    assert page.count("<script>") == page.count("<style>") == 1
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert forbidden not in page
    markup = page[: page.index("<script>")]
    assert not re.search(r"\s(on\w+|style)=", markup)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", markup)


def test_text_keeps_its_contrast_in_light_and_dark():
    """WCAG AA: 4.5 to 1 for text on every surface it stands on, 3 to 1 for the borders of fields."""
    colours = {
        name: (light, dark)
        for name, light, dark in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", PAGE.read_text())
    }
    pairs = [("text", surface, 4.5) for surface in ("page", "side", "card", "raised", "hover", "tint", "danger-tint")]
    pairs += [("soft", surface, 4.5) for surface in ("page", "side", "card", "raised", "hover")]
    pairs += [("accent", surface, 4.5) for surface in ("page", "raised", "tint")]
    pairs += [("on-accent", "accent", 4.5), ("warn", "warn-tint", 4.5), ("warn", "page", 4.5)]
    pairs += [("danger", "danger-tint", 4.5), ("danger", "page", 4.5), ("edge", "page", 3), ("edge", "raised", 3)]
    poor = [
        (name, surface, theme, round(contrast(colours[name][i], colours[surface][i]), 2))
        for name, surface, least in pairs
        for i, theme in enumerate(("light", "dark"))
        if contrast(colours[name][i], colours[surface][i]) < least
    ]
    assert poor == []


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


# --- asking and answering ------------------------------------------------------------------------


def test_a_message_is_sent_and_its_answer_streams_in(chat):
    gate = threading.Event()
    chat.send("Hello there", Reply([head(), piece("Good "), gate, piece("morning."), end()]))
    chat.wait_for("Good")
    assert chat.questions.all_inner_texts() == ["Hello there"]
    assert chat.input.input_value() == ""
    gate.set()
    chat.wait_for("Good morning.")
    chat.wait_until_done()
    (request,) = chat.server.requests
    assert request["messages"] == [{"role": "user", "content": "Hello there"}]
    assert (request["temperature"], request["top_k"], request["max_tokens"], request["stream"]) == (0.8, 50, 512, True)
    assert "12 tokens" in chat.page.locator(".stats").inner_text()
    assert chat.page.locator("#live").inner_text() == "Answer: Good morning."


def test_a_conversation_is_sent_whole_with_the_tool_calls_of_its_answers(chat):
    tool = [
        piece(python=""),
        piece(python="12"),
        piece(python="*7"),
        piece(python_output=""),
        piece(python_output="84"),
    ]
    chat.send("What is 12*7?", Reply([head(), piece("Let me see: "), *tool, piece("84."), end()]))
    chat.wait_until_done()
    assert chat.page.locator(".tool summary code").inner_text() == "12*7 = 84"
    assert not chat.page.locator(".tool dd").first.is_visible()
    chat.page.locator(".tool summary").click()
    assert chat.page.locator(".tool dd").all_inner_texts() == ["12*7", "84"]
    chat.ask("Thanks", "Welcome.")
    assert chat.server.requests[1]["messages"][1] == {
        "role": "assistant",
        "content": [
            {"type": "text", "text": "Let me see: "},
            {"type": "python", "text": "12*7"},
            {"type": "python_output", "text": "84"},
            {"type": "text", "text": "84."},
        ],
    }
    assert chat.page.locator(".tool").get_attribute("open") is not None, "a block that was opened stays open"


def test_characters_and_lines_cut_in_the_stream_arrive_whole(chat):
    whole = (head() + piece("naïve 東京 👩‍🚀 é") + end()).replace("\n", "\r\n").encode()
    steps: list = []
    for i in range(0, len(whole), 7):
        steps += [whole[i : i + 7], 0.001]
    chat.send("Go", Reply(steps))
    chat.wait_until_done()
    assert chat.answers.inner_text() == "naïve 東京 👩‍🚀 é"


def test_stop_ends_the_request_and_keeps_what_was_said(chat):
    chat.send("Tell me a story", Reply([head(), piece("Once upon a time"), threading.Event()]))
    chat.wait_for("Once upon a time")
    chat.button("Stop the answer").click()
    chat.wait_for("Stopped.")
    wait_until(lambda: chat.server.num_disconnects == 1)
    assert chat.answers.inner_text() == "Once upon a time"
    chat.send("", says(" there was a fox."))
    chat.button("Continue").click()
    chat.wait_until_done()
    assert chat.server.requests[1]["messages"][-1] == {"role": "assistant", "content": "Once upon a time"}
    assert chat.answers.inner_text() == "Once upon a time there was a fox."


def test_escape_stops_the_answer(chat):
    chat.send("Tell me a story", Reply([head(), piece("Once"), threading.Event()]))
    chat.wait_for("Once")
    chat.page.keyboard.press("Escape")
    chat.wait_for("Stopped.")
    wait_until(lambda: chat.server.num_disconnects == 1)


def test_an_answer_cut_by_its_limit_can_be_gone_on_with(chat):
    chat.send("Count", says("one, two", finish_reason="length"))
    chat.wait_for("Reached its length limit.")
    chat.server.script.append(says(", three"))
    chat.button("Continue").click()
    chat.wait_until_done()
    assert chat.answers.inner_text() == "one, two, three"
    assert chat.button("Continue").count() == 0


def test_a_question_is_edited_and_sent_again_and_that_can_be_undone(chat):
    chat.ask("First", "Answer one")
    chat.ask("Second", "Answer two")
    chat.questions.first.hover()
    chat.button("Edit the message and send it again").first.click()
    editor = chat.page.get_by_label("Edit the message", exact=True)
    assert editor.input_value() == "First"
    editor.fill("First, mended")
    chat.server.script.append(says("Answer three"))
    editor.press("Enter")
    chat.wait_for("Answer three")
    chat.wait_until_done()
    assert chat.server.requests[-1]["messages"] == [{"role": "user", "content": "First, mended"}]
    assert chat.answers.all_inner_texts() == ["Answer three"]
    assert chat.page.locator(".row").all_inner_texts() == ["First, mended"]
    chat.button("Undo").click()
    chat.wait_for("Answer two")
    assert chat.questions.all_inner_texts() == ["First", "Second"]
    assert chat.page.locator(".row").all_inner_texts() == ["First"]


def test_editing_can_be_left_with_escape(chat):
    chat.ask("First", "Answer one")
    chat.input.press("ArrowUp")
    chat.page.get_by_label("Edit the message", exact=True).fill("other")
    chat.page.keyboard.press("Escape")
    chat.page.get_by_label("Edit the message", exact=True).wait_for(state="detached")
    assert chat.questions.all_inner_texts() == ["First"]
    assert chat.input.evaluate("node => node === document.activeElement")


def test_regenerating_keeps_the_earlier_versions(chat):
    chat.ask("Name a colour", "Red")
    chat.server.script.append(says("Turquoise"))
    chat.button("Answer again").click()
    chat.wait_for("Turquoise")
    chat.wait_until_done()
    assert chat.server.requests[1]["messages"] == [{"role": "user", "content": "Name a colour"}]
    chat.button("Earlier version").click()
    chat.wait_for("Red")
    assert chat.page.locator(".count").inner_text() == "1/2"
    chat.ask("Why?", "Because.")
    assert chat.server.requests[2]["messages"][1] == {"role": "assistant", "content": "Red"}, "what is shown is sent"


def test_two_conversations_answer_at_once_without_mixing(chat):
    gates = threading.Event(), threading.Event()
    chat.send("One", Reply([head(), piece("alpha "), gates[0], piece("beta"), end()]))
    chat.wait_for("alpha")
    chat.button("New chat").click()
    chat.send("Two", Reply([head(), piece("gamma "), gates[1], piece("delta"), end()]))
    chat.wait_for("gamma")
    gates[0].set()
    chat.until("state.replies.size === 1")
    gates[1].set()
    chat.wait_until_done()
    assert chat.answers.all_inner_texts() == ["gamma delta"]
    chat.button("One", exact=True).click()
    chat.wait_for("alpha beta")
    assert chat.answers.all_inner_texts() == ["alpha beta"]


def test_enter_sends_but_not_with_shift_nor_while_composing(chat):
    chat.input.fill("first line")
    chat.input.press("Shift+Enter")
    chat.page.keyboard.type("second line")
    chat.input.evaluate(
        "node => node.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, bubbles: true}))"
    )
    assert chat.server.requests == []
    chat.server.script.append(says("ok"))
    chat.input.press("Enter")
    chat.wait_until_done()
    assert chat.server.requests[0]["messages"][0]["content"] == "first line\nsecond line"


# --- what stays in the browser -------------------------------------------------------------------


def test_reloading_keeps_conversations_and_settings(chat):
    chat.ask("Remember the **moon**", "I *will*.")
    chat.command("/temperature 0.3")
    chat.button("New chat").click()
    chat.ask("Another", "Yes.")
    chat.page.reload()
    chat.wait_for("Yes.")
    chat.button("Remember the **moon**", exact=True).click()
    chat.wait_for("I will.")
    assert chat.questions.inner_text() == "Remember the **moon**"
    chat.ask("And now?", "Still.")
    request = chat.server.requests[-1]
    assert request["temperature"] == 0.3
    assert [message["role"] for message in request["messages"]] == ["user", "assistant", "user"]


def test_reloading_in_the_middle_of_an_answer_keeps_what_had_come(chat):
    chat.send("Tell me", Reply([head(), piece("It began"), threading.Event()]))
    chat.wait_for("It began")
    chat.page.reload()
    chat.wait_for("Stopped.")
    assert chat.answers.inner_text() == "It began"
    assert chat.button("Continue").is_visible()


def test_an_export_imports_as_the_same_conversations_once(chat, open_chat, tmp_path):
    chat.command("/system Be brief.")
    tool = [piece(python=""), piece(python="1+1"), piece(python_output=""), piece(python_output="2")]
    chat.send("Sum?", Reply([head(), *tool, piece("Two."), end()]))
    chat.wait_until_done()
    with chat.page.expect_download() as download:
        chat.button("Export").click()
    path = tmp_path / "export.json"
    download.value.save_as(path)
    (exported,) = json.loads(path.read_text())["conversations"]
    assert exported["messages"][0] == {"role": "system", "content": "Be brief."}
    other = open_chat()
    for expected in ("1 conversation imported.", "0 conversations imported, 1 already here."):
        other.page.get_by_label("File of conversations").set_input_files(path)
        other.wait_for(expected)
    other.button("Sum?", exact=True).click()
    other.ask("More?", "No.")
    assert other.server.requests[-1]["messages"] == [*exported["messages"], {"role": "user", "content": "More?"}]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("not json", "holds no conversations"),
        ('{"a": 1}', "holds no conversations"),
        ('[{"messages": []}]', "1 refused: conversation 1 has no messages"),
        ('[{"messages": [{"role": "assistant", "content": "x"}]}]', "1 refused: conversation 1 has the role"),
        ('[{"messages": [{"role": "user", "content": {}}]}, null]', "2 refused: conversation 1 has a question"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}\n[{"role": "user", "content": "b"}]\n',
            "2 conversations imported.",
        ),
    ],
)
def test_an_import_says_what_it_refuses(chat, tmp_path, text, words):
    path = tmp_path / "file.jsonl"
    path.write_text(text)
    chat.page.get_by_label("File of conversations").set_input_files(path)
    chat.wait_for(words)


def test_a_deleted_conversation_comes_back_by_undo(chat):
    chat.ask("Keep me", "Yes.")
    chat.page.get_by_role("button", name="Keep me", exact=True).hover()
    chat.button("Delete Keep me").click()
    chat.wait_for("No conversations yet")
    assert chat.page.evaluate("Object.keys(localStorage).filter((key) => key.startsWith(PREFIX))") == []
    chat.button("Undo").click()
    chat.wait_for("Yes.")
    chat.page.reload()
    chat.wait_for("Yes.")


def test_a_conversation_is_renamed(chat):
    chat.ask("Old name", "Yes.")
    chat.button("Old name", exact=True).hover()
    chat.button("Rename Old name").click()
    chat.page.get_by_label("Title", exact=True).fill("New name")
    chat.page.keyboard.press("Enter")
    chat.button("New name", exact=True).wait_for()
    assert chat.page.title() == "New name · nanochat"


def test_two_tabs_do_not_overwrite_each_other(chat, open_chat):
    other = open_chat(context=chat.page.context)
    chat.ask("From one tab", "One.")
    other.ask("From the other tab", "Two.")
    for tab in (chat, other):
        tab.button("From one tab", exact=True).wait_for()
        tab.button("From the other tab", exact=True).wait_for()


def test_what_is_no_conversation_in_the_storage_is_left_alone(chat):
    chat.ask("Kept", "Yes.")
    for i, text in enumerate(("", "{", "null", "{}", '{"messages": [{}, {}]}', '{"messages": [{"text": "half"}]}')):
        chat.page.evaluate("([i, text]) => localStorage.setItem(PREFIX + i, text)", [i, text])
    chat.page.reload()
    chat.wait_for("Yes.")
    assert chat.page.locator(".row").all_inner_texts() == ["Kept"]
    assert chat.page.evaluate("localStorage.getItem(PREFIX + 1)") == "{"


def test_full_storage_is_said_and_the_conversation_goes_on(chat):
    chat.page.evaluate(
        "void (Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); })"
    )
    chat.input.evaluate("node => node.value = 'Hello'")
    chat.server.script.append(says("Hi."))
    chat.button("Send", exact=True).evaluate("node => node.form.requestSubmit()")
    chat.wait_for("The browser keeps nothing more")
    chat.wait_for("Hi.")


# --- text stays text -----------------------------------------------------------------------------


def test_scripts_in_any_text_stay_text(chat, tmp_path):
    blocks = (ATTACK, f"```{ATTACK.replace(' ', '')}\n{ATTACK}\n```", f"| a |\n|---|\n| {ATTACK} |", f"- {ATTACK}")
    nasty = "\n\n".join((*blocks, f"> {ATTACK}", f"# {ATTACK}", f"[{ATTACK}](https://example.com)"))
    tool = [piece(python=""), piece(python=ATTACK), piece(python_output=""), piece(python_output=ATTACK)]
    chat.server.health["model"] = ATTACK
    chat.page.reload()
    chat.send(ATTACK, Reply([head(), piece(nasty), *tool, end()]))
    chat.wait_until_done()
    path = tmp_path / "import.json"
    messages = [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": ATTACK}]
    path.write_text(json.dumps([{"title": ATTACK, "messages": messages, "__proto__": {"pwned": 1}}]))
    chat.page.get_by_label("File of conversations").set_input_files(path)
    chat.wait_for("1 conversation imported.")
    chat.send("again", refuses(400, ATTACK))
    chat.wait_for("The server refused the request.")
    assert chat.questions.first.inner_text() == ATTACK
    assert ATTACK in chat.answers.first.inner_text()
    assert chat.page.locator("#main :is(script, img, iframe), #sidebar :is(script, img, iframe)").count() == 0
    assert chat.page.evaluate("window.pwned") is None
    assert chat.page.evaluate("({}).pwned") is None


def test_only_web_and_mail_addresses_become_links(chat):
    chat.ask(
        "Links?",
        "[good](https://example.com/a_(b)) [mail](mailto:a@b.c) https://example.org/x. [bad](javascript:alert(1)) "
        "[worse](data:text/html,x) ![image](https://example.net/i.png) [**bold**](http://example.com)",
    )
    links = chat.answers.locator("a")
    expected = ["https://example.com/a_(b)", "mailto:a@b.c", "https://example.org/x", "https://example.net/i.png"]
    assert links.evaluate_all("nodes => nodes.map((node) => node.href)") == [*expected, "http://example.com/"]
    assert set(links.evaluate_all("nodes => nodes.map((node) => node.rel)")) == {"noopener noreferrer"}
    assert "[bad](javascript:alert(1))" in chat.answers.inner_text()
    assert chat.answers.locator("img").count() == 0, "the browser asks no other host for a picture"


@pytest.mark.parametrize(
    ("source", "html"),
    [
        ("a **b** _c_ ~~d~~ `e*f*`", "<p>a <strong>b</strong> <em>c</em> <del>d</del> <code>e*f*</code></p>"),
        ("***both*** and **_nested_**", "<p><strong><em>both</em></strong> and <strong><em>nested</em></strong></p>"),
        ("2 * 3 * 4, snake_case_name, **open", "<p>2 * 3 * 4, snake_case_name, **open</p>"),
        (r"\*not\* `` a`b ``", "<p>*not* <code>a`b</code></p>"),
        ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
        ("# A\n### B ##\n---", "<h3>A</h3><h5>B</h5><hr>"),
        (
            "- a\n- b\n  - c\n\n1. x\n2. y",
            "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>x</li><li>y</li></ol>",
        ),
        ("3. a\n\n   more\n4. b", "<ol><li><p>a</p><p>more</p></li><li>b</li></ol>"),
        ("born in\n1986. It was", "<p>born in<br>1986. It was</p>"),
        ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
        (
            "| a | b |\n|:-:|--:|\n| 1 | `x\\|y` |",
            "<table><thead><tr><th>a</th><th>b</th></tr></thead><tbody><tr><td>1</td><td><code>x|y</code></td></tr></tbody></table>",
        ),
        ("a | b\nno table", "<p>a | b<br>no table</p>"),
        ("- [x] done\n- [ ] open", "<ul><li>☑ done</li><li>☐ open</li></ul>"),
        ("&amp; <b>x</b>", "<p>&amp;amp; &lt;b&gt;x&lt;/b&gt;</p>"),
    ],
)
def test_markdown_becomes_elements(script, source, html):
    shown = script.evaluate(
        "(text) => { const node = h('div'); showMarkdown(node, text); return node.innerHTML; }", source
    )
    shown = re.sub(r' (class|scope|start|tabindex|role|aria-label)="[^"]*"', "", shown)
    assert shown.replace("<div>", "").replace("</div>", "") == html


def test_an_unfinished_code_block_is_shown_and_copied(chat):
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    gate = threading.Event()
    chat.send(
        "Code?", Reply([head(), piece("Here:\n```python\nprint(1)\n"), gate, piece("print(2)\n```\nDone."), end()])
    )
    chat.page.locator("pre").wait_for()
    block = chat.page.locator("pre").element_handle()
    gate.set()
    chat.wait_until_done()
    assert block.inner_text() == "print(1)\nprint(2)", "the block stays the same element while it grows"
    chat.button("Copy", exact=True).click()
    chat.page.locator(".code").get_by_text("Copied").wait_for()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "print(1)\nprint(2)"


@pytest.mark.parametrize(
    "unit",
    [
        "*",
        "_",
        "`",
        "[",
        "](",
        "**a ",
        "~~",
        "> ",
        "- ",
        "  - a\n",
        "|",
        "|-",
        "#",
        "<",
        "\n",
        " ",
        "![x](",
        "http://",
        "``` \n",
    ],
)
def test_no_text_freezes_the_page(script, unit):
    milliseconds = script.evaluate(
        """(text) => {
          const begun = performance.now();
          showMarkdown(h("div"), text);
          return performance.now() - begun;
        }""",
        (unit * 50_000)[:50_000],
    )
    assert milliseconds < 1500


# --- when things go wrong ------------------------------------------------------------------------

FAILURES = {
    "queue full": (
        refuses(429, "queue is full", "queue_full", **{"Retry-After": "7"}),
        "Try again in about 7 seconds.",
    ),
    "context": (refuses(400, "It has 3000 tokens.", "context_length_exceeded"), "The message is too long."),
    "refused": (refuses(400, "top_k must be at least 0"), "top_k must be at least 0"),
    "html": (Reply(["<html>bad gateway</html>"], 502), "It answered with status 502."),
    "broken": (Reply([head(), piece("Well")]), "The answer broke off."),
    "empty": (Reply([]), "The answer broke off."),
    "in the stream": (
        Reply([head(), sse(error={"message": "the worker stopped", "code": None})]),
        "the worker stopped",
    ),
    "no json": (Reply(["data: {oops\n\n"]), "The answer could not be read."),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_said_in_words_and_can_be_retried(chat, name):
    reply, words = FAILURES[name]
    chat.send("Hello", reply)
    chat.page.get_by_role("alert").get_by_text(words).wait_for()
    chat.server.script.append(says("There you are."))
    chat.button("Retry").click()
    chat.wait_for("There you are.")
    chat.wait_until_done()
    assert chat.page.get_by_role("alert").count() == 0
    assert chat.server.requests[-1]["messages"] == [{"role": "user", "content": "Hello"}]


def test_a_server_that_is_gone_is_said_and_noticed_when_it_is_back(chat):
    chat.page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    chat.page.route("**/health", lambda route: route.abort("connectionrefused"))
    chat.send("Hello")
    chat.page.get_by_role("alert").get_by_text("The server cannot be reached.").wait_for()
    chat.page.locator("#server-note").get_by_text("Trying again and again").wait_for()
    chat.page.unroute("**/v1/**")
    chat.page.unroute("**/health")
    chat.page.evaluate("checkHealth()")
    chat.page.locator("#server-note").wait_for(state="hidden")


def test_a_question_without_an_answer_is_left_out_of_later_requests(chat):
    chat.send("Lost", refuses(500, "broken"))
    chat.page.get_by_role("alert").wait_for()
    chat.ask("Found", "Yes.")
    assert chat.server.requests[-1]["messages"] == [{"role": "user", "content": "Found"}]


def test_the_key_is_asked_for_and_the_message_sent_again_with_it(chat):
    chat.server.key = "sesame"
    chat.send("Hello", says("Welcome."))
    field = chat.page.get_by_role("dialog").get_by_label("API key")
    field.fill("sesame")
    field.press("Enter")
    chat.wait_for("Welcome.")
    assert "sesame" not in chat.page.evaluate("JSON.stringify({...localStorage})")
    chat.page.reload()
    chat.ask("Again", "Still known.")
    assert chat.answers.all_inner_texts()[-1] == "Still known."


def test_a_message_written_while_the_model_loads_is_answered_when_it_is_ready(open_chat, server):
    server.health["status"] = "loading"
    chat = open_chat()
    chat.wait_for("The model is loading.")
    chat.send("Early", says("Now I am here."))
    chat.wait_for("Waiting for the model to load")
    assert server.requests == []
    server.script.appendleft(refuses(503, "still loading", "model_loading"))
    server.health["status"] = "ok"
    chat.wait_for("Now I am here.")
    chat.page.locator("#server-note").wait_for(state="hidden")


def test_a_model_that_cannot_be_loaded_is_said_with_the_reason(open_chat, server):
    server.health.update(status="failed", message="no checkpoint in the folder")
    open_chat().wait_for("The model could not be loaded: no checkpoint in the folder")


def test_dropped_messages_are_said_and_marked_and_the_meter_shows_the_context(chat):
    for i in range(3):
        chat.ask(f"Question {i}", f"Answer {i}")
    chat.send("Question 3", Reply([head(num_dropped=4, used=1900), piece("Answer 3"), end()]))
    chat.wait_until_done()
    chat.wait_for("Not all fits the context of 2,048 tokens: the model answered without the oldest 4 messages.")
    order = chat.page.locator("#transcript > *").evaluate_all("nodes => nodes.map((node) => node.className)")
    assert order.index("divider") == 4
    assert chat.page.locator("#meter").inner_text().strip() == "1,900 of 2,048 tokens"
    assert "full" in chat.page.locator("#meter").get_attribute("class")


# --- settings and commands -----------------------------------------------------------------------


def test_settings_are_checked_kept_and_sent(chat):
    chat.button("Settings").click()
    page = chat.page
    page.get_by_label("Temperature", exact=True).fill("3")
    page.get_by_text("The temperature must be a number from 0 to 2.").wait_for()
    page.get_by_label("Temperature", exact=True).fill("0.25")
    page.get_by_label("Top-k").fill("7")
    page.get_by_label("Longest answer").fill("99")
    page.get_by_label("System prompt").fill("Speak like a pirate.")
    page.get_by_role("group", name="Colours").get_by_text("Dark").click()
    chat.button("Done").click()
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    page.reload()
    chat.ask("Hello", "Arr.")
    request = chat.server.requests[0]
    assert (request["temperature"], request["top_k"], request["max_tokens"]) == (0.25, 7, 99)
    assert request["messages"][0] == {"role": "system", "content": "Speak like a pirate."}


def test_commands_are_offered_completed_and_run(chat):
    chat.input.fill("/t")
    options = chat.page.get_by_role("option")
    options.first.wait_for()
    assert [text.split()[0] for text in options.all_inner_texts()] == ["/temperature", "/topk"]
    chat.input.press("ArrowDown")
    chat.input.press("Enter")
    assert chat.input.input_value() == "/topk "
    chat.page.keyboard.type("5")
    chat.input.press("Enter")
    chat.wait_for("The top-k is now 5.")
    chat.command("/max 0")
    chat.wait_for("must be a whole number from 1")
    chat.command("/nonsense")
    chat.wait_for("There is no command /nonsense;")
    assert chat.input.input_value() == "/nonsense"
    chat.send(" /nonsense", says("ok"))
    chat.wait_until_done()
    assert chat.server.requests[0]["messages"][0]["content"] == "/nonsense"
    chat.command("/help")
    assert chat.page.get_by_role("dialog").is_visible()


# --- layout and access ---------------------------------------------------------------------------

WIDE = (
    "x" * 300
    + "\n\n```\n"
    + "y" * 300
    + "\n```\n\n| "
    + " | ".join("column" * 3 for _ in range(8))
    + " |\n"
    + "|---" * 8
    + "|\n"
)


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_runs_over_the_edge(open_chat, width):
    chat = open_chat(width=width, height=640)
    assert not chat.is_overflowing()
    chat.send(
        "z" * 300,
        Reply([head(num_dropped=2), piece(WIDE), piece(python="1" * 300), piece(python_output="2" * 300), end()]),
    )
    chat.wait_until_done()
    assert not chat.is_overflowing()
    box = chat.input.bounding_box()
    assert box["x"] >= 0
    assert box["x"] + box["width"] <= width
    assert box["y"] + box["height"] <= 640
    chat.button("Settings").click()
    dialog = chat.page.get_by_role("dialog").bounding_box()
    assert dialog["x"] >= 0
    assert dialog["x"] + dialog["width"] <= width


def test_on_a_phone_the_conversations_are_in_a_drawer(open_chat):
    chat = open_chat(width=390, height=844, has_touch=True, is_mobile=True)
    chat.ask("Hello", "Hi.")
    assert not chat.page.locator("#sidebar").is_visible()
    chat.button("Show conversations").click()
    chat.page.locator("#sidebar").wait_for()
    assert chat.page.locator("#main").evaluate("node => node.inert")
    chat.page.keyboard.press("Escape")
    chat.page.locator("#sidebar").wait_for(state="hidden")
    chat.button("Show conversations").click()
    chat.button("New chat").click()
    chat.page.locator("#sidebar").wait_for(state="hidden")
    chat.wait_for("What would you like to talk about?")


def test_the_view_follows_the_answer_until_the_reader_scrolls_up(chat):
    gates = [threading.Event() for _ in range(3)]
    lines = ["".join(f"{part}-{i}\n\n" for i in range(40)) for part in "abcd"]
    steps: list = [head(), piece(lines[0])]
    for gate, line in zip(gates, lines[1:], strict=True):
        steps += [gate, piece(line)]
    chat.send("Long", Reply([*steps, end()]))
    distance = "$('scroll').scrollHeight - $('scroll').scrollTop - $('scroll').clientHeight"
    chat.wait_for("a-39")
    gates[0].set()
    chat.wait_for("b-39")
    chat.until(f"{distance} < 5")
    chat.page.mouse.move(700, 300)
    chat.page.mouse.wheel(0, -400)
    chat.until("!state.isFollowing")
    top = chat.page.evaluate("$('scroll').scrollTop")
    gates[1].set()
    chat.page.locator("p", has_text="c-39").wait_for(state="attached")
    assert abs(chat.page.evaluate("$('scroll').scrollTop") - top) < 2
    chat.button("Latest").click()
    chat.until(f"{distance} < 5")
    gates[2].set()
    chat.page.locator("p", has_text="d-39").wait_for(state="attached")
    chat.until(f"{distance} < 5")


def test_everything_that_can_be_used_has_a_name_and_is_reached_by_keyboard(chat):
    chat.ask("Hello", "```\ncode\n```\n\n| a |\n|---|\n| b |")
    unnamed = chat.page.evaluate(
        """[...document.querySelectorAll("button, input, textarea, [role=group], dialog")].filter((node) =>
          !(node.getAttribute("aria-label") || node.getAttribute("aria-labelledby") || node.labels?.length
            || node.textContent.trim())).map((node) => node.outerHTML)"""
    )
    assert unnamed == []
    chat.page.evaluate("document.activeElement.blur()")
    seen = set()
    for _ in range(40):
        chat.page.keyboard.press("Tab")
        seen.add(
            chat.page.evaluate(
                "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent.trim()"
            )
        )
    expected = {
        "To the message field",
        "New chat",
        "Hello",
        "Delete Hello",
        "Copy the message",
        "Copy",
        "Table",
        "Settings",
    }
    assert expected <= seen


def test_dark_colours_follow_the_system_and_can_be_chosen(open_chat):
    chat = open_chat(color_scheme="dark")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    assert chat.page.evaluate(background) == "rgb(25, 25, 24)"
    chat.button("Light colours").click()
    chat.until(f"{background} === 'rgb(252, 251, 249)'")
    chat.page.reload()
    assert chat.page.evaluate(background) == "rgb(252, 251, 249)"


def wait_until(holds, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.01)


def test_the_page_is_usable_where_the_browser_refuses_storage(open_chat, browser, server):
    context = browser.new_context()
    context.add_init_script(
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError'); }})"
    )
    chat = open_chat(context=context)
    chat.ask("Hello", "Hi.")
    assert chat.answers.inner_text() == "Hi."
    context.close()


def test_the_fake_server_listens_on_loopback_only(server):
    assert socket.gethostbyname(server.server_address[0]) == "127.0.0.1"
