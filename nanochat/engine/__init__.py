"""Generation: prompts in, sampled tokens out, many sequences at once.

Begin with `engine.py`: requests join and leave a batch that decodes together. `inference.py` holds the weights and the
KV cache it decodes with, `sampling.py` the draw of a token, `generation.py` the requests and their results, and
`calculator.py` evaluates the expressions a chat model asks for.

Not here: the conversation format (`data/chat.py`), HTTP and the terminal (`serve`).
"""
