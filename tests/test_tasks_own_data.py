import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_hub import REPO, impatient_hub

from nanochat.common import UserError
from tasks import own_data
from tasks.mixtures import Sources
from tasks.own_data import OwnFile, check_refused, find_data

TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello\u2028you \U0001f642"}]
PARTS = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "2"}]


@pytest.fixture
def write(tmp_path):
    def write(*lines: str, encoding: str = "utf-8") -> OwnFile:
        path = tmp_path / "mine.jsonl"
        path.write_bytes("\n".join(lines).encode(encoding))
        return OwnFile(path)

    return write


def test_lines_are_objects_or_bare_lists(write):
    with_parts = [TURNS[0], {"role": "assistant", "content": PARTS}]
    lines = [json.dumps({"messages": TURNS, "source": "here"}), "", json.dumps(with_parts)]
    task = write(*lines, json.dumps(TURNS, ensure_ascii=False))
    assert list(task) == [{"messages": TURNS}, {"messages": with_parts}, {"messages": TURNS}]
    assert (task.name, task.kind, task.purpose) == ("mine", None, "train")


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(write):
    assert list(write(json.dumps(TURNS) + "\r", json.dumps(TURNS), encoding="utf-8-sig")) == [{"messages": TURNS}] * 2


def test_the_file_is_read_at_the_first_use_and_conversations_may_be_changed(tmp_path):
    path = tmp_path / "later.jsonl"
    task = OwnFile(path)
    path.write_text(json.dumps(TURNS))
    assert len(task) == 1
    path.unlink()
    task[0]["messages"].clear()
    assert task[0]["messages"] == TURNS


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("{", "it is not JSON"), ("3", "a conversation must be"), (json.dumps(TURNS[:1]), "the last message must be"),
        (json.dumps([TURNS[0], {"role": "bot", "content": ""}]), "message 2 has the role 'bot'"),
        (json.dumps([TURNS[0], {"role": "assistant", "content": "\ud800"}]), "a text is not valid Unicode"),
    ],
)  # fmt: skip
def test_a_refused_row_is_left_out_and_named_unless_so_many_may_be(write, line, fault):
    task = write(json.dumps(TURNS), "", line)
    assert list(task) == [{"messages": TURNS}]
    assert str(task).endswith("mine.jsonl: 1 OpenAI conversations, 1 row refused")
    with pytest.raises(UserError, match=rf"1 of 2 rows .*mine\.jsonl, line 3: {fault}.*--skip-bad-rows 1$"):
        check_refused([task], 0)
    check_refused([task], 1)


def test_the_first_refused_rows_are_named_and_the_others_counted(write, tmp_path, monkeypatch):
    monkeypatch.setattr(own_data, "MAX_FAULTS", 2)
    good, bad = write(json.dumps(TURNS)), tmp_path / "bad.json"
    bad.write_text(json.dumps([{"text": "x"}] * 5))
    bad = OwnFile(bad)
    words = r"5 of 6 rows cannot .*bad\.json, row 1: .*bad\.json, row 2: .*; and 3 more; mend them .* --skip-bad-rows 5"
    with pytest.raises(UserError, match=words) as refusal:
        check_refused([good, bad], 4)
    assert "\n" not in str(refusal.value)
    check_refused([good, bad], 5)
    with pytest.raises(UserError, match="5 of 5 rows cannot be learned from"):  # nothing would be left
        check_refused([bad], 5)


