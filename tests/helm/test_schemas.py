"""Every object is what an API server takes: kinds of Kubernetes by its own schemas, others by their CRDs."""

from pathlib import Path

import pytest
from helm.cases import cluster_of
from helm.charts import VALUES, Object, name_of, only, rendered_case
from helm.core import NEWEST, OLDEST
from helm.core import problems as core_problems
from helm.crds import FOLDER, MISSING
from helm.crds import problems as crd_problems
from helm.others import SCHEMAS

CUSTOM = {
    "ray.io",
    "monitoring.coreos.com",
    "inference.networking.k8s.io",
    *(version.split("/")[0] for version, _ in SCHEMAS),
}
SINCE = {"dra": "1.34"}  # Kubernetes that a case needs: there claims are in their final form

needs_crds = pytest.mark.skipif(not FOLDER.is_dir(), reason=MISSING)


def is_custom(each: Object) -> bool:
    return each["apiVersion"].partition("/")[0] in CUSTOM


def pods_of(name: str, objects: list[Object]) -> list[Object]:
    """The templates of a RayCluster, which its CRD checks in part only, as the pods that they become."""
    pods = [pod for pod in cluster_of(name, objects).pods if pod.group is not None]
    return [
        {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "x", "labels": dict(pod.labels)}, "spec": pod.spec}
        for pod in pods
    ]


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
@pytest.mark.parametrize("values", VALUES, ids=name_of)
def test_kinds_of_kubernetes_fit_its_schemas(values: Path, version: str) -> None:
    name = name_of(values)
    if version < SINCE.get(name, ""):
        version = SINCE[name]
    objects = rendered_case(name)
    found = [
        (each["kind"], each["metadata"]["name"], problem)
        for each in [each for each in objects if not is_custom(each)] + pods_of(name, objects)
        for problem in core_problems(each, version)
    ]
    assert found == []


@needs_crds
@pytest.mark.parametrize("values", VALUES, ids=name_of)
def test_custom_resources_fit_their_crds(values: Path) -> None:
    custom = [each for each in rendered_case(name_of(values)) if is_custom(each)]
    assert {each["kind"] for each in custom} >= {"RayCluster"}
    assert [(each["kind"], problem) for each in custom for problem in crd_problems(each)] == []


def test_all_kinds_are_in_the_cases() -> None:
    kinds = {(each["apiVersion"], each["kind"]) for values in VALUES for each in rendered_case(name_of(values))}
    assert {*SCHEMAS, ("ray.io/v1", "RayCluster"), ("inference.networking.k8s.io/v1", "InferencePool")} <= kinds


def test_an_unknown_field_of_kubernetes_is_found() -> None:
    each = only(rendered_case("default"), "Deployment")
    each["spec"]["template"]["spec"]["containers"][0]["livenessprobe"] = {}
    (problem,) = core_problems(each, NEWEST)
    assert "livenessprobe" in problem


@needs_crds
def test_mistakes_in_custom_resources_are_found() -> None:
    ray = only(rendered_case("production"), "RayCluster")
    ray["spec"]["workerGroupSpecs"][0]["maxReplica"] = 3
    ray["spec"]["workerGroupSpecs"][1]["replicas"] = "2"
    ray["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] = 0
    ports = ray["spec"]["headGroupSpec"]["template"]["spec"]["containers"][0]["ports"]
    ports.append(ports[0])
    found = crd_problems(ray)
    assert [problem.partition(":")[0] for problem in found] == [
        "spec.headGroupSpec.rayStartParams.num-cpus",
        "spec.workerGroupSpecs.0",
        "spec.workerGroupSpecs.1.replicas",
        ".spec.headGroupSpec.template.spec.containers[0].ports",
    ]


@needs_crds
def test_rules_of_a_crd_hold() -> None:
    pool = only(rendered_case("production"), "InferencePool")
    del pool["spec"]["endpointPickerRef"]["port"]
    assert crd_problems(pool) != []


@needs_crds
def test_an_unknown_kind_fails() -> None:
    with pytest.raises(KeyError):
        crd_problems({"apiVersion": "ray.io/v1", "kind": "RayClusters"})
    with pytest.raises(FileNotFoundError):
        core_problems({"apiVersion": "v1", "kind": "Sercret"}, NEWEST)
