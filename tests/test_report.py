"""The report: its first page, its sections, its pictures, the HTML file and the table for the terminal."""

import json
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from nanochat import records as records_module
from nanochat.common import base_dir, run_main
from nanochat.records import append_record, read_records, records_path
from nanochat.report import __main__ as command
from nanochat.report import markdown as report
from nanochat.report import pictures
from nanochat.report.page import page
from nanochat.report.summary import summary_text
from nanochat.report.tables import format_value
from nanochat.results import GPT2_CORE, amount
from nanochat.tokenizer import tokenizer_dir

CONFIG = {"n_layer": 4, "vocab_size": 1024, "sequence_len": 256}
MACHINE = {"gpus": ["NVIDIA H100 80GB HBM3"] * 8, "gpu_memory_gib": 79.6, "cuda": "13.2", "cpu": "c", "cores": 8}


@pytest.fixture(autouse=True)
def _working_folder(tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")


@pytest.fixture
def metrics_path() -> Path:
    """The metrics of a run of 30 steps with a validation every ten."""
    path = base_dir() / "base_checkpoints" / "d4" / "metrics.jsonl"
    path.parent.mkdir(parents=True)
    lines = [{"step": step, "train_loss": 8 / (step + 1), "tokens_per_second": 700.0 + step} for step in range(30)]
    lines += [{"step": step, "val_bpb": 3 - step / 20} for step in (0, 10, 20, 30)]
    path.write_text("".join(json.dumps(line) + "\n" for line in sorted(lines, key=lambda line: line["step"])))
    return path


def rendered() -> str:
    return report.render(*read_records())[0]


def first_page(markdown: str) -> str:
    return markdown.partition("\n## Stages")[0]


def is_small_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) < 150_000


@pytest.fixture
def clock(monkeypatch):
    """A list with the time of records in seconds."""
    now = [1_000_000.0]
    monkeypatch.setattr(records_module.time, "time", lambda: now[0])
    return now


def row(markdown: str, metric: str) -> dict[str, str]:
    """The filled cells of a row of the results, by column."""
    lines = markdown.splitlines()
    columns = next(line for line in lines if line.startswith("| Measured"))
    found = next(line for line in lines if line.startswith(f"| {metric} |"))
    cells = zip(columns.split("|")[2:-1], found.split("|")[2:-1], strict=True)
    return {name.strip(): cell.strip() for name, cell in cells if cell.strip()}


# --- first page ---
def test_the_first_page_says_what_was_trained_on_what_for_how_long_and_for_how_much(clock, metrics_path):
    append_record("environment", settings={}, results=MACHINE | {"gpu_hour_dollars": 3.0, "price_source": "a list"})
    clock[0] += 7200
    results = {"num_parameters": 4_200_000, "num_steps": 30, "train_tokens": 8_810_000_000, "train_seconds": 1800.0}
    settings = {"data": "owner/text", "config": CONFIG}
    append_record("base_train", settings=settings, results=results, metrics_path=metrics_path)
    append_record("mid_train", settings={"data": ["mixture", "a_b.jsonl"], "config": CONFIG}, results=results)
    markdown = first_page(rendered())
    assert markdown.startswith("# nanochat report: d4\n")
    assert "A chat model of 4.2 million parameters (depth 4, vocabulary of 1,024 tokens, context of 256)" in markdown
    assert "2.0 hours from start to end, 60 minutes of it in training steps, on 8 x NVIDIA H100 80GB HBM3." in markdown
    assert "about **48.00 dollars**: 8 GPUs at 3.00 dollars an hour each (a list). An estimate, not a bill." in markdown
    assert "| Pretraining | owner/text | 30 | 8.81 billion | 30.0 |" in markdown
    assert "| Mid-training | mixture, a_b.jsonl | 30 | 8.81 billion | 30.0 |" in markdown
    assert "](report_images/loss.png)" in markdown


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({**MACHINE, "gpu_hour_dollars": None}, "no price is known for NVIDIA H100 80GB HBM3"),
        ({"gpus": [], "cores": 2, "cpu": "AMD"}, "in training steps, on 2 CPU cores (AMD), without a GPU."),
        ({}, "Not recorded: `python -m nanochat.report reset` was not run"),
    ],
)
def test_without_a_price_there_is_no_estimate(machine, words):
    append_record("environment", settings={}, results=machine)
    append_record("base_train", settings={}, results={"num_steps": 1})
    markdown = rendered()
    assert words in markdown
    assert "An estimate" not in markdown


