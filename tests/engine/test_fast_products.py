"""Products in half precision on a CPU without them, against fp64; none is left to torch's slow loop.

Every test sets what this CPU is taken for, so the tests run on any CPU.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext

import pytest
import torch
from functorch.compile import make_boxed_func
from generating import with_hook
from peft import LoraConfig, get_peft_model
from tiny_models import random_ids, tiny_model
from torch._dynamo.backends.common import aot_autograd
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode

from hf_decoder import HfDecoderForCausalLM
from hf_decoder.engine import precision
from hf_decoder.engine.int8 import int8_linear
from hf_decoder.engine.precision import MIN_HALF_ROWS, fast_dtype, linear_in_parts
from hf_decoder.engine.switches import settings
from hf_decoder.engine.training.fast_products import fast_products

HALF = (torch.bfloat16, torch.float16)
DTYPES = pytest.mark.parametrize("dtype", HALF, ids=["bf16", "fp16"])
PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "linear")
IDS = random_ids(2, 150)
PLAIN = torch.nn.Linear(1, 1)
LABELS = IDS.masked_fill(torch.arange(150) < 30, -100)


@pytest.fixture(autouse=True)
def slow_cpu(monkeypatch: pytest.MonkeyPatch):
    for dtype in HALF:
        monkeypatch.setitem(precision.FAST_HALF_PRECISION, dtype, False)


@contextmanager
def products_of_torch() -> Iterator[None]:
    """Takes this CPU for one that multiplies half precision."""
    patch = pytest.MonkeyPatch()
    for dtype in HALF:
        patch.setitem(precision.FAST_HALF_PRECISION, dtype, True)
    yield
    patch.undo()


@pytest.fixture(params=[40, 2**20], ids=["small-blocks", "one-block"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch):
    """Parts of a few rows and a few outputs, the last ones cut short; or all in one."""
    monkeypatch.setattr(precision, "PART_ELEMENTS", request.param)
    if request.param == 40:
        monkeypatch.setattr(precision, "PART_ROWS", 11)


class NoProducts(TorchDispatchMode):
    """Fails at the first product of matrices in half precision, and counts the others."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        tensors = [value for value in args if isinstance(value, torch.Tensor)]
        if function.overloadpacket.__name__ in PRODUCTS:
            assert not any(tensor.dtype in HALF for tensor in tensors), function
            self.count += 1
        return function(*args, **(kwargs or {}))


def leaves(dtype: torch.dtype, rows: int, with_bias: bool = True) -> list[torch.Tensor]:
    """x (1, rows, 13), weight (17, 13), bias (17,)."""
    shapes: list[tuple[int, ...]] = [(1, rows, 13), (17, 13), (17,)]
    generator = torch.Generator().manual_seed(rows)
    return [
        torch.randn(shape, generator=generator).to(dtype).requires_grad_() for shape in shapes[: 3 if with_bias else 2]
    ]


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    found, exact = found.detach().double(), exact.detach().double()
    return float((found - exact).norm() / exact.norm())


@DTYPES
@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [MIN_HALF_ROWS, 129, 150])
@pytest.mark.usefixtures("blocks")
def test_values_and_gradients_are_exact_but_for_one_rounding(rows: int, with_bias: bool, dtype: torch.dtype):
    mine = leaves(dtype, rows, with_bias)
    true = [leaf.detach().double().requires_grad_() for leaf in mine]
    with fast_products(mine[0], PLAIN), NoProducts():
        output = linear(*mine)
    exact = linear(*true)
    assert output.dtype == dtype
    assert error(output, exact) < 1.01 * error(exact.to(dtype), exact)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    with NoProducts() as products:
        gradients = torch.autograd.grad(output, mine, grad)
    assert products.count
    for found, wanted, like in zip(gradients, torch.autograd.grad(exact, true, grad.double()), mine, strict=True):
        assert found.dtype == dtype
        assert found.shape == like.shape
        assert error(found, wanted) < 1.01 * error(wanted.to(dtype), wanted)


