"""Speed of the engine against a loop without a cache and Hugging Face generate: a table, then one JSON line.

    python dev/bench_engine.py                                                      # everything
    python dev/bench_engine.py --depth 6 --batch 1 --prompt 64 --against hf         # a single cell
    python dev/bench_engine.py --depth 4 --batch 1 --against --source base          # also the loss of bfloat16 and int8
    python dev/bench_engine.py --architecture recipe --against --arrival 2000       # a long prompt joins 64 rows

All contenders run the same random weights and decode greedily, in turns, each after a
warm-up. Their ids are compared with those of the engine in float32: at the first difference in a row, the logits of
the two candidates must be equal up to rounding, or the run fails.

    prefill      prompt tokens per second, until all rows have their first token
    decode       tokens per second of all rows together, while all of them decode
    x HF         median decode speed relative to Hugging Face in float32
    overall      all new tokens over the total time, prefill included
    of FLOPs     share of the device's peak that the operations of prefill reach; "-" where that is not known
    GB/s         what decoding must read (`roofline.py`): the weights once, of every row the keys and values it sees
    bandwidth    share of the device's memory bandwidth, or where that is not known, of the bandwidth measured; over
                 100 % if all fits in the processor's cache

The loop without a cache generates only a few tokens, since each is a pass over the whole sequence; more would make it
look worse. Below the table: the longest pause of rows that decode while a long prompt arrives (`--arrival`), first with
whatever has to be prepared, then again; N samples of one prompt, which is read once; and the loss that smaller weights
add, measured through the decode pass, on a checkpoint if one is chosen, else on random weights (which says little).
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dev.roofline import ARCHITECTURES, Form, decode_bytes, peaks, prefill_flops, share, shown
from nanochat.checkpoint import add_checkpoint_flags
from nanochat.common import Runtime, UserError, init_runtime, run_main
from nanochat.data.dataset import document_batches, shard_paths
from nanochat.engine.engine import Engine, serving_model
from nanochat.engine.inference import WEIGHTS, Piece
from nanochat.engine.sampling import Sampling
from nanochat.engine.weights import INT8_MAX_ROWS
from nanochat.model.gpt import GPT, build_model
from nanochat.model.hf import save_hf
from nanochat.model.load import LoadedModel, load_model
from nanochat.tokenizer import SPECIAL_TOKENS, SPLIT_PATTERN, Tokenizer

BANDWIDTH_SHAPE = (8192, 8192)  # of float32: 256 MiB, far beyond any cache
TIE = 1e-4  # logits closer than this are equal up to rounding
WARMUP_TOKENS = 8
QUALITY_ROWS = INT8_MAX_ROWS["cpu"]  # so that the packed 8-bit weights are measured
ARRIVAL_PROMPT, ARRIVAL_STEPS = 64, 16  # tokens of the rows that decode, steps before the long prompt and after it
PREFIX_PROMPT, PREFIX_TOKENS = 256, 8  # tokens of the shared prompt and of each sample
OTHERS = ("naive", "hf", "hf-bfloat16")
DEFAULT_WEIGHTS = {"cpu": ["float32", "bfloat16", "int8"]}
OTHER_WEIGHTS = ["float32", "bfloat16"]
Ids = list[list[int]]


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--device-type", default="", help="cuda, mps or cpu (default: the best one present)")
    # what is measured
    add("--depth", type=int, nargs="+", default=[4, 6, 12], help="depths to measure, one after another")
    add("--architecture", default="october", choices=ARCHITECTURES, help="Hugging Face has the october one only")
    add("--batch", type=int, nargs="+", default=[1, 8, 32], help="rows that decode at once")
    add("--prompt", type=int, nargs="+", default=[64, 256], help="tokens of a prompt")
    add("--new-tokens", type=int, default=128, help="tokens generated for each prompt")
    add("--vocab-size", type=int, default=32768)
    add("--weights", nargs="+", choices=WEIGHTS, help="forms of the engine's weights (default: those of the device)")
    add("--against", nargs="*", default=list(OTHERS), choices=OTHERS, help="contenders beside the engine")
    add("--naive-tokens", type=int, default=4, help="tokens that the loop without a cache generates")
    add("--naive-max", type=int, default=2048, help="prompt tokens of a batch beyond which that loop is left out")
    add("--repeats", type=int, default=3)
    add("--arrival", type=int, default=0, help="tokens of a prompt that arrives while rows decode; 0 leaves that out")
    add("--arrival-rows", type=int, default=64, help="rows that decode then")
    add("--samples", type=int, default=16, help="samples of one prompt; 0 leaves that part out")
    # quality
    add_checkpoint_flags(parser)
    parser.set_defaults(source="")
    add("--text", default="", help="file to take the loss on (default: the checkpoint's validation shard)")
    add("--quality-tokens", type=int, default=1024, help="tokens the loss is taken on; 0 leaves that part out")
    return parser.parse_args()


# --- contenders ----------------------------------------------------------------------------------


@dataclass
class Run:
    """One generation: new ids of each row and total seconds; tokens and seconds of the time when all rows were decoding
    (0 if they never were)."""

    ids: Ids
    seconds: float
    decode_tokens: int
    decode_seconds: float


@dataclass
class Contender:
    """`generate(prompts, num_tokens)` continues prompts (B, T), computing in `dtype`; no `form`: no cache."""

    name: str
    generate: Callable[[Tensor, int], Run]
    dtype: torch.dtype
    form: Form | None
    max_tokens: int
    prefill: list[float] = field(default_factory=list)  # tokens per second of each repeat
    decode: list[float] = field(default_factory=list)
    overall: list[float] = field(default_factory=list)
    ids: Ids = field(default_factory=list)  # of the first repeat


def engine_contender(
    model: GPT, tokenizer: Tokenizer, weights: str, num_rows: int, runtime: Runtime, num_tokens: int
) -> Contender:
    engine = Engine(model, tokenizer, max_rows=num_rows, weights=weights)
    is_packed = weights == "int8" and num_rows <= INT8_MAX_ROWS[runtime.device.type]
    dtype = engine.model.dtype
    form = Form(1 if is_packed else dtype.itemsize, dtype.itemsize)

    def generate(prompts: Tensor, num_tokens: int) -> Run:
        sampling = Sampling(max_tokens=num_tokens, temperature=0.0, use_tool=False)
        synchronize(runtime)
        begin = time.perf_counter()
        requests = [engine.submit(row.tolist(), sampling, stop_ids=()) for row in prompts]
        started: set[int] = set()
        window: list[tuple[float, int]] = []  # time and tokens so far, while every row decodes
        count = 0
        while engine.has_work:
            events = engine.step()
            count += sum(len(event.tokens) for event in events)
            started |= {id(event.request) for event in events}
            if len(started) == len(requests) and not any(request.is_done for request in requests):
                window.append((time.perf_counter(), count))
        seconds = time.perf_counter() - begin
        (since, before), (until, after) = (window[0], window[-1]) if window else ((0.0, 0), (0.0, 0))
        return Run([request.completions[0].ids for request in requests], seconds, after - before, until - since)

    return Contender(f"engine {weights}", generate, dtype, form, num_tokens)


def naive_contender(model: GPT, num_tokens: int) -> Contender:
    """Runs the whole sequence through the model again for each token."""

    def generate(prompts: Tensor, num_tokens: int) -> Run:
        begin, idx = time.perf_counter(), prompts
        with torch.inference_mode():
            for _ in range(num_tokens):
                logits = model.logits(model.hidden(idx)[:, -1])
                idx = torch.cat((idx, logits.argmax(dim=-1, keepdim=True)), dim=1)
        ids = idx[:, prompts.size(1) :].tolist()
        seconds = time.perf_counter() - begin
        return Run(ids, seconds, idx[:, prompts.size(1) :].numel(), seconds)

    return Contender(f"no cache {dtype_name(model.compute_dtype)}", generate, model.compute_dtype, None, num_tokens)


def hf_contender(model: GPT, tokenizer: Tokenizer, dtype: torch.dtype, runtime: Runtime, num_tokens: int) -> Contender:
    """The NanoChat model of transformers with the same weights and a KV cache."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        save_hf(model, tokenizer, Path(folder))
        theirs = transformers.NanoChatForCausalLM.from_pretrained(folder, dtype=dtype).to(runtime.device).eval()
    theirs.generation_config.eos_token_id = None  # every row is generated to full length

    def generate(prompts: Tensor, num_tokens: int) -> Run:
        times: list[float] = []  # of each token, all rows at once

        def note_time(ids: Tensor, scores: Tensor, **_) -> Tensor:
            times.append(time.perf_counter())
            return torch.zeros(ids.size(0), dtype=torch.bool, device=ids.device)

        synchronize(runtime)
        begin = time.perf_counter()
        with torch.inference_mode():
            ids = theirs.generate(
                prompts,
                attention_mask=torch.ones_like(prompts),
                do_sample=False,
                max_new_tokens=num_tokens,
                pad_token_id=0,
                stopping_criteria=[note_time],
            )
        ids = ids[:, prompts.size(1) :].tolist()
        seconds = time.perf_counter() - begin
        return Run(ids, seconds, prompts.size(0) * (len(times) - 1), times[-1] - times[0])

    return Contender(f"HF {dtype_name(dtype)}", generate, dtype, Form(dtype.itemsize, dtype.itemsize), num_tokens)


