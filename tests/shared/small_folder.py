"""A whole model folder, small enough to send in no time."""

from pathlib import Path

import torch

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.reporting.model_card import write_model_card


def write_folder(folder: Path, tokenizer, *, seed: int = 0, max_shard_size: str = "5GB", **overrides) -> Path:
    """A whole model folder, card and tokenizer included, small enough to send in no time."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    shape |= {"vocab_size": len(tokenizer), "max_position_embeddings": 128, "initializer_range": 0.2}
    special_tokens = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = HfDecoderForCausalLM(HfDecoderConfig(**shape | special_tokens | overrides))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    write_model_card(folder, {"eval_loss": 2.5, "parameters": model.num_parameters()}, {"license": "apache-2.0"})
    (folder / "samples.md").write_text("a sample\n", encoding="utf-8")
    (folder / "loss_curve.png").write_bytes(b"\x89PNG\r\n")
    return folder
