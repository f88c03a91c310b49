"""The rendered chart runs: pods come up, clients are served and nobody else is, and no token is lost with a pod.

The tests are steps in the life of one release: the last ones take pods away from it.
"""

import json
import os
import random
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest
from models import made
from pods.cluster import READY_S, Cluster
from pods.listening import connections, open_ports
from pods.node.kubelet import Pod
from pods.release import DRAIN_S, HELM, KUBERAY, NAME, Answers, client_pod, isthmus, new_cluster
from support.tiny_model import make_tiny, tiny_config

pytestmark = pytest.mark.skipif(
    "ISTHMUS_TEST_PODS" not in os.environ, reason="takes root and namespaces of its own: make test-pods"
)
RAY_DRAIN_S = 30  # that `ray start` waits at SIGTERM for a worker which still lives
NO_ROUTE = "No route to host"  # what the policies' rules say, unlike a port at which nobody listens


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    assert KUBERAY.is_dir() and HELM.is_file(), "ray[default] and Helm are not in .venv; run make test-pods"
    folder, models = tmp_path_factory.mktemp("release"), tmp_path_factory.mktemp("models")
    models.chmod(0o755)
    # The chart's own test has prompts of some thousand tokens.
    config = tiny_config("llama", {"max_position_embeddings": 8192})
    made_here = made("tiny-llama-8k", lambda where: make_tiny(config, where))
    shutil.copytree(made_here, models / "tiny", copy_function=shutil.copyfile)
    (models / "tiny").chmod(0o755)
    running = new_cluster(folder, models)
    try:
        running.start()
        running.run(client_pod())
        running.wait_ready()
        yield running
    finally:
        running.stop()


@pytest.fixture(scope="module")
def client(cluster: Cluster) -> Pod:
    return cluster.pods["client"]


def requests(count: int, seed: int) -> list[dict[str, Any]]:
    """In turn greedy and drawn, long enough for a pod to end meanwhile."""
    rng = random.Random(seed)
    return [
        {
            "token_ids": [rng.randrange(3, 500) for _ in range(rng.randint(100, 400))],
            "sampling": {"temperature": 0.8 * (number % 2), "seed": number + 1, "max_tokens": 800, "ignore_eos": True},
        }
        for number in range(count)
    ]


def test_all_pods_came_up_at_their_first_try(cluster: Cluster) -> None:
    pods = {pod.name: pod for pod in cluster.of(NAME)}
    assert [
        len([name for name in pods if f"-{part}-" in name]) for part in ("head", "prefill", "decode", "gateway")
    ] == [1, 1, 2, 1]
    assert {container.restarts for pod in pods.values() for container in [*pod.sidecars, *pod.containers]} == {0}


def test_a_client_with_a_key_is_answered_through_the_service(client: Pod) -> None:
    done = isthmus(client.containers[0], "generate", "--json", "--max-tokens", "8", "The sea " * 30)
    assert done.returncode == 0, done.stderr.decode()
    answer = json.loads(done.stdout)
    assert answer["token_ids"]
    assert int(answer["timings"]["transfer"]["kv_bytes_wire"]) > 0


def test_a_client_without_a_key_is_refused(client: Pod) -> None:
    done = client.containers[0].execute(["env", "-u", "ISTHMUS_API_KEY", "isthmus", "generate", "The sea"], 60)
    assert done.returncode != 0
    assert b"ISTHMUS_API_KEY" in done.stderr


def test_the_charts_own_test_passes(cluster: Cluster) -> None:
    pod = cluster.run(cluster.objects.get("Pod", f"{NAME}-test"))
    (container,) = pod.containers
    assert container.ended.wait(120), container.log_end()
    assert container.exit_code == 0, container.log_end()
    pod.kill()


