import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.data.chat import as_parts, check_conversation, visible_text
from nanochat.engine.calculator import calculate
from tasks.identity import PATH, Identity
from tasks.spelling import split_of

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def conversations():
    return list(Identity())


def answers(conversation) -> list:
    return [message["content"] for message in conversation["messages"] if message["role"] == "assistant"]


def test_the_script_writes_the_very_file_of_the_repository(tmp_path):
    command = [sys.executable, ROOT / "dev" / "make_identity.py", "--output", tmp_path / "identity.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "conversations" in done.stdout
    assert (tmp_path / "identity.jsonl").read_bytes() == PATH.read_bytes()


def test_there_are_a_few_hundred_varied_conversations_in_order(conversations):
    assert 300 <= len(conversations) <= 900
    assert len({str(conversation) for conversation in conversations}) == len(conversations)
    for conversation in conversations:
        check_conversation(conversation)
        assert conversation["messages"][-1]["role"] == "assistant"
        for message in conversation["messages"]:  # no template is left unfilled
            assert not re.search(r"[{}]|  |\s$", visible_text(message["content"])), message
    assert (Identity().name, Identity().kind, Identity().purpose) == ("Identity", None, "train")
    assert len({c["messages"][0]["content"] for c in conversations}) > 300
    assert len({visible_text(answer) for c in conversations for answer in answers(c)}) > 450
    assert sum(len(answers(c)) > 1 for c in conversations) > 100, "of several turns"
    assert sum(c["messages"][0]["role"] == "system" for c in conversations) > 20
    assert sum("nanochat" in str(c) for c in conversations) > 150


def test_tool_results_are_the_calculators(conversations):
    parts = [part for c in conversations for answer in answers(c) for part in as_parts(answer)]
    calls = [part["text"] for part in parts if part["type"] == "python"]
    assert [part["text"] for part in parts if part["type"] == "python_output"] == [calculate(call) for call in calls]
    assert len(calls) > 20
    words = {word for call in calls for word in re.findall("'([a-z]{3,})'", call)}
    assert {split_of(word) for word in words} == {"train"}


def test_system_messages_are_kept_to(conversations):
    for conversation in conversations:
        system = conversation["messages"][0]["content"]
        for answer in answers(conversation):
            if "nanochat here" in system:
                assert answer.startswith("nanochat here. ")
            elif "End every answer" in system or "After each answer" in system:
                assert answer.endswith("?")
