"""Rows of chat data as they are published, made into conversations of `nanochat.data.chat`.

    OpenAI     {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}
               or just the list; an assistant's content may have parts that call the calculator (see `chat.py`)
    ShareGPT   {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}
               with a "system" message beside them, if any
    Alpaca     {"instruction": "Add", "input": "1 and 2", "output": "3"}
               with a "system" message and a "history" of pairs [question, answer], if any

What is in a row decides, not the name of the file. Further columns are ignored. A row that cannot be learned from as it
stands is refused with the reason, never mended. Not here: files (`row_files.py`).
"""

from collections.abc import Mapping, Sequence
from typing import Any

from nanochat.common import UserError
from nanochat.data.chat import check_conversation
from tasks.common import Conversation

TURN_COLUMNS = ("messages", "conversations", "conversation")
ALPACA_COLUMNS = ("instruction", "input", "output", "history")
COLUMNS = (*TURN_COLUMNS, *ALPACA_COLUMNS, "system")  # all that are read
EXPECTED = "messages (OpenAI), conversations (ShareGPT), or instruction and output (Alpaca)"
ROLES = {  # by the names they have in published data
    "system": "system", "developer": "system", "user": "user", "human": "user", "prompter": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
}  # fmt: skip
TOOL_ROLES = ("tool", "function", "function_call", "function_response", "observation", "ipython")
TOOL_KEYS = ("tool_calls", "function_call")
TEXT_PARTS = ("text", "input_text", "output_text")


def read_row(row: Any) -> tuple[str, Conversation]:
    """The name of the row's format, and its conversation. Raises `UserError` with the reason if it is refused."""
    if not isinstance(row, Mapping):
        name, messages = "OpenAI", _read_turns(row)
    elif column := next((name for name in TURN_COLUMNS if row.get(name) is not None), None):
        turns = row[column]
        is_sharegpt = isinstance(turns, Sequence) and any(isinstance(t, Mapping) and "from" in t for t in turns)
        name, messages = "ShareGPT" if is_sharegpt else "OpenAI", _system(row) + _read_turns(turns)
    elif row.get("instruction") is not None and row.get("output") is not None:
        name, messages = "Alpaca", _system(row) + _read_alpaca(row)
    else:
        found = ", ".join(str(key) for key in row)[:100] or "no columns"
        raise UserError(f"a conversation must have {EXPECTED}; this has {found}")
    conversation = {"messages": messages}
    if check_conversation(conversation)[-1]["role"] != "assistant":
        raise UserError("the last message must be the assistant's, there is nothing to learn from a question alone")
    return name, conversation


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The message of the column `system`, if there is one."""
    text = row.get("system") or ""
    if not isinstance(text, str):
        raise UserError(f"system is of type {type(text).__name__}, not a text")
    return [{"role": "system", "content": text}] if text.strip() else []


def _read_turns(turns: Any) -> list[dict[str, Any]]:
    if not isinstance(turns, Sequence) or isinstance(turns, str):
        raise UserError(f"a conversation must be a list of messages, not of type {type(turns).__name__}")
    messages = [_read_message(message, f"message {number}") for number, message in enumerate(turns, start=1)]
    return [message for message in messages if message["role"] != "system" or message["content"].strip()]


def _read_message(message: Any, what: str) -> dict[str, Any]:
    """A message with `role` and `content` alone; `what` begins a complaint."""
    if not isinstance(message, Mapping):
        raise UserError(f"{what} must be an object with role and content, not of type {type(message).__name__}")
    said_by = message.get("role") or message.get("from")
    role = said_by.strip().lower() if isinstance(said_by, str) else None
    calls = [key for key in TOOL_KEYS if message.get(key)] or [role] * (role in TOOL_ROLES)
    if calls:
        raise UserError(f"{what} belongs to a tool call ({calls[0]}); of tools, only the calculator can be learned")
    if said_by is None:
        raise UserError(f"{what} has no role")
    if role not in ROLES:
        raise UserError(f"{what} has the role {said_by!r:.60}; known are {', '.join(ROLES)}")
    if message.get("weight") == 0:
        raise UserError(f"{what} has the weight 0, but every answer is learned from; leave it out with what follows")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    return {"role": ROLES[role], "content": _read_content(content, ROLES[role], what)}


def _read_content(content: Any, role: str, what: str) -> str | list[dict[str, str]]:
    """A text; or an assistant's parts, for `check_conversation` to check, if one of them is for the calculator."""
    if content is None:
        raise UserError(f"{what} has no content")
    if isinstance(content, Sequence) and not isinstance(content, str):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in content]
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in content]
        own = ("python", "python_output") if role == "assistant" else ()
        if odd := [kind for kind in kinds if kind not in (*TEXT_PARTS, *own)]:
            raise UserError(f"{what} has a part of type {odd[0]!r:.60}; only text can be learned from")
        if not all(isinstance(text, str) for text in texts):
            raise UserError(f"{what} has a part without a text")
        if set(kinds) & set(own):
            names = ("text" if kind in TEXT_PARTS else kind for kind in kinds)
            return [{"type": kind, "text": text} for kind, text in zip(names, texts, strict=True)]
        content = ("" if role == "assistant" else "\n").join(texts)  # as in the server and in exported templates
    if not isinstance(content, str):
        raise UserError(f"{what} has a content of type {type(content).__name__}, not a text")
    if not content.strip() and role != "system":
        raise UserError(f"{what} is empty")
    return content


def _read_alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    texts = {name: row.get(name) if row.get(name) is not None else "" for name in ("instruction", "input", "output")}
    if odd := [name for name, text in texts.items() if not isinstance(text, str)]:
        raise UserError(f"{odd[0]} is of type {type(texts[odd[0]]).__name__}, not a text")
    question = "\n\n".join(text for text in (texts["instruction"], texts["input"]) if text.strip())
    history, messages = row.get("history") or [], []
    if not isinstance(history, list) or any(not isinstance(pair, list) or len(pair) != 2 for pair in history):
        raise UserError("history must be a list of pairs of a question and its answer")
    for pair in [*history, (question, texts["output"])]:
        for role, text in zip(("user", "assistant"), pair, strict=True):
            messages.append({"role": role, "content": _read_content(text, role, f"a text of the {role}")})
    return messages