def test_a_client_reaches_the_gateway_and_nothing_else(cluster: Cluster, client: Pod) -> None:
    targets = [f"{pod.endpoint.address}:{port}" for pod in cluster.of(NAME) for port in open_ports(pod)]
    assert len(targets) > 20, "Ray and the health ports alone have more"
    (gateway,) = cluster.of("gateway")
    served = [f"{gateway.endpoint.address}:{port}" for port in (50051, 8000)]
    for port in (50051, 8000):
        assert connections(client, [f"{NAME}:{port}"]) == {f"{NAME}:{port}": ""}
    assert {*served} <= {*targets}
    assert connections(client, targets) == {target: "" if target in served else NO_ROUTE for target in targets}
    assert connections(client, [f"{NAME}-supervisor:50053"])[f"{NAME}-supervisor:50053"] == NO_ROUTE


def test_pods_reach_what_they_need_and_not_more(cluster: Cluster) -> None:
    pods = {part: cluster.of(f"-{part}-")[0] for part in ("head", "prefill", "decode", "gateway")}
    of_workers, of_gateways = (6700, 50061), (50051, 8000, 50054)
    ports = {"head": (6379, 50053), "prefill": of_workers, "decode": of_workers, "gateway": of_gateways}
    targets = {
        (part, port): f"{pods[part].endpoint.address}:{port}" for part, all_of in ports.items() for port in all_of
    }
    answers = {part: connections(pod, list(targets.values())) for part, pod in pods.items()}
    reached = {part: {target for target in targets if not answer[targets[target]]} for part, answer in answers.items()}
    ray = {("head", 6379), ("prefill", 6700), ("decode", 6700)}
    workers, everybody = {("prefill", 50061), ("decode", 50061)}, {("gateway", 50051), ("gateway", 8000)}
    own = {part: {(part, port) for port in ports[part]} for part in ports}  # what no rule is between
    assert reached == {
        "head": ray | workers | everybody | own["head"],
        "prefill": ray | everybody | own["prefill"],
        "decode": ray | everybody | {("prefill", 50061)} | own["decode"],
        "gateway": workers | everybody | {("head", 50053)} | own["gateway"],
    }


def test_the_end_of_a_decode_pod_costs_no_token(cluster: Cluster, client: Pod) -> None:
    """Some of its requests end within the time that its hook gives them, the others go on at the other pod."""
    wanted = requests(16, seed=1)
    calm = Answers(client, wanted)
    calm.wait_begun()
    undisturbed = calm.wait()
    assert [answer["error"] for answer in undisturbed] == [""] * 16
    assert {len(answer["token_ids"]) for answer in undisturbed} == {800}
    rough = Answers(client, wanted)
    rough.wait_begun()
    leaving = cluster.of("-decode-")[0]
    took = leaving.end()
    answers = rough.wait()
    assert [(answer["error"], answer["token_ids"]) for answer in answers] == [
        ("", answer["token_ids"]) for answer in undisturbed
    ]
    assert sum(answer["replays"] for answer in answers) > 0, "none was handed over"
    log = leaving.containers[0].log.read_text()
    assert "preStop ended with 0" in log, leaving.containers[0].log_end()
    assert took < DRAIN_S + RAY_DRAIN_S, "the worker has ended before Ray is told to: its node waits for nothing"


def test_the_pod_that_takes_its_place_gets_a_worker(cluster: Cluster) -> None:
    cluster.run(cluster.worker("decode")).wait_ready(READY_S)


def test_requests_go_on_without_the_head(cluster: Cluster, client: Pod) -> None:
    wanted = requests(4, seed=2)
    before = Answers(client, wanted)
    before.wait_begun()
    (head,) = cluster.of("-head-")
    head.kill()
    running = before.wait()
    time.sleep(5)  # the others have noticed by then
    after = Answers(client, wanted)
    after.wait_begun()
    later = after.wait()
    assert [(answer["finished"], answer["error"]) for answer in running + later] == [(True, "")] * 8
    assert [answer["token_ids"] for answer in later] == [answer["token_ids"] for answer in running]