# --- measuring -----------------------------------------------------------------------------------


def measure(contenders: list[Contender], make_prompts: Callable[[], Tensor], repeats: int) -> None:
    """Let the contenders take turns on the same prompts. Every repeat has new ones, since the engine caches prompts."""
    for contender in contenders:
        contender.generate(make_prompts(), min(WARMUP_TOKENS, contender.max_tokens))
    for repeat in range(repeats):
        first_prompts, prompts = make_prompts(), make_prompts()
        for contender in contenders:
            first = contender.generate(first_prompts, 1)
            run = contender.generate(prompts, contender.max_tokens)
            num_rows, length = prompts.shape
            if not run.decode_seconds:
                raise UserError(f"--new-tokens is too low for {num_rows} rows to decode all at once; raise it")
            contender.prefill.append(num_rows * length / first.seconds)
            contender.decode.append(run.decode_tokens / run.decode_seconds)
            contender.overall.append(num_rows * contender.max_tokens / run.seconds)
            if repeat == 0:
                contender.ids = run.ids


def compare_ids(model: GPT, prompts: Tensor, reference: Ids, ids: Ids) -> tuple[int, float]:
    """The number of rows in which `ids` and `reference` agree as far as both go, and for the others the largest
    difference between the logits of the first two differing tokens."""
    num_same, largest = 0, 0.0
    for prompt, ours, theirs in zip(prompts.tolist(), reference, ids, strict=True):
        parted = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if parted is None:
            num_same += 1
            continue
        idx = torch.tensor([prompt + ours[:parted]], device=model.device)
        with torch.inference_mode():
            logits = model.logits(model.hidden(idx)[0, -1])
        largest = max(largest, (logits[ours[parted]] - logits[theirs[parted]]).abs().item())
    return num_same, largest


