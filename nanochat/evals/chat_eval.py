"""Chat tasks: how often a model answers correctly.

In a chat, every question is asked by itself, without worked examples:
- categorical tasks: the answer is the offered letter with the highest logit after the prompt;
- generative tasks: the model writes an answer through the engine, tool calls included, and the task judges it.

Tasks that are plain text (`Task.is_text`, the prompts of published scores) are put to any model in the same way, also
to one that never saw a chat: the beginning-of-sequence token, worked examples ("shots"), the question. Of these come
the first ones, as many as fit, which is the rule of MMLU's own code.
- categorical tasks: the answer is the choice that continues the text with the highest probability, or with the highest
  log probability per character;
- generative tasks: the model continues the text, without tools, up to one of the task's stops.

Not here: the tasks (passed in as objects), sums and result files (`chat_results.py`), flags, printing.
"""

import functools
import math
import random
import time
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, NamedTuple

import numpy as np
import torch

from nanochat.common import UserError, from_rank0
from nanochat.data.chat import ReplyReader, render_for_completion, visible_text
from nanochat.engine.calculator import calculate
from nanochat.engine.engine import MAX_TOOL_TOKENS, TOOL_ERROR, Engine
from nanochat.engine.generation import Completion, Token
from nanochat.engine.sampling import Sampling
from nanochat.evals import scoring
from nanochat.evals.chat_results import Item, ResultLog, Sample, TaskResult
from nanochat.evals.core_eval import Example, score_batched, score_plainly
from nanochat.tokenizer import Tokenizer

ORDER_SEED = 1234  # decides which problems a limited run asks: always the same ones, whatever the other settings
GROUP_BATCHES = 8  # categorical questions are scored, and written to the log, in groups of about so many batches
GRADE_PROBLEMS = 16  # written answers are judged, and written to the log, so many problems at a time


@dataclass(frozen=True)
class EvalSettings:
    """How tasks are asked. Raises `UserError` for values that make no sense.

    `max_problems` limits the problems of each task (0: all). The rest is for generative tasks: `num_samples` answers to
    each problem, drawn at `temperature` (0: greedy) from the `top_k` likeliest tokens (None, 0: all), at most
    `max_new_tokens` long; every problem has its own seed, derived from `seed`. `slow` takes the plain paths.
    """

    max_problems: int = 0
    num_samples: int = 1
    temperature: float = 0.0
    top_k: int | None = None
    max_new_tokens: int = 512
    seed: int = 0
    slow: bool = False

    def __post_init__(self):
        for name, least in (("max_problems", 0), ("num_samples", 1), ("max_new_tokens", 1)):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
        if self.num_samples > 1 and self.temperature == 0:
            same = f"--num-samples {self.num_samples} at temperature 0 would give the same answer every time"
            raise UserError(f"{same}; set --temperature, 1.0 for example")
        if self.slow and self.temperature != 0:
            raise UserError(f"--slow answers greedily; leave out --temperature {self.temperature}")
        self.sampling(0)  # checks the others

    def of_kind(self, kind: str) -> dict[str, Any]:
        """The settings that the answers to one problem of a task of that kind depend on."""
        everything = asdict(self)
        del everything["max_problems"]
        return everything if kind == "generative" else {"slow": self.slow}

    def sampling(self, index: int, **options: Any) -> Sampling:
        """How the answers to problem `index` are drawn."""
        seed = problem_seed(self.seed, index)
        return Sampling(
            max_tokens=self.max_new_tokens, temperature=self.temperature, top_k=self.top_k, seed=seed, **options
        )


def problem_seed(seed: int, index: int) -> int:
    """The seed for the samples of problem `index`, so that they depend on neither order nor process."""
    return random.Random(f"{seed}/{index}").getrandbits(31)


class Question(NamedTuple):
    """A problem ready to be asked: its conversation, the prompt's ids, and what is known of the result already."""

    conversation: Mapping[str, Any]
    ids: list[int]
    item: Item


def choose_problems(count: int, max_problems: int) -> tuple[int, ...]:
    """Which of `count` problems are asked, ascending: all, or a fixed random choice of `max_problems`. A smaller choice
    is part of every larger one, so that a run can be extended."""
    order = list(range(count))
    random.Random(ORDER_SEED).shuffle(order)
    return tuple(sorted(order[: max_problems or count]))


