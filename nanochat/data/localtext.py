"""Text on this machine made into parquet shards like those of a hub data set, for runs without a network.

There are two kinds of sources: files of the user (one document per jsonl line or per text file), and the documentation
that comes with Python: docstrings and documents of the standard library and the installed packages, read from their
files, never by importing them. `write_shards` makes shards of either kind.
Not here: parquet input and the choice between sources (`dataset.py`), tokenizing.
"""

import gzip
import hashlib
import inspect
import json
import os
import random
import re
import sys
import sysconfig
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryFile
from types import CodeType

import pyarrow as pa
import pyarrow.parquet as pq

from nanochat.common import UserError

VERSION = "1"  # part of what identifies converted data: raise it when the same input gives other shards
SUFFIXES = (".jsonl", ".jsonl.gz", ".txt", ".md")
SEED = 20251013
DOCUMENT_CHARS = 8_000  # longer texts are cut at paragraph borders: about 2,000 tokens, one row of pretraining
ROW_GROUP_DOCUMENTS = 1_024
SHARD_BYTES = 64 << 20  # of text; shards of a very large input grow, as no more than MAX_SHARDS are open at a time
MAX_SHARDS = 256
SEPARATOR = b"\xff"  # between the documents of a shard in the making: a byte that UTF-8 never has
VAL_FRAC = 0.05
MAX_VAL_BYTES = 16 << 20

PACKAGE_BYTES = 24 << 20  # source read of one package, so that the largest do not drown the others
MACHINE_BYTES = 160 << 20  # source read in all: about 25 s on one core
SKIPPED_FOLDERS = {"__pycache__", "site-packages", "dist-packages", "test", "tests", "licenses", "lib2to3", "idlelib"}
SKIPPED_STEMS = ("license", "licence", "copying", "notice", "authors", "requirements", "top_level", "entry_points")
DOCSTRING_CHARS = 40  # shorter docstrings say little beyond the name
LONG_STRING_CHARS = 400  # other strings this long are documentation too (help topics, docs attached to C functions)
MIN_DOCUMENT_CHARS = 200  # of prose found in a file
PROSE_WORDS = 5  # of a paragraph, at least
PROSE_ALPHA_FRAC = 0.5  # share of its words that are letters only
PROSE_COMMON_FRAC = 0.15  # share of its words that are among the COMMON_WORDS
COMMON_WORDS = frozenset("""the of to and a in is for that with be as on are this by or it an if from not can will which
when at have has was were its their you your we they all any each other than then there these into only used no
but""".split())  # fmt: skip


@dataclass(frozen=True)
class Source:
    """Texts that belong together, such as a file or a package: a name to sort by, their approximate size in bytes, and
    a function that reads them one by one."""

    name: str
    num_bytes: int
    read: Callable[[], Iterable[str]]


# --- files of the user ---------------------------------------------------------------------------


