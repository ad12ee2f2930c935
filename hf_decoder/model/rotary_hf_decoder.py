"""Rotary position embeddings (Su et al. 2021).

Shapes: B batch, S tokens, H query heads, G key/value heads, E head_dim, R its rotated part.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .blocks_hf_decoder import blocks, is_for_blocks
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
    query: torch.Tensor, key: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, for_cache: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotates query (B, H, S, E) and key (B, G, S, E) by cos, sin (B or 1, S, R); the rest stays.

    Long ones on a CPU in blocks. What goes into no cache comes out of these in the dtype that autocast, if it is on,
    gives to attention: what attention rounds its inputs to then anyhow.
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(query, cos, sin, for_cache), _rotate(key, cos, sin, for_cache)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, for_cache: bool) -> torch.Tensor:
    """x (B, H, S, E) by cos, sin (B or 1, 1, S, R)."""
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat((_rotate(turned, cos, sin, for_cache), rest), dim=-1)
    if is_for_blocks(x, cos, sin) and not cos.requires_grad:
        dtype = torch.result_type(x, cos)
        if not for_cache and torch.is_autocast_enabled("cpu"):
            dtype = torch.get_autocast_dtype("cpu")
        return _BlockedRotation.apply(x, cos, sin, dtype)
    return x * cos + rotate_half(x) * sin


class _BlockedRotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin, dtype):
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _rotate_in_blocks(x, cos, sin, dtype)

    @staticmethod
    def backward(ctx, grad_output):
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, from the formula itself
            grad = grad_output * cos - rotate_half(grad_output * sin)
            return grad.to(ctx.dtype), None, None, None
        return _rotate_in_blocks(grad_output, cos, sin, ctx.dtype, backwards=True), None, None, None


def _rotate_in_blocks(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, dtype: torch.dtype, backwards: bool = False
) -> torch.Tensor:
    """x (B, H, S, E) rotated, or rotated back, into memory laid out as (B, S, H, E), like that of a projection."""
    batch, heads, length, head_dim = x.shape
    half, inner = head_dim // 2, torch.result_type(x, cos)
    output = x.new_empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)
    # whole rows of the batch while they are short, else pieces of one
    for rows in blocks(batch, length * heads * head_dim):
        of_rows = rows if cos.shape[0] > 1 else slice(None)
        for columns in blocks(length, heads * head_dim):
            block = x[rows, :, columns].to(inner)
            cosines, sines = cos[of_rows, :, columns], sin[of_rows, :, columns]
            rotated = block * cosines
            if backwards:
                turned = block * sines
                rotated[..., :half] += turned[..., half:]
                rotated[..., half:] -= turned[..., :half]
            else:
                rotated[..., :half] -= block[..., half:] * sines[..., :half]
                rotated[..., half:] += block[..., :half] * sines[..., half:]
            output[rows, :, columns] = rotated
    return output


__all__ = ["HfDecoderRotaryEmbedding", "apply_rotary_pos_emb"]
