"""Processes that are killed, stopped, or two at once: what the folder holds afterwards, and where the next goes on."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from fault_record import TRIES, Record
from processes import COMMAND, finish, kill_somewhere, run, start, steps_of, wait_for_step
from runs import config, outcome

from training.recipes.dpo_loop import Config
from training.utils.checkpoints import found_in, listed_in
from training.utils.run_folder import Holder

pytestmark = pytest.mark.slow

SETTINGS = {
    "epochs": 3,
    "batch_size": 2,
    "eval_fraction": 0.25,
    "eval_interval": 3,
    "dcp_save_interval": 2,
    "sample_prompts": ["Question 1?"],
    "sample_max_tokens": 4,
    "trainer": {"activation_token_budget": 128},  # several passes a step, whose gradients add up
}
STEPS = 36


def settings_in(folder: Path, rank: int, **changes: object) -> Config:
    return config(folder, count=32, lora_rank=rank, **{**SETTINGS, **changes})


def undisturbed(folder: Path, rank: int) -> Config:
    settings = settings_in(folder, rank)
    assert run(settings)[0] == 0
    assert steps_of(Path(settings.log_path)) == STEPS
    return settings


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A LoRA run that nobody disturbed."""
    return undisturbed(tmp_path_factory.mktemp("whole"), 4)


@pytest.mark.parametrize("rank", [4, 0], ids=["lora", "full-parameter"])
def test_a_run_that_is_killed_at_any_moment_ends_with_the_same_bits(
    tmp_path: Path, chance: random.Random, rank: int
) -> None:
    whole = undisturbed(tmp_path / "whole", rank)
    record = Record(f"SIGKILL, {'LoRA' if rank else 'full-parameter'}, any moment of three epochs")
    for number in range(TRIES):
        settings = settings_in(tmp_path / str(number), whole.lora_rank)
        folder = Path(settings.log_path)
        repeated = 0
        for _ in range(2):  # killed again where it went on
            at = chance.randint(min(steps_of(folder), STEPS - 1), STEPS - 1)
            kill_somewhere(start(settings), folder, at, chance)
            done = steps_of(folder)
            saved = max((entry.step for entry in found_in(folder)), default=0)
            repeated = max(repeated, done - saved)
        record.tried()
        status, said = run(settings)
        assert status == 0, said
        assert outcome(settings) == outcome(whole), said
        record.survived(repeated)


def test_a_kill_inside_the_reference_pass_leaves_blocks_that_are_right(
    tmp_path: Path, chance: random.Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record("SIGKILL, inside the reference pass")
    outcomes = []
    for number in range(TRIES + 1):
        monkeypatch.setenv("FIRESTEEL_HOME", str(tmp_path / f"home-{number}"))
        settings = config(tmp_path / str(number), count=96, batch_size=16, dcp_save_interval=2)
        if number:
            process, cache = start(settings), tmp_path / f"home-{number}/reference_cache.sqlite"
            while not cache.exists() and process.poll() is None:
                time.sleep(0.002)
            time.sleep(chance.uniform(0, 0.5))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            record.tried()
        status, said = run(settings)
        assert status == 0, said
        outcomes.append(outcome(settings))
        assert outcomes[-1] == outcomes[0], said
        if number:
            record.survived()


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=str)
def test_a_signal_finishes_the_step_saves_and_exits_as_a_shell_expects(
    whole: Config, tmp_path: Path, chance: random.Random, sent: signal.Signals, status: int
) -> None:
    record = Record(sent.name)
    for number in range(TRIES):
        settings = settings_in(tmp_path / str(number), whole.lora_rank)
        folder, process = Path(settings.log_path), start(settings)
        wait_for_step(process, folder, chance.randint(1, STEPS - 6))
        process.send_signal(sent)
        record.tried()
        ended, said = finish(process)
        assert ended == status, said
        assert "Traceback" not in said
        step = steps_of(folder)
        assert f"stopped after step {step}: saved; started again (resume: auto) it goes on from there" in said
        assert listed_in(folder)[-1].step == step
        again, said = run(settings)
        assert again == 0, said
        assert f"going on from {folder}/checkpoints/step-{step}" in said
        assert outcome(settings)["metrics"] == outcome(whole)["metrics"]
        assert outcome(settings)["weights"] == outcome(whole)["weights"]
        record.survived(0)


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, 4, epochs=200)
    process = start(settings)
    wait_for_step(process, Path(settings.log_path), 2)
    process.send_signal(signal.SIGSTOP)  # so that both are there when it wakes up
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGCONT)
    status, said = finish(process)
    assert status == 143, said  # the second: Python answers the lower number first
    assert "SIGINT: ending after this step; once more to end at once" in said
    assert "stopped after step" not in said
    assert run(settings_in(tmp_path, 4, epochs=200), "--epochs", "1")[0] in (0, 2)  # the folder is free


def test_a_signal_without_checkpoints_says_that_nothing_is_saved(tmp_path: Path) -> None:
    settings = settings_in(tmp_path, 4, epochs=200, dcp_save_interval=0)
    process = start(settings)
    wait_for_step(process, Path(settings.log_path), 2)
    process.send_signal(signal.SIGTERM)
    status, said = finish(process)
    assert status == 143
    assert "nothing is saved, dcp_save_interval is 0" in said


