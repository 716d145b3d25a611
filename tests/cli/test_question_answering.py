"""Answers in texts: windows and what is marked in them, and answers read off logits as a plain search finds them."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForQuestionAnswering, AutoTokenizer, EvalPrediction

from hf_mbp.cli import check, finetune
from hf_mbp.cli.answers import answer_f1, exact_match
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.run_plan import plan_run
from hf_mbp.cli.tasks.base import TaskSetup
from hf_mbp.cli.tasks.question_answering import AnswerMetrics, best_span, find_answer, start_and_end_logits
from tests.cli import test_tasks

TASK = "question_answering"


def prepare(model: Path, *rows: Any, doc_stride: int = 4, **options: Any) -> TaskSetup:
    return test_tasks.prepare(TASK, model, *rows, doc_stride=doc_stride, **options)


LONG = "a b c d e f g h i j k l m n o p q r s t"


def asked(context: str, answer: str, question: str = "x ?", *, start: int | None = None) -> dict[str, Any]:
    place = context.index(answer) if start is None else start
    return {"question": question, "context": context, "answers": {"text": [answer], "answer_start": [place]}}


def said(tokenizer: Any, row: dict[str, Any]) -> str:
    """What a row's labels point at."""
    return str(tokenizer.decode(row["input_ids"][row["start_positions"] : row["end_positions"] + 1]))


class TestWindows:
    def test_they_cover_the_context_and_overlap(self, encoder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        setup = prepare(encoder, [asked(LONG, "i j")], max_length=15)
        windows = [ids[4:-1] for ids in setup.train["input_ids"]]  # behind [CLS] x ? [SEP], before [SEP]
        assert windows == [list(range(6, 16)), list(range(12, 22)), list(range(18, 26))]
        assert all(ids[:4] == [2, 29, 38, 3] and ids[-1] == 3 for ids in setup.train["input_ids"])
        assert "train: the 3 rows are windows on the contexts of 1 questions" in capsys.readouterr().out
        assert set(setup.train.column_names) >= {"input_ids", "start_positions", "end_positions"}
        assert not [name for name in setup.train.column_names if name.startswith("hf_mbp")]

    @pytest.mark.parametrize(
        ("answer", "marked"),
        [
            ("b", [True, False, False]),
            ("h i j", [True, True, False]),
            ("j k", [False, True, False]),
            (LONG, [False] * 3),
        ],
    )
    def test_an_answer_is_marked_where_all_of_it_is(self, encoder: Path, answer: str, marked: list[bool]) -> None:
        """Where it is not, the first token is marked, [CLS]."""
        tokenizer = AutoTokenizer.from_pretrained(encoder)
        setup = prepare(encoder, [asked(LONG, answer)], max_length=15)
        assert [said(tokenizer, row) for row in setup.train] == [answer if is_there else "[CLS]" for is_there in marked]

    def test_of_several_places_the_one_that_is_said(self, encoder: Path) -> None:
        setup = prepare(encoder, [asked("a b a b a", "b", start=6), asked("a b a", "b", start=0)])
        assert setup.train["start_positions"][:] == [7, 5]  # the second was off by two characters

    def test_other_columns_and_blanks_around_a_question(self, encoder: Path) -> None:
        row = {"q": "  x", "c": "a b", "right": {"text": ["b", "a b"], "answer_start": [2, 0]}}
        setup = prepare(encoder, [row], question_column="q", context_column="c", answers_column="right")
        assert setup.train["input_ids"][0] == [2, 29, 3, 6, 7, 3]
        assert (setup.train["start_positions"][0], setup.train["end_positions"][0]) == (4, 4)

    def test_padding_is_on_the_right(self, encoder: Path, tmp_path: Path) -> None:
        tokenizer = AutoTokenizer.from_pretrained(encoder, padding_side="left")
        prepare(encoder, [asked("a", "a")]).model.save_pretrained(tmp_path / "left")
        tokenizer.save_pretrained(tmp_path / "left")
        setup = prepare(tmp_path / "left", [asked("a", "a"), asked("a b", "b")])
        batch = setup.collator([setup.train[0], setup.train[1]])
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 1, 0], [1] * 7]
        assert batch["start_positions"].tolist() == [4, 5]


def test_a_new_head_is_told_of(encoder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    told = "the model has no head that tells where an answer is; a new one is trained"
    prepare(encoder, [asked("a", "a")]).model.save_pretrained(tmp_path / "trained")
    AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "trained")
    assert told in capsys.readouterr().out
    prepare(tmp_path / "trained", [asked("a", "a")])
    prepare(encoder, [asked("a", "a")], random_weights=True)
    assert told not in capsys.readouterr().out


