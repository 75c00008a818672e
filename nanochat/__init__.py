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
