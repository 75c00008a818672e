"""Fixtures for the tests of the chat page: its scripted server and a browser that shows it.

A test module takes them with `pytest_plugins = ("chat_browser",)`. Without Playwright or a Chromium, tests that need a
browser are skipped, with the reason.
"""

import shutil
import threading
from pathlib import Path

import pytest
from chat_page import LONGEST_WAIT_SECONDS, FakeServer, Reply, says
from live_server import wait_until

from nanochat.serve.api import PAGE_PATH
from nanochat.serve.middleware import read_page


@pytest.fixture
def server():
    server = FakeServer()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


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
        self.input, self.alert = self.label("Message"), page.get_by_role("alert")
        self.answers = page.locator(".message.assistant .body")
        self.questions = page.locator(".message.user .body")

    @property
    def sent(self) -> list[dict]:
        """The messages of the last request."""
        return self.server.requests[-1]["messages"]

    @property
    def texts(self) -> list[str]:
        """The questions and answers in view."""
        return self.page.locator(".message .body").all_inner_texts()

    def label(self, text: str):
        return self.page.get_by_label(text, exact=True)

    def button(self, name: str, **options):
        return self.page.get_by_role("button", name=name, **options)

    def click(self, name: str, *replies: Reply, **options) -> None:
        self.server.script.extend(replies)
        self.button(name, **options).click()

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

    def ask(self, text: str, answer: str | Reply) -> None:
        self.send(text, says(answer) if isinstance(answer, str) else answer)
        self.wait_until_done()

    def edit(self, i: int, text: str, answer: str | Reply, *, wait: bool = True) -> None:
        """Sends the question in place `i` again in other words."""
        self.server.script.append(says(answer) if isinstance(answer, str) else answer)
        self.questions.nth(i).hover()
        self.button("Edit the message and send it again").nth(i).click()
        self.label("Edit the message").fill(text)
        self.label("Edit the message").press("Enter")
        if wait:
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
            context.set_default_timeout(1000 * LONGEST_WAIT_SECONDS)
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
    page.set_content(read_page(PAGE_PATH))
    yield page
    page.close()
