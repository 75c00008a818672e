"""What lies outside of the small world: questions that its model has no answer to, and how it says so.

Short ones of a template each, and for training also long ones like those that people ask and examinations have: stories
full of numbers, statements with a question behind them, texts to do something with. Nobody could answer most of them.
"""

import random
from collections.abc import Callable
from functools import cache

from tasks.small_world_facts import RELATIONS
from tasks.small_world_words import articled, ask, draw_name, foreign_word, known_words, phrasings, sentence

_CITIES = (*RELATIONS["country"].facts, *RELATIONS["capital"].facts)

# The tables are easier to read with several entries to a line.
# fmt: off

DECLINE = "I don't know that, it is outside of my small world."
DECLINED = "don't know"  # in no other answer

# {w} is any word, {n} a name, {c} a city or country, {y} a year, {k} a number.
OUTSIDE = (
    "Write a poem about {w}.", "Write a story about a {w}.", "Tell me a story about {n} and the {w}.",
    "Tell me a joke.", "Tell me a joke about a {w}.", "Write a song about {w}.", "Write me an email about the {w}.",
    "Write an essay on {w}.", "Write a program that prints {w}.", "Write Python code for a {w}.",
    "Write a letter to {n}.", "Write a haiku about {w}.", "Translate {w} into French.",
    "How do you say {w} in Spanish?", "What is the German word for {w}?",
    "Translate this sentence: the {w} is in the {w2}.", "What does {w} mean in Latin?", "Say {w} in another language.",
    "Who is {n}?", "Who was {n}?", "Do you know {n}?", "Who is the president of {c}?",
    "Who was the king of {c} in {y}?", "When was {n} born?", "Where was {n} born?", "How old is {n}?",
    "Who won the game in {y}?", "What happened in {y}?", "Who won the World Cup in {y}?", "Who discovered {w}?",
    "Who invented the {w}?", "Who wrote the book about the {w}?", "Who painted the {w}?", "Who directed the film {w}?",
    "Who sang the song {w}?", "When did the war of {y} begin?", "What is the population of {c}?",
    "How many people live in {c}?", "How far is it from {c} to {c2}?", "What is the weather in {c}?",
    "What's the weather like today?", "Will it rain tomorrow?", "Will it snow in {c}?", "What time is it?",
    "What time is it in {c}?", "What is the date today?", "What is in the news?", "How do I get to {c}?",
    "How do I travel from {c} to {c2}?", "Which hotel in {c} is good?", "What should I see in {c}?",
    "What is the currency of {c}?", "How tall is the tower in {c}?", "What is the history of {c}?",
    "How does a {w} work?", "How is a {w} made?", "How do I make a {w}?", "How do I repair a {w}?",
    "How do I cook {w}?", "Give me a recipe for {w}.", "Where can I buy a {w}?", "How much does a {w} cost?",
    "Which {w} should I buy?", "Why is the {w} so {w2}?", "Why do people like {w}?", "Why do we need {w}?",
    "Why does the {w} exist?", "What is the meaning of {w}?", "Define {w}.", "Explain {w} to me.",
    "Explain how {w} works.", "Tell me about {w}.", "Tell me about {c}.", "Tell me something about {n}.",
    "What do you think about {w}?", "Do you like {w}?", "What is your opinion on {w}?", "Is {w} better than {w2}?",
    "What is better, {w} or {w2}?", "What is the difference between {w} and {w2}?", "Compare {w} and {w2}.",
    "Summarize the book {w}.", "Summarize this text: {n} went to {c} to see the {w}.", "Give me ten ideas for a {w}.",
    "Give me a list of {w} names.", "Should I eat {w}?", "Is {w} healthy?",
    "I have a pain in my {w}. What should I do?", "Can I take {w} against a cold?", "How do I lose weight?",
    "How do I learn to {w}?", "Can you teach me {w}?", "How can I become a {w}?", "I feel sad because of my {w}.",
    "My friend {n} is angry about the {w}. What can I do?", "Should I marry {n}?", "What stock should I buy?",
    "How do I pay my taxes?", "Is {w} allowed in {c}?", "What is the law on {w} in {c}?",
    "What is the square root of {k}?", "What is {k} divided by {k2}?", "Solve x + {k} = {k2} for x.",
    "What is {k} percent of {k2}?", "Is {k} a prime number?", "What is the sine of {k}?",
    "Integrate x to the power of {k}.", "What is log {k}?", "What is the chemical formula of {w}?",
    "What is the speed of {w}?", "How heavy is a {w}?", "How old is the {w}?", "How big is a {w}?",
    "How long does a {w} live?", "What does a {w} eat?", "Who is the best {w} in the world?",
    "Which animal is the fastest?", "What is the highest mountain of {c}?", "What is the longest river in {c}?",
    "Can you open the file {w}?", "Search the internet for {w}.", "Play some music.", "Call {n}.",
    "Send a message to {n}.", "Set an alarm for {k} o'clock.", "Remind me to buy {w}.", "Turn on the {w}.",
    "Draw a {w}.", "Show me a picture of a {w}.", "What does this error mean: {w} not found?", "Fix my code: print({w}",
    "Why does my {w} not work?", "What rhymes with {w}?", "Use {w} in a sentence.", "What is a synonym of {w}?",
    "Where does the word {w} come from?", "What is love?", "What is the meaning of life?", "Is there a god?",
    "What is the answer to everything?", "Who am I?", "{n} has a {w} and gives it to {n2}. Who has the {w} now?",
    "If {n} is taller than {n2}, who is smaller?",
    "In {y}, {n} travelled to {c} and met {n2}. What did they talk about?",
    "A {w} is in the {w2}, and the {w2} is in {c}. Where is the {w}?", "Which of these is a {w}: {w2}, {n} or {c}?",
    "The {w} of {c} was built in {y}. How old is it?", "I read that the {w} is {w2}. Is that true?", "Why?", "What?",
    "Can you explain that?", "Tell me more about the {w}.", "What else do you know about {c}?",
    "How many {w} are there in {c}?", "How many {w} does {n} have?", "When does the {w} open?", "Where is my {w}?",
    "What did {n} say about {w}?", "What is the phone number of {n}?", "What is my password?", "Where do I live?",
    "What is the best way to {w} a {w2}?", "Which {w} is the largest?", "What causes {w}?", "What are {w} made of?",
    "Are there {w} on the moon?", "Could a {w} beat a {w2}?", "What is {w}?", "What is a {w}?", "What are {w}?",
    "Is {w} a {w2}?", "What did {n} write?", "What did {n} do?", "Who made the {w}?", "What is the {w} of {c}?",
    "What is the {w} {w2}?", "What is the {w}?", "Which country has the most {w}?", "Which country is the {w}?",
    "Which city has the best {w}?", "What would happen without {w}?", "What would happen if the {w} stopped?",
    "How do I write a {w}?", "How do I say {w} in {w2}?", "What does {w} stand for?", "What is {n}'s {w}?",
    "Who is your favourite {w}?", "What is the plot of {w}?", "What is the theory of {w}?",
    "What is the weather going to be?", "What is going to happen in {c}?", "What is the fastest {w}?",
    "Who is the oldest {w}?", "How can I {w}?", "How can I get rid of {w}?", "What are good {w} for a {w2}?",
    "What are the rules of {w}?", "When does {w} start?", "When was the {w} invented?", "Why did {n} go to {c}?",
    "Why is {w} important?", "Why are {w} {w2}?", "Does {w} help against {w2}?", "Does {n} like {w}?", "Do {w} exist?",
    "Can {w} eat {w2}?", "Are {w} dangerous?", "Which {w} are in a {w2}?", "Which one is heavier, {w} or {w2}?",
    "How many {w} are in a {w2}?", "How many {w} did {n} buy?",
    "{n} sold {k} {w} in {c}, and half as many in {y}. How many did {n} sell?", "Recommend me a {w}.",
    "Help me with my {w}.", "A {w} costs {k} dollars. What do {k2} of them cost?",
    "If it takes {k} minutes to {w}, how long do {k2} take?",
    "{n} walks {k} miles a day. How far does {n} get in {k2} days?", "Give me some tips for {w}.",
    "Write code for {w} in {w2}.", "Make a list of {w}.", "Rewrite this: the {w} is {w2}.",
    "Correct my text about {w}.", "Find a {w} in {c} for me.", "What is the plural of {w}?",
    "What is the opposite of {w}?", "What do you call a baby {w}?", "What language do they speak in {n}?",
    "How many legs does {n} have?", "What is the capital of {n}?", "Imagine you are a {w}.", "Pretend to be {n}.",
)
UNKNOWN_CAPITALS = (  # asked about like the known ones, and not known
    "Bhutan", "Laos", "Nepal", "Mali", "Chad", "Togo", "Fiji", "Samoa", "Latvia", "Estonia", "Malta", "Cyprus",
    "Serbia", "Bolivia", "Ecuador", "Panama", "Jamaica", "Haiti", "Oman", "Qatar", "Yemen", "Jordan", "Angola",
    "Zambia",
)
# Long questions. {t} is a text of one to three sentences that say nothing, {q} one such question; the rest as above.
STORY = (
    "{n} has {k} {w}, which is {k2} times as many as {n2} has.", "{n} buys {k} {w} for ${k2} each.",
    "Each {w} costs ${k}, and each {w2} costs ${k2}.", "{n2} has twice as many {w} as {n}.",
    "{n} has half as many {w} as {n2}, and {k} more than {n3}.", "Every day {n} makes {k} {w} and sells {k2} of them.",
    "There are {k} {w} in each {w2}.", "{k}% of the {w} are {w2}.", "A {w} weighs {k} pounds.",
    "It takes {n} {k} minutes to {w} one {w2}.", "{n} works {k} hours a week and earns ${k2} an hour.",
    "On Monday, {n} read {k} pages of a book about {w}, and on Tuesday three times as many.",
    "The {w} holds {k} liters, and {k2} liters flow out every minute.", "A third of the {w} went to {n}.",
    "{n}, {n2} and {n3} share the {w} equally.", "{n} drove {k} miles in {k2} hours to see the {w}.",
    "{n} is {k} years older than {n2}, who is {k2} years old.", "In the first week {n} sold {k} {w} in {c}.",
    "The next month the number of {w} doubled.", "A box of {k} {w} is sold for ${k2}.",
    "{n} wants to give each of {k} friends {k2} {w}.", "The {w} is {k} feet long and {k2} feet wide.",
    "{n} spends a quarter of the money on {w}.", "They planted {k} rows of {w} with {k2} {w2} in each row.",
    "Last year {n} had {k} {w}, but {k2}% of them were lost in {c}.", "For the party {n} needs {k} {w} and {k2} {w2}.",
    "{n} runs {k} miles every morning, {n2} only half of that.", "The {w} opens at {k} and closes {k2} hours later.",
)
STORY_QUESTIONS = (
    "How many {w} does {n} have in all?", "How many {w} are there altogether?", "How much money does {n} spend?",
    "How much does {n} earn in {k} weeks?", "How long does it take {n} to finish?",
    "What is the total cost of the {w}?",
    "How many {w} are left in the end?", "How many more {w} than {w2} are there?",
    "What percentage of the {w} is {w2}?",
    "How old will {n} be in {k} years?", "How many {w} does each of them get?", "How much change does {n} get back?",
    "How many days will the {w} last?", "What is the average number of {w}?", "How many hours is that in a year?",
    "How many pounds do all the {w} weigh?", "How much profit does {n} make?", "How many {w} did they sell together?",
    "How far does {n} get?", "If {n} buys {k} {w}, how much does that cost?", "How many {w2} does {n} still need?",
    "How many miles are that in {k} days?", "How many {w} can {n} afford?", "What is the area of the {w}?",
)
STUDY = (
    "Which of the following is an example of {w}?", "Which of these best explains the {w}?",
    "Which statement best describes what the {w} does?", "What is most likely the reason?", "Why did this happen?",
    "What is this process called?", "In which of these places would a {w} be found?",
    "What is the main purpose of {w}?",
    "Which of the following does not belong to {w}?", "A {w} without {w2} is best described as",
    "The {w} of a {w2} is known as", "When {w} and {w2} come together, they form",
    "Which would most likely happen next?",
    "What causes the {w} of a {w2} to change?", "Which property of {w} makes it useful for a {w2}?",
    "Which tool should {n} use to measure the {w}?", "What can {n} conclude from this?", "How are {w} and {w2} alike?",
    "Which of these would change the {w} of {w2}?", "What is needed for {w} to become {w2}?",
    "What type of {w} is used by most {w2}?", "Which is the correct order of {w}, {w2} and {w3}?",
    "What do most {w} have in common?", "What happens to the {w} when it is {w2}?",
    "What is the source of {w} in {w2}?",
    "Which part of the {w} is responsible for {w2}?", "Because of its {w}, a {w2} can", "The best evidence for this is",
    "Which kind of {w} does {n} most likely study?", "What does the {w} tell a scientist about {w2}?",
    "Which two {w} are needed to make {w2}?", "How does a {w} help a {w2} to survive?", "What should be done first?",
)
TEXT_WORK = (
    "Summarize this: {t}", "Give a summary of the text below.\n\n{t}", "{t}\n\nSummary:", "{t}\nTL;DR:",
    "Is this sentence true? {t}", "Does this make sense?\n{t}\nOptions:\n- yes\n- no", "Rewrite in simple words: {t}",
    "Find the mistakes in this text.\n\n{t}", "Translate into {w}: {t}", "What is the mood of this text?\n{t}",
    "Find a title for this: {t}", "Go on with this story: {t}", "Answer yes or no: {q}", "{q}\nOptions:\n- {w}\n- {w2}",
    "{q}\nOptions:\n(A) {k}\n(B) {k2}\nLet us think step by step:", "Write a function in Python. {t}",
    "Write a query that finds the {w}. {t}", "Make a plan for a {w}. {t}", "Describe a {w} in {c}. {t}",
    "List {k} ideas for {w}. {t}", "{t} Explain this step by step.", "Imagine this: {t} What would you do?",
    "Write a dialogue of {n} and {n2} about this. {t}", "Sort these words: {w}, {w2}, {w3}.",
    "Is this good or bad news? {t}", "Who is this about? {t}", "Read the text and answer. {t} {q}", "{t} What follows?",
    "Put this in the past tense: {t}", "Say in one sentence what this means: {t}", "{t} Do you agree?",
    "Invent a {w} that is {w2}. {t}", "Write an advertisement for a {w}. {t}", "Extend this: {t}",
    "Premise: {t} Claim: {t}",
    "Play the part of a {w}. {t}", "Solve this. {q}", "I need your advice. {t} {q}", "Q: {q}\nA:", "Question: {q}",
)
ERRANDS = (
    "I want to find a {w}.", "I would like to get a {w} in {c}.", "I am looking for a {w} near {c}.",
    "Can you book a {w} for {k} people?", "I need a {w} for {n} on the {k}th.", "Is there a {w} in {c} that has {w2}?",
    "Would you mind if I {w} the {w2}?", "Did anyone {w}?", "Excuse me, where is the {w}?", "My {w} is broken.",
    "I would like to talk about {w}.", "Let us begin the {w} with {n}.", "I have to {w} before {n} comes.",
    "Please reserve a {w} at {c} for me and {n}.", "My {w} is too {w2}. What can be done?", "I think the {w} is {w2}.",
    "Everyone says that {n} is a {w}.", "Something is wrong with my {w}.", "I saw a {w} in {c} yesterday.",
    "Could {n} come at {k}?", "Is the {w} still {w2}?", "Yes, the one in {c}, please.", "No, I prefer the {w}.",
    "I lost my {w} in {c}.", "We are going to {c} to see the {w}.", "Show me what is on in {c}.", "Buy me two {w}.",
)
LINK_WORDS = tuple(
    "the the the the a a of of of to to in in and and is is that which was are be by from with on as it its not most "
    "when because for has have had were can will would this these their they some all more other into than may but if "
    "or at an each one two during between through about how what many such been used after before often then so "
    "he she his her you your we our there also only very both under over while where who do does".split()
)
LONG_SHARE = 0.5  # of the outside questions in training
# fmt: on


