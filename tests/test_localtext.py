"""Text on this machine made into shards: cutting, splitting without overlap, finding documentation."""

import gzip
import random
import sys
from functools import partial
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanochat.common import UserError
from nanochat.data import localtext
from nanochat.data.localtext import Source, cut_text, is_prose, read_texts, write_shards

PROSE = "This is a sentence that says what the function does and why it is there."


def make_source(name: str, texts: list[str]) -> Source:
    return Source(name, sum(len(text.encode()) for text in texts), partial(iter, texts))


def make_sources(num_sources: int, documents_each: int) -> list[Source]:
    return [
        make_source(f"source {source}", [f"text {source}.{index} " + "word " * 20 for index in range(documents_each)])
        for source in range(num_sources)
    ]


def read(path: Path) -> list[str]:
    return pq.read_table(path).column("text").to_pylist()


def split_of(folder: Path, sources: list[Source], **options) -> tuple[list[str], list[str]]:
    *train, val = write_shards(sources, folder, **options)
    return [text for shard in train for text in read(shard)], read(val)


# --- files of the user ---
@given(st.text(alphabet="ab .\n", max_size=300), st.integers(4, 40))
def test_cutting_loses_no_word_and_keeps_to_the_size(text, max_chars):
    pieces = list(cut_text(text, max_chars))
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all(piece.strip() and len(piece) <= max_chars for piece in pieces)
    assert all(len(piece) >= max_chars // 4 for piece in pieces[:-1])


def test_cuts_fall_on_the_best_border_there_is():
    paragraph = "One sentence here. Another one there."
    assert list(cut_text(f"{paragraph}\n\n{paragraph}", 60)) == [paragraph, paragraph]
    assert list(cut_text(f"{paragraph}\n{paragraph}", 60)) == [paragraph, paragraph]
    assert list(cut_text(paragraph, 30)) == ["One sentence here.", "Another one there."]
    assert list(cut_text("several words", 8)) == ["several", "words"]
    assert list(cut_text("x" * 10, 4)) == ["xxxx", "xxxx", "xx"]


def test_jsonl_is_read_packed_or_not_and_text_files_lose_their_byte_order_mark_and_are_cut(tmp_path):
    lines = '{"text": "a", "id": 1}\n\n{"text": null}\n{"text": "caf\\u00e9 ☕"}'.encode()
    for name, content in (("a.jsonl", lines), ("a.jsonl.gz", gzip.compress(lines))):
        (tmp_path / name).write_bytes(content)
        assert list(read_texts(tmp_path / name)) == ["a", "café ☕"]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + (PROSE + "\n\n").encode() * 300)
    pieces = list(read_texts(tmp_path / "a.txt"))
    assert pieces[0].startswith("This is")
    assert len(pieces) == 3
    assert max(map(len, pieces)) <= localtext.DOCUMENT_CHARS


@pytest.mark.parametrize(
    "line",
    [b"{", b"[1]", b'"text"', b"3", b'{"txt": "a"}', b'{"text": 3}', b'{"text": "\\ud800"}', b'{"text": "\xff"}'],
)
def test_malformed_lines_are_named_with_file_and_number(tmp_path, line):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n\n' + line + b"\n")
    with pytest.raises(UserError, match=r"a\.jsonl, line 3: not a JSON object with a string \"text\""):
        list(read_texts(tmp_path / "a.jsonl"))


def test_unreadable_files_are_named(tmp_path):
    cut_off = gzip.compress(b'{"text": "a"}\n' * 1000)[:-20]
    for name, content, words in (
        ("a.txt", b"abc\xff", r"a\.txt is not UTF-8 at byte 3"), ("gone.txt", None, r"cannot read .*gone\.txt"),
        ("a.jsonl.gz", cut_off, r"cannot read .*a\.jsonl\.gz"),
    ):  # fmt: skip
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=words):
            list(read_texts(tmp_path / name))


# --- writing shards ---
def test_shards_hold_every_document_once_shuffled_and_small_sources_stay_on_one_side(tmp_path):
    sources = make_sources(40, 10)
    train, val = split_of(tmp_path, sources)
    in_order = [text for source in sources for text in source.read()]
    assert sorted(train + val) == sorted(in_order)
    assert train != [text for text in in_order if text in set(train)]
    assert 0.02 * len(in_order) <= len(val) <= 0.08 * len(in_order)
    assert {text.split(".")[0] for text in train} & {text.split(".")[0] for text in val} == set()


@pytest.mark.parametrize(("num_sources", "documents_each"), [(1, 100), (2, 100), (3, 100), (1, 3000)])
def test_few_large_sources_are_split_inside_and_row_groups_have_1024_documents(tmp_path, num_sources, documents_each):
    train, val = split_of(tmp_path, make_sources(num_sources, documents_each))
    assert len(val) == 0.05 * documents_each * num_sources
    assert len(train) == 0.95 * documents_each * num_sources
    metadata = pq.ParquetFile(tmp_path / "shard_00000.parquet").metadata
    sizes = [metadata.row_group(index).num_rows for index in range(metadata.num_row_groups)]
    assert sizes == ([1024, 1024, 802] if documents_each == 3000 else [len(train)])


def test_result_depends_on_the_texts_alone(tmp_path):
    sources = make_sources(30, 20)
    first, again, other = (
        [path.read_bytes() for path in write_shards(given, tmp_path / name, **seed)]
        for name, given, seed in (("a", sources, {}), ("b", sources[::-1], {}), ("c", sources, {"seed": 1}))
    )
    assert first == again
    assert first != other


