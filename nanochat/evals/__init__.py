"""How good a model is: bits per byte, CORE, and chat tasks.

Begin with `loss_eval.py` (bits per byte), `core_eval.py` (the in-context tasks of the bundle that `core_bundle.py`
fetches) or `chat_eval.py` (questions to a chat model; `chat_results.py` holds the results). `scoring.py` computes
losses and logits for many texts at once; `execution.py` runs model-written code in a sandbox, with
`execution_child.py` inside it.

Not here: the questions and how an answer is judged (`tasks/`).
"""
