"""Records: what stages append, and what a new report does with the old one."""

import os
import re
import subprocess
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import records
from nanochat.common import UserError, base_dir
from nanochat.records import append_record, read_records, records_path, reset


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
    found, broken = read_records()
    assert broken == 0
    seen = {(record.results["worker"], record.results["number"]) for record in found}
    assert seen == {(worker, number) for worker in range(4) for number in range(20)}


def test_lines_that_are_not_whole_records_are_counted_and_cost_no_other_record():
    append_record("tok_train", settings={}, results={"merges": 1})
    with open(records_path(), "a") as file:
        file.write('[1, 2]\n{"stage": "x"}\n{"stage": "x", "time": 0, "settings": {}, "results": {}, "extra": 1}\n')
        file.write('{"stage": "x", "time": 0, "settings": {}, "results": [1]}\n{"stage": "tok_ev')  # a killed writer
    append_record("base_train", settings={}, results={"val_bpb": 2.5})
    found, broken = read_records()
    assert [record.stage for record in found] == ["tok_train", "base_train"]
    assert broken == 5


def test_a_folder_that_cannot_be_written_is_a_user_error():
    (base_dir() / "report").write_text("a file where the folder should be")
    with pytest.raises(UserError, match="cannot write the record of tok_train"):
        append_record("tok_train", settings={}, results={})


def test_reset_keeps_the_old_report_with_its_pictures_and_records_the_machine():
    append_record("base_train", settings={}, results={"val_bpb": 2.5})
    folder, old = records_path().parent, records_path().read_text()
    (folder / "report_images").mkdir()
    (folder / "report_images" / "loss.png").write_bytes(b"picture")
    (folder / "report.md").write_text("![loss](report_images/loss.png)")
    first, second = reset(), reset()
    assert (first / "records.jsonl").read_text() == old
    assert (first / "report.md").read_text() == "![loss](report_images/loss.png)"  # a link that still holds
    assert (first / "report_images" / "loss.png").read_bytes() == b"picture"
    assert second not in (None, first)
    assert sorted(path.name for path in folder.iterdir() if path.is_file()) == ["records.jsonl", "records.lock"]
    (record,), _ = read_records()
    machine = record.results
    assert record.stage == "environment"
    assert (machine["torch"], machine["cores"]) == (torch.__version__, os.cpu_count())
    assert machine["memory_gib"] > 0.1
    assert len(machine["gpus"]) == torch.cuda.device_count()
    assert all(machine[key] for key in ("cpu", "commit", "python", "platform"))


def test_the_commit_says_whether_files_differ_and_is_unknown_outside_a_checkout(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "REPO", tmp_path)
    assert records.git_commit().startswith("unknown")
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b"]
    (tmp_path / "code.py").write_text("x = 1\n")
    for command in (["init", "-q"], ["add", "code.py"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], check=True)
    assert re.fullmatch("[0-9a-f]{7,}", records.git_commit())
    (tmp_path / "new.py").write_text("not tracked\n")
    assert re.fullmatch("[0-9a-f]{7,}", records.git_commit())
    (tmp_path / "code.py").write_text("x = 2\n")
    assert re.fullmatch("[0-9a-f]{7,} with uncommitted changes", records.git_commit())
    monkeypatch.setenv("PATH", "")
    assert records.git_commit().startswith("unknown")
