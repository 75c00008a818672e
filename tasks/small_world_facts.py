"""The facts of the small world, and the ways to ask for them that are trained on.

Facts are common knowledge, every sentence is ours. The phrasings that are never trained on stand in
`small_world_unseen.json`.
"""

from typing import NamedTuple

# The tables are easier to read with several entries to a line.
# fmt: off


class Relation(NamedTuple):
    """Facts of one kind: `facts` from what is asked about, {x}, to the answer, {y}. `follow_ups` ask the same of
    another {x} without saying what is meant."""

    facts: dict[str, str]
    questions: tuple[str, ...]
    answer: str
    follow_ups: tuple[str, ...] = ("And {x}?", "What about {x}?", "And for {x}?", "How about {x}?")


def _facts(text: str) -> dict[str, str]:
    """`_facts("a=b, c=d") == {"a": "b", "c": "d"}`"""
    pairs = [pair.split("=") for pair in " ".join(text.split()).split(", ")]
    facts = dict(pairs)
    assert len(facts) == len(pairs), text
    return facts


def _swapped(facts: dict[str, str]) -> dict[str, str]:
    return {answer: subject for subject, answer in facts.items()}


_CAPITALS = _facts("""
    France=Paris, Germany=Berlin, Italy=Rome, Spain=Madrid, Portugal=Lisbon, England=London, Ireland=Dublin,
    Scotland=Edinburgh, Austria=Vienna, Switzerland=Bern, Belgium=Brussels, the Netherlands=Amsterdam,
    Denmark=Copenhagen, Sweden=Stockholm, Norway=Oslo, Finland=Helsinki, Iceland=Reykjavik, Poland=Warsaw,
    the Czech Republic=Prague, Hungary=Budapest, Greece=Athens, Turkey=Ankara, Russia=Moscow, Ukraine=Kyiv,
    Romania=Bucharest, Bulgaria=Sofia, Croatia=Zagreb, Egypt=Cairo, Morocco=Rabat, Kenya=Nairobi, Ethiopia=Addis Ababa,
    Ghana=Accra, Senegal=Dakar, Japan=Tokyo, China=Beijing, South Korea=Seoul, India=New Delhi, Thailand=Bangkok,
    Vietnam=Hanoi, Indonesia=Jakarta, Iran=Tehran, Iraq=Baghdad, Australia=Canberra, New Zealand=Wellington,
    Canada=Ottawa, the United States=Washington, Mexico=Mexico City, Cuba=Havana, Brazil=Brasilia,
    Argentina=Buenos Aires, Chile=Santiago, Peru=Lima, Colombia=Bogota, Venezuela=Caracas
""")
_OPPOSITES = _facts("""
    hot=cold, big=small, up=down, fast=slow, happy=sad, day=night, open=closed, wet=dry, old=young, high=low,
    full=empty, hard=soft, light=dark, loud=quiet, rich=poor, early=late, good=bad, left=right, strong=weak, thick=thin,
    long=short, clean=dirty, sweet=sour, near=far, first=last, inside=outside, always=never, begin=end, buy=sell,
    push=pull, win=lose, love=hate, true=false, deep=shallow, wide=narrow, rough=smooth, brave=afraid, cheap=expensive,
    alive=dead, above=below, before=after, give=take, awake=asleep, friend=enemy, question=answer, arrive=leave,
    north=south, east=west, summer=winter
""")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)
_ORDINALS = (
    "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth", "tenth", "eleventh",
    "twelfth",
)


def _next(names: tuple[str, ...]) -> dict[str, str]:
    return dict(zip(names, names[1:] + names[:1], strict=True))


