"""Inputs and outputs of a forward pass, compiling and exporting."""

from typing import Any

import pytest
import torch
from tiny_models import SHAPE, random_ids, randomise, tiny_config, tiny_model
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM

from hf_decoder import HfDecoderForCausalLM, HfDecoderModel

MIXED = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"], "qk_norm": True}
VOCAB, WIDTH, LAYERS = SHAPE["vocab_size"], SHAPE["hidden_size"], SHAPE["num_hidden_layers"]


@pytest.fixture(scope="module")
def llama() -> LlamaForCausalLM:
    config = LlamaConfig(**SHAPE, rms_norm_eps=1e-6, tie_word_embeddings=True, pad_token_id=0)
    config._attn_implementation = "eager"
    return randomise(LlamaForCausalLM(config)).eval()


@torch.no_grad()
def test_hidden_states_and_attentions_are_llamas(llama: LlamaForCausalLM):
    model = tiny_model()
    ids = random_ids(2, 9)
    flags = {"output_hidden_states": True, "output_attentions": True}
    ours, theirs = model(ids, **flags), llama(ids, **flags)
    for name, count in (("hidden_states", LAYERS + 1), ("attentions", LAYERS)):
        assert len(ours[name]) == len(theirs[name]) == count
        for mine, other in zip(ours[name], theirs[name], strict=True):
            torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)
    assert ours.attentions[0].shape == (2, SHAPE["num_attention_heads"], 9, 9)
    torch.testing.assert_close(ours.attentions[0].sum(-1), torch.ones(2, 4, 9))
    base = model.model(ids, **flags)
    torch.testing.assert_close(base.last_hidden_state, ours.hidden_states[-1])
    assert model(ids).hidden_states is None and model(ids).attentions is None


@torch.no_grad()
@pytest.mark.parametrize("length", [9, 80])
def test_hidden_states_are_the_same_for_sdpa(length: int):
    model = tiny_model(**MIXED)
    ids = random_ids(1, length)
    states = []
    for attention in ("eager", "sdpa"):
        model.set_attn_implementation(attention)
        states.append(model(ids, output_hidden_states=True).hidden_states)
    for one, other in zip(*states, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=2e-5)


@torch.no_grad()
def test_flags_of_the_config_are_defaults():
    model = tiny_model(output_hidden_states=True, use_cache=False)
    assert len(model(random_ids(1, 3)).hidden_states) == LAYERS + 1


@torch.no_grad()
def test_tuples_in_place_of_the_dictionary(llama: LlamaForCausalLM):
    model = tiny_model()
    ids = random_ids(1, 5)
    for kwargs in ({}, {"labels": ids}, {"use_cache": False}, {"output_hidden_states": True}):
        full, short = model(ids, **kwargs), model(ids, return_dict=False, **kwargs)
        assert isinstance(short, tuple)
        assert len(short) == len(full.to_tuple()) == len(llama(ids, return_dict=False, **kwargs))
        torch.testing.assert_close(short[0], full[0])
    assert isinstance(model.model(ids, return_dict=False), tuple)


