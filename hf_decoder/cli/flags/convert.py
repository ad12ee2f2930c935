"""The flags of `hf-decoder convert`."""

from __future__ import annotations

from dataclasses import dataclass

from hf_decoder.cli.flags import flag, needed

OUTTYPES = ("f32", "f16", "bf16", "q8_0", "q4_0")
DESCRIPTION = "Converts a checkpoint from or to another family, or to GGUF or ONNX."


@dataclass(kw_only=True)
class ConvertArguments:
    """What is converted, and into what."""

    source: str = needed(
        "Folder, Hub name or .gguf file of the checkpoint to convert.", positional=True, metavar="SOURCE"
    )
    dest: str = needed("Folder to write, or a .gguf file; it must not exist.", positional=True, metavar="DEST")
    to: str = flag(
        "auto",
        "hf_decoder, a family (llama, mistral, qwen2, qwen3, ...), gguf or onnx. auto turns another family into ours, "
        "and ours into the stock class that expresses it exactly.",
    )
    outtype: str = flag("f16", "Type of the matrices in GGUF.", choices=OUTTYPES)
    max_shard_size: str = flag("5GB", "Largest weights file.", metavar="SIZE")
    verify: bool = flag(
        True,
        "Compare the logits of the result with those of the source; read GGUF back. What comes from GGUF is not "
        "compared. --no_verify skips this.",
    )
    revision: str | None = flag(None, "Branch, tag or commit of a Hub name.")


ARGUMENTS = (ConvertArguments,)
