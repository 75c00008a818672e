"""SmolTalk, general conversations, in the shorter selection for small models.

Ben Allal et al., "SmolLM2: When Smol Goes Big", arXiv 2502.02737. Hub: HuggingFaceTB/smol-smoltalk, Apache-2.0, with
460,341 conversations to train on; the 24,229 of its test split, which is no benchmark, serve as validation.
"""

from nanochat.common import UserError
from nanochat.data.chat import check_conversation
from tasks.common import Conversation, Task
from tasks.loading import HubSplit, Rows

REPO = "HuggingFaceTB/smol-smoltalk"
NUM_ROWS = {"train": 460341, "test": 24229}
COLUMNS = {"messages": [{"role": str, "content": str}]}


class SmolTalk(Task):
    """`split` is "train", or "test" for validation; smaller copies are accepted with a warning."""

    name = "SmolTalk"

    def __init__(self, split: str) -> None:
        assert split in NUM_ROWS, split
        self.purpose = "train" if split == "train" else "validation"
        self.rows = Rows(HubSplit(REPO, "default", split, COLUMNS, NUM_ROWS[split], is_measured=False))

    def conversation(self, index: int) -> Conversation:
        messages = [{"role": m["role"], "content": m["content"]} for m in self.rows[index]["messages"]]
        try:
            return {"messages": check_conversation({"messages": messages})}
        except UserError as error:
            raise self.rows.error(index, str(error)) from error
