"""What the operator makes of a RayCluster, on one of its own examples' shape: command lines, variables, Services."""

from pods import kuberay
from pods.node.objects import Object

CLUSTER: Object = {
    "kind": "RayCluster",
    "metadata": {"name": "pool"},
    "spec": {
        "rayVersion": "2.60.0",
        "enableInTreeAutoscaling": True,
        "authOptions": {"mode": "token"},
        "headGroupSpec": {
            "rayStartParams": {"num-cpus": "0", "include-dashboard": "false", "no-monitor": "false"},
            "template": {
                "spec": {
                    "initContainers": [{"name": "own", "restartPolicy": "Always"}],
                    "containers": [{"name": "ray", "ports": [{"name": "gcs-server", "containerPort": 6380}]}],
                }
            },
        },
        "workerGroupSpecs": [
            {
                "groupName": "prefill",
                "rayStartParams": {"resources": "'{\"prefill\": 1}'"},
                "template": {
                    "metadata": {"labels": {"app.kubernetes.io/name": "mine", "ray.io/group": "theirs"}},
                    "spec": {
                        "containers": [
                            {
                                "name": "ray",
                                "env": [{"name": "RAY_PORT", "value": "1"}],
                                "resources": {"limits": {"cpu": "1500m", "memory": "2Gi", "nvidia.com/gpu": 2}},
                                "livenessProbe": {"exec": {"command": ["true"]}},
                            }
                        ]
                    },
                },
            }
        ],
    },
}
ADDRESS = "pool-head-svc.isthmus.svc.cluster.local:6379"
ALWAYS = "--dashboard-agent-listen-port=52365"


def test_the_heads_command_line() -> None:
    pod = kuberay.head_pod(CLUSTER, "head")
    (line,) = pod["spec"]["containers"][0]["args"]
    start = (
        f"ray start --head --block {ALWAYS} --dashboard-host=0.0.0.0 --include-dashboard=false "
        "--metrics-export-port=8080 --num-cpus=0"
    )
    assert line == f"ulimit -n ${{RAY_START_ULIMIT_OPEN_FILES:-65536}}; {start}"
    assert pod["spec"]["restartPolicy"] == "Never"


def test_a_workers_command_line_has_what_the_container_may_use() -> None:
    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    pod = kuberay.worker_pod(CLUSTER, group, "worker")
    (container,) = pod["spec"]["containers"]
    values = {entry["name"]: entry.get("value") for entry in container["env"]}
    start = (
        f"ray start --address={ADDRESS} --block {ALWAYS} --memory=2147483648 --metrics-export-port=8080 "
        "--num-cpus=2 --num-gpus=2 --resources='{\"prefill\": 1}'"
    )
    assert container["args"][0].endswith(f"; {start}")
    assert (values["KUBERAY_GEN_RAY_START_CMD"], values["RAY_ADDRESS"], values["RAY_PORT"]) == (start, ADDRESS, "1")
    assert container["livenessProbe"] == {"exec": {"command": ["true"]}}
    assert container["readinessProbe"]["httpGet"] == {"path": "/api/healthz", "port": 52365}
    assert {"name": "shared-mem", "mountPath": "/dev/shm"} in container["volumeMounts"]


def test_a_groups_own_resources_win() -> None:
    group = CLUSTER["spec"]["workerGroupSpecs"][0] | {"resources": {"CPU": "4", "GPU": "1", "decode": "1"}}
    (container,) = kuberay.worker_pod(CLUSTER, group, "worker")["spec"]["containers"]
    assert "--num-cpus=4 --num-gpus=1 --resources='{\"decode\":1.0}'" in container["args"][0]


def test_labels_of_the_operator_cannot_be_replaced_but_for_the_usual_ones() -> None:
    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    labels = kuberay.worker_pod(CLUSTER, group, "worker")["metadata"]["labels"]
    assert (labels["app.kubernetes.io/name"], labels["ray.io/group"]) == ("mine", "prefill")


def test_the_token_goes_to_ray_and_to_what_waits_for_it_only() -> None:
    (group,) = CLUSTER["spec"]["workerGroupSpecs"]
    for pod, names in (
        (kuberay.head_pod(CLUSTER, "head"), {"ray"}),
        (kuberay.worker_pod(CLUSTER, group, "worker"), {"ray", "wait-gcs-ready"}),
    ):
        containers = [*pod["spec"]["containers"], *pod["spec"]["initContainers"]]
        assert {each["name"] for each in containers if any(v["name"] == "RAY_AUTH_TOKEN" for v in each["env"])} == names
    secret = kuberay.token_secret(CLUSTER)
    assert (secret["metadata"]["name"], list(secret["stringData"])) == ("pool", ["auth_token"])


def test_the_heads_service_is_headless_and_selects_the_head() -> None:
    service = kuberay.head_service(CLUSTER)["spec"]
    assert service["selector"].items() <= kuberay.head_pod(CLUSTER, "head")["metadata"]["labels"].items()
    assert service["clusterIP"] == "None"
    assert {"name": "gcs-server", "port": 6380} in service["ports"]