class TestMistakes:
    @pytest.mark.parametrize(
        ("answers", "message"),
        [
            ({"text": [], "answer_start": []}, "row 0 has no answer; leave out questions without one"),
            ({"text": [""], "answer_start": [0]}, "row 0 has no answer"),
            ({"text": ["z"], "answer_start": [0]}, "row 0: the answer 'z' is not in the context"),
            ({"text": ["a"], "answer_start": []}, r"row 0 is {.*}, but must be {text: \[...\], answer_start: \[...\]}"),
            ({"text": ["a"]}, "texts, and as many numbers"),
            ({"text": ["a"], "answer_start": [None]}, "texts, and as many numbers"),
            ({"text": ["a"], "answer_start": ["0"]}, "texts, and as many numbers"),
            ({"text": [7], "answer_start": [0]}, "texts, and as many numbers"),
            ("a", "row 0 is 'a', but must be"),
        ],
    )
    def test_answers(self, encoder: Path, answers: Any, message: str) -> None:
        rows = Dataset.from_list([{"question": "x", "context": "a", "answers": answers}])
        with pytest.raises(UserError, match=message) as caught:
            prepare(encoder, rows)
        assert str(caught.value).startswith("train.x, column 'answers': row 0")

    def test_the_row_is_counted_from_the_first(self, encoder: Path) -> None:
        rows = [*[asked("a", "a")] * 1500, asked("a", "b", start=0)]
        with pytest.raises(UserError, match=r"test.x, column 'answers': row 1500: the answer 'b' is not"):
            prepare(encoder, rows[:1], rows)

    def test_no_room_for_the_context(self, encoder: Path) -> None:
        with pytest.raises(UserError, match=r"a question of 8 tokens leaves 4 of 15 \(max_length\) .*doc_stride is 4;"):
            prepare(encoder, [asked(LONG, "a", "x " * 8)], max_length=15)

    def test_columns(self, encoder: Path) -> None:
        with pytest.raises(UserError, match=r"has no column 'text' \(option context_column\)"):
            prepare(encoder, [asked("a", "a")], context_column="text")

    @pytest.mark.parametrize("name", ["doc_stride", "max_answer_length"])
    def test_numbers(self, encoder: Path, name: str) -> None:
        with pytest.raises(ValueError, match=f"{name} is 0; write a whole number from 1"):
            prepare(encoder, [asked("a", "a")], **{name: 0})


def test_the_nearest_place_of_an_answer() -> None:
    assert find_answer({"text": ["ab"], "answer_start": [5]}, "ab abab ab", "row 0") == (5, 7)
    assert find_answer({"text": ["aa"], "answer_start": [1]}, "aaaa", "row 0") == (1, 3)


def plain_best(start: Any, end: Any, max_length: int) -> tuple[float, int, int]:
    spans = [
        (float(start[i]) + float(end[j]), i, j)
        for i in range(len(start))
        for j in range(i, min(i + max_length, len(end)))
    ]
    return max(spans, key=lambda span: span[0])


@pytest.mark.parametrize("seed", range(10))
def test_the_best_span_is_that_of_all(seed: int) -> None:
    generator = np.random.default_rng(seed)
    start, end = generator.normal(size=(2, generator.integers(1, 12))).astype(np.float32)
    for max_length in (1, 3, 50):
        assert best_span(start, end, max_length) == plain_best(start, end, max_length)


class TestMetrics:
    def test_the_window_that_is_surest_answers_and_only_from_the_context(self) -> None:
        metrics = AnswerMetrics(
            rows=(1, 0, 1),
            starts=((-1, 0, 2), (-1, 0, 2), (-1, 2, 4)),
            ends=((-1, 1, 3), (-1, 1, 3), (-1, 3, 5)),
            contexts=("x y", "a b c"),
            references=(("no",), ("b c", "c")),
            max_answer_length=2,
        )
        start = np.array([[9, 1, 0], [9, 0, 2], [9, 2, 0]], dtype=np.float32)  # [CLS] is no answer
        end = np.array([[9, 1, 0], [9, 4, 1], [9, 0, 1]], dtype=np.float32)
        assert metrics.answers(start, end) == ["x", "b c"]
        last_first = replace(metrics, rows=metrics.rows[::-1], starts=metrics.starts[::-1], ends=metrics.ends[::-1])
        assert last_first.answers(start[::-1], end[::-1]) == ["x", "b c"]
        labels = (np.array([0, 1, 2]), np.array([0, 1, 2]))
        result = metrics(EvalPrediction(predictions=(start, end), label_ids=labels))
        losses = [
            torch.nn.functional.cross_entropy(torch.tensor(logits), torch.tensor(targets)).item()
            for logits, targets in zip((start, end), labels, strict=True)
        ]
        assert result == pytest.approx({"exact_match": 0.5, "f1": 0.5, "mean_loss": sum(losses) / 2})

    def test_padding_is_not_in_the_loss(self) -> None:
        metrics = AnswerMetrics(
            rows=(0,), starts=((-1, 0),), ends=((-1, 1),), contexts=("a",), references=(("a",),), max_answer_length=2
        )
        logits = np.array([[1.0, 0.0, 5.0, -100.0]])
        result = metrics(EvalPrediction(predictions=(logits, logits), label_ids=(np.array([0]), np.array([0]))))
        assert result["mean_loss"] == pytest.approx(np.log(1 + np.exp(-1)))

    def test_hidden_states_are_dropped(self) -> None:
        assert start_and_end_logits(("start", "end", "hidden"), None) == ("start", "end")


