"""The model: what it is made of, and what its loss is.

Begin with `gpt.py`: the configuration that follows from the depth, and the forward pass. Its two heavy parts are
`attention.py` (backends behind one call) and `loss.py` (cross-entropy without whole logits); on a GPU they use
`flash.py` (FlashAttention 4) and `kernels.py` (Triton). `linear.py` is the layer of every product, `products.py` what
these read and add up, `fp8.py` their arithmetic in 8 bits. `load.py` makes the model of a checkpoint.

For other programs `hf.py` reads and writes folders (transformers, mlx-lm) and `gguf_file.py` writes GGUF; both have the
tokenizer from `hf_tokenizer.py`, and texts from `chat_template.jinja` and `hf_templates.json`. `modeling_nanochat.py`
and `configuration_nanochat.py` are copied into a folder: the model as transformers runs it. `first_release.py` reads
the files in which nanochat's first release kept a model.

Not here: how it is trained (`training`), and how it answers (`engine`, with weights and a cache made for that).
"""
