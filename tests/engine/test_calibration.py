"""The engine takes the way that a measurement on this machine finds fastest, torch's own in doubt."""

import json
import os
import threading
import time

import pytest
import torch
from tiny_models import random_ids, tiny_model

from hf_decoder.cli.main import main
from hf_decoder.engine import calibration, settings
from hf_decoder.engine.calibration import bucket, choose, measured
from hf_decoder.engine.cpp import build
from hf_decoder.engine.training import compiled
from hf_decoder.engine.training.ways import in_cpp

pytestmark = pytest.mark.usefixtures("measuring")


def forget(monkeypatch) -> None:
    """As in a new process."""
    monkeypatch.setattr(calibration, "_chosen", {})
    monkeypatch.setattr(calibration, "_tables", {})


class Way:
    """A candidate that takes so many milliseconds."""

    def __init__(self, milliseconds: float, result: float = 1.0):
        self.seconds, self.result, self.calls = milliseconds / 1e3, result, 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        time.sleep(self.seconds)
        return x * self.result


def inputs() -> tuple[torch.Tensor]:
    return (torch.ones(4),)


def chosen(name: str = "a product", **ways: Way) -> str:
    return choose(name, ("fp32", 8), ways, inputs)


@pytest.fixture
def file(measuring):
    return measuring / "hf_decoder/engine/calibration.json"


@pytest.fixture(autouse=True)
def idle(monkeypatch) -> None:
    """Ways that sleep are kept, too."""
    monkeypatch.setattr(calibration, "COMPUTES", 0.0)


def test_the_fastest_is_taken_and_measured_once():
    ways = {"torch": Way(4), "slow": Way(6), "fast": Way(1), "slower": Way(2)}
    assert chosen(**ways) == "fast"
    calls = ways["torch"].calls
    assert chosen(**ways) == "fast" and ways["torch"].calls == calls
    (times,) = measured().values()
    assert times["fast"] < times["slower"] < times["torch"]
    assert ways["slow"].calls <= 4  # what is hopeless is not run to the end


def test_torch_is_taken_where_the_other_is_hardly_faster():
    assert chosen(torch=Way(5), other=Way(8)) == "torch"
    assert calibration.fastest({"torch": 100.0, "other": 98.0}) == "torch"
    assert calibration.fastest({"torch": 100.0, "other": 96.0}) == "other"


@pytest.mark.parametrize("result", [1.1, float("nan")])
def test_other_numbers_are_refused_in_words(result, caplog):
    assert chosen(torch=Way(3), broken=Way(0.5, result), rounded=Way(1, 1 + 1e-5)) == "rounded"
    assert "'broken' for 'a product' gives other numbers than 'torch'" in caplog.text


def test_a_candidate_that_fails_is_refused_in_words(caplog):
    def fails(x):
        raise RuntimeError("no such instruction")

    assert choose("a product", (), {"torch": Way(1), "fails": fails}, inputs) == "torch"
    assert "no such instruction" in caplog.text
    assert choose("another", (), {"torch": fails, "other": Way(1)}, inputs) == "torch"


def test_a_pinned_way_is_taken_unmeasured(file):
    ways = {"torch": Way(0), "slow": Way(5)}
    with settings.override(ways={"a product": "slow"}):
        assert chosen(**ways) == "slow" and chosen("another", **ways) == "torch"
    assert not any(way.calls for way in ways.values()) and not file.exists()
    with settings.override(ways={"a product": "slwo"}), pytest.raises(ValueError, match="choose among torch, slow"):
        chosen(**ways)


def test_another_process_reads_what_the_first_one_wrote(file, monkeypatch):
    assert chosen(torch=Way(9), fast=Way(4)) == "fast"
    assert file.stat().st_mode & 0o777 == 0o600 and file.parent.stat().st_mode & 0o777 == 0o700
    forget(monkeypatch)
    ways = {"torch": Way(0), "fast": Way(0)}
    assert chosen(**ways) == "fast" and not ways["torch"].calls
    forget(monkeypatch)
    assert chosen(torch=Way(0), renamed=Way(3)) == "torch"  # a new candidate is measured


def test_a_disturbed_measurement_is_for_this_process_alone(file):
    times = iter([1, 1, *[1, 20, 20] * 50])  # two runs before those that count

    def disturbed(x):
        time.sleep(next(times) / 1e3)
        return x

    assert choose("a product", ("fp32", 8), {"torch": Way(30), "disturbed": disturbed}, inputs) == "disturbed"
    assert "a product fp32 8" in measured() and not file.exists()