def test_core_stands_beside_those_of_gpt2_of_guessing_and_of_models_measured_here():
    table = [{"task": "a", "accuracy": 0.5, "baseline": 0.25}, {"task": "b", "accuracy": 0.3, "baseline": 0.0}]
    append_record("base_eval", settings={"max_per_task": 20}, results={"core": 0.3167}, table=table)
    append_record("base_eval", settings={"hf_path": "org/yardstick"}, results={"core": 0.11}, table=table)
    markdown = rendered()
    assert "- **CORE:** **0.3167** over 2 tasks, at most 20 examples of each." in markdown
    assert f"GPT-2 with 1.5 billion parameters {GPT2_CORE:.4f} ([source](https://" in markdown
    assert (
        "guessing 0 (right answers: 40.0% by the model, 12.5% by guessing), org/yardstick measured here 0.1100"
        in markdown
    )
    assert row(markdown, "CORE") == {"base": "0.3167"}
    assert "### CORE (org/yardstick)" in markdown


def test_a_yardstick_model_never_stands_in_for_ours():
    append_record("base_eval", settings={"hf_path": "org/yardstick"}, results={"core": 0.11})
    assert "0.11" not in first_page(rendered())


def test_replies_of_the_last_chat_model_are_shown_without_special_tokens():
    sample = (
        "<|bos|><|user_start|>1+1?<|user_end|><|assistant_start|><|python_start|>1+1<|python_end|><|output_start|>2"
        "<|output_end|>It is <|python_start|>2*1<|python_end|><|output_start|>2<|output_end|> too.<|assistant_end|>"
        "<|user_start|>Sure?<|user_end|><|assistant_start|>Yes.\n(right)"
    )
    append_record("base_loss", settings={"source": "base"}, results={}, samples=["Once upon\na time"])
    assert (
        "Continuations by the base model, as the stages recorded them.\n\n```text\nOnce upon a time\n```" in rendered()
    )
    append_record("chat_eval", settings={"source": "sft"}, results={"GSM8K": 0.1}, samples=["other"])
    append_record(
        "chat_eval", settings={"source": "rl"}, results={"GSM8K": 0.2}, samples=[sample, "x" * 2000, *"abcdefg"]
    )
    page_one = first_page(rendered())
    assert "> 1+1?\n[python: 1+1 => 2] It is [python: 2*1 => 2] too.\n> Sure?\nYes.\n(right)\n\nxxx" in page_one
    assert "Replies of the model after RL (8 of 9)" in page_one
    assert "x" * 801 not in page_one


def test_results_have_only_rows_and_columns_of_what_was_measured():
    for stage, source, results in (
        ("base_train", "", {"val_bpb": 0.9, "core": 0.2}), ("base_loss", "base", {"val_bpb": 0.8119}),
        ("base_eval", "", {"core": 0.2219}),
        ("chat_eval", "sft", {"ARC-Easy": 0.3876, "ChatCORE": 0.0884, "ChatCORE_low": 0.05, "elapsed_seconds": 3.0}),
        ("chat_rl", "sft", {"start_val_reward": 0.1, "val_reward": 0.2}),
        ("chat_eval", "rl", {"GSM8K": 0.0758, "SmallWorld-sums": 0.99}),
    ):  # fmt: skip
        append_record(stage, settings={"source": source} if source else {}, results=results)
    markdown = rendered()
    assert row(markdown, "CORE") == {"base": "0.2219"}
    assert row(markdown, "validation, bits per byte") == {"base": "0.8119"}
    assert row(markdown, "ARC-Easy") == {"finetuned": "0.3876"}
    assert row(markdown, "GSM8K") == {"after RL": "0.0758"}
    assert row(markdown, "SmallWorld-sums") == {"after RL": "0.9900"}
    assert row(markdown, "reward on held-out questions") == {"finetuned": "0.1000", "after RL": "0.2000"}
    measured = first_page(markdown)
    assert not re.search("mid-trained|MMLU|not run|ChatCORE_low", measured, re.IGNORECASE)


