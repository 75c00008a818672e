"""Who the model is: conversations about nanochat, written for it by us and kept in `identity.jsonl`.

`dev/make_identity.py` generates the file from templates, without a network; running it again gives the same bytes.
They are for training only.
"""

from pathlib import Path

from tasks.custom_json import CustomJSON

PATH = Path(__file__).with_name("identity.jsonl")


class Identity(CustomJSON):
    """The conversations of `identity.jsonl`."""

    def __init__(self) -> None:
        super().__init__(PATH)
        self.name = "Identity"
