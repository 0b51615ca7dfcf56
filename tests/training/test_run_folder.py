from __future__ import annotations

import json
from pathlib import Path

import pytest

from firesteel.sdk import ConfigError
from training.utils.run_folder import RunFolder


def test_an_earlier_run_moves_aside_and_nothing_is_deleted(tmp_path: Path) -> None:
    first, previous = RunFolder.start(str(tmp_path), {"beta": 1})
    assert previous is None
    first.metrics.write_text("numbers")
    (tmp_path / "adapter").mkdir()
    (tmp_path / "notes.txt").write_text("the user's own")
    for n in (1, 2):
        _, previous = RunFolder.start(str(tmp_path), {"beta": n + 1})
        assert previous == tmp_path / f"previous-{n}"
    assert (tmp_path / "previous-1/metrics.jsonl").read_text() == "numbers"
    assert (tmp_path / "previous-1/adapter").is_dir()
    configs = [tmp_path / folder / "config.json" for folder in ("previous-1", "previous-2", ".")]
    assert [json.loads(path.read_text())["beta"] for path in configs] == [1, 2, 3]
    assert (tmp_path / "notes.txt").read_text() == "the user's own"


def test_a_gap_in_the_numbers_is_never_filled(tmp_path: Path) -> None:
    (tmp_path / "previous-7").mkdir(parents=True)
    (tmp_path / "previous-old").mkdir()
    RunFolder.start(str(tmp_path), {})
    assert RunFolder.start(str(tmp_path), {})[1] == tmp_path / "previous-8"


def test_a_path_that_cannot_be_a_folder_is_refused_by_its_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"log_path: .*file/run: .*can be written to"):
        RunFolder.start(str(tmp_path / "file/run"), {})


def test_the_folder_is_made_with_its_parents(tmp_path: Path) -> None:
    RunFolder.start(str(tmp_path / "a/b"), {})
    assert (tmp_path / "a/b/config.json").exists()
