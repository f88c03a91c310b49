"""What an upgrade finds in the cluster stays: replicas that the autoscaler wrote, certificates, the key of clients."""

import base64
import copy

import pytest
import yaml
from helm.api_server import serving
from helm.charts import CHART, NAMESPACE, RELEASE, Object, helm, only, rendered

VERSIONS = ("helm", "helm3")
DAY_S = 86400


def upgraded(live: list[Object], *arguments: str, version: str = "helm") -> list[Object]:
    """The objects of the next version of a release whose objects are there."""
    with serving([each for each in live if each["kind"] in ("Secret", "RayCluster")]) as url:
        place = ("--namespace", NAMESPACE, "--kube-apiserver", url, "--dry-run=server", "--disable-openapi-validation")
        done = helm("template", RELEASE, str(CHART), *place, *arguments, version=version)
    assert done.returncode == 0, done.stderr
    return [each for each in yaml.safe_load_all(done.stdout) if each]


def replicas(objects: list[Object]) -> list[int]:
    return [group["replicas"] for group in only(objects, "RayCluster")["spec"]["workerGroupSpecs"]]


def secrets(objects: list[Object]) -> dict[str, Object]:
    return {each["metadata"]["name"]: each["data"] for each in objects if each["kind"] == "Secret"}


@pytest.mark.parametrize("version", VERSIONS)
def test_replicas_are_what_the_autoscaler_made_of_them(version: str) -> None:
    live = rendered()
    for group, count in zip(only(live, "RayCluster")["spec"]["workerGroupSpecs"], (3, 2), strict=True):
        group["replicas"] = count
    assert replicas(upgraded(live, version=version)) == [3, 2]
    assert replicas(upgraded(live, "--set", "prefill.maxReplicas=2", version=version)) == [2, 2]
    off = "autoscaling.enabled=false,decode.replicas=4"
    assert replicas(upgraded(live, "--set", off, version=version)) == [1, 4]


def test_a_group_is_found_by_its_name() -> None:
    live = rendered("--set", "extraGroups[0].name=more,extraGroups[0].role=decode")
    only(live, "RayCluster")["spec"]["workerGroupSpecs"][2]["replicas"] = 4
    added = "extraGroups[0].name=other,extraGroups[0].role=prefill,extraGroups[1].name=more,extraGroups[1].role=decode"
    assert replicas(upgraded(live, "--set", added)) == [1, 1, 1, 4]


@pytest.mark.parametrize("version", VERSIONS)
def test_certificates_and_the_key_stay(version: str) -> None:
    live = rendered()
    assert secrets(upgraded(live, version=version)) == secrets(live)
    assert secrets(upgraded([], version=version)) != secrets(live)


def test_certificates_are_made_anew_for_other_names() -> None:
    live = secrets(objects := rendered())
    now = secrets(upgraded(objects, "--set", "tls.hosts={llm.example.com}"))
    assert [name for name in live if live[name] != now[name]] == ["prod-isthmus-tls-gateway"]


@pytest.mark.parametrize(("age_days", "renewed"), [(549, False), (551, True)])
def test_certificates_are_renewed_after_two_thirds_of_their_time(age_days: int, renewed: bool) -> None:
    live = rendered()
    aged = copy.deepcopy(live)
    notes = only(aged, "Secret", "tls-decode")["metadata"]["annotations"]
    notes["isthmus.internal/issued"] = str(int(notes["isthmus.internal/issued"]) - age_days * DAY_S)
    before, after = secrets(live), secrets(upgraded(aged))
    changed = [name for name in before if before[name] != after[name]]
    assert changed == (["prod-isthmus-tls-decode"] if renewed else [])
    ca = only(live, "Secret", "tls-ca")["data"]["tls.crt"]
    assert after["prod-isthmus-tls-decode"]["ca.crt"] == ca
    assert base64.b64decode(ca).startswith(b"-----BEGIN CERTIFICATE-----")


@pytest.mark.parametrize(
    ("size", "said"), [("250Gi", ""), ("100Gi", "does not fit the claim pages, 100Gi: set at most 95")]
)
@pytest.mark.parametrize("place", ["status", "spec"])
def test_a_claim_that_exists_has_room_for_the_store(size: str, said: str, place: str) -> None:
    """A claim that is bound says what it has, another one what it asks for."""
    claim: Object = {"apiVersion": "v1", "kind": "PersistentVolumeClaim", "metadata": {"name": "pages"}}
    claim |= {"spec": {"resources": {"requests": {"storage": "1Gi" if place == "status" else size}}}}
    if place == "status":
        claim["status"] = {"capacity": {"storage": size}}
    given = "pageStore.enabled=true,pageStore.existingClaim=pages"
    with serving([claim]) as url:
        where = ("--namespace", NAMESPACE, "--kube-apiserver", url, "--dry-run=server", "--disable-openapi-validation")
        done = helm("template", RELEASE, str(CHART), *where, "--set", given)
    assert said in done.stderr
    assert (done.returncode == 0) is not bool(said)
    assert rendered("--set", given), "without a cluster nothing is known of it"
