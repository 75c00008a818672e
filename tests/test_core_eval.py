"""CORE: prompts and spans by hand, the fast path against the plain one, sums, ranks."""

import json
import math
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import fill_randomly
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from nanochat.common import UserError
from nanochat.evals.core_bundle import Task
from nanochat.evals.core_eval import (
    build_examples,
    build_prompts,
    cut_row,
    draw_shots,
    evaluate_core,
    score_batched,
    score_plainly,
    span_starts,
)
from nanochat.model.gpt import GPT, GPTConfig

BOS = 0
LETTERS = "abcdefghijklmnopqrstuvwxyz .:\nABCD"
VOCAB_SIZE = 1 + len(LETTERS)
CONTEXT_TOKENS = 64


class LetterTokenizer:
    """One token a letter."""

    bos_id = BOS

    def encode_batch(self, texts):
        return [[1 + LETTERS.index(letter) for letter in text] for text in texts]


class RecurrentModel:
    """A causal toy whose state depends on every token before; counts the rows it is asked to run."""

    device = torch.device("cpu")

    def __init__(self, sequence_len=CONTEXT_TOKENS):
        generator = torch.Generator().manual_seed(0)
        self.config = SimpleNamespace(sequence_len=sequence_len, vocab_size=VOCAB_SIZE)
        self.embedding = torch.randn(VOCAB_SIZE, 16, generator=generator)
        self.mixing = torch.randn(16, 16, generator=generator) * 0.3
        self.head = torch.randn(16, VOCAB_SIZE, generator=generator)
        self.num_rows = 0

    def hidden(self, idx):
        assert idx.size(1) <= self.config.sequence_len
        self.num_rows += len(idx)
        state, states = torch.zeros(len(idx), 16), []
        for t in range(idx.size(1)):
            state = torch.tanh(state @ self.mixing + self.embedding[idx[:, t]])
            states.append(state)
        return torch.stack(states, dim=1)

    def logits(self, hidden):
        return hidden @ self.head

    def __call__(self, idx):
        return self.logits(self.hidden(idx))


def make_task(kind, records, num_shots=0, delimiter=" ", label=""):
    lines = tuple(range(1, len(records) + 1))
    return Task(label or kind, kind, num_shots, delimiter, 0.25, tuple(records), lines)


def choice(query, *choices, gold=0):
    return {"query": query, "choices": list(choices), "gold": gold}


def schema(*contexts, continuation, gold=0):
    return {"context_options": list(contexts), "continuation": continuation, "gold": gold}


def ending(context, continuation):
    return {"context": context, "continuation": continuation}


def make_records(kind, count, seed=0):
    """Random examples whose options have different lengths; some are one letter, some begin like another one."""
    rng = random.Random(seed)

    def text(low, high):
        return "".join(rng.choice("abcdefgh") for _ in range(rng.randint(low, high)))

    def record():
        if kind == "schema":
            return schema(text(3, 12), text(3, 12), continuation=text(1, 9))
        if kind == "language_modeling":
            return ending(text(3, 25), text(1, 3))
        stem = text(1, 5)
        options = {0: ["A", "B", "C", "D"], 1: [stem, stem + text(1, 4), text(2, 9)]}.get(rng.randint(0, 2))
        options = options or [text(1, 9) for _ in range(rng.randint(2, 4))]
        return choice(text(3, 25), *options, gold=rng.randrange(len(options)))

    return [record() for _ in range(count)]


def with_greedy_answers(model, tokenizer, task):
    """`task` without shots, every second answer replaced by what `model` would say, so that some are right."""
    records = list(task.records)
    for index in range(0, len(records), 2):
        ids = [BOS, *tokenizer.encode_batch([records[index]["context"]])[0]]
        for _ in range(2):
            ids.append(1 + model(torch.tensor([ids]))[0, -1, 1:].argmax().item())
        records[index] = ending(records[index]["context"], "".join(LETTERS[i - 1] for i in ids[-2:]))
    return replace(task, records=tuple(records), num_shots=0, delimiter="")


