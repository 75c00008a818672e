"""Chat tasks: prompts by hand, the fast paths against the plain ones, stopping and going on, ranks."""

import random
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import WORDS, fill_randomly
from ranks import run_ranks

from nanochat.common import UserError
from nanochat.data.chat import visible_text
from nanochat.engine.engine import Engine
from nanochat.evals import chat_eval
from nanochat.evals.chat_eval import (
    EvalSettings,
    check_task,
    complete_plainly,
    evaluate_task,
    fit_prompt,
    fit_text,
    letter_ids,
)
from nanochat.evals.chat_results import ResultLog
from nanochat.model.gpt import GPTConfig, build_model
from nanochat.tokenizer import Tokenizer
from tasks.common import Task, choice_conversation, text_problem

CONTEXT_TOKENS = 96
GREEDY = EvalSettings(max_new_tokens=8)
DRAWN = EvalSettings(max_new_tokens=8, temperature=1.0, num_samples=3, seed=5)


class Quiz(Task):
    """Questions of any length, some longer than the context, with two to five choices."""

    kind = "categorical"
    baseline = 0.25

    def __init__(self, name="Quiz", count=24):
        self.name, self.count = name, count

    def __len__(self):
        return self.count

    def conversation(self, index):
        rng = random.Random(index)
        letters = "ABCDE"[: rng.randint(2, 5)]
        question = " ".join(rng.choices(WORDS, k=rng.randint(1, 70)))
        return choice_conversation(question, rng.choices(WORDS, k=len(letters)), letters, rng.choice(letters))


class Echo(Task):
    """Words to repeat; any answer with an even number of characters will do, and some are called short."""

    kind = "generative"
    name = "Echo"

    def __len__(self):
        return 13

    def conversation(self, index):
        rng = random.Random(index)
        text = " ".join(rng.choices(WORDS, k=rng.choice([1, 5, 80])))
        return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "ab"}]}

    def evaluate(self, conversation, completion):
        return len(visible_text(completion)) % 2 == 0

    def score(self, conversation, completion):
        return {"short": float(len(visible_text(completion)) < 20)}


class TextQuiz(Task):
    """Multiple choice in plain text, with up to three worked examples, which do not always fit."""

    kind = "categorical"
    name = "TextQuiz"
    is_text = by_length = True
    num_shots = 3

    def __len__(self):
        return 24

    def conversation(self, index):
        rng = random.Random(index)
        draw = lambda most: " ".join(rng.choices(WORDS, k=rng.randint(1, most)))  # noqa: E731
        letters = "ABCDE"[: rng.randint(2, 5)]
        shots = [f"Q: {draw(25)}\nA: {draw(3)}\n\n" for _ in range(3)]
        options = [f" {draw(4)}" for _ in letters]
        question = f"Q: {draw(100 if index == 5 else 15)}\nA:"
        return text_problem(question, rng.choice(letters), shots=shots, letters=tuple(letters), options=options)


class TextEcho(Echo):
    """As `Echo`, in plain text, up to a letter that turns up soon."""

    name = "TextEcho"
    is_text = True
    num_shots = 1
    stops = ("e", "\n\n")

    def conversation(self, index):
        text = super().conversation(index)["messages"][0]["content"]
        return text_problem(text, "ab", intro="Words.\n", shots=["stone river\n"])


def make_model(tokenizer):
    config = GPTConfig.from_depth(
        3, vocab_size=tokenizer.vocab_size, sequence_len=CONTEXT_TOKENS, head_dim=32, kv_ratio=2
    )
    model = build_model(config, generator=torch.Generator().manual_seed(0)).eval().requires_grad_(False)
    fill_randomly(model)
    return model


@pytest.fixture
def model(tokenizer):
    return make_model(tokenizer)


@pytest.fixture
def engine(model, tokenizer):
    return Engine(model, tokenizer, max_rows=4)


def outputs(result):
    """What was answered and how it was judged, without the logits' last digits."""
    return [(item.index, item.prompt, item.is_cut, item.seed, item.samples) for item in result.items]


