"""What goes in and out of the server's API, in the shape that OpenAI's clients use, checked field by field.

Checks are strict: a number in quotes is no number, an unknown field is a mistake. Fields of OpenAI's API that this
server has no use for are accepted with the value that asks for nothing (`tools: []`) and refused with any other.
Its own additions are sampling options (`top_k`, `min_p`, `repetition_penalty`), parts of messages of the types
`python` and `python_output`, and the objects named `nanochat`. Not here: routes and HTTP (`server.py`).
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanochat.data.chat import visible_text
from nanochat.engine.sampling import Sampling

MAX_MESSAGES = 4096
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5  # of /v1/completions, as at OpenAI
MAX_PROMPTS = 64
DEFAULT_COMPLETION_TOKENS = 16  # of /v1/completions, as at OpenAI
_INT64 = 2**63

# Values that ask for nothing
Nothing = None
Empty = Annotated[list[Any], Field(max_length=0)] | None
EmptyObject = Annotated[dict[str, Any], Field(max_length=0)] | None
Zero = Annotated[float, Field(ge=0, le=0)] | None


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        place = f"character {error.start}"
        raise ValueError(f"the text holds a lone surrogate at {place}, which is no Unicode text") from error
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Seed = Annotated[int, Field(ge=-_INT64, lt=_INT64)]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


# --- requests ------------------------------------------------------------------------------------


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ReplyPart(Strict):
    """What an assistant says (`text`), asks the Python tool (`python`) and got as its answer (`python_output`)."""

    type: Literal["text", "python", "python_output"]
    text: Text


class SystemMessage(Strict):
    role: Literal["system", "developer"]
    content: Text | list[TextPart]
    name: str | None = None

    def as_message(self) -> dict[str, Any]:
        return {"role": "system", "content": _joined(self.content)}


class UserMessage(Strict):
    role: Literal["user"]
    content: Text | list[TextPart]
    name: str | None = None

    def as_message(self) -> dict[str, Any]:
        return {"role": "user", "content": _joined(self.content)}


class ReplyParts(Strict):
    parts: list[ReplyPart]


class AssistantMessage(Strict):
    """An earlier reply, also one as it came from this server: its `nanochat.parts`, tool calls included, stand for
    the content as long as they say the same."""

    role: Literal["assistant"]
    content: Text | list[ReplyPart]
    name: str | None = None
    nanochat: ReplyParts | None = None
    refusal: Nothing = None
    annotations: Empty = None
    audio: Nothing = None
    function_call: Nothing = None
    tool_calls: Empty = None

    def as_message(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]
        parts = [part.model_dump() for part in self.nanochat.parts] if self.nanochat else []
        if parts and content == visible_text(parts):
            content = parts
        return {"role": "assistant", "content": content}


Message = Annotated[SystemMessage | UserMessage | AssistantMessage, Field(discriminator="role")]


def _joined(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "\n".join(part.text for part in content)


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # ignored


class TextFormat(Strict):
    type: Literal["text"]


class SamplingFields(Strict):
    """What chat and completion requests have in common."""

    model: str | None = Field(None, description="the id that /v1/models gives; may be left out")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    temperature: Annotated[float, Field(ge=0, le=2)] | None = Field(1.0, description="0: the likeliest token always")
    top_p: Annotated[float, Field(gt=0, le=1)] | None = 1.0
    top_k: Annotated[int, Field(ge=0, lt=_INT64)] | None = Field(None, description="0: no limit")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = 0.0
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = 1.0
    seed: Seed | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    # ignored
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # not supported
    frequency_penalty: Zero = None
    presence_penalty: Zero = None
    logit_bias: EmptyObject = None

    @property
    def num_samples(self) -> int:
        return 1 if self.n is None else self.n

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def _sampling(self, max_tokens: int, num_logprobs: int | None, *, use_tool: bool) -> Sampling:
        given = {
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "seed": self.seed,
            "stop": (self.stop,) if isinstance(self.stop, str) else self.stop and tuple(self.stop),
        }
        given = {name: value for name, value in given.items() if value is not None}
        return Sampling(max_tokens=max_tokens, num_logprobs=num_logprobs, use_tool=use_tool, **given)


class ChatRequest(SamplingFields):
    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="at most what fits the context")
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = False
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    # ignored
    parallel_tool_calls: bool | None = None
    # not supported
    tools: Empty = None
    tool_choice: Literal["none", "auto"] | None = None
    functions: Empty = None
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: Nothing = None
    prediction: Nothing = None
    reasoning_effort: Nothing = None
    verbosity: Nothing = None
    web_search_options: Nothing = None

    @property
    def conversation(self) -> dict[str, Any]:
        """As `chat.py` takes it, which checks the order of roles."""
        return {"messages": [message.as_message() for message in self.messages]}

    @property
    def wants_logprobs(self) -> bool:
        return bool(self.logprobs)

    def sampling(self, most: int) -> Sampling:
        """For replies of at most `most` tokens. Raises `UserError` for a value that the engine does not take."""
        max_tokens = min(self.max_completion_tokens or self.max_tokens or most, most)
        num_logprobs = (self.top_logprobs or 0) if self.logprobs else None
        return self._sampling(max_tokens, num_logprobs, use_tool=True)


TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]


class CompletionRequest(SamplingFields):
    prompt: (
        Text
        | TokenIds
        | Annotated[list[Text], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="text, to which the begin-of-sequence token is added, or token ids, or a list of either")
    max_tokens: Annotated[int, Field(ge=1)] | None = DEFAULT_COMPLETION_TOKENS
    logprobs: Annotated[int, Field(ge=0, le=MAX_COMPLETION_LOGPROBS)] | None = None
    # not supported
    best_of: Annotated[int, Field(ge=1, le=1)] | None = None
    echo: Literal[False] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)

    @property
    def wants_logprobs(self) -> bool:
        return self.logprobs is not None

    def sampling(self, most: int) -> Sampling:
        """For replies of at most `most` tokens. Raises `UserError` for a value that the engine does not take."""
        max_tokens = min(self.max_tokens or DEFAULT_COMPLETION_TOKENS, most)
        return self._sampling(max_tokens, self.logprobs, use_tool=False)


# --- answers -------------------------------------------------------------------------------------


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Context(BaseModel):
    used: int
    limit: int


class ChatNote(BaseModel):
    """What became of the conversation: how many of its oldest messages did not fit, how full the context is."""

    num_dropped_messages: int
    context: Context


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int] | None


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None = None


class ReplyMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None
    nanochat: ReplyParts


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage
    nanochat: ChatNote


class ChatDelta(BaseModel):
    """A piece of a reply. A tool call or its result comes in `nanochat`, where an empty text begins a new part."""

    role: Literal["assistant"] | None = None
    content: str | None = None
    nanochat: ReplyPart | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    nanochat: ChatNote | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: Literal["stop", "length"] | None = None


class Completion(BaseModel):
    """The whole answer, and each piece of a streamed one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelNote(BaseModel):
    """Sizes in tokens: of the context, and of the longest reply that may be asked for."""

    context: int
    max_tokens: int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["nanochat"] = "nanochat"
    nanochat: ModelNote


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "loading", "failed"]
    model: str
    message: str = Field(description="in words, what keeps the model from answering")
    active: int = Field(description="replies being written")
    waiting: int = Field(description="replies that wait for their turn")


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail
