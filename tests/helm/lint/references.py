"""Rules for what objects name: other objects, keys in them, pods by their labels, ports of those."""

from collections import Counter
from collections.abc import Iterator

from .objects import Cluster, Object, Pod, where

_ROUTES = {"GRPCRoute": "grpc", "HTTPRoute": "http"}  # to ports of these names
# What cert-manager writes into the Secret of a Certificate.
_OF_CERTIFICATES = {"ca.crt", "tls.crt", "tls.key"}


def problems(cluster: Cluster) -> Iterator[str]:
    yield from _names(cluster)
    for pod in cluster.pods:
        for found in _of_pod(cluster, pod):
            yield f"{pod.where}: {found}"
    for each in cluster.of("Service"):
        for found in _service(cluster, each):
            yield f"{where(each)}: {found}"
    for each in cluster.of("HorizontalPodAutoscaler", "ScaledObject"):
        target = each["spec"]["scaleTargetRef"]
        if target.get("kind") != "Deployment" or cluster.find("Deployment", target["name"]) is None:
            yield f"{where(each)}: scales {target.get('kind')} {target['name']}: only a Deployment has a scale here"
    for each in cluster.of("Deployment"):
        for found in _deployment(cluster, each):
            yield f"{where(each)}: {found}"
    for each in cluster.of(*_ROUTES):
        for found in _route(cluster, each):
            yield f"{where(each)}: {found}"
    for each in cluster.of("InferencePool"):
        selected = cluster.selected(each["spec"]["selector"]["matchLabels"])
        if not selected or not all(
            pod.has_port(port["number"]) for pod in selected for port in each["spec"]["targetPorts"]
        ):
            yield f"{where(each)}: its pods do not serve its ports"
    yield from _claims(cluster)


def _names(cluster: Cluster) -> Iterator[str]:
    counts = Counter((each["kind"], each["metadata"]["name"]) for each in cluster.objects)
    for (kind, name), count in counts.items():
        if count > 1:
            yield f"{kind} {name} is there {count} times"
        if len(name) > 63:
            yield f"{kind} {name}: the name is longer than 63 characters"
    for each in cluster.objects:
        labels = each["metadata"].get("labels", {})
        if not {"app.kubernetes.io/name", "app.kubernetes.io/instance"} <= labels.keys():
            yield f"{where(each)}: has not the labels of an application"
        for key, value in labels.items():
            if not isinstance(value, str) or len(value) > 63:
                yield f"{where(each)}: label {key} is no text of up to 63 characters"


def _of_pod(cluster: Cluster, pod: Pod) -> Iterator[str]:
    account = pod.spec.get("serviceAccountName")
    if account is None or cluster.find("ServiceAccount", account) is None:
        yield f"service account {account} is not there"
    for secret in pod.spec.get("imagePullSecrets", ()):
        yield from _key(cluster, "Secret", secret["name"], None)
    for container in pod.containers:
        for entry in container.get("env", ()):
            source = entry.get("valueFrom", {})
            for kind, key in (("Secret", "secretKeyRef"), ("ConfigMap", "configMapKeyRef")):
                if key in source:
                    yield from _key(cluster, kind, source[key]["name"], source[key]["key"])
    for volume in pod.spec.get("volumes", ()):
        if "secret" in volume:
            wanted = volume["secret"].get("items") or [{"key": None}]
            for item in wanted:
                yield from _key(cluster, "Secret", volume["secret"]["secretName"], item["key"])
            if volume["secret"].get("defaultMode", 0o644) & 0o007:
                yield f"everybody in the container may read the Secret at {volume['name']}"
        elif "configMap" in volume:
            yield from _key(cluster, "ConfigMap", volume["configMap"]["name"], None)
        elif "persistentVolumeClaim" in volume:
            name = volume["persistentVolumeClaim"]["claimName"]
            if (
                cluster.find("PersistentVolumeClaim", name) is None
                and ("PersistentVolumeClaim", name) not in cluster.external
            ):
                yield f"the claim {name} is not there"