def question(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]}


def test_a_prompt_that_fits_is_whole_and_one_that_is_too_long_loses_its_beginning(tokenizer):
    special, text = tokenizer.special_ids, "one two three four five six seven"
    marks = [special["<|bos|>"], special["<|user_start|>"]], [special["<|user_end|>"], special["<|assistant_start|>"]]
    whole = [*marks[0], *tokenizer.encode(text), *marks[1]]
    assert fit_prompt(tokenizer, question(text), 100) == fit_prompt(tokenizer, question(text), len(whole))
    assert fit_prompt(tokenizer, question(text), 100) == (whole, False)
    assert fit_prompt(tokenizer, question(text), len(whole) - 3) == (whole[:2] + whole[5:], True)


def test_a_conversation_that_is_too_long_loses_its_oldest_question(tokenizer):
    first = [{"role": "user", "content": "summer garden"}, {"role": "assistant", "content": "music"}]
    conversation = {"messages": first + question("stone")["messages"]}
    whole, _ = fit_prompt(tokenizer, conversation, 100)
    last, _ = fit_prompt(tokenizer, question("stone"), 100)
    assert fit_prompt(tokenizer, conversation, len(whole) - 1) == (last, True)


def test_a_text_has_the_first_worked_examples_that_fit_with_its_longest_choice(tokenizer):
    problem = text_problem("why?", "A", intro="Do.", shots=["one ", "two "], letters="AB", options=[" a", " b c d"])
    texts = ["Do.why?", "Do.one why?", "Do.one two why?"]
    prompts = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts]
    rooms = [len(prompt) + len(tokenizer.encode(" b c d")) for prompt in prompts]
    assert rooms == sorted(set(rooms))
    for count in range(3):
        assert fit_text(tokenizer, problem, rooms[count]) == (prompts[count], count, False)
    assert fit_text(tokenizer, problem, rooms[1] - 1) == (prompts[0], 0, False)
    assert fit_text(tokenizer, problem, rooms[0] - 2) == (prompts[0][:1] + prompts[0][3:], 0, True)


def test_the_choice_in_a_text_is_the_likeliest_one_per_character(model, tokenizer):
    result = evaluate_task(TextQuiz(), model, tokenizer, EvalSettings())
    for item in (item for item in result.items if not item.is_cut):
        problem = TextQuiz()[item.index]
        prompt = "".join((*problem["shots"][: item.num_shots], problem["messages"][0]["content"]))
        assert item.prompt == f"<|bos|>{prompt}"
        sums = []
        for option in problem["options"]:
            ids = torch.tensor([[tokenizer.bos_id, *tokenizer.encode(prompt + option)]])
            losses = torch.log_softmax(model(ids[:, :-1])[0], dim=-1)[range(ids.size(1) - 1), ids[0, 1:]]
            sums.append(losses[len(tokenizer.encode(prompt)) :].sum().item())
        assert list(item.logits.values()) == pytest.approx(sums, abs=1e-3)
        likeliest = problem["letters"][max(range(len(sums)), key=sums.__getitem__)]
        rates = [value / (len(option) - 1) for value, option in zip(sums, problem["options"], strict=True)]
        best = problem["letters"][max(range(len(sums)), key=rates.__getitem__)]
        expected = {"acc": likeliest == item.expected, "acc_norm": best == item.expected}
        assert (item.samples[0].output, item.samples[0].scores) == (best, expected)
    assert result.num_cut == 1
    assert {0, 2, 3} <= set(result.given_shots)
    assert result.scores["acc"] != result.scores["acc_norm"] == result.accuracy


