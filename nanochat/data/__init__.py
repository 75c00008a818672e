"""From text and conversations to rows of token ids.

Begin with `dataloader.py`: documents packed into (B, T) rows. They come from the parquet shards of `dataset.py`, which
`hub.py` downloads or `localtext.py` collects on this machine; `splits.py` tells training from validation and test
files. A run notes its shards with `run_shards.py`. Conversations take the same way: `chat.py` is their
format with its loss mask, `chat_loader.py` packs them.

Not here: the data sets of conversations and questions themselves (`tasks/`), and the tokenizer.
"""
