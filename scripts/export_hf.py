"""Write a checkpoint as a folder for other programs, ready for the Hugging Face hub, with a model card (README.md).

Reads a checkpoint; writes the folder `--output`, which must be new or empty. Runs on the CPU wherever the model was
trained. Formats:

    transformers  weights, tokenizer, conversation format. Models of the first release's architecture (base_train --arch
                  october-2025) load as transformers' NanoChat; all others bring their own code and load with
                  trust_remote_code=True (tried with 5.0 to 5.24)
    mlx           the same for mlx-lm, on Apple's chips; only the first release's architecture
    gguf          one file for llama.cpp; only the first release's architecture. llama.cpp itself does not run it, only
                  forks of it that have the architecture "nanochat"

    python -m scripts.export_hf --output d4-hf                                     # the chat model saved last
    python -m scripts.export_hf --source base --model-tag d20 --output d20-hf      # a base model by name
    python -m scripts.export_hf --model-tag d20 --step 5000 --output d20-5000-hf   # an earlier step
    python -m scripts.export_hf --source sft --format gguf --output d20-gguf       # bfloat16, for forks of llama.cpp
"""

import argparse
from pathlib import Path

import torch

from nanochat.checkpoint import add_checkpoint_flags
from nanochat.common import init_runtime, print0, run_main, write_atomic
from nanochat.flags import Parser
from nanochat.model.gguf_file import save_gguf
from nanochat.model.hf import CODE_FILES, README_FILE, save_hf
from nanochat.model.load import load_model
from nanochat.model_card import model_card

FORMATS = {"transformers": "float32", "mlx": "float32", "gguf": "bfloat16"}  # with the default dtype of each


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__)
    add_checkpoint_flags(parser, source="")
    add = parser.add_argument_group("output").add_argument
    add("--output", required=True, help="folder to write, new or empty")
    add("--format", choices=FORMATS, default="transformers", help="for which program")
    dtype_help = "of the weights (default: float32; of gguf bfloat16, half as large)"
    add("--dtype", choices=["float32", "bfloat16"], help=dtype_help)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    # runtime
    runtime = init_runtime("cpu", "float32")

    # model
    loaded = load_model(args.source, runtime, model_tag=args.model_tag, step=args.step)

    # output
    folder = Path(args.output).expanduser()
    name = folder.resolve().name
    dtype = getattr(torch, args.dtype or FORMATS[args.format])
    if args.format == "gguf":
        files = save_gguf(loaded.model, loaded.tokenizer, folder, title=name, dtype=dtype)
    else:
        origin = {"stage": loaded.source, "examples": loaded.meta.get("examples", [])}
        options = {"dtype": dtype, "for_mlx": args.format == "mlx", "origin": origin}
        files = save_hf(loaded.model, loaded.tokenizer, folder, **options)
    remote_code = CODE_FILES.keys() <= files.keys()
    about = {"name": name, "folder": loaded.folder, "library": args.format, "remote_code": remote_code}
    write_atomic(folder / README_FILE, model_card(loaded.meta, files=files, **about))
    print0(f"{loaded.folder} is now in {folder} for {args.format}{', with its own code' if remote_code else ''}")


if __name__ == "__main__":
    run_main(main, parse_args)