def measured_bandwidth(runtime: Runtime, repeats: int = 5) -> float:
    """Bytes per second read by a large matrix-vector product, the fastest of a few."""
    matrix, vector = torch.ones(BANDWIDTH_SHAPE, device=runtime.device), torch.ones(1, device=runtime.device)
    vector = vector.expand(BANDWIDTH_SHAPE[1]).contiguous()
    fastest = float("inf")
    for _ in range(repeats + 1):
        synchronize(runtime)
        begin = time.perf_counter()
        torch.mv(matrix, vector)
        synchronize(runtime)
        fastest = min(fastest, time.perf_counter() - begin)
    return matrix.numel() * matrix.element_size() / fastest


def synchronize(runtime: Runtime) -> None:
    if runtime.is_cuda:
        torch.cuda.synchronize()


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# --- models --------------------------------------------------------------------------------------


def random_model(depth: int, args: argparse.Namespace, runtime: Runtime) -> GPT:
    """A model in float32. Its output projections and smear, initially zero, are random: every part matters."""
    longest = max(max(args.prompt) + args.new_tokens, PREFIX_PROMPT + args.new_tokens, args.arrival + ARRIVAL_PROMPT)
    config = ARCHITECTURES[args.architecture](depth, vocab_size=args.vocab_size, sequence_len=longest)
    generator = torch.Generator(runtime.device).manual_seed(0)
    model = build_model(config, device=runtime.device, generator=generator).eval().requires_grad_(False)
    for block in model.h:
        for matrix in (block.attn.c_proj.weight, block.mlp.c_proj.weight):
            matrix.normal_(0.0, matrix.size(1) ** -0.5, generator=generator)
    model.lm_head.weight.normal_(0.0, 0.05, generator=generator)
    if config.smear:
        model.smear_lambda.fill_(0.3)
    return model


