"""What the other tests stand on: the small kubelet and the node's network, with shells instead of the chart."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pods.listening import connections, open_ports
from pods.node.kubelet import Kubelet, Pod
from pods.node.network import Network
from pods.node.objects import Object, Objects

pytestmark = pytest.mark.skipif(
    "ISTHMUS_TEST_PODS" not in os.environ, reason="takes root and namespaces of its own: make test-pods"
)
RESTRICTED = {
    "runAsNonRoot": True,
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
LISTEN = "exec python -m http.server 8000 --bind $IP"


@pytest.fixture
def kubelet(tmp_path: Path) -> Iterator[Kubelet]:
    objects = Objects()
    objects.add({"kind": "Secret", "metadata": {"name": "key"}, "stringData": {"it": "a secret"}})
    (tmp_path / "claim").mkdir(mode=0o777)
    running = Kubelet(tmp_path / "kubelet", Network(tmp_path / "hosts"), objects, {"claim": tmp_path / "claim"})
    yield running
    running.close()


def shell(script: str, **rest: Any) -> Object:
    address = {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}}
    return {"name": "main", "command": ["bash", "-c", script], "env": [address], **rest}


def pod(name: str, container: Object, **spec: Any) -> Object:
    return {"metadata": {"name": name, "labels": {"app": name}}, "spec": {"containers": [container], **spec}}


def output(pod: Pod) -> list[str]:
    return pod.containers[0].log.read_text().splitlines()


def run(kubelet: Kubelet, pod: Object) -> Pod:
    running = kubelet.run(pod)
    running.wait_ready(20)
    return running


def wait_lines(log: Path, count: int, within_s: float = 20) -> None:
    end = time.monotonic() + within_s
    while len(log.read_text().splitlines()) < count:
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.05)


def test_a_container_has_its_volumes_and_nothing_else_to_write_to(kubelet: Kubelet) -> None:
    script = (
        "id -u; cat /key/it; echo; stat -c %a /key/it; touch /tmp/a && echo written; "
        "touch /b || touch /key/c || touch /usr/d || echo refused; "
        "grep -c 'Cap.*0000000000000000' /proc/self/status; sleep 60"
    )
    volumes = [{"name": "tmp", "emptyDir": {}}, {"name": "key", "secret": {"secretName": "key", "defaultMode": 0o400}}]
    mounts = [{"name": "tmp", "mountPath": "/tmp"}, {"name": "key", "mountPath": "/key", "readOnly": True}]
    probe = {"exec": {"command": ["bash", "-c", "test -e /tmp/a && sleep 0.2"]}}
    container = shell(script, securityContext=RESTRICTED, volumeMounts=mounts, readinessProbe=probe)
    running = run(kubelet, pod("a", container, volumes=volumes, securityContext={"runAsUser": 1000, "fsGroup": 1000}))
    said = [line for line in output(running) if not line.startswith("touch:")]
    running.kill()
    assert said == ["1000", "a secret", "440", "written", "refused", "5"], "no capability of five kinds"


def test_the_end_of_a_pod_runs_its_hook_then_sigterm_and_waits_no_longer_than_its_grace(kubelet: Kubelet) -> None:
    hook = {"preStop": {"exec": {"command": ["bash", "-c", "echo hook"]}}}
    polite = run(kubelet, pod("a", shell("trap 'echo term; exit' TERM; while :; do sleep 0.1; done", lifecycle=hook)))
    log = polite.containers[0].log
    assert polite.end() < 5
    assert [line for line in log.read_text().splitlines() if line] == ["[kubelet] preStop ended with 0: hook", "term"]
    deaf = run(kubelet, pod("b", shell("trap '' TERM; while :; do sleep 0.1; done"), terminationGracePeriodSeconds=2))
    assert 2 <= deaf.end() < 5


def test_a_sidecar_starts_before_the_others_ends_after_them_and_is_started_again(kubelet: Kubelet) -> None:
    record = "trap 'echo %s ends >>/shared/log; exit' TERM; echo %s >>/shared/log; while :; do sleep 0.1; done"
    mounts = [{"name": "shared", "mountPath": "/shared"}]
    sidecar = shell(record % ("sidecar", "sidecar"), name="sidecar", restartPolicy="Always", volumeMounts=mounts)
    first = shell("echo first >>/shared/log", name="first", volumeMounts=mounts)
    main = shell(record % ("main", "main"), volumeMounts=mounts)
    spec = {"initContainers": [first, sidecar], "restartPolicy": "Never", "shareProcessNamespace": True}
    volumes = [{"name": "shared", "persistentVolumeClaim": {"claimName": "claim"}}]
    running = run(kubelet, pod("a", main, volumes=volumes, securityContext={"runAsUser": 0}, **spec))
    (container,) = running.sidecars
    main_process, log = running.containers[0].main, running.volumes["shared"] / "log"
    wait_lines(log, 3)
    container.probe_failed("livenessProbe")
    wait_lines(log, 4)
    assert (container.restarts, running.containers[0].main) == (1, main_process)
    running.end()
    assert log.read_text().splitlines() == ["first", "sidecar", "main", "sidecar", "main ends", "sidecar ends"]


def test_services_lead_to_ready_pods_and_policies_are_kept(kubelet: Kubelet) -> None:
    network = kubelet.network
    port = {"ports": [{"name": "http", "containerPort": 8000}], "readinessProbe": {"tcpSocket": {"port": "http"}}}
    network.services.append(
        {"metadata": {"name": "web"}, "spec": {"selector": {"app": "a"}, "ports": [{"port": 80, "targetPort": "http"}]}}
    )
    client = run(kubelet, pod("b", shell("sleep 60")))
    assert connections(client, ["web:80"]) == {"web:80": "Connection refused"}
    server = run(kubelet, pod("a", shell(LISTEN, **port)))
    assert open_ports(server) == {8000}
    full_name = "web.isthmus.svc.cluster.local:80"
    assert connections(client, ["web:80", full_name, "a:8000"]) == {"web:80": "", full_name: "", "a:8000": ""}
    peers = [{"podSelector": {"matchLabels": {"app": "c"}}}]
    policy = {"podSelector": {"matchLabels": {"app": "a"}}, "ingress": [{"from": peers, "ports": [{"port": "http"}]}]}
    network.policies.append({"metadata": {"name": "p"}, "spec": policy})
    network.renew()
    assert connections(client, ["web:80", "a:8000"]) == dict.fromkeys(["web:80", "a:8000"], "No route to host")
    peers[0]["podSelector"]["matchLabels"]["app"] = "b"
    network.renew()
    assert connections(client, ["web:80", "a:8000", "a:8001"]) == {
        "web:80": "",
        "a:8000": "",
        "a:8001": "No route to host",
    }
    for running in (client, server):
        running.kill()
