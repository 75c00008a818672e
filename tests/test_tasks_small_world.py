import json
import random
import re
from itertools import pairwise
from pathlib import Path

import pytest

from nanochat.data.chat import as_parts, check_conversation, visible_text
from nanochat.engine.calculator import calculate
from tasks import small_world
from tasks.small_world import EXAMS, SKILLS, Exam, SmallWorld, is_right
from tasks.small_world.skills import DECLINED, draw_numbers
from tasks.small_world.words import ask, template, world
from tasks.spelling import SPLITS, split_of

FILES = sorted(Path(small_world.__file__).parent.glob("*.json"))
LONG_TABLES = ("story", "story_questions", "study", "text_work", "errands")


def plain(phrasing: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+|\{\w+\}|[+*-]", phrasing.lower()))


def texts(tree, split: str = ""):
    """All texts in a table, each with its split, "" where it has none."""
    if isinstance(tree, dict):
        for key, branch in tree.items():
            yield from texts(branch, key if key in SPLITS else split)
    elif isinstance(tree, list):
        for item in tree:
            yield from texts(item, split)
    elif isinstance(tree, str):
        yield split, tree


def questions(task) -> list[str]:
    return [m["content"] for conversation in task for m in conversation["messages"] if m["role"] == "user"]


def test_conversations_are_valid_and_the_same_everywhere():
    state = random.getstate()
    first, again = ([SmallWorld(500, "train")[i] for i in order] for order in (range(500), reversed(range(500))))
    assert random.getstate() == state
    assert first == again[::-1]
    assert len({json.dumps(conversation) for conversation in first[:300]}) > 295
    assert SmallWorld(300, "train", edition="other")[0] != first[0]
    for conversation in first:
        check_conversation(conversation)
        for message in conversation["messages"]:  # tool results are the calculator's
            for call, output in pairwise(as_parts(message["content"])):
                if call["type"] == "python":
                    assert output == {"type": "python_output", "text": str(calculate(call["text"]))}


@pytest.mark.parametrize("name", SKILLS)
def test_only_the_answers_to_what_is_outside_say_that_they_do_not_know(name):
    for i in range(200):
        for exchange in SKILLS[name](random.Random(i), "train"):
            assert (DECLINED in visible_text(exchange.answer)) == (name == "outside"), exchange


def test_outside_questions_are_long_in_training_only_and_of_every_form():
    asked = {split: [SKILLS["outside"](random.Random(i), split)[0].question for i in range(3000)] for split in SPLITS}
    assert not [question for questions in asked.values() for question in questions if re.search(r"[{}]", question)]
    assert len(set(asked["train"])) > 2900
    long = {split: sum(len(question) > 120 for question in questions) / 3000 for split, questions in asked.items()}
    assert 0.15 < long["train"] < 0.4
    assert long["validation"] < 0.01 > long["test"]
    beginnings = [re.split(r"\{\w+\}", phrasing)[0].strip() for name in LONG_TABLES for phrasing in world()[name]]
    plain_asked = "\n".join(asked["train"]).lower()
    assert all(beginning.lower() in plain_asked for beginning in beginnings if len(beginning) > 2)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_entry_of_a_table_is_given_twice(path):
    def check(pairs):
        assert len(dict(pairs)) == len(pairs), pairs
        return dict(pairs)

    json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=check)
    assert len(FILES) == 3


def test_facts_are_a_few_hundred_questions_unique_and_every_split_has_phrasings_of_its_own():
    assert sum(len(relation["facts"]) for relation in world()["relations"].values()) > 500
    for name, relation in world()["relations"].items():
        trained = relation["questions"]["train"]
        assert len(set(map(plain, trained))) == len(trained) >= 8, name
    for kind in ("relations", "identity", "small_talk", "memories"):
        for name, table in world()[kind].items():
            assert tuple(table["questions"]) == SPLITS, name
            assert all(table["questions"].values()), name


def test_no_phrasing_of_validation_or_test_is_trained_on_or_shared():
    found = {split: {plain(text) for where, text in texts(world()) if where == split} for split in ("", *SPLITS)}
    assert not (found["train"] | found[""]) & (found["validation"] | found["test"])
    assert not found["validation"] & found["test"]
    assert world()["held_out"] == {template(text) for where, text in texts(world()) if where in ("validation", "test")}


