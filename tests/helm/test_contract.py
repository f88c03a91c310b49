"""What the chart sets and runs is what the product takes: settings, commands, variables, ports, keys, certificates."""

import ast
import base64
import importlib
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from cryptography import x509
from helm.cases import cluster_of
from helm.charts import CHART, RELEASE, VALUES, Object, helm, name_of, only, rendered, rendered_case
from helm.lint.objects import Cluster, Pod
from helm.product import checked

from isthmus.cluster.cli.main import app
from isthmus.cluster.config import ClusterConfig, load_config
from isthmus.cluster.frontend.gateway import GENERATION
from isthmus.cluster.sources import PREFIX, VARIABLES, settings_of
from isthmus.proto.rpc.health import LIVENESS

SETTINGS = "/etc/isthmus/isthmus.yaml"
cases = pytest.mark.parametrize("values", VALUES, ids=name_of)


def settings_file(objects: list[Object], folder: Path) -> Path:
    config_maps = (each for each in objects if each["kind"] == "ConfigMap" and "isthmus.yaml" in each["data"])
    (found,) = config_maps
    file = folder / "isthmus.yaml"
    file.write_text(found["data"]["isthmus.yaml"])
    return file


def commands(cluster: Cluster) -> list[list[str]]:
    """Every command of ours that a container, a hook or the test runs."""
    found = [
        [*container.get("command", ()), *container.get("args", ())]
        for pod in cluster.pods
        for container in pod.containers
    ]
    hooks = [container.get("lifecycle", {}) for pod in cluster.pods for container in pod.containers]
    found += [hook["exec"]["command"] for hook in (part for each in hooks for part in each.values()) if "exec" in hook]
    return [command[1:] for command in found if command[:1] == ["isthmus"]]


@cases
def test_settings_are_accepted(values: Path, tmp_path: Path) -> None:
    objects = rendered_case(name_of(values))
    config = load_config(settings_file(objects, tmp_path), {})
    assert config.cluster_id == ("pool-a" if name_of(values) == "existing-secrets" else config.cluster_id)
    groups = only(objects, "RayCluster")["spec"]["workerGroupSpecs"]
    assert config.prefill + config.decode == sum(group["replicas"] for group in groups)


@cases
def test_commands_and_options_exist(values: Path, tmp_path: Path) -> None:
    name = name_of(values)
    objects = rendered_case(name)
    file = str(settings_file(objects, tmp_path))
    found = commands(cluster_of(name, objects))
    assert {words[0] for words in found} == {"gateway", "supervise", "drain"}
    for words in found:
        checked([file if word == SETTINGS else word for word in words])


def test_a_wrong_option_would_be_found(tmp_path: Path) -> None:
    with pytest.raises(Exception, match="--drain"):
        checked(["gateway", "--drain", "5"])


def test_the_test_s_command_exists() -> None:
    tree = ast.parse((CHART / "files" / "generation_test.py").read_text())
    assigned = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    words = ast.literal_eval(assigned["COMMAND"])
    assert words[0] == "isthmus"
    assert checked(words[1:])["as_json"] is True


def test_commands_of_the_readme_exist() -> None:
    readme = (CHART / "README.md").read_text()
    shown = re.findall(r"`isthmus ([^`]+)`", readme)
    assert len(shown) >= 3
    command: Any = typer.main.get_command(app)
    for words in (line.split() for line in shown):
        found = command
        while (inner := getattr(found, "commands", None)) and words:
            assert words[0] in inner, words
            found, words = inner[words[0]], words[1:]
        options = {name for parameter in found.get_params(found.context_class(found)) for name in parameter.opts}
        assert {word for word in words if word.startswith("--")} <= options


def variables(pod: Pod) -> set[str]:
    return {entry["name"] for container in pod.containers for entry in container.get("env", ())}


