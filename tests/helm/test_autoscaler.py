"""What Ray's own autoscaler makes of the rendered RayCluster."""

from collections.abc import Mapping

import pytest
from helm.charts import NAMESPACE, Object, only, rendered, rendered_case
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr as derived
from ray.autoscaler.v2.instance_manager.config import AutoscalingConfig
from ray.autoscaler.v2.scheduler import ResourceDemandScheduler, SchedulingRequest
from ray.autoscaler.v2.utils import ResourceRequestUtil


def config(objects: list[Object]) -> AutoscalingConfig:
    """The autoscaler's, as it reads it from the API server in each round."""
    ray = only(objects, "RayCluster")
    ray["metadata"]["namespace"] = NAMESPACE
    return AutoscalingConfig(derived(ray), skip_content_hash=True)


def launched(objects: list[Object], *pending: Mapping[str, float]) -> dict[str, int]:
    """How many pods of each group it starts for these requests, where none is there beside the head."""
    found = config(objects)
    request = SchedulingRequest(
        disable_launch_config_check=True,
        node_type_configs=found.get_node_type_configs(),
        max_num_nodes=found.get_max_num_nodes(),
        resource_requests=ResourceRequestUtil.group_by_count(
            [ResourceRequestUtil.make(dict(each)) for each in pending]
        ),
    )
    reply = ResourceDemandScheduler().schedule(request)
    return {each.instance_type: each.count for each in reply.to_launch}


PREFILL, DECODE = {"prefill": 1, "GPU": 1}, {"decode": 1, "GPU": 1}
FEWEST = {"prefill": 1, "decode": 1}


@pytest.mark.parametrize("case", ["default", "mig", "dra"])
def test_a_pending_worker_has_a_pod_of_its_group_started(case: str) -> None:
    objects = rendered_case(case)
    assert launched(objects) == FEWEST
    assert launched(objects, PREFILL, PREFILL) == FEWEST | {"prefill": 2}
    assert launched(objects, DECODE, DECODE, DECODE) == FEWEST | {"decode": 3}


def test_a_pool_comes_back_from_nothing() -> None:
    objects = rendered("--set", "prefill.minReplicas=0,decode.minReplicas=0")
    assert launched(objects) == {}
    assert launched(objects, PREFILL) == {"prefill": 1}
    assert launched(objects, DECODE) == {"decode": 1}


def test_nobody_starts_more_than_the_most() -> None:
    assert launched(rendered_case("default"), *[DECODE] * 20) == FEWEST | {"decode": 4}


def test_workers_on_cpus_ask_for_no_gpu() -> None:
    assert launched(rendered_case("cpu-only"), {"prefill": 1}, {"prefill": 1}) == FEWEST | {"prefill": 2}
    assert "GPU" not in {
        name
        for group in config(rendered_case("cpu-only")).get_node_type_configs().values()
        for name, amount in group.resources.items()
        if amount
    }


def test_a_further_group_takes_what_the_first_has_no_room_for() -> None:
    found = launched(rendered_case("mixed-gpus"), *[PREFILL] * 6)
    assert found["prefill"] + found["prefill-a10"] == 6
    assert found["prefill-a10"] >= 2  # the first group has four at most


def test_nothing_is_placed_on_the_head() -> None:
    head = config(rendered_case("default")).get_node_type_configs()["headgroup"]
    assert {name: amount for name, amount in head.resources.items() if name != "memory"} == {"CPU": 0, "GPU": 0}
