"""The plan against real parameters, counted arithmetic, measured memory, and published figures."""

import math
import re
from dataclasses import replace

import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker
from torch.utils.flop_counter import FlopCounterMode

from hf_decoder import HfDecoderConfig, HfDecoderForCausalLM
from hf_decoder.cli.main import main
from hf_decoder.costs import accounting
from hf_decoder.costs.devices import DEVICES, GIB, Device
from hf_decoder.costs.presets import PRESETS
from hf_decoder.training import planning
from hf_decoder.training.launch import configuration_file
from hf_decoder.training.optimizers import MuonAdamW, orthogonalise, parameter_groups
from hf_decoder.training.planning import Job, communication, memory, speed

SHAPE = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}


def config_of(preset: str, **kwargs) -> HfDecoderConfig:
    return HfDecoderConfig(vocab_size=32768, **PRESETS[preset], **kwargs)


def test_zero_s_published_figure():
    """ZeRO, figure 1: 7.5B parameters, 64 devices, 16 bytes a parameter: 120 GB in replicas, 1.9 GB in shards."""
    config = config_of("8b")
    job = Job(config, DEVICES["h100"], gpus=64, muon=False)
    scale = 7.5e9 / accounting.num_parameters(config)
    states = ("weights", "gradients", "optimizer")
    replicas = memory(replace(job, strategy="ddp"))
    assert sum(replicas[name] for name in states) * scale == pytest.approx(120e9, rel=1e-6)
    assert sum(memory(job)[name] for name in states) * scale == pytest.approx(1.9e9, rel=0.02)


