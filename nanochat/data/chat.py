"""The conversation format: messages to token ids with a loss mask, prompts for a reply, replies back to text.

A conversation is `{"messages": [{"role": ..., "content": ...}, ...]}`: an optional system message, then user and
assistant in turn. Content is a text; an assistant's may also be a list of parts `{"type": ..., "text": ...}` of the
kinds in `PART_TYPES`: what it says, what it asks the Python tool, and what the tool answers. As tokens:

    <|bos|><|user_start|>SYSTEM\\n\\nUSER<|user_end|><|assistant_start|>TEXT<|python_start|>EXPRESSION<|python_end|>
    <|output_start|>RESULT<|output_end|>TEXT<|assistant_end|><|user_start|>...

without line breaks between the pieces. Text never encodes to a special token, so nothing a user writes can end a turn.
Not here: calling a model (`engine.py`), evaluating an expression (`calculator.py`).
"""

import codecs
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from typing import Any, NamedTuple

from nanochat.common import UserError
from nanochat.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
PART_TYPES = ("text", "python", "python_output")
REPLY_FRAC = 0.25  # at most this share of the context is reserved for a reply; older turns are dropped first
SYSTEM_SEPARATOR = "\n\n"  # between the system message and the first user message, which are one turn of tokens
_PART_TOKENS = {  # around each part of an assistant's message
    "python": ("<|python_start|>", "<|python_end|>"),
    "python_output": ("<|output_start|>", "<|output_end|>"),
}

Conversation = Mapping[str, Any]


@dataclass(frozen=True)
class Rendered:
    """A conversation as tokens: `ids`, and `mask` of the same length, True on the tokens that the assistant must
    produce: its words, its tool calls and the end of its turn. `num_dropped` messages did not fit."""

    ids: list[int]
    mask: list[bool]
    num_dropped: int


@dataclass(frozen=True)
class Prompt:
    """Tokens after which the assistant speaks. `num_dropped` messages, the oldest, did not fit."""

    ids: list[int]
    num_dropped: int


def check_conversation(conversation: Any) -> list[dict[str, Any]]:
    """The messages of `conversation`. Raises `UserError` naming the message that is not in order."""
    messages = conversation.get("messages") if isinstance(conversation, Mapping) else None
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError('a conversation must be {"messages": [...]} with at least one message')
    has_system = isinstance(messages[0], Mapping) and messages[0].get("role") == "system"
    roles = chain(["system"] * has_system, cycle(("user", "assistant")))
    for number, (message, role) in enumerate(zip(messages, roles, strict=False), start=1):
        if fault := _message_fault(message, role):
            raise UserError(f"message {number} {fault}")
    if has_system and len(messages) == 1:
        raise UserError("a system message must be followed by a user message")
    return list(messages)


def _message_fault(message: Any, expected_role: str) -> str:
    """What is wrong with `message`, "" when nothing is."""
    if not isinstance(message, Mapping):
        return f"must be an object with role and content, not {type(message).__name__}"
    role, content = message.get("role"), message.get("content")
    if role not in ROLES:
        return f"has the role {role!r}; known are {', '.join(ROLES)}"
    if role != "assistant" and not isinstance(content, str):
        return f"has a content of type {type(content).__name__}; of the role {role} it must be a text"
    if not isinstance(content, Sequence):
        return f"has a content of type {type(content).__name__}; it must be a text or a list of parts"
    for part in [] if isinstance(content, str) else content:
        is_part = isinstance(part, Mapping) and part.get("type") in PART_TYPES
        if not is_part or not isinstance(part.get("text"), str):
            return f"has the part {part!r}; a part has a type ({', '.join(PART_TYPES)}) and a text"
    if role != expected_role:
        rule = "after a system message, if any, user and assistant take turns"
        return f"must have the role {expected_role!r}, not {role!r}: {rule}"
    return ""


def render(tokenizer: Tokenizer, conversation: Conversation, *, max_tokens: int | None = None) -> Rendered:
    """A conversation to learn from, at most `max_tokens` long (None: no limit). One that is too long loses whole
    messages at its end: an answer is there whole or not at all, and never without its question. A last question without
    an answer is dropped too. Ids are empty where not even the first answer fits. Raises `UserError` for a conversation
    that is not in order."""
    system, messages = _split_system(check_conversation(conversation))
    ids, mask = [tokenizer.bos_id], [False]
    length, num_kept = 0, 0  # of ids, and messages, up to the last answer that fits
    for number, message in enumerate(messages, start=1):
        turn_ids, turn_mask = _turn(tokenizer, message, system if number == 1 else "")
        ids += turn_ids
        mask += turn_mask
        if max_tokens is not None and len(ids) > max_tokens:
            break
        if message["role"] == "assistant":
            length, num_kept = len(ids), number
    return Rendered(ids[:length], mask[:length], len(messages) - num_kept)


def prompt_limit(context_len: int, reply_tokens: int) -> int:
    """Tokens a prompt may have, with room behind it for a reply of `reply_tokens` or `REPLY_FRAC` of the context."""
    return context_len - max(1, min(reply_tokens, int(REPLY_FRAC * context_len)))


