"""Which room imports which: down the list of rooms and never up, the model last, which knows nothing but torch."""

import ast
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_decoder"
MODEL = sorted((PACKAGE / "model").glob("*.py"))
ENGINE = sorted((PACKAGE / "engine").rglob("*.py"))
CLI = sorted((PACKAGE / "cli").rglob("*.py"))
SCRIPTS = sorted((ROOT / "scripts").glob("*.py"))
# From the top floor down; imports only go down. The public names of `hf_decoder` are for everybody.
ROOMS = [
    "cli",
    "assistant",
    "publishing",
    "doctor",
    "serving",
    "tuning",
    "training",
    "evaluation",
    "interop",
    "reporting",
    "data",
    "costs",
    "safety",
    "engine",
    "model",
]
BESIDE_THE_ROOMS = {"__init__.py", "registration.py", "moved.py"}
LIBRARY = sorted(path for path in PACKAGE.rglob("*.py") if path not in {*MODEL, *ENGINE, *CLI})
EVERYTHING = [*MODEL, *ENGINE, *CLI, *LIBRARY, *SCRIPTS]
# what every command shares; the others do not know each other
CLI_SHARED = {"hf_decoder.cli", "hf_decoder.cli.arguments", "hf_decoder.cli.main"}
FLAGS = "hf_decoder.cli.flags"
# huggingface_hub comes with transformers, which cannot be installed without it
MODEL_MAY_USE = {"torch", "transformers", "huggingface_hub"}
# Of the standard library, what touches nothing outside of the process.
MODEL_MAY_USE_OF_STDLIB = {"collections", "dataclasses", "functools", "typing"}
MODEL_LINES = 1200
ENGINE_MAY_USE = {"hf_decoder.engine", "hf_decoder.model"}
HEAVY = {"datasets", "peft", "matplotlib", "trl", "gguf"}


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def each(paths: list[Path]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("path", paths, ids=name_of)


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, ast.AST]]:
    """Absolute names of all modules that a file imports, inside functions as well."""
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            found += [(alias.name, node) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module_of(path).split(".")
                keep = len(parents) - node.level + (path.name == "__init__.py")
                base = ".".join([*parents[:keep], *([node.module] if node.module else [])])
            found.append((base, node))
            # `from package import module` imports the module too
            for alias in node.names:
                candidate = ROOT.joinpath(*base.split("."), alias.name)
                if candidate.with_suffix(".py").is_file() or (candidate / "__init__.py").is_file():
                    found.append((f"{base}.{alias.name}", node))
    return found


def own(path: Path) -> set[str]:
    return {name for name, _ in imports(path) if name.partition(".")[0] == "hf_decoder"}


def test_contributors_are_told_of_the_same_rooms():
    text = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8").partition("`__init__.py`")[0]
    assert re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE) == ROOMS


def test_the_rules_look_at_files_that_are_there():
    assert len(MODEL) >= 3 and len(ENGINE) >= 10 and len(CLI) >= 4 and len(LIBRARY) >= 8 and len(SCRIPTS) >= 3


def test_the_model_can_be_read():
    """Whoever is asked for `trust_remote_code=True` reads all of it, or should."""
    travelling = [path for path in MODEL if path.name != "__init__.py"]
    assert len(travelling) <= 4
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in MODEL) <= MODEL_LINES


@each(MODEL)
def test_the_model_imports_only_what_travels_with_a_checkpoint(path: Path):
    siblings = {file.stem for file in MODEL}
    allowed = MODEL_MAY_USE | MODEL_MAY_USE_OF_STDLIB
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            assert {alias.name.partition(".")[0] for alias in node.names} <= allowed
        elif isinstance(node, ast.ImportFrom) and node.level:
            # transformers copies what it finds by this form alone: not `from . import x`, nor `from .a.b import c`
            assert node.level == 1 and node.module in siblings, ast.unparse(node)
        elif isinstance(node, ast.ImportFrom):
            assert (node.module or "").partition(".")[0] in allowed


