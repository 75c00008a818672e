"""Continuous batching against one sequence at a time through whole forward passes."""

import copy
import gc
import random
import weakref

import pytest
import torch

from nanochat.common import UserError
from nanochat.engine import slots
from nanochat.engine.engine import Engine
from nanochat.engine.sampling import Sampling, draw
from nanochat.model.gpt import GPTConfig, build_model
from tests.conftest import fill_randomly

T, WINDOW = 96, 24
GREEDY = {"temperature": 0.0, "use_tool": False}


def random_model(config, seed):
    model = build_model(config, generator=torch.Generator().manual_seed(seed))
    fill_randomly(model, scale=0.5)
    model.requires_grad_(False).smear_lambda.fill_(0.5)
    return model


@pytest.fixture(scope="module")
def model(tokenizer):
    config = GPTConfig.from_depth(2, vocab_size=tokenizer.vocab_size, sequence_len=T, head_dim=32)
    return random_model(config, seed=0)


ON_CUDA = pytest.param(
    "on CUDA",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
)


@pytest.fixture(params=["in step", "overlapped", "as on a GPU", ON_CUDA])
def engine(request, model, tokenizer):
    """The third one has the passes and the cache of a GPU, with its kernels in PyTorch's operations."""
    if request.param == "on CUDA":
        return Engine(copy.deepcopy(model).to("cuda"), tokenizer, max_rows=4)
    if request.param == "as on a GPU":
        gpu_model = request.getfixturevalue("plain_gpu_model")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("nanochat.engine.engine.InferenceModel", gpu_model)
            return Engine(model, tokenizer, max_rows=4, overlap=True)
    return Engine(model, tokenizer, max_rows=4, overlap=request.param != "in step")


def random_prompt(rng, length):
    return [rng.randrange(400) for _ in range(length)]


def naive(model, prompt, num_tokens):
    """Greedy continuation by whole forward passes."""
    ids = list(prompt)
    while len(ids) < len(prompt) + num_tokens and len(ids) <= T:
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def check_logprobs(model, prompt, completion):
    """Every token that was not forced has the log probability of a whole forward pass."""
    ids = [*prompt, *completion.ids]
    expected = model(torch.tensor([ids[:-1]]))[0].log_softmax(-1)
    for place, token in enumerate(completion.tokens, start=len(prompt)):
        if not token.is_forced:
            assert abs(token.logprob - expected[place - 1, token.id].item()) < 1e-4, place


def generate(engine, prompts, num_samples=1, **sampling):
    """Completions of prompts that nothing but their length ends."""
    return engine.generate(prompts, Sampling(**sampling), num_samples=num_samples, stop_ids=())


def submit(engine, prompt, num_samples=1, **sampling):
    return engine.submit(prompt, Sampling(**sampling), num_samples=num_samples, stop_ids=())


def drain(engine):
    events = []
    while engine.has_work:
        events += engine.step()
    return events


def test_greedy_replies_equal_whole_forward_passes_whatever_runs_beside(engine, model):
    rng = random.Random(0)
    prompts = [random_prompt(rng, length) for length in (1, 2, WINDOW - 1, WINDOW, WINDOW + 1, 50, 80, T - 1, T)]
    completions = generate(engine, prompts, max_tokens=20, **GREEDY)
    for prompt, (completion,) in zip(prompts, completions, strict=True):
        assert completion.ids == naive(model, prompt, 20)
        assert completion.finish_reason == "length"
    for length in (1, 90, T):  # prompt and reply have at most one token more than the context
        ((completion,),) = generate(engine, [[5] * length], max_tokens=500, **GREEDY)
        assert length + len(completion.ids) == T + 1


