"""The code that travels with a checkpoint: plain PyTorch and transformers, to be read top to bottom."""
