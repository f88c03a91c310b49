"""What notes and docs tell to type works as it is printed: flags, `kubectl` against an API server's answers, and what
`isthmus` makes of the variables and files that are there then."""

import base64
import json
import os
import re
import shlex
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from helm.api_server import serving
from helm.charts import CHART, NAMESPACE, ROOT, VALUES, Object, helm, name_of, only, rendered, values_of
from helm.product import Asking, asking
from helm.tools import program

RELEASE = "pool"  # as the docs call it
CASES = [*map(name_of, VALUES)]
# Beside the files of values: what changes the commands.
PLAIN_WITH_KEYS = ("plain-text", "--set", "auth.enabled=true")
WITH_CERTIFICATES = ("default", "--set", "settings.tls.client_certificates=true,service.port=443")
OWN_WITH_CERTIFICATES = ("existing-secrets", "--set", "settings.tls.client_certificates=true")
ALL = [*((name,) for name in CASES), PLAIN_WITH_KEYS, WITH_CERTIFICATES, OWN_WITH_CERTIFICATES]
TOLD = {"api-keys": {"keys.json": "{}", "keys": "{}"}, "test-key": {"api-key": "isthmus_of_a_secret_of_ours"}}
PRINTED = "isthmus_printed_by_keys_add"  # in the place of KEY in the notes

given = pytest.mark.parametrize("case", ALL, ids="-".join)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person has who installs the chart: nothing of the tests."""
    for name in [name for name in os.environ if name.startswith("ISTHMUS_")]:
        monkeypatch.delenv(name)


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


@given
@pytest.mark.parametrize("version", ["helm", "helm3"])
def test_what_the_notes_tell_to_type_is_parsed(case: tuple[str, ...], version: str, tmp_path: Path) -> None:
    lines = commands(notes(*case, version=version))
    assert len(lines) >= 8
    for line in lines:
        assert re.match(r"kubectl |helm |isthmus |export |printf |\(umask 077; kubectl ", line), line
    parsed_by("kubectl", [words for line in lines for words in calls(line, "kubectl")])
    parsed_by(version, [words for line in lines for words in calls(line, "helm")])


_parsed: set[tuple[str, ...]] = set()


def parsed_by(name: str, called: list[list[str]]) -> None:
    """A program parses its flags before it prints their help."""
    file = program(name)
    if file is None:
        pytest.skip(f"NOT TESTED: {name} is not here; `make .venv/.helm` fetches it")
    assert called
    for words in called:
        if (name, *words) not in _parsed:
            done = subprocess.run([str(file), *words, "--help"], capture_output=True, text=True, timeout=60)
            assert done.returncode == 0, (words, done.stderr)
            assert len(done.stdout.splitlines()) > 10, words
            _parsed.add((name, *words))


def test_a_flag_that_is_not_there_would_be_found() -> None:
    for name, words in (("kubectl", ["get", "secret", "x", "--outputs=json"]), ("helm", ["test", "pool", "--log"])):
        with pytest.raises(AssertionError, match="unknown flag"):
            parsed_by(name, [words])


def asked_by(case: tuple[str, ...], folder: Path, monkeypatch: pytest.MonkeyPatch) -> Asking:
    """How `isthmus generate` of the notes asks once all before it was typed."""
    text = notes(*case).replace("=KEY ", f"={PRINTED} ")
    variables = run(there(objects_of(*case)), [*reads(text), "env -0"], folder)
    for name, _, value in (entry.partition("=") for entry in variables.split("\0")):
        if name.startswith("ISTHMUS_"):
            monkeypatch.setenv(name, value)
    monkeypatch.chdir(folder)
    (words,) = (words for line in commands(text) for words in calls(line, "isthmus"))
    return asking(words)


@given
def test_the_first_token_is_asked_for_as_the_gateway_wants(
    case: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = asked_by(case, tmp_path, monkeypatch)
    objects = objects_of(*case)
    made = [base64.b64decode(each["data"]["api-key"]).decode() for each in objects if "api-key" in each.get("data", {})]
    key = {"production": TOLD["test-key"]["api-key"], "existing-secrets": PRINTED, "plain-text": None}.get(case[0])
    if case == PLAIN_WITH_KEYS or case[0] not in ("production", "existing-secrets", "plain-text"):
        (key,) = made
    asks_clients = case in (WITH_CERTIFICATES, OWN_WITH_CERTIFICATES)
    assert found == Asking("localhost:50051", case[0] != "plain-text", asks_clients, key)
    port = only(objects, "Service", "-isthmus" if case[0] != "existing-secrets" else "pool-a")["spec"]["ports"][0][
        "port"
    ]
    assert f"50051:{port} &" in notes(*case)


@given
def test_the_pod_of_helm_test_may_ask(case: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables and files that it has; a key of the cases' own Secret is named in `test.keySecret`."""
    objects = objects_of(*case, "--set", "test.keySecret=test-key")
    secrets = {each["metadata"]["name"]: each["data"] for each in there(objects)}
    spec = only(objects, "Pod")["spec"]
    (container,) = spec["containers"]
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    for volume in (volume for volume in spec["volumes"] if "secret" in volume):
        place = tmp_path / mounts[volume["name"]].lstrip("/")
        place.mkdir(parents=True)
        for item in volume["secret"]["items"]:
            data = secrets[volume["secret"]["secretName"]][item["key"]]
            (place / item["path"]).write_bytes(base64.b64decode(data))
    for entry in container["env"]:
        source = entry.get("valueFrom", {}).get("secretKeyRef")
        value = base64.b64decode(secrets[source["name"]][source["key"]]).decode() if source else entry["value"]
        monkeypatch.setenv(entry["name"], f"{tmp_path}{value}" if value.startswith("/etc/") else value)
    found = asking(["generate", "-"])
    assert found.server == f"{only(objects, 'RayCluster')['metadata']['name']}:{service_port(objects)}"
    assert found.encrypted == (case[0] != "plain-text")
    assert found.shows_certificate == (case in (WITH_CERTIFICATES, OWN_WITH_CERTIFICATES))
    assert (found.key is not None) == (case != ("plain-text",))


