"""Records, their rendering as Markdown, and the curves."""

import base64
import json
import os
import re
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import report
from nanochat.common import UserError, base_dir, run_main
from nanochat.report import append_record, format_value, generate, read_records, records_path, render
from nanochat.tokenizer import tokenizer_dir


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
    return render(*read_records())


def is_small_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG\r\n\x1a\n") and len(data) < 60_000


@pytest.fixture
def clock(monkeypatch):
    """A list with the time of records in seconds."""
    now = [1_000_000.0]
    monkeypatch.setattr(report.time, "time", lambda: now[0])
    return now


def summary_row(markdown: str, metric: str) -> list[str]:
    """The cells of a row of the summary, without its name."""
    line = next(line for line in markdown.splitlines() if line.startswith(f"| **{metric}**"))
    return [cell.strip() for cell in line.split("|")[2:-1]]


def test_a_record_comes_back_with_tensors_paths_and_non_finite_numbers_as_plain_json():
    results = {"loss": torch.tensor(1.5), "count": np.int64(3), "worst": np.float32("inf"), "mean": float("nan")}
    given = {"data": Path("a/b"), "betas": (0.8, 0.95)}
    append_record("base_train", settings=given, results=results, table=[{"a": 1}], samples=["x\ny"])
    (record,), broken = read_records()
    assert (record.stage, record.settings) == ("base_train", {"data": str(Path("a/b")), "betas": [0.8, 0.95]})
    assert record.results == {"loss": 1.5, "count": 3, "worst": "inf", "mean": "nan"}
    assert (record.table, record.samples, broken) == ([{"a": 1}], ["x\ny"], 0)
    assert not re.search("NaN|Infinity", records_path().read_text())


def _append_many(worker: int) -> None:
    for number in range(20):
        append_record("tok_eval", settings={}, results={"worker": worker, "number": number, "pad": "é" * 5000})


def test_processes_that_append_at_once_each_get_whole_lines():
    with ProcessPoolExecutor(4) as pool:
        list(pool.map(_append_many, range(4)))
    records, broken = read_records()
    assert broken == 0
    seen = {(record.results["worker"], record.results["number"]) for record in records}
    assert seen == {(worker, number) for worker in range(4) for number in range(20)}


def test_lines_that_are_not_whole_records_are_counted_and_cost_no_other_record():
    append_record("tok_train", settings={}, results={"merges": 1})
    with open(records_path(), "a") as file:
        file.write('[1, 2]\n{"stage": "x"}\n{"stage": "x", "time": 0, "settings": {}, "results": {}, "extra": 1}\n')
        file.write('{"stage": "x", "time": 0, "settings": {}, "results": [1]}\n{"stage": "tok_ev')  # a killed writer
    append_record("base_train", settings={}, results={"val_bpb": 2.5})
    records, broken = read_records()
    assert [record.stage for record in records] == ["tok_train", "base_train"]
    assert broken == 5
    assert "5 unreadable line(s) of the records were skipped" in rendered()


def test_a_folder_that_cannot_be_written_is_a_user_error():
    (base_dir() / "report").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write the record of tok_train"):
        append_record("tok_train", settings={}, results={})


def test_reset_keeps_old_records_and_records_the_machine(metrics_path):
    append_record("base_train", settings={}, results={"val_bpb": 2.5}, metrics_path=metrics_path)
    old, metrics = records_path().read_text(), metrics_path.read_text()
    first, second = report.reset(), report.reset()
    assert [path.read_text() for path in first] == [old]
    assert len({*first, *second, records_path()}) == 3
    assert metrics_path.read_text() == metrics
    (record,), _ = read_records()
    machine = record.results
    assert record.stage == "environment"
    assert (machine["torch"], machine["cores"]) == (torch.__version__, os.cpu_count())
    assert machine["memory_gib"] > 0.1
    assert len(machine["gpus"]) == torch.cuda.device_count()
    assert all(machine[key] for key in ("cpu", "commit", "python", "platform"))
    assert f"| torch | {machine['torch']} |" in rendered()