@torch.no_grad()
@pytest.mark.parametrize("keep", [0, 1, 3, torch.tensor([0]), torch.tensor([4, 1, 1]), torch.tensor([-1, 2])], ids=str)
def test_logits_to_keep(keep: Any, llama: LlamaForCausalLM):
    model = tiny_model()
    ids = random_ids(2, 6)
    full = model(ids).logits
    found = model(ids, logits_to_keep=keep).logits
    expected = full[:, keep] if torch.is_tensor(keep) else full[:, 6 - keep if keep else 0 :]
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(found, llama(ids, logits_to_keep=keep).logits, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("length", [7, 70])
def test_embeddings_in_place_of_ids(length: int):
    model = tiny_model(attn_implementation="sdpa", **MIXED)
    ids = random_ids(2, length)
    embeds = model.get_input_embeddings()(ids)
    found, expected = model(inputs_embeds=embeds, labels=ids), model(ids, labels=ids)
    torch.testing.assert_close(found.logits, expected.logits)
    torch.testing.assert_close(found.loss, expected.loss)


@pytest.mark.parametrize("inputs", [{}, {"input_ids": 1, "inputs_embeds": 1}], ids=["neither", "both"])
def test_exactly_one_kind_of_input(inputs: dict):
    model = tiny_model()
    values = {"input_ids": random_ids(1, 3), "inputs_embeds": torch.zeros(1, 3, WIDTH)}
    with pytest.raises(ValueError, match="input_ids or inputs_embeds"):
        model(**{name: values[name] for name in inputs})


IDS = random_ids(2, 9)
OTHER_LENGTHS: dict[str, dict[str, Any]] = {
    "a short mask": {"attention_mask": torch.ones(2, 7, dtype=torch.long)},
    "a long mask": {"attention_mask": torch.ones(2, 12, dtype=torch.long)},
    "few positions": {"position_ids": torch.arange(7)[None]},
    "many positions": {"position_ids": torch.arange(12)[None]},
    "one position": {"position_ids": torch.zeros(1, 1, dtype=torch.long)},
    "few labels": {"labels": IDS[:, :7]},
    "many labels": {"labels": torch.cat([IDS, IDS], 1)},
    "labels of one row": {"labels": IDS[:1]},
    "labels of all, logits of some": {"labels": IDS, "logits_to_keep": 3},
    "few shifted labels": {"labels": IDS, "shift_labels": IDS[:, 1:]},
}


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("given", OTHER_LENGTHS.values(), ids=OTHER_LENGTHS)
def test_arguments_of_another_length_are_refused(given: dict, grad: bool, training: bool):
    model = tiny_model(attn_implementation="sdpa").train(training)
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=r"columns, but|do not belong to"):
        model(IDS, **given)


def test_resizing_the_vocabulary_keeps_the_tie():
    model = tiny_model()
    before = model(random_ids(1, 4)).logits
    model.resize_token_embeddings(VOCAB + 6, mean_resizing=False)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.vocab_size == VOCAB + 6
    ids = random_ids(1, 4)
    torch.testing.assert_close(model(ids).logits[..., :VOCAB], before)
    for skip_logits in (True, False):
        loss = model(ids, labels=ids + 0 * ids, skip_logits=skip_logits).loss
        expected = torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:])
        torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("length", [9, 80])
def test_gradient_checkpointing_of_the_base_model(reentrant: bool, length: int):
    """Also with attention in tiles."""
    model = randomise(HfDecoderModel(tiny_config(attn_implementation="sdpa", **MIXED))).train()
    ids = random_ids(2, length)
    grads = []
    for checkpointing in (False, True):
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad()
        model(ids, use_cache=False).last_hidden_state.square().sum().backward()
        grads.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_logits_to_keep_of_each_row_apart():
    model, ids = tiny_model(), random_ids(2, 7)
    whole = model(ids).logits
    places = torch.tensor([[0, 6, 3], [5, 5, 1]])
    found = model(ids, logits_to_keep=places).logits
    torch.testing.assert_close(found, torch.stack([whole[row, at] for row, at in enumerate(places)]))
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[0, 2] = mask[1, 4:6] = True
    torch.testing.assert_close(model(ids, logits_to_keep=mask).logits, whole[mask])


# -- compilers


@pytest.mark.kernels
@torch.no_grad()
def test_forward_compiles_in_one_graph():
    model = tiny_model(attn_implementation="sdpa", **MIXED)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    for inputs in ({}, {"use_cache": False}, {"attention_mask": mask, "position_ids": positions}):
        found, expected = compiled(ids, **inputs).logits, model(ids, **inputs).logits
        real = mask.bool() if "attention_mask" in inputs else torch.ones_like(mask).bool()
        torch.testing.assert_close(found[real], expected[real], rtol=0, atol=2e-5)


@pytest.mark.kernels
@torch.no_grad()
def test_a_compiled_forward_isolates_documents_under_a_mask_of_ones():
    model = tiny_model(attn_implementation="sdpa", **MIXED)
    ids = random_ids(2, 12)
    inputs = {"position_ids": (torch.arange(12) % 5).expand(2, -1), "attention_mask": torch.ones_like(ids)}
    expected = torch.cat([model(document).logits for document in ids.split([5, 5, 2], dim=1)], dim=1)
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, **inputs).logits
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.parametrize("hidden", [slice(9, None), slice(2, 4), slice(0, 3)], ids=["right", "hole", "left"])
def test_a_compiled_forward_looks_for_documents_only_without_padding(hidden):
    model = tiny_model(attn_implementation="sdpa", **MIXED)
    ids = random_ids(2, 12)
    mask = torch.ones_like(ids)
    mask[0, hidden] = 0
    inputs = {"position_ids": (torch.arange(12) % 5).expand(2, -1), "attention_mask": mask}
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, **inputs).logits
    real = mask.bool()
    torch.testing.assert_close(found[real], model(ids, **inputs).logits[real], rtol=0, atol=2e-5)


