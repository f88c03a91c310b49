"""What KubeRay's operator makes of a RayCluster: pods, the head's Service and the token's Secret.

After KubeRay 1.7, ray-operator/controllers/ray/common/pod.go (DefaultHeadPodTemplate, DefaultWorkerPodTemplate,
BuildPod, generateRayStartCommand, convertParamMap, setContainerEnvVars, SetContainerTokenAuthEnvVars,
initLivenessAndReadinessProbe) and service.go (BuildServiceForHeadPod). Left out is what needs the API server or is off
by default: the autoscaler's container, GCS fault tolerance, TLS of Ray, accelerators other than GPUs, the history
server.
"""

import copy
import json
import math
import secrets
from typing import Any

from .node.objects import NAMESPACE, Object, quantity

GCS_PORT, METRICS_PORT, DASHBOARD_AGENT_PORT = 6379, 8080, 52365
HEAD_PORTS = {"gcs-server": GCS_PORT, "dashboard": 8265, "client": 10001, "metrics": METRICS_PORT, "serve": 8000}
_HEAD_SELECTOR = (
    "ray.io/cluster",
    "ray.io/node-type",
    "ray.io/identifier",
    "app.kubernetes.io/name",
    "app.kubernetes.io/created-by",
)
_SHELL = ["/bin/bash", "-c", "--"]
_FLAGS_WITH_A_VALUE = ("log-color", "include-dashboard", "include-log-monitor")
_WAIT_FOR_GCS = """
SECONDS=0
while true; do
  if (( SECONDS <= 120 )); then
    if ray health-check --address {address} > /dev/null 2>&1; then
      echo "GCS is ready."
      break
    fi
    echo "$SECONDS seconds elapsed: Waiting for GCS to be ready."
  else
    if ray health-check --address {address}; then
      echo "GCS is ready. Any error messages above can be safely ignored."
      break
    fi
    echo "$SECONDS seconds elapsed: Still waiting for GCS to be ready."
  fi
  sleep 5
done
"""


def head_service_name(cluster: Object) -> str:
    return f"{cluster['metadata']['name']}-head-svc"


def head_address(cluster: Object) -> str:
    """host:port of Ray's GCS, by the name of the head's Service."""
    port = cluster["spec"]["headGroupSpec"].get("rayStartParams", {}).get("port", GCS_PORT)
    return f"{head_service_name(cluster)}.{NAMESPACE}.svc.cluster.local:{port}"


def head_service(cluster: Object) -> Object:
    """Headless unless the operator is told otherwise; its ports are those of the head's container."""
    template = cluster["spec"]["headGroupSpec"]["template"]
    declared = template["spec"]["containers"][0].get("ports") or ()
    ports = HEAD_PORTS | {port["name"]: port["containerPort"] for port in declared}
    labels = _labels(cluster, "head", "headgroup", template.get("metadata", {}).get("labels") or {})
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": head_service_name(cluster)},
        "spec": {
            "clusterIP": "None",
            "publishNotReadyAddresses": True,
            "selector": {key: labels[key] for key in _HEAD_SELECTOR},
            "ports": [{"name": name, "port": port} for name, port in ports.items()],
        },
    }


def token_secret(cluster: Object) -> Object:
    """The Secret that the operator makes where `authOptions` names none; its name is the cluster's."""
    token = secrets.token_urlsafe(32)
    return {"kind": "Secret", "metadata": {"name": _token_secret_name(cluster)}, "stringData": {"auth_token": token}}


def head_pod(cluster: Object, name: str) -> Object:
    group = cluster["spec"]["headGroupSpec"]
    parameters = _parameters(group)
    parameters.setdefault("dashboard-host", "0.0.0.0")
    template = copy.deepcopy(group["template"])
    labels = _labels(cluster, "head", "headgroup", template.get("metadata", {}).get("labels") or {})
    return _pod(cluster, name, template, labels, parameters, "head")


