"""What the service remembers from start to start: keys, jobs, checkpoints and promoted models, in a database.

::

    sqlite:///PATH                          a file; the default is $FIRESTEEL_HOME/service/records.sqlite
    postgresql://USER:PASSWORD@HOST/NAME    a server, for those who have one

Every method is one short transaction of one statement, so threads and processes share a database without a lock of
ours: `firesteel keys create` works while the server runs. No tensor and no request body is kept here; `folder` says
where a checkpoint's files are. Times are UTC to the microsecond.
"""

from __future__ import annotations

import hmac
import re
import sqlite3
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Any, Literal, Self

from sqlalchemy import (
    JSON,
    URL,
    BigInteger,
    Boolean,
    Column,
    ColumnElement,
    Connection,
    DateTime,
    Dialect,
    Engine,
    MetaData,
    Select,
    Table,
    Text,
    TypeDecorator,
    and_,
    create_engine,
    delete,
    event,
    make_url,
    select,
    update,
)
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as NoConnectionError

from firesteel import store
from firesteel.sdk.errors import ConfigError, StorageError
from firesteel.service import migrations

LOCK_SECONDS = 60
CONNECT_SECONDS = 10
_DRIVERS = {
    "sqlite": "sqlite+pysqlite",
    "sqlite+pysqlite": "sqlite+pysqlite",
    "postgres": "postgresql+psycopg",
    "postgresql": "postgresql+psycopg",
    "postgresql+psycopg": "postgresql+psycopg",
}
_FORMS = "sqlite:////PATH/OF/A/FILE or postgresql://USER:PASSWORD@HOST/NAME, with %40 for an @ in a password"


class DatabaseAway(StorageError):
    """The database cannot be reached, read or written; it may be back in a moment."""


class JobState(StrEnum):
    """Where a trainer job stands."""

    PENDING = "JOB_STATE_PENDING"
    CREATING = "JOB_STATE_CREATING"
    RUNNING = "JOB_STATE_RUNNING"
    FAILED = "JOB_STATE_FAILED"
    CANCELLED = "JOB_STATE_CANCELLED"
    PAUSED = "JOB_STATE_PAUSED"
    COMPLETED = "JOB_STATE_COMPLETED"
    DELETED = "JOB_STATE_DELETED"


@dataclass(frozen=True)
class Key:
    """An API key without its text, of which only the hash is kept."""

    key_id: str
    account: str
    name: str
    """For people, to tell keys apart."""
    created: datetime
    revoked: datetime | None


@dataclass(frozen=True)
class Job:
    """A trainer job, as it was asked for and as it stands."""

    account: str
    job_id: str
    base_model: str
    lora_rank: int
    shape: str
    forward_only: bool
    max_context_length: int
    state: JobState
    message: str
    request_sha256: str
    """Of the request that made it, to tell the same request sent twice from another under the same id."""
    display_name: str
    inactivity_timeout_s: int | None
    """None is never."""
    created: datetime
    updated: datetime


@dataclass(frozen=True)
class Checkpoint:
    """Weights in a folder: a job's, with or without its optimizer, or those behind a promoted model."""

    account: str
    owner: str
    """`jobs/<job id>` or `models/<model id>`."""
    name: str
    kind: Literal["training", "sampler"]
    base_model: str
    lora: Mapping[str, Any] | None
    """The fields of the LoraConfig; None where all weights are trained."""
    folder: str
    size: int
    """In bytes."""
    created: datetime


@dataclass(frozen=True)
class PromotedModel:
    """A checkpoint that became a model of its own."""

    account: str
    model_id: str
    base_model: str
    kind: Literal["HF_BASE_MODEL", "HF_PEFT_ADDON"]
    lora_rank: int
    folder: str
    checkpoint: str
    created: datetime


def now() -> datetime:
    """The time, in UTC."""
    return datetime.now(UTC)


def default_database(home: Path | None) -> str:
    """The URL of the database in the server's folder; None is that of FIRESTEEL_HOME."""
    folder = store.home() / "service" if home is None else home.expanduser().absolute()
    url = URL.create("sqlite", database=str(folder / "records.sqlite"))
    return url.render_as_string(hide_password=False)


