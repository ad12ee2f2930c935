"""Random weights in the formats of a GGUF file, and small files of them, made by the package gguf."""

from pathlib import Path

import gguf
import numpy as np
import torch

# where the scales of a block stand, in fp16
SCALES = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}
# scales that make weights of a tenth
USUAL = {"Q4_0": 2.0**-6, "Q8_0": 2.0**-10, "Q4_K": 2.0**-11, "Q5_K": 2.0**-12, "Q6_K": 2.0**-13}


def random_rows(name: str, outputs: int, inputs: int, seed: int = 0, scale: float | None = None) -> torch.Tensor:
    """Rows (outputs, bytes) of random codes; `scale` of all blocks, else random ones."""
    random = np.random.default_rng(seed)
    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[name]]
    rows = random.integers(0, 256, (outputs, inputs // block, size), dtype=np.uint8)
    for place in SCALES[name]:
        usual = random.uniform(-1, 1, (*rows.shape[:2], 1)) * USUAL[name]
        scales = usual if scale is None else np.full_like(usual, scale)
        rows[..., place : place + 2] = scales.astype(np.float16).view(np.uint8)
    return torch.from_numpy(rows.reshape(outputs, -1))


def numbers(name: str, rows: torch.Tensor) -> torch.Tensor:
    """The rows as the package gguf has them."""
    return torch.from_numpy(gguf.dequantize(rows.numpy(), gguf.GGMLQuantizationType[name]))


def write_file(
    path: Path,
    architecture: str = "llama",
    kind: str = "Q4_K",
    head: str | None = "Q6_K",
    rope_factors: int = 0,
    **fields: int,
) -> None:
    """A GGUF file of two random layers whose matrices are of one type, the head of another, tied for None."""
    shape = {"embedding_length": 256, "feed_forward_length": 512, "block_count": 2, "attention.head_count": 8}
    shape |= {"attention.head_count_kv": 4, "context_length": 128}
    writer = gguf.GGUFWriter(path, architecture)
    for name, value in (shape | {"rope.dimension_count": 32, "attention.key_length": 32} | fields).items():
        writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", 1e-5)
    words = [f"w{i}" for i in range(107)]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(words)
    writer.add_token_scores([0.0] * len(words))
    writer.add_token_types([1] * len(words))
    for name, value in (("bos", 1), ("eos", 2), ("padding", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", value)
    fused = architecture == "phi3"
    matrices = {"attn_output": (256, 256), "ffn_down": (256, 512), "ffn_up": (1024 if fused else 512, 256)}
    if fused:
        matrices["attn_qkv"] = (512, 256)
    else:
        matrices |= {"attn_q": (256, 256), "attn_k": (128, 256), "attn_v": (128, 256), "ffn_gate": (512, 256)}
    matrices = {f"blk.{layer}.{name}": size for layer in range(2) for name, size in matrices.items()}
    for seed, (name, size) in enumerate({**matrices, "token_embd": (107, 256), "output": (107, 256)}.items()):
        if name != "output" or head is not None:
            of = head if name == "output" else kind
            rows = random_rows(str(of), *size, seed=seed).numpy()
            writer.add_tensor(f"{name}.weight", rows, raw_dtype=gguf.GGMLQuantizationType[str(of)])
    norms = [f"blk.{layer}.{name}" for layer in range(2) for name in ("attn_norm", "ffn_norm")]
    for name in (*norms, "output_norm"):
        writer.add_tensor(f"{name}.weight", np.linspace(0.8, 1.1, 256, dtype=np.float32))
    if architecture == "qwen2":
        for layer in range(2):
            for name, size in (("q", 256), ("k", 128), ("v", 128)):
                writer.add_tensor(f"blk.{layer}.attn_{name}.bias", np.linspace(-1, 1, size, dtype=np.float32))
    if architecture == "qwen3":
        for layer in range(2):
            for name in ("q", "k"):
                writer.add_tensor(f"blk.{layer}.attn_{name}_norm.weight", np.linspace(0.5, 1.5, 32, dtype=np.float32))
    if rope_factors:
        writer.add_tensor("rope_freqs.weight", np.full(rope_factors, 8.0, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
