"""CORE table of a checkpoint, or of a Hugging Face model as a yardstick.

Reads a checkpoint (or a model folder) and the bundle of 22 tasks, which is fetched once. Prints the table and writes it
to `base_eval/` in the work folder as CSV, with every single prediction as JSON lines beside it.

    python -m scripts.base_eval --max-per-task 20                          # a few minutes on a CPU
    python -m scripts.base_eval                                            # one GPU, whole bundle
    torchrun --standalone --nproc_per_node=8 -m scripts.base_eval          # eight GPUs
    python -m scripts.base_eval --hf-path ~/models/gpt2                    # another model, for comparison
"""

import argparse
import csv
import io
import json
import re
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from nanochat.checkpoint import add_checkpoint_flags
from nanochat.common import UserError, base_dir, init_runtime, print0, run_main, together, write_atomic
from nanochat.evals.core_bundle import fetch_bundle
from nanochat.evals.core_eval import TaskResult, evaluate_core
from nanochat.flags import Parser, add_runtime_flags
from nanochat.model.load import load_model
from nanochat.records import append_record

FALLBACK_CONTEXT_TOKENS = 2048  # where a model's configuration names no limit
PROBE_TOKENS = 8


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser)
    hf_help = "Hugging Face model to evaluate instead, folder or name (default: none)"
    parser.add_argument_group("model").add_argument("--hf-path", default="", help=hf_help)
    add = parser.add_argument_group("data").add_argument
    add("--bundle", default="", help="URL, zip or folder of tasks (default: $NANOCHAT_EVAL_BUNDLE or the public ones)")
    add("--max-per-task", type=int, default=0, help="examples of each task at most, 0 for all")
    add = parser.add_argument_group("evaluation").add_argument
    add("--batch-tokens", type=int, default=0, help="tokens of a batch, 0 for what suits the device")
    add("--slow", action="store_true", help="one choice at a time with all logits, to check the fast path")
    add_runtime_flags(parser)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # runtime
    if min(args.max_per_task, args.batch_tokens) < 0:
        given = f"--max-per-task {args.max_per_task} and --batch-tokens {args.batch_tokens}"
        raise UserError(f"{given} must not be negative")
    runtime = init_runtime(args.device_type, args.dtype)

    # inputs
    if args.hf_path:
        model, tokenizer = load_hugging_face(args.hf_path, runtime.device, runtime.dtype)
        name = "hf_" + Path(args.hf_path).resolve().name
    else:
        loaded = load_model(args.source, runtime, model_tag=args.model_tag, step=args.step)
        model, tokenizer = loaded.model, loaded.tokenizer
        name = f"{args.source}_{loaded.folder.parent.name}_{loaded.folder.name}"
    try:
        with together():
            if runtime.local_rank == 0:  # the others would try again, each for as long
                fetch_bundle(args.bundle)
        bundle = fetch_bundle(args.bundle)
    except UserError:
        if runtime.is_main:
            append_record("base_eval", settings=vars(args), results={"not_run": "no data"})
        raise

    # evaluation
    print0("task                               shots examples   cut accuracy guessing centered  seconds")
    line = "{task:<34} {shots:>5} {examples:>8} {cut:>5} {accuracy:>8.4f} {baseline:>8.4f} {centered:>8.4f}"
    line += " {seconds:>8.1f}"
    result = evaluate_core(
        model, tokenizer, bundle, max_per_task=args.max_per_task, batch_tokens=args.batch_tokens, slow=args.slow,
        progress=lambda task: print0(line.format_map(task_row(task))),
    )  # fmt: skip
    print0(f"CORE {result.core:.4f} over {len(result.tasks)} tasks in {result.seconds:.1f} s; guessing has 0")
    print0(f"mean accuracy {result.accuracy:.4f}; guessing has {result.baseline:.4f}")

    # output
    if runtime.is_main:
        name = re.sub(r"[^\w.-]+", "_", name) + ("_slow" if args.slow else "")
        folder = base_dir() / "base_eval"
        table = [task_row(task) for task in result.tasks]
        items = [{"task": task.label, **asdict(item)} for task in result.tasks for item in task.items]
        text = io.StringIO()
        writer = csv.DictWriter(text, fieldnames=list(table[0]), lineterminator="\n", restval="")
        writer.writeheader()
        whole = {"accuracy": result.accuracy, "baseline": result.baseline, "centered": result.core}
        writer.writerows([*table, {"task": "CORE", **whole, "seconds": result.seconds}])
        write_atomic(folder / f"{name}.csv", text.getvalue())
        write_atomic(folder / f"{name}.items.jsonl", "".join(json.dumps(item) + "\n" for item in items))
        print0(f"table and predictions: {folder / name}.csv, {name}.items.jsonl")
        results = {"core": result.core, "accuracy": result.accuracy, "baseline": result.baseline}
        results["elapsed_seconds"] = result.seconds
        results |= {key: sum(row[key] for row in table) for key in ("examples", "cut")}
        append_record("base_eval", settings={**vars(args), "model": name}, results=results, table=table)


