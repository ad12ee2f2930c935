"""Lets Triton's kernels of training take tensors however short, and counts their calls."""

from collections.abc import Callable

import pytest
import torch

from hf_decoder.engine.training import kernels as training_kernels
from hf_decoder.engine.training.kernels import has_kernels

pytest.importorskip("triton")
from triton.runtime import interpreter

from hf_decoder.engine.triton import training as triton_training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
NEVER = 2**40
HALF = [torch.bfloat16, torch.float16]
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, *HALF])


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch):
    """Uses the kernels for short tensors too, and on a CPU."""
    if DEVICE == "cpu":
        monkeypatch.setattr(training_kernels, "kernels_run_on", lambda device: device.type == "cpu")
        monkeypatch.setattr(interpreter, "_convert_float", as_devices_round(interpreter._convert_float))
    assert has_kernels(torch.ones(1, device=DEVICE))  # now, because a GPU launches a kernel to find out
    take_from(monkeypatch, 1)


def as_devices_round(convert: Callable) -> Callable:
    """The interpreter's conversion to bf16 cuts bits off; a device rounds to the nearest number."""

    def rounded(data, source, target, mode):
        if source.is_fp32() and target.is_bf16():
            return torch.from_numpy(data.copy()).bfloat16().view(torch.int16).numpy().view("uint16")
        return convert(data, source, target, mode)

    return rounded


def take_from(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    monkeypatch.setattr(training_kernels, "MIN_KERNEL_ELEMENTS", elements)


def counted(monkeypatch: pytest.MonkeyPatch, *names: str) -> list[str]:
    """Names of the kernels' functions, as they are called."""
    calls: list[str] = []
    for name in names or triton_training.__all__:
        function = getattr(triton_training, name)
        monkeypatch.setattr(
            triton_training,
            name,
            lambda *args, function=function, name=name, **kwargs: calls.append(name) or function(*args, **kwargs),
        )
    return calls


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return (2 * random(*shape, seed=seed)).to(dtype).requires_grad_()
