"""`hf-decoder plan`: memory, speed and communication of a training on many devices, and the command to launch it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from hf_decoder import HfDecoderConfig, accounting, planning
from hf_decoder.cli import check_choice, parse_arguments
from hf_decoder.launch import configuration_file
from hf_decoder.presets import get_preset


@dataclass
class PlanArguments:
    """Which model on which devices. The estimates are for bf16 autocast over fp32 weights."""

    preset: str = field(default="1b", metadata={"help": "Named model shape; `hf-decoder presets` lists them."})
    vocab_size: int = field(default=32768, metadata={"help": "Vocabulary of the model."})
    gpus: int = field(default=8, metadata={"help": "Devices, over all machines."})
    gpu: str = field(default="h100", metadata={"help": f"Kind of device: {', '.join(planning.GPUS)}."})
    gpus_per_node: int = field(default=planning.DEVICES_PER_NODE, metadata={"help": "Devices of one machine."})
    strategy: str = field(default="auto", metadata={"help": f"auto, {', '.join(planning.STRATEGIES)}."})
    block_size: int = field(default=4096, metadata={"help": "Tokens of a training row."})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "Rows of a device in one pass."})
    gradient_accumulation_steps: int = field(default=1, metadata={"help": "Passes of an optimizer step."})
    gradient_checkpointing: bool | None = field(
        default=None, metadata={"help": "Form activations again instead of keeping them. By default: if need be."}
    )
    optim: str = field(default="muon_adamw", metadata={"help": "muon_adamw, or adamw_torch."})
    mfu: float = field(default=0.4, metadata={"help": "Model FLOPs utilisation to assume."})


def main(argv: Sequence[str]) -> int:
    """Prints the plan."""
    (args,) = parse_arguments("plan", (PlanArguments,), argv, "Plans a training on many devices.")
    job = plan(args)
    print("\n".join(report(job, args)))
    return 0


def plan(args: PlanArguments) -> planning.Job:
    """The layout that fits.

    Raises:
        ValueError: for an unknown name, a number that is not positive, devices that do not fill their machines, a row
            longer than the model's context, or a model that fits in no layout.
    """
    check_choice("--gpu", args.gpu, list(planning.GPUS))
    check_choice("--strategy", args.strategy, ["auto", *planning.STRATEGIES])
    check_choice("--optim", args.optim, ["muon_adamw", "adamw_torch"])
    sizes = ("vocab_size", "gpus", "gpus_per_node", "block_size")
    for name in (*sizes, "per_device_train_batch_size", "gradient_accumulation_steps"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name} {getattr(args, name)} must be positive")
    if args.gpus > args.gpus_per_node and args.gpus % args.gpus_per_node:
        raise ValueError(f"--gpus {args.gpus} does not fill machines of --gpus_per_node {args.gpus_per_node}")
    config = HfDecoderConfig(vocab_size=args.vocab_size, **get_preset(args.preset))
    if args.block_size > config.max_position_embeddings:
        raise ValueError(
            f"--block_size {args.block_size} is more than the context of preset {args.preset}, "
            f"{config.max_position_embeddings}"
        )
    if args.strategy == "deepspeed_zero3" and args.optim == "muon_adamw":
        raise ValueError("--strategy deepspeed_zero3 takes no Muon; add --optim adamw_torch")
    job = planning.Job(
        config,
        planning.GPUS[args.gpu],
        gpus=args.gpus,
        block_size=args.block_size,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        muon=args.optim == "muon_adamw",
        devices_per_node=args.gpus_per_node,
    )
    strategies = ("ddp", "fsdp2") if args.strategy == "auto" else (args.strategy,)
    return planning.lay_out(args.preset, job, args.gpu, strategies, args.gradient_checkpointing)


def report(job: planning.Job, args: PlanArguments) -> list[str]:
    """The plan in lines."""
    config, memory, sent = job.config, planning.memory(job), planning.communication(job)
    speed = planning.speed(job, args.mfu)
    parameters = accounting.num_parameters(config)
    again = ", activations formed again" if job.checkpointing else ""
    lines = [
        f"{args.preset}, {parameters / 1e9:.3g} B parameters, on {job.gpus} x {args.gpu}: {job.strategy}{again}",
        f"a step: {job.tokens_per_step:,} tokens ({job.gpus} devices x {job.accumulation} passes x {job.batch_size} "
        f"rows x {job.block_size})",
        "",
        "memory of a device, GiB",
        *(f"  {name:<14}{amount / 2**30:>10.2f}" for name, amount in memory.items()),
        f"  {'together':<14}{sum(memory.values()) / 2**30:>10.2f}  of "
        f"{planning.USABLE * job.gpu.memory / 2**30:.1f} ({planning.USABLE:.0%} of {job.gpu.memory / 2**30:.1f})",
    ]
    other = planning.memory(replace(job, checkpointing=not job.checkpointing))["activations"]
    lines += [
        f"  activations {'kept' if job.checkpointing else 'formed again'} instead: {other / 2**30:.2f}",
        f"  logits that are never held: {planning.logits_avoided(job) / 2**30:.2f}",
        "",
        "sent by a device in a step, GB",
        *(f"  {name:<14}{amount / 1e9:>10.3f}" for name, amount in sent.items()),
        "",
        f"speed at an assumed MFU of {args.mfu:.0%}",
        f"  compute       {1e3 * speed.compute:>10,.1f} ms a step",
        f"  Muon          {1e3 * speed.muon:>10,.1f} ms",
        f"  communication {1e3 * speed.communication:>10,.1f} ms meanwhile, at {job.ring / 1e9:,.0f} GB/s"
        + (", which is what the step waits for" if speed.communication > speed.compute + speed.muon else ""),
        f"  {speed.tokens_per_second:,.0f} tokens/s; 20 tokens a parameter (Hoffmann et al. 2022) take "
        f"{20 * parameters / speed.tokens_per_second / 86400:,.2f} days",
        "",
        "on every machine" if job.gpus > job.devices_per_node else "command",
        f"  {launch_command(job, args)}",
    ]
    return lines


def launch_command(job: planning.Job, args: PlanArguments) -> str:
    """What starts the training; over several machines, what starts it on each."""
    nodes = max(1, job.gpus // job.devices_per_node)
    words = ["accelerate", "launch", "--config_file", str(configuration_file(job.strategy))]
    words += ["--num_processes", str(job.gpus)]
    if nodes > 1:
        words += ["--num_machines", str(nodes), "--machine_rank", "RANK", "--main_process_ip", "FIRST_MACHINE"]
        words += ["--main_process_port", "29500"]
    words += ["scripts/pretrain.py", "--preset", args.preset, "--vocab_size", str(args.vocab_size)]
    words += ["--block_size", str(job.block_size), "--per_device_train_batch_size", str(job.batch_size)]
    if job.accumulation > 1:
        words += ["--gradient_accumulation_steps", str(job.accumulation)]
    if job.checkpointing:
        words += ["--gradient_checkpointing"]
    if not job.muon:
        words += ["--optim", "adamw_torch"]
    return shlex.join([*words, "--train_file", "TEXT", "--output_dir", "RUN"])
