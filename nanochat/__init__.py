"""The library. Shared by all: `common.py`, `flags.py`, `hardware.py`, `tokenizer.py`, `checkpoint.py`; what runs have
to report in `records.py`, read together in `results.py`, told to users of the model in `model_card.py`; and for runs
on several hosts `watch.py` and `hosts.py`.

The rest stands in rooms, each of which imports only from those before it:

    model      the GPT, attention, loss, Hugging Face folders
    data       shards, packed rows, the conversation format
    engine     generation with a KV cache, sampling, the calculator
    evals      bits per byte, CORE, chat tasks, the sandbox
    training   optimizer, schedules, the parts of a loop, finetuning and reinforcement learning
    serve      the HTTP API, the chat page, the terminal
    report     the report of a run
"""

import sys


def _explain_import_errors():
    """Have a command that runs outside of the environment, or is stopped by Ctrl-C while it imports, end with one line.
    In words that older Pythons know too."""
    remedy = "activate the environment: source .venv/bin/activate (if there is none yet, first: bash runs/setup.sh)"
    show = sys.excepthook

    def explain(kind, error, traceback):
        if issubclass(kind, KeyboardInterrupt):
            sys.stderr.write("stopped\n")
            return
        package = (getattr(error, "name", None) or "").split(".")[0]
        if not isinstance(error, ImportError) or package in ("", "nanochat", "scripts", "tasks"):
            show(kind, error, traceback)
            return
        sys.stderr.write("error: " + sys.executable + " cannot import " + package + "; " + remedy + "\n")

    sys.excepthook = explain
    if sys.version_info < (3, 11):  # noqa: UP036
        sys.exit("error: " + sys.executable + " is older than Python 3.11; " + remedy)


if sys.argv[:1] == ["-m"]:  # as long as `python -m` looks for the command, and imports the packages it is in
    _explain_import_errors()