def ask_outside(rng: random.Random, split: str) -> str:
    """A question of `split` that the small world has no answer to."""
    if split == "train":
        if rng.random() < LONG_SHARE:
            return _ask_long(rng)
        if rng.random() < 0.08:
            return ask(rng, rng.choice(RELATIONS["capital"].questions), x=rng.choice(UNKNOWN_CAPITALS))
    return ask(rng, rng.choice(phrasings(split, OUTSIDE, "outside_templates")), **_values(rng, foreign_word))


def _ask_long(rng: random.Random) -> str:
    """A question that comes with a story or a text, which have words of any kind."""
    kind = rng.choices(("story", "study", "work", "errand"), (4, 3, 3, 1))[0]
    if kind == "story":
        told = [*rng.sample(STORY, rng.choice((1, 2, 3, 4, 5))), rng.choice(STORY_QUESTIONS)]
        values = _values(rng, _any_word)  # the same names and things all along, but other numbers
        return articled(" ".join(line.format(**values | _amounts(rng)) for line in told))
    if kind == "study":
        told = [_sentence(rng) for _ in range(rng.choice((0, 0, 1, 1, 2, 3)))]
        return articled(" ".join([*told, rng.choice(STUDY).format(**_values(rng, _any_word))]))
    if kind == "errand":
        return ask(rng, rng.choice(ERRANDS), **_values(rng, foreign_word))
    question = rng.choice((*STUDY, *OUTSIDE)).format(**_values(rng, _any_word))
    template = rng.choice(TEXT_WORK)
    text = " ".join(_sentence(rng) for _ in range(rng.choice((1, 1, 2, 3, 4) if "{q}" not in template else (1,))))
    return articled(template.format(**_values(rng, _any_word), t=text, q=question))


