"""The command of the report.

python -m nanochat.report reset       # start a new report; the last one is kept in a folder of its own
python -m nanochat.report generate    # write report.md and report.html from what the stages have recorded so far
python -m nanochat.report summary     # the results as a small table in the terminal
"""

import argparse
import math
import os
from collections.abc import Mapping
from pathlib import Path

from nanochat.common import UserError, disk_errors, print0, run_main, write_atomic
from nanochat.flags import Parser
from nanochat.records import PICTURES, Record, read_records, records_path, reset
from nanochat.report.markdown import render
from nanochat.report.page import page
from nanochat.report.summary import summary_text


def generate() -> list[Path]:
    """Write report.md, its pictures and report.html to the report folder and to the working directory, if that may be
    written to: in a container it may belong to another user. Returns the paths of report.md. Pictures of an earlier
    report are removed."""
    markdown, pictures = render(*_records())
    html = page(markdown, pictures)
    folders = [records_path().parent, *[Path.cwd()] * os.access(Path.cwd(), os.W_OK)]
    for folder in folders:
        _write_pictures(folder / PICTURES, pictures)
        write_atomic(folder / "report.html", html)
        write_atomic(folder / "report.md", markdown)
    return [folder / "report.md" for folder in folders]


def _write_pictures(folder: Path, pictures: Mapping[str, bytes]) -> None:
    for name, png in pictures.items():
        write_atomic(folder / name, png)
    with disk_errors("the pictures", folder):
        for stale in {path.name for path in folder.glob("*.png")} - pictures.keys():
            (folder / stale).unlink()


def _records() -> tuple[list[Record], int]:
    records, broken = read_records()
    if not records:
        raise UserError(
            f"nothing to report, no records in {records_path()}; run a stage first, or all: bash speedrun.sh"
        )
    return records, broken


def parse_args() -> argparse.Namespace:
    parser = Parser(__doc__, "ACTION [flags]")
    parser.add_argument("action", choices=("reset", "generate", "summary"), help="see above")
    price_help = "price for the cost estimate, with reset (default: a table by GPU name)"
    parser.add_argument_group("cost").add_argument("--dollars-per-gpu-hour", type=float, help=price_help)
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    if args.dollars_per_gpu_hour is not None and not 0 <= args.dollars_per_gpu_hour < math.inf:
        raise UserError(f"--dollars-per-gpu-hour {args.dollars_per_gpu_hour} is not a price; give 0 or more")
    if args.action == "reset":
        if kept := reset(args.dollars_per_gpu_hour):
            print0(f"kept the last report in {kept}")
        print0(f"new report: {records_path()}")
    elif args.action == "generate":
        print0("wrote " + " and ".join(map(str, generate())) + ", with report.html and pictures beside it")
    else:
        print0(summary_text(_records()[0]))


if __name__ == "__main__":
    run_main(main, parse_args)
