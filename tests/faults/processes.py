"""Runs and servers of the command line in processes of their own, to be killed."""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from training.recipes.dpo_loop import Config

COMMAND = [str(Path(sys.executable).with_name("firesteel")), "dpo"]
SERVE = [COMMAND[0], "serve", "--no-auth"]
PATIENCE = 120.0


def start(settings: Config, *flags: str) -> subprocess.Popen[str]:
    """`firesteel dpo` on these settings, in a group of its own."""
    path = Path(settings.log_path).parent / "settings.yaml"
    path.write_text(json.dumps(settings.resolved()))  # JSON is YAML
    return subprocess.Popen(
        [*COMMAND, str(path), *flags],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen[str]) -> tuple[int, str]:
    """Its exit status, and all it said."""
    said, _ = process.communicate(timeout=PATIENCE)
    return process.returncode, said


def run(settings: Config, *flags: str) -> tuple[int, str]:
    """The same from start to end."""
    return finish(start(settings, *flags))


def wait_for_step(process: subprocess.Popen[str], run: Path, step: int) -> None:
    """Until the run has logged a step, or has ended."""
    give_up = time.monotonic() + PATIENCE
    while steps_of(run) < step and process.poll() is None:
        assert time.monotonic() < give_up, f"no step {step} within {PATIENCE} s"
        time.sleep(0.002)


def steps_of(run: Path) -> int:
    """The last step that a run has logged; 0 before the first."""
    try:
        lines = (run / "metrics.jsonl").read_bytes().split(b"\n")[:-1]
    except FileNotFoundError:
        return 0
    return max((json.loads(line)["train/step"] for line in lines), default=0)


def kill_somewhere(process: subprocess.Popen[str], run: Path, step: int, chance: random.Random) -> None:
    """SIGKILL at some moment of the step after `step`: computing, logging, evaluating or saving."""
    wait_for_step(process, run, step)
    time.sleep(chance.uniform(0, 0.08))
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


@contextmanager
def served(home: Path, port: int, model: str = "tiny-llama") -> Iterator[subprocess.Popen[str]]:
    """A server process that answers."""
    process = subprocess.Popen(
        [*SERVE, "--port", str(port), "--home", str(home), "--base-model", model],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=(home.parent / "serve.log").open("a"),
        text=True,
    )
    try:
        give_up = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                break
            except OSError:
                assert process.poll() is None, "the server ended"
                assert time.monotonic() < give_up, "the server does not answer"
                time.sleep(0.02)
        yield process
    finally:
        process.kill()
        process.wait()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        return int(listening.getsockname()[1])
