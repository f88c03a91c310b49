"""What the notes after installing tell to type, and a shell that types it; what the pod of `helm test` has."""

import base64
import json
import os
import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import pytest

from .api_server import serving
from .charts import CHART, NAMESPACE, VALUES, Object, helm, name_of, only, rendered, values_of
from .tools import program

RELEASE = "pool"  # as the docs call it
CASES = [*map(name_of, VALUES)]
# Beside the files of values: what changes the commands.
PLAIN_WITH_KEYS = ("plain-text", "--set", "auth.enabled=true")
WITH_CERTIFICATES = ("default", "--set", "settings.tls.client_certificates=true,service.port=443")
OWN_WITH_CERTIFICATES = ("existing-secrets", "--set", "settings.tls.client_certificates=true")
ALL = [*((name,) for name in CASES), PLAIN_WITH_KEYS, WITH_CERTIFICATES, OWN_WITH_CERTIFICATES]
TOLD = {"api-keys": {"keys.json": "{}", "keys": "{}"}, "test-key": {"api-key": "isthmus_of_a_secret_of_ours"}}
PRINTED = "isthmus_printed_by_keys_add"  # in the place of KEY in the notes


@cache
def notes(*case: str, version: str = "helm") -> str:
    """What Helm prints after installing a case: a file of values and further arguments."""
    name, *others = case
    # Helm 3 asks a server what kinds there are even where it installs nothing.
    with serving([], objects_of(*case)) as url:
        place = ("--namespace", NAMESPACE, "--dry-run=client", "--kube-apiserver", url, "--disable-openapi-validation")
        values = ("--values", str(values_of(name)))
        done = helm("install", RELEASE, str(CHART), *place, *values, *others, version=version)
    assert done.returncode == 0, done.stderr
    return done.stdout.partition("NOTES:")[2]


def commands(text: str) -> list[str]:
    """Lines that somebody shall type."""
    return [line.strip() for line in text.splitlines() if line.startswith("  ")]


def calls(line: str, name: str) -> list[list[str]]:
    """The words of each call of a program in a line: it ends with a pipe, a bracket, a file or a comment."""
    found = re.findall(rf"(?:^|[(|;] *){name} ((?:'[^']*'|\"[^\"]*\"|[^|&)>#'\"])+)", line)
    return [shlex.split(words) for words in found]


def reads(text: str) -> list[str]:
    """Commands that read a Secret, and set what clients need."""
    return [line for line in commands(text) if "get secret" in line or line.startswith("export")]


def objects_of(*case: str) -> list[Object]:
    name, *others = case
    return rendered("--values", str(values_of(name)), *others, release=RELEASE)


def there(objects: list[Object]) -> list[Object]:
    """The release's Secrets, what cert-manager makes of its Certificates, and those that exist in the cases."""
    some = {key: base64.b64encode(value).decode() for key, value in pair().items()}
    names = [each["spec"]["secretName"] for each in objects if each["kind"] == "Certificate"]
    names += [f"tls-{role}" for role in ("gateway", "admin")]
    told = {name: {k: base64.b64encode(v.encode()).decode() for k, v in data.items()} for name, data in TOLD.items()}
    made = dict.fromkeys(names, some) | told
    others = [{"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name}, "data": made[name]} for name in made]
    return [*(each for each in objects if each["kind"] == "Secret"), *others]


@cache
def pair() -> dict[str, bytes]:
    """A certificate of an administrator, as `isthmus certs issue` and cert-manager write it."""
    data = only(rendered(release=RELEASE), "Secret", "-tls-admin")["data"]
    return {key: base64.b64decode(value) for key, value in data.items()}


def variables_of_the_test(objects: list[Object], folder: Path) -> dict[str, str]:
    """The environment of the pod of `helm test`; its files are under the folder then."""
    secrets = {each["metadata"]["name"]: each["data"] for each in there(objects)}
    spec = only(objects, "Pod")["spec"]
    (container,) = spec["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    for volume in (volume for volume in spec["volumes"] if "secret" in volume):
        place = folder / mounts[volume["name"]].lstrip("/")
        place.mkdir(parents=True)
        for item in volume["secret"]["items"]:
            data = secrets[volume["secret"]["secretName"]][item["key"]]
            (place / item["path"]).write_bytes(base64.b64decode(data))
    found: dict[str, str] = {}
    for entry in container["env"]:
        source = entry.get("valueFrom", {}).get("secretKeyRef")
        value = base64.b64decode(secrets[source["name"]][source["key"]]).decode() if source else entry["value"]
        found[entry["name"]] = f"{folder}{value}" if value.startswith("/etc/") else value
    return found


def service_ports(objects: list[Object]) -> dict[str, int]:
    """Of the Service that clients call, by their names."""
    name = only(objects, "RayCluster")["metadata"]["name"]
    (service,) = (each for each in objects if (each["kind"], each["metadata"]["name"]) == ("Service", name))
    return {port["name"]: port["port"] for port in service["spec"]["ports"]}


def run(objects: list[Object], lines: list[str], folder: Path) -> str:
    """What a shell prints for these lines, with `kubectl` at a cluster that has the objects."""
    kubectl = program("kubectl")
    if kubectl is None:
        pytest.skip("NOT TESTED: kubectl is not here; `make .venv/.helm` fetches it")
    with serving([each for each in objects if each["kind"] == "Secret"]) as url:
        config = {
            "apiVersion": "v1",
            "kind": "Config",
            "clusters": [{"name": "here", "cluster": {"server": url}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": ""}}],
            "current-context": "here",
        }
        (folder / "config").write_text(json.dumps(config))
        place = {"KUBECONFIG": str(folder / "config"), "HOME": str(folder)}
        environment = os.environ | place | {"PATH": f"{kubectl.parent}:{os.environ['PATH']}"}
        shell = ["bash", "-euo", "pipefail", "-c", "\n".join(lines)]
        done = subprocess.run(shell, cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout
