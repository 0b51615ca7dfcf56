"""A run against a server, between which the network fails, and which is killed: each step once, and the same bits."""

from __future__ import annotations

import random
import re
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
from fault_record import TRIES, Record
from processes import finish, free_port, served, start, steps_of
from proxy import FAULTS, Fault, spoiling
from runs import config, outcome

from firesteel.sdk import http_connection
from firesteel.sdk.operations import OptimStep
from training.recipes.dpo_loop import main
from training.utils.checkpoints import listed_in
from transports import RecordingEngine, service_in, serving

pytestmark = pytest.mark.slow

SETTINGS: dict[str, Any] = {"dcp_save_interval": 2, "eval_fraction": 0.25, "eval_interval": 4}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_network_that_spoils_every_request_once_changes_nothing(
    fault: Fault, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record(f"network: {fault}, every request of a run once")
    whole, spoiled = (config(tmp_path / name, 12, **SETTINGS) for name in ("whole", "spoiled"))
    # Homes of their own: what earlier tests have left in a reference cache was computed with other rows beside it.
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "home"))
    main(whole)
    monkeypatch.setattr(http_connection, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / "another home"))  # the reference is asked, too
    engine = RecordingEngine()
    record.tried()
    with (
        service_in(tmp_path / "service", "tiny-llama", engine=engine) as service,
        serving(service) as server,
        spoiling(server.url, fault) as proxy,
    ):
        monkeypatch.setenv("FIRESTEEL_BASE_URL", proxy.url)
        monkeypatch.setenv("FIRESTEEL_API_KEY", server.key)
        main(spoiled)
        assert proxy.spoiled > 40
    assert outcome(spoiled) == outcome(whole)
    steps = [operation.seq_id for operation in engine.log if isinstance(operation, OptimStep)]
    assert len(steps) == len(set(steps)) == steps_of(Path(whole.log_path))
    record.survived()


def wait_for_a_checkpoint(run: Path, client: subprocess.Popen[str]) -> None:
    """Before its first there is nothing to go back to, and the run would end."""
    give_up = time.monotonic() + 120
    while not listed_in(run) and client.poll() is None:
        assert time.monotonic() < give_up
        time.sleep(0.005)


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])
def test_a_run_whose_server_is_killed_again_and_again_ends_with_the_same_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chance: random.Random, rank: int
) -> None:
    record = Record(f"server, SIGKILL at any moment of a run, {'LoRA' if rank else 'full-parameter'}")
    # Long enough for every kill: each costs at most the steps of an interval.
    settings = {"epochs": 2 + TRIES, "lora_rank": rank, **SETTINGS}
    whole, disturbed = (config(tmp_path / name, 32, **settings) for name in ("whole", "disturbed"))
    assert finish(start(whole))[0] == 0
    port, run = free_port(), Path(disturbed.log_path)
    monkeypatch.setenv("FIRESTEEL_BASE_URL", f"http://127.0.0.1:{port}")
    client = start(disturbed)
    for _ in range(TRIES):
        with served(tmp_path / "served", port) as server:
            record.tried()
            wait_for_a_checkpoint(run, client)
            # Some are hit while the run comes back to them, most in the middle of its steps.
            step, limit = steps_of(run) + chance.randint(-2, 5), time.monotonic() + chance.uniform(4, 12)
            while steps_of(run) < step and time.monotonic() < limit and client.poll() is None:
                time.sleep(0.005)
            time.sleep(chance.uniform(0, 0.1))
            assert client.poll() is None, finish(client)[1]
            server.send_signal(signal.SIGKILL)
            server.wait()
        record.survived()
    with served(tmp_path / "served", port):
        status, said = finish(client)
    assert status == 0, said
    assert re.search(r"the run (goes back to its checkpoint of step \d+|loads its models again)", said), said
    assert outcome(disturbed) == outcome(whole)


def test_a_server_that_is_told_to_end_finishes_the_operation_and_the_save_that_it_has_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    monkeypatch.setenv("FIRESTEEL_BASE_URL", f"http://127.0.0.1:{port}")
    whole, disturbed = (config(tmp_path / name, 32, **SETTINGS) for name in ("whole", "disturbed"))
    with served(tmp_path / "served", port) as server:
        client = start(disturbed)
        while steps_of(Path(disturbed.log_path)) < 5:
            assert client.poll() is None, finish(client)[1]
            time.sleep(0.01)
        server.terminate()
        assert server.wait(40) == -signal.SIGTERM  # it ends as it was told to
    assert "ended: what was running is done" in (tmp_path / "serve.log").read_text()
    with served(tmp_path / "served", port):
        status, said = finish(client)
        assert status == 0, said
        assert finish(start(whole))[0] == 0
    assert outcome(disturbed) == outcome(whole)