class _String(TypeDecorator[str]):
    """Text that every database can keep: NUL and lone surrogates, which JSON may bring, become U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:
        """On the way in."""
        return None if value is None else re.sub("[\0\ud800-\udfff]", "\ufffd", value)


class _State(TypeDecorator[JobState]):
    """A state by its value."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: JobState | None, dialect: Dialect) -> str | None:
        """On the way in."""
        return None if value is None else value.value

    def process_result_value(self, value: str | None, dialect: Dialect) -> JobState | None:
        """On the way out."""
        return None if value is None else JobState(value)


class _Time(TypeDecorator[datetime]):
    """A time in UTC: SQLite drops the zone, and PostgreSQL gives that of its session."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """On the way in."""
        if value is not None and value.tzinfo is None:
            raise ValueError(f"{value} has no time zone")
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """On the way out."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


# Columns have the names of the fields above; a change here needs a step in `migrations/versions`.
TABLES = MetaData()


def _id(name: str) -> Column[str]:
    return Column(name, _String, primary_key=True)


def _string(name: str) -> Column[str]:
    return Column(name, _String, nullable=False)


def _number(name: str, *, nullable: bool = False) -> Column[int]:
    return Column(name, BigInteger, nullable=nullable)


def _time(name: str, *, nullable: bool = False) -> Column[datetime]:
    return Column(name, _Time, nullable=nullable)


_KEYS = Table(
    "api_keys",
    TABLES,
    _id("key_id"),
    Column("sha256", _String, nullable=False, unique=True),
    _string("account"),
    _string("name"),
    _time("created"),
    _time("revoked", nullable=True),
)
_JOBS = Table(
    "jobs",
    TABLES,
    _id("account"),
    _id("job_id"),
    _string("base_model"),
    _number("lora_rank"),
    _string("shape"),
    Column("forward_only", Boolean, nullable=False),
    _number("max_context_length"),
    Column("state", _State, nullable=False),
    _string("message"),
    _string("request_sha256"),
    _string("display_name"),
    _number("inactivity_timeout_s", nullable=True),
    _time("created"),
    _time("updated"),
)
_CHECKPOINTS = Table(
    "checkpoints",
    TABLES,
    _id("account"),
    _id("owner"),
    _id("name"),
    _id("kind"),
    _string("base_model"),
    Column("lora", JSON),
    _string("folder"),
    _number("size"),
    _time("created"),
)
_MODELS = Table(
    "models",
    TABLES,
    _id("account"),
    _id("model_id"),
    _string("base_model"),
    _string("kind"),
    _number("lora_rank"),
    _string("folder"),
    _string("checkpoint"),
    _time("created"),
)