def placeholder_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer of `vocab_size` tokens: all bytes, then pairs and triples of them."""
    single = [bytes([i]) for i in range(256)]
    longer = (bytes([i >> 8 & 255, i & 255]) + (bytes([i >> 16]) if i >> 16 else b"") for i in range(1 << 24))
    num_longer = vocab_size - len(single) - len(SPECIAL_TOKENS)
    return Tokenizer([*single, *(token for token, _ in zip(longer, range(num_longer), strict=False))], SPLIT_PATTERN)


# --- parts of the run ----------------------------------------------------------------------------


def speed(args: argparse.Namespace, runtime: Runtime, model: GPT, tokenizer: Tokenizer, forms: list[str]) -> list[dict]:
    """Measure and print the table of one depth."""
    random = torch.Generator().manual_seed(1)
    rows = []
    others: dict[str, Contender] = {}
    for name in args.against:
        if name == "naive":
            others[name] = naive_contender(model, args.naive_tokens)
        else:
            dtype = torch.bfloat16 if name == "hf-bfloat16" else torch.float32
            others[name] = hf_contender(model, tokenizer, dtype, runtime, args.new_tokens)
    for num_rows in args.batch:
        engines = [engine_contender(model, tokenizer, weights, num_rows, runtime, args.new_tokens) for weights in forms]
        for length in args.prompt:
            drawn: list[Tensor] = []

            def make_prompts(shape=(num_rows, length), drawn=drawn) -> Tensor:
                drawn.append(torch.randint(args.vocab_size, shape, generator=random).to(runtime.device))
                return drawn[-1]

            contenders = engines + [
                other for name, other in others.items() if name != "naive" or num_rows * length <= args.naive_max
            ]
            for contender in contenders:
                contender.prefill, contender.decode, contender.overall = [], [], []
            before = measured_bandwidth(runtime)
            measure(contenders, make_prompts, args.repeats)
            bandwidth = max(before, measured_bandwidth(runtime))
            # the prompts of the first measured run come after the warm-ups and the first prefill
            prompts = drawn[len(contenders) + 1]
            for contender in contenders:
                row = result_row(model, contender, prompts, contenders, bandwidth)
                print_row(row)
                rows.append(row)
    return rows


def result_row(
    model: GPT, contender: Contender, prompts: Tensor, contenders: list[Contender], bandwidth: float
) -> dict:
    num_rows, length = prompts.shape
    named = {other.name: other for other in contenders}
    row = {
        "depth": model.config.n_layer,
        "batch": num_rows,
        "prompt": length,
        "contender": contender.name,
        "decode_tokens_per_second": spread(contender.decode),
        "overall_tokens_per_second": spread(contender.overall),
        "measured_gb_per_second": bandwidth / 1e9,
    }
    if contender.form:  # without a cache, prefill and decode are the same
        device = torch.cuda.get_device_name() if model.device.type == "cuda" else "cpu"
        peak_bandwidth, peak_flops = peaks(device, contender.dtype)
        moved = decode_bytes(model.config, contender.form, num_rows, length + contender.max_tokens / 2)
        moved *= statistics.median(contender.decode) / num_rows
        flops = prefill_flops(model.config, length) / length * statistics.median(contender.prefill)
        row |= {
            "prefill_tokens_per_second": spread(contender.prefill),
            "share_of_flops": share(flops, peak_flops),
            "gb_per_second": moved / 1e9,
            "share_of_bandwidth": share(moved, peak_bandwidth or bandwidth),
        }
    if "HF float32" in named:
        row["decode_over_hf"] = statistics.median(contender.decode) / statistics.median(named["HF float32"].decode)
    if "engine float32" in named:
        same, gap = compare_ids(model, prompts, named["engine float32"].ids, contender.ids)
        row |= {"rows_same": same, "largest_logit_gap": gap}
    return row


def spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": statistics.median(values), "max": max(values)}


HEADING = (
    "depth batch prompt  contender            prefill tok/s of FLOPs  decode tok/s       min to max       x HF float32"
    "   overall    GB/s  bandwidth  rows with the engine's ids"
)


def print_row(row: dict) -> None:
    decode = row["decode_tokens_per_second"]
    prefill = row.get("prefill_tokens_per_second", {}).get("median")
    same = "-"
    if "rows_same" in row:
        same = f"{row['rows_same']}/{row['batch']}"
        if row["largest_logit_gap"]:
            same += f", parting at logits {row['largest_logit_gap']:.1e} apart"
    print(
        f"{row['depth']:>5} {row['batch']:>5} {row['prompt']:>6}  {row['contender']:<20} {shown(prefill, ',.0f'):>13}"
        f" {shown(row.get('share_of_flops'), '.1%'):>8}"
        f" {decode['median']:>13,.1f} {decode['min']:>9,.1f} to {decode['max']:<9,.1f}"
        f" {shown(row.get('decode_over_hf'), '.2f'):>12} {row['overall_tokens_per_second']['median']:>9,.1f}"
        f" {shown(row.get('gb_per_second'), ',.1f'):>7} {shown(row.get('share_of_bandwidth'), '.0%'):>10}  {same}",
        flush=True,
    )


def rounded(value):
    """`value` with all its floats rounded to five significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.5g}") if isinstance(value, float) else value


