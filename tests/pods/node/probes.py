"""The probes of a running container: readiness puts the pod behind its Services, liveness ends a container that hangs.

They are asked from the node, as a kubelet does, in the clear.
"""

import socket
import subprocess
import threading
import urllib.request
from typing import TYPE_CHECKING, Any

import grpc
from grpc_health.v1.health_pb2 import HealthCheckRequest, HealthCheckResponse
from grpc_health.v1.health_pb2_grpc import HealthStub

from .objects import Object, port_number

if TYPE_CHECKING:
    from .container import Container

PROBES = ("startupProbe", "readinessProbe", "livenessProbe")
LONGEST_S = 1.0  # between two looks, whatever the probe says: a test does not wait for the others


class Probing:
    """Asks the probes of one start of a container, in a thread of its own."""

    def __init__(self, container: "Container") -> None:
        self._container = container
        self._probes: dict[str, Object] = {
            name: container.container[name] for name in PROBES if name in container.container
        }
        self._ready = "readinessProbe" not in self._probes
        if "startupProbe" not in self._probes:
            container.started.set()
        self._failures: dict[str, int] = {}
        self._stopped = threading.Event()
        threading.Thread(target=self._run, daemon=True).start()

    @property
    def ready(self) -> bool:
        return self._container.started.is_set() and self._ready

    def stop(self) -> None:
        self._stopped.set()

    def _run(self) -> None:
        probes, started = self._probes, self._container.started
        first = min((probe.get("initialDelaySeconds", 0) for probe in probes.values()), default=0)
        wait = min([LONGEST_S, *(probe.get("periodSeconds", 10) for probe in probes.values())])
        if not probes or self._stopped.wait(first):
            return
        while not self._stopped.wait(wait):
            if not started.is_set():
                if self._holds("startupProbe", probes["startupProbe"]):
                    started.set()
                continue
            if "readinessProbe" in probes:
                self._ready = self._holds("readinessProbe", probes["readinessProbe"])
            if "livenessProbe" in probes:
                self._holds("livenessProbe", probes["livenessProbe"])

    def _holds(self, name: str, probe: Object) -> bool:
        """The probe's last word: it must fail `failureThreshold` times in a row to take back what it said."""
        if self._ask(probe):
            self._failures[name] = 0
            return True
        self._failures[name] = self._failures.get(name, 0) + 1
        # Counted in the probe's own periods, which are longer than those here.
        allowed = probe.get("failureThreshold", 3) * max(1.0, probe.get("periodSeconds", 10) / LONGEST_S)
        if self._failures[name] >= allowed:
            if name != "readinessProbe" and not self._stopped.is_set():
                self._container.probe_failed(name)
            return False
        return name == "readinessProbe" and self._ready

    def _ask(self, probe: Object) -> bool:
        pod, timeout_s = self._container.pod, probe.get("timeoutSeconds", 1)
        address = pod.endpoint.address
        try:
            match probe:
                case {"grpc": {"port": port, **rest}}:
                    with grpc.insecure_channel(f"{address}:{port}") as channel:
                        request = HealthCheckRequest(service=rest.get("service", ""))
                        stub: Any = HealthStub(channel)  # which the package has no types of
                        answer = stub.Check(request, timeout=timeout_s)
                    return answer.status == HealthCheckResponse.SERVING
                case {"tcpSocket": {"port": port}}:
                    socket.create_connection((address, port_number(port, pod.pod)), timeout_s).close()
                    return True
                case {"httpGet": {"port": port, **rest}}:
                    url = f"http://{address}:{port_number(port, pod.pod)}{rest.get('path', '/')}"
                    with urllib.request.urlopen(url, timeout=timeout_s) as answer:
                        return answer.status < 400
                case {"exec": {"command": command}}:
                    return self._container.execute(command, timeout_s).returncode == 0
                case _:
                    raise AssertionError(f"no probe of a kind that is known here: {probe}")
        except (OSError, grpc.RpcError, subprocess.TimeoutExpired):
            return False
