"""`MBPMixin` on the trainers of sentence-transformers: exact where the loss is a mean over rows, else refused."""

import random
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import CrossEncoder, CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder import losses as cross_losses
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Pooling, Transformer
from transformers import BertForSequenceClassification, BertModel

from hf_mbp import InexactError, MBPConfig, MBPMixin, check_equivalence
from tests.helpers import Recorder, bert_config, build, relative_error, word_tokenizer

IN_FLOAT64 = 1e-12
CONFIG = {"pad_token_id": 0, "max_position_embeddings": 64}


class MBPSentenceTransformerTrainer(MBPMixin, SentenceTransformerTrainer):
    pass


class MBPCrossEncoderTrainer(MBPMixin, CrossEncoderTrainer):
    pass


def sentence_rows(count: int = 16) -> Dataset:
    """Pairs of sentences of uneven lengths, with a score."""
    generator = random.Random(0)

    def sentence(longest: int) -> str:
        return " ".join(f"w{generator.randrange(6, 60)}" for _ in range(generator.randint(2, longest)))

    rows = [{"first": sentence(20), "second": sentence(30), "score": float(index % 2)} for index in range(count)]
    return Dataset.from_list(rows)


def sentence_model(folder: Path) -> SentenceTransformer:
    build(BertModel, bert_config(**CONFIG)).float().save_pretrained(folder / "bert")
    word_tokenizer().save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert"), max_seq_length=64), Pooling(16)]
    return SentenceTransformer(modules=modules, device="cpu").double()


def cross_model(folder: Path) -> CrossEncoder:
    build(BertForSequenceClassification, bert_config(num_labels=1, **CONFIG)).float().save_pretrained(folder / "cross")
    word_tokenizer().save_pretrained(folder / "cross")
    return CrossEncoder(str(folder / "cross"), device="cpu", max_length=64).double()


CROSS = (CrossEncoderTrainer, MBPCrossEncoderTrainer, CrossEncoderTrainingArguments, cross_model)
SENTENCE = (
    SentenceTransformerTrainer,
    MBPSentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    sentence_model,
)


def trainer_of(kind: Any, loss: Any, folder: Path, *, splits: bool, rows: Any = None, **changes: Any) -> Any:
    stock, mixed, arguments_class, make_model = kind
    model = make_model(folder)
    args = arguments_class(
        output_dir=str(folder),
        per_device_train_batch_size=16,
        max_steps=1,
        learning_rate=0.01,
        optim="sgd",
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        use_cpu=True,
    )
    rows = sentence_rows() if rows is None else rows
    options = {"mbp_config": MBPConfig(**{"max_tokens_per_micro_batch": 200, **changes})} if splits else {}
    trainer_class = mixed if splits else stock
    return trainer_class(model=model, args=args, train_dataset=rows, loss=loss(model), **options)


def gradients_of(trainer: Any) -> dict[str, Any]:
    recorder = Recorder()
    trainer.add_callback(recorder)
    trainer.train()
    return recorder.gradients[0]


def logged(trainer: Any, name: str) -> float:
    return float(next(entry[name] for entry in trainer.state.log_history if "loss" in entry))


@pytest.mark.parametrize(
    ("kind", "loss"),
    [
        (SENTENCE, losses.CosineSimilarityLoss),
        (SENTENCE, losses.ContrastiveLoss),
        (CROSS, cross_losses.BinaryCrossEntropyLoss),
        (CROSS, cross_losses.MSELoss),
    ],
)
def test_a_mean_over_rows_is_that_of_the_whole_batch(kind: Any, loss: Any, tmp_path: Path) -> None:
    whole, split = (trainer_of(kind, loss, tmp_path, splits=splits) for splits in (False, True))
    assert relative_error(gradients_of(whole), gradients_of(split)) < IN_FLOAT64
    assert logged(split, "loss") == pytest.approx(logged(whole, "loss"), rel=1e-7)
    assert logged(split, "mbp_micro_batches") >= 3
    assert logged(split, "mbp_padding_fraction") < 0.3


def test_several_data_sets_with_a_loss_each(tmp_path: Path) -> None:
    rows = DatasetDict(one=sentence_rows(), other=sentence_rows().rename_columns({"first": "a", "second": "b"}))

    def loss(model: Any) -> dict[str, Any]:
        return {name: losses.CosineSimilarityLoss(model) for name in rows}

    whole, split = (trainer_of(SENTENCE, loss, tmp_path, splits=splits, rows=rows) for splits in (False, True))
    assert relative_error(gradients_of(whole), gradients_of(split)) < IN_FLOAT64


@pytest.mark.parametrize("loss", [losses.MultipleNegativesRankingLoss, losses.CoSENTLoss])
def test_a_loss_that_compares_rows_is_refused(loss: Any, tmp_path: Path) -> None:
    rows = sentence_rows()
    if loss is losses.MultipleNegativesRankingLoss:
        rows = rows.remove_columns("score")
    trainer = trainer_of(SENTENCE, loss, tmp_path, splits=True, rows=rows)
    with pytest.raises(InexactError, match="compares the rows of a batch with each other"):
        trainer.train()


def test_the_check_leaves_the_loss_alone(tmp_path: Path) -> None:
    """A loss with weights of its own, which are not those of the model."""

    def loss(model: Any) -> Any:
        return losses.SoftmaxLoss(model, 16, num_labels=2)

    rows = Dataset.from_list([{**row, "score": int(row["score"])} for row in sentence_rows()])
    trainer = trainer_of(SENTENCE, loss, tmp_path, splits=True, rows=rows)
    trainer.loss.double()
    assert check_equivalence(trainer).is_exact
    assert all(parameter.grad is None for parameter in trainer.loss.parameters())


@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_compares_rows_is_refused_in_any_of_several_data_sets(seed: int, tmp_path: Path) -> None:
    scored = sentence_rows()
    rows = DatasetDict(one=scored, other=scored.remove_columns("score"))

    def loss(model: Any) -> dict[str, Any]:
        return {"one": losses.CosineSimilarityLoss(model), "other": losses.MultipleNegativesRankingLoss(model)}

    trainer = trainer_of(SENTENCE, loss, tmp_path, splits=True, rows=rows)
    trainer.args.seed, trainer.args.max_steps = seed, 2
    with pytest.raises(InexactError, match="compares the rows of a batch with each other"):
        trainer.train()
    assert check_equivalence(trainer).is_exact  # of the first data set