def _key(cluster: Cluster, kind: str, name: str, key: str | None) -> Iterator[str]:
    if (kind, name) in cluster.external:
        return
    certificates = [each for each in cluster.of("Certificate") if each["spec"]["secretName"] == name]
    found = cluster.find(kind, name)
    if kind == "Secret" and certificates:
        keys = _OF_CERTIFICATES
    elif found is not None:
        keys = {*found.get("data", {}), *found.get("stringData", {})}
    else:
        yield f"{kind} {name} is not there"
        return
    if key is not None and key not in keys:
        yield f"{kind} {name} has no key {key}"


def _service(cluster: Cluster, each: Object) -> Iterator[str]:
    pods = cluster.selected(each["spec"]["selector"])
    if not pods:
        yield "its selector finds no pod"
    if len({pod.role for pod in pods}) > 1:
        yield f"finds pods of several roles: {sorted(pod.role for pod in pods)}"
    for port in each["spec"]["ports"]:
        target = port.get("targetPort", port["port"])
        if not all(pod.has_port(target) for pod in pods):
            yield f"leads to port {target}, where nothing listens"
        if target in (50052, 8265, 6379) or port["port"] in (50052, 8265, 6379):
            yield f"shows port {target}, which is for people who operate it"


def _route(cluster: Cluster, each: Object) -> Iterator[str]:
    for backend in (backend for rule in each["spec"]["rules"] for backend in rule["backendRefs"]):
        service = cluster.find("Service", backend["name"])
        ports = {port["port"]: port.get("name") for port in service["spec"]["ports"]} if service else {}
        if backend["port"] not in ports:
            yield f"leads to {backend['name']}:{backend['port']}, which is no Service here"
        elif ports[backend["port"]] != _ROUTES[each["kind"]]:
            yield f"leads to the port {ports[backend['port']]}, which does not speak {_ROUTES[each['kind']]}"


def _deployment(cluster: Cluster, each: Object) -> Iterator[str]:
    spec = each["spec"]
    selector = spec["selector"]["matchLabels"]
    if not selector.items() <= spec["template"]["metadata"]["labels"].items():
        yield "its selector does not find its own pods"
    scaled = [
        scaler
        for scaler in cluster.of("HorizontalPodAutoscaler", "ScaledObject")
        if scaler["spec"]["scaleTargetRef"]["name"] == each["metadata"]["name"]
    ]
    if scaled and "replicas" in spec:
        yield "has replicas beside an autoscaler: each upgrade would undo it"
    if not scaled and "replicas" not in spec:
        yield "has no replicas"
    spread = spec["template"]["spec"].get("topologySpreadConstraints", ())
    for constraint in spread:
        if not constraint["labelSelector"]["matchLabels"].items() <= spec["template"]["metadata"]["labels"].items():
            yield "spreads other pods than its own"
    if not spread:
        yield "its pods may all be on one node"
    if any(key.startswith(("app.kubernetes.io/version", "helm.sh/")) for key in spec["template"]["metadata"]["labels"]):
        yield "its pods carry the chart's version: each new chart would roll them"


def _claims(cluster: Cluster) -> Iterator[str]:
    for each in cluster.of("PersistentVolumeClaim"):
        name = each["metadata"]["name"]
        if each["metadata"].get("annotations", {}).get("helm.sh/resource-policy") != "keep":
            yield f"{where(each)}: would be deleted with the release"
        if not set(each["spec"]["accessModes"]) <= {"ReadWriteMany", "ReadOnlyMany"}:
            yield f"{where(each)}: {each['spec']['accessModes']} holds the pods to one node"
        users = [
            pod
            for pod in cluster.pods
            for volume in pod.spec.get("volumes", ())
            if volume.get("persistentVolumeClaim", {}).get("claimName") == name
        ]
        if not users:
            yield f"{where(each)}: nobody uses it"
