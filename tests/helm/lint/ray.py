"""Rules for a RayCluster: those of KubeRay's operator, and what a real cluster taught."""

import json
import re
from collections.abc import Iterator

from .objects import Cluster, Object, Pod

NAME = 40  # characters, for KubeRay adds to it in names of Services and pods
ROLES = ("prefill", "decode")
TOKEN_AUTH = (2, 52)  # version of Ray that has it
_ALPHA = ("networkPolicy", "tlsOptions", "historyServerOptions")


def problems(cluster: Cluster) -> Iterator[str]:
    for ray, head, groups in cluster.ray():
        rules = (_cluster(ray), _head(ray, head), _order(ray), *(_group(ray, pod) for pod in groups))
        for found in (problem for rule in rules for problem in rule):
            yield f"RayCluster {ray['metadata']['name']}: {found}"


def _cluster(ray: Object) -> Iterator[str]:
    spec = ray["spec"]
    name = ray["metadata"]["name"]
    if len(name) > NAME or not re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name):
        yield f"its name is no DNS label of up to {NAME} characters"
    if spec.get("authOptions", {}).get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches it may run code"
    version = tuple(int(part) for part in re.findall(r"\d+", spec.get("rayVersion", "")))
    if version < TOKEN_AUTH:
        yield "rayVersion does not say 2.52 or later, which token authentication needs"
    if spec.get("upgradeStrategy", {}).get("type") == "Recreate":
        yield "upgradeStrategy Recreate ends all pods at once"
    for key in _ALPHA:
        if key in spec:
            yield f"{key} is an alpha feature"
    fault_tolerance = spec.get("gcsFaultToleranceOptions", {})
    if fault_tolerance.get("backend") == "rocksdb":
        yield "gcsFaultToleranceOptions.backend rocksdb is an alpha feature"
    if fault_tolerance and not fault_tolerance.get("redisAddress"):
        yield "gcsFaultToleranceOptions names no Redis"
    if spec.get("enableInTreeAutoscaling") and spec.get("autoscalerOptions", {}).get("version") != "v2":
        yield "the autoscaler is not v2"
    if "image" not in spec.get("autoscalerOptions", {"image": ""}):
        yield "the autoscaler runs another image than the head"


def _head(ray: Object, pod: Pod) -> Iterator[str]:
    parameters = pod.group["rayStartParams"] if pod.group else {}
    if parameters.get("num-cpus") != "0" or parameters.get("num-gpus", "0") != "0":
        yield "actors may run on the head: num-cpus and num-gpus are not 0"
    yield from _parameters("head", parameters)
    yield from _common(ray, pod)
    sidecars = [each for each in pod.spec.get("initContainers", ()) if each["name"] == "supervisor"]
    if not sidecars:
        yield "the head has no supervisor"
        return
    supervisor, main = sidecars[0], pod.spec["containers"][0]
    if supervisor.get("restartPolicy") != "Always":
        yield "the supervisor would not be started again, and the head would wait for its end"
    shared = {mount["mountPath"]: mount["name"] for mount in main.get("volumeMounts", ())}
    own = {mount["mountPath"]: mount["name"] for mount in supervisor.get("volumeMounts", ())}
    for path in ("/tmp/ray", "/dev/shm"):
        if path not in own or own.get(path) != shared.get(path):
            yield f"supervisor and raylet do not share {path}: it could not join"
    if not pod.spec.get("shareProcessNamespace"):
        yield "the raylet does not see the supervisor's process"
    if not {"RAY_AUTH_MODE", "RAY_AUTH_TOKEN"} <= {entry["name"] for entry in supervisor.get("env", ())}:
        yield "the supervisor has no token of Ray: KubeRay gives it to Ray's own containers only"
    if "readinessProbe" in supervisor or "startupProbe" in supervisor:
        yield "workers join by the head's Service, which would wait for the supervisor"


def _order(ray: Object) -> Iterator[str]:
    names = [group["groupName"] for group in ray["spec"].get("workerGroupSpecs", ())]
    if tuple(names[:2]) != ROLES:
        yield f"groups begin with {names[:2]}, not with {list(ROLES)}: the autoscaler patches them by number"
    if len(set(names)) != len(names):
        yield "two groups have one name"


