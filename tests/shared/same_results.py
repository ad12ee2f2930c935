"""Compares what two models compute in every way that the engine has a path of its own for."""

from collections.abc import Callable
from typing import Any

import torch
from tiny_models import random_ids

IDS = random_ids(2, 9)
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
FIXED = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}


def trained(model: Any) -> list[torch.Tensor]:
    model.train()
    torch.manual_seed(0)  # of dropout
    loss = model(IDS, labels=IDS, use_cache=False).loss
    gradients = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad], allow_unused=True)
    model.eval()
    return [loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


def texts(model: Any, ids: torch.Tensor = IDS, mask: torch.Tensor = MASK, **settings: Any) -> list[torch.Tensor]:
    settings = {"attention_mask": mask, "return_dict_in_generate": True, "output_logits": True, **FIXED, **settings}
    out = model.generate(ids, **settings)
    return [out.sequences, *out.logits]


WAYS: dict[str, Callable[[Any], list[torch.Tensor]]] = {
    "training": trained,
    "forward": lambda model: [model(IDS, attention_mask=MASK).logits],
    "forward without gradients": torch.no_grad()(lambda model: [model(IDS, labels=IDS).logits]),
    "generate": texts,
    "generate a row": lambda model: texts(model, IDS[:1], MASK[:1]),
    "generate, static": lambda model: texts(model, cache_implementation="static"),
    "generate greedily, static": lambda model: [
        model.generate(IDS, attention_mask=MASK, cache_implementation="static", **FIXED)
    ],
}


def outcome(way: Callable, model: Any) -> list[torch.Tensor] | type[Exception]:
    try:
        return way(model)
    except Exception as error:  # any error, but both must raise it
        return type(error)


def check_same(fast: Any, plain: Any) -> None:
    for name, way in WAYS.items():
        mine, theirs = outcome(way, fast), outcome(way, plain)
        assert isinstance(mine, list) == isinstance(theirs, list), (name, mine, theirs)
        if not isinstance(mine, list):
            continue
        assert len(mine) == len(theirs), name
        for a, b in zip(mine, theirs, strict=True):
            torch.testing.assert_close(
                a.float(), b.float(), rtol=2e-3, atol=2e-4, msg=lambda m, name=name: f"{name}: {m}"
            )
