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
from saver import REFUSED, SAVED, save

from firesteel.engine.states import read_state
from firesteel.sealed import damage
from training.utils.checkpoints import found_in

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

    def strike(self, run: Path, calls: str, fault: str, when: int, log: Path) -> tuple[int, bool]:
        """The child's exit status, and whether it was struck."""
        child = int(self._ask(str(run)))
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