@pytest.mark.parametrize("seed", range(6))
def test_anything_that_happens_in_any_order_keeps_every_sequence_right(engine, model, tokenizer, monkeypatch, seed):
    """Random requests that begin alike, samples, tool calls, penalties and cancellations, all at once."""
    monkeypatch.setattr(slots, "MIN_SHARED_TOKENS", 2)
    rng = random.Random(seed)
    engine._prefill_tokens = rng.choice([5, 30, 300])
    engine.tool = lambda expression: str(len(expression))
    call = [tokenizer.special_ids["<|python_start|>"], tokenizer.special_ids["<|python_end|>"]]
    drawn = engine._drawn

    def drawn_with_calls(sequences, logits, ids):
        """Now and then a sequence calls the tool."""
        for row, sequence in enumerate(sequences):
            share = sequence.uniform() % 0.01
            if share < 0.003:
                ids[row] = call[share < 0.0015]
        return drawn(sequences, logits, ids)

    monkeypatch.setattr(engine, "_drawn", drawn_with_calls)
    beginnings = [random_prompt(rng, length) for length in (4, 20, 45)]
    requests, cancelled, num_events = [], [], 0
    while len(requests) < 25 or engine.has_work:
        if len(requests) < 25 and rng.random() < 0.3:
            earlier = rng.choice(requests) if requests and rng.random() < 0.3 else None
            prompt = rng.choice(beginnings) if earlier is None else [*earlier.prompt, *earlier.completions[0].ids]
            prompt = [*prompt, *random_prompt(rng, rng.randrange(1, 20))][:T]
            sampling = Sampling(
                max_tokens=rng.randrange(1, 40), temperature=rng.choice([0.0, 1.0]), num_logprobs=0,
                repetition_penalty=rng.choice([1.0, 1.0, 1.3]),
            )  # fmt: skip
            requests.append(engine.submit(prompt, sampling, num_samples=rng.choice([1, 1, 3, 6])))
        elif requests and rng.random() < 0.03:
            cancelled.append(rng.choice(requests))
            engine.cancel(cancelled[-1])
        for event in engine.step():
            num_events += 1
            assert event.request not in cancelled
    done = [request for request in requests if request not in cancelled]
    assert all(request.is_done for request in done)
    completions = [completion for request in done for completion in request.completions]
    assert any(token.is_forced for completion in completions for token in completion.tokens)
    assert engine.stats.reused_tokens > 0
    assert num_events > 100
    assert engine.num_active == engine.num_waiting == 0
    for request in done:
        for completion in request.completions:
            check_logprobs(model, request.prompt, completion)


@pytest.mark.parametrize(("num_samples", "least_different"), [(3, 2), (4, 2), (40, 11)])
def test_samples_of_one_prompt_read_it_once_and_draw_their_first_tokens_independently(
    engine, num_samples, least_different
):
    ((*completions,),) = generate(engine, [random_prompt(random.Random(2), 60)], num_samples, max_tokens=4, seed=1)
    assert len(completions) == num_samples
    assert engine.stats.prefill_tokens == 60
    assert len({completion.ids[0] for completion in completions}) >= least_different


def test_prompts_are_read_together_up_to_the_budget_of_a_step(engine, model):
    rng = random.Random(12)
    engine._prefill_tokens, passes = 50, []
    read = engine.model.read
    engine.model.read = lambda pieces: passes.append([len(piece.ids) for piece in pieces]) or read(pieces)
    prompts = [random_prompt(rng, 20) for _ in range(4)]
    completions = generate(engine, prompts, max_tokens=6, **GREEDY)
    assert passes == [[20, 20, 10], [10, 20]]
    assert [c.ids for (c,) in completions] == [naive(model, prompt, 6) for prompt in prompts]


@pytest.mark.parametrize("shared", [17, 20])
def test_prompts_that_begin_alike_share_although_they_come_together(engine, shared):
    """Where the first has left its beginning behind in the windows, the second keeps it for the others."""
    rng = random.Random(13)
    system = random_prompt(rng, shared)
    generate(engine, [[*system, *random_prompt(rng, 5)] for _ in range(4)], max_tokens=2)
    num_whole = 1 if engine.model.cache.can_go_back(shared + 5, shared) else 2
    assert engine.stats.prefill_tokens == 4 * 5 + num_whole * shared


def test_the_next_turn_reads_only_what_is_new(engine, model):
    prompt = random_prompt(random.Random(3), 40)
    ((first,),) = generate(engine, [prompt], max_tokens=10, **GREEDY)
    before = engine.stats.prefill_tokens
    second = [*prompt, *first.ids, 7, 8, 9]
    request = submit(engine, second, max_tokens=5, **GREEDY)
    drain(engine)
    assert engine.stats.prefill_tokens - before <= 4
    assert request.num_reused >= 49
    assert request.completions[0].ids == naive(model, second, 5)