def test_a_second_process_on_one_folder_is_refused_and_the_first_goes_on(
    whole: Config, tmp_path: Path
) -> None:
    record = Record("two processes on one folder")
    settings = settings_in(tmp_path, whole.lora_rank)
    first = start(settings)
    wait_for_step(first, Path(settings.log_path), 1)
    os.kill(first.pid, signal.SIGSTOP)
    try:
        record.tried()
        status, said = run(settings)
        assert status == 2
        assert f"another run (process {first.pid} on " in said
    finally:
        os.kill(first.pid, signal.SIGCONT)
    assert finish(first)[0] == 0
    assert outcome(settings) == outcome(whole)
    record.survived(0)


def test_a_takeover_fences_the_old_process_and_goes_on_to_the_same_bits(
    whole: Config, tmp_path: Path
) -> None:
    record = Record("takeover of a running process")
    settings = settings_in(tmp_path, whole.lora_rank)
    first, folder = start(settings), Path(settings.log_path)
    wait_for_step(first, folder, 3)
    os.kill(first.pid, signal.SIGSTOP)  # it hangs
    record.tried()
    second = start(settings, "--takeover")
    while (holder := Holder.of(folder)) is None or holder.pid != second.pid:
        assert second.poll() is None
        time.sleep(0.01)
    os.kill(first.pid, signal.SIGCONT)  # and wakes up
    status, said = finish(first)
    assert status == 2
    assert f"was taken over by process {second.pid} on " in said
    status, said = finish(second)
    assert status == 0, said
    assert outcome(settings) == outcome(whole)
    record.survived()


def test_times_of_files_decide_nothing(tmp_path: Path) -> None:
    """Clocks jump: the newest checkpoint is the one with the highest step."""
    settings = settings_in(tmp_path, 4)
    process = start(settings)
    kill_somewhere(process, Path(settings.log_path), 9, random.Random(0))
    folders = sorted(
        Path(settings.log_path, "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:])
    )
    for place, folder in enumerate(folders):
        os.utime(folder, (10**9 - place, 10**9 - place))
    newest = max(found_in(Path(settings.log_path)), key=lambda entry: entry.step)
    assert f"going on from {settings.log_path}/{newest.path}" in run(settings)[1]


def test_a_full_disk_is_one_clear_error_and_the_last_checkpoint_stays_whole(tmp_path: Path) -> None:
    record = Record("1 MB tmpfs, filled by checkpoints")
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(small)], check=True)
    try:
        settings = config(tmp_path, count=32, epochs=9, dcp_save_interval=1, log_path=str(small / "run"))
        record.tried()
        status, said = run(settings)
        assert status == 2, said
        assert "error[storage]" in said
        assert "Traceback" not in said
        assert str(small / "run") in said.splitlines()[-1]
        done = listed_in(small / "run")
        assert done
        for entry in done[:-1]:
            for file in (small / "run" / entry.path).iterdir():
                file.unlink()
            (small / "run" / entry.path).rmdir()
        status, said = run(
            config(tmp_path, count=32, epochs=9, dcp_save_interval=50, log_path=str(small / "run"))
        )
        assert f"going on from {small}/run/{done[-1].path}" in said
        assert status == 0, said
        record.survived()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_disk_that_the_reference_cache_fills_is_the_same_error_and_the_rest_is_computed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record = Record("tmpfs, filled by the model store, then by the reference cache")
    small = tmp_path / "small"
    small.mkdir()
    monkeypatch.setenv("FIRESTEEL_HOME", str(small))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(small)], check=True)
    try:
        settings = config(tmp_path, count=400, log_path=str(tmp_path / "run"))
        record.tried()
        status, said = run(settings)
        assert status == 2, said
        assert re.search(
            rf"error\[storage].* cannot be kept in {small}/models: .*after [\d,]+ bytes", said
        ), said
        subprocess.run(["mount", "-o", "remount,size=4m", str(small)], check=True)
        subprocess.run([COMMAND[0], "models", "pull", "tiny-llama"], check=True, capture_output=True)
        room = shutil.disk_usage(small).used + 96 * 1024
        subprocess.run(["mount", "-o", f"remount,size={room}", str(small)], check=True)
        status, said = run(settings)
        assert status == 2, said
        assert "error[storage]" in said
        assert "Traceback" not in said
        assert re.search(rf"{small}/reference_cache.sqlite.* about [\d,]+ bytes are needed", said), said
        subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
        status, said = run(settings)
        assert status == 0, said
        found = re.search(r"(\d+) from the cache, (\d+) computed", said)
        assert found is not None, said
        assert int(found[1]) > 0, said
        assert int(found[2]) > 0, said
        record.survived()
    finally:
        subprocess.run(["umount", "-l", str(small)], check=True)


def test_a_folder_that_is_read_only_is_refused_before_any_work(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "ro", "tmpfs", str(folder)], check=True)
    try:
        status, said = run(config(tmp_path, log_path=str(folder)))
        assert status == 2
        assert f"{folder}" in said
        assert "Read-only" in said
        assert "Traceback" not in said
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
