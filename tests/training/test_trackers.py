"""Trackers that are not installed. What the real ones write: tests/slow/test_trackers.py."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from runs import config

from firesteel.sdk import ConfigError
from training.recipes.dpo_loop import main
from training.utils import trackers
from training.utils.trackers import TrackedRun


@pytest.fixture
def _nothing_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The one thing that differs between machines is whether the package can be found.
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)


@pytest.mark.usefixtures("_nothing_installed")
@pytest.mark.parametrize(
    ("name", "setting"), [("trackio", {"project": "p"}), ("tensorboard", {"enabled": True})]
)
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_read(
    tmp_path: Path, name: str, setting: dict[str, Any]
) -> None:
    settings = config(tmp_path, **{name: setting})
    Path(settings.dataset).unlink()
    with pytest.raises(ConfigError, match=rf"^{name}: .* pip install 'firesteel\[{name}\]'"):
        main(settings)
    assert not Path(settings.log_path).exists()


@pytest.mark.usefixtures("_nothing_installed")
def test_trackers_that_nobody_asked_for_need_not_be_there(tmp_path: Path) -> None:
    asked = config(tmp_path).trackers
    asked.refuse_missing()
    assert asked.opened(TrackedRun(tmp_path, {})) == []


@pytest.mark.usefixtures("_nothing_installed")
def test_a_missing_wandb_is_one_warning_that_names_the_extra(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    asked = config(tmp_path, wandb={"project": "p"}).trackers
    asked.refuse_missing()
    assert asked.opened(TrackedRun(tmp_path, {})) == []
    assert [record.message for record in caplog.records] == [
        "wandb is configured but not installed (pip install 'firesteel[wandb]'); going on without"
    ]