@pytest.fixture
def answer_recipe(recipe: Callable[..., Path], write_rows: Any) -> Callable[..., Path]:
    """The answer is between the word of the question and the next one like it."""

    def row(index: int) -> dict[str, Any]:
        words = [*"abcdefgh"[: 1 + index % 8]] * 3
        place = index % 5
        context = " ".join([*words[:place], "x", "good", "x", *words[place:]])
        return asked(context, "good", "x ?")

    train, test = write_rows("asked.jsonl", map(row, range(48))), write_rows("more.jsonl", map(row, range(60, 73)))
    keys = {"train_file": str(train), "validation_file": str(test), "max_length": 20, "doc_stride": 4}
    return lambda **changes: recipe(task=TASK, **keys, **changes)


def test_a_run_learns_and_its_numbers_are_those_of_single_windows(
    answer_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert finetune.main([str(answer_recipe(max_steps=30, per_device_eval_batch_size=4))]) == 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_before_exact_match"] < 0.5 < results["eval_exact_match"]

    model = AutoModelForQuestionAnswering.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    exact, alike, losses = [], [], []
    for line in (tmp_path / "more.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        words, spans = row["context"].split(), []
        question = tokenizer("x ? [SEP]")["input_ids"][:-1]  # [CLS] x ? [SEP]
        for first in range(0, max(1, len(words) - 4), 11):  # 15 words fit, 4 are in common
            part = words[first : first + 15]
            ids = torch.tensor([[*question, *tokenizer(" ".join(part), add_special_tokens=False)["input_ids"], 3]])
            with torch.no_grad():
                output = model(input_ids=ids)
            start, end = output.start_logits[0], output.end_logits[0]
            score, i, j = plain_best(start[4:-1], end[4:-1], 30)
            spans.append((score, " ".join(part[i : j + 1])))
            place = 4 + part.index("good") if "good" in part else 0
            losses += [torch.nn.functional.cross_entropy(logits, torch.tensor(place)).item() for logits in (start, end)]
        answer = max(spans, key=lambda span: span[0])[1]
        exact.append(exact_match(answer, ["good"]))
        alike.append(answer_f1(answer, ["good"]))
    assert results["eval_exact_match"] == pytest.approx(np.mean(exact))
    assert results["eval_f1"] == pytest.approx(np.mean(alike))
    assert results["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-4)


def test_check_and_plan_know_the_task(answer_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Exact, since the windows of a mini-batch have one width: the loss is over padding, too."""
    file = str(answer_recipe())
    assert check.main([file]) == 0
    assert "\nexact: " in capsys.readouterr().out
    plan = plan_run(read_recipe([file, "--max_tokens_per_micro_batch", "64"]), torch.device("cpu"))
    assert max(plan.lengths) == 20
    assert min(plan.lengths) == 4 + (6 - 1) + 1  # the last window of 16 words has one word that the first has not


@pytest.mark.parametrize("collate_in", ["main", "workers"])
def test_the_plan_is_what_a_run_does(answer_recipe: Callable[..., Path], collate_in: str) -> None:
    """All windows are one mini-batch, so that it does not matter in which order they come."""
    keys = {"per_device_train_batch_size": 39, "gradient_accumulation_steps": 2, "max_steps": 1}
    file = str(answer_recipe(collate_in=collate_in, max_tokens_per_micro_batch=130, **keys))
    (step,) = plan_run(read_recipe([file]), torch.device("cpu")).steps
    trainer = finetune.build_trainer(read_recipe([file]))
    assert len(trainer.train_dataset) == 2 * 39
    trainer.train()
    log = next(log for log in trainer.state.log_history if "mbp_cells" in log)
    assert log["mbp_cells"] == sum(group.cells for group in step.split) == 2 * 39 * 20
    assert log["mbp_micro_batches"] == len(step.split)
    assert log["mbp_tokens"] == sum(group.tokens for group in step.split) < 2 * 39 * 20