@pytest.mark.parametrize("muon", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_states_are_those_of_a_real_model_and_optimizer(muon, tied):
    config = HfDecoderConfig(vocab_size=96, tie_word_embeddings=tied, qk_norm=True, **SHAPE)
    model = HfDecoderForCausalLM(config)
    groups = parameter_groups(model, 0.1)
    if not muon:
        groups = [{**group, "use_muon": False} for group in groups]
    optimizer = MuonAdamW(groups)
    ids = torch.arange(24)[None] % 96
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    held = sum(value.nbytes for state in optimizer.state.values() for value in state.values() if value.ndim)
    planned = memory(Job(config, DEVICES["h100"], strategy="ddp", muon=muon))
    parameters = list(model.parameters())
    assert planned["weights"] == planned["gradients"] == sum(p.grad.nbytes for p in parameters)
    assert planned["optimizer"] == held
    counted = planning.Parameters.of(config)
    assert counted.layer == sum(p.numel() for p in model.model.layers[1].parameters())
    assert counted.embedding + counted.head == sum(
        module.weight.numel()
        for module in {model.lm_head, model.model.embed_tokens}
        if not tied or module != model.lm_head
    )


def test_shards_divide_the_states_and_gather_little():
    job = Job(config_of("8b"), DEVICES["h100"], gpus=1, strategy="fsdp2")
    one, many = memory(job), memory(replace(job, gpus=64))
    for name in ("weights", "gradients", "optimizer"):
        assert many[name] == one[name] // 64
    assert many["activations"] == one["activations"]
    assert many["copies"] < 0.2 * 2 * accounting.num_parameters(job.config)
    waiting = memory(replace(job, gpus=64, accumulation=4))["copies"] - many["copies"]
    assert waiting == 2 * accounting.num_parameters(job.config)


def test_activations_agree_with_accounting():
    config = config_of("350m")
    job = Job(config, DEVICES["h100"], strategy="ddp", batch_size=4, block_size=512, muon=False)
    planned = memory(job)
    states = planned["weights"] + planned["gradients"] + planned["optimizer"]
    assert states + planned["activations"] == accounting.training_bytes(config, 4, 512)
    again = memory(replace(job, checkpointing=True))["activations"]
    inputs = 4 * 512 * config.num_hidden_layers * config.hidden_size * 4  # every layer's input, fp32
    assert again - inputs == planned["activations"] // config.num_hidden_layers


@pytest.mark.process
@pytest.mark.parametrize("checkpointing", [False, True], ids=["activations kept", "formed again"])
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")
def test_planned_memory_is_the_peak_that_torch_tracks_in_a_small_training(checkpointing):
    config = HfDecoderConfig(vocab_size=4096, tie_word_embeddings=False, qk_norm=True, **SHAPE | {"hidden_size": 256})
    model = HfDecoderForCausalLM(config).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    optimizer = MuonAdamW(parameter_groups(model, 0.1))
    ids = torch.arange(1024).view(4, 256)
    tracker = MemTracker()
    tracker.track_external(model, optimizer)
    with tracker:
        for number in range(4):  # two steps of two passes: the second finds the gradients of the first
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
            loss.backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
            tracker.reset_mod_stats()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    job = Job(config, DEVICES["h100"], strategy="ddp", batch_size=4, block_size=256, checkpointing=checkpointing)
    assert sum(memory(job).values()) == pytest.approx(peak["Total"], rel=0.25), (memory(job), peak)


def test_newton_schulz_flops_are_those_that_torch_counts():
    config = HfDecoderConfig(vocab_size=96, qk_norm=True, **SHAPE)
    model = HfDecoderForCausalLM(config)
    with FlopCounterMode(display=False) as counter:
        for parameter in parameter_groups(model, 0.0)[0]["params"]:
            orthogonalise(parameter.detach()[None])
    assert planning.newton_schulz_flops(config) == counter.get_total_flops()


def test_communication_of_shards_and_replicas():
    config = config_of("8b")
    total, n = accounting.num_parameters(config), 8
    job = Job(config, DEVICES["h100"], gpus=n, muon=False)
    # ZeRO, section 7: stage 3 sends 1.5 times what replicas send, for numbers of the same size
    shards, replicas = communication(job), communication(replace(job, strategy="ddp"))
    assert sum(shards.values()) == pytest.approx(1.5 * sum(replicas.values()) / 2, rel=1e-9)
    assert replicas["gradients"] == pytest.approx(2 * 4 * total * (n - 1) / n)
    twice = communication(replace(job, accumulation=2))
    assert (twice["weights"], twice["gradients"]) == (2 * shards["weights"], shards["gradients"])
    assert sum(communication(replace(job, gpus=1)).values()) == 0
    muon = communication(replace(job, muon=True))["muon"]
    assert 0 < muon < sum(shards.values()) / n


def test_speed_is_mfu_turned_around():
    config = config_of("1b")
    job = Job(config, DEVICES["h100"], gpus=8, strategy="ddp", batch_size=16, block_size=2048, muon=False)
    planned = speed(job, 0.4)
    assert planned.communication < planned.compute
    flops = accounting.flops_per_token(config, 2048)
    assert accounting.mfu(planned.tokens_per_second / 8, flops, 989.4e12) == pytest.approx(0.4)
    slower = speed(replace(job, checkpointing=True), 0.4)
    assert slower.tokens_per_second == pytest.approx(planned.tokens_per_second * 3 / 4)
    few_rows = replace(job, batch_size=1, block_size=64, gpus=64, strategy="fsdp2")
    waiting = speed(few_rows, 0.4)
    assert waiting.communication > waiting.compute
    assert waiting.tokens_per_second == pytest.approx(few_rows.tokens_per_step / waiting.communication)
    # replicas repeat Muon's iteration, shards divide it
    with_muon = replace(job, muon=True)
    assert speed(with_muon, 0.4).muon == pytest.approx(8 * speed(replace(with_muon, strategy="fsdp2"), 0.4).muon)


@pytest.mark.parametrize("mfu", [0.0, -1.0, 1.5, math.nan])
def test_an_impossible_utilisation_is_refused(mfu):
    with pytest.raises(ValueError, match="above 0 and at most 1"):
        speed(Job(config_of("1b"), DEVICES["h100"]), mfu)


def test_logits_that_are_not_held():
    job = Job(config_of("1b"), DEVICES["h100"], batch_size=8, block_size=4096)
    assert planning.held_logits(job) == 14 * 8 * 4096 * 32768
    assert planning.logits_avoided(job) == planning.held_logits(job) - memory(job)["loss"] > 10e9
    held = replace(job, strategy="deepspeed_zero3", muon=False)
    assert planning.logits_avoided(held) == 0 and memory(held)["loss"] == planning.held_logits(held)


# ---------------------------------------------------------------------------------------- a model counted by hand

WIDTH, VOCABULARY = 64, 1000
MATRICES = 2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 128  # queries and output, keys and values, MLP
LAYER = MATRICES + 2 * WIDTH  # and two norms
ENDS = 2 * VOCABULARY * WIDTH  # embeddings and head
TOTAL = 3 * LAYER + ENDS + WIDTH
MOMENTS = 4 * 3 * MATRICES + 8 * (TOTAL - 3 * MATRICES)
# bytes of gradients, weights and Muon before the share of the other devices
SENT = {"ddp": (2 * 4 * TOTAL, 0, 0), "fsdp2": (2 * TOTAL, 2 * 2 * TOTAL, 2 * 2 * 3 * MATRICES)}


def small_job(**settings) -> Job:
    config = HfDecoderConfig(vocab_size=VOCABULARY, intermediate_size=128, tie_word_embeddings=False, **SHAPE)
    gpu = settings.pop("gpu", Device(10**9, 1e12, 450e9))
    return Job(config, gpu, **{"gpus": 4, "batch_size": 2, "block_size": 100, **settings})


@pytest.mark.parametrize(
    ("settings", "shards", "moments", "copies"),
    [
        ({"gpus": 1, "strategy": "ddp"}, 1, MOMENTS, 2 * (3 * MATRICES + ENDS // 2)),
        ({"strategy": "ddp"}, 1, MOMENTS, 2 * (3 * MATRICES + ENDS // 2) + 4 * TOTAL),
        ({"strategy": "ddp", "muon": False}, 1, 8 * TOTAL, 2 * (3 * MATRICES + ENDS // 2) + 4 * TOTAL),
        ({"gpus": 8}, 8, MOMENTS, 2 * (3 * LAYER + ENDS)),
        ({"accumulation": 2}, 4, MOMENTS, 2 * (3 * LAYER + ENDS) + 2 * TOTAL),
        ({"strategy": "deepspeed_zero3", "muon": False}, 4, 8 * TOTAL, 2 * (3 * LAYER + ENDS)),
    ],
)
def test_memory_counted_by_hand(settings, shards, moments, copies):
    found = memory(small_job(**settings))
    states = (4 * TOTAL // shards, 4 * TOTAL // shards, moments // shards)
    assert (found["weights"], found["gradients"], found["optimizer"], found["copies"]) == (*states, copies)


@pytest.mark.parametrize(
    ("vocabulary", "tokens", "rows"),
    [(1000, 200, 200), (1000, 10, 10), (1000, 4000, 2**21 // 1000), (8192, 4000, 512)],
)
def test_loss_counted_by_hand(vocabulary, tokens, rows):
    chunk = 6 * rows * vocabulary + 6 * vocabulary * WIDTH + 2 * tokens * WIDTH
    job = small_job(batch_size=2, block_size=tokens // 2)
    job.config.vocab_size = vocabulary
    assert memory(job)["loss"] == chunk
    assert planning.logits_avoided(job) == max(0, 14 * tokens * vocabulary - chunk)


@pytest.mark.parametrize(
    ("gpus", "strategy", "checkpointing"),
    [(1, "ddp", False), (4, "ddp", True), (16, "ddp", False), (4, "fsdp2", False), (16, "fsdp2", True)],
)
def test_speed_counted_by_hand(gpus, strategy, checkpointing):
    """Machines of four devices: up to four talk over their link, more over the network."""
    job = small_job(gpus=gpus, strategy=strategy, accumulation=3, checkpointing=checkpointing, devices_per_node=4)
    gradients, weights, muon = SENT[strategy]
    sent = {
        "gradients": gradients * (gpus - 1) // gpus,
        "weights": 3 * weights * (gpus - 1) // gpus,
        "muon": muon * (gpus - 1) // gpus**2,
    }
    assert communication(job) == sent
    ring, direct = (450e9, 450e9) if gpus <= 4 else (4 * 50e9, 50e9)
    found = speed(job, 0.5)
    assert found.communication == pytest.approx((sent["gradients"] + sent["weights"]) / ring + sent["muon"] / direct)
    flops = 6 * (3 * MATRICES + VOCABULARY * WIDTH) + 12 * 3 * 64 * 100
    assert found.compute == pytest.approx(3 * 200 * flops * (4 / 3 if checkpointing else 1) / 0.5e12)
    squares, flat, wide = (4 * r * r * c + 2 * r**3 for r, c in ((64, 64), (32, 64), (64, 128)))
    iteration = 5 * 3 * (2 * squares + 2 * flat + 3 * wide) / 0.5e12
    assert found.muon == pytest.approx(iteration if strategy == "ddp" else iteration / gpus)
    assert speed(replace(job, muon=False), 0.5).muon == communication(replace(job, muon=False))["muon"] == 0
    seconds = max(found.compute + found.muon, found.communication)
    assert found.tokens_per_second == pytest.approx(3 * 200 * gpus / seconds)


def room_for(job: Job, *, link: float = 450e9) -> Device:
    """The smallest device whose memory is enough, of which a plan takes 92%."""
    return Device(math.ceil(sum(memory(job).values()) / 0.92), 1e12, link)


def test_a_job_fits_into_92_percent():
    job = small_job()
    enough = room_for(job)
    assert planning.fits(replace(job, gpu=enough))
    assert not planning.fits(replace(job, gpu=replace(enough, memory=enough.memory - 2)))
    alone = Job(job.config, enough)
    assert alone.tokens_per_step == 1024 and not alone.checkpointing


def test_replicas_are_tried_before_shards_and_kept_activations_before_others():
    def tried(*args):
        return [(job.strategy, job.checkpointing, job.muon) for job in planning.candidates(small_job(), *args)]

    kept, again = ([(name, way, True) for name in ("ddp", "fsdp2")] for way in (False, True))
    assert tried(("ddp", "fsdp2"), None) == kept + again
    assert tried(("ddp", "fsdp2"), True) == again
    assert tried(("deepspeed_zero3",), False) == [("deepspeed_zero3", False, False)]


@pytest.mark.parametrize(
    ("settings", "checkpointing", "enough_for", "ways"),
    [
        (
            {"batch_size": 8, "block_size": 1000},
            None,
            {"batch_size": 1},
            ["--per_device_train_batch_size 1", "1 x l4"],
        ),
        ({"block_size": 9000}, False, {}, ["--gradient_checkpointing", "1 x l4"]),
        ({}, True, {"strategy": "fsdp2", "gpus": 4}, ["4 x small with --strategy fsdp2", "1 x l4"]),
        (
            {"gpus": 2},
            True,
            {"strategy": "fsdp2", "gpus": 4},
            ["4 x small with --strategy fsdp2", "2 x l4 with --strategy fsdp2"],
        ),
        ({"block_size": 9000, "link": 0.0}, None, {"block_size": 1}, ["1 x m1"]),
        ({"block_size": 10**9, "batch_size": 8, "link": 0.0}, False, {"block_size": 1}, []),
    ],
)
def test_what_would_fit_is_said(settings, checkpointing, enough_for, ways):
    link = settings.get("link", 450e9)
    settings = {"gpus": 1, "strategy": "ddp", "batch_size": 1, "block_size": 10} | settings
    settings.pop("link", None)
    job = small_job(**settings)
    gpu = room_for(replace(job, **{"checkpointing": True} | enough_for), link=link)
    with pytest.raises(ValueError) as refused:
        planning.lay_out("tiny", replace(job, gpu=gpu), "small", ("ddp",), checkpointing)
    least = sum(memory(replace(job, checkpointing=checkpointing is not False)).values())
    said, there = str(refused.value).split("; ", 1)
    assert said.startswith(f"tiny does not fit on {job.gpus} x small: the least is {least / GIB:,.1f} GiB a device")
    assert said.endswith(f" of {0.92 * gpu.memory / GIB:,.1f}")
    hopeless = "shorten --block_size or take a smaller preset"
    assert there == (f"what would fit: {'; '.join(ways)}" if ways else hopeless)


# ------------------------------------------------------------------------------------------------ the command


def plan(capsys, *flags: str) -> str:
    assert main(["plan", *flags]) == 0
    return capsys.readouterr().out


def test_the_plan_of_a_large_model(capsys):
    text = plan(capsys, "--preset", "8b", "--gpus", "64")
    assert "8b, 7.68 B parameters, on 64 x h100: fsdp2" in text
    amounts = dict(re.findall(r"^  (\w+) +([\d.]+)(?:  of .*)?$", text, flags=re.MULTILINE))
    parts = ("weights", "gradients", "optimizer", "copies", "activations", "loss")
    memories = text[: text.index("sent by a device")]
    found = dict(re.findall(r"^  (\w+) +([\d.]+)(?:  of .*)?$", memories, flags=re.MULTILINE))
    assert sum(float(found[name]) for name in parts) == pytest.approx(float(found["together"]), abs=0.05)
    assert amounts["muon"]
    command = text.splitlines()[-1]
    assert f"--config_file {configuration_file('fsdp2')} --num_processes 64 --num_machines 8" in command
    assert "scripts/pretrain.py --preset 8b --vocab_size 32768 --block_size 4096" in command


def test_the_command_has_flags_that_pretrain_knows(capsys):
    text = plan(capsys, "--preset", "1b", "--gpus", "2", "--gpu", "l40s", "--gradient_accumulation_steps", "4",
                "--optim", "adamw_torch", "--strategy", "deepspeed_zero3", "--block_size", "512")  # fmt: skip
    assert "--optim adamw_torch" in text
    flags = re.findall(r"--\w+", text.splitlines()[-1].partition("scripts/pretrain.py")[2])
    with pytest.raises(SystemExit):
        main(["pretrain", "--help-all"])
    known = capsys.readouterr().out
    assert len(flags) >= 7 and all(re.search(rf"{flag}\b", known) for flag in flags)


@pytest.mark.process
def test_a_small_model_is_replicated_a_larger_one_sharded_a_tight_one_computed_again(capsys):
    assert ": ddp\n" in plan(capsys, "--preset", "125m", "--gpus", "8", "--block_size", "1024")
    assert ": fsdp2\n" in plan(capsys, "--preset", "8b", "--gpus", "8", "--gpu", "h200", "--block_size", "1024")
    tight = plan(capsys, "--preset", "8b", "--gpus", "8", "--block_size", "8192", "--per_device_train_batch_size", "2")
    assert ": fsdp2, activations recomputed" in tight and "--gradient_checkpointing" in tight


@pytest.mark.parametrize("preset", list(PRESETS))
def test_every_preset_is_planned_by_its_bare_name(preset, capsys):
    """The row is at most its context; the largest need a larger device."""
    flags = ["--gpu", "b200", "--optim", "adamw_torch"]
    text = plan(capsys, preset, *flags)
    assert text.startswith(f"{preset}, ") and text == plan(capsys, "--preset", preset, *flags)
    block_size = int(re.search(r"--block_size (\d+)", text)[1])
    assert block_size == min(PRESETS[preset]["max_position_embeddings"], 4096)


@pytest.mark.parametrize("kind", [kind for kind, device in DEVICES.items() if not device.link] + ["cpu"])
def test_a_cpu_or_a_mac_works_alone(kind, capsys):
    text = plan(capsys, "nano", "--gpu", kind)
    assert f"on 1 x {kind}: one process\n" in text and "sent by a device" not in text
    assert text.splitlines()[-1].startswith("  hf-decoder pretrain --preset nano ")
    assert float(re.search(r"([\d,]+) tokens/s", text)[1].replace(",", "")) > 0
    assert main(["plan", "nano", "--gpu", kind, "--gpus", "2"]) == 2
    assert f"--gpus 2: no connection between several {kind} is known" in capsys.readouterr().err


def test_memory_that_a_device_has_can_be_said(capsys):
    assert main(["plan", "1b", "--gpu", "m1"]) == 2
    error = capsys.readouterr().err
    assert "does not fit on 1 x m1" in error and "1 x m1-max" in error
    assert "of 58.9 (92% of 64.0)" in plan(capsys, "1b", "--gpu", "m1", "--gpu_memory", "64")
    assert main(["plan", "1b", "--gpu_memory", "0"]) == 2
    assert "--gpu_memory 0 must be more than 0" in capsys.readouterr().err


@pytest.mark.process
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--preset", "9b"], "preset '9b' is unknown; choose one of: nano"),
        (["--gpu", "h1000"], "--gpu 'h1000' is unknown; choose one of: a100"),
        (["--strategy", "fsdp1"], "--strategy 'fsdp1' is unknown; choose one of: auto, ddp"),
        (["--optim", "lion"], "--optim 'lion' is unknown"),
        (["--gpus", "0"], "--gpus 0 must be at least 1"),
        (["--gpus", "12"], "--gpus 12 does not fill machines of --gpus_per_node 8"),
        (["--block_size", "100000"], "is longer than the context of preset 1b, 4096"),
        (["--mfu", "40"], "mfu 40.0 must be above 0 and at most 1"),
        (["--strategy", "deepspeed_zero3"], "takes no Muon; add --optim adamw_torch"),
        (["--preset", "8b", "--gpus", "1", "--gpu", "rtx4090"], "does not fit on 1 x rtx4090: the least is"),
        (["--preset", "8b", "--gpus", "1", "--gpu", "rtx4090"], "8 x rtx4090 with --strategy fsdp2; 1 x h200"),
        (
            ["--preset", "1b", "--gpus", "1", "--gpu", "a100-40gb", "--per_device_train_batch_size", "64"],
            "what would fit: --per_device_train_batch_size 1",
        ),
    ],
)
def test_what_cannot_be_is_said_in_one_line(flags, words, capsys):
    assert main(["plan", *flags]) == 2
    (line,) = [line for line in capsys.readouterr().err.strip().splitlines() if "error" in line]
    assert line.startswith("hf-decoder plan: error: ") and words in line


@pytest.mark.process
def test_what_would_fit_fits(capsys):
    assert main(["plan", "--preset", "8b", "--gpus", "1", "--gpu", "rtx4090"]) == 2
    assert "8 x rtx4090" in capsys.readouterr().err
    plan(capsys, "--preset", "8b", "--gpus", "8", "--gpu", "rtx4090", "--strategy", "fsdp2")
    plan(capsys, "--preset", "8b", "--gpus", "1", "--gpu", "h200")
    assert main(["plan", "--preset", "8b", "--gpus", "4", "--gpu", "rtx4090", "--strategy", "fsdp2"]) == 2