@each(MODEL)
def test_no_text_of_the_model_reads_like_an_import(path: Path):
    """transformers looks for imports with a pattern, which finds them inside strings and comments too."""
    source = path.read_text(encoding="utf-8")
    siblings = re.findall(r"^\s*(?:import\s+\.(\S+)\s*$|from\s+\.(\S+)\s+import)", source, flags=re.MULTILINE)
    packages = re.findall(r"^\s*(?:import\s+(\S+)\s*$|from\s+(\S+)\s+import)", source, flags=re.MULTILINE)
    real = {name for name, _ in imports(path)}
    assert {f"hf_decoder.model.{one or other}" for one, other in siblings} <= real
    assert {one or other for one, other in packages if not (one or other).startswith(".")} <= real


@each(MODEL)
def test_the_model_runs_nothing_it_was_not_written_to_run(path: Path):
    """No file, process, environment or hook of imports, and no code of another language in a string."""
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in {"eval", "exec", "compile", "__import__", "open", "torch.load"}, called
        elif isinstance(node, ast.Attribute):
            assert ast.unparse(node) not in {"sys.meta_path", "os.environ"}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            assert "#include" not in node.value and "triton" not in node.value


@each(ENGINE)
def test_the_engine_knows_the_model_and_nothing_above_itself(path: Path):
    assert all(any(name == room or name.startswith(f"{room}.") for room in ENGINE_MAY_USE) for name in own(path))


def test_the_rooms_are_those_of_the_list():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()} == set(ROOMS)
    assert {path.name for path in PACKAGE.glob("*.py")} == BESIDE_THE_ROOMS


@each([path for path in EVERYTHING if path.parent not in (PACKAGE, ROOT / "scripts")])
def test_imports_go_down(path: Path):
    floor = ROOMS.index(path.relative_to(PACKAGE).parts[0])
    rooms = {name.split(".")[1] for name in own(path) if "." in name}
    assert not [room for room in rooms & set(ROOMS) if ROOMS.index(room) < floor]
    assert "scripts" not in {name.partition(".")[0] for name, _ in imports(path)}


@each(CLI)
def test_commands_do_not_know_each_other(path: Path):
    commands = {name for name in own(path) if name.startswith("hf_decoder.cli") and not name.startswith(FLAGS)}
    assert commands <= CLI_SHARED
    if module_of(path) == "hf_decoder.cli":
        assert commands <= {"hf_decoder.cli.arguments"}
    assert "scripts" not in {name.partition(".")[0] for name, _ in imports(path)}


@each(SCRIPTS)
def test_scripts_are_doors(path: Path):
    assert own(path) and all(name.startswith("hf_decoder.cli") for name in own(path))
    assert len(path.read_text(encoding="utf-8").splitlines()) <= 20
    assert path.stem in {file.stem for file in CLI}


@each(SCRIPTS)
def test_no_script_hides_a_module(path: Path):
    """The folder of a script comes first on `sys.path`."""
    assert path.stem not in {"datasets", "tokenize", "evaluate", *sys.stdlib_module_names}


@each([*LIBRARY, *CLI])
def test_heavy_packages_are_imported_where_they_are_needed(path: Path):
    """`import hf_decoder` works without them, and is not slower with them."""
    for node in parse(path).body:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        for inner in [node] if isinstance(node, ast.Import | ast.ImportFrom) else []:
            names = [alias.name for alias in inner.names] if isinstance(inner, ast.Import) else [inner.module or ""]
            assert not {name.partition(".")[0] for name in names} & HEAVY


def test_nothing_imports_in_a_circle():
    graph = {module_of(path): own(path) - {module_of(path)} for path in [*MODEL, *ENGINE, *LIBRARY, *CLI]}

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " -> ".join((*trail, module))
        for name in graph.get(module, ()):
            # a package's __init__ re-exports what its modules define, and those never ask it
            visit(name, (*trail, module))

    for module in graph:
        visit(module, ())


@each(EVERYTHING)
def test_files_stay_small_and_are_named_for_a_subject(path: Path):
    assert path.stem not in {"utils", "helpers", "misc", "common"}
    # the model is one file, to be read from top to bottom
    most = 700 if path in MODEL else 500
    assert len(path.read_text(encoding="utf-8").splitlines()) <= most
