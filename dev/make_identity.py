"""Write the identity conversations, `tasks/identity.jsonl`: who the model is, what it can do, how it was made.

    python dev/make_identity.py                       # the same bytes every time
    python dev/make_identity.py --output other.jsonl

Offline and seeded. A topic is a handful of our own sentences (`identity_topics.txt`) that combine into many answers.
Multi-turn conversations chain topics; some call the calculator or follow a system message. What they say holds for any
model trained with this repository: they give no figures of the model itself, and figures for model sizes in general
are computed here.
"""

import argparse
import json
import random
import sys
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from nanochat.common import write_atomic
from nanochat.engine.calculator import calculate
from nanochat.model.gpt import GPTConfig
from nanochat.training.recipe import count_model
from tasks.spelling import split_of

SEED = 20251013
TOPICS_FILE = Path(__file__).with_name("identity_topics.txt")
OUTPUT = Path(__file__).resolve().parent.parent / "tasks" / "identity.jsonl"
NUM_PER_TOPIC = 9  # single-turn conversations
NUM_LONGER = 130  # of two to four turns
NUM_WITH_TOOL = 40
NUM_WITH_SYSTEM = 40
VOCAB_SIZE, SEQUENCE_LEN = 32768, 2048  # the defaults; the parameter counts are for these

Message = dict[str, str | list[dict[str, str]]]


class Topic(NamedTuple):
    """Ways to ask, complete answers of one or two sentences, and optional further sentences, in order."""

    questions: list[str]
    cores: list[str]
    details: list[str]


GREETINGS = (
    ("Hello!", "Hello! I am nanochat. What can I do for you?"),
    ("Hi", "Hi! How can I help?"),
    ("Hi there!", "Hi there! What would you like to talk about?"),
    ("Hey", "Hey! I'm nanochat. Ask me something."),
    ("Good morning!", "Good morning! How can I help you today?"),
    ("Good evening", "Good evening! What is on your mind?"),
    ("Hello, how are you?", "Hello! I am a program, so I am always the same, but thank you for asking. And you?"),
    ("Nice to meet you.", "Nice to meet you too! I am nanochat."),
    ("Is anybody there?", "Yes, me: nanochat, a small language model. What can I do for you?"),
)

THANKS = (
    ("Thanks!", "You're welcome!"),
    ("Thank you very much.", "You are welcome. Ask me any time."),
    ("OK, thanks.", "Glad to help!"),
    ("Great, that helps.", "Good to hear!"),
    ("Good to know.", "Just ask if there is more."),
    ("Bye!", "Goodbye! It was nice to talk to you."),
    ("See you.", "See you! I won't remember this chat, but you will."),
    ("You are funny.", "Thank you! I do my best with the few parameters I have."),
    ("That was all.", "Then have a good day!"),
)

BRIDGES = ("", "", "And ", "OK. ", "I see. ", "Interesting. ", "One more question: ", "All right. ", "Hm. ")

SYSTEM_MESSAGES = (  # text, and the style of answers that follows it
    ("Answer in one or two sentences.", "short"),
    ("Keep your answers short.", "short"),
    ("Be brief.", "short"),
    ("You are a helpful assistant. Your name is nanochat.", "plain"),
    ("You answer questions about yourself and how you were trained.", "plain"),
    ("Begin every answer with: nanochat here.", "name"),
    ('Always start with the words "nanochat here."', "name"),
    ("End every answer by offering more help.", "offer"),
    ("After each answer, ask whether the user needs anything else.", "offer"),
)

CLOSINGS = {
    "offer": (
        "Is there anything else I can help you with?",
        "Do you need anything else?",
        "Can I help you with something else?",
    ),
    "tool": (
        "I asked my calculator: it worked out {expression} for me.",
        "With my tool. I wrote {expression} and got the result back.",
        "I did not do it in my head; the calculator did {expression}.",
    ),
}

