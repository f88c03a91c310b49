"""What must be set before torch and Triton are imported, for all tests."""

import os
import shutil

# Two threads on a busy two-core machine were measured 30 times slower than one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
if shutil.which("nvidia-smi") is None:
    os.environ.setdefault("TRITON_INTERPRET", "1")
# A test that wants jobs names a database; none may touch that of the person who runs the tests.
os.environ["ISTHMUS_JOBS_DB"] = "none"