@cases
def test_variables_are_known(values: Path) -> None:
    name = name_of(values)
    settings = {f"{PREFIX}{'__'.join(setting).upper()}" for setting in settings_of(ClusterConfig)}
    found = {name for pod in cluster_of(name, rendered_case(name)).pods for name in variables(pod)}
    assert {name for name in found if name.startswith(PREFIX)} - settings - VARIABLES.keys() == set()
    others = {name for name in found if not name.startswith((PREFIX, "RAY_"))}
    assert others <= {"HOME", "HF_HOME", "HF_HUB_OFFLINE", "HF_TOKEN"}
    hub = sources_of("huggingface_hub", "constants.py")
    assert all(name in hub for name in others - {"HOME"})
    # KubeRay sets the address of a pod's Ray; `isthmus drain --local` reads it there.
    for name in {name.removeprefix("RAY_") for name in found if name.startswith("RAY_")}:
        in_python = ("_private/ray_constants.py", "_common/usage/usage_constants.py")
        assert name.encode() in ray_binary() or any(name in sources_of("ray", file) for file in in_python), name


def sources_of(package: str, file: str) -> str:
    return (folder_of(package) / file).read_text()


def folder_of(package: str) -> Path:
    spec = find_spec(package)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent


_BINARY: list[bytes] = []


def ray_binary() -> bytes:
    """Ray's own settings are compiled in."""
    if not _BINARY:
        _BINARY.append((folder_of("ray") / "_raylet.so").read_bytes())
    return _BINARY[0]


def test_parameters_of_ray_start_exist() -> None:
    from ray.scripts.scripts import start

    options = {name.removeprefix("--") for parameter in start.params for name in parameter.opts}
    spec = only(rendered_case("production"), "RayCluster")["spec"]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert group["rayStartParams"].keys() <= options


@cases
def test_ports_are_those_of_the_settings(values: Path, tmp_path: Path) -> None:
    name = name_of(values)
    objects = rendered_case(name)
    settings = yaml.safe_load(settings_file(objects, tmp_path).read_text())

    def port(section: str, setting: str) -> int:
        return int(settings[section][setting].rpartition(":")[2])

    cluster = cluster_of(name, objects)
    for pod in cluster.pods:
        if pod.role == "gateway" and pod.owner["kind"] == "Deployment":
            http = {} if settings["gateway"]["http_listen"] == "none" else {"http": port("gateway", "http_listen")}
            assert pod.ports() == {"grpc": 50051, **http, "health": port("gateway", "health_listen")}
            assert "0.0.0.0:50051" in pod.spec["containers"][0]["args"]
            ready = pod.spec["containers"][0]["readinessProbe"]["grpc"]
            assert ready["service"] == GENERATION.full_name  # not all services: requests need no database of jobs
        elif pod.is_head:
            wanted = {"admin": port("supervisor", "listen"), "sv-health": port("supervisor", "health_listen")}
            assert wanted.items() <= pod.ports().items()
        elif pod.group is not None:
            health = port(f"{pod.role}_worker", "health_listen")
            assert {"worker": settings["worker_port"], "health": health}.items() <= pod.ports().items()
            assert pod.spec["containers"][0]["readinessProbe"]["grpc"]["port"] == health
    service = only(objects, "Service", "supervisor")
    assert settings["gateway"]["supervisor"] == f"{service['metadata']['name']}:{service['spec']['ports'][0]['port']}"
    assert settings["gateway"]["admin_listen"].startswith("127.0.0.1:")


@cases
def test_liveness_is_asked_of_the_service_that_always_serves(values: Path) -> None:
    name = name_of(values)
    asked: dict[str, set[tuple[str, int]]] = {}
    for pod in cluster_of(name, rendered_case(name)).pods:
        for container in pod.containers:
            for kind in ("startupProbe", "livenessProbe"):
                if grpc := container.get(kind, {}).get("grpc"):
                    asked.setdefault(container["name"], set()).add((grpc["service"], grpc["port"]))
    assert asked == {"gateway": {(LIVENESS, 50054)}, "supervisor": {(LIVENESS, 50055)}}


@cases
def test_files_that_settings_name_are_mounted(values: Path, tmp_path: Path) -> None:
    name = name_of(values)
    objects = rendered_case(name)
    text = settings_file(objects, tmp_path).read_text()
    named = set(re.findall(r"(/etc/[\w/.-]+|/var/lib/isthmus[\w/.-]+)", text))
    for pod in cluster_of(name, objects).pods:
        if pod.role in ("gateway", "head", "prefill", "decode") and pod.owner["kind"] in ("Deployment", "RayCluster"):
            mounted = tuple(mount["mountPath"] for mount in pod.spec["containers"][0]["volumeMounts"])
            missing = {path for path in named if not path.startswith(mounted)}
            allowed = {"gateway": "pages", "head": "pages|keys", "decode": "pages|keys", "prefill": "keys"}[pod.role]
            assert {path for path in missing if not re.search(allowed, path)} == set()


