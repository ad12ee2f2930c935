"""Estimates memory, communication and throughput of a training on one device or many.

Symbols: N parameters, n devices with different rows, T tokens of a device in one pass, D width, V vocabulary. Memory
is for bf16 autocast over fp32 weights, as our commands train. The sums leave out what the allocator wastes; `USABLE`
makes up for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import nn
from transformers import PretrainedConfig

from hf_decoder.costs import accounting
from hf_decoder.costs.devices import DEVICES, DEVICES_PER_NODE, GB, Device
from hf_decoder.engine.training.loss import CHUNK_ELEMENTS, MIN_CHUNK_ROWS
from hf_decoder.training.optimizers import NEWTON_SCHULZ_STEPS, parameter_groups

# Share of a device's memory to plan with; context, allocator and libraries take the rest.
USABLE = 0.92
# Bytes a second that one GPU can send to other machines: 400 Gbit/s a GPU, as in NVIDIA's DGX H100.
NETWORK = 50 * GB
STRATEGIES = ("ddp", "fsdp2", "deepspeed_zero3")
# Bytes per logit of a loss that holds all of them: bf16, fp32, log-probabilities, and the gradient in fp32.
HELD_LOGIT = 2 + 4 + 4 + 4
# Bytes per logit of a chunk in our loss: bf16 and fp32 (model/loss_hf_decoder.py).
CHUNK_LOGIT = 2 + 4


@dataclass(frozen=True)
class Parameters:
    """Numbers of parameters: of the model, one layer, the embeddings, the head, and the matrices that Muon trains."""

    total: int
    layer: int
    embedding: int
    head: int
    hidden: int

    @classmethod
    def of(cls, config: PretrainedConfig) -> Parameters:
        model: nn.Module = accounting.meta_model(config)
        muon = [group["params"] for group in parameter_groups(model, 0.0) if group["use_muon"]]
        width_times_vocabulary = config.vocab_size * config.hidden_size
        return cls(
            total=sum(parameter.numel() for parameter in model.parameters()),
            layer=sum(parameter.numel() for parameter in model.get_submodule("model.layers.0").parameters()),
            embedding=width_times_vocabulary,
            head=0 if config.tie_word_embeddings else width_times_vocabulary,
            hidden=sum(parameter.numel() for group in muon for parameter in group),
        )


@dataclass(frozen=True)
class Job:
    """A training: the model, the devices, and the layout."""

    config: PretrainedConfig
    gpu: Device
    gpus: int = 1
    strategy: str = "fsdp2"
    block_size: int = 1024
    batch_size: int = 1  # rows of a device in one pass
    accumulation: int = 1
    checkpointing: bool = False
    muon: bool = True
    devices_per_node: int = DEVICES_PER_NODE

    @property
    def tokens(self) -> int:
        """Tokens of a device in one pass."""
        return self.batch_size * self.block_size

    @property
    def tokens_per_step(self) -> int:
        return self.tokens * self.accumulation * self.gpus

    @property
    def shards(self) -> int:
        """Devices that share weights, gradients and optimizer state."""
        return 1 if self.strategy == "ddp" else self.gpus

    @property
    def ring(self) -> float:
        """Bytes per second of a device in a ring over all devices; those of one machine share its network."""
        if self.gpus <= self.devices_per_node:
            return self.gpu.link
        return min(self.gpu.link, NETWORK * self.devices_per_node)

    @property
    def direct(self) -> float:
        """Bytes per second that a device sends to all others at once."""
        return self.gpu.link if self.gpus <= self.devices_per_node else min(self.gpu.link, NETWORK)


def memory(job: Job) -> dict[str, int]:
    """Peak bytes of one device, by purpose.

    Weights, gradients, optimizer: fp32, with two moments for AdamW and one for Muon. FSDP2 and ZeRO-3 hold 1 / n of
    them (Rajbhandari et al. 2020, arXiv 1910.02054, section 5).
    Copies with DDP: the bf16 weights that autocast keeps for the backward pass, and buckets of fp32 gradients.
    Copies with shards, in bf16: two gathered layers (one in use, one on its way), embeddings and head, one layer's
    gradient. With accumulation, all gradients stay gathered until the last pass.
    Activations: `costs.accounting.activation_bytes`.
    Loss: a chunk of logits and the fp32 gradient of the head; with ZeRO-3, all the logits.

    The sum holds for a pass that starts with gradients of an earlier one. Without accumulation, gradients appear while
    activations are freed, and the peak is lower by up to the gradients.
    """
    count = Parameters.of(job.config)
    moments = 4 * count.hidden + 8 * (count.total - count.hidden) if job.muon else 8 * count.total
    matmuls = accounting.matmul_parameters(job.config)
    if job.strategy == "ddp":
        copies = 2 * matmuls + (4 * count.total if job.gpus > 1 else 0)
    else:
        copies = 2 * (3 * count.layer + count.embedding + count.head)
        if job.accumulation > 1:
            copies += 2 * count.total
    return {
        "weights": 4 * count.total // job.shards,
        "gradients": 4 * count.total // job.shards,
        "optimizer": moments // job.shards,
        "copies": copies,
        "activations": accounting.activation_bytes(job.config, job.tokens, checkpointing=job.checkpointing),
        "loss": held_logits(job) if job.strategy == "deepspeed_zero3" else _chunked_loss(job),
    }


def held_logits(job: Job) -> int:
    """Bytes of a loss that holds all logits of one pass."""
    return HELD_LOGIT * job.tokens * job.config.vocab_size


def _chunked_loss(job: Job) -> int:
    vocabulary, width = job.config.vocab_size, job.config.hidden_size
    rows = min(max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS // vocabulary), job.tokens)
    return CHUNK_LOGIT * rows * vocabulary + (4 + 2) * vocabulary * width + 2 * job.tokens * width


def logits_avoided(job: Job) -> int:
    """Bytes that our chunked loss saves on this job; 0 where it holds the logits too."""
    return 0 if job.strategy == "deepspeed_zero3" else max(0, held_logits(job) - _chunked_loss(job))


def communication(job: Job) -> dict[str, int]:
    """Bytes that one device sends per optimizer step, by purpose, with ring collectives (Patarasuk and Yuan 2009).

    DDP: one all-reduce of the fp32 gradients, 2 (n - 1) / n of them.
    Shards: every forward and backward pass gathers the bf16 weights, (n - 1) / n of them; each step scatters the bf16
    gradients once (ZeRO, section 7).
    Muon with shards: momenta go to the device that works on the whole matrix, and updates come back, in bf16; each
    device has 1 / n of them. Replicas send nothing.
    """
    count = Parameters.of(job.config)
    n = job.gpus
    if job.strategy == "ddp":
        return {"gradients": 2 * 4 * count.total * (n - 1) // n, "weights": 0, "muon": 0}
    return {
        "gradients": 2 * count.total * (n - 1) // n,
        "weights": 2 * 2 * count.total * job.accumulation * (n - 1) // n,
        "muon": 2 * 2 * count.hidden * (n - 1) // n**2 if job.muon else 0,
    }


def newton_schulz_flops(config: PretrainedConfig) -> int:
    """FLOPs of Muon's iteration over all matrices, once.

    One iteration on an r x c matrix, r <= c, takes 4 r r c + 2 r^3 FLOPs for three products
    (`optimizers.orthogonalise`): the Gram matrix, its square, and their sum times the matrix.
    """
    model = accounting.meta_model(config)
    shapes = [
        sorted(parameter.shape)
        for group in parameter_groups(model, 0.0)
        if group["use_muon"]
        for parameter in group["params"]
    ]
    return NEWTON_SCHULZ_STEPS * sum(4 * r * r * c + 2 * r**3 for r, c in shapes)


@dataclass(frozen=True)
class Speed:
    """Seconds of each part of an optimizer step, and tokens per second of all devices together."""

    compute: float
    muon: float
    communication: float
    tokens_per_second: float


def speed(job: Job, mfu: float) -> Speed:
    """The speed at a model FLOPs utilisation of `mfu`, which is an assumption, not a result.

    Compute: `costs.accounting.flops_per_token` over the peak; a third more with checkpointing, which computes every
    layer twice. Communication overlaps with it, so the longer of the two counts. Shards divide Muon's iteration;
    replicas repeat it.

    Raises:
        ValueError: unless `mfu` is above 0 and at most 1.
    """
    if not 0 < mfu <= 1:
        raise ValueError(f"mfu {mfu} must be above 0 and at most 1; 0.4 is usual for models of billions of parameters")
    useful = accounting.flops_per_token(job.config, job.block_size) * job.tokens * job.accumulation
    compute = useful * (4 / 3 if job.checkpointing else 1) / (job.gpu.flops * mfu)
    muon = newton_schulz_flops(job.config) / job.shards / (job.gpu.flops * mfu) if job.muon else 0.0
    sent = communication(job)
    sending = 0.0 if job.gpus == 1 else (sent["gradients"] + sent["weights"]) / job.ring + sent["muon"] / job.direct
    return Speed(compute, muon, sending, job.tokens_per_step / max(compute + muon, sending))


def fits(job: Job) -> bool:
    return sum(memory(job).values()) <= USABLE * job.gpu.memory


def candidates(job: Job, strategies: tuple[str, ...], checkpointing: bool | None) -> Iterator[Job]:
    """The job in each allowed layout, the fastest first: replicas before shards, then with checkpointing."""
    for again in (False, True) if checkpointing is None else (checkpointing,):
        for strategy in strategies:
            muon = job.muon and strategy != "deepspeed_zero3"
            yield replace(job, strategy=strategy, checkpointing=again, muon=muon)


def lay_out(name: str, job: Job, gpu_name: str, strategies: tuple[str, ...], checkpointing: bool | None) -> Job:
    """The first of `candidates` that fits into memory.

    Raises:
        ValueError: if none fits, naming what would: fewer rows, more devices, larger ones.
    """
    tried = list(candidates(job, strategies, checkpointing))
    for candidate in tried:
        if fits(candidate):
            return candidate
    least = min(tried, key=lambda candidate: sum(memory(candidate).values()))
    ways = []
    if job.batch_size > 1 and fits(replace(least, batch_size=1)):
        ways.append("--per_device_train_batch_size 1")
    if checkpointing is False and fits(replace(least, checkpointing=True)):
        ways.append("--gradient_checkpointing")
    shards = replace(least, strategy="fsdp2", checkpointing=checkpointing is not False)
    counts = [2**k for k in range(1, 13) if 2**k > job.gpus] if job.gpu.link else []
    more = next((n for n in counts if fits(replace(shards, gpus=n))), None)
    if more is not None:
        ways.append(f"{more} x {gpu_name} with --strategy fsdp2")
    others = {key: kind for key, kind in DEVICES.items() if bool(kind.link) == bool(job.gpu.link)}
    larger = [key for key, kind in others.items() if kind.memory > job.gpu.memory and fits(replace(shards, gpu=kind))]
    if larger:
        best = min(larger, key=lambda key: others[key].memory)
        ways.append(f"{job.gpus} x {best}" + (" with --strategy fsdp2" if job.gpus > 1 else ""))
    needed, there = sum(memory(least).values()) / 2**30, USABLE * job.gpu.memory / 2**30
    raise ValueError(
        f"{name} does not fit on {job.gpus} x {gpu_name}: the least is {needed:,.1f} GiB a device, of "
        f"{there:,.1f}; "
        + (f"what would fit: {'; '.join(ways)}" if ways else "shorten --block_size or take a smaller preset")
    )
