"""Losses that compare all rows of a mini-batch: the gradient is that of plain PyTorch on the whole of it."""

import copy
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hf_mbp import EmbedsRows, MBPTrainer, check_equivalence
from hf_mbp.distributed import Ranks
from hf_mbp.two_passes import Part, TwoPasses
from tests.contrastive import SCALE, Contrastive, bert, embedded, in_batch_negatives, pair_rows
from tests.faults import Faults
from tests.helpers import Pad, Recorder, mbp_trainer, relative_error, whole_gradients
from tests.simulated_ranks import World

EXACT = 1e-12


def plain(model: Any, rows: list[dict[str, Any]]) -> tuple[float, dict[str, torch.Tensor]]:
    """Of all rows at once."""
    inputs = Pad()(rows)
    return whole_gradients(
        model,
        lambda copied: in_batch_negatives((embedded(copied, inputs, "query"), embedded(copied, inputs, "passage"))),
    )


def trained(model: Any, rows: list[dict[str, Any]], folder: Path, **changes: Any) -> tuple[Any, Recorder]:
    recorder = Recorder()
    options = {"trainer_class": Contrastive, "callbacks": [recorder], "on_inexact": "error", **changes}
    trainer = mbp_trainer(model, rows, folder, **options)
    trainer.train()
    return trainer, recorder


@pytest.mark.parametrize("shape", [(16, 1), (4, 4)], ids=["16x1", "4x4"])
@pytest.mark.parametrize("max_tokens", [64, 10_000], ids=["split", "whole"])
def test_the_gradient_is_that_of_the_whole_mini_batch(max_tokens: int, shape: tuple[int, int], tmp_path: Path) -> None:
    model, rows = bert(), pair_rows()
    loss, gradients = plain(model, rows)
    batches = {"per_device_train_batch_size": shape[0], "gradient_accumulation_steps": shape[1]}
    trainer, recorder = trained(model, rows, tmp_path, max_tokens_per_micro_batch=max_tokens, **batches)
    assert (recorder.logs[0]["mbp_micro_batches"] > 3) == (max_tokens == 64)
    assert relative_error(gradients, recorder.gradients[0]) < EXACT
    assert recorder.logs[0]["loss"] == pytest.approx(loss, rel=1e-6)
    assert isinstance(trainer, EmbedsRows)


def test_the_same_rows_split_by_their_own_losses_are_not_exact(tmp_path: Path) -> None:
    """What the two passes are for: the gradient without them is another one."""

    class OnePass(MBPTrainer):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
            return in_batch_negatives((embedded(model, inputs, "query"), embedded(model, inputs, "passage")))

    model, rows, recorder = bert(), pair_rows(), Recorder()
    options = {"trainer_class": OnePass, "callbacks": [recorder], "check_at_start": False}
    mbp_trainer(model, rows, tmp_path, **options).train()
    assert relative_error(plain(model, rows)[1], recorder.gradients[0]) > 0.1


def test_the_second_pass_draws_the_dropout_of_the_first(tmp_path: Path) -> None:
    model = bert(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.3).eval()  # as `from_pretrained` returns it
    trainer, _ = trained(model, pair_rows(), tmp_path, check_at_start=False)
    first = [embedding for has_graph, embedding in trainer.seen if not has_graph]
    second = [embedding for has_graph, embedding in trainer.seen if has_graph]
    assert len(first) == len(second) > 3
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))
    model.eval()
    assert not torch.equal(embedded(model, Pad()(pair_rows()[:1]), "query"), first[0][:1])