def test_the_key_is_one_that_gateways_accept() -> None:
    """Made of SHA-256 in a template: gateways must find it right, and no other."""
    key_file = importlib.import_module("isthmus.cluster.access.key_file")
    refused = importlib.import_module("isthmus.cluster.access.caller").Refused
    for _ in range(3):
        rendered_text_anew = helm("template", RELEASE, str(CHART), "--show-only", "templates/keys.yaml").stdout
        data = {name: base64.b64decode(value) for name, value in yaml.safe_load(rendered_text_anew)["data"].items()}
        table = key_file.parse_table(data["keys.json"])
        key = data["api-key"].decode()
        assert table.verify(key).tenant == "default"
        with pytest.raises(refused):
            table.verify(key[:-1] + ("A" if key[-1] != "A" else "B"))


@pytest.mark.parametrize("role", ["gateway", "supervisor", "prefill", "decode", "admin"])
def test_certificates_say_what_peers_expect(role: str) -> None:
    """Sprig makes no URI names: there the identity is the DNS name, and the common name."""
    identity = importlib.import_module("isthmus.proto.security.identity")
    secret = only(rendered(), "Secret", f"-tls-{role}")
    certificate = x509.load_pem_x509_certificate(base64.b64decode(secret["data"]["tls.crt"]))
    names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    dns = names.get_values_for_type(x509.DNSName)
    own = identity.Identity("prod-isthmus", role, f"prod-isthmus-{role}")
    assert set(identity.server_names([own])) <= set(dns)
    peer = {
        "x509_common_name": [f"prod-isthmus-{role}".encode()],
        "x509_subject_alternative_name": [name.encode() for name in dns],
        "peer_dns": [name.encode() for name in dns],
    }
    assert identity.identities_of(peer) == [own]


@pytest.mark.parametrize("role", ["gateway", "supervisor", "prefill", "decode", "admin"])
def test_a_pod_may_use_its_own_certificate(role: str, tmp_path: Path) -> None:
    """As the process reads it at its start: of its cluster, and for its role."""
    settings = importlib.import_module("isthmus.proto.security.settings")
    secret = only(rendered(), "Secret", f"-tls-{role}")
    for name, value in secret["data"].items():
        (tmp_path / name).write_bytes(base64.b64decode(value))
    files = settings.TlsFiles(ca=tmp_path / "ca.crt", cert=tmp_path / "tls.crt", key=tmp_path / "tls.key")
    assert settings.security_of(files, "prod-isthmus", role) is not None


def test_issued_certificates_have_the_same_names() -> None:
    identity = importlib.import_module("isthmus.proto.security.identity")
    for role in ("gateway", "supervisor", "prefill", "decode", "admin"):
        spec = only(rendered_case("cert-manager"), "Certificate", f"-{role}")["spec"]
        (uri,) = spec["uris"]
        assert identity.Identity.parse(uri).role == role
        assert set(identity.server_names([identity.Identity.parse(uri)])) <= set(spec["dnsNames"])


def test_the_hub_s_command_has_the_options_of_the_preload_job() -> None:
    (container,) = only(rendered_case("production"), "Job")["spec"]["template"]["spec"]["containers"]
    assert container["command"] == ["hf", "download"]
    hf = Path(sys.executable).parent / "hf"
    done = subprocess.run([str(hf), "download", "--help"], capture_output=True, text=True, check=True, timeout=60)
    assert "--include" in done.stdout
    assert {word for word in container["args"] if word.startswith("--")} == {"--include"}
    included = {word for word in container["args"] if "*" in word}
    sources = importlib.import_module("isthmus.model.load.sources")
    assert included == set(sources._HUB_FILES)


def test_the_answer_has_what_the_test_reads() -> None:
    """The bytes of KV that moved, of `isthmus generate --json`."""
    from isthmus.proto.generation_pb2 import Timings

    transfer = Timings.DESCRIPTOR.fields_by_name["transfer"].message_type
    assert "kv_bytes_wire" in transfer.fields_by_name
