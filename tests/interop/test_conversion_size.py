"""A checkpoint of a billion parameters: converted in less memory than it takes, in the time that copying it takes.

Prints what it measured; `-s` shows it.
"""

import json
import os
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM, Phi3Config, Phi3ForCausalLM

from hf_decoder import HfDecoderConfig
from hf_decoder.costs.presets import get_preset
from hf_decoder.interop import checkpoint

SHARD_BYTES = 400_000_000
CONVERT = """
import os, re, sys, time
from pathlib import Path
from hf_decoder.interop.conversion import convert

def peak():
    # getrusage counts the process that this one was forked from too
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024

imports = peak()
start = time.perf_counter()
convert(sys.argv[1], Path(sys.argv[2]), to=sys.argv[3], max_shard_size="400MB", verify=False)
seconds = time.perf_counter() - start
print("measured", imports, peak(), seconds, sum(os.times()[:2]))
"""
FAMILIES = {"llama": (LlamaConfig, LlamaForCausalLM), "phi3": (Phi3Config, Phi3ForCausalLM)}


def write_checkpoint(folder, family: str) -> int:
    """Random bfloat16 weights of the shape of preset 1b, shard by shard; returns their bytes."""
    config_class, model_class = FAMILIES[family]
    shape = {name: value for name, value in get_preset("1b").items() if name != "qk_norm"}
    shape["intermediate_size"] = HfDecoderConfig(**shape).intermediate_size
    config = config_class(
        **shape, vocab_size=32000, pad_token_id=0, bos_token_id=None, eos_token_id=1, dtype=torch.bfloat16
    )
    with torch.device("meta"):
        parameters = dict(model_class(config).named_parameters())
    config.architectures = [model_class.__name__]
    config.save_pretrained(folder)
    shards: list[dict[str, torch.Size]] = [{}]
    for name, parameter in parameters.items():
        if sum(size.numel() * 2 for size in shards[-1].values()) + parameter.numel() * 2 > SHARD_BYTES:
            shards.append({})
        shards[-1][name] = parameter.shape
    weight_map = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        save_file({name: torch.randn(size, dtype=torch.bfloat16) for name, size in shard.items()}, folder / file)
        weight_map |= dict.fromkeys(shard, file)
    total = sum(parameter.numel() * 2 for parameter in parameters.values())
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map})
    (folder / checkpoint.INDEX_NAME).write_text(text)
    return total


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
@pytest.mark.parametrize("family", FAMILIES)
def test_a_billion_parameters(family: str, tmp_path, run_python):
    total = write_checkpoint(tmp_path / "stock", family)
    assert total > 1.9e9 and len(list((tmp_path / "stock").glob("*.safetensors"))) > 4
    for source, destination, to in (("stock", "ours", "auto"), ("ours", "back", family)):
        output = run_python(CONVERT, tmp_path / source, tmp_path / destination, to)
        (line,) = [line for line in output.splitlines() if line.startswith("measured")]
        imports, peak, seconds, processor = map(float, line.split()[1:])
        start = time.perf_counter()
        shutil.copytree(tmp_path / source, tmp_path / "copy")
        os.sync()
        copying = time.perf_counter() - start
        shutil.rmtree(tmp_path / "copy")
        print(
            f"\n{family} {source} -> {destination}: {total / 1e9:.2f} GB, peak {peak / 1e9:.2f} GB "
            f"({imports / 1e9:.2f} GB of it imports), {seconds:.1f} s ({processor:.1f} s of processor), "
            f"copying and flushing {copying:.1f} s"
        )
        assert peak < 1.3 * total
        assert seconds < 3 * copying + 5
    before, after = (checkpoint.read_tensors(tmp_path / folder) for folder in ("stock", "back"))
    assert before.keys() == after.keys()
    for name in list(before)[::20]:
        assert torch.equal(before[name].load(), after[name].load()), name
