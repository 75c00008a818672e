"""What goes over the wire: requests, checked field by field, and answers, in the format of OpenAI's API.

A request that asks for what cannot be done is refused; a field that changes nothing is ignored (see `messages.py`). Our
additions are sampling options (`top_k`, `min_p`, `repetition_penalty`), message parts of the types `python` and
`python_output`, and the objects named `nanochat`. A sampling option needs only a field in `SamplingFields` with the
name it has in `Sampling`. Not here: routes (`api.py`), errors in words (`errors.py`).
"""

from collections.abc import Iterator
from dataclasses import fields
from functools import cached_property
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, Field, model_validator

from nanochat.engine.sampling import MAX_BIAS, MAX_STOPS, Sampling
from nanochat.serve.errors import ApiError
from nanochat.serve.messages import Checked, Items, Messages, ReplyParts, Text, Turns, join_turns

MAX_STOP_CHARS = 256
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5  # in /v1/completions, as at OpenAI
MAX_PROMPTS = 64
MAX_BIASED_TOKENS = 1024
DEFAULT_COMPLETION_TOKENS = 16  # in /v1/completions, as at OpenAI
NO_FUNCTIONS = "the model calls no functions of its clients; leave this out"
NO_FORMS = "replies are text without a guaranteed form; leave this out, and describe the form in a message"
FORM_FIELDS = (  # of other servers, which guarantee one
    "guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs", "grammar", "json_schema",
)  # fmt: skip
_INT64 = 2**63

Stop = Annotated[Text, Field(min_length=1, max_length=MAX_STOP_CHARS)]
Count = Annotated[int, Field(ge=1)]
TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[Items[TokenId], Field(min_length=1)]
Prompts = Field(min_length=1, max_length=MAX_PROMPTS)
Bias = Annotated[float, Field(ge=-MAX_BIAS, le=MAX_BIAS)]
Biases = Annotated[dict[Annotated[str, Field(pattern=r"^\d{1,9}$")], Bias], Field(max_length=MAX_BIASED_TOKENS)]
FinishReason = Literal["stop", "length"]


class StreamOptions(Checked):
    include_usage: bool = False


class ResponseFormat(Checked):
    type: str