def test_a_common_beginning_is_kept_though_its_windows_were_overwritten(engine, model):
    rng = random.Random(4)
    system = random_prompt(rng, WINDOW + 10)
    reused = []
    for _ in range(4):
        prompt = [*system, *random_prompt(rng, 40)]
        request = submit(engine, prompt, max_tokens=4, **GREEDY)
        drain(engine)
        assert request.completions[0].ids == naive(model, prompt, 4)
        reused.append(request.num_reused)
    assert reused == [0, 0, len(system), len(system)]  # the second finds out, and keeps it


def test_a_seed_gives_the_same_tokens_whatever_runs_beside(engine):
    rng = random.Random(5)
    prompt, crowd = random_prompt(rng, 10), [random_prompt(rng, 20) for _ in range(5)]
    runs = (([prompt], 7), ([*crowd, prompt], 7), ([prompt], 8))
    alone, among_others, other_seed = (
        generate(engine, prompts, max_tokens=12, seed=seed, top_k=50)[-1][0].ids for prompts, seed in runs
    )
    assert alone == among_others != other_seed


def test_log_probabilities_are_the_models_own_whatever_the_sampling(engine, model):
    sampling = {"temperature": 0.3, "top_k": 3, "repetition_penalty": 1.5, "num_logprobs": 2, "seed": 0}
    ((completion,),) = generate(engine, [[1, 2, 3]], max_tokens=8, **sampling)
    check_logprobs(model, [1, 2, 3], completion)
    for token in completion.tokens:
        (_, best), (_, second) = token.top
        assert best >= max(second, token.logprob)


def test_a_repetition_penalty_keeps_tokens_from_coming_again(engine):
    ((completion,),) = generate(engine, [[1, 2, 3]], max_tokens=40, repetition_penalty=100.0, **GREEDY)
    assert len(set(completion.ids)) > 30


def test_a_bias_forces_or_forbids_tokens_and_a_frequency_penalty_spreads_them(engine):
    ((forced,),) = generate(engine, [[1, 2, 3]], max_tokens=5, logit_bias=((77, 100.0),), **GREEDY)
    assert forced.ids == [77] * 5
    ((plain,),) = generate(engine, [[1, 2, 3]], max_tokens=20, **GREEDY)
    banned = tuple((token, -100.0) for token in set(plain.ids))
    ((other,),) = generate(engine, [[1, 2, 3]], max_tokens=20, logit_bias=banned, **GREEDY)
    assert not set(other.ids) & set(plain.ids)
    sampled = {"max_tokens": 60, "seed": 0, "use_tool": False, "logit_bias": tuple((i, 5.0) for i in range(5))}
    ((often,),), ((seldom,),) = (generate(engine, [[9]], frequency_penalty=f, **sampled) for f in (0.0, 2.0))
    assert len(set(seldom.ids)) > len(set(often.ids))
    with pytest.raises(UserError, match="logit_bias has token ids outside"):
        engine.submit([1], Sampling(logit_bias=((10**6, 1.0),)))


@pytest.mark.parametrize("num_samples", [1, 3])
def test_a_prompt_s_log_probabilities_are_those_of_a_whole_forward_pass(engine, model, num_samples):
    """Also in pieces, of prompts that the cache knows already, and beside prompts that share it."""
    rng = random.Random(3)
    engine._prefill_tokens = 25
    prompts = [random_prompt(rng, length) for length in (1, 2, 40, 90)]
    generate(engine, prompts, max_tokens=1)
    for settings in ({"max_tokens": 0}, {"max_tokens": 2, "num_logprobs": 3}):
        sampling = Sampling(prompt_logprobs=True, **GREEDY, **settings)
        requests = [engine.submit(prompt, sampling, num_samples=num_samples) for prompt in prompts * 2]
        requests.append(engine.submit(prompts[2], Sampling(max_tokens=3, **GREEDY)))
        drain(engine)
        for request in requests[:-1]:
            assert [token.id for token in request.scored] == request.prompt
            expected = model(torch.tensor([request.prompt]))[0].log_softmax(-1)
            assert request.scored[0].logprob is None
            for row, token in zip(expected, request.scored[1:], strict=False):
                assert abs(token.logprob - row[token.id].item()) < 1e-4
                assert [id_ for id_, _ in token.top] == row.topk(settings.get("num_logprobs", 0)).indices.tolist()
            whole = naive(model, request.prompt, settings["max_tokens"])
            assert {(tuple(c.ids), c.finish_reason) for c in request.completions} == {(tuple(whole), "length")}
        assert not requests[-1].scored
        assert requests[-1].completions[0].ids == naive(model, prompts[2], 3)


