"""Screenshots of the chat page in its states, with scripted replies, to look at after changing nanochat/serve/ui.html.

    python -m dev.screenshots --out shots                     # all scenes, without a server
    python -m dev.screenshots --out shots --only error        # scenes whose name contains "error"

Needs Playwright and a Chromium (or its path in --chromium). The page is loaded from the file and its requests are
answered here; nothing goes to the network.
"""

import argparse
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from playwright.sync_api import Browser, Page, Route, sync_playwright

from nanochat.serve.api import PAGE_PATH
from nanochat.serve.middleware import read_page

ADDRESS = "http://nanochat.test/"
DESKTOP, PHONE, NARROW = (1280, 800), (390, 844), (320, 640)

LONG_ANSWER = """Here is a small program that counts words, and what it finds.

```python
from collections import Counter
from pathlib import Path

def count_words(path: Path, *, num_shown: int = 10) -> list[tuple[str, int]]:
    \"\"\"The most frequent words of a text with their counts, in lower case, without punctuation at their ends.\"\"\"
    words = path.read_text().lower().split()
    return Counter(word.strip(".,;:!?") for word in words).most_common(num_shown)
```

Run on *Moby Dick* it gives:

| word | count | share | where it is met first |
|:-----|------:|------:|-----------------------|
| the  | 14,431 | 6.7 % | chapter 1, first line |
| of   | 6,609 | 3.1 % | the title page |
| whale | 1,226 | 0.6 % | Etymology |

### What to look at

1. The first words are **always** small ones.
2. `strip` takes off punctuation at both ends, so that
   - *whale,* and *whale* are one word,
   - but *whale's* is another.
3. A [stop list](https://en.wikipedia.org/wiki/Stop_word) leaves them out.

> Call me Ishmael. Some years ago, never mind how long precisely, I thought I would sail about a little.
"""
CARD = {
    "context": 2048, "max_tokens": 2048, "stage": "rl", "step": 466, "parameters": 560_988_160, "temperature": 0.6,
    "top_k": 50, "examples": ["Why is the sky blue?", "Write a short poem about a lighthouse in winter.",
                              "What is 12.5 * 384?", "How many r are in strawberry?"],
}  # fmt: skip
CODE_ANSWER = """In JavaScript, in C, and from the shell:

```js
// doubles what is even
const doubled = [1, 2, 3].filter((n) => n % 2 === 0).map((n) => `${n * 2}`);
```

```c
int main(void) { printf("%d\\n", 6 * 7); return 0; }
```

```bash
$ python -m scripts.chat_cli --temperature 0.6  # ends with Ctrl+D
```

The roots of $a x^2 + b_1 x + c_1 = 0$ are

$$
x = \\frac{-b_1 \\pm \\sqrt{b_1^2 - 4 a c_1}}{2a}
$$

and cost $5 and $6.
"""
TOOL_ANSWER = [
    ("text", "Twelve and a half percent is an eighth. "),
    ("python", "12.5 / 100 * 384"),
    ("python_output", "48.0"),
    ("text", "So 12.5 % of 384 is **48**."),
]


@dataclass(frozen=True)
class Scene:
    name: str
    play: Callable[["Stage"], None]
    size: tuple[int, int] = DESKTOP
    theme: str = "light"


class Stage:
    """A browser page and the scripted replies of its server."""

    def __init__(self, page: Page):
        self.page = page
        self.health = {"status": "ok", "model": "nanochat-d20", "message": ""}
        self.card = CARD
        self.reply: Callable[[Route], None] = lambda route: None  # never answers
        page.route("**/*", self._serve)

    def _serve(self, route: Route) -> None:
        path = route.request.url.removeprefix(ADDRESS)
        if path == "":
            route.fulfill(body=read_page(PAGE_PATH), content_type="text/html")
        elif path == "v1/models":
            route.fulfill(json={"data": [{"id": self.health["model"], "nanochat": self.card}]})
        elif path == "health":
            route.fulfill(json=self.health)
        else:
            self.reply(route)

    def start(self) -> None:
        self.page.goto(ADDRESS)
        self.page.wait_for_timeout(150)

    def ask(
        self, text: str, *parts: tuple[str, str], finish: str = "stop", used: int = 412, num_dropped: int = 0
    ) -> None:
        chunks = [
            {"choices": [], "nanochat": {"num_dropped_messages": num_dropped, "context": {"used": used, "limit": 2048}}}
        ]
        for type_, piece in parts:
            delta = (
                {"content": piece} if type_ == "text" else {"content": "", "nanochat": {"type": type_, "text": piece}}
            )
            chunks.append({"choices": [{"index": 0, "delta": delta, "finish_reason": None}]})
        chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]})
        chunks.append({"choices": [], "usage": {"completion_tokens": 37}})
        body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
        self.reply = lambda route: route.fulfill(body=body, content_type="text/event-stream")
        self.send(text)

    def fail(self, text: str, status: int, message: str, **headers: str) -> None:
        self.reply = lambda route: route.fulfill(status=status, json={"error": {"message": message}}, headers=headers)
        self.send(text)

    def send(self, text: str) -> None:
        self.page.locator("#input").fill(text)
        self.page.locator("#input").press("Enter")
        self.page.wait_for_timeout(250)


