"""What the package needs is declared, and what is built of it holds all that it needs to run and to be tested."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
BASE = PROJECT["project"]["dependencies"]
EXTRAS = PROJECT["project"]["optional-dependencies"]
NEEDED = {canonicalize_name(Requirement(text).name): Requirement(text) for text in BASE}
OPTIONAL = {canonicalize_name(Requirement(text).name) for texts in EXTRAS.values() for text in texts}
# vLLM imports the package, not the other way round; llama.cpp is a peer that benchmark measures where it is there.
GUESTS = {"vllm", "llama-cpp-python"}
NAMES = {"llama_cpp": "llama-cpp-python", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def imported() -> dict[str, set[str]]:
    """The distributions whose modules the package imports, and the files that do."""
    known = packages_distributions()
    found: dict[str, set[str]] = {}
    for path in sorted((ROOT / "hf_decoder").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [str(node.module)]
            for name in {name.partition(".")[0] for name in names} - {"hf_decoder", *sys.stdlib_module_names}:
                if name == "compression":  # of the standard library from Python 3.14 on
                    continue
                distribution = NAMES.get(name) or (known.get(name) or [name])[0]
                found.setdefault(canonicalize_name(distribution), set()).add(path.relative_to(ROOT).as_posix())
    return found


@pytest.mark.process
def test_what_is_imported_is_declared():
    undeclared = {name: files for name, files in imported().items() if name not in {*NEEDED, *OPTIONAL, *GUESTS}}
    assert not undeclared


def test_what_cannot_be_left_out_is_a_dependency_and_no_extra():
    """Imported at the top of a file of the library, outside the rooms that an extra opens."""
    expected = {
        "torch",
        "transformers",
        "huggingface-hub",
        "numpy",
        "pyarrow",
        "pyyaml",
        "tqdm",
        "fsspec",
        "safetensors",
    }
    assert expected <= NEEDED.keys()
    assert "jinja2" in NEEDED  # huggingface_hub fills cards with it, and does not ask for it


@pytest.mark.parametrize(
    "name, unsafe",
    [
        ("jinja2", "3.1.5"),  # ways out of the sandbox in which chat templates run
        ("pyarrow", "14.0.0"),  # code from a file of data
        ("tqdm", "4.66.2"),
        ("pyyaml", "5.3"),
        ("transformers", "5.2.9"),  # code from a config without trust_remote_code
        ("torch", "2.5.1"),  # code from weights in spite of weights_only
    ],
)
def test_versions_with_known_holes_are_not_accepted(name, unsafe):
    assert not NEEDED[name].specifier.contains(unsafe)


def test_the_template_of_the_package_is_the_one_at_the_root():
    assert (ROOT / "model_card.md").read_bytes() == (ROOT / "hf_decoder/reporting/model_card.md").read_bytes()


def test_what_is_built_holds_the_template_and_the_tests(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    listed = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist", "runs")
    shutil.copytree(ROOT, source, ignore=listed)
    code = f"from setuptools import build_meta as b; b.build_sdist({str(out)!r}); b.build_wheel({str(out)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=source, check=True, capture_output=True)
    with tarfile.open(next(out.glob("*.tar.gz"))) as archive:
        packed = {name.partition("/")[2] for name in archive.getnames()}
    files = {path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()}
    wanted = {name for name in files if re.match(r"(tests|scripts|hf_decoder)/|[^/]+\.(md|toml)$|LICENSE", name)}
    assert not {name for name in wanted - packed if "egg-info" not in name}
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        names = set(wheel.namelist())
    own = {name for name in files if name.startswith("hf_decoder/") and ".egg-info" not in name}
    assert not own - names
    assert not {name for name in names if name.startswith(("tests", "scripts")) or ".data/" in name}
