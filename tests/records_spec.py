"""What the service's records do on every database: `BEHAVIOURS`, each a function of a fresh database's URL."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta, timezone
from threading import Barrier
from types import MappingProxyType

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import create_engine, inspect, text
from sqlalchemy.exc import StatementError

from firesteel.sdk.errors import ConfigError, StorageError
from firesteel.service import keys
from firesteel.service.migrations import VERSION_TABLE
from firesteel.service.records import (
    TABLES,
    Checkpoint,
    Job,
    JobState,
    Key,
    PromotedModel,
    Records,
    _parse,
    now,
)

THREADS = 8
PROCESSES = 4
NOON = datetime(2026, 3, 4, 12, 0, 0, 123456, tzinfo=UTC)
JOB = Job(
    account="account-1",
    job_id="job-1",
    base_model="models/qwen",
    lora_rank=8,
    shape="one-gpu",
    forward_only=False,
    max_context_length=2**40,
    state=JobState.CREATING,
    message="wird geladen … 加载中",
    request_sha256="0" * 64,
    display_name='it\'s "mine"; DROP TABLE jobs; --',
    inactivity_timeout_s=3600,
    created=NOON,
    updated=NOON + timedelta(microseconds=1),
)
LORA = {"rank": 8, "alpha": 16.5, "target_modules": ["q_proj", "v_proj"], "seed": None}
CHECKPOINT = Checkpoint(
    account="account-1",
    owner="jobs/job-1",
    name="step-10",
    kind="training",
    base_model="models/qwen",
    lora=LORA,
    folder="checkpoints/job-1/step-10",
    size=2**40,
    created=NOON,
)
MODEL = PromotedModel(
    account="account-1",
    model_id="mine",
    base_model="models/qwen",
    kind="HF_PEFT_ADDON",
    lora_rank=8,
    folder="models/mine",
    checkpoint="step-10",
    created=NOON,
)
KEY = Key("key-1", "account-1", "laptop", NOON, None)


def a_job_comes_back_as_it_was_given_also_after_a_restart(url: str) -> None:
    other = replace(JOB, job_id="job-2", forward_only=True, inactivity_timeout_s=None)
    with closing(Records.open(url)) as records:
        assert records.add_job(JOB)
        assert records.add_job(other)
        assert records.job("account-1", "job-1") == JOB
    with closing(Records.open(url)) as records:
        assert records.job("account-1", "job-1") == JOB
        assert records.job("account-1", "job-2") == other
        assert records.job("account-1", "job-3") is None


def a_job_is_added_once_in_each_account(url: str) -> None:
    elsewhere = replace(JOB, account="account-2")
    with closing(Records.open(url)) as records:
        assert records.add_job(JOB)
        assert not records.add_job(replace(JOB, message="again"))
        assert records.add_job(elsewhere)
        assert records.jobs() == [JOB, elsewhere]


def jobs_are_listed_oldest_first_of_one_account_or_of_all(url: str) -> None:
    first, last = replace(JOB, job_id="z", created=NOON - timedelta(microseconds=1)), replace(JOB, job_id="b")
    other = replace(JOB, account="account-0", job_id="a", created=NOON - timedelta(days=1))
    with closing(Records.open(url)) as records:
        assert records.jobs() == []
        for job in (last, first, other):
            records.add_job(job)
        assert records.jobs() == [other, first, last]
        assert records.jobs("account-1") == [first, last]
        assert records.jobs("account-9") == []


def a_new_state_changes_that_job_alone(url: str) -> None:
    elsewhere, later = replace(JOB, account="account-2"), NOON + timedelta(hours=1)
    with closing(Records.open(url)) as records:
        records.add_job(JOB)
        records.add_job(elsewhere)
        for state in JobState:
            assert records.update_job("account-1", "job-1", state, f"now {state}", later)
            changed = replace(JOB, state=state, message=f"now {state}", updated=later)
            assert records.job("account-1", "job-1") == changed
        assert records.job("account-2", "job-1") == elsewhere
        assert not records.update_job("account-3", "job-1", JobState.FAILED, "", later)
        assert not records.update_job("account-1", "job-9", JobState.FAILED, "", later)
        assert len(records.jobs()) == 2


def a_new_length_of_context_changes_that_job_alone(url: str) -> None:
    elsewhere = replace(JOB, account="account-2")
    with closing(Records.open(url)) as records:
        records.add_job(JOB)
        records.add_job(elsewhere)
        assert records.update_job_context("account-1", "job-1", 4096)
        assert records.jobs() == [replace(JOB, max_context_length=4096), elsewhere]
        assert not records.update_job_context("account-3", "job-1", 1)
        assert not records.update_job_context("account-1", "job-9", 1)


def a_time_of_any_zone_comes_back_in_utc_and_one_of_none_is_refused(url: str) -> None:
    there = NOON.astimezone(timezone(timedelta(hours=-7, minutes=-30)))
    with closing(Records.open(url)) as records:
        records.add_job(replace(JOB, created=there))
        job = records.job("account-1", "job-1")
        assert job is not None
        assert (job.created, job.created.tzinfo, job.created.isoformat()) == (NOON, UTC, NOON.isoformat())
        with pytest.raises(StatementError, match="has no time zone"):
            records.add_job(replace(JOB, job_id="job-2", created=NOON.replace(tzinfo=None)))
        assert len(records.jobs()) == 1
    before = datetime.now(UTC)
    assert before <= now() <= datetime.now(UTC)
    assert now().tzinfo is UTC


def text_that_a_database_cannot_keep_is_kept_with_a_mark_in_its_place(url: str) -> None:
    with closing(Records.open(url)) as records:
        assert records.add_job(replace(JOB, display_name="a\0b\ud800c\U0001f600"))
        assert records.update_job("account-1", "job-1", JobState.FAILED, "\udcff", NOON)
        job = records.job("account-1", "job-1")
        assert job is not None
        assert (job.display_name, job.message) == ("a\ufffdb\ufffdc\U0001f600", "\ufffd")


def a_checkpoint_comes_back_as_it_was_given_with_an_adapter_or_without(url: str) -> None:
    whole = replace(CHECKPOINT, name="step-20", lora=None)
    read_only = replace(CHECKPOINT, name="step-30", lora=MappingProxyType(LORA))
    with closing(Records.open(url)) as records:
        for checkpoint in (CHECKPOINT, whole, read_only):
            assert records.add_checkpoint(checkpoint)
    with closing(Records.open(url)) as records:
        assert records.checkpoint("account-1", "jobs/job-1", "step-10", "training") == CHECKPOINT
        assert records.checkpoint("account-1", "jobs/job-1", "step-20", "training") == whole
        kept = records.checkpoint("account-1", "jobs/job-1", "step-30", "training")
        assert kept is not None
        assert kept.lora == LORA
        assert list(kept.lora) == list(LORA)


def a_checkpoint_is_one_of_its_account_owner_name_and_kind(url: str) -> None:
    others = [
        replace(CHECKPOINT, account="account-2"),
        replace(CHECKPOINT, owner="models/mine", created=NOON + timedelta(seconds=2)),
        replace(CHECKPOINT, name="step-11", created=NOON + timedelta(seconds=1)),
        replace(CHECKPOINT, kind="sampler", created=NOON - timedelta(seconds=1)),
    ]
    elsewhere, promoted, later, sampler = others
    with closing(Records.open(url)) as records:
        assert all(records.add_checkpoint(checkpoint) for checkpoint in (CHECKPOINT, *others))
        assert not records.add_checkpoint(replace(CHECKPOINT, folder="elsewhere"))
        assert records.checkpoints("account-1") == [sampler, CHECKPOINT, later, promoted]
        assert records.checkpoints("account-1", "jobs/job-1") == [sampler, CHECKPOINT, later]
        assert records.checkpoints("account-2") == [elsewhere]
        assert records.checkpoint("account-1", "jobs/job-1", "step-10", "sampler") == sampler
        assert records.checkpoint("account-2", "jobs/job-1", "step-10", "sampler") is None


def a_removed_checkpoint_is_gone_and_its_name_is_free(url: str) -> None:
    sampler = replace(CHECKPOINT, kind="sampler")
    with closing(Records.open(url)) as records:
        records.add_checkpoint(CHECKPOINT)
        records.add_checkpoint(sampler)
        assert not records.remove_checkpoint("account-2", "jobs/job-1", "step-10", "training")
        assert records.remove_checkpoint("account-1", "jobs/job-1", "step-10", "training")
        assert not records.remove_checkpoint("account-1", "jobs/job-1", "step-10", "training")
        assert records.checkpoints("account-1") == [sampler]
        assert records.add_checkpoint(CHECKPOINT)


def a_promoted_model_is_kept_once_in_each_account(url: str) -> None:
    elsewhere = replace(MODEL, account="account-2", kind="HF_BASE_MODEL", lora_rank=0)
    older = replace(MODEL, model_id="older", created=NOON - timedelta(seconds=1))
    with closing(Records.open(url)) as records:
        assert all(records.add_model(model) for model in (MODEL, elsewhere, older))
        assert not records.add_model(replace(MODEL, folder="elsewhere"))
    with closing(Records.open(url)) as records:
        assert records.model("account-1", "mine") == MODEL
        assert records.model("account-2", "mine") == elsewhere
        assert records.model("account-2", "older") is None
        assert records.models() == [older, MODEL, elsewhere]
        assert records.models("account-1") == [older, MODEL]


def a_key_is_found_by_its_hash_alone_and_also_when_revoked(url: str) -> None:
    first, second = "ab" * 32, "cd" * 32
    older = Key("key-0", "account-2", "", NOON - timedelta(seconds=1), None)
    with closing(Records.open(url)) as records:
        records.add_key(KEY, first)
        records.add_key(older, second)
        assert (records.find_key(first), records.find_key(second)) == (KEY, older)
        assert records.find_key("AB" * 32) is None
        assert records.find_key("") is None
        assert records.revoke_key("key-1", NOON)
        assert not records.revoke_key("key-1", NOON + timedelta(days=1))
        assert not records.revoke_key("key-9", NOON)
    with closing(Records.open(url)) as records:
        revoked = replace(KEY, revoked=NOON)
        assert records.find_key(first) == revoked
        assert records.keys() == [older, revoked]


def a_key_whose_id_or_hash_is_taken_is_refused(url: str) -> None:
    with closing(Records.open(url)) as records:
        records.add_key(KEY, "ab" * 32)
        for key, sha256 in [(KEY, "cd" * 32), (replace(KEY, key_id="key-2"), "ab" * 32)]:
            with pytest.raises(ConfigError, match=f"{key.key_id}.*is there already"):
                records.add_key(key, sha256)
        assert records.keys() == [KEY]


def of_threads_that_add_the_same_job_one_wins(url: str) -> None:
    together = Barrier(THREADS)

    def add(thread: int) -> list[bool]:
        together.wait()
        return [records.add_job(replace(JOB, job_id=f"job-{i}", message=f"{thread}")) for i in range(20)]

    with closing(Records.open(url)) as records, ThreadPoolExecutor(THREADS) as pool:
        won = list(pool.map(add, range(THREADS)))
        jobs = {job.job_id: job.message for job in records.jobs()}
        assert len(jobs) == 20
        for i in range(20):
            (winner,) = [thread for thread in range(THREADS) if won[thread][i]]
            assert jobs[f"job-{i}"] == f"{winner}"


def more_threads_than_connections_read_and_write_and_nothing_is_lost(url: str) -> None:
    def work(thread: int) -> None:
        for i in range(5):
            job_id = f"job-{thread}-{i}"
            assert records.add_job(replace(JOB, job_id=job_id))
            assert records.update_job("account-1", job_id, JobState.RUNNING, "", NOON)
            job = records.job("account-1", job_id)
            assert job is not None
            assert job.state is JobState.RUNNING

    with closing(Records.open(url)) as records, ThreadPoolExecutor(32) as pool:
        list(pool.map(work, range(32)))
        assert len(records.jobs()) == 32 * 5


def threads_may_open_a_fresh_database_at_once(url: str) -> None:
    together = Barrier(THREADS)

    def work(thread: int) -> None:
        together.wait()
        with closing(Records.open(url)) as records:
            assert records.add_job(replace(JOB, job_id=f"job-{thread}"))

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    with closing(Records.open(url)) as records:
        assert len(records.jobs()) == THREADS


# Waits at the start for a line, so that several do the rest at the same moment.
SHARED = """
import sys
from dataclasses import replace
from records_spec import JOB, Records
print("ready", flush=True)
sys.stdin.readline()
records = Records.open(sys.argv[1])
mine = records.add_job(replace(JOB, job_id=sys.argv[2]))
print(mine, records.add_job(JOB), flush=True)
"""


def _start(script: str, *arguments: str) -> subprocess.Popen[str]:
    code = f"import sys; sys.path[:] = {json.dumps(sys.path)}\n{script}"
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def _answers(processes: Sequence[subprocess.Popen[str]]) -> list[str]:
    said = [process.communicate("go\n", timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes), said
    return [out.strip() for out, _ in said]


def processes_may_open_a_fresh_database_at_once_and_one_wins_a_job(url: str) -> None:
    processes = [_start(SHARED, url, f"own-{i}") for i in range(PROCESSES)]
    for process in processes:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    assert sorted(_answers(processes)) == ["True False"] * (PROCESSES - 1) + ["True True"]
    with closing(Records.open(url)) as records:
        assert len(records.jobs()) == PROCESSES + 1


def what_another_process_writes_is_seen_at_once(url: str) -> None:
    script = (
        "from firesteel.service import keys\nfrom firesteel.service.records import Records, now\n"
        "records = Records.open(sys.argv[1])\n"
        "assert records.revoke_key(sys.argv[2], now())\nprint(keys.create(records)[1])"
    )
    with closing(Records.open(url)) as records:
        key, old = keys.create(records)
        assert keys.check(records, old) == key
        (new,) = _answers([_start(script, url, key.key_id)])
        assert keys.check(records, old) is None
        assert keys.check(records, new) is not None


def what_was_answered_outlives_a_process_that_is_killed(url: str) -> None:
    script = (
        "import os, signal\nfrom records_spec import JOB, Records\n"
        "records = Records.open(sys.argv[1])\n"
        "if records.add_job(JOB): os.kill(os.getpid(), signal.SIGKILL)"
    )
    process = _start(script, url)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    with closing(Records.open(url)) as records:
        assert records.jobs() == [JOB]


def a_database_of_a_newer_schema_is_refused_and_left_as_it_is(url: str) -> None:
    with closing(Records.open(url)) as records:
        records.add_job(JOB)
    _execute(url, f"UPDATE {VERSION_TABLE} SET version_num = '9999'")
    with pytest.raises(ConfigError, match="schema is 9999, newer than the 0001 of this program"):
        Records.open(url)
    _execute(url, f"UPDATE {VERSION_TABLE} SET version_num = '0001'")
    with closing(Records.open(url)) as records:
        assert records.jobs() == [JOB]


def a_database_with_another_programs_table_in_the_way_is_refused_whole(url: str) -> None:
    _execute(url, "CREATE TABLE models (id INTEGER)")
    with pytest.raises(StorageError, match="already exists"):
        Records.open(url)
    engine = create_engine(_parse(url))
    assert inspect(engine).get_table_names() == ["models"]
    engine.dispose()
    _execute(url, "DROP TABLE models")
    Records.open(url).close()


def the_schema_that_the_steps_make_is_the_one_that_is_used(url: str) -> None:
    Records.open(url).close()
    engine = create_engine(_parse(url))
    with engine.connect() as connection:
        context = MigrationContext.configure(
            connection, opts={"compare_type": True, "version_table": VERSION_TABLE}
        )
        assert compare_metadata(context, TABLES) == []
        assert {*TABLES.tables, VERSION_TABLE} == {*inspect(connection).get_table_names()}
    engine.dispose()


def _execute(url: str, statement: str) -> None:
    engine = create_engine(_parse(url))
    with engine.begin() as connection:
        connection.execute(text(statement))
    engine.dispose()


BEHAVIOURS: list[Callable[[str], None]] = [
    a_job_comes_back_as_it_was_given_also_after_a_restart,
    a_job_is_added_once_in_each_account,
    jobs_are_listed_oldest_first_of_one_account_or_of_all,
    a_new_state_changes_that_job_alone,
    a_new_length_of_context_changes_that_job_alone,
    a_time_of_any_zone_comes_back_in_utc_and_one_of_none_is_refused,
    text_that_a_database_cannot_keep_is_kept_with_a_mark_in_its_place,
    a_checkpoint_comes_back_as_it_was_given_with_an_adapter_or_without,
    a_checkpoint_is_one_of_its_account_owner_name_and_kind,
    a_removed_checkpoint_is_gone_and_its_name_is_free,
    a_promoted_model_is_kept_once_in_each_account,
    a_key_is_found_by_its_hash_alone_and_also_when_revoked,
    a_key_whose_id_or_hash_is_taken_is_refused,
    of_threads_that_add_the_same_job_one_wins,
    more_threads_than_connections_read_and_write_and_nothing_is_lost,
    threads_may_open_a_fresh_database_at_once,
    processes_may_open_a_fresh_database_at_once_and_one_wins_a_job,
    what_another_process_writes_is_seen_at_once,
    what_was_answered_outlives_a_process_that_is_killed,
    a_database_of_a_newer_schema_is_refused_and_left_as_it_is,
    a_database_with_another_programs_table_in_the_way_is_refused_whole,
    the_schema_that_the_steps_make_is_the_one_that_is_used,
]
