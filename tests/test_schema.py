import pytest
from pydantic import ValidationError

from nanochat.common import UserError
from nanochat.engine.sampling import Sampling
from nanochat.serve.schema import ChatRequest, CompletionRequest, DetokenizeRequest, SamplingFields

USER = {"role": "user", "content": "Hello"}


def chat(**fields) -> ChatRequest:
    return ChatRequest.model_validate({"messages": [USER], **fields})


def test_an_empty_request_samples_as_openai_does():
    expected = Sampling(max_tokens=100, temperature=1.0, top_p=1.0, use_tool=True)
    assert chat().sampling(100) == expected
    nothing = dict.fromkeys(SamplingFields.model_fields)
    assert chat(**nothing).sampling(100) == expected  # null is as good as left out


def test_options_reach_the_sampling():
    given = {"temperature": 0.5, "top_k": 7, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.2, "seed": -3}
    options = chat(**given, max_tokens=9, stop=["a", "b"], logprobs=True, top_logprobs=4).sampling(100)
    assert options == Sampling(max_tokens=9, stop=("a", "b"), num_logprobs=4, **given)
    assert chat(stop="ab").sampling(100).stop == ("ab",)
    assert chat(max_completion_tokens=1000).sampling(100).max_tokens == 100
    assert chat(logprobs=True).sampling(100).num_logprobs == 0
    biased = chat(logit_bias={"7": 1.5, "0": -100}, frequency_penalty=1, presence_penalty=-2).sampling(100)
    assert biased == Sampling(
        max_tokens=100, logit_bias=((7, 1.5), (0, -100.0)), frequency_penalty=1.0, presence_penalty=-2.0
    )
    assert chat(top_k=-1).sampling(100).top_k is None
    assert chat(top_logprobs=3).sampling(100).num_logprobs is None


def test_completions_call_no_tool():
    request = CompletionRequest.model_validate({"prompt": "x", "logprobs": 2})
    assert request.sampling(100) == Sampling(max_tokens=16, num_logprobs=2, use_tool=False)
    assert request.sampling(4).max_tokens == 4
    scored = CompletionRequest.model_validate({"prompt": "x", "logprobs": 1, "echo": True, "max_tokens": 0})
    assert scored.sampling(4) == Sampling(max_tokens=0, num_logprobs=1, prompt_logprobs=True, use_tool=False)


def test_extreme_values_that_the_schema_takes_are_taken_by_the_sampling():
    for name, field in SamplingFields.model_fields.items():
        bounds = [getattr(m, kind) for m in field.metadata for kind in ("ge", "le") if hasattr(m, kind)]
        for value in bounds:
            chat(**{name: value}).sampling(100)
    for seed in (-(2**63), 2**63 - 1):
        chat(seed=seed).sampling(100)
    chat(repetition_penalty=0.01, top_k=2**62).sampling(100)
    with pytest.raises(UserError, match="repetition_penalty"):  # what only the engine refuses
        chat(repetition_penalty=1e-9).sampling(100)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (CompletionRequest, {"prompt": [""] * 5000}), (CompletionRequest, {"prompt": [[""] * 5000]}),
        (DetokenizeRequest, {"tokens": [""] * 5000}), (ChatRequest, {"messages": [USER], "modalities": [1] * 5000}),
        (ChatRequest, {"messages": [{"role": "user", "content": [{}] * 5000}]}),
        (ChatRequest, {"messages": [USER, {"role": "assistant", "content": [{}] * 5000}]}),
    ],
)  # fmt: skip
def test_a_long_list_of_faults_is_not_noted_one_by_one(kind, body):
    """With 350,000 of them, which is a request of 1 MiB, that held up all streams for seconds."""
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate(body)
    assert refusal.value.error_count() < 5


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("ab", ["ab"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_prompts_are_one_or_several_texts_or_token_lists(prompt, prompts):
    assert CompletionRequest.model_validate({"prompt": prompt}).prompts == prompts


def test_a_reply_sent_back_stands_by_its_parts_as_long_as_they_say_the_same():
    parts = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "Two"}]
    for content, expected in (("Two", parts), ("Three", "Three")):
        answer = {"role": "assistant", "content": content, "nanochat": {"parts": parts}, "refusal": None}
        request = ChatRequest.model_validate({"messages": [USER, answer, USER]})
        assert request.turns.messages[1]["content"] == expected


@pytest.mark.parametrize("value", ["1", True, [1.0], float("nan"), float("inf"), -0.1, 2.1])
def test_numbers_are_numbers_within_their_range(value):
    with pytest.raises(ValidationError):
        chat(temperature=value)
