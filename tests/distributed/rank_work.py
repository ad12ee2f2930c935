"""The work of the ranks in the distributed tests: small trainings with Trainer, in several layouts."""

import os
import signal
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import Trainer, TrainerCallback, TrainingArguments, set_seed
from transformers.utils import logging

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.engine.training import loss as engine_loss
from hf_decoder.model import loss_hf_decoder as plain_loss
from hf_decoder.model import modeling_hf_decoder
from hf_decoder.training import optimizers
from hf_decoder.training.checkpoint_formats import resumable, save_in_full
from hf_decoder.training.optimizers import grouped_optimizer, muon_adamw

VOCAB_SIZE = 96
SHAPE = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 70,  # not the same share for every rank when there are four
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "qk_norm": True,
}
ROWS = 48


def new_model(seed: int = 0, **overrides: Any) -> HfDecoderForCausalLM:
    torch.manual_seed(seed)
    return HfDecoderForCausalLM(HfDecoderConfig(**SHAPE | overrides))


def rows(number: int = ROWS, length: int = 24) -> list[dict[str, torch.Tensor]]:
    """Rows of one length, between 3 and all of whose labels count: the ranks do not have the same number of tokens."""
    generator = torch.Generator().manual_seed(5)
    made = []
    for _ in range(number):
        ids = torch.randint(2, VOCAB_SIZE, (length,), generator=generator)
        ids[1::2] = (ids[::2] * 7 + 3) % VOCAB_SIZE  # something to learn
        labels = ids.clone()
        labels[: int(torch.randint(0, length - 3, (1,), generator=generator))] = -100
        made.append({"input_ids": ids, "labels": labels})
    return made


@dataclass
class Run:
    """One training; `batch` rows make one optimizer step, over all ranks and accumulation steps."""

    layout: str = "one"  # one, ddp, fsdp2
    optim: str = "muon"
    batch: int = 8
    accumulation: int = 1
    max_grad_norm: float = 1.0
    steps: int = 6
    stop: int | None = None  # ends after this step, as if it had been told to
    tied: bool = True
    newton_schulz: torch.dtype = torch.float32  # bf16 turns what differs in the last bit of fp32 into 4e-3
    folder: str = ""
    resume: str | None = None
    arguments: dict[str, Any] = field(default_factory=dict)


class Record(TrainerCallback):
    """Keeps what is logged, and ends a run early."""

    def __init__(self, stop: int | None) -> None:
        self.stop = stop
        self.losses: list[float] = []
        self.grad_norms: list[float] = []

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.stop

    def on_log(self, args, state, control, logs=None, **kwargs):
        if "loss" in logs:
            self.losses.append(logs["loss"])
            self.grad_norms.append(float(logs["grad_norm"]))


def fsdp2_on_cpu() -> None:
    """Lets accelerate take FSDP2 on a machine without an accelerator, where it would train replicas instead.

    It offers FSDP on accelerators alone: of what it knows about them, only the backend and the device change here.
    """
    from accelerate.state import PartialState
    from accelerate.utils import DistributedType

    os.environ["ACCELERATE_TORCH_DEVICE"] = "cpu"
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = staticmethod(lambda *args: ("gloo", DistributedType.MULTI_GPU))


def trainer_for(run: Run, model: Any = None) -> Trainer:
    logging.set_verbosity_error()
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    settings: dict[str, Any] = {"use_cpu": True}
    if run.layout == "fsdp2":
        fsdp2_on_cpu()
        wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["HfDecoderLayer"]}
        settings = {"fsdp": True, "fsdp_config": wrap}
    settings |= {
        "max_steps": run.steps,
        "per_device_train_batch_size": run.batch // (world_size * run.accumulation),
        "gradient_accumulation_steps": run.accumulation,
        "max_grad_norm": run.max_grad_norm,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_nan_inf_filter": False,
        "dataloader_pin_memory": False,
        "bf16": False,
        "ddp_find_unused_parameters": False,
    }
    args = TrainingArguments(run.folder, **settings | run.arguments)
    set_seed(3)
    optimizers.NEWTON_SCHULZ_DTYPE = run.newton_schulz
    make = muon_adamw if run.optim == "muon" else grouped_optimizer
    record = Record(run.stop)
    trainer = Trainer(
        new_model(tie_word_embeddings=run.tied) if model is None else model,
        args,
        train_dataset=rows(),
        optimizer_cls_and_kwargs=make(args),
        callbacks=[record],
    )
    trainer.record = record
    return trainer


def weights_of(trainer: Trainer) -> dict[str, torch.Tensor]:
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    # a compiled model's names begin with that of its wrapper
    return {name.removeprefix("_orig_mod."): value.detach().cpu().clone() for name, value in state.items()}


def count_held_logits() -> list[int]:
    """A list that grows whenever a loss is formed from all the logits of a batch."""
    held: list[int] = []
    from_logits = engine_loss.causal_lm_loss

    def count(logits, *args, **kwargs):
        held.append(logits.numel())
        return from_logits(logits, *args, **kwargs)

    modeling_hf_decoder.causal_lm_loss = engine_loss.causal_lm_loss = plain_loss.causal_lm_loss = count
    return held


def train(runs: list[Run]) -> list[dict[str, Any]]:
    """Trains the runs in turn; returns losses, gradient norms, whole weights and the layout of the first matrix."""
    results = []
    for run in runs:
        trainer = trainer_for(run)
        held = count_held_logits()
        with resumable(run.resume, trainer) if run.resume else nullcontext() as folder:
            trainer.train(resume_from_checkpoint=folder)
        first = trainer.model.model.layers[0].mlp.up_proj.weight
        results.append(
            {
                "losses": trainer.record.losses,
                "grad_norms": trainer.record.grad_norms,
                "weights": weights_of(trainer),
                "logits_held": len(held),
                "weight_type": type(first).__name__,
                "wrapper": type(trainer.model_wrapped).__name__,
                "momentum_type": type(trainer.optimizer.state[first].get("momentum_buffer")).__name__
                if run.optim == "muon"
                else None,
            }
        )
        if run.arguments.get("save_strategy", "no") != "no":
            save_in_full(trainer, Path(run.folder) / "final")
    return results