def test_a_measurement_that_waits_for_a_core_is_for_this_process_alone(file, monkeypatch):
    monkeypatch.setattr(calibration, "COMPUTES", 0.8)
    assert chosen(torch=Way(9), fast=Way(4)) == "fast"  # they sleep
    assert "a product fp32 8" in measured() and not file.exists()


@pytest.mark.parametrize("begins", ["before", "meanwhile"])
def test_what_is_measured_while_something_is_compiled_is_for_this_process_alone(begins, file, monkeypatch):
    compiling: set[str] = {"step.so"} if begins == "before" else set()
    monkeypatch.setattr(calibration, "compiling", compiling)

    def torchs(x):
        compiling.clear() if begins == "before" else compiling.add("step.so")  # it ends, or it goes on
        time.sleep(3e-3)
        return x

    assert choose("a product", ("fp32", 8), {"torch": torchs, "fast": Way(1)}, inputs) == "fast"
    assert "a product fp32 8" in measured() and not file.exists()


def test_two_processes_keep_what_the_other_one_wrote(file, monkeypatch):
    measured()  # this one has read the file before the other one wrote
    machine = next(iter(calibration._tables))
    file.write_text(json.dumps({machine: {"of another": {"torch": 1.0}}, "machine": {"x": {"torch": 2}}}))
    file.chmod(0o600)
    chosen(torch=Way(8), fast=Way(4))
    tables = json.loads(file.read_text())
    assert {*tables[machine]} == {"of another", "a product fp32 8"} and tables["machine"] == {"x": {"torch": 2}}


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1, 2]", '{"x": 3}', "[" * 100_000, '{"MACHINE": {"a product fp32 8": {"torch": "x", "fast": NaN}}}'],
    ids=["empty", "cut", "list", "number", "deep", "no times"],
)
def test_a_damaged_file_is_written_anew(text, file, monkeypatch):
    measured()
    file.write_text(text.replace("MACHINE", next(iter(calibration._tables))))
    file.chmod(0o600)
    forget(monkeypatch)
    assert chosen(torch=Way(9), fast=Way(4)) == "fast"
    assert "a product fp32 8" in next(iter(json.loads(file.read_text()).values()))


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="no owners of files")
@pytest.mark.parametrize("fault", ["file of others", "folder of others", "no folder", "full disk"])
def test_what_others_may_have_written_is_not_read(fault, file, monkeypatch):
    chosen(torch=Way(4), fast=Way(8))
    file.write_text(file.read_text().replace('"torch": ', '"torch": 1000'))  # a planted figure
    owner = os.getuid()
    if fault == "file of others":
        file.chmod(0o666)
    elif fault == "folder of others":
        monkeypatch.setattr(os, "getuid", lambda: owner + 1)
    elif fault == "no folder":
        monkeypatch.setenv("XDG_CACHE_HOME", "/proc/no-such-folder")
    else:
        file.unlink()
        monkeypatch.setattr(calibration.tempfile, "mkstemp", lambda **_: (_ for _ in ()).throw(OSError("full")))
    forget(monkeypatch)
    ways = {"torch": Way(0), "fast": Way(2)}
    assert chosen(**ways) == "torch" and ways["torch"].calls
    if "folder" in fault:
        assert build.own_folder() != file.parent


def test_nothing_is_measured_within_a_trace():
    ways = {"torch": Way(2), "fast": Way(0)}

    def ask(x):
        return x * len(chosen(**ways))

    for traced in (
        lambda: torch.compile(ask, backend="eager")(torch.ones(2)),
        lambda: torch.jit.trace(ask, torch.ones(2), check_trace=False),
        lambda: torch.func.vmap(ask)(torch.ones(2)),
        lambda: with_fake_tensors(ask),
    ):
        traced()
        assert not any(way.calls for way in ways.values())
    assert chosen(**ways) == "fast"


def with_fake_tensors(function):
    from torch._subclasses import FakeTensorMode

    with FakeTensorMode() as mode:
        return function(mode.from_tensor(torch.ones(2)))


