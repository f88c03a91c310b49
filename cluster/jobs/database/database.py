"""The database of jobs: SQLite (WAL) by default, any SQLAlchemy URL; its clock; its errors as ours."""

import contextlib
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, DBAPIError, NoSuchModuleError, SQLAlchemyError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from ....proto.errors import Exhausted, InvalidRequest, IsthmusError, Unavailable

BUSY_S = 5.0  # that a writer waits for another process's transaction
CONNECT_S = 10  # that a server may take to let somebody in
STATEMENT_S = 30  # that it may take for one statement, locks included; a transaction may be idle for as long
POOL_S = 10.0  # that a caller waits for a connection while others use them all
READERS = 4
CLOCK = text("SELECT CAST(EXTRACT(EPOCH FROM CLOCK_TIMESTAMP()) * 1000000 AS BIGINT)")
FULL = ("disk is full", "disk full", "no space left", "53100", "could not extend file")


class Database:
    """One engine for the single writer, one for readers. `close` gives all connections back."""

    def __init__(self, url: str) -> None:
        """InvalidRequest for a URL that is none, or of a driver that is not installed. Connects later."""
        self._url = _checked(url)
        self.name = self._url.render_as_string(hide_password=True)
        self.is_sqlite = self._url.get_backend_name() == "sqlite"
        try:
            self.writer = self._engine("BEGIN IMMEDIATE", pool_size=1)
            self.reader = self._engine("BEGIN", pool_size=READERS)
        except (ArgumentError, NoSuchModuleError) as error:
            raise InvalidRequest(f"no database {self.name}: {error}") from None
        except ImportError as error:
            hint = " (pip install 'isthmus[postgres]')" if error.name == "psycopg" else ""
            raise InvalidRequest(f"{self.name} needs the Python package {error.name}{hint}") from None

    @contextmanager
    def write(self) -> Iterator[Connection]:
        """A transaction of the writer. Exhausted (full) or Unavailable (locked, gone) where the database fails."""
        with translated(self.name), self.writer.begin() as connection:
            yield connection

    @contextmanager
    def read(self) -> Iterator[Connection]:
        """A transaction that sees one state of the database; errors as `write`."""
        with translated(self.name), self.reader.begin() as connection:
            yield connection

    def now_us(self, connection: Connection) -> int:
        """PostgreSQL's time, so that all gateways that share it go by one clock; elsewhere this host's."""
        if connection.dialect.name == "postgresql":
            return connection.execute(CLOCK).scalar_one()
        return time.time_ns() // 1000

    def close(self) -> None:
        """Closes all connections."""
        self.writer.dispose()
        self.reader.dispose()

    def _engine(self, begin: str, pool_size: int) -> Engine:
        if not self.is_sqlite:
            arguments = _server_arguments(self._url)
            return create_engine(
                self._url,
                pool_size=pool_size,
                max_overflow=0,
                pool_pre_ping=True,
                pool_timeout=POOL_S,
                connect_args=arguments,
            )
        if self._url.database:
            _make_private(Path(self._url.database))
        arguments = {"timeout": BUSY_S, "check_same_thread": False}
        engine = create_engine(
            self._url, pool_size=pool_size, max_overflow=0, pool_timeout=POOL_S, connect_args=arguments
        )
        event.listen(engine, "connect", _prepare_sqlite)
        # The driver itself would begin a transaction late, and deferred: two writers could then fail each other.
        event.listen(engine, "begin", lambda connection: connection.exec_driver_sql(begin))
        return engine


def _make_private(file: Path) -> None:
    """Prompts and answers of all tenants are in it: nobody else may read the file, nor those that SQLite puts beside
    it, which get its mode."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(OSError):  # what is wrong with the place, SQLite says when it opens the file
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
        for each in (file, *(file.with_name(f"{file.name}{end}") for end in ("-wal", "-shm"))):
            if each.exists():
                each.chmod(0o600)


class Contended(Unavailable):
    """Another gateway's transaction was in the way: the same transaction again may succeed at once."""


@contextmanager
def translated(name: str) -> Iterator[None]:
    """Errors of the database as Exhausted or Unavailable. A bug (bad SQL, wrong types) stays what it is.

    Where the database lies, and the driver's own words, are in the error's `private` part: clients see the rest.
    """
    try:
        yield
    except DBAPIError as error:
        reason = " ".join(str(error.orig).split())
        ours = _error_of(error, reason)
        if isinstance(ours, IsthmusError):
            ours.private = f"{name}: {reason}"
        raise ours from error
    except PoolTimeout:
        raise Unavailable(f"the database of jobs is busy: no connection for {POOL_S:g} s: try again") from None
    except OSError as error:
        ours = Unavailable("the database of jobs cannot be used")
        ours.private = f"{name}: {error.strerror}"
        raise ours from error


def _error_of(error: DBAPIError, reason: str) -> IsthmusError | SQLAlchemyError:
    if any(sign in reason.lower() for sign in FULL):
        return Exhausted("the database of jobs is full: delete jobs, or make room")
    if getattr(error.orig, "sqlstate", None) in ("40001", "40P01"):  # serialization failure, deadlock
        return Contended("the database of jobs is busy: try again")
    if "locked" in reason or "busy" in reason:
        return Unavailable("the database of jobs is locked by another program: try again")
    if type(error).__name__ in ("DatabaseError", "OperationalError", "InterfaceError", "InternalError"):
        return Unavailable("the database of jobs cannot be used")
    return error


def _server_arguments(url: URL) -> dict[str, Any]:
    """Timeouts of a PostgreSQL server's connections; what the URL says itself wins. Other servers have their own.

    A server that is gone without a word is noticed within about 20 s, also in the middle of a statement.
    """
    if url.get_backend_name() != "postgresql":
        return {}
    limits = {"statement_timeout": STATEMENT_S, "idle_in_transaction_session_timeout": STATEMENT_S}
    own = url.query.get("options", "")
    options = " ".join([*(f"-c {name}={seconds}s" for name, seconds in limits.items()), str(own)]).strip()
    named = {"connect_timeout": CONNECT_S, "tcp_user_timeout": 20_000, "keepalives_idle": 10, "keepalives_interval": 5}
    return {**{name: value for name, value in named.items() if name not in url.query}, "options": options}


def _checked(url: str) -> URL:
    try:
        parsed = make_url(url)
    except ArgumentError:
        raise InvalidRequest(
            f"{url!r} is not a database URL; allowed: sqlite:////path/jobs.db, postgresql://user@host/name, ..."
        ) from None
    if parsed.drivername in ("postgresql", "postgres"):
        return parsed.set(drivername="postgresql+psycopg")
    if parsed.get_backend_name() == "sqlite" and parsed.database in (None, "", ":memory:"):
        raise InvalidRequest("jobs in memory would be lost with the gateway; allowed: sqlite:////path/jobs.db")
    return parsed


def _prepare_sqlite(connection: Any, record: object) -> None:
    connection.isolation_level = None
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "temp_store=MEMORY", "cache_size=-65536"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()
