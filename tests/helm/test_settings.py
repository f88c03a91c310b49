"""`settings` of the values: all that the product's own settings file takes, but for what the chart sets itself."""

import json
import re
from functools import reduce
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from helm.charts import CHART, Object, only, refusal, rendered

from helm import settings_schema
from isthmus.cluster.config import ClusterConfig, load_config
from isthmus.cluster.sources import settings_of

VALUES_SCHEMA = json.loads((CHART / "values.schema.json").read_text())
EVERYTHING = "pageStore.enabled=true"  # what the chart sets where it is on
# Set by flags of the chart's commands, by the pool or by Ray: the file's value would be lost to them, or win over them.
NOT_IN_THE_FILE = [
    *("host", "port", "drain_s", "threads", "gateway.workers", "gateway.propagation_s"),
    *(f"{role}_worker.{name}" for role in ("prefill", "decode") for name in ("model", "cluster_id", "tls", "name")),
    *(f"{role}_worker.{name}" for role in ("prefill", "decode") for name in ("listen", "advertise", "threads")),
    *("prefill_worker.store_dir", "prefill_worker.store_gib", "gateway.access.anonymous", "gateway.jobs_db"),
]
PLACES = re.compile(r"(^|_)(listen|port|host|advertise|address|supervisor)$")


def part_of(setting: str) -> Object:
    """Of a setting, what the chart's schema says."""

    def inside(part: Object, name: str) -> Object:
        found = part["properties"][name]
        choices = [choice for choice in found.get("anyOf", [found]) if "$ref" in choice]
        return VALUES_SCHEMA["$defs"][choices[0]["$ref"].rpartition("/")[2]] if choices else found

    return reduce(inside, setting.split("."), VALUES_SCHEMA["properties"]["settings"])


def value_for(part: Object) -> Any:
    """One that the schema takes."""
    kinds = part["type"] if isinstance(part["type"], list) else [part["type"]]
    if "properties" in part:
        return {name: value_for(inner) for name, inner in part["properties"].items()}
    return {"string": "x1", "integer": 1, "number": 1, "boolean": False, "array": ["x"]}[kinds[0]]


def own_settings() -> list[str]:
    """Those that the chart writes into the file, by their paths."""

    def leaves(values: Object, before: str = "") -> list[str]:
        return [
            path
            for key, value in values.items()
            for path in (leaves(value, f"{before}{key}.") if isinstance(value, dict) else [f"{before}{key}"])
        ]

    objects = rendered("--set", EVERYTHING)
    return leaves(yaml.safe_load(only(objects, "ConfigMap")["data"]["isthmus.yaml"]))


def test_the_schema_is_that_of_the_settings() -> None:
    now = settings_schema.written(VALUES_SCHEMA)
    assert now == VALUES_SCHEMA, "settings have changed: python tests/helm/settings_schema.py writes it anew"


def test_what_is_set_nowhere_fits() -> None:
    defaults = ClusterConfig(cluster_id="a").model_dump(mode="json")
    schema = {**VALUES_SCHEMA["properties"]["settings"], "$defs": VALUES_SCHEMA["$defs"]}
    assert [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(defaults)] == []


def test_settings_of_the_chart_are_refused() -> None:
    for setting in {*own_settings(), *NOT_IN_THE_FILE}:
        given = f"settings.{setting}={json.dumps(value_for(part_of(setting)))}"
        said = refusal("--set", EVERYTHING, "--set-json", given)
        assert re.search(rf"settings\.{re.escape(setting)} is set by the chart: \w", said), said


@pytest.mark.parametrize("given", ['"off"', '"auto"', "false"])
def test_tls_is_the_values_to_say(given: str) -> None:
    assert "settings.tls is set by the chart: use tls.mode" in refusal("--set-json", f"settings.tls={given}")


def test_places_are_the_chart_s() -> None:
    """A new port is one that policies, probes and Services have to know."""
    places = {".".join(setting) for setting in settings_of(ClusterConfig) if PLACES.search(setting[-1])}
    assert places - {*own_settings(), *NOT_IN_THE_FILE} == set(), "let the chart set it, or refuse it in _settings.tpl"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("settings.gatway.replays=1", "'/settings': additional properties 'gatway' not allowed"),
        ("settings.gateway.replay=1", "'/settings/gateway': additional properties 'replay' not allowed"),
        ("settings.gateway.jobs.max_job=1", "'/settings/gateway/jobs': additional properties 'max_job' not allowed"),
        ("settings.decode_worker.pool_gb=40", "'/settings/decode_worker': additional properties 'pool_gb' not allowed"),
        ("settings.decode_worker.pool_gib=lots", "'/settings/decode_worker/pool_gib': got string, want number"),
        ("settings.decode_worker.max_batch=0", "'/settings/decode_worker/max_batch': minimum: got 0, want 1"),
        ("settings.gateway.policy=random", "'/settings/gateway/policy': value must be one of 'cost'"),
        (
            "settings.gateway.access.jwt.tenants.a.running=0",
            "'/settings/gateway/access/jwt/tenants/a/running': minimum",
        ),
    ],
)
def test_mistakes_in_settings_are_refused(given: str, said: str) -> None:
    assert said in refusal("--set", given)


def test_what_the_product_takes_is_taken_and_arrives(tmp_path: Path) -> None:
    """The forms that one setting may have, and numbers, which Helm reads as floats."""
    settings = {
        "codecs": "raw,fp8",
        "codec": "fp8",
        "log_content": False,
        "store_key_file": None,
        "gateway": {
            "tenant_weights": "web=4,research=1",
            "max_request_s": None,
            "http": {"tls": False, "cors_origins": "https://a.example"},  # off, as YAML reads it
            "jobs": {"max_jobs": 2_000_000, "max_stored_bytes": 1 << 32},
        },
        "decode_worker": {"pool_gib": 40.5, "codecs": ["fp8"], "pool_tokens": None},
        "tls": {"client_certificates": True},
    }
    values = tmp_path / "values.yaml"
    values.write_text(yaml.safe_dump({"settings": settings}))
    file = tmp_path / "isthmus.yaml"
    file.write_text(only(rendered("--values", str(values)), "ConfigMap")["data"]["isthmus.yaml"])
    config = load_config(file, {})
    assert (config.codecs, config.decode_worker.codecs) == (("raw", "fp8"), ("fp8",))
    assert config.gateway.tenant_weights == {"web": 4, "research": 1}
    assert (config.gateway.jobs.max_jobs, config.gateway.jobs.max_stored_bytes) == (2_000_000, 1 << 32)
    assert (config.gateway.http.tls, config.gateway.http.cors_origins) == ("off", ("https://a.example",))
    assert config.decode_worker.pool_gib == 40.5
    assert config.tls.client_certificates  # pyright: ignore


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("ISTHMUS_TLS", "put it under settings"),
        ("isthmus_gateway__access__anonymous", "put it under settings"),
        ("ISTHMUS_CONFIG", "put it under settings"),
        ("RAY_AUTH_MODE", "set by the chart: use hub or ray"),
        ("HF_TOKEN", "set by the chart: use hub or ray"),
    ],
)
def test_variables_do_not_go_around_the_settings(name: str, said: str) -> None:
    assert said in refusal("--set", f"extraEnv[0].name={name},extraEnv[0].value=off")


def test_other_variables_are_those_of_all_containers() -> None:
    objects = rendered("--set", "extraEnv[0].name=ISTHMUS_COMPILED,extraEnv[0].value=never")
    assert json.dumps(objects).count('"ISTHMUS_COMPILED"') == 5  # gateway, supervisor, head, prefill, decode