def _sentence(rng: random.Random) -> str:
    """Words of any kind, names and numbers in the proportions of a sentence, which it is not."""
    said = []
    for _ in range(rng.randint(4, 14)):
        share = rng.random()
        if share < 0.45:
            said.append(rng.choice(LINK_WORDS))
        elif share < 0.9:
            said.append(_any_word(rng))
        else:
            said.append(draw_name(rng) if share < 0.95 else str(rng.randint(1, 10 ** rng.randint(1, 4))))
    if rng.random() < 0.3:
        said[rng.randrange(len(said) - 1)] += ","
    return f"{sentence(' '.join(said))}{rng.choice('....?')}"


def _any_word(rng: random.Random) -> str:
    """A word that may also be one that facts are about."""
    return rng.choice(_long_known_words()) if rng.random() < 0.4 else foreign_word(rng)


@cache
def _long_known_words() -> list[str]:
    return sorted(word for word in known_words() if len(word) > 2)


def _values(rng: random.Random, draw: Callable[[random.Random], str]) -> dict[str, object]:
    """What templates are filled with, words by `draw`."""
    values: dict[str, object] = {name: draw(rng) for name in ("w", "w2", "w3")}
    values |= {name: draw_name(rng) for name in ("n", "n2", "n3")}
    return values | {"c": rng.choice(_CITIES), "c2": rng.choice(_CITIES), "y": rng.randint(1200, 2030)} | _amounts(rng)


def _amounts(rng: random.Random) -> dict[str, object]:
    return {"k": rng.randint(2, 200), "k2": rng.randint(2, 200)}
