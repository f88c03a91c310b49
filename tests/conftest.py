"""What must be set before torch and Triton are imported, for all tests; `pytest --suite=NAME`."""

import atexit
import ctypes
import gc
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from suites import SUITES, suite_of

# Two threads on a busy two-core machine were measured 30 times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A test that wants jobs names a database; none may touch that of the person who runs the tests.
os.environ["ISTHMUS_JOBS_DB"] = "none"
# Nor may one find that person's clusters, or make certificates there. What runs inside a test's process talks in plain
# text (`Transport()`); processes are encrypted, as a user starts them (`processes_talk_encrypted`).
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="isthmus-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)
os.environ["ISTHMUS_TLS"] = "off"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite", action="append", choices=SUITES, help="only test files of this suite; may be repeated")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    wanted = config.getoption("suite")
    is_test = collection_path.name.startswith("test_") and collection_path.suffix == ".py"
    return True if wanted and is_test and suite_of(collection_path) not in wanted else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest file first: side by side the others fill the time beside it."""
    items.sort(key=lambda item: item.path.name != "test_exactness.py")


@pytest.fixture(autouse=True)
def unit_tests_start_no_process(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """What starts one is of another suite, by its imports (`suites.py`)."""

    def refuse(*command: Any, **_: Any) -> None:
        pytest.fail(f"a unit test starts a process: {command}")

    if suite_of(request.path) == "unit":
        monkeypatch.setattr(subprocess.Popen, "__init__", refuse)


@pytest.fixture(scope="module", autouse=True)
def processes_talk_encrypted(request: pytest.FixtureRequest) -> Iterator[None]:
    """Settings of what the process and chaos suites start: the default, tls: auto."""
    if suite_of(request.path) not in ("process", "chaos"):
        yield
        return
    off = os.environ.pop("ISTHMUS_TLS", None)
    yield
    if off is not None:
        os.environ["ISTHMUS_TLS"] = off


@pytest.fixture(scope="module", autouse=True)
def freed_memory_is_given_back() -> Iterator[None]:
    """A loaded model has malloc keep what is freed. Here many are loaded in turn, and it came to 15 GB."""
    yield
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)
