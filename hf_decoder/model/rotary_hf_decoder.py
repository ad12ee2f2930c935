"""Rotary position embeddings (Su et al. 2021).

Shapes: B batch, S tokens, H query heads, G key/value heads, E head_dim, R its rotated part.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .configuration_hf_decoder import HfDecoderConfig


class HfDecoderRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE. The name and `original_inv_freq` are what transformers restores buffers by."""

    def __init__(self, config: HfDecoderConfig):
        super().__init__()
        self.max_seq_len_cached = config.max_position_embeddings
        self.original_max_seq_len = config.max_position_embeddings
        self.config = config
        self.rope_type = config.rope_parameters["rope_type"]
        rope_init_fn: Callable = self.compute_default_rope_parameters
        if self.rope_type != "default":
            rope_init_fn = ROPE_INIT_FUNCTIONS[self.rope_type]
        inv_freq, self.attention_scaling = rope_init_fn(config)
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.register_buffer("original_inv_freq", inv_freq.clone(), persistent=False)

    def _apply(self, fn, recurse=True):
        # `.to(dtype)` changes the type of every buffer, but angles far into a text need frequencies in fp32
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = self._buffers[name]
            if moved.dtype != buffer.dtype:
                self._buffers[name] = buffer.to(moved.device)
        return self

    @staticmethod
    def compute_default_rope_parameters(
        config: HfDecoderConfig, device: torch.device | None = None, seq_len: int | None = None, **kwargs
    ) -> tuple[torch.Tensor, float]:
        """Returns the inverse frequencies theta**(-2i/R) of the R rotated dimensions, (R/2,), and the scale 1."""
        rotary_dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(device=device, dtype=torch.float) / rotary_dim
        return 1.0 / (config.rope_parameters["rope_theta"] ** exponents), 1.0

    @torch.no_grad()
    @dynamic_rope_update
    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids (B or 1, S) -> cos, sin (B or 1, S, R) in x's dtype; angles in fp32 whatever that dtype is."""
        # an outer product written as a multiplication: autocast leaves it in fp32
        angles = position_ids[..., None].float() * self.inv_freq.to(device=x.device, dtype=torch.float)
        angles = torch.cat((angles, angles), dim=-1)
        cos = angles.cos() * self.attention_scaling
        sin = angles.sin() * self.attention_scaling
        return cos.to(x.dtype), sin.to(x.dtype)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    """Turns (a, b) halves of the last dimension into (-b, a)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def apply_rotary_pos_emb(
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates query (B, H, S, E) and key (B, G, S, E) by cos, sin (B or 1, S, R); the rest stays."""
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        if cos.shape[-1] == x.shape[-1]:
            return x * cos + rotate_half(x) * sin
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat((turned * cos + rotate_half(turned) * sin, rest), dim=-1)

    return rotate(query), rotate(key)


__all__ = ["HfDecoderRotaryEmbedding", "apply_rotary_pos_emb"]
