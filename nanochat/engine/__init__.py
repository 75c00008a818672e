"""Generation: prompts in, sampled tokens out, many sequences at once.

Begin with `engine.py`: requests join and leave a batch that decodes together. `slots.py` says which sample has which
place in the KV cache, `inference.py` holds the cache and the weights, `sampling.py` draws tokens, `generation.py` has
the requests and their results, `calculator.py` evaluates the expressions a chat model asks for.

Not here: the conversation format (`data/chat.py`), HTTP and the terminal (`serve`).
"""
