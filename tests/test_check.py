"""`check_equivalence` passes on exact heads, names what makes others inexact, and leaves no trace."""

import copy
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    BertForMaskedLM,
    BertForPreTraining,
    BertForSequenceClassification,
    DataCollatorForLanguageModeling,
    ElectraConfig,
    ElectraForPreTraining,
    FNetConfig,
    FNetForSequenceClassification,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
)

from hf_mbp import InexactError, MBPTrainer, check_equivalence
from tests.helpers import (
    BERT,
    NO_DROPOUT,
    VOCABULARY,
    Pad,
    bert_config,
    build,
    llama_config,
    masked_prefix,
    mbp_trainer,
    token_rows,
    tokenizer,
    with_labels,
)
from tests.test_equivalence import HEADS, class_rows


def classes(count: int = 3) -> list[dict[str, Any]]:
    return with_labels(token_rows(), lambda index, row: index % count)


@pytest.mark.parametrize("head", HEADS)
def test_exact_heads_pass(head: str, tmp_path: Path) -> None:
    model_class, config, rows, collate, _ = HEADS[head]
    report = check_equivalence(mbp_trainer(build(model_class, config()), rows(), tmp_path, data_collator=collate))
    assert report.is_exact
    assert report.findings == ()
    assert report.num_micro_batches >= 2
    assert report.split_loss == pytest.approx(report.whole_loss, rel=1e-6)
    assert "exact                     yes" in str(report)


class ClassWeighted(MBPTrainer):
    weights = torch.tensor([0.1, 1.0, 5.0], dtype=torch.float64)

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        loss = torch.nn.functional.cross_entropy(outputs.logits, labels, weight=self.weights)
        return (loss, outputs) if return_outputs else loss


class ClassWeightedCounted(ClassWeighted):
    def num_items(self, micro_batch: Any) -> float:
        return float(self.weights[micro_batch["labels"]].sum())


class Contrastive(MBPTrainer):
    """Each row is to be more alike to itself than to the others of its batch."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        loss = torch.nn.functional.cross_entropy(outputs.logits @ outputs.logits.T, torch.arange(len(outputs.logits)))
        return (loss, outputs) if return_outputs else loss


class BatchNormalised(BertForSequenceClassification):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = torch.nn.Sequential(torch.nn.BatchNorm1d(config.hidden_size), self.classifier)


def pretraining_rows() -> list[dict[str, Any]]:
    rows = with_labels(token_rows(), masked_prefix)
    return [{**row, "next_sentence_label": index % 2} for index, row in enumerate(rows)]


def speech_rows() -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_values": torch.randn(400, generator=generator).double(), "labels": [3] * (1 + index % 3)}
        for index in range(16)
    ]


def speech_model(**changes: Any) -> Any:
    sizes = {"conv_dim": (8,), "conv_stride": (5,), "conv_kernel": (10,), "num_conv_pos_embeddings": 2}
    quiet = {"layerdrop": 0.0, "hidden_dropout": 0.0, "mask_time_prob": 0.0, "feat_proj_dropout": 0.0}
    groups = {"num_conv_pos_embedding_groups": 2, "feat_extract_norm": "layer", "vocab_size": 10, "pad_token_id": 0}
    return build(Wav2Vec2ForCTC, Wav2Vec2Config(**BERT, **sizes, **quiet, **groups, **changes))


def mixtral() -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    experts = {"num_key_value_heads": 2, "num_local_experts": 4, "output_router_logits": True}
    config = MixtralConfig(**sizes, **experts, vocab_size=VOCABULARY, router_aux_loss_coef=1.0)
    return build(MixtralForCausalLM, config).float()  # its grouped product does not know float64


def electra() -> Any:
    return build(ElectraForPreTraining, ElectraConfig(**BERT, **NO_DROPOUT, embedding_size=16, vocab_size=VOCABULARY))


def fnet() -> Any:
    config = FNetConfig(**{k: v for k, v in BERT.items() if "heads" not in k}, vocab_size=VOCABULARY, num_labels=3)
    return build(FNetForSequenceClassification, config)


def classifier() -> Any:
    return build(BertForSequenceClassification, bert_config(num_labels=3))


class IgnoresMask(BertForSequenceClassification):
    def forward(self, **inputs: Any) -> Any:
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        return super().forward(**inputs)


class PairwiseContrastive(MBPTrainer):
    """Each pair of rows is judged by itself, so that a row alone has a loss, too."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
        alike = outputs.logits @ outputs.logits.T
        signs = 2 * torch.eye(len(alike)) - 1
        loss = -torch.nn.functional.logsigmoid(signs * alike).sum() / len(alike)
        return (loss, outputs) if return_outputs else loss


