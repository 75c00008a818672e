"""HumanEval, Python functions to be written from their signature and docstring, judged by running their tests.

Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374. Hub: openai/openai_humaneval, MIT.
Its one split is for reporting only. Not here: running untrusted code (`nanochat.evals.execution`).

The standard prompt is the paper's: the model continues the beginning of the function as plain text, up to one of its
stops, and all it wrote is run. The paper samples 200 answers at temperatures of 0.2 to 0.8; greedy ones are the default
here, as in lm-evaluation-harness (task humaneval, version 1.0).
"""

import re
import textwrap
from collections.abc import Sequence

from nanochat.data.chat import visible_text
from nanochat.evals import execution
from tasks.common import Completion, Conversation, Task, single_turn, text_problem
from tasks.loading import HubSplit, Rows

REPO = "openai/openai_humaneval"
NUM_ROWS = 164
COLUMNS = {"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str}
REQUEST = "Complete this Python function. Answer with the whole function in a code block."
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_BODY_END = re.compile(r"^[^\s)\]}]", re.MULTILINE)  # a line that is not indented, unless it closes brackets
_CODE_LINE = re.compile(r"^(?:from \S+ import |import |def |async def |class |@)", re.MULTILINE)


class HumanEval(Task):
    """Without `allow_unsafe_execution`, judging raises `UserError` where the system offers no isolation.

    A conversation also has `task_id`, `prompt` (the beginning of the function), `tests` and `entry_point`.
    """

    name = "HumanEval"
    kind = "generative"
    purpose = "test"

    def __init__(self, *, allow_unsafe_execution: bool = False) -> None:
        self.allow_unsafe_execution = allow_unsafe_execution
        self.rows = Rows(HubSplit(REPO, "openai_humaneval", "test", COLUMNS, NUM_ROWS, is_measured=True))

    def conversation(self, index: int) -> Conversation:
        row = self.rows[index]
        prompt, entry_point = row["prompt"], row["entry_point"]
        if not re.search(rf"^def {re.escape(entry_point)}\b", prompt, re.MULTILINE):
            raise self.rows.error(index, f"the prompt does not define {entry_point}")
        return single_turn(
            f"{REQUEST}\n\n```python\n{prompt.strip()}\n```",
            f"```python\n{(prompt + row['canonical_solution']).strip()}\n```",
            task_id=row["task_id"], prompt=prompt, tests=row["test"], entry_point=entry_point,
        )  # fmt: skip

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        return self.evaluate_many([(conversation, completion)])[0]

    def evaluate_many(self, pairs: Sequence[tuple[Conversation, Completion]]) -> list[bool]:
        """Whether the program in each completion passes the tests; several run at a time."""
        problems = [
            execution.Problem(
                program=self.program(question, completion),
                tests=execution.with_helpers(question["tests"], question["prompt"], question["entry_point"]),
                entry_point=question["entry_point"],
            )
            for question, completion in pairs
        ]
        return [verdict.passed for verdict in execution.grade_many(problems, allow_unsafe=self.allow_unsafe_execution)]

    def program(self, conversation: Conversation, completion: Completion) -> str:
        """The source text that is judged."""
        return extract_program(conversation, completion)


class StandardHumanEval(HumanEval):
    """The benchmark with its standard prompt."""

    name = "HumanEval 0-shot"
    is_text = True
    stops = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")

    def conversation(self, index: int) -> Conversation:
        chat, solution = super().conversation(index), self.rows[index]["canonical_solution"]
        return chat | text_problem(chat["prompt"], solution)

    def program(self, conversation: Conversation, completion: Completion) -> str:
        return conversation["prompt"] + visible_text(completion)


def extract_program(conversation: Conversation, completion: Completion) -> str:
    """The program meant by a completion, as source text that defines the function, if the completion does.

    1. Of the code blocks, the first that defines the function, or else the first; an unclosed block runs to the end.
    2. Without code blocks, the whole text is the code if it defines the function, starting at its first line of code.
    3. Code that does not define the function continues the prompt as its body, up to the first unindented line.
    What the prompt has before the function (imports, helpers) goes before code that defines it.
    """
    text, prompt, entry_point = visible_text(completion), conversation["prompt"], conversation["entry_point"]
    definition = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    blocks = [block[1] for block in _FENCE.finditer(text)]
    code = next(filter(definition.search, blocks), blocks[0] if blocks else text)
    if not definition.search(code):
        return prompt + _function_body(code, is_block=bool(blocks))
    start = None if blocks else _CODE_LINE.search(code)
    return prompt[: definition.search(prompt).start()] + code[start.start() if start else 0 :]


def _function_body(code: str, *, is_block: bool) -> str:
    """`code` as the indented body of a function. A block may start at the margin; a plain continuation may have lost
    the indentation of its first line, and prose or other functions may follow it."""
    if is_block:
        return textwrap.indent(textwrap.dedent(code), "    ")
    body = code.lstrip("\n")
    body = body if body[:1].isspace() else "    " + body
    end = _BODY_END.search(body)
    return (body[: end.start()] if end else body) + "\n"
