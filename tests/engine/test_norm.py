"""The statistics of norms are in fp32, whatever their input is; test_compiled.py has the rest."""

import pytest
import torch
from torch.autograd import forward_ad

from hf_decoder.engine.training.norm import fused_rms_norm
from hf_decoder.model.modeling_hf_decoder import HfDecoderRMSNorm

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize(
    ("dtype", "way"),
    [*((dtype, "module") for dtype in DTYPES), (torch.float32, "C++"), (torch.bfloat16, "C++")],
    ids=str,
)
def test_statistics_are_fp32(dtype: torch.dtype, way: str):
    norm = HfDecoderRMSNorm(256).to(dtype)
    values = torch.randn(4, 256, generator=torch.Generator().manual_seed(0)) * 3000  # squares overflow fp16
    x = values.to(dtype)
    truth = x.double() / x.double().square().mean(-1, keepdim=True).sqrt()
    output = norm(x) if way == "module" else fused_rms_norm(x, norm.weight, norm.variance_epsilon)
    assert output.dtype == dtype
    # one rounding of the result and no more: half a unit in the last place
    torch.testing.assert_close(output.double(), truth, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_derivatives_forwards_are_refused_without_gradients_too():
    x, weight = torch.ones(4, 64), torch.ones(64)
    with torch.no_grad(), forward_ad.dual_level(), pytest.raises(NotImplementedError):
        fused_rms_norm(forward_ad.make_dual(x, x), weight, 1e-6)
