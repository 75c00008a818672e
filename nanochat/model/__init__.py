"""The model: what it is made of, and what its loss is.

Begin with `gpt.py`: the configuration that follows from the depth, and the forward pass. Its two heavy parts are
`attention.py` (backends behind one call) and `loss.py` (cross-entropy without whole logits); on a GPU they use
`flash.py` (FlashAttention 4) and `kernels.py` (Triton). `linear.py` is the layer of every product, `products.py` what
these read and add up, `fp8.py` their arithmetic in 8 bits. `load.py` makes the model of a checkpoint, `hf.py` reads and
writes Hugging Face folders (templates: `chat_template.jinja`, `hf_templates.json`), `first_release.py` reads the files
of October 2025.

Not here: how it is trained (`training`), and how it answers (`engine`, with weights and a cache made for that).
"""
