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
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from nanochat.common import UserError, print0, run_main, write_atomic
from nanochat.data.dataset import DEFAULT_DATA, document_batches, shard_paths
from nanochat.flags import ZERO_OR_MORE, Flag, Range, parse
from nanochat.records import append_record
from nanochat.tokenizer import MAX_VOCAB_SIZE, MIN_VOCAB_SIZE, TOKEN_BYTES_FILE, Tokenizer, tokenizer_dir

PROGRESS_UNITS = {"count": "B", "merge": " merges"}

FLAGS = {
    "data": (
        Flag("data", str, DEFAULT_DATA, "hub repository, local folder or file, or 'local'"),
        Flag("max_chars", int, 2_000_000_000, "characters to train on, 0 for all", ZERO_OR_MORE),
        Flag("doc_cap", int, 10_000, "characters used of each document, 0 for all", ZERO_OR_MORE),
    ),
    "vocabulary": (
        Flag("vocab_size", int, 32_768, "number of tokens, special ones included",
             Range(f"be {MIN_VOCAB_SIZE} to {MAX_VOCAB_SIZE}", lambda size: MIN_VOCAB_SIZE <= size <= MAX_VOCAB_SIZE)),
    ),
}  # fmt: skip


def parse_args() -> argparse.Namespace:
    return parse(__doc__, FLAGS)


def limited(batches: Iterable[pa.Array], max_chars: int, doc_cap: int, read: dict[str, int]) -> Iterator[pa.Array]:
    """The documents of `batches`, each cut to `doc_cap` characters, up to the one at which `max_chars` are reached,
    which is cut to fit (0: no limit). Adds up what it gives in `read`: documents, chars and bytes."""
    read |= {"documents": 0, "chars": 0, "bytes": 0}
    for batch in batches:
        documents = pc.utf8_slice_codeunits(batch, 0, doc_cap) if doc_cap else batch
        if max_chars:
            room = max_chars - read["chars"]
            ends = np.cumsum(pc.utf8_length(documents).to_numpy(), dtype=np.int64)
            whole = int(np.searchsorted(ends, room, side="right"))  # documents that fit entirely
            if whole < len(documents):
                used = int(ends[whole - 1]) if whole else 0
                part = pc.utf8_slice_codeunits(documents.slice(whole, 1), 0, room - used)
                documents = pa.concat_arrays([documents.slice(0, whole), part])
        read["documents"] += len(documents)
        read["chars"] += pc.sum(pc.utf8_length(documents)).as_py() or 0
        read["bytes"] += pc.sum(pc.binary_length(documents)).as_py() or 0
        yield documents
        if max_chars and read["chars"] >= max_chars:
            return


def show_progress(bars: dict[str, tqdm], stage: str, done: int, total: int | None) -> None:
    """Advance the bar of a stage; nothing is shown when stderr is not a terminal."""
    if stage not in bars:
        bars[stage] = tqdm(desc=stage, total=total, unit=PROGRESS_UNITS[stage], unit_scale=True, disable=None)
    bars[stage].update(done - bars[stage].n)


def main(args: argparse.Namespace) -> None:
    # inputs
    paths = shard_paths(args.data, "train")
    read: dict[str, int] = {}
    documents = limited((batch for _, batch in document_batches(paths)), args.max_chars, args.doc_cap, read)

    # training
    print0(f"training a vocabulary of {args.vocab_size:,} on {len(paths)} shards of {args.data}")
    start, bars = time.perf_counter(), {}
    try:
        tokenizer = Tokenizer.train(documents, args.vocab_size, progress=partial(show_progress, bars))
    finally:
        for bar in bars.values():
            bar.close()
    seconds = time.perf_counter() - start
    if tokenizer.vocab_size < args.vocab_size:
        raise UserError(
            f"the text holds pairs for a vocabulary of {tokenizer.vocab_size} only, not {args.vocab_size}; "
            f"give more text or a smaller --vocab-size"
        )

    # output
    folder = tokenizer_dir()
    token_bytes = tokenizer.token_bytes()
    table = io.BytesIO()
    np.save(table, token_bytes)
    tokenizer.save(folder)
    write_atomic(folder / TOKEN_BYTES_FILE, table.getvalue())

    # summary to the report
    lengths = token_bytes[token_bytes > 0]
    results = {
        "vocab_size": tokenizer.vocab_size, **{f"train_{kind}": count for kind, count in read.items()},
        "train_seconds": round(seconds, 3), "mean_token_bytes": round(float(lengths.mean()), 3),
        "max_token_bytes": int(lengths.max()), "fingerprint": tokenizer.fingerprint,
    }  # fmt: skip
    append_record("tok_train", settings=vars(args), results=results)
    print0(f"{read['chars']:,} characters of {read['documents']:,} documents in {seconds:.1f} s; saved to {folder}")


if __name__ == "__main__":
    run_main(main, parse_args)