def test_no_variation_of_a_phrasing_is_held_out():
    held_out, politeness = world()["held_out"], world()["politeness"]
    candidates = 0
    for phrasing in ("Spell {w}.", "Add {a} and {b}.", "What are you?", "How are you doing?"):
        asked = {ask(random.Random(i), phrasing, w="{w}", a="{a}", b="{b}") for i in range(3000)}
        assert len(asked) > 20
        assert not {template(question) for question in asked} & held_out
        forms = [form.format(p=phrasing[0].lower() + phrasing[1:-1]) for _, form in texts(politeness) if "{p}" in form]
        candidates += any(template(form) in held_out for form in forms)
    assert candidates >= 3, "the guard was needed"


@pytest.mark.parametrize("split", SPLITS)
def test_sums_and_words_belong_to_their_split(split):
    for i in range(200):
        for subject, pattern in (("sums", r"(\d+)([+-])(\d+)"), ("letters", r'"(\w+)"\.count.*')):
            for exchange in SKILLS[subject](random.Random(i), split):
                [call] = [part["text"] for part in exchange.answer if part["type"] == "python"]
                key = re.fullmatch(pattern, call).groups()
                if "+" in key:
                    key = (min(key[::2], key=int), "+", max(key[::2], key=int))  # 5 + 3 belongs with 3 + 5
                assert split_of("".join(key)) == split
    assert {draw_numbers(random.Random(i), split, "+", 7)[0] for i in range(20)} == {7}


def test_exams_of_the_test_split_ask_nothing_that_is_trained_on():
    trained = set(map(plain, questions(SmallWorld(5000, "train"))))
    for subject in ("sums", "letters", "facts", "identity", "outside"):
        asked = [plain(conversation["messages"][-2]["content"]) for conversation in Exam(subject, "test")]
        # only a short continuation of a sum, such as "+ 5", may occur in both
        assert sum(question in trained for question in asked) <= 0.01 * len(asked), subject


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("subject", EXAMS)
def test_exams_accept_their_own_answers_and_no_others(subject, split):
    exam = Exam(subject, split)
    assert len(exam) >= (10 if subject in ("identity", "small_talk") else 300)
    wrong = "I don't know that." if subject != "outside" else "The king of Spain."
    for conversation in exam:
        check_conversation(conversation)
        assert exam.evaluate(conversation, conversation["messages"][-1]["content"])
        assert not exam.evaluate(conversation, "E" if subject == "choice_letters" else wrong)
        assert exam.reward(conversation, wrong) == 0


def test_choices_offer_the_right_answer_once():
    exam = Exam("choice_letters", "test")
    assert (exam.kind, exam.baseline) == ("categorical", 0.25)
    rights = [conversation["messages"][-1]["content"] for conversation in exam]
    assert all(right in exam.letters(conversation) for right, conversation in zip(rights, exam, strict=True))
    assert all(rights.count(letter) > 0.15 * len(rights) for letter in "ABC")


@pytest.mark.parametrize(
    ("judge", "answer", "right"),
    [
        ({"number": 42}, "That is 42.", True), ({"number": 42}, "42 and 3 is 45.", False),
        ({"words": ["New Delhi"], "never": ["Paris"]}, "It is new delhi!", True),
        ({"words": ["Paris"], "never": ["Rome"]}, "It is Paris or Rome.", False),
        ({"words": ["ice"]}, "It is nice.", False),
        ({"words": ["program|language model", "small"]}, "I am a small language model.", True),
        ({"only": "Paris"}, "paris.", True), ({"only": "Paris"}, "It is Paris.", False),
        ({"spelled": "cat"}, "It is c a t.", True), ({"spelled": "cat"}, "It is s c a t.", False),
        ({"spelled": "cat"}, "It is spelled c a t s.", False),
        ({"declined": True}, "Sorry, I don't know.", True), ({"declined": False}, "It is Paris.", True),
        ({"declined": True}, "It is Paris.", False), ({"declined": False}, "I don't know that.", False),
        ({"number": 2}, [{"type": "python_output", "text": "2"}, {"type": "text", "text": "Yes."}], False),
    ],
)  # fmt: skip
def test_judges_by_kind(judge, answer, right):
    assert is_right(judge, answer) == right