def orthogonalise_in_layouts(names: list[str]) -> dict[str, list[torch.Tensor]]:
    """Orthogonalises five sharded matrices; returns the whole results and their layout."""
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

    dist.init_process_group("gloo")
    flat = init_device_mesh("cpu", (4,))
    square = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
    layouts = {
        "rows": (flat, [Shard(0)]),
        "columns": (flat, [Shard(1)]),
        "replicas": (flat, [Replicate()]),
        "shards of replicas": (square, [Replicate(), Shard(0)]),
        "rows and columns": (square, [Shard(0), Shard(1)]),
        "rows twice": (square, [Shard(0), Shard(0)]),
    }
    optimizers.NEWTON_SCHULZ_DTYPE = torch.float32
    found = {}
    for name in names:
        mesh, placements = layouts[name]
        matrices = [distribute_tensor(matrix, mesh, placements) for matrix in some_matrices()]
        found[name] = check_layout(matrices)
    # as FSDP2 over tensor parallelism: the outer dimension cuts what the inner one has cut
    twice = [_StridedShard(0, split_factor=2), Shard(0)]
    outer, inner = square.get_local_rank("outer"), square.get_local_rank("inner")
    pieces = [matrix.chunk(2)[inner].chunk(2)[outer] for matrix in some_matrices()]
    found["shards of shards"] = check_layout(
        [
            DTensor.from_local(piece, square, twice, shape=matrix.shape, stride=matrix.stride())
            for piece, matrix in zip(pieces, some_matrices(), strict=True)
        ]
    )
    return found


def check_layout(matrices: list[Any]) -> list[torch.Tensor]:
    results: Any = optimizers.orthogonalise_any(matrices)
    assert all(a.placements == b.placements for a, b in zip(results, matrices, strict=True))
    assert all(a.to_local().shape == b.to_local().shape for a, b in zip(results, matrices, strict=True))
    return [result.full_tensor() for result in results]


def some_matrices() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(22, 12, generator=generator) for _ in range(5)]


def pretrain(argv: list[str], *, in_shards: bool = False, signal_to_rank: int | None = None) -> int:
    """`hf-decoder pretrain` in every rank; with FSDP2 as its launch configuration asks for it.

    `signal_to_rank` names the one rank that gets a SIGTERM, once the first checkpoint is there.
    """
    from hf_decoder.cli import pretrain
    from hf_decoder.cli.main import main
    from hf_decoder.training.launch import configuration_file

    optimizers.NEWTON_SCHULZ_DTYPE = torch.float32  # bf16 turns what differs in the last bit of fp32 into 4e-3
    pretrain_arguments = ["pretrain", *argv, "--disable_tqdm", "true"]
    if in_shards:
        fsdp2_on_cpu()
        settings = yaml.safe_load(configuration_file("fsdp2").read_text(encoding="utf-8"))["fsdp_config"]
        names = {"fsdp_transformer_layer_cls_to_wrap": "FSDP_TRANSFORMER_CLS_TO_WRAP"}
        os.environ |= {names.get(name, name.upper()): str(value) for name, value in settings.items()}
        os.environ["ACCELERATE_USE_FSDP"] = "true"
        pretrain.check_launch = lambda **_: None
    if str(signal_to_rank) == os.environ.get("RANK"):
        threading.Thread(
            target=_signal_after_a_save, args=(argv[argv.index("--output_dir") + 1],), daemon=True
        ).start()
    return main(pretrain_arguments)


def _signal_after_a_save(folder: str) -> None:
    while not list(Path(folder).glob("checkpoint-*/complete.json")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGTERM)


def train_loaded_in_parts(folder: str, tp_size: int, fsdp_size: int, run: Run) -> dict[str, Any]:
    """Trains a model that transformers sharded on loading, and saves it beside `folder`."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    fsdp2_on_cpu()
    config = DistributedConfig(tp_size=tp_size, fsdp_size=fsdp_size)
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    run.arguments = {"per_device_train_batch_size": run.batch // fsdp_size, "use_cpu": False}
    trainer = trainer_for(run, model=model)
    trainer.train()
    trainer.save_model(f"{folder}-trained")
    matrix = model.model.layers[0].mlp.up_proj.weight
    return {
        "losses": trainer.record.losses,
        "grad_norms": trainer.record.grad_norms,
        "share": matrix.to_local().numel() / matrix.numel(),
    }


def generate_in_parts(folder: str, prompts: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    """Greedy and sampled tokens of a model in tensor parallelism."""
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    torch.distributed.init_process_group("gloo")
    config = DistributedConfig(tp_plan="auto", tp_size=torch.distributed.get_world_size())
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config, dtype=torch.float32)
    assert model.model.layers[0].self_attn.q_proj.weight.to_local().shape[0] == SHAPE["hidden_size"] // config.tp_size
    return greedy_and_sampled(model, prompts, mask)


def greedy_and_sampled(model: Any, prompts: torch.Tensor, mask: torch.Tensor) -> list[torch.Tensor]:
    found = []
    for settings in ({"do_sample": False}, {"do_sample": True, "top_k": 20}):
        torch.manual_seed(4)
        found.append(model.generate(prompts, attention_mask=mask, max_new_tokens=16, pad_token_id=0, **settings))
    return found
