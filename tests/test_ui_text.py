"""The chat page in a real browser: any text stays text, and Markdown becomes elements."""

import json
import re
import threading

import pytest
from chat_page import refuses, says

pytest_plugins = ("chat_browser",)
ATTACK = "<img src=x onerror='window.pwned=1'><script>window.pwned=1</script>"


def test_scripts_in_any_text_stay_text(chat, tmp_path):
    blocks = (ATTACK, f"```{ATTACK.replace(' ', '')}\n{ATTACK}\n```", f"| a |\n|---|\n| {ATTACK} |", f"- {ATTACK}")
    nasty = "\n\n".join((*blocks, f"> {ATTACK}", f"# {ATTACK}", f"[{ATTACK}](https://example.com)"))
    chat.server.health["model"] = ATTACK
    chat.page.reload()
    tool = [{"python": ""}, {"python": ATTACK}, {"python_output": ""}, {"python_output": ATTACK}]
    chat.ask(ATTACK, says(nasty, *tool))
    path = tmp_path / "import.json"
    messages = [{"role": "user", "content": ATTACK}, {"role": "assistant", "content": ATTACK}]
    path.write_text(json.dumps([{"title": ATTACK, "messages": messages, "__proto__": {"pwned": 1}}]))
    chat.label("File of conversations").set_input_files(path)
    chat.wait_for("1 conversation imported.")
    chat.send("again", refuses(400, ATTACK))
    chat.wait_for("The server refused the request.")
    assert chat.questions.first.inner_text() == ATTACK
    assert ATTACK in chat.answers.first.inner_text()
    assert chat.page.locator("#main :is(script, img, iframe), #sidebar :is(script, img, iframe)").count() == 0
    assert chat.page.evaluate("window.pwned ?? ({}).pwned") is None


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
        ("- a\n- b\n  - c\n\n1. x\n2. y",
         "<ul><li>a</li><li>b<ul><li>c</li></ul></li></ul><ol><li>x</li><li>y</li></ol>"),
        ("3. a\n\n   more\n4. b", "<ol><li><p>a</p><p>more</p></li><li>b</li></ol>"),
        ("born in\n1986. It was", "<p>born in<br>1986. It was</p>"),
        ("> a\n> - b", "<blockquote><p>a</p><ul><li>b</li></ul></blockquote>"),
        ("| a | b |\n|:-:|--:|\n| 1 | `x\\|y` |",
         "<table><thead><tr><th>a</th><th>b</th></tr></thead>"
         "<tbody><tr><td>1</td><td><code>x|y</code></td></tr></tbody></table>"),
        ("a | b\nno table", "<p>a | b<br>no table</p>"),
        ("- [x] done\n- [ ] open", "<ul><li>☑ done</li><li>☐ open</li></ul>"),
        ("so $a_1 * b_2 * c_1$ and \\(x_1\\), **$y^*$**",
         "<p>so <span>a_1 * b_2 * c_1</span> and <span>x_1</span>, <strong><span>y^*</span></strong></p>"),
        ("Then\n$$\n\\frac{a_1}{b_1} \\\\\n- 3\n$$\nholds; \\[ x_1 * y_1 \\]",
         "<p>Then</p><math>\\frac{a_1}{b_1} \\\\\n- 3</math><p>holds; <span>x_1 * y_1</span></p>"),
        ("$5 and $6, US$7 *or* $8 to 9$, $ 1$, $PATH and $HOME", 
         "<p>$5 and $6, US$7 <em>or</em> $8 to 9$, $ 1$, $PATH and $HOME</p>"),
        ("\\$x$ and $y, US$a$ b", "<p>$x$ and $y, US$a$ b</p>"),
        ("$2 \\times 4 = 8$, $3$, $\\$5$", "<p><span>2 \\times 4 = 8</span>, <span>3</span>, <span>\\$5</span></p>"),
        ("\\[1\\] \\[a\\](b) \\(open `$x$`", "<p>[1] [a](b) (open <code>$x$</code></p>"),
        ("$$\nx_1 + x_2 still coming", "<math>x_1 + x_2 still coming</math>"),
        ("&amp; <b>x</b>", "<p>&amp;amp; &lt;b&gt;x&lt;/b&gt;</p>"),
    ],
)  # fmt: skip
def test_markdown_becomes_elements(script, source, html):
    show = "(text) => { const node = h('div'); showMarkdown(node, text); return node.innerHTML; }"
    shown = script.evaluate(show, source)
    shown = re.sub(r'<div class="math">(.*?)</div>', r"<math>\1</math>", shown, flags=re.DOTALL)
    shown = re.sub(r' (class|scope|start|tabindex|role|aria-label)="[^"]*"', "", shown)
    assert shown.replace("<div>", "").replace("</div>", "") == html


