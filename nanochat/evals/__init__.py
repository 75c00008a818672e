"""What a model is worth: bits per byte, CORE, and chat tasks.

Begin with `loss_eval.py` (bits per byte), `core_eval.py` (in-context tasks of the bundle that `core_bundle.py` fetches)
or `chat_eval.py` (questions to a chat model, whose results `chat_results.py` sums up). `scoring.py` gives the
log-probabilities of many answers at once; `execution.py` runs code that a model wrote, in a sandbox whose inner side is
`execution_child.py`.

Not here: the questions and how an answer is judged (`tasks/`).
"""
