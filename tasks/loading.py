"""Rows of data sets from the Hugging Face hub, or the mirror named by `HF_ENDPOINT`, checked before anyone uses them.

The `datasets` library fetches and caches them (below `HF_HOME`), with its own lock against other processes. A split
that scores are measured on must have exactly the number of rows it is known for, or a score would be that of another
benchmark under the same name; for a split that is only trained on, another number (of a partial mirror) is a warning.
"""

import logging
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from nanochat.common import Unavailable, UserError
from nanochat.data.hub import endpoint

logger = logging.getLogger(__name__)

PAUSES_SECONDS = (1, 2, 4)  # before further attempts, when the hub is busy or a connection breaks
BUSY_STATUSES = (408, 429, 500, 502, 503, 504)

Spec = Any  # what a value must be: str, int, a list of one spec, or a mapping of names to specs


@dataclass(frozen=True)
class HubSplit:
    """A split of a data set on the hub: repository, configuration, split, a `Spec` for each column it needs, the number
    of rows it is known to have, and whether scores are measured on it."""

    repo: str
    config: str
    split: str
    columns: Mapping[str, Spec]
    num_rows: int
    is_measured: bool

    def __str__(self) -> str:
        return f"{self.repo} ({self.config}, {self.split})"


class Rows:
    """The rows of a `HubSplit`, or a `part` of them, as dictionaries: loaded at the first use, checked when read."""

    def __init__(self, source: HubSplit, part: slice = slice(None)) -> None:
        self.source, self.part = source, part

    @cached_property
    def _dataset(self):
        return load_split(self.source)

    @property
    def _places(self) -> range:
        return range(len(self._dataset))[self.part]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """The columns of row `index` that the source names. Raises `UserError` when they are not as specified."""
        row = self._dataset[self._places[index]]
        columns = {name: row.get(name) for name in self.source.columns}
        if fault := _fault(columns, self.source.columns, "the row"):
            raise self.error(index, fault)
        return columns

    def column(self, name: str) -> list[Any]:
        """All values of a column of the whole split, unchecked."""
        return self._dataset[name][:]

    def error(self, index: int, fault: str) -> UserError:
        """The error for a row that is not as it should be."""
        expected = f"{self.source} is not the data set this task is made for"
        return UserError(f"{expected}: in row {self._places[index]}, {fault}")


def load_split(source: HubSplit):
    """The `datasets.Dataset` of `source`, from the cache or fetched. Raises `Unavailable` when it cannot be had, lacks
    a column, or is measured on and has another number of rows."""
    from datasets.exceptions import DatasetsError  # importing `datasets` takes 1.5 s
    from datasets.utils import disable_progress_bars, enable_progress_bars, is_progress_bar_enabled
    from httpx import HTTPError

    had_progress_bars = is_progress_bar_enabled()
    disable_progress_bars()  # converting takes seconds, and eight processes would draw eight bars
    try:
        dataset = _fetch(source)
    except (OSError, ValueError, DatasetsError, HTTPError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise Unavailable(
            f"cannot load {source} from {endpoint()} ({reason}); check the network, set HF_ENDPOINT to a mirror "
            f"before the start, or copy the cache of a machine that has it to HF_HOME and set HF_HUB_OFFLINE=1"
        ) from error
    finally:
        if had_progress_bars:
            enable_progress_bars()
    if missing := [name for name in source.columns if name not in dataset.column_names]:
        raise Unavailable(
            f"{source} has no column {', '.join(missing)}, only {', '.join(dataset.column_names)}; "
            f"is {endpoint()} the hub, or a true mirror of it?"
        )
    if len(dataset) != source.num_rows:
        what = f"{source} has {len(dataset):,} rows at {endpoint()} instead of the {source.num_rows:,} it is known for"
        if source.is_measured:
            raise Unavailable(f"{what}: scores on it could not be compared; set HF_ENDPOINT to a complete copy")
        logger.warning("%s; training on what is there", what)
    return dataset


def _fetch(source: HubSplit):
    """What `datasets` has for `source`; tried again where that may help."""
    import datasets
    from httpx import TransportError
    from huggingface_hub.errors import HfHubHTTPError

    for pause in PAUSES_SECONDS:
        try:
            return datasets.load_dataset(source.repo, source.config, split=source.split)
        except (TransportError, HfHubHTTPError) as error:
            if isinstance(error, HfHubHTTPError) and error.response.status_code not in BUSY_STATUSES:
                raise
            time.sleep(pause)
    return datasets.load_dataset(source.repo, source.config, split=source.split)


def _fault(value: Any, spec: Spec, name: str) -> str:
    """What is wrong with `value`, called `name`, according to `spec`; "" when nothing is."""
    if isinstance(spec, Mapping):
        if not isinstance(value, Mapping):
            return f"{name} is {value!r:.80} instead of an object"
        return next((f for key in spec if (f := _fault(value.get(key), spec[key], f"{name}'s {key}"))), "")
    if isinstance(spec, list):
        if not isinstance(value, list) or not value:
            return f"{name} is {value!r:.80} instead of a list"
        return next((f for item in value if (f := _fault(item, spec[0], f"an item of {name}"))), "")
    return "" if type(value) is spec else f"{name} is {value!r:.80} instead of {spec.__name__}"
