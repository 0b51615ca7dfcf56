"""trackio, the real package, in a process of its own: where its database lies is settled when it is imported."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# Whoever looks up or dials anything is told so; a token is there, with which trackio would ask the hub for a name.
PROGRAM = """
import socket, sys

def refused(*args, **kwargs):
    print("DIALLED", args, flush=True)
    raise OSError("no network here")

socket.getaddrinfo = socket.socket.connect = socket.create_connection = refused
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from runs import config
from training.recipes.dpo_loop import main

for epochs in map(int, sys.argv[3:]):
    main(config(Path(sys.argv[2]), count=6, eval_fraction=0.3, dcp_save_interval=1, epochs=epochs,
                trackio={"project": "dpo", "run_name": "first"}))
"""


def tracked(folder: Path, *epochs: int) -> str:
    """Runs in `folder`, each to so many epochs; what they printed."""
    folder.mkdir(exist_ok=True)
    environment = dict(os.environ, TRACKIO_DIR=str(folder / "trackio"), HF_HOME=str(folder / "hf"))
    environment |= {
        "HF_TOKEN": "hf_not_one",
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
    }
    del environment["HF_HUB_OFFLINE"]  # which all tests have
    helpers = str(Path(__file__).parents[1] / "training")
    command = [sys.executable, "-c", PROGRAM, helpers, str(folder), *map(str, epochs)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def stored(folder: Path, query: str) -> list[tuple[Any, ...]]:
    (path,) = (folder / "trackio").glob("*.db")
    return sqlite3.connect(path).execute(query).fetchall()


def test_every_number_of_a_run_is_in_its_database_and_nothing_is_dialled(tmp_path: Path) -> None:
    assert "DIALLED" not in tracked(tmp_path, 1)
    rows = stored(tmp_path, "SELECT step, metrics FROM metrics ORDER BY id")
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [(step, json.loads(metrics)) for step, metrics in rows] == [
        (line.pop("train/step"), line) for line in lines
    ]
    ((name, settings),) = stored(tmp_path, "SELECT run_name, config FROM configs")
    assert name == "first"
    assert json.loads(settings)["base_model"] == "tiny-llama"


def test_a_run_that_goes_on_is_another_run_of_its_group_and_no_step_is_twice_in_one(tmp_path: Path) -> None:
    tracked(tmp_path, 1, 2)
    rows = stored(tmp_path, "SELECT run_name, step, metrics FROM metrics ORDER BY id")
    trained = [(run, step) for run, step, metrics in rows if "train/margin" in json.loads(metrics)]
    steps = {name: [step for run, step in trained if run == name] for name, _ in trained}
    assert steps == {"first": [1, 2], "first from step 2": [3, 4]}
    groups = stored(tmp_path, "SELECT config FROM configs")
    assert {json.loads(settings)["_Group"] for (settings,) in groups} == {"first"}
