"""What decides where requests run needs no torch, no gRPC and no Ray: a simulator runs it without them."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FORBIDDEN = ("torch", "grpc", "ray")
PURE = sorted(
    [
        *(path.relative_to(ROOT) for path in (ROOT / "cluster/router").rglob("*.py")),
        *(Path(f"cluster/fleet/{name}.py") for name in ("worker_table", "canary_schedule")),
        Path("cluster/requests/fair_queue.py"),
    ]
)


@pytest.mark.parametrize("path", PURE, ids=str)
def test_it_is_imported_without_torch_grpc_and_ray(path: Path) -> None:
    module = ".".join(("isthmus", *path.with_suffix("").parts))
    code = f"""
import sys
sys.modules.update(dict.fromkeys({FORBIDDEN!r}))  # an import of them raises ImportError
import {module}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr


def test_clients_know_the_states_of_jobs_without_their_database() -> None:
    code = """
import sys
sys.modules.update(dict.fromkeys(("sqlalchemy", "alembic", "torch", "ray")))
import isthmus.cluster.client.jobs, isthmus.cluster.client.batch_run
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
