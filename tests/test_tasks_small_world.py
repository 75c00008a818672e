import json
import random
import re
from itertools import pairwise

import pytest

from nanochat.data.chat import as_parts, check_conversation, visible_text
from nanochat.engine.calculator import calculate
from tasks import small_world_outside, small_world_words
from tasks import small_world_text as text
from tasks.small_world import EXAMS, SKILLS, Exam, SmallWorld, is_right
from tasks.small_world_facts import RELATIONS
from tasks.small_world_words import UNSEEN, sum_key
from tasks.spelling import split_of

SPLITS = ("train", "validation", "test")
LONG_TABLES = tuple(
    getattr(small_world_outside, name) for name in ("STORY", "STORY_QUESTIONS", "STUDY", "TEXT_WORK", "ERRANDS")
)


def plain(phrasing: str) -> str:
    return " ".join(re.findall(r"[a-z0-9]+|\{\w+\}|[+*-]", phrasing.lower()))


def phrasings(tree) -> set[str]:
    if isinstance(tree, dict):
        return set().union(*map(phrasings, tree.values()))
    return {plain(phrasing) for phrasing in tree}


def trained_phrasings() -> set[str]:
    relations = [table for r in RELATIONS.values() for table in (r.questions, r.follow_ups)]
    topics = [topic.questions for table in (text.IDENTITY, text.SMALL_TALK) for topic in table.values()]
    memories = [table for memory in text.MEMORIES.values() for table in memory[:2]]
    others = [
        text.SUMS, text.DIFFERENCES, text.MORE, text.LESS, text.PRODUCTS, text.COUNTS, text.SPELLINGS, text.NAMES,
        small_world_outside.OUTSIDE, *LONG_TABLES,
    ]  # fmt: skip
    return set().union(*map(phrasings, [*relations, *topics, *memories, *others]))


def questions(task) -> list[str]:
    return [m["content"] for conversation in task for m in conversation["messages"] if m["role"] == "user"]


# --- conversations -------------------------------------------------------------------------------


def test_conversations_are_in_order_and_the_same_everywhere():
    state = random.getstate()
    first, again = ([SmallWorld(300, "train")[i] for i in order] for order in (range(300), reversed(range(300))))
    assert random.getstate() == state
    assert first == again[::-1]
    for conversation in first:
        check_conversation(conversation)
    assert len({json.dumps(conversation) for conversation in first}) > 295
    assert SmallWorld(300, "train", edition="other")[0] != first[0]


def test_tool_results_are_the_calculators():
    for conversation in SmallWorld(500, "train"):
        for message in conversation["messages"]:
            parts = as_parts(message["content"])
            for call, output in pairwise(parts):
                if call["type"] == "python":
                    assert output == {"type": "python_output", "text": str(calculate(call["text"]))}


def test_only_the_answers_to_what_is_outside_say_that_they_do_not_know():
    for name, skill in SKILLS.items():
        for i in range(200):
            for exchange in skill(random.Random(i), "train"):
                assert (small_world_outside.DECLINED in visible_text(exchange.answer)) == (name == "outside"), exchange


def test_outside_questions_are_long_in_training_only_and_of_every_form():
    asked = {split: [small_world_outside.ask_outside(random.Random(i), split) for i in range(3000)] for split in SPLITS}
    assert not [question for questions in asked.values() for question in questions if re.search(r"[{}]", question)]
    assert len(set(asked["train"])) > 2900
    long = {split: sum(len(question) > 120 for question in questions) / 3000 for split, questions in asked.items()}
    assert 0.15 < long["train"] < 0.4
    assert long["validation"] < 0.01 > long["test"]
    beginnings = [re.split(r"\{\w+\}", phrasing)[0].strip() for table in LONG_TABLES for phrasing in table]
    plain_asked = "\n".join(asked["train"]).lower()
    assert all(beginning.lower() in plain_asked for beginning in beginnings if len(beginning) > 2)


def test_facts_are_a_few_hundred_and_unique():
    assert sum(len(relation.facts) for relation in RELATIONS.values()) > 500
    for name, relation in RELATIONS.items():
        assert len(relation.questions) >= 8, name
        assert len(set(map(plain, relation.questions))) == len(relation.questions), name


# --- what is never trained on --------------------------------------------------------------------