class SamplingFields(Checked):
    """What chat and completion requests have in common.

    Each of them also has `reply_tokens` (how long a reply may get, None: to the server's limit) and, as in `Sampling`,
    `use_tool`, `num_logprobs` and `prompt_logprobs`. Raises `ApiError` for what cannot be done as it was asked.
    """

    model: str | None = Field(None, description="the id from /v1/models; may be omitted")
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    n: Count | None = 1
    max_tokens: Count | None = Field(None, description="at most what fits the context")
    temperature: float | None = Field(1.0, ge=0, le=2, description="0: greedy decoding")
    top_p: float | None = Field(1.0, ge=0, le=1)
    top_k: int | None = Field(None, ge=-1, lt=_INT64, description="0 or -1: no limit")
    min_p: float | None = Field(0.0, ge=0, le=1)
    repetition_penalty: float | None = Field(1.0, gt=0, le=10)
    frequency_penalty: float | None = Field(0.0, ge=-2, le=2)
    presence_penalty: float | None = Field(0.0, ge=-2, le=2)
    logit_bias: Biases | None = Field(None, description="what is added to the logits of token ids")
    seed: int | None = Field(None, ge=-_INT64, lt=_INT64)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None

    @model_validator(mode="after")
    def _refuse(self) -> "SamplingFields":
        for name, advice in self.refused():
            raise ApiError(400, f"{name}: {advice}", param=name)
        return self

    def refused(self) -> Iterator[tuple[str, str]]:
        """Fields that ask for what this server cannot do, and what to do instead."""
        yield from ((name, NO_FORMS) for name in FORM_FIELDS if (self.model_extra or {}).get(name))

    def sampling(self, limit: int) -> Sampling:
        """For replies of at most `limit` tokens. Raises `UserError` for a value that the engine refuses."""
        options = {field.name: getattr(self, field.name) for field in fields(Sampling)}
        options["max_tokens"] = limit if self.reply_tokens is None else min(self.reply_tokens, limit)
        options["logit_bias"] = tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items())
        if self.top_k == -1:
            options["top_k"] = None
        if self.stop is not None:
            options["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        return Sampling(**{name: value for name, value in options.items() if value is not None})


class ChatRequest(SamplingFields):
    use_tool: ClassVar = True
    prompt_logprobs: ClassVar = False

    messages: Messages
    max_completion_tokens: Count | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=MAX_TOP_LOGPROBS)
    # not supported: taken with the values that ask for nothing
    tools: list[Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    functions: list[Any] | None = None
    function_call: str | dict[str, Any] | None = None
    response_format: ResponseFormat | None = None
    modalities: Items[str] | None = None
    audio: None = None
    web_search_options: None = None

    def refused(self) -> Iterator[tuple[str, str]]:
        yield from super().refused()
        for tools, choice in (("tools", "tool_choice"), ("functions", "function_call")):
            chosen = getattr(self, choice)
            if getattr(self, tools) and chosen != "none":
                yield tools, NO_FUNCTIONS
            if chosen not in (None, "none", "auto"):
                yield choice, NO_FUNCTIONS
        if self.response_format is not None and self.response_format.type != "text":
            yield "response_format", NO_FORMS
        if set(self.modalities or ()) - {"text"}:
            yield "modalities", 'replies are text; leave this out or send ["text"]'

    @cached_property
    def turns(self) -> Turns:
        return join_turns(self.messages)

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
    max_tokens: Annotated[int, Field(ge=0)] | None = DEFAULT_COMPLETION_TOKENS
    echo: bool | None = Field(False, description="begin the text with the prompt, and logprobs with its tokens")
    num_logprobs: int | None = Field(None, alias="logprobs", ge=0, le=MAX_COMPLETION_LOGPROBS)
    # not supported: taken with the values that ask for nothing
    best_of: Count | None = None
    suffix: str | None = None

    def refused(self) -> Iterator[tuple[str, str]]:
        yield from super().refused()
        if self.max_tokens == 0 and not self.echo:
            yield "max_tokens", "0 gives an answer with echo only"
        if self.best_of not in (None, self.n or 1):
            yield "best_of", "replies are not ranked; leave this out, and set n to get several"
        if self.suffix:
            yield "suffix", "the model goes on with a text and cannot fill a gap; leave this out"

    @property
    def prompts(self) -> list[str | list[int]]:
        prompt = self.prompt
        return [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else list(prompt)

    @property
    def reply_tokens(self) -> int | None:
        return DEFAULT_COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens

    @property
    def prompt_logprobs(self) -> bool:
        return bool(self.echo) and (self.num_logprobs is not None or self.max_tokens == 0)


class TokenizeRequest(Checked):
    """As at vLLM."""

    model: str | None = None
    prompt: Text | None = None
    messages: Messages | None = None
    add_special_tokens: bool = Field(True, description="begin a prompt with the begin-of-sequence token")
    add_generation_prompt: bool = Field(True, description="end messages as a chat request does, where a reply begins")
    return_token_strs: bool | None = False

    @model_validator(mode="after")
    def _has_one(self) -> "TokenizeRequest":
        if (self.prompt is None) == (self.messages is None):
            raise ApiError(400, "send either a prompt, which is a text, or messages", param="prompt")
        return self


class DetokenizeRequest(Checked):
    model: str | None = None
    tokens: Items[TokenId]


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    prompt: str


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
    """The first token of a prompt has no log probability."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
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


class ModelFacts(BaseModel):
    """Sizes in tokens: the context, and the longest reply that a request may ask for. `temperature` and `top_k` are the
    page's, `examples` questions that the model was trained to answer."""

    context: int
    max_tokens: int
    stage: str
    step: int
    parameters: int
    temperature: float
    top_k: int
    examples: list[str]


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["nanochat"] = "nanochat"
    nanochat: ModelFacts


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