@DTYPES
@pytest.mark.usefixtures("blocks")
def test_under_autocast_factors_are_rounded_and_gradients_of_weights_are_not(dtype: torch.dtype):
    mine = leaves(torch.float32, 40)
    true = [leaf.detach().to(dtype).double().requires_grad_() for leaf in mine]
    with torch.autocast("cpu", dtype), fast_products(mine[0], PLAIN), NoProducts():
        output = linear(*mine)
    exact = linear(*true)
    assert output.dtype == dtype
    assert error(output, exact) < 1.01 * error(exact.to(dtype), exact)
    grad = torch.randn(output.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    gradients = torch.autograd.grad(output, mine, grad)
    wanted = torch.autograd.grad(exact, true, grad.double())
    assert [gradient.dtype for gradient in gradients] == [torch.float32] * 3
    assert error(gradients[0], wanted[0]) < torch.finfo(dtype).eps / 2  # x is half precision from here on
    assert error(gradients[1], wanted[1]) < 1e-6
    assert error(gradients[2], wanted[2]) < 1e-6


def test_only_what_is_asked_for_gets_a_gradient():
    x, weight, bias = leaves(torch.bfloat16, 20)
    for needed in ([x], [weight], [bias]):
        for tensor in (x, weight, bias):
            tensor.requires_grad_(any(tensor is one for one in needed))
        with fast_products(x, PLAIN), NoProducts() as products:
            linear(x, weight, bias).sum().backward()
        assert [tensor.grad is not None for tensor in (x, weight, bias)] == [
            any(tensor is one for one in needed) for tensor in (x, weight, bias)
        ]
        assert products.count == 1 + (needed[0] is not bias)
        needed[0].grad = None


def test_there_is_a_second_derivative():
    found = []
    for dtype in (torch.bfloat16, torch.float64):
        inputs = [leaf.detach().to(dtype).requires_grad_() for leaf in leaves(torch.bfloat16, 20)]
        with fast_products(inputs[0], PLAIN):
            output = linear(*inputs)
        first = torch.autograd.grad(output.square().sum(), inputs, create_graph=True)
        found.append(torch.autograd.grad(sum(gradient.double().square().sum() for gradient in first), inputs))
    for mine, exact in zip(*found, strict=True):
        assert error(mine, exact) < 0.03


def test_scaled_integers():
    values = torch.randint(-128, 128, (17, 13), dtype=torch.int8, generator=torch.Generator().manual_seed(0))
    scales, (x, _, bias) = torch.rand(17, 1) / 100, leaves(torch.bfloat16, 20)
    found = linear_in_parts(x.detach(), values, bias.detach(), scales)
    assert error(found, linear(x.double(), values * scales.double(), bias.double())) < 2**-9


def lora(model: torch.nn.Module) -> torch.nn.Module:
    targets = ["q_proj", "v_proj", "down_proj", "lm_head"]
    model = get_peft_model(model, LoraConfig(r=4, target_modules=targets, init_lora_weights=False, use_dora=True))
    return model.to(next(model.parameters()).dtype)


SHAPE = {"attn_implementation": "sdpa", "max_position_embeddings": 256, "attention_bias": True}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "plain": lambda: tiny_model(**SHAPE, qk_norm=True),
    "eager": lambda: tiny_model(**SHAPE | {"attn_implementation": "eager"}),
    "windows": lambda: tiny_model(**SHAPE, sliding_window=20),
    "lora": lambda: lora(tiny_model(**SHAPE)),
    "checkpointing": lambda: tiny_model(**SHAPE),
}


def train(model: torch.nn.Module, watch: bool, autocast: bool, backward_too=False, **inputs) -> list[torch.Tensor]:
    """Loss and gradients, these with autocast on as well if asked for."""
    with (
        NoProducts() if watch else nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss = model(input_ids=IDS, labels=LABELS, use_cache=False, **inputs).loss
    with (
        NoProducts() if watch else nullcontext(),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast and backward_too),
    ):
        loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize(
    ("kind", "way"),
    [(kind, way) for kind in MODELS for way in ("bf16", "autocast")] + [("plain", "autocast around backward")],
)
def test_a_training_step_has_no_slow_product_and_is_no_less_exact(kind: str, way: str):
    results = []
    for dtype, watch in ((torch.float64, False), (torch.bfloat16, True), (torch.bfloat16, False)):
        torch.manual_seed(0)
        model = MODELS[kind]().train()
        if way == "bf16":  # the same numbers in all three
            model.to(torch.bfloat16)
        is_exact = dtype == torch.float64
        if is_exact or way == "bf16":
            model.to(dtype)
        if kind == "checkpointing":
            model.gradient_checkpointing_enable()
        positions = torch.arange(150)[None] % 50  # three documents a row
        with products_of_torch() if not watch else nullcontext():
            autocast = way.startswith("autocast") and not is_exact
            results.append(train(model, watch, autocast, "backward" in way, position_ids=positions))
    exact, mine, by_torch = results
    assert len(mine) == len(exact) > 3
    errors = torch.tensor([[error(a, c), error(b, c)] for a, b, c in zip(mine, by_torch, exact, strict=True)])
    assert errors[:, 0].max() < 0.15
    assert errors[:, 0].mean() <= errors[:, 1].mean() * 1.15