def test_what_could_not_be_run_is_one_line_until_it_was():
    append_record("base_train", settings={}, results={"val_bpb": 1.0})
    assert "No exams were run." in rendered()
    append_record("base_eval", settings={}, results={"not_run": "no data"})
    append_record("chat_eval", settings={"source": "sft"}, results={"not_run": "MMLU has no data"})
    markdown = rendered()
    assert "Not run: CORE (no data), Chat evaluation of sft (MMLU has no data)." in markdown
    assert "not_run" not in markdown
    assert "### CORE" not in markdown
    append_record("base_eval", settings={}, results={"core": 0.25})
    assert "Not run: Chat evaluation of sft" in rendered()


def test_exams_of_a_model_that_was_trained_again_since_do_not_count_and_partial_ones_add_up():
    settings = {"source": "sft"}
    append_record("chat_sft", settings={"lr": 1}, results={"num_steps": 5, "train_seconds": 3.0})
    append_record("chat_eval", settings=settings, results={"GSM8K": 0.1, "MMLU": 0.3})
    append_record("chat_eval", settings=settings, results={"GSM8K": 0.2})
    append_record("standard_eval", settings=settings, results={"MMLU 5-shot": 0.4})
    append_record("chat_sft", settings={"lr": 1}, results={"num_steps": 5, "train_seconds": 4.0})  # resumed at its end
    found = [row(rendered(), name)["finetuned"] for name in ("GSM8K", "MMLU", "MMLU 5-shot")]
    assert found == ["0.2000", "0.3000", "0.4000"]
    append_record("chat_sft", settings={}, results={"not_run": "no data"})
    assert row(rendered(), "MMLU")["finetuned"] == "0.3000"  # a stage that was skipped trained nothing
    append_record("chat_sft", settings={"lr": 2}, results={"num_steps": 5})
    assert "GSM8K" not in rendered()


def test_of_a_run_of_another_name_before_only_the_models_not_trained_since_are_left():
    for tag, stages in (("d4", ("base_train", "chat_sft")), ("d6", ("base_train",))):
        for stage in stages:
            path = base_dir() / f"{stage}_checkpoints" / tag / "metrics.jsonl"
            append_record(stage, settings={"tag": tag}, results={"num_steps": 5, "val_bpb": 0.5}, metrics_path=path)
        if "chat_sft" in stages:
            append_record("chat_eval", settings={"source": "sft"}, results={"GSM8K": 0.1})
    markdown = first_page(rendered())
    assert "# nanochat report: d6\n\nA base model" in markdown
    assert row(markdown, "validation, bits per byte") == {"base": "0.5000"}


# --- sections ---
def test_the_last_of_several_attempts_counts_and_stages_stand_in_the_order_of_the_pipeline():
    for stage, value in (("my_stage", 1), *(("base_train", value) for value in (0.5, 0.25, 0.125)), ("tok_train", 1)):
        append_record(stage, settings={}, results={"val_bpb": value})
    markdown = rendered()
    assert row(markdown, "validation, bits per byte") == {"base": "0.1250"}
    assert "2 earlier attempt(s) not shown" in markdown
    append_record("base_train", settings={}, results={"val_bpb": 0.125, "train_seconds": 3.0})  # killed at its end
    assert "2 earlier attempt(s) not shown" in rendered()
    headings = re.findall(r"^#+ (.*)$", markdown, re.MULTILINE)
    stages = ["Stages", "Tokenizer training", "Pretraining", "my_stage"]
    assert headings == ["nanochat report", "Results", *stages, "Machine", "Source"]


