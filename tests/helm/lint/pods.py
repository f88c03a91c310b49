"""Rules for every pod: security, resources, volumes, ports, probes, its end."""

from collections.abc import Iterator
from decimal import Decimal

from .objects import Cluster, Object, Pod, quantity

PORT_NAME = 15  # characters
GRACE_S = 15  # of a pod's end beyond what it waits for by itself
PROPAGATION_S = 5  # until Services and gateways know of it


def problems(cluster: Cluster) -> Iterator[str]:
    for pod in cluster.pods:
        rules = (_pod_security, _tokens, _volumes, _ports, _end)
        for found in (problem for rule in rules for problem in rule(pod)):
            yield f"{pod.where}: {found}"
        for container in pod.containers:
            for found in _container(pod, container):
                yield f"{pod.where}, container {container['name']}: {found}"


def _container(pod: Pod, container: Object) -> Iterator[str]:
    yield from _image(container)
    yield from _security(container)
    yield from _resources(container)
    yield from _probes(pod, container)
    yield from _environment(container)


def _image(container: Object) -> Iterator[str]:
    image = container.get("image", "")
    _, _, tag = image.rpartition("/")[2].partition(":")
    if "@sha256:" not in image and tag in ("", "latest"):
        yield f"image {image!r} names no version"


def _security(container: Object) -> Iterator[str]:
    """The restricted Pod Security standard, and a root file system that stays as it is."""
    context = container.get("securityContext", {})
    if context.get("allowPrivilegeEscalation") is not False:
        yield "allowPrivilegeEscalation is not false"
    if context.get("privileged"):
        yield "is privileged"
    capabilities = context.get("capabilities", {})
    if "ALL" not in capabilities.get("drop", ()) or set(capabilities.get("add", ())) - {"NET_BIND_SERVICE"}:
        yield "capabilities are not all dropped"
    if context.get("runAsNonRoot") is not True:
        yield "runAsNonRoot is not true"
    if context.get("runAsUser") == 0:
        yield "runs as root"
    if context.get("seccompProfile", {}).get("type") not in ("RuntimeDefault", "Localhost"):
        yield "has no seccompProfile"
    if context.get("readOnlyRootFilesystem") is not True:
        yield "readOnlyRootFilesystem is not true"
    elif not any(mount["mountPath"] == "/tmp" for mount in container.get("volumeMounts", ())):
        yield "has no volume at /tmp, where it must write"


def _pod_security(pod: Pod) -> Iterator[str]:
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.spec.get(key):
            yield f"uses {key}"
    for volume in pod.spec.get("volumes", ()):
        if "hostPath" in volume:
            yield f"volume {volume['name']} is a folder of the node"
    context = pod.spec.get("securityContext", {})
    if not context.get("runAsUser") or context.get("runAsNonRoot") is not True:
        yield "the pod may run as root"
    if pod.spec.get("enableServiceLinks") is not False:
        yield "enableServiceLinks is not false: Kubernetes would set variables ISTHMUS_..."


def _tokens(pod: Pod) -> Iterator[str]:
    """Ray's autoscaler asks the API server, and nobody else."""
    mounted = pod.spec.get("automountServiceAccountToken")
    needs = pod.is_head and bool(pod.owner["spec"].get("enableInTreeAutoscaling"))
    if mounted is not needs:
        yield f"automountServiceAccountToken is {mounted}, needed: {needs}"


def _resources(container: Object) -> Iterator[str]:
    resources = container.get("resources", {})
    requests, limits = resources.get("requests", {}), resources.get("limits", {})
    for name in {"cpu", "memory"} - requests.keys():
        yield f"requests no {name}"
    if "memory" not in limits:
        yield "has no limit of memory"
    for name, limit in limits.items():
        if name in requests and quantity(requests[name]) > quantity(limit):
            yield f"requests {requests[name]} of {name}, more than its limit {limit}"
    for name in requests.keys() | limits.keys():
        if "/" in name and requests.get(name) != limits.get(name):
            yield f"request and limit of {name} differ"


def _volumes(pod: Pod) -> Iterator[str]:
    volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", ())}
    if len(volumes) != len(pod.spec.get("volumes", ())):
        yield "two volumes have one name"
    mounted: set[str] = set()
    for container in pod.containers:
        mounts = container.get("volumeMounts", ())
        mounted.update(mount["name"] for mount in mounts)
        for mount in mounts:
            if mount["name"] not in volumes:
                yield f"container {container['name']} mounts {mount['name']}, which is no volume"
        paths = [mount["mountPath"] for mount in mounts]
        if len(set(paths)) != len(paths):
            yield f"container {container['name']} mounts two volumes at one path"
    for name in volumes.keys() - mounted:
        yield f"nobody mounts the volume {name}"
    yield from _memory_volumes(pod, volumes)


