"""The chart as Helm sees it: lint, names, refused values, notes, its README."""

import base64
import json
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from cryptography import x509
from helm.charts import (
    CHART,
    RELEASE,
    ROOT,
    VALUES,
    Object,
    helm,
    name_of,
    only,
    refusal,
    rendered,
    rendered_case,
)
from helm.lint.objects import quantity
from helm.values_table import values, with_table
from prose import headings

VERSIONS = ("helm", "helm3")
INSIDE_A_VALUE = {"requests", "limits", "grafana_dashboard"}  # keys that are explained with the value above them
MADE_ANEW = {"Secret"}  # without a cluster nothing is kept: certificates and keys are new ones each time


@pytest.mark.parametrize("version", VERSIONS)
def test_lint_is_strict(version: str) -> None:
    for case in VALUES:
        done = helm("lint", "--strict", str(CHART), "--values", str(case), version=version)
        assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("case", VALUES, ids=name_of)
def test_both_versions_of_helm_render_the_same(case: Path) -> None:
    new, old = (
        {(each["kind"], each["metadata"]["name"]): each for each in rendered_case(name_of(case), version)}
        for version in VERSIONS
    )
    assert new.keys() == old.keys()
    assert [key for key, each in new.items() if key[0] not in MADE_ANEW and each != old[key]] == []


def test_versions_are_those_of_the_project() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text())
    assert (chart["version"], chart["appVersion"]) == (project["version"], project["version"])


def test_ray_is_the_pinned_one() -> None:
    pinned = re.search(r"^ray==(\S+)", (ROOT / "constraints-cpu.txt").read_text(), re.MULTILINE)
    assert pinned is not None
    assert only(rendered(), "RayCluster")["spec"]["rayVersion"] == pinned[1]


def test_names_leave_room_for_kuberay() -> None:
    objects = rendered(release="a-release-with-a-name-that-is-as-long-as-helm")
    name = only(objects, "RayCluster")["metadata"]["name"]
    assert len(name) <= 40
    assert all(each["metadata"]["name"].startswith(name) for each in objects)
    assert max(len(each["metadata"]["name"]) for each in objects) <= 63


