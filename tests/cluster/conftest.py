"""The database that the tests of jobs run on: a new SQLite file, or what ISTHMUS_TEST_DB names; logs."""

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import create_engine, text


@pytest.fixture
def url(tmp_path: Path) -> Iterator[str]:
    """An empty database. Of a server (`make test-postgres`) its schema `public` is emptied."""
    server = os.environ.get("ISTHMUS_TEST_DB")
    if server is None:
        yield f"sqlite:///{tmp_path / 'jobs.db'}"
        return
    engine = create_engine(server)
    with engine.begin() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    engine.dispose()
    yield server


@pytest.fixture(autouse=True)
def logs_as_before() -> Iterator[None]:
    """What commands that are run in this process change of its logs."""
    loggers = [logging.getLogger(name) for name in ("isthmus", "isthmus.audit")]
    before = [(each, each.handlers[:], each.propagate, each.level) for each in loggers]
    yield
    for each, handlers, propagate, level in before:
        for handler in set(each.handlers) - set(handlers):
            handler.close()
        each.handlers[:], each.propagate = handlers, propagate
        each.setLevel(level)
