"""Runs in half precision are checked in float32, or say why not; weights and DDP's hooks stay as they are."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertForSequenceClassification, LlamaForCausalLM

from hf_mbp import MBPTrainer, check_equivalence, device_memory, full_precision
from hf_mbp.compat import unrounded_float32
from hf_mbp.undisturbed import undisturbed
from tests.helpers import bert_config, build, llama_config, masked_prefix, mbp_trainer, token_rows, with_labels


def classes() -> list[dict[str, Any]]:
    return with_labels(token_rows(), lambda index, row: index % 3)


def in_bf16(model_class: Any = BertForSequenceClassification) -> Any:
    return build(model_class, bert_config(num_labels=3)).bfloat16()


class SlightlyWeighted(MBPTrainer):
    """Gives a gradient that is wrong by less than half precision could tell."""

    weights = torch.tensor([0.95, 1.0, 1.05])

    def compute_loss(self, model: Any, inputs: Any, return_outputs: bool = False, **kwargs: Any) -> Any:
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        logits = outputs.logits
        loss = torch.nn.functional.cross_entropy(logits, labels, weight=self.weights.to(logits.dtype))
        return (loss, outputs) if return_outputs else loss


class Dtypes(BertForSequenceClassification):
    """Notes the dtypes of its weights, logits and loss at each call."""

    seen: list[tuple[torch.dtype, ...]]

    def forward(self, **inputs: Any) -> Any:
        outputs = super().forward(**inputs)
        Dtypes.seen.append((self.classifier.weight.dtype, outputs.logits.dtype, outputs.loss.dtype))
        return outputs


@pytest.fixture(autouse=True)
def no_dtypes_yet() -> None:
    Dtypes.seen = []


IN_FLOAT32 = {(torch.float32,) * 3}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_compared_in_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    model = build(Dtypes, bert_config(num_labels=3)).to(dtype)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = check_equivalence(mbp_trainer(model, classes(), tmp_path))
    assert set(Dtypes.seen) == IN_FLOAT32
    assert report.max_relative_error < 1e-5
    assert report.tolerance == 1e-3
    assert report.reservations == ()
    for name, value in model.state_dict().items():
        assert value.dtype == before[name].dtype
        assert torch.equal(value, before[name])


def test_an_error_below_the_rounding_of_half_precision_is_found(tmp_path: Path) -> None:
    report = check_equivalence(mbp_trainer(in_bf16(), classes(), tmp_path, trainer_class=SlightlyWeighted))
    assert report.max_relative_error < 0.1
    assert not report.is_exact
    assert "mean over other items" in report.findings[0]


def test_autocast_is_off_while_a_run_is_checked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the first step, when Accelerate has wrapped the model's forward; on again after."""
    model = build(Dtypes, bert_config(num_labels=3)).float()
    trainer = mbp_trainer(model, classes(), tmp_path, bf16=True, on_inexact="error")
    trainer.train()
    assert "Checked to be exact: split" in capsys.readouterr().out
    dtypes = list(dict.fromkeys(Dtypes.seen))
    assert {dtypes[0]} == IN_FLOAT32
    assert dtypes[1] == (torch.float32, torch.bfloat16, torch.float32)
    assert len(dtypes) == 2


def test_shifting_is_probed_in_float32(tmp_path: Path) -> None:
    model = build(LlamaForCausalLM, llama_config()).bfloat16()
    dtypes = []
    model.register_forward_pre_hook(lambda module, inputs: dtypes.append(module.lm_head.weight.dtype))
    rows = with_labels(token_rows(), masked_prefix)
    trainer = mbp_trainer(model, rows, tmp_path)
    assert trainer.num_items(trainer.data_collator(rows)) == sum(
        len(row["labels"]) - max(1, i % 3) for i, row in enumerate(rows)
    )
    assert dtypes == [torch.float32] * 2


class Quantized(BertForSequenceClassification):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.packed = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)


