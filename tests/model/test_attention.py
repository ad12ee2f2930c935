"""Padded, packed, batched and windowed rows give what each document gives alone, for every attention."""

import itertools
from typing import Any

import pytest
import torch
from tiny_models import ATTENTION_KINDS as KINDS
from tiny_models import WINDOWS, random_ids, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.integrations import flex_attention

from hf_decoder.model.modeling_hf_decoder import (
    HfDecoderRotaryEmbedding,
    apply_rotary_pos_emb,
)

IN_TILES = pytest.mark.usefixtures("in_tiles")
TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
LENGTHS = (7, 69, 137)  # of one tile or several, and past the end of a tile
# flex_attention is slow on a CPU, and differs from the others only in its masks
FLEX = ("flex_attention", "windows", 7)
CASES = pytest.mark.parametrize(
    ("attention", "kind", "length"), [*itertools.product(("eager", "sdpa"), KINDS, LENGTHS), FLEX]
)


def reference(ids: torch.Tensor, config: Any, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
    """Hidden states of one document (S,) from the definition in fp64, one token at a time."""
    weights = {name: tensor.double() for name, tensor in parameters.items()}
    head_dim, groups = config.head_dim, config.num_attention_heads // config.num_key_value_heads
    exponents = torch.arange(0, head_dim, 2).double() / head_dim
    frequencies = config.rope_parameters["rope_theta"] ** -exponents

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return x / (x.square().mean(-1, keepdim=True) + config.rms_norm_eps).sqrt() * weights[name + ".weight"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ weights[name + ".weight"].T + weights.get(name + ".bias", 0)

    def rotate(x: torch.Tensor, position: int) -> torch.Tensor:
        """Rotates every pair (x_i, x_{i + E/2}) as a complex number."""
        turned = torch.complex(*x.chunk(2, dim=-1)) * torch.polar(torch.ones_like(frequencies), position * frequencies)
        return torch.cat((turned.real, turned.imag), -1)

    x = weights["model.embed_tokens.weight"][ids]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}."
        h = norm(x, name + "input_layernorm")
        q, k, v = (
            linear(h, f"{name}self_attn.{kind}_proj").view(len(ids), -1, head_dim).clone() for kind in ("q", "k", "v")
        )
        if config.qk_norm:
            q, k = norm(q, name + "self_attn.q_norm"), norm(k, name + "self_attn.k_norm")
        if config.no_rope_layers is None or config.no_rope_layers[layer]:
            q, k = (torch.stack([rotate(row, p) for p, row in enumerate(tensor)]) for tensor in (q, k))
        rows = []
        for p in range(len(ids)):
            sliding = config.layer_types[layer] == "sliding_attention"
            first = max(0, p - config.sliding_window + 1) if sliding else 0
            heads = []
            for head in range(config.num_attention_heads):
                keys, values = k[first : p + 1, head // groups], v[first : p + 1, head // groups]
                heads.append((keys @ q[p, head] / head_dim**0.5).softmax(-1) @ values)
            rows.append(torch.cat(heads))
        x = x + linear(torch.stack(rows), name + "self_attn.o_proj")
        h = norm(x, name + "post_attention_layernorm")
        gate = linear(h, name + "mlp.gate_proj")
        x = x + linear(gate * gate.sigmoid() * linear(h, name + "mlp.up_proj"), name + "mlp.down_proj")
    return norm(x, "model.norm") @ weights["lm_head.weight"].T


@torch.no_grad()
@IN_TILES
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [7, 69])
def test_equals_the_definition_written_out(kind: str, length: int):
    model = tiny_model(**KINDS[kind])
    ids = random_ids(1, length)
    expected = reference(ids[0], model.config, model.state_dict())
    for attention in ("eager", "sdpa", *(["flex_attention"] if (kind, length) == FLEX[1:] else [])):
        model.set_attn_implementation(attention)
        torch.testing.assert_close(model(ids).logits[0].double(), expected, rtol=1e-5, atol=2e-5)


@pytest.mark.slow
@torch.no_grad()
def test_flex_attention_as_transformers_compiles_it(flex_attention_without_compiler, monkeypatch):
    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", flex_attention_without_compiler)
    model = tiny_model(attn_implementation="flex_attention", **KINDS["windows"])
    ids = random_ids(1, 7)
    expected = reference(ids[0], model.config, model.state_dict())
    torch.testing.assert_close(model(ids).logits[0].double(), expected, rtol=1e-5, atol=2e-5)


@torch.no_grad()
@IN_TILES
@CASES
def test_padded_equals_unpadded_and_batched_equals_single(kind: str, attention: str, length: int):
    model = tiny_model(attn_implementation=attention, **KINDS[kind])
    rows = [random_ids(1, n, seed=n) for n in (length, length // 2 + 1, 3, 1)]
    for side in ("left", "right"):
        ids = torch.zeros(len(rows), length + 2, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for index, row in enumerate(rows):
            place = slice(-row.shape[1], None) if side == "left" else slice(row.shape[1])
            ids[index, place], mask[index, place] = row[0], 1
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        logits = model(ids, attention_mask=mask, position_ids=positions).logits
        assert logits.isfinite().all()
        for index, row in enumerate(rows):
            torch.testing.assert_close(logits[index][mask[index].bool()], model(row).logits[0], **TOLERANCE)
            # RoPE depends on distances alone, so the positions may also be left to the model
        shifted = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(shifted[mask.bool()], logits[mask.bool()], rtol=0, atol=1e-4)


@torch.no_grad()
@IN_TILES
@CASES
@pytest.mark.parametrize("use_cache", [True, False])
def test_packed_equals_separate_documents(kind: str, attention: str, length: int, use_cache: bool):
    model = tiny_model(attn_implementation=attention, **KINDS[kind])
    packings = [[length, 1, 9, length // 2 + 3], [3, length + 4, 6, length // 2]]
    rows = [[random_ids(1, n, seed=n + 31 * r) for n in packing] for r, packing in enumerate(packings)]
    ids = torch.cat([torch.cat(row, 1) for row in rows])
    positions = torch.stack([torch.cat([torch.arange(n) for n in packing]) for packing in packings])
    separate = torch.cat([torch.cat([model(document).logits for document in row], 1) for row in rows])
    for mask in (None, torch.ones_like(ids)):  # a mask that hides nothing says nothing
        logits = model(ids, attention_mask=mask, position_ids=positions, use_cache=use_cache).logits
        torch.testing.assert_close(logits, separate, **TOLERANCE)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["plain", "windows"])
@pytest.mark.parametrize("length", LENGTHS)
def test_packed_gradients_equal_those_of_separate_documents(kind: str, attention: str, length: int):
    model = tiny_model(attn_implementation=attention, **KINDS[kind]).train()
    lengths = [length, 4, length // 2 + 3]
    documents = [random_ids(1, n, seed=n) for n in lengths]
    items = sum(lengths) - len(lengths)
    for document in documents:
        model(document, labels=document, num_items_in_batch=items).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    labels = torch.cat(documents, 1).clone()
    labels[0, [0, lengths[0], lengths[0] + lengths[1]]] = -100  # nothing predicts a document's first token
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model(torch.cat(documents, 1), position_ids=positions, labels=labels, num_items_in_batch=items).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-6)


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize(
    ("attention", "kind", "length"), [*itertools.product(("eager", "sdpa"), ("plain", "windows"), (9, 80)), FLEX]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fully_padded_rows_are_finite(kind: str, attention: str, dtype: torch.dtype, length: int):
    model = tiny_model(attn_implementation=attention, **KINDS[kind]).to(dtype)
    ids = random_ids(3, length)
    mask = torch.ones_like(ids)
    mask[0] = 0
    mask[1, :5] = 0
    outputs = model(ids, attention_mask=mask)
    assert outputs.logits.isfinite().all()
    # and the other rows do not notice it
    alone = model(ids[1:], attention_mask=mask[1:]).logits
    torch.testing.assert_close(outputs.logits[1:][mask[1:].bool()], alone[mask[1:].bool()], rtol=2e-2, atol=2e-2)
    assert model.generate(ids, attention_mask=mask, max_new_tokens=3, do_sample=False).shape == (3, length + 3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_fully_padded_rows_train(attention: str, dtype: torch.dtype):
    model = tiny_model(attn_implementation=attention, **WINDOWS).to(dtype).train()
    ids = random_ids(2, 9)
    mask = torch.ones_like(ids)
    mask[0] = 0
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels).loss
    loss.backward()
    assert loss.isfinite()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa", "flex_attention"])
@pytest.mark.parametrize("kind", ["plain", "windows"])
def test_left_padded_generation_equals_single(kind: str, attention: str):
    model = tiny_model(attn_implementation=attention, eos_token_id=None, **KINDS[kind])
    rows = [random_ids(1, n, seed=n) for n in (9, 4, 1)]
    ids = torch.zeros(3, 9, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        ids[index, -row.shape[1] :], mask[index, -row.shape[1] :] = row[0], 1
    batched = model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False)
    for index, row in enumerate(rows):
        single = model.generate(row, attention_mask=torch.ones_like(row), max_new_tokens=8, do_sample=False)
        assert torch.equal(batched[index, 9:], single[0, row.shape[1] :])


@torch.no_grad()
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_a_prepared_mask_is_used_as_it_is(attention: str):
    model = tiny_model(attn_implementation=attention)
    ids = random_ids(2, 70)
    seen = torch.ones(70, 70, dtype=torch.bool).tril()
    seen[40:, 5:20] = False
    bias = torch.zeros(2, 1, 70, 70).masked_fill(~seen, torch.finfo(torch.float32).min)
    found = model(ids, attention_mask=bias).logits
    torch.testing.assert_close(found[:, :40], model(ids).logits[:, :40], **TOLERANCE)
    assert (found[:, 40:] - model(ids).logits[:, 40:]).abs().max() > 1e-2
    by_kind = model(ids, attention_mask={"full_attention": bias}).logits
    torch.testing.assert_close(by_kind, found)


# -- the parts, each against its definition


class SoftmaxTypes(TorchDispatchMode):
    """Records the dtype of every softmax."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._softmax.default:
            self.seen.add(result.dtype)
        return result


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_softmax_is_fp32_in_eager_attention(dtype: torch.dtype):
    model = tiny_model().to(dtype)
    with SoftmaxTypes() as types:
        output = model(random_ids(1, 9), output_attentions=True)
    assert types.seen == {torch.float32}
    assert output.attentions[0].dtype == output.logits.dtype == dtype


def rotary_model(tmp_path: Any, how: str) -> Any:
    config = {"max_position_embeddings": 32768, "head_dim": 16}
    if how == "to":
        return tiny_model(**config).to(torch.bfloat16)
    if how == "half-and-back":
        return tiny_model(**config).half().float()
    if how == "bfloat16":
        return tiny_model(**config).bfloat16()
    if how == "default-dtype":
        torch.set_default_dtype(torch.bfloat16)
        try:
            return tiny_model(**config)
        finally:
            torch.set_default_dtype(torch.float32)
    if how == "meta":
        with torch.device("meta"):
            model = type(tiny_model())(tiny_config(**config))
        model = model.to(torch.bfloat16).to_empty(device="cpu")
        model.init_weights()
        model.model._init_weights(model.model.rotary_emb)
        return model
    model = tiny_model(**config)
    model.save_pretrained(tmp_path)
    return type(model).from_pretrained(tmp_path, dtype=torch.bfloat16)


@pytest.mark.parametrize("how", ["to", "half-and-back", "bfloat16", "default-dtype", "meta", "from_pretrained"])
def test_angles_are_fp32_whatever_the_models_type(how: str, tmp_path):
    """At position 30000 a frequency rounded to bf16 turns by a random angle."""
    model = rotary_model(tmp_path, how)
    rotary = model.model.rotary_emb
    assert rotary.inv_freq.dtype == rotary.original_inv_freq.dtype == torch.float32
    positions = torch.tensor([[0, 1, 4097, 30000]])
    exact = positions[0].double()[:, None] * 10000.0 ** (-torch.arange(0, 16, 2).double() / 16)
    cos, sin = rotary(torch.zeros(1, 4, 32), positions)
    assert cos.dtype == torch.float32
    # fp32 holds 30000 rad to about 1e-3
    torch.testing.assert_close(cos[0].double(), torch.cat([exact.cos()] * 2, -1), rtol=0, atol=4e-3)
    torch.testing.assert_close(sin[0].double(), torch.cat([exact.sin()] * 2, -1), rtol=0, atol=4e-3)
    assert rotary(torch.zeros(1, 4, 32, dtype=torch.bfloat16), positions)[0].dtype == torch.bfloat16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(rotary(torch.zeros(1, 4, 32), positions)[0], cos)


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "longrope", "short_factor": [1.0] * 6, "long_factor": [4.0] * 6},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 4.0},
        {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_scaled_angles_survive_a_change_of_type(rope: dict):
    """Also where the frequencies change with the length: back and forth over the original length."""
    config = tiny_config(rope_parameters=rope | {"original_max_position_embeddings": 16}, max_position_embeddings=32)
    plain, changed = HfDecoderRotaryEmbedding(config), HfDecoderRotaryEmbedding(config).bfloat16()
    for length in (8, 50, 8, 40):
        positions, x = torch.arange(length)[None], torch.zeros(1, 1)
        for mine, theirs in zip(changed(x, positions), plain(x, positions), strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


def test_partial_rotation_leaves_the_rest_alone():
    query = torch.randn(1, 2, 5, 12)
    angle = torch.randn(1, 5, 3)
    cos, sin = (torch.cat((f(angle), f(angle)), -1) for f in (torch.cos, torch.sin))
    turned = apply_rotary_pos_emb(query, cos, sin)
    torch.testing.assert_close(turned[..., 6:], query[..., 6:])
    pairs = torch.complex(query[..., :3], query[..., 3:6]) * torch.polar(torch.ones_like(angle), angle)[:, None]
    torch.testing.assert_close(turned[..., :6], torch.cat((pairs.real, pairs.imag), -1))