@pytest.mark.kernels
@pytest.mark.parametrize("way", ["bf16", "autocast"])
def test_compiled_training_has_no_slow_product(way: str):
    names: list[str] = []

    def record(graph: torch.fx.GraphModule, inputs):
        for node in graph.graph.nodes:
            tensors = [value.meta.get("val") for value in node.args if isinstance(value, torch.fx.Node)]
            name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
            if name in PRODUCTS:
                assert not any(isinstance(value, torch.Tensor) and value.dtype in HALF for value in tensors), node
                names.append(name)
        return make_boxed_func(graph.forward)

    backend = aot_autograd(fw_compiler=record, bw_compiler=record)
    results = []
    for compile_it in (False, True):
        model = tiny_model(**SHAPE).train()
        if way == "bf16":
            model.to(torch.bfloat16)
        run = torch.compile(model, backend=backend, fullgraph=True) if compile_it else model
        results.append(train(run, watch=False, autocast=way == "autocast"))
    assert len(names) >= 7 * 2 * 3  # seven maps a layer, and two products more for their gradients
    for eager, compiled in zip(*results, strict=True):
        assert error(compiled, eager.double()) < 0.03


@DTYPES
def test_prompts_and_logits(dtype: torch.dtype):
    model = tiny_model(**SHAPE).to(dtype)
    exact = tiny_model(**SHAPE).to(dtype).double()(IDS).logits
    with torch.no_grad():
        with NoProducts() as products:
            logits = model(IDS[:, :64]).logits
        with products_of_torch():
            by_torch = model(IDS[:, :64]).logits
    assert products.count == 2 * 7 + 1
    assert error(logits, exact[:, :64]) <= error(by_torch, exact[:, :64]) * 1.05


@DTYPES
@pytest.mark.parametrize("cache", [None, "static"])
def test_many_rows_are_generated_without_slow_products(cache: str | None, dtype: torch.dtype):
    model = tiny_model(**SHAPE, eos_token_id=None).to(dtype)
    prompts = random_ids(MIN_HALF_ROWS, 6)
    options = {"max_new_tokens": 8, "do_sample": False, "cache_implementation": cache, "disable_compile": True}
    with NoProducts() as products:
        text = model.generate(prompts, **options)
    assert products.count > 8 * 2 * 7
    with settings.override(all=False):
        by_torch = model.generate(prompts, **options)

    def behind(text: torch.Tensor) -> float:
        """How far the worst of the chosen tokens lies behind the best one."""
        exact = tiny_model(**SHAPE).to(dtype).double()(text).logits[:, 5:-1]
        chosen = exact.gather(-1, text[:, 6:, None]).squeeze(-1)
        return ((exact.amax(-1) - chosen).max() / exact.std()).item()

    assert behind(text) <= behind(by_torch) + 0.01


