"""The optimizer recipe: assigns each parameter to Muon or AdamW, and sets their options and the schedule.

Muon (Jordan et al. 2024) trains the hidden weight matrices. AdamW trains embeddings, head, norms and biases. One
learning rate serves both, because Muon's updates are scaled to the size of AdamW's (Liu et al. 2025, "Muon is scalable
for LLM training", section 2.2). With a plain Trainer:

    from hf_decoder.training.optimizers import muon_adamw
    trainer = Trainer(model, args, ..., optimizer_cls_and_kwargs=muon_adamw(args))
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SchedulerType

from hf_decoder.engine.precision import FAST_HALF_PRECISION

# Coefficients of the quintic iteration (Jordan et al. 2024): steep at zero, so that few iterations are enough.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 5
NEWTON_SCHULZ_DTYPE = torch.bfloat16
# Elements of the matrices that go through the iteration together on one device: they fill it and need little memory.
CHUNK_ELEMENTS = 2**26
# Root mean square of AdamW's updates. Muon's are scaled to it (Liu et al. 2025, equation 4).
UPDATE_RMS = 0.2
# Share of the steps over which the learning rate falls.
DECAY_SHARE = 0.4
# Fields of `TrainingArguments` that must not change on resuming: the optimizer reads them from its state, or they make
# the schedule.
RECIPE_FLAGS = (
    "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon",
    "max_grad_norm", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps",
)  # fmt: skip


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Up to three optimizer groups: hidden matrices (Muon, weight decay), the head (weight decay), and the rest.

    Embeddings, norms and biases do not decay, nor does a head that is tied to the embeddings. Frozen parameters and
    empty groups are left out.
    """
    embeddings = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters(recurse=False)}
    head = getattr(model, "get_output_embeddings", lambda: None)()
    heads = {id(p) for p in head.parameters()} if head is not None else set()
    hidden: list[nn.Parameter] = []
    decay: list[nn.Parameter] = []
    rest: list[nn.Parameter] = []
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if parameter.ndim < 2 or id(parameter) in embeddings:
            rest.append(parameter)
        elif parameter.ndim == 2 and ".layers." in f".{name}" and id(parameter) not in heads:
            hidden.append(parameter)
        else:
            decay.append(parameter)
    groups = [
        {"params": hidden, "weight_decay": weight_decay, "use_muon": True},
        {"params": decay, "weight_decay": weight_decay, "use_muon": False},
        {"params": rest, "weight_decay": 0.0, "use_muon": False},
    ]
    return [group for group in groups if group["params"]]


def newton_schulz_dtype(device: torch.device) -> torch.dtype:
    """bf16, which is precise enough here; fp32 on a CPU that multiplies bf16 slowly."""
    # not `fast_dtype`, which measures: all processes that share a model must agree
    is_slow = device.type == "cpu" and not FAST_HALF_PRECISION.get(NEWTON_SCHULZ_DTYPE, True)
    return torch.float32 if is_slow else NEWTON_SCHULZ_DTYPE


