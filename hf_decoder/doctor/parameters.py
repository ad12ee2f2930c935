"""Rows about the loaded model: rotary frequencies, tied embeddings, half precision."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hf_decoder.doctor.numerics import CLASS_REMEDY, difference, left_padded
from hf_decoder.doctor.report import Check, Finding, failed, passed, skipped, warned
from hf_decoder.doctor.subject import Subject
from hf_decoder.interop.checkpoint import read_tensors
from hf_decoder.safety.quiet import quiet

# An angle is a product in fp32. Its relative error is up to 2**-24, and as much again from its frequency.
ANGLE_ERROR = 2.0**-22
NO_FORMULA = "no rotary embedding that one set of rope_parameters describes"


def _rotary_modules(model: Any) -> dict[str, nn.Module]:
    """The rotary embeddings by name, if one set of `rope_parameters` describes them all."""
    if "rope_type" not in (getattr(model.config.get_text_config(), "rope_parameters", None) or {}):
        return {}
    return {
        name: module
        for name, module in model.named_modules()
        if "RotaryEmbedding" in type(module).__name__ and isinstance(getattr(module, "inv_freq", None), torch.Tensor)
    }


def _frequencies(config: Any, pairs: int) -> tuple[torch.Tensor, float]:
    """The inverse frequencies that the config asks for, (pairs,) in fp64, and the factor on cosine and sine.

    Plain frequencies follow their definition, theta**(-2i/R) (Su et al. 2021, section 3.2.2). Scaled ones come from
    transformers' functions.
    """
    rope = config.rope_parameters
    if rope["rope_type"] == "default":
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        rotary_dim = int(head_dim * (rope.get("partial_rotary_factor") or 1.0))
        if -(-rotary_dim // 2) != pairs:  # a class that rotates another number of dimensions than the config says
            rotary_dim = 2 * pairs
        exponents = torch.arange(0, rotary_dim, 2, dtype=torch.float64) / rotary_dim
        return rope["rope_theta"] ** -exponents, 1.0
    inv_freq, scale = ROPE_INIT_FUNCTIONS[rope["rope_type"]](config)
    return inv_freq.double(), scale


def _positions(config: Any) -> torch.Tensor:
    """64 positions (1, 64) over the context that the plain frequencies are meant for."""
    rope = config.rope_parameters
    longest = config.max_position_embeddings
    if rope["rope_type"] == "longrope":
        longest = rope.get("original_max_position_embeddings") or longest
    return torch.unique(torch.linspace(0, longest - 1, 64).long())[None]


@torch.no_grad()
def _angle_error(module: nn.Module, config: Any) -> float:
    """The largest error of cosine and sine over the context, as a multiple of what fp32 explains."""
    positions = _positions(config)
    module = copy.deepcopy(module)  # some scalings change their buffers when they are called
    frequencies, scale = _frequencies(config, module.inv_freq.numel())  # type: ignore[operator]
    angles = positions[0, :, None].double() * frequencies
    cos, sin = module(torch.zeros(1, 1), positions)
    errors = []
    for layout in (torch.cat((angles, angles), dim=-1), angles.repeat_interleave(2, dim=-1)):  # by halves or by pairs
        if layout.shape != cos[0].shape:
            continue
        allowed = (1e-5 + layout * ANGLE_ERROR) * abs(scale)
        pairs = ((cos, layout.cos()), (sin, layout.sin()))
        errors.append(max(float(((f[0].double() - exact * scale).abs() / allowed).max()) for f, exact in pairs))
    return min(errors, default=0.0)


def check_rope(subject: Subject) -> Finding:
    """The loaded frequencies follow the formula, and so do cosine and sine over the whole context."""
    config = subject.model.config.get_text_config()
    modules = _rotary_modules(subject.model)
    if not modules:
        return skipped(NO_FORMULA)
    rope = config.rope_parameters
    for name, module in modules.items():
        inv_freq: Any = module.inv_freq
        expected, _ = _frequencies(config, inv_freq.numel())
        if inv_freq.dtype != torch.float32:
            return failed(f"{name}.inv_freq is {inv_freq.dtype}, not float32")
        if inv_freq.shape != expected.shape or not torch.allclose(inv_freq.double(), expected, rtol=1e-5, atol=0.0):
            return failed(
                f"{name}.inv_freq is not what rope_type={rope['rope_type']!r} and rope_theta={rope['rope_theta']} give"
            )
        error = _angle_error(module, config)
        if not error <= 1.0:
            return failed(f"cosines and sines of {name} are off by {error:.0f} times what rounding in fp32 explains")
    last = int(_positions(config).max())
    return passed(f"{rope['rope_type']}, theta {rope['rope_theta']:g}, exact up to position {last:,}")


def check_rope_cast(subject: Subject) -> Finding:
    """`model.to(bfloat16)` does not change the angles."""
    config = subject.model.config.get_text_config()
    modules = _rotary_modules(subject.model)
    if not modules:
        return skipped(NO_FORMULA)
    for name, module in modules.items():
        error = _angle_error(copy.deepcopy(module).to(torch.bfloat16), config)
        if not error <= 1.0:
            return warned(
                f"model.to(torch.bfloat16) rounds the frequencies of {name}: angles are off by {error:,.0f} times "
                "what fp32 explains"
            )
    return passed("model.to(torch.bfloat16) leaves angles in fp32")


def check_tied(subject: Subject) -> Finding:
    """Tied embeddings are one tensor, in memory and in the files. Untied ones are two."""
    model = subject.model
    table, head = model.get_input_embeddings(), model.get_output_embeddings()
    if table is None or head is None:
        return skipped("the class names no input or output embeddings")
    tied = bool(getattr(model.config.get_text_config(), "tie_word_embeddings", False))
    shared = table.weight is head.weight
    names = {"table": _name_of(model, table), "head": _name_of(model, head)}
    if not tied:
        if shared:
            return failed(f"tie_word_embeddings is false, but {names['head']} is {names['table']} once loaded")
        return passed("a separate head, as the config says")
    try:
        saved = {} if subject.is_quantized else read_tensors(subject.folder)
    except ValueError as error:
        return skipped(f"the files cannot be read: {error}")
    both = all(name in saved for name in names.values())
    if both and not torch.equal(saved[names["table"]].load(), saved[names["head"]].load()):
        return failed(
            f"tie_word_embeddings is true, but the files hold a {names['head']} that differs from {names['table']}",
            "set tie_word_embeddings to false in config.json if the head was trained on its own",
        )
    if not shared:
        return failed(f"tie_word_embeddings is true, but {names['head']} is a tensor of its own once loaded")
    if both:
        size = saved[names["head"]].num_bytes / 1e6
        return failed(f"{names['head']} is saved again beside {names['table']}: {size:,.1f} MB too many")
    return passed(f"{names['head']} is {names['table']}, saved once")


def _name_of(model: nn.Module, module: nn.Module) -> str:
    return next((f"{name}.weight" for name, part in model.named_modules() if part is module), "?")


@torch.inference_mode()
def _half_logits(model: Any, inputs: dict[str, torch.Tensor], attention: str) -> torch.Tensor:
    with quiet():
        model.set_attn_implementation(attention)
    return model(**inputs, use_cache=False).logits


def check_half(subject: Subject) -> Finding:
    """Logits are finite in bf16 and fp16, even in rows and columns of padding alone."""
    length = subject.probe_tokens // 2
    inputs = left_padded(subject, subject.ids(3, length), [length, length // 2, length])
    inputs["attention_mask"][2] = 0  # a row of padding alone
    if not subject.accepts("position_ids"):
        del inputs["position_ids"]
    plain = {"input_ids": subject.ids(1, length)}
    attentions = ["eager"] if subject.model.config._attn_implementation == "eager" else ["sdpa", "eager"]
    with torch.inference_mode():
        expected = subject.model(**plain, use_cache=False).logits
    subject.release_model()
    seen = []
    for dtype in (torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        model, _ = subject.load(dtype)
        for attention in attentions:
            if not bool(_half_logits(model, inputs, attention).isfinite().all()):
                if bool(_half_logits(model, plain, attention).isfinite().all()):
                    return failed(f"padding gives values that are not finite in {name} with {attention} attention")
                if dtype is torch.float16:
                    return warned("overflows in float16, without any padding", "run it in bfloat16")
                return failed(f"the logits are not finite in {name} with {attention} attention", "run it in float32")
        seen.append(f"{name} within {difference(expected, _half_logits(model, plain, attentions[0])):.0e}")
        del model
    return passed(f"a row of padding alone is fine; {', '.join(seen)} of fp32")


CHECKS = (
    Check(
        "rope",
        "RoPE frequencies follow the formula",
        "positions are wrong: the longer the context, the more garbled the model reads it",
        CLASS_REMEDY + "compare rope_parameters in config.json with what it was trained with",
        check_rope,
    ),
    Check(
        "rope_cast",
        "RoPE survives .to(bfloat16)",
        "distant positions of a text become indistinct",
        "load with dtype=torch.bfloat16 instead of calling .to(torch.bfloat16)",
        check_rope_cast,
        level="default",
    ),
    Check(
        "tied",
        "embeddings tied or not, as said",
        "the head is untrained, or no longer follows the embeddings in training",
        "load it and save_pretrained it again",
        check_tied,
    ),
    Check(
        "half",
        "no NaN in bf16 and fp16",
        "one row of padding can turn a whole batch, or a training run, into NaN",
        CLASS_REMEDY + "never batch an empty row",
        check_half,
        level="default",
    ),
)
