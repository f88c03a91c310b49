"""What the files of values refer to that exists already, and the metrics that somebody exports."""

import re
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from .charts import RELEASE, Object
from .lint.objects import Cluster

# Of KubeRay: the token's Secret, with the cluster's name.
_TOKEN = ("Secret", f"{RELEASE}-isthmus")
EXTERNAL: dict[str, tuple[tuple[str, str], ...]] = {
    "production": (
        *(("Secret", name) for name in ("registry", "hub-token", "redis", "jobs-database", "api-keys", "test-key")),
    ),
    "gcs-fault-tolerance": (("Secret", "redis-password"),),
    "postgres": (("Secret", "postgres"),),
    "cert-manager": (("PersistentVolumeClaim", "models"),),
    "existing-secrets": (
        *(("Secret", f"tls-{role}") for role in ("gateway", "supervisor", "prefill", "decode", "admin")),
        *(("Secret", name) for name in ("api-keys", "ray-token")),
        *(("ConfigMap", name) for name in ("identity-provider", "balance")),
    ),
}
# Of kube-state-metrics and the kubelet.
_OF_KUBERNETES = {
    "kube_deployment_status_replicas_available",
    "kube_pod_status_ready",
    "kube_pod_status_phase",
    "kube_pod_container_status_restarts_total",
    "kube_pod_init_container_status_restarts_total",
    "kubelet_volume_stats_available_bytes",
    "kubelet_volume_stats_capacity_bytes",
}


def cluster_of(name: str, objects: list[Object]) -> Cluster:
    """The objects of a file of values, as the rules take them."""
    return Cluster(objects, frozenset({_TOKEN, *EXTERNAL.get(name, ())}), metrics())


@cache
def metrics() -> frozenset[str]:
    """Names of Kubernetes' metrics that we use, and all that the reporter of the installed Ray exports."""
    ray = find_spec("ray")
    assert ray is not None and ray.origin is not None
    text = (Path(ray.origin).parent / "dashboard/modules/reporter/reporter_agent.py").read_text()
    exported = re.findall(r'Gauge\(\s*"(\w+)"', text)
    assert len(exported) > 20, "the reporter has another form than this looks for"
    return frozenset({*_OF_KUBERNETES, *(f"ray_{name}" for name in exported)})
