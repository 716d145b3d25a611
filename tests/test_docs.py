"""Links of the documentation lead somewhere, the tests it names exist, and its code runs."""

import ast
import re
from dataclasses import fields
from functools import partial
from pathlib import Path

import pytest
from accelerate import Accelerator
from transformers import BertForSequenceClassification, BertModel, TrainingArguments

from hf_mbp import MBPConfig, MBPTrainer
from hf_mbp.cli.arguments import DataArguments
from hf_mbp.cli.tasks import TASKS
from hf_mbp.distributed import Ranks
from hf_mbp.report import StepReport
from tests.contrastive import pair_rows
from tests.documents import DOCS, PAGES, ROOT, blocks, name_of
from tests.helpers import Pad, bert_config, build, token_rows, tokenizer, with_labels

QUIET = {"use_cpu": True, "max_steps": 1, "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
TESTS = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)", page.read_text())
    local = [target for target in targets if "://" not in target]
    assert all((page.parent / target).is_file() for target in local)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
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


def test_the_options_are_those_there_are() -> None:
    page = (DOCS / "options.md").read_text()
    listed = re.findall(r"^\| `(\w+)` \| `(.+?)` \|", page, flags=re.MULTILINE)
    assert {name: ast.literal_eval(default) for name, default in listed} == vars(MBPConfig())


def test_the_tasks_are_those_there_are() -> None:
    page = (ROOT / "recipes" / "README.md").read_text().partition("## Tasks")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| `(\w+)` \| (.+?) \|", page, flags=re.MULTILINE)
    assert sorted(task for task, _ in rows) == sorted(TASKS)
    columns = {option for _, options in rows for option in re.findall(r"`(\w+_column)`", options)}
    assert columns == {field.name for field in fields(DataArguments) if field.name.endswith("_column")}


def test_what_is_logged_is_listed() -> None:
    page = (DOCS / "options.md").read_text()
    listed = dict(re.findall(r"^\| `(mbp_\w+)`( \*)? \|", page, flags=re.MULTILINE))
    ranks, report = Ranks(Accelerator(cpu=True)), StepReport()
    logged, totals = report.flush(ranks, 0), report.totals(ranks)
    assert set(listed) == {*logged, *totals, "mbp_calibration_error"}
    assert {name for name, star in listed.items() if star} == set(logged) & set(totals)


def test_the_loop_runs(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = [block for block in blocks(DOCS / "other_trainers.md", "python") if "run_mini_batch" in block]
    rows = with_labels(token_rows(), lambda index, row: index % 2)
    model = build(BertForSequenceClassification, bert_config())
    names = {"rows": rows, "model": model, "tokenizer": tokenizer()}
    exec(program, names)  # noqa: S102
    assert "micro-batches" in capsys.readouterr().out
    assert any(bool((parameter.grad != 0).any()) for parameter in model.parameters() if parameter.grad is not None)


def test_the_contrastive_example_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = blocks(DOCS / "contrastive.md", "python")
    monkeypatch.chdir(tmp_path)
    model = build(BertModel, bert_config())
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    names = {
        **{"model": model, "pairs": pair_rows(), "pad_pairs": Pad()},
        "TrainingArguments": partial(TrainingArguments, **QUIET),
    }
    exec(program, names)  # noqa: S102
    assert any(not before[name].equal(parameter) for name, parameter in model.named_parameters())


def test_the_example_of_evaluation_evaluates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = blocks(DOCS / "evaluation.md", "python")
    monkeypatch.chdir(tmp_path)
    seen: list[tuple[int, ...]] = []
    names = {
        "model": build(BertForSequenceClassification, bert_config()),
        "MBPTrainer": partial(MBPTrainer, data_collator=Pad()),
        "rows": with_labels(token_rows(), lambda index, row: index % 2),
        "compute_metrics": lambda prediction: seen.append(prediction.predictions.shape) or {},
        "TrainingArguments": partial(TrainingArguments, **QUIET),
    }
    exec(program, names)  # noqa: S102
    assert seen == [(16,)]  # one class a row, not its logits


def test_the_example_of_the_front_page_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (program,) = blocks(DOCS / "index.md", "python")
    rows = with_labels(token_rows(), lambda index, row: index % 2)
    names = {
        **{"model": build(BertForSequenceClassification, bert_config()), "rows": rows, "tokenizer": tokenizer()},
        "args": TrainingArguments(str(tmp_path), **QUIET),
    }
    exec(program, names)  # noqa: S102
    assert names["trainer"].state.global_step == 1


def test_the_example_of_estimates_prints_them(capsys: pytest.CaptureFixture[str]) -> None:
    (program,) = blocks(DOCS / "memory.md", "python")
    assert 'for_model("bert")' in program
    exec(program.replace('"bert"', '"bert", num_hidden_layers=1, hidden_size=48'), {})  # noqa: S102
    assert "activations" in (told := capsys.readouterr().out)
    assert told.rstrip().endswith(" tokens")


@pytest.mark.parametrize(
    ("page", "trainer"),
    [
        ("other_trainers.md", "MBPSFTTrainer"),
        ("other_trainers.md", "MBPSentenceTransformerTrainer"),
        ("migrating.md", "MBPDPOTrainer"),
    ],
)
def test_the_mixin_goes_before_the_trainer(page: str, trainer: str) -> None:
    (program,) = [block for block in blocks(DOCS / page, "python") if f"class {trainer}" in block]
    names: dict[str, type] = {}
    exec(program, names)  # noqa: S102
    assert names[trainer].__mro__[1].__name__ == "MBPMixin"
