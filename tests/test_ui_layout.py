"""The chat page: what its file may hold, colours, widths from a phone's to a desktop's, scrolling, keyboard."""

import re
import threading

import pytest
from chat_page import PAGE, Reply, end, head, piece

pytest_plugins = ("chat_browser",)


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
        "Skip to the message field",
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