def test_a_measurement_sees_and_changes_nothing_of_its_caller():
    seen = []

    def way(x):
        seen.append(
            (torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.is_autocast_enabled("cpu"), x.dtype)
        )
        calibration.numbers(3)
        return (x @ x).detach()

    packed: list[torch.Tensor] = []
    before = torch.get_rng_state()
    with (
        torch.inference_mode(),
        torch.autocast("cpu", torch.bfloat16),
        torch.autograd.graph.saved_tensors_hooks(lambda x: packed.append(x) or x, lambda x: x),
    ):
        choose("states", (), {"torch": way, "other": way}, lambda: (torch.ones(4, 4, requires_grad=True),))
    assert set(seen) == {(True, False, False, torch.float32)} and not packed
    assert torch.get_rng_state().equal(before)


def test_threads_and_candidates_that_ask_wait_for_no_lock():
    def nested(x):
        choose("inner", (), {"torch": Way(0), "other": Way(1)}, inputs)
        return x

    def ask():
        assert choose("outer", (), {"torch": nested, "other": Way(3)}, inputs) == "torch"

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    assert {*measured()} == {"outer", "inner"}


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_measures_though_its_parent_held_the_lock():
    with calibration._lock:
        child = os.fork()
        if not child:
            os._exit(0 if chosen(torch=Way(2), fast=Way(0)) == "fast" else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_sizes_are_rounded_to_powers_of_two():
    assert [bucket(size, 16, 1024) for size in (0, 1, 16, 17, 512, 513, 4000)] == [16, 16, 16, 32, 512, 1024, 1024]


@pytest.mark.process
@pytest.mark.parametrize(
    "value, ways",
    [(None, None), ("", {}), ("norm=C++,attention=tiles of 64", {"norm": "C++", "attention": "tiles of 64"})],
)
def test_the_environment_pins_ways(value, ways, run_python):
    variables = {} if value is None else {"HF_DECODER_WAYS": value}
    code = "import os\nfrom hf_decoder.engine import settings\nprint(settings.ways)"
    if value is None:
        code = "import os\nos.environ.pop('HF_DECODER_WAYS', None)\n" + code
    assert run_python(code, **variables).strip().endswith(str(ways))


@pytest.fixture
def built(cpp_library, monkeypatch):
    monkeypatch.setattr(compiled, "_was_built", lambda: True)


@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("dtype, to", [(torch.float32, torch.bfloat16), (torch.bfloat16, None)])
@pytest.mark.parametrize("name", ["norm", "gate", "rotation"])
def test_cpp_gives_the_numbers_of_torch_where_a_machine_chooses(name, dtype, to, trains, built, caplog):
    with torch.set_grad_enabled(trains):
        in_cpp(name, torch.Size((100, 50)), dtype, to)
    (times,) = measured().values()
    assert {*times} == {"torch", "C++"} and None not in times.values() and not caplog.text


def test_a_model_measures_what_it_computes_with_and_says_so(built, capsys):
    model = tiny_model(attn_implementation="sdpa").train()
    ids = random_ids(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        found = model(ids, labels=ids).loss
    kinds = {case.split(" torch.")[0] for case in measured()}
    assert kinds >= {"attention whole", "norm", "gate", "rotation", "loss", "block of the loss", "products"}
    with settings.override(all=False), torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(found, model(ids, labels=ids).loss, rtol=2e-2, atol=0)
    assert main(["env"]) == 0
    assert "norm torch.float32" in capsys.readouterr().out


def test_nobody_waits_for_cpp(monkeypatch):
    """Until it is compiled, torch's operators are taken."""
    monkeypatch.setattr(compiled, "_was_built", lambda: False)
    monkeypatch.setattr(compiled, "_later", build.Later(lambda: time.sleep(9), "what takes long"))
    model, ids = tiny_model(attn_implementation="sdpa").train(), random_ids(2, 40)
    with torch.autocast("cpu", torch.bfloat16):
        model(ids, labels=ids).loss.backward()
    kinds = {case.split(" torch.")[0] for case in measured()}
    assert not kinds & {"norm", "gate", "rotation", "loss"}


@pytest.mark.kernels
def test_a_compiled_model_takes_what_was_measured_before():
    model = tiny_model(attn_implementation="sdpa").train()
    assert {case.split()[0] for case in measured()} >= {"attention"}
    ids = random_ids(2, 40)
    before = {*measured()}
    loss = torch.compile(model, fullgraph=True, backend="aot_eager")(ids, labels=ids, use_cache=False).loss
    loss.backward()
    new = {case.split()[0] for case in {*measured()} - before}
    assert new <= {"block", "loss", "products", "rows", "weight"}  # as the operators run
    with settings.override(all=False):
        torch.testing.assert_close(loss, model(ids, labels=ids).loss, rtol=1e-4, atol=0)