def write_bundle(folder, tasks):
    """A bundle folder holding `tasks`, by label and kind and baseline."""
    (folder / "eval_data").mkdir(parents=True)
    entries, baselines = [], "Eval Task,Random baseline\n"
    for task in tasks:
        file = {"label": task.label, "dataset_uri": f"{task.label}.jsonl"}
        entries.append(file | {"num_fewshot": [task.num_shots], "icl_task_type": task.kind})
        baselines += f"{task.label},{100 * task.baseline}\n"
        text = "".join(json.dumps(record) + "\n" for record in task.records)
        (folder / "eval_data" / file["dataset_uri"]).write_text(text)
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": entries}))
    (folder / "eval_meta_data.csv").write_text(baselines)
    return folder


def small_tasks(count=12):
    kinds = ("multiple_choice", "schema", "language_modeling")
    return [make_task(kind, make_records(kind, count, seed), num_shots=seed) for seed, kind in enumerate(kinds)]


def evaluate(tasks, folder, model=None, **options):
    """CORE of `tasks` as a bundle in `folder`."""
    return evaluate_core(model or RecurrentModel(), LetterTokenizer(), write_bundle(folder, tasks), **options)


def test_prompts_of_the_three_kinds_are_as_written_out_here():
    records = [choice("q one", "x", "y", gold=1), choice("q two ", "v", "w")]
    task = make_task("multiple_choice", records, num_shots=1, delimiter="\nAnswer: ")
    assert build_prompts(task, 0) == ["q two \nAnswer: v\n\nq one\nAnswer: x", "q two \nAnswer: v\n\nq one\nAnswer: y"]
    records = [schema("the cat", "the dog", continuation="slept.", gold=1), schema("he", "she", continuation="ran.")]
    prompts = build_prompts(make_task("schema", records, num_shots=1), 0)
    assert prompts == ["he ran.\n\nthe cat slept.", "he ran.\n\nthe dog slept."]
    records = [ending(" two plus two is\n", "four"), ending("up and ", "down")]
    prompts = build_prompts(make_task("language_modeling", records, num_shots=1), 0)
    assert prompts == ["up and down\n\ntwo plus two is", "up and down\n\ntwo plus two is four"]


@given(count=st.integers(1, 30), num_shots=st.integers(0, 12), data=st.data())
def test_shots_are_other_examples_each_once_and_as_many_as_there_are(count, num_shots, data):
    index = data.draw(st.integers(0, count - 1))
    task = make_task("language_modeling", [ending("a", "b")] * count, num_shots)
    shots = draw_shots(task, index)
    assert len(shots) == len(set(shots)) == min(num_shots, count - 1)
    assert index not in shots
    assert all(0 <= shot < count for shot in shots)
    others = [i for i in range(count) if i != index]  # the same draw from a list written out
    assert shots == random.Random(1234 + index).sample(others, len(shots))


@pytest.mark.parametrize(
    ("kind", "rows", "starts"),
    [
        ("multiple_choice", [[0, 5, 6, 7], [0, 5, 8, 9, 9]], [2, 2]), ("multiple_choice", [[0, 5], [0, 6]], [1, 1]),
        ("multiple_choice", [[0, 5, 6], [0, 5, 6, 7]], [2, 2]),  # one the beginning of the other
        ("multiple_choice", [[0, 5, 6], [0, 5, 6]], [2, 2]),  # twice the same
        ("multiple_choice", [[0, 5, 6, 7]], [3]),  # only one choice
        ("schema", [[0, 1, 2, 8, 9], [0, 3, 8, 9]], [3, 2]), ("schema", [[0, 8, 9], [0, 8, 9]], [1, 1]),
        ("schema", [[0, 8, 9], [0, 7, 8, 9]], [1, 2]),  # one the end of the other, but for the first token
        ("schema", [[0, 1, 2], [0, 1, 3]], [2, 2]),  # nothing in common at the end
        ("language_modeling", [[0, 1, 2], [0, 1, 2, 3, 4]], [3, 3]),
        ("language_modeling", [[0, 1, 2], [0, 1, 7, 4]], [2, 2]),  # the border falls inside a token
        ("language_modeling", [[0, 1, 2], [0, 1, 2]], [2, 2]), ("language_modeling", [[0], [0, 1]], [1, 1]),
        ("language_modeling", [[0, 1, 2, 3], [0, 1]], [1, 1]),
    ],
)  # fmt: skip
def test_spans_begin_where_they_should_by_hand(kind, rows, starts):
    assert span_starts(kind, rows) == starts


