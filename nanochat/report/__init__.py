"""The report of a run: what the stages have recorded as Markdown, as one HTML file, and as a small table of text.

Begin with `__main__.py`: the command, and the files it writes. `markdown.py` renders the records as report.md, of which
`summary.py` is the first page; `pictures.py` draws the curves, `page.py` makes the HTML file of the Markdown, and
`tables.py` is how values look in all of them.

Not here: recording (`records.py` at the top), and what the records say when read together (`results.py`).
"""
