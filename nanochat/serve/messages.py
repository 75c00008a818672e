"""What clients send of a conversation, and how it becomes one that `data/chat.py` takes.

Clients differ: they send several user or system messages in a row, a system message later on, a greeting by the
assistant first, replies without content. The model knows one form only, in which user and assistant take turns after
an optional system message; `join_turns` brings what was sent into it and loses nothing.

Known fields are checked strictly: a number in quotes is not a number. Other fields are ignored, and `ignored_fields`
names them. Not here: the rest of a request (`schema.py`), tokens (`data/chat.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanochat.data.chat import SYSTEM_SEPARATOR, as_parts, visible_text

MAX_MESSAGES = 4096
Content = str | list[dict[str, str]]


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate at character {error.start}, not valid in Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Item = TypeVar("Item")
Items = Annotated[list[Item], Field(fail_fast=True)]  # noting every fault of a large request takes seconds


class Checked(BaseModel):
    """An object of a request."""

    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False, protected_namespaces=())


def ignored_fields(request: Checked) -> list[str]:
    """The fields of a request that nothing here knows, each once: ["cache_prompt", "messages.id"]."""
    found: dict[str, None] = {}

    def look_into(value: Any, path: str) -> None:
        if isinstance(value, Checked):
            found.update(dict.fromkeys(path + name for name in value.model_extra or ()))
            for name in type(value).model_fields:
                look_into(getattr(value, name), f"{path}{name}.")
        elif isinstance(value, list) and value and isinstance(value[0], Checked):
            for one in value:
                look_into(one, path)

    look_into(request, "")
    return list(found)


class TextPart(Checked):
    type: Literal["text"]
    text: Text


class ReplyPart(Checked):
    """What an assistant says (`text`), a call of the Python tool (`python`), or its result (`python_output`)."""

    type: Literal["text", "python", "python_output"]
    text: Text

    def as_part(self) -> dict[str, str]:
        return {"type": self.type, "text": self.text}


class ReplyParts(Checked):
    parts: Items[ReplyPart]


class InputMessage(Checked):
    role: Literal["system", "developer", "user"]
    content: Text | Items[TextPart]

    def said(self) -> tuple[str, Content]:
        """Role and content."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return "system" if self.role == "developer" else self.role, content


class AssistantMessage(Checked):
    """An earlier reply, also one as this server sent it: its `nanochat.parts`, which include tool calls, replace the
    content as long as they say the same."""

    role: Literal["assistant"]
    content: Text | Items[ReplyPart] | None = None
    refusal: Text | None = Field(None, description="what was said instead of the content")
    nanochat: ReplyParts | None = None
    # not supported: the values that ask for nothing
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)

    def said(self) -> tuple[str, Content]:
        if isinstance(self.content, list):
            content: Content = [part.as_part() for part in self.content]
        else:
            content = self.content or self.refusal or ""
        parts = [part.as_part() for part in self.nanochat.parts] if self.nanochat else []
        return "assistant", parts if parts and content == visible_text(parts) else content


Message = Annotated[InputMessage | AssistantMessage, Field(discriminator="role")]
Messages = Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES)]


@dataclass(frozen=True)
class Turns:
    """Messages as `chat.py` takes them, and how many of those sent are in each that is no system message."""

    messages: list[dict[str, Any]]
    sizes: list[int]

    @property
    def conversation(self) -> dict[str, Any]:
        return {"messages": self.messages}


def join_turns(sent: Sequence[InputMessage | AssistantMessage]) -> Turns:
    """The conversation of messages in any order:

    - what one side says in several messages becomes one, with blank lines between them;
    - so do system messages, wherever they stand, in front of all others; only those after the last reply, where no user
      says anything, take the user's turn;
    - before an assistant who speaks first stands a user message without text.

    The miniature answers 24 of 25 questions after a greeting or with a late system message, as without them; with that
    message left at its place, before or after the user's text, 22 and 9.
    """
    said = [message.said() for message in sent]
    last = max((place for place, (role, _) in enumerate(said) if role != "system"), default=-1)
    no_user = last < 0 or said[last][0] == "assistant"
    system: list[Content] = []
    turns: list[tuple[str, list[Content]]] = []
    for place, (role, content) in enumerate(said):
        if role == "system" and not (no_user and place > last):
            system.append(content)
            continue
        role = "user" if role == "system" else role
        if not turns and role == "assistant":
            turns.append(("user", []))
        if not turns or turns[-1][0] != role:
            turns.append((role, []))
        turns[-1][1].append(content)
    first = [{"role": "system", "content": _joined(system)}] if system else []
    return Turns(
        [*first, *({"role": role, "content": _joined(contents)} for role, contents in turns)],
        [len(contents) for _, contents in turns],
    )


def _joined(contents: Sequence[Content]) -> Content:
    contents = [content for content in contents if content]
    if all(isinstance(content, str) for content in contents):
        return SYSTEM_SEPARATOR.join(contents)
    parts: list[dict[str, str]] = []
    for content in contents:
        parts += [*([{"type": "text", "text": SYSTEM_SEPARATOR}] if parts else []), *as_parts(content)]
    return parts