def test_the_commit_says_whether_files_differ_and_is_unknown_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "REPO", tmp_path)
    assert report.git_commit().startswith("unknown")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch("[0-9a-f]{7,}", report.git_commit())
    (tmp_path / "new.py").write_text("not tracked\n")
    assert re.fullmatch("[0-9a-f]{7,}", report.git_commit())
    (tmp_path / "code.py").write_text("x = 2\n")
    assert re.fullmatch("[0-9a-f]{7,} with uncommitted changes", report.git_commit())
    monkeypatch.setenv("PATH", "")
    assert report.git_commit().startswith("unknown")


def test_generate_writes_the_same_report_to_both_places_and_never_reads_it_back():
    append_record("tok_train", settings={}, results={"merges": 247})
    paths = generate()
    assert paths == [base_dir() / "report" / "report.md", Path.cwd() / "report.md"]
    assert "## Tokenizer training" in paths[0].read_text()
    for path in paths:
        path.write_text("CORE 0.99")
    assert generate() == paths
    assert paths[0].read_text() == paths[1].read_text()
    assert "0.99" not in paths[0].read_text()


def test_the_summary_puts_each_metric_under_the_model_it_was_measured_on():
    for stage, source, results in (
        ("base_train", "", {"val_bpb": 0.9}), ("base_loss", "base", {"val_bpb": 0.8119}),
        ("base_eval", "", {"core": 0.2219}), ("mid_train", "", {"val_bpb": 0.4}),
        ("chat_eval", "mid", {"ARC-Easy": 0.3561}), ("chat_eval", "sft", {"ARC-Easy": 0.3876, "ChatCORE": 0.0884}),
        ("chat_eval", "rl", {"GSM8K": 0.0758}),
    ):  # fmt: skip
        append_record(stage, settings={"source": source} if source else {}, results=results)
    markdown = rendered()
    assert summary_row(markdown, "CORE") == ["0.2219", "-", "-", "-"]
    assert summary_row(markdown, "ARC-Easy") == ["-", "0.3561", "0.3876", "not run"]
    assert summary_row(markdown, "GSM8K") == ["-", "not run", "not run", "0.0758"]
    assert summary_row(markdown, "ChatCORE") == ["-", "not run", "0.0884", "not run"]
    assert summary_row(markdown, "val bpb") == ["0.8119", "0.4", "not run", "-"]


def test_the_summary_has_further_exams_only_where_they_were_taken():
    append_record("chat_eval", settings={"source": "sft"}, results={"SmallWorld-sums": 0.99})
    append_record("chat_eval", settings={"source": "rl"}, results={"Spelling": 0.57, "SpellingBee": 0.8})
    markdown = rendered()
    assert summary_row(markdown, "SmallWorld-sums") == ["-", "-", "0.99", "-"]
    assert summary_row(markdown, "Spelling") == ["-", "-", "-", "0.57"]
    assert markdown.count("**SpellingBee**") == 1
    assert "SmallWorld-facts" not in markdown


def test_what_was_not_run_says_so_with_its_reason_until_base_train_has_the_result():
    append_record("base_eval", settings={}, results={"not_run": "no data"})
    markdown = rendered()
    assert summary_row(markdown, "CORE")[0] == "not run, no data"
    assert "- CORE (base): not run, no data" in markdown
    assert "- Pretraining (`base_train`): not run" in markdown
    assert "## Pretraining" not in markdown
    append_record("base_train", settings={}, results={"core": 0.25, "val_bpb": None})
    assert summary_row(rendered(), "CORE")[0] == "0.25"
    assert summary_row(rendered(), "val bpb")[0] == "not run"


def test_a_yardstick_model_never_stands_in_for_ours():
    append_record("base_eval", settings={"hf_path": "org/yardstick"}, results={"core": 0.11})
    assert summary_row(rendered(), "CORE")[0] == "not run"
    assert "## CORE (org/yardstick)" in rendered()


