"""How well the tokenizer compresses: bytes per token on texts of several kinds, beside GPT-2's and GPT-4's tokenizers.

Reads the tokenizer, the sample texts in `tok_eval_texts`, the beginning of both splits of `--data`, and, if they can be
fetched, the vocabularies of the other two tokenizers (kept in the base folder); prints a table and writes a report
record.

    python -m scripts.tok_eval --data local --max-chars 100000      # tiny, on a CPU
    python -m scripts.tok_eval                                      # one GPU: no GPU is used
    python -m scripts.tok_eval                                      # eight GPUs: likewise
"""

import argparse
import os
import threading
from collections.abc import Callable
from pathlib import Path

from nanochat.common import base_dir, print0, run_main
from nanochat.data.dataset import DEFAULT_DATA, document_batches, shard_paths
from nanochat.flags import POSITIVE, ZERO_OR_MORE, Flag, parse
from nanochat.records import append_record
from nanochat.tokenizer import Tokenizer, tokenizer_dir

TEXTS = ("news", "code", "maths", "science", "Korean")  # files of that name in the folder
TEXTS_FOLDER = Path(__file__).parent / "tok_eval_texts"
REFERENCES = {"GPT-2": "gpt2", "GPT-4": "cl100k_base"}  # their names in tiktoken
DOCUMENT_CHARS = 10_000  # of each document of the data set, so that one long book does not stand for all

FLAGS = {
    "data": (
        Flag("data", str, DEFAULT_DATA, "hub repository, local folder or file, or 'local'"),
        Flag("max_chars", int, 1_000_000, "characters used of each split", POSITIVE),
    ),
    "other tokenizers": (Flag("timeout", float, 20.0, "seconds to wait for their files", ZERO_OR_MORE),),
}

Count = Callable[[str], int]  # number of tokens of a text


def parse_args() -> argparse.Namespace:
    return parse(__doc__, FLAGS)


def load_references(timeout_seconds: float) -> dict[str, Count | str]:
    """For each of `REFERENCES` a function that counts tokens, or the reason why there is none."""
    os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(base_dir() / "tiktoken"))
    found: dict[str, Count | str] = {}

    def load() -> None:
        import tiktoken

        for title, name in REFERENCES.items():
            try:
                encoding = tiktoken.get_encoding(name)
                found[title] = lambda text, encoding=encoding: len(encoding.encode_ordinary(text))
            except (OSError, ValueError) as error:  # no network, or not the file that was expected
                found[title] = f"cannot be loaded ({type(error).__name__})"

    # The download has no time limit of its own, so it runs in a thread that may be left behind.
    thread = threading.Thread(target=load, daemon=True)
    thread.start()
    thread.join(timeout_seconds)
    return {title: found.get(title, f"no answer in {timeout_seconds:g} seconds") for title in REFERENCES}


def beginning(data: str, split: str, max_chars: int) -> str:
    """The beginnings of the first documents of a split, at most `max_chars` characters in all."""
    documents = (str(text) for _, batch in document_batches(shard_paths(data, split)) for text in batch)
    parts, room = [], max_chars
    for document in documents:
        parts.append(document[: min(room, DOCUMENT_CHARS)])
        room -= len(parts[-1])
        if room <= 0:
            break
    return "\n\n".join(parts)


def main(args: argparse.Namespace) -> None:
    # inputs
    tokenizer = Tokenizer.load(tokenizer_dir())
    texts = {name: (TEXTS_FOLDER / f"{name}.txt").read_text(encoding="utf-8").strip() for name in TEXTS}
    texts |= {f"data, {split}": beginning(args.data, split, args.max_chars) for split in ("train", "val")}

    # references
    counters: dict[str, Count] = {"nanochat": lambda text: len(tokenizer.encode(text))}
    skipped = {}
    for title, reference in load_references(args.timeout).items():
        if callable(reference):
            counters[title] = reference
        else:
            skipped[title] = f"skipped, {reference}"
            print0(f"{title}: {skipped[title]}")

    # table
    table = []
    for name, text in texts.items():
        num_bytes = len(text.encode())
        ratios = {title: round(num_bytes / count(text), 3) for title, count in counters.items()}
        table.append({"text": name, "bytes": num_bytes, **ratios})
    print0("bytes per token".ljust(16) + f"{'bytes':>12}" + "".join(f"{title:>12}" for title in counters))
    for row in table:
        print0(f"{row['text']:16}{row['bytes']:>12,}" + "".join(f"{row[title]:>12.3f}" for title in counters))

    # summary to the report
    results = {"vocab_size": tokenizer.vocab_size}
    results |= {f"bytes per token, {row['text']}": row["nanochat"] for row in table}
    append_record("tok_eval", settings=vars(args), results=results | skipped, table=table)


if __name__ == "__main__":
    run_main(main, parse_args)
