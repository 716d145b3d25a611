"""What is distributed: all modules and the marker of types, no tests, a console command; and what it needs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import hf_mbp
import versions

ROOT = Path(__file__).parents[1]
MODULES = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "hf_mbp").rglob("*.py"))
OPTIONAL = ("matplotlib", "yaml", "gguf", "trl", "sentence_transformers", "peft", "optuna", "tensorboard", "deepspeed")

BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy, because building leaves folders behind."""
    folder = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md", "CITATION.cff"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("CONTRIBUTING.md", "SECURITY.md"):
        shutil.copy(ROOT / name, folder / name)
    for name in ("hf_mbp", "tests", "scripts", "recipes", "docs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def build(checkout: Path, what: str) -> Path:
    dist = checkout / "dist"
    dist.mkdir(exist_ok=True)
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", BUILD, what, str(dist)], cwd=checkout, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return dist / done.stdout.splitlines()[-1]


def test_the_wheel_has_all_modules_and_nothing_else(checkout: Path) -> None:
    with zipfile.ZipFile(build(checkout, "build_wheel")) as wheel:
        names = wheel.namelist()
        information = f"hf_mbp-{hf_mbp.__version__}.dist-info"
        entry_points = wheel.read(f"{information}/entry_points.txt").decode()
        metadata = wheel.read(f"{information}/METADATA").decode()
    assert sorted(name for name in names if name.endswith(".py")) == MODULES
    assert "hf_mbp/py.typed" in names
    assert {name.split("/")[0] for name in names} == {"hf_mbp", information}
    assert "hf-mbp = hf_mbp.cli.main:main" in entry_points
    assert "License-Expression: Apache-2.0" in metadata


def test_the_source_distribution_can_be_tested(checkout: Path) -> None:
    with tarfile.open(build(checkout, "build_sdist")) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert set(MODULES) <= names
    expected = [path for folder in ("tests", "scripts", "recipes", "docs") for path in (ROOT / folder).rglob("*.*")]
    assert {path.relative_to(ROOT).as_posix() for path in expected if "__pycache__" not in path.parts} <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md", "CITATION.cff"} <= names
    assert not [name for name in names if "__pycache__" in name]


def test_extras_are_not_needed() -> None:
    """What is optional cannot be imported by us; by others it may be, for huggingface_hub brings yaml anyway."""
    code = f"""
import builtins
from importlib import import_module
stock = builtins.__import__
def guarded(name, globals=None, *args, **kwargs):
    ours = str((globals or {{}}).get("__name__")).split(".")[0] == "hf_mbp"
    if ours and name.split(".")[0] in {OPTIONAL}:
        raise ImportError(f"{{name}} is not installed")
    return stock(name, globals, *args, **kwargs)
builtins.__import__ = guarded
for module in {[name.removesuffix(".py").replace("/", ".") for name in MODULES if "/cli/" not in name]}:
    import_module(module.removesuffix(".__init__"))
import hf_mbp
print(len([getattr(hf_mbp, name) for name in hf_mbp.__all__]))
try:
    import_module("hf_mbp.cli.recipe")
except ImportError as error:
    print(error)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-2:] == [str(len(hf_mbp.__all__)), "yaml is not installed"], "the guard guards"


def test_all_that_is_imported_is_declared() -> None:
    project = (ROOT / "pyproject.toml").read_text().split("dev = [")[0]
    declared = {name.lower() for name in re.findall(r'^\s*(?:recipes = \[)?"([\w-]+)', project, flags=re.MULTILINE)}
    declared |= {name.lower() for name in re.findall(r'"([\w-]+)[>=]', project)} | {"yaml", "sklearn", "hf_mbp"}
    assert {"torch", "numpy", "matplotlib", "pyyaml"} <= declared
    imported = set()
    for module in MODULES:
        for node in ast.walk(ast.parse((ROOT / module).read_text())):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add(str(node.module).split(".")[0])
    assert imported - set(sys.stdlib_module_names) - declared == set()


def test_versions_agree() -> None:
    project = (ROOT / "pyproject.toml").read_text()
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert f'version = "{hf_mbp.__version__}"' in project
    assert citation["version"] == hf_mbp.__version__
    assert citation["authors"] == [{"name": "The hf_mbp authors"}]


def test_the_lowest_versions_are_those_of_the_project() -> None:
    _, install, *_, tests = versions.commands("lowest", ["-x"])
    floors = {"torch==2.11", "transformers==5.17", "accelerate==1.15", "datasets==5.2", "evaluate==0.4.6"}
    assert floors <= set(install)
    assert {"trl==1.16", "peft==0.21", "PyYAML==6.0.1"} <= set(install)
    assert tests[-1] == "-x"
    _, newest, *_ = versions.commands("newest", [])
    assert "torch>=2.11" in newest
    assert all((ROOT / name).exists() for name in versions.CORE)
