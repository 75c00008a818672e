"""Write a checkpoint as a Hugging Face folder, for transformers and the programs that build on it.

Reads a checkpoint of the first release's architecture (`scripts.base_train --arch october-2025`); writes the folder
`--output`: weights in float32, tokenizer, conversation format. Runs on the CPU wherever the model was trained.

    python -m scripts.export_hf --output d4-hf                                     # the chat model saved last
    python -m scripts.export_hf --source base --model-tag d20 --output d20-hf      # a base model by name
    python -m scripts.export_hf --model-tag d20 --step 5000 --output d20-5000-hf   # an earlier step
"""

import argparse
from pathlib import Path

from nanochat.checkpoint import add_checkpoint_flags
from nanochat.common import init_runtime, print0, run_main
from nanochat.flags import Parser
from nanochat.model.hf import save_hf
from nanochat.model.load import load_model


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser, source="")
    parser.add_argument_group("output").add_argument(
        "--output", required=True, help="folder to write, created when missing"
    )
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # runtime
    runtime = init_runtime("cpu", "float32")

    # model
    loaded = load_model(args.source, runtime, model_tag=args.model_tag, step=args.step)

    # output
    folder = Path(args.output).expanduser()
    save_hf(loaded.model, loaded.tokenizer, folder)
    print0(f"{loaded.folder} is now in {folder} for Hugging Face transformers")


if __name__ == "__main__":
    run_main(main, parse_args)
