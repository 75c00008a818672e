"""Speed and memory of tokenizers on the same text: rustbpe (ours), rustbpe 0.1.0, HF tokenizers, bpeasy, tiktoken.

Every measurement runs in its own process, contenders take turns, and times and memory are medians over the runs. Texts
are loaded before the clock starts; memory is the peak during the step minus what the process held before. Training
uses all cores, encoding one thread. Prints tables, then one JSON line.

    uv pip install --target competitors --no-deps rustbpe==0.1.0 bpeasy
    python dev/bench_tokenizer.py --data local --competitors competitors
    python dev/bench_tokenizer.py --data local --scaling 10,30,90,300 --runs 1 --contenders ""
"""

import argparse
import hashlib
import json
import math
import os
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROOT = Path(__file__).resolve().parent.parent
COMPETITORS = ("rustbpe-0.1.0", "hf-tokenizers", "bpeasy", "tiktoken")
OURS = "rustbpe"
VARIANTS = (OURS, "rustbpe, Arrow", "rustbpe, lists")  # trained from Arrow arrays; encoding to lists of int
TARGETS = {"rustbpe-0.1.0": 8.0, "hf-tokenizers": 12.0}  # how many times faster training should be
ENCODE_TARGET = 4.0  # times faster than tiktoken, per thread
SOURCE_SUFFIXES = (".py", ".pyi", ".h", ".rst", ".md", ".txt", ".js", ".html", ".c", ".cpp", ".rs")
LARGEST_SOURCE_BYTES = 1 << 20  # larger files are data rather than text
BPEASY_MAX_TOKEN_BYTES = 1 << 20  # it requires a limit; this one is never reached


# --- one measurement, run in its own process -----------------------------------------------------


