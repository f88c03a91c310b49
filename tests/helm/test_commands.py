"""What notes and docs tell to type gets what it says: `kubectl` against an API server's answers."""

import base64
import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from helm.api_server import serving
from helm.charts import CHART, NAMESPACE, ROOT, Object, helm, only, rendered
from helm.tools import program

RELEASE = "pool"  # as the docs call it


def lines_of(text: str) -> list[str]:
    """Commands that read a Secret."""
    return [line.strip() for line in text.splitlines() if re.match(r" *(export \w+=\$\()?kubectl .*get secret", line)]


def of_notes() -> list[str]:
    done = helm("install", RELEASE, str(CHART), "--namespace", NAMESPACE, "--dry-run=client")
    return lines_of(done.stdout.partition("NOTES:")[2])


def of_docs() -> list[str]:
    return lines_of((ROOT / "docs" / "kubernetes.md").read_text().partition("## Who is who")[0])


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
