"""The recipe: which parameter learns how, against torch's own optimizers."""

import contextlib
import copy
import re

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import SchedulerType

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.engine.precision import FAST_HALF_PRECISION
from hf_decoder.training.optimizers import (
    MuonAdamW,
    check_schedule,
    grouped_optimizer,
    muon_adamw,
    orthogonalise,
    parameter_groups,
    wsd_kwargs,
)

SHAPE = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}


def tiny_model(**kwargs) -> HfDecoderForCausalLM:
    torch.manual_seed(0)
    return HfDecoderForCausalLM(HfDecoderConfig(vocab_size=64, **SHAPE, **kwargs))


@pytest.mark.parametrize("tied", [True, False])
def test_every_trainable_parameter_is_in_the_group_it_belongs_to(tied):
    model = tiny_model(tie_word_embeddings=tied, attention_bias=True, qk_norm=True)
    model.model.layers[0].mlp.up_proj.weight.requires_grad = False
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    found = {"muon": set(), "decay": set(), "rest": set()}
    for group in parameter_groups(model, 0.1):
        kind = "muon" if group["use_muon"] else "decay" if group["weight_decay"] else "rest"
        assert group["weight_decay"] == (0.0 if kind == "rest" else 0.1)
        found[kind] |= {names[id(p)] for p in group["params"]}
    assert all(re.search(r"(q|k|v|o|gate|up|down)_proj\.weight$", name) for name in found["muon"])
    assert found["decay"] == (set() if tied else {"lm_head.weight"})
    assert all(re.search(r"norm|embed_tokens|bias$", name) for name in found["rest"])
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert sorted([*found["muon"], *found["decay"], *found["rest"]]) == sorted(trainable)


def test_a_frozen_embedding_is_in_no_group():
    embedding = nn.Embedding(3, 2)
    embedding.weight.requires_grad = False
    linear = nn.Linear(2, 2, bias=False)
    (group,) = parameter_groups(nn.Sequential(embedding, linear), 0.1)
    assert [id(p) for p in group["params"]] == [id(linear.weight)]


