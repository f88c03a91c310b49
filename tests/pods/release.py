"""One release of the chart as the tests use it: values for two cores, and a client's pod beside it."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .cluster import Cluster
from .node.container import REPOSITORY, Container
from .node.kubelet import Pod
from .node.objects import NAMESPACE, Object

HELM = Path(sys.prefix, "helm", "helm")  # tests/helm/tools.py puts it there
RELEASE, NAME = "pods", "pods-isthmus"
CLIENT = Path(__file__).with_name("client.py")
# What `pip install --prefix` puts beside .venv for the pods alone: Ray's dashboard and its agents, as in the image.
KUBERAY = Path(sys.prefix, "kuberay", "lib", f"python3.{sys.version_info.minor}", "site-packages")
DRAIN_S = 1  # of a decode worker: less than the requests need that the tests send it
_SMALL = {"requests": {"cpu": "1", "memory": "1Gi"}, "limits": {"memory": "2Gi"}}
_WORKERS = {"minReplicas": 1, "maxReplicas": 3, "gpu": {"resource": "", "count": 0}, "resources": _SMALL}
VALUES = {
    "model": "/models/tiny",
    "models": {"enabled": True, "existingClaim": "models", "accessMode": "ReadOnlyMany"},
    "gateway": {"replicas": 1, "propagationSeconds": 1, "resources": _SMALL},
    "prefill": {"replicas": 1, "drainSeconds": 60, **_WORKERS},
    "decode": {"replicas": 2, "drainSeconds": DRAIN_S, **_WORKERS},
    # Decode workers would compute so small a model's prompts themselves: KV shall move.
    "settings": {"dtype": "fp32", "codec": "raw", "gateway": {"local_prefill": "never"}},
}


def render(folder: Path) -> str:
    """What `helm template` prints."""
    values = folder / "values.json"
    values.write_text(json.dumps(VALUES))
    command = [HELM, "template", RELEASE, REPOSITORY / "helm", "--namespace", NAMESPACE, "--values", values]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def client_pod() -> Object:
    """A pod of nobody's labels that has what a client has: the CA and a key."""
    security = {"allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}}
    key = {"secretKeyRef": {"name": f"{NAME}-keys", "key": "api-key"}}
    ca = {"secretName": f"{NAME}-tls-gateway", "items": [{"key": "ca.crt", "path": "ca.crt"}]}
    return {
        "kind": "Pod",
        "metadata": {"name": "client"},
        "spec": {
            "securityContext": {"runAsNonRoot": True, "runAsUser": 1000, "fsGroup": 1000},
            "terminationGracePeriodSeconds": 0,
            "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "ca", "secret": ca}],
            "containers": [
                {
                    "name": "client",
                    "command": ["sleep", "infinity"],
                    "env": [
                        {"name": "HOME", "value": "/tmp"},
                        {"name": "ISTHMUS_SERVER", "value": f"{NAME}:50051"},
                        {"name": "ISTHMUS_CA", "value": "/ca/ca.crt"},
                        {"name": "ISTHMUS_API_KEY", "valueFrom": key},
                    ],
                    "securityContext": security,
                    "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}, {"name": "ca", "mountPath": "/ca"}],
                }
            ],
        },
    }


class Answers:
    """Requests under way, all at once, from the client's pod."""

    def __init__(self, client: Pod, requests: Sequence[dict[str, Any]]) -> None:
        path = client.volumes["tmp"] / "requests.json"
        path.write_text(json.dumps(requests))
        self._process = client.containers[0].spawn([sys.executable, str(CLIENT), "/tmp/requests.json"])

    def wait_begun(self) -> None:
        """Returns when every answer has some tokens, or failed."""
        self._line()

    def wait(self) -> list[dict[str, Any]]:
        """What came for each request: token_ids, finished, replays, error, decode_worker."""
        answers = self._line()["answers"]
        self._process.communicate()
        return answers

    def _line(self) -> dict[str, Any]:
        assert self._process.stdout and self._process.stderr
        line = self._process.stdout.readline()
        assert line, self._process.stderr.read().decode()
        return json.loads(line)


def isthmus(container: Container, *arguments: str, timeout_s: float = 60) -> subprocess.CompletedProcess[bytes]:
    """A command of isthmus in a running container."""
    return container.execute(["isthmus", *arguments], timeout_s)


def new_cluster(folder: Path, models: Path) -> Cluster:
    """`models` is the folder that the pods see as /models."""
    variables = {"PYTHONPATH": str(KUBERAY), "RAY_USAGE_STATS_ENABLED": "0"}
    return Cluster(render(folder), folder, claims={"models": models}, image_variables=variables)