TOOL_QUESTIONS = (  # question, expression, answer given the result
    ("What is {a} plus {b}?", "{a}+{b}", "{a} plus {b} is {result}."),
    ("What is {a} + {b}?", "{a}+{b}", "{a} + {b} = {result}."),
    ("Add {a} and {b}.", "{a}+{b}", "The sum is {result}."),
    ("What do you get when you take {b} from {a}?", "{a}-{b}", "{a} minus {b} is {result}."),
    ("What is {a} minus {b}?", "{a}-{b}", "That is {result}."),
    ("What is {a} times {b}?", "{a}*{b}", "{a} times {b} is {result}."),
    ("Multiply {a} by {b}.", "{a}*{b}", "The product is {result}."),
    ("Can you work out {a} * {b} for me?", "{a}*{b}", "It is {result}."),
    ("I have {a} books and buy {b} more. How many are that?", "{a}+{b}", "Then you have {result} books."),
    ("What is {a} squared?", "{a}**2", "{a} squared is {result}."),
    ("What is twice the sum of {a} and {b}?", "2*({a}+{b})", "Twice the sum is {result}."),
    ("How many {letter} are in {word}?", "'{word}'.count('{letter}')", "I count {result} of the letter {letter}."),
    ("How many letters does {word} have?", "len('{word}')", "The word {word} has {result} letters."),
    ("Write {word} in capitals.", "'{word}'.upper()", "{result}"),
    ("What is {word} backwards?", "'{word}'[::-1]", "Backwards it reads {result}."),
)

TOOL_WORDS = tuple(
    """nanochat tokenizer transformer calculator parameter attention training language conversation computer question
    answer network gradient optimizer evaluation repository benchmark embedding vocabulary""".split()
)


# --- the file ---------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="file to write (default: the one in tasks/)")
    args = parser.parse_args()
    conversations = make_conversations(random.Random(SEED))
    lines = [json.dumps({"messages": messages}, ensure_ascii=False) for messages in conversations]
    write_atomic(args.output, "\n".join(lines) + "\n")
    print(f"{len(lines)} conversations in {args.output}")


def make_conversations(rng: random.Random) -> list[list[Message]]:
    """All conversations, without duplicates, in random order."""
    topics = read_topics(TOPICS_FILE, size_figures())
    makers = [partial(single_turn, topic, rng) for topic in topics for _ in range(NUM_PER_TOPIC)]
    makers += [partial(longer, topics, rng)] * NUM_LONGER
    makers += [partial(with_tool, rng)] * NUM_WITH_TOOL
    makers += [partial(with_system, topics, rng)] * NUM_WITH_SYSTEM
    made: dict[str, list[Message]] = {}
    for maker in makers:
        for _ in range(20):  # a topic may have no combination left
            messages = maker()
            key = json.dumps(messages)
            if key not in made:
                made[key] = messages
                break
    conversations = list(made.values())
    rng.shuffle(conversations)
    return conversations


def read_topics(path: Path, figures: dict[str, str]) -> list[Topic]:
    """The topics of the file, with the figures filled in. Its first paragraph is an introduction and is skipped."""
    topics = []
    for block in path.read_text(encoding="utf-8").split("\n\n")[1:]:
        topic = Topic([], [], [])
        kinds = {"?": topic.questions, "=": topic.cores, "+": topic.details}
        for line in block.strip().split("\n")[1:]:
            kinds[line[0]].append(line[2:].format(**figures))
        assert all(topic), block
        topics.append(topic)
    return topics


def size_figures() -> dict[str, str]:
    """Parameter counts of models of some depths, to fill into sentences: `{"d20": "897 million", ...}`."""
    figures = {}
    for depth in (12, 20):
        config = GPTConfig.from_depth(depth, vocab_size=VOCAB_SIZE, sequence_len=SEQUENCE_LEN)
        num_parameters = sum(parameter.numel() for parameter in count_model(config).parameters())
        figures[f"d{depth}"] = f"{num_parameters / 1e6:.0f} million"
    return figures


# --- kinds of conversations ----------------------------------------------------------------------