def arrival(args: argparse.Namespace, model: GPT, tokenizer: Tokenizer, weights: str) -> dict:
    """The longest pause between two steps that gave tokens to the rows that decode, in ms, from before a long prompt
    arrives until after its first token; the first time, and again."""
    engine = Engine(model, tokenizer, max_rows=args.arrival_rows + 1, weights=weights)
    random = torch.Generator().manual_seed(4)
    sampling = Sampling(max_tokens=model.config.sequence_len, temperature=0.0, use_tool=False)
    pauses = []
    for _ in range(2):
        shape = (args.arrival_rows, ARRIVAL_PROMPT)
        prompts = torch.randint(args.vocab_size, shape, generator=random).tolist()
        rows = [engine.submit(prompt, sampling, stop_ids=()) for prompt in prompts]
        while not all(request.completions[0].tokens for request in rows):
            engine.step()
        long, steps_left, times = None, 2 * ARRIVAL_STEPS, []
        while steps_left:
            if steps_left == ARRIVAL_STEPS and long is None:
                prompt = torch.randint(args.vocab_size, (args.arrival,), generator=random).tolist()
                long = engine.submit(prompt, sampling, stop_ids=())
            events = engine.step()
            if any(event.request is not long for event in events):
                times.append(time.perf_counter())
                steps_left -= long is None or bool(long.completions[0].tokens)
        pauses.append(max(1e3 * (after - before) for before, after in pairwise(times)))
        for request in (*rows, long):
            engine.cancel(request)
        while engine.has_work:
            engine.step()
    first, again = pauses
    print(f"{args.arrival_rows} rows decode, a prompt of {args.arrival:,} tokens arrives: longest pause "
          f"{first:.1f} ms the first time, then {again:.1f} ms (engine {weights})", flush=True)  # fmt: skip
    return {"arrival": args.arrival, "rows": args.arrival_rows, "depth": model.config.n_layer, "weights": weights,
            "first_pause_ms": first, "pause_ms": again}  # fmt: skip