def test_wall_clock_runs_from_reset_or_the_start_of_the_first_stage_to_the_last_record(clock):
    append_record("tok_train", settings={}, results={"elapsed_seconds": 60.0})
    clock[0] += 119.6
    append_record("base_train", settings={}, results={"num_steps": 1})
    assert "0:03:00" in summary_text(read_records()[0])
    command.reset()
    clock[0] += 3 * 3600 + 51 * 60
    append_record("base_train", settings={}, results={"num_steps": 1})
    clock[0] += 10 * 3600
    assert "3:51:00" in summary_text(read_records()[0])
    assert "trained in 3.9 hours" in rendered()


def test_code_size_counts_source_files_and_nothing_hidden_or_built(tmp_path, monkeypatch, tokenizer):
    repo = tmp_path / "repo"
    sources = {"a.py": "x = 1\ny = 2\n", "runs/b.sh": "true\n"}
    others = {
        ".venv/c.py": "hidden\n",
        "rustbpe/target/d.rs": "built\n",
        "notes.txt": "no source\n",
        "report.html": "x",
    }
    for name, text in {**sources, **others, "requirements.lock": "a==1 \\\n    --hash=sha256:0\nb==2\n"}.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text)
    monkeypatch.setattr(report, "REPO", repo)
    append_record("tok_train", settings={}, results={})
    markdown = rendered()
    assert "| Characters | 17 |\n| Lines | 3 |\n| Files | 2 |" in markdown
    assert "| 3 (2 of packages) |" in markdown
    assert "our tokenizer" not in markdown
    tokenizer.save(tokenizer_dir())
    assert f"| Tokens (our tokenizer) | {sum(map(len, tokenizer.encode_batch(sources.values())))} |" in rendered()


# --- texts of others ---
HOSTILE = "a|b\n<script>alert(1)</script> ![x](http://a/b.png) </details> _so_ &lt;"


class Tags(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict]] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.text += data


def test_texts_of_models_and_data_cannot_become_markup():
    sample = "text\n```\n# not a heading\n````\n<img src=x onerror=alert(1)></details>"
    append_record(HOSTILE, settings={HOSTILE: HOSTILE}, results={HOSTILE: HOSTILE}, table=[{HOSTILE: HOSTILE}])
    append_record("base_train", settings={"data": HOSTILE}, results={"num_steps": 1}, samples=[sample])
    append_record("base_loss", settings={"source": "base"}, results={"not_run": HOSTILE}, samples=[sample])
    append_record("chat_eval", settings={"source": HOSTILE}, results={HOSTILE: HOSTILE}, samples=[sample])
    markdown, drawn = report.render(*read_records())
    tags = Tags(page(markdown, drawn))
    names = {tag for tag, _ in tags.found}
    assert names.isdisjoint({"script", "img", "em"})
    assert sum(tag == "details" for tag, _ in tags.found) == markdown.count("<details>") + 1  # and the contents
    assert tags.text.count("<script>alert(1)</script> ![x](http://a/b.png) </details> _so_ &lt;") >= 8
    assert "<img src=x onerror=alert(1)></details>" in tags.text
    assert not re.search(
        "^# not a heading", re.sub(r"(`{3,})text\n.*?\n\1\n", "", markdown, flags=re.DOTALL), re.MULTILINE
    )