@pytest.mark.kernels
def test_training_loss_compiles_in_one_graph():
    """Packed rows and ignored labels: value and gradients."""
    model = tiny_model(attn_implementation="sdpa", z_loss_coef=1e-3, final_logit_softcapping=20.0).train()
    ids = random_ids(2, 70)
    positions = (torch.arange(70) % 25).expand(2, -1)
    labels = ids.masked_fill(positions == 0, -100)
    inputs = {"position_ids": positions, "labels": labels, "use_cache": False}
    expected = model(ids, **inputs).loss
    expected.backward()
    wanted = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    found = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, **inputs).loss
    found.backward()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for parameter, gradient in zip(model.parameters(), wanted, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


@pytest.mark.kernels
@torch.no_grad()
@pytest.mark.skipif(
    torch.__version__.startswith("2.11."), reason="torch 2.11 cannot prove that min(12 n, 24 n) is 12 n, and refuses"
)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_exports(attention: str):
    model = tiny_model(attn_implementation=attention, use_cache=False, **MIXED)
    sequence = torch.export.Dim("sequence", min=2, max=60)
    ids = random_ids(2, 11)
    program = torch.export.export(
        model,
        (),
        {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
        dynamic_shapes={"input_ids": {1: sequence}, "attention_mask": {1: sequence}},
        strict=False,
    )
    for length in (11, 29):
        ids = random_ids(2, length)
        mask = torch.ones_like(ids)
        mask[1, :3] = 0
        found = program.module()(input_ids=ids, attention_mask=mask).logits
        expected = model(ids, attention_mask=mask).logits
        torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], rtol=0, atol=2e-5)


@pytest.mark.kernels
@pytest.mark.parametrize("kind", [{}, MIXED], ids=["full", "mixed"])
def test_generate_compiles_the_decoding_step_once(kind: dict):
    """`generate` with a static cache: one graph serves every token, in windows and past their end."""
    model = tiny_model(attn_implementation="sdpa", eos_token_id=None, **kind)
    ids = random_ids(1, 6)
    settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **settings)
    assert torch.equal(model.generate(ids, cache_implementation="static", **settings), expected)

    compile_config = CompileConfig(backend="aot_eager", fullgraph=True)
    compile_config._compile_all_devices = True  # a CPU is left out by default
    settings |= {"cache_implementation": "static", "compile_config": compile_config}
    before = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert torch.equal(model.generate(ids, **settings), expected)
    assert 1 <= torch._dynamo.utils.counters["stats"]["unique_graphs"] - before <= 2


def test_tied_weights_and_modules_that_are_not_split_are_named_rightly():
    model = tiny_model()
    assert set(model._no_split_modules) <= {type(module).__name__ for module in model.modules()}
    assert model.all_tied_weights_keys == {"lm_head.weight": "model.embed_tokens.weight"}
    assert not tiny_model(tie_word_embeddings=False).all_tied_weights_keys


@pytest.mark.parametrize("qk_norm", [True, False])
def test_plans_name_modules_that_are_there(qk_norm: bool):
    model = tiny_model(qk_norm=qk_norm)
    names = {name.replace(".0.", ".*.").replace(".1.", ".*.") for name, _ in model.named_modules()}
    for plan, prefix in ((model.config.base_model_tp_plan, "model."), (HfDecoderForCausalLM._tp_plan, "")):
        assert {prefix + name for name in plan} <= names
    assert {"model." + name for name in model.config.base_model_pp_plan} <= names
    # and every weight matrix of a layer has its place in the plan
    matrices = {
        name.replace(".0.", ".*.").replace(".1.", ".*.").removeprefix("model.")
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    }
    assert matrices <= set(model.config.base_model_tp_plan)
