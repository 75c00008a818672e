"""The chat page: what its file may hold, colours, widths from a phone's to a desktop's, scrolling, keyboard."""

import hashlib
import re
import threading

import pytest
from chat_page import says

from nanochat.serve.api import PAGE_PATH

pytest_plugins = ("chat_browser",)


def test_the_page_is_one_file_that_builds_no_html_from_text():
    page = PAGE_PATH.read_text()
    assert page.count("<script>") == page.count("<style>") == 1
    assert re.findall(r"<script [^>]*>", page) == ['<script data-manual src="prism.js">']
    for forbidden in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "DOMParser"):
        assert forbidden not in page
    markup = page[: page.index("<script ")]
    assert not re.search(r"\s(on\w+|style)=", markup)
    assert not re.search(r"(src|href)=[\"']?(https?:)?//", markup)


def test_the_library_for_the_colours_of_code_is_the_one_that_was_looked_at():
    library = PAGE_PATH.with_name("prism.js").read_bytes()
    assert hashlib.sha256(library).hexdigest() == "653584f7b791e21c80badb4033d232f9fc0dee4e32c28cd984b95e76ee5d811d"
    assert len(library) < 30_000
    assert b"</script" not in library.lower(), "it would end the script that it is set into"


def test_text_keeps_its_contrast_in_light_and_dark():
    """WCAG AA: 4.5 to 1 for text on every surface it stands on, 3 to 1 for the borders of fields."""
    found = re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", PAGE_PATH.read_text())
    colours = {name: {"light": light, "dark": dark} for name, light, dark in found}
    pairs = [("text", surface, 4.5) for surface in ("page", "side", "card", "raised", "hover", "tint", "danger-tint")]
    pairs += [("soft", surface, 4.5) for surface in ("page", "side", "card", "raised", "hover")]
    pairs += [("accent", surface, 4.5) for surface in ("page", "raised", "tint")]
    pairs += [(f"code-{name}", "raised", 4.5) for name in ("word", "text", "number", "name")]
    pairs += [("on-accent", "accent", 4.5), ("warn", "warn-tint", 4.5), ("warn", "page", 4.5)]
    pairs += [("danger", "danger-tint", 4.5), ("danger", "page", 4.5), ("edge", "page", 3), ("edge", "raised", 3)]
    for name, surface, least in pairs:
        for theme in ("light", "dark"):
            assert contrast(colours[name][theme], colours[surface][theme]) >= least, (name, surface, theme)


def contrast(one: str, other: str) -> float:
    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


WIDE = f"{'x' * 300}\n\n```\n{'y' * 300}\n```\n\n{'| columncolumncolumn ' * 8}|\n{'|---' * 8}|\n"


@pytest.mark.parametrize("width", [320, 390, 768, 1280])
def test_nothing_runs_over_the_edge(open_chat, width):
    chat = open_chat(width=width, height=640)
    assert not chat.is_overflowing()
    chat.ask("z" * 300, says(WIDE, {"python": "1" * 300}, {"python_output": "2" * 300}, num_dropped=2))
    assert not chat.is_overflowing()
    field = chat.input.bounding_box()
    assert field["y"] + field["height"] <= 640
    chat.click("Settings")
    for box in (field, chat.page.get_by_role("dialog").bounding_box()):
        assert 0 <= box["x"] <= box["x"] + box["width"] <= width


def test_on_a_phone_the_conversations_are_in_a_drawer(open_chat):
    chat = open_chat(width=390, height=844, has_touch=True, is_mobile=True)
    chat.ask("Hello", "Hi.")
    sidebar = chat.page.locator("#sidebar")
    assert not sidebar.is_visible()
    chat.click("Show conversations")
    sidebar.wait_for()
    assert chat.page.locator("#main").evaluate("node => node.inert")
    chat.page.keyboard.press("Escape")
    sidebar.wait_for(state="hidden")
    chat.click("Show conversations")
    chat.click("New chat")
    sidebar.wait_for(state="hidden")
    chat.wait_for("What would you like to talk about?")


def test_the_view_follows_the_answer_until_the_reader_scrolls_up(chat):
    gates = [threading.Event() for _ in range(3)]
    a, b, c, d = ("".join(f"{part}-{i}\n\n" for i in range(40)) for part in "abcd")
    chat.send("Long", says(a, gates[0], b, gates[1], c, gates[2], d))
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
    chat.click("Latest")
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
    seen, name = set(), "document.activeElement.getAttribute('aria-label') || document.activeElement.textContent.trim()"
    for _ in range(40):
        chat.page.keyboard.press("Tab")
        seen.add(chat.page.evaluate(name))
    assert {"Skip to the message field", "New chat", "Hello", "Menu of Hello"} <= seen
    assert {"Copy the message", "Copy", "Table", "Settings"} <= seen


def test_dark_colours_follow_the_system_and_can_be_chosen(open_chat):
    chat = open_chat(color_scheme="dark")
    background = "getComputedStyle(document.documentElement).backgroundColor"
    assert chat.page.evaluate(background) == "rgb(25, 25, 24)"
    chat.click("Light colours")
    chat.until(f"{background} === 'rgb(252, 251, 249)'")
    chat.page.reload()
    assert chat.page.evaluate(background) == "rgb(252, 251, 249)"