def service_port(objects: list[Object]) -> int:
    """Of the Service that clients call."""
    name = only(objects, "RayCluster")["metadata"]["name"]
    (service,) = (each for each in objects if (each["kind"], each["metadata"]["name"]) == ("Service", name))
    return service["spec"]["ports"][0]["port"]


def test_notes_warn_of_what_lets_others_in() -> None:
    assert all("WARNING" not in notes(name) for name in CASES if name != "plain-text")
    assert notes("plain-text").count("WARNING") == 2
    assert "API keys and KV travel as plain text" in notes(*PLAIN_WITH_KEYS)
    assert "in the gateways' logs" in notes("default", "--set", "settings.log_content=true")


def test_notes_say_what_a_case_needs() -> None:
    assert "component=preload --for=condition=Complete" in notes("production")
    assert "preload" not in notes("default")
    for said in ("RayClusterProvisioned", "ReplicaFailure", "get events --field-selector involvedObject.name="):
        assert all(said in notes(name) for name in CASES)
    own = notes("existing-secrets")
    assert "what `isthmus keys add` printed: the Secret api-keys has hashes of keys only" in own
    named, asked = (
        [number for number, line in enumerate(commands(own)) if part in line]
        for part in ("--set test.keySecret=pool-a-test", "helm -n models test pool --logs")
    )
    assert named < asked
    assert "--force-conflicts" in notes("default")
    assert "--force-conflicts" not in notes("default", version="helm3")


def of_notes() -> list[str]:
    return reads(notes("default"))


def of_docs() -> list[str]:
    text = (ROOT / "docs" / "kubernetes.md").read_text().partition("## Who is who")[0]
    return [line for line in text.splitlines() if re.match(r"(export \w+=\$\()?kubectl .*get secret", line)]


@pytest.mark.parametrize("lines", [of_notes, of_docs])
def test_the_ca_and_the_key_are_found(lines: Callable[[], list[str]], tmp_path: Path) -> None:
    objects = rendered(release=RELEASE)
    found = lines()
    assert len(found) == 2
    printed = run(objects, [*found, 'printf %s "$ISTHMUS_API_KEY"'], tmp_path)
    keys = only(objects, "Secret", "-keys")["data"]
    assert printed == base64.b64decode(keys["api-key"]).decode()
    assert (tmp_path / "ca.crt").read_bytes() == base64.b64decode(only(objects, "Secret", "-ca")["data"]["tls.crt"])


def test_the_admin_s_certificate_is_found(tmp_path: Path) -> None:
    objects = rendered(release=RELEASE)
    (loop,) = re.findall(r"^for part in .*?^done$", (ROOT / "docs/kubernetes.md").read_text(), re.DOTALL | re.MULTILINE)
    run(objects, [loop], tmp_path)
    for part, value in only(objects, "Secret", "-admin")["data"].items():
        assert (tmp_path / f"admin-{part}").read_bytes() == base64.b64decode(value)


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
