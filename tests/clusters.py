"""`isthmus` as processes of their own, the way a user starts it; `processes.py` of the benchmarks starts them."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grpc
from support.dialling import local_security
from support.processes import ISTHMUS, free_port, isthmus

from isthmus.proto.worker_pb2 import GetStatusRequest, WorkerHealth, WorkerRole
from isthmus.proto.worker_pb2_grpc import ClusterStub

START_S = 180


def run(*arguments: str, stdin: bytes = b"", timeout_s: float = 120) -> subprocess.CompletedProcess[bytes]:
    """One `isthmus` command, to its end."""
    return subprocess.run([ISTHMUS, *arguments], input=stdin, capture_output=True, timeout=timeout_s)


def blocking_channel(address: str) -> grpc.Channel:
    """To a gateway, for tests that are not asynchronous."""
    security = local_security("client")
    if security is None:
        return grpc.insecure_channel(address)
    _, credentials = security.channel_credentials()
    name = security.expected_name("gateway")
    return grpc.secure_channel(address, credentials, options=[("grpc.ssl_target_name_override", name)])


def wait_ready(server: str, workers: int, within_s: float = START_S) -> None:
    """Returns once the gateway sees that many ready workers, of both roles; TimeoutError after `within_s`."""
    end = time.monotonic() + within_s
    roles: set[WorkerRole.ValueType] = set()
    with blocking_channel(server) as channel:
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
    raise TimeoutError(f"no {workers} ready workers at {server}; roles seen: {roles}")


@contextmanager
def cluster_without_ray(model: str, *, gateway: tuple[str, ...] = ()) -> Iterator[str]:
    """A prefill worker, a decode worker and a gateway; yields the gateway's address."""
    prefill, decode, server = (f"127.0.0.1:{free_port()}" for _ in range(3))
    own = ("--model", model, "--dtype", "fp32", "--threads", "1")
    with (
        isthmus("worker", "prefill", "--listen", prefill, *own),
        isthmus("worker", "decode", "--listen", decode, *own),
        isthmus("gateway", "--listen", server, "--workers", f"{prefill},{decode}", "--model", model, *gateway),
    ):
        wait_ready(server, 2)
        yield server