class InsistsOnHalf(BertForSequenceClassification):
    """Names the dtype that its weights have."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier.register_forward_pre_hook(lambda module, inputs: inputs[0].to(torch.bfloat16))


def flash_attention() -> Any:
    model = in_bf16()
    model.config._attn_implementation_internal = "flash_attention_2"
    return model


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (lambda: in_bf16(Quantized), "the weights are quantized"),
        (lambda: in_bf16(InsistsOnHalf), "in float32 it fails: "),
        (in_bf16, "a copy in float32 takes "),
    ],
    ids=["quantized", "insists", "no memory"],
)
def test_what_stays_in_half_precision_says_so(
    model: Any, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "copy" in reason:
        monkeypatch.setattr(device_memory, "free_memory", lambda device: 1000)
    trainer = mbp_trainer(model(), classes(), tmp_path, on_inexact="error")
    report = check_equivalence(trainer)
    assert report.tolerance == 0.1
    assert report.half_precision_because is not None
    assert report.half_precision_because.startswith(reason)
    assert f"only as far as half precision can tell ({reason}" in str(report)
    trainer.train()
    assert f"Checked to be exact, only as far as half precision can tell ({reason}" in capsys.readouterr().out


def test_flash_attention_takes_half_precision_only() -> None:
    model = flash_attention()
    accelerator = type("Accelerator", (), {"mixed_precision": "bf16"})()
    assert full_precision.obstacle(accelerator, [model]) == "flash attention takes nothing else"
    assert full_precision.obstacle(accelerator, [in_bf16()]) is None


def test_errors_that_are_not_about_precision_are_raised(tmp_path: Path) -> None:
    class Fails(BertForSequenceClassification):
        def forward(self, **inputs: Any) -> Any:
            raise RuntimeError("a defect of the model")

    for model in (in_bf16(Fails), in_bf16(Fails).float()):
        with pytest.raises(RuntimeError, match="a defect of the model"):
            check_equivalence(mbp_trainer(model, classes(), tmp_path))


def accumulator(parameter: torch.Tensor) -> Any:
    """Where DDP hooks in to reduce the gradient."""
    return parameter.expand_as(parameter).grad_fn.next_functions[0][0]


def test_the_hooks_of_ddp_stay_with_the_parameters() -> None:
    """Another dtype given to a parameter itself would take the gradient accumulator, with its hooks, from it."""
    model = torch.nn.Linear(2, 2).bfloat16()
    hooked = accumulator(model.weight)
    reduced = []
    hooked.register_hook(lambda *_: reduced.append(1))
    with undisturbed([model], half_as=torch.float32):
        assert model.weight.dtype == torch.float32
        model(torch.ones(1, 2)).sum().backward()
        assert reduced == []
    assert accumulator(model.weight) is hooked
    model(torch.ones(1, 2).bfloat16()).sum().backward()
    assert reduced == [1]


def test_tied_weights_stay_tied() -> None:
    model = torch.nn.ModuleList([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)]).bfloat16()
    model[1].weight = model[0].weight
    with undisturbed([model], half_as=torch.float32):
        assert model[1].weight is model[0].weight
        assert model[0].weight.dtype == torch.float32
    assert model[1].weight is model[0].weight


def precisions() -> list[Any]:
    backends = torch.backends
    names = (backends.cuda.matmul, backends.cudnn.conv, backends.cudnn.rnn, backends.mkldnn.matmul)
    return [backends.cudnn.allow_tf32, torch.get_float32_matmul_precision(), *(name.fp32_precision for name in names)]


@pytest.mark.parametrize("matmul", ["highest", "high", "medium"])
@pytest.mark.parametrize("cudnn", [True, False])
def test_float32_is_not_shortened_meanwhile(matmul: str, cudnn: bool) -> None:
    before = precisions()
    try:
        torch.set_float32_matmul_precision(matmul)
        torch.backends.cudnn.allow_tf32 = cudnn
        chosen = precisions()
        with unrounded_float32():
            assert precisions()[2:] == ["ieee"] * 4
            assert not torch.backends.cudnn.allow_tf32
        assert precisions() == chosen
    finally:
        torch.backends.cudnn.allow_tf32 = before[0]
        torch.set_float32_matmul_precision(before[1])
