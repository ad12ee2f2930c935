import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fixtures import flex_attention_without_compiler, layers, small_chunks, tiles_of_few_tokens

__all__ = ["flex_attention_without_compiler", "layers", "small_chunks", "tiles_of_few_tokens"]
