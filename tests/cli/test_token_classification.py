"""Tags for words: which tokens are labelled, with what, and how predictions are measured."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, Features, List, Value
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoModelForTokenClassification, AutoTokenizer, EvalPrediction, PreTrainedTokenizerFast

from hf_mbp.cli import check, finetune
from hf_mbp.cli.errors import UserError
from hf_mbp.cli.recipe import read_recipe
from hf_mbp.cli.run_plan import plan_run
from hf_mbp.cli.tasks.token_classification import TagMetrics, label_tokens
from tests.cli.test_tasks import prepare

TASK = "token_classification"
ROWS = [{"words": ["a", "b"], "tags": ["Y", "X"]}, {"words": ["c"], "tags": ["Z"]}]


def piece_tokenizer() -> PreTrainedTokenizerFast:
    """Words in pieces: ``banana`` is ``ba ##na ##na``."""
    pieces = ["[PAD]", "[UNK]", "a", "ba", "##na", "##b", "."]
    tokenizer = Tokenizer(models.WordPiece({piece: i for i, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]", pad_token="[PAD]")


class TestLabels:
    def test_first_pieces_as_the_tokenizer_of_lists_finds_them(self) -> None:
        tokenizer = piece_tokenizer()
        words = ["banana", "a", "x", "a.a", "bab", "."]
        word_ids = tokenizer(words, is_split_into_words=True).word_ids()
        expected = [-100 if word in word_ids[:i] else 10 + word for i, word in enumerate(word_ids)]
        offsets = tokenizer(" ".join(words), return_offsets_mapping=True)["offset_mapping"]
        labels = label_tokens(words, range(10, 16), offsets)
        assert labels == expected
        assert labels.count(-100) == 2 + 2 + 1

    def test_blanks_that_belong_to_tokens(self) -> None:
        """Tokenizers by bytes put the blank into the token behind it."""
        alphabet = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "Ġb"]
        tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(alphabet)}, merges=[("Ġ", "b")]))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
        tokenizer.decoder = decoders.ByteLevel()
        encoded = tokenizer.encode("ac bc é")
        assert encoded.tokens[2] == "Ġb"
        assert label_tokens(["ac", "bc", "é"], [1, 2, 3], encoded.offsets) == [1, -100, 2, -100, -100, 3, -100]

    def test_rows(self, encoder: Path) -> None:
        setup = prepare(TASK, encoder, ROWS)
        assert setup.model.config.id2label == {0: "X", 1: "Y", 2: "Z"}
        assert setup.train["input_ids"][:] == [[2, 6, 7, 3], [2, 8, 3]]
        assert setup.train["labels"][:] == [[-100, 1, 0, -100], [-100, 2, -100]]
        batch = setup.collator([setup.train[0], setup.train[1]])
        assert batch["labels"].tolist() == [[-100, 1, 0, -100], [-100, 2, -100, -100]]
        assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 1, 0]]

    def test_integers_in_the_order_of_their_values(self, encoder: Path) -> None:
        setup = prepare(TASK, encoder, [{"words": ["a", "b"], "tags": [10, 9]}])
        assert setup.model.config.id2label == {0: "9", 1: "10"}
        assert setup.train["labels"][0] == [-100, 1, 0, -100]

    def test_named_tags_of_a_data_set_keep_their_ids(self, encoder: Path) -> None:
        names = ClassLabel(names=["O", "B-A", "never"])
        features = Features({"tokens": List(Value("string")), "ner_tags": List(names)})
        rows = Dataset.from_dict({"tokens": [["a", "b"]], "ner_tags": [[1, 0]]}, features=features)
        setup = prepare(TASK, encoder, rows, words_column="tokens", tags_column="ner_tags")
        assert setup.model.config.id2label == {0: "O", 1: "B-A", 2: "never"}
        assert setup.train["labels"][0] == [-100, 1, 0, -100]

    def test_a_trained_tagger_keeps_its_tags_unless_told_otherwise(self, encoder: Path, tmp_path: Path) -> None:
        prepare(TASK, encoder, ROWS).model.save_pretrained(tmp_path / "trained")
        AutoTokenizer.from_pretrained(encoder).save_pretrained(tmp_path / "trained")
        rows = [{"words": ["a", "b"], "tags": ["Z", "Z"]}]
        assert prepare(TASK, tmp_path / "trained", rows).train["labels"][0] == [-100, 2, 2, -100]
        others = [{"words": ["a", "b"], "tags": ["P", "Q"]}]
        with pytest.raises(UserError, match=r"tags', has labels that the model .*new_head.* does not have: 'P', 'Q'"):
            prepare(TASK, tmp_path / "trained", others)
        assert prepare(TASK, tmp_path / "trained", others, new_head=True).model.config.num_labels == 2
        new = prepare(TASK, tmp_path / "trained", others, random_weights=True).model
        assert new.config.id2label == {0: "P", 1: "Q"}

    def test_rows_are_cut_and_those_without_words_left_out(
        self, encoder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        rows = [{"words": ["a"] * 4, "tags": ["X", "Y", "X", "Y"]}, {"words": ["", ""], "tags": ["X", "X"]}]
        setup = prepare(TASK, encoder, rows, ROWS[:1], max_length=4)
        assert setup.train["labels"][:] == [[-100, 0, 1, -100]]
        assert "1 rows cut after 4 tokens (max_length); 1 rows left out" in capsys.readouterr().out


class TestMistakes:
    @pytest.mark.parametrize(
        ("rows", "message"),
        [
            ([{"tags": ["X"]}], r"train.x has no column 'words' \(option words_column\); its columns are tags"),
            ([{"words": "a b", "tags": ["X"]}], r"'words' \(option words_column\): row 0 is 'a b', but must be a list"),
            ([{"words": ["a"], "tags": [0.5]}], r"row 0 is \[0.5\], but must be a list of names or integers"),
            ([{"words": ["a"], "tags": None}], r"column .tags. \(option tags_column\): 1 of 1 rows are empty"),
            ([*ROWS, {"words": ["a"], "tags": []}], r"row 2 has 1 words \('words'\) and 0 tags \('tags'\)"),
            ([{"words": ["a"], "tags": ["X"]}], "all rows have the label 'X'; nothing to tell apart"),
            ([{"words": [], "tags": []}], "train.x, column 'tags': there is no tag"),
        ],
    )
    def test_are_told(self, encoder: Path, rows: list[dict[str, Any]], message: str) -> None:
        with pytest.raises(UserError, match=message):
            prepare(TASK, encoder, rows)

    def test_unknown_tags_of_the_validation_set(self, encoder: Path) -> None:
        unknown = [{"words": ["a", "b"], "tags": ["P", "X"]}, {"words": ["a"], "tags": ["Q"]}]
        with pytest.raises(UserError, match=r"test.x, .* has labels that the training data does not have: 'P', 'Q'"):
            prepare(TASK, encoder, ROWS, unknown)


class TestMetrics:
    def test_against_plain_counts(self) -> None:
        names = ("O", "B-A", "I-A")
        labels = np.array([[-100, 1, 2, 0, -100], [-100, 0, -100, 1, -100]])
        logits = np.random.default_rng(0).normal(size=(2, 5, 3)).astype(np.float32)
        logits[0, 1:4], logits[1, 1], logits[1, 3] = np.eye(3)[[1, 2, 1]] * 9, np.eye(3)[0] * 9, np.eye(3)[2] * 9
        metrics = TagMetrics(names=names)(EvalPrediction(predictions=logits, label_ids=labels))
        loss = torch.nn.functional.cross_entropy(torch.tensor(logits).flatten(0, 1), torch.tensor(labels).flatten())
        assert metrics == pytest.approx(
            {
                "accuracy": 3 / 5,  # the last of each row is wrong
                "f1": (2 / 3 + 2 / 4 + 2 / 3) / 3,
                "mean_loss": loss.item(),
                "entity_f1": 2 * 2 / (3 + 2),  # an I that follows no entity begins one
            }
        )

    def test_other_tags_have_no_entities(self) -> None:
        prediction = EvalPrediction(predictions=np.zeros((1, 1, 2)), label_ids=np.array([[0]]))
        assert "entity_f1" not in TagMetrics(names=("word", "Word"))(prediction)


@pytest.fixture
def tag_recipe(recipe: Callable[..., Path], write_rows: Any) -> Callable[..., Path]:
    """Which letter follows is told by the word: a is X, all others are Y or, at the end, Z."""

    def row(index: int) -> dict[str, Any]:
        words = [*("abcd"[(index + i) % 4] for i in range(1 + index % 13)), "z"]
        return {"words": words, "tags": [{"a": "X", "z": "Z"}.get(word, "Y") for word in words]}

    train, test = write_rows("tags.jsonl", map(row, range(48))), write_rows("more.jsonl", map(row, range(50, 63)))
    return lambda **changes: recipe(task=TASK, train_file=str(train), validation_file=str(test), **changes)


def test_a_run_learns_and_its_numbers_are_those_of_single_rows(tag_recipe: Callable[..., Path], tmp_path: Path) -> None:
    argv = [str(tag_recipe(max_steps=30, per_device_eval_batch_size=4)), "--max_tokens_per_micro_batch", "64"]
    assert finetune.main(argv) == 0
    results = json.loads((tmp_path / "run" / "all_results.json").read_text(encoding="utf-8"))
    assert results["eval_before_accuracy"] < 0.8 < results["eval_accuracy"]
    assert results["mbp_padding_fraction"] < results["mbp_padding_fraction_unsplit"]

    model = AutoModelForTokenClassification.from_pretrained(tmp_path / "run").eval()
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run")
    losses: list[float] = []
    right = []
    for line in (tmp_path / "more.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        with torch.no_grad():
            logits = model(**tokenizer([row["words"]], is_split_into_words=True, return_tensors="pt")).logits[0, 1:-1]
        targets = torch.tensor([model.config.label2id[tag] for tag in row["tags"]])
        losses += torch.nn.functional.cross_entropy(logits, targets, reduction="none").tolist()
        right += (logits.argmax(dim=-1) == targets).tolist()
    assert results["eval_loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert results["eval_accuracy"] == pytest.approx(np.mean(right))


def test_check_and_plan_know_the_task(tag_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    file = str(tag_recipe())
    assert check.main([file]) == 0
    assert "\nexact: " in capsys.readouterr().out
    plan = plan_run(read_recipe([file, "--max_tokens_per_micro_batch", "64"]), torch.device("cpu"))
    assert sorted(plan.lengths) == sorted(4 + index % 13 for index in range(48))
    assert plan.padding() < plan.padding(plain=True)
