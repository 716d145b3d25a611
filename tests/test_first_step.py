"""The first step of an optimizer, in which its states may find no memory, starts again or says what it needs."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import TrainerCallback

from hf_mbp.first_step import protect_first_step
from tests.faults import MESSAGE
from tests.recovery_runs import classifier, trained


@pytest.mark.parametrize("failing", range(0, 30, 3))
def test_the_first_step_of_the_optimizer_starts_again(
    failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of parameters: when the states of the second fail, the first has been stepped already."""
    options = {"optim": "adamw_torch", "weight_decay": 0.1, "max_steps": 3}
    expected = trained(classifier(), tmp_path, **options)
    calls, real = [0], torch.zeros_like
    inside = [False]

    def zeros_like(*args: Any, **kwargs: Any) -> Any:
        calls[0] += inside[0]
        if inside[0] and calls[0] == failing + 1:
            raise torch.OutOfMemoryError(MESSAGE)
        return real(*args, **kwargs)

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            inside[0] = True

        def on_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            inside[0] = False

    monkeypatch.setattr(torch, "zeros_like", zeros_like)
    trainer = trained(classifier(), tmp_path, callbacks=[Watch()], **options)
    assert calls[0] > 30  # the states were made after all, and the fault came
    for name, value in expected.model.state_dict().items():
        torch.testing.assert_close(trainer.model.state_dict()[name], value, rtol=0, atol=1e-9, msg=name)


def test_states_that_never_fit_are_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> Any:
        raise torch.OutOfMemoryError(MESSAGE)

    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            monkeypatch.setattr(torch, "zeros_like", fail)

    model = classifier()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(MemoryError, match=r"no memory for the states of the optimizer.*optim='adafactor'"):
        trained(model, tmp_path, callbacks=[Watch()], optim="adamw_torch")
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def scaled_step(optimizer: Any, scaler: Any, weight: Any, value: float) -> None:
    scaler.scale(weight.sum() * value).backward()
    scaler.step(optimizer)
    scaler.update()


@pytest.mark.parametrize("fused", [False, True])
def test_the_first_step_with_a_gradient_scaler(fused: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The states of fused AdamW cannot be made at first; the scaler goes on relying on what the optimizer is."""
    outcomes = []
    for fails in (False, True):
        weight = nn.Parameter(torch.ones(3))
        optimizer = torch.optim.AdamW([weight], lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu")
        protect_first_step(optimizer, has_room_for=lambda size: True)
        calls, real = [], torch.zeros_like

        def zeros_like(*args: Any, calls: Any = calls, real: Any = real, fails: bool = fails, **kwargs: Any) -> Any:
            calls.append(1)
            if fails and len(calls) == 1:
                raise torch.OutOfMemoryError(MESSAGE)
            return real(*args, **kwargs)

        with monkeypatch.context() as patched:
            patched.setattr(torch, "zeros_like", zeros_like)
            scaled_step(optimizer, scaler, weight, 1.0)
        assert len(calls) > fails
        outcomes.append(weight.detach().clone())
    assert torch.equal(*outcomes)
    assert not torch.equal(outcomes[0], torch.ones(3))


def test_a_step_without_room_for_a_copy_is_not_protected() -> None:
    weight = nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([weight])
    asked: list[int] = []

    def has_room_for(size: int) -> bool:
        asked.append(size)
        return False

    weight.grad = torch.ones(3)
    protect_first_step(optimizer, has_room_for=has_room_for)
    assert asked == [12]
    assert "step" not in vars(optimizer)


@pytest.mark.parametrize(("foreach", "size"), [(False, 12), (True, 24)])
def test_there_has_to_be_room_for_what_the_step_takes_too(foreach: bool, size: int) -> None:
    weight, unused = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(5))
    weight.grad = torch.ones(3)
    asked: list[int] = []
    protect_first_step(torch.optim.AdamW([weight, unused], foreach=foreach), has_room_for=asked.append)
    assert asked == [size]


class Counts(torch.optim.Optimizer):
    """Keeps its count of steps among the options, as schedule-free optimizers do, and fails when told to, halfway."""

    def __init__(self, parameters: Any, errors: list[Exception]) -> None:
        super().__init__(parameters, {"k": 0, "foreach": None})
        self.errors, self.foreach = errors, []

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["k"] += 1
            self.foreach.append(group["foreach"])
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self.state[parameter]["seen"] = True
                    parameter.data -= parameter.grad
                if self.errors:
                    raise self.errors.pop()


def counts(*errors: Exception, protected: bool = True) -> tuple[Counts, list[nn.Parameter]]:
    parameters = [nn.Parameter(torch.ones(2)) for _ in range(3)]
    for parameter in parameters[:2]:
        parameter.grad = torch.full((2,), 0.25)
    optimizer = Counts([{"params": parameters[:2]}, {"params": parameters[2:]}], list(errors))
    if protected:
        protect_first_step(optimizer, has_room_for=lambda size: True)
    return optimizer, parameters


def test_options_that_the_step_changes_are_put_back_with_the_parameters() -> None:
    optimizer, parameters = counts(torch.OutOfMemoryError(MESSAGE))
    optimizer.step()
    assert [parameter.tolist() for parameter in parameters] == [[0.75] * 2, [0.75] * 2, [1.0] * 2]
    assert [group["k"] for group in optimizer.param_groups] == [1, 1]
    assert optimizer.foreach == [None, False, False], "then one parameter after the other"
    assert [group["foreach"] for group in optimizer.param_groups] == [None, None]


def test_steps_after_the_first_are_not_protected() -> None:
    optimizer, _ = counts(protected=False)
    optimizer.step()
    protect_first_step(optimizer, has_room_for=lambda size: True)
    assert "step" not in vars(optimizer)


def test_other_errors_of_the_first_step_pass() -> None:
    optimizer, _ = counts(ValueError("another"))
    with pytest.raises(ValueError, match="another"):
        optimizer.step()
    assert optimizer.foreach == [None]


def test_without_memory_for_copies_the_step_is_as_it_would_be(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer, _ = counts(torch.OutOfMemoryError(MESSAGE))
    monkeypatch.setattr("hf_mbp.first_step.unless_out_of_memory", lambda run: None)
    with pytest.raises(torch.OutOfMemoryError):
        optimizer.step()
    assert optimizer.foreach == [None]
