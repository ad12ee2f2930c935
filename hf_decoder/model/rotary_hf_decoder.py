"""Rotary position embeddings (Su et al. 2021).

Shapes: B batch, S tokens, H query heads, G key/value heads, E head_dim, R its rotated part.
"""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS, dynamic_rope_update

from .blocks_hf_decoder import blocks, has_kernels, is_for_blocks
from .configuration_hf_decoder import HfDecoderConfig
from .parts_hf_decoder import autocast_dtype


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

    Long ones on a CPU in blocks, and on CUDA by a kernel for both. What goes into no cache comes out of these in the
    dtype that autocast, if it is on, gives to attention: what attention rounds its inputs to then anyhow.
    """
    if is_for_blocks(query, key, cos, sin) and not cos.requires_grad:
        dtype = None if for_cache else autocast_dtype(query.device)  # None: that of the product with the cosines
        if has_kernels(query):
            return _BlockedRotation.apply(cos, sin, dtype, query, key)
        return tuple(_BlockedRotation.apply(cos, sin, dtype, x)[0] for x in (query, key))
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    return _rotate(query, cos, sin), _rotate(key, cos, sin)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """x (B, heads, S, E) by cos, sin (B or 1, 1, S, R)."""
    if cos.shape[-1] < x.shape[-1]:
        turned, rest = x[..., : cos.shape[-1]], x[..., cos.shape[-1] :]
        return torch.cat((_rotate(turned, cos, sin), rest), dim=-1)
    return x * cos + rotate_half(x) * sin


class _BlockedRotation(torch.autograd.Function):
    """Of query and key both by a kernel, or else of one tensor."""

    @staticmethod
    def forward(ctx, cos, sin, dtype, *tensors):
        ctx.save_for_backward(cos, sin)
        ctx.dtypes = [x.dtype for x in tensors]
        dtypes = [dtype or torch.result_type(x, cos) for x in tensors]
        return _rotated(tensors, cos, sin, dtypes, backwards=False)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        if torch.is_grad_enabled():  # for a second derivative, from the formula itself
            return None, None, None, *(_rotated_back(*pair, cos, sin) for pair in zip(grads, ctx.dtypes, strict=True))
        return None, None, None, *_rotated(grads, cos, sin, ctx.dtypes, backwards=True)


def _rotated_back(grad: torch.Tensor, dtype: torch.dtype, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)
    turned, rest = grad[..., : cos.shape[-1]], grad[..., cos.shape[-1] :]
    return torch.cat((turned * cos - rotate_half(turned * sin), rest), dim=-1).to(dtype)


def _rotated(
    tensors: Sequence[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    dtypes: Sequence[torch.dtype],
    backwards: bool,
) -> tuple[torch.Tensor, ...]:
    """Tensors (B, heads, S, E) rotated, or back, into memory laid out as (B, S, heads, E), like a projection's."""
    if len(tensors) == 2:
        from .triton_hf_decoder import rotated

        return rotated(*tensors, cos, sin, dtypes, backwards)
    (x,), (dtype,) = tensors, dtypes
    batch, heads, length, head_dim = x.shape
    rotary_dim, inner = cos.shape[-1], torch.result_type(x, cos)
    half = rotary_dim // 2
    output = x.new_empty(batch, length, heads, head_dim, dtype=dtype).transpose(1, 2)
    # whole rows of the batch while they are short, else pieces of one
    for rows in blocks(batch, length * heads * head_dim):
        of_rows = rows if cos.shape[0] > 1 else slice(None)
        for columns in blocks(length, heads * head_dim):
            block = x[rows, :, columns, :rotary_dim].to(inner)
            cosines, sines = cos[of_rows, None, columns], sin[of_rows, None, columns]
            rotated = block * cosines
            if backwards:
                turned = block * sines
                rotated[..., :half] += turned[..., half:]
                rotated[..., half:] -= turned[..., :half]
            else:
                rotated[..., :half] -= block[..., half:] * sines[..., :half]
                rotated[..., half:] += block[..., :half] * sines[..., half:]
            output[rows, :, columns, :rotary_dim] = rotated
            output[rows, :, columns, rotary_dim:] = x[rows, :, columns, rotary_dim:]
    return (output,)


__all__ = ["HfDecoderRotaryEmbedding", "apply_rotary_pos_emb"]