RELATIONS = {
    "capital": Relation(
        _CAPITALS,
        (
            "What is the capital of {x}?", "What's the capital of {x}?", "Which city is the capital of {x}?",
            "Name the capital of {x}.", "Tell me the capital of {x}.", "Do you know the capital of {x}?",
            "What is {x}'s capital?", "Capital of {x}?", "What is the capital city of {x}?",
            "Can you tell me the capital of {x}?", "{x}: which city is its capital?", "I forgot the capital of {x}.",
            "Which capital does {x} have?", "The capital of {x} is?", "What would the capital of {x} be?",
            "Say the capital of {x}.", "Which city governs {x}?", "I am looking for the capital of {x}.",
            "Which city is at the head of {x}?", "In {x}, which city is the capital?",
            "Is there a capital of {x}, and which?",
        ),
        "The capital of {x} is {y}.",
        ("And of {x}?", "And {x}?", "What about {x}?", "And the capital of {x}?", "How about {x}?"),
    ),
    "country": Relation(
        _swapped(_CAPITALS),
        (
            "Which country has the capital {x}?", "{x} is the capital of which country?",
            "What country is {x} the capital of?", "Of which country is {x} the capital?", "In which country is {x}?",
            "What country is {x} in?", "Which country does {x} belong to?", "Where is {x}?",
            "Name the country whose capital is {x}.", "Tell me where {x} is.", "Do you know in which country {x} lies?",
            "{x} is in which country?", "In what country do I find {x}?", "Who has {x} as the capital?",
            "Which country's capital is {x}?", "To what country does {x} belong?", "Whose city is {x}?",
            "Where do I find {x}?", "Where in the world is {x}?", "Which country would I go to for {x}?",
            "Where does {x} lie?",
        ),
        "{x} is the capital of {y}.",
    ),
    "opposite": Relation(
        _OPPOSITES | _swapped(_OPPOSITES),
        (
            "What is the opposite of {x}?", "What's the opposite of {x}?", "Opposite of {x}?",
            "Tell me the opposite of {x}.", "Which word is the opposite of {x}?",
            "What is the opposite of the word {x}?", "Give me the opposite of {x}.", "Name the opposite of {x}.",
            "{x}: what is the opposite?", "If something is not {x}, what is its opposite?",
            "Do you know the opposite of {x}?", "I need the opposite of {x}.", "The opposite of {x} is?",
            "What is not {x}?", "What would you call the opposite of {x}?", "Which is the opposite of {x}?",
            "What word is opposite to {x}?", "How do you call the opposite of {x}?", "{x} and its opposite?",
            "Do you have a word for the opposite of {x}?", "{x} is the opposite of what?",
        ),
        "The opposite of {x} is {y}.",
        ("And of {x}?", "And the opposite of {x}?", "What about {x}?", "And {x}?"),
    ),
    "day after": Relation(
        _next(_DAYS),
        (
            "Which day comes after {x}?", "What day comes after {x}?", "What day is it the day after {x}?",
            "What is the day after {x}?", "Which day follows {x}?", "Today is {x}. What day is tomorrow?",
            "If today is {x}, what day is tomorrow?", "It is {x} today. And tomorrow?", "What comes after {x}?",
            "Tell me the day after {x}.", "Which day follows on {x}?", "What follows {x}?",
            "Say which day comes after {x}.", "After {x}, which day is it?",
            "Tomorrow, if it is {x} today, is what day?", "What is the next day after {x}?",
            "Yesterday was {x}. What day is today?", "Name the day after {x}.",
        ),
        "After {x} comes {y}.",
        ("And after {x}?", "What comes after {x}?", "And the day after {x}?"),
    ),
    "day before": Relation(
        _swapped(_next(_DAYS)),
        (
            "Which day comes before {x}?", "What day comes before {x}?", "What is the day before {x}?",
            "Today is {x}. What day was yesterday?", "If today is {x}, what day was yesterday?",
            "It is {x} today. What was yesterday?", "What comes before {x}?", "Tell me the day before {x}.",
            "Which day is right before {x}?", "Which day is followed by {x}?", "What day is ahead of {x}?",
            "Say which day comes before {x}.", "Before {x}, which day was it?", "Tomorrow is {x}. What day is today?",
            "Name the day before {x}.", "What was the day before {x}?", "Yesterday, if it is {x} today, was what day?",
        ),
        "Before {x} comes {y}.",
        ("And before {x}?", "What comes before {x}?", "And the day before {x}?"),
    ),
    "month after": Relation(
        _next(_MONTHS),
        (
            "Which month comes after {x}?", "What month comes after {x}?", "What is the month after {x}?",
            "Which month follows {x}?", "It is {x}. What is next month?", "If it is {x} now, what is the next month?",
            "What comes after {x}?", "Tell me the month after {x}.", "Which month follows on {x}?", "What follows {x}?",
            "Say which month comes after {x}.", "After {x}, which month is it?",
            "Next month, if it is {x} now, is what?", "What month is it after {x}?", "Name the month after {x}.",
            "{x} is over. Which month is it now?",
        ),
        "After {x} comes {y}.",
        ("And after {x}?", "What comes after {x}?", "And the month after {x}?"),
    ),
    "month before": Relation(
        _swapped(_next(_MONTHS)),
        (
            "Which month comes before {x}?", "What month comes before {x}?", "What is the month before {x}?",
            "It is {x}. What was last month?", "If it is {x} now, what was the month before?", "What comes before {x}?",
            "Tell me the month before {x}.", "Which month is right before {x}?", "Which month is followed by {x}?",
            "What month is ahead of {x}?", "Say which month comes before {x}.", "Before {x}, which month was it?",
            "Name the month before {x}.", "What was the month before {x}?", "Last month, if it is {x} now, was what?",
        ),
        "Before {x} comes {y}.",
        ("And before {x}?", "What comes before {x}?", "And the month before {x}?"),
    ),
    "month days": Relation(
        _facts("""January=31, March=31, April=30, May=31, June=30, July=31, August=31, September=30, October=31,
            November=30, December=31, February=28"""),
        (
            "How many days does {x} have?", "How many days are in {x}?", "How many days are there in {x}?",
            "How long is {x} in days?", "Number of days in {x}?", "Tell me how many days {x} has.",
            "What is the number of days in {x}?", "Do you know how many days {x} has?", "{x} has how many days?",
            "What is the length of {x} in days?", "Say how many days {x} has.", "Of how many days is {x}?",
            "Count the days of {x}.", "How many days do we have in {x}?", "How many days go into {x}?",
            "How long does {x} last?",
        ),
        "{x} has {y} days.",
    ),
    "month number": Relation(
        dict(zip(_ORDINALS, _MONTHS, strict=True)),
        (
            "Which is the {x} month?", "What is the {x} month of the year?", "Which month is the {x}?",
            "Name the {x} month.", "What's the {x} month called?", "Tell me the {x} month of the year.",
            "Which month comes {x} in the year?", "What do we call the {x} month?", "{x} month of the year?",
            "What is the month number {x}?", "Say which month is the {x}.", "Do you know the {x} month?",
            "The {x} month is?", "In the year, which month is the {x}?", "What would be the {x} month?",
            "Give me the {x} month of the year.",
        ),
        "The {x} month is {y}.",
        ("And the {x}?", "What about the {x}?", "And the {x} one?"),
    ),
    "colour": Relation(
        _facts("""a banana=yellow, grass=green, the sky=blue, snow=white, coal=black, a carrot=orange, blood=red,
            a lemon=yellow, a tomato=red, milk=white, a frog=green, chocolate=brown, a flamingo=pink, the sun=yellow,
            a pumpkin=orange, a cucumber=green, a strawberry=red, a crow=black, a swan=white, an elephant=grey,
            a polar bear=white, a cherry=red, gold=yellow, the sea=blue, a leaf=green, an egg yolk=yellow, mud=brown,
            a fire engine=red, spinach=green, salt=white, a plum=purple, a raven=black"""),
        (
            "What colour is {x}?", "What color is {x}?", "Which colour does {x} have?", "What is the colour of {x}?",
            "What is the color of {x}?", "Tell me the colour of {x}.", "What colour does {x} have?",
            "Do you know what colour {x} is?", "Which color is {x}?", "Colour of {x}?", "How is {x} coloured?",
            "What is {x} like in colour?", "Say the colour of {x}.", "In which colour do I paint {x}?",
            "I want to paint {x}. In which colour?", "What colour would {x} be?", "What's the colour of {x}?",
            "Name the colour of {x}.", "{x} has which colour?",
        ),
        "The colour of {x} is {y}.",
    ),
    "mixing": Relation(
        _facts("""red and yellow=orange, blue and yellow=green, red and blue=purple, red and white=pink,
            black and white=grey, yellow and blue=green, yellow and red=orange, blue and red=purple"""),
        (
            "What do you get when you mix {x}?", "Which colour do {x} make?", "What colour comes out if I mix {x}?",
            "I mix {x}. What colour do I get?", "Mix {x}: what colour is it?", "Which colour is {x} mixed?",
            "What do {x} make together?", "What happens if you mix {x}?", "If I put {x} together, what colour is that?",
            "What colour is made of {x}?", "Which colour comes from {x}?", "What is the mix of {x}?",
            "When you mix {x}, what do you get?", "What do {x} give?",
        ),
        "{x} make {y}.",
    ),
    "sound": Relation(
        _facts("""a dog=woof, a cat=meow, a cow=moo, a sheep=baa, a duck=quack, a pig=oink, a rooster=cock-a-doodle-doo,
            a frog=ribbit, a bee=buzz, a lion=roar, a snake=hiss, an owl=hoot, a mouse=squeak, a horse=neigh,
            a bird=tweet, a wolf=howl, a donkey=hee-haw, a turkey=gobble"""),
        (
            "What does {x} say?", "What sound does {x} make?", "Which sound does {x} make?", "How does {x} sound?",
            "What noise does {x} make?", "Which noise comes from {x}?", "Tell me what {x} says.",
            "What do you hear from {x}?", "What is the sound of {x}?", "Do you know what {x} says?",
            "If I hear {x}, what do I hear?", "Say what {x} says.", "What is the voice of {x}?",
            "What does {x} sound like to you?", "When you hear {x}, what is it?", "How does {x} go?",
            "Name the sound of {x}.", "What kind of sound comes from {x}?",
        ),
        "{x} says {y}.",
    ),
    "young": Relation(
        _facts("""dog=puppy, cat=kitten, cow=calf, sheep=lamb, duck=duckling, pig=piglet, horse=foal, bear=cub,
            goat=kid, hen=chick, goose=gosling, deer=fawn, frog=tadpole, kangaroo=joey, swan=cygnet, owl=owlet"""),
        (
            "What is a baby {x} called?", "What do you call a young {x}?", "What do you call a baby {x}?",
            "What is the name of a young {x}?", "What is a young {x} called?", "How do we call the young of a {x}?",
            "Tell me what a baby {x} is called.", "Which word means a young {x}?", "A baby {x} is a?",
            "What is the baby of a {x}?", "Say what a young {x} is called.", "How is a baby {x} called?",
            "Name the young of a {x}.", "What is a small {x} called?", "What do people call a baby {x}?",
            "The young of a {x} is called?", "Which name does a baby {x} have?",
        ),
        "A young {x} is called a {y}.",
        ("And a {x}?", "And a baby {x}?", "What about a {x}?"),
    ),
    "legs": Relation(
        _facts("""a spider=8, a dog=4, a cat=4, an ant=6, a bird=2, a fish=0, a horse=4, a bee=6, a snake=0, a human=2,
            a cow=4, an octopus=8, a fly=6, a chicken=2, a crab=10, an elephant=4, a duck=2, a butterfly=6,
            a worm=0"""),
        (
            "How many legs does {x} have?", "How many legs has {x} got?", "Number of legs of {x}?",
            "Tell me how many legs {x} has.", "On how many legs does {x} walk?", "What is the number of legs of {x}?",
            "Count the legs of {x}.", "Do you know how many legs {x} has?", "{x} has how many legs?",
            "With how many legs does {x} walk?", "Say how many legs {x} has.", "How many legs would you count on {x}?",
            "Do you know the number of legs of {x}?", "How many feet does {x} walk on?",
            "How many legs do I see on {x}?", "{x}: how many legs are there?",
        ),
        "{x} has {y} legs.",
    ),
    "home": Relation(
        _facts("""a bee=hive, a bird=nest, a dog=kennel, a horse=stable, a spider=web, a bear=den, a rabbit=burrow,
            a pig=sty, a fish=water, a hen=coop, a lion=den, an ant=anthill, a cow=barn, a squirrel=tree, a king=castle,
            a camel=desert, a penguin=ice, a monkey=jungle"""),
        (
            "Where does {x} live?", "What is the home of {x}?", "What is the home of {x} called?",
            "Where is {x} at home?", "In what does {x} live?", "Which place is the home of {x}?",
            "Tell me where {x} lives.", "Do you know where {x} lives?", "Where would you find {x}?",
            "In which home does {x} live?", "Say where {x} lives.", "What does {x} live in?",
            "What is the place where {x} lives called?", "Where can one find {x}?", "Where do I have to look for {x}?",
            "Name the home of {x}.", "Where does {x} sleep?",
        ),
        "{x} lives in the {y}.",
    ),
    "unit": Relation(
        _facts("""seconds are in a minute=60, minutes are in an hour=60, hours are in a day=24, days are in a week=7,
            days are in a year=365, months are in a year=12, weeks are in a year=52, years are in a century=100,
            years are in a decade=10, centimetres are in a metre=100, metres are in a kilometre=1000,
            grams are in a kilogram=1000, millimetres are in a centimetre=10, inches are in a foot=12,
            feet are in a yard=3, cents are in a dollar=100, things are in a dozen=12, things are in a pair=2,
            years are in a millennium=1000, millilitres are in a litre=1000, seasons are in a year=4,
            players are in a football team=11, letters are in the alphabet=26, minutes are in half an hour=30,
            colours are in a rainbow=7, wheels are on a car=4, wheels are on a bicycle=2, fingers are on a hand=5"""),
        (
            "How many {x}?", "Do you know how many {x}?", "Tell me how many {x}.", "Can you tell me how many {x}?",
            "I want to know how many {x}.", "How many {x}, please?", "Say how many {x}.",
            "What do you think, how many {x}?", "Is it known how many {x}?", "Would you know how many {x}?",
            "How many {x}, do you know?", "What is it: how many {x}?", "I need to know how many {x}.",
            "Do you remember how many {x}?", "Give me the number: how many {x}?",
        ),
        "{y} {x}.",
        ("And how many {x}?", "How many {x}?", "And can you say how many {x}?"),
    ),
    "sides": Relation(
        _facts("""a triangle=3, a square=4, a pentagon=5, a hexagon=6, an octagon=8, a rectangle=4, a heptagon=7,
            a circle=0"""),
        (
            "How many sides does {x} have?", "How many corners does {x} have?", "How many sides has {x} got?",
            "Number of sides of {x}?", "Tell me how many sides {x} has.", "What is the number of sides of {x}?",
            "Count the corners of {x}.", "{x} has how many sides?", "How many corners are on {x}?",
            "Say how many sides {x} has.", "How many sides do you see on {x}?", "How many corners do I count on {x}?",
            "Do you know how many corners {x} has?", "With how many sides is {x} drawn?",
        ),
        "{x} has {y} sides.",
    ),
    "plural": Relation(
        _facts("""mouse=mice, child=children, foot=feet, tooth=teeth, man=men, woman=women, goose=geese, leaf=leaves,
            wolf=wolves, knife=knives, sheep=sheep, city=cities, baby=babies, box=boxes, potato=potatoes, life=lives,
            fish=fish, ox=oxen, person=people, house=houses, half=halves, berry=berries, bus=buses, hero=heroes"""),
        (
            "What is the plural of {x}?", "What's the plural of {x}?", "Plural of {x}?", "Tell me the plural of {x}.",
            "One {x}, two what?", "What do you call more than one {x}?", "Which word is the plural of {x}?",
            "How do I write {x} in the plural?", "Give me the plural of {x}.", "If there are two, what is {x} called?",
            "How do you call {x} if there are two?", "Say {x} in the plural.", "What are many {x} called?",
            "How do we say {x} when there are more?", "More than one {x} are called?", "Two of {x} are what?",
            "What form does {x} have in the plural?", "Many of a {x} are what?", "What is more than one {x}?",
        ),
        "The plural of {x} is {y}.",
        ("And of {x}?", "And the plural of {x}?", "What about {x}?"),
    ),
    "past": Relation(
        _facts("""go=went, see=saw, eat=ate, run=ran, come=came, write=wrote, sing=sang, swim=swam, think=thought,
            bring=brought, teach=taught, catch=caught, speak=spoke, drive=drove, fly=flew, sleep=slept, find=found,
            know=knew, make=made, tell=told, take=took, give=gave, begin=began, break=broke, buy=bought, fall=fell"""),
        (
            "What is the past tense of {x}?", "What's the past of {x}?", "Past tense of {x}?",
            "Today I {x}, and yesterday I?", "Tell me the past tense of {x}.", "How do I say {x} in the past?",
            "Which word is the past tense of {x}?", "Put {x} into the past tense.", "Give me the past tense of {x}.",
            "What is {x} if it was yesterday?", "Say {x} in the past tense.", "What form does {x} have in the past?",
            "How is {x} written in the past?", "Yesterday I did {x}: which word is that?",
            "What do I say for {x} in the past?", "Which is the past form of {x}?",
        ),
        "The past tense of {x} is {y}.",
        ("And of {x}?", "And the past tense of {x}?", "What about {x}?"),
    ),
    "language": Relation(
        _facts("""France=French, Germany=German, Italy=Italian, Spain=Spanish, Portugal=Portuguese, England=English,
            Japan=Japanese, China=Chinese, Russia=Russian, Poland=Polish, Greece=Greek, Turkey=Turkish, Sweden=Swedish,
            Denmark=Danish, Norway=Norwegian, Finland=Finnish, Hungary=Hungarian, Brazil=Portuguese, Mexico=Spanish,
            Austria=German, Egypt=Arabic, Vietnam=Vietnamese, Thailand=Thai, Australia=English"""),
        (
            "Which language is spoken in {x}?", "What language do people speak in {x}?", "What do they speak in {x}?",
            "What is the language of {x}?", "Which language do they speak in {x}?", "Tell me the language of {x}.",
            "Language of {x}?", "What language is used in {x}?", "Which language do I need in {x}?",
            "In {x}, what do people speak?", "Say which language is spoken in {x}.",
            "What language would I hear in {x}?", "Which language do people use in {x}?", "Name the language of {x}.",
            "People in {x} speak what?", "How do people talk in {x}?",
        ),
        "People in {x} speak {y}.",
        ("And in {x}?", "What about {x}?", "And in {x}, what do they speak?"),
    ),
    "continent": Relation(
        _facts("""France=Europe, Germany=Europe, Italy=Europe, Spain=Europe, Norway=Europe, Poland=Europe,
            Greece=Europe, Egypt=Africa, Kenya=Africa, Morocco=Africa, Ghana=Africa, Japan=Asia, China=Asia, India=Asia,
            Thailand=Asia, Vietnam=Asia, Brazil=South America, Peru=South America, Chile=South America,
            Argentina=South America, Canada=North America, Mexico=North America, the United States=North America,
            Cuba=North America"""),
        (
            "Which continent is {x} on?", "On which continent is {x}?", "What continent is {x} in?",
            "Which continent does {x} belong to?", "{x} is on which continent?", "Tell me the continent of {x}.",
            "In what part of the world is {x}?", "Continent of {x}?", "What is the continent of {x}?",
            "Where in the world is {x}, on which continent?", "Say on which continent {x} is.",
            "What continent do I find {x} on?", "To which continent does {x} belong?",
            "Name the continent where {x} is.", "Of which continent is {x} a part?",
            "In which part of the world do I find {x}?",
        ),
        "{x} is in {y}.",
    ),
    "kind": Relation(
        _facts("""an apple=fruit, a pear=fruit, a banana=fruit, a cherry=fruit, a carrot=vegetable, a potato=vegetable,
            an onion=vegetable, spinach=vegetable, a rose=flower, a tulip=flower, a daisy=flower, an oak=tree,
            a pine=tree, a birch=tree, a dog=animal, a horse=animal, a lion=animal, an eagle=bird, an owl=bird,
            a parrot=bird, a penguin=bird, a salmon=fish, a shark=fish, a trout=fish, a bee=insect, an ant=insect,
            a fly=insect, a hammer=tool, a saw=tool, a piano=instrument, a violin=instrument, a drum=instrument,
            a chair=furniture, a table=furniture, a shirt=clothing, a coat=clothing, gold=metal, iron=metal, red=colour,
            green=colour"""),
        (
            "What is {x}?", "What kind of thing is {x}?", "What sort of thing is {x}?", "Which kind of thing is {x}?",
            "Tell me what {x} is.", "To which kind does {x} belong?", "What do you call something like {x}?",
            "{x} is a kind of what?", "Do you know what {x} is?", "What would you call {x}?",
            "Say what kind of thing {x} is.", "Of what sort is {x}?", "What type of thing would {x} be?",
            "Into which group does {x} belong?", "{x} is what kind of thing?", "What is {x}, what kind of thing?",
            "How would you describe {x}, what kind is it?",
        ),
        "{x} is a kind of {y}.",
    ),
    "sense": Relation(
        _facts("""see=eyes, hear=ears, smell=nose, taste=tongue, walk=legs, bite=teeth, think=brain, breathe=lungs,
            hold things=hands, pump blood=heart"""),
        (
            "What do we {x} with?", "With what do we {x}?", "Which part of the body do we use to {x}?",
            "What do people use to {x}?", "What do you need to {x}?", "Which part of the body is there to {x}?",
            "Tell me what we {x} with.", "What part of me do I {x} with?", "With which part of the body does one {x}?",
            "Say what we {x} with.", "Which part do I {x} with?", "What does one need to {x}?",
            "What does a person use to {x}?", "What is used to {x}?", "Which part helps us to {x}?",
        ),
        "To {x} we use the {y}.",
        ("And to {x}?", "And what to {x}?", "What about to {x}?"),
    ),
    "planet": Relation(
        _facts("""first=Mercury, second=Venus, third=Earth, fourth=Mars, fifth=Jupiter, sixth=Saturn, seventh=Uranus,
            eighth=Neptune"""),
        (
            "Which is the {x} planet from the sun?", "What is the {x} planet?", "Name the {x} planet from the sun.",
            "Which planet is the {x} from the sun?", "Tell me the {x} planet.", "What's the {x} planet called?",
            "Which planet comes {x}, counted from the sun?", "{x} planet from the sun?",
            "What would be the {x} planet?", "Say which planet is the {x}.",
            "Counted from the sun, what is the {x} planet?", "Give me the {x} planet.", "Do you know the {x} planet?",
            "The {x} planet is?", "From the sun, what planet is the {x}?",
        ),
        "The {x} planet from the sun is {y}.",
        ("And the {x}?", "What about the {x}?", "And the {x} one?"),
    ),
    "letter after": Relation(
        {a: b for a, b in zip("abcdefghijklmnopqrstuvwxy", "bcdefghijklmnopqrstuvwxyz", strict=True)},
        (
            "Which letter comes after {x}?", "What letter comes after {x}?",
            "Which letter follows {x} in the alphabet?", "What comes after {x} in the alphabet?",
            "What is the letter after {x}?", "Tell me the letter after {x}.", "What is the next letter after {x}?",
            "In the alphabet, what follows {x}?", "What is after {x} in the alphabet?", "Say the letter after {x}.",
            "After {x}, which letter is next?", "Give me the letter after {x}.", "Which letter is behind {x}?",
            "What letter is it after {x}?", "Do you know the letter that follows {x}?",
        ),
        "After {x} comes {y}.",
        ("And after {x}?", "And the letter after {x}?", "What comes after {x}?"),
    ),
}