@pytest.mark.parametrize("is_fast, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_the_iteration_is_in_bf16_where_this_cpu_multiplies_it(is_fast, dtype, monkeypatch):
    monkeypatch.setitem(FAST_HALF_PRECISION, torch.bfloat16, is_fast)
    assert orthogonalise(torch.randn(2, 8, 4)).dtype == dtype
    assert orthogonalise(torch.empty(2, 8, 4, device="meta")).dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(3, 16, 16), (2, 8, 24), (2, 24, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    result = orthogonalise(matrices)
    left, _, right = torch.linalg.svd(matrices, full_matrices=False)
    values = torch.linalg.svdvals(result.float())
    assert values.min() > 0.4 and values.max() < 1.4  # the aim of the coefficients
    # the singular vectors stay: with them, the result is a diagonal
    turned = left.mT @ result.float() @ right.mT
    assert (turned - torch.diag_embed(torch.diagonal(turned, dim1=-2, dim2=-1))).abs().max() < 0.1


def test_steps_equal_those_of_torch_muon_and_torch_adamw(monkeypatch):
    monkeypatch.setitem(FAST_HALF_PRECISION, torch.bfloat16, True)  # torch's own is in bf16 everywhere
    ours, theirs = tiny_model(tie_word_embeddings=False), tiny_model(tie_word_embeddings=False)
    settings = {"lr": 0.01, "weight_decay": 0.1}
    optimizer = MuonAdamW(parameter_groups(ours, 0.1), betas=(0.9, 0.95), **settings)
    muon, *adamw = parameter_groups(theirs, 0.1)
    oracles = [
        torch.optim.Muon(muon["params"], momentum=0.95, adjust_lr_fn="match_rms_adamw", **settings),
        torch.optim.AdamW(adamw, betas=(0.9, 0.95), lr=0.01, fused=True),  # else it rounds otherwise
    ]
    for seed in range(4):
        torch.manual_seed(seed)
        ids = torch.randint(0, 64, (2, 12))
        for model, optimizers in ((ours, [optimizer]), (theirs, oracles)):
            model(ids, labels=ids).loss.backward()
            for each in optimizers:
                each.step()
                each.zero_grad()
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        # Muon's iteration runs in bf16, here over all matrices of a shape at once
        torch.testing.assert_close(a, b, atol=2e-4, rtol=2e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_state_is_saved_and_loaded():
    def train(model, optimizer, seeds):
        for seed in seeds:
            torch.manual_seed(seed)
            ids = torch.randint(0, 64, (2, 12))
            model(ids, labels=ids).loss.backward()
            optimizer.step()
            optimizer.zero_grad()

    whole = tiny_model()
    optimizer = MuonAdamW(parameter_groups(whole, 0.1))
    train(whole, optimizer, [0, 1])
    model_state = {name: value.clone() for name, value in whole.state_dict().items()}
    state = copy.deepcopy(optimizer.state_dict())
    resumed = tiny_model()
    resumed.load_state_dict(model_state)
    other = MuonAdamW(parameter_groups(resumed, 0.1), lr=1.0)
    other.load_state_dict(state)
    train(whole, optimizer, [2, 3])
    train(resumed, other, [2, 3])
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_muon_refuses_what_is_no_matrix():
    with pytest.raises(ValueError, match=r"shape \(3,\)"):
        MuonAdamW([{"params": [nn.Parameter(torch.zeros(3))], "use_muon": True}])


def test_trainer_takes_the_recipe(tmp_path):
    model = tiny_model()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, learning_rate=0.25, weight_decay=0.3)
    optimizer = Trainer(model=model, args=args, optimizer_cls_and_kwargs=muon_adamw(args)).create_optimizer()
    assert isinstance(optimizer, MuonAdamW)
    groups = [(group["lr"], group["weight_decay"], group["use_muon"]) for group in optimizer.param_groups]
    assert groups == [(0.25, 0.3, True), (0.25, 0.0, False)]


def test_trainer_takes_the_groups_with_the_optimizer_of_its_arguments(tmp_path):
    model = tiny_model()
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, optim="sgd", learning_rate=0.25, weight_decay=0.3)
    optimizer = Trainer(model=model, args=args, optimizer_cls_and_kwargs=grouped_optimizer(args)).create_optimizer()
    assert isinstance(optimizer, torch.optim.SGD)
    assert [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups] == [(0.25, 0.3), (0.25, 0.0)]


@pytest.mark.parametrize("kind", list(SchedulerType))
def test_schedules_are_tried_before_they_are_needed(tmp_path, kind):
    settings = {"output_dir": str(tmp_path), "use_cpu": True, "eval_strategy": "steps", "eval_steps": 1}
    takes_none = kind in (SchedulerType.CONSTANT, SchedulerType.CONSTANT_WITH_WARMUP)
    needed = {"min_lr": 1e-6} if "with_min_lr" in kind.value else None
    check_schedule(TrainingArguments(**settings, lr_scheduler_type=kind, lr_scheduler_kwargs=needed))
    args = TrainingArguments(**settings, lr_scheduler_type=kind, lr_scheduler_kwargs={"foo": 1})
    with pytest.raises(ValueError, match="lr_scheduler_kwargs") if not takes_none else contextlib.nullcontext():
        check_schedule(args)


@pytest.mark.parametrize("wrong", [{"num_decay_steps": "x"}, {"num_decay_steps": 9, "min_lr_ratio": "x"}, {"decay_type": "linear"}])  # fmt: skip # noqa: E501
def test_settings_of_the_schedule_that_do_not_compute_are_refused(tmp_path, wrong):
    args = TrainingArguments(str(tmp_path), use_cpu=True, lr_scheduler_type="warmup_stable_decay")
    args.lr_scheduler_kwargs = wrong
    with pytest.raises(ValueError, match="--lr_scheduler_type warmup_stable_decay does not go with"):
        check_schedule(args)


def test_the_schedule_warms_up_stays_and_falls_to_zero(tmp_path):
    flags = {"max_steps": 100, "warmup_steps": 10, "lr_scheduler_type": "warmup_stable_decay"}
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, learning_rate=1.0, lr_scheduler_kwargs=wsd_kwargs(100), **flags
    )
    trainer = Trainer(model=tiny_model(), args=args, optimizer_cls_and_kwargs=muon_adamw(args))
    trainer.create_optimizer_and_scheduler(100)
    rates = []
    for _ in range(100):
        rates.append(trainer.optimizer.param_groups[0]["lr"])
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
    assert rates[5] == pytest.approx(0.5) and rates[10:60] == [1.0] * 50
    assert rates[80] == pytest.approx(0.5) and trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.0)