def test_a_release_is_called_as_it_says() -> None:
    assert only(rendered(release="isthmus"), "RayCluster")["metadata"]["name"] == "isthmus"
    assert only(rendered(), "RayCluster")["metadata"]["name"] == f"{RELEASE}-isthmus"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("prefil.replicas=2", "additional properties 'prefil' not allowed"),
        ("gateway.replica=2", "additional properties 'replica' not allowed"),
        ("prefill.replicas=-1", "minimum"),
        ("decode.replicas=many", "want integer"),
        ("tls.mode=none", "tls"),
        ("image.pullPolicy=Sometimes", "pullPolicy"),
        ("image.digest=sha256:1234", "digest"),
        ("rayVersion=latest", "rayVersion"),
        ("models.accessMode=ReadWriteOnce", "accessMode"),
        ("podDisruptionBudget.decodeMinAvailable=50%", "decodeMinAvailable"),
        ("fullnameOverride=" + "a" * 41, "fullnameOverride"),
        ("fullnameOverride=1a", "fullnameOverride"),
        ("ray.objectStoreMemory=1000", "objectStoreMemory"),
        ("decode.resources.limits.memory=16 GB", "memory"),
        ("extraGroups[0].name=more", "role"),
        ("networkPolicy.clients=everybody", "clients"),
        ("image.tag=latest", "name a version"),
        ("decode.gpu.count=4", "there is no tensor parallelism yet"),
        ("decode.gpu.resource=", "neither gpu.resource nor resourceClaims"),
        ("decode.minReplicas=5", "minReplicas 5 is more than maxReplicas 4"),
        ("decode.replicas=7", "replicas 7 is not between minReplicas 1 and maxReplicas 4"),
        ("gateway.autoscaling.minReplicas=9", "minReplicas 9 is more than maxReplicas 6"),
        ("gcsFaultTolerance.enabled=true", "name the Redis"),
        ("preload.enabled=true", "set models.enabled too"),
        ("preload.enabled=true,models.enabled=true", "is not OWNER/NAME"),
        ("preload.enabled=true,models.enabled=true,model=/models/a", "is a folder"),
        ("models.enabled=true,models.accessMode=ReadOnlyMany", "nobody could fill a new claim"),
        ("inferencePool.enabled=true", "name the Service that picks endpoints"),
        ("grpcRoute.enabled=true", "name the Gateway"),
        ("httpRoute.enabled=true", "name the Gateway in httpRoute.parentRefs"),
        ("httpRoute.enabled=true,service.httpPort=null", "gateways do not answer HTTP"),
        ("httpRoute.requestTimeout=60", "requestTimeout"),
        ("service.port=8000", "service.port and service.httpPort are both 8000"),
        ("service.httpPort=0", "httpPort"),
        ("settings.gateway.http_listen=none", "use service.httpPort"),
        ("tls.mode=off,settings.gateway.http.tls=on", "settings.gateway.http.tls is set by the chart: use tls.mode"),
        ("tls.mode=existing", "name the Secret"),
        ("auth.enabled=false,settings.gateway.access.jwt.issuer=a", "auth.enabled is false, which lets everybody in"),
        ("pageStore.enabled=true,pageStore.size=180Gi", "does not fit pageStore.size, 180Gi: set at most 171"),
        ("pageStore.enabled=true,pageStore.kind=emptyDir,pageStore.size=100G", "100G: set at most 88"),
        (
            "decode.resourceClaims[0].name=gpu,decode.resourceClaims[0].resourceClaimTemplateName=one",
            "resourceClaims and gpu.resource both ask",
        ),
        (
            "extraGroups[0].name=more,extraGroups[0].role=decode,extraGroups[0].gpu.count=0",
            "all workers of a role have",
        ),
        ("extraGroups[0].name=decode,extraGroups[0].role=decode", "two groups are called"),
    ],
)
def test_values_that_are_refused(given: str, said: str) -> None:
    assert said in refusal("--set", given)


@pytest.mark.parametrize("size", ["150M", "150000k", "146Mi", "0.15G", "0.15Gi", "150000000", "0.0001T", "1T"])
def test_a_store_may_take_all_but_a_twentieth_of_its_volume(size: str) -> None:
    def fits(gib: float) -> bool:
        store = f"{{enabled: true, storeGib: {gib:.9f}, size: {json.dumps(size)}}}"
        values = ("--set-json", f"pageStore={json.dumps(yaml.safe_load(store))}")
        return helm("template", RELEASE, str(CHART), *values).returncode == 0

    most = 0.95 * float(quantity(size)) / (1 << 30)
    assert fits(most - 1e-6)
    assert not fits(most + 1e-6)


def test_a_release_that_begins_with_a_digit_is_refused() -> None:
    done = helm("template", "1st", str(CHART))
    assert "does not begin with a letter" in done.stderr


def test_the_schema_refuses_what_it_does_not_know_everywhere() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text())
    free = {"affinity", "global", "items"}  # of Kubernetes

    def open_parts(part: Object, name: str) -> list[str]:
        inner = [found for key, value in part.get("properties", {}).items() for found in open_parts(value, key)]
        inner += [found for value in part.get("$defs", {}).values() for found in open_parts(value, "$defs")]
        is_open = part.get("type") == "object" and "additionalProperties" not in part and name not in free
        return inner + ([name] if is_open else [])

    assert open_parts(schema, "") == []
    assert "$ref" not in schema
    assert not re.search(r'"\$ref": "(?!#/)', json.dumps(schema))


def test_every_value_has_a_comment_and_a_place_in_the_schema() -> None:
    assert {value.path[-1] for value in values() if not value.comment} == INSIDE_A_VALUE
    schema = json.loads((CHART / "values.schema.json").read_text())
    for value in values():
        if not value.comment:
            continue
        part = schema
        for key in value.path:
            assert key in part["properties"], value.path
            part = part["properties"][key]