class ScriptedModel:
    """Stands in for `InferenceModel`: after the token at position p comes `script[p + 1]`."""

    device = torch.device("cpu")

    def __init__(self, cache, script, vocab_size):
        self.cache, self.script, self.vocab_size = cache, script, vocab_size
        self.seen: dict[int, int] = {}  # token by position

    def read(self, pieces):
        for piece in pieces:
            self.seen.update(enumerate(piece.ids, piece.start))

    def logits_of_last(self, pieces, _):
        return self.logits([piece.start + len(piece.ids) - 1 for piece in pieces])

    def logits(self, positions):
        ids = torch.tensor([self.script[position + 1] for position in positions])
        return torch.nn.functional.one_hot(ids, self.vocab_size).float() * 10

    def decode_and_draw(self, idx, previous, positions, drawing):
        self.seen.update(zip(positions, idx.tolist(), strict=True))
        logits = self.logits(positions)
        return logits, draw(logits, drawing.columns, drawing.kind)


@pytest.fixture
def scripted(engine, tokenizer):
    """Runs an engine on a reply written beforehand: texts, special tokens by name, None where the tool writes."""

    def run(*pieces, **sampling):
        ids, special = [], tokenizer.special_ids
        for piece in pieces:
            ids += [0] * 3 if piece is None else [special[piece]] if piece in special else tokenizer.encode(piece)
        engine.model = ScriptedModel(engine.model.cache, [1, 2, *ids, *[3] * T], tokenizer.vocab_size)
        request = engine.submit([1, 2], Sampling(**{"temperature": 0.0, "max_tokens": 60, **sampling}))
        return request, drain(engine)

    return run


def spoken(events):
    return "".join(delta.text for event in events for delta in event.deltas if delta.type == "text")


@pytest.mark.parametrize(
    ("text", "sampling"),
    [
        ("river stone", {}),
        ("river stone", {"stop": ("stones", "neck")}),  # what only might have been a stop text comes out
        ("😀 東京 naïve 👩‍👩‍👧", {"max_tokens": 90}),  # characters of many tokens come out whole
    ],
)
def test_the_end_of_the_turn_ends_the_reply_and_is_not_part_of_it(scripted, text, sampling):
    request, events = scripted(text, "<|assistant_end|>", **sampling)
    assert request.completions[0].text == spoken(events) == text
    assert events[-1].finish_reason == request.completions[0].finish_reason == "stop"
    assert all(event.finish_reason is None for event in events[:-1])
    assert all("\ufffd" not in delta.text for event in events for delta in event.deltas)


def test_a_tool_call_is_answered_by_forced_tokens(scripted, engine, tokenizer):
    engine.tool = lambda expression: "7" if expression == "3+4" else None
    call = ("<|python_start|>", "3+4", "<|python_end|>")
    request, _ = scripted("so: ", *call, None, "river", "<|assistant_end|>")
    (completion,) = request.completions
    parts = [("text", "so: "), ("python", "3+4"), ("python_output", "7"), ("text", "river")]
    assert [(part["type"], part["text"]) for part in completion.parts] == parts
    forced = tokenizer.decode([token.id for token in completion.tokens if token.is_forced])
    assert forced == "<|output_start|>7<|output_end|>"
    ids = [*request.prompt, *completion.ids]
    assert [engine.model.seen[position] for position in range(len(ids))] == ids


CALL = ("<|python_start|>", "1+1", "<|python_end|>")


def test_what_the_tool_refuses_is_answered_by_an_error(scripted, engine):
    engine.tool = lambda expression: None
    request, _ = scripted(*CALL, "<|assistant_end|>")
    assert {"type": "python_output", "text": "error"} in request.completions[0].parts


def test_without_the_tool_a_call_is_only_text_between_its_tokens(scripted, engine):
    engine.tool = None
    request, _ = scripted(*CALL, "<|assistant_end|>", use_tool=False)
    assert request.completions[0].parts == [{"type": "python", "text": "1+1"}]


def test_only_the_tool_writes_tool_answers_and_no_more_tokens_than_asked_for(scripted, engine):
    request, _ = scripted("<|output_start|>", "5", "<|output_end|>", max_tokens=3)
    assert [part["type"] for part in request.completions[0].parts] in ([], ["text"])
    engine.tool = lambda expression: "river " * 100
    (completion,) = scripted(*CALL, max_tokens=9)[0].completions
    assert (len(completion.ids), completion.finish_reason) == (9, "length")


