"""A rendered chart, brought up: the pods of its RayCluster and Deployments, its Services, its NetworkPolicies."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from . import kuberay
from .node.kubelet import Kubelet, Pod
from .node.network import Network
from .node.objects import Object, Objects

READY_S = 180
LOOK_S = 0.2


class Cluster:
    """What one release of the chart runs. `claims` and `image_variables` as for `Kubelet`."""

    def __init__(
        self,
        rendered: str,
        folder: Path,
        *,
        claims: Mapping[str, Path] | None = None,
        image_variables: Mapping[str, str] | None = None,
    ) -> None:
        self.objects = Objects(rendered)
        (self.ray,) = self.objects.of("RayCluster")
        auth = self.ray["spec"].get("authOptions") or {}
        if auth.get("mode") == "token" and not auth.get("secretName"):
            self.objects.add(kuberay.token_secret(self.ray))
        self.objects.add(kuberay.head_service(self.ray))
        self.network = Network(folder / "hosts")
        self.network.services = list(self.objects.of("Service"))
        self.network.policies = list(self.objects.of("NetworkPolicy"))
        self.kubelet = Kubelet(folder / "kubelet", self.network, self.objects, claims or {}, image_variables or {})
        self.pods: dict[str, Pod] = {}
        self._started = 0

    def start(self) -> None:
        """All pods at once, as Kubernetes does."""
        for pod in self.wanted():
            self.run(pod)

    def wanted(self) -> Iterator[Object]:
        yield self.head()
        for group in self.ray["spec"].get("workerGroupSpecs") or ():
            for _ in range(group.get("replicas", 0)):
                yield self.worker(group["groupName"])
        for deployment in self.objects.of("Deployment"):
            for _ in range(deployment["spec"].get("replicas", 1)):
                yield self.replica(deployment)

    def head(self) -> Object:
        return kuberay.head_pod(self.ray, self._name(f"{self.ray['metadata']['name']}-head"))

    def worker(self, group_name: str) -> Object:
        groups = self.ray["spec"]["workerGroupSpecs"]
        group = next(group for group in groups if group["groupName"] == group_name)
        return kuberay.worker_pod(self.ray, group, self._name(f"{self.ray['metadata']['name']}-{group_name}"))

    def replica(self, deployment: Object) -> Object:
        template = deployment["spec"]["template"]
        name = self._name(deployment["metadata"]["name"])
        return {"kind": "Pod", "metadata": {**template["metadata"], "name": name}, "spec": template["spec"]}

    def run(self, pod: Object) -> Pod:
        running = self.pods[pod["metadata"]["name"]] = self.kubelet.run(pod)
        return running

    def of(self, part: str) -> list[Pod]:
        """The pods that run whose names have this in them."""
        return [pod for name, pod in self.pods.items() if part in name and not pod.stopping.is_set()]

    def wait_ready(self, within_s: float = READY_S) -> None:
        """All pods, side by side: a pod that fails is told at once."""
        end = time.monotonic() + within_s
        while waiting := [pod for pod in self.of("") if not pod.look()]:
            if time.monotonic() > end:
                waiting[0].wait_ready(0)
            time.sleep(LOOK_S)

    def stop(self) -> None:
        for pod in self.of(""):
            pod.kill()
        self.kubelet.close()

    def _name(self, stem: str) -> str:
        self._started += 1
        return f"{stem}-{self._started}"
