"""Trains models: optimizers, rows, callbacks, checkpoints, and launches on many devices."""

from hf_decoder.moved import names_went_to

__getattr__ = names_went_to("hf_decoder.training.callbacks")
