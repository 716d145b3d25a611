"""Imports inside the package go down one list, and what each layer must not know it does not import."""

import ast
import re
from pathlib import Path

import pytest

import hf_mbp

PACKAGE = Path(hf_mbp.__file__).parent

GROUPS = {
    "What you use": "cli __init__ trainer loop runner",
    "Evaluation": "evaluation eval_budget eval_trial row_outputs eval_batch",
    "From rows to micro-batches": "feed look_ahead pools row_reader report",
    "When memory runs out": "too_large recovery lockstep first_step",
    "Budget and cost of a run": "run_cost run_budget rehearsal control profile",
    "Checkpoints, and ranks that fail": "checkpoints kept watch",
    "Is it exact?": "start_check layout_choice equivalence findings comparison",
    "A mini-batch": "two_passes call_metrics prefetch step",
    "What a model needs": "sizing estimate fake",
    "Trying the model on the side": "probe training_mode full_precision undisturbed stand_ins random_numbers",
    "The data loader": "loaders row_lengths balance",
    "Options, and what surrounds this library": "refusals config other_trainers compat wrapped",
    "Memory and time of a device": "gauge stopwatch memory device_memory optimizer_memory fit out_of_memory",
    "Rows": "filler items padding_free precollated padding collate",
    "Planning": "calibration plan cuts moves orders arrays",
    "Shared by all": "accumulation distributed loss_value json_fields byte_sizes",
}
"""From the top down. A module imports only modules further down; `cli` is a package, and imports within it are its own
business."""

LAYERS = " ".join(GROUPS.values()).split()

KNOWS_UPSTREAM = {"cli", "trainer", "estimate", "loaders", "refusals", "compat", "wrapped"}
"""`compat` and `wrapped` know private names of transformers, Accelerate and torch, the others public ones."""


def layer_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


FILES = sorted(PACKAGE.rglob("*.py"))


def imports_of(file: Path) -> list[str]:
    """Modules that a file imports, anywhere in it; those of `from package import module` as `package.module`, too."""
    modules = []
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports are absolute"
            modules += [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
    return modules


def layers_imported_by(file: Path) -> set[str]:
    """Layers of this package that a file imports from."""
    parts = [module.split(".") for module in imports_of(file)]
    inner = {part[1] for part in parts if part[0] == "hf_mbp" and len(part) > 1}
    names = {part[1] for part in parts if part[0] == "hf_mbp" and len(part) == 2 and part[1] not in LAYERS}
    return (inner & set(LAYERS)) | ({"__init__"} if names else set())


def top_packages(file: Path) -> set[str]:
    return {module.split(".")[0] for module in imports_of(file)}


def files_of(layer: str) -> list[Path]:
    return [file for file in FILES if layer_of(file) == layer]


def test_every_module_has_its_place_in_the_list() -> None:
    assert sorted({layer_of(file) for file in FILES}) == sorted(LAYERS)


def test_documentation_has_the_same_lists() -> None:
    page = (PACKAGE.parent / "docs" / "how_it_works.md").read_text().split("## The modules")[1]
    texts = dict(re.findall(r"^\*\*(.+?)\*\*\n(.*?)(?=^\*\*|\Z)", page, flags=re.MULTILINE | re.DOTALL))
    documented = {
        group: re.findall(r"^\| `(\w+)(?:/|\.py)` \|", text, flags=re.MULTILINE) for group, text in texts.items()
    }
    assert list(documented) == list(GROUPS)
    for group, layers in GROUPS.items():
        assert documented[group] == [layer for layer in layers.split() if layer != "__init__"]


@pytest.mark.parametrize("layer", LAYERS)
def test_imports_only_go_down(layer: str) -> None:
    below = set(LAYERS[LAYERS.index(layer) + 1 :]) | ({"cli"} if layer == "cli" else set())
    for file in files_of(layer):
        assert layers_imported_by(file) <= below, f"{file.name} imports upwards"


def test_the_parser_sees_the_imports_there_are() -> None:
    (feed,) = files_of("feed")
    assert {"collate", "compat", "plan", "sizing", "step"} <= layers_imported_by(feed)
    assert {"tqdm", "hf_mbp"} <= top_packages(feed)


@pytest.mark.parametrize(
    ("layer", "must_not_import"),
    [
        ("plan", {"torch", "transformers", "accelerate", "datasets"}),
        ("calibration", {"torch", "transformers", "accelerate", "datasets"}),
        ("cuts", {"torch", "transformers", "accelerate", "datasets"}),
        ("moves", {"torch", "transformers", "accelerate", "datasets"}),
        ("orders", {"torch", "transformers", "accelerate", "datasets"}),
        ("byte_sizes", {"torch", "transformers", "accelerate", "datasets"}),
        ("step", {"transformers", "accelerate", "datasets"}),
        ("distributed", {"transformers", "datasets"}),
    ],
)
def test_what_a_layer_does_not_know(layer: str, must_not_import: set[str]) -> None:
    (file,) = files_of(layer)
    assert not top_packages(file) & must_not_import


def test_planning_and_the_algorithm_reach_no_trainer_through_others() -> None:
    def reached(layer: str) -> set[str]:
        below = set().union(*(layers_imported_by(file) for file in files_of(layer)))
        return below.union(*(reached(other) for other in below)) if below else below

    assert reached("plan") == {"cuts", "moves", "orders", "arrays"}
    assert "compat" not in reached("step")
    assert not reached("step") & KNOWS_UPSTREAM


@pytest.mark.parametrize("package", ["transformers", "accelerate"])
def test_few_modules_know_upstream(package: str) -> None:
    knowing = {layer_of(file) for file in FILES if package in top_packages(file)}
    assert knowing <= KNOWS_UPSTREAM
    assert "compat" in knowing


@pytest.mark.parametrize("layer", sorted(KNOWS_UPSTREAM - {"compat", "wrapped"}))
def test_only_compat_imports_private_names_of_upstream(layer: str) -> None:
    for file in files_of(layer):
        upstream = [name for name in imports_of(file) if name.split(".")[0] in ("transformers", "accelerate")]
        assert not [name for name in upstream if "._" in name]


def test_the_command_line_is_imported_by_nothing_else() -> None:
    importers = {layer_of(file) for file in FILES if "cli" in layers_imported_by(file)}
    assert importers <= {"cli"}


def test_every_module_says_what_it_is() -> None:
    assert [file.name for file in FILES if not ast.get_docstring(ast.parse(file.read_text()))] == []
