"""Which files of a data set are for training and which for validation, by the conventions of the Hugging Face hub.

What the card (README.md) says in the `configs` of its YAML front matter holds. Without that, names tell: the words
train, validation, test and their like in the name of a file, otherwise in that of its folder. A test split is for
neither. Not here: what to do where no file is for validation (`dataset.py`).
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath

from nanochat.common import UserError

SPLIT_WORDS = {
    "test": {"test", "testing", "eval", "evaluation"},  # first, so that a name with two such words never trains
    "val": {"validation", "valid", "val", "dev"},
    "train": {"train", "training"},
}
FRONT_MATTER = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(\r?\n|$)", re.DOTALL)


@dataclass
class Splits:
    """Names of files by what they are for, each in the order they were given."""

    train: list[str] = field(default_factory=list)
    val: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)

    @property
    def train_names(self) -> list[str]:
        """For training; where nothing is said of validation, all but the last."""
        return self.train if self.val else self.train[:-1]

    @property
    def val_names(self) -> list[str]:
        """For validation; where nothing is said, the last."""
        return self.val or self.train[-1:]

    @property
    def suffices(self) -> bool:
        """Whether there is something for training and for validation."""
        return bool(self.train_names and self.val_names)

    def add(self, split: str, names: Sequence[str]) -> None:
        known = getattr(self, split)
        known += [name for name in names if name not in known]


def split_files(names: Sequence[str], card: str = "") -> Splits:
    """Sort the files `names` (paths below the repository's root, or a local folder) into splits, by the `configs` of
    the `card` if it has them. Raises `UserError` when these leave a choice, or the card cannot be read."""
    configs = [(name, splits) for name, splits in _configs(names, card) if splits.train or splits.val or splits.test]
    if not configs:
        return _split_by_names(names)
    chosen = [splits for name, splits in configs if name == "default"] or [splits for _, splits in configs]
    if len(chosen) > 1:
        folders = ", ".join(name for name, _ in configs)
        raise UserError(f"the data set has several configurations ({folders}); add the folder of one to --data")
    return chosen[0]


def split_of(name: str) -> str:
    """`train`, `val` or `test` by the words of a name (a part of a path, or a split), "" if it has none of them."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((split for split, known in SPLIT_WORDS.items() if words & known), "")


def _split_by_names(names: Sequence[str]) -> Splits:
    """By the words in the file's own name, or in the nearest folder that has one. Files without any are for training
    only where no file is named so."""
    splits, unnamed = Splits(), []
    for name in names:
        path = PurePosixPath(name)
        split = next(filter(None, map(split_of, (path.name, *(folder.name for folder in path.parents)))), "")
        if split:
            splits.add(split, [name])
        else:
            unnamed.append(name)
    if not splits.train:
        splits.train = unnamed
    return splits


def _configs(names: Sequence[str], card: str) -> Iterator[tuple[str, Splits]]:
    """Name and files of each configuration in the card; the one marked `default: true` is named "default"."""
    import yaml

    front_matter = FRONT_MATTER.match(card)
    try:
        facts = yaml.safe_load(front_matter[1]) if front_matter else None
        for config in (facts.get("configs") if isinstance(facts, dict) else None) or []:
            folder = f"{config['data_dir'].strip('/')}/" if config.get("data_dir") else ""
            own = [name for name in names if name.startswith(folder)]
            name = "default" if config.get("default") else str(config.get("config_name", "default"))
            if "data_files" not in config:
                yield name, _split_by_names(own)
                continue
            splits = Splits()
            for split, pattern in _data_files(config["data_files"]):
                matches = _glob(folder + pattern.removeprefix("./").lstrip("/"))
                splits.add(split_of(split) or "train", [name for name in own if matches.fullmatch(name)])
            held_out = {*splits.val, *splits.test}  # of patterns that overlap, the one that is not train counts
            splits.train = [name for name in splits.train if name not in held_out]
            yield name, splits
    except (yaml.YAMLError, AttributeError, KeyError, TypeError, re.error) as error:
        fault = " ".join(str(error).split())[:160]
        raise UserError(
            f"the configs in the data set's README.md cannot be read ({fault}); mend or remove them"
        ) from error


def _data_files(value: str | list | dict) -> Iterator[tuple[str, str]]:
    """(split, pattern) for every way to write `data_files`; what has no split is `train`."""
    if isinstance(value, str):
        yield "train", value
    elif isinstance(value, dict):
        items = [value] if "path" in value else [{"split": split, "path": path} for split, path in value.items()]
        for item in items:
            paths = item["path"] if isinstance(item["path"], list) else [item["path"]]
            yield from ((item.get("split", "train"), path) for path in paths)
    else:
        for item in value:
            yield from _data_files(item)


def _glob(pattern: str) -> re.Pattern[str]:
    """The regular expression of a glob: `*` and `?` stay within a folder, `**` does not."""
    parts = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    pieces = re.split(r"(\*\*/|\*\*|\*|\?|\[[^\]]+\])", pattern)
    return re.compile(
        "".join(parts.get(p) or (p.replace("[!", "[^") if p.startswith("[") else re.escape(p)) for p in pieces)
    )
