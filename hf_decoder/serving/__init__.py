"""Serves models by `transformers serve`, which here honours or refuses each parameter of a request."""

from hf_decoder.moved import names_went_to

__getattr__ = names_went_to("hf_decoder.serving.server")