def worker_pod(cluster: Object, group: Object, name: str) -> Object:
    """One pod of a group, which waits for the head's GCS before it starts."""
    parameters = _parameters(group)
    parameters.setdefault("address", head_address(cluster))
    template = copy.deepcopy(group["template"])
    container = template["spec"]["containers"][0]
    template["spec"].setdefault("initContainers", []).append(
        {
            "name": "wait-gcs-ready",
            "command": _SHELL,
            "args": [_WAIT_FOR_GCS.format(address=head_address(cluster))],
            **{
                key: copy.deepcopy(container[key])
                for key in ("securityContext", "env", "volumeMounts")
                if key in container
            },
        }
    )
    own = template.get("metadata", {}).get("labels") or {}
    labels = _labels(cluster, "worker", group["groupName"], own | (group.get("labels") or {}))
    return _pod(cluster, name, template, labels, parameters, "worker")


def ray_start(parameters: dict[str, str], resources: Object, node_type: str) -> str:
    """The command line of `ray start`: one flag for each parameter, in the order of their names."""
    limits, requests = resources.get("limits") or {}, resources.get("requests") or {}
    if "num-cpus" not in parameters and (cpu := limits.get("cpu") or requests.get("cpu")):
        parameters["num-cpus"] = str(math.ceil(quantity(cpu)))
    if "memory" not in parameters and "memory" in limits:
        parameters["memory"] = str(int(quantity(limits["memory"])))
    gpus = [amount for key, amount in sorted(limits.items()) if key.endswith("gpu") or "nvidia.com/mig-" in key]
    if gpus:
        parameters.setdefault("num-gpus", str(int(quantity(gpus[0]))))
    flags = [_flag(name, str(value)) for name, value in sorted(parameters.items())]
    return " ".join(["ray start", *(["--head"] if node_type == "head" else []), *filter(None, flags)])


def _flag(name: str, value: str) -> str:
    if value.lower() in ("true", "false") and name not in _FLAGS_WITH_A_VALUE:
        return f"--{name}" if value.lower() == "true" else ""
    return f"--{name}={value}"


def _parameters(group: Object) -> dict[str, str]:
    parameters: dict[str, str] = dict(group.get("rayStartParams") or {})
    _put_resources(parameters, group.get("resources") or {})
    if labels := group.get("labels"):
        parameters["labels"] = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
    parameters.setdefault("metrics-export-port", str(METRICS_PORT))
    parameters.setdefault("dashboard-agent-listen-port", str(DASHBOARD_AGENT_PORT))
    return parameters | {"block": "true"}


def _put_resources(parameters: dict[str, str], resources: dict[str, Any]) -> None:
    """The group's own `resources`, which replace what `rayStartParams` says."""
    others: dict[str, float] = {}
    for name, amount in resources.items():
        known = {"cpu": "num-cpus", "memory": "memory"}.get(name.lower())
        if known is None and name.lower().endswith("gpu"):
            known = "num-gpus"
        if known:
            parameters[known] = str(int(quantity(amount)))
        else:
            others[name] = float(quantity(amount))
    if others:
        parameters["resources"] = f"'{json.dumps(others, separators=(',', ':'))}'"


def _labels(cluster: Object, node_type: str, group: str, own: dict[str, str]) -> dict[str, str]:
    name = cluster["metadata"]["name"]
    fixed = {"ray.io/cluster": name, "ray.io/node-type": node_type, "ray.io/group": group}
    usual = {
        "ray.io/is-ray-node": "yes",
        "ray.io/identifier": f"{name}-{node_type}",
        "app.kubernetes.io/name": "kuberay",
        "app.kubernetes.io/created-by": "kuberay-operator",
    }
    return usual | own | fixed