def status_kb(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def measured(work: Callable[[], object]) -> tuple[object, float, float]:
    """Result of `work`, its seconds, and the peak growth of the process in MB."""
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak to current use
    before = status_kb("VmRSS")
    start = time.perf_counter()
    result = work()
    seconds = time.perf_counter() - start
    return result, seconds, (status_kb("VmHWM") - before) / 1024


def digest_of(tokens: list[bytes]) -> str:
    digest = hashlib.sha256()
    for token in tokens:
        digest.update(len(token).to_bytes(4, "little") + token)
    return digest.hexdigest()[:16]


def train_rustbpe(texts: list[str], arrays: list[pa.Array], args: argparse.Namespace) -> Callable[[], list]:
    """Either version: the interface is the same."""
    import rustbpe

    tokenizer = rustbpe.Tokenizer()
    tokenizer.train_from_iterator(arrays or iter(texts), args.vocab_size, pattern=args.pattern)
    return lambda: [token for token, _ in tokenizer.get_mergeable_ranks()]


def train_hf(texts: list[str], arrays: list[pa.Array], args: argparse.Namespace) -> Callable[[], list]:
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(args.pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=args.vocab_size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(iter(texts), trainer)
    tokenizer.save(args.model + ".hf")
    # Its tokens use GPT-2's alphabet: printable characters stand for themselves, other bytes start at U+0100.
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(i): i for i in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return lambda: [bytes(byte_of[character] for character in token) for token, _ in vocabulary]


def train_bpeasy(texts: list[str], arrays: list[pa.Array], args: argparse.Namespace) -> Callable[[], list]:
    import bpeasy

    ranks = bpeasy.train_bpe(iter(texts), args.pattern, BPEASY_MAX_TOKEN_BYTES, args.vocab_size)
    return lambda: sorted(ranks, key=ranks.get)


def encode_rustbpe(args: argparse.Namespace) -> Callable[[list[str]], object]:
    tokenizer = load_ours(args)
    return lambda texts: tokenizer.encode_packed(texts, 1)


def encode_rustbpe_lists(args: argparse.Namespace) -> Callable[[list[str]], object]:
    tokenizer = load_ours(args)
    return lambda texts: tokenizer.batch_encode(texts, 1)


def encode_tiktoken(args: argparse.Namespace) -> Callable[[list[str]], object]:
    import tiktoken
    from tiktoken.load import load_tiktoken_bpe

    ranks = load_tiktoken_bpe(args.model)
    encoding = tiktoken.Encoding("bench", pat_str=args.pattern, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: encoding.encode_ordinary_batch(texts, num_threads=1)


def encode_hf(args: argparse.Namespace) -> Callable[[list[str]], object]:
    from tokenizers import Tokenizer

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(args.model + ".hf")
    return lambda texts: [encoding.ids for encoding in tokenizer.encode_batch_fast(texts)]


def encode_old_rustbpe(args: argparse.Namespace) -> Callable[[list[str]], object]:
    import rustbpe

    tokenizer = rustbpe.Tokenizer()  # cannot load ranks, so it trains again
    tokenizer.train_from_iterator(chain.from_iterable(read_texts(args.text)), args.vocab_size, pattern=args.pattern)
    return lambda texts: [tokenizer.encode(text) for text in texts]


def load_ours(args: argparse.Namespace):
    from tiktoken.load import load_tiktoken_bpe

    import rustbpe

    return rustbpe.Tokenizer.from_ranks(load_tiktoken_bpe(args.model), args.pattern)


TRAINERS = {
    OURS: train_rustbpe,
    "rustbpe, Arrow": train_rustbpe,
    "rustbpe-0.1.0": train_rustbpe,
    "hf-tokenizers": train_hf,
    "bpeasy": train_bpeasy,
}
ENCODERS = {
    OURS: encode_rustbpe,
    "rustbpe, lists": encode_rustbpe_lists,
    "tiktoken": encode_tiktoken,
    "hf-tokenizers": encode_hf,
    "rustbpe-0.1.0": encode_old_rustbpe,
}


def read_texts(path: str) -> Iterator[list[str]]:
    with pq.ParquetFile(path) as parquet:
        for row_group in range(parquet.num_row_groups):
            yield parquet.read_row_group(row_group, columns=["text"])["text"].to_pylist()


def measure_training(args: argparse.Namespace) -> dict:
    from tiktoken.load import load_tiktoken_bpe

    arrow = args.name.endswith("Arrow")
    arrays = [pq.read_table(args.text)["text"]] if arrow else []
    texts = [] if arrow else list(chain.from_iterable(read_texts(args.text)))
    tokens, seconds, grown_mb = measured(lambda: TRAINERS[args.name](texts, arrays, args))
    vocabulary = tokens()
    if args.name == OURS:
        from nanochat.tokenizer import format_ranks

        Path(args.model).write_bytes(format_ranks(vocabulary))
    ours = load_tiktoken_bpe(args.model) if Path(args.model).exists() else {}
    common = len(ours.keys() & set(vocabulary))
    result = {"seconds": seconds, "peak_mb": grown_mb, "tokens": len(vocabulary), "common": common}
    return result | {"digest": digest_of(vocabulary)}


def measure_encoding(args: argparse.Namespace) -> dict:
    encode = ENCODERS[args.name](args)
    texts, num_bytes = [], 0
    for text in chain.from_iterable(read_texts(args.text)):
        texts.append(text)
        num_bytes += len(text.encode())
        if num_bytes >= args.encode_mb * 1e6:
            break
    encode(texts[:100])
    ids, seconds, grown_mb = measured(lambda: encode(texts))
    flat = memoryview(ids[0]).cast("I").tolist() if isinstance(ids, tuple) else list(chain.from_iterable(ids))
    digest = hashlib.sha256(",".join(map(str, flat)).encode()).hexdigest()[:16]
    result = {"seconds": seconds, "peak_mb": grown_mb, "tokens": len(flat), "digest": digest}
    return result | {"mb_per_second": num_bytes / seconds / 1e6, "tokens_per_second": len(flat) / seconds}


# --- all of them ---------------------------------------------------------------------------------


def measure(kind: str, name: str, text: Path, model: Path, args: argparse.Namespace) -> dict | None:
    """Run one measurement in a process; None if the contender is not installed or fails."""
    command = [sys.executable, __file__, "--measure", kind, "--name", name, "--text", text, "--model", model]
    command += ["--vocab-size", str(args.vocab_size), "--pattern", args.pattern, "--encode-mb", str(args.encode_mb)]
    path = [str(ROOT)] if name in VARIANTS else [args.competitors, str(ROOT)]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, path)), "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return json.loads(done.stdout.splitlines()[-1])
    print(f"{kind} {name}: failed, {(done.stderr.strip().splitlines() or ['no message'])[-1]}", flush=True)
    return None


def write_text(sources: Iterator[str], path: Path, max_bytes: float) -> int:
    """Write documents to a parquet file until it has `max_bytes` of text; returns the actual number of bytes."""
    schema = pa.schema({"text": pa.string()})
    total, batch, batch_bytes = 0, [], 0
    with pq.ParquetWriter(path, schema) as writer:
        for text in chain(sources, [None]):
            if text is not None:
                batch.append(text)
                batch_bytes += len(text.encode())
            if batch_bytes > 4e6 or total + batch_bytes >= max_bytes or text is None:
                writer.write_table(pa.table({"text": batch}, schema=schema))
                total, batch, batch_bytes = total + batch_bytes, [], 0
            if total >= max_bytes:
                break
    return total


def prose(data: str) -> Iterator[str]:
    from nanochat.data.dataset import document_batches, shard_paths

    for _, batch in document_batches(shard_paths(data, "train") + shard_paths(data, "val")):
        yield from batch.to_pylist()


def sources_on_this_machine(folders: list[Path]) -> Iterator[str]:
    """Source code and documentation below `folders`."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix in SOURCE_SUFFIXES and path.is_file() and path.stat().st_size <= LARGEST_SOURCE_BYTES:
                yield path.read_text(encoding="utf-8", errors="replace")


def compare(kind: str, contenders: list[str], text: Path, model: Path, args: argparse.Namespace) -> dict[str, dict]:
    """Medians per contender over `--runs` rounds."""
    runs: dict[str, list[dict]] = {name: [] for name in contenders}
    for _ in range(args.runs):
        for name in [name for name in contenders if runs[name] is not None]:
            result = measure(kind, name, text, model, args)
            if result is None:
                runs[name] = None
            else:
                runs[name].append(result)
    medians = {}
    for name, results in runs.items():
        if results:
            medians[name] = results[0] | {
                key: statistics.median(result[key] for result in results)
                for key in results[0]
                if isinstance(results[0][key], float)
            }
            medians[name]["seconds_min_max"] = [f(result["seconds"] for result in results) for f in (min, max)]
    return medians


def print_table(title: str, results: dict[str, dict], target_of: Callable[[str], float | None]) -> None:
    ours = results.get(OURS)
    heads = f"{'seconds':>10}{'min':>8}{'max':>8}{'ours is':>10}{'target':>8}{'peak MB':>10}{'tokens':>12}"
    print(f"\n{title:18}{heads}  same as ours")
    for name, row in results.items():
        ratio = f"{row['seconds'] / ours['seconds']:.1f}x" if ours else "-"
        target = f"{target_of(name):.0f}x" if target_of(name) else "-"
        same = "yes" if ours and row["digest"] == ours["digest"] else "no"
        if same == "no" and "common" in row:
            same = "same tokens, other order" if row["common"] == row["tokens"] else f"no, {row['common']:,} in common"
        low, high = row["seconds_min_max"]
        print(
            f"{name:18}{row['seconds']:10.2f}{low:8.2f}{high:8.2f}{ratio:>10}{target:>8}{row['peak_mb']:10.0f}"
            f"{row['tokens']:12,}  {same}",
            flush=True,
        )


def scaling(args: argparse.Namespace, folder: Path) -> list[dict]:
    """Train ours on texts of growing size: prose as far as it lasts, then source files found on this machine."""
    rows = []
    folders = args.sources or [Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))]
    for size in args.scaling:
        path = folder / f"scaling_{size}.parquet"
        num_bytes = write_text(chain(prose(args.data), sources_on_this_machine(folders)), path, size * 1e6)
        results = [measure("train", "rustbpe, Arrow", path, folder / "unused", args) for _ in range(args.runs)]
        path.unlink()
        seconds, peak_mb = (statistics.median(result[key] for result in results) for key in ("seconds", "peak_mb"))
        rows.append({"mb": num_bytes / 1e6, "seconds": seconds, "peak_mb": peak_mb})
    return rows


def exponent(rows: list[dict], key: str) -> float:
    """Least-squares slope of log(`key`) over log(size): 1 means linear growth."""
    if len(rows) < 2:
        return math.nan
    points = [(math.log(row["mb"]), math.log(max(row[key], 1e-9))) for row in rows]
    return statistics.linear_regression(*zip(*points, strict=True)).slope


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="local", help="data set whose shards are the text, validation included")
    parser.add_argument("--max-mb", type=float, default=100, help="megabytes of it to train on")
    parser.add_argument("--encode-mb", type=float, default=20, help="megabytes of it to encode")
    parser.add_argument("--vocab-size", type=int, default=32_768)
    parser.add_argument("--runs", type=int, default=3, help="rounds of measurements")
    parser.add_argument("--competitors", default="", help="folder with rustbpe 0.1.0 and bpeasy, from pip --target")
    parser.add_argument("--contenders", default=",".join(COMPETITORS), help="contenders, separated by commas")
    parser.add_argument("--scaling", type=lambda text: [float(part) for part in text.split(",")], default=[],
                        help="sizes in MB, separated by commas, to train ours alone on")  # fmt: skip
    parser.add_argument("--sources", type=Path, nargs="*", help="more text for --scaling (default: installed Python)")
    for flag in ("--measure", "--name", "--text", "--model", "--pattern"):
        parser.add_argument(flag, help=argparse.SUPPRESS)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.measure:
        print(json.dumps(measure_training(args) if args.measure == "train" else measure_encoding(args)))
        return
    sys.path.insert(0, str(ROOT))
    from nanochat.tokenizer import SPLIT_PATTERN

    args.pattern = SPLIT_PATTERN
    chosen = [name for name in args.contenders.split(",") if name]
    report = {"vocab_size": args.vocab_size, "runs": args.runs, "cores": os.cpu_count()}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if chosen:
            text, model = folder / "text.parquet", folder / "ranks.tiktoken"
            report["train_mb"] = write_text(prose(args.data), text, args.max_mb * 1e6) / 1e6
            names = [name for name in TRAINERS if name in (*VARIANTS, *chosen)]
            report["train"] = compare("train", names, text, model, args)
            print_table(f"train {report['train_mb']:.0f} MB", report["train"], TARGETS.get)
            names = [name for name in ENCODERS if name in (*VARIANTS, *chosen)]
            report["encode"] = compare("encode", names, text, model, args)
            print_table(f"encode {args.encode_mb:.0f} MB", report["encode"], {"tiktoken": ENCODE_TARGET}.get)
            for name, row in report["encode"].items():
                print(
                    f"{name:18}{row['mb_per_second']:8.1f} MB/s {row['tokens_per_second'] / 1e6:8.2f} Mtok/s per thread"
                )
        if args.scaling:
            report["scaling"] = rows = scaling(args, folder)
            print(f"\n{'MB':>10}{'seconds':>10}{'peak MB':>10}")
            for row in rows:
                print(f"{row['mb']:10.0f}{row['seconds']:10.2f}{row['peak_mb']:10.0f}")
            report["exponents"] = {key: exponent(rows, key) for key in ("seconds", "peak_mb")}
            print("exponents: " + ", ".join(f"{key} {value:.2f}" for key, value in report["exponents"].items()))
    print(json.dumps(report))


if __name__ == "__main__":
    main(parse_args())
