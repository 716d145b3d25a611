"""What SECURITY.md promises of the code and the scripts; of commands it is in tests/cli/test_hostile.py."""

import os
import re
import subprocess
from pathlib import Path

import pytest
import tomllib
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
SOURCES = sorted(path for folder in ("hf_mbp", "scripts") for path in (ROOT / folder).rglob("*.py"))
LOCK = ROOT / "scripts" / "quickstart-lock.txt"

HARMLESS = {"S101", "S106", "S311"}
"""Assertions, a padding token that is taken for a password, and random numbers that are no secrets."""

EXCEPTIONS = {
    ("hf_mbp/cli/bench.py", "S603"),
    ("hf_mbp/collate.py", "S301"),
    ("scripts/long_run.py", "S603"),
    ("scripts/long_run.py", "S606"),
    ("scripts/soak.py", "S606"),
    ("scripts/upstream_tests.py", "S603"),
    ("scripts/versions.py", "S603"),
}
"""Where the security rules of ruff are set aside: programs that are started without a shell, rows of a worker."""

UNKNOWN_TO_RULES = r"weights_only\W+False|allow_pickle|joblib|dill|os\.system\(|trust_remote_code\W+True"


def test_exceptions_to_the_rules_are_known() -> None:
    found = {}
    for path in SOURCES:
        for line in path.read_text().splitlines():
            for code in re.findall(r"\bS\d{3}\b", line.partition("# noqa")[2]):
                found[path.relative_to(ROOT).as_posix(), code] = line
    found = {key: line for key, line in found.items() if key[1] not in HARMLESS}
    assert found.keys() == EXCEPTIONS
    assert [line for line in found.values() if not re.search(r"# noqa: S\d{3} - \w+", line)] == [], "each has a reason"
    rules = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in rules["select"]
    assert "hf_mbp" not in " ".join(rules["per-file-ignores"])


def test_what_the_rules_do_not_know_is_not_there() -> None:
    assert re.search(UNKNOWN_TO_RULES, 'trust_remote_code=True, "trust_remote_code": True')
    hits = [(path.name, hit) for path in SOURCES for hit in re.findall(UNKNOWN_TO_RULES, path.read_text())]
    assert hits == []


def test_every_promise_names_tests_or_commands_that_are_there() -> None:
    rows = re.findall(r"^\| (.+) \| (.+) \|$", (ROOT / "SECURITY.md").read_text(), flags=re.MULTILINE)[2:]
    assert len(rows) > 10
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for promise, keepers in rows:
        names = re.findall(r"`(\w+)`", keepers)
        assert names, promise
        assert [name for name in names if f"def {name}(" not in tests] == []


# What scripts/quickstart.sh installs


@pytest.fixture
def installed(tmp_path: Path) -> list[str]:
    """The words after each `pip install` of the script, which gets a Python that only takes them down."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/usr/bin/env bash\necho "$*" >>"$(dirname "$0")/calls"\n')
    python.chmod(0o700)
    environment = {**os.environ, "HF_MBP_VENV": str(tmp_path / "venv")}
    subprocess.run(["bash", str(ROOT / "scripts" / "quickstart.sh")], env=environment, check=True)  # noqa: S603, S607
    calls = (python.parent / "calls").read_text().splitlines()
    assert calls[-1].startswith("scripts/finetune.py recipes/text_classification/spam.yaml")
    return [call.partition("pip install --quiet --disable-pip-version-check ")[2] for call in calls[:-1]]


def test_the_quickstart_installs_what_is_pinned(installed: list[str]) -> None:
    hashed, torch, project = installed
    assert hashed.startswith("--no-deps --only-binary :all: --require-hashes --requirement")
    assert re.fullmatch(r"torch==\d+\.\d+\.\d+", torch)
    assert project == "--no-deps --no-build-isolation --editable ."
    files = re.findall(r"--requirement (\S+)", hashed)
    assert files == ["scripts/quickstart-lock.txt", "scripts/quickstart-models.txt"]
    for file in files:
        for requirement in requirements(ROOT / file):
            assert re.fullmatch(r"[\w.-]+==[\w.]+( ; [^\\]+)?( --hash=sha256:[0-9a-f]{64})+", requirement), requirement


def test_the_lock_has_all_that_the_project_needs() -> None:
    locked: dict[str, list[Requirement]] = {}
    for text in requirements(LOCK):
        requirement = Requirement(text.partition(" --hash")[0])
        locked.setdefault(requirement.name, []).append(requirement)
    table = tomllib.loads((ROOT / "pyproject.toml").read_text())
    project = table["project"]
    needed = project["dependencies"] + project["optional-dependencies"]["recipes"] + table["build-system"]["requires"]
    for requirement in map(Requirement, needed):
        if requirement.name != "torch":
            name = requirement.name.lower().replace("_", "-")
            for python in ("3.10", "3.11", "3.12", "3.13"):
                environment = {"python_version": python, "python_full_version": f"{python}.1"}
                (version,) = [
                    pinned.specifier
                    for pinned in locked[name]
                    if pinned.marker is None or pinned.marker.evaluate(environment)
                ]
                assert requirement.specifier.contains(str(version).removeprefix("==")), (name, python)


def requirements(file: Path) -> list[str]:
    """One a line, with their hashes, without comments."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE)
    return [" ".join(line.split()) for line in text.replace("\\\n", " ").splitlines() if line.strip()]