# --- scenes --------------------------------------------------------------------------------------


def play_empty(stage: Stage) -> None:
    stage.start()


def play_chat(stage: Stage) -> None:
    play_history(stage)
    stage.ask("How do I count the words of a book in Python?", ("text", LONG_ANSWER), used=903)


def play_chat_top(stage: Stage) -> None:
    play_chat(stage)
    stage.page.locator("#scroll").evaluate("node => node.scrollTop = 0")
    stage.page.wait_for_timeout(150)


def play_history(stage: Stage) -> None:
    stage.start()
    for title in ("Names for a grey cat", "Packing list for a week in Norway", "Why do leaves turn red in autumn?"):
        stage.ask(title, ("text", "Gladly."))
        stage.page.evaluate("newChat()")


def play_tool(stage: Stage) -> None:
    stage.start()
    stage.ask("What is 12.5 % of 384?", *TOOL_ANSWER)
    stage.ask(
        "And how many r are in strawberry?",
        ("python", "'strawberry'.count('r')"),
        ("python_output", "3"),
        ("text", "Three."),
    )
    stage.page.locator(".tool summary").first.click()


def play_error(stage: Stage) -> None:
    stage.start()
    stage.ask("What is 12.5 % of 384?", *TOOL_ANSWER)
    stage.fail("Thank you. And of 1,000?", 429, "queue is full", **{"Retry-After": "5"})


def play_dropped(stage: Stage) -> None:
    stage.start()
    for question in ("Who was Ada Lovelace?", "When did she live?"):
        stage.ask(question, ("text", "She wrote the first program for a machine that was never built. " * 3))
    stage.ask(
        "What was the machine?",
        ("text", "The Analytical Engine of Charles Babbage."),
        used=1990,
        num_dropped=2,
        finish="length",
    )


def play_waiting(stage: Stage) -> None:
    stage.health["status"] = "loading"
    stage.start()
    stage.send("Are you there already?")


def play_offline(stage: Stage) -> None:
    stage.start()
    stage.page.unroute("**/*")
    stage.page.route("**/*", lambda route: route.abort("connectionrefused"))
    stage.send("Hello?")
    stage.page.wait_for_timeout(200)


def play_settings(stage: Stage) -> None:
    stage.start()
    stage.page.locator("#open-settings").click()
    stage.page.locator("#s-topK").fill("-3")


def play_key(stage: Stage) -> None:
    stage.start()
    stage.fail("Hello", 401, "The API key is missing or wrong.")


def play_help(stage: Stage) -> None:
    stage.start()
    stage.page.locator("#open-help").click()


def play_commands(stage: Stage) -> None:
    stage.start()
    stage.page.locator("#input").press_sequentially("/")


def play_editing(stage: Stage) -> None:
    play_tool(stage)
    stage.page.locator("#input").press("ArrowUp")


def play_code(stage: Stage) -> None:
    stage.start()
    stage.ask("Some code and a formula, please", ("text", CODE_ANSWER))


def play_branches(stage: Stage) -> None:
    play_tool(stage)
    stage.page.evaluate("resend(state.current.messages[2], 'And how many e are in strawberry?')")
    stage.page.wait_for_timeout(250)
    stage.page.locator("[aria-label='Answer again']").last.click()
    stage.page.wait_for_timeout(250)


def play_no_examples(stage: Stage) -> None:
    stage.card = {}
    stage.start()