# --- files ---
def test_generate_writes_markdown_pictures_and_page_to_both_places_and_removes_stale_pictures(metrics_path):
    append_record("base_train", settings={}, results={"num_steps": 30}, metrics_path=metrics_path)
    for folder in (records_path().parent, Path.cwd()):
        (folder / "report_images").mkdir()
        (folder / "report_images" / "chat-rl-rl-reward.png").write_bytes(b"of an earlier report")
    paths = command.generate()
    assert paths == [base_dir() / "report" / "report.md", Path.cwd() / "report.md"]
    text = paths[0].read_text()
    links = set(re.findall(r"\]\((?!https:)(.+?)\)", text))
    assert len(links) == 4  # the first page's, and the curves of the stage
    assert "data:" not in text
    for path in paths:
        assert path.read_text() == text
        assert {f"report_images/{found.name}" for found in (path.parent / "report_images").iterdir()} == links
        assert all(is_small_png((path.parent / link).read_bytes()) for link in links)
        tags = Tags((path.parent / "report.html").read_text()).found
        sources = [attrs["src"] for tag, attrs in tags if tag == "img"]
        assert len(sources) == 4
        assert all(source.startswith("data:image/png;base64,") for source in sources)
        ids = {attrs["id"] for _, attrs in tags if "id" in attrs}
        anchors = [attrs["href"] for tag, attrs in tags if tag == "a" and attrs["href"].startswith("#")]
        assert {anchor[1:] for anchor in anchors} == ids - {"nanochat-report-d4"}
        path.write_text("CORE 0.99")
    command.generate()
    assert paths[0].read_text() == paths[1].read_text() == text  # never read back


def test_curves_are_found_in_a_folder_that_moved(metrics_path, tmp_path, monkeypatch):
    append_record("base_train", settings={}, results={"val_bpb": 1.5, "num_steps": 30}, metrics_path=metrics_path)
    base_dir().rename(tmp_path / "elsewhere")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "elsewhere"))
    assert len(report.render(*read_records())[1]) == 4