def test_rows_of_several_formats_are_counted(write):
    shared = {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
    task = write(*[json.dumps(shared)] * 1234, json.dumps(TURNS))
    assert len(task) == 1235
    assert str(task).endswith("mine.jsonl: 1,234 ShareGPT and 1 OpenAI conversations")


def test_files_that_cannot_be_read_are_named(write, tmp_path):
    for task, fault in (
        (write("", " "), "holds no conversations"), (OwnFile(tmp_path), "cannot read"),
        (OwnFile(tmp_path / "nowhere.jsonl"), r"nowhere\.jsonl .*check the path"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=fault):
            len(task)
    with pytest.raises(UserError, match="line 1 is not UTF-8"):
        len(write(json.dumps("é", ensure_ascii=False), encoding="latin-1"))


# --- folders and repositories ---
def in_lines(*questions):
    rows = [[{"role": "user", "content": question}, TURNS[1]] for question in questions]
    return "\n".join(map(json.dumps, rows)).encode()


FILES = {
    "train-1.jsonl": in_lines("one", "two"), "train-2.jsonl": in_lines("three"), "validation.jsonl": in_lines("four"),
    "test.jsonl": in_lines("five"), "dataset_infos.json": b"{}", "README.md": b"# Hi", ".hidden.jsonl": b"",
}  # fmt: skip


def questions(files):
    return [conversation["messages"][0]["content"] for file in files for conversation in file]


def write_all(folder, files):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_of_a_folder_validation_files_are_validated_on_and_test_files_left_alone(tmp_path):
    write_all(tmp_path / "mine", FILES)
    data = find_data(str(tmp_path / "mine"))
    assert (questions(data.train), questions(data.val)) == (["one", "two", "three"], ["four"])
    assert str(data.train[0]) == f"{tmp_path / 'mine'}: train-1.jsonl: 2 OpenAI conversations"
    assert {file.name for file in data.files} == {"mine"}
    train, val, _ = Sources([str(tmp_path / "mine")], {}).corpus()
    assert (questions(train), questions(val)) == (["one", "two", "three"], ["four"])


def test_a_repository_is_fetched_once_and_read_like_a_folder(monkeypatch, capsys):
    with impatient_hub(monkeypatch, FILES) as server:
        data = find_data(REPO)
        assert (questions(data.train), questions(data.val)) == (["one", "two", "three"], ["four"])
        assert str(data.val[0]) == f"{REPO}: validation.jsonl: 1 OpenAI conversations"
        assert server.fetched("test.jsonl") == server.fetched("dataset_infos.json") == 0
    again = find_data(REPO)  # the hub is gone
    assert questions(again.train) == ["one", "two", "three"]


def test_parquet_files_are_preferred_and_a_card_tells_the_files_of_each_split(monkeypatch, capsys):
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"messages": [TURNS, TURNS], "n": [1, 2]}), sink)
    card = b"---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n    path: b.parquet\n---\n"
    content = sink.getvalue().to_pybytes()
    files = {"a.parquet": content, "b.parquet": content, "train.jsonl": in_lines("one"), "README.md": card}
    with impatient_hub(monkeypatch, files) as server:
        data = find_data(REPO)
        assert (len(data.val), [file.label for file in data.train]) == (0, [f"{REPO}: b.parquet"])
        assert len(data.train[0]) == 2
        assert server.fetched("a.parquet") == 0


def test_data_that_cannot_be_found_are_named(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty has no \.parquet, .* file to train on"):
        find_data(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="'nowhere' is no file or folder here and no hub repository"):
        find_data("nowhere")
    with impatient_hub(monkeypatch, {"a.txt": b""}), pytest.raises(UserError, match=f"{REPO} has no .parquet"):
        find_data(REPO)
    with pytest.raises(UserError, match=r"cannot read the conversations in some/where\.jsonl"):
        len(find_data("some/where.jsonl").train[0])


NUMBER = "It is 1,000.\n#### 1,000"


@pytest.mark.parametrize(
    ("reference", "said", "reward"),
    [
        (NUMBER, "#### 1000.0", 1.0), (NUMBER, "1000", 0.0), (NUMBER, "#### 1001", 0.0),  # the mark must be there too
        ("Paris", " paris\n", 1.0), ("New  York", "new york", 1.0), ("Paris", "Paris.", 0.0), ("Paris", "", 0.0),
        (PARTS, "2", 1.0), (PARTS, PARTS, 1.0),  # tool calls do not count on either side
    ],
)  # fmt: skip
def test_the_reward_is_for_agreeing_with_the_last_answer(write, reference, said, reward):
    task = write(json.dumps([*TURNS, TURNS[0], {"role": "assistant", "content": reference}]))
    assert task.has_reward
    assert task.reward(task[0], said) == reward
    assert task.reward(task[0], said if said is PARTS else [{"type": "text", "text": said}]) == reward
