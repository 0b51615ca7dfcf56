"""Trackers that are missing, refuse or fail. What the real ones write: tests/slow/test_wandb"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
from runs import config, numbers

from firesteel.sdk import ConfigError
from training.recipes.dpo_loop import Config, main
from training.utils import trackers
from training.utils.sinks import Sink
from training.utils.trackers import TrackedRun
from training.utils.training_run import run_to_its_end


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
@pytest.mark.parametrize("setting", ["project", "entity"])
def test_a_missing_wandb_is_one_warning_that_names_the_extra(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, setting: str
) -> None:
    asked = config(tmp_path, wandb={setting: "p"}).trackers
    asked.refuse_missing()
    assert asked.opened(TrackedRun(tmp_path, {})) == []
    assert [record.message for record in caplog.records] == [
        "wandb is configured but not installed (pip install 'firesteel[wandb]'); going on without"
    ]


@dataclass(frozen=True)
class Faulty:
    """A tracker of somebody's own, that refuses to be opened, or fails at a step."""

    refuses: bool = False
    fails_at: int | None = None

    def refuse_missing(self) -> None:
        """Nothing has to be installed."""

    def opened(self, run: TrackedRun) -> list[Sink]:
        (run.folder / "wandb").mkdir()
        if self.refuses:
            raise ConfigError("faulty: no such project")
        return [FaultySink(self.fails_at)]


@dataclass(frozen=True)
class FaultySink:
    """See `Faulty`."""

    fails_at: int | None

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Fail where that is asked for."""
        if step == self.fails_at:
            raise ConnectionResetError("the other side has gone")

    def close(self) -> None:
        """Fail always."""
        raise TimeoutError("nobody answers")


class TrackedConfig(Config):
    """DPO with that tracker."""

    faulty: ClassVar[Faulty]

    @property
    def trackers(self) -> Faulty:  # type: ignore[override]
        """The faulty one alone."""
        return self.faulty


def tracked(settings: Config, faulty: Faulty) -> Config:
    class OfThisTest(TrackedConfig):
        pass

    OfThisTest.faulty = faulty
    return OfThisTest(**settings.model_dump(exclude_unset=True))


def test_a_run_does_not_end_with_its_tracker(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    quiet = main(config(tmp_path / "quiet"))
    summary = run_to_its_end(tracked(config(tmp_path / "tracked"), Faulty(fails_at=2)))
    assert summary.steps == quiet.steps == 3
    assert numbers(tmp_path / "tracked/run") == numbers(tmp_path / "quiet/run")
    said = [line for line in capsys.readouterr().out.splitlines() if "FaultySink" in line]
    assert [line.split(":")[1] for line in said] == [" step 2", " closing it"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_a_tracker_that_refuses_leaves_an_earlier_run_as_it_was(tmp_path: Path) -> None:
    settings = config(tmp_path, dcp_save_interval=2)
    main(settings)
    before = contents(tmp_path / "run")
    again = config(tmp_path, dcp_save_interval=2, resume="never")
    with pytest.raises(ConfigError, match="no such project"):
        run_to_its_end(tracked(again, Faulty(refuses=True)))
    assert contents(tmp_path / "run") == before
    assert not list((tmp_path / "run").glob("previous-*"))
    assert not (tmp_path / "run/wandb").exists()


def test_a_tracker_that_refuses_a_run_that_would_go_on_leaves_it_finished(tmp_path: Path) -> None:
    settings = config(tmp_path, dcp_save_interval=1)
    main(settings)
    before = contents(tmp_path / "run")
    again = config(tmp_path, dcp_save_interval=1, resume="step-1")
    with pytest.raises(ConfigError, match="no such project"):
        run_to_its_end(tracked(again, Faulty(refuses=True)))
    assert contents(tmp_path / "run") == before


def test_a_refusal_is_told_whatever_becomes_of_the_trackers_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(trackers, "TrackioSink", lambda run, *names: FaultySink(None))
    asked = config(tmp_path, trackio={"project": "p"}, tensorboard={"enabled": True}).trackers

    def refusing(run: TrackedRun) -> Sink:
        raise PermissionError("not yours")

    monkeypatch.setattr(trackers, "TensorBoardSink", refusing)
    with pytest.raises(ConfigError, match=r"^tensorboard: .* PermissionError: not yours"):
        asked.opened(TrackedRun(tmp_path, {}))
    assert "closing it: tracker FaultySink failed: TimeoutError" in caplog.text


def test_a_tracker_that_refuses_a_first_run_leaves_the_folder_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such project"):
        run_to_its_end(tracked(config(tmp_path), Faulty(refuses=True)))
    assert contents(tmp_path / "run") == {}
