"""What goes over the wire: requests, checked field by field, and answers, in the format of OpenAI's API.

Checks are strict: a number in quotes is not a number, and an unknown field is a mistake. Fields of OpenAI's API that do
not apply here are accepted with the value that asks for nothing (`tools: []`) and refused with any other. Our additions
are sampling options (`top_k`, `min_p`, `repetition_penalty`), message parts of the types `python` and `python_output`,
and the objects named `nanochat`. A sampling option needs only a field in `SamplingFields` with the name it has in
`Sampling`. Not here: routes (`api.py`), errors in words (`errors.py`).
"""

from dataclasses import fields
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from nanochat.data.chat import visible_text
from nanochat.engine.sampling import Sampling

MAX_MESSAGES = 4096
MAX_STOPS = 4
MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5  # in /v1/completions, as at OpenAI
MAX_PROMPTS = 64
DEFAULT_COMPLETION_TOKENS = 16  # in /v1/completions, as at OpenAI
_INT64 = 2**63


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"the text has a lone surrogate at character {error.start}, not valid in Unicode") from error
    return text


Text = Annotated[str, AfterValidator(_unicode)]
Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Count = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompts = Field(min_length=1, max_length=MAX_PROMPTS)
FinishReason = Literal["stop", "length"]


class Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False, protected_namespaces=())


class TextPart(Strict):
    type: Literal["text"]
    text: Text


class ReplyPart(Strict):
    """What an assistant says (`text`), a call of the Python tool (`python`), or its result (`python_output`)."""

    type: Literal["text", "python", "python_output"]
    text: Text


class ReplyParts(Strict):
    parts: list[ReplyPart]


class InputMessage(Strict):
    role: Literal["system", "developer", "user"]
    content: Text | list[TextPart]
    name: str | None = None

    def as_message(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class AssistantMessage(Strict):
    """An earlier reply, also one as this server sent it: its `nanochat.parts`, which include tool calls, replace the
    content as long as they say the same."""

    role: Literal["assistant"]
    content: Text | list[ReplyPart]
    name: str | None = None
    nanochat: ReplyParts | None = None
    # not supported: the values that ask for nothing
    refusal: None = None
    annotations: list[Any] | None = Field(None, max_length=0)
    audio: None = None
    function_call: None = None
    tool_calls: list[Any] | None = Field(None, max_length=0)

    def as_message(self) -> dict[str, Any]:
        content = self.content if isinstance(self.content, str) else [part.model_dump() for part in self.content]
        parts = self.nanochat.model_dump()["parts"] if self.nanochat else []
        return {"role": "assistant", "content": parts if parts and content == visible_text(parts) else content}


Message = Annotated[InputMessage | AssistantMessage, Field(discriminator="role")]


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool | None = None  # ignored


class TextFormat(Strict):
    type: Literal["text"]


class SamplingFields(Strict):
    """What chat and completion requests have in common.

    Each of them also has `reply_tokens` (how long a reply may get, None: to the server's limit) and, as in `Sampling`,
    `use_tool` and `num_logprobs`.
    """

    model: str | None = Field(None, description="the id from /v1/models; may be omitted")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Count | None = 1
    max_tokens: Count | None = Field(None, description="at most what fits the context")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0: greedy decoding")
    top_p: float | None = Field(1.0, gt=0, le=1)
    top_k: int | None = Field(None, ge=0, lt=_INT64, description="0: no limit")
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, gt=0, le=10)
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    # ignored
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None
    service_tier: str | None = None
    prompt_cache_key: str | None = None
    safety_identifier: str | None = None
    # not supported: the values that ask for nothing
    frequency_penalty: float | None = Field(None, ge=0, le=0)
    presence_penalty: float | None = Field(None, ge=0, le=0)
    logit_bias: dict[str, Any] | None = Field(None, max_length=0)

    def sampling(self, limit: int) -> Sampling:
        """For replies of at most `limit` tokens. Raises `UserError` for a value that the engine refuses."""
        options = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        options["max_tokens"] = min(self.reply_tokens or limit, limit)
        if self.stop is not None:
            options["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Sampling(**{name: value for name, value in options.items() if value is not None})


class ChatRequest(SamplingFields):
    use_tool: ClassVar = True

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    # ignored
    parallel_tool_calls: bool | None = None
    # not supported: the values that ask for nothing
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    functions: list[Any] | None = Field(None, max_length=0)
    function_call: Literal["none", "auto"] | None = None
    response_format: TextFormat | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    verbosity: None = None
    web_search_options: None = None

    @property
    def conversation(self) -> dict[str, Any]:
        """In the format of `chat.py`, which checks the order of roles."""
        return {"messages": [message.as_message() for message in self.messages]}

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def reply_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens


class CompletionRequest(SamplingFields):
    use_tool: ClassVar = False

    prompt: Text | TokenIds | Annotated[list[Text], Prompts] | Annotated[list[TokenIds], Prompts] = Field(
        description="text, to which the begin-of-sequence token is added, or token ids, or a list of either"
    )
    max_tokens: Count | None = DEFAULT_COMPLETION_TOKENS
    num_logprobs: int | None = Field(None, alias="logprobs", ge=0, le=MAX_COMPLETION_LOGPROBS)
    # not supported: the values that ask for nothing
    best_of: int | None = Field(None, ge=1, le=1)
    echo: Literal[False] | None = None
    suffix: str | None = Field(None, max_length=0)

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)

    @property
    def reply_tokens(self) -> int | None:
        return self.max_tokens or DEFAULT_COMPLETION_TOKENS


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[Literal["cached_tokens"], int]


class ChatNote(BaseModel):
    """How many of the oldest messages did not fit, and how full the context is."""

    num_dropped_messages: int
    context: dict[Literal["used", "limit"], int]


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
    refusal: None = None
    nanochat: ReplyParts


class ChatChoice(BaseModel):
    index: int
    message: ReplyMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class AnswerHead(BaseModel):
    id: str
    created: int
    model: str
    system_fingerprint: str


class ChatCompletion(AnswerHead):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage
    nanochat: ChatNote


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: FinishReason | None = None


class Completion(AnswerHead):
    """A whole answer, and each chunk of a streamed one."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    """`nanochat` has sizes in tokens: the context, and the longest reply that a request may ask for."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["nanochat"] = "nanochat"
    nanochat: dict[Literal["context", "max_tokens"], int]


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    status: Literal["ok", "loading", "failed"]
    model: str
    message: str = Field(description="why the model cannot answer")
    active: int = Field(description="replies being generated")
    waiting: int = Field(description="replies waiting in the queue")


class ErrorBody(BaseModel):
    error: dict[Literal["message", "type", "param", "code"], str | None]