@pytest.mark.parametrize("stop", ["stone cl", "one", "ud gar", " ", "d"])
def test_a_stop_text_ends_the_reply_wherever_tokens_divide_it(scripted, stop):
    text = "river stone cloud garden"
    request, events = scripted(text, stop=(stop, "never comes"))
    assert request.completions[0].text == spoken(events) == text[: text.index(stop)]
    assert request.completions[0].finish_reason == "stop"


def test_a_request_that_comes_later_begins_before_the_others_end(engine):
    first = [submit(engine, [1, 2, 3], max_tokens=50, seed=i) for i in range(2)]
    for _ in range(5):
        engine.step()
    late = submit(engine, [4, 5, 6], max_tokens=3, seed=9)
    order = [event.request for event in drain(engine) if event.finish_reason]
    assert order[0] is late
    assert all(len(request.completions[0].ids) == 50 for request in first)


def test_a_long_prompt_does_not_hold_up_those_that_decode(engine):
    engine._prefill_tokens = 10
    short = submit(engine, [1, 2, 3], max_tokens=50, seed=0)
    engine.step()
    submit(engine, random_prompt(random.Random(6), 80), max_tokens=2)
    for _ in range(6):
        before = len(short.completions[0].ids)
        engine.step()
        assert len(short.completions[0].ids) == before + 1


def test_cancelling_frees_the_rows_at_once_also_during_prefill(engine):
    requests = [submit(engine, [1, 2, 3, i], 2, max_tokens=80) for i in range(5)]
    engine.step()
    assert engine.num_active == 4
    for request in requests:
        engine.cancel(request)
    assert engine.num_active == engine.num_waiting == 0
    assert drain(engine) == []
    engine._prefill_tokens = 10
    request = submit(engine, random_prompt(random.Random(7), 80), max_tokens=2)
    engine.step()
    assert engine.num_active == 1
    engine.cancel(request)
    assert not engine.has_work


def test_requests_that_cannot_be_are_refused(engine):
    mistakes = [([], 1, "has 0 tokens"), ([1] * (T + 1), 1, f"has {T + 1} tokens"), ([10**6], 1, "outside")]
    for prompt, num_samples, fault in [*mistakes, ([1], 0, "at least 1, not 0")]:
        with pytest.raises(UserError, match=fault):
            engine.submit(prompt, Sampling(), num_samples=num_samples)
    with pytest.raises(UserError, match="at least 1 row"):
        Engine(None, None, max_rows=0)
    assert not engine.has_work


def test_generate_reports_each_request_when_it_is_done(engine):
    seen = []
    engine.generate([[1], [2], [3]], Sampling(max_tokens=2), num_samples=2, stop_ids=(), progress=seen.append)
    assert len(seen) == len({id(request) for request in seen}) == 3


def test_an_engine_that_is_dropped_is_freed_without_the_garbage_collector(
    model, tokenizer, plain_gpu_model, monkeypatch
):
    """Its cache can be gigabytes, and finetuning makes an engine for each evaluation."""

    def record(run):  # as a CUDA graph does, it keeps the result, not what it ran
        result = run()
        return lambda: result

    with monkeypatch.context() as patch:
        patch.setattr("nanochat.engine.engine.InferenceModel", plain_gpu_model)
        engine = Engine(model, tokenizer, max_rows=2, overlap=True)
    engine.model._graphs._record = record
    engine.generate([[1, 2], [3]], Sampling(max_tokens=3, num_logprobs=1), num_samples=2)
    assert engine.model._graphs._ready
    cache = weakref.ref(engine.model.cache)
    gc.disable()
    try:
        del engine
        assert cache() is None
    finally:
        gc.enable()


def test_refreshing_weights_forgets_what_was_cached(model, tokenizer):
    other = random_model(model.config, seed=5)
    engine = Engine(model, tokenizer, max_rows=2)
    prompt = random_prompt(random.Random(8), 40)
    generate(engine, [prompt], max_tokens=3, **GREEDY)
    engine.refresh(other)
    ((completion,),) = generate(engine, [prompt], max_tokens=5, **GREEDY)
    assert completion.ids == naive(other, prompt, 5)