class SmallPenalty(MBPTrainer):
    """A mean over tokens beside one over rows, so small that in all parameters together it does not show."""

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        outputs = model(**inputs, output_hidden_states=True)
        loss = outputs.loss + 1e-3 * outputs.hidden_states[-1][inputs["attention_mask"].bool()].mean()
        return (loss, outputs) if return_outputs else loss


class Auxiliary(torch.autograd.Function):
    """Leaves the loss as it is, and adds to its gradient, as some mixtures of experts do to balance them."""

    @staticmethod
    def forward(context: Any, logits: torch.Tensor) -> torch.Tensor:
        return logits.clone()

    @staticmethod
    def backward(context: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient + 1 / gradient.numel()


class AddsGradients(BertForSequenceClassification):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier.register_forward_hook(lambda module, inputs, output: Auxiliary.apply(output))


class Spreads(BertForSequenceClassification):
    """Draws rows apart from each other, in training mode only."""

    def forward(self, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        if self.training:
            outputs["loss"] = outputs["loss"] - outputs["logits"].var(dim=0, correction=0).sum()
        return outputs


def spectrally_normalised() -> Any:
    """Whose power iteration has not settled, as after every step that changes the weights."""
    model = classifier()
    torch.nn.utils.parametrizations.spectral_norm(model.classifier)
    parametrization = model.classifier.parametrizations.weight[0]
    parametrization._u.copy_(torch.nn.functional.normalize(torch.ones_like(parametrization._u), dim=0))
    return model


class PadLabelsWithZeros(Pad):
    """Zero is a class to Electra, which counts tokens by the mask."""

    def column(self, key: str, values: list[Any]) -> torch.Tensor:
        return super().column("input_ids" if key == "labels" else key, values)


class DropMask(Pad):
    """FNet takes no mask. Without one the check cannot see the padding, only that the rows do not add up."""

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return {key: value for key, value in super().__call__(rows).items() if key != "attention_mask"}


INEXACT: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "class weights": (classifier, classes, {"trainer_class": ClassWeighted}, "mean over other items than num_items"),
    "contrastive": (
        classifier,
        classes,
        {"trainer_class": Contrastive},
        "compares the rows of a batch",
    ),
    "batch normalisation": (
        lambda: build(BatchNormalised, bert_config(num_labels=3)),
        classes,
        {},
        "Batch normalisation",
    ),
    "router loss": (mixtral, lambda: with_labels(token_rows(), masked_prefix), {}, "load-balancing loss"),
    "two denominators": (
        lambda: build(BertForPreTraining, bert_config()),
        pretraining_rows,
        {},
        "here there are labels, next_sentence_label",
    ),
    "electra": (
        electra,
        lambda: with_labels(token_rows(), lambda index, row: [token % 2 for token in row["input_ids"]]),
        {"data_collator": PadLabelsWithZeros()},
        "mean over other items than num_items",
    ),
    "mixes padding": (fnet, classes, {"data_collator": DropMask()}, "depends on how wide it is padded"),
    "absolute positions": (
        lambda: build(BertForSequenceClassification, bert_config(num_labels=3)),
        classes,
        {"data_collator": Pad(side="left")},
        "padding_side='right'",
    ),
    "ignored mask": (lambda: build(IgnoresMask, bert_config(num_labels=3)), classes, {}, "ignores attention_mask"),
    "changing state": (
        lambda: spectrally_normalised(),
        classes,
        {},
        "next one computes (classifier.parametrizations.weight.0._u",
    ),
    "pairwise contrastive": (
        classifier,
        classes,
        {"trainer_class": PairwiseContrastive},
        "the loss of a row twice is not that of the row",
    ),
    "small penalty": (
        classifier,
        classes,
        {"trainer_class": SmallPenalty},
        "a small part of the loss, such as a penalty",
    ),
    "gradients only": (lambda: build(AddsGradients, bert_config(num_labels=3)), classes, {}, "backward pass only"),
    "training mode only": (
        lambda: build(Spreads, bert_config(num_labels=3)),
        classes,
        {},
        "statistic of the rows that run together",
    ),
    "ctc sum": (lambda: speech_model(ctc_loss_reduction="sum"), speech_rows, {}, "sum over the rows"),
    "ctc mean": (
        lambda: speech_model(ctc_loss_reduction="mean"),
        speech_rows,
        {},
        "mean over other items than num_items",
    ),
}


@pytest.mark.parametrize("case", INEXACT)
def test_inexact_losses_are_named(case: str, tmp_path: Path) -> None:
    model, rows, changes, finding = INEXACT[case]
    report = check_equivalence(mbp_trainer(model(), rows(), tmp_path, **changes))
    assert not report.is_exact
    assert any(finding in text for text in report.findings), report


@pytest.mark.parametrize("case", ["changing state", "training mode only"])
def test_what_shows_in_training_mode_only_does_not_in_evaluation_mode(case: str, tmp_path: Path) -> None:
    """So the check would not see it there."""
    model, rows, changes, _ = INEXACT[case]
    model = model()
    model.train = lambda mode=True: torch.nn.Module.train(model, False)
    assert check_equivalence(mbp_trainer(model, rows(), tmp_path, **changes)).is_exact


def test_the_report_names_the_worst_parameter(tmp_path: Path) -> None:
    model, rows, changes, _ = INEXACT["gradients only"]
    report = check_equivalence(mbp_trainer(model(), rows(), tmp_path, **changes))
    assert report.worst_parameter in report.findings[0]
    assert f"of the gradient of        {report.worst_parameter}" in str(report)


def test_the_page_shows_a_report_as_it_is(tmp_path: Path) -> None:
    page = (Path(__file__).parents[1] / "docs" / "exactness.md").read_text()
    report = check_equivalence(mbp_trainer(classifier(), classes(), tmp_path, trainer_class=ClassWeighted))
    assert str(report) in page


def test_the_right_count_mends_class_weights(tmp_path: Path) -> None:
    report = check_equivalence(mbp_trainer(classifier(), classes(), tmp_path, trainer_class=ClassWeightedCounted))
    assert report.is_exact


class Nasty(BertForMaskedLM):
    """Does in its forward pass all that may be done there, and drops out."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        size = config.hidden_size
        self.recurrent = torch.nn.LSTM(size, size, num_layers=2, dropout=0.2, batch_first=True)
        self.average = torch.nn.Parameter(torch.zeros(size), requires_grad=False)
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("seen", torch.zeros(0))
        self.widest, self.widths, self.scratch = 0, [0], torch.zeros(3)
        self.generator, self.shuffler = torch.Generator().manual_seed(5), np.random.default_rng(5)

    def forward(self, input_ids: Any, attention_mask: Any = None, labels: Any = None, **kwargs: Any) -> Any:
        embedded = self.recurrent(self.get_input_embeddings()(input_ids))[0]
        with torch.no_grad():
            self.average.mul_(0.9).add_(0.1 * embedded.mean(dim=(0, 1)))
            self.average.data.add_(1e-3)
            self.calls += 1
            self.scratch += 1
            self.seen = torch.cat([self.seen, embedded[0, 0]])
        self.widest = max(self.widest, input_ids.shape[1])
        self.widths.append(self.widest)
        self.config.use_cache = not self.config.use_cache
        torch.rand(1, generator=self.generator)
        self.shuffler.random()
        torch.rand(1), random.random(), np.random.rand()
        return super().forward(inputs_embeds=embedded, attention_mask=attention_mask, labels=labels)


class CountsInMetrics(MBPTrainer):
    """Notes something at each call of its loss, as the trainers of TRL do."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._metrics = {"train": {"width": []}}
        self.tokens = 0

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        self._metrics["train"]["width"].append(float(inputs["input_ids"].shape[1]))
        self.tokens += 1
        return super().compute_loss(model, inputs, return_outputs)


class Shuffles(torch.utils.data.Dataset):
    """Draws from a generator of its own at each row."""

    def __init__(self) -> None:
        self.rows, self.generator = token_rows(32), random.Random(3)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row, end = self.rows[index], 2 + self.generator.randrange(20)
        return {key: value[:end] for key, value in row.items()}


def nasty_trainer(folder: Path, **changes: Any) -> Any:
    dropouts = {"hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}
    return mbp_trainer(
        build(Nasty, bert_config(**dropouts)),
        Shuffles(),
        folder,
        trainer_class=CountsInMetrics,
        data_collator=DataCollatorForLanguageModeling(tokenizer(), seed=7),
        optim="adamw_torch",
        **changes,
    )


def flat(value: Any) -> Any:
    """Tensors, arrays and what holds them, as something to be compared bit for bit."""
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return torch.as_tensor(value).tolist()
    if isinstance(value, dict):
        return {key: flat(inner) for key, inner in value.items()}
    return [flat(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def state_of(trainer: Any) -> dict[str, Any]:
    """Everything the check could disturb."""
    model, collator = trainer.model, trainer.data_collator
    attributes = ("widest", "widths", "scratch", "seen", "calls")
    return {
        "weights": flat(dict(model.named_parameters())),
        "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "buffers": flat(dict(model.named_buffers())),
        "gradients": [flat(parameter.grad) for parameter in model.parameters()],
        "optimizer": flat(trainer.optimizer.state_dict()),
        "flags": [module.training for module in model.modules()],
        "rates": [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)],
        "hooks": [len(module._forward_hooks) for module in model.modules()],
        "config": model.config.to_dict(),
        "attributes": [flat(getattr(model, name, None)) for name in attributes],
        "random states": flat([torch.get_rng_state(), np.random.get_state(), random.getstate()]),
        "model generators": [flat(model.generator.get_state()), model.shuffler.bit_generator.state],
        "collator": collator.generator and flat(collator.generator.get_state()),
        "data": trainer.train_dataset.generator.getstate(),
        "metrics": [copy.deepcopy(trainer._metrics), trainer.tokens],
        "loaders": len(trainer.accelerator._dataloaders),
        "precision": torch.backends.cudnn.allow_tf32,
    }


def test_the_check_leaves_no_trace_of_a_nasty_model(tmp_path: Path) -> None:
    """After a step, so that there are optimizer states, and generators that have been drawn from."""
    trainer = nasty_trainer(tmp_path)
    trainer.train()
    for index, parameter in enumerate(trainer.model.parameters()):
        parameter.grad = torch.full_like(parameter, float(index)) if index % 2 else None
    trainer.model.bert.eval()
    before = state_of(trainer)
    check_equivalence(trainer)
    after = state_of(trainer)
    for name, value in before.items():
        assert after[name] == value, name


def test_a_run_with_the_check_equals_one_without(tmp_path: Path) -> None:
    """With dropout and random masks."""

    def run(check: bool) -> Any:
        trainer = nasty_trainer(tmp_path, check_at_start=check, max_steps=3, on_inexact="error")
        trainer.train()
        return flat(trainer.model.state_dict()), trainer.model.widths, trainer.state.log_history[0]["loss"]

    assert run(True) == run(False)


def test_training_warns_of_what_is_inexact(tmp_path: Path) -> None:
    trainer = mbp_trainer(classifier(), classes(), tmp_path, trainer_class=ClassWeighted)
    with pytest.warns(UserWarning, match="Splitting the batch changes the gradient"):
        trainer.train()


def test_training_refuses_what_is_inexact_if_asked(tmp_path: Path) -> None:
    model = classifier()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer = mbp_trainer(model, classes(), tmp_path, trainer_class=ClassWeighted, on_inexact="error")
    with pytest.raises(InexactError, match="Override num_items"):
        trainer.train()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_one_row_cannot_be_compared(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="a split needs 2 rows"):
        check_equivalence(mbp_trainer(classifier(), classes()[:1], tmp_path))


def test_two_rows_are_compared_with_each_alone(tmp_path: Path) -> None:
    report = check_equivalence(mbp_trainer(classifier(), classes(), tmp_path, trainer_class=ClassWeighted), num_rows=2)
    assert (report.num_rows, report.num_micro_batches) == (2, 2)
    assert not report.is_exact


def test_batch_normalisation_needs_two_rows_a_part(tmp_path: Path) -> None:
    trainer = mbp_trainer(build(BatchNormalised, bert_config(num_labels=3)), classes()[:3], tmp_path)
    with pytest.raises(ValueError, match="a split needs 4 rows"):
        check_equivalence(trainer)


def test_rows_without_items_are_not_taken_for_exact(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = with_labels(token_rows(), lambda index, row: [-100] * len(row["input_ids"]))
    trainer = mbp_trainer(build(LlamaForCausalLM, llama_config()), rows, tmp_path)
    with pytest.raises(ValueError, match="of 16 rows, 0 will do"):
        check_equivalence(trainer)
    with pytest.warns(UserWarning, match="nothing to learn from"):
        trainer.train()
    assert "Exactness was not checked" in capsys.readouterr().out


def test_short_rows_that_are_all_alike_do_not_hide_what_is_wrong(tmp_path: Path) -> None:
    """The eight shortest rows have one length and one class, with which any count and any padding would pass."""
    alike = [{"input_ids": [7, 8, 9], "attention_mask": [1] * 3, "labels": 0}] * 20
    rows = alike + with_labels(token_rows(low=12), lambda index, row: index % 3)
    weighted = check_equivalence(mbp_trainer(classifier(), rows, tmp_path, trainer_class=ClassWeighted))
    assert not weighted.is_exact
    left = check_equivalence(mbp_trainer(classifier(), rows, tmp_path, data_collator=Pad(side="left")))
    assert not left.is_exact


def test_a_loss_that_is_no_number_is_named(tmp_path: Path) -> None:
    model = classifier()
    with torch.no_grad():
        model.classifier.weight.fill_(float("nan"))
    report = check_equivalence(mbp_trainer(model, classes(), tmp_path))
    assert not report.is_exact
    assert "not a finite number" in report.findings[0]


class DrawsNumbers(BertForSequenceClassification):
    def forward(self, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        outputs["loss"] = outputs["loss"] * (1 + torch.rand(()))
        return outputs


def test_a_model_that_draws_random_numbers_is_named_and_nothing_else(tmp_path: Path) -> None:
    trainer = mbp_trainer(build(DrawsNumbers, bert_config(num_labels=3)), class_rows(), tmp_path)
    (finding,) = check_equivalence(trainer).findings
    assert "draw random numbers even in evaluation mode" in finding


def test_rows_without_a_gradient_are_not_compared(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = build(BertForSequenceClassification, bert_config(num_labels=3))
    model.classifier.weight.data.zero_()
    model.classifier.requires_grad_(False)
    trainer = mbp_trainer(model, class_rows(), tmp_path)
    with pytest.raises(ValueError, match="no gradient"):
        check_equivalence(trainer)
    trainer.train()
    assert "Exactness was not checked: the rows that would be compared have no gradient" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["lists", "tensors", "workers"])
def test_a_class_behind_the_others_is_compared_too(kind: str, tmp_path: Path) -> None:
    """Rows of one length sorted by class; the first eight have one class, with which any count would pass."""
    rows = [{"input_ids": [7 + index % 5, 8, 9], "labels": index // 11} for index in range(32)]
    if kind == "tensors":
        rows = [{key: torch.tensor(value) for key, value in row.items()} for row in rows]
    place = "workers" if kind == "workers" else "main"
    trainer = mbp_trainer(classifier(), rows, tmp_path, trainer_class=ClassWeighted, collate_in=place)
    assert not check_equivalence(trainer).is_exact