@torch.no_grad()
def orthogonalise(matrices: torch.Tensor) -> torch.Tensor:
    """Moves the singular values of each matrix near 1; (N, rows, columns), returned in `newton_schulz_dtype`."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.to(newton_schulz_dtype(matrices.device))
    if tall:
        x = x.mT
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=1e-7)
    a, b, c = NEWTON_SCHULZ
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = torch.bmm(x, x.mT)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def _devices_that_share(matrix: torch.Tensor) -> int:
    """How many devices share the work of `orthogonalise_any`: all of a mesh with even shards, else 1."""
    if isinstance(matrix, DTensor) and all(type(placement) in (Shard, Replicate) for placement in matrix.placements):
        return matrix.device_mesh.size()
    return 1


@torch.no_grad()
def orthogonalise_any(matrices: list[torch.Tensor]) -> list[torch.Tensor]:
    """`orthogonalise` for matrices of one shape and layout, sharded or not; the results keep the layout.

    The iteration needs whole matrices. Each device gathers its share of the sharded matrices, works on them and
    scatters the results: one all-to-all there and one back. Where a layout cuts one dimension twice (FSDP2 over tensor
    parallelism), every device gathers all of them.
    """
    first = matrices[0]
    if not isinstance(first, DTensor):
        return list(orthogonalise(torch.stack(matrices)).unbind())
    mesh = first.device_mesh
    if _devices_that_share(first) == 1:
        results = orthogonalise(torch.stack([matrix.full_tensor() for matrix in matrices]))  # type: ignore[attr-defined]
        return [_cut_as(matrix, result) for matrix, result in zip(matrices, results, strict=True)]
    stack = torch.stack(matrices)
    stack = stack.to(newton_schulz_dtype(stack.device))
    inside, across = stack.placements, [Shard(0)] * mesh.ndim  # type: ignore[attr-defined]
    whole = stack.redistribute(mesh, across)  # type: ignore[attr-defined]
    results = DTensor.from_local(
        orthogonalise(whole.to_local()), mesh, across, run_check=False, shape=stack.shape, stride=stack.stride()
    )
    return list(results.redistribute(mesh, inside).unbind())


def _cut_as(matrix: Any, whole: torch.Tensor) -> DTensor:
    """`whole` in the layout of `matrix`. FSDP2's dimension of the mesh cuts last."""
    mesh = matrix.device_mesh
    piece = whole
    for number in reversed(range(mesh.ndim)):
        placement = matrix.placements[number]
        if not isinstance(placement, Replicate):
            size = -(-piece.shape[placement.dim] // mesh.size(number))
            start = min(size * mesh.get_local_rank(number), piece.shape[placement.dim])
            piece = piece.narrow(placement.dim, start, min(size, piece.shape[placement.dim] - start))
    return DTensor.from_local(
        piece.contiguous(), mesh, matrix.placements, run_check=False, shape=matrix.shape, stride=matrix.stride()
    )


class MuonAdamW(torch.optim.AdamW):
    """AdamW that gives the groups with `use_muon` to Muon with Nesterov momentum.

    Args:
        params: groups as `parameter_groups` makes them.
        lr: learning rate of both.
        betas: of AdamW.
        eps: of AdamW.
        weight_decay: decoupled; for groups that set none.
        momentum: of Muon.
    """

    def __init__(
        self,
        params: Iterable[dict[str, Any]],
        lr: float = 5e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
    ):
        groups = [{"use_muon": False, "momentum": momentum, **group} for group in params]
        for group in groups:
            wrong = [tuple(p.shape) for p in group["params"] if group["use_muon"] and p.ndim != 2]
            if wrong:
                raise ValueError(f"Muon takes matrices only, not a parameter of shape {wrong[0]}; give it to AdamW")
            if all(type(p) is nn.Parameter and p.device.type == "cpu" for p in group["params"]):
                group.setdefault("fused", True)  # torch's loop over tensors takes a CPU several times as long
        super().__init__(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)

    @torch.no_grad()
    def step(self, closure=None):
        """Takes one step with both optimizers; returns the loss of `closure` if there is one."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        for group in groups:
            if group["use_muon"]:
                self._muon_step(group)
        try:  # AdamW's own step, over its own groups
            self.param_groups = [group for group in groups if not group["use_muon"]]
            super().step()
        finally:
            self.param_groups = groups
        return loss

    def _muon_step(self, group: dict[str, Any]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        alike: dict[tuple, list[tuple[nn.Parameter, torch.Tensor]]] = defaultdict(list)
        for parameter in group["params"]:
            if parameter.grad is None:
                continue
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros(())  # AdamW looks for it when a state is loaded
                state["momentum_buffer"] = torch.zeros_like(parameter)
            state["step"] += 1
            buffer = state["momentum_buffer"]
            buffer.lerp_(parameter.grad, 1 - momentum)
            update = parameter.grad.lerp(buffer, momentum)
            layout = (update.device_mesh, update.placements) if isinstance(update, DTensor) else ()
            alike[(*update.shape, update.device, *layout)].append((parameter, update))
        for members in alike.values():
            first = members[0][1]
            count = max(1, _devices_that_share(first) * CHUNK_ELEMENTS // first.numel())
            for start in range(0, len(members), count):
                chunk = members[start : start + count]
                updates = orthogonalise_any([update for _, update in chunk])
                for (parameter, _), update in zip(chunk, updates, strict=True):
                    parameter.mul_(1 - lr * group["weight_decay"])
                    scale = UPDATE_RMS * max(parameter.shape) ** 0.5
                    parameter.add_(update.to(parameter.dtype), alpha=-lr * scale)


class OptimizerFactory:
    """Makes the optimizer once the model is on its devices; `Trainer` calls it."""

    def __call__(
        self, model: nn.Module, optimizer_cls: type[torch.optim.Optimizer], weight_decay: float, **kwargs: Any
    ) -> torch.optim.Optimizer:
        return optimizer_cls(parameter_groups(model, weight_decay), **kwargs)


def muon_adamw(args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """The recipe with the settings of `args`, for `Trainer(optimizer_cls_and_kwargs=...)`."""
    return OptimizerFactory, {
        "optimizer_cls": MuonAdamW,
        "weight_decay": args.weight_decay,
        "lr": args.learning_rate,
        "betas": (args.adam_beta1, args.adam_beta2),
        "eps": args.adam_epsilon,
    }


def grouped_optimizer(args: TrainingArguments) -> tuple[Any, dict[str, Any]]:
    """The optimizer that `args.optim` names, with the recipe's groups, for `Trainer(optimizer_cls_and_kwargs=...)`."""
    optimizer_cls, kwargs = Trainer.get_optimizer_cls_and_kwargs(args)
    return OptimizerFactory, {"optimizer_cls": optimizer_cls, "weight_decay": args.weight_decay, **kwargs}


def describe_recipe(args: TrainingArguments, optimizer: str) -> dict[str, Any]:
    """Optimizer (by its name) and schedule as the flags of `args` set them.

    They must not change: a resumed run would take some from its checkpoint and others from the flags.
    """
    return {"optim": optimizer, **{name: getattr(args, name) for name in RECIPE_FLAGS}}


def wsd_kwargs(num_training_steps: int) -> dict[str, Any]:
    """`lr_scheduler_kwargs` of `warmup_stable_decay`: a linear decay to 0 over the last `DECAY_SHARE` of the run.

    A long decay gives a lower loss (Haegele et al. 2024, "Scaling laws and compute-optimal training beyond fixed
    training durations", figure 5).
    """
    return {"num_decay_steps": round(DECAY_SHARE * num_training_steps), "decay_type": "linear"}


def check_schedule(args: TrainingArguments) -> None:
    """Tries the schedule of `args` with a small optimizer, so that wrong settings show before the training.

    Raises:
        ValueError: naming the schedule and its settings.
    """
    kwargs: Any = args.lr_scheduler_kwargs
    kind, steps = SchedulerType(args.lr_scheduler_type), 100
    if kind == SchedulerType.WARMUP_STABLE_DECAY and not kwargs:
        kwargs = wsd_kwargs(steps)
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=args.learning_rate)
    try:
        schedule = get_scheduler(kind, optimizer, args.get_warmup_steps(steps), steps, kwargs)
        for factor in getattr(schedule, "lr_lambdas", []):
            [factor(step) for step in range(steps)]
    except (TypeError, ValueError, ArithmeticError) as error:
        raise ValueError(
            f"--lr_scheduler_type {kind.value} does not go with --lr_scheduler_kwargs {kwargs}: {error}"
        ) from None
