"""The chat on a pseudo-terminal and with piped input, with a tiny model that knows one conversation by heart."""

import json
import os
import re
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch

from nanochat.checkpoint import save_checkpoint, source_dir
from nanochat.common import Runtime
from nanochat.data.chat import render
from nanochat.model.gpt import GPT, IGNORE_INDEX, GPTConfig, build_model
from tests.conftest import fill_randomly

pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")

ROOT = Path(__file__).resolve().parent.parent
QUESTION, VISIBLE = "How much is 12 * 34?", "It is 408 in 東京 🌿."
PARTS = [{"type": "text", "text": "It is "}, {"type": "python", "text": "12*34"},
         {"type": "python_output", "text": "408"}, {"type": "text", "text": "408 in 東京 🌿."}]  # fmt: skip
TURNS = [("user", QUESTION), ("assistant", PARTS), ("user", "Thank you!"), ("assistant", "Gladly.")]
CONVERSATION = {"messages": [{"role": role, "content": content} for role, content in TURNS]}
TIMEOUT_SECONDS = 120  # a start takes 5 seconds on an idle machine, many times that on a crowded one
CTRL_C, CTRL_D, UP = "\x03", "\x04", "\x1b[A"
# Runs a command on a terminal that controls it, so that Ctrl-C reaches it. A program and not `preexec_fn`, which is not
# safe in a process with threads, as this one is.
ON_OWN_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def train_on(model: GPT, tokenizer, conversation: dict, num_steps: int = 80) -> None:
    """Until greedy decoding says the assistant's part by heart."""
    rendered = render(tokenizer, conversation)
    ids, mask = torch.tensor([rendered.ids]), torch.tensor([rendered.mask])
    targets = torch.where(mask, ids, IGNORE_INDEX)[:, 1:]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(num_steps):
        optimizer.zero_grad()
        model(ids[:, :-1], targets).backward()
        optimizer.step()


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer) -> Path:
    """A base folder with two models: "parrot", which knows `CONVERSATION`, and "endless", which never ends a turn."""
    folder = tmp_path_factory.mktemp("base")
    runtime = Runtime(0, 0, 1, torch.device("cpu"), torch.float32)
    shape = {"vocab_size": tokenizer.vocab_size, "head_dim": 32, "kv_ratio": 2}
    parrot, endless = (
        build_model(GPTConfig.from_depth(1, sequence_len=T, **shape), generator=torch.Generator().manual_seed(0))
        for T in (256, 16384)
    )
    train_on(parrot, tokenizer, CONVERSATION)
    fill_randomly(endless)
    special = list(tokenizer.special_ids.values())
    endless.lm_head.weight.data[special] = 0.0  # a logit of 0, which greedy decoding never picks
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for name, model in (("endless", endless), ("parrot", parrot)):
            run, meta = source_dir("sft") / name, {"args": {}, "examples": [QUESTION, "Thank you!"]}
            save_checkpoint(run, 7, runtime=runtime, model=model, tokenizer=tokenizer, meta=meta)
    return folder


