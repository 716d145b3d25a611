"""What others get to see of a run: TensorBoard, the Hub and the model card, as from `Trainer`."""

from concurrent.futures import Future
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.contract.scenario import Side, class_rows, compared

NAME = "someone/tiny-classifier"


def test_tensorboard_gets_the_entries_of_stock_and_ours(tmp_path: Path) -> None:
    def scenario(side: Side) -> dict[str, list[tuple[int, float]]]:
        side.trainer(report_to="tensorboard").train()
        (folder,) = {path.parent for path in side.folder.rglob("events.out.tfevents.*")}
        events = EventAccumulator(str(folder)).Reload()
        return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}

    stock, ours = compared(tmp_path, scenario)
    assert (
        {"train/loss", "train/learning_rate", "train/grad_norm", "train/train_runtime"} <= stock.keys() <= ours.keys()
    )
    for tag in ("train/loss", "train/grad_norm", "train/epoch"):
        assert [step for step, _ in ours[tag]] == [step for step, _ in stock[tag]]
        assert [value for _, value in ours[tag]] == pytest.approx([value for _, value in stock[tag]])
    fractions, speeds = ours["train/mbp_padding_fraction"], ours["train/mbp_tokens_per_second"]
    assert [step for step, _ in fractions] == [step for step, _ in speeds] == [1, 2, 3, 4, 5, 6]
    assert all(0 < fraction < 0.3 for _, fraction in fractions)
    assert all(speed > 0 for _, speed in speeds)


class Hub:
    """Stands in for the Hub: notes what would be made and uploaded."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder = folder
        self.calls: list[Any] = []
        monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", self.create_repo)
        monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", self.upload_folder)

    def create_repo(self, name: str, **options: Any) -> huggingface_hub.RepoUrl:
        self.calls.append(("create", name, options))
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{name}")

    def upload_folder(self, *, folder_path: str, run_as_future: bool, **options: Any) -> Any:
        folder = Path(folder_path)
        files = sorted(path.name for path in folder.iterdir() if not path.name.startswith("_"))
        self.calls.append(("upload", folder.relative_to(self.folder).as_posix(), run_as_future, files, options))
        commit = huggingface_hub.CommitInfo(
            commit_url=f"https://huggingface.co/{NAME}/commit/0", commit_message="", commit_description="", oid="0"
        )
        future: Future[Any] = Future()
        future.set_result(commit)
        return future if run_as_future else commit


@pytest.mark.parametrize("while_training", [False, True])
def test_the_same_is_pushed_to_the_hub(while_training: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scenario(side: Side) -> list[Any]:
        hub = Hub(side.folder, monkeypatch)
        trainer = side.trainer(
            push_to_hub=while_training,
            hub_model_id=NAME,
            hub_strategy="all_checkpoints",
            hub_private_repo=True,
            save_strategy="steps",
            save_steps=2,
        )
        trainer.train()
        commit = trainer.push_to_hub(commit_message="All done", tags="tiny")
        assert commit.oid == "0"
        return hub.calls

    stock, ours = compared(tmp_path, scenario)
    assert ours == stock
    assert stock[0][:2] == ("create", NAME)
    assert stock[-1][4]["commit_message"] == "All done"
    uploads = [call[1] for call in stock[1:]]
    checkpoints = [step for step in (2, 4, 6) for _ in range(while_training)]
    assert uploads == [*(path for step in checkpoints for path in (".", f"checkpoint-{step}")), "."]


def test_the_model_card_says_the_same(tmp_path: Path) -> None:
    def scenario(side: Side) -> str:
        trainer = side.trainer(
            eval_dataset=class_rows(12),
            eval_strategy="epoch",
            compute_metrics=lambda prediction: {"accuracy": (prediction.predictions.argmax(-1) == 1).mean()},
        )
        trainer.train()
        trainer.create_model_card(model_name="tiny", tasks="text-classification", dataset="made up", tags=["tiny"])
        return (side.folder / "README.md").read_text()

    stock, ours = compared(tmp_path, scenario)
    assert ours == stock
    for words in ("generated_from_trainer", "train_batch_size: 16", "| Training Loss |", "Accuracy"):
        assert words in ours