def test_classes_of_rows_are_handed_on_and_parameters_of_the_loss_are_trained(tmp_path: Path) -> None:
    class Supervised(MBPTrainer):
        def embed_rows(self, model: Any, inputs: Any) -> Any:
            return {"embedding": embedded(model, inputs, "query"), "class": inputs["label"]}

        def loss_of_embeddings(self, embeddings: Any) -> torch.Tensor:
            return supervised(embeddings["embedding"], embeddings["class"], self.temperature.scale)

    def supervised(embedding: torch.Tensor, classes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        is_same = (classes[:, None] == classes).double()
        return torch.nn.functional.binary_cross_entropy_with_logits(scale * embedding @ embedding.T, is_same)

    model, recorder = bert(), Recorder()
    rows = [{**row, "label": index % 3} for index, row in enumerate(pair_rows())]
    inputs, scale = Pad()(rows), torch.tensor(SCALE, dtype=torch.float64, requires_grad=True)
    _, gradients = whole_gradients(
        model, lambda copied: supervised(embedded(copied, inputs, "query"), inputs["label"], scale)
    )
    options = {"trainer_class": Supervised, "callbacks": [recorder], "on_inexact": "error"}
    trainer = mbp_trainer(model, rows, tmp_path, **options)
    trainer.temperature = torch.nn.Module()
    trainer.temperature.scale = torch.nn.Parameter(scale.detach().clone())
    trainer.train()
    assert recorder.logs[0]["mbp_micro_batches"] > 3
    assert relative_error(gradients, recorder.gradients[0]) < EXACT
    assert float(trainer.temperature.scale.grad) == pytest.approx(float(scale.grad), rel=1e-9)


@pytest.mark.parametrize("stage", ["forward", "backward"])
def test_running_out_of_memory_in_the_second_pass_changes_nothing(stage: str, tmp_path: Path) -> None:
    model, rows = bert(), pair_rows()
    _, gradients = plain(model, rows)
    faults = Faults(layer=model.encoder.layer[1], stage=stage, passes={2}).install(model)
    _, recorder = trained(model, rows, tmp_path, check_at_start=False)
    assert faults.raised == 1
    assert recorder.logs[0]["mbp_oom_retries"] == 1
    assert relative_error(gradients, recorder.gradients[0]) < EXACT


def test_running_out_of_memory_in_the_first_pass_changes_nothing(tmp_path: Path) -> None:
    class Failing(Contrastive):
        calls = 0

        def embed_rows(self, model: Any, inputs: Any) -> Any:
            Failing.calls += 1
            if Failing.calls == 3:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().embed_rows(model, inputs)

    model, rows = bert(), pair_rows()
    _, gradients = plain(model, rows)
    _, recorder = trained(model, rows, tmp_path, trainer_class=Failing, check_at_start=False)
    assert recorder.logs[0]["mbp_oom_retries"] == 1
    assert relative_error(gradients, recorder.gradients[0]) < EXACT


def test_the_check_compares_the_two_passes_with_one(tmp_path: Path) -> None:
    trainer = mbp_trainer(bert(), pair_rows(), tmp_path, trainer_class=Contrastive)
    report = check_equivalence(trainer)
    assert report.is_exact
    assert report.num_micro_batches > 1


def test_the_check_finds_embeddings_that_depend_on_other_rows(tmp_path: Path) -> None:
    class Centred(Contrastive):
        def embed_rows(self, model: Any, inputs: Any) -> Any:
            queries, passages = super().embed_rows(model, inputs)
            return queries - queries.mean(dim=0), passages

    trainer = mbp_trainer(bert(), pair_rows(), tmp_path, trainer_class=Centred)
    assert not check_equivalence(trainer).is_exact


def test_evaluation_has_the_loss_of_each_batch(tmp_path: Path) -> None:
    model, rows = bert(), pair_rows()
    trainer = mbp_trainer(
        model, rows, tmp_path, trainer_class=Contrastive, eval_dataset=rows, per_device_eval_batch_size=8
    )
    metrics = trainer.evaluate()
    halves = [float(plain(model.eval(), half)[0]) for half in (rows[:8], rows[8:])]
    assert metrics["eval_loss"] == pytest.approx(sum(halves) / 2, rel=1e-6)


def test_gradients_of_half_precision_are_taken_in_float32(tmp_path: Path) -> None:
    rows = pair_rows()
    model = bert().to(torch.bfloat16)
    _, gradients = plain(copy.deepcopy(model).float(), rows)
    trainer, recorder = trained(model, rows, tmp_path)
    assert trainer.seen[-1][1].dtype == torch.bfloat16
    assert relative_error(gradients, recorder.gradients[0]) < 0.05


class Scaled:
    """As much of a trainer as the passes ask for, whose losses a scaler of fp16 multiplies."""

    def __init__(self, scale: float) -> None:
        self.args = SimpleNamespace(device=torch.device("cpu"))
        self.accelerator = SimpleNamespace(scaler=SimpleNamespace(get_scale=lambda: scale))
        self.compute_loss_context_manager = nullcontext
        self._prepare_inputs = dict
        self.sharpness = torch.nn.Parameter(torch.tensor(2.0, dtype=torch.float64))

    def embed_rows(self, model: Any, inputs: Any) -> Any:
        return {"rows": model(inputs["rows"]), "classes": inputs["rows"].argmax(dim=1)}

    def loss_of_embeddings(self, embeddings: Any) -> torch.Tensor:
        similar = embeddings["rows"] @ embeddings["rows"].T * self.sharpness
        return torch.nn.functional.cross_entropy(similar, embeddings["classes"])


@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_gradients_are_scaled_once_and_fillers_add_nothing(scale: float) -> None:
    torch.manual_seed(0)
    rows = torch.randn(5, 3, dtype=torch.float64)
    model, trainer = torch.nn.Linear(3, 2).double(), Scaled(scale)
    parameters = [*model.parameters(), trainer.sharpness]
    loss = trainer.loss_of_embeddings(trainer.embed_rows(model, {"rows": rows}))
    expected = torch.autograd.grad(loss, parameters)

    groups = [rows[:2], rows[:1], rows[2:]]
    parts = [
        Part(key=object(), inputs={"rows": x}, share=share) for x, share in zip(groups, (0.4, 0, 0.6), strict=True)
    ]
    passes = TwoPasses(trainer)
    passes.first(model, parts)
    for part in parts:
        with passes.second(part.key):
            value = passes.compute_loss(model, part.inputs)
        assert float(value.detach()) == pytest.approx(float(loss.detach()) if part.share else 0)
        (value * part.share * scale).backward()
    for parameter, gradient in zip(parameters, expected, strict=True):
        torch.testing.assert_close(parameter.grad / scale, gradient)


def test_what_was_no_part_of_the_first_pass_adds_nothing() -> None:
    """As what a rank runs only to keep in step with the others; nor does what was part of one before."""
    model, trainer, rows = torch.nn.Linear(3, 2).double(), Scaled(1.0), torch.eye(2, 3).double()
    before, now = (Part(key=object(), inputs={"rows": rows}, share=1.0) for _ in range(2))
    passes = TwoPasses(trainer)
    for part in (before, now):
        passes.first(model, [part])
    trainer.sharpness.grad = None
    for key in (object(), before.key):
        with passes.second(key):
            passes.compute_loss(model, {"rows": rows}).backward()
    assert all(not bool(parameter.grad.any()) for parameter in model.parameters())
    assert trainer.sharpness.grad is None


def test_embeddings_in_half_precision_are_compared_in_float32() -> None:
    class Looks(Scaled):
        def loss_of_embeddings(self, embeddings: Any) -> torch.Tensor:
            self.seen = {name: value.dtype for name, value in embeddings.items()}
            return super().loss_of_embeddings(embeddings)

    trainer = Looks(1.0)
    part = Part(key=object(), inputs={"rows": torch.eye(2, 3).bfloat16()}, share=1.0)
    TwoPasses(trainer).first(torch.nn.Linear(3, 2).bfloat16(), [part])
    assert trainer.seen == {"rows": torch.float32, "classes": torch.int64}


def ranks_of(world: World, index: int) -> Ranks:
    accelerator: Any = SimpleNamespace(
        num_processes=world.count,
        process_index=index,
        device=torch.device("cpu"),
        gather=lambda tensor: torch.cat(world.exchange(index, tensor)),
    )
    return Ranks(accelerator)


def test_rows_of_all_ranks_come_in_their_order_and_only_own_ones_have_a_gradient() -> None:
    world, counts = World(3), [2, 0, 1]

    def on_rank(index: int) -> tuple[list[float], bool]:
        own = torch.full((counts[index], 2), float(index), requires_grad=True)
        rows = ranks_of(world, index).gather_rows(own, counts)
        (rows.sum() + own.sum() * 0).backward()
        return rows[:, 0].tolist(), bool((own.grad == 1).all())

    assert world.run(on_rank) == [([0.0, 0.0, 2.0], True)] * 3


def test_ranks_tell_each_other_large_counts_exactly() -> None:
    world, many = World(2), 2**40 + 1
    assert world.run(lambda index: ranks_of(world, index).gather(many + index)) == [[[many], [many + 1]]] * 2


class OnlyEmbeds(MBPTrainer):
    def embed_rows(self, model: Any, inputs: Any) -> Any: ...


class HasALossToo(Contrastive):
    def compute_loss(self, *args: Any, **kwargs: Any) -> Any: ...


@pytest.mark.parametrize(
    ("trainer_class", "message"),
    [
        (OnlyEmbeds, "OnlyEmbeds has embed_rows, but no loss_of_embeddings: define both."),
        (HasALossToo, "HasALossToo has embed_rows and loss_of_embeddings, and a compute_loss or compute_loss_func"),
    ],
)
def test_half_a_protocol_is_refused(trainer_class: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        mbp_trainer(bert(), pair_rows(), tmp_path, trainer_class=trainer_class)


@pytest.mark.parametrize(
    ("embeddings", "error", "message"),
    [
        ((), TypeError, r"embed_rows must return a tensor \[rows, ...\], or a tuple"),
        ("text", TypeError, "got 'text'"),
        (torch.tensor(1.0), TypeError, "embed_rows must return"),
        ((torch.ones(2, 3), torch.ones(1, 3)), ValueError, r"got the shapes \(2, 3\), \(1, 3\)"),
    ],
)
def test_what_is_no_embedding_is_refused(embeddings: Any, error: type[Exception], message: str, tmp_path: Path) -> None:
    class Odd(Contrastive):
        def embed_rows(self, model: Any, inputs: Any) -> Any:
            return embeddings

    with pytest.raises(error, match=message):
        trained(bert(), pair_rows(), tmp_path, trainer_class=Odd, check_at_start=False)


def test_a_loss_that_is_no_number_is_refused(tmp_path: Path) -> None:
    class Odd(Contrastive):
        def loss_of_embeddings(self, embeddings: Any) -> torch.Tensor:
            return embeddings[0]

    with pytest.raises(TypeError, match="loss_of_embeddings must return one number with a gradient, got"):
        trained(bert(), pair_rows(), tmp_path, trainer_class=Odd, check_at_start=False)