def test_no_phrasing_of_validation_or_test_is_trained_on_or_shared():
    unseen = json.loads(UNSEEN.read_text(encoding="utf-8"))
    validation, test = phrasings(unseen["validation"]), phrasings(unseen["test"])
    trained = trained_phrasings()
    assert not trained & validation
    assert not trained & test
    assert not validation & test


def test_no_way_of_asking_politely_leads_to_a_phrasing_that_is_held_out():
    held_out = small_world_words._held_out()
    candidates = 0
    for phrasing in ("Spell {w}.", "Add {a} and {b}.", "What are you?", "How are you doing?"):
        asked = {small_world_words.ask(random.Random(i), phrasing, w="{w}", a="{a}", b="{b}") for i in range(3000)}
        assert len(asked) > 20
        assert not {small_world_words._template(question) for question in asked} & held_out
        candidates += any(small_world_words._template(form.format(p=phrasing[0].lower() + phrasing[1:-1])) in held_out
                          for form in text.REQUESTS + text.INQUIRIES)  # fmt: skip
    assert candidates >= 3  # so that the guard was needed


def test_every_relation_and_topic_has_phrasings_of_its_own_in_each_split():
    unseen = json.loads(UNSEEN.read_text(encoding="utf-8"))
    tables = {
        "relations": RELATIONS, "identity": text.IDENTITY, "small_talk": text.SMALL_TALK, "memories": text.MEMORIES
    }  # fmt: skip
    for split in ("validation", "test"):
        for kind, table in tables.items():
            assert unseen[split][kind].keys() == table.keys()


@pytest.mark.parametrize("split", SPLITS)
def test_sums_and_words_belong_to_their_split(split):
    for subject, pattern in (("sums", r"\d+[+-]\d+"), ("letters", r'(?<=")\w+(?="\.)')):
        for i in range(200):
            for exchange in SKILLS[subject](random.Random(i), split):
                [call] = [part["text"] for part in exchange.answer if part["type"] == "python"]
                [key] = re.findall(pattern, call)
                if subject == "sums":
                    a, sign, b = re.fullmatch(r"(\d+)([+-])(\d+)", key).groups()
                    key = sum_key(int(a), int(b), sign)
                assert split_of(key) == split


def test_a_sum_belongs_with_the_one_of_the_other_order():
    assert sum_key(5, 3, "+") == sum_key(3, 5, "+")
    assert sum_key(5, 3, "-") != sum_key(3, 5, "-")


def test_exams_of_the_test_split_ask_nothing_that_is_trained_on():
    trained = set(map(plain, questions(SmallWorld(5000, "train"))))
    for subject in ("sums", "letters", "facts", "identity", "outside"):
        asked = [plain(conversation["messages"][-2]["content"]) for conversation in Exam(subject, "test")]
        # only what follows on a sum, such as "+ 5", may be short enough to be said again
        assert sum(question in trained for question in asked) <= 0.01 * len(asked), subject


# --- exams ---------------------------------------------------------------------------------------


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
    assert exam.kind == "categorical"
    rights = [conversation["messages"][-1]["content"] for conversation in exam]
    assert all(right in exam.letters(conversation) for right, conversation in zip(rights, exam, strict=True))
    assert all(rights.count(letter) > 0.15 * len(rights) for letter in "ABC")


def test_judges_by_kind():
    assert is_right({"number": 42}, "That is 42.")
    assert not is_right({"number": 42}, "42 and 3 is 45.")
    assert is_right({"words": ["New Delhi"], "never": ["Paris"]}, "It is new delhi!")
    assert not is_right({"words": ["Paris"], "never": ["Rome"]}, "It is Paris or Rome.")
    assert not is_right({"words": ["ice"]}, "It is nice.")
    assert is_right({"words": ["program|language model", "small"]}, "I am a small language model.")
    assert is_right({"only": "Paris"}, "paris.")
    assert not is_right({"only": "Paris"}, "It is Paris.")
    assert is_right({"spelled": "cat"}, "It is spelled c a t.")
    assert not is_right({"spelled": "cat"}, "It is spelled s c a t.")
    assert not is_right({"spelled": "cat"}, "It is spelled c a t s.")
    assert is_right({"declined": True}, "Sorry, I don't know.")
    assert is_right({"declined": False}, "It is Paris.")
    tool = [{"type": "python", "text": "1+1"}, {"type": "python_output", "text": "2"}, {"type": "text", "text": "Yes."}]
    assert not is_right({"number": 2}, tool)