def prefix_sharing(args: argparse.Namespace, runtime: Runtime, model: GPT, tokenizer: Tokenizer) -> dict:
    """N samples of one prompt against N different prompts, in tokens read and seconds."""
    random = torch.Generator().manual_seed(2)
    sampling = Sampling(max_tokens=PREFIX_TOKENS, temperature=1.0, seed=0, use_tool=False)
    engine = Engine(model, tokenizer, max_rows=args.samples)
    results = {"samples": args.samples, "prompt": PREFIX_PROMPT, "depth": model.config.n_layer}
    for name, num_prompts in (("warmup", 1), ("shared", 1), ("apart", args.samples)):
        prompts = torch.randint(args.vocab_size, (num_prompts, PREFIX_PROMPT), generator=random).tolist()
        before = engine.stats.prefill_tokens
        synchronize(runtime)
        begin = time.perf_counter()
        engine.generate(prompts, sampling, num_samples=args.samples // num_prompts, stop_ids=())
        results[f"{name}_seconds"] = time.perf_counter() - begin
        results[f"{name}_prefill_tokens"] = engine.stats.prefill_tokens - before
    print(
        f"{args.samples} samples of a prompt of {PREFIX_PROMPT} tokens: {results['shared_prefill_tokens']:,} tokens "
        f"read, {results['shared_seconds']:.2f} s; {args.samples} prompts: {results['apart_prefill_tokens']:,} "
        f"tokens, {results['apart_seconds']:.2f} s"
    )
    return results


def quality(model: GPT, rows: Tensor, forms: list[str], what: str) -> dict:
    """Loss of the engine's decode pass in nats per token for each kind of weights, compared with float32."""
    with torch.inference_mode():
        plain = model(rows[:, :-1], rows[:, 1:]).item()
    print(f"loss on {rows[:, 1:].numel():,} tokens of {what}, nats a token: {plain:.5f} without a cache")
    exact = decode_losses(model, rows, "float32")
    result = {"loss_on": what, "tokens": exact.numel(), "without_cache": plain}
    for name in dict.fromkeys(["float32", *forms]):
        losses = exact if name == "float32" else decode_losses(model, rows, name)
        more = losses - exact
        error = more.std().item() / more.numel() ** 0.5  # of the mean difference: both saw the same tokens
        print(f"  {name:<10} {losses.mean().item():.5f}  {more.mean().item():+.5f} +- {error:.5f}", flush=True)
        result[name] = {"loss": losses.mean().item(), "more": more.mean().item(), "standard_error": error}
    return result


@torch.inference_mode()
def decode_losses(model: GPT, rows: Tensor, weights: str) -> Tensor:
    """Loss in nats of each token but the first of rows (B, T) int64, decoded one at a time: (B * (T - 1),) float32."""
    engine = serving_model(model, rows.size(0), weights)
    first = engine.prefill([Piece(slot, [token], 0, None) for slot, token in enumerate(rows[:, 0].tolist())])
    losses = [F.cross_entropy(first, rows[:, 1], reduction="none")]
    for position in range(1, rows.size(1) - 1):
        logits = engine.decode(rows[:, position], rows[:, position - 1], [position] * rows.size(0))
        losses.append(F.cross_entropy(logits, rows[:, position + 1], reduction="none"))
    return torch.cat(losses)


def quality_of_checkpoint(args: argparse.Namespace, runtime: Runtime, forms: list[str]) -> dict:
    """`quality` on the given text or the checkpoint's validation shard; every row starts with <|bos|>."""
    loaded = load_model(args.source, runtime, model_tag=args.model_tag, step=args.step)
    length = min(loaded.model.config.sequence_len, args.quality_tokens // QUALITY_ROWS)
    wanted = QUALITY_ROWS * length
    ids = quality_ids(args.text, loaded, wanted)
    rows = F.pad(torch.tensor(ids[:wanted]).view(QUALITY_ROWS, length), (1, 0), value=loaded.tokenizer.bos_id)
    name = f"{args.source} {loaded.folder.parent.name} {loaded.folder.name}"
    return quality(loaded.model, rows[:, :length].to(runtime.device), forms, f"{args.text or 'its data'} by {name}")


def quality_ids(text: str, loaded: LoadedModel, wanted: int) -> list[int]:
    """At least `wanted` ids of the file `text`, or of the validation shard of the checkpoint's data."""
    ids: list[int] = []
    if text:
        try:
            ids = loaded.tokenizer.encode(Path(text).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read --text {text}: {error}") from error
    else:
        data = loaded.meta.get("args", {}).get("data")
        if not data:
            raise UserError("this checkpoint names no data set; give a file with --text")
        for _, documents in document_batches(shard_paths(data, "val")):
            ids += [token for document in loaded.tokenizer.encode_batch(documents) for token in document]
            if len(ids) >= wanted:
                break
    if len(ids) < wanted:
        raise UserError(f"the text has {len(ids)} tokens, but --quality-tokens asks for {wanted}; lower it")
    return ids


def main(args: argparse.Namespace) -> None:
    runtime = init_runtime(args.device_type, "float32")
    torch.set_float32_matmul_precision("highest")  # TF32 would make ids differ that should be equal
    if min(args.new_tokens, args.naive_tokens) < 2 or min(args.repeats, *args.batch, *args.prompt, *args.depth) < 1:
        raise UserError("--new-tokens and --naive-tokens must be at least 2, the other counts at least 1")
    if args.architecture != "october" and {"hf", "hf-bfloat16"} & set(args.against):
        raise UserError("Hugging Face has the october architecture only; choose other contenders with --against")
    forms = args.weights or DEFAULT_WEIGHTS.get(runtime.device.type, OTHER_WEIGHTS)
    name = torch.cuda.get_device_name() if runtime.is_cuda else f"{torch.get_num_threads()} threads"
    print(f"{runtime.device.type}, {name}, torch {torch.__version__}, vocabulary {args.vocab_size:,}, "
          f"{args.new_tokens} new tokens, medians of {args.repeats}")  # fmt: skip
    print(HEADING)
    tokenizer = placeholder_tokenizer(args.vocab_size)
    rows, notes = [], []
    for depth in args.depth:
        model = random_model(depth, args, runtime)
        rows += speed(args, runtime, model, tokenizer, forms)
        if args.arrival:
            notes.append(arrival(args, model, tokenizer, forms[-1]))
        if args.samples:
            notes.append(prefix_sharing(args, runtime, model, tokenizer))
        if args.quality_tokens and not args.source:
            shape = (QUALITY_ROWS, min(model.config.sequence_len, args.quality_tokens // QUALITY_ROWS))
            ids = torch.randint(args.vocab_size, shape, generator=torch.Generator().manual_seed(3)).to(runtime.device)
            what = f"random ids by random weights of depth {depth} (no measure of a trained model)"
            notes.append(quality(model, ids, forms, what))
    if args.quality_tokens and args.source:
        notes.append(quality_of_checkpoint(args, runtime, forms))
    settings = vars(args) | {"device": runtime.device.type, "name": name, "torch": torch.__version__}
    print(json.dumps(rounded({"settings": settings, "rows": rows, "notes": notes})))
    for row in rows:
        if row["contender"].endswith("float32") and row.get("largest_logit_gap", 0.0) > TIE:
            raise UserError(f"{row['contender']} does not produce the engine's ids: {row}")


if __name__ == "__main__":
    run_main(main, parse_args)
