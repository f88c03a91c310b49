"""What the rules ask of rendered objects: pods in them, as KubeRay makes them; labels, ports, quantities."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

Object = dict[str, Any]

_SUFFIXES = {"": Decimal(1), "m": Decimal("0.001")} | {
    name: Decimal(base) ** power
    for base, names in ((1000, ("k", "M", "G", "T")), (1024, ("Ki", "Mi", "Gi", "Ti")))
    for power, name in enumerate(names, start=1)
}
# What Ray's own processes listen at in every pod (the chart fixes them), beside those of containers.
RAY_PORTS = frozenset({6379, 8265, 8080, 52365, *range(6700, 6704), *range(10010, 10110)})


def quantity(value: Any) -> Decimal:
    """A Kubernetes quantity as a number: "500m" is 0.5, "1Ki" 1024. ValueError where it is none."""
    text = str(value)
    digits = text.rstrip("mkMGTi")
    try:
        return Decimal(digits) * _SUFFIXES[text[len(digits) :]]
    except (ArithmeticError, KeyError):
        raise ValueError(f"{value!r} is no quantity") from None


@dataclass(frozen=True)
class Pod:
    """A pod of an object that makes some, with what KubeRay adds to its labels and containers."""

    owner: Object
    name: str  # of the owner, and the group
    labels: Mapping[str, str]
    spec: Object
    group: Object | None = None  # of a RayCluster
    is_head: bool = False

    @property
    def where(self) -> str:
        return f"{self.owner['kind']} {self.name}"

    @property
    def containers(self) -> list[Object]:
        """All of them, those first that run before or beside the others."""
        return [*self.spec.get("initContainers", ()), *self.spec["containers"]]

    @property
    def role(self) -> str:
        return self.labels.get("app.kubernetes.io/component", "")

    def ports(self) -> dict[str, int]:
        """Named ports of all containers."""
        declared = (port for container in self.containers for port in container.get("ports", ()))
        return {port["name"]: port["containerPort"] for port in declared if "name" in port}

    def has_port(self, port: int | str) -> bool:
        """Whether something of ours or of Ray listens there, as far as the chart says."""
        if isinstance(port, str):
            return port in self.ports()
        return port in self.ports().values() or (self.group is not None and port in RAY_PORTS)


@dataclass
class Cluster:
    """The objects of one release, and what of others they may refer to."""

    objects: list[Object]
    external: frozenset[tuple[str, str]] = frozenset()  # kind and name of what exists already
    metrics: frozenset[str] = frozenset()  # names that rules may ask for
    pods: list[Pod] = field(init=False)

    def __post_init__(self) -> None:
        self.pods = [pod for each in self.objects for pod in _pods(each)]

    def of(self, *kinds: str) -> list[Object]:
        return [each for each in self.objects if each["kind"] in kinds]

    def find(self, kind: str, name: str) -> Object | None:
        return next((each for each in self.of(kind) if each["metadata"]["name"] == name), None)

    def selected(self, labels: Mapping[str, str]) -> list[Pod]:
        """Pods with these labels."""
        return [pod for pod in self.pods if labels.items() <= pod.labels.items()]

    def ray(self) -> Iterator[tuple[Object, Pod, list[Pod]]]:
        """Each RayCluster, its head, and a pod of each of its groups."""
        for each in self.of("RayCluster"):
            own = [pod for pod in self.pods if pod.owner is each]
            yield each, own[0], own[1:]


def where(each: Object) -> str:
    return f"{each['kind']} {each['metadata']['name']}"


def _pods(each: Object) -> Iterator[Pod]:
    name = each["metadata"]["name"]
    if each["kind"] in ("Deployment", "Job"):
        template = each["spec"]["template"]
        yield Pod(each, name, template["metadata"]["labels"], template["spec"])
    elif each["kind"] == "Pod":
        yield Pod(each, name, each["metadata"]["labels"], each["spec"])
    elif each["kind"] == "RayCluster":
        spec = each["spec"]
        yield _ray_pod(each, spec["headGroupSpec"], "headgroup", spec.get("enableInTreeAutoscaling", False))
        for group in spec.get("workerGroupSpecs", ()):
            yield _ray_pod(each, group, group["groupName"], False)


def _ray_pod(cluster: Object, group: Object, name: str, autoscaler: bool) -> Pod:
    is_head = name == "headgroup"
    template = group["template"]
    spec = copy.copy(template["spec"])
    if autoscaler:
        options = cluster["spec"].get("autoscalerOptions", {})
        added = {key: value for key, value in options.items() if key in _OF_CONTAINERS}
        spec["containers"] = [*spec["containers"], {"name": "autoscaler", **added}]
    labels = {
        **template.get("metadata", {}).get("labels", {}),
        "ray.io/is-ray-node": "yes",
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/node-type": "head" if is_head else "worker",
        "ray.io/group": name,
    }
    return Pod(cluster, f"{cluster['metadata']['name']}/{name}", labels, spec, group, is_head)


_OF_CONTAINERS = ("image", "imagePullPolicy", "env", "envFrom", "securityContext", "resources", "volumeMounts")