class Records:
    """The records in one database. May be used from several threads.

    A database that cannot be reached, read or written raises `StorageError`, from every method.
    """

    def __init__(self, engine: Engine, shown: str) -> None:
        self._engine = engine
        self._shown = shown
        """The URL without its password."""

    @classmethod
    def open(cls, url: str) -> Self:
        """Open a database and bring its schema up to date; a file that is not there is made.

        Raises `ConfigError` for a URL that is none, and for a database of a newer Firesteel.
        """
        parsed = _parse(url)
        shown = _without_password(parsed)
        if parsed.database and parsed.get_backend_name() == "sqlite":
            _make_folder(Path(parsed.database).parent, shown)
        records = cls(_engine(parsed, shown), shown)
        try:
            with records._explained():
                migrations.upgrade(records._engine, shown)
        except BaseException:
            records.close()
            raise
        return records

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def add_key(self, key: Key, sha256: str) -> None:
        """Keep a key by the hash of its text. Raises `ConfigError` where its id or its hash is taken."""
        if not self._add(_KEYS, vars(key) | {"sha256": sha256}):
            raise ConfigError(f"key {key.key_id!r} or its text is there already; make a new one")

    def find_key(self, sha256: str) -> Key | None:
        """The key of which this is the hash, be it revoked or not."""
        row = self._one(_KEYS.select().where(_KEYS.c.sha256 == sha256))
        # What the index found is compared once more, in a time that says nothing about where two hashes part.
        if row is None or not hmac.compare_digest(row.pop("sha256").encode(), sha256.encode()):
            return None
        return Key(**row)

    def keys(self) -> list[Key]:
        """All keys, oldest first, revoked ones too."""
        columns = [_KEYS.c[field.name] for field in fields(Key)]
        return [Key(**row) for row in self._all(select(*columns).order_by(_KEYS.c.created, _KEYS.c.key_id))]

    def revoke_key(self, key_id: str, when: datetime) -> bool:
        """Let a key open nothing more; False if it is not there or was revoked before."""
        found = _is(_KEYS, key_id=key_id) & _KEYS.c.revoked.is_(None)
        return self._changed(update(_KEYS).where(found).values(revoked=when))

    def add_job(self, job: Job) -> bool:
        """Keep a job; False, and nothing changes, if the account has one of this id already."""
        return self._add(_JOBS, vars(job))

    def job(self, account: str, job_id: str) -> Job | None:
        """An account's job."""
        row = self._one(_JOBS.select().where(_is(_JOBS, account=account, job_id=job_id)))
        return None if row is None else Job(**row)

    def renew_job(self, job: Job) -> bool:
        """Put a job in the place of a deleted one of its id; False, and nothing changes, if that is not deleted."""
        found = _is(_JOBS, account=job.account, job_id=job.job_id, state=JobState.DELETED)
        return self._changed(update(_JOBS).where(found).values(**vars(job)))

    def jobs(self, account: str | None = None, states: Collection[JobState] | None = None) -> list[Job]:
        """The jobs of an account, or of all, in these states or any, oldest first."""
        query = _JOBS.select().order_by(_JOBS.c.created, _JOBS.c.account, _JOBS.c.job_id)
        if account is not None:
            query = query.where(_JOBS.c.account == account)
        if states is not None:
            query = query.where(_JOBS.c.state.in_(states))
        return [Job(**row) for row in self._all(query)]

    def update_job(
        self,
        account: str,
        job_id: str,
        state: JobState,
        message: str,
        when: datetime,
        was: JobState | None = None,
    ) -> bool:
        """Note a job's new state; False if there is no such job, or it is no longer in the state that it `was` in."""
        found = _is(_JOBS, account=account, job_id=job_id, **({} if was is None else {"state": was}))
        return self._changed(update(_JOBS).where(found).values(state=state, message=message, updated=when))

    def update_job_context(self, account: str, job_id: str, max_context_length: int) -> bool:
        """Note how long a job's sequences may be, once that is known; False if there is no such job."""
        found = _is(_JOBS, account=account, job_id=job_id)
        return self._changed(update(_JOBS).where(found).values(max_context_length=max_context_length))

    def add_checkpoint(self, checkpoint: Checkpoint) -> bool:
        """Keep a checkpoint; False, and nothing changes, if its owner has one of this name and kind already."""
        lora = None if checkpoint.lora is None else dict(checkpoint.lora)
        return self._add(_CHECKPOINTS, vars(checkpoint) | {"lora": lora})

    def checkpoint(self, account: str, owner: str, name: str, kind: str) -> Checkpoint | None:
        """One checkpoint of an owner."""
        found = _is(_CHECKPOINTS, account=account, owner=owner, name=name, kind=kind)
        row = self._one(_CHECKPOINTS.select().where(found))
        return None if row is None else Checkpoint(**row)

    def checkpoints(self, account: str, owner: str | None = None) -> list[Checkpoint]:
        """The checkpoints of an account, or of one owner in it, oldest first."""
        columns = _CHECKPOINTS.c
        query = _CHECKPOINTS.select().where(columns.account == account)
        if owner is not None:
            query = query.where(columns.owner == owner)
        query = query.order_by(columns.created, columns.owner, columns.name, columns.kind)
        return [Checkpoint(**row) for row in self._all(query)]

    def remove_checkpoint(self, account: str, owner: str, name: str, kind: str) -> bool:
        """Forget a checkpoint, not its files; False if there is none."""
        found = _is(_CHECKPOINTS, account=account, owner=owner, name=name, kind=kind)
        return self._changed(delete(_CHECKPOINTS).where(found))

    def add_model(self, model: PromotedModel) -> bool:
        """Keep a promoted model; False, and nothing changes, if the account has one of this id already."""
        return self._add(_MODELS, vars(model))

    def model(self, account: str, model_id: str) -> PromotedModel | None:
        """An account's promoted model."""
        row = self._one(_MODELS.select().where(_is(_MODELS, account=account, model_id=model_id)))
        return None if row is None else PromotedModel(**row)

    def models(self, account: str | None = None) -> list[PromotedModel]:
        """The promoted models of an account, or of all, oldest first."""
        query = _MODELS.select().order_by(_MODELS.c.created, _MODELS.c.account, _MODELS.c.model_id)
        if account is not None:
            query = query.where(_MODELS.c.account == account)
        return [PromotedModel(**row) for row in self._all(query)]

    def _add(self, table: Table, values: Mapping[str, Any]) -> bool:
        make = postgresql.insert if self._engine.dialect.name == "postgresql" else sqlite.insert
        return self._changed(make(table).values(**values).on_conflict_do_nothing())

    def _changed(self, statement: Any) -> bool:
        with self._transaction() as connection:
            return connection.execute(statement, execution_options={"preserve_rowcount": True}).rowcount > 0

    def _all(self, query: Select[Any]) -> list[dict[str, Any]]:
        with self._transaction() as connection:
            return [dict(row) for row in connection.execute(query).mappings()]

    def _one(self, query: Select[Any]) -> dict[str, Any] | None:
        return next(iter(self._all(query)), None)

    @contextmanager
    def _transaction(self) -> Iterator[Connection]:
        with self._explained(), self._engine.begin() as connection:
            yield connection

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (DBAPIError, NoConnectionError) as error:
            # The driver's own words: what SQLAlchemy adds is the statement.
            reason = error.orig if isinstance(error, DBAPIError) else error
            raise _refused(self._shown, reason) from error