def test_the_last_of_several_attempts_counts_and_stages_stand_in_the_order_of_the_pipeline():
    for stage, value in (("my_stage", 1), *(("base_train", value) for value in (0.5, 0.25, 0.125)), ("tok_train", 1)):
        append_record(stage, settings={}, results={"val_bpb": value})
    markdown = rendered()
    assert summary_row(markdown, "val bpb")[0] == "0.125"
    assert "2 earlier attempt(s) not shown" in markdown
    append_record("base_train", settings={}, results={"val_bpb": 0.125, "train_seconds": 3.0})  # killed at its end
    assert "2 earlier attempt(s) not shown" in rendered()
    headings = re.findall(r"^## (.*)$", markdown, re.MULTILINE)
    assert headings[-4:] == ["Tokenizer training", "Pretraining", "my_stage", "Not run"]
    assert headings.count("Pretraining") == 1


def test_samples_cannot_leave_their_fence_nor_values_their_cell():
    given = {"note": "a|b\n<script>", "config": {"n_embd": 256, "extra": {}}}
    table, samples = [{"task": "a|b", "n": 1}, {"task": "c", "extra": 2}], ["text\n```\n# not a heading\n````"]
    append_record("base_loss", settings=given, results={"x": 1}, table=table, samples=samples)
    markdown = rendered()
    assert "\n`````text\ntext\n```\n# not a heading\n````\n`````" in markdown
    assert "| note | a\\|b \\<script> |\n| config.n_embd | 256 |\n| config.extra | {} |" in markdown
    assert "| task | n | extra |\n| --- | --- | --- |\n| a\\|b | 1 |  |\n| c |  | 2 |" in markdown


def test_wall_clock_runs_from_reset_or_the_start_of_the_first_stage_to_the_last_record(clock):
    append_record("tok_train", settings={}, results={"elapsed_seconds": 60.0})
    clock[0] += 119.6
    append_record("base_train", settings={}, results={})
    assert "last record: **0:03:00**" in rendered()
    report.reset()
    clock[0] += 3 * 3600 + 51 * 60
    append_record("base_train", settings={}, results={})
    clock[0] += 10 * 3600
    assert "last record: **3:51:00**" in rendered()


MACHINE = {"gpus": ["NVIDIA H100 80GB HBM3"] * 8, "gpu_memory_gib": 79.6, "cuda": "13.2", "cpu": "c", "cores": 8}


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        ({**MACHINE, "gpu_hour_dollars": 3.0, "price_source": "s"}, "$24.00 an hour: about **$48.00** for 2:00:00"),
        ({**MACHINE, "gpu_hour_dollars": None}, "No price is known for NVIDIA H100 80GB HBM3"),
        ({"gpus": []}, "No GPU, so no estimate"), ({}, "No GPU, so no estimate"),
    ],
)  # fmt: skip
def test_the_cost_is_price_times_gpus_times_hours_or_says_why_not(machine, words, clock):
    append_record("environment", settings={}, results=machine)
    clock[0] += 7200
    append_record("base_train", settings={}, results={})
    assert words in rendered()
    assert ("| gpus | 8 x NVIDIA H100 80GB HBM3 |" in rendered()) == bool(machine.get("gpus"))


def test_code_size_counts_source_files_and_nothing_hidden_or_built(tmp_path, monkeypatch, tokenizer):
    repo = tmp_path / "repo"
    sources = {"a.py": "x = 1\ny = 2\n", "runs/b.sh": "true\n"}
    others = {".venv/c.py": "hidden\n", "rustbpe/target/d.rs": "built\n", "notes.txt": "no source\n"}
    for name, text in {**sources, **others, "requirements.lock": "a==1 \\\n    --hash=sha256:0\nb==2\n"}.items():
        (repo / name).parent.mkdir(parents=True, exist_ok=True)
        (repo / name).write_text(text)
    monkeypatch.setattr(report, "REPO", repo)
    append_record("tok_train", settings={}, results={})
    markdown = rendered()
    assert "| Characters | 17 |\n| Lines | 3 |\n| Files | 2 |" in markdown
    assert "not counted: no tokenizer trained yet" in markdown
    assert "| 3 (2 of packages) |" in markdown
    tokenizer.save(tokenizer_dir())
    assert f"| Tokens (our tokenizer) | {sum(map(len, tokenizer.encode_batch(sources.values())))} |" in rendered()