rows_strategy = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=12), min_size=2, max_size=4)


@settings(max_examples=200)
@given(rows=rows_strategy, kind=st.sampled_from(["multiple_choice", "schema"]), limit=st.integers(2, 14))
def test_spans_are_never_empty_nor_at_the_first_token_even_after_a_cut(rows, kind, limit):
    rows = [[BOS, *row] for row in rows]
    num_cut = max(0, max(map(len, rows)) - limit)
    for row, start in zip(rows, span_starts(kind, rows), strict=True):
        assert 1 <= start < len(row)
        kept, kept_start = cut_row(row, start, num_cut, limit)
        assert kept[0] == BOS
        assert len(kept) <= limit
        assert 1 <= kept_start < len(kept)
        assert row[len(row) - len(kept) + 1 :] == kept[1:]  # only the left of what stands behind the first is gone
        assert len(kept) == limit or kept[kept_start:] == row[start:]  # the span is whole where it can be


def test_a_cut_takes_the_same_context_from_all_options():
    long, short = [BOS, 1, 2, 3, 4, 5, 8, 8, 8], [BOS, 1, 2, 3, 4, 5, 9]
    assert cut_row(long, 6, 3, 6) == ([BOS, 4, 5, 8, 8, 8], 3)
    assert cut_row(short, 6, 3, 6) == ([BOS, 4, 5, 9], 3)
    assert cut_row(short, 6, 20, 6) == ([BOS, 9], 1)  # another option is far too long: this one's span stays
    assert cut_row([BOS, 1, 7, 7, 7, 7], 2, 3, 3) == ([BOS, 7, 7], 1)  # a span too long by itself


def test_examples_too_long_are_cut_to_the_context_and_counted(tmp_path):
    task = make_task("language_modeling", [ending("a" * n, "bb") for n in (10, 61, 62, 63, 200)])
    result = evaluate([task], tmp_path)
    # begin + context + space + 2 letters, the last of which is never read: 62 letters are one too many
    assert result.tasks[0].num_cut == 3
    examples = build_examples(task, LetterTokenizer(), range(5), CONTEXT_TOKENS + 1)
    assert [len(example.rows[0]) for example in examples] == [14, 65, 65, 65, 65]
    assert [example.num_cut for example in examples] == [0, 0, 1, 2, 139]


def examples_of(kind, records):
    return build_examples(make_task(kind, records), LetterTokenizer(), range(len(records)), CONTEXT_TOKENS + 1)


def assert_equal_scores(fast, plain):
    assert len(fast) == len(plain)
    for one, other in zip(fast, plain, strict=True):
        assert one.nats == pytest.approx(other.nats, abs=1e-5)
        assert one.is_greedy == other.is_greedy


def real_model(window_pattern="SSSL"):
    """A small GPT with windows, every weight random."""
    shape = {"n_layer": 4, "n_embd": 32, "n_head": 2, "n_kv_head": 1, "short_window": 8}
    config = GPTConfig(sequence_len=CONTEXT_TOKENS, vocab_size=VOCAB_SIZE, window_pattern=window_pattern, **shape)
    model = GPT(config)
    model.init_weights(torch.Generator().manual_seed(0))
    fill_randomly(model, scale=1.0)  # a fresh model's blocks do nothing yet
    return model


@pytest.mark.parametrize("batch_tokens", [1, 100, 1000, 0])
@pytest.mark.parametrize("window_pattern", ["SSSL", "SL", "L", None])
def test_the_fast_path_equals_the_plain_one_item_by_item(window_pattern, batch_tokens):
    model = real_model(window_pattern) if window_pattern else RecurrentModel()
    for task in small_tasks(24):
        if task.kind == "language_modeling":
            task = with_greedy_answers(model, LetterTokenizer(), task)
        examples = build_examples(task, LetterTokenizer(), range(24), CONTEXT_TOKENS + 1)
        fast, plain = score_batched(model, examples, batch_tokens), score_plainly(model, examples)
        assert_equal_scores(fast, plain)
        if task.kind == "language_modeling":  # the comparison would prove little if all were right, or all wrong
            assert 4 < sum(score.is_greedy for score in plain) < 20


