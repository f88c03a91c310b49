"""`isthmus config`: what applies, and where it comes from."""

import json
from pathlib import Path

import pytest

from isthmus.cluster.cli.main import run
from isthmus.cluster.config import ClusterConfig
from isthmus.cluster.launch.worker_thread import cores_for_one
from isthmus.cluster.sources import settings_of


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With settings of each kind, and a variable beside it."""
    path = tmp_path / "cluster.yaml"
    path.write_text(
        "model: m\ncodec: raw\ngateway: {replays: 3, tenant_weights: {a: 2, b: 0.5}, workers: [h:1, h:2]}\n"
        "decode_worker: {max_batch: 4, dtype: fp32}\n"
    )
    monkeypatch.setenv("ISTHMUS_DECODE_WORKER__POOL_GIB", "0.5")
    return path


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, list[str]]:
    """What each setting's line says after its name."""
    assert run(["config", "show", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["setting", "source", "value"]
    assert max(len(line) for line in lines if not line.startswith("file: ")) <= 80  # a path is shown whole
    return {name: rest for name, *rest in (line.split() for line in lines[1:])}


def test_everything_that_up_reads(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(capsys, "--config", str(file), "--port", "7000", "--overcommit", "3")
    assert rows["file:"] == [str(file)]
    assert rows["model"] == ["file", "m"]
    assert rows["port"] == ["flag", "7000"]
    assert rows["host"] == ["default", "127.0.0.1"]
    assert rows["gateway.overcommit"] == ["flag", "3"]
    assert rows["gateway.tenant_weights"] == ["file", "a=2,b=0.5"]
    assert rows["gateway.workers"] == ["file", "h:1,h:2"]
    assert rows["gateway.jobs_db"] == ["environment", "-"]
    assert rows["prefill_worker.model"] == ["file", "m"]
    assert rows["prefill_worker.dtype"] == ["default", "auto"]
    assert rows["decode_worker.default_codec"] == ["file", "raw"]
    assert rows["decode_worker.pool_gib"] == ["environment", "0.5"]
    assert set(rows) == {"file:", *(".".join(setting) for setting in settings_of(ClusterConfig))}


def test_what_a_worker_reads(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(capsys, "--config", str(file), "--role", "decode")
    assert rows["max_batch"] == ["file", "4"]
    assert rows["threads"] == ["default", str(cores_for_one())]
    assert rows["drain_s"] == ["default", "30"]
    assert "replays" not in rows and "store_dir" not in rows


def test_what_a_gateway_reads(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = shown(capsys, "--config", str(file), "--role", "gateway")
    assert rows["gateway.replays"] == ["file", "3"]
    assert [name for name in rows if not name.startswith("gateway.")] == ["model", "host", "port", "drain_s", "file:"]


def test_json_names_the_source(file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISTHMUS_CONFIG", str(file))
    monkeypatch.setenv("ISTHMUS_JOBS_DB", "postgresql://me:secret@host/jobs")
    assert run(["config", "show", "--json", "--port", "1"]) == 0
    rows = {row["setting"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["port"] == {"setting": "port", "value": 1, "source": "flag", "name": "--port"}
    assert rows["model"] == {"setting": "model", "value": "m", "source": "file", "name": str(file)}
    assert rows["gateway.jobs_db"]["value"] == "postgresql://me:***@host/jobs"
    assert rows["gateway.jobs_db"]["name"] == "ISTHMUS_JOBS_DB"
    assert rows["gateway.max_request_s"] == {
        "setting": "gateway.max_request_s",
        "value": None,
        "source": "default",
        "name": None,
    }
    assert rows["cluster_id"]["value"] is None, "drawn at each start"


def test_mistakes_are_those_of_up(file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file.write_text("decode: -1")
    assert run(["config", "show", "--config", str(file)]) == 1
    assert capsys.readouterr().err == (
        f"error: INVALID_ARGUMENT: decode is -1: Input should be greater than or equal to 0 (from {file})\n"
    )


def test_the_schema_describes_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["config", "schema"]) == 0
    schema = json.loads(capsys.readouterr().out)
    described = [schema, *schema["$defs"].values()]
    assert all(field.get("description") for model in described for field in model["properties"].values())
    assert schema["additionalProperties"] is False
