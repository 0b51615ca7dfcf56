"""A process that saves, struck at every one of its system calls that make a write last: never a torn checkpoint.

strace kills it at the N-th call, or lets that call fail, for every N there is.
"""

from __future__ import annotations

import itertools
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import orjson
import pytest
from fault_record import TRIES, Record
from runs import config
from saver import REFUSED, SAVED, save

from firesteel.engine.states import read_state
from firesteel.sealed import damage
from training.recipes.dpo_loop import main
from training.utils.checkpoints import Notes, found_in

pytestmark = pytest.mark.slow

# With the least number of each that a save makes: a test that strikes nothing shows nothing.
LASTING = {
    "fsync": 10,
    "rename": 4,
    "unlink": 1,
    "unlinkat": 1,
    "fdatasync": 0,
    "renameat2": 0,
    "ftruncate": 0,
}
WRITING = "write,pwrite64"
KILLED = -9


class Server:
    """`saver.py`, and strace on its children."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("saver.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def strike(
        self, run: Path, calls: str, fault: str, when: int, log: Path, what: str = "save"
    ) -> tuple[int, bool]:
        """The child's exit status, and whether it was struck."""
        child = int(self._ask(f"{what} {run}"))
        inject = ["-e", f"trace={calls}", "-e", f"inject={calls}:{fault}:when={when}", "-o", str(log)]
        with subprocess.Popen(["strace", "-f", "-qq", *inject, "-p", str(child)]) as strace:
            while f"TracerPid:\t{strace.pid}" not in Path(f"/proc/{child}/status").read_text():
                assert strace.poll() is None, "strace cannot attach"
                time.sleep(0.002)
            status = int(self._ask("go"))
        return status, status == KILLED or "INJECTED" in log.read_text()

    def _ask(self, line: str) -> str:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.communicate()


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.close()


@pytest.fixture(scope="module")
def saved_twice(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with two whole checkpoints; the third will push the first out."""
    run = tmp_path_factory.mktemp("saved") / "run"
    run.mkdir()
    (run / "config.json").write_bytes(orjson.dumps({"log_path": "x", "base_model": "y", "dataset": "z"}))
    for step in (1, 2):
        save(run, step)
    return run


def check(run: Path, status: int) -> None:
    """The newest checkpoint that is found is whole and says what it should; the run can be saved to again."""
    newest = found_in(run)[-1]
    assert newest.step == 3 or status != SAVED
    assert newest.step in (2, 3)
    assert damage(run / newest.path) is None
    weights = read_state(run / newest.path, with_optimizer=True).weights
    assert {float(value) for tensor in weights.values() for value in tensor.unique()} == {float(newest.step)}
    save(run, 4)
    assert found_in(run)[-1].step == 4
    assert not list(run.glob(".partial-*")) + list((run / "checkpoints").glob(".partial-*"))


@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_at_every_call_that_makes_a_write_last(
    server: Server, saved_twice: Path, tmp_path: Path, fault: str
) -> None:
    record = Record(f"strace {fault} at every sync, rename, unlink and truncation of a save")
    for call, least in LASTING.items():  # strace counts each by itself
        for when in itertools.count(1):
            run = tmp_path / f"{call}-{when}"
            shutil.copytree(saved_twice, run)
            status, struck = server.strike(run, call, fault, when, tmp_path / "log")
            if not struck:
                assert status == SAVED
                assert when > least
                break
            record.tried()
            assert status in (SAVED, REFUSED, KILLED)
            check(run, status)
            record.survived()


@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
def test_at_random_writes(
    server: Server, saved_twice: Path, tmp_path: Path, chance: random.Random, fault: str
) -> None:
    record = Record(f"strace {fault} at a random write of a save")
    for number in range(20 * max(1, TRIES // 3)):
        run = tmp_path / str(number)
        shutil.copytree(saved_twice, run)
        status, struck = server.strike(run, WRITING, fault, chance.randint(1, 14), tmp_path / "log")
        if struck:
            record.tried()
        assert status in (SAVED, REFUSED, KILLED)
        check(run, status)
        if struck:
            record.survived()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 6 steps with a checkpoint after each, and its results."""
    settings = config(tmp_path_factory.mktemp("finished"), epochs=2, dcp_save_interval=1)
    main(settings)
    return Path(settings.log_path)


def there_or_aside(run: Path, name: str) -> list[Path]:
    """Every place where something of this name is now."""
    return [
        path for path in (run / name, *(aside / name for aside in run.glob("previous-*"))) if path.exists()
    ]


@pytest.mark.parametrize("fault", ["signal=SIGKILL", "error=ENOSPC", "error=EIO"])
@pytest.mark.parametrize(
    ("resume", "left"), [("step-3", [1, 2, 3]), ("auto", [1, 2, 3, 4, 5, 6]), ("never", [])]
)
def test_a_start_that_is_struck_at_any_call_is_made_good_by_the_next_and_loses_nothing(
    server: Server, finished: Path, tmp_path: Path, resume: str, left: list[int], fault: str
) -> None:
    record = Record(
        f"strace {fault} at every rename, sync, unlink and truncation of a start, resume {resume}"
    )
    for call in ("rename", "fsync", "unlink", "ftruncate"):
        for when in itertools.count(1):
            run = tmp_path / f"{call}-{when}"
            shutil.copytree(finished, run)
            status, struck = server.strike(run, call, fault, when, tmp_path / "log", resume)
            assert status in (SAVED, REFUSED, KILLED)
            if struck:
                record.tried()
                again, _ = server.strike(run, "ftruncate", "signal=SIGKILL", 99, tmp_path / "log", resume)
                assert again == SAVED
            assert [entry.step for entry in found_in(run)] == left
            for step in range(1, 7):
                (kept,) = there_or_aside(run, f"checkpoints/step-{step}")
                assert damage(kept) is None
            for name in ("adapter", "summary.json", "samples.jsonl"):
                assert len(there_or_aside(run, name)) == 1
            whole = (finished / "metrics.jsonl").read_bytes()
            assert whole in [path.read_bytes() for path in there_or_aside(run, "metrics.jsonl")]
            if left:
                length = Notes.read(run / found_in(run)[-1].path).position.metrics_bytes
                assert (run / "metrics.jsonl").read_bytes() == whole[:length]
            if not struck:
                assert status == SAVED
                break
            record.survived()
