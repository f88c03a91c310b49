"""The OpenAPI document against the port that it describes, by schemathesis, in a process of its own for 30 seconds."""

import subprocess
import sys
from pathlib import Path

from scripted import in_thread, says, scripted_cluster

SECONDS = 30
# That a request is valid by its schema does not say that it can be answered (a model that is not here).
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance"


def test_no_request_finds_a_bug_or_an_answer_outside_of_the_document(tmp_path: Path) -> None:
    with in_thread(scripted_cluster(says("hello"), http_listen="127.0.0.1:0", max_waiting=4096)) as gateway:
        command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{gateway.http_url}/openapi.json"]
        bounds = ["--max-time", str(SECONDS), "--checks", CHECKS, "--max-failures", "3", "--request-timeout", "10"]
        done = subprocess.run(
            [*command, *bounds, "--no-color", "--suppress-health-check", "all", "--warnings", "off"],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            timeout=SECONDS + 90,
        )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "test cases" in done.stdout or "generated" in done.stdout, done.stdout[-2000:]