def test_curves_are_small_pictures_defined_at_the_end_also_of_a_folder_that_moved(metrics_path, tmp_path, monkeypatch):
    append_record("base_train", settings={}, results={"val_bpb": 1.5}, metrics_path=metrics_path)
    assert rendered().count("data:image/png") == 3
    base_dir().rename(tmp_path / "elsewhere")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "elsewhere"))
    markdown = rendered()
    references = re.findall(r"^!\[.*\]\[(.+)\]$", markdown, re.MULTILINE)
    definitions = dict(re.findall(r"^\[(.+)\]: data:image/png;base64,(.+)$", markdown, re.MULTILINE))
    assert references == list(definitions)
    assert len(references) == 3
    assert all(is_small_png(base64.b64decode(data, validate=True)) for data in definitions.values())
    assert markdown.rstrip().splitlines()[-1].startswith("[base-train-base-tokens-per-second]: ")


def test_curves_that_cannot_be_drawn_are_left_out_with_the_reason(metrics_path, monkeypatch):
    append_record("base_train", settings={}, results={"x": 1}, metrics_path=metrics_path)
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "matplotlib.figure", None)
        markdown = rendered()
    assert "No curves: matplotlib is not installed" in markdown
    assert "data:image/png" not in markdown
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
    assert report.read_curves(path) == points


@pytest.mark.parametrize("count", [2, 3, 299, 300, 301, 5000])
def test_a_curve_of_any_length_is_a_small_picture(count):
    points = [(step, 1e6 + (step * 7919) % 1000) for step in range(count)]
    assert is_small_png(report.draw_curve("tokens_per_second", points))


VALUES = [
    (0.81234, "0.8123"), (0.5, "0.5"), (0.0, "0"), (3e-5, "3e-05"), (12345.6, "12,346"), (-0.25, "-0.25"),
    (1.2e18, "1.2e+18"), (float("nan"), "nan"), (32768, "32,768"), (True, "True"), (None, "-"), ([1, 0.5], "1, 0.5"),
    ("<|bos|>", "\\<\\|bos\\|>"),
]  # fmt: skip


@pytest.mark.parametrize(("value", "text"), VALUES)
def test_values_are_shown_short(value, text):
    assert format_value(value) == text


def run_command(monkeypatch, *arguments: str) -> int:
    """Exit status of `python -m nanochat.report` with these arguments, run in this process."""
    monkeypatch.setattr(sys, "argv", ["report", *arguments])
    try:
        return run_main(report.main, report.parse_args) or 0
    except SystemExit as stop:
        return stop.code


def test_the_command_resets_and_generates_or_says_what_to_run_when_there_is_nothing(monkeypatch, capsys):
    assert run_command(monkeypatch, "generate") == 2
    assert re.fullmatch(r"error: nothing to report, no records.*speedrun\.sh\n", capsys.readouterr().err)
    assert run_command(monkeypatch, "reset", "--dollars-per-gpu-hour", "2.5") == 0
    assert run_command(monkeypatch, "reset") == 0
    assert run_command(monkeypatch, "generate") == 0
    told = capsys.readouterr()
    assert "kept the last report's records-" in told.out
    assert "report.md" in told.out
    assert told.err == ""
    assert Path("report.md").exists()


@pytest.mark.parametrize("price", ["-1", "nan", "inf"])
def test_the_command_refuses_a_price_that_is_none(price, monkeypatch, capsys):
    assert run_command(monkeypatch, "reset", "--dollars-per-gpu-hour", price) == 2
    assert "is not a price" in capsys.readouterr().err
    assert not records_path().exists()
