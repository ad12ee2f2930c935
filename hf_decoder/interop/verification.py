"""Verifies a conversion: both checkpoints, loaded one after the other, must compute the same logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_decoder.safety.quiet import quiet

# The largest difference of two logits, relative to the largest, that the order of additions in fp32 explains.
TOLERANCE = 1e-5
MIN_TOKENS = 64
MAX_TOKENS = 1024
TEXT = (
    "The quick brown fox jumps over the lazy dog. Größe, naïve, 東京, привет, 🙂\n"
    "def main(argv):\n    return 0 if len(argv) == 1 else 2  # 3.14159\n"
)


class VerificationError(RuntimeError):
    """Raised when the result computes something else than its source."""


def verify(source: Path, result: Path) -> float:
    """Compares token ids and fp32 logits of two checkpoint folders on random ids and on text.

    One model is in memory at a time. The random rows reach past a sliding window and past RoPE's original context, if
    these are short. Returns the largest difference of two logits.

    Raises:
        VerificationError: if a logit differs by more than `TOLERANCE` of the largest, or a token id differs.
    """
    ids = [text_ids(folder) for folder in (source, result)]
    if ids[0] != ids[1]:
        raise VerificationError("the tokenizer of the result gives other ids than that of the source")
    first, second = (_logits(folder, ids[0]) for folder in (source, result))
    largest = 0.0
    for kind in first:
        if not first[kind].isfinite().all():
            raise VerificationError(f"logits of the source on {kind} are not finite, so nothing can be compared")
        difference = (first[kind] - second[kind]).abs().max().item()
        limit = TOLERANCE * max(1.0, first[kind].abs().max().item())
        if not difference <= limit:  # also when it is not a number
            raise VerificationError(
                f"logits of the result differ from the source's by {difference:.2e} on {kind}; rounding explains "
                f"{limit:.2e}"
            )
        largest = max(largest, difference)
    return largest


def text_ids(folder: Path) -> list[int] | None:
    """The token ids of the sample text; None if there is no tokenizer."""
    if not (folder / "tokenizer_config.json").is_file():
        return None
    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(TEXT)["input_ids"]


@torch.inference_mode()
def _logits(folder: Path, ids_of_text: list[int] | None) -> dict[str, torch.Tensor]:
    with quiet():
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager", trust_remote_code=False
        ).eval()
    config = model.config
    borders = [
        getattr(config, "sliding_window", None),
        config.rope_parameters.get("original_max_position_embeddings"),
    ]
    lengths = [border + 16 for border in borders if border is not None and border + 16 <= MAX_TOKENS]
    limit = config.max_position_embeddings
    length = min(max(MIN_TOKENS, *lengths, 0), limit)
    generator = torch.Generator().manual_seed(0)
    inputs = {"random ids": torch.randint(0, config.vocab_size, (2, length), generator=generator)}
    if ids_of_text and max(ids_of_text) < config.vocab_size:
        inputs["text"] = torch.tensor([ids_of_text[:limit]])
    return {kind: model(ids).logits for kind, ids in inputs.items()}
