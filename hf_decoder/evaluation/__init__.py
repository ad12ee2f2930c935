"""Measures models: metrics, batch generation, blind comparison, and benchmarks against peers."""

from hf_decoder.moved import names_went_to

__getattr__ = names_went_to("hf_decoder.evaluation.metrics")
