"""Whose folder it is, and where to go on."""

from pathlib import Path

import pytest

from hf_mbp.cli.errors import UserError
from hf_mbp.cli.output import delete_run, find_checkpoint, refuse_other_run


@pytest.mark.parametrize(
    ("trace", "remedy"),
    [
        ("recipe.yaml", "it has no checkpoint to go on from"),
        ("checkpoint-3", "--resume_from_checkpoint last to go on with it"),
        ("all_results.json", "it has no checkpoint"),
        ("trainer_state.json", "it has no checkpoint"),
    ],
)
def test_an_earlier_run_is_not_overwritten_by_accident(tmp_path: Path, trace: str, remedy: str) -> None:
    (tmp_path / trace).mkdir()
    with pytest.raises(
        UserError,
        match=rf"{tmp_path} holds an earlier run \({trace}\); .*--overwrite_output_dir .*{remedy}",
    ):
        refuse_other_run(tmp_path, overwrite=False, resuming=False)
    refuse_other_run(tmp_path, overwrite=True, resuming=False)
    refuse_other_run(tmp_path, overwrite=False, resuming=True)


def test_other_folders_are_fine(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").touch()
    refuse_other_run(tmp_path, overwrite=False, resuming=False)
    refuse_other_run(tmp_path / "new", overwrite=False, resuming=False)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; name a folder"):
        refuse_other_run(tmp_path / "file", overwrite=True, resuming=False)


def test_overwriting_deletes_what_a_run_wrote_and_nothing_else(tmp_path: Path) -> None:
    for name in ("recipe.yaml", "loss.png", "train_results.json", "notes.txt"):
        (tmp_path / name).touch()
    for name in ("checkpoint-1", "data"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    delete_run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "notes.txt"]
    delete_run(tmp_path / "not there yet")


def test_a_link_is_deleted_and_not_what_it_points_to(tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "file").touch()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoint-1").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    delete_run(tmp_path / "run")
    assert list((tmp_path / "run").iterdir()) == []
    assert (tmp_path / "elsewhere" / "file").exists()


class TestFindCheckpoint:
    @pytest.fixture
    def run(self, tmp_path: Path) -> Path:
        for step in (9, 10):
            (tmp_path / f"checkpoint-{step}").mkdir()
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text("{}")
        return tmp_path

    @pytest.mark.parametrize("wanted", ["last", "true", "True"])
    def test_last(self, run: Path, wanted: str) -> None:
        assert find_checkpoint(wanted, run) == run / "checkpoint-10"

    def test_half_written(self, run: Path) -> None:
        (run / "checkpoint-10" / "trainer_state.json").write_text("{")
        with pytest.warns(UserWarning, match="checkpoint-10 is passed over"):
            assert find_checkpoint("last", run) == run / "checkpoint-9"
        with pytest.raises(UserError, match="checkpoint-10 is not a whole checkpoint of the Trainer"):
            find_checkpoint(str(run / "checkpoint-10"), run)

    def test_path(self, run: Path) -> None:
        assert find_checkpoint(str(run / "checkpoint-9"), run / "elsewhere") == run / "checkpoint-9"

    @pytest.mark.parametrize("wanted", [None, "false"])
    def test_none(self, run: Path, wanted: str | None) -> None:
        assert find_checkpoint(wanted, run) is None

    def test_mistakes(self, run: Path) -> None:
        with pytest.raises(UserError, match=r"'last', but output_dir .*new has no whole checkpoint-\* folder"):
            find_checkpoint("last", run / "new")
        with pytest.raises(UserError, match="there is no folder nowhere"):
            find_checkpoint("nowhere", run)
