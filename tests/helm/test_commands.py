"""What notes and docs tell to type works as it is printed: flags, `kubectl` against an API server's answers, and what
`isthmus` makes of the variables and files that are there then."""

import base64
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helm.charts import ROOT, only, rendered
from helm.product import Asking, asking
from helm.told import (
    ALL,
    CASES,
    OWN_WITH_CERTIFICATES,
    PLAIN_WITH_KEYS,
    PRINTED,
    RELEASE,
    TOLD,
    WITH_CERTIFICATES,
    calls,
    commands,
    notes,
    objects_of,
    reads,
    run,
    service_ports,
    there,
    variables_of_the_test,
)
from helm.tools import program

given = pytest.mark.parametrize("case", ALL, ids="-".join)


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a person has who installs the chart: nothing of the tests."""
    for name in [name for name in os.environ if name.startswith("ISTHMUS_")]:
        monkeypatch.delenv(name)


@given
@pytest.mark.parametrize("version", ["helm", "helm3"])
def test_what_the_notes_tell_to_type_is_parsed(case: tuple[str, ...], version: str, tmp_path: Path) -> None:
    lines = commands(notes(*case, version=version))
    assert len(lines) >= 8
    for line in lines:
        assert re.match(r"kubectl |helm |isthmus |export |printf |curl |\(umask 077; kubectl ", line), line
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
    ports = service_ports(objects)
    http = f" 8000:{ports['http']}" if "http" in ports else ""
    assert f" 50051:{ports['grpc']}{http} &" in notes(*case)


@given
def test_the_pod_of_helm_test_may_ask(case: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the variables and files that it has; a key of the cases' own Secret is named in `test.keySecret`."""
    objects = objects_of(*case, "--set", "test.keySecret=test-key")
    for name, value in variables_of_the_test(objects, tmp_path).items():
        monkeypatch.setenv(name, value)
    found = asking(["generate", "-"])
    assert found.server == f"{only(objects, 'RayCluster')['metadata']['name']}:{service_ports(objects)['grpc']}"
    assert found.encrypted == (case[0] != "plain-text")
    assert found.shows_certificate == (case in (WITH_CERTIFICATES, OWN_WITH_CERTIFICATES))
    assert (found.key is not None) == (case != ("plain-text",))


def test_notes_warn_of_what_lets_others_in() -> None:
    assert all("WARNING" not in notes(name) for name in CASES if name not in ("plain-text", "cert-manager"))
    assert "over HTTP prompts, answers and API keys travel as plain text" in notes("cert-manager")
    assert notes("cert-manager").count("WARNING") == 1
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
