"""What must be set before torch and Triton are imported, for all tests."""

import ctypes
import gc
import os
import shutil
from collections.abc import Iterator
from contextlib import suppress

import pytest

# Two threads on a busy two-core machine were measured 30 times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A test that wants jobs names a database; none may touch that of the person who runs the tests.
os.environ["ISTHMUS_JOBS_DB"] = "none"


@pytest.fixture(scope="module", autouse=True)
def freed_memory_is_given_back() -> Iterator[None]:
    """A loaded model has malloc keep what is freed. Here many are loaded in turn, and it came to 15 GB."""
    yield
    gc.collect()
    with suppress(AttributeError, OSError):  # glibc's own
        ctypes.CDLL(None).malloc_trim(0)
