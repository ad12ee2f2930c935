"""`hf-decoder plan`: estimates memory, speed and communication of a training, and prints its launch command."""

from __future__ import annotations

import shlex
from dataclasses import replace

from hf_decoder import HfDecoderConfig
from hf_decoder.cli import check_at_least, check_choice
from hf_decoder.cli.arguments import takes_argv
from hf_decoder.cli.flags.plan import LONGEST_ROW, PlanArguments
from hf_decoder.costs import accounting
from hf_decoder.costs.devices import DEVICES, DEVICES_PER_NODE, GIB, THIS_CPU, device
from hf_decoder.costs.presets import get_preset
from hf_decoder.training import planning
from hf_decoder.training.launch import configuration_file


@takes_argv
def main(args: PlanArguments) -> int:
    """Prints the plan."""
    job = plan(args)
    print("\n".join(report(job, args)))
    return 0


def plan(args: PlanArguments) -> planning.Job:
    """Finds the layout that fits.

    Raises:
        ValueError: for an unknown name, a number below 1, devices that do not fill their machines or cannot work
            together, a row longer than the model's context, or a model that fits in no layout.
    """
    check_choice("--gpu", args.gpu, [*DEVICES, THIS_CPU])
    sizes = ("vocab_size", "gpus", "gpus_per_node", "block_size")
    for name in (*sizes, "per_device_train_batch_size", "gradient_accumulation_steps"):
        check_at_least(f"--{name}", getattr(args, name), 1)
    kind = device(args.gpu)
    if args.gpu_memory is not None:
        if not 0 < args.gpu_memory < float("inf"):
            raise ValueError(f"--gpu_memory {args.gpu_memory:g} must be more than 0, and finite")
        kind = replace(kind, memory=round(args.gpu_memory * GIB))
    gpus = args.gpus or (DEVICES_PER_NODE if kind.link else 1)
    if gpus > 1 and not kind.link:
        raise ValueError(f"--gpus {gpus}: no connection between several {args.gpu} is known; leave it out")
    if gpus > args.gpus_per_node and gpus % args.gpus_per_node:
        raise ValueError(f"--gpus {gpus} does not fill machines of --gpus_per_node {args.gpus_per_node}")
    config = HfDecoderConfig(vocab_size=args.vocab_size, **get_preset(args.preset))
    context = config.max_position_embeddings
    block_size = args.block_size or min(context, LONGEST_ROW)
    if block_size > context:
        raise ValueError(f"--block_size {block_size} is longer than the context of preset {args.preset}, {context}")
    if args.strategy == "deepspeed_zero3" and args.optim == "muon_adamw":
        raise ValueError("--strategy deepspeed_zero3 takes no Muon; add --optim adamw_torch")
    job = planning.Job(
        config,
        kind,
        gpus=gpus,
        block_size=block_size,
        batch_size=args.per_device_train_batch_size,
        accumulation=args.gradient_accumulation_steps,
        muon=args.optim == "muon_adamw",
        devices_per_node=args.gpus_per_node,
    )
    strategies = ("ddp", "fsdp2") if args.strategy == "auto" and kind.link else ("ddp",)
    if args.strategy != "auto":
        strategies = (args.strategy,)
    return planning.lay_out(args.preset, job, args.gpu, strategies, args.gradient_checkpointing)


def report(job: planning.Job, args: PlanArguments) -> list[str]:
    """The lines of the plan."""
    config, memory, sent = job.config, planning.memory(job), planning.communication(job)
    speed = planning.speed(job, args.mfu)
    parameters = accounting.num_parameters(config)
    again = ", activations recomputed" if job.checkpointing else ""
    size = f"{parameters / 1e9:.3g} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"
    layout = job.strategy if job.gpu.link else "one process"
    lines = [
        f"{args.preset}, {size} parameters, on {job.gpus} x {args.gpu}: {layout}{again}",
        f"a step: {job.tokens_per_step:,} tokens ({job.gpus} devices x {job.accumulation} passes x {job.batch_size} "
        f"rows x {job.block_size})",
        "",
        "memory of a device, GiB",
        *(f"  {name:<14}{amount / GIB:>10.2f}" for name, amount in memory.items()),
        f"  {'together':<14}{sum(memory.values()) / GIB:>10.2f}  of "
        f"{planning.USABLE * job.gpu.memory / GIB:.1f} ({planning.USABLE:.0%} of {job.gpu.memory / GIB:.1f})",
    ]
    other = planning.memory(replace(job, checkpointing=not job.checkpointing))["activations"]
    lines += [
        f"  activations {'kept' if job.checkpointing else 'recomputed'} instead: {other / GIB:.2f}",
        f"  logits that are never held: {planning.logits_avoided(job) / GIB:.2f}",
        "",
    ]
    if job.gpus > 1:
        lines += ["sent by a device in a step, GB"]
        lines += [*(f"  {name:<14}{amount / 1e9:>10.3f}" for name, amount in sent.items()), ""]
    lines += [
        f"speed at an assumed MFU of {args.mfu:.0%}",
        f"  compute       {1e3 * speed.compute:>10,.1f} ms a step",
        f"  Muon          {1e3 * speed.muon:>10,.1f} ms",
    ]
    if job.gpus > 1:
        waits = ", which is what the step waits for" if speed.communication > speed.compute + speed.muon else ""
        lines += [
            f"  communication {1e3 * speed.communication:>10,.1f} ms meanwhile, at {job.ring / 1e9:,.0f} GB/s{waits}"
        ]
    return [
        *lines,
        f"  {speed.tokens_per_second:,.0f} tokens/s; 20 tokens a parameter (Hoffmann et al. 2022) take "
        f"{20 * parameters / speed.tokens_per_second / 86400:,.2f} days",
        "",
        "on every machine" if job.gpus > job.devices_per_node else "command",
        f"  {launch_command(job, args)}",
    ]


def launch_command(job: planning.Job, args: PlanArguments) -> str:
    """The command that starts the training; with several machines, on each of them."""
    nodes = max(1, job.gpus // job.devices_per_node)
    words = ["accelerate", "launch", "--config_file", str(configuration_file(job.strategy))]
    words += ["--num_processes", str(job.gpus)]
    if nodes > 1:
        words += ["--num_machines", str(nodes), "--machine_rank", "RANK", "--main_process_ip", "FIRST_MACHINE"]
        words += ["--main_process_port", "29500"]
    words += ["scripts/pretrain.py"]
    if not job.gpu.link:  # one process needs no launcher
        words = ["hf-decoder", "pretrain"]
    words += ["--preset", args.preset, "--vocab_size", str(args.vocab_size)]
    words += ["--block_size", str(job.block_size), "--per_device_train_batch_size", str(job.batch_size)]
    if job.accumulation > 1:
        words += ["--gradient_accumulation_steps", str(job.accumulation)]
    if job.checkpointing:
        words += ["--gradient_checkpointing"]
    if not job.muon:
        words += ["--optim", "adamw_torch"]
    return shlex.join([*words, "--train_file", "TEXT", "--output_dir", "RUN"])