def render_for_completion(
    tokenizer: Tokenizer, conversation: Conversation, *, max_tokens: int | None = None, opens: bool = True
) -> Prompt:
    """The prompt for the assistant's next words, at most `max_tokens` long (None: no limit). After a user message that
    is a new answer; after an assistant message the same answer goes on. Without `opens` it is neither: the ids end with
    the last message. A prompt that is too long loses its oldest questions with their answers; the beginning-of-sequence
    token, the system message and the last question stay. Raises `UserError` where these alone are too long, and for a
    conversation that is not in order."""
    system, messages = _split_system(check_conversation(conversation))
    turns = [_turn(tokenizer, message)[0] for message in messages]
    opened = []
    if opens and messages[-1]["role"] == "assistant":
        turns[-1].pop()  # the end of the turn
    elif opens:
        opened = [tokenizer.special_ids["<|assistant_start|>"]]
    for first in range(0, len(messages), 2):  # questions stand at even places
        question, later = _turn(tokenizer, messages[first], system)[0], turns[first + 1 :]
        length = 1 + len(question) + sum(map(len, later)) + len(opened)
        if max_tokens is None or length <= max_tokens:
            return Prompt([tokenizer.bos_id, *question, *chain.from_iterable(later), *opened], first)
    question = "the last message, with the system message if there is one,"
    raise UserError(f"{question} has {length} tokens, but only {max_tokens} fit; shorten it")


def _split_system(messages: list[dict[str, Any]]) -> tuple[str, list[dict[str, Any]]]:
    """The system message as it stands before the first question ("" without one), and the other messages."""
    if messages[0]["role"] != "system":
        return "", messages
    return messages[0]["content"] + SYSTEM_SEPARATOR, messages[1:]


def _turn(tokenizer: Tokenizer, message: Mapping[str, Any], system: str = "") -> tuple[list[int], list[bool]]:
    """Ids and mask of a question, with the system message in front of the first one, or of an answer."""
    special = tokenizer.special_ids
    if message["role"] == "user":
        text = tokenizer.encode(system + message["content"])
        ids = [special["<|user_start|>"], *text, special["<|user_end|>"]]
        return ids, [False] * len(ids)
    ids, mask = [special["<|assistant_start|>"]], [False]
    for part in as_parts(message["content"]):
        piece = tokenizer.encode(part["text"])
        if part["type"] in _PART_TOKENS:
            start, end = _PART_TOKENS[part["type"]]
            piece = [special[start], *piece, special[end]]
        ids += piece
        mask += [part["type"] != "python_output"] * len(piece)
    return [*ids, special["<|assistant_end|>"]], [*mask, True]


def as_parts(content: str | Sequence[Mapping[str, str]]) -> list[dict[str, str]]:
    """An assistant's content as a list of parts: `as_parts("Hi") == [{"type": "text", "text": "Hi"}]`. Neighbouring
    texts become one part, because their tokens cannot be told apart."""
    parts: list[dict[str, str]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
        if parts and part["type"] == parts[-1]["type"] == "text":
            parts[-1]["text"] += part["text"]
        else:
            parts.append(dict(part))
    return parts


def visible_text(content: str | Sequence[Mapping[str, str]]) -> str:
    """What the assistant says, without its tool calls and their results."""
    return "".join(part["text"] for part in as_parts(content) if part["type"] == "text")


class Delta(NamedTuple):
    """A piece of a reply: `type` is one of `PART_TYPES`."""

    type: str
    text: str


class ReplyReader:
    """Turns a reply's tokens, as they come, into pieces of text by kind of part; `parts` is its content so far.

    A character is given out when its last byte is there; a replacement character stands only for bytes that no further
    token could complete. Special tokens that do not belong in a reply give no text. What the assistant says ends before
    the first of the texts `stops`, even one that spans tokens: then `is_stopped` is set and nothing more comes. Text
    that may be the beginning of a stop is held back until that is decided.
    """

    def __init__(self, tokenizer: Tokenizer, stops: Sequence[str] = ()):
        self.parts: list[dict[str, str]] = []
        self.is_stopped = False
        self._types = {tokenizer.special_ids[start]: type_ for type_, (start, _) in _PART_TOKENS.items()}
        self._special = frozenset(tokenizer.special_ids.values())
        self._tokenizer, self._stops = tokenizer, stops
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._held = ""
        self._type, self._is_new = "text", True

    def add(self, ids: Iterable[int]) -> list[Delta]:
        """The pieces that `ids` complete, in order; a tool call or result begins with an empty piece."""
        deltas: list[Delta] = []
        for token in ids:
            if token not in self._special:
                self._append(deltas, self._decoder.decode(self._tokenizer.decode_bytes((token,))))
                continue
            deltas += self.finish()
            if self.is_stopped:
                break
            self._type, self._is_new = self._types.get(token, "text"), True
            if self._type != "text":
                self._put(deltas, "")
        return deltas

    def finish(self) -> list[Delta]:
        """What is left: text held back, and replacement characters for an unfinished character."""
        deltas: list[Delta] = []
        self._append(deltas, self._decoder.decode(b"", final=True))
        if self._held:
            self._put(deltas, self._held)
            self._held = ""
        return deltas

    def _append(self, deltas: list[Delta], text: str) -> None:
        if self._stops and self._type == "text":
            text = self._before_stop(text)
        if text:
            self._put(deltas, text)

    def _put(self, deltas: list[Delta], text: str) -> None:
        if self._is_new:
            self.parts.append({"type": self._type, "text": ""})
            self._is_new = False
        self.parts[-1]["text"] += text
        deltas.append(Delta(self._type, text))

    def _before_stop(self, text: str) -> str:
        """The beginning of held-back text and `text` that cannot belong to a stop; the rest is held back."""
        if self.is_stopped:
            return ""
        text, self._held = self._held + text, ""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.is_stopped = True
            return text[: min(places)]
        longest = min(len(text), max(map(len, self._stops)) - 1)
        suffixes = (text[len(text) - size :] for size in range(longest, 0, -1))
        self._held = next((end for end in suffixes if any(stop.startswith(end) for stop in self._stops)), "")
        return text[: len(text) - len(self._held)]