def test_a_written_text_ends_before_a_stop_on_both_paths_and_calls_no_tool(model, tokenizer, engine):
    fast = evaluate_task(TextEcho(), model, tokenizer, GREEDY, engine=engine)
    slow = evaluate_task(TextEcho(), model, tokenizer, replace(GREEDY, slow=True))
    assert outputs(fast) == outputs(slow)
    samples = [sample for item in fast.items for sample in item.samples]
    assert not any(stop in visible_text(sample.output) for sample in samples for stop in TextEcho.stops)
    assert {sample.finish_reason for sample in samples} == {"stop", "length"}
    special = tokenizer.special_ids
    call = [special["<|python_start|>"], *tokenizer.encode("6*7"), special["<|python_end|>"]]
    said = Script(tokenizer, [*call, *tokenizer.encode("river\n\nstone")])
    completion = complete_plainly(said, tokenizer, [1], max_tokens=50, stop=("\n\n",), use_tool=False)
    assert visible_text(completion.parts) == "river"
    assert not any(token.is_forced for token in completion.tokens)


def test_a_written_answer_has_room_for_its_tokens_or_half_of_the_context():
    assert chat_eval.prompt_budget("categorical", 64, 48) == 64
    rooms = [chat_eval.prompt_budget("generative", *sizes) for sizes in ((64, 16), (64, 48), (65, 1000))]
    assert rooms == [48, 32, 33]


def test_problems_of_a_small_number_are_among_those_of_a_larger_one():
    for count in (0, 5, 9):
        assert chat_eval.choose_problems(5, count) == (0, 1, 2, 3, 4)
    few, more = chat_eval.choose_problems(100, 10), chat_eval.choose_problems(100, 30)
    assert (len(few), len(more)) == (10, 30)
    assert set(few) < set(more)
    assert list(more) == sorted(more)
    assert max(more) > 60  # not the first ones: data sets are ordered by subject


def test_letters_are_the_tokens_an_answer_begins_with(tokenizer):
    assert letter_ids(tokenizer, "ABCD") == [tokenizer.encode(letter)[0] for letter in "ABCD"]
    assert letter_ids(tokenizer, ["12", "345"]) == [tokenizer.encode("12")[0], tokenizer.encode("345")[0]]
    with pytest.raises(UserError, match="cannot be told apart"):
        letter_ids(tokenizer, ["A", "B", "A"])


@pytest.mark.parametrize(("task", "batch_tokens"), [(Quiz(), 200), (Quiz(), 100000), (TextQuiz(), 200)])
def test_the_fast_path_chooses_letter_by_letter_what_the_plain_one_does(
    model, tokenizer, monkeypatch, task, batch_tokens
):
    monkeypatch.setattr("nanochat.evals.scoring.CPU_BATCH_TOKENS", batch_tokens)
    fast = evaluate_task(task, model, tokenizer, EvalSettings())
    slow = evaluate_task(task, model, tokenizer, EvalSettings(slow=True))
    assert outputs(fast) == outputs(slow)
    for ours, plain in zip(fast.items, slow.items, strict=True):
        assert ours.logits == pytest.approx(plain.logits, abs=1e-3 if task.is_text else 1e-4)
        assert task.is_text or ours.samples[0].output == max(plain.logits, key=plain.logits.get)
    assert 0 < fast.num_cut < len(fast.items)
    assert 0 < fast.accuracy.value < 1


def test_written_answers_are_those_of_the_plain_loop(model, tokenizer, engine):
    fast = evaluate_task(Echo(), model, tokenizer, GREEDY, engine=engine)
    slow = evaluate_task(Echo(), model, tokenizer, replace(GREEDY, slow=True))
    assert outputs(fast) == outputs(slow)
    assert 0 < fast.num_cut < len(fast.items)
    assert 0 < fast.accuracy.value < 1
    assert fast.scores == slow.scores