def _group(ray: Object, pod: Pod) -> Iterator[str]:
    group = pod.group or {}
    name = group["groupName"]
    parameters = group.get("rayStartParams", {})
    yield from (f"group {name}: {found}" for found in _parameters(name, parameters))
    yield from (f"group {name}: {found}" for found in _common(ray, pod))
    if not group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]:
        yield f"group {name}: replicas {group['replicas']} is out of its bounds"
    if group.get("resources") or group.get("labels"):
        yield f"group {name}: resources are said twice, in rayStartParams and of the group"
    if pod.role not in ROLES:
        yield f"group {name}: its pods are of no role"
    elif _resources_of(parameters) != {pod.role: 1}:
        yield f"group {name}: resources is not '{{\"{pod.role}\": 1}}', in single quotes, one worker a pod"
    yield from (f"group {name}: {found}" for found in _gpus(pod, parameters))
    placed = pod.spec.get("affinity", {})
    required = placed.get("podAffinity", {}).get("requiredDuringSchedulingIgnoredDuringExecution")
    if required:
        yield f"group {name}: a pod that finds no place near the others would not start at all"


def _resources_of(parameters: Object) -> object:
    """The custom resources, as KubeRay's autoscaler reads them: JSON in quotes."""
    text = parameters.get("resources", "")
    if len(text) < 2 or text[0] != "'" or text[-1] != "'":
        return None
    try:
        return json.loads(text[1:-1])
    except ValueError:
        return None


def _gpus(pod: Pod, parameters: Object) -> Iterator[str]:
    """Neither KubeRay nor the autoscaler counts those of claims and MIG slices."""
    container = pod.spec["containers"][0]
    resources = container.get("resources", {})
    counted = sum(int(amount) for key, amount in resources.get("limits", {}).items() if "/" in key)
    claims = {claim["name"] for claim in resources.get("claims", ())}
    if claims != {claim["name"] for claim in pod.spec.get("resourceClaims", ())}:
        yield "claims of the pod and of its container differ"
    found = parameters.get("num-gpus")
    if found is None or int(found) != counted + len(claims):
        yield f"num-gpus is {found}, and its container has {counted + len(claims)}"


def _parameters(name: str, parameters: Object) -> Iterator[str]:
    for key, value in parameters.items():
        if not isinstance(value, str):
            yield f"rayStartParams.{key} is no text"
    if "num-cpus" not in parameters:
        yield "num-cpus is left to KubeRay"
    if "object-store-memory" not in parameters:
        yield "object-store-memory is not set: Ray would take 30 % of the memory"
    if "labels" in parameters:
        yield "rayStartParams.labels is refused by KubeRay"
    if "ray-client-server-port" in parameters:
        yield "Ray Client is not for drivers"
    if {"redis-password", "redis-username"} & parameters.keys():
        yield "Redis is told to KubeRay, not to `ray start`"
    if "max-worker-port" not in parameters or "node-manager-port" not in parameters:
        yield f"Ray picks ports of {name} that no policy knows"


def _common(ray: Object, pod: Pod) -> Iterator[str]:
    if ray["spec"].get("enableInTreeAutoscaling") and pod.spec.get("restartPolicy") != "Never":
        yield f"{pod.name}: restartPolicy is not Never, which autoscaler v2 needs"
    container = pod.spec["containers"][0]
    names = {entry["name"] for entry in container.get("env", ())}
    for name in ("RAY_enable_autoscaler_v2", "RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"):
        if name in names:
            yield f"{pod.name}: {name} is KubeRay's to set"
    if "command" in container or "args" in container:
        yield f"{pod.name}: KubeRay would put the command before `ray start`"
    if "RAY_gcs_rpc_server_reconnect_timeout_s" not in names:
        yield f"{pod.name}: nodes would end a minute after the head's loss"
    for path in ("/tmp/ray", "/dev/shm"):
        if not any(mount["mountPath"] == path for mount in container.get("volumeMounts", ())):
            yield f"{pod.name}: nothing is mounted at {path}"
