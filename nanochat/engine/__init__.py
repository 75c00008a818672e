"""Generation: prompts in, sampled tokens out, many sequences at once.

Begin with `engine.py`: requests join and leave a batch that decodes together. `slots.py` says which sample has which
place in the KV cache, `weights.py` lays the model's weights out, `inference.py` has the passes over them and the cache,
`sampling.py` draws tokens, `generation.py` has the requests and their results, `calculator.py` evaluates the
expressions a chat model asks for.

On a GPU: `gpu.py` has the passes and `gpu_blocks.py` what they do in the blocks, `pages.py` the cache, `kernels.py`,
`product_kernel.py` and `draw_kernel.py` the kernels; `transfer.py` brings small arrays to the device and back.

Not here: the conversation format (`data/chat.py`), HTTP and the terminal (`serve`).
"""
