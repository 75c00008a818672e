"""Fetching, unpacking and reading the bundle: what is right once, and every way in which it can be wrong."""

import json
import threading
import zipfile
from contextlib import contextmanager, nullcontext
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from nanochat.common import UserError, base_dir
from nanochat.evals import core_bundle
from nanochat.evals.core_bundle import bundle_fault, fetch_bundle, read_tasks

CORE_YAML = """icl_tasks:
- {label: colours, dataset_uri: world/colours.jsonl, num_fewshot: [2], icl_task_type: multiple_choice,
   continuation_delimiter: "\\nAnswer: "}
- {label: endings, dataset_uri: world/endings.jsonl, num_fewshot: [0], icl_task_type: language_modeling}
"""
META = "Eval Task,Task Category,Random baseline\ncolours,world,25\nendings,world,0\n"
COLOURS = [{"query": f"Colour {i}?", "choices": ["red", "blue", "green", "grey"], "gold": i % 4} for i in range(9)]
ENDINGS = [{"context": "one two", "continuation": "three"}]


def json_lines(records):
    return "".join(json.dumps(record) + "\n" for record in records)


def bundle_files(colours=COLOURS, endings=ENDINGS, yaml=CORE_YAML, meta=META):
    return {
        "eval_bundle/core.yaml": yaml,
        "eval_bundle/eval_meta_data.csv": meta,
        "eval_bundle/eval_data/world/colours.jsonl": json_lines(colours),
        "eval_bundle/eval_data/world/endings.jsonl": json_lines(endings),
    }


def write_folder(folder, files):
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return folder / "eval_bundle"


