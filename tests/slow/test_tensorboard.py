"""TensorBoard, the real package: event files are read back by its own reader."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "training"))
from runs import config

from training.recipes.dpo_loop import main
from training.utils.trackers import TENSORBOARD, TensorBoardSink, TrackedRun

pytestmark = pytest.mark.slow


def curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def expected(run: Path) -> dict[str, list[tuple[int, float]]]:
    """The same from metrics.jsonl, in the precision that event files have."""
    found: dict[str, list[tuple[int, Any]]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        record = json.loads(line)
        for name, value in record.items():
            if name != "train/step":
                found.setdefault(name, []).append((record["train/step"], pytest.approx(value, rel=1e-6)))
    return found


def test_every_number_of_a_run_is_a_point_of_its_curve(tmp_path: Path) -> None:
    settings = {"eval_fraction": 0.3, "eval_interval": 2, "tensorboard": {"enabled": True}}
    main(config(tmp_path, count=10, **settings))
    drawn = curves(tmp_path / "run" / TENSORBOARD)
    assert drawn == expected(tmp_path / "run")
    assert {"train/margin", "eval/accuracy_low", "eval/source/part 0/margin"} <= drawn.keys()


def test_steps_that_are_made_again_replace_those_of_a_killed_process(tmp_path: Path) -> None:
    killed = TensorBoardSink(TrackedRun(tmp_path, {}))
    for step in range(1, 6):
        killed.log(step, {"train/margin": float(step)})
    killed.close()
    again = TensorBoardSink(TrackedRun(tmp_path, {}, done=3))
    for step in range(4, 8):
        again.log(step, {"train/margin": 10.0 * step})
    again.close()
    assert curves(tmp_path / TENSORBOARD)["train/margin"] == [
        *((step, step) for step in range(1, 4)),
        *((step, 10 * step) for step in range(4, 8)),
    ]


def test_a_run_that_goes_on_is_one_curve_and_another_tracker_is_no_other_run(tmp_path: Path) -> None:
    main(config(tmp_path, dcp_save_interval=1, epochs=1, tensorboard={"enabled": True}))
    main(config(tmp_path, dcp_save_interval=1, epochs=2))  # a change of trackers alone is none of the run
    main(config(tmp_path, dcp_save_interval=1, epochs=3, tensorboard={"enabled": True}))
    steps = [step for step, _ in curves(tmp_path / "run" / TENSORBOARD)["train/margin"]]
    assert steps == [1, 2, 3, 7, 8, 9]  # it was off from 4 to 6


def test_a_run_that_starts_anew_leaves_the_old_curves_aside(tmp_path: Path) -> None:
    for _ in range(2):
        main(config(tmp_path, tensorboard={"enabled": True}))
    for folder in (tmp_path / "run", tmp_path / "run/previous-1"):
        assert [step for step, _ in curves(folder / TENSORBOARD)["train/margin"]] == [1, 2, 3]