def test_large_input_is_spread_over_shards_of_full_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(localtext, "SHARD_BYTES", 100_000)
    paths = write_shards(make_sources(40, 100), tmp_path)
    assert sorted(tmp_path.iterdir()) == paths == [tmp_path / f"shard_{index:05d}.parquet" for index in range(6)]
    train = [pq.ParquetFile(path).metadata.num_rows for path in paths[:-1]]
    assert sum(train) > 3500
    assert all(700 < num_rows < 850 for num_rows in train)


def test_no_document_is_on_both_sides_or_twice_and_too_little_text_is_refused(tmp_path):
    texts = [f"the same  text\n{index % 7}" for index in range(100)] + [f"the same text {index}" for index in range(9)]
    sources = [make_source(f"{index}", texts) for index in range(30)]
    train, val = split_of(tmp_path, sources)
    words = [" ".join(text.split()) for text in train + val]
    assert sorted(words) == [f"the same text {index}" for index in range(9)]
    assert train
    assert val
    for texts in ([], ["only one"], ["the same", "the  same", "", "  "]):
        with pytest.raises(UserError, match="different documents"):
            write_shards([make_source("a", texts)], tmp_path / "a")
    assert sorted(map(len, split_of(tmp_path / "b", [make_source("a", ["one", "two"])]))) == [1, 1]


# --- documentation on this machine ---
def test_prose_is_told_from_code_tables_lists_and_other_languages():
    for text in (
        PROSE, "Return a copy of the string with leading white space removed.",
        "Deletes the file at the given path,\n    or does nothing when it is not there.",
    ):  # fmt: skip
        assert is_prose(text), text
    for text in (
        "Too short.", ">>> a = [x for x in range(3)] and this is the rest",
        "for (i = 0; i < n; i++) { a[i] = b[i] + c[i]; }", "alpha beta gamma delta epsilon zeta eta theta",
        "Dies ist ein deutscher Satz über die Dokumentation dieser Funktion.",
        "+----+----+\n| a  | b  |\n+----+----+",
    ):  # fmt: skip
        assert not is_prose(text), text


@pytest.fixture
def packages(tmp_path, monkeypatch):
    """Two installed packages, of which importing a module would fail."""
    root = tmp_path / "site-packages"
    (root / "alpha" / "tests").mkdir(parents=True)
    (root / "alpha" / "__init__.py").write_text(
        f'''"""Alpha does things.

    {PROSE}
    """
import a_module_that_is_not_there
class Worker:
    """The worker that does all of the things
    which are there to be done in a day."""
    def run(self, speed, *, quiet):
        """Run at a speed that is given by the caller, in units of the machine it is on.

        >>> Worker().run(3)
        """
        return "a string that is not a docstring, however much it may look like one of them"
HELP = """{"A long help text is documentation, too, wherever it is to be found. " * 8}"""
'''
    )
    (root / "alpha" / "copy.py").write_text(f'"""{PROSE}"""\n')  # nothing new, too short for a document
    (root / "alpha" / "broken.py").write_text('"""Not Python"""\ndef (')
    (root / "alpha" / "tests" / "test_alpha.py").write_text(f'"""{"It is about the tests of alpha. " * 20}"""')
    (root / "alpha-1.0.dist-info").mkdir()
    described = "Alpha is described in the metadata that every package of this kind has. " * 4
    (root / "alpha-1.0.dist-info" / "METADATA").write_text(f"Name: alpha\nSummary: x\n\n{described}\n")
    (root / "alpha-1.0.dist-info" / "LICENSE.txt").write_text(PROSE.replace("This", "That") * 10)
    (root / "beta.py").write_text(f"def work():\n    '''{'Beta is the second of the packages here. ' * 10}'''\n")
    monkeypatch.setattr(localtext, "_roots", lambda: [root])
    return root


def test_docstrings_and_documents_are_found_without_importing_and_up_to_a_bound(packages, monkeypatch):
    alpha, beta = localtext.machine_sources()
    assert (alpha.name, beta.name) == ("alpha", "beta")
    described, module = alpha.read()
    assert described.startswith("alpha\n\nAlpha is described in the metadata")
    help_text = " ".join(["A long help text is documentation, too, wherever it is to be found."] * 8)
    assert module.split("\n\n") == [
        "alpha", PROSE, "Worker", "The worker that does all of the things which are there to be done in a day.",
        "Worker.run(self, speed, quiet)",
        "Run at a speed that is given by the caller, in units of the machine it is on.", help_text,
    ]  # fmt: skip
    assert beta.num_bytes == len(next(iter(beta.read())).encode())
    assert "alpha" not in sys.modules
    again = [list(source.read()) for source in localtext.machine_sources()]
    assert again == [[described, module], list(beta.read())]
    monkeypatch.setattr(localtext, "MACHINE_BYTES", (packages / "beta.py").stat().st_size + 1)
    assert sum(source.num_bytes for source in localtext.machine_sources()) <= localtext.MACHINE_BYTES


def test_this_very_machine_has_documentation(monkeypatch):
    monkeypatch.setattr(localtext, "_roots", lambda: [Path(sys.modules["json"].__file__).parent.parent])
    monkeypatch.setattr(localtext, "MACHINE_BYTES", 2_000_000)
    sources = localtext.machine_sources()
    text = " ".join(text for source in sources for text in source.read())
    assert len(text) > 100_000
    assert random.Random(0).choice(sources).num_bytes > 0