def test_options_that_had_to_be_cut_still_score_as_alone():
    model, rng = real_model(), random.Random(0)
    texts = ["".join(rng.choice("abcdef") for _ in range(n)) for n in (90, 55, 70, 3)]
    records = [
        choice(texts[0], texts[3], texts[1][:20], "ab"),
        choice("ab", texts[1], texts[2], texts[2][:60]),  # a choice too long by itself
    ]
    examples = examples_of("multiple_choice", records)
    assert all(example.num_cut for example in examples)
    assert_equal_scores(score_batched(model, examples), score_plainly(model, examples))


def test_what_the_options_of_an_example_begin_with_runs_once(monkeypatch):
    model, num_tokens, trunk = real_model(), [], GPT.trunk

    def counting(self, idx, *others, **options):
        num_tokens.append(idx.numel())
        return trunk(self, idx, *others, **options)

    monkeypatch.setattr(GPT, "trunk", counting)
    score_batched(model, examples_of("multiple_choice", [choice("abcdefghij", "ab", "cdef", "ghi")]))
    assert num_tokens == [1 + 10 + 1 + 1 + 3 + 2]  # begin, query, space; the last letter of each choice is not read
    score_batched(model, examples_of("schema", [schema("abcdefgh xy", "abcdefgh z", continuation="ab")]))
    assert num_tokens[1:] == [1 + 9 + (2 + 2) + (1 + 2)]


@pytest.mark.parametrize(("choices", "num_rows"), [("A B C", 1), ("A Ab cd", 2)])  # the input of A begins that of Ab
def test_choices_of_one_token_need_one_row_and_others_one_each(choices, num_rows):
    model = RecurrentModel()
    score_batched(model, examples_of("multiple_choice", [choice("which", *choices.split())]))
    assert model.num_rows == num_rows


def test_the_mean_loss_per_token_decides_not_the_sum():
    class Half(RecurrentModel):
        """Every token of the alphabet has the same chance, but the second letter is likelier after the first."""

        def hidden(self, idx):
            return torch.nn.functional.one_hot(idx, VOCAB_SIZE).float()

        def logits(self, hidden):
            likelier = torch.zeros(VOCAB_SIZE)
            likelier[1 + LETTERS.index("b")] = 3.0
            return hidden[..., 1 + LETTERS.index("a"), None] * likelier + torch.zeros(VOCAB_SIZE)

    (score,) = score_batched(Half(), examples_of("multiple_choice", [choice("q", "c", "ab", gold=1)]))
    uniform = math.log(VOCAB_SIZE)
    assert score.nats[0] == pytest.approx(uniform)
    assert uniform / 2 < score.nats[1] < uniform < 2 * score.nats[1]


def verdict(item):
    return item.line, item.prediction, item.is_correct


class Oracle(RecurrentModel):
    """Gives every "a" a high chance and everything else the same low one."""

    def logits(self, hidden):
        logits = torch.zeros(*hidden.shape[:-1], VOCAB_SIZE)
        logits[..., 1 + LETTERS.index("a")] = 9.0
        return logits


def test_core_is_the_mean_of_centred_accuracies_by_hand(tmp_path):
    choices = [choice("q", "b", "a", gold=gold) for gold in (1, 1, 1, 0)]
    endings = [ending("say", "a"), ending("say", "ab")]  # both wrong: the space before the answer is predicted as well
    tasks = [make_task("multiple_choice", choices), make_task("language_modeling", endings)]
    result = evaluate(tasks, tmp_path, Oracle())
    first, second = result.tasks
    assert (first.accuracy, first.centered) == (0.75, pytest.approx((0.75 - 0.25) / 0.75))
    assert (second.accuracy, second.centered) == (0.0, pytest.approx(-0.25 / 0.75))
    assert result.core == pytest.approx((first.centered + second.centered) / 2)
    assert sorted(map(verdict, first.items)) == [(1, 1, True), (2, 1, True), (3, 1, True), (4, 1, False)]


