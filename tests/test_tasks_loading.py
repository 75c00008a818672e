import logging
import re
import time

import datasets
import httpx
import pytest
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
from hub_fixtures import serve_rows
from huggingface_hub.errors import HfHubHTTPError

from nanochat.common import UserError
from tasks.loading import HubSplit, Rows

COLUMNS = {"question": str, "choices": {"text": [str]}, "answer": int}
ROW = {"question": "Why?", "choices": {"text": ["so", "or so"]}, "answer": 1, "further": "column"}


def source(*, num_rows: int = 2, is_measured: bool = True) -> HubSplit:
    return HubSplit("some/thing", "main", "test", COLUMNS, num_rows, is_measured)


def serve(monkeypatch, *rows):
    return serve_rows(monkeypatch, {("some/thing", "main", "test"): rows})


def test_rows_are_loaded_at_their_first_use_and_only_once(monkeypatch):
    asked = serve(monkeypatch, ROW, ROW)
    rows = Rows(source())
    assert asked == []
    assert len(rows) == 2
    assert rows[1] == {name: ROW[name] for name in COLUMNS}
    assert rows.column("answer") == [1, 1]
    assert asked == [("some/thing", "main", "test")]


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach it"), TimeoutError("timed out"), ValueError("BuilderConfig 'main' not found"),
        DatasetNotFoundError("no such data set"), DatasetGenerationError("damaged"), httpx.DecodingError("garbled"),
    ],
)  # fmt: skip
def test_what_keeps_a_data_set_from_loading_is_told_with_its_remedy(monkeypatch, error):
    def load_dataset(*args, **options):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    remedy = r"cannot load some/thing \(main, test\) from http.*HF_ENDPOINT.*HF_HUB_OFFLINE"
    with pytest.raises(UserError, match=remedy):
        len(Rows(source()))


def answer(status: int) -> HfHubHTTPError:
    return HfHubHTTPError("no", response=httpx.Response(status, request=httpx.Request("GET", "http://hub")))


@pytest.mark.parametrize(
    ("errors", "num_asked"),
    [([answer(503), httpx.ReadError("broke"), None], 3), ([answer(429)] * 9, 4), ([answer(404)] * 9, 1)],
)
def test_a_busy_hub_is_asked_again_with_growing_pauses(monkeypatch, errors, num_asked):
    asked = serve(monkeypatch, ROW, ROW)
    found, pauses, left = datasets.load_dataset, [], iter(errors)

    def load_dataset(*args, **options):
        if error := next(left):
            asked.append(error)
            raise error
        return found(*args, **options)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(time, "sleep", pauses.append)
    if None in errors:
        assert len(Rows(source())) == 2
    else:
        with pytest.raises(UserError, match="cannot load"):
            len(Rows(source()))
    assert len(asked) == num_asked
    assert pauses == [1, 2, 4][: num_asked - 1]


def test_a_missing_column_is_named(monkeypatch):
    serve(monkeypatch, {"question": "Why?", "options": "so"})
    with pytest.raises(UserError, match="no column choices, answer, only question, options"):
        len(Rows(source()))


def test_another_number_of_rows_is_an_error_where_scores_are_measured_and_a_warning_elsewhere(monkeypatch, caplog):
    serve(monkeypatch, ROW)
    with caplog.at_level(logging.WARNING):
        with pytest.raises(UserError, match=r"has 1 rows at .* instead of the 2"):
            len(Rows(source()))
        assert caplog.records == []
        assert len(Rows(source(is_measured=False))) == 1
    assert re.search("has 1 rows at .* instead of the 2", caplog.text)


def test_a_part_of_the_rows_is_numbered_from_its_beginning(monkeypatch):
    serve(monkeypatch, ROW, ROW | {"answer": 2}, ROW | {"answer": 3})
    rows = Rows(source(num_rows=3), slice(1, None))
    assert len(rows) == 2
    assert rows[0]["answer"] == 2
    assert "in row 2, it is wrong" in str(rows.error(1, "it is wrong"))


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"question": None}, "the row's question is None instead of str"),
        ({"choices": {"text": ["so", None]}}, "an item of the row's choices's text is None instead of str"),
        ({"choices": {"text": []}}, r"the row's choices's text is \[\] instead of a list"),
        ({"choices": None}, "the row's choices is None instead of an object"),
        ({"answer": 1.5}, "the row's answer is 1.5 instead of int"),
    ],
)
def test_a_row_of_another_shape_is_named_when_it_is_read(monkeypatch, change, fault):
    serve(monkeypatch, ROW | change, ROW | change)
    with pytest.raises(UserError, match=rf"some/thing \(main, test\) is not the data set .*row 1, {fault}"):
        Rows(source())[1]


@pytest.mark.parametrize("enabled", [True, False])
def test_a_programming_error_is_not_blamed_on_the_network_and_progress_bars_are_as_before(monkeypatch, enabled):
    seen = []
    fail = lambda *args, **options: seen.append(is_progress_bar_enabled()) or 1 / 0  # noqa: E731
    monkeypatch.setattr(datasets, "load_dataset", fail)
    (enable_progress_bars if enabled else disable_progress_bars)()
    try:
        with pytest.raises(ZeroDivisionError):
            len(Rows(source()))
        assert seen == [False]
        assert is_progress_bar_enabled() == enabled
    finally:
        enable_progress_bars()
