"""Products in fp32 by oneDNN, against fp64; and whole models that take them, against their plain modules."""

from collections import Counter

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from tiny_models import random_ids, tiny_model
from torch.autograd import forward_ad
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from hf_decoder.engine import single_precision
from hf_decoder.engine.calibration import measured, taken
from hf_decoder.engine.single_precision import MIN_ROWS, multiply_rows, multiply_transposed, padded_rows
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training.fast_products import fast_map, fast_products
from hf_decoder.engine.training.loss import linear_cross_entropy

WAY = {"rows in fp32": "oneDNN", "weight gradients in fp32": "oneDNN"}
SIZES = st.integers(1, 40)

pytestmark = pytest.mark.skipif(
    not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN to compare with"
)


class Counted:
    """Counts the products of oneDNN and those of torch."""

    def __enter__(self):
        self._profile = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
        self._profile.__enter__()
        return self

    def __exit__(self, *raised):
        self._profile.__exit__(*raised)
        counts = Counter(event.name for event in self._profile.events())
        self.onednn = counts["mkldnn::_linear_pointwise"]
        self.torch = sum(counts[f"aten::{name}"] for name in ("mm", "addmm", "bmm"))


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def laid_out(matrix: torch.Tensor, layout: str) -> torch.Tensor:
    """The same numbers as they are, as the transpose of a contiguous matrix, or as columns of a wider one."""
    if layout == "columns":
        return torch.cat((matrix, matrix), 1)[:, : matrix.shape[1]]
    return matrix if layout == "rows" else matrix.t().contiguous().t()


@hypothesis.settings(max_examples=300, deadline=None)
@hypothesis.given(
    SIZES,
    SIZES,
    SIZES,
    st.booleans(),
    st.booleans(),
    st.tuples(*[st.sampled_from(["rows", "transposed", "columns"])] * 2),
    st.sampled_from(["torch", "turned", "oneDNN"]),
)
def test_products_of_any_shape_and_layout(rows, outputs, inputs, with_bias, has_room, layouts, way):
    x, weight = (
        laid_out(drawn(count, inputs, seed=count), layout)
        for count, layout in zip((rows, outputs), layouts, strict=True)
    )
    bias = drawn(outputs, seed=3) if with_bias else None
    room = torch.full((rows, outputs), torch.nan) if has_room else None
    ways = {
        "rows in fp32": way,
        "weight gradients in fp32": way if way == "oneDNN" else "torch",
        "one row": "in parts",
    }
    with settings.override(ways=ways):
        product = multiply_rows(x, weight, bias, out=room)
        gradient = multiply_transposed(product, x, torch.empty(outputs, inputs) if has_room else None)
    exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
    torch.testing.assert_close(product.double(), exact, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradient.double(), exact.t() @ x.double(), rtol=1e-4, atol=2e-3)
    assert room is None or product is room
    assert torch.equal(x, laid_out(drawn(rows, inputs, seed=rows), "rows"))


def test_a_large_result_is_written_part_by_part(monkeypatch):
    monkeypatch.setattr(single_precision, "PART_OUTPUTS", 7)
    x, weight, bias = drawn(20, 12), drawn(30, 12), drawn(30)
    with settings.override(ways=WAY), Counted() as counted:
        product = multiply_rows(x, weight, bias, out=torch.empty(20, 30))
    assert counted.onednn == 5 and not counted.torch
    torch.testing.assert_close(product, linear(x, weight, bias))


def test_columns_of_a_matrix_are_left_to_torch():
    """oneDNN takes minutes for one that is neither contiguous nor the transpose of one that is."""
    wide = drawn(64, 128)
    with settings.override(ways=WAY), Counted() as counted:
        multiply_rows(wide[:, :64], wide[:, 64:])
        multiply_rows(wide.double(), wide.double())
    assert not counted.onednn


def test_gradients_of_every_order():
    """Of x with leading dimensions, weight and bias: first by oneDNN, second by torch; forwards by torch alone."""
    leaves = [drawn(2, 30, 13), drawn(17, 13), drawn(17)]
    mine = [leaf.clone().requires_grad_() for leaf in leaves]
    true = [leaf.double().requires_grad_() for leaf in leaves]
    reader = torch.nn.Linear(13, 17)
    with settings.override(ways=WAY):
        with fast_products(mine[0], reader), Counted() as counted:
            output = linear(*mine)
        assert (counted.onednn, counted.torch) == (1, 0)
        exact = linear(*true)
        grad = drawn(*output.shape, seed=1)
        with Counted() as counted:
            found = torch.autograd.grad(output, mine, grad, retain_graph=True)
        assert (counted.onednn, counted.torch) == (2, 0)
        for gradient, wanted in zip(
            found, torch.autograd.grad(exact, true, grad.double(), retain_graph=True), strict=True
        ):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-4, atol=1e-4)
        second = []
        for result, inputs in ((output, mine), (exact, true)):
            first = torch.autograd.grad(result.square().sum(), inputs, create_graph=True)
            second.append(torch.autograd.grad(sum(of.square().sum() for of in first), inputs))
        for gradient, wanted in zip(*second, strict=True):
            torch.testing.assert_close(gradient.double(), wanted, rtol=1e-3, atol=1e-2)
        with forward_ad.dual_level(), fast_products(leaves[0], reader), Counted() as counted:
            dual = forward_ad.make_dual(leaves[0], torch.ones_like(leaves[0]))
            tangent = forward_ad.unpack_dual(linear(dual, *leaves[1:])).tangent
        assert not counted.onednn
        torch.testing.assert_close(tangent, linear(torch.ones_like(leaves[0]), leaves[1]))