def write_zip(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in files.items():
            archive.writestr(name, text)
    return path


@contextmanager
def server(answers):
    """A local server that gives the next (status, body) of `answers` to each request, the last one for ever."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, body = answers[min(len(requests), len(answers) - 1)]
            requests.append(self.path)
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args):
            pass

    httpd = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=httpd.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{httpd.server_port}/eval_bundle.zip", requests
    finally:
        httpd.shutdown()
        httpd.server_close()


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch, tmp_path):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv(core_bundle.BUNDLE_VARIABLE, raising=False)
    monkeypatch.setattr(core_bundle.time, "sleep", lambda seconds: None)


def test_folders_and_zip_files_are_read_where_they_are(tmp_path):
    root = write_folder(tmp_path, bundle_files())
    archive = write_zip(tmp_path / "bundle.zip", bundle_files())
    flat = {name.removeprefix("eval_bundle/"): text for name, text in bundle_files().items()}
    expected = [(task.label, task.lines, task.records) for task in read_tasks(root)]
    for source in (root, tmp_path, archive, write_zip(tmp_path / "flat.zip", flat)):
        assert fetch_bundle(str(source)) == source
        assert [(task.label, task.lines, task.records) for task in read_tasks(source)] == expected
    assert not list(base_dir().rglob("core.yaml"))


def test_a_url_is_fetched_once_after_a_failing_a_truncated_and_a_html_answer(tmp_path):
    whole = write_zip(tmp_path / "bundle.zip", bundle_files()).read_bytes()
    for answers in ([(503, b"busy"), (200, whole[:-40]), (200, whole)], [(200, b"<html>sorry</html>"), (200, whole)]):
        with server(answers) as (url, requests):
            roots = {fetch_bundle(url) for _ in range(3)}
        assert len(requests) == len(answers)
        assert len(read_tasks(roots.pop())) == 2


def test_a_url_that_never_gives_a_bundle_is_a_clear_error_and_leaves_nothing():
    for answer in ((404, b"not here"), (200, b"<html>log in</html>"), None):
        with (
            server([answer]) if answer else nullcontext(("http://127.0.0.1:9/eval_bundle.zip", [])) as (url, _),
            pytest.raises(UserError, match=r"cannot fetch.*--bundle.*NANOCHAT_EVAL_BUNDLE"),
        ):
            fetch_bundle(url)
    assert not [path for path in (base_dir() / "eval_bundle").iterdir() if path.suffix in (".zip", ".partial")]


def test_the_environment_names_the_bundle_and_the_argument_wins(tmp_path, monkeypatch):
    root, other = (write_folder(tmp_path / name, bundle_files()) for name in "ab")
    monkeypatch.setenv(core_bundle.BUNDLE_VARIABLE, str(root))
    assert fetch_bundle() == root
    assert fetch_bundle(str(other)) == other


def test_a_path_that_is_not_there_or_holds_no_bundle_is_refused(tmp_path):
    (tmp_path / "page.zip").write_text("<html>")
    for path, fault in (
        (tmp_path / "missing.zip", "no evaluation bundle at"), (tmp_path, "it holds no core"),
        (tmp_path / "page.zip", r"not a readable zip file.*--bundle"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=fault):
            fetch_bundle(str(path))


@pytest.mark.parametrize("name", ["../outside.txt", "/outside.txt", "eval_bundle/../../outside.txt", "..\\outside.txt"])
def test_a_zip_file_that_points_outside_its_folder_writes_nothing(tmp_path, name):
    archive = write_zip(tmp_path / "evil.zip", {**bundle_files(), name: "gotcha"})
    assert len(read_tasks(fetch_bundle(str(archive)))) == 2
    assert not list(tmp_path.rglob("outside.txt"))


def test_damaged_zip_files_are_refused(tmp_path):
    archive = write_zip(tmp_path / "bundle.zip", bundle_files())
    data = bytearray(archive.read_bytes())
    assert bundle_fault(archive) == ""
    at = data.index(b"core.yaml") + len(b"core.yaml") + 20  # inside the first member's compressed bytes
    data[at] ^= 0xFF
    archive.write_bytes(data)
    assert bundle_fault(archive)
    archive.write_bytes(data[: len(data) // 2])
    assert "not a readable zip file" in bundle_fault(archive)
    assert "no core.yaml" in bundle_fault(write_zip(archive, {"readme.txt": "hello"}))


def test_tasks_carry_what_the_bundle_says_and_lines_count_blank_ones_too(tmp_path):
    root = write_folder(tmp_path, bundle_files())
    (root / "eval_data/world/endings.jsonl").write_text("\n\n" + json_lines(ENDINGS))
    colours, endings = read_tasks(root)
    assert (colours.label, colours.kind, colours.num_shots) == ("colours", "multiple_choice", 2)
    assert (colours.delimiter, colours.baseline) == ("\nAnswer: ", 0.25)
    assert (endings.kind, endings.delimiter, endings.baseline) == ("language_modeling", " ", 0.0)
    assert endings.lines == (3,)
    assert sorted(colours.lines) == list(range(1, 10))
    assert all(colours.records[i] == COLOURS[line - 1] for i, line in enumerate(colours.lines))
    assert list(colours.lines) != sorted(colours.lines)  # asked in a fixed shuffled order
    assert read_tasks(write_folder(tmp_path / "again", bundle_files()))[0].lines == colours.lines


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"query": "a", "choices": ["x", "y"]}, "'gold'"), (["not", "an", "object"], "not a JSON object"),
        ({"query": "a", "choices": ["x", "y"], "gold": 2}, "gold is 2, but there are 2 options"),
        ({"query": "a", "choices": ["x", "y"], "gold": -1}, "gold is -1"),
        ({"query": "a", "choices": ["x", ""], "gold": 0}, "empty"),
        ({"query": "a", "choices": ["x", 3], "gold": 0}, "not a text"),
        ({"query": "a", "choices": [], "gold": 0}, "there are 0 options"),
        ({"query": None, "choices": ["x"], "gold": 0}, "'query' must be of type str"),
    ],
)  # fmt: skip
def test_a_record_that_is_not_in_order_is_named_by_file_and_line(tmp_path, record, message):
    root = write_folder(tmp_path, bundle_files(colours=[*COLOURS[:2], record]))
    with pytest.raises(UserError, match=r"colours\.jsonl, line 3") as caught:
        read_tasks(root)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"endings": [{"context": "a", "continuation": ""}]}, "continuation is empty"),
        ({"endings": []}, "holds no examples"), ({"meta": META.replace("25", "none")}, "not a number"),
        ({"meta": META.replace("25", "100")}, "no random baseline from 0 to 100 for task colours"),
        ({"meta": META.replace("endings", "others")}, "no random baseline .* for task endings"),
        ({"yaml": CORE_YAML.replace("language_modeling", "guessing")}, "unknown kind 'guessing'"),
        ({"yaml": CORE_YAML.replace("colours.jsonl", "gone.jsonl")}, "cannot be read"),
        ({"yaml": "icl_tasks: []"}, "names no tasks"), ({"yaml": "tasks: 3"}, "cannot be read"),
        ({"yaml": "a: [b"}, "cannot be read"),
    ],
)  # fmt: skip
def test_a_bundle_that_is_not_in_order_is_a_user_error(tmp_path, change, message):
    with pytest.raises(UserError, match=message):
        read_tasks(write_folder(tmp_path, bundle_files(**change)))


def test_text_that_is_not_json_is_named_by_line(tmp_path):
    root = write_folder(tmp_path, bundle_files())
    (root / "eval_data/world/endings.jsonl").write_text(json_lines(ENDINGS) + '{"context": ')
    with pytest.raises(UserError, match=r"endings\.jsonl, line 2 is not JSON"):
        read_tasks(root)
