"""Trainings laid out over processes equal that of one process, and go on in another layout."""

import pytest
import torch
from rank_work import Run, new_model, orthogonalise_in_layouts, some_matrices, train
from ranks import resumes_in_several, run_ranks
from transformers import AutoModelForCausalLM

from hf_decoder.training import optimizers
from hf_decoder.training.checkpoint_formats import form_of

CASES = {
    "muon": {},
    "muon, accumulation": {"accumulation": 2},
    "muon, clipped hard, untied": {"max_grad_norm": 0.05, "tied": False},
    "muon, not clipped": {"max_grad_norm": 0.0},
    "adamw, untied": {"optim": "adamw", "tied": False},
    "muon in bf16": {"newton_schulz": torch.bfloat16},
}
NAMES = list(CASES)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains every case in a layout, once; returns what each rank found, by case."""
    done: dict[tuple[str, int], list[dict]] = {}

    def run(layout: str, world_size: int, names=NAMES):
        if (layout, world_size) not in done:
            folder = tmp_path_factory.mktemp(layout)
            runs = [Run(layout=layout, folder=str(folder), **CASES[name]) for name in names]
            found = run_ranks(world_size, train, runs, folder=folder)
            done[layout, world_size] = [dict(zip(names, rank, strict=True)) for rank in found]
        return done[layout, world_size]

    return run


@pytest.mark.process
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_processes_have_the_losses_of_one(layout, name, trained):
    (one,) = trained("one", 1)
    first, second = trained(layout, 2)
    compare(one[name], first[name], name)
    assert first[name]["losses"] == second[name]["losses"]
    assert first[name]["logits_held"] == 0
    kind = {"ddp": ("DistributedDataParallel", "Parameter"), "fsdp2": ("FSDPHfDecoderForCausalLM", "DTensor")}
    assert (first[name]["wrapper"], first[name]["weight_type"]) == kind[layout]
    if "muon" in name:
        assert first[name]["momentum_type"] == ("DTensor" if layout == "fsdp2" else "Tensor")


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_two_compiled_processes_have_the_losses_of_one_that_is_not(layout, trained, tmp_path):
    (one,) = trained("one", 1)
    run = Run(layout=layout, folder=str(tmp_path), arguments={"torch_compile": True})
    (first,), (second,) = run_ranks(2, train, [run], folder=tmp_path)
    compare(one["muon"], first, "muon")
    assert first["losses"] == second["losses"]
    # FSDP2 gathers the head around a call of the module, which the compiler is not to look into
    assert (first["logits_held"] > 0) == (layout == "fsdp2")


@pytest.mark.slow
def test_four_processes_have_the_losses_of_one_where_shards_are_uneven_and_matrices_fewer_than_ranks(trained):
    names = ["muon", "muon, accumulation"]
    (one,), (first, *_) = trained("one", 1), trained("fsdp2", 4, names)
    for name in names:
        compare(one[name], first[name], name)


def compare(one, several, name):
    tolerance = 2e-4 if "bf16" in name else 1e-5
    assert len(one["losses"]) == 6 and len(set(one["losses"])) == 6
    assert several["losses"] == pytest.approx(one["losses"], rel=tolerance)
    assert several["grad_norms"] == pytest.approx(one["grad_norms"], rel=50 * tolerance)
    assert several["weights"].keys() == one["weights"].keys()
    start = new_model(tie_word_embeddings=CASES[name].get("tied", True)).state_dict()
    for key, weight in one["weights"].items():
        moved = (weight - start[key]).abs().max()
        assert moved > 1e-3, key
        torch.testing.assert_close(several["weights"][key], weight, rtol=0, atol=float(moved) * 1e3 * tolerance)


@pytest.mark.process
def test_muon_orthogonalises_whole_matrices_in_every_layout(tmp_path, monkeypatch):
    monkeypatch.setattr(optimizers, "NEWTON_SCHULZ_DTYPE", torch.float32)
    expected = optimizers.orthogonalise(torch.stack(some_matrices()))
    layouts = ["rows", "columns", "replicas", "shards of replicas", "rows and columns", "rows twice"]
    for found in run_ranks(4, orthogonalise_in_layouts, layouts, folder=tmp_path):
        assert list(found) == [*layouts, "shards of shards"]
        for name, results in found.items():
            torch.testing.assert_close(torch.stack(results), expected, msg=lambda text, name=name: f"{name}: {text}")


FULL = {}
SHARDED = {
    "fsdp_config": {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["HfDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT",
    }
}


@pytest.mark.process
@pytest.mark.parametrize(
    ("optim", "fsdp", "order"),
    [
        pytest.param("muon", FULL, ("one", "ddp", "fsdp2", "one"), marks=resumes_in_several),
        pytest.param("adamw", FULL, ("fsdp2", "one", "fsdp2", "ddp"), marks=pytest.mark.slow),
        pytest.param("muon", SHARDED, ("one", "fsdp2", "ddp", "fsdp2"), marks=pytest.mark.slow),
        pytest.param("muon", SHARDED, ("fsdp2", "one", "fsdp2", "one"), marks=pytest.mark.slow),
    ],
)
def test_a_run_goes_on_in_another_layout(optim, fsdp, order, tmp_path):
    shared = {"optim": optim, "steps": 2 * len(order), "tied": optim == "muon"}
    (expected,) = run_ranks(1, train, [Run(folder=str(tmp_path / "whole"), **shared)], folder=tmp_path)[0]
    checkpoint, losses = None, []
    for number, layout in enumerate(order, 1):
        folder = tmp_path / f"{number}-{layout}"
        arguments = {"save_strategy": "steps", "save_steps": 2} | (fsdp if layout == "fsdp2" else {})
        run = Run(layout, folder=str(folder), stop=2 * number, resume=checkpoint, arguments=arguments, **shared)
        (part,) = run_ranks(1 if layout == "one" else 2, train, [run], folder=tmp_path)[0]
        losses += part["losses"]
        checkpoint = folder / f"checkpoint-{2 * number}"
        form = "plain" if layout != "fsdp2" else "sharded" if fsdp else "full"
        assert form_of(checkpoint) == form
        # a checkpoint is a model folder unless it is in shards; what is saved at the end always is
        for saved in [folder / "final"] + [checkpoint] * (form != "sharded"):
            weights = AutoModelForCausalLM.from_pretrained(saved).state_dict()
            assert all(torch.equal(weights[name], weight) for name, weight in part["weights"].items())
    assert not list(tmp_path.glob("*/*-as-*"))  # copies made for another layout are gone
    assert losses == pytest.approx(expected["losses"], rel=1e-5)
    for name, weight in expected["weights"].items():
        torch.testing.assert_close(part["weights"][name], weight, rtol=0, atol=1e-4)
