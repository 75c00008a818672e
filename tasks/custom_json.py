"""Conversations of one's own from a JSON-lines file, to train on.

Each line is `{"messages": [...]}` or just the list of messages, in the format of `nanochat.chat`:

    {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Hi! How can I help?"}]}
    [{"role": "user", "content": "2+3?"}, {"role": "assistant", "content": [{"type": "python", "text": "2+3"},
        {"type": "python_output", "text": "5"}, {"type": "text", "text": "That is 5."}]}]           (in one line)

Every line is checked before the first conversation is given out. Blank lines are skipped.

For reinforcement learning the last answer of each is the reference, and the reward 1 for an answer that agrees with it:
where the reference ends with a line `#### 42`, by value in that form, else by text, letter case and spacing aside.
"""

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from nanochat.common import UserError
from nanochat.data.chat import check_conversation, visible_text
from tasks.common import Completion, Conversation, Task, marked_number


class CustomJSON(Task):
    """The conversations of the file `path`, read when first asked for.

    Raises then `UserError`, with file and line, for what is not a conversation with an answer.
    """

    has_reward = True

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.name = self.path.stem

    @cached_property
    def _lines(self) -> list[str]:
        """The lines as they stand in the file: smaller than what they parse to, and each use gets an object of its
        own."""
        return read_conversation_lines(self.path)

    def __len__(self) -> int:
        return len(self._lines)

    def conversation(self, index: int) -> Conversation:
        return {"messages": _messages(json.loads(self._lines[index]))}

    def reward(self, conversation: Conversation, completion: Completion) -> float:
        said, reference = visible_text(completion), visible_text(conversation["messages"][-1]["content"])
        number = marked_number(reference)
        if number is not None:
            return float(marked_number(said) == number)
        return float(said.casefold().split() == reference.casefold().split())


def read_conversation_lines(path: Path) -> list[str]:
    """The lines of `path` that are not blank, each checked to be a conversation. Raises `UserError` otherwise."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # splitlines would cut at signs that JSON may contain
    except OSError as error:
        raise UserError(f"cannot read the conversations in {path} ({error.strerror}); check the path") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text ({error}); write it as JSON lines in UTF-8") from error
    kept = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            _check(_messages(json.loads(line)))
        except UserError as error:
            raise UserError(f"{path}, line {number}: {error}") from error
        except (ValueError, RecursionError) as error:  # nested too deeply, or a number with thousands of digits
            raise UserError(f"{path}, line {number} is not JSON ({error}); write one conversation a line") from error
        kept.append(line)
    if not kept:
        raise UserError(f"{path} holds no conversations")
    return kept


def _messages(value: Any) -> Any:
    return value.get("messages") if isinstance(value, dict) else value


def _check(messages: Any) -> None:
    if check_conversation({"messages": messages})[-1]["role"] != "assistant":
        raise UserError("the last message must be the assistant's, there is nothing to learn from a question alone")
    try:
        json.dumps(messages, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:  # JSON can write half of a surrogate pair, UTF-8 and the tokenizer cannot
        raise UserError(f"a text is not valid Unicode ({error.reason})") from error
