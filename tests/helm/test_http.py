"""The HTTP port of gateways: Services, policies and settings agree, and what people are told to type is answered there
by a gateway with the release's own settings, certificates and keys."""

import base64
import json
import os
import runpy
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from helm.cases import cluster_of
from helm.charts import CHART, ROOT, VALUES, Object, name_of, only, rendered_case
from helm.told import (
    OWN_WITH_CERTIFICATES,
    PLAIN_WITH_KEYS,
    WITH_CERTIFICATES,
    commands,
    notes,
    objects_of,
    reads,
    run,
    service_ports,
    variables_of_the_test,
)
from scripted import Scripted, ScriptedCluster, in_thread, report_of, served

from isthmus.cluster.config import load_config
from isthmus.cluster.frontend.gateway import Gateway
from isthmus.cluster.http.tls import security_for
from isthmus.proto.worker_pb2 import WORKER_ROLE_PREFILL

PORT = 8000
HTTP_IN_PLAIN_TEXT = ("default", "--set", "settings.gateway.http.tls=off")
WITHOUT = "no-autoscaling"  # the case that has no HTTP


@pytest.mark.parametrize("values", VALUES, ids=name_of)
def test_the_port_leads_to_gateways_as_they_serve_it(values: Path, tmp_path: Path) -> None:
    name = name_of(values)
    objects = rendered_case(name)
    (text,) = (each["data"]["isthmus.yaml"] for each in objects if "isthmus.yaml" in each.get("data", {}))
    (tmp_path / "isthmus.yaml").write_text(text)
    config = load_config(tmp_path / "isthmus.yaml", {})
    services = [each["spec"] for each in objects if each["kind"] == "Service"]
    shown = [port for each in services for port in each["ports"] if port["name"] == "http"]
    opened = json.dumps([each["spec"] for each in objects if each["kind"] == "NetworkPolicy"])
    (gateway,) = (pod for pod in cluster_of(name, objects).pods if pod.owner["kind"] == "Deployment")
    if name == WITHOUT:
        assert config.gateway.http_listen is None
        assert (shown, gateway.ports().get("http")) == ([], None)
        assert f'"port": {PORT}' not in opened
        return
    listen = config.gateway.http_listen
    assert listen == f"0.0.0.0:{PORT}"
    certificates: Any = object()
    # InvalidRequest where such a gateway would not start.
    encrypted = security_for(config.gateway.http.tls, listen, None if config.tls == "off" else certificates)
    assert len(shown) == 2, "of the Service for clients and the headless one"
    assert {port["appProtocol"] for port in shown} == {"http" if encrypted is None else "https"}
    assert {port["targetPort"] for port in shown} == {"http"}
    assert [port["port"] for port in shown if port["port"] != service_ports(objects)["http"]] in ([], [PORT])
    assert gateway.ports()["http"] == PORT
    assert (f'"port": {PORT}' in opened) == (name != "plain-text")  # which has no policies


def test_the_docs_tell_the_same_as_the_notes() -> None:
    (line,) = (line for line in commands(notes("default")) if "curl" in line)
    assert line in " ".join((ROOT / "docs" / "kubernetes.md").read_text().replace("\\\n", " ").split())


def test_without_http_nobody_is_told_to_use_it() -> None:
    assert "curl" not in notes(WITHOUT)
    assert "8000" not in notes(WITHOUT)
    assert only(rendered_case(WITHOUT), "Pod")["spec"]["containers"][0]["args"][1:] == []


@asynccontextmanager
async def gateway_of(objects: list[Object], folder: Path) -> AsyncIterator[ScriptedCluster]:
    """A gateway of the release, without workers: its settings, but for its port, and the files of its Secrets."""
    text = only(objects, "ConfigMap")["data"]["isthmus.yaml"].replace(f"0.0.0.0:{PORT}", "0.0.0.0:0")
    secrets = {each["metadata"]["name"]: each["data"] for each in objects if each["kind"] == "Secret"}
    for place, secret in (("/etc/isthmus-tls", "tls-gateway"), ("/etc/isthmus-keys", "keys")):
        inside = folder / place.lstrip("/")
        inside.mkdir(parents=True)
        for name, value in secrets.get(f"pool-isthmus-{secret}", {}).items():
            (inside / name).write_bytes(base64.b64decode(value))
            (inside / name).chmod(0o600)
        text = text.replace(place, f"{folder}{place}")
    file = folder / "isthmus.yaml"
    file.write_text(text)
    config = load_config(file, {}).with_jobs()
    here = {"supervisor": None, "health_listen": None, "admin_listen": "127.0.0.1:0", "preflight": False}
    settings = config.gateway.model_copy(update={**here, "restart_wait_s": 0.0})
    gateway = Gateway("127.0.0.1:0", served(), [], settings, security=config.security("gateway"))
    await gateway.start()
    try:
        yield ScriptedCluster(gateway, Scripted(report_of(WORKER_ROLE_PREFILL)), [])
    finally:
        await gateway.stop()


@pytest.mark.parametrize(
    "case",
    [("default",), WITH_CERTIFICATES, HTTP_IN_PLAIN_TEXT, PLAIN_WITH_KEYS, ("plain-text",)],
    ids="-".join,
)
def test_what_is_told_is_answered(case: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Encrypted and with a key: a gateway without workers says so, after all checks, and names its model."""
    if shutil.which("curl") is None:
        pytest.skip("NOT TESTED: there is no curl here")
    monkeypatch.setenv("no_proxy", "*")
    for name in [name for name in os.environ if name.startswith("ISTHMUS_")]:
        monkeypatch.delenv(name)
    objects = objects_of(*case)
    (line,) = (line for line in commands(notes(*case)) if "curl" in line)
    (url,) = only(objects, "Pod")["spec"]["containers"][0]["args"][1:]
    with in_thread(gateway_of(objects, tmp_path / "gateway")) as gateway:
        port = urlsplit(gateway.http_url).port
        here = line.replace(f"://localhost:{PORT}/", f"://localhost:{port}/")
        assert here != line
        folder = tmp_path / "person"
        folder.mkdir()
        answers = run(objects, [*reads(notes(*case)), here, "echo", here.replace("Bearer %s", "Bearer %sx")], folder)
        found = [json.loads(answer)["error"]["code"] for answer in answers.splitlines()]
        assert found == ["unavailable", "unavailable" if case == ("plain-text",) else "invalid_api_key"]
        for name, value in variables_of_the_test(objects, tmp_path / "pod").items():
            monkeypatch.setenv(name, value)
        of_helm_test = runpy.run_path(str(CHART / "files" / "generation_test.py"))
        assert of_helm_test["models_over_http"](f"{urlsplit(url).scheme}://localhost:{port}") == ["bytes"]


@pytest.mark.parametrize("case", [("default",), OWN_WITH_CERTIFICATES, PLAIN_WITH_KEYS, ("production",)], ids="-".join)
def test_the_pod_of_helm_test_asks_the_service(case: tuple[str, ...]) -> None:
    objects = objects_of(*case)
    (url,) = only(objects, "Pod")["spec"]["containers"][0]["args"][1:]
    name = only(objects, "RayCluster")["metadata"]["name"]
    assert (urlsplit(url).hostname, urlsplit(url).port) == (name, service_ports(objects)["http"])
    if case == ("default",):
        pem = base64.b64decode(only(objects, "Secret", "-tls-gateway")["data"]["tls.crt"])
        names = x509.load_pem_x509_certificate(pem).extensions.get_extension_for_class(x509.SubjectAlternativeName)
        assert name in names.value.get_values_for_type(x509.DNSName)
