"""Users' own conversations from a JSON-lines file, to train on.

Each line is `{"messages": [...]}` or just the list of messages, in the format of `nanochat.data.chat`:

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! How can I help?"}]}
    [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": [{"type": "python", "text": "2+3"},
        {"type": "python_output", "text": "5"}, {"type": "text", "text": "That is 5."}]}]           (in one line)

Blank lines are skipped; every other line is checked before the first conversation is given out. In reinforcement
learning the last answer is the reference, and the reward is 1 for an answer that agrees with it: by value, on a line
`#### 42` at the end, if the reference has one, otherwise by text, without regard to letter case and spacing.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.data.chat import check_conversation, visible_text
from tasks.common import Completion, Conversation, Task, marked_number, reference_text


class CustomJSON(Task):
    """The conversations of the file `path`, read at the first use, which raises `UserError` with file and line for
    anything that is not a conversation with an answer."""

    has_reward = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.name = self.path.stem

    @cached_property
    def rows(self) -> list[str]:
        """The checked lines as text, which is smaller than what it parses to and gives each caller a new object."""
        path = self.path
        try:
            lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would also cut at U+2028 and others
        except OSError as error:
            raise UserError(f"cannot read the conversations in {path} ({error.strerror}); check the path") from error
        except UnicodeDecodeError as error:
            raise UserError(f"{path} is not UTF-8 text ({error}); write it as JSON lines in UTF-8") from error
        kept = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
        for number, line in kept:
            try:
                _check(_messages(line))
            except UserError as error:
                raise UserError(f"{path}, line {number}: {error}") from error
            except (ValueError, RecursionError) as error:  # nested too deeply, or a number with thousands of digits
                what = f"{path}, line {number} is not JSON"
                raise UserError(f"{what} ({error}); write one conversation a line") from error
        if not kept:
            raise UserError(f"{path} holds no conversations")
        return [line for _, line in kept]

    def conversation(self, index: int) -> Conversation:
        return {"messages": _messages(self.rows[index])}

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        said, reference = visible_text(completion), reference_text(conversation)
        number = marked_number(reference)
        if number is not None:
            return float(marked_number(said) == number)
        return float(said.casefold().split() == reference.casefold().split())


def _messages(line: str) -> Any:
    value = json.loads(line)
    return value.get("messages") if isinstance(value, dict) else value


def _check(messages: Any) -> None:
    if check_conversation({"messages": messages})[-1]["role"] != "assistant":
        raise UserError("the last message must be the assistant's, there is nothing to learn from a question alone")
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, UTF-8 and the tokenizer cannot
        raise UserError(f"a text is not valid Unicode ({error.reason})") from error