def test_an_unfinished_code_block_is_shown_and_copied(chat):
    chat.page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    gate = threading.Event()
    chat.send("Code?", says("Here:\n```python\nprint(1)\n", gate, "print(2)\n```\nDone."))
    chat.page.locator("pre").wait_for()
    block = chat.page.locator("pre").element_handle()
    assert chat.page.locator("pre span").count() == 0, "colours wait for the end of the block"
    gate.set()
    chat.wait_until_done()
    assert block.inner_text() == "print(1)\nprint(2)", "the block stays the same element while it grows"
    assert chat.page.locator("pre span.is-number").all_inner_texts() == ["1", "2"]
    chat.click("Copy", exact=True)
    chat.page.locator(".code").get_by_text("Copied").wait_for()
    assert chat.page.evaluate("navigator.clipboard.readText()") == "print(1)\nprint(2)"


@pytest.mark.parametrize(
    ("language", "code", "coloured"),
    [
        ("python", 'def f(x):\n    return "a"  # b', {"def": "keyword", '"a"': "string", "# b": "comment"}),
        ("JS", "let a = `x`;", {"let": "keyword", "`": "template-punctuation"}),
        ("json", '{"a": [1, null]}', {'"a"': "property", "null": "null"}),
        ("sh", "$ pip x # it's \"y\"\nin $A", {"# it's \"y\"": "comment", "in": "keyword", "$A": "variable"}),
        ("html", "<b class='c'>", {"class": "attr-name"}),
        ("cpp", "int main() { return 0; }", {"int": "keyword", "main": "function"}),
        ("rust", "fn main() { let x = 1.5; }", {"main": "function", "1.5": "number"}),
        ("diff", "+a\n-b", {"+": "prefix"}),
        ("constructor", "a = 1", {}), ("extend", "a = 1", {}), ("", "a = 1", {}), ("brainfuck", "+[-]", {}),
    ],
)  # fmt: skip
def test_code_is_coloured_and_stays_the_same_text(script, language, code, coloured):
    show = """(text) => {
      const node = h("div");
      showMarkdown(node, text);
      const spans = [...node.querySelectorAll("code span")];
      return [node.querySelector("code").textContent, spans.map((span) => [span.textContent, span.className])];
    }"""
    text, spans = script.evaluate(show, f"```{language}\n{code}\n```")
    assert text == code
    found = {text: kind.removeprefix("is-") for text, kind in spans}
    assert {text: found.get(text) for text in coloured} == coloured
    if not coloured:
        assert spans == []


@pytest.mark.parametrize(
    "unit",
    ["*", "_", "`", "[", "](", "**a ", "~~", "> ", "- ", "  - a\n", "|", "|-", "#", "<", "\n", " ", "![x](", "http://",
     "``` \n", "$", "$x ", "\\(", "\\[ x\n", "$$ x\n", "$$\n", "\\$"],
)  # fmt: skip
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


@pytest.mark.parametrize("language", ["python", "js", "html", "css", "json", "c", "go", "sh", "diff"])
def test_no_code_freezes_the_page(script, language):
    units = ('"', "'", "/*", "#", "<a ", "(", "{", "`${", "\\", "a", "f'{", "$(", "/", "a b\n")
    milliseconds = script.evaluate(
        """([language, units]) => Math.max(...units.map((unit) => {
          const begun = performance.now();
          showMarkdown(h("div"), `\\`\\`\\`${language}\n${unit.repeat(MAX_COLOURED).slice(0, MAX_COLOURED)}`);
          return performance.now() - begun;
        }))""",
        [language, units],
    )
    assert milliseconds < 1500