def test_equal_choices_are_a_tie_that_the_first_one_wins(tmp_path):
    task = make_task("multiple_choice", [choice("q", "same", "same", gold=1)])
    assert evaluate([task], tmp_path).tasks[0].items[0].prediction == 0


def test_slow_and_limited_runs_give_the_same_items_and_progress_sees_every_task(tmp_path):
    tasks, seen = small_tasks(), []
    whole = evaluate(tasks, tmp_path / "whole", progress=seen.append)
    slow = evaluate(tasks, tmp_path / "slow", slow=True)
    part = evaluate(tasks, tmp_path / "part", max_per_task=5)
    assert tuple(seen) == whole.tasks
    assert whole.core == slow.core
    for all_, plain, some in zip(whole.tasks, slow.tasks, part.tasks, strict=True):
        assert [verdict(item) for item in all_.items] == [verdict(item) for item in plain.items]
        assert [verdict(item) for item in all_.items[:5]] == [verdict(item) for item in some.items]


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
@pytest.mark.parametrize("slow", [False, True])
def test_a_score_that_is_not_a_number_is_an_error_and_never_a_winner(tmp_path, kind, slow):
    class Broken(RecurrentModel):
        def logits(self, hidden):
            logits = hidden @ self.head
            logits[-1:] = math.nan
            return logits

    with pytest.raises(UserError, match=f"task {kind}, line .* broken"):
        evaluate([make_task(kind, make_records(kind, 3))], tmp_path, Broken(), slow=slow)


def test_texts_are_tokenised_once_for_all_evaluations_of_a_run(tmp_path):
    class Counting(LetterTokenizer):
        calls = 0

        def encode_batch(self, texts):
            self.calls += 1
            return super().encode_batch(texts)

    bundle, tokenizer = write_bundle(tmp_path, small_tasks()), Counting()
    first = evaluate_core(RecurrentModel(), tokenizer, bundle)
    calls = tokenizer.calls
    assert calls > 0
    assert evaluate_core(RecurrentModel(), tokenizer, bundle).core == first.core
    assert tokenizer.calls == calls


def core_on_rank(rank, world_size, bundle):
    return evaluate_core(RecurrentModel(), LetterTokenizer(), bundle)


def test_two_ranks_find_what_one_finds_also_with_a_single_example(tmp_path):
    tasks = [*small_tasks(7), make_task("schema", make_records("schema", 1), label="lonely")]
    alone = evaluate(tasks, tmp_path / "bundle")
    for result in run_ranks(core_on_rank, 2, tmp_path / "ranks", tmp_path / "bundle"):
        for task, expected in zip(result.tasks, alone.tasks, strict=True):
            assert (task.accuracy, task.num_cut) == (expected.accuracy, expected.num_cut)
            assert [verdict(item) for item in task.items] == [verdict(item) for item in expected.items]


def hugging_face_model(name):
    """A tiny random model of a transformers architecture, adapted as `scripts.base_eval --hf-path` does."""
    transformers = pytest.importorskip("transformers")
    from scripts.base_eval import HuggingFaceModel

    shape = {"vocab_size": VOCAB_SIZE, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    shape |= {"num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": CONTEXT_TOKENS}
    config = transformers.AutoConfig.for_model(name, **shape, bos_token_id=BOS, eos_token_id=BOS, pad_token_id=BOS)
    torch.manual_seed(0)  # transformers draws weights from the global generator only
    return HuggingFaceModel(transformers.AutoModelForCausalLM.from_config(config).eval())


@pytest.mark.parametrize(("name", "has_plain_head"), [("gpt2", True), ("nanochat", True), ("cohere", False)])
def test_the_fast_path_equals_the_plain_one_for_hugging_face_models(name, has_plain_head):
    model = hugging_face_model(name)
    assert model.has_plain_head is has_plain_head  # Cohere scales its logits: left to its own forward pass
    assert model.config.sequence_len == CONTEXT_TOKENS
    for task in small_tasks():
        examples = build_examples(task, LetterTokenizer(), range(12), CONTEXT_TOKENS + 1)
        assert_equal_scores(score_batched(model, examples, 300), score_plainly(model, examples))
