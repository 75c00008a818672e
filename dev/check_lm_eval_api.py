"""Check that lm-evaluation-harness scores a model through the server's API as it does in its own process, item by item.

    pip install "lm_eval[api]"                                   # 0.4.13 was used; not a dependency of the project
    python -m scripts.chat_web --source rl --dtype float32       # in another terminal
    python dev/check_lm_eval_api.py --source rl --tasks arc_easy --max-per-task 200

Through the API the harness uses its own `local-completions`: token ids of question and answer as the prompt, with echo
and log probabilities. In its process it asks a whole forward pass of the same checkpoint in float32 (`InProcess`),
which shares no code with the server's engine. The harness's own tasks need their data sets from the hub.

Prints a row for each task: accuracies by both ways, how many items were judged the same, and the largest difference of
an answer's log-likelihood; then one JSON line. Exits with status 1 if an item was judged differently.
"""

import argparse
import json
import logging
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.checkpoint import add_checkpoint_flags
from nanochat.common import UserError, init_runtime, run_main
from nanochat.model.gpt import GPT
from nanochat.model.hf import TOKENIZER_FILE, tokenizer_spec
from nanochat.model.load import load_model
from nanochat.tokenizer import Tokenizer

METRICS = ("acc", "acc_norm")


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_checkpoint_flags(parser, source="sft")
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="address of the server with this checkpoint")
    parser.add_argument("--tasks", nargs="+", default=["arc_easy"], help="the harness's names of multiple-choice tasks")
    parser.add_argument("--max-per-task", type=int, default=200, help="maximum items per task, 0 for all")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts per request")
    return parser.parse_args()


def in_process(model: GPT, tokenizer: Tokenizer) -> Any:
    """A model for the harness: whole forward passes, one answer at a time."""
    from lm_eval.api.model import TemplateLM

    class InProcess(TemplateLM):
        eot_token_id = tokenizer.bos_id

        def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
            return [tokenizer.bos_id, *tokenizer.encode(string)]

        @torch.inference_mode()
        def _loglikelihood_tokens(self, requests: Sequence[tuple], **_: Any) -> list[tuple[float, bool]]:
            found = []
            for _, context, answer in requests:
                ids = torch.tensor([(context + answer)[-model.config.sequence_len :]])
                logprobs = model(ids)[0, -len(answer) - 1 : -1].log_softmax(-1)
                likely = logprobs.gather(1, torch.tensor(answer).unsqueeze(1))
                found.append((likely.sum().item(), logprobs.argmax(-1).tolist() == answer))
            return found

        def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
            raise NotImplementedError

    return InProcess()


def through_api(url: str, tokenizer: Tokenizer, folder: Path, *, context: int, batch_size: int) -> Any:
    """The harness's client, which reads the tokenizer from `folder`."""
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    special = {"bos_token": "<|bos|>", "eos_token": "<|assistant_end|>"}
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", **special}
    for name, content in ((TOKENIZER_FILE, tokenizer_spec(tokenizer)), ("tokenizer_config.json", settings)):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    return LocalCompletionsAPI(
        model="nanochat", base_url=f"{url}/v1/completions", tokenizer_backend="huggingface", tokenizer=str(folder),
        add_bos_token=True, max_length=context + 1, batch_size=batch_size,
    )  # fmt: skip


def evaluate(lm: Any, args: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """The harness's log of every item, by task."""
    from lm_eval import simple_evaluate

    options = {"limit": args.max_per_task or None, "bootstrap_iters": 0, "log_samples": True}
    return simple_evaluate(lm, tasks=args.tasks, **options)["samples"]


def compare(task: str, whole: Sequence[dict[str, Any]], served: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """A row of the table, printed."""
    pairs = list(zip(whole, served, strict=True))
    assert all(a["doc_id"] == b["doc_id"] for a, b in pairs)
    answers = [(x, y) for a, b in pairs for x, y in zip(a["filtered_resps"], b["filtered_resps"], strict=True)]
    row = {
        "task": task,
        "items": len(pairs),
        **{f"{m}_{way}": sum(s[m] for s in log) / len(log) for way, log in (("in_process", whole), ("api", served))
           for m in METRICS},
        "same": sum(all(a[m] == b[m] for m in METRICS) for a, b in pairs),
        "same_greedy": sum(x[1] == y[1] for x, y in answers),
        "answers": len(answers),
        "max_nats_difference": max(abs(x[0] - y[0]) for x, y in answers),
    }  # fmt: skip
    print(*(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in row.items()))
    return row


def main(args: argparse.Namespace) -> None:
    try:
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f'this check needs the harness ({error}): pip install "lm_eval[api]"') from error
    for name in ("lm_eval", "nanochat"):
        logging.getLogger(name).setLevel(logging.ERROR)
    loaded = load_model(args.source, init_runtime("cpu", "float32"), model_tag=args.model_tag, step=args.step)
    whole = evaluate(in_process(loaded.model, loaded.tokenizer), args)
    with tempfile.TemporaryDirectory() as folder:
        context = loaded.model.config.sequence_len
        lm = through_api(args.url, loaded.tokenizer, Path(folder), context=context, batch_size=args.batch_size)
        served = evaluate(lm, args)
    rows = [compare(task, whole[task], served[task]) for task in args.tasks]
    print(json.dumps(rows))
    if any(row["same"] < row["items"] or row["same_greedy"] < row["answers"] for row in rows):
        sys.exit(1)


if __name__ == "__main__":
    run_main(main, parse_args)