@pytest.mark.parametrize("rows", [32, 30])
def test_a_hook_may_write_into_a_product(rows):
    """As PyTorch allows with a linear layer's own output, whose values autograd does not keep."""
    x, module = drawn(2, rows, 8).requires_grad_(), torch.nn.Linear(8, 9)
    module.register_forward_hook(lambda module, inputs, output: output.mul_(3))
    with settings.override(ways=WAY), fast_products(x, module), Counted() as counted:
        module(x).sum().backward()
    assert counted.onednn
    torch.testing.assert_close(x.grad, 3 * module.weight.sum(0).expand_as(x))


@pytest.mark.parametrize("bias", ["apart", "of one number", "expanded", "none of its inputs"])
def test_any_bias_and_no_inputs(bias: str):
    x, weight = drawn(30, 8), drawn(6, 8)
    given = {"apart": drawn(12)[::2], "of one number": drawn(1), "expanded": drawn(1).expand(6)}.get(bias, drawn(6))
    if bias == "none of its inputs":
        x, weight = x[:, :0], weight[:, :0]
    with settings.override(ways=WAY), fast_products(x, torch.nn.Linear(8, 6)):
        torch.testing.assert_close(linear(x, weight, given), x @ weight.t() + given)
        if len(given) == 6:
            torch.testing.assert_close(multiply_rows(x, weight, given), x @ weight.t() + given)
            torch.testing.assert_close(multiply_rows(x[:1], weight, given), x[:1] @ weight.t() + given)


def test_gradients_are_contiguous_and_inputs_of_frozen_weights_are_not_kept():
    x, weight = drawn(32, 8).requires_grad_(), drawn(9, 8).requires_grad_()
    with settings.override(ways=WAY), fast_products(x, torch.nn.Linear(8, 9)):
        of_weight, of_x = torch.autograd.grad(linear(x, weight).square().sum(), (weight, x))
        assert of_weight.is_contiguous() and of_x.is_contiguous()
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor.shape) or tensor, lambda x: x):
            output = linear(x, weight.detach())
        assert kept == [weight.shape]
        torch.testing.assert_close(torch.autograd.grad(output.square().sum(), x, create_graph=True)[0], of_x)


class Seen(TorchFunctionMode):
    count = 0

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.count += function is linear
        return function(*args, **(kwargs or {}))


def test_a_mode_sees_every_product():
    model, ids = tiny_model().eval(), random_ids(2, 30)
    with settings.override(ways=WAY), torch.no_grad(), Seen() as seen:
        model(ids)
        model(ids[:1], logits_to_keep=1)
    assert seen.count == 2 * (7 * len(model.model.layers) + 1)