def play_card(stage: Stage) -> None:
    stage.start()
    stage.page.locator("#model").click()


def play_search(stage: Stage) -> None:
    play_history(stage)
    stage.page.keyboard.press("Control+k")


def play_found(stage: Stage) -> None:
    play_search(stage)
    stage.page.locator("#switch-input").fill("gladly")


def play_menu(stage: Stage) -> None:
    play_drawer(stage) if stage.page.viewport_size["width"] < 900 else play_history(stage)
    stage.page.locator(".row [aria-haspopup=menu]").nth(1).click()


def play_deleted(stage: Stage) -> None:
    play_history(stage)
    stage.page.evaluate("remove(state.conversations[0])")


def play_drawer(stage: Stage) -> None:
    play_chat(stage)
    stage.page.locator("#open-sidebar").click()


SCENES = [
    Scene("empty-light", play_empty),
    Scene("empty-dark", play_empty, theme="dark"),
    Scene("chat-light", play_chat_top),
    Scene("chat-dark", play_chat_top, theme="dark"),
    Scene("chat-end-light", play_chat),
    Scene("tool-light", play_tool),
    Scene("tool-dark", play_tool, theme="dark"),
    Scene("error-light", play_error),
    Scene("error-dark", play_error, theme="dark"),
    Scene("dropped-light", play_dropped),
    Scene("waiting-light", play_waiting),
    Scene("offline-light", play_offline),
    Scene("settings-light", play_settings),
    Scene("settings-dark", play_settings, theme="dark"),
    Scene("key-light", play_key),
    Scene("help-light", play_help),
    Scene("commands-light", play_commands),
    Scene("editing-light", play_editing),
    Scene("deleted-light", play_deleted),
    Scene("invitation-light", play_no_examples),
    Scene("code-light", play_code),
    Scene("code-dark", play_code, theme="dark"),
    Scene("branches-light", play_branches),
    Scene("branches-dark", play_branches, theme="dark"),
    Scene("card-light", play_card),
    Scene("card-dark", play_card, theme="dark"),
    Scene("search-light", play_search),
    Scene("search-dark", play_search, theme="dark"),
    Scene("found-light", play_found),
    Scene("menu-light", play_menu),
    Scene("menu-dark", play_menu, theme="dark"),
    Scene("phone-code-light", play_code, PHONE),
    Scene("phone-code-dark", play_code, PHONE, "dark"),
    Scene("phone-branches-light", play_branches, PHONE),
    Scene("phone-card-light", play_card, PHONE),
    Scene("phone-search-dark", play_search, PHONE, "dark"),
    Scene("phone-found-light", play_found, PHONE),
    Scene("phone-menu-light", play_menu, PHONE),
    Scene("phone-empty-light", play_empty, PHONE),
    Scene("phone-chat-light", play_chat, PHONE),
    Scene("phone-chat-dark", play_chat_top, PHONE, "dark"),
    Scene("phone-drawer-light", play_drawer, PHONE),
    Scene("phone-settings-light", play_settings, PHONE),
    Scene("phone-dropped-light", play_dropped, PHONE),
    Scene("narrow-empty-light", play_empty, NARROW),
    Scene("narrow-tool-light", play_tool, NARROW),
    Scene("narrow-chat-dark", play_chat, NARROW, "dark"),
    Scene("narrow-commands-light", play_commands, NARROW),
]


@contextmanager
def stage_of(browser: Browser, scene: Scene) -> Iterator[Stage]:
    is_phone = scene.size != DESKTOP
    width, height = scene.size
    context = browser.new_context(
        viewport={"width": width, "height": height},
        color_scheme=scene.theme,
        has_touch=is_phone,
        is_mobile=is_phone,
        reduced_motion="reduce",
    )
    yield Stage(context.new_page())
    context.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the screenshots")
    parser.add_argument("--only", default="", help="only scenes whose name contains this")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="path of the browser")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=args.chromium, args=["--no-sandbox"])
        for scene in SCENES:
            if args.only not in scene.name:
                continue
            with stage_of(browser, scene) as stage:
                scene.play(stage)
                stage.page.wait_for_timeout(100)
                stage.page.screenshot(path=args.out / f"{scene.name}.png")
            print(args.out / f"{scene.name}.png")
        browser.close()


if __name__ == "__main__":
    main()
