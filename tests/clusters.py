"""`isthmus` as processes of their own, the way a user starts it; `processes.py` of the benchmarks starts them."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from support.dialling import blocking_channel
from support.processes import ISTHMUS, free_port, isthmus

from isthmus.proto.worker_pb2 import GetStatusRequest, WorkerHealth, WorkerRole
from isthmus.proto.worker_pb2_grpc import ClusterStub

START_S = 180


def run(*arguments: str, stdin: bytes = b"", timeout_s: float = 120) -> subprocess.CompletedProcess[bytes]:
    """One `isthmus` command, to its end."""
    return subprocess.run([ISTHMUS, *arguments], input=stdin, capture_output=True, timeout=timeout_s)


def wait_ready(admin: str, workers: int, within_s: float = START_S) -> None:
    """Returns once the gateway with this admin port sees that many ready workers, of both roles.

    TimeoutError after `within_s`.
    """
    end = time.monotonic() + within_s
    roles: set[WorkerRole.ValueType] = set()
    with blocking_channel(admin) as channel:
        while time.monotonic() < end:
            try:
                status = ClusterStub(channel).GetStatus(GetStatusRequest(), timeout=2)
                ready = [w for w in status.workers if w.health == WorkerHealth.WORKER_HEALTH_READY]
                roles = {worker.role for worker in ready}
                if len(ready) == workers and len(roles) == 2:
                    return
            except grpc.RpcError:
                pass
            time.sleep(0.2)
    raise TimeoutError(f"no {workers} ready workers at {admin}; roles seen: {roles}")


@contextmanager
def cluster_without_ray(model: str, *, gateway: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """A prefill worker, a decode worker and a gateway; yields the gateway's address and that of its admin port."""
    prefill, decode, server, admin = (f"127.0.0.1:{free_port()}" for _ in range(4))
    listen = ("--listen", server, "--admin-listen", admin)
    own = ("--model", model, "--dtype", "fp32", "--threads", "1")
    with (
        isthmus("worker", "prefill", "--listen", prefill, *own),
        isthmus("worker", "decode", "--listen", decode, *own),
        isthmus("gateway", *listen, "--workers", f"{prefill},{decode}", "--model", model, *gateway),
    ):
        wait_ready(admin, 2)
        yield server, admin