def test_a_weight_that_is_sharded_when_a_call_begins():
    """As ZeRO-3 leaves them between calls: nothing, until a hook gathers it."""
    model, ids = tiny_model().eval(), random_ids(2, 30)
    plain = model(ids).logits
    for layer in model.model.layers:
        whole = layer.mlp.down_proj.weight
        layer.mlp.down_proj.weight = torch.nn.Parameter(torch.empty(0))
        layer.mlp.down_proj.register_forward_pre_hook(
            lambda module, inputs, whole=whole: setattr(module, "weight", whole) and None
        )
    with settings.override(ways=WAY):
        torch.testing.assert_close(model(ids).logits, plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("with_bias", [False, True])
def test_the_loss(with_bias):
    vocabulary, rows = 50, 40
    targets = torch.arange(rows) % vocabulary
    found = []
    for dtype in (torch.float32, torch.float64):
        inputs = [drawn(rows, 24), drawn(vocabulary, 24, seed=1), drawn(vocabulary, seed=2)][: 3 if with_bias else 2]
        inputs = [tensor.to(dtype).requires_grad_() for tensor in inputs]
        with settings.override(ways=WAY), Counted() as counted:
            loss = linear_cross_entropy(*inputs[:2], targets, *inputs[2:])
            found.append([loss, *torch.autograd.grad(loss, inputs)])
        assert counted.onednn == (3 if dtype == torch.float32 else 0)
    for mine, exact in zip(*found, strict=True):
        torch.testing.assert_close(mine.double(), exact.double(), rtol=1e-4, atol=1e-4)


def hooked(model):
    model.model.layers[1].mlp.up_proj.register_forward_hook(lambda module, inputs, output: 2 * output)
    return model


def adapted(model):
    return get_peft_model(model, LoraConfig(target_modules=["q_proj", "down_proj"], init_lora_weights=False))


@pytest.mark.parametrize("variant", ["plain", "biased", "adapted", "hooked"])
@pytest.mark.parametrize("trains", [True, False], ids=["training", "inference"])
def test_models(variant: str, trains: bool):
    """Every large product is oneDNN's, and logits and gradients are those of the modules."""
    model = tiny_model(attention_bias=variant == "biased", mlp_bias=variant == "biased").train(trains)
    if variant in ("adapted", "hooked"):
        model = {"adapted": adapted, "hooked": hooked}[variant](model)
    ids = random_ids(2, 30)
    found = []
    for switches in ({"all": False}, {"ways": WAY}):
        model.zero_grad()
        with settings.override(**switches), torch.set_grad_enabled(trains), Counted() as counted:
            output = model(ids, labels=ids)
            if trains:
                output.loss.backward()
        found.append([output.loss, *(parameter.grad for parameter in model.parameters() if trains)])
    assert counted.onednn >= 7 * len(model.get_decoder().layers) * (3 if variant == "plain" and trains else 1)
    for mine, plain in zip(*found, strict=True):
        assert (mine is None) == (plain is None)
        if mine is not None:
            torch.testing.assert_close(mine, plain, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("case", ["few rows", "another way", "oneDNN is off", "training is off", "half precision"])
def test_where_torch_multiplies(case: str):
    x, module = drawn(MIN_ROWS, 8), torch.nn.Linear(8, 8)
    if case == "few rows":
        x = x[1:]
    if case == "half precision":
        x, module = x.bfloat16(), module.bfloat16()
    switches = {"ways": {} if case == "another way" else WAY, "training": case != "training is off"}
    with torch.backends.mkldnn.flags(enabled=case != "oneDNN is off"), settings.override(**switches):
        with fast_products(x, module), Counted() as counted:
            linear(x, module.weight)
        with Counted() as mapped:
            fast_map(module)(x) if case != "training is off" else None
    assert not counted.onednn and not mapped.onednn


def test_torch_counts_the_work_of_all_products():
    x, module = drawn(30, 8), torch.nn.Linear(8, 9)
    with settings.override(ways=WAY), FlopCounterMode(display=False) as counter, fast_products(x, module):
        linear(x, module.weight)
    assert counter.get_total_flops() == 2 * 30 * 8 * 9


def test_it_is_measured_and_never_slower(measuring):
    """The way that is taken is the fastest of those measured, and torch's is among them."""
    for rows in (2, 16, 300):
        before = measured()
        way = single_precision.way_of_rows(rows, 100, 200)
        (times,) = (of for name, of in measured().items() if name not in before)
        assert next(iter(times)) == "torch"
        assert times[way] == min(times.values()) or way == "torch"
    multiply_transposed(drawn(320, 100), drawn(320, 200))
    assert list(measured()["weight gradients in fp32 512 128 256"]) == ["torch", "oneDNN"]


def test_few_numbers_of_rows_are_compiled():
    """A product is compiled for each number of rows, so most of them are rounded up, many by less than a quarter."""
    rounded = {count: padded_rows(count) for count in range(1, 2049)}
    assert all(0 <= room - count < max(16, count / 4) for count, room in rounded.items())
    assert len(set(rounded.values())) <= 8 + 4 * 4
    assert all(rounded[count] == count for count in (16, 48, 64, 128, 320, 512, 1024, 2048))


def test_one_row_of_logits():
    """A prompt's last row takes a product of its own; its hooks and gradients are kept."""
    model, ids = tiny_model(vocab_size=100).eval(), random_ids(1, 9)  # a multiple of the parts
    with torch.no_grad(), settings.override(all=False):
        plain = model(ids, logits_to_keep=1).logits
    with settings.override(ways={"one row": "in parts"}):
        taken.pop("one row", None)
        with torch.no_grad():
            torch.testing.assert_close(model(ids, logits_to_keep=1).logits, plain, rtol=1e-4, atol=1e-4)
        assert taken.pop("one row") == "in parts"
        assert model(ids, logits_to_keep=1).logits.requires_grad
        assert "one row" not in taken
        model.lm_head.register_forward_hook(lambda module, inputs, output: output + 1)
        with torch.no_grad():
            torch.testing.assert_close(model(ids, logits_to_keep=1).logits, plain + 1, rtol=1e-4, atol=1e-4)