def test_the_readme_has_the_table_of_values() -> None:
    readme = (CHART / "README.md").read_text()
    assert readme == with_table(readme), "python tests/helm/values_table.py writes it anew"


def test_links_of_the_readme_lead_somewhere() -> None:
    readme = (CHART / "README.md").read_text()
    links = re.findall(r"\]\(([^)#]+)(?:#([^)]+))?\)", readme)
    assert links
    for file, anchor in links:
        assert (CHART / file).is_file(), file
        assert not anchor or anchor in headings((CHART / file).read_text()), anchor


def test_the_readme_says_how_to_upgrade() -> None:
    readme = (CHART / "README.md").read_text()
    assert "--server-side=true --force-conflicts" in readme
    assert "KubeRay ends no pod for it" in readme


def test_certificates_say_who_each_pod_is() -> None:
    objects = rendered("--set", "clusterId=pool-1,tls.hosts={llm.example.com,10.0.0.9}")
    ca = certificate(objects, "-tls-ca")
    for role in ("gateway", "supervisor", "prefill", "decode", "admin"):
        found = certificate(objects, f"-tls-{role}")
        found.verify_directly_issued_by(ca)
        names = found.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        dns = names.get_values_for_type(x509.DNSName)
        assert dns[0] == f"{role}.pool-1.isthmus.internal"
        own = [name.partition(".")[0] for name in dns if name.endswith(".isthmus.internal")]
        assert own == ([role, "worker"] if role in ("prefill", "decode") else [role])
        if role == "gateway":
            assert {"prod-isthmus.models.svc", "prod-isthmus-headless", "localhost", "llm.example.com"} <= set(dns)
            assert "10.0.0.9" in map(str, names.get_values_for_type(x509.IPAddress))


def certificate(objects: list[Object], suffix: str) -> x509.Certificate:
    return x509.load_pem_x509_certificate(base64.b64decode(only(objects, "Secret", suffix)["data"]["tls.crt"]))


def test_a_group_that_is_not_wanted_is_empty_and_stays() -> None:
    names = [
        group["groupName"] for group in only(rendered_case("mixed-gpus"), "RayCluster")["spec"]["workerGroupSpecs"]
    ]
    assert names == ["prefill", "decode", "prefill-a10"]
    empty = "extraGroups[0].replicas=0,extraGroups[0].minReplicas=0,extraGroups[0].maxReplicas=0"
    values = str(CHART / "ci" / "mixed-gpus-values.yaml")
    group = only(rendered("--values", values, "--set", empty), "RayCluster")["spec"]["workerGroupSpecs"][2]
    assert (group["replicas"], group["minReplicas"], group["maxReplicas"]) == (0, 0, 0)


def test_an_upgrade_rolls_gateways_for_new_settings_only() -> None:
    def annotations(*arguments: str) -> Object:
        return only(rendered(*arguments), "Deployment")["spec"]["template"]["metadata"]["annotations"]

    assert annotations() == annotations("--set", "decode.maxReplicas=9")
    assert annotations() != annotations("--set", "settings.codec=fp8")


def test_a_pool_that_may_be_empty_raises_no_alarm() -> None:
    def alerts(*arguments: str) -> set[str]:
        rules = only(rendered("--set", "monitoring.prometheusRule.enabled=true", *arguments), "PrometheusRule")
        return {rule["alert"] for rule in rules["spec"]["groups"][0]["rules"]}

    of_workers = {"IsthmusNoPrefillWorker", "IsthmusNoDecodeWorker"}
    assert of_workers <= alerts()
    assert alerts() - alerts("--set", "prefill.minReplicas=0") == {"IsthmusNoPrefillWorker"}
    assert alerts() - alerts("--set", "autoscaling.enabled=false,decode.replicas=0") == {"IsthmusNoDecodeWorker"}
