"""HumanEval, Python functions to be written from their signature and docstring, judged by running their tests.

Chen et al., "Evaluating Large Language Models Trained on Code", arXiv 2107.03374. Hub: openai/openai_humaneval, MIT.
Its one split is for reporting only.

Not here: running code that nobody has read (`nanochat.execution`), which this module only hands it to.
"""

import re
import textwrap
from collections.abc import Sequence

from nanochat.data.chat import visible_text
from nanochat.evals import execution
from tasks.common import Completion, Conversation, Task
from tasks.loading import HubSplit, Rows

REPO = "openai/openai_humaneval"
NUM_ROWS = 164
COLUMNS = {"task_id": str, "prompt": str, "canonical_solution": str, "test": str, "entry_point": str}
REQUEST = "Complete this Python function. Answer with the whole function in a code block."
_FENCE = re.compile(r"^[ \t]*```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.MULTILINE | re.DOTALL)
_BODY_END = re.compile(r"^[^\s)\]}]", re.MULTILINE)  # a line that is not indented, unless it closes brackets


class HumanEval(Task):
    """`allow_unsafe_execution` lets the code run where the system offers no isolation, which else is a `UserError`.

    A conversation also has `task_id`, `prompt` (the function's beginning), `tests` and `entry_point`.
    """

    name = "HumanEval"
    kind = "generative"
    purpose = "test"

    def __init__(self, *, allow_unsafe_execution: bool = False) -> None:
        self.allow_unsafe_execution = allow_unsafe_execution
        self.rows = Rows(HubSplit(REPO, "openai_humaneval", "test", COLUMNS, NUM_ROWS, is_measured=True))

    def __len__(self) -> int:
        return len(self.rows)

    def conversation(self, index: int) -> Conversation:
        row = self.rows[index]
        if not re.search(rf"^def {re.escape(row['entry_point'])}\b", row["prompt"], re.MULTILINE):
            raise self.rows.error(index, f"the prompt does not define {row['entry_point']}")
        solution = row["prompt"] + row["canonical_solution"]
        messages = [
            {"role": "user", "content": f"{REQUEST}\n\n```python\n{row['prompt'].strip()}\n```"},
            {"role": "assistant", "content": f"```python\n{solution.strip()}\n```"},
        ]
        return {
            "messages": messages,
            "task_id": row["task_id"],
            "prompt": row["prompt"],
            "tests": row["test"],
            "entry_point": row["entry_point"],
        }

    def evaluate(self, conversation: Conversation, completion: Completion) -> bool:
        return self.evaluate_many([(conversation, completion)])[0]

    def evaluate_many(self, pairs: Sequence[tuple[Conversation, Completion]]) -> list[bool]:
        """Whether the program in each completion passes the tests; several run at a time.

        Raises `UserError` when the system cannot isolate them and that was not allowed.
        """
        problems = [
            execution.Problem(
                program=extract_program(conversation, completion),
                tests=execution.with_helpers(
                    conversation["tests"], conversation["prompt"], conversation["entry_point"]
                ),
                entry_point=conversation["entry_point"],
            )
            for conversation, completion in pairs
        ]
        verdicts = execution.grade_many(problems, allow_unsafe=self.allow_unsafe_execution)
        return [verdict.passed for verdict in verdicts]


def extract_program(conversation: Conversation, completion: Completion) -> str:
    """The program that a completion means, as source text that defines the function or fails to.

    1. Of the code blocks, the first that defines the function, else the first; a block without an end goes to the end.
    2. Without code blocks the whole text is the code, if it defines the function: from the first line that can begin a
       program on.
    3. Code that does not define it continues the prompt: it is the body, up to the first line that is not indented.
    What the prompt has before the function (imports, helpers) is put before code that defines it.
    """
    text, prompt, entry_point = visible_text(completion), conversation["prompt"], conversation["entry_point"]
    definition = re.compile(rf"^(?:async )?def {re.escape(entry_point)}\b", re.MULTILINE)
    blocks = [block[1] for block in _FENCE.finditer(text)]
    code = next(filter(definition.search, blocks), blocks[0] if blocks else text)
    if definition.search(code):
        code = code if blocks else _from_first_code_line(code)
        return prompt[: definition.search(prompt).start()] + code
    return prompt + _function_body(code, is_block=bool(blocks))


def _from_first_code_line(text: str) -> str:
    """`text` without the sentences before its code."""
    start = re.search(r"^(?:from \S+ import |import |def |async def |class |@)", text, re.MULTILINE)
    return text[start.start() :] if start else text


def _function_body(code: str, *, is_block: bool) -> str:
    """`code` as the indented body of a function. In a block it may stand at the margin; as a continuation its first
    line may have lost its blanks, and prose or other functions may follow it."""
    if is_block:
        return textwrap.indent(textwrap.dedent(code), "    ")
    body = code.lstrip("\n")
    body = body if body[:1].isspace() else "    " + body
    end = _BODY_END.search(body)
    return (body[: end.start()] if end else body) + "\n"