def read_texts(path: Path) -> Iterator[str]:
    """The documents of one file: the `text` fields of a jsonl file, or a text file cut into pieces where it is long.
    Raises `UserError` with file and line when something is malformed, or the file cannot be read."""
    try:
        if path.name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_jsonl(path)
        else:
            yield from cut_text(path.read_text(encoding="utf-8-sig"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 at byte {error.start}; convert it or take it out") from error
    except (OSError, EOFError) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def _read_jsonl(path: Path) -> Iterator[str]:
    with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                text = json.loads(line)["text"] if line.strip() else None
                if text is not None:
                    text.encode()  # a lone surrogate (half of an escaped emoji) cannot be stored
                    yield text
            except (ValueError, TypeError, KeyError, AttributeError) as error:
                fault = f'not a JSON object with a string "text" ({type(error).__name__}: {error})'
                raise UserError(f"{path}, line {number}: {fault}") from error


def cut_text(text: str, max_chars: int = DOCUMENT_CHARS) -> Iterator[str]:
    """`text` in pieces of at most `max_chars` characters and, but for the last, at least a quarter of that, each cut
    at the last paragraph border that allows it, else line end, sentence end, space, or anywhere. Only white space at
    the cuts is lost; a blank text has no pieces."""
    text, start = text.strip(), 0
    while len(text) - start > max_chars:
        ends = (text.rfind(border, start + max_chars // 4, start + max_chars) for border in ("\n\n", "\n", ". ", " "))
        end = next((end for end in ends if end > start), start + max_chars)
        end += text.startswith(". ", end)  # the full stop belongs to the sentence
        yield text[start:end]
        start = end
        while start < len(text) and text[start].isspace():
            start += 1
    if text:
        yield text[start:]


# --- writing shards ------------------------------------------------------------------------------


def write_shards(
    sources: Sequence[Source], folder: Path, *, val_names: Collection[str] = (), seed: int = SEED
) -> list[Path]:
    """Write the documents of `sources` to `folder` as shuffled parquet shards; the last one is for validation.

    Blank documents and those that repeat an earlier one (white space aside) are left out. Validation gets about 5 % of
    the text: whole sources where those are small enough, otherwise evenly spread documents; or the sources in
    `val_names` where there are any. The result depends on the arguments alone, and memory holds one shard at a time.
    Raises `UserError` when there are not two different documents.
    """
    sources = sorted(sources, key=lambda source: source.name)
    total = sum(source.num_bytes for source in sources)
    num_train = max(1, min(MAX_SHARDS, -(-total // SHARD_BYTES)))
    val_bytes = max(1, min(int(VAL_FRAC * total), MAX_VAL_BYTES))
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        spools = [stack.enter_context(TemporaryFile(dir=folder)) for _ in range(num_train + 1)]
        choices = [set(val_names)] if val_names else [_choose_val_sources(sources, val_bytes, seed), set()]
        for val_names in choices:
            num_documents = _deal(sources, val_names, max(2, round(total / val_bytes)), spools, seed)
            filled = [spool for spool in spools if spool.tell()]
            if len(filled) >= 2 and filled[-1] is spools[-1]:
                break
            # The chosen sources held nothing new, or everything: choose single documents.
        else:
            remedy = "training and validation need at least one each; give --data more text"
            raise UserError(f"only {num_documents} different documents in {len(sources)} files: {remedy}")
        shards = [folder / f"shard_{index:05d}.parquet" for index in range(len(filled))]
        for index, (spool, shard) in enumerate(zip(filled, shards, strict=True)):
            spool.seek(0)
            texts = [text.decode() for text in spool.read().split(SEPARATOR)[:-1]]
            random.Random(seed + index).shuffle(texts)
            table = pa.table({"text": pa.chunked_array([texts], pa.string())})
            pq.write_table(table, shard, compression="zstd", row_group_size=ROW_GROUP_DOCUMENTS)
    return shards


def _choose_val_sources(sources: Sequence[Source], val_bytes: int, seed: int) -> set[str]:
    """Names of random sources of together about `val_bytes` bytes; empty when the sources are too large for that."""
    chosen, size = set(), 0
    for source in random.Random(seed).sample(sources, len(sources)):
        if size < val_bytes and size + source.num_bytes <= 1.5 * val_bytes:
            chosen.add(source.name)
            size += source.num_bytes
    return chosen if size >= 0.5 * val_bytes else set()


def _deal(sources, val_names: set[str], val_period: int, spools, seed: int) -> int:
    """Write each different document to the temporary file of one shard and return their number. The last shard gets
    those of the sources in `val_names`, or every `val_period`-th one when that is empty."""
    rng, seen = random.Random(seed), set()
    for spool in spools:
        spool.truncate(spool.seek(0))
    for source in sources:
        for text in source.read():
            key = hashlib.blake2b(" ".join(text.split()).encode(), digest_size=16).digest()
            if key in seen or not text.strip():
                continue
            seen.add(key)
            is_val = source.name in val_names if val_names else len(seen) % val_period == 2 % val_period
            spool = spools[-1] if is_val else spools[rng.randrange(len(spools) - 1)]
            spool.write(text.encode() + SEPARATOR)
    return len(seen)


# --- documentation on this machine ---------------------------------------------------------------


def machine_sources() -> list[Source]:
    """Documentation of the Python standard library and the installed packages: a source a package, a document a
    module or text file. Only paragraphs of English prose are kept, each the first time it is met."""
    packages: dict[str, list[tuple[str, Path]]] = {}
    for root in _roots():
        for package, _, title, path in sorted(_documented_files(root)):
            packages.setdefault(package, []).append((title, Path(path)))
    seen, sources, machine_left = set(), [], MACHINE_BYTES
    for package, files in packages.items():
        documents, package_left = [], min(PACKAGE_BYTES, machine_left)
        for title, path in files:
            content = _content(path, package_left)
            package_left -= len(content)
            machine_left -= len(content)
            paragraphs = _new_prose(_passages(path, content), seen)
            if sum(map(len, paragraphs)) >= MIN_DOCUMENT_CHARS:
                documents.extend(cut_text("\n\n".join([title, *paragraphs])))
        if documents:
            sources.append(Source(package, sum(len(d.encode()) for d in documents), partial(iter, documents)))
    return sources


def _roots() -> list[Path]:
    """Folders of the standard library, first, and of installed packages."""
    known = sysconfig.get_paths()
    folders = [Path(folder) for folder in (known["purelib"], known["platlib"], *sys.path)]
    installed = [folder for folder in folders if folder.name in ("site-packages", "dist-packages")]
    return list(dict.fromkeys(root.resolve() for root in (Path(known["stdlib"]), *installed) if root.is_dir()))


def _documented_files(root: Path) -> Iterator[tuple[str, bool, str, str]]:
    """Package, whether the module is private, title, and path of each file below `root` with documentation."""
    for parent, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name.lower() not in SKIPPED_FOLDERS and name[0] != "."]
        for name in names:
            is_text = name.endswith((".md", ".rst", ".txt")) and not name.lower().startswith(SKIPPED_STEMS)
            if name.endswith(".py") or is_text or name == "METADATA":
                path = Path(parent, name)
                parts = path.relative_to(root).with_suffix("").parts
                package = parts[0].partition("-")[0].lower()  # name-1.0.dist-info belongs to name
                title = package if name == "METADATA" else ".".join(parts).removesuffix(".__init__")
                yield package, "._" in title, title, str(path)


def _content(path: Path, max_bytes: int) -> bytes:
    """The bytes of the file; none when there are more than `max_bytes`, no docstrings, or it cannot be read."""
    try:
        content = path.read_bytes() if path.stat().st_size <= max_bytes else b""
    except OSError:  # unreadable or just uninstalled: one document less
        return b""
    return content if path.suffix != ".py" or b'"""' in content or b"'''" in content else b""


def _passages(path: Path, content: bytes) -> Iterator[tuple[str, str]]:
    """Headings (may be empty) and texts of a file in its order. A source file that does not compile has none."""
    if path.suffix != ".py":
        text = content.decode("utf-8", errors="ignore").replace("\r\n", "\n")
        yield "", text.partition("\n\n")[2] if path.name == "METADATA" else text
        return
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's files
            code = compile(content, str(path), "exec", dont_inherit=True, optimize=0)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return
    yield from _strings(code)


def _strings(code: CodeType) -> Iterator[tuple[str, str]]:
    """Docstrings with their names and arguments, and other long strings, of a compiled module, class or function.
    Compiled code is searched, not the syntax tree: building one as Python objects takes three times as long."""
    # The docstring is the first constant of a module or function; in a class its name and line come before.
    places = 1 if code.co_flags & inspect.CO_OPTIMIZED or code.co_name == "<module>" else 3
    arguments = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    heading = f"{code.co_qualname}({', '.join(arguments)})" if arguments else code.co_qualname
    for index, constant in enumerate(code.co_consts):
        if isinstance(constant, CodeType):
            yield from _strings(constant)
        elif isinstance(constant, str):
            is_docstring = index < places and len(constant) >= DOCSTRING_CHARS
            if is_docstring or len(constant) >= LONG_STRING_CHARS:
                yield heading if is_docstring and not code.co_name.startswith("<") else "", constant


def _new_prose(passages: Iterable[tuple[str, str]], seen: set[str]) -> list[str]:
    """The paragraphs of `passages` that are prose and not in `seen`, each heading before what is left of its text."""
    kept = []
    for heading, text in passages:
        text = text.encode(errors="replace").decode()  # lone surrogates, which no file can hold
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text)):
            key = " ".join(paragraph.split())
            if is_prose(paragraph) and key not in seen:
                seen.add(key)
                paragraphs.append(_unwrap(paragraph))
        if paragraphs:
            kept += [heading, *paragraphs] if heading else paragraphs
    return kept


def is_prose(paragraph: str) -> bool:
    """Whether a paragraph reads like English sentences, not code, a table, a list of names or another language."""
    words = paragraph.split()
    return (
        len(words) >= PROSE_WORDS
        and sum(map(str.isalpha, words)) >= PROSE_ALPHA_FRAC * len(words)
        and sum(map(COMMON_WORDS.__contains__, words)) >= PROSE_COMMON_FRAC * len(words)
        and not paragraph.lstrip().startswith(">>>")
    )


def _unwrap(paragraph: str) -> str:
    """The paragraph on one line when all its lines begin at the same column, as wrapped prose does."""
    lines = paragraph.strip("\n").splitlines()
    columns = {len(line) - len(line.lstrip()) for line in lines}
    is_list = any(line.lstrip()[:1] in ("-", "*", "|", "+") for line in lines)
    return "\n".join(lines) if len(columns) > 1 or is_list else " ".join(paragraph.split())
