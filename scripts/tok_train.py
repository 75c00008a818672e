"""Train the tokenizer: read the train shards, learn the vocabulary, save it with its table of bytes per token.

Reads the train shards of `--data`; writes the folder `tokenizer` of the base folder and a report record.

    python -m scripts.tok_train --data local --vocab-size 2048 --max-chars 5000000     # tiny, on a CPU
    python -m scripts.tok_train                                                        # one GPU: no GPU is used
    python -m scripts.tok_train --vocab-size 65536                                     # eight GPUs: likewise
"""

import argparse
import io
import time
from collections.abc import Iterable, Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from nanochat import report
from nanochat.common import UserError, print0, run_main, write_atomic
from nanochat.data.dataset import DEFAULT_DATA, document_batches, shard_paths
from nanochat.tokenizer import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, TOKEN_BYTES_FILE, Tokenizer, tokenizer_dir

PROGRESS_UNITS = {"count": "B", "merge": " merges"}


class CharacterBudget:
    """Cuts a stream of documents to `doc_cap` characters each and `max_chars` in all (0: no limit)."""

    def __init__(self, max_chars: int, doc_cap: int):
        self.max_chars = max_chars
        self.doc_cap = doc_cap
        self.num_documents = 0
        self.num_chars = 0
        self.num_bytes = 0

    def limit(self, batches: Iterable[pa.Array]) -> Iterator[pa.Array]:
        """The documents of `batches`, capped, up to the one that exhausts the budget, which is cut short."""
        for batch in batches:
            documents = pc.utf8_slice_codeunits(batch, 0, self.doc_cap) if self.doc_cap else batch
            if self.max_chars:
                documents = self._fit(documents)
            self.num_documents += len(documents)
            self.num_chars += pc.sum(pc.utf8_length(documents)).as_py() or 0
            self.num_bytes += pc.sum(pc.binary_length(documents)).as_py() or 0
            yield documents
            if self.max_chars and self.num_chars >= self.max_chars:
                return

    def _fit(self, documents: pa.Array) -> pa.Array:
        """The documents that fit the rest of the budget, the last of them cut to fill it."""
        room = self.max_chars - self.num_chars
        ends = np.cumsum(pc.utf8_length(documents).to_numpy(), dtype=np.int64)
        whole = int(np.searchsorted(ends, room, side="right"))
        if whole == len(documents):
            return documents
        used = int(ends[whole - 1]) if whole else 0
        part = pc.utf8_slice_codeunits(documents.slice(whole, 1), 0, room - used)
        return pa.concat_arrays([documents.slice(0, whole), part])


class ProgressBar:
    """Shows the trainer's progress as one bar per stage; nothing where stderr is not a terminal."""

    def __init__(self):
        self.stage, self.bar = "", None

    def __call__(self, stage: str, done: int, total: int | None) -> None:
        from tqdm import tqdm

        if stage != self.stage:
            self.close()
            self.stage = stage
            self.bar = tqdm(desc=stage, total=total, unit=PROGRESS_UNITS[stage], unit_scale=True, disable=None)
        self.bar.update(done - self.bar.n)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    # data
    parser.add_argument("--data", default=DEFAULT_DATA, help="hub repository, local folder or file, or 'local'")
    parser.add_argument("--max-chars", type=int, default=2_000_000_000, help="characters to train on (0: all)")
    parser.add_argument("--doc-cap", type=int, default=10_000, help="characters used of each document (0: all)")
    # vocabulary
    parser.add_argument("--vocab-size", type=int, default=32_768, help="number of tokens, special ones included")
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # Inputs
    for flag, value in [("--max-chars", args.max_chars), ("--doc-cap", args.doc_cap)]:
        if value < 0:
            raise UserError(f"{flag} is {value}, but must be 0 (no limit) or more")
    if not MIN_VOCAB_SIZE <= args.vocab_size <= MAX_VOCAB_SIZE:
        raise UserError(f"--vocab-size is {args.vocab_size}, but must be {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}")
    paths = shard_paths(args.data, "train")
    budget = CharacterBudget(args.max_chars, args.doc_cap)
    documents = budget.limit(batch for _, batch in document_batches(paths))

    # Training
    print0(f"training a vocabulary of {args.vocab_size:,} on {len(paths)} shards of {args.data}")
    progress = ProgressBar()
    start = time.perf_counter()
    try:
        tokenizer = Tokenizer.train(documents, args.vocab_size, progress=progress)
    finally:
        progress.close()
    seconds = time.perf_counter() - start
    if tokenizer.vocab_size < args.vocab_size:
        raise UserError(
            f"the text holds pairs for a vocabulary of {tokenizer.vocab_size} only, not {args.vocab_size}; "
            f"give more text or a smaller --vocab-size"
        )

    # Output
    folder = tokenizer_dir()
    token_bytes = tokenizer.token_bytes()
    table = io.BytesIO()
    np.save(table, token_bytes)
    tokenizer.save(folder)
    write_atomic(folder / TOKEN_BYTES_FILE, table.getvalue())
    lengths = token_bytes[token_bytes > 0]
    results = {
        "vocab_size": tokenizer.vocab_size,
        "train_documents": budget.num_documents,
        "train_chars": budget.num_chars,
        "train_bytes": budget.num_bytes,
        "train_seconds": round(seconds, 3),
        "mean_token_bytes": round(float(lengths.mean()), 3),
        "max_token_bytes": int(lengths.max()),
        "fingerprint": tokenizer.fingerprint,
    }
    report.append_record("tok_train", settings=vars(args), results=results)
    print0(
        f"{budget.num_chars:,} characters of {budget.num_documents:,} documents in {seconds:.1f} s; saved to {folder}"
    )


if __name__ == "__main__":
    run_main(main, parse_args)