@pytest.fixture
def command(base, base_folder, monkeypatch):
    """The command line of a chat with one of the two models, greedy."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("NO_COLOR", raising=False)
    chosen = ["--temperature", "0", "--device-type", "cpu", "--dtype", "float32"]
    return lambda tag, *flags: [sys.executable, "-m", "scripts.chat_cli", "--model-tag", tag, *chosen, *flags]


class Terminal:
    """A program on a pseudo-terminal: what it writes, colours and cursor movements left out, is awaited in order."""

    def __init__(self, command: list[str]):
        self._descriptor, child = pty.openpty()
        termios.tcsetwinsize(child, (40, 100))
        command, streams = [sys.executable, "-c", ON_OWN_TERMINAL, *command], ("stdin", "stdout", "stderr")
        self.process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **dict.fromkeys(streams, child))
        os.close(child)
        self.raw = b""
        self._seen = 0

    def type(self, keys: str, *expected: str) -> None:
        """Press keys, then wait for what is written after them."""
        os.write(self._descriptor, keys.encode())
        self.expect(*expected)

    def expect(self, *texts: str) -> None:
        """Wait for each text in turn, after what was awaited before."""
        for text in texts:
            while (at := self.text.find(text, self._seen)) < 0:
                if not self._read(TIMEOUT_SECONDS):
                    self._fail(repr(text))
            self._seen = at + len(text)

    def expect_more(self, num_characters: int) -> None:
        """Wait for that many characters of any kind."""
        while len(self.text) < self._seen + num_characters:
            if not self._read(TIMEOUT_SECONDS):
                self._fail(f"{num_characters} characters")
        self._seen += num_characters

    def _read(self, timeout: float) -> bool:
        """Take what the program writes next; False when that is nothing for `timeout` seconds, or its end is closed."""
        if not select.select([self._descriptor], [], [], timeout)[0]:
            return False
        try:
            data = os.read(self._descriptor, 65536)
        except OSError:  # how Linux says that the other end is closed
            return False
        self.raw += data
        return bool(data)

    def _fail(self, wanted: str) -> None:
        """Fail with what is known of the program; one that still runs is ended and writes where it stood."""
        unseen = self.text[self._seen :]
        try:
            state = f"it ended with status {self.process.wait(2)}"
        except subprocess.TimeoutExpired:
            state = "it ran, and stood where its last lines say"
            self.process.send_signal(signal.SIGABRT)  # answered by faulthandler
            while self._read(2):
                pass
        pytest.fail(f"no {wanted} in {unseen!r}; {state}. All it wrote:\n{self.text}")

    @property
    def text(self) -> str:
        text = self.raw.decode("utf-8", errors="ignore")
        return re.sub(r"\x1b\[[?0-9;]*[a-zA-Z]", "", text).replace("\r\n", "\n")

    def wait(self) -> int:
        """Wait for the end; the exit status."""
        while self._read(TIMEOUT_SECONDS):
            pass
        try:
            return self.process.wait(TIMEOUT_SECONDS)
        except subprocess.TimeoutExpired:
            self._fail("end")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._descriptor)


@pytest.fixture
def open_terminal(monkeypatch):
    """Opens terminals, and ends what still runs on them."""
    monkeypatch.setenv("PYTHONFAULTHANDLER", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("PROMPT_TOOLKIT_NO_CPR", "1")  # nobody here answers where the cursor is
    opened = []

    def start(command: list[str]) -> Terminal:
        opened.append(Terminal(command))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


def test_a_session_answers_in_turns_and_obeys_its_commands(command, open_terminal, base, tmp_path):
    terminal, saved = open_terminal(command("parrot", "--seed", "1")), tmp_path / "talk.json"
    terminal.expect("sft parrot step 7", "context of 256 tokens, float32 on cpu")
    terminal.expect(f"(try: {QUESTION} | Thank you!)", "\nYou: ")
    terminal.type(f"{QUESTION}\r", "\n\nnanochat-parrot: ", "It is [python: 12*34 => 408] 408 in 東京 🌿.\n", "\nYou: ")
    assert "\ufffd" not in terminal.text
    terminal.type("/stats\r", "shown after each answer")
    terminal.type("Thank you!\r", "Gladly.\n(", "of 256 tokens of context used)\n", "\nYou: ")

    terminal.type("/temperature cold\r", "error: temperature must be a number, not 'cold'")
    terminal.type("/topk 3\r", "(top_k 3)", "\nYou: ")
    terminal.type("/system be \\\r", "\n   .")
    terminal.type("brief\r", "(system message: be \nbrief)", "\nYou: ")
    terminal.type("/system -\r", "(no system message)", "\nYou: ")
    terminal.type(f"/save {saved}\r", "4 messages saved")
    assert json.loads(saved.read_text()) == CONVERSATION
    terminal.type("/clear\r", "new conversation")
    terminal.type(
        f"/load {saved}\r", "4 messages loaded", "\n\nYou: Thank you!\n\n", "nanochat-parrot: Gladly.", "\nYou: "
    )

    terminal.type("half a line", "half a line")  # at the prompt: before it, Ctrl-C would be a signal and no key
    terminal.type(CTRL_C, "\nYou: ")
    terminal.type(UP + UP + "\r", "new conversation", "\nYou: ")  # before the last line, which was given up: /clear
    terminal.type(CTRL_D)
    assert terminal.wait() == 0

    history = base / "chat_history"
    assert history.stat().st_mode & 0o777 == 0o600
    assert f"+{QUESTION}" in history.read_text().splitlines()


def test_ctrl_c_stops_the_answer_and_keeps_the_session(command, open_terminal, tmp_path):
    terminal, saved = open_terminal(command("endless", "--max-tokens", "16000")), tmp_path / "talk.json"
    terminal.expect("\nYou: ")
    terminal.type("river\r", "river")
    terminal.expect_more(200)
    terminal.type(CTRL_C, "(stopped; the answer so far is kept)\n", "\nYou: ")
    terminal.type(f"/save {saved}\r", "2 messages saved")
    question, answer = json.loads(saved.read_text())["messages"]
    assert (question["content"], answer["role"]) == ("river", "assistant")
    assert len(answer["content"]) >= 10

    terminal.type("/maxtokens 5\r", "(max_tokens 5)")
    terminal.type("stone\r", "the answer reached the token limit")
    terminal.type("/quit\r")
    assert terminal.wait() == 0


@pytest.mark.parametrize(
    ("flags", "piped", "status", "out", "err"),
    [
        ((), QUESTION + "\n", 0, VISIBLE + "\n", ""),
        (("-p", QUESTION, "--stats"), "not for the model", 0, VISIBLE + "\n",
         r"\(\d+ tokens, [\d.]+ tokens/s, .* of 256 tokens of context used\)\n"),
        ((), "river " * 300, 2, "", r"error: the last message.* tokens.*\n"),
    ],
)  # fmt: skip
def test_a_piped_or_given_prompt_gets_its_answer_on_standard_output_and_nothing_else(
    command, flags, piped, status, out, err
):
    done = subprocess.run(
        command("parrot", *flags), cwd=ROOT, input=piped.encode(), capture_output=True, timeout=TIMEOUT_SECONDS
    )
    assert (done.returncode, done.stdout.decode()) == (status, out)
    assert re.fullmatch(err, done.stderr.decode())