def _memory_volumes(pod: Pod, volumes: dict[str, Object]) -> Iterator[str]:
    """They count against the memory limits of those that mount them."""
    for name, volume in volumes.items():
        empty = volume.get("emptyDir") or {}
        if empty.get("medium") != "Memory":
            continue
        if "sizeLimit" not in empty:
            yield f"volume {name} is memory without a sizeLimit"
            continue
        users = [each for each in pod.containers if any(m["name"] == name for m in each.get("volumeMounts", ()))]
        limits = [quantity(each.get("resources", {}).get("limits", {}).get("memory", 0)) for each in users]
        if limits and quantity(empty["sizeLimit"]) >= max(limits):
            yield f"volume {name} may take all of the memory"
        store = (pod.group or {}).get("rayStartParams", {}).get("object-store-memory", "0")
        if Decimal(store) >= quantity(empty["sizeLimit"]):
            yield f"volume {name} is smaller than Ray's object store"


def _ports(pod: Pod) -> Iterator[str]:
    declared = [port for container in pod.containers for port in container.get("ports", ())]
    names = [port.get("name", "") for port in declared]
    numbers = [port["containerPort"] for port in declared]
    for name in names:
        if len(name) > PORT_NAME:
            yield f"port name {name} is longer than {PORT_NAME} characters"
    if len(set(names)) != len(names):
        yield "two ports have one name"
    if len(set(numbers)) != len(numbers):
        yield "two containers have one port"


def _probes(pod: Pod, container: Object) -> Iterator[str]:
    for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = container.get(kind)
        if probe is None:
            continue
        handler = next((probe[key] for key in ("grpc", "httpGet", "tcpSocket") if key in probe), None)
        if handler is not None and not pod.has_port(handler["port"]):
            yield f"{kind} asks port {handler['port']}, where nothing listens"
        if kind != "readinessProbe" and "grpc" in probe and probe["grpc"].get("service", "") == "":
            yield f"{kind} asks whether it can serve: a busy or waiting process would be killed"
        if kind != "readinessProbe" and "tcpSocket" in probe:
            yield f"{kind} only connects, which a process that hangs takes too"
    long_lived = pod.owner["kind"] in ("Deployment", "RayCluster") and container["name"] != "autoscaler"
    if long_lived and "livenessProbe" not in container:
        yield "has no livenessProbe"


def _environment(container: Object) -> Iterator[str]:
    variables = [entry["name"] for entry in container.get("env", ())]
    for name in sorted({name for name in variables if variables.count(name) > 1}):
        yield f"sets {name} twice"
    for entry in container.get("env", ()):
        value = entry.get("value", "")
        secret = any(word in entry["name"] for word in ("TOKEN", "PASSWORD", "KEY", "JOBS_DB"))
        if value and secret and not value.startswith("/") and entry["name"] != "ISTHMUS_PLAINTEXT_KEY":
            yield f"{entry['name']} is a secret, and is spelled out"
        if "value" in entry and not isinstance(value, str):
            yield f"{entry['name']} is no text"


def _end(pod: Pod) -> Iterator[str]:
    """What runs when a pod ends, and whether it has the time."""
    grace = pod.spec.get("terminationGracePeriodSeconds", 30)
    for container in pod.containers:
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if "ray stop" in " ".join(command):
            yield "preStop stops Ray: the requests that run there end at once"
    if pod.role == "gateway" and pod.owner["kind"] == "Deployment":
        container = pod.spec["containers"][0]
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])
        if command[0] != "sleep" or float(command[1]) <= 0:
            yield "preStop does not wait until Services know of the end"
        elif grace < float(command[1]) + _option(container["args"], "--drain-s") + GRACE_S:
            yield f"terminationGracePeriodSeconds {grace} is less than its drain takes"
    elif pod.group is not None and not pod.is_head:
        container = pod.spec["containers"][0]
        command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if command[:3] != ["isthmus", "drain", "--local"] or "--timeout" not in command:
            yield "preStop does not drain the worker"
            return
        if grace < PROPAGATION_S + _option(command, "--timeout") + _shutdown(container) + GRACE_S:
            yield f"terminationGracePeriodSeconds {grace} is less than its drain takes"


def _option(command: list[str], name: str) -> float:
    return float(command[command.index(name) + 1])


def _shutdown(container: Object) -> float:
    """Seconds that `ray start` waits for leases at SIGTERM."""
    values = {entry["name"]: entry.get("value") for entry in container.get("env", ())}
    return float(values.get("RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S") or 30)
