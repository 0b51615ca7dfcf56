from __future__ import annotations

import json
from pathlib import Path

import pytest

from firesteel.sdk import ConfigError
from training.utils import run_folder
from training.utils.run_folder import RunFolder

RUN = {"log_path": "x", "base_model": "tiny-llama", "dataset": "pairs.jsonl"}


def start(path: Path, **config: object) -> Path | None:
    """A run that ends at once; where the one before it went."""
    run = RunFolder.open(str(path))
    previous = run.set_aside()
    run.write_config({**RUN, **config})
    run.close()
    return previous


def test_an_earlier_run_moves_aside_and_nothing_is_deleted(tmp_path: Path) -> None:
    assert start(tmp_path, beta=1) is None
    (tmp_path / "metrics.jsonl").write_text("numbers")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    for n in (1, 2):
        assert start(tmp_path, beta=n + 1) == tmp_path / f"previous-{n}"
    assert (tmp_path / "previous-1/metrics.jsonl").read_text() == "numbers"
    assert (tmp_path / "previous-1/adapter").is_dir()
    configs = [tmp_path / folder / "config.json" for folder in ("previous-1", "previous-2", ".")]
    assert [json.loads(path.read_text())["beta"] for path in configs] == [1, 2, 3]
    assert (tmp_path / "notes.txt").read_text() == "the user's own"


def test_a_report_or_curves_of_the_users_own_do_not_make_a_folder_anothers(tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("mine")
    (tmp_path / "tensorboard").mkdir()
    start(tmp_path)
    (tmp_path / "other").mkdir()
    (tmp_path / "other/metrics.jsonl").write_text("mine")
    with pytest.raises(ConfigError, match=r"holds metrics\.jsonl, but is not the folder of a run"):
        start(tmp_path / "other")


def test_a_gap_in_the_numbers_is_never_filled(tmp_path: Path) -> None:
    (tmp_path / "previous-7").mkdir(parents=True)
    (tmp_path / "previous-old").mkdir()
    start(tmp_path)
    assert start(tmp_path) == tmp_path / "previous-8"


def test_a_path_that_cannot_be_a_folder_is_refused_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log_path: .*file/run: .*can be written to"):
        RunFolder.open(str(tmp_path / "file/run"))


def test_the_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    start(tmp_path / "a/b")
    assert (tmp_path / "a/b/config.json").exists()


def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    (tmp_path / "model").mkdir()
    with pytest.raises(ConfigError, match=r"holds model, config\.json, but is not the folder of a run"):
        RunFolder.open(str(tmp_path))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model"]
    (tmp_path / "config.json").unlink()
    (tmp_path / "model").rmdir()
    assert start(tmp_path) is None  # the refusal left no lock behind


def test_a_takeover_fences_the_process_that_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_folder, "TAKEOVER_SECONDS", 0.1)  # the other one hangs
    first = RunFolder.open(str(tmp_path))
    first.refuse_if_taken_over()
    second = RunFolder.open(str(tmp_path), takeover=True)
    second.refuse_if_taken_over()
    with pytest.raises(ConfigError, match=r"was taken over by process \d+ on .*writes nothing more"):
        first.refuse_if_taken_over()
    first.close()  # leaves the other's name there
    second.refuse_if_taken_over()
    second.close()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_a_run_is_writing_to_is_refused_to_another(tmp_path: Path) -> None:
    first = RunFolder.open(str(tmp_path))
    with pytest.raises(ConfigError, match=r"another run \(process \d+ on .*\) is writing to"):
        RunFolder.open(str(tmp_path))
    first.write_config(RUN)
    first.close()
    assert start(tmp_path) == tmp_path / "previous-1"