def single_turn(topic: Topic, rng: random.Random) -> list[Message]:
    return [user(typed(rng.choice(topic.questions), rng)), assistant(answer(topic, rng))]


def longer(topics: list[Topic], rng: random.Random) -> list[Message]:
    """Two to four turns: sometimes a greeting, then different topics, sometimes thanks."""
    messages: list[Message] = []
    if rng.random() < 0.4:
        greeting, reply = rng.choice(GREETINGS)
        messages += [user(typed(greeting, rng)), assistant(reply)]
    for number, topic in enumerate(rng.sample(topics, rng.choice([1, 2, 2, 3]))):
        question = typed(rng.choice(topic.questions), rng)
        bridge = rng.choice(BRIDGES) if number else ""
        question = uncapitalized(question) if bridge == "And " else question
        messages += [user(bridge + question), assistant(answer(topic, rng))]
    if rng.random() < 0.4 or len(messages) == 2:
        thanks, reply = rng.choice(THANKS)
        messages += [user(typed(thanks, rng)), assistant(reply)]
    return messages


def with_tool(rng: random.Random) -> list[Message]:
    """A question about numbers or a word, answered with the tool, sometimes followed by the question how it was done.
    Words held out for validation or testing of the spelling tasks are not used."""
    question, expression, sentence = rng.choice(TOOL_QUESTIONS)
    values = {"a": rng.randrange(2, 1000), "b": rng.randrange(2, 1000)}
    values |= {"word": rng.choice([word for word in TOOL_WORDS if split_of(word) == "train"])}
    values |= {"letter": rng.choice(values["word"])}
    expression = expression.format(**values)
    result = calculate(expression)
    assert result is not None, expression
    parts = [
        {"type": "python", "text": expression},
        {"type": "python_output", "text": result},
        {"type": "text", "text": sentence.format(result=result.removesuffix(".0"), **values)},
    ]
    messages = [user(typed(question.format(**values), rng)), {"role": "assistant", "content": parts}]
    if rng.random() < 0.5:
        asked = rng.choice(["How did you work that out?", "Did you do that in your head?", "How do you know?"])
        told = rng.choice(CLOSINGS["tool"]).format(expression=expression)
        messages += [user(typed(asked, rng)), assistant(told)]
    return messages


def with_system(topics: list[Topic], rng: random.Random) -> list[Message]:
    """A system message about the form of the answers, and answers that follow it."""
    text, style = rng.choice(SYSTEM_MESSAGES)
    messages: list[Message] = [{"role": "system", "content": text}]
    for topic in rng.sample(topics, rng.choice([1, 1, 2])):
        reply = rng.choice(topic.cores) if style == "short" else answer(topic, rng)
        if style == "name":
            reply = "nanochat here. " + reply
        elif style == "offer":
            reply = f"{reply} {rng.choice(CLOSINGS['offer'])}"
        messages += [user(typed(rng.choice(topic.questions), rng)), assistant(reply)]
    return messages


# --- pieces --------------------------------------------------------------------------------------


def answer(topic: Topic, rng: random.Random) -> str:
    """A core sentence and up to two of the details, in the order in which they are listed."""
    chosen = set(rng.sample(range(len(topic.details)), min(len(topic.details), rng.choice([0, 1, 1, 2]))))
    sentences = [rng.choice(topic.cores), *(detail for i, detail in enumerate(topic.details) if i in chosen)]
    return " ".join(sentences)


def typed(text: str, rng: random.Random) -> str:
    """`text` as people type it: sometimes without the capital letter or the final punctuation."""
    text = uncapitalized(text) if rng.random() < 0.25 else text
    return text.rstrip("?.!") if rng.random() < 0.15 else text


def uncapitalized(text: str) -> str:
    """`text` with a lower-case first letter, unless it is part of "I" or an abbreviation."""
    return text if text[:2].isupper() or text.startswith(("I ", "I'")) else text[0].lower() + text[1:]


def user(text: str) -> Message:
    return {"role": "user", "content": text}


def assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


if __name__ == "__main__":
    main()
