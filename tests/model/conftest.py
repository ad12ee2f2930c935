import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from fixtures import flex_attention_without_compiler, in_tiles, layers, small_chunks

__all__ = ["flex_attention_without_compiler", "in_tiles", "layers", "small_chunks"]
