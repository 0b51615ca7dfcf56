"""Weights & Biases, the real package, offline."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runs import write_rows

from firesteel.sdk import ConfigError
from training.utils.config import TensorBoardConfig, TrackioConfig, WandBConfig
from training.utils.sinks import MetricsLog
from training.utils.trackers import TrackedRun, Trackers, WandBSink

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


def test_a_run_without_a_key_is_written_offline_beside_the_metrics(tmp_path: Path) -> None:
    run = TrackedRun(tmp_path, {"beta": 0.1})
    wandb = WandBSink(run, WandBConfig(project="dpo", run_name="first"))
    log = MetricsLog(tmp_path / "metrics.jsonl", [wandb])
    for step in (1, 2, 3):
        log.log(step, {"train/margin": float(step)})
    log.close()
    (run,) = (tmp_path / "wandb").glob("offline-run-*")
    assert list(run.glob("*.wandb"))
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_one_that_refuses_is_a_setting_to_mend_and_those_before_it_are_closed(tmp_path: Path) -> None:
    import wandb

    (tmp_path / "tensorboard").write_text("a file where its folder should be")
    asked = Trackers(WandBConfig(project="dpo"), TrackioConfig(), TensorBoardConfig(enabled=True))
    with pytest.raises(ConfigError, match=r"^tensorboard: it is asked for, but cannot be opened: \w+Error"):
        asked.opened(TrackedRun(tmp_path, {}))
    assert wandb.run is None


def ended(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python process of its own: wandb reads its variables once, and has one service in each."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), **environment}
    variables.pop("WANDB_SERVICE", None)  # that of this process
    command = [sys.executable, *arguments]
    return subprocess.run(command, env=variables, capture_output=True, text=True, check=False)


def test_a_key_that_is_none_is_refused_before_any_step(tmp_path: Path) -> None:
    settings = [f"log_path={tmp_path / 'run'}", f"dataset={write_rows(tmp_path / 'rows.jsonl', 4)}"]
    settings += ["base_model=tiny-llama", "wandb.project=dpo"]
    arguments = ["dpo", *(f"--set={setting}" for setting in settings)]
    done = ended("-c", "from firesteel.cli.main import run; run()", *arguments, WANDB_API_KEY="too short")
    assert done.returncode == 2, done.stderr
    assert "wandb: it is asked for, but cannot be opened: " in done.stderr
    assert "WANDB_MODE=offline" in done.stderr
    assert "step 1" not in done.stdout


ITS_PROCESS_DIES = """
import os, signal, sys, time
from pathlib import Path
from training.utils.config import WandBConfig
from training.utils.sinks import MetricsLog
from training.utils.trackers import TrackedRun, WandBSink

folder = Path(sys.argv[1])
log = MetricsLog(folder / "metrics.jsonl", [WandBSink(TrackedRun(folder, {}), WandBConfig(project="dpo"))])
log.log(1, {"train/margin": 1.0})
for started in Path("/proc/self/task").glob("*/children"):
    for child in started.read_text().split():
        os.kill(int(child), signal.SIGKILL)
for step in range(2, 6):
    time.sleep(0.2)
    log.log(step, {"train/margin": 1.0})
log.close()
"""


def test_a_run_goes_on_when_the_process_of_wandb_has_died(tmp_path: Path) -> None:
    done = ended("-c", ITS_PROCESS_DIES, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5
    said = done.stdout.splitlines()
    assert said
    assert all("tracker WandBSink failed" in line for line in said)