class Script:
    """A model that says one token after the other, whatever stands before."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, ids, sequence_len=64):
        self.config = SimpleNamespace(sequence_len=sequence_len, vocab_size=tokenizer.vocab_size)
        self.ids = iter(ids)

    def __call__(self, idx):
        return torch.nn.functional.one_hot(torch.tensor([[next(self.ids)]]), self.config.vocab_size).float()


def test_the_plain_loop_answers_tool_calls_and_ends_with_the_turn(tokenizer):
    special = tokenizer.special_ids
    call, refused = (
        [special["<|python_start|>"], *tokenizer.encode(text), special["<|python_end|>"]] for text in ("6*7", "six")
    )
    said = [*tokenizer.encode("It is "), *call, *tokenizer.encode("42."), *refused, special["<|assistant_end|>"]]
    completion = complete_plainly(Script(tokenizer, said), tokenizer, [1, 2, 3], max_tokens=50)
    kinds = ["text", "python", "python_output", "text", "python", "python_output"]
    texts = ["It is ", "6*7", "42", "42.", "six", "error"]
    assert completion.parts == [{"type": t, "text": text} for t, text in zip(kinds, texts, strict=True)]
    assert completion.finish_reason == "stop"
    forced = [token.id for token in completion.tokens if token.is_forced]
    assert tokenizer.decode(forced) == "<|output_start|>42<|output_end|><|output_start|>error<|output_end|>"


@pytest.mark.parametrize(("context", "max_tokens", "expected"), [(64, 3, 3), (6, 30, 5)])
def test_the_plain_loop_stops_for_want_of_tokens_and_of_context(tokenizer, context, max_tokens, expected):
    said = tokenizer.encode("river stone river stone river stone river stone")
    completion = complete_plainly(Script(tokenizer, said, context), tokenizer, [1, 2], max_tokens=max_tokens)
    assert (completion.ids, completion.finish_reason) == (said[:expected], "length")


def test_samples_depend_on_the_seed_and_on_nothing_that_runs_beside(model, tokenizer, engine):
    result = evaluate_task(Echo(), model, tokenizer, DRAWN, engine=engine)
    alone = evaluate_task(Echo(), model, tokenizer, DRAWN, engine=Engine(model, tokenizer, max_rows=1))
    few = evaluate_task(Echo(), model, tokenizer, replace(DRAWN, max_problems=6), engine=engine)
    other = evaluate_task(Echo(), model, tokenizer, replace(DRAWN, seed=6), engine=engine)
    assert outputs(result) == outputs(alone) != outputs(other)
    assert set(map(repr, outputs(few))) < set(map(repr, outputs(result)))
    assert all(item.seed == chat_eval.problem_seed(5, item.index) for item in result.items)
    assert any(len({str(sample.output) for sample in item.samples}) == 3 for item in result.items)
    verdicts = [[sample.is_correct for sample in item.samples] for item in result.items]
    assert result.accuracy.value == pytest.approx(sum(map(sum, verdicts)) / (3 * len(verdicts)))
    assert result.pass_at_k.value == pytest.approx(sum(map(any, verdicts)) / len(verdicts))
    assert result.pass_at_k.value > result.accuracy.value


class Stopped(Exception):
    pass


def stop_after(count):
    def progress(items, total):
        for done, item in enumerate(items, start=1):
            yield item
            if done == count:
                raise Stopped

    return progress


@pytest.mark.parametrize(
    ("make_task", "settings"),
    [(Quiz, EvalSettings()), (TextQuiz, EvalSettings()), (Echo, GREEDY), (Echo, DRAWN), (TextEcho, DRAWN)],
)
def test_a_run_stopped_again_and_again_ends_as_one_never_interrupted(
    model, tokenizer, engine, tmp_path, monkeypatch, make_task, settings
):
    monkeypatch.setattr("nanochat.evals.chat_eval.GRADE_PROBLEMS", 4)
    monkeypatch.setattr("nanochat.evals.scoring.CPU_BATCH_TOKENS", 100)
    logs = {name: ResultLog(tmp_path / f"{name}.jsonl", {}) for name in ("whole", "parts")}
    evaluate = partial(evaluate_task, make_task(), model, tokenizer, settings, engine=engine)
    whole = evaluate(log=logs["whole"])
    for count in (1, 5):
        with pytest.raises(Stopped):
            evaluate(log=logs["parts"], progress=stop_after(count))
        assert not engine.has_work
    result = evaluate(log=logs["parts"])
    assert outputs(result) == outputs(whole)
    assert result.accuracy == whole.accuracy
    assert (result.num_earlier, whole.num_earlier) == (6, 0)
    assert sorted(path.name for path in tmp_path.glob("*.jsonl")) == ["parts.jsonl", "whole.jsonl"]
    if make_task is Echo:
        assert (tmp_path / "parts.jsonl").read_text() == (tmp_path / "whole.jsonl").read_text()


def test_a_finished_run_is_extended_by_more_problems(model, tokenizer, tmp_path):
    log = ResultLog(tmp_path / "Quiz.jsonl", {})
    for count, num_earlier in ((10, 0), (15, 10), (5, 5)):
        result = evaluate_task(Quiz(), model, tokenizer, EvalSettings(max_problems=count), log=log)
        assert (result.num_earlier, len(result.items)) == (num_earlier, count)
    assert len(log.recover()) == 15


RANK_RUNS = [(Quiz(), EvalSettings()), (Echo(), DRAWN), (Quiz("One", 1), EvalSettings())]


def evaluate_on_rank(rank, world_size, folder):
    tokenizer = Tokenizer.load(folder / "tokenizer")
    model = make_model(tokenizer)
    options, totals = {"engine": Engine(model, tokenizer, max_rows=4)}, []

    def note_total(items, total):
        totals.append(total)
        return items

    def run(task, settings, **log_settings):
        log = ResultLog(folder / f"{task.name}.jsonl", log_settings)
        return evaluate_task(task, model, tokenizer, settings, log=log, progress=note_total, **options)

    results = [run(*case) for case in RANK_RUNS]
    try:
        run(Quiz(), GREEDY, x=1)
    except UserError as error:
        return results, totals, str(error)


def test_two_ranks_have_the_results_of_one_and_go_on_where_one_stopped(model, tokenizer, engine, tmp_path, monkeypatch):
    monkeypatch.setattr("nanochat.evals.scoring.CPU_BATCH_TOKENS", 100)
    tokenizer.save(tmp_path / "tokenizer")
    log = ResultLog(tmp_path / "Quiz.jsonl", {})
    with pytest.raises(Stopped):
        evaluate_task(Quiz(), model, tokenizer, EvalSettings(), log=log, progress=stop_after(7))
    expected = [evaluate_task(task, model, tokenizer, settings, engine=engine) for task, settings in RANK_RUNS]
    ended = run_ranks(evaluate_on_rank, 2, tmp_path / "ranks", tmp_path)
    for results, _, refusal in ended:
        assert list(map(outputs, results)) == list(map(outputs, expected))
        assert results[0].num_earlier == 7
        assert "without --resume" in refusal
    assert [totals for _, totals, _ in ended] == [[9, 7, 1], [8, 6, 0]]  # of 17 that are left, 13 and 1 problems
    assert len(ResultLog(tmp_path / "Echo.jsonl", {}).recover()) == 13
    assert not list(tmp_path.glob("*.part*"))


def test_a_logit_that_is_no_number_is_an_error_and_no_winner(model, tokenizer):
    model.lm_head.weight[tokenizer.encode("B")[0]] = float("nan")
    with pytest.raises(UserError, match=r"Quiz, problem \d+: .*weights are broken"):
        evaluate_task(Quiz(), model, tokenizer, EvalSettings())


@pytest.mark.parametrize(
    "settings",
    [
        {"max_problems": -1}, {"num_samples": 0}, {"max_new_tokens": 0}, {"num_samples": 2}, {"top_k": -1},
        {"slow": True, "temperature": 0.5}, {"temperature": -1.0}, {"temperature": float("nan")},
    ],
    ids=str,
)  # fmt: skip
def test_impossible_settings_are_refused(settings):
    with pytest.raises(UserError):
        EvalSettings(**settings)


def test_a_task_that_is_empty_or_rejects_its_own_answer_is_refused():
    check_task(Quiz())
    check_task(Echo())
    with pytest.raises(UserError, match="Quiz has no problems"):
        check_task(Quiz(count=0))
    strict = Echo()
    strict.evaluate = lambda conversation, completion: False
    with pytest.raises(UserError, match="Echo does not accept its own answer"):
        check_task(strict)
