"""A process that only saves, or only makes a folder ready for a run that is started again.

With torch and nothing else of weight. A server imports once and forks a child for each trial, so that a trial costs a
fork. It reads `WHAT FOLDER` from its standard input, answers the child's pid, reads a line (strace is there now), lets
the child go, and answers its exit status. WHAT is `save`, or a value of `resume`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from firesteel.engine.states import Belonging, Environment, TrainerState, write_state
from firesteel.sdk.errors import ConfigError, StorageError
from training.utils.checkpoints import Checkpoints, Identity, Listed, Notes, Retention, found_in
from training.utils.resume import GoOn, Wanted, find_start, rewind
from training.utils.run_folder import RunFolder

SAVED, REFUSED = 0, 3


def state(step: int) -> TrainerState:
    """One whose every number says which step it is of."""
    weights = {f"layer.{n}": torch.full((64, 65), float(step)) for n in range(3)}
    moments = {f"{name}.exp_avg": tensor.clone() for name, tensor in weights.items()}
    belonging = Belonging("tiny", None, None, "float32")
    return TrainerState(belonging, Environment.of_this_process(), weights, moments)


def save(run: Path, step: int) -> None:
    """As a run does it: a whole folder, then its line, then what is no longer to be kept."""
    folder = RunFolder.open(str(run))
    target = run / f"checkpoints/step-{step}"
    write_state(state(step), target, {"step": step})
    Checkpoints(folder, Retention(last=2)).add(Listed(step, 1, {}))
    folder.close()


def restart(run: Path, resume: str) -> None:
    """As a run does it before it loads anything, asked for twice the steps."""
    folder = RunFolder.open(str(run))
    last = Notes.read(run / found_in(run)[-1].path) if found_in(run) else None
    identity = last.identity if last else Identity({}, {})
    wanted = Wanted(identity, frozenset(), 2 * last.total_steps if last else 1)
    start = find_start(folder, resume, wanted)
    if isinstance(start, GoOn):
        list(rewind(folder, start))
    else:
        folder.set_aside()
    folder.write_config({"log_path": "x", "base_model": "y", "dataset": "z"})
    folder.close()


def serve() -> None:
    """Fork a child per line."""
    for line in sys.stdin:
        waiting, go = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(go)
            os.read(waiting, 1)
            what, _, path = line.strip().partition(" ")
            try:
                save(Path(path), 3) if what == "save" else restart(Path(path), what)
            except (StorageError, ConfigError):
                os._exit(REFUSED)
            os._exit(SAVED)
        os.close(waiting)
        print(child, flush=True)
        sys.stdin.readline()  # strace is there
        os.write(go, b"x")
        os.close(go)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    serve()
