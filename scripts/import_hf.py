"""Make a checkpoint of a published NanoChat model, for chat, evaluation, finetuning and reinforcement learning.

Reads a folder, or a model repository of the Hugging Face hub (owner/name, or owner/name/folder): the format of Hugging
Face transformers, or the first release's own files. Writes <base>/<source>_checkpoints/<model tag>. No code that comes
with a model is executed. Runs on the CPU.

    python -m scripts.import_hf owner/nanochat-d20                           # from the hub, or HF_ENDPOINT
    python -m scripts.import_hf ~/downloads/d32 --model-tag d32              # a folder
    python -m scripts.chat_sft --source sft --model-tag d32 --output-tag d32-mine --data mine.jsonl
"""

import argparse
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from nanochat.checkpoint import list_steps, run_dir, save_checkpoint
from nanochat.common import UserError, base_dir, init_runtime, only_one_process, print0, run_main
from nanochat.data import hub
from nanochat.data.dataset import check_disk
from nanochat.data.hub import HubFile
from nanochat.flags import SOURCES, Parser
from nanochat.model.first_release import TOKEN_BYTES_FILE, find_release, load_release
from nanochat.model.hf import CONFIG_FILE, load_hf, read_hf_config, read_origin
from nanochat.tokenizer import SPECIAL_TOKENS
from tasks.mixtures import GENERAL_EXAMPLES
from tasks.own_data import NUM_EXAMPLES


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, "FOLDER|REPO [flags]")
    model_help = "a folder, or a repository of the hub: owner/name or owner/name/folder"
    parser.add_argument("model", metavar="FOLDER|REPO", help=model_help)
    add = parser.add_argument_group("output").add_argument
    add("--source", choices=SOURCES, help="stage of the checkpoint (default: what the folder tells, else sft)")
    add("--model-tag", default="", help="name of the checkpoint folder (default: that of the folder or repository)")
    return parser.parse_args()


@dataclass(frozen=True)
class Place:
    """Where a model lies: files by their names below `root`; those in and below `folder` were asked for. Those of the
    hub's repository `repo` have still to be brought to `root`."""

    root: Path
    folder: str
    files: Mapping[str, HubFile | None]
    repo: str = ""
    revision: str = ""

    def has(self, name: str) -> bool:
        return PurePosixPath(self.folder, name).as_posix() in self.files

    def named(self, suffix: str) -> list[str]:
        """The files directly in the folder whose names end with `suffix`."""
        own = [name for name in self.files if PurePosixPath(name).parent == PurePosixPath(self.folder)]
        return [name for name in own if name.endswith(suffix)]

    def bring(self, names: Sequence[str]) -> None:
        """See to it that the files `names` are below `root`. Raises `UserError` when some cannot be fetched."""
        missing = [self.files[name] for name in names if self.repo and not self.files[name].is_whole(self.root)]
        if not missing:
            return
        with only_one_process(self.root):
            self.root.mkdir(exist_ok=True)
            check_disk(self.root, sum(file.size for file in missing))
            options = {"workers": 4, "check": lambda *_: None, "kind": "model"}
            failed = hub.fetch_files(self.repo, self.revision, missing, self.root, **options)
        if failed:
            name, reason = min(failed.items())
            fault = f"{len(failed)} files of {self.repo} could not be fetched from {hub.endpoint()}, {name} ({reason})"
            raise UserError(f"{fault} among them; what arrived is kept in {self.root}: run the same command again")


def find_place(model: str) -> Place:
    """The folder `model` or, if there is none, the repository of that name. Raises `UserError` for neither."""
    path = Path(model).expanduser()
    if path.is_dir():
        path = path.resolve()
        above = [place for parent in path.parents[:2] for place in (parent, parent / "tokenizer")]  # of its tokenizer
        files = [*path.rglob("*"), *(file for place in above for file in place.glob("tokenizer*.*"))]
        files += [place / TOKEN_BYTES_FILE for place in above]
        names = [file.as_posix() for file in files if file.is_file()]  # below the root of the system, so whole paths
        return Place(Path(path.anchor), path.as_posix(), dict.fromkeys(names))
    if path.exists():
        raise UserError(f"{model} is a file; give the folder that it is in")
    repo, folder = hub.split_repository(model)
    revision, files, _ = hub.list_files(repo, kind="model")
    root = base_dir() / "imports" / f"{repo.replace('/', '--')}-{revision[:8]}"
    return Place(root, folder, {file.name: file for file in files}, repo, revision)


def free_run(source: str, tag: str) -> Path:
    """The folder of a new run. Raises `UserError` if it holds checkpoints already."""
    run = run_dir(source, tag)
    if list_steps(run, all_folders=True):
        raise UserError(f"{run} holds checkpoints already; choose another --model-tag, or move it away")
    return run


def examples_in(origin: Mapping[str, Any]) -> list[str]:
    """The example questions that an export of ours names."""
    found = origin.get("examples")
    return [text for text in found if isinstance(text, str)][:NUM_EXAMPLES] if isinstance(found, list) else []


def main(args: argparse.Namespace) -> None:
    # which files
    place = find_place(args.model)
    release = None if place.has(CONFIG_FILE) else find_release(place.files, place.folder)
    if release is None and not place.has(CONFIG_FILE):
        formats = "config.json, model.safetensors and tokenizer.json, or model_*.pt, meta_*.json and tokenizer.pkl"
        raise UserError(f"{args.model} holds no model that can be imported; that is {formats}")

    # where to
    origin = {}
    if release is None:
        folder = place.root / place.folder
        place.bring(place.named(".json"))
        read_hf_config(folder)  # tells whether the rest is worth fetching
        origin = read_origin(folder)
    told = release.stage if release else origin.get("stage")
    source = args.source or (told if told in SOURCES else "sft")
    inner = PurePosixPath(release.model).parent.name if release else PurePosixPath(place.folder).name
    tag = args.model_tag or inner or PurePosixPath(place.repo).name
    run = free_run(source, tag)

    # the model
    runtime = init_runtime("cpu", "float32")
    if release is None:
        place.bring(place.named(".safetensors"))
        (model, tokenizer), step, results = load_hf(folder), 0, {}
    else:
        place.bring(release.names)
        model, tokenizer, about = load_release(place.root, release)
        step, results = release.step, {name: about[name] for name in ("val_bpb",) if about.get(name)}
    if missing := [name for name in SPECIAL_TOKENS if name not in tokenizer.special_ids]:
        raise UserError(f"the tokenizer of {args.model} is not of a NanoChat model: it has no {', '.join(missing)}")

    # output
    meta = {
        "args": {},
        "results": results,
        "imported": PurePosixPath(place.folder).name if not place.repo else args.model,
    }
    if source != "base":
        meta["examples"] = examples_in(origin) or GENERAL_EXAMPLES
    save_checkpoint(run, step, runtime=runtime, model=model, tokenizer=tokenizer, meta=meta)
    if place.repo and runtime.is_main:
        shutil.rmtree(place.root)
    size = model.parameter_counts()["total"]
    print0(f"{args.model} is now {run.parent.name}/{run.name}, step {step}: {size:,} parameters")
    if source != "base":
        print0(f"talk to it: python -m scripts.chat_web --source {source} --model-tag {run.name}")


if __name__ == "__main__":
    run_main(main, parse_args)
