"""report.html: the report's Markdown as one file with its pictures inside, to send, print or put on a web server.

It needs no script and nothing from elsewhere. Of raw HTML in the Markdown only the report's own folding passes; all
else that looks like a tag is shown as text.
"""

import base64
import html
import re
from collections.abc import Mapping
from itertools import pairwise

from markdown_it import MarkdownIt
from markdown_it.token import Token

from nanochat.records import PICTURES

FOLDING = re.compile(r"<details><summary>[\w ]+</summary>\s*|</details>\s*")  # as `tables.folded` writes it
CSS = """
:root { color-scheme: light dark; --text: #1c2024; --faint: #5c6670; --line: #d8dde2; --back: #fff; --soft: #f4f6f8;
  --accent: #1f5a99; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e6ea; --faint: #9aa5b1; --line: #39424c; --back: #14181c;
  --soft: #1d2329; --accent: #7db4ea; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 16px/1.55 system-ui, sans-serif; }
main { max-width: 54rem; margin: 0 auto; padding: 1rem 1.25rem 4rem; }
nav { font-size: .9rem; }
nav ul { list-style: none; margin: 0 0 1rem; padding: 0; columns: 16rem; }
nav ul ul { padding-left: 1rem; margin: 0; columns: auto; }
a { color: var(--accent); text-decoration: none; }
a:hover { text-decoration: underline; }
h1 { font-size: 1.7rem; line-height: 1.25; }
h2 { font-size: 1.3rem; margin-top: 2.5rem; border-bottom: 1px solid var(--line); padding-bottom: .3rem; }
h3 { font-size: 1.05rem; margin-top: 2rem; }
.table { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .9rem; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { color: var(--faint); font-weight: 600; white-space: nowrap; }
td { overflow-wrap: break-word; max-width: 34rem; }
pre { background: var(--soft); padding: .8rem 1rem; border-radius: 6px; white-space: pre-wrap;
  overflow-wrap: anywhere; }
code { font: .88em/1.5 ui-monospace, monospace; }
img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
summary { cursor: pointer; color: var(--accent); padding: .2rem 0; }
ul { padding-left: 1.4rem; }
@media (max-width: 40rem) { th, td { padding: .25rem .45rem; } table { font-size: .82rem; } }
@media print { nav { display: none; } }
"""


def page(markdown: str, pictures: Mapping[str, bytes]) -> str:
    """The HTML of `markdown`, which shows `pictures` by name, with a table of contents after its first heading."""
    parser = MarkdownIt("commonmark").enable("table")
    for kind in ("html_block", "html_inline"):
        parser.add_render_rule(kind, _own_html)
    parser.add_render_rule("table_open", lambda *_: '<div class="table"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    tokens = parser.parse(markdown)
    headings = _name_headings(tokens)
    _put_inside(tokens, pictures)
    body = parser.renderer.render(tokens, parser.options, {})
    title = html.escape(next((text for tag, _, text in headings if tag == "h1"), "nanochat report"))
    start, _, rest = body.partition("</h1>\n")
    contents = _contents([heading for heading in headings if heading[0] != "h1"])
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{CSS}</style>\n</head>\n<body>\n<main>\n"
        f"{start}</h1>\n{contents}{rest}</main>\n</body>\n</html>\n"
    )


def _own_html(_renderer, tokens: list[Token], index: int, *_) -> str:
    raw = tokens[index].content
    return raw if FOLDING.fullmatch(raw) else html.escape(raw)


def _name_headings(tokens: list[Token]) -> list[tuple[str, str, str]]:
    """Give each heading an id; returns their tags, ids and texts."""
    found = []
    for heading, inline in pairwise(tokens):
        if heading.type == "heading_open":
            text = "".join(child.content for child in inline.children or [])
            name = re.sub(r"\W+", "-", text.lower()).strip("-") or "section"
            taken = sum(known.rsplit("--", 1)[0] == name for _, known, _ in found)
            found.append((heading.tag, f"{name}--{taken + 1}" if taken else name, text))
            heading.attrSet("id", found[-1][1])
    return found


def _contents(headings: list[tuple[str, str, str]]) -> str:
    """Links to the sections, those of the stages below theirs."""
    items, depth = [], 0
    for tag, name, text in headings:
        if (tag == "h3") != (depth == 1):
            items.append("<ul>" if tag == "h3" else "</ul>")
            depth = int(tag == "h3")
        items.append(f'<li><a href="#{name}">{html.escape(text)}</a></li>')
    items += ["</ul>"] * depth
    listed = "\n".join(items)
    return f"<nav><details><summary>Contents</summary>\n<ul>\n{listed}\n</ul>\n</details></nav>\n"


def _put_inside(tokens: list[Token], pictures: Mapping[str, bytes]) -> None:
    for token in (child for block in tokens for child in block.children or []):
        name = str(token.attrs.get("src", "")).removeprefix(f"{PICTURES}/")
        if token.type == "image" and name in pictures:
            token.attrSet("src", f"data:image/png;base64,{base64.b64encode(pictures[name]).decode()}")