def _pod(
    cluster: Object, name: str, template: Object, labels: dict[str, str], parameters: dict[str, str], node_type: str
) -> Object:
    spec = template["spec"]
    container = spec["containers"][0]
    start = ray_start(parameters, container.get("resources") or {}, node_type)
    own = " ".join([*container.get("command", ()), *container.get("args", ())])
    if "ray start" not in own and not _keeps_its_command(cluster):
        start_with_limit = f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"
        container |= {"command": _SHELL, "args": [f"{own} && {start_with_limit}" if own else start_with_limit]}
    _put_shared_memory(spec, container, parameters)
    for init in spec.get("initContainers") or ():
        init["env"] = [*(init.get("env") or ()), *_head_variables(cluster)]
        if init["name"] == "wait-gcs-ready":
            _put_token(cluster, init)
    _put_probes(container, int(parameters["dashboard-agent-listen-port"]), node_type)
    container["env"] = _variables(cluster, container.get("env") or [], start, node_type)
    _put_token(cluster, container)
    if cluster["spec"].get("enableInTreeAutoscaling"):
        spec["restartPolicy"] = "Never"
    metadata = {"name": name, "labels": labels, "annotations": template.get("metadata", {}).get("annotations") or {}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _keeps_its_command(cluster: Object) -> bool:
    annotations = cluster["metadata"].get("annotations") or {}
    return str(annotations.get("ray.io/overwrite-container-cmd")).lower() == "true"


def _put_probes(container: Object, agent_port: int, node_type: str) -> None:
    """Where the container has none of its own: of Ray's health on the node, by the dashboard's agent (Ray >= 2.53)."""
    asks = {"httpGet": {"path": "/api/healthz", "port": agent_port}, "periodSeconds": 5}
    timeout_s = 5 if node_type == "head" else 2
    container.setdefault(
        "livenessProbe", asks | {"initialDelaySeconds": 30, "failureThreshold": 120, "timeoutSeconds": timeout_s}
    )
    container.setdefault(
        "readinessProbe", asks | {"initialDelaySeconds": 10, "failureThreshold": 10, "timeoutSeconds": timeout_s}
    )


def _put_shared_memory(spec: Object, container: Object, parameters: dict[str, str]) -> None:
    mounts = container.setdefault("volumeMounts", [])
    if "plasma-directory" in parameters or any(mount["mountPath"].rstrip("/") == "/dev/shm" for mount in mounts):
        return
    limit = (container.get("resources") or {}).get("limits", {}).get("memory")
    volume = {"name": "shared-mem", "emptyDir": {"medium": "Memory", **({"sizeLimit": limit} if limit else {})}}
    spec.setdefault("volumes", []).append(volume)
    mounts.append({"name": "shared-mem", "mountPath": "/dev/shm"})


def _head_variables(cluster: Object) -> list[Object]:
    host = head_address(cluster).rpartition(":")[0]
    return [{"name": "FQ_RAY_IP", "value": host}, {"name": "RAY_IP", "value": host.partition(".")[0]}]


def _variables(cluster: Object, own: list[Object], start: str, node_type: str) -> list[Object]:
    host, _, port = head_address(cluster).rpartition(":")
    variables = [*own, *(_head_variables(cluster) if node_type == "worker" else ())]
    references = {
        "RAY_CLUSTER_NAME": "metadata.labels['ray.io/cluster']",
        "RAY_CLUSTER_NAMESPACE": "metadata.namespace",
        "RAY_CLOUD_INSTANCE_ID": "metadata.name",
        "RAY_NODE_TYPE_NAME": "metadata.labels['ray.io/group']",
    }
    variables += [{"name": key, "valueFrom": {"fieldRef": {"fieldPath": path}}} for key, path in references.items()]
    variables.append({"name": "KUBERAY_GEN_RAY_START_CMD", "value": start})
    defaults = {
        "RAY_PORT": port,
        "RAY_ADDRESS": f"{'127.0.0.1' if node_type == 'head' else host}:{port}",
        "RAY_USAGE_STATS_KUBERAY_IN_USE": "1",
        "RAY_DASHBOARD_ENABLE_K8S_DISK_USAGE": "1",
    }
    if node_type == "head":
        variables.append(
            {"name": "RAY_USAGE_STATS_EXTRA_TAGS", "value": "kuberay_version=v1.7.0;kuberay_crd=RayCluster"}
        )
    present = {entry["name"] for entry in variables}
    return variables + [{"name": key, "value": value} for key, value in defaults.items() if key not in present]


def _token_secret_name(cluster: Object) -> str:
    options = cluster["spec"].get("authOptions") or {}
    return options.get("secretName") or cluster["metadata"]["name"]


def _put_token(cluster: Object, container: Object) -> None:
    """Only into Ray's own container and the one that waits for the GCS: others see to it themselves."""
    if (cluster["spec"].get("authOptions") or {}).get("mode") != "token":
        return
    variables = container.setdefault("env", [])
    present = {entry["name"] for entry in variables}
    if "RAY_AUTH_MODE" not in present:
        variables.append({"name": "RAY_AUTH_MODE", "value": "token"})
    if "RAY_AUTH_TOKEN" not in present:
        reference = {"name": _token_secret_name(cluster), "key": "auth_token"}
        variables.append({"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": reference}})
