"""Models in parts: tensor parallelism, FSDP2 under it, layers on disk."""

import pytest
import torch
from rank_work import SHAPE, Run, generate_in_parts, greedy_and_sampled, new_model, train, train_loaded_in_parts
from ranks import run_ranks, saves_parts
from transformers import AutoModelForCausalLM

from hf_decoder import HfDecoderForCausalLM


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def tied(request) -> bool:
    return request.param


@pytest.mark.process
@pytest.mark.parametrize(
    ("tp_size", "fsdp_size"),
    [
        pytest.param(2, 1, marks=saves_parts),
        pytest.param(1, 2, marks=pytest.mark.slow),
        pytest.param(2, 2, marks=pytest.mark.slow),
    ],
    ids=["tp", "fsdp2", "fsdp2 and tp"],
)
def test_training_in_parts_has_the_losses_of_one_process(tp_size, fsdp_size, tied, tmp_path):
    run = Run(folder=str(tmp_path), tied=tied)
    (one,) = run_ranks(1, train, [run], folder=tmp_path)[0]
    new_model(tie_word_embeddings=tied).save_pretrained(tmp_path / "model")
    ranks = tp_size * fsdp_size
    for found in run_ranks(
        ranks, train_loaded_in_parts, str(tmp_path / "model"), tp_size, fsdp_size, run, folder=tmp_path
    ):
        assert found["share"] == pytest.approx(1 / ranks, abs=0.02)  # 70 rows over 4 are not even
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-5)
        assert found["grad_norms"] == pytest.approx(one["grad_norms"], rel=1e-4)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model-trained").state_dict()
    for name, weight in one["weights"].items():
        torch.testing.assert_close(saved[name], weight, rtol=0, atol=1e-4)


@pytest.mark.process
def test_tensor_parallelism_generates_the_tokens_of_one_process(tied, tmp_path):
    model = new_model(tie_word_embeddings=tied).eval()
    model.save_pretrained(tmp_path / "model")
    prompts = torch.randint(2, SHAPE["vocab_size"], (3, 9), generator=torch.Generator().manual_seed(2))
    mask = torch.ones_like(prompts)
    prompts[1, :4], mask[1, :4] = 0, 0
    expected = greedy_and_sampled(model, prompts, mask)
    for found in run_ranks(2, generate_in_parts, str(tmp_path / "model"), prompts, mask, folder=tmp_path):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("where", ["auto", "by hand"])
def test_layers_on_disk_give_the_same_logits_and_tokens(where, tied, tmp_path):
    model = new_model(tie_word_embeddings=tied).eval()
    model.save_pretrained(tmp_path / "model")
    layer = sum(parameter.nbytes for parameter in model.model.layers[0].parameters())
    if where == "auto":
        table = model.model.embed_tokens.weight.nbytes
        settings = {"device_map": "auto", "max_memory": {"cpu": 2 * table + layer + 4000}}
    else:
        device_map = dict.fromkeys(["model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"], "cpu")
        settings = {"device_map": {**device_map, "model.layers.0": "disk", "model.layers.1": "disk"}}
    parts = HfDecoderForCausalLM.from_pretrained(tmp_path / "model", offload_folder=tmp_path / "disk", **settings)
    assert "disk" in parts.hf_device_map.values() and parts.model.layers[1].mlp.up_proj.weight.is_meta
    ids = torch.arange(2, 26)[None]
    with torch.no_grad():
        torch.testing.assert_close(parts(ids).logits, model(ids).logits, rtol=0, atol=0)
        loss = parts.train()(ids, labels=ids).loss
        torch.testing.assert_close(loss, model.train()(ids, labels=ids).loss)
    found, expected = (greedy_and_sampled(each.eval(), ids, torch.ones_like(ids)) for each in (parts, model))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
