"""The README's pictures, dev/images/chat.png and loss.png, from the finished run of this machine's work folder.

    python dev/readme_images.py --source rl --model-tag d4

Starts `scripts.chat_web` with that model, asks it a few questions in a browser, and draws the losses of all stages.
Needs Playwright and a Chromium (or its path in --chromium).
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.checkpoint import SOURCES, run_dir

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "dev" / "images"
QUESTIONS = ("Who are you?", "What is 345 + 278?", "and 15 more?", "How many r are in strawberry?")
STAGE_NAMES = {"base": "pretraining", "mid": "mid-training", "sft": "finetuning"}


def draw_losses(model_tag: str) -> None:
    """Training losses in nats per token over the tokens of each stage, one stage after the other."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 2.6), dpi=110)
    begin = 0
    for source, name in STAGE_NAMES.items():
        lines = (run_dir(source, model_tag) / "metrics.jsonl").read_text().splitlines()
        steps = [record for record in map(json.loads, lines) if "train_loss" in record]
        tokens, losses = zip(*((begin + record["tokens"], record["train_loss"]) for record in steps), strict=True)
        axes.plot(tokens, losses, label=name)
        begin = tokens[-1]
    axes.set(xlabel="training tokens", ylabel="loss, nats per token", ylim=(0, None), xlim=(0, begin))
    axes.xaxis.set_major_formatter(lambda tokens, _: f"{tokens / 1e6:g}M")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.savefig(IMAGES / "loss.png", bbox_inches="tight")


def photograph_chat(source: str, model_tag: str, chromium: str) -> None:
    """The page after a few questions to the model."""
    from playwright.sync_api import sync_playwright

    flags = ["--source", source, "--model-tag", model_tag, "--port", "0"]
    server = subprocess.Popen(
        [sys.executable, "-u", "-m", "scripts.chat_web", *flags], cwd=ROOT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        address = next(m[0] for line in server.stdout if (m := re.search(r"http://127\.0\.0\.1:\d+", line)))
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
            page = browser.new_page(viewport={"width": 960, "height": 720})
            page.goto(address)
            box = page.get_by_role("textbox").first
            for question in QUESTIONS:
                box.fill(question)
                box.press("Enter")
                page.wait_for_timeout(500)
                page.get_by_role("button", name="Stop").wait_for(state="hidden", timeout=60_000)
                page.wait_for_timeout(500)
            page.screenshot(path=IMAGES / "chat.png")
            browser.close()
    finally:
        server.terminate()
        server.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="rl", choices=SOURCES)
    parser.add_argument("--model-tag", default="d4")
    parser.add_argument("--chromium", default=shutil.which("chromium") or "")
    args = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    draw_losses(args.model_tag)
    photograph_chat(args.source, args.model_tag, args.chromium)


if __name__ == "__main__":
    main()
