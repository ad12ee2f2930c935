"""What is changed of `transformers serve`, and which requests are taken."""

from hf_decoder.moved import names_went_to

__getattr__ = names_went_to("hf_decoder.serving.server")
