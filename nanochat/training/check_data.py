"""What a chat stage would train on, without training: every conversation read, checked and measured.

For each file or task: how many conversations, in which format; their tokens, and how many of these are learned; the
longest; and what does not fit the model's context. Then every row that is refused, with the reason. No weights are
loaded. Not here: reading and refusing (`tasks/own_data.py`).
"""

import argparse
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from nanochat.checkpoint import find_checkpoint, load_tokenizer, read_meta
from nanochat.common import UserError, print0
from nanochat.data.chat import render, render_for_completion
from nanochat.evals.chat_eval import prompt_budget
from nanochat.tokenizer import Tokenizer


class Sources(Protocol):
    """`tasks.mixtures.Sources`, which the library does not import."""

    tasks: Sequence[Any]
    own_files: Sequence[Any]

    def check(self, skip_bad_rows: int) -> None: ...


def check_data(args: argparse.Namespace, sources: Sources, *, reply_tokens: int = 0) -> None:
    """Print what `sources` hold for a run with the flags `args`, measured with the tokenizer and the context of the
    checkpoint that it would continue from, if there is one. reply_tokens: of reinforcement learning, where questions
    are measured. Raises `UserError`, at the end, for what would keep the run from starting."""
    tokenizer, context = None, 0
    try:
        folder = find_checkpoint(args.source, model_tag=args.model_tag, step=args.step)
        meta = read_meta(folder)
        tokenizer, context = load_tokenizer(folder, meta), meta["config"]["sequence_len"]
        print0(f"measured for {folder.relative_to(folder.parents[2])}, which has a context of {context:,} tokens")
    except UserError as error:
        print0(f"tokens are not counted: {error}")
    for task in sources.tasks:
        num, is_own = len(task), task in sources.own_files  # reads it
        print0(task if is_own else f"{task.name}: {num:,} conversations")
        if tokenizer and num and reply_tokens:
            print0(f"    {_prompts(task, tokenizer, prompt_budget('generative', context, reply_tokens))}")
        elif tokenizer and num:
            print0(f"    {_tokens(task, tokenizer, context + 1)}")
        for fault in task.faults if is_own else ():
            print0(f"    refused, {fault}")
        if is_own and (unnamed := task.num_refused - len(task.faults)):
            print0(f"    refused rows that are not listed: {unnamed:,}")
    sources.check(args.skip_bad_rows)
    print0("the data are in order")


def _tokens(conversations: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, max_tokens: int) -> str:
    """Tokens of conversations to learn from, and what `max_tokens` of a row leave of them."""
    num_tokens = num_targets = num_cut = num_left_out = longest = 0
    for conversation in conversations:
        rendered = render(tokenizer, conversation)
        longest = max(longest, len(rendered.ids))
        if len(rendered.ids) > max_tokens:
            rendered = render(tokenizer, conversation, max_tokens=max_tokens)
            num_cut, num_left_out = num_cut + bool(rendered.ids), num_left_out + (not rendered.ids)
        num_tokens, num_targets = num_tokens + len(rendered.ids), num_targets + sum(rendered.mask)
    text = f"{num_targets:,} of {num_tokens:,} tokens are learned, the longest conversation has {longest:,}"
    if num_cut or num_left_out:
        text += f"; too long for the context: {num_cut:,} cut after an answer, {num_left_out:,} left out"
    return text


def _prompts(conversations: Iterable[Mapping[str, Any]], tokenizer: Tokenizer, max_prompt: int) -> str:
    """Lengths of the questions whose last message is the reference."""
    prompts = (render_for_completion(tokenizer, {"messages": c["messages"][:-1]}) for c in conversations)
    lengths = [len(prompt.ids) for prompt in prompts]
    text = f"questions of {sum(lengths):,} tokens in all, the longest has {max(lengths):,}"
    if num_left_out := sum(length > max_prompt for length in lengths):
        text += f"; {num_left_out:,} have more than {max_prompt:,} and are left out"
    return text