def _is(table: Table, **wanted: str) -> ColumnElement[bool]:
    return and_(*(table.c[name] == value for name, value in wanted.items()))


def _refused(shown: str, reason: object) -> DatabaseAway:
    return DatabaseAway(
        f"records {shown}: {' '.join(str(reason).split())}; see that this database can be reached and written to, "
        "or name another"
    )


def _parse(url: str) -> URL:
    """Read a URL. What is wrong with it is said without showing it: it may hold a password."""
    try:
        parsed = make_url(url)
    except (ArgumentError, ValueError):
        raise ConfigError(f"the database's URL cannot be read; write {_FORMS}") from None
    driver = _DRIVERS.get(parsed.drivername)
    if driver is None:
        raise ConfigError(f"there is no support for a database of {parsed.drivername!r}; write {_FORMS}")
    if driver.startswith("sqlite"):
        _refuse_memory(parsed)
    elif "@" in f"{parsed.host}{parsed.database}":  # the rest of a password that has an @ in it
        raise ConfigError(f"the database's URL has more than one @; write {_FORMS}")
    return parsed.set(drivername=driver)


def _refuse_memory(url: URL) -> None:
    if not url.database or url.database == ":memory:" or url.database.startswith("file:"):
        raise ConfigError(f"{url.render_as_string()} names no file to keep records in; write {_FORMS}")


def _without_password(url: URL) -> str:
    secret = [name for name in url.query if name.endswith("password")]
    return url.difference_update_query(secret).set(drivername=url.get_backend_name()).render_as_string()


def _make_folder(folder: Path, shown: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _refused(shown, error) from error


def _engine(url: URL, shown: str) -> Engine:
    if url.get_backend_name() == "sqlite":
        engine = create_engine(url, connect_args={"timeout": LOCK_SECONDS}, hide_parameters=True)
        event.listen(engine, "connect", _set_up_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
        return engine
    try:
        return create_engine(
            url.update_query_dict({"connect_timeout": str(CONNECT_SECONDS)} | dict(url.query)),
            # Of a session that sees what others commit while it waits for a lock, whatever the server's default is.
            isolation_level="READ COMMITTED",
            pool_pre_ping=True,  # a server that was started anew is no error
            hide_parameters=True,
        )
    except ImportError as error:
        raise ConfigError(f"records {shown}: {error}; pip install 'firesteel[server]'") from error


def _set_up_sqlite(connection: sqlite3.Connection, _: object) -> None:
    _turn_on_write_ahead_log(connection)
    connection.execute("PRAGMA synchronous=FULL")  # what was answered must survive a power cut
    connection.execute("PRAGMA foreign_keys=ON")


def _turn_on_write_ahead_log(connection: sqlite3.Connection) -> None:
    # Processes that open a new file at the same moment get "locked" from this one statement at once: SQLite's own
    # waiting does not cover it.
    give_up = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            connection.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > give_up:
                raise
            time.sleep(0.02)


def _begin_sqlite(connection: Connection) -> None:
    connection.exec_driver_sql(connection.get_execution_options().get(migrations.BEGIN, "BEGIN"))
