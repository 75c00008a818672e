import asyncio
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from nanochat.data.chat import Delta, Prompt
from nanochat.engine.generation import Token
from nanochat.engine.sampling import Sampling
from nanochat.serve.answers import MIN_LOGPROB, ChatAnswer, CompletionAnswer
from nanochat.serve.middleware import Settings
from nanochat.serve.worker import Job, Piece, Reply, Work

TYPES = ("text", "python", "python_output")


class Answering:
    """A job of `num_replies`, and the answer that reads it."""

    def __init__(self, kind, tokenizer, num_replies=1, *, num_logprobs=None, wants_usage=False, **options):
        work = Work(1, [[1, 2, 3]], Sampling(num_logprobs=num_logprobs), num_replies)
        self.job = Job(work, worker=None)
        self.answer = kind(tokenizer, self.job, Settings("m", 64), wants_usage=wants_usage, **options)

    def whole(self, *pieces):
        for piece in pieces:
            self.job.add(piece)
        return self.answer.whole()

    def chunks(self, *pieces):
        """The chunks for pieces that come together."""
        for piece in pieces:
            self.job.add(piece)
        return self.answer.chunks(asyncio.run(self.job.next_news()))


def piece(index=0, deltas=(), tokens=(), finish_reason=None):
    return Piece(1, index, deltas, len(tokens), tokens, (), 2, finish_reason)


def chat_answer(tokenizer, num_replies=1, **options):
    return Answering(ChatAnswer, tokenizer, num_replies, prompt=Prompt([1, 2, 3], num_dropped=2), **options)


@st.composite
def replies(draw):
    """Deltas as a `ReplyReader` gives them: a tool part begins with an empty piece, other pieces are not empty."""
    deltas = []
    for type_ in draw(st.lists(st.sampled_from(TYPES), max_size=5)):
        deltas += [Delta(type_, "")] * (type_ != "text")
        deltas += [Delta(type_, text) for text in draw(st.lists(st.text("ab", min_size=1, max_size=2), max_size=3))]
    return deltas


def parts_of(deltas):
    """Message parts by the rule of the wire format: an empty tool piece begins a new part."""
    parts = []
    for type_, text in deltas:
        if not text or not parts or parts[-1][0] != type_:
            parts.append([type_, ""])
        parts[-1][1] += text
    return parts


@given(replies())
def test_merged_deltas_say_the_same_in_fewer_pieces(deltas):
    reply = Reply()
    for delta in deltas:
        reply.add(piece(deltas=[delta]))
    assert parts_of(reply.deltas) == parts_of(deltas) == [[part["type"], part["text"]] for part in reply.parts]
    assert all(a.type != b.type or not a.text or not b.text for a, b in pairwise(reply.deltas))


@given(replies(), st.lists(st.integers(0, 20), max_size=4))
def test_chunks_joined_are_the_whole_answer(tokenizer, deltas, cuts):
    answer = chat_answer(tokenizer)
    streamed = []
    for start, end in pairwise([0, *sorted(cuts), len(deltas)]):
        for chunk in answer.chunks(piece(), *(piece(deltas=[delta]) for delta in deltas[start:end])):
            delta = chunk["choices"][0]["delta"]
            extra = delta.get("nanochat")
            streamed.append((extra["type"], extra["text"]) if extra else ("text", delta["content"]))
    message = answer.whole(piece(finish_reason="stop")).choices[0].message
    assert parts_of(streamed) == parts_of(deltas) == [[part.type, part.text] for part in message.nanochat.parts]
    assert message.content == "".join(text for type_, text in streamed if type_ == "text")


def test_pieces_that_come_together_are_one_chunk_for_each_reply(tokenizer):
    answer = chat_answer(tokenizer, 2)
    pieces = [piece(i, [Delta("text", text)]) for text in "abc" for i in (0, 1)]
    chunks = answer.chunks(*pieces, piece(1, [Delta("text", "d")], finish_reason="length"))
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    said = [(choice["index"], choice["delta"].get("content"), choice["finish_reason"]) for choice in choices]
    assert len(chunks) == 3
    assert said == [(0, "abc", None), (1, "abcd", None), (1, None, "length")]


def test_the_context_counts_prompt_and_longest_reply(tokenizer):
    answering = chat_answer(tokenizer, 2, wants_usage=True)
    assert answering.answer.opening()[0]["nanochat"]["context"]["used"] == 3
    ends = [piece(i, tokens=(Token(5),) * (4 + 2 * i), finish_reason=("stop", "length")[i]) for i in (0, 1)]
    note = answering.whole(*ends).nanochat
    assert (note.num_dropped_messages, note.context) == (2, {"used": 9, "limit": 64})
    [closing] = answering.answer.closing()
    assert closing["choices"] == []
    counts = {"prompt_tokens": 3, "completion_tokens": 10, "total_tokens": 13}
    assert closing["usage"] == counts | {"prompt_tokens_details": {"cached_tokens": 2}}


def test_logprobs_leave_out_forced_tokens_and_minus_infinity(tokenizer):
    special = tokenizer.special_ids["<|python_start|>"]
    likely = Token(65, logprob=-0.5, top=((65, -0.5), (66, -float("inf"))))
    tokens = (likely, Token(66, is_forced=True), Token(special, logprob=-1.0))
    [chunk] = chat_answer(tokenizer, num_logprobs=2).chunks(piece(tokens=tokens))
    first, second = chunk["choices"][0]["logprobs"]["content"]
    assert (first["token"], first["logprob"]) == (tokenizer.decode([65]), -0.5)
    assert first["bytes"] == list(tokenizer.decode_bytes([65]))
    assert first["top_logprobs"][1]["logprob"] == MIN_LOGPROB
    assert (second["token"], second["bytes"]) == ("<|python_start|>", None)


def test_completion_offsets_run_through_all_pieces(tokenizer):
    ids = tokenizer.encode("river stone garden")
    pieces = [piece(0, [Delta("text", tokenizer.decode([i]))], (Token(i, logprob=-1.0),)) for i in ids]
    expected = [len(tokenizer.decode(ids[:i])) for i in range(len(ids))]
    streamed, whole = (Answering(CompletionAnswer, tokenizer, num_logprobs=0) for _ in range(2))
    chunks = [streamed.chunks(one)[0]["choices"][0] for one in pieces]
    assert [offset for choice in chunks for offset in choice["logprobs"]["text_offset"]] == expected
    [choice] = whole.whole(*pieces, piece(finish_reason="stop")).choices
    assert choice.logprobs.text_offset == expected
