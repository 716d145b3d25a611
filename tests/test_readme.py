"""The code of the README runs, and the commands it names are there."""

import json
import re
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
from transformers import BertForSequenceClassification

import readme_figures
from hf_mbp import MBPMixin
from marked_table import table_in
from tests.helpers import bert_config, tokenizer

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.fixture
def tiny_model(tmp_path: Path) -> Path:
    """A folder with a model and a tokenizer, in the place of the one that would be downloaded."""
    folder = tmp_path / "model"
    BertForSequenceClassification(bert_config(num_labels=2, max_position_embeddings=512)).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true:UserWarning")
def test_python_code(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: object) -> None:
    """All blocks in order, as one program; only the model's name and the output folders are replaced."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    program = "\n".join(blocks("python"))
    assert '"sentence-transformers/all-MiniLM-L6-v2"' in program
    program = program.replace('"sentence-transformers/all-MiniLM-L6-v2"', repr(str(tiny_model)))
    program = re.sub(r'TrainingArguments\("', f'TrainingArguments("{tmp_path}/', program)
    program = program.replace('split="train[:256]"', 'split="train[:32]"')
    script = tmp_path / "program.py"
    script.write_text(program)
    names = runpy.run_path(str(script))
    assert names["trainer"].state.global_step == 1
    assert "exact                     yes" in capsys.readouterr().out
    assert names["config"].memory_limit == "20GiB"
    assert issubclass(names["MBPSFTTrainer"], MBPMixin)


def test_commands_name_files_that_exist() -> None:
    commands = [shlex.split(line, comments=True) for block in blocks("bash") for line in block.splitlines() if line]
    files = [word for words in commands for word in words if "/" in word]
    assert "scripts/quickstart.sh" in files
    assert "scripts/test.sh" in files
    assert all((ROOT / name).is_file() for name in files)


def test_the_figures_are_those_of_the_benchmark(tmp_path: Path) -> None:
    summary = json.loads(readme_figures.RESULTS.read_text())["summary"]
    assert table_in(readme_figures.README, "figures") == readme_figures.table(summary)
    readme_figures.draw_panels(summary, tmp_path / "problem.png")
    assert (tmp_path / "problem.png").stat().st_size > 10_000
    assert "](docs/problem.png)" in README


def test_the_picture_shows_the_same_rows_thrice() -> None:
    lengths = np.array([20, 7, 300, *[9] * 61])
    once, accumulated, planned = (panel.groups for panel in readme_figures.panels(lengths))
    assert [sorted(row for group in way for row in group) for way in (once, accumulated, planned)] == [[*range(64)]] * 3
    assert list(map(len, accumulated)) == [8] * 8
    assert planned[0] == [2]
