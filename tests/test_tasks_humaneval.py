import textwrap

import pytest
from hub_fixtures import HUMANEVAL_ROW, serve_rows

from nanochat.common import UserError
from nanochat.data.chat import check_conversation
from nanochat.evals import execution
from tasks import humaneval
from tasks.humaneval import HumanEval, StandardHumanEval, extract_program

PROMPT, SOLUTION = HUMANEVAL_ROW["prompt"], HUMANEVAL_ROW["canonical_solution"]
FUNCTION = PROMPT[PROMPT.index("def double") :] + SOLUTION
QUESTION = {"prompt": PROMPT, "entry_point": "double", "tests": HUMANEVAL_ROW["test"]}

RIGHT = {
    "the continuation": SOLUTION,
    "the continuation with more behind it": f"{SOLUTION}\n\ndef other():\n    return double(\n\nprint(1",
    "the continuation with prose behind it": f"{SOLUTION}\nThat's it: simple, isn't it?",
    "the continuation without its first blanks": SOLUTION.lstrip(),
    "the continuation after line breaks": f"\n\n{SOLUTION}",
    "the whole program": PROMPT + SOLUTION,
    "prose and the whole program": f"Here you are:\n\n{PROMPT}{SOLUTION}",
    "a block of the whole program": f"Sure!\n```python\n{PROMPT}{SOLUTION}```\nThis doubles it.",
    "a block of the function alone": f"```\n{FUNCTION}```",
    "a block with two functions": f"```\ndef twice(x):\n    return x + x\n\n{FUNCTION.replace('2 * x', 'twice(x)')}```",
    "the second of two blocks": f"```sh\npip install maths\n```\nThen\n```python\n{FUNCTION}```",
    "an indented block": f"1. Do this:\n   ```python\n{FUNCTION}   ```",
    "a block without an end": f"```python\n{FUNCTION}",
    "a block of the body": f"```python\n{SOLUTION}```",
    "a block of the body at the margin": f"```python\n{textwrap.dedent(SOLUTION)}```",
}
WRONG = {
    "nothing": "", "prose": "I do not know.", "a wrong body": "    return x\n", "an empty body": "    pass\n",
    "an empty block": "```python\n```", "an exit": "    import sys\n    sys.exit(0)\n",
    "another function": "```python\ndef triple(x):\n    return 3 * x\n```",
}  # fmt: skip


@pytest.fixture
def task(monkeypatch):
    serve_rows(monkeypatch, {(humaneval.REPO, "openai_humaneval", "test"): [HUMANEVAL_ROW]})
    monkeypatch.setattr(humaneval, "NUM_ROWS", 1)
    return HumanEval()


@pytest.mark.parametrize("name", RIGHT)
def test_the_program_is_found_in(name):
    namespace = {}
    program = extract_program(QUESTION, RIGHT[name])
    exec(program, namespace)
    assert namespace["double"](21) == 42
    assert namespace["math"] is not None
    assert namespace["helper"](1) == 2
    call = {"type": "python", "text": "1+1"}  # a tool call is no part of the program
    assert extract_program(QUESTION, [call, {"type": "text", "text": RIGHT[name]}]) == program


def test_a_conversation_asks_for_the_function_and_answers_with_it(task):
    conversation = task[0]
    check_conversation(conversation)
    question, answer = (message["content"] for message in conversation["messages"])
    assert question.startswith(humaneval.REQUEST)
    assert f"```python\n{PROMPT.strip()}\n```" in question
    assert SOLUTION.strip() not in question
    assert answer == f"```python\n{(PROMPT + SOLUTION).strip()}\n```"
    assert (task.kind, task.purpose, conversation["task_id"]) == ("generative", "test", "HumanEval/0")


def test_the_standard_prompt_is_the_function_s_beginning_and_all_that_follows_is_run(task):
    standard = StandardHumanEval()
    problem = standard[0]
    assert (problem["messages"][0]["content"], problem["shots"]) == (PROMPT, ())
    assert problem["messages"][-1]["content"] == SOLUTION
    prose = SOLUTION + "That is it."
    assert standard.program(problem, prose) == PROMPT + prose
    assert (standard.kind, standard.stops[0]) == ("generative", "\nclass")


def test_all_answers_are_graded_in_one_go_with_the_helpers_of_the_prompt(task, monkeypatch):
    calls = []

    def grade_many(problems, **options):
        calls.append((problems, options))
        return [execution.Verdict(number == 1, "", "", "") for number in range(len(problems))]

    monkeypatch.setattr(execution, "grade_many", grade_many)
    task.allow_unsafe_execution = True
    assert task.evaluate_many([(task[0], "    return 1\n"), (task[0], SOLUTION)]) == [False, True]
    (((_, problem), options),) = calls
    assert options == {"allow_unsafe": True}
    assert (problem.program, problem.entry_point) == (PROMPT + SOLUTION + "\n", "double")
    assert problem.tests.startswith("import math")
    assert "def helper(x):" in problem.tests
    assert "def double" not in problem.tests


def test_answers_are_judged_by_running_them(task):
    if execution.isolation().method == "none":
        pytest.skip(f"no isolation here: {execution.isolation().reason}")
    conversation = task[0]
    answers = [*RIGHT.values(), *WRONG.values()]
    verdicts = task.evaluate_many([(conversation, answer) for answer in answers])
    expected = dict.fromkeys(RIGHT, True) | dict.fromkeys(WRONG, False)
    assert dict(zip([*RIGHT, *WRONG], verdicts, strict=True)) == expected
    assert task.evaluate(conversation, conversation["messages"][-1]["content"])


def test_a_prompt_without_its_function_is_an_error_with_the_row(monkeypatch, task):
    row = HUMANEVAL_ROW | {"entry_point": "triple"}
    serve_rows(monkeypatch, {(humaneval.REPO, "openai_humaneval", "test"): [row]})
    with pytest.raises(UserError, match="row 0, the prompt does not define triple"):
        HumanEval()[0]
