"""Many users on one server for a while: no error, no growth, and each gets its share.

`FIRESTEEL_SOAK_SECONDS` says for how long (45); `make soak` takes five minutes.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx2
import numpy as np
import pytest

import firesteel
from conftest import make_datum
from firesteel.sdk import AdamParams, Datum

pytestmark = pytest.mark.slow

SECONDS = float(os.environ.get("FIRESTEEL_SOAK_SECONDS", "45"))
SESSIONS = 16


@contextmanager
def served(home: Path) -> Iterator[str]:
    command = [Path(sys.executable).with_name("firesteel"), "serve", "--no-auth", "--port", "0"]
    with (home / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, "--home", str(home / "served"), "--base-model", "tiny-llama"],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdout is not None
        try:
            yield process.stdout.readline().split()[-1]
        finally:
            process.terminate()
            process.wait(60)


def resident_bytes(url: str) -> float:
    found = re.search(r"^firesteel_resident_bytes (\S+)$", httpx2.get(f"{url}/metrics").text, re.M)
    assert found is not None
    return float(found[1])


def some_data(seed: int) -> list[Datum]:
    rng = np.random.default_rng(seed)
    return [make_datum(rng.integers(5, 200, 40), 20) for _ in range(4)]


def test_sixteen_sessions_train_without_an_error_in_memory_that_stays_flat_each_with_its_share(
    tmp_path: Path,
) -> None:
    steps = [0] * SESSIONS
    ready, go, stop = threading.Barrier(SESSIONS + 1), threading.Event(), threading.Event()

    def train(number: int, url: str) -> None:
        with firesteel.connect(url) as service:
            client = service.create_training_client("tiny-llama", lora_rank=4, seed=number)
            data = some_data(number)
            ready.wait(120)
            go.wait()
            while not stop.is_set():
                client.forward_backward(data)
                client.optim_step(AdamParams(1e-4)).result()
                steps[number] += 1

    with served(tmp_path) as url, ThreadPoolExecutor(SESSIONS) as threads:
        users = [threads.submit(train, number, url) for number in range(SESSIONS)]
        ready.wait(120)
        go.set()
        time.sleep(SECONDS / 3)
        early = resident_bytes(url)
        time.sleep(2 * SECONDS / 3)
        made, late = list(steps), resident_bytes(url)
        stop.set()
        for user in users:
            user.result(60)  # raises what it met
        sessions = httpx2.get(f"{url}/status").json()["sessions"]
    assert min(made) > 10
    assert max(made) / min(made) <= 1.3, made
    assert late - early < 24 * 2**20, (early, late)
    assert sessions == []
    print(
        f"\n{SESSIONS} sessions, {SECONDS:.0f} s: {min(made)} to {max(made)} steps each, "
        f"{early / 2**20:.0f} → {late / 2**20:.0f} MiB"
    )