def prompt_budget(kind: str, sequence_len: int, max_new_tokens: int) -> int:
    """The longest prompt in tokens: the whole context for a categorical question; for a written answer what
    `max_new_tokens` leave of it, but at least half."""
    return sequence_len if kind == "categorical" else max(sequence_len - max_new_tokens, (sequence_len + 1) // 2)


def fit_prompt(tokenizer: Tokenizer, conversation: Mapping[str, Any], max_tokens: int) -> tuple[list[int], bool]:
    """The prompt that asks for the last message of `conversation`, at most `max_tokens` long, and whether it was cut.

    A prompt that is too long loses its oldest questions. If the last question alone is too long it loses its beginning,
    because what is asked usually stands at the end. The special tokens at both ends always stay.
    """
    asked = {"messages": conversation["messages"][:-1]}
    try:
        prompt = render_for_completion(tokenizer, asked, max_tokens=max_tokens)
        return prompt.ids, prompt.num_dropped > 0
    except UserError:  # the last question is too long, or the next line raises as well
        whole = render_for_completion(tokenizer, asked).ids
        assert max_tokens > 4, max_tokens  # two special tokens at either end
        return whole[:2] + whole[2 - max_tokens :], True


def fit_text(tokenizer: Tokenizer, problem: Mapping[str, Any], max_tokens: int) -> tuple[list[int], int, bool]:
    """The prompt of a plain-text `problem` (`tasks.common.text_problem`), at most `max_tokens` long with the longest of
    its choices, how many of its shots are in it, and whether it was cut.

    It has the first shots, as many as fit. If it is too long without any it loses its beginning, as in `fit_prompt`.
    """
    intro, shots, question = problem["intro"], problem["shots"], problem["messages"][0]["content"]
    room = max_tokens - max((len(tokenizer.encode(option)) for option in problem.get("options", ())), default=0)
    for num_shots in range(len(shots), -1, -1):
        ids = [tokenizer.bos_id, *tokenizer.encode("".join((intro, *shots[:num_shots], question)))]
        if len(ids) <= room:
            return ids, num_shots, False
    assert room > 1, max_tokens
    return ids[:1] + ids[1 - room :], 0, True


@functools.lru_cache(maxsize=16)
def _questions(task, tokenizer: Tokenizer, indices: tuple[int, ...], max_tokens: int) -> tuple[Question, ...]:
    """The questions of `task` at `indices`, made once for all evaluations of a training run."""
    questions = []
    for index in indices:
        conversation, num_shots = task[index], None
        if task.is_text:
            ids, num_shots, is_cut = fit_text(tokenizer, conversation, max_tokens)
        else:
            ids, is_cut = fit_prompt(tokenizer, conversation, max_tokens)
        expected = visible_text(conversation["messages"][-1]["content"])
        item = Item(index, tokenizer.decode(ids), is_cut, expected, num_shots=num_shots)
        questions.append(Question(conversation, ids, item))
    return tuple(questions)


def letter_ids(tokenizer: Tokenizer, letters: Sequence[str]) -> list[int]:
    """The first token of each letter as it is written after a special token, without a space in front. Raises
    `UserError` when two answers share it."""
    firsts = [tokenizer.encode(letter)[0] for letter in letters]
    if len(set(firsts)) < len(firsts):
        fault = f"the answers {', '.join(letters)} cannot be told apart by their first token"
        raise UserError(f"{fault}; the task must offer others, single letters for example")
    return firsts


def _answer_categorical(model, tokenizer: Tokenizer, task, questions: Sequence[Question], slow: bool) -> Iterator[Item]:
    """The questions with the letter chosen, longest first. In a tie the first letter wins. Raises `UserError` for a
    logit that is NaN: no comparison with NaN is true, so a broken model would choose a letter."""
    score = _likelihoods if task.is_text else _letter_logits
    group_tokens = 1 if slow else GROUP_BATCHES * scoring.default_batch_tokens(model.device)
    for indices in scoring.batches_by_length([len(question.ids) for question in questions], group_tokens):
        group = [questions[i] for i in indices]
        letters = [task.letters(question.conversation) for question in group]
        for question, offered, values in zip(
            group, letters, score(model, tokenizer, group, letters, slow), strict=True
        ):
            logits = dict(zip(offered, map(float, values), strict=True))
            if any(map(math.isnan, logits.values())):
                where = f"{task.name}, problem {question.item.index}"
                raise UserError(f"{where}: the logits are {logits}; the model's weights are broken")
            letter, scores = max(logits, key=logits.__getitem__), {}
            if task.by_length:
                scores["acc"] = float(task.evaluate(question.conversation, letter))
                sizes = {name: len(o) - 1 for name, o in zip(offered, question.conversation["options"], strict=True)}
                letter = max(logits, key=lambda name: logits[name] / sizes[name])
                scores["acc_norm"] = float(task.evaluate(question.conversation, letter))
            sample = Sample(letter, task.evaluate(question.conversation, letter), scores)
            yield replace(question.item, logits=logits, samples=(sample,))


def _letter_logits(model, tokenizer: Tokenizer, group: Sequence[Question], letters, slow: bool) -> list[np.ndarray]:
    """The logits of each question's letters as the next token."""
    score = scoring.last_position_logits_plainly if slow else scoring.last_position_logits
    candidates = [letter_ids(tokenizer, offered) for offered in letters]
    return score(model, [question.ids for question in group], candidates)


def _likelihoods(model, tokenizer: Tokenizer, group: Sequence[Question], letters, slow: bool) -> list[np.ndarray]:
    """The log-likelihoods in nats of each question's choices, whose tokens follow those of the prompt: a choice begins
    with a blank, where the tokenizer cuts in any case."""
    options = [[tokenizer.encode(option) for option in question.conversation["options"]] for question in group]
    examples = []
    for question, choices in zip(group, options, strict=True):
        rows = tuple(np.array(question.ids + choice, dtype=np.int32) for choice in choices)
        examples.append(Example(rows, (len(question.ids),) * len(rows), 0))
    scores = (score_plainly if slow else score_batched)(model, examples)
    lengths = [np.array(list(map(len, choices))) for choices in options]
    return [-np.array(score.nats) * length for score, length in zip(scores, lengths, strict=True)]


def _answer_generative(model, tokenizer: Tokenizer, engine, task, questions, settings: EvalSettings) -> Iterator[Item]:
    """The questions with their answers and verdicts, in the order in which they are done."""
    options = {"stop": task.stops, "use_tool": not task.is_text}
    if settings.slow:
        plain = functools.partial(complete_plainly, model, tokenizer, max_tokens=settings.max_new_tokens, **options)
        answers = ((question, [plain(question.ids)]) for question in questions)
    else:
        answers = _complete_all(engine, questions, settings, options)
    while done := list(islice(answers, GRADE_PROBLEMS)):
        pairs = [(question.conversation, one.parts) for question, completions in done for one in completions]
        verdicts = iter(task.evaluate_many(pairs))
        for question, completions in done:
            samples = []
            for one in completions:
                scores = task.score(question.conversation, one.parts)
                samples.append(Sample(one.parts, bool(next(verdicts)), scores, one.finish_reason, len(one.tokens)))
            seed = problem_seed(settings.seed, question.item.index)
            yield replace(question.item, seed=seed, samples=tuple(samples))


def _complete_all(
    engine: Engine, questions, settings: EvalSettings, options: Mapping[str, Any]
) -> Iterator[tuple[Question, list[Completion]]]:
    """All questions through the engine at the same time, each yielded when its last sample is done."""
    waiting = {}
    for question in questions:
        sampling = settings.sampling(question.item.index, **options)
        waiting[engine.submit(question.ids, sampling, num_samples=settings.num_samples)] = question
    try:
        while waiting:
            for event in engine.step():
                if event.request.is_done and event.request in waiting:  # several samples may end in the same step
                    yield waiting.pop(event.request), event.request.completions
    finally:  # if the caller stops early, the engine must not go on with these
        for request in waiting:
            engine.cancel(request)


@torch.no_grad()
def complete_plainly(
    model, tokenizer: Tokenizer, prompt: Sequence[int], *, max_tokens: int, stop: Collection[str] = (),
    use_tool: bool = True,
) -> Completion:  # fmt: skip
    """The reference for the engine at temperature 0: one answer at a time, the whole text through the model for each
    token, without a cache. It ends before a text of `stop`. With `use_tool` a tool call is followed by the tool's
    answer, which the model does not write itself."""
    special, reader = tokenizer.special_ids, ReplyReader(tokenizer, stop)
    tool_marks = [special["<|output_start|>"], special["<|output_end|>"]]
    ids, tokens, forced, call = list(prompt), [], [], None
    # the model reads at most one context, which leaves room to say one more token
    limit = min(len(ids) + max_tokens, model.config.sequence_len + 1)
    while len(ids) < limit and not reader.is_stopped:
        if is_forced := bool(forced):
            token = forced.pop(0)
        else:
            logits = model(torch.tensor([ids], device=model.device))[0, -1].clone()  # (V,)
            if use_tool:
                logits[tool_marks] = -torch.inf
            token = logits.argmax().item()
            if token in tokenizer.stop_ids:
                break
        ids.append(token)
        tokens.append(Token(token, is_forced))
        reader.add([token])
        if token == special["<|python_start|>"]:
            call = len(ids)
        elif token == special["<|python_end|>"] and call is not None and use_tool:
            answer = tokenizer.encode(calculate(tokenizer.decode(ids[call:-1])) or TOOL_ERROR)
            forced, call = [tool_marks[0], *answer[:MAX_TOOL_TOKENS], tool_marks[1]], None
    reader.finish()
    return Completion(tokens, reader.parts, "stop" if reader.is_stopped or len(ids) < limit else "length")


def check_task(task) -> None:
    """Load the data of `task` and try its judge, which must accept the task's own answer to its first problem. Raises
    `UserError` where it does not or there are no problems, and what the task raises (no data, no isolation)."""
    assert task.kind in ("categorical", "generative"), f"{task.name} cannot be examined"
    if len(task) == 0:
        raise UserError(f"the task {task.name} has no problems; choose others")
    conversation = task[0]
    if not task.evaluate(conversation, conversation["messages"][-1]["content"]):
        fault = f"{task.name} does not accept its own answer to its first problem"
        doubt = "none of its verdicts could be trusted; if it runs code, is this machine overloaded?"
        raise UserError(f"{fault}, so that {doubt}")


def prepare_logs(logs: Iterable[ResultLog], *, resume: bool) -> None:
    """Delete what is in `logs`, or with `resume` check that all of them can be continued, before hours go into the
    first task. With a process group every rank must call this. Raises `UserError` when the settings were others."""
    for log in logs:
        _on_rank0(log.recover if resume else log.discard)


def evaluate_task(
    task, model, tokenizer: Tokenizer, settings: EvalSettings, *, engine: Engine | None = None,
    log: ResultLog | None = None, progress: Callable[..., Iterable[Item]] = lambda items, total: items,
) -> TaskResult:  # fmt: skip
    """Ask `model` the problems of `task`, a `tasks.common.Task` or an object like it, and judge its answers.

    model: a `GPT`, or what `scoring.py` takes for one; engine: an `Engine` with that model, needed for generative tasks
    unless `settings.slow`. With a process group every rank must call this: each answers its share, all get the result.
    `log` keeps the results as they come; problems it already holds are not asked again. `progress(items, total=n)`,
    tqdm for example, wraps the iterator over the results of this process.

    Raises `UserError` for NaN logits, for results that cannot be written or were made with other settings, and what
    the task raises. Call `check_task` for all tasks first, so that it raises early.
    """
    begin = time.perf_counter()
    rank, world_size = scoring.rank_and_world_size()
    chosen = choose_problems(len(task), settings.max_problems)
    earlier = [] if log is None else _on_rank0(log.recover)
    answered = {item.index for item in earlier}
    todo = tuple(index for index in chosen if index not in answered)[rank::world_size]
    budget = prompt_budget(task.kind, model.config.sequence_len, settings.max_new_tokens)
    if task.is_text and task.kind == "categorical":
        budget += 1  # the last token of a choice is only predicted, never read
    questions = _questions(task, tokenizer, todo, budget)
    if task.kind == "categorical":
        answers = _answer_categorical(model, tokenizer, task, questions, settings.slow)
    else:
        answers = _answer_generative(model, tokenizer, engine, task, questions, settings)
    append = log.appender(rank) if log is not None else lambda item: None
    own = []
    for item in progress(answers, total=len(todo)):
        own.append(item)
        append(item)
    items = {item.index: item for item in [*earlier, *scoring.gather_from_ranks(own)]}
    if log is not None:
        _on_rank0(lambda: log.write_whole(items.values()))
    num_earlier = sum(index in answered for index in chosen)
    asked = tuple(items[index] for index in chosen)
    seconds = time.perf_counter() - begin
    return TaskResult(task.name, task.baseline, asked, num_earlier, seconds, task.num_shots)


def _on_rank0(work: Callable[[], Any]) -> Any:
    """Do `work` in one process; its result, or the `UserError` it raised, is that of every process."""
    result, error = None, None
    if scoring.rank_and_world_size()[0] == 0:
        try:
            result = work()
        except UserError as raised:
            error = raised
    result, error = from_rank0((result, error))
    if error is not None:
        raise error
    return result
