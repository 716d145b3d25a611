"""Links of the documentation lead somewhere, the tests it names exist, and its code runs."""

import re
from functools import partial
from pathlib import Path

import pytest
from transformers import BertForSequenceClassification, BertModel, TrainingArguments

from tests.contrastive import pair_rows
from tests.helpers import Pad, bert_config, build, token_rows, tokenizer, with_labels

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "recipes").rglob("README.md"))]
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert all((page.parent / target).is_file() for target in local)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_tests_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    functions = re.findall(r"`(test_\w+)`", text)
    assert [name for name in functions if f"def {name}(" not in TESTS] == []
    files = re.findall(r"`((?:tests|scripts|recipes|docs)/[\w/.]+)`", text)
    assert [name for name in files if not (ROOT / name).exists()] == []


def test_the_tables_name_tests() -> None:
    for page, least in (("trainer_contract.md", 29), ("models.md", 10)):
        rows = [line for line in (ROOT / "docs" / page).read_text().splitlines() if line.startswith("| ")]
        assert sum("`test_" in row for row in rows) >= least


def test_the_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "other_trainers.md").read_text()
    (program,) = re.findall(r"```python\n(from accelerate.*?)```", page, flags=re.DOTALL)
    rows = with_labels(token_rows(), lambda index, row: index % 2)
    model = build(BertForSequenceClassification, bert_config())
    names = {"rows": rows, "model": model, "tokenizer": tokenizer()}
    exec(program, names)  # noqa: S102
    assert "micro-batches" in capsys.readouterr().out
    assert any(bool((parameter.grad != 0).any()) for parameter in model.parameters() if parameter.grad is not None)


def test_the_contrastive_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (ROOT / "docs" / "contrastive.md").read_text()
    (program,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    quiet = {"use_cpu": True, "max_steps": 1, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    model = build(BertModel, bert_config())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {
        **{"model": model, "pairs": pair_rows(), "pad_pairs": Pad()},
        "TrainingArguments": partial(TrainingArguments, **quiet),
    }
    exec(program, names)  # noqa: S102
    assert any(not before[name].equal(parameter) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("trainer", ["MBPSFTTrainer", "MBPSentenceTransformerTrainer"])
def test_the_mixin_goes_before_the_trainer(trainer: str) -> None:
    page = (ROOT / "docs" / "other_trainers.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    (program,) = [block for block in blocks if f"class {trainer}" in block]
    names: dict[str, type] = {}
    exec(program, names)  # noqa: S102
    assert names[trainer].__mro__[1].__name__ == "MBPMixin"