def test_curves_that_cannot_be_drawn_are_left_out_with_the_reason(metrics_path, monkeypatch):
    append_record("base_train", settings={}, results={"num_steps": 30}, metrics_path=metrics_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        markdown = rendered()
    assert markdown.count("No curves: matplotlib is not installed") == 2
    assert "report_images" not in markdown
    metrics_path.write_text('{"step": 0, "train_loss": 8.0}\n')
    assert "No curves: too few steps" in rendered()
    metrics_path.unlink()
    assert "No curves: metrics.jsonl of this run is gone" in rendered()


def test_the_last_value_of_a_step_counts_and_broken_lines_and_non_finite_values_are_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    values = [(0, 4.0), (1, 3.0), (2, 2.9), (3, 2.8), (2, 2.0), (3, 1.0)]
    lines = [json.dumps({"step": step, "train_loss": value}) for step, value in values]
    lines += ['{"step": 1, "val_bpb": NaN}', "null", '{"step": 2, "val_bpb": 2.0}', '{"val_bpb": 1.0}', '{"st']
    path.write_text("\n".join(lines))
    points = {"train_loss": [(0, 4.0), (1, 3.0), (2, 2.0), (3, 1.0)], "val_bpb": [(2, 2.0)]}
    assert pictures.read_curves(path) == points


@pytest.mark.parametrize("count", [2, 301, 5000])
def test_a_curve_of_any_length_is_a_small_picture(count):
    points = [(step, 1e6 + (step * 7919) % 1000) for step in range(count)]
    assert is_small_png(pictures.draw_curve("tokens_per_second", points))
    assert is_small_png(pictures.draw_pretraining({"train_loss": points, "val_bpb": points[::10]}))
    assert is_small_png(pictures.draw_chat_loss({"mid-training": points, "finetuning": points[:1]}))


VALUES = [
    (0.81234, "0.8123"), (0.5, "0.5"), (0.0, "0"), (3e-5, "3e-05"), (12345.6, "12,346"), (-0.25, "-0.25"),
    (1.2e18, "1.2e+18"), (float("nan"), "nan"), (32768, "32,768"), (True, "True"), (None, "-"), ([1, 0.5], "1, 0.5"),
    ("<|bos|>", "\\<\\|bos\\|>"), ("a_b _c_", "a_b \\_c\\_"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), VALUES)
def test_values_are_shown_short(value, text):
    assert format_value(value) == text


def test_amounts_are_words_from_a_tenth_of_a_million_on():
    counts = [99_999, 100_000, 4_194_434, 42_400_000, 424_148_992, 8_808_038_400, 24_796_725_248]
    words = ["99,999", "0.1 million", "4.19 million", "42 million", "424 million", "8.81 billion", "25 billion"]
    assert list(map(amount, counts)) == words


# --- command ---
def test_the_table_for_the_terminal_is_narrow_and_aligned(clock):
    append_record("environment", settings={}, results=MACHINE | {"gpu_hour_dollars": 3.0})
    clock[0] += 3600
    numbers = {"num_parameters": 1_384_000_000, "num_steps": 9, "train_tokens": 8_810_000_000, "val_bpb": 0.7418}
    append_record("base_train", settings={}, results=numbers)
    append_record("base_eval", settings={}, results={"not_run": "no data " * 20})
    append_record(
        "chat_eval", settings={"source": "sft"}, results={"an exam with a very long name " * 3: 0.5, "GSM8K": 0.1}
    )
    append_record("chat_eval", settings={"source": "rl"}, results={"GSM8K": 0.25})
    lines = summary_text(read_records()[0]).splitlines()
    assert max(map(len, lines)) <= 100
    values = [re.split(r" {2,}", line.strip(), maxsplit=2) for line in lines]
    assert values[2:5] == [["pretraining", "parameters", "1.38 billion"], ["tokens", "8.81 billion"],
                           ["base", "validation, bits per byte", "0.7418"]]  # fmt: skip
    assert ["sft, rl", "GSM8K", "0.1000  0.2500"] in values
    assert ["dollars, an estimate", "24.00"] in values
    start = lines[0].index("what")
    assert all(line[start - 1] == " " and line[start] != " " for line in lines)


def run_command(monkeypatch, *arguments: str) -> int:
    """Exit status of `python -m nanochat.report` with these arguments, run in this process."""
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    try:
        return run_main(command.main, command.parse_args) or 0
    except SystemExit as stop:
        return stop.code


def test_a_working_folder_that_may_not_be_written_to_gets_no_copy(monkeypatch):
    append_record("base_train", settings={}, results={"num_steps": 30})
    monkeypatch.setattr(command.os, "access", lambda path, _: path != Path.cwd())  # root may write anywhere
    assert command.generate() == [base_dir() / "report" / "report.md"]
    assert not list(Path.cwd().iterdir())


def test_the_command_resets_generates_and_sums_up_or_says_what_to_run_when_there_is_nothing(monkeypatch, capsys):
    for action in ("generate", "summary"):
        assert run_command(monkeypatch, action) == 2
        assert re.fullmatch(r"error: nothing to report, no records.*speedrun\.sh\n", capsys.readouterr().err)
    assert run_command(monkeypatch, "reset", "--dollars-per-gpu-hour", "2.5") == 0
    assert run_command(monkeypatch, "reset") == 0
    assert run_command(monkeypatch, "generate") == 0
    assert run_command(monkeypatch, "summary") == 0
    told = capsys.readouterr()
    assert "kept the last report in" in told.out
    assert "report.md" in told.out
    assert "whole run" in told.out
    assert told.err == ""
    assert Path("report.md").exists()
    assert Path("report.html").exists()


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_the_command_refuses_a_price_that_is_none(price, monkeypatch, capsys):
    assert run_command(monkeypatch, "reset", "--dollars-per-gpu-hour", price) == 2
    assert "is not a price" in capsys.readouterr().err
    assert not records_path().exists()
