"""The database that the tests of jobs run on: a new SQLite file, or what ISTHMUS_TEST_DB names."""

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
