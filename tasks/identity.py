"""Who the model is: conversations about nanochat from `identity.jsonl`, for training only.

`dev/make_identity.py` writes that file from templates of ours, offline and reproducibly.
"""

from pathlib import Path

from tasks.own_data import OwnFile

PATH = Path(__file__).with_name("identity.jsonl")


class Identity(OwnFile):
    def __init__(self) -> None:
        super().__init__(PATH, name="Identity")