def task_row(task: TaskResult) -> dict:
    """The row of a task in the table."""
    row = {"task": task.label, "shots": task.num_shots, "examples": len(task.items), "cut": task.num_cut}
    row |= {"accuracy": task.accuracy, "baseline": task.baseline, "centered": task.centered}
    return row | {"seconds": task.seconds}


class HuggingFaceModel:
    """A transformers causal language model with the interface of `GPT` that the evaluation uses."""

    def __init__(self, model):
        text_config = model.config.get_text_config()
        sequence_len = getattr(text_config, "max_position_embeddings", None) or FALLBACK_CONTEXT_TOKENS
        self.model, self.device = model, model.device
        self.config = SimpleNamespace(sequence_len=sequence_len, vocab_size=text_config.vocab_size)
        self.softcap = getattr(text_config, "final_logit_softcapping", None)
        # whether the logits are the output embedding of the last hidden states: some models also scale them
        self.has_plain_head = True
        with torch.no_grad():
            idx = torch.arange(PROBE_TOKENS, device=self.device)[None] % self.config.vocab_size
            ours, theirs = self.logits(self.hidden(idx)), self(idx)
        self.has_plain_head = ours.shape == theirs.shape and torch.allclose(ours, theirs, rtol=1e-3, atol=1e-3)

    def __call__(self, idx: Tensor) -> Tensor:
        """Logits (B, T, V) float32 of idx (B, T) int64."""
        return self.model(input_ids=idx, use_cache=False).logits.float()

    def hidden(self, idx: Tensor) -> Tensor:
        """What `logits` computes logits from: hidden states (B, T, C), or the logits if the head is not plain."""
        if not self.has_plain_head:
            return self(idx)
        return self.model.base_model(input_ids=idx, use_cache=False).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits (..., V) float32 of a part of `hidden`."""
        if not self.has_plain_head:
            return hidden
        logits = self.model.get_output_embeddings()(hidden).float()
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)


class HuggingFaceTokenizer:
    """A transformers tokenizer with our interface; the end token stands in for a missing beginning token."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.bos_id = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def load_hugging_face(path: str, device: torch.device, dtype: torch.dtype):
    """The `HuggingFaceModel` and `HuggingFaceTokenizer` at `path`. Raises `UserError` when transformers is missing or
    cannot load them."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise UserError("--hf-path needs the package transformers; install it: pip install transformers") from error
    if path.startswith(("/", ".", "~")) and not Path(path).expanduser().is_dir():
        raise UserError(f"--hf-path {path}: there is no such folder")
    path = str(Path(path).expanduser())
    try:
        tokenizer = HuggingFaceTokenizer(AutoTokenizer.from_pretrained(path))
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device).eval()
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"--hf-path {path} cannot be loaded: {str(error).strip().splitlines()[0]}") from error
    if tokenizer.bos_id is None:
        raise UserError(f"--hf-path {path}: its tokenizer has no token to start a text with, neither begin nor end")
    return HuggingFaceModel(model), tokenizer


if __name__ == "__main__":
    run_main(main, parse_args)