def test_where_nothing_is_to_be_done(monkeypatch: pytest.MonkeyPatch):
    def is_active(x: torch.Tensor) -> bool:
        return not isinstance(fast_products(x, PLAIN), nullcontext)

    long = torch.ones(2, MIN_HALF_ROWS // 2, 5, dtype=torch.bfloat16)
    assert is_active(long)
    assert not is_active(long[:, :-1])
    assert not is_active(long.float())
    assert not is_active(long.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert is_active(long.float())
    assert fast_dtype(torch.device("cpu"), torch.bfloat16) == torch.float32
    assert fast_dtype(torch.device("cuda"), torch.bfloat16) == torch.bfloat16
    with products_of_torch():
        assert not is_active(long)
        assert fast_dtype(torch.device("cpu"), torch.bfloat16) == torch.bfloat16
    monkeypatch.setattr(torch._C, "_is_tracing", lambda: True)
    assert not is_active(long)


def test_what_is_exported_is_for_every_machine():
    model = tiny_model(HfDecoderForCausalLM, **SHAPE).bfloat16()
    program = torch.export.export(model, (IDS[:, :32],), {"use_cache": False}, strict=False)
    weights = {node for node in program.graph.nodes if node.op == "placeholder" and "proj" in node.name}
    users = [user for weight in weights for user in weight.users]
    assert len(users) > 7 * 2
    assert {user.target for user in users} == {torch.ops.aten.linear.default}


@pytest.mark.parametrize("wrong", ["dtype", "shape"])
def test_what_does_not_fit_is_refused_by_torch(wrong: str):
    x, weight, _ = (leaf.detach() for leaf in leaves(torch.bfloat16, 20))
    weight = weight.float() if wrong == "dtype" else weight[:, 1:]
    messages = []
    for context in (nullcontext(), fast_products(x, PLAIN)):
        with context, pytest.raises(RuntimeError) as caught:
            linear(x, weight)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_other_products_of_a_layer():
    a, b = torch.randn(2, 3, 20, 8).bfloat16(), torch.randn(2, 3, 8, 20).bfloat16()
    exact = (a.double() @ b.double()).float().bfloat16()
    with fast_products(a, PLAIN), NoProducts() as products:
        for found in (torch.matmul(a, b), a.matmul(b), a @ b):
            assert error(found, exact.double()) < 1e-3
    assert products.count == 3


@pytest.mark.parametrize("is_fast", [True, False])
@pytest.mark.parametrize("rows", [1, 5, 150])
@pytest.mark.parametrize("way", ["fp32", "bf16", "autocast"])
def test_int8_weights_are_not_multiplied_out(way: str, rows: int, is_fast: bool, monkeypatch: pytest.MonkeyPatch):
    torchao = pytest.importorskip("torchao.quantization")
    monkeypatch.setitem(precision.FAST_HALF_PRECISION, torch.bfloat16, is_fast)
    monkeypatch.setattr(precision, "PART_ELEMENTS", 40)
    models = []
    for _ in range(2):
        models.append(with_hook(tiny_model(**SHAPE)).to(torch.bfloat16 if way == "bf16" else torch.float32))
        torchao.quantize_(models[-1], torchao.Int8WeightOnlyConfig())
    model, exact = models
    for module in exact.modules():
        if isinstance(module, torch.nn.Linear) and type(module.weight).__name__ == "Int8Tensor":
            module.weight = torch.nn.Parameter(module.weight.dequantize().double())
    kind = type(model.model.layers[0].mlp.down_proj.weight)
    monkeypatch.setattr(kind, "dequantize", lambda *_: pytest.fail("the weight was multiplied out"))
    taken = []
    monkeypatch.setattr(
        "hf_decoder.engine.training.fast_products.int8_linear",
        lambda x, weights: taken.append(x.dtype) or int8_linear(x, weights),
    )
    ids = IDS[:1, :rows]
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"):
            logits = model(ids).logits
        wanted = exact.double()(ids).logits
    quantized = [m for m in model.modules() if type(getattr(m, "weight", None)) is kind]
    assert len(taken) == len(quantized) >= 2 * 7
    # torchao's products have their input's dtype; autocast changes attention's, which the output map reads
    both = {torch.float32, torch.bfloat16}
    assert set(taken) == {"fp32": {torch.float32}, "bf16": {torch.bfloat16}, "autocast": both}[way]
    assert error(logits, wanted) < (1e-5 if way == "fp32" else 0.05)


def test_int8_weights_under_an_adapter_that_trains():
    """torchao's own product is used, which has gradients."""
    torchao = pytest.importorskip("torchao.quantization")
    model = tiny_model(**SHAPE)
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False))
    grads = []
    for active in (True, False):
        with settings.override(training=active):
            model(input_ids=IDS, labels=LABELS).loss.backward()
        grads.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
        model.zero_grad()
    assert len(grads[0]) == 2 * 2 * 2
    for mine, by_torchao in zip(*grads, strict=True):
        torch.testing.assert_close(mine, by_torchao)
